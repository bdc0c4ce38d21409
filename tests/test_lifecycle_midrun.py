"""lifecycle_midrun.py: Algorithm 4, the score, Dice and Eq. 4.3, every table and figure, the script as a whole."""
import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import common
import lifecycle_midrun as lm
import stochastic_security
from common import Diverged, Images, Training
from conftest import FakeRun, Killed, TinyTorchvision
from lifecycle_midrun import Attack, Defence, LInf, Outcome, Segmenter, Task, UNet, dice

SMOKE = lm.SETTINGS["glyphs", "smoke"]
BALL = LInf(0.1, 0.025)
ATTACK = Attack(BALL, 20, 6, 24)


@pytest.fixture
def run(tmp_path):
    return FakeRun(tmp_path / "run")


def settings(**changes):
    return replace(SMOKE, **changes)


def some_images(n=12, name="made up", side=28, channels=1, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (n, channels, side, side), dtype=torch.uint8, generator=g)
    return Images(x, torch.arange(n) % 10, name)


def numbers(rows):
    """{(quantity, each setting beside it): value} of rows."""
    found = {}
    for row in rows:
        beside = [(key, row[key]) for key in sorted(row) if key not in ("quantity", "value", "interval", "n")]
        found[(row["quantity"], *beside)] = row["value"]
    assert len(found) == len(rows)
    return found


def values(rows):
    return {row["quantity"]: row["value"] for row in rows}


def state_of(run, name="energy"):
    return torch.load(run.folder / f"{name}.pt", weights_only=True)


def bools(*numbers):
    return torch.tensor(numbers, dtype=torch.bool)


# --- Algorithm 4 ---


def test_states_are_replaced_at_the_rate_p_and_ages_follow_the_geometric_law():
    p, n, visits = 0.1, 64, 3000
    bank, age, replaced, ages = torch.zeros(n, 1), torch.zeros(n, dtype=torch.long), 0, []
    data = type("Data", (), {"take": lambda self, index: torch.rand(len(index), 1), "__len__": lambda self: 7})()
    for t in range(visits):
        rows = common.batch_index(n, 16, 0, t)
        age[rows] += 1
        before = age.clone()
        lm.rejuvenate(bank, age, rows, p, data)
        replaced += int((age != before).sum())
        if t > 500:
            ages.append(age.float().mean().item())
    draws = visits * 16
    assert abs(replaced - p * draws) < 4 * math.sqrt(draws * p * (1 - p))
    assert sum(ages) / len(ages) == pytest.approx((1 - p) / p, rel=0.05)  # mean of p (1 - p)^k


def test_only_the_given_rows_are_replaced_and_by_random_training_images():
    data = some_images(200)
    whole = data.take(slice(None))
    for p, dead in ((1e-9, []), (1, [1, 4, 8, 9])):
        bank, age = torch.full((10, 1, 28, 28), -1.0), torch.full((10,), 7)
        lm.rejuvenate(bank, age, torch.tensor([1, 4, 8, 9]), p, data)
        assert torch.nonzero(age == 0)[:, 0].tolist() == dead and set(age.tolist()) <= {0, 7}
        assert torch.nonzero((bank != -1).flatten(1).any(1))[:, 0].tolist() == dead
    which = [(whole == bank[row]).flatten(1).all(1).nonzero().item() for row in dead]
    assert len(set(which)) > 1
    bank, age, seen = torch.zeros(100, 1, 28, 28), torch.zeros(100, dtype=torch.long), set()
    lm.rejuvenate(bank, age, torch.arange(100), 1, data)
    for state in bank:
        seen.add((whole == state).flatten(1).all(1).nonzero().item())
    assert len(seen) > 50 and max(seen) > 150  # any of them


def by_hand(s, data, updates):
    """Algorithm 4 in plain PyTorch -> V, bank, age, and d and the movement of each update."""
    torch.manual_seed(0)
    V = common.make_net(s.net, 1, data.shape, s.width)
    bank = data.take(torch.randint(len(data), (s.bank,)))
    age = torch.zeros(s.bank, dtype=torch.long)
    adam, stream, ds, moves = torch.optim.Adam(V.parameters(), s.lr), common.batches(data, s.batch, 0), [], []
    for it in range(updates):
        x = next(stream)[0]
        x = x + s.data_noise * torch.randn_like(x)
        rows = common.batch_index(s.bank, s.batch, 1, it)
        z = bank[rows]
        for _ in range(s.k_train):
            z = z.detach().requires_grad_(True)
            gradient, = torch.autograd.grad(V(z).sum(), z)
            z = (z - s.tau ** 2 / (2 * s.temperature) * gradient + s.tau * torch.randn_like(z)).detach()
        v = V(torch.cat([x, z]))  # rounded as there: Adam's first steps enlarge any difference
        d = (v[:s.batch].mean() - v[s.batch:].mean()) / s.temperature
        adam.zero_grad()
        d.backward()
        for group in adam.param_groups:
            share = (it + 1) / updates
            group["lr"] = s.lr * 0.1 ** sum(share > part + 1e-9 for part in (1 / 3, 1 / 2, 2 / 3, 5 / 6))
        adam.step()
        ds.append(d.item())
        moves.append((z - bank[rows]).pow(2).mean().sqrt().item())
        bank[rows] = z
        age[rows] += s.k_train
        dead = rows[torch.rand(s.batch) < s.p]
        if len(dead):
            bank[dead] = data.take(torch.randint(len(data), (len(dead),)))
            age[dead] = 0
    return V, bank, age, ds, moves


def test_six_updates_by_hand(run, exact):
    s, data = settings(width=0.125, lr=3e-3, p=0.4, tau=0.02, temperature=1e-3, data_noise=0.1, k_train=3), some_images()
    V, age = lm.train_midrun(run, s, data)
    V_, bank_, age_, ds, moves = by_hand(s, data, 6)
    state = state_of(run)
    assert torch.equal(age, age_) and torch.equal(state["age"], age) and 0 < (age == 0).sum() < 8
    assert torch.allclose(state["bank"], bank_, atol=1e-5)
    for mine, theirs in zip(V.parameters(), V_.parameters()):
        assert torch.allclose(mine, theirs, atol=1e-6)
    rows = state["rows"]
    assert [row["it"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["d"] for row in rows] == pytest.approx(ds, rel=2e-3, abs=1e-3)
    assert [row["moved"] for row in rows] == pytest.approx(moves, rel=1e-3)
    assert rows[-1]["age"] == pytest.approx(age.float().mean().item())


def test_the_rate_falls_at_a_third_a_half_two_thirds_and_five_sixths(run, monkeypatch):
    seen, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step",
                        lambda self, *a: seen.append(self.param_groups[0]["lr"]) or step(self, *a))
    lm.train_midrun(run, settings(updates=12, lr=1e-3), some_images())
    assert seen == pytest.approx([1e-3] * 4 + [1e-4] * 2 + [1e-5] * 2 + [1e-6] * 2 + [1e-7] * 2)
    seen.clear()
    lm.train_midrun(run, settings(updates=16, lr=1e-3, anneal=0.75), some_images(), "later")
    assert seen == pytest.approx([1e-3] * 12 + [1e-4, 1e-5, 1e-6, 1e-7])


