"""Two runs' results -> one against the other, example by example. Loads no model; `docs/statistics.md` explains it.

This asks what other test examples would do to the difference of these two models. What training again would do, only
several seeds tell: `comparison`.
"""

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.errors import DataError, FileError
from ..base.escape import one_line
from ..base.files import read_json_lines
from ..base.records import Record, read_record, read_results
from ..evaluation.stats import Interval, McNemar, mcnemar, mean_interval, paired_difference, ratio_interval
from .comparison_table import html_paired
from .measured import WORDS, measured_apart

ALPHA = 0.05

# An example: its id, and which of the examples with that id it is (some benchmarks ask the same twice).
_Key = tuple[str, int]
_Rows = dict[_Key, dict[str, Any]]
# Pairs are of the examples that both have, and a note tells of others; another metric has a note of its own.
_OF_EXAMPLES = [WORDS[name] for name in ("test_hash", "n", "scorer_hash", "metric")]


@dataclass(frozen=True)
class PairedTask:
    """Two runs on the examples of a task that both have.

    Attributes:
        n: those examples.
        a, b: points, 100 times the share of them that each run has right.
        difference: a - b, in points.
        interval: 95%, a percentile bootstrap of the examples; None for a single one.
        mcnemar: the exact test of the examples that one run alone has right; None where an example has several answers.
        notes: examples that one run alone has, and other ways of measuring.
    """

    task: str
    metric: str
    n: int
    a: float
    b: float
    difference: float
    interval: Interval | None
    mcnemar: McNemar | None
    notes: tuple[str, ...] = ()
    unit: str = "%"
    """of a and b; of the difference points, where it is %"""

    @property
    def verdict(self) -> str:
        """By McNemar's p at 0.05; without one, by whether the interval leaves 0 out."""
        if self.mcnemar is not None:
            differs = self.mcnemar.p < ALPHA
        else:
            differs = self.interval is not None and not self.interval.low <= 0 <= self.interval.high
        return "differs" if differs else "cannot tell"


@dataclass(frozen=True)
class PairedRuns:
    """The tasks that both runs were scored on, and what was left out, in words."""

    a: str
    b: str
    tasks: tuple[PairedTask, ...]
    left_out: tuple[str, ...]

    def __repr__(self) -> str:
        told = (f"{one_line(task.task)} {_difference(task)}, {task.verdict}" for task in self.tasks)
        return f"PairedRuns({one_line(self.a)} − {one_line(self.b)}: {'; '.join(told)})"

    def _repr_html_(self) -> str:
        return html_paired(self)


def _difference(task: PairedTask) -> str:
    return f"{task.difference:+.2f} points" if task.unit == "%" else f"{task.difference:+.3f}"


