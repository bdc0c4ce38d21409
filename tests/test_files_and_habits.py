"""What users' files and habits do to a run: the right images and labels, or one clear line."""
import importlib
import os
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import UserError, load_images
from conftest import ROOT


def picture(file, colour=(0, 0, 0), size=(12, 8), **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file, **options)


def labelled(root, split, shades):
    """{class: [shade, ...]} as root/split/class/SHADE.png."""
    for name, greys in shades.items():
        for grey in greys:
            picture(root / split / name / f"{grey}.png", (grey,) * 3)


def shades_and_labels(data):
    images = common.in_memory(data, workers=0)
    return [(int(x.float().mean()), int(y)) for x, y in zip(images.x, images.y)]


def any_run(folder):
    args = types.SimpleNamespace(seed=0, chunk=2, data_dir=folder, device="cpu", budget="smoke", out=folder,
                                 fresh=False, dataset="toy", argv=[])
    return common.Run("any", args)


# --- labels and splits of folders ---


def test_labels_are_places_among_the_classes_of_the_training_split(tmp_path):
    root = tmp_path / "flowers102"
    labelled(root, "train", {"a": [1, 2], "b": [11], "c": [21, 22]})
    labelled(root, "test", {"a": [3], "c": [23]})
    picture(root / "train" / "b" / "deep" / "12.png", (12, 12, 12))
    picture(root / "test" / ".ipynb_checkpoints" / "99.png")
    picture(root / "train" / ".ipynb_checkpoints" / "98.png")
    picture(root / "train" / "a" / "._1.png")
    (root / "train" / "Empty").mkdir()
    train, test = (load_images("flowers102", split, tmp_path, side=8) for split in ("train", "test"))
    assert shades_and_labels(train) == [(1, 0), (2, 0), (11, 1), (12, 1), (21, 2), (22, 2)]
    assert shades_and_labels(test) == [(3, 0), (23, 2)]


@pytest.mark.parametrize("extra, says", [("test/d/1.png", "d is no class"), ("test/1.png", "in no class folder"),
                                         ("train/1.png", "in no class folder")])
def test_a_picture_outside_the_classes_is_refused(tmp_path, extra, says):
    root = tmp_path / "flowers102"
    labelled(root, "train", {"a": [1], "b": [2]})
    labelled(root, "test", {"a": [3], "b": [4]})
    picture(root / extra)
    with pytest.raises(UserError, match=says) as caught:
        common.in_memory(load_images("flowers102", extra.split("/")[0], tmp_path))
    assert extra in str(caught.value)


def test_imagenet_is_tested_on_val_where_its_test_pictures_have_no_labels(tmp_path):
    root = tmp_path / "imagenet"
    labelled(root, "train", {"a": [1], "b": [2]})
    labelled(root, "val", {"a": [3], "b": [4]})
    picture(root / "test" / "ILSVRC_1.png")
    assert shades_and_labels(load_images("imagenet", "test", tmp_path, side=8)) == [(3, 0), (4, 1)]
    (root / "test" / "ILSVRC_1.png").unlink()
    (root / "test").rmdir()
    (root / "val").rename(root / "test")
    assert shades_and_labels(load_images("imagenet", "test", tmp_path, side=8)) == [(3, 0), (4, 1)]


def test_sets_without_labels_need_no_class_folders(tmp_path):
    picture(tmp_path / "celebahq" / "train" / "a" / "1.png")
    picture(tmp_path / "celebahq" / "test" / "2.png")
    for split in ("train", "test"):
        data = common.in_memory(load_images("celebahq", split, tmp_path), workers=0)
        assert data.y.tolist() == [0]


@pytest.mark.parametrize("train, test", [("Train", "Test"), ("training", "validation"), ("TRAIN", "Valid"),
                                         ("train", "val"), ("Training", "testing")])
def test_splits_by_their_usual_names(tmp_path, train, test):
    picture(tmp_path / "celebahq" / train / "1.png")
    picture(tmp_path / "celebahq" / test / "2.png")
    found = [[f.name for f in load_images("celebahq", split, tmp_path).files] for split in ("train", "test")]
    assert found == [["1.png"], ["2.png"]]


def test_a_split_that_is_not_there_is_refused(tmp_path):
    picture(tmp_path / "celebahq" / "train" / "1.png")
    with pytest.raises(UserError, match="no test split"):
        load_images("celebahq", "test", tmp_path)


def test_without_splits_a_tenth_is_held_out_and_said_so(tmp_path, capsys):
    for i in range(200):
        picture(tmp_path / "afhq_cat" / f"{i}.png")
    train, test = ({f.name for f in load_images("afhq_cat", split, tmp_path).files} for split in ("train", "test"))
    assert not train & test and len(train | test) == 200 and 8 < len(test) < 35
    assert "a tenth is to test" in capsys.readouterr().out
    picture(tmp_path / "afhq_cat" / "new.png")  # moves nothing else from one side to the other
    assert test <= {f.name for f in load_images("afhq_cat", "test", tmp_path).files} <= test | {"new.png"}


