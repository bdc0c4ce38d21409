r"""AT generative model: an energy learned by binary adversarial training, and images made by attacking it.

Source: Yin 2022, "Generative Modeling With Adversarial Training", chapter 2 ("the dissertation").

An energy-based model (EBM) is a density p(x) ~ exp f(x), f (minus the energy) a network that gives each
image one number. Here f is the logit of a binary classifier D = sigmoid(f), high where images look like the
training data. An attack follows the gradient of f with respect to the image (PGD, projected gradient
descent: some steps of fixed length, each followed by a return into the allowed range). D is trained to tell
data from images of another set, p0 (letters, other photographs), after these were attacked: pushed uphill by
K steps. Where the attack arrives, f is then pressed down, unless data hold it up. What stays highest (f = 0,
D = 1/2) is the support of the data, and from far away the gradient of f leads there. So in the end such an
attack, farther than in training, turns an image of p0 into a sample. Unlike EBM training by Langevin sampling
it adds no noise and keeps no samples between updates. The same ascent, a shorter way, cleans a noisy image
and fills a hole (nothing is trained for that), and it carries images of other domains into the data's.

    f(x) logit, HIGH = in-distribution. Pixels in [0, 1]; step and eps are l_2 lengths of the whole image.

    (2.8)   x_{i+1} = x_i + step * g / ||g||_2,  g = grad_x f(x_i),  then clamped to [0, 1]    (unbounded PGD)
    (2.7)   the same, projected onto the ball of radius eps around x_0                         (finite --eps)
    (2.11)  J(D) = E_data[log D(x)] + E_p0[log(1 - D(x_K))], x_K: x_0 of p0 after K steps      (maximised)
    (2.18)  dJ = E_data[(1 - D) df] - E_p0[D df], d by the weights, x_K held fixed. An EBM has it without the
            factors 1 - D and D (2.2), which vanish where D is sure and right: there AT stops pushing.
    Prop. 1 If the attack lowers J as far as it can while D raises it, the optimum is J = -log 4: D = 1/2 on
            the support of the data, and at most 1/2 elsewhere.
    Alg. 3  For K = 0 (no attack), 1, ..., N: some updates against attacks of K steps, with one optimiser
            throughout. Alg. 1 is the same with one fixed K.
    R1      We minimise -J/2, the mean of 2m cross-entropies, + gamma/2 E_data ||grad_x f(x)||^2; m: --batch.

Commands (two cores; all numbers: results/at_gen.md):
    python at_gen.py                      7 min: FD-cls of samples 24, of p0 136, of held-out data 1.6
    python at_gen.py --dataset mnist      17 min of one core: the same, 13, 57 and 1.5 (older code)
    python at_gen.py --only figure2.12    24 min of one slow core: digits to letters, by a second model
    python at_gen.py --input photos --task denoise --output clean    the trained model, your own pictures
    python at_gen.py --dataset cifar10    a GPU; --budget paper: Tab. 2.3, 2.4 (FID of the source 13.2)
Ablations are commands, each with its --out: --k-min 5 --k-max 5 --iters-per-k 2730 (figures 2.4 and 2.5),
--r1 0, --pretrain 300 (figure 2.6). Church at 64 pixels: --budget paper --side 64, steps a quarter as long.

The log. loss starts at log 2 = .693, falls while K is small, then climbs back towards log 2, its value at
the optimum; an f that learns nothing has it, too, so look at fd. f_data and f_adv, mean logits of data and of
attacked p0, come together. auc_adv, their AUROC, sinks towards 1/2: f can't tell the two apart. moved:
distance from x_0 to x_K over K * step. r1: the penalty over gamma. fd: FD-cls of 500 samples.

Differs from the source: p0 of 32x32 is Tiny ImageNet downscaled (80 Million Tiny Images, the source's, is
withdrawn). FD-cls, a Frechet distance in features of the data set's own classifier (low = alike), stands
for FID for grey images and where Inception-V3's weights are not at hand; they are torchvision's. Networks
for 256 pixels are pretrained here (--pretrain; the source's are not published) with the classes as outputs
of a last layer that is then replaced. The last model is reported, not the one of best FID. BatchNorm's
statistics stay at mean 0 and variance 1 (or as pretrained), as in the source's code. The published
CIFAR-10 model also attacked the data, downwards; the text does not say so. Noise has deviation 0.1 (then a
clamp); the hole is a grey square in the middle, 3/8 of the side. The source gives no hole and no steps.
"""

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import common  # before torch, so that Ctrl-C ends even its import quietly
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.functional import gaussian_blur, to_pil_image
from torchvision.utils import make_grid

