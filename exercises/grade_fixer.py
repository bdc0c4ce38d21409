"""Graders of the exercises of fixer.py."""
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from kit import Exercise, expect, near, swap, take_out, unchanged
from torch import nn


def before_training(fixer, answers):
    """fixer-1: what an untrained G does, and what the rows of `upperbound` add up to."""
    G = fixer.Fixer(1, 4).train()
    pixel = G(torch.full((2, 1, 8, 8), 1.7))[0, 0, 0, 0].item()
    near(answers, "PIXEL", pixel, 0.005,
           "look at the weights of G's last layer, and for a clamp or a tanh at the end")
    F.mse_loss(G(torch.randn(4, 1, 8, 8)), torch.rand(4, 1, 8, 8)).backward()
    moving = sum(p.grad.abs().max().item() > 0 for p in G.parameters())
    near(answers, "MOVING", moving, 0.5,
           "the gradient reaches every other layer through the weights of the last one, and those are 0 at first")
    after = 300 + 84 - 4
    near(answers, "ACCURACY", after / 400, 0.002, "what G spoils goes off again from what it repairs")
    near(answers, "CLOSED", (after - 300) / (396 - 300), 0.005,
           "the gap is what chains cost, from f(P(x)) up to f(x), and what is gained of it is repaired minus spoiled")


def phi(x):
    """A loss network's front: [B, 3, 6, 8] -> [B, 2, 3, 4]."""
    return F.avg_pool2d(x.square() + x, 2)[:, :2]


def perceptual(fixer, _):
    """fixer-2: Eq. 5.4."""
    mean, std = torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.3, 0.25]]).view(2, 1, 3, 1, 1)
    x, target = 2 * torch.rand(2, 5, 1, 6, 8) - 0.5  # chains leave [0, 1]
    x.requires_grad_(True)
    seen = []

    def watched(images):
        seen.append(images.detach())
        return phi(images)

    loss = fixer.perceptual_loss(x, target, watched, mean, std)
    expect(loss is not None and loss.dim() == 0, "perceptual_loss must give one number for the whole batch")
    expect(len(seen) > 0, "phi is never asked: that is a loss of pixels, phase 1's")
    expect(all(images.shape[1:] == (3, 6, 8) for images in seen),
           f"phi wants RGB; in one of its calls it got {[tuple(i.shape) for i in seen if i.shape[1:] != (3, 6, 8)][:1]}: the "
           "three means make grey images RGB, x and target alike")
    shown = torch.cat(seen).flatten(1)
    for name, images in (("x", x.detach()), ("target", target)):
        wanted = ((images - mean) / std).flatten(1)
        missing = (wanted[:, None] - shown).abs().amax(2).amin(1).max()
        expect(missing < 1e-4,
               f"phi does not see {name} as it was trained to see images: the mean goes off, then std divides, "
               "in both images; nothing is clamped")
    wanted = F.mse_loss(phi((x - mean) / std), phi((target - mean) / std))
    expect(not math.isclose(loss.item(), wanted.sqrt().item(), rel_tol=1e-3),
           "that is a distance, a root; Eq. 5.4 has its square")
    absolute = F.l1_loss(phi((x - mean) / std), phi((target - mean) / std))
    expect(not math.isclose(loss.item(), absolute.item(), rel_tol=1e-3), "that is the mean of |a - b|; Eq. 5.4 squares")
    ratio = loss.item() / wanted.item()
    expect(ratio > 1 or abs(ratio - 1) < 1e-3,
           f"the loss is {ratio:.4g} times that of Eq. 5.4: squared differences, averaged, with no other factor?")
    expect(abs(ratio - 1) < 1e-3,
           f"the loss is {ratio:.4g} times that of Eq. 5.4, for 5 images with maps of 2 x 3 x 4: squared differences, "
           "averaged over all of these? A sum makes the rate of Adam mean something else for each layer and batch")
    wanted_gradient, = torch.autograd.grad(wanted, x)
    expect(loss.requires_grad, "no gradient reaches x, and so G cannot learn: phi is frozen, not cut off")
    gradient, = torch.autograd.grad(loss, x, allow_unused=True)
    expect(gradient is not None and torch.allclose(gradient, wanted_gradient, atol=1e-6),
           "the loss is right and its gradient at x is not: a part of phi(x) is detached")
    colour = torch.rand(2, 2, 3, 6, 8)
    found = fixer.perceptual_loss(*colour, phi, 0.5, 0.5)
    expect(torch.allclose(found, F.mse_loss(*phi(2 * colour.flatten(0, 1) - 1).chunk(2)), rtol=1e-3),
           "without VGG mean and std are both the number .5, and images may be RGB: there the loss is wrong")


