r"""AT generative model: an energy learned by binary adversarial training, and images made by attacking it.

Source: Yin 2022, "Generative Modeling With Adversarial Training", chapter 2 ("the dissertation").

An energy-based model (EBM) is a density p(x) ~ exp f(x), f a network that gives each image one number. Here
f is the logit of a binary classifier D = sigmoid(f), high where images look like the training data. An
attack follows the gradient of f with respect to the image (PGD, projected gradient descent: some steps of
fixed length, each followed by a return into the allowed range). D is trained to tell data from images of
another set, p0 (letters, other photographs), after these were attacked: pushed uphill by K steps. Where the
attack arrives, f is then pressed down, unless data hold it up. What stays highest (f = 0, D = 1/2) is the
support of the data, and from far away the gradient of f leads there. So in the end such an attack, farther
than in training and not bound by eps, turns an image of p0 into a sample. Unlike EBM training by Langevin
sampling it adds no noise and keeps no states: each attack is a short chain of steps from a fresh image of
p0.

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
    python at_gen.py                          7 min: FD-cls of samples 16, of p0 133, of held-out data 1.5
    python at_gen.py --dataset mnist          17 min of one core: 13, 57 and 1.5
    python at_gen.py --only figure2.5         9 min after the first command: progressive K against fixed K
    python at_gen.py --dataset cifar10        a GPU; --budget paper: Tab. 2.3, 2.4 (FID of the source 13.2)

The log. loss starts at log 2 = .693, falls while K is small, then climbs back towards log 2, its value at
the optimum; an untrained f shows it too, so look at fd. f_data and f_adv, mean logits of data and of
attacked p0, come together. auc_adv, their AUROC, sinks towards 1/2: f can't tell the two apart. moved:
distance from x_0 to x_K over K * step; from K = 1 on it falls as f gets maxima within reach. r1: the
penalty over gamma. attack_steps: all steps of attacks so far. fd, in every second line: FD-cls of 500
samples.

Differs from the source: p0 of 32x32 is Tiny ImageNet downscaled (80 Million Tiny Images, the source's, is
withdrawn). FD-cls, a Frechet distance in features of the data set's own classifier (low = alike), stands
for FID for grey images and where Inception-V3's weights are not at hand; they are torchvision's. Networks
for 256 pixels start from scratch: the pretrained ones of the source were not published. The last model is
reported, not the one of best FID. BatchNorm's statistics stay at mean 0 and variance 1, as in the source's
code: a learned affine map, the same in attack and update. The published CIFAR-10 model also attacked the
data, downwards (--indist-steps 5), and could go on to the next K before its updates were used up; the text
says neither.
"""

import math
import time
from dataclasses import dataclass, replace
from functools import partial

import common  # before torch, so that Ctrl-C ends even its import quietly
import torch
import torch.nn.functional as F
from torch import nn

from common import Diverged, Images, Training, UserError, batches, fast_precision, input_gradient
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
    indist_steps=(0, "steps of 0.1 down f that attack the data in training"),
    # generation and evaluation: Tab. 2.4
    sample_steps=(30, 30, 32, 20, 32, 20, 14, 17, "PGD steps from an image of p0 to a sample"),
    sample_step=(1.0, 1.0, 0.2, 2.0, 0.2, 8.0, 8.0, 8.0, "length of each (l_2)"),
    images=(2000, 2000, 5000, 200, 50_000, 50_000, 50_000, 50_000, "samples in an evaluation"),
    reference=(10_000, 10_000, 10_000, 1000, 50_000, 30_000, 30_000, 126_227,
               "training images (at most) that a Frechet distance compares with"),
    cls_width=(1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, "width of the classifier behind FD-cls"),
    cls_iters=(300, 600, 2000, 1, 8000, 1, 1, 1, "its updates, batch 128; unused where there are no labels"),
)
PIXELS = 2**20  # largest batch x side^2 in an evaluation
OTHER_P0 = {"letters": ["letters:4", "noise"], "tinyimagenet": ["tinyimagenet:10", "noise"]}

