"""Routing profiles -> the papers' tables and figures of routing, ours beside the published numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..report import published, study_figures
from ..report.figures import coverages
from ..report.published import MODELS, OLMOE_SPIDER
from ..report.study_claims import PAPERS
from ..report.text import NONE, shown
from ..routing.plan import select_experts
from ..routing.profile import RoutingProfile, experts_kept, hot_mask
from ..routing.study import FRACTION, Study, overlap
from . import profile_figures as figures
from .result import Number, Shown

_HERE, _PAPER = "here", "paper"


@dataclass(frozen=True)
class WarmUp:
    """HELLoRA's warm-up: the base, and the model that it trained, on a tenth of the data."""

    slice: RoutingProfile
    warmed_up: RoutingProfile
    learning_rate: float


@dataclass(frozen=True)
class Profiled:
    """A model's routing on data sets: their study, and the profiles by task."""

    model: str
    study: Study
    profiles: Mapping[str, RoutingProfile]
    warm_up: WarmUp | None = None

    @property
    def first(self) -> tuple[str, RoutingProfile]:
        """The first task, and its profile."""
        return next(iter(self.profiles.items()))


def layer_and_global(found: Sequence[Profiled]) -> Shown:
    """HELLoRA's figure 1: the layer in the middle (7 of 16), and the sums over all layers by expert index."""
    task, profile = found[0].first
    row, kept = (len(profile.layers) - 1) // 2, profile.num_experts_per_tok
    sums = profile.counts.sum(dim=0)
    layer = f"layer {profile.layers[row]}"
    loads = {layer: profile.shares()[row].tolist(), "all layers": (sums / sums.sum()).tolist()}
    table = Shown(["", f"its {kept} hottest take", "published (layer 7 of 16, 8 of 64)", "uniform", "CV"])
    for name, shares in loads.items():
        top = sum(sorted(shares, reverse=True)[:kept])
        cv = float(np.std(shares) / np.mean(shares))
        printed = "more than 50%" if name == layer else NONE
        cells = [name, f"{top:.1%}", printed, f"{kept / profile.num_experts:.1%}", f"{cv:.2f}"]
        table.add(cells, model=found[0].model, data=task, layers=name, hot_share=top, cv=cv)
    table.notes = [f"{found[0].model} on {task}, {profile.num_tokens:,} tokens."]
    table.figures = {"": figures.two_loads(loads)}
    return table


def warm_up(found: Sequence[Profiled]) -> Shown:
    """HELLoRA's figure 3: Jaccard of the K hot experts, with those of the base on all data, layer by layer."""
    task, real = found[0].first
    kept, made = real.num_experts_per_tok, found[0].warm_up
    sides = {"warmed up, on a tenth": made.warmed_up, "base, on a tenth": made.slice} if made else {}
    overlaps = {name: overlap(real, side, experts_per_layer=kept).tolist() for name, side in sides.items()}
    table = Shown(["", "same in", "mean Jaccard", "lowest"])
    for name, values in overlaps.items():
        same, mean = sum(value == 1 for value in values), sum(values) / len(values)
        table.rows.append([name, f"{same} of {len(values)}", f"{mean:.3f}", f"{min(values):.2f}"])
        table.numbers += [
            {"model": found[0].model, "data": task, "profile": name, "layer": layer, "jaccard": value}
            for layer, value in zip(real.layers, values, strict=True)
        ]
    k, layers, same = (published.HELLORA_OVERLAP[name] for name in ("experts_per_layer", "layers", "same"))
    mean = (same + (layers - same) * (k - 1) / (k + 1)) / layers
    table.rows.append(["published, warmed up", f"{same} of {layers}", f"{mean:.3f}", f"{(k - 1) / (k + 1):.2f}"])
    table.notes = [
        f"{found[0].model} on {task}: the {kept} hot experts of each layer against those of the base on all "
        f"{real.source['examples']:,} examples. The published mean follows from its words: {k - 1} of {k} the "
        f"same in the other {layers - same} layers.",
        "The warm-up is an epoch of LoRA on all experts, attention and routers, at table 2's learning rate of "
        f"{made.learning_rate:g}: the routers are trained, too."
        if made
        else "No warm-up is made.",
    ]
    if made:
        table.figures = {"": study_figures.layer_overlap(overlaps, real.layers)}
    return table