def test_the_energy_of_data_falls_and_that_of_chains_rises(run, monkeypatch):
    monkeypatch.setattr(lm, "langevin", lambda x, *_: x + 0.5)
    data = some_images()
    V, _ = lm.train_midrun(run, settings(updates=30, lr=1e-3, width=0.125, p=1), data)
    x = data.take(slice(None))
    assert V(x).mean() < V(x + 0.5).mean()


def test_what_the_checkpoint_tells_other_scripts(run):
    s, data = settings(tau=0.004), some_images()
    V, _ = lm.train_midrun(run, s, data)
    state = common.read_checkpoint(run.folder / "energy.pt")
    assert state["finished"] is True and state["smoke"] is False
    made_from = state["made_from"]
    assert {key: made_from[key] for key in ("net", "width", "updates", "temperature", "tau_train")} == {
        "net": s.net, "width": s.width, "updates": s.updates, "temperature": s.temperature, "tau_train": 0.004}
    assert isinstance(made_from["images"], str)
    again = common.make_net(made_from["net"], 1, data.shape, made_from["width"])
    again.load_state_dict(state["V"])
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in V.state_dict().items())


@pytest.mark.parametrize("train, name", [(lm.train_midrun, "energy"), (lm.train_score, "score")])
def test_interrupted_training_goes_on_bit_exactly(tmp_path, monkeypatch, train, name):
    monkeypatch.setattr(Training, "SAVE_SECONDS", -1)
    s, data = settings(updates=7, u_iters=7, p=0.3), some_images()
    whole, broken = FakeRun(tmp_path / "whole"), FakeRun(tmp_path / "broken")
    train(whole, s, data)
    step, calls = torch.optim.Adam.step, []

    def dying(self, *a):
        calls.append(1)
        if len(calls) in (4, 7):  # in update 4, then in update 6
            raise Killed
        return step(self, *a)
    monkeypatch.setattr(torch.optim.Adam, "step", dying)
    for _ in range(2):
        with pytest.raises(Killed):
            train(broken, s, data)
        torch.manual_seed(99)
    train(broken, s, data)
    a, b = state_of(whole, name), state_of(broken, name)
    assert len(calls) == 9 and set(a) == set(b)
    for key in {"V", "bank", "age", "net"} & set(a):
        pairs = zip(a[key].values(), b[key].values()) if isinstance(a[key], dict) else [(a[key], b[key])]
        assert all(torch.equal(x, y) for x, y in pairs), key
    for row in (*a["rows"], *b["rows"]):
        row.pop("seconds")
    assert a["rows"] == b["rows"]
    before = torch.get_rng_state()
    again = train(broken, s, data)  # finished: nothing is drawn or learned any more
    assert len(calls) == 9 and torch.equal(torch.get_rng_state(), before)
    if name == "energy":
        assert torch.equal(again[1], b["age"]) and torch.equal(again[0].state_dict()["body.0.weight"], b["V"]["body.0.weight"])


def test_runaway_chains_stop_training_with_advice(run):
    with pytest.raises(Diverged, match="lower --lr"):
        lm.train_midrun(run, settings(lr=10.0, updates=40, width=0.5), some_images())


def test_another_temperature_or_noise_is_refused(tmp_path, outcome):
    flags = ("--budget", "smoke", "--out", tmp_path, "--device", "cpu", "--only", "figure3.2")
    assert outcome(lm, *flags) == (0, "")
    for flag, number in (("--temperature", "2e-4"), ("--tau", "0.01"), ("--p", "0.2"), ("--data-noise", "0.2"),
                         ("--k-train", "3"), ("--lr", "0.1"), ("--batch", "2"), ("--bank", "16")):
        code, err = outcome(lm, *flags, flag, number)
        assert code == 2 and flag[2:].replace("-", "_") in err and "energy.pt" in err and err.count("\n") == 1


# --- chains, and the score ---


def test_the_defence_has_the_noise_and_the_temperature_of_training(exact):
    """V = |x|^2 / 2: after one step from x, mean x (1 - tau^2 / 2T), standard deviation tau."""
    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.one * x.square().flatten(1).sum(1, keepdim=True) / 2
    s = settings(tau=0.1, temperature=0.02)
    x = torch.full((500, 1, 4, 4), 2.0)
    chain, path, back = lm.chains_of(s, Square())
    for kind in (chain, lambda x, steps: path(x, steps)[0]):
        end = kind(x, 1)
        assert end.mean().item() == pytest.approx(2 * (1 - 0.01 / 0.04), abs=5 * 0.1 / math.sqrt(8000))
        assert end.std().item() == pytest.approx(0.1, rel=0.05)
    v = torch.randn_like(x)
    assert torch.allclose(back(v, path(x, 2)[1]), v * (1 - 0.01 / 0.04) ** 2, atol=1e-2)


def test_the_score_chain_samples_a_known_gaussian():
    """S = -(x - mu) / s^2, whose sign the print lost: from afar to mean mu, variance s^2 / (1 - eta^2 / 4 s^2)."""
    mu, s = 0.3, 0.01
    x = lm.score_chain(torch.full((4000, 1, 2, 2), 0.9), 200, lambda x: -(x - mu) / s ** 2 * lm.SIGMA)
    n, variance = x.numel(), s ** 2 / (1 - lm.ETA ** 2 / (4 * s ** 2))
    assert abs(x.mean().item() - mu) < 5 * s / math.sqrt(n)
    assert x.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / n))
    assert lm.ETA == lm.SIGMA / 2 == 0.005


def test_score_matching_learns_the_score_of_a_point(run, monkeypatch):
    """Data that are one grey image: the score at x + sigma z is -z / sigma; the net returns -z."""
    monkeypatch.setattr(lm, "SIGMA", 0.3)
    data = Images(torch.full((8, 1, 16, 16), 128, dtype=torch.uint8), torch.zeros(8), "grey")
    net, z = lm.train_score(run, settings(u_iters=250, batch=8, lr=0.0), data), torch.randn(4, 1, 16, 16)  # lr: the energy's
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    found = net(128 / 255 + 0.3 * z)
    assert (found + z).pow(2).mean() < 0.5 and (found * z).mean() < -0.4
    assert state_of(run, "score")["rows"][0]["loss"] == pytest.approx(1, rel=0.3)


