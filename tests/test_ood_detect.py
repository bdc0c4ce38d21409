"""ood_detect.py: scores, attacks, training of every method, out-distribution sets, tables, the script as a whole."""
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import at_gen
import common
import ood_detect as od
from common import Images
from conftest import FakeRun, Killed

SMOKE = od.SETTINGS["glyphs", "smoke"]
SHAPE = (1, 28, 28)
FIRST, LAST = "softmax, largest probability", "in- and out-AT (3.36)"


@pytest.fixture
def run(tmp_path):
    return FakeRun(tmp_path / "run")


def some_images(n=24, seed=1, name="made up", shape=SHAPE):
    g = torch.Generator().manual_seed(seed)
    return Images(torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=g), torch.arange(n) % 10, name)


def small_net(outputs=1, seed=0):
    torch.manual_seed(seed)
    return common.make_net("mnist_cnn", outputs, SHAPE, 0.1).eval().requires_grad_(False)


def detector_of(net, score=od.logit):
    return od.Detector(net, score)


class Sum(nn.Module):
    """f(x) = the sum of the pixels, times a weight."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x):
        return self.weight * x.flatten(1).sum(1, keepdim=True)


# --- scores and measures ---


def test_scores_are_high_for_sure_outputs():
    z = torch.tensor([[0.0, 0.0, 0.0], [5.0, 0.0, 0.0]])
    assert od.confidence(z).sigmoid().tolist() == pytest.approx([1 / 3, math.e**5 / (math.e**5 + 2)])
    sure = od.confidence(torch.tensor([[30.0, 0.0, 0.0], [40.0, 0.0, 0.0], [40.0, 0.0, 39.0]]))
    assert sure[1] > sure[0] > 20 and sure[2] < 2                               # where the probability rounds to 1: no tie
    assert od.free_energy(z).tolist() == pytest.approx([math.log(3), math.log(math.e**5 + 2)])
    assert od.logit(torch.tensor([[2.0], [-1.0]])).tolist() == [2, -1]


def test_auroc_has_the_right_sign_and_counts_ties_as_half():
    high, low = torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])
    assert od.auroc(high, low) == 1 and od.auroc(low, high) == 0 and od.auroc(low, low) == 0.5
    metrics = pytest.importorskip("sklearn.metrics")
    a, b = torch.randn(50).round(decimals=1), torch.randn(70).round(decimals=1) + 0.3
    theirs = metrics.roc_auc_score([1] * 50 + [0] * 70, torch.cat([a, b]).numpy())
    assert od.auroc(a, b) == pytest.approx(theirs)


def test_bootstrap_interval_covers_as_often_as_it_says():
    """Scores of two Gaussians one apart: AUROC Phi(1 / sqrt 2) = .760. Hanley and McNeil's error for 200: .023."""
    truth, inside, widths = 0.7602, 0, []
    for seed in range(60):
        torch.manual_seed(seed)
        low, high = common.bootstrap(od.auroc, torch.randn(200) + 1, torch.randn(200))
        inside += low <= truth <= high
        widths.append(high - low)
    assert inside >= 51 and sum(widths) / 60 == pytest.approx(2 * 1.96 * 0.0236, rel=0.15)


def test_false_positive_rate_at_a_true_one_of_95_percent():
    inside = torch.arange(100.0)  # the threshold that accepts 95 of them: 5
    assert od.false_positives(inside, torch.tensor([4.9, 5.0, 70.0, -1.0])) == 0.5
    row = od.area_row("title", inside, torch.tensor([4.9, 5.0, 70.0, -1.0]), eps=2)
    assert row["fpr95"] == 0.5 and row["n"] == 4 and row["eps"] == 2 and row["value"] == od.auroc(inside, torch.tensor([4.9, 5, 70, -1]))


# --- attacks ---


