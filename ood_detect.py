r"""Worst-case out-of-distribution detection: does an image belong to the training data, even after an attack?

Source: Yin 2022, "Generative Modeling With Adversarial Training", section 3.3.

A detector gives an image a score: high for images like the training data (in-distribution), low for others
(out-distribution). Many detectors tell clean images apart well. But an attack, a search for a small change of
an image that raises its score, makes them accept nearly anything. The worst case is how well a detector still
tells images apart once they have been attacked. Here the detector is a network with one output for an image,
f: a binary classifier of the data (1) against p0, pictures of other things (0). Before every update PGD
(projected gradient descent: steps along the gradient, kept inside a ball) pushes the images of p0 up f and
those of the data down f. An attack on the trained detector then finds little that was not tried before.

    f: logit, HIGH = in-distribution. Pixels are in [0, 1]; lengths are l_2 over a whole image.
    (3.36)  minimise E_data[-log sigma(f(x'))] + E_p0[-log(1 - sigma(f(x*)))], sigma the logistic function;
            x* maximises f in the ball of radius --eps-out around an image of p0,
            x' minimises f in the ball of radius --eps-in around an image of the data
    AUROC       probability that a data image scores higher than an out-distribution image; ties one half
    worst case  AUROC when each out-distribution image is replaced by the highest-scoring image that attacks
                found in the ball of radius --eps around it; the data are clean

Peers, each trained here on the same images with the same network:
    softmax            a classifier of the data's classes. Two scores: its largest probability's log odds, and
                       the logsumexp of its outputs (-1 times the "free energy")
    Outlier Exposure   a classifier that is also taught to give images of p0 equal probabilities
    binary             Eq. 3.36 without attacks
    RATIO              a classifier taught on attacked data, and equal probabilities on attacked p0

Attacks in tests: Auto-PGD (Croce and Hein 2020), PGD with momentum that halves its steps where they stop to
help and goes back to its best image; PGD with constant steps; in tables the images that fooled others, too.

Commands (two cores; all numbers: results/ood_detect.md):
    python ood_detect.py                      5 minutes: worst-case AUROC on symbols .86, softmax .43
    python ood_detect.py --only eps-sweep     AUROC of all methods against the radius of the attack
    python ood_detect.py --dataset mnist      56 minutes of one core: .63, .42; --dataset cifar10: a GPU
    python ood_detect.py --dataset celebahq --only table3.13   the model of at_gen.py, on large pictures
The log. loss: what is minimised. inside, outside: mean score of the data and of p0, after any attack.

Differs: the source's p0, 80 Million Tiny Images, is withdrawn; here it is Tiny ImageNet's first 150 classes,
not cleaned of look-alikes of the data, or letters. p0's other classes are an out-distribution set; some have
an upper-case twin in p0. RATIO and Outlier Exposure have this method's radii, network and updates.
"""
import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import common  # before torch, so that Ctrl-C ends even its import quietly
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from common import Images, Training, UserError, batches, by_parts, fast_precision, input_gradient
from common import load_images, once, repeat, seeded, value

# --- settings -----------------------------------------------------------------------------------------------

