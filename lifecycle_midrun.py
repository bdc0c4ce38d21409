r"""Mid-run energies: chains that stay realistic just as long as a defence needs, and what they can defend.

Source: Mitchell 2022, "Adversarial Attacks and Defense using Energy-Based Image Models", chapters 3 and 4.

The idea. Purifying an image takes Langevin chains of some thousand steps, not of a hundred thousand. So learn
an energy whose chains are good for that long: keep a bank of chains, replace each of them with probability p
after an update by an image that is in-distribution (of a frozen generator, or of the data), and anneal the
optimiser's rate until the energy stands still while its chains grow old. That needs no classifier and no
labels, and so one energy defends any classifier of such images, and other tasks too: the Universal Defender.

    U(x) = V(x) / T energy, LOW = in-distribution; V is what the network returns; p(x) ~ exp(-U(x)).
    Pixels in [0, 1] everywhere; networks scale to [-1, 1] inside. The source's eps is for [-1, 1]: halve it.

    Langevin  x <- x - tau^2/2 grad_x U(x) + tau z,  z ~ N(0, I); states are never clamped
    loss      E_data[U(x)] - E_chains[U(x)]: its gradient is that of maximum likelihood
    Alg. 4    K steps on a batch of the bank, an update, and back with it; each state is then replaced with
              probability p = K / K_def, so that chains live for K_def steps on average. Its age, in visits,
              has the geometric law p (1 - p)^k. p = 0: persistent chains; p = 1: no bank at all
    anneal    Adam's rate times 1, then .1, .01, .001, .0001 after 1/3, 1/2, 2/3, 5/6 of the updates
    (3.1)     F(x) = E[f(T(x))], T(x): K_def steps from x.  (3.2) F_H: mean of the logits of H chains
    (3.3)     BPDA+EOT: gradient of the loss of F_H at the purified images, averaged, used at the image
    Alg. 3    N + 1 evaluations with H_adv chains; what looks broken is judged again by H_def fresh chains
    3.2.4     x <- x + eta^2/2 S(x) + eta z with a score S = grad log q_sigma learned by denoising, at one
              sigma: no chain of it was ever run in training, so nothing keeps its chains in place
    (4.2)     Dice = 2 TP / (2 TP + FP + FN + 1e-9) of predicted and true mask (printed with FP x FN)
    (4.3)     a segmentation is right when Dice(attacked and purified) / Dice(clean) >= 1/2

Commands (measured times and numbers stand in README.md and results/):
    python lifecycle_midrun.py                                      rendered digits, nothing to download
    python lifecycle_midrun.py --only figure3.1                     short-, mid- and long-run chains
    python lifecycle_midrun.py --rejuvenate generator --out runs/g  states from a GAN that is trained first
    python lifecycle_midrun.py --dataset cifar10 --budget paper     the published settings; --list: all

The energy's log. d: energy of the data minus that of the chains. grad: mean |grad_x V| along the chains.
drift: length of the gradient's part of a step over that of the noise. age: mean Langevin steps of the bank.

Differs from the source:
  - Only CIFAR-10 takes fresh states from a generator (trained here) unless --rejuvenate says so; the others
    take them from the data, the source's variant (its published p, bank and noise --rejuvenate data does not
    set); for ImageNet there is no generator at 224 pixels here.
  - A defence may use fewer steps than K / p, the mean life in training: glyphs 75 of 400, ImageNet (as
    published) 200 of 2,000. The text has K_def = 1500 and 2000 for CIFAR-10; we follow the code, 2000.
  - Bank and data are visited in shuffled passes; ImageNet as centre crops (source: random crops). Classifiers
    are trained as in stochastic_security.py. Tiny ImageNet is attacked at 4/255 (ImageNet: 2/255).
  - Alg. 4 replaces states after the update (the published code before it): the same law one visit later.
  - The long-run energy is Alg. 4 with p / 20 and twice the updates (the published code: a second energy on a
    frozen one, a Gaussian prior, a burn-in bank); the short-run one has p = 1/2 and a generator learned in
    tandem, but no cap on the visits of a state.
  - Natural images are judged first and naturally wrong ones count as broken (as the code; Alg. 3 does not),
    and broken images leave the batch. Logits are averaged; the published code for ImageNet averages softmax
    outputs and takes their cross-entropy as if they were logits, which weakens its attack.
  - sec. 3.2.4 gives no eta: sigma / 2, about what score networks are sampled with. One sigma, as in its text.
  - Ch. 4 says little of its attack: ours is table 3.1's. Dice is against the true mask; images of clean Dice
    below .1 are counted apart. Flowers are Oxford's 102 classes (its text says 104). Offline, masks name the
    digit that ink belongs to, among fragments of letters (or, in colour, on photos).
  - Tiny ImageNet (64 pixels) stands in for ImageNet; a few of its classes, unseen by the energy, for flowers.
"""
import copy
import dataclasses
import functools
import math
import time

import torch
import torch.nn.functional as F

import common
from common import Diverged, Experiment, Images, Run, UserError
from common import batch_index, batches, fast_precision, load_classes, load_images, rate

