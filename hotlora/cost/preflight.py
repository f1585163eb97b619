"""Before a model is loaded: whether a training step fits into the memory that is free, and which options make it fit.

It is the estimate (`estimate.py`), spread over processes as `scale.py` has it, against the device's free memory.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import torch

from ..base.errors import FileError, HotLoraError
from ..base.processes import num_processes, own_device, uses_deepspeed
from ..hf.internals import internal
from ..hf.models import NANO
from ..routing.plan import DEFAULT_FRACTION, ExpertPlan
from ..routing.rules import READS
from ..runs.options import RunOptions
from ..training.config import TrainConfig
from . import cluster as scale
from .cluster import Work
from .estimate import meta_model, quantized_bytes, sized_config, torch_dtype, workspace_bytes

ROOM = 0.9
"""Share of the free memory that is counted on; the estimate is good to 15%, and leaves out fragmentation."""
_MOST_REMEDIES = 3
_RECOMPUTE = "--gradient-checkpointing"
_SHORTEST = 64  # tokens that an example is not to be cut to less than
_FIXED = ("weights", "gathered", "adapter", "gradients", "optimizer")  # needed whatever the batch


@dataclass(frozen=True)
class Preflight:
    """What was found. Sizes in bytes, of the fullest process's device."""

    device: str
    free: int
    needed: int
    """At the peak of a step of full batches; 0 where it is not known."""
    fixed: int = 0
    """Of it whatever the batch: weights, the adapter, its gradients, AdamW's state."""
    batch: str = ""
    remedies: tuple[tuple[str, int], ...] = ()
    """(flags, bytes needed with them), where it does not fit."""
    unknown: str = ""
    """Why nothing is known."""

    @property
    def fits(self) -> bool:
        return self.needed <= ROOM * self.free

    @property
    def is_hopeless(self) -> bool:
        """Whether not even the model and the adapter's state find room. On a CPU swapping may carry it through."""
        return self.fixed > self.free and self.device != "cpu"

    def __str__(self) -> str:
        if self.unknown:
            return f"memory: whether it fits is not known ({self.unknown})"
        has = f"{_size(self.free)} are free on {self.device}"
        if self.fits:
            return f"memory: a step of {self.batch} tokens needs about {_size(self.needed)}; {has}"
        if self.is_hopeless:
            start = f"this does not fit: the model and the adapter's state alone need {_size(self.fixed)}, and {has}."
        else:
            start = f"a step of {self.batch} tokens needs about {_size(self.needed)}, and {has}: it may not fit."
        options = "; ".join(f"{flags} ({_size(size)})" for flags, size in self.remedies)
        if options:
            return f"{start} Each of these would: {options}."
        on_gpus = "spread the model over several GPUs (configs/fsdp2.yaml), or give a smaller --max-length."
        on_cpu = "take a machine with more memory, or give a smaller --max-length."
        return f"{start} No option makes it fit here: {on_cpu if self.device == 'cpu' else on_gpus}"


def preflight(options: RunOptions, *, free: int | None = None) -> Preflight | None:
    """Whether a step of a run with these options fits. Nothing of the model's weights is read.

    free: bytes; None: what the device says.

    None where there is no such model, device or plan, of which the run tells better.
    """
    try:
        where, there = _device(options.device)
        path = _config_file(options.model)
        kept = _experts(options)
    except (HotLoraError, OSError, RuntimeError):
        return None
    free = there if free is None else free
    unknown = Preflight(str(where), free, 0)
    for name, is_asked in (
        ("full fine-tuning", options.full),
        ("full experts", options.train_full_experts),
        ("DoRA", options.use_dora),
    ):
        if is_asked:
            return replace(unknown, unknown=f"the estimate does not know {name}")
    layout = _layout(options.expert_parallel)

    def work(config: TrainConfig, experts: dict[str, Any]) -> Work:
        return scale.work(
            path, batch_size=config.batch_size, max_length=config.max_length,
            gradient_checkpointing=config.gradient_checkpointing, r=config.r, train_attention=config.train_attention,
            train_router=config.train_router, train_shared=config.train_shared, dtype=options.dtype,
            quantize=options.quantize, keep_hot=options.keep_hot, device=where, **experts,
        )  # fmt: skip

    try:
        plain = work(options, kept)
        memory = scale.memory(plain, num_processes(), layout)
        found = replace(
            unknown,
            needed=round(memory["total"]),
            fixed=round(sum(memory[kind] for kind in _FIXED)),
            batch=f"{options.batch_size} × {options.max_length:,}",
        )
        if found.fits:
            return found
        cut = sized_config(path)
        meta, compute = meta_model(cut), torch_dtype(options.dtype, cut, where.type)
        trials = _Trials(
            options, kept, plain, compute.itemsize, work,
            workspace=lambda tokens: workspace_bytes(meta, tokens, compute, where),
            size=lambda work: round(scale.memory(work, num_processes(), layout)["total"]),
            room=ROOM * free,
        )  # fmt: skip
        changes = _changes(trials)
        if options.quantize is None and layout == "ddp":  # weights that are spread over processes cannot be quantized
            changes = chain(changes, _quantized(trials))
        return replace(found, remedies=_remedies(changes, trials))
    except FileError:
        return None
    except Exception as error:  # of whatever kind: a run is not to end because nothing could be said before it
        return replace(unknown, unknown=str(error).strip().split("\n")[0].rstrip("."))


