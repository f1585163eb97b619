"""Pictures of routing that the papers have, besides those of `study_figures`."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ..report.figures import COLD, DASHED, HOT, INK, LEGEND, MUTED, OTHER_SERIES, SERIES, WIDTH, Figure, style
from ..report.published import MODELS, RATIOS
from ..report.study_figures import depths, style_depth
from ..routing.profile import RoutingProfile, experts_kept
from ..routing.study import FRACTION, Study

_COLORS = (SERIES["all"], HOT, SERIES["random"], *OTHER_SERIES)
_MARKS = ("o", "s", "D", "^", "v")


def two_loads(loads: Mapping[str, Sequence[float]]) -> Figure:
    """Share of the assignments by expert index: a panel each, on one scale."""
    figure = Figure(figsize=(WIDTH, 1.9 * len(loads) + 0.6), layout="constrained")
    panels = figure.subplots(len(loads), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (name, shares), color in zip(panels, loads.items(), (HOT, MUTED), strict=False):
        style(axes)
        axes.bar(range(len(shares)), 100 * np.asarray(shares), color=color, width=0.8)
        axes.axhline(100 / len(shares), color=INK, linewidth=0.8, linestyle=DASHED)
        axes.set_title(name, fontsize=10, color=INK, loc="left", pad=4)
        axes.set_xlim(-0.6, len(shares) - 0.4)
        axes.yaxis.set_major_formatter("{x:g}%")
    panels[-1].set_xlabel("expert")
    figure.supylabel("share of the assignments (dashed: uniform)", fontsize=10.5, color=INK)
    return figure


def activations(profiles: Mapping[str, RoutingProfile], picked: Sequence[int], hot: Mapping[str, Tensor]) -> Figure:
    """Layers down, tasks across: each expert's share of the layer's assignments, the hot ones in colour."""
    figure = Figure(figsize=(WIDTH, 1.25 * len(picked) + 0.9), layout="constrained")
    grid = figure.subplots(len(picked), len(profiles), sharex=True, sharey="row", squeeze=False)
    for column, (task, profile) in enumerate(profiles.items()):
        shares = 100 * np.nan_to_num(profile.shares().numpy())
        for line, row in enumerate(picked):
            axes = grid[line, column]
            style(axes)
            axes.grid(axis="x", visible=False)
            colors = [HOT if is_hot else COLD for is_hot in hot[task][row].tolist()]
            axes.bar(range(profile.num_experts), shares[row], color=colors, width=0.85)
            axes.axhline(100 / profile.num_experts, color=INK, linewidth=0.7, linestyle=DASHED)
            axes.set_xlim(-0.6, profile.num_experts - 0.4)
            axes.yaxis.set_major_formatter("{x:g}%")
            axes.yaxis.set_major_locator(MaxNLocator(3))
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            if line == 0:
                axes.set_title(task, fontsize=10.5, color=INK, pad=6)
            if column == 0:
                axes.set_ylabel(f"layer {profile.layers[row]}", color=INK, fontsize=9.5)
    figure.supxlabel("expert (orange: the layer's hot ones; dashed: uniform)", fontsize=10.5, color=INK)
    return figure


def ratios(studies: Mapping[str, Study]) -> Figure:
    """Layer CV over global CV, a dot a data set; and the layer CV by depth, mean over the data sets."""
    names = list(next(iter(studies.values()))["datasets"])[::-1]
    figure = Figure(figsize=(WIDTH, max(2.9, 0.3 * len(names) + 1.3)), layout="constrained")
    left, right = figure.subplots(1, 2)
    style(left, grid="x")
    left.axvspan(*RATIOS, color=COLD, alpha=0.35, linewidth=0)
    for (model, result), color, mark in zip(studies.items(), _COLORS, _MARKS, strict=False):
        rows = result["datasets"]
        there = [(rows[name]["ratio"], y) for y, name in enumerate(names) if name in rows]
        left.plot(*zip(*there, strict=True), mark, color=color, markersize=6, label=model)
        by_layer = np.array([row["by_layer"]["cv"] for row in rows.values()], dtype=float)
        depth, (low, high) = depths(by_layer.shape[1]), (np.nanmin(by_layer, axis=0), np.nanmax(by_layer, axis=0))
        right.fill_between(depth, low, high, color=color, alpha=0.15)
        mean = np.nanmean(by_layer, axis=0)
        right.plot(depth, mean, color=color, linewidth=1.8, marker="o", markersize=3, label=model)
    left.set_yticks(range(len(names)), names)
    left.set_xlim(left=0)
    left.set(ylim=(-0.6, len(names) - 0.4), xlabel="layer CV / global CV (grey: the paper's range)")
    style_depth(right, "layer (band: data sets)", "CV of a layer's counts")
    right.legend(**LEGEND, loc="lower right")
    return figure


def coverage(curves: Mapping[str, np.ndarray]) -> Figure:
    """Coverage of a token over the share of routed experts; a band from the lowest data set to the highest.

    curves: model -> [data sets, E + 1]. The papers' models at 25% are crosses.
    """
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    style(axes)
    for (model, values), color in zip(curves.items(), _COLORS, strict=False):
        experts = values.shape[1] - 1
        x, kept = np.linspace(0, 100, experts + 1), experts_kept(experts, FRACTION, None)
        mean = 100 * values.mean(axis=0)
        axes.fill_between(x, 100 * values.min(axis=0), 100 * values.max(axis=0), color=color, alpha=0.16, linewidth=0)
        axes.plot(x, mean, color=color, linewidth=2.2, label=f"{model}: {mean[kept]:.0f}% by {kept} of {experts}")
    for (model, row), mark in zip(MODELS.items(), ("x", "+", "1"), strict=True):
        value = 100 * row["coverage_with_shared"]
        label = f"{model}, published: {value:.0f}%"
        axes.plot(100 * FRACTION, value, mark, color=INK, markersize=9, markeredgewidth=1.8, label=label)
    axes.axvline(100 * FRACTION, color=INK, linewidth=0.8)
    axes.set(xlim=(0, 100), ylim=(0, 101), xlabel="routed experts kept in each layer")
    axes.set_ylabel("of a token's experts, shared ones included")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:.0f}%")
    axes.legend(**LEGEND, loc="lower right")
    return figure