SETTINGS = common.settings(  # a row: a value for each column, then its help
    columns=("glyphs", "mnist fashion_mnist", "cifar10 celebahq afhq_cat lsun_church",
             "cifar10-paper celebahq-paper afhq_cat-paper lsun_church-paper"),
    smoke=dict(width=0.1, batch=4, updates=2, steps_in=2, steps_out=2, images=6, iterations=4, restarts=1),
    net=("mnist_cnn", "mnist_cnn", "resnet18", "resnet50", "the network of all methods"),
    width=(0.5, 0.5, 0.5, 1.0, "multiplies its channels"),
    p0=("letters:36", "letters:36", "tinyimagenet:150", "tinyimagenet:150",
        "a data set by name, or NAME:n for its first n classes; the others are then a test set"),
    augment=("none", "none", "auto", "auto", "auto: crop, flip, AutoAugment, Cutout; none"),
    batch=(50, 50, 128, 128, "data images, and as many of p0, in an update"),
    updates=(500, 1600, 6000, 156_000, "of each network; the source has 400 epochs"),
    lr=(0.05, 0.05, 0.1, 0.1, "constant rate of SGD, Nesterov momentum .9"),
    eps_in=(1.0, 1.0, 0.25, 0.25, "radius of attacks on the data in training"),
    eps_out=(2.0, 2.0, 0.5, 0.5, "radius of attacks on p0 in training"),
    steps_in=(10, 10, 10, 10, "PGD steps of attacks on the data in training"),
    steps_out=(10, 10, 10, 20, "PGD steps of attacks on p0; the text has 10, the published code 20"),
    step=(0.4, 0.4, 0.1, 0.1, "length of a PGD step in training"),
    eps=(2.0, 2.0, 1.0, 1.0, "radius of attacks in tests"),
    iterations=(40, 100, 100, 100, "of an attack in tests"),
    restarts=(1, 2, 5, 5, "random starts of Auto-PGD"),
    images=(200, 400, 1000, 1024, "test images, and as many of each other set"),
)
TPR = 0.95  # share of data images that a threshold accepts
LARGE = ("celebahq", "afhq_cat", "lsun_church")  # folders of pictures: table3.13 alone
OTHERS = {  # the out-distribution of a data set; figures show the first that is at hand
    "glyphs": ("symbols", "letters", "noise"),
    "mnist": ("symbols", "letters", "fashion_mnist", "noise"),
    "fashion_mnist": ("symbols", "letters", "mnist", "noise"),
    "cifar10": ("svhn", "cifar100", "tinyimagenet", "noise"),
    **dict.fromkeys(LARGE, ("svhn", "cifar10", "imagenet", *LARGE, "noise")),
}

# --- scores: high for images like the data ------------------------------------------------------------------

def logit(z):
    """f: the only output of a network [n, 1] -> [n]."""
    return z[:, 0]

def confidence(z):
    """log p / (1 - p) of the largest probability p: [n, K] -> [n]. Ranks as p does; no ties near p = 1."""
    top, k = z.max(1, keepdim=True)
    return top[:, 0] - z.scatter(1, k, -math.inf).logsumexp(1)

def free_energy(z):
    """Minus the free energy of a classifier: outputs [n, K] -> [n]."""
    return z.logsumexp(1)

class Detector(NamedTuple):
    """A network and what makes a score of its outputs; high for images like the data."""
    net: nn.Module
    score: object  # logit, confidence or free_energy

    @torch.no_grad()
    def __call__(self, x):
        """Scores of images [n, C, S, S] -> [n]."""
        return self.score(by_parts(self.net, x, 250).float())

# --- attacks ------------------------------------------------------------------------------------------------

class Ball(NamedTuple):
    """A search in the ball of radius eps; lengths in [0, 1] units."""
    norm: str  # inf or 2
    eps: float
    steps: int
    step: float = 0.0  # Auto-PGD finds its own
    momentum: float = 0.0  # share of the last move that is made again

def length(x):
    """l_2 length of each image [..., C, S, S] -> [..., 1, 1, 1]."""
    return torch.linalg.vector_norm(x, 2, (-3, -2, -1), True)

def project(x, x0, a):
    """x [..., C, S, S] back into [0, 1], then into the ball of radius a.eps around x0, which is in [0, 1]."""
    delta = x.clamp(0, 1) - x0
    if a.norm == "inf":
        return x0 + delta.clamp(-a.eps, a.eps)
    return x0 + delta * (a.eps / length(delta).clamp(min=a.eps))

def direction(gradient, norm):
    """Signs (inf), or the gradient at length 1 (2). A gradient of 0 moves nothing."""
    return gradient.sign() if norm == "inf" else gradient / length(gradient).clamp(min=1e-30)

