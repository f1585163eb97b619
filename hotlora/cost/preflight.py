"""Before a model is loaded: whether a training step fits into the memory that is free, and which options make it fit.

It is the estimate (`estimate.py`), spread over processes as `cluster.py` has it, against the device's free memory.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import torch

from ..base.errors import FileError, HotLoraError
from ..base.processes import num_processes, own_device, uses_deepspeed, wants_fsdp
from ..base.sizes import size_words
from ..hf.models import config_file, is_stored_quantized
from ..routing.plan import DEFAULT_FRACTION, ExpertPlan
from ..routing.rules import READS
from ..runs.options import WARM_UP, RunOptions
from .cards import CPU, card_named, card_of_size
from .cluster import Machine
from .estimate import step_of
from .memory import Step, Storage
from .setups import Setups, first_of_each_kind

ROOM = 0.9
"""Share of the free memory that is counted on; the estimate is good to 10%, and leaves out fragmentation."""
_MOST_REMEDIES = 3
_FIXED = ("weights", "staging", "gathered", "adapter", "gradients", "optimizer")  # needed whatever the batch
_CGROUP = Path("/sys/fs/cgroup")
_OF_STEP = (
    "batch_size", "max_length", "r", "train_attention", "train_router", "train_shared", "train_a", "share_a",
    "normalize_moe_lora", "grow_every", "perft", "perft_adapters", "perft_top_k", "dtype",
    "attn_implementation",
)  # fmt: skip


@dataclass(frozen=True)
class Preflight:
    """What was found. Sizes in bytes, of the fullest process's device."""

    device: str
    free: int
    needed: int
    """At the peak of a step of full batches; 0 where it is not known."""
    fixed: int = 0
    """Of it whatever the batch: weights, the adapter, its gradients, the optimizer's state."""
    batch: str = ""
    remedies: tuple[tuple[str, int], ...] = ()
    """(flags, bytes needed with them), where it does not fit."""
    unknown: str = ""
    """Why nothing is known."""
    host: int = 0
    """Of RAM, for what a GPU's run keeps there."""
    host_free: int = 0

    @property
    def fits(self) -> bool:
        return self.needed <= ROOM * self.free and self.host <= self.host_free

    @property
    def is_hopeless(self) -> bool:
        """Whether not even the model and the adapter's state find room. On a CPU swapping may carry it through."""
        return self.fixed > self.free and self.device != "cpu"

    def __str__(self) -> str:
        if self.unknown:
            return f"memory: whether it fits is not known ({self.unknown})"
        has = f"{size_words(self.free)} are free on {self.device}"
        if self.host:
            ram = (
                f"{size_words(self.host)} of RAM for offloaded experts, of which {size_words(self.host_free)} are free"
            )
            has = f"{has}; and {ram}"
        if self.fits:
            return f"memory: a step of {self.batch} tokens needs about {size_words(self.needed)}; {has}"
        if self.is_hopeless:
            start = (
                f"this does not fit: the model and the adapter's state alone need {size_words(self.fixed)}, and {has}."
            )
        else:
            start = f"a step of {self.batch} tokens needs about {size_words(self.needed)}, and {has}: it may not fit."
        options = "; ".join(f"{flags} ({size_words(size)})" for flags, size in self.remedies)
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
        where, there = device_and_free(options.device)
        path = config_file(options.model)
        kept = experts_of(options)
    except (HotLoraError, OSError, RuntimeError):
        return None
    free = there if free is None else free
    unknown = Preflight(str(where), free, 0)
    if reason := unknown_to_estimate(options):
        return replace(unknown, unknown=f"the estimate does not know {reason}")
    try:
        setups = Setups(
            options, step_by(options, path, where, kept), num_processes(), layout(options.expert_parallel),
            card=card_for(where, free), warm_up_of=warm_up_by(options, path, where),
            is_quantized=is_stored_quantized(path),
        )  # fmt: skip
        own = setups.own
        found = replace(
            unknown,
            needed=own.total,
            fixed=round(sum(own.memory[kind] for kind in _FIXED)),
            batch=f"{options.batch_size} × {options.max_length:,}",
            host=own.host,
            host_free=free_host_memory(),
        )
        if found.fits:
            return found
        room, host = ROOM * free, found.host_free
        ways = chain(setups.chosen_from, setups.beyond(own))
        remedies = first_of_each_kind(ways, lambda way: way.total <= room and way.host <= host, _MOST_REMEDIES)
        return replace(found, remedies=tuple((way.flags, way.total) for way in remedies))
    except FileError:
        return None
    except Exception as error:  # of whatever kind: a run is not to end because nothing could be said before it
        return replace(unknown, unknown=str(error).strip().split("\n")[0].rstrip("."))


