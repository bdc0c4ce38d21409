r"""Detecting adversarial examples with one robust detector for each class.

Source: Yin 2022, "Generative Modeling With Adversarial Training", section 3.2.

An adversarial example is an image that was changed so little that nobody sees it, and so cleverly that a
classifier f misreads it. What f reads as class k is therefore an image of class k, or an attacked image of
another class. A detector d_k is a network that tells these two apart; there is one for each of the K
classes. While it learns, the other images are attacked anew in every update, and the attack aims at d_k
itself. The d_k learn apart, and yet their logits compare so well that no f is needed: the class of the
highest logit is the prediction, and that logit decides whether the image is accepted. Attacks are PGD
(projected gradient descent): Adam or plain steps down a loss (for d_k: -z_k), each back into a ball around
the image, of radius eps in l_inf (largest change of a pixel) or l_2 (length of the change). Training starts
them at random in the ball. Figures 3.3 and 3.6 also have a softmax classifier trained on attacks.
    z_k(x): logit of d_k, HIGH = clean and of class k; d_1 is that of class 0. y: an image's label.
    Pixels are in [0, 1]; eps and the length of steps are in that unit.
    (3.23)  min E_{y != k} [max_{|delta| <= eps} L(z_k(x + delta), 0)] + E_{y = k} [L(z_k(x), 1)], by the
            weights of d_k; L(z, t): logistic loss of logit z for target t. Here half of it.
    (3.31)  z_H(x) = (z_1(x), ..., z_K(x)), in code H(x). Integrated detection: f reads class k, accepted if
            z_k(x) >= T, a threshold. Generative detection (3.27): the same with k = argmax z_H(x), without f.
    (3.28)  TPR (true positive rate): share of CLEAN images that are accepted, rightly read or not.
    (3.29)  FPR (false positive rate): share of ALL attacked images that are misread AND accepted.
    AUC of d_k: probability that a clean image of class k scores above an attacked other one; a tie is half.

Commands (one core without AVX512; all numbers: results/adv_detect.md):
    python adv_detect.py                               within an hour: AUC of d_1 .993, of d_2 1.00
    python adv_detect.py --only table3.4 --models all  detectors of four attacks, crosswise
    python adv_detect.py --dataset mnist               hours; AUC of d_1 .998 by older code (source: .9996)
    python adv_detect.py --dataset cifar10             a GPU; --budget paper: the source's settings
The log: half of (3.23), .693 at first; mean logits z_pos of clean, z_neg of attacked images: they part.
Differs: the attacker raises z_k, not L: the same maximum, and no vanishing gradient. CIFAR-10: a wide
ResNet, WRN-34-10 (source: a variant of it), best weights chosen on validation images (author's code: test
images). Eq. 3.34: maximum over y and K + 1, and table 3.6: weight c of the length, as in the author's code.
AUCs and figure 3.2: an attack is judged at each of its steps, and the worst counts (source: the last).
"""
import copy
import math
from functools import partial
from typing import NamedTuple

import common  # before torch, so that Ctrl-C ends even its import quietly
import torch
import torch.nn.functional as F
from torch import nn

from common import Training, UserError, fast_precision, follow, frozen_copy
from common import input_gradient, once, rate, repeat, seeded, value

# --- settings: a value for each column, or one for all of them; then what it is ----------------------------

SETTINGS = common.settings(
    columns=("glyphs", "mnist fashion_mnist", "cifar10", "mnist-paper fashion_mnist-paper", "cifar10-paper"),
    smoke=dict(width=0.1, updates=3, batch=2, train_steps=2, check_steps=2, val_images=4,
               f_iters=3, at_iters=2, images=12, few=6, restarts=2),
    models=("linf0.3", "linf0.3", "linf8,l2-80", "all", "all", "of Tab. 3.1, with commas; or all"),
    width=(0.25, 1.0, 0.25, 1.0, 1.0, "of all networks; 1: the source's"),
    updates=(750, 1200, 300, 15_600, 40_000, "of the detectors"),
    batch=(16, 32, 30, 32, 30, "images of its class, and as many attacked ones, for each detector"),
    train_steps=(20, 20, 10, 0, 0, "steps of the attack in training; 0: the source's"),
    check_steps=(200, 200, 0, 200, 0, "steps in evaluation; 0: as many as the source trains with"),
    val_images=(60, 100, 100, 8000, 1000, "attacked validation images of each detector"),
    f_iters=(400, 2000, 6000, 18_750, 80_000, "updates of f"),
    at_iters=(4000, 1500, 3000, 30_000, 80_000, "updates of the robust softmax classifier"),
    images=(500, 500, 1000, 10_000, 10_000, "test images under attack"),
    few=(200, 200, 300, 10_000, 10_000, "of these: long attacks, restarts, figure 3.2; table 3.6: few / K"),
    restarts=(10, 10, 10, 50, 10, "random starts of table 3.5"),
)

