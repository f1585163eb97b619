"""Write docs/papers.md: the list of recipes, and what nano's runs say of the papers' claims.

python scripts/papers.py runs/papers          # first take the records over into results/nano/papers, without weights
python scripts/papers.py runs/papers-longer   # the same into results/nano/papers-longer
python scripts/papers.py runs/told            # and into results/nano/told
python scripts/papers.py                      # the tables and pictures from the records there, and the page
python scripts/papers.py --check              # fail if the page is not what would be written
"""

import argparse
import shutil
import sys
from pathlib import Path

from marks import filled

from hotlora.base.files import write_text
from hotlora.base.records import Record, find_records
from hotlora.papers import RECIPES, Recipe, Setting
from hotlora.papers.benches import BenchRecipe
from hotlora.papers.cells import lacks_dense, training_seconds
from hotlora.papers.configs import HyperparameterTable, ShapeTable
from hotlora.papers.page import table_results, write_tables
from hotlora.papers.profiles import ProfileRecipe
from hotlora.papers.result import Result
from hotlora.report.text import human_seconds
from results import take_over

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "nano"
STORES = ("papers", "papers-longer", "told")
PAGE = ROOT / "docs" / "papers.md"
RECIPES_MARK = "<!-- made by scripts/papers.py from the recipes -->"
NANO_MARK = "<!-- made by scripts/papers.py from results/nano/{} -->"
MADE_BY = {ProfileRecipe: "profiles", BenchRecipe: "benches", HyperparameterTable: "presets", ShapeTable: "configs"}
# Of a store, beside the runs' records and plans.
KEPT = ("profiles/*/*/study.json", "profiles/*/*/*.safetensors", "benches/*/*.json", "configs/*.json")


def page() -> str:
    """docs/papers.md, with what is made between its marks."""
    text = PAGE.read_text(encoding="utf-8")
    text = filled(text, RECIPES_MARK, recipes_table())
    for store in STORES:
        text = filled(text, NANO_MARK.format(store), nano(store))
    return text


def recipes_table() -> str:
    """Every recipe: its name, what it shows, and what makes it."""
    setting = Setting("nano")
    lines = ["| `hotlora sweep` | shows | of | made by |", "| --- | --- | --- | --- |"]
    for name, make in RECIPES.items():
        recipe = make(setting)
        made = "trainings" if isinstance(recipe, Recipe) else MADE_BY[type(recipe)]
        lines.append(f"| `{name}` | {recipe.title} | {recipe.where} | {made} |")
    return "\n".join(lines)


def nano(store: str) -> str:
    """How many runs there were, and the claims; the other tables lie beside the records."""
    records = find_records(RESULTS / store)
    results = table_results(Setting("nano"), RESULTS / store)
    claims = next(result for result in results if result.name == "claims")
    lines = [_runs(store, records), "", f"**{claims.title}.**"]
    lines += [line for line in claims.markdown().splitlines() if line.startswith(("|", "- "))]
    lines[3:3] = [""]
    return "\n".join(_spaced(lines)) + "\n\n" + _tables(store, results)


def _runs(store: str, records: dict[Path, Record]) -> str:
    trained = [record for record in records.values() if record.get("training")]
    seconds = sum(map(training_seconds, trained))
    without = sum(map(lacks_dense, trained))
    dense = f" (without the dense runs before {without} of LoRI's sparse ones)" if without else ""
    device = trained[0]["environment"]["device"]
    failed = sum(record["status"] != "done" for record in records.values())
    return (
        f"{len(records)} runs, {len(trained)} of them trainings that took {human_seconds(seconds)} in all{dense} on "
        f"{device} each, two side by side and with other work beside them; {failed} failed. Every run made is in the "
        f"tables ([results/nano/{store}](../results/nano/{store})), and what was not made is named there."
    )


def _tables(store: str, results: list[Result]) -> str:
    folder = f"../results/nano/{store}/tables-nano"
    lines = [f"All tables with their pictures are in [tables.md]({folder}/tables.md):", ""]
    lines += [
        f"- {result.title} ({result.where}): [CSV]({folder}/{result.name}.csv)" for result in results if result.rows
    ]
    return "\n".join(lines)


def _spaced(lines: list[str]) -> list[str]:
    """An empty line wherever a table begins or ends."""
    spaced: list[str] = []
    for line in lines:
        if spaced and spaced[-1] and spaced[-1].startswith("|") != line.startswith("|"):
            spaced.append("")
        spaced.append(line)
    return spaced


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="?")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.check:
        if PAGE.read_text(encoding="utf-8") != page():
            sys.exit(f"{PAGE.relative_to(ROOT)} is not up to date; run `python scripts/papers.py`")
        return
    if args.runs:
        if args.runs.name not in STORES:
            sys.exit(f"the runs' folder is {args.runs.name}, and must be one of {', '.join(STORES)}")
        into = RESULTS / args.runs.name
        print(f"{take_over(args.runs, into)} records in {into.relative_to(ROOT)}")
        for file in (file for pattern in KEPT for file in args.runs.glob(pattern)):
            target = into / file.relative_to(args.runs)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    for store in STORES:
        for tables in write_tables(RESULTS / store, RESULTS / store):
            print(f"wrote {tables.relative_to(ROOT)}")
    write_text(PAGE, page())
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
