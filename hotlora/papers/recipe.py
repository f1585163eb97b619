"""What a table or figure of a paper is made from: its rows are ways to train, its columns models and tasks."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..base.errors import HotLoraError
from ..report.page import STORE
from ..runs.methods import resolve
from ..runs.options import RunOptions
from ..runs.sweep import Condition, Sweep
from .result import Heading


@dataclass(frozen=True)
class Column:
    """A model on a task.

    Attributes:
        name: the paper's for the task, or the paper's model and task.
        data: what is trained on, as `hotlora train` takes it.
        domain: whose hyperparameters HELLoRA has for it: math, code or safety.
        options: of every run in this column.
        scored: other data than `data` to score by a run of its own (a Condition's options); None: the data's own
            test split, after training.
        printed_of: the model that the paper's numbers are of.
    """

    name: str
    model: str
    data: str
    domain: str = "math"
    options: Mapping[str, Any] = field(default_factory=dict)
    scored: Mapping[str, Any] | None = None
    printed_of: str = ""

    @property
    def folder(self) -> str:
        """Of its runs in a store: MODEL/TASK."""
        task = self.data.partition(":")[0]
        return f"{model_folder(self.model)}/{_slug(task)}"


@dataclass(frozen=True)
class Row:
    """A way to train.

    Attributes:
        name: its runs' folder inside the column's.
        label: as the paper prints it.
        method: from `methods.METHODS`; None: the model as it is.
        options: beside the method's own.
        published: column name -> what the paper prints there, a score in points, or several (pass@1, 5, 10).
        printed: head -> what else the paper prints of the row, such as "trained, %" and "samples/s".
        only: names of the columns that have this row; empty: all.
    """

    name: str
    label: str
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    published: Mapping[str, float | tuple[float, ...] | None] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    printed: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe(Heading):
    """A table or figure that trainings make.

    Attributes:
        across: (row, other column) pairs that are scored besides: adapters of the row on another task's data.
        view: how the report lays it out: "scores" (rows by columns), "curve" (the same over a budget), "across", or
            "pairs", "spread" and "equivalence" (MoE-Sieve's tables 3, 6 and 8: the last row against the reference).
        reference: name of the row that others are compared with.
    """

    columns: Sequence[Column]
    rows: Sequence[Row]
    seeds: Sequence[int]
    options: Callable[[Row, Column], Mapping[str, Any]]
    """a run's method and hyperparameters"""
    scoring: Callable[[Row, Column], Mapping[str, Any]]
    """what the user says of a run that only scores: the model as it is, or a row's adapters on a column's data"""
    view: str = "scores"
    reference: str | None = None
    across: bool = False

    def places(self) -> Iterator[tuple[Row, Column]]:
        """The cells that the table has, column by column."""
        for column in self.columns:
            yield from ((row, column) for row in self.rows if not row.only or column.name in row.only)

    def reads(self) -> list[str]:
        """The data that its runs read, as `load_examples` takes it."""
        scored = [str(column.scored["data"]) for column in self.columns if column.scored is not None]
        return [*(column.data for column in self.columns), *scored]

    def resolved(self, row: Row, column: Column) -> RunOptions:
        """What a row is trained with in a column, its model and data aside."""
        return resolve(**{"model": "nano", "data": "", **self.options(row, column)})

    def sweep(self) -> Sweep:
        """Every run of the table, in its order."""
        conditions = [made for row, column in self.places() for made in self._conditions(row, column)]
        return Sweep(STORE, self.columns[0].model, self.columns[0].data, conditions, seeds=self.seeds)

    def _conditions(self, row: Row, column: Column) -> list[Condition]:
        name = condition_name(row, column)
        if row.method is None:
            return [Condition(name, self._scored(row, column), train=False)]
        at = {"model": column.model, "data": column.data, **column.options}
        found = [Condition(name, {**at, **self.options(row, column)})]
        if column.scored is not None:
            found.append(Condition(scored_name(row, column), self._scored(row, column), scores=name))
        others = [other for other in self.columns if self.across and other.name != column.name]
        for other in others:
            found.append(Condition(across_name(row, column, other), self._scored(row, other), scores=name))
        return found

    def _scored(self, row: Row, column: Column) -> dict[str, Any]:
        """The options of a run that only scores."""
        at = {"model": column.model, "data": column.data, **column.options}
        return {**at, **(column.scored or {}), **self.scoring(row, column)}


def condition_name(row: Row, column: Column) -> str:
    """The folder of a row's runs in a column."""
    return f"{column.folder}/{row.name}"


def scored_name(row: Row, column: Column) -> str:
    """The folder of their scores, where the column's data has none of its own."""
    once = column.scored is None or row.method is None
    return condition_name(row, column) + ("" if once else "-scored")


def across_name(row: Row, column: Column, other: Column) -> str:
    """The folder of their scores on another column's data."""
    return f"{condition_name(row, column)}-on-{other.folder.split('/')[1]}"


def model_folder(model: str) -> str:
    """The name of the folder of all that a store has of a model."""
    return _slug(model_name(model))


def model_name(model: str) -> str:
    """Without its owner or folder; a config.json is called by its folder."""
    path = Path(model)
    return path.absolute().parent.name if path.name == "config.json" else path.name


def _slug(text: str) -> str:
    found = re.sub(r"[^A-Za-z0-9_.+-]+", "-", text).strip("-.")
    if not found:
        raise HotLoraError(f"{text!r} cannot name a folder: give a model or data set with letters in its name.")
    return found
