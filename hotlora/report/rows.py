"""Run records -> a row of text for each run. Loads no model."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.errors import FileError
from ..base.records import Record, read_results
from ..evaluation.stats import Difference, paired_difference, proportion_interval
from ..routing.plan import ExpertPlan
from ..routing.profile import RoutingProfile
from .measured import apart, named
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
)  # fmt: skip
from .text import NONE, human_bytes, human_count

COLUMNS = {
    "accuracy": "accuracy, %", "difference": "against all, points", "loss": "loss", "perplexity": "perplexity",
    "token_accuracy": "token accuracy, %", "rouge_l": "ROUGE-L", "held_out": "held-out loss", "tested": "held-out rows",
    "covered": "routing covered", "trained": "trained parameters", "adapter": "adapter file", "speed": "tokens/s",
    "memory": "peak memory",
}  # fmt: skip
"""Beside them stand the options in which runs differ; their keys are "option NAME"."""
OWN_ROWS = (("loss", ".4f", 1), ("perplexity", ".2f", 1), ("token_accuracy", ".1f", 100), ("rouge_l", ".3f", 1))
"""of the score of people's own rows: name, format and factor"""


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
            cells["difference"] = signed(found[1].difference, 4) if section.by_loss else _points(found[1])
        if (profile := section.profiles.get(folder)) is not None and folder in section.plans:
            cells["covered"] = f"{covered(profile, section.plans[folder]):.1%}"
        if trained:
            percent = parameters.get("percent")
            share = 100 * trained / max(1, parameters["total"]) if percent is None else percent
            cells["trained"] = trained_text(trained, share)
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
    """What tells runs apart: their names, with how they were scored, with seeds where these differ, with folders where
    that is not enough."""
    several_seeds = len({record["seed"] for record in records.values()}) > 1
    names = {
        folder: f"{named(record)}, seed {record['seed']}" if several_seeds else named(record)
        for folder, record in records.items()
    }
    times = Counter(names.values())
    return {
        folder: f"{name} ({folder.parent.name}/{folder.name})" if times[name] > 1 else name
        for folder, name in names.items()
    }


def score_of(section: Section, record: Record, task: str) -> float | None:
    """Points, 100 times the accuracy; or the held-out loss, where the section goes by it."""
    if section.by_loss:
        return held_out_loss(record)
    result = part(record, "evaluation").get(task)
    return None if result is None else 100 * float(result["accuracy"])


def reference_of(
    section: Section, folder: Path, task: str, folders: Sequence[Path] | None = None
) -> tuple[Path, Record] | None:
    """The run on all experts with this run's seed. Of several the one among `folders` whose options are nearest.

    None: it is one itself, one of the two has no score, or no such run is of the same weights and training data and
    was measured alike, which is noted.
    """
    record = section.records[folder]
    if record["condition"] == "all" or score_of(section, record, task) is None:
        return None
    others = [
        (other, reference)
        for other, reference in section.records.items()
        if reference["condition"] == "all" and reference["seed"] == record["seed"] and other != folder
        and score_of(section, reference, task) is not None
    ]  # fmt: skip
    scored = None if section.by_loss else task
    alike = [(other, reference) for other, reference in others if not apart(record, reference, scored)]
    if others and not alike:
        note_apart(section, named(record), task, [apart(record, reference, scored) for _, reference in others])
    within = section.records if folders is None else folders
    return min(alike, key=lambda item: (item[0] not in within, distance(record, item[1])), default=None)


def note_apart(section: Section, name: str, task: str, differs: Iterable[Iterable[str]]) -> None:
    """Says why a run has no difference to any on all experts: what is other in each of those."""
    words = dict.fromkeys(word for some in differs for word in some)
    section.note(
        f"{name}: no difference on {task} to a run on all experts, for those are not comparable ({', '.join(words)})."
    )


def against_all(
    section: Section, folder: Path, task: str, folders: Sequence[Path] | None = None
) -> tuple[Record, Difference] | None:
    """`reference_of` a run, and this run's accuracy minus its accuracy; or of the two the held-out loss.

    With an interval where both kept their results on the same examples, else with nan.
    """
    if (found := reference_of(section, folder, task, folders)) is None:
        return None
    (other, reference), record = found, section.records[folder]
    if not section.by_loss:
        a, b = _results(section, folder, task), _results(section, other, task)
        if a and b and [r.get("id") for r in a] == [r.get("id") for r in b]:
            return reference, paired_difference([r["correct"] for r in a], [r["correct"] for r in b])
    ours, theirs = (score_of(section, each, task) for each in (record, reference))
    assert ours is not None and theirs is not None
    difference = (ours - theirs) / (1 if section.by_loss else 100)
    return reference, Difference(difference, float("nan"), float("nan"))


def covered(profile: RoutingProfile, plan: ExpertPlan) -> float:
    """Share of the profile's assignments that go to the plan's experts, mean over the profile's layers."""
    shares = profile.shares()
    rows = [shares[row, list(plan.experts.get(layer, ()))].sum() for row, layer in enumerate(profile.layers)]
    return float(sum(rows)) / len(rows)


def _accuracy(result: Mapping[str, Any]) -> str:
    wilson = proportion_interval(result["correct"], result["n"])
    ends = {"ci_low": wilson.low, "ci_high": wilson.high}  # where the record has none, or null
    low, high = (other if result.get(name) is None else result[name] for name, other in ends.items())
    return f"{100 * result['accuracy']:.1f} [{100 * low:.1f}–{100 * high:.1f}]"


def _of_own_rows(result: Mapping[str, Any]) -> dict[str, str]:
    """Of people's own rows: loss, perplexity and token accuracy, with their intervals."""
    cells = {}
    for key, form, scale in OWN_ROWS:
        if (value := result.get(key)) is not None:
            cells[key] = f"{scale * value:{form}}"
            ends = [scale * end for end in result.get(f"{key}_ci") or () if isinstance(end, int | float)]
            if len(ends) == 2:
                cells[key] += f" [{ends[0]:{form}}–{ends[1]:{form}}]"
    return cells


def _points(difference: Difference) -> str:
    point, low, high = (signed(100 * value, 1) for value in difference)
    return f"{point} [{low} to {high}]" if difference.low == difference.low else point  # nan: no interval


def trained_text(trained: float, share: float) -> str:
    """Trained parameters, and their share of all in percent."""
    return f"{human_count(trained)} ({share:.{1 if share >= 1 else 2}f}%)"


def signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _note(record: Record, has_score: bool) -> str:
    if record["status"] == "failed":
        error = record.get("error") or ""
        stopped = error.removeprefix("Stopped: ")  # by Ctrl-C or SIGTERM: it says so itself, and is no failure
        return stopped if stopped != error else f"failed: {error}" if error else "failed"
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
