"""Graders of the exercises of stochastic_security.py."""
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from kit import Exercise, Wrong, expect, swap, take_out, unchanged
from torch import nn

TAU, T = 0.015, 1e-4  # the script's own, for rendered digits


# --- 1: what a chain keeps ---


def share_left(ss, sigma, steps):
    """Of a change: the share in the mean of the chains. On a quadratic energy the noise adds nothing to a mean."""
    def V(x):
        return T * ((x - 0.5) / sigma).square().flatten(1).sum(1) / 2

    x = torch.tensor([0.5, 0.54]).view(2, 1, 1, 1)
    for _ in range(steps):
        x = ss.downhill(x, V, TAU, T)
    return ((x[1] - x[0]) / 0.04).item()


def kept(ss, answers):
    """stochastic_security-1: a Gaussian's chain forgets a fixed share of a change in every step."""
    for name, sigma in (("WIDE", 0.3), ("MIDDLE", 0.1), ("NARROW", 0.03)):
        left, said = share_left(ss, sigma, 75), answers[name]
        if abs(said - left) < 0.015:
            continue
        expect(abs(said - (1 - left)) > 0.015, f"{name}: {said} is about the share forgotten, not the share kept")
        expect(left < 0.01 or abs(said - left ** 2) > 0.015,
               f"{name}: {said} is what twice the steps leave; the gradient's part of Eq. 2.3 has half of tau^2")
        side = "much" if said > left else "little"
        raise Wrong(f"{name}: {said} is too {side}; how far does ONE step without noise move a point that is d away "
                    "from the middle of U = d^2 / (2 sigma^2)? The other 74 do the same to what is left")
    said, one = answers["STEPS"], share_left(ss, 0.1, 1)
    expect(abs(one ** said - 0.1) < 0.01,
           f"STEPS: after {said} steps the share left is not a tenth; every step takes the same share of what is still "
           "there, and so the change does not fall along a straight line")


# --- 2: when an image is broken ---

FEW = {  # image: evaluations at which the attack's own chains misread it
    "sound": (), "unlucky": (1, 2, 3, 4, 5, 6, 7, 8), "broken early": (2, 3, 4, 6), "only few are right": (),
    "misread before": (), "broken by a restart": (4, 7), "broken at the very end": (8,)}
FRESH = {  # the same of fresh chains; 0: before the attack
    "sound": (), "unlucky": (), "broken early": (2,), "only few are right": (1, 2, 3, 4, 5, 6, 7, 8),
    "misread before": (0,), "broken by a restart": (7,), "broken at the very end": (8,)}
NAMES = list(FEW)


def scripted(ss, H_adv, H_def):
    """A defence whose chains say what FEW and FRESH say, and which notes what it is asked."""
    class Scripted(ss.Defence):
        """evaluation: how many gradients were asked for. shown: each image as the attack last showed it."""
        evaluation = 0
        shown = {}
        attacked = []

        def gradient(self, x, y, H, whole=False):
            """An evaluation of the attack."""
            expect(H == H_adv, f"the attack's gradient takes {H} chains, not H_adv = {H_adv}")
            self.evaluation += 1
            logits = self.say(x, FEW)
            for i, image in zip(self.which(x), x):
                self.shown[i] = image.clone()
                self.attacked.append((self.evaluation, NAMES[i]))
            return logits, torch.ones_like(x)

        def logits(self, x, H):
            """Fresh chains."""
            expect(H == H_def, f"a verdict is by {H} chains; the last word have H_def = {H_def} fresh ones")
            for i, image in zip(self.which(x), x):
                same = not self.evaluation or torch.equal(self.shown[i], image)
                expect(same, "the verdict is about another image than the one that the attack's chains misread")
            said = self.say(x, FRESH)
            weak, strong = 1 - said, 4 * said  # four chains of nine outweigh the others in the mean
            return torch.stack([weak] * 3 + [strong] * 4 + [weak] * (H - 7))

        def which(self, x):
            """Whose images these are: each has a brightness of its own, which the attack changes a little."""
            return (x.flatten(1).mean(1) * 10).round().int().tolist()

        def say(self, x, table):
            """Logits [B, 2]: class 0, which is right, or class 1."""
            wrong = [self.evaluation in table[NAMES[i]] for i in self.which(x)]
            return F.one_hot(torch.tensor(wrong).long(), 2).float()

    Scripted.shown, Scripted.attacked = {}, []
    return Scripted(nn.Linear(1, 1), 1)


