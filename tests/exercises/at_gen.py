"""Solutions of the exercises of at_gen.py, right ones and typical wrong ones."""
from solutions import Solution, wrong

NUMBERS = {"LOSS": 0.693, "DATA": 0.047, "ATTACKED": 0.953, "EBM": 1, "MOVED": 0.4}
STEP = '''
def pgd_attack_step(x, f, x0, step, eps):
    """Eq. 2.7."""
    gradient = input_gradient(f, x)
    length = {length}.view(-1, 1, 1, 1)
    x = x + step * gradient / {guarded}
    {ball}
    return {end}
'''
BALL = '''if eps < math.inf:
        far = (x - x0).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        x = torch.where(far > eps, x0 + eps * (x - x0) / far.clamp(min=1e-12), x)'''
OTHER_STEP = '''
def pgd_attack_step(x, f, x0, step, eps):
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        g, = torch.autograd.grad(f(x).sum(), x)
    x = x.detach()
    delta = x + step * F.normalize(g.flatten(1), dim=1).view_as(x) - x0
    if not math.isinf(eps):
        delta = torch.renorm(delta, 2, 0, eps)
    return torch.min(torch.max(x0 + delta, torch.zeros_like(x)), torch.ones_like(x))
'''
NO_GRAD_STEP = '''
def pgd_attack_step(x, f, x0, step, eps):
    x = x.clone().requires_grad_(True)
    f(x).sum().backward()
    return x
'''
LEAKING_STEP = '''
def pgd_attack_step(x, f, x0, step, eps):
    with torch.enable_grad():
        x = x.clone().requires_grad_(True)
        f(x).sum().backward()
    x = x.detach() + step * x.grad / (x.grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 1e-10)
    return x.clamp(0, 1)
'''
R1 = '''
def r1_penalty(f_data, x):
    {gradient}
    return {text}
'''
SLOPE = "(gradient,) = torch.autograd.grad(f_data.sum(), x, create_graph=True)"
GATE = '''
def gated_k(s, aucs, threshold=0.8, window=20):
    """K of the next update."""
    K, here, seen = s.k_min, [], []
    for auc in aucs:
        {append}
        used_up = len(here) >= s.iters_per_k
        clear = {clear}
        if (used_up or clear) and K < s.k_max:
            K += 1
            {anew}
    return K


def steps_of_update(s, it):
    return s.k_min + (it - 1) // s.iters_per_k
'''
OTHER_GATE = '''
def gated_k(s, aucs, threshold=0.8, window=20):
    first = 0
    for K in range(s.k_min, s.k_max):
        for end in range(first + 1, len(aucs) + 1):
            n = end - first
            if n == s.iters_per_k or (n >= window and torch.tensor(aucs[end - window : end]).mean() > threshold):
                break
        else:
            return K
        first = end
    return s.k_max


def steps_of_update(s, it):
    return s.k_min + (it - 1) // s.iters_per_k
'''


def numbers(**changed):
    return {"answers": {**NUMBERS, **changed}}


def step(length="gradient.flatten(1).norm(dim=1)", guarded="(length + 1e-10)", ball=BALL, end="x.clamp(0, 1)"):
    return {"pgd_attack_step": STEP.format(length=length, guarded=guarded, ball=ball, end=end)}


def r1(text="gradient.pow(2).flatten(1).sum(1).mean() / 2", gradient=SLOPE):
    return {"r1_penalty": R1.format(gradient=gradient, text=text)}


def gate(clear="len(here) >= window and sum(here[-window:]) / window > threshold", append="here.append(auc)",
         anew="here = []"):
    return {"steps_of_update": GATE.format(clear=clear, append=append, anew=anew)}


def gate_with(old, new, **options):
    """The first right solution with a mistake in it."""
    return {"steps_of_update": gate(**options)["steps_of_update"].replace(old, new, 1)}


