"""The sum over each token's K rows, read where they lie among the rows sorted by expert: in the router's order, so that
it is the same each time."""

import triton
import triton.language as tl
from torch import Tensor

from . import launch as launching


def combine(y_SD: Tensor, place_S: Tensor, top_k: int) -> Tensor:
    """`[T, D]`: the sum of y[place[t * K + k]] over k, made in float32."""
    num_tokens, width = len(place_S) // top_k, y_SD.shape[1]
    out_TD = y_SD.new_empty(num_tokens, width)
    blocks = launching.blocks_of("combine", y_SD)
    grid = (triton.cdiv(num_tokens, blocks.m) * triton.cdiv(width, blocks.n),)
    launching.launch(
        _combine_kernel, grid, y_SD, blocks,
        y=y_SD, place=place_S, out=out_TD, num_tokens=num_tokens, width=width, K=top_k,
        BLOCK_M=blocks.m, BLOCK_N=blocks.n,
    )  # fmt: skip
    return out_TD


def plain_combine(y_SD: Tensor, place_S: Tensor, top_k: int) -> Tensor:
    """`combine` by torch."""
    return y_SD[place_S.long()].view(-1, top_k, y_SD.shape[1]).float().sum(1).to(y_SD.dtype)


@triton.jit
def _combine_kernel(y, place, out, num_tokens, width, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    tiles = tl.cdiv(width, BLOCK_N)
    t = (tl.program_id(0) // tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (t < num_tokens)[:, None] & (column < width)[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(K):
        row = tl.load(place + t * K + k, mask=t < num_tokens, other=0).to(tl.int64)
        sums += tl.load(y + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + t.to(tl.int64)[:, None] * width + column[None, :], sums.to(out.dtype.element_ty), mask=inside)
