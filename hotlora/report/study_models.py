"""Several models' studies beside each other: the tables of docs/study.md. Loads no model."""

import math
from collections.abc import Iterable, Mapping

from ..routing.study import THIRDS, Study
from .published import MODELS
from .study_claims import claims, claims_across
from .study_report import VERDICTS, table
from .text import NONE, shown

Studies = Mapping[str, Study]
"""a model's name, as the tables have it -> its study"""

_SKEW = {
    "global CV": ("global_cv", ".3f"), "layer CV": ("layer_cv", ".3f"), "ratio": ("ratio", ".1f"),
    "shuffled": ("shuffled_ratio", ".1f"), "cold": ("cold_share", ".1%"), "covered": ("coverage", ".1%"),
    "with shared": ("coverage_with_shared", ".0%"), "entropy": ("entropy", ".3f"),
}  # fmt: skip
_DATASET = {
    "global CV": ("global_cv", ".3f"), "layer CV": ("layer_cv", ".3f"), "ratio": ("ratio", ".1f"),
    "cold": ("cold_share", ".1%"), "covered": ("coverage", ".1%"), "entropy": ("entropy", ".3f"),
}  # fmt: skip


def skew(studies: Studies) -> str:
    """Table 2 and section 3.2, a row a model; what the paper prints stands below in rows of its own."""
    rows = []
    for name, result in studies.items():
        model, mean = result["model"], result["mean"]
        told = [shown(mean.get(key), form) for key, form in _SKEW.values()]
        share = mean["experts_for_60"] / model["num_experts"]
        rows.append([f"**{name}**", shape(result), *told, f"{share:.0%} of the experts"])
    for name, row in MODELS.items():
        layers = f"{row['layers']} × {row['num_experts']}, {row['num_experts_per_tok']} + {row['shared']}"
        rows.append([f"{name}, as printed", layers, *(shown(row.get(key), form) for key, form in _SKEW.values()), NONE])
    return table(["", "layers × experts, a token's + shared", *_SKEW, "60% in"], rows)


def shape(result: Study) -> str:
    """Such as 16 × 64, 8 + 0."""
    model = result["model"]
    head = f"{len(model['layers'])} × {model['num_experts']}"
    return f"{head}, {model['num_experts_per_tok']} + {model['shared']:g}"


def datasets(studies: Studies) -> str:
    """A row a data set."""
    rows = []
    for model, result in studies.items():
        for name, row in result["datasets"].items():
            needed = [value for value in row["by_layer"]["experts_for_60"] if value is not None]
            cells = [shown(row.get(key), form) for key, form in _DATASET.values()]
            span = f"{row['experts_for_60']:.1f} ({min(needed):.0f}–{max(needed):.0f})"
            rows.append([model, name, f"{row['tokens']:,}", *cells, shown(row["shuffled"]["below"], ".2f"), span])
    return table(["", "data set", "tokens", *_DATASET, "shuffles below", "60% in"], rows)


def depth(studies: Studies) -> str:
    """Thirds of the layers, mean over data sets; first layer, and the highest, of the most skewed data set."""
    rows = []
    for name, result in studies.items():
        sets = result["datasets"]
        for label, metric, form in (("layer CV", "cv", ".2f"), ("covered", "coverage", ".1%")):
            thirds = [[row["by_depth"][third][metric] for row in sets.values()] for third in THIRDS]
            most = "spider" if "spider" in sets else max(sets, key=lambda key: sets[key]["layer_cv"])
            layers = sets[most]["by_layer"][metric]
            peak = max(range(len(layers)), key=layers.__getitem__)
            ends = f"{most}: {layers[0]:{form}} → {layers[peak]:{form}} (layer {result['model']['layers'][peak]})"
            rows.append([name, label, *(f"{sum(values) / len(values):{form}}" for values in thirds), ends])
    return table(["", "metric", *THIRDS, "first layer → highest"], rows)


def overlaps(studies: Studies) -> str:
    """How alike two data sets' hot experts are, on each model."""
    rows = []
    for name, result in studies.items():
        names, matrix = result["overlap"]["names"], result["overlap"]["jaccard"]
        pairs = sorted((matrix[i][j], names[j], names[i]) for i in range(len(names)) for j in range(i))
        told = [f"{a} ~ {b} {value:.2f}" for value, a, b in pairs]
        mean = sum(value for value, *_ in pairs) / len(pairs)
        rows.append([name, f"{mean:.2f}", f"{chance(result):.2f}", ", ".join(told[:-4:-1]), ", ".join(told[:3])])
    return table(["", "mean of two", "by chance", "nearest", "furthest"], rows)


def chance(result: Study) -> float:
    """Jaccard of two random sets of the budget, as of their expected intersection."""
    kept, experts = result["settings"]["experts_per_layer"], result["model"]["num_experts"]
    return kept / (2 * experts - kept)


def robust(studies: Studies) -> str:
    """Subsamples, and count against mass and saliency, a row a data set."""
    rows = []
    for model, result in studies.items():
        for name, row in result["datasets"].items():
            cells = [NONE] * 3
            if found := row.get("stability"):
                span = f"{found['min']:.2f}–{found['max']:.2f}"
                cells = [f"{found['subsample']} of {found['examples']}", f"{found['mean']:.3f}", span]
            signals, saliency = row["signals"], row.get("saliency", {})
            told = [shown(signals[key], ".3f") for key in ("jaccard", "spearman")]
            rows.append([model, name, *cells, *told, *(shown(saliency.get(key), ".3f") for key in ("count", "mass"))])
    head = ["", "data set", "subsample", "Jaccard", "lowest–highest", "count ~ mass", "Spearman", "count ~ saliency"]
    return table([*head, "mass ~ saliency"], rows)


def decided(studies: Studies, across: Iterable[str]) -> str:
    """The paper's claims: a row a claim, a column a model; then those that compare the models named in `across`."""
    each = {name: claims(result) for name, result in studies.items()}
    rows = []
    for of_models in zip(*each.values(), strict=True):
        first = of_models[0]
        cells = [f"{VERDICTS[claim.holds]}: {claim.here}" if claim.here else NONE for claim in of_models]
        rows.append([first.section, first.says, first.rule, *cells])
    one_model = table(["section", "the paper says", "decided by", *each], rows)
    compared = [
        [claim.section, claim.says, claim.rule, claim.here or NONE, VERDICTS[claim.holds]]
        for claim in claims_across({name: studies[name] for name in across})
    ]
    return f"{one_model}\n\n{table(['section', 'the paper says', 'decided by', 'here', ''], compared)}"


def root_of_layers(result: Study) -> float:
    """What the ratio of layer CV to global CV is of layers of one skew that have nothing to do with each other."""
    return math.sqrt(len(result["model"]["layers"]))
