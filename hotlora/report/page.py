"""Run records and profiles -> one page with tables and pictures. Loads no model."""

import base64
import itertools
import json
import math
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2

from ..base.errors import DataError, FileError
from ..base.files import read_json_lines, write_text
from ..base.records import Record, find_records
from . import figures
from .figures import Figure
from .measured import apart, told_way
from .over_seeds import repeated, seeds_summary
from .rows import against_all, covered, run_names
from .sections import Records, Section, part, read_sections, same_options
from .tables import Shown, conditions_table, section_tables
from .text import human_seconds

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
    command = shlex.join(["hotlora", "report", str(runs_dir), "--output", str(out_dir)])
    page = render(template, sections=sections, skipped=skipped, command=command, covered=covered)
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
    tables = section_tables(section)
    pictures = []
    for name, (title, caption, figure) in _pictures(section, tables).items():
        file = out_dir / f"{_slug(f'{section.model} {section.data}'[:150], names, name)}.png"
        figures.save_figure(figure, file, 160)
        source = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
        pictures.append({"title": title, "caption": caption, "source": source})
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
    shown = [
        {"table": table, "metric": _metric(section, table), "summary": _summary(section, table)} for table in tables
    ]
    return {"section": section, "tables": shown, "pictures": pictures, "runs": runs}


