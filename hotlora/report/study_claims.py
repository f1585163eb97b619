"""What MoE-Sieve's section 3 says, held against a study's numbers: each claim is a rule that code decides."""

from collections.abc import Callable
from dataclasses import dataclass

from ..routing.study import Study, clusters
from .published import MBPP_STABILITY, MODELS, RATIOS

CODE = ("spider", "codealpaca", "mbpp")
BROAD = ("hellaswag", "wikitext2")
WITHIN = (("mbpp", "codealpaca"), ("spider", "codealpaca"), ("arc_challenge", "mmlu"), ("piqa", "hellaswag"))
ACROSS = (("mbpp", "wikitext2"), ("spider", "wikitext2"))

Found = tuple[str, bool]
"""What was found, in words, and whether the claim holds."""


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
    return [Claim(section, says, rule, *(decide(result) or ("", None))) for section, says, rule, decide in _CLAIMS]


def _gap(result: Study) -> Found | None:
    ratios = {name: ratio for name, ratio in _column(result, "ratio").items() if ratio}  # none where global CV is 0
    if not ratios:
        return None
    low, high = (pick(ratios, key=ratios.__getitem__) for pick in (min, max))
    return f"ratios from {ratios[low]:.1f} ({low}) to {ratios[high]:.1f} ({high})", ratios[low] >= RATIOS[0]


def _coverage(result: Study) -> Found:
    value = result["mean"]["coverage"]
    return f"{value:.1%}", value >= _least("coverage")


def _cold_tail(result: Study) -> Found:
    shares = _column(result, "cold_share")
    name = min(shares, key=shares.__getitem__)
    told = f"lowest {shares[name]:.1%} ({name}), mean {result['mean']['cold_share']:.1%}"
    return told, shares[name] >= _least("cold_share")


def _spider_concentrated(result: Study) -> Found | None:
    cvs = _column(result, "layer_cv")
    if "spider" not in cvs or len(cvs) <= 3:
        return None
    ranked = sorted(cvs, key=lambda name: -cvs[name])
    rank = ranked.index("spider") + 1
    return f"rank {rank} of {len(cvs)}; highest: {', '.join(ranked[:3])}", rank <= 3


def _entropy(result: Study) -> Found | None:
    if not _has(result, *CODE, *BROAD):
        return None
    values = _column(result, "entropy")
    told = "; ".join(f"{name} {values[name]:.3f}" for name in (*CODE, *BROAD))
    return told, max(values[name] for name in CODE) < min(values[name] for name in BROAD)


def _domains(result: Study) -> Found | None:
    if not _has(result, *(name for pair in (*WITHIN, *ACROSS) for name in pair)):
        return None
    names, matrix = result["overlap"]["names"], result["overlap"]["jaccard"]
    overlap = {(a, b): matrix[names.index(a)][names.index(b)] for a, b in (*WITHIN, *ACROSS)}
    told = "; ".join(f"{a} ~ {b} {value:.2f}" for (a, b), value in overlap.items())
    return told, min(overlap[pair] for pair in WITHIN) > max(overlap[pair] for pair in ACROSS)


def _code_cluster(result: Study) -> Found | None:
    if not _has(result, *CODE) or len(result["datasets"]) == len(CODE):
        return None
    branch = next(names for names in clusters(result["overlap"]) if set(CODE) <= names)
    others = sorted(branch - set(CODE))
    return f"the smallest branch with all three also holds {', '.join(others)}" if others else "it does", not others


def _specialised(result: Study) -> Found | None:
    matrix = result["overlap"]["jaccard"]
    pairs = [matrix[i][j] for i in range(len(matrix)) for j in range(i)]
    stable = [row["stability"]["mean"] for row in result["datasets"].values() if "stability" in row]
    if not pairs or not stable:
        return None
    mean = sum(pairs) / len(pairs)
    told = f"mean of two {mean:.2f} (highest {max(pairs):.2f}), lowest with itself {min(stable):.2f}"
    return told, mean < min(stable)


def _depth(result: Study) -> Found | None:
    thirds = [[third["cv"] for third in row["by_depth"].values()] for row in result["datasets"].values()]
    if not all(len(values) == 3 and None not in values for values in thirds):
        return None
    risen = sum(min(values[1:]) > values[0] for values in thirds)
    means = ", ".join(f"{sum(values) / len(thirds):.2f}" for values in zip(*thirds, strict=True))
    return f"on {risen} of {len(thirds)}; means {means}", risen == len(thirds)


