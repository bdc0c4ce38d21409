"""hat_ebm.py: the sampler, Algorithm 5, its peers, every table and figure, the script as a whole."""
import json
import math
from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn

import common
import hat_ebm as hb
from common import Images, UserError
from conftest import FakeRun, Killed

SMOKE = hb.SETTINGS["glyphs", "smoke"]
MODE = hb.Mode(updates=3, lr=1e-3, k=2, k_test=3, tau_y=0.1, tau_z=0.0, t=0.5, noise=0.02)
JOINT = MODE._replace(tau_z=0.2)


@pytest.fixture
def run(tmp_path):
    return FakeRun(tmp_path / "run")


def some_images(n=24, side=28, channels=1):
    g = torch.Generator().manual_seed(1)
    return Images(torch.randint(0, 256, (n, channels, side, side), dtype=torch.uint8, generator=g), torch.arange(n) % 10, "made up")


class Quadratic(nn.Module):
    """H(x) = |x|^2 / 2."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.scale * x.square().flatten(1).sum(1, keepdim=True) / 2


class Doubling(nn.Module):
    """G(z) = 2 z, an image."""
    latent = (1, 2, 2)

    def __init__(self):
        super().__init__()
        self.two = nn.Parameter(torch.full((1,), 2.0))

    def forward(self, z):
        return self.two * z


def state_of(run, name):
    return torch.load(run.folder / f"{name}.pt", weights_only=True)


# --- networks ---


def test_networks_have_the_published_sizes():
    def count(net):
        return sum(p.numel() for p in net.parameters())
    for side, number in ((32, 4_276_739), (64, 12_220_675), (128, 32_150_787)):
        assert count(hb.Generator((3, side, side), 1.0, 2)) == number
    assert count(hb.Decoder((3, 32, 32), 1.0)) == 4_210_435 and count(hb.Encoder(3, 1.0)) == 4_206_849


@pytest.mark.parametrize("channels, side", [(1, 28), (3, 32), (3, 64)])
def test_generators_make_images_within_their_range(channels, side):
    shape = (channels, side, side)
    for factor in (1, 2):
        G = hb.Generator(shape, 0.05, factor)
        with torch.no_grad():
            x = G(1e4 * torch.randn(4, 128))
        assert x.shape == (4, *shape)
        assert (1 - factor) / 2 - 1e-6 <= x.min() < 0.3 and 0.7 < x.max() <= (1 + factor) / 2 + 1e-6


def test_the_latent_of_the_encoder_is_an_image_on_the_sphere():
    z = hb.Encoder(3, 0.05)(torch.rand(5, 3, 32, 32))
    assert z.shape == (5, 1, 16, 16)
    assert torch.allclose(hb.lengths(z), torch.full((5,), 16.0))
    assert hb.Decoder((3, 32, 32), 0.05)(z).shape == (5, 3, 32, 32)


# --- the sampler ---


def test_a_joint_step_is_equation_6_7_then_6_6():
    z, y = torch.randn(3, 1, 2, 2), 0.01 * torch.randn(3, 1, 2, 2)
    m = JOINT._replace(prior=3.0, tau_y=0.05)
    torch.manual_seed(5)
    z1, g1, y1 = hb.hat_step((z, 2 * z, y), Quadratic(), Doubling(), m)
    torch.manual_seed(5)
    x = 2 * z + y
    z_ = z - 0.2**2 / (2 * 0.5) * 2 * x + 0.2 * torch.randn_like(z)
    slope = (2 * z_ + y) / 0.5 + 2 * 3.0 * y
    y_ = y - 0.05**2 / 2 * slope + 0.05 * torch.randn_like(y)
    assert torch.allclose(z1, z_) and torch.allclose(g1, 2 * z_) and torch.allclose(y1, y_)


def test_in_the_conditional_model_only_y_walks():
    z, y = torch.randn(3, 1, 2, 2), torch.zeros(3, 1, 2, 2)
    z1, g1, y1 = hb.hat_step((z, 2 * z, y), Quadratic(), Doubling(), MODE)
    assert torch.equal(z1, z) and torch.equal(g1, 2 * z) and (y1 != 0).all()


def test_without_a_residual_y_stays_0():
    z, y = torch.randn(3, 1, 2, 2), torch.zeros(3, 1, 2, 2)
    z1, g1, y1 = hb.hat_step((z, 2 * z, y), Quadratic(), Doubling(), JOINT._replace(tau_y=0.0))
    assert not torch.equal(z1, z) and torch.equal(g1, 2 * z1) and (y1 == 0).all()


def test_the_slope_moves_y_by_at_most_the_clip():
    m = MODE._replace(tau_y=1e-5, t=1e-14)
    g = torch.tensor([1.0, 1e-4]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    _, _, y = hb.hat_step((g / 2, g, torch.zeros_like(g)), Quadratic(), Doubling(), m)
    assert hb.lengths(y)[0] == pytest.approx(hb.CLIP, rel=1e-3)
    assert hb.lengths(y)[1] == pytest.approx(1e-4 * 2 * 1e-10 / 2e-14, rel=0.02)  # shorter ways are not lengthened


def test_chains_start_at_normal_z_and_y_0():
    hat = hb.Hat(Quadratic(), Doubling(), MODE, [])
    z, g, y = hb.sample(hat, 5000, 0)
    assert z.shape == (5000, 1, 2, 2) and (y == 0).all() and torch.equal(g, 2 * z)
    assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03
    assert hb.from_hat(hat, 2, 7).shape == (7, 1, 2, 2)


def test_the_conditional_chain_has_its_stationary_variance():
    """U = |g + y|^2 / 2T: y is normal around -g with variance T / (1 - tau^2 / 4T)."""
    hat = hb.Hat(Quadratic(), Doubling(), MODE._replace(tau_y=0.5, t=0.5), [])
    _, g, y = hb.sample(hat, 4000, 60)
    assert (g + y).var() == pytest.approx(0.5 / (1 - 0.25 / 2), rel=0.04)


# --- learning ---


def test_exchange_returns_the_old_pairs_and_overwrites_exactly_those_rows():
    bank_z, bank_x = torch.arange(10.0).view(10, 1), 100 + torch.arange(10.0).view(10, 1)
    rows = torch.tensor([7, 2])
    old_z, old_x = hb.exchange(bank_z, bank_x, rows, torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-101.0], [-102.0]]))
    assert old_z[:, 0].tolist() == [7, 2] and old_x[:, 0].tolist() == [107, 102]
    assert bank_z[:, 0].tolist() == [0, 1, -2, 3, 4, 5, 6, -1, 8, 9]
    assert bank_x[:, 0].tolist() == [100, 101, -102, 103, 104, 105, 106, -101, 108, 109]


def by_hand(s, m, data, pairs):
    """Algorithm 5 in plain PyTorch -> H, G."""
    torch.manual_seed(0)
    H = common.make_net(s.net, 1, data.shape, s.width)
    G = hb.Generator(data.shape, s.width_g, 2).eval()
    adam, adam_g = torch.optim.Adam(H.parameters(), m.lr), torch.optim.Adam(G.parameters(), s.synth_lr_g)
    bank_z = torch.randn(hb.LIFE * s.batch, 128)
    bank_x, stream = G(bank_z).detach(), common.batches(data, s.batch, 0)
    for _ in range(m.updates):
        x = next(stream)[0]
        x = x + m.noise * torch.randn_like(x)
        z = torch.randn(s.batch, 128)
        g = G(z).detach()
        y = torch.zeros_like(g)
        for _ in range(m.k):
            y.requires_grad_(True)
            slope, = torch.autograd.grad(H(g + y).sum(), y)
            y = (y - m.tau_y**2 / (2 * m.t) * slope + m.tau_y * torch.randn_like(y)).detach()
        h = H(torch.cat([x, g + y]))
        adam.zero_grad()
        ((h[: s.batch].mean() - h[s.batch:].mean()) / m.t).backward()
        adam.step()
        learn_z, learn_x = z, g + y
        if pairs == "historical":
            rows = torch.randperm(len(bank_z))[: s.batch]
            learn_z, learn_x = bank_z[rows].clone(), bank_x[rows].clone()
            bank_z[rows], bank_x[rows] = z, g + y
        adam_g.zero_grad()
        (G(learn_z) - learn_x).square().mean().backward()
        adam_g.step()
    return H, G


@pytest.mark.parametrize("pairs", ["historical", "current"])
def test_three_updates_by_hand(run, exact, pairs):
    s, data, m = replace(SMOKE, width=0.125, synth_lr_g=1e-3), some_images(), MODE._replace(t=0.01)
    H, G = by_hand(s, m, data, pairs)
    hat = hb.train_hat(run, s, m, data, "synth", pairs=pairs)
    for mine, its in ((hat.H.net, H), (hat.G.net, G)):
        for a, b in zip(mine.state_dict().values(), its.state_dict().values()):
            assert torch.allclose(a, b, atol=2e-6)
    other = by_hand(s, m, data, "current" if pairs == "historical" else "historical")[1]
    assert not torch.allclose(other.state_dict()["body.0.weight"], G.state_dict()["body.0.weight"], atol=2e-6)


def test_each_row_of_the_bank_is_replaced_once_in_an_update_and_lives_its_time(run, monkeypatch):
    seen = []
    exchange = hb.exchange
    monkeypatch.setattr(hb, "exchange", lambda bank_z, bank_x, rows, z, x: seen.append(rows) or exchange(bank_z, bank_x, rows, z, x))
    monkeypatch.setattr(hb, "LIFE", 4)
    hb.train_hat(run, SMOKE, MODE._replace(updates=120, k=1), some_images(), "synth")
    age, ages = torch.zeros(4 * SMOKE.batch), []
    for rows in seen:
        assert len(set(rows.tolist())) == SMOKE.batch
        ages.append(age[rows])
        age += 1
        age[rows] = 0
    ages = torch.cat(ages[20:])
    assert len(seen) == 120 and ages.mean() == pytest.approx(3, rel=0.15)  # (1 - p) / p, p = 1/4
    assert (ages == 0).float().mean() == pytest.approx(1 / 4, abs=0.05)


def test_a_frozen_generator_stays_as_it_was_and_in_eval_mode(run):
    G = hb.Generator((1, 28, 28), 0.0625, 1)
    G(torch.randn(4, 128))  # statistics of its own
    G.eval().requires_grad_(False)
    before = {key: tensor.clone() for key, tensor in G.state_dict().items()}
    hat = hb.train_hat(run, SMOKE, JOINT, some_images(), "refine", G=G)
    assert all(torch.equal(before[key], tensor) for key, tensor in G.state_dict().items())
    assert not G.training and not hat.G.net.training and "bank_z" not in state_of(run, "refine")
    assert {"d", "grad", "y", "z"} < set(hat.log[-1]) and "loss_g" not in hat.log[-1]


@pytest.mark.parametrize("batchnorm", [False, True])
def test_batchnorm_is_there_only_where_it_is_asked_for(run, monkeypatch, batchnorm):
    modes = []
    infer = hb.infer_step
    monkeypatch.setattr(hb, "infer_step", lambda z, G, x: modes.append(G.training) or infer(z, G, x))
    sample = hb.sample
    monkeypatch.setattr(hb, "sample", lambda hat, *a: modes.append(hat.G.net.training) or sample(hat, *a))
    hat = hb.train_hat(run, SMOKE, MODE, some_images(), "coop", pairs="inferred", batchnorm=batchnorm)
    assert set(modes) == {batchnorm} and len(modes) == 3 * 3 + 3
    means = [t for key, t in hat.G.net.state_dict().items() if key.endswith("running_mean")]
    assert means and all((m == 0).all().item() != batchnorm for m in means)
    assert not hat.G.net.training  # samples afterwards do not depend on their batch
    learned = torch.load(run.folder / "coop.pt", weights_only=True)["H"]
    assert hat.exact.dtype == torch.float32 and all(torch.equal(w, learned[key]) for key, w in hat.exact.net.state_dict().items())


def test_inference_is_equation_6_10_and_a_hat_does_none(run, monkeypatch):
    z, x = torch.randn(3, 1, 2, 2), torch.rand(3, 1, 2, 2)
    torch.manual_seed(5)
    after = hb.infer_step(z, Doubling(), x)
    torch.manual_seed(5)
    slope = 2 * 2 * (2 * z - x)
    expected = z - 0.1**2 / 2 * (z + slope / (2 * 0.15**2)) + 0.1 * torch.randn_like(z)
    assert torch.allclose(after, expected, atol=1e-5)
    def no(*_):
        raise AssertionError
    monkeypatch.setattr(hb, "infer_step", no)
    hb.train_hat(run, SMOKE, MODE, some_images(), "historical")
    monkeypatch.setattr(hb, "exchange", no)
    hb.train_hat(run, SMOKE, MODE, some_images(), "current", pairs="current")


def test_killed_and_resumed_equals_unbroken(tmp_path, monkeypatch):
    monkeypatch.setattr(common.Training, "SAVE_SECONDS", -1)
    data, m = some_images(), MODE._replace(updates=4)
    whole, broken = FakeRun(tmp_path / "a"), FakeRun(tmp_path / "b")
    expected = hb.train_hat(whole, SMOKE, m, data, "synth")
    step, calls = torch.optim.Adam.step, []
    def dying(self, *a):
        calls.append(1)
        if len(calls) == 6:  # G's step of update 3
            raise Killed
        return step(self, *a)
    monkeypatch.setattr(torch.optim.Adam, "step", dying)
    with pytest.raises(Killed):
        hb.train_hat(broken, SMOKE, m, data, "synth")
    torch.manual_seed(99)
    hat = hb.train_hat(broken, SMOKE, m, data, "synth")
    a, b = state_of(whole, "synth"), state_of(broken, "synth")
    assert torch.equal(a["bank_x"], b["bank_x"]) and torch.equal(a["bank_z"], b["bank_z"])
    for one, other in ((expected.H, hat.H), (expected.G, hat.G)):
        assert all(torch.equal(p, q) for p, q in zip(one.state_dict().values(), other.state_dict().values()))


def test_the_temperature_belongs_to_the_checkpoint(run):
    hb.train_hat(run, SMOKE, MODE, some_images(), "synth")
    for change in ({"t": 0.4}, {"tau_y": 0.2}, {"prior": 1.0}, {"k": 3}):
        with pytest.raises(UserError, match=next(iter(change))):
            hb.train_hat(run, SMOKE, MODE._replace(**change), some_images(), "synth")
    with pytest.raises(UserError, match="pairs"):
        hb.train_hat(run, SMOKE, MODE, some_images(), "synth", pairs="current")


# --- peers ---


def test_ddls_walks_down_its_energy():
    z = torch.randn(4, 1, 2, 2)
    torch.manual_seed(5)
    after = hb.ddls_step(z, Doubling(), Quadratic())
    torch.manual_seed(5)
    assert torch.allclose(after, z - 0.1**2 / 2 * (z - 4 * z) + 0.1 * torch.randn_like(z), atol=1e-6)


def test_the_discriminator_of_the_gan_has_spectral_norm_and_learns_five_times(run, monkeypatch):
    steps = []
    descend = hb.descend
    monkeypatch.setattr(hb, "descend", lambda adam, loss: steps.append(id(adam)) or descend(adam, loss))
    G, D = hb.train_sngan(run, SMOKE, some_images())
    assert not G.training and not D.net.training and not any(p.requires_grad for p in (*G.parameters(), *D.parameters()))
    assert not any("parametrizations" in key for key in D.state_dict())
    assert [steps.count(i) for i in dict.fromkeys(steps)] == [5 * SMOKE.gan_iters, SMOKE.gan_iters]
    for layer in D.modules():
        if isinstance(layer, nn.Conv2d):
            assert torch.linalg.matrix_norm(layer.weight.float().flatten(1), 2) == pytest.approx(1, abs=0.05)
    assert any((t != 0).any() for key, t in G.state_dict().items() if key.endswith("running_mean"))


# --- tables and figures ---


def test_frechet_distance_of_gaussians():
    eye, zero = torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    assert hb.frechet_distance(zero, eye, zero + 2, 4 * eye) == pytest.approx(12 + 3)


class Means(nn.Module):
    """Features: quarters' means."""

    def features(self, x):
        return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


