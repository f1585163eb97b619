"""The runs of a training recipe -> its table, ours beside the published numbers. Reads records alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.records import read_record
from ..evaluate.stats import Interval, MeanSd, PairedTest, mean_interval, mean_sd, paired_test, sd_ratio
from ..report.comparison_table import NONE, ends, p_word
from ..report.published import EQUIVALENCE, SEED_SD
from ..routing.plan import ExpertPlan
from .hellora import PUBLISHED_ACROSS
from .recipe import Column, Recipe, Row, across_name, scored_name
from .result import Number, Result
from .score_figures import curve, dots

BOUNDS = (1.0, 2.0, 3.0)


@dataclass(frozen=True)
class Cell:
    """A row's runs in a column.

    Attributes:
        values: seed -> score in points (of pass@k the first k's); a model as it is has the seed -1.
        several: k -> mean over seeds, where there are scores at several k.
        percent, seconds: trained parameters in percent of all, and of a run; means over the seeds.
        experts: adapted experts of a layer, mean over layers; None without a plan.
    """

    row: Row
    column: Column
    values: Mapping[int, float]
    several: Mapping[int, float]
    percent: float | None = None
    seconds: float | None = None
    experts: float | None = None

    @property
    def summary(self) -> MeanSd:
        return mean_sd(list(self.values.values()))


def read_cells(recipe: Recipe, folder: Path) -> dict[tuple[str, str], Cell]:
    """(row, column) -> what is there of its runs; a cell without a run that is done is left out."""
    cells = {}
    for column in recipe.columns:
        for row in recipe.rows:
            if row.only and column.name not in row.only:
                continue
            trained = _records(folder / column.folder / row.name)
            scored = _records(folder / scored_name(row, column))
            cell = _cell(row, column, trained, scored, _experts(folder / column.folder / row.name))
            if cell is not None:
                cells[row.name, column.name] = cell
    return cells


def result(recipe: Recipe, folder: Path) -> Result | None:
    """The recipe's table; None where no run of it is done."""
    if recipe.view == "across":
        return _across(recipe, folder)
    cells = read_cells(recipe, folder)
    if not any(cell.row.method for cell in cells.values()):
        return None
    table = {"pairs": _pairs, "spread": _spread, "equivalence": _equivalence}.get(recipe.view, _scores)
    columns, rows = table(recipe, cells)
    figures = {}
    if recipe.view == "curve":
        figures = {"": curve(recipe, cells)}
    elif recipe.view == "scores":
        figures = {"": dots(recipe, cells)}
    return Result(
        recipe.name,
        recipe.title,
        recipe.where,
        columns,
        rows,
        _numbers(recipe, cells),
        _missing(recipe, cells),
        figures,
    )


def against(cell: Cell, reference: Cell) -> PairedTest | None:
    """A cell minus another over the seeds that both have; None where they share none."""
    seeds = sorted(cell.values.keys() & reference.values.keys())
    if not seeds:
        return None
    ours, theirs = ([side.values[seed] for seed in seeds] for side in (cell, reference))
    return paired_test(ours, theirs, bounds=BOUNDS)


def _records(folder: Path) -> dict[int, dict[str, Any]]:
    """Seed -> record that is done; -1 for a record in the folder itself."""
    files = {-1: folder / "run.json"}
    files |= {
        int(file.parent.name[4:]): file for file in folder.glob("seed*/run.json") if file.parent.name[4:].isdigit()
    }
    found = {seed: read_record(file) for seed, file in sorted(files.items()) if file.is_file()}
    return {seed: record for seed, record in found.items() if record["status"] == "done"}


def _cell(
    row: Row,
    column: Column,
    trained: Mapping[int, dict[str, Any]],
    scored: Mapping[int, dict[str, Any]],
    experts: float | None = None,
) -> Cell | None:
    values: dict[int, float] = {}
    passes: dict[int, list[float]] = {}
    for seed, record in scored.items():
        for evaluation in (record.get("evaluation") or {}).values():
            values[seed] = 100 * evaluation["accuracy"]
            for name, value in evaluation.items():
                if name.startswith("pass@"):
                    passes.setdefault(int(name[5:]), []).append(100 * value)
    if not values:
        return None
    parameters = [record["parameters"] for record in trained.values() if record.get("parameters")]
    return Cell(
        row,
        column,
        values,
        {k: sum(some) / len(some) for k, some in sorted(passes.items())},
        _mean([some["percent"] for some in parameters]),
        _mean([record["training"]["seconds"] for record in trained.values() if record.get("training")]),
        experts,
    )


def _experts(folder: Path) -> float | None:
    """Experts that the first plan of the runs in `folder` keeps of a layer, mean over layers."""
    for file in sorted(folder.glob("seed*/plan.json")):
        experts = ExpertPlan.load(file).experts
        return sum(map(len, experts.values())) / len(experts)
    return None


def _scores(recipe: Recipe, cells: Mapping[tuple[str, str], Cell]) -> tuple[list[str], list[list[str]]]:
    """Rows by columns, each cell with its difference to the reference and the published number."""
    columns = ["", "trained"]
    for column in recipe.columns:
        columns += [task_name(column), *(["Δ [95%]"] if recipe.reference else []), "published"]
    rows = []
    for row in recipe.rows:
        mine = [cells.get((row.name, column.name)) for column in recipe.columns]
        percent = next((cell.percent for cell in mine if cell and cell.percent is not None), None)
        line = [row.label, NONE if percent is None else f"{percent:.3g}%"]
        for cell, column in zip(mine, recipe.columns, strict=True):
            line.append(_score(cell))
            if recipe.reference:
                line.append(_difference(cell, cells.get((recipe.reference, column.name))))
            line.append(_printed(row.published.get(column.name.split()[-1])))
        rows.append(line)
    return columns, rows


def _pairs(recipe: Recipe, cells: Mapping[tuple[str, str], Cell]) -> tuple[list[str], list[list[str]]]:
    """MoE-Sieve's tables 3 and 5: the last row against the first, a line a column."""
    first, last = recipe.rows[0], recipe.rows[-1]
    columns = ["", first.label, last.label, "Δ", "95%", "within 2 points", "published Δ", "published within 2"]
    rows = []
    for column in recipe.columns:
        a, b = cells.get((first.name, column.name)), cells.get((last.name, column.name))
        test = against(b, a) if a and b else None
        published = EQUIVALENCE.get(_key(column)) if recipe.name.endswith("table-3") else None
        told = [NONE, NONE]
        if published:
            told = [f"±{published['difference']:.2f}", "yes" if published["tost"][2] < 0.05 else "no"]
        rows.append([task_name(column), _score(a), _score(b), *_tested(test), *told])
    return columns, rows


def _spread(recipe: Recipe, cells: Mapping[tuple[str, str], Cell]) -> tuple[list[str], list[list[str]]]:
    """MoE-Sieve's table 6: standard deviations over seeds, in points."""
    first, last = recipe.rows[0], recipe.rows[-1]
    columns = ["", f"sd, {first.label}", f"sd, {last.label}", "ratio", "95%", "published ratio"]
    rows = []
    for column in recipe.columns:
        a, b = cells.get((first.name, column.name)), cells.get((last.name, column.name))
        line = [
            task_name(column),
            *(NONE if c is None or c.summary.sd is None else f"{c.summary.sd:.2f}" for c in (a, b)),
        ]
        ratio = sd_ratio(b.summary, a.summary) if a and b else None
        line.append(NONE if ratio is None or ratio.ratio is None else f"{ratio.ratio:.2f}")
        line.append(_range(ratio.interval) if ratio else NONE)
        published = SEED_SD.get(_key(column))
        rows.append([*line, f"{published[2]:.2f}" if published else NONE])
    return columns, rows


def _equivalence(recipe: Recipe, cells: Mapping[tuple[str, str], Cell]) -> tuple[list[str], list[list[str]]]:
    """MoE-Sieve's table 8: TOST at three bounds and the t test."""
    first, last = recipe.rows[0], recipe.rows[-1]
    columns = ["", "Δ", *(f"p at {bound:g}" for bound in BOUNDS), "t test", "published: Δ; p at 1, 2, 3; t test"]
    rows = []
    for column in recipe.columns:
        a, b = cells.get((first.name, column.name)), cells.get((last.name, column.name))
        test = against(b, a) if a and b else None
        line = [task_name(column)]
        line += (
            [NONE] * 5
            if test is None
            else [f"{test.mean:+.2f}", *(p_word(test.tost[x]) for x in BOUNDS), p_word(test.p)]
        )
        told = EQUIVALENCE.get(_key(column))
        ps = ", ".join(f"{told['tost'][bound]:.3f}" for bound in (1, 2, 3)) if told else ""
        rows.append([*line, f"±{told['difference']:.2f}; {ps}; {told['t_test']:.3f}" if told else NONE])
    return columns, rows


def _across(recipe: Recipe, folder: Path) -> Result | None:
    """HELLoRA's table 8: each column's adapters on the others' data, before and after."""
    base, row = recipe.rows
    columns = ["trained on", "scored on", "before", "after", "after − before [95%]", "published: before, after"]
    rows: list[list[str]] = []
    numbers: list[dict[str, Number]] = []
    for column in recipe.columns:
        for other in recipe.columns:
            before = _cell(base, other, {}, _records(folder / scored_name(base, other)))
            after = _cell(row, other, {}, _records(folder / across_name(row, column, other)))
            if other.name == column.name or before is None or after is None:
                continue
            start = before.values[-1]
            change = (
                mean_interval([value - start for value in after.values.values()]) if len(after.values) > 1 else None
            )
            mean = after.summary.mean - start
            told = PUBLISHED_ACROSS.get((column.name, other.name))
            published = f"{_printed(base.published.get(other.name))}, {_printed(told)}"
            rows.append(
                [
                    task_name(column),
                    task_name(other),
                    f"{start:.2f}",
                    _score(after),
                    f"{mean:+.2f} {_range(change)}",
                    published,
                ]
            )
            numbers.append(
                {"trained_on": column.data, "scored_on": other.data, "before": start, "after": after.summary.mean,
                 "n": after.summary.n, "sd": after.summary.sd, "change": mean, **ends("change", change)}
            )  # fmt: skip
    if not rows:
        return None
    return Result(recipe.name, recipe.title, recipe.where, columns, rows, numbers, texts=2)


def _numbers(recipe: Recipe, cells: Mapping[tuple[str, str], Cell]) -> list[dict[str, Number]]:
    lines = []
    for (name, _), cell in cells.items():
        reference = cells.get((recipe.reference or "", cell.column.name))
        test = against(cell, reference) if reference and reference is not cell else None
        summary, published = cell.summary, cell.row.published.get(cell.column.name.split()[-1])
        line: dict[str, Number] = {
            "row": name, "label": cell.row.label, "model": cell.column.model, "data": cell.column.data,
            "n": summary.n, "mean": summary.mean, "sd": summary.sd, "trained_percent": cell.percent,
            "training_seconds": cell.seconds, "difference": test.mean if test else None,
            **ends("difference", test.interval if test else None), "p": test.p if test else None,
        }  # fmt: skip
        line |= {f"tost_{bound:g}": test.tost[bound] if test else None for bound in BOUNDS}
        line["published"] = published[0] if isinstance(published, tuple) else published
        lines.append(line)
    return lines


def _missing(recipe: Recipe, cells: Mapping[tuple[str, str], Cell]) -> list[str]:
    """What the table lacks, in words."""
    absent, fewer = [], []
    for column in recipe.columns:
        for row in recipe.rows:
            if row.only and column.name not in row.only:
                continue
            cell = cells.get((row.name, column.name))
            if cell is None:
                absent.append(f"{row.label} on {task_name(column)}")
            elif row.method and (lacking := [seed for seed in recipe.seeds if seed not in cell.values]):
                fewer.append(f"{row.label} on {task_name(column)} lacks {', '.join(map(str, lacking))}")
    notes = [f"No run is done of {'; '.join(absent)}."] if absent else []
    notes += [f"Seeds are missing: {'; '.join(fewer)}."] if fewer else []
    seeds = f"{len(recipe.seeds)} seeds a cell; mean ± standard deviation over seeds, in points; intervals are 95%"
    told = "" if recipe.columns[0].model != "nano" else " Published numbers are of the papers' own models and tasks."
    return [f"{seeds}.{told}", *notes]


def _score(cell: Cell | None) -> str:
    if cell is None:
        return NONE
    if cell.several:
        return "/".join(f"{value:.2f}" for value in cell.several.values())
    spread = "" if cell.summary.sd is None else f" ± {cell.summary.sd:.1f}"
    return f"{cell.summary.mean:.1f}{spread}"


def _difference(cell: Cell | None, reference: Cell | None) -> str:
    if cell is None or reference is None or cell is reference:
        return NONE
    test = against(cell, reference)
    return NONE if test is None else f"{test.mean:+.1f} {_range(test.interval)}"


def _tested(test: PairedTest | None) -> list[str]:
    if test is None:
        return [NONE, NONE, NONE]
    p = test.tost[2.0]
    return [f"{test.mean:+.2f}", _range(test.interval), NONE if p is None else "yes" if p < 0.05 else "no"]


def _range(interval: Interval | None) -> str:
    return NONE if interval is None else f"[{interval.low:.1f}, {interval.high:.1f}]"


def _printed(value: float | Sequence[float] | None) -> str:
    if value is None:
        return NONE
    return f"{value:.2f}" if isinstance(value, float | int) else "/".join(f"{some:.2f}" for some in value)


def _key(column: Column) -> tuple[str, str]:
    model = "Qwen1.5-MoE-A2.7B" if column.name.startswith("Qwen") else "OLMoE-1B-7B"
    return model, column.name.split()[-1].lower()


def task_name(column: Column) -> str:
    """The paper's name of a column's task, and what stands for it."""
    return f"{column.name} ({column.data})" if column.model == "nano" else column.name


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
