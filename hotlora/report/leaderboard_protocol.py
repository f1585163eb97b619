"""What runs must share to stand on one leaderboard, and what of a record is its method's own choice.

The protocol of a model on a task is read off records: the training data and how long it is trained on, the test
data and how it is scored. Everything else that a record holds (learning rate, rank, rule, …) is the method.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path, PurePosixPath
from statistics import median
from typing import Any

from ..base.errors import DataError, FileError, HotLoraError
from ..base.files import FOLDER_NAME
from ..base.options import converted
from ..base.records import SAME_LOSS, Record, read_results
from ..evaluation.stats import proportion_interval
from ..routing.plan import ExpertPlan
from ..routing.selection import Selection
from ..runs.options import RunOptions
from ..tasks import task_of as named_task
from ..tasks import without_parts
from ..training.identity import FREE_OPTIONS, differences, same_run
from .measured import LOSS, may_carry, way_of
from .sections import part

Protocol = Mapping[str, Any]

# name -> what it is, and what gives it. A model as it is has the first ones alone.
_TESTED = {
    "task": ("task", "--data"),
    "fingerprint": ("model", "--model"),
    "num_parameters": ("model's parameters", "--model"),
    "test_hash": ("test data", "--test-data, --test-limit"),
    "scorer_hash": ("what judges the answers", "the task's own tests, choices or databases"),
    "test_examples": ("test examples", "--test-limit"),
    "metric": ("metric", "the task's own scorer"),
    "sampling": ("sampling", "greedy answers"),
    "max_new_tokens": ("tokens of an answer", "--max-new-tokens"),
    "engine": ("engine", "--engine transformers"),
    "harness": ("harness", "hotlora's own scores"),
    "on_top_of": ("adapters underneath", "--on-top-of"),
}
_TRAINED = {
    "data_hash": ("training data", "--data, --limit"),
    "train_examples": ("training examples", "--limit"),
    "steps": ("optimizer steps", "--max-steps, --epochs"),
    "examples_per_step": ("examples a step", "--batch-size x --gradient-accumulation-steps x processes"),
    "max_length": ("tokens of an example", "--max-length"),
    "packing": ("packing", "--packing"),
    "train_on": ("what carries loss", "--train-on"),
    "chat_template": ("chat template", "the model's tokenizer"),
    "load_best": ("best checkpoint by the test data", "--load-best"),
    "early_stopping_patience": ("early stopping by the test data", "--early-stopping-patience"),
    "loss_before": ("test loss before training", "the same weights of --model"),
}
NAMES = {**_TESTED, **_TRAINED}
_NOTED_LATER = {"scorer_hash", "engine", "harness"}
"""what boards that were founded before do not hold"""
_READ = ("max_length", "train_on", "chat_template")
"""what says of which tokens a held-out loss is"""
SEEDS = ("seeds", "ranked_with")
"""of a protocol, beside NAMES: the seeds that a run may have, and those that a method must have to be ranked"""

# A record made before there was an option has its default, and profiled on all of the examples.
DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(RunOptions)} | {"profile_until": 1.0}
# No choice of a method: what the protocol has, names of files, what only watches or spares memory, the seed.
_NOT_OWN = {
    *NAMES, *FREE_OPTIONS, "epochs", "max_steps", "batch_size", "gradient_accumulation_steps", "model", "data",
    "test_data", "scores", "seed", "evaluate", "eval_steps", "gradient_checkpointing", "activation_offloading",
    "attn_implementation", "test_split",
}  # fmt: skip
_OWN = [f.name for f in fields(RunOptions) if f.metadata["resume"] == "same" and f.name not in _NOT_OWN]
_CHOICE = {field.name for field in fields(Selection)}
"""of experts, which full fine-tuning has not"""


def is_trained(record: Record) -> bool:
    """Whether it is a training, and not the model as it is or a saved adapter's score. One sign is enough: a training
    that has lost another is no model as it is."""
    return any(_signs(record).values())


def _signs(record: Record) -> dict[str, bool]:
    """What a training's record has, and that of a model as it is has not, and whether it is there."""
    config, training, parameters = (part(record, name) for name in ("config", "training", "parameters"))
    signs = {
        "config.data_hash": config.get("data_hash") is not None, "training.steps": training.get("steps") is not None,
        "parameters.trainable": bool(parameters.get("trainable")),
    }  # fmt: skip
    return signs if config.get("full") else signs | {"plan": bool(record.get("plan"))}


