"""The profiling study's pictures: heat maps, coverage, skew by layer, overlap of hot experts, robustness."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from scipy.cluster.hierarchy import dendrogram
from scipy.ndimage import median_filter
from torch import Tensor

from ..routing.profile import RoutingProfile
from ..routing.study import Study
from . import figures
from .figures import COLD, DASHED, HOT, INK, LEGEND, MUTED, OTHER_SERIES, SERIES, WIDTH, Figure, style
from .published import OLMOE_SPIDER


def heat_maps(profiles: Mapping[str, RoutingProfile]) -> Figure:
    """One small panel a data set, layers x experts: load in multiples of the uniform share (MoE-Sieve figure 5)."""
    tables = {name: figures.loads(profile) for name, profile in profiles.items()}
    num_layers, num_experts = next(iter(tables.values())).shape
    columns = 1 if len(tables) == 1 else 2
    rows = math.ceil(len(tables) / columns)
    height = float(np.clip(0.16 * num_layers, 0.9, 2.8))
    figure = Figure(figsize=(WIDTH, rows * (height + 0.32) + 0.8), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    highest = max(load.max() for load in tables.values())
    for axes, (name, load) in zip(grid.flat, tables.items(), strict=False):
        image = figures.show_loads(axes, load, highest)
        axes.set_title(name, fontsize=10, color=INK, pad=3, loc="left")
        axes.tick_params(length=0, labelsize=8.5, colors=INK)
        figures.tick_layers(axes.yaxis, next(iter(profiles.values())).layers, 6)
        axes.xaxis.set_major_locator(MaxNLocator(min(num_experts, 9), integer=True))
    for axes in grid.flat[len(tables) :]:
        axes.set_visible(False)
    for axes in grid.flat[max(0, len(tables) - columns) : len(tables)]:
        axes.tick_params(labelbottom=True)
    figure.supxlabel("expert", fontsize=10.5, color=INK)
    figure.supylabel("layer", fontsize=10.5, color=INK)
    bar = figures.load_bar(figure, image, grid, highest, fraction=0.02, pad=0.012, aspect=40)
    bar.set_label("times the uniform share", color=INK)
    return figure


def coverage_curves(profiles: Mapping[str, RoutingProfile], experts_per_layer: int) -> Figure:
    """Share of a layer's assignments that its k busiest experts take, mean over layers (MoE-Sieve figure 2)."""
    curves = {name: 100 * np.nanmean(figures.coverages(profile), axis=0) for name, profile in profiles.items()}
    num_experts = next(iter(profiles.values())).num_experts
    figure, axes = figures.coverage_axes(4.4, num_experts)
    names = sorted(curves, key=lambda name: -curves[name][experts_per_layer])
    for (name, color), line in zip(colors(names).items(), _dashes(names), strict=True):
        label = figures.in_legend(f"{name}  {curves[name][experts_per_layer]:.0f}%")
        axes.plot(range(num_experts + 1), curves[name], color=color, linewidth=1.8, linestyle=line, label=label)
    axes.plot([0, num_experts], [0, 100], color=MUTED, linewidth=1.2, linestyle=(0, (1, 2)), label="uniform routing")
    axes.axvline(experts_per_layer, color=INK, linewidth=0.8)
    axes.text(experts_per_layer + num_experts * 0.008, 2, f"{experts_per_layer} experts", color=INK, fontsize=9.5)
    axes.legend(**LEGEND, loc="lower right")
    return figure


