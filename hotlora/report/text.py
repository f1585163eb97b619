"""Numbers and tables as text: Markdown, LaTeX (booktabs), CSV. Text from others is escaped as each needs it."""

import csv
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence

from ..base import escape

NONE = "–"
"""In the place of a number that is not there."""


def shown(value: float | None, form: str) -> str:
    """A number in a format such as ".2f"."""
    return NONE if value is None else format(value, form)


def human_count(number: float) -> str:
    """84967424 -> "85.0M"."""
    return _scaled(number, ("", "K", "M", "B", "T"))


def human_bytes(number: float) -> str:
    """339738624 -> "339.7 MB", in powers of 1000."""
    return _scaled(number, (" B", " kB", " MB", " GB", " TB"))


def human_flops(number: float) -> str:
    """114e9 -> "114.0 GFLOP"."""
    return _scaled(number, (" FLOP", " kFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP"))


def human_seconds(number: float | None) -> str:
    """93.1 -> "1 min 33 s"."""
    if number is None:
        return NONE
    if number < 10:
        return f"{number:.1f} s"
    minutes, seconds = divmod(round(number), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _scaled(number: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if abs(number) < 999.95 or (unit == units[0] and abs(number) < 1000):
            return f"{number:,.0f}{unit}" if unit == units[0] else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:,.1f}{units[-1]}"


def loss_word(loss: float | None) -> str:
    """A loss as runs tell it; a record has null for one that was no finite number."""
    is_number = loss is not None and math.isfinite(loss)
    return f"{loss:.4f}" if is_number else "not a finite number (null in run.json)"


def p_word(p: float | None) -> str:
    """A p value as tables have it."""
    return NONE if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], sides: str) -> list[str]:
    """A Markdown table's lines. sides: "l" or "r" for each column."""
    rules = [{"l": "---", "r": "---:"}[side] for side in sides]
    return [f"| {' | '.join(map(escape.markdown, row))} |" for row in (head, rules, *rows)]


def markdown_items(texts: Iterable[str]) -> list[str]:
    """A Markdown list's lines."""
    return [f"- {escape.markdown(text)}" for text in texts]


def html_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], sides: str, caption: str, notes: Iterable[str] = ()
) -> str:
    """An HTML table without colours of its own, and notes below. sides: as in `markdown_table`."""

    def line(cells: Sequence[str], tag: str) -> str:
        styles = ({"l": "left", "r": "right"}[side] for side in sides)
        told = (html.escape(escape.one_line(cell)) for cell in cells)
        parts = (f'<{tag} style="text-align: {style}">{cell}</{tag}>' for style, cell in zip(styles, told, strict=True))
        return f"<tr>{''.join(parts)}</tr>"

    below = "".join(f"<div>{html.escape(escape.one_line(note))}</div>" for note in notes)
    if not head:
        return below
    body = "".join(line(row, "td") for row in rows)
    title = f"<div><b>{html.escape(escape.one_line(caption))}</b></div>"
    return f"{title}<table><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table>{below}"


def latex_table(head: Sequence[str], rows: Iterable[Sequence[str]], sides: str) -> list[str]:
    """The lines of a `tabular`, for \\usepackage{booktabs}. sides: as in `markdown_table`."""
    first, *body = (" & ".join(map(escape.latex, row)) + r" \\" for row in (head, *rows))
    return [rf"\begin{{tabular}}{{{sides}}}", r"\toprule", first, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]


def latex_comments(texts: Iterable[str]) -> list[str]:
    """A comment's line for each."""
    return [f"% {escape.one_line(text)}" for text in texts]


def csv_table(rows: Sequence[Mapping[str, object]]) -> str:
    """A line a row, under all names that any row has; what is None or lacks is empty."""
    file = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: escape.csv(value) for name, value in row.items()} for row in rows)
    return file.getvalue()
