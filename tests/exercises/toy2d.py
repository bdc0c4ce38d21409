"""Solutions of the exercises of toy2d.py, right ones and typical wrong ones."""
from solutions import Solution, wrong

LANGEVIN = '''
def langevin_2d(f, x, steps, noise):
    """Eq. 2.3."""
    for _ in range(steps):
        x = x + {drift} * input_gradient(f, x) + {noise} * torch.randn_like(x)
    return x
'''
BODY = """
def langevin_2d(f, x, steps, noise):
    {first}
    for _ in range(steps):
        {step}
    return {give}
"""
OTHER_LANGEVIN = '''
def langevin_2d(f, x, steps, noise):
    lam = noise ** 2
    while steps > 0:
        x = x.detach().requires_grad_(True)
        g = torch.autograd.grad(f(x).sum(), x)[0]
        x = (x + lam / 2 * g + math.sqrt(lam) * torch.randn(x.shape)).detach()
        steps -= 1
    return x
'''
BANK = '''
def persistent_chains(s, steps, restart):
    bank = sample_p0("uniform", max(4096, s.m))

    def sampler(f, x0):
        places = torch.randperm(len(bank))[: len(x0)]
        begin = torch.where(torch.rand(len(x0), 1) < restart, x0, {begin})
        end = langevin_2d(f, begin, steps, s.noise)
        {keep}
        return {give}

    return sampler
'''
HINGE = '''
def hinge_loss(f_data, f_adv):
    return {text}


def at_loss(f_data, f_adv):
    return (F.softplus(-f_data).mean() + F.softplus(f_adv).mean()) / 2
'''


def langevin(drift="noise ** 2 / 2", noise="noise"):
    return {"langevin_2d": LANGEVIN.format(drift=drift, noise=noise)}


def body(step="x = x + noise ** 2 / 2 * input_gradient(f, x) + noise * torch.randn_like(x)", first="pass", give="x"):
    """langevin_2d with another line."""
    return {"langevin_2d": BODY.format(first=first, step=step, give=give)}


DRIFT = "x = x + noise ** 2 / 2 * input_gradient(f, x)"
GRAPH = ("x = x if x.requires_grad else x.requires_grad_(); "
         "g = torch.autograd.grad(f(x).sum(), x, create_graph=True)[0]; "
         "x = x + noise ** 2 / 2 * g + noise * torch.randn_like(x)")


def bank(begin="bank[places]", keep="bank[places] = end", give="end"):
    return {"persistent_chains": BANK.format(begin=begin, keep=keep, give=give)}


def hinge(text):
    return {"at_loss": HINGE.format(text=text)}


SOLUTIONS = {
    "toy2d-1": Solution(
        right=[{"answers": {"STEEP": 1.32, "FLAT": 1.32}}, {"answers": {"STEEP": 3 - 14 * 0.12, "FLAT": 1.3}}],
        wrong=[wrong("STEEP", answers={"STEEP": 0.0, "FLAT": 1.32}), wrong("FLAT", answers={"STEEP": 1.32, "FLAT": 3.0}),
               wrong("STEEP", answers={"STEEP": 1.68, "FLAT": 1.68}), wrong("no answer", answers={"STEEP": 1.32})]),
    "toy2d-2": Solution(
        right=[langevin(), {"langevin_2d": OTHER_LANGEVIN},
               body(DRIFT + " + kicks[_]", "kicks = noise * torch.randn(steps, *x.shape)"),
               body("x.add_(noise ** 2 / 2 * input_gradient(f, x)).add_(noise * torch.randn_like(x))",
                    "x = x.detach().clone()")],
        wrong=[wrong("drift is 2.0", **langevin("noise ** 2")), wrong("VARIANCE", **langevin(noise="noise ** 2")),
               wrong("every step has noise", **body(DRIFT, give="x + noise * torch.randn_like(x)")),
               wrong("noise of its own", **body(DRIFT + " + noise * z", "z = torch.randn_like(x)")),
               wrong("both coordinates", **body(DRIFT + " + noise * torch.randn(len(x), 1)")),
               wrong("same noise", **body(DRIFT + " + noise * torch.randn(2)")),
               wrong("graph", **body(GRAPH, "x = x.clone()")), wrong("`return`", **body(give="None")),
               wrong("in place", **body("x += noise ** 2 / 2 * input_gradient(f, x) + noise * torch.randn_like(x)")),
               wrong("how many steps", **{"langevin_2d": body()["langevin_2d"].replace("(steps)", "(steps - 1)")}),
               wrong("SUM", **langevin("noise ** 2 / 2 / len(x)")),
               wrong("anew", **body(DRIFT.replace("input_gradient(f, x)", "g") + " + noise * torch.randn_like(x)",
                                    "g = input_gradient(f, x)")),
               wrong("no noise", **langevin(noise="0")), wrong("climb", **langevin("-noise ** 2 / 2")),
               wrong("VARIANCE", **langevin("noise / 2", "noise ** 0.5")),
               wrong("ten times", langevin_2d=LANGEVIN.format(drift="noise ** 2 / 2", noise="noise").replace("steps)", "1)", 1)
                     .replace("noise, steps", "noise").replace("(steps)", "(1)"))]),
    "toy2d-3": Solution(
        right=[bank(), bank(keep="bank.index_copy_(0, places, end)", give="bank[places]")],
        wrong=[wrong("not kept", **bank(keep="bank[places] = begin")), wrong("begin at x0", **bank(begin="x0")),
               wrong("not kept", **bank(keep="places[:] = 0"))]),
    "toy2d-4": Solution(
        right=[hinge("(1 - f_data).clamp(min=0).mean() + (1 + f_adv).clamp(min=0).mean()"),
               hinge("(F.relu(1 - f_data).mean() + F.relu(1 + f_adv).mean()) / 2")],
        wrong=[wrong("not 1.667", **hinge("(1 + f_data).clamp(min=0).mean() + (1 - f_adv).clamp(min=0).mean()")),
               wrong("not one number", **hinge("F.relu(1 - f_data) + F.relu(1 + f_adv)")),
               wrong("not 1.667", **hinge("F.softplus(1 - f_data).mean() + F.softplus(1 + f_adv).mean()")),
               wrong("hinge_loss", **hinge("f_adv.mean() - f_data.mean()"))]),
}
