"""common.py: data, networks, checkpoints, command line."""
import csv
import hashlib
import importlib
import json
import os
import subprocess
import sys
import types
from types import SimpleNamespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import common
from common import UserError, batches, load_checkpoint, load_images, save_checkpoint


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
        ink = common.ink_mask(x).flatten(1).float().mean(1)
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
    assert common.glyph_template("DejaVuSans", "8") is not None
    assert common.glyph_template("STIXNonUni", "8") is None      # no digits in this file
    assert common.glyph_template("DejaVuSans", "\U000F1234") is None  # not in the font
    assert common.glyph_template("NoSuchFont", "8") is None
    assert common.glyph_template("DejaVuSans", "\u2003") is None  # in the font, but blank
    with pytest.raises(UserError, match="no font"):
        common.render_glyphs("8\u2003", ("DejaVuSans",), 4, 0)


def test_templates_of_different_characters_differ():
    drawn = [common.glyph_template("DejaVuSans", c) for c in common.DIGITS + common.LETTERS + common.SYMBOLS]
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


def test_shrinking_by_two_averages_areas(write_npz):
    folder = write_npz("tinyimagenet", n=8, side=64)
    big, small = (load_images("tinyimagenet", "train", folder),
                  load_images("tinyimagenet", "train", folder, side=32))
    mean = big.x.float().view(8, 3, 32, 2, 32, 2).mean((3, 5))
    assert (small.x.float() - mean).abs().max() <= 0.5