def test_pgd_by_hand(exact):
    x0 = torch.full((1, 1, 1, 2), 0.5)

    def slope(x):
        return (x * torch.tensor([3.0, -4.0])).sum((1, 2, 3))

    def go(*a):
        return od.momentum_pgd(slope, x0, od.Ball("2", *a)).flatten().tolist()
    assert go(9.0, 1, 0.1) == pytest.approx([0.5 - 0.06, 0.5 + 0.08])
    assert go(9.0, 2, 0.1) == pytest.approx([0.5 - 0.12, 0.5 + 0.16])
    assert go(9.0, 2, 0.1, 0.5) == pytest.approx([0.5 - 0.15, 0.5 + 0.20])  # the second step is 1.5 as long
    assert go(0.05, 3, 0.1) == pytest.approx([0.5 - 0.03, 0.5 + 0.04])
    assert go(9.0, 9, 0.1) == [0, 1]
    still = od.momentum_pgd(lambda x: 0 * x.sum((1, 2, 3)), x0, od.Ball("2", 1.0, 2, 0.1))
    assert torch.equal(still, x0)
    with pytest.raises(ValueError):
        od.momentum_pgd(slope, x0 + 1, od.Ball("2", 1.0, 1, 0.1))


def test_apgd_reaches_the_optimum_on_the_surface(exact):
    """|x - target|^2 with the target outside the ball: the optimum is where the way to it leaves the ball."""
    x0 = torch.full((2, 1, 4, 4), 0.5)
    target = x0 + 0.1 * torch.randn(2, 1, 4, 4)
    a = od.Ball("2", 0.1, 50)
    seen = []

    def loss(x):
        seen.append((x - target).square().sum((1, 2, 3)))
        return seen[-1]
    x = od.apgd(loss, x0, a, od.on_sphere(x0, a))
    best = x0 + 0.1 * (target - x0) / od.length(target - x0)
    assert (x - best).abs().max() < 1e-3
    reached = (x - target).square().sum((1, 2, 3))
    assert torch.allclose(reached, torch.stack(seen).amin(0), atol=1e-6)  # the best of all that it saw


def test_starts_are_on_the_surface_of_the_ball():
    x0 = torch.full((50, 1, 8, 8), 0.5)
    x = od.on_sphere(x0, od.Ball("2", 1.0, 1))
    assert torch.allclose(od.length(x - x0), torch.ones(50, 1, 1, 1))
    assert abs((x - x0).sum((1, 2, 3)).mean()) < 4 and len({row.sum().item() for row in x}) > 40


def test_apgd_finds_what_torchattacks_finds(exact):
    torchattacks = pytest.importorskip("torchattacks")
    net, x0 = small_net(), torch.rand(8, *SHAPE)

    class Two(nn.Module):
        def forward(self, x):
            z = net(x)
            return torch.cat([z, torch.zeros_like(z)], 1)
    theirs = torchattacks.APGD(Two().eval(), norm="L2", eps=2.0, steps=50, n_restarts=1, loss="ce", seed=0)
    sign = 1.0 if net(x0).mean() < 0 else -1.0  # theirs attacks only what is still right: those below 0, or above
    label = torch.full((8,), 1 if sign > 0 else 0)
    reached = net(theirs(x0, label))[:, 0]
    a = od.Ball("2", 2.0, 50)
    ours = net(od.apgd(od.score_loss, x0, a, od.on_sphere(x0, a), net, od.logit, sign))[:, 0]
    start = net(x0)[:, 0]
    if (sign * reached > 0).any():  # it stops where the label is lost: hold both to the same images
        kept = sign * reached <= 0
        start, reached, ours = start[kept], reached[kept], ours[kept]
    if len(ours):
        assert (sign * (ours - start)).mean() >= 0.99 * (sign * (reached - start)).mean()


@pytest.mark.parametrize("sign", [1, -1])
def test_worst_case_takes_the_best_of_all_that_was_tried(monkeypatch, exact, sign):
    x0 = torch.full((3, 1, 2, 2), 0.5)
    detector = detector_of(Sum())
    tried = iter([0.4, 0.9, 0.2] if sign == 1 else [0.6, 0.1, 0.8])  # PGD, then two restarts of Auto-PGD

    def attack(loss, x0, a, *rest):
        assert loss is od.score_loss and rest[-3:] == (detector.net, detector.score, sign)
        level = next(tried)
        x = torch.full_like(x0, level)
        x[0] = 0.5 - sign * 0.3  # the first image is only made worse
        return x
    monkeypatch.setattr(od, "momentum_pgd", attack)
    monkeypatch.setattr(od, "apgd", attack)
    x, score = od.worst_case(detector, x0, od.Ball("2", 1.0, 5), 2, sign)
    best = 0.9 if sign == 1 else 0.1
    assert x.flatten(1).mean(1).tolist() == pytest.approx([0.5, best, best])
    assert score.tolist() == pytest.approx([2.0, 4 * best, 4 * best]) and next(tried, None) is None


