"""What the exercises are made of: taking a body out of a script, planting a bug, grading what a student made of it."""
import ast
import importlib.util
import sys
import textwrap
from pathlib import Path
from typing import Callable, NamedTuple

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.append(str(ROOT))  # the scripts, and common
SCRIPTS = ("toy2d", "at_gen", "adv_detect", "ood_detect", "gen_classify", "stochastic_security", "lifecycle_midrun",
           "fixer", "hat_ebm")


class Wrong(Exception):
    """What is wrong with a solution, in a sentence."""


class Exercise(NamedTuple):
    """name: SCRIPT-NUMBER. start: the script's text -> the text that the student gets. grade(module, answers): the
    student's script and answers (a dict); raises Wrong. questions: {NAME: what is asked}, for answers.py."""
    name: str
    start: Callable
    grade: Callable
    questions: dict = {}

    @property
    def script(self):
        return self.name.rpartition("-")[0]


def expect(right, sentence):
    """Wrong(sentence) where something is not right."""
    if not right:
        raise Wrong(sentence)


def number(answers, name):
    """An answer as a number; a text that reads as one will do."""
    try:
        return float(answers[name])
    except (TypeError, ValueError):
        raise Wrong(f"{name}: write a number, not {answers[name]!r}") from None


def near(answers, name, right, tolerance, why):
    """Wrong where an answer is not this number, with the reason."""
    expect(abs(number(answers, name) - right) < tolerance, f"{name} is not {answers[name]}: {why}")


def unchanged(source):
    """The start of an exercise that is answered, not programmed."""
    return source


def find(source, name):
    """The syntax node of a function, "f" or "Class.f", of a script's text."""
    node = ast.parse(source)
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    return node


def take_out(source, name, hint="your code here"):
    """The text with the body of a function, "f" or "Class.f", taken out; its head and docstring stay."""
    node, lines = find(source, name), source.splitlines()
    documented = ast.get_docstring(node) is not None
    first = node.body[0].end_lineno + 1 if documented else node.body[0].lineno
    stub = " " * node.body[0].col_offset + f'raise NotImplementedError("{hint}")'
    return "\n".join([*lines[:first - 1], stub, *lines[node.end_lineno:]]) + "\n"


def put(source, name, code):
    """The text with a function, "f" or "Class.f", replaced by `code`, a whole `def`; decorators stay."""
    node, lines = find(source, name), source.splitlines()
    new = textwrap.indent(textwrap.dedent(code).strip("\n"), " " * node.col_offset)
    return "\n".join([*lines[:node.lineno - 1], new, *lines[node.end_lineno:]]) + "\n"


def swap(source, old, new):
    """The text with `old`, which stands there exactly once, replaced by `new`."""
    if source.count(old) != 1:
        raise ValueError(f"{old!r} stands {source.count(old)} times in the script")
    return source.replace(old, new)


def exercises():
    """{name: Exercise} of all nine scripts, in order."""
    found = {}
    for script in SCRIPTS:
        if (HERE / f"grade_{script}.py").exists():
            for exercise in importlib.import_module(f"grade_{script}").EXERCISES:
                found[exercise.name] = exercise
    return found


def load(file, name):
    """A Python file as a module of this name; nothing but its definitions runs."""
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


BESIDE = {"fixer": ("lifecycle_midrun",), "ood_detect": ("at_gen",)}  # scripts that a script runs or reads


def folder_of(name):
    """Where the copy for an exercise lies unless --out and --work say otherwise."""
    return Path("my_work") / name


def marked(name, text):
    """A script's text as a student gets it for this exercise: its first line says which one."""
    return f"# exercise {name}\n{text}"


def place_of(error, exercise, folder):
    """Where an error was raised: the innermost line of the student's files; if there is none, what that says."""
    if isinstance(error, SyntaxError):
        return ""  # its own text has the place
    frame, mine = error.__traceback__, None
    while frame:
        file = Path(frame.tb_frame.f_code.co_filename)
        if file.resolve().parent == folder.resolve():
            mine = f" ({file.name}, line {frame.tb_lineno})"
        frame = frame.tb_next
    if mine:
        return mine
    if exercise.questions:
        return "; is every answer of the kind that is asked for?"
    return "; a function of yours does not return what its docstring says, or nothing: is a `return` missing?"


def grade(exercise, folder):
    """What is wrong with the work in a folder, in a sentence; None if it is right."""
    file = folder / f"{exercise.script}.py"
    command = f"python exercises/start.py {exercise.name} --out {folder}"
    if not file.exists():
        return f"there is no {file}; {command} makes it"
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    if first.startswith("# exercise ") and first != f"# exercise {exercise.name}":
        return f"{file} was made for {first[2:]}; each exercise has a folder of its own"
    answers = {}
    try:
        if exercise.questions:
            if not (folder / "answers.py").exists():
                return f"there is no {folder / 'answers.py'}; {command} makes it"
            try:
                answers = vars(load(folder / "answers.py", "answers"))
            except NameError as error:
                return f"{folder / 'answers.py'}: {error}; a word stands in quotes"
            for question in exercise.questions:
                if answers.get(question) is None:
                    return f"{folder / 'answers.py'}: {question} has no answer yet"
        torch.manual_seed(0)
        exercise.grade(load(file, f"work_{exercise.script}"), answers)
    except Wrong as wrong:
        return str(wrong)
    except NotImplementedError as error:
        return f"nothing is filled in yet: {error}"
    except Exception as error:
        return f"the code stops with {type(error).__name__}: {error}{place_of(error, exercise, folder)}"
    return None
