"""What holds for the repository as a whole: the house's measures, commands that parse, results that say where they come from."""
import ast
import importlib
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SCRIPTS = sorted(p.stem for p in ROOT.glob("*.py") if p.stem != "common")
OWN = {"main", "get_args"}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def source(name):
    return (ROOT / f"{name}.py").read_text()


def tree(name):
    return ast.parse(source(name))


def imported(name):
    """Modules that a file imports, wherever in it."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            yield from [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            yield node.module


# --- the house's measures ---


@pytest.mark.parametrize("name", [*SCRIPTS, "common"])
def test_length_and_width(name):
    lines = source(name).splitlines()
    assert len(lines) <= {"common": 1500, "at_gen": 700}.get(name, 650)
    assert max(map(len, lines)) <= 110
    assert source(name).isascii()


@pytest.mark.parametrize("name", SCRIPTS)
def test_module_docstring_fits_a_screen(name):
    assert len(ast.get_docstring(tree(name)).splitlines()) <= 50


@pytest.mark.parametrize("name", [*SCRIPTS, "common"])
def test_functions_have_docstrings(name):
    for node in tree(name).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and node.name not in OWN:
            assert ast.get_docstring(node), node.name


def code_lines(text):
    """How many lines of a file hold code: no comments, blank lines, docstrings."""
    lines = set()
    no_code = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in no_code:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def nodes(node):
    """How many syntax nodes there are below a node."""
    return sum(not isinstance(n, (ast.Load, ast.Store, ast.Del, ast.alias)) for n in ast.walk(node))


def depth(node):
    """How deep comprehensions and lambdas stand in each other; each further `for` of one counts too."""
    below = max([depth(child) for child in ast.iter_child_nodes(node)], default=0)
    if isinstance(node, COMPREHENSIONS):
        return below + len(node.generators)
    return below + isinstance(node, ast.Lambda)


@pytest.mark.parametrize("name", SCRIPTS)
def test_density(name):
    """At most 8.5 syntax nodes a line (six scripts: some more), nine statements in ten at most 20, no comprehension in another."""
    statements = []
    for node in ast.walk(tree(name)):
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.Return, ast.Expr, ast.AnnAssign, ast.Raise)):
            if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                statements.append(node)
    sizes = sorted(nodes(statement) for statement in statements)
    most = {"stochastic_security": 9.9, "lifecycle_midrun": 9.3, "fixer": 9.3, "at_gen": 9.3, "adv_detect": 9.4, "gen_classify": 8.8}.get(name, 8.5)  # calls on fewer lines
    assert round(nodes(tree(name)) / code_lines(source(name)), 1) <= most
    assert sizes[int(0.9 * len(sizes))] <= 20
    assert not [statement.lineno for statement in statements if depth(statement) > 1]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250


# --- scripts stand alone ---


def test_same_name_same_source():
    """Functions that are repeated on purpose do not drift apart; docstrings may, they name their own equations."""
    known = {}
    for script in SCRIPTS:
        for node in tree(script).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name in OWN:
                continue
            if re.match(r"(figure|table)_\d", node.name):
                continue
            for inner in ast.walk(node):
                if isinstance(inner, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(inner) is not None:
                    inner.body[0] = ast.Pass()
            other, where = known.setdefault(node.name, (ast.unparse(node), script))
            assert ast.unparse(node) == other, f"{node.name} differs between {where}.py and {script}.py"
    assert len(known) > 50


@pytest.mark.parametrize("name", SCRIPTS)
def test_common_is_imported_before_torch(name):
    """So that Ctrl-C is quiet while torch is imported, which takes seconds."""
    assert 0 < source(name).index("\nimport common") < source(name).index("\nimport torch")


def test_no_script_imports_another():
    for name in [*SCRIPTS, "common"]:
        assert not set(imported(name)) & set(SCRIPTS), name


def test_only_the_five_packages():
    allowed = {"torch", "torchvision", "numpy", "matplotlib", "common", "PIL"}  # PIL comes with torchvision
    for name in [*SCRIPTS, "common"]:
        for module in imported(name):
            top = module.split(".")[0]
            assert top in allowed or top in sys.stdlib_module_names, f"{name}.py imports {module}"


def test_scripts_leave_common_s_back_rooms_alone():
    for script in SCRIPTS:
        assert not re.findall(r"\bcommon\._\w+|from common import [^\n]*\b_\w+", source(script)), script


def test_importing_a_script_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(SCRIPTS)}"
    said = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert not said.stdout and not list(tmp_path.iterdir())


# --- documented commands ---


def commands(text):
    """Every `python SCRIPT.py ...` of a text, without its trailing explanation."""
    for line in text.splitlines():
        for found in re.findall(r"(?:^|[\s`(/])python3? (\w+\.py[^`&|#]*)", line):
            yield re.split(r"\s{2,}", found.strip())[0]


@pytest.mark.parametrize("file", ["README.md", *[f"{s}.py" for s in SCRIPTS], *[f"results/{s}.md" for s in SCRIPTS]])
def test_documented_commands_parse(file):
    text = (ROOT / file).read_text()
    if file.endswith(".py"):
        text = ast.get_docstring(ast.parse(text))
    text = text.split("<!-- below")[0]  # commands of old results stay as they were
    found = list(commands(text))
    assert found or file.startswith("results")
    for command in found:
        script, *argv = shlex.split(command)
        assert Path(script).stem in SCRIPTS, command
        if "--list" not in argv and "--help" not in argv:
            importlib.import_module(Path(script).stem).get_args([*argv, "--device", "cpu"])


# --- results ---


def pages():
    """results/pages.py as a module."""
    spec = importlib.util.spec_from_file_location("pages", ROOT / "results" / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def results():
    """(file, script, data set, experiment, entry) of every committed result."""
    for file in sorted((ROOT / "results").glob("*-*.json")):
        script, _, dataset = file.stem.partition("-")
        for name, entry in json.loads(file.read_text()).items():
            yield file.name, script, dataset, name, entry


def test_results_say_where_they_come_from():
    assert len(list(results())) > 30
    for file, script, dataset, name, entry in results():
        assert {"rows", "seconds", "command", "hardware", "torch", "commit", "dataset", "budget", "seed"} <= set(entry), file
        assert name.split()[0] in importlib.import_module(script).EXPERIMENTS, (file, name)  # a variant: "table2.5 K 5"
        assert " " not in name or " --" in entry["command"].replace("--dataset", ""), (file, name)
        assert shlex.split(entry["command"])[1] == f"{script}.py"
        for row in entry["rows"]:
            assert {"quantity", "value"} <= set(row)
            assert "interval" not in row or row["n"] > 0


def test_quantities_hold_no_budget():
    """A number of steps, chains or a radius stands beside a quantity, not in its name: else nothing published meets it."""
    for file, _, _, name, entry in results():
        for row in entry["rows"]:
            assert not re.search(r"\b(N|H|K|H_adv|H_def|eps|steps?) ?=? ?\d|\d+ (steps|chains)\b", row["quantity"]), (file, row)


def test_every_published_number_meets_ours_where_there_are_results():
    published = json.loads((ROOT / "results" / "published.json").read_text())
    met = 0
    for file, script, dataset, name, entry in results():
        ours = {row["quantity"] for row in entry["rows"]}
        for row in published.get(script, {}).get(dataset, {}).get(name, []):
            met += row["quantity"] in ours
    assert met >= 30


def test_published_numbers_belong_to_experiments():
    published = json.loads((ROOT / "results" / "published.json").read_text())
    for script, datasets in published.items():
        module = importlib.import_module(script)
        known = {dataset for dataset, _ in module.SETTINGS}
        for dataset, experiments in datasets.items():
            assert dataset in known, (script, dataset)
            for name, rows in experiments.items():
                assert name in module.EXPERIMENTS, (script, name)
                assert all({"quantity", "value", "source"} == set(row) for row in rows)


@pytest.mark.parametrize("script", SCRIPTS)
def test_tables_of_a_page_are_those_of_the_json(script):
    """To renew them: python results/pages.py"""
    file = ROOT / "results" / f"{script}.md"
    assert file.read_text() == pages().page(file)


@pytest.mark.parametrize("file", ["README.md", "results/README.md", *[f"results/{s}.md" for s in SCRIPTS]])
def test_pictures_and_links_exist(file):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / file).read_text()):
        if not target.startswith("http"):
            assert ((ROOT / file).parent / target).exists(), target


def test_every_picture_of_results_stands_on_a_page():
    shown = "".join((ROOT / "results" / f"{script}.md").read_text() for script in SCRIPTS)
    for picture in (ROOT / "results").glob("*.png"):
        assert picture.name in shown, picture.name


def test_tracked_files_are_small():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    sizes = {f: (ROOT / f).stat().st_size for f in listed.stdout.splitlines() if (ROOT / f).exists()}
    assert max(sizes.values()) <= 300_000 and sum(sizes.values()) <= 8_000_000


def test_no_path_of_a_machine_in_the_results():
    for file in (ROOT / "results").glob("*.json"):
        assert not re.search(r"/(tmp|home|root|work)/", file.read_text()), file.name