def test_attacked_images_stay_in_the_ball_and_score_higher(run, exact):
    detector, x = detector_of(small_net()), torch.rand(7, *SHAPE)
    run.chunk = 3
    a = od.Ball("2", 1.0, 10)
    for sign in (1, -1):
        found, score = od.search(run, detector, x, a, 1, sign)
        assert 0 <= found.min() and found.max() <= 1 and od.length(found - x).max() < 1.0001
        assert (sign * (score - detector(x)) > 0).all() and torch.allclose(detector(found), score, atol=1e-5)


def test_apgd_looks_at_its_last_image_too():
    """Each image that it asks for is better than all before it: the last one asked for is the best."""
    asked = []

    def loss(x):
        if not x.requires_grad:
            asked.append(x)
        return -float(len(asked)) + 0 * x.sum((1, 2, 3))
    a = od.Ball("2", 1.0, 6)
    x0 = torch.rand(2, 1, 4, 4)
    found = od.apgd(lambda x: loss(x) + 1e-3 * x.sum((1, 2, 3)), x0, a, x0)
    assert len(asked) == a.steps + 1 and torch.equal(found, asked[-1]) and not torch.equal(found, x0)


# --- training ---


def test_losses_by_hand():
    z, y, z_out = torch.tensor([[2.0, 0.0]]), torch.tensor([0]), torch.tensor([[1.0, -1.0]])
    ce = math.log(1 + math.exp(-2))
    uniform = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2))) / 2
    assert od.class_loss(z, y, z_out).item() == pytest.approx(ce)
    assert od.exposure_loss(z, y, z_out).item() == pytest.approx(ce + uniform / 2)
    assert [m.loss for m in od.METHODS.values()] == [od.class_loss, od.exposure_loss, od.binary_loss, od.ratio_loss, od.binary_loss]
    assert od.ratio_loss(z, y, z_out).item() == pytest.approx(ce + uniform)
    f, f_out = torch.tensor([[2.0]]), torch.tensor([[-1.0]])
    assert od.binary_loss(f, y, f_out).item() == pytest.approx((ce + math.log(1 + math.exp(-1))) / 2)
    together = F.binary_cross_entropy_with_logits(torch.cat([f, f_out]), torch.tensor([[1.0], [0.0]]))
    assert od.binary_loss(f, y, f_out).item() == pytest.approx(together.item())


def test_what_attacks_in_training_minimise():
    net, x, y = small_net(3), torch.rand(4, *SHAPE), torch.tensor([0, 1, 2, 0])
    z = net(x)
    assert torch.allclose(od.lower_logit(x, net, y), z[:, 0]) and torch.allclose(od.raise_logit(x, net, y), -z[:, 0])
    assert torch.allclose(od.label_loss(x, net, y), -F.cross_entropy(z, y, reduction="none"), atol=1e-2)
    even = torch.zeros(1, 3)
    assert od.uniform_loss(even).item() == pytest.approx(math.log(3))  # least where all are equal
    assert od.uniform_loss(even + torch.tensor([1.0, 0, 0])) > math.log(3)
    assert torch.allclose(od.away_from_uniform(x, net, y), -od.uniform_loss(z))


EXPECTED = {  # what is attacked, by which loss; outputs
    "softmax": (None, None, 10),
    "exposure": (None, None, 10),
    "binary": (None, None, 1),
    "ratio": (od.label_loss, od.away_from_uniform, 10),
    "adversarial": (od.lower_logit, od.raise_logit, 1),
}


