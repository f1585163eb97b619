"""HELLoRA's tables and figures that trainings make. Scores are as printed, in points."""

from .recipe import Recipe, Row
from .settings import HELLORA_TASKS, MIXTRAL, Column, Setting, make

_K = {"experts_per_layer": "top_k"}
_LABELS = {"hellora": "HELLoRA", "hellori-d": "HELLoRI-D", "hellori-s": "HELLoRI-S"}
_COLUMNS = list(HELLORA_TASKS.values())
_GSM8K = [HELLORA_TASKS["GSM8K"]]


def _scores(gsm8k: float, human: tuple[float, float, float], safe: float) -> dict[str, float | tuple[float, ...]]:
    return {"GSM8K": gsm8k, "HUMAN": human, "SAFE": safe}


_HELLORA = {
    "hellora": _scores(29.49, (17.87, 22.04, 23.82), 99.06),
    "hellori-d": _scores(28.42, (16.89, 20.89, 22.21), 98.75),
    "hellori-s": _scores(25.10, (16.22, 20.27, 21.76), 97.50),
}
_OURS = [Row(name, _LABELS[name], name, published=scores) for name, scores in _HELLORA.items()]


def table_2(setting: Setting) -> Recipe:
    """Methods by tasks."""
    rows = [
        Row("base", "as it is", published={"GSM8K": 1.66, "HUMAN": (13.41, 16.81, 18.17), "SAFE": 66.75}),
        Row("fft", "FFT", "fft", published=_scores(27.64, (16.4, 21.04, 22.38), 97.32)),
        Row("lora", "LoRA", "lora", published=_scores(26.37, (16.52, 21.80, 24.03), 98.75)),
        Row("dora", "DoRA", "dora", published=_scores(26.82, (16.72, 21.93, 23.68), 98.86)),
        Row("lori-d", "LoRI-D", "lori-d", published=_scores(28.22, (16.98, 21.85, 23.75), 96.56)),
        Row("lori-s", "LoRI-S", "lori-s", published=_scores(25.49, (16.46, 20.22, 22.37), 98.44)),
        *_OURS,
    ]
    return make(
        "hellora", setting, "table-2", "Accuracy of the methods on mathematics, code and safety",
        "HELLoRA, section 4.3, table 2", _COLUMNS, rows, reference="lora",
    )  # fmt: skip


def table_3(setting: Setting) -> Recipe:
    """Another model: Mixtral-8x7B on mathematics."""
    published = {
        "lora": 67.73, "lori-d": 64.84, "lori-s": 63.98, "hellora": 68.28, "hellori-d": 64.61, "hellori-s": 66.17,
    }  # fmt: skip
    labels = {"lora": "LoRA", "lori-d": "LoRI-D", "lori-s": "LoRI-S", **_LABELS}
    rows = [Row(name, labels[name], name, published={"GSM8K": score}) for name, score in published.items()]
    column = Column("GSM8K", MIXTRAL, "gsm8k-lori", "math")
    return make(
        "hellora", setting, "table-3", "Accuracy on another model", "HELLoRA, section 4.3, table 3", [column], rows,
        reference="lora",
    )  # fmt: skip


def table_4(setting: Setting) -> Recipe:
    """Which experts: hot in each layer, hot over all layers by index (_M), cold (_C)."""
    published = {"_M": (28.51, 23.14, 23.14), "_C": (25.88, 25.19, 23.04)}
    rows = list(_OURS)
    for suffix, rule in (("_M", "global"), ("_C", "cold")):
        for method, score in zip(_LABELS, published[suffix], strict=True):
            rows.append(
                Row(f"{method}-{rule}", _LABELS[method] + suffix, method, {"rule": rule, **_K}, {"GSM8K": score})
            )
    return make(
        "hellora", setting, "table-4", "Which experts are adapted", "HELLoRA, section 4.5.1, table 4", _GSM8K, rows,
        reference="hellora",
    )  # fmt: skip


def table_5(setting: Setting) -> Recipe:
    """What is adapted beside the hot experts: nothing (_pure), the router (_gate), attention and router."""
    published = {
        "pure": (
            _scores(26.46, (17.07, 21.19, 22.78), 98.43),
            _scores(23.24, (17.07, 20.38, 21.89), 91.25),
            _scores(23.44, (16.15, 20.82, 22.29), 97.81),
        ),
        "gate": (
            _scores(28.03, (17.09, 21.86, 23.28), 97.50),
            _scores(23.53, (16.95, 21.80, 23.17), 90.32),
            _scores(23.44, (16.06, 21.17, 22.73), 96.56),
        ),
    }
    rows = list(_OURS)
    for placement, all_scores in published.items():
        for method, scores in zip(_LABELS, all_scores, strict=True):
            label = f"{_LABELS[method]}_{placement}"
            rows.append(Row(f"{method}-{placement}", label, method, {"placement": placement}, scores))
    return make(
        "hellora", setting, "table-5", "What is adapted beside the experts", "HELLoRA, section 4.5.2, table 5",
        _COLUMNS, rows, reference="hellora",
    )  # fmt: skip


def table_7(setting: Setting) -> Recipe:
    """The number of hot experts: a quarter of the router's K, half of it, K and 2 K."""
    scores = {2: 26.72, 4: 26.97, 8: 29.49, 16: 29.69}  # its labels Accuracy and Throughput are swapped
    rows = []
    for k, score in scores.items():
        own = _OURS[0].name if k == 8 else f"hellora-{k}of64"
        options = {} if k == 8 else {"fraction": k / 64}
        rows.append(Row(own, f"k = {k} of 64", "hellora", options, {"GSM8K": score}))
    return make(
        "hellora", setting, "table-7", "The number of hot experts", "HELLoRA, section 4.5.3, table 7", _GSM8K, rows,
        view="curve", reference="hellora",
    )  # fmt: skip


def table_8(setting: Setting) -> Recipe:
    """What training on one task does to the others."""
    rows = [
        Row("base", "as it is", published={"GSM8K": 1.66, "HUMAN": (13.41, 16.81, 18.17), "SAFE": 66.75}),
        _OURS[0],
    ]
    return make(
        "hellora", setting, "table-8", "Other tasks before and after", "HELLoRA, appendix C, table 8", _COLUMNS, rows,
        view="across", across=True,
    )  # fmt: skip


PUBLISHED_ACROSS: dict[tuple[str, str], float | tuple[float, ...]] = {
    ("GSM8K", "HUMAN"): (13.78, 18.94, 20.63), ("GSM8K", "SAFE"): 58.43,
    ("HUMAN", "GSM8K"): 5.86, ("HUMAN", "SAFE"): 63.01,
    ("SAFE", "GSM8K"): 2.83, ("SAFE", "HUMAN"): (15.18, 19.51, 21.33),
}  # fmt: skip
"""table 8: (trained on, scored on) -> after"""

RECIPES = {"table-2": table_2, "table-3": table_3, "table-4": table_4, "table-5": table_5, "table-7": table_7,
           "table-8": table_8}  # fmt: skip