class Loop:
    """In place of common.Training: counts, and ends where it is told to."""

    def __init__(self, *_, **__):
        self.finished = False

    def updates(self, total, *_):
        for it in range(1, total + 1):
            yield it
            if self.finished:
                return

    def log(self, **_):
        pass


def kept(fixer, train, val, early):
    """train_phase under made-up losses -> G, epochs done, the epoch that G's weights are of, whose pairs were asked."""
    biases, asked = [], []
    learned, held = (SimpleNamespace(shape=(1, 8, 8), name=name) for name in ("learned", "held"))
    pairs = {"learned": torch.zeros(8, 1, 8, 8), "held": torch.zeros(5, 1, 8, 8)}

    def pair_loss(run, loss, G, z, images, rows):
        moves = G.body[-1].bias.sum()  # a gradient of 1; the value is the made-up one
        return moves - moves.detach() + train[len(biases)]

    def mean_loss(run, s, loss, G, z, images):
        biases.append(G.body[-1].bias.item())
        asked.append(images is held and z is pairs["held"])
        return val[len(biases) - 1]

    s = replace(fixer.SETTINGS["glyphs", "smoke"], patience=2, batch=4, lr=0.01)
    run = SimpleNamespace(seed=0, device=torch.device("cpu"))
    fakes = {"Training": Loop, "purified": lambda run, chain, images, K, draw=0: pairs[images.name],
             "pair_loss": pair_loss, "mean_loss": mean_loss}
    with mock.patch.multiple(fixer, **fakes):
        G = fixer.train_phase(run, s, "g", None, learned, held, F.mse_loss, len(val), 2, early=early)
    distances = [abs(bias - G.body[-1].bias.item()) for bias in biases]
    return G, len(biases), 1 + distances.index(min(distances)), all(asked)


def early_stopping(fixer, _):
    """fixer-3: phase 2 keeps the weights of the lowest validation loss, and ends `patience` epochs later."""
    train, val = [9.0, 8.0, 2.0, 1.0, 0.5, 0.25], [4.0, 3.0, 3.5, 3.25, 1.0, 2.0]
    G, epochs, epoch, on_held = kept(fixer, train, val, early=True)
    expect(on_held, "the validation loss is taken on pairs that G learns from; it must be of the held-out ones")
    expect(G.losses == [list(pair) for pair in zip(train, val)][:epochs],
           "G.losses, which figure 5.2 draws, must stay [training, validation] for each epoch")
    expect(epochs == 4,
           f"after validation losses 4, 3, 3.5, 3.25, 1, 2 and with patience 2 training ends after epoch 4, not "
           f"{epochs}: which loss is it that no longer falls?")
    expect(epoch == 2,
           f"with validation losses 4, 3, 3.5, 3.25 the weights that are kept are those after epoch {epoch}, not 2; "
           "the training loss, which fell all the time, has no say in it")
    rising, falling = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    _, epochs, epoch, _ = kept(fixer, rising, falling, early=True)
    expect((epochs, epoch) == (6, 6),
           f"where the validation loss falls in all six epochs, training ends after {epochs} and keeps {epoch}")
    _, epochs, epoch, _ = kept(fixer, train, val, early=False)
    expect((epochs, epoch) == (6, 6),
           f"early=False, phase 1, must run all six epochs and keep the last weights; it ran {epochs} and kept {epoch}")


