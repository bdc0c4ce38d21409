"""results/INDEX.md: complete, up to date, and true of the code."""
import ast
import importlib.util
import re

import pytest

from conftest import ROOT
from test_repository import SCRIPTS

spec = importlib.util.spec_from_file_location("index", ROOT / "results" / "index.py")
index = importlib.util.module_from_spec(spec)
spec.loader.exec_module(index)


def numbers(items, kind):
    return [item.removeprefix(kind + " ") for item, _, _ in items if item.startswith(kind + " ")]


def counted(chapter, last, without=()):
    return [f"{chapter}.{i}" for i in range(1, last + 1) if i not in without]


def test_every_numbered_item_of_the_sources_is_there():
    yin, mitchell = index.DISSERTATION, index.THESIS
    assert set(numbers(yin, "Eq.")) == {*counted(2, 20), *counted(3, 48)}
    assert numbers(yin, "Algorithm") == ["1", "2", "3"]
    assert set(numbers(yin, "Figure")) == {*counted(2, 17), *counted(3, 15)}
    assert set(numbers(yin, "Table")) == {*counted(2, 11), *counted(3, 17)}
    assert numbers(mitchell, "Algorithm") == ["1", "2", "3", "4", "5"]
    assert set(numbers(mitchell, "Eq.")) == {*counted(1, 12), *counted(2, 13), *counted(3, 3), *counted(4, 3),
                                             *counted(5, 4), *counted(6, 14)}
    assert set(numbers(mitchell, "Figure")) == {*counted(1, 3), *counted(2, 10), *counted(3, 4), *counted(5, 3), *counted(6, 11)}
    assert set(numbers(mitchell, "Table")) == {*counted(2, 3), *counted(3, 3), *counted(4, 2), "5.1", *counted(6, 3)}
    for items in (yin, mitchell):
        assert len({item for item, _, _ in items}) == len(items)


def test_every_table_and_figure_of_the_scripts_is_in_the_index():
    places = {place for items in (index.DISSERTATION, index.THESIS) for _, _, text in items for place in text.split()}
    for script in SCRIPTS:
        for node in ast.parse((ROOT / f"{script}.py").read_text()).body:
            if isinstance(node, ast.FunctionDef) and re.fullmatch(r"(table|figure)_\d+_\d+", node.name):
                assert f"{script}.{node.name}" in places


def test_lines_and_commands_are_true():
    text = (ROOT / "results" / "INDEX.md").read_text()
    assert text == index.index(), "python results/index.py"
    assert index.line_of("toy2d.pgd_2d") == next(
        i for i, line in enumerate((ROOT / "toy2d.py").read_text().splitlines(), 1) if line.startswith("def pgd_2d"))
    commands = re.findall(r"`python (\w+)\.py ([^`]*)`", text)
    assert len(commands) > 80 and ("adv_detect", "--only table3.4 --dataset cifar10") in commands
    for script, flags in commands:
        args = __import__(script).get_args(flags.split())  # a user error where a command could not run
        assert args.only[0] in __import__(script).EXPERIMENTS
    with pytest.raises(KeyError):
        index.line_of("toy2d.nothing")


def test_what_is_missing_says_why():
    for items in (index.DISSERTATION, index.THESIS):
        for item, what, places in items:
            assert what and places
            if places.startswith("-"):
                assert len(places) > 10, item
            else:
                for place in index.places_of(places)[0]:
                    assert index.line_of(place) > 1