@pytest.mark.parametrize("channels, side, levels", [(1, 28, 2), (3, 32, 2), (3, 64, 3)])
def test_a_u_net_returns_a_map_and_looks_at_all_scales(channels, side, levels):
    net, depth = UNet(5, (channels, side, side)), 0
    assert net.eval()(torch.rand(2, channels, side, side)).shape == (2, 5, side, side)
    inner = net
    while inner.inner:
        inner, depth = inner.inner, depth + 1
    assert depth == levels
    assert any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert net.last.in_channels == 16 and net.inner.last.in_channels == 32  # twice what comes in, 16 at least
    with torch.no_grad():
        before = net(torch.ones(1, channels, side, side))
        net.first[0].weight += torch.randn_like(net.first[0].weight)
        inside = F.interpolate(net.inner(F.max_pool2d(net.first(torch.ones(1, channels, side, side)), 2)), scale_factor=2)
        x = net.first(torch.ones(1, channels, side, side))
        after = net(torch.ones(1, channels, side, side))
        assert torch.equal(after, net.last(net.join(torch.cat([x, inside], 1)))) and not torch.equal(before, after)
    assert sum(isinstance(m, nn.ReLU) for m in net.modules()) == 4 * levels + 2  # two a convolution pair
    assert not any(isinstance(m, nn.BatchNorm2d) for m in UNet(1, (1, 28, 28), norm=nn.Identity).modules())
    x = torch.rand(1, channels, side, side).requires_grad_(True)
    gradient, = torch.autograd.grad(net(x)[0, 0, side // 2, side // 2], x)
    assert (gradient != 0).any(1).sum() > 300  # far beyond two convolutions' five by five


# --- the attack of this script ---


def test_the_attack_asks_for_the_chains_and_the_gradient_that_it_was_told(run):
    asked = []

    class Recording(Defence):
        def gradient(self, x, y, H, whole=False):
            asked.append((H, whole))
            return torch.nn.functional.one_hot(y, 10).float(), torch.ones_like(x)

        def predict(self, x, H):
            asked.append(H)
            return torch.zeros(len(x), dtype=torch.long)
    f = nn.Linear(1, 1)
    lm.eot_attack(run, Recording(f, 3), torch.rand(2, 1, 4, 4), torch.zeros(2).long(), Attack(BALL, 2, 5, 9, 1, True))
    assert asked == [9, (5, True), (5, True), (5, True)]


def test_the_gradient_averages_all_chains_and_goes_back_through_them(exact):
    f, asked_for = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), []
    shifts = torch.tensor([-0.3, 0.0, 0.4])

    def path(x, steps):
        asked_for.append(steps)
        return x + shifts.repeat_interleave(2).view(-1, 1, 1, 1), "way"

    def back(v, way):
        asked_for.append(way)
        return 2 * v
    x, y = torch.rand(2, 1, 2, 2), torch.tensor([0, 2])
    F_H, gradient = Defence(f, 7, None, path, back).gradient(x, y, 3, whole=True)
    assert asked_for == [7, "way"]
    states = [(x + shift).requires_grad_(True) for shift in shifts]
    mean = torch.stack([f(state) for state in states]).mean(0)
    each = torch.autograd.grad(F.cross_entropy(mean, y, reduction="sum"), states)
    assert torch.allclose(F_H, mean, atol=1e-6) and torch.allclose(gradient, 2 * torch.stack(each).sum(0), atol=1e-6)


def test_pgd_starts_at_random_and_climbs(exact):
    f = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x, y = torch.rand(20, 1, 4, 4) * 0.6 + 0.2, torch.arange(20) % 3
    start = lm.pgd(f, x, y, 0, BALL)
    assert 0.03 < (start - x).abs().mean() < 0.07 and (start - x).abs().max() <= 0.1 + 1e-6
    end = lm.pgd(f, x, y, 10, BALL)
    assert F.cross_entropy(f(end), y) > F.cross_entropy(f(start), y) > 0
    assert (end - x).abs().max() <= 0.1 + 1e-6


# --- segmentation ---


def test_dice_against_a_hand_count():
    """Three rows of four pixels: TP 3, FP 1, FN 1; a wrong class is both; empty masks give 0."""
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])[None]
    found = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])[None]
    assert dice(found, mask).item() == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert dice(2 * found, 2 * mask).item() == pytest.approx(0.75)
    assert dice(2 * found, mask).item() == 0
    half = torch.where(torch.arange(4) < 1, 2 * found, found)  # one hit gets a wrong class
    assert dice(half, mask).item() == pytest.approx(2 * 2 / (2 * 2 + 2 + 2))
    assert dice(torch.zeros_like(mask), torch.zeros_like(mask)).item() == 0


def test_dice_is_the_f1_score_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    found, mask = torch.randint(0, 4, (2, 5, 9, 9))
    theirs = []
    for f, m in zip(found, mask):
        theirs.append(metrics.f1_score(m.flatten(), f.flatten(), labels=[1, 2, 3], average="micro"))
    assert torch.allclose(dice(found, mask), torch.tensor(theirs, dtype=torch.float32), atol=1e-6)


class Threshold(nn.Module):
    """Ink where a pixel is above one half: logits [B, 2, S, S]."""

    def __init__(self):
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return torch.cat([0.5 - x, x - 0.5], 1) + self.zero


def rows_of_ink():
    """Images of found masks: a row; two rows; nothing. True masks: a row each."""
    x = torch.zeros(3, 1, 4, 4)
    x[0, 0, 0], x[1, 0, :2] = 1, 1
    masks = torch.zeros(3, 4, 4, dtype=torch.uint8)
    masks[:, 0] = 1
    return x, masks


def test_images_that_the_bare_network_fails_on_are_left_out(run):
    x, masks = rows_of_ink()
    blind = Segmenter(Threshold(), 3, lambda x, steps: x * (steps == 0))  # behind the chains nothing would be found
    task, left_out = lm.segmentation_task(run, Task(blind, x, masks))
    assert left_out == 1 and task.defence is blind and torch.equal(task.x, x[:2])
    assert task.y.shape == (2, 2, 4, 4) and task.y.dtype == torch.long
    assert torch.equal(task.y[:, 0], masks[:2].long()) and torch.equal(task.y[:, 1], (x[:2, 0] > 0.5).long())
    with pytest.raises(Diverged, match="u-iters"):
        lm.segmentation_task(run, Task(blind, x[2:], masks[2:]))
    whole = torch.ones(3, 4, 4, dtype=torch.uint8)  # of a found row a Dice of .4: kept; that of nothing, 0, is not
    task, left_out = lm.segmentation_task(run, Task(blind, x, whole))
    assert left_out == 1 and len(task.x) == 2
    run.smoke = True
    assert len(lm.segmentation_task(run, Task(blind, x, masks))[0].x) == 3


def test_a_segmentation_is_right_at_half_its_clean_dice(run):
    x, masks = rows_of_ink()
    segmenter = Segmenter(Threshold())
    task, _ = lm.segmentation_task(run, Task(segmenter, x, masks))
    assert dice(task.y[:, 1], task.y[:, 0]).tolist() == pytest.approx([1, 2 / 3])
    found = torch.zeros(2, 4, 4, dtype=torch.long)
    found[:, 0, :1] = 1  # Dice 2 / 5
    assert segmenter.right(found, task.y).tolist() == [False, True]
    found[:, 0, 1:2] = 1  # Dice 2 / 3
    assert segmenter.right(found, task.y).tolist() == [True, True]
    exactly = torch.zeros(1, 4, 4, dtype=torch.long)
    exactly[0, 0, :1], exactly[0, 1, :3] = 1, 1  # Dice 1 / 4 against 1 / 2
    clean = torch.zeros(1, 4, 4, dtype=torch.long)
    clean[0, 0, :2], clean[0, 1, :2] = 1, 1
    assert segmenter.right(exactly, torch.stack([masks[:1].long(), clean], 1)).tolist() == [True]


