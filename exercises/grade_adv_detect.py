"""Graders of the exercises of adv_detect.py."""
import copy
import math

import torch
import torch.nn.functional as F
from kit import Exercise, expect, number, swap, take_out, unchanged
from torch import nn


def metrics(adv_detect, answers):
    """adv_detect-1: pairs are counted for an AUC, all attacked images for an FPR."""
    def close(name, number):
        return abs(answers[name] - number) < 0.005

    clean, attacked = torch.tensor([2.0, 1.0, 1.0]), torch.tensor([1.0, 0.0])
    expect(not close("TIES", 4 / 6), "TIES: four of six pairs are won, but two are ties, and a tie is half a pair")
    expect(not close("TIES", 1), "TIES: two of the six pairs are ties, and a tie is half a pair, not a whole one")
    expect(close("TIES", adv_detect.auroc(clean, attacked)),
           "TIES: not that; compare each clean logit with each attacked one, six pairs in all")
    clean, attacked = torch.tensor([20.0, 30.0]), torch.tensor([18.0, 25.0])
    expect(close("LOGITS", adv_detect.auroc(clean, attacked)),
           "LOGITS: not that; in how many of the four pairs is the clean one above?")
    expect(not close("SIGMOIDS", answers["LOGITS"]),
           "SIGMOIDS: the sigmoid keeps the order on paper, but what is sigmoid(18) as a float32?")
    expect(close("SIGMOIDS", adv_detect.auroc(clean.sigmoid(), attacked.sigmoid())),
           "SIGMOIDS: not that; print the four sigmoids as float32 and count ties as half")
    expect(not close("T", 3.0), "T: with that threshold two of four clean images are accepted, a share of .5")
    expect(close("T", adv_detect.threshold(torch.tensor([5.0, 3.0, 2.0, -1.0]), 0.75)),
           "T: not that; the largest threshold that accepts three of the four clean images, rightly read or not")
    expect(not close("FPR", 2 / 4), "FPR: that is a share of the misread images; Eq. 3.29 divides by ALL attacked ones")
    expect(not close("FPR", 3 / 5), "FPR: an attacked image that is accepted and rightly read is no false positive")
    expect(not close("FPR", 1 / 5), "FPR: an image whose logit equals T is accepted: z >= T")
    expect(close("FPR", 2 / 5), "FPR: not that; count attacked images that are misread AND accepted, and divide by all")


def projection(adv_detect, _):
    """adv_detect-2: the box, then the ball."""
    def project(x, x0, norm, eps):
        before = x.clone(), x0.clone()
        end = adv_detect.project(x, x0, adv_detect.Steps(norm, eps, 1, 0.1))
        expect(end is not None, f"norm {norm}: project gives None: is a `return` missing?")
        expect(isinstance(end, torch.Tensor) and end.shape == x.shape, "project must give images of the shape it gets")
        expect(torch.equal(x, before[0]) and torch.equal(x0, before[1]), "project must not change x or x0 in place")
        expect(end.isfinite().all(), f"norm {norm}: an image that is at x0 becomes nan: what is 0 divided by?")
        return end

    grey = torch.full((3, 2, 2, 2, 2), 0.5)  # [K, n, C, S, S]
    way = torch.zeros_like(grey)
    for k in range(3):
        for n in range(2):
            way[k, n] = 0.05 * (2 * k + n) * torch.tensor([[[1.0, -0.5], [0.8, 0.3]], [[-0.6, 1.0], [0.0, -0.9]]])
    lengths = way.square().sum((2, 3, 4)).sqrt()
    for norm, name in (("inf", "l_inf"), ("2", "l_2")):
        expect(torch.allclose(project(grey, grey, norm, 0.2), grey), f"{name}: x0 itself must stay where it is")
        end = project(grey + way, grey, norm, 10.0)
        expect(torch.allclose(end, grey + way, atol=1e-5),
               f"{name}: images inside of the ball and of the box must stay where they are")
        out = torch.full((2, 1, 1, 2), 0.9)
        end = project(out + torch.tensor([0.5, -1.5]), out, norm, 10.0)
        expect(end.min() >= -1e-6 and end.max() <= 1 + 1e-6, f"{name}: an image is left outside of [0, 1]")
    end = project(grey + way, grey, "inf", 0.12)
    expect((end - grey).abs().max() < 0.1201, "l_inf: a pixel is left farther than eps from its place in x0")
    expect(torch.allclose(end - grey, way.clamp(-0.12, 0.12), atol=1e-5),
           "l_inf: each pixel of x - x0 is to be cut at -eps and eps, by itself")
    end = project(grey + way, grey, "2", 0.3) - grey
    reached = end.square().sum((2, 3, 4)).sqrt()
    expect(reached.max() < 0.3001, f"l_2: an image is left {reached.max():.3f} away from x0, with eps = 0.3")
    expect(torch.allclose(reached, lengths.clamp(max=0.3), atol=1e-4),
           "l_2: images far away must end on the sphere, those inside stay; each image has its own length, over "
           "channels and pixels, whatever dimensions come before")
    shorter = (0.3 / lengths.clamp(min=0.3))[..., None, None, None]
    expect(torch.allclose(end, way * shorter, atol=1e-4), "l_2: the way from x0 must keep its direction")
    one = project((grey + way)[2], grey[2], "2", 0.3)
    expect(torch.allclose(one - grey[2], end[2], atol=1e-5),
           "l_2: images [n, C, S, S] end elsewhere than the same ones as [K, n, C, S, S]")
    x0, x = torch.tensor([[[[0.0, 0.5]]]]), torch.tensor([[[[-0.3, 0.9]]]])
    end = project(x, x0, "2", 0.4).flatten()
    expect(abs(end[0]) < 1e-4 and abs(end[1] - 0.9) < 1e-4,
           f"l_2: from x0 = (0, 0.5), x = (-0.3, 0.9) with eps = 0.4 ends at ({end[0]:.3f}, {end[1]:.3f}), not (0, 0.9): "
           "the box comes first, so that what it cuts off takes nothing from the ball")


