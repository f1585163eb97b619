"""What MoE-Sieve's section 3 says, held against a study's numbers: each claim is a rule that code decides."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..routing.study import Study, clusters
from .published import MBPP_STABILITY, MODELS, RATIOS

CODE = ("spider", "codealpaca", "mbpp")
BROAD = ("hellaswag", "wikitext2")
WITHIN = (
    ("mbpp", "codealpaca"),
    ("spider", "codealpaca"),
    ("arc_challenge", "mmlu"),
    ("piqa", "hellaswag"),
)
ACROSS = (("mbpp", "wikitext2"), ("spider", "wikitext2"))


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper, the rule that decides it, what was found, and whether it holds (None: not tested)."""

    section: str
    says: str
    rule: str
    here: str
    holds: bool | None


def claims(result: Study) -> list[Claim]:
    """Every claim of section 3 that one model's study can decide. Those whose data sets are missing are not tested."""
    found = [_gap(result), _coverage(result), _cold_tail(result), _spider_concentrated(result), _entropy(result)]
    found += [_domains(result), _code_cluster(result), _specialised(result), _depth(result), _amplification(result)]
    return [*found, _stability(result), _signals(result)]


def _gap(result: Study) -> Claim:
    ratios = {name: ratio for name, ratio in _column(result, "ratio").items() if ratio}  # none where global CV is 0
    low, high = (pick(ratios, key=ratios.__getitem__, default="") for pick in (min, max))
    return Claim(
        "3.1",
        "Inside a layer routing is several times as skewed as over all layers, on every data set.",
        f"the lowest ratio of layer CV to global CV is at least {RATIOS[0]}, the paper's lowest",
        f"ratios from {ratios[low]:.1f} ({low}) to {ratios[high]:.1f} ({high})" if ratios else "",
        ratios[low] >= RATIOS[0] if ratios else None,
    )


def _coverage(result: Study) -> Claim:
    lowest = min(model["coverage"] for model in MODELS.values())
    value = result["mean"]["coverage"]
    return Claim(
        "3.2",
        "A quarter of the experts takes far more than a quarter of the routing.",
        f"mean coverage of the hot 25% is at least {lowest:.1%}, the least of the paper's models",
        f"{value:.1%}",
        value >= lowest,
    )


def _cold_tail(result: Study) -> Claim:
    shares = _column(result, "cold_share")
    name = min(shares, key=shares.__getitem__)
    lowest = min(model["cold_share"] for model in MODELS.values())
    return Claim(
        "3.2",
        "A cold tail persists on every data set.",
        f"the lowest cold share of a data set is at least {lowest:.1%}, the least of the paper's means",
        f"lowest {shares[name]:.1%} ({name}), mean {result['mean']['cold_share']:.1%}",
        shares[name] >= lowest,
    )


def _spider_concentrated(result: Study) -> Claim:
    cvs = _column(result, "layer_cv")
    ranked = sorted(cvs, key=lambda name: -cvs[name])
    known = "spider" in cvs and len(cvs) > 3
    rank = ranked.index("spider") + 1 if known else 0
    return Claim(
        "3.2",
        "Spider is among the most concentrated data sets.",
        "its mean layer CV is one of the three highest",
        f"rank {rank} of {len(cvs)}; highest: {', '.join(ranked[:3])}" if known else "",
        rank <= 3 if known else None,
    )


def _entropy(result: Study) -> Claim:
    values = _column(result, "entropy")
    known = _has(result, *CODE, *BROAD)
    code, broad = ([(name, values[name]) for name in group] for group in (CODE, BROAD)) if known else ([], [])
    return Claim(
        "3.2",
        "Code has the lowest entropy over experts, broad text a higher one.",
        f"each of {', '.join(CODE)} is below each of {', '.join(BROAD)}",
        "; ".join(f"{name} {value:.3f}" for name, value in [*code, *broad]),
        max(value for _, value in code) < min(value for _, value in broad) if known else None,
    )


def _domains(result: Study) -> Claim:
    known = _has(result, *(name for pair in (*WITHIN, *ACROSS) for name in pair))
    within, across = ([(a, b, _pair(result, a, b)) for a, b in group] if known else [] for group in (WITHIN, ACROSS))
    return Claim(
        "3.2",
        "Hot experts overlap within a domain, and little across domains.",
        "each of the paper's four pairs within a domain is above each of its two across",
        "; ".join(f"{a} ~ {b} {value:.2f}" for a, b, value in [*within, *across]),
        min(value for *_, value in within) > max(value for *_, value in across) if known else None,
    )


