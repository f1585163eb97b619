"""What MoE-Sieve's section 3 says, held against a study's numbers: each claim is a rule that code decides."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isnan
from typing import Any

from ..routing.study import Study, clusters
from .published import MBPP_STABILITY, MODELS, RATIOS


@dataclass(frozen=True)
class Domains:
    """What the data sets of a study are about, for the claims that name some."""

    code: tuple[str, ...]
    broad: tuple[str, ...]
    within: tuple[tuple[str, str], ...]
    """pairs of one domain"""
    across: tuple[tuple[str, str], ...]
    """pairs of two"""

    def are_in(self, result: Study) -> bool:
        pairs = (*self.within, *self.across)
        return _has(result, *self.code, *self.broad, *(name for pair in pairs for name in pair))


PAPERS = Domains(
    code=("spider", "codealpaca", "mbpp"),
    broad=("hellaswag", "wikitext2"),
    within=(("mbpp", "codealpaca"), ("spider", "codealpaca"), ("arc_challenge", "mmlu"), ("piqa", "hellaswag")),
    across=(("mbpp", "wikitext2"), ("spider", "wikitext2")),
)
"""MoE-Sieve's ten data sets; the pairs are those that it names"""
TEXTS = Domains(
    code=("code_instruct", "code_raw"),
    broad=("web", "wiki"),
    within=(("code_instruct", "code_raw"), ("math", "reasoning"), ("news", "web")),
    across=(("code_instruct", "wiki"), ("code_raw", "wiki")),
)
"""the ten kinds of text of GLM-5.2's counts"""

COLD_TAIL = 0.01
"""of the experts: a smaller share of cold ones is no tail"""

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


def _layers_even_out(result: Study) -> Found | None:
    """None without any skew, or of a study made before the shuffles were."""
    below = [row.get("shuffled", {}).get("below") for row in result["datasets"].values()]
    if any(value is None or isnan(value) for value in below):
        return None
    few = sum(value <= 0.05 for value in below)
    ratio, chance = result["mean"]["ratio"], result["mean"]["shuffled_ratio"]
    told = f"on {few} of {len(below)}; the ratio is {ratio:.1f}, that of shuffled experts {chance:.1f}"
    return told, 2 * few > len(below)


def _cold_tail(result: Study) -> Found:
    shares = _column(result, "cold_share")
    name = min(shares, key=shares.__getitem__)
    told = f"lowest {shares[name]:.1%} ({name}), mean {result['mean']['cold_share']:.1%}"
    return told, shares[name] >= COLD_TAIL


def _spider_concentrated(result: Study) -> Found | None:
    cvs = _column(result, "layer_cv")
    if "spider" not in cvs or len(cvs) <= 3:
        return None
    ranked = sorted(cvs, key=lambda name: -cvs[name])
    rank = ranked.index("spider") + 1
    return f"rank {rank} of {len(cvs)}; highest: {', '.join(ranked[:3])}", rank <= 3


def _entropy(result: Study) -> Found | None:
    if (domains := _domains_of(result)) is None:
        return None
    values = _column(result, "entropy")
    told = "; ".join(f"{name} {values[name]:.3f}" for name in (*domains.code, *domains.broad))
    return told, max(values[name] for name in domains.code) < min(values[name] for name in domains.broad)


def _within_domains(result: Study) -> Found | None:
    if (domains := _domains_of(result)) is None:
        return None
    names, matrix = result["overlap"]["names"], result["overlap"]["jaccard"]
    pairs = (*domains.within, *domains.across)
    overlap = {(a, b): matrix[names.index(a)][names.index(b)] for a, b in pairs}
    told = "; ".join(f"{a} ~ {b} {value:.2f}" for (a, b), value in overlap.items())
    return told, min(overlap[pair] for pair in domains.within) > max(overlap[pair] for pair in domains.across)