@pytest.mark.parametrize("replace, says", [
    ({"y_test": None}, "no test split"),
    ({"x_test": None}, "no test split"),
    ({"x_test": np.zeros((96, 32, 32, 3), dtype=np.float32)}, "expected uint8"),
    ({"x_test": np.zeros((96, 3, 32, 32), dtype=np.uint8)}, "expected uint8"),
    ({"x_test": np.zeros((96, 28, 28, 3), dtype=np.uint8)}, "expected (3, 32, 32)"),
    ({"y_test": np.full(96, 10)}, "from 10 to 10; expected 0 to 9"),
    ({"y_test": np.full(96, -1)}, "expected 0 to 9"),
    ({"y_test": np.zeros(95, dtype=int)}, "expected 96 integers"),
    ({"y_test": np.zeros(96)}, "expected 96 integers"),
    ({"x_test": np.zeros((0, 32, 32, 3), dtype=np.uint8), "y_test": np.zeros(0, dtype=int)}, "empty"),
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
    for kind in ("MNIST", "FashionMNIST", "CIFAR10", "CIFAR100", "SVHN", "Flowers102", "OxfordIIITPet"):
        monkeypatch.setattr(common.torchvision.datasets, kind, refuse)
    for name in ("mnist", "fashion_mnist", "cifar10", "cifar100", "svhn"):
        with pytest.raises(UserError, match=f"{name}.npz"):
            load_images(name, "train", tmp_path)
    for name in ("flowers102", "pets"):
        with pytest.raises(UserError, match="folder there"):
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
    with pytest.raises(UserError, match="known: glyphs.*cifar10.*imagenet.*pets"):
        load_images("nist")


def test_tiny_imagenet_folder(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    for w in ("n01", "n02"):
        (root / "train" / w / "images").mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (64, 64), (10 * i, 0, 0)).save(root / "train" / w / "images" / f"{w}_{i}.JPEG")
    (root / "val" / "images").mkdir(parents=True)
    Image.new("L", (64, 64), 7).save(root / "val" / "images" / "val_0.JPEG")
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t62\t62\n")
    train, test = (load_images("tinyimagenet", s, tmp_path, side=32) for s in ("train", "test"))
    assert train.x.shape == (6, 3, 32, 32)
    assert train.y.tolist() == [0, 0, 0, 1, 1, 1] and test.y.tolist() == [1]


# --- folders of pictures ---


@pytest.fixture
def pictures(tmp_path):
    random = np.random.RandomState(3)
    for i, suffix in enumerate(("png", "jpg", "webp", "PNG", "jpeg")):
        file = tmp_path / "celebahq" / ("a" * (i % 2)) / f"{i}.{suffix}"
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


def test_held_out_pictures_are_not_training_pictures(pictures):
    folder = pictures / "celebahq"
    (folder / "train").mkdir()
    (folder / "0.png").rename(folder / "train" / "0.png")
    with pytest.raises(UserError, match="no test split"):
        load_images("celebahq", "test", pictures)
    (folder / "val").mkdir()
    (folder / "2.webp").rename(folder / "val" / "2.webp")
    assert [len(load_images("celebahq", split, pictures)) for split in ("train", "test")] == [1, 1]


def test_unreadable_picture_in_a_worker_is_one_line(pictures):
    (pictures / "celebahq" / "0.png").write_bytes(b"torn")
    data = load_images("celebahq", "train", pictures, side=16)
    with pytest.raises(UserError) as caught:
        next(batches(data, 5, 0, workers=1))
    assert "0.png: unreadable image" in str(caught.value) and len(str(caught.value)) < 300


def test_folder_errors(tmp_path, pictures):
    with pytest.raises(UserError, match="no such folder"):
        load_images("afhq_cat", "train", tmp_path)
    (tmp_path / "afhq_cat").mkdir()
    with pytest.raises(UserError, match="no png, jpg or webp"):
        load_images("afhq_cat", "train", tmp_path)
    (pictures / "celebahq" / "0.png").write_bytes(b"torn")
    with pytest.raises(UserError, match="0.png: unreadable image"):
        load_images("celebahq", "train", pictures).take(slice(None))


def test_pets_with_trimaps(tmp_path):
    root = tmp_path / "oxford-iiit-pet"
    (root / "images").mkdir(parents=True)
    (root / "annotations" / "trimaps").mkdir(parents=True)
    Image.new("RGB", (60, 48), (200, 10, 10)).save(root / "images" / "cat_1.jpg")
    trimap = np.full((48, 60), 2, np.uint8)
    trimap[:, :30] = 1
    Image.fromarray(trimap).save(root / "annotations" / "trimaps" / "cat_1.png")
    for split in ("trainval", "test"):
        (root / "annotations" / f"{split}.txt").write_text("cat_1 1 1 1\n")
    image, mask = load_images("pets", "train", tmp_path, side=32)[0]
    assert image.shape == (3, 32, 32) and mask.shape == (32, 32) and set(mask.unique().tolist()) == {1, 2}


def test_pictures_in_memory_with_masks_and_with_labels(tmp_path, pictures):
    test_pets_with_trimaps(tmp_path)
    pets = common.load_masks("pets", "", "train", tmp_path, 3, 16)
    assert pets.x.shape == (1, 3, 16, 16) and pets.x.dtype == pets.y.dtype == torch.uint8
    assert pets.y[0, :, :6].min() == 1 and pets.y[0, :, 12:].max() == 0         # the left half is the pet
    data = common.in_memory(load_images("celebahq", "train", pictures, side=16), workers=0)
    folder = [p.parent.name for p in load_images("celebahq", "train", pictures).source]
    assert data.y.tolist() == [sorted(set(folder)).index(name) for name in folder] and set(data.y.tolist()) == {0, 1}


def test_classes_of_a_set():
    whole, part = load_images("letters"), common.load_classes("letters:3-5")
    kept = (whole.y >= 3) & (whole.y <= 5)
    assert torch.equal(part.x, whole.x[kept]) and torch.equal(part.y, whole.y[kept] - 3)
    assert len(common.load_classes("letters")) == len(whole)
    for name in ("letters:3", "letters:3-3", "letters:5-3", "letters:a-b", "letters:90-95", "letters:"):
        with pytest.raises(UserError, match="NAME:a-b"):
            common.load_classes(name)


def test_clutter_only_brightens_and_masks_name_the_digit():
    images = load_images("glyphs", "test")
    made = common.load_masks("glyphs", "", "test")
    assert (made.x >= images.x).all() and (made.x != images.x).flatten(1).any(1).float().mean() > 0.9
    assert torch.equal(made.y > 0, images.take(slice(None))[:, 0] >= 0.5)
    assert all(set(mask.unique().tolist()) == {0, y + 1} for mask, y in zip(made.y[:50], images.y.tolist()))
    changed = (made.x != images.x)[:, 0]
    assert 0.02 < changed.float().mean() < 0.25                                 # two windows of a tenth each
    assert not torch.equal(common.load_masks("glyphs", "", "train").x[:50], made.x[:50])


def test_digits_on_photos(write_npz):
    data = write_npz("cifar10")
    images, made = (load_images("glyphs", "test", side=32), common.load_masks("glyphs", "cifar10", "test", data, 3, 32))
    assert made.x.shape == (2000, 3, 32, 32) and made.x.dtype == torch.uint8
    photos = {tuple(x[:, 0, 0].tolist()) for x in load_images("cifar10", "test", data).x}
    assert all(tuple(x[:, 0, 0].tolist()) in photos for x in made.x[:20])       # no ink in the corner
    inked = (images.x[:20, 0] == 255)
    spread = [x[:, m].float().std(1).mean() for x, m in zip(made.x[:20], inked) if m.sum() > 5]
    assert spread and max(spread) < 30                                                     # noise at a quarter: 74 / 4
    assert torch.equal(made.y > 0, images.x[:, 0] >= 128)


def test_image_and_mask_are_cropped_alike():
    array = np.zeros((60, 80), np.uint8)
    array[20:40, 30:60] = 255
    picture, mask = Image.fromarray(array).convert("RGB"), Image.fromarray(array)
    for seed in range(5):
        a = common.picture_tensor(picture, 32, "rrc", seed)[0] > 127
        b = common.picture_tensor(mask, 32, "rrc", seed, mask=True) > 127
        assert (a != b).float().mean() < 0.1


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
    (lambda: common.ResBlockD(256), 20_851_777, None),
    (lambda: common.ResBlockD(256, 1000), 21_364_264, None),
    (lambda: common.ResBlockD(64), None, (3, 64, 64)),
    (lambda: common.PlainCNN(8), None, (1, 28, 28)),
    (lambda: common.PlainCNN(8, channels=3, side=32), None, (3, 32, 32)),
    (lambda: common.ResNet(18, 0.125, channels=1), None, (1, 28, 28)),
    (lambda: common.MnistCNN(channels=3, side=32), None, (3, 32, 32)),
    (lambda: common.SNGANEnergy(), 4_204_800, None),
    (lambda: common.SNGANEnergy(side=64), 19_542_720, None),
    (lambda: common.SNGANEnergy(side=128), 38_419_136, None),
    (lambda: common.SNGANEnergy(0.05, 1, 1, 28), None, (1, 28, 28)),
    (lambda: common.SNGANEnergy(0.05, 2, 3, 128), None, (3, 128, 128)),
    (lambda: common.BigGANEnergy(), 4_289_605, None),
    (lambda: common.BigGANEnergy(4), None, (3, 224, 224)),
])
def test_parameter_counts_and_shapes(net, parameters, shape):
    net = net().eval()
    assert parameters is None or count(net) == parameters
    if shape:
        with torch.no_grad():
            assert net(torch.rand(2, *shape)).shape == (
                2, getattr(getattr(net, "head", None), "out_features", 1))


