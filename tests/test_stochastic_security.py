"""stochastic_security.py: the chain, Algorithm 2, Algorithm 1, attacks, exponents, and the script as a whole."""
import csv
import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import stochastic_security as ss
from common import Diverged, UserError
from stochastic_security import Defence, Sampler, algorithm_1, ascend, attack_f, langevin_step, lyapunov


class Quadratic(nn.Module):
    """V(x) = T |x - centre|^2 / 2, so that U is an isotropic Gaussian's."""

    def __init__(self, temperature=1.0, centre=0.0):
        super().__init__()
        self.scale, self.centre = nn.Parameter(torch.tensor(float(temperature))), centre

    def forward(self, x):
        return (self.scale * (x - self.centre).pow(2).flatten(1).sum(1) / 2)[:, None]


def zeros(x):
    return torch.zeros_like(x)


def same_for_all(x):
    """Noise that depends on the pixel and not on the image or its place in the batch."""
    g = torch.Generator().manual_seed(5)
    return torch.randn(1, *x.shape[1:], generator=g).expand_as(x)


def ebm(width=4, side=28, seed=0):
    torch.manual_seed(seed)
    return common.LightEBM(width, 1, side)


def classifier(seed=0):
    torch.manual_seed(seed)
    return common.SmallCNN(4).eval()


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def fake_lab(tmp_path, x, y, **changes):
    """What algorithm_1 asks of a Lab."""
    s = dataclasses.replace(ss.SETTINGS["glyphs"]["smoke"], images=len(x), **changes)
    return SimpleNamespace(s=s, x=x, y=y, run=SimpleNamespace(folder=tmp_path), made_with={"seed": 0},
                           args=SimpleNamespace(seed=0), right=lambda prediction, index: prediction == y[index])


def lab_of(tmp_path, *flags, name="runs"):
    argv = ["--budget", "smoke", "--out", str(tmp_path / name), "--device", "cpu", *map(str, flags)]
    return ss.Lab(ss.get_args(argv))


# --- the chain ---


def test_stationary_variance_of_the_ornstein_uhlenbeck_chain(exact):
    """U = |x|^2 / 2: variance 1 / (1 - tau^2 / 4), mean 0, from any start; states leave [0, 1] freely."""
    tau, temperature = 1.0, 0.3
    x, _ = Sampler(Quadratic(temperature), tau, temperature)(torch.full((5000, 1, 2, 2), 4.0), 60)
    n = x.numel()
    assert abs(x.mean().item()) < 4 * math.sqrt(1.34 / n)
    assert abs(x.var().item() - 1 / (1 - tau ** 2 / 4)) < 4 * 1.34 * math.sqrt(2 / n)
    assert x.min() < -1 and x.max() > 2


def test_a_step_is_eq_2_3_and_in_the_thesis_range_its_step(exact):
    """With the published tau and T the step in [-1, 1] is x - grad V + .01 z (D3)."""
    V, x, z = ebm(), torch.rand(3, 1, 28, 28), torch.randn(3, 1, 28, 28)
    s = ss.PAPER
    moved, norm = langevin_step(V, x, z, s.tau, s.temperature)
    x.requires_grad_(True)
    gradient, = torch.autograd.grad(V(x).sum(), x)
    assert torch.allclose(moved, x - s.tau ** 2 / (2 * s.temperature) * gradient + s.tau * z, atol=1e-7)
    assert torch.allclose(norm, gradient.flatten(1).norm(dim=1))
    wide = (2 * x - 1).detach().requires_grad_(True)                            # the thesis' pixels
    gradient, = torch.autograd.grad(V.body(wide).sum(), wide)
    assert torch.allclose(2 * moved - 1, wide - gradient + 0.01 * z, atol=1e-6)
    assert all(p.grad is None for p in V.parameters())


def test_svhn_has_a_tau_and_a_temperature_of_its_own():
    """D6: V's scale is tied to tau; with both changed the step in [-1, 1] is grad V again."""
    for s in (ss.PAPER, ss.SVHN):
        assert 4 * s.tau ** 2 / (2 * s.temperature) == pytest.approx(1)         # x4: V(2x - 1), and x = (w + 1) / 2


