"""The part of docs/study.md that is on real routers: scripts/study_routers.md, filled from the numbers in results."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hotlora.base.files import read_json
from hotlora.report import study_models
from hotlora.report.study_report import table
from hotlora.report.text import NONE
from hotlora.routing.profile import RoutingProfile, hot_mask
from hotlora.routing.study import Study, load_study
from results import study_table

ROOT = Path(__file__).resolve().parent.parent
ROUTERS = ROOT / "results" / "routers"
NANO = ROOT / "results" / "nano"
MODELS = {"OLMoE-1B-7B": "olmoe", "Qwen1.5-MoE-A2.7B": "qwen", "GLM-5.2": "glm_5_2"}
SOURCES = {
    "OLMoE-1B-7B": ("MoE-Sieve's data sets, whole training splits", "amanzoni1/MoE_Sieve 8a58e7a"),
    "Qwen1.5-MoE-A2.7B": ("the same", "the same"),
    "GLM-5.2": ("ten kinds of text, on a model in 2 bits (IQ2_M)", "Dorijan10/glm-expert-pruning 6cb4469"),
}
PICTURES = {
    "heat-maps": "layers and experts; 1× is the uniform share",
    "coverage": "share of the routing that a layer's busiest experts take, mean over layers",
    "by-layer": "CV and coverage in each layer; dotted: OLMoE on Spider, from the paper's table 7",
    "overlap": "Jaccard of two data sets' hot experts, mean over layers; ordered by average-linkage clustering",
}
QUARTER = {"olmoe": "hotk16", "qwen": "hotk15"}
NEAR_AUTO = {("olmoe", "gsm8k"): ("hotk20", "cov60"), ("olmoe", "hellaswag"): ("hotk24", "hotk32", "cov60")}
LABELS = {"hotk20": "20", "hotk24": "24", "hotk32": "32", "cov60": "`coverage` 60%"}
WARM_UP = ("base", "warmed-up")


def page() -> str:
    """From the title to the claims."""
    real = {name: load_study(ROUTERS / folder / "study.json") for name, folder in MODELS.items()}
    found = real | {"nano": load_study(NANO / "study" / "study.json")}
    precision, nano = read_json(ROUTERS / "precision.json"), read_json(NANO / "precision.json")
    text = (ROOT / "scripts" / "study_routers.md").read_text(encoding="utf-8")
    return text.format(
        **of_studies(found),
        **of_precision(precision),
        **of_nano(nano),
        **of_auto(real, read_json(ROUTERS / "trained.json")),
        sources_table=sources(real),
        skew_table=study_models.skew(found),
        datasets_table=study_models.datasets(found),
        depth_table=study_models.depth(found),
        overlap_table=study_models.overlaps(found),
        robust_table=study_models.robust(real),
        claims_tables=study_models.decided(found, real),
        **{f"{name}_pictures": pictures(file) for name, file in _FILES.items()},
    )


def of_studies(found: Mapping[str, Study]) -> dict[str, Any]:
    olmoe, qwen, glm = (found[name] for name in MODELS)
    below = [row["shuffled"]["below"] for name in MODELS for row in rows(found[name])]
    names, matrix = (glm["overlap"][key] for key in ("names", "jaccard"))
    pairs = [matrix[i][j] for i in range(len(matrix)) for j in range(i)]
    books, mbpp = (result["datasets"][name]["busiest"] for result, name in ((glm, "books"), (olmoe, "mbpp")))
    return {
        "glm_coverage": glm["mean"]["coverage"], "olmoe_coverage": olmoe["mean"]["coverage"],
        "qwen_coverage": qwen["mean"]["coverage"], "glm_ratio": glm["mean"]["ratio"],
        "glm_overlap": sum(pairs) / len(pairs), "glm_chance": study_models.chance(glm),
        "glm_stability": glm["mean"]["stability"], "nano_ratio": found["nano"]["mean"]["ratio"],
        "nano_shuffled": found["nano"]["mean"]["shuffled_ratio"],
        "roots": ", ".join(f"{name} {study_models.root_of_layers(result):.1f}" for name, result in found.items()),
        "pairs": len(below), "below": f"{(few := sum(value <= 0.05 for value in below))} {'is' if few == 1 else 'are'}",
        "instruct_chat": matrix[names.index("code_instruct")][names.index("chat")],
        "instruct_raw": matrix[names.index("code_instruct")][names.index("code_raw")],
        **{f"books_{key}": value for key, value in books.items()},
        **{f"mbpp_{key}": value for key, value in mbpp.items()},
    }  # fmt: skip


def sources(real: Mapping[str, Study]) -> str:
    told = []
    for name, result in real.items():
        tokens = sum(row["tokens"] for row in rows(result))
        told.append([name, study_models.shape(result), str(len(rows(result))), f"{tokens:,}", *SOURCES[name]])
    return table(["", "layers × experts, a token's + shared", "data sets", "tokens", "of what", "counted by"], told)


def of_precision(precision: Mapping[str, Any]) -> dict[str, Any]:
    changes, alpaca = precision["changes"], precision["stability"]
    nf4, lora = changes["nf4"]["16"], changes["nf4 after LoRA"]["16"]
    trained = [name for name in changes if "LoRA" in name]
    covered = [
        [name, f"{row['moved']:.1%}", f"{row['covered']:.1%}", f"{row['still_covered']:.1%}", f"{lost(row):.1f} points"]
        for name in trained
        for row in [changes[name]["16"]]
    ]
    return {
        "precision_table": change_table({name: changes[name] for name in changes if name not in trained}),
        "drift_table": change_table({name: changes[name] for name in trained}),
        "covered_table": table(["hot 16", "moved", "the new cover", "the old cover", "lost"], covered),
        "nf4_same": 1 - nf4["moved"], "nf4_moved": nf4["moved"], "nf4_lost": lost(nf4),
        "lora_jaccard": lora["jaccard"], "lora_moved": lora["moved"], "lora_lost": lost(lora),
        "lora_one_in": round(1 / lora["moved"]), "two_trainings": precision["two_trainings"],
        "alpaca_examples": precision["examples"], "alpaca_all": precision["tokens"],
        "alpaca_tokens": round(precision["tokens"] * alpaca["subsample"] / alpaca["examples"], -2),
        "alpaca_draws": alpaca["draws"], "alpaca_stability": alpaca["mean"], "alpaca_lowest": alpaca["min"],
    }  # fmt: skip


def change_table(changes: Mapping[str, Any]) -> str:
    told = [
        [name, *map(jaccard, of.values()), f"{of['16']['halves']:.3f}", f"{of['16']['halves_alone']:.3f}"]
        for name, of in changes.items()
    ]
    return table(["", "hot 8", "hot 16", "hot 32", "halves, hot 16", "unchanged, hot 16"], told)


def jaccard(change: Mapping[str, Any]) -> str:
    return f"{change['jaccard']:.3f} [{change['interval'][0]:.2f}, {change['interval'][1]:.2f}]"


def lost(change: Mapping[str, Any]) -> float:
    """Points of coverage between the new hot set and the old one."""
    return 100 * (change["covered"] - change["still_covered"])


def of_nano(nano: Mapping[str, Any]) -> dict[str, Any]:
    told = [
        [name, *(f"{jaccard(cell)}; {cell['halves']:.3f}, {cell['halves_alone']:.3f}" for cell in row.values())]
        for name, row in nano["precisions"].items()
    ]
    before, after = (RoutingProfile.load(NANO / "warm-up" / "profiles" / f"{name}.safetensors") for name in WARM_UP)
    old, new = (hot_mask(profile.counts, before.num_experts // 4) for profile in (before, after))
    taken = [(after.shares() * hot).sum(dim=1).mean().item() for hot in (old, new)]
    return {
        "nano_tokens": ", ".join(f"{task} {count:,}" for task, count in nano["tokens"].items()),
        "nano_precision_table": table(["", *(f"{task}; halves, unchanged" for task in nano["tokens"])], told),
        "nano_moved": (new & ~old).sum().item() / new.sum().item(), "nano_old": taken[0], "nano_new": taken[1],
        "reprofile_table": study_table(NANO / "reprofile", sorted_last=("every-25", "every-25-merge"), kept=False),
    }  # fmt: skip


def of_auto(real: Mapping[str, Study], trained: Mapping[str, Any]) -> dict[str, Any]:
    sizes, outcomes, kept = [], [], []
    for name, result in real.items():
        experts, sets = result["model"]["num_experts"], rows(result)
        shares = [row["auto"]["mean"] / experts for row in sets]
        kept += shares
        layers = f"{min(row['auto']['min'] for row in sets)}–{max(row['auto']['max'] for row in sets)} of {experts}"
        covered, *above = (
            span([row["auto"]["coverage"] for row in sets]),
            *(span([row["above"][times] for row in sets]) for times in ("1.25", "1.5")),
        )
        sizes.append([name, span(shares), layers, covered, *above])
        for task, of in trained.get(folder := MODELS[name], {}).items():
            row = result["datasets"][task]
            near = [f"{LABELS[key]}: {points(of[key]['minus_quarter'])}" for key in NEAR_AUTO.get((folder, task), ())]
            outcomes.append([
                f"{name}, {task}", f"{row['layer_cv']:.2f}",
                f"{row['auto']['mean']:.1f} ({row['auto']['mean'] / experts:.0%})",
                points(of[QUARTER[folder]]["minus_all"]), points(of["hotk8"]["minus_all"]) if "hotk8" in of else NONE,
                "; ".join(near) or NONE,
            ])  # fmt: skip
    head = ["", "layer CV", "auto keeps", "quarter − all", "8 experts − all", "about auto's number − quarter"]
    flat = min(rows(real["Qwen1.5-MoE-A2.7B"]), key=lambda row: row["layer_cv"])["above"]
    return {
        "auto_table": table(["", "kept", "by layer", "covered", "above 1.25 shares", "above 1.5"], sizes),
        "trained_table": table(head, outcomes),
        "auto_least": min(kept), "auto_most": max(kept), "above_qwen": flat["1.25"], "above_more": flat["1.5"],
        "above_olmoe": span([row["above"]["1.25"] for row in rows(real["OLMoE-1B-7B"])]),
    }  # fmt: skip


def points(test: Mapping[str, Any]) -> str:
    return f"{test['difference']:+.2f} [{test['interval'][0]:+.2f}, {test['interval'][1]:+.2f}]"


def span(shares: list[float]) -> str:
    return f"{100 * min(shares):.0f}–{100 * max(shares):.0f}%"


def rows(result: Study) -> list[dict[str, Any]]:
    return list(result["datasets"].values())


def pictures(name: str) -> str:
    """One a real model."""
    told = []
    for model, folder in MODELS.items():
        caption, file = f"{model}: {PICTURES[name]}", (ROUTERS / folder / name).relative_to(ROOT).as_posix()
        told.append(f"![{caption}.](../{file}.png)\n\n*{caption}.*")
    return "\n\n".join(told)


_FILES = {"coverage": "coverage", "heat_map": "heat-maps", "by_layer": "by-layer", "overlap": "overlap"}