def five_layers(found: Sequence[Profiled]) -> Shown:
    """HELLoRA's figures 4 and 6: the loads of five layers on each task, the K hot experts in colour."""
    profiles, (_, first) = found[0].profiles, found[0].first
    picked = sorted({int(i) for i in np.ceil(np.linspace(0, len(first.layers) - 1, 5))})
    kept, tasks = first.num_experts_per_tok, list(profiles)
    hot = {task: hot_mask(profile.counts, kept) for task, profile in profiles.items()}
    pairs = [(profiles[a], profiles[b]) for i, a in enumerate(tasks) for b in tasks[:i]]
    between = [overlap(a, b, experts_per_layer=kept) for a, b in pairs]
    table = Shown(["", *(f"hot {kept} on {task}" for task in tasks), "overlap"])
    for row in picked:
        layer = first.layers[row]
        taken = {task: profile.shares()[row][hot[task][row]].sum().item() for task, profile in profiles.items()}
        mean = sum(values[row].item() for values in between) / len(between) if between else None
        cells = [f"layer {layer}", *(f"{value:.1%}" for value in taken.values()), shown(mean, ".2f")]
        table.add(cells, model=found[0].model, layer=layer, **taken, jaccard=mean)
    table.notes = [
        f"Share of a layer's assignments that its {kept} hot experts take (uniform: {kept / first.num_experts:.1%}), "
        "and the mean Jaccard of two tasks' hot experts.",
        "The paper's text names layers 0, 4, 8, 12 and 15 of OLMoE (its caption 0, 2, 4, 8 and 15), and 0, 8, 16, 24 "
        "and 32 of Mixtral, whose last is 31.",
    ]
    table.figures = {"": figures.activations(profiles, picked, hot)}
    return table


def skew(found: Sequence[Profiled]) -> Shown:
    """MoE-Sieve's table 2: means over the data sets."""
    formats = {"global_cv": ".3f", "layer_cv": ".3f", "ratio": ".1f", "cold_share": ".1%", "coverage": ".1%"}
    lines = [(some.model, _HERE, some.study["mean"]) for some in found]
    lines += [(model, _PAPER, row) for model, row in MODELS.items()]
    table = Shown(["", "global CV", "layer CV", "ratio", "cold", "covered by 25%"], notes=[_data_words(found)])
    for model, side, row in lines:
        cells = [f"{model} ({side})", *(format(row[key], form) for key, form in formats.items())]
        table.add(cells, **{"model": model, "from": side, **{key: row[key] for key in formats}})
    return table


def by_layer(found: Sequence[Profiled]) -> Shown:
    """MoE-Sieve's table 7."""
    ((task, row),) = found[0].study["datasets"].items()
    metrics = {"cv": ("CV", ".2f"), "cold_share": ("cold", ".0%"), "coverage": ("covered by 25%", ".0%"),
               "entropy": ("entropy", ".3f")}  # fmt: skip
    layers = found[0].study["model"]["layers"]
    table = Shown(["layer", *(name for label, _ in metrics.values() for name in (label, _PAPER))])
    for i in range(max(len(layers), len(OLMOE_SPIDER["cv"]))):
        cells: list[str] = []
        numbers: dict[str, Number] = {}
        for metric, (_, form) in metrics.items():
            ours, theirs = _at(row["by_layer"][metric], i), _at(OLMOE_SPIDER[metric], i)
            cells += [shown(ours, form), shown(theirs, form)]
            numbers |= {metric: ours, f"{metric}_{_PAPER}": theirs}
        table.add([str(_at(layers, i) if i < len(layers) else i), *cells], layer=i, **numbers)
    note = f"{found[0].model} on {task}, {row['tokens']:,} tokens; the paper's is OLMoE on Spider, with 16 layers."
    table.notes, table.figures = [note], {"": study_figures.by_layer(found[0].study)}
    return table


