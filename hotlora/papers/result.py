"""A table or figure as it is shown: ours beside the published numbers, as CSV, LaTeX, Markdown and PNG."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..base.files import write_text
from ..report.figures import Figure, save_figure
from ..report.page import render
from ..report.text import csv_table, latex_comments, latex_table, markdown_items, markdown_table

DPI = 120

Number = str | float | int | None


@dataclass
class Shown:
    """What a table or figure shows.

    Attributes:
        columns, rows: the table as text; "–" where there is no number.
        numbers: the same as plain numbers, a line each, for the CSV: column -> value; None is empty.
        notes: what a reader must know: seeds that are missing, what a rule counts.
        figures: file name's end -> picture; "" for the only one.
        texts: so many columns, the first ones, are words and not numbers.
    """

    columns: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    numbers: list[dict[str, Number]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: Mapping[str, Figure] = field(default_factory=dict)
    texts: int = 1

    def add(self, cells: list[str], /, **numbers: Number) -> None:
        """A line of the table, and of the CSV."""
        self.rows.append(cells)
        self.numbers.append(numbers)


@dataclass(frozen=True)
class Heading:
    """What a recipe and its result are called.

    Attributes:
        name: such as hellora-table-2; of the result's files, too.
        title: what it shows.
        where: the paper and its section.
    """

    name: str
    title: str
    where: str

    def over(self, shown: Shown) -> "Result":
        """The result under this heading."""
        return Result(name=self.name, title=self.title, where=self.where, **vars(shown))


@dataclass(kw_only=True)
class Result(Shown):
    """A table or figure under its recipe's heading."""

    name: str
    title: str
    where: str

    def markdown(self) -> str:
        """A heading, the table, the notes and the pictures, which lie beside."""
        lines = [f"## {self.title}", "", f"{self.where}.", ""]
        if self.rows:
            lines += [*markdown_table(self.columns, self.rows, self._sides()), ""]
        lines += [*markdown_items(self.notes), *([""] if self.notes else [])]
        for end in self.figures:
            lines += [f"![{self.title}]({self.picture(end)})", ""]
        return "\n".join(lines)

    def latex(self) -> str:
        """A `tabular` for \\usepackage{booktabs}; title and notes are comments above it."""
        lines = latex_comments([f"{self.title}. {self.where}", *self.notes])
        return "\n".join([*lines, *latex_table(self.columns, self.rows, self._sides())]) + "\n"

    def csv(self) -> str:
        """The numbers."""
        return csv_table(self.numbers)

    def picture(self, end: str) -> str:
        """A picture's file name."""
        return f"{self.name}-{end}.png" if end else f"{self.name}.png"

    def write(self, folder: str | os.PathLike[str]) -> None:
        """NAME.csv, NAME.tex and NAME.png in `folder`, each whole or absent."""
        folder = Path(folder)
        if self.rows:
            write_text(folder / f"{self.name}.csv", self.csv())
            write_text(folder / f"{self.name}.tex", self.latex())
        for end, figure in self.figures.items():
            save_figure(figure, folder / self.picture(end), DPI)

    def _sides(self) -> str:
        return "l" * self.texts + "r" * (len(self.columns) - self.texts)


def write_results(results: Sequence[Result], folder: str | os.PathLike[str], title: str, preface: str = "") -> Path:
    """Every result's files, and all of them as tables.md and tables.html; returns the latter's path."""
    folder = Path(folder)
    for result in results:
        result.write(folder)
    parts = [f"# {title}", preface, *(result.markdown() for result in results)]
    write_text(folder / "tables.md", "\n\n".join(part.strip("\n") for part in parts if part) + "\n")
    template = Path(__file__).parent / "tables.html.j2"
    write_text(folder / "tables.html", render(template, title=title, preface=preface, results=results))
    return folder / "tables.html"
