"""HELLoRA's tables and figures that trainings make. Scores are as printed, in points."""

from collections.abc import Callable
from typing import Any

from .recipe import Column, Recipe, Row
from .settings import HELLORA_TASKS, LABELS, MIXTRAL, Setting, recipe

_TRAINED, _SPEED = "trained, %", "samples/s"
_OWN = {"hellora": 0.7, "hellori-d": 0.3, "hellori-s": 0.03}
"""trained parameters in percent, as printed"""
_COLUMNS = list(HELLORA_TASKS.values())
_GSM8K = [HELLORA_TASKS["GSM8K"]]
_MIXTRAL = [Column("GSM8K", MIXTRAL, "gsm8k-lori", "math")]


def _row(
    method: str, percent: float, *scores: float | tuple[float, ...], end: str = "", mark: str = "", **options: Any
) -> Row:
    """percent: trained parameters as printed. scores: on GSM8K, HUMAN (pass@1, 5 and 10), SAFE, as far as there are."""
    published = dict(zip(HELLORA_TASKS, scores, strict=False))
    return Row(method + end, LABELS[method] + mark, method, options, published, printed={_TRAINED: percent})


_BASE = Row("base", "as it is", published={"GSM8K": 1.66, "HUMAN": (13.41, 16.81, 18.17), "SAFE": 66.75})
_OURS = [
    _row("hellora", 0.7, 29.49, (17.87, 22.04, 23.82), 99.06),
    _row("hellori-d", 0.3, 28.42, (16.89, 20.89, 22.21), 98.75),
    _row("hellori-s", 0.03, 25.10, (16.22, 20.27, 21.76), 97.50),
]
_METHODS = [
    _BASE,
    _row("fft", 100, 27.64, (16.4, 21.04, 22.38), 97.32),
    _row("lora", 4.3, 26.37, (16.52, 21.80, 24.03), 98.75),
    _row("dora", 4.35, 26.82, (16.72, 21.93, 23.68), 98.86),
    _row("lori-d", 1.9, 28.22, (16.98, 21.85, 23.75), 96.56),
    _row("lori-s", 0.19, 25.49, (16.46, 20.22, 22.37), 98.44),
    *_OURS,
]
_ON_MIXTRAL = [
    _row("lora", 1.03, 67.73), _row("lori-d", 0.59, 64.84), _row("lori-s", 0.06, 63.98),
    _row("hellora", 0.31, 68.28), _row("hellori-d", 0.17, 64.61), _row("hellori-s", 0.02, 66.17),
]  # fmt: skip
# Hot in each layer, hot over all layers by index (_M), cold (_C).
_WHICH_EXPERTS = _OURS + [
    _row(method, percent, score, end=f"-{rule}", mark=mark, rule=rule, experts_per_layer="top_k")
    for mark, rule, scores in (("_M", "global", (28.51, 23.14, 23.14)), ("_C", "cold", (25.88, 25.19, 23.04)))
    for (method, percent), score in zip(_OWN.items(), scores, strict=True)
]
# Beside the hot experts attention and router are adapted, nothing (_pure), or the router (_gate).
_PLACEMENTS = {
    "pure": [
        (26.46, (17.07, 21.19, 22.78), 98.43), (23.24, (17.07, 20.38, 21.89), 91.25),
        (23.44, (16.15, 20.82, 22.29), 97.81),
    ],
    "gate": [
        (28.03, (17.09, 21.86, 23.28), 97.50), (23.53, (16.95, 21.80, 23.17), 90.32),
        (23.44, (16.06, 21.17, 22.73), 96.56),
    ],
}  # fmt: skip
_PERCENT = {"pure": (0.543, 0.241, 0.020), "gate": (0.558, 0.242, 0.020)}
_BESIDE_EXPERTS = _OURS + [
    _row(method, percent, *scores, end=f"-{placement}", mark=f"_{placement}", placement=placement)
    for placement, all_scores in _PLACEMENTS.items()
    for method, percent, scores in zip(_OWN, _PERCENT[placement], all_scores, strict=True)
]
# A quarter of the router's K, half of it, K and 2 K. The paper's labels Accuracy and Throughput are swapped.
_NUMBERS = [
    Row(name, f"k = {k} of 64", "hellora", options, {"GSM8K": score}, printed={_TRAINED: percent, _SPEED: speed})
    for name, k, options, score, percent, speed in (
        ("hellora-2of64", 2, {"fraction": 2 / 64}, 26.72, 0.27, 20.99),
        ("hellora-4of64", 4, {"fraction": 4 / 64}, 26.97, 0.41, 20.98),
        ("hellora", 8, {}, 29.49, 0.68, 20.08),
        ("hellora-16of64", 16, {"fraction": 16 / 64}, 29.69, 1.21, 16.49),
    )
]

RECIPES: dict[str, Callable[[str, Setting], Recipe]] = {
    "hellora-table-2": recipe("Accuracy of the methods on mathematics, code and safety",
                              "HELLoRA, section 4.3, table 2", _COLUMNS, _METHODS, reference="lora"),
    "hellora-table-3": recipe("Accuracy on another model", "HELLoRA, section 4.3, table 3", _MIXTRAL, _ON_MIXTRAL,
                              reference="lora"),
    "hellora-table-4": recipe("Which experts are adapted", "HELLoRA, section 4.5.1, table 4", _GSM8K, _WHICH_EXPERTS,
                              reference="hellora"),
    "hellora-table-5": recipe("What is adapted beside the experts", "HELLoRA, section 4.5.2, table 5", _COLUMNS,
                              _BESIDE_EXPERTS, reference="hellora"),
    "hellora-table-7": recipe("The number of hot experts", "HELLoRA, section 4.5.3, table 7", _GSM8K, _NUMBERS,
                              view="curve", reference="hellora"),
    "hellora-table-8": recipe("Other tasks before and after", "HELLoRA, appendix C, table 8", _COLUMNS,
                              [_BASE, _OURS[0]], view="across", across=True),
}  # fmt: skip


def table_2(setting: Setting) -> Recipe:
    """Methods by tasks."""
    return RECIPES["hellora-table-2"]("hellora-table-2", setting)


PUBLISHED_ACROSS: dict[tuple[str, str], float | tuple[float, ...]] = {
    ("GSM8K", "HUMAN"): (13.78, 18.94, 20.63), ("GSM8K", "SAFE"): 58.43,
    ("HUMAN", "GSM8K"): 5.86, ("HUMAN", "SAFE"): 63.01,
    ("SAFE", "GSM8K"): 2.83, ("SAFE", "HUMAN"): (15.18, 19.51, 21.33),
}  # fmt: skip
"""table 8: (trained on, scored on) -> after"""