def _code_cluster(result: Study) -> Found | None:
    if (domains := _domains_of(result)) is None:
        return None
    code = set(domains.code)
    branch = next(names for names in clusters(result["overlap"]) if code <= names)
    others = sorted(branch - code)
    if not others:
        return "it does", True
    return f"the smallest branch with all of them also holds {', '.join(others)}", False


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
    thirds = {name: [third["cv"] for third in row["by_depth"].values()] for name, row in result["datasets"].items()}
    if not all(len(values) == 3 and None not in values for values in thirds.values()):
        return None
    not_risen = [name for name, values in thirds.items() if min(values[1:]) <= values[0]]
    means = ", ".join(f"{sum(values) / len(thirds):.2f}" for values in zip(*thirds.values(), strict=True))
    told = f"on {len(thirds) - len(not_risen)} of {len(thirds)}; means {means}"
    return told + (f"; not on {', '.join(not_risen)}" if not_risen else ""), not not_risen


def _amplification(result: Study) -> Found | None:
    cvs = _column(result, "layer_cv")
    name = "spider" if "spider" in cvs else max(cvs, key=cvs.__getitem__)
    cv = result["datasets"][name]["by_layer"]["cv"]
    if len(cv) < 2 or not all(cv):
        return None
    peak = max(range(len(cv)), key=cv.__getitem__)
    times = cv[peak] / cv[0]
    layer = result["model"]["layers"][peak]
    told = f"{name}: {cv[0]:.2f} in the first layer, {cv[peak]:.2f} in layer {layer}: {times:.1f} times"
    return told, times >= 2


def _stability(result: Study) -> Found | None:
    stable = {name: row["stability"] for name, row in result["datasets"].items() if "stability" in row}
    if not stable:
        return None
    worst = sorted(stable, key=lambda name: stable[name]["mean"])[:3]
    of = {name: f"{row['mean']:.2f} ({row['subsample']} of {row['examples']})" for name, row in stable.items()}
    lowest = ", ".join(f"{name} {of[name]}" for name in worst)
    mean = result["mean"]["stability"]
    holds = mean >= _least("stability") and all(row["mean"] >= 0.9 for name, row in stable.items() if name != "mbpp")
    return f"mean {mean:.3f}; lowest: {lowest}", holds


def _signals(result: Study) -> Found | None:
    value, spearman = result["mean"]["signals_jaccard"], result["mean"]["signals_spearman"] or float("nan")
    if value is None:  # imported profiles of counts alone
        return None
    return f"{value:.3f}, Spearman of the scores {spearman:.3f}", value >= _QWEN_SIGNALS


def claims_across(results: Mapping[str, Study]) -> list[Claim]:
    """The claims of section 3.2 that compare models; name -> study. None is tested of fewer than two."""
    return [Claim(section, says, rule, *(decide(results) or ("", None))) for section, says, rule, decide in _ACROSS]


def _absorbed(results: Mapping[str, Study]) -> Found | None:
    """Models with as many shared experts a token as another's count together."""
    by_share: dict[float, list[float]] = {}
    for result in results.values():
        shared, top_k = result["model"]["shared"], result["model"]["num_experts_per_tok"]
        by_share.setdefault(shared / (shared + top_k), []).append(result["mean"]["cold_share"])
    if len(by_share) < 2:
        return None
    cold = {share: sum(values) / len(values) for share, values in sorted(by_share.items())}
    told = "; ".join(f"{share:.0%} shared: {value:.1%} cold" for share, value in cold.items())
    return told, all(a > b for a, b in pairwise(cold.values()))


def _diffuse(results: Mapping[str, Study]) -> Found | None:
    of_models = {name: result for name, result in results.items() if _has(result, *DIFFUSE)}
    if len(of_models) < 2:
        return None
    told, close = [], []
    for label, key in (("", "experts_for_60"), ("shared ones counted as covered: ", "experts_for_60_with_shared")):
        found = {name: [row.get(key) for row in _rows(result, DIFFUSE)] for name, result in of_models.items()}
        if any(None in values for values in found.values()):
            continue
        each = "; ".join(f"{name} {', '.join(f'{value:.1f}' for value in values)}" for name, values in found.items())
        told.append(label + each)
        close.append(all(max(column) <= 1.1 * min(column) for column in zip(*found.values(), strict=True)))
    return ". ".join(told), any(close)


def _rows(result: Study, names: Sequence[str]) -> list[dict[str, Any]]:
    return [result["datasets"][name] for name in names]