def _pictures(section: Section, tables: list[Shown]) -> dict[str, tuple[str, str, Figure]]:
    """File name -> title, caption, figure."""
    pictures = {}
    profile, plan = section.profile, section.plan
    if profile is not None:
        names = run_names(section.records)
        whose = f"the experts that the plan of {names[section.plan_of]} keeps. " if section.plan_of else ""
        counted = f"Counted for {names[section.profile_of]}. " if section.profile_of else ""
        pictures["heat-map"] = (
            "Where the router sends the tokens",
            "Each row is a layer, each cell an expert; 1× is what every expert would get if all were used "
            f"alike. Darker is busier. {whose and f'Boxes: {whose}'}{counted}".rstrip(),
            figures.heat_map(profile, plan),
        )
        pictures["load"] = (
            "The load in each layer, sorted",
            "The same numbers, in each layer from the busiest expert to the idlest. "
            f"{whose and f'Orange: {whose}'}Dashed: 1×.",
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
    for number, table in enumerate({table.adapted: table for table in tables}.values()):
        if curves := _curves(section, {folder: section.records[folder] for folder in table.folders}):
            has_held_out = any(curve.held_out for curve in curves)
            pictures["loss" if number == 0 else f"loss-{number + 1}"] = (
                "Training loss" + (f": LoRA on {table.adapted}" if table.adapted else ""),
                "Mean loss per response token at each optimizer step, smoothed; "
                + ("the mean over seeds, and the band of all of them." if table.seeds else "thin lines are as logged.")
                + (" Dots: the loss on held-out data." if has_held_out else ""),
                figures.loss_curves(curves),
            )
    return pictures


def _curves(section: Section, records: Records) -> list[figures.Curve]:
    """One a run; where runs differ in their seed alone, one a condition."""
    found: dict[Path, tuple[dict[int, float], dict[int, float]]] = {}
    for folder, record in records.items():
        metrics = part(record, "training").get("metrics")
        if metrics and (folder / metrics).is_file():
            try:
                training, held_out = _losses(folder / metrics)
            except FileError as error:
                section.note(f"{record['name']}: its losses are left out: {error}")
                continue
            if training:
                found[folder] = training, held_out
    if not (groups := repeated(records)):
        names = run_names(records)
        return [figures.Curve(names[folder], records[folder]["condition"], *losses) for folder, losses in found.items()]
    curves = []
    for group in groups:
        runs = [found[folder] for folder in group.runs.values() if folder in found]
        by_step, later_by_step = (_by_step([losses[which] for losses in runs]) for which in (0, 1))
        if any(losses[0].keys() != by_step.keys() for losses in runs):
            kept = f"the {len(by_step)} steps that all have" if by_step else "no step, for they have none in common"
            section.note(f"{group.name}: its runs logged different steps; the loss picture shows {kept}.")
        if by_step:
            mean = {step: fmean(losses) for step, losses in by_step.items()}
            later = {step: fmean(losses) for step, losses in later_by_step.items()}
            band = {step: (min(losses), max(losses)) for step, losses in by_step.items()}
            curves.append(figures.Curve(group.name, group.condition, mean, later, band))
    return curves


def _by_step(runs: list[dict[int, float]]) -> dict[int, list[float]]:
    """The losses of all runs at each step that all have."""
    steps = [step for step in runs[0] if all(step in losses for losses in runs)] if runs else []
    return {step: [losses[step] for losses in runs] for step in steps}


def _losses(path: Path) -> tuple[dict[int, float], dict[int, float]]:
    """Step -> training loss, and step -> held-out loss, of a metrics file, without those of no number.

    FileError, naming the line: other values.
    """
    training: dict[int, float] = {}
    held_out: dict[int, float] = {}
    for number, row in enumerate(read_json_lines(path, "step", "loss"), start=1):
        for name, losses in (("loss", training), ("eval_loss", held_out)):
            step, loss = row["step"], row.get(name)
            if loss is None:  # NaN, or infinite
                continue
            if not (isinstance(step, int) and 0 <= step < 2**53 and isinstance(loss, int | float)):
                told = f"step {str(step)[:40]!r} or {name} {str(loss)[:40]!r} is no number"
                raise FileError(f"{path}, line {number}: {told}")
            if abs(loss) < _MOST_LOSS:  # and no NaN
                losses[step] = float(loss)
    return training, held_out


def _summary(section: Section, table: Shown) -> str:
    """A table's hot run against all in words, and as many other experts, where they have run; over several seeds their
    means."""
    if table.seeds and (text := seeds_summary(section, table.task, table.folders)):
        return text
    records = {folder: section.records[folder] for folder in table.folders}
    for folder, hot in records.items():
        if hot["condition"] != "hot" or (found := against_all(section, folder, table.task, table.folders)) is None:
            continue
        reference, difference = found
        share = ""
        if hot.get("parameters") and reference.get("parameters"):
            of_all = hot["parameters"]["trainable"] / max(1, reference["parameters"]["trainable"])
            share = f", with {of_all:.1%} of the trained parameters"
        if section.by_loss:
            ours, theirs = (record["training"]["test_loss"] for record in (hot, reference))
            return (
                f"On {table.task}, LoRA on the hot experts has a held-out loss of {ours:.4f}, and LoRA on all "
                f"experts of {theirs:.4f}{share}."
            )
        ours, theirs = (record["evaluation"][table.task]["accuracy"] for record in (hot, reference))
        text = (
            f"On {table.task}, LoRA on the hot experts is right in {ours:.1%} of the test examples, "
            f"and LoRA on all experts in {theirs:.1%}{share}."
        )
        points = 100 * difference.difference
        if difference.low <= 0 <= difference.high:
            text += f" A difference of {abs(points):.1f} points is less than this test set can tell apart."
        elif not math.isnan(difference.low):
            side = "better" if points > 0 else "worse"
            text += f" That is {abs(points):.1f} points {side}, more than chance over test examples explains."
        return text + _others(records, hot, table.task)
    return ""


def _others(records: Records, hot: Record, task: str) -> str:
    """Random and cold experts beside a hot run of the same seed, options and number of parameters."""
    found = {
        record["condition"]: f"{record['evaluation'][task]['accuracy']:.1%}"
        for record in records.values()
        if record["condition"] in ("random", "cold") and record["seed"] == hot["seed"]
        and task in part(record, "evaluation")
        and part(record, "parameters").get("trainable") == part(hot, "parameters").get("trainable")
        and same_options(record, hot) and not apart(record, hot, task)
    }  # fmt: skip
    if not found:
        return ""
    return " With as many experts, " + " and ".join(f"{score} with {name} ones" for name, score in found.items()) + "."


def _metric(section: Section, table: Shown) -> str:
    told: dict[str, None] = {}
    for record in (section.records[folder] for folder in table.folders):
        if result := part(record, "evaluation").get(table.task):
            way = told_way(record)
            metric = f"{result['metric'].replace('_', ' ')} on {result['n']} test examples"
            told[metric + (f" ({way})" if way else "")] = None
    return "; ".join(told)


def _slug(text: str, taken: set[str], name: str) -> str:
    """A file's name of letters, digits and hyphens that is not taken: names may differ in other signs alone."""
    stem = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "runs"
    names = (f"{stem}-{number}-{name}" if number > 1 else f"{stem}-{name}" for number in itertools.count(1))
    found = next(name for name in names if name not in taken)
    taken.add(found)
    return found
