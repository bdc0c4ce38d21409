r"""AT generative model: an energy learned by binary adversarial training, and images made by attacking it.

Source: Yin 2022, "Generative Modeling With Adversarial Training", chapter 2 ("the dissertation").

The idea. Train a binary classifier D = sigmoid(f) to tell data from out-distribution images p0 (letters,
other photographs) after those have been attacked: pushed by K steps of gradient ascent to wherever f is high.
What the attack finds is then pressed down, unless data hold it up. What is left high is the support of the
data, and the gradient of f leads there from far away: attacking an image of p0 now turns it into a sample.

    f(x) logit, HIGH = in-distribution; D = sigmoid(f). Pixels in [0, 1]; step, eps: L2 of the whole image.

    (2.8)   x_{i+1} = x_i + step * g / ||g||_2,  g = grad_x f(x_i),  then clamped to [0, 1]    (unbounded PGD)
    (2.7)   the same, projected onto the ball of radius eps around x_0                         (finite --eps)
    (2.11)  J(D) = E_data[log D(x)] + E_p0[log(1 - D(x_K))]                                    (maximised)
    (2.18)  dJ = E_data[(1 - sigmoid(f)) df] - E_p0[sigmoid(f) df]: the EBM gradient (2.2), bounded weights
    Prop. 1 optimum: J = -log 4; D = 1/2 on the support of the data, at most 1/2 elsewhere
    Alg. 3  for K = 0, 1, ..., N: train for some iterations with K-step attacks, one optimiser throughout
    R1      loss += gamma/2 E_data ||grad_x f(x)||^2, beside the MEAN of 2m cross-entropies; gamma: Tab. 2.3

Commands (measured times and numbers stand in README.md and results/):
    python at_gen.py                                   rendered digits from rendered letters
    python at_gen.py --dataset mnist                   MNIST from rendered letters
    python at_gen.py --dataset cifar10 --budget paper  the settings of Tab. 2.3 and 2.4, ResNet-50
    python at_gen.py --only figure2.5                  progressive against fixed K; --list names them all

How to read the log. loss starts at log 2 = .693, falls while K is small, then climbs back towards log 2, its
value at the optimum; f_data and f_adv come together; auc_adv sinks towards 1/2: the attack now makes what f
takes for data. moved is the displacement over K * step: it falls as f gets maxima within reach. fd: Frechet
distance of 500 samples to the data. auc_p0, f_p0: p0 unattacked. gradients: attack steps so far.

Differs from the source:
  - p0 of 32x32 is Tiny ImageNet downscaled: 80 Million Tiny Images, used by the source, is withdrawn.
  - FD-cls (features of the data set's own classifier) where Inception-V3's weights are not at hand; FID with
    torchvision's weights where they are. n is stated; the source: 50,000 samples against all training images.
  - 256-pixel networks start from scratch: the ImageNet-pretrained weights of the source were never published.
  - The last model is reported, not the one with the best FID.
  - BatchNorm never updates its statistics (mean 0, variance 1): a learned affine map, the same in attack and
    update. So did the source's code; the text does not say.
  - The published CIFAR-10 weights also attacked the data, downwards; the text does not: --indist-steps 5.
  - The source's code ends a stage early when the attack's AUC passes a gate, and never ends the last one.
    --auc-gate 0.8 does the first; the text, and our default, trains each K equally long.
  - Stem of the 256-pixel D: 3x3 as in the code; Tab. 2.2 prints 1x1. Source pictures are centre crops.
  - bfloat16 convolutions where the processor has units for them; weights, images and losses stay float32.
"""
import dataclasses
import functools
import math
import time
from collections import deque

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import common
from common import Diverged, Experiment, Images, Log, Run, UserError
from common import batches, fast_precision, load_images, picture_grid

