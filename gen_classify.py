r"""Generative robust classification: a density for each class, and Bayes' rule between them.

Source: Yin 2022, "Generative Modeling With Adversarial Training", section 3.4.

A softmax classifier learns where one class ends and the next begins. A generative classifier asks for each
class how well an image fits it, and names the class that it fits best. Here a network d_k with one output
tells images of class k from those of all other classes, called p0. Meanwhile the latter are attacked: changed
a little, so that they look like class k to d_k. Wherever attacks arrive d_k is pressed down, unless images of
the class hold it up. So it ends high where these are and low around them, and is read as the log of their
density, up to a constant that nobody knows. (A reading, not a theorem.) A walk up d_k, in no ball, then makes
images of class k. Begun at "seeds", draws from the Gaussian with the class's mean and covariance, it gives
samples. Begun at an image of another class it gives a counterfactual: that image, were it of class k.

    d_k: logit, HIGH = like class k. Pixels are in [0, 1]; lengths are l_2 over a whole image.
    (3.39)  maximise E_k[log sigma(d_k(x))] + E_others[min log(1 - sigma(d_k(x')))], sigma the logistic
            function, the minimum over x' in the ball of radius --eps-out around x
    (3.45)  the same, with images of class k attacked too, downwards, in a ball of radius --eps-in
    (3.42)  p(x | k) = exp(d_k(x)) / Z_k, Z_k unknown, and Bayes' rule for equally frequent classes give
            p(k | x) = exp(d_k(x) + c_k) / sum_j exp(d_j(x) + c_j), with c_k = -log Z_k
    (3.43)  g(x) = the k with the largest d_k(x) + c_k; c is learned by cross-entropy of (3.42) on validation
            images (a sixth of the training images), and makes the d_k comparable, each trained alone
    (3.46)  attack on a softmax classifier: up the cross-entropy of the label
    (3.47)  attack on d: up d_k, once for each k but the label; (3.48) of these images the one whose
            d_k + c_k is largest

The source attacks its classifier by (3.48), the other by (3.46), and compares. But (3.48) never lowers the d
of the label. So here both classifiers also meet the same four attacks, all PGD (projected gradient descent:
steps along a gradient, kept inside a ball) from the image itself: (3.46); down the margin, the label's output
minus the largest other one; for each other class k, (3.47); and for each, down d_y - d_k. "Worst": an image
is broken if it was misread before, at any step of the four, or after the source's attack.

Commands (two cores; all numbers: results/gen_classify.md):
    python gen_classify.py                       digits, 4 minutes: robust accuracy .96 as the source attacks,
                                                 .84 under the worst; softmax .90, .90. mnist: an hour
    python gen_classify.py --only figure3.12     how large d_k has to be; also figure3.13, 3.14, 3.15
    python gen_classify.py --dataset cifar10     a GPU, never run so far; --budget paper: published settings
The log. loss: of one d_k, mean over k. inside, outside: mean d_k of its class, and of attacked others.

Differs: networks are the last ones, not the best ones on test images. The source learns c on training images
and stops where test images are read best; here c is learned on validation images, to the end (--calibrate
test: on test images). The softmax classifier is trained here. BatchNorm in a d_k stays at mean 0, variance 1:
attack and update see one function. The source does not say whether its d_k are of (3.39) or (3.45): (3.39).
"""
import math
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import common  # before torch, so that Ctrl-C ends even its import quietly
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, v2

from common import Training, UserError, by_parts, fast_precision, input_gradient, once, repeat
from common import rate, seeded, value

# --- settings -----------------------------------------------------------------------------------------------