@dataclass(frozen=True)
class _Trials:
    """What is needed to try other options. Sizes in bytes."""

    config: TrainConfig
    experts: dict[str, Any]
    plain: Work
    """With the options as they are."""
    itemsize: int
    work: Callable[[TrainConfig, dict[str, Any]], Work]
    workspace: Callable[[int], int]
    """By the tokens of a step."""
    size: Callable[[Work], int]
    """On the fullest process's device."""
    room: float

    def of_tokens(self, work: Work, tokens: int) -> Work:
        """With so many tokens: activations grow with them."""
        activations = round(work.activations * tokens / work.tokens)
        return replace(work, tokens=tokens, activations=activations, workspace=self.workspace(tokens))

    def largest_batch(self, work: Work) -> tuple[str, Work] | None:
        """The largest smaller batch that fits, with as many examples an optimizer step as before."""
        examples = self.config.batch_size * self.config.gradient_accumulation_steps
        for size in range(self.config.batch_size - 1, 0, -1):
            if examples % size == 0:
                changed = self.of_tokens(work, size * self.config.max_length)
                if self.size(changed) <= self.room:
                    return f"--batch-size {size} --gradient-accumulation-steps {examples // size}", changed
        return None


def _remedies(changes: Iterable[tuple[str, Work]], trials: _Trials) -> tuple[tuple[str, int], ...]:
    """The first few that make it fit, without those that have another one in them."""
    found: list[tuple[str, int]] = []
    for flags, changed in changes:
        size = trials.size(changed)
        if size <= trials.room and not any(set(known.split()) <= set(flags.split()) for known, _ in found):
            found.append((flags, size))
        if len(found) == _MOST_REMEDIES:
            break
    return tuple(found)


def _changes(trials: _Trials) -> Iterator[tuple[str, Work]]:
    """(flags, what there is to do with them): first those that change nothing of what is learned."""
    config, experts, plain = trials.config, trials.experts, trials.plain
    recomputed = None
    if not config.gradient_checkpointing:
        recomputed = trials.work(replace(config, gradient_checkpointing=True), experts)
        yield _RECOMPUTE, recomputed
    if smaller := trials.largest_batch(plain):
        yield smaller
    if recomputed and (smaller := trials.largest_batch(recomputed)):
        yield f"{_RECOMPUTE} {smaller[0]}", smaller[1]
    if not experts:
        yield f"--rule hot --fraction {DEFAULT_FRACTION}", trials.work(config, {"fraction": DEFAULT_FRACTION})
    if config.max_length >= 2 * _SHORTEST:
        half = config.max_length // 2
        yield f"--max-length {half}", trials.of_tokens(plain, config.batch_size * half)


def _quantized(trials: _Trials) -> Iterator[tuple[str, Work]]:
    """The same with the routed experts in 8 or 4 bits; and the least of all."""
    config = trials.config
    for bits in (8, 4):
        yield f"--quantize {bits}", _in_bits(trials.plain, bits, trials.itemsize)
    flags = "--quantize 4" + ("" if config.gradient_checkpointing else f" {_RECOMPUTE}")
    least = trials.work(replace(config, gradient_checkpointing=True), trials.experts)
    least = _in_bits(least, 4, trials.itemsize)
    yield flags, least
    if smaller := trials.largest_batch(least):
        yield f"{flags} {smaller[0]}", smaller[1]


def _in_bits(work: Work, bits: int, itemsize: int) -> Work:
    return replace(work, experts=round(work.experts * quantized_bytes(bits) / itemsize))


def _experts(options: RunOptions) -> dict[str, Any]:
    """The budget as `estimate` takes it; none is all, which is also what a rule may choose at most that goes by the
    data."""
    if options.plan is not None:
        return {"experts_per_layer": max(map(len, ExpertPlan.load(options.plan).experts.values()))}
    if options.rule == "all" or "fraction" not in READS.get(options.rule, ()) or options.budget is not None:
        return {}
    if isinstance(options.experts_per_layer, str):  # top_k, which is never more than a quarter of a model's experts
        return {"fraction": DEFAULT_FRACTION}
    if options.experts_per_layer is not None:
        return {"experts_per_layer": options.experts_per_layer}
    return {"fraction": DEFAULT_FRACTION if options.fraction is None else options.fraction}


def _layout(expert_parallel: int) -> str:
    if uses_deepspeed():
        return "sharded"
    if expert_parallel > 1:
        return "ep"
    is_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes")
    return "fsdp" if is_fsdp and num_processes() > 1 else "ddp"


def _config_file(model: str) -> str:
    """nano, a folder, or the config.json of a model on the Hub, which is all that is fetched."""
    if model == NANO or Path(model).expanduser().exists():
        return model
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise FileError(f"{model} does not exist.")
    return str(internal("transformers.utils:cached_file")(model, "config.json"))


def _device(name: str) -> tuple[torch.device, int]:
    """The device that this process loads the model onto, and the bytes that are free there."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cuda":
        device = own_device() or device
        return device, torch.cuda.mem_get_info(device)[0]
    shared_by = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if num_processes() > 1 else 1
    return device, min(psutil.virtual_memory().available, _left_in_container()) // shared_by


def _left_in_container() -> int:
    """Bytes that this process's container may still take (Linux, cgroup 2); more than any machine has elsewhere."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, taken = (folder.joinpath(name).read_text().strip() for name in ("memory.max", "memory.current"))
        return int(limit) - int(taken) if limit != "max" else 1 << 62
    except (OSError, ValueError):
        return 1 << 62


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.0f} MB"