def verdict(ss, _):
    """stochastic_security-2: few chains suspect, fresh ones decide, and for good."""
    defence = scripted(ss, 2, 9)
    x = torch.arange(len(NAMES)).view(-1, 1, 1, 1).expand(-1, 1, 2, 2) / 10
    attack = ss.Attack(ss.LInf(0.02, 0.004), 3, 2, 9, 2)
    with tempfile.TemporaryDirectory() as folder:
        run = SimpleNamespace(seed=0, device=torch.device("cpu"), folder=Path(folder), smoke=False)
        outcome = ss.eot_attack(run, defence, x, torch.zeros(len(NAMES), dtype=torch.long), attack)
    record = {name: outcome.record[:, i].tolist() for i, name in enumerate(NAMES)}
    expect(len(outcome.record) == 9, f"two starts of 3 steps give 8 evaluations, and not {len(outcome.record) - 1}")
    expect(all(record["unlucky"]),
           "an image that the few chains of the attack misread by chance, and that the mean of fresh chains reads "
           "rightly, counts as broken: in N + 1 evaluations few chains have N + 1 chances to be wrong")
    expect(not any(record["misread before"]), "an image that was misread before the attack counts as right later")
    expect(not any(record["broken early"][2:]),
           "an image that fresh chains found broken at evaluation 2 is right again later: a row of the record must "
           "build on the row before it")
    expect(all(record["only few are right"]),
           "an image that the attack's own chains read rightly was given to fresh chains and broken by them: only what "
           "looks broken is judged again")
    for name, t in (("broken early", 2), ("broken by a restart", 7), ("broken at the very end", 8)):
        expect(record[name] == [True] * t + [False] * (9 - t),
               f"an image that both kinds of chains misread at evaluation {t} has the record {record[name]}")
    expect(all(record["sound"]), "an image that is never misread counts as broken")
    for t, name in defence.attacked:
        expect(record[name][t - 1],
               "the record is right, but an image that is broken goes on being attacked: Outcome.x must keep what "
               "broke it, and each further evaluation costs chains")
    left = torch.equal(outcome.robust, outcome.record[-1]) and torch.equal(outcome.natural, outcome.record[0])
    expect(left, "Outcome's natural and robust are not the first and the last row of its record")


def two_bugs(source):
    """The verdict of fresh chains is gone, and each evaluation starts from all images that were right at first."""
    source = swap(source, '''            if len(broken):  # fresh chains have the last word
                verdict = defence.predict(x[broken], attack.H_def)
                broken = broken[~defence.right(verdict, y[broken])]
''', "")
    return swap(source, "still = record[t - 1].clone()", "still = record[0].clone()")


# --- 3: the gradient of the attack ---

SHIFTS = torch.tensor([0.0, 0.6, -0.9])  # where the three chains of an image end
FACTORS = torch.tensor([2.0, 0.5, -1.0])  # derivatives of the chains


class Curved(nn.Module):
    """Three logits that are not linear in the image, so that each chain has a gradient of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        """[B, 1, 2, 2] -> [B, 3]."""
        x = x.flatten(1)
        return self.scale * torch.stack([x.square().mean(1), x[:, 0] * x[:, 3], x.sin().sum(1)], 1)


def defence_of(ss, f, chunk=250):
    """A Defence whose h-th chain of an image ends at image + SHIFTS[h], in whatever order the chains are asked for."""
    seen = {}

    def places(x):
        """Which chain of its image each row is."""
        found = []
        for row in x:
            key = tuple(row.flatten().tolist())
            seen[key] = seen.get(key, 0) + 1
            expect(seen[key] <= 3, "an image gets more than H chains")
            found.append(seen[key] - 1)
        return torch.tensor(found)

    def chain(x, steps):
        expect(steps == 7, f"chains run for {steps} steps, not for the defence's K = 7")
        return x.detach() + SHIFTS[places(x)].view(-1, 1, 1, 1)

    def path(x, steps):
        expect(steps == 7, f"chains run for {steps} steps, not for the defence's K = 7")
        index = places(x)
        return x.detach() + SHIFTS[index].view(-1, 1, 1, 1), FACTORS[index].view(-1, 1, 1, 1)

    def back(v, way):
        expect(len(v) == len(way),
               f"there are {len(way)} chains, and back() gets {len(v)} gradients: each chain's own way back comes "
               "before the sum over chains")
        return v.detach() * way

    return ss.Defence(f, 7, chain, path, back, chunk), seen


def by_hand(f, x, y):
    """Mean logits, the gradient of their loss at each chain's end [H, B, ...], and that of the mean of losses."""
    ends = torch.stack([x + shift for shift in SHIFTS]).requires_grad_(True)
    logits = f(ends.flatten(0, 1)).unflatten(0, (3, len(x)))
    loss = F.cross_entropy(logits.mean(0), y, reduction="sum")
    (at_ends,) = torch.autograd.grad(loss, ends, retain_graph=True)
    each = F.cross_entropy(logits.flatten(0, 1), y.repeat(3), reduction="sum") / 3
    (of_losses,) = torch.autograd.grad(each, ends)
    return logits.detach().mean(0), at_ends, of_losses