def test_eot_of_a_segmentation_averages_logits_pixel_by_pixel(exact):
    f, x = UNet(3, (1, 8, 8)).eval(), torch.rand(2, 1, 8, 8)
    y, shifts = torch.randint(0, 3, (2, 2, 8, 8)), torch.tensor([-0.1, 0.0, 0.2])

    def chain(z, steps):  # chain h of image b: row h * B + b
        return z + steps * shifts.repeat_interleave(2).view(-1, 1, 1, 1)
    segmenter = Segmenter(f, 1, chain, lm.stay)
    F_H, gradient = segmenter.gradient(x, y, 3)
    states = [(x + d).requires_grad_(True) for d in shifts]
    mean = torch.stack([f(state) for state in states]).mean(0)
    assert F_H.shape == (2, 3, 8, 8) and torch.allclose(F_H, mean, atol=1e-5)
    loss = sum(-torch.log_softmax(mean[b, :, i, j], 0)[y[b, 0, i, j]] for b in range(2) for i in range(8)
               for j in range(8))
    each = torch.autograd.grad(loss, states)
    assert torch.allclose(gradient, torch.stack(each).sum(0), atol=1e-5)
    assert torch.equal(segmenter.predict(x, 3), mean.argmax(1))


def test_algorithm_3_breaks_a_segmentation_and_keeps_what_broke_it(run, exact):
    x = torch.full((2, 1, 6, 6), 0.1)
    x[0, 0, :3], x[1, 0, :3] = 0.6, 0.95  # one within reach, one not
    masks = torch.zeros(2, 6, 6, dtype=torch.long)
    masks[:, :3] = 1
    task, _ = lm.segmentation_task(run, Task(Segmenter(Threshold()), x, masks))
    outcome = lm.eot_attack(run, *task, Attack(LInf(0.2, 0.1), 3, 1, 1))
    assert outcome.natural.tolist() == [True, True] and outcome.robust.tolist() == [False, True]
    assert dice(Defence(Threshold()).predict(outcome.x, 1), masks)[0] < 0.5


@pytest.mark.parametrize("dataset", ["glyphs", "mnist"])
def test_grey_digits_stand_among_quarters_of_letters(tmp_path, write_npz, dataset):
    folder = write_npz("mnist", side=28, colour=False)
    args = SimpleNamespace(dataset=dataset, data_dir=folder, device="cpu")
    train, test = [lm.digits_among(args, some_images(), split) for split in ("train", "test")]
    digits, letters = common.load_images(dataset, "test", folder), common.load_images("letters", "test", folder)
    ink, y = digits.some(4000)
    assert len(test) == len(digits) and train.x.shape[1:] == test.x.shape[1:] == (1, 28, 28)
    x = test.take(slice(None))
    assert (x >= ink - 1e-6).all()
    assert torch.equal(test.y.long(), torch.where(ink[:, 0] >= 0.5, y[:, None, None] + 1, 0)) and test.y.dtype == torch.uint8
    changed = x > ink + 1e-6
    assert changed[:, :, :8, :8].float().mean() > 3 * changed[:, :, 12:16, 12:16].float().mean()  # corners, not the middle
    empty = (ink < 1e-6).flatten(1).float().mean(1).argmax()
    quarters = letters.take(slice(None)).roll((14, 14), (2, 3))
    free = ink[empty] == 0
    assert any(torch.equal(x[empty][free], quarter[free]) for quarter in quarters)
    assert not torch.equal(train.x[:50], test.x[:50])
    digits, letters = common.load_images(dataset, "train", folder), common.load_images("letters", "train", folder)
    own, y = digits.some(4000)
    assert torch.equal(train.y.long(), torch.where(own[:, 0] >= 0.5, y[:, None, None] + 1, 0))  # the split's own digits
    empty = (own < 1e-6).flatten(1).float().mean(1).argmax()
    free, x = own[empty] == 0, train.take(slice(None))
    quarters = letters.take(slice(None)).roll((14, 14), (2, 3))
    assert any(torch.equal(x[empty][free], quarter[free]) for quarter in quarters)  # and letters
    assert len(x[:100, 0, :6, :6].flatten(1).unique(dim=0)) > 30  # another one each time


def test_coloured_glyphs_stand_on_images_of_their_split(tmp_path):
    photos = Images(torch.full((5, 3, 32, 32), 51, dtype=torch.uint8), torch.zeros(5), "photos")
    args = SimpleNamespace(dataset="cifar10", data_dir=tmp_path, device="cpu")
    made = lm.digits_among(args, photos, "test")
    ink, y = common.load_images("glyphs", "test", tmp_path, 1, 32).some(4000)
    assert torch.equal(made.y.long(), torch.where(ink[:, 0] >= 0.5, y[:, None, None] + 1, 0))
    x = made.take(slice(None))
    assert torch.allclose(x.mean(1)[ink[:, 0] == 0], torch.tensor(0.2), atol=1e-3)
    means = []
    for image, place in zip(x[:200], ink[:200, 0] > 0.99):
        if place.any():
            means.append(image[:, place].mean(1))
    means = torch.stack(means)
    assert means.min() >= 0.05 - 2e-3 and means.max() <= 0.8 + 2e-3  # a quarter of .2, and 3/4 of the colour
    assert (means.std(0) > 0.15).all()
    assert (means.amax(1) - means.amin(1)).mean() > 0.2  # colours, not greys
    colours = {}
    for split in ("train", "test"):
        ink = common.load_images("glyphs", split, tmp_path, 1, 32).some(4000)[0][:50, 0] > 0.99
        x = lm.digits_among(args, photos, split).take(slice(0, 50))
        colours[split] = torch.stack([image[:, place].mean(1) for image, place in zip(x, ink) if place.any()])
    n = min(map(len, colours.values()))
    assert (colours["train"][:n] - colours["test"][:n]).abs().mean() > 0.05  # drawn anew for each split


# --- tables ---


def outcome_of(natural, robust, attack, x):
    return Outcome(natural, robust, torch.stack([natural, robust]), x, attack)


class Stub(Defence):
    """Says what it is told to say of an image: its first pixel, in tenths; one more behind K > 0 chains."""

    def predict(self, x, H):
        asked.append((self.K, H))
        return (10 * x[:, 0, 0, 0]).round().long() + (self.K > 0)


asked = []


