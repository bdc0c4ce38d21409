"""Graders of the exercises of at_gen.py."""
import math
from dataclasses import replace

import torch
from kit import Exercise, expect, swap, take_out, unchanged
from torch import nn


class Slope(nn.Module):
    """f(x) = <w, x>: its gradient is w wherever x is."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x):
        return (x * self.w).flatten(1).sum(1, keepdim=True)


class Square(Slope):
    """f(x) = <w, x>^2: its gradient is the longer, the larger <w, x> is."""

    def forward(self, x):
        return super().forward(x) ** 2


def expected(at_gen, answers):
    """at_gen-1: the loss at the start, the factors of Eq. 2.18, and a step that the box cuts short."""
    def close(name, number):
        return abs(answers[name] - number) < 0.01

    sure = torch.tensor(3.0).sigmoid().item()  # D where f = 3
    expect(not close("LOSS", 2 * math.log(2)),
           "LOSS: that is the sum of the two means of cross-entropies; at_loss is -J/2, the mean of all 2m of them")
    expect(close("LOSS", math.log(2)),
           "LOSS: not that; where f = 0 D is sigmoid(0), and every cross-entropy is minus the log of it")
    swapped = close("DATA", sure) and close("ATTACKED", 1 - sure)
    expect(not swapped, "DATA and ATTACKED are exchanged: data with a high logit are read rightly already, so they "
                        "hardly pull; an attacked image with a high logit is what f is wrong about")
    for name, number, factor in (("DATA", 1 - sure, "1 - D(x)"), ("ATTACKED", sure, "D(x)")):
        expect(close(name, number), f"{name}: the factor of Eq. 2.18 there is {factor} with D = sigmoid(f), at f = 3")
    expect(close("EBM", 1), "EBM: its gradient is E_data[df] - E_p0[df]; nothing in it asks how sure f is")
    x = torch.full((1, 1, 4, 4), 0.9)
    way = (at_gen.pgd_attack(Slope(torch.ones(1, 4, 4)), x, 1, 1.0) - x).norm().item()
    expect(not close("MOVED", 1.0),
           "MOVED: the step has length 1 before the clamp to [0, 1]; where do pixels of .9 end?")
    expect(close("MOVED", way), "MOVED: not that; the distance is l_2, the root of the sum of the 16 pixels' squares")


def step_of(at_gen, x, f, x0, step, eps):
    """pgd_attack_step, called as pgd_attack calls it."""
    kept = x0.clone()
    try:
        with torch.no_grad():
            end = at_gen.pgd_attack_step(x, f, x0, step, eps)
    except RuntimeError as error:
        expect("does not require grad" not in str(error),
               "the steps run under torch.no_grad (see common.repeat), so a gradient there needs torch.enable_grad or "
               "common.input_gradient")
        raise
    expect(isinstance(end, torch.Tensor) and end.shape == x.shape, "a step must give images of the shape it gets")
    expect(torch.equal(x0, kept),
           "x0 is changed: in the first step x and x0 are one tensor, so x must not be changed in place")
    expect(not end.requires_grad, "the images after a step still require a gradient: a chain would keep its graph")
    expect(end.isfinite().all(),
           f"a step with eps = {eps} gives numbers that are not finite: is there a division by 0, or is inf multiplied "
           "or divided?")
    return end


def pgd_step(at_gen, _):
    """at_gen-2: Eq. 2.7, a step up, the ball, the box."""
    w = torch.tensor([[[3.0, 0.0], [0.0, 2.0]], [[0.0, -4.0], [2.0, 0.0]]])  # [2, 2, 2]
    u = w / w.norm()
    grey = torch.full((2, 2, 2, 2), 0.5)
    flat = step_of(at_gen, grey, Slope(0 * w), grey, 0.1, math.inf)
    expect(torch.equal(flat, grey), "where the gradient is 0 an image must stay as it is")

    def lengths(x, x0=grey):
        return (x - x0).flatten(1).norm(dim=1)

    f = Square(w)
    x = grey.clone()
    x[1] += 0.2 * u  # here f is steeper
    moved = step_of(at_gen, x, f, x, 0.1, math.inf) - x
    expect((moved * u).sum() > 0, "a step with a positive `step` goes down f: it must climb")
    long = moved.flatten(1).norm(dim=1)
    expect((long - 0.1).abs().max() < 1e-3,
           f"a step of 0.1 moves two images by {long[0]:.3f} and {long[1]:.3f}: each image's own gradient, over "
           "channels and pixels together, must be brought to length 1")
    expect((moved / 0.1 - u).abs().max() < 1e-2, "a step has the right length, but not the gradient's direction")
    long = lengths(step_of(at_gen, grey, Slope(1e-5 * w), grey, 0.1, math.inf)).mean()
    expect(abs(long - 0.1) < 1e-3,
           f"where f is very flat, a step of 0.1 moves an image by {long:.4f}: what guards against a gradient of 0 "
           "must be much smaller than any other gradient")
    expect((step_of(at_gen, grey, f, grey, -0.1, math.inf) - grey + 0.1 * u).abs().max() < 1e-3,
           "a negative `step` must go down f by the same length")
    expect(f.w.grad is None, "the step leaves a gradient in f's parameters: it must not take part in the update")
    x = grey.clone()
    x[0] += 0.3 * u  # the second one is at the ball's centre
    end = lengths(step_of(at_gen, x, Slope(w), grey, 0.1, 0.35))
    expect(abs(end[0] - 0.35) < 1e-3,
           f"from 0.3 away from x0 a step of 0.1 with eps = 0.35 ends {end[0]:.3f} away: it must end on the sphere of "
           "that radius around x0 (not around x)")
    expect(abs(end[1] - 0.1) < 1e-3,
           f"a step of 0.1 from x0 with eps = 0.35 ends {end[1]:.3f} away: inside of the ball nothing is to be "
           "projected, and each image has its own distance")
    still = step_of(at_gen, grey, Slope(w), grey, 0.1, 0.0)
    expect((still - grey).abs().max() < 1e-4, "with eps = 0 an image must stay where it is")
    bright = torch.full((1, 1, 1, 2), 0.5)
    bright[..., 0] = 0.9
    up = torch.tensor([[[0.6, 0.8]]])
    for step in (1.0, -2.0):
        end = step_of(at_gen, bright, Slope(up), bright, step, math.inf)
        expect(end.min() >= 0 and end.max() <= 1, "a step leaves [0, 1]")
    end = step_of(at_gen, bright, Slope(up), bright, 1.0, 0.5)
    wanted = (bright + 0.5 * up).clamp(0, 1)
    left, right = end.flatten().tolist()
    expect((end - wanted).abs().max() < 1e-3,
           f"from (0.9, 0.5), eps = 0.5, a step of 1 along (0.6, 0.8) ends at ({left:.3f}, {right:.3f}): first the "
           "ball, then [0, 1], as the docstring says")
    chain = at_gen.pgd_attack(Slope(w), grey, 3, 0.1, 0.25)
    expect((lengths(chain) - 0.25).abs().max() < 1e-3,
           "three steps of 0.1 with eps = 0.25 must end on the sphere around the first images")


def penalty(at_gen, _):
    """at_gen-3: R1 by hand, at f = <w, x> + a |x|^2, whose gradient is w + 2 a x."""
    a = torch.tensor(0.7, requires_grad=True)
    w = torch.tensor([[[1.0, -2.0], [0.5, 3.0]]])
    x = torch.linspace(0, 1, 12).view(3, 1, 2, 2).requires_grad_(True)
    got = at_gen.r1_penalty((w * x + a * x.square()).flatten(1).sum(1), x)
    expect(isinstance(got, torch.Tensor) and got.dim() == 0, "r1_penalty must give a tensor of one number")
    slope = (w + 2 * a * x).detach()
    wanted = slope.square().flatten(1).sum(1).mean() / 2
    ratio = (got / wanted).item()
    expect(abs(ratio - 1) < 1e-3,
           f"r1_penalty is {ratio:.3g} times what it should be: half of the mean over images of the squared length, "
           "which is a SUM over pixels")
    expect(got.requires_grad,
           "the value is right, and yet an update of f is the same for every gamma: what does backward() find when it "
           "comes to the penalty?")
    (got_slope,) = torch.autograd.grad(got, a, allow_unused=True)
    wanted = (slope * 2 * x.detach()).flatten(1).sum(1).mean()
    expect(got_slope is not None and abs(got_slope / wanted - 1) < 1e-3,
           "the value is right, but its gradient by f's parameters is not: is a part of it detached?")


def gate(at_gen, _):
    """at_gen-4: K grows early where f sees through the attack."""
    expect(hasattr(at_gen, "gated_k"), "there is no function gated_k")
    s = replace(at_gen.SETTINGS["glyphs", "smoke"], k_min=2, k_max=5, iters_per_k=6)

    def check(aucs, K, sentence):
        given = list(aucs)
        got = at_gen.gated_k(s, given, 0.8, 2)
        expect(given == aucs, "the list of AUCs is changed: the next call gets it again")
        seen = ", ".join(map(str, aucs[:9]))
        expect(got == K,
               f"{sentence} (k_min 2, k_max 5, iters_per_k 6, threshold 0.8, window 2: {len(aucs)} updates with AUCs "
               f"{seen} give K = {got}, not {K})")

    check([], 2, "the first K is k_min")
    check([0.5] * 5, 2, "where the attack fools f, each K keeps all its iters_per_k updates")
    check([0.5] * 6, 3, "without the gate K grows after iters_per_k updates, as in Algorithm 3")
    check([0.5] * 12, 4, "without the gate K grows after every iters_per_k updates")
    check([0.9], 2, "a K has at least `window` updates before the gate can open")
    check([0.9, 0.9], 3, "a mean AUC above the threshold lets K grow at once: f sees through attacks of K steps")
    check([0.95, 0.7], 3, "the gate asks for the MEAN of the window")
    check([0.99, 0.5], 2, "the gate asks for the MEAN of the window")
    check([0.1, 0.9, 0.9], 3, "the mean is over the last `window` updates, not over all of this K")
    check([0.9, 0.9, 0.1], 3, "the mean is over the last `window` updates; a K once left does not come back")
    check([0.9] * 3, 3, "the window must not reach back to updates with the K before")
    check([0.9] * 4, 4, "the gate can open again for the next K")
    check([0.5] * 6 + [0.9], 3, "the window must not reach back to updates with the K before")
    check([0.9] * 2 + [0.5] * 5, 3, "iters_per_k counts from the first update with this K")
    check([0.9] * 2 + [0.5] * 6, 4, "iters_per_k counts from the first update with this K")
    check([0.9] * 60, 5, "K must not grow beyond k_max, where training stays")
    check([0.5] * 60, 5, "K must not grow beyond k_max, where training stays")
    fewer = at_gen.gated_k(s, [0.7] * 3, 0.6, 3)
    expect(fewer == 3 and at_gen.gated_k(s, [0.7] * 3, 0.6, 4) == 2, "threshold or window is not the one that is given")
    expect(at_gen.steps_of_update(s, 7) == 3, "steps_of_update must stay: Algorithm 3 is what you compare with")


def no_graph(source):
    """The penalty's value is right, but it is a constant."""
    return swap(source, "x, create_graph=True)", "x, retain_graph=True)")


EXERCISES = [
    Exercise("at_gen-1", unchanged, expected, {
        "LOSS": "at_loss of an untrained f, whose logits are all 0",
        "DATA": "the factor of df in Eq. 2.18 at a data image with logit f = 3",
        "ATTACKED": "the same at an attacked image of p0 with logit f = 3, without the minus sign",
        "EBM": "the same for the EBM (Eq. 2.2)",
        "MOVED": "l_2 distance that one step of length 1 up f = sum of pixels moves a grey 4x4 image, all pixels .9"}),
    Exercise("at_gen-2", lambda source: take_out(source, "pgd_attack_step", "at_gen-2: Eq. 2.7"), pgd_step),
    Exercise("at_gen-3", no_graph, penalty),
    Exercise("at_gen-4", unchanged, gate),
]
