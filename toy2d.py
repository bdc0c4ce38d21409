r"""The 2-D lesson: what binary adversarial training learns, and how it differs from a GAN and from an EBM.

Source: Yin 2022, "Generative Modeling With Adversarial Training", figures 2.1 and 2.2 ("the dissertation").

Points in the plane [-2, 2]^2 take the place of images. A small network f gives each point a number, and the
classifier is D = sigmoid(f). Data are blue and have the label 1. Points of another distribution, p0, are red,
and keep the label 0 while they walk up f. This walk is the attack (PGD, projected gradient descent; here it
needs no projection); p_T is the distribution of where red points end. D wants this pay-off high. The attack
picks p_T and wants it low, that is, D high on red:

    U(D, p_T) = E_data[log D(x)] + E_{p_T}[log(1 - D(x))]                                     (2.12)

The outer player moves a little; before each of its moves the inner one gives its best answer, as far as its
steps allow. Who is the outer player makes the difference.

    Algorithm 1, max_D min_{p_T} U: adversarial training (AT). Draw x from data and x_0 from p0. Move x_0 by K
    steps
        x <- x + step * g / ||g||,  g = grad f(x)                                             (2.8)
    and take one optimiser step on D. Fresh x_0 the next time. Prop. 1: where p0 is everywhere and the attack
    strong enough, at the optimum U = -log 4 = -1.386 and D = 1/2 on the data, at most 1/2 elsewhere. What p0
    never reaches is never pressed down: fig. 2.1.
    Algorithm 2, min_{p_T} max_D U: the game of a GAN (generative adversarial network). Data x and particles
    x* are fixed sets. Train D to convergence, then move every particle ONE step of (2.8), and keep it there.
    The particles become the data; D means nothing elsewhere: fig. 2.2.

An energy-based model (EBM) takes f for the logarithm of a density, up to a constant; -f is its energy. It
is trained to raise E_data[f] - E_chains[f], chains held fixed (2.2): if chains draw from that density, this
is the gradient of the data's log likelihood. The gradient of U has the same two terms, weighted by 1 - D on
data and by D on red points (2.18). A chain is a sequence of Langevin steps, gradient plus noise:
        x <- x + lambda/2 grad f(x) + N(0, lambda)                                            (2.3)

    f(x) is the logit of D: HIGH = like the data. Points are never clamped to the plane.

Commands (one core is enough; all numbers: results/toy2d.md):
    python toy2d.py                      1 min: mean D on the data, p0 uniform: .51 (fig. 2.1), .49 (2.2)
    python toy2d.py --dataset ring       eight Gaussians on a ring; or grid, spirals, checkerboard
    python toy2d.py --only objectives samplers energies    80 s: slope of f on log p_data .05 (AT), 1.08 (EBM)

Differs: the source does not publish network, step, K, iterations or spread for these figures; all are ours,
chosen so that each figure shows what the text says of it, and there is no budget "paper". In Algorithm 1
the learning rate falls to zero (cosine), so that the picture is an optimum and not one moment of a game. In
Algorithm 2 the particles' step falls to zero in the second half: with a fixed one they circle the data at
that distance. The reach K * step = 1.68 is short of the plane's corners, 2.83 from the Gaussian. With more
(--k 20 --step 0.15) every red point reaches the data however flat f is, as the length of a step ignores that
of the gradient. Red and blue are alike then, and D = 1/2 everywhere: that too is an optimum, and says
nothing. The other data sets lie nearer to the corners; what is said of figures is said of the Gaussian.
"""

import math
import textwrap
from dataclasses import replace
from functools import partial

import common  # before torch, so that Ctrl-C ends even its import quietly
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import Diverged, input_gradient, value

# --- settings -----------------------------------------------------------------------------------------------

