"""Graders of the exercises of gen_classify.py."""
import math
import tempfile
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from kit import Exercise, expect, number, swap, take_out, unchanged
from torch import nn


def bayes(_, answers):
    """gen_classify-1: d + c, not d alone."""
    said = number(answers, "CLASS")
    expect(said != 1, "CLASS: 1 has the largest d, but the d_k are comparable only after c is added")
    expect(said != 2, "CLASS: 2 has the largest c; the sum d + c decides")
    expect(said == 0, f"CLASS: not {said:g}; classes count from 0, and the largest d_k + c_k wins")
    said, right = number(answers, "PROBABILITY"), math.e / (math.e + 2)
    sigma = 1 / (1 + math.exp(-1.5))
    expect(abs(said - sigma) > 0.005,
           "PROBABILITY: that is the logistic function of one sum; (3.42) divides by a sum over all classes")
    expect(abs(said - right) < 0.005,
           f"PROBABILITY: not {said:g}; the sums d + c are 1.5, .5, .5, and (3.42) is a softmax of them")
    said = number(answers, "SHIFTED")
    expect(abs(said - 3) > 0.01, "SHIFTED: 3 has the wrong sign: where d_1 got too high, c_1 has to take it back")
    expect(abs(said + 5) > 0.01, "SHIFTED: -5 is by how much the difference changes, not what it is afterwards")
    expect(abs(said + 7) < 0.01,
           f"SHIFTED: not {said:g}; nothing that is read from images changes, since c takes up what all images share")


def claim(_, answers):
    """gen_classify-2: one decision rule, attacked in two ways."""
    said = number(answers, "SOURCE_G")
    expect(abs(said - 0.25) > 0.01,
           "SOURCE_G: .25 would be right if the attack lowered d of the label as well; (3.48) raises d of the other "
           "class")
    expect(abs(said - 0.75) < 0.01,
           f"SOURCE_G: not {said:g}; the attack adds .5 to x_1 and leaves x_0 as it is: which of the gaps x_0 - x_1 "
           "are smaller?")
    said = number(answers, "SOURCE_S")
    expect(abs(said - 0.75) > 0.01,
           "SOURCE_S: .75 would be right if the attack moved x_1 alone; the gradient of the cross-entropy moves "
           "both pixels")
    expect(abs(said - 0.25) < 0.01,
           f"SOURCE_S: not {said:g}; with two outputs the cross-entropy rises along (-1, 1) / sqrt 2, so a move of "
           "length .5 takes .5 sqrt 2 from the gap")
    said = number(answers, "WORST_G")
    expect(abs(said - 0.25) < 0.01,
           f"WORST_G: not {said:g}; both classifiers read every image alike, so an image that breaks one breaks the "
           "other")
    word = str(answers["LEAD"]).strip().lower()
    expect(word in ("model", "attack", "calibration"), f"LEAD: {word!r} is none of model, attack, calibration")
    expect(word != "calibration", "LEAD: c is 0 here, and S has no c: calibration explains nothing")
    expect(word != "model", "LEAD: the two classifiers have the same outputs for every image; no model is better")


class Line(nn.Module):
    """A d_k of images with three pixels: slope . x + offset, one output."""

    def __init__(self, slope, offset=0.0):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))
        self.offset = offset

    def forward(self, x):
        return (x.flatten(1) * self.slope).sum(1, keepdim=True) + self.offset


def made_by(gen_classify, nets, c, x, y):
    """What likest_images makes within a radius of .3: [n, 3]."""
    net = gen_classify.Generative(gen_classify.Detectors(nets), torch.tensor(c))
    x = torch.tensor(x).view(-1, 1, 1, 3)
    a = gen_classify.Radius(0.3, 20, 0.03)
    made = gen_classify.likest_images(net, x, torch.tensor(y), a)
    expect(made.shape == x.shape, f"images {tuple(x.shape)} become {tuple(made.shape)}: one for each is wanted")
    expect(not any(net.slope.grad is not None for net in nets),
           "the attack leaves a gradient in the parameters of d")
    return made.detach().view(-1, 3)


def near(made, wanted):
    """Are images where they should be?"""
    return (made - torch.tensor(wanted)).abs().max() < 0.02


