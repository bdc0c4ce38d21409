"""Graders of the exercises of ood_detect.py."""
import math

import torch
from kit import Exercise, expect, number, swap, take_out, unchanged
from torch import nn


def by_hand(_, answers):
    """ood_detect-1: pairs counted, and a threshold found, by hand."""
    said = number(answers, "CONSTANT")
    expect(abs(said - 0.5) < 0.005,
           f"CONSTANT: not {said:g}; every pair of a data image and another one is a tie, and a tie counts one half")
    said = number(answers, "TIES")
    expect(abs(said - 0.625) > 0.005 and abs(said - 0.875) > 0.005,
           f"TIES: {said:g} counts the two ties as lost or as won; each counts one half")
    expect(abs(said - 0.75) < 0.005,
           f"TIES: not {said:g}; there are 4 x 2 pairs: count those where the data image is higher, and half of the "
           "ties")
    said = number(answers, "WORST")
    expect(abs(said - 0.25) < 0.005,
           f"WORST: not {said:g}; after the attack the out-distribution scores are 4 and 2, those of the data are what "
           "they were, and nothing keeps an AUROC above .5 once the order is turned round")
    said = number(answers, "FPR")
    expect(abs(said - 0.25) > 0.005,
           "FPR: .25 leaves out the image whose score is the threshold; scores from the threshold on are accepted")
    expect(abs(said) > 0.005,
           "FPR: 0 comes from a threshold at the wrong end: it shall accept .95 of the data, not .05 of them")
    expect(abs(said - 0.5) < 0.005,
           f"FPR: not {said:g}; 19 of the 20 data images are accepted, so the threshold is the 19th score from above")


def area(ood_detect, _):
    """ood_detect-2: the probability that a data image ranks above another one."""
    low = torch.tensor([0.1, -3.0, 0.2, 0.0])
    high = torch.tensor([5.0, 2.0, 0.5, 9.0])
    best = ood_detect.auroc(high, low)
    expect(isinstance(best, (int, float)),
           f"auroc gives a {type(best).__name__}; a row of a table wants a plain number")
    expect(abs(best) > 1e-4, "where all data images score higher auroc is 0: the two sides have changed places")
    expect(abs(best - 1) < 1e-4, f"where all data images score higher auroc is {best:.4f}, not 1")
    worst = ood_detect.auroc(low, high)
    expect(abs(worst) < 1e-4,
           f"where all data images score lower auroc is {worst:.4f}, not 0: a detector that is worse than chance has "
           "to show it, since that is what attacks make of detectors")
    tied = ood_detect.auroc(torch.zeros(4), torch.zeros(4))
    expect(abs(tied - 0.5) < 1e-4,
           f"a detector that gives all images one score gets {tied:.4f}, not .5: of a tie count one half")
    data, out = torch.tensor([3.0, 2.0, 2.0, 1.0]), torch.tensor([2.0, 0.0])
    counted = ood_detect.auroc(data, out)
    expect(abs(counted - 0.75) < 1e-4,
           f"data (3, 2, 2, 1) against (2, 0) get {counted:.4f}, not .75: is the side that is searched sorted? There are 4 x 2 pairs, as many as the "
           "product of both numbers of images")
    g = torch.Generator().manual_seed(3)
    for scale in (1.0, 1000.0, 0.001):
        data = scale * (torch.randn(150, generator=g).round(decimals=1) + 0.7)
        out = scale * torch.randn(90, generator=g).round(decimals=1)
        kept = data.clone(), out.clone()
        pairs = data[:, None] - out
        wanted = ((pairs > 0).double() + (pairs == 0).double() / 2).mean().item()
        got = ood_detect.auroc(data, out)
        expect(torch.equal(data, kept[0]) and torch.equal(out, kept[1]),
               "auroc changes the scores that it is given")
        expect(abs(got - wanted) < 1e-4,
               f"150 scores against 90, both in no order and with some ties, get {got:.4f}; all pairs counted one by "
               f"one give {wanted:.4f}")


