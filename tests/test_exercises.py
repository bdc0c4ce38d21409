"""exercises/: what a student starts from fails, right solutions pass, wrong ones are told what is wrong."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

sys.path.append(str(ROOT / "exercises"))
import common  # noqa: E402
import kit  # noqa: E402 (in exercises/)
import start  # noqa: E402

HERE = Path(__file__).parent / "exercises"

EXERCISES = kit.exercises()
FILES = sorted((ROOT / "exercises").glob("grade_*.py"))


def solutions():
    """{exercise: Solution} of tests/exercises/."""
    found = {}
    kit.load(HERE / "solutions.py", "solutions")  # by path: files here are called as the scripts are
    for file in FILES:
        script = file.stem.removeprefix("grade_")
        own = kit.load(HERE / f"{script}.py", f"solutions_{script}")
        found.update(own.SOLUTIONS)
    return found


SOLUTIONS = solutions()


@pytest.fixture
def begin(capsys):
    """start.py, as a student calls it -> exit code, what it says on stdout and on stderr."""
    def run(*argv):
        try:
            common.call(lambda: start.main([str(word) for word in argv]))
            code = 0
        except SystemExit as end:
            code = end.code
        return (code, *capsys.readouterr())
    return run


def work(folder, exercise, edit):
    """A student's folder after an edit."""
    folder.mkdir()
    source = exercise.start((ROOT / f"{exercise.script}.py").read_text())
    answers = {}
    for name, new in edit.items():
        if name == "answers":
            answers = new
        elif name == "swaps":
            for old, new_text in new:
                source = kit.swap(source, old, new_text)
        else:
            source = kit.put(source, name, new)
    (folder / f"{exercise.script}.py").write_text(source)
    lines = [f"{name} = {answers.get(name)!r}" for name in exercise.questions]
    (folder / "answers.py").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("name", EXERCISES)
def test_the_untouched_copy_fails(tmp_path, name):
    sentence = kit.grade(EXERCISES[name], work(tmp_path / "w", EXERCISES[name], {}))
    assert sentence and len(sentence) < 400


@pytest.mark.parametrize("name", EXERCISES)
def test_right_solutions_pass_however_written(tmp_path, name):
    assert len(SOLUTIONS[name].right) >= 2 and SOLUTIONS[name].right[0] != SOLUTIONS[name].right[1]
    for i, edit in enumerate(SOLUTIONS[name].right):
        assert kit.grade(EXERCISES[name], work(tmp_path / str(i), EXERCISES[name], edit)) is None


@pytest.mark.parametrize("name", EXERCISES)
def test_wrong_solutions_are_told_what_is_wrong(tmp_path, name):
    assert len(SOLUTIONS[name].wrong) >= 3
    for i, (edit, words) in enumerate(SOLUTIONS[name].wrong):
        sentence = kit.grade(EXERCISES[name], work(tmp_path / str(i), EXERCISES[name], edit))
        assert sentence and words in sentence, (i, words, sentence)


def test_pages_and_graders_name_the_same_exercises():
    for file in FILES:
        script = file.stem.removeprefix("grade_")
        page = (ROOT / "exercises" / f"{script}.md").read_text()
        asked = re.findall(r"^## (\S+) ", page, re.M)
        assert asked == [name for name, exercise in EXERCISES.items() if exercise.script == script]
        assert 3 <= len(asked) <= 5 and asked == [f"{script}-{i}" for i in range(1, len(asked) + 1)]
        assert page.count("*Teaches:*") == len(asked) and len(re.findall(r"\(\d+ minutes\)", page)) == len(asked)


def test_every_start_is_a_script_that_can_be_read():
    for exercise in EXERCISES.values():
        source = (ROOT / f"{exercise.script}.py").read_text()
        start = exercise.start(source)
        ast.parse(start)
        assert (start == source) == (exercise.start is kit.unchanged)


# --- the commands ---


def test_start_makes_a_copy_and_never_overwrites(tmp_path, begin):
    before = (ROOT / "toy2d.py").read_bytes()
    out = tmp_path / "my work"
    code, said, err = begin("toy2d-2", "--out", out)
    assert (code, err) == (0, "") and "--exercise toy2d-2" in said
    assert "toy2d-2" in (out / "toy2d.py").read_text() and (out / "common.py").exists()
    assert not (out / "answers.py").exists() and (ROOT / "toy2d.py").read_bytes() == before
    mine = (out / "toy2d.py").read_text() + "# mine\n"
    (out / "toy2d.py").write_text(mine)
    code, _, err = begin("toy2d-3", "--out", out)
    assert code == 2 and err.count("\n") == 1 and "another --out" in err
    assert "was made for exercise toy2d-2" in kit.grade(EXERCISES["toy2d-3"], out)  # not graded as another's work
    assert "nothing is filled in" in kit.grade(EXERCISES["toy2d-2"], out)
    assert (out / "toy2d.py").read_text() == mine
    _, said, _ = begin("toy2d-1", "--out", tmp_path / "answers")
    assert "STEEP = None" in (tmp_path / "answers" / "answers.py").read_text() and "answers.py" in said


