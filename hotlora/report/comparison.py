"""A sweep's run records -> each condition against a reference, paired by seed. Loads no model.

What differs, what is equivalent, and what the seeds cannot tell; `docs/statistics.md` explains each number.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..base.errors import DataError
from ..base.escape import one_line
from ..base.records import Record, find_records
from ..evaluation.stats import Interval, MeanSd, PairedTest, SdRatio, holm, mean_sd, paired_test, sd_ratio
from .comparison_table import html_tables
from .measured import LOSS, measured, measured_apart, told_way
from .sections import model_name, part

METRICS = ("score", "test_loss")
MARGINS = (1.0, 2.0, 3.0)
"""points of a score; a loss has no such convention"""
ALPHA = 0.05

# Sweep, model, and the task or, for a loss, the held-out data.
_Key = tuple[str, str, str]
# Of a condition, by seed; a model that is scored as it is has none: None.
_Runs = Mapping[int | None, Record]


@dataclass(frozen=True)
class Against:
    """A condition against the reference, over the seeds that both have.

    Attributes:
        seeds: the pairs.
        test: of condition minus reference, in points of a score or in the loss's unit.
        p_holm, tost_holm: `test.p` and `test.tost` corrected over the table's conditions; None without correction.
        sd_ratio: the condition's standard deviation over seeds by the reference's.
        verdict: what the p values say at 0.05, the corrected ones where there are any.
    """

    reference: str
    seeds: tuple[int, ...]
    test: PairedTest
    sd_ratio: SdRatio
    p_holm: float | None = None
    tost_holm: Mapping[float, float | None] | None = None
    verdict: str = ""

    @property
    def p(self) -> float | None:
        """Corrected, where there is a correction."""
        return self.test.p if self.tost_holm is None else self.p_holm

    @property
    def tost(self) -> Mapping[float, float | None]:
        """Bound -> p of equivalence, corrected as `p`."""
        return self.test.tost if self.tost_holm is None else self.tost_holm


@dataclass(frozen=True)
class Row:
    """One condition.

    Attributes:
        values: seed -> points of the score, or the loss. A model that is scored as it is has one, and no seed: None.
        trainable_percent, tokens_per_second: means over the seeds.
        against: None for the reference itself, and where it or a common seed is missing.
    """

    condition: str
    values: Mapping[int | None, float]
    summary: MeanSd
    trainable_percent: float | None
    tokens_per_second: float | None
    against: Against | None = None


@dataclass(frozen=True)
class Table:
    """One sweep on one task and model."""

    sweep: str
    model: str
    task: str
    measure: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    """missing seeds, conditions without a partner, scores that are not of the same examples"""


@dataclass(frozen=True)
class Comparison:
    """What `compare_runs` found, by its settings."""

    reference: str
    metric: str
    margins: tuple[float, ...]
    holm: bool
    tables: tuple[Table, ...]
    left_out: tuple[str, ...]
    """runs that failed or did not end, and records that are no sweep's, in words"""

    def __repr__(self) -> str:
        told = [f"{one_line(table.task)} ({len(table.rows)} conditions)" for table in self.tables]
        left_out = f"; {len(self.left_out)} runs left out" if self.left_out else ""
        return f"Comparison({self.metric} against {one_line(self.reference)}: {', '.join(told)}{left_out})"

    def _repr_html_(self) -> str:
        return html_tables(self)


