"""MoE-Sieve's tables and figures that trainings make, and the experiment that it leaves to others.

Scores in points; most of those in its tables 3, 5 and 10 are lost in the text that is to be had, and left out.
"""

from typing import Any

from .recipe import Column, Recipe, Row
from .settings import QWEN, SIEVE_TASKS, Setting, make

_GSM8K = [SIEVE_TASKS["GSM8K"]]
_DROPOUT = {"lora_dropout": 0.05}
_ALL = Row("sieve-all", "all experts", "lora", _DROPOUT, {"HellaSwag": 80.5})
_HOT = Row("sieve", "hot 25%", "sieve", {}, {"GSM8K": 30.4, "HellaSwag": 80.7})


def _hot(k: int, **published: float) -> Row:
    """The hottest k of OLMoE's 64, or as large a share of another model's."""
    if k == 16:
        return _HOT
    return Row(f"sieve-{k}of64", f"hot k = {k} of 64", "sieve", {"fraction": k / 64}, published)


def _rule(name: str, label: str, published: dict[str, float] | None = None, **options: Any) -> Row:
    return Row(f"sieve-{name}", label, "sieve", options, published or {})


_GREEDY = _rule("greedy", "greedy, as many in all", rule="greedy", fraction=0.25)


def _both_models(setting: Setting) -> list[Column]:
    if setting.model is not None:
        return list(SIEVE_TASKS.values())
    return [
        Column(f"{name} {column.name}", model, column.data)
        for name, model in (("OLMoE", _GSM8K[0].model), ("Qwen", QWEN)) for column in SIEVE_TASKS.values()
    ]  # fmt: skip


def _main(setting: Setting, name: str, title: str, where: str, view: str) -> Recipe:
    return make(
        "moe-sieve", setting, name, title, f"MoE-Sieve, {where}", _both_models(setting), [_ALL, _HOT], view=view,
        reference=_ALL.name,
    )  # fmt: skip


def table_3(setting: Setting) -> Recipe:
    """A quarter of the experts against all."""
    return _main(setting, "table-3", "A quarter of the experts against all", "section 5.2, table 3", "pairs")


def table_6(setting: Setting) -> Recipe:
    """Standard deviations over seeds, of the same runs."""
    return _main(setting, "table-6", "How much seeds differ", "section 7.1, table 6", "spread")


def table_8(setting: Setting) -> Recipe:
    """Equivalence tests, of the same runs."""
    return _main(setting, "table-8", "Equivalence tests", "appendix B, table 8", "equivalence")


def table_5(setting: Setting) -> Recipe:
    """As many experts in all, spread over layers by greedy coverage."""
    return make(
        "moe-sieve", setting, "table-5", "Greedy budgets over layers", "MoE-Sieve, section 6.2, table 5",
        _both_models(setting), [_HOT, _GREEDY], view="pairs", reference=_HOT.name,
    )  # fmt: skip


def section_6_1(setting: Setting) -> Recipe:
    """Random experts at the same budget."""
    rows = [
        _HOT,
        _rule("random", "random 25%", {"GSM8K": 27.9}, rule="random", fraction=0.25),
        _hot(8, GSM8K=29.1),
        _rule("random-8of64", "random k = 8 of 64", rule="random", fraction=0.125),
    ]
    return make(
        "moe-sieve", setting, "section-6.1", "Random experts at the same budget", "MoE-Sieve, section 6.1",
        _GSM8K, rows, reference=_HOT.name,
    )  # fmt: skip


def section_6_2(setting: Setting) -> Recipe:
    """A coverage of 60% in place of a fixed number; and HELLoRA's controls at the same budget."""
    gsm8k = ("GSM8K",)
    rows = [
        _HOT,
        _GREEDY,
        _rule("cov60", "coverage 60%", {"GSM8K": 30.0, "HellaSwag": 81.1}, rule="coverage", p=0.6),
        _only(_rule("random", "random 25%", {"GSM8K": 27.9}, rule="random", fraction=0.25), gsm8k),
        _only(_rule("global", "hot by index over layers, 25%", rule="global", fraction=0.25), gsm8k),
        _only(_rule("cold", "cold 25%", rule="cold", fraction=0.25), gsm8k),
    ]
    columns = [SIEVE_TASKS[name] for name in (*gsm8k, "HellaSwag")]
    return make(
        "moe-sieve", setting, "section-6.2", "Rules at a quarter of the experts", "MoE-Sieve, section 6.2",
        columns, rows, reference=_HOT.name,
    )  # fmt: skip


def section_7_3(setting: Setting) -> Recipe:
    """The test of the noise hypothesis that the paper leaves to future work: hot experts with cold fillers."""
    rows = [
        _HOT,
        _rule("half-random", "hot 12.5% + random 12.5%", rule="hot+random", fraction=0.25),
        _hot(8),
        _ALL,
    ]
    return make(
        "moe-sieve", setting, "section-7.3", "Hot experts and random fillers at one budget", "MoE-Sieve, section 7.3",
        _GSM8K, rows, reference=_HOT.name,
    )  # fmt: skip


def experts_alone(setting: Setting) -> Recipe:
    """Ours: which experts, where nothing else is adapted, so that attention and router cannot make up for them."""
    rules = {
        "random": "random 25%", "hot+random": "hot 12.5% + random 12.5%", "greedy": "greedy, as many in all",
        "global": "hot by index over layers, 25%", "cold": "cold 25%",
    }  # fmt: skip
    rows = [
        _alone("hot", "hot 25%", fraction=0.25),
        *(_alone(rule, label, rule=rule, fraction=0.25) for rule, label in rules.items()),
        _alone("all", "all experts", rule="all"),
    ]
    return make(
        "moe-sieve", setting, "experts-alone", "Which experts, with adapters on experts alone",
        "Not in the papers: MoE-Sieve's sections 6 and 7.3 without adapters on attention and router",
        _GSM8K, rows, reference="sieve-pure-hot",
    )  # fmt: skip


def _alone(name: str, label: str, **options: Any) -> Row:
    return Row(f"sieve-pure-{name}", label, "sieve", {"placement": "pure", **options})


def figure_4(setting: Setting) -> Recipe:
    """Accuracy over the number of experts."""
    rows = [_hot(4), _hot(8, GSM8K=29.1), _HOT, _hot(32), _hot(48), _ALL]
    return make(
        "moe-sieve", setting, "figure-4", "Accuracy over the number of experts", "MoE-Sieve, section 7.2, figure 4",
        _GSM8K, rows, view="curve", reference=_ALL.name,
    )  # fmt: skip


def table_10(setting: Setting) -> Recipe:
    """The same on the other two tasks."""
    hellaswag, spider = ("HellaSwag",), ("Spider",)
    rows = [_hot(8), _HOT, _only(_hot(24), hellaswag), _only(_hot(32, HellaSwag=81.2), hellaswag), _GREEDY, _ALL]
    return make(
        "moe-sieve", setting, "table-10", "The number of experts on other tasks", "MoE-Sieve, appendix D, table 10",
        [SIEVE_TASKS[name] for name in (*hellaswag, *spider)], rows, view="curve", reference=_ALL.name,
    )  # fmt: skip


def _only(row: Row, columns: tuple[str, ...]) -> Row:
    return Row(row.name, row.label, row.method, row.options, row.published, columns)


RECIPES = {"table-3": table_3, "table-5": table_5, "table-6": table_6, "table-8": table_8, "table-10": table_10,
           "figure-4": figure_4, "section-6.1": section_6_1, "section-6.2": section_6_2,
           "section-7.3": section_7_3, "experts-alone": experts_alone}  # fmt: skip
