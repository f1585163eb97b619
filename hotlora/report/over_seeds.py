"""Runs that differ in their seed alone -> one row of text, with means and intervals over seeds. Loads no model."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ..base.records import Record
from ..evaluation.stats import mean_interval
from .rows import COLUMNS, OWN_ROWS, Row, covered, reference_of, score_of, signed
from .sections import Records, Section, differing, distance, held_out_loss, held_out_rows, is_trained, option_text, part
from .text import NONE, human_bytes, human_count

SEEDS = {"seeds": "seeds"}
"""the column of such rows that those of single runs have not"""


@dataclass(frozen=True)
class Repeated:
    """A condition's runs, one a seed."""

    name: str
    condition: str
    folders: tuple[Path, ...]


def repeated(records: Records) -> list[Repeated]:
    """Runs that have the name, the condition and all options in common, but for the seed; in the order of the first of
    each. Empty where no two do."""
    options = differing(records.values())
    found: dict[tuple[Any, ...], list[Path]] = {}
    for folder, record in records.items():
        own = tuple(option_text(record, name) if is_trained(record) else NONE for name in options)
        key = (record["name"], record["condition"], part(record, "sweep").get("condition"), own)
        found.setdefault(key, []).append(folder)
    groups = list(found.values())
    if not any(len({records[folder]["seed"] for folder in group}) > 1 for group in groups):
        return []
    first = [records[group[0]] for group in groups]
    names = [_name(record, first, options) for record in first]
    return [
        Repeated(name, record["condition"], tuple(group))
        for name, record, group in zip(names, first, groups, strict=True)
    ]


def seeds_rows(section: Section, task: str, folders: Sequence[Path]) -> list[Row]:
    """One row a condition: of its runs' numbers the mean, the median of speeds, the most of memories.

    Empty where no two runs of `folders` are of one.
    """
    records = {folder: section.records[folder] for folder in folders}
    options = differing(records.values())
    return [_row(section, task, group, records, options) for group in repeated(records)]


def seeds_summary(section: Section, task: str, folders: Sequence[Path]) -> str:
    """The hot runs' mean against that of all experts, in words; empty where fewer than two seeds have both."""
    records = {folder: section.records[folder] for folder in folders}
    groups = repeated(records)
    paired = [(group, pairs) for group in groups if len(pairs := _pairs(section, task, group, records)) > 1]
    hot = [(group, pairs) for group, pairs in paired if group.condition == "hot"]
    if not hot:
        return ""
    chosen, pairs = min(hot, key=lambda found: _distance(section, task, found[0], folders))
    ours, theirs = (_value(fmean(values), section.by_loss) for values in zip(*pairs, strict=True))
    difference = [a - b for a, b in pairs]
    low, high = mean_interval(difference)
    told, other = f"is right in {ours}% of the test examples", f"in {theirs}%"
    digits, unit = 1, " points"
    if section.by_loss:
        told, other, digits, unit = f"has a held-out loss of {ours}", f"of {theirs}", 4, ""
    verdict = "The seeds do not tell the two apart"
    if not low <= 0 <= high:
        is_better = (fmean(difference) < 0) == section.by_loss
        verdict = f"That is {'better' if is_better else 'worse'}, beyond what chance over seeds explains"
    return (
        f"On {task}, over {len(pairs)} seeds, LoRA on the hot experts{_apart(chosen, groups)} {told}, and LoRA on all "
        f"experts {other}{_share(chosen, records, section, task)}. {verdict} (difference {signed(low, digits)} to "
        f"{signed(high, digits)}{unit}, 95% interval)."
    )


def _distance(section: Section, task: str, group: Repeated, folders: Sequence[Path]) -> tuple[bool, int]:
    """How far its options are from those of the runs that it is paired with."""
    found = [reference_of(section, folder, task, folders) for folder in group.folders]
    pairs = zip(group.folders, found, strict=True)
    return min(distance(section.records[folder], reference[1]) for folder, reference in pairs if reference is not None)


def _name(record: Record, others: Sequence[Record], options: Sequence[str]) -> str:
    """What tells a condition from others of its name: the sweep's word for it, or the options in which they differ."""
    same = [other for other in others if other["name"] == record["name"]]
    if len(same) == 1:
        return str(record["name"])
    words = [str(part(other, "sweep").get("condition") or "").rpartition("/")[2] for other in same]
    own = words[same.index(record)]
    if own and Counter(words)[own] == 1:
        return f"{record['name']} ({own})"
    apart = [name for name in options if len({option_text(other, name) for other in same}) > 1]
    told = ", ".join(f"{name.replace('_', ' ')} {option_text(record, name)}" for name in apart)
    return f"{record['name']} ({told})" if told else str(record["name"])


