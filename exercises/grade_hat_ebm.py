"""Graders of the exercises of hat_ebm.py."""
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import torch
from common import Images
from kit import Exercise, expect, near, swap, take_out, unchanged
from torch import nn


class Bowl(nn.Module):
    """H(x) = scale |x|^2 / 2; scale 0: flat."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x):
        return self.scale * x.flatten(1).square().sum(1, keepdim=True) / 2


class Slope(nn.Module):
    """H(x) = steep times the sum of pixels."""

    def __init__(self, steep):
        super().__init__()
        self.steep = steep

    def forward(self, x):
        return self.steep * x.flatten(1).sum(1, keepdim=True)


class Doubling(nn.Module):
    """G(z) = 2 z, four numbers as an image of 2 x 2."""
    latent = (4,)

    def __init__(self):
        super().__init__()
        self.two = nn.Parameter(torch.tensor(2.0))

    def forward(self, z):
        return (self.two * z).view(-1, 1, 2, 2)


def made(hat_ebm, **numbers):
    """A Mode."""
    usual = {"updates": 1, "lr": 1e-3, "k": 1, "k_test": 1, "tau_y": 0.0, "t": 0.5, "noise": 0.0}
    return hat_ebm.Mode(**{**usual, **numbers})


def spread(hat_ebm, answers):
    """hat_ebm-1: where chains settle that the hat leaves alone, and how far a steep hat moves y."""
    G, z = Doubling(), torch.randn(4000, 4)
    g = G(z).detach()
    state = z, g, torch.zeros_like(g)
    flat = Bowl(0.0)
    free = hat_ebm.Hat(flat, G, made(hat_ebm, tau_z=0.1), [])
    near(answers, "FREE", hat_ebm.walk(free, state, 400)[0].std().item(), 0.08,
           "no term pulls z back to N(0, I), so the variances of the steps add up, to that of the start")
    peer = z
    for _ in range(100):
        peer = hat_ebm.ddls_step(peer, G, flat)
    near(answers, "PEER", peer.detach().std().item(), 0.05,
           "the energy of DDLS has the term |z|^2/2: which density is that?")
    pulled = hat_ebm.Hat(flat, G, made(hat_ebm, tau_y=0.02, t=1e-4, prior=200.0), [])
    near(answers, "RESIDUAL", hat_ebm.walk(pulled, state, 100)[2].std().item(), 0.006,
           "a density exp(-200 y^2) is a normal one; of which variance? T divides H, not the prior")
    steep = hat_ebm.Hat(Slope(1e6), G, made(hat_ebm, tau_y=0.001, t=1e-4), [])
    y = hat_ebm.walk(steep, state, 4)[2]
    near(answers, "STEEP", hat_ebm.lengths(y).mean().item(), 0.05,
           "a step moves y at most CLIP down the slope; here the slope has the same direction in each step")


@torch.no_grad()
def joint_step(hat_ebm, _):
    """hat_ebm-2: Eq. 6.7 for z, then Eq. 6.6 for y."""
    n, t = 50_000, 0.5
    z = torch.tensor([[1.0, -1.0, 0.5, 2.0]]).repeat(n, 1)
    y = torch.tensor([0.6, -0.3, 0.5, 0.4]).view(1, 1, 2, 2).repeat(n, 1, 1, 1)
    H, G = Bowl(), Doubling()
    g = G(z)
    state = z, g, y
    before = [part.clone() for part in state]
    x = (g + y)[:1]  # [1, 1, 2, 2]

    result = hat_ebm.hat_step(state, H, G, made(hat_ebm, tau_z=0.3))
    expect(isinstance(result, (tuple, list)) and len(result) == 3, "a step must give three things: z, G(z) and y")
    z1, g1, y1 = result
    expect(z1.shape == z.shape and g1.shape == y1.shape == y.shape,
           "a step must give z, G(z) and y, in the shapes they had")
    expect(all(torch.equal(old, new) for old, new in zip(before, state)),
           "the step changes the tensors of the state that it was given; chains that walk on from there need them")
    expect(torch.equal(y1, y), "with tau_y = 0 there is no residual that walks, and y must stay as it is")
    expect(torch.allclose(g1, G(z1), atol=1e-5), "the image beside z must be G of the z that is given back")
    noise_is(z1 - z, 0.3, "z")
    drift_is((z1 - z).mean(0), -0.3**2 / 2 * 2 * x.flatten() / t, 0.03, "z",
             "it is that of H(G(z) + y) as z sees it, through G and with y on top, times tau_z^2/(2T)")

    z1, g1, y1 = hat_ebm.hat_step(state, H, G, made(hat_ebm, tau_y=0.2))
    expect(all(torch.equal(old, new) for old, new in zip(before, state)),
           "the step changes the tensors of the state that it was given; chains that walk on from there need them")
    expect(torch.equal(z1, z) and torch.equal(g1, g), "with tau_z = 0 z must stay as drawn, and G(z) with it: Eq. 6.9")
    noise_is((y1 - y).flatten(1), 0.2, "y")
    drift_is((y1 - y).mean(0), -0.2**2 / 2 * x[0] / t, 0.03, "y",
             "it is that of H at the sum, times tau_y^2/(2T), each image by itself; CLIP limits this way, not the slope, "
             "and a short way is left alone")
    y1 = hat_ebm.hat_step(state, Bowl(0.0), G, made(hat_ebm, tau_y=0.2, prior=3.0))[2]
    drift_is((y1 - y).mean(0), -0.2**2 / 2 * 2 * 3 * y[0], 0.1, "y under its prior alone",
             "U has prior |y|^2 as it stands: differentiate it, and mind that T divides H only")

    limits(hat_ebm, G)

    m = made(hat_ebm, tau_z=0.5, tau_y=0.1)  # z goes to where G(z) + y is 0 on average
    z1, g1, y1 = hat_ebm.hat_step(state, H, G, m)
    expect(torch.allclose(g1, G(z1), atol=1e-5), "the image beside z must be G of the z that is given back")
    expect((y1 - y).mean(0).abs().max() < 0.006,
           "where both walk, y must feel the hat at the place where z has just gone, and z at the y that was before")
    expect(all(p.grad is None for p in (*H.parameters(), *G.parameters())),
           "the step leaves gradients in H's or G's parameters, which their next update finds: take input_gradient")
    expect(not any(part.requires_grad for part in (z1, g1, y1)),
           "the state is still tied to a graph, which would grow with each step")


def noise_is(step, tau, name):
    """The noise of a step [n, 4] has this deviation, drawn anew for each number."""
    expect(step.std(0).max() > 0.1 * tau, f"nothing random is added to {name}, or every chain gets the same")
    size = step.std(0).mean().item()
    expect(abs(size / tau - 1) < 0.03,
           f"the noise of {name} has the standard deviation {size:.3f}, not {tau}: is it tau?")
    shared = torch.corrcoef(step.T).fill_diagonal_(0).abs().max()
    expect(shared < 0.1, f"the noise of {name} is the same at several places; it must be drawn for each number")


def drift_is(found, wanted, tolerance, name, why):
    """The mean step is this one."""
    ratio = ((found * wanted).sum() / wanted.square().sum()).item()
    expect(ratio > -0.05, f"the drift of {name} goes up the energy; LOW is in-distribution")
    off = (found - wanted).norm() / wanted.norm()
    expect(off < tolerance, f"the drift of {name} is not the slope's: along it {ratio:.2f} of what it should be; {why}")


def limits(hat_ebm, G):
    """The clip: of y's way down the slope, image by image, and of nothing else."""
    g = torch.tensor([1.0, 1e-4]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    state = g.flatten(1) / 2, g, torch.zeros_like(g)
    way = hat_ebm.hat_step(state, Bowl(), G, made(hat_ebm, tau_y=1e-5, t=1e-14))[2].flatten(1).norm(dim=1)
    clip = hat_ebm.CLIP
    expect(abs(way[0].item() / clip - 1) < 0.01,
           f"a steep slope moves y by {way[0].item():.3g}; the way down has at most the l_2 length {clip} in an image")
    expect(abs(way[1].item() - 1) < 0.02,
           f"beside a steep image another one, whose way has the length 1, goes {way[1].item():.3g}: shorter ways "
           "stay, and each image has its own")
    far = torch.full_like(g, 50.0)
    y = hat_ebm.hat_step((state[0], g, far), Bowl(0.0), G, made(hat_ebm, tau_y=0.1, prior=100.0))[2]
    expect(abs((y - far).flatten(1).norm(dim=1).mean().item() - clip) < 0.5,
           "the limit holds for the whole slope of U, that of the prior included")
    wide = torch.zeros(2, 1, 28, 28)
    y = hat_ebm.hat_step((state[0], wide, wide), Bowl(0.0), lambda z: 0 * wide, made(hat_ebm, tau_y=0.1))[2]
    expect(y.isfinite().all(), "where U has no slope y becomes nan: what is divided by its length?")
    expect(y.flatten(1).norm(dim=1).mean() > 2.5,
           "the noise of y is clipped too; only the way down the slope has a limit")
    z = hat_ebm.hat_step(state, Bowl(), G, made(hat_ebm, tau_z=1.0, t=1e-3))[0]
    expect(z[0].norm() > 100, "z is clipped, too; only y has a limit")


class Loop:
    """In place of common.Training."""
    it = 0

    def __init__(self, *_, **parts):
        self.rows, self.parts = [], parts
        Loop.last = self

    def updates(self, total, *_):
        return range(1, total + 1)

    def log(self, **numbers):
        self.rows.append(numbers)


def taught(hat_ebm, pairs, updates):
    """What G learns from in Alg. 5: each update's ages of pairs [updates, 8], marks, and loss_g.

    The chains of update t end at z = t + i/64 and at images that are z all over, as G makes them of z: a pair is
    intact if its loss is 0. The bank holds 4 batches; at first its marks are negative, and their age counts from 0.
    """
    now, seen = [0], []

    class Marked(nn.Module):
        latent = (1,)

        def __init__(self, *_):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(1))

        def forward(self, z):
            if torch.is_grad_enabled():
                seen.append((now[0], z.detach()[:, 0].clone(), self.shift._version))
            return z.view(-1, 1, 1, 1).expand(-1, 1, 2, 2) + self.shift

    def sample(hat, n, steps):
        now[0] += 1
        z = now[0] + torch.arange(n).view(n, 1) / 64
        x = z.view(n, 1, 1, 1).repeat(1, 1, 2, 2)
        return z, x, torch.zeros_like(x)

    s = replace(hat_ebm.SETTINGS["glyphs", "smoke"], batch=8)
    run = SimpleNamespace(seed=0, device=torch.device("cpu"), chunk=250)
    data = Images(torch.zeros(24, 1, 2, 2, dtype=torch.uint8), torch.zeros(24).long(), "made up")
    fakes = {"Training": Loop, "Generator": Marked, "sample": sample, "LIFE": 4,
             "noise_for": lambda G, n: -1 - torch.arange(n).view(n, 1) / 64}
    small = lambda *_: nn.Sequential(nn.Flatten(), nn.Linear(4, 1))  # noqa: E731
    with mock.patch.multiple(hat_ebm, **fakes), mock.patch.object(hat_ebm.common, "make_net", small):
        hat = hat_ebm.train_hat(run, s, made(hat_ebm, updates=updates), data, "taught", pairs=pairs)
    losses = torch.tensor([row["loss_g"].item() for row in hat.log if "loss_g" in row])
    learned = []  # the marks of each update, however many calls of G they came in
    for t in range(1, updates + 1):
        calls = [(z, version) for time, z, version in seen if time == t]
        expect(len({version for _, version in calls}) == 1, "G takes more than one step in an update, or none")
        learned.append(torch.cat([z for z, _ in calls]))
        expect(len(learned[-1]) == 8, f"in an update G learns from {len(learned[-1])} pairs, not from a batch of 8")
    marks = torch.stack(learned)
    times = torch.arange(1, updates + 1).view(-1, 1)
    return times - marks.floor().clamp(min=0), marks, losses


