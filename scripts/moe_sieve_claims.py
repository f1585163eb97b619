"""MoE-Sieve's sentences on its trainings, tested on all of them: also on those of which it prints no number."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moe_sieve_data import Scores
from moe_sieve_trainings import paired

from hotlora.evaluation.stats import holm, mean_sd, sd_ratio

ALL, MARGIN, ALPHA = "full_lora", 2, 0.05  # points: MoE-Sieve's own margin
QUARTER = {"olmoe": "hotk16", "qwen": "hotk15"}
GREEDY = "budgetp25_bcount"


@dataclass(frozen=True)
class Test:
    """One condition against another, paired by seed. Points; p values as they are, and by Holm over all tests."""

    model: str
    task: str
    a: str
    b: str
    n: int
    mean: float
    low: float
    high: float
    p: float
    p_holm: float
    p_equivalent: float
    p_equivalent_holm: float
    sd_ratio: float
    sd_low: float
    sd_high: float


@dataclass(frozen=True)
class Claim:
    """rule: above or below (a against b, by the t test), equivalent (TOST at MARGIN), spread (sd of a below b's)."""

    section: str
    says: str
    rule: str
    pairs: tuple[tuple[str, str, str, str], ...]


def _pairs(
    a: str, b: str = ALL, tasks: Sequence[str] = ("gsm8k", "hellaswag", "spider")
) -> tuple[tuple[str, str, str, str], ...]:
    """On both models; "quarter" is a model's own 25%."""
    return tuple(
        (model, task, *(QUARTER[model] if name == "quarter" else name for name in (a, b)))
        for model in QUARTER
        for task in tasks
    )


def _olmoe(*pairs: tuple[str, str, str]) -> tuple[tuple[str, str, str, str], ...]:
    return tuple(("olmoe", *pair) for pair in pairs)


CLAIMS = (
    Claim("5.2", "A quarter of the experts is equivalent to all.", "equivalent", _pairs("quarter")),
    Claim("6.1", "Random experts are worse, at 16 and at 8.", "above",
          _olmoe(("gsm8k", "hotk16", "randk16"), ("gsm8k", "hotk8", "randk8"))),
    Claim("6.1", "16 random experts are worse than 8 hot ones.", "above", _olmoe(("gsm8k", "hotk8", "randk16"))),
    Claim("6.2", "Greedy budgets make no difference.", "no difference", _pairs(GREEDY, "quarter")),
    Claim("6.2", "A coverage of 60% is comparable to 25%.", "equivalent",
          _olmoe(("gsm8k", "cov60", "hotk16"), ("hellaswag", "cov60", "hotk16"))),
    Claim("4", "Very few experts underfit.", "below",
          _olmoe(("gsm8k", "hotk4", ALL), *((task, "hotk8", ALL) for task in ("gsm8k", "hellaswag", "spider")))),
    Claim("7.2", "From 16 experts on the accuracy is that of all.", "equivalent",
          _olmoe(*(("gsm8k", f"hotk{k}", ALL) for k in (16, 18, 20, 22, 24, 32, 48)))),
    Claim("7.2", "On HellaSwag 32 experts exceed all.", "above", _olmoe(("hellaswag", "hotk32", ALL))),
    Claim("7.1", "A quarter of the experts makes seeds differ less.", "spread", _pairs("quarter")),
    Claim("7.2", "Several budgets between make seeds differ less than all experts do.", "spread",
          _olmoe(*(("gsm8k", f"hotk{k}", ALL) for k in (12, 14, 16, 18, 20, 22, 24, 32, 48)))),
)  # fmt: skip


def tests(scores: Scores) -> list[dict[str, Any]]:
    """Every condition of several seeds against all experts, and the pairs that a claim names."""
    every = [
        (model, task, condition, ALL)
        for model, tasks in scores.items()
        for task, conditions in tasks.items()
        for condition, runs in sorted(conditions.items())
        if condition != ALL and len(runs) > 1
    ]
    named = [pair for claim in CLAIMS for pair in claim.pairs]
    made = [(pair, _test(scores, *pair)) for pair in dict.fromkeys([*every, *named])]
    there = [(pair, test) for pair, test in made if test]
    corrected = [holm([test[key] for _, test in there]) for key in ("p", "p_equivalent")]
    return [
        asdict(Test(*pair, **test, p_holm=p, p_equivalent_holm=equivalent))
        for (pair, test), p, equivalent in zip(there, *corrected, strict=True)
    ]


def _test(scores: Scores, model: str, task: str, a: str, b: str) -> dict[str, Any] | None:
    runs = [scores.get(model, {}).get(task, {}).get(condition, {}) for condition in (a, b)]
    test = paired(*runs)
    if test is None or test.interval is None:
        return None  # no spread
    ratio = sd_ratio(*(mean_sd(list(some.values())) for some in runs))
    assert ratio.interval is not None
    found = {
        "n": test.n, "mean": test.mean, "low": test.interval.low, "high": test.interval.high, "p": test.p,
        "p_equivalent": test.tost[MARGIN], "sd_ratio": ratio.ratio, "sd_low": ratio.interval.low,
        "sd_high": ratio.interval.high,
    }  # fmt: skip
    return {name: float(f"{value:.6g}") if name != "n" else value for name, value in found.items()}


def verdict(claim: Claim, test: dict[str, Any]) -> str:
    """agrees, differs or cannot tell, at 0.05 after Holm; a ratio of deviations by its 95% interval."""
    if claim.rule == "spread":
        return "agrees" if test["sd_high"] < 1 else "differs" if test["sd_low"] > 1 else "cannot tell"
    is_apart = test["p_holm"] < ALPHA
    if claim.rule == "equivalent":
        outside = is_apart and abs(test["mean"]) > MARGIN
        return "agrees" if test["p_equivalent_holm"] < ALPHA else "differs" if outside else "cannot tell"
    if claim.rule == "no difference":
        is_same = test["p_equivalent_holm"] < ALPHA
        return "differs" if is_apart else "agrees" if is_same else "cannot tell"
    if not is_apart:
        return "cannot tell"
    return "agrees" if (test["mean"] > 0) == (claim.rule == "above") else "differs"