def compare_runs(
    runs: str | os.PathLike[str] | Mapping[Path, Record],
    reference: str = "all",
    *,
    metric: str = "score",
    margins: Sequence[float] | None = None,
    holm: bool = False,
) -> Comparison:
    """Every condition of the sweeps in a folder against one of them, by task.

    Args:
        runs: a folder with runs in it and below, or what `find_records` returns.
        reference: a condition's name. For conditions inside a folder, such as gsm8k/hot, the one of that name beside
            them, gsm8k/all, comes first.
        metric: "score" (points, 100 times the accuracy) or "test_loss" (held-out response loss, nats a token). Where
            no run was scored on a task, the held-out loss is the score.
        margins: bounds of equivalence, in the metric's unit. None: 1, 2 and 3 points for a score, none for a loss.
        holm: correct p values over the conditions of a table.

    Raises:
        DataError: one run's own folder, no run of a sweep that is done and has the metric, no such reference, or a
            condition with one seed twice.
        FileError: no such folder; a broken record is left out, in words.
    """
    if metric not in METRICS:
        raise DataError(f"the metric {metric!r} does not exist: there are {' and '.join(METRICS)}.")
    if not isinstance(runs, Mapping) and (Path(runs) / "run.json").is_file():
        raise DataError(
            f"{runs} is one run's folder, with nothing to compare: give the folder that holds its sweep's runs, or a "
            "second run's folder, too."
        )
    broken: dict[Path, str] = {}
    records = runs if isinstance(runs, Mapping) else find_records(runs, broken)
    metric = _metric(metric, records.values())
    bounds = (MARGINS if metric == "score" else ()) if margins is None else tuple(sorted(set(margins)))
    groups: dict[_Key, dict[str, dict[int | None, Record]]] = {}
    folders: dict[tuple[_Key, str, int | None], Path] = {}
    left_out = [f"{folder}: {why}" for folder, why in broken.items()]
    lacking: dict[tuple[str, str, int], str] = {}
    for folder, record in records.items():
        sweep = record.get("sweep")
        if not sweep:
            if not any(parent in records for parent in folder.parents):  # else a run's warm-up, or another stage
                why = "still running" if record["status"] == "running" else "not of a sweep"
                left_out.append(f"{record['name']}, seed {record['seed']} ({folder}): left out, {why}")
            continue
        condition, seed = sweep["condition"], record["seed"]
        if record["status"] != "done":
            error = " ".join((record.get("error") or "no error kept").split())
            state = f"failed: {error}" if record["status"] == "failed" else "not ended"
            left_out.append(f"{condition}, seed {seed} ({folder}): {state}")
            lacking[sweep["name"], condition, seed] = state
            continue
        if not _tasks(record, metric):
            left_out.append(f"{condition}, seed {seed} ({folder}): done, without a {metric.replace('_', ' ')}")
        # A model as it is has no seed; its held-out loss may have been taken by a training of nothing.
        is_trained = part(record, "training") and part(record, "parameters").get("trainable") != 0
        place = seed if is_trained or sweep.get("scores") else None
        for task in _tasks(record, metric):
            key = (sweep["name"], model_name(record), task)
            if (twin := folders.setdefault((key, condition, place), folder)) != folder:
                raise DataError(
                    f"{twin} and {folder} are both {condition} of the sweep {sweep['name']} with the seed {seed}: "
                    "compare a folder that holds one of them."
                )
            groups.setdefault(key, {}).setdefault(condition, {})[place] = record
    if not groups:
        told = f" ({'; '.join(left_out[:3])})" if left_out else ""
        wanted = metric.replace("_", " ")
        raise DataError(f"no run of a sweep here is done and has a {wanted}{told}: `hotlora sweep` makes such runs.")
    names = {name for conditions in groups.values() for name in conditions}
    if not any(_reference_of(name, reference, names) for name in names):
        raise DataError(
            f"no condition is called {reference!r}: there are {', '.join(sorted(names))}; name the one that the others "
            "are compared with (--reference)."
        )
    order = sorted(groups, key=lambda key: (key[0], key[2], key[1]))  # by sweep, task and model
    tables = tuple(_table(key, groups[key], reference, metric, bounds, holm, lacking) for key in order)
    return Comparison(reference, metric, bounds, holm, tables, tuple(left_out))


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """Plain values for JSON: seeds and bounds as text, None where there is no number."""
    return plain(comparison)