def test_the_fast_path_is_the_plain_loop_within_rounding():
    V, x = ebm(16), torch.rand(6, 1, 28, 28)
    plain, quick = (Sampler(V, 0.015, 1e-4, fast, noise=same_for_all)(x, 20) for fast in (False, True))
    noise_only = Sampler(Quadratic(0.0), 0.015, 1e-4, False, noise=same_for_all)(x, 20)[0]
    way = (plain[0] - noise_only).norm()                                        # what the gradient did
    assert (plain[0] - quick[0]).norm() < 0.05 * way
    assert quick[1].item() == pytest.approx(plain[1].item(), rel=0.03)
    assert quick[0].dtype == torch.float32
    if common.bfloat16_units("cpu"):
        assert next(Sampler(V, 1, 1).V.parameters()).dtype == torch.bfloat16
    assert next(Sampler(V, 1, 1, fast=False).V.parameters()).dtype == torch.float32


def test_a_sampler_follows_its_network_in_place(exact):
    V = ebm()
    sampler, x = Sampler(V, 0.01, 1e-4, noise=zeros), torch.rand(2, 1, 28, 28)
    before, tensors = sampler(x, 2)[0], [p.data_ptr() for p in sampler.V.parameters()]
    with torch.no_grad():
        for p in V.parameters():
            p.mul_(3)
    assert torch.equal(sampler(x, 2)[0], before)                                # a copy ...
    sampler.follow()
    assert not torch.allclose(sampler(x, 2)[0], before)                         # ... that follows when told
    assert tensors == [p.data_ptr() for p in sampler.V.parameters()]


def test_padding_of_recorded_steps_changes_nothing(exact, monkeypatch):
    """The bookkeeping of the CUDA path, with a recording that is just the function."""
    monkeypatch.setattr(common, "captured", lambda once: once)
    V = ebm()
    plain, replayed = (Sampler(V, 0.015, 1e-4, noise=same_for_all) for _ in range(2))
    replayed.replay = True
    for n in (7, 50, 51, 120, 7):
        x = torch.rand(n, 1, 28, 28)
        (a, norm_a), (b, norm_b) = plain(x, 3), replayed(x, 3)
        assert torch.allclose(a, b, atol=1e-6) and norm_a.item() == pytest.approx(norm_b.item(), rel=1e-4)
    assert sorted(replayed.ready) == [50, 100, 200] and list(plain.ready) == [7]
    kept = b.clone()
    replayed(torch.rand(7, 1, 28, 28), 3)
    assert torch.equal(b, kept)                                                 # not a view of the buffer


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_captured_steps_are_the_plain_loop_on_a_gpu(exact):
    V, x = ebm().cuda(), torch.rand(7, 1, 28, 28, device="cuda")
    plain, replayed = (Sampler(V, 0.015, 1e-4, fast, noise=zeros)(x, 5)[0] for fast in (False, True))
    assert torch.allclose(plain, replayed, atol=1e-5)
    one, two = (Sampler(V, 0.015, 1e-4)(x, 5)[0] for _ in range(2))
    assert not torch.allclose(one, two)                                         # fresh noise in each replay


# --- Algorithm 2 ---


class Counting:
    """In place of Sampler: adds one to every state it is given."""

    def __init__(self, V, *_, **__):
        self.V = V

    def follow(self):
        pass

    def __call__(self, x, steps):
        return x + 1, torch.tensor(0.1)


def test_the_bank_takes_every_state_back_to_its_place_each_equally_often(tmp_path, monkeypatch):
    monkeypatch.setattr(ss, "Sampler", Counting)
    lab = lab_of(tmp_path, "--bank", 12, "--batch", 4, "--updates", 9, "--switch", 9, "--save-every", 9)
    ss.train_ebm(lab)
    bank = torch.load(lab.run.folder / "ebm.pt", weights_only=True)["bank"]
    torch.manual_seed(0)
    common.make_net("light_ebm", 1, (1, 28, 28), lab.s.width)
    assert torch.allclose(bank, torch.rand(12, 1, 28, 28) + 3)                  # 9 x 4 draws of 12: three each


class Still(Counting):
    def __call__(self, x, steps):
        return x, torch.tensor(0.1)


