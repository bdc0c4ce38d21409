r"""The Fixer: a network behind purification that repairs what Langevin chains leave wrong.

Source: Mitchell 2022, "Adversarial Attacks and Defense using Energy-Based Image Models", chapter 5.

An attack changes an image so little that nobody sees it, and yet an ordinarily ("naturally") trained
classifier f misreads it. Purification shows f only the end of a random walk from the image. An energy U is
a network that gives an image one number, low for images like the training data. A chain takes many small
noisy steps down that energy (Langevin dynamics), and loses the attack on the way. But it also frays strokes
and leaves the noise of its last steps, so that f misreads images that nobody attacked. Here an image-to-image
network G learns to lead purified natural (unattacked) images back to where they came from, and stands in
between: f(G(P(x))). Energy and classifier stay as they are, and G never sees an attacked image in training.

    U(x) = V(x) / T: energy, LOW = in-distribution; V is what the network returns, T the temperature.
    P(x): image x after K steps of a chain (source: T(x))
    Pixels are in [0, 1]; networks scale inside. Neither chains nor G's output are ever clamped.
    (2.3)  A step of a chain: x <- x - tau^2/2 grad_x U(x) + tau z,  z ~ N(0, I)
    (5.1)  F(x) = E[f(G(P(x)))].  (5.2) F_H: mean logits of H chains
    (5.3)  Phase 1: mean of |G(P(x)) - x|^2
    (5.4)  Phase 2, perceptual: mean over outputs of |phi(G(P(x))) - phi(x)|^2, phi: a loss network's first
           layers. Two images count as alike where that network sees the same in them.
Pairs (P(x), x) come from exactly the defence's chains, drawn anew every few epochs. Phase 2 keeps the
weights of the lowest validation loss, on pairs that G never saw.
Attacks: PGD (projected gradient descent: steps up the loss, back into a ball around the image) on the mean
logits of many chains (EOT, expectation over transformation). BPDA (backward pass differentiable
approximation) takes the identity for P's derivative, and derives G ("through G") or not ("around G, P", the
source's way). "Whole chain" (not in the source) derives G and all K steps, because chains forget their image:
the mean of P(x) moves less than x does. A step's derivative is taken as a difference between two starts, as
far apart as its noise is long. What these break is judged again by fresh chains. PGD images made for f(x) and
f(G(x)) are tried too. "Worst": what survives all of these, and was rightly read before.
Commands (all numbers: results/fixer.md):
    python fixer.py                     40 min of one core: accuracy under the worst attack .57, with G .97
    python fixer.py --only upperbound   seconds more: natural accuracy .78 of one chain, .99 with the Fixer
    python fixer.py --only honesty      90 min of a slow core: G in front of a classifier that it never saw
    python fixer.py --dataset cifar10   58 min on a CPU (four of ten classes): worst .50, with the Fixer .45
    python fixer.py --dataset imagenet --chunk 64   a GPU and folders of images; --budget paper: sec. 5.2
The energy ("mid-run": learned from chains of some hundred steps) is lifecycle_midrun.py's, which runs first
where --out holds none; "mid-run" in tables: no G. Log: mean loss in an epoch; after it, on held-out pairs.
Differs: the source names no width, optimiser, rate or layer; ours: Adam, VGG-16's relu2_2 or, without its
weights (vgg16-397923af.pth in --data-dir or torch's cache), a layer of f. The source has ImageNet only. On
glyphs and MNIST tau is four times that of the energy's training, so that chains do damage to repair.
"""
import copy
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import common  # before torch, so that Ctrl-C ends even its import quietly
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from common import Training, UserError, by_parts, fast_precision, frozen_copy, input_gradient
from common import once, rate, repeat, seeded, value

# --- settings -----------------------------------------------------------------------------------------------

