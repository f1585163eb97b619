"""Pictures of a training recipe's scores: each seed, the mean and its interval."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from ..evaluation.stats import mean_interval
from ..hf.models import NANOS
from ..report.figures import DASHED, HOT, INK, MUTED, Figure, style
from .cells import Cell, Cells
from .recipe import Column, Recipe

WIDTH = 9.0


def dots(recipe: Recipe, cells: Cells) -> Figure:
    """A panel a column, a line a row: seeds as small dots, the mean and its 95% interval; dashed: the reference."""
    rows = [row for row in recipe.rows if row.method]
    figure, columns, panels = _panels(recipe, cells, 1.1 + 0.34 * len(rows), sharey=True)
    for axes, column in zip(panels, columns, strict=True):
        style(axes, grid="x")
        for place, row in enumerate(rows):
            if cell := cells.get((row.name, column.name)):
                _dot(axes, cell, place, HOT if row.name == recipe.reference else INK)
        if reference := cells.get((recipe.reference or "", column.name)):
            axes.axvline(reference.summary.mean, color=HOT, linewidth=0.9, linestyle=DASHED, zorder=0)
        axes.set_xlabel("points", fontsize=9.5, color=INK)
    panels[0].set_yticks(range(len(rows)), [row.label for row in rows])
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    return figure


def curve(recipe: Recipe, cells: Cells) -> Figure:
    """Score over the number of adapted experts, a panel a column: seeds, mean, 95% interval. Rules but hot are out."""
    figure, columns, panels = _panels(recipe, cells, 3.4)
    for axes, column in zip(panels, columns, strict=True):
        style(axes)
        some = [cells[row.name, column.name] for row in recipe.rows if (row.name, column.name) in cells]
        curve_of = [cell for cell in some if cell.experts is not None and not cell.row.options.get("rule")]
        points = sorted(((cell.experts or 0.0, cell) for cell in curve_of), key=lambda point: point[0])
        for x, cell in points:
            values = list(cell.values.values())
            axes.plot([x] * len(values), values, ".", color=MUTED, alpha=0.6, markersize=5, zorder=1)
            if len(values) > 1:
                axes.plot([x, x], mean_interval(values), color=INK, linewidth=1.4, zorder=2)
        xs, means = [x for x, _ in points], [cell.summary.mean for _, cell in points]
        axes.plot(xs, means, "o-", color=HOT, markersize=5, linewidth=1.6, zorder=3)
        axes.set_xlabel("adapted experts of a layer", fontsize=9.5, color=INK)
    panels[0].set_ylabel("points", fontsize=9.5, color=INK)
    return figure


def _panels(recipe: Recipe, cells: Cells, height: float, **share: Any) -> tuple[Figure, list[Column], Sequence[Axes]]:
    """A panel, with its title, for each column that has a training."""
    trained = [row.name for row in recipe.rows if row.method]
    columns = [column for column in recipe.columns if any((name, column.name) in cells for name in trained)]
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = figure.subplots(1, len(columns), squeeze=False, **share)[0]
    for axes, column in zip(panels, columns, strict=True):
        axes.set_title(column.data if column.model in NANOS else column.name, fontsize=10.5, color=INK)
    return figure, columns, panels


def _dot(axes: Axes, cell: Cell, place: int, color: str) -> None:
    values = list(cell.values.values())
    axes.plot(values, [place + 0.22] * len(values), ".", color=MUTED, alpha=0.6, markersize=4.5, zorder=1)
    if len(values) > 1:
        axes.plot(mean_interval(values), [place, place], color=color, linewidth=1.4, zorder=2)
    axes.plot(cell.summary.mean, place, "o", color=color, markersize=5, zorder=3)
