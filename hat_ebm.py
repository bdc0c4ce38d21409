r"""The Hat EBM: an energy worn by a generator's image plus a residual for what the generator misses.

Source: Mitchell 2022, "Adversarial Attacks and Defense using Energy-Based Image Models", chapter 6.

A generator G turns a latent z, a vector of random numbers, into an image. An energy is a network that gives
an image one number, low for images like the training data; exp(-energy) is, up to a factor, a density. A
chain walks down an energy in small steps, each with some noise (Langevin dynamics), and ends at samples of
that density. Here an image is the sum X = G(z) + y, and a network H, the hat, gives X its energy. Chains
start at z ~ N(0, I) and a residual image y = 0, and walk in z, in y or in both. y reaches what G cannot
generate. H is taught as any energy is: H(data) down, H(ends of chains) up. It is applied to a training image
itself, so nobody has to find the z that would generate it. Three modes share sampler and training loop; they
differ in where G comes from, and in what walks:

    synth     G is learned with H: it imitates ends of chains, so that chains start ever nearer to data. z
              stays as drawn and y alone walks (Eq. 6.9: the model of y for a given z)
    refine    G is the frozen generator of a GAN (generative adversarial network), trained here; both walk
    retrofit  G is the frozen decoder of an autoencoder; both walk. Its encoder puts every z on the sphere
              near which N(0, I) lies, but nobody knows where on it images are: chains have to find out

    U(y, z) = H(G(z) + y) / T: energy, LOW = in-distribution (toy2d's f is HIGH); T, the temperature, weighs
            slope and noise (6.4). In retrofit a prior is added that pulls y towards 0.
    Pixels are in [0, 1]; networks scale inside. The source's are in [-1, 1]: its tau of y, noise on the data
    and clip stand here halved, its prior four times. z is the same there and here.
    (6.7)   z <- z - tau_z^2/(2T) grad_z H(G(z) + y) + tau_z N(0, I), then
    (6.6)   y <- y - tau_y^2/(2T) grad_y H(G(z) + y) + tau_y N(0, I). Its slope moves y by a length of at most
            CLIP, however steep H is. Nothing pulls z back to N(0, I); the log shows how far it strays
    (6.8)   H's weights descend the gradient of E_data[H] - E_chains[H], chains held fixed
    Alg. 5  synth: a bank keeps pairs (X, z) of the past, 78 updates old on average; at first they are G's.
            After H's update G takes a step down the mean of ||G(z) - X||^2 (6.12) on pairs of the bank;
            the newest pairs then take their places. Why not on the newest? Figure 6.4 tries it.
    (6.10)  Cooperative learning, the peer: before G learns from (X, z), z takes some steps of
            z <- z - s^2/2 (z + grad_z ||G(z) - X||^2 / (2 eta^2)) + s N(0, I): which z made X?
    DDLS    Another peer (discriminator-driven latent sampling): steps in z down |z|^2/2 - D(G(z)), D the
            logit of the GAN's discriminator. Constants of both peers are ours, and not tuned.

Commands (two cores; all numbers: results/hat_ebm.md):
    python hat_ebm.py                       digits, 5 minutes; refinement takes FD-cls (Frechet distance in a
                                            classifier's features, low = like the data) from 87 to 54
    python hat_ebm.py --dataset cifar10     a GPU, never run so far; --budget paper or thesis: as published
The log. d: mean H of data minus that of ends of chains; far below 0, H tells them apart at sight.
grad: length of grad H at these ends. y: of the residual. z: its standard deviation. loss_g: (6.12), a pixel.

Differs: digits have the T and the data noise of lifecycle_midrun.py; the source's T of 1e-8 is for colour
images. Evaluations clip like training and start at y = 0. The GAN is taught by cross-entropy, so that D is a
logit, as DDLS wants. Rates stay constant. Eq. 6.10 is taken (the published code leaves it out).
"""
from functools import partial
from typing import NamedTuple

import common  # before torch, so that Ctrl-C ends even its import quietly
import torch
import torch.nn.functional as F
from torch import nn

from common import Diverged, Training, UserError, by_parts, fast_precision, follow, frozen_copy
from common import input_gradient, load_on_device, once, repeat, seeded, value

# --- settings -----------------------------------------------------------------------------------------------

