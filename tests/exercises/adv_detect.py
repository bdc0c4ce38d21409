"""Solutions of the exercises of adv_detect.py, right ones and typical wrong ones."""
from solutions import Solution, wrong

METRICS = {"TIES": 0.833, "LOGITS": 0.75, "SIGMOIDS": 0.5, "T": 2, "FPR": 0.4}
CLAIM = {"ADAM_Z": 0.01, "ADAM_L": 1.4e-5, "SIGN_L": 0.01, "SIGN_SURE": 0, "VERDICT": "blind", "REPAIR": "logit"}
PROJECT = '''
def project(x, x0, a):
    """Box, then ball."""
    delta = {box} - x0
    if a.norm == "inf":
        return {cube}
    return {ball}
'''
SQUARES = "delta.square().sum((-3, -2, -1), True)"
FIRST = "delta.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))"  # of [K, n, C, S, S]: n images in one length
BOX, CUBE = "x.clamp(0, 1)", "x0 + delta.clamp(-a.eps, a.eps)"
OTHER_PROJECT = '''
def project(x, x0, a):
    x = torch.min(torch.max(x, torch.zeros_like(x)), torch.ones_like(x))
    if a.norm == "2":
        far = (x - x0).flatten(-3).norm(dim=-1)[..., None, None, None]
        return torch.where(far > a.eps, x0 + (x - x0) / (far + 1e-12) * a.eps, x)
    return torch.max(torch.min(x, x0 + a.eps), x0 - a.eps)
'''
BALL_FIRST = '''
def project(x, x0, a):
    delta = x - x0
    if a.norm == "inf":
        return (x0 + delta.clamp(-a.eps, a.eps)).clamp(0, 1)
    return (x0 + delta * (a.eps / length(delta).clamp(min=a.eps))).clamp(0, 1)
'''
KEEP = '''
def keep_better(best, best_auc, H, scores):
    for k, (clean, attacked) in enumerate(zip(*scores)):
        auc = auroc({scores})
        if {better}:
            {remember}
            {keep}
'''
COPY = "best.nets[k].load_state_dict(H.nets[k].state_dict())"
BY_PARAMETERS = '''
@torch.no_grad()
def keep_better(best, best_auc, H, scores):
    aucs = torch.tensor([auroc(clean, attacked) for clean, attacked in zip(*scores)])
    for k in (aucs >= best_auc).nonzero().flatten().tolist():
        for kept, now in zip(best.nets[k].parameters(), H.nets[k].parameters()):
            kept.copy_(now)
    best_auc.copy_(torch.maximum(best_auc, aucs))
'''
ALL_TOGETHER = '''
def keep_better(best, best_auc, H, scores):
    aucs = torch.tensor([auroc(clean, attacked) for clean, attacked in zip(*scores)])
    if aucs.mean() >= best_auc.mean():
        best_auc.copy_(aucs)
        best.load_state_dict(H.state_dict())
'''


def metrics(**changed):
    return {"answers": {**METRICS, **changed}}


def claim(**changed):
    return {"answers": {**CLAIM, **changed}}


def project(ball="x0 + delta * (a.eps / length(delta).clamp(min=a.eps))", box=BOX, cube=CUBE):
    return {"project": PROJECT.format(box=box, cube=cube, ball=ball)}


def keep(keep=COPY, remember="best_auc[k] = auc", better="auc >= best_auc[k]", scores="clean, attacked"):
    return {"keep_better": KEEP.format(keep=keep, remember=remember, better=better, scores=scores)}