def same(a, b):
    """Equal up to rounding."""
    return torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def compare(found, true, of_losses, clean, which):
    """What is wrong with a gradient [B, ...]."""
    expect(not same(found, -true), f"{which}: the gradient points DOWN the loss; ascend() wants the direction up")
    expect(not any(same(found, factor * of_losses) for factor in (1, 3)),
           f"{which}: this is the gradient of the mean of the chains' losses; F_H is the mean of their logits")
    expect(not same(found, clean), f"{which}: the gradient of f is taken at the image, not at the ends of its chains")
    ratio = (found * true).sum() / true.square().sum()
    expect(same(found, true) or not same(found, ratio * true),
           f"{which}: the gradient is {ratio:.2f} times that of the summed losses of F_H; it is not normalised, and a mean "
           "over the batch or a second mean over chains, beside the one in F_H, makes it smaller")
    expect(same(found, true),
           f"{which}: this is not the gradient of the loss of F_H; does each chain's gradient go to the image that the "
           "chain began at, and each part's images have their own labels?")


def gradient(ss, _):
    """stochastic_security-3: BPDA and EOT, and the whole chain."""
    f = Curved()
    x = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.9, 0.1, 0.4, 0.2], [0.5, 0.8, 0.1, 0.7], [0.3, 0.6, 0.7, 0.05]])
    x, y = x.view(4, 1, 2, 2), torch.tensor([0, 2, 1, 2])
    F_H, at_ends, of_losses = by_hand(f, x, y)
    inside = x.clone().requires_grad_(True)
    (clean,) = torch.autograd.grad(F.cross_entropy(f(inside), y, reduction="sum"), inside)
    way = FACTORS.view(3, 1, 1, 1, 1)
    for whole, true, other, which in ((False, at_ends.sum(0), of_losses.sum(0), "BPDA"),
                                      (True, (at_ends * way).sum(0), (of_losses * way).sum(0), "whole chain")):
        for chunk in (250, 6, 2):
            defence, seen = defence_of(ss, f, chunk)
            result = defence.gradient(x.clone(), y, 3, whole)
            expect(isinstance(result, (tuple, list)) and len(result) == 2, "gradient must return two things: F_H, gradient")
            logits, found = result
            expect(found.shape == x.shape, f"{which}: for images {tuple(x.shape)} the gradient is {tuple(found.shape)}")
            expect(logits.shape == (4, 3), f"{which}: F_H of 4 images and 3 classes is {tuple(logits.shape)}")
            expect(set(seen.values()) == {3} and len(seen) == 4, f"{which}: not every image gets its H chains")
            expect(same(logits.detach(), F_H), f"{which}: F_H is not the mean of the logits of an image's H chains")
            expect(not whole or not same(found, at_ends.sum(0)),
                   "whole chain: the gradient stops at the chains' ends, as BPDA's does; with `whole` it goes back")
            compare(found, true, other, clean, which)
            expect(not logits.requires_grad and not found.requires_grad,
                   f"{which}: what is returned still hangs on the graph of f: N steps would keep N graphs in memory")
    expect(f.scale.grad is None, "f's parameters have a gradient now: ask for the gradient at the ends alone")
    expect(f.scale.requires_grad, "f's parameters can no longer learn: requires_grad is left off")
    defence, _ = defence_of(ss, f, 250)
    defence.loss = lambda F_H, y: 3 * F_H[:, 0].sum()  # what another defence climbs
    inside = x.clone().requires_grad_(True)
    climbed = defence.gradient(x.clone(), y, 3)[1]
    expect(not same(climbed, at_ends.sum(0)), "the loss is not asked of self.loss(F_H, y), which is what an attack climbs")
    F_1, found = ss.Defence(f).gradient(x, y, 3)  # no chain: K = 0
    expect(same(F_1, f(x)) and same(found, clean), "without chains (K = 0) the gradient is not that of f itself")


def without_gradient(source):
    """The body taken out."""
    return take_out(source, "Defence.gradient", "stochastic_security-3: Eq. 2.10")


