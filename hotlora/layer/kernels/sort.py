"""The order of rows by expert, made by counting, in one launch and without a number that the host has to know."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch as launching


def counting_sort(index_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(order `[S]`, place `[S]`, ends `[E]`), int32: row s is assignment `order[s]` of T*K, assignment a is row
    `place[a]`, and expert e has the rows from `ends[e - 1]` to `ends[e]`. Stable. Indices of no expert come last."""
    index_S = index_TK.reshape(-1)
    order_S, place_S = (index_S.new_empty(len(index_S), dtype=torch.int32) for _ in range(2))
    ends_E = index_S.new_empty(num_experts, dtype=torch.int32)
    blocks = launching.blocks_of("sort", index_S)
    launching.launch(
        _sort_kernel, (num_experts + 1,), index_S, blocks,
        index=index_S, order=order_S, place=place_S, ends=ends_E, num_rows=len(index_S), num_groups=num_experts,
        BLOCK=blocks.n,
    )  # fmt: skip
    return order_S, place_S, ends_E


def plain_sort(index_TK: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    """`counting_sort` by torch."""
    expert_S, order_S = torch.sort(index_TK.reshape(-1).clamp(max=num_experts), stable=True)
    ids_E = torch.arange(num_experts, device=expert_S.device)
    ends_E = torch.searchsorted(expert_S, ids_E, right=True)
    found: list[Any] = [order_S, torch.sort(order_S).indices, ends_E]
    return tuple(t.to(torch.int32) for t in found)


# A program has one expert: it counts the rows of those before it, and then places its own.
@triton.jit
def _sort_kernel(index, order, place, ends, num_rows, num_groups, BLOCK: tl.constexpr):
    group = tl.program_id(0)
    here = tl.arange(0, BLOCK)
    before = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, num_rows, BLOCK):
        inside = start + here < num_rows
        experts = tl.load(index + start + here, mask=inside, other=0).to(tl.int32)
        before += (inside & (experts < group)).to(tl.int32)
    row = tl.sum(before, 0)
    for start in range(0, num_rows, BLOCK):
        inside = start + here < num_rows
        experts = tl.load(index + start + here, mask=inside, other=-1).to(tl.int32)
        mine = inside & (tl.minimum(experts, num_groups) == group)
        at = row + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(order + at, start + here, mask=mine)
        tl.store(place + start + here, at, mask=mine)
        row += tl.sum(mine.to(tl.int32), 0)
    if group < num_groups:
        tl.store(ends + group, row)