def compare_examples(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> PairedRuns:
    """Run a against run b, on every task that both were scored on.

    Args:
        a, b: the runs' folders, each with run.json and the results of its evaluation.

    Raises:
        DataError: a folder that is no run's, a run that is not done, or no task or no example in common.
        FileError: results that are missing or not whole.
    """
    folders = [Path(a), Path(b)]
    records = [_record(folder) for folder in folders]
    scored = [record.get("evaluation") or {} for record in records]
    common = [task for task in scored[0] if task in scored[1]]
    each = list(zip(folders, scored, strict=True))
    losses = _paired_losses(folders, records)
    if not common and not losses:
        told = " and ".join(f"{folder} on {', '.join(own) or 'none'}" for folder, own in each)
        raise DataError(
            f"the two runs were scored on no task in common ({told}), and hold out other rows. Score both on the same: "
            "hotlora evaluate --data ROWS --adapter RUN --output FOLDER, and compare the two folders."
        )
    left_out = [
        f"{task}: only {folder} was scored on it." for folder, own in each for task in own if task not in common
    ]
    tasks: list[PairedTask] = []
    for task in common:
        results = [own[task] for own in scored]
        if all(result["metric"] == "token_accuracy" for result in results):
            continue  # of texts: `losses` has them
        differs = measured_apart(records[0], records[1], task)
        if WORDS["scorer_hash"] in differs and WORDS["test_hash"] not in differs:
            left_out.append(
                f"{task}: the answers to the same prompts were judged by others (tests, choices or databases), so they "
                "are not paired: evaluate both on one copy of the data."
            )
            continue
        rows = [_rows(folder, task, result) for folder, result in zip(folders, results, strict=True)]
        tasks.append(_paired(task, folders, results, rows, [word for word in differs if word not in _OF_EXAMPLES]))
        has_rouge = [all("rouge_l" in row for row in own.values()) for own in rows]
        if all(has_rouge):
            tasks.append(_paired_rouge(task, folders, rows))
        elif any("rouge_l" in result for result in results):
            lacking = folders[has_rouge.index(False)]
            left_out.append(f"{task}, ROUGE-L: {lacking} kept none of each example (hotlora evaluate --rouge).")
    if not tasks and not losses:
        raise DataError(f"nothing of the two runs can be paired: {' '.join(left_out)}")
    return PairedRuns(str(folders[0]), str(folders[1]), (*tasks, *losses), tuple(left_out))


def as_dict(runs: PairedRuns) -> dict[str, Any]:
    """Plain values for JSON; None where there is no number."""
    tasks = [dataclasses.asdict(task) | {"verdict": task.verdict} for task in runs.tasks]
    return dataclasses.asdict(runs) | {"tasks": tasks}


def _record(folder: Path) -> Record:
    if not (folder / "run.json").is_file():
        raise DataError(
            f"{folder} is no run's folder: it has no run.json. Two folders are two runs, compared example by example; "
            "for a sweep give the one folder that holds its runs."
        )
    record = read_record(folder)
    if record["status"] != "done":
        raise DataError(f"the run in {folder} is not done (its status is {record['status']}): let it come to its end.")
    return record


def _paired(
    task: str, folders: list[Path], results: list[dict[str, Any]], rows: list[_Rows], otherwise: Sequence[str]
) -> PairedTask:
    """otherwise: what else than the examples differs in how the two were measured."""
    keys = _common(task, folders, rows)
    ours, theirs = ([100 * float(own[key]["correct"]) for key in keys] for own in rows)
    difference, low, high = paired_difference(ours, theirs)
    one_answer = all(score in (0, 100) for score in (*ours, *theirs))
    metrics = [result["metric"].replace("_", " ") for result in results]
    notes = [
        f"{task}: {len(own) - len(keys)} of {len(own)} examples of {folder} are not among the other's: left out."
        for folder, own in zip(folders, rows, strict=True)
        if len(own) > len(keys)
    ]
    if metrics[0] != metrics[1]:
        notes.append(f"{task}: measured in two ways, {metrics[0]} and {metrics[1]}.")
    if otherwise:
        notes.append(f"{task}: measured otherwise ({', '.join(otherwise)}), so not the models alone differ.")
    if not one_answer:
        notes.append(f"{task}: examples with several answers are right by a share, so there is no McNemar test.")
    return PairedTask(
        task, " and ".join(dict.fromkeys(metrics)), len(keys), sum(ours) / len(keys), sum(theirs) / len(keys),
        difference, None if math.isnan(low) else Interval(low, high),
        mcnemar([score == 100 for score in ours], [score == 100 for score in theirs]) if one_answer else None,
        tuple(notes),
    )  # fmt: skip


def _paired_rouge(task: str, folders: list[Path], rows: list[_Rows]) -> PairedTask:
    """ROUGE-L's F of the examples that both have, with Student's t interval of the differences' mean."""
    keys = _common(task, folders, rows)
    ours, theirs = ([own[key]["rouge_l"] for key in keys] for own in rows)
    low, high = mean_interval([one - other for one, other in zip(ours, theirs, strict=True)])
    a, b = (sum(values) / len(keys) for values in (ours, theirs))
    interval = None if math.isnan(low) else Interval(low, high)
    return PairedTask(f"{task}, ROUGE-L", "ROUGE-L", len(keys), a, b, a - b, interval, None, unit="0 to 1")


def _common(task: str, folders: list[Path], rows: list[_Rows]) -> list[_Key]:
    keys = [key for key in rows[0] if key in rows[1]]
    if not keys:
        raise DataError(
            f"{task}: {folders[0]} and {folders[1]} have no example in common: evaluate both on the same data."
        )
    return keys


def _paired_losses(folders: Sequence[Path], records: Sequence[Record]) -> list[PairedTask]:
    """Loss and token accuracy on rows that both runs kept the losses of; with the same tokens, or a token's loss of one
    is not one of the other's."""
    names = [_losses_file(record) for record in records]
    if None in names:
        return []
    a, b = (_by_row(folder / str(name)) for folder, name in zip(folders, names, strict=True))
    keys = [key for key in a if key in b]
    tokens = [key[1] for key in keys]
    if not sum(tokens):
        return []
    data = Path(str(records[0].get("config", {}).get("test_data") or records[0]["data"]["name"])).stem
    out = len(a) + len(b) - 2 * len(keys)
    notes = (f"{data}: {out} rows that one run alone has, or with other tokens: left out.",) if out else ()
    found = []
    for metric, unit, name, factor in (("loss", "nats a token", "loss", 1), ("token accuracy", "%", "right", 100)):
        ours, theirs = ([factor * rows[key][name] for key in keys] for rows in (a, b))
        difference = [one - other for one, other in zip(ours, theirs, strict=True)]
        low, high = ratio_interval(difference, tokens)
        mean, other, between = (sum(values) / sum(tokens) for values in (ours, theirs, difference))
        interval = None if math.isnan(low) else Interval(low, high)
        told = f"{data}, {metric}"
        found.append(PairedTask(told, metric, len(keys), mean, other, between, interval, None, notes, unit))
        notes = ()
    return found


def _by_row(path: Path) -> dict[tuple[str, int, int], dict[str, Any]]:
    """(id, response tokens, which of those that have both) -> a row of losses.jsonl."""
    seen: Counter[tuple[str, int]] = Counter()
    found = {}
    for row in read_json_lines(path, "id", "loss", "tokens", "right"):
        key = row["id"], row["tokens"]
        found[*key, seen[key]] = row
        seen[key] += 1
    return found


def _losses_file(record: Record) -> str | None:
    sections = [record.get("training") or {}, *(record.get("evaluation") or {}).values()]
    return next((section["losses"] for section in sections if isinstance(section.get("losses"), str)), None)


def _rows(folder: Path, task: str, result: dict[str, Any]) -> _Rows:
    """By example, its result."""
    if "results" not in result:
        raise FileError(f"{folder} kept no example's result on {task}: evaluate again with an output folder.")
    path = folder / result["results"]
    rows = sorted(read_results(path, "index", "id"), key=lambda row: row["index"])
    if len(rows) != result["n"]:
        raise FileError(f"{path} holds {len(rows)} of {result['n']} examples: it is not whole; evaluate again.")
    seen: Counter[str] = Counter()
    found = {}
    for row in rows:
        found[row["id"], seen[row["id"]]] = row
        seen[row["id"]] += 1
    return found
