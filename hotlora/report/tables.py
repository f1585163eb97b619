"""Run records -> rows of text, for the page and for the terminal. Loads no model."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from ..base.errors import FileError
from ..base.escape import one_line
from ..base.records import Record, read_results
from ..evaluation.stats import Difference, paired_difference, proportion_interval
from ..routing.plan import ExpertPlan
from ..routing.profile import RoutingProfile
from .sections import (
    Records,
    Section,
    differing,
    distance,
    held_out_loss,
    held_out_rows,
    is_trained,
    option_text,
    part,
    read_sections,
    tested_on,
)  # fmt: skip
from .text import NONE

COLUMNS = {
    "accuracy": "accuracy, %", "difference": "against all, points", "loss": "loss", "perplexity": "perplexity",
    "token_accuracy": "token accuracy, %", "rouge_l": "ROUGE-L", "held_out": "held-out loss", "tested": "held-out rows",
    "covered": "routing covered", "trained": "trained parameters", "adapter": "adapter file", "speed": "tokens/s",
    "memory": "peak memory",
}  # fmt: skip
"""Beside them stand the options in which runs differ; their keys are "option NAME"."""


@dataclass(frozen=True)
class Row:
    """One run, as text: the same in the page and in the terminal."""

    name: str
    condition: str
    status: str
    cells: dict[str, str]
    """COLUMNS' keys, and "option NAME" -> text; "–" where the run has no such number"""
    note: str = ""
    """what became of a run that is not done"""


@dataclass(frozen=True)
class Shown:
    """A table of the page.

    Attributes:
        adapted: what its runs train, such as "experts alone"; empty where all of the section train the same.
        columns: key of a row's cells -> title. Columns without a number are left out, the score's excepted.
        folders: of the rows' runs.
    """

    task: str
    adapted: str
    columns: dict[str, str]
    rows: list[Row]
    folders: list[Path]


def section_tables(section: Section) -> list[Shown]:
    """What a section's runs gave: a table for each task and for what is adapted, in order of the latter."""
    shown, groups = [], section.groups
    for adapted, folders in groups.items():
        for task in section.tasks:
            rows = table_rows(section, task, folders)
            names = {
                f"option {name}": name.replace("_", " ") if name != "r" else "rank r"
                for name in differing(section.records[folder] for folder in folders)
            }
            columns = COLUMNS | ({"accuracy": "held-out loss", "difference": "against all"} if section.by_loss else {})
            columns = {key: columns[key] for key in ("accuracy", "difference")} | names | columns
            filled = {
                key: title
                for key, title in columns.items()
                if key == "accuracy" or any(row.cells[key] != NONE for row in rows)
            }
            shown.append(Shown(task, adapted if len(groups) > 1 else "", filled, rows, folders))
    return shown


def conditions_table(records: Records) -> Table:
    """The page's tables for the terminal, in 80 columns. `records` is what `find_records` returns."""
    sections = read_sections(records)
    several = len({section.model for section in sections}) > 1
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("run", min_width=10, overflow="fold")
    kinds = {section.by_loss for section in sections}
    score = "score" if len(kinds) > 1 else "held-out loss" if True in kinds else "accuracy, %"
    against = "against all" + (", pp" if True not in kinds else "")
    for title in (score, against, "covered", "trained"):
        table.add_column(title, justify="right", no_wrap=True)
    keys = ("accuracy", "difference", "covered", "trained")
    for section in sections:
        for shown in section_tables(section):
            heading = section.data if shown.task == section.data else f"{section.data} → {shown.task}"
            heading = f"[bold]{escape(one_line(heading))}[/]"
            heading += f" {escape(one_line(section.model))}" if several else ""
            heading += " (held-out loss)" if len(kinds) > 1 and section.by_loss else ""
            heading += "\nof different rows: no loss is comparable" if section.by_loss and section.tested_apart else ""
            heading += f"\n{shown.adapted}" if shown.adapted else ""
            table.add_row(heading)
            for row in shown.rows:
                note = f"\n[red]{escape(one_line(row.note))}[/]" if row.note else ""
                cells = (row.cells[key].split(" (")[0].replace(" to ", ", ") for key in keys)
                table.add_row(escape(one_line(row.name)) + note, *cells)
            table.add_section()
    return table


def table_rows(section: Section, task: str, folders: Sequence[Path] | None = None) -> list[Row]:
    """One row a run of `folders` (all of the section's): base, all, hot, random, cold, then others."""
    chosen = list(section.records) if folders is None else folders
    records = {folder: section.records[folder] for folder in chosen}
    names, options = run_names(records), differing(records.values())
    rows = []
    for folder, record in records.items():
        result = part(record, "evaluation").get(task)
        parameters, training = part(record, "parameters"), part(record, "training")
        trained = parameters.get("trainable")
        cells = dict.fromkeys(COLUMNS, NONE)
        for option in options:
            cells[f"option {option}"] = option_text(record, option) if is_trained(record) else NONE
        loss = held_out_loss(record)
        if result is not None:
            cells["accuracy"] = _accuracy(result)
            cells |= _of_own_rows(result)
        elif section.by_loss and loss is not None:
            cells["accuracy"] = f"{loss:.4f}"
        if not section.by_loss and loss is not None:
            cells["held_out"] = f"{loss:.4f}"
        if section.tested_apart and loss is not None:
            cells["tested"] = held_out_rows(record)
        if found := against_all(section, folder, task, chosen):
            cells["difference"] = _signed(found[1].difference, 4) if section.by_loss else _points(found[1])
        if (profile := section.profiles.get(folder)) is not None and folder in section.plans:
            cells["covered"] = f"{covered(profile, section.plans[folder]):.1%}"
        if trained:
            percent = parameters.get("percent")
            share = 100 * trained / max(1, parameters["total"]) if percent is None else percent
            cells["trained"] = f"{human_count(trained)} ({share:.{1 if share >= 1 else 2}f}%)"
        for key, value, text in (
            ("adapter", parameters.get("adapter_bytes"), human_bytes),
            ("speed", training.get("tokens_per_second"), lambda value: f"{value:,.0f}"),
            ("memory", training.get("peak_memory_bytes"), human_bytes),
        ):
            if value:
                cells[key] = text(value)
        note = _note(record, cells["accuracy"] != NONE)
        rows.append(Row(names[folder], record["condition"], record["status"], cells, note))
    return rows


