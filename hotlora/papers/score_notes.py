"""What a reader of a training recipe's table must know: what it lacks, and what is not compared."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from ..hf.models import NANOS
from .cells import Cell, unlike
from .recipe import Recipe


def notes(
    recipe: Recipe,
    cells: Mapping[str, Cell | None],
    pairs: Iterable[tuple[str, Cell | None, str, Cell | None]],
    begun: Collection[int],
    skipped: Mapping[Path, str],
) -> list[str]:
    """In the order of their weight.

    Args:
        cells: all that the table has, by what a reader calls them; None: no run is done.
        pairs: what is compared: (name, cell, name of the other, the other).
        begun: seeds that some cell has a folder of, beside the recipe's own.
        skipped: records that are broken, and what is wrong with them.
    """
    wanted = sorted({*recipe.seeds, *begun})
    seeds = f"{len(wanted)} seeds a cell; mean ± standard deviation over seeds, in points; intervals are 95%."
    found = [f"{seeds}{_whose(recipe)}"]
    if absent := [name for name, cell in cells.items() if cell is None]:
        found.append(f"No run is done of {'; '.join(absent)}.")
    there = {name: cell for name, cell in cells.items() if cell is not None}
    trained = {name: cell for name, cell in there.items() if cell.row.method}
    lacking = {name: [seed for seed in wanted if seed not in cell.values] for name, cell in trained.items()}
    fewer = [
        f"{name} lacks {', '.join(map(str, seeds))} (n = {trained[name].summary.n})"
        for name, seeds in lacking.items() if seeds
    ]  # fmt: skip
    if fewer:
        found.append(f"Seeds are missing: {'; '.join(fewer)}.")
    found += [f"Left out: {why}." for why in skipped.values()]
    if mixed := [f"{name} in {', '.join(cell.mixed)}" for name, cell in there.items() if cell.mixed]:
        found.append(f"Seeds are not alike, and nothing is compared with them: {'; '.join(mixed)}.")
    otherwise: dict[str, list[str]] = {}
    for name, cell, other, reference in pairs:
        if cell is None or reference is None or cell.mixed or reference.mixed:
            continue
        if reason := unlike(cell, reference):
            otherwise.setdefault(other, []).append(f"{name} {reason.removeprefix('runs differ ')}")
    if dense := [name for name, cell in there.items() if not cell.whole_time]:
        found.append(f"Without the dense run's: training_seconds of {'; '.join(dense)}.")
    return found + [
        f"Made otherwise than {other}, and not compared with it: {'; '.join(told)}."
        for other, told in otherwise.items()
    ]  # fmt: skip


def _whose(recipe: Recipe) -> str:
    """Of which models the published numbers are, where it is not the columns' own."""
    if recipe.columns[0].model in NANOS:
        return " Published numbers are of the papers' own models and tasks."
    others = dict.fromkeys(column.printed_of for column in recipe.columns if column.printed_of != column.model)
    return f" Published numbers are of {' and '.join(others)}." if others else ""
