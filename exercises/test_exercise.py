"""The grader of one exercise: python -m pytest exercises --exercise fixer-2 --work my_work"""
import kit
import pytest


def test_exercise(request):
    name = request.config.getoption("--exercise", default=None)
    if name is None:
        pytest.skip("no --exercise")
    known = kit.exercises()
    if name not in known:
        pytest.fail(f"no exercise '{name}'; known: {', '.join(known)}", pytrace=False)
    wrong = kit.grade(known[name], request.config.getoption("--work").expanduser())
    if wrong:
        pytest.fail(f"{name}: {wrong}", pytrace=False)
