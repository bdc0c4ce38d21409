"""Faults, as a table: what a user meets, tried on the scripts as they stand.

    a kill at any moment, Ctrl-C               the same command goes on, to the numbers of an unbroken run
    a second run in the same folder            it ends at once: one line, exit code 2
    a full disk                                one line, exit code 2; no file is spoiled
    torn, foreign or hostile files             one line, exit code 2; no code in them is run
    a training that runs away                  one line, exit code 1
    --out a file or read-only, fonts that      one line, exit code 2; nothing was done in vain
      are gone, pictures that claim to be huge

A command is run in a process of its own, so that it can be killed. Importing torch takes seconds: one process, this file run
as a script, imports all scripts once and forks itself for each command. It computes with one thread, so a fork loses none.
"""
import ctypes
import functools
import gc
import importlib
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import traceback
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import ROOT

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

SHORT = {  # for each script, the experiments of a short run in which something is trained, attacked or drawn
    "toy2d": ["samplers"],
    "at_gen": ["table2.5", "figure2.7"],
    "adv_detect": ["table3.1", "table3.2"],
    "ood_detect": ["histogram"],
    "gen_classify": ["table3.14", "figure3.15"],
    "stochastic_security": ["table2.1", "figure2.8"],
    "lifecycle_midrun": ["table3.1"],
    "fixer": ["table5.1"],
    "hat_ebm": ["figure6.6"],
}
LEARNED = [script for script in SHORT if script != "toy2d"]  # toy2d keeps no checkpoints


# --- the process that runs commands ---


def nursery():
    """For each order, a line of JSON on stdin: a child; then a line that says how it ended."""
    import torch
    import common
    torch.set_num_threads(1)
    for script in SHORT:
        importlib.import_module(script)
    render = common.render_glyphs
    common.render_glyphs = lambda chars, fonts, n, *seed: render(chars, fonts, n // 5, *seed)  # smaller sets are quicker
    for name, split in itertools.product(("glyphs", "letters", "symbols"), ("train", "test")):
        common.load_images(name, split)  # drawn once, for all children
    gc.freeze()
    for line in sys.stdin:
        order = json.loads(line)
        pid = order.get("end") or os.fork()
        if pid == 0:
            child(**order)
        if "end" in order:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, os.WUNTRACED)
        code = -os.WSTOPSIG(status) if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
        print(json.dumps({"pid": pid, "code": code}), flush=True)


