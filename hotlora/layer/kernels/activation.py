"""The activation with what comes before and after it: gate and up get their low-rank updates, and the activation meets
the A of the projection out of the experts. Each row block is one program, which passes over all F columns once."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch as launching
from .gemm import _dot, _locate, _precision, _row_blocks
from .launch import drop, slot_of
from .product import Order


@dataclass(frozen=True)
class Gate:
    """How experts make an activation of the projection into them, `[S, P*F]`."""

    kind: str
    """silu, gelu, gelu_tanh, relu2, or gpt_oss: (up + 1) * gate * sigmoid(alpha * gate), both clamped at `limit`"""
    is_gated: bool = True
    is_interleaved: bool = False
    """gate and up have their columns in turn"""
    alpha: float = 1.0
    limit: float = 0.0

    def of(self, up_SPF: Tensor) -> Tensor:
        """By torch, `[S, F]`."""
        gate, up = self.parts(up_SPF)
        if self.kind == "gpt_oss":
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
            return (up + 1) * gate * torch.sigmoid(gate * self.alpha)
        functions: dict[str, Any] = {
            "silu": torch.nn.functional.silu,
            "gelu": torch.nn.functional.gelu,
            "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
            "relu2": lambda x: torch.relu(x).square(),
        }
        act: Tensor = functions[self.kind](gate)
        return act * up if self.is_gated else act

    def parts(self, up_SPF: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up; the same twice without a gate."""
        if not self.is_gated:
            return up_SPF, up_SPF
        if self.is_interleaved:
            return up_SPF[..., 0::2], up_SPF[..., 1::2]
        gate, up = up_SPF.chunk(2, dim=-1)
        return gate, up

    @property
    def constants(self) -> dict[str, Any]:
        return {
            "KIND": self.kind, "GATED": self.is_gated, "INTERLEAVED": self.is_interleaved,
            "alpha": float(self.alpha), "limit": float(self.limit),
        }  # fmt: skip