class Steps(NamedTuple):
    """A PGD attack; eps and step in [0, 1] units."""
    norm: str  # inf or 2
    eps: float
    steps: int
    step: float
    adam: bool = True  # each pixel moves by about `step`; else l_inf: signs, l_2: the gradient at length 1
    def within(self, steps):
        """In this many steps; 0: unchanged. Fewer l_inf steps are longer; l_2 steps cross the ball anyhow."""
        steps = steps or self.steps
        longer = max(self.steps / steps, 1) if self.norm == "inf" else 1
        return self._replace(steps=steps, step=self.step * longer)

def plain(norm, eps, steps, step):
    """An attack on CIFAR-10, without Adam, from units of pixels from 0 to 255."""
    return Steps(norm, eps / 255, steps, step / 255, False)

MODELS = {  # attack in training. Key: colours, 1 (Tab. 3.1) or 3 (sec. 3.2.3, Tab. 3.10)
    1: {
        "linf0.3": Steps("inf", 0.3, 100, 0.01),
        "linf0.5": Steps("inf", 0.5, 100, 0.01),
        "l2-2.5": Steps("2", 2.5, 100, 0.1),
        "l2-5.0": Steps("2", 5.0, 200, 0.1),
    },
    3: {
        "linf8": plain("inf", 8, 40, 0.5),
        "l2-80": plain("2", 80, 20, 10),
        "linf2": plain("inf", 2, 10, 0.5),
    },
}
OTHERS = {  # the attacks of figures, of table 3.6, and in the training of the robust softmax classifier
    1: {
        "figure3.2": Steps("inf", 0.3, 100, 0.1),  # eps is the model's
        "figure3.3": Steps("inf", 0.4, 100, 0.01),
        "figure3.6": Steps("2", 15, 60, 0.25, False),
        "table3.6": Steps("2", 1000, 500, 0.1),  # no ball: its loss weighs the length
        "robust": Steps("inf", 0.3, 40, 0.01, False),
    },
    3: {
        "figure3.2": plain("inf", 8, 20, 2),
        "figure3.3": plain("inf", 12, 30, 2),
        "figure3.6": plain("2", 7650, 60, 127.5),
        "table3.6": plain("2", 255_000, 100, 25.6),
        "robust": plain("inf", 8, 7, 2),
    },
}

# --- the detectors ------------------------------------------------------------------------------------------

def network(outputs, shape, width, device):
    """In eval mode. For grey images the source's network, for coloured ones a wide ResNet."""
    if shape[0] == 3:
        net = common.WideResNet(34, 10 * width, outputs)
    else:
        net = common.make_net("mnist_cnn", outputs, shape, width)
    return common.to_device(net, device).eval()

class Detectors(nn.Module):
    """K networks with one output each; always in eval mode."""
    def __init__(self, nets):
        super().__init__()
        self.K, self.nets = len(nets), nn.ModuleList(nets)

    def forward(self, x):
        """All on each image [n, C, S, S] -> [n, K]; or each on its own images [K, n, C, S, S] -> [K, n]."""
        if x.dim() == 4:
            return torch.cat([net(x) for net in self.nets], 1)
        return torch.cat([net(own).T for net, own in zip(self.nets, x)])

# --- the attack ---------------------------------------------------------------------------------------------

def length(x):
    """l_2 length of each image [..., C, S, S] -> [..., 1, 1, 1]."""
    return torch.linalg.vector_norm(x, 2, (-3, -2, -1), True)

def project(x, x0, a):
    """x [..., C, S, S] back into [0, 1], then into the ball of radius a.eps around x0, which is in [0, 1]."""
    delta = x.clamp(0, 1) - x0
    if a.norm == "inf":
        return x0 + delta.clamp(-a.eps, a.eps)
    return x0 + delta * (a.eps / length(delta).clamp(min=a.eps))