def method_of(record: Record) -> str:
    """The condition, without folders of its path that name the model or the task: nano/nano-math/hot is hot."""
    condition = part(record, "sweep").get("condition") or record["condition"]
    data = without_parts(record["data"]["name"])
    places = {Path(record["model"]["name"]).name, Path(data).name, Path(data).stem, *part(record, "evaluation")}
    parts = PurePosixPath(condition).parts
    while len(parts) > 1 and parts[0] in places:
        parts = parts[1:]
    return "/".join(parts)


def method_fault(method: str) -> str:
    """What is wrong with a method's name; empty where nothing is."""
    if FOLDER_NAME.fullmatch(method):
        return ""
    return f"the name {method!r} is no folder's: give another by --name, of letters, digits and _ . + -"


def task_of(record: Record) -> str | None:
    """What the run was scored on; without a score the held-out data; None where it has neither, or several."""
    tasks = list(part(record, "evaluation"))
    if tasks:
        return tasks[0] if len(tasks) == 1 else None
    if part(record, "training").get("test_loss") is None:
        return None
    source = part(record, "config").get("test_data") or record["data"]["name"]
    return task.name if (task := named_task(source)) else Path(source).name or None


def board_key(record: Record) -> str | None:
    """What is ranked together: a task on a model. None where the run was not scored on one task."""
    task = task_of(record)
    return task and f"{task} {record['model']['fingerprint']}"


def score(record: Record) -> float:
    """Points, 100 times the accuracy, or the held-out loss."""
    for result in part(record, "evaluation").values():
        return 100 * float(result["accuracy"])
    return float(part(record, "training")["test_loss"])


def protocol_of(record: Record) -> dict[str, Any]:
    """What of a done run must be equal in all runs on its task. Of a model as it is, what it is scored on alone."""
    config, training = DEFAULTS | dict(part(record, "config")), part(record, "training")
    result: Mapping[str, Any] = next(iter(part(record, "evaluation").values()), {})
    found = {
        "task": task_of(record),
        "fingerprint": record["model"]["fingerprint"], "num_parameters": record["model"].get("num_parameters"),
        "test_hash": config.get("test_hash"), "test_examples": result.get("n", record["data"].get("test")),
        "metric": result.get("metric", LOSS), "on_top_of": config["on_top_of"] or None,
        "scorer_hash": config.get("scorer_hash") if result else None,
        **{name: value for name, value in way_of(record).items() if name in NAMES},
    }  # fmt: skip
    if is_trained(record):
        found |= {
            "data_hash": record["data"].get("hash"), "train_examples": record["data"].get("train"),
            "steps": training["steps"], "examples_per_step": same_run(config).get("examples_per_step"),
            "chat_template": config.get("chat_template"), "loss_before": training.get("test_loss_before"),
            "train_on": part(record, "config").get("train_on") or "last",  # where nothing else is trained
        }  # fmt: skip
        found |= {name: config[name] for name in _TRAINED if name not in found}
    elif found["metric"] == LOSS:
        own = part(record, "config")
        found |= {name: own[name] for name in _READ if name in own}
        found |= {"train_on": own["train_on"] or "last"} if "train_on" in own else {}
    return found


def own_options(record: Record) -> dict[str, Any]:
    """What the method chose: equal in all of its seeds. What is drawn or made anew for each seed is not among it."""
    config = DEFAULTS | dict(part(record, "config"))
    own = {name: None if name in _CHOICE and config["full"] else config[name] for name in _OWN} | {
        "scores_hash": config.get("scores_hash"), "keep_hot": config.get("keep_hot"),
        "warmup": "lora" if record.get("warmup") else "none",
    }  # fmt: skip
    is_masked = config.get("mask_hash") is not None
    return own | {"mask_entries": part(record, "parameters").get("trainable") if is_masked else None}


