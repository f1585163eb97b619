"""MoE-Sieve's tables and figures of routing, from its counts and mass."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from moe_sieve_cell import CONFIG_OF, CONFIGS, OLMOE, SAMPLE, Cell
from moe_sieve_data import Data

from hotlora.papers.configs import shape
from hotlora.report import published
from hotlora.report.published import MODELS
from hotlora.routing.plan import select_experts
from hotlora.routing.profile import RoutingProfile
from hotlora.routing.study import FRACTION, Study, experts_for

_NONE: Study = {"datasets": {}, "mean": {}, "overlap": {"names": [], "jaccard": []}}


def models(data: Data) -> Iterable[Cell]:
    for model, row in MODELS.items():
        profile = next(iter(data.profiles.get(model, {}).values()), None)
        config = shape(str(CONFIGS / CONFIG_OF[model] / "config.json")) if model in CONFIG_OF else {}
        here: dict[str, Any] = {name: config.get(name) for name in ("shared", "expert_to_ffn")}
        if profile is not None:
            here |= {"layers": len(profile.layers), "num_experts": profile.num_experts}
            here["num_experts_per_tok"] = profile.num_experts_per_tok
        heads = {"layers": "layers", "num_experts": "routed", "shared": "shared", "num_experts_per_tok": "top-k"}
        for name, head in heads.items():
            yield Cell("Table 1", model, head, ".0f", row[name], here.get(name))
        yield Cell("Table 1", model, "expert / FFN", ".2f", row["expert_to_ffn"], here["expert_to_ffn"])


def skew(studies: Mapping[str, Study]) -> Iterable[Cell]:
    heads = {"global_cv": ("global CV", ".3f", 1), "layer_cv": ("layer CV", ".3f", 1), "ratio": ("ratio", ".1f", 1),
             "cold_share": ("cold, %", ".1f", 100), "coverage": ("covered by 25%, %", ".1f", 100)}  # fmt: skip
    for model, row in MODELS.items():
        for name, (head, form, times) in heads.items():
            here = times * studies[model]["mean"][name] if model in studies else None
            yield Cell("Table 2", model, head, form, times * row[name], here)


def figure_1(studies: Mapping[str, Study]) -> Iterable[Cell]:
    named = (("OLMoE-1B-7B", "wikitext2"), ("Qwen1.5-MoE-A2.7B", "gsm8k"))
    for printed, (model, task) in zip(published.RATIOS, named, strict=True):
        here, others = None, {}
        if found := studies.get(model, _NONE)["datasets"].get(task):
            num_experts = studies[model]["model"]["num_experts"]
            here = found["ratio"]
            others = {"the layers' CV by ddof 1 over the global one by ddof 0": here * _more(num_experts)}
        yield Cell("Figure 1", f"{model}, {task}", "ratio", ".1f", printed, here, others)
    ratios = {f"{model}, {task}": row["ratio"] for model in studies for task, row in studies[model]["datasets"].items()}
    for head, (model, task), end in zip(("lowest", "highest"), named, (min, max), strict=True):
        here = end(ratios, key=ratios.__getitem__) if {f"{model}, {task}"} <= ratios.keys() else None
        yield Cell("Figure 1", f"the {head} of all pairs", "is of", "", f"{model}, {task}", here)


def figure_2(studies: Mapping[str, Study]) -> Iterable[Cell]:
    for model, row in MODELS.items():
        here = 100 * studies[model]["mean"]["coverage_with_shared"] if model in studies else None
        yield Cell(
            "Figure 2", model, "covered by 25%, shared included, %", ".0f", 100 * row["coverage_with_shared"], here
        )


def section_3_2(data: Data, studies: Mapping[str, Study]) -> Iterable[Cell]:
    where = "Section 3.2"
    spider = data.profiles.get(OLMOE, {}).get("spider")
    needed = None if spider is None else experts_for(spider)
    for name, head in (("mean", "mean"), ("min", "fewest"), ("max", "most")):
        row, form = f"OLMoE-1B-7B, spider: experts for 60%, {head}", ".1f" if name == "mean" else ".0f"
        here = None if needed is None else getattr(needed, name)().item()
        yield Cell(where, row, "number", form, published.SPIDER_EXPERTS_FOR_60[name], here)
    entropy = {name: row["entropy"] for name, row in studies.get(OLMOE, _NONE)["datasets"].items()}
    code = [entropy[name] for name in ("mbpp", "spider", "codealpaca") if name in entropy]
    for head, printed, end in zip(("lowest", "highest"), published.CODE_ENTROPY, (min, max), strict=True):
        row, here = f"OLMoE-1B-7B: entropy of code data, {head}", end(code) if len(code) == 3 else None
        yield Cell(where, row, "number", ".2f", printed, here)
    for name in ("hellaswag", "wikitext2"):
        row = f"OLMoE-1B-7B: entropy of {name}"
        yield Cell(where, row, "number", ".2f", published.BROAD_ENTROPY, entropy.get(name))
    for model, (first, peak) in published.DEPTH_CV.items():
        profile = data.profiles.get(model, {}).get("spider")
        cv = profile.layer_cv().numpy() if profile is not None else np.array([])
        more = _more(profile.num_experts) if profile is not None else 1.0
        row, layer = f"{model}, spider: CV,", MODELS[model]["peak_layer"]
        for head, printed, pick in (("first layer", first, 0), ("peak", peak, cv.argmax() if cv.size else 0)):
            here, others = (float(cv[pick]), {SAMPLE: float(cv[pick] * more)}) if cv.size else (None, {})
            yield Cell(where, f"{row} {head}", "number", ".2f", printed, here, others)
        peak_layer = profile.layers[cv.argmax()] if profile is not None else None
        yield Cell(where, f"{row} layer of the peak", "number", ".0f", layer, peak_layer)


def figure_3(studies: Mapping[str, Study]) -> Iterable[Cell]:
    overlaps = studies.get(OLMOE, _NONE)["overlap"]
    place = {name: i for i, name in enumerate(overlaps["names"])}
    for (one, other), printed in published.JACCARD.items():
        there = one in place and other in place
        here = overlaps["jaccard"][place[one]][place[other]] if there else None
        yield Cell("Figure 3", one, other, ".2f", printed, here)


def section_3_3(studies: Mapping[str, Study]) -> Iterable[Cell]:
    for model, row in MODELS.items():
        here = studies[model]["mean"]["signals_jaccard"] if model in studies else None
        yield Cell("Section 3.3", model, "count and mass, Jaccard", ".3f", row["signals_jaccard"], here)
    for model, row in MODELS.items():
        yield Cell("Figure 6", model, "a tenth of the examples, Jaccard", ".3f", row["stability"], None)
    for model, value in published.MBPP_STABILITY.items():
        yield Cell("Figure 6", f"{model}, mbpp", "a tenth of the examples, Jaccard", ".2f", value, None)


def table_7(studies: Mapping[str, Study]) -> Iterable[Cell]:
    heads = {"cv": ("CV", ".2f", 1), "cold_share": ("cold, %", ".0f", 100), "coverage": ("covered by 16", ".0f", 100),
             "entropy": ("entropy", ".3f", 1)}  # fmt: skip
    found = studies.get(OLMOE, _NONE)["datasets"].get("spider")
    for layer in range(MODELS[OLMOE]["layers"]):
        for name, (head, form, times) in heads.items():
            here = times * found["by_layer"][name][layer] if found else None
            yield Cell("Table 7", f"layer {layer}", head, form, times * published.OLMOE_SPIDER[name][layer], here)


def figure_5(studies: Mapping[str, Study]) -> Iterable[Cell]:
    rows = studies.get(OLMOE, _NONE)["datasets"]
    for task, printed in published.ENTROPY.items():
        here = rows[task]["entropy"] if task in rows else None
        yield Cell("Figure 5", task, "entropy", ".4f", printed, here)


def table_9(data: Data) -> Iterable[Cell]:
    profile = data.profiles.get(OLMOE, {}).get("gsm8k")
    experts, covered = greedy(profile) if profile is not None else ([], [])
    uniform = (100 * profile.coverage(fraction=FRACTION)).tolist() if profile is not None else []
    columns = {
        "greedy, experts": (".0f", published.GREEDY_EXPERTS, experts, 16.0),
        "uniform, covered, %": (".1f", published.UNIFORM_COVERAGE, uniform, 56.7),
        "greedy, covered, %": (".1f", published.GREEDY_COVERAGE, covered, 56.8),
    }
    for layer in range(16):
        for head, (form, printed, here, _) in columns.items():
            yield Cell("Table 9", f"layer {layer}", head, form, printed[layer], here[layer] if here else None)
    for head, (form, _, here, mean) in columns.items():
        yield Cell("Table 9", "mean", head, form, mean, float(np.mean(here)) if here else None)


def greedy(profile: RoutingProfile) -> tuple[list[int], list[float]]:
    """Experts of each layer by `greedy` at 25%, and the percentage of the layer that they cover."""
    chosen = list(select_experts(profile, rule="greedy", fraction=FRACTION).experts.values())
    covered = [100 * row[list(ids)].sum().item() for row, ids in zip(profile.shares(), chosen, strict=True)]
    return [len(ids) for ids in chosen], covered


def _more(num_experts: int) -> float:
    """A deviation by ddof 1 over the same by ddof 0."""
    return float(np.sqrt(num_experts / (num_experts - 1)))
