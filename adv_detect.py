r"""Detecting adversarial examples with one robust detector for each class.

Source: Yin 2022, "Generative Modeling With Adversarial Training", section 3.2 ("the dissertation").

The idea. An image that a classifier reads as class k is either of class k, or of another class and attacked.
So train for every class k a binary detector d_k to tell clean images of k from ATTACKED images of all others,
and attack d_k itself while it learns: what its attacker finds is what it learns to refuse. An image is
accepted if the detector of its predicted class says so. The logit of d_k turns out to rank images of class k
so well that no classifier is needed: the class with the highest logit is the prediction, and the same logit
decides.

    z_k(x) logit of d_k, HIGH = clean and of class k. Pixels in [0, 1]; eps and steps too. Classes are counted
    from 0 in code: the source's d_1, d_2 are the detectors of classes 0 and 1

    (3.23)   min E_{y != k} [max_{|delta| <= eps} L(z_k(x + delta), 0)] + E_{y = k} [L(z_k(x), 1)]
             L: logistic loss. The attacker climbs z_k. An update: 32 images of k, 32 attacked others
    (3.31)   z_H(x) = (z_1(x), ..., z_K(x));   (3.27)   H(x) = argmax_k z_H(x)_k
    Integrated detection: k = f(x), accepted if z_H(x)_k >= T. Generative detection: the same with k = H(x)
    (3.28)   TPR: share of CLEAN images that are accepted, rightly read or not
    (3.29)   FPR: share of ALL attacked images that are misread AND accepted; one T for all classes
    Attacks, untargeted, minimise a loss of x' = x + delta by PGD from the image itself:
    (3.30)   classifier: z_f(x')_y - max_{i != y} z_f(x')_i
    (3.32)   detector: -max_{i != y} z_H(x')_i. Also the adaptive attack on generative detection
    (3.34)   combined: max(z_f(x')_y, (1 - max_{j != y} z_H(x')_j) max_j z_f(x')_j) - max_{i != y} z_f(x')_i
    (3.35)   combined: (3.30) while f reads x' as y, else (3.32); decided anew at every step, by image
    joint    not in the source: -max_{i != y} min(z_f(x')_i - z_f(x')_y, z_H(x')_i)
    AUC of d_k: probability that a clean image of class k scores above an attacked other one; ties one half

The K detectors are one network: their layers stand side by side, a convolution of K networks being one
convolution in K groups (common.side_by_side). Nothing passes between them: each learns what it would alone.

Commands (measured times and numbers stand in README.md and results/):
    python adv_detect.py                               rendered digits, nothing to download
    python adv_detect.py --only table3.4 --models all  the four models of Tab. 3.1 under each other's attacks
    python adv_detect.py --only untuned                attacks that nothing here was tuned against
    python adv_detect.py --dataset mnist               the l_inf .3 model; --models all for all four
    python adv_detect.py --dataset cifar10             one GPU; --list: all experiments

How to read the log (log-MODEL.csv): loss of Eq. 3.23, log 2 = .693 at the start; auc and worst: AUC in the
batch, mean and worst detector; z_pos, z_neg: logits of clean and of attacked images.

Differs from the source:
  - The attacker climbs the logit, not the loss: the same maximum, and a sure detector's gradient is not lost.
  - 32 + 32 images of each detector in every update (code: what a shuffled batch of 320 happens to hold).
  - CIFAR-10: the best weights are chosen on a validation split, as for MNIST (code: on test images), and AUCs
    go by label (code: by what f predicts). Radii are in [0, 1]: l_inf 8 there is 8/255 here.
  - Eq. 3.34's first maximum is over {y, K + 1}, as in the code: over all classes, the loss is flat once f is
    fooled. FPR counts float logits with >= (code: cut to whole numbers, >).
  - Smallest perturbations (Tab. 3.6) follow the code, as the text has one sentence. One rule of success for
    all data sets: misread and accepted. Each detector is the target of as many images of other classes.
  - f and the robust softmax classifier: Adam, one cycle to 1e-3 (source: 5e-4); CIFAR-10: SGD, crops of
    pad 4, drops at 40 and 60 %. linf2's training attack is nowhere said: that of its evaluation.
  - quick budgets attack in fewer, longer steps in training (--train-steps), and use fewer images, the fewest
    for 2,000 steps and for restarts; n is stated. Glyphs are not in the source.
  - Updates and attack gradients in bfloat16 where the processor has units for it, reported scores always in
    float32: bfloat16 logits tie, and an AUC of .9995 would be made of ties.
"""
import contextlib
import copy
import dataclasses
import functools
import math
import time
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import common
from common import Experiment, Run, UserError, fast_precision, load_images, rate

# --- settings -----------------------------------------------------------------------------------------------


class Attack(NamedTuple):
    """A PGD attack; eps and step in [0, 1] units."""
    norm: str                    # inf or 2
    eps: float
    steps: int
    step: float
    adam: bool = True            # Adam on delta, else signs (inf) or normalised gradients (2)
    box_first: bool = True       # the box [0, 1] before the ball; CIFAR-10: behind it

    def within(self, steps):
        """In this many steps (0: as it is). l_inf: as long altogether; an l_2 step is as long as before."""
        longer = self.steps / steps if steps and self.norm == "inf" else 1
        return self._replace(steps=steps or self.steps, step=self.step * longer)


def plain(norm, eps, steps, step):
    """An attack on CIFAR-10, whose source counts pixels from 0 to 255."""
    return Attack(norm, eps / 255, steps, step / 255, adam=False, box_first=False)


GREY = {"models": {  # name: attack in training, in validation. Tab. 3.1
            "linf0.3": (Attack("inf", 0.3, 100, 0.01), Attack("inf", 0.3, 200, 0.01)),
            "linf0.5": (Attack("inf", 0.5, 100, 0.01), Attack("inf", 0.5, 200, 0.01)),
            "l2-2.5": (Attack("2", 2.5, 100, 0.1), Attack("2", 2.5, 200, 0.1)),
            "l2-5.0": (Attack("2", 5.0, 200, 0.1), Attack("2", 5.0, 200, 0.1))},
        "figure3.2": Attack("inf", 0.3, 100, 0.1),                              # Adam; so long in the code
        "figure3.3": Attack("inf", 0.4, 100, 0.01),
        "figure3.6": Attack("2", 15, 60, 0.25, adam=False),  # CIFAR-10's, by the root of the number of pixels
        "table3.6": Attack("2", math.inf, 500, 0.1), "c_max": 8.0,  # code until 2020; then 1000 x 1
        "robust": Attack("inf", 0.3, 40, 0.01, adam=False)}