def test_linked_folders_are_followed_and_each_file_is_read_once(tmp_path):
    root = tmp_path / "flowers102"
    labelled(root, "train", {"a": [1]})
    labelled(tmp_path / "elsewhere", "", {"b": [2]})
    (root / "train" / "b").symlink_to(tmp_path / "elsewhere" / "b")
    (root / "train" / "a" / "again.png").symlink_to(root / "train" / "a" / "1.png")
    for name in ("up", "back"):                                                 # two ways round and round
        (root / "train" / "a" / name).symlink_to(root / "train" / "a")
    assert shades_and_labels(load_images("flowers102", "train", tmp_path, side=8)) == [(1, 0), (2, 1)]


def test_a_replaced_picture_is_another_data_set(tmp_path):
    file = tmp_path / "celebahq" / "train" / "1.png"
    picture(file, (1, 1, 1), compress_level=0)
    before, size = common.identity(load_images("celebahq", "train", tmp_path)), file.stat().st_size
    picture(file, (2, 2, 2), compress_level=0)
    assert file.stat().st_size == size
    assert common.identity(load_images("celebahq", "train", tmp_path)) != before


# --- Tiny ImageNet as it is published, and otherwise ---


@pytest.fixture
def tiny(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    for name in ("n02", "n01"):
        for i in range(3):
            picture(root / "train" / name / "images" / f"{name}_{i}.JPEG", size=(64, 64))
    picture(root / "test" / "images" / "test_0.JPEG", size=(64, 64))
    for i in range(2):
        picture(root / "val" / "images" / f"val_{i}.JPEG", size=(64, 64))
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t62\t62\nval_1.JPEG\tn01\t0\t0\t9\t9\n")
    return root


def tiny_labels(root, split):
    return load_images("tinyimagenet", split, root.parent).y.tolist()


def test_tiny_imagenet_as_published(tiny):
    assert tiny_labels(tiny, "train") == [0, 0, 0, 1, 1, 1] and tiny_labels(tiny, "test") == [1, 0]


def test_tiny_imagenet_with_val_sorted_into_classes(tiny):
    (tiny / "val" / "val_annotations.txt").unlink()
    for i, name in enumerate(("n02", "n01")):
        (tiny / "val" / name / "images").mkdir(parents=True)
        (tiny / "val" / "images" / f"val_{i}.JPEG").rename(tiny / "val" / name / "images" / f"val_{i}.JPEG")
    assert tiny_labels(tiny, "test") == [0, 1]  # sorted by folder


@pytest.mark.parametrize("notes, says", [(None, "images is no class"), ("", "no class"), ("junk\n", "no class"),
                                         ("val_0.JPEG\tn02\nval_1.JPEG\tn77\n", "n77 is no class")])
def test_tiny_imagenet_without_or_with_wrong_annotations(tiny, notes, says):
    (tiny / "val" / "val_annotations.txt").unlink()
    if notes is not None:
        (tiny / "val" / "val_annotations.txt").write_text(notes)
    with pytest.raises(UserError, match=says):
        tiny_labels(tiny, "test")


# --- pixels ---


def pixel(file):
    """The middle pixel of a file as the loader sees it."""
    x = common.picture_tensor(common._open_picture(file), 8)
    return x[:, 4, 4].tolist()


def test_sixteen_bits_of_grey(tmp_path):
    values = np.full((8, 8), 0x8080, np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert pixel(tmp_path / "a.png") == [0x80] * 3


def test_a_picture_that_lies_on_its_side(tmp_path):
    upright = np.zeros((8, 8, 3), np.uint8)
    upright[:4] = 255  # bright above
    lying = Image.fromarray(np.rot90(upright).copy())
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees to the right
    lying.save(tmp_path / "a.png", exif=exif)
    x = common.picture_tensor(common._open_picture(tmp_path / "a.png"), 8)
    assert x[:, :4].min() == 255 and x[:, 4:].max() == 0


@pytest.mark.parametrize("mode, hidden", [("RGBA", (255, 0, 0, 0)), ("LA", (0, 0))])
def test_what_is_transparent_is_white(tmp_path, mode, hidden):
    Image.new(mode, (8, 8), hidden).save(tmp_path / "a.png")
    assert pixel(tmp_path / "a.png") == [255] * 3


def test_a_transparent_colour_of_a_palette_is_white(tmp_path):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "a.png", transparency=0)
    assert pixel(tmp_path / "a.png") == [255] * 3
    image.save(tmp_path / "b.png")
    assert pixel(tmp_path / "b.png") == [10, 20, 30]


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n torn", b"GIF89a"])
def test_broken_files_are_found_before_any_work(tmp_path, content):
    picture(tmp_path / "celebahq" / "train" / "1.png")
    (tmp_path / "celebahq" / "train" / "2.png").write_bytes(content)
    with pytest.raises(UserError, match="2.png: unreadable image"):
        load_images("celebahq", "train", tmp_path)


def test_a_huge_picture_is_found_before_any_work(tmp_path, monkeypatch):
    picture(tmp_path / "celebahq" / "train" / "1.png", size=(40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # an error from twice that on
    with pytest.raises(UserError, match="1.png: unreadable image .DecompressionBombError"):
        load_images("celebahq", "train", tmp_path)


def test_archives_of_zeros_and_ones_are_refused(write_npz):
    folder = write_npz("cifar10", x_train=np.ones((96, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match="0 and 1 only"):
        load_images("cifar10", "train", folder)


def test_a_single_class_is_said(tmp_path):
    data = common.Images(torch.zeros(9, 1, 28, 28, dtype=torch.uint8), torch.full((9,), 3), "toy")
    build = lambda: common.make_net("small_cnn", 10, data.shape)  # noqa: E731
    with pytest.raises(UserError, match="one class"):
        common.train_classifier(any_run(tmp_path), "f", build, data, 2)


@pytest.mark.parametrize("script", ["adv_detect", "gen_classify", "stochastic_security"])
def test_a_single_class_is_one_line(tmp_path, write_npz, outcome, script):
    y = np.full(96, 3)
    folder = write_npz("mnist", side=28, colour=False, y_train=y, y_test=y)
    flags = ("--dataset", "mnist", "--budget", "smoke", "--device", "cpu", "--data-dir", folder, "--out", tmp_path / "out")
    code, err = outcome(importlib.import_module(script), *flags)
    assert code == 2 and "one class" in err and err.count("\n") == 1


def test_svhn_without_scipy_is_said(tmp_path, monkeypatch):
    def lacks(*args, **options):
        raise ModuleNotFoundError("No module named 'scipy'")
    monkeypatch.setattr(common.torchvision.datasets, "SVHN", lacks)
    with pytest.raises(UserError, match="pip install scipy") as caught:
        load_images("svhn", "train", tmp_path)
    assert "mend the network" not in str(caught.value)


# --- writing ---


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_full_disk_leaves_the_old_file_and_no_scratch(tmp_path, error):
    file = tmp_path / "results.json"
    file.write_text("{}")
    with pytest.raises(UserError, match="results.json: cannot be written"):
        with common.whole_file(file) as scratch:
            scratch.write_bytes(b"half")
            raise error
    assert file.read_text() == "{}" and list(tmp_path.iterdir()) == [file]


def test_all_that_a_run_writes_goes_through_whole_files(tmp_path, monkeypatch):
    run = any_run(tmp_path)
    training = common.Training(run, "a", {}, n=torch.ones(1))
    figure = common.plt.figure()

    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    writers = {"a.pt": training._save, "log-a.csv": training._write_log, "b.png": lambda: run.save(figure, "b"),
               "c.json": lambda: common._write_json(run.folder / "c.json", {})}
    for name, write in writers.items():
        with pytest.raises(UserError, match=f"{name}: cannot be written"):
            write()
    assert not list(run.folder.iterdir())


# --- the shell ---


def test_the_home_folder_is_written_as_a_tilde(tmp_path):
    table = common.settings(["glyphs"], {}, updates=(1, "updates"))
    args = common.parse_args("", table, {}, ["--out", "~/a", "--data-dir", "~/b", "--device", "cpu"])
    assert "~" not in f"{args.out}{args.data_dir}" and args.out.name == "a" and args.out.is_absolute()


def test_a_notebook_s_backend_a_plain_terminal_and_a_closed_pipe():
    script = "import common\ncommon.plt.figure()\ncommon.call(lambda: print('\\u0394', *range(99999), sep='\\n'))"
    done = subprocess.run(f"{sys.executable} -c \"{script}\" | head -1", shell=True, cwd=ROOT, capture_output=True,
                          timeout=60, env={**os.environ, "MPLBACKEND": "module://not_installed",
                                           "PYTHONIOENCODING": "ascii"})
    assert done.stdout == b"\\u0394\n" and done.stderr == b"" and done.returncode == 0


@pytest.mark.parametrize("script", ["fixer", "toy2d"])
def test_ctrl_c_during_the_imports_is_quiet(tmp_path, script):
    (tmp_path / "torch.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen([sys.executable, ROOT / f"{script}.py"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert process.stdout.readline() == b"loading\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert err == b"" and process.returncode == -signal.SIGINT


def test_ctrl_c_works_as_before_once_all_is_imported():
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_DFL  # as Python set it, or ignored in a background job
