r"""Mid-run energies: chains that stay realistic as long as a defence needs, and all that they can defend.

Source: Mitchell 2022, "Adversarial Attacks and Defense using Energy-Based Image Models", chapters 3 and 4.

An attack changes an image so little that nobody sees it, and yet a classifier f misreads it. An energy U is
a network that gives an image one number, low for images like the training data. A chain starts at an image
and takes many small steps down the energy, each with some noise (Langevin dynamics). It forgets the attack
long before it forgets the class. A long-run energy (stochastic_security.py) asks for chains that stay
realistic for ever, which is hard to learn; a short-run energy knows only chains that have just started. A
defence runs K steps, so a mid-run energy learns from chains that live about as long, mostly a few times
longer. A bank keeps their states between updates (Alg. 4). No label is needed: one energy defends any network
that sees such images.

    U(x) = V(x) / T: energy, LOW = in-distribution; V is what the network returns, T the temperature
    Pixels are in [0, 1]; networks scale inside. The source's tau is for [-1, 1]; the table has it halved.
    (2.2)   gradient of d = E_data[U] - E_chains[U], chains held fixed: the energy of data down, of chains up
    (2.3)   x <- x - tau^2/2 grad_x U(x) + tau z,  z ~ N(0, I); states are never clamped
    Alg. 4  A batch of the bank takes k_train steps (2.3), V takes an update, and the states go back. Each of
            them dies with probability p: a mean life of k_train / p steps, here .7 to 10 times K; (1 - p)^n
            outlive n visits. The learning rate falls to a tenth four times: in the end V hardly moves.
    (3.1)   F(x) = E[f(P(x))], P(x): end of K steps from x (source: T(x)).  (3.2) F_H: mean logits of H chains
    (3.3)   The attack climbs the loss of F_H (EOT: expectation over transformation), and takes the identity
            for P's derivative (BPDA: backward pass differentiable approximation). "Whole chain" (not in the
            source) goes back through all K steps: chains forget, so E[P(x)] moves less than x does. A step's
            derivative is taken as a difference between two starts, as far apart as its noise is long.
    Alg. 3  PGD (projected gradient descent: steps up the loss, cut back to within eps of the image) with that
            gradient. N + 1 evaluations by H_adv chains. What looks broken is judged again by H_def fresh.
    3.2.4   x <- x + eta^2/2 S(x) + eta z, S = grad log q, q the density of the data: S stands for -grad U
    (4.2)   Dice = 2 TP / (2 TP + FP + FN + 1e-9) of a predicted and the true mask (misprinted in the source)
    (4.3)   A segmentation is right if Dice(attacked, purified) >= Dice(clean, not purified) / 2.
Commands (one core; slow: one without AVX512; more numbers in results/):
    python lifecycle_midrun.py                    30 min: robust accuracy .02 without, .93 with the defence
    python lifecycle_midrun.py --only table4.2    30 min, slow: the same energy before a segmentation network
    python lifecycle_midrun.py --only figure3.2   11 min, slow: trains the energy alone; mean age 359 steps
    python lifecycle_midrun.py --dataset cifar10  within an hour on a CPU (four of ten classes): .00, .53
The log. d: energy of data minus that of chains. moved: root mean square of pixels by which k_train steps
moved the chains (noise alone: tau sqrt(k_train)). age: mean of the bank, in steps.
Differs: fresh states are data, as the published code also allows for CIFAR-10 (Tab. 3.1: images of a GAN).
They enter after the update (code: before). K = 2000 as the code (text: 1500). Lives are longer than the
text's (K on average), but for --budget cpu. Alg. 4 also makes the short-run energy (p = 1/2, .4 tau, rate
1e-4) and the long-run one (p / 20), of as many updates. ImageNet: ch. 4's network (code: BigGAN's), centre
crops, mean logits (code: softmax outputs, weaker). Masks: a digit's class + 1 at its ink (source: pets).
"""
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import common  # before torch, so that Ctrl-C ends even its import quietly
import torch
import torch.nn.functional as F
from torch import nn

from common import Diverged, Images, Training, UserError, by_parts, fast_precision, follow, frozen_copy
from common import input_gradient, load_on_device, once, rate, repeat, seeded, value