def saved():
    """The bank that a checkpoint would hold has taken in what chains reached."""
    expect(Loop.last.parts["bank_z"].max() > 0,
           "the bank that Training saves stays as it was at first: a new tensor has taken its name; write into the old one")


def intact(losses):
    """No pair is broken up."""
    broken = (losses > 1e-8).nonzero()
    expect(len(broken) == 0,
           f"from update {broken[0].item() + 1 if len(broken) else 0} on G learns from a z and an X that were not made "
           "together; the best it can then answer to any z is the mean of all X")


def bank(hat_ebm, _):
    """hat_ebm-3: pairs of the bank stay pairs, are old, and leave it when G has learned from them."""
    ages, marks, losses = taught(hat_ebm, "historical", 60)
    intact(losses)
    expect(marks.max() > 0, "G learns from the bank's first pairs for ever: what chains reach never enters it")
    saved()
    expect(ages.min() >= 1,
           "G learns from pairs that were made in this very update; exchange must give back the OLD ones")
    expect(len(marks.unique()) == marks.numel(),
           "G learns from the same pair twice: one that was given back must be overwritten")
    mean = ages[20:].mean().item()
    expect(abs(mean - 4) < 1,
           f"in a bank of 4 batches a pair is {mean:.1f} updates old when it leaves; it should be about 4")
    ages, _, losses = taught(hat_ebm, "current", 5)
    intact(losses)
    expect(ages.max() == 0, 'with pairs="current" G must learn from the newest pairs alone, as before')


