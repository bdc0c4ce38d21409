r"""The 2-D lesson: what binary adversarial training learns, and how it differs from a GAN and from an EBM.

Source: Yin 2022, "Generative Modeling With Adversarial Training", figures 2.1 and 2.2 ("the dissertation").

Points in the plane [-2, 2]^2 take the place of images. A small network f gives D = sigmoid(f). Data are blue,
p0 and what becomes of it are red. Two players share one pay-off

    U(D, p_T) = E_data[log D(x)] + E_{p_T}[log(1 - D(x))]                                     (2.12)

and it matters who moves first.

    Algorithm 1, max_D min_{p_T} U:  draw x from data and x_0 from p0; move x_0 by K steps
        x <- x + step * g / ||g||,  g = grad f(x)                                             (2.8)
    then one optimiser step on D; fresh x_0 the next time. Proposition 1: U = -log 4 = -1.386, D = 1/2 on the
    support of the data, at most 1/2 elsewhere. What p0 never reaches is never pressed down: fig. 2.1, right.
    Algorithm 2, min_{p_T} max_D U:  fixed data and particles x*; train D to convergence, then move every
    particle ONE step of (2.8), and keep it there. They become the data; D means nothing elsewhere: fig. 2.2.

    f(x) logit, HIGH = in-distribution. The plane has no [0, 1] range and nothing is clamped.

Commands (times and numbers: README, results/):
    python toy2d.py                                   figures 2.1 and 2.2, under a minute on two cores
    python toy2d.py --data ring                       on a ring of Gaussians; or grid, spirals, checkerboard
    python toy2d.py --only stability samplers energies  three short lessons; --list says what they show

Differs from the source: it does not publish network, step, K, iterations or spread for these figures; all are
ours, chosen so that each figure shows what the text says of it. The learning rate falls to zero (cosine), so
that the picture is an optimum and not one moment of a game. Algorithm 2's particles take a step that shrinks
likewise, for the same reason: with a fixed step they circle the data at that distance. The reach K * step =
1.68 is short of the plane's corners, 2.83 away. Give it more (--k 20 --step 0.15) and D becomes 1/2
everywhere: the smallest slope is enough for normalised steps to bring all of p0 home, nothing is left outside
to press down, and that too is an optimum.
"""
import dataclasses
import math
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common
from common import Diverged, Experiment, Run

# --- settings -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Settings:
    """None of these is published; each field is also a flag."""
    width: int = 128             # units of each of the three hidden layers
    m: int = 256                 # points of each side in an update
    lr: float = 1e-3             # Adam, falling to 0 (cosine)
    k: int = 14                  # PGD steps (Alg. 1)
    step: float = 0.12           # length of a PGD step; k * step = 1.68 is the reach of the attack
    updates: int = 700           # of D (Alg. 1)
    rounds: int = 150            # of Alg. 2: D to convergence, then one step of the particles
    inner: int = 15              # updates that count as convergence (D starts from the round before)
    particles: int = 400         # fixed data points and particles (Alg. 2)
    particle_step: float = 0.06
    noise: float = 0.1           # std sqrt(lambda) of a Langevin step, Eq. 2.3
    images: int = 4000           # points in an evaluation
    seed: int = 0

    def __post_init__(self):
        common.at_least(1, self, "width", "m", "updates", "rounds", "inner", "particles", "images")


QUICK = Settings()
SMOKE = dataclasses.replace(QUICK, updates=4, rounds=3, inner=2, k=3, images=200)
PAPER = dataclasses.replace(QUICK, updates=6000, rounds=600, inner=50, particles=1000)
BUDGETS = {"smoke": SMOKE, "quick": QUICK, "paper": PAPER}
SETTINGS = {name: BUDGETS for name in ("gaussian", "ring", "grid", "spirals", "checkerboard")}

SIDE = 2.0     # the plane is [-SIDE, SIDE]^2
STD = 0.25     # of the Gaussian

# --- data and p0 --------------------------------------------------------------------------------------------


def sample_data(name, n):
    """n points [n, 2] of a 2-D data set."""
    if name == "gaussian":
        return STD * torch.randn(n, 2)
    if name == "ring":                                                       # eight Gaussians
        angle = torch.randint(8, (n,)) * (math.pi / 4)
        return 1.2 * torch.stack([angle.cos(), angle.sin()], 1) + 0.08 * torch.randn(n, 2)
    if name == "grid":                                                       # five by five Gaussians
        return (torch.randint(5, (n, 2)) - 2) * 0.6 + 0.05 * torch.randn(n, 2)
    if name == "spirals":                                                    # two arms
        t = torch.rand(n).sqrt() * 3 * math.pi
        arm = torch.randint(2, (n,)) * 2 - 1
        points = torch.stack([t.cos(), t.sin()], 1) * (t * arm / (3 * math.pi) * 1.5)[:, None]
        return points + 0.04 * torch.randn(n, 2)
    cell = torch.randint(8, (n,))                                            # checkerboard: 8 of the 16 cells
    row, col = cell // 2, cell % 2 * 2 + (cell // 2) % 2
    return (torch.stack([col, row], 1) + torch.rand(n, 2)) * 0.75 - 1.5