# --- settings -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Settings:
    """Everything that can be set; each field is also a flag (--eps 8/255). Defaults: CIFAR-10, published."""
    classes: str = ""            # of the data set, that f tells apart: "0-9"; all
    energy_classes: str = ""     # that the energy is trained on; all
    f_net: str = "wrn28"         # natural classifier f: small_cnn, wrn16, wrn28 (f_width: widening), resnet18
    f_width: float = 10.0
    f_iters: int = 50_000        # its updates, batch 100
    f_sgd: float = 0.1           # rate of SGD; a tenth of it from 40 % on, a hundredth from 60 %; 0: Adam
    augment: str = "crop_flip"   # of the classifier's images: none, crop, crop_flip
    net: str = "sngan"           # V: light_ebm, sngan, biggan_deep
    width: float = 1.0           # times the published channels
    updates: int = 150_000
    lr: float = 1e-4             # of Adam, at first
    batch: int = 128             # data, and as many chains
    bank: int = 24_960           # chains, a multiple of the batch
    k_train: int = 100           # Langevin steps of an update
    p: float = 0.05              # a state is replaced with this probability after an update
    rejuvenate: str = "generator"  # by an image of: generator (trained first), data
    tau_train: float = 0.00625   # standard deviation of a step's noise; .0125 in [-1, 1]
    tau: float = 0.005           # the same when defending; .01 in [-1, 1]
    temperature: float = 1e-4    # T
    data_noise: float = 0.0125   # .025 in [-1, 1]
    tau_short: float = 0.0025    # of the short-run energy; .005 in [-1, 1]
    g_width: float = 1.0         # of the generator, and of its discriminator
    g_iters: int = 50_000        # its updates, two of the discriminator's to each
    k: int = 2000                # K_def
    h_def: int = 128             # chains of a verdict
    h_adv: int = 48              # chains of an attack's gradient
    n: int = 50                  # N: updates of the attacked image
    eps: float = 8 / 255         # of the attack, l_inf
    step: float = 2 / 255
    restarts: int = 1
    power: int = 4               # table 3.3: times N, with 4/3 of H_adv
    last: int = 10               # steps of the chain that the stronger attack goes back through
    beta: float = 20.0           # sharpness of its stand-in for ReLU
    n_last: int = 50             # N of that attack
    n_few: int = 50              # N of figures 3.3 and 3.4
    other: str = "cifar100"      # table 4.1: a data set, or some of its classes, NAME:0-9
    other_net: str = ""          # its classifier; f's
    other_iters: int = 50_000
    masks: str = "pets"          # table 4.2: pets, or a grey set that gets clutter
    u_width: float = 2.0         # of the U-Net, 1: 16 channels
    u_iters: int = 20_000
    sigma: float = 0.01          # noise of the score network's training; eta is half of it
    s_width: float = 4.0         # of its U-Net
    s_iters: int = 100_000
    images: int = 5000           # test images
    few: int = 125               # test images of figures 3.3 and 3.4
    chunk: int = 1600            # chains that run as one batch
    graph: int = 1               # CUDA: replay a captured step; 0: launch every kernel
    log_every: int = 500
    save_every: int = 1000

    def __post_init__(self):
        common.at_least(1, self, "updates", "batch", "k_train", "k", "h_def", "h_adv", "power", "restarts",
                        "images", "few", "chunk", "log_every", "save_every", "last", "g_iters", "s_iters")
        if not all(0 < v < math.inf for v in (self.tau_train, self.tau, self.temperature, self.sigma)):
            raise UserError("--tau-train, --tau, --temperature and --sigma must be above 0 and finite")
        if not self.p <= 1 or self.rejuvenate not in ("generator", "data"):
            raise UserError("--p is a probability, --rejuvenate is generator or data")
        if self.bank % self.batch or not self.bank or self.last > self.k:
            raise UserError("--bank must be a multiple of --batch, --last at most --k")
        self.few = min(self.few, self.images)


new, PAPER = dataclasses.replace, Settings()
GREY = new(  # 28 pixels, not in the source; f, eps, tau, T, BPDA+EOT are those of stochastic_security.py
    PAPER, f_net="small_cnn", f_width=1.0, f_iters=300, f_sgd=0.0, augment="none", net="light_ebm", width=0.5,
    updates=800, lr=4e-4, batch=64, bank=1024, k_train=20, rejuvenate="data", tau_train=0.015, tau=0.015,
    temperature=1e-4, data_noise=0.03, tau_short=0.006, g_width=0.125, g_iters=1500, k=75, h_def=24, h_adv=6,
    n=20, eps=0.08, step=0.02, last=5, n_last=6, n_few=10, other="letters:0-9", other_iters=300,
    masks="glyphs", u_width=1.0, u_iters=1000, s_width=1.0, s_iters=1500, images=100, few=50, chunk=250,
    log_every=100, save_every=200)
MNIST = new(GREY, f_iters=600, updates=1600, k=100, eps=0.2, step=0.05, masks="mnist")
QUICK = dict(f_iters=6000, width=0.5, updates=6000, batch=100, bank=5000, k_train=50, g_width=0.5,
             g_iters=4000, k=500, h_def=50, h_adv=8, n=20, last=5, n_last=10, n_few=10, u_iters=2000,
             s_iters=5000, s_width=2.0, images=200, few=100, other_iters=6000, log_every=200, save_every=500)
CIFAR = new(PAPER, f_net="wrn16", f_width=4.0, other="cifar100:0-9", masks="glyphs", **QUICK)
TINY = new(CIFAR, classes="0-9", energy_classes="0-99", other="tinyimagenet:100-109", f_iters=2000,
           other_iters=2000, width=0.25, rejuvenate="data", tau_train=0.005, eps=4 / 255, step=1 / 255, k=300)
IMAGENET = new(
    PAPER, f_net="efficientnet_b7", f_iters=0, net="biggan_deep", batch=64, bank=9984, rejuvenate="data",
    tau_train=0.01, tau=0.01, temperature=1e-5, data_noise=0.015, k=200, h_def=64, h_adv=24, eps=2 / 255,
    step=1 / 255, other="flowers102", other_net="pretrained50", other_iters=2000, images=10_000, chunk=64)


def three_sizes(quick, paper):
    """The three budgets of a data set."""
    tiny = dict(f_iters=min(quick.f_iters, 3), other_iters=3, u_iters=2, s_iters=2, g_iters=2, updates=6,
                batch=4, bank=8, k_train=2, k=3, h_def=3, h_adv=2, n=2, n_last=1, n_few=1, last=2, images=8,
                few=4, log_every=2, save_every=2, width=0.05, g_width=0.03, u_width=0.25, s_width=0.25)
    return {"smoke": new(quick, **tiny, f_width=min(quick.f_width, 1)), "quick": quick, "paper": paper}


def enlarged(s):
    """The budget "paper" of sets that are not in the source: ten times the training, Alg. 3 at its size."""
    return new(s, width=1.0, updates=10 * s.updates, f_iters=3000, other_iters=3000, u_iters=6000,
               s_iters=15_000, g_iters=15_000, h_def=128, h_adv=48, n=50, n_last=50, n_few=50, images=1000,
               few=125)


SETTINGS = {"glyphs": three_sizes(GREY, enlarged(GREY)), "mnist": three_sizes(MNIST, enlarged(MNIST)),
            "cifar10": three_sizes(CIFAR, PAPER),
            "tinyimagenet": three_sizes(TINY, new(TINY, **{k: getattr(PAPER, k) for k in (
                "width updates bank batch k_train k h_def h_adv n n_last last u_iters s_iters".split())})),
            "imagenet": three_sizes(new(IMAGENET, updates=3000, bank=960, other_iters=500, u_iters=500, n=10,
                                        s_iters=500, n_last=5, n_few=5, images=64, few=16), IMAGENET)}
ENERGY_SETTINGS = ("energy_classes net width updates lr batch bank k_train p rejuvenate tau_train "
                   "temperature data_noise g_width").split()
NOT_OF_THE_ATTACK = "k last few n_last n_few power sigma other masks log_every save_every graph".split()

# --- Langevin sampling --------------------------------------------------------------------------------------


def langevin_step(V, x, z, tau, temperature):
    """Eq. 2.3: x - tau^2/(2T) grad V(x) + tau z -> states [B, C, S, S], |grad V| [B]. Any range, no clamp."""
    with torch.enable_grad():
        y = x.detach().to(next(V.parameters()).dtype).requires_grad_(True)
        gradient = torch.autograd.grad(V(y).float().sum(), y)[0].float()                       # [B, C, S, S]
    return x - tau ** 2 / (2 * temperature) * gradient + tau * z, gradient.flatten(1).norm(dim=1)


