r"""The Fixer: a network behind purification that repairs what Langevin chains leave wrong.

Source: Mitchell 2022, "Adversarial Attacks and Defense using Energy-Based Image Models", chapter 5.

The idea. Purification (stochastic_security.py, lifecycle_midrun.py) moves an image along Langevin chains of
an energy until an attack is gone. The chains leave something behind: noise of their last steps, frayed
strokes. Some images are then misread although nobody attacked them, and no defence can hold more images than
it reads unattacked. So learn an image-to-image network G that takes purified natural images back to the
images they came from, and put it between the chains and the classifier: f(G(T(x))). Neither the energy nor
the classifier changes, and no attacked image is needed to learn G.

    U(x) = V(x) / T energy, LOW = in-distribution, of lifecycle_midrun.py; frozen. T(x): K Langevin steps
    Pixels in [0, 1] everywhere; networks scale inside. Chains are never clamped, and neither is G's output

    (2.3)    a step of T: x <- x - tau^2/2 grad_x U(x) + tau z,  z ~ N(0, I)
    (5.1)    F(x) = E[f(G(T(x)))].  (5.2) F_H: mean of the logits of G's outputs for H chains (2.5 without G)
    (5.3)    phase 1, pixels:      |G(T(x)) - x|^2
    (5.4)    phase 2, perceptual:  |phi_j(G(T(x))) - phi_j(x)|^2 / (C_j H_j W_j), phi_j a layer of the loss
             network. "Feature reconstruction": alike for a network that sees, not pixel for pixel
    pairs    (T(x), x) of training images; T with exactly the K, eps (here tau) and T of the defence. They are
             the cost of training and are kept in a file; every few epochs the chains are drawn anew
    stop     phase 2 keeps the weights of the lowest validation loss and ends `patience` epochs after it
    G(x) = x + body(x), body an SNGAN generator without up-sampling whose last layer starts at zero: the
             identity. In eval mode wherever it defends: else BatchNorm mixes the chains of a batch

    Attacks (Alg. 1, 3: N updates, gradients averaged over H_adv chains, Eq. 2.10; what looks broken is judged
    again by H_def fresh chains), on the same images for every defence; the lowest number is the result:
    BPDA+EOT around G, T: the source's. Both count as identity, the gradient is taken at G's output
    BPDA+EOT through G: G is differentiable, so an attacker differentiates it; identity for T alone
    the same, back through the last steps of the chain too; and PGD images of f, and of f behind G, no chains

Commands (measured times and numbers stand in README.md and results/):
    python fixer.py                              rendered digits, nothing to download
    python fixer.py --only upperbound            how much of the natural accuracy comes back
    python fixer.py --only honesty stronger      an unseen classifier behind G; more steps, restarts
    python fixer.py --dataset cifar10            one GPU; --list: all experiments

The energy is the checkpoint of lifecycle_midrun.py in the same --out; where there is none, that script is run
first, as a command. --fresh leaves it alone. The log: a phase's loss, train in train mode while G changes,
val after the epoch in eval mode on pairs of images that G (not f, not the energy) never saw.

Differs from the source:
  - It names no width, optimiser, rate, layer or number of pairs: four SNGAN residual blocks (six from 64
    pixels on) of 64 channels, Adam 1e-4, relu2_2. Losses are means over pixels, which scales Eq. 5.3.
  - Its text speaks both of warming G up as the identity and of Eq. 5.3 on purified images: the equation.
    G as a sum is the identity before training.
  - The loss network is VGG-16 where torchvision's weights are at hand (vgg16-397923af.pth in --data-dir),
    else the natural classifier's own layer. Which one is printed and recorded. `honesty` asks what that does.
  - Attacks beyond the source's (above). Natural images are judged first, wrong ones count as broken.
  - Only ImageNet is published. Glyphs and MNIST are not in it: there tau is four times that of the energy's
    training, as its own costs no accuracy (lifecycle_midrun.py, figure 3.3), and so leaves nothing to fix.
    For glyphs eps is twice that of the other scripts, for attacks to break something.
"""
import copy
import dataclasses
import functools
import math
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import common
from common import Diverged, Experiment, Images, Run, UserError, fast_precision, load_images, rate