def greedy(found: Sequence[Profiled]) -> Shown:
    """MoE-Sieve's table 9: 25% of each layer, and as many in all where they cover most."""
    task, profile = found[0].first
    shares = profile.shares()
    ours: dict[str, Sequence[float]] = {}
    for rule, name in (("hot", "uniform"), ("greedy", "greedy")):
        experts = select_experts(profile, rule=rule, fraction=FRACTION).experts
        kept = [list(experts[layer]) for layer in profile.layers]
        ours[f"{name}_experts"] = [len(ids) for ids in kept]
        ours[f"{name}_coverage"] = [100 * shares[i, ids].sum().item() for i, ids in enumerate(kept)]
    theirs: dict[str, Sequence[float]] = {
        "uniform_experts": [16] * 16, "uniform_coverage": published.UNIFORM_COVERAGE,
        "greedy_experts": published.GREEDY_EXPERTS, "greedy_coverage": published.GREEDY_COVERAGE,
    }  # fmt: skip
    head = ["uniform", "covers, %", "greedy", "covers, %"]
    table = Shown(["layer", *head, *(f"{_PAPER}: {name}" for name in head)])
    formats = {name: ".1f" if name.endswith("coverage") else "g" for name in ours}
    for i in range(max(len(profile.layers), 16)):
        cells = [shown(_at(side[name], i), form) for side in (ours, theirs) for name, form in formats.items()]
        numbers: dict[str, Number] = {}
        for name in formats:
            numbers |= {name: _at(ours[name], i), f"{name}_{_PAPER}": _at(theirs[name], i)}
        table.add([str(profile.layers[i] if i < len(profile.layers) else i), *cells], layer=i, **numbers)
    means = [format(float(np.mean(side[name])), form) for side in (ours, theirs) for name, form in formats.items()]
    table.rows.append(["mean", *means])
    told = f"{found[0].model} on {task}; the paper's is OLMoE on GSM8K. Both spend as many experts in all."
    table.notes = [told]
    return table


def ratios(found: Sequence[Profiled]) -> Shown:
    """MoE-Sieve's figure 1: every model on every data set, and the skew by depth."""
    formats = {"global_cv": ".3f", "layer_cv": ".3f", "ratio": ".1f"}
    table = Shown(["model", "data set", "global CV", "layer CV", "ratio"], texts=2)
    for some in found:
        for task, row in some.study["datasets"].items():
            cells = [some.model, task, *(format(row[key], form) for key, form in formats.items())]
            table.add(cells, model=some.model, data=task, **{key: row[key] for key in formats})
    means = ", ".join(f"{row['ratio']} ({model})" for model, row in MODELS.items())
    low, high = published.RATIOS
    told = f"Published: ratios from {low} (OLMoE, Wikitext) to {high} (Qwen, GSM8K) over 30 pairs; means {means}."
    table.notes = [told]
    table.figures = {"": figures.ratios({some.model: some.study for some in found})}
    return table


def coverage(found: Sequence[Profiled]) -> Shown:
    """MoE-Sieve's figure 2: share of a token's experts that are adapted or shared, by the routed experts' budget."""
    columns = ["", "shared + routed experts a token", "covered by 25%", "over data sets"]
    table = Shown(columns, notes=[_data_words(found)])
    curves = {}
    for some in found:
        shared, top_k = some.study["model"]["shared"], some.study["model"]["num_experts_per_tok"]
        curves[some.model] = np.stack([_covered(profile, shared) for profile in some.profiles.values()])
        kept = experts_kept(curves[some.model].shape[1] - 1, FRACTION, None)
        at = curves[some.model][:, kept]
        cells = [f"{shared:g} + {top_k}", f"{at.mean():.0%}", f"{at.min():.0%}–{at.max():.0%}"]
        table.add([f"{some.model} ({_HERE})", *cells], **_from(_HERE, some.model, float(at.mean())))
    for model, row in MODELS.items():
        value = row["coverage_with_shared"]
        cells = [f"{row['shared']} + {row['num_experts_per_tok']}", f"{value:.0%}", NONE]
        table.add([f"{model} ({_PAPER})", *cells], **_from(_PAPER, model, value))
    table.figures = {"": figures.coverage(curves)}
    return table


