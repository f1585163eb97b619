"""A whole run: profile the router on the data, select experts, train an adapter, evaluate, keep a record.

Run again with the same options, it goes on from where it was stopped; once done, it gives back its record.
"""

import dataclasses
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import get_peft_model
from transformers import set_seed

from . import checkpoints
from .adapter import HotLoraConfig
from .config import FREE_OPTIONS, PROFILE_FRACTION, TrainConfig
from .count import count_parameters
from .data import batches, data_hash, load_examples, task_of, test_source, tokenize
from .errors import DataError, PlanError
from .evaluate import Evaluation, evaluate_task, response_loss
from .export import check_export, export_adapter
from .files import atomic_folder, file_in, sha256_file
from .load import load_adapter
from .models import checkpoint_dtype, fingerprint, load_model, load_tokenizer
from .plan import ExpertPlan, select_experts
from .quantize import experts_in, quantized_parameters
from .quiet import quiet
from .records import Record, new_record, read_record, write_record
from .routing import RoutingProfile, profile_routing
from .tasks import Example, Task
from .train import train

_log = logging.getLogger(__name__)

_MIN_PROFILED = 64  # examples, where there are so many: a tenth of a small set is too few to rank experts by
_DEFAULT = TrainConfig()


def profile_data(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    data: str,
    model_name: str,
    *,
    batch_size: int = 16,
    max_length: int = 512,
    progress: bool = False,
) -> RoutingProfile:
    """The model's routing on prompts and responses, with where it came from in `source`."""
    dataset = tokenize(examples, tokenizer, max_length)
    source = _profile_source(model, examples, data, model_name, max_length)
    return profile_routing(model, batches(dataset, tokenizer, batch_size), progress=progress, source=source)


def run_training(
    model: str,
    data: str,
    output: str | Path,
    *,
    config: TrainConfig = _DEFAULT,
    rule: str = "hot",
    fraction: float | None = None,
    experts_per_layer: int | None = None,
    signal: str = "count",
    profile: str | Path | None = None,
    profile_fraction: float = PROFILE_FRACTION,
    plan: str | Path | None = None,
    test_data: str | None = None,
    limit: int | None = None,
    test_limit: int | None = None,
    evaluate: bool = True,
    eval_batch_size: int = 64,
    dtype: str = "auto",
    device: str = "auto",
    quantize: int | None = None,
    progress: bool = False,
) -> Record:
    """Profile, select, train, evaluate: everything lands in `output`, and its `run.json` tells what happened.

    `output` gets profile.safetensors (unless `profile` names one to share), plan.json, checkpoints/,
    metrics.jsonl, adapter/, results-TASK.jsonl and run.json.

    Args:
        model, data: as `models.load_model` and `data.load_examples` take them.
        rule, fraction, experts_per_layer, signal: as `plan.select_experts` takes them; `config.seed`
            draws the rule "random".
        profile: a saved profile of this model, in place of profiling `profile_fraction` of the training data.
        plan: a saved plan, in place of profile and rule.
        test_data: held-out data; a task has its own. Its response loss is taken, and its task's score.
        limit, test_limit: at most so many examples, the same ones for every seed.
        evaluate: whether to score the task after training.

    Raises:
        HotLoraError: `output` holds a run with other options (each is named), or an input is wrong. The
        record then has the status "failed" and the message.
    """
    output = Path(output)
    if not 0 < profile_fraction <= 1:
        raise DataError(f"profile_fraction = {profile_fraction} is out of range: it must be in (0, 1].")
    if plan is not None and (fraction is not None or experts_per_layer is not None or profile is not None):
        raise PlanError("A plan names its experts already: leave out fraction, experts_per_layer and profile.")
    tokenizer = load_tokenizer(model)
    examples = load_examples(data, "train", limit=limit, tokenizer=tokenizer)
    held_out = test_source(data, test_data)
    test = load_examples(held_out, "test", limit=test_limit, tokenizer=tokenizer) if held_out else []
    given = ExpertPlan.load(plan) if plan is not None else None
    options = {
        **dataclasses.asdict(config), "model": model, "data": data, "data_hash": data_hash(examples),
        "test_data": held_out, "test_hash": data_hash(test), "rule": rule, "fraction": fraction,
        "experts_per_layer": experts_per_layer, "signal": signal, "profile_fraction": profile_fraction,
        "profile_hash": RoutingProfile.load(profile).hash if profile else None,
        "plan_hash": given.hash if given else None, "evaluate": evaluate, "dtype": dtype, "quantize": quantize,
    }  # fmt: skip
    if (done := _finished(output, options)) is not None:
        return done

    condition = given.rule if given else rule
    record = new_record(
        name=condition, condition=condition, seed=config.seed, config=options,
        model={"name": model, "fingerprint": ""},
        data={"name": data, "hash": options["data_hash"], "train": len(examples), "test": len(test)},
    )  # fmt: skip
    with _recorded(record, output):
        base = load_model(model, dtype=dtype, device=device, quantization_config=experts_in(quantize))
        num_parameters = base.num_parameters() + quantized_parameters(base)
        record["model"] |= {"fingerprint": fingerprint(base), "num_parameters": num_parameters}
        if given is not None:
            chosen = given
        else:
            routing, file = _profile(
                base, tokenizer, examples, data, model, output, profile, profile_fraction, config, progress
            )
            record["profile"] = {
                "path": os.path.relpath(file, output), "hash": routing.hash, "num_tokens": routing.num_tokens
            }  # fmt: skip
            chosen = select_experts(
                routing, rule=rule, fraction=fraction, experts_per_layer=experts_per_layer, signal=signal,
                seed=config.seed,
            )  # fmt: skip
        chosen.save(output / "plan.json")
        record["plan"] = {
            "path": "plan.json",
            "hash": chosen.hash,
            "rule": chosen.rule,
            "params": chosen.params,
        }
        record["name"] = _describe(condition, chosen)
        adapted = _adapt(base, chosen, config)
        record["parameters"] = count_parameters(adapted)
        write_record(output, record)
        dataset = tokenize(examples, tokenizer, config.max_length)
        held = tokenize(test, tokenizer, config.max_length) if test else None
        before = held and response_loss(adapted, tokenizer, held, batch_size=eval_batch_size, progress=progress)
        identity = {"model": model, "data_hash": options["data_hash"], "plan_hash": chosen.hash}
        result = train(adapted, tokenizer, dataset, config, output, identity=identity, progress=progress)
        record["training"] = {**dataclasses.asdict(result), "metrics": "metrics.jsonl"}
        record["training"]["cut"] = sum(dataset["cut"])
        record["training"]["left_out"] = len(examples) - len(dataset)
        record["parameters"]["adapter_bytes"] = _save_adapter(adapted, output / "adapter", model)
        write_record(output, record)

        if held is not None:
            after = response_loss(adapted, tokenizer, held, batch_size=eval_batch_size, progress=progress)
            record["training"] |= {"test_loss_before": before, "test_loss": after}
        task = task_of(held_out) if held_out else None
        if task is not None and evaluate:
            evaluation = evaluate_task(adapted, tokenizer, task, test, batch_size=eval_batch_size, progress=progress)
            record["evaluation"] = _save_evaluation(evaluation, output)
    return record