def test_sgd_rate_is_for_V_and_data_are_pulled_down(exact, tmp_path, monkeypatch):
    """D2, and the sign of Eq. 2.2: w - lr * d/dw (mean V(data) - mean V(chains))."""
    monkeypatch.setattr(ss, "Sampler", Still)
    lab = lab_of(tmp_path, "--updates", 1, "--switch", 0, "--sgd-lr", 0.5, "--data-noise", 0)
    V = ss.train_ebm(lab)[0]
    torch.manual_seed(0)
    reference = common.make_net("light_ebm", 1, (1, 28, 28), lab.s.width)
    bank = torch.rand(8, 1, 28, 28)
    chains = bank[common.batch_index(8, 4, 1, 0)]
    x = next(common.batches(lab.data, 4, 0))[0]
    (reference(x).mean() - reference(chains).mean()).backward()
    for p, q in zip(V.parameters(), reference.parameters()):
        assert torch.allclose(p, q - 0.5 * q.grad, atol=1e-6)


def test_adam_before_the_switch_sgd_after(tmp_path, monkeypatch):
    made, Adam, SGD = [], torch.optim.Adam, torch.optim.SGD
    lab = lab_of(tmp_path)
    monkeypatch.setattr(torch.optim, "Adam", lambda p, lr: made.append(("Adam", lr)) or Adam(p, lr))
    monkeypatch.setattr(torch.optim, "SGD", lambda p, lr: made.append(("SGD", lr)) or SGD(p, lr))
    steps, step = [], Adam.step
    monkeypatch.setattr(Adam, "step", lambda self, *a: steps.append(1) or step(self, *a))
    V, rows, snapshots = ss.train_ebm(lab)
    s = lab.s
    assert len(steps) == s.switch
    assert made == [("Adam", s.adam_lr), ("SGD", pytest.approx(s.sgd_lr * s.temperature))]
    assert rows[-1]["it"] == s.updates and s.switch in [snapshot["it"] for snapshot in snapshots]
    assert torch.equal(snapshots[-1]["V"]["body.0.weight"], V.state_dict()["body.0.weight"])
    made.clear()
    ss.train_ebm(lab, "ebm-adam", switch=s.updates)
    assert made == [("Adam", s.adam_lr)]


def test_training_lowers_the_energy_of_data(tmp_path, monkeypatch):
    monkeypatch.setattr(ss, "Sampler", Still)
    lab = lab_of(tmp_path, "--updates", 30, "--switch", 30, "--adam-lr", 1e-3, "--log-every", 10)
    rows = ss.train_ebm(lab)[1]
    assert rows[-1]["d"] < min(rows[0]["d"], 0)


class Killed(Exception):
    pass


def test_interrupted_training_goes_on_bit_exactly(tmp_path, monkeypatch):
    flags = ("--updates", 7, "--switch", 3, "--save-every", 2, "--log-every", 3)
    whole = ss.train_ebm(lab_of(tmp_path, *flags, name="whole"))
    calls = []

    class Dying(Sampler):
        def __call__(self, x, steps):
            calls.append(steps)
            if steps == 2 and calls.count(2) == 1 + stop:   # one more: the warm-up of the estimate
                raise Killed
            return super().__call__(x, steps)
    monkeypatch.setattr(ss, "Sampler", Dying)
    for stop in (3, 4):                                     # at update 3, then at update 6
        calls.clear()
        with pytest.raises(Killed):
            ss.train_ebm(lab_of(tmp_path, *flags, name="broken"))
    monkeypatch.undo()
    broken = ss.train_ebm(lab_of(tmp_path, *flags, name="broken"))
    for p, q in zip(whole[0].parameters(), broken[0].parameters()):
        assert torch.equal(p, q)
    banks = [torch.load(tmp_path / name / "stochastic_security-glyphs" / "ebm.pt", weights_only=True)["bank"]
             for name in ("whole", "broken")]
    assert torch.equal(*banks)
    plain = [[{k: v for k, v in row.items() if k != "seconds"} for row in run[1]] for run in (whole, broken)]
    assert plain[0] == plain[1]