# --- settings -----------------------------------------------------------------------------------------------

SETTINGS = common.settings(  # a row: a value for each column, or one for all, then its help
    columns=("glyphs", "mnist", "cifar10 tinyimagenet", "cifar10-paper", "imagenet imagenet-paper",
             "cifar10-cpu"),
    smoke=dict(f_width=1, f_iters=3, u_iters=2, width=0.05, updates=6, batch=4, bank=8, k_train=2, k=3,
               h_def=3, h_adv=2, n=2, images=8, few=4),
    first_class=(0, 0, 0, 0, 0, 6, "CIFAR-10 on a CPU: this class and those after it, four of ten"),
    f_net=("small_cnn", "small_cnn", "wrn16", "wrn28", "efficientnet_b7", "small_cnn",
           "natural classifier f"),
    f_width=(1, 1, 4, 10, 1, 2, "its width; of wrn the widening factor"),
    f_iters=(300, 600, 6000, 50_000, 2000, 1500,
             "updates of f (not ImageNet's) and of table 4.1's classifier"),
    f_sgd=(0.0, 0.0, 0.1, 0.1, 0.0, 0.0, "rate of SGD; 0: Adam"),
    f_noise=(0.05, "noise on the images that f of noisy-classifier is trained on"),
    net=("light_ebm", "light_ebm", "sngan", "sngan", "sngan", "light_ebm", "network of V"),
    width=(0.5, 0.5, 0.5, 1.0, 1.0, 0.5, "channels of V, times the published ones"),
    updates=(800, 1600, 6000, 150_000, 150_000, 3000, "updates of the energy"),
    lr=(4e-4, 4e-4, 4e-4, 1e-4, 1e-4, 1e-3, "rate of Adam, at first"),
    anneal=(1 / 3, "share of the updates at that rate; then it falls to a tenth four times, evenly"),
    batch=(64, 64, 100, 128, 64, 64, "data images, and as many chains, in an update"),
    bank=(1024, 1024, 5000, 19_968, 9984, 1024, "states, a multiple of the batch"),
    k_train=(20, 20, 25, 100, 100, 8, "Langevin steps of an update"),
    p=(0.05, 0.05, 0.05, 0.025, 0.05, 0.15, "probability that a state is replaced after a visit"),
    tau=(0.015, 0.015, 0.02, 0.005, 0.01, 0.03, "noise of a Langevin step; paper: half the source's"),
    temperature=(1e-4, 1e-4, 4e-4, 1e-4, 1e-5, 4e-4, "T"),
    data_noise=(0.03, 0.03, 0.04, 0.01, 0.015, 0.04, "noise on data in training; paper: half the source's"),
    k=(75, 100, 100, 2000, 200, 75, "K: Langevin steps of the defence"),
    h_def=(24, 24, 50, 128, 64, 32, "chains of a verdict"),
    h_adv=(6, 6, 8, 48, 24, 8, "chains of an attack's gradient"),
    n=(20, 20, 20, 50, 50, 20, "N: steps of the attack"),
    eps=(0.08, 0.2, 8 / 255, 8 / 255, 2 / 255, 8 / 255, "l_inf radius of the attack"),
    step=(0.02, 0.05, 2 / 255, 2 / 255, 1 / 255, 2 / 255, "length of the attack's step"),
    images=(60, 60, 200, 5000, 10_000, 60, "test images under attack; figure 3.1: up to 3 times as many"),
    few=(30, 30, 100, 125, 125, 30, "of these, in figures 3.3 and 3.4"),
    other=("symbols", "symbols", "cifar100", "cifar100", "flowers102", "cifar100", "data set of table 4.1"),
    two_energies=(False, "figure 3.1: also a long-run energy that is added to the mid-run one"),
    u_iters=(1000, 1000, 3000, 50_000, 50_000, 1000, "updates of the U-Nets of table 4.2 and figure 3.4"),
)
SIGMA = 0.01  # noise that the score network takes off, [0, 1] pixels
ETA = SIGMA / 2  # noise of a step of its chains

# --- Langevin sampling, and chains of a score ---------------------------------------------------------------

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