SETTINGS = common.settings(  # a row: a value for each column, then its help
    columns=("glyphs", "mnist fashion_mnist", "cifar10", "celeba imagenet",
             "cifar10-paper", "cifar10-thesis", "celeba-paper", "imagenet-paper"),
    smoke=dict(width=0.0625, width_g=0.0625, batch=8, gan_iters=2, ae_iters=2, cls_iters=3, images=24,
               synth_updates=3, synth_k=2, synth_k_test=3, refine_updates=3, refine_k=2, refine_k_test=3,
               retrofit_updates=3, retrofit_k=2, retrofit_k_test=3),
    mode=("all", "experiments of one mode: synth, refine, retrofit; all: the headline; --only goes first"),
    side=(28, 28, 32, 64, 32, 32, 64, 128, "pixels; pictures in files are resized"),
    net=("light_ebm", "light_ebm", "sngan", "sngan", "sngan", "sngan", "sngan", "sngan",
         "network of H, and of the GAN's D"),
    width=(0.25, 0.25, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0, "times its published channels"),
    width_g=(0.09375, 0.125, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0, "the same, for generators and autoencoder"),
    batch=(32, 32, 64, 64, 128, 128, 128, 128, "data images, and as many chains, in an update"),
    gan_iters=(200, 500, 8000, 8000, 100_000, 100_000, 100_000, 100_000, "updates of the GAN's G"),
    ae_iters=(800, 1000, 5000, 5000, 49_900, 49_900, 49_900, 49_900, "updates of the autoencoder"),
    cls_iters=(300, 600, 2000, 2000, 8000, 8000, 8000, 8000, "updates of FD-cls's classifier"),
    images=(200, 1000, 5000, 5000, 49_920, 49_920, 49_920, 49_920, "samples in an evaluation"),
    compared=(80, 200, 500, 500, 500, 500, 500, 500, "updates of each learner in figure 6.4"),
    # synthesis: Alg. 5
    synth_updates=(450, 2000, 6000, 4000, 50_000, 100_000, 50_000, 300_000, "updates of H, and of G"),
    synth_lr=(4e-4, 4e-4, 1e-4, 1e-4, 1e-4, 1e-4, 1e-4, 1e-4, "rate of Adam, of H"),
    synth_lr_g=(1e-3, 1e-3, 1e-4, 1e-4, 1e-4, 1e-4, 1e-4, 5e-5, "rate of Adam, of G"),
    synth_k=(20, 20, 50, 50, 50, 50, 50, 50, "Langevin steps of an update"),
    synth_k_test=(20, 20, 125, 100, 125, 125, 100, 150, "Langevin steps to a sample"),
    synth_tau_y=(0.015, 0.015, 2.5e-4, 2.5e-4, 2.5e-4, 5e-5, 2.5e-4, 2.5e-4, "noise of a step of y"),
    synth_t=(1e-4, 1e-4, 1e-8, 1e-8, 1e-8, 1e-3, 1e-8, 1e-8, "T"),
    synth_noise=(0.03, 0.03, 5e-4, 5e-4, 5e-4, 5e-4, 5e-4, 5e-4, "noise on the data"),
    refine_updates=(120, 250, 3000, 3000, 25_000, 150_000, 25_000, 25_000, "updates of H"),
    refine_lr=(1e-3, 5e-4, 1e-4, 1e-4, 1e-5, 1e-4, 1e-5, 1e-5, "rate of Adam"),
    refine_k=(15, 15, 50, 50, 250, 100, 100, 100, "Langevin steps of an update"),
    refine_k_test=(20, 20, 100, 100, 350, 350, 125, 125, "Langevin steps to a sample"),
    refine_tau_y=(0.01, 0.01, 5e-5, 5e-5, 5e-5, 5e-5, 5e-5, 5e-5, "noise of a step of y"),
    refine_tau_z=(0.02, 0.02, 5e-3, 5e-3, 5e-3, 5e-3, 5e-3, 5e-3, "noise of a step of z"),
    refine_t=(1e-4, 1e-4, 1e-6, 1e-6, 1e-3, 1e-4, 1e-6, 1e-6, "T"),
    refine_noise=(0.03, 0.03, 5e-4, 5e-4, 5e-4, 1e-2, 5e-4, 5e-4, "noise on the data"),
    retrofit_updates=(150, 250, 3000, 3000, 25_000, 100_000, 25_000, 25_000, "updates of H"),
    retrofit_lr=(1e-4, "rate of Adam"),
    retrofit_k=(15, 15, 50, 50, 100, 100, 100, 100, "Langevin steps of an update"),
    retrofit_k_test=(20, 20, 100, 100, 125, 125, 125, 125, "Langevin steps to a sample"),
    retrofit_tau_y=(0.005, 0.005, 2.5e-4, 2.5e-4, 2.5e-4, 2.5e-3, 2.5e-4, 2.5e-4, "noise of a step of y"),
    retrofit_tau_z=(0.02, 0.02, 1e-3, 1e-3, 1e-3, 5e-3, 1e-3, 1e-3, "noise of a step of z"),
    retrofit_t=(1e-4, 1e-4, 1e-6, 1e-6, 1e-3, 1e-3, 1e-3, 1e-3, "T"),
    retrofit_noise=(0.03, 0.03, 5e-3, 5e-3, 5e-3, 5e-4, 5e-3, 5e-3, "noise on the data"),
)
CLIP = 1.25  # longest way that y goes down the slope in a step, l_2 over an image
PRIOR = 200.0  # retrofit: this times |y|^2 is added to U, as published (50 where pixels are in [-1, 1])
LIFE = 78  # updates that a pair stays in the bank, on average: the bank holds so many batches
D_UPDATES = 5  # updates of the SNGAN's discriminator for one of its generator
DRAWS = 3  # sets of samples that a distance is the mean of
OTHERS = {  # channels: data sets that table 6.3 holds against the script's own
    1: ("symbols", "letters", "fashion_mnist", "noise"),
    3: ("svhn", "cifar100", "celeba", "tinyimagenet"),
}