def weights(net):
    """The different numbers among a network's weights."""
    return {number for p in net.parameters() for number in p.flatten().tolist()}


def best_weights(adv_detect, _):
    """adv_detect-3: what is kept must not change with what is trained."""
    nets = [nn.Linear(2, 1) for _ in range(3)]
    H = adv_detect.Detectors(nets)
    best = copy.deepcopy(H)
    best_auc = torch.zeros(3)
    clean = torch.tensor([[1.0, 3.0], [1.0, 3.0], [1.0, 3.0]])

    def validated(weight, attacked):
        """The three detectors get this weight, and these logits of two attacked images each."""
        with torch.no_grad():
            for p in H.parameters():
                p.fill_(weight)
        adv_detect.keep_better(best, best_auc, H, (clean, torch.tensor(attacked)))
        expect(all(mine is net for mine, net in zip(H.nets, nets)),
               "the networks of H are exchanged: the optimiser goes on with the parameters that it was given")
        expect(weights(H) == {weight}, "the weights of H are changed: training goes on with them")
        return [weights(net) for net in best.nets]

    validated(1.0, [[0.0, 2.0], [0.0, 2.0], [0.0, 2.0]])  # AUC .75 each
    with torch.no_grad():
        for p in H.parameters():
            p.fill_(2.0)
    expect(weights(best) != {2.0},
           "an update after the validation changes what was kept: `best` holds H's own tensors, not a copy")
    expect(weights(best) == {1.0}, "after the first validation `best` must hold the weights that H has then")
    expect(torch.allclose(best_auc, torch.tensor(0.75)), "best_auc is to hold the AUC of each detector, in place")
    kept = validated(3.0, [[0.0, 0.0], [2.0, 2.0], [0.0, 2.0]])  # AUC 1, .5, .75
    expect(kept[1] != {3.0}, "a detector that became worse is kept: what it was at its best is lost")
    expect(kept[1] == {1.0}, "a detector that became worse must keep its weights in `best`")
    expect(kept[0] == {3.0}, "a detector that became better is not kept: each is judged by its own AUC alone")
    expect(kept[2] == {3.0}, "with an AUC as good as the best one so far the later weights count (\"at least\")")
    expect(torch.allclose(best_auc, torch.tensor([1.0, 0.75, 0.75])), "best_auc must hold the best AUC so far of each")
    kept = validated(4.0, [[0.0, 2.0], [0.0, 2.0], [9.0, 9.0]])  # AUC .75, .75, 0
    expect(kept == [{3.0}, {4.0}, {3.0}],
           "after a third validation `best` holds weights that the AUCs so far do not explain: is best_auc up to date?")


def first_step(adv_detect, loss, offset, adam):
    """How far one step of .01 moves a pixel, where the logit is offset + the pixel's change."""
    x0 = torch.full((1, 1, 1, 1, 1), 0.5)

    def of_pixel(x):
        return loss(offset + (x - 0.5).sum((-3, -2, -1)))

    a = adv_detect.Steps("inf", 0.3, 1, 0.01, adam)
    return (adv_detect.minimise(of_pixel, x0, a, x0) - x0).item()


