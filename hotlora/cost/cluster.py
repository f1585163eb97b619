"""A training step on many GPUs, on paper: memory, traffic and time of each GPU, by formula from a model's config.

What one GPU needs for its own tokens is `estimate`'s. Here it is spread over GPUs in one of these layouts:

- ddp: every GPU holds the whole model; the adapter's gradients are summed.
- fsdp: the frozen weights are in N parts, and each layer is gathered for its forward and again for its backward. The
  adapter is whole on every GPU.
- ep: the GPUs of a node hold whole experts each, and tokens go to them; all other weights as in fsdp. The GPUs of
  different nodes that have the same experts hold parts of them, as in fsdp.
- ep-wide: the experts are dealt out over all nodes, as far as there are enough of them.
- sharded: as fsdp, and the adapter with its gradients and AdamW's state in N parts too (DeepSpeed's ZeRO-3).

Every GPU has a batch of its own, so that the tokens of a step grow with the GPUs. Bytes are what one GPU sends.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..base.errors import HotLoraError
from .estimate import split, step_of
from .memory import Step, Storage, expert_bytes
from .memory import memory as step_memory

LAYOUTS = ("ddp", "fsdp", "ep", "ep-wide", "sharded")
NODE = 8
"""GPUs of a node."""
_ADAM_BYTES = 28  # a parameter: reads weight, gradient and two moments, writes all but the gradient, float32
_DRAWS = 2000

H200_SHARES = {"frozen": 0.206, "torch": 0.104, "triton": 0.184}
"""Kernels of the routed experts -> share of an H200's peak that a training step got: FLOPs by formula over its seconds.
`benchmarks/gpu/h200.json` has the steps, of OLMoE-1B-7B with 16,384 tokens and without checkpointing. frozen: experts
without adapters, on transformers' grouped_mm; torch and triton: `HOTLORA_KERNELS`, where torch is the card's default.
"""


@dataclass(frozen=True)
class Machine:
    """GPUs as their maker specifies them, in nodes; and the share of that which is counted on."""

    name: str
    memory: float
    """Bytes of a GPU."""
    flops: float
    """Dense bfloat16 matrix products, FLOP/s at the peak."""
    bandwidth: float
    """Of a GPU's own memory, bytes/s."""
    link: float
    """From a GPU to those of its node, bytes/s each way."""
    network: float
    """From a GPU to other nodes, bytes/s each way."""
    compute_shares: Mapping[str, float]
    """Kernels of the routed experts -> share of the peak that a training step gets."""
    is_measured: bool = False
    """Whether `compute_shares` were measured on this card; else they are assumed."""
    link_share: float = 0.8
    """Of links and network; assumed."""
    memory_share: float = 0.9
    """Of a GPU's memory; fragmentation and the CUDA context have the rest; assumed."""

    def holds(self, size: float) -> bool:
        """Whether a GPU has room for so many bytes of tensors."""
        return size <= self.memory * self.memory_share


H100 = Machine("H100 SXM", 80e9, 989.4e12, 3.35e12, 450e9, 50e9, H200_SHARES)  # the same chip with slower memory
H200 = Machine("H200 SXM", 141e9, 989.4e12, 4.8e12, 450e9, 50e9, H200_SHARES, is_measured=True)


@dataclass(frozen=True)
class Work:
    """What a model needs, and what one GPU's own batch does. Sizes in bytes, work in FLOP a step."""

    tokens: int
    num_experts: int
    top_k: int
    moe_layers: int
    row: int
    """One token's hidden state."""
    experts: int
    """Weights of all routed experts."""
    dense: int
    """All other weights."""
    largest_layer: int
    """Weights of the largest decoder layer."""
    largest_dense: int
    """The same without routed experts."""
    head: int
    """Weights of the LM head, which stay gathered from forward to backward."""
    trainable: int
    """Parameters that train."""
    activations: int
    expert_row: int
    """What the experts of a layer keep, a token."""
    live_layers: int
    """MoE layers whose experts' activations are there at the peak: one under gradient checkpointing, else all."""
    workspace: int
    """Where all gradients are there throughout."""
    passes: int
    """Times a weight is read in a step: forward, backward, and again under gradient checkpointing."""
    expert_flops: float
    other_flops: float
    optimizer: int | None = None
    """Bytes of its state; None: AdamW in float32."""
    frozen: int = 0
    """Numbers of the adapter that do not train, in each process."""
    late: int = 0
    """Of gradients, what is not there yet at one GPU's peak."""
    staging: int = 0
    """Offloaded experts on their way."""
    host: int = 0
    """In RAM beside the GPU."""
    disk: int = 0

    @property
    def weights(self) -> int:
        return self.experts + self.dense

    @property
    def flops(self) -> float:
        return self.expert_flops + self.other_flops