DIFFUSE = ("boolq", "mmlu", "wikitext2")
_ACROSS: list[tuple[str, str, str, Callable[[Mapping[str, Study]], Found | None]]] = [
    ("3.2", "Shared experts absorb what would leave routed ones cold.",
     "the larger the part of a token's experts that are shared, the smaller the mean cold share", _absorbed),
    ("3.2", "Diffuse tasks need nearly the same number of routed experts on all architectures.",
     f"experts for 60% of a layer's routing on {', '.join(DIFFUSE)}: at most a tenth apart, with or "
     "without counting shared experts as covered", _diffuse),
]  # fmt: skip


def _column(result: Study, key: str) -> dict[str, float]:
    return {name: row[key] for name, row in result["datasets"].items()}


def _domains_of(result: Study) -> Domains | None:
    return next((domains for domains in (PAPERS, TEXTS) if domains.are_in(result)), None)


def _has(result: Study, *names: str) -> bool:
    return all(name in result["datasets"] for name in names)


def _least(key: str) -> float:
    """Of the paper's models."""
    return min(model[key] for model in MODELS.values())


_QWEN_SIGNALS = MODELS["Qwen1.5-MoE-A2.7B"]["signals_jaccard"]
_CODE, _BROAD = (
    f"{', '.join(ours)} (of the ten texts: {', '.join(texts)})"
    for ours, texts in ((PAPERS.code, TEXTS.code), (PAPERS.broad, TEXTS.broad))
)
_RISES = [model["peak_cv"] / model["first_cv"] for model in MODELS.values()]
_MBPP = ", ".join(f"{value:.2f}" for value in MBPP_STABILITY.values())
# Section, what it says, the rule, and what decides.
_CLAIMS: list[tuple[str, str, str, Callable[[Study], Found | None]]] = [
    ("3.1", "Inside a layer routing is several times as skewed as over all layers, on every data set.",
     f"the lowest ratio of layer CV to global CV is at least {RATIOS[0]}, the paper's lowest", _gap),
    ("1", "Balancing evens an expert's total over the model by letting it lead in other layers than others do.",
     "on most data sets the global CV is below that of 95% of models with the same layers and their experts numbered "
     "at random", _layers_even_out),
    ("3.2", "A quarter of the experts takes far more than a quarter of the routing.",
     f"mean coverage of the hot 25% is at least {_least('coverage'):.1%}, the least of the paper's models", _coverage),
    ("3.2", "A cold tail persists on every data set.",
     f"the lowest cold share of a data set is at least {COLD_TAIL:.0%} of the experts", _cold_tail),
    ("3.2", "Spider is among the most concentrated data sets.", "its mean layer CV is one of the three highest",
     _spider_concentrated),
    ("3.2", "Code has the lowest entropy over experts, broad text a higher one.",
     f"each of {_CODE} is below each of {_BROAD}", _entropy),
    ("3.2", "Hot experts overlap within a domain, and little across domains.",
     "each named pair within a domain (the paper's four; three of the ten texts) is above both across",
     _within_domains),
    ("3.2", "Code data sets cluster together.",
     f"one branch of the clustering holds {_CODE} and no other", _code_cluster),
    ("3.2", "The router expresses the task, not one fixed set of experts.",
     "the mean overlap of two data sets is below the lowest of a data set with its own 10% subsamples", _specialised),
    ("3.2", "Skew is higher from the middle layers on than in the first ones.",
     "mean layer CV of the middle and of the late third is above the early third's, on every data set", _depth),
    ("3.2", "From the first layer to the peak, the CV on Spider doubles.",
     f"peak CV over the first layer's is at least 2, without Spider on the most skewed data set (the paper's are "
     f"{min(_RISES):.1f} to {max(_RISES):.1f})",
     _amplification),
    ("3.3", "A tenth of the examples finds the same hot experts.",
     f"mean Jaccard at least {_least('stability'):.2f}, and at least 0.90 on each data set but MBPP ({_MBPP} in two of "
     "the paper's models)", _stability),
    ("3.3", "Count and mass select nearly the same experts.",
     f"mean Jaccard of the two hot sets at least {_QWEN_SIGNALS:.2f}, Qwen's (DeepSeek's "
     f"{MODELS['DeepSeek-MoE-16B']['signals_jaccard']:.2f} is the paper's exception)", _signals),
]  # fmt: skip