# --- settings -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Settings:
    """Everything that can be set; each field is also a flag (--k-max 40). Source: Tab. 2.3 and 2.4."""
    net: str = "plain"           # plain, resnet18, resnet50, resblock_d (Tab. 2.2), mnist_cnn: the body of f
    width: float = 1.0           # multiplies the channels of plain and resnet18
    side: int = 28               # pixels
    batch: int = 48              # images of each of the two sides in one update
    lr: float = 5e-4             # Adam, betas (0, 0.99)
    k_min: int = 0               # first K of Alg. 3; k_min = k_max is Alg. 1
    k_max: int = 20              # N of Alg. 3
    iters_per_k: int = 130       # updates for each K
    step: float = 1.0            # length of a PGD step in training
    eps: float = math.inf        # radius of the ball of Eq. 2.7; inf: Eq. 2.8
    r1: float = 0.01             # gamma
    indist_steps: int = 0        # PGD steps downwards on the data ...
    indist_step: float = 0.1     # ... and their length
    auc_gate: float = 0.0        # 0: off; else end a stage when the last 100 batches' attack AUC exceeds it
    augment: str = "none"        # of the data: none, crop (pad 4, flip), or resized crops: rrc, mild, medium
    augment_p0: str = "none"
    p0: str = "letters"          # a data set, or NAME:n for its first n classes
    sample_steps: int = 30       # PGD steps from a p0 image to a sample ...
    sample_step: float = 1.0     # ... and their length; what counts is the product (Tab. 2.11)
    images: int = 2000           # samples in an evaluation
    reference: int = 10_000      # training images behind the Frechet distance
    cls_net: str = "mnist_cnn"   # classifier whose features give FD-cls
    cls_width: float = 1.0
    cls_iters: int = 300         # its updates, batch 128
    log_every: int = 50
    fd_every: int = 260          # iterations between two Frechet distances in the log (500 samples)
    save_every: int = 100
    workers: int = 2             # processes that read large pictures

    def __post_init__(self):
        common.at_least(1, self, "batch", "iters_per_k", "sample_steps", "cls_iters", "log_every")
        common.at_least(2, self, "images", "reference")
        common.at_least(8, self, "side")
        if self.k_min > self.k_max:
            raise UserError(f"--k-min {self.k_min} is above --k-max {self.k_max}")


AT_TEST = "sample_steps sample_step images reference cls_net cls_width cls_iters workers".split()
GLYPHS = Settings(width=0.5)
MNIST = Settings(width=0.5, iters_per_k=250, fd_every=1000, cls_iters=600)
CIFAR = Settings(net="resnet50", side=32, batch=32, k_max=25, iters_per_k=7810, step=0.1,  # 5 epochs of 1,562
                 augment="crop", augment_p0="crop", p0="tinyimagenet", sample_steps=32, sample_step=0.2,
                 images=50_000, reference=50_000, cls_net="resnet18", cls_width=0.5, cls_iters=8000,
                 log_every=500, fd_every=7810, save_every=1000)
CELEBA = Settings(net="resblock_d", side=256, batch=40, lr=5e-5, k_max=40, iters_per_k=3750,  # 5 epochs
                  step=2.0, r1=30.0, augment="mild", augment_p0="rrc", p0="imagenet", sample_steps=20,
                  sample_step=8.0, images=50_000, reference=30_000, log_every=100, fd_every=5000, workers=8)
AFHQ = dataclasses.replace(CELEBA, k_max=25, iters_per_k=6400, r1=100.0, augment="medium",  # 50 epochs
                           sample_steps=14)
CHURCH = dataclasses.replace(CELEBA, k_max=35, iters_per_k=3944, r1=100.0, augment="medium",  # 1 epoch
                             batch=32, reference=126_227, sample_steps=17)


def budgets(paper, quick=None, **smoke):
    """The three budgets of a set. Quick at 256 pixels: 64, where a picture has a quarter of the L2 norm."""
    fewer = dict(side=64, batch=16, iters_per_k=40, images=200, step=paper.step / 4, r1=paper.r1 / 16)
    quick = quick or dataclasses.replace(paper, sample_step=paper.sample_step / 4, **fewer)
    smoke = dict(k_max=2, iters_per_k=2, batch=4, images=24, reference=64, cls_iters=3, log_every=2,
                 fd_every=4, save_every=2, sample_steps=2, workers=0) | smoke
    return {"smoke": dataclasses.replace(quick, **smoke), "quick": quick, "paper": paper}


CIFAR_QUICK = dataclasses.replace(CIFAR, net="resnet18", width=0.5, iters_per_k=300, cls_iters=2000,
                                  images=5000, save_every=300, reference=10_000, log_every=50, fd_every=1500)
