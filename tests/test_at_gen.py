"""at_gen.py: networks, attack, objective, training, metrics, what each experiment asks for, and the script as a whole."""
import contextlib
import csv
import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import at_gen
import common
from at_gen import Distance, Selection, at_loss, batch_auroc, frechet_distance, inception_score, pgd_attack
from at_gen import r1_penalty, train_f
from common import Images, load_images

SMOKE = at_gen.SETTINGS["glyphs", "smoke"]


class Linear(nn.Module):
    """f(x) = <w, x>, so that the attack has a closed form."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x):
        return (x * self.w).flatten(1).sum(1, keepdim=True)


class Watched(nn.Module):
    """A network that records the range of its inputs and its training flag at every call."""

    def __init__(self, net):
        super().__init__()
        self.net, self.seen, self.modes = net, [], []

    def forward(self, x):
        self.seen.append((x.min().item(), x.max().item()))
        self.modes.append(self.training)
        return self.net(x)


class Killed(BaseException):
    """What ends a training from outside."""


def small_net():
    return at_gen.PlainCNN(4, 1, 28)


def smooth_net():
    """A small f with a curvature, which R1 needs."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.Softplus(), nn.Linear(8, 1))


@pytest.fixture(scope="module")
def glyphs():
    return load_images("glyphs")


@pytest.fixture(scope="module")
def letters():
    return load_images("letters")


def begin(folder, *flags):
    """A run of the smoke budget with these flags, and its settings."""
    argv = ["--budget", "smoke", "--out", folder, "--device", "cpu", *flags]
    args = at_gen.get_args(argv)
    return common.Run("at_gen", args), args.settings


def log_of(run):
    """The rows of f's log."""
    return common.read_checkpoint(run.folder / "f.pt")["rows"]


def no_seconds(rows):
    return [{key: number for key, number in row.items() if key != "seconds"} for row in rows]


# --- the networks ---


def test_residual_d_is_that_of_table_2_2():
    assert sum(p.numel() for p in at_gen.ResBlockD(256).parameters()) == 20_851_777
    f = at_gen.ResBlockD(16)
    assert f(torch.rand(2, 3, 16, 16)).shape == (2, 1)
    mean, std = torch.tensor(common.IMAGENET[0]), torch.tensor(common.IMAGENET[1])
    seen = []
    f.body[0].register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    f((mean + std).view(1, 3, 1, 1).expand(1, 3, 16, 16))
    assert torch.allclose(seen[0], torch.ones(1, 3, 16, 16), atol=1e-5)


def test_residual_block_keeps_a_constant_with_its_scale():
    block = at_gen.ResBlk(3, 3)
    for convolution in (block.main[1], block.main[4]):
        nn.init.zeros_(convolution.weight)
        nn.init.zeros_(convolution.bias)
    x = torch.rand(2, 3, 8, 8)
    assert torch.allclose(block(x), F.avg_pool2d(x, 2) / math.sqrt(2))


def test_residual_block_by_hand(exact):
    block, x = at_gen.ResBlk(3, 5), torch.randn(2, 3, 8, 8)
    y = F.avg_pool2d(block.main[1](F.leaky_relu(x, 0.2)), 2)
    y = block.main[4](F.leaky_relu(y, 0.2))
    assert torch.allclose(block(x), (y + F.avg_pool2d(block.shortcut[0](x), 2)) / 2**0.5, atol=1e-6)


def test_layers_of_the_networks():
    leaky = [nn.Conv2d, nn.LeakyReLU]
    assert [type(layer) for layer in at_gen.PlainCNN(4, 1, 28).body] == 5 * leaky
    with torch.device("meta"):
        for side, stem, blocks in ((256, 64, 6), (64, 256, 4), (16, 512, 2)):
            body = at_gen.ResBlockD(side).body
            assert body[0].out_channels == stem
            assert [type(layer) for layer in body] == [
                nn.Conv2d, *blocks * [at_gen.ResBlk], nn.LeakyReLU, *leaky, nn.Flatten]
        s = at_gen.SETTINGS["glyphs", "quick"]
        assert at_gen.build_f(dataclasses.replace(s, width=0.5), (1, 28, 28)).body[0].out_channels == 16
        narrow = at_gen.build_f(dataclasses.replace(s, net="resnet18", width=0.25), (3, 32, 32))
        assert narrow.head.in_features == 128


def test_plain_network_has_one_logit_and_sees_minus_1_to_1():
    f, seen = small_net(), []
    f.body.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    assert f(torch.rand(3, 1, 28, 28)).shape == (3, 1)
    assert seen[0].min() < -0.9 and seen[0].max() > 0.9


@pytest.mark.parametrize("dataset, budget", list(at_gen.SETTINGS))
def test_each_column_has_a_network_for_its_images(dataset, budget):
    s = at_gen.SETTINGS[dataset, budget]
    shape = (1 if dataset in ("glyphs", "mnist", "fashion_mnist") else 3, s.side, s.side)
    with torch.device("meta"):
        assert at_gen.build_f(dataclasses.replace(s, width=0.25), (shape[0], 32, 32)) is not None
    assert s.side == common.IN_MEMORY.get(dataset, (0, s.side, 0))[1]


# --- the attack ---


def test_attack_closed_form(exact):
    w = torch.randn(1, 1, 6, 6)
    x = torch.full((3, 1, 6, 6), 0.5)
    unit = w / w.norm()
    assert torch.allclose(pgd_attack(Linear(w), x, 7, 0.05), x + 0.35 * unit, atol=1e-6)
    assert torch.allclose(pgd_attack(Linear(w), x, 7, -0.05), x - 0.35 * unit, atol=1e-6)


def test_attack_rises_and_falls():
    f, x = small_net(), torch.rand(8, 1, 28, 28)
    up, down = pgd_attack(f, x, 5, 0.5), pgd_attack(f, x, 5, -0.5)
    assert (f(up) > f(x)).all() and (f(down) < f(x)).all()


def test_attack_stays_in_the_ball_and_reaches_it(exact):
    x = torch.rand(6, 1, 28, 28) * 0.2 + 0.4
    moved = (pgd_attack(small_net(), x, 10, 0.2, eps=0.7) - x).flatten(1).norm(dim=1)
    assert (moved <= 0.7 + 1e-5).all() and (moved > 0.69).all()
    unmoved = pgd_attack(small_net(), x, 3, 0.2, eps=0.0)
    assert torch.allclose(unmoved, x, atol=1e-6)


def test_attack_clamps_every_step():
    f = Watched(Linear(torch.ones(1, 1, 4, 4)))
    out = pgd_attack(f, torch.full((2, 1, 4, 4), 0.9), 6, 1.0)
    assert max(high for _, high in f.seen) <= 1.0
    assert torch.equal(out, torch.ones_like(out))


def test_zero_gradient_moves_nothing():
    x = torch.rand(4, 1, 5, 5)
    assert torch.equal(pgd_attack(Linear(torch.zeros(1, 1, 5, 5)), x, 5, 0.5), x)


def test_each_image_has_its_own_path(exact):
    """Neither the batch around an image nor the scale of its gradient changes its path."""
    f = small_net()
    x = torch.rand(5, 1, 28, 28)
    together = pgd_attack(f, x, 4, 0.3)
    alone = torch.cat([pgd_attack(f, one, 4, 0.3) for one in x.split(1)])
    assert torch.allclose(together, alone, atol=1e-4)

    class Scaled(nn.Module):
        def forward(self, x):
            return 1000 * f(x)

    assert torch.allclose(pgd_attack(Scaled(), x, 4, 0.3), together, atol=1e-4)


def test_attack_leaves_grad_and_mode_alone():
    f = Watched(small_net()).train()
    x = torch.rand(2, 1, 28, 28)
    out = pgd_attack(f, x, 3, 0.1)
    assert all(p.grad is None for p in f.parameters()) and not out.requires_grad and not x.requires_grad
    assert f.training and not any(f.modes)
    f.eval()
    pgd_attack(f, x, 1, 0.1)
    assert not f.training


def test_no_steps_return_the_images():
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(pgd_attack(small_net(), x, 0, 0.5), x)