@pytest.mark.parametrize("side, parameters", [(28, None), (32, 4_276_739), (64, 12_220_675), (128, 32_150_787)])
def test_generators_have_the_published_size_and_make_images(side, parameters):
    if parameters:
        assert sum(p.numel() for p in common.SNGANGenerator(side=side).parameters()) == parameters
    x = common.SNGANGenerator(0.03, 1, side)(torch.randn(2, 128))
    assert x.shape == (2, 1, side, side) and 0 <= x.min() and x.max() <= 1


def test_the_stem_pools_before_its_shortcut_and_later_blocks_after():
    """Pooling and a 1x1 convolution commute, so only the order of the layers can tell."""
    net = common.SNGANEnergy(0.05)
    kinds = [[type(m).__name__ for m in block.shortcut] for block in net.body[:-1]]
    assert kinds == [["AvgPool2d", "Conv2d"], ["Conv2d", "AvgPool2d"], [], []]
    assert [type(block.main[0]).__name__ for block in net.body[:-1]] == ["Conv2d", "ReLU", "ReLU", "ReLU"]


def test_spectral_norm_is_the_largest_singular_value():
    torch.manual_seed(0)
    net = common.SNGANEnergy(0.03, 1, 1, 28)
    before = {k: v.detach().flatten(1) for k, v in net.named_parameters() if v.ndim > 1}
    common.spectral(net).train()
    for _ in range(200):                                                        # one power iteration each
        net(torch.rand(1, 1, 28, 28))
    checked = 0
    for name, module in net.named_modules():
        if name + ".weight" in before:
            weight = before[name + ".weight"]
            expected = weight / torch.linalg.svdvals(weight)[0]
            assert torch.allclose(module.weight.flatten(1), expected, atol=1e-3), name
            checked += 1
    assert checked == len(before) == 11                                         # 8 of 3x3, 2 of 1x1, the head