SETTINGS = common.settings(  # a row: a value for each column, then its help
    columns=("glyphs", "mnist fashion_mnist", "cifar10", "cifar10-paper"),
    smoke=dict(width=0.05, soft_width=0.05, batch=2, updates=2, soft_updates=2, steps=2, test_steps=2,
               images=6, few=4, samples=40, cls_iters=2, ablation=2),
    net=("mnist_cnn", "mnist_cnn", "resnet18", "resnet18", "network of each d_k"),
    width=(0.25, 0.25, 0.25, 0.5, "multiplies its channels"),
    augment=("none", "none", "auto", "auto", "none, crop (and flip), auto (AutoAugment), mixup, cutmix"),
    batch=(16, 32, 32, 128, "images of each class, and of its p0, in an update"),
    updates=(400, 2000, 4000, 80_000, "of all d_k; the source has 2000 epochs"),
    lr=(0.05, 0.05, 0.05, 0.1, "rate of SGD, momentum .9; a tenth of it in the last quarter"),
    weight_decay=(1e-4, "of SGD"),
    eps_out=(1.5, 1.5, 0.3, 0.3, "radius of attacks on other classes in training"),
    eps_in=(0.0, "radius of attacks on the class itself; 0: Eq. 3.39, else 3.45"),
    steps=(10, "PGD steps in training, softmax's too, each a fifth of the radius long"),
    soft_net=("mnist_cnn", "mnist_cnn", "resnet18", "resnet50", "network of the softmax classifier"),
    soft_width=(0.75, 0.75, 0.75, 1.0, "multiplies its channels"),
    soft_updates=(200, 1500, 4000, 60_000, "its updates"),
    soft_batch=(64, 64, 128, 128, "its images in an update"),
    soft_eps=(1.5, 1.5, 0.5, 0.5, "radius of attacks in its training"),
    eps=(1.5, 1.5, 0.5, 0.5, "radius of attacks in tests"),
    test_steps=(20, 40, 100, 100, "PGD steps of attacks in tests, each eps / 10 long"),
    images=(100, 300, 500, 10_000, "test images under attack"),
    few=(100, 100, 200, 1000, "images of a figure's point"),
    samples=(500, 1000, 2000, 10_000, "images behind a Frechet distance"),
    seed_step=(1.0, "length of the 7 or 10 steps from a seed to a sample"),
    cls_iters=(300, 600, 2000, 8000, "updates of FD-cls's classifier"),
    ablation=(300, 1000, 2000, 20_000, "updates of each d_k in figures 3.12 to 3.15"),
    auxiliary=("none", "a data set that becomes half of p0, not in the source; none"),
    calibrate=("validation", "images that c is learned on: validation, test"),
)

# --- the model: K networks d_k, and Bayes' rule -------------------------------------------------------------

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

class Generative(nn.Module):
    """The generative classifier (3.43): d(x) + c for images [n, C, S, S] -> [n, K]; the largest wins."""

    def __init__(self, d, c):
        super().__init__()
        self.d = d
        self.register_buffer("c", c)

    def forward(self, x):
        return self.d(x) + self.c

# --- attacks ------------------------------------------------------------------------------------------------

class Radius(NamedTuple):
    """A search in the ball of radius eps; lengths in [0, 1] units."""
    eps: float
    steps: int
    step: float

def test_attack(s, eps):
    """The attack of tests, in the ball of this radius."""
    return Radius(eps, s.test_steps, eps / 10)

def length(x):
    """l_2 length of each image [..., C, S, S] -> [..., 1, 1, 1]."""
    return torch.linalg.vector_norm(x, 2, (-3, -2, -1), True)

def down(x, gradient, x0, a):
    """A step of PGD down a gradient, back into [0, 1], then into the ball around x0. All [..., C, S, S]."""
    x = x - a.step * gradient / length(gradient).clamp(min=1e-30)  # a gradient of 0 moves nothing
    delta = x.clamp(0, 1) - x0
    return x0 + delta * (a.eps / length(delta).clamp(min=a.eps + 1e-30))

def training_step(x, d, x0, a, sign):
    """Each d_k's own images [K, n, C, S, S] a step down sign * d_k."""
    with fast_precision(x.device):
        gradient = input_gradient(lambda x: sign * d(x), x)
    return down(x, gradient, x0, a)

def own_logit(z, y):
    """Logit of class y: [n, K], [n] -> [n]."""
    return z.gather(1, y[:, None])[:, 0]