def run_evaluation(
    model: str,
    data: str,
    output: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    dtype: str = "auto",
    device: str = "auto",
    quantize: int | None = None,
    progress: bool = False,
) -> tuple[Record, Evaluation | None]:
    """Scores a model, or a model with a saved adapter, on a task's test split.

    Args:
        data: a task, or a task and its files (`gsm8k:DIR`).
        output: gets run.json and results-TASK.jsonl; None keeps nothing.
        limit: at most so many examples, the same ones every time.

    Returns:
        the record, and the evaluation; None in its place where `output` held the same one, done.

    Raises:
        DataError: `data` names no task, so nothing says what a right answer is.
    """
    task = _need_task(data)
    tokenizer = load_tokenizer(model)
    test = load_examples(data, "test", limit=limit, tokenizer=tokenizer)
    weights = Path(adapter) / "adapter_model.safetensors" if adapter else None
    options = {
        "model": model, "data": data, "test_hash": data_hash(test), "dtype": dtype, "quantize": quantize,
        "adapter": str(adapter) if adapter else None,
        "adapter_hash": sha256_file(weights) if weights else None,
    }  # fmt: skip
    if output is not None and (done := _finished(Path(output), options)) is not None:
        return done, None
    condition = "adapter" if adapter else "base"
    record = new_record(
        name=condition, condition=condition, config=options, model={"name": model, "fingerprint": ""},
        data={"name": data, "hash": options["test_hash"], "train": 0, "test": len(test)},
    )  # fmt: skip
    with _recorded(record, Path(output) if output else None):
        net: Any = load_model(model, dtype=dtype, device=device, quantization_config=experts_in(quantize))
        num_parameters = net.num_parameters() + quantized_parameters(net)
        record["model"] |= {"fingerprint": fingerprint(net), "num_parameters": num_parameters}
        record["parameters"] = {"trainable": 0, "total": num_parameters, "percent": 0.0}
        if adapter:
            net = load_adapter(net, adapter)
            assert weights is not None
            record["parameters"]["adapter_bytes"] = weights.stat().st_size
        evaluation = evaluate_task(net, tokenizer, task, test, batch_size=batch_size, progress=progress)
        record["evaluation"] = _save_evaluation(evaluation, Path(output) if output else None)
    return record, evaluation