SETTINGS = common.settings(
    columns=("gaussian ring grid spirals checkerboard",),  # the same values for all five
    smoke=dict(updates=4, rounds=3, inner=2, k=3, images=200),
    width=(128, "units of each of the three hidden layers"),
    lr=(1e-3, "of Adam; falling to 0 (cosine) in Alg. 1, constant in objectives"),
    m=(256, "blue, and as many red, points in an update (Alg. 1)"),
    k=(14, "PGD steps (Alg. 1; of energies: 5 and 20)"),
    step=(0.12, "length of a PGD step; k * step = 1.68 is the reach of the attack"),
    updates=(700, "of D (Alg. 1)"),
    rounds=(150, "of Alg. 2: D to convergence, then one step of the particles"),
    inner=(15, "updates of D in a round; ten times as many in the first, from scratch"),
    particles=(400, "fixed data points, and as many particles (Alg. 2)"),
    particle_step=(0.06, "length of the particles' step"),
    noise=(0.1, "standard deviation sqrt(lambda) of a Langevin step"),
    images=(4000, "points in an evaluation (energies: at most 1000)"),
)
SIDE = 2.0  # the plane is [-SIDE, SIDE]^2
STD = 0.25  # of the Gaussian

# --- data, p0 and f -----------------------------------------------------------------------------------------

def sample_data(name, n):
    """n points [n, 2] of a 2-D data set."""
    if name == "gaussian":
        return STD * torch.randn(n, 2)
    if name == "ring":  # eight Gaussians
        angle = torch.randint(8, (n,)) * (math.pi / 4)
        centres = 1.2 * torch.stack([angle.cos(), angle.sin()], 1)
        return centres + 0.08 * torch.randn(n, 2)
    if name == "grid":  # five by five Gaussians
        centres = (torch.randint(5, (n, 2)) - 2) * 0.6
        return centres + 0.05 * torch.randn(n, 2)
    if name == "spirals":  # two arms
        t = torch.rand(n).sqrt() * 3 * math.pi
        arm = torch.randint(2, (n,)) * 2 - 1
        radius = t * arm / (3 * math.pi) * 1.5
        points = torch.stack([t.cos(), t.sin()], 1) * radius[:, None]
        return points + 0.04 * torch.randn(n, 2)
    cell = torch.randint(8, (n,))  # checkerboard: 8 of the 16 cells
    row = cell // 2
    column = cell % 2 * 2 + row % 2
    corners = torch.stack([column, row], 1)
    return (corners + torch.rand(n, 2)) * 0.75 - 1.5

def sample_p0(where, n):
    """n points of p0 [n, 2]: uniform on the plane, or concentrated around (-1.1, -1.1), towards a corner."""
    if where == "uniform":
        return (torch.rand(n, 2) * 2 - 1) * SIDE
    return -0.55 * SIDE + 0.15 * torch.randn(n, 2)

def make_f(width):
    """f: [n, 2] -> [n]."""
    layers, inputs = [], 2
    for _ in range(3):
        layers += [nn.Linear(inputs, width), nn.LeakyReLU(0.01)]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(width, 1), nn.Flatten(0))

# --- the two samplers ---------------------------------------------------------------------------------------

def pgd_2d(f, x, steps, step):
    """Eq. 2.8: steps of length `step` up f, points [n, 2] -> [n, 2]. No graph. Gradient 0 moves nothing."""
    for _ in range(steps):
        g = input_gradient(f, x)
        length = g.norm(dim=1, keepdim=True)
        x = x + step * g / (length + 1e-10)
    return x

def langevin_2d(f, x, steps, noise):
    """Eq. 2.3 with lambda = noise^2, points [n, 2] -> [n, 2]. Small noise: stationary density exp(f)/Z."""
    for _ in range(steps):
        drift = noise**2 / 2 * input_gradient(f, x)
        x = x + drift + noise * torch.randn_like(x)
    return x

# --- the two algorithms -------------------------------------------------------------------------------------

def at_loss(f_data, f_adv):
    """-U/2 of Eq. 2.12: the mean of 2m cross-entropies, data = 1, attacked p0 = 0. Optimum log 2."""
    return (F.softplus(-f_data).mean() + F.softplus(f_adv).mean()) / 2

def ebm_loss(f_data, f_adv):
    """Minus the EBM's objective (2.2). No lower bound, so training can run away: section 2.5.6."""
    return f_adv.mean() - f_data.mean()