def entropy_attack(z, y, k):
    """(3.46), to be minimised: minus the cross-entropy of the label. Outputs [n, K], [n], [n] -> [n]."""
    return -F.cross_entropy(z, y, reduction="none")

def margin_attack(z, y, k):
    """The label's output minus the largest other one: below 0, once the image is misread."""
    others = z.scatter(1, y[:, None], -math.inf)
    return own_logit(z, y) - others.amax(1)

def class_attack(z, y, k):
    """(3.47): up the output of class k, whatever the label's does."""
    return -own_logit(z, k)

def class_margin_attack(z, y, k):
    """Class k against the label."""
    return own_logit(z, y) - own_logit(z, k)

ATTACKS = {  # name: what is minimised, and whether once for each other class k
    "cross-entropy (3.46)": (entropy_attack, False),
    "margin": (margin_attack, False),
    "class by class (3.47)": (class_attack, True),
    "margin class by class": (class_margin_attack, True),
}

def test_step(state, net, x0, y, k, loss, a):
    """A step of PGD, in float32: verdicts are exact. state: images x [n, C, S, S]; which were misread [n]."""
    x, misread = state
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        z = net(x)
        (gradient,) = torch.autograd.grad(loss(z, y, k).sum(), x)
    misread = misread | (z.argmax(1) != y)
    return down(x.detach(), gradient, x0, a), misread

@torch.no_grad()
def attack(net, x0, y, k, loss, a):
    """PGD from images x0 [n, C, S, S] of labels y [n] -> where it ends, and whether any step was misread."""
    if not 0 <= x0.min() <= x0.max() <= 1:
        raise ValueError("an attack wants images in [0, 1]")
    none = torch.zeros_like(y, dtype=torch.bool)
    x, misread = repeat(test_step, (x0, none), a.steps, net, x0, y, k, loss, a)
    return x, misread | (net(x).argmax(1) != y)

def unbroken(run, net, x, y, K, still, loss, each, a):
    """Those of `still` [n] that no step of an attack misreads; each: one run for each class but y."""
    still = still.clone()
    for i in range(1, K if each else 2):
        for index in still.nonzero()[:, 0].split(run.chunk):
            if len(index):
                label = y[index]
                k = (label + i) % K
                _, misread = attack(net, x[index], label, k, loss, a)
                still[index] = ~misread
    return still

def likest_images(net, x, y, a):
    """(3.48): x [n, C, S, S] attacked by (3.47) towards each class but y; those of the largest d_k + c_k."""
    x0 = x.expand(net.d.K, *x.shape)
    made = repeat(training_step, x0, a.steps, net.d, x0, a, -1)  # for all classes at once
    n = torch.arange(len(x), device=x.device)
    reached = net.d(made) + net.c[:, None]  # [K, n]
    reached[y, n] = -math.inf
    return made[reached.argmax(0), n]

@torch.no_grad()
def source_attack(run, net, x, y, a):
    """Images that the source attacks with: the generative classifier by (3.48), the other by (3.46)."""
    if isinstance(net, Generative):
        return by_parts(lambda x, y: likest_images(net, x, y, a), x, run.chunk, y)
    return by_parts(lambda x, y: attack(net, x, y, y, entropy_attack, a)[0], x, run.chunk, y)

# --- training -----------------------------------------------------------------------------------------------

