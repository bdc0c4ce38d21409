"""stochastic_security.py: chain, Algorithm 2, Algorithm 1, attacks, exponents, the wiring of every experiment.

The last section holds the recorded steps of common.repeat (CUDA graphs), which this script uses the most.
"""
import contextlib
import csv
import dataclasses
import json
import math
from collections import OrderedDict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import stochastic_security as ss
from common import Diverged, UserError, frozen_copy, rate
from conftest import Killed
from stochastic_security import Attack, Defence, L2, LInf, Outcome, eot_attack, langevin, langevin_step, lyapunov


class Quadratic(nn.Module):
    """V(x) = T sum_i a_i (x_i - centre)^2 / 2, so that U is a Gaussian's."""

    def __init__(self, temperature=1.0, centre=0.0, a=1.0):
        super().__init__()
        self.scale, self.centre = nn.Parameter(torch.tensor(float(temperature))), centre
        self.register_buffer("a", torch.as_tensor(a))

    def forward(self, x):
        return (self.scale * self.a * (x - self.centre).pow(2)).flatten(1).sum(1)[:, None] / 2


class Small(nn.Module):
    """An energy of a few pixels that is piecewise linear."""

    def __init__(self, pixels):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 30), nn.LeakyReLU(0.05), nn.Linear(30, 1))

    def forward(self, x):
        return self.body(x)


def ebm(width=4, seed=0):
    torch.manual_seed(seed)
    return common.make_net("light_ebm", 1, (1, 28, 28), width / 32)


def classifier(seed=0):
    torch.manual_seed(seed)
    return common.make_net("small_cnn", 10, (1, 28, 28), 0.25).eval()


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).eval()


def digits(n=26, seed=0):
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, 1, 28, 28), generator=g, dtype=torch.uint8)
    return common.Images(pixels, torch.arange(n) % 10, "glyphs")


def run_of(tmp_path, *flags, name="runs"):
    """A run with budget smoke -> run, settings."""
    args = ss.get_args(["--budget", "smoke", "--out", tmp_path / name, "--device", "cpu", *flags])
    return common.Run("stochastic_security", args), args.settings


def settings(**changes):
    return dataclasses.replace(ss.SETTINGS["glyphs", "smoke"], **changes)


def checkpoint(run, name):
    return torch.load(run.folder / f"{name}.pt", weights_only=True)


def again(function, *arguments, **options):
    """function(...) with the seed that every call of again() takes."""
    torch.manual_seed(7)
    return function(*arguments, **options)


@pytest.fixture
def no_noise(monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)


@pytest.fixture
def noise_by_pixel(monkeypatch):
    """Noise that depends on the pixel and not on the image or its place in the batch."""
    g = torch.Generator().manual_seed(5)
    noise = torch.randn(1, 1, 28, 28, generator=g)
    monkeypatch.setattr(torch, "randn_like", lambda x: noise.expand_as(x).clone())


# --- the chain ---


def test_stationary_variance_of_the_ornstein_uhlenbeck_chain(exact):
    """U = |x|^2 / 2: variance 1 / (1 - tau^2 / 4), mean 0, from any start; states leave [0, 1] freely."""
    tau, T = 1.0, 0.3
    x = langevin(torch.full((5000, 1, 2, 2), 4.0), 60, Quadratic(T), tau, T)
    n = x.numel()
    assert abs(x.mean().item()) < 4 * math.sqrt(1.34 / n)
    assert abs(x.var().item() - 1 / (1 - tau ** 2 / 4)) < 4 * 1.34 * math.sqrt(2 / n)
    assert x.min() < -1 and x.max() > 2


def test_a_step_is_eq_2_3_and_in_the_thesis_range_its_step(exact):
    """With the published tau and T the step in [-1, 1] is x - grad V + .01 z."""
    V, x = ebm(), torch.rand(3, 1, 28, 28)
    s = ss.SETTINGS["cifar10", "paper"]
    z = again(torch.randn_like, x)
    moved = again(langevin_step, x, V, s.tau, s.temperature)
    wanted = x.clone().requires_grad_(True)
    gradient, = torch.autograd.grad(V(wanted).sum(), wanted)
    assert torch.allclose(moved, x - s.tau ** 2 / (2 * s.temperature) * gradient + s.tau * z, atol=1e-7)
    wide = (2 * x - 1).requires_grad_(True)  # the thesis' pixels
    gradient, = torch.autograd.grad(V.body(wide).sum(), wide)
    assert torch.allclose(2 * moved - 1, wide - gradient + 0.01 * z, atol=1e-6)
    assert all(p.grad is None for p in V.parameters())


def test_svhn_has_a_tau_and_a_temperature_of_its_own():
    """V's scale is tied to tau; with both changed the step in [-1, 1] is grad V again."""
    for key in (("cifar10", "paper"), ("svhn", "paper"), ("svhn", "quick")):
        s = ss.SETTINGS[key]
        assert 4 * s.tau ** 2 / (2 * s.temperature) == pytest.approx(1)  # x4: V(2x - 1), and x = (w + 1) / 2


def test_settings_are_the_published_ones():
    s, svhn = ss.SETTINGS["cifar10", "paper"], ss.SETTINGS["svhn", "paper"]
    assert (s.updates, s.switch, s.k_train, s.adam_lr, s.sgd_lr) == (150_000, 50_000, 100, 1e-4, 5e-5)
    assert (s.k, s.h_adv, s.h_def, s.n, s.restarts, s.eps, s.step) == (1500, 15, 150, 50, 5, 8 / 255, 2 / 255)
    assert (2 * s.tau, 2 * s.data_noise, s.bank, s.batch) == (0.01, 0.02, 0, 100)
    assert (2 * svhn.tau, 2 * svhn.data_noise, svhn.sgd_lr) == (0.0175, 0.03, 2.5e-5)
    assert (s.f_net, s.f_width, s.augment, svhn.augment) == ("wrn28", 10, "crop_flip", "crop")


def test_the_fast_path_is_the_plain_loop_within_rounding():
    V, x = ebm(16), torch.rand(6, 1, 28, 28)
    plain = again(langevin, x, 20, frozen_copy(V, fast=False), 0.015, 1e-4)
    quick = again(langevin, x, 20, frozen_copy(V), 0.015, 1e-4)
    noise_only = again(langevin, x, 20, Quadratic(0.0), 0.015, 1e-4)
    way = (plain - noise_only).norm()  # what the gradient did
    assert way > 1 and (plain - quick).norm() < 0.05 * way
    assert quick.dtype == torch.float32


def test_a_frozen_copy_follows_its_network_in_place(exact, no_noise):
    V, x = ebm(), torch.rand(2, 1, 28, 28)
    copy = frozen_copy(V)
    before, tensors = langevin(x, 2, copy, 0.01, 1e-4), [p.data_ptr() for p in copy.parameters()]
    with torch.no_grad():
        for p in V.parameters():
            p.mul_(3)
    assert torch.equal(langevin(x, 2, copy, 0.01, 1e-4), before)  # a copy ...
    common.follow(copy, V)
    followed = langevin(x, 2, copy, 0.01, 1e-4)
    assert torch.equal(followed, langevin(x, 2, V, 0.01, 1e-4))  # ... that follows when told
    assert tensors == [p.data_ptr() for p in copy.parameters()]


def test_a_path_is_the_chain_with_its_states(exact):
    """The same states with the same noise; beside each, where a step without noise leads."""
    torch.manual_seed(3)
    V, x, tau, T = Small(9), torch.rand(4, 1, 3, 3), 0.4, 0.05
    end, way = again(ss.langevin_path, x, 3, V, tau, T)
    assert torch.equal(end, again(langevin, x, 3, V, tau, T)) and len(way) == 3
    for steps, (state, lower) in enumerate(way):
        assert torch.equal(state, again(langevin, x, steps, V, tau, T))
        assert torch.equal(lower, state - tau ** 2 / (2 * T) * common.input_gradient(V, state))


def test_back_through_the_steps_of_a_quadratic_is_exact(exact):
    """Step k has the derivative 1 - tau^2 a / 2 in each pixel, wherever it starts; 0 stays 0."""
    a, tau, T = torch.tensor([[0.5, 1.0], [2.0, 3.0]]), 0.6, 0.02
    V, x, v = Quadratic(T, a=a), torch.rand(5, 1, 2, 2), 10.0 ** torch.arange(-6, 4, 2).view(5, 1, 1, 1) * torch.randn(5, 1, 2, 2)
    v[1] = 0
    _, way = ss.langevin_path(x, 4, V, tau, T)
    assert torch.allclose(ss.pull_back(v, way, V, tau, T) / v.clamp(min=1e-9), v * (1 - tau ** 2 * a / 2) ** 4 / v.clamp(min=1e-9),
                          rtol=1e-3, atol=1e-4)


class SmoothEnergy(nn.Module):
    """Neither quadratic nor piecewise linear."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(9, 30), nn.Softplus(), nn.Linear(30, 1))

    def forward(self, x):
        return self.body(x)


def test_back_through_the_steps_of_a_smooth_energy_is_autograds_derivative(exact):
    """With the same noise; each step's derivative at its own state, in the right order."""
    torch.manual_seed(3)
    V, x, v, tau = SmoothEnergy().double(), torch.rand(2, 1, 3, 3).double(), torch.randn(2, 1, 3, 3).double(), 1e-4
    T = tau ** 2 / 16  # steps as long as with tau = .4, T = .01, and a difference over a short way
    _, way = again(ss.langevin_path, x, 5, V, tau, T)
    torch.manual_seed(7)
    start = z = x.clone().requires_grad_(True)
    for _ in range(5):
        slope, = torch.autograd.grad(V(z).sum(), z, create_graph=True)
        z = z - tau ** 2 / (2 * T) * slope + tau * torch.randn_like(x)
    expected, = torch.autograd.grad((z * v).sum(), start)
    assert torch.allclose(ss.pull_back(v, way, V, tau, T), expected, rtol=1e-2, atol=1e-3)
    assert (expected - v).abs().max() > 0.1  # the derivative is not the identity


def test_the_second_start_is_a_noise_away(exact, monkeypatch):
    """Root mean square tau, along v, whatever v's length."""
    asked = []
    monkeypatch.setattr(ss, "downhill", lambda x, V, tau, T: asked.append(x) or x)
    x, v = torch.rand(3, 1, 4, 4), torch.tensor([1e-27, 1.0, 1e4]).view(3, 1, 1, 1) * torch.randn(3, 1, 4, 4)
    assert torch.allclose(ss.step_back(v, x, x, None, 0.1, 1.0) / v, torch.ones(()), atol=0.05)
    moved = (asked[0] - x).flatten(1)
    assert torch.allclose(moved.square().mean(1).sqrt(), torch.full((3,), 0.1), rtol=1e-3)
    assert F.cosine_similarity(moved, v.flatten(1) / v.flatten(1).abs().amax(1, keepdim=True)).min() > 0.999


# --- which gradient is that of the expectation ---


def test_on_a_gaussian_energy_the_whole_chain_is_the_true_gradient_and_bpda_is_not(exact):
    """E[P(x)] = c + A^K (x - c) in closed form; f is linear, so F(x) and its gradient are known."""
    torch.manual_seed(1)
    images = common.Images(torch.randint(0, 256, (400, 1, 4, 4)).clamp(60, 190).byte(), torch.zeros(400), "g")
    V, tau, K, H = common.GaussianEnergy(images, 0.03), 0.1, 6, 400
    f, x, y = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), images.take(slice(0, 5)), torch.tensor([0, 1, 2, 0, 1])
    A = torch.linalg.matrix_power(torch.eye(16) - tau ** 2 / 2 * V.precision, K)
    start = x.clone().requires_grad_(True)
    mean = V.mean + (start.flatten(1) - V.mean) @ A
    true, = torch.autograd.grad(F.cross_entropy(f[1](mean), y, reduction="sum"), start)
    settings = {"V": V, "tau": tau, "T": 1.0}
    defence = Defence(f, K, partial(langevin, **settings), partial(ss.langevin_path, **settings),
                      partial(ss.pull_back, **settings), 5 * H)
    whole, bpda = again(defence.gradient, x, y, H, True)[1], again(defence.gradient, x, y, H)[1]
    assert (whole - true).norm() < 0.06 * true.norm()
    assert (bpda - true).norm() > true.norm()


