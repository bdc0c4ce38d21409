r"""Stochastic security: an energy-based model (EBM) purifies what a naturally trained classifier gets to see.

Source: Mitchell 2022, "Adversarial Attacks and Defense using Energy-Based Image Models", chapter 2.

The idea. Learn an energy U whose Langevin chains stay realistic for thousands of steps (a convergent EBM).
Run such a chain from the image to be classified: it forgets a small adversarial signal long before it forgets
the class. The classifier f never saw an attack. As the chain is random, the defended classifier is an
expectation: attack and verdict alike must average over many chains.

    U(x) = V(x) / T energy, LOW = in-distribution; V is what the network returns; p(x) ~ exp(-U(x)).
    Pixels in [0, 1] everywhere; networks scale to [-1, 1] inside. The source's tau is for [-1, 1]: halve it.

    (2.2)   dL = E_data[dU(x)] - E_chains[dU(x)]: maximum likelihood; the data carry a little noise
    (2.3)   x <- x - tau^2/2 grad_x U(x) + tau z,  z ~ N(0, I); states are never clamped
    Alg. 2  chains from a bank of persistent states that begins as uniform noise and is never restarted;
            Adam first (short chains become realistic), then SGD (so do long ones: convergence)
    (2.4)   F(x) = E[f(T(x))], T(x): K steps of (2.3) from x.  (2.5) F_H: mean of the logits of H chains
    (2.6)   the prediction argmax F_H(x)
    (2.10)  BPDA+EOT: gradient of the loss of F_H at the purified images, averaged over the H chains and used
            at the image, as if T were the identity
    Alg. 1  N + 1 evaluations with H_adv chains; what looks broken is judged again by H_def fresh chains;
            broken stays broken; naturally wrong images count as broken; restarts are joined by AND
    (2.12)  maximal Lyapunov exponent: mean log growth, a step, of the distance of two chains with equal noise

The chain's derivative. V is piecewise linear in x (leaky ReLU), its Hessian is zero almost everywhere, so the
Jacobian of a Langevin step IS the identity: gradients through the whole chain equal BPDA's, and a tangent
vector would give every exponent as 0. So the stronger attack here (--last) goes back through the last steps
of the chain with a smooth stand-in for leaky ReLU, and figure 2.7 uses two chains a finite distance apart.

Commands (measured times and numbers stand in README.md and results/):
    python stochastic_security.py                                   rendered digits, nothing to download
    python stochastic_security.py --dataset cifar10 --budget paper  all settings of Alg. 1 and 2
    python stochastic_security.py --only traps                      how such results go wrong; --list: all

The EBM's log. d: energy of the data minus that of the chains, near 0 when all is well. grad: mean |grad_x V|
along the chains. drift: length of the gradient's part of a step over that of the noise, well below 1 in a
model that samples. spread: standard deviation of the bank's pixels, that of the data at the end.

Differs from the source:
  - J and the switch follow Alg. 2 (150,000 and 50,000 updates); the published code has 250,000 and 125,000.
  - Alg. 2 prints one learning rate for U; the code applies its 5e-5 of SGD to V, and so do we. Budget quick
    has larger rates of SGD, fewer and shorter chains, and a small bank, whose states get old sooner.
  - Data and bank are visited in shuffled passes, not drawn independently; both are as random within a batch.
  - Natural images are judged with H_def, as in Alg. 1; the code first screens with H_adv.
  - Broken images leave the batch (Alg. 1; the code goes on attacking them). The l_2 start is clamped too.
  - The AT baseline is attacked in eval mode while it trains (source: train mode), and tested like f: N steps
    and restarts, any of which counts. SVHN's rates drop at 40 and 60 % of training (source: 20 and 60 %).
  - bfloat16 in networks where the processor has units for it; states, images and losses are float32.
"""
import copy
import dataclasses
import functools
import math
import time

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import common
from common import Diverged, Experiment, Log, Run, UserError
from common import batch_index, batches, fast_precision, load_images, rate

