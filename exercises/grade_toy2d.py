"""Graders of the exercises of toy2d.py."""
import math

import torch
from kit import Exercise, expect, number, put, take_out, unchanged


def reach(toy2d, answers):
    """toy2d-1: PGD steps have the same length however flat f is."""
    for name, slope in (("STEEP", 100.0), ("FLAT", 0.001)):
        f = lambda x: -slope * x.norm(dim=1)  # noqa: E731
        end = toy2d.pgd_2d(f, torch.tensor([[3.0, 0.0]]), 14, 0.12)
        left = end.norm().item()
        said = number(answers, name)
        expect(abs(said - left) < 0.05,
               f"{name}: after 14 steps the point is {left:.2f} away from the data, not {said}; a step of Eq. 2.8 divides "
               "the gradient by its length, so how steep f is does not matter")


def langevin(toy2d, _):
    """toy2d-2: Eq. 2.3."""
    x = torch.tensor([[1.0, -2.0]]).repeat(20000, 1)
    pull = lambda x: -3 * x.pow(2).sum(1) / 2  # noqa: E731 (its gradient is -3 x)
    torch.manual_seed(0)
    given = x.clone()
    end = toy2d.langevin_2d(pull, given, 1, 0.2)
    expect(torch.equal(given, x), "langevin_2d changes its own x in place: the caller still needs those points")
    expect(end is not None, "langevin_2d gives None: is a `return` missing?")
    step = end - x
    expect(step.shape == x.shape, f"a step of points {tuple(x.shape)} gives {tuple(step.shape)}")
    expect(step.abs().max() > 0, "with steps = 1 no point moves: how many steps does the loop take?")
    expect(not torch.equal(end, toy2d.langevin_2d(pull, x.clone(), 1, 0.2)),
           "there is no noise in a step: nothing random is added")
    expect((step - step[:1]).abs().max() > 1e-6, "all points get the same noise: draw it for each point")
    expect(step[:, 0].sub(step[:, 0].mean()).sub(step[:, 1] - step[:, 1].mean()).abs().max() > 1e-4,
           "both coordinates of a point get the same noise")
    noise = step.std(0).mean().item()
    expect(abs(noise - 0.2) < 0.01,
           f"the noise of a step has the standard deviation {noise:.3f}, not 0.2: N(0, lambda) has the VARIANCE lambda, "
           "which is noise^2")
    drift = step.mean(0)
    should = 0.2 ** 2 / 2 * torch.tensor([-3.0, 6.0])
    ratio = (drift / should).mean().item()
    expect(abs(ratio) > 0.05,
           "there is no drift, or next to none: is the gradient in the step, and is it that of the SUM of f over points?")
    expect(ratio > 0, "the drift goes down f: the chain must climb f, the log density")
    expect(abs(ratio - 1) < 0.1, f"the drift is {ratio:.2f} times lambda/2 grad f")
    torch.manual_seed(1)
    ten = toy2d.langevin_2d(pull, x, 10, 0.2)
    wanted = (1 - 3 * 0.02) ** 10
    expect(abs(ten.mean(0)[0].item() - wanted) < 0.05,
           "ten steps are not ten times one: is `steps` used, and is the gradient taken anew at each?")
    spread = ten.std(0).mean().item()
    wanted = 0.2 * math.sqrt(sum((1 - 3 * 0.02) ** (2 * t) for t in range(10)))
    expect(abs(spread - wanted) < 0.02,
           f"after ten steps from one place the deviation is {spread:.2f}, not {wanted:.2f}: every step has noise, and "
           "noise of its own")
    weights = torch.ones(2, requires_grad=True)
    end = toy2d.langevin_2d(lambda x: (x * weights).square().sum(1), x[:2].clone(), 2, 0.2)
    expect(weights.grad is None, "the chain leaves a gradient in f's parameters: take input_gradient")
    expect(not end.requires_grad, "what is returned still hangs on the graph of f: a loss of it would train f through "
                                  "the chain; cut it off with input_gradient or detach")


def bank(toy2d, _):
    """toy2d-3: chains that are kept must be written back."""
    from dataclasses import replace
    s = replace(next(iter(toy2d.SETTINGS.values())), m=64, noise=0.0)
    torch.manual_seed(0)
    sampler = toy2d.persistent_chains(s, 1, 0.0)
    f = lambda x: 0 * x.sum(1)  # noqa: E731
    x0 = torch.full((64, 2), 5.0)
    climbed = toy2d.langevin_2d
    toy2d.langevin_2d = lambda f, x, steps, noise: x + 10  # a chain that leaves a mark
    try:
        for _ in range(400):
            last = sampler(f, x0)
    finally:
        toy2d.langevin_2d = climbed
    origin = (last + 5) % 10 - 5  # without the marks
    expect(origin.abs().max() < 3, "with restart 0 some chains begin at x0, not in the bank")
    expect(last.mean() > 15,
           "after 400 draws of 64 states the bank still holds its first states: what the chains reached is not kept")
    fresh = toy2d.persistent_chains(s, 1, 1.0)
    toy2d.langevin_2d = lambda f, x, steps, noise: x
    try:
        expect(torch.equal(fresh(f, x0), x0), "with restart 1 every chain must begin at its x0")
    finally:
        toy2d.langevin_2d = climbed


def weights(toy2d, _):
    """toy2d-4: a third objective, between the two."""
    expect(hasattr(toy2d, "hinge_loss"), "there is no function hinge_loss")
    f_data, f_adv = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, -0.5, 1.0])
    loss = toy2d.hinge_loss(f_data, f_adv)
    expect(loss.dim() == 0, f"hinge_loss gives a tensor of shape {tuple(loss.shape)}, not one number")
    wanted = (0 + 0.5 + 2) / 3 + (0 + 0.5 + 2) / 3
    expect(math.isclose(loss.item(), wanted, abs_tol=1e-5) or math.isclose(loss.item(), wanted / 2, abs_tol=1e-5),
           f"hinge_loss of the points in the page is {loss.item():.3f}, not {wanted:.3f} (or half of it)")
    sure = toy2d.hinge_loss(torch.tensor([5.0]), torch.tensor([-5.0]))
    expect(sure.item() == 0, "points beyond the margin still cost something")


def no_bank(source):
    """persistent_chains forgets what its chains reached."""
    return put(source, "persistent_chains", '''
        def persistent_chains(s, steps, restart):
            """Langevin from a bank of kept states, a share `restart` begun anew at each draw -> sampler(f, x0)."""
            bank = sample_p0("uniform", max(4096, s.m))

            def sampler(f, x0):
                places = torch.randperm(len(bank))[: len(x0)]
                begin = torch.where(torch.rand(len(x0), 1) < restart, x0, bank[places])
                return langevin_2d(f, begin, steps, s.noise)

            return sampler
    ''')


EXERCISES = [
    Exercise("toy2d-1", unchanged, reach, {
        "STEEP": "distance from 0 after 14 PGD steps of .12 up f(x) = -100 |x| from (3, 0)",
        "FLAT": "the same up f(x) = -.001 |x|"}),
    Exercise("toy2d-2", lambda source: take_out(source, "langevin_2d", "toy2d-2: Eq. 2.3"), langevin),
    Exercise("toy2d-3", no_bank, bank),
    Exercise("toy2d-4", unchanged, weights),
]
