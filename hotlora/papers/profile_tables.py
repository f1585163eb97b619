"""Routing profiles -> the papers' tables and figures of routing, ours beside the published numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.figure import Figure

from ..report import study_figures
from ..report.comparison_table import NONE
from ..report.published import (
    DATASETS,
    GREEDY_COVERAGE,
    GREEDY_EXPERTS,
    HELLORA_OVERLAP,
    MBPP_STABILITY,
    MODELS,
    OLMOE_SPIDER,
    RATIOS,
    UNIFORM_COVERAGE,
)
from ..report.study_claims import ACROSS, WITHIN
from ..routing.plan import select_experts
from ..routing.profile import RoutingProfile, experts_kept
from ..routing.study import FRACTION, Study, hot_mask, overlap
from . import profile_figures as figures
from .result import Number

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


@dataclass(frozen=True)
class Shown:
    """What of a `Result` a recipe's profiles make."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[Mapping[str, Number]]
    notes: Sequence[str] = ()
    figures: Mapping[str, Figure] = field(default_factory=dict)
    texts: int = 1


def layer_and_global(found: Sequence[Profiled]) -> Shown:
    """HELLoRA's figure 1: the layer in the middle (7 of 16), and the sums over all layers by expert index."""
    task, profile = next(iter(found[0].profiles.items()))
    row, kept = (len(profile.layers) - 1) // 2, profile.num_experts_per_tok
    sums = profile.counts.sum(dim=0)
    loads = {
        f"layer {profile.layers[row]}": profile.shares()[row].tolist(), "all layers": (sums / sums.sum()).tolist()
    }  # fmt: skip
    rows, numbers = [], []
    for name, shares in loads.items():
        top = sum(sorted(shares, reverse=True)[:kept])
        cv = float(np.std(shares) / np.mean(shares))
        published = "more than 50%" if name != "all layers" else NONE
        rows.append([name, f"{top:.1%}", published, f"{kept / profile.num_experts:.1%}", f"{cv:.2f}"])
        numbers.append({"model": found[0].model, "data": task, "layers": name, "hot_share": top, "cv": cv})
    hot = f"its {kept} hottest take"
    return Shown(
        ["", hot, "published (layer 7 of 16, 8 of 64)", "uniform", "CV"], rows, numbers,
        [f"{found[0].model} on {task}, {profile.num_tokens:,} tokens."],
        {"": figures.two_loads(loads)},
    )  # fmt: skip


def warm_up(found: Sequence[Profiled]) -> Shown:
    """HELLoRA's figure 3: Jaccard of the K hot experts, with those of the base on all data, layer by layer."""
    task, real = next(iter(found[0].profiles.items()))
    kept = real.num_experts_per_tok
    sides = {}
    if found[0].warm_up is not None:
        sides = {"warmed up, on a tenth": found[0].warm_up.warmed_up, "base, on a tenth": found[0].warm_up.slice}
    overlaps = {name: overlap(real, side, experts_per_layer=kept).tolist() for name, side in sides.items()}
    rows, numbers = [], []
    for name, values in overlaps.items():
        same = sum(value == 1 for value in values)
        mean = sum(values) / len(values)
        rows.append([name, f"{same} of {len(values)}", f"{mean:.3f}", f"{min(values):.2f}"])
        numbers += [
            {"model": found[0].model, "data": task, "profile": name, "layer": layer, "jaccard": value}
            for layer, value in zip(real.layers, values, strict=True)
        ]
    k, layers, same = (HELLORA_OVERLAP[name] for name in ("experts_per_layer", "layers", "same"))
    mean = (same + (layers - same) * (k - 1) / (k + 1)) / layers
    rows.append(["published, warmed up", f"{same} of {layers}", f"{mean:.3f}", f"{(k - 1) / (k + 1):.2f}"])
    notes = [
        f"{found[0].model} on {task}: the {kept} hot experts of each layer against those of the base on all "
        f"{real.source['examples']:,} examples. The published mean follows from its words: {k - 1} of {k} the "
        f"same in the other {layers - same} layers.",
    ]
    if found[0].warm_up is not None:
        notes.append(
            "The warm-up is an epoch of LoRA on all experts, attention and routers, at table 2's learning rate of "
            f"{found[0].warm_up.learning_rate:g}: the routers are trained, too."
        )
    if not overlaps:
        return Shown(["", "same in", "mean Jaccard", "lowest"], rows, numbers, [*notes, "No warm-up is made."])
    picture = study_figures.layer_overlap(overlaps, real.layers)
    return Shown(["", "same in", "mean Jaccard", "lowest"], rows, numbers, notes, {"": picture})


