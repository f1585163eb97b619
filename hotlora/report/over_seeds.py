"""Runs that differ in their seed alone -> one row of text, with means and intervals over seeds. Loads no model."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ..base.records import Record
from ..evaluation.stats import Interval, PairedTest, mean_interval, mean_sd, paired_test
from .measured import apart, base_hash, named, way_of
from .rows import COLUMNS, OWN_ROWS, Row, covered, score_of, signed, trained_text
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
from .text import NONE, human_bytes

SEEDS = {"seeds": "seeds"}
"""the column of such rows that those of single runs have not"""
# What beside the options of `differing` must be equal in a condition's runs.
_EQUAL = ("fraction", "experts_per_layer", "budget", "p", "data_hash", "test_hash")


@dataclass(frozen=True)
class Repeated:
    """A condition's runs: the last one of each seed.

    Attributes:
        runs: seed -> folder.
        others: further runs of a seed, which count nowhere.
    """

    name: str
    condition: str
    runs: Mapping[int, Path]
    others: tuple[Path, ...]


def repeated(records: Records) -> list[Repeated]:
    """Runs that have name, condition, model, data and all options in common, but for the seed.

    In the order of the first of each. Empty where no two do.
    """
    options = differing(records.values())
    found: dict[tuple[Any, ...], list[Path]] = {}
    for folder, record in records.items():
        found.setdefault(_key(record, options), []).append(folder)
    for of in (_scorer_hash, base_hash):
        found = dict(_by_hash(found, records, of))
    groups = [_by_seed(folders, records) for folders in found.values()]
    if all(len(runs) < 2 for runs, _ in groups):
        return []
    names = _names([records[folders[0]] for folders in found.values()], [*found.values()], options)
    return [
        Repeated(name, records[folders[0]]["condition"], runs, others)
        for name, folders, (runs, others) in zip(names, found.values(), groups, strict=True)
    ]


def seeds_rows(section: Section, task: str, folders: Sequence[Path]) -> list[Row]:
    """One row a condition: of its runs' numbers the mean, the median of speeds, the most of memories.

    Empty where no two runs of `folders` are of one.
    """
    records = {folder: section.records[folder] for folder in folders}
    groups, options = repeated(records), differing(records.values())
    for group in (group for group in groups if group.others):
        section.note(
            f"{group.name}: of each seed the last run counts in the means; left out of them: "
            f"{', '.join(folder.name for folder in group.others)}."
        )
    return [_row(section, task, group, _reference(section, task, group, groups), options) for group in groups]


def seeds_summary(section: Section, task: str, folders: Sequence[Path]) -> str:
    """The hot runs' mean against that of all experts, in words; empty where fewer than two seeds have both. Of several
    hot conditions the one whose options are nearest to those of all experts."""
    groups = repeated({folder: section.records[folder] for folder in folders})
    hot = []
    for group in (group for group in groups if group.condition == "hot"):
        reference = _reference(section, task, group, groups)
        if reference is not None and len(_pairs(section, task, group, reference)) > 1:
            hot.append((_distance(section, group, reference), group, reference))
    if not hot:
        return ""
    _, group, reference = min(hot, key=lambda found: found[0])
    pairs = _pairs(section, task, group, reference)
    ours, theirs = (_value(fmean(values), section.by_loss) for values in zip(*pairs, strict=True))
    test = _test(pairs)
    told, other = f"is right in {ours}% of the test examples", f"in {theirs}%"
    if section.by_loss:
        told, other = f"has a held-out loss of {ours}", f"of {theirs}"
    many = sum(each.condition == "hot" for each in groups) > 1
    return (
        f"On {task}, over {len(pairs)} seeds, LoRA on the hot experts{f' ({group.name})' if many else ''} {told}, and "
        f"LoRA on all experts {other}{_share(section, group, reference)}. {_verdict(test, section.by_loss)}"
    )


def _key(record: Record, options: Sequence[str]) -> tuple[Any, ...]:
    """What two runs of one condition have in common."""
    config, sweep = part(record, "config"), part(record, "sweep").get("condition")
    # Not the name, where the plan says as much: it had the share rounded once (`hot 12%`, now `hot 12.5%`).
    kept = (part(record, "plan").get("params") or {}).get("experts_per_layer") or record["name"]
    own: list[Any] = [kept, record["condition"], sweep, record["model"]["fingerprint"]]
    own += [record["data"].get("hash"), record["data"].get("test"), *(config.get(name) for name in _EQUAL)]
    own.append(json.dumps(way_of(record), sort_keys=True))
    if not is_trained(record):
        return (*own, None if sweep else config.get("adapter"))
    return (*own, *(option_text(record, name) for name in options))


def _scorer_hash(record: Record) -> str | None:
    found: str | None = part(record, "config").get("scorer_hash")
    return found


def _by_hash(
    found: Mapping[tuple[Any, ...], Sequence[Path]], records: Records, of: Callable[[Record], str | None]
) -> Iterator[tuple[tuple[Any, ...], list[Path]]]:
    """Apart where the runs of one key were judged by different tests or choices, or are of other weights; older runs do
    not say."""
    for key, folders in found.items():
        hashes = {folder: of(records[folder]) for folder in folders}
        if len({*hashes.values()} - {None}) < 2:
            yield key, [*folders]
            continue
        for value in dict.fromkeys(hashes.values()):
            yield (*key, value), [folder for folder in folders if hashes[folder] == value]


def _by_seed(folders: Sequence[Path], records: Records) -> tuple[dict[int, Path], tuple[Path, ...]]:
    """The last run of each seed, one that is done before others; and the rest."""
    ordered = sorted(folders, key=lambda folder: (records[folder]["status"] == "done", records[folder]["started"]))
    runs = {records[folder]["seed"]: folder for folder in ordered}
    return dict(sorted(runs.items())), tuple(folder for folder in folders if folder not in runs.values())


def _names(first: Sequence[Record], folders: Sequence[Sequence[Path]], options: Sequence[str]) -> list[str]:
    """What tells conditions apart: their names; where these are equal with the sweep's word, else with the options in
    which they differ, else with the folder of the first run."""
    names = [named(record) for record in first]
    found = list(names)
    for name in {name for name, times in Counter(names).items() if times > 1}:
        same = [i for i, other in enumerate(names) if other == name]
        apart = [n for n in options if len({option_text(first[i], n) for i in same}) > 1]
        swept = [str(part(first[i], "sweep").get("condition") or "") for i in same]
        told = [", ".join(f"{n.replace('_', ' ')} {option_text(first[i], n)}" for n in apart) for i in same]
        ways = (*_tails(swept), told, *_tails([folders[i][0].as_posix() for i in same]))
        words = next(way for way in ways if all(way) and len(set(way)) == len(way))
        for i, word in zip(same, words, strict=True):
            found[i] = f"{name} ({word})"
    return found


def _tails(paths: Sequence[str]) -> list[list[str]]:
    """The last part of each path, the last two, and so on."""
    parts = [path.split("/") for path in paths]
    return [["/".join(each[-number:]) for each in parts] for number in range(1, max(map(len, parts)) + 1)]


def _reference(section: Section, task: str, group: Repeated, groups: Sequence[Repeated]) -> Repeated | None:
    """The condition of all experts that it is compared with: of several the one whose options are nearest. One of the
    section's other tables, where its own has none. None: there is none with a score, or it is one itself."""
    if group.condition == "all":
        return None
    for among in (groups, repeated(section.records)):
        others = [other for other in among if other.condition == "all" and _pairs(section, task, group, other)]
        if others:
            return min(others, key=lambda other: _distance(section, group, other))
    return None


