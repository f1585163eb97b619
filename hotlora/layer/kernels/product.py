"""The base's grouped product with all that can be done on its way: rows gathered by index, a thin product of the same
rows for hot experts, and, before the result is written, its low-rank update, bias and routing weight."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch as launching
from .gemm import _dot, _locate, _precision, _row_blocks
from .launch import drop, slot_of


@dataclass(frozen=True)
class Order:
    """Of the S rows; `counting_sort` makes it."""

    order_S: Tensor
    place_S: Tensor
    ends_E: Tensor
    top_k: int


@dataclass(frozen=True)
class Thin:
    """A product of hot rows beside the base's: z[s] = scaling * A[n] @ drop(x[s]), A `[N, R, I]`."""

    ids_N: Tensor
    A: Tensor
    scaling: float
    p: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Low:
    """What is added to hot rows: drop(B[n] @ z[s]), B `[N, O, R]`, z `[S, R]`."""

    ids_N: Tensor
    z_SR: Tensor
    B: Tensor
    p: float = 0.0
    seed: int = 0


def product(
    x: Tensor,
    weight_EOI: Tensor,
    order: Order,
    *,
    gather: bool = False,
    thin: Thin | None = None,
    low: Low | None = None,
    bias_EO: Tensor | None = None,
    dot_EI: Tensor | None = None,
    weights_S: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y `[S, O]`, z `[S, R]` of `thin`, of which rows of cold experts hold anything, and dots `[S]` float32.

    Row s of expert e has y = w * (weight[e] @ x + bias[e] + low), and x @ dot[e]. Rows of no expert are zeros.

    Args:
        x: `[S, I]`, or with `gather` `[T, I]`, of each row its token's; contiguous.
        weights_S: w, in the order of assignments, not of rows.
    """
    num_rows, (num_groups, outputs, inputs) = len(order.order_S), weight_EOI.shape
    y_SO = x.new_empty(num_rows, outputs)
    z_SR = None if thin is None else x.new_empty(num_rows, thin.A.shape[1])
    dots_S = None if dot_EI is None else x.new_empty(num_rows, dtype=torch.float32)
    kept: Any = thin if thin is not None else low
    p, seed = (0.0, 0) if kept is None else (kept.p, kept.seed)
    blocks = launching.blocks_of("product", x, 128 if p else 0 if thin is None else thin.A.shape[1])
    ids_N = None if kept is None else kept.ids_N
    A, B = None if thin is None else thin.A, None if low is None else low.B
    r, low_r = 1 if A is None else A.shape[1], 1 if B is None else B.shape[2]
    strides = dict(zip(("w_n", "w_o", "w_i"), weight_EOI.stride(), strict=True))
    strides |= dict(zip(("a_n", "a_r", "a_i"), (0, 0, 0) if A is None else A.stride(), strict=True))
    strides |= dict(zip(("b_n", "b_o", "b_r"), (0, 0, 0) if B is None else B.stride(), strict=True))
    grid = (_row_blocks(num_rows, num_groups, {"BLOCK_M": blocks.m}) * triton.cdiv(outputs, blocks.n),)
    launching.launch(
        _product_kernel, grid, x, blocks,
        y=y_SO, x=x, weight=weight_EOI, ends=order.ends_E, order=order.order_S, ids=ids_N, thin=z_SR, A=A,
        z=None if low is None else low.z_SR, B=B, bias=bias_EO, dot=dot_EI, dots=dots_S, row_weights=weights_S,
        scaling=1.0 if thin is None else thin.scaling, num_rows=num_rows, num_groups=num_groups, outputs=outputs,
        inputs=inputs, num_ids=0 if ids_N is None else len(ids_N), **strides, **launching.seed_of(p, seed),
        K=order.top_k, GATHER=gather, THIN=thin is not None, LOW=low is not None, BIAS=bias_EO is not None,
        DOT=dot_EI is not None, WEIGHTED=weights_S is not None, R=r, R_BLOCK=launching.rank_block(r), LOW_R=low_r,
        LOW_BLOCK=launching.rank_block(low_r), IDS=triton.next_power_of_2(max(1, 0 if ids_N is None else len(ids_N))),
        GROUPS=triton.next_power_of_2(num_groups + 1), PRECISION=_precision(x),
        BLOCK_M=blocks.m, BLOCK_N=blocks.n, BLOCK_K=blocks.k,
    )  # fmt: skip
    return y_SO, z_SR, dots_S


def plain_product(
    x: Tensor,
    weight_EOI: Tensor,
    order: Order,
    *,
    gather: bool = False,
    thin: Thin | None = None,
    low: Low | None = None,
    bias_EO: Tensor | None = None,
    dot_EI: Tensor | None = None,
    weights_S: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`product` by torch, in float32; z is zero in cold rows."""
    order_S, num_experts = order.order_S.long(), len(order.ends_E)
    expert_S = launching.plain_experts(order.ends_E, len(order_S))
    here_S1, expert_S = (expert_S < num_experts)[:, None], expert_S.clamp(max=num_experts - 1)
    x_SI = torch.where(here_S1, (x[order_S // order.top_k] if gather else x).float(), 0.0)
    y_SO, z_SR, dots_S = torch.einsum("si,soi->so", x_SI, weight_EOI.float()[expert_S]), None, None
    if thin is not None:
        slot_S = launching.plain_slots(thin.ids_N, order.ends_E, len(order_S))
        dropped_SI = launching.plain_drop(x_SI, order.order_S, thin.p, thin.seed)
        z_SR = thin.scaling * torch.einsum("si,sri->sr", dropped_SI, thin.A.float()[slot_S]) * (slot_S >= 0)[:, None]
    if dot_EI is not None:
        dots_S = (x_SI * dot_EI.float()[expert_S]).sum(1)
    if bias_EO is not None:
        y_SO = y_SO + bias_EO.float()[expert_S] * here_S1
    if low is not None:
        slot_S = launching.plain_slots(low.ids_N, order.ends_E, len(order_S))
        z = torch.where((slot_S >= 0)[:, None], low.z_SR.float(), 0.0)
        update_SO = torch.einsum("sr,sor->so", z, low.B.float()[slot_S])
        y_SO = y_SO + launching.plain_drop(update_SO, order.order_S, low.p, low.seed)
    return y_SO if weights_S is None else y_SO * weights_S.float()[order_S][:, None], z_SR, dots_S


@triton.jit
def _sums(
    x_tile, w_tile, a_tile, dot_tile, w_i, a_i, depth, in_rows, in_outputs, in_rank,
    assignment, seed, threshold, keep_scale,
    WITH_Z: tl.constexpr, DOT: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, R_BLOCK: tl.constexpr,
):  # fmt: skip
    """x W^T, x A^T and the rows' dots over `depth` inputs."""
    k = tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    z = tl.zeros((BLOCK_M, R_BLOCK), tl.float32)
    dots = tl.zeros((BLOCK_M,), tl.float32)
    for done in range(0, depth, BLOCK_K):
        in_k = k < depth - done
        x_part = tl.load(x_tile, mask=in_rows[:, None] & in_k[None, :], other=0.0)
        w_part = tl.load(w_tile, mask=in_k[:, None] & in_outputs[None, :], other=0.0)
        sums = _dot(x_part, w_part, sums, PRECISION)
        if DOT:
            with_x = tl.load(dot_tile + done + k, mask=in_k, other=0.0).to(tl.float32)
            dots += tl.sum(x_part.to(tl.float32) * with_x[None, :], 1)
        if WITH_Z:
            a_part = tl.load(a_tile, mask=in_k[:, None] & in_rank[None, :], other=0.0)
            if DROP:
                x_part = drop(x_part, seed, assignment, done + k, threshold, keep_scale)
            z = _dot(x_part, a_part.to(x_part.dtype), z, PRECISION)
            a_tile += BLOCK_K * a_i
        x_tile += BLOCK_K
        w_tile += BLOCK_K * w_i
    return sums, z, dots


@triton.jit(do_not_specialize=["seed", "threshold"])
def _product_kernel(
    y, x, weight, ends, order, ids, thin, A, z, B, bias, dot, dots, row_weights,
    scaling, num_rows, num_groups, outputs, inputs, num_ids,
    w_n, w_o, w_i, a_n, a_r, a_i, b_n, b_o, b_r, seed, threshold, keep_scale,
    DROP: tl.constexpr, K: tl.constexpr, GATHER: tl.constexpr, THIN: tl.constexpr, LOW: tl.constexpr,
    BIAS: tl.constexpr, DOT: tl.constexpr, WEIGHTED: tl.constexpr, R: tl.constexpr, R_BLOCK: tl.constexpr,
    LOW_R: tl.constexpr, LOW_BLOCK: tl.constexpr, IDS: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(outputs, BLOCK_N)
    tile = tl.program_id(0) % tiles
    group, first, stop = _locate(ends, tl.program_id(0) // tiles, num_rows, num_groups, GROUPS, BLOCK_M)
    if first >= stop:
        return
    is_here = group < num_groups
    slot = tl.full((), -1, tl.int32)
    if THIN or LOW:
        slot = slot_of(ids, group, num_ids, IDS)
    s = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    o, k, r = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, R_BLOCK)
    in_rows, in_outputs, in_rank = s < stop, o < outputs, r < R
    assignment = tl.load(order + s, mask=in_rows, other=0)
    at = s
    if GATHER:
        at = (assignment // K).to(tl.int64)
    x_tile = x + at[:, None] * inputs + k[None, :]
    w_tile = weight + group.to(tl.int64) * w_n + o[None, :] * w_o + k[:, None] * w_i
    dot_tile = x
    if DOT:
        dot_tile = dot + group.to(tl.int64) * inputs
    depth = tl.where(is_here, inputs, 0)
    # Only the first tile of a row block makes z: its rows pass by there anyway.
    if THIN:
        if (tile == 0) & (slot >= 0):
            a_tile = A + slot.to(tl.int64) * a_n + r[None, :] * a_r + k[:, None] * a_i
            sums, its_z, its_dots = _sums(
                x_tile, w_tile, a_tile, dot_tile, w_i, a_i, depth, in_rows, in_outputs, in_rank,
                assignment, seed, threshold, keep_scale, True, DOT, DROP, PRECISION,
                BLOCK_M, BLOCK_N, BLOCK_K, R_BLOCK,
            )  # fmt: skip
            z_tile = thin + s[:, None] * R + r[None, :]
            tl.store(z_tile, (its_z * scaling).to(thin.dtype.element_ty), mask=in_rows[:, None] & in_rank[None, :])
        else:
            sums, its_z, its_dots = _sums(
                x_tile, w_tile, x_tile, dot_tile, w_i, a_i, depth, in_rows, in_outputs, in_rank,
                assignment, seed, threshold, keep_scale, False, DOT, DROP, PRECISION,
                BLOCK_M, BLOCK_N, BLOCK_K, R_BLOCK,
            )  # fmt: skip
    else:
        sums, its_z, its_dots = _sums(
            x_tile, w_tile, x_tile, dot_tile, w_i, a_i, depth, in_rows, in_outputs, in_rank,
            assignment, seed, threshold, keep_scale, False, DOT, DROP, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_K, R_BLOCK,
        )  # fmt: skip
    if DOT:
        if tile == 0:
            tl.store(dots + s, its_dots, mask=in_rows)
    if BIAS:
        at_bias = bias + group.to(tl.int64) * outputs + o
        sums += tl.load(at_bias, mask=o < tl.where(is_here, outputs, 0), other=0.0).to(tl.float32)[None, :]
    if LOW:
        if slot >= 0:
            q = tl.arange(0, LOW_BLOCK)
            z_part = tl.load(
                z + s[:, None] * LOW_R + q[None, :], mask=in_rows[:, None] & (q < LOW_R)[None, :], other=0.0
            )
            b_tile = B + slot.to(tl.int64) * b_n + o[None, :] * b_o + q[:, None] * b_r
            b_part = tl.load(b_tile, mask=(q < LOW_R)[:, None] & in_outputs[None, :], other=0.0)
            if DROP:
                update = _dot(z_part, b_part.to(z_part.dtype), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
                sums += drop(update, seed, assignment, o, threshold, keep_scale)
            else:
                sums = _dot(z_part, b_part.to(z_part.dtype), sums, PRECISION)
    if WEIGHTED:
        sums *= tl.load(row_weights + assignment, mask=in_rows, other=0.0).to(tl.float32)[:, None]
    tl.store(
        y + s[:, None] * outputs + o[None, :], sums.to(y.dtype.element_ty), mask=in_rows[:, None] & in_outputs[None, :]
    )
