"""Pictures of a training recipe's scores: each seed, the mean and its interval."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..evaluate.stats import mean_interval
from ..report.figures import GRID, HOT, INK, MUTED, style
from .recipe import Column, Recipe

if TYPE_CHECKING:
    from .scores import Cell

WIDTH = 9.0


def dots(recipe: Recipe, cells: "Mapping[tuple[str, str], Cell]") -> Figure:
    """A panel a column, a line a row: seeds as small dots, the mean and its 95% interval; dashed: the reference."""
    rows = [row for row in recipe.rows if row.method]
    figure = Figure(figsize=(WIDTH, 1.1 + 0.34 * len(rows)), layout="constrained")
    columns = _columns(recipe, cells)
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=True):
        style(axes)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        for place, row in enumerate(rows):
            cell = cells.get((row.name, column.name))
            if cell is not None:
                _dot(axes, cell, place, HOT if row.name == recipe.reference else INK)
        reference = cells.get((recipe.reference or "", column.name))
        if reference is not None:
            axes.axvline(reference.summary.mean, color=HOT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        axes.set_title(column.data if column.model == "nano" else column.name, fontsize=10.5, color=INK)
        axes.set_xlabel("points", fontsize=9.5, color=INK)
    panels[0].set_yticks(range(len(rows)), [row.label for row in rows])
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    return figure


def curve(recipe: Recipe, cells: "Mapping[tuple[str, str], Cell]") -> Figure:
    """Score over the number of adapted experts, a panel a column: seeds, mean, 95% interval. Rules but hot are out."""
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    columns = _columns(recipe, cells)
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=True):
        style(axes)
        some = [cells[row.name, column.name] for row in recipe.rows if (row.name, column.name) in cells]
        curve_of = [cell for cell in some if cell.experts is not None and not cell.row.options.get("rule")]
        points = sorted(((cell.experts or 0.0, cell) for cell in curve_of), key=lambda point: point[0])
        for x, cell in points:
            axes.plot(
                [x] * len(cell.values), list(cell.values.values()), ".", color=MUTED, alpha=0.6, markersize=5, zorder=1
            )
            interval = mean_interval(list(cell.values.values())) if len(cell.values) > 1 else None
            if interval:
                axes.plot([x, x], [interval.low, interval.high], color=INK, linewidth=1.4, zorder=2)
        xs, means = [x for x, _ in points], [cell.summary.mean for _, cell in points]
        axes.plot(xs, means, "o-", color=HOT, markersize=5, linewidth=1.6, zorder=3)
        axes.set_title(column.data if column.model == "nano" else column.name, fontsize=10.5, color=INK)
        axes.set_xlabel("adapted experts of a layer", fontsize=9.5, color=INK)
    panels[0].set_ylabel("points", fontsize=9.5, color=INK)
    return figure


def _dot(axes: Axes, cell: "Cell", place: int, color: str) -> None:
    values = list(cell.values.values())
    axes.plot(values, [place + 0.22] * len(values), ".", color=MUTED, alpha=0.6, markersize=4.5, zorder=1)
    if len(values) > 1 and (interval := mean_interval(values)):
        axes.plot([interval.low, interval.high], [place, place], color=color, linewidth=1.4, zorder=2)
    axes.plot(cell.summary.mean, place, "o", color=color, markersize=5, zorder=3)


def _columns(recipe: Recipe, cells: "Mapping[tuple[str, str], Cell]") -> list[Column]:
    """Those that have a training."""
    return [
        column
        for column in recipe.columns
        if any((row.name, column.name) in cells for row in recipe.rows if row.method)
    ]