SETTINGS = {  # glyphs, MNIST and Fashion-MNIST are not in the source: there "paper" is just longer and wider
    "glyphs": budgets(dataclasses.replace(GLYPHS, width=1.0, iters_per_k=1000), GLYPHS),
    "mnist": budgets(dataclasses.replace(MNIST, width=1.0, iters_per_k=2000), MNIST),
    "fashion_mnist": budgets(dataclasses.replace(MNIST, width=1.0, iters_per_k=2000), MNIST),
    "cifar10": budgets(CIFAR, CIFAR_QUICK, width=0.125, cls_width=0.125),
    "celebahq": budgets(CELEBA, side=32),
    "afhq_cat": budgets(AFHQ, side=32),
    "lsun_church": budgets(CHURCH, side=32),
}

# --- the attack, which is also the sampler ------------------------------------------------------------------


def pgd_attack(f, x, steps, step, eps=math.inf, sign=1):
    """Eq. 2.8 (2.7 with finite eps): `steps` steps of L2 length `step` up f (sign=-1: down), in [0, 1].

    x float32 [B, C, H, W] in [0, 1], else ValueError; returns the same. Images do not influence each other:
    the gradient is of the SUM over the batch, normalised per image. A zero gradient moves nothing.
    """
    if x.min() < 0 or x.max() > 1:
        raise ValueError(f"an attack wants images in [0, 1]; got [{x.min():.3g}, {x.max():.3g}]")
    x0, x, training = x.detach(), x.detach(), f.training
    f.eval()
    with torch.enable_grad(), fast_precision(x.device):
        for _ in range(steps):
            x.requires_grad_(True)
            gradient, = torch.autograd.grad(f(x)[:, 0].float().sum(), x)                       # [B, C, H, W]
            length = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            x = x.detach() + sign * step * gradient / (length + 1e-10)
            if eps < math.inf:                                                  # Eq. 2.7: first the ball ...
                moved = (x - x0).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                x = x0 + (x - x0) * (eps / moved.clamp(min=eps + 1e-12))
            x = x.clamp(0, 1)                                       # ... then the box, which keeps the ball
    f.train(training)
    return x.detach()


# --- the objective ------------------------------------------------------------------------------------------


def at_loss(f_data, f_adv):
    """-J/2 of Eq. 2.11: the mean of 2m cross-entropies, data = 1, attacked p0 = 0. Optimum log 2."""
    return (F.softplus(-f_data).mean() + F.softplus(f_adv).mean()) / 2


def ebm_loss(f_data, f_adv):
    """The maximum-likelihood gradient of Eq. 2.2 with the same attack as sampler: unbounded (2.5.6)."""
    return f_adv.mean() - f_data.mean()


def r1_penalty(f_data, x):
    """1/2 mean ||grad_x f(x)||^2 at the data, with respect to [0, 1] pixels; x [B, C, H, W] requires grad."""
    gradient, = torch.autograd.grad(f_data.sum(), x, create_graph=True)
    return gradient.float().pow(2).flatten(1).sum(1).mean() / 2


# --- training (Algorithm 3; Algorithm 1 with k_min = k_max) -------------------------------------------------


