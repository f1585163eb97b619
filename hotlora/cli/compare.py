"""The command `compare`: a sweep's conditions against one of them, or two runs example by example."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson, number_list, out


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="A folder with a sweep's runs in it, such as runs/NAME; or two folders, each a run's own.",
            show_default=False,
        ),
    ],
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

    With two runs: the first against the second on the same test examples, by McNemar's test and a paired bootstrap.
    """
    from ..base.files import write_text
    from ..report import comparison_table
    from ..report.comparison import as_dict, compare_runs

    if len(runs) > 1:
        options = (reference, metric, margins, holm, csv, latex, markdown)
        _two_runs(runs, options != ("all", "score", None, False, None, None, None), as_json)
        return
    bounds = None if margins is None else number_list("margins", margins, float)
    comparison = compare_runs(runs[0], reference, metric=metric, margins=bounds, holm=holm)
    writers = (comparison_table.csv_text, comparison_table.latex, comparison_table.markdown)
    for path, text in zip((csv, latex, markdown), writers, strict=True):
        if path is not None:
            write_text(path, text(comparison))
    if as_json:
        print(json.dumps(as_dict(comparison), ensure_ascii=False))
    else:
        out.print(comparison_table.terminal_tables(comparison))


def _two_runs(runs: list[Path], has_options: bool, as_json: bool) -> None:
    from ..base.errors import HotLoraError
    from ..report.comparison_table import paired_table
    from ..report.paired import as_dict, compare_examples

    if len(runs) > 2:
        raise HotLoraError(f"{len(runs)} folders: give one that holds a sweep's runs, or two runs' own.")
    if has_options:
        raise HotLoraError("two runs are compared example by example, with no option but --json: leave the others out.")
    paired = compare_examples(*runs)
    if as_json:
        print(json.dumps(as_dict(paired), ensure_ascii=False))
    else:
        out.print(paired_table(paired))