def work(config: str | Path, *, gradient_checkpointing: bool = True, **options: Any) -> Work:
    """What `estimate` says of one GPU, taken apart for `memory`, `traffic` and `seconds`.

    Args:
        options: further ones of `estimate`.

    Raises:
        HotLoraError: as `estimate`.
    """
    storage, options = split({"gradient_checkpointing": gradient_checkpointing, **options})
    return work_of(step_of(config, **options), storage)


def work_of(step: Step, storage: Storage) -> Work:
    """The same of a step that is known."""
    found, recomputes = step_memory(step, storage), storage.gradient_checkpointing
    workspace = step_memory(step, replace(storage, gradient_accumulation_steps=2))["workspace"]
    here, _ = expert_bytes(step, storage)
    # Quantized experts are smaller than their layer's weights say.
    per_expert_weight = here / step.expert_weights
    per_token = step.forward["experts"]
    experts = 2 * per_token + 3 * step.expert_adapter + recomputes * (per_token + step.expert_adapter)
    flops = step.flops + recomputes * step.recomputed
    return Work(
        tokens=step.tokens, num_experts=step.num_experts, top_k=step.top_k, moe_layers=len(step.experts),
        row=step.expert_widths[0] * step.itemsize, experts=round(here), dense=found["weights"] - round(here),
        largest_layer=round(max(per_expert_weight * e + step.itemsize * d for e, d in step.blocks)),
        largest_dense=max(step.itemsize * d for _, d in step.blocks), head=step.head * step.itemsize,
        trainable=step.trainable, frozen=step.frozen, activations=found["activations"],
        expert_row=round(step.expert_row), live_layers=1 if recomputes else len(step.experts),
        workspace=workspace, late=workspace - found["workspace"], passes=3 if recomputes else 2,
        expert_flops=experts * step.tokens, other_flops=flops - experts * step.tokens, optimizer=found["optimizer"],
        staging=found["staging"],
        host=found["host"], disk=found["disk"],
    )  # fmt: skip


def expert_groups(num_experts: int, gpus: int, layout: str) -> tuple[int, int]:
    """(GPUs that share out the experts, GPUs that hold the same ones): as many of the first as there can be."""
    parts = math.gcd(num_experts, gpus) if layout.startswith("ep") else 1
    if layout == "ep":
        parts = math.gcd(parts, NODE)
    return parts, gpus // parts