@pytest.mark.parametrize("extreme", [-0.1, 1.1])
def test_attack_refuses_images_outside_the_range(extreme):
    x = torch.rand(1, 1, 28, 28)
    x[0, 0, 3, 3] = extreme
    with pytest.raises(ValueError):
        pgd_attack(small_net(), x, 1, 0.1)


@pytest.mark.parametrize("eps", [0.5, 2.0])
def test_attack_against_torchattacks(exact, eps):
    torchattacks = pytest.importorskip("torchattacks")
    f = small_net().eval()

    class TwoLogits(nn.Module):  # cross-entropy against class 0 of (0, f) ascends f
        def __init__(self):
            super().__init__()
            self.f = f

        def forward(self, x):
            return torch.cat([torch.zeros(len(x), 1), self.f(x)], 1)

    x = torch.rand(6, 1, 28, 28)
    oracle = torchattacks.PGDL2(TwoLogits().eval(), eps=eps, alpha=0.2, steps=8, random_start=False)
    theirs = oracle(x, torch.zeros(6, dtype=torch.long))
    assert (theirs - x).abs().max() > 0.01
    assert torch.allclose(pgd_attack(f, x, 8, 0.2, eps=eps), theirs, atol=1e-4)


def test_fast_path_agrees_with_the_plain_one(monkeypatch):
    """bfloat16 changes a path by rounding only."""
    f, x = small_net(), torch.rand(8, 1, 28, 28)
    paths = []
    for context in (torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False)):
        monkeypatch.setattr(at_gen, "fast_precision", lambda device, context=context: context)
        paths.append((pgd_attack(f, x, 4, 0.3) - x).flatten(1))
    assert F.cosine_similarity(*paths).min() > 0.98
    assert not torch.equal(*paths)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_attack_on_a_gpu_agrees_with_the_cpu(exact):
    f, x = small_net(), torch.rand(8, 1, 28, 28)
    here = pgd_attack(f, x, 4, 0.3)
    assert torch.allclose(pgd_attack(f.cuda(), x.cuda(), 4, 0.3).cpu(), here, atol=1e-3)


# --- the objective ---


def test_loss_is_the_mean_of_2m_cross_entropies():
    a, b = torch.randn(5), torch.randn(5)
    bce = F.binary_cross_entropy_with_logits(torch.cat([a, b]), torch.cat([torch.ones(5), torch.zeros(5)]))
    assert torch.allclose(at_loss(a, b), bce)
    assert math.isclose(at_loss(torch.zeros(3), torch.zeros(3)).item(), math.log(2), rel_tol=1e-6)


def test_loss_gradient_is_eq_2_18():
    a, b = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    ga, gb = torch.autograd.grad(at_loss(a, b), (a, b))
    assert torch.allclose(ga, -(1 - a.sigmoid()) / 8) and torch.allclose(gb, b.sigmoid() / 8)


def test_r1_by_hand():
    """f = <w, x> + 2 |x|^2 has gradient w + 4 x."""
    x, w = torch.rand(3, 1, 2, 2, requires_grad=True), torch.randn(1, 2, 2)
    f = (w * x).flatten(1).sum(1) + 2 * x.pow(2).flatten(1).sum(1)
    expected = (w + 4 * x).pow(2).flatten(1).sum(1).mean() / 2
    assert torch.allclose(r1_penalty(f, x), expected)
    assert r1_penalty(f, x).requires_grad


# --- metrics ---


def test_auroc_of_a_batch_counts_ties_half():
    assert batch_auroc(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])) == 1.0
    assert batch_auroc(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])) == 0.0
    assert batch_auroc(torch.zeros(7), torch.zeros(5)) == 0.5
    assert batch_auroc(torch.tensor([1.0, 0.0]), torch.tensor([0.0])) == 0.75
    assert isinstance(batch_auroc(torch.zeros(2), torch.zeros(2)), torch.Tensor)


def test_auroc_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    a, b = (torch.randn(300) + 0.5).round(decimals=1), torch.randn(200).round(decimals=1)
    theirs = metrics.roc_auc_score([1] * 300 + [0] * 200, torch.cat([a, b]).numpy())
    assert math.isclose(batch_auroc(a, b).item(), theirs, abs_tol=1e-6)


