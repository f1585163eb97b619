"""The activation's backward, which reads the gradient of the activation and the up projection's output once, and makes
all that the products after it take: the gradient of the up projection's output, its product with B, the activation
again, and the routing weights' gradient."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch as launching
from .activation import Factors, Gate, act_of, arguments_of, gate_and_up, plain_updated, z_of
from .gemm import _dot, _locate, _precision, _row_blocks
from .launch import drop, slot_of
from .product import Order


@dataclass(frozen=True)
class Gradients:
    dup_SPF: Tensor
    """of the up projection's output"""
    dweight_S: Tensor
    """of the routing weights, in the order of assignments"""
    act_SF: Tensor | None
    """the activation again, and not dropped; of cold rows it holds anything"""
    g_SPR: Tensor | None
    """scaling * B_up^T @ dup of hot rows; of others it holds anything"""


def activation_backward(
    dact_SF: Tensor,
    up_SPF: Tensor,
    weights_S: Tensor,
    gate: Gate,
    order: Order,
    *,
    dots_S: Tensor | None = None,
    z_up_SPR: Tensor | None = None,
    g_down_SR: Tensor | None = None,
    factors: Factors | None = None,
) -> Gradients:
    """
    Args:
        dact_SF: W_down^T g of each row, not yet times the routing weights.
        weights_S: routing weights, in the order of assignments.
        dots_S: what the routing weights' gradient has besides, <g, bias>.
        z_up_SPR: as `activation` was given.
        g_down_SR: scaling * B_down^T g of hot rows.
    """
    num_rows, width = dact_SF.shape
    dup_SPF, dweight_S = torch.empty_like(up_SPF), torch.empty_like(weights_S)
    act_SF = g_SPR = None
    if factors is not None:
        assert z_up_SPR is not None
        act_SF, g_SPR = torch.empty_like(dact_SF), torch.empty_like(z_up_SPR)
    blocks = launching.blocks_of("activation_backward", up_SPF)
    num_groups = len(order.ends_E)
    launching.launch(
        _activation_backward_kernel, (_row_blocks(num_rows, num_groups, {"BLOCK_M": blocks.m}),), up_SPF, blocks,
        dact=dact_SF, up=up_SPF, row_weights=weights_S, dots=dots_S, z_up=z_up_SPR, g_down=g_down_SR, dup=dup_SPF,
        dweight=dweight_S, act=act_SF, g_up=g_SPR, ends=order.ends_E, order=order.order_S,
        num_rows=num_rows, num_groups=num_groups, width=width, DOTS=dots_S is not None,
        **gate.constants, **arguments_of(factors), GROUPS=triton.next_power_of_2(num_groups + 1),
        PRECISION=_precision(up_SPF), BLOCK_M=blocks.m, BLOCK_F=blocks.n,
    )  # fmt: skip
    return Gradients(dup_SPF, dweight_S, act_SF, g_SPR)


def plain_activation_backward(
    dact_SF: Tensor,
    up_SPF: Tensor,
    weights_S: Tensor,
    gate: Gate,
    order: Order,
    *,
    dots_S: Tensor | None = None,
    z_up_SPR: Tensor | None = None,
    g_down_SR: Tensor | None = None,
    factors: Factors | None = None,
) -> Gradients:
    """`activation_backward` by torch's autograd, in float32; what is of hot rows is zero in cold ones."""
    assignment_S, dact_SF = order.order_S.long(), dact_SF.float()
    up_SPF = plain_updated(up_SPF.float(), gate, order, z_up_SPR, factors).requires_grad_()
    slot_S = torch.full_like(assignment_S, -1)
    if factors is not None and g_down_SR is not None:
        slot_S = launching.plain_slots(factors.ids_N, order.ends_E, len(up_SPF))
        g_SR = torch.where((slot_S >= 0)[:, None], g_down_SR.float(), 0.0)
        update_SF = torch.einsum("sr,srf->sf", g_SR, factors.A_down.float()[slot_S])
        dact_SF = dact_SF + launching.plain_drop(update_SF, order.order_S, factors.p, factors.down_seed)
    with torch.enable_grad():
        act_SF = gate.of(up_SPF)
        weighted_SF = dact_SF * weights_S.float()[assignment_S][:, None]
        (dup_SPF,) = torch.autograd.grad(act_SF, up_SPF, weighted_SF)
    dots = (dact_SF * act_SF.detach()).sum(1) + (0 if dots_S is None else dots_S)
    dweight_S = torch.zeros_like(dots).index_copy(0, assignment_S, dots)
    if factors is None:
        return Gradients(dup_SPF, dweight_S, None, None)
    hot_S1, parts = (slot_S >= 0)[:, None], 2 if gate.is_gated else 1
    pieces = zip(gate.parts(dup_SPF), factors.B_up.float().chunk(parts, 1), strict=False)
    g_parts = [factors.scaling * torch.einsum("sf,sfr->sr", d, B[slot_S]) for d, B in pieces]
    return Gradients(dup_SPF, dweight_S, act_SF.detach() * hot_S1, torch.cat(g_parts, 1) * hot_S1)


