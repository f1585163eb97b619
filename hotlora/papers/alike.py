"""Whether the runs that a table compares were made alike, but for what its rows are."""

from collections.abc import Iterable, Mapping
from typing import Any

from ..base.records import Record
from ..runs.options import BUDGETS, RunOptions
from ..training.identity import DEFAULTS, FREE_OPTIONS, same_run

Options = Mapping[str, Any]

# Hashes say what the files hold that these name; the others go with a seed, or with what is scored.
_NOT_HELD = {
    "data", "test_data", "scores", "adapter", "adapter_hash", "adapter_config_hash", "model_hash", "seed", "a_seed",
    "profile_hash", "plan_hash", "mask_hash",
}  # fmt: skip
# What a row is; and LoRI's sparse run has its dense run's plan in place of a rule and a profile.
_OF_ROWS = {"rule", "signal", *BUDGETS, "plan_seed", "profile_fraction", "profile_until"}
_OPTIONAL = {"sampling"}  # a record without has the default
_WORDS = {"test_hash": "test examples", "data_hash": "training examples", "examples_per_step": "examples a step"}


def made_with(record: Record) -> Options:
    """What a done run's record says of how it was made, such that two seeds of one condition have the same."""
    options = dict(record.get("config") or {})
    if "max_steps" in options:  # a training; one that is older than an option had its default
        options = {**DEFAULTS, **options, "train_on": options.get("train_on") or "last"}
    kept = same_run(options, (*FREE_OPTIONS, "eval_batch_size"))
    if "test_hash" in kept:  # the number is for readers
        kept["test_hash"] = (record["data"].get("test"), kept["test_hash"])
    return {name: value for name, value in kept.items() if name not in _NOT_HELD}


def planned(options: RunOptions) -> Options:
    """The same of a run that is not made yet, as far as its options say it."""
    recorded = options.recorded()
    if options.full and options.dtype == "auto":
        recorded["dtype"] = "float32"  # as `run_training` has it
    return same_run(recorded)


def differences(one: Options, other: Options, plan: Options, other_plan: Options) -> list[str]:
    """In what two rows' runs differ and should not: what they were planned with alike, and what no plan says."""
    both = (one.keys() & other.keys()) | (_OPTIONAL if one and other else set())
    alike = {name for name in both - _OF_ROWS if plan.get(name) == other_plan.get(name)}
    return _told(alike, [one, other])


def seed_differences(runs: Iterable[Options]) -> list[str]:
    """In what the seeds of one condition differ."""
    told = [run for run in runs if run]
    if len(told) < 2:
        return []
    return _told(set.intersection(*(set(run) for run in told)) | _OPTIONAL, told)


def _told(names: Iterable[str], runs: list[Options]) -> list[str]:
    """ "max_steps (60 and 150)"; of a hash that is not the same the name alone."""
    found = []
    for name in sorted(names):
        values = [run.get(name) for run in runs]
        if all(value == values[0] for value in values):
            continue
        word, shown = _WORDS.get(name, name), [str(value) for value in values]
        if name.endswith("_hash"):
            shown = [str(value[0]) for value in values if value] if name == "test_hash" else []
        shown = list(dict.fromkeys(shown))
        found.append(f"{word} ({' and '.join(shown)})" if len(shown) > 1 else word)
    return found