def _table(
    key: _Key, conditions: Mapping[str, _Runs], reference: str, metric: str,
    bounds: Sequence[float], corrected: bool, lacking: Mapping[tuple[str, str, int], str],
) -> Table:  # fmt: skip
    sweep, model, task = key
    scored = task if metric == "score" else None
    values = {
        name: {seed: _value(record, task, metric) for seed, record in by_seed.items()}
        for name, by_seed in conditions.items()
    }
    notes = [*_missing_seeds(sweep, values, lacking), *_measured_otherwise(conditions, scored)]
    rows = []
    for name, by_seed in conditions.items():
        partner = _reference_of(name, reference, conditions)
        against = None
        if partner is None:
            notes.append(f"{name}: no done run of {reference} to compare it with.")
        elif partner != name:
            alike = {
                (seed, other)
                for seed, ours in by_seed.items()
                for other, theirs in conditions[partner].items()
                if not measured_apart(ours, theirs, scored)
            }
            against = _against(partner, values[name], values[partner], alike, bounds)
            if against is None:
                how = "" if len(alike) == len(by_seed) * len(conditions[partner]) else " that was measured alike"
                notes.append(f"{name}: no seed in common with {partner}{how}.")
            elif against.test.reason:
                notes.append(f"{name} against {partner}: {against.test.reason}.")
        percent = _mean(part(record, "parameters").get("percent") for record in by_seed.values())
        speed = _mean(part(record, "training").get("tokens_per_second") for record in by_seed.values())
        rows.append(Row(name, values[name], mean_sd(list(values[name].values())), percent, speed, against))
    if corrected:
        rows = _correct(rows, bounds)
    unit = " points" if metric == "score" else ""
    rows = [_changed(row, verdict=verdict(row.against, unit)) if row.against else row for row in rows]
    rows.sort(key=lambda row: _place(row, reference))
    return Table(sweep, model, task, _measure(conditions, task, metric), tuple(rows), tuple(notes))


def verdict(against: Against, unit: str) -> str:
    """What the p values say at 0.05: a small difference can be both certain and within a bound."""
    said = []
    if against.p is not None and against.p < ALPHA:
        said.append("differs")
    # A larger bound's p is never higher: the smallest that passes stands for those above it.
    if within := [bound for bound, p in sorted(against.tost.items()) if p is not None and p < ALPHA]:
        said.append(f"equivalent within {within[0]:g}{unit[:-1] if within[0] == 1 else unit}")
    return ", but ".join(said) or "cannot tell"


def _against(
    reference: str, ours: Mapping[int | None, float], theirs: Mapping[int | None, float],
    alike: Set[tuple[int | None, int | None]], bounds: Sequence[float],
) -> Against | None:  # fmt: skip
    """None without a common seed. A model as it is has the same value at every seed.

    alike: the seeds of runs, ours and theirs, that were measured in one way.
    """
    either = {seed for seed in {*ours, *theirs} if seed is not None}
    found: list[tuple[int | None, int | None]] = [
        (seed if seed in ours else None, seed if seed in theirs else None) for seed in sorted(either)
    ]
    pairs = [pair for pair in found or [(None, None)] if pair in alike]
    if not pairs:
        return None
    a, b = [ours[one] for one, _ in pairs], [theirs[other] for _, other in pairs]
    comparable = ({pair[i] for pair in alike} for i in (0, 1))
    spreads = (
        mean_sd([value for seed, value in side.items() if seed in those])
        for side, those in zip((ours, theirs), comparable, strict=True)
    )
    seeds = tuple(seed for pair in pairs if (seed := pair[0] if pair[0] is not None else pair[1]) is not None)
    return Against(reference, seeds, paired_test(a, b, bounds=bounds), sd_ratio(*spreads))


def _correct(rows: Sequence[Row], bounds: Sequence[float]) -> list[Row]:
    """Holm over the table's conditions: of the t tests, and of the TOSTs of each bound."""
    found = [(i, row.against) for i, row in enumerate(rows) if row.against]
    p_values = holm([against.test.p for _, against in found])
    by_bound = {bound: holm([against.test.tost[bound] for _, against in found]) for bound in bounds}
    corrected = list(rows)
    for place, (i, _) in enumerate(found):
        tost = {bound: by_bound[bound][place] for bound in bounds}
        corrected[i] = _changed(rows[i], p_holm=p_values[place], tost_holm=tost)
    return corrected