def test_each_exercise_has_a_folder_of_its_own(tmp_path, begin, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("toy2d-2", "toy2d-3"):
        code, said, _ = begin(name)
        assert code == 0 and "--work" not in said and (tmp_path / "my_work" / name / "toy2d.py").exists()
    assert "my_work/" in (ROOT / ".gitignore").read_text().split()


def test_start_lists_and_refuses_what_it_does_not_know(tmp_path, begin):
    assert begin()[1].split() == list(EXERCISES)
    code, _, err = begin("toy2d-99", "--out", tmp_path / "a")
    assert code == 2 and err.count("\n") == 1 and "toy2d-1" in err and not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    code, _, err = begin("toy2d-1", "--out", tmp_path / "file" / "a")
    assert code == 2 and err.count("\n") == 1 and "--out" in err


def test_start_is_a_command(tmp_path):
    command = [sys.executable, ROOT / "exercises" / "start.py", "toy2d-2", "--out", tmp_path / "my work"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and not done.stderr and (tmp_path / "my work" / "toy2d.py").exists()


@pytest.mark.parametrize("name, edit, says", [
    ("toy2d-2", SOLUTIONS["toy2d-2"].right[0], None), ("toy2d-2", SOLUTIONS["toy2d-2"].wrong[0][0], "the drift is 2.0")])
def test_the_grader_s_command(tmp_path, name, edit, says):
    folder = tmp_path / "w"
    if edit is not None:
        work(folder, EXERCISES[name], edit)
    command = [sys.executable, "-m", "pytest", "-q", "exercises", "--exercise", name, "--work", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode == 0) == (says is None) and "Traceback" not in done.stdout
    assert says is None or says in done.stdout


def test_what_is_not_there_is_named(tmp_path):
    assert "start.py toy2d-3" in kit.grade(EXERCISES["toy2d-3"], tmp_path)
    assert "nothing is filled in yet" in kit.grade(EXERCISES["toy2d-2"], work(tmp_path / "w", EXERCISES["toy2d-2"], {}))


# --- taking out and putting in ---


SOURCE = '''import math

def f(x):
    """Doc."""
    y = x + 1
    return y

class A:
    """A."""

    def g(self):
        return (1,
                2)

    def h(self):
        """One line."""
        return 3
'''


def test_take_out_and_put():
    taken = kit.take_out(kit.take_out(SOURCE, "f", "here"), "A.g", "there")
    assert '"""Doc."""\n    raise NotImplementedError("here")\n\nclass A' in taken
    assert 'def g(self):\n        raise NotImplementedError("there")\n\n    def h' in taken
    new = kit.put(SOURCE, "A.h", "def h(self):\n    return 4")
    names = {}
    exec(new, names)
    assert names["A"]().h() == 4 and names["A"]().g() == (1, 2) and names["f"](1) == 2
    for old in ("return", "nothing"):
        with pytest.raises(ValueError, match="times"):
            kit.swap(SOURCE, old, "")


def test_an_error_in_the_student_s_code_is_one_sentence(tmp_path):
    exercise = EXERCISES["toy2d-2"]
    folder = work(tmp_path / "w", exercise, {"langevin_2d": "def langevin_2d(f, x, steps, noise):\n    return x / nothing"})
    sentence = kit.grade(exercise, folder)
    assert "NameError" in sentence and "toy2d.py, line" in sentence and "\n" not in sentence
    (folder / "toy2d.py").write_text("def (")
    assert "SyntaxError" in kit.grade(exercise, folder) and "importlib" not in kit.grade(exercise, folder)
    inside = "def langevin_2d(f, x, steps, noise):\n    return torch.autograd.grad(x.sum(), x)[0]"  # an error inside torch
    file = work(tmp_path / "inside", exercise, {"langevin_2d": inside}) / "toy2d.py"
    line = [i for i, text in enumerate(file.read_text().splitlines(), 1) if "autograd.grad(x.sum(), x)" in text]
    assert f"(toy2d.py, line {line[0]})" in kit.grade(exercise, file.parent)
    exercise = EXERCISES["adv_detect-4"]
    folder = work(tmp_path / "word", exercise, {})
    answers = "ADAM_Z = ADAM_L = SIGN_L = .01\nSIGN_SURE = 0\nREPAIR = 'logit'\nVERDICT = "
    for text, says in (("blind", "quotes"), ("'blind'\nADAM_L = 'little'", "ADAM_L: write a number"),
                       ("'blind'\nADAM_Z = .51", "a distance")):
        (folder / "answers.py").write_text(answers + text)
        assert says in kit.grade(exercise, folder)
    exercise = EXERCISES["stochastic_security-4"]
    right = SOLUTIONS["stochastic_security-4"].right[0]["answers"]
    said = kit.grade(exercise, work(tmp_path / "kind", exercise, {"answers": {**right, "SHARE_L2": "little"}}))
    assert "every answer of the kind" in said and "return" not in said
    exercise = EXERCISES["toy2d-1"]
    folder = work(tmp_path / "answers", exercise, {})
    for text in ("STEEP = steep", 'STEEP, FLAT = "far", "near"'):
        (folder / "answers.py").write_text(text)
        said = kit.grade(exercise, folder)
        assert ("quotes" in said or "write a number" in said) and "\n" not in said