def overlaps(found: Sequence[Profiled]) -> Shown:
    """MoE-Sieve's figure 3: Jaccard of the hot 25% of every two data sets, clustered."""
    model, result = found[0].model, found[0].study
    names, matrix = result["overlap"]["names"], result["overlap"]["jaccard"]
    values = {(a, b): matrix[i][j] for i, a in enumerate(names) for j, b in enumerate(names) if i != j}
    told = [(pair, kind) for pairs, kind in ((PAPERS.within, "within"), (PAPERS.across, "across")) for pair in pairs]
    if not all(pair in values for pair, _ in told):
        told = [((a, b), NONE) for i, a in enumerate(names) for b in names[:i]]
    printed = {**published.JACCARD, **{(b, a): value for (a, b), value in published.JACCARD.items()}}
    table = Shown(["data sets", "domain", "Jaccard", "published (OLMoE)"], texts=2)
    table.rows = [
        [f"{a} ~ {b}", kind, f"{values[a, b]:.2f}", shown(printed.get((a, b)), ".2f")] for (a, b), kind in told
    ]
    table.numbers = [
        {"model": model, "a": a, "b": b, "jaccard": value, "published": printed.get((a, b))}
        for (a, b), value in values.items()
        if a < b
    ]
    table.notes = [
        f"{model}: the hot {result['settings']['experts_per_layer']} experts of each layer, mean over layers. "
        "These are the pairs that the paper's text names."
    ]
    table.figures = {"": study_figures.overlap_map(result)} if len(names) > 1 else {}
    return table


def heat_maps(found: Sequence[Profiled]) -> Shown:
    """MoE-Sieve's figure 5."""
    table = Shown(["data set", "layer CV", "cold", "busiest expert"], notes=[found[0].model])
    for task, row in found[0].study["datasets"].items():
        busiest = (found[0].profiles[task].shares() * found[0].profiles[task].num_experts).max().item()
        numbers = {"layer_cv": row["layer_cv"], "cold_share": row["cold_share"], "busiest": busiest}
        cells = [task, f"{row['layer_cv']:.2f}", f"{row['cold_share']:.0%}", f"{busiest:.1f}×"]
        table.add(cells, model=found[0].model, data=task, **numbers)
    table.figures = {"": study_figures.heat_maps(found[0].profiles)}
    return table


def stability(found: Sequence[Profiled]) -> Shown:
    """MoE-Sieve's figure 6: Jaccard of the hot 25% of 10% subsamples with those of all examples."""
    columns = ["model", "data set", "examples", "Jaccard, mean", "lowest draw", "highest draw"]
    table = Shown(columns, texts=2)
    for some in found:
        stable = {task: row["stability"] for task, row in some.study["datasets"].items()}
        for task, row in stable.items():
            jaccard = {key: row[key] for key in ("mean", "min", "max")}
            cells = [f"{row['subsample']} of {row['examples']}", *(f"{value:.3f}" for value in jaccard.values())]
            table.add([some.model, task, *cells], model=some.model, data=task, examples=row["examples"], **jaccard)
        mean = sum(row["mean"] for row in stable.values()) / len(stable)
        table.rows.append([some.model, f"mean of {len(stable)}", "", f"{mean:.3f}", "", ""])
    means = ", ".join(f"{row['stability']} ({model})" for model, row in MODELS.items())
    mbpp = ", ".join(f"{value} ({model})" for model, value in published.MBPP_STABILITY.items())
    table.notes = [
        f"{found[0].study['settings']['draws']} draws of a tenth of the examples.",
        f"Published means: {means}. Below 0.90 only MBPP, of 374 examples: {mbpp}.",
    ]
    table.figures = {some.model if len(found) > 1 else "": study_figures.robustness(some.study) for some in found}
    return table


def _from(side: str, model: str, coverage: float) -> dict[str, Number]:
    return {"model": model, "from": side, "coverage_with_shared": coverage}


def _at(values: Sequence[float], i: int) -> float | None:
    return values[i] if i < len(values) else None


def _covered(profile: RoutingProfile, shared: float) -> np.ndarray:
    """[E + 1]: (S + K c) / (S + K), c the coverage of the 0, 1, … busiest experts, mean over layers."""
    top_k = profile.num_experts_per_tok
    return (shared + top_k * np.nanmean(coverages(profile), axis=0)) / (shared + top_k)


def _data_words(found: Sequence[Profiled]) -> str:
    tasks = list(found[0].profiles)
    if set(tasks) == set(published.DATASETS):
        return "Means over the ten data sets of the paper."
    return f"Here means over {', '.join(tasks)}; the paper's over its ten data sets."
