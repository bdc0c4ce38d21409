"""common.py: data, networks, checkpoints, command line."""
import csv
import hashlib
import importlib
import json
import os
import subprocess
import sys
import types
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import common
from common import Training, UserError, batches, load_images


def count(net):
    return sum(p.numel() for p in net.parameters())


def digest(images):
    return hashlib.sha256(images.x.numpy().tobytes() + images.y.numpy().tobytes()).hexdigest()


# --- glyphs ---


def test_glyph_sets_have_the_promised_sizes_and_classes():
    for name, classes in (("glyphs", 10), ("letters", 48), ("symbols", 24)):
        train, test = load_images(name, "train"), load_images(name, "test")
        assert train.x.shape == (10_000, 1, 28, 28) and test.x.shape == (2_000, 1, 28, 28)
        assert train.x.dtype == torch.uint8
        assert len(train.y.unique()) == classes == common.IN_MEMORY[name][2]
        assert digest(train)[:8] != digest(test)[:8]


def test_glyphs_show_ink():
    """No blank image, no solid block, nothing cut off at the frame."""
    for name in ("glyphs", "letters", "symbols"):
        x = load_images(name, "test").take(slice(None))
        ink = (x >= 0.5).flatten(1).float().mean(1)
        assert ink.min() > 0.01 and ink.max() < 0.6
        frame = torch.cat([x[..., 0, :], x[..., -1, :], x[..., :, 0], x[..., :, -1]], -1)
        assert frame.mean() < 0.02 and x.amax((1, 2, 3)).min() > 0.4


def test_letters_hold_no_digit_in_disguise():
    assert not set("IOlo") & set(common.LETTERS) and len(set(common.LETTERS)) == 48


def test_glyphs_do_not_depend_on_threads_or_process():
    here = digest(load_images("glyphs", "test"))
    code = ("import torch, hashlib; torch.set_num_threads(1); import common; "
            "d = common.load_images('glyphs', 'test');"
            "print(hashlib.sha256(d.x.numpy().tobytes() + d.y.numpy().tobytes()).hexdigest())")
    root = Path(common.__file__).parent
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root,
                           check=True).stdout
    assert there.strip() == here


@pytest.mark.filterwarnings("error")  # matplotlib warns when it draws a missing character
def test_a_font_without_the_character_is_not_used():
    assert common._glyph_template("DejaVuSans", "8") is not None
    assert common._glyph_template("STIXNonUni", "8") is None      # no digits in this file
    assert common._glyph_template("DejaVuSans", "\U000F1234") is None  # not in the font
    assert common._glyph_template("NoSuchFont", "8") is None
    assert common._glyph_template("DejaVuSans", "\u2003") is None  # in the font, but blank
    with pytest.raises(UserError, match="no font"):
        common.render_glyphs("8\u2003", ("DejaVuSans",), 4, 0)


def test_templates_of_different_characters_differ():
    drawn = [common._glyph_template("DejaVuSans", c) for c in common.DIGITS + common.LETTERS + common.SYMBOLS]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert np.abs(a - b).mean() > 1e-4


# --- archives ---


def test_npz_first_and_channel_size_conversions(write_npz):
    folder = write_npz("cifar10")
    train = load_images("cifar10", "train", folder)
    with np.load(folder / "cifar10.npz") as archive:
        assert np.array_equal(train.x.permute(0, 2, 3, 1).numpy(), archive["x_train"])
    grey = load_images("cifar10", "test", folder, channels=1)
    assert grey.shape == (1, 32, 32)
    colour = load_images("glyphs", "test", folder, channels=3, side=32)
    assert colour.shape == (3, 32, 32) and torch.equal(colour.x[:, 0], colour.x[:, 2])
    x = train.take([0, 1])
    assert x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1


def test_shrinking_smooths_and_keeps_the_mean(write_npz):
    folder = write_npz("tinyimagenet", n=8, side=64)
    big, small = (load_images("tinyimagenet", "train", folder, side=side) for side in (64, 32))
    assert small.shape == (3, 32, 32) and abs(big.take([0]).mean() - small.take([0]).mean()) < 0.01
    assert small.x.float().std() < 0.6 * big.x.float().std()                    # white noise, of which one in two


@pytest.mark.parametrize("replace, says", [
    ({"y_test": None}, "y_test"),
    ({"x_test": None}, "x_test"),
    ({"x_test": np.zeros((96, 32, 32, 3), dtype=np.float32)}, "uint8"),
    ({"x_test": np.zeros((96, 3, 32, 32), dtype=np.uint8)}, "32, 32, 3"),
    ({"x_test": np.zeros((96, 28, 28, 3), dtype=np.uint8)}, "32, 32, 3"),
    ({"x_test": np.zeros((96, 32, 32), dtype=np.uint8)}, "32, 32, 3"),
    ({"y_test": np.full(96, 10)}, "10"),
    ({"y_test": np.full(96, -1)}, "-1"),
    ({"y_test": np.zeros(95, dtype=int)}, "96"),
    ({"y_test": np.zeros(96)}, "float64"),
    ({"x_test": np.zeros((0, 32, 32, 3), dtype=np.uint8), "y_test": np.zeros(0, dtype=int)}, "x_test"),
])
def test_bad_archives_are_named(write_npz, replace, says):
    folder = write_npz("cifar10", **replace)
    with pytest.raises(UserError) as caught:
        load_images("cifar10", "test", folder)
    assert says in str(caught.value) and "cifar10.npz" in str(caught.value) and "\n" not in str(caught.value)
    if "x_train" not in replace:
        assert len(load_images("cifar10", "train", folder)) == 96  # the other split is still good