def train(lab, name="f", objective=at_loss, **changes):
    """Algorithm 3 -> (f, log rows). Goes on from its checkpoint; raises Diverged (.rows) if f runs away."""
    run, s = lab.run, dataclasses.replace(lab.run.settings, **changes)
    data, device = lab.data, lab.run.device
    p0 = lab.p0 if s.p0 == lab.s.p0 else lab.load_p0(s.p0)
    torch.manual_seed(run.args.seed)
    f = common.make_net(s.net, 1, data.shape, s.width).to(device, memory_format=torch.channels_last)
    f.eval()  # for good: a BatchNorm must be the same function in attack and update
    optimizer = torch.optim.Adam(f.parameters(), lr=s.lr, betas=(0.0, 0.99))

    made_with = {k: v for k, v in dataclasses.asdict(s).items() if k not in AT_TEST}
    made_with |= {"objective": objective.__name__, "seed": run.args.seed, "budget": run.args.budget,
                  "data": [len(data), len(p0), *data.shape]}
    file = run.folder / f"{name}.pt"
    state = common.load_checkpoint(file, made_with)
    if state:
        f.load_state_dict(state["f"])
        optimizer.load_state_dict(state["optimizer"])
    else:
        state = {"it": 0, "K": s.k_min, "in_stage": 0, "gradients": 0, "rows": [], "gate": [], "sums": []}
    it, K, in_stage, gradients = (state[k] for k in ("it", "K", "in_stage", "gradients"))
    gate, sums = deque(state["gate"], maxlen=100), state["sums"]  # AUCs of the stage; all since the last row
    if K > s.k_max:
        return f, state["rows"]

    stages = range(s.k_min, s.k_max + 1)
    total = len(stages) * s.iters_per_k
    work = s.iters_per_k * sum(k + s.indist_steps + 6 for k in stages)  # an update costs about 6 attack steps
    print(f"training {name}: {total} updates of {s.batch} + {s.batch} images, K = {s.k_min}..{s.k_max}; "
          f"expected {lab.expected_seconds(f, s.batch, work):.0f} s at this machine's speed", flush=True)
    log = Log(run.folder / ("log.csv" if name == "f" else f"log-{name}.csv"), total, state["rows"],
              show=("K", "loss", "f_data", "f_adv", "auc_adv", "moved", "fd"))
    xs = batches(data, s.batch, run.args.seed, it, s.augment, device, s.workers)
    x0s = batches(p0, s.batch, run.args.seed + 1, it, s.augment_p0, device, s.workers)
    while K <= s.k_max:
        x, x0 = next(xs)[0], next(x0s)[0]                                       # [m, C, H, W] each
        x_adv = pgd_attack(f, x0, K, s.step, s.eps)                             # line 4 of Alg. 3
        x = pgd_attack(f, x, s.indist_steps, s.indist_step, sign=-1).requires_grad_(s.r1 > 0)
        with fast_precision(device):
            f_data, f_adv = f(torch.cat([x, x_adv]))[:, 0].float().chunk(2)     # line 5: logits [m], [m]
            loss = objective(f_data, f_adv)
            penalty = r1_penalty(f_data, x) if s.r1 else torch.tensor(0.0)
        optimizer.zero_grad(set_to_none=True)
        (loss + s.r1 * penalty).backward()
        optimizer.step()

        it, in_stage, gradients = it + 1, in_stage + 1, gradients + K + s.indist_steps
        gate.append(auroc(f_data.detach(), f_adv.detach()))
        moved = (x_adv - x0).flatten(1).norm(dim=1).mean().item() / (K * s.step) if K and s.step else 0.0
        sums.append([loss.item(), f_data.mean().item(), f_adv.mean().item(), gate[-1], moved, penalty.item()])
        runaway = not math.isfinite(sums[-1][0]) or max(map(abs, sums[-1][1:3])) > 1e4
        row = {"K": K, "gradients": gradients}
        gated = K < s.k_max and s.auc_gate and len(gate) == 100 and sum(gate) / 100 > s.auc_gate
        if in_stage == s.iters_per_k or gated:
            K, in_stage = K + 1, 0
            gate.clear()
        ended, fd_due = K > s.k_max or runaway, s.fd_every and it % s.fd_every == 0
        if it % s.log_every == 0 or not in_stage or fd_due or ended:
            with torch.no_grad():
                f_data, f_p0 = f(torch.cat([x, x0]))[:, 0].float().chunk(2)     # an extra pass on clean p0
            means = [sum(column) / len(sums) for column in zip(*sums)]
            row |= dict(zip(("loss", "f_data", "f_adv", "auc_adv", "moved", "r1"), means))
            row |= {"f_p0": f_p0.mean().item(), "auc_p0": auroc(f_data, f_p0), "fd": math.nan}
            if s.fd_every and (fd_due or ended) and lab.features and not runaway:
                start = time.time()
                row["fd"] = lab.frechet(lab.samples(f, n=500))
                log.start += time.time() - start                               # the log's clock is training's
            log.add(it, share=(gradients + 6 * it) / work, **row)
            sums = []
        if runaway:
            raise Diverged(f"training diverged at update {it}: loss {means[0]:.3g}, f(data) {means[1]:.3g}, "
                           f"f(attacked p0) {means[2]:.3g}; try a lower --lr or a larger --r1", log.rows)
        if it % max(s.save_every, 1) == 0 or ended:
            common.save_checkpoint(file, made_with, f=f.state_dict(), optimizer=optimizer.state_dict(), it=it,
                                   K=K, in_stage=in_stage, gradients=gradients, rows=log.rows, sums=sums,
                                   gate=list(gate))
    return f, log.rows


