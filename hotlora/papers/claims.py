"""What the papers say of trainings, held against the runs: each claim is a rule that code decides.

A claim holds (agrees), does not (differs), or the seeds cannot tell. The rules:

- above and below: the 95% interval of the paired difference lies on that side of 0; on the other side: differs.
- as good: its low end is above −2 points, MoE-Sieve's margin; its high end below −2: differs.
- equivalent: TOST at 2 points below 0.05; the 95% interval outside ±2: differs.
- spread: the ratio of standard deviations is below 1 with its whole 95% interval; above 1 with it: differs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..evaluation.stats import sd_ratio
from .cells import Cell, against, read_cells, task_name, unlike
from .recipe import Recipe
from .result import Heading, Result, Shown
from .settings import LABELS

MARGIN = 2.0
VERDICTS = {True: "agrees", False: "differs", None: "cannot tell"}


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper: `row` against `reference` by a rule, in every column of a recipe that has both. Where the
    rule asks for less or more than the sentence, `says` has what is tested in brackets.

    Attributes:
        recipe: name of the recipe whose runs decide it.
        rule: above, below, as good, equivalent or spread.
        times: what `row` has of the reference's experts, where `says` tells a multiple of K; elsewhere the claim is
            left out, for the recipe's rows are shares of all experts.
    """

    where: str
    says: str
    recipe: str
    row: str
    rule: str
    reference: str
    times: float | None = None


_T2, _T4, _T5, _T7 = (f"hellora-table-{number}" for number in (2, 4, 5, 7))
_S61, _S73, _ALONE = "moe-sieve-section-6.1", "moe-sieve-section-7.3", "moe-sieve-experts-alone"
CLAIMS = (
    Claim("HELLoRA 4.3", "HELLoRA outperforms LoRA.", _T2, "hellora", "above", "lora"),
    Claim("HELLoRA 4.3", "HELLoRA outperforms full fine-tuning.", _T2, "hellora", "above", "fft"),
    Claim("HELLoRA 4.3", "HELLoRA outperforms DoRA.", _T2, "hellora", "above", "dora"),
    Claim("HELLoRA 4.3", "HELLoRA outperforms LoRI-D.", _T2, "hellora", "above", "lori-d"),
    Claim("HELLoRA 4.3", "HELLoRI-D matches or exceeds LoRI-D.", _T2, "hellori-d", "as good", "lori-d"),
    Claim("HELLoRA 4.3", "HELLoRI-S matches or exceeds LoRI-S.", _T2, "hellori-s", "as good", "lori-s"),
    Claim("HELLoRA 1", "HELLoRI-S reaches LoRA's accuracy.", _T2, "hellori-s", "as good", "lora"),
    Claim("HELLoRA 4.3", "HELLoRI does not overtake HELLoRA (tested: HELLoRI-D is worse).", _T2, "hellori-d", "below",
          "hellora"),
    *(
        Claim("HELLoRA 4.5.1", f"{LABELS[name]}: hot in each layer beats {told}.", _T4, f"{name}-{rule}", "below", name)
        for rule, told in (("global", "hot over all layers"), ("cold", "cold"))
        for name in ("hellora", "hellori-d", "hellori-s")
    ),
    Claim("HELLoRA 4.5.2", "Without attention and router accuracy drops.", _T5, "hellora-pure", "below", "hellora"),
    Claim("HELLoRA 4.5.2", "The router's adapter recovers a part.", _T5, "hellora-gate", "above", "hellora-pure"),
    Claim("HELLoRA 4.5.2", "The gap to full placement remains.", _T5, "hellora-gate", "below", "hellora"),
    Claim("HELLoRA 4.5.3", "A quarter of K experts is noticeably worse.", _T7, "hellora-2of64", "below", "hellora",
          0.25),
    Claim("HELLoRA 4.5.3", "2 K experts bring little over K.", _T7, "hellora", "equivalent", "hellora-16of64", 0.5),
    Claim("MoE-Sieve 5.2", "A quarter of the experts is equivalent to all.", "moe-sieve-table-3", "sieve",
          "equivalent", "sieve-all"),
    Claim("MoE-Sieve 7.1", "A quarter of the experts makes seeds differ less.", "moe-sieve-table-6", "sieve", "spread",
          "sieve-all"),
    Claim("MoE-Sieve 6.1", "Random is worse at 25%.", _S61, "sieve-random", "below", "sieve"),
    Claim("MoE-Sieve 6.1", "Random is worse at 12.5%.", _S61, "sieve-random-8of64", "below", "sieve-8of64"),
    Claim("MoE-Sieve 6.1", "Random 25% is worse than hot 12.5%.", _S61, "sieve-random", "below", "sieve-8of64"),
    Claim("MoE-Sieve 6.2", "Greedy budgets do not improve on the same k in each layer (tested: that is as good).",
          "moe-sieve-table-5", "sieve", "as good", "sieve-greedy"),
    Claim("MoE-Sieve 6.2", "A coverage of 60% is no better than 25% (tested: 25% is as good).",
          "moe-sieve-section-6.2", "sieve", "as good", "sieve-cov60"),
    Claim("MoE-Sieve 7.2", "Half of the experts is as good as all.", "moe-sieve-figure-4", "sieve-32of64", "as good",
          "sieve-all"),
    Claim("MoE-Sieve 7.3", "Cold fillers add noise: at one budget, hot and random experts are worse than hot ones.",
          _S73, "sieve-half-random", "below", "sieve"),
    Claim("MoE-Sieve 7.3", "Cold fillers add noise: hot ones alone make seeds differ less.", _S73, "sieve", "spread",
          "sieve-half-random"),
    *(
        Claim(where, f"{says}, with adapters on experts alone.", _ALONE, f"sieve-pure-{name}", "below",
              "sieve-pure-hot")
        for name, where, says in (
            ("random", "MoE-Sieve 6.1", "Random is worse"), ("cold", "HELLoRA 4.5.1", "Cold is worse"),
            ("global", "HELLoRA 4.5.1", "Hot over all layers is worse"),
            ("hot+random", "MoE-Sieve 7.3", "Hot and random are worse than hot"),
        )
    ),
    Claim("MoE-Sieve 6.2",
          "Greedy does not improve on uniform, with adapters on experts alone (tested: uniform is as good).", _ALONE,
          "sieve-pure-hot", "as good", "sieve-pure-greedy"),
)  # fmt: skip