COLOUR = {"models": {
              "linf8": (plain("inf", 8, 40, 0.5), plain("inf", 8, 40, 0.5)),    # sec. 3.2.3
              "l2-80": (plain("2", 80, 20, 10), plain("2", 80, 20, 10)),
              "linf2": (plain("inf", 2, 10, 0.5), plain("inf", 2, 10, 0.5))},   # Tab. 3.10
          "figure3.2": plain("inf", 8, 20, 2), "figure3.3": plain("inf", 12, 30, 2),
          "figure3.6": plain("2", 30 * 255, 60, 0.5 * 255),
          "table3.6": plain("2", math.inf, 100, 25.6), "c_max": 255.0 ** 2,     # 1 where pixels go to 255
          "robust": plain("inf", 8, 7, 2)}


@dataclasses.dataclass
class Settings:
    """Everything that can be set; each field is also a flag. Defaults: MNIST, full size."""
    net: str = "mnist_cnn"       # of detectors and classifiers: mnist_cnn, madry_wrn
    width: float = 1.0           # multiplies its channels
    models: str = "all"          # of Tab. 3.1, with commas: linf0.3,l2-2.5 (CIFAR-10: linf8,l2-80,linf2)
    updates: int = 15_600        # of the detectors; 100 epochs
    batch: int = 32              # images of its class, and as many attacked ones, for each detector
    lr: float = 5e-4             # of Adam; fine-tuning: of SGD
    finetune: int = 0            # 1: detectors start as the classifier's logits, BatchNorm frozen, SGD
    train_steps: int = 0         # steps of attacks in training, 0: as the source has it (Attack.within)
    check_steps: int = 0         # the same for attacks in validation and evaluation
    augment: str = "none"        # crop_flip: pad 2, crop, flip
    val_images: int = 8000       # attacked validation images of each detector
    val_every: int = 1560        # updates from one validation to the next
    f_iters: int = 18_750        # updates of the classifier f; 10 epochs of batch 32
    f_sgd: float = 0.0           # rate of SGD; 0: Adam
    f_batch: int = 32
    at_iters: int = 30_000       # updates of the robust softmax classifier
    at_batch: int = 50
    at_steps: int = 0            # of its attack, like train_steps
    images: int = 10_000         # test images that are attacked; 20 times as many clean ones give thresholds
    long: int = 10_000           # of them under attacks of more than 500 steps, and with restarts
    restarts: int = 50           # Tab. 3.5
    pairs: int = 10_000          # of an image and a target, for the smallest perturbations (Tab. 3.6)
    rounds: int = 20             # of bisection
    search_steps: int = 0        # of one round, like train_steps
    chunk: int = 500             # images (of each detector) that are attacked as one batch

    def __post_init__(self):
        common.at_least(1, self, *"updates batch val_images val_every f_iters f_batch at_iters images long "
                        "restarts pairs rounds chunk".split())
        if self.augment not in ("none", "crop_flip") or self.finetune not in (0, 1):
            raise UserError("--augment is none or crop_flip, --finetune 0 or 1")
        self.long = min(self.long, self.images)


new, PAPER = dataclasses.replace, Settings()
GLYPHS = new(PAPER, width=0.25, models="linf0.3", updates=750, batch=16, train_steps=20, val_images=60,
             val_every=150, f_iters=400, at_iters=4000, at_steps=10, images=500, long=200, restarts=10,
             pairs=200, rounds=10, search_steps=200)
MNIST = new(PAPER, models="linf0.3", updates=1200, train_steps=20, val_images=100, val_every=300,
            f_iters=2000, at_iters=1500, at_steps=10, images=500, long=200, restarts=10, pairs=200,
            rounds=10, search_steps=300)
CIFAR = new(PAPER, net="madry_wrn", updates=40_000, batch=30, lr=1e-3, finetune=1, augment="crop_flip",
            val_every=500, val_images=1000, f_iters=80_000, f_sgd=0.1, f_batch=128, at_iters=80_000,
            at_batch=128, restarts=10, chunk=100)
CIFAR_QUICK = new(CIFAR, width=0.25, models="linf8,l2-80", updates=300, train_steps=10, val_images=100,
                  val_every=100, f_iters=6000, at_iters=3000, images=1000, long=300, pairs=200, rounds=10)


def at_each_budget(quick, paper):
    """The three budgets of a data set."""
    tiny = dict(width=0.1, updates=3, batch=2, train_steps=2, check_steps=2, val_images=4, val_every=2,
                f_iters=3, f_batch=8, at_iters=2, at_steps=1, images=12, long=6, restarts=2, pairs=10,
                rounds=2, search_steps=3, chunk=7)
    return {"smoke": new(quick, **tiny), "quick": quick, "paper": paper}


SETTINGS = {"glyphs": at_each_budget(GLYPHS, new(PAPER, updates=5000)), "mnist": at_each_budget(MNIST, PAPER),
            "fashion_mnist": at_each_budget(MNIST, PAPER), "cifar10": at_each_budget(CIFAR_QUICK, CIFAR)}
OF_TRAINING = "net width updates batch lr finetune augment val_images val_every".split()

# --- the detectors ------------------------------------------------------------------------------------------


class Detectors(nn.Module):
    """K networks with one output each, side by side: z_H of Eq. 3.31."""

    def __init__(self, nets):
        super().__init__()
        self.K, self.nets = len(nets), common.side_by_side(nets)

    def forward(self, x):
        """Every detector on every image: [n, C, S, S] -> [n, K]."""
        return self.nets(x.repeat(1, self.K, 1, 1))

    def each(self, x):
        """Each detector on images of its own: [K, n, C, S, S] -> [K, n]."""
        return self.nets(x.transpose(0, 1).flatten(1, 2)).T


# --- the attack ---------------------------------------------------------------------------------------------

IMAGE = (-3, -2, -1)


def length(x):
    """l_2 length of each image [..., C, S, S] -> [..., 1, 1, 1]."""
    return torch.linalg.vector_norm(x, dim=IMAGE, keepdim=True)


def project(x, x0, norm, eps, box_first=True):
    """x [..., C, S, S] back into the box [0, 1] and the ball of radius eps around x0."""
    if box_first:
        x = x.clamp(0, 1)
    if norm == "inf":
        x = torch.minimum(torch.maximum(x, x0 - eps), x0 + eps)
    elif eps < math.inf:
        x = x0 + (x - x0) * (eps / length(x - x0).clamp(min=max(eps, 1e-12)))
    return x if box_first else x.clamp(0, 1)


def scattered(x0, norm, eps):
    """Random start of training and restarts, not clipped to the box: uniform in the cube (inf); a random
    direction, its length uniform in [0, eps] (2)."""
    if norm == "inf":
        return x0 + eps * (2 * torch.rand_like(x0) - 1)
    direction = torch.randn_like(x0)
    return x0 + direction / length(direction) * eps * torch.rand_like(x0[..., :1, :1, :1])