def five_layers(found: Sequence[Profiled]) -> Shown:
    """HELLoRA's figures 4 and 6: the loads of five layers on each task, the K hot experts in colour."""
    profiles = found[0].profiles
    first = next(iter(profiles.values()))
    picked = sorted({int(i) for i in np.ceil(np.linspace(0, len(first.layers) - 1, 5))})
    kept, tasks = first.num_experts_per_tok, list(profiles)
    hot = {task: hot_mask(profile.counts, kept) for task, profile in profiles.items()}
    pairs = [(a, b) for i, a in enumerate(tasks) for b in tasks[:i]]
    between = {pair: overlap(profiles[pair[0]], profiles[pair[1]], experts_per_layer=kept) for pair in pairs}
    rows, numbers = [], []
    for row in picked:
        taken = {task: profile.shares()[row][hot[task][row]].sum().item() for task, profile in profiles.items()}
        overlaps = [values[row].item() for values in between.values()]
        mean = sum(overlaps) / len(overlaps) if overlaps else None
        rows.append([
            f"layer {first.layers[row]}", *(f"{value:.1%}" for value in taken.values()),
            NONE if mean is None else f"{mean:.2f}",
        ])  # fmt: skip
        numbers.append({"model": found[0].model, "layer": first.layers[row], **taken, "jaccard": mean})
    uniform = kept / first.num_experts
    notes = [
        f"Share of a layer's assignments that its {kept} hot experts take (uniform: {uniform:.1%}), and the mean "
        "Jaccard of two tasks' hot experts.",
        "The paper's text names layers 0, 4, 8, 12 and 15 of OLMoE (its caption 0, 2, 4, 8 and 15), and 0, 8, 16, 24 "
        "and 32 of Mixtral, whose last is 31.",
    ]
    columns = ["", *(f"hot {kept} on {task}" for task in tasks), "overlap"]
    return Shown(columns, rows, numbers, notes, {"": figures.activations(profiles, picked, hot)})


def skew(found: Sequence[Profiled]) -> Shown:
    """MoE-Sieve's table 2: means over the data sets."""
    keys = ("global_cv", "layer_cv", "ratio", "cold_share", "coverage")
    formats = ("{:.3f}", "{:.3f}", "{:.1f}", "{:.1%}", "{:.1%}")
    lines = [(some.model, _HERE, some.study["mean"]) for some in found]
    lines += [(model, _PAPER, row) for model, row in MODELS.items()]
    rows = [
        [f"{model} ({side})", *(show.format(row[key]) for show, key in zip(formats, keys, strict=True))]
        for model, side, row in lines
    ]
    numbers = [{"model": model, "from": side, **{key: row[key] for key in keys}} for model, side, row in lines]
    columns = ["", "global CV", "layer CV", "ratio", "cold", "covered by 25%"]
    return Shown(columns, rows, numbers, [_data_words(found)])


def by_layer(found: Sequence[Profiled]) -> Shown:
    """MoE-Sieve's table 7."""
    ((task, row),) = found[0].study["datasets"].items()
    metrics = {
        "cv": ("CV", "{:.2f}"), "cold_share": ("cold", "{:.0%}"), "coverage": ("covered by 25%", "{:.0%}"),
        "entropy": ("entropy", "{:.3f}"),
    }  # fmt: skip
    layers, published = found[0].study["model"]["layers"], len(OLMOE_SPIDER["cv"])
    rows, numbers = [], []
    for i in range(max(len(layers), published)):
        line = [str(layers[i] if i < len(layers) else i)]
        number: dict[str, Number] = {"layer": i}
        for metric, (_, show) in metrics.items():
            ours = row["by_layer"][metric][i] if i < len(layers) else None
            theirs = OLMOE_SPIDER[metric][i] if i < published else None
            line += [NONE if value is None else show.format(value) for value in (ours, theirs)]
            number |= {metric: ours, f"{metric}_{_PAPER}": theirs}
        rows.append(line)
        numbers.append(number)
    columns = ["layer"]
    for label, _ in metrics.values():
        columns += [label, _PAPER]
    note = f"{found[0].model} on {task}, {row['tokens']:,} tokens; the paper's is OLMoE on Spider, with 16 layers."
    return Shown(columns, rows, numbers, [note], {"": study_figures.by_layer(found[0].study)})