def test_attacked_reports_each_attack_and_the_worst(run, monkeypatch):
    asked.clear()
    n, calls = 5, []
    x, y = torch.zeros(n, 1, 2, 2), torch.ones(n).long()
    transferred = torch.tensor([0.0, 0.0, 0.0, 0.3, 0.0]).view(n, 1, 1, 1).expand(n, 1, 2, 2)
    planted = {  # K, last: natural, robust
        (0, False): (bools(1, 1, 1, 1, 1), bools(0, 0, 0, 0, 1)),
        (7, False): (bools(1, 1, 1, 1, 0), bools(1, 1, 0, 1, 0)),
        (7, True): (bools(1, 1, 1, 1, 0), bools(1, 0, 1, 1, 0))}
    adversary = {key: torch.full_like(x, 0.1 * i) for i, key in enumerate(planted)}

    def attack(run_, defence, x_, y_, a):
        assert torch.equal(x_, x) and torch.equal(y_, y) and isinstance(defence, Stub)
        calls.append((defence.K, a))
        return outcome_of(*planted[defence.K, a.whole], a, adversary[defence.K, a.whole])

    def pgd(f, x_, y_, steps, ball):
        assert f == "f" and torch.equal(x_, x) and torch.equal(y_, y) and (steps, ball) == (20, BALL)
        return transferred
    monkeypatch.setattr(lm, "eot_attack", attack)
    monkeypatch.setattr(lm, "pgd", pgd)
    s = settings(k=7, h_def=24, n=20, eps=0.1)
    task = Task(Stub("f", 7, lambda x, steps: x + 0.01 * steps), x, y)
    rows, sets, mine = lm.attacked(run, s, task, ATTACK, "name")
    assert mine.tolist() == [True, True, True, True, False]  # the last one was misread before: nobody attacked it
    assert calls == [(0, ATTACK._replace(H_adv=1, H_def=1)), (7, ATTACK), (7, ATTACK._replace(whole=True))]
    assert asked == [(7, 24)]
    assert {name: images is expected for (name, images), expected in zip(
        sets.items(), (x, transferred, adversary[7, False]))} == {"natural": True, "transfer PGD": True, "BPDA+EOT": True}
    n_of = {row["quantity"]: (row["value"], row.get("N"), row.get("K")) for row in rows}
    assert n_of == {
        "natural acc, no defence": (1, None, None), "robust acc, no defence": (0.2, 20, None),
        "natural acc, BPDA+EOT": (0.8, None, 7), "robust acc, BPDA+EOT": (0.6, 20, 7),
        "robust acc, whole chain": (0.6, 20, None),
        "robust acc, transfer PGD": (0.6, 20, None),  # right and naturally so: the first three
        "robust acc, worst of these": (0.2, None, None)}  # the first alone survives all
    pictures = run.shown["name"]
    assert torch.equal(pictures["BPDA+EOT"], adversary[7, False]) and torch.equal(pictures["natural"], x)
    assert torch.allclose(pictures["BPDA+EOT, 7 steps later"], adversary[7, False] + 0.07)


def test_the_transfer_attack_alone_can_be_the_worst(run, monkeypatch):
    x, y = torch.zeros(2, 1, 2, 2), torch.ones(2).long()
    monkeypatch.setattr(lm, "eot_attack", lambda r, d, x, y, a: outcome_of(bools(1, 1), bools(1, 1), a, x))
    monkeypatch.setattr(lm, "pgd", lambda f, x, y, steps, ball: x + torch.tensor([0.0, 0.5]).view(2, 1, 1, 1))
    rows, _, mine = lm.attacked(run, settings(k=7), Task(Stub("f", 7), x, y), ATTACK, "name")
    found = values(rows)
    assert mine.tolist() == [True, True]
    assert found["robust acc, transfer PGD"] == found["robust acc, worst of these"] == 0.5
    assert found["natural acc, BPDA+EOT"] == 1


def test_pgd_on_a_segmenter_climbs_away_from_the_true_mask(run, monkeypatch):
    x, masks = rows_of_ink()
    task, _ = lm.segmentation_task(run, Task(Segmenter(Threshold()), x, masks))
    seen = []
    monkeypatch.setattr(lm, "pgd", lambda f, x, y, *_: seen.append(y) or x)
    monkeypatch.setattr(lm, "eot_attack", lambda r, d, x, y, a: outcome_of(bools(1, 1), bools(1, 1), a, x))
    lm.attacked(run, settings(), task, ATTACK, "name")
    assert torch.equal(seen[0], masks[:2].long())


def test_tables_3_1_and_4_1_are_the_same_of_their_tasks(run, monkeypatch):
    seen = []
    monkeypatch.setattr(lm, "attacked", lambda run, s, task, a, name: seen.append((task, a, name)) or ([name], {}))
    assert lm.table_3_1(run, SMOKE, "own", ATTACK) == ["table3.1"]
    assert lm.table_4_1(run, SMOKE, "other", ATTACK) == ["table4.1"]
    assert lm.noisy_classifier(run, SMOKE, "noisy", ATTACK) == ["noisy-classifier"]
    assert seen == [("own", ATTACK, "table3.1"), ("other", ATTACK, "table4.1"), ("noisy", ATTACK, "noisy-classifier")]


def test_table_3_3_attacks_longer_with_more_chains_and_broken_stays_broken(run, monkeypatch):
    planted = {(20, False): (bools(1, 1, 1, 0, 1), bools(1, 1, 0, 0, 1)), (80, False): (bools(1, 1, 1, 1, 1), bools(1, 0, 1, 1, 1)),
               (20, True): (bools(1, 1, 1, 1, 1), bools(1, 1, 1, 1, 0))}
    seen = []

    def attack(run_, defence, x, y, a):
        seen.append((defence, x, y, a))
        return outcome_of(*planted[a.N, a.whole], a, None)
    monkeypatch.setattr(lm, "eot_attack", attack)
    rows = lm.table_3_3(run, settings(n=20, h_adv=9), Task("d", "x", "y"), ATTACK)
    assert seen == [("d", "x", "y", ATTACK), ("d", "x", "y", ATTACK._replace(whole=True)),
                    ("d", "x", "y", ATTACK._replace(N=80, H_adv=12))]
    assert values(rows) == {"natural acc, stronger BPDA+EOT": 1, "robust acc, stronger BPDA+EOT": 0.8,
                            "robust acc, worst with table 3.1's two": 0.2}
    assert rows[1]["N"] == 80 and rows[1]["H_adv"] == 12


def test_table_4_2_takes_dice_of_each_set_without_and_with_the_defence(run, monkeypatch):
    x, masks = rows_of_ink()
    purify = lambda z, steps: z.clamp(0.3 if steps else 0, 0.6)  # noqa: E731
    defence = Segmenter(Threshold(), 5, purify)
    task, left_out = lm.segmentation_task(run, Task(defence, x, masks))
    gone, shifted = 0 * task.x, task.x.roll(1, 2)
    monkeypatch.setattr(lm, "attacked", lambda run, s, t, a, name: (
        [common.value(name, 1)], {"natural": t.x, "transfer PGD": gone, "BPDA+EOT": shifted}, bools(1, 1)))
    rows = lm.table_4_2(run, settings(k=5, images=3, h_def=2), (task, left_out), ATTACK)
    found = numbers(rows)
    assert found[("images of clean Dice below .1, left out",)] == 1 and found[("table4.2",)] == 1
    for title, expected in (("natural", (1 + 2 / 3) / 2), ("transfer PGD", 0), ("BPDA+EOT", (0 + 0) / 2)):
        for K in (0, 5):
            expected_ = expected if title != "BPDA+EOT" else (0 + dice(shifted[1:, 0].long(), task.y[1:, 0]).item()) / 2
            assert found[f"mean Dice, {title}", ("K", K)] == pytest.approx(expected_, abs=1e-6)
    assert rows[-1]["quantity"] == "robust acc against the purified clean image, BPDA+EOT" and rows[-1]["n"] == 2
    assert rows[-1]["value"] == 0.5 * (dice(shifted[1:, 0].long(), task.y[1:, 0]).item() >= 1 / 3)
    for purified in (task.x, gone):  # where the clean image itself is lost behind chains, half of 0 is enough
        sets = {"natural": purified, "BPDA+EOT": gone}
        monkeypatch.setattr(lm, "attacked", lambda run, s, t, a, name, sets=sets: ([], sets, bools(1, 1)))
        last = lm.table_4_2(FakeRun(run.folder), settings(k=5, images=3, h_def=2), (task, left_out), ATTACK)[-1]
        assert last["value"] == float(purified is gone)
    monkeypatch.setattr(lm, "attacked", lambda run, s, t, a, name: ([], {"natural": t.x, "BPDA+EOT": t.x}, bools(0, 1)))
    alone = numbers(lm.table_4_2(FakeRun(run.folder), settings(k=5, images=3, h_def=2), (task, left_out), ATTACK))
    assert alone[("mean Dice, natural", ("K", 0))] == pytest.approx(dice(task.y[:, 1], task.y[:, 0])[1].item())
    for title, place in (("natural, K = 0", 1), ("true masks", 0)):  # classes as grey, well apart from the background
        masks = task.y[:, place, None]
        grey = torch.where(masks > 0, (masks + 4) / 14, 0.0)
        assert torch.equal(run.shown["table4.2-masks"][title], grey) and masks.max() > 0


