"""What `bench` found, as a table for the terminal, as Markdown, and as a picture. Loads no model."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from ..base.errors import FileError
from ..base.files import read_json
from ..report.figures import HOT, INK, MUTED, OTHER_SERIES, SERIES, new_figure, style, whole_numbers
from ..report.text import NONE, shown

COLUMNS = (
    "contender", "step, s", "× floor", "forward + backward + optimizer, s", "tokens/s", "peak memory",
    "kept, a token and layer", "operations", "share of rate",
)  # fmt: skip
_AXES = {"tokens": "tokens of a step", "experts": "adapted experts of a layer", "rank": "rank", "layers": "layers"}

Result = Mapping[str, Any]


def read_result(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON of a `bench`. FileError where it is another file."""
    result = read_json(path)
    if result.get("kind") not in ("bench", "growth") or result.get("version") != 1:
        raise FileError(f"{path} is not a result of `hotlora bench`, version 1: run it again with --output.")
    return result


def summary_table(result: Result) -> Table:
    """One row a contender, for the terminal, in 80 columns; `markdown` and the JSON hold more."""
    table = Table(title=_heading(result), box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    for title in ("step, s", "quartiles", "× floor", "tokens/s", "peak GB", "kept kB", "rate"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in result["contenders"]:
        if row["status"] == "done":
            step, ratio = row["seconds"]["step"], row.get("times_floor")
            table.add_row(
                row["name"], f"{step['median']:.3g}", f"{step['q1']:.3g}–{step['q3']:.3g}",
                shown(ratio["median"] if ratio else None, ".2f"), f"{row['tokens_per_second']:,.0f}",
                f"{row['peak_memory_bytes'] / 1e9:.2f}", f"{row['saved_bytes_per_token_layer'] / 1000:.1f}",
                shown(row.get("share_of_rate"), ".0%"),
            )  # fmt: skip
    notes = ["kept: bytes for backward, a token and MoE layer; rate: share of the machine's"]
    notes += [f"{row['name']}: {row['reason']}" for row in result["contenders"] if row["status"] != "done"]
    table.caption = escape("\n".join(notes))
    return table


def markdown(result: Result) -> str:
    """What was run, where and when, and one row a contender."""
    if result["kind"] == "growth":
        return _growth_markdown(result)
    environment = result["environment"]
    versions = ", ".join(f"{name} {environment[name]}" for name in ("torch", "transformers", "peft", "trl", "python"))
    head = [f"**{_heading(result)}**", "", f"{result['started']}, {environment['device']}; {versions}."]
    if result.get("command"):
        head += [f"`{result['command']}`"]
    head += [
        f"Layer CV {result['routing']['cv']:.2f}; matrix rate {result['matrix_rate'] / 1e12:.3g} TFLOP/s; "
        f"{len(_first_times(result))} rounds.",
        "",
    ]
    lines = [_line(COLUMNS), "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    return "\n".join([*head, *lines, *(_line(_cells(row)) for row in result["contenders"])])


def _growth_markdown(result: Result) -> str:
    """Seconds of a step, a row for each value of what grew."""
    first, lines = result["runs"][-1], growth_lines(result)
    axis = _AXES[result["axis"]]
    found = [
        f"**Growth with {axis}, else {_heading(first)}**", "",
        f"{first['started']}, {first['environment']['device']}. `{first.get('command', '')}` "
        f"Median seconds of a step (quartiles), {len(_first_times(first))} rounds.", "",
        _line([axis, *lines]), "|---:" * (len(lines) + 1) + "|",
    ]  # fmt: skip
    for value in result["values"]:
        at = [next((point for point in points if point[0] == value), None) for points in lines.values()]
        cells = [NONE if p is None else f"{p[1]:.3g} ({p[2]:.3g}–{p[3]:.3g})" for p in at]
        found.append(_line([str(value), *cells]))
    return "\n".join(found)


def speed_tables(folder: str | os.PathLike[str]) -> str:
    """Markdown of all results in a folder, in the order of their names; for docs/speed.md."""
    files = sorted(Path(folder).glob("*.json"))
    if not files:
        return "No result is stored yet."
    pages = []
    for file in files:
        result = read_result(file)
        picture, image = file.with_suffix(".png"), ""
        if picture.is_file():
            image = f"\n\n![Step time by {result['axis']}.](../{picture.parent.name}/{picture.name})"
        pages.append(f"### {file.stem}\n\n{markdown(result)}{image}")
    return "\n\n".join(pages)


def growth_lines(result: Result) -> dict[str, list[tuple[float, float, float, float]]]:
    """Contender -> (value, median seconds of a step, first and third quartile), ascending. Where the number of
    experts grows, all of them are one line."""
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for value, run in zip(result["values"], result["runs"], strict=True):
        for row in run["contenders"]:
            if row["status"] == "done":
                step = row["seconds"]["step"]
                name = row["name"] if result["axis"] != "experts" or row["kind"] == "floor" else "hotlora"
                lines.setdefault(name, []).append((value, step["median"], step["q1"], step["q3"]))
    return {name: sorted(points) for name, points in lines.items()}


def growth_figure(result: Result) -> Figure:
    """Step time against what grew; bands are quartiles."""
    figure, axes = new_figure(4.2)
    style(axes)
    spare = iter(OTHER_SERIES * 4)
    colors = {"floor": MUTED, "all": SERIES["all"], "hotlora": HOT, "hot 25%": HOT}
    for name, points in growth_lines(result).items():
        x, median, low, high = zip(*points, strict=True)
        color = colors.get(name) or next(spare)
        axes.fill_between(x, low, high, color=color, alpha=0.16, linewidth=0)
        axes.plot(x, median, color=color, linewidth=2, marker="o", markersize=4, label=name)
    axes.set(xlabel=_AXES[result["axis"]], ylabel="seconds a step")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    whole_numbers(axes.xaxis)
    axes.legend(frameon=False, labelcolor=INK)
    return figure


def _heading(result: Result) -> str:
    model, settings = result["model"], result["settings"]
    return (
        f"{model['type']}, {model['layers']} layers of {model['num_experts']} experts, hidden {model['hidden_size']}; "
        f"{settings['tokens']:,} tokens in sequences of {settings['length']:,}, rank {settings['r']}, "
        f"{settings['dtype']} on {settings['device']}"
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Mapping[str, Any]) -> list[str]:
    """In the order of COLUMNS."""
    if row["status"] != "done":
        told = f"failed: {row['reason']}" if row["status"] == "failed" else row["reason"]
        return [row["name"], told, *[NONE] * (len(COLUMNS) - 2)]
    seconds = row["seconds"]
    step, ratio = seconds["step"], row.get("times_floor")
    return [
        row["name"],
        f"{step['median']:.3g} ({step['q1']:.3g}–{step['q3']:.3g}; min {step['min']:.3g})",
        f"{ratio['median']:.2f} ({ratio['q1']:.2f}–{ratio['q3']:.2f})" if ratio else NONE,
        " + ".join(f"{seconds[part]['median']:.3g}" for part in ("forward", "backward", "optimizer")),
        f"{row['tokens_per_second']:,.0f}",
        f"{row['peak_memory_bytes'] / 1e9:.2f} GB",
        f"{row['saved_bytes_per_token_layer'] / 1000:.1f} kB",
        f"{row['operations']:,}",
        shown(row.get("share_of_rate"), ".0%"),
    ]


def _first_times(result: Result) -> list[float]:
    return next((row["seconds"]["step"]["all"] for row in result["contenders"] if row["status"] == "done"), [])