# --- settings -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Settings:
    """Everything that can be set; each field is also a flag (--eps 8/255). Defaults: CIFAR-10, full size."""
    energy: str = ""             # checkpoint of lifecycle_midrun.py; that of the same --out, made if need be
    f_net: str = "wrn28"         # natural classifier f: small_cnn, wrn16, wrn28 (f_width: widening), resnet18
    f_width: float = 10.0
    f_iters: int = 50_000        # its updates, batch 100
    f_sgd: float = 0.1           # rate of SGD; a tenth of it from 40 % on, a hundredth from 60 %; 0: Adam
    augment: str = "crop_flip"   # of the classifiers' images: none, crop, crop_flip
    other_net: str = "resnet18"  # `honesty`: a classifier that G never saw
    other_width: float = 1.0
    width: float = 1.0           # of G; 1: 64 channels
    pairs: int = 45_000          # training images that G learns from
    held: int = 5000             # more of them, for the validation loss
    refresh: int = 20            # epochs until chains are drawn anew
    mse_epochs: int = 40         # sec. 5.2.1
    perceptual_epochs: int = 100  # sec. 5.2.1, at most
    patience: int = 10           # epochs without a lower validation loss
    lr: float = 1e-4             # of Adam
    batch: int = 64
    loss_net: str = "auto"       # vgg16; f; auto: vgg16 where its weights are at hand
    layer: int = 8               # of VGG-16; 8: relu2_2
    f_layer: str = "body.8"      # of f
    tau: float = 0.005           # standard deviation of a step's noise; .01 in [-1, 1]; T is the energy's
    k: int = 2000                # K, of the defence and of the pairs
    k_other: int = 400           # `ablation`: of the pairs of another G
    h_def: int = 128             # chains of a verdict
    h_adv: int = 48              # chains of an attack's gradient
    n: int = 50                  # N: updates of the attacked image
    eps: float = 8 / 255         # of the attack, l_inf
    step: float = 2 / 255
    restarts: int = 1
    last: int = 10               # steps of the chain that the strongest attack goes back through
    beta: float = 20.0           # sharpness of its stand-in for ReLU
    n_last: int = 50             # N of that attack
    images: int = 1000           # test images that are attacked
    few: int = 200               # the same in stronger, ablation and honesty
    natural: int = 5000          # test images whose natural accuracy is taken
    chunk: int = 1600            # chains that run as one batch
    graph: int = 1               # CUDA: replay a captured step; 0: launch every kernel

    def __post_init__(self):
        common.at_least(1, self, *"pairs held refresh mse_epochs perceptual_epochs patience k k_other h_def "
                        "h_adv n restarts images few natural chunk last".split())
        common.at_least(2, self, "batch")
        if not 0 < self.tau < math.inf or self.last > self.k or self.batch > self.pairs:
            raise UserError("--tau must be above 0 and finite, --last at most --k, --batch at most --pairs")
        if self.loss_net not in ("auto", "vgg16", "f"):
            raise UserError("--loss-net is vgg16, f or auto")
        if (self.other_net, self.other_width) == (self.f_net, self.f_width):
            raise UserError("--other-net must not be --f-net again: `honesty` wants another architecture")
        self.few = min(self.few, self.images)


new, PAPER = dataclasses.replace, Settings()
GREY = new(  # 28 pixels, not in the source; f is that of stochastic_security.py and lifecycle_midrun.py
    PAPER, f_net="small_cnn", f_width=1.0, f_iters=300, f_sgd=0.0, augment="none", other_width=0.25,
    width=0.25, pairs=1000, held=300, refresh=10, mse_epochs=20, perceptual_epochs=60, patience=5, lr=1e-3,
    batch=50, f_layer="body.8", tau=0.06, k=50, k_other=10, h_def=24, h_adv=6, n=20, eps=0.16, step=0.04,
    last=5, n_last=6, images=100, few=50, natural=500, chunk=250)
MNIST = new(GREY, f_iters=600, eps=0.2, step=0.05)
CIFAR = new(PAPER, f_net="wrn16", f_width=4.0, f_iters=6000, f_layer="body.4", other_width=0.5, pairs=10_000,
            held=1000, mse_epochs=20, perceptual_epochs=40, patience=6, lr=3e-4, k=200, k_other=40, h_def=25,
            h_adv=8, n=20, last=5, n_last=10, images=100, few=50, natural=1000)
IMAGENET = new(PAPER, f_net="efficientnet_b7", f_iters=0, other_net="pretrained50", pairs=10_000, held=1000,
               batch=16, tau=0.01, k=200, k_other=40, h_def=64, h_adv=24, eps=2 / 255, step=1 / 255, last=2,
               images=10_000, natural=10_000, chunk=64)


def each_budget(quick, paper):
    """The three budgets of a data set."""
    tiny = dict(f_iters=min(quick.f_iters, 3), f_width=min(quick.f_width, 1), width=0.05, other_width=0.1,
                pairs=8, held=4, refresh=1, mse_epochs=2, perceptual_epochs=2, patience=1, batch=4, k=3,
                k_other=2, h_def=3, h_adv=2, n=2, n_last=1, last=2, images=8, few=4, natural=8)
    return {"smoke": new(quick, **tiny), "quick": quick, "paper": paper}