# --- generators, an encoder ---------------------------------------------------------------------------------

GENERATOR = {  # side: side of the first map, its channels, channels behind each block that doubles the side
    28: (7, 256, (256, 256)),
    32: (4, 256, (256, 256, 256)),
    64: (4, 1024, (512, 256, 128, 64)),
    128: (4, 1024, (1024, 512, 256, 128, 64)),
}

class Generator(nn.Module):
    """G, an SNGAN generator: z [B, 128] -> [B, C, S, S]. factor 2: it reaches, as published, -.5 to 1.5."""

    def __init__(self, shape, width, factor):
        super().__init__()
        channels, side, _ = shape
        self.latent, self.factor = (128,), factor
        start, c, wide = GENERATOR[side]
        c = round(c * width)
        layers = [nn.Linear(128, c * start**2), nn.Unflatten(1, (c, start, start))]
        for w in wide:
            layers.append(common.GBlock(c, round(w * width)))
            c = round(w * width)
        self.body = nn.Sequential(*layers, nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, channels, 3, 1, 1))
        common.init_xavier(self)

    def forward(self, z):
        return (1 + self.factor * self.body(z).tanh()) / 2

class Decoder(nn.Module):
    """G of an autoencoder: z [B, 1, S/2, S/2], an image-shaped latent, -> [B, C, S, S], -.5 to 1.5."""

    def __init__(self, shape, width):
        super().__init__()
        channels, side, _ = shape
        c = round(256 * width)
        self.latent = (1, side // 2, side // 2)
        first = common.GBlock(1, c, up=False)
        first.main = first.main[2:]  # no BatchNorm, no ReLU before the first convolution
        layers = [first, common.GBlock(c, c), common.GBlock(c, c, up=False), common.GBlock(c, c, up=False)]
        self.body = nn.Sequential(*layers, nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, channels, 3, 1, 1))
        common.init_xavier(self)

    def forward(self, z):
        return 0.5 + self.body(z).tanh()

class Encoder(nn.Module):
    """Images [B, C, S, S] -> latents [B, 1, S/2, S/2] on the sphere of radius sqrt(m), m their size."""

    def __init__(self, channels, width):
        super().__init__()
        c = round(256 * width)
        self.body = nn.Sequential(
            common.DBlock(channels, c, first=True),
            common.DBlock(c, c, down=True),
            common.DBlock(c, c), common.DBlock(c, c),
            nn.ReLU(), nn.Conv2d(c, 1, 3, 1, 1),
        )
        common.init_xavier(self)

    def forward(self, x):
        z = self.body(2 * x - 1)
        return F.normalize(z.flatten(1)).view_as(z) * z[0].numel() ** 0.5

# --- sampling -----------------------------------------------------------------------------------------------

class Mode(NamedTuple):
    """How a Hat EBM is trained and sampled: a mode's rows of the settings."""
    updates: int
    lr: float
    k: int  # Langevin steps of an update
    k_test: int  # of an evaluation
    tau_y: float  # noise of a step of y; 0: no residual at all (figure 6.6)
    t: float  # temperature T
    noise: float  # on the data
    tau_z: float = 0.0  # noise of a step of z; 0: z stays, the conditional model (6.9)
    prior: float = 0.0  # prior |y|^2 is added to U

