"""A leaderboard: methods by task and budget, with score, time and memory, ranked by what the seeds can tell.

Every two ranked methods of a task meet in a paired t test over the seeds that both have, corrected over all of these
pairs (Holm). Rank: by wins less losses that survive.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import mean, median
from typing import Any

from ..base.escape import one_line
from ..evaluation.stats import Interval, PairedTest, holm, mean_interval, paired_test
from ..hf.hub import public_name
from .comparison import ALPHA
from .leaderboard_folder import Board, Entry, read_board
from .leaderboard_protocol import is_loss, own_options, score
from .sections import part, place_of

TOLERANCE = 0.05
"""Methods of one budget train at most so much more parameters than the least of them."""


@dataclass(frozen=True)
class Standing:
    """Differences to other methods that survive the correction, and the place by wins less losses (ties share it).

    rank: None where the method is not ranked.
    """

    wins: int = 0
    losses: int = 0
    rank: int | None = None


@dataclass(frozen=True)
class Row:
    """A method on a task.

    Attributes:
        folders: of its runs' records, by seed; a model as it is has no seed: None.
        values: seed -> points of the score, or the held-out loss.
        interval: 95%, Student's t over seeds; None with fewer than two seeds.
        trained: parameters, mean over seeds.
        budget: number of the budget that it belongs to, from the smallest; None of a model as it is.
        seconds: of training, medians by the hardware that they were taken on.
        memory: most bytes held in training, by hardware.
        overall, in_budget: against all methods of the task, and against those of its budget.
        note: why it is not ranked.
    """

    method: str
    folders: Mapping[int | None, Path]
    values: Mapping[int | None, float]
    mean: float
    interval: Interval | None
    trained: float
    percent: float | None
    budget: int | None
    seconds: Mapping[str, float]
    memory: Mapping[str, float]
    options: Mapping[str, Any]
    overall: Standing = Standing()
    in_budget: Standing = Standing()
    note: str = ""


@dataclass(frozen=True)
class Pair:
    """Two ranked methods. test: of a minus b; p_holm: corrected over all pairs of the task; winner: None below that."""

    a: str
    b: str
    seeds: tuple[int, ...]
    test: PairedTest
    p_holm: float | None
    winner: str | None


@dataclass(frozen=True)
class Table:
    """A task on a model: the protocol, its methods by budget and rank, and all pairs of those that are ranked."""

    task: str
    model: str
    protocol: Mapping[str, Any]
    rows: tuple[Row, ...]
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Leaderboard:
    """What `leaderboard` makes of a folder. left_out: runs in it that are not on the board, and why."""

    folder: Path
    tables: tuple[Table, ...]
    left_out: Mapping[Path, str]

    def __repr__(self) -> str:
        told = [f"{one_line(table.task)} ({len(table.rows)} methods)" for table in self.tables]
        left_out = f"; {len(self.left_out)} runs left out" if self.left_out else ""
        return f"Leaderboard({', '.join(told)}{left_out})"


def leaderboard(folder: str | os.PathLike[str]) -> Leaderboard:
    """Ranks the methods whose runs a folder holds, task by task and budget by budget.

    Args:
        folder: made by `hotlora leaderboard FOLDER --add RECORDS`; or any folder of runs, of which those count that
            follow the protocol (model, data, length of training, test) of most of them.

    Raises:
        FileError: no such folder, or a broken `board.json`.
        DataError: no training in it is done and has a score.
    """
    board = read_board(folder)
    tables = tuple(_table(board, key, protocol) for key, protocol in board.protocols.items())
    return Leaderboard(board.folder, tables, board.left_out)


def _table(board: Board, key: str, protocol: Mapping[str, Any]) -> Table:
    methods: dict[str, list[Entry]] = {}
    for entry in board.entries:
        if entry.key == key:
            methods.setdefault(entry.method, []).append(entry)
    rows = [_row(method, entries, protocol) for method, entries in methods.items()]
    rows = _budgets(rows)
    pairs = _pairs([row for row in rows if not row.note], less_is_better=is_loss(protocol))
    in_budget = _ranks([row for row in rows if not row.note], pairs, within=True)
    overall = _ranks([row for row in rows if not row.note], pairs, within=False)
    rows = [
        replace(row, overall=overall.get(row.method, Standing()), in_budget=in_budget.get(row.method, Standing()))
        for row in rows
    ]
    sign = 1 if is_loss(protocol) else -1
    rows.sort(key=lambda row: (row.budget or 0, row.in_budget.rank or len(rows), sign * row.mean, row.method))
    names: dict[str, str] = {}
    for name in sorted({entry.record["model"]["name"] for entries in methods.values() for entry in entries}, key=len):
        shown = public_name(name) if os.path.isabs(name) else name
        names.setdefault(place_of(name), shown)
    notes = tuple(_notes(rows, pairs))
    return Table(str(protocol["task"]), ", ".join(names.values()), protocol, tuple(rows), tuple(pairs), notes)


def _row(method: str, entries: Sequence[Entry], protocol: Mapping[str, Any]) -> Row:
    values = {entry.seed: score(entry.record) for entry in sorted(entries, key=lambda entry: entry.seed or 0)}
    records = [entry.record for entry in entries]
    lacking = [] if None in values else [seed for seed in protocol["ranked_with"] if seed not in values]
    note = f"not ranked: it lacks the seed{'s' * (len(lacking) > 1)} {', '.join(map(str, lacking))}" if lacking else ""
    percents = [percent for record in records if (percent := part(record, "parameters").get("percent")) is not None]
    times: dict[str, list[float]] = {}
    held: dict[str, list[float]] = {}
    for record in records:
        training, device = part(record, "training"), hardware(record.get("environment"))
        for found, value in ((times, training.get("seconds")), (held, training.get("peak_memory_bytes"))):
            if value is not None:
                found.setdefault(device, []).append(value)
    bits = part(records[0], "config").get("quantize")
    untrained = "not trained, and not ranked" + (f"; experts in {bits} bits" if bits else "")
    return Row(
        method,
        {entry.seed: entry.folder for entry in entries},
        values,
        mean(values.values()),
        mean_interval(list(values.values())) if len(values) > 1 else None,
        mean(part(record, "parameters").get("trainable") or 0 for record in records),
        mean(percents) if percents else None,
        None if None in values else 0,
        {device: median(some) for device, some in times.items()},
        {device: max(some) for device, some in held.items()},
        own_options(records[0]) if None not in values else {},
        note=untrained if None in values else note,
    )


def hardware(environment: Mapping[str, Any] | None) -> str:
    """What a run's times were taken on."""
    device = str((environment or {}).get("device", "unknown hardware"))
    return re.sub(r"\b1 threads$", "1 thread", device)  # as older records have it


