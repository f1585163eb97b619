"""MoE-Sieve, computed again from the counts and scores that its author published.

git clone https://github.com/amanzoni1/MoE_Sieve
python scripts/moe_sieve.py MoE_Sieve      # or a folder with the same as plain JSON (scripts/moe_sieve_data.py)
python scripts/moe_sieve.py --check        # without the data: is docs/moe-sieve.md what the record says?

Writes results/moe_sieve.json, results/moe_sieve_cells.json, docs/moe-sieve.md and its figures, and ends with "N of M
cells equal". It fails, and writes nothing, where a cell was equal in the record and no longer is, or is neither equal
nor explained. Where the data lack a model of the record, nothing is written either, unless --output names a folder.
Counts, means, intervals and tests are ours, the runs the author's. `python scripts/docs.py` makes the tables in
README.md and docs/papers.md of the record.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from marks import table
from moe_sieve_cell import OLMOE, Cell
from moe_sieve_cells import cells
from moe_sieve_claims import ALL, QUARTER, tests
from moe_sieve_data import KEYS, SOURCE, Data, Scores, read
from moe_sieve_figures import figures
from moe_sieve_page import count, page

from hotlora.base.files import write_json, write_text
from hotlora.evaluation.stats import mean_sd, paired_test
from hotlora.report.figures import save_figure
from hotlora.routing.study import experts_for

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "results" / "moe_sieve.json"
CELLS = ROOT / "results" / "moe_sieve_cells.json"
PAGE = ROOT / "docs" / "moe-sieve.md"
TASKS = {"gsm8k": "GSM8K", "hellaswag": "HellaSwag", "spider": "Spider"}
MARGIN = 2.0  # points; MoE-Sieve's own margin
# Trained LoRA parameters of OLMoE-1B-7B at rank 32, by `hotlora params` (tests/test_moe_sieve.py counts them).
ROWS = {
    "full_lora": ("all 64 experts", 311_459_840),
    "hotk16": ("**hot quarter** (16)", 84_967_424),
    "randk16": ("random quarter", 84_967_424),
    "hotk8": ("hot eighth (8)", 47_218_688),
    "randk8": ("random eighth", 47_218_688),
}


def results(scores: Scores) -> list[dict[str, Any]]:
    """One dict a model, task and condition with several seeds: mean and deviation, and the difference to all experts,
    paired by seed, with its 95% interval and the p of equivalence within MARGIN."""
    rows = []
    for model, task, condition in sorted((m, t, c) for m in scores for t in scores[m] for c in scores[m][t]):
        runs, every = scores[model][task][condition], scores[model][task][ALL]
        if len(runs) == 1:
            continue  # one run has no spread
        found = mean_sd(list(runs.values()))
        row: dict[str, Any] = {"model": model, "task": task, "condition": condition, "seeds": sorted(runs)}
        row |= {"mean": round(found.mean, 4), "sd": round(found.sd or 0.0, 4)}
        if condition != ALL:
            seeds = sorted(runs.keys() & every.keys())
            test = paired_test([runs[s] for s in seeds], [every[s] for s in seeds], bounds=(MARGIN,))
            assert test.interval and test.p is not None
            row["against_all"] = {
                "mean": round(test.mean, 4), "low": round(test.interval.low, 4), "high": round(test.interval.high, 4),
                "p": test.p, "p_equivalent": test.tost[MARGIN],
            }  # fmt: skip
        rows.append(row)
    return rows


def readme_table() -> str:
    """OLMoE-1B-7B on GSM8K."""
    found = {row["condition"]: row for row in _rows() if (row["model"], row["task"]) == ("olmoe", "gsm8k")}
    heads = ["OLMoE-1B-7B on GSM8K", "accuracy, %", "against all experts, points", "trained parameters"]
    lines = []
    for condition, (label, trained) in ROWS.items():
        row = found[condition]
        lines.append([label, f"{row['mean']:.1f} ± {row['sd']:.1f}", _against(row), f"{trained / 1e6:.1f}M"])
    pairs = [row for row in _rows() if row["condition"] == QUARTER[row["model"]]]
    passed = sum(row["against_all"]["p_equivalent"] < 0.05 for row in pairs)
    told = (
        f"*Mean ± standard deviation over {len(found[ALL]['seeds'])} seeds; in brackets the 95% interval, paired by "
        f"seed. Of the paper's {len(pairs)} pairs of a model and a task the hot quarter is equivalent to all experts "
        f"within {MARGIN:g} points in {passed}; of the rest it cannot be told. Random experts were tried on this "
        "pair alone.*"
    )
    return f"{table(heads, lines)}\n\n{told}"


def papers_table() -> str:
    """Both models on the three tasks, the hot quarter against all."""
    found = {(row["model"], row["task"], row["condition"]): row for row in _rows()}
    heads = ["model", "task", "all experts, %", "hot quarter, %", "difference, points", "within 2 points"]
    lines = []
    for (model, task, condition), every in found.items():
        if condition != ALL:
            continue
        quarter = found[model, task, QUARTER[model]]
        scores = [f"{row['mean']:.1f} ± {row['sd']:.1f}" for row in (every, quarter)]
        p = quarter["against_all"]["p_equivalent"]
        told = f"{'yes' if p < 0.05 else 'cannot tell'} (p {'<0.001' if p < 0.001 else f'= {p:.3f}'})"
        lines.append([KEYS[model], TASKS[task], *scores, _against(quarter), told])
    return table(heads, lines, 2)


def _rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(RESULT.read_text(encoding="utf-8"))["results"]
    return rows


def _against(row: Mapping[str, Any]) -> str:
    if "against_all" not in row:
        return "–"
    mean, low, high = (f"{row['against_all'][key]:+.1f}".replace("-", "−") for key in ("mean", "low", "high"))
    return f"{mean} [{low} to {high}]"


def recorded() -> tuple[dict[str, Any], list[Cell]]:
    """The committed record: of the whole, and every cell."""
    rows = json.loads(CELLS.read_text(encoding="utf-8"))["cells"]
    return json.loads(RESULT.read_text(encoding="utf-8")), [Cell(**row) for row in rows]


def recorded_page() -> str:
    """docs/moe-sieve.md as the committed record has it."""
    return page(*recorded())


def record_of(data: Data) -> dict[str, Any]:
    """What results/moe_sieve.json holds."""
    of_olmoe = data.profiles.get(OLMOE, {})
    needed = {TASKS[task]: experts_for(of_olmoe[task]).mean().item() for task in TASKS if task in of_olmoe}
    return {
        "version": 1, "source": SOURCE, "commit": data.commit, "margin": MARGIN, "models": list(data.profiles),
        "experts_for_60": needed, "results": results(data.scores), "tests": tests(data.scores),
    }  # fmt: skip


def faults(found: Sequence[Cell], before: Sequence[Cell], is_whole: bool = True) -> list[str]:
    """Cells that are neither equal nor explained, and those that were equal and are no longer.

    is_whole: the data have all models and the scores, so that no cell may go for lack of data.
    """
    was_equal = {cell.key for cell in before if cell.status == "equal"}
    words = [
        f"{', '.join(cell.key)}: printed {cell.printed:g}, here {cell.here:g}, and EXPLAINED does not say why"
        if not isinstance(cell.printed, str) and not isinstance(cell.here, str)
        else f"{', '.join(cell.key)}: printed {cell.printed}, here {cell.here}"
        for cell in found
        if cell.status == "differs"
    ]
    gone = ("explained", "absent") if is_whole else ("explained",)
    lost = [cell for cell in found if cell.key in was_equal and cell.status in gone]
    return words + [f"{', '.join(cell.key)}: was equal, and is {cell.here} now" for cell in lost]


def _write(root: Path, data: Data, found: Sequence[Cell]) -> None:
    record, rows = record_of(data), [_row(cell) for cell in found]
    for folder in ("results", "docs/moe-sieve"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    write_json(root / "results" / RESULT.name, record)
    lines = ",\n".join(json.dumps(row) for row in rows)
    write_text(root / "results" / CELLS.name, f'{{"version": 1, "cells": [\n{lines}\n]}}\n')
    write_text(root / "docs" / PAGE.name, page(record, [Cell(**row) for row in rows]))
    for name, figure in figures(data).items():
        save_figure(figure, root / "docs" / "moe-sieve" / f"{name}.png", 100)


def _row(cell: Cell) -> dict[str, Any]:
    """A cell as the record has it: numbers to seven digits."""
    row: dict[str, Any] = {key: getattr(cell, key) for key in ("table", "row", "column", "form", "printed")}
    row["here"] = _short(cell.here)
    return row | ({"others": {name: _short(value) for name, value in cell.others.items()}} if cell.others else {})


def _short(value: Any) -> Any:
    return float(f"{value:.7g}") if isinstance(value, int | float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="a clone of the repository, or the plain form")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--output", type=Path, help="write results/ and docs/ there, in place of this repository")
    args = parser.parse_args()
    if args.check == (args.folder is not None):
        parser.error("give the folder of the data, or --check")
    record, before = recorded() if RESULT.is_file() and CELLS.is_file() else ({"models": []}, [])
    if args.check:
        is_stale = not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page(record, before)
        found, wrong = before, [*faults(before, before), *([f"{PAGE} is not what the record says"] if is_stale else [])]
    else:
        data = read(args.folder)
        found = cells(data)
        lacking = [model for model in record["models"] if model not in data.profiles]
        lacking += ["seeds.json"] if before and not data.scores else []
        wrong = faults(found, before, is_whole=not lacking)
        if lacking and not args.output:
            print(f"nothing is written, for {args.folder} has no {', '.join(lacking)}, which the record has")
        elif args.output or not wrong:
            _write(args.output or ROOT, data, found)
    told = [
        f"{', '.join(cell.key)}: {cell.printed} printed, {cell.here} here: {cell.told}" for cell in found if cell.told
    ]
    print("\n".join([*(f"explained: {line}" for line in told), *(f"FAULT: {line}" for line in wrong)]))
    print(f"{sum(cell.status == 'absent' for cell in found)} cells are not in the data")
    print(count(found))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
