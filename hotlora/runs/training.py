"""A whole run: profile the router on the data, select experts, train an adapter, evaluate, keep a record.

Run again with the same options, it goes on from where it was stopped; once done, it gives back its record.
"""

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import get_peft_model
from transformers import set_seed

from ..adapter.config import HotLoraConfig
from ..adapter.count import count_parameters
from ..adapter.load import WEIGHTS_FILE
from ..adapter.quantize import quantized_parameters
from ..base.errors import DataError, HotLoraError, PlanError
from ..base.files import atomic_folder, file_in, sha256_file
from ..base.processes import (
    all_objects,
    check_alike,
    gathered,
    is_main,
    is_sharded,
    num_processes,
    own_device,
    rank,
    sharding,
    start,
    uses_deepspeed,
    wait_for_all,
)
from ..base.quiet import quiet
from ..base.records import Record, new_record, write_record
from ..evaluate.score import Evaluation, evaluate_task, response_loss, summarize
from ..hf.forward import check_aux_loss
from ..hf.models import fingerprint, load_config, load_tokenizer, vocab_size
from ..routing.plan import ExpertPlan
from ..routing.profile import RoutingProfile
from ..routing.profiler import profile_routing
from ..tasks import Example, Task
from ..tasks.chat import template_source
from ..tasks.data import batches, data_hash, load_examples, task_of, test_source, tokenize
from ..train.config import PROFILE_FRACTION, TrainConfig
from ..train.reprofile import Reprofiling
from ..train.trainer import check_family, train
from .checks import check_made_on, check_run, select
from .folder import data_time, finished, load_base, recorded, save_evaluation, underneath

_log = logging.getLogger(__name__)

_MIN_PROFILED = 64  # examples, where there are so many: a tenth of a small set is too few to rank experts by
_DEFAULT = TrainConfig()
_NAMES = ("model", "data", "test_data", "scores")  # of files and folders, which may be others on another machine


