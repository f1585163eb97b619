"""Run records and profiles -> one page with tables and pictures. Loads no model."""

import base64
import itertools
import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from ..base.errors import DataError, FileError
from ..base.files import read_json_lines, write_text
from ..base.records import Record, find_records
from . import figures
from .tables import Section, against_all, conditions_table, covered, human_seconds, part, read_sections, table_rows

# What the page shows of a run's record, besides its row.
DETAILS = ("model", "data", "config", "plan", "parameters", "training", "environment", "command", "error")

_MOST_LOSS = 1e30  # what is beyond flattens every other curve, and overflows in drawing

STORE = "papers"
"""All recipes' runs have one place, and a run that two tables show is made once."""

__all__ = ["STORE", "conditions_table", "has_recipes", "write_report"]


def has_recipes(records: Iterable[Record]) -> bool:
    """Whether some of the runs are a recipe's, whose tables `papers` makes."""
    return any(part(record, "sweep").get("name") == STORE for record in records)


def write_report(runs_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str]) -> Path:
    """Writes out_dir/report.html from every run.json in runs_dir and below, and returns its path.

    The page holds its pictures; they also lie beside it as PNG files. A run that failed or did not finish is
    shown as such. Notes on the page name what is left out: a record, profile, plan, metrics or results that are gone,
    broken or of another kind.

    DataError: no run in runs_dir that could be read.
    """
    runs_dir, out_dir = Path(runs_dir), Path(out_dir)
    skipped: dict[Path, str] = {}
    records = find_records(runs_dir, skipped)
    if not records:
        told = f" that can be read ({next(iter(skipped.values()))})" if skipped else ""
        raise DataError(f"no run.json in {runs_dir} or below{told}: run `hotlora demo` or `hotlora train` first")
    names: set[str] = set()
    sections = [_shown_section(section, runs_dir, out_dir, names) for section in read_sections(records)]
    template = Path(__file__).parent / "report.html.j2"
    page = render(template, sections=sections, skipped=skipped, runs_dir=runs_dir, out_dir=out_dir, covered=covered)
    write_text(out_dir / "report.html", page)
    return out_dir / "report.html"


def render(template: Path, **values: Any) -> str:
    """A page from a Jinja template, which may include those that lie beside it and beside this module."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["seconds"] = human_seconds
    environment.filters["pretty"] = lambda value: json.dumps(value, indent=2, ensure_ascii=False)
    return environment.get_template(template.name).render(values)


def _shown_section(section: Section, runs_dir: Path, out_dir: Path, names: set[str]) -> dict[str, Any]:
    """What the template reads of a section; its pictures are written. names: files' names that are taken."""
    pictures = []
    for name, (title, caption, figure) in _pictures(section).items():
        file = out_dir / f"{_slug(f'{section.model} {section.data}'[:150], names, name)}.png"
        figures.save_figure(figure, file, 150)
        source = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
        pictures.append({"title": title, "caption": caption, "source": source})
    tables = [
        {"task": task, "metric": _metric(section, task), "rows": table_rows(section, task)} for task in section.tasks
    ]
    runs = [
        {
            "folder": folder.relative_to(runs_dir).as_posix(),
            "title": f"{record['name']}, seed {record['seed']}",
            "when": record["started"][:16].replace("T", " "),
            "seconds": record.get("seconds"),
            "details": {key: record[key] for key in DETAILS if record.get(key)},
        }
        for folder, record in section.records.items()
    ]
    return {"section": section, "tables": tables, "summary": _summary(section), "pictures": pictures, "runs": runs}


