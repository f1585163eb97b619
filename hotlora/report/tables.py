"""Run records -> tables of text, for the page and for the terminal. Loads no model."""

from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from ..base.escape import one_line
from .over_seeds import SEEDS, seeds_rows
from .rows import COLUMNS, Row, table_rows
from .sections import Records, Section, differing, read_sections
from .text import NONE


@dataclass(frozen=True)
class Shown:
    """A table of the page.

    Attributes:
        adapted: what its runs train, such as "experts alone"; empty where all of the section train the same.
        columns: key of a row's cells -> title. Columns without a number are left out, the score's excepted.
        folders: of the rows' runs.
        seeds: a row a condition, with means over seeds, where runs differ in their seed alone; `seeds_columns`: its.
    """

    task: str
    adapted: str
    columns: dict[str, str]
    rows: list[Row]
    folders: list[Path]
    seeds: list[Row]
    seeds_columns: dict[str, str]


def section_tables(section: Section) -> list[Shown]:
    """What a section's runs gave: a table for each task and for what is adapted, in order of the latter."""
    shown, groups = [], section.groups
    for adapted, folders in groups.items():
        for task in section.tasks:
            rows, seeds = table_rows(section, task, folders), seeds_rows(section, task, folders)
            names = {
                f"option {name}": name.replace("_", " ") if name != "r" else "rank r"
                for name in differing(section.records[folder] for folder in folders)
            }
            columns = COLUMNS | ({"accuracy": "held-out loss", "difference": "against all"} if section.by_loss else {})
            columns = {key: columns[key] for key in ("accuracy", "difference")} | names | columns
            shown.append(
                Shown(
                    task, adapted if len(groups) > 1 else "", _filled(columns, rows), rows, folders, seeds,
                    _filled(SEEDS | columns, seeds),
                )
            )  # fmt: skip
    return shown


def _filled(columns: dict[str, str], rows: list[Row]) -> dict[str, str]:
    """Those in which some row has something, and the score's."""
    return {k: title for k, title in columns.items() if k == "accuracy" or any(row.cells[k] != NONE for row in rows)}


def conditions_table(records: Records) -> Table:
    """The page's tables for the terminal, in 80 columns. `records` is what `find_records` returns."""
    sections = read_sections(records)
    several = len({section.model for section in sections}) > 1
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("run", min_width=12, overflow="fold")
    kinds = {section.by_loss for section in sections}
    score = "score" if len(kinds) > 1 else "held-out loss" if True in kinds else "accuracy, %"
    against = "against all" + (", pp" if True not in kinds else "")
    for title in (score, against):
        table.add_column(title, justify="right", min_width=8)  # an interval may go onto a line of its own
    for title in ("covered", "trained"):
        table.add_column(title, justify="right", no_wrap=True, min_width=len(title))
    keys = ("accuracy", "difference", "covered", "trained")
    for section in sections:
        for shown in section_tables(section):
            heading = section.data if shown.task == section.data else f"{section.data} → {shown.task}"
            heading = f"[bold]{escape(one_line(heading))}[/]"
            heading += f" {escape(one_line(section.model))}" if several else ""
            heading += " (held-out loss)" if len(kinds) > 1 and section.by_loss else ""
            heading += "\nof different rows: no loss is comparable" if section.by_loss and section.tested_apart else ""
            heading += f"\n{shown.adapted}" if shown.adapted else ""
            numbers = {row.cells["seeds"] for row in shown.seeds if row.condition != "base"}
            same = numbers.pop() if len(numbers) == 1 else None
            heading += f"\nover {f'{same} ' if same else ''}seeds" if shown.seeds else ""
            table.add_row(heading)
            for row in shown.seeds or shown.rows:
                note = f"\n[red]{escape(one_line(row.note))}[/]" if row.note else ""
                cells = (row.cells[key].split(" (")[0].replace(" to ", ", ") for key in keys)
                number = row.cells.get("seeds", NONE)
                seeds = "" if same or number == NONE else f", {number} seed{'s' * (number != '1')}"
                table.add_row(escape(one_line(row.name)) + seeds + note, *cells)
            table.add_section()
    return table
