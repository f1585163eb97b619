"""The grouped product of `gemm` with weights that are codes: each tile is decoded on its way into a product.

Nothing of the weights is dense but a tile. The numbers are those of the dense product: a weight is its table's value
times its scale in float32, rounded to x's dtype once. HOTLORA_KERNELS=fused asks for it: it is not timed on a GPU yet.

Shape suffixes: S rows, E experts, I and O in and out features.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemm import INTERPRETED, _dot, _locate, _precision, _row_blocks, grouped_gemm

_SHIFTS = {torch.uint8: 23, torch.int16: 16, torch.int32: 0}
"""Of a scale's bits, to those of a float32."""


def coded_gemm(x_SI: Tensor, coded: Any, ends_E: Tensor, is_transposed: bool) -> Tensor:
    """y[s] = weight[s's expert] @ x[s], `[S, O]`; zero past the last end.

    Args:
        coded: `hf.coded.Coded`, of matrices with O rows and I columns.
        ends_E: int32: expert e has the rows from `ends_E[e - 1]` to `ends_E[e]`.
        is_transposed: the matrices have I rows and O columns.
    """
    outs, ins = (coded.columns, coded.rows) if is_transposed else (coded.rows, coded.columns)
    num_rows, num_experts = len(x_SI), len(ends_E)
    y_SO = x_SI.new_empty(num_rows, outs)
    if num_rows == 0:
        return y_SO
    m, n, k = (16, 32, 32) if INTERPRETED else (64, 64, 64)
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
    grid = (_row_blocks(num_rows, num_experts, blocks) * triton.cdiv(outs, blocks["BLOCK_N"]),)
    block_rows, block_columns = coded.block
    constants: dict[str, Any] = {
        "BITS": coded.bits, "HIGH_FIRST": coded.is_high_first, "BLOCK_ROWS": block_rows, "BLOCK_COLUMNS": block_columns,
        "SHIFT": _SHIFTS[coded.scales.dtype], "TRANSPOSED": is_transposed,
        "GROUPS": triton.next_power_of_2(num_experts + 1), "PRECISION": _precision(x_SI), **blocks,
    }  # fmt: skip
    arguments = (
        y_SO, x_SI, coded.packed, coded.scales, coded.table, ends_E, coded.place_E, num_rows, num_experts, outs, ins,
        coded.columns, triton.cdiv(coded.columns, block_columns), *y_SO.stride(), *x_SI.stride(),
        coded.packed.stride(0), coded.scales.stride(0),
    )  # fmt: skip
    if INTERPRETED:
        _coded_kernel[grid](*arguments, **constants)
    else:
        with torch.cuda.device(x_SI.device):
            _coded_kernel[grid](*arguments, **constants, num_warps=4, num_stages=2)
    if len(coded.kept):
        kept = coded.kept.transpose(1, 2) if is_transposed else coded.kept
        grouped_gemm(x_SI, kept, ends_E, coded.place_in_kept_E, add_to_SO=y_SO)
    return y_SO


@triton.jit
def _coded_kernel(
    y, x, packed, scales, table, ends, places,
    num_rows, num_groups, out_features, in_features, columns, scale_columns,
    y_s, y_o, x_s, x_i, packed_n, scales_n,
    BITS: tl.constexpr, HIGH_FIRST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    SHIFT: tl.constexpr, TRANSPOSED: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(out_features, BLOCK_N)
    group, first, stop = _locate(ends, tl.program_id(0) // tiles, num_rows, num_groups, GROUPS, BLOCK_M)
    if first >= stop:
        return
    place = tl.load(places + group, mask=group < num_groups, other=-1)
    s = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    o = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    packed += place.to(tl.int64) * packed_n
    scales += place.to(tl.int64) * scales_n
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for done in range(0, tl.where(place >= 0, in_features, 0), BLOCK_K):
        i = done + k
        x_part = tl.load(
            x + s[:, None] * x_s + i[None, :] * x_i, mask=(s < stop)[:, None] & (i < in_features)[None, :], other=0.0
        )
        inside = (i < in_features)[:, None] & (o < out_features)[None, :]
        if TRANSPOSED:
            w_part = _decoded(
                packed, scales, table, i[:, None] + 0 * o[None, :], o[None, :] + 0 * i[:, None], inside, columns,
                scale_columns, BITS, HIGH_FIRST, BLOCK_ROWS, BLOCK_COLUMNS, SHIFT,
            )  # fmt: skip
        else:
            w_part = _decoded(
                packed, scales, table, o[None, :] + 0 * i[:, None], i[:, None] + 0 * o[None, :], inside, columns,
                scale_columns, BITS, HIGH_FIRST, BLOCK_ROWS, BLOCK_COLUMNS, SHIFT,
            )  # fmt: skip
        sums = _dot(x_part, w_part.to(x.dtype.element_ty), sums, PRECISION)
    y_tile = y + s[:, None] * y_s + o[None, :] * y_o
    tl.store(y_tile, sums.to(y.dtype.element_ty), mask=(s < stop)[:, None] & (o < out_features)[None, :])


@triton.jit
def _decoded(
    packed, scales, table, row, column, inside, columns, scale_columns,
    BITS: tl.constexpr, HIGH_FIRST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """float32, of a tile; zero outside of the matrix."""
    at = row * columns + column
    if BITS == 4:
        byte = tl.load(packed + at // 2, mask=inside, other=0).to(tl.int32)
        is_high = (at % 2 == 0) == HIGH_FIRST
        code = tl.where(is_high, byte >> 4, byte & 15)
    else:
        code = tl.load(packed + at, mask=inside, other=0).to(tl.int32)
    if BLOCK_ROWS == 0:
        block = at // BLOCK_COLUMNS
    else:
        block = (row // BLOCK_ROWS) * scale_columns + column // BLOCK_COLUMNS
    held = tl.load(scales + block, mask=inside, other=0).to(tl.int32)
    held = held << SHIFT
    if SHIFT == 23:  # an exponent of 0 is 2^-127, whose bits are not
        held = tl.where(held == 0, 1 << 22, held)
    value = tl.load(table + code) * held.to(tl.float32, bitcast=True)
    return tl.where(inside, value, 0.0)