def test_truncated_and_foreign_files(write_npz):
    folder = write_npz("cifar10")
    file = folder / "cifar10.npz"
    whole = file.read_bytes()
    for content in (whole[:len(whole) // 2], b"not an archive", b""):
        file.write_bytes(content)
        with pytest.raises(UserError, match="not a readable .npz"):
            load_images("cifar10", "train", folder)


def test_missing_file_and_no_network(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route to host")
    for kind in ("MNIST", "FashionMNIST", "CIFAR10", "CIFAR100", "SVHN"):
        monkeypatch.setattr(common.torchvision.datasets, kind, refuse)
    for name in ("mnist", "fashion_mnist", "cifar10", "cifar100", "svhn"):
        with pytest.raises(UserError, match=f"{name}.npz"):
            load_images(name, "train", tmp_path)
    with pytest.raises(UserError, match="tiny-imagenet-200"):
        load_images("tinyimagenet", "train", tmp_path)


@pytest.mark.parametrize("name, made", [
    ("mnist", types.SimpleNamespace(data=torch.zeros(5, 28, 28, dtype=torch.uint8), targets=torch.arange(5))),
    ("cifar10", types.SimpleNamespace(data=np.zeros((5, 32, 32, 3), np.uint8), targets=[0, 1, 2, 3, 4])),
    ("svhn", types.SimpleNamespace(data=np.zeros((5, 3, 32, 32), np.uint8), labels=np.arange(5))),
])
def test_torchvision_sets_come_out_alike(tmp_path, monkeypatch, name, made):
    kind = {"mnist": "MNIST", "cifar10": "CIFAR10", "svhn": "SVHN"}[name]
    monkeypatch.setattr(common.torchvision.datasets, kind, lambda *a, **k: made)
    images = load_images(name, "train", tmp_path)
    assert images.shape == common.IN_MEMORY[name][:1] + common.IN_MEMORY[name][1:2] * 2
    assert images.y.tolist() == [0, 1, 2, 3, 4]


def test_unknown_set_lists_the_known():
    with pytest.raises(UserError, match="glyphs.*cifar10.*imagenet"):
        load_images("nist")


# --- folders of pictures ---


@pytest.fixture
def pictures(tmp_path):
    random = np.random.RandomState(3)
    for i, suffix in enumerate(("png", "jpg", "webp", "PNG", "jpeg")):
        file = tmp_path / "celebahq" / "Training" / ("a" * (i % 2)) / f"{i}.{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.randint(0, 256, (50, 40 + 8 * i, 3), dtype=np.uint8)).save(file)
    return tmp_path


def test_folder_of_pictures(pictures):
    data = load_images("celebahq", "train", pictures, side=32)
    assert len(data) == 5 and data.shape == (3, 32, 32)
    x = data.take(slice(0, 3))
    assert x.shape == (3, 3, 32, 32) and x.dtype == torch.float32 and x.max() <= 1 and x.std() > 0.1


def test_batches_of_pictures_depend_on_seed_and_step_alone(pictures):
    data = load_images("celebahq", "train", pictures, side=16)
    for augment in ("none", "rrc", "mild"):
        whole = [x for x, _ in zip(iter_x(batches(data, 3, 7, augment=augment, workers=0)), range(4))]
        later = next(iter_x(batches(data, 3, 7, start=3, augment=augment, workers=0)))
        apart = next(iter_x(batches(data, 3, 7, start=3, augment=augment, workers=1)))
        assert torch.equal(whole[3], later) and torch.equal(later, apart)
    assert not torch.equal(next(iter_x(batches(data, 5, 7, augment="rrc", workers=0))),
                           next(iter_x(batches(data, 5, 8, augment="rrc", workers=0))))


def iter_x(stream):
    return (x for x, _ in stream)


def test_unreadable_picture_in_a_worker_is_one_line(pictures):
    data = load_images("celebahq", "train", pictures, side=16)
    file = pictures / "celebahq" / "Training" / "0.png"
    file.write_bytes(file.read_bytes()[:300])  # after its header was read
    with pytest.raises(UserError) as caught:
        next(batches(data, 5, 0, workers=1))
    assert "0.png: unreadable image" in str(caught.value) and len(str(caught.value)) < 300


# --- batches ---


def test_batches_visit_every_image_once_an_epoch():
    data = common.Images(torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1), torch.arange(10), "toy")
    stream = batches(data, 4, seed=1)
    seen = torch.cat([next(stream)[1] for _ in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    x, i = next(batches(data, 4, seed=1, start=3))
    assert torch.equal(i, seen[12:16]) and torch.equal((x * 255).round().flatten().long(), i)


def test_crop_flip_against_a_loop():
    x = torch.rand(40, 2, 6, 6)
    out = common.crop_flip(x, seed=5, pad=1)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    flipped = 0
    for image, want in zip(out, padded):
        windows = [want[:, i:i + 6, j:j + 6] for i in range(3) for j in range(3)]
        plain = any(torch.equal(image, w) for w in windows)
        mirrored = any(torch.equal(image, w.flip(2)) for w in windows)
        assert plain or mirrored
        flipped += mirrored
    assert 8 < flipped < 32
    assert torch.equal(out, common.crop_flip(x, seed=5, pad=1))
    assert not torch.equal(out, common.crop_flip(x, seed=6, pad=1))


# --- networks ---


@pytest.mark.parametrize("net, parameters, shape", [
    (lambda: common.MnistCNN(), 3_265_409, (1, 28, 28)),
    (lambda: common.MnistCNN(10), 3_274_634, (1, 28, 28)),
    (lambda: common.ResNet(18, 0.5), 2_795_297, (3, 32, 32)),
    (lambda: common.ResNet(18, 0.75), 6_284_977, (3, 32, 32)),
    (lambda: common.ResNet(18), 11_169_345, (3, 32, 32)),
    (lambda: common.ResNet(50), 23_502_401, (3, 32, 32)),
    (lambda: common.ResNet(50, outputs=10), 23_520_842, (3, 32, 32)),
    (lambda: common.WideResNet(), 36_489_290, None),
    (lambda: common.WideResNet(outputs=100), 36_546_980, None),
    (lambda: common.WideResNet(16, 0.5), None, (3, 32, 32)),
    (lambda: common.LightEBM(), 693_569, None),
    (lambda: common.LightEBM(4), None, (3, 32, 32)),
    (lambda: common.LightEBM(4, 1, 28), None, (1, 28, 28)),
    (lambda: common.SmallCNN(), 70_330, (1, 28, 28)),
    (lambda: common.ResNet(18, 0.125, channels=1), None, (1, 28, 28)),
    (lambda: common.MnistCNN(channels=3, side=32), None, (3, 32, 32)),
    (lambda: common.SNGANEnergy(), 4_204_800, None),
    (lambda: common.SNGANEnergy(side=64), 19_542_720, None),
    (lambda: common.SNGANEnergy(side=128), 38_419_136, None),
    (lambda: common.SNGANEnergy(0.05, 1, 1, 28), None, (1, 28, 28)),
    (lambda: common.SNGANEnergy(0.05, 2, 3, 128), None, (3, 128, 128)),
    (lambda: common.SNGANEnergy(0.02, 1, 3, 224), None, (3, 224, 224)),
])
def test_parameter_counts_and_shapes(net, parameters, shape):
    net = net().eval()
    assert parameters is None or count(net) == parameters
    if shape:
        with torch.no_grad():
            assert net(torch.rand(2, *shape)).shape == (
                2, getattr(getattr(net, "head", None), "out_features", 1))


def test_gaussian_energy_is_minus_the_log_density_of_noisy_images():
    """Up to a constant, times T; the gradient of a Gaussian's energy is precision (x - mean)."""
    torch.manual_seed(2)
    pixels = torch.randint(0, 256, (50, 1, 3, 3)).byte()
    V = common.GaussianEnergy(common.Images(pixels, torch.zeros(50), "some"), 0.1, T=0.5)
    flat = pixels.flatten(1).double() / 255
    covariance = torch.cov(flat.T) + 0.01 * torch.eye(9)
    normal = torch.distributions.MultivariateNormal(flat.mean(0), covariance)
    x = torch.rand(4, 1, 3, 3)
    found, true = V(x), -0.5 * normal.log_prob(x.flatten(1).double())[:, None]
    assert found.shape == (4, 1) and torch.allclose(found - found[0], (true - true[0]).float(), atol=1e-3)


def test_images_from_a_class_on_count_their_classes_anew():
    images = common.Images(torch.arange(6).view(6, 1, 1, 1).byte(), torch.tensor([0, 3, 2, 1, 3, 2]), "some")
    kept = images.from_class(2)
    assert kept.x.flatten().tolist() == [1, 2, 4, 5] and kept.y.tolist() == [1, 0, 1, 0] and kept.name == "some"


def test_train_and_test_have_the_classes_of_the_setting():
    args = SimpleNamespace(dataset="glyphs", data_dir="data", device="cpu", settings=SimpleNamespace(first_class=7))
    whole = common.load_images("glyphs", "test")
    data, test = common.train_and_test(args, 4, 4)
    assert data.y.unique().tolist() == test.y.unique().tolist() == [0, 1, 2]
    assert torch.equal(test.x, whole.x[whole.y >= 7])
    args.settings.first_class = 0
    assert len(common.train_and_test(args, 4, 4)[1]) == len(whole)


def test_without_a_gpu_the_budget_is_cpu_where_there_is_one(monkeypatch, capsys):
    table = common.settings(("glyphs", "cifar10", "cifar10-cpu"), {}, k=(1, 2, 3, "K"))
    for flags, k, budget in (((), 1, "quick"), (("--dataset", "cifar10"), 3, "cpu"),
                             (("--dataset", "cifar10", "--budget", "quick"), 2, "quick")):
        args = common.parse_args("", table, {}, [*flags, "--device", "cpu"])
        said = capsys.readouterr().out
        assert (args.settings.k, args.budget) == (k, budget) and said.count("\n") == (budget == "cpu")
    monkeypatch.setattr(common, "_device", lambda name: "cuda")
    args = common.parse_args("", table, {}, ["--dataset", "cifar10"])
    assert (args.settings.k, args.budget) == (2, "quick")


def test_pretrained_network_keeps_or_replaces_its_head(monkeypatch):
    made = []

    def get_model(name, weights):
        made.append((name, weights))
        return torchvision.models.resnet18(weights=None)
    monkeypatch.setattr(common.torchvision.models, "get_model", get_model)
    kept, new = (common.make_net("pretrained50", n, (3, 64, 64)).eval() for n in (1000, 7))
    x = torch.rand(2, 3, 64, 64)
    assert kept(x).shape == (2, 1000) and new(x).shape == (2, 7) and kept.features(x).shape == (2, 512)
    assert made[0] == ("resnet50", "DEFAULT")
    monkeypatch.setattr(common.torchvision.models, "get_model",
                        lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(UserError, match="no network"):
        common.make_net("efficientnet_b7", 1000, (3, 64, 64))


def test_light_ebm_sees_every_pixel_at_28():
    """The odd sides 7 and 3 on its way down must not lose a border."""
    x = torch.rand(1, 1, 28, 28, requires_grad=True)
    gradient, = torch.autograd.grad(common.LightEBM(8, 1, 28)(x).sum(), x)
    assert (gradient != 0).all()


def test_wide_shortcut_takes_the_raw_input():
    block = common.WideBlock(4, 8, 2).eval()
    for p in block.main.parameters():
        torch.nn.init.zeros_(p)
    x = torch.randn(2, 4, 6, 6)
    assert torch.allclose(block(x), block.shortcut(x)) and block.shortcut(x).shape == (2, 8, 3, 3)


def test_the_stem_pools_before_its_shortcut_and_later_blocks_after():
    """Pooling and a 1x1 convolution commute, so only the order of the layers can tell."""
    net = common.SNGANEnergy(0.05)
    kinds = [[type(m).__name__ for m in block.shortcut.modules() if not list(m.children())] for block in net.body[:-1]]
    assert kinds == [["AvgPool2d", "Conv2d"], ["Conv2d", "AvgPool2d"], ["Identity"], ["Identity"]]
    assert [type(block.main[0]).__name__ for block in net.body[:-1]] == ["Identity", "ReLU", "ReLU", "ReLU"]


def test_inception_features_and_when_they_are_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    colour = SimpleNamespace(shape=(3, 32, 32))
    assert common.feature_network(colour, tmp_path, lambda: "f") == ("FD-cls", "f")
    made = common.InceptionFeatures()
    assert not made.training
    with torch.no_grad():
        assert made.features(torch.rand(1, 1, 32, 32)).shape == (1, 2048)
    torch.save(torchvision.models.inception_v3(weights=None, init_weights=False).state_dict(), tmp_path / made.FILE)
    name, network = common.feature_network(colour, tmp_path, None)
    assert name == "FID" and isinstance(network, common.InceptionFeatures)
    assert common.feature_network(SimpleNamespace(shape=(1, 28, 28)), tmp_path, lambda: "f") == ("FD-cls", "f")
    (tmp_path / made.FILE).write_bytes(b"torn")
    with pytest.raises(UserError, match="inception"):
        common.feature_network(colour, tmp_path, None)


def test_networks_are_frozen_copies_that_follow_when_told(exact):
    net, x = common.SmallCNN(4), torch.rand(3, 1, 28, 28)
    net.train()
    copy = common.frozen_copy(net)
    assert not any(p.requires_grad for p in copy.parameters()) and not copy.net.training
    before = copy(x)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2)
    net(x)                                                                      # moves BatchNorm's statistics
    assert torch.equal(copy(x), before)
    common.follow(copy, net)
    assert torch.allclose(copy(x), net.eval()(x)) and not torch.allclose(copy(x), before)


def test_channels_last_only_where_bfloat16_units_are(monkeypatch):
    """Float32 channels-last convolutions of odd channel counts corrupt the heap on some CPUs."""
    for units in (False, True):
        monkeypatch.setattr(common, "bfloat16_units", lambda device: units)
        weight = common.to_device(common.SmallCNN(4), "cpu").body[3].weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == units


# --- rows, settings, runs ---


SETTINGS = common.settings(
    columns=("glyphs symbols", "cifar10", "cifar10-paper"), smoke=dict(updates=2),
    updates=(10, 20, 300, "updates"), lr=(1, 0.5, 2, "rate, a tenth at 50 %"), name=("a", "of it"))


def figure_7_1(s, number, made):
    """A figure."""
    made.append(number)
    return [common.value("number", number, lr=s.lr), common.value("lesson", 0.5)]


def table_1_10(run, number):
    """A table."""
    run.save(common.plt.figure(), "table1.10")
    return [common.rate("acc", torch.tensor([True, True, False, True]), K=3)]


REGISTRY = common.experiments(headline=[figure_7_1], others=[table_1_10])


def arguments(tmp_path, *flags):
    return common.parse_args("doc", SETTINGS, REGISTRY, ["--out", tmp_path / "runs", "--device", "cpu", *flags])


def test_settings_by_column_budget_and_flag(tmp_path):
    assert SETTINGS["glyphs", "quick"] == SETTINGS["symbols", "quick"]
    assert vars(arguments(tmp_path).settings) == {"updates": 10, "lr": 1.0, "name": "a"}
    assert isinstance(SETTINGS["glyphs", "quick"].lr, float)                    # one value is a float: all are
    assert arguments(tmp_path, "--budget", "smoke").settings.updates == 2
    paper = arguments(tmp_path, "--dataset", "cifar10", "--budget", "paper", "--lr", "1/8").settings
    assert vars(paper) == {"updates": 300, "lr": 0.125, "name": "a"}
    for flags in (["--budget", "paper"], ["--dataset", "nosuch"], ["--only", "nosuch"], ["--updates", "1.5"],
                  ["--lr", "-1"], ["--device", "mps"], ["--seed", str(2 ** 31)], ["--nosuch", "1"]):
        with pytest.raises(UserError, match=flags[0]) if flags[0] != "--only" else pytest.raises(UserError):
            arguments(tmp_path, *flags)
    with pytest.raises(ValueError):
        common.settings(columns=("a", "b"), smoke={}, x=(1, 2, 3, "three values for two columns"))


def test_help_shows_the_value_of_this_dataset_and_budget(tmp_path, capsys):
    for flags, shown in (([], "(10)"), (["--dataset", "cifar10"], "(20)"), (["--budget", "smoke"], "(2)")):
        with pytest.raises(SystemExit):
            arguments(tmp_path, *flags, "--help")
        assert f"updates {shown}" in " ".join(capsys.readouterr().out.split())


def test_bounds_name_the_flag():
    s = SimpleNamespace(k_max=0, tau=0.0, n=3)
    for check in (lambda: common.at_least(1, s, "n k_max"), lambda: common.above_0(s, "n tau"),
                  lambda: common.at_least(1, SimpleNamespace(k_max=float("nan")), "k_max"),
                  lambda: common.above_0(SimpleNamespace(tau=float("inf")), "tau"), lambda: common.check_radius(8.0)):
        with pytest.raises(UserError, match="--k-max|--tau|--eps 8/255"):
            check()
    common.at_least(3, s, "n")
    common.above_0(s, "n")
    common.check_radius(1.0)


def test_a_run_gives_experiments_what_they_name_and_keeps_their_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    (tmp_path / "published.json").write_text(json.dumps({"toy": {"glyphs": {"figure7.1": [
        {"quantity": "number", "value": 41.5, "source": "Fig. 7.1"}, {"quantity": "other", "value": 1, "source": "x"}]}}}))
    made, calls = [], []
    number = common.once(lambda: calls.append(1) or 7)
    chunks = [common.Run("toy", arguments(tmp_path, "--chunk", 100), side).chunk for side in (28, 64, 256, 1024)]
    assert chunks == [100, 25, 1, 1]  # fewer large pictures at once
    run = common.Run("toy", arguments(tmp_path), p0="letters")
    run.experiments(REGISTRY, number=number, made=made)
    assert made == [7] and calls == [1] and number() == 7 and calls == [1]      # made once, when it was needed
    results = json.loads((run.folder / "results.json").read_text())
    assert results["figure7.1"]["rows"] == [{"quantity": "number", "value": 7, "lr": 1.0}, {"quantity": "lesson", "value": 0.5}]
    assert {"seconds", "command", "hardware", "torch", "commit", "dataset", "p0"} <= set(results["figure7.1"])
    assert json.loads((run.folder / "config.json").read_text())["settings"]["updates"] == 10
    said = capsys.readouterr().out
    assert any("number" in line and "41.5" in line and " 7 " in line for line in said.splitlines())
    assert any("other" in line for line in said.splitlines())                   # published, not ours
    run = common.Run("toy", arguments(tmp_path, "--only", "table1.10"))
    run.experiments(REGISTRY, number=number, made=made)
    results = json.loads((run.folder / "results.json").read_text())
    assert set(results) == {"figure7.1", "table1.10"} and made == [7]           # those of before are kept
    assert results["table1.10"]["rows"][0]["interval"] == common.wilson(3, 4)
    assert (run.folder / "table1.10.png").exists()


def test_an_experiment_does_not_depend_on_those_before_it(tmp_path):
    def figure_1(run):
        """Draws."""
        return [common.value("draw", torch.rand(1).item())]

    def figure_2(run):
        """Draws too."""
        return [common.value("draw", torch.rand(1).item())]
    registry = common.experiments([figure_1, figure_2])
    drawn = []
    for only in (["figure1", "figure2"], ["figure2"]):
        args = arguments(tmp_path)
        args.only = only
        run = common.Run("draws", args)
        run.experiments(registry)
        drawn.append(json.loads((run.folder / "results.json").read_text())["figure2"]["rows"][0]["value"])
    assert drawn[0] == drawn[1]


def test_fresh_drops_a_run_s_files_and_no_others(tmp_path):
    run = common.Run("toy", arguments(tmp_path))
    for name in ("a.pt", "log-a.csv", "results.json", "a.png", "notes.txt"):
        (run.folder / name).write_text("")
    (run.shared / "f.pt").write_text("")
    common.Run("toy", arguments(tmp_path, "--fresh"))
    assert os.listdir(run.folder) == ["notes.txt"] and os.listdir(run.shared) == ["f.pt"]


def test_rate_value_and_how_rows_are_shown():
    row = common.rate("acc", torch.tensor([True, True, False, True]), K=75)
    assert row == {"quantity": "acc", "value": 0.75, "interval": common.wilson(3, 4), "n": 4, "K": 75}
    assert common.shown_row(row) == ("acc", "n 4, K 75", "0.75 [0.30, 0.95]")
    assert common.shown_row(common.value("auc", 0.999876))[2] == "0.99988"
    assert common.shown_row(common.value("auc", 0.992, interval=[0.9876, 0.9961]))[2] == "0.992 [0.988, 0.996]"  # narrow
    assert common.shown(12.34567) == "12.35" and common.shown("text") == "text" and common.shown(3) == "3"


def test_intervals_by_drawing_anew():
    x, mean = torch.randn(400), lambda x: x.mean()
    low, high = common.bootstrap(mean, x)
    assert low < x.mean() < high and high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)  # that of a mean
    assert common.bootstrap(mean, x) == [low, high]
    low, high = common.bootstrap(lambda a, b: a.mean() - b.mean(), x, torch.randn(100))
    assert high - low == pytest.approx(2 * 1.96 * (1 / 400 + 1 / 100) ** 0.5, rel=0.2)     # both vary
    low, high = common.bootstrap(mean, x.view(-1, 1).repeat(1, 9))                # 400 images, not 3,600 numbers
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)


def test_an_interval_without_width_is_not_shown():
    """500 draws that all agree are no evidence of precision: an AUROC of 1 on 60 images is not 1 [1, 1]."""
    assert common.shown_row({"quantity": "a", "value": 1.0, "interval": [1.0, 1.0]})[2] == "1"
    assert common.shown_row({"quantity": "a", "value": 0.5, "interval": [0.25, 0.75]})[2] == "0.5 [0.25, 0.75]"


def test_wilson_interval():
    low, high = common.wilson(8, 10)  # Wilson 1927, 95 %
    assert abs(low - 0.4902) < 1e-4 and abs(high - 0.9433) < 1e-4
    assert common.wilson(10, 10)[1] <= 1 + 1e-12


def test_pictures_lines_and_histograms_are_written(tmp_path):
    run = common.Run("toy", arguments(tmp_path))
    drawn = []
    run.save = lambda figure, name: drawn.append((name, figure))
    rows = [common.value("a", 0.1, K=1), common.value("a", 0.2, K=3), common.value("b", 0.5, K=2), common.value("c", 9)]
    rows += [common.rate("d", torch.tensor([True, False] * n), K=n) for n in (5, 50)]
    run.lines("lines", rows, "K", ylim=(0, 1))
    run.histograms("hist", {"left": {"x": torch.rand(9)}, "right": {"x": torch.rand(9), "y": torch.rand(9)}})
    run.pictures("pictures", {"one": 2 * torch.rand(5, 1, 8, 8), "two": torch.rand(3, 3, 8, 8)}, 4)
    assert [name for name, _ in drawn] == ["lines", "hist", "pictures"]
    lines = drawn[0][1].axes[0].get_lines()
    assert [line.get_xydata().tolist() for line in lines] == [[[1, 0.1], [3, 0.2]], [[2, 0.5]], [[5, 0.5], [50, 0.5]]]
    (shade,) = drawn[0][1].axes[0].collections                                  # of d's intervals alone
    for n in (5, 50):
        edges = sorted(y for x, y in shade.get_paths()[0].vertices.tolist() if x == n)
        assert [edges[0], edges[-1]] == pytest.approx(common.wilson(n, 2 * n))
    bars = [patch.get_xy()[:, 0] for patch in drawn[1][1].axes[1].patches]
    assert bars[0].tolist() == bars[1].tolist()                                 # one set of bins for x and y
    assert len(drawn[1][1].axes) == 2 and [a.get_title() for a in drawn[2][1].axes] == ["one", "two"]
    assert drawn[2][1].axes[0].get_images()[0].get_array().max() <= 1


# --- training: checkpoints, logs, resume ---


class Ball(NamedTuple):
    eps: float


def run_in(folder, seed=0, smoke=False):
    folder.mkdir(exist_ok=True)
    return SimpleNamespace(folder=folder, shared=folder, seed=seed, smoke=smoke, device=torch.device("cpu"))


def count_and_draw(folder, total=6, stop=None, seed=0):
    """A training that counts and draws, stopped in update `stop` -> its parts."""
    torch.manual_seed(seed)
    n, net, seen = torch.zeros(1), torch.nn.Linear(1, 1), []
    adam = torch.optim.Adam(net.parameters(), 0.1)
    training = Training(run_in(folder), "count", {"total": total}, n=n, net=net, adam=adam, seen=seen)
    for it in training.updates(total):
        n += it
        seen.append(it)
        adam.zero_grad()
        net(torch.rand(3, 1)).sum().backward()
        adam.step()
        if it == stop:
            raise KeyboardInterrupt
        training.log(a=float(it), b=torch.tensor(2.0 * it), last=it)
    return n.item(), net.weight.item(), seen, training.rows


def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(Training, "SAVE_SECONDS", -1)
    monkeypatch.setattr(Training, "LINES", 2)
    whole = count_and_draw(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        count_and_draw(tmp_path / "torn", stop=5)
    resumed = count_and_draw(tmp_path / "torn", seed=50)                        # another start: all is restored
    assert whole[:3] == resumed[:3] and whole[0] == 21 and whole[2] == [1, 2, 3, 4, 5, 6]
    for folder, rows in (("whole", whole[3]), ("torn", resumed[3])):
        assert [(row["it"], row["a"], row["b"], row["last"]) for row in rows] == [(3, 2.0, 4.0, 3), (6, 5.0, 10.0, 6)]
        with open(tmp_path / folder / "log-count.csv") as file:
            assert [(r["it"], r["a"]) for r in csv.DictReader(file)] == [("3", "2.0"), ("6", "5.0")]
    again = count_and_draw(tmp_path / "whole", seed=9)                          # finished: only restored
    assert again[:3] == whole[:3]


def test_no_checkpoint_is_kept_of_what_has_diverged_since_the_last_line(tmp_path, monkeypatch):
    monkeypatch.setattr(Training, "SAVE_SECONDS", -1)
    monkeypatch.setattr(Training, "LINES", 2)
    n = torch.zeros(1)
    training = Training(run_in(tmp_path), "late", {}, n=n)
    with pytest.raises(common.Diverged):
        for it in training.updates(20):
            n += 1
            training.log(a=float("nan") if it >= 4 else 1.0)                    # the line of update 10 will say so
    state = torch.load(tmp_path / "late.pt", weights_only=True)
    assert state["it"] == state["n"].item() == 3


def test_the_log_is_a_mean_in_double_precision(tmp_path, monkeypatch):
    monkeypatch.setattr(Training, "LINES", 1)
    training = Training(run_in(tmp_path), "mean", {})
    for it in training.updates(4000):
        training.log(a=torch.tensor(0.7), b=0.7, half=torch.tensor(0.75, dtype=torch.bfloat16), last=it)
        if it % 2:
            training.log(odd=torch.tensor(float(it), requires_grad=True))
    row, = training.rows
    assert (row["a"], row["b"], row["half"], row["last"], row["odd"]) == (0.7, 0.7, 0.75, 4000, 2000.0)


def test_two_scripts_that_write_one_file_do_not_meet(tmp_path, monkeypatch):
    file = tmp_path / "f.pt"
    with common.whole_file(file) as mine:
        mine.write_text("mine")
        with monkeypatch.context() as other:
            other.setattr(sys, "argv", ["other.py"])
            with common.whole_file(file) as theirs:
                theirs.write_text("theirs")
        assert file.read_text() == "theirs"
    assert file.read_text() == "mine" and list(tmp_path.iterdir()) == [file]


def test_a_training_stops_at_nonsense_and_keeps_no_checkpoint_of_it(tmp_path):
    for numbers, limits in (({"a": float("nan")}, {}), ({"a": torch.tensor(float("inf"))}, {}), ({"a": -11.0}, {"a": 10})):
        training = Training(run_in(tmp_path), "nan", {}, limits=limits, advice="--lr")
        with pytest.raises(common.Diverged, match="--lr") as stopped:
            for it in training.updates(5):
                training.log(**numbers)
        assert stopped.value.rows and not (tmp_path / "nan.pt").exists()
    for it in (training := Training(run_in(tmp_path), "nan", {}, limits={"a": 10})).updates(5):
        training.log(a=-9.0)
    assert (tmp_path / "nan.pt").exists()


def test_a_training_that_ends_early_is_finished(tmp_path):
    n, seen = torch.zeros(1), []
    for _ in range(2):
        training = Training(run_in(tmp_path), "early", {}, n=n)
        for it in training.updates(9, "epoch"):
            n += it
            seen.append(it)
            if it == 5:
                training.finished = True
    assert seen == [1, 2, 3, 4, 5] and n.item() == 15


def test_a_pause_is_not_training_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(common.time, "time", lambda: now[0])
    training = Training(run_in(tmp_path), "paused", {})
    for it in training.updates(2):
        now[0] += 1
        with training.pause():
            now[0] += 100
        training.log(a=1.0)
    assert [row["seconds"] for row in training.rows] == [1.0, 2.0]


def test_a_checkpoint_of_other_things_is_refused(tmp_path):
    net, x = torch.nn.Linear(2, 2), torch.rand(3)

    def made(run=None, name="made", unique=False, **changes):
        things = {"lr": 1.0, "net": net, "x": x, "chain": partial(count_and_draw, total=3), "ball": Ball(0.1), **changes}
        training = Training(run or run_in(tmp_path), name, things, unique=unique)
        return len(list(training.updates(1)))
    assert made() == 1 and made() == 0                                          # kept, and taken as it is
    changes = ({"lr": 2.0}, {"net": torch.nn.Linear(2, 2)}, {"x": x + 1}, {"chain": partial(count_and_draw, total=4)},
               {"ball": Ball(0.2)}, {"chain": count_and_draw}, {"more": 1})
    for change in changes:
        with pytest.raises(UserError, match=next(iter(change))):
            made(**change)
    with pytest.raises(UserError, match="seed"):
        made(run_in(tmp_path, seed=1))
    assert made(name="own", unique=True) == 1 and made(name="own", unique=True) == 0
    assert made(name="own", unique=True, lr=2.0) == 1 and made(name="own", unique=True) == 0  # another file
    assert made(run_in(tmp_path, smoke=True), "smoke") == 1 and made(name="smoke") == 1       # starts over


def test_data_replaced_by_others_of_the_same_size_are_noticed(tmp_path, write_npz):
    def trained():
        data = load_images("cifar10", "train", write_npz("cifar10"))
        return list(Training(run_in(tmp_path / "runs"), "f", {"images": data}).updates(1))
    assert trained() == [1] and trained() == []
    random = np.random.RandomState(5)
    write_npz("cifar10", x_train=random.randint(0, 256, (96, 32, 32, 3), dtype=np.uint8))
    with pytest.raises(UserError, match="images"):
        data = load_images("cifar10", "train", tmp_path / "data")
        Training(run_in(tmp_path / "runs"), "f", {"images": data})
    x = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    one, other = (common.identity(common.Images(x, torch.arange(4) + k, "toy")) for k in (0, 1))
    assert one != other                                                         # labels count too


def test_pictures_replaced_by_others_are_noticed(pictures):
    data = load_images("celebahq", "train", pictures, side=16)
    before = common.identity(data)
    assert before == common.identity(load_images("celebahq", "train", pictures, side=16))
    os.utime(pictures / "celebahq" / "Training" / "0.png", ns=(1, 1))
    assert common.identity(data) != before


def test_labels_and_size_of_pictures_are_noticed(pictures):
    data = load_images("celebahq", "train", pictures, side=16)
    moved = load_images("celebahq", "train", pictures, side=16)
    moved.folders = ["elsewhere", *moved.folders[1:]]
    larger = load_images("celebahq", "train", pictures, side=17)
    assert len({common.identity(kind) for kind in (data, moved, larger)}) == 3
    with pytest.raises(UserError, match="first-class"):
        data.from_class(2)


def test_unreadable_and_foreign_checkpoints_are_one_line(tmp_path):
    list(Training(run_in(tmp_path), "a", {}).updates(1))
    whole = (tmp_path / "a.pt").read_bytes()
    torch.save({"weights": torch.zeros(1)}, tmp_path / "foreign.pt")
    for content in (whole[:100], b"", (tmp_path / "foreign.pt").read_bytes()):
        (tmp_path / "a.pt").write_bytes(content)
        with pytest.raises(UserError, match="a.pt: not a readable checkpoint"):
            Training(run_in(tmp_path), "a", {})


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    list(Training(run_in(tmp_path), "a", {}, n=torch.ones(1)).updates(1))

    def torn(state, file):
        file.write(b"half")
        raise OSError("disk full")
    monkeypatch.setattr(torch, "save", torn)
    whole = (tmp_path / "a.pt").read_bytes()
    training = Training(run_in(tmp_path), "a", {}, n=torch.ones(1))
    with pytest.raises(UserError, match="a.pt: cannot be written .*disk full"):
        training._save()
    assert (tmp_path / "a.pt").read_bytes() == whole


def test_seeded_functions_depend_on_the_seed_alone_and_leave_others_draws(tmp_path):
    @common.seeded
    def draw(run, scale):
        return scale * torch.rand(3)
    run = run_in(tmp_path, seed=4)
    torch.manual_seed(1)
    first = draw(run, 1)
    after = torch.rand(2)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(2))                                    # as if it had not been called
    assert torch.equal(first, draw(run, 1)) and not torch.equal(first, draw(run_in(tmp_path, seed=5), 1))


# --- a classifier ---


def toy(n=64):
    x = torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8)
    return common.Images(x, torch.arange(n) % 3, "toy")


def classifier(folder, data, name="f", **options):
    run = run_in(folder)
    options = {"iterations": 10, "batch": 16, **options}
    return common.train_classifier(run, name, lambda: common.SmallCNN(4, 3), data, **options)


def test_interrupted_classifier_goes_on_bit_exactly(tmp_path, monkeypatch, exact):
    monkeypatch.setattr(Training, "SAVE_SECONDS", -1)
    data = toy()
    whole = classifier(tmp_path / "whole", data)
    real, seen = Training.log, []

    def dies(self, **numbers):
        seen.append(numbers)
        real(self, **numbers)
        if len(seen) == 4:
            raise KeyboardInterrupt
    monkeypatch.setattr(Training, "log", dies)
    with pytest.raises(KeyboardInterrupt):
        classifier(tmp_path / "torn", data)
    torch.manual_seed(99)
    resumed = classifier(tmp_path / "torn", data)
    assert len(seen) == 4 + 7                                                   # the fourth update was not saved
    assert all(torch.equal(p, q) for p, q in zip(whole.state_dict().values(), resumed.state_dict().values()))
    assert not whole.training and not any(p.requires_grad for p in whole.parameters())


def test_classifier_by_sgd_drops_its_rate_and_trains_on_what_the_adversary_returns(tmp_path, monkeypatch, exact):
    data, rates, SGD = toy(), [], torch.optim.SGD

    class Watched(SGD):
        def step(self, *arguments):
            rates.append(self.param_groups[0]["lr"])
            assert self.defaults["momentum"] == 0.9 and self.defaults["weight_decay"] == 2e-4
            return super().step(*arguments)
    monkeypatch.setattr(torch.optim, "SGD", Watched)
    plain = classifier(tmp_path, data, "plain", sgd=0.1)
    assert rates == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 4)
    same = classifier(tmp_path, data, "same", sgd=0.1, adversary=lambda f, x, y: x)
    other = classifier(tmp_path, data, "other", sgd=0.1, adversary=lambda f, x, y: 1 - x)
    weights = [net.head.weight for net in (plain, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.allclose(weights[0], weights[2])
    with pytest.raises(UserError, match="adversary"):
        classifier(tmp_path, data, "plain", sgd=0.1, adversary=lambda f, x, y: x)


def test_classifier_augments_as_told(tmp_path, monkeypatch, exact):
    seen = []
    monkeypatch.setattr(common, "crop_flip", lambda x, seed, flip: seen.append(flip) or x)
    for augment, expected in (("none", []), ("crop", [False] * 2), ("crop_flip", [True] * 2)):
        seen.clear()
        classifier(tmp_path, toy(), augment, iterations=2, augment=augment)
        assert seen == expected


def test_scripts_share_a_classifier_that_is_trained_alike(tmp_path, monkeypatch):
    data, trained = toy(), []
    real = Training.updates
    monkeypatch.setattr(Training, "updates", lambda self, *a: trained.append(self.name) or real(self, *a))
    for script in ("one", "two"):
        run = run_in(tmp_path / script)
        run.shared = tmp_path
        common.train_classifier(run, "f", lambda: common.SmallCNN(4, 3), data, 2, 16, shared=True)
    assert len(set(trained)) == 1 and len(list(tmp_path.glob("f-*.pt"))) == 1   # one file
    common.train_classifier(run, "f", lambda: common.SmallCNN(4, 3), data, 3, 16, shared=True)
    assert len(list(tmp_path.glob("f-*.pt"))) == 2                              # three updates: another


def test_a_classifier_sees_images_with_noise_and_attacked_ones_after_that(tmp_path):
    data, seen = toy(), []

    def adversary(model, x, y):
        seen.append(x)
        return x
    for name, noise in (("plain", 0.0), ("noisy", 0.5)):
        classifier(tmp_path, data, name, iterations=1, batch=16, noise=noise, adversary=adversary)
    moved = seen[1] - seen[0]
    assert seen[0].max() <= 1 and moved.std().item() == pytest.approx(0.5, rel=0.1) and abs(moved.mean()) < 0.05


# --- the command line as a whole ---


def test_numbers_parse():
    assert common._number("8/255") == 8 / 255 and common._number("0.5") == 0.5
    assert common._number("inf") == float("inf")
    for bad in ("-1", "nan", "x", "1/0", "-1/2"):
        with pytest.raises(common.argparse.ArgumentTypeError):
            common._number(bad)


def test_bad_input_loses_nothing(tmp_path, outcome):
    """A run that fails on its input leaves the results of an earlier one as they were, --fresh or not."""
    import stochastic_security as script
    folder = tmp_path / "runs" / "stochastic_security-glyphs"
    folder.mkdir(parents=True)
    for name in ("results.json", "config.json"):
        (folder / name).write_text('{"kept": {}}')
    (folder / "ebm-4.pt").write_bytes(b"precious")
    flags = ("--out", tmp_path / "runs", "--device", "cpu", "--budget", "smoke", "--only", "figure2.6")
    for more in (("--fresh", "--f-net", "nosuch"), ("--fresh", "--images", "9999999"), ()):
        code, said = outcome(script, *flags, *more)
        assert code == 2 and said.count("\n") == 1
        assert (folder / "ebm-4.pt").read_bytes() == b"precious"
        assert (folder / "config.json").read_text() == (folder / "results.json").read_text() == '{"kept": {}}'
    assert "ebm-4.pt" in said


@pytest.mark.parametrize("script", ["at_gen", "stochastic_security", "fixer", "lifecycle_midrun", "adv_detect", "toy2d"])
def test_list_names_every_experiment_and_its_published_numbers(capsys, monkeypatch, script):
    script = importlib.import_module(script)
    monkeypatch.setattr(sys, "argv", [script.__name__ + ".py"])
    with pytest.raises(SystemExit) as stop:
        script.main(["--list"])
    said = capsys.readouterr().out
    assert not stop.value.code and all(name in said for name in script.EXPERIMENTS)
    if script.__name__ == "stochastic_security":
        with pytest.raises(SystemExit):
            script.main(["--list", "--dataset", "cifar10"])
        assert "0.549" in capsys.readouterr().out


def test_diverged_and_interrupted_runs_have_codes_of_their_own(outcome):
    full = torch.cuda.OutOfMemoryError("Tried to allocate 2 GiB.\nGPU 0 has ...")
    for error, code, says in ((UserError("a"), 2, "a"), (common.Diverged("b"), 1, "b"), (KeyboardInterrupt(), 130, "interrupted"),
                              (full, 2, "--chunk")):
        def main(argv):
            raise error
        ended, err = outcome(SimpleNamespace(main=main))
        assert ended == code and says in err and err.count("\n") == 1