def minimise(loss, x0, a, start=None, fast=True):
    """PGD: images near x0 [..., C, S, S] whose loss(x) [...] is low; the last of a.steps steps from `start`
    (default: x0). Adam's state is fresh in every call. A plain step with a zero gradient moves nothing.
    fast: gradients in bfloat16 where the processor has units for it.
    """
    if x0.min() < 0 or x0.max() > 1:
        raise ValueError(f"an attack wants images in [0, 1]; got [{x0.min():.3g}, {x0.max():.3g}]")
    x, m, v = (x0 if start is None else start).detach(), 0.0, 0.0
    with torch.enable_grad(), fast_precision(x0.device) if fast else contextlib.nullcontext():
        for t in range(1, a.steps + 1):
            x.requires_grad_(True)
            gradient, = torch.autograd.grad(loss(x).float().sum(), x)
            if a.adam:
                m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient.square()
                move = m / (1 - 0.9 ** t) / ((v / (1 - 0.999 ** t)).sqrt() + 1e-8)
            else:
                move = gradient.sign() if a.norm == "inf" else gradient / length(gradient).clamp(min=1e-30)
            x = project(x.detach() - a.step * move, x0, a.norm, a.eps, a.box_first)
    return x.detach()


def best_other(z, y):
    """Largest logit of a class other than y: [n, K], [n] -> [n]."""
    return z.scatter(1, y[:, None], -math.inf).amax(1)


def own_logit(z, y):
    """Logit of class y: [n, K], [n] -> [n]."""
    return z.gather(1, y[:, None])[:, 0]


def classifier_loss(z_f, z_H, y):
    """Eq. 3.30: negative once f is fooled. Logits [n, K], labels [n] -> [n]; likewise below."""
    return own_logit(z_f, y) - best_other(z_f, y)


def detector_loss(z_f, z_H, y):
    """Eq. 3.32: makes the detector of some wrong class sure. Does not look at f."""
    return -best_other(z_H, y)


def combined_loss(z_f, z_H, y):
    """Eq. 3.33, 3.34; first maximum over {y, K + 1}."""
    rejected = (1 - best_other(z_H, y)) * z_f.amax(1)                           # z_g of class K + 1
    return torch.maximum(own_logit(z_f, y), rejected) - best_other(z_f, y)


def switching_loss(z_f, z_H, y):
    """Eq. 3.35: fool f first, then the detector. The choice carries no gradient."""
    fooled = own_logit(z_f, y).detach() < best_other(z_f, y).detach()
    return torch.where(fooled, detector_loss(z_f, z_H, y), classifier_loss(z_f, z_H, y))


def joint_loss(z_f, z_H, y):
    """Not in the source: a class that f prefers to y and whose detector is sure; the lesser counts."""
    return -best_other(torch.minimum(z_f - own_logit(z_f, y)[:, None], z_H), y)


ATTACKS = {"classifier (3.30)": classifier_loss, "detector (3.32)": detector_loss,
           "combined (3.34)": combined_loss, "combined (3.35)": switching_loss, "joint": joint_loss}

# --- training: Eq. 3.23 -------------------------------------------------------------------------------------


def robust_loss(z_pos, z_neg):
    """Eq. 3.23 of each detector: logits of clean and attacked images [K, n] -> [K]; mean of 2n terms."""
    return (F.softplus(-z_pos).mean(1) + F.softplus(z_neg).mean(1)) / 2


def train_step(H, optimizer, x_pos, x_neg, a):
    """An update of each detector of H with its own images [K, n, C, S, S] -> logits [2, K, n], losses [K].

    Losses are added, not averaged, over detectors: each gets the gradient that it would get alone.
    """
    x_adv = minimise(lambda x: -H.each(x), x_neg, a, scattered(x_neg, a.norm, a.eps))
    with fast_precision(x_pos.device):
        z_pos, z_neg = H.each(torch.cat([x_pos, x_adv], 1)).float().chunk(2, 1)
    losses = robust_loss(z_pos, z_neg)
    optimizer.zero_grad(set_to_none=True)
    losses.sum().backward()
    optimizer.step()
    return torch.stack([z_pos, z_neg]).detach(), losses.detach()


def new_detectors(lab):
    """Untrained detectors and their optimiser; fine-tuned ones start as the classifier's logits."""
    s, device = lab.s, lab.run.device
    nets = [common.make_net(s.net, 1, lab.data.shape, s.width) for _ in range(lab.classes)]
    if s.finetune:
        for k, net in enumerate(nets):
            weights = {key: v.clone() for key, v in lab.f.state_dict().items()}
            weights |= {key: weights[key][k:k + 1] for key in ("head.weight", "head.bias")}
            net.load_state_dict(weights)
    H = Detectors(nets).to(device, memory_format=torch.channels_last).eval()  # BatchNorm frozen, for good
    if not s.finetune:
        return H, torch.optim.Adam(H.parameters(), s.lr, fused=True)
    matrices = [p for name, p in H.named_parameters() if p.dim() > 1]
    others = [p for name, p in H.named_parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 2e-4}, {"params": others}]
    return H, torch.optim.SGD(groups, s.lr, momentum=0.9)


