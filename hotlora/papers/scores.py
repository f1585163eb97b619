"""The runs of a training recipe -> its table, ours beside the published numbers. Reads records alone."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..evaluation.stats import Interval, mean_interval, sd_ratio
from ..report.comparison_table import ends
from ..report.published import EQUIVALENCE, GREEDY, PAIRS, SEED_SD
from ..report.text import NONE, p_word, shown
from .cells import BOUNDS, Cell, Cells, against, read_cell, read_cells, seeds_begun, task_name, unlike
from .hellora import PUBLISHED_ACROSS
from .recipe import Column, Recipe, across_name, condition_name, scored_name
from .result import Number, Result, Shown
from .score_figures import curve, dots
from .score_notes import notes


def result(recipe: Recipe, folder: Path) -> Result | None:
    """The recipe's table; None where no run of it is done."""
    skipped: dict[Path, str] = {}
    if recipe.view == "across":
        shown = _across(recipe, folder, skipped)
        return recipe.over(shown) if shown.rows else None
    cells = read_cells(recipe, folder, skipped)
    if not any(cell.row.method for cell in cells.values()):
        return None
    table = {"pairs": _pairs, "spread": _spread, "equivalence": _equivalence}.get(recipe.view, _scores)
    shown = table(recipe, cells)
    shown.numbers = _numbers(recipe, cells)
    named = {f"{row.label} on {task_name(column)}": (row.name, column.name) for row, column in recipe.places()}
    labels = {row.name: row.label for row in recipe.rows}
    pairs = [
        (
            name,
            cells.get((row, column)),
            labels.get(recipe.reference or "", ""),
            cells.get((recipe.reference or "", column)),
        )
        for name, (row, column) in named.items()
    ]
    folders = [folder / name(*place) for place in recipe.places() for name in (condition_name, scored_name)]
    shown.notes = notes(recipe, {n: cells.get(key) for n, key in named.items()}, pairs, seeds_begun(folders), skipped)
    if draw := {"curve": curve, "scores": dots}.get(recipe.view):
        shown.figures = {"": draw(recipe, cells)}
    return recipe.over(shown)


def _scores(recipe: Recipe, cells: Cells) -> Shown:
    """Rows by columns, each cell with its difference to the reference and the published number."""
    also = list(dict.fromkeys(name for row in recipe.rows for name in row.printed))
    heads = ["", "trained", *(f"published: {name}" for name in also)]
    for column in recipe.columns:
        heads += [task_name(column), *(["Δ [95%]"] if recipe.reference else []), "published"]
    table = Shown(heads)
    for row in recipe.rows:
        mine = [cells.get((row.name, column.name)) for column in recipe.columns]
        percent = next((cell.percent for cell in mine if cell and cell.percent is not None), None)
        line = [row.label, NONE if percent is None else f"{percent:.3g}%"]
        line += [shown(row.printed.get(name), "g") for name in also]
        for cell, column in zip(mine, recipe.columns, strict=True):
            line.append(_score(cell))
            if recipe.reference:
                line.append(_difference(cell, cells.get((recipe.reference, column.name))))
            line.append(_printed(row.published.get(column.name)))
        table.rows.append(line)
    return table


def _last_and_first(recipe: Recipe, cells: Cells) -> Iterator[tuple[Column, Cell | None, Cell | None]]:
    """Of each column the last row's cell and the first's: MoE-Sieve's hot quarter, and what it is compared with."""
    for column in recipe.columns:
        first, last = (cells.get((row.name, column.name)) for row in (recipe.rows[0], recipe.rows[-1]))
        yield column, last, first


def _pairs(recipe: Recipe, cells: Cells) -> Shown:
    """MoE-Sieve's tables 3 and 5: the last row against the first, a line a column."""
    labels = [recipe.rows[0].label, recipe.rows[-1].label]
    is_greedy = recipe.name.endswith("table-5")
    told = ["experts of a layer", "they cover"] if is_greedy else ["Δ", "95%", "within 2"]
    heads = ["", *labels, "Δ", "95%", "within 2 points", *(f"published: {name}" for name in (*labels, *told))]
    table = Shown(heads)
    for column, last, first in _last_and_first(recipe, cells):
        test = against(last, first)
        tested = [NONE] * 3
        if test is not None:
            tested = [f"{test.mean:+.2f}", _range(test.interval), _yes(test.tost[2.0])]
        table.rows.append([task_name(column), _score(first), _score(last), *tested, *_pair_told(column, is_greedy)])
    return table


def _pair_told(column: Column, is_greedy: bool) -> list[str]:
    """What MoE-Sieve's table 3 prints of a pair, or its table 5."""
    key = _key(column)
    if key not in PAIRS:
        return [NONE] * (4 if is_greedy else 5)
    kinds = ("hot", "greedy") if is_greedy else ("all", "hot")
    scores = [f"{mean:.1f} ± {sd:.1f}" for mean, sd in (PAIRS[key][kind] for kind in kinds)]
    if is_greedy:
        fewest, most, covered = GREEDY[key]
        return [*scores, f"{fewest}–{most}", f"{covered:.1f}%"]
    told = EQUIVALENCE[key]
    low, high = told["interval"]
    return [*scores, f"{told['difference']:+.2f}", f"[{low:.2f}, {high:.2f}]", _yes(told["tost"][2])]