def test_runaway_chains_stop_training_with_advice(tmp_path):
    with pytest.raises(Diverged, match="lower --adam-lr"):
        ss.train_ebm(lab_of(tmp_path, "--adam-lr", 1.0, "--updates", 40, "--switch", 40))
    with open(tmp_path / "runs" / "stochastic_security-glyphs" / "log-ebm.csv") as f:
        assert int(list(csv.DictReader(f))[-1]["it"]) < 40


# --- attacks ---


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_attacks_stay_in_the_ball_and_in_the_box(norm):
    x0, x, eps = torch.rand(6, 1, 8, 8), None, 0.3

    def inside(x):
        moved = (x - x0).flatten(1)
        size = moved.abs().amax(1) if norm == "inf" else moved.norm(dim=1)
        assert x.min() >= 0 and x.max() <= 1 and (size <= eps + 1e-6).all() and size.max() > eps / 10
    x = ss.random_start(x0, eps, norm)
    inside(x)
    for _ in range(6):
        x = ascend(x, x0, torch.randn_like(x), 0.2, eps, norm)
        inside(x)
    assert torch.equal(ascend(x0, x0, torch.zeros_like(x), 0.2, eps, norm), x0)
    assert torch.equal(ascend(x, x0, torch.randn_like(x), 0.2, 0.0, norm), x0)


def test_l2_step_has_its_length_whatever_the_gradients_scale():
    x0 = torch.full((3, 1, 8, 8), 0.5)
    for scale in (1e-12, 1.0, 1e12):
        moved = ascend(x0, x0, scale * torch.randn_like(x0), 0.2, 1.0, "2") - x0
        assert torch.allclose(moved.flatten(1).norm(dim=1), torch.full((3,), 0.2), atol=1e-6)


@pytest.mark.parametrize("x", [torch.rand(2, 1, 28, 28) * 2 - 1, torch.rand(2, 1, 28, 28) * 255])
def test_attacks_refuse_images_outside_the_range(tmp_path, x):
    y = classifier()(x).argmax(1)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        attack_f(classifier(), x, y, 1, 0.1, 0.1)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        algorithm_1(fake_lab(tmp_path, x, y), "a", Defence(classifier()))


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_bpda_without_a_chain_is_pgd_of_torchattacks(exact, tmp_path, monkeypatch, norm):
    torchattacks = pytest.importorskip("torchattacks")
    f, x = classifier(), torch.rand(12, 1, 28, 28)
    y, eps, step, n = f(x).argmax(1), 0.02, 0.006, 5
    oracle = torchattacks.PGD(f, eps, step, n, random_start=False) if norm == "inf" else \
        torchattacks.PGDL2(f, eps, step, n, random_start=False)
    theirs = oracle(x, y)
    monkeypatch.setattr(ss, "random_start", lambda x, eps, norm: x)
    lab = fake_lab(tmp_path, x, y, eps=eps, step=step, n=n)
    record, bpda = algorithm_1(lab, "a", Defence(f), norm=norm)
    if norm == "inf":
        assert torch.allclose(attack_f(f, x, y, n, step, eps), theirs, atol=1e-6)
    assert (theirs != x).any() and record[-1].any() and torch.allclose(bpda[record[-1]], theirs[record[-1]], atol=1e-6)


def test_attack_leaves_grad_and_mode_alone():
    f, seen = classifier().train(), []
    f.register_forward_hook(lambda *_: seen.append(f.training))
    attack_f(f, torch.rand(4, 1, 28, 28), torch.zeros(4, dtype=torch.long), 3, 0.1, 0.1)
    assert f.training and seen == [False] * 3 and all(p.grad is None for p in f.parameters())


def test_the_baseline_trains_on_attacked_images(tmp_path, monkeypatch):
    lab, seen = lab_of(tmp_path), []

    def spy(f, x, y, **how):
        seen.append((how, f.training))
        return attack_f(f, x, y, **how)
    monkeypatch.setattr(ss, "attack_f", spy)
    f, at = ss.train_f(lab), ss.train_f(lab, 0.2)
    assert [how for how, _ in seen] == [{"steps": 10, "step": 0.05, "eps": 0.2}] * lab.s.at_iters
    assert not f.training and not at.training