def _distance(section: Section, group: Repeated, other: Repeated) -> tuple[bool, int]:
    one, two = (section.records[next(iter(each.runs.values()))] for each in (group, other))
    return distance(one, two)


def _pairs(section: Section, task: str, group: Repeated, other: Repeated) -> list[tuple[float, float]]:
    """Both conditions' scores of each seed that both have, of the same weights and training data, measured alike."""
    pairs = []
    for seed in group.runs.keys() & other.runs.keys():
        one, two = (section.records[each.runs[seed]] for each in (group, other))
        a, b = (score_of(section, record, task) for record in (one, two))
        if a is None or b is None or apart(one, two, None if section.by_loss else task):
            continue
        pairs.append((a, b))
    return pairs


def _test(pairs: Sequence[tuple[float, float]]) -> PairedTest:
    return paired_test([a for a, _ in pairs], [b for _, b in pairs])


def _verdict(test: PairedTest, by_loss: bool) -> str:
    digits, unit = (4, "") if by_loss else (1, " points")
    if test.interval is None:
        return f"The difference is {signed(test.mean, digits)}{unit} in each of them: there is no test of that."
    low, high = test.interval
    words = "The seeds do not tell the two apart"
    if not low <= 0 <= high:
        is_better = (test.mean < 0) == by_loss
        words = f"That is {'better' if is_better else 'worse'}, beyond what chance over seeds explains"
    return f"{words} (difference {signed(low, digits)} to {signed(high, digits)}{unit}, 95% interval)."