def test_table_4_2_asks_the_bare_and_the_defended_network(run, monkeypatch):
    asked_ = []

    class Recording(Segmenter):
        def predict(self, x, H):
            asked_.append((self.K, H, x))
            return torch.zeros(len(x), 4, 4, dtype=torch.long)
    sets = {"natural": torch.rand(2, 1, 4, 4), "transfer PGD": torch.rand(2, 1, 4, 4), "BPDA+EOT": torch.rand(2, 1, 4, 4)}
    monkeypatch.setattr(lm, "attacked", lambda *_: ([], sets, bools(0, 0)))
    task = Task(Recording(None, 5), sets["natural"], torch.zeros(2, 2, 4, 4, dtype=torch.long))
    lm.table_4_2(run, settings(k=5, h_def=2), (task, 0), ATTACK)
    assert [(K, H) for K, H, _ in asked_] == [(0, 2), (5, 2)] * 3
    assert [x is expected for (_, _, x), expected in zip(asked_[::2], sets.values())] == [True] * 3


# --- figures ---


def test_frechet_distance_of_commuting_gaussians():
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 1.0, 9.0]).double()
    m = torch.tensor([1.0, 2.0, 2.0]).double()
    turn = torch.linalg.qr(torch.randn(3, 3).double())[0]
    one, two = turn @ a.diag() @ turn.T, turn @ b.diag() @ turn.T
    expected = 9 + ((a.sqrt() - b.sqrt()) ** 2).sum().item()
    assert lm.frechet_distance(m, one, 0 * m, two) == pytest.approx(expected)
    assert lm.frechet_distance(m, one, m, one) == pytest.approx(0, abs=1e-9)


def test_two_energies_add_and_one_of_them_learns(run):
    s, data = settings(), some_images(130)
    fixed = common.make_net("light_ebm", 1, (1, 28, 28), 0.05)
    before = [weight.clone() for weight in fixed.parameters()]
    V, _ = lm.train_midrun(run, s, data, "energy-two", fixed)
    assert all(torch.equal(a, b) for a, b in zip(before, fixed.parameters()))
    x = torch.rand(3, 1, 28, 28)
    assert torch.allclose(V(x), fixed(x) + V.learns(x))
    torch.manual_seed(run.seed)
    untrained = common.make_net(s.net, 1, data.shape, s.width)
    assert any(not torch.equal(a, b) for a, b in zip(untrained.parameters(), V.learns.parameters()))
    resumed, _ = lm.train_midrun(run, s, data, "energy-two", fixed)
    assert torch.equal(resumed(x), V(x))


def test_figure_3_1_trains_the_three_kinds_and_follows_their_chains(run, monkeypatch):
    trained, chains = [], []
    made = {name: common.make_net("light_ebm", 1, (1, 28, 28), 0.05) for name in ("energy-short", "energy", "energy-long")}

    def train(run_, s, data, name, fixed=None):
        trained.append((name, s, data))
        assert fixed is (made["energy"] if name == "energy-two" else None)
        return made[name], None

    def chain(x, steps, V, tau, T):
        chains.append((V.net, steps, tau, T))
        return x + 0.001 * steps
    monkeypatch.setattr(lm, "train_midrun", train)
    monkeypatch.setattr(lm, "langevin", chain)
    monkeypatch.setattr(common, "feature_statistics", lambda network, x: (network(x).mean(0), network(x).mean() ** 2 * torch.eye(1).double()))
    s = settings(k_train=20, p=0.05, tau=0.01, lr=4e-4, updates=8, images=4)
    data, test = some_images(130), some_images(20, seed=2)
    rows = lm.figure_3_1(run, s, data, test, ("FD", lambda x: x.double().flatten(1).mean(1, keepdim=True)))
    assert [(name, d is data) for name, _, d in trained] == [("energy-short", True), ("energy", True), ("energy-long", True)]
    short, mid, long = [its for _, its, _ in trained]
    assert short == replace(s, p=0.5, tau=0.4 * 0.01, lr=1e-4) and mid == s and long == replace(s, p=0.0025)
    ks = [0, 25, 100, 400, 1600, 4000]  # the mean life is 20 / .05 = 400 steps
    assert [steps for _, steps, _, _ in chains[:6]] == [0, 25, 75, 300, 1200, 2400]
    for i, (name, tau) in enumerate((("energy-short", 0.004), ("energy", 0.01), ("energy-long", 0.01))):
        part = chains[6 * i:6 * i + 6]
        assert all(t == pytest.approx(tau) and T == s.temperature for _, _, t, T in part)
        weight, of = part[0][0].state_dict()["body.0.weight"].float(), made[name].state_dict()["body.0.weight"]
        assert torch.allclose(weight, of, atol=1e-2)
    start, reference = test.some(12)[0], data.take(slice(None)).double().mean()
    found = {(row["quantity"], row["steps"]): row for row in rows}
    assert set(found) == {(f"FD, {name}", k) for name in made for k in ks}
    for (_, k), row in found.items():
        here = (start + 0.001 * k).clamp(0, 1).double().mean()
        assert row["value"] == pytest.approx(2 * (here - reference).item() ** 2, rel=1e-3) and row["n"] == 12  # mean and spread
    assert torch.allclose(run.shown["figure3.1-states"]["energy, 400 steps"], start + 0.4, atol=1e-5)
    assert run.shown["figure3.1"] == rows
    trained.clear()
    made["energy-two"] = common.make_net("light_ebm", 1, (1, 28, 28), 0.05)
    more = lm.figure_3_1(run, replace(s, two_energies=True), data, test, ("FD", lambda x: x.double().flatten(1).mean(1, keepdim=True)))
    assert [name for name, _, _ in trained] == ["energy-short", "energy", "energy-long", "energy-two"] and trained[3][1] == replace(long, two_energies=True)
    assert len(more) == 24 and more[18]["quantity"] == "FD, energy-two" and chains[-1][0] is not chains[-7][0]


def test_figure_3_2_holds_the_bank_against_the_law(run):
    s = settings(p=0.2, k_train=10, updates=8, batch=4, bank=8)  # four passes
    age = torch.tensor([0, 0, 0, 0, 10, 10, 20, 40])
    rows = lm.figure_3_2(run, s, (None, age))
    found = numbers(rows)
    bank, law = "share of this age or older, bank", "share of this age or older, law"
    assert found[bank, ("steps", 10)] == 0.5 and found[bank, ("steps", 20)] == 0.25 and found[bank, ("steps", 40)] == 0.125
    assert [found[law, ("steps", steps)] for steps in (10, 20, 40)] == pytest.approx([0.8, 0.64, 0.4096])
    assert found[("mean age in steps, bank",)] == 10 and len(run.shown["figure3.2"]) == 6