def metric_of(data):
    return hb.Metric("FD-cls", Means(), *common.feature_statistics(Means(), data.take(slice(None))))


def fixed_hat(m=MODE, log=()):
    G = hb.Generator((1, 28, 28), 0.0625, 1).eval()
    frozen = common.frozen_copy(G)
    frozen.latent = G.latent
    return hb.Hat(common.frozen_copy(common.make_net("light_ebm", 1, (1, 28, 28), 0.0625)), frozen, m, list(log))


def test_out_of_distribution_sets_rank_by_minus_h(run):
    test = some_images()
    hat = hb.Hat(None, None, MODE, [], Quadratic())
    def load(name):
        if name == "noise":
            raise UserError("not here")
        return Images(test.x // 2 if name == "letters" else 255 - test.x // 4, test.y, name)
    rows = hb.table_6_3(SMOKE, test, hat, load)
    for row in rows:
        assert row["interval"][0] <= row["value"] <= row["interval"][1]
    rows = {row["quantity"]: row["value"] for row in rows}
    assert rows["AUROC letters"] == 0 and rows["AUROC symbols"] == 1 and "AUROC noise" not in rows
    rows = hb.table_6_3(SMOKE, Images(test.x, test.y, "fashion_mnist"), hat, load)
    assert [row["quantity"] for row in rows] == ["AUROC symbols", "AUROC letters"]  # never against itself


def test_table_6_1_holds_the_three_against_each_other(run, monkeypatch):
    data, called = some_images(64), []
    for name in ("from_ddls", "from_hat"):
        real = getattr(hb, name)
        monkeypatch.setattr(hb, name, lambda *a, name=name, real=real: called.append((name, a[:-1])) or real(*a))
    G, D = hb.Generator((1, 28, 28), 0.0625, 1).eval(), common.make_net("light_ebm", 1, (1, 28, 28), 0.0625)
    refine = fixed_hat(JOINT._replace(k_test=4))
    rows = hb.table_6_1(run, SMOKE, data, metric_of(data), (G, D), refine)
    assert [row["quantity"] for row in rows] == ["FD-cls generator", "FD-cls DDLS", "FD-cls Hat EBM", "FD-cls held-out data"]
    assert [a for name, a in called if name == "from_ddls"] == [(refine.G, D, 8)] * hb.DRAWS
    assert [a for name, a in called if name == "from_hat"] == [(refine, 0)] * hb.DRAWS + [(refine, 4)] * hb.DRAWS
    for row in rows[:3]:
        assert row["low"] < row["value"] < row["high"]  # other noise in each draw
    assert rows[3]["value"] < min(row["value"] for row in rows[:3])


def test_table_6_2_and_figure_6_8_hold_chains_against_their_starts(run, monkeypatch):
    data, made = some_images(64), []
    monkeypatch.setattr(hb, "from_hat", lambda hat, steps, n: made.append((hat, steps)) or data.take(slice(n)))
    synth, retrofit = fixed_hat(MODE._replace(k_test=7)), fixed_hat(JOINT._replace(k_test=9))
    rows = hb.table_6_2(run, SMOKE, data, metric_of(data), synth)
    assert [row["quantity"] for row in rows] == ["FD-cls Hat EBM", "FD-cls G alone", "FD-cls held-out data"]
    assert made == [(synth, 7)] * hb.DRAWS + [(synth, 0)] * hb.DRAWS
    made.clear()
    rows = hb.figure_6_8(run, SMOKE, data, metric_of(data), retrofit)
    assert made == [(retrofit, 0)] * hb.DRAWS + [(retrofit, 9)] * hb.DRAWS
    assert [row.get("steps") for row in rows] == [0, 9, None]


def test_before_and_after_shows_the_same_chains(run):
    hat = fixed_hat(JOINT._replace(k_test=4))
    hb.before_and_after(run, "picture", hat)
    before, after = run.shown["picture"].values()
    torch.manual_seed(run.seed)
    state = hb.sample(hat, 60, 0)
    assert torch.equal(before, state[1]) and not state[2].any()
    _, g, y = hb.walk(hat, state, 4)
    assert torch.equal(after, g + y)


def test_figure_6_4_trains_what_it_says(run, monkeypatch):
    calls = []
    def train_hat(run, s, m, data, name, G=None, pairs="historical", batchnorm=False):
        calls.append((name, m.updates, pairs, batchnorm, G))
        return fixed_hat(m)
    monkeypatch.setattr(hb, "train_hat", train_hat)
    data = some_images(64)
    lengths = []
    real = hb.from_hat
    monkeypatch.setattr(hb, "from_hat", lambda hat, steps, n: lengths.append((steps, n)) or real(hat, steps, n))
    rows = hb.figure_6_4(run, replace(SMOKE, compared=2), data, data, metric_of(data))
    assert lengths == [(SMOKE.synth_k, SMOKE.images)] * 4
    assert [(updates, pairs, batchnorm, G) for _, updates, pairs, batchnorm, G in calls] == [
        (2, "inferred", False, None), (2, "inferred", True, None), (2, "current", False, None), (2, "historical", False, None)]
    assert len({name for name, *_ in calls}) == 4 and len(rows) == 8 and len(run.shown["figure6.4"]) == 4
    metric, whole = metric_of(data), data.some(24)[0]
    for title, x in run.shown["figure6.4"].items():
        value, = [row["value"] for row in rows if row["quantity"] == f"diversity {title}"]
        assert value == pytest.approx(metric.diversity(x) / metric.diversity(whole))
    assert metric_of(data).diversity(data.take([0, 0, 0])) == pytest.approx(0, abs=1e-4)


def test_figure_6_6_takes_y_away_and_nothing_else(run, monkeypatch):
    calls = []
    def train_hat(run, s, m, data, name, G=None, pairs="historical", batchnorm=False):
        calls.append((m, G, pairs))
        return fixed_hat(m, [{"it": 1, "grad": 5.0}, {"it": 2, "grad": 9.0}])
    monkeypatch.setattr(hb, "train_hat", train_hat)
    refine = fixed_hat(JOINT, [{"it": 1, "grad": 0.5}, {"it": 2, "grad": 0.25}])
    rows = hb.figure_6_6(run, SMOKE, some_images(), ("G", "D"), refine)
    assert calls == [(JOINT._replace(tau_y=0.0), "G", "historical")]
    values = {row["quantity"]: row["value"] for row in rows}
    assert values == {"gradient norm of H in the end, with Y": 0.25, "gradient norm of H in the end, without Y": 9.0}


def test_figure_6_6_shows_a_training_that_ran_away(run, monkeypatch):
    def train_hat(*_, **__):
        stop = common.Diverged("ran away")
        stop.rows = [{"it": 1, "grad": 5.0}, {"it": 2, "grad": float("inf")}]
        raise stop
    monkeypatch.setattr(hb, "train_hat", train_hat)
    rows = hb.figure_6_6(run, SMOKE, some_images(), ("G", "D"), fixed_hat(JOINT, [{"it": 1, "grad": 0.5}]))
    assert rows[1]["value"] == float("inf") and rows[1]["updates"] == 2


def test_paths_walk_up_to_eight_times_as_long_as_training(run, monkeypatch):
    data, made = some_images(64), []
    synth, refine = fixed_hat(MODE._replace(k=4)), fixed_hat(JOINT._replace(k=8))
    monkeypatch.setattr(hb, "from_hat", lambda hat, steps, n: made.append((hat, steps)) or data.take(slice(n)))
    rows = hb.paths(run, SMOKE, metric_of(data), synth, refine)
    assert [row["steps"] for row in rows] == [0, 1, 2, 4, 8, 16, 32, 0, 2, 4, 8, 16, 32, 64]
    assert made == [(hat, row["steps"]) for hat, row in zip([synth] * 7 + [refine] * 7, rows) for _ in range(hb.DRAWS)]
    assert run.shown["paths"] == rows


def test_mode_picks_its_own_settings():
    s = hb.SETTINGS["cifar10", "thesis"]
    assert hb.mode(s, "synth") == hb.Mode(100_000, 1e-4, 50, 125, 5e-5, 1e-3, 5e-4, 0.0, 0.0)
    assert hb.mode(s, "refine", s.refine_tau_z) == hb.Mode(150_000, 1e-4, 100, 350, 5e-5, 1e-4, 1e-2, 5e-3, 0.0)
    s = hb.SETTINGS["cifar10", "paper"]
    paper = hb.mode(s, "retrofit", s.retrofit_tau_z, hb.PRIOR)
    assert paper == hb.Mode(25_000, 1e-4, 100, 125, 2.5e-4, 1e-3, 5e-3, 1e-3, 200.0)


# --- the script ---


def test_main_makes_each_mode_of_its_own_parts(tmp_path, monkeypatch):
    calls, made = {}, {}
    monkeypatch.setattr(hb, "train_hat", lambda run, s, m, data, name, G=None: calls.update({name: (m, G)}) or name)
    monkeypatch.setattr(hb, "train_sngan", lambda *_: ("G of the GAN", "D"))
    monkeypatch.setattr(hb, "train_autoencoder", lambda *_: "decoder")
    monkeypatch.setattr(common.Run, "experiments", lambda self, registry, **have: made.update(have))
    hb.main(["--out", str(tmp_path), "--device", "cpu"])
    s = hb.SETTINGS["glyphs", "quick"]
    for name in ("synth", "refine", "retrofit"):
        assert made[name]() == name
    assert calls == {
        "synth": (hb.mode(s, "synth"), None),
        "refine": (hb.mode(s, "refine", s.refine_tau_z), "G of the GAN"),
        "retrofit": (hb.mode(s, "retrofit", s.retrofit_tau_z, hb.PRIOR), "decoder")}
    assert made["hats"]() == {name: name for name in calls}


def test_the_autoencoder_learns_as_it_decodes(run, monkeypatch, exact):
    """Its decoder is in eval mode throughout, and its latents are noisy in training, by .02 of their radius."""
    seen = []
    forward = hb.Decoder.forward
    monkeypatch.setattr(hb.Decoder, "forward", lambda self, z: seen.append((self.training, z)) or forward(self, z))
    hb.train_autoencoder(run, replace(SMOKE, ae_iters=3), some_images(40))
    assert [training for training, _ in seen] == [False] * 3
    for _, z in seen:
        off = z.flatten(1).square().mean(1).sqrt() - 1  # on the sphere this is 0
        assert 1e-4 < off.abs().max() < 0.02


def test_smoke_run_of_every_experiment(tmp_path, outcome, narrow):
    flags = ("--budget", "smoke", "--out", tmp_path, "--device", "cpu")
    assert outcome(hb, *flags, "--only", *hb.EXPERIMENTS) == (0, "")
    folder = tmp_path / "hat_ebm-glyphs"
    results = json.loads((folder / "results.json").read_text())
    assert set(results) == set(hb.EXPERIMENTS)
    for name, entry in results.items():
        for row in entry["rows"]:
            assert math.isfinite(row["value"]), (name, row)
    pictures = {p.stem for p in folder.glob("*.png")}
    assert pictures == {"table6.1", "figure6.4", "figure6.5", "figure6.6", "figure6.8", "figure6.9", "paths"}
    code, err = outcome(hb, *flags, "--only", "table6.2", "--synth-t", "0.5")
    assert code == 2 and "synth.pt" in err and err.count("\n") == 1


def test_mode_runs_that_mode_alone(tmp_path, outcome, narrow):
    assert outcome(hb, "--budget", "smoke", "--mode", "retrofit", "--out", tmp_path, "--device", "cpu") == (0, "")
    folder = tmp_path / "hat_ebm-glyphs"
    assert set(json.loads((folder / "results.json").read_text())) == {"figure6.8"}
    assert {p.stem for p in folder.glob("*.pt")} == {"classifier", "autoencoder", "retrofit"}
    flags = ("--mode", "retrofit", "--only=table6.2")  # what is named goes before the mode's own
    assert hb.get_args(["--budget", "smoke", *flags]).only == ["table6.2"]
    for mode, names in hb.MODES.items():
        assert set(names) <= set(hb.EXPERIMENTS), mode


def test_smoke_run_on_colour(tmp_path, write_npz, outcome, narrow):
    data = write_npz("cifar10", n=60)
    write_npz("cifar100", n=60)
    flags = ("--dataset", "cifar10", "--budget", "smoke", "--data-dir", data, "--out", tmp_path, "--device", "cpu")
    assert outcome(hb, *flags, "--only", "table6.1", "table6.3") == (0, "")


@pytest.mark.parametrize("name, side", [("celeba", 64), ("imagenet", 128)])
def test_smoke_run_on_a_folder_of_pictures(tmp_path, outcome, monkeypatch, name, side):
    monkeypatch.setattr(common, "train_classifier", lambda run, name, build, *_: common.make_net("small_cnn", 2, (3, side, side)).eval())
    for split in ("train", "val"):
        for kind in ("one", "other"):
            folder = tmp_path / "data" / name / split / kind
            folder.mkdir(parents=True)
            for i in range(14):
                picture = torch.randint(0, 256, (3, 40 + i, 48), dtype=torch.uint8)
                torchvision.io.write_png(picture, str(folder / f"{i}.png"))
    flags = ("--dataset", name, "--side", side, "--budget", "smoke", "--data-dir", tmp_path / "data", "--out", tmp_path,
             "--device", "cpu", "--images", "4", "--batch", "2")
    assert outcome(hb, *flags, "--only", "table6.2", "figure6.9") == (0, "")
    assert (tmp_path / f"hat_ebm-{name}" / "figure6.9.png").exists()


@pytest.mark.parametrize("flags, says", [
    (("--mode", "both"), "--mode"), (("--side", "40"), "--side"), (("--synth-k", "0"), "--synth-k"),
    (("--refine-t", "0"), "--refine-t"), (("--images", "1"), "--images"), (("--width", "0"), "--width")])
def test_bad_input_is_one_line(tmp_path, outcome, flags, says):
    code, err = outcome(hb, "--budget", "smoke", "--out", tmp_path / "out", "--device", "cpu", *flags)
    assert code == 2 and says in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