def mode(s, name, tau_z=0.0, prior=0.0):
    """The settings of a mode by its name: s.refine_updates and so on."""
    numbers = [getattr(s, f"{name}_{field}") for field in Mode._fields[:-2]]
    return Mode(*numbers, tau_z, prior)

class Hat(NamedTuple):
    """A Hat EBM: energy U(y, z) = H(G(z) + y) / T (+ prior |y|^2), and the log of its training."""
    H: nn.Module
    G: nn.Module
    mode: Mode
    log: list
    exact: nn.Module = None  # H in float32: scores in bfloat16 would tie

def lengths(x):
    """l_2 length of each image or latent [B, ...] -> [B]."""
    return x.flatten(1).norm(dim=1)

def hat_step(state, H, G, m):
    """A Langevin step of z (Eq. 6.7; none where tau_z is 0), then of y (6.6).
    state: z [B, *latent], G(z) and y [B, C, S, S]. Nothing is clamped; y moves at most CLIP down the slope.
    """
    z, g, y = state
    if m.tau_z:
        slope = input_gradient(lambda z: H(G(z) + y), z) / m.t  # of U
        z = z - m.tau_z**2 / 2 * slope + m.tau_z * torch.randn_like(z)
        g = G(z)
    if m.tau_y:
        slope = input_gradient(H, g + y) / m.t + 2 * m.prior * y  # of U
        down = m.tau_y**2 / 2 * slope
        length = lengths(down).view(-1, 1, 1, 1)
        down = down * (CLIP / length.clamp(min=CLIP))
        y = y - down + m.tau_y * torch.randn_like(y)
    return z, g, y

def noise_for(G, n):
    """n draws of z ~ N(0, I) of G's shape, on its device [n, *latent]."""
    return torch.randn(n, *G.latent, device=next(G.parameters()).device)

def walk(hat, state, steps):
    """The state z, G(z), y of chains after so many steps more."""
    return repeat(hat_step, state, steps, hat.H, hat.G, hat.mode)

@torch.no_grad()
def sample(hat, n, steps):
    """n chains from z ~ N(0, I), y = 0 -> z, G(z), y; the samples are G(z) + y."""
    z = noise_for(hat.G, n)
    g = hat.G(z)
    return walk(hat, (z, g, torch.zeros_like(g)), steps)

# --- learning -----------------------------------------------------------------------------------------------

