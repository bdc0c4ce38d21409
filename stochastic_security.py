r"""Stochastic security: random walks on a learned energy wash attacks out of images before classification.

Source: Mitchell 2022, "Adversarial Attacks and Defense using Energy-Based Image Models", chapter 2.

An attack changes an image so little that nobody sees it, and yet a naturally trained classifier f misreads
it. Here f stays as it is; what it gets to see is purified first. An energy U is a network that gives an
image one number, low for images like the training data. A chain starts at an image and takes many small
steps down the energy, each with some noise (Langevin dynamics). The chain forgets the small attack long
before the class. The source's energy is convergent: its chains stay realistic for thousands of steps. The
defended classifier is an expectation over random chains: attack and verdict must average many of them.

    U(x) = V(x) / T: energy, LOW = in-distribution; V is what the network returns, T the temperature
    Pixels in [0, 1] everywhere; networks scale to [-1, 1] inside. The source's tau is for [-1, 1]: halve it.
    (2.2)   V learns down the gradient of d = E_data[U] - E_chains[U], with chains held fixed.
    (2.3)   x <- x - tau^2/2 grad_x U(x) + tau z,  z ~ N(0, I): samples exp(-U); states are never clamped
    Alg. 2  The chains' states live in a bank, which begins as uniform noise and is never restarted. Adam
            comes first (short chains become realistic), then SGD for long ones (no gain in figures 2.8, 2.9).
    (2.4)   F(x) = E[f(P(x))], P(x): the state after K steps (2.3) from x.
            (2.5) F_H: mean logits of H chains.  (2.6) The prediction is argmax F_H(x).
    (2.10)  BPDA+EOT. EOT (expectation over transformation): the attack climbs the cross-entropy of F_H. BPDA
            (backward pass differentiable approximation): it takes the identity for P's derivative.
    Alg. 1  PGD (projected gradient descent): from a random point within eps of the image (the ball), N steps
            up the loss, each cut back into the ball and into [0, 1]. Each of the N + 1 states is judged by
            H_adv chains; if F_H is wrong, again by H_def fresh ones; if wrong again, the image is broken for
            good. Images misread before the attack are broken. A restart attacks the unbroken ones anew.
    (2.12)  Lyapunov exponent: of two chains with the same z, put back to distance d0 after every step, the
            mean log growth of their distance in a step; > 0: chaos. (2.13): noise eta tau.

Is BPDA right? V is piecewise linear (leaky ReLU): between kinks grad V does not change with x, so a chain
with given noise moves exactly as x does; at a kink it jumps. No derivative sees a jump, but the mean over the
noise makes a slope of jumps: E[P(x)] moves less than x. The whole-chain attack (not in the source) goes back
through all K steps, and takes for each derivative the difference between two starts as far apart as the noise
is long, with the kinks between them. Transfer: PGD images made for f alone.
Commands (all numbers: results/stochastic_security.md):
    python stochastic_security.py                     30 min of one core: robust accuracy .02, defended .82
    python stochastic_security.py --dataset mnist     10 min: 0 and .27 at eps .2 (whole chain not tried)
    python stochastic_security.py --dataset cifar10   no GPU: four classes, an hour; BPDA .53, whole chain .35
    python stochastic_security.py --only gradients    why the whole-chain attack sees more than BPDA
The log. d stays near 0; drift: a step's gradient part over its noise, below 1; spread: of the bank's pixels.
Differs: updates and switch follow Alg. 2 (published code: 250,000, 125,000, SGD an update earlier). AT on PGD
images makes these in eval mode; SVHN's begins with the first epoch, and its rate drops at 40, not 20 %.
Figure 2.2's long runs are 200 times --k-train steps (20,000; source: 100,000).
"""
import math
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import common  # before torch, so that Ctrl-C ends even its import quietly
import torch
import torch.nn.functional as F
from torch import nn