SOLUTIONS = {
    "at_gen-1": Solution(
        right=[numbers(), numbers(LOSS=0.69, DATA=1 - 0.9526, ATTACKED=0.9526, EBM=1.0)],
        wrong=[wrong("2m", **numbers(LOSS=1.386)), wrong("sigmoid(0)", **numbers(LOSS=0.5)),
               wrong("exchanged", **numbers(DATA=0.953, ATTACKED=0.047)), wrong("DATA", **numbers(DATA=0.024)),
               wrong("ATTACKED", **numbers(ATTACKED=3)), wrong("EBM", **numbers(EBM=0.5)),
               wrong("before the clamp", **numbers(MOVED=1)), wrong("l_2", **numbers(MOVED=0.1)),
               wrong("no answer", **numbers(MOVED=None))]),
    "at_gen-2": Solution(
        right=[step(), {"pgd_attack_step": OTHER_STEP},
               step(guarded="length.clamp(min=1e-12)",
                    ball="x = x0 + (x - x0) * (eps / (x - x0).flatten(1).norm(dim=1).clamp(min=1e-12))"
                         ".clamp(max=1).view(-1, 1, 1, 1)")],
        wrong=[wrong("not finite", **step(guarded="length")), wrong("own gradient", **step(guarded="1")),
               wrong("own gradient", **step(length="gradient.norm().repeat(len(x))")),
               wrong("own gradient", **step(length="gradient[:, 0].flatten(1).norm(dim=1)")),
               wrong("climb", **step(guarded="-(length + 1e-10)")), wrong("around x0", **step(ball="")),
               wrong("around x0", **step(ball=BALL.replace("x = torch", "x = x + 0 * torch"))),
               wrong("inside of the", **step(ball=BALL.replace("far > eps", "far > 0"))),
               wrong("inside of the", **step(ball=BALL.replace("far > eps", "far.max() > eps"))),
               wrong("not finite", **step(ball="x = x0 + (x - x0) * eps / (x - x0).flatten(1).norm(dim=1)"
                                               ".clamp(min=eps).view(-1, 1, 1, 1)")),
               wrong("leaves [0, 1]", **step(end="x")), wrong("leaves [0, 1]", **step(end="x.clamp(max=1)")),
               wrong("first the ball", **step(ball="x = x.clamp(0, 1)\n    " + BALL)),
               wrong("in place", pgd_attack_step=STEP.format(
                   length="gradient.flatten(1).norm(dim=1)", guarded="(length + 1e-10)", ball="", end="x.clamp(0, 1)")
                   .replace("x = x + step *", "x += step *")),
               wrong("very flat", **step(guarded="(length + 1e-4)")),
               wrong("no_grad", pgd_attack_step=NO_GRAD_STEP),
               wrong("f's parameters", pgd_attack_step=LEAKING_STEP)]),
    "at_gen-3": Solution(
        right=[r1(), r1("0.5 * gradient.square().sum() / len(x)"), {"swaps": [("retain_graph", "create_graph")]}],
        wrong=[wrong("every gamma", **r1(gradient=SLOPE.replace("create", "retain"))),
               wrong("every gamma", **r1("gradient.detach().pow(2).flatten(1).sum(1).mean() / 2")),
               wrong("is 2 times", **r1("gradient.pow(2).flatten(1).sum(1).mean()")),
               wrong("is 0.25 times", **r1("gradient.pow(2).flatten(1).mean(1).mean() / 2")),
               wrong("is 3 times", **r1("gradient.pow(2).sum() / 2")),
               wrong("squared length", **r1("gradient.flatten(1).norm(dim=1).mean() / 2")),
               wrong("squared length", **r1("gradient.mean(0).pow(2).sum() / 2")),
               wrong("detached", **r1("(gradient * gradient.detach()).flatten(1).sum(1).mean() / 2")),
               wrong("stops with", **r1(gradient="(gradient,) = torch.autograd.grad(f_data, x, create_graph=True)"))]),
    "at_gen-4": Solution(
        right=[gate(), {"steps_of_update": OTHER_GATE}],
        wrong=[wrong("all its iters_per_k", **gate("len(here) >= window and sum(here[-window:]) / window < threshold")),
               wrong("at least `window`", **gate("sum(here[-window:]) / len(here[-window:]) > threshold")),
               wrong("MEAN", **gate("len(here) >= window and min(here[-window:]) > threshold")),
               wrong("MEAN", **gate("len(here) >= window and here[-1] > threshold")),
               wrong("not over all", **gate("len(here) >= window and sum(here) / len(here) > threshold")),
               wrong("reach back", **gate(anew="here = here[-1:]")),
               wrong("counts from the first", **gate_with("here) >= s.iters_per_k", "seen) % s.iters_per_k == 0",
                                                          append="here.append(auc); seen = seen + [auc]")),
               wrong("beyond k_max", **gate_with(" and K < s.k_max", "")),
               wrong("after iters_per_k", **gate_with("used_up or ", "")),
               wrong("without the gate", **gate_with("(here) >= s", "(here) > s")),
               wrong("first K", **gate_with("s.k_min, []", "0, []")),
               wrong("list of AUCs", **gate_with("return K", "aucs.clear()\n    return K")),
               wrong("threshold or window", **gate("len(here) >= window and sum(here[-window:]) / window > 0.8")),
               wrong("no function", steps_of_update="def steps_of_update(s, it):\n    return s.k_min")]),
}
