"""What holds for the repository as a whole: house style, commands that parse, no drift between scripts."""
import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SCRIPTS = sorted(p.stem for p in ROOT.glob("*.py") if p.stem != "common")
OWN = {"main", "get_args"}
LONGEST = {"stochastic_security": 784, "lifecycle_midrun": 938, "fixer": 859, "adv_detect": 955}  # else 600


def tree(name):
    return ast.parse((ROOT / f"{name}.py").read_text())


def test_same_name_same_source():
    """Functions that are repeated on purpose do not drift apart."""
    known = {}
    for script in SCRIPTS:
        for node in tree(script).body:
            shared = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in (
                "main", "Settings", "Lab") and not re.match(r"(figure|table)_\d", node.name)
            if shared:
                source = ast.unparse(node)
                other, where = known.setdefault(node.name, (source, script))
                assert source == other, f"{node.name} differs between {where}.py and {script}.py"


def test_no_script_imports_another():
    for script in [*SCRIPTS, "common"]:
        for node in ast.walk(tree(script)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not set(names) & set(SCRIPTS), f"{script}.py imports {names}"


def test_only_the_five_packages():
    allowed = {"torch", "torchvision", "numpy", "matplotlib", "common", "PIL"}  # PIL comes with torchvision
    for script in [*SCRIPTS, "common"]:
        for node in ast.walk(tree(script)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.split(".")[0]
                assert top in allowed or top in sys.stdlib_module_names, f"{script}.py imports {name}"


def test_functions_of_scripts_have_docstrings_and_lines_have_measure():
    for script in [*SCRIPTS, "common"]:
        text = (ROOT / f"{script}.py").read_text()
        assert script == "common" or len(text.splitlines()) <= LONGEST.get(script, 600)
        assert all(len(line) <= 110 for line in text.splitlines()), script
        assert text.isascii()
        for node in tree(script).body:
            if isinstance(node, ast.FunctionDef) and node.name not in OWN:
                assert ast.get_docstring(node), f"{script}.py: {node.name}"


def commands(text):
    """Every `python SCRIPT.py ...` of a text, without its trailing explanation."""
    for line in text.splitlines():
        for found in re.findall(r"(?:^|[\s`(/])python3? (\w+\.py[^`&|#]*)", line):
            yield re.split(r"\s{2,}", found.strip())[0]


@pytest.mark.parametrize("file", ["README.md", *[f"{s}.py" for s in SCRIPTS]])
def test_documented_commands_parse(file):
    text = (ROOT / file).read_text()
    if file.endswith(".py"):
        text = ast.get_docstring(ast.parse(text))
    found = list(commands(text))
    assert found
    for command in found:
        script, *argv = shlex.split(command)
        if "--list" in argv or Path(script).stem not in SCRIPTS:
            assert "--list" in argv or (ROOT / script).exists(), command
            continue
        importlib.import_module(Path(script).stem).get_args([*argv, "--device", "cpu"])


def test_committed_results_have_their_provenance():
    files = sorted((ROOT / "results").glob("*.json"))
    assert files
    for file in files:
        for name, entry in json.loads(file.read_text()).items():
            assert {"ours", "published", "seconds", "command", "hardware", "torch", "dataset",
                    "budget"} <= set(entry), (file, name)
            script, *argv = shlex.split(entry["command"])[1:]
            args = importlib.import_module(Path(script).stem).get_args([*argv, "--device", "cpu"])
            assert args.dataset == entry["dataset"] and args.budget == entry["budget"]


def measured():
    """README's tables of numbers, made from results/*.json."""
    lines = []
    for file in sorted((ROOT / "results").glob("*.json")):
        groups = {}
        for name, entry in json.loads(file.read_text()).items():
            p0 = f", p0 {entry['p0']}" if "p0" in entry else ""
            made = f"`{entry['command']}` on {entry['hardware']} (torch {entry['torch'].split('+')[0]}{p0})"
            groups.setdefault(made, []).append((name, entry))
        lines += [f"### {file.stem}", ""]
        for made, entries in groups.items():
            lines += [made, "", "| experiment (seconds) | quantity | ours | published |", "|---|---|---|---|"]
            for name, entry in entries:
                published = entry["published"]
                numbers = {k: v for k, v in entry["ours"].items()
                           if k in published or not isinstance(v, (str, list))}
                curve = name.startswith("figure") and len(numbers) > 13 and file.stem[:10] != "adv_detect"
                if name == "sweep" or curve:
                    continue  # a curve's points: results/ has them, and their picture
                for key in [*numbers, *(k for k in published if k not in numbers)]:
                    ours = numbers.get(key, "")
                    interval = entry["ours"].get(f"{key}, 95 %")
                    cells = (f"{name} ({entry['seconds']:.0f})", key.replace("|", "&#124;"),
                             importlib.import_module("common").shown(ours) +
                             (" [{:.2f}, {:.2f}]".format(*(max(v, 0) for v in interval)) if interval else ""), published.get(key, ""))
                    lines.append("| " + " | ".join(map(str, cells)) + " |")
            lines.append("")
    return "\n".join(lines)


BLOCK = re.compile(r"(?<=<!-- measured -->\n).*?(?=<!-- /measured -->)", re.S)


def test_readme_shows_the_committed_numbers_and_no_others():
    """To bring README up to date after new results: python tests/test_repository.py"""
    assert BLOCK.search((ROOT / "README.md").read_text()).group() == measured()


def test_pictures_of_readme_exist():
    for picture in re.findall(r"\]\((results/[^)]*\.png)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / picture).stat().st_size > 5000


def test_tracked_files_are_small():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    sizes = {f: (ROOT / f).stat().st_size for f in listed.stdout.splitlines() if (ROOT / f).exists()}
    assert max(sizes.values()) <= 300_000 and sum(sizes.values()) <= 5_000_000


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(BLOCK.sub(lambda _: measured(), readme.read_text()))