def export_saved(
    model: str,
    adapter: str | Path,
    output: str | Path,
    *,
    format: str,
    merge_router: bool = False,
    drop_router: bool = False,
    dtype: str = "auto",
    device: str = "auto",
) -> Path:
    """`export.export_adapter` of a saved adapter; checkpoints that it writes get the base's tokenizer.

    Args:
        dtype: "auto" is the base checkpoint's own; sums are made in float32 at least.

    Raises:
        HotLoraError, FileError: as `export_adapter`. PlanError: the adapter is another model's.
    """
    check_export(format, output)  # before a model is loaded
    tokenizer = load_tokenizer(model)
    own = checkpoint_dtype(model) if dtype == "auto" else dtype
    adapted = load_adapter(load_model(model, dtype=own, device=device), adapter)
    return export_adapter(
        adapted, output, format=format, merge_router=merge_router, drop_router=drop_router, tokenizer=tokenizer
    )


def _need_task(data: str) -> Task:
    task = task_of(data)
    if task is None:
        raise DataError(
            f"{data!r} names no task, so nothing says what a right answer is: give a task's name, or a task "
            "and its files, as in gsm8k:DIR."
        )
    return task


def _finished(output: Path, options: dict[str, Any]) -> Record | None:
    """The record in `output` if it is done with the same options; an error if other work would be lost."""
    if not (output / "run.json").is_file():
        return None
    record = read_record(output)
    done = record["status"] == "done"
    if done or checkpoints.last_complete(output / "checkpoints"):
        old, new = ({k: v for k, v in o.items() if k not in FREE_OPTIONS} for o in (record["config"], options))
        checkpoints.check_same(old, new, output)
    if done:
        _log.info("%s is done already", output)
    return record if done else None


@contextmanager
def _recorded(record: Record, output: Path | None) -> Iterator[None]:
    """Writes the record when the run starts, and when it ends, well or not."""
    started = time.perf_counter()
    if output is not None:
        write_record(output, record)
    try:
        yield
    except BaseException as error:
        record |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        raise
    else:
        record["status"] = "done"
    finally:
        record["seconds"] = round(time.perf_counter() - started, 3)
        if output is not None:
            write_record(output, record)


def _profile_source(
    model: Any, examples: Sequence[Example], data: str, model_name: str, max_length: int
) -> dict[str, Any]:
    return {
        "fingerprint": fingerprint(model), "model": model_name, "data": data,
        "data_hash": data_hash(examples), "examples": len(examples), "max_length": max_length,
    }  # fmt: skip


def _profile(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    data: str,
    model_name: str,
    output: Path,
    shared: str | Path | None,
    fraction: float,
    config: TrainConfig,
    progress: bool,
) -> tuple[RoutingProfile, Path]:
    """The profile that is shared, or was made for this run before, or is made now; and its file."""
    if shared is not None:
        file = file_in(shared, "profile.safetensors")
        routing = RoutingProfile.load(file)
        made_on = routing.source.get("fingerprint")
        if made_on is not None and made_on != fingerprint(model):
            raise PlanError(
                f"{file} is the profile of {made_on}, and {model_name} is {fingerprint(model)}: profile this model."
            )
        return routing, file
    file = output / "profile.safetensors"
    num = min(len(examples), max(_MIN_PROFILED, round(fraction * len(examples))))
    stride = len(examples) / num  # spread over the data, which may be sorted
    some = [examples[int(i * stride)] for i in range(num)]
    if file.is_file():
        routing = RoutingProfile.load(file)
        source = _profile_source(model, some, data, model_name, config.max_length)
        if all(routing.source.get(key) == value for key, value in source.items()):
            return routing, file
    routing = profile_data(
        model, tokenizer, some, data, model_name,
        batch_size=config.batch_size, max_length=config.max_length, progress=progress,
    )  # fmt: skip
    routing.save(file)
    return routing, file


def _adapt(model: Any, plan: ExpertPlan, config: TrainConfig) -> Any:
    """The model with a fresh adapter, the same for the same seed."""
    names = ("r", "lora_alpha", "lora_dropout", "train_attention", "train_router", "train_shared")
    set_seed(config.seed)
    with quiet():
        adapted = get_peft_model(model, HotLoraConfig(plan=plan, **{name: getattr(config, name) for name in names}))
    return adapted


def _save_adapter(model: Any, folder: Path, model_name: str) -> int:
    """Saves the adapter; returns the size of its weights in bytes."""
    # As the user calls it: the embedded model's folder is another one on every machine.
    model.peft_config["default"].base_model_name_or_path = model_name
    with atomic_folder(folder) as beside, quiet():
        # No embedding is trained, and PEFT would ask the hub for the base's vocabulary.
        model.save_pretrained(beside, save_embedding_layers=False)
    return (folder / "adapter_model.safetensors").stat().st_size


def _save_evaluation(evaluation: Evaluation, output: Path | None) -> dict[str, Any]:
    summary = evaluation.summary()
    if output is not None:
        summary["results"] = f"results-{evaluation.task}.jsonl"
        evaluation.write_results(output / summary["results"])
    return {evaluation.task: summary}


def _describe(condition: str, plan: ExpertPlan) -> str:
    """`hot 25%`: the share of all experts that the plan keeps."""
    kept = sum(map(len, plan.experts.values())) / (plan.num_experts * len(plan.experts))
    return condition if kept == 1 else f"{condition} {kept:.0%}"