def profile_data(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    data: str,
    model_name: str,
    *,
    batch_size: int = 16,
    max_length: int = 512,
    dataset: Dataset | None = None,
    progress: bool = False,
) -> RoutingProfile:
    """The model's routing on prompts and responses, with where it came from in `source`. Several processes share it.

    dataset: what `tokenize` has made of the examples already.
    """
    dataset = tokenize(examples, tokenizer, max_length) if dataset is None else dataset
    source = _profile_source(model, tokenizer, examples, data, model_name, max_length)
    check_alike({"data_hash": source["data_hash"], "fingerprint": source["fingerprint"]})
    some = batches(dataset, tokenizer, batch_size)
    return profile_routing(model, some, progress=progress, source=source, share_out=True)


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
    keep_hot: bool = False,
    expert_parallel: int = 1,
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
        on_top_of: saved adapters that are merged into the model, in this order, before anything else; before each of
            them those that it was itself trained on top of.
        reprofile_every: steps after which the adapted model is profiled and experts are selected anew; None: never.
        reprofile_left: what becomes of what an expert has learned that is not selected again: "drop" or "merge".
        condition: the record's name for what was done; None: the rule's.
        test_data: held-out data; a task has its own. Its response loss is taken, and its task's score.
        limit, test_limit: at most so many examples, the same ones for every seed.
        evaluate: whether to score the task after training.
        quantize: bits in which the routed experts are stored, 8 or 4.
        keep_hot: the chosen experts are not quantized. The model is profiled with all of them quantized, and loaded
            again when they are known.
        expert_parallel: processes that share out each layer's experts; 1: none do.

    Several processes that torchrun or `accelerate launch` started call this with the same arguments and do it
    together; `distributed.sharding` has how the model is spread over them.

    Raises:
        HotLoraError: `output` holds a run with other options (each is named), or an input is wrong: of options that is
        told before anything is written or loaded. What fails later leaves a record with the status "failed" and the
        message.
    """
    start(device)
    on_top_of = underneath(model, on_top_of)
    output, progress = Path(output), progress and is_main()
    if not 0 < profile_fraction <= 1:
        raise DataError(f"profile_fraction = {profile_fraction} is out of range: it must be in (0, 1].")
    selection: dict[str, Any] = {
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
    if keep_hot and (not quantize or reprofile_every):
        raise HotLoraError("keep_hot is for quantized experts that stay chosen: give quantize, and no reprofile_every.")
    if plan is not None and reprofile_every is not None:
        raise PlanError("a given plan has no rule to select by again: leave out reprofile_every, or the plan.")
    spread = sharding(expert_parallel) or uses_deepspeed()
    if spread and (full or reprofile_every or config.use_dora or config.train_full_experts):
        raise HotLoraError(
            "full fine-tuning, full experts, DoRA and re-profiling need all weights in each process: leave them out, "
            "or launch without FSDP, DeepSpeed and expert parallelism."
        )
    check_run(
        model, config=config, **selection, plan_seed=plan_seed, profile=profile, plan=plan, full=full,
        reprofile_every=reprofile_every, reprofile_left=reprofile_left, eval_batch_size=eval_batch_size, dtype=dtype,
        device=device, quantize=quantize,
    )  # fmt: skip
    check_aux_loss(load_config(model), config.aux_loss_coef)
    tokenizer = load_tokenizer(model)
    now = data_time(output)
    examples = load_examples(data, "train", limit=limit, tokenizer=tokenizer, now=now)
    held_out = test_source(data, test_data)
    test = load_examples(held_out, "test", limit=test_limit, tokenizer=tokenizer, now=now) if held_out else []
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
        "evaluate": evaluate, "dtype": dtype, "quantize": quantize, "keep_hot": keep_hot or None,
        "processes": num_processes(), "expert_parallel": expert_parallel,
    }  # fmt: skip
    options |= (template := template_source(tokenizer, (*examples, *test)))
    check_alike({name: value for name, value in options.items() if name not in _NAMES})
    if (done := finished(output, options)) is not None:
        return done
    wait_for_all()  # until each has seen what was there
    size = vocab_size(model)
    dataset = tokenize(examples, tokenizer, config.max_length, vocab_size=size)
    # Requests to refuse have no answer that a loss could be taken of.
    some = any(example.completion for example in test)
    held = tokenize(test, tokenizer, config.max_length, vocab_size=size) if some else None

    condition = condition or ("fft" if full else given.rule if given else rule)
    record = new_record(
        name=condition, condition=condition, seed=config.seed, config=options,
        model={"name": model, "fingerprint": ""},
        data={"name": data, "hash": options["data_hash"], "train": len(examples), "test": len(test)},
    )  # fmt: skip
    record["data"] |= {"read_at": now.isoformat()} if template else {}
    with recorded(record, output):
        loading: dict[str, Any] = {
            "dtype": dtype, "device": device, "quantize": quantize, "expert_parallel": expert_parallel
        }  # fmt: skip
        base = load_base(model, on_top_of, keep=given.experts if keep_hot and given else None, **loading)
        check_family(base, tokenizer, config)
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
                chosen = select(routing, selection, seed)
                if keep_hot:
                    del base
                    base = load_base(model, on_top_of, keep=chosen.experts, **loading)
            check_alike({"plan_hash": chosen.hash})
            if is_main():
                chosen.save(output / "plan.json")
            record["plan"] = {"path": "plan.json", "hash": chosen.hash, "rule": chosen.rule, "params": chosen.params}
            record["name"] = _describe(condition, chosen)
            adapted = _adapt(base, chosen, config, mask)
            record["parameters"] = count_parameters(adapted)
            if reprofile_every is not None:
                sample = tokenize(profile_sample(examples, profile_fraction), tokenizer, config.max_length)
                moving = Reprofiling(
                    adapted,
                    profile=lambda: profile_routing(
                        adapted, batches(sample, tokenizer, config.batch_size), share_out=True
                    ),
                    select=lambda routing: select(routing, selection, seed),
                    every=reprofile_every,
                    left=reprofile_left,
                    seed=config.seed,
                    log=output / "reprofile.jsonl",
                )
        if is_main():
            write_record(output, record)
        scoring: dict[str, Any] = {"batch_size": eval_batch_size, "progress": progress}
        before = held and response_loss(adapted, tokenizer, held, share_out=True, **scoring)
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
        if is_main():
            write_record(output, record)

        if held is not None:
            after = response_loss(adapted, tokenizer, held, share_out=True, **scoring)
            record["training"] |= {"test_loss_before": before, "test_loss": after}
        task = task_of(held_out) if held_out else None
        if task is not None and task.kind != "text" and evaluate:
            evaluation = _evaluate(adapted, tokenizer, task, test, **scoring)
            record["evaluation"] = save_evaluation(evaluation, output)
    return record


def _profile_source(
    model: Any, tokenizer: Any, examples: Sequence[Example], data: str, model_name: str, max_length: int
) -> dict[str, Any]:
    return {
        "fingerprint": fingerprint(model), "model": model_name, "data": data,
        "data_hash": data_hash(examples), "examples": len(examples), "max_length": max_length,
        **template_source(tokenizer, examples),
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
        check_made_on(routing, fingerprint(model), file, model_name)
        return routing, file
    file = output / "profile.safetensors"
    some = profile_sample(examples, fraction)
    if file.is_file():
        routing = RoutingProfile.load(file)
        source = _profile_source(model, tokenizer, some, data, model_name, config.max_length)
        if all(routing.source.get(key) == value for key, value in source.items()):
            return routing, file
    routing = profile_data(
        model, tokenizer, some, data, model_name,
        batch_size=config.batch_size, max_length=config.max_length, progress=progress,
    )  # fmt: skip
    if is_main():
        routing.save(file)
    return routing, file


def profile_sample(examples: Sequence[Example], fraction: float) -> list[Example]:
    """What the router is profiled on."""
    num = min(len(examples), max(_MIN_PROFILED, round(fraction * len(examples))))
    stride = len(examples) / num  # spread over the data, which may be sorted
    return [examples[int(i * stride)] for i in range(num)]


def _adapt(model: Any, plan: ExpertPlan, config: TrainConfig, mask: str | Path | None) -> Any:
    """The model with a fresh adapter, the same for the same seed."""
    names = {field.name for field in dataclasses.fields(HotLoraConfig)}
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name in names}
    set_seed(config.seed)
    with quiet():
        adapted: Any = get_peft_model(model, HotLoraConfig(plan=plan, mask=mask, **options))
    if is_sharded(model) and (device := own_device()):  # where the base computes, and not where its shards may wait
        for name, tensor in (*adapted.named_parameters(), *adapted.named_buffers()):
            if "lora_" in name:
                tensor.data = tensor.data.to(device)
    return adapted


def _evaluate(model: Any, tokenizer: Any, task: Task, examples: Sequence[Example], **options: Any) -> Evaluation:
    """The task's score; of several processes each does a share. Where the model is spread over them, each does all: a
    text is longer than another, and all processes must go step by step."""
    many = num_processes()
    if many == 1 or is_sharded(model) or len(examples) < many:
        return evaluate_task(model, tokenizer, task, examples, **options)
    part = evaluate_task(model, tokenizer, task, examples[rank() :: many], **options)
    found = all_objects((part.results, part.seconds))
    results = [
        {**result, "index": result["index"] * many + process}
        for process, (some, _) in enumerate(found)
        for result in some
    ]
    results.sort(key=lambda result: result["index"])
    return summarize(task, examples, results, max(seconds for _, seconds in found))


def _save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    if not is_main():
        return
    with atomic_folder(folder) as beside, quiet():
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)


def _save_adapter(model: Any, folder: Path, model_name: str) -> int:
    """Saves the adapter; returns the size of its weights in bytes."""
    # As the user calls it: the embedded model's folder is another one on every machine.
    model.peft_config["default"].base_model_name_or_path = model_name
    with gathered(parameter for parameter in model.parameters() if parameter.requires_grad):
        if is_main():  # each process has all of the adapter, whatever of the base
            ours = {name: value for name, value in model.state_dict().items() if "lora_" in name}
            with atomic_folder(folder) as beside, quiet():
                # No embedding is trained, and PEFT would ask the hub for the base's vocabulary.
                model.save_pretrained(beside, save_embedding_layers=False, state_dict=ours)
    wait_for_all()
    return (folder / WEIGHTS_FILE).stat().st_size


def _describe(condition: str, plan: ExpertPlan) -> str:
    """`hot 25%`: the share of all experts that the plan keeps."""
    kept = sum(map(len, plan.experts.values())) / (plan.num_experts * len(plan.experts))
    return condition if kept == 1 else f"{condition} {kept:.0%}"
