"""The command `report`: one page of all runs."""

import gc
from pathlib import Path
from typing import Annotated

import typer

from ..base.escape import lines
from .options import out


def report(
    runs: Annotated[Path, typer.Argument(help="A folder with runs in it.")] = Path("runs"),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the page goes (default: into RUNS).")
    ] = None,
) -> None:
    """Make one page with tables and pictures from the runs' records alone.

    Of recipes' runs also the papers' tables and figures, as HTML, Markdown, CSV, LaTeX and PNG.
    """
    gc.disable()  # while modules are imported, and their objects are never looked through: a fifth of the time
    from ..base.records import find_records
    from ..report.page import conditions_table, has_recipes, write_report

    gc.freeze()
    gc.enable()
    skipped: dict[Path, str] = {}
    records = find_records(runs, skipped)
    page = write_report(runs, output or runs)
    out.print(conditions_table(records))
    for folder, why in skipped.items():
        out.print(f"left out: {lines(f'{folder}: {why}')}")
    out.print(f"page: {page}")
    if has_recipes(record for record in records.values() if record["status"] == "done"):
        from ..papers.page import write_tables  # it brings the trainer along, which a plain report does without

        for tables in write_tables(runs, output or runs):
            out.print(f"tables: {tables}")
