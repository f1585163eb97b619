"""How a score was measured: what two records must share before one score is set against the other. Loads no model.

Every page that pairs, subtracts or ranks asks here. What a record does not hold, because it is older, is not compared.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from ..base.records import SAME_LOSS, Record
from ..tasks import task_of
from .sections import is_trained, part

LOSS = "held-out loss"
"""the metric where no run was scored on a task; lower is better"""

WORDS = {
    "fingerprint": "model", "model_hash": "model", "data_hash": "training data", "test_hash": "test data",
    "n": "number of test examples",
    "scorer_hash": "what judges the answers", "metric": "metric", "harness": "harness",
    "tasks_hash": "rows of the harness's task", "include_hash": "files in --include-path",
    "num_fewshot": "few-shot examples", "engine": "engine", "sampling": "sampling",
    "max_new_tokens": "tokens of an answer", "max_length": "tokens of an example", "train_on": "what carries loss",
    "chat_template": "chat template",
}  # fmt: skip


def may_carry(train_on: str) -> tuple[str, ...]:
    """What carries a test row's loss in a training: its rows may have several answers where each test row has one."""
    return ("assistant", "last") if train_on == "assistant" else (train_on,)


def way_of(record: Record) -> dict[str, Any]:
    """How answers were got, on whatever task: None where it is as hotlora has it by itself."""
    config = part(record, "config")
    harness = config.get("harness")
    task, given = task_of(str(config.get("data"))), config.get("max_new_tokens")
    own = task and task.max_new_tokens  # of people's own rows it depends on them, and is not known here
    engine = "given answers" if config.get("generations") is not None else config.get("engine")
    return {
        "harness": harness,
        "num_fewshot": None if harness is None else config.get("num_fewshot"),
        "engine": None if engine == "transformers" else engine,
        "sampling": sampling_of(config),
        "max_new_tokens": None if given == own else given,
    }


def sampling_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """How answers were drawn; None where they are greedy, whatever the seed of draws that were none."""
    found: Mapping[str, Any] | None = config.get("sampling")
    return None if found and found.get("temperature") == 0 and found.get("samples", 1) == 1 else found or None


def told_way(record: Record) -> str:
    """`way_of` in words; empty where nothing is to be told."""
    way = way_of(record)
    told = [way["harness"]] if way["harness"] else []
    if way["harness"]:
        shots = way["num_fewshot"]
        told.append("the task's own few-shot examples" if shots is None else f"{shots} few-shot examples")
    if way["engine"]:
        told.append(str(way["engine"]))
    if drawn := way["sampling"]:
        samples = drawn.get("samples", 1)
        told.append(f"{samples} sample{'s' if samples != 1 else ''}")
        told += [f"{name} {drawn[name]}" for name in ("temperature", "top_p") if drawn.get(name) not in (None, 1.0)]
    if way["max_new_tokens"] is not None:
        told.append(f"at most {way['max_new_tokens']} tokens")
    return ", ".join(told)


def named(record: Record) -> str:
    """The run's name, and how its answers were got where that is to be told."""
    told = told_way(record)
    return f"{record['name']} ({told})" if told else str(record["name"])


def measured(record: Record, task: str | None) -> dict[str, Any]:
    """How a record's score on a task was measured, or, for None, its held-out loss."""
    config = part(record, "config")
    found: dict[str, Any] = {"test_hash": config.get("test_hash")}
    if task is not None:
        result = record["evaluation"][task]
        found |= {"metric": result["metric"], "n": result["n"], "scorer_hash": config.get("scorer_hash")}
        found |= _own_files(config, task)
        by_tokens = result["metric"] == "token_accuracy"
    else:
        found |= {"metric": LOSS, "max_length": config.get("max_length")}
        found |= {} if found["test_hash"] else {"n": part(record, "data").get("test")}
        by_tokens = True
    found = {name: value for name, value in found.items() if value is not None}
    if by_tokens and "test_hash" in found:  # a record without hashes says nothing of how its rows were read
        parts = config.get("train_on") or "last"
        found["train_on"] = may_carry(parts) if is_trained(record) else (parts,)
    if "chat_template" in config and (task is None or not is_trained(record)):  # a task's own prompts have none
        found["chat_template"] = config["chat_template"]
    return found if task is None else found | way_of(record)


def _own_files(config: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Hashes of what the harness read of one's own files: a task's local rows, else all that is beside its config."""
    names = (str(name).partition(":")[0] for name in config.get("tasks") or ())
    rows = dict(zip(names, config.get("tasks_hash") or (), strict=False)).get(task)
    return {"include_hash": config.get("include_hash")} if rows is None else {"tasks_hash": rows}


def measured_apart(a: Record, b: Record, task: str | None) -> list[str]:
    """In which ways two scores on a task, or for None two held-out losses, were measured otherwise, in words."""
    return _apart(measured(a, task), measured(b, task))


def apart(a: Record, b: Record, task: str | None) -> list[str]:
    """Why one run's score says nothing of the other's, in words: other weights, other training data, or measured
    otherwise. Which experts, and with which options, is not among it."""
    found = _apart(_made(a) | measured(a, task), _made(b) | measured(b, task))
    return list(dict.fromkeys([*(["model"] if _began_apart(a, b) else []), *found]))


def base_hash(record: Record) -> str | None:
    """The hash of the base's files, by which weights of one shape are told apart; None where the record has none, where
    what it scores is itself what was trained, and of the Hub's commit, which a README changes, too."""
    found: str | None = part(record, "config").get("model_hash")
    is_commit = found is not None and len(found) < 64
    return None if is_commit or part(record, "sweep").get("model") else found


def _began_apart(a: Record, b: Record) -> bool:
    """Whether two trainings' losses before the first step, of the same rows, are not those of one model."""
    one, two = (part(record, "training").get("test_loss_before") for record in (a, b))
    beneath = (part(record, "config").get("on_top_of") or [] for record in (a, b))
    if one is None or two is None or len({*map(tuple, beneath)}) > 1 or measured_apart(a, b, None):
        return False
    return not math.isclose(one, two, rel_tol=SAME_LOSS)


def _made(record: Record) -> dict[str, Any]:
    data = part(record, "config").get("data_hash") or (part(record, "data").get("hash") if is_trained(record) else None)
    found = {"fingerprint": record["model"]["fingerprint"], "model_hash": base_hash(record), "data_hash": data}
    return {name: value for name, value in found.items() if value}


def _apart(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return [word for name, word in WORDS.items() if name in a and name in b and not _alike(name, a[name], b[name])]


def _alike(name: str, a: Any, b: Any) -> bool:
    if name == "train_on":
        return not set(a).isdisjoint(b)
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