# --- settings -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Settings:
    """Everything that can be set; each field is also a flag (--eps 8/255). Defaults: Alg. 1, Alg. 2, code."""
    f_net: str = "wrn28"         # natural classifier f: small_cnn, wrn16, wrn28 (f_width: widening), resnet18
    f_width: float = 10.0
    f_iters: int = 50_000        # its updates, batch 100; 100 epochs
    at_iters: int = 50_000       # updates of the adversarially trained baseline (PGD-10)
    f_sgd: float = 0.1           # rate of SGD; a tenth of it from 40 % on, a hundredth from 60 %; 0: Adam
    augment: str = "crop_flip"   # of the classifier's images: none, crop, crop_flip
    width: float = 1.0           # of the light EBM; 1: 32 channels
    updates: int = 150_000       # Alg. 2: J
    switch: int = 50_000         # Alg. 2: updates with Adam, before SGD
    adam_lr: float = 1e-4
    sgd_lr: float = 5e-5         # on V
    batch: int = 100             # data, and as many chains
    bank: int = 0                # persistent states; 0: as many as there are training images
    k_train: int = 100           # Langevin steps of an update
    tau: float = 0.005           # standard deviation of a step's noise; .01 in [-1, 1]
    temperature: float = 5e-5    # T; tau^2 / (2 T) is 1/4 here, so that in [-1, 1] a step is grad V itself
    data_noise: float = 0.01     # .02 in [-1, 1]
    k: int = 1500                # K of the defence
    h_def: int = 150             # chains of a verdict
    h_adv: int = 15              # chains of an attack's gradient
    n: int = 50                  # N of Alg. 1: updates of the attacked image
    eps: float = 8 / 255         # of the attack, l_inf
    step: float = 2 / 255
    eps_l2: float = 1.0          # of the l_2 half of figure 2.4; its step is a quarter of it
    restarts: int = 5
    last: int = 10               # steps of the chain that the stronger attack goes back through
    beta: float = 20.0           # sharpness of its stand-in for leaky ReLU
    n_last: int = 50             # N of that attack, of figure 2.8 and of `precision`
    images: int = 10_000         # test images
    few: int = 1000              # test images of figures 2.4, 2.5, 2.8
    n_long: int = 1000           # N of figure 2.5
    chunk: int = 1600            # chains that run as one batch
    graph: int = 1               # CUDA: replay a captured step; 0: launch every kernel
    log_every: int = 500
    save_every: int = 1000

    def __post_init__(self):
        common.at_least(1, self, "f_iters", "at_iters", "updates", "batch", "k_train", "h_def", "h_adv",
                        "restarts", "images", "few", "chunk", "log_every", "save_every")
        if not (0 < self.tau < math.inf and 0 < self.temperature < math.inf):
            raise UserError("--tau and --temperature must be above 0 and finite")
        if self.bank % self.batch or self.last > self.k:
            raise UserError("--bank must be a multiple of --batch, --last at most --k")
        self.few = min(self.few, self.images)


new, PAPER = dataclasses.replace, Settings()
SVHN = new(PAPER, f_sgd=0.01, f_iters=36_600, at_iters=36_600, augment="crop", tau=0.00875, sgd_lr=2.5e-5,
           temperature=0.0175 ** 2 / 2, data_noise=0.015)  # its EBM has a tau of its own
GREY = new(  # 28 pixels, not in the source. eps: f keeps at most 5 % of TRAINING images there (table2.1)
    PAPER, f_net="small_cnn", f_width=1.0, f_iters=300, at_iters=200, f_sgd=0.0, augment="none", width=0.5,
    updates=800, switch=600, sgd_lr=3e-2, batch=64, bank=1024, k_train=20, tau=0.015, temperature=1e-4,
    data_noise=0.03, k=75, h_def=24, h_adv=6, n=20, eps=0.08, step=0.02, restarts=1, last=5, n_last=10,
    images=100, few=50, n_long=100, chunk=250, log_every=100, save_every=200)
MNIST = new(GREY, f_iters=600, at_iters=600, updates=2000, switch=1500, k=100, eps=0.2, step=0.05)
QUICK = dict(f_net="wrn16", f_width=4.0, f_iters=6000, at_iters=3000, updates=8000, switch=6000, bank=5000,
             k_train=50, k=500, h_def=50, h_adv=8, n=20, restarts=1, last=5, n_last=10, images=200, few=100,
             n_long=200, log_every=200, save_every=500)


def three_budgets(quick, paper):
    """The three budgets of a data set."""
    tiny = dict(f_iters=3, at_iters=2, updates=6, switch=4, batch=4, bank=8, k_train=2, k=3, h_def=3, h_adv=2,
                n=2, n_last=1, last=2, images=8, few=4, n_long=3, log_every=2, save_every=2, width=0.125)
    return {"smoke": new(quick, **tiny, f_width=min(quick.f_width, 1)), "quick": quick, "paper": paper}


def longer(s):
    """The budget "paper" of sets that are not in the source: ten times the training, Alg. 1 at its size."""
    return new(s, width=1.0, updates=10 * s.updates, switch=10 * s.switch, f_iters=3000, at_iters=3000,
               h_def=150, h_adv=15, n=50, n_last=50, restarts=5, images=1000, few=1000)


