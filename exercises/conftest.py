"""Options of the grader: python -m pytest exercises --exercise fixer-2 --work my_work"""
from pathlib import Path


def pytest_addoption(parser):
    parser.addoption("--exercise", help="the exercise to grade, SCRIPT-NUMBER")
    parser.addoption("--work", type=Path, default=Path("my_work"), help="folder of the copy (my_work)")
