"""Make a copy of a script to work on:

    python exercises/start.py fixer-2     # my_work/fixer-2: a body is taken out, or a bug planted; your copy alone changes
    python exercises/start.py             # a list of all exercises
"""
import argparse
from pathlib import Path

import kit
from common import UserError, call  # kit knows where it is


def main(argv=None):
    """Writes the copy; UserError where it cannot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exercise", nargs="?", help="its name, SCRIPT-NUMBER")
    parser.add_argument("--out", type=Path, help="folder of the copy (my_work/EXERCISE)")
    args = parser.parse_args(argv)
    known = kit.exercises()
    if args.exercise is None:
        for name in known:
            print(name)
        return
    if args.exercise not in known:
        raise UserError(f"no exercise '{args.exercise}'; known: {', '.join(known)}")
    exercise, out = known[args.exercise], (args.out or kit.folder_of(args.exercise)).expanduser()
    source = (kit.ROOT / f"{exercise.script}.py").read_text(encoding="utf-8")
    files = {f"{exercise.script}.py": kit.marked(exercise.name, exercise.start(source)),
             **{f"{other}.py": (kit.ROOT / f"{other}.py").read_text(encoding="utf-8")
                for other in ("common", *kit.BESIDE.get(exercise.script, ()))}}
    if exercise.questions:
        lines = [f"{name} = None  # {question}" for name, question in exercise.questions.items()]
        files["answers.py"] = "\n".join(lines) + "\n"
    for name in (f"{exercise.script}.py", "answers.py"):
        if name in files and (out / name).exists():
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
    print(f"run   cd {out} && python {exercise.script}.py --fresh  (a checkpoint does not know that the code has changed)")
    work = f" --work {out}" if args.out else ""
    print(f"check python -m pytest exercises --exercise {exercise.name}{work}")


if __name__ == "__main__":
    call(main)
