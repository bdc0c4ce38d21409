r"""What the scripts share: the machinery of a run, data, and network architectures. Nothing of any method.

The names that you meet in a script, and may take on trust:
    settings, pick, parse_args   the table of settings; some of them; the command line made from it
    Run, experiments, once    a run's folder; its tables and figures; a thing made when first needed
    Training                  around a training loop: checkpoint, resume, log, time left, stop on divergence
    seeded                    decorator: the function's random numbers depend on --seed alone
    value, rate, bootstrap    a row of results: a number; a share; 95 % intervals
    picture_grid              images on a matplotlib axis; whole figures: run.pictures, .lines, .histograms
    input_gradient            gradient of a network's summed outputs with respect to its images
    repeat                    a step taken n times; on a GPU one recorded step is replayed
    frozen_copy, follow       a copy of a network for sampling, in bfloat16 where that is fast; its update
    fast_precision, by_parts  bfloat16 in networks, where that is fast; a function applied to parts of a batch
    load_images, train_and_test, load_on_device, batches   data sets by name; endless shuffled batches
    user_pictures, whole_file   a folder of pictures that a user has; a file, whole or not at all
    make_net, to_device, train_classifier   a network by name; on its device; a classifier of a data set
    call, UserError, Diverged   runs a script's main; what ends it with one line on stderr

Images are float32 in [0, 1], NCHW, wherever a function takes or returns them; networks scale or normalise
inside. The rooms: the run, speed, data, networks; then, underscored, file formats and devices.
"""
import signal
_ON_CTRL_C = signal.signal(signal.SIGINT, signal.SIG_DFL)  # the imports take seconds: it ends them quietly
import argparse
import collections
import contextlib
import copy
import csv
import dataclasses
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

if "ipykernel" not in sys.modules:  # pictures go to files; a notebook's choice is not installed everywhere
    os.environ["MPLBACKEND"] = "Agg"
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.transforms import RandomResizedCrop, functional as T
from torchvision.utils import make_grid
import matplotlib.pyplot as plt
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.titlesize": 9, "legend.fontsize": 8})
signal.signal(signal.SIGINT, _ON_CTRL_C)
torch.backends.cudnn.allow_tf32 = False  # float32 is float32; what may be rounded asks for bfloat16

class UserError(Exception):
    """Something that the user can mend: one line on stderr, exit code 2."""

class Diverged(Exception):
    """A training whose numbers went out of bounds: what was seen, what to try; rows: its log."""
    rows = ()

# === the run ================================================================================================
# --- settings and the command line --------------------------------------------------------------------------
def settings(columns, smoke, **rows):
    """A script's table of settings -> {(data set, budget): an instance of one dataclass}.
    columns: headings, "glyphs" or, for data sets alike, "cifar10 cifar100": what budget quick runs with;
    NAME-paper: the source's settings. A row is a setting: a value for each column (or one for all), then its
    help. smoke: what budget smoke changes in quick.
    """
    kinds, fields = {}, []
    for name, (*values, text) in rows.items():
        if len(values) not in (1, len(columns)):
            raise ValueError(f"setting {name} has {len(values)} values for {len(columns)} columns")
        kinds[name] = float if any(isinstance(v, float) for v in values) else type(values[0])
        fields.append((name, kinds[name], dataclasses.field(metadata={"help": text})))
    Settings = dataclasses.make_dataclass("Settings", fields, frozen=True)
    table = {}
    for position, heading in enumerate(columns):
        chosen = {}
        for name, row in rows.items():
            chosen[name] = kinds[name](row[0] if len(row) == 2 else row[position])
        for title in heading.split():
            dataset, _, budget = title.partition("-")
            table[dataset, budget or "quick"] = Settings(**chosen)
            if not budget:
                table[dataset, "smoke"] = Settings(**{**chosen, **smoke})
    return table

def pick(s, names):
    """{setting: value} of these settings, named in one string: what a trained network depends on."""
    return {name: getattr(s, name) for name in names.split()}

def at_least(least, s, names):
    """UserError where one of these settings, named in one string, is below `least`."""
    for name, number in pick(s, names).items():
        if not number >= least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}")

def above_0(s, names):
    """UserError where one of these settings is 0 or infinite."""
    for name, number in pick(s, names).items():
        if not 0 < number < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be above 0 and finite")

def check_radius(eps):
    """UserError for an l_inf radius that can't be meant."""
    if eps > 1:
        raise UserError(f"--eps {eps:g}: pixels are in [0, 1]; perhaps --eps {eps:g}/255 is meant")

def parse_args(doc, table, experiments, argv=None):
    """The flags that all scripts have, and one for each setting -> args, with args.settings filled in."""
    argv = sys.argv[1:] if argv is None else [str(a) for a in argv]
    datasets = list(dict.fromkeys(dataset for dataset, _ in table))
    p = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                add_help=False)
    p.add_argument("--dataset", "--data", default=datasets[0], metavar="NAME", help=f"one of {datasets}")
    p.add_argument("--budget", help="smoke (learns nothing), quick, paper (as the source); some sets: cpu")
    p.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1")
    chosen, _ = p.parse_known_args(argv)  # these decide what --help shows
    if chosen.dataset not in datasets:
        raise UserError(f"unknown --dataset '{chosen.dataset}'; known: {', '.join(datasets)}")
    if chosen.budget is None:
        chosen.budget = "quick"
        if (chosen.dataset, "cpu") in table and not _device(chosen.device).startswith("cuda"):
            chosen.budget = "cpu"
            print(f"no GPU: --budget cpu, the last classes of {chosen.dataset} alone, in about an hour")
    p.set_defaults(budget=chosen.budget, argv=argv)
    if (chosen.dataset, chosen.budget) not in table:
        known = [budget for dataset, budget in table if dataset == chosen.dataset]
        raise UserError(f"unknown --budget '{chosen.budget}' for {chosen.dataset}; known: {', '.join(known)}")
    p.add_argument("-h", "--help", action="help", help="this text, for the chosen --dataset and --budget")
    p.add_argument("--only", nargs="+", metavar="EXPERIMENT", help="these, not the headline experiments")
    p.add_argument("--list", action="store_true", help="list experiments, costs, published numbers")
    p.add_argument("--data-dir", type=Path, default=Path("data"), help="NAME.npz, image folders (data)")
    p.add_argument("--out", type=Path, default=Path("runs"), help="where the run's folder is made (runs)")
    p.add_argument("--seed", type=_whole, default=0, help="of everything random (0)")
    p.add_argument("--chunk", type=_whole, default=0, help="images or chains in one batch (125; a GPU 1600)")
    p.add_argument("--fresh", action="store_true", help="drop this run's checkpoints, logs and results first")
    defaults = table[chosen.dataset, chosen.budget]
    kinds = {int: _whole, float: _number, str: str, bool: _whole}
    for field in dataclasses.fields(defaults):
        default = getattr(defaults, field.name)
        flag = {"nargs": "?", "const": True} if field.type is bool else {"metavar": "VALUE"}
        p.add_argument("--" + field.name.replace("_", "-"), type=kinds[field.type], **flag,
                       default=default, help=f"{field.metadata['help']} ({default})".replace("%", "%%"))
    args = p.parse_args(argv)
    args.settings = type(defaults)(*[getattr(args, field.name) for field in dataclasses.fields(defaults)])
    if args.list:
        _print_list(experiments, args.dataset)
        raise SystemExit(0)
    for name in args.only or ():
        if name not in experiments:
            raise UserError(f"unknown experiment '{name}'; known: {', '.join(experiments)}")
    args.only = args.only or [name for name, e in experiments.items() if e.headline]
    if args.seed >= 2 ** 31:
        raise UserError("--seed must be below 2147483648")
    args.device = _device(args.device)
    args.data_dir, args.out = args.data_dir.expanduser(), args.out.expanduser()
    args.chunk = args.chunk or (1600 if args.device.startswith("cuda") else 125)
    return args

Experiment = collections.namedtuple("Experiment", "function headline shows")  # shows: its docstring's start

def experiments(headline, others=()):
    """Two lists of functions -> {name: Experiment}; that of table_2_1 is "table2.1"."""
    registry = {}
    for function in [*headline, *others]:
        kind, *number = function.__name__.split("_")
        numbered = kind in ("table", "figure")
        name = kind + ".".join(number) if numbered else function.__name__.replace("_", "-")
        shows = inspect.getdoc(function).splitlines()[0]
        registry[name] = Experiment(function, function in headline, shows)
    return registry

def _print_list(registry, dataset):
    """--list: a line for each experiment, headline ones marked, published numbers below."""
    script = Path(sys.argv[0]).stem
    costs = _read_json(RESULTS / f"{script}-{dataset}.json")
    for name, e in registry.items():
        cost = f" [{costs[name]['seconds']:.0f} s]" if name in costs else ""
        print(f"{'*' if e.headline else ' '} {name:12} {e.shows}{cost}")
        for row in published(script, dataset, name):
            print(f"{'':15}published: {row['quantity']} {row['value']} ({row['source']})")
    print("* runs without --only; [seconds in results/, including what it trained first]")

