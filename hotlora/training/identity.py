"""Whether a run that was begun is the one that is asked for: its options, and hashes of what they name."""

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..base.errors import HotLoraError
from ..tasks import task_of
from .config import TrainConfig

# Changing these changes nothing of what is learned, so a run may go on under others.
FREE_OPTIONS = (
    *(field.name for field in fields(TrainConfig) if field.metadata["resume"] == "free"), "expert_parallel", "fit",
    "offload",
)  # fmt: skip
_FLAGS = {
    field.name: field.metadata["flags"][0].split("/")[0] for field in fields(TrainConfig) if field.metadata["flags"]
}
# What a record holds beside options of the command line.
_WORDS = {
    **_FLAGS, "train_a": "--lora-fa", "full": "--method fft", "train_full_experts": "--method esft",
    "eval_batch_size": "the batch size of the evaluation (--batch-size)", "examples": "training examples",
    "examples_per_step": "examples a step (--batch-size x --gradient-accumulation-steps x processes)",
    "processes": "processes",
}  # fmt: skip
_HASHES = {
    "chat_template": ("the model's chat template", "model"),
    "model_hash": ("the model (its weights, config or tokenizer; of the Hub its commit)", "model"),
    "data_hash": ("the training data (--data)", "data"), "test_hash": ("the test data", "test_data"),
    "scorer_hash": ("what judges the test data's answers (tests, choices, databases)", "test_data"),
    "profile_hash": ("--profile", None), "plan_hash": ("the plan (--plan, or the rule's)", "rule"),
    "adapter_config_hash": ("the adapter's config", "adapter"), "adapter_hash": ("--adapter", "adapter"),
    "scores_hash": ("--scores", "scores"), "mask_hash": ("--mask", None),
    "generations_hash": ("--generations", "generations"), "on_top_of": ("--on-top-of", None),
    "on_top_of_options_hash": ("the options of the adapters underneath (lora_alpha, scaling, plan)", "on_top_of"),
    "tasks_hash": ("what --tasks reads", "tasks"), "include_hash": ("what is in --include-path", "include_path"),
}  # fmt: skip
"""hash -> (what it is of, the option that changes it wherever it differs itself)"""
_PLACES = {
    "model": ("model_hash",), "data": ("data_hash", "test_hash"), "test_data": ("test_hash",),
    "scores": ("scores_hash",), "adapter": ("adapter_hash",), "generations": ("generations_hash",),
    "tasks": ("tasks_hash",), "include_path": ("include_hash",),
}  # fmt: skip
"""what names files -> the hash of what is there, the first that a run has: where it is equal, the place is no matter"""
_BEFORE = {"profile_until": 1.0}
"""what runs that were begun before there was an option did, where that is not its default"""
DEFAULTS: Mapping[str, Any] = {field.name: field.default for field in fields(TrainConfig)} | _BEFORE
"""of options of training, for the records of runs that were begun before there was one"""
_NOTED_LATER = (
    "scorer_hash", "model_hash", "adapter_config_hash", "on_top_of_options_hash", "tasks_hash", "include_hash",
)  # fmt: skip
"""what says of runs that were begun before it was noted nothing"""
_TESTED = ("test_hash", "scorer_hash")
_IF_NONE = {"train_on": "last"}  # of data in which nothing else is trained, and of runs before there was a choice
LENGTH = ("epochs", "max_steps", "early_stopping_patience")
"""Options that say where a training ends."""
_BATCH = ("batch_size", "gradient_accumulation_steps", "processes")


def check_same(old: dict[str, Any], new: dict[str, Any], folder: Path, *, extend: bool = False) -> None:
    """Raises HotLoraError, naming each option that differs, unless `folder` holds a run with the same.

    extend: the length may be another.
    """
    new = json.loads(json.dumps(new))  # as the file holds it: lists for tuples
    old = {name: value for name, value in DEFAULTS.items() if name in new} | dict(old)
    new = {name: value for name, value in new.items() if name in old or name not in _NOTED_LATER}
    beside = differences(*({n: v for n, v in options.items() if n not in LENGTH} for options in (old, new)))
    if found := beside if extend else differences(old, new):
        or_longer = "" if beside else ", or --extend to train this one on"
        raise HotLoraError(
            f"{folder} holds another run: {', '.join(found)} (now against then). Give the same options to go on with "
            f"it, another folder (--output) to start a new run{or_longer}, or delete the folder."
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between a run's options and those given now, in the command line's words: `--r 8 against 4`."""
    old, new = _flat(old), _flat(new)
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    changed = [name for name in changed if not _is_moved(name, old, new)]
    said = []
    for name in changed:
        was, now = old.get(name), new.get(name)
        if name in _IF_NONE:
            was, now = was or _IF_NONE[name], now or _IF_NONE[name]
        if name == "train_a":  # --lora-fa is its opposite
            was, now = was is False, now is False
        if name not in _HASHES:
            flag = _WORDS.get(name, "--" + name.replace("_", "-"))
            said.append(f"{flag} {_shown(now)} against {_shown(was)}")
            continue
        what, option = _HASHES[name]
        if option not in changed and not (name in _TESTED and "data" in changed):
            here = "is not what it was" if was and now else "was not given before" if now else "was given before"
            said.append(f"{what} {here}")
    return said


def _is_moved(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether two paths lead to the same files, for the same task: which one decides how answers are judged, too."""
    noted = next((hash for hash in _PLACES.get(name, ()) if hash in old or hash in new), None)
    if noted is None or not old.get(noted) or old[noted] != new.get(noted):
        return False
    was, now = old.get(name), new.get(name)
    if isinstance(was, list) and isinstance(now, list):  # of lm-eval
        return [task.partition(":")[0] for task in was] == [task.partition(":")[0] for task in now]
    return isinstance(was, str) and isinstance(now, str) and task_of(was) is task_of(now)


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of options (how answers are drawn) among the others."""
    inner = [(key, item) for value in options.values() if isinstance(value, Mapping) for key, item in value.items()]
    return {name: value for name, value in options.items() if not isinstance(value, Mapping)} | dict(inner)


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "on", False: "off"}[value]
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:20]}...{text[-37:]}"  # of paths the ends differ


def same_run(options: Mapping[str, Any], free: tuple[str, ...] = FREE_OPTIONS) -> dict[str, Any]:
    """The options that must be equal for a run to go on: without `free` ones; and of the batches only how many examples
    a step has, however many processes have them, at once or one after another."""
    kept = {name: value for name, value in options.items() if name not in free}
    if all(isinstance(kept.get(name), int) for name in _BATCH[:2]) and isinstance(kept.get("processes", 1), int):
        kept["examples_per_step"] = math.prod(kept.pop(name, 1) for name in _BATCH)
    return kept