def descend(optimizer, loss):
    """A step of the optimiser down the loss."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()

def exchange(bank_z, bank_x, rows, z, x):
    """Put new pairs into these rows of the bank -> the old pairs."""
    old = bank_z[rows], bank_x[rows]
    bank_z[rows], bank_x[rows] = z, x
    return old

def infer_step(z, G, x):
    """Eq. 6.10 with s = .1, eta = .15: a step of z towards what would generate x."""
    slope = input_gradient(lambda z: lengths(G(z) - x).square(), z)
    down = z + slope / 0.045  # 2 eta^2
    return z - 0.005 * down + 0.1 * torch.randn_like(z)

@seeded
def train_hat(run, s, m, data, name, G=None, pairs="historical", batchnorm=False):
    """Eq. 6.8 with a frozen G; without one Algorithm 5, which learns G too -> Hat.

    pairs, what G learns from: "historical" (those in the bank), "current" (those just made), "inferred"
    (these, their z by Eq. 6.10: cooperative learning). batchnorm: G normalises by its batches.
    """
    H = common.make_net(s.net, 1, data.shape, s.width).to(run.device)
    adam = torch.optim.Adam(H.parameters(), m.lr)
    parts = {"H": H, "adam": adam}
    learned = G is None
    if learned:
        G = Generator(data.shape, s.width_g, 2).to(run.device)
        G.train(batchnorm)  # in eval mode, even in its own update, BatchNorm's mean is 0 and its variance 1
        adam_g = torch.optim.Adam(G.parameters(), s.synth_lr_g)
        bank_z = noise_for(G, LIFE * s.batch)
        with torch.no_grad():
            bank_x = by_parts(G, bank_z, run.chunk)
        parts.update(G=G, adam_g=adam_g, bank_z=bank_z, bank_x=bank_x)
    hat = Hat(frozen_copy(H), frozen_copy(G), m, [])
    hat.G.latent = G.latent
    hat.G.net.train(G.training)
    made_from = {**m._asdict(), "H": H, "G": G, "images": data, "batch": s.batch}
    if learned:
        made_from.update(lr_g=s.synth_lr_g, pairs=pairs, batchnorm=batchnorm)
    training = Training(run, name, made_from, advice="a lower rate or a higher T", **parts)
    stream = common.batches(data, s.batch, run.seed, training.it, device=run.device)
    for _ in training.updates(m.updates):
        x, _ = next(stream)
        x = x + m.noise * torch.randn_like(x)  # [B, C, S, S], not clamped
        follow(hat.H, H)
        if learned:
            follow(hat.G, G)
        z, g, y = sample(hat, s.batch, m.k)
        chains = g + y
        with fast_precision(run.device):
            h_data, h_chains = H(torch.cat([x, chains]))[:, 0].float().chunk(2)
        d = h_data.mean() - h_chains.mean()  # Eq. 6.8; of U, hence / T, which Adam hardly feels
        descend(adam, d / m.t)
        slope = input_gradient(hat.H, chains)
        training.log(d=d, grad=lengths(slope).mean(), y=lengths(y).mean(), z=z.std())
        if learned:
            if pairs == "historical":
                rows = torch.randperm(len(bank_z))[: s.batch]
                z, chains = exchange(bank_z, bank_x, rows, z, chains)
            elif pairs == "inferred":
                for _ in range(3):  # not by repeat(): its padding would enter BatchNorm's means
                    z = infer_step(z, G, chains)
            with fast_precision(run.device):
                loss_g = (G(z).float() - chains).square().mean()
            descend(adam_g, loss_g)
            training.log(loss_g=loss_g)
    follow(hat.H, H)
    follow(hat.G, G)
    hat.G.eval()
    return hat._replace(log=training.rows, exact=frozen_copy(H, fast=False))

# --- peers: the SNGAN and DDLS; the autoencoder that is retrofitted -----------------------------------------

def spectral(net):
    """Spectral norm on every convolution and linear layer of a network, in place."""
    for layer in list(net.modules()):
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.utils.parametrizations.spectral_norm(layer)
    return net

@seeded
def train_sngan(run, s, data):
    """A GAN whose discriminator D has spectral norm -> G, D, both frozen. D is a logit: high for data."""
    G = Generator(data.shape, s.width_g, 1).to(run.device)
    D = spectral(common.make_net(s.net, 1, data.shape, s.width)).to(run.device)
    rates = {"lr": 2e-4, "betas": (0.0, 0.9)}
    adam_g = torch.optim.Adam(G.parameters(), **rates)
    adam_d = torch.optim.Adam(D.parameters(), **rates)
    made_from = {"G": G, "D": D, "updates": s.gan_iters, "batch": s.batch, "images": data}
    training = Training(run, "sngan", made_from, G=G, D=D, adam_g=adam_g, adam_d=adam_d)
    stream = common.batches(data, s.batch, run.seed, D_UPDATES * training.it, device=run.device)
    for _ in training.updates(s.gan_iters):
        for _ in range(D_UPDATES):
            x, _ = next(stream)
            with torch.no_grad():
                fake = G(noise_for(G, s.batch))
            with fast_precision(run.device):
                d_data, d_fake = D(torch.cat([x, fake]))[:, 0].float().chunk(2)
            loss_d = F.softplus(-d_data).mean() + F.softplus(d_fake).mean()
            descend(adam_d, loss_d)
        with fast_precision(run.device):
            d_fake = D(G(noise_for(G, s.batch))).float()
        loss_g = F.softplus(-d_fake).mean()
        descend(adam_g, loss_g)
        training.log(loss_d=loss_d, loss_g=loss_g)
    for layer in list(D.modules()):
        if nn.utils.parametrize.is_parametrized(layer):  # the same weights, no longer made at each call
            nn.utils.parametrize.remove_parametrizations(layer, "weight")
    return G.eval().requires_grad_(False), frozen_copy(D)

def ddls_step(z, G, D):
    """DDLS: a Langevin step of the energy |z|^2/2 - D(G(z)) of z [B, 128]."""
    slope = z - input_gradient(lambda z: D(G(z)), z)
    return z - 0.005 * slope + 0.1 * torch.randn_like(z)

@seeded
def train_autoencoder(run, s, data):
    """An encoder onto the sphere and a decoder, by squared error -> the decoder, frozen."""
    encoder = Encoder(data.shape[0], s.width_g).to(run.device)
    decoder = Decoder(data.shape, s.width_g).to(run.device).eval()  # BatchNorm: mean 0, variance 1
    adam = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 1e-4)
    made_from = {"decoder": decoder, "updates": s.ae_iters, "batch": s.batch, "images": data}
    training = Training(run, "autoencoder", made_from, encoder=encoder, decoder=decoder, adam=adam)
    stream = common.batches(data, s.batch, run.seed, training.it, device=run.device)
    for _ in training.updates(s.ae_iters):
        x, _ = next(stream)
        with fast_precision(run.device):
            z = encoder(x)
            z = z + 0.02 * torch.randn_like(z)
            loss = (decoder(z).float() - x).square().mean()
        descend(adam, loss)
        training.log(loss=loss)
    return decoder.requires_grad_(False)

# --- how far images are from data ---------------------------------------------------------------------------

def frechet_distance(mean1, cov1, mean2, cov2):
    """||m1 - m2||^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2) of two Gaussians, float64 [d], [d, d]."""
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return ((mean1 - mean2).pow(2).sum() + cov1.trace() + cov2.trace() - 2 * cross).item()

class Metric(NamedTuple):
    """Frechet distance to training images; name: FID (Inception-V3) or FD-cls (the set's own classifier)."""
    name: str
    network: nn.Module
    mean: torch.Tensor
    cov: torch.Tensor

    def distance(self, x):
        """The distance of images [N, C, S, S], which are first cut to [0, 1] and rounded to 1/255."""
        x = (255 * x.clamp(0, 1)).round() / 255
        return frechet_distance(self.mean, self.cov, *common.feature_statistics(self.network, x))

    @torch.no_grad()
    def diversity(self, x):
        """Mean distance of two images of [N, C, S, S] in the network's features."""
        z = by_parts(self.network.features, x.clamp(0, 1), 250)
        return torch.pdist(z.float()).mean().item()

def make_metric(run, s, data):
    """FID where Inception-V3's weights are at hand, else FD-cls; held against 10,000 + s.images images."""
    def classifier():
        net = "mnist_cnn" if data.shape[0] == 1 else "resnet18"
        build = partial(common.make_net, net, int(data.y.max()) + 1, data.shape)
        return common.train_classifier(run, "classifier", build, data, s.cls_iters)
    name, network = common.feature_network(data, run.data_dir, classifier)
    reference = data.take(common.shuffled(len(data), 321)[: 10_000 + s.images]).to(run.device)
    return Metric(name, network, *common.feature_statistics(network, reference))

def auroc(positive, negative):
    """Probability that an in-distribution score [P] ranks above an out-distribution one [N]; ties: half."""
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive.contiguous())
    up_to = torch.searchsorted(ordered, positive.contiguous(), right=True)
    return (below + up_to).sum().item() / 2 / len(positive) / len(negative)