def momentum_step(state, loss, x0, a, *loss_args):
    """A step down loss(x, *loss_args), then back into the ball. state: images x, sum of past directions m."""
    x, m = state
    with fast_precision(x.device):
        gradient = input_gradient(lambda x: loss(x, *loss_args), x)
    m = a.momentum * m + direction(gradient, a.norm)
    return project(x - a.step * m, x0, a), m

def momentum_pgd(loss, x0, a, *loss_args):
    """PGD from images x0 [B, C, S, S] in [0, 1] -> the images where it ends."""
    if not 0 <= x0.min() <= x0.max() <= 1:
        raise ValueError("an attack wants images in [0, 1]")
    return repeat(momentum_step, (x0, 0 * x0), a.steps, loss, x0, a, *loss_args)[0]

@torch.no_grad()
def apgd(loss, x0, a, start, *loss_args):
    """Auto-PGD (Croce and Hein 2020) down loss(x, *loss_args): the best image; a.step is not used."""
    x = best_x = start
    step = last_step = torch.full_like(x0[..., :1, :1, :1], 2 * a.eps)
    best = step + math.inf
    before = step - math.inf
    fell = 0  # how often the loss went down; .75, .22, .03, .06: constants of Auto-PGD
    period = checkpoint = max(round(0.22 * a.steps), 1)
    for t in range(a.steps):
        now = loss(x, *loss_args)[..., None, None, None]
        fell = fell + (now < before)
        best_x = torch.where(now < best, x, best_x)
        best = torch.minimum(best, now)
        before = now
        if t == checkpoint:  # halve steps that no longer help, and go back to the best image
            stuck = (fell <= 0.75 * period) | ((step == last_step) & (best >= last_best))
            last_best = best
            last_step = step
            fell = 0
            step = torch.where(stuck, step / 2, step)
            x = torch.where(stuck, best_x, x)
            period = max(period - round(0.03 * a.steps), round(0.06 * a.steps), 1)
            checkpoint += period
        gradient = input_gradient(lambda x: loss(x, *loss_args), x)
        z = project(x - step * direction(gradient, a.norm), x0, a)
        if t == 0:  # no momentum yet
            last_best, moved = best, z - x
        z = project(x + 0.75 * (z - x) + 0.25 * moved, x0, a)  # momentum
        x, moved = z, z - x
    last = loss(x, *loss_args)[..., None, None, None]
    return torch.where(last < best, x, best_x)

def on_sphere(x0, a):
    """A random start on the surface of the ball, clipped to [0, 1]."""
    return (x0 + a.eps * direction(torch.randn_like(x0), a.norm)).clamp(0, 1)

def score_loss(x, net, score, sign):
    """What attacks in tests minimise: minus the score (sign 1), or the score (sign -1) [n]."""
    return -sign * score(net(x))

def worst_case(detector, x0, a, restarts, sign=1):
    """Images near x0 [n, C, S, S] with the highest score that was found (sign -1: lowest), and it [n].
    Tried, image by image: the image itself, PGD with constant steps, Auto-PGD from random starts.
    """
    about = (detector.net, detector.score, sign)
    tried = [x0, momentum_pgd(score_loss, x0, a._replace(step=2 * a.eps / a.steps, momentum=0.75), *about)]
    for _ in range(restarts):
        tried.append(apgd(score_loss, x0, a, on_sphere(x0, a), *about))
    return best_of(detector, tried, sign)

def best_of(detector, tried, sign=1):
    """Of images tried[i][k] the one with the highest score for each k (sign -1: lowest), and that score."""
    best_x, best = tried[0], sign * detector(tried[0])
    for x in tried[1:]:
        score = sign * detector(x)
        best_x = torch.where((score > best)[:, None, None, None], x, best_x)
        best = torch.maximum(best, score)
    return best_x, sign * best

@seeded
def search(run, detector, x, a, restarts, sign=1):
    """worst_case() of images [n, C, S, S], in parts that fit the memory."""
    images, scores = [], []
    for part in x.split(run.chunk):
        worst_x, worst = worst_case(detector, part, a, restarts, sign)
        images.append(worst_x)
        scores.append(worst)
    return torch.cat(images), torch.cat(scores)

