"""Options of the grader: python -m pytest exercises --exercise fixer-2"""
from pathlib import Path


def pytest_addoption(parser):
    parser.addoption("--exercise", help="the exercise to grade, SCRIPT-NUMBER")
    parser.addoption("--work", type=Path, help="folder of the copy (my_work/EXERCISE)")