def sample_p0(where, n):
    """n points of p0 [n, 2]: uniform on the plane, or concentrated in the lower left corner."""
    return ((torch.rand(n, 2) * 2 - 1) * SIDE if where == "uniform"
            else -0.55 * SIDE + 0.15 * torch.randn(n, 2))


def make_f(width):
    """f: [n, 2] -> [n]."""
    act = nn.LeakyReLU(0.01)
    layers = [nn.Linear(2, width), act, nn.Linear(width, width), act, nn.Linear(width, width), act]
    return nn.Sequential(*layers, nn.Linear(width, 1), nn.Flatten(0))


# --- the two samplers ---------------------------------------------------------------------------------------


def gradient(f, x):
    """grad_x f [n, 2]: of the sum over the points, so each point has its own."""
    x = x.detach().requires_grad_(True)
    return torch.autograd.grad(f(x).sum(), x)[0]


def pgd(f, x, steps, step):
    """Eq. 2.8: `steps` steps of length `step` up f. A zero gradient moves nothing."""
    for _ in range(steps):
        g = gradient(f, x)
        x = x + step * g / (g.norm(dim=1, keepdim=True) + 1e-10)
    return x


def langevin(f, x, steps, noise):
    """Eq. 2.3 with lambda = noise^2: x + lambda/2 grad f(x) + N(0, lambda). Stationary density exp(f)/Z."""
    for _ in range(steps):
        x = x + noise ** 2 / 2 * gradient(f, x) + noise * torch.randn_like(x)
    return x


# --- the two algorithms -------------------------------------------------------------------------------------


def at_loss(f_data, f_adv):
    """-J/2 of Eq. 2.11: the mean of 2m cross-entropies, data = 1, attacked p0 = 0. Optimum log 2."""
    return (F.softplus(-f_data).mean() + F.softplus(f_adv).mean()) / 2


def ebm_loss(f_data, f_adv):
    """The maximum-likelihood gradient of Eq. 2.2 with the same attack as sampler: unbounded (2.5.6)."""
    return f_adv.mean() - f_data.mean()


def maximin(s, data, where, objective=at_loss, sampler=None, lr=None):
    """Algorithm 1 -> (f before, f after, mean f on data minus mean f on the contrast, per update).

    sampler(f, x0) makes the contrast; default PGD, Eq. 2.8. Raises Diverged (.rows: the gaps) beyond 1e6.
    """
    torch.manual_seed(s.seed)
    f, sampler = make_f(s.width), sampler or (lambda f, x: pgd(f, x, s.k, s.step))
    before = make_f(s.width)
    before.load_state_dict(f.state_dict())
    optimizer = torch.optim.Adam(f.parameters(), lr=lr or s.lr, betas=(0.0, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s.updates)
    gaps = []
    for update in range(s.updates):
        x = sample_data(data, s.m)
        x_adv = sampler(f, sample_p0(where, s.m))
        f_data, f_adv = f(torch.cat([x, x_adv])).chunk(2)
        gaps.append((f_data.mean() - f_adv.mean()).item())
        if not abs(gaps[-1]) < 1e6:
            raise Diverged(f"f(data) - f(contrast) is {gaps[-1]:.3g} at update {update}: lower --lr", gaps)
        optimizer.zero_grad(set_to_none=True)
        objective(f_data, f_adv).backward()
        optimizer.step()
        schedule.step()
    return before, f, gaps


def minimax(s, data, where):
    """Algorithm 2 -> (first converged f, last f, data points [n, 2], first particles, last particles)."""
    torch.manual_seed(s.seed)
    f = make_f(s.width)
    x, particles = sample_data(data, s.particles), sample_p0(where, s.particles)
    start, first = particles, None
    optimizer = torch.optim.Adam(f.parameters(), lr=s.lr, betas=(0.0, 0.99))
    for t in range(s.rounds):
        for _ in range(s.inner * (10 if t == 0 else 1)):                     # line 3: D until it converges
            f_data, f_adv = f(torch.cat([x, particles])).chunk(2)
            optimizer.zero_grad(set_to_none=True)
            at_loss(f_data, f_adv).backward()
            optimizer.step()
        if first is None:
            first = make_f(s.width)
            first.load_state_dict(f.state_dict())
        shrink = 0.5 + 0.5 * math.cos(math.pi * max(2 * t / s.rounds - 1, 0))  # whole steps in the first half
        particles = pgd(f, particles, 1, s.particle_step * shrink)           # line 4: one step, kept
    return first, f, x, start, particles


# --- numbers ------------------------------------------------------------------------------------------------


def energy_distance(a, b):
    """2 E|a-b| - E|a-a'| - E|b-b'| between two samples [n, 2], [m, 2]; 0 only for equal distributions."""
    def within(x):
        return torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))
    return (2 * torch.cdist(a, b).mean() - within(a) - within(b)).item()