# --- training -----------------------------------------------------------------------------------------------

def class_loss(z, y, z_out):
    """Cross-entropy of the data's labels: outputs z [m, K], labels y [m]; p0 plays no part."""
    return F.cross_entropy(z, y)

def uniform_loss(z):
    """Cross-entropy to equal probabilities of all classes: outputs [m, K] -> [m]."""
    return -z.log_softmax(1).mean(1)

def exposure_loss(z, y, z_out):
    """Outlier Exposure (Hendrycks et al. 2019), with its weight of one half."""
    return F.cross_entropy(z, y) + uniform_loss(z_out).mean() / 2

def ratio_loss(z, y, z_out):
    """RATIO (Augustin et al. 2020), whose images were attacked before."""
    return F.cross_entropy(z, y) + uniform_loss(z_out).mean()

def binary_loss(z, y, z_out):
    """Eq. 3.36, half of it: the mean of 2m cross-entropies; z: f of the data [m, 1], z_out: of p0."""
    return (F.softplus(-z).mean() + F.softplus(z_out).mean()) / 2

def lower_logit(x, net, y):
    """Attack on the data: f [m]. Attacks in training get labels y, whether they need them or not."""
    return net(x)[:, 0]

def raise_logit(x, net, y):
    """Attack on p0: minus f [m]."""
    return -net(x)[:, 0]

def label_loss(x, net, y):
    """Takes images x [n, C, S, S] away from their labels: minus the cross-entropy [n]."""
    with fast_precision(x.device):
        z = net(x).float()
    return -F.cross_entropy(z, y, reduction="none")

def away_from_uniform(x, net, y):
    """RATIO's attack on p0: away from equal probabilities [m]."""
    return -uniform_loss(net(x))

class Method(NamedTuple):
    """What a network learns."""
    binary: bool  # one output, or one for each class
    loss: object  # of outputs for data, labels, outputs for p0
    inside: object = None  # what attacks on the data minimise; None: nothing is attacked
    outside: object = None  # what attacks on p0 minimise

METHODS = {
    "softmax": Method(False, class_loss),
    "exposure": Method(False, exposure_loss),
    "binary": Method(True, binary_loss),
    "ratio": Method(False, ratio_loss, label_loss, away_from_uniform),
    "adversarial": Method(True, binary_loss, lower_logit, raise_logit),
}
OURS = "in- and out-AT (3.36)"
DETECTORS = {  # a method's network and a score of its outputs
    "softmax, largest probability": ("softmax", confidence),
    "softmax, free energy": ("softmax", free_energy),
    "Outlier Exposure": ("exposure", confidence),
    "binary": ("binary", logit),
    "RATIO": ("ratio", confidence),
    OURS: ("adversarial", logit),
}

def augmented(x):
    """AutoAugment, a draw for eight images each, and for each image of x [B, 3, S, S] a square of 16 x 16 in
    one colour (Cutout)."""
    policy = AutoAugment(AutoAugmentPolicy.CIFAR10)
    x = torch.cat([policy(images) for images in (255 * x).round().to(torch.uint8).split(8)]).float() / 255
    mean = torch.tensor([0.4914, 0.4822, 0.4465], device=x.device).view(3, 1, 1)  # of CIFAR-10
    row, column = torch.randint(x.shape[-1], (2, len(x), 1), device=x.device)  # the square's middle
    place = torch.arange(x.shape[-1], device=x.device)
    inside_rows = (place >= row - 8) & (place < row + 8)
    inside_columns = (place >= column - 8) & (place < column + 8)
    square = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
    return torch.where(square, mean, x)