@pytest.mark.parametrize("name", od.METHODS)
def test_an_update_of_each_method(run, monkeypatch, exact, name):
    """The right side is attacked by the right loss within the right ball, and the loss sees what came out."""
    s = replace(SMOKE, updates=1, eps_in=0.5, eps_out=1.5, steps_in=3, steps_out=4, step=0.25, lr=0.5)
    data, p0 = some_images(40), some_images(40, seed=2)
    inside, outside, outputs = EXPECTED[name]
    calls, seen = [], []
    real = od.momentum_pgd

    def momentum_pgd(loss, x0, a, net, y):
        assert not net.training
        calls.append((loss, a, x0, y, real(loss, x0, a, net, y)))
        return calls[-1][-1]
    monkeypatch.setattr(od, "momentum_pgd", momentum_pgd)
    method = od.METHODS[name]

    def loss(z, y, z_out):
        seen.append((z, y, z_out))
        return method.loss(z, y, z_out)
    monkeypatch.setitem(od.METHODS, name, method._replace(loss=loss))
    before = {}

    build = common.make_net

    def make_net(*a):
        net = build(*a)
        before["net"] = common.frozen_copy(net).net
        return net
    monkeypatch.setattr(common, "make_net", make_net)
    net = od.train(run, s, name, data, p0)
    (z, y, z_out), = seen
    assert z.shape == (4, outputs) and z_out.shape == (4, outputs)
    index = common.batch_index(40, 4, run.seed, 0)
    x, x_out = data.take(index), p0.take(common.batch_index(40, 4, run.seed + 1, 0))
    assert torch.equal(y, data.y[index])
    wanted = []
    if inside:
        wanted.append((inside, od.Ball("2", 0.5, 3, 0.25), x))
    if outside:
        wanted.append((outside, od.Ball("2", 1.5, 4, 0.25), x_out))
    assert len(calls) == len(wanted)
    for (loss_is, a, x0, labels, _), (loss_wanted, a_wanted, x0_wanted) in zip(calls, wanted):
        assert loss_is is loss_wanted and a == a_wanted and torch.equal(x0, x0_wanted) and torch.equal(labels, y)
    made = [call[-1] for call in calls]
    x_seen = made[0] if inside else x
    out_seen = made[-1] if outside else x_out
    old = before["net"]
    assert torch.allclose(z, old(x_seen), atol=1e-5) and torch.allclose(z_out, old(out_seen), atol=1e-5)
    old.requires_grad_(True)  # the update: Nesterov's first step is lr (1 + momentum) times the gradient
    method.loss(old(x_seen), y, old(out_seen)).backward()
    for new, was in zip(net.parameters(), old.parameters()):
        assert torch.allclose(new, was - 0.5 * 1.9 * was.grad, atol=1e-5)
    assert not any(p.requires_grad for p in net.parameters())


def test_the_detector_of_each_row():
    rows = {name: (method, score.__name__) for name, (method, score) in od.DETECTORS.items()}
    assert rows == {
        "softmax, largest probability": ("softmax", "confidence"), "softmax, free energy": ("softmax", "free_energy"),
        "Outlier Exposure": ("exposure", "confidence"), "binary": ("binary", "logit"), "RATIO": ("ratio", "confidence"),
        "in- and out-AT (3.36)": ("adversarial", "logit")}
    for method, _ in od.DETECTORS.values():
        assert method in od.METHODS
    for name, (inside, outside, outputs) in EXPECTED.items():
        method = od.METHODS[name]
        assert (method.inside, method.outside, method.binary) == (inside, outside, outputs == 1)


def test_killed_and_resumed_equals_unbroken(tmp_path, monkeypatch):
    data, p0 = some_images(40), some_images(40, seed=2)
    s = replace(SMOKE, updates=4)
    whole = od.train(FakeRun(tmp_path / "whole"), s, "adversarial", data, p0)
    run, real, count = FakeRun(tmp_path / "cut"), od.momentum_pgd, []
    monkeypatch.setattr(common.Training, "SAVE_SECONDS", 0)

    def momentum_pgd(*a):
        count.append(1)
        if len(count) > 5:
            raise Killed
        return real(*a)
    monkeypatch.setattr(od, "momentum_pgd", momentum_pgd)
    with pytest.raises(Killed):
        od.train(run, s, "adversarial", data, p0)
    monkeypatch.setattr(od, "momentum_pgd", real)
    resumed = od.train(run, s, "adversarial", data, p0)
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b)


def test_batchnorm_is_the_same_function_in_attack_and_update(run):
    data = some_images(40, shape=(3, 32, 32))
    s = replace(SMOKE, net="resnet18", width=0.125, updates=1)
    net = od.train(run, s, "adversarial", data, data)
    for layer in net.modules():
        assert not layer.training
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean.abs().max() == 0 and (layer.running_var == 1).all()


