"""A comparison as tables: for the terminal, as CSV, Markdown and LaTeX (booktabs). The words are the same in each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os.path import commonpath
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from ..base import escape as escapes
from ..base.escape import one_line
from ..evaluation.stats import Interval
from .text import (
    NONE,
    csv_table,
    html_table,
    latex_comments,
    latex_table,
    markdown_items,
    markdown_table,
    p_word,
    shown,
)

if TYPE_CHECKING:  # these show themselves by means of this module
    from .comparison import Comparison, Row, Table
    from .paired import PairedRuns, PairedTask

_PAIRED = ("n", "A", "B", "A − B", "95% interval", "only A", "only B", "p")


def terminal_tables(comparison: Comparison) -> Group:
    """Two tables for each task, in 80 columns: the conditions, and each against the reference."""
    parts: list[Any] = []
    for table in comparison.tables:
        rows = [cells(row, comparison) for row in table.rows]
        columns = _columns(comparison)
        own, against = columns[:6], [columns[0], *columns[6:]]
        folder = commonpath([row["condition"].rpartition("/")[0] for row in rows])
        rows = [row | {"condition": row["condition"].removeprefix(f"{folder}/")} for row in rows]
        within = f", conditions {folder}/…" if folder else ""
        parts.append(Text(one_line(f"{_title(table)}: {table.measure}{within}"), style="bold"))
        parts.append(_rich(own, ([row[name] for name in own] for row in rows)))
        parts.append(_rich(against, ([r[name] for name in against] for r in rows if r["reference"] != NONE)))
        parts += [Text(one_line(f"! {note}"), style="yellow") for note in table.notes]
    if any(row.against is not None for table in comparison.tables for row in table.rows):
        parts.append(Text(_legend(comparison), style="dim"))
    parts += [Text(one_line(f"! {told}"), style="red") for told in comparison.left_out]
    return Group(*parts)


def _legend(comparison: Comparison) -> str:
    told = "Δ: against the reference, paired by seed; p: that there is no difference (t test)"
    if comparison.margins:
        bound = f"{comparison.margins[0]:g}"
        told += f"; TOST {bound}: that it is {bound} or more, either way (small: equivalent)"
    return told


def paired_table(runs: PairedRuns) -> Group:
    """Two runs example by example: one line a task, in 80 columns."""
    table = RichTable(box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("task", min_width=9, overflow="fold")
    for name in _PAIRED:
        table.add_column(name.replace("only ", "only\n"), justify="right", no_wrap=True)
    table.add_column("verdict", min_width=7, overflow="fold")
    for task in runs.tasks:
        table.add_row(escape(one_line(task.task)), *_paired_cells(task))
    title = Text(f"A: {one_line(runs.a)}\nB: {one_line(runs.b)}\n{one_line(_metrics(runs))}", "bold")
    notes = [*(note for task in runs.tasks for note in task.notes), *runs.left_out]
    return Group(title, table, *(Text(one_line(f"! {note}"), style="yellow") for note in notes))


def html_tables(comparison: Comparison) -> str:
    """For notebooks: one table a task, then what is missing. The notebook has the colours."""
    columns = _columns(comparison)
    parts = []
    for table in comparison.tables:
        caption = f"{_title(table)}: {table.measure}"
        parts.append(html_table(columns, _texts(table, comparison), _sides(columns), caption, table.notes))
    left_out = html_table((), (), "", "", [f"left out: {told}" for told in comparison.left_out])
    return f"<div>{''.join(parts)}{left_out}</div>"


def html_paired(runs: PairedRuns) -> str:
    """For notebooks: two runs example by example, one line a task."""
    head = ("task", *_PAIRED, "verdict")
    rows = [[task.task, *_paired_cells(task)] for task in runs.tasks]
    notes = [*(note for task in runs.tasks for note in task.notes), *runs.left_out]
    return html_table(head, rows, f"l{'r' * len(_PAIRED)}l", f"A: {runs.a}, B: {runs.b}; {_metrics(runs)}", notes)


def _metrics(runs: PairedRuns) -> str:
    units = {task.unit: [other.metric for other in runs.tasks if other.unit == task.unit] for task in runs.tasks}
    return "; ".join(f"{', '.join(dict.fromkeys(names))}, {unit}" for unit, names in units.items())


def _paired_cells(task: PairedTask) -> list[str]:
    only = [NONE] * 3 if (m := task.mcnemar) is None else [str(m.only_a), str(m.only_b), p_word(m.p)]
    digits = 2 if task.unit == "%" else 3
    numbers = [f"{task.a:.{digits}f}", f"{task.b:.{digits}f}", _signed(task.difference, digits)]
    scores = [f"{task.n:,}", *numbers, _range(task.interval, digits)]
    return [*scores, *only, task.verdict]


def markdown(comparison: Comparison) -> str:
    """A heading and one table for each task, then what is missing."""
    lines: list[str] = []
    columns = _columns(comparison)
    for table in comparison.tables:
        lines += [f"### {escapes.markdown(f'{_title(table)}: {table.measure}')}", ""]
        lines += [*markdown_table(columns, _texts(table, comparison), _sides(columns)), ""]
        lines += [*markdown_items(table.notes), *([""] if table.notes else [])]
    if comparison.left_out:
        lines += ["Left out:", "", *markdown_items(comparison.left_out), ""]
    return "\n".join(lines)


def latex(comparison: Comparison) -> str:
    """One `tabular` for each task, for \\usepackage{booktabs}; notes are comments above it."""
    columns = _columns(comparison)
    lines: list[str] = []
    for table in comparison.tables:
        lines += latex_comments([f"{_title(table)}: {table.measure}", *table.notes])
        lines += [*latex_table(columns, _texts(table, comparison), _sides(columns)), ""]
    lines += latex_comments(f"left out: {told}" for told in comparison.left_out)
    return "\n".join(lines).rstrip("\n") + "\n"


def csv_text(comparison: Comparison) -> str:
    """One line a condition and task, with the numbers as they are; what is None is empty."""
    return csv_table([_numbers(table, row, comparison) for table in comparison.tables for row in table.rows])


def cells(row: Row, comparison: Comparison) -> dict[str, str]:
    """Column -> text; "–" where there is no number."""
    digits = 2 if comparison.metric == "score" else 4
    percent, against = row.trainable_percent, row.against
    spread = "" if row.summary.sd is None else f" ± {row.summary.sd:.{digits}f}"
    found = dict.fromkeys(_columns(comparison), NONE) | {
        "reference": NONE,
        "condition": row.condition,
        "seeds": NONE if None in row.values else str(len(row.values)),
        "mean ± sd": f"{row.summary.mean:.{digits}f}{spread}",
        "trained, %": shown(percent, ".1f" if percent is not None and percent >= 10 else ".2f"),
        "tokens/s": shown(row.tokens_per_second, ",.0f"),
    }
    if against is None:
        return found
    p_values = [against.p, *(against.tost[bound] for bound in comparison.margins)]
    found |= dict(zip(_p_columns(comparison), map(p_word, p_values), strict=True))
    return found | {
        "reference": against.reference,
        "Δ": _signed(against.test.mean, digits),
        "95% interval": _range(against.test.interval, digits),
        "sd ratio": shown(against.sd_ratio.ratio, ".2f"),
        "verdict": against.verdict,
    }


def _columns(comparison: Comparison) -> list[str]:
    own = ["condition", "seeds", "mean ± sd", "sd ratio", "trained, %", "tokens/s"]
    return [*own, "Δ", "95% interval", *_p_columns(comparison), "verdict"]


def _p_columns(comparison: Comparison) -> list[str]:
    mark = " (Holm)" if comparison.holm else ""
    return [f"{name}{mark}" for name in ("p", *(f"TOST {bound:g}" for bound in comparison.margins))]


def _texts(table: Table, comparison: Comparison) -> list[list[str]]:
    """The table's cells, in the order of `_columns`."""
    rows = [cells(row, comparison) for row in table.rows]
    return [[row[name] for name in _columns(comparison)] for row in rows]