SETTINGS = common.settings(  # a row: a value for each column, then its help
    columns=("glyphs", "mnist", "cifar10", "imagenet", "cifar10-paper", "imagenet-paper",
             "cifar10-cpu"),
    smoke=dict(f_iters=3, f_width=1, width=0.05, pairs=8, held=4, refresh=1, mse_epochs=2,
               perceptual_epochs=2, patience=1, batch=4, k=3, h_def=3, h_adv=2, n=2,
               images=8, few=4, natural=8),
    first_class=(0, 0, 0, 0, 0, 0, 6, "CIFAR-10 on a CPU: this class and those after it, four of ten"),
    # the natural classifier f, that of stochastic_security.py; it is pretrained for ImageNet
    f_net=("small_cnn", "small_cnn", "wrn16", "efficientnet_b7", "wrn28", "efficientnet_b7", "small_cnn",
           "network (common.make_net)"),
    f_width=(1, 1, 4, 1, 10, 1, 2, "its width; of wrn the widening factor"),
    f_iters=(300, 600, 6000, 0, 50_000, 0, 1500, "updates of f, batch 100; ImageNet's f is pretrained"),
    f_sgd=(0.0, 0.0, 0.1, 0.0, 0.1, 0.0, 0.0, "rate of SGD, a tenth from 40 % on, again from 60 %; 0: Adam"),
    f_noise=(0.05, "noise on the training images of honesty's second f"),
    # the Fixer
    width=(0.25, 0.25, 1.0, 1.0, 1.0, 1.0, 0.5, "of G; 1: 64 channels"),
    pairs=(1000, 1000, 10_000, 500, 45_000, 10_000, 2500, "training images that G learns from"),
    held=(300, 300, 1000, 50, 5000, 1000, 300, "more of them, for the validation loss"),
    refresh=(10, 10, 20, 20, 20, 20, 10, "epochs until chains are drawn anew"),
    mse_epochs=(20, 20, 20, 5, 40, 40, 8, "of phase 1 (sec. 5.2.1)"),
    perceptual_epochs=(60, 60, 40, 10, 100, 100, 20, "of phase 2, at most (sec. 5.2.1)"),
    patience=(5, 5, 6, 10, 10, 10, 5, "epochs without a lower validation loss"),
    lr=(1e-3, 1e-3, 3e-4, 1e-4, 1e-4, 1e-4, 1e-3, "rate of Adam"),
    batch=(50, 50, 64, 16, 64, 16, 50, "pairs in an update"),
    # the defence and its attack
    tau=(0.06, 0.06, 0.02, 0.01, 0.005, 0.01, 0.03, "noise of a Langevin step; paper: source's, in [0, 1]"),
    k=(50, 50, 100, 200, 2000, 200, 50, "K: Langevin steps of the defence and of the pairs"),
    h_def=(24, 24, 25, 64, 128, 64, 32, "chains of the last verdict"),
    h_adv=(6, 6, 8, 24, 48, 24, 8, "chains of an attack's gradient"),
    n=(20, 20, 20, 10, 50, 50, 20, "N: steps of the attack"),
    eps=(0.16, 0.2, 8 / 255, 2 / 255, 8 / 255, 2 / 255, 8 / 255, "l_inf radius of the attack"),
    step=(0.04, 0.05, 2 / 255, 1 / 255, 2 / 255, 1 / 255, 2 / 255, "length of the attack's step"),
    images=(60, 60, 100, 64, 1000, 10_000, 60, "test images under attack"),
    few=(30, 30, 50, 16, 200, 200, 30, "of these, in stronger, ablation, honesty, cooler"),
    natural=(500, 500, 1000, 64, 5000, 10_000, 500, "test images whose natural accuracy is taken"),
)
PART = 1600  # pairs between two checkpoints

# --- Langevin sampling --------------------------------------------------------------------------------------

def downhill(x, V, tau, T):
    """A step without its noise: x - tau^2/(2T) grad V(x). [B, C, S, S] -> same."""
    return x - tau**2 / (2 * T) * input_gradient(V, x)

def langevin_step(x, V, tau, T):
    """Eq. 2.3: x - tau^2/(2T) grad V(x) + tau z, z ~ N(0, I); never clamped. [B, C, S, S] -> same."""
    return downhill(x, V, tau, T) + tau * torch.randn_like(x)

def langevin(x, steps, V, tau, T):
    """A chain of `steps` Langevin steps from each image [B, C, S, S] -> its end."""
    return repeat(langevin_step, x, steps, V, tau, T)

def langevin_path(x, steps, V, tau, T):
    """A chain -> its end, and the way there: each state, and where downhill() leads from it."""
    way = []
    for _ in range(steps):
        after = repeat(downhill, x, 1, V, tau, T)  # by repeat: recorded on a GPU
        way.append((x, after))
        x = after + tau * torch.randn_like(x)
    return x, way

def step_back(v, x, after, V, tau, T):
    """v^T J, J the derivative of a step at x. J = I - tau^2/(2T) Hessian is symmetric, so J v will do: what
    a start farther along v changes. It is tau away (root mean square), so that kinks between them count."""
    size = v.flatten(1).double().square().mean(1).sqrt().clamp(min=1e-30).float().view(-1, 1, 1, 1)
    scale = tau / size
    return (downhill(x + scale * v, V, tau, T) - after) / scale

def pull_back(v, way, V, tau, T):
    """The gradient v of a loss at the end of chains -> at their starts, step by step."""
    for x, after in reversed(way):
        v = repeat(step_back, v, 1, x, after, V, tau, T)
    return v

