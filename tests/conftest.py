import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


class FakeRun:
    """A run's folder, and the figures that were asked for."""

    def __init__(self, folder, smoke=False):
        folder.mkdir(exist_ok=True)
        self.folder, self.shared, self.seed, self.smoke, self.chunk = folder, folder, 0, smoke, 250
        self.device = torch.device("cpu")
        self.shown = {}

    def pictures(self, name, rows, columns):
        self.shown[name] = rows

    def lines(self, name, rows, x, **_):
        assert all(x in row for row in rows)
        self.shown[name] = rows


class Killed(Exception):
    """What a test raises inside a training that is to be interrupted."""


class TinyTorchvision(nn.Module):
    """In place of torchvision's networks."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(4, 1000))

    def forward(self, x):
        return self.classifier(self.features(x))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def exact(monkeypatch):
    """No bfloat16: for tests that compare with a closed form or with another library."""
    import common
    monkeypatch.setattr(common, "bfloat16_units", lambda device: False)


@pytest.fixture
def write_npz(tmp_path):
    """Write a small Keras-style archive into a data folder; returns the folder."""
    def write(name="cifar10", n=96, side=32, colour=True, **replace):
        random = np.random.RandomState(0)
        arrays = {}
        for split in ("train", "test"):
            shape = (n, side, side, 3) if colour else (n, side, side)
            arrays |= {f"x_{split}": random.randint(0, 256, shape, dtype=np.uint8),
                       f"y_{split}": np.arange(n) % 10}
        arrays |= replace
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        np.savez(folder / f"{name}.npz", **{k: v for k, v in arrays.items() if v is not None})
        return folder
    return write


@pytest.fixture
def outcome(capsys):
    """Run a script's main as `python SCRIPT.py` would; returns (exit code, stderr)."""
    def run(script, *argv):
        import common
        try:
            common.call(lambda: script.main([str(a) for a in argv]))
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err
    return run


@pytest.fixture
def narrow(monkeypatch):
    """No network wider than an eighth: smoke runs of every experiment then take seconds."""
    import common
    make_net = common.make_net
    monkeypatch.setattr(common, "make_net", lambda name, outputs, shape, width=1.0: make_net(name, outputs, shape, min(width, 0.125)))


@pytest.fixture
def narrow_d():
    """A script's module -> its ResBlockD with 8 channels: the same parts, in seconds."""
    import common

    def make(module):
        class Narrow(module.ResBlockD):
            def __init__(self, side, outputs=1):
                torch.nn.Module.__init__(self)
                common.normalising(self, *common.IMAGENET)
                blocks = module.ResBlk(8, 8), module.ResBlk(8, 8)
                self.body = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 1, 1), *blocks, torch.nn.Flatten())
                self.head = torch.nn.Linear(8 * (side // 4) ** 2, outputs)
        return Narrow
    return make