def test_on_a_trained_energy_the_whole_chain_predicts_how_the_loss_rises(exact, tmp_path):
    """Differences of the loss of F_H, same noise, many chains: along gradients and along random directions."""
    x = common.load_images("glyphs").x[:600].float()
    data = common.Images(F.avg_pool2d(F.pad(x, (2, 2, 2, 2)), 4).round().byte(), torch.zeros(600), "small")
    run, s = run_of(tmp_path, "--updates", 120, "--switch", 120, "--adam-lr", 4e-3, "--k-train", 10, "--batch", 32,
                    "--bank", 320, "--tau", 0.05, "--temperature", 1e-2, "--data-noise", 0.1, "--k", 10, "--width", 0.25)
    V = ss.train_ebm(run, s, data, 120)
    f = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).requires_grad_(False)
    f[1].weight.mul_(4)
    x, y, H = data.take(slice(0, 4)), torch.arange(4), 120
    defence = ss.defend(SimpleNamespace(chunk=4 * H), s, f, V)
    whole, bpda = again(defence.gradient, x, y, H, True)[1], again(defence.gradient, x, y, H)[1]
    ratios = []
    for direction in (whole, bpda, torch.randn_like(x), torch.randn_like(x)):
        move = 0.05 * direction / direction.square().mean().sqrt()
        losses = [F.cross_entropy(again(defence.logits, x + side * move, 2 * H).mean(0), y, reduction="sum").item()
                  for side in (1, -1)]
        rise = (losses[0] - losses[1]) / 2
        ratios.append([(g * move).sum().item() - rise for g in (whole, bpda)] + [rise])
    scale = ratios[0][2]  # along the whole chain's own gradient the loss rises
    assert scale > 0
    for off_whole, off_bpda, _ in ratios:
        assert abs(off_whole) < 0.15 * scale
    assert ratios[0][1] > 0.5 * scale and ratios[1][1] > 0.5 * scale  # BPDA promises far more than comes


# --- Algorithm 2 ---


def test_the_bank_takes_every_state_back_to_its_place_each_equally_often(tmp_path, monkeypatch):
    monkeypatch.setattr(ss, "langevin", lambda x, *_: x + 1)
    run, s = run_of(tmp_path, "--bank", 12, "--batch", 4, "--updates", 9, "--switch", 9)
    ss.train_ebm(run, s, digits(), 9)
    torch.manual_seed(0)
    common.make_net("light_ebm", 1, (1, 28, 28), s.width)
    start = torch.rand(12, 1, 28, 28)
    assert torch.allclose(checkpoint(run, "ebm-9")["bank"], start + 3)  # 9 x 4 draws of 12: three each


def test_a_bank_of_zero_is_as_large_as_the_training_set(tmp_path, monkeypatch):
    monkeypatch.setattr(ss, "langevin", lambda x, *_: x)
    run, s = run_of(tmp_path, "--bank", 0, "--updates", 1)
    ss.train_ebm(run, s, digits(26), 1)
    assert len(checkpoint(run, "ebm-1")["bank"]) == 24  # a multiple of the batch


def energy_by_hand(s, data, noise):
    """Before the first update: network, bank, its rows, noisy data."""
    torch.manual_seed(0)
    V = common.make_net("light_ebm", 1, data.shape, s.width)
    bank = torch.rand(8, *data.shape)
    x, _ = next(common.batches(data, 4, 0))
    return V, bank, common.batch_index(8, 4, 1, 0), x + noise * torch.randn_like(x)


def test_an_update_by_hand(exact, tmp_path, monkeypatch):
    """Noise on the data; data are pulled down, chains pushed up; SGD's rate is for V; the log's columns."""
    monkeypatch.setattr(ss, "langevin", lambda x, *_: x + 1 / 4)
    data, flags = digits(), ("--updates", 1, "--sgd-lr", 0.5, "--data-noise", 0.2, "--tau", 0.03,
                             "--temperature", 2e-3)
    run, s = run_of(tmp_path, *flags)
    V = ss.train_ebm(run, s, data, 0)
    reference, bank, rows, x = energy_by_hand(s, data, 0.2)
    chains = bank[rows] + 1 / 4
    slope = common.input_gradient(reference, chains).pow(2).mean().sqrt().item()
    d = reference(x).mean() - reference(chains).mean()
    d.backward()
    for p, q in zip(V.parameters(), reference.parameters()):
        assert torch.allclose(p, q - 0.5 * q.grad, atol=1e-6)
    assert max(q.grad.abs().max() for q in reference.parameters()) > 1e-2
    bank[rows] = chains
    line, = checkpoint(run, "ebm-0")["rows"]
    assert line["d"] == pytest.approx(d.item() / 2e-3, rel=1e-3)
    assert line["drift"] == pytest.approx(0.03 / (2 * 2e-3) * slope, rel=1e-3)
    assert line["spread"] == pytest.approx(bank.std().item(), rel=1e-3)


def test_chains_run_from_the_bank_on_the_energy_of_the_moment(exact, tmp_path, monkeypatch):
    calls = []

    def chains(x, steps, V, tau, T):
        weights = {key: w.clone() for key, w in V.net.state_dict().items()}
        calls.append((x.clone(), steps, weights, tau, T))
        return x
    monkeypatch.setattr(ss, "langevin", chains)
    data, flags = digits(), ("--k-train", 5, "--tau", 0.03, "--temperature", 0.02, "--data-noise", 0.1)
    run, s = run_of(tmp_path, *flags, "--updates", 2)
    ss.train_ebm(run, s, data, 2)
    first, bank, rows, _ = energy_by_hand(s, data, 0.1)
    one = ss.train_ebm(*run_of(tmp_path, *flags, "--updates", 1, name="one"), data, 2)
    assert [(steps, tau, T) for _, steps, _, tau, T in calls[:2]] == [(5, 0.03, 0.02)] * 2
    assert torch.equal(calls[0][0], bank[rows])
    for (_, _, weights, _, _), V in zip(calls, (first, one)):
        for key, w in V.state_dict().items():
            assert torch.equal(weights[key], w)


def test_adam_before_the_switch_sgd_after(tmp_path, monkeypatch):
    monkeypatch.setattr(ss, "langevin", lambda x, *_: x)
    run, s = run_of(tmp_path, "--adam-lr", 2e-3, "--sgd-lr", 0.7, "--temperature", 1e-3)
    steps = []
    for kind in (torch.optim.Adam, torch.optim.SGD):
        def spy(self, *arguments, step=kind.step):
            steps.append((type(self).__name__, self.param_groups[0]["lr"]))
            return step(self, *arguments)
        monkeypatch.setattr(kind, "step", spy)
    adam, sgd = ("Adam", 2e-3), ("SGD", pytest.approx(0.7e-3))
    ss.train_ebm(run, s, digits(), 4)
    assert steps == [adam] * 4 + [sgd] * 2
    steps.clear()
    ss.train_ebm(run, s, digits(), s.updates)
    assert steps == [adam] * 6


def test_training_lowers_the_energy_of_data(tmp_path, monkeypatch):
    monkeypatch.setattr(ss, "langevin", lambda x, *_: x)
    run, s = run_of(tmp_path, "--updates", 30, "--adam-lr", 1e-3)
    ss.train_ebm(run, s, digits(), 30)
    rows = checkpoint(run, "ebm-30")["rows"]
    assert rows[-1]["d"] < min(rows[0]["d"], 0)


def test_interrupted_training_goes_on_bit_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr(common.Training, "LINES", 2)  # so that a line is half done when the loop breaks
    data, flags = digits(), ("--updates", 7)
    whole_run, s = run_of(tmp_path, *flags, name="whole")
    whole = ss.train_ebm(whole_run, s, data, 4)
    for stop in (3, 3):  # at update 3 of 7, then at 3 of the other 5
        with monkeypatch.context() as m:
            m.setattr(common.Training, "SAVE_SECONDS", -1)
            calls = []

            def dying(*arguments):
                calls.append(arguments)
                if len(calls) == stop:
                    raise Killed
                return langevin(*arguments)
            m.setattr(ss, "langevin", dying)
            with pytest.raises(Killed):
                ss.train_ebm(run_of(tmp_path, *flags, name="broken")[0], s, data, 4)
    run, _ = run_of(tmp_path, *flags, name="broken")
    assert checkpoint(run, "ebm-4")["it"] == 4
    torch.manual_seed(99)
    broken = ss.train_ebm(run, s, data, 4)
    for p, q in zip(whole.parameters(), broken.parameters()):
        assert torch.equal(p, q)
    one, two = checkpoint(whole_run, "ebm-4"), checkpoint(run, "ebm-4")
    assert torch.equal(one["bank"], two["bank"])
    for row in one["rows"] + two["rows"]:
        del row["seconds"]
    assert one["rows"] == two["rows"]

    monkeypatch.setattr(ss, "langevin", None)  # finished: nothing is trained again
    finished = ss.train_ebm(run, s, data, 4)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), finished.parameters()))
    for flag, changed in (("--tau", 0.5), ("--k-train", 3), ("--adam-lr", 0.5), ("--data-noise", 0.5)):
        with pytest.raises(UserError, match=flag[2:].replace("-", "_")):
            ss.train_ebm(*run_of(tmp_path, *flags, flag, changed, name="broken"), data, 4)
    with pytest.raises(UserError, match="images"):
        ss.train_ebm(run, s, digits(26, seed=1), 4)


def test_runaway_chains_stop_training_with_advice(tmp_path):
    run, s = run_of(tmp_path, "--adam-lr", 1.0, "--updates", 40)
    with pytest.raises(Diverged, match="--adam-lr") as stop:
        ss.train_ebm(run, s, digits(), 40)
    with open(run.folder / "log-ebm-40.csv") as f:
        lines = list(csv.DictReader(f))
    assert int(lines[-1]["it"]) < 40 and not float(lines[-1]["drift"]) <= 10
    assert len(stop.value.rows) == len(lines)


# --- attacks ---


BALLS = [LInf(0.3, 0.2), L2(0.9, 0.5)]


def size(ball, moved):
    return moved.flatten(1).abs().amax(1) if isinstance(ball, LInf) else moved.flatten(1).norm(dim=1)


@pytest.mark.parametrize("ball", BALLS)
def test_attacks_stay_in_the_ball_and_in_the_box(ball):
    x0 = torch.rand(6, 1, 8, 8)

    def inside(x):
        lengths = size(ball, x - x0)
        assert x.min() >= 0 and x.max() <= 1 and (lengths <= ball.eps + 1e-6).all() and lengths.max() > ball.eps / 10
    x = ball.start(x0)
    inside(x)
    for _ in range(6):
        x = ball.ascend(x, x0, torch.randn_like(x))
        inside(x)
    assert torch.equal(ball.ascend(x0, x0, torch.zeros_like(x)), x0)  # a zero gradient moves nothing
    assert torch.equal(type(ball)(0.0, 0.2).ascend(x, x0, torch.randn_like(x)), x0)


@pytest.mark.parametrize("ball", BALLS)
def test_a_step_has_its_length_and_direction_whatever_the_gradients_scale(ball):
    x0 = torch.full((3, 1, 8, 8), 0.5)
    ball = ball._replace(eps=10.0, step=0.2)
    gradient = torch.randn_like(x0)
    for scale in (1e-15, 1.0, 1e12):
        moved = ball.ascend(x0, x0, scale * gradient) - x0
        assert torch.allclose(size(ball, moved), torch.full((3,), 0.2), atol=1e-6)
        assert F.cosine_similarity(moved.flatten(1), gradient.flatten(1)).min() > 0.7


def test_starts_are_uniform():
    x = torch.full((4000, 1, 2, 2), 0.5)
    moved = LInf(0.3, 0.1).start(x) - x
    assert moved.std().item() == pytest.approx(0.3 / math.sqrt(3), rel=0.03)
    assert abs(moved.mean().item()) < 0.01 and moved.abs().max() > 0.29
    lengths = (L2(0.4, 0.1).start(x) - x).flatten(1).norm(dim=1)  # uniform in [0, eps]
    assert lengths.mean().item() == pytest.approx(0.2, rel=0.05)
    assert lengths.std().item() == pytest.approx(0.4 / math.sqrt(12), rel=0.05)