class Score(nn.Module):
    """The page's f: two logits, m and -m, m = left - .8 right - .07."""

    def forward(self, x):
        m = x[:, 0, 0, 0] - 0.8 * x[:, 0, 0, 1] - 0.07
        return torch.stack([m, -m], 1)


class Average(nn.Module):
    """A Fixer that gives both pixels their mean."""

    def forward(self, x):
        return x.mean(3, keepdim=True).expand_as(x)


class Round(nn.Module):
    """A Fixer that makes each pixel 0 or 1."""

    def forward(self, x):
        return x.round()


def around_or_through(fixer, answers):
    """fixer-4: two Fixers and two attacks, each blind on one of them; attacks joined image by image."""
    f, y, ball = Score(), torch.tensor([0]), fixer.LInf(0.1, 0.1)
    why = {"AVERAGE_AROUND": "this step follows the slope at G's OUTPUT, down m, and G may take away just what it did",
           "AVERAGE_THROUGH": "this step follows the slope of the mean, down m, the same at both pixels",
           "ROUND_AROUND": "the step goes down m, at the pixels before G, and G is asked again where they are then",
           "ROUND_THROUGH": "what is the derivative of round(), and what does a step do with the sign of that? And m is "
                            "read at G(x), not at x"}
    for kind, G, x in (("AVERAGE", Average(), [0.5, 0.3]), ("ROUND", Round(), [0.55, 0.3])):
        x = torch.tensor(x).view(1, 1, 1, 2)
        defences = {"AROUND": fixer.Defence(f, 1, partial(fixer.chain_and_fixer, chain=fixer.stay, G=G)),
                    "THROUGH": fixer.Defence(fixer.behind(G, f), 1, fixer.stay)}
        for way, defence in defences.items():
            _, gradient = defence.gradient(x, y, 1)
            m = f(G(ball.ascend(x, x, gradient)))[0, 0].item()
            near(answers, f"{kind}_{way}", m, 0.004, why[f"{kind}_{way}"])
    needed = str(answers["NEEDED"]).strip().lower()
    expect(needed in ("around", "through", "both"), f"NEEDED is one of around, through, both, not {needed}")
    expect(needed == "both",
           f"an evaluation by '{needed}' alone would call one of the two Fixers robust, and the other attack breaks it")
    broken = {9, 10} | {2, 9, 10} | {1, 5, 10}
    expect(answers["JOINED"] != 0.7,
           "JOINED .7 is the lowest of the three accuracies; an adversary may choose another attack for each image")
    near(answers, "JOINED", 1 - len(broken) / 10, 0.005,
           "an image survives if no attack breaks it; count each image once")


EXERCISES = [
    Exercise("fixer-1", unchanged, before_training, {
        "PIXEL": "what an untrained Fixer, in train mode, makes of an image whose pixels are all 1.7: a pixel of it",
        "MOVING": "how many of its weight and bias tensors get a gradient other than 0 in the first update",
        "ACCURACY": "accuracy of f(G(P(x))): of 400 images f(P(x)) reads 300, G repairs 84 and spoils 4",
        "CLOSED": "share of the gap that G closes then, where f(x) reads 396"}),
    Exercise("fixer-2", lambda source: take_out(source, "perceptual_loss", "fixer-2: Eq. 5.4"), perceptual),
    Exercise("fixer-3", lambda source: swap(source, "key=lambda pair: pair[1])", "key=lambda pair: pair[0])"),
             early_stopping),
    Exercise("fixer-4", unchanged, around_or_through, {
        "AVERAGE_AROUND": "m after the step around G, P; G gives both pixels their mean",
        "AVERAGE_THROUGH": "m after the step through G, the same G",
        "ROUND_AROUND": "m after the step around G, P; G rounds each pixel",
        "ROUND_THROUGH": "m after the step through G, the same G",
        "NEEDED": "which of these attacks an evaluation of unknown Fixers needs: 'around', 'through' or 'both'",
        "JOINED": "accuracy under the worst of the page's three attacks, joined image by image"}),
]
