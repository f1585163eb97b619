"""What a recipe needs before it starts: runs, data, memory, arithmetic, hours.

From models' configs, by `estimate` and `flops`, and from data that is on this machine. No weights are read, and
nothing is downloaded but a config.
"""

import functools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..base.errors import HotLoraError
from ..bench.contenders import Contender
from ..bench.worker import matrix_rate
from ..cost.estimate import coverage_at, estimate, meta_model, sized_config
from ..cost.flops import attention_adapter_flops, expert_adapter_flops, forward_flops, step_flops
from ..hf.models import NANOS, config_file, load_tokenizer
from ..hf.moe_layers import moe_layers, num_experts_per_tok
from ..routing.plan import DEFAULT_FRACTION
from ..routing.profile import experts_kept
from ..runs.options import RunOptions
from ..runs.sweep import Sweep, sweep_jobs
from ..runs.sweep_runs import make_profile
from ..tasks import task_of
from ..tasks.data import load_examples
from ..training.config import TrainConfig

GPU_RATE = 100e12
"""FLOP/s that hours are counted at where none is given: about a third of what an A100 has at most in bfloat16."""
REACHED = 0.3
"""of a large matrix product's rate on this machine, by a training step of nano on a CPU (docs/speed.md)"""
_CHARACTERS = 4  # of a token, where there is no tokenizer here
_SAMPLE = 200


@dataclass(frozen=True)
class Load:
    """A condition's part of the arithmetic."""

    name: str
    options: RunOptions
    flops: float | None
    """of one run; None where its data is not here"""
    share: float | None
    """of the experts that it adapts; None by full fine-tuning"""


def sweep_needs(sweep: Sweep, tflops: float | None = None) -> list[str]:
    """What a sweep needs, a line each."""
    jobs = sweep_jobs(sweep, Path())
    profiles = [job for job in jobs if job.function is make_profile]
    runs = number_of(len(jobs) - len(profiles), "run")
    lines = [f"{runs} and {number_of(len(profiles), 'shared profile')}"]
    options = [sweep.options_of(condition) for condition in sweep.conditions]
    sources = {given[name] for given in options for name in ("data", "test_data") if given.get(name)}
    lines += [_data_line(map(str, sources))]
    for model in dict.fromkeys(str(given["model"]) for given in options):
        try:
            loads, forward = _loads(sweep, model)
            lines.append(f"{model}: {_memory_words(model, loads)}")
        except HotLoraError as error:
            lines.append(f"{model}: memory and hours unknown: {error}")
            continue
        known = [load.flops for load in loads if load.flops is not None]
        own = [str(job.arguments["data"]) for job in profiles if job.arguments["model"] == model]
        profiled = sum(forward.get(data, 0.0) for data in own)
        told = time_words(model, sum(known) * len(sweep.seeds) + profiled, tflops, "training and profiling")
        if missing := len(loads) - len(known):
            told += f"; {missing * len(sweep.seeds)} more unknown: their data is not here (--data TASK=FILES)"
        lines.append(f"{model}: {told}; scoring is not counted")
    return lines


def profile_needs(
    models: Sequence[str], sources: Sequence[str], options: Mapping[str, Any], tflops: float | None = None
) -> list[str]:
    """What profiling each model on each source needs, a line each."""
    lines = [f"{number_of(len(models) * len(sources), 'pass', 'passes')} without gradients", _data_line(sources)]
    for model in models:
        try:
            meta = meta_model(sized_config(config_file(model)))
        except HotLoraError as error:
            lines.append(f"{model}: memory and hours unknown: {error}")
            continue
        # A weight as it is loaded: float32 on the CPU, the checkpoint's own on a GPU.
        own: Any = meta.config.get_text_config().dtype
        size = sum(p.numel() for p in meta.parameters()) * (4 if model in NANOS or own is None else own.itemsize)
        length = int(options.get("max_length", 512))
        sizes = [data_size(source, model, options.get("limit"), length) for source in sources]
        forward = sum(forward_flops(meta, length).values())
        flops = forward * sum(tokens for _, tokens in filter(None, sizes))
        lines.append(f"{model}: {size / 1e9:,.2f} GB of weights, and a batch's activations")
        told = time_words(model, flops, tflops, "forward passes")
        unknown = sum(found is None for found in sizes)
        lines.append(f"{model}: {told}" + (f"; {unknown} data sets are not here, and not counted" if unknown else ""))
    return lines


