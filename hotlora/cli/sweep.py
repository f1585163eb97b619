"""The command `sweep`: conditions x seeds from one file, or a recipe of the papers' tables and figures."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from ..base.errors import HotLoraError
from ..base.escape import lines
from .options import err, error_line, named, out

if TYPE_CHECKING:
    from ..papers import Direct
    from ..runs.sweep import Sweep


def sweep(
    file: Annotated[str, typer.Argument(metavar="FILE.py|NAME", help="A file that defines SWEEP, or a recipe's name.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where the runs go (default runs/ and the sweep's name; recipes: papers)."),
    ] = None,
    processes: Annotated[int | None, typer.Option(help="Runs at a time (default one a GPU; on the CPU one).")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="For a paper's recipe: another model than the paper's, such as nano."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="For a paper's recipe: how many (default: as the paper).")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="TASK=SOURCE", help="For a paper's recipe: local files of a task."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="[TASK.]NAME=VALUE",
            help="For a paper's recipe: an option of every run, or of those on a task.",
        ),
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(help="What the machine gets through, in 10^12 FLOP/s, to foresee the hours.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it needs, list the runs and how far they are; run none.")
    ] = False,
) -> None:
    """Train every condition of a study with every seed; run again to go on after a stop.

    A NAME is one of the papers' tables or figures, which trainings, profiles, benches or configs make; it says what
    it needs first.

    Each run's record, adapter and log lie in OUTPUT/CONDITION/seedK. A run that fails is told at the end, and tried
    again the next time.
    """
    from ..papers import EXAMPLE, Direct, Setting, find_recipe

    sources = named("--data", data, "--data gsm8k=data/gsm8k")
    options = {name: _plain(value) for name, value in named("--set", settings, EXAMPLE).items()}
    setting = Setting(model, sources, seeds, options)
    found = find_recipe(file, setting)
    if isinstance(found, Direct):
        if processes is not None:
            raise HotLoraError(f"{file} trains nothing, so that no runs are side by side: leave --processes out.")
        _direct(found, output, tflops, dry_run)
    else:
        tell_needs = dry_run or tflops is not None or not file.endswith(".py")
        _trainings(found, output, processes, tflops, dry_run, tell_needs=tell_needs)


def _trainings(
    study: "Sweep", output: Path | None, processes: int | None, tflops: float | None, dry_run: bool, tell_needs: bool
) -> None:
    from ..papers.needs import sweep_needs
    from ..runs.sweep import run_sweep, sweep_jobs
    from ..runs.sweep_table import runs_table, title
    from ..runs.worker_pool import LOG

    output = output or Path("runs") / study.name
    if tell_needs:
        _tell(sweep_needs(study, tflops))
    if dry_run:
        out.print(runs_table(sweep_jobs(study, output)))
        return
    jobs = run_sweep(study, output, processes=processes, console=out)
    failed = [job for job in jobs if job.status == "failed"]
    for job in failed:
        err.print(error_line(lines(job.error or ""), f"{title(job)} failed:"))
        err.print(f"  {job.folder / LOG}")
    out.print(f"one page of all runs: {shlex.join(['hotlora', 'report', str(output)])}")
    if failed:
        raise typer.Exit(1)


def _direct(recipe: "Direct", output: Path | None, tflops: float | None, dry_run: bool) -> None:
    """A recipe without trainings: what is missing is made, then its table and pictures."""
    from ..report.page import STORE

    output = output or Path("runs") / STORE
    _tell(recipe.needs(tflops))
    if dry_run:
        table = Table("what", Column("where", overflow="fold"), "state")
        for what, where, state in recipe.state(output):
            table.add_row(escape(what), escape(str(where)), state)
        out.print(table)
        return
    recipe.run(output, err.print)
    result = recipe.result(output)
    assert result is not None, "what has just been made can be shown"
    folder = output / "tables"
    result.write(folder)
    table = Table(title=escape(f"{result.title}. {result.where}"))
    for column in result.columns:
        table.add_column(escape(column), overflow="fold")
    for row in result.rows:
        table.add_row(*map(escape, row))
    out.print(table)
    for note in result.notes:
        out.print(f"- {note}")
    out.print(f"files: {folder}/{result.name}*")


def _tell(needs: list[str]) -> None:
    err.print("needs:", style="bold")
    for line in needs:
        err.print(f"  {line}")


def _plain(value: str) -> object:
    """A number, true, false or null as such; anything else is text."""
    try:
        return json.loads(value)
    except ValueError:
        return value