def score_step(x, net):
    """Sec. 3.2.4: x + eta^2/2 S(x) + eta z, S = net / sigma, in float32 (bfloat16 would round too much)."""
    return x + ETA**2 / 2 * net(x) / SIGMA + ETA * torch.randn_like(x)

def score_chain(x, steps, net):
    """A chain of `steps` steps along the score from each image [B, C, S, S] -> its end."""
    return repeat(score_step, x, steps, net)

# --- learning the energy (Algorithm 4), and a score ---------------------------------------------------------

def descend(optimizer, loss):
    """A step of the optimiser down the loss."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()

def rejuvenate(bank, age, rows, p, data):
    """Alg. 4, last step: with probability p each, states of these rows become training images of age 0."""
    dead = (torch.rand(len(rows)) < p).nonzero()[:, 0]
    if len(dead):
        rows = rows[dead.to(rows.device)]
        index = torch.randint(len(data), dead.shape)
        bank[rows] = data.take(index).to(bank.device)
        age[rows] = 0

class Added(nn.Module):
    """The sum of two networks of V: one that stays as it is, one that learns (as in the published code)."""
    def __init__(self, fixed, learns):
        super().__init__()
        self.fixed, self.learns = fixed.requires_grad_(False), learns

    def forward(self, x):
        return self.fixed(x) + self.learns(x)

@seeded
def train_midrun(run, s, data, name="energy", fixed=None):
    """Algorithm 4 -> V, and the age of each state in the bank: Langevin steps since it was fresh, int64."""
    V = common.make_net(s.net, 1, data.shape, s.width).to(run.device)
    if fixed:
        V = Added(fixed, V)
    V_fast = frozen_copy(V)
    bank = data.take(torch.randint(len(data), (s.bank,))).to(run.device)
    age = torch.zeros(s.bank, dtype=torch.long, device=run.device)
    adam = torch.optim.Adam(V.parameters(), s.lr)
    drops = [round((s.anneal + (1 - s.anneal) * part) * s.updates) for part in (0, 1 / 4, 1 / 2, 3 / 4)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(adam, drops)
    made_from = common.pick(s, "net width updates lr anneal batch bank k_train p temperature data_noise")
    made_from.update(tau_train=s.tau, images=data)
    parts = {"V": V, "bank": bank, "age": age, "adam": adam, "schedule": schedule}
    training = Training(run, name, made_from, {"moved": 1}, "a lower --lr", **parts)
    stream = common.batches(data, s.batch, run.seed, training.it, device=run.device)
    for it in training.updates(s.updates):
        x, _ = next(stream)
        x = x + s.data_noise * torch.randn_like(x)  # [m, C, S, S], not clamped
        rows = common.batch_index(s.bank, s.batch, run.seed + 1, it - 1).to(run.device)
        follow(V_fast, V)
        chains = langevin(bank[rows], s.k_train, V_fast, s.tau, s.temperature)
        with fast_precision(run.device):
            v_data, v_chains = V(torch.cat([x, chains]))[:, 0].float().chunk(2)
        d = (v_data.mean() - v_chains.mean()) / s.temperature  # its gradient is Eq. 2.2
        descend(adam, d)
        schedule.step()
        moved = (chains - bank[rows]).square().mean().sqrt()
        bank[rows] = chains
        age[rows] += s.k_train
        rejuvenate(bank, age, rows, s.p, data)
        training.log(d=d, moved=moved, age=age.float().mean())
    return V, age

def double_conv(c_in, c_out, norm):
    """Two convolutions, each with a normalisation and a ReLU."""
    layers = []
    for c in (c_in, c_out):
        layers += [nn.Conv2d(c, c_out, 3, 1, 1), norm(c_out), nn.ReLU()]
    return nn.Sequential(*layers)

class UNet(nn.Module):
    """U-Net: images of shape (C, S, S) -> [B, outputs, S, S]. Another one inside works at half the side."""
    def __init__(self, outputs, shape, norm=nn.BatchNorm2d):
        super().__init__()
        channels, side, _ = shape
        c = max(2 * channels, 16)
        self.first = double_conv(channels, c, norm)
        self.last = nn.Conv2d(c, outputs, 1)
        self.inner = None
        if side > 8 and side % 2 == 0:
            self.inner = UNet(c, (c, side // 2, side // 2), norm=norm)
            self.join = double_conv(2 * c, c, norm)

    def forward(self, x):
        x = self.first(x)
        if self.inner:
            inside = F.interpolate(self.inner(F.max_pool2d(x, 2)), scale_factor=2)
            x = self.join(torch.cat([x, inside], 1))
        return self.last(x)

@seeded
def train_score(run, s, data):
    """Denoising score matching: net(x + sigma z) learns -z; then net / sigma is the noisy data's score."""
    net = UNet(data.shape[0], data.shape, norm=nn.Identity).to(run.device)
    adam = torch.optim.Adam(net.parameters())
    made_from = {"net": net, "updates": s.u_iters, "batch": s.batch, "images": data}
    training = Training(run, "score", made_from, net=net, adam=adam)
    stream = common.batches(data, s.batch, run.seed, training.it, device=run.device)
    for _ in training.updates(s.u_iters):
        x, _ = next(stream)
        z = torch.randn_like(x)
        loss = (net(x + SIGMA * z) + z).square().mean()
        descend(adam, loss)
        training.log(loss=loss)
    return net.requires_grad_(False)