def bench_needs(model: str, options: Mapping[str, Any], kinds: Iterable[str]) -> list[str]:
    """What timing contenders takes of memory, a line each."""
    try:
        file = config_file(model)
        tokens, length = int(options.get("tokens", 2048)), int(options.get("length") or 512)
        found = estimate(
            file, batch_size=max(1, tokens // length), max_length=min(tokens, length), layers=options.get("layers"),
            dtype=options.get("dtype", "auto"), r=options.get("r", 32), device=_device(model),
        )  # fmt: skip
        weights = found["memory"]["weights"]
    except HotLoraError as error:
        return [f"{model}: memory unknown: {error}"]
    lines = [f"{model}: {found['memory']['total'] / 1e9:,.2f} GB by LoRA on all experts"]
    if any(Contender(kind).options.get("full") for kind in kinds):
        lines.append(f"{model}: by full fine-tuning {4 * weights / 1e9:,.2f} GB and activations: weights, gradients "
                     "and AdamW's state in the model's dtype")  # fmt: skip
    return lines


def data_size(
    data: str, model: str, limit: int | None, max_length: int, **reading: Any
) -> tuple[int, int] | None:  # fmt: skip
    """(examples, tokens) of a training split that is on this machine, each cut at `max_length`; None where it is not.

    Tokens of a sample, by the model's tokenizer if it is here, else four characters each.

    reading: what `load_examples` takes of own rows besides.
    """
    if not _is_here(data):
        return None
    is_here = model in NANOS or (Path(model).expanduser() / "tokenizer.json").is_file()
    tokenizer = load_tokenizer(model) if is_here else None
    examples = load_examples(data, "train", limit=limit, tokenizer=tokenizer, tell=False, **reading)  # the runs tell
    some = examples[:: max(1, len(examples) // _SAMPLE)]
    texts = [example.prompt + example.completion for example in some]
    if tokenizer is not None:
        lengths = [float(len(ids)) for ids in tokenizer(texts)["input_ids"]]
    else:
        lengths = [len(text) / _CHARACTERS for text in texts]
    mean = sum(min(length, max_length) for length in lengths) / len(lengths)
    return len(examples), round(mean * len(examples))


def time_words(model: str, flops: float, tflops: float | None, what: str) -> str:
    """FLOPs and hours, and at which rate."""
    if flops == 0:
        return f"hours of {what} unknown: the data is not here"
    if tflops is not None:
        if not 0 < tflops < math.inf:
            raise HotLoraError(f"tflops is {tflops:g}: it must be above 0.")
        rate, told = tflops * 1e12, "as given"
    elif model in NANOS and not torch.cuda.is_available():
        rate = REACHED * matrix_rate(torch.float32, torch.device("cpu"))
        told = f"{REACHED:.0%} of what a matrix product gets here now"
    else:
        rate, told = GPU_RATE, "--tflops tells yours"
    seconds = flops / rate
    time = f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds / 60:,.1f} minutes"
    return f"{flops:.2g} FLOP of {what}, {time} at {rate / 1e12:,.3g} TFLOP/s ({told})"


def number_of(number: int, one: str, many: str | None = None) -> str:
    """1 run, 2 runs."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def _loads(sweep: Sweep, model: str) -> tuple[list[Load], dict[str, float]]:
    """Every condition that trains this model; and FLOPs of the forward pass over each data set's profiled part."""
    meta = meta_model(sized_config(config_file(model)))
    size_of = functools.cache(data_size)
    loads: list[Load] = []
    forward: dict[str, float] = {}
    for condition in sweep.conditions:
        given = sweep.options_of(condition)
        if given["model"] != model or not condition.train or condition.scores is not None:
            continue
        options, flops = sweep.resolved(condition), None
        reading = options.reading() if task_of(options.data) is None else {}
        size = size_of(options.data, model, options.limit, options.max_length, **reading)
        share = None if options.full else _adapted_share(meta, options)
        if size is not None:
            trained = options.epochs * size[1]
            if options.max_steps is not None:
                examples = options.max_steps * options.batch_size * options.gradient_accumulation_steps
                trained = examples * size[1] / size[0]
            flops = trained * _flops_per_token(meta, options, share)
            flops *= 2 if options.keep else 1  # LoRI's dense run comes first
            part = size[1] * options.share_profiled
            forward[options.data] = part * sum(forward_flops(meta, options.max_length).values())
        loads.append(Load(condition.name, options, flops, share))
    return loads, forward


def _adapted_share(meta: Any, options: RunOptions) -> float:
    """Of a layer's experts, as far as it is known before the data is."""
    if options.rule == "all":
        return 1.0
    experts = moe_layers(meta)[0].num_experts
    number = options.experts_per_layer
    if number is not None:
        return experts_kept(experts, None, num_experts_per_tok(meta) if number == "top_k" else int(number)) / experts
    return options.fraction or DEFAULT_FRACTION


def _flops_per_token(meta: Any, config: TrainConfig, share: float | None) -> float:
    """Of a training step; as much as LoRA's with the same experts, or three forwards by full fine-tuning."""
    forward = forward_flops(meta, config.max_length)
    if share is None:
        return 3 * sum(forward.values())
    covered = dict.fromkeys((layer.layer for layer in moe_layers(meta)), coverage_at(share))
    adapter = expert_adapter_flops(meta, config.r, covered)
    adapter += attention_adapter_flops(meta, config.r) if config.train_attention else 0.0
    return step_flops(forward, adapter, 1)


def _memory_words(model: str, loads: Sequence[Load]) -> str:
    """The most that a step takes, if all its examples are as long as they may be."""
    adapted = [load for load in loads if load.share is not None]
    words = []
    if adapted:
        most = max(adapted, key=lambda load: (load.share or 0) * 1e6 + load.options.batch_size)
        config = most.options
        found = estimate(
            config_file(model), batch_size=config.batch_size, max_length=config.max_length,
            fraction=most.share if most.share != 1 else None, r=config.r, train_attention=config.train_attention,
            train_router=config.train_router, train_shared=config.train_shared, quantize=config.quantize,
            gradient_checkpointing=config.gradient_checkpointing, device=_device(model),
        )["memory"]  # fmt: skip
        step = f"{config.batch_size} × {config.max_length} tokens"
        again = "" if config.gradient_checkpointing else " without gradient checkpointing"
        words.append(f"at most {found['total'] / 1e9:,.1f} GB ({most.name}: a step of {step}{again}, "
                     f"{found['weights'] / 1e9:,.1f} GB of it weights)")  # fmt: skip
    if len(adapted) < len(loads):
        size = sum(p.numel() for p in meta_model(sized_config(config_file(model))).parameters())
        words.append(f"by full fine-tuning {16 * size / 1e9:,.1f} GB and activations: weights, gradients and AdamW's "
                     "state in float32")  # fmt: skip
    return "; ".join(words) or "only scored"


def _data_line(sources: Iterable[str]) -> str:
    """What is here, what the Hub has, and what only the user can bring, with the options that do."""
    found: dict[str, list[str]] = {"data": [], "data from the Hub": [], "data that is on no Hub": []}
    for source in sorted(set(sources)):
        task = task_of(source)
        away = "data that is on no Hub" if task is not None and task.needs_files else "data from the Hub"
        found["data" if _is_here(source) else away].append(source)
    words = {what: f"{what}: {', '.join(names)}" for what, names in found.items() if names}
    if "data from the Hub" in words:
        words["data from the Hub"] += " (or --data TASK=FILES)"
    if missing := found["data that is on no Hub"]:
        tasks = dict.fromkeys(source.partition(":")[0].removesuffix("-lori") for source in missing)
        words["data that is on no Hub"] += f"; give {' '.join(f'--data {task}=FILES' for task in tasks)}"
    return "; ".join(words.values())


def _is_here(data: str) -> bool:
    """Whether a data set can be read without a network."""
    path = data.partition(":")[2] if task_of(data) is not None else data
    if not path:
        return data.startswith("nano-")  # generated
    return os.path.exists(os.path.expanduser(path))


def _device(model: str) -> str:
    """What the estimate is for: nano runs on any CPU, a paper's model wants a GPU."""
    return "cpu" if model in NANOS and not torch.cuda.is_available() else "cuda"