def shared_protocol(records: Sequence[Record]) -> dict[str, Any]:
    """The protocol of the runs of one model on one task: that of most of its trainings.

    Seeds: a run may have any that is there. Those that more than half of the methods have are needed to be ranked.

    DataError: no training, or two protocols that as many runs follow.
    """
    found = [(record, protocol_of(record)) for record in records if is_trained(record)]
    if not found:
        raise DataError("no training here is done and has a score: a leaderboard begins with some (--add RECORDS).")
    keys = Counter(_key(protocol) for _, protocol in found)
    (first, times), *others = keys.most_common()
    if others and others[0][1] == times:
        pair = [next(protocol for _, protocol in found if _key(protocol) == key) for key in (first, others[0][0])]
        raise DataError(
            f"as many runs follow one protocol as another ({'; '.join(protocol_differences(*pair))}): give a folder "
            "with the runs of one."
        )
    same = [(record, protocol) for record, protocol in found if _key(protocol) == first]
    scorers = Counter(protocol["scorer_hash"] for _, protocol in same if protocol["scorer_hash"]).most_common(2)
    if len(scorers) == 2 and scorers[0][1] == scorers[1][1]:
        told = protocol_differences(*({"scorer_hash": value} for value, _ in scorers))
        raise DataError(f"as many runs follow one protocol as another ({told[0]}): give a folder with the runs of one.")
    losses = [protocol["loss_before"] for _, protocol in same if protocol["loss_before"] is not None]
    of_method: dict[str, set[int]] = {}
    for record, _ in same:
        of_method.setdefault(method_of(record), set()).add(record["seed"])
    seeds = Counter(seed for own in of_method.values() for seed in own)
    ranked = sorted(seed for seed, number in seeds.items() if number > len(of_method) / 2)
    loss = median(losses) if losses else None
    read_off = {"loss_before": loss, "scorer_hash": scorers[0][0] if scorers else None}
    return same[0][1] | read_off | {"seeds": sorted(seeds), "ranked_with": ranked or sorted(seeds)}


def protocol_differences(ours: Protocol, asked: Protocol) -> list[str]:
    """Each thing in which a run is not of a protocol: its value, what is asked, and what gives that."""
    return [
        f"{what} {shown(ours[name])}, and {shown(asked.get(name))} is asked ({fix})"
        for name, (what, fix) in NAMES.items()
        if name in ours and not _equal(name, ours, asked)
    ]


def shown(value: Any) -> str:
    """A protocol's value, for people: hashes by their first digits."""
    if isinstance(value, str):
        return value[:8] if re.fullmatch(r"[0-9a-f]{64}", value) else value
    if value is None or isinstance(value, bool):
        return {None: "none", True: "on", False: "off"}[value]
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


def option_differences(ours: Record, theirs: Record) -> list[str]:
    """Options of a method in which two of its runs differ, in the command line's words: `--r 8 against 4`."""
    then, now = own_options(theirs), own_options(ours)
    masks = then.pop("mask_entries"), now.pop("mask_entries")
    found = differences(then, now)
    if masks[0] != masks[1]:
        found.append(f"trained entries of a mask (--keep) {shown(masks[1])} against {shown(masks[0])}")
    return found


def faults(folder: Path, record: Record) -> list[str]:
    """What in a run contradicts itself: signs that a number was changed by hand, or a file exchanged. It cannot find
    what was changed everywhere at once; the record has what it takes to make the run again."""
    if record["status"] != "done":
        return [f"it is {record['status']}, and not done: run it again"]
    task, config = task_of(record), part(record, "config")
    if task is None:
        return ["it has no score of one task, and no held-out loss: train with a task or --test-data"]
    if config.get("adapter") is not None or part(record, "sweep").get("scores"):
        return ["it scores a saved adapter, and does not hold how that was trained: give the training's record"]
    signs = _signs(record)
    there, gone = ([name for name, is_there in signs.items() if is_there is wanted] for wanted in (True, False))
    if there and gone:
        return [f"it is a training ({', '.join(there)}), and has no {', '.join(gone)}"]
    if wrong := _wrong_options(config):  # nothing can be read off these
        return wrong
    return [*_changed_scores(folder, record), *_changed_training(record), *_changed_plan(folder, record)]


def _wrong_options(config: Mapping[str, Any]) -> list[str]:
    """Options of another type than a run can have."""
    found = []
    for field in fields(RunOptions):
        if field.metadata["resume"] and field.name in config:
            try:
                converted(field.name, config[field.name], field.type)
            except HotLoraError as error:
                found.append(f"its config: {str(error).rstrip('.')}")
    return found


