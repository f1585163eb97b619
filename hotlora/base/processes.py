"""One training in several processes, as torchrun or `accelerate launch` start them: who does what, and what is summed.

Every process runs the same code. Work on data is shared out; files are written by the main process alone, which is the
first one; at the end of each stage all wait for each other. In a process by itself nothing here does anything.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import HotLoraError

T = TypeVar("T")
_log = logging.getLogger(__name__)

# A process may wait for another that loads, saves or judges answers: longer than torch's ten minutes.
_PATIENCE = timedelta(hours=2)
_FAILURE = "hotlora/failure"
# What gloo and NCCL say where the other end is gone.
_LOST = ("Connection closed by peer", "Connection reset by peer", "remote process exiting prematurely")
LOST = (
    "another process of this run is gone without a message: it crashed, or was killed (as systems do when memory runs "
    "out). Run the same command again to resume from what is saved."
)
_wishes: set[str] = set()
"""What the launcher's configuration asks for, and is not to be asked for a second time."""


def start(device: str | torch.device = "auto") -> None:
    """Joins the processes that a launcher started with this one; each on a GPU takes one of its own.

    device: as `models.load_model` takes it.
    """
    if not dist.is_available() or dist.is_initialized():
        return
    if _num_launched() < 2:
        _hint_at_one_process()
        return
    from accelerate import PartialState
    from transformers.utils import logging as transformers_logging

    on_cpu = not torch.cuda.is_available() if device == "auto" else torch.device(device).type == "cpu"
    PartialState(cpu=on_cpu, timeout=_PATIENCE)
    if not is_main():  # one bar is enough
        transformers_logging.disable_progress_bar()


@cache
def _hint_at_one_process() -> None:
    """`accelerate launch --cpu --num_processes N` starts one process, and says nothing."""
    if _is_on("ACCELERATE_USE_CPU") and "WORLD_SIZE" not in os.environ:
        _log.warning(
            "accelerate launch has started one process, as it does on a CPU whatever --num_processes says; for N of "
            "them: torchrun --nproc-per-node N"
        )


def _num_launched() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def num_processes() -> int:
    """How many processes take part in this run; 1 for one by itself."""
    return dist.get_world_size() if _are_many() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _are_many() else 0


def is_main() -> bool:
    """Whether this process writes the files."""
    return rank() == 0


def wait_for_all() -> None:
    """Returns once every process is here."""
    if _are_many():
        all_objects(None)  # unlike torch's barrier it needs no device to be named


def own_device() -> torch.device | None:
    """The GPU that is this process's, where there are several processes on GPUs."""
    if _are_many() and dist.get_backend() != "gloo":
        return torch.device("cuda", torch.cuda.current_device())
    return None


def launched_device() -> torch.device | None:
    """The GPU that is this process's where a launcher has started several, be it that they have not joined yet: a
    script of one's own loads its model before accelerate or TRL joins them."""
    if (own := own_device()) is not None:
        return own
    if _num_launched() < 2 or "LOCAL_RANK" not in os.environ or (dist.is_available() and dist.is_initialized()):
        return None
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


def device_of(model: Any) -> torch.device:
    """Where the model computes: not where its weights wait, if they are offloaded."""
    return own_device() or model.device


def all_objects(obj: T) -> list[T]:
    """What each process gave, in their order, in every process."""
    if not _are_many():
        return [obj]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, obj)
    return found


def check_alike(given: Mapping[str, Any]) -> None:
    """HotLoraError, in every process, where one was given something else than the first: data, a plan, an option."""
    first, *others = all_objects(dict(given))
    for number, its in enumerate(others, start=1):
        if names := sorted(name for name in first.keys() | its.keys() if first.get(name) != its.get(name)):
            raise HotLoraError(
                f"process {number} was given another {' and '.join(names)} than process 0: give all processes the same "
                "arguments, and the same files on every machine."
            )


def summed(tensor: Tensor) -> Tensor:
    """The sum over all processes, on the CPU, in the order of the processes: the same in each."""
    return torch.stack(all_objects(tensor.cpu())).sum(dim=0, dtype=tensor.dtype)


