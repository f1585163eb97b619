"""MoE-Sieve's tables and figures that trainings make, and the experiment that it leaves to others.

Scores in points. Where the paper prints a condition twice (tables 3, 5 and 10), the means are the same.
"""

from dataclasses import replace
from typing import Any

from ..report.published import COV60, PAIRS, RANDOM, SWEEP
from .recipe import Row
from .settings import QWEN, SIEVE_TASKS, recipe

_GSM8K, _HELLASWAG, _SPIDER = (SIEVE_TASKS[name] for name in ("GSM8K", "HellaSwag", "Spider"))
_BOTH_MODELS = [
    replace(column, name=f"{name} {column.name}", model=model)
    for name, model in (("OLMoE", _GSM8K.model), ("Qwen", QWEN))
    for column in SIEVE_TASKS.values()
]


def _pairs(what: str) -> dict[str, float]:
    """Column -> mean: of both models, and of OLMoE where a column names a task alone."""
    means = {(model, task): scores[what][0] for (model, task), scores in PAIRS.items()}
    names = {"OLMoE ": "OLMoE-1B-7B", "Qwen ": "Qwen1.5-MoE-A2.7B", "": "OLMoE-1B-7B"}
    return {f"{short}{task}": means[model, task.lower()] for short, model in names.items() for task in SIEVE_TASKS}


def _row(name: str, label: str, published: dict[str, float] | None = None, only: str = "", **options: Any) -> Row:
    """only: the one column that has this row."""
    return Row(f"sieve-{name}", label, "sieve", options, published or {}, (only,) if only else ())


def _hot(k: int, only: str = "", **published: float) -> Row:
    """The hottest k of OLMoE's 64, or as large a share of another model's."""
    return _row(f"{k}of64", f"hot k = {k} of 64", published, only, fraction=k / 64)


_ALL = Row("sieve-all", "all experts", "lora", {"lora_dropout": 0.05}, _pairs("all"))
_QUARTER = Row("sieve", "hot 25%", "sieve", {}, _pairs("hot"))
_EIGHTH = _hot(8, GSM8K=29.1, HellaSwag=79.0, Spider=36.5)
_GREEDY = _row("greedy", "greedy, as many in all", _pairs("greedy"), rule="greedy", fraction=0.25)
_RANDOM = _row("random", "random 25%", {"GSM8K": 27.9}, rule="random", fraction=0.25)
_RANDOM_EIGHTH = _row("random-8of64", "random k = 8 of 64", {"GSM8K": 27.0}, rule="random", fraction=0.125)

_AT_ONE_BUDGET = [
    replace(row, printed={"sd": RANDOM[k][what][1]})
    for row, k, what in (
        (_QUARTER, 16, "hot"), (_RANDOM, 16, "random"), (_EIGHTH, 8, "hot"), (_RANDOM_EIGHTH, 8, "random"),
    )
]  # fmt: skip
# A coverage of 60% in place of a fixed number; and HELLoRA's controls at the same budget.
_RULES = [
    _QUARTER,
    _GREEDY,
    _row(
        "cov60",
        "coverage 60%",
        {task: COV60[task.lower()][0] for task in ("GSM8K", "HellaSwag")},
        rule="coverage",
        p=0.6,
    ),
    replace(_RANDOM, only=("GSM8K",)),
    _row("global", "hot by index over layers, 25%", only="GSM8K", rule="global", fraction=0.25),
    _row("cold", "cold 25%", only="GSM8K", rule="cold", fraction=0.25),
]
# The test of the noise hypothesis that the paper leaves to future work: hot experts with cold fillers.
_FILLERS = [
    _QUARTER,
    _row("half-random", "hot 12.5% + random 12.5%", rule="hot+random", fraction=0.25),
    replace(_EIGHTH, published={}),
    _ALL,
]
# Ours: where nothing else is adapted, so that attention and router cannot make up for the experts.
_ALONE = [
    _row(f"pure-{name}", label, placement="pure", **options)
    for name, label, options in (
        ("hot", "hot 25%", {"fraction": 0.25}),
        ("random", "random 25%", {"rule": "random", "fraction": 0.25}),
        ("hot+random", "hot 12.5% + random 12.5%", {"rule": "hot+random", "fraction": 0.25}),
        ("greedy", "greedy, as many in all", {"rule": "greedy", "fraction": 0.25}),
        ("global", "hot by index over layers, 25%", {"rule": "global", "fraction": 0.25}),
        ("cold", "cold 25%", {"rule": "cold", "fraction": 0.25}),
        ("all", "all experts", {"rule": "all"}),
    )
]
_NUMBERS = [_hot(4), _EIGHTH, _QUARTER, _hot(32), _hot(48), _ALL]
_NUMBERS_ELSEWHERE = [
    replace(row, printed={f"sd, {task}": SWEEP[task.lower()][what][1] for task in ("HellaSwag", "Spider")
                          if what in SWEEP[task.lower()]})
    for row, what in (
        (_EIGHTH, "8"), (_QUARTER, "16"), (_hot(24, "HellaSwag", HellaSwag=80.6), "24"),
        (_hot(32, "HellaSwag", HellaSwag=81.2), "32"), (_GREEDY, "greedy"), (_ALL, "all"),
    )
]  # fmt: skip
_AGAINST_ALL: dict[str, Any] = {"columns": _BOTH_MODELS, "rows": [_ALL, _QUARTER], "reference": _ALL.name}

RECIPES = {
    "moe-sieve-table-3": recipe("A quarter of the experts against all", "MoE-Sieve, section 5.2, table 3",
                                view="pairs", **_AGAINST_ALL),
    "moe-sieve-table-5": recipe("Greedy budgets over layers", "MoE-Sieve, section 6.2, table 5", _BOTH_MODELS,
                                [_QUARTER, _GREEDY], view="pairs", reference=_QUARTER.name),
    "moe-sieve-table-6": recipe("How much seeds differ", "MoE-Sieve, section 7.1, table 6", view="spread",
                                **_AGAINST_ALL),
    "moe-sieve-table-8": recipe("Equivalence tests", "MoE-Sieve, appendix B, table 8", view="equivalence",
                                **_AGAINST_ALL),
    "moe-sieve-table-10": recipe("The number of experts on other tasks", "MoE-Sieve, appendix D, table 10",
                                 [_HELLASWAG, _SPIDER], _NUMBERS_ELSEWHERE, view="curve", reference=_ALL.name),
    "moe-sieve-figure-4": recipe("Accuracy over the number of experts", "MoE-Sieve, section 7.2, figure 4", [_GSM8K],
                                 _NUMBERS, view="curve", reference=_ALL.name),
    "moe-sieve-section-6.1": recipe("Random experts at the same budget", "MoE-Sieve, section 6.1", [_GSM8K],
                                    _AT_ONE_BUDGET, reference=_QUARTER.name),
    "moe-sieve-section-6.2": recipe("Rules at a quarter of the experts", "MoE-Sieve, section 6.2",
                                    [_GSM8K, _HELLASWAG], _RULES, reference=_QUARTER.name),
    "moe-sieve-section-7.3": recipe("Hot experts and random fillers at one budget", "MoE-Sieve, section 7.3",
                                    [_GSM8K], _FILLERS, reference=_QUARTER.name),
    "moe-sieve-experts-alone": recipe(
        "Which experts, with adapters on experts alone",
        "Not in the papers: MoE-Sieve's sections 6 and 7.3 without adapters on attention and router",
        [_GSM8K], _ALONE, reference="sieve-pure-hot",
    ),
}  # fmt: skip