def plane(n=81):
    """Grid axis [n] and its points [n * n, 2] over the plane."""
    u = torch.linspace(-SIDE, SIDE, n)
    return u, torch.stack(torch.meshgrid(u, u, indexing="xy"), -1).reshape(-1, 2)


@torch.no_grad()
def off_support(f, data, away=0.5):
    """(largest D, rows x, y, D of local maxima > 1/2) at grid points farther than `away` from any data."""
    u, points = plane()
    far = torch.cdist(points, sample_data(data, 3000)).amin(1) > away
    logit = f(points)                                                        # D itself is flat at 1: no peaks
    peak = F.max_pool2d(logit.view(1, 1, len(u), -1), 9, 1, 4).flatten() == logit  # largest of 9 x 9 points
    d = logit.sigmoid()
    chosen = far & peak & (d > 0.5)
    return d[far].max().item(), torch.cat([points, d[:, None]], 1)[chosen]


def value(f, x, x_adv):
    """U of Eq. 2.12."""
    with torch.no_grad():
        return (F.logsigmoid(f(x)).mean() + F.logsigmoid(-f(x_adv)).mean()).item()


# --- pictures -----------------------------------------------------------------------------------------------


def draw(axis, f, blue, red, title):
    """Contours of D, its normalised gradient field, blue and red points."""
    u, points = plane()
    with torch.no_grad():
        d = f(points).sigmoid().view(len(u), -1).numpy()
    levels = np.linspace(0, 1, 21) if d.max() - d.min() > 0.1 else 12          # an untrained D is nearly flat
    axis.contourf(u, u, d, levels, cmap="Greys", alpha=0.45)
    lines = axis.contour(u, u, d, levels if isinstance(levels, int) else levels[::2],
                         colors="k", linewidths=0.5)
    axis.clabel(lines, fontsize=6, fmt="%.2g" if not isinstance(levels, int) else "%.3f")
    arrows = points.view(len(u), len(u), 2)[2::5, 2::5].reshape(-1, 2)
    g = gradient(f, arrows)
    g = g / (g.norm(dim=1, keepdim=True) + 1e-10)
    axis.quiver(*arrows.T, *g.T, color="0.35", scale=32, width=0.004)
    axis.plot(*blue[:400].T, "o", color="tab:blue", ms=2, mew=0)
    axis.plot(*red[:400].T, "o", color="tab:red", ms=2, mew=0, alpha=0.8)
    axis.set(xlim=(-SIDE, SIDE), ylim=(-SIDE, SIDE), aspect="equal", xticks=[], yticks=[])
    axis.set_title(title, fontsize=10)


def four_panels():
    """A figure of four square panels with room for a sentence below."""
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.8))
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.09, top=0.93, wspace=0.04)
    return figure, axes


def one_panel():
    """A figure of one panel with room for a sentence below."""
    figure, axis = plt.subplots(figsize=(6.5, 4.4))
    figure.subplots_adjust(left=0.13, right=0.98, bottom=0.22, top=0.97)
    return figure, axis


def finish(lab, figure, name, sentence):
    """Write the sentence under the picture, save it, and return it for the record."""
    lines = textwrap.fill(sentence, round(13.5 * figure.get_figwidth()))
    figure.text(0.5, 0.02, lines, fontsize=9, ha="center")
    lab.run.save(figure, name)
    return sentence


# --- experiments --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Lab:
    """What an experiment needs."""
    run: Run
    s: Settings
    data: str