def at_full_size(s):
    """The budget "paper" of sets that are not in the source: its epochs, Alg. 3 at its size."""
    return new(s, f_iters=3000, width=1.0, pairs=9000, held=900, mse_epochs=40, perceptual_epochs=100,
               patience=10, lr=1e-4, h_def=128, h_adv=48, n=50, n_last=50, images=1000, few=125, natural=1000)


SETTINGS = {"glyphs": each_budget(GREY, at_full_size(GREY)), "mnist": each_budget(MNIST, at_full_size(MNIST)),
            "cifar10": each_budget(CIFAR, PAPER), "imagenet": each_budget(new(
                IMAGENET, pairs=500, held=50, mse_epochs=5, perceptual_epochs=10, n=10, n_last=5, images=64,
                few=16, natural=64), IMAGENET)}
NOT_OF_THE_ATTACK = (  # what else an attack depends on, its file knows as fingerprints
    "energy other_net other_width width pairs held refresh mse_epochs perceptual_epochs patience lr batch "
    "loss_net layer f_layer k k_other last n_last few natural chunk graph").split()

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


def midrun_energy(args, shape):
    """The finished energy of lifecycle_midrun.py -> V, frozen, and what is known of it (T, net, ...).

    Where there is none that script is run, as a command, and makes it.
    """
    s, ours = args.settings, args.out / f"lifecycle_midrun-{args.dataset}" / "energy.pt"
    file = Path(s.energy) if s.energy else ours

    def finished():
        if not file.exists():
            return None
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            made = state["made_with"]
            about = {k: made[k] for k in "net width updates budget temperature tau_train data".split()}
            side = tuple(made["data"][1:])
            V = common.make_net(made["net"], 1, side, made["width"]).requires_grad_(False)
            V.load_state_dict(state["V"])
        except Exception as error:
            raise UserError(f"{file}: not a checkpoint of lifecycle_midrun.py's energy "
                            f"({type(error).__name__})") from None
        if side != tuple(shape):
            raise UserError(f"{file}: an energy of images {side}; {args.dataset} has {tuple(shape)}")
        if state["it"] < made["updates"] or made["budget"] == "smoke" != args.budget:
            return None
        print(f"energy: {file}, {about['net']}, {about['updates']} updates", flush=True)
        return V.to(args.device), about
    if found := finished():
        return found
    if s.energy:
        raise UserError(f"--energy {file}: no such file, or its training is not finished")
    command = ["lifecycle_midrun.py", "--only", "figure3.2"]
    for flag in ("dataset", "budget", "out", "data_dir", "seed", "device"):
        command += [f"--{flag.replace('_', '-')}", str(getattr(args, flag))]
    print(f"no finished mid-run energy in {file}; running python {' '.join(command)}", flush=True)
    script = Path(__file__).with_name(command[0])
    code = subprocess.run([sys.executable, str(script), *command[1:]]).returncode
    if code or not (found := finished()):
        raise UserError(f"python {' '.join(command)} ended with exit code {code} and no energy (see above)")
    return found


# --- the Fixer: pairs, losses, two phases -------------------------------------------------------------------


def fingerprint(*nets):
    """Eight digits that tell networks apart: of a checkpoint made with others of the same settings."""
    return f"{sum(v.double().abs().sum().item() for net in nets for v in net.state_dict().values()):.8g}"


@common.own_randomness
def purified(lab, name, index, K, draw=0):
    """T(x) of lab.pictures[index] -> float16 [n, C, S, S], not clamped; kept in NAME.pt.

    `draw` counts the times that chains were drawn: the file keeps the last one. A file made with another K,
    tau, T, energy or number of images is refused. Can be interrupted.
    """
    s, file, start = lab.s, lab.run.folder / f"{name}.pt", time.time()
    made_with = lab.made_with | {"K": K, "tau": s.tau, "n": len(index), "pairs": s.pairs}
    state = common.load_checkpoint(file, made_with)
    if state is None or state["draw"] != draw:
        torch.manual_seed(lab.args.seed + 1000 * draw + len(index))
        state = {"z": torch.zeros(len(index), *lab.shape, dtype=torch.float16), "done": 0}
    z, done = state["z"], state["done"]
    before, said = done, start
    while done < len(z):
        part = lab.sampler(lab.images(index[done:done + s.chunk]), K)[0]
        if not part.isfinite().all():
            raise Diverged("chains ran away: T(x) is not finite; try a lower --tau")
        z[done:done + len(part)] = part.half().cpu()
        done += len(part)
        if done == len(z) or time.time() - said > 60:
            said = time.time()
            common.save_checkpoint(file, made_with, z=z, done=done, draw=draw)
            left = (said - start) / (done - before) * (len(z) - done)
            print(f"  {name}, draw {draw}: {done} of {len(z)} chains of {K} steps, {said - start:.0f} s, "
                  f"{left:.0f} s left", flush=True)
    return z