def by_layer(result: Study) -> Figure:
    """CV and coverage of the hot quarter in every layer, a line a data set; OLMoE on Spider beside (table 7).

    Of many layers the median of each with its neighbours: the lines of ten data sets would hide each other.
    """
    rows = result["datasets"]
    names = sorted(rows, key=lambda name: -rows[name]["layer_cv"])
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    depth = depths(len(result["model"]["layers"]))
    near, (dot, width) = (1, ("o", 1.8)) if len(depth) <= 32 else (7, (None, 1.4))
    of = "" if near == 1 else f", median of {near} layers"
    for axes, metric, label, scale in (
        (left, "cv", "CV of a layer's counts", 1),
        (right, "coverage", "covered by the hot 25%, %", 100),
    ):
        published = np.array(OLMOE_SPIDER[metric]) * scale
        dots, label_of_paper = (0, (1, 1.6)), "OLMoE on spider (paper)"
        axes.plot(depths(16), published, color=INK, linewidth=1.4, linestyle=dots, label=label_of_paper)
        for (name, color), line in zip(colors(names).items(), _dashes(names), strict=True):
            values = np.array(rows[name]["by_layer"][metric], dtype=float) * scale
            values = median_filter(values, near, mode="nearest")
            own = {"color": color, "linestyle": line, "label": figures.in_legend(name)}
            axes.plot(depth, values, linewidth=width, marker=dot, markersize=3, **own)
        style_depth(axes, "layer", f"{label}{of}")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", **LEGEND)
    return figure


def overlap_map(result: Study) -> Figure:
    """Jaccard of every two data sets' hot experts, ordered by their clustering, which is drawn beside (figure 3)."""
    overlaps = result["overlap"]
    names, order, tree = overlaps["names"], overlaps["order"], overlaps["linkage"]
    jaccard = np.array(overlaps["jaccard"])[np.ix_(order, order)]
    count = len(names)
    side = float(np.clip(0.5 * count, 2.0, 9.0))
    figure = Figure(figsize=(side + 4.2, side + 0.9), layout="constrained")
    branches, axes = figure.subplots(1, 2, width_ratios=[1.5, side])
    if tree:
        plain = {"no_labels": True, "link_color_func": lambda _: MUTED}
        drawn = dendrogram(np.array(tree), orientation="left", ax=branches, **plain)
        assert drawn["leaves"] == order, "the tree and the map must have one order"
    branches.set_ylim(10 * count, 0)  # leaves lie at 5, 15, …; the first one on top
    branches.spines[:].set_visible(False)
    branches.tick_params(length=0, labelsize=8.5, colors=MUTED)
    branches.set_xlabel("1 − Jaccard", fontsize=9, color=MUTED)
    others = jaccard[~np.eye(count, dtype=bool)]
    low = math.floor(others.min() * 10) / 10
    shades = matplotlib.colormaps["YlOrBr"].with_extremes(bad=COLD)
    shown = np.ma.array(jaccard, mask=np.eye(count, dtype=bool))  # a set is always itself: no colour for that
    axes.imshow(shown, cmap=shades, vmin=low, vmax=max(others.max(), low + 0.1), aspect="auto")
    labels = [names[i] for i in order]
    axes.set_xticks(range(count), labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(count), labels)
    axes.yaxis.tick_right()
    axes.tick_params(length=0, labelsize=9.5, colors=INK)
    axes.spines[:].set_visible(False)
    size = 8.5 if count <= 12 else 6
    for i, j in np.ndindex(jaccard.shape) if count <= 24 else ():
        color = "white" if i != j and jaccard[i, j] > 0.4 * low + 0.6 * others.max() else INK
        axes.text(j, i, f"{jaccard[i, j]:.2f}", ha="center", va="center", fontsize=size, color=color)
    return figure


