"""Grouped products that never ask the device how many rows a group has (SM80 and up).

Rows are sorted by group; `ends_G` stays on the device, and each program finds its group there. A grid has
cdiv(S, block) + G blocks of rows, as many as any division of S rows among G groups can need; those left over return at
once. Blocks never cross groups. Sums are made in float32. Offsets of rows and of groups are int64.

Shape suffixes: S rows, G groups, N groups with a weight of their own (a slot), I and O in and out features, R rank.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs the kernels on the CPU, in numpy: for tests."""


@dataclass(frozen=True)
class LowRank:
    """Updates of the weights of the groups that have a slot: y[s] += scaling * B[n] @ A[n] @ x[s].

    Either factor may have two parts. With A `[N, 2R, I]` and B `[N, O, R]` the first half of the outputs is made by
    A's first R rows, the second half by the others: gate and up. With A `[N, R, I]` and B `[N, O, 2R]` the first half
    of the inputs meets B's first R columns: the same pair's gradient with respect to x, their roles swapped.
    """

    A: Tensor
    B: Tensor
    slot_G: Tensor
    """int32: n, or -1 for a group without an update."""
    scaling: float


def grouped_gemm(
    x_SI: Tensor,
    weight_NOI: Tensor,
    ends_G: Tensor,
    slot_G: Tensor | None = None,
    *,
    row_S: Tensor | None = None,
    add_to_SO: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """y[s] = scaling * weight[slot of s's group] @ x[s], `[S, O]`; zero past the last end and where there is no slot.

    Args:
        ends_G: int32: group g is the rows from `ends_G[g - 1]` to `ends_G[g]`.
        slot_G: int32, each group's weight, or -1; None: group g has weight g.
        row_S: int64, where row s of x is in `x_SI`; None: at s.
        add_to_SO: y is added to it in place, and it is returned. Rows without a slot are not touched.
    """
    num_rows, (_, out_features, in_features) = (x_SI if row_S is None else row_S).shape[0], weight_NOI.shape
    y_SO = x_SI.new_empty(num_rows, out_features) if add_to_SO is None else add_to_SO
    if num_rows == 0:
        return y_SO
    num_groups = len(ends_G)
    _launch(
        _linear_kernel,
        lambda blocks: (_row_blocks(num_rows, num_groups, blocks) * triton.cdiv(out_features, blocks["BLOCK_N"]),),
        x_SI,
        *(y_SO, x_SI, weight_NOI, ends_G, slot_G, row_S, scaling),
        *(num_rows, num_groups, out_features, in_features),
        *(*y_SO.stride(), *x_SI.stride(), *weight_NOI.stride()),
        rows_per_group=_bucket(num_rows, num_groups),
        HAS_SLOTS=slot_G is not None,
        HAS_ROWS=row_S is not None,
        ADD=add_to_SO is not None,
        GROUPS=triton.next_power_of_2(num_groups + 1),
        PRECISION=_precision(x_SI),
    )
    return y_SO


def grouped_gemm_low_rank(
    x_SI: Tensor, weight_GOI: Tensor, ends_G: Tensor, low_rank: LowRank, *, with_z: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`grouped_gemm` and the update in one pass over x: x A^T beside x W^T, then B.

    Returns y `[S, O]` and, if asked for, z = A x `[S, parts * R]`, not scaled; zero in rows without an update.
    """
    (num_rows, in_features), (num_groups, out_features, _) = x_SI.shape, weight_GOI.shape
    A, B = low_rank.A, low_rank.B
    r = min(A.shape[1], B.shape[2])
    out_parts, in_parts = A.shape[1] // r, B.shape[2] // r
    y_SO = x_SI.new_empty(num_rows, out_features)
    z_SR = x_SI.new_empty(num_rows, out_parts * in_parts * r) if with_z else None
    if num_rows == 0:
        return y_SO, z_SR
    _launch(
        _low_rank_kernel,
        lambda blocks: (
            _row_blocks(num_rows, num_groups, blocks)
            * out_parts
            * triton.cdiv(out_features // out_parts, blocks["BLOCK_N"]),
        ),
        x_SI,
        *(y_SO, z_SR, x_SI, weight_GOI, A, B, ends_G, low_rank.slot_G, low_rank.scaling),
        *(num_rows, num_groups, out_features, in_features),
        *(*y_SO.stride(), out_parts * in_parts * r, *x_SI.stride(), *weight_GOI.stride(), *A.stride(), *B.stride()),
        rows_per_group=_bucket(num_rows, num_groups),
        R=r,
        R_BLOCK=max(16, triton.next_power_of_2(r)),
        IN_PARTS=in_parts,
        OUT_PARTS=out_parts,
        WITH_Z=with_z,
        GROUPS=triton.next_power_of_2(num_groups + 1),
        PRECISION=_precision(x_SI),
    )
    return y_SO, z_SR


def grouped_outer(
    y_SO: Tensor, x_SI: Tensor, ends_G: Tensor, group_N: Tensor | None = None, *, row_S: Tensor | None = None
) -> Tensor:
    """`[N, O, I]`: the sum of y[s] x[s]^T over the rows of each group of `group_N` (None: of all groups).

    Args:
        group_N: int64.
        row_S: int64, where row s of x is in `x_SI`; None: at s.
    """
    out_features, in_features = y_SO.shape[1], x_SI.shape[1]
    num_groups = len(ends_G if group_N is None else group_N)
    sum_NOI = x_SI.new_empty(num_groups, out_features, in_features)
    _launch(
        _outer_kernel,
        lambda blocks: (
            triton.cdiv(out_features, blocks["BLOCK_M"]) * triton.cdiv(in_features, blocks["BLOCK_N"]),
            num_groups,
        ),
        x_SI,
        *(sum_NOI, y_SO, x_SI, ends_G, group_N, row_S, out_features, in_features),
        *(*sum_NOI.stride(), *y_SO.stride(), *x_SI.stride()),
        rows_per_group=_bucket(len(y_SO), len(ends_G)),
        HAS_IDS=group_N is not None,
        HAS_ROWS=row_S is not None,
        PRECISION=_precision(x_SI),
    )
    return sum_NOI


def _launch(kernel: Any, grid: Any, x: Tensor, *args: Any, rows_per_group: int, **constants: Any) -> None:
    """On x's device. Under the interpreter blocks are small, so that small tensors have many."""
    if INTERPRETED:
        blocks = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32}
        kernel[grid(blocks)](*args, rows_per_group, **blocks, **constants)
        return
    with torch.cuda.device(x.device):
        kernel[grid](*args, rows_per_group, **constants)


def _row_blocks(num_rows: int, num_groups: int, blocks: dict[str, int]) -> int:
    """Enough for any division of the rows; those past the last group are one more group."""
    return triton.cdiv(num_rows, blocks["BLOCK_M"]) + num_groups


def _bucket(num_rows: int, num_groups: int) -> int:
    """Rows a group as a power of two: what the best blocks depend on, and changes seldom."""
    return triton.next_power_of_2(max(1, num_rows // max(1, num_groups)))


def _precision(x: Tensor) -> str:
    """float32 products are exact unless torch was told otherwise, as in torch's own."""
    if INTERPRETED:
        return "interpreted"
    return "ieee" if x.dtype == torch.float32 and _is_exact() else "tf32"


def _is_exact() -> bool:
    """Whether float32 products are. After torch was told in its newer way, as transformers' tf32 does, it refuses to
    answer in the older one."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:
        return torch.backends.cuda.matmul.fp32_precision != "tf32"


def _tuned(kernel: Any) -> Any:
    """A few block sizes, timed at a shape's first use. `y` is put back after each, as it may be added to."""
    if INTERPRETED:
        return kernel
    sizes = [
        (128, 128, 64, 8, 3), (128, 128, 32, 4, 4), (64, 128, 64, 4, 3), (128, 64, 64, 4, 3), (64, 64, 32, 4, 4),
        (32, 128, 64, 4, 3), (32, 32, 32, 4, 3),
    ]  # fmt: skip
    configs = [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
        for m, n, k, warps, stages in sizes
    ]
    key = ["out_features", "in_features", "rows_per_group"]
    return triton.autotune(configs=configs, key=key, restore_value=["y"])(kernel)


@triton.jit
def _locate(ends, block, num_rows, num_groups, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The group of a block of rows and the rows from its first to the group's end. The rows past the last group are
    group `num_groups`; a block too many has no rows."""
    ids = tl.arange(0, GROUPS)
    end = tl.load(ends + ids, mask=ids < num_groups, other=num_rows)
    start = tl.load(ends + ids - 1, mask=(ids > 0) & (ids <= num_groups), other=0)
    start = tl.where(ids > num_groups, num_rows, start)
    blocks = (end - start + BLOCK_M - 1) // BLOCK_M
    last = tl.cumsum(blocks, 0)
    group = tl.sum((last <= block).to(tl.int32), 0)
    first = tl.sum(tl.where(ids == group, start + (block - last + blocks) * BLOCK_M, 0), 0)
    stop = tl.sum(tl.where(ids == group, end, 0), 0)
    return group, first, stop


@triton.jit
def _dot(a, b, sums, PRECISION: tl.constexpr):
    if PRECISION == "interpreted":  # there a product of bfloat16 is one of its bits
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums)
    else:
        return tl.dot(a, b, sums, input_precision=PRECISION)


@_tuned
@triton.jit
def _linear_kernel(
    y, x, weight, ends, slots, rows, scaling,
    num_rows, num_groups, out_features, in_features,
    y_s, y_o, x_s, x_i, w_n, w_o, w_i,
    rows_per_group,
    HAS_SLOTS: tl.constexpr, HAS_ROWS: tl.constexpr, ADD: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(out_features, BLOCK_N)
    group, first, stop = _locate(ends, tl.program_id(0) // tiles, num_rows, num_groups, GROUPS, BLOCK_M)
    if first >= stop:
        return
    slot = tl.where(group < num_groups, group, -1)
    if HAS_SLOTS:
        slot = tl.load(slots + group, mask=group < num_groups, other=-1)
    if ADD and slot < 0:
        return
    s = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    o = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    at = s
    if HAS_ROWS:
        at = tl.load(rows + s, mask=s < stop, other=0)
    x_tile = x + at[:, None] * x_s + k[None, :] * x_i
    w_tile = weight + slot.to(tl.int64) * w_n + o[None, :] * w_o + k[:, None] * w_i
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for done in range(0, tl.where(slot >= 0, in_features, 0), BLOCK_K):
        in_k = k < in_features - done
        x_part = tl.load(x_tile, mask=(s < stop)[:, None] & in_k[None, :], other=0.0)
        w_part = tl.load(w_tile, mask=in_k[:, None] & (o < out_features)[None, :], other=0.0)
        sums = _dot(x_part, w_part, sums, PRECISION)
        x_tile += BLOCK_K * x_i
        w_tile += BLOCK_K * w_i
    y_tile = y + s[:, None] * y_s + o[None, :] * y_o
    inside = (s < stop)[:, None] & (o < out_features)[None, :]
    sums = sums * scaling
    if ADD:
        sums += tl.load(y_tile, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_tile, sums.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _products(
    x_tile, w_tile, a_tile, x_k, w_k, a_k, depth, in_rows, in_outputs, in_rank,
    UPDATED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, R_BLOCK: tl.constexpr,
):  # fmt: skip
    """x W^T and x A^T of one tile, over `depth` inputs."""
    k = tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    z = tl.zeros((BLOCK_M, R_BLOCK), tl.float32)
    for done in range(0, depth, BLOCK_K):
        in_k = k < depth - done
        x_part = tl.load(x_tile, mask=in_rows[:, None] & in_k[None, :], other=0.0)
        w_part = tl.load(w_tile, mask=in_k[:, None] & in_outputs[None, :], other=0.0)
        sums = _dot(x_part, w_part, sums, PRECISION)
        if UPDATED:
            a_part = tl.load(a_tile, mask=in_k[:, None] & in_rank[None, :], other=0.0)
            z = _dot(x_part, a_part, z, PRECISION)
            a_tile += BLOCK_K * a_k
        x_tile += BLOCK_K * x_k
        w_tile += BLOCK_K * w_k
    return sums, z


@_tuned
@triton.jit
def _low_rank_kernel(
    y, z, x, weight, A, B, ends, slots, scaling,
    num_rows, num_groups, out_features, in_features,
    y_s, y_o, z_s, x_s, x_i, w_g, w_o, w_i, a_n, a_r, a_i, b_n, b_o, b_r,
    rows_per_group,
    R: tl.constexpr, R_BLOCK: tl.constexpr, IN_PARTS: tl.constexpr, OUT_PARTS: tl.constexpr, WITH_Z: tl.constexpr,
    GROUPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Each part of the outputs has tiles of its own: none straddles gate and up.
    width, depth = out_features // OUT_PARTS, in_features // IN_PARTS
    tiles_of_part = tl.cdiv(width, BLOCK_N)
    tile = tl.program_id(0) % (tiles_of_part * OUT_PARTS)
    block = tl.program_id(0) // (tiles_of_part * OUT_PARTS)
    group, first, stop = _locate(ends, block, num_rows, num_groups, GROUPS, BLOCK_M)
    if first >= stop:
        return
    slot = tl.load(slots + group, mask=group < num_groups, other=-1)
    out_part = tile // tiles_of_part
    column = (tile % tiles_of_part) * BLOCK_N + tl.arange(0, BLOCK_N)
    s = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    o, k, r = out_part * width + column, tl.arange(0, BLOCK_K), tl.arange(0, R_BLOCK)
    in_rows, in_outputs, in_rank = s < stop, column < width, r < R
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for in_part in tl.static_range(IN_PARTS):
        i = in_part * depth + k
        x_tile = x + s[:, None] * x_s + i[None, :] * x_i
        w_tile = weight + group.to(tl.int64) * w_g + o[None, :] * w_o + i[:, None] * w_i
        a_tile = A + slot.to(tl.int64) * a_n + (out_part * R + r)[None, :] * a_r + i[:, None] * a_i
        z_part = tl.zeros((BLOCK_M, R_BLOCK), tl.float32)
        if slot >= 0:
            products, z_part = _products(
                x_tile, w_tile, a_tile, x_i, w_i, a_i, depth, in_rows, in_outputs, in_rank,
                True, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, R_BLOCK,
            )  # fmt: skip
            b_tile = B + slot.to(tl.int64) * b_n + o[None, :] * b_o + (in_part * R + r)[:, None] * b_r
            b_part = tl.load(b_tile, mask=in_rank[:, None] & in_outputs[None, :], other=0.0)
            z_low = (z_part * scaling).to(b_part.dtype)
            sums += _dot(z_low, b_part, products, PRECISION)
        else:
            products, z_part = _products(
                x_tile, w_tile, a_tile, x_i, w_i, a_i, tl.where(group < num_groups, depth, 0),
                in_rows, in_outputs, in_rank, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, R_BLOCK,
            )  # fmt: skip
            sums += products
        if WITH_Z:
            if tile % tiles_of_part == 0:
                z_tile = z + s[:, None] * z_s + ((out_part + in_part) * R + r)[None, :]
                tl.store(z_tile, z_part.to(z.dtype.element_ty), mask=in_rows[:, None] & in_rank[None, :])
    y_tile = y + s[:, None] * y_s + o[None, :] * y_o
    tl.store(y_tile, sums.to(y.dtype.element_ty), mask=in_rows[:, None] & in_outputs[None, :])


@_tuned
@triton.jit
def _outer_kernel(
    y, left, x, ends, ids, rows, out_features, in_features,
    y_n, y_o, y_i, l_s, l_o, x_s, x_i,
    rows_per_group,
    HAS_IDS: tl.constexpr, HAS_ROWS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(in_features, BLOCK_N)
    group = tl.program_id(1).to(tl.int64)
    if HAS_IDS:
        group = tl.load(ids + group)
    start = tl.load(ends + group - 1, mask=group > 0, other=0)
    stop = tl.load(ends + group)
    o = (tl.program_id(0) // tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    i = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in range(start, stop, BLOCK_K):
        s = (row + tl.arange(0, BLOCK_K)).to(tl.int64)
        at = s
        if HAS_ROWS:
            at = tl.load(rows + s, mask=s < stop, other=0)
        l_part = tl.load(
            left + s[None, :] * l_s + o[:, None] * l_o,
            mask=(s < stop)[None, :] & (o < out_features)[:, None],
            other=0.0,
        )
        x_part = tl.load(
            x + at[:, None] * x_s + i[None, :] * x_i, mask=(s < stop)[:, None] & (i < in_features)[None, :], other=0.0
        )
        sums = _dot(l_part, x_part, sums, PRECISION)
    y_tile = y + tl.program_id(1).to(tl.int64) * y_n + o[:, None] * y_o + i[None, :] * y_i
    tl.store(y_tile, sums.to(y.dtype.element_ty), mask=(o < out_features)[:, None] & (i < in_features)[None, :])