def lists_of(images, classes):
    """For each of classes: indices of its images; of all others, each class as often as the largest."""
    y = images.y.cpu()
    own = [(y == k).nonzero()[:, 0] for k in y.unique()]
    most = max(map(len, own))
    others = []
    as_many = [row.repeat(most // len(row) + 1)[:most] for row in own]
    for k in classes:
        others.append(torch.cat(as_many[:k] + as_many[k + 1 :]))
    return [own[k] for k in classes], others

def mixed(x, how):
    """MixUp or CutMix among the images of each list: x [K, n, C, S, S] -> the same."""
    kind = v2.MixUp if how == "mixup" else v2.CutMix
    mix = kind(num_classes=1)  # all images of a list have the same label
    label = torch.zeros(x.shape[1], dtype=torch.int64, device=x.device)
    return torch.stack([mix(images, label)[0] for images in x])

def draw_images(images, lists, batch, seed, t, augment):
    """Batch t of each list of indices, augmented -> [K, batch, C, S, S]."""
    picked = []
    for k, row in enumerate(lists):
        index = common.batch_index(len(row), batch, seed + 100 * k, t)
        picked.append(row[index])
    x = images.take(torch.cat(picked))
    if augment in ("crop", "auto"):
        x = common.crop_flip(x, seed + 101 * t, flip=len(x[0]) == 3)
    x = x.unflatten(0, (len(lists), batch))
    if augment == "auto":  # lists share the draw for their image i; within a list draws are independent
        policy = AutoAugment(AutoAugmentPolicy.CIFAR10)
        pixels = (255 * x).round().to(torch.uint8)
        x = torch.stack([policy(pixels[:, i]) for i in range(batch)], 1).float() / 255
    if augment in ("mixup", "cutmix"):
        x = mixed(x, augment)
    return x

@seeded
def train_d(run, s, name, train, classes, auxiliary=None):
    """d_k of these classes, all at once, by Eq. 3.39 or 3.45 -> Detectors, frozen. auxiliary: half of p0."""
    nets = []
    for _ in classes:
        net = common.make_net(s.net, 1, train.shape, s.width)
        nets.append(common.to_device(net, run.device).eval())
    d = Detectors(nets)
    optimizer = torch.optim.SGD(d.parameters(), s.lr, momentum=0.9, weight_decay=s.weight_decay)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(0.75 * s.updates)])
    own, others = lists_of(train, classes)
    out = Radius(s.eps_out, s.steps, s.eps_out / 5)
    into = Radius(s.eps_in, s.steps, s.eps_in / 5)
    made_from = {"d": d, "images": train, "auxiliary": auxiliary}
    made_from.update(common.pick(s, "updates batch lr weight_decay eps_out eps_in steps augment"))
    parts = {"d": d, "optimizer": optimizer, "schedule": schedule}
    training = Training(run, name, made_from, {"loss": 1e4}, **parts)
    for it in training.updates(s.updates):
        x = draw_images(train, own, s.batch, run.seed + 50, it - 1, s.augment)  # [K, batch, C, S, S]
        x_out = draw_images(train, others, s.batch, run.seed, it - 1, s.augment)
        if auxiliary:
            whole = [torch.arange(len(auxiliary))] * len(nets)
            half = draw_images(auxiliary, whole, s.batch // 2, run.seed + 7, it - 1, s.augment)
            x_out[:, : s.batch // 2] = half
        x_out = repeat(training_step, x_out, s.steps, d, x_out, out, -1)  # -1: up d_k
        if s.eps_in:
            x = repeat(training_step, x, s.steps, d, x, into, 1)
        with fast_precision(run.device):
            z, z_out = d(torch.cat([x, x_out], 1)).float().chunk(2, 1)  # [K, batch]
        inside = F.softplus(-z).mean(1)  # -log sigma(z)
        outside = F.softplus(z_out).mean(1)  # -log(1 - sigma(z_out))
        loss = (inside + outside) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.sum().backward()  # not the mean: each d_k gets the gradient that it would get alone
        optimizer.step()
        schedule.step()
        training.log(loss=loss.mean(), inside=z.mean(), outside=z_out.mean())
    return d.requires_grad_(False)

def adversary(net, x, y, a):
    """Adversarial training of the softmax classifier: images x attacked by (3.46), in eval mode."""
    was_training = net.training
    net.eval()
    x, _ = attack(net, x, y, y, entropy_attack, a)
    net.train(was_training)
    return x

def calibrate(d, images):
    """c of (3.43), by the cross-entropy of (3.42) on these images, which is convex -> [K]."""
    z = logits_of(d, images.take(slice(None)))
    c = torch.zeros(d.K, device=z.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([c], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(z + c, images.y)
        loss.backward()
        return loss
    optimizer.step(closure)
    return c.detach()  # of mean 0, as at the start: softmax sees differences alone

# --- what a person can see ----------------------------------------------------------------------------------

def class_seeds(images, k, n):
    """n draws from the Gaussian of class k's images [n, C, S, S], clipped to [0, 1]."""
    x = images.take((images.y == k).nonzero()[:, 0]).flatten(1).double()
    ridge = 1e-4 * torch.eye(x.shape[1], device=x.device)
    gaussian = torch.distributions.MultivariateNormal(x.mean(0), torch.cov(x.T) + ridge)
    x = gaussian.sample((n,)).float().clamp(0, 1)
    return x.unflatten(1, images.shape)

def make_like(run, net, x, k, steps, step):
    """Images [n, C, S, S] made more like classes k [n]: steps of this length up their outputs, in no ball."""
    a = Radius(1e6, steps, step)
    return by_parts(lambda x, k: attack(net, x, k, k, class_attack, a)[0], x, run.chunk, k)

def integrated_gradients(net, x, k, steps=100):
    """Each pixel's share of output k(x) - k(black): images [n, C, S, S], classes [n] -> the same shape.
    (Sundararajan et al. 2017), by the midpoint rule; the shares of an image sum to the difference.
    """
    total = torch.zeros_like(x)
    for i in range(steps):
        between = x * (i + 0.5) / steps
        total += input_gradient(lambda x: own_logit(net(x), k), between)
    return x * total / steps

def frechet_distance(mean1, cov1, mean2, cov2):
    """||m1 - m2||^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2) of two Gaussians, float64 [d], [d, d]."""
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return ((mean1 - mean2).pow(2).sum() + cov1.trace() + cov2.trace() - 2 * cross).item()

def auroc(positive, negative):
    """Probability that an in-distribution score [P] ranks above an out-distribution one [N]; ties: half."""
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive.contiguous())
    up_to = torch.searchsorted(ordered, positive.contiguous(), right=True)
    return (below + up_to).sum().item() / 2 / len(positive) / len(negative)

def auroc_row(title, positive, negative, **beside):
    """A row: AUROC, its interval, numbers of both."""
    positive, negative = positive.cpu(), negative.cpu()
    interval = common.bootstrap(auroc, positive, negative)
    beside.update(interval=interval, positive=len(positive), n=len(negative))
    return value(title, auroc(positive, negative), **beside)

def distance_of(run, s, train, K):
    """FID where Inception-V3's weights are at hand, else FD-cls: its name, and a function of images."""
    def classifier():
        net = "mnist_cnn" if train.shape[0] == 1 else "resnet18"
        build = partial(common.make_net, net, K, train.shape)
        return common.train_classifier(run, "classifier", build, train, s.cls_iters, 128)
    name, network = common.feature_network(train, run.data_dir, classifier)
    reference = train.take(common.shuffled(len(train), 321)[:50_000])
    mean, cov = common.feature_statistics(network, reference)
    def measure(x):
        return frechet_distance(mean, cov, *common.feature_statistics(network, x))
    return name, measure

# --- tables and figures -------------------------------------------------------------------------------------

@torch.no_grad()
def logits_of(net, x):
    """Outputs for images [n, C, S, S], in parts that fit the memory -> [n, K]."""
    return by_parts(net, x, 250)

def natural(net, x, y):
    """Which images [n, C, S, S] of labels y [n] are read rightly [n]."""
    return logits_of(net, x).argmax(1) == y

def table_3_14(run, s, test, nets, K):
    """Natural and robust accuracy of both classifiers under the same attacks.
    AUROC: are images after the source's attack told from clean ones by a lower largest output? .5: not.
    """
    x, y = test.some(s.images)
    a = test_attack(s, s.eps)
    rows = []
    for name, net in nets.items():
        right = worst = natural(net, x, y)
        size = sum(parameter.numel() for parameter in net.parameters())
        rows.append(rate(f"natural acc, {name}", right, parameters=size))
        for title, (loss, each) in ATTACKS.items():
            still = unbroken(run, net, x, y, K, right, loss, each, a)
            rows.append(rate(f"robust acc, {name}, {title}", still, eps=a.eps))
            worst = worst & still
        x_adv = source_attack(run, net, x, y, a)
        still = right & natural(net, x_adv, y)
        rows.append(rate(f"robust acc, {name}, source's attack", still, eps=a.eps))
        rows.append(rate(f"robust acc, {name}, worst", worst & still, eps=a.eps))
        clean = logits_of(net, x).amax(1)
        attacked = logits_of(net, x_adv).amax(1)
        rows.append(auroc_row(f"AUROC of the largest output, {name}", clean, attacked))
    return rows

def figure_3_7(run, s, test, nets, K):
    """Accuracy against the radius of attacks, both classifiers: the worst of four, and the source's.
    An image that is broken in a small ball is broken in a larger one, which holds the same image.
    """
    x, y = test.some(s.few)
    rows = []
    for name, net in nets.items():
        right = still = natural(net, x, y)
        for title in ("worst", "source's attack"):
            rows.append(rate(f"robust acc, {name}, {title}", still, eps=0.0))
        for factor in (0.5, 1, 1.5, 2, 3):
            a = test_attack(s, factor * s.eps)
            for loss, each in ATTACKS.values():
                still = unbroken(run, net, x, y, K, still, loss, each, a)
            by_source = right & natural(net, source_attack(run, net, x, y, a), y)
            still = still & by_source
            rows.append(rate(f"robust acc, {name}, worst", still, eps=a.eps))
            rows.append(rate(f"robust acc, {name}, source's attack", by_source, eps=a.eps))
    run.lines("figure3.7", rows, "eps", ylabel="accuracy")
    return rows

def table_3_15(run, s, train, test, nets, distance, K):
    """Frechet distance of samples and of counterfactuals to the training images, 7 and 10 steps."""
    metric, measure = distance
    each = max(s.samples // K, 1)
    seeds = torch.cat([class_seeds(train, k, each) for k in range(K)])
    k = torch.arange(K, device=seeds.device).repeat_interleave(each)
    x, y = test.some(len(k))
    starts = {"samples": (seeds, k), "counterfactuals": (x, (y + 1) % K)}
    rows = [value(f"{metric} seeds", measure(seeds))]
    for name, net in nets.items():
        for steps in (7, 10):
            for title, (start, target) in starts.items():
                made = make_like(run, net, start, target, steps, s.seed_step)
                row = value(f"{metric} {title}, {name}", measure(made), n=len(made), steps=steps)
                rows.append(row)
    rows.append(value(f"{metric} held-out data", measure(x)))
    return rows

def shown(run, s, figure, nets, title, x, k, columns, counted=slice(None)):
    """FIGURE.png: what ten steps towards classes k [n] make of images x [n, C, S, S], by both classifiers.
    Rows: of the counted images that one classifier made, the share that the other reads as meant."""
    judges = dict(zip(nets, reversed(nets.values())))
    pictures, rows = {title: x}, []
    for name, net in nets.items():
        made = make_like(run, net, x, k, 10, s.seed_step)
        pictures[name] = made
        meant = natural(judges[name], made, k)[counted]
        rows.append(rate(f"made by {name}, read as meant by the other", meant))
    run.pictures(figure, pictures, columns)
    return rows

def figure_3_8(run, s, train, nets, K):
    """Samples: draws from each class's Gaussian, and what ten steps towards the class make of them."""
    seeds = torch.cat([class_seeds(train, k, 4) for k in range(K)])
    k = torch.arange(K, device=seeds.device).repeat_interleave(4)
    return shown(run, s, "figure3.8", nets, "seeds", seeds, k, 20)

def figure_3_9(run, s, test, nets, K):
    """Counterfactuals: test images, and what ten steps towards each class make of them (own: not counted)."""
    x, y = test.some(5)
    k = torch.arange(K, device=x.device).repeat(5)
    other = k != y.repeat_interleave(K)
    return shown(run, s, "figure3.9", nets, "test images", x.repeat_interleave(K, 0), k, K, other)

def figure_3_10(run, s, test, nets):
    """Integrated gradients of the label's output: which pixels speak for the class."""
    x, y = test.some(10)
    pictures = {"test images": x}
    for name, net in nets.items():
        shares = integrated_gradients(net, x, y)
        most = shares.abs().amax((1, 2, 3), True).clamp(min=1e-12)
        pictures[f"{name}: black against, white for"] = 0.5 + shares / most / 2
    run.pictures("figure3.10", pictures, 10)
    return []

def table_3_16(train, test, d, c):
    """Accuracy without and with the calibration constants."""
    rows = []
    for title, images in (("train", train), ("test", test)):
        x, y = images.some(10_000)
        for name, constants in (("before", 0 * c), ("after", c)):
            right = natural(Generative(d, constants), x, y)
            rows.append(rate(f"{title} acc, {name} calibration", right))
    return rows

def table_3_17(c):
    """The calibration constants."""
    return [value(f"c_{k + 1}", number) for k, number in enumerate(c.tolist())]

def figure_3_11(run, test, d):
    """Histograms of d_k for images of class k and of the others; the first three classes, d_1 to d_3."""
    x, y = test.some(2000)
    z = logits_of(d, x)
    panels, rows = {}, []
    for k in range(3):
        own = z[y == k, k]
        others = z[y != k, k]
        panels[f"d_{k + 1}"] = {"its class": own, "others": others}
        rows.append(auroc_row(f"AUROC of d_{k + 1}, clean", own, others))
    run.histograms("figure3.11", panels)
    return rows

def effect(run, s, train, test, name, title, **beside):
    """Two rows: AUROC of the first three d_k (mean; trained without --auxiliary) for clean images, and where
    both sides are attacked."""
    classes = range(3)
    d = train_d(run, replace(s, updates=s.ablation), name, train, classes)
    inside, outside = lists_of(test, classes)
    n = min(s.few, *map(len, inside))
    x = draw_images(test, inside, n, 3, 0, "none")  # [3, n, C, S, S]
    x_out = draw_images(test, outside, n, 4, 0, "none")
    a = test_attack(s, s.eps)
    rows = []
    beside["parameters"] = sum(part.numel() for part in d.parameters()) // len(classes)  # of one d_k
    for kind, steps in (("standard", 0), ("adversarial", s.test_steps)):
        x = repeat(training_step, x, steps, d, x, a, 1)
        x_out = repeat(training_step, x_out, steps, d, x_out, a, -1)
        with torch.no_grad():
            z, z_out = d(x), d(x_out)
        areas = [auroc(one, other) for one, other in zip(z, z_out)]
        mean = sum(areas) / len(areas)
        rows.append(value(f"{kind} AUC, {title}", mean, n=n, eps=a.eps, **beside))
    return rows

def figure_3_12(run, s, train, test):
    """How large d_k has to be, with and without weight decay."""
    rows = []
    for decay in (0.0, 1e-4):
        for factor in (1, 1.5, 2, 3):
            changed = replace(s, width=factor * s.width, weight_decay=decay)
            name = f"width-{changed.width:g}-decay-{decay:g}"
            title = f"weight decay {decay:g}"
            rows += effect(run, changed, train, test, name, title, width=changed.width)
    run.lines("figure3.12", rows, "width", ylabel="AUC")
    return rows

def figure_3_13(run, s, train, test):
    """The radius of attacks in training, eps_out."""
    rows = []
    for factor in (0, 1 / 3, 2 / 3, 1, 5 / 3):
        changed = replace(s, eps_out=factor * s.eps_out)
        name = f"eps-out-{changed.eps_out:.2g}"
        rows += effect(run, changed, train, test, name, "eps_out", eps_out=changed.eps_out)
    run.lines("figure3.13", rows, "eps_out", ylabel="AUC")
    return rows

def figure_3_14(run, s, train, test):
    """Augmentation of training images; MixUp and CutMix, among images of one side, are not in the source."""
    rows = []
    for how in ("none", "crop", "auto", "mixup", "cutmix"):
        if how == "auto" and train.shape[0] != 3:
            continue  # AutoAugment's policy is for colour images
        rows += effect(run, replace(s, augment=how), train, test, f"augment-{how}", how)
    return rows

def figure_3_15(run, s, train, test):
    """Attacks on other classes alone (3.39), and on the class itself too, as large (3.45), in training."""
    rows = []
    for title, eps_in in (("(3.39)", 0.0), ("(3.45)", s.eps_out)):
        rows += effect(run, replace(s, eps_in=eps_in), train, test, f"eps-in-{eps_in:g}", title)
    return rows

EXPERIMENTS = common.experiments(  # main() hands each what its parameters name
    headline=[table_3_14, figure_3_7, figure_3_9, table_3_16, figure_3_11],
    others=[
        table_3_15,
        table_3_17,
        figure_3_8,
        figure_3_10,
        figure_3_12,
        figure_3_13,
        figure_3_14,
        figure_3_15,
    ],
)

# --- command line -------------------------------------------------------------------------------------------

def get_args(argv=None):
    args = common.parse_args(__doc__, SETTINGS, EXPERIMENTS, argv)
    s = args.settings
    common.at_least(1, s, "batch updates soft_batch soft_updates steps test_steps")
    common.at_least(1, s, "few samples cls_iters ablation")
    common.at_least(0, s, "weight_decay eps_in")
    common.at_least(2, s, "images")
    common.above_0(s, "width soft_width lr eps eps_out soft_eps seed_step")
    if s.augment not in ("none", "crop", "auto", "mixup", "cutmix"):
        raise UserError(f"--augment {s.augment}: known are none, crop, auto, mixup, cutmix")
    if s.calibrate not in ("validation", "test"):
        raise UserError(f"--calibrate {s.calibrate}: known are validation, test")
    return args

def chosen(images, index):
    """These images alone, in this order."""
    return common.Images(images.x[index], images.y[index], images.name)

def main(argv=None):
    args = get_args(argv)
    s = args.settings
    data, test = common.train_and_test(args, s.batch, s.images)
    if data.y.min() == data.y.max():
        raise UserError(f"{args.dataset}: all images are of one class")
    if s.augment == "auto" and data.shape[0] != 3:
        raise UserError("--augment auto is for colour images")
    first, rest = common.shuffled(len(data), 123).tensor_split([len(data) // 6])
    validation, train = chosen(data, first), chosen(data, rest)
    common.make_net(s.net, 1, data.shape, s.width)  # an error is said before any work
    K = int(data.y.max()) + 1
    build = partial(common.make_net, s.soft_net, K, data.shape, s.soft_width)
    build()
    a = Radius(s.soft_eps, s.steps, s.soft_eps / 5)
    attacked = {"adversary": partial(adversary, a=a), "made_from": {"attack": a}}
    if data.shape[0] == 3:
        attacked.update(sgd=0.1, augment="crop_flip")
    auxiliary = None
    if s.auxiliary != "none":
        auxiliary = common.load_on_device(args, s.auxiliary, "train", *data.shape[:2])
    run = common.Run("gen_classify", args)
    run.chunk = run.chunk // K + 1  # each image meets K networks
    d = once(lambda: train_d(run, s, "d", train, range(K), auxiliary))
    held_out = {"validation": validation, "test": test}[s.calibrate]
    c = once(lambda: calibrate(d(), held_out))
    @once
    def nets():
        updates, batch = s.soft_updates, s.soft_batch
        softmax = common.train_classifier(run, "softmax", build, train, updates, batch, **attacked)
        return {"generative": Generative(d(), c()), "softmax": softmax}
    distance = once(lambda: distance_of(run, s, train, K))
    run.experiments(EXPERIMENTS, train=train, test=test, d=d, c=c, nets=nets, distance=distance, K=K)

if __name__ == "__main__":
    common.call(main)
