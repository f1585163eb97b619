"""Counts what processes send each other in one training step of nano, for scripts/scale.py to hold its formulas to."""

import dataclasses
import json
import os
import socket
import sys
import tempfile
import traceback
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.distributed.distributed_c10d import ProcessGroup, _resolve_process_group
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from hotlora.adapter.config import HotLoraConfig
from hotlora.base import processes as distributed
from hotlora.base.records import environment
from hotlora.cost.cluster import work
from hotlora.hf.moe_layers import moe_layers
from hotlora.routing.plan import ExpertPlan
from hotlora.runs.folder import load_base
from hotlora.training.gradient_checkpointing import checkpoint_kwargs

BATCH, LENGTH, RANK, FRACTION = 2, 64, 8, 0.25
RUNS = (
    ("ddp", 2, False),
    ("fsdp", 2, False),
    ("fsdp", 2, True),
    ("fsdp", 4, False),
    ("ep", 2, False),
    ("ep", 2, True),
    ("ep", 4, False),
)
"""(layout, processes, whether with gradient checkpointing)"""


def measure() -> dict[str, Any]:
    """What each layout sends, a process in the mean, by kind; with the `Work` that the formulas take."""
    runs = []
    for layout, many, checkpointing in RUNS:
        print(f"{layout}, {many} processes{', checkpointing' if checkpointing else ''}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            sent = _run(layout, many, checkpointing, Path(folder))
        one = work(
            "nano", batch_size=BATCH, max_length=LENGTH, fraction=FRACTION, r=RANK, dtype="float32",
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        kinds = sorted({kind for each in sent for kind in each})
        mean = {kind: sum(each.get(kind, 0.0) for each in sent) / many for kind in kinds}
        runs.append({"layout": layout, "processes": many, "sent": mean, "work": dataclasses.asdict(one)})
    return {
        "version": 1,
        "kind": "traffic",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python scripts/scale.py --measure",
        "settings": {"model": "nano", "batch_size": BATCH, "length": LENGTH, "r": RANK, "fraction": FRACTION},
        "environment": environment(),
        "runs": runs,
    }


def _run(layout: str, many: int, checkpointing: bool, folder: Path) -> list[dict[str, float]]:
    """In forked processes, so that torch is imported once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(many):
        child = os.fork()
        if child == 0:
            os.environ |= {"WORLD_SIZE": str(many), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            code = 1
            try:
                _child(layout, checkpointing, folder / str(rank))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    if any([os.waitpid(child, 0)[1] for child in children]):
        sys.exit(f"a process of {layout} with {many} failed; its message is above")
    return [json.loads((folder / str(rank)).read_text(encoding="utf-8")) for rank in range(many)]


def _child(layout: str, checkpointing: bool, output: Path) -> None:
    warnings.simplefilter("ignore")
    if layout == "fsdp":
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    distributed.start("cpu")
    many = distributed.num_processes()
    base = load_base("nano", device="cpu", dtype="float32", expert_parallel=many if layout == "ep" else 1)
    layers = moe_layers(base)
    kept = tuple(range(round(FRACTION * layers[0].num_experts)))
    plan = ExpertPlan({layer.layer: kept for layer in layers}, layers[0].num_experts, "first", {})
    torch.manual_seed(0)
    model: Any = get_peft_model(base, HotLoraConfig(plan=plan, r=RANK)).train()
    if checkpointing:
        model.gradient_checkpointing_enable(checkpoint_kwargs())
        model.enable_input_require_grads()
    if layout == "ddp":
        model = DistributedDataParallel(model, broadcast_buffers=False)  # as `train` has it
    else:  # as transformers' trainer does it, where FSDP holds the frozen weights
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad))
    ids = torch.randint(10, 1000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(distributed.rank()))
    for _ in range(2):  # FSDP sets itself up in the first step, DDP before the second
        _step(model, ids)
    with Sent() as sent:
        _step(model, ids)
    output.write_text(json.dumps(sent.bytes), encoding="utf-8")
    distributed.wait_for_all()
    distributed.leave()


def _step(model: Any, ids: torch.Tensor) -> None:
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad()


class Sent(TorchDispatchMode):
    """Bytes of floats that this process sends in collectives, as rings and pairwise exchanges send them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith(("c10d::", "_c10d_functional::")):
            self._count(name.partition("::")[2], args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name == "_allgather_base_":  # output, input, group
            _, tensor, group = args[:3]
            self._add("gather", (ProcessGroup.unbox(group).size() - 1) * tensor.nbytes)
        elif name == "all_gather_into_tensor":  # input, group's size, group's name
            tensor, size = args[:2]
            self._add("gather", (size - 1) * tensor.nbytes)
        elif name == "allreduce_":  # tensors, group
            tensors, group = args[:2]
            size = ProcessGroup.unbox(group).size()
            self._add("reduce", sum(2 * (size - 1) / size * t.nbytes for t in tensors if t.is_floating_point()))
        elif name == "alltoall_base_":  # output, input, group, sizes to receive, sizes to send
            self._exchange(args[1], ProcessGroup.unbox(args[2]), args[4])
        elif name == "all_to_all_single":  # input, sizes to receive, sizes to send, group's name
            self._exchange(args[0], _resolve_process_group(args[3]), args[2])
        elif name not in ("wait_tensor", "_wrap_tensor_autograd", "barrier"):
            raise RuntimeError(f"a collective that is not counted: {name}")

    def _exchange(self, tensor: Any, group: Any, sizes: list[int]) -> None:
        if tensor.is_floating_point() and len(tensor):
            away = sum(sizes) - sizes[dist.get_rank(group)]
            self._add("exchange", tensor.nbytes * away / len(tensor))

    def _add(self, kind: str, size: float) -> None:
        self.bytes[kind] = self.bytes.get(kind, 0.0) + size