def _budgets(rows: Sequence[Row]) -> list[Row]:
    """With the number of each row's budget: a budget begins where a method trains more than TOLERANCE more parameters
    than the least of the one before."""
    placed, number, least = [], 0, 0.0
    for row in sorted(rows, key=lambda row: row.trained):
        if row.budget is not None and (not number or row.trained > least * (1 + TOLERANCE)):
            number, least = number + 1, row.trained
        placed.append(row if row.budget is None else replace(row, budget=number))
    return placed


def _pairs(rows: Sequence[Row], *, less_is_better: bool) -> list[Pair]:
    found = []
    for a, b in combinations(rows, 2):
        seeds = tuple(sorted(seed for seed in a.values if seed is not None and seed in b.values))
        test = paired_test([a.values[seed] for seed in seeds], [b.values[seed] for seed in seeds])
        found.append(Pair(a.method, b.method, seeds, test, None, None))
    corrected = holm([pair.test.p for pair in found])
    return [
        replace(pair, p_holm=p, winner=_winner(pair, p, less_is_better))
        for pair, p in zip(found, corrected, strict=True)
    ]


def _winner(pair: Pair, p: float | None, less_is_better: bool) -> str | None:
    if p is None or p >= ALPHA:
        return None
    return pair.a if (pair.test.mean > 0) != less_is_better else pair.b


def _ranks(rows: Sequence[Row], pairs: Iterable[Pair], *, within: bool) -> dict[str, Standing]:
    """Method -> its standing. within: against methods of its own budget alone."""
    budgets = {row.method: row.budget if within else 0 for row in rows}
    counted = [pair for pair in pairs if pair.winner and budgets[pair.a] == budgets[pair.b]]
    wins = {m: sum(pair.winner == m for pair in counted) for m in budgets}
    losses = {m: sum(m in (pair.a, pair.b) and pair.winner != m for pair in counted) for m in budgets}
    net = {m: wins[m] - losses[m] for m in budgets}
    return {
        m: Standing(wins[m], losses[m], 1 + sum(net[o] > net[m] for o in budgets if budgets[o] == budgets[m]))
        for m in budgets
    }


def _notes(rows: Sequence[Row], pairs: Sequence[Pair]) -> list[str]:
    notes = [f"{row.method}: {row.note}." for row in rows if row.note]
    notes += [
        f"{pair.a} and {pair.b}: {pair.test.reason}."
        for pair in pairs
        if pair.test.p is None and abs(pair.test.mean) > 1e-9
    ]
    if masked := [row.method for row in rows if row.options.get("mask_entries") is not None]:
        notes.append(f"{', '.join(masked)}: the dense training before it, which draws the mask, is in no number here.")
    if warmed := [row.method for row in rows if row.options.get("warmup", "none") != "none"]:
        notes.append(f"{', '.join(warmed)}: the warm-up before it is in no number here.")
    return notes
