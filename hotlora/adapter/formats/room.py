"""The room that a server keeps for adapters."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ...base.files import read_json
from ...hf.experts_view import ExpertsView
from ...hf.models import model_from_config, own_dtype
from ...hf.moe_layers import attention_modules, moe_layers, unwrap
from ..load import CONFIG_FILE
from .export import adapter_in
from .vllm import LARGEST_RANK, room_for

SERVERS = {"vllm": "--max-loras", "sglang": "--max-loras-per-batch", "sglang-shared": "--max-loras-per-batch"}
"""Format -> the server's option for how many adapters may run at once: so many places it keeps."""


@dataclass(frozen=True)
class Room:
    """What an exported adapter takes on a server."""

    option: str
    """of `SERVERS`"""
    r: int
    """The largest rank of the adapters that a place is for."""
    place_bytes: int
    """Of each place."""
    dtype: str


def room_of(base: nn.Module, format: str, output: Path, dtype: torch.dtype) -> Room | None:
    """Of what was exported to `output`; None for a format of no server. dtype: that the server runs the base in."""
    if format not in SERVERS:
        return None
    r = read_json(adapter_in(output) / CONFIG_FILE)["r"]
    r = room_for(r) if format == "vllm" else r
    return Room(SERVERS[format], r, place_bytes(base, format, r, dtype.itemsize), str(dtype).removeprefix("torch."))


def places(config: str | Path, r: int, *, share_a: bool = False) -> dict[str, Room]:
    """Format -> what each adapter of rank r takes on its server, by a model's config.json alone; vLLM is left out where
    it has no room of such a rank. FileError, ModelError: as `models.model_from_config`."""
    base = model_from_config(config)
    dtype, found = own_dtype(base.config), {}
    for format in (*(["vllm"] if r <= LARGEST_RANK else []), "sglang-shared" if share_a else "sglang"):
        rank = room_for(r) if format == "vllm" else r
        size = place_bytes(base, format, rank, dtype.itemsize)
        found[format] = Room(SERVERS[format], rank, size, str(dtype).removeprefix("torch."))
    return found


def place_bytes(base: nn.Module, format: str, r: int, itemsize: int = 2) -> int:
    """Of one place, for adapters of rank r at most on experts, attention and shared experts.

    Servers keep every place for all experts of a layer, hot or cold, whatever an adapter has. That is
    (P + 1) * E * R * (D + F) numbers a layer, P = 2 where experts have a gate and 1 where not; with factors that
    experts share (`sglang-shared`) (P + 1) * R * (D + E * F). (vLLM 0.32: `FusedMoEWithLoRA.create_lora_weights`;
    SGLang 0.5.23: `LoRAMemoryPool.get_lora_A_shape`.)

    Args:
        base: on any device, meta too.
        itemsize: bytes of a number.
    """
    numbers = 0
    linears = set(attention_modules(base))
    for layer in moe_layers(base):
        view = ExpertsView(unwrap(base.get_submodule(layer.experts)))
        (D, F), pairs = view.widths, view.num_parts + 1
        outer = 1 if format == "sglang-shared" else layer.num_experts
        numbers += pairs * (outer * D + layer.num_experts * F)
        linears.update(layer.shared)
    for path in linears:
        module = unwrap(base.get_submodule(path))
        numbers += module.in_features + module.out_features if isinstance(module, nn.Linear) else 0
    return numbers * r * itemsize