def maximin(seed, s, data, where, objective=at_loss, sampler=None, falling=True):
    """Algorithm 1, or an EBM -> (f before, f after, mean f on data minus mean f on red, for each update).

    objective: a loss. sampler(f, x0) moves red points; default PGD, Eq. 2.8. falling: the learning rate falls
    to 0; else it is constant. Raises Diverged (.rows: the gaps) beyond 1e6.
    """
    torch.manual_seed(seed)
    sampler = sampler or partial(pgd_2d, steps=s.k, step=s.step)
    f = make_f(s.width)
    before = make_f(s.width)
    before.load_state_dict(f.state_dict())
    optimizer = torch.optim.Adam(f.parameters(), s.lr, betas=(0.0, 0.99))  # no momentum: the opponent moves
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s.updates)
    gaps = []
    for update in range(s.updates):
        x = sample_data(data, s.m)
        x_adv = sampler(f, sample_p0(where, s.m))
        f_data, f_adv = f(torch.cat([x, x_adv])).chunk(2)
        gaps.append((f_data.mean() - f_adv.mean()).item())
        if not abs(gaps[-1]) < 1e6:
            stop = Diverged(f"f(data) - f(red) is {gaps[-1]:.3g} at update {update}: lower --lr")
            stop.rows = gaps
            raise stop
        optimizer.zero_grad(set_to_none=True)
        objective(f_data, f_adv).backward()
        optimizer.step()
        if falling:
            schedule.step()
    return before, f, gaps

def minimax(seed, s, data, where):
    """Algorithm 2 -> (first converged f, last f, data points [n, 2], first particles, last particles)."""
    torch.manual_seed(seed)
    f = make_f(s.width)
    x = sample_data(data, s.particles)
    start = sample_p0(where, s.particles)
    particles = start
    optimizer = torch.optim.Adam(f.parameters(), s.lr, betas=(0.0, 0.99))
    for t in range(s.rounds):
        for _ in range(s.inner if t else 10 * s.inner):  # D until it converges
            f_data, f_adv = f(torch.cat([x, particles])).chunk(2)
            optimizer.zero_grad(set_to_none=True)
            at_loss(f_data, f_adv).backward()
            optimizer.step()
        if t == 0:
            first = make_f(s.width)
            first.load_state_dict(f.state_dict())
        late = max(2 * t / s.rounds - 1, 0)  # 0 in the first half, then rises to 1
        shrink = 0.5 + 0.5 * math.cos(math.pi * late)
        particles = pgd_2d(f, particles, 1, s.particle_step * shrink)  # one step, kept
    return first, f, x, start, particles

# --- numbers ------------------------------------------------------------------------------------------------

def mean_distance(x):
    """E|x-x'| of two different points of a sample [n, 2]."""
    n = len(x)
    return torch.cdist(x, x).sum() / (n * (n - 1))

def energy_distance(a, b):
    """Estimate from samples [n, 2], [m, 2] of 2 E|a-b| - E|a-a'| - E|b-b'|: near 0, even below, if alike."""
    between = torch.cdist(a, b).mean()
    return (2 * between - mean_distance(a) - mean_distance(b)).item()

def plane(n=81):
    """Grid axis [n] and its points [n * n, 2] over the plane."""
    u = torch.linspace(-SIDE, SIDE, n)
    x, y = torch.meshgrid(u, u, indexing="xy")
    return u, torch.stack([x, y], -1).reshape(-1, 2)

@torch.no_grad()
def off_support(f, data, away=0.5):
    """Farther than `away` from the data: the largest D, and local maxima with D > 1/2 as rows (x, y, D).

    A largest value on the plane's edge is none: beyond it f may go on rising. Gaps between modes that lie
    closer together than twice `away` are not looked at.
    """
    u, points = plane()
    far = torch.cdist(points, sample_data(data, 3000)).amin(1) > away
    logit = f(points)  # not D: where it rounds to 1 all would tie
    image = logit.view(1, 1, len(u), -1)
    peak = F.max_pool2d(image, 9, stride=1, padding=4).flatten() == logit  # the largest of 9 x 9
    d = logit.sigmoid()
    inside = points.abs().amax(1) < SIDE
    maxima = torch.cat([points, d[:, None]], 1)
    return d[far].max().item(), maxima[far & peak & inside & (d > 0.5)]

