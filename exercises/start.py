"""Make a copy of a script to work on:

    python exercises/start.py fixer-2 --out my_work     # a body is taken out, or a bug planted; your copy alone changes
    python exercises/start.py                           # a list of all exercises
"""
import argparse
from pathlib import Path

import kit
from common import UserError, call  # kit knows where it is


def main(argv=None):
    """Writes the copy; UserError where it cannot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exercise", nargs="?", help="its name, SCRIPT-NUMBER")
    parser.add_argument("--out", type=Path, default=Path("my_work"), help="folder of the copy (my_work)")
    args = parser.parse_args(argv)
    known = kit.exercises()
    if args.exercise is None:
        for name in known:
            print(name)
        return
    if args.exercise not in known:
        raise UserError(f"no exercise '{args.exercise}'; known: {', '.join(known)}")
    exercise, out = known[args.exercise], args.out.expanduser()
    source = (kit.ROOT / f"{exercise.script}.py").read_text(encoding="utf-8")
    files = {f"{exercise.script}.py": exercise.start(source),
             "common.py": (kit.ROOT / "common.py").read_text(encoding="utf-8")}
    if exercise.questions:
        lines = [f"{name} = None  # {question}" for name, question in exercise.questions.items()]
        files["answers.py"] = "\n".join(lines) + "\n"
    for name in files:
        if (out / name).exists() and name != "common.py":
            raise UserError(f"{out / name} exists and is left as it is; take another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            if not (out / name).exists():
                (out / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
    mine = "answers.py" if exercise.questions else f"{exercise.script}.py"
    print(f"read  exercises/{exercise.script}.md, {exercise.name}")
    print(f"edit  {out / mine}")
    print(f"check python -m pytest exercises --exercise {exercise.name} --work {out}")


if __name__ == "__main__":
    call(main)
