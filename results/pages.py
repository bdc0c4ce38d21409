"""Write the tables of results/SCRIPT.md, below their marker, from results/SCRIPT-DATASET.json: python results/pages.py

What stands above the marker (claims, pictures, caveats) is written by hand.
"""
import importlib
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import common  # noqa: E402 (it lies one folder above)

MARKER = "<!-- below: made from the JSON files by python results/pages.py -->\n"
LONGEST = 40  # rows of a figure that are shown; a curve has more, and a picture

def table(script, dataset, name, entry):
    """One experiment as lines of Markdown, ours beside the published numbers."""
    theirs = {}
    for row in common.published(script, dataset, name):
        theirs[row["quantity"]] = f"{row['value']} ({row['source']})"
    made = f"`{entry['command']}`: {entry['seconds']:.0f} s on {entry['hardware']}, torch {entry['torch'].split('+')[0]}"
    made += f", commit {entry['commit']}" if entry.get("commit") else ""
    made += f", p0 {entry['p0']}" if entry.get("p0") else ""
    lines = [f"### {dataset}, {name}", "", made, ""]
    if len(entry["rows"]) > LONGEST and not name.startswith("table"):
        return [*lines, f"{len(entry['rows'])} points of a curve: {script}-{dataset}.json has them.", ""]
    lines += ["| quantity | with | ours | published |", "|---|---|---|---|"]
    for row in entry["rows"]:
        quantity, beside, number = common.shown_row(row)
        cells = (quantity.replace("|", "&#124;"), beside, number, theirs.pop(quantity, ""))
        lines.append("| " + " | ".join(cells) + " |")
    for quantity, number in theirs.items():
        lines.append(f"| {quantity} | | | {number} |")
    return [*lines, ""]

def tables(script):
    """All tables of a script: every data set, its experiments in the script's order ("table2.5 fixed K 5": a variant)."""
    order = list(importlib.import_module(script).EXPERIMENTS)
    lines = []
    for file in sorted(HERE.glob(f"{script}-*.json")):
        dataset = file.stem.removeprefix(f"{script}-")
        entries = json.loads(file.read_text())
        for name in sorted(entries, key=lambda name: (order.index(name.split()[0]), name)):
            lines += table(script, dataset, name, entries[name])
    return "\n".join(lines)

def page(file):
    """A page as it ought to be: its own words, then the tables."""
    words = file.read_text().split(MARKER)[0]
    return words + MARKER + "\n" + tables(file.stem)

if __name__ == "__main__":
    for file in sorted(HERE.glob("*.md")):
        if MARKER in file.read_text():
            file.write_text(page(file))
