"""The grader of one exercise: python -m pytest exercises --exercise fixer-2"""
import kit
import pytest


def test_exercise(request):
    name = request.config.getoption("--exercise", default=None)
    if name is None:
        pytest.fail("which one? --exercise NAME; python exercises/start.py lists them", pytrace=False)
    known = kit.exercises()
    if name not in known:
        pytest.fail(f"no exercise '{name}'; known: {', '.join(known)}", pytrace=False)
    folder = request.config.getoption("--work") or kit.folder_of(name)
    wrong = kit.grade(known[name], folder.expanduser())
    if wrong:
        pytest.fail(f"{name}: {wrong}", pytrace=False)