@torch.no_grad()
def largest_on_edge(f, scale):
    """The largest f on the edge of a plane `scale` times as wide."""
    _, points = plane()
    edge = points[points.abs().amax(1) == SIDE]
    return f(scale * edge).max().item()

@torch.no_grad()
def payoff(f, x, x_adv):
    """U of Eq. 2.12."""
    on_data = F.logsigmoid(f(x)).mean()
    return (on_data + F.logsigmoid(-f(x_adv)).mean()).item()

# --- pictures -----------------------------------------------------------------------------------------------

def draw_plane(axis, f, blue, red, title):
    """Contours of D, directions of grad f, blue and red points."""
    u, points = plane()
    with torch.no_grad():
        d = f(points).sigmoid().view(len(u), -1).numpy()
    levels, labels = np.linspace(0, 1, 21), "%.2g"
    if d.max() - d.min() <= 0.1:  # an untrained D is nearly flat
        levels, labels = np.linspace(d.min(), d.max(), 12), "%.3f"
    axis.contourf(u, u, d, levels, cmap="Greys", alpha=0.45)
    lines = axis.contour(u, u, d, levels[::2], colors="k", linewidths=0.5)
    axis.clabel(lines, fontsize=6, fmt=labels)
    square = points.view(len(u), len(u), 2)
    arrows = square[2::5, 2::5].reshape(-1, 2)
    g = F.normalize(input_gradient(f, arrows))
    axis.quiver(*arrows.T, *g.T, color="0.35", scale=32, width=0.004)
    axis.plot(*blue[:400].T, "o", color="tab:blue", ms=2, mew=0)
    axis.plot(*red[:400].T, "o", color="tab:red", ms=2, mew=0, alpha=0.8)
    edges = (-SIDE, SIDE)
    axis.set(xlim=edges, ylim=edges, aspect="equal", xticks=[], yticks=[])
    axis.set_title(title, fontsize=10)

def four_panels():
    """A figure of four square panels with room for a sentence below."""
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.8), layout="none")
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.09, top=0.93, wspace=0.04)
    return figure, axes

def one_panel():
    """A figure of one panel with room for a sentence below."""
    figure, axis = plt.subplots(figsize=(6.5, 4.4), layout="none")
    figure.subplots_adjust(left=0.13, right=0.98, bottom=0.22, top=0.97)
    return figure, axis

def finish(run, figure, name, sentence):
    """Write the sentence under the picture, and save it."""
    lines = textwrap.fill(sentence, round(13.5 * figure.get_figwidth()))
    figure.text(0.5, 0.02, lines, fontsize=9, ha="center")
    run.save(figure, name)

# --- the figures, and three short lessons -------------------------------------------------------------------

def figure_2_1(run, s, data):
    """Algorithm 1, maximin: p0 uniform (left) and in the lower left corner (right); before and after."""
    rows, means, largest, peaks = [], {}, {}, 0
    figure, axes = four_panels()
    for left, where in ((0, "uniform"), (2, "corner")):
        before, f, _ = maximin(run.seed, s, data, where)
        x = sample_data(data, s.images)
        x0 = sample_p0(where, s.images)
        x_adv = pgd_2d(f, x0, s.k, s.step)
        draw_plane(axes[left], before, x, x0, f"initial D, {where} p0")
        draw_plane(axes[left + 1], f, x, x_adv, f"final D, p0 after {s.k} steps")
        with torch.no_grad():
            on = f(x).sigmoid()
        means[where] = on.mean().item()
        largest[where], maxima = off_support(f, data)
        axes[left + 1].plot(maxima[:, 0], maxima[:, 1], "k^", ms=6)
        peaks += len(maxima)
        rows.append(value(f"mean D on the support, {where} p0", means[where]))
        rows.append(value(f"std of D there, {where} p0", on.std().item()))
        rows.append(value(f"U, {where} p0", payoff(f, x, x_adv)))
        rows.append(value(f"largest D off the support, {where} p0", largest[where]))
        rows.append(value(f"maxima off the support with D > 1/2, {where} p0", len(maxima)))
        for scale in (1, 2, 4):
            edge = largest_on_edge(f, scale)
            rows.append(value(f"largest f on the edge, {where} p0", edge, times=scale))
    sentence = (
        f"Maximin: D is {means['uniform']:.2f} on the data and at most {largest['uniform']:.2f} away from it "
        f"when p0 is uniform; with p0 in one corner D comes to {largest['corner']:.2f} away from the data. "
        f"Maxima with D > 1/2 there (triangles): {peaks}."
    )
    finish(run, figure, "figure2.1", sentence)
    return rows

