"""A table or figure as it is shown: ours beside the published numbers, as CSV, LaTeX, Markdown and PNG."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from matplotlib.figure import Figure

from ..base import escape
from ..base.files import atomic_path, write_text
from ..report.comparison_table import latex_line, markdown_line
from ..report.figures import plain_text

DPI = 120

Number = str | float | int | None


@dataclass(frozen=True)
class Result:
    """One table or figure.

    Attributes:
        name: the recipe's, and of the files.
        title, where: what it shows; paper and section.
        columns, rows: the table as text; "–" where there is no number.
        numbers: the same as plain numbers, a line each, for the CSV: column -> value; None is empty.
        notes: what a reader must know: seeds that are missing, what a rule counts.
        figures: file name's end -> picture; "" for the only one.
        texts: so many columns, the first ones, are words and not numbers.
    """

    name: str
    title: str
    where: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[Mapping[str, Number]]
    notes: Sequence[str] = ()
    figures: Mapping[str, Figure] = field(default_factory=dict)
    texts: int = 1

    def markdown(self) -> str:
        """A heading, the table, the notes and the pictures, which lie beside."""
        lines = [f"## {self.title}", "", f"{self.where}.", ""]
        if self.rows:
            lines += [markdown_line(self.columns), markdown_line(self._sides("---", "---:"))]
            lines += [*map(markdown_line, self.rows), ""]
        for note in self.notes:
            lines += [f"- {escape.markdown(note)}"]
        lines += [""] if self.notes else []
        for end in self.figures:
            lines += [f"![{self.title}]({self.picture(end)})", ""]
        return "\n".join(lines)

    def latex(self) -> str:
        """A `tabular` for \\usepackage{booktabs}; title and notes are comments above it."""
        lines = [f"% {escape.one_line(text)}" for text in (f"{self.title}. {self.where}", *self.notes)]
        lines += [rf"\begin{{tabular}}{{{''.join(self._sides('l', 'r'))}}}", r"\toprule", latex_line(self.columns)]
        lines += [r"\midrule", *map(latex_line, self.rows), r"\bottomrule", r"\end{tabular}"]
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        file = io.StringIO()
        writer = csv.DictWriter(
            file, list(dict.fromkeys(key for row in self.numbers for key in row)), lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows({name: escape.csv(value) for name, value in row.items()} for row in self.numbers)
        return file.getvalue()

    def _sides(self, left: str, right: str) -> list[str]:
        return [left if place < self.texts else right for place in range(len(self.columns))]

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
            plain_text(figure)
            with atomic_path(folder / self.picture(end)) as temporary:
                figure.savefig(
                    temporary, format="png", dpi=DPI, metadata={"Software": None}
                )  # the same bytes each time


def write_results(results: Sequence[Result], folder: str | os.PathLike[str], title: str, preface: str = "") -> Path:
    """Every result's files, and all of them as tables.md and tables.html; returns the latter's path."""
    folder = Path(folder)
    for result in results:
        result.write(folder)
    parts = [f"# {title}", preface, *(result.markdown() for result in results)]
    write_text(folder / "tables.md", "\n\n".join(part.strip("\n") for part in parts if part) + "\n")
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([here, here.parent / "report"]),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("tables.html.j2").render(title=title, preface=preface, results=results)
    write_text(folder / "tables.html", page)
    return folder / "tables.html"