def test_unet_keeps_the_size_and_sees_far():
    net, x = common.UNet(4, 3, 1).eval(), torch.rand(1, 1, 28, 28, requires_grad=True)
    out = net(x)
    assert out.shape == (1, 3, 28, 28)
    gradient, = torch.autograd.grad(out[0, 0, 14, 14], x)
    rows = gradient[0, 0].abs().sum(1).nonzero()[:, 0]
    assert rows.min() <= 2 and rows.max() >= 25
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in common.UNet(4, 1, 1, norm=False).modules())
    assert common.make_net("score", 7, (3, 32, 32), 0.25)(torch.rand(2, 3, 32, 32)).shape == (2, 3, 32, 32)


def test_smoothed_replaces_every_relu_of_an_energy():
    V, x = common.SNGANEnergy(0.05, 1, 1, 28), torch.rand(2, 1, 28, 28)
    assert torch.allclose(common.smoothed(V, 1e5)(x), V(x), atol=1e-5)
    assert (common.smoothed(V, 1.0)(x) - V(x)).abs().min() > 1e-5
    kinds = [type(m).__name__ for m in common.smoothed(V, 5).modules()]
    assert "ReLU" not in kinds and kinds.count("SmoothLeakyReLU") == 8
    assert sum(isinstance(m, torch.nn.ReLU) for m in V.modules()) == 8          # the original keeps its own


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


def test_residual_d_wants_a_power_of_two():
    with pytest.raises(UserError, match="powers of two"):
        common.ResBlockD(100)


def test_inception_features(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    assert common.InceptionFeatures.at_hand(tmp_path) is None
    made = common.InceptionFeatures()
    assert not made.training
    with torch.no_grad():
        assert made.features(torch.rand(1, 1, 32, 32)).shape == (1, 2048)
    (tmp_path / made.FILE).write_bytes(b"torn")
    assert common.InceptionFeatures.at_hand(tmp_path) == tmp_path / made.FILE
    with pytest.raises(UserError, match="not torchvision's Inception"):
        common.InceptionFeatures(tmp_path / made.FILE)


def test_feature_maps_are_a_layer_s_output_with_the_network_s_own_weights():
    for name, layer, cut in (("small_cnn", "body.8", 9), ("wrn16", "body.4", 5)):
        shape = (1, 28, 28) if name == "small_cnn" else (3, 32, 32)
        net, x = common.make_net(name, 10, shape, 0.5).eval(), torch.rand(2, *shape)
        maps = common.feature_maps(net, layer)
        assert torch.allclose(maps(x), net.body[:cut](2 * x - 1), atol=1e-5)
        with torch.no_grad():
            net.body[0].weight += 0.1                                           # as training would
        assert torch.allclose(maps(x), net.body[:cut](2 * x - 1), atol=1e-5)
        with pytest.raises(UserError, match="no feature maps at layer 'body.99'"):
            common.feature_maps(net, "body.99")


def test_the_fixer_has_an_sngan_generator_s_blocks_without_up_sampling():
    net = common.make_net("fixer", 1, (3, 32, 32))
    assert sum(p.numel() for p in net.parameters()) == 300_099
    block, x = common.GBlock(4, 4, up=False), torch.rand(2, 4, 5, 5)
    assert block(x).shape == x.shape and torch.allclose(block(x) - block.main(x), x, atol=1e-6)


# --- checkpoints and numbers ---


def test_checkpoint_restores_the_generator_and_refuses_other_settings(tmp_path):
    file = tmp_path / "a.pt"
    assert load_checkpoint(file, {}) is None
    save_checkpoint(file, {"lr": 1.0}, it=3)
    after = torch.rand(4)
    assert load_checkpoint(file, {"lr": 1.0})["it"] == 3
    assert torch.equal(torch.rand(4), after)
    with pytest.raises(UserError, match=r"lr 1.0 \(now 2.0\)"):
        load_checkpoint(file, {"lr": 2.0})
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_checkpoint(file, {"lr": 1.0})


def test_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    file = tmp_path / "a.pt"
    save_checkpoint(file, {}, it=1)

    def torn(state, where):
        Path(where).write_bytes(b"half")
        raise OSError("disk full")
    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError):
        save_checkpoint(file, {}, it=2)
    assert load_checkpoint(file, {})["it"] == 1