def greedy(found: Sequence[Profiled]) -> Shown:
    """MoE-Sieve's table 9: 25% of each layer, and as many in all where they cover most."""
    task, profile = next(iter(found[0].profiles.items()))
    shares = profile.shares()
    plans = {rule: select_experts(profile, rule=rule, fraction=FRACTION).experts for rule in ("hot", "greedy")}
    size, covered = {}, {}
    for rule, experts in plans.items():
        size[rule] = [len(experts[layer]) for layer in profile.layers]
        covered[rule] = [
            100 * shares[i, list(experts[layer])].sum().item() for i, layer in enumerate(profile.layers)
        ]  # fmt: skip
    theirs = list(zip([16] * 16, UNIFORM_COVERAGE, GREEDY_EXPERTS, GREEDY_COVERAGE, strict=True))
    ours = list(zip(size["hot"], covered["hot"], size["greedy"], covered["greedy"], strict=True))
    means = [[float(np.mean(column)) for column in zip(*side, strict=True)] for side in (ours, theirs)]
    rows, numbers = [], []
    for i in range(max(len(ours), len(theirs))):
        one, other = (side[i] if i < len(side) else None for side in (ours, theirs))
        rows.append([str(profile.layers[i] if one else i), *_budgets(one), *_budgets(other)])
        keys = ("uniform_experts", "uniform_coverage", "greedy_experts", "greedy_coverage")
        number: dict[str, Number] = {"layer": i}
        for key, value, paper in zip(keys, one or [None] * 4, other or [None] * 4, strict=True):
            number |= {key: value, f"{key}_{_PAPER}": paper}
        numbers.append(number)
    rows.append(["mean", *_budgets(means[0]), *_budgets(means[1])])
    columns = ["layer", "uniform", "covers, %", "greedy", "covers, %"]
    columns += [f"{_PAPER}: {name}" for name in columns[1:]]
    note = f"{found[0].model} on {task}; the paper's is OLMoE on GSM8K. Both spend as many experts in all."
    return Shown(columns, rows, numbers, [note])


def ratios(found: Sequence[Profiled]) -> Shown:
    """MoE-Sieve's figure 1: every model on every data set, and the skew by depth."""
    rows, numbers = [], []
    for some in found:
        for task, row in some.study["datasets"].items():
            rows.append([some.model, task, *(f"{row[key]:.3f}" for key in ("global_cv", "layer_cv")),
                         f"{row['ratio']:.1f}"])  # fmt: skip
            numbers.append(
                {"model": some.model, "data": task, **{k: row[k] for k in ("global_cv", "layer_cv", "ratio")}}
            )
    note = (
        f"Published: ratios from {RATIOS[0]} (OLMoE, Wikitext) to {RATIOS[1]} (Qwen, GSM8K) over 30 pairs; means "
        + ", ".join(f"{row['ratio']} ({model})" for model, row in MODELS.items())
        + "."
    )
    studies = {some.model: some.study for some in found}
    columns = ["model", "data set", "global CV", "layer CV", "ratio"]
    return Shown(columns, rows, numbers, [note], {"": figures.ratios(studies)}, texts=2)


def coverage(found: Sequence[Profiled]) -> Shown:
    """MoE-Sieve's figure 2: share of a token's experts that are adapted or shared, by the routed experts' budget."""
    rows: list[list[str]] = []
    numbers: list[dict[str, Number]] = []
    curves = {}
    for some in found:
        shared, top_k = some.study["model"]["shared"], some.study["model"]["num_experts_per_tok"]
        curves[some.model] = np.stack([_covered(profile, shared) for profile in some.profiles.values()])
        kept = experts_kept(curves[some.model].shape[1] - 1, FRACTION, None)
        at = curves[some.model][:, kept]
        rows.append([f"{some.model} ({_HERE})", f"{shared:g} + {top_k}", f"{at.mean():.0%}",
                     f"{at.min():.0%}–{at.max():.0%}"])  # fmt: skip
        numbers.append({"model": some.model, "from": _HERE, "coverage_with_shared": float(at.mean())})
    for model, row in MODELS.items():
        value = row["coverage_with_shared"]
        rows.append([f"{model} ({_PAPER})", f"{row['shared']} + {row['num_experts_per_tok']}", f"{value:.0%}", NONE])
        numbers.append({"model": model, "from": _PAPER, "coverage_with_shared": value})
    columns = ["", "shared + routed experts a token", "covered by 25%", "over data sets"]
    return Shown(columns, rows, numbers, [_data_words(found)], {"": figures.coverage(curves)})