# --- attacks on a classifier, and on a defended one: Algorithm 3 --------------------------------------------

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
    """F_H of Eq. 3.2: mean logits of f at the ends of H chains of K steps. Defence(f): f alone, H = 1."""
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
        """argmax F_H with H fresh chains -> classes [B]."""
        return self.logits(x, H).mean(0).argmax(1)

    def gradient(self, x, y, H, whole=False):
        """F_H [B, classes], and its loss' gradient in x (Eq. 3.3): by BPDA, or through the whole chain."""
        H = H if self.K else 1
        logits, gradients = [], []
        size = max(self.chunk // H // (1 + whole * (self.K // 200)), 1)  # a way fills memory
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
    """Settings of Algorithm 3. whole: as in Defence.gradient."""
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
    """Algorithm 3 on images x0 [n, C, S, S] with labels y -> Outcome. Resumable."""
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

def chains_of(s, V):
    """Chains of the energy as a defence runs them, the same with their way, and their derivative."""
    settings = {"V": frozen_copy(V), "tau": s.tau, "T": s.temperature}
    return [partial(function, **settings) for function in (langevin, langevin_path, pull_back)]

class Task(NamedTuple):
    """What is attacked: a defended network, its images [n, C, S, S], and what it is to say of them."""
    defence: Defence
    x: torch.Tensor
    y: torch.Tensor

# --- segmentation -------------------------------------------------------------------------------------------

def dice(prediction, mask):
    """Eq. 4.2 of classes [B, S, S] twice -> [B]; 0 is background. A wrong class counts in FP and in FN."""
    hits = ((prediction == mask) & (mask > 0)).flatten(1).sum(1)  # TP
    predicted = (prediction > 0).flatten(1).sum(1)  # TP + FP
    true = (mask > 0).flatten(1).sum(1)  # TP + FN
    return 2 * hits / (predicted + true + 1e-9)

class Segmenter(Defence):
    """A defended network that returns a map of logits; y [B, 2, S, S]: true mask, and clean prediction."""

    def loss(self, F_H, y):
        """Cross-entropy summed over all pixels."""
        return F.cross_entropy(F_H, y[:, 0], reduction="sum")

    def right(self, prediction, y):
        """Eq. 4.3: Dice [B] is at least half of what it was for the clean image without a defence."""
        mask, clean = y[:, 0], y[:, 1]
        return dice(prediction, mask) >= dice(clean, mask) / 2

def segmentation_task(run, task):
    """Makes y what Segmenter wants; drops images that the bare network fails on -> task, how many."""
    mask = task.y.long()
    clean = replace(task.defence, K=0).predict(task.x, 1)
    kept = dice(clean, mask) >= (0 if run.smoke else 0.1)  # smoke: it has learned nothing
    if not kept.any():
        raise Diverged("no clean image has a Dice of .1; try more --u-iters")
    y = torch.stack([mask, clean], 1)
    return Task(task.defence, task.x[kept], y[kept]), int((~kept).sum())

def digits_among(args, others, split):
    """Digits over letters in the corners (grey), or over pictures of `others`; y: masks uint8 [N, S, S]."""
    channels, side, _ = others.shape
    g = torch.Generator().manual_seed(5 if split == "train" else 6)
    digits = load_on_device(args, args.dataset if channels == 1 else "glyphs", split, 1, side)
    ink, y = digits.some(4000)
    if channels == 1:
        others = load_on_device(args, "letters", split)
    index = torch.randint(len(others), (len(y),), generator=g)
    behind = others.take(index).to(args.device)
    if channels == 1:
        x = torch.maximum(ink, behind.roll((side // 2, side // 2), (2, 3)))
    else:
        colour = torch.rand(len(y), 3, 1, 1, generator=g).to(args.device)
        x = behind + 0.75 * ink * (colour - behind)
    mask = (ink[:, 0] >= 0.5) * (y[:, None, None] + 1)
    return Images((255 * x).round().byte(), mask.byte(), "digits")

# --- tables and figures -------------------------------------------------------------------------------------

def rates(title, outcome, **beside):
    """Rows of natural and robust accuracy."""
    a = outcome.attack
    return [
        rate(f"natural acc{title}", outcome.natural, **beside),
        rate(f"robust acc{title}", outcome.robust, eps=a.ball.eps, N=a.N, H_adv=a.H_adv, **beside),
    ]

def attacked(run, s, task, attack, name):
    """Accuracies without and with the defence -> rows, {title: images}, whom BPDA attacked; draws it."""
    defence, x, y = task
    labels = y if y.dim() == 1 else y[:, 0]
    transferred = pgd(defence.f, x, labels, s.n, attack.ball)
    bare = eot_attack(run, replace(defence, K=0), x, y, attack._replace(H_adv=1, H_def=1))
    bpda = eot_attack(run, defence, x, y, attack)
    whole = eot_attack(run, defence, x, y, attack._replace(whole=True))
    transfer = defence.right(defence.predict(transferred, s.h_def), y)
    worst = bpda.robust & whole.robust & transfer
    rows = rates(", no defence", bare) + rates(", BPDA+EOT", bpda, K=s.k)
    rows += rates(", whole chain", whole)[1:]
    rows.append(rate("robust acc, transfer PGD", bpda.natural & transfer, eps=s.eps, N=s.n))
    rows.append(rate("robust acc, worst of these", worst, eps=s.eps))
    sets, pictures = {"natural": x, "transfer PGD": transferred, "BPDA+EOT": bpda.x}, {}
    for title, images in sets.items():
        pictures[title] = images[:16]
        pictures[f"{title}, {s.k} steps later"] = defence.purify(images[:16], 1, s.k)
    run.pictures(name, pictures, 16)
    return rows, sets, bpda.natural

def table_3_1(run, s, task, attack):
    """The mid-run defence of the data set's own classifier (ImageNet: Tab. 3.2)."""
    return attacked(run, s, task, attack, "table3.1")[0]

def table_3_3(run, s, task, attack):
    """Four times the steps, a third more chains; what survives that and table 3.1's two attacks."""
    plain = eot_attack(run, *task, attack)
    whole = eot_attack(run, *task, attack._replace(whole=True))
    stronger = attack._replace(N=4 * s.n, H_adv=round(4 / 3 * s.h_adv))
    outcome = eot_attack(run, *task, stronger)
    rows = rates(", stronger BPDA+EOT", outcome)
    worst = plain.robust & whole.robust & outcome.robust
    return rows + [rate("robust acc, worst with table 3.1's two", worst, eps=s.eps)]

def noisy_classifier(run, s, noisy_task, attack):
    """The same energy before a classifier that was trained on images with noise (not in the source)."""
    return attacked(run, s, noisy_task, attack, "noisy-classifier")[0]

def table_4_1(run, s, other_task, attack):
    """The same energy, unchanged, before a classifier of classes that it never saw."""
    return attacked(run, s, other_task, attack, "table4.1")[0]

def table_4_2(run, s, mask_task, attack):
    """The energy before a U-Net: right by Eq. 4.3 (no defence: 1 by definition); mean Dice where attacked.
    Held against the clean image without chains (4.3), as the source may mean; in the last row with them."""
    task, left_out = mask_task
    rows, sets, mine = attacked(run, s, task, attack, "table4.2")
    mine = mine | ~mine.any()  # smoke: all are misread
    rows.append(value("images of clean Dice below .1, left out", left_out))
    mask, scores = task.y[:, 0], {}
    grey = lambda mask: mask[:16, None].sign() * (mask[:16, None] + 4) / 14  # 0: background, black
    pictures = {"true masks": grey(mask)}
    for title, images in sets.items():
        for K in (0, s.k):
            predicted = replace(task.defence, K=K).predict(images, s.h_def)
            scores[title] = dice(predicted, mask)[mine]  # the last K counts
            mean = scores[title].mean().item()
            rows.append(value(f"mean Dice, {title}", mean, K=K, n=int(mine.sum())))
            pictures[f"{title}, K = {K}"] = grey(predicted)
    run.pictures("table4.2-masks", pictures, 16)
    right = scores["BPDA+EOT"] >= scores["natural"] / 2
    return [*rows, rate("robust acc against the purified clean image, BPDA+EOT", right)]

def frechet_distance(mean1, cov1, mean2, cov2):
    """||m1 - m2||^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2) of two Gaussians, float64 [d], [d, d]."""
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return ((mean1 - mean2).pow(2).sum() + cov1.trace() + cov2.trace() - 2 * cross).item()

def figure_3_1(run, s, data, test, features):
    """The life cycle: chains of short-, mid- and long-run energies, and their Frechet distance to data."""
    kinds = {
        "energy-short": replace(s, p=0.5, tau=0.4 * s.tau, lr=1e-4),
        "energy": s,
        "energy-long": replace(s, p=s.p / 20),
    }
    if s.two_energies:
        kinds["energy-two"] = kinds["energy-long"]
    metric, network = features
    some = data.take(common.shuffled(len(data), 321)[:5000]).to(run.device)
    reference = common.feature_statistics(network, some)
    rows, pictures, learned = [], {}, {}
    for name, settings in kinds.items():
        fixed = learned["energy"] if name == "energy-two" else None
        learned[name], _ = train_midrun(run, settings, data, name, fixed)
        chain = partial(langevin, V=frozen_copy(learned[name]), tau=settings.tau, T=s.temperature)
        (x, _), done = test.some(3 * s.images), 0
        for k in [0, *common.multiples(s.k_train / s.p, (1 / 16, 1 / 4, 1, 4, 10))]:
            x = by_parts(partial(chain, steps=k - done), x, run.chunk)
            done = k
            here = common.feature_statistics(network, x.clamp(0, 1))
            distance = frechet_distance(*reference, *here)
            rows.append(value(f"{metric}, {name}", distance, steps=k, n=len(x)))
            pictures[f"{name}, {k} steps"] = x[:16]
    run.lines("figure3.1", rows, "steps", xscale="symlog", yscale="log")
    run.pictures("figure3.1-states", pictures, 16)
    return rows

def figure_3_2(run, s, midrun):
    """Ages of the bank's states at the end of training, against the geometric law that p implies."""
    rows = []
    most = s.updates * s.batch // s.bank
    for visits in common.multiples(most, (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)):
        steps = visits * s.k_train
        rows.append(rate("share of this age or older, bank", midrun[1] >= steps, steps=steps))
        rows.append(value("share of this age or older, law", (1 - s.p) ** visits, steps=steps))
    run.lines("figure3.2", rows, "steps")
    return [*rows, value("mean age in steps, bank", midrun[1].float().mean().item())]

def against_steps(run, s, task, attack, name, factors, chain, tau):
    """Accuracy against K = factor * n: n steps of noise tau add as much noise as the defence's chain."""
    rows, pictures = [], {"natural": task.x[:16]}
    for K in common.multiples(s.k * s.tau**2 / tau**2, factors):
        defence = replace(task.defence, K=K, chain=chain, path=None)  # BPDA alone
        outcome = eot_attack(run, defence, task.x[: s.few], task.y[: s.few], attack)
        rows += rates("", outcome, K=K)
        pictures[f"{K} steps"] = chain(task.x[:16], K)
    run.lines(name, rows, "K", xscale="log", ylim=(0, 1.02))
    run.pictures(f"{name}-states", pictures, 16)
    return rows

def figure_3_3(run, s, task, attack):
    """Natural and robust accuracy against K."""
    chain = task.defence.chain
    return against_steps(run, s, task, attack, "figure3.3", (1 / 10, 1 / 3, 1, 2, 5), chain, s.tau)

def figure_3_4(run, s, task, attack, score):
    """The same of the score network's chains."""
    chain = partial(score_chain, net=score)
    return against_steps(run, s, task, attack, "figure3.4", (1 / 30, 1 / 10, 1 / 3, 1), chain, ETA)

EXPERIMENTS = common.experiments(  # main() hands each what its parameters name
    headline=[table_3_1],
    others=[table_3_3, noisy_classifier, table_4_1, table_4_2,
            figure_3_1, figure_3_2, figure_3_3, figure_3_4],
)

# --- command line -------------------------------------------------------------------------------------------

def get_args(argv=None):
    args = common.parse_args(__doc__, SETTINGS, EXPERIMENTS, argv)
    s = args.settings
    common.at_least(1, s, "f_iters u_iters updates batch bank k_train k h_def h_adv n images few")
    common.above_0(s, "p tau temperature width f_width")
    common.check_radius(s.eps)
    if s.p > 1 or s.bank % s.batch:
        raise UserError("--p is a probability, --bank a multiple of --batch")
    return args

def main(argv=None):
    args = get_args(argv)
    s, name = args.settings, args.dataset
    data, test = common.train_and_test(args, s.batch, s.images, 224 if name == "imagenet" else None)
    channels, side, _ = data.shape
    def others():
        load = partial(load_on_device, args, s.other, channels=channels, side=side)
        return load("train"), load("test")
    common.make_net(s.net, 1, data.shape, s.width)  # an error is said before any work
    run = common.Run("lifecycle_midrun", args, side)
    def learned(net_name, net, images, held_out, iterations, kind=Defence, **options):
        build = partial(net, int(images.y.max()) + 1, data.shape)
        network = common.train_classifier(run, net_name, build, images, iterations, **options)
        return Task(kind(network, s.k, *chains(), run.chunk), *held_out.some(s.images))
    def mask_task():
        masks = digits_among(args, data, "train"), digits_among(args, test, "test")
        return segmentation_task(run, learned("unet", UNet, *masks, s.u_iters, Segmenter))
    options = {"sgd": s.f_sgd, "augment": "crop_flip" if data.shape[0] == 3 else "none"}
    f_net, f_iters = partial(common.make_net, s.f_net, width=s.f_width), s.f_iters
    other_net = f_net
    if name == "imagenet":  # f has torchvision's weights
        f_iters = 0 if data.y.max() == 999 else s.f_iters  # of fewer classes f learns its last layer
        other_net = partial(common.make_net, "pretrained50", width=s.f_width)
    midrun = once(lambda: train_midrun(run, s, data))
    chains = once(lambda: chains_of(s, midrun()[0]))
    task = once(lambda: learned("f", f_net, data, test, f_iters, shared=True, **options))
    f = once(lambda: task().defence.f)
    noisy_task = once(lambda: learned("f-noisy", f_net, data, test, s.f_iters, noise=s.f_noise, **options))
    other_task = once(lambda: learned("f-other", other_net, *others(), s.f_iters, **options))
    score = once(lambda: train_score(run, s, data))
    features = once(lambda: common.feature_network(data, args.data_dir, f))
    attack = Attack(LInf(s.eps, s.step), s.n, s.h_adv, s.h_def)
    run.experiments(EXPERIMENTS, data=data, test=test, midrun=midrun, attack=attack, task=task,
                    noisy_task=noisy_task, other_task=other_task, mask_task=once(mask_task), score=score,
                    features=features)

if __name__ == "__main__":
    common.call(main)