def figure_2_2(run, s, data):
    """Algorithm 2, minimax: the particles become the data; what D says elsewhere means nothing."""
    rows, largest = [], []
    figure, axes = four_panels()
    for left, where in ((0, "uniform"), (2, "corner")):
        first, f, x, start, particles = minimax(run.seed, s, data, where)
        draw_plane(axes[left], first, x, start, f"first D, particles: {where}")
        draw_plane(axes[left + 1], f, x, particles, "last D and particles")
        with torch.no_grad():
            on = f(x).sigmoid()
        largest.append(off_support(f, data)[0])
        rows.append(value(f"mean D on the support, {where} p0", on.mean().item()))
        rows.append(value(f"U, {where} p0", payoff(f, x, particles)))
        rows.append(value(f"energy distance to the data, {where} p0", energy_distance(particles, x)))
        rows.append(value(f"the same at the start, {where} p0", energy_distance(start, x)))
        rows.append(value(f"largest D off the support, {where} p0", largest[-1]))
    draws = sample_data(data, s.particles), sample_data(data, s.particles)
    rows.append(value("energy distance of two fresh draws of the data", energy_distance(*draws)))
    sentence = (
        "Minimax: where the particles (red) end from either p0, and the data (blue). Away from the data D "
        f"reaches {max(largest):.2f}."
    )
    finish(run, figure, "figure2.2", sentence)
    return rows