# --- tables and figures -------------------------------------------------------------------------------------

def from_hat(hat, steps, n):
    """n samples of a Hat EBM by chains of these steps [n, C, S, S]; 0 steps: of its generator alone."""
    _, g, y = sample(hat, n, steps)
    return g + y

@torch.no_grad()
def from_ddls(G, D, steps, n):
    """n samples of the SNGAN by chains of DDLS of these steps [n, C, S, S]."""
    return G(repeat(ddls_step, noise_for(G, n), steps, G, D))

def distance_row(run, s, metric, title, make, **beside):
    """A row: Frechet distance of s.images images that make(n) draws: mean, lowest, highest of DRAWS."""
    distances = []
    for draw in range(DRAWS):
        torch.manual_seed(run.seed + draw)
        x = [make(len(part)) for part in torch.arange(s.images).split(run.chunk)]
        distances.append(metric.distance(torch.cat(x)))
    low, high = min(distances), max(distances)
    mean = sum(distances) / DRAWS
    return value(f"{metric.name} {title}", mean, low=low, high=high, n=s.images, **beside)

def floor_row(s, metric, test):
    """A row: the distance of held-out data, that of perfect samples that are not copies."""
    x, _ = test.some(s.images)
    return value(f"{metric.name} held-out data", metric.distance(x), n=len(x))

def before_and_after(run, name, hat):
    """NAME.png: 60 starts of chains, and where these chains end."""
    torch.manual_seed(run.seed)
    state = sample(hat, 60, 0)
    _, g, y = walk(hat, state, hat.mode.k_test)
    run.pictures(name, {"G(Z), Z from N(0, I)": state[1], "ends of chains": g + y}, 20)