def robustness(result: Study) -> Figure:
    """Jaccard of the hot set with that of some examples, and with that by mass: a dot a data set (figure 6)."""
    rows = result["datasets"]
    names = list(rows)[::-1]
    stable = [name for name in names if "stability" in rows[name]]
    figure = Figure(figsize=(WIDTH, 0.3 * len(names) + 1.2), layout="constrained")
    panels: list[Axes] = list(figure.subplots(1, 2 if stable else 1, sharey=True, squeeze=False).flat)
    for axes in panels:
        style(axes, grid="x")
        axes.set(xlim=(0, 1.02), ylim=(-0.6, len(names) - 0.4))
        axes.set_yticks(range(len(names)), names)
    for name in stable:
        row, y = rows[name]["stability"], names.index(name)
        panels[0].plot([row["min"], row["max"]], [y, y], color=COLD, linewidth=4, solid_capstyle="round")
        panels[0].plot(row["mean"], y, "o", color=HOT, markersize=6)
    if stable:
        found = [rows[name]["stability"] for name in stable]
        share = sum(row["subsample"] / row["examples"] for row in found) / len(found)
        panels[0].set_xlabel(f"Jaccard, {share:.0%} of the examples against all (bar: {found[0]['draws']} draws)")
    right = panels[-1]
    for y, name in enumerate(names):
        row = {key: np.asarray(value, float) for key, value in rows[name]["signals"].items() if key != "by_layer"}
        right.plot(row["jaccard"], y, "o", color=HOT, markersize=6, label="Jaccard of the hot sets" if y == 0 else None)
        label = "Spearman of the scores" if y == 0 else None
        right.plot(row["spearman"], y, "o", color=INK, markersize=6, fillstyle="none", label=label)
    right.set_xlabel("count against mass")
    right.legend(**LEGEND, loc="lower left")
    return figure


def layer_overlap(overlaps: Mapping[str, Tensor | Sequence[float]], layers: Sequence[int]) -> Figure:
    """Jaccard of two hot sets in every layer, a panel a pair: `study.overlap`'s numbers (HELLoRA figure 3)."""
    figure = Figure(figsize=(WIDTH, 1.5 * len(overlaps) + 0.7), layout="constrained")
    panels: list[Axes] = list(figure.subplots(len(overlaps), 1, sharex=True, squeeze=False).flat)
    for axes, (name, values) in zip(panels, overlaps.items(), strict=True):
        style(axes)
        shown = np.asarray(values, dtype=float)
        axes.bar(range(len(layers)), shown, color=HOT, width=0.7)
        axes.axhline(shown.mean(), color=INK, linewidth=0.8, linestyle=DASHED)
        axes.set_title(f"{name}: mean {shown.mean():.2f}", fontsize=10, color=INK, loc="left", pad=4)
        axes.set(ylim=(0, 1), yticks=[0, 0.5, 1], xlim=(-0.6, len(layers) - 0.4))
    figures.tick_layers(panels[-1].xaxis, layers, 24)
    panels[-1].set_xlabel("layer")
    figure.supylabel("Jaccard of the hot experts", fontsize=10.5, color=INK)
    return figure


def depths(num_layers: int) -> np.ndarray:
    """Where the layers lie between the first, 0, and the last, 1; a single one in the middle."""
    return np.linspace(0, 1, num_layers) if num_layers > 1 else np.array([0.5])


def style_depth(axes: Axes, across: str, up: str) -> None:
    """A panel of a number, from 0, over `depths`."""
    style(axes)
    axes.set_ylim(bottom=0)
    axes.set_xticks([0, 1], ["first", "last"])
    axes.set(xlabel=across, ylabel=up)


def colors(names: Sequence[str]) -> dict[str, Any]:
    """A colour for each data set: distinct ones while there are few, else a scale in the order of `names`."""
    distinct = [*SERIES.values(), *OTHER_SERIES[:3]]
    if len(names) <= len(distinct):
        return dict(zip(names, distinct, strict=False))
    scale = matplotlib.colormaps["plasma"](np.linspace(0.0, 0.88, len(names)))
    return {name: tuple(color) for name, color in zip(names, scale, strict=True)}


def _dashes(names: Sequence[str]) -> list[Any]:
    """Solid and dashed in turn: neighbours on a colour scale look alike."""
    return ["-" if i % 2 == 0 else (0, (4, 1.5)) for i in range(len(names))]
