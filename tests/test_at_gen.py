"""at_gen.py: attack, objective, training, metrics, and the script as a whole."""
import csv
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import at_gen
import common
from at_gen import at_loss, auroc, frechet_distance, inception_score, pgd_attack, r1_penalty


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


def small_net(channels=1):
    return common.PlainCNN(4, 1, channels, 28)


# --- the attack ---


def test_attack_closed_form(exact):
    w = torch.randn(1, 1, 6, 6)
    x = torch.full((3, 1, 6, 6), 0.5)
    unit = w / w.norm()
    assert torch.allclose(pgd_attack(Linear(w), x, 7, 0.05), x + 0.35 * unit, atol=1e-6)
    assert torch.allclose(pgd_attack(Linear(w), x, 7, 0.05, sign=-1), x - 0.35 * unit, atol=1e-6)


def test_attack_rises_and_falls():
    f, x = small_net(), torch.rand(8, 1, 28, 28)
    up, down = pgd_attack(f, x, 5, 0.5), pgd_attack(f, x, 5, 0.5, sign=-1)
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
    assert max(high for _, high in f.seen) <= 1.0 and out.max() <= 1.0
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


@pytest.mark.parametrize("x", [torch.full((1, 1, 28, 28), -0.1), torch.full((1, 1, 28, 28), 1.1)])
def test_attack_refuses_images_outside_the_range(x):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
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
    plain = {}
    for name, context in (("fast", torch.autocast("cpu", dtype=torch.bfloat16)),
                          ("plain", torch.autocast("cpu", enabled=False))):
        monkeypatch.setattr(at_gen, "fast_precision", lambda device, context=context: context)
        plain[name] = (pgd_attack(f, x, 4, 0.3) - x).flatten(1)
    assert F.cosine_similarity(plain["fast"], plain["plain"]).min() > 0.98
    assert not torch.equal(plain["fast"], plain["plain"])


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
    assert at_loss(torch.full((3,), 4.0), torch.full((3,), -4.0)) < 0.02  # data high, attacked p0 low: small


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


def test_auroc_with_ties():
    assert auroc(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])) == 1.0
    assert auroc(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])) == 0.0
    assert auroc(torch.zeros(7), torch.zeros(5)) == 0.5
    assert auroc(torch.tensor([1.0, 0.0]), torch.tensor([0.0])) == 0.75


def test_auroc_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    a, b = (torch.randn(300) + 0.5).round(decimals=1), torch.randn(200).round(decimals=1)
    theirs = metrics.roc_auc_score([1] * 300 + [0] * 200, torch.cat([a, b]).numpy())
    assert math.isclose(auroc(a, b), theirs, abs_tol=1e-9)