def call(main):
    """Run a script's main; what ends it early is one line on stderr and exit code 2, 1 (diverged) or 130."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a letter gets its number
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # piped into head: ends without a word, as other commands do
        os._exit(141)
    except (UserError, Diverged, KeyboardInterrupt, torch.cuda.OutOfMemoryError) as error:
        said = {KeyboardInterrupt: "interrupted; the same command, less --fresh, goes on where it was",
                torch.cuda.OutOfMemoryError: "the GPU's memory is full; try a lower --chunk, or --batch"}
        text = f"{Path(sys.argv[0]).name}: {said.get(type(error), error)}"
        print(text.replace("\n", " "), file=sys.stderr)
        sys.exit({Diverged: 1, KeyboardInterrupt: 130}.get(type(error), 2))

# --- results: rows, published numbers, the run's folder -----------------------------------------------------
RESULTS = Path(__file__).resolve().parent / "results"

def value(quantity, number, **beside):
    """A row of results: a number, and the settings that a reader needs beside it (n=100, K=75)."""
    return {"quantity": quantity, "value": number, **beside}

def rate(quantity, right, **beside):
    """A row of results: the share of true entries of a bool tensor, its n and its 95 % Wilson interval."""
    n, successes = right.numel(), int(right.sum())
    return {"quantity": quantity, "value": successes / n, "interval": wilson(successes, n), "n": n, **beside}

def wilson(successes, n):
    """95 % Wilson interval [low, high] of a rate."""
    z, p = 1.959964, successes / n
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [max((middle - half) / (1 + z * z / n), 0.0), min((middle + half) / (1 + z * z / n), 1.0)]

def bootstrap(statistic, *samples):
    """95 % interval of statistic(*samples): each sample [n, ...] is drawn anew from itself, with repeats."""
    found, g = [], torch.Generator().manual_seed(0)
    for _ in range(500):
        again = [x[torch.randint(len(x), (len(x),), generator=g).to(x.device)] for x in samples]
        found.append(float(statistic(*again)))
    return np.quantile(found, [0.025, 0.975]).tolist()

def published(script, dataset, experiment):
    """The source's numbers for an experiment on a data set: rows of results/published.json."""
    return _read_json(RESULTS / "published.json").get(script, {}).get(dataset, {}).get(experiment, [])

def shown(number):
    """A number in a table: four digits, five of one that is nearly 1."""
    digits = 5 if isinstance(number, float) and 0.99 < number < 1 else 4
    return f"{number:.{digits}g}" if isinstance(number, float) else str(number)

def shown_row(row):
    """A row of results as (quantity, settings beside it, number with its interval)."""
    settings = [key for key in row if key not in ("quantity", "value", "interval", "source")]
    beside = ", ".join(f"{key} {shown(row[key])}" for key in settings)
    low, high = row.get("interval", (0, 0))
    digits = 2 if high - low > 0.03 else 3
    interval = f" [{low:.{digits}f}, {high:.{digits}f}]" if low < high else ""
    return row["quantity"], beside, shown(row["value"]) + interval