SOLUTIONS = {
    "adv_detect-1": Solution(
        right=[metrics(), metrics(TIES=5 / 6, LOGITS=3 / 4, SIGMOIDS=1 / 2, T=2.0, FPR=2 / 5)],
        wrong=[wrong("two are ties", **metrics(TIES=0.667)), wrong("not a whole one", **metrics(TIES=1)),
               wrong("six pairs", **metrics(TIES=0.5)), wrong("four pairs", **metrics(LOGITS=1)),
               wrong("on paper", **metrics(SIGMOIDS=0.75)), wrong("as half", **metrics(SIGMOIDS=1)),
               wrong("a share of .5", **metrics(T=3)), wrong("three of the four", **metrics(T=-1)),
               wrong("by ALL", **metrics(FPR=0.5)), wrong("no false positive", **metrics(FPR=0.6)),
               wrong("z >= T", **metrics(FPR=0.2)), wrong("AND", **metrics(FPR=0.8)),
               wrong("no answer", **metrics(FPR=None))]),
    "adv_detect-2": Solution(
        right=[project(), {"project": OTHER_PROJECT},
               project(f"x0 + delta * (a.eps / {SQUARES}.sqrt().clamp(min=1e-9)).clamp(max=1)")],
        wrong=[wrong("box comes first", project=BALL_FIRST),
               wrong("nan", **project("x0 + delta * (a.eps / length(delta))")),
               wrong("stay where they are", **project("x0 + delta * (a.eps / length(delta).clamp(min=1e-9))")),
               wrong("own length", **project("x0 + delta * (a.eps / delta.norm().clamp(min=a.eps))")),
               wrong("own length", **project("x0 + delta * (a.eps / length(delta).amax().clamp(min=a.eps))")),
               wrong("is left", **project("x0 + delta * (a.eps / delta.norm(2, (-2, -1), True).clamp(min=a.eps))")),
               wrong("is left", **project("x0 + delta.clamp(-a.eps, a.eps)")),
               wrong("nan", **project(f"x0 + delta * (a.eps / {FIRST})")),
               wrong("own length", **project(f"x0 + delta * (a.eps / {FIRST}.clamp(min=a.eps))")),
               wrong("is left", **project(f"x0 + delta * (a.eps / {SQUARES}.clamp(min=a.eps))")),
               wrong("outside of [0, 1]", **project(box="x")),
               wrong("farther than eps", **project(cube="x0 + delta")),
               wrong("by itself", **project(
                   cube="x0 + delta * (a.eps / delta.abs().amax((-3, -2, -1), True).clamp(min=a.eps))")),
               wrong("stay where", **project(cube="x0 + a.eps * delta.sign()")),
               wrong("in place", **project(box="x.clamp_(0, 1)"))]),
    "adv_detect-3": Solution(
        right=[keep(), keep("best.nets[k] = copy.deepcopy(H.nets[k])"), {"keep_better": BY_PARAMETERS},
               {"swaps": [("best.nets[k] = H.nets[k]", COPY)]}],
        wrong=[wrong("own tensors", **keep("best.nets[k] = H.nets[k].eval()")),
               wrong("own tensors", **keep("best.nets[k]._parameters.update(H.nets[k]._parameters)")),
               wrong("own tensors", **keep("best.nets[k].load_state_dict(H.nets[k].state_dict(), assign=True)")),
               wrong("own tensors", **keep("best.nets[k] = copy.copy(H.nets[k])")),
               wrong("exchanged", **keep("best.nets[k] = H.nets[k]; H.nets[k] = copy.deepcopy(H.nets[k])")),
               wrong("at least", **keep(better="auc > best_auc[k]")),
               wrong("became worse", **keep(better="True")),
               wrong("best_auc", **keep(remember="pass")),
               wrong("best_auc", **keep(remember="best_auc = best_auc.clone(); best_auc[k] = auc")),
               wrong("weights of H", **keep("H.nets[k].load_state_dict(best.nets[k].state_dict())")),
               wrong("best_auc", **keep(scores="attacked, clean")),
               wrong("became worse", keep_better=ALL_TOGETHER),
               wrong("became worse", **keep("best.load_state_dict(H.state_dict())"))]),
    "adv_detect-4": Solution(
        right=[claim(), claim(ADAM_L=0.01 * 1.389e-11 / 1.0014e-8, SIGN_SURE=0.0, VERDICT="Blind", REPAIR=" logit")],
        wrong=[wrong("ADAM_Z", **claim(ADAM_Z=0.001)), wrong("not 0", **claim(ADAM_L=0)),
               wrong("denominator", **claim(ADAM_L=0.01)), wrong("to two digits", **claim(ADAM_L=1.4e-13)),
               wrong("SIGN_L", **claim(SIGN_L=0)), wrong("float32", **claim(SIGN_SURE=0.01)),
               wrong("not move", **claim(VERDICT="robust")), wrong("counted rightly", **claim(VERDICT="miscounted")),
               wrong("three words", **claim(VERDICT="yes")), wrong("next to nothing", **claim(REPAIR="steps")),
               wrong("random start", **claim(REPAIR="starts")), wrong("SIGN_SURE", **claim(REPAIR="signs")),
               wrong("four words", **claim(REPAIR="more"))]),
}