CIFAR = three_budgets(new(PAPER, **QUICK, sgd_lr=1e-3), PAPER)
SETTINGS = {"glyphs": three_budgets(GREY, longer(GREY)), "symbols": three_budgets(GREY, longer(GREY)),
            "mnist": three_budgets(MNIST, longer(MNIST)), "cifar10": CIFAR, "cifar100": CIFAR,
            "svhn": three_budgets(new(SVHN, **QUICK, sgd_lr=5e-4), SVHN)}
EBM_SETTINGS = "width updates switch adam_lr sgd_lr batch bank k_train tau temperature data_noise".split()
NOT_OF_THE_ATTACK = "k last few n_long n_last eps_l2 log_every save_every graph".split()

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


# --- learning the energy (Algorithm 2) ----------------------------------------------------------------------


@common.own_randomness
def train_ebm(lab, name="ebm", **changes):
    """Algorithm 2 -> (V, log rows, snapshots {"it", "V": weights, "bank": four states}).

    Goes on from its checkpoint; raises Diverged. switch=updates: Adam throughout, the non-convergent EBM.
    """
    run, s = lab.run, dataclasses.replace(lab.s, **changes)
    size = s.bank or len(lab.data) // s.batch * s.batch
    V = common.make_net("light_ebm", 1, lab.data.shape, s.width).to(run.device)
    bank = torch.rand(size, *lab.data.shape, device=run.device)

    def optimizer_at(it):
        """The loss is in U = V / T: SGD's rate for V is T times as large for U; Adam does not care."""
        return (torch.optim.Adam(V.parameters(), s.adam_lr) if it <= s.switch else
                torch.optim.SGD(V.parameters(), s.sgd_lr * s.temperature))

    file, made_with = run.folder / f"{name}.pt", {k: getattr(s, k) for k in EBM_SETTINGS} | lab.made_with
    state = common.load_checkpoint(file, made_with) or {"it": 0, "rows": [], "sums": [], "snapshots": []}
    it, rows, sums, snapshots = (state[k] for k in ("it", "rows", "sums", "snapshots"))
    optimizer = optimizer_at(it)
    if it:
        V.load_state_dict(state["V"])
        bank.copy_(state["bank"])
        optimizer.load_state_dict(state["optimizer"])
    if it >= s.updates:
        return V, rows, snapshots
    sampler = Sampler(V, s.tau, s.temperature, graph=s.graph)
    cost = (s.updates - it) * (s.k_train + 6) * s.batch / common.throughput(sampler, bank[:s.batch], 0.3)
    print(f"training {name}: {s.updates} updates of {s.batch} images and {s.batch} chains of {s.k_train} "
          f"steps; expected {cost:.0f} s at this machine's speed", flush=True)
    log = Log(run.folder / f"log-{name}.csv", s.updates, rows, ("d", "grad", "drift", "spread"))
    xs = batches(lab.data, s.batch, run.args.seed, it, device=run.device)
    drift = s.tau / (2 * s.temperature) / math.sqrt(bank[0].numel())            # per unit of |grad V|
    pictures = {max(round(s.updates * part), 1) for part in (1 / 16, 1 / 4, 1)} | {s.switch}
    while it < s.updates:
        it += 1
        if it == s.switch + 1:
            optimizer = optimizer_at(it)
        x = next(xs)[0]
        x = x + s.data_noise * torch.randn_like(x)                              # [m, C, S, S], not clamped
        place = batch_index(size, s.batch, run.args.seed + 1, it - 1).to(run.device)
        sampler.follow()
        chains, norm = sampler(bank[place], s.k_train)
        bank[place] = chains                                                    # every state to its place
        with fast_precision(run.device):
            v_data, v_chains = V(torch.cat([x, chains]))[:, 0].float().chunk(2)
        d = (v_data.mean() - v_chains.mean()) / s.temperature                   # its gradient is Eq. 2.2
        optimizer.zero_grad(set_to_none=True)
        d.backward()
        optimizer.step()

        sums.append([d.item(), norm.item()])
        runaway = not drift * sums[-1][1] < 10                                  # NaN is one too
        if it in pictures:
            weights = {k: v.detach().cpu().clone() for k, v in V.state_dict().items()}
            snapshots.append({"it": it, "V": weights, "bank": bank[:4].cpu().clone()})
        if it % s.log_every == 0 or it == s.updates or runaway:
            mean_d, mean_norm = (sum(column) / len(sums) for column in zip(*sums))
            log.add(it, d=mean_d, grad=mean_norm, drift=drift * mean_norm, spread=bank.std().item())
            sums = []
        if runaway:
            raise Diverged(f"training diverged at update {it}: the gradient moves chains {drift * norm:.3g} "
                           "times as far as noise; try a lower --adam-lr or --sgd-lr", log.rows)
        if it % s.save_every == 0 or it == s.updates:
            common.save_checkpoint(file, made_with, it=it, V=V.state_dict(), bank=bank, rows=log.rows,
                                   optimizer=optimizer.state_dict(), sums=sums, snapshots=snapshots)
    return V, log.rows, snapshots