def child(script, argv, told, fault=None, **how):
    """Be the command `python SCRIPT.py ARGV`, with a fault. stderr and the names of files as they are written go to TOLD.*"""
    import common
    signal.alarm(100)  # a child that hangs dies
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, if these tests run in the background
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)
    os.dup2(os.open(f"{told}.err", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
    sys.argv = [f"{script}.py", *argv]
    common.Training.SAVE_SECONDS = -1  # a checkpoint after each update
    watch(f"{told}.written")
    code = 0
    try:
        if fault:
            globals()[fault](**how)
        common.call(importlib.import_module(script).main)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


def watch(told):
    """Write down the name of each file that is written, whole, to a file."""
    replace = os.replace

    def watched(scratch, file):
        replace(scratch, file)
        with open(told, "a") as names:
            print(Path(file).name, file=names)
    Path(told).write_text("")
    os.replace = watched


# --- the faults: what a child does to itself ---


def dies_writing(name, count):
    """SIGKILL when a file of this name is half written for the count-th time. Between two files nothing changes on the disk, so a
    kill at any other moment leaves what one of these leaves."""
    at_file(name, count, signal.SIGKILL, torn=True)


def at_file(name, count, number, torn=False):
    """A signal before NAME.tmp becomes NAME, the count-th time."""
    replace, left = os.replace, [count]

    def struck(scratch, file):
        left[0] -= Path(file).name == name
        if left[0] == 0:
            if torn:
                os.truncate(scratch, os.path.getsize(scratch) // 2)
            os.kill(os.getpid(), number)
        replace(scratch, file)
    os.replace = struck


def at_update(name, count, number, times=1, seconds=-1):
    """A signal, or several, in the middle of the count-th update of a training; seconds: between two checkpoints."""
    import common
    common.Training.SAVE_SECONDS = seconds
    log = common.Training.log

    def struck(self, **numbers):
        if self.name == name and self.it == count - 1:  # updates that are done
            for _ in range(times):
                os.kill(os.getpid(), number)
        log(self, **numbers)
    common.Training.log = struck


def weights_turn_to_nan(count):
    """All weights of whatever is trained, after so many updates."""
    import common
    import torch
    log, left = common.Training.log, [count]

    def struck(self, **numbers):
        log(self, **numbers)
        left[0] -= 1
        for part in self.parts.values() if left[0] == 0 else ():
            for weight in part.parameters() if isinstance(part, torch.nn.Module) else ():
                weight.data.fill_(float("nan"))
    common.Training.log = struck


def fonts_are_gone():
    """matplotlib without its font files."""
    import common
    common._made_here.cache_clear()
    common._glyph_template.cache_clear()
    common.matplotlib.get_data_path = lambda: "/nowhere"


def other_is_a_fork(say):
    """fixer, where it runs lifecycle_midrun, gets a fork of this process, in which all is imported, instead of a new one."""
    import fixer

    def run(command):
        pid = os.fork()
        if pid == 0:
            child(Path(command[1]).stem, command[2:], say)
        return SimpleNamespace(returncode=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    fixer.subprocess = SimpleNamespace(run=run)


def without_rights():
    """Root writes into folders that are read-only; without its capabilities it does not (Linux)."""
    if os.geteuid() == 0:
        none = ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
        assert none == 0


# --- the tests' side of it ---


class Commands:
    """Runs commands: commands(script, *flags) -> (exit code or minus the signal, stderr)."""

    def __init__(self, folder):
        self.told = folder / "child"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env=environment)

    def __call__(self, script, *argv, fault=None, **how):
        argv = ["--budget", "smoke", "--device", "cpu", *map(str, argv)]
        answer = self.ask(script=script, argv=argv, told=str(self.told), fault=fault, **how)
        self.pid = answer["pid"]
        return answer["code"], Path(f"{self.told}.err").read_text()

    def ask(self, **order):
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def short(self, script, out, **fault):
        """The short run of a script. fixer finds an energy in `out`, or makes one."""
        return self(script, "--out", out, "--only", *SHORT[script], **fault)

    def written(self):
        """Names of the files that the last command wrote, in that order."""
        return Path(f"{self.told}.written").read_text().splitlines()


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    running = Commands(tmp_path_factory.mktemp("faults"))
    yield running
    running.process.stdin.close()
    running.process.wait(60)


@pytest.fixture(scope="module")
def unbroken(commands, tmp_path_factory):
    """script -> (--out, names of the files written) of its short run that nothing disturbs. In a path that tests quoting, too."""
    @functools.cache
    def run(script):
        out = tmp_path_factory.mktemp(script) / "a b, \u00fc\u0394 [1]"
        if script == "fixer":
            give_energy(run, out)
        assert commands.short(script, out) == (0, "")
        return out, commands.written()
    return run


def give_energy(unbroken, out):
    """Copy lifecycle_midrun's energy, which fixer starts from, to another --out."""
    file = Path("lifecycle_midrun-glyphs", "energy.pt")
    (out / file).parent.mkdir(parents=True)
    shutil.copy(unbroken("lifecycle_midrun")[0] / file, out / file)


def home(out, script):
    return out / f"{script}-{'gaussian' if script == 'toy2d' else 'glyphs'}"


def rows(out, script):
    """{experiment: its rows} of results.json."""
    results = json.loads((home(out, script) / "results.json").read_text())
    return {name: entry["rows"] for name, entry in results.items()}


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def alike(out, whole, script):
    """Whether two runs left the same numbers and files."""
    return rows(out, script) == rows(whole, script) and names(home(out, script)) == names(home(whole, script))


def says(ended, code, *words):
    """Whether a command ended with this code and one line that holds these words."""
    return ended[0] == code and ended[1].count("\n") == 1 and all(word in ended[1] for word in words)


def stages(written):
    """Files of a run by the stage that writes them, each as (place, name, how often by then) -> trainings, the rest.

    f.pt and log-f.csv are of the training f. An attack that keeps a checkpoint, a figure and a table are of the rest."""
    trainings, rest = {}, {}
    for place, name in enumerate(written):
        stage = name.removeprefix("log-").rpartition(".")[0]
        learns = f"log-{stage}.csv" in written and not stage.startswith("attack-")
        (trainings if learns else rest).setdefault(stage, []).append((place, name, written[:place + 1].count(name)))
    return trainings, rest


# --- a run that is cut short goes on ---


@pytest.mark.parametrize("script", SHORT)
def test_a_run_that_is_killed_twice_goes_on(commands, unbroken, tmp_path, script):
    """While it learns, and while it attacks or measures: at moments of a fixed seed."""
    whole, written = unbroken(script)
    if script == "fixer":
        give_energy(unbroken, tmp_path)
    trainings, rest = stages(written)
    draw = random.Random(script)
    chosen = [draw.choice(list(kind)) for kind in (trainings, rest) if kind]
    for _, name, count in sorted(draw.choice((trainings | rest)[stage]) for stage in chosen):
        assert commands.short(script, tmp_path, fault="dies_writing", name=name, count=count) == (-signal.SIGKILL, ""), name
    assert commands.short(script, tmp_path) == (0, "")
    assert alike(tmp_path, whole, script)


@pytest.mark.parametrize("script", ["at_gen", "gen_classify", "stochastic_security"])
def test_ctrl_c_in_a_training_saves_the_update(commands, unbroken, tmp_path, script):
    """Although no checkpoint was due. A second Ctrl-C in the same update does not wait for its end."""
    import torch
    whole, written = unbroken(script)
    training, files = random.Random(script).choice(list(stages(written)[0].items()))
    last = sum(name == f"{training}.pt" for _, name, _ in files)
    how = {"fault": "at_update", "name": training, "number": signal.SIGINT}
    for count, times, kept in ((1, 1, 1), (last, 2, last - 1)):
        stopped = commands.short(script, tmp_path, **how, count=count, times=times, seconds=1e9 if times == 1 else -1)
        assert says(stopped, 130, f"{script}.py: interrupted")
        file, = tmp_path.rglob(f"{training}.pt")
        assert torch.load(file, weights_only=True)["it"] == kept and not list(tmp_path.rglob("*.tmp"))
    assert commands.short(script, tmp_path) == (0, "") and alike(tmp_path, whole, script)


def test_ctrl_c_without_a_training(commands, unbroken, tmp_path):
    stopped = commands.short("toy2d", tmp_path, fault="at_file", name="config.json", count=1, number=signal.SIGINT)
    assert says(stopped, 130, "toy2d.py: interrupted")
    assert names(home(tmp_path, "toy2d")) == ["results.json", "samplers.png"]
    assert commands.short("toy2d", tmp_path) == (0, "") and alike(tmp_path, unbroken("toy2d")[0], "toy2d")


# --- two runs at once ---


def test_a_second_run_in_the_same_folder_stops_at_once(commands, unbroken, tmp_path):
    """Not one elsewhere in that --out; and not once the first is gone, however it went."""
    stopped = commands.short("at_gen", tmp_path, fault="at_file", name="f.pt", count=2, number=signal.SIGSTOP)
    assert stopped == (-signal.SIGSTOP, "")
    first = commands.pid
    try:
        before = names(home(tmp_path, "at_gen"))
        for more in ([], ["--fresh"]):
            second = commands("at_gen", "--out", tmp_path, "--only", *SHORT["at_gen"], *more)
            assert says(second, 2, "at_gen-glyphs", "another run")
        assert names(home(tmp_path, "at_gen")) == before
        assert commands("ood_detect", "--out", tmp_path, "--only", "histogram") == (0, "")
    finally:
        assert commands.ask(end=first)["code"] == -signal.SIGKILL
    assert commands.short("at_gen", tmp_path) == (0, "") and alike(tmp_path, unbroken("at_gen")[0], "at_gen")


def test_fixer_runs_lifecycle_midrun_beside_itself(commands, tmp_path):
    out = tmp_path / "a b, \u00fc\u0394 [1]"
    fault = {"fault": "other_is_a_fork", "say": str(tmp_path / "other")}
    assert commands("fixer", "--out", out, "--only", "figure5.2", **fault) == (0, "")
    assert "energy.pt" in (tmp_path / "other.written").read_text() and rows(out, "fixer")["figure5.2"]


# --- a full disk ---


full_device = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@pytest.fixture(scope="module")
def half(commands, tmp_path_factory):
    """A run of at_gen that died in its second update."""
    out = tmp_path_factory.mktemp("half")
    assert commands.short("at_gen", out, fault="dies_writing", name="f.pt", count=2)[0] == -signal.SIGKILL
    return out


def fill_the_disk(file):
    """What is written for this file goes to a device that is full."""
    scratch = Path(f"{file}.at_gen.tmp")
    scratch.unlink(missing_ok=True)
    scratch.symlink_to("/dev/full")


@full_device
@pytest.mark.parametrize("name", ["f.pt", "log-f.csv", "results.json", "config.json", "figure2.7.png", "figure2.11-letters.gif"])
def test_a_full_disk_is_one_line_and_spoils_no_file(commands, unbroken, half, tmp_path, name):
    """The same command goes on when there is room again."""
    whole = unbroken("at_gen")[0]
    out = shutil.copytree(half if name in ("f.pt", "log-f.csv") else whole, tmp_path / "out")
    file, film = home(out, "at_gen") / name, ["figure2.11", "--gif"] if name.endswith("gif") else []
    if film:
        file.write_bytes(b"an older film")
    before = file.read_bytes()
    fill_the_disk(file)
    ended = commands("at_gen", "--out", out, "--only", *(film or SHORT["at_gen"]))
    assert says(ended, 2, f"{name}: cannot be written")
    assert not file.is_symlink() and not os.path.lexists(f"{file}.at_gen.tmp")
    assert file.read_bytes() == before
    if name == "f.pt":
        assert commands.short("at_gen", out) == (0, "") and alike(out, whole, "at_gen")


@full_device
def test_a_full_disk_under_a_user_s_pictures(tmp_path, monkeypatch):
    import at_gen
    import common
    import torch
    from PIL import Image
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    pictures = common.user_pictures(tmp_path, tmp_path / "out", 8)
    monkeypatch.setattr(sys, "argv", ["at_gen.py"])
    fill_the_disk(tmp_path / "out" / "0000-a.png")
    s = SimpleNamespace(sample_steps=0, sample_step=1.0, task="generate", output=str(tmp_path / "out"))
    with pytest.raises(common.UserError, match="0000-a.png: cannot be written"):
        at_gen.convert(s, torch.nn.Flatten(), pictures, (3, 8, 8), "cpu")
    assert not names(tmp_path / "out")


@pytest.mark.parametrize("numbers", [10, 1_000, 10_000])
def test_a_checkpoint_whose_last_bytes_do_not_fit_is_not_kept(tmp_path, numbers):
    """The disk is full from there on: here a limit on the length of files."""
    import common
    import torch
    resource = pytest.importorskip("resource")
    run = SimpleNamespace(folder=tmp_path, seed=0, smoke=True, device=torch.device("cpu"))
    training = common.Training(run, "a", {}, x=torch.zeros(numbers))
    training._save()
    before, limits = training.file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - 20, limits[1]))
    try:
        with pytest.raises(common.UserError, match="a.pt: cannot be written"):
            training._save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert training.file.read_bytes() == before and names(tmp_path) == ["a.pt"]


def test_a_disk_that_turns_read_only_under_a_half_written_file(tmp_path, monkeypatch):
    """As Linux does with one that is failing: the half cannot be taken away either."""
    import common

    def refused(*arguments, **options):
        raise OSError(30, "Read-only file system")
    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(common.UserError, match="a.pt: cannot be written"):
        with common.whole_file(tmp_path / "a.pt"):
            refused()


# --- files that are not what they seem ---


class Opens:
    """Unpickling it makes a file: what a stranger's checkpoint could do."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.mark.parametrize("script", LEARNED)
def test_a_checkpoint_that_would_run_code_is_refused(commands, unbroken, tmp_path, script):
    """It is named in the one line, whichever it is of those that the script reads first."""
    import torch
    whole = unbroken(script)[0]
    out = shutil.copytree(whole, tmp_path / "out")
    for file in [*home(out, script).glob("*.pt"), *out.glob("shared-*/*.pt")]:
        torch.save({"made_from": Opens(tmp_path / "ran"), "smoke": True, "rng": {"cpu": 0}}, file)
    assert says(commands.short(script, out), 2, ".pt: not a readable checkpoint", "--fresh")
    assert not (tmp_path / "ran").exists()


def test_files_that_no_script_wrote(tmp_path, write_npz):
    """Garbage, pickles old and new, in the place of a checkpoint, of weights, of an archive: never run, always named."""
    import common
    import numpy as np
    import torch
    evil, file = Opens(tmp_path / "ran"), tmp_path / "a.pt"
    torch.save(evil, tmp_path / "new.pt")
    torch.save(evil, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pt")
    garbage = [random.Random(0).randbytes(999), bytes(999), b"PK\3\4" + bytes(99), b"{}", pickle.dumps(evil, 2)]
    for content in [*garbage, *((tmp_path / f"{kind}.pt").read_bytes() for kind in ("new", "old", "module"))]:
        file.write_bytes(content)
        with pytest.raises(common.UserError, match="a.pt: not a readable checkpoint"):
            common.read_checkpoint(file)
        with pytest.raises(common.UserError, match="a.pt: not torchvision's VGG-16 weights"):
            common.read_weights(torch.nn.Linear(1, 1), file, "VGG-16")
    file.unlink()
    file.mkdir()
    with pytest.raises(common.UserError, match="a.pt: not a readable checkpoint"):
        common.read_checkpoint(file)
    folder = write_npz("mnist", x_train=np.array([evil] * 3, dtype=object), colour=False, side=28)
    with pytest.raises(common.UserError, match="mnist.npz: not a readable .npz"):
        common.load_images("mnist", "train", folder)
    assert not (tmp_path / "ran").exists()


def test_a_torn_results_file_is_one_line(commands, unbroken, tmp_path):
    out = shutil.copytree(unbroken("toy2d")[0], tmp_path / "out")
    file = home(out, "toy2d") / "results.json"
    file.write_text(file.read_text()[:99])
    assert says(commands("toy2d", "--out", out, "--only", "samplers"), 2, "results.json: not readable")
    assert len(file.read_text()) == 99
    assert commands("toy2d", "--out", out, "--fresh", "--only", "samplers") == (0, "")


def test_a_torn_results_file_is_found_before_any_work(commands, tmp_path):
    home(tmp_path, "toy2d").mkdir()
    (home(tmp_path, "toy2d") / "results.json").write_text("{")
    assert says(commands("toy2d", "--out", tmp_path, "--only", "samplers"), 2, "results.json: not readable")
    assert not commands.written()


def test_a_model_of_at_gen_without_its_settings(tmp_path, monkeypatch):
    """at_gen was killed between its training and its first result; ood_detect, which takes that model, lets it finish."""
    import common
    import ood_detect
    import torch
    folder = tmp_path / "at_gen-celebahq"
    folder.mkdir()
    run = SimpleNamespace(folder=folder, seed=0, smoke=True, device=torch.device("cpu"))
    list(common.Training(run, "f", {}, f=ood_detect.ResBlockD(8)).updates(1))
    asked = []

    def finish(command):
        asked.append(command)
        (folder / "config.json").write_text(json.dumps({"settings": {"side": 8}}))
        return SimpleNamespace(returncode=0)
    monkeypatch.setattr(ood_detect, "subprocess", SimpleNamespace(run=finish))
    args = ood_detect.get_args(["--dataset", "celebahq", "--budget", "smoke", "--out", tmp_path, "--device", "cpu",
                                "--only", "table3.13"])
    f, side = ood_detect.at_gen_model(args)
    assert len(asked) == 1 and side == 8


# --- numbers that are none ---


@pytest.mark.parametrize("script, flags", [
    ("toy2d", ["--only", "figure2.1", "--lr", "1e30"]),
    ("at_gen", ["--only", "table2.5", "--lr", "1e30"]),
    ("ood_detect", ["--only", "table3.12", "--lr", "1e30"]),
    ("gen_classify", ["--only", "table3.14", "--lr", "1e30"]),
    ("stochastic_security", ["--only", "table2.1", "--adam-lr", "1e30"]),
    ("stochastic_security", ["--only", "table2.1", "--f-sgd", "1e30"]),
    ("lifecycle_midrun", ["--only", "figure3.2", "--lr", "1e30"]),
    ("fixer", ["--only", "figure5.2", "--lr", "1e30"]),
    ("hat_ebm", ["--only", "figure6.9", "--synth-lr", "1e30"]),
])
def test_a_learning_rate_that_is_far_too_large_is_one_line(commands, unbroken, tmp_path, script, flags):
    if script == "fixer":
        give_energy(unbroken, tmp_path)
    assert says(commands(script, "--out", tmp_path, *flags), 1, "diverged" if script in LEARNED else "--lr")
    assert not (home(tmp_path, script) / "results.json").exists()


@pytest.mark.parametrize("script", LEARNED)
def test_weights_that_turn_to_nan_are_one_line(commands, unbroken, tmp_path, script):
    if script == "fixer":
        give_energy(unbroken, tmp_path)
    assert says(commands.short(script, tmp_path, fault="weights_turn_to_nan", count=1), 1, "diverged")


# --- folders, fonts, pictures ---


@pytest.mark.parametrize("script", [script for script in SHORT if script != "fixer"])  # fixer's line comes from lifecycle_midrun
def test_out_is_a_file(commands, tmp_path, script):
    (tmp_path / "out").write_text("kept")
    assert says(commands.short(script, tmp_path / "out"), 2, "--out", "out: cannot make")
    assert (tmp_path / "out").read_text() == "kept"


@pytest.mark.parametrize("script, first", [("toy2d", "samplers.png"), ("at_gen", "log-classifier.csv")])
def test_out_is_read_only(commands, tmp_path, script, first):
    """Itself, or the folder in it. The first file that is written is a log, before any training, or else a picture."""
    tmp_path.chmod(0o500)
    assert says(commands.short(script, tmp_path / "out", fault="without_rights"), 2, "--out", "out: cannot make")
    tmp_path.chmod(0o700)
    home(tmp_path, script).mkdir(0o500)
    assert says(commands.short(script, tmp_path, fault="without_rights"), 2, f"{first}: cannot be written")


def test_out_is_read_only_and_to_be_emptied(commands, tmp_path):
    folder = home(tmp_path, "toy2d")
    folder.mkdir()
    (folder / "old.png").write_text("old")
    folder.chmod(0o500)
    assert says(commands("toy2d", "--out", tmp_path, "--fresh", fault="without_rights"), 2, str(folder))
    assert (folder / "old.png").read_text() == "old"


@pytest.mark.parametrize("script", LEARNED)
def test_matplotlib_lacks_its_fonts(commands, tmp_path, script):
    ended = commands.short(script, tmp_path / "out", fault="fonts_are_gone")
    assert says(ended, 2, "no font of this matplotlib") and not (tmp_path / "out").exists()


def bomb(file):
    """A picture of a few bytes that claims to have 2,500,000,000 pixels."""
    def part(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(bytes(999))) + part(b"IEND", b""))


@pytest.mark.parametrize("script, dataset", [("at_gen", "celebahq"), ("ood_detect", "celebahq"), ("hat_ebm", "celeba"),
                                             ("lifecycle_midrun", "imagenet"), ("fixer", "imagenet")])
def test_a_picture_that_claims_to_be_huge(commands, tmp_path, script, dataset):
    """Found before any training, in a data set or among a user's own pictures."""
    for split in ("train", "test"):
        bomb(tmp_path / "data" / dataset / split / "a" / "1.png")
    flags = ["--only", "table3.13"] if script == "ood_detect" else []
    ended = commands(script, "--dataset", dataset, "--data-dir", tmp_path / "data", "--out", tmp_path / "out", *flags)
    assert says(ended, 2, "1.png: unreadable image (DecompressionBombError)") and not (tmp_path / "out").exists()
    if script == "at_gen":
        ended = commands(script, "--input", tmp_path / "data", "--output", tmp_path / "new", "--out", tmp_path / "out")
        assert says(ended, 2, "1.png: unreadable image (DecompressionBombError)")
        assert not (tmp_path / "out").exists() and not (tmp_path / "new").exists()


def test_paths_with_a_space_and_other_letters(commands, unbroken, tmp_path, write_npz):
    """--out: that of the runs that nothing disturbs has them. Here --data-dir, with an archive and with folders of pictures."""
    from PIL import Image
    assert not unbroken("at_gen")[0].name.isascii() and " " in unbroken("at_gen")[0].name
    data = tmp_path / "a b, \u00fc\u0394 [1]"
    write_npz("mnist", colour=False, side=28).rename(data)
    where = ("--data-dir", data, "--out", tmp_path / "runs")
    assert commands("at_gen", *where, "--dataset", "mnist", "--only", "figure2.7") == (0, "")
    for i in range(60):
        file = data / "celeba" / "\u00e9 \u6f22" / f"\u0131 {i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (4 * i, i, 90)).save(file)
    assert commands("hat_ebm", *where, "--dataset", "celeba", "--side", 32, "--only", "figure6.9") == (0, "")


if __name__ == "__main__":
    nursery()