@triton.jit(do_not_specialize=["seed", "threshold"])
def _activation_backward_kernel(
    dact, up, row_weights, dots, z_up, g_down, dup, dweight, act, g_up, ends, order, ids, B_up, A_down,
    num_rows, num_groups, width, num_ids, bu_n, bu_o, bu_r, ad_n, ad_r, ad_f,
    scaling, alpha, limit, seed, threshold, keep_scale, DOTS: tl.constexpr,
    KIND: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, HOT: tl.constexpr, DROP: tl.constexpr,
    R: tl.constexpr, R_BLOCK: tl.constexpr, IDS: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    group, first, stop = _locate(ends, tl.program_id(0), num_rows, num_groups, GROUPS, BLOCK_M)
    if first >= stop:
        return
    s = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    in_rows = s < stop
    PARTS: tl.constexpr = 2 if GATED else 1
    slot = tl.full((), -1, tl.int32)
    z_gate = tl.zeros((BLOCK_M, R_BLOCK), dup.dtype.element_ty)
    its_z, g_low = z_gate, z_gate
    if HOT:
        slot = slot_of(ids, group, num_ids, IDS)
        in_hot = s < tl.where(slot >= 0, stop, 0)
        z_gate = z_of(z_up, s, 0, in_hot, PARTS, R, R_BLOCK)
        if GATED:
            its_z = z_of(z_up, s, 1, in_hot, PARTS, R, R_BLOCK)
        g_low = z_of(g_down, s, 0, in_hot, 1, R, R_BLOCK)
    r = tl.arange(0, R_BLOCK)
    g_gate = tl.zeros((BLOCK_M, R_BLOCK), tl.float32)
    g_its = tl.zeros((BLOCK_M, R_BLOCK), tl.float32)
    weight_sums = tl.zeros((BLOCK_M,), tl.float32)
    assignment = tl.load(order + s, mask=in_rows, other=0)
    weight = tl.load(row_weights + assignment, mask=in_rows, other=0.0).to(tl.float32)
    for start in range(0, width, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        in_f = f < width
        inside = in_rows[:, None] & in_f[None, :]
        grad = tl.load(dact + s[:, None] * width + f[None, :], mask=inside, other=0.0).to(tl.float32)
        if HOT:
            if slot >= 0:
                a = A_down + slot.to(tl.int64) * ad_n + r[:, None] * ad_r + f[None, :] * ad_f
                a_part = tl.load(a, mask=(r < R)[:, None] & in_f[None, :], other=0.0).to(g_low.dtype)
                if DROP:
                    update = _dot(g_low, a_part, tl.zeros((BLOCK_M, BLOCK_F), tl.float32), PRECISION)
                    grad += drop(update, seed, assignment, f, threshold, keep_scale)
                else:
                    grad = _dot(g_low, a_part, grad, PRECISION)
        gate, its_up, gate_at, up_at = gate_and_up(
            up, B_up, s, f, in_rows, width, slot, z_gate, its_z, bu_n, bu_o, bu_r,
            HOT, GATED, INTERLEAVED, R, R_BLOCK, PRECISION,
        )  # fmt: skip
        value, by_gate, by_up = act_of(gate, its_up, alpha, limit, KIND, GATED)
        weight_sums += tl.sum(tl.where(inside, grad * value, 0.0), 1)
        grad *= weight[:, None]
        dgate = (grad * by_gate).to(dup.dtype.element_ty)
        row = dup + s[:, None] * (PARTS * width)
        tl.store(row + gate_at[None, :], dgate, mask=inside)
        if GATED:
            dits = (grad * by_up).to(dup.dtype.element_ty)
            tl.store(row + up_at[None, :], dits, mask=inside)
        if HOT:
            if slot >= 0:
                tl.store(act + s[:, None] * width + f[None, :], value.to(act.dtype.element_ty), mask=inside)
                in_b = in_f[:, None] & (r < R)[None, :]
                b = B_up + slot.to(tl.int64) * bu_n + f[:, None] * bu_o + r[None, :] * bu_r
                g_gate = _dot(dgate, tl.load(b, mask=in_b, other=0.0).to(dgate.dtype), g_gate, PRECISION)
                if GATED:
                    b_part = tl.load(b + width * bu_o, mask=in_b, other=0.0).to(dgate.dtype)
                    g_its = _dot(dits, b_part, g_its, PRECISION)
    if DOTS:
        weight_sums += tl.load(dots + s, mask=in_rows, other=0.0)
    tl.store(dweight + assignment, weight_sums.to(dweight.dtype.element_ty), mask=in_rows)
    if HOT:
        stored = in_hot[:, None] & (r < R)[None, :]
        g_tile = g_up + s[:, None] * (PARTS * R) + r[None, :]
        tl.store(g_tile, (g_gate * scaling).to(g_up.dtype.element_ty), mask=stored)
        if GATED:
            tl.store(g_tile + R, (g_its * scaling).to(g_up.dtype.element_ty), mask=stored)