def test_frechet_distance_of_diagonal_gaussians():
    m1, m2 = torch.randn(6).double(), torch.randn(6).double()
    s1, s2 = torch.rand(6).double() + 0.1, torch.rand(6).double() + 0.1
    expected = ((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum()
    assert math.isclose(frechet_distance(m1, torch.diag(s1 ** 2), m2, torch.diag(s2 ** 2)), expected.item(),
                        rel_tol=1e-9)


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


# --- training ---


def lab_for(tmp_path, *flags, dataset="glyphs"):
    return at_gen.Lab(at_gen.get_args(["--dataset", dataset, "--budget", "smoke",
                                       "--out", str(tmp_path / "runs"), "--device", "cpu", *map(str, flags)]))


def test_schedule_of_algorithm_3(tmp_path):
    """K runs from 0 to N inclusive; gradients add up; displacement never exceeds K x step."""
    _, rows = at_gen.train(lab_for(tmp_path, "--k-max", 3, "--iters-per-k", 2, "--log-every", 1,
                                   "--fd-every", 0))
    assert [row["K"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert rows[-1]["gradients"] == 2 * (0 + 1 + 2 + 3)
    assert rows[0]["moved"] == 0 and all(0 < row["moved"] <= 1.0001 for row in rows[2:])


def test_auc_gate_ends_stages_but_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(at_gen, "auroc", lambda a, b: 0.95)
    lab = lab_for(tmp_path, "--k-max", 1, "--iters-per-k", 120, "--batch", 1, "--auc-gate", 0.9,
                  "--log-every", 1, "--fd-every", 0, "--r1", 0, "--save-every", 1000)
    ks = [row["K"] for row in at_gen.train(lab)[1]]
    assert ks.count(0) == 100 and ks.count(1) == 120


def test_attack_and_update_see_the_same_function(tmp_path, write_npz):
    """A BatchNorm is in eval mode in every forward, and its statistics stay mean 0, variance 1."""
    folder, modes = write_npz("cifar10"), []
    hook = nn.modules.module.register_module_forward_hook(
        lambda m, i, o: modes.append(m.training) if isinstance(m, nn.BatchNorm2d) else None)
    try:
        lab = lab_for(tmp_path, "--data-dir", folder, "--p0", "cifar10", "--width", 0.0625, "--fd-every", 0,
                      dataset="cifar10")
        f, _ = at_gen.train(lab)
    finally:
        hook.remove()
    norms = [m for m in f.modules() if isinstance(m, nn.BatchNorm2d)]
    assert modes and not any(modes) and norms
    assert all(m.running_mean.abs().max() == 0 and (m.running_var == 1).all() for m in norms)
    assert any(m.weight.grad is not None for m in norms)


def test_in_distribution_steps_descend(tmp_path, monkeypatch):
    calls = []
    real = at_gen.pgd_attack
    monkeypatch.setattr(at_gen, "pgd_attack", lambda f, x, steps, step, *a, sign=1:
                        calls.append((steps, step, sign)) or real(f, x, steps, step, *a, sign=sign))
    lab = lab_for(tmp_path, "--indist-steps", 2, "--indist-step", 0.3, "--k-max", 1, "--fd-every", 0)
    at_gen.train(lab)
    assert calls.count((2, 0.3, -1)) == 4 and (1, 1.0, 1) in calls


def test_interrupted_training_goes_on_bit_exactly(tmp_path, monkeypatch):
    flags = ("--k-max", 2, "--iters-per-k", 4, "--save-every", 3, "--log-every", 4, "--fd-every", 0,
             "--batch", 6)
    f, rows = at_gen.train(lab_for(tmp_path / "whole", *flags))

    class Killed(BaseException):
        pass
    real, count = at_gen.at_loss, []

    def dies(a, b):
        count.append(1)
        if len(count) == 8:
            raise Killed  # in update 8; the last checkpoint is from update 6
        return real(a, b)
    dies.__name__ = "at_loss"
    with pytest.raises(Killed):
        at_gen.train(lab_for(tmp_path / "torn", *flags), objective=dies)
    torch.rand(1000)  # whatever happened to the generators in between must not matter
    g, resumed = at_gen.train(lab_for(tmp_path / "torn", *flags))
    assert len(count) == 8 and all(torch.equal(p, q) for p, q in zip(f.parameters(), g.parameters()))
    drop = lambda row: {k: v for k, v in row.items() if k not in ("seconds", "fd")}  # noqa: E731
    assert [drop(r) for r in rows] == [drop(r) for r in resumed]
    with open(tmp_path / "torn" / "runs" / "at_gen-glyphs" / "log.csv") as file:
        assert [int(row["it"]) for row in csv.DictReader(file)] == [r["it"] for r in rows]


def test_finished_training_is_not_repeated(tmp_path, monkeypatch):
    lab = lab_for(tmp_path)
    f, _ = at_gen.train(lab)
    monkeypatch.setattr(at_gen, "pgd_attack", None)  # calling it now would fail
    g, _ = at_gen.train(lab)
    assert all(torch.equal(p, q) for p, q in zip(f.parameters(), g.parameters()))


def test_other_settings_do_not_reuse_a_checkpoint(tmp_path):
    at_gen.train(lab_for(tmp_path))
    with pytest.raises(common.UserError, match="lr 0.0005 .now 0.001."):
        at_gen.train(lab_for(tmp_path, "--lr", 0.001))
    at_gen.train(lab_for(tmp_path, "--sample-steps", 9))  # a sampling flag is not a training setting


def test_divergence_stops_with_advice(tmp_path):
    with pytest.raises(common.Diverged, match="try a lower --lr") as caught:
        at_gen.train(lab_for(tmp_path, "--lr", 1e4, "--iters-per-k", 30, "--fd-every", 0))
    assert caught.value.rows


def test_training_separates_data_from_attacked_p0(tmp_path):
    """The direction of the whole: after short training f is higher on data than on p0, and samples climb."""
    lab = lab_for(tmp_path, "--k-max", 1, "--iters-per-k", 30, "--batch", 24, "--log-every", 30,
                  "--fd-every", 0, "--cls-iters", 1, "--sample-steps", 6)
    f, rows = at_gen.train(lab)
    assert rows[-1]["auc_p0"] > 0.8
    with torch.no_grad():
        assert (f(torch.cat(list(lab.samples(f)))) > f(lab.seeds(24))).all()


# --- the script ---


def test_smoke_run_of_every_experiment(tmp_path, outcome):
    assert outcome(at_gen, "--budget", "smoke", "--out", tmp_path, "--device", "cpu",
                   "--only", *at_gen.EXPERIMENTS) == (0, "")
    folder = tmp_path / "at_gen-glyphs"
    results = json.loads((folder / "results.json").read_text())
    assert set(results) == set(at_gen.EXPERIMENTS)
    for entry in results.values():
        assert entry["ours"] and {"published", "seconds", "hardware", "command", "dataset"} <= set(entry)
        assert all(math.isfinite(v) for v in entry["ours"].values() if isinstance(v, float))
    for picture in ("figure2.3", "figure2.4", "figure2.5", "figure2.7", "sweep", "stability"):
        assert (folder / f"{picture}.png").stat().st_size > 5000
    assert (folder / "config.json").exists() and (folder / "log.csv").exists()


def test_smoke_run_on_a_folder_of_pictures(tmp_path, outcome):
    """A 256-pixel set: folders of files, the residual D, no labels and so no Frechet distance."""
    from PIL import Image
    random = torch.Generator().manual_seed(1)
    for name in ("celebahq", "imagenet"):
        for i in range(30):
            file = tmp_path / "data" / name / f"part{i % 3}" / f"{i}.{('png', 'jpg', 'webp')[i % 3]}"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(0, 256, (40 + i, 50, 3), generator=random, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(file)
    assert outcome(at_gen, "--dataset", "celebahq", "--budget", "smoke", "--data-dir", tmp_path / "data",
                   "--out", tmp_path, "--device", "cpu") == (0, "")
    results = json.loads((tmp_path / "at_gen-celebahq" / "results.json").read_text())
    assert "needs inception" in results["table2.5"]["ours"]["FID"]
    assert (tmp_path / "at_gen-celebahq" / "figure2.7.png").exists()


def test_fid_with_inception_features(tmp_path, write_npz, outcome):
    """Where Inception's weights are at hand (here: random ones) it is FID, and no classifier is trained."""
    folder = write_npz("cifar10")
    torch.save(common.InceptionFeatures().net.state_dict() | {"fc.weight": torch.randn(1000, 2048) / 45,
                                                              "fc.bias": torch.zeros(1000)},
               folder / common.InceptionFeatures.FILE)
    assert outcome(at_gen, "--dataset", "cifar10", "--budget", "smoke", "--p0", "noise", "--data-dir", folder,
                   "--out", tmp_path, "--device", "cpu", "--images", 4, "--reference", 4,
                   "--only", "table2.5") == (0, "")
    ours = json.loads((tmp_path / "at_gen-cifar10" / "results.json").read_text())["table2.5"]["ours"]
    assert ours["FID p0"] > 0 and 1 <= ours["IS samples"] < 1000 and not any("cls" in key for key in ours)
    assert not (tmp_path / "at_gen-cifar10" / "classifier.pt").exists()


def test_a_smoke_run_gives_way_to_a_real_one(tmp_path, capsys):
    at_gen.train(lab_for(tmp_path))
    lab = lab_for(tmp_path, "--iters-per-k", 1)
    lab.args.budget = "quick"
    assert len(at_gen.train(lab)[1]) > 0 and "starting over" in capsys.readouterr().out


@pytest.mark.parametrize("flags, says", [
    (["--dataset", "nist"], "known: glyphs"),
    (["--budget", "huge"], "known for glyphs: smoke, quick, paper"),
    (["--only", "table9"], "unknown experiment 'table9'"),
    (["--eps", "-1"], "at least 0"),
    (["--eps", "8/x"], "8/255"),
    (["--k-max", "2.5"], "whole number"),
    (["--batch", "0"], "--batch"),
    (["--images", "1"], "--images must be at least 2"),
    (["--side", "3"], "--side must be at least 8"),
    (["--width", "inf"], "no plain of width inf"),
    (["--seed", "99999999999"], "--seed must be below"),
    (["--cls-net", "plain"], "has no features"),
    (["--k-min", "9"], "above --k-max"),
    (["--images", "10000000"], "has only"),
    (["--p0", "letters:0"], "first n classes"),
    (["--p0", "nosuch"], "unknown data set 'nosuch'"),
    (["--device", "cuda:99"], "not available"),
    (["--net", "vgg"], "unknown network 'vgg'"),
    (["--augment", "rrc"], "no augmentation 'rrc'"),
    (["--dataset", "celebahq"], "no such folder"),
    (["--step"], "expected one argument"),
    (["--nonsense", "1"], "--nonsense"),
])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, outcome, flags, says):
    code, said = outcome(at_gen, "--budget", "smoke", "--data-dir", tmp_path, "--out", tmp_path / "runs",
                         *flags)
    assert code == 2 and says in said and said.count("\n") == 1
    assert not list(tmp_path.rglob("*.pt"))
