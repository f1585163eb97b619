"""The factors' gradients: of each hot expert the sum over its rows of left[s] x[s]^T. Cold experts have no work."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch as launching
from .gemm import _dot, _precision
from .launch import drop
from .product import Order


@dataclass(frozen=True)
class Side:
    """One of the two: `[S, I]`, or `[T, I]` of which each row takes its token's, `gathered`. Contiguous."""

    values: Tensor
    gathered: bool = False


def gram(
    left: Side,
    right: Side,
    order: Order,
    ids_N: Tensor,
    dtype: torch.dtype,
    *,
    weights_S: Tensor | None = None,
    p: float = 0.0,
    seed: int = 0,
    parts: int = 1,
    interleaved: bool = False,
) -> Tensor:
    """`[N, O, I]`: the sum over hot expert n's rows of w * left[s] drop(right[s])^T, `left` `[., O]`, `right` `[., I]`.

    Args:
        weights_S: w, in the order of assignments.
        parts: P. With 2, `left` is gate and up beside each other, or in turn (`interleaved`), and `right` `[., 2I]`:
            the gate's outputs meet the first half, the up projection's the other, and the gate's come first in the
            result.
    """
    outputs, inputs = left.values.shape[1], right.values.shape[1] // parts
    out_NOI = torch.empty(len(ids_N), outputs, inputs, dtype=dtype, device=ids_N.device)
    blocks = launching.blocks_of("gram", left.values)
    # A thin side has a thin tile.
    m = min(blocks.m, launching.rank_block(outputs // parts))
    n = min(blocks.n, launching.rank_block(inputs))
    grid = (parts * triton.cdiv(outputs // parts, m) * triton.cdiv(inputs, n), len(ids_N))
    launching.launch(
        _gram_kernel, grid, left.values, blocks,
        out=out_NOI, left=left.values, right=right.values, ends=order.ends_E, order=order.order_S, ids=ids_N,
        row_weights=weights_S, outputs=outputs, inputs=inputs, **launching.seed_of(p, seed), K=order.top_k,
        GATHER_LEFT=left.gathered, GATHER_RIGHT=right.gathered, WEIGHTED=weights_S is not None, PARTS=parts,
        INTERLEAVED=interleaved, PRECISION=_precision(left.values), BLOCK_M=m, BLOCK_N=n, BLOCK_K=blocks.k,
    )  # fmt: skip
    return out_NOI


def plain_gram(
    left: Side,
    right: Side,
    order: Order,
    ids_N: Tensor,
    dtype: torch.dtype,
    *,
    weights_S: Tensor | None = None,
    p: float = 0.0,
    seed: int = 0,
    parts: int = 1,
    interleaved: bool = False,
) -> Tensor:
    """`gram` by torch, in float32."""
    order_S, token_S = order.order_S.long(), order.order_S.long() // order.top_k
    l_SO, r_SI = ((side.values[token_S] if side.gathered else side.values).float() for side in (left, right))
    r_SI = launching.plain_drop(r_SI, order.order_S, p, seed)
    if weights_S is not None:
        l_SO = l_SO * weights_S.float()[order_S][:, None]
    l_parts = [l_SO[:, part::parts] for part in range(parts)] if interleaved else list(l_SO.chunk(parts, 1))
    expert_S = launching.plain_experts(order.ends_E, len(order_S))
    found = []
    for expert in ids_N.tolist():
        mine = expert_S == expert
        pairs = zip(l_parts, r_SI.chunk(parts, 1), strict=True)
        found.append(torch.cat([left_part[mine].T @ right_part[mine] for left_part, right_part in pairs]))
    return torch.stack(found).to(dtype)


@triton.jit(do_not_specialize=["seed", "threshold"])
def _gram_kernel(
    out, left, right, ends, order, ids, row_weights, outputs, inputs, seed, threshold, keep_scale,
    DROP: tl.constexpr, K: tl.constexpr, GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr,
    WEIGHTED: tl.constexpr, PARTS: tl.constexpr, INTERLEAVED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    width = outputs // PARTS
    tiles_m, tiles_n = tl.cdiv(width, BLOCK_M), tl.cdiv(inputs, BLOCK_N)
    part = tl.program_id(0) // (tiles_m * tiles_n)
    tile = tl.program_id(0) % (tiles_m * tiles_n)
    group = tl.load(ids + tl.program_id(1))
    start = tl.load(ends + group - 1, mask=group > 0, other=0)
    stop = tl.load(ends + group)
    o = (tile // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    i = (tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = part * width + o
    if INTERLEAVED:
        column = PARTS * o + part
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in range(start, stop, BLOCK_K):
        s = (row + tl.arange(0, BLOCK_K)).to(tl.int64)
        in_rows = s < stop
        assignment = tl.load(order + s, mask=in_rows, other=0)
        at_left, at_right = s, s
        if GATHER_LEFT:
            at_left = (assignment // K).to(tl.int64)
        if GATHER_RIGHT:
            at_right = (assignment // K).to(tl.int64)
        l_tile = left + at_left[None, :] * outputs + column[:, None]
        l_part = tl.load(l_tile, mask=in_rows[None, :] & (o < width)[:, None], other=0.0)
        r_tile = right + at_right[:, None] * (PARTS * inputs) + part * inputs + i[None, :]
        r_part = tl.load(r_tile, mask=in_rows[:, None] & (i < inputs)[None, :], other=0.0)
        if DROP:
            r_part = drop(r_part, seed, assignment, i, threshold, keep_scale)
        if WEIGHTED:
            weight = tl.load(row_weights + assignment, mask=in_rows, other=0.0).to(tl.float32)
            if BLOCK_M < BLOCK_N:
                l_part = (l_part.to(tl.float32) * weight[None, :]).to(l_part.dtype)
            else:
                r_part = (r_part.to(tl.float32) * weight[:, None]).to(r_part.dtype)
        sums = _dot(l_part, r_part, sums, PRECISION)
    tile_at = out + tl.program_id(1).to(tl.int64) * outputs * inputs
    tile_at += (part * width + o)[:, None] * inputs + i[None, :]
    tl.store(tile_at, sums.to(out.dtype.element_ty), mask=(o < width)[:, None] & (i < inputs)[None, :])