def test_figures_3_3_and_3_4_attack_over_a_range_of_steps(run, monkeypatch):
    calls = []

    def attack(run_, defence, x, y, a):
        calls.append((defence, x, y, a))
        return outcome_of(bools(1, 1), bools(1, 0), a, x)
    monkeypatch.setattr(lm, "eot_attack", attack)
    s = settings(k=90, tau=0.01, few=2, h_adv=6)
    x, y = torch.rand(5, 1, 4, 4), torch.arange(5)
    plain = lambda x, steps: x + steps  # noqa: E731
    task = Task(Defence("f", 90, plain), x, y)
    rows = lm.figure_3_3(run, s, task, ATTACK)
    assert [c[0].K for c in calls] == [9, 30, 90, 180, 450] and all(c[0].chain is plain for c in calls)
    assert all(torch.equal(c[1], x[:2]) and torch.equal(c[2], y[:2]) for c in calls)
    assert all(c[3] is ATTACK for c in calls)  # that of the tables
    assert numbers(rows)["natural acc", ("K", 9)] == 1 and rows[1]["value"] == 0.5 and rows[1]["K"] == 9
    assert torch.equal(run.shown["figure3.3-states"]["9 steps"], x + 9)
    calls.clear()
    net = nn.Conv2d(1, 1, 1)
    rows = lm.figure_3_4(run, s, task, ATTACK, net)
    assert [c[0].K for c in calls] == [12, 36, 120, 360]  # 90 steps of .01 put in the noise of 360 of .005
    for defence, *_ in calls:
        assert defence.f == "f" and defence.chain.func is lm.score_chain and defence.chain.keywords["net"] is net
    assert len(rows) == 8 and run.shown["figure3.4"] == rows and len(run.shown["figure3.4-states"]) == 5


# --- the script ---


def given(monkeypatch, tmp_path, *flags, script=lm):
    """What main hands to the experiments, and its run."""
    seen = {}

    def experiments(run, registry, **have):
        seen.update(have, run=run)
    monkeypatch.setattr(common.Run, "experiments", experiments)
    script.main(["--budget", "smoke", "--out", str(tmp_path / "runs"), "--device", "cpu", *map(str, flags)])
    return seen


def test_main_hands_each_experiment_what_it_names(monkeypatch, tmp_path):
    have = given(monkeypatch, tmp_path, "--eps", 0.07, "--step", 0.01, "--n", 3, "--h-adv", 4, "--h-def", 5, "--k", 6,
                 "--tau", 0.02, "--temperature", 3e-4)
    run, data, test = have["run"], have["data"], have["test"]
    assert torch.equal(data.x, common.load_images("glyphs", "train").x)
    assert torch.equal(test.x, common.load_images("glyphs", "test").x)
    assert have["attack"] == Attack(LInf(0.07, 0.01), 3, 4, 5)
    V, age = have["midrun"]()
    assert len(age) == 8
    have["score"]()
    identity = Training(run, "probe", {"images": data}).made_from["images"]
    for name in ("energy", "score"):
        assert torch.load(run.folder / f"{name}.pt", weights_only=True)["made_from"]["images"] == identity
    task, other, (mask, _) = have["task"](), have["other_task"](), have["mask_task"]()
    for made, kind, outputs in ((task, Defence, 10), (other, Defence, 24), (mask, Segmenter, 11)):
        defence = made.defence
        assert type(defence) is kind and defence.K == 6 and len(made.x) == 8 and defence.chunk == 125
        assert (defence.chain.func, defence.path.func, defence.back.func) == (lm.langevin, lm.langevin_path, lm.pull_back)
        for chain in (defence.chain, defence.path, defence.back):
            assert chain.keywords["tau"] == 0.02 and chain.keywords["T"] == 3e-4
            for mine, its in zip(chain.keywords["V"].net.parameters(), V.parameters()):
                assert torch.allclose(mine.float(), its, atol=1e-2, rtol=1e-2)
        assert defence.f(made.x).shape[1] == outputs and not defence.f.training
    x, y = test.some(8)
    assert torch.equal(task.x, x) and torch.equal(task.y, y)
    symbols = common.load_images("symbols", "test")
    assert torch.equal(other.x, symbols.some(8)[0]) and torch.equal(other.y, symbols.some(8)[1])
    digits = lm.digits_among(run.args, test, "test")
    assert torch.equal(mask.x, digits.some(8)[0]) and torch.equal(mask.y[:, 0], digits.some(8)[1].long())
    metric, network = have["features"]()
    assert metric == "FD-cls" and network is task.defence.f
    assert (run.folder / "unet.pt").exists() and (run.folder / "f-other.pt").exists()
    for name, images in (("unet", lm.digits_among(run.args, data, "train")), ("f-other", common.load_images("symbols"))):
        state = torch.load(run.folder / f"{name}.pt", weights_only=True)
        expected = Training(run, "probe", {"images": images}).made_from["images"]
        assert state["made_from"]["images"] == expected and state["made_from"]["updates"] == (2 if name == "unet" else 3)


def test_main_trains_classifiers_and_masks_as_it_was_told(monkeypatch, tmp_path):
    trained, asked = {}, []
    real = lm.digits_among

    def train_classifier(run, name, build, images, iterations, **options):
        trained[name] = {"net": build().eval(), "iterations": iterations, **options}
        return trained[name]["net"]

    def digits_among(args, others, split):
        asked.append((others, split))
        return real(args, others, split)
    monkeypatch.setattr(common, "train_classifier", train_classifier)
    monkeypatch.setattr(lm, "digits_among", digits_among)
    monkeypatch.setattr(lm, "segmentation_task", lambda run, task: task)
    have = given(monkeypatch, tmp_path, "--f-sgd", 0.2, "--f-iters", 5, "--u-iters", 4, "--f-width", 2,
                 "--f-noise", 0.3)
    for name in ("task", "other_task", "mask_task", "noisy_task"):
        have[name]()
    assert trained["f-noisy"]["noise"] == 0.3 and "shared" not in trained["f-noisy"] and "noise" not in trained["f"]
    noisy = have["noisy_task"]()
    assert noisy.defence.f is trained["f-noisy"]["net"] and torch.equal(noisy.x, have["task"]().x)
    assert noisy.defence.chain is have["task"]().defence.chain and torch.equal(noisy.y, have["task"]().y)
    for name in ("f", "f-other", "f-noisy"):
        how = trained[name]
        assert (how["sgd"], how["augment"], how["iterations"], how["net"].head.in_features) == (0.2, "none", 5, 128)
    assert trained["f"]["shared"] and "shared" not in trained["f-other"]
    assert trained["unet"]["iterations"] == 4 and "sgd" not in trained["unet"]
    assert [(others is have["data"], others is have["test"], split) for others, split in asked] == [
        (True, False, "train"), (False, True, "test")]