def objectives(run, s, data):
    """Section 2.5.6: the same PGD attack under the AT objective (2.12) and under the EBM objective (2.2).

    At constant rates, and at a tenth of the rate with ten times the updates."""
    rows, last = [], []
    figure, axis = one_panel()
    slow = replace(s, lr=s.lr / 10, updates=10 * s.updates)
    cases = [("AT", at_loss, s), ("EBM", ebm_loss, s), ("EBM, small lr", ebm_loss, slow)]
    for title, objective, cased in cases:
        try:
            _, _, gaps = maximin(run.seed, cased, data, "uniform", objective, falling=False)
        except Diverged as stop:
            gaps = stop.rows
        way = [cased.lr * update for update in range(1, len(gaps) + 1)]
        axis.plot(way, gaps, label=f"{title}, lr = {cased.lr:g}")
        late = gaps[-max(len(gaps) // 10, 1) :]
        last.append(sum(late) / len(late))
        quantity = f"f(data) - f(x_K), last tenth, {title}"
        rows.append(value(quantity, last[-1], lr=cased.lr, updates=len(gaps)))
    axis.set(xlabel="learning rate x updates", ylabel="mean f(data) - mean f(x_K)", yscale="symlog")
    axis.legend()
    sentence = (
        f"The same attack, two objectives: in the last tenth the gap is {last[0]:.2g} under AT and "
        f"{last[1]:.3g} under the EBM objective, whose gradient lacks the factors 1 - sigmoid(f) and "
        f"sigmoid(f) of Eq. 2.18; at a tenth of the rate, with ten times the updates, {last[2]:.3g}."
    )
    finish(run, figure, "objectives", sentence)
    return rows

def persistent_chains(s, steps, restart):
    """Langevin from a bank of kept states; a share `restart` of those drawn begins anew -> sampler(f, x0)."""
    bank = sample_p0("uniform", max(4096, s.m))

    def sampler(f, x0):
        places = torch.randperm(len(bank))[: len(x0)]
        begin = torch.where(torch.rand(len(x0), 1) < restart, x0, bank[places])
        bank[places] = langevin_2d(f, begin, steps, s.noise)
        return bank[places]

    return sampler

def samplers(run, s):
    """Table 2.1, on the Gaussian: PGD with the AT objective and Langevin with the EBM objective."""
    rows = []
    figure, axis = one_panel()
    across = torch.linspace(-3 * STD, 3 * STD, 121)
    line = torch.stack([across, torch.zeros(121)], 1)  # through the data
    log_p = -(across**2) / (2 * STD**2)
    centred = log_p - log_p.mean()
    axis.plot(across, log_p, "k--", label="log p_data + const")
    chains = persistent_chains(s, s.k, 0.05)  # as many steps as PGD; one state in 20 begun anew
    cases = [("AT with PGD", at_loss, None), ("EBM with Langevin", ebm_loss, chains)]
    for title, objective, sampler in cases:
        _, f, _ = maximin(run.seed, s, "gaussian", "uniform", objective, sampler)
        with torch.no_grad():
            cut = f(line)
        slope = (centred @ (cut - cut.mean()) / (centred @ centred)).item()
        rows.append(value(f"slope of f against log p_data, {title}", slope))
        axis.plot(across, cut - cut[60], label=f"f, {title}: slope {slope:.2f}")
    axis.set(xlabel="x, within three standard deviations", ylabel="f - f(0)")
    axis.legend()
    sentence = (
        "f against log p_data: a density has slope 1, a support slope 0."
    )
    finish(run, figure, "samplers", sentence)
    return rows

def energies(run, s, data):
    """EBMs trained on fresh 5-step chains, on kept ones; then longer chains. For the Gaussian: the ring."""
    data = "ring" if data == "gaussian" else data
    rows = []
    figure, axes = four_panels()
    x = sample_data(data, min(1000, s.images))
    slower = replace(s, lr=s.lr / 5)
    short_run = partial(langevin_2d, steps=5, noise=s.noise)
    long_run = persistent_chains(s, 20, 0.02)
    cases = [
        (0, "short-run", short_run, (5, 500)),
        (2, "long-run", long_run, (500, 5000)),
    ]
    for left, title, sampler, lengths in cases:
        _, f, _ = maximin(run.seed, slower, data, "uniform", ebm_loss, sampler)
        chains, done = sample_p0("uniform", len(x)), 0
        for axis, steps in zip(axes[left:], lengths):
            chains = langevin_2d(f, chains, steps - done, s.noise)
            done = steps
            draw_plane(axis, f, x, chains, f"{title} energy, {steps} steps")
            distance = energy_distance(chains, x)
            rows.append(value(f"energy distance to the data, {title} energy", distance, steps=steps))
    short, late, settled, later = [row["value"] for row in rows]
    sentence = (
        f"Energy distance of chains to the data: on the short-run energy {short:.3f} after the 5 steps of "
        f"its training and {late:.3f} after 500; on the long-run energy {settled:.3f} and {later:.3f}."
    )
    finish(run, figure, "energies", sentence)
    return rows

EXPERIMENTS = common.experiments(  # main() hands each what its parameters name
    headline=[figure_2_1, figure_2_2], others=[objectives, samplers, energies]
)

# --- command line -------------------------------------------------------------------------------------------

def get_args(argv=None):
    args = common.parse_args(__doc__, SETTINGS, EXPERIMENTS, argv)
    common.at_least(1, args.settings, "width m updates rounds inner")
    common.at_least(2, args.settings, "particles images")  # distances between points
    common.at_least(0, args.settings, "k")
    common.above_0(args.settings, "lr step particle_step noise")
    return args

def main(argv=None):
    args = get_args(argv)
    torch.set_num_threads(1)  # small matrices: a second thread costs more than it brings
    args.device = "cpu"  # a few thousand points and three layers: a GPU would only wait
    run = common.Run("toy2d", args)
    run.experiments(EXPERIMENTS, data=args.dataset)

if __name__ == "__main__":
    common.call(main)