def likest(gen_classify, _):
    """gen_classify-4: (3.47) for each class but the label, then the one with the largest d + c."""
    pixels = [Line([1.0, 0, 0]), Line([0, 1.0, 0]), Line([0, 0, 1.0])]
    zero = [0.0, 0.0, 0.0]
    one = made_by(gen_classify, pixels, zero, [[0.5, 0.2, 0.1]], [0])
    move = (one - torch.tensor([0.5, 0.2, 0.1]))[0]
    expect(move.max() > 0.01, "the image becomes less like every class: (3.47) goes up d_k")
    expect(move.norm() > 0.25, f"the image moves by {move.norm():.2f} where .30 is allowed: a has more than one step")
    expect(move.norm() < 0.302, f"the image moves by {move.norm():.2f}, out of the ball of radius .30")
    expect(move[0] < 0.1, "the image becomes more like its own label: the label's class takes no part")
    expect(move[0] > -0.1,
           "d of the label is lowered too; that is a stronger attack, but (3.47) goes up d_k, whatever the label's "
           "does")
    expect(near(one, [0.5, 0.5, 0.1]),
           "d_k is pixel k: the image of class 1 reaches .5, that of class 2 .4, and the one that reaches less "
           "comes out")
    both = made_by(gen_classify, pixels, zero, [[0.5, 0.2, 0.1], [0.2, 0.5, 0.1], [0.1, 0.2, 0.5]], [0, 1, 2])
    expect(near(both, [[0.5, 0.5, 0.1], [0.5, 0.5, 0.1], [0.1, 0.5, 0.5]]),
           "one image alone is right, three of different labels are not: label and winner are those of each image")
    lifted = made_by(gen_classify, pixels, [0.0, 0.0, 0.3], [[0.5, 0.2, 0.1]] * 3, [0, 0, 0])
    expect(near(lifted, [0.5, 0.2, 0.4]),
           "with c = (0, 0, .3) the image of class 2 reaches .4 + .3 and that of class 1 .5 + 0, and yet the latter "
           "comes out: c decides too")
    slow = [Line([1.0, 0, 0]), Line([0, 0.5, 0], 0.3), Line([0, 0, 1.0])]
    later = made_by(gen_classify, slow, zero, [[0.9, 0.6, 0.5]], [0])
    expect(near(later, [0.9, 0.6, 0.8]),
           "the class is chosen by what d says before the attack; (3.48) chooses among the attacked images")
    shared = [Line([1.0, 1.0, 0]), Line([0, 1.0, 0]), Line([0, 0, 1.0])]
    alike = made_by(gen_classify, shared, zero, [[0.9, 0.3, 0.2]], [0])
    expect(near(alike, [0.9, 0.6, 0.2]),
           "where d of the label rises together with d_k the choice goes wrong: (3.48) asks which d_k + c_k is "
           "largest, not which is furthest above the label's")
    small = [Line([1.0, 0, 0], -9.0), Line([0, 1.0, 0], -9.0), Line([0, 0, 1.0], -9.0)]
    below = made_by(gen_classify, small, zero, [[0.5, 0.2, 0.1]], [0])
    expect(near(below, [0.5, 0.5, 0.1]),
           "where all d_k are negative a wrong image comes out: the label has to be left out by -inf, not by 0")
    four = [*pixels, Line([0, 0, 2.0])]
    last = made_by(gen_classify, four, [*zero, 0.0], [[0.5, 0.2, 0.1], [0.5, 0.2, 0.1]], [0, 3])
    expect(near(last, [[0.5, 0.2, 0.4], [0.8, 0.2, 0.1]]),
           "three classes are right, four are not: every class but the label has to be tried, however many there are")