def _code_cluster(result: Study) -> Claim:
    known = _has(result, *CODE) and len(result["datasets"]) > len(CODE)
    branch = next((names for names in clusters(result["overlap"]) if set(CODE) <= names), set()) if known else set()
    others = sorted(branch - set(CODE))
    return Claim(
        "3.2",
        "Code data sets cluster together.",
        f"one branch of the clustering holds {', '.join(CODE)} and no other",
        (f"the smallest branch with all three also holds {', '.join(others)}" if others else "it does")
        if known
        else "",
        not others if known else None,
    )


def _specialised(result: Study) -> Claim:
    matrix, names = result["overlap"]["jaccard"], result["overlap"]["names"]
    pairs = [matrix[i][j] for i in range(len(names)) for j in range(i)]
    stable = [row["stability"]["mean"] for row in result["datasets"].values() if "stability" in row]
    known = bool(pairs and stable)
    mean = sum(pairs) / len(pairs) if known else 0.0
    return Claim(
        "3.2",
        "The router expresses the task, not one fixed set of experts.",
        "the mean overlap of two data sets is below the lowest of a data set with its own 10% subsamples",
        f"mean of two {mean:.2f} (highest {max(pairs):.2f}), lowest with itself {min(stable):.2f}" if known else "",
        mean < min(stable) if known else None,
    )


def _depth(result: Study) -> Claim:
    rows = result["datasets"]
    thirds = {name: [third["cv"] for third in row["by_depth"].values()] for name, row in rows.items()}
    known = all(len(values) == 3 and None not in values for values in thirds.values())
    risen = [name for name, values in thirds.items() if min(values[1:]) > values[0]] if known else []
    mean = [sum(values[i] for values in thirds.values()) / len(thirds) for i in range(3)] if known else []
    return Claim(
        "3.2",
        "Skew is higher from the middle layers on than in the first ones.",
        "mean layer CV of the middle and of the late third is above the early third's, on every data set",
        f"on {len(risen)} of {len(thirds)}; means {', '.join(f'{value:.2f}' for value in mean)}" if known else "",
        len(risen) == len(thirds) if known else None,
    )


def _amplification(result: Study) -> Claim:
    cv = result["datasets"]["spider"]["by_layer"]["cv"] if _has(result, "spider") else []
    known = len(cv) > 1 and all(cv)
    cv = cv if known else [1.0]
    peak = max(range(len(cv)), key=cv.__getitem__)
    published = [model["peak_cv"] / model["first_cv"] for model in MODELS.values()]
    return Claim(
        "3.2",
        "From the first layer to the peak, the CV on Spider doubles.",
        f"peak CV over the first layer's is at least 2 (the paper's are {min(published):.1f} to {max(published):.1f})",
        f"{cv[0]:.2f} in the first layer, {cv[peak]:.2f} in layer {result['model']['layers'][peak]}: "
        f"{cv[peak] / cv[0]:.1f} times"
        if known
        else "",
        cv[peak] / cv[0] >= 2 if known else None,
    )


def _stability(result: Study) -> Claim:
    stable = {name: row["stability"] for name, row in result["datasets"].items() if "stability" in row}
    lowest = min(model["stability"] for model in MODELS.values())
    worst = sorted(stable, key=lambda name: stable[name]["mean"])[:3]
    mean = result["mean"].get("stability", 0.0)
    return Claim(
        "3.3",
        "A tenth of the examples finds the same hot experts.",
        f"mean Jaccard at least {lowest:.2f}, and at least 0.90 on each data set but MBPP "
        f"({', '.join(f'{value:.2f}' for value in MBPP_STABILITY.values())} in two of the paper's models)",
        f"mean {mean:.3f}; lowest: "
        + ", ".join(f"{name} {stable[name]['mean']:.2f} (of {stable[name]['subsample']} examples)" for name in worst)
        if stable
        else "",
        mean >= lowest and all(row["mean"] >= 0.9 for name, row in stable.items() if name != "mbpp")
        if stable
        else None,
    )


def _signals(result: Study) -> Claim:
    lowest = MODELS["Qwen1.5-MoE-A2.7B"]["signals_jaccard"]
    value = result["mean"]["signals_jaccard"]
    return Claim(
        "3.3",
        "Count and mass select nearly the same experts.",
        f"mean Jaccard of the two hot sets at least {lowest:.2f}, Qwen's (DeepSeek's "
        f"{MODELS['DeepSeek-MoE-16B']['signals_jaccard']:.2f} is the paper's exception)",
        f"{value:.3f}, Spearman of the scores {result['mean']['signals_spearman'] or float('nan'):.3f}",
        value >= lowest,
    )


def _column(result: Study, key: str) -> dict[str, float]:
    return {name: row[key] for name, row in result["datasets"].items()}


def _has(result: Study, *names: str) -> bool:
    datasets: Mapping[str, object] = result["datasets"]
    return all(name in datasets for name in names)


def _pair(result: Study, a: str, b: str) -> float:
    names = result["overlap"]["names"]
    return result["overlap"]["jaccard"][names.index(a)][names.index(b)]