@pytest.mark.parametrize("x", [torch.rand(2, 1, 28, 28) * 2 - 1, torch.rand(2, 1, 28, 28) * 255])
def test_attacks_refuse_images_outside_the_range(tmp_path, x):
    y, ball = linear()(x).argmax(1), LInf(0.1, 0.1)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        ss.pgd(linear(), x, y, 1, ball)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        eot_attack(run_of(tmp_path)[0], Defence(linear()), x, y, Attack(ball, 1, 1, 1))


def test_pgd_starts_at_random_and_climbs_the_loss_in_its_ball(exact):
    f, x = classifier(), torch.rand(5, 1, 28, 28)
    y, ball = f(x).argmax(1), LInf(0.05, 0.02)
    assert torch.equal(again(ss.pgd, f, x, y, 0, ball), again(ball.start, x))
    start = again(ball.start, x)
    one, two = again(ss.pgd, f, x, y, 1, ball), again(ss.pgd, f, x, y, 2, ball)
    for before, after in ((start, one), (one, two)):
        before = before.clone().requires_grad_(True)
        gradient, = torch.autograd.grad(F.cross_entropy(f(before), y), before)
        assert torch.allclose(after, ball.ascend(before.detach(), x, gradient), atol=1e-6)


class Unmoved(LInf):
    """A ball whose start is the image itself."""

    def start(self, x):
        return x


class UnmovedL2(L2):
    def start(self, x):
        return x


def test_pgd_attacks_in_the_ball_it_is_given(exact):
    f, x = linear(), torch.full((4, 1, 28, 28), 0.5)
    y = torch.arange(4)
    moved = ss.pgd(f, x, y, 3, UnmovedL2(5.0, 0.1)) - x
    assert torch.allclose(size(L2(1, 1), moved), torch.full((4,), 0.3), rtol=1e-2)
    moved = ss.pgd(f, x, y, 3, Unmoved(0.05, 0.04)) - x
    assert torch.allclose(size(LInf(1, 1), moved), torch.full((4,), 0.05), atol=1e-6)


def test_pgd_of_many_images_is_that_of_each(exact):
    f, x = linear(), torch.rand(260, 1, 28, 28)
    y, ball = f(x).argmax(1), Unmoved(0.03, 0.01)
    one_by_one = torch.cat([ss.pgd(f, x[i:i + 1], y[i:i + 1], 2, ball) for i in (0, 249, 250, 259)])
    assert torch.allclose(ss.pgd(f, x, y, 2, ball)[[0, 249, 250, 259]], one_by_one, atol=1e-6)


def test_pgd_leaves_grad_and_mode_alone():
    f, seen = classifier().train(), []
    f.register_forward_hook(lambda *_: seen.append(f.training))
    ss.pgd(f, torch.rand(4, 1, 28, 28), torch.zeros(4, dtype=torch.long), 3, LInf(0.1, 0.1))
    assert f.training and seen == [False] * 3 and all(p.grad is None for p in f.parameters())


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_bpda_without_a_chain_is_pgd_of_torchattacks(exact, tmp_path, norm):
    torchattacks = pytest.importorskip("torchattacks")
    f, x = classifier(), torch.rand(12, 1, 28, 28)
    y, eps, step, n = f(x).argmax(1), 0.02, 0.006, 5
    kind, ball = (torchattacks.PGD, Unmoved) if norm == "inf" else (torchattacks.PGDL2, UnmovedL2)
    theirs = kind(f, eps, step, n, random_start=False)(x, y)
    outcome = eot_attack(run_of(tmp_path)[0], Defence(f), x, y, Attack(ball(eps, step), n, 1, 1))
    left = outcome.robust
    assert torch.allclose(ss.pgd(f, x, y, n, ball(eps, step)), theirs, atol=1e-6)
    assert (theirs != x).any() and left.any() and torch.allclose(outcome.x[left], theirs[left], atol=1e-6)


# --- the defended classifier ---


class Mean(nn.Module):
    """Two logits: the mean of the image, and 0."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        m = self.w * x.flatten(1).mean(1)
        return torch.stack([m, 0 * m], 1)


class Squares(nn.Module):
    """Two logits that are not linear in the image, so that each chain has a gradient of its own."""

    def forward(self, x):
        return torch.stack([x.pow(2).flatten(1).mean(1), x.flatten(1).mean(1)], 1)


def chains_of(V, tau, T):
    """The three functions of a Defence's chains."""
    return [partial(function, V=V, tau=tau, T=T) for function in (langevin, ss.langevin_path, ss.pull_back)]


def test_replicates_of_distinct_images_are_never_mixed(exact):
    x = torch.linspace(0, 1, 9).view(9, 1, 1, 1).expand(9, 1, 4, 4).contiguous()
    for chunk in (1, 4, 7, 100):
        defence = Defence(Mean(), 3, *chains_of(Quadratic(0.0), 1e-4, 1.0), chunk=chunk)
        logits = defence.logits(x, 5)
        assert logits.shape == (5, 9, 2)
        assert torch.allclose(logits[:, :, 0], x[:, 0, 0, 0].expand(5, 9), atol=1e-3)
        F_H, gradient = defence.gradient(x, torch.zeros(9, dtype=torch.long), 5)
        assert torch.allclose(F_H[:, 0], x[:, 0, 0, 0], atol=1e-3)
        expected = -(1 - torch.sigmoid(x[:, 0, 0, 0])) / 16  # dCE/dx, over pixels
        assert torch.allclose(gradient[:, 0, 0, 0], expected, atol=1e-4)


def test_chains_run_in_batches_of_at_most_a_chunk():
    sizes = []

    def chain(x, steps):
        sizes.append(len(x))
        return x
    Defence(Mean(), 3, chain, chunk=10).logits(torch.rand(9, 1, 4, 4), 4)
    assert sizes == [8, 8, 8, 8, 4]
    sizes.clear()
    Defence(Mean(), 3, chain, chunk=3).logits(torch.rand(2, 1, 4, 4), 4)
    assert sizes == [3, 1, 3, 1]


def test_F_H_is_the_mean_of_logits_of_independent_chains(exact):
    defence = Defence(Mean(), 2, *chains_of(Quadratic(0.0), 0.5, 1.0))
    chains = defence.logits(torch.full((3, 1, 2, 2), 0.5), 400)[:, :, 0]
    spread = 0.5 * math.sqrt(2 / 4)  # 2 steps, 4 pixels
    assert chains.std(0).mean().item() == pytest.approx(spread, rel=0.1)
    assert torch.corrcoef(chains.T)[0, 1].abs() < 0.2
    assert chains.mean(0).sub(0.5).abs().max() < 4 * spread / 20


def test_the_prediction_is_that_of_the_mean_logits():
    """Not a vote: two chains of three say class 1, and the third one outweighs them."""
    def chain(x, steps):
        return x + torch.tensor([-1.0, 5.0, -1.0]).view(3, 1, 1, 1)
    assert Defence(Mean(), 1, chain).predict(torch.zeros(1, 1, 2, 2), 3).tolist() == [0]


def offsets(x, steps):
    """In place of chains from three images: chain h ends at x + (h + 1) / 4."""
    return x + (torch.arange(len(x)) // 3 + 1).view(-1, 1, 1, 1) / 4


def test_eot_gradient_is_the_sum_over_chains_of_the_gradient_of_the_mean_logits(exact):
    x, y, H = torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 0]), 5
    z = torch.stack([x + (h + 1) / 4 for h in range(H)]).requires_grad_(True)
    mean = Squares()(z.flatten(0, 1)).view(H, 3, 2).mean(0)
    gradient, = torch.autograd.grad(F.cross_entropy(mean, y, reduction="sum"), z)
    F_H, found = Defence(Squares(), 1, offsets, chunk=15).gradient(x, y, H)
    assert torch.allclose(F_H, mean, atol=1e-6)
    assert torch.allclose(found, gradient.sum(0), atol=1e-6)
    assert (gradient[0] - gradient[1]).abs().max() > 1e-4  # one chain is not the mean


def test_the_whole_chain_goes_by_its_path_and_back():
    """All K steps; f's gradient at the ends is carried back; BPDA asks for neither. Long paths go in smaller parts."""
    taken, x, y = [], torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 0])

    def path(x, steps):
        taken.append(("path", len(x), steps))
        return 3 * x, "way"

    def back(v, way):
        assert way == "way"
        return 5 * v
    defence = Defence(Mean(), 7, lambda x, steps: taken.append(("chain", len(x), steps)) or 3 * x, path, back)
    plain, whole = defence.gradient(x, y, 2), defence.gradient(x, y, 2, whole=True)
    assert taken == [("chain", 6, 7), ("path", 6, 7)]
    assert torch.allclose(plain[0], Mean()(3 * x), atol=1e-6) and torch.equal(plain[0], whole[0])
    assert torch.allclose(whole[1], 5 * plain[1], atol=1e-7)
    taken.clear()
    dataclasses.replace(defence, K=250, chunk=8).gradient(x, y, 2, whole=True)
    assert taken == [("path", 4, 250), ("path", 2, 250)]


def test_without_a_chain_there_is_one_evaluation():
    f, seen = classifier(), []
    f.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    defence = Defence(f)
    assert defence.logits(torch.rand(3, 1, 28, 28), 50).shape == (1, 3, 10)
    defence.gradient(torch.rand(3, 1, 28, 28), torch.arange(3), 50)
    assert seen == [3, 3]


def test_along_one_path_of_noise_bpda_is_exact(exact):
    """V is piecewise linear: over a vanishing distance the end of a step moves as its start does."""
    torch.manual_seed(4)
    V, x, v = Small(9).double(), torch.rand(6, 1, 3, 3).double(), torch.randn(6, 1, 3, 3).double()
    for tau in (0.3, 1e-7):
        T = tau ** 2 / 9
        _, way = ss.langevin_path(x, 4, V, tau, T)
        same = torch.allclose(ss.pull_back(v, way, V, tau, T), v, atol=1e-2)
        assert same == (tau == 1e-7)


def test_gradient_through_the_chain_of_a_quadratic(exact, no_noise):
    f, x, y = classifier(), torch.rand(4, 1, 28, 28), torch.arange(4)
    defence = Defence(f, 5, *chains_of(Quadratic(1.0), 0.4, 1.0))  # a step shrinks by 1 - .08
    whole, bpda = defence.gradient(x, y, 2, whole=True)[1], defence.gradient(x, y, 2)[1]
    assert torch.allclose(whole, 0.92 ** 5 * bpda, rtol=1e-2, atol=1e-6)


def test_the_defence_runs_chains_of_the_energy_as_it_was_trained(exact, tmp_path):
    """The same tau and temperature, there and back."""
    V, f, x = ebm(), classifier(), torch.rand(3, 1, 28, 28)
    defence = ss.defend(SimpleNamespace(chunk=77), settings(tau=0.05, temperature=3e-3, k=4), f, V)
    assert defence.f is f and (defence.K, defence.chunk) == (4, 77)
    assert torch.equal(again(defence.chain, x, 5), again(langevin, x, 5, V, 0.05, 3e-3))
    end, way = again(defence.path, x, 5)
    assert torch.equal(end, again(langevin, x, 5, V, 0.05, 3e-3))
    assert torch.equal(defence.back(x, way), ss.pull_back(x, way, V, 0.05, 3e-3))
    y = torch.arange(3)
    bpda, whole = again(defence.gradient, x, y, 2), again(defence.gradient, x, y, 2, True)
    assert (whole[1] - bpda[1]).norm() > 1e-3 * bpda[1].norm()


@pytest.mark.parametrize("fast", [True, False])
def test_the_defence_is_as_fast_as_asked(monkeypatch, fast):
    asked = []
    monkeypatch.setattr(ss, "frozen_copy", lambda V, fast=True: asked.append(fast) or frozen_copy(V, fast))
    ss.defend(SimpleNamespace(chunk=5), settings(), linear(), ebm(), fast)
    assert asked == [fast]


# --- Algorithm 1 ---