def test_wilson_interval():
    low, high = common.wilson(8, 10)  # Wilson 1927, 95 %
    assert abs(low - 0.4902) < 1e-4 and abs(high - 0.9433) < 1e-4
    assert common.wilson(10, 10)[1] <= 1 + 1e-12


def test_flags_take_their_help_from_the_settings(capsys):
    import at_gen
    with pytest.raises(SystemExit):
        at_gen.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--k-max VALUE N of Alg. 3" in said and "--eps VALUE radius of the ball" in said


def test_interrupted_classifier_goes_on_bit_exactly(tmp_path, monkeypatch):
    import at_gen

    def classifier(folder):
        args = at_gen.get_args(["--budget", "smoke", "--out", str(tmp_path / folder), "--device", "cpu"])
        data = load_images("glyphs", "test")
        return common.train_classifier(common.Run("at_gen", args), data, 10, "mnist_cnn", 1.0, 5)
    whole = classifier("whole")
    real, saves = common.save_checkpoint, []

    def dies(*args, **state):
        real(*args, **state)
        saves.append(state["it"])
        if len(saves) == 3:
            raise KeyboardInterrupt
    monkeypatch.setattr(common, "save_checkpoint", dies)
    with pytest.raises(KeyboardInterrupt):
        classifier("torn")
    monkeypatch.setattr(common, "save_checkpoint", real)
    resumed = classifier("torn")
    assert saves == [1, 2, 3]
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters()))