def _changed(row: Row, **changes: Any) -> Row:
    """With other values in `against`, which is there."""
    assert row.against is not None
    return dataclasses.replace(row, against=dataclasses.replace(row.against, **changes))


def _reference_of(condition: str, reference: str, names: Sequence[str] | Mapping[str, Any] | set[str]) -> str | None:
    beside = str(PurePosixPath(condition).parent / reference)
    return beside if beside in names else reference if reference in names else None


def _metric(metric: str, records: Iterable[Record]) -> str:
    done = [record for record in records if record.get("sweep") and record["status"] == "done"]
    if metric == "score" and not any(record.get("evaluation") for record in done):
        has_loss = any(part(record, "training").get("test_loss") is not None for record in done)
        return "test_loss" if has_loss else metric
    return metric


def _tasks(record: Record, metric: str) -> list[str]:
    if metric == "score":
        return list(part(record, "evaluation"))
    if part(record, "training").get("test_loss") is None:
        return []
    return [part(record, "config").get("test_data") or record["data"]["name"]]


def _value(record: Record, task: str, metric: str) -> float:
    if metric == "score":
        return 100 * float(record["evaluation"][task]["accuracy"])
    return float(record["training"]["test_loss"])


def _measure(conditions: Mapping[str, Mapping[int | None, Record]], task: str, metric: str) -> str:
    if metric == "test_loss":
        return "held-out loss"
    names = [record["evaluation"][task]["metric"] for runs in conditions.values() for record in runs.values()]
    return " and ".join(dict.fromkeys(name.replace("_", " ") for name in names)) + ", %"


def _missing_seeds(
    sweep: str, values: Mapping[str, Mapping[int | None, float]], lacking: Mapping[tuple[str, str, int], str]
) -> list[str]:
    seeds = {seed for by_seed in values.values() for seed in by_seed if seed is not None}
    return [
        f"{name}: seed {seed} is missing ({lacking.get((sweep, name, seed), 'no such run with this metric')})."
        for name, by_seed in values.items()
        if None not in by_seed
        for seed in sorted(seeds - {*by_seed})
    ]


def _measured_otherwise(conditions: Mapping[str, _Runs], task: str | None) -> list[str]:
    """Says so where runs were not measured on the same examples, in the same way."""
    kinds: list[tuple[Record, list[str]]] = []
    for name, runs in conditions.items():
        for record in runs.values():
            like = next((names for first, names in kinds if not measured_apart(first, record, task)), None)
            if like is None:
                kinds.append((record, [name]))
            else:
                like.append(name)
    if len(kinds) < 2:
        return []
    differs = dict.fromkeys(word for first, _ in kinds[1:] for word in measured_apart(kinds[0][0], first, task))
    told = "; ".join(", ".join(dict.fromkeys(names)) + _how(first, task) for first, names in kinds)
    return [
        "These were not measured on the same examples by the same measure, so they are not paired "
        f"({', '.join(differs)}): {told}."
    ]


def _how(record: Record, task: str | None) -> str:
    found = measured(record, task)
    if found["metric"] == LOSS:
        return ""
    way = told_way(record)
    return f" on {found['n']} examples by {found['metric']}" + (f" ({way})" if way else "")


def _place(row: Row, reference: str) -> tuple[str, int, str]:
    """In each folder of conditions first what was not trained, then the reference."""
    path = PurePosixPath(row.condition)
    return str(path.parent), 0 if None in row.values else 1 if path.name == reference else 2, row.condition


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def plain(value: Any) -> Any:
    """Dataclasses, tuples and keys of any kind as JSON has them."""
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, Interval):
        return list(value)
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {_name(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def _name(key: Any) -> str:
    return "none" if key is None else f"{key:g}" if isinstance(key, float) else str(key)