# --- metrics ------------------------------------------------------------------------------------------------


def auroc(positive, negative):
    """Probability that an in-distribution score [P] ranks above an out-distribution one [N]; ties: half."""
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive)
    up_to = torch.searchsorted(ordered, positive, right=True)
    return (below + up_to).sum().item() / 2 / len(positive) / len(negative)


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


class Lab:
    """What the experiments share: data, p0, the seeds of samples, the feature network, the trained model."""

    def __init__(self, args):
        self.args, self.s = args, args.settings
        self.data = self.load(args.dataset, "train")
        self.p0 = self.load_p0(self.s.p0)
        self.classes = common.IN_MEMORY.get(args.dataset, (0, 0, 0))[2]
        self.inception = self.data.shape[0] == 3 and common.InceptionFeatures.at_hand(args.data_dir)
        self.features = bool(self.inception or self.classes)  # no labels and no Inception: no distance
        self.fd, self.inc = ("FID", "IS") if self.inception else ("FD-cls", "IS-cls")
        self.held_out = self.load(args.dataset, "test") if self.classes else None
        self.choose_seeds()  # whatever can be wrong with the settings is said before any work
        common.make_net(self.s.net, 1, self.data.shape, self.s.width)
        if not hasattr(common.make_net(self.s.cls_net, 2, self.data.shape, self.s.cls_width), "features"):
            raise UserError(f"--cls-net {self.s.cls_net} has no features; take mnist_cnn or resnet18")
        batches(self.data, self.s.batch, 0, augment=self.s.augment)
        batches(self.p0, self.s.batch, 0, augment=self.s.augment_p0)
        self.run = Run("at_gen", args, p0=self.s.p0)

    def load(self, name, split):
        channels = 1 if self.args.dataset in ("glyphs", "mnist", "fashion_mnist") else 3
        return load_images(name, split, self.args.data_dir, channels, self.s.side).to(self.args.device)

    def load_p0(self, name, split="train"):
        """A data set, or its first n classes where the name is NAME:n."""
        name, colon, first = name.partition(":")
        p0 = self.load(name, split)
        if colon and not (first.isdecimal() and int(first) and isinstance(p0, Images)):
            raise UserError(f"--p0 {name}:{first}: expected NAME:n, the first n classes of a labelled set")
        return Images(p0.x[p0.y < int(first)], p0.y[p0.y < int(first)], f"{name}:{first}") if colon else p0

    def choose_seeds(self):
        """The p0 images that become samples: a fixed random choice, of the test split if it is big enough."""
        held_out = self.load_p0(self.s.p0, "test")
        self.pool = held_out if len(held_out) >= self.s.images else self.p0
        if len(self.pool) < self.s.images:
            raise UserError(f"--images {self.s.images}: p0 {self.s.p0} has only {len(self.pool)}")
        self.chosen = common.shuffled(len(self.pool), 0)[:self.s.images]

    def slices(self, data, index, size=250):
        """Images of these indices, slice by slice: 50,000 large pictures do not fit in memory."""
        return (data.take(i).to(self.args.device) for i in index.split(size))

    def seeds(self, n):
        """The first n images that become samples [n, C, H, W]."""
        return self.pool.take(self.chosen[:n]).to(self.args.device)

    def samples(self, f, steps=None, step=None, n=None):
        """What the (first n) seeds become, slice by slice; by default as Tab. 2.4 has it."""
        steps, step = steps or self.s.sample_steps, step or self.s.sample_step
        return (pgd_attack(f, x, steps, step) for x in self.slices(self.pool, self.chosen[:n]))

    @functools.cached_property
    def network(self):
        """The network whose .features give the Frechet distance."""
        if self.inception:
            return common.InceptionFeatures(self.inception).to(self.args.device)
        made = self.s.cls_net, self.s.cls_width, self.s.cls_iters
        return common.train_classifier(self.run, self.data, self.classes, *made)

    @torch.no_grad()
    def statistics(self, parts):
        """Mean [d], covariance [d, d], logits [N, classes] of an iterable of image batches."""
        z, logits = [], []
        for x in parts:
            z.append(self.network.features(x))
            logits.append(self.network.head(z[-1]).cpu())
            z[-1] = z[-1].cpu().double()
        z = torch.cat(z)
        return z.mean(0), torch.cov(z.T), torch.cat(logits)

    @functools.cached_property
    def reference(self):
        index = torch.arange(min(self.s.reference, len(self.data)))
        return self.statistics(self.slices(self.data, index))[:2]

    def frechet(self, parts):
        return frechet_distance(*self.reference, *self.statistics(parts)[:2])

    def expected_seconds(self, f, batch, work):
        """Seconds that `work` attack gradients of one batch take, from timing two of them."""
        x = self.p0.take(slice(0, batch)).to(self.args.device)
        pgd_attack(f, x, 1, 0.0).sum().item()
        start = time.time()
        pgd_attack(f, x, 2, 0.0).sum().item()
        return work * (time.time() - start) / 2

    @functools.cached_property
    def trained(self):
        if self.features:
            self.reference  # the classifier first: the training log shows the distance
        return train(self)

    @property
    def f(self):
        return self.trained[0]


