"""A study's numbers and pictures -> one Markdown page, with the paper's numbers beside. Loads no model."""

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..base.files import write_json, write_text
from ..routing.profile import RoutingProfile
from ..routing.study import THIRDS, Study, load_study, thirds
from . import study_figures as figures
from .figures import Figure, save_figure
from .published import MODELS, OLMOE_SPIDER, SPIDER_EXPERTS_FOR_60
from .study_claims import claims
from .text import NONE, markdown_table, shown

DPI = 110
VERDICTS = {True: "agrees", False: "**does not**", None: "not tested"}
_OVERLAP = "Jaccard of the hot experts of two data sets"


def write_study(
    result: Study, profiles: Mapping[str, RoutingProfile], folder: str | os.PathLike[str], command: str
) -> Path:
    """Writes study.json, profiles/NAME.safetensors, pictures and the page study.md; returns the page's path.

    Each file is whole or absent; the page comes last.
    """
    folder = Path(folder)
    result["command"] = command
    write_json(folder / "study.json", result)
    for name, profile in profiles.items():
        profile.save(folder / "profiles" / f"{name}.safetensors")
    return write_page(folder)


def write_page(folder: str | os.PathLike[str]) -> Path:
    """The pictures and the page again, from the study.json and the profiles in `folder`."""
    folder = Path(folder)
    result = load_study(folder / "study.json")
    profiles = {name: RoutingProfile.load(folder / "profiles" / f"{name}.safetensors") for name in result["datasets"]}
    for name, figure in pictures(result, profiles).items():
        save_figure(figure, folder / f"{name}.png", DPI)
    write_text(folder / "study.md", page(result))
    return folder / "study.md"


def pictures(result: Study, profiles: Mapping[str, RoutingProfile]) -> dict[str, Figure]:
    """File name -> figure."""
    found = {
        "heat-maps": figures.heat_maps(profiles),
        "coverage": figures.coverage_curves(profiles, result["settings"]["experts_per_layer"]),
        "by-layer": figures.by_layer(result),
        "robustness": figures.robustness(result),
    }
    names, layered = result["overlap"]["names"], result["overlap"]["by_layer"]
    if 2 <= len(names) <= 3:
        pairs = {f"{names[j]} ~ {names[i]}": layered[j][i] for i in range(len(names)) for j in range(i)}
        found["overlap-by-layer"] = figures.layer_overlap(pairs, result["model"]["layers"])
    if len(names) > 2:
        found["overlap"] = figures.overlap_map(result)
    return found