def table_6_1(run, s, test, metric, sngan, refine):
    """Refinement of a frozen generator: what it draws, DDLS in twice the hat's steps, the Hat EBM."""
    _, D = sngan
    G, k = refine.G, refine.mode.k_test
    make = partial(distance_row, run, s, metric)
    rows = [make("generator", partial(from_hat, refine, 0))]
    rows.append(make("DDLS", partial(from_ddls, G, D, 2 * k), steps=2 * k))
    rows.append(make("Hat EBM", partial(from_hat, refine, k), steps=k))
    before_and_after(run, "table6.1", refine)
    return [*rows, floor_row(s, metric, test)]

def table_6_2(run, s, test, metric, synth):
    """Synthesis from nothing: the samples, and what the generator alone draws."""
    k = synth.mode.k_test
    rows = [distance_row(run, s, metric, "Hat EBM", partial(from_hat, synth, k), steps=k)]
    rows.append(distance_row(run, s, metric, "G alone", partial(from_hat, synth, 0)))
    return [*rows, floor_row(s, metric, test)]

def table_6_3(s, test, synth, load):
    """Out-of-distribution detection: AUROC of -H, test images of the data set against those of others."""
    x, _ = test.some(10_000)
    inside = -by_parts(synth.exact, x, 250)[:, 0].cpu()
    rows = []
    for name in OTHERS[test.shape[0]]:
        if name == test.name:
            continue
        try:
            others = load(name)
        except UserError as error:
            print(f"left out: {error}")
            continue
        outside = -by_parts(synth.exact, others.some(10_000)[0], 250)[:, 0].cpu()
        interval = common.bootstrap(auroc, inside, outside)
        area = auroc(inside, outside)
        rows.append(value(f"AUROC {name}", area, interval=interval, n=len(outside)))
    return rows

def figure_6_4(run, s, data, test, metric):
    """Cooperative learning without and with BatchNorm, the Hat EBM with current and historical pairs."""
    m = mode(s, "synth")
    m = m._replace(updates=min(s.compared, m.updates))
    cases = {
        "cooperative, no BatchNorm": {"pairs": "inferred"},
        "cooperative, BatchNorm": {"pairs": "inferred", "batchnorm": True},
        "Hat EBM, current": {"pairs": "current"},
        "Hat EBM, historical": {"pairs": "historical"},
    }
    n = min(s.images, 500)
    whole = metric.diversity(test.some(n)[0])
    rows, pictures = [], {}
    for title, options in cases.items():
        name = title.replace(", ", "-").replace(" ", "-")
        hat = train_hat(run, s, m, data, f"figure6.4-{name}", **options)
        torch.manual_seed(run.seed)
        x = from_hat(hat, m.k, n)
        beside = {"updates": m.updates, "n": n}
        rows.append(value(f"{metric.name} {title}", metric.distance(x), **beside))
        rows.append(value(f"diversity {title}", metric.diversity(x) / whole, **beside))
        pictures[title] = x[:40]
    run.pictures("figure6.4", pictures, 20)
    return rows

def figure_6_5(run, hats):
    """A chain in each mode: X = G(Z) + Y, G(Z), and Y five times as strong, from left to right."""
    rows, pictures = [], {}
    for name, hat in hats.items():
        torch.manual_seed(run.seed)
        state, done = sample(hat, 16, 0), 0
        path = {"X": [], "G(Z)": [], "5 Y": []}
        for k in [0, *common.multiples(hat.mode.k, (0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5))]:
            _, g, y = state = walk(hat, state, k - done)
            done = k
            path["X"].append(g[0] + y[0])
            path["G(Z)"].append(g[0])
            path["5 Y"].append(0.5 + 5 * y[0])
        for title, images in path.items():
            pictures[f"{name}: {title}"] = torch.stack(images)
        rows.append(value(f"mean length of Y, {name}", lengths(y).mean().item(), steps=done))
    run.pictures("figure6.5", pictures, 8)
    return rows

def figure_6_6(run, s, data, sngan, refine):
    """Refinement without the residual Y: gradient norms of H where chains end. Does H run away?"""
    without = refine.mode._replace(tau_y=0.0)
    try:
        log = train_hat(run, s, without, data, "refine-without-Y", G=sngan[0]).log
    except Diverged as stop:
        print(stop)
        log = stop.rows
    rows, curves = [], []
    for title, lines in {"with Y": refine.log, "without Y": log}.items():
        for line in lines:
            curves.append(value(title, line["grad"], update=line["it"]))
        last = lines[-1]
        rows.append(value(f"gradient norm of H in the end, {title}", last["grad"], updates=last["it"]))
    run.lines("figure6.6", curves, "update", yscale="log", ylabel="gradient norm of H")
    return rows

