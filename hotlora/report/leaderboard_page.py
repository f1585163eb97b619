"""A leaderboard as Markdown, a table for the terminal, CSV, JSON, and a picture."""

import os
from collections.abc import Callable, Mapping
from itertools import chain, repeat
from pathlib import Path
from string import ascii_letters
from typing import Any
from urllib.parse import quote

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from ..base.escape import markdown, one_line
from ..base.files import write_text
from .comparison import plain
from .comparison_table import ends
from .figures import HOT, INK, MUTED, Figure, save_figure, style
from .leaderboard import TOLERANCE, Leaderboard, Row, Standing, Table
from .leaderboard_protocol import DEFAULTS, LOSS, NAMES, is_loss, shown
from .text import NONE, csv_table, human_bytes, human_count, markdown_items

PAGE, CSV, PICTURE = "leaderboard.md", "leaderboard.csv", "leaderboard.png"
_COSTS = ("seconds", "memory")
_CHOSEN = "What the methods chose that not all chose, beside the defaults (on the first task):"
_ALWAYS = ("learning_rate", "rule")
READING = f"""**Score** is the mean over seeds with its 95% interval (Student's t): where other seeds would put it, on
the same test examples. Each number under **seeds** is a link to that run's record.

**Rank** does not follow the mean. Every two methods of a task are compared over the seeds that both have, by a paired t
test; all p values of a task are corrected together (Holm), and what stays below 0.05 is a win of one and a loss of the
other. Rank is by wins less losses, and equal ones share it. Methods that share a rank are not shown to be equal: they
are not told apart. The more pairs there are, the less each is told. A method with more seeds is told from others more
easily; one whose seeds differ much is told less easily, so it loses less, too: look at seeds and intervals before a
low rank is read as a worse method.

**Budget**: methods that train at most {TOLERANCE:.0%} more parameters than the least of them are of one budget; an
empty cell is the budget above. **In budget** is the rank among these alone, by the same corrected tests. A rank over
all budgets mixes what a method does with how much it trains.

**Seconds** are the median of the trainings, without profile and evaluation, and **memory** is the most that was held.
Both depend on the machine and on what else runs there: where there is more than one kind, a letter says which, and only
those with the same letter may be compared."""


def write_leaderboard(board: Leaderboard, output: str | os.PathLike[str]) -> Path:
    """Writes leaderboard.md, .csv and .png into `output`, and returns the page."""
    output = Path(output)
    save_figure(picture(board), output / PICTURE, 110)
    write_text(output / CSV, csv_text(board, output))
    text = f"# Leaderboard\n\n{markdown_tables(board, output)}\n\n![Scores by method.]({PICTURE})\n"
    write_text(output / PAGE, f"{text}\n## How to read it\n\n{READING}\n")
    return output / PAGE


def markdown_tables(board: Leaderboard, page: Path, level: int = 2) -> str:
    """Of each task a heading, what all its runs share, the table, and notes. page: the folder from which records are
    linked."""
    letters = _letters(board)
    lines: list[str] = []
    for table in board.tables:
        lines += [f"{'#' * level} {markdown(_title(table, board))}", "", _shared(table), ""]
        heads = ["budget", "method", "trained", "rank", "won – lost", _unit(table), "in budget", "seeds", *_COSTS]
        lines += [f"| {' | '.join(heads)} |", "|---:|---|---:|---:|---:|---:|---:|---|---:|---:|"]
        for row, cells in _rows(table, letters):
            cells = {name: markdown(cell) for name, cell in cells.items()} | {"seeds": _links(row, page)}
            lines.append(f"| {' | '.join(cells[head.split(' [')[0]] for head in heads)} |")
        lines += ["", *markdown_items(table.notes), *([""] if table.notes else [])]
    told = [f"{letter} {device}".strip() for device, letter in letters.items()]
    lines += [f"Seconds and memory: {markdown('; '.join(told))}.", ""] if told else []
    lines += _methods(board)
    if board.left_out:
        lines += ["Not on the board:", ""]
        lines += markdown_items(f"{_from(folder, page)}: {why}" for folder, why in board.left_out.items())
    return "\n".join(lines).rstrip()


