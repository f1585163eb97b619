"""docs/moe-sieve.md, from the record alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from marks import table
from moe_sieve_cell import SORTED, Cell
from moe_sieve_claims import ALL, ALPHA, CLAIMS, GREEDY, MARGIN, verdict
from moe_sieve_data import KEYS, SOURCE

from hotlora.report.text import p_word

_TITLES = {
    "Table 1": "the models",
    "Table 2": "skew inside layers and over all layers, mean of ten data sets",
    "Figure 1": "layer CV over global CV, the lowest and the highest of 30 pairs",
    "Figure 2": "coverage of a token, shared experts included",
    "Section 3.2": "concentration, entropy, depth",
    "Figure 3": "Jaccard of the 16 hot experts of two data sets, OLMoE",
    "Section 3.3": "the hot quarter by count and by mass",
    "Table 3": "a quarter of the experts against all (points; sd by ddof 0)",
    "Table 4": "what the quarter saves",
    "Section 6.1": "random experts, OLMoE on GSM8K (points)",
    "Table 5": "greedy budgets over layers (points; sd by ddof 0)",
    "Section 6.2": "a coverage of 60% (points)",
    "Table 6": "standard deviation over seeds (points, ddof 0)",
    "Section 7.1": "how much lower the deviation is",
    "Section 7.2": "HellaSwag",
    "Table 7": "layer by layer, OLMoE on Spider",
    "Figure 5": "entropy over experts, OLMoE",
    "Figure 6": "hot experts of a tenth of the examples",
    "Table 8": "equivalence tests: points, and p",
    "Table 9": "16 experts of each layer, or 256 greedily spread, OLMoE on GSM8K",
    "Table 10": "other budgets, OLMoE (points)",
}
_FIGURES = {
    "Figure 1": ("figure-1.png", "Left a dot a data set, right the layers' CV by depth."),
    "Figure 2": ("figure-2.png", "Bands run from the lowest data set to the highest; crosses are the paper's."),
    "Figure 3": ("figure-3.png", "All ten data sets, ordered by their clustering; OLMoE."),
    "Figure 5": ("figure-5.png", "Each expert's load on each data set, in multiples of the uniform share; OLMoE."),
}
_NOTES = {
    "Table 1": "Layers, routed experts and K from the counts, the others from the models' configs.",
    "Table 3": "Differences, intervals and tests are paired by seed. All eighteen ends and differences are as printed.",
    "Table 4": "Parameters are counted by `hotlora params` from the configs; checkpoints are four bytes a parameter.",
    "Table 5": "Experts and coverage are those of `hotlora plan --rule greedy` at 25%. The rule has **no minimum** of "
    "a layer: in the PDF appendix C starts each from 0 experts. Of the counts alone any minimum up to 9 would do.",
    "Figure 6": "Needs the counts of single examples, which the repository does not have.",
    "Table 8": "Paired by seed; in brackets what comes out where the eight scores of each condition are sorted first.",
}
_NAMES = {ALL: "all", GREEDY: "greedy 25%", "cov60": "coverage 60%"}


def page(record: Mapping[str, Any], cells: Sequence[Cell]) -> str:
    """record: results/moe_sieve.json."""
    parts = [_head(record, cells)]
    for name, title in _TITLES.items():
        mine = [cell for cell in cells if cell.table == name]
        parts.append(f"### {name}: {title}\n\n{_table(mine)}")
        parts += [_NOTES[name]] if name in _NOTES else []
        by_reason: dict[str, list[str]] = {}
        for cell in mine:
            if cell.told:
                place = cell.row if cell.column == "number" else f"{cell.row}, {cell.column}"
                by_reason.setdefault(cell.told, []).append(place)
        if by_reason:
            parts.append("\n".join(f"- {'; '.join(places)}: {told}" for told, places in by_reason.items()))
        if name in _FIGURES:
            file, caption = _FIGURES[name]
            parts.append(f"![{name} from the published counts](moe-sieve/{file})\n\n*{caption}*")
    if record["tests"]:
        parts.append(_beyond(record))
    return "\n\n".join(parts) + "\n"


def count(cells: Sequence[Cell]) -> str:
    """ "N of M cells equal": of those that the data have."""
    there = [cell for cell in cells if cell.status != "absent"]
    return f"{sum(cell.status == 'equal' for cell in there)} of {len(there)} cells equal"


def _head(record: Mapping[str, Any], cells: Sequence[Cell]) -> str:
    status = [cell.status for cell in cells]
    near = [c for c in cells if (c.table, c.column) == ("Table 8", "within 1") and "spider" not in c.row]
    by_seed, printed = (", ".join(_shown(cell, value(cell)) for cell in near) for value in (_here, _printed))
    return f"""# MoE-Sieve, from its author's data

