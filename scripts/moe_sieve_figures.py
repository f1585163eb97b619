"""MoE-Sieve's figures 1 to 5 from its published counts and scores. Figure 6 needs counts of single examples."""

from collections.abc import Mapping

import numpy as np
from moe_sieve_cell import OLMOE
from moe_sieve_data import Data

from hotlora.evaluation.stats import mean_interval
from hotlora.papers.profile_figures import coverage, ratios
from hotlora.report.figures import COLD, HOT, INK, LEGEND, MUTED, Figure, coverages, new_figure, style
from hotlora.report.published import MODELS
from hotlora.report.study_figures import heat_maps, overlap_map
from hotlora.routing.profile import RoutingProfile
from hotlora.routing.study import experts_for, study


def figures(data: Data) -> dict[str, Figure]:
    """figure-1 … figure-5 -> picture; those that the data do not have are left out."""
    known = {model: of for model, of in data.profiles.items() if model in MODELS}
    made = {}
    if known:
        studies = {model: study(of, shared=MODELS[model]["shared"]) for model, of in known.items()}
        made["figure-1"] = ratios(studies)
        made["figure-2"] = coverage({model: _covered(model, of) for model, of in known.items()})
    if olmoe := known.get(OLMOE):
        made |= {"figure-3": overlap_map(studies[OLMOE]), "figure-5": heat_maps(olmoe)}
    runs = data.scores.get("olmoe", {}).get("gsm8k", {})
    if "full_lora" in runs:
        profile = known.get(OLMOE, {}).get("gsm8k")
        made["figure-4"] = sweep(runs, None if profile is None else experts_for(profile).mean().item())
    return made


def sweep(runs: Mapping[str, Mapping[int, float]], experts_for_60: float | None) -> Figure:
    """Score over the number of experts: seeds, mean, 95% interval."""
    figure, axes = new_figure(4.2)
    style(axes)
    every = mean_interval(list(runs["full_lora"].values()))
    axes.axhspan(every.low, every.high, color=COLD, alpha=0.4, linewidth=0, label="all 64: 95% of the mean")
    axes.axhline(float(np.mean(list(runs["full_lora"].values()))), color=INK, linewidth=0.9)
    hot = sorted((int(name[4:]), of) for name, of in runs.items() if name.startswith("hotk"))
    for k, of in hot:
        values = list(of.values())
        axes.plot([k] * len(values), values, ".", color=MUTED, alpha=0.6, markersize=5, zorder=1)
        axes.plot([k, k], mean_interval(values), color=INK, linewidth=1.4, zorder=2)
    means = [float(np.mean(list(of.values()))) for _, of in hot]
    axes.plot([k for k, _ in hot], means, "o-", color=HOT, markersize=5, linewidth=1.6, label="hot experts", zorder=3)
    others = [
        (int(name[5:]), of, "X", "random experts") for name, of in sorted(runs.items()) if name.startswith("randk")
    ]
    if "cov60" in runs and experts_for_60 is not None:
        others.append((experts_for_60, runs["cov60"], "s", "coverage 60%"))
    for x, of, mark, label in others:
        values = list(of.values())
        axes.plot([x, x], mean_interval(values), color=INK, linewidth=1.0, zorder=2)
        label = label if label not in axes.get_legend_handles_labels()[1] else "_"
        axes.plot(x, np.mean(values), mark, color=INK, markersize=6, label=label, zorder=4)
    axes.set(xlabel="adapted experts of a layer", ylabel="GSM8K accuracy, %", xlim=(2, 50))
    axes.set_xticks([k for k, _ in hot])
    axes.legend(**LEGEND, loc="lower right")
    return figure


def _covered(model: str, profiles: Mapping[str, RoutingProfile]) -> np.ndarray:
    """[data sets, E + 1]: (S + K c) / (S + K), c the coverage of the 0, 1, … busiest experts, mean over layers."""
    shared = MODELS[model]["shared"]
    rows = []
    for profile in profiles.values():
        top_k = profile.num_experts_per_tok
        rows.append((shared + top_k * np.nanmean(coverages(profile), axis=0)) / (shared + top_k))
    return np.stack(rows)