# --- experiments --------------------------------------------------------------------------------------------


def figure_2_7(lab):
    """Figures 2.7 and 2.8: images of p0 above and, below, in the same places, the samples they turn into."""
    figure, axes = plt.subplots(2, 1, figsize=(8, 5.2), layout="constrained")
    picture_grid(axes[0], lab.seeds(60), 15, f"source images ({lab.p0.name})")
    samples = pgd_attack(lab.f, lab.seeds(60), lab.s.sample_steps, lab.s.sample_step)
    picture_grid(axes[1], samples, 15, f"samples: {lab.s.sample_steps} PGD steps up f, uncurated")
    lab.run.save(figure, "figure2.7")
    sets = {"p0": lab.seeds(60), "samples": samples, "data": lab.data.take(slice(0, 60)).to(lab.args.device)}
    return {f"mean f of {name}": lab.f(x).mean().item() for name, x in sets.items()}


def sweep(lab):
    """A strip: each row an image of p0 on its way; columns by displacement budget, steps x size."""
    steps = [round(share * lab.s.sample_steps) for share in (0, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 4)]
    budgets = [f"{count * lab.s.sample_step:.3g}" for count in steps]
    path = [pgd_attack(lab.f, lab.seeds(10), count, lab.s.sample_step) for count in steps]
    numbers = {f"mean f at budget {budget}": lab.f(x).mean().item() for budget, x in zip(budgets, path)}
    figure, axis = plt.subplots(figsize=(7, 7.4), layout="constrained")
    picture_grid(axis, torch.stack(path, 1).flatten(0, 1), len(steps), "images of p0, by displacement budget")
    axis.axis("on")
    axis.set_yticks([])
    width = path[0].shape[-1] + 1
    axis.set_xticks([width * (i + 0.5) for i in range(len(steps))], budgets)
    lab.run.save(figure, "sweep")
    return numbers


def no_distance(function):
    """An experiment that needs a Frechet distance says what is missing where there is none."""
    @functools.wraps(function)
    def wrapped(lab):
        if not lab.features:
            return {"FID": f"needs {common.InceptionFeatures.FILE} in --data-dir"}
        return {"n": lab.s.images, **function(lab)}
    return wrapped


@no_distance
def table_2_5(lab):
    """Frechet distance and inception score of p0 images, of the samples they turn into, of held-out data."""
    rows, index = {}, torch.arange(min(lab.s.images, len(lab.held_out)))
    sets = {"p0": lab.slices(lab.pool, lab.chosen), "samples": lab.samples(lab.f),
            f"held-out data, n = {len(index)}": lab.slices(lab.held_out, index)}
    for name, parts in sets.items():
        mean, cov, logits = lab.statistics(parts)
        rows[f"{lab.fd} {name}"] = frechet_distance(*lab.reference, mean, cov)
        rows[f"{lab.inc} {name}"] = inception_score(logits)
    rows[f"{lab.fd} samples / p0"] = rows[f"{lab.fd} samples"] / rows[f"{lab.fd} p0"]
    if not lab.inception:  # the last set's logits
        right = (logits.argmax(1) == lab.held_out.y[:len(logits)].cpu()).sum().item()
        rows["accuracy of the FD-cls network"] = right / len(logits)
        rows["its 95 % interval"] = common.wilson(right, len(logits))
    return {**rows, "reference images": min(len(lab.data), lab.s.reference),
            "training seconds": lab.trained[1][-1]["seconds"]}