# --- the defended classifier ---


class Mean(nn.Module):
    """Two logits: the mean of the image, and 0."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        m = self.w * x.flatten(1).mean(1)
        return torch.stack([m, 0 * m], 1)


def test_replicates_of_distinct_images_are_never_mixed(exact):
    x = torch.linspace(0, 1, 9).view(9, 1, 1, 1).expand(9, 1, 4, 4).contiguous()
    sampler = Sampler(Quadratic(0.0), 1e-4, 1.0)
    for chunk in (1, 4, 7, 100):
        defence = Defence(Mean(), 3, sampler, chunk=chunk)
        chains = defence.chains(x, 5)                                           # [5, 9, 2]
        assert chains.shape == (5, 9, 2)
        assert torch.allclose(chains[:, :, 0], x[:, 0, 0, 0].expand(5, 9), atol=1e-3)
        logits, gradient = defence.gradient(x, torch.zeros(9, dtype=torch.long), 5)
        assert torch.allclose(logits[:, 0], x[:, 0, 0, 0], atol=1e-3)
        expected = -(1 - torch.sigmoid(x[:, 0, 0, 0])) / 16 / 5                 # dCE/dx, over pixels and chains
        assert torch.allclose(gradient[:, 0, 0, 0], expected, atol=1e-4)


def test_F_H_is_the_mean_of_logits_of_independent_chains(exact):
    defence = Defence(Mean(), 2, Sampler(Quadratic(0.0), 0.5, 1.0))
    chains = defence.chains(torch.full((3, 1, 2, 2), 0.5), 400)[:, :, 0]
    spread = 0.5 * math.sqrt(2 / 4)                                             # 2 steps, 4 pixels
    assert chains.std(0).mean().item() == pytest.approx(spread, rel=0.1)
    assert torch.corrcoef(chains.T)[0, 1].abs() < 0.2
    assert chains.mean(0).sub(0.5).abs().max() < 4 * spread / 20


class Squares(nn.Module):
    """Two logits that are not linear in the image, so that each chain has a gradient of its own."""

    def forward(self, x):
        return torch.stack([x.pow(2).flatten(1).mean(1), x.flatten(1).mean(1)], 1)


class Offsets:
    """In place of Sampler: chain h of image b ends at x + (h + 1) / 4, whatever was asked for."""
    tau, temperature = 1.0, 1.0

    def __call__(self, x, steps):
        return x + (torch.arange(len(x)) // 3 + 1).view(-1, 1, 1, 1) / 4, torch.tensor(0.0)


def test_eot_gradient_is_the_mean_over_chains_of_the_gradient_of_the_mean_logits(exact):
    x, y, H = torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 0]), 5
    z = torch.stack([x + (h + 1) / 4 for h in range(H)]).requires_grad_(True)
    mean = Squares()(z.flatten(0, 1)).view(H, 3, 2).mean(0)
    gradient, = torch.autograd.grad(F.cross_entropy(mean, y, reduction="sum"), z)
    found = Defence(Squares(), 1, Offsets(), chunk=15).gradient(x, y, H)
    assert torch.allclose(found[0], mean, atol=1e-6)
    assert torch.allclose(found[1], gradient.mean(0), atol=1e-7)
    assert (gradient[0] - gradient[1]).abs().max() > 1e-4                       # one chain is not the mean


def test_without_a_chain_there_is_one_evaluation():
    f = classifier()
    assert Defence(f).chains(torch.rand(3, 1, 28, 28), 50).shape == (1, 3, 10)


def test_through_a_piecewise_linear_chain_the_gradient_is_bpdas(exact):
    """The Hessian of a leaky-ReLU energy is zero: going back through the chain changes nothing."""
    V, f, x = ebm(), classifier(), torch.rand(4, 1, 28, 28)
    sampler = Sampler(V, 0.1, 1e-2, noise=zeros)
    y = torch.arange(4)
    bpda = Defence(f, 3, sampler, V).gradient(x, y, 1)
    through = Defence(f, 3, sampler, V).gradient(x, y, 1, last=3)
    smooth = Defence(f, 3, sampler, common.smoothed(V, 5.0)).gradient(x, y, 1, last=3)
    assert torch.allclose(bpda[0], through[0], atol=1e-4)
    assert torch.allclose(bpda[1], through[1], rtol=1e-3, atol=1e-7)
    assert (smooth[1] - bpda[1]).norm() > 1e-3 * bpda[1].norm()


def test_gradient_through_the_chain_of_a_quadratic(exact):
    V, f, x, y = Quadratic(1.0), classifier(), torch.rand(4, 1, 28, 28), torch.arange(4)
    sampler = Sampler(V, 0.4, 1.0, noise=zeros)                                 # a step shrinks by 1 - .08
    bpda, through = (Defence(f, 5, sampler, V).gradient(x, y, 2, last)[1] for last in (0, 3))
    assert torch.allclose(through, 0.92 ** 3 * bpda, atol=1e-7)


def test_the_smooth_stand_in_tends_to_V():
    V, x = ebm(), torch.rand(4, 1, 28, 28)
    off = [(common.smoothed(V, beta)(x) - V(x)).abs().max().item() for beta in (10, 100, 1e4)]
    assert off[0] > off[1] > off[2] and off[2] < 1e-4
    assert isinstance(V.body[1], nn.LeakyReLU) and not any(p.requires_grad for p in common.smoothed(V, 1).parameters())


# --- Algorithm 1 ---


class Scripted:
    """A defence that answers from lists: natural verdict, then what each evaluation and verification say."""
    K = 1

    def __init__(self, screens, verdicts):
        self.screens, self.verdicts, self.calls, self.sizes = list(screens), list(verdicts), [], []

    def predict(self, x, H):
        self.calls.append(H)
        return self.verdicts.pop(0)[:len(x)]

    def gradient(self, x, y, H, last=0):
        self.sizes.append(len(x))
        return F.one_hot(self.screens.pop(0)[:len(x)], 10).float(), torch.ones_like(x)


def labels(*values):
    return torch.tensor(values)


def test_verification_only_rescues_and_the_record_never_recovers(tmp_path):
    x, y = torch.rand(4, 1, 8, 8), labels(1, 1, 1, 1)
    lab = fake_lab(tmp_path, x, y, n=2, h_adv=2, h_def=7, restarts=1)
    defence = Scripted([labels(0, 0, 1), labels(1, 1), labels(0, 1)],           # evaluations of images 0, 1, 2
                       [labels(1, 1, 1, 0),                                     # natural: image 3 is wrong
                        labels(1, 0), labels(0)])                               # verdicts: 0 rescued, 1 not; then 0
    record, adversary = algorithm_1(lab, "a", defence)
    assert record.tolist() == [[True, True, True, False], [True, False, True, False], [True, False, True, False],
                               [False, False, True, False]]
    assert defence.calls == [7, 7, 7] and defence.sizes == [3, 2, 2]            # broken images left the batch
    assert torch.equal(adversary[3], x[3])                                      # naturally wrong: the image itself
    assert not torch.equal(adversary[2], x[2])


def test_without_verification_every_break_counts(tmp_path):
    x, y = torch.rand(2, 1, 8, 8), labels(1, 1)
    lab = fake_lab(tmp_path, x, y, n=0, restarts=1)
    defence = Scripted([labels(0, 1)], [y])
    assert algorithm_1(lab, "a", defence, verify=False)[0][-1].tolist() == [False, True]


def test_restarts_only_lower_and_start_afresh(tmp_path):
    f, x = linear(), torch.rand(40, 1, 28, 28)
    y, records = f(x).argmax(1), []
    for restarts in (1, 4):
        lab = fake_lab(tmp_path, x, y, n=0, restarts=restarts, eps=0.5)         # n = 0: the random start alone
        records.append(algorithm_1(lab, f"a{restarts}", Defence(f))[0])
    one, four = records
    assert len(one) == 2 and len(four) == 5 and torch.equal(one, four[:2])
    assert (four[1:] <= four[:-1]).all() and 0 < four[-1].sum() < one[-1].sum() < 40


def test_the_step_after_a_restarts_last_evaluation_is_not_taken(tmp_path, monkeypatch):
    """N + 1 evaluations and N updates; the adversary that is kept is one that was evaluated."""
    x, y, seen = torch.full((1, 1, 8, 8), 0.5), labels(1), []
    monkeypatch.setattr(ss, "random_start", lambda x, eps, norm: x)

    class Watching(Scripted):
        def gradient(self, x, y, H, last=0):
            seen.append(x.mean().item())
            return super().gradient(x, y, H, last)
    lab = fake_lab(tmp_path, x, y, n=2, restarts=1, eps=0.4, step=0.1)
    adversary = algorithm_1(lab, "a", Watching([y] * 3, [y]))[1]
    assert seen == pytest.approx([0.5, 0.6, 0.7]) and adversary.mean().item() == pytest.approx(0.7)


def test_dropping_broken_images_leaves_the_others_as_they_were(exact, tmp_path, monkeypatch):
    monkeypatch.setattr(ss, "random_start", lambda x, eps, norm: x)
    f, x = linear(), torch.rand(12, 1, 28, 28)
    defence = Defence(f, 2, Sampler(ebm(), 0.01, 1e-4, noise=same_for_all), chunk=7)
    y = defence.predict(x, 3)
    lab = fake_lab(tmp_path, x, y, n=3, restarts=1, eps=0.01, step=0.004)
    record, adversary = algorithm_1(lab, "all", defence)
    left = record[-1]
    assert 0 < left.sum() < len(x)
    alone = fake_lab(tmp_path, x[left], y[left], n=3, restarts=1, eps=0.01, step=0.004)
    record, again = algorithm_1(alone, "alone", defence)
    assert record.all() and torch.allclose(again, adversary[left], atol=1e-6)


def test_attacks_have_a_random_stream_of_their_own(tmp_path):
    """What an experiment finds does not depend on who made the attack first; nor does a finished one draw."""
    f, x = linear(), torch.rand(6, 1, 28, 28)
    lab = fake_lab(tmp_path, x, f(x).argmax(1), n=0, restarts=1)
    torch.manual_seed(1)
    before, one = torch.get_rng_state(), algorithm_1(lab, "a", Defence(f))[1]
    assert torch.equal(torch.get_rng_state(), before)
    algorithm_1(lab, "a", Defence(f))                                           # from its file
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(algorithm_1(lab, "b", Defence(f))[1], one)


def test_an_interrupted_attack_goes_on_bit_exactly(tmp_path):
    f, x = classifier(), torch.rand(8, 1, 28, 28)
    y = f(x).argmax(1)
    lab = fake_lab(tmp_path, x, y, n=3, restarts=2, eps=0.03, step=0.01, h_adv=2, h_def=3)
    defence = Defence(f, 2, Sampler(ebm(), 0.05, 1e-3))
    whole = algorithm_1(lab, "whole", defence)

    class Dying(Defence):
        left = 5

        def gradient(self, *arguments):
            self.left -= 1
            if not self.left:
                raise Killed
            return super().gradient(*arguments)
    with pytest.raises(Killed):
        algorithm_1(lab, "broken", Dying(f, 2, defence.sampler))
    torch.manual_seed(99)
    broken = algorithm_1(lab, "broken", defence)
    assert torch.equal(whole[0], broken[0]) and torch.equal(whole[1], broken[1])
    again = algorithm_1(lab, "broken", SimpleNamespace(K=2))              # done: the defence is not asked
    assert torch.equal(again[0], whole[0])
    with pytest.raises(UserError, match="eps"):
        algorithm_1(lab, "broken", defence, eps=0.5)


# --- exponents ---


def test_lyapunov_exponent_of_linear_maps():
    torch.manual_seed(0)
    x = torch.zeros(5, 2, dtype=torch.float64)
    A = torch.tensor([[2.0, 0.3], [0.0, 0.5]], dtype=torch.float64)
    found = lyapunov(lambda x, z: x @ A.T, x, 400, 1e-3, zeros)
    assert found.shape == (5,) and torch.allclose(found, torch.full_like(found, math.log(2)), atol=0.01)
    shrinking = lyapunov(lambda x, z: 0.7 * x + z, x, 50, 1e-3)                 # the same noise cancels
    assert torch.allclose(shrinking, torch.full_like(found, math.log(0.7)), atol=1e-6)


def test_lyapunov_exponent_of_the_logistic_map():
    x = torch.rand(300, 1, dtype=torch.float64)
    for _ in range(50):
        x = 4 * x * (1 - x)
    found = lyapunov(lambda x, z: 4 * x * (1 - x), x, 500, 1e-9, zeros)
    assert found.mean().item() == pytest.approx(math.log(2), abs=0.01)


def test_tangent_vectors_see_nothing_in_a_piecewise_linear_energy():
    """Why figure 2.7 takes two chains: the Hessian-vector product is exactly zero."""
    V, x = ebm(), torch.rand(2, 1, 28, 28, requires_grad=True)
    slope, = torch.autograd.grad(V(x).sum(), x, create_graph=True)
    curved, = torch.autograd.grad((slope * torch.randn_like(x)).sum(), x)
    assert curved.abs().max() == 0 and slope.abs().max() > 0


# --- the script ---


def test_smoke_run_of_every_experiment(tmp_path, outcome, capsys):
    code, err = outcome(ss, "--budget", "smoke", "--out", tmp_path, "--device", "cpu", "--only",
                        *ss.EXPERIMENTS)
    assert (code, err) == (0, "")
    folder = tmp_path / "stochastic_security-glyphs"
    results = json.loads((folder / "results.json").read_text())
    assert set(results) == set(ss.EXPERIMENTS)
    for name, entry in results.items():
        for key, value in entry["ours"].items():
            values = value if isinstance(value, list) else [value]
            assert all(math.isfinite(v) for v in values), (name, key)
            if "acc" in key and not isinstance(value, list):
                low, high = entry["ours"][f"{key}, 95 %"]
                assert 0 <= low <= value <= high <= 1
    worst = results["table2.2"]["ours"]
    attacks = [v for k, v in worst.items() if k.startswith("robust acc (") and not k.endswith("95 %")]
    assert worst["robust acc (worst of these)"] == min(attacks) or \
        worst["robust acc (worst of these)"] < min(attacks)
    for picture in ("2.2", "2.2-d", "2.3", "2.4", "2.5", "2.5-N", "2.6", "2.7", "2.7-samples", "2.8", "2.9"):
        assert (folder / f"figure{picture}.png").stat().st_size > 5000


@pytest.mark.parametrize("dataset", ["cifar10", "svhn"])
def test_smoke_run_on_colour(tmp_path, write_npz, outcome, dataset):
    data = write_npz(dataset)
    flags = ("--dataset", dataset, "--budget", "smoke", "--data-dir", data, "--out", tmp_path, "--device", "cpu")
    assert outcome(ss, *flags, "--only", "table2.3", "figure2.9") == (0, "")


@pytest.mark.parametrize("flags, says", [
    (("--eps", "-1"), "at least 0"), (("--tau", "0"), "above 0"), (("--temperature", "inf"), "finite"),
    (("--bank", "10", "--batch", "4"), "multiple"), (("--last", "500"), "at most --k"), 
    (("--images", "5000"), "2000"), (("--f-net", "nothing"), "unknown network"), (("--h-def", "0"), "at least 1"),
    (("--dataset", "cifar10", "--data-dir", "nowhere"), "cifar10"), (("--only", "figure9"), "unknown experiment")])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, outcome, monkeypatch, flags, says):
    monkeypatch.setattr(common, "download", lambda name, *_: (_ for _ in ()).throw(UserError(f"{name}: no file")))
    code, err = outcome(ss, "--budget", "smoke", "--out", tmp_path / "out", "--device", "cpu", *flags)
    assert code == 2 and says in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_settings_are_the_published_ones():
    s = ss.PAPER
    assert (s.updates, s.switch, s.k_train, s.adam_lr, s.sgd_lr) == (150_000, 50_000, 100, 1e-4, 5e-5)
    assert (s.k, s.h_adv, s.h_def, s.n, s.restarts, s.eps, s.step) == (1500, 15, 150, 50, 5, 8 / 255, 2 / 255)
    assert (2 * s.tau, 2 * s.data_noise) == (0.01, 0.02) and 2 * ss.SVHN.tau == 0.0175