UNKNOWN = {"full": "full fine-tuning", "train_full_experts": "full experts", "use_dora": "DoRA"}
"""Options of runs that the estimate does not know, in words."""


def unknown_to_estimate(options: RunOptions) -> str | None:
    """What of a run the estimate does not know."""
    return next((words for name, words in UNKNOWN.items() if getattr(options, name)), None)


def card_for(where: torch.device, size: float) -> Machine:
    """What times are foreseen for: the GPU that is here, or that of the known ones whose memory is nearest to its own,
    or to `size`, where there is none."""
    if where.type == "cpu":
        return CPU
    if not torch.cuda.is_available():
        return card_of_size(size)
    return known_card(where) or card_of_size(torch.cuda.get_device_properties(where).total_memory)


def known_card(where: torch.device) -> Machine | None:
    """The GPU that is here, if it is one of the known ones."""
    is_here = where.type == "cuda" and torch.cuda.is_available()
    return card_named(torch.cuda.get_device_name(where)) if is_here else None


def _of_auto(name: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def step_by(
    options: RunOptions, path: str, where: torch.device, kept: Mapping[str, Any],
    fixed: Mapping[str, Any] = MappingProxyType({}),
) -> Callable[[Mapping[str, Any]], Step]:  # fmt: skip
    """A run's step, with other values for some of its options. kept: as `experts_of` has it. fixed: values of options
    that stay, whatever changes."""

    def with_changes(changes: Mapping[str, Any]) -> Step:
        given = {name: changes.get(name, getattr(options, name)) for name in _OF_STEP} | dict(fixed)
        budget = {name: changes[name] for name in ("fraction", "experts_per_layer") if name in changes} or kept
        return step_of(path, device=where, padded=not options.packing, packed=options.packing, **given, **budget)

    return with_changes


def warm_up_by(
    options: RunOptions, path: str, where: torch.device
) -> Callable[[Mapping[str, Any]], Step] | None:  # fmt: skip
    """Of the warm-up before a run, which is plain LoRA on all experts; None: there is none."""
    plain = {name: value for name, value in WARM_UP.items() if name in _OF_STEP}
    return None if options.warmup == "none" else step_by(options, path, where, {}, plain)


def experts_of(options: RunOptions) -> dict[str, Any]:
    """The budget as `estimate` takes it; none is all, which is also what a rule may choose at most that goes by the
    data."""
    if options.plan is not None:
        return {"experts_per_layer": max(map(len, ExpertPlan.load(options.plan).experts.values()))}
    if options.rule == "all" or "fraction" not in READS.get(options.rule, ()) or options.budget is not None:
        return {}
    if options.experts_per_layer is not None:
        return {"experts_per_layer": options.experts_per_layer}
    return {"fraction": DEFAULT_FRACTION if options.fraction is None else options.fraction}


def estimated_options(options: RunOptions) -> dict[str, Any]:
    """A run's, as `estimate` takes them."""
    names = (*_OF_STEP, *(field.name for field in fields(Storage)))
    return {name: getattr(options, name) for name in names} | experts_of(options) | {
        "device": _of_auto(options.device), "padded": not options.packing,
        "packed": options.packing,
    }  # fmt: skip


def layout(expert_parallel: int) -> str:
    """How a run's processes share out the model, as `cluster` names it."""
    if uses_deepspeed():
        return "sharded"
    if expert_parallel > 1:
        return "ep"
    return "fsdp" if wants_fsdp() and num_processes() > 1 else "ddp"


def device_and_free(name: str) -> tuple[torch.device, int]:
    """The device that this process loads the model onto, and the bytes that are free there."""
    device = torch.device(_of_auto(name))
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise HotLoraError(f"device is {name}, and there is no GPU here: give another --device, or a size.")
        device = own_device() or device
        return device, torch.cuda.mem_get_info(device)[0]
    return device, free_host_memory()


def free_host_memory() -> int:
    """Bytes of RAM that are free for this process, where several share it."""
    shared_by = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if num_processes() > 1 else 1
    return min(psutil.virtual_memory().available, _left_in_container()) // shared_by


def _left_in_container() -> int:
    """Bytes that this process's container may still take (Linux, cgroup 2); more than any machine has elsewhere. What
    files are read into counts as taken there, and is given back when it is needed."""
    try:
        limit, taken = (_CGROUP.joinpath(name).read_text().strip() for name in ("memory.max", "memory.current"))
        if limit == "max":
            return 1 << 62
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        cache = int(stat.get("active_file", 0)) + int(stat.get("inactive_file", 0))
        return int(limit) - max(0, int(taken) - cache)
    except (OSError, ValueError):
        return 1 << 62