def terminal_tables(board: Leaderboard) -> Group:
    """A table a task, in 80 columns."""
    parts: list[Any] = []
    letters = _letters(board)
    for table in board.tables:
        parts.append(Text(one_line(f"{table.task}, {table.model}: {_told(table)}"), style="bold"))
        rich = RichTable(box=SIMPLE_HEAD, padding=0, show_edge=False)
        heads = ["budget", "method", "trained", "rank", "won – lost", _unit(table), "in budget", "seeds", "seconds"]
        for head in heads:
            name = head.replace(" [", "\n[").replace("in budget", "in\nbudget").replace("won – ", "won –\n")
            is_name = head == "method"
            rich.add_column(name, justify="left" if is_name else "right", no_wrap=not is_name, overflow="fold")
        for row, cells in _rows(table, letters):
            cells |= {
                "seeds": NONE if None in row.values else str(len(row.values)),
                "trained": human_count(row.trained),
            }
            rich.add_row(*(escape(one_line(cells[head.split(" [")[0]])) for head in heads))
        parts += [rich, *(Text(one_line(f"! {note}"), style="yellow") for note in table.notes), Text("")]
    parts += [Text(one_line(f"{letter} {device}".strip())) for device, letter in letters.items()]
    parts += [Text(one_line(f"! {folder}: {why}"), style="red") for folder, why in board.left_out.items()]
    return Group(*parts)


def csv_text(board: Leaderboard, page: Path) -> str:
    """A line a method and task, with the numbers as they are."""
    lines = []
    for table in board.tables:
        for row in table.rows:
            standing: dict[str, int | None] = {}
            for name, found in (("", row.overall), ("_in_budget", row.in_budget)):
                standing |= {f"rank{name}": found.rank, f"wins{name}": found.wins, f"losses{name}": found.losses}
            lines.append({
                "task": table.task, "model": table.model, "metric": table.protocol["metric"], "method": row.method,
                "budget": row.budget, "trained": row.trained, "trained_percent": row.percent, "n": len(row.values),
                "seeds": " ".join(str(seed) for seed in row.values if seed is not None), "mean": row.mean,
                **ends("ci95", row.interval), **standing, "seconds": _joined(row.seconds),
                "memory_bytes": _joined(row.memory), "hardware": "; ".join(row.seconds), "note": row.note,
                "records": " ".join(_from(folder, page) for folder in row.folders.values()),
            })  # fmt: skip
    return csv_table(lines)


def as_dict(board: Leaderboard) -> dict[str, Any]:
    """Plain values for JSON, every pair's test among them."""
    found: dict[str, Any] = plain(board)
    return found


def picture(board: Leaderboard) -> Figure:
    """A panel a task, a line a method from the least budget to the largest: seeds as small dots, the mean and its 95%
    interval; coloured: what won and did not lose."""
    tables = [table for table in board.tables if any(row.budget for row in table.rows)]
    sizes: dict[str, set[float]] = {}
    for row in (row for table in tables for row in table.rows if row.budget):
        sizes.setdefault(row.method, set()).add(row.trained)
    methods = sorted(sizes, key=lambda method: (min(sizes[method]), method))
    names = [f"{m}, {' to '.join(map(human_count, sorted({min(sizes[m]), max(sizes[m])})))}" for m in methods]
    figure = Figure(figsize=(9.0, 1.1 + 0.3 * len(methods)), layout="constrained")
    panels = figure.subplots(1, max(1, len(tables)), squeeze=False, sharey=True)[0]
    for axes, table in zip(panels, tables, strict=False):
        style(axes, grid="x")
        for row in table.rows:
            if row.budget:
                place = methods.index(row.method)
                color = HOT if row.overall.wins and not row.overall.losses else INK
                axes.plot(list(row.values.values()), [place + 0.24] * len(row.values), ".", color=MUTED, markersize=4)
                if row.interval is not None:
                    axes.plot(row.interval, [place, place], color=color, linewidth=1.4)
                axes.plot(row.mean, place, "o", color=color, markersize=5)
        axes.set_title(_title(table, board), fontsize=10.5, color=INK)
        axes.set_xlabel(LOSS if is_loss(table.protocol) else "points", fontsize=9.5, color=INK)
    panels[0].set_yticks(range(len(methods)), names)
    panels[0].set_ylim(len(methods) - 0.4, -0.6)
    return figure