@dataclass(frozen=True)
class Factors:
    """Of N hot experts, as `layer.updates.LowRank` has them."""

    ids_N: Tensor
    A_up: Tensor
    B_up: Tensor
    A_down: Tensor
    B_down: Tensor
    scaling: float
    p: float = 0.0
    up_seed: int = 0
    down_seed: int = 0

    @property
    def r(self) -> int:
        return int(self.A_down.shape[1])

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the two activation kernels, which meet B_up and A_down."""
        names = ("n", "o", "r"), ("n", "r", "f")
        strides = {f"bu_{name}": s for name, s in zip(names[0], self.B_up.stride(), strict=True)}
        strides |= {f"ad_{name}": s for name, s in zip(names[1], self.A_down.stride(), strict=True)}
        return {
            "ids": self.ids_N, "B_up": self.B_up, "A_down": self.A_down, "num_ids": len(self.ids_N), **strides,
            "scaling": self.scaling, **launching.seed_of(self.p, self.down_seed), "HOT": True, "R": self.r,
            "R_BLOCK": launching.rank_block(self.r), "IDS": triton.next_power_of_2(len(self.ids_N)),
        }  # fmt: skip


def arguments_of(factors: Factors | None) -> dict[str, Any]:
    if factors is not None:
        return factors.arguments
    names = ("bu_n", "bu_o", "bu_r", "ad_n", "ad_r", "ad_f")
    return {
        "ids": None, "B_up": None, "A_down": None, "num_ids": 0, **dict.fromkeys(names, 0), "scaling": 1.0,
        **launching.seed_of(0.0, 0), "HOT": False, "R": 1, "R_BLOCK": 16, "IDS": 1,
    }  # fmt: skip


def activation(
    up_SPF: Tensor, gate: Gate, order: Order, z_up_SPR: Tensor | None = None, factors: Factors | None = None
) -> tuple[Tensor, Tensor | None]:
    """act `[S, F]`, and of hot rows z = scaling * A_down @ drop(act) `[S, R]`; of others it holds anything.

    Hot rows' gate and up are up_SPF's and B_up @ z_up, which is not written anywhere.
    """
    num_rows, width = up_SPF.shape[0], up_SPF.shape[1] // (2 if gate.is_gated else 1)
    act_SF = up_SPF.new_empty(num_rows, width)
    z_SR = None if factors is None else up_SPF.new_empty(num_rows, factors.r)
    blocks = launching.blocks_of("activation", up_SPF, 0 if factors is None else factors.r)
    num_groups = len(order.ends_E)
    launching.launch(
        _activation_kernel, (_row_blocks(num_rows, num_groups, {"BLOCK_M": blocks.m}),), up_SPF, blocks,
        up=up_SPF, z_up=z_up_SPR, act=act_SF, z_down=z_SR, ends=order.ends_E, order=order.order_S,
        num_rows=num_rows, num_groups=num_groups, width=width, **gate.constants, **arguments_of(factors),
        GROUPS=triton.next_power_of_2(num_groups + 1), PRECISION=_precision(up_SPF),
        BLOCK_M=blocks.m, BLOCK_F=blocks.n,
    )  # fmt: skip
    return act_SF, z_SR


def plain_activation(
    up_SPF: Tensor, gate: Gate, order: Order, z_up_SPR: Tensor | None = None, factors: Factors | None = None
) -> tuple[Tensor, Tensor | None]:
    """`activation` by torch, in float32; z is zero in cold rows."""
    up_SPF = plain_updated(up_SPF.float(), gate, order, z_up_SPR, factors)
    act_SF = gate.of(up_SPF)
    if factors is None:
        return act_SF, None
    slot_S = launching.plain_slots(factors.ids_N, order.ends_E, len(up_SPF))
    dropped_SF = launching.plain_drop(act_SF, order.order_S, factors.p, factors.down_seed)
    z_SR = factors.scaling * torch.einsum("sf,srf->sr", dropped_SF, factors.A_down.float()[slot_S])
    return act_SF, z_SR * (slot_S >= 0)[:, None]


def plain_updated(up_SPF: Tensor, gate: Gate, order: Order, z_up_SPR: Tensor | None, factors: Factors | None) -> Tensor:
    """The up projection's output with hot rows' updates."""
    if factors is None or z_up_SPR is None:
        return up_SPF
    slot_S = launching.plain_slots(factors.ids_N, order.ends_E, len(up_SPF))
    parts = 2 if gate.is_gated else 1
    z_parts = torch.where((slot_S >= 0)[:, None], z_up_SPR.float(), 0.0).chunk(parts, 1)
    updates = [
        torch.einsum("sr,sfr->sf", z, B[slot_S])
        for z, B in zip(z_parts, factors.B_up.float().chunk(parts, 1), strict=True)
    ]
    if gate.is_interleaved:
        return up_SPF + torch.stack(updates, -1).flatten(1)
    return up_SPF + torch.cat(updates, 1)


@triton.jit
def act_of(gate, up, alpha, limit, KIND: tl.constexpr, GATED: tl.constexpr):
    """The activation and its derivatives with respect to gate and up, all float32."""
    if KIND == "gpt_oss":
        g = tl.minimum(gate, limit)
        u = tl.minimum(tl.maximum(up, -limit), limit)
        s = tl.sigmoid(g * alpha)
        value = g * s
        slope = tl.where(gate <= limit, s + value * alpha * (1 - s), 0.0)
        by_up = tl.where((up >= -limit) & (up <= limit), value, 0.0)
        return (u + 1) * value, (u + 1) * slope, by_up
    else:
        if KIND == "silu":
            s = tl.sigmoid(gate)
            value = gate * s
            slope = s + value * (1 - s)
        elif KIND == "gelu":
            phi = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
            value = gate * phi
            slope = phi + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
        elif KIND == "gelu_tanh":
            inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
            tanh = 2 * tl.sigmoid(2 * inner) - 1
            value = 0.5 * gate * (1 + tanh)
            inner_slope = 0.7978845608028654 * (1 + 3 * 0.044715 * gate * gate)
            slope = 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh * tanh) * inner_slope
        else:
            tl.static_assert(KIND == "relu2")
            positive = tl.maximum(gate, 0.0)
            value = positive * positive
            slope = 2 * positive
        if GATED:
            return value * up, slope * up, value
        else:
            return value, slope, value


@triton.jit
def gate_and_up(
    up, B_up, s, f, in_rows, width, slot, z_gate, z_up, bu_n, bu_o, bu_r,
    HOT: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, R: tl.constexpr, R_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of both, float32, with hot rows' updates, and where they are in a row; without a gate the same twice."""
    in_f, r = f < width, tl.arange(0, R_BLOCK)
    inside = in_rows[:, None] & in_f[None, :]
    gate_at, up_at, parts = f, width + f, 2
    if not GATED:
        up_at, parts = f, 1
    elif INTERLEAVED:
        gate_at, up_at = 2 * f, 2 * f + 1
    row = up + s[:, None] * (parts * width)
    gate = tl.load(row + gate_at[None, :], mask=inside, other=0.0).to(tl.float32)
    if GATED:
        its_up = tl.load(row + up_at[None, :], mask=inside, other=0.0).to(tl.float32)
    if HOT:
        if slot >= 0:
            in_b = (r < R)[:, None] & in_f[None, :]
            b = B_up + slot.to(tl.int64) * bu_n + f[None, :] * bu_o + r[:, None] * bu_r
            b_part = tl.load(b, mask=in_b, other=0.0).to(z_gate.dtype)
            gate = _dot(z_gate, b_part, gate, PRECISION)
            if GATED:
                b_part = tl.load(b + width * bu_o, mask=in_b, other=0.0).to(z_up.dtype)
                its_up = _dot(z_up, b_part, its_up, PRECISION)
    if not GATED:
        its_up = gate
    return gate, its_up, gate_at, up_at


