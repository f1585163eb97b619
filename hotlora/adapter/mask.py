"""LoRI's mask: which entries of B train (arXiv 2504.07448, section 3.2).

Drawn from a trained adapter whose A is frozen (LoRI-D), for a second training from the start (LoRI-S) that holds the
kept entries alone.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from ..base.errors import FileError, HotLoraError
from ..base.files import file_in
from ..base.tensor_files import digest_of, load_tensors, save_tensors
from .factors import SeededFactor, Slot, pack, unpack
from .mergeable import factor_slots

GRANULARITIES = ("model", "module", "projection", "layer", "matrix")
DEFAULT_KEEP = 0.1
_FORMAT, _VERSION = "hotlora.mask", "1"


@dataclass(frozen=True)
class SparseMask:
    """The kept entries of every B of an adapter."""

    packed: dict[str, Tensor]
    """name of B, as it is saved -> one bit an entry, as `factors.pack` has it"""
    shapes: dict[str, tuple[int, ...]]
    keep: float
    """Share of the entries that was asked for."""
    granularity: str
    a_seed: int
    """Of the frozen A that the mask's adapter was trained with."""
    source: dict[str, Any] = field(default_factory=dict)
    """What it was drawn from, in plain JSON values."""

    def entries(self, name: str, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """bool of the factor's shape. HotLoraError where the mask's is another."""
        if self.shapes[name] != tuple(shape):
            raise HotLoraError(
                f"the mask's {name} is {list(self.shapes[name])}, and the adapter's is {list(shape)}: draw the mask "
                "from an adapter with the same plan and rank."
            )
        return unpack(self.packed[name], self.shapes[name])

    def num_kept(self) -> dict[str, int]:
        """Name of each B -> how many of its entries train."""
        return {name: int(self.entries(name, shape).sum()) for name, shape in self.shapes.items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file; any other path is a folder that gets `mask.safetensors`."""
        save_tensors(file_in(path, "mask.safetensors"), self.packed, self._meta(), format=_FORMAT, version=_VERSION)

    @property
    def hash(self) -> str:
        """Hex SHA-256 of the content. Files of one content differ: safetensors orders metadata by chance."""
        return digest_of(self.packed, json.dumps(self._meta()))

    def _meta(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("shapes", "keep", "granularity", "a_seed", "source")}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SparseMask":
        """Reads what `save` wrote. FileError, naming the file, where it is missing, cut short, altered or foreign."""
        file = file_in(path, "mask.safetensors")
        fix = "make it again with `hotlora train --method lori-s`"
        packed, meta = load_tensors(file, format=_FORMAT, version=_VERSION, what="mask", fix=fix)
        try:
            shapes = {name: tuple(shape) for name, shape in meta["shapes"].items()}
            packed = {name: packed[name] for name in shapes}
            mask = cls(packed, shapes, meta["keep"], meta["granularity"], meta["a_seed"], meta["source"])
            mask.num_kept()
        except (AttributeError, KeyError, TypeError, RuntimeError) as error:
            raise FileError(f"{file} is not a whole mask ({error}): {fix}") from error
        return mask


def check_share(keep: float, granularity: str) -> None:
    """HotLoraError: what `draw_mask` refuses without a model."""
    if not 0 < keep <= 1:
        raise HotLoraError(f"keep is {keep}: it must be above 0 and at most 1, such as 0.1.")
    if granularity not in GRANULARITIES:
        raise HotLoraError(f"granularity {granularity!r} does not exist: choose one of {', '.join(GRANULARITIES)}.")


def draw_mask(
    model: PeftModel,
    adapter_name: str = "default",
    *,
    keep: float = DEFAULT_KEEP,
    granularity: str = "model",
    source: dict[str, Any] | None = None,
) -> SparseMask:
    """Keeps the entries of B that training has moved furthest from zero (LoRI s3.2).

    Args:
        model: a `PeftModel` whose adapter was trained with `train_a=False`.
        keep: share of the entries that stay, in (0, 1].
        granularity: within what the largest are chosen: the whole "model" (LoRI's default), all modules of a kind
            ("module": attention, routers, experts, ...), a "projection" over all layers, a "layer", or each "matrix".

    An entry stays if it is at least as large as the n-th largest, and not zero. A tensor of which nothing would stay
    keeps its first entry, since an empty one cannot be saved.

    Raises:
        HotLoraError: a keep or granularity out of range, an adapter without a frozen A, or one that was not trained.
    """
    check_share(keep, granularity)
    slots = list(factor_slots(model.get_base_model(), adapter_name))
    seeds = {slot.held[slot.key].seed for slot in slots if isinstance(slot.held[slot.key], SeededFactor)}
    if len(seeds) != 1:
        raise HotLoraError(
            f"adapter {adapter_name!r} is no LoRI-D: it must be trained with train_a=False (--method lori-d)."
        )
    masks = {slot.name: torch.zeros(slot.values.shape, dtype=torch.bool) for slot in slots if not slot.is_A}
    groups: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for slot in slots:
        if not slot.is_A:
            sizes = slot.values.detach().abs().cpu()
            for name, part, mask in _matrices(slot, sizes, masks[slot.name]):
                groups.setdefault(_group(granularity, slot.name, name), []).append((part, mask))
    if not any(part.any() for pairs in groups.values() for part, _ in pairs):
        raise HotLoraError(f"adapter {adapter_name!r} has not been trained: every B is zero.")
    for pairs in groups.values():
        number = max(1, round(keep * sum(part.numel() for part, _ in pairs)))
        lowest = torch.cat([part.flatten() for part, _ in pairs]).topk(number).values[-1]
        for part, mask in pairs:
            mask.copy_((part >= lowest) & (part > 0))
    for mask in masks.values():
        if not mask.any():
            mask.view(-1)[0] = True
    return SparseMask(
        packed={name: pack(mask) for name, mask in masks.items()},
        shapes={name: tuple(mask.shape) for name, mask in masks.items()},
        keep=keep,
        granularity=granularity,
        a_seed=seeds.pop(),
        source=dict(source or {}),
    )


def _matrices(slot: Slot, sizes: Tensor, mask: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, part of `sizes`, part of `mask`) of every matrix in one B: those of experts hold many."""
    if sizes.ndim == 2:
        yield "", sizes, mask
        return
    for n in range(len(sizes)):
        parts = zip(sizes[n].chunk(slot.parts), mask[n].chunk(slot.parts), strict=True)
        for i, (part, part_mask) in enumerate(parts):
            yield f"{i}.{n}", part, part_mask


def _group(granularity: str, name: str, matrix: str) -> str:
    """Matrices under one key compete for what is kept."""
    if granularity == "model":
        return ""
    if granularity == "matrix":
        return f"{name} {matrix}"
    layer = re.search(r"\.(\d+)\.", name)
    if granularity == "layer":
        return layer[1] if layer else name
    over_layers = re.sub(r"\.\d+\.", ".", name, count=1)
    if granularity == "projection":
        return f"{over_layers} {matrix.partition('.')[0]}"
    module = over_layers.partition(".lora_")[0]
    return module if "lora_B_" in name else module.rpartition(".")[0]  # q, k, v and o are attention's