def test_f_is_the_one_of_stochastic_security(monkeypatch, tmp_path):
    mine = given(monkeypatch, tmp_path)["task"]().defence.f
    assert len(list((tmp_path / "runs" / "shared-glyphs").glob("f-*.pt"))) == 1
    theirs = given(monkeypatch, tmp_path, script=stochastic_security)["f"]()
    assert len(list((tmp_path / "runs" / "shared-glyphs").glob("f-*.pt"))) == 1
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in mine.state_dict().items())
    for column in (("mnist", "quick"), ("cifar10", "quick"), ("cifar10", "cpu"), ("cifar10", "paper")):
        a, b = lm.SETTINGS[column], stochastic_security.SETTINGS[column]
        assert (a.f_net, a.f_width, a.f_iters, a.f_sgd) == (b.f_net, b.f_width, b.f_iters, b.f_sgd)
        assert a.first_class == b.first_class
        assert b.augment == ("crop_flip" if column[0] == "cifar10" else "none")  # main: that of colour images


def test_smoke_run_of_every_experiment(tmp_path, outcome):
    code, err = outcome(lm, "--budget", "smoke", "--out", tmp_path, "--device", "cpu", "--only", *lm.EXPERIMENTS)
    assert (code, err) == (0, "")
    folder = tmp_path / "lifecycle_midrun-glyphs"
    results = json.loads((folder / "results.json").read_text())
    assert set(results) == set(lm.EXPERIMENTS)
    assert [name for name, e in lm.EXPERIMENTS.items() if e.headline] == ["table3.1"]
    for name, entry in results.items():
        for row in entry["rows"]:
            assert math.isfinite(row["value"]), (name, row)
            if "interval" in row:
                assert 0 <= row["interval"][0] <= row["value"] <= row["interval"][1] <= 1
    for table in ("table3.1", "table4.1", "table4.2"):
        robust = {q: v for q, v in values(results[table]["rows"]).items() if q.startswith("robust") and not re.search("no defence|against", q)}
        assert len(robust) == 4 and robust["robust acc, worst of these"] == min(robust.values())
    for picture in ("table3.1", "table4.1", "table4.2", "table4.2-masks", "figure3.1", "figure3.1-states", "figure3.2",
                    "figure3.3", "figure3.4", "figure3.4-states"):
        assert (folder / f"{picture}.png").exists()


@pytest.mark.parametrize("dataset, side, only", [
    ("cifar10", 32, ("table3.1", "table4.1", "table4.2", "figure3.2")), ("tinyimagenet", 64, ("figure3.2",))])
def test_smoke_run_on_colour(tmp_path, write_npz, outcome, dataset, side, only):
    data = write_npz(dataset, side=side, n=60)
    write_npz("cifar100", n=60)
    flags = ("--dataset", dataset, "--budget", "smoke", "--data-dir", data, "--out", tmp_path, "--device", "cpu")
    assert outcome(lm, *flags, "--only", *only) == (0, "")


def test_imagenet_is_a_folder_and_f_comes_trained(tmp_path, monkeypatch):
    random = np.random.RandomState(0)
    for split, n in (("train", 10), ("val", 8)):
        for i in range(n):
            file = tmp_path / "data" / "imagenet" / split / f"n0{i % 4}" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.randint(0, 256, (230, 240, 3), dtype=np.uint8)).save(file)
    (tmp_path / "data" / "flowers102").symlink_to(tmp_path / "data" / "imagenet")
    names = []
    monkeypatch.setattr(common.torchvision.models, "get_model",
                        lambda name, weights: names.append(name) or TinyTorchvision())
    have = given(monkeypatch, tmp_path, "--dataset", "imagenet", "--data-dir", tmp_path / "data", "--f-iters", 1)
    assert have["data"].shape == have["test"].shape == (3, 224, 224) and have["run"].chunk == 2
    task = have["task"]()
    assert names == ["efficientnet_b7"] and task.x.shape == (8, 3, 224, 224)
    assert sorted(task.y.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]  # the rank of the folder
    assert list((tmp_path / "runs" / "shared-imagenet").glob("f-*.pt"))  # of four classes alone f learns its last layer
    other = have["other_task"]()
    assert names[-1] == "resnet50" and other.defence.f(other.x[:1]).shape == (1, 4)
    assert other.x.shape == (8, 3, 224, 224)
    assert torch.load(have["run"].folder / "f-other.pt", weights_only=True)["made_from"]["updates"] == 1  # it learns
    rows, _, _ = lm.attacked(FakeRun(tmp_path / "r"), settings(n=1, k=3), task, Attack(BALL, 1, 1, 1), "t")
    assert len(rows) == 7


@pytest.mark.parametrize("flags, says", [
    (("--eps", "-1"), "at least 0"), (("--eps", "8"), "8/255"), (("--tau", "0"), "above 0"), (("--temperature", "inf"), "finite"),
    (("--bank", "10", "--batch", "4"), "--bank"), (("--p", "1.5"), "--p"), (("--p", "0"), "--p"),
    (("--images", "5000"), "2000"), (("--net", "nothing"), "unknown network"), (("--k", "0"), "--k"),
    (("--only", "figure9"), "unknown experiment"), (("--few", "0"), "--few"), (("--u-iters", "0"), "--u-iters")])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, outcome, flags, says):
    code, err = outcome(lm, "--budget", "smoke", "--out", tmp_path / "out", "--device", "cpu", *flags)
    assert code == 2 and says in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_another_data_set_is_refused_by_its_name_and_by_its_checkpoint(tmp_path, outcome):
    flags = ("--budget", "smoke", "--out", tmp_path, "--device", "cpu", "--only", "table4.1")
    code, err = outcome(lm, *flags, "--other", "nowhere")
    assert code == 2 and "unknown data set" in err and err.count("\n") == 1
    assert not (tmp_path / "lifecycle_midrun-glyphs" / "energy.pt").exists()  # it was said before any work
    assert outcome(lm, *flags) == (0, "")
    code, err = outcome(lm, *flags, "--other", "letters")
    assert code == 2 and "f-other" in err and err.count("\n") == 1


def test_settings_are_the_published_ones():
    s, big = lm.SETTINGS["cifar10", "paper"], lm.SETTINGS["imagenet", "paper"]
    assert (s.updates, s.batch, s.k_train, s.lr, s.p, s.temperature) == (150_000, 128, 100, 1e-4, .025, 1e-4)
    assert (s.net, s.width, big.net, big.width) == ("sngan", 1, "sngan", 1)
    assert big.k_train == 100
    assert s.bank == 20_000 // 128 * 128 and big.bank == 10_000 // 64 * 64
    assert (2 * s.tau, 2 * s.data_noise, s.k) == (.01, .02, 2000)
    assert (s.h_adv, s.h_def, s.n, s.eps, s.step, s.images) == (48, 128, 50, 8 / 255, 2 / 255, 5000)
    for script in (lm, stochastic_security):  # the attack of the digits' headlines: half of it breaks fewer
        assert [getattr(script.SETTINGS["glyphs", "quick"], name) for name in ("n", "h_adv", "h_def")] == [20, 6, 24]
    assert (big.batch, big.k, big.h_adv, big.h_def, big.eps, big.step) == (64, 200, 24, 64, 2 / 255, 1 / 255)
    assert (2 * big.tau, 2 * big.data_noise, big.temperature, big.p) == (.02, .03, 1e-5, .05)
    assert round(4 / 3 * big.h_adv) == 32 and 4 * big.n == 200  # table 3.3
    for s in lm.SETTINGS.values():
        assert s.bank % s.batch == 0 and s.few <= s.images