class Scripted:
    """A defence that answers from lists: what each evaluation says, and the verdicts with many chains."""
    f = chain = None
    K = 1

    def __init__(self, screens, verdicts):
        self.screens, self.verdicts, self.calls, self.seen = list(screens), list(verdicts), [], []

    def predict(self, x, H):
        self.calls.append(("predict", len(x), H))
        return self.verdicts.pop(0)[:len(x)]

    def gradient(self, x, y, H, whole=False):
        self.calls.append(("gradient", len(x), H, whole))
        self.seen.append(x.clone())
        return F.one_hot(self.screens.pop(0)[:len(x)], 10).float(), torch.ones_like(x)

    def right(self, prediction, y):
        return prediction == y


def labels(*values):
    return torch.tensor(values)


def test_verification_only_rescues_and_the_record_never_recovers(tmp_path):
    x, y = torch.rand(4, 1, 8, 8), labels(1, 1, 1, 1)
    defence = Scripted([labels(0, 0, 1), labels(1, 1), labels(0, 1)],  # evaluations of images 0, 1, 2
                       [labels(1, 1, 1, 0),  # natural: image 3 is wrong
                        labels(1, 0), labels(0)])  # verdicts: 0 rescued, 1 not; then 0
    a = Attack(LInf(0.1, 0.05), 2, 3, 7, whole=True)
    outcome = eot_attack(run_of(tmp_path)[0], defence, x, y, a)
    assert outcome.record.tolist() == [[True, True, True, False], [True, False, True, False],
                                       [True, False, True, False], [False, False, True, False]]
    assert defence.calls == [("predict", 4, 7), ("gradient", 3, 3, True), ("predict", 2, 7), ("gradient", 2, 3, True),
                             ("gradient", 2, 3, True), ("predict", 1, 7)]  # broken images left the batch
    assert torch.equal(outcome.natural, outcome.record[0]) and torch.equal(outcome.robust, outcome.record[-1])
    assert torch.equal(outcome.x[3], x[3]) and outcome.attack == a  # naturally wrong: the image itself
    assert torch.equal(outcome.x[1], defence.seen[0][1])  # what broke an image, untouched since
    assert torch.equal(outcome.x[[0, 2]], defence.seen[2])  # else the last one tried
    assert (outcome.x - x).abs().max() <= 0.1 + 1e-6 and outcome.x.min() >= 0 and outcome.x.max() <= 1


def test_what_is_right_is_the_defences_to_say(tmp_path):
    class Never(Scripted):
        def right(self, prediction, y):
            return prediction != y
    defence = Never([labels(0, 1)] * 2, [labels(0, 0), labels(1), labels(1)])
    outcome = eot_attack(run_of(tmp_path)[0], defence, torch.rand(2, 1, 8, 8), labels(1, 1),
                         Attack(LInf(0.1, 0.1), 1, 1, 1))
    assert outcome.natural.tolist() == [True, True] and outcome.robust.tolist() == [True, False]


def test_restarts_only_lower_and_start_afresh(tmp_path):
    f, x = linear(), torch.rand(40, 1, 28, 28)
    y, records = f(x).argmax(1), []
    for restarts in (1, 4):
        a = Attack(LInf(0.5, 0.0), 1, 1, 1, restarts)  # steps of length 0: the random start alone
        records.append(eot_attack(run_of(tmp_path)[0], Defence(f), x, y, a).record)
    one, four = records
    assert len(one) == 3 and len(four) == 9 and torch.equal(one, four[:3])
    assert (four[1:] <= four[:-1]).all() and 0 < four[-1].sum() < one[-1].sum() < 40


def test_every_restart_takes_its_own_start_and_all_its_steps(tmp_path):
    """N + 1 evaluations and N updates each; the adversary that is kept is one that was evaluated."""
    x, y = torch.full((1, 1, 8, 8), 0.5), labels(1)
    defence = Scripted([y] * 6, [y])
    outcome = eot_attack(run_of(tmp_path)[0], defence, x, y, Attack(Unmoved(0.4, 0.1), 2, 1, 1, restarts=2))
    seen = [x.mean().item() for x in defence.seen]
    assert seen == pytest.approx([0.5, 0.6, 0.7] * 2) and outcome.x.mean().item() == pytest.approx(0.7)


def test_the_attack_moves_in_its_ball(tmp_path):
    x, y = torch.full((2, 1, 8, 8), 0.5), labels(1, 1)
    a = Attack(UnmovedL2(0.25, 0.1), 4, 1, 1)
    moved = [seen - x for seen in attack_on(tmp_path, x, y, a).seen]
    lengths = [size(a.ball, m)[0].item() for m in moved]
    assert lengths == pytest.approx([0, 0.1, 0.2, 0.25, 0.25], abs=1e-5)


def attack_on(tmp_path, x, y, a):
    defence = Scripted([y] * (a.N + 1), [y])
    eot_attack(run_of(tmp_path)[0], defence, x, y, a)
    return defence


def test_dropping_broken_images_leaves_the_others_as_they_were(exact, tmp_path, noise_by_pixel):
    f, x = linear(), torch.rand(12, 1, 28, 28)
    defence = Defence(f, 2, *chains_of(ebm(), 0.01, 1e-4), chunk=7)
    y, a = defence.predict(x, 3), Attack(Unmoved(0.01, 0.004), 3, 2, 3)
    run = run_of(tmp_path)[0]
    whole = eot_attack(run, defence, x, y, a)
    left = whole.robust
    assert 0 < left.sum() < len(x)
    alone = eot_attack(run, defence, x[left], y[left], a)
    assert alone.record.all() and torch.allclose(alone.x, whole.x[left], atol=1e-6)


def test_attacks_have_a_random_stream_of_their_own(tmp_path):
    """What an experiment finds does not depend on who made the attack first; nor does a finished one draw."""
    f, x = linear(), torch.rand(6, 1, 28, 28)
    y, a = f(x).argmax(1), Attack(LInf(0.3, 0.1), 1, 1, 1)
    torch.manual_seed(1)
    before, run = torch.get_rng_state(), run_of(tmp_path)[0]
    one = eot_attack(run, Defence(f), x, y, a).x
    assert torch.equal(torch.get_rng_state(), before)
    eot_attack(run, Defence(f), x, y, a)  # from its file
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(eot_attack(run_of(tmp_path, name="other")[0], Defence(f), x, y, a).x, one)
    seeded = eot_attack(run_of(tmp_path, "--seed", 1, name="seed 1")[0], Defence(f), x, y, a).x
    assert not torch.equal(seeded, one)


def test_an_interrupted_attack_goes_on_bit_exactly(tmp_path, monkeypatch):
    f, x = classifier(), torch.rand(8, 1, 28, 28)
    y, a = f(x).argmax(1), Attack(LInf(0.03, 0.01), 3, 2, 3, restarts=2)
    defence = Defence(f, 2, *chains_of(ebm(), 0.05, 1e-3))
    whole = eot_attack(run_of(tmp_path, name="whole")[0], defence, x, y, a)
    run = run_of(tmp_path, name="broken")[0]
    calls = []

    class Dying(Defence):
        def gradient(self, *arguments):
            calls.append(len(arguments[0]))
            if len(calls) == 5:
                raise Killed
            return super().gradient(*arguments)
    with monkeypatch.context() as m:
        m.setattr(common.Training, "SAVE_SECONDS", -1)
        with pytest.raises(Killed):
            eot_attack(run, Dying(f, 2, defence.chain), x, y, a)
    calls.clear()
    torch.manual_seed(99)
    going_on = Dying(f, 2, defence.chain)
    broken = eot_attack(run, going_on, x, y, a)
    assert len(calls) < 5  # the first four evaluations were not made again
    assert torch.equal(whole.record, broken.record) and torch.equal(whole.x, broken.x)
    finished = Dying(f, 2, defence.chain)
    finished.gradient = finished.predict = None  # done: the defence is not asked
    assert torch.equal(eot_attack(run, finished, x, y, a).record, whole.record)


def test_another_attack_is_not_taken_from_the_file_of_this_one(tmp_path):
    f, x = linear(), torch.rand(6, 1, 28, 28)
    y, run, a = f(x).argmax(1), run_of(tmp_path)[0], Attack(LInf(0.02, 0.01), 1, 2, 3)
    defence = Defence(f, 2, *chains_of(ebm(), 0.05, 1e-3))
    eot_attack(run, defence, x, y, a)
    others = [(defence, x[:5], y[:5], a), (dataclasses.replace(defence, K=3), x, y, a),
              (dataclasses.replace(defence, f=linear(1)), x, y, a),
              (dataclasses.replace(defence, chain=partial(langevin, V=ebm(seed=1), tau=0.05, T=1e-3)), x, y, a)]
    for change in ({"ball": L2(0.02, 0.01)}, {"ball": LInf(0.03, 0.01)}, {"N": 2}, {"H_adv": 3}, {"H_def": 4},
                   {"restarts": 2}, {"whole": True}):
        others.append((defence, x, y, a._replace(**change)))
    for number, other in enumerate(others):
        eot_attack(run, *other)
        assert len(list(run.folder.glob("attack-*.pt"))) == number + 2


# --- exponents and distances ---


def test_lyapunov_exponent_of_linear_maps(exact):
    """x -> (1 - tau^2 a / 2) x: log of the largest factor, whatever the noise; the same noise cancels."""
    torch.manual_seed(0)
    a = torch.tensor([[0.5, 0.2], [1.0, 1.5]])
    V, x = Quadratic(2.0, a=a), torch.rand(5, 1, 2, 2)
    found = lyapunov(x, 300, V, 1.0, 2.0, 0.3, 1e-2)
    assert found.shape == (5,) and torch.allclose(found, torch.full((5,), math.log(0.9)), atol=2e-3)
    growing = lyapunov(x, 30, Quadratic(-0.7), 0.5, 0.7, 0.0, 1e-2)
    assert torch.allclose(growing, torch.full((5,), math.log(1.125)), atol=2e-3)


class Logistic(nn.Module):
    """An energy whose step with tau^2 = 2 T and without noise is x -> 4 x (1 - x)."""

    def forward(self, x):
        return (4 * x ** 3 / 3 - 3 * x ** 2 / 2).flatten(1).sum(1)


def test_lyapunov_exponent_of_the_logistic_map(exact):
    x = torch.rand(300, 1, 1, 1, dtype=torch.float64)
    for _ in range(50):
        x = 4 * x * (1 - x)
    found = lyapunov(x, 400, Logistic(), math.sqrt(2), 1.0, 0.0, 1e-9)
    assert found.mean().item() == pytest.approx(math.log(2), abs=0.01)


def test_two_chains_get_the_same_noise_eta_tau_and_keep_their_distance(exact):
    V, tau, T, eta, d0 = Quadratic(0.5, a=torch.tensor([[1.0, 3.0]])), 0.4, 0.5, 3.0, 0.2
    x, y, growth = torch.rand(4, 1, 1, 2), torch.rand(4, 1, 1, 2), torch.ones(4)
    z = again(torch.randn_like, x)
    next_x, next_y, grown = again(ss.lyapunov_step, (x, y, growth), V, tau, T, eta, d0)
    factor = 1 - tau ** 2 / 2 * torch.tensor([1.0, 3.0])
    moved = factor * (y - x)
    length = moved.flatten(1).norm(dim=1)
    assert torch.allclose(next_x, factor * x + 1.2 * z, atol=1e-6)
    assert torch.allclose(next_y, next_x + moved * (d0 / length).view(4, 1, 1, 1), atol=1e-6)
    assert torch.allclose(grown, 1 + (length / d0).log(), atol=1e-5)


def test_the_start_of_an_exponent_does_not_count(monkeypatch):
    calls = []

    def spy(step, state, n, *arguments):
        calls.append((n, state[2].clone(), (state[1] - state[0]).flatten(1).norm(dim=1)))
        return state[0], state[1], state[2] + 12.0
    monkeypatch.setattr(ss, "repeat", spy)
    found = lyapunov(torch.rand(2, 1, 4, 4), 6, Quadratic(), 1.0, 1.0, 1.0, 0.3)
    assert [n for n, _, _ in calls] == [2, 6] and found.tolist() == [2.0, 2.0]
    for _, growth, distance in calls:
        assert growth.tolist() == [0, 0] and torch.allclose(distance, torch.full((2,), 0.3), atol=1e-5)


