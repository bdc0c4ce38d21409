r"""What all nine scripts share: data loaders, network architectures, and the plumbing of a command-line run.

Nothing of any method is here: objectives, attacks, samplers, training loops and metrics stand in the scripts.

Images are float32 in [0, 1], NCHW, wherever a function takes or returns them; in memory they are uint8.
Networks scale or normalise inside their own forward. Whatever a user can get wrong raises UserError, which a
script turns into one line on stderr and exit code 2 before any work.

    1. data          load_images("glyphs", "train") -> Images (in memory) or Pictures (files, by a DataLoader)
    2. networks      make_net(name): classifiers, energies (LightEBM, SNGANEnergy, BigGANEnergy), U-Net, ...
    3. checkpoints   save_checkpoint, load_checkpoint
    4. command line  parse_args, Run (folder, log.csv, results.json, closing table)
"""
import argparse
import contextlib
import copy
import csv
import dataclasses
import functools
import inspect
import itertools
import json
import math
import os
import platform
import re
import shlex
import sys
import time
from fractions import Fraction
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as T
from torchvision.utils import make_grid

matplotlib.use("Agg")  # files only: the same picture with and without a screen
import matplotlib.pyplot as plt  # noqa: E402 (after the choice of the backend)


class UserError(Exception):
    """Something the user can mend: main() prints it in one line on stderr and exits with code 2."""


class Diverged(Exception):
    """A training run whose numbers went out of bounds: what was seen, what to try; .rows is its log."""

    def __init__(self, message, rows=()):
        super().__init__(message)
        self.rows = rows


# --- 1. data ------------------------------------------------------------------------------------------------

IN_MEMORY = {  # name: (channels, side, classes); NAME.npz in --data-dir first, else made or downloaded
    "glyphs": (1, 28, 10), "letters": (1, 28, 48), "symbols": (1, 28, 24),
    "mnist": (1, 28, 10), "fashion_mnist": (1, 28, 10), "noise": (1, 28, 1),
    "cifar10": (3, 32, 10), "cifar100": (3, 32, 100), "svhn": (3, 32, 10), "tinyimagenet": (3, 64, 200),
}
FOLDERS = ("celebahq", "afhq_cat", "lsun_church", "imagenet")  # any nesting of png, jpg, webp files
TORCHVISION = {"flowers102": "Flowers102", "pets": "OxfordIIITPet"}
P0 = {  # the out-distribution p0 for an in-distribution set (80 Million Tiny Images is withdrawn: unused)
    "glyphs": "letters", "mnist": "letters", "fashion_mnist": "letters", "cifar10": "tinyimagenet",
    "cifar100": "tinyimagenet", "svhn": "tinyimagenet", "celebahq": "imagenet", "afhq_cat": "imagenet",
    "lsun_church": "imagenet",
}
DIGITS = "0123456789"
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnpqrstuvwxyz"  # without I, O, l, o: those are a 1 and a 0
SYMBOLS = "#$%&+=<>?@{}~!" + "\u0393\u0394\u0398\u03a3\u03a9\u03b1\u03b2\u03bb\u221e\u2192"
TEXT_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold",
              "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol",
              "STIXGeneralItalic", "STIXGeneralBolIta", "cmr10", "cmb10", "cmss10", "cmtt10")
SYMBOL_FONTS = TEXT_FONTS[:12]  # in the Computer Modern files these code points hold other signs


@dataclasses.dataclass
class Images:
    """A data set in memory: x uint8 [N, C, H, W] on `device`, y int64 [N], and the name of its source."""
    x: torch.Tensor
    y: torch.Tensor
    name: str

    def __len__(self):
        return len(self.x)

    @property
    def shape(self):
        return tuple(self.x.shape[1:])

    def take(self, index):
        """Images of these indices (tensor, list or slice) as float32 [B, C, H, W] in [0, 1]."""
        return self.x[index].float() / 255

    def to(self, device):
        return Images(self.x.to(device), self.y.to(device), self.name)


