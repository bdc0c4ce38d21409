"""The real MNIST and CIFAR-10, where data/ holds them; skipped elsewhere."""
from pathlib import Path

import pytest
import torch

import at_gen
import common
import stochastic_security
from common import load_images

DATA = Path(__file__).resolve().parent.parent / "data"


def real(name):
    if not (DATA / f"{name}.npz").exists():
        pytest.skip(f"no data/{name}.npz")


@pytest.mark.parametrize("name, shape, train, mean", [("mnist", (1, 28, 28), 60_000, 0.1307),
                                                      ("cifar10", (3, 32, 32), 50_000, 0.4734)])
def test_sizes_and_means_are_the_published_ones(name, shape, train, mean):
    real(name)
    for split, n in (("train", train), ("test", 10_000)):
        images = load_images(name, split, DATA)
        assert images.shape == shape and len(images) == n and len(images.y.unique()) == 10
    assert abs(load_images(name, "train", DATA).x.float().mean().item() / 255 - mean) < 2e-3


@pytest.mark.parametrize("name, p0", [("mnist", "letters"), ("cifar10", "noise")])
def test_adversarial_auc_rises_on_real_images(tmp_path, name, p0):
    """Thirty updates against five-step attacks: f learns what separates data from attacked p0."""
    real(name)
    args = at_gen.get_args(["--dataset", name, "--budget", "smoke", "--out", tmp_path, "--device", "cpu", "--k-min", "5",
                            "--k-max", "5", "--iters-per-k", "30", "--batch", "24"])
    data = load_images(name, "train", DATA)
    away = load_images(p0, "train", DATA, *data.shape[:2])
    run = common.Run("at_gen", args)
    at_gen.train_f(run, args.settings, "f", data, away)
    rows = common.read_checkpoint(run.folder / "f.pt")["rows"]
    first, last = (sum(row["auc_adv"] for row in part) / len(part) for part in (rows[:5], rows[-5:]))
    assert last > first + 0.1
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows)


def test_pgd_breaks_a_natural_classifier_of_real_digits(tmp_path):
    """What stochastic_security.py starts from: high natural accuracy, none under PGD at eps .2."""
    real("mnist")
    args = stochastic_security.get_args(["--dataset", "mnist", "--budget", "smoke", "--out", tmp_path, "--device", "cpu"])
    data, test = (load_images("mnist", split, DATA) for split in ("train", "test"))
    run = common.Run("stochastic_security", args)
    f = common.train_classifier(run, "f", lambda: common.make_net("small_cnn", 10, data.shape), data, 120)
    x, y = test.some(100)
    attacked = stochastic_security.pgd(f, x, y, 20, stochastic_security.LInf(0.2, 0.05))
    right = [(f(images).argmax(1) == y).float().mean().item() for images in (x, attacked)]
    assert right[0] > 0.85 and right[1] < 0.2