def test_tangent_vectors_see_nothing_in_a_piecewise_linear_energy():
    """Why figure 2.7 takes two chains: the Hessian-vector product is exactly zero."""
    V, x = ebm(), torch.rand(2, 1, 28, 28, requires_grad=True)
    slope, = torch.autograd.grad(V(x).sum(), x, create_graph=True)
    curved, = torch.autograd.grad((slope * torch.randn_like(x)).sum(), x)
    assert curved.abs().max() == 0 and slope.abs().max() > 0


def test_frechet_distance_of_gaussians():
    """One dimension: (m1 - m2)^2 + (s1 - s2)^2. Several: the trace of (C1 C2)^1/2 from its eigenvalues."""
    def number(*values):
        return [torch.tensor(v).double() for v in values]
    assert ss.frechet_distance(*number([1.0], [[4.0]], [3.5], [[9.0]])) == pytest.approx(2.5 ** 2 + 1)
    torch.manual_seed(1)
    A, B = torch.randn(2, 6, 6).double()
    C1, C2, m1, m2 = A @ A.T, B @ B.T, torch.randn(6).double(), torch.randn(6).double()
    cross = torch.linalg.eigvals(C1 @ C2).real.sqrt().sum()
    expected = (m1 - m2).pow(2).sum() + C1.trace() + C2.trace() - 2 * cross
    assert ss.frechet_distance(m1, C1, m2, C2) == pytest.approx(expected.item())
    assert ss.frechet_distance(m1, C1, m1, C1) == pytest.approx(0, abs=1e-6)


def test_margin_is_the_label_against_the_best_other():
    logits = torch.tensor([[1.0, 4.0, 2.5], [1.0, 4.0, 2.5], [0.0, -1.0, -3.0]])
    assert ss.margin(logits, labels(1, 2, 0)).tolist() == [1.5, -1.5, 1.0]


# --- the experiments, one by one, with stand-ins for what they are given ---


class Sheet:
    """In place of a run: keeps what an experiment draws."""

    def __init__(self, **changes):
        self.seed, self.device, self.chunk, self.smoke = 0, torch.device("cpu"), 250, False
        self.drawn = {}
        vars(self).update(changes)

    def pictures(self, name, rows, columns):
        self.drawn[name] = rows

    def histograms(self, name, panels):
        self.drawn[name] = panels

    def lines(self, name, rows, x, **_):
        for row in rows:
            assert any(setting in row for setting in x.split()) or not row["quantity"].startswith("robust")
        self.drawn[name] = rows