@cache
def imbalance(num_experts: int, parts: int, cv: float = 1.0) -> float:
    """Rows of the busiest part over the mean, expected, where the experts' loads are lognormal with this CV.

    All wait for the busiest at each layer. Drawn with a fixed seed.
    """
    if num_experts % parts:
        raise HotLoraError(f"parts is {parts}: it must divide {num_experts}, the number of experts.")
    sigma = math.sqrt(math.log1p(cv * cv))
    drawn = torch.randn(_DRAWS, num_experts, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loads = (sigma * drawn).exp().view(_DRAWS, parts, -1).sum(2)
    return float((loads.amax(1) / loads.mean(1)).mean())


def memory(work: Work, gpus: int, layout: str, cv: float = 1.0) -> dict[str, float]:
    """Bytes on the fullest GPU, by kind, and in all. `gathered`: of other GPUs' weights, the layer that computes and
    the one after it. Beside the total `host` and `disk`, as `memory.memory` has them."""
    _check(gpus, layout)
    weights, gathered, extra = float(work.weights), 0.0, 0.0
    state = work.trainable * (1 / gpus if layout == "sharded" else 1.0)
    if gpus > 1 and layout in ("fsdp", "sharded"):
        weights, gathered = work.weights / gpus, 2.0 * work.largest_layer + work.head
    elif gpus > 1 and layout.startswith("ep"):
        parts, same = expert_groups(work.num_experts, gpus, layout)
        busiest = imbalance(work.num_experts, parts, cv)
        weights, gathered = work.weights / gpus, 2.0 * work.largest_dense + work.head
        if same > 1:
            gathered += 2 * (work.experts / work.moe_layers) / parts
        if parts > 1:
            # Rows that come from elsewhere are kept as they arrive and as they leave; the busiest has most of them.
            received = busiest * (work.expert_row + 2 * work.top_k * work.row) - work.expert_row
            extra = work.tokens * work.live_layers * received
    kinds = {
        "weights": weights,
        "gathered": gathered,
        "staging": float(work.staging),
        "adapter": 4 * (state + work.frozen),
        # Torch's DDP holds what it sums in buckets of its own.
        "gradients": 4 * state * (2 if gpus > 1 and layout == "ddp" else 1),
        "optimizer": 8 * state if work.optimizer is None else work.optimizer * state / work.trainable,
        "activations": work.activations + extra,
        "workspace": float(work.workspace - (work.late if gpus == 1 else 0)),
    }
    return kinds | {"total": sum(kinds.values()), "host": float(work.host), "disk": float(work.disk)}


def traffic(work: Work, gpus: int, layout: str) -> dict[str, float]:
    """Bytes that one GPU sends in a step: `gather` of weights, `exchange` of tokens, `reduce` of gradients."""
    _check(gpus, layout)
    share = (gpus - 1) / gpus
    found = {"gather": 0.0, "exchange": 0.0, "reduce": 2 * share * 4 * work.trainable}
    if layout in ("fsdp", "sharded"):
        found["gather"] = share * _gathered_twice(work.weights, work)
    if layout == "sharded":
        # Adapters are gathered in float32 as weights are; one reduce-scatter is half of an all-reduce.
        found["gather"] += share * 2 * 4 * work.trainable
        found["reduce"] /= 2
    if layout.startswith("ep"):
        parts, _ = expert_groups(work.num_experts, gpus, layout)
        found["gather"] = share * _gathered_twice(work.dense, work) + _experts_gathered(work, gpus, layout)
        found["exchange"] = _exchanged(work) * (parts - 1) / parts
    return found


def seconds(
    work: Work, machine: Machine, gpus: int, layout: str, cv: float = 1.0, kernels: str = "torch"
) -> dict[str, float]:
    """Of a step: `compute`, `gather`, `exchange`, `reduce`, `optimizer`, and the whole `step`.

    kernels: of the machine's `compute_shares`, those that the routed experts run on.

    Weights are gathered and gradients summed while layers compute; tokens and the optimizer are waited for. Latency,
    kernel launches and the data are left out.
    """
    _check(gpus, layout)
    if kernels not in machine.compute_shares:
        raise HotLoraError(f"kernels {kernels!r} do not exist: choose one of {', '.join(machine.compute_shares)}.")
    parts, _ = expert_groups(work.num_experts, gpus, layout)
    busiest = imbalance(work.num_experts, parts, cv)
    sent = traffic(work, gpus, layout)
    held = work.dense + work.experts / parts
    matrix = (work.other_flops + busiest * work.expert_flops) / (machine.flops * machine.compute_shares[kernels])
    compute = max(matrix, work.passes * held / machine.bandwidth)
    # GPUs with the same experts are in different nodes, and each has a network of its own.
    of_experts = _experts_gathered(work, gpus, layout) if parts > 1 else 0.0
    way = machine.network if gpus > NODE else machine.link
    state = work.trainable / (gpus if layout == "sharded" else 1)
    times = {
        "compute": compute,
        "gather": _collective(sent["gather"] - of_experts, machine, gpus) + of_experts / (way * machine.link_share),
        "exchange": busiest * _all_to_all(_exchanged(work), machine, parts) if parts > 1 else 0.0,
        "reduce": _collective(sent["reduce"], machine, gpus),
        "optimizer": state * _ADAM_BYTES / machine.bandwidth,
    }
    step = max(compute, times["gather"] + times["reduce"]) + times["exchange"] + times["optimizer"]
    return times | {"step": step}


def smallest(work: Work, machine: Machine, layout: str, numbers: tuple[int, ...]) -> int | None:
    """The fewest GPUs of `numbers` on which it fits; None: on none of them."""
    return next((n for n in numbers if machine.holds(memory(work, n, layout)["total"])), None)


def _gathered_twice(size: float, work: Work) -> float:
    """All weights for forward and for backward; the head once."""
    return 2.0 * size - work.head


def _experts_gathered(work: Work, gpus: int, layout: str) -> float:
    """Bytes of experts that a GPU sends to those that hold the same ones."""
    parts, same = expert_groups(work.num_experts, gpus, layout)
    return 2.0 * work.experts / parts * (same - 1) / same


def _exchanged(work: Work) -> float:
    """Bytes of rows that a GPU's tokens make: to the experts and back, in forward, in backward, and when a layer is
    computed again."""
    return 2.0 * work.passes * work.moe_layers * work.tokens * work.top_k * work.row


def _collective(size: float, machine: Machine, gpus: int) -> float:
    """Seconds of gathers and reductions in which each GPU sends `size`: within nodes over links, between nodes over
    all of a node's network at once, and both at a time."""
    if gpus == 1:
        return 0.0
    inside = size / machine.link
    nodes = math.ceil(gpus / NODE)
    whole = size * gpus / (gpus - 1)
    between = whole * (nodes - 1) / nodes / (machine.network * min(gpus, NODE)) if nodes > 1 else 0.0
    return max(inside, between) / machine.link_share


def _all_to_all(size: float, machine: Machine, gpus: int) -> float:
    """Seconds in which each GPU sends `size` in equal parts to all, itself included: to other nodes over its own
    network."""
    near = min(gpus, NODE)
    inside, between = size * (near - 1) / gpus / machine.link, size * (gpus - near) / gpus / machine.network
    return max(inside, between) / machine.link_share


def _check(gpus: int, layout: str) -> None:
    if gpus < 1:
        raise HotLoraError(f"gpus is {gpus}: it must be 1 or more.")
    if layout not in LAYOUTS:
        raise HotLoraError(f"layout {layout!r} does not exist: choose one of {', '.join(LAYOUTS)}.")
