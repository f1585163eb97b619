"""The command `sweep`: conditions x seeds from one file."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from .cli_options import err, named, out


def sweep(
    file: Annotated[str, typer.Argument(metavar="FILE.py|NAME", help="A file that defines SWEEP, or a recipe's name.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the runs go (default runs/ and the sweep's name).")
    ] = None,
    processes: Annotated[int | None, typer.Option(help="Runs at a time (default one a GPU; on the CPU one).")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="For a recipe: another model than the paper's, such as nano.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="For a recipe: how many (default: as the paper).")] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", metavar="TASK=SOURCE", help="For a recipe: local files of a task.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="For a recipe: an option of every run.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and how far they are; run none.")] = False,
) -> None:
    """Train every condition of a study with every seed; run again to go on after a stop.

    Each run's record, adapter and log lie in OUTPUT/CONDITION/seedK. A run that fails is told at the end, and tried
    again the next time.
    """
    from .crew import LOG
    from .recipes import Setting, find_sweep
    from .sweep import run_sweep, sweep_jobs
    from .sweep_table import runs_table, title

    setting = Setting(model, named("--data", data), seeds, {k: _plain(v) for k, v in named("--set", settings).items()})
    study = find_sweep(file, setting)
    output = output or Path("runs") / study.name
    if dry_run:
        out.print(runs_table(sweep_jobs(study, output)))
        return
    jobs = run_sweep(study, output, processes=processes, console=out)
    failed = [job for job in jobs if job.status == "failed"]
    for job in failed:
        err.print(
            f"[bold red]{escape(title(job))} failed:[/] {escape(job.error or '')}", highlight=False, soft_wrap=True
        )
        err.print(f"  {job.folder / LOG}", highlight=False, soft_wrap=True)
    out.print(f"one page of all runs: hotlora report {output}", highlight=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def _plain(value: str) -> object:
    """A number, true, false or null as such; anything else is text."""
    try:
        return json.loads(value)
    except ValueError:
        return value
