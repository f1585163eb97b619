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
from typing import Any, cast

from peft import get_peft_model
from transformers import set_seed

from . import checkpoints
from .adapter import HotLoraConfig
from .config import FREE_OPTIONS, PROFILE_FRACTION, TrainConfig
from .count import count_parameters
from .data import batches, data_hash, load_examples, task_of, test_source, tokenize
from .errors import DataError, HotLoraError, PlanError
from .evaluate import Evaluation, evaluate_task, response_loss
from .export import check_export, export_adapter
from .files import atomic_folder, file_in, sha256_file
from .generations import read_generations, score_generations
from .load import WEIGHTS_FILE, load_adapter
from .models import checkpoint_dtype, fingerprint, load_model, load_tokenizer
from .plan import ExpertPlan, select_experts
from .quantize import experts_in, quantized_parameters
from .quiet import quiet
from .records import Record, new_record, read_record, write_record
from .reprofile import Reprofiling
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
    experts_per_layer: int | str | None = None,
    p: float | None = None,
    budget: int | None = None,
    fillers: int | None = None,
    scores: str | Path | None = None,
    signal: str = "count",
    plan_seed: int | None = None,
    profile: str | Path | None = None,
    profile_fraction: float = PROFILE_FRACTION,
    plan: str | Path | None = None,
    mask: str | Path | None = None,
    full: bool = False,
    on_top_of: Sequence[str | Path] = (),
    reprofile_every: int | None = None,
    reprofile_left: str = "drop",
    condition: str | None = None,
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
    metrics.jsonl, adapter/ (or model/, by full fine-tuning), results-TASK.jsonl and run.json.

    Args:
        model, data: as `models.load_model` and `data.load_examples` take them.
        rule, fraction, experts_per_layer, p, budget, fillers, scores, signal: as `plan.select_experts` takes them;
            experts_per_layer may be "top_k": as many as the router chooses for a token.
        plan_seed: of rules that draw; None: `config.seed`, so another draw for another training seed.
        profile: a saved profile of this model, in place of profiling `profile_fraction` of the training data.
        plan: a saved plan, in place of profile and rule.
        mask: a saved `SparseMask`: only the entries of B that it keeps are trained.
        full: train all of the model's weights, without an adapter, in float32 unless `dtype` says otherwise.
        on_top_of: saved adapters that are merged into the model, in this order, before anything else.
        reprofile_every: steps after which the adapted model is profiled and experts are selected anew; None: never.
        reprofile_left: what becomes of what an expert has learned that is not selected again: "drop" or "merge".
        condition: the record's name for what was done; None: the rule's.
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
    selection = {
        "rule": rule, "fraction": fraction, "experts_per_layer": experts_per_layer, "p": p, "budget": budget,
        "fillers": fillers, "scores": None if scores is None else str(scores), "signal": signal,
    }  # fmt: skip
    budgets = [name for name, value in selection.items() if name not in ("rule", "signal") and value is not None]
    if plan is not None and (budgets or profile is not None):
        raise PlanError("A plan names its experts already: leave out profile, fraction and every other budget.")
    if full and (quantize or mask or reprofile_every or plan is not None):
        raise HotLoraError(
            "full fine-tuning has no plan, mask or re-profiling, and no quantized weights: leave them out."
        )
    if plan is not None and reprofile_every is not None:
        raise PlanError("a given plan has no rule to select by again: leave out reprofile_every, or the plan.")
    tokenizer = load_tokenizer(model)
    examples = load_examples(data, "train", limit=limit, tokenizer=tokenizer)
    held_out = test_source(data, test_data)
    test = load_examples(held_out, "test", limit=test_limit, tokenizer=tokenizer) if held_out else []
    given = ExpertPlan.load(plan) if plan is not None else None
    if full and dtype == "auto":
        dtype = "float32"
    options = {
        **dataclasses.asdict(config), **selection, "plan_seed": plan_seed, "full": full,
        "model": model, "data": data, "data_hash": data_hash(examples),
        "test_data": held_out, "test_hash": data_hash(test), "profile_fraction": profile_fraction,
        "profile_hash": RoutingProfile.load(profile).hash if profile else None,
        "plan_hash": given.hash if given else None,
        "scores_hash": sha256_file(Path(scores)) if scores is not None else None,
        "mask_hash": sha256_file(file_in(mask, "mask.safetensors")) if mask is not None else None,
        "on_top_of": [sha256_file(Path(folder) / WEIGHTS_FILE) for folder in on_top_of],
        "reprofile_every": reprofile_every, "reprofile_left": reprofile_left,
        "evaluate": evaluate, "dtype": dtype, "quantize": quantize,
    }  # fmt: skip
    if (done := _finished(output, options)) is not None:
        return done

    condition = condition or ("fft" if full else given.rule if given else rule)
    record = new_record(
        name=condition, condition=condition, seed=config.seed, config=options,
        model={"name": model, "fingerprint": ""},
        data={"name": data, "hash": options["data_hash"], "train": len(examples), "test": len(test)},
    )  # fmt: skip
    with _recorded(record, output):
        base = load_base(model, on_top_of, dtype=dtype, device=device, quantize=quantize)
        num_parameters = base.num_parameters() + quantized_parameters(base)
        record["model"] |= {"fingerprint": fingerprint(base), "num_parameters": num_parameters}
        moving: Reprofiling | None = None
        seed = config.seed if plan_seed is None else plan_seed
        if full:
            adapted = base.requires_grad_(True)
            record["parameters"] = {"trainable": num_parameters, "total": num_parameters, "percent": 100.0}
        else:
            chosen = given
            if chosen is None:
                routing, file = _profile(
                    base, tokenizer, examples, data, model, output, profile, profile_fraction, config, progress
                )
                record["profile"] = {
                    "path": os.path.relpath(file, output), "hash": routing.hash, "num_tokens": routing.num_tokens
                }  # fmt: skip
                chosen = _select(routing, selection, seed)
            chosen.save(output / "plan.json")
            record["plan"] = {"path": "plan.json", "hash": chosen.hash, "rule": chosen.rule, "params": chosen.params}
            record["name"] = _describe(condition, chosen)
            adapted = _adapt(base, chosen, config, mask)
            record["parameters"] = count_parameters(adapted)
            if reprofile_every is not None:
                some = tokenize(profile_sample(examples, profile_fraction), tokenizer, config.max_length)
                moving = Reprofiling(
                    adapted,
                    profile=lambda: profile_routing(adapted, batches(some, tokenizer, config.batch_size)),
                    select=lambda routing: _select(routing, selection, seed),
                    every=reprofile_every,
                    left=reprofile_left,
                    seed=config.seed,
                    log=output / "reprofile.jsonl",
                )
        write_record(output, record)
        dataset = tokenize(examples, tokenizer, config.max_length)
        held = tokenize(test, tokenizer, config.max_length) if test else None
        before = held and response_loss(adapted, tokenizer, held, batch_size=eval_batch_size, progress=progress)
        identity = {"model": model, "data_hash": options["data_hash"], "plan_hash": record.get("plan", {}).get("hash")}
        callbacks = [] if moving is None else [moving]
        result = train(
            adapted, tokenizer, dataset, config, output, identity=identity, callbacks=callbacks, progress=progress
        )
        if moving is not None:
            moving.finish()
            record["parameters"] |= count_parameters(adapted)
            record["reprofile"] = moving.drift()
        record["training"] = {**dataclasses.asdict(result), "metrics": "metrics.jsonl"}
        record["training"]["cut"] = sum(dataset["cut"])
        record["training"]["left_out"] = len(examples) - len(dataset)
        if full:
            _save_model(adapted, tokenizer, output / "model")
        else:
            record["parameters"]["adapter_bytes"] = _save_adapter(adapted, output / "adapter", model)
        write_record(output, record)

        if held is not None:
            after = response_loss(adapted, tokenizer, held, batch_size=eval_batch_size, progress=progress)
            record["training"] |= {"test_loss_before": before, "test_loss": after}
        task = task_of(held_out) if held_out else None
        if task is not None and task.kind != "text" and evaluate:
            evaluation = evaluate_task(adapted, tokenizer, task, test, batch_size=eval_batch_size, progress=progress)
            record["evaluation"] = _save_evaluation(evaluation, output)
    return record