def test_augmentation_cuts_a_square_out_of_each_image():
    x = torch.rand(6, 3, 32, 32)
    out = od.augmented(x)
    assert out.shape == x.shape and 0 <= out.min() and out.max() <= 1 and not torch.equal(out[0], out[1])
    squares = set()
    for image in out:
        grey = (image - torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)).abs().amax(0) < 1e-6
        rows, columns = grey.any(1).nonzero()[:, 0], grey.any(0).nonzero()[:, 0]
        height, width = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
        assert int(grey.sum()) == height * width and 8 <= height <= 16 and 8 <= width <= 16  # less at the edge
        squares.add((int(rows[0]), int(columns[0])))
    assert len(squares) > 1


# --- out-distribution sets ---


def settings(**change):
    return replace(SMOKE, **change)


def test_p0s_classes_and_known_images_are_left_out(monkeypatch):
    data, test = some_images(30, name="glyphs"), some_images(30, seed=5)
    p0 = some_images(30, seed=6)
    symbols, letters = some_images(30, seed=7), some_images(30, seed=8)
    symbols.x[3], symbols.x[11], symbols.x[12] = data.x[2], test.x[4], p0.x[5]  # three that are known
    made = {"symbols": symbols, "letters": letters, "noise": some_images(30, seed=9)}
    asked = []

    def load_on_device(args, name, split, *shape):
        asked.append((name, split))
        assert shape == (1, 28)
        if name not in made:
            raise common.UserError("not here")
        return made[name]
    monkeypatch.setattr(common, "load_on_device", load_on_device)
    args = SimpleNamespace(data_dir="", device="cpu")
    sets = od.other_sets(args, settings(p0="letters:4", images=40), data, test, p0)
    assert "letters" not in od.other_sets(args, settings(p0="letters"), data, test, p0)
    assert {split for _, split in asked} == {"test"}
    assert list(sets) == ["symbols", "letters", "noise", "smooth noise", "single colours"]
    assert sets["symbols"][1] == 3 and len(sets["symbols"][0]) == 27
    assert sets["letters"][1] == 0 and len(sets["letters"][0]) == 18  # classes 4 to 9
    kept = {(255 * x).round().to(torch.uint8).numpy().tobytes() for x in sets["letters"][0]}
    assert kept == {x.numpy().tobytes() for x in letters.x[letters.y >= 4]}
    data = Images(data.x, data.y, "mnist")  # whose third set can't be read
    assert "fashion_mnist" not in od.other_sets(args, settings(p0="letters:4"), data, test, p0)
    large = Images(data.x, data.y, "lsun_church")
    asked.clear()
    od.other_sets(args, settings(p0="none"), large, test, p0)
    assert [name for name, _ in asked] == ["svhn", "cifar10", "imagenet", "celebahq", "afhq_cat", "noise"]


def test_the_data_is_never_its_own_out_distribution():
    assert set(od.OTHERS) == {dataset for dataset, _ in od.SETTINGS}
    for data, others in od.OTHERS.items():
        known = {*common.IN_MEMORY, *common.FOLDERS} if data in od.LARGE else common.IN_MEMORY
        assert (data in others) == (data in od.LARGE) and set(others) <= set(known)  # (other_sets leaves the set itself out)
    assert set(od.OTHERS["glyphs"]) <= {"symbols", "letters", "noise"}  # nothing that would have to be downloaded


def test_made_up_sets():
    colours = od.single_colours(5, (3, 8, 8)).float()
    assert colours.flatten(2).std(2).max() == 0 and colours.flatten(2)[:, :, 0].std() > 20
    grey = od.single_colours(300, (1, 8, 8))                                    # there are no more than 256, all different
    assert grey.shape == (256, 1, 8, 8) and len(set(grey[:, 0, 0, 0].tolist())) == 256
    assert len(od.single_colours(300, (3, 8, 8))) == 300
    smooth = od.smooth_noise(50, (1, 28, 28)).float()
    steps = (smooth[..., 1:] - smooth[..., :-1]).abs().mean()
    assert smooth.std() > 30 and steps < smooth.std() / 4


# --- tables and figures ---


@pytest.fixture
def world():
    sets = {"symbols": (torch.rand(6, *SHAPE), 2), "noise": (torch.rand(6, *SHAPE), 0)}
    detectors = {FIRST: detector_of(small_net(3), od.confidence), LAST: detector_of(small_net(1, 4))}
    return some_images(30), sets, detectors