def page(
    result: Study, *, pictures_in: str = "", title: str | None = None, preface: str = "", with_claims: bool = True
) -> str:
    """The whole page as Markdown.

    Args:
        pictures_in: the pictures' folder, as seen from the page.
        title, preface: in place of the plain title; what to say of the model first.
        with_claims: whether the paper's claims are held against the numbers, at the end.
    """
    model, rows = result["model"], result["datasets"]
    picture = partial(_picture, pictures_in)
    counted = sum(row["tokens"] for row in rows.values())
    plain = f"Routing of {model['name']} on {len(rows)} data sets"
    shared = f" and {model['shared']:g} shared" if model["shared"] else ", no shared ones"
    parts = [
        f"# {title or plain}",
        preface,
        f"The profiling study of MoE-Sieve (section 3, appendix A): {len(model['layers'])} MoE layers of "
        f"{model['num_experts']} routed experts{shared}, {model['num_experts_per_tok']} a token; {len(rows)} data "
        f"sets, {counted:,} tokens. Made by",
        f"    {result['command']}" if result.get("command") else "",
        "which wrote the numbers (`study.json`), the profiles, the pictures and this page. CV is std / mean of the "
        "counts; *cold* is below half of the uniform share; *covered* is the share of a layer's assignments that go "
        f"to its hot {result['settings']['fraction']:.0%}, {result['settings']['experts_per_layer']} experts. Numbers "
        "are means over layers, and in the first table over data sets.",
        _examples_words(result),
        "## How skewed",
        table(["", *_MODEL_COLUMNS], _model_rows(result)),
        "Rows without a mark are MoE-Sieve's (table 2, sections 3.2 and 3.3).",
        table(["data set", *_DATASET_COLUMNS], _dataset_rows(result)),
        "*60% in* is the number of a layer's experts that take 60% of its assignments: mean (lowest to highest "
        f"layer). OLMoE on Spider: {SPIDER_EXPERTS_FOR_60['mean']} ({SPIDER_EXPERTS_FOR_60['min']} to "
        f"{SPIDER_EXPERTS_FOR_60['max']}) of {MODELS['OLMoE-1B-7B']['num_experts']}.",
        picture("coverage", "Share of the routing that a layer's busiest experts take, mean over layers."),
        picture("heat-maps", "Layers and experts; 1× is the uniform share."),
        "## Depth",
        table(["", "metric", *THIRDS], _depth_rows(result)),
        picture("by-layer", "CV and coverage in each layer; dotted: OLMoE on Spider, from the paper's table 7."),
    ]
    if len(rows) > 1:
        parts += ["## Overlap of the hot experts"]
        if len(rows) > 2:
            parts += [picture("overlap", f"{_OVERLAP}, mean over layers; ordered by average-linkage clustering.")]
        if len(rows) <= 3:
            parts += [picture("overlap-by-layer", f"{_OVERLAP}, in each layer.")]
        parts += [_nearest(result)]
    parts += [
        "## How robust",
        _stability_words(result),
        table(["data set", *_ROBUST_COLUMNS], _robust_rows(result)),
        picture("robustness", "The same in a picture."),
    ]
    if with_claims:
        decided = [[c.section, c.says, c.rule, c.here or NONE, VERDICTS[c.holds]] for c in claims(result)]
        parts += [
            "## The paper's claims",
            "Each claim of MoE-Sieve that one model can decide, by a rule that code applies to the numbers above.",
            table(["section", "the paper says", "decided by", "here", ""], decided),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


# Heading -> a number's name and format.
_SKEW = {
    "global CV": ("global_cv", ".3f"), "layer CV": ("layer_cv", ".3f"), "ratio": ("ratio", ".1f"),
    "cold": ("cold_share", ".1%"), "covered": ("coverage", ".1%"),
}  # fmt: skip
_MODEL_COLUMNS = {
    **_SKEW, "with shared experts": ("coverage_with_shared", ".0%"), "10% subsample, Jaccard": ("stability", ".3f"),
    "count ~ mass, Jaccard": ("signals_jaccard", ".3f"),
}  # fmt: skip
_DATASET_COLUMNS = {
    "examples": ("examples", ","), "tokens": ("tokens", ","), **_SKEW, "entropy": ("entropy", ".3f"),
    "60% in": ("experts_for_60", ".1f"),
}  # fmt: skip
_DEPTH_METRICS = {
    "layer CV": ("cv", ".2f"), "cold": ("cold_share", ".1%"), "covered": ("coverage", ".1%"),
    "entropy": ("entropy", ".3f"),
}  # fmt: skip
_ROBUST_COLUMNS = ("subsample", "Jaccard, mean", "lowest draw", "count ~ mass, Jaccard", "Spearman")


def _model_rows(result: Study) -> Iterable[list[str]]:
    for name, row in {f"**{result['model']['name']}** (here)": result["mean"], **MODELS}.items():
        yield [name, *(shown(row.get(key), form) for key, form in _MODEL_COLUMNS.values())]


def _dataset_rows(result: Study) -> Iterable[list[str]]:
    for name, row in result["datasets"].items():
        needed = [value for value in row["by_layer"]["experts_for_60"] if value is not None]
        *cells, mean = (shown(row.get(key), form) for key, form in _DATASET_COLUMNS.values())
        yield [name, *cells, f"{mean} ({min(needed):.0f}–{max(needed):.0f})" if needed else NONE]


def _depth_rows(result: Study) -> Iterable[list[str]]:
    """Means over data sets of each third of the layers, the most skewed data set, and OLMoE's from table 7."""
    rows = result["datasets"]
    third_names = list(thirds(len(result["model"]["layers"])))
    groups = {f"mean of {len(rows)}": list(rows)} | ({"spider": ["spider"]} if "spider" in rows else {})
    for group, names in groups.items():
        for label, (metric, form) in _DEPTH_METRICS.items():
            values = [_mean([rows[name]["by_depth"][third][metric] for name in names]) for third in third_names]
            values += [None] * (len(THIRDS) - len(values))
            yield [group, label, *(shown(value, form) for value in values)]
    if "spider" in rows:
        for label, (metric, form) in _DEPTH_METRICS.items():
            column = OLMOE_SPIDER[metric]
            parts = thirds(len(column)).values()
            yield ["OLMoE on spider (paper)", label, *(shown(_mean([column[i] for i in part]), form) for part in parts)]


def _robust_rows(result: Study) -> Iterable[list[str]]:
    for name, row in result["datasets"].items():
        found, signals = row.get("stability"), row["signals"]
        stable = [NONE] * 3
        if found:
            of = f"{found['subsample']} of {found['examples']}"
            stable = [of, shown(found["mean"], ".3f"), shown(found["min"], ".3f")]
        yield [name, *stable, *(shown(signals[key], ".3f") for key in ("jaccard", "spearman"))]


def _stability_words(result: Study) -> str:
    settings = result["settings"]
    if not any("stability" in row for row in result["datasets"].values()):
        return "Count against mass, by which experts can be ranked. Profiles hold no examples, so no subsamples."
    return (
        f"Hot experts of {settings['draws']} random {settings['subsample']:.0%} subsamples of the examples against "
        "those of all (from each example's own counts, in one pass); and hot experts by count against those by gate "
        "mass."
    )


def _examples_words(result: Study) -> str:
    settings = result["settings"]
    if "max_length" not in settings:
        return ""
    some = f"at most {settings['limit']} of each, drawn by seed {settings['seed']}" if settings["limit"] else "all"
    return (
        f"Examples are of the training splits, {some}, prompt and response. They are cut at {settings['max_length']} "
        "tokens; those whose prompt alone is that long are left out."
    )


def _nearest(result: Study) -> str:
    """Which two are the nearest, and which the furthest."""
    matrix, names = result["overlap"]["jaccard"], result["overlap"]["names"]
    pairs = sorted((matrix[i][j], names[j], names[i]) for i in range(len(names)) for j in range(i))
    if len(pairs) == 1:
        return ""
    told = [f"{a} ~ {b} ({value:.2f})" for value, a, b in pairs]
    return f"Nearest: {', '.join(told[:-4:-1])}. Furthest: {', '.join(told[:3])}."


def _picture(folder: str, name: str, caption: str) -> str:
    return f"![{caption}]({folder + '/' if folder else ''}{name}.png)\n\n*{caption}*"


def table(head: Sequence[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table; columns of numbers stand on the right."""
    body = list(rows)
    columns = zip(*body, strict=True) if body else [()] * len(head)
    sides = ["r" if all(cell[:1].isdigit() or cell in (NONE, "nan") for cell in column) else "l" for column in columns]
    return "\n".join(markdown_table(head, body, "".join(sides)))


def _mean(values: list[Any]) -> float | None:
    """Over those that are there: JSON has null for a layer without a single count."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None