def _changed_scores(folder: Path, record: Record) -> list[str]:
    found = []
    for task, result in part(record, "evaluation").items():
        n, correct = result["n"], result["correct"]
        if n and not _near(result["accuracy"], correct / n):
            found.append(f"{task}: accuracy {result['accuracy']:.4g}, and {correct:g} of {n} are correct")
        wilson = proportion_interval(correct, n)
        ends = [(result.get(name), end) for name, end in (("ci_low", wilson.low), ("ci_high", wilson.high))]
        if any(end is not None and not _near(end, right) for end, right in ends):
            found.append(f"{task}: the interval is not that of {correct:g} of {n}")
        file = folder / Path(result.get("results") or "").name
        if file.is_file():
            try:
                rows = read_results(file)
            except FileError as error:
                return [*found, str(error)]
            if len(rows) != n or not _near(sum(row["correct"] for row in rows), correct):
                found.append(f"{task}: {file.name} holds {len(rows)} examples and not the score of run.json")
    return found


def _changed_training(record: Record) -> list[str]:
    config, training, parameters = (part(record, name) for name in ("config", "training", "parameters"))
    found = []
    if is_trained(record):
        for name, value in (("seed", record["seed"]), ("data_hash", record["data"].get("hash"))):
            if config.get(name) != value:
                found.append(f"{name} {shown(value)}, and {shown(config.get(name))} in its config")
        most, early = config.get("max_steps"), config.get("early_stopping_patience")
        if most is not None and early is None and training["steps"] != most:
            found.append(f"{training['steps']} steps, and max_steps {most}")
    rate, tokens, seconds = (training.get(name) for name in ("tokens_per_second", "tokens", "seconds"))
    if rate and tokens and seconds and not _near(rate * seconds, tokens, 1e-3):
        found.append(f"{tokens:,} tokens in {seconds:g} s, and {rate:.4g} tokens a second")
    trainable, total, percent = (parameters.get(name) for name in ("trainable", "total", "percent"))
    if trainable and total and percent is not None and not _near(percent, 100 * trainable / total):
        found.append(f"{trainable:,} of {total:,} parameters, and {percent:.4g}%")
    kinds = [parameters[name] for name in ("attention", "router", "shared", "experts") if name in parameters]
    if kinds and all(isinstance(number, int) for number in kinds) and sum(kinds) != trainable:
        found.append(f"{trainable:,} trained parameters, and {sum(kinds):,} by their kinds")
    return found


def _changed_plan(folder: Path, record: Record) -> list[str]:
    told = record.get("plan")
    if not told:
        return []
    try:
        plan = ExpertPlan.load(folder / "plan.json")
    except HotLoraError as error:
        return [str(error)]
    if plan.hash == told.get("hash") and plan.fingerprint == record["model"]["fingerprint"]:
        return []
    return ["plan.json is not the plan that the run was made with (another hash or model)"]


def check_protocol(protocol: Any, where: str) -> dict[str, Any]:
    """A protocol as a file holds it. FileError, naming `where`, if it is none."""
    if not isinstance(protocol, dict) or not {*NAMES, *SEEDS} - _NOTED_LATER <= set(protocol) <= {*NAMES, *SEEDS}:
        raise FileError(f"{where} is not a protocol of {', '.join((*NAMES, *SEEDS))}: restore a copy of the file")
    for name in SEEDS:
        seeds = protocol[name]
        if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
            raise FileError(f"{where}: {name} is {seeds!r}; it must be a list of seeds: restore a copy of the file")
    if not set(protocol["ranked_with"]) <= set(protocol["seeds"]):
        raise FileError(f"{where}: ranked_with has seeds that seeds has not: restore a copy of the file")
    return protocol


def is_loss(protocol: Protocol) -> bool:
    """Whether less is better."""
    return bool(protocol["metric"] == LOSS)


def _key(protocol: Protocol) -> str:
    return json.dumps({n: v for n, v in protocol.items() if n not in ("loss_before", "scorer_hash")}, sort_keys=True)


def _equal(name: str, protocol: Protocol, board: Protocol) -> bool:
    """Whether a run's protocol has in this what the board's asks for."""
    ours, asked = protocol[name], board.get(name)
    if name == "scorer_hash":  # older runs do not say
        return ours is None or asked is None or ours == asked
    if name == "train_on" and "steps" not in protocol:  # a model as it is
        return ours in may_carry(str(asked))
    if name != "loss_before":
        return bool(json.dumps(ours) == json.dumps(asked))
    if not isinstance(asked, int | float):  # no run that founded the board has it
        return True
    return ours is not None and _near(ours, asked, SAME_LOSS)


def _near(a: float, b: float, tolerance: float = 1e-9) -> bool:
    return math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-9)