def figure_6_8(run, s, test, metric, retrofit):
    """Retrofit: where chains begin, which is no image, and where they end."""
    k = retrofit.mode.k_test
    rows = []
    for steps in (0, k):
        make = partial(from_hat, retrofit, steps)
        rows.append(distance_row(run, s, metric, "retrofit", make, steps=steps))
    before_and_after(run, "figure6.8", retrofit)
    return [*rows, floor_row(s, metric, test)]

def figure_6_9(run, synth, test):
    """Figures 6.9 to 6.11: samples of synthesis, uncurated, and data."""
    sets = {"samples": from_hat(synth, synth.mode.k_test, 100), "data": test.some(100)[0]}
    run.pictures("figure6.9", sets, 20)
    rows = []
    for title, x in sets.items():
        rows.append(value(f"mean H of {title}", synth.exact(x).mean().item()))
    return rows

def paths(run, s, metric, synth, refine):
    """Frechet distance against Langevin steps, up to eight times as many as in training."""
    rows = []
    for name, hat in {"synth": synth, "refine": refine}.items():
        for steps in [0, *common.multiples(hat.mode.k, (0.25, 0.5, 1, 2, 4, 8))]:
            make = partial(from_hat, hat, steps)
            rows.append(distance_row(run, s, metric, name, make, steps=steps))
    run.lines("paths", rows, "steps", xscale="symlog", ylabel=metric.name)
    return rows

EXPERIMENTS = common.experiments(  # main() hands each what its parameters name
    headline=[table_6_1, table_6_2, figure_6_4, figure_6_6, figure_6_9],
    others=[table_6_3, figure_6_5, figure_6_8, paths],
)
MODES = {  # what --mode runs in place of the headline experiments
    "synth": ["table6.2", "table6.3", "figure6.4", "figure6.9"],
    "refine": ["table6.1", "figure6.6"],
    "retrofit": ["figure6.8"],
}

# --- command line -------------------------------------------------------------------------------------------

def get_args(argv=None):
    args = common.parse_args(__doc__, SETTINGS, EXPERIMENTS, argv)
    s = args.settings
    common.at_least(1, s, "synth_updates synth_k synth_k_test refine_updates refine_k refine_k_test")
    common.at_least(1, s, "retrofit_updates retrofit_k retrofit_k_test compared batch")
    common.at_least(1, s, "gan_iters ae_iters cls_iters")
    common.at_least(2, s, "images")
    common.above_0(s, "width width_g synth_lr synth_lr_g synth_tau_y synth_t refine_lr refine_tau_y")
    common.above_0(s, "refine_tau_z refine_t retrofit_lr retrofit_tau_y retrofit_tau_z retrofit_t")
    if s.mode not in ("all", *MODES):
        raise UserError(f"--mode {s.mode}: known are {['all', *MODES]}")
    if s.side not in GENERATOR:
        raise UserError(f"--side {s.side}: known are {list(GENERATOR)}")
    if s.mode != "all" and not any(word.startswith("--only") for word in args.argv):
        args.only = MODES[s.mode]
    return args

def main(argv=None):
    args = get_args(argv)
    s = args.settings
    data, test = common.train_and_test(args, s.batch, 2, s.side)
    common.make_net(s.net, 1, data.shape, s.width)  # an error is said before any work
    run = common.Run("hat_ebm", args, s.side)
    load = partial(load_on_device, args, split="test", channels=data.shape[0], side=data.shape[1])
    sngan = once(lambda: train_sngan(run, s, data))
    synth = once(lambda: train_hat(run, s, mode(s, "synth"), data, "synth"))
    refine = once(lambda: train_hat(run, s, mode(s, "refine", s.refine_tau_z), data, "refine", G=sngan()[0]))
    decoder = once(lambda: train_autoencoder(run, s, data))
    joint = mode(s, "retrofit", s.retrofit_tau_z, PRIOR)
    retrofit = once(lambda: train_hat(run, s, joint, data, "retrofit", G=decoder()))
    run.experiments(
        EXPERIMENTS,
        data=data,
        test=test,
        metric=once(lambda: make_metric(run, s, data)),
        sngan=sngan,
        synth=synth,
        refine=refine,
        retrofit=retrofit,
        hats=once(lambda: {"refine": refine(), "retrofit": retrofit(), "synth": synth()}),
        load=load,
    )

if __name__ == "__main__":
    common.call(main)