from common import Images, Training, UserError, batches, fast_precision, input_gradient
from common import load_images, once, rate, repeat, seeded, value

# --- settings -----------------------------------------------------------------------------------------------

SETTINGS = common.settings(
    columns=("glyphs", "mnist fashion_mnist", "cifar10", "celebahq afhq_cat lsun_church",
             "cifar10-paper", "celebahq-paper", "afhq_cat-paper", "lsun_church-paper"),
    smoke=dict(width=0.125, batch=4, k_max=2, iters_per_k=2, sample_steps=2, images=24, reference=64,
               cls_width=0.125, cls_iters=3),
    # a row: a value for each column, or one for all; then its help. The model
    net=("plain", "plain", "resnet18", "resblock_d", "resnet50", "resblock_d", "resblock_d", "resblock_d",
         "the body of f: plain, resnet18, resnet50, resblock_d (Tab. 2.2), mnist_cnn"),
    width=(0.5, 0.5, 0.5, 1, 1, 1, 1, 1, "multiplies the channels of all but resblock_d"),
    side=(28, 28, 32, 64, 32, 256, 256, 256, "pixels; images of another size are resized"),
    # training: Alg. 3, Tab. 2.3
    p0=("letters", "letters", "tinyimagenet", "imagenet", "tinyimagenet", "imagenet", "imagenet", "imagenet",
        "a data set by name, or NAME:n for its first n classes"),
    augment=("none", "none", "crop_flip", "medium", "crop_flip", "mild", "medium", "medium",
             "of the data: none, crop, crop_flip; of large pictures rrc (resized crop), mild, medium"),
    augment_p0=("none", "none", "crop_flip", "rrc", "crop_flip", "rrc", "rrc", "rrc", "the same, for p0"),
    batch=(48, 48, 32, 16, 32, 40, 40, 32, "m: data images, and as many of p0, in an update"),
    lr=(5e-4, 5e-4, 5e-4, 5e-5, 5e-4, 5e-5, 5e-5, 5e-5, "of Adam, betas (0, 0.99)"),
    k_min=(0, "first K; k_min = k_max is Alg. 1"),
    k_max=(20, 20, 25, 25, 25, 40, 25, 35, "N, the last K"),
    iters_per_k=(130, 250, 300, 40, 6615, 5317, 8654, 5972,
                 "updates with each K; paper: Tab. 2.3's iterations in all"),
    step=(1.0, 1.0, 0.1, 0.5, 0.1, 2.0, 2.0, 2.0, "length of the attack's step"),
    eps=(math.inf, "radius of the ball of Eq. 2.7; inf: Eq. 2.8"),
    r1=(0.01, 0.01, 0.01, 5.0, 0.01, 30.0, 100.0, 100.0, "gamma of R1"),
    pretrain=(0, 0, 0, 0, 0, 100_000, 100_000, 100_000,
              "updates of a classifier of p0's classes before, whose layers f starts from; 0: from scratch"),
    # generation and evaluation: Tab. 2.4
    sample_steps=(30, 30, 32, 20, 32, 20, 14, 17, "PGD steps from an image of p0 to a sample"),
    sample_step=(1.0, 1.0, 0.2, 2.0, 0.2, 8.0, 8.0, 8.0, "length of each (l_2)"),
    images=(2000, 2000, 5000, 200, 50_000, 50_000, 50_000, 50_000, "samples in an evaluation"),
    reference=(8000, 10_000, 10_000, 1000, 50_000, 30_000, 30_000, 126_227,
               "training images (at most) that a Frechet distance compares with"),
    cls_width=(1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, "width of the classifier behind FD-cls"),
    cls_iters=(300, 600, 2000, 1, 8000, 1, 1, 1, "its updates, batch 128; unused where there are no labels"),
    # restoration and translation: sec. 2.5.3
    restore_step=(0.25, 0.25, 0.1, 1.0, 0.1, 1.0, 1.0, 1.0, "length of a step that restores an image"),
    denoise_steps=(10, "steps that denoise an image"),
    inpaint_steps=(20, "steps that fill a hole"),
    foreign=("letters", "glyphs", "tinyimagenet", "afhq_cat", "tinyimagenet", "afhq_cat", "celebahq",
             "celebahq", "another domain: its images are carried into the data's, and the data's into it"),
    gif=(False, "also write figure 2.11 as a film"),
    input=("", "apply the trained model to the pictures in this folder, instead of experiments"),
    task=("generate", "generate, translate (the same), denoise, inpaint (cuts a hole in the middle)"),
    output=("", "a new folder for the results of --input"),
)
PIXELS = 2**20  # largest batch x side^2 of a slice
BACK = {"letters": "symbols", "glyphs": "letters", "tinyimagenet": "cifar100"}  # p0 of the second model
OTHER_P0 = {"letters": ["letters:4", "noise"], "tinyimagenet": ["tinyimagenet:10", "noise"]}