def claim(adv_detect, answers):
    """adv_detect-4: an attack without a gradient finds nothing, however many steps it has."""
    def right(name, true, tolerance=0.1):
        return abs(number(answers, name) - true) <= tolerance * true + 1e-12

    for name in ("ADAM_Z", "ADAM_L", "SIGN_L"):
        expect(0 <= number(answers, name) < 0.4, f"{name}: a distance is asked for, how far the pixel moves, not where it is")
    up_z, up_L = lambda z: -z, lambda z: -F.softplus(z)  # noqa: E731
    expect(right("ADAM_Z", first_step(adv_detect, up_z, -25.0, True)),
           "ADAM_Z: not that; at t = 1 the corrected m is the gradient and the corrected v is its square")
    expect(number(answers, "ADAM_L") != 0, "ADAM_L: little, but not 0: float32 knows numbers like sigmoid(-25)")
    expect(not math.isclose(number(answers, "ADAM_L"), 0.01, rel_tol=0.3),
           "ADAM_L: Adam ignores the scale of a gradient only while it is far above the 1e-8 in its denominator; how "
           "large is the slope of L here?")
    expect(right("ADAM_L", first_step(adv_detect, up_L, -25.0, True)),
           "ADAM_L: not that, to two digits; how large is the slope of L, and what does Adam divide it by?")
    expect(right("SIGN_L", first_step(adv_detect, up_L, -25.0, False)),
           "SIGN_L: not that; a sign is 1 for however small a number above 0")
    expect(right("SIGN_SURE", first_step(adv_detect, up_L, -120.0, False)),
           "SIGN_SURE: not that; what is e^-120 as a float32, and what is the sign of it?")
    verdict = str(answers["VERDICT"]).strip().lower()
    expect(verdict in ("robust", "blind", "miscounted"), f"VERDICT: {verdict!r} is none of the three words")
    expect(verdict != "miscounted", "VERDICT: the AUC is counted rightly; look at the images that it is counted on")
    expect(verdict == "blind",
           "VERDICT: by your numbers, how far is a pixel after 200 such steps, and how far may it go? An attack that "
           "does not move shows nothing about a detector")
    change = str(answers["REPAIR"]).strip().lower()
    expect(change in ("steps", "starts", "signs", "logit"), f"REPAIR: {change!r} is none of the four words")
    expect(change != "signs", "REPAIR: signs help at -25, but see your own SIGN_SURE")
    expect(change != "steps", "REPAIR: ten times next to nothing is next to nothing, and ten times 0 is 0")
    expect(change == "logit", "REPAIR: from a random start the logit is as low, and the slope as small, as before")


def same_network(source):
    """What is kept as the best is the network that training goes on with."""
    return swap(source, "best.nets[k].load_state_dict(H.nets[k].state_dict())", "best.nets[k] = H.nets[k]")


EXERCISES = [
    Exercise("adv_detect-1", unchanged, metrics, {
        "TIES": "AUC of clean logits 2, 1, 1 and attacked ones 1, 0",
        "LOGITS": "AUC of clean logits 20, 30 and attacked ones 18, 25",
        "SIGMOIDS": "the same if sigmoid(z), as a float32, is the score in place of z",
        "T": "threshold of TPR .75 for clean images of logits 5, 3, 2, -1, the second of which is misread",
        "FPR": "FPR at T = 2 of five attacked images: logits 4, 2, 1, 0 misread, logit 6 rightly read"}),
    Exercise("adv_detect-2", lambda source: take_out(source, "project", "adv_detect-2: box, then ball"), projection),
    Exercise("adv_detect-3", same_network, best_weights),
    Exercise("adv_detect-4", unchanged, claim, {
        "ADAM_Z": "how far the first Adam step, .01, moves the pixel up z, at z = -25",
        "ADAM_L": "the same up L(z, 0) = log(1 + e^z), at z = -25 (two digits)",
        "SIGN_L": "the same with sign steps in place of Adam, up L, at z = -25",
        "SIGN_SURE": "sign steps up L at z = -120, in float32",
        "VERDICT": "what the AUC of 1.00 shows: \"robust\", \"blind\" or \"miscounted\"",
        "REPAIR": "what lets the attack move at -25 and at -120: \"steps\", \"starts\", \"signs\" or \"logit\""}),
]