# --- the model: f -------------------------------------------------------------------------------------------

class PlainCNN(nn.Module):
    """Six convolutions, leaky ReLU, no normalisation; side a multiple of 4. [B, C, side, side] -> [B, 1]."""

    def __init__(self, width, channels, side):
        super().__init__()
        w = width
        self.body = nn.Sequential(
            nn.Conv2d(channels, w, 3, 1, 1), nn.LeakyReLU(0.2),  # side
            nn.Conv2d(w, 2 * w, 4, 2, 1), nn.LeakyReLU(0.2),  # side / 2
            nn.Conv2d(2 * w, 2 * w, 3, 1, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * w, 4 * w, 4, 2, 1), nn.LeakyReLU(0.2),  # side / 4
            nn.Conv2d(4 * w, 4 * w, 3, 1, 1), nn.LeakyReLU(0.2),
        )
        self.head = nn.Conv2d(4 * w, 1, side // 4)  # 1

    def forward(self, x):
        return self.head(self.body(2 * x - 1)).flatten(1)

class ResBlk(nn.Module):
    """Pre-activation residual block, no normalisation, that halves the side; the sum is divided by sqrt 2."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_in, 3, 1, 1)
        self.conv2 = nn.Conv2d(c_in, c_out, 3, 1, 1)
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1, bias=False)

    def forward(self, x):
        y = F.avg_pool2d(self.conv1(F.leaky_relu(x, 0.2)), 2)
        y = self.conv2(F.leaky_relu(y, 0.2))
        return (y + F.avg_pool2d(self.skip(x), 2)) / math.sqrt(2)

class ResBlockD(nn.Module):
    """The D of Tab. 2.2, its stem 3x3 as in the source's code. [B, 3, side, side] -> [B, 1].

    20,851,777 parameters at 256 pixels. Other powers of two: a stem of 2^14 / side channels, doubled by each
    block to at most 512, and log2(side) - 2 blocks, down to 4x4.
    """

    def __init__(self, side):
        super().__init__()
        if side < 8 or side & (side - 1):
            raise UserError(
                f"the residual D takes sides that are powers of two from 8 on, not {side}"
            )
        mean, std = torch.tensor(common.IMAGENET).view(2, 1, 3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        c = min(2**14 // side, 512)
        layers = [nn.Conv2d(3, c, 3, 1, 1)]
        for _ in range(int(math.log2(side)) - 2):
            layers.append(ResBlk(c, min(2 * c, 512)))
            c = min(2 * c, 512)
        self.body = nn.Sequential(
            *layers, nn.LeakyReLU(0.2), nn.Conv2d(c, c, 4), nn.LeakyReLU(0.2), nn.Flatten()
        )
        self.head = nn.Linear(c, 1)

    def forward(self, x):
        return self.head(self.body((x - self.mean) / self.std))

def build_f(s, shape):
    """An untrained f for images of this shape (C, S, S)."""
    if s.net == "plain":
        return PlainCNN(max(round(32 * s.width), 1), shape[0], shape[1])
    if s.net == "resblock_d":
        return ResBlockD(shape[1])
    return common.make_net(s.net, 1, shape, s.width)

# --- the attack, which is also the sampler ------------------------------------------------------------------

def pgd_attack_step(x, f, x0, step, eps):
    """Eq. 2.7: a step up f, back into the ball around x0, then into [0, 1]. A zero gradient moves nothing."""
    with fast_precision(x.device):
        gradient = input_gradient(f, x)
    length = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    x = x + step * gradient / (length + 1e-10)
    if eps < math.inf:
        far = (x - x0).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        x = x0 + (x - x0) * (eps / far.clamp(min=eps + 1e-12))  # inside the ball: times 1
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

def ebm_loss(f_data, f_adv):
    """Minus the EBM's objective (2.2), with x_K in place of its samples. No lower bound: section 2.5.6."""
    return f_adv.mean() - f_data.mean()

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

def attack_steps(s, updates):
    """Attack steps, on p0 and on data, of the first so many updates."""
    steps = updates * s.indist_steps
    for it in range(1, updates + 1):
        steps += steps_of_update(s, it)
    return steps

def work(s, updates):
    """What so many updates cost, in attack steps: the rest of an update costs as much as about 6."""
    return attack_steps(s, updates) + 6 * updates

def batch_auroc(positive, negative):
    """AUROC of two batches of scores [P], [N]; ties: one half. A 0-d tensor: nothing waits for the device."""
    return (positive[:, None] - negative).sign().mean() / 2 + 0.5

@seeded
def train_f(run, s, name, data, p0, measure=None, objective=at_loss):
    """Algorithm 3 -> (f, rows of its log). measure(f): the Frechet distance that the log shows, if any."""
    f = common.to_device(build_f(s, data.shape), run.device)
    f.eval()  # for good: a BatchNorm must be the same function in attack and update
    optimizer = torch.optim.Adam(f.parameters(), s.lr, betas=(0.0, 0.99))
    made_from = common.pick(
        s, "lr batch k_min k_max iters_per_k step eps r1 indist_steps augment augment_p0"
    )
    made_from.update(f=f, images=data, p0=p0, objective=objective)
    limits = {"f_data": 1e4, "f_adv": 1e4}
    training = Training(
        run, name, made_from, limits, "a lower --lr or a larger --r1", f=f, optimizer=optimizer
    )
    stream = batches(data, s.batch, run.seed, training.it, s.augment, run.device)
    stream_p0 = batches(p0, s.batch, run.seed + 1, training.it, s.augment_p0, run.device)
    total = updates_of_all(s)
    taken = attack_steps(s, training.it)
    every = 2 * max(total // training.LINES, 1)  # a distance in every second line of the log
    for it in training.updates(total, done=lambda it: work(s, it) / work(s, total)):
        K = steps_of_update(s, it)
        x, _ = next(stream)  # [m, C, S, S]
        x0, _ = next(stream_p0)
        x_adv = pgd_attack(f, x0, K, s.step, s.eps)  # x_K
        x = pgd_attack(f, x, s.indist_steps, -0.1).requires_grad_(s.r1 > 0)  # no steps by default
        with fast_precision(run.device):
            f_data, f_adv = f(torch.cat([x, x_adv]))[:, 0].float().chunk(2)  # logits [m], [m]
            loss = objective(f_data, f_adv)
            penalty = r1_penalty(f_data, x) if s.r1 else 0.0
        optimizer.zero_grad(set_to_none=True)
        (loss + s.r1 * penalty).backward()
        optimizer.step()
        taken += K + s.indist_steps
        way = (x_adv - x0).flatten(1).norm(dim=1).mean()
        training.log(
            K=K,
            loss=loss,
            f_data=f_data.mean(),
            f_adv=f_adv.mean(),
            auc_adv=batch_auroc(f_data, f_adv),
            moved=way / max(K * s.step, 1e-10),
            r1=penalty,
            attack_steps=taken,
        )
        if measure and (it % every == 0 or it == total):
            with training.pause():
                training.log(fd=measure(f))
    return f.requires_grad_(False), training.rows

def fixed_k(learn, s, K):
    """Algorithm 1 with this K, for as many updates as Algorithm 3 has -> (f, rows of its log)."""
    updates = updates_of_all(s)
    return learn(replace(s, k_min=K, k_max=K, iters_per_k=updates), f"fixed-K{K}")

# --- images for evaluations ---------------------------------------------------------------------------------

@dataclass
class Selection:
    """Some images of a data set, read slice by slice: 50,000 large pictures do not fit in memory."""
    images: object
    index: torch.Tensor  # int64 [N]
    size: int  # of a slice
    device: str

    def first(self, n):
        """The first n of them [n, C, S, S]."""
        return self.images.take(self.index[:n]).to(self.device)

    def slices(self, n=None):
        """The first n of them, or all: an iterator of [size, C, S, S]."""
        for index in self.index[:n].split(self.size):
            yield self.images.take(index).to(self.device)

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
    marginal = log_p.logsumexp(0) - math.log(len(log_p))
    return (log_p.exp() * (log_p - marginal)).sum(1).mean().exp().item()

class Distance:
    """Frechet distance of images to training images, in the features of a network.

    name: FID (Inception-V3) or FD-cls (the data set's own classifier).
    """

    def __init__(self, name, network, reference):
        self.name, self.network = name, network
        self.mean, self.cov = self.gaussian(self.features(reference.slices()))

    @torch.no_grad()
    def features(self, slices):
        """Features [N, d] of images that come slice by slice."""
        return torch.cat([self.network.features(x) for x in slices])

    def gaussian(self, z):
        """Mean [d] and covariance [d, d], float64, of features [N, d]."""
        z = z.cpu().double()
        return z.mean(0), torch.cov(z.T)

    def between(self, z):
        """The distance of images with features z [N, d]."""
        return frechet_distance(self.mean, self.cov, *self.gaussian(z))

    def __call__(self, slices):
        return self.between(self.features(slices))

def make_classifier(run, s, data):
    """A classifier of a labelled data set, for FD-cls."""
    if not isinstance(data, Images):
        file = common.InceptionFeatures.FILE
        raise UserError(
            f"{data.name} has no labels: a Frechet distance needs {file} in --data-dir"
        )
    grey = data.shape[0] == 1
    net = "mnist_cnn" if grey else "resnet18"
    augment = "none" if grey else "crop_flip"  # of train_classifier
    classes = common.IN_MEMORY[data.name][2]
    build = partial(common.make_net, net, classes, data.shape, s.cls_width)
    return common.train_classifier(
        run, "classifier", build, data, s.cls_iters, 128, augment=augment
    )

def make_distance(run, s, data, reference):
    """FID to the reference images where Inception-V3's weights are at hand, else FD-cls."""
    classifier = once(lambda: make_classifier(run, s, data))
    name, network = common.feature_network(data, run.data_dir, classifier)
    return Distance(name, network.to(run.device), reference)

def distance_of_samples(s, distance, seeds, f, n=None):
    """Frechet distance of the first n samples, or of all, made as in Tab. 2.4."""
    return distance(samples(f, seeds, s.sample_steps, s.sample_step, n))

# --- evaluation ---------------------------------------------------------------------------------------------

def table_2_5(s, distance, f, log, seeds, held_out):
    """Frechet distance and inception score of p0 images, of the samples they become, of held-out data."""
    score = "IS" if distance.name == "FID" else "IS-cls"
    sets = {"p0": seeds.slices(), "samples": samples(f, seeds, s.sample_steps, s.sample_step)}
    if held_out:
        sets["held-out data"] = held_out.slices()
    rows, fd, logits = [], {}, {}
    for title, slices in sets.items():  # iterators, each read once
        z = distance.features(slices)
        logits[title] = distance.network.head(z)
        fd[title] = distance.between(z)
        rows.append(value(f"{distance.name} {title}", fd[title], n=len(z)))
        rows.append(value(f"{score} {title}", inception_score(logits[title]), n=len(z)))
    rows.append(value(f"{distance.name} samples / p0", fd["samples"] / fd["p0"]))
    if distance.name == "FD-cls":
        labels = held_out.images.y[: len(held_out.index)]
        right = logits["held-out data"].argmax(1) == labels
        rows.append(rate("accuracy of the FD-cls network", right))
    rows.append(value("training seconds", log[-1]["seconds"]))
    return rows

def table_2_9(s):
    """PGD steps that an image gets in training and at test time (settings, nothing measured)."""
    return [value("training steps", s.k_max), value("test steps", s.sample_steps)]

def table_2_10(s, f, seeds):
    """Seconds to generate 50 samples in one batch, the best of three after a warm-up."""
    x, seconds = seeds.first(50), []
    for _ in range(4):
        start = time.time()
        pgd_attack(f, x, s.sample_steps, s.sample_step).sum().item()  # waits for the device
        seconds.append(time.time() - start)
    return [value("seconds for 50 samples", min(seconds[1:]), steps=s.sample_steps)]

def table_2_11(s, distance, f, seeds):
    """The same length of path in twice, once and half the steps."""
    rows = []
    cases = [("twice the steps", 2), ("the steps of Tab. 2.4", 1), ("half the steps", 0.5)]
    for title, factor in cases:
        steps = max(round(s.sample_steps * factor), 1)
        step = s.sample_steps * s.sample_step / steps
        fd = distance(samples(f, seeds, steps, step))
        rows.append(
            value(f"{distance.name} samples, {title}", fd, steps=steps, step=step, n=s.images)
        )
    return rows

def figure_2_3(run, s, distance, f, seeds, learn, load):
    """Diversity of p0 in training; all models sample from the same source images with the same attack."""
    rows, pictures = [], {"source images, the same for all": seeds.first(40)}
    for name in (s.p0, *OTHER_P0.get(s.p0, [])):
        net = f
        if name != s.p0:
            net, _ = learn(s, f"p0-{name.replace(':', '-')}", p0=load(name))
        fd = distance_of_samples(s, distance, seeds, net)
        rows.append(value(f"{distance.name} samples, trained with p0 {name}", fd, n=s.images))
        pictures[name] = pgd_attack(net, seeds.first(40), s.sample_steps, s.sample_step)
    run.pictures("figure2.3", pictures, 20)
    return rows

def figure_2_4(run, s, distance, seeds, learn):
    """Frechet distance against a fixed K (Algorithm 1), the same number of updates each."""
    rows = []
    for K in sorted({min(K, s.k_max) for K in (1, 5, 10, s.k_max)}):
        f, _ = fixed_k(learn, s, K)
        fd = distance_of_samples(s, distance, seeds, f)
        rows.append(value(f"{distance.name} samples, fixed K", fd, K=K, n=s.images))
    run.lines("figure2.4", rows, "K", ylim=(0, None))
    return rows

def figure_2_5(run, s, distance, log, learn):
    """Progressive K (Algorithm 3) against fixed K, by training seconds and by attack steps."""
    logs = {"progressive K": log}
    _, logs["small fixed K"] = fixed_k(learn, s, min(5, s.k_max))
    _, logs["largest fixed K"] = fixed_k(learn, s, s.k_max)
    curves, ends = [], []
    for title, lines in logs.items():
        for line in lines:
            if "fd" in line:
                quantity = f"{distance.name} in training, {title}"
                beside = {"seconds": line["seconds"], "attack_steps": line["attack_steps"]}
                curves.append(value(quantity, line["fd"], n=min(500, s.images), **beside))
        ends.append(curves[-1])
    run.lines("figure2.5-seconds", curves, "seconds", yscale="log")
    run.lines("figure2.5-steps", curves, "attack_steps", yscale="log")
    return ends

def figure_2_7(run, s, data, f, seeds):
    """Figures 2.7 and 2.8: images of p0 and, in the same places, the samples they become, uncurated."""
    x0 = seeds.first(60)
    sets = {"p0": x0, "samples": pgd_attack(f, x0, s.sample_steps, s.sample_step)}
    run.pictures("figure2.7", sets, 15)
    sets["data"] = data.take(slice(0, 60)).to(x0.device)
    return [value(f"mean f of {title}", f(x).mean().item()) for title, x in sets.items()]

def sweep(run, s, f, seeds):
    """Images of p0 on their way to samples and beyond: more and more steps of one length."""
    rows, pictures = [], {}
    for steps in [0, *common.multiples(s.sample_steps, (0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 4))]:
        x = pgd_attack(f, seeds.first(10), steps, s.sample_step)
        pictures[f"{steps} steps of {s.sample_step:g}"] = x
        rows.append(
            value("mean f on the way", f(x).mean().item(), steps=steps, step=s.sample_step)
        )
    run.pictures("sweep", pictures, 10)
    return rows

def stability(run, s, learn):
    """Section 2.5.6, at a fixed K, without R1: the EBM objective (2.2) against AT, over rate x updates."""
    K = min(5, s.k_max)
    updates = min(1000, updates_of_all(s))
    rows, curves = [], []
    cases = [("AT", at_loss, s.lr), ("EBM", ebm_loss, s.lr), ("EBM, small lr", ebm_loss, s.lr / 20)]
    for title, objective, lr in cases:
        changed = replace(s, k_min=K, k_max=K, iters_per_k=updates, lr=lr, r1=0.0)
        try:
            name = f"stability-{objective.__name__}-{lr:g}"
            _, log = learn(changed, name, measure=None, objective=objective)
            ended = "none"
        except Diverged as stop:
            print(stop)
            log = stop.rows
            ended = log[-1]["it"]
        gaps = [abs(line["f_data"] - line["f_adv"]) for line in log]
        for line, gap in zip(log, gaps):
            curves.append(value(title, gap, update=line["it"]))
        way = lr * log[-1]["it"]
        quantity = f"largest |f(x) - f(x*)|, {title}"
        rows.append(
            value(quantity, max(gaps), lr=lr, rate_x_updates=way)
        )
        quantity = f"updates before it ran away, {title}"
        rows.append(
            value(quantity, ended, lr=lr, updates=updates)
        )
    run.lines("stability", curves, "update", yscale="symlog", ylabel="|mean f(x) - mean f(x*)|")
    return rows

EXPERIMENTS = common.experiments(
    headline=[table_2_5, table_2_10, table_2_11, figure_2_7, sweep],
    others=[table_2_9, figure_2_3, figure_2_4, figure_2_5, stability],
)

# --- command line -------------------------------------------------------------------------------------------

def get_args(argv=None):
    args = common.parse_args(__doc__, SETTINGS, EXPERIMENTS, argv)
    s = args.settings
    common.at_least(1, s, "batch iters_per_k sample_steps cls_iters")
    common.at_least(0, s, "k_min r1 indist_steps eps")
    common.at_least(2, s, "images reference")
    common.at_least(8, s, "side")
    common.above_0(s, "width cls_width lr")
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
    seeds = select(pool, chosen)
    reference = select(data, torch.arange(min(s.reference, len(data))))
    labelled = isinstance(data, Images)
    held_out = None
    if labelled:
        test = load_images(args.dataset, "test", args.data_dir, side=s.side).to(device)
        held_out = select(test, torch.arange(min(s.images, len(test))))
    run = common.Run("at_gen", args, p0=s.p0)

    # once: f() makes it at the first call; an experiment that names f as an argument gets what f() made
    distance = once(lambda: make_distance(run, s, data, reference))
    measure = once(lambda: None)
    if labelled or common.weights_at_hand(common.InceptionFeatures.FILE, args.data_dir):
        measure = once(lambda: partial(distance_of_samples, s, distance(), seeds, n=500))
    learn = once(lambda: partial(train_f, run, data=data, p0=p0, measure=measure()))
    trained = once(lambda: learn()(s, "f"))
    f = once(lambda: trained()[0])
    log = once(lambda: trained()[1])
    run.experiments(
        EXPERIMENTS,
        data=data,
        seeds=seeds,
        held_out=held_out,
        distance=distance,
        learn=learn,
        load=load,
        f=f,
        log=log,
    )

if __name__ == "__main__":
    common.call(main)