def _sides(columns: list[str]) -> str:
    return f"l{'r' * (len(columns) - 2)}l"


def _numbers(table: Table, row: Row, comparison: Comparison) -> dict[str, Any]:
    against = row.against
    test, ratio = (against.test, against.sd_ratio) if against else (None, None)
    found: dict[str, Any] = {
        "sweep": table.sweep, "model": table.model, "task": table.task, "metric": comparison.metric,
        "condition": row.condition, "n": len(row.values), "mean": row.summary.mean, "sd": row.summary.sd,
        "trainable_percent": row.trainable_percent, "tokens_per_second": row.tokens_per_second,
        "reference": against.reference if against else None, "pairs": test.n if test else None,
        "difference": test.mean if test else None, "difference_sd": test.sd if test else None,
        **ends("ci95", test.interval if test else None), **ends("ci90", test.interval90 if test else None),
        "p": test.p if test else None, "p_holm": against.p_holm if against else None,
    }  # fmt: skip
    for bound in comparison.margins:
        found[f"tost_{bound:g}"] = test.tost[bound] if test else None
        found[f"tost_{bound:g}_holm"] = (against.tost_holm or {}).get(bound) if against else None
    found |= {"sd_ratio": ratio.ratio if ratio else None, **ends("sd_ratio", ratio.interval if ratio else None)}
    return found | {"verdict": against.verdict if against else None, "reason": test.reason if test else None}


def ends(name: str, interval: Interval | None) -> Mapping[str, float | None]:
    """NAME_low and NAME_high, for a table of plain numbers."""
    low, high = interval or (None, None)
    return {f"{name}_low": low, f"{name}_high": high}


def _title(table: Table) -> str:
    return f"{table.sweep}, {table.task}, {table.model}"


def _rich(columns: list[str], rows: Iterable[list[str]]) -> RichTable:
    table = RichTable(box=SIMPLE_HEAD, padding=0)
    for name in columns:
        if name in ("condition", "verdict"):
            table.add_column(name, min_width=10, overflow="fold")
        else:
            header = name.replace("TOST ", "TOST\n").replace(" (", "\n(")
            table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(one_line(cell)) for cell in row))
    return table


def _signed(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")  # + 0.0: no minus before zero


def _range(interval: Interval | None, digits: int) -> str:
    if interval is None:
        return NONE
    return "[" + ", ".join(_signed(end, digits).removeprefix("+") for end in interval) + "]"