def record(monkeypatch):
    """Attacks that are not made: the score rises by eps x steps, or falls; what they were called with."""
    calls = []

    def search(run, detector, x, a, restarts, sign=1):
        calls.append((detector, a, restarts, sign, len(x)))
        found = (0.9 * x + 0.01 * len(calls)).clamp(0, 1)
        return found, detector(x) + sign * (a.eps + a.steps / 1000 + restarts)
    monkeypatch.setattr(od, "search", search)
    return calls


def test_table_3_12(run, monkeypatch, world):
    """The worst case of a detector: the best of what attacks on it and on all others found."""
    test, sets, detectors = world
    calls, found = record(monkeypatch), []
    fake = od.search
    monkeypatch.setattr(od, "search", lambda run, detector, x, *a: found.append((detector, x, fake(run, detector, x, *a))) or found[-1][-1])
    s = settings(eps=0.25, iterations=7, restarts=3)
    rows = {row["quantity"]: row for row in od.table_3_12(run, s, test, sets, detectors)}
    a = od.Ball("2", 0.25, 7)
    assert len(rows) == 8 and {call[1:4] for call in calls} == {(a, 3, 1), (a, 3, -1)} and len(calls) == 6
    x_in = test.some(s.images)[0]
    for name, detector in detectors.items():
        inside = detector(x_in)
        for title, (x, removed) in sets.items():
            tried = [images for _, x0, (images, _) in found if x0 is x]
            assert len(tried) == 2
            worst = torch.maximum(detector(tried[0]), detector(tried[1]))
            row, clean = rows[f"worst-case AUROC {title}, {name}"], rows[f"AUROC {title}, {name}"]
            assert clean["value"] == od.auroc(inside, detector(x)) and clean["removed"] == removed
            assert row["value"] == od.auroc(inside, worst) and row["eps"] == 0.25
            assert row["data_attacked"] == od.auroc(inside - 0.25 - 0.007 - 3, detector(x))


def test_best_of_joins_image_by_image():
    detector = detector_of(Sum())
    tried = [torch.full((3, 1, 1, 1), 0.5), torch.tensor([0.1, 0.9, 0.5]).view(3, 1, 1, 1)]
    for sign, best in ((1, [0.5, 0.9, 0.5]), (-1, [0.1, 0.5, 0.5])):
        x, score = od.best_of(detector, tried, sign)
        assert x.flatten().tolist() == pytest.approx(best) and score.tolist() == pytest.approx(best)


def test_eps_sweep(run, monkeypatch, world):
    test, sets, detectors = world
    calls = record(monkeypatch)
    rows = od.eps_sweep(run, settings(eps=2.0, iterations=7), test, sets, detectors)
    assert [row["eps"] for row in rows[:7]] == [0, 0.25, 0.5, 1, 2, 3, 4] and len(rows) == 14
    inside = detectors[FIRST](test.some(SMOKE.images)[0])
    assert rows[0]["value"] == od.auroc(inside, detectors[FIRST](sets["symbols"][0]))  # clean, the first set
    assert {a.steps for _, a, *_ in calls} == {7} and run.shown["eps-sweep"] == rows


def test_steps(run, monkeypatch, world):
    test, sets, detectors = world
    calls = record(monkeypatch)
    rows = od.steps(run, settings(iterations=50), test, sets, detectors)
    assert {call[0] for call in calls} == {detectors[LAST]}
    assert [row["iterations"] for row in rows[:6]] == [5, 10, 25, 50, 100, 200] == [call[1].steps for call in calls[:6]]
    assert [row["restarts"] for row in rows[6:]] == [0, 1, 2, 5, 10] == [call[2] for call in calls[6:]]
    assert {call[2] for call in calls[:6]} == {1} and {call[1].steps for call in calls[6:]} == {50}