@common.own_randomness
def train_detectors(lab, model):
    """The K detectors of a row of Tab. 3.1, each with the weights of its best validation AUC."""
    s, run = lab.s, lab.run
    H, optimizer = new_detectors(lab)
    a, check = lab.attacks(model)
    best, best_auc = copy.deepcopy(H), torch.zeros(H.K)
    made_with = {k: getattr(s, k) for k in OF_TRAINING}
    made_with |= {"model": model, "attacks": [list(a), list(check)], "seed": run.args.seed,
                  "f": [s.f_iters, s.f_batch, s.f_sgd] if s.finetune else "none",
                  "budget": run.args.budget, "data": [len(lab.data), *lab.data.shape]}
    for it, row in common.updates(run, model, s.updates, made_with, {
            "H": H, "optimizer": optimizer, "best": best, "best_auc": best_auc},
            ("loss", "auc", "worst", "z_pos", "z_neg"), max(s.val_every // 4, 1), s.val_every):
        x_pos, x_neg = lab.draw(it - 1)
        z, losses = train_step(H, optimizer, x_pos, x_neg, a)
        aucs = [auroc(*pair) for pair in z.transpose(0, 1)]
        row |= {"loss": losses.mean().item(), "auc": sum(aucs) / H.K, "worst": min(aucs),
                "z_pos": z[0].mean().item(), "z_neg": z[1].mean().item()}
        if it % s.val_every == 0 or it == s.updates:
            found = lab.auc(H, check, range(H.K), s.val_images, "validation")[0]
            for k in range(H.K):
                if found[k] >= best_auc[k]:                                     # of equals the later one
                    best_auc[k] = found[k]
                    for mine, its in zip(best.state_dict().values(), H.state_dict().values()):
                        if mine.dim():
                            mine.chunk(H.K)[k].copy_(its.chunk(H.K)[k])
            print(f"  validation AUC: mean {sum(found) / H.K:.5f}, worst {min(found):.5f}", flush=True)
    return best, best_auc


# --- metrics ------------------------------------------------------------------------------------------------


def auroc(positive, negative):
    """Probability that an in-distribution score [P] ranks above an out-distribution one [N]; ties: half."""
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive)
    up_to = torch.searchsorted(ordered, positive, right=True)
    return (below + up_to).sum().item() / 2 / len(positive) / len(negative)


def threshold(z, tpr):
    """The largest T that accepts (z >= T) at least this share of the logits z [n] of clean images."""
    return z.sort(descending=True).values[math.ceil(tpr * len(z)) - 1].item()


def detection_rates(z_clean, z_adv, misread, T):
    """Eq. 3.28, 3.29 at thresholds T [m]: logits of clean [n], attacked [N] images -> TPR [m], FPR [m]."""
    below = [torch.searchsorted(z.sort().values, T) for z in (z_clean, z_adv[misread])]  # z < T
    return 1 - below[0] / len(z_clean), (int(misread.sum()) - below[1]) / len(z_adv)


@torch.no_grad()
def logits(net, x):
    """A network's outputs for images [n, C, S, S] in float32, in batches of 250."""
    return torch.cat([net(part) for part in x.split(250)])


def smallest_perturbation(z, broken, x0, a, rounds, c_max):
    """l_2 length of the shortest delta found, inf where none: x0 [..., C, S, S] -> [...].

    Minimises -z(x) + c |delta|^2; bisects c for each image: larger after a success, starting at 0.
    broken(x) -> bool [...]: what counts as success.
    """
    low, c = torch.zeros(x0.shape[:-3], device=x0.device), torch.zeros(x0.shape[:-3], device=x0.device)
    high, best = torch.full_like(low, c_max), torch.full_like(low, math.inf)
    for _ in range(rounds):
        x = minimise(lambda x: c * (x - x0).square().sum(IMAGE) - z(x), x0, a)
        success, size = broken(x), length(x - x0)[..., 0, 0, 0]
        best = torch.where(success, torch.minimum(best, size), best)
        low, high = torch.where(success, c, low), torch.where(success, high, c)
        c = (low + high) / 2
    return best


# --- attacks that nothing was tuned against -----------------------------------------------------------------


def apgd(loss, x0, a):
    """Auto-PGD (Croce and Hein 2020): the best of a.steps images; chooses its own steps, a.step is not used.

    x0 [..., C, S, S]. Momentum 3/4. The step starts at 2 eps; at checkpoints it is halved, and the search
    goes back to the best image, where the loss fell too rarely, or neither it nor the step changed.
    """
    x, moved, fell, before = x0, torch.zeros_like(x0), 0.0, None
    step = torch.full_like(x0[..., :1, :1, :1], 2 * a.eps)
    period = at = max(round(0.22 * a.steps), 1)
    with torch.enable_grad():
        for t in range(a.steps):
            x = x.detach().requires_grad_(True)
            value = loss(x)
            gradient, = torch.autograd.grad(value.sum(), x)
            x, value = x.detach(), value.detach()[..., None, None, None]
            if t == 0:
                best, best_x, best_gradient, last = value, x, gradient, (value, step)
            else:
                fell = fell + (value < before)
                better = value < best
                best, best_x = torch.where(better, value, best), torch.where(better, x, best_x)
                best_gradient = torch.where(better, gradient, best_gradient)
            before = value
            if t == at:
                stuck = (fell <= 0.75 * period) | ((step == last[1]) & (best >= last[0]))
                last, fell = (best, step), 0.0
                step = torch.where(stuck, step / 2, step)
                x, gradient = torch.where(stuck, best_x, x), torch.where(stuck, best_gradient, gradient)
                period = max(period - round(0.03 * a.steps), round(0.06 * a.steps), 1)
                at += period
            way = gradient.sign() if a.norm == "inf" else gradient / length(gradient).clamp(min=1e-30)
            z = project(x - step * way, x0, a.norm, a.eps)
            push = 0.75 if t else 1.0
            z = project(x + push * (z - x) + (1 - push) * moved, x0, a.norm, a.eps)
            x, moved = z, z - x
    return best_x


@torch.no_grad()
def random_search(loss, x0, a):
    """Black box, after the square attack (Andriushchenko et al. 2020): a random square of each image gets
    delta of a random sign; kept where loss(x) falls. x0 [..., C, S, S]; a.steps queries an image."""
    place, lead = torch.arange(x0.shape[-1], device=x0.device), x0.shape[:-3]

    def signs(*shape):
        return 2.0 * torch.randint(0, 2, (*lead, x0.shape[-3], *shape), device=x0.device) - 1
    height = a.eps if a.norm == "inf" else a.eps / math.sqrt(x0.shape[-3:].numel())
    x = project(x0 + height * signs(1, len(place)), x0, a.norm, a.eps)          # stripes
    best = loss(x)
    for t in range(a.steps):
        size = max(round(len(place) * math.sqrt(0.4 * (1 - t / a.steps) ** 2)), 1)
        row, column = torch.randint(0, len(place) - size + 1, (2, *lead, 1, 1, 1), device=x0.device)
        square = ((place[:, None] >= row) & (place[:, None] < row + size)
                  & (place >= column) & (place < column + size))                # [..., 1, S, S]
        height = a.eps if a.norm == "inf" else a.eps / size
        trial = project(torch.where(square, x0 + height * signs(1, 1), x), x0, a.norm, a.eps)
        value = loss(trial)
        better = value < best
        x, best = torch.where(better[..., None, None, None], trial, x), torch.where(better, value, best)
    return x


class Lab:
    """What the experiments share: images by class, the classifiers, the detectors of each row of Tab. 3.1."""

    def __init__(self, args):
        self.args, self.s, self.made = args, args.settings, {}
        data, test = (load_images(args.dataset, split, args.data_dir).to(args.device)
                      for split in ("train", "test"))
        self.data = data
        self.classes = common.IN_MEMORY[args.dataset][2]
        self.source = COLOUR if data.shape[0] == 3 else GREY
        self.setups = self.source["models"]
        self.unit = 255 if data.shape[0] == 3 else 1                            # of steps in names
        self.models = list(self.setups) if self.s.models == "all" else self.s.models.split(",")
        for name in self.models:
            if name not in self.setups:
                raise UserError(f"--models {name}: unknown; known: all, {', '.join(self.setups)}")
        for name in args.only:
            norm = "2" if name == "table3.8" else "inf"
            if (name == "table3.8" or name == "table3.7" or "figure" in name) and not self.of_norm(norm):
                raise UserError(f"{name} wants a model of norm {norm}; --models is {self.s.models}")
        nets = [common.make_net(self.s.net, 1, data.shape, self.s.width) for _ in range(2)]
        try:
            Detectors(nets).each(torch.zeros(2, 1, *data.shape))
        except (RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"--net {self.s.net}: cannot be a detector here ({error})") from None
        order, shown = (common.shuffled(len(part), 123).to(args.device) for part in (data, test))
        held = len(data) // 6
        self.splits = {"train": (data, order[held:]), "validation": (data, order[:held]),
                       "test": (test, shown)}
        self.members = {(split, k, inside): index[(of.y[index] == k) == inside] for k in range(self.classes)
                        for split, (of, index) in self.splits.items() for inside in (True, False)}
        for (split, k, _), index in self.members.items():
            if len(index) < (least := {"train": 2, "validation": 1, "test": 3}[split]):
                raise UserError(f"{args.dataset}: class {k} needs {least} {split} images, has {len(index)}")
        self.run = Run("adv_detect", args)

    def of_norm(self, norm):
        return [name for name in self.models if self.setups[name][0].norm == norm]

    def attacks(self, model):
        """A model's attacks in training and in validation."""
        a, check = self.setups[model]
        return a.within(self.s.train_steps), check.within(self.s.check_steps)

    def figure_attack(self, name):
        """The first l_inf model, its detectors, and the attack of a figure."""
        model = self.of_norm("inf")[0]
        return model, self.detectors(model), self.source[name].within(self.s.check_steps)

    def images(self, split, index):
        return self.splits[split][0].take(index)

    def draw(self, t):
        """Images of update t: of each class, and of the others, float32 [K, batch, C, S, S] twice."""
        drawn, s = [], self.s
        for inside in (True, False):
            index = []
            for k in range(self.classes):
                members = self.members["train", k, inside]
                i = common.batch_index(len(members), s.batch, self.args.seed + 100 * k + 50 * inside, t)
                index.append(members[i.to(members.device)])
            x = self.images("train", torch.cat(index))
            if s.augment == "crop_flip":
                x = common.crop_flip(x, self.args.seed + 2 * t + inside, pad=2)
            drawn.append(x.unflatten(0, (self.classes, s.batch)))
        return drawn

    def others(self, ks, n, split="test", apart=False):
        """The first n images that are not of class k (fewer where there are fewer), for each k of ks, and
        their labels: [len(ks), n, C, S, S], [len(ks), n]. apart: no image twice."""
        data, order = self.splits[split]
        index = [part[data.y[part] != k] for k, part in zip(ks, order.chunk(len(ks)))] if apart else [
            self.members[split, k, False] for k in ks]
        n = min(n, *map(len, index))
        index = torch.stack([i[:n] for i in index])
        return self.images(split, index.flatten()).unflatten(0, index.shape), data.y[index].long()

    def test_images(self, n):
        """The first n test images (or all there are) and their labels."""
        index = self.splits["test"][1][:n]
        return self.images("test", index), self.splits["test"][0].y[index].long()

    @functools.cached_property
    @common.own_randomness
    def f(self):
        """The natural classifier."""
        return self.classifier("f", self.s.f_iters, self.s.f_batch)

    def against_robust(self, net, x, y):
        """Images [n, C, S, S] of labels [n] whose cross-entropy is high for net: PGD of Madry et al."""
        a, net = self.source["robust"].within(self.s.at_steps), net.eval()
        return minimise(lambda x: -F.cross_entropy(net(x).float(), y, reduction="none"), x, a,
                        scattered(x, a.norm, a.eps))

    @functools.cached_property
    @common.own_randomness
    def robust(self):
        """The softmax classifier trained on attacked images (Madry et al.)."""
        made_with = {"attack": list(self.source["robust"].within(self.s.at_steps))}
        return self.classifier("robust", self.s.at_iters, self.s.at_batch, self.against_robust, made_with)

    def classifier(self, name, iterations, batch, adversary=None, made_with=None):
        s = self.s
        return common.train_classifier(self.run, self.data, self.classes, s.net, s.width, iterations, name,
                                       s.f_sgd, batch, None, adversary, made_with)

    def trained(self, model):
        """The trained detectors of a model, and the validation AUC of each."""
        if model not in self.made:
            self.made[model] = train_detectors(self, model)
        return self.made[model]

    def detectors(self, model):
        return self.trained(model)[0]

    def only(self, H, ks):
        """Only the detectors ks of H."""
        nets = [common.make_net(self.s.net, 1, self.data.shape, self.s.width) for _ in ks]
        nets = [common.part_of(H.nets, H.K, k, net) for k, net in zip(ks, nets)]
        return Detectors(nets).to(self.run.device).eval()

    @common.own_randomness
    def auc(self, H, a, ks, n, split="test", starts=0, method=minimise):
        """AUC of detectors ks of H under an attack on each of them, and how many images were attacked.

        Positives: all clean images of the class (no more than there are attacked ones, in validation).
        starts: that many random starts (0: the image itself), of which the attacker keeps the best.
        """
        ks = list(ks)
        part, x = self.only(H, ks), self.others(ks, n, split)[0]
        z = torch.full(x.shape[:2], -math.inf, device=x.device)
        for i in torch.arange(x.shape[1]).split(self.s.chunk):
            for _ in range(max(starts, 1)):
                start = {"start": scattered(x[:, i], a.norm, a.eps)} if starts else {}
                found = method(lambda x: -part.each(x), x[:, i], a, **start)
                with torch.no_grad():
                    z[:, i] = torch.maximum(z[:, i], part.each(found))          # float32
        aucs = []
        for k, negative in zip(ks, z):
            members = self.members[split, k, True]
            positive = logits(self.only(H, [k]), self.images(split, members[:n if split != "test" else None]))
            aucs.append(auroc(positive[:, 0], negative))
        return aucs, x.shape[1]


# --- experiments --------------------------------------------------------------------------------------------


def in_words(lab, a):
    """Steps x step size of an attack; of CIFAR-10 in the source's units, 0 to 255."""
    return f"{a.steps} x {a.step * lab.unit:.4g}"


def table_3_1(lab):
    """The models: attacks in training and in validation, and what training reached."""
    rows = {"detectors": lab.classes, "updates": lab.s.updates, "clean + attacked images": 2 * lab.s.batch}
    for model in lab.models:
        a, check = lab.attacks(model)
        aucs = lab.trained(model)[1]
        rows |= {f"{model}: training attack": in_words(lab, a),
                 f"{model}: validation attack": in_words(lab, check),
                 f"{model}: validation AUC, mean": aucs.mean().item(),
                 f"{model}: validation AUC, worst": aucs.min().item()}
    return rows


def auc_rows(lab, model, a, what, ks=(0, 1), n=None, **how):
    """AUCs of detectors ks of a model; attacks of more than 500 steps and restarts on `long` images."""
    n = n or (lab.s.long if a.steps > 500 or how.get("starts") else lab.s.images)
    aucs, n = lab.auc(lab.detectors(model), a, ks, n, **how)
    return {f"d_{k + 1} {model}, {what}": found for k, found in zip(ks, aucs)} | {f"n, {what}": n}


def table_3_2(lab, adam=True):
    """AUC of the first two detectors under 200 steps, and ten times as many of half the size."""
    rows = {}
    for model in lab.models:
        check = lab.attacks(model)[1]
        for a in (check, check._replace(steps=10 * check.steps, step=check.step / 2)):
            rows |= auc_rows(lab, model, a._replace(adam=adam), in_words(lab, a))
    return rows


def table_3_3(lab):
    """The same under sign (inf) and normalised-gradient (2) steps."""
    return table_3_2(lab, adam=False)


def table_3_4(lab):
    """Every model under every model's attack: cross-norm, cross-eps. Also Tab. 3.9."""
    rows = {}
    for model in lab.models:
        for other in lab.setups:
            rows |= auc_rows(lab, model, lab.attacks(other)[1], f"attack {other}")
    return rows


def table_3_5(lab):
    """d_1 under one attack from the image, and under random restarts. Also Tab. 3.10."""
    rows = {}
    for model in lab.models:
        a = lab.attacks(model)[1]
        rows |= auc_rows(lab, model, a, "fixed start", ks=[0], n=lab.s.long)
        rows |= auc_rows(lab, model, a, f"{lab.s.restarts} random starts", ks=[0], starts=lab.s.restarts)
    return rows


def table_3_6(lab):
    """Mean l_2 length of the smallest perturbations that are misread and accepted. Also Tab. 3.11."""
    s, rows, a = lab.s, {}, lab.source["table3.6"].within(lab.s.search_steps)
    for model in lab.models:
        H = lab.detectors(model)
        T = threshold(logits(H, lab.test_images(20 * lab.s.images)[0]).amax(1), 0.95)
        x, y = lab.others(range(H.K), max(s.pairs // H.K, 1), apart=True)       # [K, n, C, S, S], [K, n]

        def broken(x, y):
            z = logits(H, x.flatten(0, 1)).unflatten(0, y.shape)                # [K, n, K]
            return (z.argmax(2) != y) & (z.amax(2) >= T)
        size = torch.cat([smallest_perturbation(
            H.each, functools.partial(broken, y=labels), part, a, s.rounds, lab.source["c_max"]).flatten()
            for part, labels in zip(x.split(s.chunk, 1), y.split(s.chunk, 1))])
        rows |= {"n": len(size), f"{model}: T of TPR .95": T,
                 f"{model}: mean L2": size[size.isfinite()].mean().item()}
        rows |= rate(f"{model}: FPR", size.isfinite())
    return rows


def table_3_7(lab, norm="inf"):
    """d_1 and d_2 of the l_inf models under more and smaller steps; sizes as shares of eps on grey sets."""
    sweeps = {"inf": ((20, 1 / 4), (40, 1 / 16), (200, 1 / 80), (200, 1 / 16), (500, 1 / 16)),
              "2": ((20, 1 / 8), (50, 1 / 16))}
    rows = {}
    for model in lab.of_norm(norm):
        a = lab.attacks(model)[1]._replace(adam=False)
        for steps, share in sweeps[norm]:
            b = a._replace(steps=steps, step=a.eps * share).within(lab.s.check_steps)
            rows |= auc_rows(lab, model, b, in_words(lab, b))
    return rows


def table_3_8(lab):
    """The same for the l_2 models."""
    return table_3_7(lab, "2")


def attack_by_name(lab, name, H, x, y, a):
    """Images x [n, C, S, S] of labels y [n] under an attack of Eq. 3.30 to 3.35 by name."""
    def loss(part, y):
        z_f = lab.f(part).float() if name != "detector (3.32)" else None
        z_H = H(part).float() if name != "classifier (3.30)" else None
        return ATTACKS[name](z_f, z_H, y)
    size = max(lab.s.chunk // H.K, 1)
    return torch.cat([minimise(lambda z: loss(z, labels), part, a)
                      for part, labels in zip(x.split(size), y.split(size))])


def figure_3_2(lab, name="figure3.2"):
    """TPR (of 20 n clean images) against FPR of both ways of detection under every attack. Also Fig. 3.4."""
    model, H, a = lab.figure_attack("figure3.2")
    (x, y), a = lab.test_images(lab.s.images), a._replace(eps=lab.setups[model][0].eps)

    def judged(x, y):
        """{way: (logit that decides, misread)}."""
        z_H, z_f = logits(H, x), logits(lab.f, x)
        k = {"integrated": z_f.argmax(1), "generative": z_H.argmax(1)}
        return {way: (own_logit(z_H, k), k != y) for way, k in k.items()}
    clean = judged(*lab.test_images(20 * lab.s.images))
    found = {attack: judged(attack_by_name(lab, attack, H, x, y, a), y) for attack in ATTACKS}
    rows = {"n": len(x), "attack": f"{model}, {in_words(lab, a)}"}
    for way, (z_clean, misread) in clean.items():
        rows |= rate(f"natural acc, {way}", ~misread)
        for tpr in (0.95, 0.99):
            T = rows[f"T of TPR {tpr}, {way}"] = threshold(z_clean, tpr)
            fpr = [rate(f"FPR at TPR {tpr}, {way}, {attack}", verdict[way][1] & (verdict[way][0] >= T))
                   for attack, verdict in found.items()]
            rows |= functools.reduce(dict.__or__, fpr)
            rows[f"FPR at TPR {tpr}, {way}, strongest"] = max(next(iter(row.values())) for row in fpr)
        for attack, verdict in found.items():
            rows |= rate(f"misread, {way}, {attack}", verdict[way][1])

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    lines = [("integrated", attack, {}) for attack in ATTACKS]
    for way, attack, style in (*lines, ("generative", "detector (3.32)", {"color": "black", "ls": "--"})):
        z_clean, (z, misread) = clean[way][0], found[attack][way]
        tpr, fpr = detection_rates(z_clean, z, misread, torch.cat([z_clean, z]).unique())
        for axis in axes:
            axis.plot(fpr.cpu(), tpr.cpu(), label=f"{way}, {attack}", **style)
    axes[0].set(xlabel="FPR", ylabel="TPR", ylim=(0, 1.02), xlim=(-0.02, 1.02))
    axes[1].set(xlabel="FPR", title="enlarged", ylim=(0.9, 1.003), xlim=(-0.01, 0.5))
    axes[0].legend(fontsize=7, loc="lower right")
    lab.run.save(figure, name)
    return rows


def targeted(lab, H, x, a):
    """x [K, n, C, S, S], made more like class k each: by the detectors, by the robust softmax classifier."""
    softmax = [minimise(lambda z: -lab.robust(z)[:, k], part, a) for k, part in enumerate(x)]
    return {"generative": minimise(lambda z: -H.each(z), x, a), "softmax": torch.stack(softmax)}


def reading(lab, x):
    """Whether f, which was not attacked, reads x [K, n, C, S, S] as class k in row k: bool [K n]."""
    found = logits(lab.f, x.flatten(0, 1)).argmax(1).view(x.shape[:2])
    return (found == torch.arange(len(x), device=x.device)[:, None]).flatten()


def grids(lab, file, pictures):
    """Picture grids side by side: {title: [rows, columns, C, S, S]}."""
    figure, axes = plt.subplots(1, len(pictures), figsize=(4.2 * len(pictures), 4.9), layout="constrained")
    for axis, (title, x) in zip(axes, pictures.items()):
        common.picture_grid(axis, x.flatten(0, 1), x.shape[1], title)
    lab.run.save(figure, file)


def figure_3_3(lab, name="figure3.3"):
    """Targeted attacks on the generative and on the robust softmax classifier, all targets. Also Fig. 3.5."""
    model, H, a = lab.figure_attack("figure3.3")
    each = [lab.images("test", lab.members["test", k, True][:3]) for k in range(H.K)]  # three of each class
    x = torch.stack(each, 1).flatten(0, 1)  # one of each class, three times
    found = targeted(lab, H, x.expand(H.K, *x.shape), a)
    truth = torch.arange(H.K, device=x.device).repeat(3).expand(H.K, -1)
    other = (truth != torch.arange(H.K, device=x.device)[:, None]).flatten()
    rows = {"n": int(other.sum()), "attack": f"{model}, {in_words(lab, a)}, eps {a.eps * lab.unit:.4g}"}
    for of, images in found.items():
        rows |= rate(f"f, not attacked, reads the target, {of}", reading(lab, images)[other])
    grids(lab, name, {f"{of}: clean, then targets 0 to {H.K - 1}": torch.cat([x[None], images])[:, :H.K]
                      for of, images in found.items()})
    x, y = lab.test_images(min(lab.s.images, 500))
    rows |= {"n, softmax": len(x)} | rate("natural acc, softmax", logits(lab.robust, x).argmax(1) == y)
    x = lab.against_robust(lab.robust, x, y)
    return rows | rate("robust acc, softmax (PGD, eps of training)", logits(lab.robust, x).argmax(1) == y)


def class_gaussians(lab, n):
    """n draws for each class from a Gaussian of its training images (covariance + 1e-4), in [0, 1]."""
    drawn = []
    for k in range(lab.classes):
        x = lab.images("train", lab.members["train", k, True]).flatten(1).double()
        root = torch.linalg.cholesky(torch.cov(x.T) + 1e-4 * torch.eye(x.shape[1], device=x.device))
        z = torch.randn(n, x.shape[1]).to(x) @ root.T + x.mean(0)
        drawn.append(z.float().clamp(0, 1).view(n, *lab.data.shape))
    return torch.stack(drawn)


def figure_3_6(lab):
    """Images from class-conditional Gaussian seeds, attacked towards their class."""
    model, H, a = lab.figure_attack("figure3.6")
    x = class_gaussians(lab, 20)
    found = {"seeds": x, **targeted(lab, H, x, a)}
    rows = {"n": len(x) * x.shape[1], "attack": f"{model}, {in_words(lab, a)}, eps {a.eps * lab.unit:.4g}"}
    for name, images in found.items():
        rows |= rate(f"f, not attacked, reads the class, {name}", reading(lab, images))
    grids(lab, "figure3.6", {name: images[:, :8] for name, images in found.items()})
    return rows


def untuned(lab):
    """d_1 and d_2 under attacks that nothing here was tuned against, beside those of Tab. 3.2 and 3.3."""
    rows = {}
    for model in lab.models:
        a, H = lab.attacks(model)[1], lab.detectors(model)

        def transfer(loss, x, a):
            """Towards the detector's class on the undefended classifier f."""
            return torch.stack([minimise(lambda z: -lab.f(z)[:, k], part, a) for k, part in enumerate(x)])
        ways = {"Adam": (a, minimise), "normalised": (a._replace(adam=False), minimise),
                "Adam, float32": (a, functools.partial(minimise, fast=False)), "APGD": (a, apgd),
                "random search": (a._replace(steps=5 * a.steps), random_search),
                "transfer from f": (a, transfer)}
        scores = {name: lab.auc(H, b, (0, 1), lab.s.images, method=method)
                  for name, (b, method) in ways.items()}
        for name, (aucs, n) in scores.items():
            rows |= {"n": n} | {f"d_{k + 1} {model}, {name}": v for k, v in enumerate(aucs)}
        for k in (0, 1):
            found = {name: aucs[k] for name, (aucs, _) in scores.items()}
            tuned = min(found.pop("Adam"), found.pop("normalised"))
            rows[f"d_{k + 1} {model}, untuned below tuned by"] = tuned - min(found.values())
    return rows


def speed(lab):
    """Updates of all detectors together and of one after the other, in turns: seconds, and their ratio."""
    s, K, a, (x_pos, x_neg) = lab.s, lab.classes, lab.attacks(lab.models[0])[0], lab.draw(0)
    nets = [common.make_net(s.net, 1, lab.data.shape, s.width).to(lab.run.device).eval() for _ in range(K)]

    def ready(nets, ks):
        H = Detectors(nets)
        return H, torch.optim.Adam(H.parameters(), s.lr, fused=True), x_pos[ks], x_neg[ks], a
    ways = {"together": [ready(nets, slice(0, K))],
            "one after the other": [ready([net], slice(k, k + 1)) for k, net in enumerate(nets)]}
    seconds = {way: [] for way in ways}
    for _ in range(8):
        for way, steps in ways.items():
            start = time.time()
            for step in steps:
                train_step(*step)[1].sum().item()                               # .item() waits for the device
            seconds[way].append(time.time() - start)
    best = {way: min(spent[1:]) for way, spent in seconds.items()}              # the first one warms up
    rows = {"detectors": K, "attack": in_words(lab, a)}
    rows |= {f"seconds an update, {way}": spent for way, spent in best.items()}
    return rows | {"one after the other / together": best["one after the other"] / best["together"]}


def published(table):
    """{model: ((attack, d_1, d_2), ...)} -> {quantity: number}."""
    return {f"d_{k + 1} {model}, {what}": row[k] for model, cells in table.items() for what, *row in cells
            for k in range(len(row))}


PUBLISHED_3_1 = {"mnist": {f"{model}: {when} attack": f"{a.steps} x {a.step:g}"
                           for model, pair in GREY["models"].items()
                           for when, a in zip(("training", "validation"), pair)}}
INF, L2 = ("200 x 0.01", "2000 x 0.005"), ("200 x 0.1", "2000 x 0.05")
PUBLISHED_3_2 = {"mnist": published({
    "linf0.3": ((INF[0], .99959, .99971), (INF[1], .99958, .99971)),
    "linf0.5": ((INF[0], .99830, .99869), (INF[1], .99796, .99861)),
    "l2-2.5": ((L2[0], .99962, .99968), (L2[1], .99927, .99900)),
    "l2-5.0": ((L2[0], .99578, .99987), (L2[1], .99529, .99918))})}
PUBLISHED_3_3 = {"mnist": published({
    "linf0.3": ((INF[0], .99962, .99973), (INF[1], .99959, .99971)),
    "linf0.5": ((INF[0], .99820, .99901), (INF[1], .99795, .99872)),
    "l2-2.5": ((L2[0], .99906, .99916), (L2[1], .99855, .99883)),
    "l2-5.0": ((L2[0], .99960, .99997), (L2[1], .99237, .99994))})}
AGAINST = ("attack linf0.3", "attack linf0.5", "attack l2-2.5", "attack l2-5.0")
PUBLISHED_3_4 = {"mnist": published({
    "linf0.3": tuple(zip(AGAINST, (.99959, .99436, .99974, .96421), (.99971, .99778, .99965, .98268))),
    "linf0.5": tuple(zip(AGAINST, (.99966, .99830, .99969, .98816), (.99967, .99869, .99955, .98687))),
    "l2-2.5": tuple(zip(AGAINST, (.99927, .99339, .99962, .97747), (.99949, .99397, .99968, .98117))),
    "l2-5.0": tuple(zip(AGAINST, (.99925, .99767, .99944, .99577), (.99984, .99961, .99987, .99986)))})}
PUBLISHED_3_5 = {"mnist": published({
    "linf0.5": (("fixed start", .99830), ("50 random starts", .99776)),
    "l2-5.0": (("fixed start", .99578), ("50 random starts", .99501))})}
PUBLISHED_3_6 = {"mnist": {"linf0.3: mean L2": 4.40, "linf0.5: mean L2": 5.65, "best method before": 3.68}}
PUBLISHED_3_7 = {"cifar10": published({"linf8": (
    ("20 x 2", .9224, .9533), ("40 x 0.5", .9234, .9553), ("200 x 0.1", .9231, .9550),
    ("200 x 0.5", .9205, .9504), ("500 x 0.5", .9203, .9500))})}
PUBLISHED_3_8 = {"cifar10": published({"l2-80": (("20 x 10", .9839, .9924), ("50 x 5", .9837, .9922))})}
PUBLISHED_3_9 = {"cifar10": published({"linf8": (("attack l2-80", .9814), ("attack linf2", .9841))})}
PUBLISHED_3_10 = {"cifar10": published({"linf2": (("fixed start", .9866), ("10 random starts", .9866)),
                                        "linf8": (("fixed start", .9234), ("10 random starts", .9233))})}
PUBLISHED_3_11 = {"cifar10": {"linf8: mean L2": 1.5, "best method before": 1.1}}
EXPERIMENTS = {  # the figures of the source print no numbers
    "table3.1": Experiment(table_3_1, "the models and their training", "2.5 min", True, PUBLISHED_3_1),
    "table3.2": Experiment(table_3_2, "AUC of d_1, d_2: PGD with Adam", "1 min", True, PUBLISHED_3_2),
    "figure3.2": Experiment(figure_3_2, "TPR against FPR under every attack", "1 min", True),
    "table3.3": Experiment(table_3_3, "AUC of d_1, d_2: PGD, normalised", "1 min", False, PUBLISHED_3_3),
    "table3.4": Experiment(table_3_4, "each model under each attack", "", False, PUBLISHED_3_4),
    "table3.5": Experiment(table_3_5, "random restarts", "", False, PUBLISHED_3_5),
    "table3.6": Experiment(table_3_6, "smallest perturbations", "", False, PUBLISHED_3_6),
    "figure3.3": Experiment(figure_3_3, "targeted attacks, all targets"),
    "figure3.6": Experiment(figure_3_6, "images from Gaussian seeds"),
    "table3.7": Experiment(table_3_7, "l_inf model: steps and sizes", "", False, PUBLISHED_3_7),
    "table3.8": Experiment(table_3_8, "l_2 model: steps and sizes", "", False, PUBLISHED_3_8),
    "table3.9": Experiment(table_3_4, "CIFAR-10's table 3.4", "", False, PUBLISHED_3_9),
    "table3.10": Experiment(table_3_5, "CIFAR-10's table 3.5", "", False, PUBLISHED_3_10),
    "table3.11": Experiment(table_3_6, "CIFAR-10's table 3.6", "", False, PUBLISHED_3_11),
    "figure3.4": Experiment(functools.partial(figure_3_2, name="figure3.4"), "CIFAR-10's figure 3.2"),
    "figure3.5": Experiment(functools.partial(figure_3_3, name="figure3.5"), "CIFAR-10's figure 3.3"),
    "untuned": Experiment(untuned, "APGD, random search, transfer"),
    "speed": Experiment(speed, "all detectors together / one after the other", "10 s"),
}


# --- command line -------------------------------------------------------------------------------------------


def get_args(argv=None):
    return common.parse_args(__doc__, SETTINGS, EXPERIMENTS, argv)


def main(argv=None):
    args = get_args(argv)
    lab = Lab(args)
    for network, of in (("f", {"figure3.2", "figure3.3", "figure3.4", "figure3.5", "figure3.6", "untuned"}),
                        ("robust", {"figure3.3", "figure3.5", "figure3.6"})):
        if of & set(args.only):  # a checkpoint made with other settings is refused before any work
            getattr(lab, network)
    lab.run.closing_table({name: lab.run.experiment(name, EXPERIMENTS[name], lab) for name in args.only})


if __name__ == "__main__":
    common.call(main)