def perceptual_loss(phi, x, target):
    """Eq. 5.4: |phi(x) - phi(target)|^2 / (C_j H_j W_j), mean over the batch [B, C, S, S] -> 0-d."""
    return F.mse_loss(phi(x).float(), phi(target).float())


def stopped(losses, patience):
    """Early stopping: whether the lowest of the validation losses so far is `patience` epochs old."""
    return len(losses) - 1 - losses.index(min(losses)) >= patience


@torch.no_grad()
def mean_loss(lab, loss, G, z, index):
    """Mean loss of G (None: the identity) on pairs: z [n, C, S, S] and lab.pictures[index]."""
    total = 0.0
    for part, i in zip(z.split(lab.s.batch), index.split(lab.s.batch)):
        part = part.to(lab.run.device).float()
        with fast_precision(lab.run.device):
            total += loss(G(part) if G else part, lab.images(i)).item() * len(i)
    return total / len(index)


@common.own_randomness
def train_phase(lab, name, kind, epochs, start=None, early=True, K=None):
    """Learn G from pairs made with K steps -> G, frozen, in eval mode; losses float32 [epochs + 1, 2].

    kind: mse or perceptual. start: the G of the phase before, else the identity. early: the weights of the
    lowest validation loss, and an end `patience` epochs after it; else the last ones. Losses: training (from
    epoch 1 on) and validation (from 0 on: of `start`); nan where there was no epoch.
    """
    run, s, loss, files = lab.run, lab.s, lab.losses[kind], "pairs-other" if K else "pairs"
    K = K or s.k
    G = common.make_net("fixer", 1, lab.shape, s.width).to(run.device)
    if start:
        G.load_state_dict(start.state_dict())
    best, curve = copy.deepcopy(G).requires_grad_(False).eval(), torch.full((epochs + 1, 2), math.nan)
    optimizer = torch.optim.Adam(G.parameters(), s.lr)
    made_with = {k: getattr(s, k) for k in ("width", "pairs", "held", "refresh", "lr", "batch")}
    made_with |= lab.made_with | {"K": K, "tau": s.tau, "epochs": epochs, "start": fingerprint(G),
                                  "patience": s.patience if early else "none", "loss": kind}
    if kind == "perceptual":
        made_with["loss"] = f"{lab.loss_network}, {fingerprint(lab.phi if lab.vgg else lab.f)}"
    (learned, held), first, draw = lab.split, s.mse_epochs if start else 0, None
    for epoch, row in common.updates(run, name, epochs, made_with, {
            "G": G, "best": best, "optimizer": optimizer, "curve": curve}, ("train", "val"), 1, 1,
            unit="epoch"):
        if draw != (first + epoch - 1) // s.refresh:
            draw = (first + epoch - 1) // s.refresh
            z, z_held = purified(lab, files, learned, K, draw), purified(lab, f"{files}-held", held, K)
        if epoch == 1:
            curve[0, 1] = mean_loss(lab, loss, G.eval(), z_held, held)
        G.train()
        seen = []
        for i in common.shuffled(len(z), lab.args.seed + epoch).split(s.batch)[:len(z) // s.batch]:
            x = lab.images(learned[i])
            with fast_precision(run.device):
                value = loss(G(z[i].to(run.device).float()), x)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            seen.append(value.detach())
        G.eval()
        curve[epoch] = torch.tensor([torch.stack(seen).mean().item(), mean_loss(lab, loss, G, z_held, held)])
        row["train"], row["val"] = curve[epoch].tolist()
        losses = curve[:epoch + 1, 1].tolist()
        if not early or losses[-1] == min(losses):
            best.load_state_dict(G.state_dict())
        row["stop"] = early and stopped(losses, s.patience)
    return best.eval(), curve


@torch.no_grad()
def outputs(net, x):
    """A network's outputs for images [n, C, S, S], float32, in batches of 250."""
    with fast_precision(x.device):
        return torch.cat([net(part).float() for part in x.split(250)])


class Fixed:
    """A sampler's chains and then G: T becomes G o T, and BPDA takes the identity for both."""

    def __init__(self, sampler, G):
        self.sampler, self.G = sampler, G.eval()

    def __call__(self, x, steps):
        """G of the states after `steps` steps from x [B, C, S, S], and what the sampler says of them."""
        states, norm = self.sampler(x, steps)
        return outputs(self.G, states), norm


def behind(G, f):
    """f o G in eval mode, the container too: an attack puts back the mode that it finds."""
    return nn.Sequential(G, f).eval()


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


class Lab:
    """What the experiments share: data, energy, classifiers, the Fixer and its pairs."""

    def __init__(self, args):
        self.args, self.s, s, name = args, args.settings, args.settings, args.dataset
        side = 224 if name == "imagenet" else None
        self.data, self.test = (load_images(name, split, args.data_dir, side=side).to(args.device)
                                for split in ("train", "test"))
        self.shape = self.data.shape
        need = max(s.images, s.natural)
        if need > len(self.test) or s.pairs + s.held > len(self.data):
            raise UserError(f"--images, --natural, --pairs, --held: {name} has {len(self.test)} images for "
                            f"test, {len(self.data)} for training")
        memory = isinstance(self.data, Images)
        for net, width in ((s.other_net, s.other_width), (s.f_net, s.f_width)):  # errors come before any work
            f = common.make_net(net, 10 if memory else 1000, self.shape, width).eval()
        common.make_net("fixer", 1, self.shape, s.width)
        self.vgg = None if s.loss_net == "f" else common.weights_at_hand(common.VGGMaps.FILE, args.data_dir)
        if not self.vgg and (s.loss_net == "vgg16" or not memory):
            raise UserError(f"the loss network wants {common.VGGMaps.FILE} (from torchvision) in --data-dir"
                            + ("" if memory else ", and not --loss-net f"))
        if self.vgg:
            self.phi = common.VGGMaps(self.vgg, s.layer, self.shape).to(args.device)
        else:
            common.feature_maps(f, s.f_layer)
        if not memory and args.budget != "smoke" and (
                s.f_iters or int(common.folder_labels(self.test).max()) != 999):
            raise UserError(f"{name}: f is a pretrained network of 1000 classes: --f-iters 0, and test "
                            "images in 1000 folders, one a class")
        self.classes = int(self.data.y.max()) + 1 if memory else 1000
        self.split = torch.arange(s.pairs + s.held).split([s.pairs, s.held])    # of self.pictures
        self.V, about = midrun_energy(args, self.shape)
        self.sampler = Sampler(self.V, s.tau, about["temperature"], graph=s.graph)
        self.made_with = {"seed": args.seed, "budget": args.budget, "data": [len(self.data), *self.shape],
                          "energy": fingerprint(self.V), "temperature": about["temperature"]}
        self.run = Run("fixer", args, energy=about)
        self.loss_network = f"VGG-16, layer {s.layer}" if self.vgg else f"{s.f_net} (f), layer {s.f_layer}"
        print(f"loss network of phase 2: {self.loss_network}", flush=True)

    @functools.cached_property
    def pictures(self):
        """Training images of the pairs, then the held-out ones, in memory: --pairs + --held."""
        data, i = self.data, common.shuffled(len(self.data), 321)[:self.s.pairs + self.s.held]
        if isinstance(data, Images):
            return Images(data.x[i.to(data.x.device)], None, data.name)
        return common.in_memory(common.Pictures([data.source[j] for j in i], data.side, data.name))

    def images(self, index):
        """self.pictures as float32 [B, C, S, S] on the device."""
        return self.pictures.take(index.to(self.pictures.x.device)).to(self.args.device)

    @functools.cached_property
    def pool(self):
        """Test images float32 [n, C, S, S] and labels [n], a fixed random choice."""
        i = common.shuffled(len(self.test), 123)[:max(self.s.images, self.s.natural)].to(self.args.device)
        y = self.test.y if isinstance(self.test, Images) else common.folder_labels(self.test)
        return self.test.take(i).to(self.args.device), y.to(self.args.device)[i].long()

    x = property(lambda lab: lab.pool[0][:lab.s.images])                        # what is attacked
    y = property(lambda lab: lab.pool[1][:lab.s.images])
    natural = property(lambda lab: [part[:lab.s.natural] for part in lab.pool])

    def right(self, prediction, index):
        """bool [B]: predicted classes [B] of the attacked images `index`."""
        return prediction == self.y[index]

    @common.own_randomness
    def solver(self, name, net, width):
        """A natural classifier of the data set, frozen."""
        sgd = self.s.f_sgd if net == self.s.f_net else 0.0                      # else Adam
        return common.train_classifier(self.run, self.data, self.classes, net, width, self.s.f_iters, name,
                                       sgd, 100, self.s.augment).requires_grad_(False)

    f = functools.cached_property(lambda lab: lab.solver("f", lab.s.f_net, lab.s.f_width))
    other = functools.cached_property(lambda lab: lab.solver("other", lab.s.other_net, lab.s.other_width))

    @functools.cached_property
    def phi(self):
        """The loss network where VGG-16 is not at hand: a layer of f."""
        return common.feature_maps(self.f, self.s.f_layer)

    @functools.cached_property
    def losses(self):
        """{kind: loss(images, targets)} of the two phases."""
        return {"mse": F.mse_loss, "perceptual": functools.partial(perceptual_loss, self.phi)}

    @functools.cached_property
    def phases(self):
        """Both phases of training: (G, losses) twice. The second G is the Fixer."""
        mse = train_phase(self, "mse", "mse", self.s.mse_epochs, early=False)
        return mse, train_phase(self, "fixer", "perceptual", self.s.perceptual_epochs, mse[0])

    fixer = property(lambda lab: lab.phases[1][0])

    @functools.cached_property
    def smooth(self):
        """Stand-in for V whose second derivative is not zero."""
        return common.smoothed(self.V, self.s.beta)

    def defence(self, f, G=None, around=False):
        """f behind G behind T. around: G counts as part of T, whose gradient is the identity."""
        if around:
            return Defence(f, self.s.k, Fixed(self.sampler, G), chunk=self.s.chunk)
        return Defence(behind(G, f) if G else f, self.s.k, self.sampler, self.smooth, self.s.chunk)

    def attack(self, name, defence, last=0, **changes):
        """Algorithm 1; its file also knows the weights of the networks it attacked."""
        nets = [defence.f] + ([defence.sampler.G] if isinstance(defence.sampler, Fixed) else [])
        lab = copy.copy(self)
        lab.made_with = self.made_with | {"networks": fingerprint(*nets)}
        return algorithm_1(lab, name, defence, last, **changes)

    @common.own_randomness
    def transferred(self, f):
        """PGD images of f itself, no chains."""
        return attack_f(f, self.x, self.y, self.s.n, self.s.step, self.s.eps)


@common.own_randomness
def same_chains(lab, x, H, networks):
    """Logits of networks {title: net} for the very same chains T(x) -> {title: [H, n, classes]}."""
    defence, found = lab.defence(lab.f), {title: [] for title in networks}
    for part in x.split(max(lab.s.chunk // H, 1)):
        z = defence.purify(part, H, lab.s.k)
        for title, net in networks.items():
            found[title].append(outputs(net, z.flatten(0, 1)).unflatten(0, z.shape[:2]))
    return {title: torch.cat(parts, 1) for title, parts in found.items()}


# --- experiments --------------------------------------------------------------------------------------------


def table_5_1(lab):
    """Natural and robust accuracy of the mid-run defence, and of the same with the Fixer."""
    s, f, fG, G = lab.s, lab.f, behind(lab.fixer, lab.f), lab.fixer
    rows = {"loss network": lab.loss_network, "n": len(lab.x), "eps": s.eps, "K": s.k}
    rows |= {"tau in [-1, 1]": 2 * s.tau, "attack: N": s.n, "attack: H_adv": s.h_adv}
    for title, file, net in (("f", "f", f), ("G alone, no chains", "fG", fG)):
        record = lab.attack(f"pgd-{file}", Defence(net, chunk=s.chunk))[0]
        rows |= rate(f"natural acc, {title}", record[0]) | rate(f"robust acc, {title} (PGD)", record[-1])
    plain, fixed = lab.defence(f), lab.defence(f, G)
    direct = {("mid-run", plain): {"BPDA+EOT": lab.attack("midrun", plain)[0]},
              ("+ Fixer", fixed): {"BPDA+EOT through G": lab.attack("through-G", fixed)[0],
                                   "BPDA+EOT around G, T": lab.attack("around", lab.defence(f, G, True))[0]}}
    images = {"f": lab.transferred(f), "G alone": lab.transferred(fG)}
    for (title, defence), records in direct.items():
        natural = next(iter(records.values()))[0]
        found = {attack: record[-1] for attack, record in records.items()}
        last = lab.attack(f"last-{title.strip('+ ')}", defence, s.last, n=s.n_last)[0]
        found[f"through the last {s.last}, {s.n_last} steps"] = last[-1]
        found |= {f"PGD images of {net}": lab.right(defence.predict(x, s.h_def), slice(None))
                  for net, x in images.items()}
        found["worst of these"] = torch.stack([natural, *found.values()]).all(0)
        rows |= rate(f"natural acc, {title}", natural)
        for attack, right in found.items():
            rows |= rate(f"robust acc, {title} ({attack})", right & natural)
    return rows


def figure_5_2(lab):
    """Losses of both phases over those of purified images; the epoch whose weights are kept is marked."""
    rows, panels, held = {"loss network": lab.loss_network}, {}, lab.split[1]
    z = purified(lab, "pairs-held", held, lab.s.k)
    for kind, (_, curve) in zip(("mse", "perceptual"), lab.phases):
        before = mean_loss(lab, lab.losses[kind], None, z, held)
        run = int(curve[1:, 1].isfinite().sum())
        kept = run if kind == "mse" else int(curve[:run + 1, 1].argmin())
        rows |= {f"{kind}: loss of purified images": before, f"{kind}: epochs run": run,
                 f"{kind}: epoch kept": kept, f"{kind}: validation loss there": curve[kept, 1].item(),
                 f"{kind}: validation loss there / before": curve[kept, 1].item() / before}
        panels[f"epoch of phase {len(panels) + 1} ({kind})"] = {
            title: {e: value / before for e, value in enumerate(column.tolist()) if math.isfinite(value)}
            for title, column in zip(("training", "validation"), curve.T)}
    figure = common.curves(panels, "loss / loss of purified images", ylim=(0, None))
    figure.axes[1].axvline(kept, color="gray", ls="--", label=f"epoch {kept}: kept")
    figure.axes[1].legend(fontsize=8)
    lab.run.save(figure, "figure5.2")
    return rows


def figure_5_3(lab):
    """Attacked images, one chain of each, and what the Fixer makes of it; also their distance to nature."""
    defence = lab.defence(lab.f, lab.fixer)
    stages = {"attacked": lab.attack("through-G", defence)[1]}
    stages["purified"] = defence.purify(stages["attacked"], 1, lab.s.k)[0]
    stages["fixed"] = outputs(lab.fixer, stages["purified"])
    rows, pictures, few = {"n": len(lab.x)}, {"natural": lab.x[:8]}, slice(0, 8)
    for title, x in stages.items():
        found = outputs(lab.f, x).argmax(1)
        pictures[f"{title}: f reads {', '.join(map(str, found[few].tolist()))}"] = x[few].clamp(0, 1)
        rows[f"root mean square of {title} - natural"] = (x - lab.x).pow(2).mean().sqrt().item()
        rows |= rate(f"acc of f, {title}", lab.right(found, slice(None)))
    pictures |= {f"3 |{title} - natural|": (3 * (x - lab.x)[few].abs()).clamp(0, 1)
                 for title, x in stages.items() if title != "attacked"}
    lab.run.save(common.picture_rows(pictures, 8), "figure5.3")
    return rows


def stronger(lab):
    """Attacks that nothing here was tuned against: more steps, smaller steps, restarts; on `few` images."""
    s, f, G, worst = lab.s, lab.f, lab.fixer, {}
    ways = {"as in table 5.1": {}, f"{4 * s.n} steps": {"n": 4 * s.n}, "3 restarts": {"restarts": 3},
            f"{2 * s.n} steps of a quarter": {"n": 2 * s.n, "step": s.step / 4}}
    rows = {"n": s.few}
    for title, file, defence in (("mid-run", "T", lab.defence(f)),
                                 ("+ Fixer, through G", "G", lab.defence(f, G)),
                                 ("+ Fixer, around G, T", "around", lab.defence(f, G, around=True))):
        for i, (way, changes) in enumerate(ways.items()):
            right = lab.attack(f"stronger-{file}{i}", defence, images=s.few, **changes)[0][-1]
            rows |= rate(f"robust acc, {title} ({way})", right)
            of = title.split(",")[0]
            worst[of] = worst.get(of, right) & right
    for of, right in worst.items():
        rows |= rate(f"robust acc, {of} (worst of these)", right)
    return rows


def upperbound(lab):
    """Natural accuracy of f on images, on purified and on fixed ones: how much of the gap is closed."""
    (x, y), H = lab.natural, min(lab.s.h_def, 24)
    found = same_chains(lab, x, H, {"f(T(x))": lab.f, "f(G(T(x)))": behind(lab.fixer, lab.f)})
    clean = outputs(lab.f, x).argmax(1) == y
    rows = {"n": len(x)} | rate("natural acc, f(x)", clean)
    for chains, of in ((1, "one chain"), (H, f"mean of {H}")):
        right = {title: logits[:chains].mean(0).argmax(1) == y for title, logits in found.items()}
        for title, verdict in right.items():
            rows |= rate(f"natural acc, {title}, {of}", verdict)
        before, after = right.values()
        rows[f"repaired, {of}"] = int((after & ~before).sum())
        rows[f"spoiled, {of}"] = int((before & ~after).sum())
        if (gap := int(clean.sum() - before.sum())) > 0:
            rows[f"share of the gap closed, {of}"] = int(after.sum() - before.sum()) / gap
    return rows


def compared(lab, fixers, solvers):
    """For each classifier {title: f} behind each Fixer {title: G or None}: natural accuracy of the same
    chains, and robust accuracy under BPDA+EOT with the true gradient of G."""
    s, (x, y) = lab.s, lab.natural
    H = min(s.h_def, 8)
    pairs = {(a, b): (f, G) for a, f in solvers.items() for b, G in fixers.items()}
    found = same_chains(lab, x, H, {key: behind(G, f) if G else f for key, (f, G) in pairs.items()})
    rows = {"n, natural": len(x), "n, robust": s.few}
    for a, f in solvers.items():
        rows |= rate(f"{a}: natural acc, no defence", outputs(f, x).argmax(1) == y)
    for (a, b), (f, G) in pairs.items():
        rows |= rate(f"{a}, {b}: natural acc, one chain", found[a, b][0].argmax(1) == y)
        rows |= rate(f"{a}, {b}: natural acc, mean of {H}", found[a, b].mean(0).argmax(1) == y)
        record = lab.attack(f"{a}-{b}".replace(" ", "-"), lab.defence(f, G), images=s.few)[0]
        rows |= rate(f"{a}, {b}: robust acc (BPDA+EOT)", record[-1])
    return rows


def ablation(lab):
    """G of one loss alone, for at most as many epochs as both have together, and G of pairs of another K."""
    s, (mse, both) = lab.s, lab.phases
    epochs = s.mse_epochs + s.perceptual_epochs
    first = train_phase(lab, "mse-other", "mse", s.mse_epochs, early=False, K=s.k_other)[0]
    fixers = {"no Fixer": None, "first phase": mse[0],
              "MSE only": train_phase(lab, "mse-only", "mse", epochs)[0],
              "perceptual only": train_phase(lab, "perceptual-only", "perceptual", epochs)[0],
              "Fixer": both[0],
              f"of K = {s.k_other}": train_phase(lab, "fixer-other", "perceptual", s.perceptual_epochs,
                                                       first, K=s.k_other)[0]}
    rows, held = compared(lab, fixers, {"f": lab.f}), lab.split[1]
    z = purified(lab, "pairs-held", held, s.k)
    for kind, loss in lab.losses.items():
        before = mean_loss(lab, loss, None, z, held)
        rows |= {f"{kind} loss / purified, {title}": mean_loss(lab, loss, G, z, held) / before
                 for title, G in fixers.items() if G}
    chain = lab.defence(lab.f).purify(lab.x[:8], 1, s.k)[0]
    pictures = {title: (outputs(G, chain) if G else chain).clamp(0, 1) for title, G in fixers.items()}
    lab.run.save(common.picture_rows({"natural": lab.x[:8]} | pictures, 8), "ablation")
    return rows


def honesty(lab):
    """Does G remove noise, or has it learned the classifier? A classifier of another architecture, that G
    never saw, behind the same G; G of pixels alone; Gaussian noise of the size of T(x) - x in place of T."""
    s, (mse, both), (x, y) = lab.s, lab.phases, lab.natural
    solvers = {"f": lab.f, f"unseen {s.other_net}": lab.other}
    rows = compared(lab, {"no Fixer": None, "first phase": mse[0], "Fixer": both[0]}, solvers)
    size = (lab.defence(lab.f).purify(x, 1, s.k)[0] - x).pow(2).mean().sqrt().item()
    rows["root mean square of T(x) - x"] = size

    def noise(x, steps):
        """As a sampler: Gaussian noise. Its derivative is the identity, so BPDA is the exact gradient."""
        return x + size * torch.randn_like(x), None
    for title, f in solvers.items():
        for of, net in (("no Fixer", f), ("Fixer", behind(both[0], f))):
            defence, found = Defence(net, s.k, noise, chunk=s.chunk), outputs(net, noise(x, s.k)[0])
            record = lab.attack(f"noise-{title}-{of}".replace(" ", "-"), defence, images=s.few)[0]
            rows |= rate(f"{title}, {of}: natural acc, noise for T", found.argmax(1) == y)
            rows |= rate(f"{title}, {of}: robust acc, noise for T (EOT)", record[-1])
    return rows


PUBLISHED_5_1 = {"imagenet": {
    "natural acc, mid-run": .684, "robust acc, mid-run (BPDA+EOT)": .418,
    "natural acc, + Fixer": .742, "robust acc, + Fixer (BPDA+EOT around G, T)": .498}}
EXPERIMENTS = {  # the figures of the source print no numbers
    "table5.1": Experiment(table_5_1, "the defence with and without the Fixer", "5 min", True, PUBLISHED_5_1),
    "figure5.2": Experiment(figure_5_2, "losses of both phases", "1 s after table5.1", True),
    "figure5.3": Experiment(figure_5_3, "attacked, purified, fixed", "1 s after table5.1", True),
    "stronger": Experiment(stronger, "more steps, smaller ones, restarts", "12 min"),
    "upperbound": Experiment(upperbound, "natural accuracy of f(x), f(T(x)), f(G(T(x)))", "45 s"),
    "ablation": Experiment(ablation, "each loss alone; pairs of another K", "5.5 min"),
    "honesty": Experiment(honesty, "an unseen classifier behind the same Fixer", "3.5 min"),
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
