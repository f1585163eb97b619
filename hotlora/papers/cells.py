"""The runs of a training recipe, a cell a row and column of its table. Reads records alone."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from ..base.errors import FileError, HotLoraError
from ..base.records import Record, read_record
from ..evaluation.stats import MeanSd, PairedTest, mean_sd, paired_test
from ..hf.models import NANOS
from ..routing.plan import ExpertPlan
from .alike import Options, differences, made_with, planned, seed_differences
from .recipe import Column, Recipe, Row, condition_name, scored_name

BOUNDS = (1.0, 2.0, 3.0)
"""of equivalence, in points"""


@dataclass(frozen=True)
class Cell:
    """A row's runs in a column.

    Attributes:
        values: seed -> score in points (of pass@k the first k's); a model as it is has the seed -1.
        several: k -> mean over seeds, where there are scores at several k.
        runs: seed -> what its run was made with (`alike.made_with`); of one that is scored apart, with what scores it.
        plan: what the recipe's row is made with (`alike.planned`); empty for a model as it is.
        percent, seconds: trained parameters in percent of all, and of a run; means over the seeds.
        whole_time: whether `seconds` has the dense runs of LoRI's sparse ones.
        experts: adapted experts of a layer, mean over layers; None without a plan.
    """

    row: Row
    column: Column
    values: Mapping[int, float]
    several: Mapping[int, float]
    percent: float | None = None
    seconds: float | None = None
    experts: float | None = None
    runs: Mapping[int, Options] = field(default_factory=dict)
    plan: Options = field(default_factory=dict)
    whole_time: bool = True

    @cached_property
    def mixed(self) -> list[str]:
        """In what its seeds differ that they should have alike."""
        return seed_differences(self.runs.values())

    @property
    def summary(self) -> MeanSd:
        """Over the seeds, in points."""
        return mean_sd(list(self.values.values()))


Cells = Mapping[tuple[str, str], Cell]
"""By the names of row and column."""


def read_cells(
    recipe: Recipe, folder: Path, skipped: dict[Path, str] | None = None
) -> dict[tuple[str, str], Cell]:  # fmt: skip
    """(row, column) -> what is there of its runs; a cell without a run that is done is left out.

    skipped: gets each record that is broken or foreign, and what is wrong with it, as of `find_records`.
    """
    skipped = {} if skipped is None else skipped
    cells = {}
    for row, column in recipe.places():
        cell = read_cell(row, column, folder / scored_name(row, column), folder / condition_name(row, column), skipped)
        if cell is not None:
            plan = planned(recipe.resolved(row, column)) if row.method else {}
            cells[row.name, column.name] = replace(cell, plan=plan)
    return cells


def read_cell(
    row: Row, column: Column, scored: Path, trained: Path | None, skipped: dict[Path, str]
) -> Cell | None:  # fmt: skip
    """A cell by the folders of its scores and its trainings; None where no score is there."""
    values: dict[int, float] = {}
    passes: dict[int, list[float]] = {}
    runs = {}
    for seed, record in _records(scored, skipped).items():
        for evaluation in (record.get("evaluation") or {}).values():
            values[seed] = 100 * evaluation["accuracy"]
            runs[seed] = made_with(record)
            for name, value in evaluation.items():
                if name.startswith("pass@"):
                    passes.setdefault(int(name[5:]), []).append(100 * value)
    if not values:
        return None
    several = {k: sum(some) / len(some) for k, some in sorted(passes.items())}
    if trained is None:
        return Cell(row, column, values, several, runs=runs)
    trainings = _records(trained, skipped)
    for seed in runs.keys() & trainings.keys():  # what scores a model that is trained in full names a folder of its own
        run = runs[seed]
        runs[seed] = {**run, **made_with(trainings[seed]), **{n: run[n] for n in ("test_hash",) if n in run}}
    records = trainings.values()
    percent = _mean([record["parameters"]["percent"] for record in records if record.get("parameters")])
    timed = [record for record in records if record.get("training")]
    seconds, whole = _mean([training_seconds(record) for record in timed]), not any(map(lacks_dense, timed))
    return Cell(row, column, values, several, percent, seconds, _experts(trained, skipped), runs, whole_time=whole)


def training_seconds(record: Record) -> float:
    """Of a training; of LoRI's sparse run with the dense one before it, where the record has that."""
    return float(record["training"]["seconds"] + record["training"].get("dense_seconds", 0))


def lacks_dense(record: Record) -> bool:
    """Whether a record is of a sparse run and too old to have its dense run's time."""
    return bool((record.get("config") or {}).get("mask_hash")) and "dense_seconds" not in record["training"]


def unlike(cell: Cell, reference: Cell) -> str:
    """Why two rows are not compared: in what their runs, or the seeds of one, differ; empty where they are alike."""
    if mixed := cell.mixed or reference.mixed:
        return f"seeds differ in {', '.join(mixed)}"
    one, other = (next(iter(side.runs.values()), {}) for side in (cell, reference))
    found = differences(one, other, cell.plan, reference.plan)
    return f"runs differ in {', '.join(found)}" if found else ""


def against(cell: Cell | None, reference: Cell | None) -> PairedTest | None:
    """A cell minus another over the seeds that both have; None where they share none, or one is not there, or they
    were made with other options than their rows'."""
    if cell is None or reference is None or unlike(cell, reference):
        return None
    seeds = sorted(cell.values.keys() & reference.values.keys())
    if not seeds:
        return None
    ours, theirs = ([side.values[seed] for seed in seeds] for side in (cell, reference))
    return paired_test(ours, theirs, bounds=BOUNDS)


def seeds_begun(folders: Iterable[Path]) -> set[int]:
    """Seeds that a cell has a folder of, whatever became of the run."""
    names = [at.name[4:] for folder in folders for at in folder.glob("seed*") if at.is_dir()]
    return {int(name) for name in names if name.isdigit()}


def _records(folder: Path, skipped: dict[Path, str]) -> dict[int, Record]:
    """Seed -> record that is done; -1 for a record in the folder itself."""
    seeds = {file.parent.name[4:]: file for file in folder.glob("seed*/run.json")}
    files = {-1: folder / "run.json"} | {int(seed): file for seed, file in seeds.items() if seed.isdigit()}
    found = {}
    for seed, file in sorted(files.items()):
        try:
            if file.is_file() and (record := read_record(file))["status"] == "done":
                found[seed] = record
        except FileError as error:
            skipped[file] = str(error)
    return found


def _experts(folder: Path, skipped: dict[Path, str]) -> float | None:
    """Experts that the first whole plan of the runs in `folder` keeps of a layer, mean over layers."""
    for file in sorted(folder.glob("seed*/plan.json")):
        try:
            experts = ExpertPlan.load(file).experts
        except HotLoraError as error:
            skipped[file] = str(error)
            continue
        return sum(map(len, experts.values())) / len(experts)
    return None


def task_name(column: Column) -> str:
    """The paper's name of a column's task, and what stands for it."""
    return f"{column.name} ({column.data})" if column.model in NANOS else column.name


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