def picture_grid(axis, x, columns, title):
    """Draw images float [N, C, H, W], clamped to [0, 1], as a grid on a matplotlib axis."""
    pixels = make_grid(x.detach().cpu().clamp(0, 1), columns, padding=1, pad_value=0.5)
    axis.imshow(pixels.permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.set_title(title, fontsize=10)
    axis.axis("off")

def multiples(k, factors):
    """Numbers of steps for a curve: these multiples of k, at least 1, in order."""
    return sorted({max(round(factor * k), 1) for factor in factors})

class once(functools.partial):
    """A thing that is made when it is first needed: f = once(lambda: train_f(run, s, data)); f() is f."""
    def __new__(cls, make):
        return super().__new__(cls, functools.cache(make))

class Run:
    """A run's folder OUT/SCRIPT-DATASET: config.json, log-*.csv, checkpoints, pictures, results.json.
    .seed, .device, .chunk, .data_dir, .smoke (learns nothing): of the command line. .shared: a folder for
    what several scripts train alike. about: what else each result is to say (p0="letters").
    """
    def __init__(self, script, args, side=32, **about):
        self.script, self.args, self.seed, self.data_dir = script, args, args.seed, args.data_dir
        self.chunk = max(args.chunk // max(side // 32, 1) ** 2, 1)  # fewer large pictures at once
        self.device, self.smoke = torch.device(args.device), args.budget == "smoke"
        self.folder = args.out / f"{script}-{args.dataset}"
        self.shared = args.out / f"shared-{args.dataset}"
        try:
            for folder in (self.folder, self.shared):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {args.out}: cannot make {folder} ({error.strerror})") from None
        try:  # one process at a time; the lock goes with it, however it ends
            import fcntl
            self.lock = open(args.out / f".{self.folder.name}.lock", "w")
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.folder}: another run is at work there; wait, or another --out") from None
        except (ImportError, OSError):  # Windows; a file system without locks
            pass
        for file in self.folder.iterdir() if args.fresh else ():
            if file.suffix in (".pt", ".csv", ".json", ".png", ".gif", ".tmp"):
                try:
                    file.unlink()
                except OSError as error:
                    raise UserError(f"--fresh: {file} cannot be removed ({error.strerror})") from None
        self.about = {"command": shlex.join(["python", f"{script}.py", *args.argv]), "dataset": args.dataset,
                      "budget": args.budget, "seed": args.seed, "hardware": _hardware(self.device),
                      "torch": torch.__version__, "commit": _commit(), **about}

    def experiments(self, registry, **have):
        """Run the chosen experiments. Each gets what its arguments name, of `have`; once() are made then."""
        have = {"run": self, "s": self.args.settings, **have}
        results = _read_json(self.folder / "results.json")
        for name in self.args.only:
            print(f"\n{name}: {registry[name].shows}", flush=True)
            start = time.time()
            given = {}
            for argument in inspect.signature(registry[name].function).parameters:
                torch.manual_seed(self.seed)  # nothing depends on the experiments before it
                given[argument] = have[argument]() if isinstance(have[argument], once) else have[argument]
            torch.manual_seed(self.seed)
            rows = registry[name].function(**given)
            results[name] = {"rows": rows, "seconds": round(time.time() - start, 1), **self.about}
            _write_json(self.folder / "results.json", results)
            _write_json(self.folder / "config.json", {
                **self.about, "torchvision": torchvision.__version__, "numpy": np.__version__,
                "matplotlib": matplotlib.__version__, "python": platform.python_version(),
                "settings": dataclasses.asdict(self.args.settings)})
        self.closing_table(results)

    def closing_table(self, results):
        """Print the chosen experiments' rows, ours beside published."""
        print(f"\n{'experiment':11} {'quantity':46} {'with':26} {'ours':>20} {'published':>10}")
        for name in self.args.only:
            rows = published(self.script, self.args.dataset, name)
            theirs = {row["quantity"]: row["value"] for row in rows}
            for row in results[name]["rows"]:
                quantity, beside, number = shown_row(row)
                print(f"{name:11} {quantity:46} {beside:26} {number:>20} {theirs.pop(quantity, ''):>10}")
            for quantity, number in theirs.items():
                print(f"{name:11} {quantity:46} {'':26} {'':>20} {number:>10}")
        print(f"\npictures, logs and results.json: {self.folder}{os.sep}")

    def save(self, figure, name):
        """Write a figure to NAME.png and close it."""
        with whole_file(self.folder / f"{name}.png") as scratch:
            figure.savefig(scratch, dpi=110, format="png")
        plt.close(figure)

    def pictures(self, name, rows, columns):
        """NAME.png: a picture grid below the other, {title: float [N, C, H, W], shown clamped to [0, 1]}."""
        high = [math.ceil(len(x) / columns) / columns for x in rows.values()]
        size = (9, 9 * sum(high) + 0.4 * len(rows))
        figure, axes = plt.subplots(len(rows), 1, figsize=size, squeeze=False, height_ratios=high)
        for axis, (title, x) in zip(axes[:, 0], rows.items()):
            picture_grid(axis, x, columns, title)
        self.save(figure, name)

    def lines(self, name, rows, x, **axis_settings):
        """NAME.png: rows over each setting that x names ("steps N"): a line a quantity, shaded intervals."""
        panels = x.split()
        figure, axes = plt.subplots(1, len(panels), figsize=(1.2 + 4.4 * len(panels), 3.6), squeeze=False)
        for axis, x in zip(axes[0], panels):
            for quantity in dict.fromkeys(row["quantity"] for row in rows if x in row):
                points = [row for row in rows if row["quantity"] == quantity and x in row]
                places, heights = [row[x] for row in points], [row["value"] for row in points]
                axis.plot(places, heights, "o-", ms=3, label=quantity)
                if "interval" in points[0]:
                    axis.fill_between(places, *zip(*[row["interval"] for row in points]), alpha=0.15)
            axis.set(xlabel=x, **axis_settings)
            axis.legend(framealpha=0.5)
        self.save(figure, name)

    def histograms(self, name, panels):
        """NAME.png: {title: {label: values [n]}}, a panel for each title; dashed lines are means."""
        figure, axes = plt.subplots(1, len(panels), figsize=(1 + 4 * len(panels), 3), squeeze=False)
        for axis, (title, groups) in zip(axes[0], panels.items()):
            edges = np.histogram_bin_edges(torch.cat([*groups.values()]).tolist(), 40)  # the same for all
            for i, (label, values) in enumerate(groups.items()):
                axis.hist(values.tolist(), edges, density=True, histtype="step", color=f"C{i}", label=label)
                axis.axvline(values.mean().item(), color=f"C{i}", ls="--", lw=1)
            axis.set(title=title, yticks=[])
            axis.legend()
        self.save(figure, name)

# --- training loops and randomness --------------------------------------------------------------------------
class Training:
    """What stands around a training loop: checkpoint, resume, log, time left, and a stop on divergence.

        training = Training(run, "energy", {"updates": 800}, V=V, bank=bank, adam=adam)
        for it in training.updates(800):              # it = 1 ... 800, or the rest of an interrupted loop
            ...
            training.log(loss=loss, K=K)              # floats: mean since the last line; ints: the last one

    parts: what NAME.pt keeps: modules, optimisers, schedules, tensors, lists. The constructor restores them,
    in place, and the random generators: an interrupted loop goes on where it was, on a CPU bit for bit.
    made_from: settings, networks, images, functions that the result depends on; a checkpoint made from others
    is refused or, where names are `unique`, not looked at. limits: {name: largest value} of what is logged;
    beyond, or where it is not finite, Diverged is raised with `advice`. rows: the log.
    """
    LINES = 20           # of the log, in a whole training
    SAVE_SECONDS = 60    # from one checkpoint to the next
    PRINT_SECONDS = 5    # from one line on the screen to the next

    def __init__(self, run, name, made_from, limits=None, advice="a lower learning rate", unique=False,
                 folder=None, **parts):
        self.run, self.parts, self.limits, self.advice = run, parts, limits or {}, advice
        self.made_from = {"seed": run.seed, **identity(made_from)}
        if unique:
            name += "-" + hashlib.sha1(str(self.made_from).encode()).hexdigest()[:8]
        self.name, self.folder = name, folder or run.folder
        self.file = self.folder / f"{name}.pt"
        state = _load_checkpoint(self.file, self.made_from, run)
        fresh = {"it": 0, "rows": [], "since": {}, "seconds": 0.0, "finished": False}
        for key in fresh:
            setattr(self, key, (state or fresh)[key])
        for key, part in parts.items() if state else ():
            if isinstance(part, torch.Tensor):
                part.copy_(state[key])
            elif isinstance(part, list):
                part[:] = state[key]
            else:
                part.load_state_dict(state[key])

    def updates(self, total, unit="update", done=None):
        """Count it = 1 ... total. done(it): share of the work. Ctrl-C: this update ends, and is saved."""
        asked = []
        note = lambda *about: signal.default_int_handler(*about) if asked else asked.append(about)
        usual = signal.signal(signal.SIGINT, note)
        try:
            yield from self._updates(total, unit, done, asked)
        finally:
            signal.signal(signal.SIGINT, usual)

    def _updates(self, total, unit, done, asked):
        if self.finished or total == 0:
            return
        print(f"{self.name}: {total - self.it} {unit}s", flush=True)
        done = done or (lambda it: it / total)
        begin, before, every = done(self.it), self.seconds, max(total // self.LINES, 1)
        self.start = printed = saved = time.time()
        self._write_log()
        for it in range(self.it + 1, total + 1):
            yield it
            self.it, self.finished = it, self.finished or it == total
            line_due = it % every == 0 or self.finished
            if line_due and self.run.device.type == "cuda":
                torch.cuda.synchronize(self.run.device)  # so that seconds are true ones
            self.seconds = before + time.time() - self.start
            if line_due:
                self._line()
            if line_due and (self.finished or time.time() - printed > self.PRINT_SECONDS):
                printed = time.time()
                left = (self.seconds - before) * (1 - done(it)) / max(done(it) - begin, 1e-9)
                last = [f"{k} {v:6.4g}" for k, v in self.rows[-1].items() if k not in ("it", "seconds")]
                text = "" if self.finished else f", {left:.0f} s left"
                print(f"{it:6d}/{total}  {'  '.join(last)}  {self.seconds:.0f} s{text}", flush=True)
            if self.finished or asked or time.time() - saved > self.SAVE_SECONDS:
                self._save()
                saved = time.time()
            if asked:
                raise KeyboardInterrupt
            if self.finished:
                return

    @torch.no_grad()
    def log(self, **numbers):
        """Numbers or 0-d tensors of this update, for the log; nothing waits for the device here."""
        for key, new in numbers.items():
            total, n = self.since.get(key, (0.0, 0))
            new = new if isinstance(new, int) else total + torch.as_tensor(new, dtype=torch.float64)
            self.since[key] = (new, n + 1)

    @contextlib.contextmanager
    def pause(self):
        """What runs inside (an evaluation) does not count as training time."""
        began = time.time()
        yield
        self.start += time.time() - began

    def _line(self):
        """One line of the log from what was logged since the last one; raises Diverged."""
        row = {"it": self.it}
        for key, (total, n) in self.since.items():  # the last one of whole numbers, the sum of others
            row[key] = total if isinstance(total, int) else float(f"{float(total) / n:.5g}")
        row["seconds"] = round(self.seconds, 1)
        self.since = {}
        self.rows.append(row)
        self._write_log()
        for key, number in row.items():
            if not abs(number) <= self.limits.get(key, sys.float_info.max):
                stop = Diverged(f"training {self.name} diverged at or before update {self.it}: {key} is "
                                f"{number:.3g}; try {self.advice}")
                stop.rows = self.rows
                raise stop

    def _write_log(self):
        """log-NAME.csv from the rows: after a resume it holds what the checkpoint knows, no more."""
        with whole_file(self.folder / f"log-{self.name}.csv") as scratch, open(scratch, "w", newline="") as f:
            writer = csv.DictWriter(f, fieldnames=dict.fromkeys(itertools.chain(*self.rows)) or ["it"])
            writer.writeheader()
            writer.writerows(self.rows)

    def _save(self):
        """The checkpoint NAME.pt: state, what it was made from, the generators; atomic."""
        if not all(math.isfinite(total) for total, _ in self.since.values()):
            return  # the log's next line stops a diverged loop; the checkpoint before stays
        names = ("it", "rows", "since", "seconds", "finished", "made_from")
        state = {key: getattr(self, key) for key in names}
        state["smoke"], state["rng"] = self.run.smoke, {"cpu": torch.get_rng_state()}
        if self.run.device.type == "cuda":
            state["rng"]["cuda"] = torch.cuda.get_rng_state(self.run.device)
        for key, part in self.parts.items():
            state[key] = part if isinstance(part, (torch.Tensor, list)) else part.state_dict()
        with whole_file(self.file) as scratch, open(scratch, "wb") as file:  # by Python: it sees a full disk
            torch.save(state, file)

def seeded(function):
    """Decorator: random numbers of function(run, ...) depend on --seed alone; others' stay as they were."""
    @functools.wraps(function)
    def wrapped(run, *arguments, **options):
        with torch.random.fork_rng([torch.cuda.current_device()] if run.device.type == "cuda" else []):
            torch.manual_seed(run.seed)
            return function(run, *arguments, **options)
    return wrapped

# === speed ==================================================================================================
def input_gradient(function, x):
    """Gradient of the SUM of function(x) with respect to x [B, ...]; no parameter's .grad is touched."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        gradient, = torch.autograd.grad(function(x).float().sum(), x)
    return gradient

def repeat(step, x, n, *arguments):
    """x = step(x, *arguments), n times -> the last x: a tensor, or a tuple of tensors.
    The plain loop on a CPU. On a GPU the step is recorded once as a CUDA graph and replayed, because small
    networks are bound by the launches of their kernels. Tensors are then padded by at most an eighth; other
    arguments must be the same objects again: networks and numbers, not new lambdas.
    """
    first = x if isinstance(x, torch.Tensor) else x[0]
    with torch.no_grad():
        if first.device.type == "cuda" and n:
            return _replay(step, x, n, arguments)
        for _ in range(n):
            x = step(x, *arguments)
    return x

class frozen_copy(nn.Module):
    """A network's copy for sampling: constant weights, eval mode; bfloat16 inside where that is fast."""
    def __init__(self, net, fast=True):
        super().__init__()
        self.net = copy.deepcopy(net).requires_grad_(False).eval()
        self.dtype = torch.float32
        weight = next(net.parameters(), None)  # none in an energy in closed form
        if fast and weight is not None and bfloat16_units(weight.device):
            self.dtype = torch.bfloat16
            self.net = self.net.to(torch.bfloat16, memory_format=torch.channels_last)
    def forward(self, x):
        return self.net(x.to(self.dtype)).float()

@torch.no_grad()
def follow(frozen, net):
    """Take over the weights that `net` has now; in place, so that recorded steps see them."""
    for mine, its in zip(frozen.net.state_dict().values(), net.state_dict().values()):
        mine.copy_(its)

def bfloat16_units(device):
    """Whether the processor computes in bfloat16: a GPU from Ampere on, a CPU with AMX or AVX512-BF16."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    kinds = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return torch.device(device).type == "cpu" and any(getattr(torch.cpu, kind, bool)() for kind in kinds)

def fast_precision(device):
    """A context: bfloat16 autocast where the processor has units for it, else nothing."""
    kind, fast = torch.device(device).type, bfloat16_units(device)
    # without its cache of weights, which outlives their update and does not go into a CUDA graph
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=fast, cache_enabled=False)

def to_device(net, device):
    """A network on the device; channels-last where bfloat16 units want it."""
    layout = torch.channels_last if bfloat16_units(device) else torch.preserve_format
    return net.to(device, memory_format=layout)

def by_parts(function, x, size, *tensors, dim=0):
    """function(x, ...) of parts of at most `size` rows of all of them, joined again; dim: where rows are."""
    parts = [tensor.split(size, dim) for tensor in (x, *tensors)]
    return torch.cat([function(*part) for part in zip(*parts)], dim)

_RECORDED = collections.OrderedDict()  # what a step depends on: its _Recording; the oldest of 100 is dropped

def _replay(step, x, n, arguments):
    """The body of repeat() on a GPU."""
    single = isinstance(x, torch.Tensor)
    state = (x,) if single else x
    rows = len(state[0])
    size = _padded_size(rows)
    key = [step, single, size]
    for thing in (*state, *arguments):
        if isinstance(thing, torch.Tensor):
            batched = thing.dim() > 0 and len(thing) == rows
            thing = (thing.shape[1:] if batched else thing.shape, thing.dtype, batched)
        key += [type(thing), thing, getattr(thing, "training", None)]
    key = tuple(key)
    if key not in _RECORDED:
        if len(_RECORDED) >= 100:
            _RECORDED.popitem(last=False)
        _RECORDED[key] = _Recording(step, single, state, arguments, size)
    _RECORDED.move_to_end(key)
    after = _RECORDED[key].run(state, arguments, n)
    return after[0] if single else after

def _padded_size(rows):
    """The least multiple of a power of two, at most an eighth of `rows`, that holds them."""
    grain = 2 ** max(int(math.log2(rows)) - 3, 0)
    return -(-rows // grain) * grain

class _Recording:
    """A step on buffers of its own, recorded as a CUDA graph. All graphs share one pool: they run in turn."""
    pool = stream = None

    def __init__(self, step, single, state, arguments, size):
        def buffer(thing):  # of `size` rows where a tensor has one for each image
            if not isinstance(thing, torch.Tensor):
                return thing
            batched = thing.dim() > 0 and len(thing) == len(state[0])
            return thing.new_zeros(size, *thing.shape[1:]) if batched else torch.zeros_like(thing)
        self.state, self.arguments = [buffer(t) for t in state], [buffer(a) for a in arguments]
        self.fill(state, arguments)
        given = self.state[0] if single else tuple(self.state)
        _Recording.stream = stream = _Recording.stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.random.fork_rng([torch.cuda.current_device()]), torch.cuda.stream(stream):
            for _ in range(3):  # warm-up outside the graph, as PyTorch asks; its random numbers do not count
                step(given, *self.arguments)
        torch.cuda.current_stream().wait_stream(stream)
        _Recording.pool = _Recording.pool or torch.cuda.graph_pool_handle()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=_Recording.pool):
            after = step(given, *self.arguments)
            for mine, new in zip(self.state, (after,) if single else after):
                mine.copy_(new)
    def fill(self, state, arguments):
        """Copy what the next replays start from, and their arguments, into the buffers."""
        for mine, new in zip((*self.state, *self.arguments), (*state, *arguments)):
            if isinstance(new, torch.Tensor):
                (mine[:len(new)] if new.dim() else mine).copy_(new)
    def run(self, state, arguments, n):
        self.fill(state, arguments)
        for _ in range(n):
            self.graph.replay()
        pairs = zip(self.state, state)
        return tuple((mine[:len(new)] if new.dim() else mine).clone() for mine, new in pairs)

# === data ===================================================================================================
IN_MEMORY = {  # name: (channels, side, classes); NAME.npz in --data-dir first, else made or downloaded
    "glyphs": (1, 28, 10), "letters": (1, 28, 48), "symbols": (1, 28, 24),
    "mnist": (1, 28, 10), "fashion_mnist": (1, 28, 10), "noise": (1, 28, 1),
    "cifar10": (3, 32, 10), "cifar100": (3, 32, 100), "svhn": (3, 32, 10), "tinyimagenet": (3, 64, 200),
}
FOLDERS = ("celebahq", "celeba", "afhq_cat", "lsun_church", "imagenet", "flowers102")  # of picture files
LABELLED = ("imagenet", "flowers102", "tiny-imagenet-200")  # each class has a folder
DIGITS = "0123456789"
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnpqrstuvwxyz"  # without I, O, l, o: those are a 1 and a 0
SYMBOLS = "#$%&+=<>?@{}~!" + "\u0393\u0394\u0398\u03a3\u03a9\u03b1\u03b2\u03bb\u221e\u2192"
TEXT_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold",
              "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol",
              "STIXGeneralItalic", "STIXGeneralBolIta", "cmr10", "cmb10", "cmss10", "cmtt10")

@dataclasses.dataclass
class Images:
    """A data set in memory: x uint8 [N, C, H, W], y int64 [N] (or masks), and the name of its source."""
    x: torch.Tensor
    y: torch.Tensor
    name: str
    shape = property(lambda self: tuple(self.x.shape[1:]))
    def __len__(self):
        return len(self.x)
    def take(self, index):
        """Images of these indices (tensor, list or slice) as float32 [B, C, H, W] in [0, 1]."""
        index = index.to(self.x.device) if isinstance(index, torch.Tensor) else index
        return self.x[index].float() / 255
    def some(self, n):
        """A fixed random choice of n images, float32 [n, C, H, W], and their labels [n]."""
        index = shuffled(len(self), 123)[:n].to(self.x.device)
        return self.take(index), self.y[index]
    def from_class(self, first):
        """The images of class `first` and of those after it, whose labels count from 0 again."""
        kept = self.y >= first
        return Images(self.x[kept], self.y[kept] - first, self.name)
    def to(self, device):
        return Images(self.x.to(device), self.y.to(device), self.name)

def load_images(name, split="train", data_dir="data", channels=None, side=None):
    """A data set by name -> Images or, for folders of large pictures, Pictures; UserError where that fails.
    split: train or test. channels, side: what the script asks for; grey is repeated, colour averaged."""
    data_dir = Path(data_dir)
    for word, known in ((name, (*IN_MEMORY, *FOLDERS)), (split, ("train", "test"))):
        if word not in known:
            raise UserError(f"unknown data set or split '{word}'; known: {', '.join(known)}")
    if name in FOLDERS:
        return Pictures(*_picture_files(data_dir / name, split), side or 256, name)
    own_channels, own_side, classes = IN_MEMORY[name]
    channels, side = channels or own_channels, side or own_side
    file = data_dir / f"{name}.npz"
    if name in ("glyphs", "letters", "symbols", "noise"):
        x, y = _made_here(name, split, channels, side)
    elif file.exists():
        x, y = _read_npz(file, split, IN_MEMORY[name])
    elif name == "tinyimagenet":
        pictures = in_memory(Pictures(*_picture_files(data_dir / "tiny-imagenet-200", split), 64, name))
        x, y = pictures.x, pictures.y
    else:
        x, y = _download(name, split, data_dir)
    if x.shape[-2:] != (side, side):
        x = by_parts(functools.partial(T.resize, size=[side, side], antialias=True), x, 1000)
    if channels == 3 and x.shape[1] == 1:
        x = x.expand(-1, 3, -1, -1).contiguous()
    elif channels == 1 and x.shape[1] == 3:
        x = x.float().mean(1, keepdim=True).round().to(torch.uint8)
    return Images(x, y, name)

def load_on_device(args, name, split, channels=None, side=None):
    """A data set on args.device. Pictures in files are read into memory, where it takes less than 8 GB."""
    images = load_images(name, split, args.data_dir, channels, side)
    if isinstance(images, Pictures) and len(images) * math.prod(images.shape) < 8e9:
        images = in_memory(images)
    return images.to(args.device)

def train_and_test(args, batch, images, side=None):
    """Both splits of args.dataset, on the device, from the setting first_class on; UserError for too few."""
    first = getattr(args.settings, "first_class", 0)
    parts = [load_on_device(args, args.dataset, split, None, side) for split in ("train", "test")]
    data, test = [part.from_class(first) if first else part for part in parts]
    if images > len(test) or batch > len(data):
        raise UserError(f"--images, --batch: {args.dataset} has {len(test)} to test, {len(data)} to train")
    return data, test

@functools.lru_cache(maxsize=32)
def shuffled(n, seed):
    """A permutation of n indices that depends on the seed alone."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))

def batch_index(n, size, seed, t):
    """Indices int64 [size] of batch t: shuffled passes over n items, laid end to end."""
    place = torch.arange(t * size, (t + 1) * size)
    index = []
    for epoch in range(int(place[0]) // n, int(place[-1]) // n + 1):
        index.append(shuffled(n, seed + 7919 * epoch)[place[place // n == epoch] % n])
    return torch.cat(index)

def batches(images, size, seed, start=0, augment="none", device="cpu", workers=2):
    """Endless shuffled batches: an iterator of float32 [size, C, H, W] in [0, 1] and the indices [size].
    Batch t depends on (seed, t) alone: a run resumed at `start` sees the images that it would have seen.
    augment: none; of Images crop (after padding by 4) or crop_flip; of Pictures a name of CROPS (and flip).
    """
    known = ("none", "crop", "crop_flip") if isinstance(images, Images) else ("none", *CROPS)
    if augment not in known:
        raise UserError(f"no augmentation '{augment}' for {images.name}; known: {', '.join(known)}")
    if isinstance(images, Images):
        return _batches_in_memory(images, size, seed, start, augment, device)
    return _batches_of_pictures(images, size, seed, start, augment, device, workers)

def _batches_in_memory(images, size, seed, start, augment, device):
    for t in itertools.count(start):
        index = batch_index(len(images), size, seed, t)
        x = images.take(index).to(device)
        if augment != "none":
            x = crop_flip(x, seed + 31 * t, flip=augment == "crop_flip")
        yield x, index

def _batches_of_pictures(images, size, seed, start, augment, device, workers):
    def keys():
        for t in itertools.count(start):
            index = batch_index(len(images), size, seed, t).tolist()
            yield [(i, augment, seed + size * t + j) for j, i in enumerate(index)]
    loader = torch.utils.data.DataLoader(images, batch_sampler=keys(), num_workers=workers,
                                         generator=torch.Generator())  # else it draws from everybody's
    with _errors_of_workers():
        for t, x in enumerate(loader, start):
            yield x.to(device).float() / 255, batch_index(len(images), size, seed, t)

def crop_flip(x, seed, pad=4, flip=True):
    """Random zero-padded crop and horizontal flip, per image, of floats [B, C, H, W] by tensor functions."""
    g = torch.Generator().manual_seed(seed)
    b, _, h, w = x.shape
    dy, dx = torch.randint(0, 2 * pad + 1, (2, b), generator=g).to(x.device)
    mirror = (torch.rand(b, generator=g) < 0.5).to(x.device) & flip
    rows = dy[:, None] + torch.arange(h, device=x.device)                                         # [B, H]
    cols = torch.arange(w, device=x.device)
    cols = dx[:, None] + torch.where(mirror[:, None], w - 1 - cols, cols)                         # [B, W]
    padded = F.pad(x, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    i = torch.arange(b, device=x.device)[:, None, None]
    return padded[i, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2).contiguous()

# --- sets that are rendered here ----------------------------------------------------------------------------
@functools.lru_cache(maxsize=8)
def _made_here(name, split, channels=1, side=28):
    """Sets without a file: rendered digits, letters and symbols (10,000 train, 2,000 test), uniform noise."""
    n, offset = (10_000, 0) if split == "train" else (2_000, 1)
    if name == "noise":
        x = np.random.RandomState(77 + offset).randint(0, 256, (n, channels, side, side), dtype=np.uint8)
        return torch.from_numpy(x), torch.zeros(n, dtype=torch.long)
    drawn = {"glyphs": (DIGITS, TEXT_FONTS, 10), "letters": (LETTERS, TEXT_FONTS, 20),
             "symbols": (SYMBOLS, TEXT_FONTS[:12], 30)}  # the cm files hold other signs in their places
    chars, fonts, seed = drawn[name]
    return render_glyphs(chars, fonts, n, seed + offset)

def render_glyphs(chars, fonts, n, seed, side=28):
    """n random characters -> uint8 [n, 1, side, side] (white on black), labels int64 [n] (index in `chars`).
    Random font, size (16 to 22 pixels of 28), rotation (12 degrees), shear (.15), shift (2 pixels). NumPy's
    frozen stream, a warp in float64: the same bytes wherever matplotlib (its fonts) is the same.
    """
    templates, owner = [], []  # a drawing of each character in each font; its place in `chars`
    for place, char in enumerate(chars):
        for font in fonts:
            template = _glyph_template(font, char)
            if template is not None:
                templates.append(template)
                owner.append(place)
    lacking = [char for place, char in enumerate(chars) if place not in owner]
    if lacking:
        raise UserError(f"no font of this matplotlib ({matplotlib.__version__}) has {lacking}: reinstall it")
    templates = torch.from_numpy(np.stack(templates))[:, None]                            # [M, 1, 64, 64]
    random = np.random.RandomState(seed)
    label = random.randint(len(chars), size=n, dtype=np.int64)
    first = np.searchsorted(owner, label)  # each character's drawings stand together
    count = np.searchsorted(owner, label, side="right") - first
    which = torch.from_numpy(first + np.floor(random.rand(n) * count).astype(np.int64))
    u = torch.from_numpy(random.rand(5, n) * 2 - 1)
    scale = 64 / 44 * side / 28 * (19 + 3 * u[0]) / side  # size of the drawing relative to the target frame
    angle, shear, shift = u[1] * math.pi / 15, u[2] * 0.15, u[3:] * 2 * 2 / 28
    cos, sin = angle.cos() / scale, angle.sin() / scale
    across = torch.stack([cos, sin + shear * cos, shift[0]], -1)
    down = torch.stack([-sin, cos - shear * sin, shift[1]], -1)
    theta = torch.stack([across, down], 1)                                                     # [n, 2, 3]
    images = []
    for t, k in zip(theta.split(2000), which.split(2000)):  # two samples a pixel and side: no aliasing
        grid = F.affine_grid(t, (len(t), 1, 2 * side, 2 * side), align_corners=False)
        warped = F.avg_pool2d(F.grid_sample(templates[k], grid, align_corners=False), 2)
        images.append((warped.clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.cat(images), torch.from_numpy(label)

@functools.lru_cache(maxsize=None)
def _glyph_template(font, char):
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
    above, before = (64 - glyph.shape[0]) // 2, (64 - glyph.shape[1]) // 2
    return np.pad(glyph, ((above, 64 - glyph.shape[0] - above), (before, 64 - glyph.shape[1] - before)))

# --- pictures in files: sets of 256 pixels ------------------------------------------------------------------
CROPS = {  # random-resized-crops of large pictures: relative area, aspect, probability (else centre crop)
    "rrc": ((0.08, 1), (3 / 4, 4 / 3), 1.0), "mild": ((0.9, 1), (0.95, 1.05), 0.5),
    "medium": ((0.8, 1), (0.9, 1.1), 0.5)}

class Pictures(torch.utils.data.Dataset):
    """A data set of large pictures in files, read when needed; indexed by i or by (i, crop, seed).
    folders: for each file the name of its class folder, or None; classes: those of the train split.
    """
    def __init__(self, files, folders, classes, side, name):
        self.files, self.folders, self.classes, self.side, self.name = files, folders, classes, side, name
        self.shape = (3, side, side)
        for file in files:  # what its first bytes tell is said now, and not after an hour
            _open_picture(file, header=True)
    @functools.cached_property
    def y(self):
        """Labels int64 [N]: places of the folders in `classes`; UserError for one that is not there."""
        place = {name: i for i, name in enumerate(self.classes)}
        for file, folder in zip(self.files, self.folders):
            if folder not in place:
                where = f"{folder} is no class" if folder else "it is in no class folder"
                raise UserError(f"{file}: {where} of the train split ({len(place)} folders)")
        return torch.tensor([place[folder] for folder in self.folders])
    def __len__(self):
        return len(self.files)
    def __getitem__(self, key):
        """-> uint8 [3, side, side]."""
        i, *crop = key if isinstance(key, tuple) else (key,)
        return picture_tensor(_open_picture(self.files[i]), self.side, *crop)
    def take(self, index):
        """Centre crops of these indices as float32 [B, 3, side, side] in [0, 1]."""
        if isinstance(index, slice):
            index = range(*index.indices(len(self)))
        return torch.stack([self[int(i)] for i in index]).float() / 255
    def from_class(self, first):
        raise UserError("--first-class is not for pictures in folders")
    def to(self, device):
        return self  # pictures stay in their files; a batch moves to the device when it is used

def in_memory(pictures, index=slice(None), workers=2):
    """Pictures -> Images: these of them, as centre crops, with their labels where the set has any."""
    index = torch.arange(len(pictures))[index]
    y = pictures.y if pictures.classes else torch.zeros(len(pictures), dtype=torch.long)
    loader = torch.utils.data.DataLoader(pictures, 64, sampler=index.tolist(), num_workers=workers,
                                         generator=torch.Generator())  # else it draws from everybody's
    with _errors_of_workers():
        parts = [part.clone() for part in loader]  # out of memory that is shared with the workers
    return Images(torch.cat(parts), y[index], pictures.name)

def user_pictures(folder, output, side):
    """A user's pictures in a folder and those below it -> Pictures; makes `output`, where nothing may be."""
    files, output = _files_below(Path(folder).expanduser()), Path(output).expanduser()
    if not files:
        raise UserError(f"--input {folder}: no png, jpg or webp there")
    pictures = Pictures(files, None, None, side, folder)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: cannot make it ({error.strerror})") from None
    if any(output.iterdir()):
        raise UserError(f"--output {output} is not empty; nothing is overwritten: name another folder")
    return pictures

def picture_tensor(picture, side, crop="none", seed=0):
    """A PIL picture -> uint8 [C, side, side]: resized and centre-cropped, or (by `seed`) as in CROPS."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU generator alone, which fork_rng restores
        scale, ratio, probability = CROPS.get(crop, (None, None, 0))
        if torch.rand(()) < probability:
            box = RandomResizedCrop.get_params(picture, scale, ratio)
            picture = T.resized_crop(picture, *box, (side, side))
        else:
            picture = T.center_crop(T.resize(picture, side), side)
        if crop != "none" and torch.rand(()) < 0.5:
            picture = T.hflip(picture)
    return T.pil_to_tensor(picture)

def _open_picture(file, header=False):
    """A file -> RGB picture, upright, on white where it is transparent, or its header's size; UserError."""
    try:
        with Image.open(file) as picture:
            if header:
                return picture.size
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I"):  # 16 bits of grey
                picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
            if "A" in picture.getbands() or "transparency" in picture.info:
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture.convert("RGBA"))
            return picture.convert("RGB")
    except Exception as error:
        raise UserError(f"{file}: unreadable image ({type(error).__name__})") from None

SPLITS = {"train": ("train", "training"), "test": ("test", "testing", "val", "valid", "validation")}

def _picture_files(folder, split):
    """A folder of pictures -> files of the split, sorted; the class folder of each, or None; train's classes.
    Sub-folders named as in SPLITS hold the splits. Where there is none, a tenth of the files is to test,
    chosen by a hash of their names."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; put png, jpg or webp images there, in any sub-folders")
    inside, homes = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()}, {}
    for kind, names in SPLITS.items():
        homes[kind] = next((inside[name] for name in names if name in inside), None)
    if not any(homes.values()):
        print(f"{folder}: no folder {', '.join(itertools.chain(*SPLITS.values()))}; a tenth is to test")
        homes = dict.fromkeys(SPLITS, folder)
    elif folder.name in ("tiny-imagenet-200", "imagenet"):
        homes["test"] = inside.get("val", homes["test"])  # what these call test has no labels
    home, train = homes[split], homes["train"] or folder
    files = below = _files_below(home) if home else []
    if homes["train"] == homes["test"]:
        def to_test(file):
            return hashlib.sha1(file.relative_to(folder).as_posix().encode()).digest()[0] % 10 == 0
        files = [file for file in files if to_test(file) == (split == "test")]
    if not files:
        raise UserError(f"{home or folder}: no {split} split, png, jpg or webp; folders: {', '.join(inside)}")
    folders = [_class_folder(file, home) for file in files]
    if (home / "val_annotations.txt").exists():  # Tiny ImageNet; else sorted into class folders
        lines = (home / "val_annotations.txt").read_text().splitlines()
        class_of = {line.split("\t")[0]: line.split("\t")[1] for line in lines if "\t" in line}
        folders = [class_of.get(file.name) for file in files]
    if folder.name not in LABELLED:
        return files, folders, []
    below = below if home == train else _files_below(train)
    return files, folders, sorted({_class_folder(file, train) for file in below} - {None})

def _class_folder(file, home):
    """The first folder on the way from `home` to a file; None where it lies in `home` itself."""
    way = file.relative_to(home).parts
    return way[0] if len(way) > 1 else None

def _files_below(folder):
    """Sorted pictures in a folder and those below it; links are followed, hidden names (.x) are left out."""
    files, seen = {}, set()  # each file and each folder once, whatever links there are
    for home, inside, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(home)
        inside[:] = [] if real in seen else sorted(name for name in inside if name[0] != ".")
        seen.add(real)
        for name in sorted(names):
            if name[0] != "." and name.lower().endswith((".png", ".jpg", ".jpeg", ".webp")):
                files.setdefault(os.path.realpath(os.path.join(home, name)), Path(home, name))
    return sorted(files.values())

@contextlib.contextmanager
def _errors_of_workers():
    """A UserError of a loader's process comes with its traceback as text: take the last line."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("common.UserError: ")) from None

# --- small sets in files ------------------------------------------------------------------------------------
def _read_npz(file, split, expected):
    """x (N, H, W[, 3]) uint8, y (N,) of a split of a Keras-style archive -> uint8 [N, C, H, W], int64 [N]."""
    channels, side, classes = expected
    try:
        with np.load(file, allow_pickle=False) as archive:
            held = archive.files
            x, y = [archive[key] if key in held else None for key in (f"x_{split}", f"y_{split}")]
    except Exception as error:  # zipfile, zlib, OSError, ValueError: a torn or foreign file fails many ways
        raise UserError(f"{file}: not a readable .npz file ({type(error).__name__}: {error})") from None
    if x is None or y is None:
        raise UserError(f"{file}: no {split} split (x_{split} and y_{split}); it has {', '.join(held)}")
    wanted = (side, side) if channels == 1 else (side, side, channels)
    if x.dtype != np.uint8 or x.shape[1:] != wanted or not len(x):
        raise UserError(f"{file}: x_{split} is {x.dtype} {x.shape}; expected uint8 (N, {str(wanted)[1:]}")
    if x.max() <= 1:
        raise UserError(f"{file}: x_{split} holds 0 and 1 only; expected 0 to 255 (times 255?)")
    y = y.reshape(-1)
    if len(y) != len(x) or not np.issubdtype(y.dtype, np.integer):
        raise UserError(f"{file}: y_{split} is {y.dtype} ({len(y)},); expected {len(x)} integers")
    if y.min() < 0 or y.max() >= classes:
        raise UserError(f"{file}: y_{split} runs from {y.min()} to {y.max()}; expected 0 to {classes - 1}")
    x = x[:, None] if channels == 1 else np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    return torch.from_numpy(x), torch.from_numpy(y.astype(np.int64))

def _download(name, split, data_dir):
    """Read a small set with torchvision, downloading it where needed -> uint8 [N, C, H, W], int64 [N]."""
    kind = {"fashion_mnist": "FashionMNIST"}.get(name, name.upper())
    which = {"split": split} if name == "svhn" else {"train": split == "train"}
    try:
        made = getattr(torchvision.datasets, kind)(str(data_dir), download=True, **which)
    except Exception as error:
        mend = "pip install scipy" if isinstance(error, ImportError) else "mend the network"
        raise UserError(f"{name}: no {data_dir / name}.npz, and no download ({_first_line(error)}); put an "
                        f".npz with x_train, y_train, x_test, y_test there, or {mend}") from None
    x = torch.as_tensor(np.asarray(made.data))
    y = torch.as_tensor(np.asarray(made.labels if name == "svhn" else made.targets)).long()
    if name == "svhn":
        return x, y
    return (x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous()), y

def _first_line(error):
    """An exception in few words."""
    return ": ".join([type(error).__name__, *(line[:80] for line in str(error).strip().splitlines()[:1])])

# === networks ===============================================================================================
IMAGENET = (.485, .456, .406), (.229, .224, .225)  # mean and deviation of its pixels, by channel

def normalising(net, mean, std):
    """Give a network the buffers mean and std [1, C, 1, 1]; its forward normalises with them."""
    net.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
    net.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

class Pooled(nn.Module):
    """.body of convolutions, the mean over its pixels, .head: [B, C, S, S] in [0, 1] -> [B, outputs]."""
    def features(self, x):
        return self.body(2 * x - 1).mean((2, 3))
    def forward(self, x):
        return self.head(self.features(x))

class Residual(nn.Module):
    """.main(x) + .shortcut(x)."""
    def forward(self, x):
        return self.main(x) + self.shortcut(x)

def init_xavier(net):
    """Glorot-uniform weights, zero biases: the default of the originals' frameworks; PyTorch's is smaller."""
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    return net

# --- classifiers: small ones, and those of the thesis (ch. 2 to 5) ----------------------------------------
class MnistCNN(Pooled):
    """MNIST network of dissertation 3.2: 3,265,409 parameters. (ReLU behind the pool: the same, faster.)"""
    def __init__(self, outputs=1, channels=1, side=28, width=1.0):
        super().__init__()
        a, b, c = round(32 * width), round(64 * width), round(1024 * width)
        self.body = nn.Sequential(
            nn.Conv2d(channels, a, 5, 1, 2), nn.MaxPool2d(2), nn.ReLU(),
            nn.Conv2d(a, b, 5, 1, 2), nn.MaxPool2d(2), nn.ReLU(),
            nn.Flatten(), nn.Linear(b * (side // 4) ** 2, c), nn.ReLU())
        self.head = nn.Linear(c, outputs)
        init_xavier(self)
    def features(self, x):
        return self.body(x)  # [B, 1024 width]

class SmallCNN(Pooled):
    """Five convolutions with BatchNorm, two of stride 2: 70,330 parameters (1 channel, 10 outputs)."""
    def __init__(self, width=16, outputs=10, channels=1):
        super().__init__()
        layers, c = [], channels
        for times, stride in ((1, 1), (2, 2), (2, 1), (4, 2), (4, 1)):
            layers.append(nn.Conv2d(c, times * width, 3, stride, 1, bias=False))
            layers += [nn.BatchNorm2d(times * width), nn.ReLU()]
            c = times * width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(c, outputs)

class WideBlock(Residual):
    """Pre-activation block of a wide ResNet; the 1x1 shortcut sees the raw input."""
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.main = nn.Sequential(nn.BatchNorm2d(c_in), nn.ReLU(), nn.Conv2d(c_in, c_out, 3, 1, 1),
                                  nn.BatchNorm2d(c_out), nn.ReLU(), nn.Conv2d(c_out, c_out, 3, stride, 1))
        self.shortcut = nn.Identity() if (c_in, stride) == (c_out, 1) else nn.Conv2d(c_in, c_out, 1, stride)

class WideResNet(Pooled):
    """WRN-depth-widen, convolutions with bias: thesis ch. 2 to 5. 28-10 has 36,489,290 parameters."""
    def __init__(self, depth=28, widen=10, outputs=10, channels=3):
        super().__init__()
        layers, c = [nn.Conv2d(channels, 16, 3, 1, 1)], 16
        for times, stride in ((16, 1), (32, 2), (64, 2)):
            width = round(times * widen)
            for i in range((depth - 4) // 6):
                layers.append(WideBlock(c, width, 1 if i else stride))
                c = width
        self.body = nn.Sequential(*layers, nn.BatchNorm2d(c, momentum=0.9), nn.ReLU())
        self.head = nn.Linear(c, outputs)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.xavier_uniform_(m.weight, gain=math.sqrt(2))
                nn.init.zeros_(m.bias)

# --- energies of the thesis, and the block of an SNGAN's generator ------------------------------------------
class LightEBM(nn.Module):
    """The light EBM of thesis ch. 2, piecewise linear: 693,569 parameters. [B, C, S, S] -> [B, 1]."""
    def __init__(self, width=32, channels=3, side=32):
        super().__init__()
        layers, c = [], channels
        for times, kernel, stride in ((1, 3, 1), (2, 4, 2), (4, 4, 2), (8, 4, 2)):
            layers += [nn.Conv2d(c, times * width, kernel, stride, 1), nn.LeakyReLU(0.05)]
            c = times * width
        self.body = nn.Sequential(*layers, nn.Conv2d(c, 1, side // 8))
    def forward(self, x):
        return self.body(2 * x - 1).flatten(1)

class GaussianEnergy(nn.Module):
    """T times minus the log density of a Gaussian, that of noisy images: [B, C, S, S] -> [B, 1]."""
    def __init__(self, images, noise, T=1.0):
        super().__init__()
        x = images.take(slice(None)).flatten(1).double()
        covariance = torch.cov(x.T) + noise ** 2 * torch.eye(x.shape[1], device=x.device)
        self.register_buffer("mean", x.mean(0).float())
        self.register_buffer("precision", (T * torch.linalg.inv(covariance)).float())
    def forward(self, x):
        x = x.flatten(1) - self.mean
        return (x @ self.precision * x).sum(1, keepdim=True) / 2

class DBlock(Residual):
    """Residual block of an SNGAN discriminator, no normalisation; down halves the side, first: the stem."""
    def __init__(self, c_in, c_out, down=False, first=False):
        super().__init__()
        start = nn.Identity() if first else nn.ReLU()
        pool = nn.AvgPool2d(2) if down else nn.Identity()
        self.main = nn.Sequential(start, nn.Conv2d(c_in, c_out, 3, 1, 1), nn.ReLU(),
                                  nn.Conv2d(c_out, c_out, 3, 1, 1), pool)
        self.shortcut = nn.Identity()
        if down or c_in != c_out:  # the stem pools first
            skip = nn.Conv2d(c_in, c_out, 1)
            self.shortcut = nn.Sequential(pool, skip) if first else nn.Sequential(skip, pool)

SNGAN_WIDTHS = {  # side: channels of the energy's blocks, how many of them halve the side
    28: ((256,) * 4, 2), 32: ((256,) * 4, 2), 64: ((64, 128, 256, 512, 1024), 5),
    128: ((64, 128, 256, 512, 1024, 1024), 5), 224: ((64, 128, 256, 512, 1024, 1024), 5)}

class SNGANEnergy(Pooled):
    """An SNGAN discriminator without its spectral norm: thesis ch. 3. 4,204,800 parameters at 32 pixels."""
    def __init__(self, width=1.0, outputs=1, channels=3, side=32):
        super().__init__()
        wide, downs = SNGAN_WIDTHS[side]
        layers, c = [], channels
        for i, w in enumerate(wide):
            w = max(round(w * width), 1)
            layers.append(DBlock(c, w, down=i < downs, first=i == 0))
            c = w
        self.body = nn.Sequential(*layers, nn.ReLU())
        self.head = nn.Linear(c, outputs, bias=False)
        init_xavier(self)

class GBlock(Residual):
    """Residual block of an SNGAN generator; up: it doubles the side (bilinear)."""
    def __init__(self, c_in, c_out, up=True):
        super().__init__()
        scale = nn.Upsample(scale_factor=2, mode="bilinear") if up else nn.Identity()
        self.main = nn.Sequential(
            nn.BatchNorm2d(c_in), nn.ReLU(), scale, nn.Conv2d(c_in, c_out, 3, 1, 1),
            nn.BatchNorm2d(c_out), nn.ReLU(), nn.Conv2d(c_out, c_out, 3, 1, 1))
        self.shortcut = nn.Sequential(scale, nn.Conv2d(c_in, c_out, 1)) if up or c_in != c_out else scale

# --- torchvision's networks with weights ------------------------------------------------------------------
class Pretrained(Pooled):
    """A torchvision network with its ImageNet weights, at its resolution `side`; a new head, if not 1000."""
    def __init__(self, name, outputs, side):
        super().__init__()
        self.side = side
        try:
            self.net = torchvision.models.get_model(name, weights="DEFAULT")
        except Exception as error:
            raise UserError(f"{name}: torchvision has no weights for it here ({_first_line(error)}); take a "
                            "network that is trained here") from None
        name, last = [pair for pair in self.net.named_modules() if isinstance(pair[1], nn.Linear)][-1]
        parent, _, child = name.rpartition(".")
        setattr(self.net.get_submodule(parent), child, nn.Identity())
        self.head = last if outputs == 1000 else nn.Linear(last.in_features, outputs)
        normalising(self, *IMAGENET)
    def resized(self, x):
        x = F.interpolate(x, size=(self.side, self.side), mode="bilinear", antialias=True)
        return self.net((x - self.mean) / self.std)
    def features(self, x):
        if self.training:
            return self.resized(x)
        # eight at a time, activations recomputed: gradients of many images in little memory
        again = functools.partial(checkpoint, self.resized, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([again(part) for part in x.split(8)])

def weights_at_hand(name, data_dir):
    """torchvision's weight file of that name in data_dir or in torch's hub folder, or None."""
    places = Path(data_dir) / name, Path(torch.hub.get_dir()) / "checkpoints" / name
    return next((file for file in places if file.exists()), None)

def read_weights(net, file, what):
    """Load torchvision's weights of a network; UserError when the file holds something else."""
    try:
        net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:
        raise UserError(f"{file}: not torchvision's {what} weights ({type(error).__name__})") from None

class InceptionFeatures(nn.Module):
    """torchvision's Inception-V3, for FID (not the literature's TensorFlow weights): features [B, 2048]."""
    FILE = "inception_v3_google-0cc3c7bd.pth"
    def __init__(self, file=None):
        super().__init__()
        self.net = torchvision.models.inception_v3(weights=None, init_weights=False, transform_input=False)
        if file is not None:
            read_weights(self.net, file, "Inception-V3")
        self.head, self.net.fc = self.net.fc, nn.Identity()
        self.eval()
    def features(self, x):
        x = F.interpolate(x.expand(-1, 3, -1, -1), size=(299, 299), mode="bilinear", antialias=True)
        return self.net(2 * x - 1)

# --- networks of the dissertation, ch. 2 and 3.3 ----------------------------------------------------------
class ResNet(Pooled):
    """ResNet-18 or -50 for small images: 3x3 stem, no max-pool, strides 1, 2, 2, 2; normalised inside."""
    def __init__(self, depth=18, width=1.0, outputs=1, channels=3):
        super().__init__()
        block, counts = {18: (BasicBlock, (2, 2, 2, 2)), 50: (Bottleneck, (3, 4, 6, 3))}[depth]
        cifar10 = (.4914, .4822, .4465), (.2023, .1994, .2010)
        normalising(self, *(cifar10 if channels == 3 else ((.5,), (.5,))))
        c = round(64 * width)
        layers = [nn.Conv2d(channels, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU()]
        for stage, count in enumerate(counts):
            w = round(64 * 2 ** stage * width)
            for i in range(count):
                c_in, c = c, w * block.expansion
                stride, shortcut = 2 if stage and not i else 1, None
                if (c_in, stride) != (c, 1):
                    convolution = nn.Conv2d(c_in, c, 1, stride, bias=False)
                    shortcut = nn.Sequential(convolution, nn.BatchNorm2d(c))
                layers.append(block(c_in, w, stride, shortcut))
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(c, outputs)
    def features(self, x):
        return self.body((x - self.mean) / self.std).mean((2, 3))  # [B, 512 width] or [B, 2048]

# --- features, a network by name, a trained classifier ----------------------------------------------------
def feature_network(data, data_dir, classifier):
    """("FID", Inception-V3) for colour images where its weights are at hand; or ("FD-cls", classifier())."""
    file = weights_at_hand(InceptionFeatures.FILE, data_dir)
    if data.shape[0] == 3 and file:
        return "FID", InceptionFeatures(file)
    return "FD-cls", classifier()

@torch.no_grad()
def feature_statistics(network, x):
    """Mean [d] and covariance [d, d], float64, of the features of images [N, C, H, W] in [0, 1]."""
    z = by_parts(network.to(x.device).features, x, 250).cpu().double()
    return z.mean(0), torch.cov(z.T)

def make_net(name, outputs, shape, width=1.0):
    """A network by name for images of shape (C, H, W); the names are the keys below."""
    c, side, _ = shape
    made = {"mnist_cnn": lambda: MnistCNN(outputs, c, side, width),
            "small_cnn": lambda: SmallCNN(round(16 * width), outputs, c),
            "resnet18": lambda: ResNet(18, width, outputs, c),
            "resnet50": lambda: ResNet(50, width, outputs, c),
            "wrn16": lambda: WideResNet(16, width, outputs, c),  # width: the widening factor
            "wrn28": lambda: WideResNet(28, width, outputs, c),
            "light_ebm": lambda: LightEBM(round(32 * width), c, side),
            "sngan": lambda: SNGANEnergy(width, outputs, c, side),
            "efficientnet_b7": lambda: Pretrained("efficientnet_b7", outputs, 600),
            "pretrained50": lambda: Pretrained("resnet50", outputs, 224)}
    if name not in made:
        raise UserError(f"unknown network '{name}'; known: {', '.join(made)}")
    try:
        net = made[name]()
        if min(parameter.numel() for parameter in net.parameters()) == 0:
            raise ValueError("no channels are left")
        return net
    except (ArithmeticError, KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"no {name} of width {width} for images {tuple(shape)}: {error}") from None

@seeded
def train_classifier(run, name, build, data, iterations, batch=100, sgd=0.0, augment="none", noise=0.0,
                     adversary=None, made_from=None, shared=False):
    """A classifier of labelled Images -> the network, in eval mode, with frozen weights.
    build() makes the untrained network. Adam, one cycle to 1e-3; with sgd that rate of SGD (momentum .9,
    weight decay 2e-4), a tenth of it from 40 % of the updates on, a hundredth from 60 %. augment: as batches;
    noise: deviation of Gaussian noise on images. adversary(model, x, y) -> x: attacks each batch (adversarial
    training). Labels [N], or masks [N, S, S] for a map of logits. shared: kept where other scripts find it.
    """
    if iterations and data.y.min() == data.y.max():
        raise UserError(f"{name}: all {len(data)} images of {data.name} are of one class")
    model = to_device(build(), run.device)
    if sgd:
        optimizer = torch.optim.SGD(model.parameters(), sgd, momentum=0.9, weight_decay=2e-4)
        drops = [round(iterations * 0.4), round(iterations * 0.6)]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops)
    else:
        optimizer = torch.optim.Adam(model.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=max(iterations, 4))
    made_from = {"network": model, "updates": iterations, "batch": batch, "sgd": sgd, "augment": augment,
                 "noise": noise, "images": data, "adversary": adversary, **(made_from or {})}
    training = Training(run, name, made_from, unique=shared, folder=run.shared if shared else None,
                        model=model, optimizer=optimizer, schedule=schedule)
    stream = batches(data, batch, run.seed + 2, training.it, augment, run.device)
    for it in training.updates(iterations):
        x, index = next(stream)
        y = data.y[index.to(data.y.device)].to(run.device).long()
        if noise:
            x = x + noise * torch.randn_like(x)
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
        training.log(loss=loss, accuracy=(logits.argmax(1) == y).float().mean())
    return model.eval().requires_grad_(False)

# === file formats and devices: you need not read on =========================================================
def _fingerprint(tensors):
    """Eight hex digits of the bytes of tensors."""
    digest = hashlib.sha1()
    for tensor in tensors:
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return "#" + digest.hexdigest()[:8]

def identity(thing):
    """What a checkpoint remembers of a thing it was made from: numbers and texts, else a fingerprint."""
    if thing is None or isinstance(thing, (bool, int, float, str)):
        return thing
    if isinstance(thing, torch.Tensor):
        return _fingerprint([thing])
    if isinstance(thing, nn.Module):
        return _fingerprint([tensor for _, tensor in sorted(thing.state_dict().items())])
    if isinstance(thing, Images):
        return _fingerprint([thing.x, thing.y])
    if isinstance(thing, Pictures):
        about = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in thing.files]
        about = str((thing.side, thing.folders, about))
        return "#" + hashlib.sha1(about.encode()).hexdigest()[:8]
    if isinstance(thing, functools.partial):
        return [thing.func.__name__, identity(thing.args), identity(thing.keywords)]
    if isinstance(thing, dict):
        return {key: identity(part) for key, part in thing.items()}
    if isinstance(thing, (tuple, list)) and not hasattr(thing, "_fields"):
        return [identity(part) for part in thing]
    return getattr(thing, "__name__", str(thing))  # a function; a NamedTuple says its name and fields

def _load_checkpoint(file, made_from, run):
    """What Training saved, or None; sets the generators. UserError if it was made from something else."""
    if not file.exists():
        return None
    state = read_checkpoint(file)
    if state["smoke"] and not run.smoke:
        print(f"{file} is from a smoke run: starting over")
        return None
    then = state["made_from"]
    differ = [key for key in {**then, **made_from} if then.get(key) != made_from.get(key)]
    if differ:
        changed = [f"{key} {then.get(key)} (now {made_from.get(key)})" for key in differ]
        raise UserError(f"{file} was made with {', '.join(changed)}: use the same settings and files, "
                        "--fresh, or another --out")
    torch.set_rng_state(state["rng"]["cpu"])
    if "cuda" in state["rng"] and run.device.type == "cuda":
        torch.cuda.set_rng_state(state["rng"]["cuda"], run.device)
    return state

def read_checkpoint(file):
    """The dict in a checkpoint; UserError when it can't be read or is not one of ours."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        state["made_from"], state["smoke"], state["rng"]["cpu"]
    except Exception:
        raise UserError(f"{file}: not a readable checkpoint; --fresh (or its removal) starts over") from None
    return state

@contextlib.contextmanager
def whole_file(file):
    """A name to write to; then renamed, so that `file` is whole or as before. UserError where that fails."""
    scratch = Path(f"{file}.{Path(sys.argv[0]).stem}.tmp")  # two scripts may write one shared file
    try:
        yield scratch
        os.replace(scratch, file)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save on a full disk
        raise UserError(f"{file}: cannot be written ({_first_line(error)})") from None
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()

def _read_json(file):
    """A JSON file as a dict; {} where there is none."""
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except ValueError:
        raise UserError(f"{file}: not readable; move it away, or --fresh") from None

def _write_json(file, content):
    """A JSON file, whole or not at all."""
    with whole_file(file) as scratch:
        scratch.write_text(json.dumps(content, indent=1, default=str) + "\n")

def _number(text):
    """A non-negative number that may be a fraction: '8/255' -> 0.0314, 'inf' allowed."""
    try:
        value = float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number or a fraction such as 8/255") from None
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"'{text}' must be at least 0")
    return value

def _whole(text):
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 0 on")
    return int(text)

class _Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print the usage before it; one line is what a reader wants
        raise UserError(message)

def _device(name):
    """The name of a device that works here; UserError else."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("mps"):
        raise UserError("--device mps: it lacks the float64 that these scripts need; take --device cpu")
    try:
        torch.zeros(1, device=name)
        if name.startswith("cuda:"):
            torch.cuda.set_device(name)  # streams and graphs are made on the current device
    except Exception:
        raise UserError(f"--device {name}: not available here; try --device cpu") from None
    return name

def _hardware(device):
    """The processor's name, for the record."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    kind = torch.backends.cpu.get_cpu_capability()  # AVX2 alone is several times slower than AVX512 or AMX
    return f"{(names or [platform.machine()])[0]} ({kind}), {torch.get_num_threads()} threads"

def _commit():
    """The commit that this code is, with a + where files were changed since; "" outside a checkout."""
    try:
        git = ["git", "-C", RESULTS.parent]
        name = subprocess.run([*git, "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ":(glob)*.py"], capture_output=True)
    except OSError:
        return ""
    return name.stdout.strip() + "+" * (changed.returncode == 1)