class Slope(nn.Module):
    """The slope s(x) = 1 + w (x - 1/2), as the only output or as the second of three, the others 0."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs
        self.w = nn.Parameter(torch.linspace(-1, 1, 16).view(1, 4, 4))

    def forward(self, x):
        s = 1 + (self.w * (x - 0.5)).flatten(1).sum(1)
        if self.outputs == 1:
            return s[:, None]
        return torch.stack([0 * s, s, 0 * s], 1)


def share_found(ood_detect, detector, x0, a, sign):
    """What worst_case finds, as a share of the largest change of the score that there is in the ball."""
    uphill = detector.net.w.detach() / detector.net.w.detach().norm()
    clean = detector(x0)
    possible = detector(x0 + sign * a.eps * uphill) - clean
    found, score = ood_detect.worst_case(detector, x0, a, 1, sign)
    expect(torch.allclose(detector(found), score, atol=1e-4), "worst_case gives images, and scores of other images")
    expect((found - x0).flatten(1).norm(dim=1).max() < 1.01 * a.eps, "worst_case gives images from outside the ball")
    return ((score - clean) / possible).min().item()


def training_attacks(ood_detect, net, x0):
    """Attacks in training push p0 up and the data down."""
    a = ood_detect.Ball("2", 0.2, 5, 0.05)
    y = torch.zeros(len(x0), dtype=torch.int64)
    raised = net(ood_detect.momentum_pgd(ood_detect.raise_logit, x0, a, net, y)) - net(x0)
    lowered = net(ood_detect.momentum_pgd(ood_detect.lower_logit, x0, a, net, y)) - net(x0)
    expect(raised.min() > 0 and lowered.max() < 0,
           "now the attacks in training go the wrong way: raise_logit no longer raises f, or lower_logit no longer "
           "lowers it; these were right before")


def attack(ood_detect, _):
    """ood_detect-3: a worst case is at least as bad as the attack can make it, in both directions."""
    g = torch.Generator().manual_seed(5)
    x0 = 0.5 + 0.03 * torch.randn(3, 1, 4, 4, generator=g)
    a = ood_detect.Ball("2", 0.2, 20)
    training_attacks(ood_detect, Slope(1), x0)
    one = ood_detect.Detector(Slope(1), ood_detect.logit)
    three = ood_detect.Detector(Slope(3), ood_detect.confidence)
    made = []

    def watched(real, name):
        """An attack that remembers what it found."""
        def attack(*arguments):
            x = real(*arguments)
            made.append((name, x))
            return x
        return attack

    real = ood_detect.momentum_pgd, ood_detect.apgd
    ood_detect.momentum_pgd = watched(real[0], "PGD with constant steps")
    ood_detect.apgd = watched(real[1], "Auto-PGD")
    try:
        up = share_found(ood_detect, one, x0, a, 1)
        raised = list(made)
        down = share_found(ood_detect, one, x0, a, -1)
        shares = [share_found(ood_detect, three, x0, a, sign) for sign in (1, -1)]
    finally:
        ood_detect.momentum_pgd, ood_detect.apgd = real
    expect(up > 0.05,
           "on a linear f, which any attack raises, the worst case of an out-distribution image scores no higher "
           "than the image itself; that looks like a detector that cannot be attacked, and is an attack that finds "
           "nothing")
    expect(down > 0.05, "with sign -1 worst_case is to find LOW scores, of attacked data; the score does not fall")
    for name, x in raised:
        expect((one(x) > one(x0)).all(), f"{name} still ends where f is lower than at its start")
    expect(min(up, down) > 0.9,
           f"on a linear f the attack makes {min(up, down):.2f} of the change that is possible in the ball")
    expect(min(shares) > 0.9,
           f"of a classifier's largest probability the attack makes {min(shares):.2f} of the change that is "
           "possible: it has to follow the detector's own score, not one output")


def entropy(ood_detect, _):
    """ood_detect-4: a third score for the softmax classifier."""
    expect(hasattr(ood_detect, "minus_entropy"), "there is no function minus_entropy")
    z = torch.tensor([[0.0, 0.0, 0.0], [math.log(2), 0.0, 0.0], [7.0 + math.log(2), 7.0, 7.0]])
    score = ood_detect.minus_entropy(z)
    expect(score.shape == (3,), f"outputs (3, 3) give {tuple(score.shape)}: one score for each image is wanted")
    even, half = score[:2].tolist()
    expect(even < 0,
           f"equal outputs score {even:.3f}: entropy itself is HIGH where a classifier is unsure, and a score is to "
           "be high for images like the data")
    expect(abs(even + math.log(3)) < 1e-4 and abs(half + 1.5 * math.log(2)) < 1e-4,
           f"outputs (0, 0, 0) and (log 2, 0, 0) score {even:.3f} and {half:.3f}, not -1.099 and -1.040: the sum over "
           "classes of p log p, with the natural logarithm")
    expect(torch.allclose(score[1], score[2], atol=1e-4),
           "adding 7 to all outputs changes the score, though it changes no probability")
    sure = torch.tensor([[1000.0, 0.0, 0.0]], requires_grad=True)
    score = ood_detect.minus_entropy(sure)
    (gradient,) = torch.autograd.grad(score.sum(), sure)
    expect(abs(score.item()) < 1e-4,
           f"outputs (1000, 0, 0) score {score.item():.3f}, not 0: a probability of 0 must not meet a logarithm of it")
    expect(gradient.isfinite().all(),
           "at outputs (1000, 0, 0) the gradient is not finite, and an attack there moves an image to NaN")
    z = torch.tensor([[0.3, -1.0, 2.0], [5.0, 4.0, 0.0]])
    wanted = (z.softmax(1) * z.log_softmax(1)).sum(1)
    rows = []
    for method, row_score in ood_detect.DETECTORS.values():
        if torch.allclose(row_score(z), wanted, atol=1e-4):
            rows.append(method)
    expect(rows, "no row of DETECTORS has the new score, so no table will hold it")
    expect(not any(ood_detect.METHODS[method].binary for method in rows),
           "a network with one output has one probability, 1, and no entropy: the score is for a classifier")
    expect("softmax" in rows, "the new score is to stand beside the other two of the softmax classifier")
    expect(len(ood_detect.DETECTORS) == 6 + len(rows), "one of the six detectors has lost its row")


def no_auroc(source):
    """The body of auroc is taken out."""
    return take_out(source, "auroc", "ood_detect-2: count pairs, ties one half")


def downhill(source):
    """Attacks in tests lower the score that they should raise."""
    return swap(source, "return -sign * score(net(x))", "return sign * score(net(x))")


EXERCISES = [
    Exercise("ood_detect-1", unchanged, by_hand, {
        "CONSTANT": "AUROC of a detector that gives every image the same score",
        "TIES": "AUROC of data scores 3, 2, 2, 1 against out-distribution scores 2, 0",
        "WORST": "the same once an attack has raised each out-distribution score by 2",
        "FPR": "false positive rate at a true one of .95: data scores 1, 2, ..., 20, the others 0, 1, 2, 5"}),
    Exercise("ood_detect-2", no_auroc, area),
    Exercise("ood_detect-3", downhill, attack),
    Exercise("ood_detect-4", unchanged, entropy),
]
