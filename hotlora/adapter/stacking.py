"""Experts that a checkpoint has one by one, put together without a second copy of all.

transformers stacks the experts' gates, then their ups, and joins the two: three times the memory of a projection at
once, and what an allocator keeps of that.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import ConversionOps

_CHAINS = ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])


def parts_of_experts(
    operations: Sequence[ConversionOps], tensors: Mapping[str, Any], patterns: Sequence[str]
) -> list[tuple[Tensor, ...]] | None:
    """By expert the matrices that `operations` would join along their rows; None: they do something else.

    tensors: by source pattern its tensors, one an expert. patterns: the order in which they are joined.
    """
    if [(type(one).__name__, getattr(one, "dim", None)) for one in operations] not in _CHAINS:
        return None
    lists = [tensors[pattern] for pattern in patterns if pattern in tensors]
    if not lists or any(not isinstance(its, list) or len(its) != len(lists[0]) for its in lists):
        return None
    for pattern, its in zip([p for p in patterns if p in tensors], lists, strict=True):
        if wrong := next((e for e, one in enumerate(its) if one.shape != its[0].shape), None):
            shapes = f"{tuple(its[wrong].shape)} of expert {wrong}, {tuple(its[0].shape)} of expert 0"
            raise ValueError(f"the experts' {pattern.removesuffix('$')} are not alike: {shapes}")
    return list(zip(*lists, strict=True))


def stacked(experts: Sequence[Sequence[Tensor]]) -> Tensor:
    """`[E, rows, columns]`, of each expert's parts."""
    first = experts[0]
    rows, columns = sum(len(part) for part in first), first[0].shape[1]
    found = first[0].new_empty(len(experts), rows, columns)
    for expert, parts in enumerate(experts):
        torch.cat(list(parts), out=found[expert])
    return found


class Unstacked(Sequence[Tensor]):
    """An expert's matrix at a time, in place of `stacked`."""

    def __init__(self, experts: Sequence[Sequence[Tensor]]) -> None:
        self.experts = experts

    def __len__(self) -> int:
        return len(self.experts)

    def __getitem__(self, expert: Any) -> Any:
        parts = self.experts[expert]
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))

    def stacked(self) -> Tensor:
        """All of them, `[E, rows, columns]`."""
        return stacked(self.experts)