def _spread(recipe: Recipe, cells: Cells) -> Shown:
    """MoE-Sieve's table 6: standard deviations over seeds, in points."""
    labels = [f"sd, {row.label}" for row in (recipe.rows[0], recipe.rows[-1])]
    table = Shown(["", *labels, "ratio", "95%", "published ratio"])
    for column, last, first in _last_and_first(recipe, cells):
        sds = [shown(cell.summary.sd if cell else None, ".2f") for cell in (first, last)]
        ratios = [NONE, NONE]
        if first and last and not unlike(last, first):
            found = sd_ratio(last.summary, first.summary)
            ratios = [shown(found.ratio, ".2f"), _range(found.interval)]
        *_, published = SEED_SD.get(_key(column), (None,))
        table.rows.append([task_name(column), *sds, *ratios, shown(published, ".2f")])
    return table


def _equivalence(recipe: Recipe, cells: Cells) -> Shown:
    """MoE-Sieve's table 8: TOST at three bounds and the t test."""
    bounds = [f"p at {bound:g}" for bound in BOUNDS]
    table = Shown(["", "Δ", *bounds, "t test", "published: Δ; p at 1, 2, 3; t test"])
    for column, last, first in _last_and_first(recipe, cells):
        tested, printed = [NONE] * 5, NONE
        if (test := against(last, first)) is not None:
            tested = [f"{test.mean:+.2f}", *(p_word(test.tost[bound]) for bound in BOUNDS), p_word(test.p)]
        if told := EQUIVALENCE.get(_key(column)):
            ps = ", ".join(_p(told["tost"][bound]) for bound in (1, 2, 3))
            printed = f"{told['difference']:+.2f}; {ps}; {_p(told['t_test'])}"
        table.rows.append([task_name(column), *tested, printed])
    return table


def _across(recipe: Recipe, folder: Path, skipped: dict[Path, str]) -> Shown:
    """HELLoRA's table 8: each column's adapters on the others' data, before and after."""
    base, row = recipe.rows
    columns = ["trained on", "scored on", "before", "after", "after − before [95%]", "published: before, after"]
    table = Shown(columns, texts=2)
    starts = {
        other.name: read_cell(base, other, folder / scored_name(base, other), None, skipped) for other in recipe.columns
    }
    cells = {f"{base.label} on {task_name(other)}": starts[other.name] for other in recipe.columns}
    pairs, folders = [], []
    for column, other in itertools.permutations(recipe.columns, 2):
        folders.append(folder / across_name(row, column, other))
        before, after = starts[other.name], read_cell(row, other, folders[-1], None, skipped)
        cells[name := f"{row.label} of {task_name(column)} on {task_name(other)}"] = after
        pairs.append((name, after, "the model as it is", before))
        if before is None or after is None:
            continue
        start, change, mean = before.values[-1], None, None
        if not unlike(after, before):
            changes = [value - start for value in after.values.values()]
            change, mean = mean_interval(changes) if len(changes) > 1 else None, after.summary.mean - start
        told = PUBLISHED_ACROSS.get((column.name, other.name))
        table.add(
            [
                task_name(column), task_name(other), f"{start:.2f}", _score(after),
                NONE if mean is None else f"{mean:+.2f} {_range(change)}",
                f"{_printed(base.published.get(other.name))}, {_printed(told)}",
            ],
            trained_on=column.data, scored_on=other.data, before=start, after=after.summary.mean, n=after.summary.n,
            sd=after.summary.sd, change=mean, **ends("change", change),
        )  # fmt: skip
    trained = [folder / condition_name(row, column) for column in recipe.columns]
    table.notes = notes(recipe, cells, pairs, seeds_begun([*folders, *trained]), skipped)
    return table


def _numbers(recipe: Recipe, cells: Cells) -> list[dict[str, Number]]:
    lines = []
    for (name, _), cell in cells.items():
        reference = cells.get((recipe.reference or "", cell.column.name))
        test = None if reference is cell else against(cell, reference)
        summary, published = cell.summary, cell.row.published.get(cell.column.name)
        line: dict[str, Number] = {
            "row": name, "label": cell.row.label, "model": cell.column.model, "data": cell.column.data,
            "n": summary.n, "mean": summary.mean, "sd": summary.sd, "trained_percent": cell.percent,
            "training_seconds": cell.seconds, "difference": test.mean if test else None,
            **ends("difference", test.interval if test else None), "p": test.p if test else None,
        }  # fmt: skip
        line |= {f"tost_{bound:g}": test.tost[bound] if test else None for bound in BOUNDS}
        line["published"] = published[0] if isinstance(published, tuple) else published
        line |= {f"published {name}": value for name, value in cell.row.printed.items()}
        lines.append(line)
    return lines


def _score(cell: Cell | None) -> str:
    if cell is None:
        return NONE
    if cell.several:
        return "/".join(f"{value:.2f}" for value in cell.several.values())
    spread = "" if cell.summary.sd is None else f" ± {cell.summary.sd:.1f}"
    return f"{cell.summary.mean:.1f}{spread}"


def _difference(cell: Cell | None, reference: Cell | None) -> str:
    test = None if cell is reference else against(cell, reference)
    return NONE if test is None else f"{test.mean:+.1f} {_range(test.interval)}"


def _yes(p: float | None) -> str:
    return NONE if p is None else "yes" if p < 0.05 else "no"


def _p(printed: float) -> str:
    """A published p: .001 stands for what is printed as "<.001"."""
    return "<0.001" if printed == 0.001 else f"{printed:.3f}"


def _range(interval: Interval | None) -> str:
    return NONE if interval is None else f"[{interval.low:.1f}, {interval.high:.1f}]"


def _printed(value: float | Sequence[float] | None) -> str:
    if value is None:
        return NONE
    return f"{value:.2f}" if isinstance(value, float | int) else "/".join(f"{some:.2f}" for some in value)


def _key(column: Column) -> tuple[str, str]:
    model = "Qwen1.5-MoE-A2.7B" if column.name.startswith("Qwen") else "OLMoE-1B-7B"
    return model, column.name.split()[-1].lower()