from common import Training, UserError, by_parts, fast_precision, follow, frozen_copy, input_gradient, once
from common import rate, repeat, seeded, value

# --- settings: a value for each column, or one for all of them; then what it is -----------------------------

SETTINGS = common.settings(
    columns=("glyphs symbols", "mnist", "cifar10 cifar100", "svhn", "cifar10-paper cifar100-paper",
             "svhn-paper", "cifar10-cpu"),
    smoke=dict(f_width=1, f_iters=3, at_iters=2, updates=6, switch=4, batch=4, bank=8, k_train=2, k=3,
               h_def=3, h_adv=2, n=2, images=8, few=4, width=0.125),
    first_class=(0, 0, 0, 0, 0, 0, 6, "CIFAR-10 on a CPU: this class and those after it, four of ten"),
    f_net=("small_cnn", "small_cnn", "wrn16", "wrn16", "wrn28", "wrn28", "small_cnn",
           "network (common.make_net)"),
    f_width=(1, 1, 4, 4, 10, 10, 2, "width of f; of wrn the widening factor"),
    f_iters=(300, 600, 6000, 6000, 50_000, 36_600, 1500, "updates of f, batch 100"),
    at_iters=(200, 600, 3000, 3000, 50_000, 36_600, 500, "updates of the AT baseline, by PGD of 10 steps"),
    f_sgd=(0.0, 0.0, 0.1, 0.01, 0.1, 0.01, 0.0, "rate of SGD for f, a tenth at 40 and 60 %; 0: Adam"),
    augment=("none", "none", "crop_flip", "crop", "crop_flip", "crop", "crop_flip", "of f's batches"),
    net=("light_ebm", "light_ebm; or gaussian, of the images' mean and covariance, a control"),
    width=(0.5, 0.5, 1.0, 1.0, 1.0, 1.0, 0.5, "of the light EBM; 1: 32 channels"),
    updates=(800, 2000, 8000, 8000, 150_000, 150_000, 2000, "J: updates of the energy"),
    switch=(600, 1500, 6000, 6000, 50_000, 50_000, 1500, "updates with Adam, before SGD"),
    adam_lr=(1e-4, 1e-4, 1e-4, 1e-4, 1e-4, 1e-4, 4e-4, "learning rate of Adam"),
    sgd_lr=(3e-2, 3e-2, 1e-3, 5e-4, 5e-5, 2.5e-5, 3e-3, "learning rate of SGD, on V"),
    batch=(64, 64, 100, 100, 100, 100, 64, "m: data images, and as many chains, in an update"),
    bank=(1024, 1024, 5000, 5000, 0, 0, 1024, "persistent states; 0: as many as training images"),
    k_train=(20, 20, 25, 50, 100, 100, 20, "Langevin steps of an update"),
    tau=(0.015, 0.015, 0.02, 0.00875, 0.005, 0.00875, 0.02, "noise of a Langevin step; half the source's"),
    temperature=(1e-4, 1e-4, 4e-4, 0.0175 ** 2 / 2, 5e-5, 0.0175 ** 2 / 2, 4e-4, "T; source: its tau^2 / 2"),
    data_noise=(0.03, 0.03, 0.04, 0.015, 0.01, 0.015, 0.04, "noise on the data in training"),
    k=(75, 100, 100, 500, 1500, 1500, 50, "K: Langevin steps of the defence"),
    h_def=(24, 24, 50, 50, 150, 150, 32, "chains of a verdict"),
    h_adv=(6, 6, 8, 8, 15, 15, 8, "chains of an attack's gradient"),
    n=(20, 20, 20, 20, 50, 50, 20, "N: steps of the attack"),
    eps=(0.08, 0.2, 8 / 255, 8 / 255, 8 / 255, 8 / 255, 8 / 255, "l_inf radius of the attack"),
    step=(0.02, 0.05, 2 / 255, 2 / 255, 2 / 255, 2 / 255, 2 / 255, "length of the attack's step"),
    restarts=(1, 1, 1, 1, 5, 5, 1, "starts of the attack, the first one included"),
    images=(60, 60, 200, 200, 10_000, 10_000, 60, "test images under attack"),
    few=(30, 30, 100, 100, 1000, 1000, 30, "of these, in figures 2.4, 2.5, 2.8; 2.9: 10 times, of training"),
)

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