# --- attacks on a classifier, and the two classifiers -------------------------------------------------------


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


@common.own_randomness
def train_f(lab, eps=0.0):
    """The natural classifier f; with eps the baseline: adversarially trained (AT) by PGD-10. In eval mode."""
    s = lab.s
    adversary = functools.partial(attack_f, steps=10, step=eps / 4, eps=eps) if eps else None
    return common.train_classifier(
        lab.run, lab.data, lab.classes, s.f_net, s.f_width, s.at_iters if eps else s.f_iters,
        f"f-at-{eps:.4g}" if eps else "f", s.f_sgd, 100, s.augment, adversary, {"at_eps": eps})


# --- the defended classifier, and Algorithm 1 ---------------------------------------------------------------


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


def frechet_distance(mean1, cov1, mean2, cov2):
    """||m1 - m2||^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2) of two Gaussians, float64 [d], [d, d]."""
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return ((mean1 - mean2).pow(2).sum() + cov1.trace() + cov2.trace() - 2 * cross).item()


def lyapunov(step, x, steps, d0, noise=torch.randn_like):
    """Eq. 2.12: maximal exponent per step of x -> step(x, z), z = noise(x), for each chain of [B, ...]: [B].

    Two chains with the same noise; after each step the second is put back to L2 distance d0 of the first. The
    first fifth of the steps, in which it turns to the direction that grows most, does not count.
    """
    y, total = x + d0 * F.normalize(torch.randn_like(x).flatten(1)).view_as(x), 0
    for i in range(steps):
        z = noise(x)
        x, y = step(x, z), step(y, z)
        distance = (y - x).flatten(1).norm(dim=1).clamp(min=1e-30)
        total = total + (distance / d0).log() * (i >= steps // 5)
        y = x + (y - x) * (d0 / distance).view(-1, *[1] * (x.ndim - 1))
    return total / (steps - steps // 5)


class Lab:
    """What the experiments share: data, the images under attack, classifiers, energies."""

    def __init__(self, args):
        self.args, self.s, s, self.samplers = args, args.settings, args.settings, {}
        self.data, test = (load_images(args.dataset, split, args.data_dir).to(args.device)
                           for split in ("train", "test"))
        self.classes, shape = common.IN_MEMORY[args.dataset][2], self.data.shape
        if s.images > len(test) or s.batch > len(self.data):
            raise UserError(f"--images, --batch: {args.dataset} has {len(test)} images for test, "
                            f"{len(self.data)} for training")
        common.make_net(s.f_net, self.classes, shape, s.f_width)  # what can be wrong is said before any work
        common.make_net("light_ebm", 1, shape, s.width)
        chosen = common.shuffled(len(test), 123)[:s.images].to(args.device)
        self.x, self.y = test.take(chosen), test.y[chosen]
        self.made_with = {"seed": args.seed, "budget": args.budget, "data": [len(self.data), *shape]}
        self.run = Run("stochastic_security", args)

    f = functools.cached_property(train_f)
    f_at = functools.cached_property(lambda lab: train_f(lab, lab.s.eps))
    ebm = functools.cached_property(train_ebm)
    adam_ebm = functools.cached_property(lambda lab: train_ebm(lab, "ebm-adam", switch=lab.s.updates))
    transferred = functools.cached_property(common.own_randomness(  # PGD from f
        lambda lab: attack_f(lab.f, lab.x, lab.y, lab.s.n, lab.s.step, lab.s.eps)))

    def right(self, prediction, index):
        """Whether predicted classes [B] are the labels of the images of this index: bool [B]."""
        return prediction == self.y[index]

    def sampler(self, V=None, fast=True, noise=torch.randn_like):
        return Sampler(V or self.ebm[0], self.s.tau, self.s.temperature, fast, self.s.graph, noise)

    def defence(self, K=None, V=None, fast=True):
        """f behind K steps (default --k) of V (default: the convergent EBM); one sampler for each V."""
        V, K = V or self.ebm[0], self.s.k if K is None else K
        if (V, fast) not in self.samplers:
            self.samplers[V, fast] = self.sampler(V, fast)
        return Defence(self.f, K, self.samplers[V, fast], common.smoothed(V, self.s.beta), self.s.chunk)


# --- experiments --------------------------------------------------------------------------------------------


def table_2_1(lab):
    """Natural images and PGD from f alone (transfer) at K = 0, 10 and the defence's; how eps was chosen."""
    s, rows = lab.s, {"n": len(lab.x), "eps": lab.s.eps}
    for K in sorted({0, min(10, s.k), s.k}):
        natural, attacked = (lab.defence(K).predict(x, s.h_def) == lab.y for x in (lab.x, lab.transferred))
        rows |= rate(f"natural acc, K = {K}", natural)
        rows |= rate(f"transfer PGD acc, K = {K}", natural & attacked)
    x, y = lab.data.take(slice(0, 500)), lab.data.y[:500]
    for eps in (s.eps / 2, 3 * s.eps / 4, s.eps):
        right = Defence(lab.f).predict(attack_f(lab.f, x, y, s.n, eps / 4, eps), 1) == y
        rows |= rate(f"acc of f under PGD, 500 training images, eps {eps:.4g}", right)
    return rows


def table_2_2(lab):
    """Natural and robust accuracy, each attack and the worst, beside an adversarially trained classifier."""
    s, defence = lab.s, lab.defence()
    bpda = algorithm_1(lab, "bpda", defence)[0]
    through = algorithm_1(lab, "through", defence, s.last, n=s.n_last)[0][-1] & bpda[0]
    transfer = (defence.predict(lab.transferred, s.h_def) == lab.y) & bpda[0]
    rows = {"n": len(lab.x), "eps": s.eps, "K": s.k, "tau in [-1, 1]": 2 * s.tau}
    rows |= rate("natural acc", bpda[0])
    for attack, right in ((f"BPDA+EOT {s.n} steps x {s.h_adv}", bpda[-1]), (f"transfer PGD {s.n}", transfer),
                          (f"through the last {s.last}, {s.n_last} steps x {s.h_adv}", through),
                          ("worst of these", bpda[-1] & through & transfer)):
        rows |= rate(f"robust acc ({attack})", right)
    for label, f in (("f", lab.f), ("AT", lab.f_at)):
        record = algorithm_1(lab, f"pgd-{label}", Defence(f))[0]
        rows |= rate(f"natural acc, {label}", record[0]) | rate(f"robust acc, {label}", record[-1])
    return rows


def figure_2_2(lab):
    """Bank, short-run (from noise) and long-run (from data) states along training; the energy difference."""
    s, (V, log, snapshots), short, long = lab.s, lab.ebm, max(lab.s.k_train, 400), 200 * lab.s.k_train
    V, data, columns, rows = copy.deepcopy(V), lab.data.take(slice(0, 4)), [], {"long-run steps": long}
    for snapshot in snapshots:
        V.load_state_dict(snapshot["V"])
        sampler = lab.sampler(V)
        states = snapshot["bank"], sampler(torch.rand_like(data), short)[0], sampler(data, long)[0]
        columns.append([x.cpu().clamp(0, 1) for x in states])
        rows[f"long run: mean |x - data|, update {snapshot['it']}"] = (states[2] - data).abs().mean().item()
    titles = "bank", f"{short} steps from noise", f"{long} steps from data"
    its = ", ".join(str(snapshot["it"]) for snapshot in snapshots)
    pictures = {f"{title}; four each after {its} updates (Adam to SGD: {s.switch})": torch.cat(x)
                for title, x in zip(titles, zip(*columns))}
    lab.run.save(common.picture_rows(pictures, 4 * len(columns)), "figure2.2")
    lines = {label: {row["it"]: row["d"] for row in log if (row["it"] <= s.switch) == (label == "Adam")}
             for label in ("Adam", "SGD")}
    lab.run.save(common.curves({"update": lines}, "energy, data - chains", yscale="symlog"), "figure2.2-d")
    return rows


def figure_2_3(lab):
    """F_H of a borderline and a safe adversarial image over H: what a verdict on few chains would say."""
    s, defence = lab.s, lab.defence()
    record, x = algorithm_1(lab, "bpda", defence)
    alive = record[-1].nonzero()[:, 0] if record[-1].sum() > 1 else torch.arange(2, device=x.device)
    logits, y = defence.chains(x[alive], s.h_def).mean(0), lab.y[alive]
    margin = (logits.gather(1, y[:, None]) - logits.scatter(1, y[:, None], -math.inf)).amin(1)
    pick = torch.stack([margin.argmin(), margin.argmax()])
    chains = defence.chains(x[alive[pick]], 30 * s.h_def)                       # [30 H_def, 2, classes]
    rows, panels = {"chains an image": len(chains)}, []
    for H in (1, s.h_adv, s.h_def):
        F_H = chains[:len(chains) // H * H].unflatten(0, (-1, H)).mean(1)       # disjoint groups of H chains
        panels.append([])
        for i, name in enumerate(("borderline", "safe")):
            rival = chains[:, i].mean(0).scatter(0, y[pick[i]], -math.inf).argmax()
            panels[-1].append((f"{name}: F_H, H = {H}", {"true class": F_H[:, i, y[pick[i]]],
                                                         "second class": F_H[:, i, rival]}))
            rows[f"share of wrong F_{H}, {name}"] = (F_H[:, i].argmax(1) != y[pick[i]]).float().mean().item()
    lab.run.save(common.histograms(panels), "figure2.3")
    return rows


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


def figure_2_4(lab):
    """Accuracy against eps in l_inf and l_2: the defence under BPDA+EOT, AT and f under PGD."""
    defences = {"EBM": lab.defence(), "AT": Defence(lab.f_at), "f": Defence(lab.f)}
    return grid(lab, "figure2.4", {f"eps (l_{norm})": {label: {
        m * eps: (defence, dict(norm=norm, eps=m * eps, step=m * eps / 4)) for m in (0.25, 0.5, 1, 1.5, 2)}
        for label, defence in defences.items()} for norm, eps in (("inf", lab.s.eps), ("2", lab.s.eps_l2))})


def figure_2_5(lab):
    """More attacker: N far beyond the default with a third more chains, and the number of chains H_adv."""
    s, rows, lines, hs = lab.s, {}, {}, sorted({1, max(lab.s.h_adv // 3, 1), lab.s.h_adv, 2 * lab.s.h_adv})
    for label, defence in (("EBM", lab.defence()), ("AT", Defence(lab.f_at))):
        record = algorithm_1(lab, f"figure2.5-N-{label}", defence, images=s.few, n=s.n_long, restarts=1,
                             h_adv=round(4 / 3 * s.h_adv))[0]
        lines[label] = dict(enumerate(record[1:].float().mean(1).tolist()))
        for N in (min(s.n, s.n_long), s.n_long):
            rows |= rate(f"robust acc, {label}, N = {N}", record[N + 1])
    figure = common.curves({"attack steps N": lines}, f"accuracy (n = {s.few})", ylim=(0, 1.02))
    lab.run.save(figure, "figure2.5-N")
    return rows | grid(lab, "figure2.5", {"H_adv": {"EBM": {
        H: (lab.defence(), dict(h_adv=H)) for H in hs}}})


def figure_2_6(lab):
    """Energies of natural, adversarial and noise images; how often an image's adversary is the higher."""
    sets = {"natural": lab.x, "transfer PGD": lab.transferred,
            "BPDA+EOT": algorithm_1(lab, "bpda", lab.defence())[1],
            "random signs": (lab.x + lab.s.eps * (torch.rand_like(lab.x) - 0.5).sign()).clamp(0, 1),
            "uniform noise": torch.rand_like(lab.x)}
    V = lab.ebm[0]
    with torch.no_grad():
        U = {name: V(x)[:, 0] / lab.s.temperature for name, x in sets.items()}
    close = dict(list(U.items())[:4])
    lab.run.save(common.histograms([[("energy U", close), ("energy U", U)]]), "figure2.6")
    rows = {"n": len(lab.x)} | {f"mean U, {name}": u.mean().item() for name, u in U.items()}
    for name in list(U)[1:]:
        rows |= rate(f"share with higher U than natural, {name}", U[name] > U["natural"])
    return rows


def figure_2_7(lab):
    """Maximal Lyapunov exponent against the noise eta, for several distances d0, and steady-state samples."""
    s, V, x, rows, pictures = lab.s, lab.sampler(fast=False).V, lab.x[:16], {"steps": 4 * lab.s.k}, []
    lines = {d0: {} for d0 in (0.01, 0.03, 0.1, 0.3, 1)}                        # L2, in [0, 1] pixels
    etas = [round(10 ** (k / 3), 3) for k in range(-6, 4)]
    for eta in etas:
        settled = lab.sampler(noise=lambda x: eta * torch.randn_like(x))(x, 10 * s.k)[0]
        pictures.append(settled[:3].cpu().clamp(0, 1))
        for d0, line in lines.items():
            line[eta] = lyapunov(lambda x, z: langevin_step(V, x, eta * z, s.tau, s.temperature)[0], settled,
                                 4 * s.k, d0).mean().item()
            rows[f"exponent a step, eta {eta:g}, d0 {d0}"] = line[eta]
    lines = {f"d0 = {d0}": line for d0, line in lines.items()}
    lab.run.save(common.curves({"eta (1: the sampler's noise)": lines}, "maximal exponent, a step",
                               xscale="log"), "figure2.7")
    title = f"{10 * s.k} steps from data; eta = " + ", ".join(f"{eta:.2g}" for eta in etas)
    lab.run.save(common.picture_rows({title: torch.stack(pictures, 1).flatten(0, 1)}, len(etas)),
                 "figure2.7-samples")
    return rows


def figure_2_8(lab):
    """Natural and robust accuracy against K: convergent EBM, and one trained by Adam throughout."""
    s, less = lab.s, dict(n=lab.s.n_last, h_adv=max(lab.s.h_adv // 2, 1))
    ks = sorted({max(round(m * s.k), 1) for m in (1 / 10, 1 / 3, 1, 3)})
    return grid(lab, "figure2.8", {"K": {label: {K: (lab.defence(K, V), less) for K in ks} for label, V in (
        ("convergent", lab.ebm[0]), ("non-convergent", lab.adam_ebm[0]))}}, natural=True, xscale="log")


def figure_2_9(lab):
    """Frechet distance to the data after k steps from training images, for both EBMs."""
    name, network = common.feature_network(lab.data, lab.args.data_dir, lab.f)
    n, lines = min(10 * lab.s.few, len(lab.data) // 2), {}
    reference = common.feature_statistics(network, lab.data.take(slice(n, 2 * n)))
    for label, V in (("convergent", lab.ebm[0]), ("non-convergent", lab.adam_ebm[0])):
        x, done, lines[label], sampler = lab.data.take(slice(0, n)), 0, {}, lab.sampler(V)
        for steps in sorted({0, *(max(round(m * lab.s.k), 1) for m in (0.1, 0.3, 1, 3, 10, 30))}):
            x = torch.cat([sampler(part, steps - done)[0] for part in x.split(lab.s.chunk)])
            here = common.feature_statistics(network, x.clamp(0, 1))
            done, lines[label][steps] = steps, frechet_distance(*reference, *here)
    figure = common.curves({"Langevin steps from data": lines}, f"{name} (n = {n})", xscale="symlog")
    lab.run.save(figure, "figure2.9")
    return {"n": n} | {f"{name} after {k} steps, {label}": v for label, line in lines.items()
                       for k, v in line.items()}


def figure_2_10(lab):
    """Cost of Langevin steps: plain loop and fast path in turns, a JEM-size network, the matrix rate."""
    s, device, smoke = lab.s, lab.run.device, lab.args.budget == "smoke"
    V = common.make_net("light_ebm", 1, lab.data.shape, s.width).to(device)
    jem = common.make_net("wrn28", 1, lab.data.shape, 0.5 if smoke else 10).to(device).eval()
    plain, fast, big = (Sampler(net, s.tau, s.temperature, quick, s.graph)
                        for net, quick in ((V, False), (V, True), (jem, True)))
    with FlopCounterMode(display=False) as counter:
        plain.V(lab.x[:1])
    flops = 2 * counter.get_total_flops()                       # the gradient in x costs as much again
    peak = common.matrix_rate(device, 64 if smoke else 2048 if device.type == "cpu" else 8192)
    sizes = (4,) if smoke else (100, 250, 1000) if device.type == "cpu" else (100, 1600, 6400, 25_600)
    x, seconds = [lab.x[:1].repeat(size, 1, 1, 1) for size in sizes], 0.01 if smoke else 2
    turns = [[common.throughput(sampler, x[0], seconds) for sampler in (plain, fast)] for _ in range(3)]
    slow, quick = (sorted(column)[1] for column in zip(*turns))
    best = max(quick, *(common.throughput(fast, x_, seconds) for x_ in x))
    return {f"images x steps / s, plain float32 loop, batch {sizes[0]}": slow,
            f"images x steps / s, fast path, batch {sizes[0]}": quick, "fast path / plain loop": quick / slow,
            "images x steps / s, fast path, best batch": best,
            "seconds for 100 images and 1500 steps": 150_000 / quick,
            "images x steps / s, WRN-28-10 (the size of JEM)": common.throughput(
                big, x[0][:10] if device.type == "cpu" else x[0], seconds),
            "GFLOP an image and step": flops / 1e9, "matrix rate, TFLOP/s": peak / 1e12,
            "share of the matrix rate": best * flops / peak}


def precision(lab):
    """The same attack on the same images with chains in bfloat16 (where there are units) and in float32."""
    rows = {"n": min(200, lab.s.images)}
    for label, fast in (("fast path", True), ("float32", False)):
        record = algorithm_1(lab, f"precision-{fast}", lab.defence(fast=fast), n=lab.s.n_last, restarts=1,
                             images=rows["n"])[0]
        rows |= rate(f"natural acc, {label}", record[0]) | rate(f"robust acc, {label}", record[-1])
    return rows


def traps(lab):
    """How such results go wrong: each trap's wrong and right number, from the same models and images."""
    s, f, defence, n = lab.s, lab.f, lab.defence(), min(lab.s.images, 1000)
    x, y, less = lab.x[:n], lab.y[:n], dict(images=n, restarts=1)
    hard = less | dict(eps=1.5 * s.eps, step=1.5 * s.step)      # where many images are borderline
    fair = algorithm_1(lab, "trap-fair", defence, **hard)[0][-1]
    one_pass = algorithm_1(lab, "trap-one-pass", defence, h_adv=1, **hard)[0][-1]
    unverified = algorithm_1(lab, "trap-unverified", defence, h_adv=1, verify=False, **hard)[0][-1]
    closest = algorithm_1(lab, "trap-8bit", Defence(f), step=s.step / 10, **less)[1]  # just broken
    train_mode = copy.deepcopy(f).train()

    def right(x, net=f):
        return Defence(net).predict(x, 1) == y

    def pgd(eps=s.eps, **scale):
        return attack_f(f, x, y, s.n, eps / 4, eps, **scale)
    attacked = pgd()
    pairs = {"F, 1.5 eps: gradient of one stochastic pass, not EOT": (one_pass, fair),
             "F, 1.5 eps: breaks on one pass count without verification": (unverified, one_pass),
             "f under PGD: logits times 1e4": (right(pgd(scale=1e4)), right(attacked)),
             "f, smallest perturbations: images cut to 8 bit": (
                 right((closest * 255).byte().float() / 255), right(closest)),
             "f under PGD: judged in train mode": (right(attacked, train_mode), right(attacked)),
             "f under PGD: eps meant for [-1, 1]": (right(pgd(s.eps / 2)), right(attacked))}
    rows = {"n": n}
    for name, (wrong, fair) in pairs.items():
        rows |= rate(f"{name}: wrong", wrong) | rate(f"{name}: right", fair)
    return rows


PUBLISHED_2_1 = {"cifar10": {
    "natural acc, K = 0": .9530, "transfer PGD acc, K = 0": .0, "natural acc, K = 10": .9586,
    "transfer PGD acc, K = 10": .0001, "natural acc, K = 1500": .8412, "transfer PGD acc, K = 1500": .7891}}
QUANTITIES = ("K", "tau in [-1, 1]", "natural acc", "robust acc (BPDA+EOT 50 steps x 15)", "natural acc, AT",
              "robust acc, AT")
PUBLISHED_2_2 = {"cifar10": dict(zip(QUANTITIES, (1500, .01, .8412, .5490, .873, .458)))}
PUBLISHED_2_3 = {"svhn": dict(zip(QUANTITIES, (1500, .0175, .9223, .6755, .8957, .5039))),
                 "cifar100": dict(zip(QUANTITIES, (1500, .01, .5166, .2610, .5958, .2547)))}
PUBLISHED_2_10 = {"cifar10": {"seconds for 100 images and 1500 steps": "13 (RTX 2070 Super)"}}
EXPERIMENTS = {  # the figures of the source print no numbers
    "table2.1": Experiment(table_2_1, "K = 0, 10, K against transfer", "2.5 min", True, PUBLISHED_2_1),
    "table2.2": Experiment(table_2_2, "natural and robust accuracy beside AT", "3 min", True, PUBLISHED_2_2),
    "figure2.3": Experiment(figure_2_3, "F_H of two images over H", "20 s", True),
    "figure2.6": Experiment(figure_2_6, "energies", "1 s", True),
    "table2.3": Experiment(table_2_2, "table2.2 of --dataset svhn, cifar100 (offline: symbols)", "est. 5 min",
                           False, PUBLISHED_2_3),
    "figure2.2": Experiment(figure_2_2, "short-run and long-run samples along training", "25 s"),
    "figure2.4": Experiment(figure_2_4, "accuracy against eps", "est. 8 min"),
    "figure2.5": Experiment(figure_2_5, "more attack steps, more chains", "est. 6 min"),
    "figure2.7": Experiment(figure_2_7, "Lyapunov exponent against noise", "1.5 min"),
    "figure2.8": Experiment(figure_2_8, "accuracy against K, convergent or not", "3 min, another EBM 2 min"),
    "figure2.9": Experiment(figure_2_9, "Frechet distance against steps", "3 min, another EBM 2 min"),
    "figure2.10": Experiment(figure_2_10, "speed", "25 s", False, PUBLISHED_2_10),
    "precision": Experiment(precision, "bfloat16 against float32", "5 min"),
    "traps": Experiment(traps, "six ways to a wrong number", "3 min"),
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