# --- the energy, from lifecycle_midrun.py -------------------------------------------------------------------

def midrun_energy(args, data):
    """V, frozen, and what it was made from; lifecycle_midrun.py makes it if need be. Not of other images."""
    file = args.out / f"lifecycle_midrun-{args.dataset}" / "energy.pt"
    if not finished(file, args.budget):
        script = Path(__file__).with_name("lifecycle_midrun.py")
        command = [sys.executable, str(script), "--only", "figure3.2"]  # needs the energy alone
        for flag in "dataset budget out data-dir seed device".split():
            command += [f"--{flag}", str(getattr(args, flag.replace("-", "_")))]
        command += ["--first-class", str(args.settings.first_class)]
        print(f"no finished energy in {file}; running {' '.join(command)}", flush=True)
        if subprocess.run(command).returncode:
            raise UserError(f"no energy in {file}; lifecycle_midrun.py said why, above")
    state = common.read_checkpoint(file)
    try:
        made_from = state["made_from"]
        V = common.make_net(made_from["net"], 1, data.shape, made_from["width"])
        V.load_state_dict(state["V"])
    except (KeyError, RuntimeError, UserError):
        raise UserError(f"{file} holds no energy of images {data.shape}") from None
    if isinstance(data, common.Images) and made_from["images"] != common.identity(data):
        raise UserError(f"{file} was learned from other images (other classes?): take another --out")
    return V.to(args.device).requires_grad_(False), made_from

def finished(file, budget):
    """Whether this energy's training has ended; one of a smoke run serves smoke runs only."""
    state = common.read_checkpoint(file) if file.exists() else {"finished": False}
    return state["finished"] and (budget == "smoke" or not state["smoke"])

# --- the Fixer ----------------------------------------------------------------------------------------------

class Fixer(nn.Module):
    """G: x [B, C, S, S] plus what an SNGAN generator without up-sampling makes of x; at first x alone."""
    def __init__(self, channels, width):
        super().__init__()
        blocks = [common.GBlock(width, width, up=False) for _ in range(4)]
        last = nn.Conv2d(width, channels, 3, 1, 1)
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, 1, 1), *blocks, nn.BatchNorm2d(width), nn.ReLU(), last
        )
        common.init_xavier(self)
        nn.init.zeros_(last.weight)

    def forward(self, x):
        return x + self.body(2 * x - 1) / 2  # the body works in [-1, 1]

def perceptual_loss(x, target, layers, mean, std):
    """Eq. 5.4, mean over the batch: [B, C, S, S] twice -> 0-d. layers: phi; three means make grey RGB."""
    maps = layers((torch.cat([x, target]) - mean) / std).float()  # [2 B, C_j, H_j, W_j]
    return F.mse_loss(*maps.chunk(2))

def make_perceptual(vgg_file, f, device):
    """Eq. 5.4 with relu2_2 of torchvision's VGG-16; without its weights with the first 3/5 of f's layers."""
    if vgg_file is None:
        layers = f.body[: round(0.6 * len(f.body))]
        return partial(perceptual_loss, layers=layers, mean=0.5, std=0.5)
    net = torchvision.models.vgg16(weights=None, init_weights=False).to(device)
    common.read_weights(net, vgg_file, "VGG-16")
    layers = net.features[:9].eval().requires_grad_(False)
    mean, std = torch.tensor(common.IMAGENET, device=device).view(2, 1, 3, 1, 1)
    return partial(perceptual_loss, layers=layers, mean=mean, std=std)

@seeded
def purified(run, chain, images, K, draw=0):
    """P(x) of Images -> float16 [n, C, S, S], kept in a file. draw: how often chains were drawn before."""
    z = torch.zeros(len(images), *images.shape, dtype=torch.float16)
    torch.manual_seed(run.seed + 1000 * draw + len(images))  # other noise in each draw, and for other sizes
    made_from = {"chain": chain, "K": K, "images": images}
    pairs = Training(run, f"{images.name}-{K}-{draw}", made_from, advice="a lower --tau", z=z)
    parts = torch.arange(len(images)).split(PART)
    for it in pairs.updates(len(parts), "part"):
        x = images.take(parts[it - 1]).to(run.device)
        ends = by_parts(partial(chain, steps=K), x, run.chunk)
        z[parts[it - 1]] = ends.half().cpu()
        pairs.log(spread=ends.std())
    return z