def test_classifier_by_sgd_drops_its_rate_and_trains_on_what_the_adversary_returns(tmp_path, monkeypatch):
    import at_gen
    args = at_gen.get_args(["--budget", "smoke", "--out", str(tmp_path), "--device", "cpu"])
    data, rates, SGD = load_images("glyphs", "test"), [], torch.optim.SGD

    class Watched(SGD):
        def step(self, *arguments):
            rates.append(self.param_groups[0]["lr"])
            assert self.defaults["momentum"] == 0.9 and self.defaults["weight_decay"] == 2e-4
            return super().step(*arguments)
    monkeypatch.setattr(torch.optim, "SGD", Watched)

    def train(name, adversary=None):
        return common.train_classifier(common.Run("at_gen", args), data, 10, "small_cnn", 0.25, 10, name, 0.1,
                                       16, adversary=adversary, made_with={"at": adversary is not None})
    plain = train("plain")
    assert rates == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 4)
    same, other = train("same", lambda f, x, y: x), train("other", lambda f, x, y: 1 - x)
    weights = [net.head.weight for net in (plain, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.allclose(weights[0], weights[2])
    with pytest.raises(UserError, match="at False"):
        train("plain", lambda f, x, y: x)


def counting(folder, parts, total=6, stop=None, rows=None):
    """A training that counts and draws: parts n and a module."""
    run = SimpleNamespace(folder=folder)
    for it, row in common.updates(run, "count", total, {"seed": 0}, parts, ("a",), 4, 2):
        parts["n"] += it
        parts["net"].weight.data += torch.rand(1)
        if it == stop:
            raise KeyboardInterrupt
        row["a"] = float(it)


def test_updates_resume_log_means_and_stop_at_nonsense(tmp_path):
    def parts():
        return {"n": torch.zeros(1), "net": torch.nn.Linear(1, 1)}
    finished = []
    for name, stop in (("whole", None), ("broken", 4)):
        torch.manual_seed(0)
        (tmp_path / name).mkdir()
        made = parts()
        if stop:
            with pytest.raises(KeyboardInterrupt):
                counting(tmp_path / name, made, stop=stop)
            torch.manual_seed(50)
            made = parts()
        counting(tmp_path / name, made)
        finished.append((made["n"].item(), made["net"].weight.item()))
        with open(tmp_path / name / "log-count.csv") as file:
            rows = list(csv.DictReader(file))
        assert [(row["it"], row["a"]) for row in rows] == [("4", "2.5"), ("6", "5.5")]  # means since the last
    assert finished[0] == finished[1] and finished[0][0] == 21
    again = parts()
    counting(tmp_path / "whole", again)                                         # done: only restored
    assert again["n"].item() == 21
    made = parts()
    with pytest.raises(common.Diverged, match="update 1"):
        for it, row in common.updates(SimpleNamespace(folder=tmp_path), "nan", 5, {}, made, ("a",), 4, 2):
            row["a"] = float("nan")
    assert not (tmp_path / "nan.pt").exists()


def test_updates_that_finish_early_are_finished(tmp_path):
    made, seen = {"n": torch.zeros(1)}, []
    for _ in range(2):
        for it, row in common.updates(SimpleNamespace(folder=tmp_path), "early", 9, {}, made, ("a",), 4, 4, unit="epoch"):
            made["n"] += it
            seen.append(it)
            row |= {"a": float(it), "stop": it == 5}
    assert seen == [1, 2, 3, 4, 5] and made["n"].item() == 15
    with open(tmp_path / "log-early.csv") as file:
        assert [(row["it"], row["a"]) for row in csv.DictReader(file)] == [("4", "2.5"), ("5", "5.0")]


def test_class_colours():
    mask = torch.tensor([[[0, 1], [2, 11]]])
    x = common.class_colours(mask)
    assert x.shape == (1, 3, 2, 2) and x[0, :, 0, 0].sum() == 0 and torch.equal(x[0, :, 0, 1], x[0, :, 1, 1])
    assert not torch.equal(x[0, :, 0, 1], x[0, :, 1, 0])


def test_throughput_leaves_the_generator_alone():
    def sampler(x, steps):
        return x + torch.randn_like(x), x.mean()
    torch.manual_seed(4)
    before = torch.get_rng_state()
    assert common.throughput(sampler, torch.rand(3, 1), 0.01) > 0
    torch.manual_seed(4)
    torch.rand(3, 1)
    after = torch.get_rng_state()
    torch.manual_seed(4)
    x = torch.rand(3, 1)
    common.throughput(sampler, x, 0.01)
    assert torch.equal(torch.get_rng_state(), after) and not torch.equal(before, after)


def test_rate_has_its_interval():
    rows = common.rate("acc", torch.tensor([True, True, False, True]))
    assert rows == {"acc": 0.75, "acc, 95 %": common.wilson(3, 4)}


def test_numbers_parse():
    assert common.number("8/255") == 8 / 255 and common.number("0.5") == 0.5
    assert common.number("inf") == float("inf")
    for bad in ("-1", "nan", "x", "1/0", "-1/2"):
        with pytest.raises(Exception, match="at least 0|not a number"):
            common.number(bad)


def test_bad_input_loses_nothing(tmp_path, outcome):
    """A run that fails on its input leaves the results of an earlier one as they were, --fresh or not."""
    import at_gen
    folder = tmp_path / "runs" / "at_gen-glyphs"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text("{}")
    (folder / "f.pt").write_bytes(b"precious")
    code, _ = outcome(at_gen, "--fresh", "--p0", "nosuch", "--out", tmp_path / "runs")
    assert code == 2 and (folder / "f.pt").read_bytes() == b"precious"
    code, said = outcome(at_gen, "--budget", "smoke", "--out", tmp_path / "runs", "--device", "cpu",
                         "--only", "figure2.7")
    assert code == 2 and "not a readable checkpoint" in said and (folder / "f.pt").read_bytes() == b"precious"


@pytest.mark.parametrize("script, number", [("at_gen", "13.21"), ("stochastic_security", "0.549")])
def test_list_names_every_experiment(capsys, script, number):
    script = importlib.import_module(script)
    with pytest.raises(SystemExit) as stop:
        script.main(["--list"])
    said = capsys.readouterr().out
    assert not stop.value.code and all(name in said for name in script.EXPERIMENTS) and number in said


def test_results_of_other_experiments_are_kept(tmp_path, outcome):
    import toy2d
    for name in ("figure2.1", "figure2.2"):
        assert outcome(toy2d, "--budget", "smoke", "--out", tmp_path, "--only", name)[0] == 0
    results = json.loads((tmp_path / "toy2d-gaussian" / "results.json").read_text())
    assert set(results) == {"figure2.1", "figure2.2"}
    assert not [f for f in os.listdir(tmp_path / "toy2d-gaussian") if f.endswith(".tmp")]
