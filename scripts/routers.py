"""The profiling study on real routers, from counts that others published: results/routers.

python scripts/routers.py FOLDER      # numbers and pictures; python scripts/study.py then writes docs/study.md

FOLDER has `olmoe`, `qwen`, `glm_5_2` and `olmoe_alpaca`, folders of JSON files of the form that scripts/routing_json.py
describes and makes for two of them, and `seeds.json` with MoE-Sieve's accuracies: model -> task -> condition -> seed.
"""

import argparse
import gzip
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hotlora.base.files import write_json
from hotlora.evaluation.stats import paired_test
from hotlora.report.figures import save_figure
from hotlora.report.study_report import DPI, pictures
from hotlora.routing.drift import drift
from hotlora.routing.plan import select_experts
from hotlora.routing.profile import RoutingProfile, hot_mask, hot_overlap
from hotlora.routing.study import experts_for, stability, study

RESULTS = Path(__file__).resolve().parent.parent / "results" / "routers"
SHARED = {"olmoe": 0, "qwen": 4, "glm_5_2": 1}
"""shared experts, in routed experts' widths"""
NAMES = {"alpaca": "codealpaca", "wikitext": "wikitext2"}
"""MoE-Sieve's files -> our tasks; its alpaca is CodeAlpaca"""
BUDGETS = (8, 16, 32)
THRESHOLDS = (1.0, 1.25, 1.5)
"""of the uniform share: 1 is `auto`'s"""
TRAINED = {"olmoe": ("gsm8k", "hellaswag", "spider"), "qwen": ("gsm8k", "hellaswag", "spider")}
QUARTER = {"olmoe": "hotk16", "qwen": "hotk15"}
CHANGES = {
    **{name: ("bf16", name) for name in ("fp16", "int8", "fp8", "nf4", "fp4")},
    "int8 after LoRA": ("int8", "int8_after_lora"), "nf4 after LoRA": ("nf4", "nf4_after_lora"),
}  # fmt: skip
"""name -> what is compared with what"""


def read(file: Path) -> dict[str, Any]:
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8") as lines:
        return json.load(lines)


