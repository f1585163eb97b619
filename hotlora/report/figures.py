"""The report's pictures: a heat map of routing, sorted loads, coverage, training loss. One function each."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import PolyCollection
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure as PlainFigure
from matplotlib.image import AxesImage
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from ..base.files import atomic_path
from ..routing.plan import ExpertPlan
from ..routing.profile import TOP, RoutingProfile

# Okabe and Ito's colours, which colour-blind readers tell apart; the kept experts are always HOT.
INK, MUTED, GRID = "#1f2328", "#6e7781", "#e4e7eb"
COLD, HOT = "#c9ced6", "#d55e00"
SERIES = {"all": "#0072b2", "hot": HOT, "random": "#009e73", "cold": "#56b4e9"}
OTHER_SERIES = ("#cc79a7", "#e69f00", "#000000", "#999999")
WIDTH = 10.0  # inches
# Of this page's pictures: their letters stay readable on a phone, where they are as wide as its screen.
PAGE_WIDTH = 6.4
DASHED = (0, (4, 3))
LEGEND: dict[str, Any] = {"frameon": False, "labelcolor": INK, "fontsize": 9.5}
# A loss's range, from the highest to the lowest, that one straight axis cannot show.
_WIDE = 10.0


class Figure(PlainFigure):
    """Shows itself in a notebook, which shows of a figure only its size where pyplot has not made it."""

    def _repr_png_(self) -> bytes:
        plain_text(self)
        image = io.BytesIO()
        self.savefig(image, format="png", dpi=100)
        return image.getvalue()


def heat_map(profile: RoutingProfile, plan: ExpertPlan | None = None) -> Figure:
    """Layers x experts: load as a multiple of the uniform share, with the plan's experts outlined."""
    load = loads(profile)
    num_layers, num_experts = load.shape
    is_coarse = num_experts <= 64
    row = float(np.clip(4.0 / num_layers, 0.1, 0.36))
    figure, axes = new_figure(max(row * num_layers + 1.1, 2.2), PAGE_WIDTH)
    image = show_loads(axes, load, load.max())
    # Light lines between cells, as far as cells are large enough to be told apart anyway.
    if is_coarse:
        axes.vlines(np.arange(1, num_experts) - 0.5, -0.5, num_layers - 0.5, colors="white", linewidth=0.8)
        axes.hlines(np.arange(1, num_layers) - 0.5, -0.5, num_experts - 0.5, colors="white", linewidth=0.8)
    if plan is not None:
        boxes = _boxes(_kept(profile, plan), inset=0.05 if is_coarse else 0.02)
        width = 1.3 if is_coarse else 0.7
        axes.add_collection(PolyCollection(boxes, facecolors="none", edgecolors=INK, linewidths=width))
    axes.tick_params(which="both", length=0)
    axes.set(xlabel="expert", ylabel="layer")
    tick_layers(axes.yaxis, profile.layers, 16)
    axes.xaxis.set_major_locator(MaxNLocator(min(num_experts, 16), integer=True))
    bar = load_bar(figure, image, axes, load.max(), fraction=0.03, pad=0.015, aspect=18)
    bar.set_label("times the uniform share")
    return figure


def sorted_load(profile: RoutingProfile, plan: ExpertPlan | None = None) -> Figure:
    """One small panel a layer: experts from the busiest to the idlest, the plan's in colour."""
    load = loads(profile)
    num_layers, num_experts = load.shape
    columns = min(num_layers, 3 if num_layers <= 6 else 4 if num_layers <= 16 else 6)
    rows = math.ceil(num_layers / columns)
    figure = Figure(figsize=(PAGE_WIDTH, (1.25 if rows <= 4 else 1.05) * rows + 0.6), layout="constrained")
    top = _top(load.max())
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    kept = np.zeros_like(load, dtype=bool) if plan is None else _kept(profile, plan)
    edges = np.arange(num_experts + 1) + 0.5
    for axes, row, row_kept, layer in zip(grid.flat, load, kept, profile.layers, strict=False):
        order = np.argsort(-row, kind="stable")
        style(axes)
        axes.grid(axis="x", visible=False)
        axes.stairs(row[order], edges, fill=True, color=COLD, linewidth=0)
        axes.stairs(np.where(row_kept[order], row[order], 0), edges, fill=True, color=HOT, linewidth=0)
        axes.axhline(1, color=INK, linewidth=0.8, linestyle=DASHED)
        axes.set_title(f"layer {layer}", fontsize=10, color=INK, pad=4)
        if row.max() > top:
            text = f"up to {row.max():.1f}×"
            axes.text(num_experts, top, text, fontsize=8.5, color=MUTED, ha="right", va="top")
        axes.set(xlim=(0.5, num_experts + 0.5), ylim=(0, top * 1.02))
        axes.yaxis.set_major_formatter("{x:g}×")
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.set_xticks([1, num_experts])
    for axes in grid.flat[num_layers:]:
        axes.set_visible(False)
    figure.supxlabel("experts, busiest first", fontsize=10.5, color=INK)
    figure.supylabel("times the uniform share", fontsize=10.5, color=INK)
    return figure