def _pictures(section: Section) -> dict[str, tuple[str, str, Figure]]:
    """File name -> title, caption, figure."""
    pictures = {}
    profile, plan = section.profile, section.plan
    if profile is not None:
        pictures["heat-map"] = (
            "Where the router sends the tokens",
            "Each row is a layer, each cell an expert; 1× is what every expert would get if all were used "
            f"alike. Darker is busier.{' Boxes: the experts that the plan keeps.' if plan else ''}",
            figures.heat_map(profile, plan),
        )
        pictures["load"] = (
            "The load in each layer, sorted",
            "The same numbers, in each layer from the busiest expert to the idlest."
            f"{' Orange: the experts that the plan keeps.' if plan else ''} Dashed: 1×.",
            figures.sorted_load(profile, plan),
        )
        sizes = {len(ids) for ids in plan.experts.values()} if plan else set()
        budget = sizes.pop() if len(sizes) == 1 else None
        pictures["coverage"] = (
            "How much routing a few experts cover",
            "Share of all assignments that go to each layer's k busiest experts: the mean over layers "
            "inside the band from the lowest layer to the highest.",
            figures.coverage_curve(profile, budget or None),
        )
    curves = []
    rows = table_rows(section, section.data)
    for row, (folder, record) in zip(rows, section.records.items(), strict=True):
        name = part(record, "training").get("metrics")
        if name and (folder / name).is_file():
            try:
                steps, losses = _losses(folder / name)
            except FileError as error:
                section.note(f"{record['name']}: its losses are left out: {error}")
                continue
            if steps:
                curves.append((row.name, record["condition"], steps, losses))
    if curves:
        pictures["loss"] = (
            "Training loss",
            "Mean loss per response token at each optimizer step, smoothed; thin lines are as logged.",
            figures.loss_curves(curves),
        )
    return pictures


def _losses(path: Path) -> tuple[list[int], list[float]]:
    """Steps and losses of a metrics file, without those of no number. FileError, naming the line: other values."""
    points = {}
    for number, row in enumerate(read_json_lines(path, "step", "loss"), start=1):
        step, loss = row["step"], row["loss"]
        if loss is None:  # NaN, or infinite
            continue
        if not (isinstance(step, int) and 0 <= step < 2**53 and isinstance(loss, int | float)):
            raise FileError(f"{path}, line {number}: step {str(step)[:40]!r} or loss {str(loss)[:40]!r} is no number")
        if abs(loss) < _MOST_LOSS:  # and no NaN
            points[step] = float(loss)
    return list(points), list(points.values())


def _summary(section: Section) -> str:
    """Hot against all in one sentence, where both have run."""
    for folder, hot in section.records.items():
        if hot["condition"] != "hot" or (found := against_all(section, folder, section.data)) is None:
            continue
        reference, difference = found
        share = ""
        if hot.get("parameters") and reference.get("parameters"):
            of_all = hot["parameters"]["trainable"] / max(1, reference["parameters"]["trainable"])
            share = f", with {of_all:.1%} of the trained parameters"
        if section.by_loss:
            ours, theirs = (record["training"]["test_loss"] for record in (hot, reference))
            return (
                f"On {section.data}, LoRA on the hot experts only has a held-out loss of {ours:.4f}, and LoRA on all "
                f"experts of {theirs:.4f}{share}."
            )
        ours, theirs = (record["evaluation"][section.data]["accuracy"] for record in (hot, reference))
        text = (
            f"On {section.data}, LoRA on the hot experts only is right in {ours:.1%} of the test examples, "
            f"and LoRA on all experts in {theirs:.1%}{share}."
        )
        points = 100 * difference.difference
        if difference.low <= 0 <= difference.high:
            text += f" A difference of {abs(points):.1f} points is less than this test set can tell apart."
        elif not math.isnan(difference.low):
            side = "better" if points > 0 else "worse"
            text += f" That is {abs(points):.1f} points {side}, more than chance over test examples explains."
        return text
    return ""


def _metric(section: Section, task: str) -> str:
    metrics = {
        record["evaluation"][task]["metric"]: record["evaluation"][task]["n"]
        for record in section.records.values()
        if task in part(record, "evaluation")
    }
    return "; ".join(f"{metric.replace('_', ' ')} on {n} test examples" for metric, n in metrics.items())


def _slug(text: str, taken: set[str], name: str) -> str:
    """A file's name of letters, digits and hyphens that is not taken: names may differ in other signs alone."""
    stem = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "runs"
    names = (f"{stem}-{number}-{name}" if number > 1 else f"{stem}-{name}" for number in itertools.count(1))
    found = next(name for name in names if name not in taken)
    taken.add(found)
    return found