def figure_2_1(lab):
    """Algorithm 1, maximin: p0 uniform (left) and in the lower left corner (right); before and after."""
    s, numbers = lab.s, {}
    figure, axes = four_panels()
    for left, where in zip((0, 2), ("uniform", "corner")):
        before, f, _ = maximin(s, lab.data, where)
        x, x0 = sample_data(lab.data, s.images), sample_p0(where, s.images)
        x_adv = pgd(f, x0, s.k, s.step)
        tag = "1" if where == "uniform" else "2"
        draw(axes[left], before, x, x0, f"({tag}a) initial D, {where} p0")
        draw(axes[left + 1], f, x, x_adv, f"({tag}b) final D, p0 after {s.k} steps")
        with torch.no_grad():
            on = f(x).sigmoid()
        largest, maxima = off_support(f, lab.data)
        axes[left + 1].plot(*maxima[:, :2].T, "k^", ms=6, clip_on=False)
        numbers |= {f"mean D on the support, {where} p0": on.mean().item(),
                    f"std of D there, {where} p0": on.std().item(),
                    f"U, {where} p0": value(f, x, x_adv), f"largest D off the support, {where} p0": largest,
                    f"maxima off the support with D > 1/2, {where} p0": len(maxima)}
        if len(maxima):
            numbers[f"where (x, y, D), {where} p0"] = [[round(v, 2) for v in row] for row in maxima.tolist()]
    sentence = (f"Maximin: D is {numbers['mean D on the support, uniform p0']:.2f} on the data and at most "
                f"{numbers['largest D off the support, uniform p0']:.2f} away from it when p0 is uniform; "
                f"p0 in one corner leaves D high where it never came (triangles: {len(maxima)}).")
    return {**numbers, "sentence": finish(lab, figure, "figure2.1", sentence)}


def figure_2_2(lab):
    """Algorithm 2, minimax: the particles become the data, D is undefined elsewhere."""
    s, numbers = lab.s, {}
    figure, axes = four_panels()
    for left, where in zip((0, 2), ("uniform", "corner")):
        first, f, x, x0, particles = minimax(s, lab.data, where)
        tag = "1" if where == "uniform" else "2"
        draw(axes[left], first, x, x0, f"({tag}a) first D, particles: {where}")
        draw(axes[left + 1], f, x, particles, f"({tag}b) last D and particles")
        with torch.no_grad():
            numbers[f"mean D on the support, {where} p0"] = f(x).sigmoid().mean().item()
        numbers |= {f"energy distance of p_T* to the data, {where} p0": energy_distance(particles, x),
                    f"the same at the start, {where} p0": energy_distance(x0, x),
                    f"largest D off the support, {where} p0": off_support(f, lab.data)[0],
                    f"U, {where} p0": value(f, x, particles)}
    numbers["energy distance of two fresh draws of the data"] = energy_distance(
        sample_data(lab.data, s.particles), sample_data(lab.data, s.particles))
    sentence = ("Minimax: from either p0 the particles (red) end on the data (blue); "
                "what D says away from them means nothing: it reaches "
                f"{max(v for k, v in numbers.items() if k.startswith('largest')):.2f} there.")
    return {**numbers, "sentence": finish(lab, figure, "figure2.2", sentence)}


def stability_2d(lab):
    """Section 2.5.6: the same PGD attack under the AT objective (2.11) and under the EBM objective (2.2)."""
    numbers = {}
    figure, axis = one_panel()
    for label, objective, lr in (("AT, Eq. 2.11", at_loss, lab.s.lr), ("EBM, Eq. 2.2", ebm_loss, lab.s.lr),
                                 ("EBM, Eq. 2.2, lr / 100", ebm_loss, lab.s.lr / 100)):
        try:
            gaps = maximin(lab.s, lab.data, "uniform", objective, lr=lr)[2]
        except Diverged as stop:
            gaps = stop.rows
        axis.plot(gaps, label=label)
        numbers |= {f"largest |f(data) - f(x_K)|, {label}": max(map(abs, gaps)),
                    f"updates run, {label}": len(gaps)}
    axis.set(xlabel="update", ylabel="mean f(data) - mean f(x_K)", yscale="symlog")
    axis.legend()
    gaps = [v for k, v in numbers.items() if k.startswith("largest")]
    sentence = (f"The same attack, two objectives: the gap stays below {gaps[0]:.2g} under AT and reaches "
                f"{gaps[1]:.3g} under the EBM objective, whose gradient lacks the factors 1 - sigmoid(f) and "
                f"sigmoid(f) of Eq. 2.18; at a hundredth of the learning rate it comes to {gaps[2]:.2g}.")
    return {**numbers, "sentence": finish(lab, figure, "stability", sentence)}