def pair_loss(run, loss, G, z, images, rows):
    """Loss of G on these rows of the pairs, P(x) [n, C, S, S] float16 and Images x -> 0-d."""
    x = images.take(rows).to(run.device)
    with fast_precision(run.device):
        return loss(G(z[rows].to(run.device).float()), x)

@torch.no_grad()
def mean_loss(run, s, loss, G, z, images):
    """Mean loss of G, in eval mode, on all pairs."""
    G.eval()
    total = 0.0
    for rows in torch.arange(len(z)).split(s.batch):
        total += pair_loss(run, loss, G, z, images, rows) * len(rows)
    return total.item() / len(z)

@seeded
def train_phase(run, s, name, chain, learned, held, loss, epochs, K, start=None, early=True):
    """Sec. 5.2.1: learn G from pairs of K steps -> G, frozen. G.losses: [training, validation] an epoch.
    start: the G to go on from. early: keep the weights of the lowest validation loss, and end `patience`
    epochs later; else keep the last ones."""
    G = Fixer(learned.shape[0], max(round(64 * s.width), 1))
    if start:
        G.load_state_dict(start.state_dict())
    G = common.to_device(G, run.device)
    best = copy.deepcopy(G).requires_grad_(False).eval()
    adam = torch.optim.Adam(G.parameters(), s.lr)
    losses = []
    made_from = common.pick(s, "lr batch refresh patience")
    made_from.update(G=G, chain=chain, K=K, images=learned, held=held)
    made_from.update(epochs=epochs, loss=loss, early=early)
    training = Training(run, name, made_from, G=G, best=best, adam=adam, losses=losses)
    z_held = purified(run, chain, held, K)
    before = s.mse_epochs if start else 0  # phase 2 goes on counting
    for epoch in training.updates(epochs, "epoch"):
        z = purified(run, chain, learned, K, (before + epoch - 1) // s.refresh)
        G.train()
        order = common.shuffled(len(z), run.seed + epoch)
        batches = order.split(s.batch)[: len(z) // s.batch]  # whole batches
        total = 0.0
        for rows in batches:
            error = pair_loss(run, loss, G, z, learned, rows)
            adam.zero_grad(set_to_none=True)
            error.backward()
            adam.step()
            total += error.detach()
        train = total.item() / len(batches)
        val = mean_loss(run, s, loss, G, z_held, held)
        training.log(train=train, val=val)
        losses.append([train, val])
        lowest = min(losses, key=lambda pair: pair[1])
        if losses[-1] == lowest or not early:
            best.load_state_dict(G.state_dict())
        if early and epoch - 1 - losses.index(lowest) >= s.patience:
            training.finished = True  # this epoch was the last one
    best.losses = losses
    return best

# --- attacks on a classifier, and on the defended one -------------------------------------------------------

class LInf(NamedTuple):
    """The l_inf ball around an image, in which an attack moves; eps and step in [0, 1] units."""
    eps: float
    step: float

    def start(self, x):
        """A uniform draw from the ball around x [B, C, S, S], which must be in [0, 1]."""
        if x.min() < 0 or x.max() > 1:
            raise ValueError(f"an attack wants images in [0, 1]; got [{x.min():.3g}, {x.max():.3g}]")
        return (x + self.eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)

    def ascend(self, x, x0, gradient):
        """A step up the loss, back into the ball around x0, then into [0, 1]. Gradient 0 moves nothing."""
        moved = x + self.step * gradient.sign() - x0
        return (x0 + moved.clamp(-self.eps, self.eps)).clamp(0, 1)

def pgd_step(x, f, x0, y, ball):
    """A step up the cross-entropy of f."""
    with fast_precision(x.device):
        gradient = input_gradient(lambda x: F.cross_entropy(f(x).float(), y, reduction="none"), x)
    return ball.ascend(x, x0, gradient)

def pgd(f, x, y, steps, ball):
    """PGD on f itself, in eval mode, from a random start; x [B, C, S, S] in [0, 1] -> the last images."""
    was_training = f.training
    f.eval()
    attacked = []
    for x0, labels in zip(x.split(250), y.split(250)):
        attacked.append(repeat(pgd_step, ball.start(x0), steps, f, x0, labels, ball))
    f.train(was_training)
    return torch.cat(attacked)

def stay(x, steps):
    """No chain at all."""
    return x

@dataclass
class Defence:
    """F_H of Eq. 5.2: mean logits of f at the ends of H chains of K steps. Defence(f): f alone, H = 1."""
    f: nn.Module
    K: int = 0  # without chains, all H would be equal: H = 1
    chain: object = stay  # chain(x, steps): ends of chains
    path: object = None  # path(x, steps): ends of chains, and the way there
    back: object = None  # back(v, way): a gradient at the ends, carried to the starts
    chunk: int = 250

    def purify(self, x, H, steps):
        """P(x): the ends of H chains an image [H * B, C, S, S]; chain h of image b in row h * B + b."""
        return by_parts(partial(self.chain, steps=steps), x.repeat(H, 1, 1, 1), self.chunk)

    @torch.no_grad()
    def logits(self, x, H):
        """Logits of each of H chains [H, B, classes]; their mean over H is F_H."""
        H = H if self.K else 1
        parts = []
        for part in x.split(max(self.chunk // H, 1)):
            ends = self.purify(part, H, self.K)
            with fast_precision(x.device):
                logits = by_parts(self.f, ends, 250).float()
            parts.append(logits.unflatten(0, (H, len(part))))
        return torch.cat(parts, 1)

    def predict(self, x, H):
        """The class of the largest F_H, with H fresh chains -> [B]."""
        return self.logits(x, H).mean(0).argmax(1)

    def gradient(self, x, y, H, whole=False):
        """F_H [B, classes], and its loss' gradient in x (EOT): by BPDA, or through the whole chain."""
        H = H if self.K else 1
        logits, gradients = [], []
        size = max(self.chunk // H // (1 + whole * (self.K // 200)), 1)  # K states fill memory
        for part, labels in zip(x.split(size), y.split(size)):
            if whole:
                ends, way = self.path(part.repeat(H, 1, 1, 1), self.K)
            else:
                ends = self.purify(part, H, self.K)
            ends.requires_grad_(True)
            with torch.enable_grad(), fast_precision(x.device):
                F_H = self.f(ends).float().unflatten(0, (H, len(part))).mean(0)
            (gradient,) = torch.autograd.grad(self.loss(F_H, labels), ends)
            if whole:
                gradient = self.back(gradient, way)
            logits.append(F_H.detach())
            gradients.append(gradient.unflatten(0, (H, len(part))).sum(0))
        return torch.cat(logits), torch.cat(gradients)

    def loss(self, F_H, y):
        """What an attack climbs: the sum of the images' losses."""
        return F.cross_entropy(F_H, y, reduction="sum")

    def right(self, prediction, y):
        """Which predictions are right: bool [B]."""
        return prediction == y

class Attack(NamedTuple):
    """Settings of an attack. whole: as in Defence.gradient."""
    ball: object
    N: int
    H_adv: int
    H_def: int
    restarts: int = 1
    whole: bool = False

class Outcome(NamedTuple):
    """Of an attack on n images."""
    natural: torch.Tensor  # bool [n]: right before it
    robust: torch.Tensor  # bool [n]: right after it
    record: torch.Tensor  # bool [1 + restarts (N + 1), n], row t: right up to the t-th evaluation
    x: torch.Tensor  # what broke an image, else the last one tried; the image itself if it was misread before
    attack: Attack

@seeded
def eot_attack(run, defence, x0, y, attack):
    """The attack (Alg. 1 of ch. 2) on images x0 [n, C, S, S], labels y -> Outcome. Resumable."""
    x = x0.clone()
    period = attack.N + 1
    evaluations = attack.restarts * period
    record = torch.zeros(1 + evaluations, len(x), dtype=torch.bool, device=x.device)
    made_from = {"f": defence.f, "chain": defence.chain, "K": defence.K, "images": x0, "labels": y,
                 "attack": attack}
    progress = Training(run, "attack", made_from, unique=True, x=x, record=record)
    if progress.it == 0:
        record[0] = defence.right(defence.predict(x, attack.H_def), y)
    for t in progress.updates(evaluations, "evaluation"):
        still = record[t - 1].clone()
        alive = still.nonzero()[:, 0]  # broken images have left the batch
        if len(alive):
            if t % period == 1:
                x[alive] = attack.ball.start(x0)[alive]  # starts do not depend on who is alive
            logits, gradient = defence.gradient(x[alive], y[alive], attack.H_adv, attack.whole)
            broken = alive[~defence.right(logits.argmax(1), y[alive])]
            if len(broken):  # fresh chains have the last word
                verdict = defence.predict(x[broken], attack.H_def)
                broken = broken[~defence.right(verdict, y[broken])]
            still[broken] = False
            if t % period:  # no step after a restart's last evaluation
                left = still[alive]
                alive = alive[left]
                x[alive] = attack.ball.ascend(x[alive], x0[alive], gradient[left])
        record[t] = still
        progress.log(right=int(still.sum()))
    return Outcome(record[0], record[-1], record, x, attack)

@torch.no_grad()
def outputs(net, x):
    """A network's outputs for images [n, C, S, S], float32."""
    with fast_precision(x.device):
        return by_parts(net, x, 250).float()

def behind(G, f):
    """f(G(x)) as one network, in eval mode: an attack on it takes the derivative of G."""
    return nn.Sequential(G, f).eval()

def chain_and_fixer(x, steps, chain, G):
    """G(P(x)) as the end of a chain: G counts as part of P, and BPDA takes the identity for both."""
    return outputs(G, chain(x, steps))

def noise(x, steps, size):
    """In place of a chain: Gaussian noise of this standard deviation. BPDA's gradient is exact here."""
    return x + size * torch.randn_like(x)

@seeded
def same_chains(run, defence, x, H):
    """As Defence.logits, by the very same chains whatever reads them: [H, B, classes]."""
    return defence.logits(x, H)

# --- evaluation ---------------------------------------------------------------------------------------------

def table_5_1(run, s, f, midrun, through, around, x, y, attack):
    """Natural and robust accuracy of the mid-run defence, and of the same with the Fixer."""
    rows, transferred = [], {}
    for title, net in (("f", f), ("f behind G", through.f)):
        outcome = eot_attack(run, Defence(net), x, y, attack)
        rows.append(rate(f"natural acc, {title}, no chains", outcome.natural))
        rows.append(rate(f"robust acc, {title}, no chains", outcome.robust, eps=s.eps))
        transferred[f"PGD images of {title}"] = pgd(net, x, y, s.n, attack.ball)  # no early stop
    fixers = {"BPDA+EOT through G": through, "BPDA+EOT around G, P": around}
    models = (("mid-run", midrun, {"BPDA+EOT": midrun}), ("Fixer", through, fixers))
    for model, defence, direct in models:
        whole = eot_attack(run, defence, x, y, attack._replace(whole=True))
        right = {"whole chain": whole.robust}
        for name, attacked in direct.items():
            right[name] = eot_attack(run, attacked, x, y, attack).robust
        for name, images in transferred.items():
            right[name] = whole.natural & (defence.predict(images, s.h_def) == y)
        right["worst of these"] = torch.stack(list(right.values())).all(0)
        rows.append(rate(f"natural acc, {model}", whole.natural, K=s.k))
        for name, survived in right.items():
            rows.append(rate(f"robust acc, {model}, {name}", survived, eps=s.eps))
    return rows

def figure_5_2(run, s, midrun, held, perceptual, first, G):
    """Losses of both phases, epoch by epoch, and, fixed over purified, of phase 1's network and of G."""
    z = purified(run, midrun.chain, held, s.k)
    rows = []
    for kind, loss, net in (("mse", F.mse_loss, first), ("perceptual", perceptual, G)):
        curves = []
        for epoch, (training, validation) in enumerate(net.losses, 1):
            curves.append(value("training", training, epoch=epoch))
            curves.append(value("validation", validation, epoch=epoch))
        run.lines(f"figure5.2-{kind}", curves, "epoch", ylabel=f"{kind} loss")
        before = mean_loss(run, s, loss, nn.Identity(), z, held)
        after = mean_loss(run, s, loss, net, z, held)
        rows.append(value(f"{kind} loss, fixed / purified", after / before))
    return rows

def figure_5_3(run, s, f, G, through, x, y, attack):
    """Attacked images, one chain of each, and what the Fixer makes of it; distances to natural images.
    Images that are misread anyway were not attacked, and are left out."""
    outcome = eot_attack(run, through, x, y, attack)
    read = outcome.natural | ~outcome.natural.any()  # all of them, if none is read rightly (smoke)
    attacked, x = outcome.x[read], x[read]
    ends = through.purify(attacked, 1, s.k)
    rows, pictures = [], {"natural": x[:8]}
    stages = {"attacked": attacked, "purified": ends, "fixed": outputs(G, ends)}
    for title, images in stages.items():
        pictures[title] = images[:8]
        distance = (images - x).square().mean().sqrt()
        rows.append(value(f"root mean square of {title} - natural", distance.item()))
        rows.append(rate(f"acc of f, {title}", outputs(f, images).argmax(1) == y[read]))
    run.pictures("figure5.3", pictures, 8)
    return rows

def stronger(run, s, midrun, through, around, few, attack):
    """Attacks that nothing here was tuned against: three restarts, four times the steps, smaller steps."""
    small = LInf(s.eps, s.step / 4)
    ways = {
        "restarts": attack._replace(restarts=3),
        "more steps": attack._replace(N=4 * s.n),
        "small steps": attack._replace(N=2 * s.n, ball=small),
        "whole chain, small steps": attack._replace(N=2 * s.n, ball=small, whole=True),
    }
    rows = []
    for title, defences in (("mid-run", [midrun]), ("Fixer", [through, around])):
        worst = []
        for way, variant in ways.items():
            tried = [d for d in defences if d.path or not variant.whole]  # around knows BPDA only
            right = [eot_attack(run, defence, *few, variant).robust for defence in tried]
            survived = torch.stack(right).all(0)
            rows.append(rate(f"robust acc, {title}, {way}", survived, eps=s.eps, N=variant.N))
            worst.append(survived)
        survived = torch.stack(worst).all(0)
        rows.append(rate(f"robust acc, {title}, worst of these", survived, eps=s.eps))
    return rows

def upperbound(run, f, midrun, through, x_many, y_many):
    """Accuracy on x, on P(x), on G(P(x)): how much of what chains cost does G give back?"""
    clean = outputs(f, x_many).argmax(1) == y_many
    before = same_chains(run, midrun, x_many, 1)[0].argmax(1) == y_many
    after = same_chains(run, through, x_many, 1)[0].argmax(1) == y_many
    rows = [rate("natural acc, f(x)", clean), rate("natural acc, f(P(x))", before, H=1)]
    rows.append(rate("natural acc, f(G(P(x)))", after, H=1))
    rows.append(rate("repaired by G", after & ~before, H=1))
    rows.append(rate("spoiled by G", before & ~after, H=1))
    gap = clean.sum() - before.sum()
    if gap > 0:
        gained = after.sum() - before.sum()
        rows.append(value("share of the gap closed", (gained / gap).item(), H=1))
    return rows

def compared(run, s, defence, networks, few, x_many, y_many, attack):
    """Networks {title: net} behind the same chains: natural accuracy, and robust accuracy under the attack
    through the whole chain; noise in place of chains has no path, and BPDA is exact."""
    rows = []
    attack = attack._replace(whole=defence.path is not None)
    for title, net in networks.items():
        defended = replace(defence, f=net)
        prediction = same_chains(run, defended, x_many, 8).mean(0).argmax(1)
        rows.append(rate(f"natural acc, {title}", prediction == y_many, H=8))
        outcome = eot_attack(run, defended, *few, attack)
        rows.append(rate(f"robust acc, {title}", outcome.robust, eps=s.eps, H=s.h_def))
    return rows

def ablation(run, s, learn, perceptual, first, G, f, midrun, few, x_many, y_many, attack):
    """G of one loss alone, for at most as many epochs as both have together; and G of pairs of K / 5."""
    K = max(s.k // 5, 1)
    both = s.mse_epochs + s.perceptual_epochs
    start = learn("mse-other", loss=F.mse_loss, epochs=s.mse_epochs, early=False, K=K)
    fixers = {"no Fixer": nn.Identity(), "first phase": first, "Fixer": G}
    fixers["MSE alone"] = learn("mse-alone", loss=F.mse_loss, epochs=both)
    fixers["perceptual alone"] = learn("perceptual-alone", loss=perceptual, epochs=both)
    fixers["pairs of another K"] = learn("fixer-other", loss=perceptual, epochs=s.perceptual_epochs,
                                         start=start, K=K)
    networks = {title: behind(net, f) for title, net in fixers.items()}
    return compared(run, s, midrun, networks, few, x_many, y_many, attack)

def honesty(run, s, f, other, noisy, G, midrun, few, x_many, y_many, attack):
    """Has G learned f? A classifier that G never saw, one trained with noise; noise in place of chains."""
    moved = midrun.purify(x_many, 1, s.k) - x_many
    size = moved.square().mean().sqrt().item()
    by_noise = replace(midrun, chain=partial(noise, size=size), path=None)
    rows = [rate("natural acc, unseen, no chains", outputs(other, x_many).argmax(1) == y_many)]
    for defence, title in ((midrun, ""), (by_noise, ", noise for P")):
        networks = {f"f, no Fixer{title}": f, f"f, Fixer{title}": behind(G, f),
                    f"unseen, no Fixer{title}": other, f"unseen, Fixer{title}": behind(G, other)}
        networks[f"f trained with noise{title}"] = noisy
        rows += compared(run, s, defence, networks, few, x_many, y_many, attack)
    return rows

def cooler(run, s, f, midrun, few, x_many, y_many, attack):
    """No Fixer, but chains of half the noise a step and four times the steps: as much noise in all."""
    half = {name: partial(getattr(midrun, name), tau=s.tau / 2) for name in ("chain", "path", "back")}
    defence = replace(midrun, K=4 * s.k, **half)
    return compared(run, s, defence, {"f, cooler chains": f}, few, x_many, y_many, attack)

EXPERIMENTS = common.experiments(  # main() hands each what its parameters name
    headline=[table_5_1, figure_5_2, figure_5_3], others=[stronger, upperbound, ablation, honesty, cooler]
)

# --- command line -------------------------------------------------------------------------------------------

def get_args(argv=None):
    args = common.parse_args(__doc__, SETTINGS, EXPERIMENTS, argv)
    s = args.settings
    common.at_least(1, s, "pairs held refresh mse_epochs perceptual_epochs patience k h_def h_adv n")
    common.at_least(1, s, "images few natural")
    common.at_least(2, s, "batch")
    common.above_0(s, "tau width f_width lr")
    common.check_radius(s.eps)
    if s.batch > s.pairs or s.images > s.natural:
        raise UserError("--batch must be at most --pairs, --images at most --natural")
    return args

def subset(name, data, seed, part):
    """This part (a slice) of a fixed random order of a data set, in memory -> Images."""
    if part.stop > len(data):
        raise UserError(f"--pairs, --held, --natural: {len(data)} images are too few")
    index = common.shuffled(len(data), seed)[part]
    if isinstance(data, common.Images):
        index = index.to(data.x.device)
        return common.Images(data.x[index], data.y[index], name)
    return replace(common.in_memory(data, index), name=name)

def main(argv=None):
    args = get_args(argv)
    s = args.settings
    folders = args.dataset in common.FOLDERS
    load = partial(common.load_images, args.dataset, data_dir=args.data_dir, side=224 if folders else None)
    data, test = load("train").to(args.device), load("test")
    if s.first_class:
        data, test = data.from_class(s.first_class), test.from_class(s.first_class)
    learned = subset("pairs", data, 321, slice(0, s.pairs))
    held = subset("held", data, 321, slice(s.pairs, s.pairs + s.held))
    tested = subset("tested", test, 123, slice(0, s.natural)).to(args.device)
    vgg_file = common.weights_at_hand("vgg16-397923af.pth", args.data_dir)
    classes = int(data.y.max()) + 1
    if folders and (vgg_file is None or classes != 1000):
        raise UserError("imagenet wants vgg16-397923af.pth in --data-dir, and images in 1000 folders")
    build_f = partial(common.make_net, s.f_net, classes, data.shape, s.f_width)
    build_f()  # a bad width fails here, not after an hour
    unseen = "pretrained50" if folders else "resnet18"
    build_other = partial(common.make_net, unseen, classes, data.shape, 0.25)
    V, energy = midrun_energy(args, data)
    run = common.Run("fixer", args, energy=energy, loss_network="VGG-16" if vgg_file else "f")
    x_many, y_many = tested.take(slice(None)), tested.y
    x, y = x_many[: s.images], y_many[: s.images]
    attack = Attack(LInf(s.eps, s.step), s.n, s.h_adv, s.h_def)
    settings = {"V": frozen_copy(V), "tau": s.tau, "T": energy["temperature"]}
    chain = partial(langevin, **settings)
    path, back = partial(langevin_path, **settings), partial(pull_back, **settings)
    augment = "none" if folders or data.shape[0] == 1 else "crop_flip"
    train = partial(common.train_classifier, run, data=data, iterations=s.f_iters, augment=augment)
    learn = partial(train_phase, run, s, chain=chain, learned=learned, held=held, K=s.k)
    f = once(lambda: train("f", build_f, sgd=s.f_sgd, shared=True))
    other = once(lambda: train("other", build_other))
    again = {"iterations": s.f_iters or 2000, "sgd": s.f_sgd, "noise": s.f_noise}
    noisy = once(lambda: train("f-noisy", build_f, **again))
    perceptual = once(lambda: make_perceptual(vgg_file, f(), run.device))
    first = once(lambda: learn("mse", loss=F.mse_loss, epochs=s.mse_epochs, early=False))
    G = once(lambda: learn("fixer", loss=perceptual(), epochs=s.perceptual_epochs, start=first()))
    midrun = once(lambda: Defence(f(), s.k, chain, path, back, run.chunk))
    through = once(lambda: replace(midrun(), f=behind(G(), f())))
    around = once(lambda: replace(midrun(), chain=partial(chain_and_fixer, chain=chain, G=G()), path=None))
    run.experiments(EXPERIMENTS, x=x, y=y, few=(x[: s.few], y[: s.few]), x_many=x_many, y_many=y_many,
                    attack=attack, held=held, learn=learn, f=f, other=other, noisy=noisy,
                    perceptual=perceptual, first=first, G=G, midrun=midrun, through=through, around=around)

if __name__ == "__main__":
    common.call(main)
