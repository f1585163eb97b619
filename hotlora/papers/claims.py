"""What the papers say of trainings, held against the runs: each claim is a rule that code decides.

A claim holds (agrees), does not (differs), or the seeds cannot tell. The rules:

- above and below: the 95% interval of the paired difference lies on that side of 0; on the other side: differs.
- as good: its low end is above −2 points, MoE-Sieve's margin; its high end below −2: differs.
- equivalent: TOST at 2 points below 0.05; the 95% interval outside ±2: differs.
- spread: the ratio of standard deviations is below 1 with its whole 95% interval; above 1 with it: differs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..evaluate.stats import PairedTest, sd_ratio
from .recipe import Recipe
from .result import Number, Result
from .scores import Cell, against, read_cells, task_name

MARGIN = 2.0
VERDICTS = {True: "agrees", False: "differs", None: "cannot tell"}


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper: `row` against `reference` by a rule, in every column of a recipe that has both.

    Attributes:
        recipe: name of the recipe whose runs decide it.
        rule: above, below, as good, equivalent or spread.
        columns: names of the columns that it is about; empty: all.
    """

    where: str
    says: str
    recipe: str
    row: str
    rule: str
    reference: str
    columns: tuple[str, ...] = ()


_T2, _T4, _T5, _T7 = (f"hellora-table-{number}" for number in (2, 4, 5, 7))
_MATH = ("GSM8K",)
CLAIMS = (
    *(
        Claim("HELLoRA 4.3", f"HELLoRA outperforms {label}.", _T2, "hellora", "above", other)
        for other, label in (("lora", "LoRA"), ("fft", "full fine-tuning"), ("dora", "DoRA"), ("lori-d", "LoRI-D"))
    ),
    Claim("HELLoRA 4.3", "HELLoRI-D matches or exceeds LoRI-D.", _T2, "hellori-d", "as good", "lori-d"),
    Claim("HELLoRA 4.3", "HELLoRI-S matches or exceeds LoRI-S.", _T2, "hellori-s", "as good", "lori-s"),
    Claim("HELLoRA 1", "HELLoRI-S reaches LoRA's accuracy.", _T2, "hellori-s", "as good", "lora"),
    Claim("HELLoRA 4.3", "HELLoRI does not overtake HELLoRA.", _T2, "hellori-d", "below", "hellora"),
    *(
        Claim("HELLoRA 4.5.1", f"{label}: hot in each layer beats {told}.", _T4, f"{method}-{rule}", "below", method)
        for rule, told in (("global", "hot over all layers"), ("cold", "cold"))
        for method, label in (("hellora", "HELLoRA"), ("hellori-d", "HELLoRI-D"), ("hellori-s", "HELLoRI-S"))
    ),
    Claim("HELLoRA 4.5.2", "Without attention and router accuracy drops.", _T5, "hellora-pure", "below", "hellora"),
    Claim("HELLoRA 4.5.2", "The router's adapter recovers a part.", _T5, "hellora-gate", "above", "hellora-pure"),
    Claim("HELLoRA 4.5.2", "The gap to full placement remains.", _T5, "hellora-gate", "below", "hellora"),
    Claim("HELLoRA 4.5.3", "A quarter of K experts is noticeably worse.", _T7, "hellora-2of64", "below", "hellora"),
    Claim("HELLoRA 4.5.3", "2 K experts bring little over K.", _T7, "hellora", "equivalent", "hellora-16of64"),
    Claim("MoE-Sieve 5.2", "A quarter of the experts is equivalent to all.", "moe-sieve-table-3", "sieve",
          "equivalent", "sieve-all"),
    Claim("MoE-Sieve 7.1", "A quarter of the experts makes seeds differ less.", "moe-sieve-table-6", "sieve", "spread",
          "sieve-all"),
    Claim("MoE-Sieve 6.1", "Random is worse at 25%.", "moe-sieve-section-6.1", "sieve-random", "below", "sieve"),
    Claim("MoE-Sieve 6.1", "Random is worse at 12.5%.", "moe-sieve-section-6.1", "sieve-random-8of64", "below",
          "sieve-8of64"),
    Claim("MoE-Sieve 6.1", "Random 25% is worse than hot 12.5%.", "moe-sieve-section-6.1", "sieve-random", "below",
          "sieve-8of64"),
    Claim("MoE-Sieve 6.2", "Greedy budgets do not improve on the same k in each layer.", "moe-sieve-table-5",
          "sieve", "as good", "sieve-greedy"),
    Claim("MoE-Sieve 6.2", "A coverage of 60% is no better than 25%.", "moe-sieve-section-6.2", "sieve", "as good",
          "sieve-cov60"),
    Claim("MoE-Sieve 7.2", "Half of the experts is as good as all.", "moe-sieve-figure-4", "sieve-32of64", "as good",
          "sieve-all"),
    Claim("MoE-Sieve 7.3", "Cold fillers add noise: at one budget, hot and random experts are worse than hot ones.",
          "moe-sieve-section-7.3", "sieve-half-random", "below", "sieve"),
    Claim("MoE-Sieve 7.3", "Cold fillers add noise: hot ones alone make seeds differ less.", "moe-sieve-section-7.3",
          "sieve", "spread", "sieve-half-random"),
    *(
        Claim(where, says, "moe-sieve-experts-alone", f"sieve-pure-{name}", "below", "sieve-pure-hot")
        for name, where, says in (
            ("random", "MoE-Sieve 6.1", "Random is worse, with adapters on experts alone."),
            ("cold", "HELLoRA 4.5.1", "Cold is worse, with adapters on experts alone."),
            ("global", "HELLoRA 4.5.1", "Hot over all layers is worse, with adapters on experts alone."),
            ("hot+random", "MoE-Sieve 7.3", "Hot and random are worse than hot, with adapters on experts alone."),
        )
    ),
    Claim("MoE-Sieve 6.2", "Greedy does not improve on uniform, with adapters on experts alone.",
          "moe-sieve-experts-alone", "sieve-pure-hot", "as good", "sieve-pure-greedy"),
)  # fmt: skip