def test_histogram_and_gallery(run, monkeypatch, world):
    test, sets, detectors = world
    calls = record(monkeypatch)
    run.histograms = lambda name, panels: run.shown.update({name: panels})
    panels = {"softmax, free energy": detectors[FIRST], "binary": detectors[FIRST], LAST: detectors[LAST]}
    od.histogram(run, SMOKE, test, sets, panels)
    assert set(run.shown["histogram"]) == set(panels)
    for name, panel in run.shown["histogram"].items():
        inside, clean, worst = panel.values()
        assert torch.equal(inside, panels[name](test.some(SMOKE.images)[0]))
        assert torch.equal(clean, panels[name](sets["symbols"][0])) and (worst > clean).all()
    calls.clear()
    fake, made = od.search, []
    monkeypatch.setattr(od, "search", lambda run, d, x, *a: made.append((d, x, fake(run, d, x, *a))) or made[-1][-1])
    rows = od.gallery(run, settings(eps=2.0), sets, detectors)
    assert [call[1].eps for call in calls] == [2, 2, 6, 12] * 2 and [row["eps"] for row in rows] == [2, 6, 12] * 2
    for name in (FIRST, LAST):  # those that the attacked detector likes best
        order = detectors[name](sets["symbols"][0]).argsort(descending=True)
        first = sets["symbols"][0][order]
        assert torch.equal(run.shown["gallery"][f"{name}: symbols"], first)
        for _, x0, (found, _) in [entry for entry in made if entry[0] is detectors[name]][1:]:
            assert torch.equal(x0, first) and any(found is shown for shown in run.shown["gallery"].values())
    assert [call[0] for call in calls] == [detectors[FIRST]] * 4 + [detectors[LAST]] * 4


# --- the script ---


def test_main_gives_every_row_its_own_network_and_score(tmp_path, monkeypatch):
    made, trained, sets = {}, [], []
    monkeypatch.setattr(od, "train", lambda run, s, name, data, p0: trained.append((name, data, p0)) or name)
    monkeypatch.setattr(od, "other_sets", lambda args, s, data, test, p0: sets.append((data, test, p0)))
    monkeypatch.setattr(common.Run, "experiments", lambda self, registry, **have: made.update(have))
    od.main(["--out", str(tmp_path), "--device", "cpu"])
    detectors = made["detectors"]()
    assert {name: (d.net, d.score) for name, d in detectors.items()} == od.DETECTORS
    assert sorted(name for name, *_ in trained) == sorted(od.METHODS)  # each once
    made["sets"]()
    letters = common.load_images("letters", "train", "")
    for _, data, p0 in trained:
        assert data.name == "glyphs" and len(data) == 10_000
        assert p0.name == "letters:36" and torch.equal(p0.x, letters.x[letters.y < 36])
    (data, test, p0), = sets
    assert test is made["test"] and len(test) == 2000 and p0.name == "letters:36" and len(data) == 10_000


def test_colour_images_are_augmented_on_both_sides(run, monkeypatch):
    data, p0 = some_images(40, shape=(3, 32, 32)), some_images(40, seed=2, shape=(3, 32, 32))
    seen = []
    monkeypatch.setattr(od, "augmented", lambda x: seen.append(x) or x)
    s = replace(SMOKE, net="small_cnn", width=0.5, augment="auto", updates=1)
    od.train(run, s, "binary", data, p0)
    assert len(seen) == 2 and not torch.equal(seen[0], seen[1])
    seen.clear()
    od.train(run, replace(s, augment="none"), "softmax", data, p0)
    assert not seen


def test_smoke_run_of_every_experiment(tmp_path, outcome):
    flags = ("--budget", "smoke", "--out", tmp_path, "--device", "cpu")
    small = [name for name in od.EXPERIMENTS if name != "table3.13"]  # which is for large pictures
    assert outcome(od, *flags, "--only", *small) == (0, "")
    folder = tmp_path / "ood_detect-glyphs"
    results = json.loads((folder / "results.json").read_text())
    assert set(results) == set(small) and {entry["p0"] for entry in results.values()} == {"letters:36"}
    for name, entry in results.items():
        for row in entry["rows"]:
            assert math.isfinite(row["value"]), (name, row)
    assert {p.stem for p in folder.glob("*.png")} == {"histogram", "gallery", "eps-sweep", "steps"}
    assert {p.stem for p in folder.glob("*.pt")} == set(od.METHODS)
    code, err = outcome(od, *flags, "--eps-out", "0.7")
    assert code == 2 and "ratio.pt" in err and err.count("\n") == 1