def test_frechet_distance_of_diagonal_gaussians():
    m1, m2 = torch.randn(6).double(), torch.randn(6).double()
    s1, s2 = torch.rand(6).double() + 0.1, torch.rand(6).double() + 0.1
    expected = ((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum()
    ours = frechet_distance(m1, torch.diag(s1**2), m2, torch.diag(s2**2))
    assert math.isclose(ours, expected.item(), rel_tol=1e-9)


@pytest.mark.parametrize("n", [200, 20])  # 20 samples in 32 dimensions: covariance without full rank
def test_frechet_distance_against_torch_fidelity(n):
    metric = pytest.importorskip("torch_fidelity.metric_fid")
    a, b = torch.randn(n, 32).double(), (torch.randn(n, 32) * 1.5 + 0.3).double()
    statistics = [{"mu": z.mean(0).numpy(), "sigma": torch.cov(z.T).numpy()} for z in (a, b)]
    theirs = metric.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    ours = frechet_distance(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))
    assert math.isclose(ours, theirs, rel_tol=1e-4)


def test_inception_score_bounds():
    assert math.isclose(inception_score(torch.zeros(50, 10)), 1.0, abs_tol=1e-9)
    assert math.isclose(inception_score(torch.eye(10).repeat(5, 1) * 100), 10.0, rel_tol=1e-6)


class Pooled(nn.Module):
    """A feature network: four numbers an image."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 10)

    def features(self, x):
        return F.adaptive_avg_pool2d(x.mean(1, keepdim=True), 2).flatten(1)


def test_distance_compares_with_its_reference(letters, glyphs):
    reference = Selection(glyphs, torch.arange(590), 32, "cpu")
    other = Selection(letters, torch.arange(50), 32, "cpu")
    distance = Distance("FD-cls", Pooled(), reference)
    z = [Pooled().features(images.take(slice(0, n))).double() for images, n in ((glyphs, 590), (letters, 50))]
    expected = frechet_distance(z[0].mean(0), torch.cov(z[0].T), z[1].mean(0), torch.cov(z[1].T))
    assert math.isclose(distance(other.slices()), expected, rel_tol=1e-5)
    assert abs(distance(reference.slices())) < 1e-6


# --- images ---


def test_selection_gives_its_images_slice_by_slice(glyphs):
    chosen = Selection(glyphs, torch.tensor([5, 2, 9, 7, 1]), 2, "cpu")
    assert [len(x) for x in chosen.slices()] == [2, 2, 1]
    assert torch.equal(torch.cat(list(chosen.slices())), glyphs.take(torch.tensor([5, 2, 9, 7, 1])))
    assert torch.equal(torch.cat(list(chosen.slices(3))), glyphs.take(torch.tensor([5, 2, 9])))
    assert torch.equal(chosen.first(2), glyphs.take(torch.tensor([5, 2])))


def test_p0_of_the_first_classes():
    args = SimpleNamespace(data_dir="data", device="cpu")
    few = at_gen.load_p0(args, (1, 28, 28), "letters:4")
    every = load_images("letters")
    assert few.y.unique().tolist() == [0, 1, 2, 3] and torch.equal(few.x, every.x[every.y < 4])
    assert at_gen.load_p0(args, (1, 28, 28), "letters:4", "test").y.unique().tolist() == [0, 1, 2, 3]
    held_out = at_gen.load_p0(args, (3, 16, 16), "letters", "test")
    assert held_out.x.shape[1:] == (3, 16, 16) and len(held_out) == 2000


def test_seeds_are_of_the_test_split_where_it_is_large_enough():
    p0, p0_test = ["train"] * 50, ["test"] * 20
    pool, index = at_gen.choose_seeds(dataclasses.replace(SMOKE, images=20), p0, p0_test)
    assert pool is p0_test and sorted(index.tolist()) == list(range(20))
    pool, index = at_gen.choose_seeds(dataclasses.replace(SMOKE, images=21), p0, p0_test)
    assert pool is p0 and torch.equal(index, common.shuffled(50, 0)[:21])  # not the first class alone


# --- training ---


def by_hand(data, p0, s, seed):
    """Algorithm 3 with finite eps and R1, written out -> f."""

    def attack(x0, steps, step, eps):
        x = x0.clone()
        for _ in range(steps):
            x.requires_grad_(True)
            (g,) = torch.autograd.grad(f(x).sum(), x)
            moved = x.detach() + step * g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1) - x0
            length = moved.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            x = (x0 + moved * (eps / length).clamp(max=1)).clamp(0, 1)
        return x

    torch.manual_seed(seed)
    f = smooth_net()
    optimizer = torch.optim.Adam(f.parameters(), s.lr, betas=(0.0, 0.99))
    stream = common.batches(data, s.batch, seed)
    stream_p0 = common.batches(p0, s.batch, seed + 10**6)
    for K in range(s.k_min, s.k_max + 1):
        for _ in range(s.iters_per_k):
            x_adv = attack(next(stream_p0)[0], K, s.step, s.eps)
            x = next(stream)[0].requires_grad_(True)
            f_data = f(x)[:, 0]
            labels = torch.cat([torch.ones(s.batch), torch.zeros(s.batch)])
            loss = F.binary_cross_entropy_with_logits(torch.cat([f_data, f(x_adv)[:, 0]]), labels)
            (g,) = torch.autograd.grad(f_data.sum(), x, create_graph=True)
            optimizer.zero_grad()
            (loss + s.r1 / 2 * g.pow(2).flatten(1).sum(1).mean()).backward()
            optimizer.step()
    return f


@pytest.mark.parametrize("flags", [("--eps", 0.5), ("--r1", 30), ("--k-min", 2)])
def test_updates_are_those_of_algorithm_3(tmp_path, monkeypatch, exact, glyphs, letters, flags):
    monkeypatch.setattr(at_gen, "build_f", lambda s, shape: smooth_net())
    run, s = begin(tmp_path, "--k-max", 3, "--iters-per-k", 2, "--batch", 6, "--lr", 0.002, "--seed", 3, *flags)
    f = train_f(run, s, "f", glyphs, letters)
    rows = log_of(run)
    expected = by_hand(glyphs, letters, s, 3)
    for mine, theirs in zip(f.parameters(), expected.parameters()):
        assert (mine - theirs).abs().max() < 2e-4
        assert (mine - theirs).abs().mean() < 2e-6
    assert not any(p.requires_grad for p in f.parameters()) and not f.training


def test_attacks_in_training_have_trainings_steps(tmp_path, monkeypatch, glyphs, letters):
    """K runs from k_min to k_max inclusive, by --step and --eps; data are left as they are."""
    calls, real = [], at_gen.pgd_attack

    def recorded(f, x, steps, step, eps=math.inf):
        calls.append((steps, step, eps))
        return real(f, x, steps, step, eps)

    monkeypatch.setattr(at_gen, "pgd_attack", recorded)
    run, s = begin(tmp_path, "--k-max", 3, "--step", 0.7, "--eps", 1.5)
    train_f(run, s, "f", glyphs, letters)
    rows = log_of(run)
    assert calls == [(K, 0.7, 1.5) for K in (0, 0, 1, 1, 2, 2, 3, 3)]
    assert [row["K"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert rows[0]["moved"] == 0 and all(0 < row["moved"] <= 1.0001 for row in rows[2:])


def test_each_side_has_its_own_stream_and_augmentation(tmp_path, monkeypatch, glyphs, letters):
    streams, real = [], at_gen.batches

    def recorded(images, size, seed, start, augment, device):
        streams.append((images, size, seed, start, augment))
        return real(images, size, seed, start, augment, device)

    monkeypatch.setattr(at_gen, "batches", recorded)
    run, s = begin(tmp_path, "--seed", 8, "--augment", "crop_flip", "--k-max", 0)
    train_f(run, s, "f", glyphs, letters)
    run, s = begin(tmp_path / "other", "--augment-p0", "crop_flip", "--k-max", 0)
    train_f(run, s, "f", glyphs, letters)
    assert streams == [(glyphs, 4, 8, 0, "crop_flip"), (letters, 4, 1_000_008, 0, "none"),
                       (glyphs, 4, 0, 0, "none"), (letters, 4, 1_000_000, 0, "crop_flip")]


def test_the_log_measures_in_every_second_line(tmp_path, monkeypatch, glyphs, letters):
    run, s = begin(tmp_path, "--k-max", 4, "--iters-per-k", 9)  # 45 updates, 22 lines
    asked = []

    def measure(f):
        asked.append(f.training)
        return float(len(asked))

    train_f(run, s, "f", glyphs, letters, measure)
    rows = log_of(run)
    measured = {row["it"]: row["fd"] for row in rows if "fd" in row}
    assert list(measured) == [4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 45]
    assert list(measured.values()) == [float(i) for i in range(1, 13)]


def test_the_log_shows_logits_and_their_auroc(tmp_path, monkeypatch, exact, glyphs, letters):
    monkeypatch.setattr(at_gen, "build_f", lambda s, shape: smooth_net())
    run, s = begin(tmp_path, "--k-max", 0, "--iters-per-k", 1, "--batch", 30, "--r1", 10)
    torch.manual_seed(run.seed)
    f = smooth_net()
    train_f(run, s, "f", glyphs, letters)
    (row,) = log_of(run)
    with torch.no_grad():
        f_data = f(next(common.batches(glyphs, 30, 0))[0])[:, 0]
        f_adv = f(next(common.batches(letters, 30, 10**6))[0])[:, 0]
    assert math.isclose(row["f_data"], f_data.mean().item(), rel_tol=1e-3)
    assert math.isclose(row["f_adv"], f_adv.mean().item(), rel_tol=1e-3)
    assert math.isclose(row["loss"], at_loss(f_data, f_adv).item(), rel_tol=1e-3)
    assert math.isclose(row["auc_adv"], (f_data[:, None] > f_adv).float().mean().item(), abs_tol=2e-3)
    x = next(common.batches(glyphs, 30, 0))[0].requires_grad_(True)
    (slope,) = torch.autograd.grad(f(x).sum(), x)
    assert math.isclose(row["r1"], slope.square().sum((1, 2, 3)).mean().item() / 2, rel_tol=1e-3)


def test_the_log_counts_how_far_attacks_moved(tmp_path, monkeypatch, glyphs, letters):
    """All pixels by .01, of K * step = 2 * .3; and measuring takes no time of the training."""
    monkeypatch.setattr(at_gen, "pgd_attack", lambda f, x, steps, *_: x + 0.01 if steps else x)
    run, s = begin(tmp_path, "--k-min", 2, "--k-max", 2, "--iters-per-k", 1, "--step", 0.3)
    inside = []
    real = common.Training.pause

    @contextlib.contextmanager
    def pause(self):
        inside.append("pause")
        with real(self):
            yield
        inside.append("go on")
    monkeypatch.setattr(common.Training, "pause", pause)
    train_f(run, s, "f", glyphs, letters, measure=lambda f: inside.append("measure") or 1.0)
    rows = log_of(run)
    assert math.isclose(rows[-1]["moved"], 0.28 / 0.6, rel_tol=1e-3)
    assert inside == ["pause", "measure", "go on"]


def test_attack_and_update_see_the_same_function(tmp_path, write_npz):
    """A BatchNorm is in eval mode in every forward, and its statistics stay mean 0, variance 1."""
    folder, modes = write_npz("cifar10"), []
    hook = nn.modules.module.register_module_forward_hook(
        lambda m, i, o: modes.append(m.training) if isinstance(m, nn.BatchNorm2d) else None)
    try:
        data = load_images("cifar10", "train", folder)
        run, s = begin(tmp_path, "--data-dir", folder, "--dataset", "cifar10", "--width", 0.0625)
        f = train_f(run, s, "f", data, data)
    finally:
        hook.remove()
    norms = [m for m in f.modules() if isinstance(m, nn.BatchNorm2d)]
    assert modes and not any(modes) and norms
    assert all(m.running_mean.abs().max() == 0 and (m.running_var == 1).all() for m in norms)
    assert any((m.weight != 1).any() for m in norms)


def test_interrupted_training_goes_on_bit_exactly(tmp_path, monkeypatch, glyphs, letters):
    flags = ("--k-max", 2, "--iters-per-k", 4, "--batch", 6)
    run, s = begin(tmp_path / "whole", *flags)
    f = train_f(run, s, "f", glyphs, letters, lambda f: 1.0)
    rows = log_of(run)
    monkeypatch.setattr(common.Training, "SAVE_SECONDS", -1)
    real, count = at_gen.at_loss, []

    def dies(a, b):
        count.append(1)
        if len(count) == 8:
            raise Killed
        return real(a, b)

    monkeypatch.setattr(at_gen, "at_loss", dies)
    run, s = begin(tmp_path / "torn", *flags)
    with pytest.raises(Killed):
        train_f(run, s, "f", glyphs, letters, lambda f: 1.0)
    torch.rand(1000)  # whatever happened to the generators in between must not matter
    g = train_f(run, s, "f", glyphs, letters, lambda f: 1.0)
    resumed = log_of(run)
    assert len(count) == 8 + 12 - 7 and all(torch.equal(p, q) for p, q in zip(f.parameters(), g.parameters()))
    assert no_seconds(rows) == no_seconds(resumed)
    with open(run.folder / "log-f.csv") as file:
        assert [int(row["it"]) for row in csv.DictReader(file)] == [row["it"] for row in rows]


def test_finished_training_is_not_repeated(tmp_path, monkeypatch, glyphs, letters):
    run, s = begin(tmp_path)
    f = train_f(run, s, "f", glyphs, letters)
    rows = log_of(run)
    monkeypatch.setattr(at_gen, "pgd_attack", None)  # calling it now would fail
    g = train_f(run, s, "f", glyphs, letters)
    again = log_of(run)
    assert all(torch.equal(p, q) for p, q in zip(f.parameters(), g.parameters())) and rows == again


@pytest.mark.parametrize("flags", [("--lr", 0.001), ("--k-min", 1), ("--k-max", 3), ("--step", 2), ("--eps", 3), ("--r1", 1),
                                   ("--batch", 5), ("--iters-per-k", 3), ("--width", 0.25),
                                   ("--augment", "crop_flip"), ("--augment-p0", "crop")])
def test_other_settings_do_not_reuse_a_checkpoint(tmp_path, glyphs, letters, flags):
    run, s = begin(tmp_path)
    train_f(run, s, "f", glyphs, letters)
    run, s = begin(tmp_path, *flags)
    with pytest.raises(common.UserError):
        train_f(run, s, "f", glyphs, letters)
    run, s = begin(tmp_path, "--sample-steps", 9)  # not a setting of training
    train_f(run, s, "f", glyphs, letters)


def test_a_checkpoint_knows_its_images(tmp_path, glyphs, letters):
    run, s = begin(tmp_path)
    train_f(run, s, "f", glyphs, letters)
    fewer = Images(letters.x[:500], letters.y[:500], "letters")
    for changed in ((fewer, letters), (glyphs, fewer)):
        with pytest.raises(common.UserError):
            train_f(run, s, "f", *changed)


def test_divergence_stops_with_advice(tmp_path, glyphs, letters):
    run, s = begin(tmp_path, "--lr", 1e4, "--iters-per-k", 30)
    with pytest.raises(common.Diverged) as caught:
        train_f(run, s, "f", glyphs, letters)
    assert caught.value.rows and "--lr" in str(caught.value)


@pytest.mark.parametrize("level", [2e4, -2e4])
def test_logits_that_ran_away_stop_the_training(tmp_path, monkeypatch, glyphs, letters, level):
    class Far(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return level * self.w + x.flatten(1).sum(1, keepdim=True)
    monkeypatch.setattr(at_gen, "build_f", lambda s, shape: Far())
    run, s = begin(tmp_path)
    with pytest.raises(common.Diverged):
        train_f(run, s, "f", glyphs, letters)


def test_training_separates_data_from_attacked_p0(tmp_path, glyphs, letters):
    """The direction of the whole: after short training f is higher on data than on p0, and samples climb."""
    run, s = begin(tmp_path, "--k-max", 1, "--iters-per-k", 30, "--batch", 24, "--width", 0.5)
    f = train_f(run, s, "f", glyphs, letters)
    x, x0 = glyphs.take(slice(0, 200)), letters.take(slice(0, 200))
    assert batch_auroc(f(x)[:, 0], f(x0)[:, 0]) > 0.8
    assert (f(pgd_attack(f, x0[:24], 6, 1.0)) > f(x0[:24])).all()


# --- what the experiments ask for ---


class Recorder:
    """Stands for learn: remembers what it was asked to train; each training has its own f and log."""

    def __init__(self):
        self.asked = []

    def __call__(self, s, name, **options):
        self.asked.append((s, name, options))
        return f"f{len(self.asked)}"


@pytest.fixture
def attacks(monkeypatch):
    """Every attack is recorded as (f, number of images, steps, step, eps); images are tagged, not changed."""
    calls = []

    def recorded(f, x, steps, step, eps=math.inf):
        calls.append((f, len(x), steps, step, eps))
        return x

    monkeypatch.setattr(at_gen, "pgd_attack", recorded)
    return calls


def fake_run():
    drawn = {}
    return SimpleNamespace(drawn=drawn, pictures=lambda name, rows, columns: drawn.update({name: rows}),
                           lines=lambda name, rows, x, **settings: drawn.update({name: (rows, x)}))


def seeds_of(letters, n=24):
    return Selection(letters, torch.arange(n), 10, "cpu")


def distance_by_net(monkeypatch):
    """Distance of samples that depends on the network alone."""
    monkeypatch.setattr(at_gen, "distance_of_samples", lambda s, distance, seeds, f: f"distance of {f}")  # of all samples
    return SimpleNamespace(name="FD-cls")


S = dataclasses.replace(SMOKE, k_max=8, iters_per_k=5, step=0.5, sample_steps=6, sample_step=0.9, images=24)


def test_samples_are_made_with_the_steps_of_sampling(attacks, letters):
    given = at_gen.distance_of_samples(S, list, seeds_of(letters), "f", 15)
    assert attacks == [("f", 10, 6, 0.9, math.inf), ("f", 5, 6, 0.9, math.inf)]
    assert torch.equal(torch.cat(given), letters.take(slice(0, 15)))
    assert len(torch.cat(at_gen.distance_of_samples(S, list, seeds_of(letters), "f"))) == 24


def test_table_2_5_measures_p0_samples_and_held_out_data(monkeypatch, letters, glyphs):
    """The attack moves samples to the data, so theirs is the smaller distance; the accuracy is the network's."""
    net = Pooled()
    net.head.weight.data.zero_()  # says the same of everything
    monkeypatch.setattr(at_gen, "pgd_attack", lambda f, x, steps, step: (x - 0.04 * steps * step).clamp(0, 1))
    reference = Selection(glyphs, torch.arange(100), 32, "cpu")
    held_out = Selection(load_images("glyphs", "test"), torch.arange(50), 32, "cpu")
    floor = Selection(glyphs, torch.arange(200, 230), 32, "cpu")
    distance, seeds = Distance("FD-cls", net, reference), seeds_of(letters)
    rows = at_gen.table_2_5(S, distance, "f", seeds, held_out, floor)
    found = {row["quantity"]: row for row in rows}
    moved = [(x - 0.04 * 6 * 0.9).clamp(0, 1) for x in seeds.slices()]
    assert math.isclose(found["FD-cls p0"]["value"], distance(seeds.slices()))
    assert math.isclose(found["FD-cls samples"]["value"], distance(moved))
    assert math.isclose(found["FD-cls held-out data"]["value"], distance(held_out.slices()))
    share = found["FD-cls samples"]["value"] / found["FD-cls p0"]["value"]
    assert math.isclose(found["FD-cls samples / p0"]["value"], share)
    assert found["FD-cls p0"]["n"] == 24 and found["FD-cls held-out data"]["n"] == 50
    assert math.isclose(found["FD-cls other training data"]["value"], distance(floor.slices()))
    assert math.isclose(found["IS-cls p0"]["value"], 1)
    rows = at_gen.table_2_5(S, distance, "f", seeds, held_out, Selection(glyphs, torch.arange(0), 32, "cpu"))
    assert "FD-cls other training data" not in {row["quantity"] for row in rows}  # the reference has them all


def test_inception_scores_are_of_each_set_and_of_all_samples(monkeypatch, letters):
    net, asked, real = Pooled(), [], at_gen.samples
    net.head.weight.data *= 300
    monkeypatch.setattr(at_gen, "pgd_attack", lambda f, x, steps, step: 1 - x)
    monkeypatch.setattr(at_gen, "samples", lambda f, seeds, steps, step, n=None: asked.append(n) or real(f, seeds, steps, step, n))
    seeds = seeds_of(letters)
    distance = Distance("FID", net, seeds)
    rows = at_gen.table_2_5(S, distance, "f", seeds, seeds, seeds)
    rows = {row["quantity"]: row["value"] for row in rows}
    x = torch.cat(list(seeds.slices()))
    for title, images in (("p0", x), ("samples", 1 - x)):
        assert math.isclose(rows[f"IS {title}"], inception_score(net.head(net.features(images)).detach()), rel_tol=1e-4)
    assert abs(rows["IS p0"] - rows["IS samples"]) > 1e-3
    at_gen.table_2_11(S, distance, "f", seeds)
    at_gen.distance_of_samples(S, distance, seeds, "f")
    assert asked == [None] * 5


def test_published_numbers_of_updates():
    """Tab. 2.3, to one in ten thousand: each K has equally many."""
    for dataset, updates in (("cifar10", 172_000), ("celebahq", 218_000), ("afhq_cat", 225_000), ("lsun_church", 215_000)):
        assert at_gen.updates_of_all(at_gen.SETTINGS[dataset, "paper"]) == pytest.approx(updates, rel=1e-4)


def test_published_settings_of_sampling():
    """Tab. 2.4."""
    for dataset, steps, step in (("cifar10", 32, 0.2), ("celebahq", 20, 8), ("afhq_cat", 14, 8), ("lsun_church", 17, 8)):
        s = at_gen.SETTINGS[dataset, "paper"]
        assert (s.sample_steps, s.sample_step, s.images) == (steps, step, 50_000)


def test_table_2_10_takes_the_best_of_three(monkeypatch, letters):
    clock, lasting = [0.0], iter([50.0, 3.0, 2.0, 4.0])  # the first one warms up
    monkeypatch.setattr(at_gen.time, "time", lambda: clock[0])
    asked = []

    def attack(f, x, steps, step):
        asked.append((f, len(x), steps, step))
        clock[0] += next(lasting)
        return x

    monkeypatch.setattr(at_gen, "pgd_attack", attack)
    (row,) = at_gen.table_2_10(S, "f", seeds_of(letters, 60))
    assert row["value"] == 2.0 and row["steps"] == 6 and asked == [("f", 50, 6, 0.9)] * 4


def test_table_2_11_keeps_the_displacement(attacks, letters):
    class Counted:
        name = "FD-cls"

        def __call__(self, slices):
            return sum(len(x) for x in slices)

    rows = at_gen.table_2_11(S, Counted(), "f", seeds_of(letters, 10))
    assert [call[2] for call in attacks] == [12, 6, 3]
    assert all(math.isclose(call[2] * call[3], 5.4) for call in attacks)
    assert [(row["steps"], row["step"]) for row in rows] == [call[2:4] for call in attacks]
    titles = ["twice the steps", "the steps of Tab. 2.4", "half the steps"]
    assert [row["quantity"] for row in rows] == [f"FD-cls samples, {title}" for title in titles]


def test_figure_2_3_trains_with_each_p0(monkeypatch, attacks, letters):
    distance, learn, run = distance_by_net(monkeypatch), Recorder(), fake_run()
    rows = at_gen.figure_2_3(run, S, distance, "f", seeds_of(letters), learn, lambda name: f"images of {name}")
    assert [(s, options) for s, _, options in learn.asked] == [
        (S, {"p0": "images of letters:4"}), (S, {"p0": "images of noise"})]
    assert len({name for _, name, _ in learn.asked}) == 2
    assert [(row["quantity"].split()[-1], row["value"]) for row in rows] == [
        ("letters", "distance of f"), ("letters:4", "distance of f1"), ("noise", "distance of f2")]
    assert [call[0] for call in attacks] == ["f", "f1", "f2"]
    assert all(call[2:4] == (6, 0.9) for call in attacks) and len(run.drawn["figure2.3"]) == 4


def test_figure_2_7_shows_samples(attacks, letters, glyphs):
    f, run = Linear(torch.ones(1, 28, 28) / 784), fake_run()
    rows = at_gen.figure_2_7(run, S, f, seeds_of(letters), Selection(glyphs, torch.arange(60), 60, "cpu"))
    assert attacks == [(f, 24, 6, 0.9, math.inf)] and list(run.drawn["figure2.7"])[:2] == ["p0", "samples"]
    found = {row["quantity"]: row["value"] for row in rows}
    assert math.isclose(found["mean f of data"], glyphs.take(slice(0, 60)).mean().item(), rel_tol=1e-4)
    assert math.isclose(found["mean f of p0"], letters.take(slice(0, 24)).mean().item(), rel_tol=1e-4)

@pytest.mark.parametrize("net, dataset", [("plain", "glyphs"), ("resblock_d", "cifar10"), ("resnet18", "cifar10")])
def test_pretraining_hands_over_all_layers_but_the_last(tmp_path, monkeypatch, letters, net, dataset):
    shape = (1, 28, 28) if dataset == "glyphs" else (3, 32, 32)
    p0 = Images(letters.x[:, :, :shape[1], :shape[1]].expand(-1, shape[0], -1, -1), letters.y, "letters")
    if shape[1] == 32:
        p0 = load_images("letters", channels=3, side=32)
    asked = []

    def trained(run, name, build, data, iterations, augment):
        assert name == "pretrained-letters"
        asked.append((build().eval(), data, iterations, augment))
        return asked[0][0]

    monkeypatch.setattr(common, "train_classifier", trained)
    run, s = begin(tmp_path, "--net", net, "--pretrain", 7, "--augment-p0", "crop")
    f = at_gen.build_f(s, shape).eval()
    head = [p.clone() for p in f.head.parameters()]
    at_gen.pretrain(run, s, f, p0)
    (classifier, data, iterations, augment), = asked
    assert data is p0 and (iterations, augment) == (7, "crop")
    assert classifier(torch.rand(2, *shape)).shape == (2, 48) and f(torch.rand(2, *shape)).shape == (2, 1)
    state = f.state_dict()
    for name, tensor in classifier.state_dict().items():
        assert torch.equal(tensor, state[name]) != name.startswith("head") or tensor.shape != state[name].shape
    assert all(torch.equal(p, q) for p, q in zip(head, f.head.parameters()))


def test_training_begins_with_the_pretrained_layers(tmp_path, monkeypatch, glyphs, letters):
    asked = []
    monkeypatch.setattr(at_gen, "pretrain", lambda run, s, f, p0: asked.append((s.pretrain, p0)))
    for updates in (0, 5):
        run, s = begin(tmp_path / str(updates), "--pretrain", updates)
        train_f(run, s, "f", glyphs, letters)
    assert asked == [(5, letters)]


def test_pretraining_for_real(tmp_path, glyphs, letters):
    run, s = begin(tmp_path, "--pretrain", 3)
    f = train_f(run, s, "f", glyphs, letters)
    assert (run.folder / "pretrained-letters.pt").exists() and f(glyphs.take([0])).shape == (1, 1)
    run, s = begin(tmp_path)
    with pytest.raises(common.UserError):  # another f
        train_f(run, s, "f", glyphs, letters)


# --- restoration ---


def test_the_hole_is_in_the_middle():
    hole = at_gen.middle_hole(torch.zeros(2, 1, 28, 28))
    assert hole.shape == (28, 28) and hole.sum() == 100 and hole[9:19, 9:19].all()
    assert at_gen.middle_hole(torch.zeros(1, 3, 256, 256)).sum() == 96**2
    assert torch.equal(hole, hole.flip(0)) and torch.equal(hole, hole.T)


def test_known_pixels_are_written_back_after_every_step(monkeypatch):
    seen = []

    def attack(f, x, steps, step):
        seen.append((x.clone(), steps, step))
        return x + 0.1

    monkeypatch.setattr(at_gen, "pgd_attack", attack)
    x, hole = torch.rand(2, 1, 8, 8), torch.zeros(8, 8, dtype=torch.bool)
    hole[2:4, 2:4] = True
    filled = at_gen.inpaint_keeping("f", x, hole, 3, 0.7)
    assert torch.equal(filled[..., ~hole], x[..., ~hole]) and torch.allclose(filled[..., hole], x[..., hole] + 0.3)
    assert all(torch.equal(start[..., ~hole], x[..., ~hole]) for start, *_ in seen)
    assert [call[1:] for call in seen] == [(1, 0.7)] * 3


def test_ssim_of_simple_images():
    x = torch.rand(3, 1, 28, 28)
    assert torch.allclose(at_gen.ssim(x, x), torch.ones(3), atol=1e-4)
    a, b = torch.full((1, 3, 20, 20), 0.2), torch.full((1, 3, 20, 20), 0.6)  # only the luminance differs
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert math.isclose(at_gen.ssim(a, b).item(), expected, rel_tol=1e-3)
    assert at_gen.ssim(x, 1 - x).max() < 0


@pytest.mark.parametrize("channels, side", [(1, 28), (3, 32)])
def test_ssim_against_scikit_image(channels, side, glyphs):
    metrics = pytest.importorskip("skimage.metrics")
    x = F.interpolate(glyphs.take(slice(0, 4)), side).expand(-1, channels, -1, -1)
    y = (x + 0.1 * torch.randn(4, channels, side, side)).clamp(0, 1)
    for mine, a, b in zip(at_gen.ssim(x, y), x.double().numpy(), y.double().numpy()):
        theirs = metrics.structural_similarity(a, b, data_range=1, channel_axis=0, gaussian_weights=True, sigma=1.5,
                                               use_sample_covariance=False)
        assert math.isclose(mine.item(), theirs, abs_tol=2e-4)


def test_nearest_against_brute_force(glyphs, letters):
    reference = Selection(glyphs, torch.arange(100, 160), 25, "cpu")
    x = letters.take(slice(0, 7))
    hole = at_gen.middle_hole(x)
    for look in (torch.Tensor.float, lambda images: images[..., hole], Pooled().features):
        found, length = at_gen.nearest(x, reference, look)
        for i in range(7):
            distances = [(look(x[i:i + 1]) - look(glyphs.take([j]))).norm().item() for j in range(100, 160)]
            best = min(range(60), key=distances.__getitem__)
            assert torch.equal(found[i], glyphs.take([100 + best])[0])
            assert math.isclose(length[i].item(), distances[best], rel_tol=1e-3)


def test_table_2_7_restores_noisy_images(attacks, monkeypatch, glyphs):
    run, held_out = fake_run(), seeds_of(glyphs, 30)
    run.seed = 3
    s = dataclasses.replace(S, denoise_steps=4, restore_step=0.3)
    rows = at_gen.table_2_7(run, s, "f", held_out)
    assert [(call[0], call[1], call[2], call[3]) for call in attacks] == [("f", 30, n, 0.3) for n in (1, 2, 4, 8, 16)]
    noise = torch.randn(30, 1, 28, 28, generator=torch.Generator().manual_seed(3))
    noisy = (glyphs.take(slice(0, 30)) + 0.1 * noise).clamp(0, 1)
    drawn = run.drawn["figure2.13-denoising"]
    assert torch.equal(drawn["noisy"], noisy[:10]) and torch.equal(drawn["original"], glyphs.take(slice(0, 10)))
    before = at_gen.ssim(noisy, glyphs.take(slice(0, 30))).mean().item()
    assert math.isclose(rows[0]["value"], before, rel_tol=1e-5)
    assert {row["value"] for row in rows if "share" in row["quantity"]} == {0.0}  # nothing was moved
    monkeypatch.setattr(at_gen, "pgd_attack", lambda f, x, steps, step: glyphs.take(slice(0, 30)))
    rows = at_gen.table_2_7(run, s, "f", held_out)
    assert {row["value"] for row in rows if "share" in row["quantity"]} == {1.0}
    assert all(abs(row["value"] - 1) < 1e-3 for row in rows if row["quantity"] == "SSIM denoised")


def test_table_2_8_compares_with_three_neighbours(monkeypatch, glyphs):
    run, held_out = fake_run(), Selection(load_images("glyphs", "test"), torch.arange(20), 10, "cpu")
    reference, calls = Selection(glyphs, torch.arange(300), 100, "cpu"), []

    def attack(f, x, steps, step):
        calls.append((f, len(x), steps, step))
        return x * 0.9

    monkeypatch.setattr(at_gen, "pgd_attack", attack)
    s = dataclasses.replace(S, inpaint_steps=5, restore_step=0.3)
    rows = {row["quantity"]: row["value"] for row in at_gen.table_2_8(run, s, "f", held_out, reference)}
    assert calls == [("f", 20, 5, 0.3)] + [("f", 20, 1, 0.3)] * 5
    x, drawn = held_out.first(20), run.drawn["figure2.13-inpainting"]
    hole = at_gen.middle_hole(x)
    occluded = torch.where(hole, 0.5, x)
    patch, _ = at_gen.nearest(x, reference, lambda images: images[..., hole])
    expected = {"occluded": occluded, "recovered (ours)": occluded * 0.9,
                "recovered, known pixels kept": torch.where(hole, 0.5 * 0.9**5, x),
                "recovered (NN-patch)": torch.where(hole, patch, x),
                "recovered (NN-original image)": at_gen.nearest(x, reference, torch.Tensor.float)[0],
                "recovered (NN-occluded image)": at_gen.nearest(occluded, reference, torch.Tensor.float)[0]}
    assert list(drawn) == ["original", *expected]
    for title, images in expected.items():
        assert torch.allclose(drawn[title], images[:10])
        assert math.isclose(rows[f"SSIM {title}"], at_gen.ssim(images, x).mean().item(), rel_tol=1e-4)


def test_figure_2_9_blurs_the_seeds_alone(monkeypatch, letters):
    monkeypatch.setattr(at_gen, "pgd_attack", lambda f, x, steps, step: x)
    run, seeds = fake_run(), seeds_of(letters)
    distance = SimpleNamespace(name="FD-cls")
    monkeypatch.setattr(at_gen, "distance_of_samples", lambda s, distance, start, f: start.first(24).std().item())
    rows = at_gen.figure_2_9(run, S, distance, "f", seeds)
    drawn = run.drawn["figure2.9"]
    assert torch.equal(drawn["p0"], seeds.first(24)) and torch.equal(drawn["from blurred p0"], drawn["blurred p0"])
    sigma = 28 * 10 / 256
    dot = torch.zeros(1, 1, 28, 28)
    dot[..., 14, 14] = 1
    blurred = at_gen.gaussian_blur(dot, 9, sigma)[0, 0]  # 3 sigma on each side
    spread = ((torch.arange(28) - 14.0)**2 * blurred.sum(0)).sum().sqrt().item()
    assert abs(spread - sigma) < 0.05
    assert torch.allclose(drawn["blurred p0"], at_gen.gaussian_blur(seeds.first(24), 9, sigma), atol=1e-5)
    assert rows[0]["value"] > rows[1]["value"]


def test_figure_2_11_carries_p0_and_the_foreign_domain(attacks, monkeypatch, tmp_path, letters, glyphs):
    f, run = Linear(torch.ones(1, 28, 28) / 784), fake_run()
    run.folder = tmp_path
    foreign = Selection(glyphs, torch.arange(50, 80), 10, "cpu")
    rows = at_gen.figure_2_11(run, dataclasses.replace(S, foreign="glyphs"), f, seeds_of(letters), foreign)
    assert [call[2] for call in attacks] == [0, 1, 2, 3, 4, 6, 9, 12, 24] * 2
    assert {(call[1], call[3]) for call in attacks} == {(10, 0.9)}
    assert torch.equal(run.drawn["figure2.11-glyphs"]["0 steps of 0.9"], glyphs.take(slice(50, 60)))
    assert math.isclose(rows[0]["value"], letters.take(slice(0, 10)).mean().item(), rel_tol=1e-4)
    assert not list(tmp_path.iterdir())
    attacks.clear()
    at_gen.figure_2_11(run, dataclasses.replace(S, foreign="letters", p0="letters"), f, seeds_of(letters), foreign)
    assert len(attacks) == 9  # p0 is not shown twice
    monkeypatch.setattr(at_gen, "pgd_attack", lambda f, x, steps, step: x * 0.9**steps)
    at_gen.figure_2_11(run, dataclasses.replace(S, foreign="glyphs", gif=True), f, seeds_of(letters), foreign)
    from PIL import Image
    with Image.open(tmp_path / "figure2.11-glyphs.gif") as film:
        assert film.n_frames > 1 and film.size == (10 * 30 + 2, 32)


def test_figure_2_12_uses_each_model_for_its_own_domain(attacks, letters, glyphs):
    f, back, run, asked = Linear(torch.ones(1, 28, 28)), Linear(-torch.ones(1, 28, 28)), fake_run(), []

    def learn(s, name, **options):
        asked.append((s, name, options))
        return back

    foreign, held_out = seeds_of(letters), seeds_of(glyphs)
    rows = at_gen.figure_2_12(run, S, f, foreign, held_out, learn, lambda name: f"images of {name}")
    assert asked == [(S, "back", {"data": "images of letters", "p0": "images of symbols", "measure": None})]
    assert [(call[0], call[2], call[3]) for call in attacks] == [(f, 6, 0.9), (back, 6, 0.9)]
    assert torch.equal(run.drawn["figure2.12"]["letters"], foreign.first(24))
    assert torch.equal(run.drawn["figure2.12"]["data, translated"], held_out.first(24))
    assert rows[0]["value"] > 0 > rows[2]["value"]
    other = dataclasses.replace(S, foreign="fashion_mnist", p0="noise")
    at_gen.figure_2_12(run, other, f, foreign, held_out, learn, lambda name: name)
    assert asked[1][2]["p0"] == "noise"


def test_figure_2_15_searches_by_pixels_and_by_features(attacks, letters, glyphs):
    run, reference = fake_run(), Selection(glyphs, torch.arange(200), 64, "cpu")
    net = Pooled()
    distance = Distance("FD-cls", net, reference)
    held_out = Selection(glyphs, torch.arange(10, 40), 64, "cpu")  # part of the reference: distance 0
    rows = at_gen.figure_2_15(run, S, distance, "f", seeds_of(letters), held_out, reference)
    drawn = run.drawn["figure2.15"]
    for space, look in (("pixels", torch.Tensor.float), ("features", net.features)):
        found, length = at_gen.nearest(letters.take(slice(0, 24)), reference, look)
        assert torch.equal(drawn[f"nearest to samples, by {space}"], found[:15])
        row, = [row for row in rows if row["quantity"] == f"distance to the nearest, samples, {space}"]
        assert math.isclose(row["value"], length.mean().item(), rel_tol=1e-4)
    assert torch.equal(drawn["nearest to held-out data, by pixels"], drawn["held-out data"])
    assert attacks[0][:4] == ("f", 24, 6, 0.9)


def test_figure_2_16_ends_at_the_samples_of_its_seeds(monkeypatch, letters):
    monkeypatch.setattr(at_gen, "pgd_attack", lambda f, x, steps, step: x / (1 + steps * step))
    run = fake_run()
    (row,) = at_gen.figure_2_16(run, S, "f", seeds_of(letters))
    strips, seeds = run.drawn["figure2.16"], seeds_of(letters).first(12) / (1 + 6 * 0.9)
    assert len(strips) == 6
    for i, strip in enumerate(strips.values()):
        assert len(strip) == 9 and torch.equal(strip[0], seeds[i]) and torch.allclose(strip[-1], seeds[6 + i])
        assert torch.allclose(strip[4], (seeds[i] + seeds[6 + i]) / 2, atol=1e-5)
    assert math.isclose(row["value"], 1 / 8, rel_tol=1e-3)  # a straight line: all jumps are alike


# --- a user's own pictures ---


@pytest.fixture
def photos(tmp_path):
    from PIL import Image
    folder = tmp_path / "my photos"
    (folder / "more").mkdir(parents=True)
    pixels = torch.zeros(40, 60, 3, dtype=torch.uint8)
    pixels[:, :30] = 200  # light on the left
    lying = Image.fromarray(pixels.numpy())
    exif = lying.getexif()
    exif[274] = 6  # to be turned by 90 degrees: light at the top
    lying.save(folder / "lying.jpg", exif=exif, quality=95)
    Image.new("RGBA", (30, 30), (255, 0, 0, 0)).save(folder / "more" / "transparent.png")
    return folder


@pytest.mark.parametrize("task, hole", [("generate", 0.8), ("translate", 0.8), ("denoise", 0.8), ("inpaint", 0.5)])
def test_a_users_pictures_are_read_right_and_go_through_the_task(tmp_path, monkeypatch, outcome, photos, task, hole):
    from PIL import Image
    calls = []

    def attack(f, x, steps, step, eps=math.inf):
        calls.append((len(x), steps, step))
        return x

    monkeypatch.setattr(at_gen, "pgd_attack", attack)
    monkeypatch.setattr(at_gen, "train_f", lambda *given, **options: "f")
    monkeypatch.setattr(at_gen, "make_distance", lambda *given: list)
    out = tmp_path / "new" / "folder"
    assert outcome(at_gen, "--budget", "smoke", "--out", tmp_path / "runs", "--input", photos, "--task", task, "--output", out,
                   "--sample-steps", 7, "--denoise-steps", 5, "--inpaint-steps", 3, "--restore-step", 0.5) == (0, "")
    steps = {"generate": (1, 7, 1.0), "translate": (1, 7, 1.0), "denoise": (1, 5, 0.5), "inpaint": (1, 3, 0.5)}[task]
    assert calls == [steps] * 2
    names = sorted(file.name for file in out.iterdir())
    assert names == ["0000-lying.png", "0001-transparent.png"]
    lying = torch.from_numpy(__import__("numpy").asarray(Image.open(out / names[0])).copy()).float() / 255
    assert lying.shape == (28, 28) and lying[:8].min() > 0.7 and lying[-8:].max() < 0.1  # upright
    white = torch.from_numpy(__import__("numpy").asarray(Image.open(out / names[1])).copy()).float() / 255
    assert white[0].min() == 1 and white[14, 14] == (128 / 255 if task == "inpaint" else 1)  # .5, rounded: not cut off


def test_nothing_of_the_users_is_overwritten(tmp_path, outcome, photos):
    full, empty, torn = tmp_path / "full", tmp_path / "empty", tmp_path / "torn"
    for folder in (full, empty, torn):
        folder.mkdir()
    (full / "kept.txt").write_text("mine")
    (torn / "a.png").write_bytes(b"no picture")
    for source, output in ((photos, full), (empty, tmp_path / "o"), (torn, tmp_path / "o"), (tmp_path / "none", tmp_path / "o"),
                           (photos, full / "kept.txt")):
        code, said = outcome(at_gen, "--budget", "smoke", "--out", tmp_path / "runs", "--input", source, "--output", output)
        assert code == 2 and said.count("\n") == 1 and not (tmp_path / "runs").exists()
    assert [file.name for file in full.iterdir()] == ["kept.txt"]



# --- what main hands on ---


def handed_on(monkeypatch, folder, *flags):
    """The things that main gives to the experiments."""
    given = {}
    monkeypatch.setattr(common.Run, "experiments", lambda self, registry, **have: given.update(have, run=self))
    at_gen.main(["--budget", "smoke", "--out", folder, "--device", "cpu", *flags])
    return given


def test_main_separates_the_splits(monkeypatch, tmp_path, glyphs, letters):
    """Training and reference: training images. Samples: from test images of p0. Held out: test images."""
    monkeypatch.setattr(at_gen, "make_distance", lambda run, s, data, reference: (data, reference))
    given = handed_on(monkeypatch, tmp_path)
    assert torch.equal(given["seeds"].images.x, load_images("letters", "test").x)
    assert torch.equal(given["held_out"].images.x, load_images("glyphs", "test").x)
    data, reference = given["distance"]()
    assert torch.equal(data.x, glyphs.x) and torch.equal(reference.images.x, glyphs.x)
    assert torch.equal(reference.index, common.shuffled(len(glyphs), 6)[:64])   # not the first files, which may be of one class
    assert len(set(given["floor"].index.tolist()) & set(reference.index.tolist())) == 0 and len(given["seeds"].index) == len(given["held_out"].index) == 24
    given = handed_on(monkeypatch, tmp_path, "--images", 2001)
    assert torch.equal(given["seeds"].images.x, letters.x) and len(given["held_out"].index) == 2000


def test_main_trains_on_data_against_p0(monkeypatch, tmp_path, attacks, glyphs, letters):
    asked = []

    def trained(run, s, name, data, p0, measure, **options):
        asked.append((s, name, data, p0, measure))
        return "f"

    monkeypatch.setattr(at_gen, "train_f", trained)
    monkeypatch.setattr(at_gen, "make_distance", lambda *given: list)
    given = handed_on(monkeypatch, tmp_path, "--images", 600, "--sample-steps", 5)
    assert given["f"]() == "f"
    (s, name, data, p0, measure), = asked
    assert name == "f" and torch.equal(data.x, glyphs.x) and torch.equal(p0.x, letters.x)
    assert s.sample_steps == 5 and s == given["run"].args.settings
    samples = torch.cat(measure("f"))  # 500 of the seeds, by the sampler's steps
    assert torch.equal(samples, given["seeds"].first(500)) and attacks[0][2:4] == (5, 1.0)
    given["learn"](s, "other", p0=given["load"]("letters:4"))
    assert asked[1][1] == "other" and asked[1][3].y.max() == 3 and torch.equal(asked[1][2].x, glyphs.x)


def test_the_classifier_behind_the_distance(monkeypatch, tmp_path, glyphs):
    calls = []

    def trained(run, name, build, data, iterations, batch, augment):
        calls.append((build(), data, iterations, augment))
        assert batch == 128
        return Pooled()

    monkeypatch.setattr(common, "train_classifier", trained)
    run, s = begin(tmp_path, "--cls-iters", 7, "--cls-width", 0.5)
    distance = at_gen.make_distance(run, s, glyphs, Selection(glyphs, torch.arange(50), 32, "cpu"))
    (net, data, iterations, augment), = calls
    assert distance.name == "FD-cls" and data is glyphs and iterations == 7 and augment == "none"
    assert net(torch.rand(2, 1, 28, 28)).shape == (2, 10) and net.head.in_features == 512
    colour = Images(glyphs.x.expand(-1, 3, -1, -1), glyphs.y, "cifar10")
    at_gen.make_classifier(run, s, colour)
    assert isinstance(calls[1][0], common.ResNet) and calls[1][3] == "crop_flip"


# --- the script ---


def test_smoke_run_of_every_experiment(tmp_path, outcome):
    assert outcome(at_gen, "--budget", "smoke", "--out", tmp_path, "--device", "cpu",
                   "--only", *at_gen.EXPERIMENTS) == (0, "")
    folder = tmp_path / "at_gen-glyphs"
    results = json.loads((folder / "results.json").read_text())
    assert set(results) == set(at_gen.EXPERIMENTS)
    for entry in results.values():
        assert entry["rows"] and entry["p0"] == "letters"
        numbers = [row["value"] for row in entry["rows"] if not isinstance(row["value"], str)]
        assert all(math.isfinite(number) for number in numbers)
    for picture in ("table2.7", "figure2.3", "figure2.7", "figure2.9", "figure2.11-letters", "figure2.12",
                    "figure2.13-denoising", "figure2.13-inpainting", "figure2.15", "figure2.16"):
        assert (folder / f"{picture}.png").exists()
    for log in ("f", "classifier", "p0-noise", "p0-letters-4", "back"):
        assert (folder / f"log-{log}.csv").exists()


@pytest.fixture
def pictures(tmp_path):
    """A data folder with two sets of pictures in files."""
    from PIL import Image
    random = torch.Generator().manual_seed(1)
    for name in ("celebahq", "imagenet"):
        for i in range(30):
            file = tmp_path / "data" / name / f"part{i % 3}" / f"{i}.{('png', 'jpg', 'webp')[i % 3]}"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(0, 256, (40 + i, 50, 3), generator=random, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(file)
    return tmp_path / "data"


def test_smoke_run_on_a_folder_of_pictures(tmp_path, outcome, pictures, narrow_d, monkeypatch):
    """A 256-pixel set: folders of files, the residual D, no labels and so no Frechet distance."""
    flags = ("--dataset", "celebahq", "--budget", "smoke", "--data-dir", pictures, "--out", tmp_path,
             "--device", "cpu", "--side", 16, "--k-max", 1, "--images", 12)
    monkeypatch.setattr(at_gen, "ResBlockD", narrow_d(at_gen))
    code, said = outcome(at_gen, *flags)
    assert code == 2 and "afhq_cat" in said  # the foreign domain
    flags = (*flags, "--foreign", "imagenet")
    code, said = outcome(at_gen, *flags)
    assert code == 2 and "inception" in said and not list(tmp_path.rglob("*.pt"))
    assert outcome(at_gen, *flags, "--only", "table2.7", "table2.8", "table2.10", "figure2.7", "figure2.11") == (0, "")
    assert (tmp_path / "at_gen-celebahq" / "figure2.7.png").exists()


def test_fid_with_inception_features(tmp_path, write_npz, outcome, monkeypatch):
    """Where there are Inception's features (here: pretended) it is FID, and no classifier is trained."""
    folder = write_npz("cifar10")

    def network(data, data_dir, classifier):
        assert data_dir == folder
        return "FID", Pooled()

    monkeypatch.setattr(common, "feature_network", network)
    assert outcome(at_gen, "--dataset", "cifar10", "--budget", "smoke", "--p0", "noise", "--data-dir", folder,
                   "--out", tmp_path, "--device", "cpu", "--k-max", 0, "--only", "table2.5") == (0, "")
    results = json.loads((tmp_path / "at_gen-cifar10" / "results.json").read_text())
    names = [row["quantity"] for row in results["table2.5"]["rows"]]
    assert "FID samples" in names and "IS held-out data" in names and not any("cls" in name for name in names)
    assert not (tmp_path / "at_gen-cifar10" / "classifier.pt").exists()


@pytest.mark.parametrize("flags", [
    ["--dataset", "nist"],
    ["--budget", "huge"],
    ["--budget", "paper"],  # glyphs are not in the source
    ["--only", "table9"],
    ["--eps", "-1"],
    ["--eps", "8/x"],
    ["--k-max", "2.5"],
    ["--batch", "0"],
    ["--images", "1"],
    ["--side", "3"],
    ["--width", "inf"],
    ["--seed", "99999999999"],
    ["--k-min", "9"],
    ["--images", "10000000"],
    ["--p0", "letters:0"],
    ["--p0", "letters:few"],
    ["--p0", "nosuch"],
    ["--device", "cuda:99"],
    ["--net", "vgg"],
    ["--net", "resblock_d"],  # 28 is no power of two
    ["--augment", "rrc"],
    ["--augment-p0", "mild"],
    ["--dataset", "celebahq"],
    ["--step"],
    ["--task", "paint"],
    ["--task", "denoise"],
    ["--input", "nothing"],
    ["--output", "somewhere"],
    ["--foreign", "nosuch"],
    ["--nonsense", "1"],
])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, outcome, flags):
    code, said = outcome(at_gen, "--budget", "smoke", "--data-dir", tmp_path, "--out", tmp_path / "runs",
                         *flags)
    assert code == 2 and said.count("\n") == 1
    named = [flags[-1], flags[0], flags[0].removeprefix("--"), "power", "no such"]
    assert any(word.split(":")[-1] in said for word in named)
    assert not (tmp_path / "runs").exists()


def test_the_film_is_a_flag():
    assert at_gen.get_args(["--gif"]).settings.gif and not at_gen.get_args([]).settings.gif