# --- the model: f -------------------------------------------------------------------------------------------

class PlainCNN(nn.Module):
    """Six convolutions, leaky ReLU, no normalisation; side a multiple of 4. [B, C, side, side] -> [B, 1]."""

    def __init__(self, width, channels, side, outputs=1):
        super().__init__()
        w = width
        self.body = nn.Sequential(
            nn.Conv2d(channels, w, 3, 1, 1), nn.LeakyReLU(0.2),  # side
            nn.Conv2d(w, 2 * w, 4, 2, 1), nn.LeakyReLU(0.2),  # side / 2
            nn.Conv2d(2 * w, 2 * w, 3, 1, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * w, 4 * w, 4, 2, 1), nn.LeakyReLU(0.2),  # side / 4
            nn.Conv2d(4 * w, 4 * w, 3, 1, 1), nn.LeakyReLU(0.2),
        )
        self.head = nn.Conv2d(4 * w, outputs, side // 4)  # 1

    def forward(self, x):
        return self.head(self.body(2 * x - 1)).flatten(1)

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

def build_f(s, shape, outputs=1):
    """An untrained f for images of this shape (C, S, S)."""
    if s.net == "plain":
        return PlainCNN(max(round(32 * s.width), 1), shape[0], shape[1], outputs)
    if s.net == "resblock_d":
        return ResBlockD(shape[1], outputs)
    return common.make_net(s.net, outputs, shape, s.width)

def pretrain(run, s, f, p0):
    """Sec. 2.4.5: f takes over all layers but its last from a classifier of p0's classes."""
    build = partial(build_f, s, p0.shape, int(p0.y.max()) + 1)
    name = f"pretrained-{p0.name.replace(':', '-')}"
    classifier = common.train_classifier(run, name, build, p0, s.pretrain, augment=s.augment_p0)
    f.body.load_state_dict(classifier.body.state_dict())

# --- the attack, which is also the sampler ------------------------------------------------------------------

def pgd_attack_step(x, f, x0, step, eps):
    """Eq. 2.7: a step up f, back into the ball around x0, then into [0, 1]. A zero gradient moves nothing."""
    with fast_precision(x.device):
        gradient = input_gradient(f, x)
    length = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    x = x + step * gradient / (length + 1e-10)
    if eps < math.inf:
        far = (x - x0).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        x = x0 + (x - x0) * (eps / far.clamp(min=1e-12)).clamp(max=1)
    return x.clamp(0, 1)  # x0 is in [0, 1], so this keeps the ball

def pgd_attack(f, x, steps, step, eps=math.inf):
    """Eq. 2.8 (2.7 with finite eps): steps of l_2 length `step` up f; a negative step goes down.

    x [B, C, S, S] in [0, 1] -> the same. Images do not influence each other.
    """
    if x.min() < 0 or x.max() > 1:
        raise ValueError(f"an attack wants images in [0, 1]; got [{x.min():.3g}, {x.max():.3g}]")
    was_training = f.training
    f.eval()  # BatchNorm is the same function for all steps
    x = repeat(pgd_attack_step, x, steps, f, x, step, eps)  # the second x: x0
    f.train(was_training)
    return x

# --- the objective ------------------------------------------------------------------------------------------

def at_loss(f_data, f_adv):
    """-J/2 of Eq. 2.11: the mean of 2m cross-entropies, data = 1, attacked p0 = 0. Optimum log 2."""
    return (F.softplus(-f_data).mean() + F.softplus(f_adv).mean()) / 2

def r1_penalty(f_data, x):
    """1/2 mean ||grad_x f(x)||^2 at the data, with respect to [0, 1] pixels; x [m, C, S, S] requires grad."""
    (gradient,) = torch.autograd.grad(f_data.sum(), x, create_graph=True)
    return gradient.float().pow(2).flatten(1).sum(1).mean() / 2

# --- training: Algorithm 3, or Algorithm 1 with k_min = k_max -----------------------------------------------

def steps_of_update(s, it):
    """K of the it-th update (from 1): k_min, and one more after every iters_per_k updates."""
    return s.k_min + (it - 1) // s.iters_per_k

def updates_of_all(s):
    """Updates of Algorithm 3: iters_per_k for each K."""
    return (s.k_max - s.k_min + 1) * s.iters_per_k

def work(s, updates):
    """About what so many updates cost, in attack steps: each has its K, and the rest is worth 6."""
    return updates * (6 + s.k_min + updates / s.iters_per_k / 2)

def batch_auroc(positive, negative):
    """AUROC of two batches of scores [P], [N]; ties: one half. A 0-d tensor: nothing waits for the device."""
    return (positive[:, None] - negative).sign().mean() / 2 + 0.5

@seeded
def train_f(run, s, name, data, p0, measure=None):
    """Algorithm 3 -> f. measure(f): the Frechet distance that the log shows, if any."""
    f = common.to_device(build_f(s, data.shape), run.device)
    if s.pretrain:
        pretrain(run, s, f, p0)
    f.eval()  # for good: a BatchNorm must be the same function in attack and update
    optimizer = torch.optim.Adam(f.parameters(), s.lr, betas=(0.0, 0.99))
    made_from = common.pick(s, "lr batch k_min k_max iters_per_k step eps r1 augment augment_p0")
    made_from.update(f=f, images=data, p0=p0)
    limits = {"f_data": 1e4, "f_adv": 1e4}  # beyond these, training stops
    training = Training(
        run, name, made_from, limits, "a lower --lr or a larger --r1", f=f, optimizer=optimizer
    )
    stream = batches(data, s.batch, run.seed, training.it, s.augment, run.device)
    stream_p0 = batches(p0, s.batch, run.seed + 10**6, training.it, s.augment_p0, run.device)
    total = updates_of_all(s)
    every = 2 * max(total // training.LINES, 1)  # a distance in every second line of the log
    for it in training.updates(total, done=lambda it: work(s, it) / work(s, total)):
        K = steps_of_update(s, it)
        x, _ = next(stream)  # [m, C, S, S]
        x0, _ = next(stream_p0)
        x_adv = pgd_attack(f, x0, K, s.step, s.eps)  # x_K
        x.requires_grad_(s.r1 > 0)
        with fast_precision(run.device):
            f_data, f_adv = f(torch.cat([x, x_adv]))[:, 0].float().chunk(2)  # logits [m], [m]
            loss = at_loss(f_data, f_adv)
            penalty = r1_penalty(f_data, x) if s.r1 else 0.0
        optimizer.zero_grad(set_to_none=True)
        (loss + s.r1 * penalty).backward()
        optimizer.step()
        way = (x_adv - x0).flatten(1).norm(dim=1).mean()
        training.log(
            K=K,
            loss=loss,
            f_data=f_data.mean(),
            f_adv=f_adv.mean(),
            auc_adv=batch_auroc(f_data, f_adv),
            moved=way / max(K * s.step, 1e-10),
            r1=penalty,
        )
        if measure and (it % every == 0 or it == total):
            with training.pause():
                training.log(fd=measure(f))
    return f.requires_grad_(False)

# --- images for evaluations ---------------------------------------------------------------------------------

@dataclass
class Selection:
    """Some images of a data set, read slice by slice: 50,000 large pictures do not fit in memory."""
    images: object
    index: torch.Tensor  # int64 [N]
    size: int  # of a slice
    device: str
    change: object = torch.Tensor.float  # applied to images that are read; this one changes nothing

    def first(self, n):
        """The first n of them [n, C, S, S]."""
        return self.change(self.images.take(self.index[:n]).to(self.device))

    def slices(self, n=None):
        """The first n of them, or all: an iterator of [size, C, S, S]."""
        for index in self.index[:n].split(self.size):
            yield self.change(self.images.take(index).to(self.device))

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

def choose_seeds(s, p0, p0_test):
    """Which images of p0 become samples ("seeds") -> data set, indices. Test images, if there are so many."""
    pool = p0_test if len(p0_test) >= s.images else p0
    if len(pool) < s.images:
        raise UserError(f"--images {s.images}: p0 {s.p0} has only {len(pool)}")
    return pool, common.shuffled(len(pool), 0)[: s.images]

def samples(f, seeds, steps, step, n=None):
    """What the first n seeds (or all) become by an attack of these steps: an iterator of [size, C, S, S]."""
    for x in seeds.slices(n):
        yield pgd_attack(f, x, steps, step)

# --- restoration: sec. 2.5.3 --------------------------------------------------------------------------------

def middle_hole(x):
    """True in a square in the middle of images [B, C, S, S], 3/8 of the side long: bool [S, S]."""
    side = x.shape[-1]
    start = round(side * 5 / 16)
    inside = torch.arange(side, device=x.device)
    inside = (inside >= start) & (inside < side - start)
    return inside & inside[:, None]

def inpaint_keeping(f, x, hole, steps, step):
    """Ascent in which known pixels are written back after every step; not in the source."""
    known = x
    for _ in range(steps):
        x = torch.where(hole, pgd_attack(f, x, 1, step), known)
    return x

def ssim(x, y):
    """Structural similarity of images [B, C, S, S] in [0, 1] -> [B], with the settings of Wang et al. 2004.

    Means are weighted by a Gaussian of deviation 1.5 in a window of 11 pixels; K1 = .01, K2 = .03. It is the
    mean over channels and over all windows that lie inside of the image.
    """
    def local_mean(z):
        return gaussian_blur(z, 11, 1.5)[..., 5:-5, 5:-5]

    mean_x, mean_y = local_mean(x), local_mean(y)
    variances = local_mean(x * x) - mean_x**2 + local_mean(y * y) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (variances + 0.03**2)
    return (luminance * structure).flatten(1).mean(1)

def nearest(x, reference, look):
    """For each image of x the one of the reference whose look() is nearest in l_2 -> images, distances."""
    keys = look(x).flatten(1)
    distances = []
    for images in reference.slices():
        distances.append(torch.cdist(keys, look(images).flatten(1)))
    distance, place = torch.cat(distances, 1).min(1)
    return reference.images.take(reference.index[place.cpu()]).to(x.device), distance

# --- metrics ------------------------------------------------------------------------------------------------

def frechet_distance(mean1, cov1, mean2, cov2):
    """||m1 - m2||^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2) of two Gaussians, float64 [d], [d, d]."""
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return ((mean1 - mean2).pow(2).sum() + cov1.trace() + cov2.trace() - 2 * cross).item()

def inception_score(logits):
    """exp of the mean KL divergence from the mean class distribution; logits [N, classes]; 1 to `classes`."""
    log_p = logits.double().log_softmax(1)
    log_mean = log_p.logsumexp(0) - math.log(len(log_p))
    return (log_p.exp() * (log_p - log_mean)).sum(1).mean().exp().item()

def gaussian(z):
    """Mean [d] and covariance [d, d], float64, of features [N, d]."""
    z = z.cpu().double()
    return z.mean(0), torch.cov(z.T)

class Distance:
    """Frechet distance to training images; name: FID (Inception-V3) or FD-cls (the set's own classifier)."""

    def __init__(self, name, network, reference):
        self.name, self.network = name, network
        self.gaussian = gaussian(self.features(reference.slices()))

    @torch.no_grad()
    def features(self, slices):
        """Features [N, d] of images that come slice by slice."""
        return torch.cat([self.network.features(x) for x in slices])

    def between(self, z):
        """The distance of images with features z [N, d]; nan where f has diverged."""
        return frechet_distance(*self.gaussian, *gaussian(z)) if z.isfinite().all() else math.nan

    def __call__(self, slices):
        return self.between(self.features(slices))

def make_classifier(run, s, data):
    """A classifier of a labelled data set, for FD-cls."""
    if not isinstance(data, Images):
        raise UserError(f"{data.name} has no labels: {common.InceptionFeatures.FILE} must be in --data-dir")
    grey = data.shape[0] == 1
    net = "mnist_cnn" if grey else "resnet18"
    augment = "none" if grey else "crop_flip"
    classes = int(data.y.max()) + 1
    build = partial(common.make_net, net, classes, data.shape, s.cls_width)
    return common.train_classifier(run, "classifier", build, data, s.cls_iters, 128, augment=augment)

def make_distance(run, s, data, reference):
    """FID to the reference images where Inception-V3's weights are at hand, else FD-cls."""
    classifier = once(lambda: make_classifier(run, s, data))
    name, network = common.feature_network(data, run.data_dir, classifier)
    return Distance(name, network.to(run.device), reference)

def distance_of_samples(s, distance, seeds, f, n=None):
    """Frechet distance of the first n samples, or of all, made as in Tab. 2.4."""
    return distance(samples(f, seeds, s.sample_steps, s.sample_step, n))

# --- evaluation ---------------------------------------------------------------------------------------------

def table_2_5(s, distance, f, seeds, held_out, floor):
    """Frechet distance and inception score of p0 images, of the samples they become, of the data's own."""
    score = "IS" if distance.name == "FID" else "IS-cls"
    sets = {"p0": seeds.slices(), "samples": samples(f, seeds, s.sample_steps, s.sample_step)}
    sets["held-out data"] = held_out.slices()
    if len(floor.index) > 1:
        sets["other training data"] = floor.slices()
    rows, fd = [], {}
    for title, slices in sets.items():  # iterators, each read once
        z = distance.features(slices)
        fd[title] = distance.between(z)
        rows.append(value(f"{distance.name} {title}", fd[title], n=len(z)))
        rows.append(value(f"{score} {title}", inception_score(distance.network.head(z)), n=len(z)))
    rows.append(value(f"{distance.name} samples / p0", fd["samples"] / fd["p0"]))
    return rows

def table_2_7(run, s, f, held_out):
    """SSIM of noisy and of denoised images with their originals, by steps; figure 2.13, upper half."""
    x = held_out.first(100)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(run.seed))
    noisy = (x + 0.1 * noise.to(x.device)).clamp(0, 1)
    before = ssim(noisy, x)
    rows = [value("SSIM noisy", before.mean().item(), n=len(x), steps=0)]
    pictures = {"original": x[:10], "noisy": noisy[:10]}
    for steps in common.multiples(s.denoise_steps, (0.25, 0.5, 1, 2, 4)):
        denoised = pgd_attack(f, noisy, steps, s.restore_step)
        after = ssim(denoised, x)
        rows.append(value("SSIM denoised", after.mean().item(), n=len(x), steps=steps))
        rows.append(rate("share with a higher SSIM", after > before, steps=steps))
        pictures[f"{steps} steps"] = denoised[:10]
    run.pictures("figure2.13-denoising", pictures, 10)
    run.lines("table2.7", rows[1:], "steps")
    return rows

def table_2_8(run, s, f, held_out, reference):
    """SSIM of occluded and filled images; figures 2.13, lower half, and 2.14. Two NN rows see the truth."""
    x = held_out.first(100)
    hole = middle_hole(x)
    occluded = torch.where(hole, 0.5, x)
    patch, _ = nearest(x, reference, lambda images: images[..., hole])
    filled = {
        "occluded": occluded,
        "recovered (ours)": pgd_attack(f, occluded, s.inpaint_steps, s.restore_step),
        "recovered, known pixels kept": inpaint_keeping(f, occluded, hole, s.inpaint_steps, s.restore_step),
        "recovered (NN-patch)": torch.where(hole, patch, x),
        "recovered (NN-original image)": nearest(x, reference, torch.Tensor.float)[0],
        "recovered (NN-occluded image)": nearest(occluded, reference, torch.Tensor.float)[0],
    }
    rows, pictures = [], {"original": x[:10]}
    for title, images in filled.items():
        rows.append(value(f"SSIM {title}", ssim(images, x).mean().item(), n=len(x)))
        pictures[title] = images[:10]
    run.pictures("figure2.13-inpainting", pictures, 10)
    return rows

def table_2_10(s, f, seeds):
    """Seconds to generate 50 samples in one batch, the best of three after a warm-up."""
    x, seconds = seeds.first(50), []
    for _ in range(4):
        start = time.time()
        pgd_attack(f, x, s.sample_steps, s.sample_step).sum().item()  # waits for the device
        seconds.append(time.time() - start)
    return [value("seconds for 50 samples", min(seconds[1:]), steps=s.sample_steps, n=len(x))]

def table_2_11(s, distance, f, seeds):
    """The same length of path in twice, once and half the steps."""
    rows = []
    cases = [("twice the steps", 2), ("the steps of Tab. 2.4", 1), ("half the steps", 0.5)]
    for title, factor in cases:
        steps = max(round(s.sample_steps * factor), 1)
        step = s.sample_steps * s.sample_step / steps
        fd = distance(samples(f, seeds, steps, step))
        rows.append(value(f"{distance.name} samples, {title}", fd, steps=steps, step=step, n=s.images))
    return rows

def figure_2_3(run, s, distance, f, seeds, learn, load):
    """Diversity of p0 in training; all models sample from the same source images with the same attack."""
    rows, pictures = [], {"source images, the same for all": seeds.first(40)}
    for name in (s.p0, *OTHER_P0.get(s.p0, [])):
        net = f
        if name != s.p0:
            net = learn(s, f"p0-{name.replace(':', '-')}", p0=load(name))
        fd = distance_of_samples(s, distance, seeds, net)
        rows.append(value(f"{distance.name} samples, trained with p0 {name}", fd, n=s.images))
        pictures[name] = pgd_attack(net, seeds.first(40), s.sample_steps, s.sample_step)
    run.pictures("figure2.3", pictures, 20)
    return rows

def figure_2_7(run, s, f, seeds, reference):
    """Figures 2.7 and 2.8: images of p0 and, in the same places, the samples they become, uncurated."""
    x0 = seeds.first(60)
    sets = {"p0": x0, "samples": pgd_attack(f, x0, s.sample_steps, s.sample_step)}
    run.pictures("figure2.7", sets, 15)
    sets["data"] = reference.first(60)
    return [value(f"mean f of {title}", f(x).mean().item()) for title, x in sets.items()]

def figure_2_9(run, s, distance, f, seeds):
    """Samples from blurred images of p0 (deviation: 10 pixels of 256), beside those from sharp ones."""
    sigma = s.side * 10 / 256
    blur = lambda x: gaussian_blur(x, 2 * math.ceil(3 * sigma) + 1, sigma).clamp(0, 1)
    rows, pictures = [], {}
    for title, start in {"p0": seeds, "blurred p0": replace(seeds, change=blur)}.items():
        fd = distance_of_samples(s, distance, start, f)
        rows.append(value(f"{distance.name} samples from {title}", fd, n=s.images))
        pictures[title] = start.first(30)
        pictures[f"from {title}"] = pgd_attack(f, start.first(30), s.sample_steps, s.sample_step)
    run.pictures("figure2.9", pictures, 15)
    return rows

def figure_2_11(run, s, f, seeds, foreign):
    """Images of p0, and of --foreign, if that is another set, on their way into the data's, and beyond."""
    rows = []
    for title, start in {s.p0: seeds, s.foreign: foreign}.items():
        pictures = {}
        for steps in (0, *common.multiples(s.sample_steps, (0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 4))):
            x = pgd_attack(f, start.first(10), steps, s.sample_step)
            pictures[f"{steps} steps of {s.sample_step:g}"] = x
            rows.append(value(f"mean f, {title} on the way", f(x).mean().item(), steps=steps))
        run.pictures(f"figure2.11-{title}", pictures, 10)
        if s.gif:
            frames = [to_pil_image(make_grid(x.cpu(), 10)) for x in pictures.values()]
            with common.whole_file(run.folder / f"figure2.11-{title}.gif") as scratch:
                frames[0].save(scratch, "GIF", save_all=True, append_images=frames[1:], duration=400, loop=0)
    return rows

def figure_2_12(run, s, f, foreign, held_out, learn, load):
    """Translation both ways: f carries the foreign domain here, a second model carries data there."""
    p0 = load(BACK.get(s.foreign, s.p0))
    back = learn(s, "back", data=load(s.foreign), p0=p0, measure=None)
    rows, pictures = [], {}
    for title, start, model in ((s.foreign, foreign, f), ("data", held_out, back)):
        x = start.first(30)
        carried = pgd_attack(model, x, s.sample_steps, s.sample_step)
        pictures[title] = x
        pictures[f"{title}, translated"] = carried
        logit = f"mean logit of the target's model, {title}"
        rows.append(value(logit, model(x).mean().item(), n=len(x)))
        rows.append(value(f"{logit}, translated", model(carried).mean().item(), n=len(x)))
    run.pictures("figure2.12", pictures, 15)
    return rows

def figure_2_15(run, s, distance, f, seeds, held_out, reference):
    """Nearest images of --reference training images, to samples and to held-out data; also figure 2.17."""
    sets = {"samples": pgd_attack(f, seeds.first(100), s.sample_steps, s.sample_step)}
    sets["held-out data"] = held_out.first(100)
    looks = {"pixels": torch.Tensor.float, "features": lambda x: distance.features([x])}
    rows, pictures = [], {}
    for title, x in sets.items():
        pictures[title] = x[:15]
        for space, look in looks.items():
            images, length = nearest(x, reference, look)
            pictures[f"nearest to {title}, by {space}"] = images[:15]
            rows.append(value(f"distance to the nearest, {title}, {space}", length.mean().item(), n=len(x)))
    run.pictures("figure2.15", pictures, 15)
    return rows

def figure_2_16(run, s, f, seeds):
    """What points between two images of p0 become. A jump: 1/8 on an even line, 1 if it is the whole way."""
    left, right = seeds.first(12).chunk(2)
    columns = []
    for share in torch.linspace(0, 1, 9).tolist():
        x = (1 - share) * left + share * right
        columns.append(pgd_attack(f, x.clamp(0, 1), s.sample_steps, s.sample_step))
    strips = torch.stack(columns, 1)  # [pairs, 9, C, S, S]
    run.pictures("figure2.16", {f"pair {i}": strip for i, strip in enumerate(strips, 1)}, 9)
    jumps = (strips[:, 1:] - strips[:, :-1]).flatten(2).norm(dim=2).amax(1)
    ends = (strips[:, -1] - strips[:, 0]).flatten(1).norm(dim=1)
    mean = (jumps / ends).mean().item()
    return [value("largest jump between neighbours / distance of the ends", mean, n=len(ends))]

EXPERIMENTS = common.experiments(  # main() hands each what its parameters name
    headline=[table_2_5, table_2_7, table_2_8, table_2_10, table_2_11, figure_2_7, figure_2_11,
              figure_2_15, figure_2_16],
    others=[figure_2_3, figure_2_9, figure_2_12],
)

# --- a user's own pictures ----------------------------------------------------------------------------------

TASKS = {  # what --task does to a picture: so many steps, of this length
    "generate": ("sample_steps", "sample_step"),
    "translate": ("sample_steps", "sample_step"),
    "denoise": ("denoise_steps", "restore_step"),
    "inpaint": ("inpaint_steps", "restore_step"),
}

def convert(s, f, pictures, shape, device):
    """Each picture, cut and resized to the model's size -> OUTPUT/NUMBER-NAME.png."""
    print(f"{len(pictures)} pictures, cut and resized to {shape[1]} x {shape[2]} -> {s.output}")
    steps, step = [getattr(s, name) for name in TASKS[s.task]]
    for i, file in enumerate(pictures.files):
        x = pictures.take([i]).to(device)
        if shape[0] == 1:
            x = x.mean(1, keepdim=True)
        if s.task == "inpaint":
            x = torch.where(middle_hole(x), 0.5, x)
        x = pgd_attack(f, x, steps, step)
        with common.whole_file(Path(s.output).expanduser() / f"{i:04}-{file.stem}.png") as scratch:
            to_pil_image((255 * x[0].cpu()).round().byte()).save(scratch, "PNG")

# --- command line -------------------------------------------------------------------------------------------

def get_args(argv=None):
    args = common.parse_args(__doc__, SETTINGS, EXPERIMENTS, argv)
    s = args.settings
    common.at_least(1, s, "batch iters_per_k sample_steps cls_iters")
    common.at_least(0, s, "k_min r1 eps pretrain denoise_steps inpaint_steps")
    common.at_least(12, s, "images reference")
    common.at_least(11, s, "side")  # the window of ssim()
    common.above_0(s, "width cls_width lr")
    if s.task not in TASKS or bool(s.input) != bool(s.output) or (s.task != "generate" and not s.input):
        raise UserError(f"--input, --output and --task go together; --task is one of: {', '.join(TASKS)}")
    if s.k_min > s.k_max:
        raise UserError(f"--k-min {s.k_min} is above --k-max {s.k_max}")
    return args

def main(argv=None):
    args = get_args(argv)
    s, device = args.settings, args.device
    data = load_images(args.dataset, "train", args.data_dir, side=s.side).to(device)
    load = partial(load_p0, args, data.shape)
    p0 = load(s.p0)
    pool, chosen = choose_seeds(s, p0, load(s.p0, "test"))
    build_f(s, data.shape)  # made and dropped: errors show before any work
    batches(data, s.batch, 0, augment=s.augment)
    batches(p0, s.batch, 0, augment=s.augment_p0)
    fitting = max(PIXELS // s.side**2, 1)
    select = partial(Selection, size=min(args.chunk, fitting), device=device)
    seeds = select(pool, chosen)  # images of p0 that sampling starts from
    order = common.shuffled(len(data), 6)  # a folder's files may lie class by class
    reference = select(data, order[: s.reference])  # what samples are held against
    floor = select(data, order[s.reference :][: s.images])  # what perfect samples would be like
    test = load_images(args.dataset, "test", args.data_dir, side=s.side).to(device)
    held_out = select(test, common.shuffled(len(test), 0)[: s.images])
    foreign = None
    if {"figure2.11", "figure2.12"} & set(args.only) and not s.input:
        domain = load(s.foreign, "test")
        foreign = select(domain, common.shuffled(len(domain), 0))
    pictures = common.user_pictures(s.input, s.output, s.side) if s.input else None
    run = common.Run("at_gen", args, p0=s.p0)

    if pictures:
        return convert(s, train_f(run, s, "f", data, p0), pictures, data.shape, device)

    # once: f() makes it at the first call; an experiment that names f as an argument gets what f() made
    distance = once(lambda: make_distance(run, s, data, reference))
    measure = None
    if isinstance(data, Images) or common.weights_at_hand(common.InceptionFeatures.FILE, args.data_dir):
        def measure(f):
            return distance_of_samples(s, distance(), seeds, f, n=500)
    learn = partial(train_f, run, data=data, p0=p0, measure=measure)
    run.experiments(
        EXPERIMENTS, seeds=seeds, held_out=held_out, reference=reference, floor=floor, foreign=foreign,
        distance=distance, learn=learn, load=load, f=once(lambda: learn(s, "f")),
    )

if __name__ == "__main__":
    common.call(main)