def scattered(x0, a):
    """Random start, not yet clipped to [0, 1]. l_inf: uniform in the ball; l_2: its length is uniform."""
    if a.norm == "inf":
        return x0 + a.eps * (2 * torch.rand_like(x0) - 1)
    radius = a.eps * torch.rand_like(x0[..., :1, :1, :1])
    return x0 + radius * direction(torch.randn_like(x0), a.norm)

def direction(gradient, norm):
    """Signs (inf), or the gradient at length 1 (2). A gradient of 0 moves nothing."""
    return gradient.sign() if norm == "inf" else gradient / length(gradient).clamp(min=1e-30)

def attack_step(state, loss, x0, a, *loss_args):
    """A step of PGD down loss(x, *loss_args). state: images x, Adam's means m and v, number of steps t."""
    x, m, v, t = state
    gradient = input_gradient(lambda x: loss(x, *loss_args), x)
    t = t + 1
    m = 0.9 * m + 0.1 * gradient
    v = 0.999 * v + 0.001 * gradient.square()
    if a.adam:
        move = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    else:
        move = direction(gradient, a.norm)
    return project(x - a.step * move, x0, a), m, v, t

def begin(x0, start):
    """The state of attack_step() at `start`."""
    if not 0 <= x0.min() <= x0.max() <= 1:
        raise ValueError("an attack wants images in [0, 1]")
    return start, 0 * x0, 0 * x0, x0.new_zeros((), dtype=torch.float64)  # all tensors: repeat() wants it

def minimise(loss, x0, a, start, *loss_args):
    """PGD: a.steps from `start` to images near x0 [..., C, S, S] whose loss(x, *loss_args) [...] is low."""
    return repeat(attack_step, begin(x0, start), a.steps, loss, x0, a, *loss_args)[0]

def judged(judge, loss, x0, a, start, *loss_args):
    """minimise(), but -> judge(x) [...] at the start and after each step: [..., steps + 1]."""
    state = begin(x0, start)
    seen = [judge(project(start, x0, a))]
    for _ in range(a.steps):
        state = repeat(attack_step, state, 1, loss, x0, a, *loss_args)
        seen.append(judge(state[0]))
    return torch.stack(seen, -1)

def best_other(z, y):
    """Largest logit of a class other than y: [n, K], [n] -> [n]."""
    return z.scatter(1, y[:, None], -math.inf).amax(1)

def own_logit(z, y):
    """Logit of class y: [n, K], [n] -> [n]."""
    return z.gather(1, y[:, None])[:, 0]

def classifier_loss(x, f, H, y):
    """Eq. 3.30: negative once f is fooled. x [n, C, S, S], y [n] -> [n]. All of LOSSES are called alike."""
    z_f = f(x)
    return own_logit(z_f, y) - best_other(z_f, y)

def detector_loss(x, f, H, y):
    """Eq. 3.32: makes the detector of some wrong class sure. Also the attack on generative detection."""
    return -best_other(H(x), y)

def combined_loss(x, f, H, y):
    """Eq. 3.34, with a class K + 1, "attacked". Max over y and K + 1: over all, 0 where a wrong one leads."""
    z_f = f(x)
    attacked = (1 - best_other(H(x), y)) * z_f.amax(1)  # (3.33): high while no wrong detector is sure
    return torch.maximum(own_logit(z_f, y), attacked) - best_other(z_f, y)

def switching_loss(x, f, H, y):
    """Eq. 3.35: (3.30) until f is fooled, then (3.32). Decided anew at every step, for each image."""
    margin_f = classifier_loss(x, f, H, y)
    return torch.where(margin_f < 0, detector_loss(x, f, H, y), margin_f)

def joint_loss(x, f, H, y):
    """Not in the source: raises, for the best wrong class, the lesser of f's margin over y and H's logit."""
    z_f = f(x)
    preferred = z_f - own_logit(z_f, y)[:, None]
    return -best_other(torch.minimum(preferred, H(x)), y)

def logit_loss(x, H):
    """Makes each detector sure of its own images x [K, n, C, S, S] -> [K, n]."""
    return -H(x)