def coverage_curve(profile: RoutingProfile, experts_per_layer: int | None = None) -> Figure:
    """Share of a layer's assignments that its k busiest experts take: mean over layers, band min to max."""
    num_experts = profile.num_experts
    covered = 100 * coverages(profile)
    figure, axes = coverage_axes(3.4, num_experts, PAGE_WIDTH)
    mean = covered.mean(axis=0)
    steps = range(num_experts + 1)
    axes.fill_between(steps, covered.min(axis=0), covered.max(axis=0), color=HOT, alpha=0.16, linewidth=0)
    axes.plot(steps, mean, color=HOT, linewidth=2.2)
    axes.plot([0, num_experts], [0, 100], color=MUTED, linewidth=1.2, linestyle=DASHED)
    axes.text(num_experts * 0.72, 69, "uniform routing", color=MUTED, ha="left", va="top")
    if experts_per_layer is not None:
        value = mean[experts_per_layer]
        axes.plot([0, experts_per_layer, experts_per_layer], [value, value, 0], color=INK, linewidth=1)
        axes.plot([experts_per_layer], [value], "o", color=INK, markersize=6)
        label = f"{experts_per_layer} of {num_experts} experts take {value:.1f}% of the routing"
        axes.text(0.98, 0.05, label, transform=axes.transAxes, color=INK, fontsize=10, ha="right")
    return figure


@dataclass(frozen=True)
class Curve:
    """A run's losses by step, as trained on, and on held-out data where they were taken; or the means of several runs'.

    band: of several runs, the lowest and the highest training loss at each step.
    """

    label: str
    condition: str
    training: Mapping[int, float]
    held_out: Mapping[int, float] = field(default_factory=dict)
    band: Mapping[int, tuple[float, float]] = field(default_factory=dict)


def in_legend(label: str) -> str:
    """matplotlib leaves out of a legend what begins with an underscore."""
    return f" {label}" if label.startswith("_") else label


def loss_curves(curves: Sequence[Curve]) -> Figure:
    """Losses by step. Thin: logged; band: from the lowest run to the highest; thick: smoothed; dots: held-out.

    In powers of ten where the last ones would otherwise lie on one line.
    """
    figure, axes = new_figure(3.6, PAGE_WIDTH)
    style(axes)
    spare = iter(OTHER_SERIES * len(curves))
    taken: set[str] = set()
    for curve in curves:
        first = curve.condition in SERIES and curve.condition not in taken
        taken.add(curve.condition)
        color = SERIES[curve.condition] if first else next(spare)
        steps, values = list(curve.training), np.array(list(curve.training.values()), dtype=float)
        window = max(1, len(values) // 25)
        alone = "o" if len(values) == 1 else ""
        if curve.band:
            low, high = (
                _smooth(np.array(ends, dtype=float), window) for ends in zip(*curve.band.values(), strict=True)
            )
            axes.fill_between(list(curve.band), low, high, color=color, alpha=0.15, linewidth=0)
        else:
            axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3 if window > 1 else 0)
        axes.plot(steps, _smooth(values, window), color=color, linewidth=2, label=in_legend(curve.label), marker=alone)
        if curve.held_out:
            axes.plot(
                list(curve.held_out), list(curve.held_out.values()), "o--", color=color, markersize=4, linewidth=0.8
            )
    axes.set(xlabel="optimizer step", ylabel="loss, nats a token")
    every = [loss for curve in curves for losses in (curve.training, curve.held_out) for loss in losses.values()]
    if min(every) > 0 and max(every) > _WIDE * min(every):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=min(0, *every))
    last = max(step for curve in curves for step in (*curve.training, *curve.held_out))
    start = min(step for curve in curves for step in (*curve.training, *curve.held_out))
    axes.set_xlim(start - (start == last), last + (start == last))
    whole_numbers(axes.xaxis)
    axes.legend(**LEGEND)
    return figure