def overlaps(found: Sequence[Profiled]) -> Shown:
    """MoE-Sieve's figure 3: Jaccard of the hot 25% of every two data sets, clustered."""
    result = found[0].study
    names, matrix = result["overlap"]["names"], result["overlap"]["jaccard"]
    values = {(a, b): matrix[i][j] for i, a in enumerate(names) for j, b in enumerate(names) if i != j}
    told = [(pair, kind) for pairs, kind in ((WITHIN, "within"), (ACROSS, "across")) for pair in pairs]
    if not all(pair in values for pair, _ in told):
        told = [((a, b), NONE) for i, a in enumerate(names) for b in names[:i]]
    rows = [[f"{a} ~ {b}", kind, f"{values[a, b]:.2f}"] for (a, b), kind in told]
    numbers = [
        {"model": found[0].model, "a": a, "b": b, "jaccard": value} for (a, b), value in values.items() if a < b
    ]  # fmt: skip
    notes = [
        f"{found[0].model}: the hot {result['settings']['experts_per_layer']} experts of each layer, mean over layers. "
        "The paper names these pairs; their numbers are lost in its text.",
    ]
    pictures = {"": study_figures.overlap_map(result)} if len(names) > 1 else {}
    return Shown(["data sets", "domain", "Jaccard"], rows, numbers, notes, pictures, texts=2)


def heat_maps(found: Sequence[Profiled]) -> Shown:
    """MoE-Sieve's figure 5."""
    rows, numbers = [], []
    for task, row in found[0].study["datasets"].items():
        busiest = (found[0].profiles[task].shares() * found[0].profiles[task].num_experts).max().item()
        rows.append([task, f"{row['layer_cv']:.2f}", f"{row['cold_share']:.0%}", f"{busiest:.1f}×"])
        numbers.append(
            {"model": found[0].model, "data": task, "layer_cv": row["layer_cv"], "cold_share": row["cold_share"],
             "busiest": busiest}
        )  # fmt: skip
    columns = ["data set", "layer CV", "cold", "busiest expert"]
    return Shown(columns, rows, numbers, [found[0].model], {"": study_figures.heat_maps(found[0].profiles)})


def stability(found: Sequence[Profiled]) -> Shown:
    """MoE-Sieve's figure 6: Jaccard of the hot 25% of 10% subsamples with those of all examples."""
    rows: list[list[str]] = []
    numbers: list[dict[str, Number]] = []
    for some in found:
        stable = {task: row["stability"] for task, row in some.study["datasets"].items()}
        for task, row in stable.items():
            sizes = f"{row['subsample']} of {row['examples']}"
            rows.append([some.model, task, sizes, *(f"{row[key]:.3f}" for key in ("mean", "min", "max"))])
            numbers.append(
                {"model": some.model, "data": task, **{k: row[k] for k in ("examples", "mean", "min", "max")}}
            )
        mean = sum(row["mean"] for row in stable.values()) / len(stable)
        rows.append([some.model, f"mean of {len(stable)}", "", f"{mean:.3f}", "", ""])
    published = ", ".join(f"{row['stability']} ({model})" for model, row in MODELS.items())
    mbpp = ", ".join(f"{value} ({model})" for model, value in MBPP_STABILITY.items())
    notes = [
        f"{found[0].study['settings']['draws']} draws of a tenth of the examples.",
        f"Published means: {published}. Below 0.90 only MBPP, of 374 examples: {mbpp}.",
    ]
    pictures = {some.model if len(found) > 1 else "": study_figures.robustness(some.study) for some in found}
    columns = ["model", "data set", "examples", "Jaccard, mean", "lowest draw", "highest draw"]
    return Shown(columns, rows, numbers, notes, pictures, texts=2)


def _covered(profile: RoutingProfile, shared: float) -> np.ndarray:
    """[E + 1]: (S + K c) / (S + K), c the coverage of the 0, 1, … busiest experts, mean over layers."""
    covered = np.nanmean(-np.sort(-profile.shares().numpy(), axis=1).cumsum(axis=1), axis=0)
    top_k = profile.num_experts_per_tok
    return (shared + top_k * np.concatenate([[0.0], covered])) / (shared + top_k)


def _budgets(values: Sequence[float] | None) -> list[str]:
    """Experts, coverage, experts, coverage."""
    if values is None:
        return [NONE] * 4
    return [f"{value:.1f}" if i % 2 else f"{value:g}" for i, value in enumerate(values)]


def _data_words(found: Sequence[Profiled]) -> str:
    tasks = list(found[0].profiles)
    if set(tasks) == set(DATASETS):
        return "Means over the ten data sets of the paper."
    return f"Here means over {', '.join(tasks)}; the paper's over its ten data sets."