def _row(section: Section, task: str, group: Repeated, records: Records, options: Sequence[str]) -> Row:
    own = [records[folder] for folder in group.folders]
    cells = dict.fromkeys((*SEEDS, *COLUMNS), NONE)
    cells["seeds"] = f"{len({record['seed'] for record in own})}"
    for option in options:
        cells[f"option {option}"] = option_text(own[0], option) if is_trained(own[0]) else NONE
    values = _numbers(score_of(section, record, task) for record in own)
    if values:
        cells["accuracy"] = _value(fmean(values), section.by_loss) + _brackets(values, section.by_loss)
    pairs = _pairs(section, task, group, records)
    if pairs:
        digits = 4 if section.by_loss else 1
        differences = [a - b for a, b in pairs]
        cells["difference"] = signed(fmean(differences), digits)
        low, high = mean_interval(differences)
        cells["difference"] += "" if math.isnan(low) else f" [{signed(low, digits)} to {signed(high, digits)}]"
    for key, form, scale in OWN_ROWS:
        if found := _numbers(part(record, "evaluation").get(task, {}).get(key) for record in own):
            cells[key] = f"{scale * fmean(found):{form}}"
    if not section.by_loss and (losses := _numbers(map(held_out_loss, own))):
        cells["held_out"] = f"{fmean(losses):.4f}"
    if section.tested_apart and held_out_loss(own[0]) is not None:
        cells["tested"] = held_out_rows(own[0])
    kept = [
        covered(section.profiles[folder], section.plans[folder])
        for folder in group.folders
        if folder in section.profiles and folder in section.plans
    ]
    if kept:
        cells["covered"] = f"{fmean(kept):.1%}"
    parameters, training = ([part(record, name) for record in own] for name in ("parameters", "training"))
    if trained := _numbers(each.get("trainable") for each in parameters):
        share = 100 * fmean(trained) / max(1, fmean(_numbers(each.get("total") for each in parameters) or [1]))
        cells["trained"] = f"{human_count(fmean(trained))} ({share:.{1 if share >= 1 else 2}f}%)"
    if sizes := _numbers(each.get("adapter_bytes") for each in parameters):
        cells["adapter"] = human_bytes(fmean(sizes))
    if speeds := _numbers(each.get("tokens_per_second") for each in training):
        cells["speed"] = f"{median(speeds):,.0f}"
    if peaks := _numbers(each.get("peak_memory_bytes") for each in training):
        cells["memory"] = human_bytes(max(peaks))
    lacking = len(own) - len(values)
    note = f"{lacking} of {len(own)} runs without a score" if lacking else ""
    return Row(group.name, group.condition, "done" if values else own[0]["status"], cells, note)


def _pairs(section: Section, task: str, group: Repeated, records: Records) -> list[tuple[float, float]]:
    """Each run's score and that of the run on all experts with its seed."""
    pairs = []
    for folder in group.folders:
        if (found := reference_of(section, folder, task, list(records))) is not None:
            scores = score_of(section, records[folder], task), score_of(section, found[1], task)
            pairs += [(a, b) for a, b in [scores] if a is not None and b is not None]
    return pairs


def _share(hot: Repeated, records: Records, section: Section, task: str) -> str:
    """The hot runs' parameters as a share of those that they are paired with."""
    shares = []
    for folder in hot.folders:
        if (found := reference_of(section, folder, task, list(records))) is not None:
            ours, theirs = (part(record, "parameters").get("trainable") for record in (records[folder], found[1]))
            shares += [ours / theirs] if ours and theirs else []
    return f", with {fmean(shares):.1%} of the trained parameters" if shares else ""


def _apart(group: Repeated, groups: Sequence[Repeated]) -> str:
    """Its name, where another one is of the hot experts, too."""
    return f" ({group.name})" if sum(other.condition == group.condition for other in groups) > 1 else ""


def _numbers(values: Any) -> list[float]:
    return [float(value) for value in values if value is not None]


def _value(value: float, by_loss: bool) -> str:
    return f"{value:.4f}" if by_loss else f"{value:.1f}"


def _brackets(values: Sequence[float], by_loss: bool) -> str:
    low, high = mean_interval(values)
    return "" if math.isnan(low) else f" [{_value(low, by_loss)}–{_value(high, by_loss)}]"