def table_2_9(lab):
    """PGD steps an image gets in training and at test time."""
    return {"training steps": lab.s.k_max, "test steps": lab.s.sample_steps}


def table_2_10(lab):
    """Seconds to generate 50 samples in one batch, the best of three after a warm-up."""
    x, seconds = lab.seeds(50), []
    for steps in (1, *3 * [lab.s.sample_steps]):
        start = time.time()
        pgd_attack(lab.f, x, steps, lab.s.sample_step).sum().item()  # .item() waits for the device
        seconds.append(time.time() - start)
    return {"steps": lab.s.sample_steps, f"seconds for {len(x)} samples": min(seconds[1:])}


@no_distance
def table_2_11(lab):
    """The same total displacement in twice, once and half the steps."""
    rows = {}
    for factor in (2, 1, 0.5):
        steps = max(round(lab.s.sample_steps * factor), 1)
        step = lab.s.sample_steps * lab.s.sample_step / steps
        rows[f"{lab.fd} {steps} x {step:g}"] = lab.frechet(lab.samples(lab.f, steps, step))
    return rows


P0_SWEEP = {"glyphs": ("letters", "letters:4", "noise"), "mnist": ("letters", "letters:4", "noise"),
            "cifar10": ("tinyimagenet", "tinyimagenet:10", "noise")}


@no_distance
def figure_2_3(lab):
    """Diversity of p0 in training; all models sample from the same source images with the same attack."""
    rows, pictures = {}, []
    for name in P0_SWEEP.get(lab.args.dataset, (lab.s.p0, "noise")):
        f = lab.f if name == lab.s.p0 else train(lab, f"p0-{name.replace(':', '-')}", p0=name)[0]
        rows[f"{lab.fd} trained with p0 = {name}"] = lab.frechet(lab.samples(f))
        pictures.append(next(lab.samples(f, n=40)))
    figure, axes = plt.subplots(len(rows) + 1, 1, figsize=(8, 1.1 * len(rows) + 1.3), layout="constrained")
    picture_grid(axes[0], lab.seeds(40), 20, "source images, the same for all")
    for axis, x, (name, value) in zip(axes[1:], pictures, rows.items()):
        picture_grid(axis, x, 20, f"{name.split(' ', 1)[1]}: {lab.fd} {value:.1f}")
    lab.run.save(figure, "figure2.3")
    return rows


def fixed_k(lab, K):
    """Algorithm 1 with this K, for as many updates as the progressive run has -> (f, log rows)."""
    updates = (lab.s.k_max - lab.s.k_min + 1) * lab.s.iters_per_k
    return train(lab, f"fixed-K{K}", k_min=K, k_max=K, iters_per_k=updates)


@no_distance
def figure_2_4(lab):
    """Frechet distance against a fixed K (Algorithm 1), the same number of updates each."""
    ks = [k for k in (1, 5, 10) if k < lab.s.k_max] + [lab.s.k_max]
    rows = {f"{lab.fd} K = {K}": lab.frechet(lab.samples(fixed_k(lab, K)[0])) for K in ks}
    figure, axis = plt.subplots(figsize=(4.5, 3.2), layout="constrained")
    axis.plot(ks, list(rows.values()), "o-")
    axis.set(xlabel="K (fixed)", ylabel=f"{lab.fd} ({lab.s.images} samples)", ylim=(0, None))
    lab.run.save(figure, "figure2.4")
    return rows


@no_distance
def figure_2_5(lab):
    """Progressive K (Algorithm 3) against fixed K, by training seconds and by attack gradients."""
    rows = {"n": min(500, lab.s.images)}
    runs = {f"K = {lab.s.k_min}..{lab.s.k_max}": lab.trained[1]}
    runs |= {f"K = {K}": fixed_k(lab, K)[1] for K in sorted({min(5, lab.s.k_max), lab.s.k_max})}
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.3), sharey=True, layout="constrained")
    for label, log in runs.items():
        log = [row for row in log if not math.isnan(row["fd"])]
        for axis, key in zip(axes, ("seconds", "gradients")):
            axis.plot([row[key] for row in log], [row["fd"] for row in log], "o-", ms=3, label=label)
        rows |= {f"{lab.fd} {label}, end": log[-1]["fd"], f"seconds {label}": log[-1]["seconds"],
                 f"attack gradients {label}": log[-1]["gradients"]}
    axes[0].set(xlabel="training seconds", ylabel=f"{lab.fd} (500 samples)", yscale="log")
    axes[1].set(xlabel="attack gradients")
    axes[0].legend()
    lab.run.save(figure, "figure2.5")
    return rows