# --- 4: an attack that looks strong ---


def turned(wide, narrow):
    """(V, weights -> loss) on images of two pixels: a Gaussian of spread 1 along `wide`, .1 along `narrow`."""
    wide, narrow = (F.normalize(torch.tensor(v), dim=0) for v in (wide, narrow))

    def V(x):
        along, across = (x.flatten(1) * wide).sum(1), (x.flatten(1) * narrow).sum(1)
        return (along.square() + (across / 0.1).square()) / 2
    return V


def rise(ss, V, w, ball):
    """How much an attack's step raises the loss -w . E[P(x)]: up BPDA's gradient, and up the whole chain's."""
    tau, steps = 0.1, 50
    x0, w = torch.full((1, 1, 1, 2), 0.5), torch.tensor(w).view(1, 1, 1, 2)
    _, way = ss.langevin_path(x0, steps, V, tau, 1.0)
    gradients = -w, ss.pull_back(-w, way, V, tau, 1.0)
    x = torch.cat([x0, *(ball.ascend(x0, x0, gradient) for gradient in gradients)])
    for _ in range(steps):
        x = ss.downhill(x, V, tau, 1.0)  # the mean of chains on a quadratic energy
    loss = -(w * x).flatten(1).sum(1)
    return (loss[1:] - loss[0]).tolist()


def judge(ss, answers):
    """stochastic_security-4: when BPDA's gradient is good enough, and when it points the wrong way."""
    straight, across = turned([0.0, 1.0], [1.0, 0.0]), turned([1.0, -2.0], [2.0, 1.0])
    cases = {
        "PIXELS_LINF": (straight, [1.0, 1.0], ss.LInf, "what does an l_inf step take from a gradient, and is that "
                        "different for the two gradients?"),
        "PIXELS_L2": (straight, [1.0, 1.0], ss.L2, "an l_2 step has one length for both pixels together; what becomes "
                      "of the part that goes into the pixel that the chain forgets?"),
        "TURNED_LINF": (across, [3.0, 1.0], ss.LInf, "split the step (sign of w) into its parts along both axes of the "
                        "energy; which part does the chain keep, and which sign has it beside that of w?")}
    ratios = {}
    for name, (V, w, Ball, hint) in cases.items():
        bpda, whole = rise(ss, V, w, Ball(0.1, 0.1))
        ratios[name] = bpda / whole
        word = "same" if bpda > 0.99 * whole else "weaker" if bpda > 0 else "backwards"
        said = str(answers[name]).strip().lower()
        expect(said in ("same", "weaker", "backwards"), f"{name}: '{said}' is none of same, weaker, backwards")
        expect(said == word, f"{name}: not {said}; {hint}")
    said = answers["SHARE_L2"]
    expect(abs(said - ratios["PIXELS_L2"]) < 0.02,
           f"SHARE_L2: not {said}; BPDA's step has the direction (1, 1) and the length of the other, which is (0, 1)")
    said = str(answers["MORE_CHAINS"]).strip().lower()
    expect(said in ("yes", "no"), f"MORE_CHAINS: '{said}' is neither yes nor no")
    expect(said == "no", "MORE_CHAINS: averaging takes off the noise of a gradient; would BPDA's be right without any "
                         "noise, in the mean of endless chains?")


EXERCISES = [
    Exercise("stochastic_security-1", unchanged, kept, {
        "WIDE": "share of a change that the mean of the chains keeps after 75 steps of tau .015, for sigma .3",
        "MIDDLE": "the same for sigma .1",
        "NARROW": "the same for sigma .03",
        "STEPS": "number of steps after which a tenth is left for sigma .1"}),
    Exercise("stochastic_security-2", two_bugs, verdict),
    Exercise("stochastic_security-3", without_gradient, gradient),
    Exercise("stochastic_security-4", unchanged, judge, {
        "PIXELS_LINF": "axes along the pixels: an l_inf step up BPDA's gradient raises the loss as much as one up the "
                       "whole chain's (same), less (weaker), or lowers it (backwards)",
        "PIXELS_L2": "same, weaker or backwards: axes along the pixels, an l_2 step",
        "TURNED_LINF": "same, weaker or backwards: axes turned, an l_inf step",
        "SHARE_L2": "in PIXELS_L2: rise of the loss by BPDA's step, divided by the rise by the whole chain's",
        "MORE_CHAINS": "in TURNED_LINF: does BPDA with 1,000 chains in place of 10 mend it (yes or no)"}),
]