@functools.lru_cache(maxsize=None)
def glyph_template(font, char):
    """One character: float64 [64, 64] in [0, 1], longer side 44 pixels, centred; None if a font lacks it."""
    from matplotlib.ft2font import FT2Font
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    if not file.exists():
        return None
    face, size = FT2Font(str(file)), 64.0
    if ord(char) not in face.get_charmap():  # FreeType would draw an empty box in its place
        return None
    for _ in range(2):  # measure, then draw at the size that makes the longer side 44
        face.set_size(size, 72)
        face.set_text(char)
        face.draw_glyphs_to_bitmap(antialiased=True)
        bitmap = np.asarray(face.get_image(), dtype=np.float64) / 255
        ink = np.argwhere(bitmap > 0.2)
        if len(ink) < 8:  # blank
            return None
        (top, left), (bottom, right) = ink.min(0), ink.max(0) + 1
        size *= 44 / max(bottom - top, right - left)
    glyph = bitmap[top:bottom, left:right][:60, :60]
    h, w = glyph.shape
    canvas = np.zeros((64, 64))
    canvas[(64 - h) // 2:(64 - h) // 2 + h, (64 - w) // 2:(64 - w) // 2 + w] = glyph
    return canvas


def render_glyphs(chars, fonts, n, seed, side=28):
    """n random characters -> uint8 [n, 1, side, side] (white on black), labels int64 [n] (index in `chars`).

    Random font, size (16 to 22 pixels of 28), rotation (12 degrees), shear (.15) and shift (2 pixels). The
    random stream is RandomState's, which NumPy keeps frozen, and the warp runs in float64: the same bytes on
    every machine that has the same matplotlib (its fonts and its FreeType).
    """
    pairs = [(c, t) for c, char in enumerate(chars) for font in fonts
             if (t := glyph_template(font, char)) is not None]
    owner = np.array([c for c, _ in pairs])
    if len(set(owner)) < len(chars):
        lacking = [c for i, c in enumerate(chars) if i not in set(owner)]
        raise UserError(f"glyphs: no font of this matplotlib ({matplotlib.__version__}) draws {lacking}; "
                        "reinstall it")
    templates = torch.from_numpy(np.stack([t for _, t in pairs]))[:, None]  # [M, 1, 64, 64]
    random = np.random.RandomState(seed)
    label = random.randint(len(chars), size=n)
    first = np.searchsorted(owner, label)  # each character's drawings stand together
    count = np.searchsorted(owner, label, side="right") - first
    which = torch.from_numpy(first + np.floor(random.rand(n) * count).astype(np.int64))
    u = torch.from_numpy(random.rand(5, n) * 2 - 1)
    scale = 64 / 44 * side / 28 * (19 + 3 * u[0]) / side  # size of the drawing relative to the target frame
    angle, shear, shift = u[1] * math.pi / 15, u[2] * 0.15, u[3:] * 2 * 2 / 28
    cos, sin = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack([torch.stack([cos, sin + shear * cos, shift[0]], -1),
                         torch.stack([-sin, cos - shear * sin, shift[1]], -1)], 1)  # [n, 2, 3]
    out = []
    for t, k in zip(theta.split(2000), which.split(2000)):  # two samples a pixel and side: no aliasing
        grid = F.affine_grid(t, (len(t), 1, 2 * side, 2 * side), align_corners=False)
        warped = F.avg_pool2d(F.grid_sample(templates[k], grid, align_corners=False), 2)
        out.append((warped.clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.cat(out), torch.from_numpy(label)


def ink_mask(images):
    """Segmentation mask of rendered glyphs: float [B, 1, H, W] in [0, 1] -> bool, true where there is ink."""
    return images >= 0.5


def ink_classes(images):
    """Masks uint8 [N, S, S] of grey Images: 0, or class + 1 where there is ink."""
    return (ink_mask(images.take(slice(None)))[:, 0] * (images.y[:, None, None] + 1)).to(torch.uint8)


@functools.lru_cache(maxsize=8)
def made_here(name, split, channels=1, side=28):
    """Sets without a file: rendered digits, letters and symbols (10,000 train, 2,000 test), uniform noise."""
    n, offset = (10_000, 0) if split == "train" else (2_000, 1)
    if name == "noise":
        x = np.random.RandomState(77 + offset).randint(0, 256, (n, channels, side, side), dtype=np.uint8)
        return torch.from_numpy(x), torch.zeros(n, dtype=torch.long)
    chars, fonts, seed = {"glyphs": (DIGITS, TEXT_FONTS, 10), "letters": (LETTERS, TEXT_FONTS, 20),
                          "symbols": (SYMBOLS, SYMBOL_FONTS, 30)}[name]
    return render_glyphs(chars, fonts, n, seed + offset)


def read_npz(file, split, classes):
    """x (N, H, W[, 3]) uint8, y (N,) of a split of a Keras-style archive -> uint8 [N, C, H, W], int64 [N]."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            absent = [k for k in (f"x_{split}", f"y_{split}") if k not in archive.files]
            if absent:
                raise UserError(f"{file}: no {split} split (lacks {', '.join(absent)}; "
                                f"has {', '.join(archive.files)})")
            x, y = archive[f"x_{split}"], archive[f"y_{split}"]
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib, OSError, ValueError: a torn or foreign file fails many ways
        raise UserError(f"{file}: not a readable .npz file ({type(error).__name__}: {error})") from None
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in (1, 3)):
        raise UserError(f"{file}: x_{split} is {x.dtype} {x.shape}; expected uint8 (N, H, W) or (N, H, W, 3)")
    y = y.reshape(-1)
    if len(y) != len(x) or not np.issubdtype(y.dtype, np.integer):
        raise UserError(f"{file}: y_{split} is {y.dtype} ({len(y)},); expected {len(x)} integers")
    if not len(x):
        raise UserError(f"{file}: the {split} split is empty")
    if y.min() < 0 or y.max() >= classes:
        raise UserError(f"{file}: labels of y_{split} run from {y.min()} to {y.max()}; "
                        f"expected 0 to {classes - 1}")
    x = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(y.astype(np.int64))


def first_line(error):
    """An exception in few words."""
    return (f"{type(error).__name__}: {str(error).strip().splitlines()[0][:80]}" if str(error).strip() else
            type(error).__name__)


def download(name, split, data_dir):
    """Read a small set with torchvision, downloading it where needed -> uint8 [N, C, H, W], int64 [N]."""
    kind = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100",
            "svhn": "SVHN"}[name]
    which = {"split": split} if name == "svhn" else {"train": split == "train"}
    try:
        made = getattr(torchvision.datasets, kind)(str(data_dir), download=True, **which)
    except Exception as error:
        raise UserError(f"{name}: no {data_dir / name}.npz, and the download failed ({first_line(error)}); "
                        "put an .npz with x_train, y_train, x_test, y_test there (x uint8 (N, H, W[, 3])), "
                        "or mend the network") from None
    x = torch.as_tensor(np.asarray(made.data))
    y = torch.as_tensor(np.asarray(made.labels if name == "svhn" else made.targets)).long()
    x = x[:, None] if x.ndim == 3 else x if name == "svhn" else x.permute(0, 3, 1, 2)
    return x.contiguous(), y


def read_tiny_imagenet(folder, split):
    """The published tiny-imagenet-200 folder -> uint8 [N, 3, 64, 64], int64 [N]; val is our test split."""
    classes = {w: i for i, w in enumerate(sorted(p.name for p in (folder / "train").iterdir() if p.is_dir()))}
    if split == "train":
        rows = [(p, classes[p.parent.parent.name])
                for p in sorted((folder / "train").glob("*/images/*.JPEG"))]
    else:
        notes = (folder / "val" / "val_annotations.txt").read_text().splitlines()
        rows = [(folder / "val" / "images" / r.split("\t")[0], classes[r.split("\t")[1]]) for r in notes if r]
    if not rows:
        raise UserError(f"{folder}: no {split} images in it")
    x = torch.stack([picture_tensor(open_picture(p), 64) for p, _ in rows])
    return x, torch.tensor([y for _, y in rows])


def resize(x, side):
    """uint8 [N, C, H, W] -> uint8 [N, C, side, side]; area mean if a whole factor smaller, else bilinear."""
    if x.shape[-1] == side and x.shape[-2] == side:
        return x
    whole = x.shape[-1] % side == 0 and x.shape[-2] % side == 0
    mode = {"mode": "area"} if whole else {"mode": "bilinear", "antialias": True}
    return torch.cat([F.interpolate(b.float(), size=(side, side), **mode).round().clamp(0, 255)
                      .to(torch.uint8) for b in x.split(2000)])


def load_images(name, split="train", data_dir="data", channels=None, side=None):
    """A data set by name -> Images or, for folders and torchvision's large sets, Pictures.

    split: "train" or "test". channels, side: what the script asks for; grey is repeated, colour averaged.
    Raises UserError, in one line: unknown name, missing or damaged file, absent split, empty folder.
    """
    data_dir = Path(data_dir)
    known = [*IN_MEMORY, *FOLDERS, *TORCHVISION]
    if name not in known:
        raise UserError(f"unknown data set '{name}'; known: {', '.join(known)}")
    if split not in ("train", "test"):
        raise UserError(f"unknown split '{split}'; known: train, test")
    if name in FOLDERS:
        return Pictures(image_files(data_dir / name, split), side or 256, name)
    if name in TORCHVISION:
        return torchvision_pictures(name, split, data_dir, side or 256)
    c, s, classes = IN_MEMORY[name]
    file = data_dir / f"{name}.npz"
    if name in ("glyphs", "letters", "symbols", "noise"):
        x, y = made_here(name, split, channels or c, side or s)
    elif file.exists():
        x, y = read_npz(file, split, classes)
        if tuple(x.shape[1:]) != (c, s, s):
            raise UserError(f"{file}: images of x_{split} are {tuple(x.shape[1:])}; expected {(c, s, s)}")
    elif name == "tinyimagenet":
        if not (data_dir / "tiny-imagenet-200" / "train").is_dir():
            raise UserError(f"tinyimagenet: put {file} or the unpacked folder "
                            f"{data_dir / 'tiny-imagenet-200'} there (unpack cs231n.stanford.edu's zip)")
        x, y = read_tiny_imagenet(data_dir / "tiny-imagenet-200", split)
    else:
        x, y = download(name, split, data_dir)
    x = resize(x, side or s)
    channels = channels or c
    if channels == 3 and x.shape[1] == 1:
        x = x.expand(-1, 3, -1, -1).contiguous()
    elif channels == 1 and x.shape[1] == 3:
        x = x.float().mean(1, keepdim=True).round().to(torch.uint8)
    return Images(x, y, name)


def image_files(folder, split):
    """Sorted image files of folder/train, or of folder/test or val; of the whole folder where it has none."""
    parts = {"train": ["train"], "test": ["test", "val"]}
    if any((folder / name).is_dir() for names in parts.values() for name in names):
        inside = next((folder / name for name in parts[split] if (folder / name).is_dir()), None)
        if inside is None:
            raise UserError(f"{folder}: no {split} split (no sub-folder {' or '.join(parts[split])})")
        folder = inside
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; put png, jpg or webp images there, in any sub-folders")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not files:
        raise UserError(f"{folder}: no png, jpg or webp image in it")
    return files


def open_picture(file):
    """A file -> RGB picture; UserError that names it when it cannot be read."""
    try:
        with Image.open(file) as picture:
            return picture.convert("RGB")
    except Exception as error:
        raise UserError(f"{file}: unreadable image ({type(error).__name__})") from None


CROPS = {  # random-resized-crops of large pictures: relative area, aspect, probability (else centre crop)
    "rrc": ((0.08, 1), (3 / 4, 4 / 3), 1.0), "mild": ((0.9, 1), (0.95, 1.05), 0.5),
    "medium": ((0.8, 1), (0.9, 1.1), 0.5)}


def picture_tensor(picture, side, crop="none", seed=0, mask=False):
    """A PIL picture -> uint8 [3, side, side]: resized and centre-cropped, or cropped as in CROPS and flipped.

    The random crop depends on `seed` alone. A mask (trimap): nearest-pixel resize -> uint8 [side, side].
    """
    mode = InterpolationMode.NEAREST if mask else InterpolationMode.BILINEAR
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU generator alone, which fork_rng restores
        scale, ratio, probability = CROPS.get(crop, (None, None, 0))
        if torch.rand(()) < probability:
            box = RandomResizedCrop.get_params(picture, scale, ratio)
            picture = T.resized_crop(picture, *box, (side, side), mode)
        else:
            picture = T.center_crop(T.resize(picture, side, mode), side)
        picture = T.hflip(picture) if crop != "none" and torch.rand(()) < 0.5 else picture
    pixels = T.pil_to_tensor(picture)
    return pixels[0] if mask else pixels


class Pictures(torch.utils.data.Dataset):
    """A data set of large pictures in files, read when needed; indexed by i or by (i, crop, seed)."""

    def __init__(self, source, side, name, masks=False):
        self.source, self.side, self.name, self.masks = source, side, name, masks
        self.shape = (3, side, side)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        """-> uint8 [3, side, side], or with masks (image, trimap uint8 [side, side])."""
        i, *crop = key if isinstance(key, tuple) else (key,)
        item = self.source[i]
        picture, extra = (open_picture(item), None) if isinstance(item, Path) else item
        x = picture_tensor(picture.convert("RGB"), self.side, *crop)
        return (x, picture_tensor(extra, self.side, *crop, mask=True)) if self.masks else x

    def take(self, index):
        """Centre crops of these indices as float32 [B, 3, side, side] in [0, 1]."""
        index = range(*index.indices(len(self))) if isinstance(index, slice) else index
        return torch.stack([self[int(i)] for i in index]).float() / 255

    def to(self, device):
        return self  # pictures stay in their files; a batch moves to the device when it is used


def torchvision_pictures(name, split, data_dir, side):
    """flowers102, or pets with its trimaps as masks, through torchvision."""
    options = {"split": split} if name == "flowers102" else {
        "split": "trainval" if split == "train" else "test", "target_types": "segmentation"}
    try:
        source = getattr(torchvision.datasets, TORCHVISION[name])(str(data_dir), download=True, **options)
    except Exception as error:
        raise UserError(f"{name}: not below {data_dir}, and the download failed ({first_line(error)}); put "
                        f"torchvision's {TORCHVISION[name]} folder there, or mend the network") from None
    return Pictures(source, side, name, masks=name == "pets")


def in_memory(pictures, workers=2):
    """Pictures -> Images: all of them read (centre crops), with their labels, or with masks for the pets.

    Labels: torchvision's, or the rank of the folder that a file lies in among these files' folders. Masks are
    uint8 [N, S, S]: 1 for the pet and its outline, 0 for what lies behind.
    """
    loader = torch.utils.data.DataLoader(pictures, batch_size=64, num_workers=workers,
                                         generator=torch.Generator())  # else it draws from everybody's
    try:
        parts = list(loader)
    except UserError as error:
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("common.UserError: ")) from None
    if pictures.masks:
        x, trimaps = (torch.cat(column) for column in zip(*parts))
        return Images(x, (trimaps != 2).to(torch.uint8), pictures.name)
    return Images(torch.cat(parts), folder_labels(pictures), pictures.name)


def folder_labels(pictures):
    """Labels int64 [N] of Pictures: torchvision's, or the rank of each file's folder among the folders."""
    if not isinstance(pictures.source, list):
        return torch.tensor([pictures.source[i][1] for i in range(len(pictures))])
    names = [file.parent.name for file in pictures.source]
    rank = {name: i for i, name in enumerate(sorted(set(names)))}
    return torch.tensor([rank[name] for name in names])


def load_classes(name, split="train", data_dir="data", channels=None, side=None):
    """A labelled set in memory, or its classes a to b where the name is NAME:a-b -> Images, labels from 0."""
    name, colon, part = name.partition(":")
    data = load_images(name, split, data_dir, channels, side)
    data = in_memory(data) if isinstance(data, Pictures) else data
    if not colon:
        return data
    first, last = (int(v) if v.isdecimal() else -1 for v in (part.split("-") + [""])[:2])
    kept = (data.y >= first) & (data.y <= last)
    if not 0 <= first < last or len(data.y[kept].unique()) < 2:
        raise UserError(f"{name}:{part}: expected NAME:a-b, the classes a to b of a labelled set")
    return Images(data.x[kept], data.y[kept] - first, f"{name}:{part}")


def with_clutter(images, others, seed, pieces=2):
    """A segmentation task: grey Images, each with `pieces` windows cut out of images of `others` around it.

    The brighter of the two wins in every pixel. Masks: ink_classes of the image itself.
    """
    g, (n, _, side, _) = torch.Generator().manual_seed(seed), images.x.shape
    pasted, size = torch.zeros_like(images.x), side // 3
    place = torch.arange(side)
    for _ in range(pieces):
        y, x = torch.randint(0, side - size + 1, (2, n, 1), generator=g)
        high, wide = ((place >= start) & (place < start + size) for start in (y, x))  # bool [N, S]
        window = high[:, :, None] & wide[:, None]                                     # bool [N, S, S]
        piece = others.x[torch.randint(len(others), (n,), generator=g)]
        pasted = torch.where(window[:, None], piece, pasted)
    return Images(torch.maximum(images.x, pasted), ink_classes(images), f"{images.name} with {others.name}")


def on_photos(images, photos, seed):
    """A segmentation task: grey Images, each in a colour of its own, three quarters opaque, on colour Images.

    Masks: ink_classes of the grey images.
    """
    g, n = torch.Generator().manual_seed(seed), len(images)
    colour = torch.randint(0, 256, (n, 3, 1, 1), generator=g).float()
    behind = photos.x[torch.randint(len(photos), (n,), generator=g)]
    opaque = 0.75 * images.take(slice(None))                                              # [N, 1, S, S]
    x = (opaque * colour + (1 - opaque) * behind).round().to(torch.uint8)
    return Images(x, ink_classes(images), f"{images.name} on {photos.name}")


def load_masks(name, around, split="train", data_dir="data", channels=1, side=28):
    """A segmentation task in memory -> Images, y: masks uint8 [N, S, S]; "pets", or classes of a grey set.

    The grey set is drawn among fragments of letters, or for three channels on photos of the set `around`.
    """
    if name == "pets":
        return in_memory(load_images(name, split, data_dir, side=side))
    images, seed = load_images(name, split, data_dir, 1, side), 5 if split == "train" else 6
    if isinstance(images, Pictures) or channels == 3 and around not in IN_MEMORY:
        raise UserError(f"masks of {name} on {around}: both must be sets in memory; or take pets")
    if channels == 3:
        return on_photos(images, load_images(around, split, data_dir, 3, side), seed)
    return with_clutter(images, load_images("letters", split, data_dir, 1, side), seed)


def crop_flip(x, seed, pad=4, flip=True):
    """Random zero-padded crop and horizontal flip, per image, of floats [B, C, H, W] by tensor functions."""
    g = torch.Generator().manual_seed(seed)
    b, _, h, w = x.shape
    dy, dx = (torch.randint(0, 2 * pad + 1, (2, b), generator=g)).to(x.device)
    mirror = (torch.rand(b, generator=g) < 0.5).to(x.device) & flip
    rows = dy[:, None] + torch.arange(h, device=x.device)  # [B, H]
    cols = torch.arange(w, device=x.device)
    cols = dx[:, None] + torch.where(mirror[:, None], w - 1 - cols, cols)  # [B, W]
    padded = F.pad(x, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    i = torch.arange(b, device=x.device)[:, None, None]
    return padded[i, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2).contiguous()


@functools.lru_cache(maxsize=32)
def shuffled(n, seed):
    """A permutation of n indices that depends on the seed alone."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def batch_index(n, size, seed, t):
    """Indices int64 [size] of batch t: shuffled passes over n items, laid end to end."""
    place = torch.arange(t * size, (t + 1) * size)
    return torch.cat([shuffled(n, seed + 7919 * epoch)[place[place // n == epoch] % n]
                      for epoch in range(int(place[0]) // n, int(place[-1]) // n + 1)])


def batches(images, size, seed, start=0, augment="none", device="cpu", workers=2):
    """Endless shuffled batches: an iterator of float32 [size, C, H, W] in [0, 1] and the indices [size].

    Batch t depends on (seed, t) alone, so a run resumed at `start` sees the very images it would have seen.
    augment: "none"; "crop" (pad 4, crop, flip) of Images; "rrc", "mild", "medium" (CROPS, flip) of Pictures.
    """
    if augment not in ("none", *(("crop",) if isinstance(images, Images) else CROPS)):
        raise UserError(f"no augmentation '{augment}' for {images.name}")
    return draw_batches(images, size, seed, start, augment, device, workers)


def draw_batches(images, size, seed, start, augment, device, workers):
    """The generator behind batches()."""
    if isinstance(images, Images):
        for t in itertools.count(start):
            i = batch_index(len(images), size, seed, t)
            x = images.take(i.to(images.x.device)).to(device)
            yield (crop_flip(x, seed + 31 * t) if augment == "crop" else x), i
    keys = ([(int(i), augment, seed + 31 * t + 7 * j)
             for j, i in enumerate(batch_index(len(images), size, seed, t))] for t in itertools.count(start))
    loader = torch.utils.data.DataLoader(images, batch_sampler=keys, num_workers=workers,
                                         generator=torch.Generator())  # else it draws from everybody's
    try:
        for t, x in zip(itertools.count(start), loader):
            yield x.to(device).float() / 255, batch_index(len(images), size, seed, t)
    except UserError as error:  # a worker's comes with its traceback as text: take the last line
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("common.UserError: ")) from None


# --- 2. networks --------------------------------------------------------------------------------------------

def init_xavier(net):
    """Glorot-uniform weights, zero biases: the default of the originals' frameworks; PyTorch's is smaller."""
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    return net


class MnistCNN(nn.Module):
    """MNIST network of dissertation 3.2: 3,265,409 parameters (1 output). [B, 1, 28, 28] -> [B, outputs].

    ReLU stands behind the pool: the same function, a quarter of the work. width multiplies the channels.
    """

    def __init__(self, outputs=1, channels=1, side=28, width=1.0):
        super().__init__()
        a, b, c = round(32 * width), round(64 * width), round(1024 * width)
        if not a:
            raise ValueError("no channels are left")
        self.body = nn.Sequential(
            nn.Conv2d(channels, a, 5, 1, 2), nn.MaxPool2d(2), nn.ReLU(),
            nn.Conv2d(a, b, 5, 1, 2), nn.MaxPool2d(2), nn.ReLU(),
            nn.Flatten(), nn.Linear(b * (side // 4) ** 2, c), nn.ReLU())
        self.head = nn.Linear(c, outputs)
        init_xavier(self)

    def features(self, x):
        return self.body(x)  # [B, 1024 width]

    def forward(self, x):
        return self.head(self.features(x))


class PlainCNN(nn.Module):
    """Six convolutions, leaky ReLU, no normalisation; 28 or 32 pixels. [B, C, side, side] -> [B, outputs]."""

    def __init__(self, width=32, outputs=1, channels=1, side=28):
        super().__init__()
        w = width
        self.body = nn.Sequential(
            nn.Conv2d(channels, w, 3, 1, 1), nn.LeakyReLU(0.2),          # side
            nn.Conv2d(w, 2 * w, 4, 2, 1), nn.LeakyReLU(0.2),             # side / 2
            nn.Conv2d(2 * w, 2 * w, 3, 1, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * w, 4 * w, 4, 2, 1), nn.LeakyReLU(0.2),         # side / 4
            nn.Conv2d(4 * w, 4 * w, 3, 1, 1), nn.LeakyReLU(0.2))
        self.head = nn.Conv2d(4 * w, outputs, side // 4)                 # 1

    def forward(self, x):
        return self.head(self.body(2 * x - 1)).flatten(1)


class SmallCNN(nn.Module):
    """Five 3x3 convolutions with BatchNorm, two of stride 2, mean-pooled. [B, C, S, S] -> [B, outputs].

    70,330 parameters at width 16, one channel, 10 outputs. Natural training leaves it easy to attack.
    """

    def __init__(self, width=16, outputs=10, channels=1):
        super().__init__()
        w, layers, c = width, [], channels
        for out, stride in ((w, 1), (2 * w, 2), (2 * w, 1), (4 * w, 2), (4 * w, 1)):
            layers += [nn.Conv2d(c, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            c = out
        self.body, self.head = nn.Sequential(*layers), nn.Linear(c, outputs)

    def features(self, x):
        return self.body(2 * x - 1).mean((2, 3))  # [B, 4 width]

    def forward(self, x):
        return self.head(self.features(x))


class WideBlock(nn.Module):
    """Pre-activation block of a wide ResNet; the 1x1 shortcut sees the raw input."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.main = nn.Sequential(nn.BatchNorm2d(c_in), nn.ReLU(), nn.Conv2d(c_in, c_out, 3, 1, 1),
                                  nn.BatchNorm2d(c_out), nn.ReLU(), nn.Conv2d(c_out, c_out, 3, stride, 1))
        self.shortcut = nn.Identity() if (c_in, stride) == (c_out, 1) else nn.Conv2d(c_in, c_out, 1, stride)

    def forward(self, x):
        return self.main(x) + self.shortcut(x)


class WideResNet(nn.Module):
    """WRN-depth-widen, convolutions with bias: thesis ch. 2 to 5 (28-10). [B, C, S, S] -> [B, outputs].

    WRN-28-10 with 3 channels and 10 (100) outputs has 36,489,290 (36,546,980) parameters.
    """

    def __init__(self, depth=28, widen=10, outputs=10, channels=3):
        super().__init__()
        layers, c = [nn.Conv2d(channels, 16, 3, 1, 1)], 16
        for width, stride in ((round(16 * widen), 1), (round(32 * widen), 2), (round(64 * widen), 2)):
            for i in range((depth - 4) // 6):
                layers.append(WideBlock(c, width, 1 if i else stride))
                c = width
        self.body = nn.Sequential(*layers, nn.BatchNorm2d(c, momentum=0.9), nn.ReLU())
        self.head = nn.Linear(c, outputs)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.xavier_uniform_(m.weight, gain=math.sqrt(2))
                nn.init.zeros_(m.bias)

    def features(self, x):
        return self.body(2 * x - 1).mean((2, 3))  # [B, 64 widen]

    def forward(self, x):
        return self.head(self.features(x))


class LightEBM(nn.Module):
    """The light EBM of thesis ch. 2: five convolutions, no normalisation. [B, C, S, S] -> [B, 1], V(x).

    693,569 parameters at width 32, three channels, 32 pixels (28 pixels: a last kernel of 3). Initialised as
    PyTorch does. Leaky ReLU makes V piecewise linear: its second derivative in x is exactly zero.
    """

    def __init__(self, width=32, channels=3, side=32):
        super().__init__()
        w = width
        self.body = nn.Sequential(
            nn.Conv2d(channels, w, 3, 1, 1), nn.LeakyReLU(0.05),         # side
            nn.Conv2d(w, 2 * w, 4, 2, 1), nn.LeakyReLU(0.05),            # side / 2
            nn.Conv2d(2 * w, 4 * w, 4, 2, 1), nn.LeakyReLU(0.05),        # side / 4
            nn.Conv2d(4 * w, 8 * w, 4, 2, 1), nn.LeakyReLU(0.05),        # side / 8
            nn.Conv2d(8 * w, 1, side // 8))                              # 1

    def forward(self, x):
        return self.body(2 * x - 1).flatten(1)


class SmoothLeakyReLU(nn.Module):
    """Leaky ReLU with a rounded corner: it has a second derivative within some 1 / beta of 0."""

    def __init__(self, slope, beta):
        super().__init__()
        self.slope, self.beta = slope, beta

    def forward(self, x):
        return self.slope * x + (1 - self.slope) * F.softplus(x, self.beta)


def smoothed(net, beta):
    """A frozen copy of an energy with SmoothLeakyReLU(beta) in place of every ReLU and leaky ReLU."""
    other = copy.deepcopy(net).requires_grad_(False)
    for module in list(other.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, (nn.ReLU, nn.LeakyReLU)):
                setattr(module, name, SmoothLeakyReLU(getattr(layer, "negative_slope", 0.0), beta))
    return other


class DBlock(nn.Module):
    """Residual block of an SNGAN discriminator, no normalisation; down halves the side, first: the stem."""

    def __init__(self, c_in, c_out, down=False, first=False):
        super().__init__()
        pool = [nn.AvgPool2d(2)] if down else []
        self.main = nn.Sequential(*[nn.ReLU()][first:], nn.Conv2d(c_in, c_out, 3, 1, 1), nn.ReLU(),
                                  nn.Conv2d(c_out, c_out, 3, 1, 1), *pool)
        skip = [nn.Conv2d(c_in, c_out, 1), *pool] if down else []
        self.shortcut = nn.Sequential(*(reversed(skip) if first else skip))  # the stem pools first

    def forward(self, x):
        return self.main(x) + self.shortcut(x)


SNGAN_WIDTHS = {  # side: channels of the energy, how many of its blocks halve the side, of the generator
    28: ((256,) * 4, 2, (256,) * 3), 32: ((256,) * 4, 2, (256,) * 4),
    64: ((64, 128, 256, 512, 1024), 5, (1024, 512, 256, 128, 64)),
    128: ((64, 128, 256, 512, 1024, 1024), 5, (1024, 1024, 512, 256, 128, 64))}


class SNGANEnergy(nn.Module):
    """An SNGAN discriminator without its spectral norm: thesis ch. 3. [B, C, S, S] -> [B, outputs], V(x).

    4,204,800 parameters at 28 and 32 pixels, 19,542,720 at 64, 38,419,136 at 128 (three channels). Glorot
    initialisation, mean pooling, no bias in the head. width multiplies the channels.
    """

    def __init__(self, width=1.0, outputs=1, channels=3, side=32):
        super().__init__()
        wide, downs, _ = SNGAN_WIDTHS[side]
        wide = [max(round(w * width), 1) for w in wide]
        self.body = nn.Sequential(*[DBlock(a, b, i < downs, not i) for i, (a, b) in
                                    enumerate(zip([channels, *wide], wide))], nn.ReLU())
        self.head = nn.Linear(wide[-1], outputs, bias=False)
        init_xavier(self)

    def forward(self, x):
        return self.head(self.body(2 * x - 1).mean((2, 3)))


def spectral(net):
    """Spectral normalisation, in place, of every convolution and linear layer: SNGAN's discriminator."""
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            torch.nn.utils.parametrizations.spectral_norm(m)
    return net


class GBlock(nn.Module):
    """Residual block of an SNGAN generator; up: it doubles the side (bilinear)."""

    def __init__(self, c_in, c_out, up=True):
        super().__init__()
        scale = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False) if up else nn.Identity()
        self.main = nn.Sequential(nn.BatchNorm2d(c_in), nn.ReLU(), scale, nn.Conv2d(c_in, c_out, 3, 1, 1),
                                  nn.BatchNorm2d(c_out), nn.ReLU(), nn.Conv2d(c_out, c_out, 3, 1, 1))
        self.shortcut = nn.Sequential(scale, nn.Conv2d(c_in, c_out, 1)) if up or c_in != c_out else scale

    def forward(self, x):
        return self.main(x) + self.shortcut(x)


class SNGANGenerator(nn.Module):
    """z [B, 128] ~ N(0, I) -> images [B, C, S, S] in [0, 1]; first layer 4x4 (7x7 for 28 pixels).

    4,276,739 parameters at 32 pixels, 12,220,675 at 64, 32,150,787 at 128. width multiplies the channels.
    """
    latent = 128

    def __init__(self, width=1.0, channels=3, side=32):
        super().__init__()
        self.first = 7 if side == 28 else 4
        wide = [max(round(w * width), 1) for w in SNGAN_WIDTHS[side][2]]
        self.linear = nn.Linear(self.latent, wide[0] * self.first ** 2)
        self.body = nn.Sequential(*[GBlock(a, b) for a, b in zip(wide, wide[1:])],
                                  nn.BatchNorm2d(wide[-1]), nn.ReLU(), nn.Conv2d(wide[-1], channels, 3, 1, 1))
        init_xavier(self)

    def forward(self, z):
        return (torch.tanh(self.body(self.linear(z).unflatten(1, (-1, self.first, self.first)))) + 1) / 2


class FixerNet(nn.Module):
    """Image to image, thesis ch. 5: x plus what an SNGAN generator without up-sampling makes of x.

    [B, C, S, S] -> the same shape. It starts as the identity (its last layer is zero). Not clamped: the end
    of a chain is not in [0, 1] either. 300,099 parameters at width 64, four blocks, three channels.
    """

    def __init__(self, width=64, channels=3, blocks=4):
        super().__init__()
        last = nn.Conv2d(width, channels, 3, 1, 1)
        self.body = nn.Sequential(nn.Conv2d(channels, width, 3, 1, 1),
                                  *[GBlock(width, width, up=False) for _ in range(blocks)],
                                  nn.BatchNorm2d(width), nn.ReLU(), last)
        init_xavier(self)
        nn.init.zeros_(last.weight)

    def forward(self, x):
        return x + self.body(2 * x - 1) / 2


class DeepBlock(nn.Module):
    """Bottleneck block of a BigGAN-deep discriminator; a 1x1 layer adds the channels its shortcut lacks."""

    def __init__(self, c_in, c_out, down):
        super().__init__()
        c = max(c_in // 4, 1)
        self.pool = nn.AvgPool2d(2) if down else nn.Identity()
        self.main = nn.Sequential(
            nn.ReLU(), nn.Conv2d(c_in, c, 1), nn.ReLU(), nn.Conv2d(c, c, 3, 1, 1), nn.ReLU(),
            nn.Conv2d(c, c, 3, 1, 1), nn.ReLU(), self.pool, nn.Conv2d(c, c_out, 1))
        self.extra = nn.Conv2d(c_in, c_out - c_in, 1) if c_out > c_in else None

    def forward(self, x):
        short = self.pool(x)
        if self.extra is not None:
            short = torch.cat([short, self.extra(short)], 1)
        return self.main(x) + short


class SelfAttention(nn.Module):
    """x + gamma times attention over positions, keys and values at half the side; [B, C, H, W]."""

    def __init__(self, c):
        super().__init__()
        self.query, self.key = nn.Conv2d(c, c // 8, 1, bias=False), nn.Conv2d(c, c // 8, 1, bias=False)
        self.value, self.out = nn.Conv2d(c, c // 2, 1, bias=False), nn.Conv2d(c // 2, c, 1, bias=False)
        self.gamma = nn.Parameter(torch.randn(1))

    def forward(self, x):
        q, k, v = (part.flatten(2).transpose(1, 2) for part in (
            self.query(x), F.max_pool2d(self.key(x), 2), F.max_pool2d(self.value(x), 2)))
        seen = F.scaled_dot_product_attention(q, k, v, scale=1.0)  # [B, H W, C / 2]
        return x + self.gamma * self.out(seen.transpose(1, 2).unflatten(2, x.shape[2:]))


class BigGANEnergy(nn.Module):
    """BigGAN-deep's discriminator as an energy: thesis ch. 3, ImageNet at 224. [B, C, S, S] -> [B, 1], V(x).

    4,289,605 parameters at width 48. No normalisation: in the published code its spectral norm is inert.
    """

    def __init__(self, width=48, channels=3):
        super().__init__()
        w, steps = width, ((1, 2), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 8), (8, 8), (8, 16), (16, 16),
                           (16, 16), (16, 16))
        blocks = [DeepBlock(a * w, b * w, not i % 2) for i, (a, b) in enumerate(steps)]
        self.body = nn.Sequential(nn.Conv2d(channels, w, 3, 1, 1), *blocks[:4], SelfAttention(4 * w),
                                  *blocks[4:], nn.ReLU())
        self.head = nn.Linear(16 * w, 1, bias=False)
        init_xavier(self)

    def forward(self, x):
        return self.head(self.body(2 * x - 1).mean((2, 3)))


class UNet(nn.Module):
    """U-Net: [B, C, S, S] -> [B, outputs, S, S], S a multiple of 2^levels.

    Per-pixel logits of a segmentation (with BatchNorm), or (norm=False; outputs as channels) a score.
    """

    def __init__(self, width=16, outputs=2, channels=1, levels=2, norm=True):
        super().__init__()
        self.norm = norm
        wide = [width * 2 ** i for i in range(levels + 1)]
        self.down = nn.ModuleList(self.double(a, b) for a, b in zip([channels, *wide], wide))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in wide[:-1])
        self.join = nn.ModuleList(self.double(2 * w, w) for w in wide[:-1])
        self.head = nn.Conv2d(width, outputs, 1)

    def double(self, c_in, c_out):
        """Two convolutions, each with its ReLU."""
        return nn.Sequential(*[layer for a in (c_in, c_out) for layer in (
            nn.Conv2d(a, c_out, 3, 1, 1), nn.BatchNorm2d(c_out) if self.norm else nn.Identity(), nn.ReLU())])

    def forward(self, x):
        x, kept = 2 * x - 1, []
        for i, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if i else x)
            kept.append(x)
        for i in reversed(range(len(self.up))):
            x = self.join[i](torch.cat([self.up[i](x), kept[i]], 1))
        return self.head(x)


class Pretrained(nn.Module):
    """A torchvision network with its ImageNet weights (they are downloaded): [B, 3, S, S] -> [B, outputs].

    Normalises, and resizes to `side`, inside. The head is kept for 1000 outputs, else made anew.
    """

    def __init__(self, name, outputs, side):
        super().__init__()
        try:
            self.net = torchvision.models.get_model(name, weights="DEFAULT")
        except Exception as error:
            raise UserError(f"{name}: torchvision has no weights for it here ({first_line(error)}); mend the "
                            "network, or take a network that is trained here") from None
        self.side = side
        head = next(n for n in ("fc", "classifier", "head") if hasattr(self.net, n))
        last = getattr(self.net, head)
        inner = last[-1] if isinstance(last, nn.Sequential) else last
        new = inner if outputs == 1000 else nn.Linear(inner.in_features, outputs)
        if inner is last:
            setattr(self.net, head, nn.Identity())
            self.head = new
        else:
            last[-1], self.head = nn.Identity(), new
        for key, value in (("mean", (.485, .456, .406)), ("std", (.229, .224, .225))):
            self.register_buffer(key, torch.tensor(value).view(1, -1, 1, 1), persistent=False)

    def resized(self, x):
        """The network on images at its own resolution."""
        size = (self.side, self.side)
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)
        return self.net((x - self.mean) / self.std)

    def features(self, x):
        if self.training:
            return self.resized(x)
        # eight at a time, activations recomputed: gradients of many images in little memory
        return torch.cat([checkpoint(self.resized, part, use_reentrant=False) for part in x.split(8)])

    def forward(self, x):
        return self.head(self.features(x))


class Standardise(nn.Module):
    """Each image (of each of `groups` stacked networks) to mean 0 and deviation 1, as TensorFlow does it."""

    groups = 1

    def forward(self, x):
        z = x.reshape(len(x), self.groups, -1)
        z = z - z.mean(2, keepdim=True)
        least = 1 / (255 * math.sqrt(z.shape[2]))  # for images of one colour
        return (z / z.square().mean(2, keepdim=True).sqrt().clamp(min=least)).view(x.shape)


class Widen(nn.Module):
    """A shortcut without weights: average pooling, and zero channels on both sides."""

    groups = 1

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.stride, self.sides = stride, ((c_out - c_in) // 2, (c_out - c_in + 1) // 2)

    def forward(self, x):
        x = F.avg_pool2d(x, self.stride).unflatten(1, (self.groups, -1))
        return F.pad(x, (0, 0, 0, 0, *self.sides)).flatten(1, 2)


class MadryBlock(nn.Module):
    """Pre-activation block of MadryWRN; `early`: the shortcut starts behind the first activation."""

    def __init__(self, c_in, c_out, stride, early):
        super().__init__()
        self.before = nn.Sequential(nn.BatchNorm2d(c_in, eps=1e-3), nn.LeakyReLU(0.1))
        self.body = nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out, eps=1e-3),
            nn.LeakyReLU(0.1), nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False))
        self.shortcut = Widen(c_in, c_out, stride) if stride > 1 or c_in != c_out else nn.Identity()
        self.early = early

    def forward(self, x):
        z = self.before(x)
        return self.body(z) + self.shortcut(z if self.early else x)


class MadryWRN(nn.Module):
    """CIFAR-10 network of dissertation 3.2, after Madry et al.: 45,901,914 parameters (10 outputs).

    Standardises each image inside. Widths 16, then 160, 320, 640 (width 1), five blocks each.
    """

    def __init__(self, width=1.0, outputs=10, channels=3):
        super().__init__()
        widths = [16, *(max(round(c * width), 16) for c in (160, 320, 640))]
        blocks = []
        for stage, (c_in, c_out) in enumerate(zip(widths, widths[1:])):
            for i in range(5):
                blocks.append(MadryBlock(c_out if i else c_in, c_out, 1 if i or not stage else 2,
                                         early=not i and not stage))
        self.body = nn.Sequential(Standardise(), nn.Conv2d(channels, 16, 3, 1, 1, bias=False), *blocks,
                                  nn.BatchNorm2d(widths[-1], eps=1e-3), nn.LeakyReLU(0.1))
        self.head = nn.Linear(widths[-1], outputs)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")

    def features(self, x):
        return self.body(x).mean((2, 3))  # [B, 640 width]

    def forward(self, x):
        return self.head(self.features(x))


class GroupedLinear(nn.Module):
    """`groups` linear layers side by side: [B, groups * c_in] -> [B, groups * c_out]."""

    def __init__(self, groups, c_in, c_out):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.zeros(groups, c_out, c_in))  # not a view: autocast keeps a copy
        self.bias = nn.Parameter(torch.zeros(groups * c_out))

    def forward(self, x):
        x = x.unflatten(1, (self.groups, -1)).permute(1, 2, 0)                  # [groups, c_in, B]
        return (self.weight @ x).permute(2, 0, 1).flatten(1) + self.bias


def side_by_side(nets):
    """K networks of one architecture as one: [B, K C, S, S] -> [B, K outputs], each on its own channels.

    A convolution of K networks is one convolution in K groups. Every tensor of the result's state_dict is
    that of the K networks laid end to end, so part_of() takes them apart again. Convolutions are plain
    ones: no dilation. BatchNorm: in eval mode.
    """
    K, wide = len(nets), copy.deepcopy(nets[0])
    for parent in list(wide.modules()) if K > 1 else ():
        for name, m in parent.named_children():
            if isinstance(m, nn.Conv2d):
                setattr(parent, name, nn.Conv2d(
                    K * m.in_channels, K * m.out_channels, m.kernel_size, m.stride, m.padding, groups=K,
                    bias=m.bias is not None))
            elif isinstance(m, nn.Linear):
                setattr(parent, name, GroupedLinear(K, m.in_features, m.out_features))
            elif isinstance(m, nn.BatchNorm2d):
                setattr(parent, name, nn.BatchNorm2d(K * m.num_features, eps=m.eps))
            elif hasattr(m, "groups"):
                m.groups = K
            elif next(m.parameters(recurse=False), None) is not None:
                raise TypeError(f"side_by_side: no way to group a {type(m).__name__}")
    states = [net.state_dict() for net in nets]
    wide.load_state_dict({key: torch.cat([state[key] for state in states]).view_as(value) if value.dim()
                          else states[0][key] for key, value in wide.state_dict().items()})
    wide.train(nets[0].training)
    return wide.to(next(nets[0].parameters()).device, memory_format=torch.channels_last)


def part_of(wide, K, k, net):
    """The k-th (from 0) of the K networks that side_by_side() joined, as its weights for `net`, filled in."""
    own = net.state_dict()
    net.load_state_dict({key: value.chunk(K)[k].reshape(own[key].shape) if value.dim() else value
                         for key, value in wide.state_dict().items()})
    return net


class Block(nn.Module):
    """Residual block of CIFAR ResNets: two 3x3 convolutions, or 1x1, 3x3, 1x1 (bottleneck, 4x wider out)."""

    def __init__(self, c_in, width, stride, bottleneck):
        super().__init__()
        c_out = 4 * width if bottleneck else width
        shape = [(c_in, width, 1, 1), (width, width, 3, stride), (width, c_out, 1, 1)] if bottleneck else \
                [(c_in, width, 3, stride), (width, c_out, 3, 1)]
        layers = [nn.Sequential(nn.Conv2d(i, o, k, s, k // 2, bias=False), nn.BatchNorm2d(o))
                  for i, o, k, s in shape]
        self.main = nn.Sequential(*itertools.chain(*[(m, nn.ReLU()) for m in layers]))[:-1]  # ReLU after sum
        self.shortcut = nn.Identity() if (c_in, stride) == (c_out, 1) else nn.Sequential(
            nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        return F.relu(self.main(x) + self.shortcut(x))


class ResNet(nn.Module):
    """Small-image ResNet-18 or -50: 3x3 stem, no max-pool, strides 1, 2, 2, 2. [B, C, H, W] -> [B, outputs].

    width multiplies 64/128/256/512: 18 at 0.5 has 2,795,297 parameters, 50 23,502,401 (1 output, 3 channels).
    Inputs are normalised inside, by MadryLab's CIFAR constants for three channels, by .5 / .5 for one.
    """

    def __init__(self, depth=18, width=1.0, outputs=1, channels=3):
        super().__init__()
        bottleneck, counts = {18: (False, (2, 2, 2, 2)), 50: (True, (3, 4, 6, 3))}[depth]
        mean, std = ((.4914, .4822, .4465), (.2023, .1994, .2010)) if channels == 3 else ((.5,), (.5,))
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        c = round(64 * width)
        layers = [nn.Conv2d(channels, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU()]
        for stage, count in enumerate(counts):
            w = round(64 * 2 ** stage * width)
            for i in range(count):
                layers.append(Block(c, w, 2 if stage and not i else 1, bottleneck))
                c = 4 * w if bottleneck else w
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(c, outputs)

    def features(self, x):
        return self.body((x - self.mean) / self.std).mean((2, 3))  # [B, 512 width] or [B, 2048]

    def forward(self, x):
        return self.head(self.features(x))


class ResBlk(nn.Module):
    """Pre-activation residual block, no normalisation, that halves the side; the sum is divided by sqrt 2."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(c_in, c_in, 3, 1, 1), nn.Conv2d(c_in, c_out, 3, 1, 1)
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1, bias=False)

    def forward(self, x):
        y = self.conv2(F.leaky_relu(F.avg_pool2d(self.conv1(F.leaky_relu(x, 0.2)), 2), 0.2))
        return (y + F.avg_pool2d(self.skip(x), 2)) / math.sqrt(2)


class ResBlockD(nn.Module):
    """The D of dissertation Tab. 2.2 (stem 3x3, as in its code). [B, 3, S, S] -> [B, outputs].

    20,851,777 parameters at 256. Rule for other powers of two: stem width 2^14 / side, doubling to at most
    512, log2(side) - 2 blocks down to 4x4.
    """

    def __init__(self, side=256, outputs=1, channels=3):
        super().__init__()
        if side < 8 or side & (side - 1):
            raise UserError(f"the residual D takes sides that are powers of two from 8 on, not {side}")
        self.register_buffer("mean", torch.tensor((.485, .456, .406)[:channels]).view(1, -1, 1, 1),
                             persistent=False)
        self.register_buffer("std", torch.tensor((.229, .224, .225)[:channels]).view(1, -1, 1, 1),
                             persistent=False)
        c = min(2 ** 14 // side, 512)
        layers = [nn.Conv2d(channels, c, 3, 1, 1)]
        for _ in range(int(math.log2(side)) - 2):
            layers.append(ResBlk(c, min(2 * c, 512)))
            c = min(2 * c, 512)
        self.body = nn.Sequential(*layers, nn.LeakyReLU(0.2), nn.Conv2d(c, c, 4), nn.LeakyReLU(0.2),
                                  nn.Flatten())
        self.head = nn.Linear(c, outputs)

    def features(self, x):
        return self.body((x - self.mean) / self.std)  # [B, 512]

    def forward(self, x):
        return self.head(self.features(x))


def weights_at_hand(name, data_dir):
    """torchvision's weight file of that name in data_dir or in torch's hub folder, or None."""
    places = [Path(data_dir) / name, Path(torch.hub.get_dir()) / "checkpoints" / name]
    return next((p for p in places if p.exists()), None)


def read_weights(net, file, what):
    """Load torchvision's weights of a network; UserError when the file holds something else."""
    try:
        net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:
        raise UserError(f"{file}: not torchvision's {what} weights ({type(error).__name__})") from None


class VGGMaps(nn.Module):
    """A feature map of torchvision's VGG-16: [B, 3 or 1, H, W] in [0, 1] -> [B, C_j, H_j, W_j].

    layer: index in its `features`; 3, 8, 15, 22 are relu1_2, relu2_2, relu3_3, relu4_3. shape: (C, H, W) of
    the images. Frozen, in eval mode.
    """
    FILE = "vgg16-397923af.pth"

    def __init__(self, file, layer, shape):
        super().__init__()
        net = torchvision.models.vgg16(weights=None, init_weights=False)
        read_weights(net, file, "VGG-16")
        self.body = net.features[:layer + 1]
        for key, value in (("mean", (.485, .456, .406)), ("std", (.229, .224, .225))):
            self.register_buffer(key, torch.tensor(value).view(1, -1, 1, 1), persistent=False)
        self.eval().requires_grad_(False)
        try:
            net.features[layer], self(torch.zeros(1, *shape))  # such a layer, and pixels left
        except (IndexError, RuntimeError):
            raise UserError(f"VGG-16 has no such layer for images {tuple(shape)}: try 3, 8 or 15") from None

    def forward(self, x):
        return self.body((x.expand(-1, 3, -1, -1) - self.mean) / self.std)


def feature_maps(net, layer):
    """A layer's output of a network trained here: images -> maps [B, C_j, H_j, W_j]; "body.8" names a layer.

    Shares the network's weights, leaves the layers behind it out. UserError for a layer it does not have.
    """
    try:
        part = create_feature_extractor(net, {layer: "maps"})
    except Exception as error:
        raise UserError(f"no feature maps at layer '{layer}' of {type(net).__name__}: "
                        f"{first_line(error)}") from None
    return lambda x: part(x)["maps"]


class InceptionFeatures(nn.Module):
    """torchvision's Inception-V3: [B, 3 or 1, H, W] in [0, 1] -> 2048 features; forward: 1000 logits.

    For Frechet distances. Not the TensorFlow weights of the FID literature: numbers differ by some tenths.
    """
    FILE = "inception_v3_google-0cc3c7bd.pth"

    def __init__(self, file=None):
        super().__init__()
        self.net = torchvision.models.inception_v3(weights=None, init_weights=False, transform_input=False)
        if file is not None:
            read_weights(self.net, file, "Inception-V3")
        self.head, self.net.fc = self.net.fc, nn.Identity()
        self.eval()

    @classmethod
    def at_hand(cls, data_dir):
        """The weight file in data_dir or in torch's hub folder, or None."""
        return weights_at_hand(cls.FILE, data_dir)

    def features(self, x):
        x = x.expand(-1, 3, -1, -1)
        x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False, antialias=True)
        return self.net(2 * x - 1)  # [B, 2048]

    def forward(self, x):
        return self.head(self.features(x))


def feature_network(data, data_dir, classifier):
    """Of a Frechet distance: ("FID", Inception-V3) for colour images where its weights are at hand, else
    ("FD-cls", the classifier)."""
    file = data.shape[0] == 3 and InceptionFeatures.at_hand(data_dir)
    if not file:
        return "FD-cls", classifier
    return "FID", InceptionFeatures(file).to(next(classifier.parameters()).device)


@torch.no_grad()
def feature_statistics(network, x):
    """Mean [d] and covariance [d, d], float64, of the features of images [N, C, H, W] in [0, 1]."""
    z = torch.cat([network.features(part).cpu().double() for part in x.split(250)])
    return z.mean(0), torch.cov(z.T)


def make_net(name, outputs, shape, width=1.0):
    """A network by name for images of shape (C, H, W); the names are the keys below."""
    c, side, _ = shape
    levels = 2 if side <= 32 else 3 if side <= 64 else 4  # of a U-Net
    made = {"plain": lambda: PlainCNN(round(32 * width), outputs, c, side),
            "mnist_cnn": lambda: MnistCNN(outputs, c, side, width),
            "resnet18": lambda: ResNet(18, width, outputs, c),
            "resnet50": lambda: ResNet(50, width, outputs, c),
            "resblock_d": lambda: ResBlockD(side, outputs, c),
            "small_cnn": lambda: SmallCNN(round(16 * width), outputs, c),
            "wrn16": lambda: WideResNet(16, width, outputs, c),  # width: the widening factor
            "wrn28": lambda: WideResNet(28, width, outputs, c),
            "madry_wrn": lambda: MadryWRN(width, outputs, c),
            "light_ebm": lambda: LightEBM(round(32 * width), c, side),
            "sngan": lambda: SNGANEnergy(width, outputs, c, side),
            "sngan_generator": lambda: SNGANGenerator(width, c, side),  # takes z [B, 128]
            "fixer": lambda: FixerNet(round(64 * width), c, 4 if side <= 32 else 6),  # image to image
            "biggan_deep": lambda: BigGANEnergy(round(48 * width), c),
            "unet": lambda: UNet(round(16 * width), outputs, c, levels),
            "score": lambda: UNet(round(16 * width), c, c, levels, norm=False),
            "efficientnet_b7": lambda: Pretrained("efficientnet_b7", outputs, 600),
            "pretrained50": lambda: Pretrained("resnet50", outputs, 224)}
    if name not in made:
        raise UserError(f"unknown network '{name}'; known: {', '.join(made)}")
    try:
        return made[name]()
    except (ArithmeticError, KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"no {name} of width {width} for images {tuple(shape)}: {error}") from None


@torch.enable_grad()  # also when the first use of the features stands inside no_grad
def train_classifier(run, data, classes, net, width, iterations, name="classifier", sgd=0.0, batch=128,
                     augment=None, adversary=None, made_with=None):
    """A classifier of a labelled set (Images), returned in eval mode. Goes on from its checkpoint NAME.pt.

    Adam, one cycle to 1e-3; with sgd that rate of SGD (momentum .9, weight decay 2e-4), a tenth of it from
    40 % of the updates on, a hundredth from 60 %. augment: none, crop, crop_flip (default: that, of colour).
    adversary(model, x, y) -> x is applied to each batch (adversarial training); it says so in made_with.
    """
    torch.manual_seed(run.args.seed)
    model = make_net(net, classes, data.shape, width).to(run.device, memory_format=torch.channels_last)
    if sgd:
        optimizer = torch.optim.SGD(model.parameters(), sgd, momentum=0.9, weight_decay=2e-4)
        drops = [round(iterations * 0.4), round(iterations * 0.6)]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops)
    else:
        optimizer = torch.optim.Adam(model.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=max(iterations, 4))
    augment = augment or ("crop_flip" if data.shape[0] == 3 else "none")
    made_with = {"net": net, "width": width, "iterations": iterations, "seed": run.args.seed,
                 "budget": run.args.budget, "images": [len(data), *data.shape], "sgd": sgd, "batch": batch,
                 "augment": augment, **(made_with or {})}
    file, every = run.folder / f"{name}.pt", max(iterations // 5, 1)
    state = load_checkpoint(file, made_with) or {"it": 0, "rows": []}
    if state["it"]:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    if state["it"] < iterations:
        print(f"training {name}: {net}, {iterations} updates", flush=True)
        log = Log(run.folder / f"log-{name}.csv", iterations, state["rows"], show=("loss", "accuracy"))
        stream = batches(data, batch, run.args.seed + 2, state["it"], "none", run.device)
    for it in range(state["it"] + 1, iterations + 1):
        x, i = next(stream)
        y = data.y[i.to(data.y.device)].to(run.device).long()  # labels [B], or masks [B, S, S]
        if augment != "none":
            x = crop_flip(x, run.args.seed + 2 + 31 * (it - 1), flip=augment == "crop_flip")
        if adversary:
            x = adversary(model, x, y)
        model.train()
        with fast_precision(run.device):
            logits = model(x).float()
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if it % every == 0 or it == iterations:
            log.add(it, loss=loss.item(), accuracy=(logits.argmax(1) == y).float().mean().item())
            save_checkpoint(file, made_with, model=model.state_dict(), optimizer=optimizer.state_dict(),
                            schedule=schedule.state_dict(), it=it, rows=log.rows)
    return model.eval()


def updates(run, name, total, made_with, parts, show, log_every, save_every, cost=None, unit="update"):
    """Count the updates of a training: yields (it, row), it = 1 ... total, with log-NAME.csv and NAME.pt.

    The loop fills `row` with numbers; every log_every updates their means are a line of the log. parts {name:
    module, optimizer or tensor} is what a checkpoint holds: an interrupted training goes on where it was, a
    finished one yields nothing; either way the parts are restored, in place. row["stop"] = True: finished
    early. cost(): seconds an update, said beforehand. unit: what is counted, if not updates. Raises Diverged
    when a number is not finite.
    """
    file = run.folder / f"{name}.pt"
    state = load_checkpoint(file, made_with) or {"it": 0, "rows": [], "since": []}
    for key, part in parts.items() if state["it"] else ():
        part.copy_(state[key]) if isinstance(part, torch.Tensor) else part.load_state_dict(state[key])
    if state["it"] >= total:
        return
    expected = f", some {(total - state['it']) * cost():.0f} s at this machine's speed" if cost else ""
    print(f"training {name}: {total - state['it']} {unit}s{expected}", flush=True)
    log, since = Log(run.folder / f"log-{name}.csv", total, state["rows"], show), state["since"]
    for it in range(state["it"] + 1, total + 1):
        row = {}
        yield it, row
        finished = row.pop("stop", False) or it == total
        since.append(row)
        finite = all(math.isfinite(v) for v in row.values())
        if it % log_every == 0 or finished or not finite:
            log.add(it, **{k: sum(r[k] for r in since) / len(since) for k in row})
            since = []
        if not finite:
            raise Diverged(f"training {name} diverged at {unit} {it}: a number is not finite; try a lower "
                           "learning rate", log.rows)
        if it % save_every == 0 or finished:
            save_checkpoint(file, made_with, it=total if finished else it, rows=log.rows, since=since, **{
                key: part if isinstance(part, torch.Tensor) else part.state_dict()
                for key, part in parts.items()})
        if finished:
            return


def bfloat16_units(device):
    """Whether the processor computes in bfloat16: a GPU from Ampere on, a CPU with AMX or AVX512-BF16."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return torch.device(device).type == "cpu" and any(
        getattr(torch.cpu, f, bool)() for f in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))


def fast_precision(device):
    """bfloat16 autocast where the processor has units for it, else a no-op."""
    kind = torch.device(device).type
    return (torch.autocast(kind, dtype=torch.bfloat16) if bfloat16_units(device)
            else contextlib.nullcontext())


def captured(once):
    """Record once(), which changes CUDA tensors in place, as a CUDA graph -> a function that replays it.

    A replay launches everything at once: small networks are otherwise bound by kernel launches. Random
    numbers differ from replay to replay (the default generator is registered with the graph).
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm-up outside the graph, as PyTorch asks
        for _ in range(3):
            once()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    return graph.replay


def throughput(sampler, x, seconds):
    """Images x steps / s of sampler(x, steps) -> (x, a 0-d tensor); random generators stay as they were."""
    with torch.random.fork_rng():
        sampler(x, 2)[1].item()  # warm-up; .item() waits for the device
        steps, done, start = 4, 0, time.time()
        while time.time() - start < seconds or not done:
            sampler(x, steps)[1].item()
            done += steps
            steps = min(2 * steps, 256) if time.time() - start < seconds / 4 else steps  # fewer waits
    return done * len(x) / (time.time() - start)


def matrix_rate(device, side=2048):
    """Operations / s of a square matrix product, in bfloat16 where the processor has units for it."""
    a = torch.rand(side, side, device=device).to(torch.bfloat16 if bfloat16_units(device) else torch.float32)
    (a @ a).sum().item()
    start = time.time()
    for _ in range(20):
        product = a @ a
    product.sum().item()
    return 20 * 2 * side ** 3 / (time.time() - start)


# --- 3. checkpoints -----------------------------------------------------------------------------------------

def write_text(file, text):
    """Write a small file whole or not at all: to a temporary name, then renamed."""
    scratch = Path(f"{file}.tmp")
    scratch.write_text(text)
    os.replace(scratch, file)


def save_checkpoint(file, made_with, **state):
    """Save tensors and plain numbers with the settings that made them and the generators' states; atomic."""
    rng = {"cpu": torch.get_rng_state(),
           "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}
    scratch = Path(f"{file}.tmp")
    torch.save({**state, "made_with": made_with, "rng": rng}, scratch)
    os.replace(scratch, file)


def load_checkpoint(file, made_with):
    """The dict that save_checkpoint wrote, or None without a file; restores the generators' states.

    UserError when the file is unreadable, or was made with other settings than `made_with` (it says which).
    """
    if not Path(file).exists():
        return None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        then, rng = state["made_with"], state["rng"]
    except Exception as error:
        raise UserError(f"{file}: not a readable checkpoint ({type(error).__name__}); "
                        "--fresh starts over") from None
    if then.get("budget") == "smoke" != made_with.get("budget"):
        print(f"{file} is from a smoke run: starting over")
        return None
    then, made_with = ({k: v for k, v in d.items() if k != "budget"} for d in (then, made_with))
    other = [f"{k} {then.get(k)} (now {made_with.get(k)})" for k in {**then, **made_with}
             if then.get(k) != made_with.get(k)]
    if other:
        raise UserError(f"{file} was made with {', '.join(other)}: "
                        "use the same settings, --fresh, or another --out")
    torch.set_rng_state(rng["cpu"].cpu())
    if rng["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([r.cpu() for r in rng["cuda"]][:torch.cuda.device_count()])
    return state


# --- 4. command line ----------------------------------------------------------------------------------------

def number(text):
    """A non-negative number that may be a fraction: '8/255' -> 0.0314, 'inf' allowed."""
    try:
        value = float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number or a fraction such as 8/255") from None
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"'{text}' must be at least 0")
    return value


def whole(text):
    """A whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 0 on")
    return int(text)


def at_least(least, settings, *names):
    """UserError where one of these settings is below `least`."""
    for name in names:
        if getattr(settings, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}")


def comments_of(cls):
    """The comment behind each field of a dataclass: the help of its flag."""
    found = re.findall(r"^    (\w+): [^#\n]*(?:#\s*(.*))?$", inspect.getsource(cls), re.M)
    return {name: comment.replace("%", "%%") for name, comment in found}


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print the usage before it; one line is what a reader wants
        raise UserError(message)


@dataclasses.dataclass
class Experiment:
    """One table or figure of the source: its function, what it shows, its cost, and the published numbers."""
    function: object
    shows: str
    cost: str = ""
    headline: bool = False
    published: dict = dataclasses.field(default_factory=dict)  # data set: {quantity: number}


def parse_args(doc, settings, experiments, argv=None):
    """Flags: common ones, and one per field of a script's Settings. Returns args with .settings filled."""
    sets = list(settings)
    p = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--dataset", "--data", default=sets[0], metavar="NAME",
                   help=f"{', '.join(sets)} (default: {sets[0]})")
    p.add_argument("--budget", default="quick",
                   help="smoke (seconds, learns nothing), quick (default), paper (the source's settings)")
    p.add_argument("--only", nargs="+", metavar="EXPERIMENT",
                   help="run these experiments instead of the headline ones")
    p.add_argument("--list", action="store_true",
                   help="list the experiments with costs and published numbers")
    p.add_argument("--images", type=whole, metavar="N", help="number of images to evaluate on")
    p.add_argument("--data-dir", type=Path, default=Path("data"),
                   help="where NAME.npz and image folders lie (default: data)")
    p.add_argument("--out", type=Path, default=Path("runs"),
                   help="where the run's folder is made (default: runs)")
    p.add_argument("--seed", type=whole, default=0, help="of everything random (default: 0)")
    p.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1")
    p.add_argument("--fresh", action="store_true",
                   help="start over: drop this run's checkpoints, log and results")
    any_settings = next(iter(next(iter(settings.values())).values()))
    fields, comments = dataclasses.fields(any_settings), comments_of(type(any_settings))
    for f in fields:
        if f.name in ("images", "seed"):  # common to all scripts, above
            continue
        kind = {"int": whole, "float": number, "str": str}[
            f.type if isinstance(f.type, str) else f.type.__name__]
        p.add_argument("--" + f.name.replace("_", "-"), type=kind, metavar="VALUE",
                       help=comments.get(f.name))
    args = p.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else list(argv)
    if args.seed >= 2 ** 31:
        raise UserError("--seed must be below 2147483648")
    if args.dataset not in settings:
        raise UserError(f"unknown --dataset '{args.dataset}'; known: {', '.join(sets)}")
    if args.budget not in settings[args.dataset]:
        raise UserError(f"unknown --budget '{args.budget}'; known for {args.dataset}: "
                        f"{', '.join(settings[args.dataset])}")
    for name in args.only or []:
        if name not in experiments:
            raise UserError(f"unknown experiment '{name}'; known: {', '.join(experiments)}")
    changes = {f.name: getattr(args, f.name) for f in fields if getattr(args, f.name) is not None}
    args.settings = dataclasses.replace(settings[args.dataset][args.budget], **changes)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=args.device)
        if args.device.startswith("cuda:"):
            torch.cuda.set_device(args.device)  # streams and graphs are made on the current device
    except Exception:
        raise UserError(f"--device {args.device}: not available here; try --device cpu") from None
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32; what may be rounded asks for bfloat16
    if args.list:
        print_list(experiments)
        raise SystemExit(0)
    args.only = args.only or [name for name, e in experiments.items() if e.headline]
    return args


def print_list(experiments):
    """--list: one line an experiment, headline ones marked, published numbers below."""
    for name, e in experiments.items():
        print(f"{'*' if e.headline else ' '} {name:12} {e.shows}" + (f" [{e.cost}]" if e.cost else ""))
        for dataset, numbers in e.published.items():
            print(" " * 15 + f"published, {dataset}: " + ", ".join(f"{k} {v}" for k, v in numbers.items()))
    print("* runs without --only; [time on two cores of an AMD EPYC, default data set, budget quick]")


def call(main):
    """Run a script's main: UserError is one line on stderr and exit code 2, Diverged the same with code 1."""
    try:
        main()
    except UserError as error:
        sys.exit(complain(error, 2))
    except Diverged as error:
        sys.exit(complain(error, 1))
    except KeyboardInterrupt:
        sys.exit(complain("interrupted; the same command, less --fresh, goes on where it was", 130))


def complain(error, code):
    """Print an exception in one line on stderr; returns the exit code."""
    print(f"{Path(sys.argv[0]).name}: {error}".replace("\n", " "), file=sys.stderr)
    return code


def wilson(successes, n):
    """95 % Wilson interval [low, high] of a rate."""
    z, p = 1.959964, successes / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [max((middle - half) / (1 + z * z / n), 0.0), min((middle + half) / (1 + z * z / n), 1.0)]


def rate(name, ok):
    """A rate and its 95 % Wilson interval from bool [n]: {name: share, "name, 95 %": [low, high]}."""
    return {name: ok.float().mean().item(), f"{name}, 95 %": wilson(int(ok.sum()), len(ok))}


def curves(panels, ylabel, **axis_settings):
    """A row of panels {xlabel: {label: {x: y}}} with one y axis -> matplotlib figure."""
    figure, axes = plt.subplots(1, len(panels), figsize=(1 + 3.8 * len(panels), 3.3), sharey=True,
                                squeeze=False, layout="constrained")
    for axis, (xlabel, lines) in zip(axes[0], panels.items()):
        for label, points in lines.items():
            axis.plot(list(points), list(points.values()), "o-", ms=3, label=label)
        axis.set(xlabel=xlabel, **axis_settings)
        axis.legend(fontsize=8)
        ticks = sorted({x for points in lines.values() for x in points})
        if axis_settings.get("xscale") == "log" and len(ticks) < 7:  # else labels of minor ticks overlap
            axis.set_xticks(ticks, [f"{x:.3g}" for x in ticks])
            axis.minorticks_off()
    axes[0, 0].set_ylabel(ylabel)
    return figure


def histograms(panels, bins=20, **axis_settings):
    """Rows of panels [[(title, {label: values}), ...], ...]; a column shares x -> matplotlib figure."""
    figure, axes = plt.subplots(len(panels), len(panels[0]), figsize=(1 + 3.8 * len(panels[0]),
                                1 + 1.6 * len(panels)), sharex="col", squeeze=False, layout="constrained")
    for axis, (title, groups) in zip(axes.flat, itertools.chain(*panels)):
        for i, (label, values) in enumerate(groups.items()):
            axis.hist(values.tolist(), bins, density=True, alpha=0.6, color=f"C{i}", label=label)
            axis.axvline(values.mean().item(), color=f"C{i}", ls="--", lw=1)
        axis.set_title(title, fontsize=9)
        axis.set(yticks=[], **axis_settings)
        axis.legend(fontsize=8)
    return figure


def picture_rows(rows, columns):
    """A picture grid below the other: {title: float [N, C, H, W] in [0, 1]} -> matplotlib figure."""
    high = [math.ceil(len(x) / columns) / columns for x in rows.values()]
    figure, axes = plt.subplots(len(rows), 1, figsize=(9, 9 * sum(high) + 0.4 * len(rows)), squeeze=False,
                                height_ratios=high, layout="constrained")
    for axis, (title, x) in zip(axes[:, 0], rows.items()):
        picture_grid(axis, x, columns, title)
    return figure


def picture_grid(axis, x, columns, title):
    """Draw images float [N, C, H, W] in [0, 1] as a grid on a matplotlib axis."""
    pixels = make_grid(x.detach().cpu(), columns, padding=1, pad_value=0.5)
    axis.imshow(pixels.permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.set_title(title, fontsize=10)
    axis.axis("off")


def class_colours(mask):
    """Classes [N, S, S], 0 the background -> a colour each on black, float [N, 3, S, S] in [0, 1]."""
    colours = torch.tensor(((0, 0, 0), *plt.get_cmap("tab10").colors), dtype=torch.float32)
    return colours[torch.where(mask > 0, (mask.long() - 1) % 10 + 1, 0).cpu()].permute(0, 3, 1, 2)


def hardware(device):
    """The processor's name, for the record."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, StopIteration):
        model = next(r for r in Path("/proc/cpuinfo").read_text().splitlines() if r.startswith("model name"))
        return f"{model.split(':')[1].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def own_randomness(function):
    """function(lab, ...) with generators seeded by --seed; the caller's stay as they were.

    So an experiment's numbers do not depend on which experiment trained a model or made an attack first.
    """
    @functools.wraps(function)
    def wrapped(lab, *arguments, **options):
        with torch.random.fork_rng():
            torch.manual_seed(lab.args.seed)
            return function(lab, *arguments, **options)
    return wrapped


def shown(value):
    """A number in a table: four digits, five of an AUC that is nearly 1."""
    return f"{value:.{5 if 0.99 < value < 1 else 4}g}" if isinstance(value, float) else str(value)


class Run:
    """One run's folder OUT/SCRIPT-DATASET: config.json, log*.csv, checkpoints, pictures, results.json."""

    def __init__(self, script, args, **about):
        self.script, self.args, self.settings, self.device = (
            script, args, args.settings, torch.device(args.device))
        self.folder = args.out / f"{script}-{args.dataset}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {args.out}: cannot make {self.folder} ({error.strerror})") from None
        if args.fresh:
            for file in itertools.chain(*[self.folder.glob(p) for p in
                                          ("*.pt", "*.csv", "*.json", "*.png", "*.tmp")]):
                file.unlink()
        self.command = shlex.join(["python", f"{script}.py", *args.argv])
        self.about = {"command": self.command, "hardware": hardware(args.device), "torch": torch.__version__,
                      "budget": args.budget, "seed": args.seed, "dataset": args.dataset, **about}
        if not (self.folder / "config.json").exists():
            self.write_config()

    def write_config(self):
        """config.json: settings, command, versions, device of the last run that was not refused."""
        config = {**self.about, "torchvision": torchvision.__version__, "numpy": np.__version__,
                  "matplotlib": matplotlib.__version__, "python": platform.python_version(),
                  "settings": dataclasses.asdict(self.settings)}
        write_text(self.folder / "config.json", json.dumps(config, indent=1, default=str) + "\n")

    def experiment(self, name, e, *arguments):
        """Run one experiment, put its numbers into results.json beside the published ones; returns them."""
        print(f"\n{name}: {e.shows}", flush=True)
        torch.manual_seed(self.args.seed)  # an experiment does not depend on those before it
        start = time.time()
        ours = e.function(*arguments)
        self.write_config()
        entry = {"ours": ours, "published": e.published.get(self.args.dataset, {}), "shows": e.shows,
                 "seconds": round(time.time() - start, 1), **self.about}
        file = self.folder / "results.json"
        try:
            results = json.loads(file.read_text()) if file.exists() else {}
        except ValueError:
            raise UserError(f"{file}: not readable; move it away, or --fresh") from None
        results[name] = entry
        write_text(file, json.dumps(results, indent=1, default=float) + "\n")
        return entry

    def save(self, figure, name):
        """Write a figure to NAME.png and close it."""
        figure.savefig(self.folder / f"{name}.png", dpi=110)
        plt.close(figure)

    def closing_table(self, entries):
        """Print ours beside published, a line a number; a key's interval is under "KEY, 95 %"."""
        print(f"\n{'experiment':12} {'quantity':52} {'ours':>20} {'published':>12}")
        for name, entry in entries.items():
            for key, value in entry["ours"].items():
                if isinstance(value, (int, float)) or isinstance(value, str) and key != "sentence":
                    text = shown(value)
                    if interval := entry["ours"].get(f"{key}, 95 %"):
                        text += " [{:.2f}, {:.2f}]".format(*interval)
                    print(f"{name:12} {key:52} {text:>20} {str(entry['published'].get(key, '')):>12}")
            for key, value in entry["published"].items():
                if key not in entry["ours"]:
                    print(f"{name:12} {key:52} {'':>20} {value!s:>12}")
        print(f"\npictures, log and results.json: {self.folder}{os.sep}")


class Log:
    """Rows of a training run: each in a .csv file, columns `show` on the screen; in the checkpoint too."""

    def __init__(self, file, total, rows=(), show=("loss",)):
        self.file, self.total, self.rows, self.show = Path(file), total, list(rows), show
        self.start, self.first = time.time(), None
        self.before = self.rows[-1]["seconds"] if self.rows else 0.0
        self.write()

    def write(self):
        """Rewrite the file from the rows: after a resume it holds what the checkpoint knows, no more."""
        with open(self.file, "w", newline="") as f:
            writer = csv.DictWriter(f, fieldnames=list(self.rows[0]) if self.rows else ["it"])
            writer.writeheader()
            writer.writerows(self.rows)

    def add(self, it, share=None, **numbers):
        """it counts from 1; share is the part of all work done (default it / total); numbers are columns."""
        spent, share = time.time() - self.start, share or it / self.total
        self.first = self.first or (spent, share)  # a resumed run's speed is measured from its first row on
        left = ((spent - self.first[0]) / max(share - self.first[1], 1e-9) * (1 - share)
                if share > self.first[1] else math.nan)
        row = {"it": it, **{k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in numbers.items()},
               "seconds": round(self.before + spent, 1)}
        self.rows.append(row)
        if len(self.rows) == 1:
            self.write()
        else:
            with open(self.file, "a", newline="") as f:
                csv.DictWriter(f, fieldnames=list(self.rows[0])).writerow(row)
        shown = "  ".join(f"{k} {row[k]:6.4g}" for k in self.show if not math.isnan(row[k]))
        left = "" if math.isnan(left) else f", {left:.0f} s left"
        print(f"{it:6d}/{self.total}  {shown}  {row['seconds']:.0f} s{left}", flush=True)
