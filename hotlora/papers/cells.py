"""The runs of a training recipe, a cell a row and column of its table. Reads records alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..base.records import Record, read_record
from ..evaluation.stats import MeanSd, PairedTest, mean_sd, paired_test
from ..hf.models import NANOS
from ..routing.plan import ExpertPlan
from .recipe import Column, Recipe, Row, scored_name

BOUNDS = (1.0, 2.0, 3.0)
"""of equivalence, in points"""


@dataclass(frozen=True)
class Cell:
    """A row's runs in a column.

    Attributes:
        values: seed -> score in points (of pass@k the first k's); a model as it is has the seed -1.
        several: k -> mean over seeds, where there are scores at several k.
        percent, seconds: trained parameters in percent of all, and of a run; means over the seeds.
        experts: adapted experts of a layer, mean over layers; None without a plan.
    """

    row: Row
    column: Column
    values: Mapping[int, float]
    several: Mapping[int, float]
    percent: float | None = None
    seconds: float | None = None
    experts: float | None = None

    @property
    def summary(self) -> MeanSd:
        """Over the seeds, in points."""
        return mean_sd(list(self.values.values()))


Cells = Mapping[tuple[str, str], Cell]
"""By the names of row and column."""


def read_cells(recipe: Recipe, folder: Path) -> dict[tuple[str, str], Cell]:
    """(row, column) -> what is there of its runs; a cell without a run that is done is left out."""
    cells = {}
    for row, column in recipe.places():
        cell = read_cell(row, column, folder / scored_name(row, column), folder / column.folder / row.name)
        if cell is not None:
            cells[row.name, column.name] = cell
    return cells


def read_cell(row: Row, column: Column, scored: Path, trained: Path | None = None) -> Cell | None:
    """A cell by the folders of its scores and its trainings; None where no score is there."""
    values: dict[int, float] = {}
    passes: dict[int, list[float]] = {}
    for seed, record in _records(scored).items():
        for evaluation in (record.get("evaluation") or {}).values():
            values[seed] = 100 * evaluation["accuracy"]
            for name, value in evaluation.items():
                if name.startswith("pass@"):
                    passes.setdefault(int(name[5:]), []).append(100 * value)
    if not values:
        return None
    several = {k: sum(some) / len(some) for k, some in sorted(passes.items())}
    if trained is None:
        return Cell(row, column, values, several)
    records = _records(trained).values()
    percent = _mean([record["parameters"]["percent"] for record in records if record.get("parameters")])
    seconds = _mean([record["training"]["seconds"] for record in records if record.get("training")])
    return Cell(row, column, values, several, percent, seconds, _experts(trained))


def against(cell: Cell | None, reference: Cell | None) -> PairedTest | None:
    """A cell minus another over the seeds that both have; None where they share none, or one is not there."""
    if cell is None or reference is None:
        return None
    seeds = sorted(cell.values.keys() & reference.values.keys())
    if not seeds:
        return None
    ours, theirs = ([side.values[seed] for seed in seeds] for side in (cell, reference))
    return paired_test(ours, theirs, bounds=BOUNDS)


def _records(folder: Path) -> dict[int, Record]:
    """Seed -> record that is done; -1 for a record in the folder itself."""
    seeds = {file.parent.name[4:]: file for file in folder.glob("seed*/run.json")}
    files = {-1: folder / "run.json"} | {int(seed): file for seed, file in seeds.items() if seed.isdigit()}
    found = {seed: read_record(file) for seed, file in sorted(files.items()) if file.is_file()}
    return {seed: record for seed, record in found.items() if record["status"] == "done"}


def _experts(folder: Path) -> float | None:
    """Experts that the first plan of the runs in `folder` keeps of a layer, mean over layers."""
    for file in sorted(folder.glob("seed*/plan.json")):
        experts = ExpertPlan.load(file).experts
        return sum(map(len, experts.values())) / len(experts)
    return None


def task_name(column: Column) -> str:
    """The paper's name of a column's task, and what stands for it."""
    return f"{column.name} ({column.data})" if column.model in NANOS else column.name


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