def outcome_of(n, evaluations, seed, a=None, x=None):
    """An Outcome with a record of its own, which falls row by row."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.rand(evaluations + 1, n, generator=g) < 1 - 0.6 / (evaluations + 1)
    record = rows.long().cumprod(0).bool()
    return Outcome(record[0], record[-1], record, x, a)


@pytest.fixture
def attacked(monkeypatch):
    """In place of eot_attack: a list of (defence, x, y, attack, outcome)."""
    calls = []

    def attack(run, defence, x, y, a):
        outcome = outcome_of(len(x), a.restarts * (a.N + 1), len(calls), a, x)
        calls.append((defence, x, y, a, outcome))
        return outcome
    monkeypatch.setattr(ss, "eot_attack", attack)
    return calls


def images(n=12):
    torch.manual_seed(11)
    return torch.rand(n, 1, 28, 28), torch.arange(n) % 10


ATTACK = Attack(LInf(0.08, 0.02), 4, 6, 9, restarts=3)


def test_rates_are_of_natural_and_attacked_images():
    outcome = outcome_of(10, 5, 1, ATTACK._replace(whole=True))
    natural, robust = ss.rates(", T", outcome, K=5)
    assert natural == rate("natural acc, T", outcome.natural, K=5)
    assert robust == rate("robust acc, T", outcome.robust, eps=0.08, N=4, H_adv=6, K=5)
    assert natural["value"] != robust["value"]


def test_table_2_1_judges_both_kinds_of_images_by_each_defence(monkeypatch):
    x, y = images()
    transferred = (x + 0.1).clamp(0, 1)
    f, chain, asked, answers = linear(), object(), [], {}

    def predict(self, given, H):
        which = "natural" if given is x else "attacked"
        assert self.f is f and given is (x if which == "natural" else transferred)
        asked.append((which, self.K, self.chain, H))
        right = torch.rand(len(x)) < 0.7
        answers[which, self.K] = right
        return torch.where(right, y, y + 1)
    monkeypatch.setattr(Defence, "predict", predict)
    s = settings(k=30, h_def=9, eps=0.1)
    rows = ss.table_2_1(s, f, Defence(f, 30, chain), x, y, transferred)
    assert sorted({K for _, K, _, _ in asked}) == [0, 10, 30] and {H for *_, H in asked} == {9}
    assert all(used is (chain if K else ss.stay) for _, K, used, _ in asked)
    expected = []
    for title, K in ((", no chain", 0), (", short chain", 10), ("", 30)):
        natural = answers["natural", K]
        assert (natural & answers["attacked", K]).sum() < min(natural.sum(), answers["attacked", K].sum())
        expected.append(rate(f"natural acc{title}", natural, K=K))
        expected.append(rate(f"robust acc, transfer PGD{title}", natural & answers["attacked", K], K=K, eps=0.1))
    assert rows == expected


def test_table_2_2_joins_three_attacks_and_has_both_baselines(attacked):
    x, y = images(40)
    transferred = (x + 0.1).clamp(0, 1)
    f, f_at, s = linear(0), linear(1), settings(h_def=9, n=4, eps=0.08, k=5)
    transfer = torch.rand(40) < 0.7

    class Fixed:
        def predict(self, given, H):
            assert given is transferred and H == 9
            return torch.where(transfer, y, y + 1)
    bpda, defence = outcome_of(40, 5, 77, ATTACK), Fixed()
    rows = ss.table_2_2(None, s, f, f_at, defence, x, y, ATTACK, transferred, bpda)
    through, plain, trained = attacked
    assert through[0] is defence and through[3] == ATTACK._replace(whole=True)
    assert plain[0].f is f and trained[0].f is f_at and plain[0].K == trained[0].K == 0
    assert plain[3] == trained[3] == ATTACK._replace(H_adv=1, H_def=1)
    assert all(call[1] is x and call[2] is y for call in attacked)
    worst = bpda.robust & through[4].robust & transfer
    for two in (bpda.robust & through[4].robust, bpda.robust & transfer, through[4].robust & transfer):
        assert two.sum() > worst.sum()  # each of the three attacks counts
    assert (bpda.natural & transfer).sum() < transfer.sum()
    expected = [rate("natural acc", bpda.natural, K=5), ss.rates(", BPDA+EOT", bpda)[1],
                ss.rates(", whole chain", through[4])[1],
                rate("robust acc, transfer PGD", bpda.natural & transfer, eps=0.08, N=4),
                rate("robust acc, worst of these", worst, eps=0.08),
                *ss.rates(", f", plain[4]), *ss.rates(", AT", trained[4])]
    assert rows == expected


def test_mean_ends_are_of_sixteen_chains_with_the_same_noise():
    x = torch.rand(3, 1, 4, 4)
    defence = Defence(None, 5, lambda z, steps: steps * z + torch.randn_like(z))
    noise = ss.mean_end(Sheet(), defence, 0 * x, 5)
    assert torch.allclose(ss.mean_end(Sheet(), defence, x, 2), 2 * x + noise, atol=1e-5)
    assert noise.std().item() == pytest.approx(1 / 4, rel=0.3)


def test_gradients_compares_both_on_the_same_images(attacked, monkeypatch):
    clock, asked = [0.0], []
    monkeypatch.setattr(ss, "time", SimpleNamespace(time=lambda: clock[0]))
    (x, y), s = images(), settings(k=30, h_adv=6, h_def=5, few=7, n=8, eps=0.1)
    ends = []
    monkeypatch.setattr(ss, "mean_end", lambda run, d, x, steps: ends.append((x, steps)) or steps / 30 * x)
    start = torch.full((7, 1, 28, 28), 0.5)

    noise = []

    class Fixed:
        def gradient(self, given, labels, H, whole=False):
            assert torch.equal(given, start) and torch.equal(labels, y[:7]) and H == 6
            clock[0] += 6 if whole else 2
            return None, torch.full(given.shape, 1.0 if whole else -3.0)

        def logits(self, given, H):
            noise.append(torch.rand(()).item())
            assert H == 10
            mean = given.flatten(1).mean(1)
            return torch.stack([F.one_hot(y[:7], 10) * (mean[:, None] + side) for side in (-1, 1)])
    defence = Fixed()
    run, a = Sheet(), ATTACK._replace(ball=Unmoved(0.1, 0.02), N=8)
    monkeypatch.setattr(Unmoved, "start", lambda self, x: torch.full_like(x, 0.5))
    rows = ss.gradients(run, s, defence, x, y, a)
    assert [(row["quantity"], row["steps"], round(row["value"], 4)) for row in rows if "steps" in row] == [
        (f"share left of a {kind} change", steps, round(steps / 30, 4)) for kind in ("white", "smooth") for steps in (0, 1, 3, 10, 30)]
    assert [steps for _, steps in ends] == [0, 0, 1, 1, 3, 3, 10, 10, 30, 30] * 2
    assert all(torch.equal(given, x[:7]) for given, _ in ends[1::2])
    white, smooth = ends[0][0] - x[:7], ends[10][0] - x[:7]
    assert white.abs().max().item() == pytest.approx(0.05)
    for change, together in ((white, (0.4, 0.6)), (smooth, (0.75, 1))):  # neighbours of one sign: half, most
        same = (change[..., 1:] * change[..., :-1] > 0).float().mean().item()
        assert together[0] < same < together[1]
    losses = [(row["quantity"], row["length"], row["value"]) for row in rows if "length" in row]
    expected = []
    for name, sign in (("BPDA", -1), ("whole chain", 1)):
        for length in (0, 0.025, 0.05, 0.1):
            loss = math.log(9 + math.exp(0.5 + sign * length)) - (0.5 + sign * length)
            expected.append((f"loss, {name}", length, pytest.approx(loss, rel=1e-4)))
    assert losses == expected and len(noise) == 8 and len(set(noise)) == 1  # the same for all
    one, two = attacked
    for call, whole in ((one, False), (two, True)):
        assert call[0] is defence and torch.equal(call[1], x[:7]) and call[3] == a._replace(whole=whole, restarts=1)
    over = [row for row in rows if row["quantity"] == "robust acc, whole chain"]
    assert over == [rate("robust acc, whole chain", two[4].record[N + 1], N=N) for N in (0, 2, 4, 6, 8)]
    assert rows[-1] == {"quantity": "time, whole chain / BPDA", "value": 3.0}
    assert run.drawn["gradients"] == rows


def test_figure_2_2_has_short_and_long_chains_of_both_energies(exact, monkeypatch):
    calls = []

    def chain(x, steps, V, tau, T):
        calls.append((x, steps, V.net.scale.item(), tau, T))
        return x + steps * V.net.scale
    monkeypatch.setattr(ss, "langevin", chain)
    run, data, s = Sheet(), digits(), settings(k_train=5, tau=0.03, temperature=0.002)
    rows = ss.figure_2_2(run, s, data, Quadratic(1e-3), Quadratic(2e-3))
    first = data.take(slice(0, 8))
    assert {(steps, round(scale, 6), tau, T) for _, steps, scale, tau, T in calls} == {
        (steps, scale, 0.03, 0.002) for steps in (400, 1000) for scale in (1e-3, 2e-3)}
    for x, steps, *_ in calls:
        assert torch.equal(x, first) == (steps == 1000) and x.min() >= 0 and x.max() <= 1  # noise, or data
    assert [row["quantity"] for row in rows] == ["long run: mean |x - data|, convergent",
                                                 "long run: mean |x - data|, non-convergent"]
    assert [row["value"] for row in rows] == pytest.approx([1.0, 2.0], rel=1e-4)
    assert [row["steps"] for row in rows] == [1000, 1000]
    drawn = run.drawn["figure2.2"]
    assert torch.equal(drawn["data"], first) and len(drawn) == 5
    for title, moved in (("convergent: 1000 steps from data", 1.0), ("non-convergent: 1000 steps from data", 2.0)):
        assert torch.allclose(drawn[title], first + moved, atol=1e-4)
    for title, moved in (("convergent: 400 steps from noise", 0.4), ("non-convergent: 400 steps from noise", 0.8)):
        start = drawn[title] - moved
        assert start.mean().item() == pytest.approx(0.5, abs=0.03) and not torch.allclose(start, first, atol=0.1)


def test_figure_2_3_draws_many_chains_of_the_least_and_the_most_certain_image():
    """Chains of the borderline image say 1, 1, -1, -1, -1, 2.5, ...: the mean of few is wrong, of all not."""
    x, y = torch.rand(4, 1, 28, 28), labels(0, 1, 1, 0)
    margins, s, asked = torch.tensor([3.0, -0.2, 0.5, -4.0]), settings(h_def=6, h_adv=2), []

    class Fixed:
        def logits(self, given, H):
            asked.append((given, H))
            if len(given) == 4:
                # F_H has these margins; each chain for itself has others
                spread = torch.tensor([-9.0, 9.0]).repeat(H // 2)
                above = margins + spread[:, None]
                label = y
            else:
                i = [torch.equal(given[0], one) for one in x].index(True)
                pattern = [1.0, 1.0, -1.0, -1.0, -1.0, 2.5] if i == 1 else [-4.0]
                above = torch.tensor(pattern).repeat(H // len(pattern))[:, None]
                label = y[i:i + 1]
            logits = torch.zeros(*above.shape, 3)
            logits.scatter_(2, label.expand(above.shape)[..., None], above[..., None])
            logits[..., 2] = -50.0
            if len(given) == 4:  # of image 0 one chain is very sure, five are rather sure of another class
                logits[0, 0] = torch.tensor([20.0, 0.0, -50.0])
                logits[1:, 0] = torch.tensor([-3.0, 0.0, -50.0])
            return logits
    run = Sheet()
    rows = ss.figure_2_3(run, s, Fixed(), y, SimpleNamespace(x=x))
    assert torch.equal(asked[0][0], x) and [H for _, H in asked] == [6, 180, 180]
    assert torch.equal(asked[1][0], x[1:2]) and torch.equal(asked[2][0], x[3:4])
    assert rows[0]["quantity"] == "mean softmax outputs (sec. 2.5.1) give the same class" and rows[0]["n"] == 4
    assert rows[0]["value"] == 0.75
    found = [(row["quantity"], row["H"], row["n"], round(row["value"], 6)) for row in rows[1:]]
    borderline, clear = "wrong F_H, borderline image", "wrong F_H, clear image"
    assert found == [(borderline, 1, 180, 0.5), (borderline, 2, 90, round(1 / 3, 6)), (borderline, 6, 30, 0.0),
                     (clear, 1, 180, 1.0), (clear, 2, 90, 1.0), (clear, 6, 30, 1.0)]
    panels = run.drawn["figure2.3"]
    assert [list(panel) for panel in panels.values()] == [["H = 1", "H = 2", "H = 6"]] * 2


def test_figure_2_4_sweeps_both_balls_for_all_three(attacked):
    (x, y), f, f_at, defence = images(), linear(0), linear(1), object()
    run, s = Sheet(), settings(eps=0.2, few=7)
    rows = ss.figure_2_4(run, s, f, f_at, defence, x, y, ATTACK)
    expected, calls = [], iter(attacked)
    for norm, Ball, radius in (("l_inf", LInf, 0.2), ("l_2", L2, 1.0)):
        for title in ("EBM", "AT", "f"):
            for factor in (0.25, 0.5, 1, 1.5, 2):
                defended, given, given_y, a, outcome = next(calls)
                if title == "EBM":
                    assert defended is defence
                else:
                    assert defended.f is {"AT": f_at, "f": f}[title] and defended.K == 0
                assert type(a.ball) is Ball and a.ball == pytest.approx((factor * radius, factor * radius / 4))
                assert a._replace(ball=ATTACK.ball, restarts=3) == ATTACK and a.restarts == 1
                assert torch.equal(given, x[:7]) and torch.equal(given_y, y[:7])
                expected.append(rate(f"robust acc, {title}, {norm}", outcome.robust, eps=a.ball.eps))
    assert rows == expected and not list(calls)
    assert run.drawn == {"figure2.4-l_inf": rows[:15], "figure2.4-l_2": rows[15:]}


def test_figure_2_5_reads_the_record_of_a_long_attack(attacked):
    (x, y), f_at, defence = images(30), linear(1), object()
    run, s = Sheet(), settings(n=3, h_adv=6, few=25)
    rows = ss.figure_2_5(run, s, f_at, defence, x, y, ATTACK)
    assert [call[3] for call in attacked[:2]] == [ATTACK._replace(N=15, H_adv=8, restarts=1)] * 2
    assert attacked[0][0] is defence and attacked[1][0].f is f_at and attacked[1][0].K == 0
    expected = []
    for title, call in zip(("EBM", "AT"), attacked):
        for N in (0, 3, 6, 9, 12, 15):  # row 0 of the record is before the attack
            expected.append(rate(f"robust acc over N, {title}", call[4].record[N + 1], N=N))
    assert expected[5]["value"] < expected[0]["value"]
    assert [call[3] for call in attacked[2:]] == [ATTACK._replace(H_adv=H, restarts=1) for H in (1, 2, 6, 12)]
    assert all(call[0] is defence for call in attacked[2:])
    over_H = []
    for call in attacked[2:]:
        over_H += ss.rates(", EBM", call[4])
    assert rows == expected + over_H
    assert all(torch.equal(call[1], x[:25]) and torch.equal(call[2], y[:25]) for call in attacked)
    assert run.drawn["figure2.5-N"] == expected and run.drawn["figure2.5-H"] == over_H


def test_figure_2_6_compares_energies_image_by_image():
    (x, y), given = images(), []
    transferred, broken = (x + 0.05).clamp(0, 1), (x * 0.9).clone()

    class Watched(Quadratic):
        def forward(self, x):
            given.append(x)
            return super().forward(x)
    run, s, V = Sheet(), settings(eps=0.07, temperature=0.02), Watched(0.5, 0.4)
    natural = torch.arange(len(x)) % 4 > 0  # the others were misread before, and never attacked
    rows = ss.figure_2_6(run, s, V, x, transferred, SimpleNamespace(x=broken, natural=natural))
    sets = dict(zip(("natural", "transfer PGD", "BPDA+EOT", "random signs", "uniform noise"), given))
    x = x[natural]
    assert torch.equal(sets["natural"], x) and torch.equal(sets["transfer PGD"], transferred[natural])
    assert torch.equal(sets["BPDA+EOT"], broken[natural])
    signs, noise = sets["random signs"], sets["uniform noise"]
    step = (signs - x)[(signs > 0) & (signs < 1)]
    assert torch.allclose(step.abs(), torch.full_like(step, 0.07), atol=1e-6) and abs(step.mean()) < 0.01
    assert signs.min() == 0 and signs.max() == 1 and noise.min() >= 0 and noise.max() <= 1
    assert noise.std().item() == pytest.approx(1 / math.sqrt(12), rel=0.05) and not torch.equal(noise, x)
    U = {name: 0.5 * (x - 0.4).pow(2).flatten(1).sum(1) / 2 / 0.02 for name, x in sets.items()}
    found = {row["quantity"]: row for row in rows}
    for name, energies in U.items():
        assert found[f"mean U, {name}"]["value"] == pytest.approx(energies.mean().item(), rel=1e-5)
        if name != "natural":
            quantity = f"U above the natural image's, {name}"
            assert found[quantity] == rate(quantity, energies > U["natural"])
    panels = list(run.drawn["figure2.6"].values())
    assert list(panels[0]) == list(sets) and list(panels[1]) == list(sets)[:4]


def test_figure_2_7_settles_and_measures_with_the_same_noise(monkeypatch):
    settled, measured, copies = [], [], []
    V, x = Quadratic(), images(20)[0]

    def chain(given, steps, V, tau, T):
        settled.append((given, steps, V, tau, T))
        return given + len(settled)

    def exponent(given, steps, V, tau, T, eta, d0):
        measured.append((given, steps, V, tau, T, eta, d0))
        return torch.tensor([eta, d0])
    monkeypatch.setattr(ss, "langevin", chain)
    monkeypatch.setattr(ss, "lyapunov", exponent)
    monkeypatch.setattr(ss, "frozen_copy", lambda V, fast=True: copies.append((V, fast)) or V)
    run, s = Sheet(), settings(k=7, tau=0.1, temperature=0.5)
    rows = ss.figure_2_7(run, s, V, x)
    assert copies == [(V, False)]  # a finite distance needs float32
    etas = [tau / 0.1 for _, _, _, tau, _ in settled]
    assert etas[0] == pytest.approx(0.01) and etas[-1] == pytest.approx(10) and etas == sorted(etas)
    expected = []
    for i, (eta, (given, steps, net, tau, T)) in enumerate(zip(etas, settled)):
        assert torch.equal(given, x[:16]) and steps == 70 and net is V
        assert tau ** 2 / T == pytest.approx(0.1 ** 2 / 0.5)  # more noise, the same drift
        for end, steps, net, tau, T, noise, d0 in measured[3 * i:3 * i + 3]:
            assert torch.equal(end, x[:16] + (i + 1)) and noise == pytest.approx(eta)
            assert (steps, net, tau, T) == (21, V, 0.1, 0.5)
            expected.append((f"exponent a step, d0 = {d0}", pytest.approx((noise + d0) / 2), noise))
    assert [(row["quantity"], row["value"], row["eta"]) for row in rows] == expected
    assert len({d0 for *_, d0 in measured}) == 3 and len(measured) == 3 * len(settled) >= 20
    pictures = list(run.drawn["figure2.7-samples"].values())
    assert run.drawn["figure2.7"] == rows and torch.equal(pictures[1], x[:16] + 2)


def test_figure_2_8_changes_the_number_of_steps_of_either_energy(attacked):
    (x, y), f = images(), linear()
    defence, adam = (Defence(f, 30, lambda x, K, step=step: x + K * step) for step in (1, 2))
    run, s = Sheet(), settings(k=30, h_adv=6, few=5)
    rows = ss.figure_2_8(run, s, defence, adam, x, y, ATTACK)
    expected, calls = [], iter(attacked)
    for title, wanted in ((", convergent", defence), (", non-convergent", adam)):
        for K in (3, 10, 30, 90):
            defended, given, given_y, a, outcome = next(calls)
            assert defended.chain is wanted.chain and defended.K == K and defended.f is f
            assert a == ATTACK._replace(restarts=1)
            assert torch.equal(given, x[:5]) and torch.equal(given_y, y[:5])
            expected += ss.rates(title, outcome, K=K)
            shown = run.drawn["figure2.8-samples"][f"{title[2:]}, {K} steps"]
            assert torch.equal(shown, x[:16] + K * (1 if wanted is defence else 2))
    assert rows == expected and not list(calls) and run.drawn["figure2.8"] == rows


class Pixels(nn.Module):
    """Features: six pixels of an image."""

    def features(self, x):
        return x[:, 0, 10, 3:9]


def test_figure_2_9_measures_against_other_training_images(exact):
    data, s = digits(100), settings(few=4, k=10)
    network, taken = Pixels(), {"convergent": [], "non-convergent": []}

    def moving(name, speed):
        def chain(x, steps):
            taken[name].append((len(x), steps))
            return x + speed * steps
        return Defence(None, 10, chain)
    run = Sheet(chunk=25)
    rows = ss.figure_2_9(run, s, data, moving("convergent", 1e-3), moving("non-convergent", -2e-3),
                         ("FD-cls", network))
    reference = common.feature_statistics(network, data.take(slice(40, 80)))
    expected = []
    for title, speed in (("convergent", 1e-3), ("non-convergent", -2e-3)):
        for k in (0, 1, 3, 10, 30, 100, 300):
            here = common.feature_statistics(network, (data.take(slice(0, 40)) + speed * k).clamp(0, 1))
            distance = ss.frechet_distance(*reference, *here)
            expected.append((f"FD-cls, {title}", k, 40, pytest.approx(distance, rel=1e-3)))
        assert {n for n, _ in taken[title]} == {25, 15} and sum(k for n, k in taken[title] if n == 25) == 300
    assert [(row["quantity"], row["steps"], row["n"], row["value"]) for row in rows] == expected
    assert rows[0]["value"] > 1e-3 and run.drawn["figure2.9"] == rows  # the floor is not 0: other images


def test_figure_2_10_times_the_plain_loop_and_the_fast_path(monkeypatch):
    clock, asked = [0.0], []
    monkeypatch.setattr(ss, "time", SimpleNamespace(time=lambda: clock[0]))
    monkeypatch.setattr(ss, "frozen_copy", lambda V, fast=True: "fast" if fast else "plain")

    def chain(x, steps, V, tau, T):
        asked.append((V, len(x), steps))
        first = [name for name, *_ in asked].count(V) == 1  # the first one warms up
        clock[0] += 100 if first else {"plain": 4, "fast": 1}[V] * steps
        return x
    monkeypatch.setattr(ss, "langevin", chain)
    (x, y), f, pgds = images(), linear(), []

    def attack(net, given, labels, steps, ball):
        pgds.append((steps, ball))
        assert net is f and torch.equal(given, x[:1].repeat(len(given), 1, 1, 1)) and labels.tolist() == [y[0]] * len(given)
        clock[0] += 1000 if len(pgds) == 1 else 7 * steps
        return given
    monkeypatch.setattr(ss, "pgd", attack)
    rows = ss.figure_2_10(Sheet(), settings(eps=0.3, step=0.1), f, x, y)
    assert pgds == 2 * [(5, LInf(0.3, 0.1))]
    size, steps = asked[0][1:]
    found = {row["quantity"]: row["value"] for row in rows}
    assert {(size, steps)} == {call[1:] for call in asked} and {V for V, *_ in asked} == {"plain", "fast"}
    assert found["images x steps / s, plain float32"] == pytest.approx(size / 4)
    assert found["images x steps / s, fast path"] == pytest.approx(size)
    assert found["fast path / plain float32"] == pytest.approx(4)
    assert found["seconds for a batch of long chains"] == pytest.approx(150_000 / size)
    assert (rows[-2]["batch"], rows[-2]["steps"]) == (100, 1500)
    assert found["a step of PGD on f / a Langevin step"] == pytest.approx(7)  # 7 s against 1 s of the fast path


def test_precision_attacks_the_same_images_in_both(attacked, monkeypatch):
    (x, y), f, V, asked = images(), linear(), ebm(), []

    def defend(run, s, f, V, fast=True):
        asked.append((f, V, fast))
        return f"fast {fast}"
    monkeypatch.setattr(ss, "defend", defend)
    rows = ss.precision(None, settings(), f, V, x, y, ATTACK)
    assert asked == [(f, V, True), (f, V, False)]
    assert [call[0] for call in attacked] == ["fast True", "fast True", "fast False", "fast False"]
    for call, whole in zip(attacked, (False, True, False, True)):
        assert call[1] is x and call[2] is y and call[3] == ATTACK._replace(restarts=1, whole=whole)
    expected = []
    for title, bpda, whole in ((", fast path", *attacked[:2]), (", float32", *attacked[2:])):
        expected += ss.rates(title, bpda[4]) + ss.rates(f"{title}, whole chain", whole[4])[1:]
    assert rows == expected


# --- main: what each experiment is given ---


def wired(tmp_path, monkeypatch, *flags):
    """main with stand-ins for what trains or attacks -> what the experiments may ask for, calls by name."""
    calls, have = {}, {}

    def watch(module, name):
        def stand_in(*arguments, **options):
            calls.setdefault(name, []).append((arguments, options))
            return (name, len(calls[name]) - 1)
        monkeypatch.setattr(module, name, stand_in)
    train, test = digits(60, seed=1), digits(60, seed=2)
    sizes = []
    monkeypatch.setattr(common, "train_and_test", lambda args, batch, n: sizes.append((batch, n)) or (train, test))
    for name in ("train_ebm", "defend", "pgd", "eot_attack"):
        watch(ss, name)
    for name in ("train_classifier", "feature_network", "make_net"):
        watch(common, name)
    monkeypatch.setattr(common.Run, "experiments", lambda run, registry, **given: have.update(given, run=run))
    ss.main(["--budget", "smoke", "--out", str(tmp_path), "--device", "cpu", *map(str, flags)])
    (run, s), calls["train_and_test"] = (have["run"], have["run"].args.settings), sizes

    def get(name):
        return have[name]() if isinstance(have[name], common.once) else have[name]
    return get, calls, run, s, train, test


FLAGS = ("--f-net", "wrn16", "--f-width", 2, "--f-iters", 11, "--at-iters", 13, "--f-sgd", 0.3, "--augment",
         "crop", "--eps", 0.06, "--step", 0.011, "--n", 17, "--h-adv", 4, "--h-def", 19, "--restarts", 2, "--images",
         23, "--updates", 29, "--switch", 21, "--batch", 4, "--width", 0.375)


def test_main_trains_both_classifiers_and_both_energies(tmp_path, monkeypatch):
    get, calls, run, s, train, test = wired(tmp_path, monkeypatch, *FLAGS)
    assert calls["train_and_test"] == [(4, 23)] and get("data") is train
    assert "train_classifier" not in calls and "train_ebm" not in calls  # before anything is asked for
    assert ("light_ebm", 1, (1, 28, 28), 0.375) in [arguments for arguments, _ in calls["make_net"]]
    f, f_at = get("f"), get("f_at")
    (natural, natural_options), (trained, at_options) = calls["train_classifier"]
    assert (f, f_at) == (("train_classifier", 0), ("train_classifier", 1))
    assert natural == (run, "f") and trained[0] is run and trained[1] != "f"
    assert natural_options["iterations"] == 11 and at_options["iterations"] == 13
    assert natural_options["shared"] and not at_options.get("shared")
    assert natural_options.get("adversary") is None
    for options in (natural_options, at_options):
        assert options["data"] is train and (options["sgd"], options["augment"]) == (0.3, "crop")
        calls["make_net"].clear()
        options["build"]()
        assert calls["make_net"] == [(("wrn16", 10, (1, 28, 28), 2), {})]
    assert "pgd" not in calls
    at_options["adversary"]("model", "x", "y")  # PGD of 10 steps at the attack's radius
    (arguments, options), = calls["pgd"]
    assert arguments == ("model", "x", "y")
    assert options["steps"] == 10 and options["ball"] == pytest.approx((0.06, 0.015))
    assert type(options["ball"]) is LInf
    assert get("ebm") == ("train_ebm", 0) and get("adam_ebm") == ("train_ebm", 1)
    assert [arguments for arguments, _ in calls["train_ebm"]] == [(run, s, train, 21), (run, s, train, 29)]
    assert get("f") is f and len(calls["train_classifier"]) == 2  # made once


def test_the_control_defends_with_the_gaussian_of_the_training_images(tmp_path, monkeypatch):
    flags = (*FLAGS, "--net", "gaussian", "--data-noise", 0.3, "--temperature", 0.25)
    get, calls, run, s, train, test = wired(tmp_path, monkeypatch, *flags)
    expected = common.GaussianEnergy(train, 0.3, 0.25)
    V = get("ebm")
    assert isinstance(V, common.GaussianEnergy) and "train_ebm" not in calls
    assert torch.equal(V.precision, expected.precision) and torch.equal(V.mean, expected.mean)
    get("defence")
    assert calls["defend"][0][0][3] is V


def test_the_control_runs(tmp_path, outcome):
    flags = ("--budget", "smoke", "--net", "gaussian", "--out", tmp_path, "--device", "cpu")
    assert outcome(ss, *flags, "--only", "table2.1", "gradients") == (0, "")


def test_the_first_classes_can_be_left_out(tmp_path, monkeypatch):
    get, calls, *_ = wired(tmp_path, monkeypatch, *FLAGS, "--first-class", 6)
    (name, outputs, *_), _ = calls["make_net"][0]
    assert (name, outputs) == ("wrn16", 4)


def test_main_attacks_test_images_and_defends_with_the_right_energy(tmp_path, monkeypatch):
    get, calls, run, s, train, test = wired(tmp_path, monkeypatch, *FLAGS)
    x, y = test.some(23)
    assert torch.equal(get("x"), x) and torch.equal(get("y"), y)
    ebm, adam_ebm, f = get("ebm"), get("adam_ebm"), get("f")
    defence, adam_defence = get("defence"), get("adam_defence")
    assert [arguments for arguments, _ in calls["defend"]] == [(run, s, f, ebm), (run, s, f, adam_ebm)]
    assert (defence, adam_defence) == (("defend", 0), ("defend", 1))
    assert get("attack") == Attack(LInf(0.06, 0.011), 17, 4, 19, 2, 0)
    get("transferred")
    (net, given, labels, steps, ball), _ = calls["pgd"][0]
    assert net is f and (steps, ball) == (17, LInf(0.06, 0.011)) and torch.equal(given, x) and torch.equal(labels, y)
    get("bpda")
    (its_run, defended, given, labels, attack), _ = calls["eot_attack"][0]
    assert its_run is run and defended is defence and attack == get("attack")
    assert torch.equal(given, x) and torch.equal(labels, y)
    get("features")
    (data, data_dir, net), _ = calls["feature_network"][0]
    assert data is train and data_dir == run.args.data_dir and net() is f


def test_the_transferred_images_depend_on_the_seed_alone(tmp_path, monkeypatch):
    """Not on the experiment that asks for them first, nor on what was drawn before: Run.experiments seeds."""
    made = []
    experiments = common.Run.experiments
    for flags, before in (((), 1), ((), 2), (("--seed", 5), 2)):
        get, _, run, *_ = wired(tmp_path, monkeypatch, *flags)
        monkeypatch.setattr(ss, "pgd", lambda *_, **__: torch.rand(3))
        monkeypatch.setattr(common.Run, "experiments", experiments)

        def figure_9(other, transferred):
            """Asks for them, after something else that draws."""
            made.append(transferred)
            return []
        run.args.only = ["figure9"]
        torch.manual_seed(before)
        common.Run.experiments(run, common.experiments([figure_9]), other=common.once(lambda: torch.rand(before)),
                               transferred=common.once(lambda: get("transferred")))
    assert torch.equal(made[0], made[1]) and not torch.equal(made[1], made[2])


@pytest.mark.parametrize("dataset, classes", [("glyphs", 10), ("symbols", 24)])
def test_a_classifier_has_an_output_for_each_class(tmp_path, monkeypatch, dataset, classes):
    _, calls, *_ = wired(tmp_path, monkeypatch, "--dataset", dataset)
    assert calls["make_net"][0][0][1] == classes


def test_the_baseline_of_another_radius_is_not_taken_over(tmp_path, monkeypatch):
    """Its weights depend on --eps: a checkpoint made with another one is refused, or has another name."""
    monkeypatch.setattr(common, "train_and_test", lambda *_: (digits(120), digits(20)))
    have, starts = {}, []
    monkeypatch.setattr(common.Run, "experiments", lambda run, registry, **given: have.update(given))
    monkeypatch.setattr(ss, "pgd", lambda f, x, y, steps, ball: starts.append(ball.eps) or x)
    for eps in (0.06, 0.03):
        ss.main(["--budget", "smoke", "--out", str(tmp_path), "--device", "cpu", "--eps", str(eps)])
        with contextlib.suppress(UserError):
            have["f_at"]()
            assert starts[-1] == eps, "the network that was trained with another radius"


# --- the script ---


PICTURES = ("2.2", "2.3", "2.4-l_inf", "2.4-l_2", "2.5-N", "2.5-H", "2.6", "2.7", "2.7-samples", "2.8", "2.9")


def test_smoke_run_of_every_experiment(tmp_path, outcome):
    every = {"table2.1", "table2.2", "gradients", "precision", *(f"figure2.{i}" for i in range(2, 11))}
    assert set(ss.EXPERIMENTS) == every
    flags = ("--budget", "smoke", "--out", tmp_path, "--device", "cpu", "--only")
    assert outcome(ss, *flags, *ss.EXPERIMENTS) == (0, "")
    folder = tmp_path / "stochastic_security-glyphs"
    results = json.loads((folder / "results.json").read_text())
    assert set(results) == every
    for name, entry in results.items():
        assert entry["rows"], name
        for row in entry["rows"]:
            assert math.isfinite(row["value"]), (name, row)
            if "interval" in row:
                low, high = row["interval"]
                assert -1e-9 < low < row["value"] + 1e-9 and row["value"] - 1e-9 < high < 1 + 1e-9 and row["n"] > 0
    table = {row["quantity"]: row["value"] for row in results["table2.2"]["rows"]}
    for attack in ("BPDA+EOT", "whole chain", "transfer PGD"):
        assert table["robust acc, worst of these"] <= table[f"robust acc, {attack}"]
    for picture in PICTURES:
        assert (folder / f"figure{picture}.png").exists()
    made = {file: file.stat().st_mtime_ns for file in folder.glob("*.pt")}
    assert outcome(ss, *flags, "table2.2") == (0, "")  # nothing is trained or attacked again
    assert made == {file: file.stat().st_mtime_ns for file in folder.glob("*.pt")}
    again = json.loads((folder / "results.json").read_text())
    assert again["table2.2"]["rows"] == results["table2.2"]["rows"]


def test_smoke_run_on_colour(tmp_path, write_npz, outcome):
    flags = ("--dataset", "svhn", "--budget", "smoke", "--data-dir", write_npz("svhn"), "--out", tmp_path,
             "--device", "cpu")
    assert outcome(ss, *flags, "--only", "table2.2", "figure2.9") == (0, "")


@pytest.mark.parametrize("flags, says", [
    (("--eps", "-1"), "--eps"), (("--eps", "8"), "--eps"), (("--tau", "0"), "--tau"),
    (("--temperature", "inf"), "--temperature"), (("--bank", "10", "--batch", "4"), "--bank"),
    (("--images", "5000"), "--images"), (("--f-net", "nothing"), "nothing"),
    (("--net", "sngan"), "--net"),
    (("--h-def", "0"), "--h-def"), (("--n", "0"), "--n"), (("--width", "0"), "width"), (("--f-width", "0"), "width"),
    (("--only", "figure9"), "figure9"), (("--dataset", "imagenet"), "--dataset"),
    (("--dataset", "cifar10"), "cifar10")])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, outcome, monkeypatch, flags, says):
    def no_network(*_):
        raise UserError("cifar10: no file, no network")
    monkeypatch.setattr(common, "_download", no_network)
    where = ("--out", tmp_path / "out", "--data-dir", tmp_path)
    code, err = outcome(ss, "--budget", "smoke", "--device", "cpu", *where, *flags)
    assert code == 2 and says in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- recorded steps of common.repeat, with stand-ins for CUDA's streams and graphs ---


class Graph:
    """Like a CUDA graph: replays what it saw, on the same memory."""
    replays = made = 0

    def __init__(self):
        Graph.made += 1
        self.calls = []

    @torch.no_grad()
    def replay(self):
        Graph.replays += 1
        for function, arguments, options, results in self.calls:
            fresh = function(*arguments, **options)
            for old, new in zip(tree_leaves(results), tree_leaves(fresh)):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)


class Capture(TorchDispatchMode):
    def __init__(self, graph, **_):
        super().__init__()
        self.graph = graph

    def __enter__(self):
        self.random = torch.get_rng_state()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        torch.set_rng_state(self.random)  # a capture draws nothing

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        self.graph.calls.append((function, args, kwargs or {}, results))
        return results


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def replay(monkeypatch, exact):
    """common.repeat as on a GPU: replay(step, x, n, *arguments)."""
    for name, stand_in in (("Stream", Stream), ("current_stream", Stream), ("CUDAGraph", Graph), ("graph", Capture),
                           ("stream", contextlib.nullcontext), ("graph_pool_handle", object), ("current_device", lambda: 0),
                           ("get_rng_state", lambda device: None), ("set_rng_state", lambda state, device: None)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(common, "_RECORDED", OrderedDict())
    monkeypatch.setattr(common._Recording, "pool", None)
    monkeypatch.setattr(common._Recording, "stream", None)
    monkeypatch.setattr(Graph, "replays", 0)
    monkeypatch.setattr(Graph, "made", 0)

    def repeat(step, x, n, *arguments):
        with torch.no_grad():
            return common._replay(step, x, n, arguments)
    return repeat


def test_padding_costs_at_most_an_eighth_and_has_few_sizes():
    sizes = {n: common._padded_size(n) for n in range(1, 4097)}
    assert all(n <= size <= n + n / 8 for n, size in sizes.items())
    assert len(set(sizes.values())) <= 8 * 13
    assert all(sizes[n] == n for n in (1, 7, 15, 16, 64, 1664))


def test_recording_a_step_uses_up_no_random_numbers(replay):
    """Else what follows would depend on whether the step had been recorded before: in a resumed run it has not."""
    V, x = frozen_copy(ebm()), torch.rand(16, 1, 28, 28)
    ends = []
    for _ in range(2):
        torch.manual_seed(3)
        replay(langevin_step, x, 2, V, 0.01, 1e-4)
        ends.append(torch.rand(4))
    assert len(common._RECORDED) == 1 and Graph.made == 1 and torch.equal(*ends)


def test_balls_of_the_same_numbers_have_recordings_of_their_own(replay):
    """NamedTuples of one value are equal, whatever their kind."""
    f, x, y = common.SmallCNN(2, 10, 1).eval(), torch.rand(16, 1, 28, 28), torch.zeros(16, dtype=torch.long)
    ends = [replay(ss.pgd_step, x, 2, f, x, y, ball) for ball in (ss.LInf(0.1, 0.1), ss.L2(0.1, 0.1))]
    assert len(common._RECORDED) == 2 and not torch.equal(*ends)


def test_recorded_chains_are_the_plain_loop(replay, no_noise):
    V = frozen_copy(ebm())
    for n in (7, 33, 34, 36, 7):  # 33 to 36 share a recording
        x = torch.rand(n, 1, 28, 28)
        kept = x.clone()
        assert torch.allclose(replay(langevin_step, x, 5, V, 0.1, 1e-3), langevin(x, 5, V, 0.1, 1e-3), atol=1e-5)
        assert torch.equal(x, kept)
    assert len(common._RECORDED) == 2 and Graph.replays == 25


def test_a_recorded_step_draws_fresh_noise_each_time(replay):
    def step(x, tau):
        return x + tau * torch.randn_like(x)
    moved = replay(step, torch.zeros(50, 1, 8, 8), 100, 0.1)
    assert moved.std().item() == pytest.approx(1.0, rel=0.1)
    assert not torch.equal(moved, replay(step, torch.zeros(50, 1, 8, 8), 100, 0.1))


def test_a_recorded_attack_takes_its_images_labels_and_ball_along(replay):
    """Arguments with a row for each image are padded; new ones are copied into the recording that exists."""
    f, ball = linear(), LInf(0.05, 0.02)
    for n in (34, 33, 35):
        x0 = torch.rand(n, 1, 28, 28)
        y, x = torch.randint(0, 10, (n,)), ball.start(x0)
        assert torch.allclose(replay(ss.pgd_step, x, 4, f, x0, y, ball),
                              common.repeat(ss.pgd_step, x, 4, f, x0, y, ball), atol=1e-6)
    assert len(common._RECORDED) == 1
    other = L2(0.5, 0.2)
    assert torch.allclose(replay(ss.pgd_step, x, 4, f, x0, y, other),
                          common.repeat(ss.pgd_step, x, 4, f, x0, y, other), atol=1e-6)
    assert len(common._RECORDED) == 2


def test_arguments_without_a_row_for_each_image_stay_whole(replay):
    def step(x, scale, weights, place):
        return x + scale * weights.exp().mean() * place[:, None]
    for n in (33, 35):
        x, place = torch.rand(n, 3), torch.rand(n)
        scale, weights = torch.rand(()), torch.rand(5)
        found = replay(step, x, 3, scale, weights, place)
        assert torch.allclose(found, x + 3 * scale * weights.exp().mean() * place[:, None], atol=1e-5)


def test_recorded_tuples(replay, no_noise):
    V = frozen_copy(ebm(), fast=False)
    for n in (17, 18):
        x = torch.rand(n, 1, 28, 28)
        state = (x, x + 0.01 * torch.rand_like(x), torch.zeros(n))
        found = replay(ss.lyapunov_step, state, 4, V, 0.1, 1e-3, 1.0, 0.1)
        plain = common.repeat(ss.lyapunov_step, state, 4, V, 0.1, 1e-3, 1.0, 0.1)
        assert isinstance(found, tuple) and len(found) == 3
        for a, b in zip(found, plain):
            assert a.shape == b.shape and torch.allclose(a, b, atol=1e-4)
    assert len(common._RECORDED) == 1


def grow(x, by):
    return x + by


def test_results_are_no_views_of_the_buffers(replay):
    one = replay(grow, torch.zeros(5, 2), 3, 1.0)
    two = replay(grow, torch.zeros(5, 2), 4, 1.0)
    assert one.unique().tolist() == [3] and two.unique().tolist() == [4]
    first, second = replay(lambda pair, by: (pair[0] + by, pair[1]), (torch.zeros(5), torch.ones(5)), 3, 1.0)
    second += 1
    assert first.tolist() == [3] * 5


def test_recordings_are_shared_by_the_same_objects_and_bounded(replay):
    x, one, two = torch.rand(4, 1, 28, 28), frozen_copy(ebm()), frozen_copy(ebm(seed=1))
    for V in (one, two, one):
        replay(langevin_step, x, 3, V, 0.1, 1.0)
    assert len(common._RECORDED) == 2
    replay(langevin_step, x, 3, one, 0.2, 1.0)  # another number, another recording
    assert len(common._RECORDED) == 3
    for columns in range(1, 131):
        replay(grow, torch.zeros(5, columns), 3, 1.0)
        replay(langevin_step, x, 3, one, 0.1, 1.0)
    assert len(common._RECORDED) == 100 and Graph.made == 133  # what is used again and again is never dropped
    replay(grow, torch.zeros(5, 2).double(), 3, 1.0)  # another type, another recording
    f, y = linear(), torch.zeros(4, dtype=torch.long)
    replay(ss.pgd_step, x, 3, f, x, y, LInf(0.1, 0.1))
    before = list(common._RECORDED)
    replay(ss.pgd_step, x, 3, f.train(), x, y, LInf(0.1, 0.1))  # another mode, another recording
    assert list(common._RECORDED) != before


def test_a_followed_network_needs_no_new_recording(replay, no_noise):
    V, x = ebm(), torch.rand(3, 1, 28, 28)
    copy = frozen_copy(V)
    replay(langevin_step, x, 3, copy, 0.1, 1e-3)
    with torch.no_grad():
        for p in V.parameters():
            p.mul_(2)
    common.follow(copy, V)
    found = replay(langevin_step, x, 3, copy, 0.1, 1e-3)
    assert torch.allclose(found, langevin(x, 3, V, 0.1, 1e-3), atol=1e-5) and len(common._RECORDED) == 1


def test_on_a_cpu_nothing_is_recorded(replay):
    assert common.repeat(grow, torch.zeros(5, 2), 3, 1.0).unique().tolist() == [3]
    assert not common._RECORDED


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_recorded_steps_are_the_plain_loop_on_a_gpu(exact, no_noise):
    V, f = ebm().cuda(), classifier().cuda()
    for n in (7, 33, 35):
        x, y = torch.rand(n, 1, 28, 28, device="cuda"), torch.arange(n, device="cuda") % 10
        with torch.no_grad():
            chain = attacked = x
            for _ in range(5):
                chain = langevin_step(chain, V, 0.1, 1e-3)
                attacked = ss.pgd_step(attacked, f, x, y, LInf(0.05, 0.02))
        assert torch.allclose(langevin(x, 5, V, 0.1, 1e-3), chain, atol=1e-4)
        found = common.repeat(ss.pgd_step, x, 5, f, x, y, LInf(0.05, 0.02))
        assert (found - attacked).abs().gt(1e-4).float().mean() < 0.01  # a sign may flip at a gradient of nearly 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_replays_draw_fresh_noise_on_a_gpu():
    V, x = frozen_copy(ebm().cuda()), torch.rand(7, 1, 28, 28, device="cuda")
    one, two = (langevin(x, 5, V, 0.015, 1e-4) for _ in range(2))
    assert not torch.allclose(one, two)