def profile_of(data: Mapping[str, Any]) -> RoutingProfile:
    """Of one file that has counts and mass."""
    counts = torch.tensor(data["counts"])
    routed = int(counts[0].sum())
    top_k = data.get("num_experts_per_tok") or routed // data["num_tokens"]
    mass = torch.tensor(data["mass"], dtype=torch.float64)
    source = {"model": data["model"], "data": data["dataset"]}
    return RoutingProfile(tuple(data["layers"]), counts, mass, routed // top_k, top_k, source)


def examples_of(data: Mapping[str, Any], num_experts: int) -> Tensor:
    """int32 [X, L, E]"""
    rows = data["examples"]
    counts = np.zeros((len(rows), len(rows[0]), num_experts), dtype=np.int32)
    for example, layers in enumerate(rows):
        for layer, pairs in enumerate(layers):
            experts, times = zip(*pairs, strict=True)
            counts[example, layer, list(experts)] = times
    return torch.from_numpy(counts)


def files_of(folder: Path) -> dict[str, Path]:
    """Data set -> file."""
    found = {file.name.partition(".")[0]: file for file in sorted(folder.glob("*.json*"))}
    return found or sys.exit(f"{folder} has no JSON files: see scripts/routing_json.py")


def of_model(folder: Path) -> tuple[dict[str, Any], dict[str, RoutingProfile]]:
    """A model's study, and what it is of. What the reading of a page does not need is left out."""
    profiles, examples, saliency = {}, {}, {}
    for name, file in files_of(folder).items():
        data, name = read(file), NAMES.get(name, name)
        profiles[name] = profile = profile_of(data)
        if "examples" in data:
            examples[name] = examples_of(data, profile.num_experts)
        if "reap" in data:
            saliency[name] = torch.tensor(data["reap"], dtype=torch.float64)
    result = study(profiles, examples, shared=SHARED[folder.name])
    kept = result["settings"]["experts_per_layer"]
    for name, profile in profiles.items():
        row = result["datasets"][name]
        row["above"] = {f"{times:g}": above(profile, times) for times in THRESHOLDS}
        row["auto"] = sizes(profile)
        row["busiest"] = busiest(profile)
        row["experts_for_60_with_shared"] = experts_for_shared(profile, SHARED[folder.name])
        if name in saliency:
            hot = [hot_mask(scores, kept) for scores in (profile.counts, profile.mass, saliency[name])]
            row["saliency"] = {"count": _mean(hot[0], hot[2]), "mass": _mean(hot[1], hot[2])}
    return result, profiles


def above(profile: RoutingProfile, times: float) -> float:
    """Share of the experts that take more than so many uniform shares of their layer."""
    return (profile.shares() * profile.num_experts > times).double().mean().item()


def busiest(profile: RoutingProfile) -> dict[str, float]:
    """Share of the tokens that go to a layer's busiest expert, and in which layer most do."""
    shares = profile.shares().max(dim=1).values * profile.num_experts_per_tok
    return {"mean": shares.mean().item(), "max": shares.max().item(), "layer": profile.layers[int(shares.argmax())]}


def experts_for_shared(profile: RoutingProfile, shared: int, covered: float = 0.6) -> float:
    """Mean number of a layer's routed experts for that share of a token's experts, its shared ones counted."""
    top_k = profile.num_experts_per_tok
    return experts_for(profile, (covered * (shared + top_k) - shared) / top_k).mean().item()


def sizes(profile: RoutingProfile) -> dict[str, float]:
    """Experts of a layer that `auto` keeps, and the share of the routing that goes to them."""
    plan = select_experts(profile, rule="auto")
    kept = [len(ids) for ids in plan.experts.values()]
    shares = [profile.shares()[i, list(ids)].sum().item() for i, ids in enumerate(plan.experts.values())]
    return {"mean": float(np.mean(kept)), "min": min(kept), "max": max(kept), "coverage": float(np.mean(shares))}


def of_precisions(folder: Path) -> dict[str, Any]:
    """OLMoE's hot experts on one text in several precisions, and after training."""
    counts = {name: examples_of(read(file), 64) for name, file in files_of(folder).items()}
    found = {
        name: {str(kept): drift(counts[before], counts[after], kept) for kept in BUDGETS}
        for name, (before, after) in CHANGES.items()
        if {before, after} <= counts.keys()
    }
    whole = counts["bf16"]
    between = [hot_mask(counts[name].sum(0), 16) for name in ("int8_after_lora", "nf4_after_lora") if name in counts]
    return {
        "model": "OLMoE-1B-7B", "data": "alpaca", "examples": len(whole), "tokens": int(whole[:, 0].sum()) // 8,
        "stability": stability(whole, 16), "changes": found,
        "two_trainings": _mean(*between) if len(between) == 2 else None,
    }  # fmt: skip


def of_seeds(file: Path) -> dict[str, Any]:
    """Each condition against all experts and against the quarter, in points, by seed."""
    found: dict[str, Any] = {}
    for model, tasks in TRAINED.items():
        for task in tasks:
            scores = {name: _points(runs) for name, runs in read(file)[model][task].items() if len(runs) > 1}
            found.setdefault(model, {})[task] = {
                name: {
                    f"minus_{label}": _difference(runs, scores[other])
                    for label, other in (("all", "full_lora"), ("quarter", QUARTER[model]))
                    if name != other
                }
                for name, runs in scores.items()
            }
    return found


def _points(runs: Mapping[str, Any]) -> dict[int, float]:
    """Seed -> accuracy; Spider's is the official execution accuracy."""
    return {int(seed): 100 * (run.get("execution") or run["accuracy"]) for seed, run in runs.items()}


def _difference(runs: Mapping[int, float], others: Mapping[int, float]) -> dict[str, Any]:
    seeds = sorted(runs.keys() & others.keys())
    test = paired_test([runs[seed] for seed in seeds], [others[seed] for seed in seeds])
    return {"seeds": len(seeds), "difference": test.mean, "interval": test.interval}


def _mean(one: Tensor, other: Tensor) -> float:
    return hot_overlap(one, other).mean().item()


def rounded(value: Any, digits: int = 5) -> Any:
    """Numbers to so many digits after the point: the files are read by people too."""
    if isinstance(value, float):
        return round(value, digits)
    if isinstance(value, Mapping):
        return {key: rounded(item, digits) for key, item in value.items()}
    return [rounded(item, digits) for item in value] if isinstance(value, list | tuple) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    for model in SHARED:
        result, profiles = of_model(args.folder / model)
        for name, figure in pictures(result, profiles).items():
            if name != "robustness":  # the page has it as a table
                save_figure(figure, RESULTS / model / f"{name}.png", DPI)
        del result["overlap"]["by_layer"]
        write_json(RESULTS / model / "study.json", rounded(result))
        print(f"{model}: {len(profiles)} data sets")
    write_json(RESULTS / "precision.json", rounded(of_precisions(args.folder / "olmoe_alpaca")))
    write_json(RESULTS / "trained.json", rounded(of_seeds(args.folder / "seeds.json")))


if __name__ == "__main__":
    main()