@seeded
def train(run, s, name, data, p0):
    """One of METHODS -> its network.
    It is in eval mode throughout: BatchNorm, where there is any, has to be the same function in the attack
    and in the update. So it keeps the mean 0 and the variance 1 of its start; its scales are learned.
    """
    method = METHODS[name]
    outputs = 1 if method.binary else int(data.y.max()) + 1
    net = common.to_device(common.make_net(s.net, outputs, data.shape, s.width), run.device).eval()
    optimizer = torch.optim.SGD(net.parameters(), s.lr, momentum=0.9, nesterov=True)
    attack_in = Ball("2", s.eps_in, s.steps_in, s.step)
    attack_out = Ball("2", s.eps_out, s.steps_out, s.step)
    made_from = {"net": net, "images": data, "p0": p0, **common.pick(s, "updates batch lr augment")}
    if method.inside:
        made_from["attacks"] = attack_in, attack_out
    training = Training(run, name, made_from, {"loss": 1e4}, net=net, optimizer=optimizer)
    crop = "crop_flip" if s.augment == "auto" else "none"
    stream = batches(data, s.batch, run.seed, training.it, crop, run.device)
    stream_p0 = batches(p0, s.batch, run.seed + 1, training.it, crop, run.device)
    for _ in training.updates(s.updates):
        x, index = next(stream)
        x_out, _ = next(stream_p0)
        y = data.y[index.to(data.y.device)].to(run.device)
        if s.augment == "auto":
            x, x_out = augmented(x), augmented(x_out)
        if method.inside:
            x = momentum_pgd(method.inside, x, attack_in, net, y)
            x_out = momentum_pgd(method.outside, x_out, attack_out, net, y)
        with fast_precision(run.device):
            z, z_out = net(torch.cat([x, x_out])).float().chunk(2)
        loss = method.loss(z, y, z_out)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        score = logit if method.binary else confidence
        training.log(loss=loss, inside=score(z).mean(), outside=score(z_out).mean())
    return net.requires_grad_(False)

# --- the models of at_gen.py, for large pictures ------------------------------------------------------------

class ResBlk(common.Residual):
    """Pre-activation residual block, no normalisation, that halves the side; the sum is divided by sqrt 2."""

    def __init__(self, c_in, c_out):
        super().__init__()
        relu, pool = nn.LeakyReLU(0.2), nn.AvgPool2d(2)
        first = nn.Conv2d(c_in, c_in, 3, 1, 1)
        second = nn.Conv2d(c_in, c_out, 3, 1, 1)
        skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1, bias=False)
        self.main = nn.Sequential(relu, first, pool, relu, second)
        self.shortcut = nn.Sequential(skip, pool)

    def forward(self, x):
        return super().forward(x) / math.sqrt(2)