def test_smoke_run_on_colour(tmp_path, write_npz, outcome):
    data = write_npz("cifar10", n=60)
    for name in ("cifar100", "svhn"):
        x_test = np.random.RandomState(len(name)).randint(0, 256, (60, 32, 32, 3), dtype=np.uint8)
        write_npz(name, n=60, x_test=x_test)
    flags = ("--dataset", "cifar10", "--budget", "smoke", "--data-dir", data, "--out", tmp_path, "--device", "cpu")
    assert outcome(od, *flags, "--p0", "cifar100:5", "--width", "0.125") == (0, "")
    rows = json.loads((tmp_path / "ood_detect-cifar10" / "results.json").read_text())["table3.12"]["rows"]
    assert {"AUROC svhn, RATIO", "AUROC cifar100, binary", "worst-case AUROC single colours, binary"} <= {r["quantity"] for r in rows}


@pytest.fixture
def pictures(tmp_path):
    """A data folder with three sets of pictures in files."""
    random = np.random.RandomState(1)
    for name in ("celebahq", "imagenet", "afhq_cat"):
        for i in range(30):
            file = tmp_path / "data" / name / f"part{i % 3}" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.randint(0, 256, (40 + i, 50, 3), dtype=np.uint8)).save(file)
    return tmp_path / "data"


def test_table_3_13_takes_the_model_of_at_gen(tmp_path, outcome, pictures, narrow_d, monkeypatch):
    flags = ("--dataset", "celebahq", "--budget", "smoke", "--data-dir", pictures, "--out", tmp_path,
             "--device", "cpu", "--only")
    made = []

    def at_gen_instead(command):  # with few channels and the side of 16, which is quick
        made.append(command)
        at_gen.main([*command[2:], "--side", "16", "--k-max", "1", "--images", "12"])
        return SimpleNamespace(returncode=0)
    for module in (at_gen, od):
        monkeypatch.setattr(module, "ResBlockD", narrow_d(module))
    monkeypatch.setattr(od, "subprocess", SimpleNamespace(run=at_gen_instead))
    kept = {}
    real = od.table_3_12

    def table_3_12(run, s, test, sets, detectors):
        kept.update(eps=s.eps, test=test, sets=sets, detectors=detectors)
        return real(run, s, test, sets, detectors)
    monkeypatch.setattr(od, "table_3_12", table_3_12)
    for _ in range(2):  # trained once
        assert outcome(od, *flags, "table3.13", "--images", "4") == (0, "")
    assert len(made) == 1 and Path(made[0][1]).name == "at_gen.py"
    assert made[0][2:6] == ["--only", "figure2.7", "--dataset", "celebahq"]
    assert {"--budget", "smoke", str(tmp_path), str(pictures)} <= set(made[0])
    assert kept["eps"] == 7 * 16 / 256 and kept["test"].name == "celebahq" and kept["test"].shape == (3, 16, 16)
    assert list(kept["sets"]) == ["imagenet", "afhq_cat", "noise", "smooth noise", "single colours"]
    (detector,) = kept["detectors"].values()
    state = common.read_checkpoint(tmp_path / "at_gen-celebahq" / "f.pt")["f"]
    assert all(torch.equal(state[key], there) for key, there in detector.net.state_dict().items())
    assert not detector.net.training and detector.score is od.logit
    rows = json.loads((tmp_path / "ood_detect-celebahq" / "results.json").read_text())["table3.13"]["rows"]
    assert {"AUROC imagenet, AT generative model", "worst-case AUROC afhq_cat, AT generative model"} <= {r["quantity"] for r in rows}
    code, err = outcome(od, *flags, "table3.12")
    assert code == 2 and "table3.13" in err
    code, err = outcome(od, *flags[2:], "table3.13", "--dataset", "lsun_church")  # no such folder: nothing is trained
    assert code == 2 and "lsun_church" in err and len(made) == 1


@pytest.mark.parametrize("flags, says", [
    (("--only", "table3.13"), "table3.13"),
    (("--augment", "auto"), "--augment"), (("--augment", "flip"), "--augment"), (("--p0", "letters:0"), "--p0"),
    (("--p0", "nothing"), "nothing"), (("--eps", "0"), "--eps"), (("--images", "1"), "--images"), (("--batch", "0"), "--batch"),
    (("--steps-out", "-1"), "--steps-out"), (("--iterations", "1"), "--iterations"), (("--eps-in", "0"), "--eps-in")])
def test_bad_input_is_one_line(tmp_path, outcome, flags, says):
    code, err = outcome(od, "--budget", "smoke", "--out", tmp_path / "out", "--device", "cpu", *flags)
    assert code == 2 and says in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