def mixed(hat_ebm, _):
    """hat_ebm-4: half of what G learns from is new, half from the bank, and nothing is learned twice."""
    ages, marks, losses = taught(hat_ebm, "mixed", 120)
    new = (ages == 0).sum(1)
    expect(new.min() < 8,
           'all that G learns from is new: nothing is added yet (train_hat takes a word that it does not know for '
           '"current"), or what leaves the bank is read only after it was overwritten')
    expect((new == 4).all(),
           f'with pairs="mixed" {new.float().mean().item():.1f} of 8 pairs are new, not 4 in each update')
    intact(losses)
    expect(marks.max() > 1 and marks[20:][ages[20:] > 0].max() > 0,
           "the old half are the bank's first pairs for ever: what chains reach never enters it")
    saved()
    expect(len(marks.unique()) == marks.numel(),
           "G learns from the same pair twice: which half of the new ones must enter the bank, and in which rows? Were rows "
           "drawn with replacement?")
    mean = ages[60:][ages[60:] > 0].mean().item()
    expect(abs(mean - 8) < 2, f"in a bank of 4 batches the old half are {mean:.1f} updates old on average, not about 8")
    for pairs, low, high in (("historical", 1, 60), ("current", 0, 0)):
        ages, marks, losses = taught(hat_ebm, pairs, 20)
        intact(losses)
        expect(low <= ages.min() and ages.max() <= high and marks.shape[1] == 8,
               f'pairs="{pairs}" is no longer what it was')


EXERCISES = [
    Exercise("hat_ebm-1", unchanged, spread, {
        "FREE": "standard deviation of z after 400 steps of tau_z = .1 from N(0, I), where H is flat",
        "PEER": "the same of ddls_step, after many steps, where D is flat",
        "RESIDUAL": "that of a pixel of y after many steps of tau_y = .02, prior = 200, T = 1e-4, where H is flat",
        "STEEP": "length of y after 4 steps from 0, H = 1e6 times the sum of 4 pixels, T = 1e-4, tau_y = .001"}),
    Exercise("hat_ebm-2", lambda source: take_out(source, "hat_step", "hat_ebm-2: Eq. 6.7, then 6.6"), joint_step),
    Exercise("hat_ebm-3", lambda source: swap(source, "bank_z[rows], bank_x[rows] = z, x",
                                              "bank_z[rows], bank_x[rows.sort().values] = z, x"), bank),
    Exercise("hat_ebm-4", unchanged, mixed),
]
