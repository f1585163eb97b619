"""Write what is generated in the docs: docs/cli.md from the commands' help, README's table from run records.

python scripts/docs.py                     # write both
python scripts/docs.py --check             # fail if either is not what would be written
python scripts/docs.py --demo runs/demo    # first take over a demo's records and pictures into docs/demo
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from hotlora.records import find_records
from hotlora.tables import COLUMNS, read_sections, table_rows

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "docs" / "demo"
BEGIN, END = "<!-- made by scripts/docs.py from docs/demo -->", "<!-- end -->"
SHOWN = ("accuracy", "difference", "covered", "trainable", "percent", "adapter", "speed", "memory")
KEPT = ("run.json", "plan.json", "profile.safetensors", "metrics.jsonl")
PICTURES = ("heat-map", "coverage")


def cli_page() -> str:
    """Every command's help, as typer writes it."""
    command = [sys.executable, "-m", "typer", "hotlora.cli", "utils", "docs", "--name", "hotlora"]
    page = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return page.strip() + "\n"


def demo_table() -> str:
    """The table of docs/demo's runs, one block a task."""
    lines = []
    for section in read_sections(find_records(DEMO)):
        for task in section.tasks:
            rows = table_rows(section, task)
            keys = [key for key in SHOWN if any(row.cells[key] != "–" for row in rows)]
            lines += [f"| {section.model} on {task} | " + " | ".join(COLUMNS[key] for key in keys) + " |"]
            lines += ["|---" + "|---:" * len(keys) + "|"]
            lines += [f"| {row.name} | " + " | ".join(row.cells[key] for key in keys) + " |" for row in rows]
            lines += [""]
    return "\n".join(lines).rstrip()


def with_table(text: str, table: str) -> str:
    """``text`` with ``table`` between its two marks."""
    head, rest = text.split(BEGIN)
    tail = rest.split(END, 1)[1]
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


def take_over(runs: Path) -> None:
    """Copy a demo's records, plans, profiles, metrics and pictures, not its weights, into docs/demo."""
    for folder in find_records(runs):
        target = DEMO / folder.relative_to(runs)
        target.mkdir(parents=True, exist_ok=True)
        for name in [*KEPT, *(p.name for p in folder.glob("results-*.jsonl"))]:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, target / name)
    for picture in runs.rglob("*.png"):
        if any(name in picture.name for name in PICTURES):
            shutil.copyfile(picture, DEMO / picture.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--demo", type=Path)
    args = parser.parse_args()
    if args.demo:
        take_over(args.demo)
    readme = ROOT / "README.md"
    wanted = {
        ROOT / "docs" / "cli.md": cli_page(),
        readme: with_table(readme.read_text(encoding="utf-8"), demo_table()),
    }
    stale = [p for p, text in wanted.items() if not p.is_file() or p.read_text(encoding="utf-8") != text]
    if args.check and stale:
        sys.exit(f"not up to date: {', '.join(str(p.relative_to(ROOT)) for p in stale)}; run `make docs`")
    if not args.check:
        for path in stale:
            path.write_text(wanted[path], encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