def persistent_chains(s, steps, restart):
    """Langevin from kept states (Eq. 2.3), a share `restart` begun anew at each draw -> sampler(f, x0)."""
    bank = sample_p0("uniform", 4096)

    def sampler(f, x0):
        rows = torch.randperm(len(bank))[:len(x0)]
        begin = torch.where(torch.rand(len(x0), 1) < restart, x0, bank[rows])
        bank[rows] = langevin(f, begin, steps, s.noise)
        return bank[rows]
    return sampler


def samplers(lab):
    """Table 2.1: PGD with the AT objective learns a support, Langevin with the EBM objective a density."""
    s, numbers = lab.s, {}
    figure, axis = one_panel()
    line = torch.stack([torch.linspace(-3 * STD, 3 * STD, 121), torch.zeros(121)], 1)  # through the data
    log_p = -line[:, 0] ** 2 / (2 * STD ** 2)
    axis.plot(line[:, 0], log_p, "k--", label="log p_data + const")
    for label, objective, sampler in (("AT with PGD", at_loss, None),
                                      ("EBM with Langevin", ebm_loss, persistent_chains(s, s.k, 0.05))):
        f = maximin(s, "gaussian", "uniform", objective, sampler)[1]
        with torch.no_grad():
            cut = f(line)
        centred = log_p - log_p.mean()
        slope = centred @ (cut - cut.mean()) / (centred @ centred)
        numbers[f"slope of f against log p_data, {label}"] = slope.item()
        axis.plot(line[:, 0], cut - cut[60], label=f"f, {label}: slope {slope:.2f}")
    axis.set(xlabel="x, within three standard deviations", ylabel="f - f(0)")
    axis.legend()
    sentence = ("f against log p_data has slope 1 for a density and 0 for a support: Langevin's noise with "
                "the EBM objective comes to the first, PGD with the AT objective to the second.")
    return {**numbers, "sentence": finish(lab, figure, "samplers", sentence)}


def energies(lab):
    """Short-run against long-run energies: what becomes of chains that go on for longer than in training."""
    s, numbers, data = lab.s, {}, "ring" if lab.data == "gaussian" else lab.data
    figure, axes = four_panels()
    x = sample_data(data, min(1000, s.images))
    cases = (("short-run", lambda f, x0: langevin(f, x0, 5, s.noise), (5, 500)),
             ("long-run", persistent_chains(s, 20, 0.02), (500, 5000)))
    for left, (label, sampler, lengths) in zip((0, 2), cases):
        f = maximin(s, data, "uniform", ebm_loss, sampler, lr=s.lr / 5)[1]
        chains, done = sample_p0("uniform", len(x)), 0
        for axis, steps in zip(axes[left:], lengths):
            chains, done = langevin(f, chains, steps - done, s.noise), steps
            draw(axis, f, x, chains, f"{label} energy, {steps} steps")
            numbers[f"energy distance after {steps} steps, {label} energy"] = energy_distance(chains, x)
    short, late, settled, later = numbers.values()
    sentence = (f"Chains on the short-run energy are nearest to the data at the 5 steps of its training "
                f"(energy distance {short:.3f}) and go astray later ({late:.3f}); on the long-run energy "
                f"they stay ({settled:.3f}, {later:.3f}). "
                "Neither tells all clusters apart after so few updates.")
    return {**numbers, "sentence": finish(lab, figure, "energies", sentence)}


OPTIMUM = {"mean D on the support, uniform p0": "1/2", "U, uniform p0": "-log 4 = -1.386"}  # Proposition 1
EXPERIMENTS = {
    "figure2.1": Experiment(figure_2_1, "maximin (Alg. 1): D for uniform and for corner p0", "18 s", True,
                            {"gaussian": OPTIMUM}),
    "figure2.2": Experiment(figure_2_2, "minimax (Alg. 2): particles become the data", "19 s", True,
                            {"gaussian": OPTIMUM}),
    "stability": Experiment(stability_2d, "PGD with the EBM objective diverges (2.5.6)", "26 s"),
    "samplers": Experiment(samplers, "density against support: Langevin and PGD (Tab. 2.1)", "15 s"),
    "energies": Experiment(energies, "short-run against long-run energies", "25 s"),
}


# --- command line -------------------------------------------------------------------------------------------


def get_args(argv=None):
    return common.parse_args(__doc__, SETTINGS, EXPERIMENTS, argv)


def main(argv=None):
    args = get_args(argv)
    torch.set_num_threads(1)  # small matrices: a second thread costs more than it brings
    args.device = "cpu"  # two thousand points and three layers: a GPU would only wait
    run = Run("toy2d", args)
    lab = Lab(run, args.settings, args.dataset)
    run.closing_table({name: run.experiment(name, EXPERIMENTS[name], lab) for name in args.only})


if __name__ == "__main__":
    common.call(main)