class Sampler:
    """Chains of V, on a copy with frozen weights: bfloat16 and channels-last where the processor has units
    for it (states stay float32), each step a CUDA graph on a GPU. fast=False: the plain float32 loop."""

    def __init__(self, V, tau, temperature, fast=True, graph=True, noise=torch.randn_like):
        self.source, self.tau, self.temperature, self.noise, self.ready = V, tau, temperature, noise, {}
        self.V, device = copy.deepcopy(V).requires_grad_(False), next(V.parameters()).device
        if fast and common.bfloat16_units(device):
            self.V = self.V.to(torch.bfloat16, memory_format=torch.channels_last)
        self.replay = fast and graph and device.type == "cuda"

    @torch.no_grad()
    def follow(self):
        """Take over the weights that V has now; in place, so that recorded steps see them."""
        for mine, its in zip(self.V.parameters(), self.source.parameters()):
            mine.copy_(its)

    def prepare(self, size, like):
        """States of `size` chains, their sums of |grad V|, and a function that takes one step in place."""
        state, total = like.new_zeros(size, *like.shape[1:]), like.new_zeros(size)

        def once():
            moved, norm = langevin_step(self.V, state, self.noise(state), self.tau, self.temperature)
            state.copy_(moved)
            total.add_(norm)
        return state, total, common.captured(once) if self.replay else once

    def __call__(self, x, steps):
        """`steps` steps from x [B, C, S, S] -> states, mean |grad V| over steps and chains (0-d)."""
        size = 50 << ((len(x) - 1) // 50).bit_length() if self.replay else len(x)  # padded: few graphs
        if size not in self.ready:
            self.ready = (self.ready if self.replay else {}) | {size: self.prepare(size, x)}
        state, total, once = self.ready[size]
        state[:len(x)] = x
        total.zero_()
        for _ in range(steps):
            once()
        return state[:len(x)].clone(), total[:len(x)].mean() / max(steps, 1)


class Score:
    """Sec. 3.2.4: x <- x + eta^2/2 S(x) + eta z with S = net / sigma, the score of the data plus noise sigma.
    Called as a Sampler is; float32: bfloat16 would round a pixel by as much as the noise to be removed."""

    def __init__(self, net, sigma, noise=torch.randn_like):
        self.net, self.sigma, self.eta, self.noise = net, sigma, sigma / 2, noise

    @torch.no_grad()
    def __call__(self, x, steps):
        """`steps` steps from x [B, C, S, S] -> states, mean |S| over steps and chains (0-d)."""
        total = x.new_zeros(len(x))
        for _ in range(steps):
            S = self.net(x) / self.sigma
            x, total = x + self.eta ** 2 / 2 * S + self.eta * self.noise(x), total + S.flatten(1).norm(dim=1)
        return x, total.mean() / max(steps, 1)


# --- learning: the energy (Algorithm 4), its generator, and the score ---------------------------------------


def annealed(it, updates):
    """Factor of Adam's rate in update it = 1 ... updates: a tenth each after 1/3, 1/2, 2/3, 5/6 of them."""
    return 0.1 ** sum(it > updates * part for part in (1 / 3, 1 / 2, 2 / 3, 5 / 6))


def rejuvenate(bank, age, place, p, fresh):
    """Alg. 4, last step: states at `place` [m], with probability p each, become fresh(places), of age 0."""
    new = place[torch.rand(len(place)).to(place.device) < p]
    if len(new):
        bank[new], age[new] = fresh(new), 0


@torch.no_grad()
def drawn(G, z):
    """Images that a generator makes of latents z [n, 128] -> [n, C, S, S], in batches of 250."""
    return torch.cat([G(part) for part in z.split(250)])


@common.own_randomness
def train_midrun(lab, name="energy", anneal=True, tandem=False, **changes):
    """Algorithm 4 -> (V, age of each state in the bank, int64 [N] Langevin steps, G or None).

    anneal=False: Adam's first rate throughout. tandem: the short-run energy, whose states come from a
    generator G that learns from them: it moves G(z) to where the chain that began at G(z) now is.
    """
    run, s = lab.run, dataclasses.replace(lab.s, **changes)
    V = common.make_net(s.net, 1, lab.data.shape, s.width).to(run.device)
    G = common.make_net("sngan_generator", 1, lab.data.shape, s.g_width).to(run.device) if tandem else None
    z = torch.zeros(s.bank, 128, device=run.device)                             # what G made a state of

    @torch.no_grad()
    def fresh(places):
        """New states for these places of the bank."""
        if not tandem:
            return lab.fresh(len(places))
        z[places] = torch.randn(len(places), 128, device=run.device)
        return drawn(G, z[places])
    bank = fresh(torch.arange(s.bank, device=run.device))
    age = torch.zeros(s.bank, dtype=torch.long, device=run.device)
    optimizer = torch.optim.Adam(V.parameters(), s.lr)
    parts = {"V": V, "bank": bank, "age": age, "optimizer": optimizer}
    if tandem:
        descent = torch.optim.Adam(G.parameters(), 1e-4)
        parts |= {"G": G, "z": z, "descent": descent}
    made_with = {k: getattr(s, k) for k in ENERGY_SETTINGS} | lab.made_with | {"anneal": anneal}
    sampler, xs = Sampler(V, s.tau_train, s.temperature, graph=s.graph), None
    drift = s.tau_train / (2 * s.temperature) / math.sqrt(bank[0].numel())      # per unit of |grad V|

    def cost():
        return (s.k_train + 6) * s.batch / common.throughput(sampler, bank[:s.batch], 0.3)
    for it, row in common.updates(run, name, s.updates, made_with, parts, ("d", "grad", "drift", "age"),
                                  s.log_every, s.save_every, cost):
        xs = xs or batches(lab.data, s.batch, run.args.seed, it - 1, device=run.device)
        x = next(xs)[0]
        x = x + s.data_noise * torch.randn_like(x)                              # [m, C, S, S], not clamped
        place = batch_index(s.bank, s.batch, run.args.seed + 1, it - 1).to(run.device)
        sampler.follow()
        chains, norm = sampler(bank[place], s.k_train)
        with fast_precision(run.device):
            v_data, v_chains = V(torch.cat([x, chains]))[:, 0].float().chunk(2)
        d = (v_data.mean() - v_chains.mean()) / s.temperature
        optimizer.zero_grad(set_to_none=True)
        d.backward()
        for group in optimizer.param_groups:
            group["lr"] = s.lr * (annealed(it, s.updates) if anneal else 1)
        optimizer.step()

        bank[place] = chains
        age[place] += s.k_train
        if tandem:
            descent.zero_grad(set_to_none=True)
            (G(z[place]) - chains).pow(2).flatten(1).sum(1).mean().backward()
            descent.step()
        rejuvenate(bank, age, place, s.p, fresh)
        row |= {"d": d.item(), "grad": norm.item(), "drift": drift * norm.item()}
        row["age"] = age.float().mean().item()
        if row["drift"] > 10:
            raise Diverged(f"training diverged at update {it}: the gradient moves chains {row['drift']:.3g} "
                           "times as far as noise; try a lower --lr")
    return V, age, G and G.eval()


@torch.enable_grad()  # its first use stands inside no_grad
@common.own_randomness
def train_generator(lab):
    """An SNGAN -> G, frozen, z [B, 128] -> images. Hinge losses; spectral normalisation in D."""
    run, s, shape = lab.run, lab.s, lab.data.shape
    G = common.make_net("sngan_generator", 1, shape, s.g_width).to(run.device)
    D = common.spectral(common.make_net("sngan", 1, shape, s.g_width)).to(run.device)
    of_g, of_d = (torch.optim.Adam(net.parameters(), 2e-4, (0.0, 0.9)) for net in (G, D))
    made_with = {k: getattr(s, k) for k in ("energy_classes", "g_width", "g_iters", "batch")} | lab.made_with
    xs = None
    for it, row in common.updates(run, "generator", s.g_iters, made_with, {
            "G": G, "D": D, "of_g": of_g, "of_d": of_d}, ("real", "fake"), s.log_every, s.save_every):
        xs = xs or batches(lab.data, s.batch, run.args.seed, 2 * it - 2, device=run.device)
        for last in (False, True):                                              # two updates of D to one of G
            x, fake = next(xs)[0], G(torch.randn(s.batch, 128, device=run.device))
            with fast_precision(run.device):
                d_real, d_fake = D(x).float(), D(fake.detach()).float()
            of_d.zero_grad(set_to_none=True)
            (F.relu(1 - d_real).mean() + F.relu(1 + d_fake).mean()).backward()
            of_d.step()
        with fast_precision(run.device):
            loss = -D(fake).float().mean()
        of_g.zero_grad(set_to_none=True)
        loss.backward()
        of_g.step()
        row |= {"real": d_real.mean().item(), "fake": d_fake.mean().item()}
    return G.eval().requires_grad_(False)


@common.own_randomness
def train_score(lab):
    """Denoising score matching at one sigma -> Score: net(x + sigma z) is to be -z."""
    run, s, xs = lab.run, lab.s, None
    net = common.make_net("score", 1, lab.data.shape, s.s_width).to(run.device)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    made_with = {k: getattr(s, k) for k in ("energy_classes", "s_width", "s_iters", "sigma", "batch")}
    made_with |= lab.made_with
    for it, row in common.updates(run, "score", s.s_iters, made_with, {"net": net, "optimizer": optimizer},
                                  ("loss",), s.log_every, s.save_every):
        xs = xs or batches(lab.data, s.batch, run.args.seed, it - 1, device=run.device)
        x = next(xs)[0]
        z = torch.randn_like(x)
        loss = (net(x + s.sigma * z) + z).pow(2).mean()                         # 1: it has learned nothing
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - (it - 1) / s.s_iters)
        optimizer.step()
        row["loss"] = loss.item()
    return Score(net.requires_grad_(False), s.sigma)