def claims_result(recipes: Mapping[str, Recipe], folder: Path) -> Result | None:
    """Every claim on every task that has the runs to decide it; None where none has."""
    rows: list[list[str]] = []
    numbers: list[dict[str, Number]] = []
    runs = {name: read_cells(recipes[name], folder) for name in {claim.recipe for claim in CLAIMS}}
    for claim in CLAIMS:
        recipe, cells = recipes[claim.recipe], runs[claim.recipe]
        for column in recipe.columns:
            pair = [cells.get((name, column.name)) for name in (claim.row, claim.reference)]
            if (claim.columns and column.name not in claim.columns) or pair[0] is None or pair[1] is None:
                continue
            here, holds = decide(claim.rule, pair[0], pair[1])
            rows.append([claim.where, claim.says, task_name(column), claim.rule, here, VERDICTS[holds]])
            numbers.append(
                {"where": claim.where, "claim": claim.says, "model": column.model, "data": column.data,
                 "row": claim.row, "rule": claim.rule, "reference": claim.reference, "here": here,
                 "verdict": VERDICTS[holds]}
            )  # fmt: skip
    if not rows:
        return None
    agree, differ, untold = (sum(row[-1] == word for row in rows) for word in VERDICTS.values())
    told = f"{agree} of {len(rows)} agree, {differ} differ, {untold} cannot be told"
    rules = [line.removeprefix("- ") for line in (__doc__ or "").splitlines() if line.startswith("- ")]
    return Result(
        "claims", f"The papers' claims: {told}", "Each claim is decided by a rule, on each task by itself",
        ["section", "the paper says", "task", "rule", "here, in points", ""], rows, numbers, rules,
        texts=6,
    )  # fmt: skip


def decide(rule: str, cell: Cell, reference: Cell) -> tuple[str, bool | None]:
    """What the runs show, in words, and whether the claim holds; None: they cannot tell."""
    if rule == "spread":
        ratio = sd_ratio(cell.summary, reference.summary)
        if ratio.ratio is None or ratio.interval is None:
            return ratio.reason, None
        low, high = ratio.interval
        return f"ratio {ratio.ratio:.2f} [{low:.2f}, {high:.2f}]", True if high < 1 else False if low > 1 else None
    test = against(cell, reference)
    if test is None or test.interval is None:
        return test.reason if test else "no seed in common", None
    low, high = test.interval
    return f"{test.mean:+.1f} [{low:.1f}, {high:.1f}], {test.n} seeds", _RULES[rule](test, low, high)


def _above(test: PairedTest, low: float, high: float) -> bool | None:
    return True if low > 0 else False if high < 0 else None


def _below(test: PairedTest, low: float, high: float) -> bool | None:
    return True if high < 0 else False if low > 0 else None


def _as_good(test: PairedTest, low: float, high: float) -> bool | None:
    return True if low > -MARGIN else False if high < -MARGIN else None


def _equivalent(test: PairedTest, low: float, high: float) -> bool | None:
    p = test.tost[MARGIN]
    return True if p is not None and p < 0.05 else False if low > MARGIN or high < -MARGIN else None


_RULES: dict[str, Callable[[PairedTest, float, float], bool | None]] = {
    "above": _above, "below": _below, "as good": _as_good, "equivalent": _equivalent,
}  # fmt: skip