def _amplification(result: Study) -> Found | None:
    cv = result["datasets"]["spider"]["by_layer"]["cv"] if _has(result, "spider") else []
    if len(cv) < 2 or not all(cv):
        return None
    peak = max(range(len(cv)), key=cv.__getitem__)
    times = cv[peak] / cv[0]
    layer = result["model"]["layers"][peak]
    return f"{cv[0]:.2f} in the first layer, {cv[peak]:.2f} in layer {layer}: {times:.1f} times", times >= 2


def _stability(result: Study) -> Found | None:
    stable = {name: row["stability"] for name, row in result["datasets"].items() if "stability" in row}
    if not stable:
        return None
    worst = sorted(stable, key=lambda name: stable[name]["mean"])[:3]
    lowest = ", ".join(f"{name} {stable[name]['mean']:.2f} (of {stable[name]['subsample']} examples)" for name in worst)
    mean = result["mean"]["stability"]
    holds = mean >= _least("stability") and all(row["mean"] >= 0.9 for name, row in stable.items() if name != "mbpp")
    return f"mean {mean:.3f}; lowest: {lowest}", holds


def _signals(result: Study) -> Found | None:
    value, spearman = result["mean"]["signals_jaccard"], result["mean"]["signals_spearman"] or float("nan")
    if value is None:  # imported profiles of counts alone
        return None
    return f"{value:.3f}, Spearman of the scores {spearman:.3f}", value >= _QWEN_SIGNALS


def _column(result: Study, key: str) -> dict[str, float]:
    return {name: row[key] for name, row in result["datasets"].items()}


def _has(result: Study, *names: str) -> bool:
    return all(name in result["datasets"] for name in names)


def _least(key: str) -> float:
    """Of the paper's models."""
    return min(model[key] for model in MODELS.values())


_QWEN_SIGNALS = MODELS["Qwen1.5-MoE-A2.7B"]["signals_jaccard"]
_RISES = [model["peak_cv"] / model["first_cv"] for model in MODELS.values()]
_MBPP = ", ".join(f"{value:.2f}" for value in MBPP_STABILITY.values())
# Section, what it says, the rule, and what decides.
_CLAIMS: list[tuple[str, str, str, Callable[[Study], Found | None]]] = [
    ("3.1", "Inside a layer routing is several times as skewed as over all layers, on every data set.",
     f"the lowest ratio of layer CV to global CV is at least {RATIOS[0]}, the paper's lowest", _gap),
    ("3.2", "A quarter of the experts takes far more than a quarter of the routing.",
     f"mean coverage of the hot 25% is at least {_least('coverage'):.1%}, the least of the paper's models", _coverage),
    ("3.2", "A cold tail persists on every data set.",
     f"the lowest cold share of a data set is at least {_least('cold_share'):.1%}, the least of the paper's means",
     _cold_tail),
    ("3.2", "Spider is among the most concentrated data sets.", "its mean layer CV is one of the three highest",
     _spider_concentrated),
    ("3.2", "Code has the lowest entropy over experts, broad text a higher one.",
     f"each of {', '.join(CODE)} is below each of {', '.join(BROAD)}", _entropy),
    ("3.2", "Hot experts overlap within a domain, and little across domains.",
     "each of the paper's four pairs within a domain is above each of its two across", _domains),
    ("3.2", "Code data sets cluster together.",
     f"one branch of the clustering holds {', '.join(CODE)} and no other", _code_cluster),
    ("3.2", "The router expresses the task, not one fixed set of experts.",
     "the mean overlap of two data sets is below the lowest of a data set with its own 10% subsamples", _specialised),
    ("3.2", "Skew is higher from the middle layers on than in the first ones.",
     "mean layer CV of the middle and of the late third is above the early third's, on every data set", _depth),
    ("3.2", "From the first layer to the peak, the CV on Spider doubles.",
     f"peak CV over the first layer's is at least 2 (the paper's are {min(_RISES):.1f} to {max(_RISES):.1f})",
     _amplification),
    ("3.3", "A tenth of the examples finds the same hot experts.",
     f"mean Jaccard at least {_least('stability'):.2f}, and at least 0.90 on each data set but MBPP ({_MBPP} in two of "
     "the paper's models)", _stability),
    ("3.3", "Count and mass select nearly the same experts.",
     f"mean Jaccard of the two hot sets at least {_QWEN_SIGNALS:.2f}, Qwen's (DeepSeek's "
     f"{MODELS['DeepSeek-MoE-16B']['signals_jaccard']:.2f} is the paper's exception)", _signals),
]  # fmt: skip