def softmax_loss(x, net):
    """Raises a softmax classifier's logit k on images x[k]: [K, n, C, S, S] -> [K, n]."""
    z = net(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    return -z.diagonal(dim1=0, dim2=2).T  # z [K, n, K]

def label_loss(x, net, y):
    """Takes images x [n, C, S, S] away from their labels: minus the cross-entropy [n]."""
    with fast_precision(x.device):
        z = net(x).float()
    return -F.cross_entropy(z, y, reduction="none")

LOSSES = {  # of figure 3.2
    "classifier (3.30)": classifier_loss,
    "detector (3.32)": detector_loss,
    "combined (3.34)": combined_loss,
    "combined (3.35)": switching_loss,
    "joint": joint_loss,
    "cross-entropy of H": lambda x, f, H, y: label_loss(x, H, y),  # the last two are weaker than (3.32), says
    "(3.30) on H": lambda x, f, H, y: classifier_loss(x, H, H, y),  # the source
}

def against(net, x, y, a):
    """Images x of labels y attacked by PGD from a random start, in net's eval mode."""
    was_training = net.training
    net.eval()
    x = minimise(label_loss, x, a, scattered(x, a), net, y)
    net.train(was_training)
    return x

def near_loss(x, H, x0, c):
    """Table 3.6: logit_loss + c |delta|^2, for c [K, n]."""
    return c * (x - x0).square().sum((-3, -2, -1)) - H(x)

def chosen(images, index):
    """These images alone, in this order."""
    return common.Images(images.x[index], images.y[index], images.name)

def rows_of(images, inside):
    """For each class the indices, on the CPU, of its images; or (inside = False) of all others."""
    y = images.y.cpu()
    return [((y == k) == inside).nonzero()[:, 0] for k in y.unique()]

def together(images, rows, n):
    """The first n images (fewer if a list is short) of each list of indices -> [K, n, C, S, S], y [K, n]."""
    n = min(n, *map(len, rows))
    index = torch.stack([row[:n] for row in rows])
    return images.take(index), images.y[index]

def by_images(function, size, x, *tensors):
    """function(x, ...) of parts of `size` images, joined; x [n, C, S, S], or [K, n, C, S, S] split at n."""
    return common.by_parts(function, x, size, *tensors, dim=x.dim() - 4)

def draw(images, rows, batch, seed, t):
    """Batch t of each list of indices -> [K, batch, C, S, S]; coloured images cropped and flipped."""
    picked = []
    for k, row in enumerate(rows):
        picked.append(row[common.batch_index(len(row), batch, seed + 100 * k, t)])
    x, _ = together(images, picked, batch)
    if images.shape[0] == 1:
        return x
    return common.crop_flip(x.flatten(0, 1), seed + 101 * t, pad=2).view_as(x)

# --- training: Eq. 3.23 -------------------------------------------------------------------------------------

class Model(NamedTuple):
    """Trained detectors: a row of Tab. 3.1."""
    H: Detectors
    fast: nn.Module  # what attacks differentiate: a frozen copy of H
    auc: torch.Tensor  # of each detector in validation [K]
    check: Steps  # attack in validation and evaluation

def keep_better(best, best_auc, H, scores):
    """Copy into `best` the weights of each detector whose AUC is now at least best_auc [K], in place."""
    for k, (clean, attacked) in enumerate(zip(*scores)):
        auc = auroc(clean, attacked)
        if auc >= best_auc[k]:
            best_auc[k] = auc
            best.nets[k].load_state_dict(H.nets[k].state_dict())

@seeded
def train_detectors(run, s, name, a, check, build, f, train, validation):
    """A row of Tab. 3.1 -> Model, each detector with its best weights. f: where each starts, or None."""
    inside, outside = rows_of(train, True), rows_of(train, False)
    nets = [build(1) for _ in inside]
    for k, net in enumerate(nets if f else []):  # d_k starts as f with output k alone
        net.body.load_state_dict(f.body.state_dict())
        net.head.weight.data = f.head.weight[k : k + 1].clone()
        net.head.bias.data = f.head.bias[k : k + 1].clone()
    H = Detectors(nets)
    best = copy.deepcopy(H)
    best_auc = torch.zeros(H.K)
    model = Model(H, frozen_copy(H), best_auc, check)
    if f:
        optimizer = torch.optim.SGD(H.parameters(), 1e-3, momentum=0.9, weight_decay=2e-4)
    else:
        optimizer = torch.optim.Adam(H.parameters(), 5e-4, fused=True)
    made_from = {"H": H, "attacks": (a, check), "images": train, "validation": validation}
    made_from.update(common.pick(s, "updates batch val_images"))
    training = Training(run, name, made_from, H=H, optimizer=optimizer, best=best, best_auc=best_auc)
    for it in training.updates(s.updates):
        x_pos = draw(train, inside, s.batch, run.seed + 50, it - 1)  # no seed of x_neg's: these are 100 apart
        x_neg = draw(train, outside, s.batch, run.seed, it - 1)
        follow(model.fast, H)
        x_adv = minimise(logit_loss, x_neg, a, scattered(x_neg, a), model.fast)
        with fast_precision(run.device):
            z_pos, z_neg = H(torch.cat([x_pos, x_adv], 1)).float().chunk(2, 1)  # [K, batch]
        loss = (F.softplus(-z_pos).mean(1) + F.softplus(z_neg).mean(1)) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.sum().backward()  # not the mean: each detector gets the gradient that it would get alone
        optimizer.step()
        training.log(loss=loss.mean(), z_pos=z_pos.mean(), z_neg=z_neg.mean())
        if it % max(s.updates // 5, 1) == 0:  # five times, but in tiny runs
            follow(model.fast, H)
            scores = attacked_scores(run, model, validation, [check], s.val_images)
            keep_better(best, best_auc, H, scores)
    return model._replace(H=best, fast=frozen_copy(best))

# --- evaluation ---------------------------------------------------------------------------------------------

def first_two(model):
    """The model with d_1 and d_2 alone, of which most tables speak."""
    H = Detectors(model.H.nets[:2])
    return model._replace(H=H, fast=frozen_copy(H))

def auroc(positive, negative):
    """Probability that an in-distribution score [P] ranks above an out-distribution one [N]; ties: half."""
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive.contiguous())
    up_to = torch.searchsorted(ordered, positive.contiguous(), right=True)
    return (below + up_to).sum().item() / 2 / len(positive) / len(negative)

@torch.no_grad()
def logits(net, x):
    """Float32 outputs for images [n, C, S, S], or of detectors for [K, n, C, S, S]."""
    return by_images(net, 250, x)

@seeded
def attacked_scores(run, model, images, attacks, n, loss=logit_loss, starts=0):
    """Logits of clean images of each class [K, P]; of n attacked others, each at its worst step, [K, n].
    starts: random starts of each attack; 0: it starts at the image itself."""
    K = model.H.K
    def attacked(x0):
        tried = []
        for a in attacks:
            for _ in range(starts or 1):
                start = scattered(x0, a) if starts else x0
                z = judged(partial(logits, model.H), loss, x0, a, start, model.fast)
                tried.append(z.amax(-1))
        return torch.stack(tried).amax(0)
    x_pos, _ = together(images, rows_of(images, True)[:K], len(images))  # as many as the rarest class has
    x_neg, _ = together(images, rows_of(images, False)[:K], n)
    return logits(model.H, x_pos), by_images(attacked, run.chunk // K + 1, x_neg)  # in parts for memory

def detect(z_f, z_H, y):
    """From outputs [n, K]: H's logit of the class f reads; is that class wrong? Generative: z_f is z_H."""
    k = z_f.argmax(1)
    return own_logit(z_H, k), k != y

def threshold(z, tpr):
    """Eq. 3.28: the largest T that accepts at least this share of clean images; z [n] is what decides."""
    return z.sort(descending=True).values[math.ceil(tpr * len(z)) - 1].item()

def smallest_perturbation(model, T, a, c_max, x0, y):
    """Least l_2 length that makes x0[k], pushed towards k, misread and accepted, or inf: [K, n]."""
    c = torch.zeros_like(y, dtype=torch.float32)  # weight of the length in near_loss
    sizes = []
    for i in range(20):  # c is bisected, from 0 on: up after a success, else down
        x = minimise(near_loss, x0, a, x0, model.fast, x0, c)
        z_H = logits(model.H, x.flatten(0, 1))
        z, misread = detect(z_H, z_H, y.flatten())
        broken = (misread & (z >= T)).view_as(y)
        sizes.append(torch.where(broken, length(x - x0)[..., 0, 0, 0], math.inf))
        c = (c + torch.where(broken, c_max, -c_max) / 2 ** (i + 1)).clamp(min=0)
    return torch.stack(sizes).amin(0)

# --- tables and figures -------------------------------------------------------------------------------------

def auc_rows(run, pairs, images, n, title, change=lambda a: [a], loss=logit_loss, starts=0):
    """Rows of AUCs under change(each model's attack), a list; the rest is for attacked_scores()."""
    rows = []
    for name, model in pairs.items():
        attacks = change(model.check)
        scores = attacked_scores(run, model, images, attacks, n, loss, starts)
        how = {"starts": starts} if starts else {}
        if len(attacks) == 1:
            how.update(steps=attacks[0].steps, step=attacks[0].step)
        for k, (clean, attacked) in enumerate(zip(*scores)):
            row = value(f"AUC of d_{k + 1}, {name}, {title}", auroc(clean, attacked), **how)
            interval = common.bootstrap(auroc, clean, attacked)
            rows.append({**row, "interval": interval, "clean": len(clean), "n": len(attacked)})
    return rows

def table_3_1(models, setups):
    """The models: attacks in training and in validation, and what training reached."""
    rows = []
    for name, model in models.items():
        for when, a in zip(("training", "validation"), setups[name]):
            rows.append(value(f"{when} attack, {name}", f"{a.steps} x {a.step:.4g}"))
        rows.append(value(f"validation AUC, mean, {name}", model.auc.mean().item()))
    return rows

def short_and_long(run, s, pairs, test, adam):
    """AUCs under each model's attack, and under ten times as many steps of half the size."""
    rows = auc_rows(run, pairs, test, s.images, "PGD", lambda a: [a._replace(adam=adam)])
    more = lambda a: [a._replace(adam=adam, steps=10 * a.steps, step=a.step / 2)]
    return rows + auc_rows(run, pairs, test, s.few, "more and smaller steps", more)

def table_3_2(run, s, pairs, test):
    """AUC of d_1 and d_2 under PGD with Adam."""
    return short_and_long(run, s, pairs, test, True)

def table_3_3(run, s, pairs, test):
    """The same under sign steps (l_inf models) and normalised ones (l_2 models)."""
    return short_and_long(run, s, pairs, test, False)

def table_3_4(run, s, pairs, test, setups):
    """Every model under every model's attack. CIFAR-10: Tab. 3.9."""
    rows = []
    for other, (_, a) in setups.items():
        rows += auc_rows(run, pairs, test, s.images, f"attack {other}", lambda _: [a])
    return rows

def table_3_5(run, s, pairs, test):
    """The attack from the image itself, and from random starts. CIFAR-10: Tab. 3.10."""
    rows = auc_rows(run, pairs, test, s.few, "fixed start")
    return rows + auc_rows(run, pairs, test, s.few, "random starts", starts=s.restarts)

def table_3_6(run, s, models, test, source):
    """Mean l_2 of the smallest perturbations that are misread and accepted (TPR .95). CIFAR-10: Tab. 3.11.
    "one target": over all pairs of an image and a wrong class that it is pushed towards (the source draws
    one class for each image). "shortest": over images, each with its easiest. Any misreading counts.
    """
    rows = []
    c_max = 8.0 if test.shape[0] == 1 else 255.0**2  # author's code: 8; CIFAR-10: 1 in units of 0 to 255
    for name, model in models.items():
        K = model.H.K
        x, y = together(test, [torch.arange(len(test))] * K, max(s.few // K, 1))
        z_clean = logits(model.H, test.take(slice(None))).amax(1)
        search = partial(smallest_perturbation, model, threshold(z_clean, 0.95), source["table3.6"], c_max)
        size = by_images(search, run.chunk // K + 1, x, y)
        own = y == torch.arange(K, device=y.device)[:, None]
        size = size.masked_fill(own, math.inf).T  # [n, K]: an image's wrong classes
        mean = lambda size: size[size.isfinite()].mean().item()
        for title, found in (("one target", size), ("shortest", size.amin(1))):
            row = value(f"mean l_2 of the smallest perturbation, {name}, {title}", mean(found), n=len(found))
            row["interval"] = common.bootstrap(mean, found)
            rows.append(row)
        rows.append(rate(f"images broken, {name}", size.isfinite().any(1)))
    return rows

SWEEPS = (  # Tab. 3.7, Tab. 3.8: norm, steps, the length of a step as a share of eps
    ("inf", "few long steps", 20, 1 / 4),
    ("inf", "PGD", 40, 1 / 16),
    ("inf", "more and smaller steps", 200, 1 / 80),
    ("inf", "more steps", 200, 1 / 16),
    ("inf", "most steps", 500, 1 / 16),
    ("2", "few long steps", 20, 1 / 8),
    ("2", "more and smaller steps", 50, 1 / 16),
)

def table_3_7(run, s, pairs, test):
    """Plain steps, few and long to many and small. l_2 models: Tab. 3.8."""
    rows = []
    for norm, title, steps, share in SWEEPS:
        alike = {name: model for name, model in pairs.items() if model.check.norm == norm}
        steps = 2 if run.smoke else steps
        change = lambda a: [Steps(norm, a.eps, steps, share * a.eps, False)]
        rows += auc_rows(run, alike, test, s.images, title, change)
    return rows

def fpr_row(title, z_clean, z, tpr):
    """FPR (3.29). z: logits of attacked images, -inf where rightly read. Its interval: Wilson's, widened to
    that of a bootstrap that also redraws the clean images behind T (at TPR 1 these cannot lower T)."""
    share = lambda clean, attacked: (attacked >= threshold(clean, tpr)).float().mean()
    row = rate(f"FPR, {title}", z >= threshold(z_clean, tpr), tpr=tpr)
    low, high = zip(row["interval"], common.bootstrap(share, z_clean, z))
    return {**row, "interval": [min(low), max(high)], "clean": len(z_clean)}

def figure_3_2(run, s, f, models, test, source):
    """FPR against TPR of the first model, by f and without, under every attack. CIFAR-10: Fig. 3.4.
    An attack counts at its worst step for that way of detection; "all of these": image by image."""
    model = next(iter(models.values()))
    fast, a = frozen_copy(f), model.check
    if a.norm == "inf":  # as the source's model
        a = source["figure3.2"]._replace(eps=a.eps)
    x, y = test.take(slice(0, s.few)), test.y[: s.few]
    def detections(x, y):
        z_H = logits(model.H, x)
        return {"integrated": detect(logits(f, x), z_H, y), "generative": detect(z_H, z_H, y)}
    traces = {}
    for title, loss in LOSSES.items():
        def attack(x, y):
            def judge(x):  # the deciding logit, -inf if rightly read
                return torch.stack([z.where(bad, -math.inf) for z, bad in detections(x, y).values()], 1)
            return judged(judge, loss, x, a, x, fast, model.fast, y)
        traces[title] = by_images(attack, run.chunk // model.H.K + 1, x, y)
    rows = []
    clean = detections(test.take(slice(None)), test.y)
    for i, (way, (z_clean, misread)) in enumerate(clean.items()):
        rows.append(rate(f"natural acc, {way}", ~misread))
        best = {title: trace[:, i].amax(-1) for title, trace in traces.items()}
        best["all of these"] = torch.stack(list(best.values())).amax(0)
        for title, z in best.items():
            right = torch.cat([z_clean[: len(z)] > 0, z[z.isfinite()] <= 0])  # d > .5: clean; misread ones
            rows.append(rate(f"accuracy (3.19), {way}, {title}", right))
            for tpr in (0.9, 0.95, 0.98, 0.99, 1.0):
                rows.append(fpr_row(f"{way}, {title}", z_clean, z, tpr))
    for title, trace in traces.items():
        misread_by_f = trace[:, 0, trace.shape[-1] // 2 :].isfinite()  # in the second half of the steps
        turns = (misread_by_f[:, 1:] != misread_by_f[:, :-1]).float().mean().item()
        rows.append(value(f"share of later steps that turn f's reading, {title}", turns))
    for way in clean:
        of_way = [row for row in rows if f"FPR, {way}" in row["quantity"]]
        run.lines(f"figure3.2-{way}", of_way, "tpr", ylabel="FPR")
    return rows

def towards(run, name, f, robust, models, x, a):
    """Images x[k] pushed towards class k, by the first model and by a softmax classifier: does f read k?"""
    model = next(iter(models.values()))
    generative = minimise(logit_loss, x, a, x, model.fast)
    softmax = minimise(softmax_loss, x, a, x, frozen_copy(robust))
    rows, grids = [], {}
    for title, images in (("start", x), ("generative", generative), ("softmax", softmax)):
        k = logits(f, images.flatten(0, 1)).argmax(1).view(len(x), -1)
        right = k == torch.arange(len(x), device=x.device)[:, None]
        rows.append(rate(f"f, not attacked, reads the target, {title}", right, eps=a.eps))
        columns = f"{title}; a column for each target, class 0 to {len(x) - 1}"
        grids[columns] = images[:, :4].transpose(0, 1).flatten(0, 1)
    run.pictures(name, grids, len(x))
    return rows

def figure_3_3(run, s, f, robust, models, test, source):
    """Targeted attacks on both classifiers; the softmax one's robust accuracy. CIFAR-10: Fig. 3.5."""
    x, _ = together(test, rows_of(test, False), 30)
    rows = towards(run, "figure3.3", f, robust, models, x, source["figure3.3"])
    a = source["robust"].within(2 if run.smoke else 100)
    x, y = test.take(slice(s.few)), test.y[: s.few]
    right = logits(robust, x).argmax(1) == y
    rows.append(rate("natural acc, softmax", right))
    for _ in range(s.restarts):
        attacked = by_images(partial(against, robust, a=a), run.chunk, x, y)
        right = right & (logits(robust, attacked).argmax(1) == y)
    rows.append(rate("robust acc, softmax", right, eps=a.eps, steps=a.steps, starts=s.restarts))
    return rows

def figure_3_6(run, f, robust, models, train, source):
    """Draws from the Gaussian of each class' training images, attacked towards their class."""
    starts = []
    for index in rows_of(train, True):
        x = train.take(index).flatten(1).double()
        cov = torch.cov(x.T) + 1e-4 * torch.eye(x.shape[1], device=x.device)
        gaussian = torch.distributions.MultivariateNormal(x.mean(0), cov)
        starts.append(gaussian.sample((20,)).float().clamp(0, 1).unflatten(1, train.shape))
    return towards(run, "figure3.6", f, robust, models, torch.stack(starts), source["figure3.6"])

def untuned(run, s, f, pairs, test):
    """The worst of Adam, plain steps and plain ones of eps / 10, by float32 gradients; transfer from f."""
    exact, undefended = {}, {}
    for name, model in pairs.items():
        exact[name] = model._replace(fast=frozen_copy(model.H, fast=False))
        undefended[name] = model._replace(fast=f)
    three = lambda a: [a, a._replace(adam=not a.adam), a._replace(adam=False, step=a.eps / 10)]
    rows = auc_rows(run, exact, test, s.images, "worst of Adam and plain steps", three)
    return rows + auc_rows(run, undefended, test, s.images, "transfer from f", loss=softmax_loss)

EXPERIMENTS = common.experiments(  # main() hands each what its parameters name
    headline=[table_3_1, table_3_2, figure_3_2],
    others=[table_3_3, table_3_4, table_3_5, table_3_6, table_3_7, figure_3_3, figure_3_6, untuned],
)

# --- command line -------------------------------------------------------------------------------------------

def get_args(argv=None):
    args = common.parse_args(__doc__, SETTINGS, EXPERIMENTS, argv)
    s = args.settings
    common.at_least(1, s, "updates batch val_images f_iters at_iters images few restarts")
    known = MODELS[common.IN_MEMORY[args.dataset][0]]
    args.models = list(known) if s.models == "all" else s.models.split(",")
    if not set(args.models) <= set(known):
        raise UserError(f"--models {s.models}: known are {', '.join(known)} and all")
    return args

def main(argv=None):
    args = get_args(argv)
    s = args.settings
    colours, _, K = common.IN_MEMORY[args.dataset]
    data, test = common.train_and_test(args, s.batch, s.images)
    if data.y.min() == data.y.max():
        raise UserError(f"{args.dataset}: all images are of one class")
    test = chosen(test, common.shuffled(len(test), 123))
    parts = common.shuffled(len(data), 123).tensor_split([len(data) // 6])
    validation, train = (chosen(data, index) for index in parts)
    build = partial(network, shape=data.shape, width=s.width, device=args.device)
    run = common.Run("adv_detect", args)
    setups = {}
    for name, a in MODELS[colours].items():
        setups[name] = a.within(s.train_steps), a.within(s.check_steps)
    source = {name: a.within(2 if run.smoke else 0) for name, a in OTHERS[colours].items()}
    a = OTHERS[colours]["robust"].within(s.train_steps // 2)
    train_f = partial(common.train_classifier, run, build=partial(build, K), data=train, batch=32)
    if colours == 3:
        train_f = partial(train_f, batch=128, sgd=0.1, augment="crop_flip")
    train_robust = partial(train_f, adversary=partial(against, a=a), made_from={"attack": a})
    f = once(lambda: train_f("f", iterations=s.f_iters))
    robust = once(lambda: train_robust("robust", iterations=s.at_iters))
    @once
    def models():
        start = f() if colours == 3 else None
        trained = {}
        for name in args.models:
            trained[name] = train_detectors(run, s, name, *setups[name], build, start, train, validation)
        return trained
    @once
    def pairs():
        return {name: first_two(model) for name, model in models().items()}
    run.experiments(EXPERIMENTS, f=f, robust=robust, models=models, pairs=pairs, train=train, test=test,
                    setups=setups, source=source)

if __name__ == "__main__":
    common.call(main)