class ResBlockD(nn.Module):
    """The D of Tab. 2.2, its stem 3x3 as in the source's code. [B, 3, side, side] -> [B, outputs].
    20,851,777 parameters at 256 pixels. Other powers of two: a stem of 2^14 / side channels, doubled by each
    block to at most 512, and log2(side) - 2 blocks, down to 4x4.
    """

    def __init__(self, side, outputs=1):
        super().__init__()
        if side < 8 or side & (side - 1):
            raise UserError(f"the residual D takes sides that are powers of two, 8 at least, not {side}")
        common.normalising(self, *common.IMAGENET)
        c = min(2**14 // side, 512)
        layers = [nn.Conv2d(3, c, 3, 1, 1)]
        while side > 4:
            layers.append(ResBlk(c, min(2 * c, 512)))
            c = min(2 * c, 512)
            side //= 2
        layers += [nn.LeakyReLU(0.2), nn.Conv2d(c, c, 4), nn.LeakyReLU(0.2), nn.Flatten()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(c, outputs)

    def forward(self, x):
        return self.head(self.body((x - self.mean) / self.std))

def at_gen_model(args):
    """f of at_gen.py's run on this data set, frozen, and the side of its pictures; trained if need be."""
    folder = args.out / f"at_gen-{args.dataset}"
    whole = (folder / "f.pt").exists() and (folder / "config.json").exists()  # else its run was cut short
    state = common.read_checkpoint(folder / "f.pt") if whole else {}
    if not state.get("finished") or (state["smoke"] and args.budget != "smoke"):
        command = [sys.executable, str(Path(__file__).with_name("at_gen.py")), "--only", "figure2.7"]
        for flag in "dataset budget out data-dir seed device".split():
            command += [f"--{flag}", str(getattr(args, flag.replace("-", "_")))]
        print(f"no finished model in {folder}; running {' '.join(command)}", flush=True)
        if subprocess.run(command).returncode:
            raise UserError(f"no model in {folder}; at_gen.py said why, above")
        state = common.read_checkpoint(folder / "f.pt")
    side = json.loads((folder / "config.json").read_text())["settings"]["side"]
    f = ResBlockD(side)
    f.load_state_dict(state["f"])
    return f.to(args.device).eval().requires_grad_(False), side

# --- images of the out-distribution -------------------------------------------------------------------------

def load_p0(args, shape, name, split="train"):
    """A data set in this shape (C, S, S); its first n classes where the name is NAME:n."""
    name, colon, n = name.partition(":")
    p0 = load_images(name, split, args.data_dir, *shape[:2]).to(args.device)
    if not colon:
        return p0
    if not n.isdecimal() or int(n) == 0 or not isinstance(p0, Images):
        raise UserError(f"--p0 {name}:{n}: expected NAME:n, the first n classes of a labelled set")
    kept = p0.y < int(n)
    return Images(p0.x[kept], p0.y[kept], f"{name}:{n}")

def single_colours(n, shape):
    """Images of one colour each, at random; of greys at most the 256 that there are: uint8 [n, C, S, S]."""
    g = torch.Generator().manual_seed(7)
    colours = torch.randint(0, 256, (n, shape[0]), generator=g)
    if shape[0] == 1:
        colours = torch.randperm(256, generator=g)[:n, None]
    return colours.to(torch.uint8)[:, :, None, None].expand(-1, *shape)

def smooth_noise(n, shape):
    """n images of noise on a grid of 4 x 4, enlarged: uint8 [n, C, S, S]."""
    g = torch.Generator().manual_seed(8)
    coarse = torch.rand(n, shape[0], 4, 4, generator=g)
    return (255 * F.interpolate(coarse, shape[1:], mode="bilinear")).round().to(torch.uint8)

def hashes(images):
    """Each image's bytes, hashed: a list of numbers."""
    return [hash(image.tobytes()) for image in images.x.cpu().numpy()]

def other_sets(args, s, data, test, p0):
    """Out-distribution test sets by name -> images [n, C, S, S], and how many were removed.
    Removed are images that stand, pixel for pixel, in p0 or in either split of the data. Of the data set that
    p0 comes from, p0's classes are left out.
    """
    seen = {*hashes(data), *hashes(test), *hashes(p0)}
    base, _, n = s.p0.partition(":")
    shape = data.shape
    found = {}
    for name in OTHERS[data.name]:
        if name in (s.p0, data.name):
            continue
        try:
            found[name] = common.load_on_device(args, name, "test", *shape[:2])
        except UserError as error:
            print(f"left out: {error}")
            continue
        if name == base:
            kept = found[name].y >= int(n)
            found[name] = Images(found[name].x[kept], found[name].y[kept], name)
    y = torch.zeros(s.images, dtype=torch.int64)
    found["smooth noise"] = Images(smooth_noise(s.images, shape), y, "smooth noise")
    plain = single_colours(s.images, shape)
    found["single colours"] = Images(plain, y[: len(plain)], "single colours")
    sets = {}
    for name, images in found.items():
        new = torch.tensor([number not in seen for number in hashes(images)], dtype=torch.bool)
        images = Images(images.x[new], images.y[new], name)
        if len(images):
            sets[name] = images.some(s.images)[0].to(args.device), int((~new).sum())
    return sets

# --- measures -----------------------------------------------------------------------------------------------

def auroc(positive, negative):
    """Probability that an in-distribution score [P] ranks above an out-distribution one [N]; ties: half."""
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive.contiguous())
    up_to = torch.searchsorted(ordered, positive.contiguous(), right=True)
    return (below + up_to).sum().item() / 2 / len(positive) / len(negative)

def false_positives(positive, negative):
    """Share of out-distribution scores [N] that the threshold accepts which accepts TPR of the others [P]."""
    threshold = positive.sort(descending=True).values[math.ceil(TPR * len(positive)) - 1]
    return (negative >= threshold).float().mean().item()

def area_row(title, positive, negative, **beside):
    """A row: AUROC, its interval, numbers of data and of others, false positive rate at a true one of .95."""
    positive, negative = positive.cpu(), negative.cpu()
    return value(
        title,
        auroc(positive, negative),
        interval=common.bootstrap(auroc, positive, negative),
        data=len(positive),
        n=len(negative),
        fpr95=false_positives(positive, negative),
        **beside,
    )

# --- tables and figures -------------------------------------------------------------------------------------

def table_3_12(run, s, test, sets, detectors):
    """AUROC of clean images and in the worst case, for each method and each out-distribution set.
    removed: images that were known. data_attacked: AUROC where the data are attacked and the others clean.
    """
    a = Ball("2", s.eps, s.iterations)
    x_in = test.some(s.images)[0]
    inside, lowered = {}, {}
    for name, detector in detectors.items():
        inside[name] = detector(x_in)
        _, lowered[name] = search(run, detector, x_in, a, s.restarts, -1)
    rows = []
    for title, (x, removed) in sets.items():
        fooling = [search(run, detector, x, a, s.restarts)[0] for detector in detectors.values()]
        for name, detector in detectors.items():
            clean = detector(x)
            _, worst = best_of(detector, fooling)  # its own images, and those that fooled the others
            rows.append(area_row(f"AUROC {title}, {name}", inside[name], clean, removed=removed))
            reverse = auroc(lowered[name], clean)
            row = area_row(f"worst-case AUROC {title}, {name}", inside[name], worst, eps=a.eps)
            rows.append({**row, "data_attacked": reverse})
    return rows

def table_3_13(run, s, test, sets, detectors):
    """The models of at_gen.py on large pictures, attacked within a radius of 7 at 256 pixels, whatever --eps
    says. removed: images of the test split (the training split is not searched)."""
    return table_3_12(run, replace(s, eps=7 * test.shape[1] / 256), test, sets, detectors)

def first_set(sets):
    """The first out-distribution set: its name, its images."""
    title, (x, _) = next(iter(sets.items()))
    return title, x

def eps_sweep(run, s, test, sets, detectors):
    """AUROC of the first out-distribution set under attacks on the detector itself, against their radius, one
    restart. (Table 3.12's worst case also has images that fooled other detectors.)"""
    title, x = first_set(sets)
    x_in = test.some(s.images)[0]
    rows = []
    for name, detector in detectors.items():
        inside = detector(x_in)
        for factor in (0, 0.125, 0.25, 0.5, 1, 1.5, 2):
            a = Ball("2", factor * s.eps, s.iterations)
            scores = search(run, detector, x, a, 1)[1] if factor else detector(x)
            rows.append(area_row(name, inside, scores, eps=a.eps, set=title))
    run.lines("eps-sweep", rows, "eps", ylabel=f"AUROC under attack, {title}")
    return rows

def steps(run, s, test, sets, detectors):
    """AUROC of the method under attacks on itself, against their iterations, and against restarts."""
    title, x = first_set(sets)
    detector = detectors[OURS]
    inside = detector(test.some(s.images)[0])
    rows = []
    for factor in (0.1, 0.2, 0.5, 1, 2, 4):
        a = Ball("2", s.eps, max(round(factor * s.iterations), 2))
        _, scores = search(run, detector, x, a, 1)
        rows.append(area_row("one restart", inside, scores, iterations=a.steps, set=title))
    for restarts in (0, 1, 2, 5, 10):
        a = Ball("2", s.eps, s.iterations)
        _, scores = search(run, detector, x, a, restarts)
        rows.append(area_row("more restarts", inside, scores, restarts=restarts, set=title))
    run.lines("steps", rows[:6], "iterations", xscale="log", ylabel=f"AUROC under attack, {title}")
    return rows

def histogram(run, s, test, sets, detectors):
    """Scores of the data, of the first out-distribution set, and of its images attacked (one restart)."""
    title, x = first_set(sets)
    x_in = test.some(s.images)[0]
    a = Ball("2", s.eps, s.iterations)
    panels, rows = {}, []
    for name in ("softmax, free energy", "binary", OURS):
        detector = detectors[name]
        _, worst = search(run, detector, x, a, 1)
        panels[name] = {"data": detector(x_in), title: detector(x), f"{title}, attacked": worst}
        for label, scores in panels[name].items():
            rows.append(value(f"mean score, {label}, {name}", scores.mean().item(), n=len(scores)))
    run.histograms("histogram", panels)
    return rows

def gallery(run, s, sets, detectors):
    """The 20 images of the first set that score highest once attacked, under attacks of growing radius."""
    title, x = first_set(sets)
    pictures, rows = {}, []
    for name in ("softmax, largest probability", OURS):
        detector = detectors[name]
        _, scores = search(run, detector, x, Ball("2", s.eps, s.iterations), 1)
        first = scores.argsort(descending=True)[:20]
        pictures[f"{name}: {title}"] = x[first]
        for factor in (1, 3, 6):
            a = Ball("2", factor * s.eps, s.iterations)
            found, scores = search(run, detector, x[first], a, 1)
            pictures[f"{name}: attacked, eps {a.eps:g}"] = found
            mean = scores.mean().item()
            rows.append(value(f"mean score of the pictures, {name}", mean, eps=a.eps, n=len(first)))
    run.pictures("gallery", pictures, 20)
    return rows

EXPERIMENTS = common.experiments(  # main() hands each what its parameters name
    headline=[table_3_12, histogram, gallery],
    others=[table_3_13, eps_sweep, steps],
)

# --- command line -------------------------------------------------------------------------------------------

def get_args(argv=None):
    args = common.parse_args(__doc__, SETTINGS, EXPERIMENTS, argv)
    s = args.settings
    common.at_least(1, s, "batch updates")
    common.at_least(0, s, "steps_in steps_out restarts")
    common.at_least(2, s, "images iterations")
    common.above_0(s, "width lr step eps eps_in eps_out")
    if s.augment not in ("none", "auto"):
        raise UserError(f"--augment {s.augment}: known are none, auto")
    if (args.dataset in LARGE) != (args.only == ["table3.13"]):
        raise UserError(f"--only table3.13 is for {', '.join(LARGE)}, which have nothing else")
    return args

def main(argv=None):
    args = get_args(argv)
    s = args.settings
    if args.dataset in LARGE:
        load_images(args.dataset, "test", args.data_dir)  # an error is said before any training
        f, side = at_gen_model(args)
        test = common.load_on_device(args, args.dataset, "test", None, side)
        sets = other_sets(args, replace(s, p0="none"), test, test, test)
        run = common.Run("ood_detect", args, side, p0="that of at_gen.py")
        model = {"AT generative model": Detector(f, logit)}
        return run.experiments(EXPERIMENTS, test=test, sets=sets, detectors=model)
    data, test = common.train_and_test(args, s.batch, s.images)
    if s.augment == "auto" and data.shape[0] != 3:
        raise UserError("--augment auto is for colour images")
    p0 = load_p0(args, data.shape, s.p0)
    common.make_net(s.net, 1, data.shape, s.width)  # an error is said before any work
    run = common.Run("ood_detect", args, p0=s.p0)
    nets = {}
    for name in METHODS:
        nets[name] = once(partial(train, run, s, name, data, p0))
    @once
    def detectors():
        made = {}
        for name, (method, score) in DETECTORS.items():
            made[name] = Detector(nets[method](), score)
        return made
    sets = once(lambda: other_sets(args, s, data, test, p0))
    run.experiments(EXPERIMENTS, test=test, sets=sets, detectors=detectors)

if __name__ == "__main__":
    common.call(main)