def _row(section: Section, task: str, group: Repeated, reference: Repeated | None, options: Sequence[str]) -> Row:
    own = [section.records[folder] for folder in group.runs.values()]
    cells = dict.fromkeys((*SEEDS, *COLUMNS), NONE)
    for option in options:
        cells[f"option {option}"] = option_text(own[0], option) if is_trained(own[0]) else NONE
    values = _numbers(score_of(section, record, task) for record in own)
    notes = _lacking([record for record in own if score_of(section, record, task) is None])
    if values:
        cells["seeds"] = f"{len(values)}"
        cells["accuracy"] = _value(fmean(values), section.by_loss) + _brackets(values, section.by_loss)
    if reference is not None:
        test, digits = _test(_pairs(section, task, group, reference)), 4 if section.by_loss else 1
        ends = [signed(end, digits) for end in test.interval] if test.interval else []
        cells["difference"] = signed(test.mean, digits) + (f" [{' to '.join(ends)}]" if ends else "")
        if test.n < len(values):
            notes.append(f"difference over {test.n} of {len(values)} seeds")
    for key, form, scale in OWN_ROWS:
        if found := _numbers(part(record, "evaluation").get(task, {}).get(key) for record in own):
            cells[key] = f"{scale * fmean(found):{form}}"
    if not section.by_loss and (losses := _numbers(map(held_out_loss, own))):
        cells["held_out"] = f"{fmean(losses):.4f}"
    if section.tested_apart and held_out_loss(own[0]) is not None:
        cells["tested"] = held_out_rows(own[0])
    kept = [
        covered(section.profiles[folder], section.plans[folder])
        for folder in group.runs.values()
        if folder in section.profiles and folder in section.plans
    ]
    if kept:
        cells["covered"] = f"{fmean(kept):.1%}"
    parameters, training = ([part(record, name) for record in own] for name in ("parameters", "training"))
    trained = fmean(_numbers(each.get("trainable") for each in parameters) or [0])
    if trained:
        share = 100 * trained / max(1, fmean(_numbers(each.get("total") for each in parameters) or [1]))
        cells["trained"] = trained_text(trained, share)
    if sizes := _numbers(each.get("adapter_bytes") for each in parameters):
        cells["adapter"] = human_bytes(fmean(sizes))
    if speeds := _numbers(each.get("tokens_per_second") for each in training):
        cells["speed"] = f"{median(speeds):,.0f}"
    if peaks := _numbers(each.get("peak_memory_bytes") for each in training):
        cells["memory"] = human_bytes(max(peaks))
    return Row(group.name, group.condition, "done" if values else own[0]["status"], cells, "; ".join(notes))


def _lacking(records: Sequence[Record]) -> list[str]:
    """What became of a condition's runs without a score."""
    failed = [record for record in records if record["status"] == "failed"]
    running = sum(record["status"] == "running" for record in records)
    first = next((f": {record['error']}" for record in failed if record.get("error")), "")
    counts = ((len(failed), f"failed{first}"), (running, "not finished"))
    unscored = len(records) - len(failed) - running
    return [f"{number} {words}" for number, words in (*counts, (unscored, "not evaluated")) if number]


def _share(section: Section, group: Repeated, reference: Repeated) -> str:
    """Its parameters as a share of the reference's."""
    shares = []
    for seed in group.runs.keys() & reference.runs.keys():
        found = (part(section.records[each.runs[seed]], "parameters").get("trainable") for each in (group, reference))
        ours, theirs = found
        shares += [ours / theirs] if ours and theirs else []
    return f", with {fmean(shares):.1%} of the trained parameters" if shares else ""


def _numbers(values: Iterable[float | None]) -> list[float]:
    return [float(value) for value in values if value is not None]


def _value(value: float, by_loss: bool) -> str:
    return f"{value:.4f}" if by_loss else f"{value:.1f}".replace("-", "−")


def _brackets(values: Sequence[float], by_loss: bool) -> str:
    """The mean's interval; none of one seed, nor of seeds that are all equal."""
    if not mean_sd(values).sd:
        return ""
    interval: Interval = mean_interval(values)
    return f" [{'–'.join(_value(end, by_loss) for end in interval)}]"