The author of MoE-Sieve ([arXiv 2603.24044](https://arxiv.org/abs/2603.24044)) published every training's score and the
routing counts of every data set. Here each number that the paper prints is computed again from them, by hotlora's code.
<!-- made by scripts/moe_sieve.py from results/moe_sieve.json and results/moe_sieve_cells.json -->

    git clone {SOURCE}
    python scripts/moe_sieve.py MoE_Sieve     # the clone; or a folder with the same numbers as plain JSON
    python scripts/moe_sieve.py --check       # this page against the committed record, without the data

**{count(cells)}** to their last printed digit; {status.count("explained")} others are explained below their table, and
{status.count("absent")} are not in the data (another model, counts of single examples, times). The data are those of
commit {record["commit"][:7]}, of {" and ".join(record["models"])}. A cell that was equal and no longer is, or
that is neither equal nor explained, ends the script with an error. The trainings, and the passes that counted, are the
author's; `hotlora/routing/profile.py`, `routing/study.py`, `routing/rules.py` and `evaluation/stats.py`
made the rest.

**What does not come out as it is printed**

- **Table 8's rows of GSM8K and HellaSwag are not of pairs by seed.** All four come out, to the last digit, where the
  eight scores of each condition are sorted before they are paired; its Spider rows, and all of table 3, are by seed.
  Sorting makes the two scores of a pair as like each other as they can be, and the test surer than the runs are: by
  seed the p of equivalence within 1 point is {by_seed}
  in place of {printed} (OLMoE on GSM8K and HellaSwag, then Qwen). OLMoE on GSM8K
  is then not equivalent at 1 point. At 2 points, the paper's own margin, its six conclusions stand, each row by itself.
- **Deviations are by two formulas**: over n in tables 3 and 6, over n − 1 in table 5's greedy column (over n in its
  uniform one) and in Spider's part of table 10. So one condition has two: OLMoE's hot quarter on Spider is ±1.5 in
  tables 3 and 5 and ±1.6 in table 10. Section 3.2's CVs and figure 1's 5.7 are over n − 1, too; table 2's are over n.
- **Greedy budgets make a difference once**, where section 6.2 finds none in any condition: Qwen on HellaSwag is 0.2
  points higher, by far less than any margin ([below](#the-papers-sentences)).

## Table by table

Each cell: what the paper prints / what its data give. **Bold** where the two differ; – where the data have none."""


def _here(cell: Cell) -> float | str | None:
    return cell.here


def _printed(cell: Cell) -> float | str | None:
    return cell.printed


def _table(cells: Sequence[Cell]) -> str:
    columns = list(dict.fromkeys(cell.column for cell in cells))
    rows: dict[str, dict[str, str]] = {}
    for cell in cells:
        rows.setdefault(cell.row, {})[cell.column] = _pair(cell)
    return table(["", *columns], [[row, *(found.get(column, "") for column in columns)] for row, found in rows.items()])


def _pair(cell: Cell) -> str:
    here = "–" if cell.here is None else _shown(cell, cell.here)
    apart = "" if SORTED not in cell.others else f" ({_shown(cell, cell.others[SORTED])})"
    return f"{_shown(cell, cell.printed)} / {here if cell.status in ('equal', 'absent') else f'**{here}**'}{apart}"


def _shown(cell: Cell, value: float | str | None) -> str:
    if isinstance(value, str) or value is None:
        return str(value)
    if cell.form == "p":
        return "<0.001" if value < 0.001 or (value is cell.printed and value == 0.001) else f"{value:.3f}"
    return format(value, cell.form).replace("-", "−")


def _beyond(record: Mapping[str, Any]) -> str:
    tests = {(row["model"], row["task"], row["a"], row["b"]): row for row in record["tests"]}
    against = sorted((row for row in record["tests"] if row["b"] == ALL), key=_place)
    heads = [
        "model",
        "task",
        "condition",
        "Δ to all, points",
        "p",
        "by Holm",
        f"within {MARGIN}",
        "by Holm",
        "sd / all's",
    ]
    lines = [
        [_model(row), row["task"], _named(row["a"]), _range(row, "mean", "low", "high", "+.2f"), p_word(row["p"]),
         p_word(row["p_holm"]), p_word(row["p_equivalent"]), p_word(row["p_equivalent_holm"]),
         _range(row, "sd_ratio", "sd_low", "sd_high", ".2f")]
        for row in against
    ]  # fmt: skip
    return f"""## What the paper does not print

![Score over the number of experts, OLMoE on GSM8K](moe-sieve/figure-4.png)

*Figure 4, OLMoE on GSM8K: seeds, mean and 95% interval of hot experts, of random ones and of a coverage of 60%.*

The repository has trainings of which the paper prints no number, or a picture alone: k from 4 to 48, random experts, a
coverage of 60% and greedy budgets against all. Paired by seed, {against[0]["n"]} seeds; in brackets 95% intervals.
Holm's correction is over all {len(record["tests"])} tests of this section, the t tests and the equivalence tests each
for themselves. The last column is the ratio of standard deviations over seeds.

{table(heads, lines, 3)}

### The paper's sentences

A sentence agrees where its test passes at 0.05 after that correction; "alone" is the same without it. Of deviations:
where the 95% interval of their ratio leaves 1 out, which is not corrected.

{_sentences(tests)}

{_quarter(tests)}
With eight seeds, which of these budgets is best cannot be told. That random experts are worse
than hot ones is the surest of the paper's findings. That a quarter makes seeds differ less is one interval of six, and
the others hold 1: a sign, no finding. That very few experts underfit is likely (all four differences are below 0), and
no one test survives the correction. {_coverage(record["experts_for_60"])}"""


def _quarter(tests: Mapping[tuple[str, ...], Mapping[str, Any]]) -> str:
    claim = CLAIMS[0]
    found = [tests[pair] for pair in claim.pairs if pair in tests]
    alone = sum(test["p_equivalent"] < ALPHA for test in found)
    corrected = sum(test["p_equivalent_holm"] < ALPHA for test in found)
    return (
        f"The quarter is equivalent to all experts within {MARGIN} points in {alone} of {len(found)} pairs of a model "
        f"and a task, each by itself, and in {corrected} after the correction."
    )


def _coverage(experts: Mapping[str, float]) -> str:
    took = ", ".join(f"{number:.1f} on {task}" for task, number in experts.items())
    return f"A coverage of 60% takes, of OLMoE's 64 experts in the mean of its layers: {took}; the quarter is 16."


def _place(row: Mapping[str, Any]) -> tuple[str, str, str, int]:
    """By model, task, kind of condition and its number of experts."""
    kind = row["a"].rstrip("0123456789")
    return row["model"], row["task"], kind, int(row["a"][len(kind) :] or 0)


def _sentences(tests: Mapping[tuple[str, ...], Mapping[str, Any]]) -> str:
    lines = []
    for claim in CLAIMS:
        for pair in claim.pairs:
            if (test := tests.get(pair)) is None:
                continue
            keys = (
                ("sd_ratio", "sd_low", "sd_high", ".2f") if claim.rule == "spread" else ("mean", "low", "high", "+.2f")
            )
            alone = {**test, "p_holm": test["p"], "p_equivalent_holm": test["p_equivalent"]}
            what = f"{_model(test)}, {test['task']}: {_named(test['a'])} to {_named(test['b'])}"
            found = [verdict(claim, dict(some)) for some in (alone, test)]
            lines.append([claim.section, claim.says, what, _range(test, *keys), *found])
    return table(["section", "the paper says", "tested", "here [95%]", "alone", "corrected"], lines, 6)


def _range(row: Mapping[str, Any], middle: str, low: str, high: str, form: str) -> str:
    return f"{row[middle]:{form}} [{row[low]:{form}}, {row[high]:{form}}]".replace("-", "−")


def _model(row: Mapping[str, Any]) -> str:
    return KEYS[row["model"]]


def _named(condition: str) -> str:
    for start, word in (("hotk", "hot"), ("randk", "random")):
        if condition.startswith(start):
            return f"{word} {condition.removeprefix(start)}"
    return _NAMES.get(condition, condition)
