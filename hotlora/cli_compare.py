"""The command `compare`: a sweep's conditions against one of them."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .cli_options import AsJson, number_list, out


def compare(
    runs: Annotated[Path, typer.Argument(help="A folder with a sweep's runs in it, such as runs/NAME.")],
    reference: Annotated[str, typer.Option(help="The condition that the others are compared with.")] = "all",
    metric: Annotated[str, typer.Option(help="score, or test_loss: the held-out loss.")] = "score",
    margins: Annotated[
        str | None,
        typer.Option(help="Bounds of equivalence, with commas between (default: 1,2,3 points; for a loss none)."),
    ] = None,
    holm: Annotated[bool, typer.Option("--holm", help="Correct p values over a table's conditions.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Write every number here, one line a condition.")] = None,
    latex: Annotated[Path | None, typer.Option(help="Write LaTeX tables (booktabs).")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write Markdown tables.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare a sweep's conditions over their seeds: paired differences, intervals, t tests and equivalence.

    Reads the runs' records alone. What is missing or failed is named below the tables.
    """
    from . import comparison_table
    from .comparison import as_dict, compare_runs
    from .files import write_text

    bounds = None if margins is None else number_list("margins", margins, float)
    comparison = compare_runs(runs, reference, metric=metric, margins=bounds, holm=holm)
    writers = (comparison_table.csv_text, comparison_table.latex, comparison_table.markdown)
    for path, text in zip((csv, latex, markdown), writers, strict=True):
        if path is not None:
            write_text(path, text(comparison))
    if as_json:
        print(json.dumps(as_dict(comparison), ensure_ascii=False))
    else:
        out.print(comparison_table.terminal_tables(comparison), highlight=False)