# --- attacks, the defence, and Algorithm 3 ------------------------------------------------------------------


def random_start(x, eps, norm):
    """Uniform in the l_inf ball; for l_2 a random direction, radius uniform in [0, eps]; then in [0, 1].
    ValueError for images outside [0, 1]."""
    if x.min() < 0 or x.max() > 1:
        raise ValueError(f"an attack wants images in [0, 1]; got [{x.min():.3g}, {x.max():.3g}]")
    if norm == "inf":
        return (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    direction = F.normalize(torch.randn_like(x).flatten(1)).view_as(x)
    return (x + eps * torch.rand(len(x), 1, 1, 1, device=x.device) * direction).clamp(0, 1)


def ascend(x, x0, gradient, step, eps, norm):
    """A PGD step up the loss, back into the ball around x0, then [0, 1]. A zero gradient moves nothing."""
    if norm == "inf":
        return (x0 + (x + step * gradient.sign() - x0).clamp(-eps, eps)).clamp(0, 1)
    moved = x + step * F.normalize(gradient.flatten(1), eps=1e-30).view_as(x) - x0
    length = moved.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return (x0 + moved * (eps / length.clamp(min=max(eps, 1e-12)))).clamp(0, 1)


def attack_f(f, x, y, steps, step, eps, scale=1.0):
    """l_inf PGD on f itself, random start; x float32 [B, C, S, S] in [0, 1] -> the last images.
    `scale` multiplies the logits: 1, but for a trap."""
    if len(x) > 250:
        return torch.cat([attack_f(f, *half, steps, step, eps, scale) for half in zip(x.tensor_split(2),
                                                                                     y.tensor_split(2))])
    x0, x, training = x, random_start(x, eps, "inf"), f.training
    f.eval()
    with torch.enable_grad(), fast_precision(x.device):
        for _ in range(steps):
            x.requires_grad_(True)
            loss = F.cross_entropy(scale * f(x).float(), y, reduction="sum")
            gradient, = torch.autograd.grad(loss, x)
            x = ascend(x.detach(), x0, gradient, step, eps, "inf")
    f.train(training)
    return x.detach()


class Defence:
    """F_H of Eq. 2.5: f after K Langevin steps; float32 [B, C, S, S] in [0, 1]. K = 0: f itself, H = 1."""

    def __init__(self, f, K=0, sampler=None, smooth=None, chunk=250):
        self.f, self.K, self.sampler, self.smooth, self.chunk = f, K, sampler, smooth, chunk

    def purify(self, x, H, steps):
        """T(x): H chains an image, run as one batch -> [H, B, C, S, S]."""
        z = x.repeat(H, 1, 1, 1)                                # chain h of image b stands in row h * B + b
        if steps:
            z = torch.cat([self.sampler(part, steps)[0] for part in z.split(self.chunk)])
        return z.unflatten(0, (H, len(x)))

    def chains(self, x, H):
        """Logits of each of H chains [H, B, classes]; their mean over H is F_H (Eq. 2.5)."""
        H, logits = H if self.K else 1, []
        for part in x.split(max(self.chunk // H, 1)):
            z = self.purify(part, H, self.K)
            with torch.no_grad(), fast_precision(x.device):
                logits.append(torch.cat([self.f(z_).float() for z_ in z.flatten(0, 1).split(250)]).unflatten(
                    0, z.shape[:2]))
        return torch.cat(logits, 1)

    def predict(self, x, H):
        """Eq. 2.6 with H fresh chains -> classes [B]."""
        return self.chains(x, H).mean(0).argmax(1)

    def gradient(self, x, y, H, last=0):
        """Eq. 2.10: F_H [B, classes], and the gradient of its loss averaged over the chains [B, C, S, S].

        last = 0: BPDA, the identity for T. Else back through the chain's last steps: their values are the
        true chain's, their derivative that of the smooth stand-in.
        """
        H, found = H if self.K else 1, []
        for x_, y_ in zip(x.split(max(self.chunk // H, 1)), y.split(max(self.chunk // H, 1))):
            states, few = self.purify(x_, H, self.K - last), max(250 // H, 1)   # [H, b, C, S, S]
            for start, label in zip(states.split(few, 1), y_.split(few)):
                start = start.clone().requires_grad_(True)
                with torch.enable_grad(), fast_precision(x.device):
                    z = self.last_steps(start.flatten(0, 1), last)
                    logits = self.f(z).float().unflatten(0, start.shape[:2]).mean(0)
                    loss = F.cross_entropy(logits, label, reduction="sum")
                found.append((logits.detach(), torch.autograd.grad(loss, start)[0].mean(0)))
        return [torch.cat(column) for column in zip(*found)]

    def last_steps(self, z, steps):
        """Langevin steps with the sampler's values and the smooth stand-in's derivative."""
        sampler = self.sampler
        for _ in range(steps):
            slope, = torch.autograd.grad(self.smooth(z).float().sum(), z, create_graph=True)
            smooth = z - sampler.tau ** 2 / (2 * sampler.temperature) * slope
            true, _ = langevin_step(sampler.V, z, sampler.noise(z), sampler.tau, sampler.temperature)
            z = smooth + (true - smooth).detach()
        return z


@common.own_randomness
def algorithm_1(lab, name, defence, last=0, norm="inf", verify=True, **changes):
    """Algorithm 1 -> (record bool [1 + restarts (N + 1), n]: still right; adversaries float32 [n, C, S, S]).

    Row 0: natural images; row t: not broken up to the t-th evaluation; what is right, lab.right says. The
    adversary: what broke the image, else the last one tried; the image itself where that is wrong. `last` as
    in Defence.gradient; norm inf or 2; verify=False is a trap; changes: to the settings. Can be interrupted.
    """
    s = dataclasses.replace(lab.s, **changes)
    x0, y, file = lab.x[:s.images], lab.y[:s.images], lab.run.folder / f"attack-{name}.pt"
    made_with = {k: v for k, v in vars(s).items() if k not in NOT_OF_THE_ATTACK} | lab.made_with
    made_with |= {"images": s.images, "K": defence.K, "last": last, "norm": norm, "verify": verify}
    state, start, total = common.load_checkpoint(file, made_with), time.time(), s.restarts * (s.n + 1)
    if state:
        x, record = state["x"].to(x0.device), state["record"].to(x0.device)
    else:
        x, record = x0.clone(), lab.right(defence.predict(x0, s.h_def), slice(len(y)))[None]
        cost = (time.time() - start) / s.h_def * s.h_adv * total
        print(f"  {name}: {total} evaluations of {len(y)} images, at most some {cost:.0f} s", flush=True)
    said = time.time()
    for t in range(len(record) - 1, total):
        right = record[-1].clone()
        alive = right.nonzero()[:, 0]                           # broken images have left the batch
        if len(alive):
            if t % (s.n + 1) == 0:
                x[alive] = random_start(x0, s.eps, norm)[alive]
            logits, gradient = defence.gradient(x[alive], y[alive], s.h_adv, last)
            broken = alive[~lab.right(logits.argmax(1), alive)]
            if len(broken) and verify:
                broken = broken[~lab.right(defence.predict(x[broken], s.h_def), broken)]
            right[broken] = False
            left = right[alive]
            if t % (s.n + 1) < s.n:                             # no update after a restart's last evaluation
                alive, gradient = alive[left], gradient[left]
                x[alive] = ascend(x[alive], x0[alive], gradient, s.step, s.eps, norm)
        record = torch.cat([record, right[None]])
        if len(alive) or t + 1 == total:
            common.save_checkpoint(file, made_with, x=x, record=record)
        if time.time() - said > 20 or t + 1 == total:
            said = time.time()
            print(f"  {name}: evaluation {t + 1}/{total}, {int(right.sum())} of {len(y)} still right, "
                  f"{said - start:.0f} s", flush=True)
    return record, x


# --- evaluation ---------------------------------------------------------------------------------------------


def dice(prediction, mask):
    """Eq. 4.2 over the pixels that are not background (0), of classes [B, S, S] twice -> [B].

    A pixel of a wrong class counts as a false positive and as a false negative. Two empty masks: 0.
    """
    hits = ((prediction == mask) & (mask > 0)).flatten(1).sum(1)                # TP
    return 2 * hits / ((prediction > 0).flatten(1).sum(1) + (mask > 0).flatten(1).sum(1) + 1e-9)


def frechet_distance(mean1, cov1, mean2, cov2):
    """||m1 - m2||^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2) of two Gaussians, float64 [d], [d, d]."""
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return ((mean1 - mean2).pow(2).sum() + cov1.trace() + cov2.trace() - 2 * cross).item()


class Task:
    """What is attacked: a network f, images x float32 [n, C, S, S], labels y [n] or masks [n, S, S]."""

    def __init__(self, lab, name, f, x, y, data):
        self.lab, self.name, self.f, self.x, self.y = lab, name, f, x, y
        self.s, self.run, self.args = lab.s, lab.run, lab.args
        self.made_with = lab.made_with | {"task": data.name}
        if y.ndim == 3:
            clean = dice(Defence(f).predict(x, 1), y)
            kept = clean >= 0.1
            if lab.args.budget == "smoke":  # it has learned nothing
                kept = kept | True
            elif not kept.any():
                raise Diverged("the U-Net finds nothing: no clean image has a Dice of .1; try more --u-iters")
            self.x, self.y, self.clean, self.apart = x[kept], y[kept], clean[kept], int((~kept).sum())

    def right(self, prediction, index):
        """bool [B]: predicted classes [B] against labels; of masks [B, S, S], Eq. 4.3."""
        if self.y.ndim == 1:
            return prediction == self.y[index]
        return dice(prediction, self.y[index]) >= self.clean[index] / 2

    def defence(self, K=None, sampler=None):
        """f behind K steps (default --k) of the mid-run energy, or of another sampler."""
        mine = sampler or self.lab.sampler
        smooth = None if sampler else common.smoothed(self.lab.energy[0], self.s.beta)
        return Defence(self.f, self.s.k if K is None else K, mine, smooth, self.s.chunk)

    transferred = functools.cached_property(common.own_randomness(  # PGD from the undefended network
        lambda task: attack_f(task.f, task.x, task.y, task.s.n, task.s.step, task.s.eps)))


class Lab:
    """What the experiments share: data, generator, energies, and the tasks to be defended."""

    def __init__(self, args):
        self.args, self.s, s, name = args, args.settings, args.settings, args.dataset
        side = 224 if name == "imagenet" else None

        @functools.lru_cache
        def part(classes, split):
            if classes:
                return load_classes(f"{name}:{classes}", split, args.data_dir, side=side).to(args.device)
            return load_images(name, split, args.data_dir, side=side).to(args.device)
        self.data, self.own, self.test = (part(s.energy_classes, "train"), part(s.classes, "train"),
                                          part(s.classes, "test"))
        self.shape = c, side, _ = self.data.shape
        if s.images > len(self.test) or s.batch > len(self.data):
            raise UserError(f"--images, --batch: {name} has {len(self.test)} images for test, "
                            f"{len(self.data)} for training")
        common.make_net(s.net, 1, self.shape, s.width)  # what can be wrong is said before any work
        common.make_net(s.f_net, 1000, self.shape, s.f_width)
        if s.rejuvenate == "generator" or {"figure3.1", "generator"} & set(args.only):
            common.make_net("sngan_generator", 1, self.shape, s.g_width)
        if not isinstance(self.own, Images) and args.budget != "smoke" and (
                s.f_iters or int(common.folder_labels(self.test).max()) != 999):
            raise UserError(f"{name}: f is a pretrained network of 1000 classes: --f-iters 0, and test "
                            "images in 1000 folders, one a class")
        self.made_with = {"seed": args.seed, "budget": args.budget, "data": [len(self.data), *self.shape]}
        self.others, self.masks = ([load(split).to(args.device) for split in ("train", "test")]
                                   if table in args.only else [] for table, load in (
            ("table4.1", lambda split: load_classes(s.other, split, args.data_dir, c, side)),
            ("table4.2", lambda split: common.load_masks(s.masks, name, split, args.data_dir, c, side))))
        for data in (*self.others, *self.masks):
            if data.shape != self.shape:
                raise UserError(f"--other, --masks: images of {data.name} are {data.shape}, the energy's "
                                f"{self.shape}")
        self.run = Run("lifecycle_midrun", args)

    def images(self, index):
        """Training images of the energy as float32 [B, C, S, S] on the device."""
        return self.data.take(index).to(self.run.device)

    def fresh(self, n):
        """n in-distribution states: of the frozen generator, or of the training images (--rejuvenate)."""
        if self.s.rejuvenate == "data":
            return self.images(torch.randint(len(self.data), (n,)).to(self.args.device))
        return drawn(self.generator, torch.randn(n, 128, device=self.args.device))

    generator = functools.cached_property(train_generator)
    score = functools.cached_property(train_score)
    energy = functools.cached_property(train_midrun)

    @functools.cached_property
    def sampler(self):
        """The defence's chains of the mid-run energy: a tau of its own, the T of training."""
        return Sampler(self.energy[0], self.s.tau, self.s.temperature, graph=self.s.graph)

    @functools.cached_property
    def features(self):
        """("FID", Inception) or ("FD-cls", f): where Frechet distances are taken."""
        return common.feature_network(self.data, self.args.data_dir, self.task.f)

    @functools.cached_property
    def start(self):
        """Images that chains start from: three times --images of the test set."""
        chosen = common.shuffled(len(self.test), 123)[:3 * self.s.images].to(self.args.device)
        return self.test.take(chosen).to(self.args.device)

    @functools.cached_property
    def reference(self):
        """Mean and covariance of the features of 5,000 training images (or of all)."""
        chosen = common.shuffled(len(self.data), 321)[:5000].to(self.args.device)
        return common.feature_statistics(self.features[1], self.images(chosen))

    @common.own_randomness
    def solver(self, name, data, outputs, net, width, iters):
        """A classifier, or a U-Net, trained on Images."""
        sgd = self.s.f_sgd if net == self.s.f_net else 0.0                      # else Adam
        augment = self.s.augment if net == self.s.f_net else "none"
        return common.train_classifier(self.run, data, outputs, net, width, iters, name, sgd, 100, augment,
                                       made_with={"task": data.name})

    def chosen(self, test):
        """Indices of the test images that experiments use: a fixed random choice."""
        return common.shuffled(len(test), 123)[:self.s.images].to(self.args.device)

    @functools.cached_property
    def task(self):
        """Classification of the data set itself (tables 3.1 to 3.3)."""
        s, i, x = self.s, self.chosen(self.test), isinstance(self.own, Images)
        y = self.test.y if x else common.folder_labels(self.test).to(self.args.device)
        classes = int(self.own.y.max()) + 1 if x else 1000
        f = self.solver("f", self.own, classes, s.f_net, s.f_width, s.f_iters)
        return Task(self, "own", f, self.test.take(i).to(self.args.device), y[i], self.own)

    @functools.cached_property
    def other_task(self):
        """Classification of images that the energy never saw (table 4.1)."""
        (data, test), s = self.others, self.s
        net, classes = s.other_net or s.f_net, int(data.y.max()) + 1
        f = self.solver("f-other", data, classes, net, s.f_width, s.other_iters)
        i = self.chosen(test)
        return Task(self, "other", f, test.take(i), test.y[i], data)

    @functools.cached_property
    def mask_task(self):
        """Segmentation (table 4.2)."""
        (data, test), s = self.masks, self.s
        f = self.solver("unet", data, int(data.y.max()) + 1, "unet", s.u_width, s.u_iters)
        i = self.chosen(test)
        return Task(self, "masks", f, test.take(i), test.y[i].long(), data)


# --- experiments --------------------------------------------------------------------------------------------


def attacked(task):
    """Natural and robust accuracy without and with the defence, under each attack and the worst of them ->
    rows, the last attacked images, pictures {title: sixteen images}."""
    s, defence = task.s, task.defence()
    bpda, adversary = algorithm_1(task, f"{task.name}-bpda", defence)
    through = algorithm_1(task, f"{task.name}-through", defence, s.last, n=s.n_last)[0][-1] & bpda[0]
    transfer = task.right(defence.predict(task.transferred, s.h_def), slice(None)) & bpda[0]
    bare = algorithm_1(task, f"{task.name}-pgd", Defence(task.f))[0]
    rows = {"n": len(task.x), "eps": s.eps, "K": s.k, "tau in [-1, 1]": 2 * s.tau}
    rows |= rate("natural acc, no defence", bare[0]) | rate(f"robust acc, no defence (PGD {s.n})", bare[-1])
    rows |= rate("natural acc", bpda[0])
    for attack, right in ((f"BPDA+EOT {s.n} steps x {s.h_adv}", bpda[-1]), (f"transfer PGD {s.n}", transfer),
                          (f"through the last {s.last}, {s.n_last} steps x {s.h_adv}", through),
                          ("worst of these", bpda[-1] & through & transfer)):
        rows |= rate(f"robust acc ({attack})", right)
    pictures = {"natural": task.x, f"attacked (eps {s.eps:.3g})": adversary,
                f"the same, {s.k} steps later": defence.purify(adversary[:16], 1, s.k)[0].clamp(0, 1)}
    return rows, adversary, {title: x[:16] for title, x in pictures.items()}


def table_3_1(lab, task=None, name="table3.1"):
    """The mid-run defence on the data set's own classifier."""
    rows, _, pictures = attacked(task or lab.task)
    lab.run.save(common.picture_rows(pictures, 16), name)
    return rows


def table_3_2(lab):
    """Table 3.1 of --dataset imagenet, or of tinyimagenet."""
    return table_3_1(lab, name="table3.2")


def table_3_3(lab):
    """The attack of table 3.1 with `power` times the steps and a third more chains, on the same images; what
    the plain attack broke stays broken."""
    s, task = lab.s, lab.task
    plain = algorithm_1(task, "own-bpda", task.defence())[0]
    n, h_adv = s.power * s.n, round(4 / 3 * s.h_adv)
    strong = algorithm_1(task, "own-power", task.defence(), n=n, h_adv=h_adv)[0]
    rows = {"n": len(task.x)} | rate("natural acc", plain[0] & strong[0])
    rows |= rate(f"robust acc (BPDA+EOT {s.n} steps x {s.h_adv})", plain[-1])
    rows |= rate(f"robust acc ({n} steps x {h_adv} alone)", strong[-1])
    return rows | rate(f"robust acc (BPDA+EOT {n} steps x {h_adv})", plain[-1] & strong[-1])


def table_4_1(lab):
    """The same energy, unchanged, before a classifier of classes that it never saw."""
    return {"classes": lab.s.other} | table_3_1(lab, lab.other_task, "table4.1")


def table_4_2(lab):
    """The same energy before a U-Net; right and wrong by Eq. 4.3, and mean Dice."""
    task, s = lab.mask_task, lab.s
    rows, adversary, pictures = attacked(task)
    found = {"clean": (task.x, 0), "clean, purified": (task.x, s.k),
             "attacked, no defence": (task.transferred, 0), "attacked, purified": (adversary, s.k)}
    found = {title: task.defence(K).predict(x, s.h_adv) for title, (x, K) in found.items()}
    rows["images of clean Dice below .1, left out"] = task.apart
    rows |= {f"mean Dice, {title}": dice(mask, task.y).mean().item() for title, mask in found.items()}
    pictures |= {f"found: {title}": common.class_colours(mask[:16]) for title, mask in found.items()}
    pictures["true masks"] = common.class_colours(task.y[:16])
    pictures = {title: x.expand(-1, 3, -1, -1) for title, x in pictures.items()}
    lab.run.save(common.picture_rows(pictures, 16), "table4.2")
    return rows


def lives(lab, name, energies):
    """Chains of {title: (V, start [n, C, S, S], ks, tau)}: Frechet distance to training images after each of
    ks steps, as rows and curves, and four chains of each as a picture."""
    metric, network = lab.features
    lines, pictures = {}, {}
    for title, (V, x, ks, tau) in energies.items():
        sampler, done, states = Sampler(V, tau, lab.s.temperature, graph=lab.s.graph), 0, []
        lines[title] = {}
        for k in ks:
            x = torch.cat([sampler(part, k - done)[0] for part in x.split(lab.s.chunk)])
            done, shown = k, x.clamp(0, 1)
            lines[title][k] = frechet_distance(*lab.reference, *common.feature_statistics(network, shown))
            states.append(shown[:4].cpu())
        steps = ", ".join(map(str, ks))
        pictures[f"{title}: four chains after {steps} steps"] = torch.stack(states, 1).flatten(0, 1)
    label = f"{metric} (n = {len(x)})"
    figure = common.curves({"Langevin steps": lines}, label, xscale="symlog", ylim=(0, None))
    lab.run.save(figure, name)
    lab.run.save(common.picture_rows(pictures, 2 * len(ks)), f"{name}-states")
    return {"n": len(x)} | {f"{metric} after {k} steps, {title}": value for title, line in lines.items()
                            for k, value in line.items()}


def figure_3_1(lab):
    """The life cycle: chains of a short-run, the mid-run and a long-run energy."""
    s, start, life = lab.s, lab.start, round(lab.s.k_train / max(lab.s.p, 1e-3))
    short, _, G = train_midrun(lab, "energy-short", False, True, p=0.5, tau_train=s.tau_short, lr=1e-4)
    long = train_midrun(lab, "energy-long", p=s.p / 20, updates=2 * s.updates)[0]
    young = drawn(G, torch.randn(len(start), 128, device=lab.run.device))
    if s.rejuvenate == "generator":
        start = lab.fresh(len(start))
    ks, few = ([round(m * unit) for m in (0, 1 / 16, 1 / 4, 1, 4, 10)] for unit in (life, 4 * s.k_train))
    rows = lives(lab, "figure3.1", {
        "short-run": (short, young, few, s.tau_short), "mid-run": (lab.energy[0], start, ks, s.tau_train),
        "long-run": (long, start, ks, s.tau_train)})
    return {"mean life of a mid-run state": life} | rows


def figure_3_2(lab):
    """Ages of the bank's states at the end of training, against the geometric law that p implies."""
    s = lab.s
    visits, passes = (lab.energy[1] // s.k_train).tolist(), s.updates * s.batch // s.bank
    law = [s.p * (1 - s.p) ** k for k in range(passes)] + [(1 - s.p) ** passes]  # the rest was never replaced
    width = max(passes // 10, 1)
    seen = [visits.count(k) / s.bank for k in range(passes + 1)]
    lines = {title: {k * s.k_train: sum(share[k:k + width]) for k in range(0, passes + 1, width)}
             for title, share in (("bank", seen), ("law", law))}
    axis = f"age, steps (classes of {width * s.k_train}; the last: never replaced)"
    lab.run.save(common.curves({axis: lines}, "share of states"), "figure3.2")
    return {"n": s.bank, "passes over the bank": passes, "mean age, steps": s.k_train * sum(visits) / s.bank,
            "mean age of the law, steps": s.k_train * sum(k * share for k, share in enumerate(law))}


def grid(lab, name, cells, natural=False, **axes):
    """Algorithm 1 on `few` images over {x axis: {label: {x: (defence, changes)}}}: numbers and a picture."""
    rows, panels = {"n": lab.s.few}, {}
    for axis, lines in cells.items():
        for label, line in lines.items():
            for x, (defence, changes) in line.items():
                record = algorithm_1(lab, f"{name}-{axis}-{label}-{x:g}", defence,
                                     **dict(images=lab.s.few, restarts=1) | changes)[0]
                rights = {"robust": record[-1]} | ({"natural": record[0]} if natural else {})
                for kind, right in rights.items():
                    rows |= rate(f"{kind} acc, {label}, {axis} = {x:.3g}", right)
                    points = panels.setdefault(axis, {}).setdefault(f"{label}, {kind}", {})
                    points[x] = right.float().mean().item()
    lab.run.save(common.curves(panels, f"accuracy (n = {lab.s.few})", ylim=(0, 1.02), **axes), name)
    return rows


def figure_3_3(lab):
    """Natural and robust accuracy against K, under `lighter` attacks."""
    ks = sorted({max(round(m * lab.s.k), 1) for m in (1 / 10, 1 / 3, 1, 2, 5)})
    line = {K: (lab.task.defence(K), lighter(lab.s)) for K in ks}
    return grid(lab.task, "figure3.3", {"K": {"mid-run": line}}, natural=True, xscale="log")


def lighter(s):
    """The attack of the figures: N is --n-few, and half as many chains for gradients and verdicts."""
    return dict(n=s.n_few, h_adv=max(s.h_adv // 2, 1), h_def=max(s.h_def // 2, 1))


def figure_3_4(lab):
    """The score network's chain as T(x): natural and robust accuracy against its steps, and its states."""
    s, task, rows, pictures = lab.s, lab.task, {}, {}
    times = [m * s.k * s.tau ** 2 for m in (1 / 30, 1 / 10, 1 / 3, 1)]          # tau^2 K: the noise put in
    cells = {f"steps, {title}": {title: {K: (task.defence(K, chain), lighter(s)) for K in sorted({
        max(round(t / size ** 2), 1) for t in times})}} for title, chain, size in (
            ("score", lab.score, lab.score.eta), ("mid-run energy", None, s.tau))}
    for axis, lines in cells.items():
        for title, line in lines.items():
            states = [task.x[:4]] + [defence.purify(task.x[:4], 1, K)[0] for K, (defence, _) in line.items()]
            steps = ", ".join(map(str, [0, *line]))
            shown = torch.stack(states, 1).flatten(0, 1).clamp(0, 1)
            pictures[f"{title}: four images after {steps} steps"] = shown
            for K, x in zip(line, states[1:]):
                rows[f"mean |x - natural| after {K} steps, {title}"] = (x - task.x[:4]).abs().mean().item()
                rows[f"largest pixel after {K} steps, {title}"] = x.max().item()
    lab.run.save(common.picture_rows(pictures, 2 * (len(times) + 1)), "figure3.4-states")
    return grid(task, "figure3.4", cells, natural=True, xscale="log") | rows


def variants(lab, name, energies):
    """`lives` of energies {title: V}, from test images to ten times the mean life of a state."""
    ks = [round(m * lab.s.k_train / max(lab.s.p, 1e-3)) for m in (0, 1 / 16, 1 / 4, 1, 4, 10)]
    return lives(lab, name, {title: (V, lab.start, ks, lab.s.tau_train) for title, V in energies.items()})


def annealing(lab):
    """The same energy with and without the tail of learning rates."""
    flat = train_midrun(lab, "energy-no-tail", anneal=False)[0]
    return variants(lab, "annealing", {"annealed": lab.energy[0], "first rate throughout": flat})


def rejuvenation(lab):
    """Energies of several p: how long their chains live."""
    p = lab.s.p
    found = {q: lab.energy if q == p else train_midrun(lab, f"energy-p{q:g}", p=q)
             for q in dict.fromkeys((1, min(5 * p, 1), p, p / 5, 0))}
    return variants(lab, "rejuvenation", {f"p = {q:g}": V for q, (V, *_) in found.items()})


def generator(lab):
    """The GAN that mid-run states can come from: Frechet distance of its samples, beside held-out images."""
    n, (name, network) = min(1000, len(lab.test)), lab.features
    x = drawn(lab.generator, torch.randn(n, 128, device=lab.run.device))
    sets = {"generator's samples": x, "held-out images": lab.test.take(slice(0, n)).to(lab.run.device)}
    lab.run.save(common.picture_rows({title: x[:40] for title, x in sets.items()}, 20), "generator")
    found = {title: common.feature_statistics(network, x) for title, x in sets.items()}
    return {"n": n} | {f"{name}, {k}": frechet_distance(*lab.reference, *of) for k, of in found.items()}


QUANTITIES = ("n", "natural acc", "robust acc (BPDA+EOT 50 steps x 48)", "stochastic security: natural acc",
              "stochastic security: robust acc")
PUBLISHED_3_1 = {"cifar10": dict(zip(QUANTITIES, (5000, ".866 (code: .790)", .567, .8412, .5490)))}
PUBLISHED_3_2 = {"imagenet": {"n": 10_000, "natural acc": .684, "robust acc (BPDA+EOT 50 steps x 24)": .418}}
PUBLISHED_3_3 = {"imagenet": {"n": 1600, "natural acc": .683, "robust acc (BPDA+EOT 200 steps x 32)": .38}}
PUBLISHED_4_1 = {"imagenet": {"n": 4520, "natural acc": .821, "robust acc (BPDA+EOT 50 steps x 24)": .519}}
PUBLISHED_4_2 = {"imagenet": {"n": 800, "robust acc, no defence (PGD 50)": .43,
                              "robust acc (BPDA+EOT 50 steps x 24)": .60}}
EXPERIMENTS = {  # the figures of the source print no numbers
    "table3.1": Experiment(table_3_1, "accuracy with the defence", "3.5 min", True, PUBLISHED_3_1),
    "table4.2": Experiment(table_4_2, "the same energy before a U-Net", "3 min", True, PUBLISHED_4_2),
    "table3.2": Experiment(table_3_2, "table3.1 of imagenet (offline: tinyimagenet)", "3.5 min", False,
                           PUBLISHED_3_2),
    "table3.3": Experiment(table_3_3, "more attack steps and chains", "8 min", False, PUBLISHED_3_3),
    "table4.1": Experiment(table_4_1, "the same energy before a classifier of unseen classes", "2 min", False,
                           PUBLISHED_4_1),
    "figure3.1": Experiment(figure_3_1, "short-, mid- and long-run chains", "5.5 min, two more energies"),
    "figure3.2": Experiment(figure_3_2, "ages in the bank", "1 s"),
    "figure3.3": Experiment(figure_3_3, "accuracy against K", "est. 4 min"),
    "figure3.4": Experiment(figure_3_4, "chains of a score network", "9.5 min"),
    "annealing": Experiment(annealing, "without the tail of learning rates", "3 min"),
    "rejuvenation": Experiment(rejuvenation, "the life span of chains against p", "est. 12 min"),
    "generator": Experiment(generator, "the GAN of --rejuvenate generator", "est. 4 min"),
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
