"""The command `leaderboard`: methods ranked by what their seeds can tell, and others' runs added to them."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson, out


def leaderboard(
    folder: Annotated[Path, typer.Argument(help="A leaderboard's folder, or any folder with runs in it.")],
    add: Annotated[
        list[Path] | None,
        typer.Option(
            help="Runs to add, a folder with them in it or one run's own; may be given several times. All come in, or "
            "none. Into a new folder: they found the leaderboard, and what they share is its protocol.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="With --add: the method's name (default: the condition).")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where page, picture and CSV go (default: into FOLDER).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Rank methods, task by task and budget by budget, by the differences that their seeds can tell.

    Every run must follow one protocol: the same model, data, length of training and test. --add refuses others, and
    records that are broken, unfinished or contradict themselves, and says what is asked.

    Writes leaderboard.md, leaderboard.png and leaderboard.csv from the runs' records alone.
    """
    from ..base.errors import HotLoraError
    from ..report.leaderboard import leaderboard as ranked
    from ..report.leaderboard_folder import add_runs
    from ..report.leaderboard_page import as_dict, terminal_tables, write_leaderboard

    if name is not None and not add:
        raise HotLoraError(f"--name {name} names what is added: give --add, too.")
    told = []
    if add:
        added = add_runs(folder, add, name=name)
        told.append(f"added: {len(added.new)} run{'s' * (len(added.new) != 1)} to {folder}")
        told += [f"{len(added.known)} were there already"] if added.known else []
    board = ranked(folder)
    page = write_leaderboard(board, output or folder)
    if as_json:
        print(json.dumps(as_dict(board), ensure_ascii=False))
        return
    for line in told:
        out.print(line)
    out.print(terminal_tables(board))
    out.print(f"page: {page}")