def run_evaluation(
    model: str,
    data: str,
    output: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    on_top_of: Sequence[str | Path] = (),
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
        on_top_of: saved adapters that are merged into the model, in this order, under `adapter`.
        limit: at most so many examples, the same ones every time.

    Returns:
        the record, and the evaluation; None in its place where `output` held the same one, done.

    Raises:
        DataError: `data` names no task, so nothing says what a right answer is.
    """
    task = _need_task(data)
    tokenizer = load_tokenizer(model)
    test = load_examples(data, "test", limit=limit, tokenizer=tokenizer)
    weights = Path(adapter) / WEIGHTS_FILE if adapter else None
    options = {
        "model": model, "data": data, "test_hash": data_hash(test), "dtype": dtype, "quantize": quantize,
        "adapter": str(adapter) if adapter else None,
        "adapter_hash": sha256_file(weights) if weights else None,
        "on_top_of": [sha256_file(Path(folder) / WEIGHTS_FILE) for folder in on_top_of],
    }  # fmt: skip
    if output is not None and (done := _finished(Path(output), options)) is not None:
        return done, None
    condition = "adapter" if adapter else "base"
    record = new_record(
        name=condition, condition=condition, config=options, model={"name": model, "fingerprint": ""},
        data={"name": data, "hash": options["test_hash"], "train": 0, "test": len(test)},
    )  # fmt: skip
    with _recorded(record, Path(output) if output else None):
        net = load_base(model, on_top_of, dtype=dtype, device=device, quantize=quantize)
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


def run_generations(
    data: str,
    generations: str | Path,
    output: str | Path | None = None,
    *,
    allow_missing: bool = False,
    limit: int | None = None,
    progress: bool = False,
) -> tuple[Record, Evaluation | None]:
    """Scores completions that were made elsewhere, on a task's test split; loads no model.

    Args:
        data, output, limit: as `run_evaluation` takes them.
        generations: JSON lines, as `generations.read_generations` reads them.
        allow_missing: whether an example without a completion counts as wrong, and is no error.

    Returns:
        the record, and the evaluation; None in its place where `output` held the same one, done.
    """
    task = _need_task(data)
    test = load_examples(data, "test", limit=limit)
    completions = read_generations(generations, task, test, allow_missing=allow_missing)
    options = {
        "data": data, "test_hash": data_hash(test), "generations": str(generations),
        "generations_hash": sha256_file(Path(generations)), "allow_missing": allow_missing,
    }  # fmt: skip
    if output is not None and (done := _finished(Path(output), options)) is not None:
        return done, None
    record = new_record(
        name="generations", condition="generations", config=options, model={"name": "", "fingerprint": ""},
        data={"name": data, "hash": options["test_hash"], "train": 0, "test": len(test)},
    )  # fmt: skip
    with _recorded(record, Path(output) if output else None):
        evaluation = score_generations(task, test, completions, progress=progress)
        record["evaluation"] = _save_evaluation(evaluation, Path(output) if output else None)
    return record, evaluation


def export_saved(
    model: str,
    adapter: str | Path,
    output: str | Path,
    *,
    format: str,
    on_top_of: Sequence[str | Path] = (),
    merge_router: bool = False,
    drop_router: bool = False,
    dtype: str = "auto",
    device: str = "auto",
) -> Path:
    """`export.export_adapter` of a saved adapter; checkpoints that it writes get the base's tokenizer.

    Args:
        on_top_of: saved adapters that are merged into the model, in this order, before.
        dtype: "auto" is the base checkpoint's own; sums are made in float32 at least.

    Raises:
        HotLoraError, FileError: as `export_adapter`. PlanError: the adapter is another model's.
    """
    check_export(format, output)  # before a model is loaded
    tokenizer = load_tokenizer(model)
    own = checkpoint_dtype(model) if dtype == "auto" else dtype
    adapted = load_adapter(load_base(model, on_top_of, dtype=own, device=device), adapter)
    return export_adapter(
        adapted, output, format=format, merge_router=merge_router, drop_router=drop_router, tokenizer=tokenizer
    )


def combine_saved(
    model: str,
    adapters: Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    how: str = "cat",
    device: str = "auto",
) -> Path:
    """One adapter out of several tasks', by `add_weighted_adapter`: what LoRI calls merging (its section 4.3).

    Args:
        weights: of each adapter; None: 1.0 each.
        how: "cat" adds the updates exactly, with the sum of the ranks; "linear" adds the factors.

    Raises:
        HotLoraError: fewer than two adapters, other than one weight each, or adapters that cannot be combined.
        FileError: `output` is taken. PlanError: an adapter is another model's.
    """
    output = check_export("peft", output)
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if len(adapters) < 2 or len(weights) != len(adapters):
        raise HotLoraError(
            f"{len(adapters)} adapters and {len(weights)} weights: give two adapters or more, a weight each."
        )
    names = [f"task{i}" for i in range(len(adapters))]
    combined: Any = load_base(model, device=device)
    for name, folder in zip(names, adapters, strict=True):
        combined = load_adapter(combined, folder, name)
    combined.add_weighted_adapter(names, weights, "default", combination_type=how)
    with atomic_folder(output) as beside, quiet():
        combined.peft_config["default"].base_model_name_or_path = model
        combined.save_pretrained(beside, selected_adapters=["default"], save_embedding_layers=False)
    return output


def _need_task(data: str) -> Task:
    task = task_of(data)
    if task is None:
        raise DataError(
            f"{data!r} names no task, so nothing says what a right answer is: give a task's name, or a task "
            "and its files, as in gsm8k:DIR."
        )
    task.check_scored()
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
    some = profile_sample(examples, fraction)
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


def profile_sample(examples: Sequence[Example], fraction: float) -> list[Example]:
    """What the router is profiled on."""
    num = min(len(examples), max(_MIN_PROFILED, round(fraction * len(examples))))
    stride = len(examples) / num  # spread over the data, which may be sorted
    return [examples[int(i * stride)] for i in range(num)]


def load_base(model: str, on_top_of: Sequence[str | Path] = (), *, quantize: int | None = None, **options: Any) -> Any:
    """The base model as `models.load_model` takes `options`, with the adapters of earlier tasks merged into it."""
    base: Any = load_model(model, quantization_config=experts_in(quantize), **options)
    for folder in on_top_of:
        with quiet():
            base = cast(Any, load_adapter(base, folder)).merge_and_unload()
    return base


def _select(routing: RoutingProfile, selection: dict[str, Any], seed: int) -> ExpertPlan:
    if selection["experts_per_layer"] == "top_k":
        selection = selection | {"experts_per_layer": routing.num_experts_per_tok}
    return select_experts(routing, **selection, seed=seed)


def _adapt(model: Any, plan: ExpertPlan, config: TrainConfig, mask: str | Path | None) -> Any:
    """The model with a fresh adapter, the same for the same seed."""
    names = {field.name for field in dataclasses.fields(HotLoraConfig)}
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name in names}
    set_seed(config.seed)
    with quiet():
        adapted = get_peft_model(model, HotLoraConfig(plan=plan, mask=mask, **options))
    return adapted


def _save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    with atomic_folder(folder) as beside, quiet():
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)


def _save_adapter(model: Any, folder: Path, model_name: str) -> int:
    """Saves the adapter; returns the size of its weights in bytes."""
    # As the user calls it: the embedded model's folder is another one on every machine.
    model.peft_config["default"].base_model_name_or_path = model_name
    with atomic_folder(folder) as beside, quiet():
        # No embedding is trained, and PEFT would ask the hub for the base's vocabulary.
        model.save_pretrained(beside, save_embedding_layers=False)
    return (folder / WEIGHTS_FILE).stat().st_size


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