def run_names(records: Records) -> dict[Path, str]:
    """What tells runs apart: their names, with seeds where these differ, with folders where that is not enough."""
    several_seeds = len({record["seed"] for record in records.values()}) > 1
    named = {
        folder: f"{record['name']}, seed {record['seed']}" if several_seeds else record["name"]
        for folder, record in records.items()
    }
    times = Counter(named.values())
    return {
        folder: f"{name} ({folder.parent.name}/{folder.name})" if times[name] > 1 else name
        for folder, name in named.items()
    }


def against_all(
    section: Section, folder: Path, task: str, folders: Sequence[Path] | None = None
) -> tuple[Record, Difference] | None:
    """The run on all experts with this run's seed, and this run's accuracy minus its accuracy; or of the two the
    held-out loss, where the section goes by it. Of several the one among `folders` whose options are nearest.

    With an interval where both kept their results on the same examples, else with nan. None: no such run, it is one
    itself, or one of the two was not evaluated.
    """
    record = section.records[folder]
    if record["condition"] == "all" or (task not in part(record, "evaluation") and not section.by_loss):
        return None
    others = [
        (other, reference)
        for other, reference in section.records.items()
        if reference["condition"] == "all" and reference["seed"] == record["seed"] and other != folder
    ]
    within = section.records if folders is None else folders
    for other, reference in sorted(others, key=lambda item: (item[0] not in within, distance(record, item[1]))):
        result = part(reference, "evaluation").get(task)
        if section.by_loss and (ours := held_out_loss(record)) and (theirs := held_out_loss(reference)):
            if tested_on(record) != tested_on(reference):
                continue
            return reference, Difference(ours - theirs, float("nan"), float("nan"))
        if result is None:
            continue
        a, b = _results(section, folder, task), _results(section, other, task)
        if a and b and [r.get("id") for r in a] == [r.get("id") for r in b]:
            return reference, paired_difference([r["correct"] for r in a], [r["correct"] for r in b])
        difference = record["evaluation"][task]["accuracy"] - result["accuracy"]
        return reference, Difference(difference, float("nan"), float("nan"))
    return None


def covered(profile: RoutingProfile, plan: ExpertPlan) -> float:
    """Share of the profile's assignments that go to the plan's experts, mean over the profile's layers."""
    shares = profile.shares()
    rows = [shares[row, list(plan.experts.get(layer, ()))].sum() for row, layer in enumerate(profile.layers)]
    return float(sum(rows)) / len(rows)


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


def _accuracy(result: Mapping[str, Any]) -> str:
    wilson = proportion_interval(result["correct"], result["n"])
    ends = {"ci_low": wilson.low, "ci_high": wilson.high}  # where the record has none, or null
    low, high = (other if result.get(name) is None else result[name] for name, other in ends.items())
    return f"{100 * result['accuracy']:.1f} [{100 * low:.1f}–{100 * high:.1f}]"


def _of_own_rows(result: Mapping[str, Any]) -> dict[str, str]:
    """Of people's own rows: loss, perplexity and token accuracy, with their intervals."""
    cells = {}
    for key, form, scale in (
        ("loss", ".4f", 1),
        ("perplexity", ".2f", 1),
        ("token_accuracy", ".1f", 100),
        ("rouge_l", ".3f", 1),
    ):
        if (value := result.get(key)) is not None:
            cells[key] = f"{scale * value:{form}}"
            ends = [scale * end for end in result.get(f"{key}_ci") or () if isinstance(end, int | float)]
            if len(ends) == 2:
                cells[key] += f" [{ends[0]:{form}}–{ends[1]:{form}}]"
    return cells


def _points(difference: Difference) -> str:
    point, low, high = (_signed(100 * value, 1) for value in difference)
    return f"{point} [{low} to {high}]" if difference.low == difference.low else point  # nan: no interval


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _note(record: Record, has_score: bool) -> str:
    if record["status"] == "failed":
        return f"failed: {record['error']}" if record.get("error") else "failed"
    if record["status"] == "running":
        return "not finished"
    return "" if has_score else "not evaluated"


def _results(section: Section, folder: Path, task: str) -> list[dict[str, Any]] | None:
    """One dict an example, with `id` and `correct`; None where the file is gone or broken, which is noted."""
    name = section.records[folder]["evaluation"][task].get("results")
    path = folder / name if name else None
    if not path or not path.is_file():
        return None
    try:
        return read_results(path)
    except FileError as error:
        section.note(f"{section.records[folder]['name']}: its results are left out: {error}")
        return None