# --- learning the energy: Algorithm 2 -----------------------------------------------------------------------

@seeded
def train_ebm(run, s, data, switch):
    """Algorithm 2 -> V. switch = s.updates: Adam throughout, the energy that is not convergent."""
    V = common.make_net("light_ebm", 1, data.shape, s.width).to(run.device)
    V_fast = frozen_copy(V)
    bank = torch.rand(s.bank or len(data) // s.batch * s.batch, *data.shape, device=run.device)
    adam = torch.optim.Adam(V.parameters(), s.adam_lr)
    sgd = torch.optim.SGD(V.parameters(), s.sgd_lr * s.temperature)  # undoes d's 1 / T; Adam ignores scale
    made_from = common.pick(s, "updates adam_lr sgd_lr batch bank k_train tau temperature data_noise")
    made_from.update(V=V, switch=switch, images=data)
    training = Training(run, f"ebm-{switch}", made_from, limits={"drift": 10},
                        advice="a lower --adam-lr or --sgd-lr", V=V, bank=bank, adam=adam, sgd=sgd)
    stream = common.batches(data, s.batch, run.seed, training.it, device=run.device)
    for it in training.updates(s.updates):
        x, _ = next(stream)
        x = x + s.data_noise * torch.randn_like(x)  # [m, C, S, S], not clamped
        rows = common.batch_index(len(bank), s.batch, run.seed + 1, it - 1).to(run.device)
        follow(V_fast, V)
        chains = langevin(bank[rows], s.k_train, V_fast, s.tau, s.temperature)
        bank[rows] = chains  # every state to its place
        with fast_precision(run.device):
            v_data, v_chains = V(torch.cat([x, chains]))[:, 0].float().chunk(2)
        d = (v_data.mean() - v_chains.mean()) / s.temperature  # its gradient is Eq. 2.2
        optimizer = adam if it <= switch else sgd
        optimizer.zero_grad(set_to_none=True)
        d.backward()
        optimizer.step()
        slope = input_gradient(V_fast, chains[:16]).square().mean().sqrt()
        drift = s.tau / (2 * s.temperature) * slope  # gradient's part over noise's
        training.log(d=d, drift=drift, spread=bank.std())
    return V

# --- attacks on a classifier --------------------------------------------------------------------------------

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

class L2(NamedTuple):
    """The l_2 ball, of figure 2.4."""
    eps: float
    step: float

    def start(self, x):
        """A random direction from x, its length uniform in [0, eps]."""
        length = self.eps * torch.rand(len(x), 1, device=x.device)
        moved = length * F.normalize(torch.randn_like(x).flatten(1))
        return (x + moved.view_as(x)).clamp(0, 1)

    def ascend(self, x, x0, gradient):
        """A step of this length up the loss, back into the ball around x0, then into [0, 1]."""
        moved = (x - x0).flatten(1) + self.step * F.normalize(gradient.flatten(1), eps=1e-30)
        return (x0 + moved.renorm(p=2, dim=0, maxnorm=self.eps).view_as(x)).clamp(0, 1)

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

# --- the defended classifier, and the attack on it: Algorithm 1 ---------------------------------------------

def stay(x, steps):
    """No chain at all."""
    return x

@dataclass
class Defence:
    """F_H of Eq. 2.5: mean logits of f at the ends of H chains of K steps. Defence(f): f alone, H = 1."""
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
        """Eq. 2.6 with H fresh chains -> classes [B]."""
        return self.logits(x, H).mean(0).argmax(1)

    def gradient(self, x, y, H, whole=False):
        """F_H [B, classes], and its loss' gradient in x: by BPDA (Eq. 2.10), or through the whole chain."""
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
    """Settings of Algorithm 1. whole: as in Defence.gradient."""
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
    """Algorithm 1 on images x0 [n, C, S, S] with labels y -> Outcome. Resumable."""
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

# --- evaluation ---------------------------------------------------------------------------------------------

def defend(run, s, f, V, fast=True):
    """f behind chains of the energy V."""
    settings = {"V": frozen_copy(V, fast), "tau": s.tau, "T": s.temperature}
    chain, path = partial(langevin, **settings), partial(langevin_path, **settings)
    return Defence(f, s.k, chain, path, partial(pull_back, **settings), run.chunk)

def frechet_distance(mean1, cov1, mean2, cov2):
    """||m1 - m2||^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2) of two Gaussians, float64 [d], [d, d]."""
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return ((mean1 - mean2).pow(2).sum() + cov1.trace() + cov2.trace() - 2 * cross).item()

def lyapunov_step(pair, V, tau, T, eta, d0):
    """A step of two chains with the same noise; then the second goes back to l_2 distance d0 of the first.
    pair: states x, y [B, C, S, S], and the sum of log growths [B]."""
    x, y, growth = pair
    noise = eta * tau * torch.randn_like(x)
    x, y = (downhill(torch.cat([x, y]), V, tau, T) + torch.cat([noise, noise])).chunk(2)
    distance = (y - x).flatten(1).norm(dim=1).clamp(min=1e-30)
    y = x + (y - x) * (d0 / distance).view(-1, 1, 1, 1)
    return x, y, growth + (distance / d0).log()

def lyapunov(x, steps, V, tau, T, eta, d0):
    """Eq. 2.12: maximal exponent per step of each chain from x [B, C, S, S]; noise: eta tau -> [B].
    A third as many steps come first, uncounted: pairs turn to the direction that grows most."""
    direction = F.normalize(torch.randn_like(x).flatten(1)).view_as(x)
    zero = torch.zeros(len(x), device=x.device)
    x, y, _ = repeat(lyapunov_step, (x, x + d0 * direction, zero), steps // 3, V, tau, T, eta, d0)
    _, _, growth = repeat(lyapunov_step, (x, y, zero), steps, V, tau, T, eta, d0)
    return growth / steps

def rates(title, outcome, **beside):
    """Rows of natural and robust accuracy."""
    a = outcome.attack
    return [
        rate(f"natural acc{title}", outcome.natural, **beside),
        rate(f"robust acc{title}", outcome.robust, eps=a.ball.eps, N=a.N, H_adv=a.H_adv, **beside),
    ]

def table_2_1(s, f, defence, x, y, transferred):
    """Natural images and PGD images of f (transfer) at K = 0, 10 and the defence's."""
    rows = []
    short = replace(defence, K=10)
    for title, defended in ((", no chain", Defence(f)), (", short chain", short), ("", defence)):
        natural = defended.predict(x, s.h_def) == y
        attacked = defended.predict(transferred, s.h_def) == y
        rows.append(rate(f"natural acc{title}", natural, K=defended.K))
        rows.append(
            rate(f"robust acc, transfer PGD{title}", natural & attacked, K=defended.K, eps=s.eps)
        )
    return rows

def table_2_2(run, s, f, f_at, defence, x, y, attack, transferred, bpda):
    """Each attack and the worst, beside AT. Fresh chains: natural acc may differ from table 2.1's."""
    whole = eot_attack(run, defence, x, y, attack._replace(whole=True))
    transfer = defence.predict(transferred, s.h_def) == y
    rows = [rate("natural acc", bpda.natural, K=s.k)]
    for title, outcome in ((", BPDA+EOT", bpda), (", whole chain", whole)):
        rows.append(rates(title, outcome)[1])
    rows.append(rate("robust acc, transfer PGD", bpda.natural & transfer, eps=s.eps, N=s.n))
    rows.append(rate("robust acc, worst of these", bpda.robust & whole.robust & transfer, eps=s.eps))
    one = attack._replace(H_adv=1, H_def=1)  # without chains there is nothing to average
    for title, net in ((", f", f), (", AT", f_at)):
        rows += rates(title, eot_attack(run, Defence(net), x, y, one))
    return rows

def seconds_of(function, *arguments):
    """How long function(*arguments) -> a tensor takes, the second time: the first one warms up."""
    for _ in range(2):
        start = time.time()
        function(*arguments).sum().item()  # waits for the device
    return time.time() - start

@seeded
def mean_end(run, defence, x, steps):
    """Mean of 16 chains of each image; always with the same noise."""
    return defence.purify(x, 16, steps).unflatten(0, (16, len(x))).mean(0)

def gradients(run, s, defence, x, y, attack):
    """Share of a change that survives chains (BPDA: 1); loss along each gradient; what each attack leaves."""
    x, y = x[: s.few], y[: s.few]
    rows, seconds = [], {}
    noise = torch.randn_like(x)
    for kind, direction in (("white", noise), ("smooth", F.avg_pool2d(noise, 7, 1, 3))):
        change = s.eps / 2 * direction.sign()
        for steps in (0, *common.multiples(s.k, (1 / 30, 1 / 10, 1 / 3, 1))):
            left = mean_end(run, defence, x + change, steps) - mean_end(run, defence, x, steps)
            share = (left * change).sum() / change.square().sum()
            rows.append(value(f"share left of a {kind} change", share.item(), steps=steps))
    start = attack.ball.start(x)
    for name, whole in (("BPDA", False), ("whole chain", True)):
        climb = lambda: defence.gradient(start, y, s.h_adv, whole)[1]
        direction, seconds[name] = climb().sign(), seconds_of(climb)
        for length in (0, s.eps / 4, s.eps / 2, s.eps):
            torch.manual_seed(run.seed)  # the same noise for all of them
            F_H = defence.logits(start + length * direction, 2 * s.h_def).mean(0)
            rows.append(value(f"loss, {name}", F.cross_entropy(F_H, y).item(), length=length))
        outcome = eot_attack(run, defence, x, y, attack._replace(whole=whole, restarts=1))
        for N in range(0, s.n + 1, max(s.n // 4, 1)):
            rows.append(rate(f"robust acc, {name}", outcome.record[N + 1], N=N))
    rows.append(value("time, whole chain / BPDA", seconds["whole chain"] / seconds["BPDA"]))
    run.lines("gradients", rows, "steps length N")
    return rows

def figure_2_2(run, s, data, ebm, adam_ebm):
    """Short-run states (from noise) and long-run ones (from data) of the convergent energy and of Adam's."""
    images = data.take(slice(0, 8))
    short = max(s.k_train, 400)  # training takes fewer, but from states of the bank
    long = 200 * s.k_train
    pictures, rows = {"data": images}, []
    for title, V in (("convergent", ebm), ("non-convergent", adam_ebm)):
        chain = partial(langevin, V=frozen_copy(V), tau=s.tau, T=s.temperature)
        end = chain(images, long)
        pictures[f"{title}: {short} steps from noise"] = chain(torch.rand_like(images), short)
        pictures[f"{title}: {long} steps from data"] = end
        moved = (end - images).abs().mean().item()
        rows.append(value(f"long run: mean |x - data|, {title}", moved, steps=long))
    run.pictures("figure2.2", pictures, 8)
    return rows

def margin(logits, y):
    """The label's logit minus the largest other: [B, classes], [B] -> [B]."""
    others = logits.scatter(1, y[:, None], -math.inf)
    return logits.gather(1, y[:, None])[:, 0] - others.amax(1)

def figure_2_3(run, s, defence, y, bpda):
    """Margins of F_H of a borderline and a clear image after the attack: what few chains would say."""
    logits = defence.logits(bpda.x, s.h_def)  # [H_def, n, classes]
    F_H = logits.mean(0)
    same = logits.softmax(2).mean(0).argmax(1) == F_H.argmax(1)
    rows, panels = [rate("mean softmax outputs (sec. 2.5.1) give the same class", same)], {}
    order = margin(F_H, y).abs().argsort()
    for name, i in (("borderline", order[0]), ("clear", order[-1])):
        chains = defence.logits(bpda.x[i : i + 1], 30 * s.h_def)[:, 0]  # [30 H_def, classes]
        margins = {}
        for H in (1, s.h_adv, s.h_def):
            full = len(chains) // H * H
            groups = chains[:full].unflatten(0, (-1, H))  # of H chains each
            above = margin(groups.mean(1), y[i].expand(len(groups)))
            margins[f"H = {H}"] = above
            rows.append(rate(f"wrong F_H, {name} image", above < 0, H=H))
        panels[f"{name} image: logit of its class - largest other"] = margins
    run.histograms("figure2.3", panels)
    return rows

def figure_2_4(run, s, f, f_at, defence, x, y, attack):
    """Accuracy against eps in l_inf and l_2: the defence under BPDA+EOT, AT and f under PGD."""
    x, y = x[: s.few], y[: s.few]
    both = []
    for norm, Ball, radius in (("l_inf", LInf, s.eps), ("l_2", L2, 1.0)):
        rows = []
        for title, defended in (("EBM", defence), ("AT", Defence(f_at)), ("f", Defence(f))):
            for factor in (0.25, 0.5, 1, 1.5, 2):
                ball = Ball(factor * radius, factor * radius / 4)
                a = attack._replace(ball=ball, restarts=1)
                outcome = eot_attack(run, defended, x, y, a)
                rows.append(rate(f"robust acc, {title}, {norm}", outcome.robust, eps=ball.eps))
        run.lines(f"figure2.4-{norm}", rows, "eps", ylim=(0, 1.02))
        both += rows
    return both

def figure_2_5(run, s, f_at, defence, x, y, attack):
    """More attacker: five times the steps N with a third more chains; and the number of chains H_adv."""
    x, y = x[: s.few], y[: s.few]
    over_N, over_H = [], []
    a = attack._replace(N=5 * s.n, H_adv=round(4 / 3 * s.h_adv), restarts=1)
    for title, defended in (("EBM", defence), ("AT", Defence(f_at))):
        outcome = eot_attack(run, defended, x, y, a)
        for N in range(0, a.N + 1, s.n):
            over_N.append(rate(f"robust acc over N, {title}", outcome.record[N + 1], N=N))
    for H in common.multiples(s.h_adv, (0, 1 / 3, 1, 2)):
        a = attack._replace(H_adv=H, restarts=1)
        over_H += rates(", EBM", eot_attack(run, defence, x, y, a))
    run.lines("figure2.5-N", over_N, "N", ylim=(0, 1.02))
    run.lines("figure2.5-H", over_H, "H_adv", ylim=(0, 1.02))
    return over_N + over_H

@torch.no_grad()
def figure_2_6(run, s, ebm, x, transferred, bpda):
    """Energies of images that were attacked: natural, adversarial, with noise; how often U rises."""
    attacked = bpda.natural | ~bpda.natural.any()  # smoke: all are misread
    signs = (torch.rand_like(x) - 0.5).sign()
    sets = {
        "natural": x,
        "transfer PGD": transferred,
        "BPDA+EOT": bpda.x,
        "random signs": (x + s.eps * signs).clamp(0, 1),
        "uniform noise": torch.rand_like(x),
    }
    U, rows = {}, []
    for name, images in sets.items():
        U[name] = ebm(images[attacked])[:, 0] / s.temperature
        rows.append(value(f"mean U, {name}", U[name].mean().item()))
        if name != "natural":
            higher = U[name] > U["natural"]
            rows.append(rate(f"U above the natural image's, {name}", higher))
    near = dict(list(U.items())[:4])
    run.histograms("figure2.6", {"energy U": U, "energy U, without noise": near})
    return rows

def figure_2_7(run, s, ebm, x):
    """Maximal Lyapunov exponent against the noise eta, for several distances d0, and steady-state samples."""
    V = frozen_copy(ebm, fast=False)  # bfloat16 would round d0 away
    rows, pictures = [], {}
    for eta in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0):
        tau, T = eta * s.tau, eta**2 * s.temperature  # Eq. 2.13: noise eta tau, the same gradient part
        settled = langevin(x[:16], 10 * s.k, V, tau, T)
        pictures[f"eta = {eta}: {10 * s.k} steps from data"] = settled
        for d0 in (0.01, 0.1, 1.0):  # l_2, in [0, 1] pixels
            exponents = lyapunov(settled, 3 * s.k, V, s.tau, s.temperature, eta, d0)
            rows.append(value(f"exponent a step, d0 = {d0}", exponents.mean().item(), eta=eta))
    run.lines("figure2.7", rows, "eta", xscale="log")
    run.pictures("figure2.7-samples", pictures, 16)
    return rows

def figure_2_8(run, s, defence, adam_defence, x, y, attack):
    """Natural and robust accuracy against K: convergent energy, and one trained by Adam throughout."""
    rows, pictures = [], {"natural": x[:16]}
    a = attack._replace(restarts=1)
    for title, defended in (("convergent", defence), ("non-convergent", adam_defence)):
        for K in common.multiples(s.k, (1 / 10, 1 / 3, 1, 3)):
            outcome = eot_attack(run, replace(defended, K=K), x[: s.few], y[: s.few], a)
            rows += rates(f", {title}", outcome, K=K)
            pictures[f"{title}, {K} steps"] = defended.chain(x[:16], K)
    run.lines("figure2.8", rows, "K", ylim=(0, 1.02), xscale="log")
    run.pictures("figure2.8-samples", pictures, 16)
    return rows

def figure_2_9(run, s, data, defence, adam_defence, features):
    """Frechet distance to the data after k steps from training images, for both energies."""
    metric, network = features
    n = min(10 * s.few, len(data) // 2)
    reference = common.feature_statistics(network, data.take(slice(n, 2 * n)))
    rows = []
    for title, defended in (("convergent", defence), ("non-convergent", adam_defence)):
        x, done = data.take(slice(0, n)), 0
        for k in [0, *common.multiples(s.k, (0.1, 0.3, 1, 3, 10, 30))]:
            x = by_parts(partial(defended.chain, steps=k - done), x, run.chunk)
            done = k
            here = common.feature_statistics(network, x.clamp(0, 1))
            rows.append(value(f"{metric}, {title}", frechet_distance(*reference, *here), steps=k, n=n))
    run.lines("figure2.9", rows, "steps", xscale="symlog")
    return rows

def figure_2_10(run, s, f, x, y):
    """Cost of Langevin steps: the plain float32 loop, the fast path; of a PGD step on f (sec. 2.12)."""
    size, steps = (4, 2) if run.smoke else (100, 150)
    V = common.make_net("light_ebm", 1, x.shape[1:], s.width).to(run.device)  # untrained
    x, y = x[:1].repeat(size, 1, 1, 1), y[:1].repeat(size)
    rows, speeds = [], []
    for title, fast in (("plain float32", False), ("fast path", True)):
        speed = size * steps / seconds_of(langevin, x, steps, frozen_copy(V, fast), s.tau, s.temperature)
        speeds.append(speed)
        rows.append(value(f"images x steps / s, {title}", speed, batch=size))
    rows.append(value("fast path / plain float32", speeds[1] / speeds[0]))
    long_chains = 100 * 1500 / speeds[1]
    rows.append(value("seconds for a batch of long chains", long_chains, batch=100, steps=1500))
    each = seconds_of(pgd, f, x, y, 5, LInf(s.eps, s.step)) / 5
    rows.append(value("a step of PGD on f / a Langevin step", each * speeds[1] / size))
    return rows

def precision(run, s, f, ebm, x, y, attack):
    """The same attack on the same images with chains in bfloat16 (where hardware has it) and in float32."""
    rows = []
    a = attack._replace(restarts=1)
    for title, fast in ((", fast path", True), (", float32", False)):
        defence = defend(run, s, f, ebm, fast)
        rows += rates(title, eot_attack(run, defence, x, y, a))
        rows += rates(f"{title}, whole chain", eot_attack(run, defence, x, y, a._replace(whole=True)))[1:]
    return rows

EXPERIMENTS = common.experiments(  # main() hands each what its parameters name
    headline=[table_2_1, table_2_2, figure_2_6],
    others=[gradients, figure_2_2, figure_2_3, figure_2_4, figure_2_5, figure_2_7, figure_2_8,
            figure_2_9, figure_2_10, precision],
)

# --- command line -------------------------------------------------------------------------------------------

def get_args(argv=None):
    args = common.parse_args(__doc__, SETTINGS, EXPERIMENTS, argv)
    s = args.settings
    common.at_least(1, s, "f_iters at_iters updates batch k_train h_def h_adv n restarts images few")
    common.above_0(s, "tau temperature width f_width")
    common.check_radius(s.eps)
    if s.bank % s.batch or s.net not in ("light_ebm", "gaussian"):
        raise UserError("--bank must be a multiple of --batch, --net light_ebm or gaussian")
    return args

def main(argv=None):
    args = get_args(argv)
    s = args.settings
    data, test = common.train_and_test(args, s.batch, s.images)
    classes = common.IN_MEMORY[args.dataset][2] - s.first_class
    build = partial(common.make_net, s.f_net, classes, data.shape, s.f_width)
    build()  # a bad width fails here, not after an hour
    common.make_net("light_ebm", 1, data.shape, s.width)
    run = common.Run("stochastic_security", args)
    x, y = test.some(s.images)
    ball = LInf(s.eps, s.step)
    attack = Attack(ball, s.n, s.h_adv, s.h_def, s.restarts)
    train_f = partial(common.train_classifier, run, build=build, data=data, sgd=s.f_sgd, augment=s.augment)
    adversary = partial(pgd, steps=10, ball=LInf(s.eps, s.eps / 4))
    f = once(lambda: train_f("f", iterations=s.f_iters, shared=True))
    f_at = once(lambda: train_f("f-at", iterations=s.at_iters, adversary=adversary))
    gaussian = common.GaussianEnergy(data, s.data_noise, s.temperature) if s.net == "gaussian" else None
    ebm = once(lambda: gaussian or train_ebm(run, s, data, s.switch))
    adam_ebm = once(lambda: train_ebm(run, s, data, s.updates))
    defence = once(lambda: defend(run, s, f(), ebm()))
    adam_defence = once(lambda: defend(run, s, f(), adam_ebm()))
    transferred = once(lambda: pgd(f(), x, y, s.n, ball))
    bpda = once(lambda: eot_attack(run, defence(), x, y, attack))
    features = once(lambda: common.feature_network(data, args.data_dir, f))
    run.experiments(EXPERIMENTS, data=data, x=x, y=y, f=f, f_at=f_at, ebm=ebm, adam_ebm=adam_ebm,
                    defence=defence, adam_defence=adam_defence, attack=attack, transferred=transferred,
                    bpda=bpda, features=features)

if __name__ == "__main__":
    common.call(main)