def stability(lab):
    """Section 2.5.6, here at a fixed K, without R1: the EBM objective (2.2) runs away, AT does not."""
    K, rows = min(5, lab.s.k_max), {}
    short = dict(k_min=K, k_max=K, iters_per_k=20 * lab.s.log_every, log_every=max(lab.s.log_every // 5, 1),
                 fd_every=0, r1=0.0)
    cases = (("AT", at_loss, lab.s.lr), ("EBM", ebm_loss, lab.s.lr), ("EBM, lr 1e-6", ebm_loss, 1e-6))
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for label, objective, lr in cases:
        try:
            log = train(lab, f"stability-{objective.__name__}-{lr:g}", objective, lr=lr, **short)[1]
        except Diverged as stop:
            print(stop)
            log = stop.rows
        gap, its = [row["f_data"] - row["f_adv"] for row in log], [row["it"] for row in log]
        axis.plot(its, gap, label=label)
        rows[f"largest |f(x) - f(x*)|, {label}"] = max(map(abs, gap))
        ended = f"none in {its[-1]}" if its[-1] == short["iters_per_k"] else its[-1]
        rows[f"updates before it ran away, {label}"] = ended
    axis.set(xlabel="update", ylabel="mean f(x) - mean f(x*)", yscale="symlog")
    axis.legend()
    lab.run.save(figure, "stability")
    return rows


PUBLISHED_2_5 = {"cifar10": {"FID samples": 13.21, "IS samples": 9.10}, "celebahq": {"FID samples": 17.31},
                 "afhq_cat": {"FID samples": 13.35}, "lsun_church": {"FID samples": 14.87}}  # and Tab. 2.6
PUBLISHED_2_9 = {name: {"training steps": k, "test steps": n} for name, k, n in
                 (("cifar10", 25, 32), ("celebahq", 40, 20))}
PUBLISHED_2_10 = {"cifar10": {"steps": 32, "seconds for 50 samples": "2.34 (RTX 2080 Ti)"}}
PUBLISHED_2_11 = {"cifar10": {"FID 64 x 0.1": 13.07, "FID 32 x 0.2": 13.21, "FID 16 x 0.4": 13.49},
                  "celebahq": {"FID 40 x 4": 19.19, "FID 20 x 8": 18.97, "FID 10 x 16": 19.19}}
EXPERIMENTS = {  # figures 2.3 to 2.5 of the source print no numbers
    "table2.5": Experiment(table_2_5, "Frechet distance, inception score", "5 min", True, PUBLISHED_2_5),
    "table2.10": Experiment(table_2_10, "seconds for 50 samples", "1 s", True, PUBLISHED_2_10),
    "table2.11": Experiment(table_2_11, "number of steps against their length", "25 s", True, PUBLISHED_2_11),
    "figure2.7": Experiment(figure_2_7, "sources and samples", "1 s", True),
    "sweep": Experiment(sweep, "samples by displacement budget", "1 s", True),
    "table2.9": Experiment(table_2_9, "PGD steps in training and test", "1 s", False, PUBLISHED_2_9),
    "figure2.3": Experiment(figure_2_3, "diversity of p0", "two more trainings of 4 min"),
    "figure2.4": Experiment(figure_2_4, "fixed K", "four more trainings, 1 to 5 min"),
    "figure2.5": Experiment(figure_2_5, "progressive against fixed K", "two more trainings, 2 and 5 min"),
    "stability": Experiment(stability, "AT objective against EBM objective (2.5.6)", "3 min", False,
                            {"cifar10": {"largest |f(x) - f(x*)|, EBM, lr 1e-6": "overflows"}}),
}


# --- command line -------------------------------------------------------------------------------------------


def get_args(argv=None):
    return common.parse_args(__doc__, SETTINGS, EXPERIMENTS, argv)


def main(argv=None):
    args = get_args(argv)
    lab = Lab(args)
    lab.run.closing_table({name: lab.run.experiment(name, EXPERIMENTS[name], lab) for name in args.only})


if __name__ == "__main__":
    common.call(main)