def first_update(gen_classify, K, s):
    """One update of K linear d_k -> for each its old parameters, its new ones, its gradient if trained alone."""
    g = torch.Generator().manual_seed(K)
    nets = []
    for _ in range(K):
        net = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
        for parameter in net.parameters():
            parameter.data = torch.randn(parameter.shape, generator=g) / 4
        nets.append(net)
    x = torch.rand(K, s.batch, 1, 4, 4, generator=g)
    x_out = torch.rand(K, s.batch, 1, 4, 4, generator=g)
    images = gen_classify.common.Images(torch.zeros(9, 1, 4, 4, dtype=torch.uint8), torch.arange(9) % 3, "made up")
    waiting = [deepcopy(net) for net in nets]
    patched = {"lists_of": lambda images, classes: ("own", "others"),
               "draw_images": lambda images, lists, *_: (x if lists == "own" else x_out).clone()}
    real = {name: getattr(gen_classify, name) for name in patched}
    make_net = gen_classify.common.make_net
    gen_classify.common.make_net = lambda *_: waiting.pop(0)
    for name, function in patched.items():
        setattr(gen_classify, name, function)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            run = SimpleNamespace(folder=folder, shared=folder, seed=0, smoke=True, chunk=250,
                                  device=torch.device("cpu"))
            d = gen_classify.train_d(run, s, "d", images, range(K))
            logged = float((folder / "log-d.csv").read_text().splitlines()[-1].split(",")[1])
    finally:
        gen_classify.common.make_net = make_net
        for name, function in real.items():
            setattr(gen_classify, name, function)
    updates, losses = [], []
    for net, new, inside, outside in zip(nets, d.nets, x, x_out):
        loss = (F.softplus(-net(inside)).mean() + F.softplus(net(outside)).mean()) / 2
        losses.append(loss.item())
        gradient = torch.autograd.grad(loss, list(net.parameters()))
        old, moved = [nn.utils.parameters_to_vector(one.parameters()).detach() for one in (net, new)]
        updates.append((old, moved, torch.cat([part.flatten() for part in gradient])))
    mean = sum(losses) / K
    expect(abs(logged - mean) < 0.02 * mean,
           f"of {K} d_k that are trained together the log has the loss {logged:.3f}; it was right before, the mean, {mean:.3f}")
    return updates


def alone(gen_classify, _):
    """gen_classify-3: the update of a d_k does not depend on how many others are trained beside it."""
    smoke = gen_classify.SETTINGS["glyphs", "smoke"]
    s = replace(smoke, updates=1, batch=8, lr=0.1, weight_decay=0.5, eps_out=1e-6, eps_in=0.0)
    for K in (2, 3, 5):
        for k, (old, moved, gradient) in enumerate(first_update(gen_classify, K, s)):
            parts = torch.stack([gradient, old], 1)
            share, decay = torch.linalg.lstsq(parts, (old - moved)[:, None] / s.lr).solution[:, 0].tolist()
            expect(abs(share) > 0.02,
                   f"of {K} d_k that are trained together the one at place {k} is not trained at all")
            expect(abs(share - 1) < 0.1,
                   f"of {K} d_k that are trained together the one at place {k} moves along {share:.2f} of the "
                   "gradient of its own loss; alone it would move along 1.00 of it")
            expect(abs(decay - s.weight_decay) < 0.1,
                   f"of {K} d_k that are trained together weight decay is {decay:.2f}, not {s.weight_decay}: a rate "
                   "that makes up for a small gradient multiplies weight decay too")


def averaged(source):
    """Each d_k gets a share 1 / K of its gradient."""
    return swap(source,
                "loss.sum().backward()  # not the mean: each d_k gets the gradient that it would get alone",
                "loss.mean().backward()")


def no_likest_images(source):
    """The body of likest_images is taken out."""
    return take_out(source, "likest_images", "gen_classify-4: (3.47) for each class, and (3.48)")


EXERCISES = [
    Exercise("gen_classify-1", unchanged, bayes, {
        "CLASS": "which of the classes 0, 1, 2 does (3.43) name for d(x) = (1, 2, -.5), c = (.5, -1.5, 1)?",
        "PROBABILITY": "p(k | x) of that class by (3.42)",
        "SHIFTED": "c_1 - c_0 once d_1 + 5 has taken the place of d_1 and c is learned again"}),
    Exercise("gen_classify-2", unchanged, claim, {
        "SOURCE_G": "accuracy of G on the four images under (3.48), radius .5",
        "SOURCE_S": "accuracy of S on the four images under (3.46), radius .5",
        "WORST_G": "share of the four images that G reads rightly after each of these attacks, on G or on S",
        "LEAD": "one word, in quotes: what explains the lead of G: model, attack or calibration?"}),
    Exercise("gen_classify-3", averaged, alone),
    Exercise("gen_classify-4", no_likest_images, likest),
]