def claims_result(recipes: Mapping[str, Recipe], folder: Path) -> Result | None:
    """Every claim on every task that has the runs to decide it; None where none has."""
    table = Shown(["section", "the paper says", "task", "rule", "here, in points", ""], texts=6)
    runs = {name: read_cells(recipes[name], folder) for name in {claim.recipe for claim in CLAIMS}}
    left: dict[str, None] = {}
    for claim in CLAIMS:
        for column in recipes[claim.recipe].columns:
            cell, reference = (runs[claim.recipe].get((row, column.name)) for row in (claim.row, claim.reference))
            if cell is None or reference is None:
                continue
            if told := _other_multiple(claim, cell, reference):
                left[told] = None
                continue
            here, holds = decide(claim.rule, cell, reference)
            table.add(
                [claim.where, claim.says, task_name(column), claim.rule, here, VERDICTS[holds]],
                where=claim.where, claim=claim.says, model=column.model, data=column.data, row=claim.row,
                rule=claim.rule, reference=claim.reference, here=here, verdict=VERDICTS[holds],
            )  # fmt: skip
    if not table.rows:
        return None
    agree, differ, untold = (sum(row[-1] == word for row in table.rows) for word in VERDICTS.values())
    told = f"{agree} of {len(table.rows)} agree, {differ} differ, {untold} cannot be told"
    table.notes = [line.removeprefix("- ") for line in (__doc__ or "").splitlines() if line.startswith("- ")]
    table.notes += left
    where = "Each claim is decided by a rule, on each task by itself"
    return Heading("claims", f"The papers' claims: {told}", where).over(table)


def _other_multiple(claim: Claim, cell: Cell, reference: Cell) -> str:
    """Why a claim on a multiple of K is not decided; empty where the rows are that, or a plan is not there."""
    if (
        claim.times is None
        or not (cell.experts and reference.experts)
        or cell.experts / reference.experts == claim.times
    ):
        return ""
    numbers = f"{cell.experts:g} and {reference.experts:g}"
    return f'Left out: "{claim.says}" Its rows adapt {numbers} experts of a layer here.'


def decide(rule: str, cell: Cell, reference: Cell) -> tuple[str, bool | None]:
    """What the runs show, in words, and whether the claim holds; None: they cannot tell."""
    if reason := unlike(cell, reference):
        return f"not alike: {reason}", None
    if rule == "spread":
        ratio = sd_ratio(cell.summary, reference.summary)
        if ratio.ratio is None or ratio.interval is None:
            return ratio.reason, None
        low, high = ratio.interval
        return f"ratio {ratio.ratio:.2f} [{low:.2f}, {high:.2f}]", True if high < 1 else False if low > 1 else None
    test = against(cell, reference)
    if test is None or test.interval is None:
        return f"{test.mean:+.1f}, {test.reason}" if test else "no seed in common", None
    (low, high), p = test.interval, test.tost[MARGIN]
    agrees, differs = {
        "above": (low > 0, high < 0),
        "below": (high < 0, low > 0),
        "as good": (low > -MARGIN, high < -MARGIN),
        "equivalent": (p is not None and p < 0.05, low > MARGIN or high < -MARGIN),
    }[rule]
    told = f"{test.mean:+.1f} [{low:.1f}, {high:.1f}], {test.n} seeds"
    return told, True if agrees else False if differs else None