def _rows(table: Table, letters: Mapping[str, str]) -> list[tuple[Row, dict[str, str]]]:
    """Each row with its cells, by their heads; of a budget the first row has its number."""
    digits = 4 if is_loss(table.protocol) else 2
    found, above = [], None
    for row in table.rows:
        interval = "" if row.interval is None else f" [{row.interval.low:.{digits}f}, {row.interval.high:.{digits}f}]"
        alone = sum(other.budget == row.budget and not other.note for other in table.rows) < 2
        percent = "" if row.percent is None else f" ({row.percent:.{1 if row.percent >= 10 else 2}f}%)"
        cells = {
            "budget": NONE if row.budget is None else "" if row.budget == above else str(row.budget),
            "method": row.method,
            "trained": f"{human_count(row.trained)}{percent}",
            "rank": _rank(row.overall),
            "won – lost": NONE if row.note else f"{row.overall.wins} – {row.overall.losses}",
            _measure(table): f"{row.mean:.{digits}f}{interval}".replace("-", "−"),
            "in budget": NONE if alone else _rank(row.in_budget),
            "seconds": _by_hardware(row.seconds, letters, "{:,.0f}".format),
            "memory": _by_hardware(row.memory, letters, human_bytes),
        }
        found.append((row, cells))
        above = row.budget
    return found


def _by_hardware(values: Mapping[str, float], letters: Mapping[str, str], form: Callable[[float], str]) -> str:
    return ", ".join(f"{form(value)} {letters[device]}".strip() for device, value in values.items()) or NONE


def _rank(standing: Standing) -> str:
    return NONE if standing.rank is None else str(standing.rank)


def _title(table: Table, board: Leaderboard) -> str:
    several = len({other.protocol["fingerprint"] for other in board.tables}) > 1
    return f"{table.task}, {table.model}" if several else table.task


def _measure(table: Table) -> str:
    return LOSS if is_loss(table.protocol) else "score, %"


def _unit(table: Table) -> str:
    return f"{_measure(table)} [95%]"


def _told(table: Table) -> str:
    metric = str(table.protocol["metric"]).replace("_", " ")
    told = sum(pair.winner is not None for pair in table.pairs)
    return f"{metric}; {told} of {len(table.pairs)} pairs told apart"


def _shared(table: Table) -> str:
    """What all runs of a task share, in a paragraph."""
    protocol = table.protocol
    told = [
        f"{what} {shown(protocol[name])}"
        for name, (what, _) in NAMES.items()
        if name not in ("task", "metric") and protocol.get(name) not in (None, False)
    ]
    seeds = f"seeds {shown(protocol['seeds'])} (to be ranked: {shown(protocol['ranked_with'])})"
    return markdown(f"{table.model}, {_told(table)}. Shared by all runs: {'; '.join([*told, seeds])}.")


def _links(row: Row, page: Path) -> str:
    names = {seed: "record" if seed is None else str(seed) for seed in row.folders}
    return " ".join(f"[{names[s]}]({quote(_from(folder / 'run.json', page))})" for s, folder in row.folders.items())


def _methods(board: Leaderboard) -> list[str]:
    """What each method chose, but for what is as by default, or the same in all."""
    of_method: dict[str, Mapping[str, Any]] = {}
    for table in board.tables:
        for row in table.rows:
            if row.options:
                of_method.setdefault(row.method, row.options)
    names = [n for n in next(iter(of_method.values()), {}) if len({repr(own[n]) for own in of_method.values()}) > 1]
    told = []
    for method, own in of_method.items():
        chosen = [n for n in names if own[n] is not None and (n in _ALWAYS or own[n] != DEFAULTS.get(n))]
        told.append(f"{method}: {', '.join(f'{name} {shown(own[name])}' for name in chosen)}")
    if not names:
        return []
    return [_CHOSEN, "", *markdown_items(told), ""]


def _letters(board: Leaderboard) -> dict[str, str]:
    """A letter for each kind of hardware; of a single one none."""
    devices = dict.fromkeys(d for table in board.tables for row in table.rows for d in (*row.seconds, *row.memory))
    letters = ascii_letters * len(devices) if len(devices) > 1 else ""
    marks = chain((f"({letter})" for letter in letters), repeat(""))
    return dict(zip(devices, marks, strict=False))


def _joined(values: Mapping[str, float]) -> float | str | None:
    found = list(values.values())
    return "; ".join(map(str, found)) if len(found) > 1 else found[0] if found else None


def _from(path: Path, page: Path) -> str:
    return Path(os.path.relpath(path, page)).as_posix()