@triton.jit
def z_of(z, s, part, in_rows, PARTS: tl.constexpr, R: tl.constexpr, R_BLOCK: tl.constexpr):
    r = tl.arange(0, R_BLOCK)
    return tl.load(
        z + s[:, None] * (PARTS * R) + part * R + r[None, :], mask=in_rows[:, None] & (r < R)[None, :], other=0.0
    )


@triton.jit(do_not_specialize=["seed", "threshold"])
def _activation_kernel(
    up, z_up, act, z_down, ends, order, ids, B_up, A_down,
    num_rows, num_groups, width, num_ids, bu_n, bu_o, bu_r, ad_n, ad_r, ad_f,
    scaling, alpha, limit, seed, threshold, keep_scale,
    KIND: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, HOT: tl.constexpr, DROP: tl.constexpr,
    R: tl.constexpr, R_BLOCK: tl.constexpr, IDS: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    group, first, stop = _locate(ends, tl.program_id(0), num_rows, num_groups, GROUPS, BLOCK_M)
    if first >= stop:
        return
    s = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    in_rows = s < stop
    slot = tl.full((), -1, tl.int32)
    z_gate = tl.zeros((BLOCK_M, R_BLOCK), act.dtype.element_ty)
    its_z = z_gate
    if HOT:
        slot = slot_of(ids, group, num_ids, IDS)
        in_hot = s < tl.where(slot >= 0, stop, 0)
        PARTS: tl.constexpr = 2 if GATED else 1
        z_gate = z_of(z_up, s, 0, in_hot, PARTS, R, R_BLOCK)
        if GATED:
            its_z = z_of(z_up, s, 1, in_hot, PARTS, R, R_BLOCK)
    r = tl.arange(0, R_BLOCK)
    z = tl.zeros((BLOCK_M, R_BLOCK), tl.float32)
    assignment = tl.load(order + s, mask=in_rows, other=0)
    for start in range(0, width, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        gate, its_up, _, _ = gate_and_up(
            up, B_up, s, f, in_rows, width, slot, z_gate, its_z, bu_n, bu_o, bu_r,
            HOT, GATED, INTERLEAVED, R, R_BLOCK, PRECISION,
        )  # fmt: skip
        value, _, _ = act_of(gate, its_up, alpha, limit, KIND, GATED)
        value = value.to(act.dtype.element_ty)
        tl.store(act + s[:, None] * width + f[None, :], value, mask=in_rows[:, None] & (f < width)[None, :])
        if HOT:
            if slot >= 0:
                if DROP:
                    value = drop(value, seed, assignment, f, threshold, keep_scale)
                a = A_down + slot.to(tl.int64) * ad_n + r[None, :] * ad_r + f[:, None] * ad_f
                a_part = tl.load(a, mask=(f < width)[:, None] & (r < R)[None, :], other=0.0)
                z = _dot(value, a_part.to(value.dtype), z, PRECISION)
    if HOT:
        z_tile = z_down + s[:, None] * R + r[None, :]
        tl.store(z_tile, (z * scaling).to(z_down.dtype.element_ty), mask=in_hot[:, None] & (r < R)[None, :])