def new_figure(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    """A figure with one panel; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    for item in (axes.xaxis.label, axes.yaxis.label):
        item.set(fontsize=10.5, color=INK)
    axes.tick_params(colors=INK)
    return figure, axes


def coverage_axes(height: float, num_experts: int, width: float = WIDTH) -> tuple[Figure, Axes]:
    """A figure of the routing covered, in percent, over the experts kept in each layer."""
    figure, axes = new_figure(height, width)
    style(axes)
    axes.set(xlim=(0, num_experts), ylim=(0, 101))
    axes.set(xlabel="experts kept in each layer", ylabel="share of routing covered")
    axes.yaxis.set_major_formatter("{x:.0f}%")
    whole_numbers(axes.xaxis)
    return figure, axes


def save_figure(figure: Figure, file: Path, dpi: int) -> None:
    """Writes a PNG, whole or not at all, with the same bytes every time."""
    plain_text(figure)
    with atomic_path(file) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, metadata={"Software": None})


def plain_text(figure: Figure) -> None:
    """No text of the figure is read as mathematics: a name may hold $."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # type: ignore[attr-defined]


def style(axes: Axes, grid: Literal["x", "y"] = "y") -> None:
    """A panel's lines and ticks; grid: the axis whose values are read off."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(COLD)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9.5, colors=INK)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(INK)


def whole_numbers(axis: Axis) -> None:
    """Ticks at whole numbers that are easy to count on from."""
    axis.set_major_locator(MaxNLocator(9, integer=True, steps=[1, 2, 4, 5, 8, 10]))


def tick_layers(axis: Axis, layers: Sequence[int], most: int) -> None:
    """At most about so many ticks, named by the decoder's indices, where rows lie at 0, 1, …"""
    every = math.ceil(len(layers) / most)
    axis.set_ticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])


def loads(profile: RoutingProfile) -> np.ndarray:
    """float64 [L, E]: multiples of the uniform share; a layer without counts is 0."""
    return np.nan_to_num((profile.shares() * profile.num_experts).numpy())


def coverages(profile: RoutingProfile) -> np.ndarray:
    """float64 [L, E + 1]: share of the assignments that a layer's 0, 1, … busiest experts take."""
    covered = -np.sort(-profile.shares().numpy(), axis=1).cumsum(axis=1)
    return np.pad(covered, ((0, 0), (1, 0)))


def show_loads(axes: Axes, load: np.ndarray, highest: float) -> AxesImage:
    """Loads [L, E] as colours, which end at TOP; highest: of all that have the same colours."""
    axes.spines[:].set_visible(False)
    return axes.imshow(load, cmap="YlOrBr", vmin=0, vmax=_top(highest), aspect="auto", interpolation="nearest")


def load_bar(figure: Figure, image: AxesImage, axes: Any, highest: float, **place: Any) -> Colorbar:
    """The bar that explains the colours of `show_loads`."""
    bar = figure.colorbar(image, ax=axes, extend="max" if highest > _top(highest) else "neither", **place)
    bar.ax.yaxis.set_major_formatter("{x:g}×")
    bar.ax.yaxis.set_major_locator(MaxNLocator(4))
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(length=0)
    return bar


def _top(highest: float) -> float:
    return float(min(max(2.0, highest), TOP))


def _kept(profile: RoutingProfile, plan: ExpertPlan) -> np.ndarray:
    """Boolean [L, E]."""
    kept = np.zeros(tuple(profile.counts.shape), dtype=bool)
    for row, layer in enumerate(profile.layers):
        kept[row, list(plan.experts.get(layer, ()))] = True
    return kept


def _boxes(kept: np.ndarray, inset: float) -> list[list[tuple[float, float]]]:
    """One rectangle around each run of kept cells in a row, in imshow's coordinates."""
    steps = np.diff(np.pad(kept.astype(int), ((0, 0), (1, 1))), axis=1)
    starts, ends = np.argwhere(steps == 1), np.argwhere(steps == -1)
    boxes = []
    for (y, left), (_, right) in zip(starts.tolist(), ends.tolist(), strict=True):
        x0, x1, y0, y1 = left - 0.5 + inset, right - 0.5 - inset, y - 0.5 + inset, y + 0.5 - inset
        boxes.append([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    return boxes


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the last `window` values, fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)