def shared_out(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """This process's share of `items`, which every process gives alike: each one is (item, True) in one of them.

    All processes get as many, since a sharded model's forward is one of all together: at the end some get an item that
    is another's, with False.
    """
    many, items = num_processes(), iter(items)
    if many == 1 and _num_launched() > 1:
        _log.warning(
            "%d processes were launched and have not joined, so that each does all of this work: make "
            "accelerate.PartialState() first.", _num_launched(),
        )  # fmt: skip
    while turn := list(islice(items, many)):
        is_mine = rank() < len(turn)
        yield turn[rank() if is_mine else 0], is_mine


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's weights are spread over the processes, so that its forward is one of all together."""
    if not _are_many():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, parameters that DeepSpeed has partitioned are whole. All processes enter it together."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def uses_deepspeed() -> bool:
    """Whether the launcher's configuration asks for DeepSpeed."""
    return num_processes() > 1 and _is_on("ACCELERATE_USE_DEEPSPEED")


def check_parallelism() -> None:
    """HotLoraError: the launcher's configuration has a `parallelism_config` that spreads sequences or matrices."""
    if not _is_on("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return
    sizes = {
        name: size
        for name in ("cp_size", "sp_size", "tp_size")
        if (size := os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "1")) != "1"
    }
    if sizes:
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise HotLoraError(
            f"the launcher's configuration has a parallelism_config ({told}), and a training spreads no sequence and "
            "no matrix over processes: leave these out; FSDP2 shards weights (configs/fsdp2.yaml), --expert-parallel "
            "spreads experts, and --gradient-checkpointing makes room for long sequences."
        )


def sharding(expert_parallel: int = 1) -> Any:
    """How the model is spread over the processes while it is loaded: transformers' DistributedConfig, or None where
    each process holds all of it.

    It is what the launcher's configuration asks for: FSDP2 with or without CPU offload. Accelerate would shard a model
    that each process has loaded in whole, after the router was profiled on it; transformers loads the shards alone. So
    the launcher's wish is carried out here, and taken off the environment for the trainer not to do it again.

    Args:
        expert_parallel: processes that share out the routed experts of a layer; 1: none do.

    Raises:
        HotLoraError: FSDP1, expert_parallel that does not divide the number of processes, a transformers without.
    """
    many = num_processes()
    if _is_on("ACCELERATE_USE_FSDP"):
        _wishes.add("fsdp")
        os.environ["ACCELERATE_USE_FSDP"] = "false"
    asked = "fsdp" in _wishes
    if expert_parallel < 1 or many % expert_parallel:
        raise HotLoraError(
            f"expert_parallel = {expert_parallel} must divide the number of processes, and that is {many}: launch with "
            f"`torchrun --nproc-per-node {expert_parallel}`, or give a divisor."
        )
    if many == 1 or not (asked or expert_parallel > 1):
        return None
    if asked and os.environ.get("FSDP_VERSION", "2") != "2":
        raise HotLoraError(
            "the launcher's configuration asks for FSDP 1, which takes no frozen weights beside trained ones: write "
            "fsdp_version: 2."
        )
    try:
        from transformers.distributed import DistributedConfig

        config = DistributedConfig(
            fsdp_size=many,
            ep_size=expert_parallel,
            # Without a GPU the shards lie there anyway.
            fsdp_cpu_offload=asked and _is_on("FSDP_OFFLOAD_PARAMS") and own_device() is not None,
        )
    except (ImportError, TypeError) as error:
        raise HotLoraError(
            f"this transformers cannot shard a model while it loads ({error}): pip install 'transformers>=5.23'."
        ) from error
    return config


def wants_fsdp() -> bool:
    """Whether the launcher's configuration asks for FSDP."""
    return "fsdp" in _wishes or _is_on("ACCELERATE_USE_FSDP")


def wants_checkpointing() -> bool:
    """Whether the launcher's configuration asks for activation checkpointing."""
    return "fsdp" in _wishes and _is_on("FSDP_ACTIVATION_CHECKPOINTING")


def first_failure(text: str) -> tuple[str, bool]:
    """(what went wrong first in any process, whether it was in this one); `text` says what went wrong here.

    The others fail soon after, since they wait for it in vain. The first one tells the user.
    """
    if not _are_many():
        return text, True
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps the store when it starts all again
    try:
        store = dist.distributed_c10d._get_default_store()
        found = store.compare_set(f"{_FAILURE}/{attempt}", "", f"{rank()} {text}").decode()
    except RuntimeError:  # the process that keeps the store is gone, and has told
        return text, False
    number, _, first = found.partition(" ")
    return first, int(number) == rank()


def lost_another(error: BaseException) -> bool:
    """Whether the error is that another process has gone while all did something together."""
    return _are_many() and isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST)


def described(error: BaseException) -> str:
    """For the record and the user: what gloo and NCCL say of a lost process tells nothing."""
    return LOST if lost_another(error) else f"{type(error).__name__}: {error}"


def leave() -> None:
    """Closes the connections at the end of a run that went well, which torch warns of otherwise."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def _are_many() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
