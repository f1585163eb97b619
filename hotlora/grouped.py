"""How a GPU computes the routed layer: all experts in one grouped product, and no number that it would have to be
asked for.

Grouped products are torch's own where it has one kernel for them, and those of `kernels` where it has a loop that asks
the device how long each group is. `HOTLORA_KERNELS=torch` or `=triton` in the environment chooses for all.

How many rows are hot is not known to the host. `Hot`, on torch's products, has arrays of S rows: hot ones first, sorted
by expert, then a tail that grouped products skip and that is masked. `SlotHot`, on our kernels, leaves the rows where
they are: its kernels skip experts that have no factors.

Shape suffixes as in `experts`; here H = S.
"""

import importlib.util
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .errors import HotLoraError
from .experts import FactorsInPass, Groups, grouped_linear, grouped_outer, hot_rows, up_parts

# The major compute capabilities on which torch's grouped_mm is one kernel, for bfloat16; elsewhere it is a loop of
# products (pytorch#161407, pytorch#194227). There torch's is taken until ours is measured beside it:
# `python benchmarks/time_kernels.py`.
_TORCH_HAS_A_KERNEL = (9, 10)


class Rows:
    """The S assignments, sorted by expert; rows of experts on other devices come last."""

    @classmethod
    def blocks(cls, num_experts: int, top_k_index_TK: Tensor, row_bytes: int) -> "list[Rows]":
        """All rows in one: what a GPU has to do is done in few launches."""
        return [cls(num_experts, top_k_index_TK)]

    def __init__(self, num_experts: int, top_k_index_TK: Tensor) -> None:
        self.expert_S, self.order_S = torch.sort(top_k_index_TK.reshape(-1))
        self.top_k = top_k_index_TK.shape[1]
        ids_E = torch.arange(num_experts, device=self.expert_S.device)
        self.ends_E = torch.searchsorted(self.expert_S, ids_E, right=True, out_int32=True)
        self.groups = Groups(self.ends_E, (self.expert_S >= num_experts).unsqueeze(1))

    @property
    def token_S(self) -> Tensor:
        return self.order_S // self.top_k

    def product(self, x_SI: Tensor, weight_EIO: Tensor) -> Tensor:
        """Each row times its expert's weights `[S, O]`; zeros in rows of no expert here."""
        return _linear(x_SI, weight_EIO.transpose(1, 2), self.groups)

    def add_bias(self, y_SO: Tensor, bias_EO: Tensor) -> None:
        y_SO += self._bias_of_rows(bias_EO)

    def dot_bias(self, g_SO: Tensor, bias_EO: Tensor) -> Tensor:
        """`[S]`: each row's product with its expert's bias."""
        return torch.linalg.vecdot(g_SO, self._bias_of_rows(bias_EO).to(g_SO.dtype))

    def _bias_of_rows(self, bias_EO: Tensor) -> Tensor:
        elsewhere_S1 = self.groups.tail_S1
        assert elsewhere_S1 is not None
        bias_SO = bias_EO.index_select(0, self.expert_S.clamp(max=len(bias_EO) - 1))
        return bias_SO.masked_fill(elsewhere_S1, 0)


def hot(factors: FactorsInPass, rows: Rows) -> "Hot | SlotHot":
    """One adapter's part of the layer."""
    ours = not torch.compiler.is_compiling() and _kernels_for(rows.expert_S.device, factors.dtype)
    return (SlotHot if ours else Hot)(factors, rows)


class Hot:
    """What one adapter adds to its hot rows."""

    def __init__(self, factors: FactorsInPass, rows: Rows) -> None:
        self.factors, self.token_S = factors, rows.token_S
        self.rows_H, self.groups = hot_rows(rows.expert_S, rows.ends_E, factors.expert_ids_N, count_is_free=False)

    def up(self, experts: Any, up_SPF: Tensor, x_SD: Tensor) -> None:
        """Adds the update of the projections into the experts to `up`."""
        f = self.factors
        z_HPR = _linear(_dropped(self._pick(x_SD), f.p, f.up_seed), f.A_up, self.groups) * f.scaling
        pairs = zip(up_parts(experts, up_SPF), f.split(z_HPR, 1), f.split(f.B_up, 1), strict=True)
        for part, z_HR, B in pairs:
            part.index_add_(0, self.rows_H, _linear(z_HR, B, self.groups).to(part.dtype))

    def down(self, y_SD: Tensor, act_SF: Tensor) -> None:
        """Adds the update of the projection out of the experts to `y`."""
        f = self.factors
        z_HR = _linear(_dropped(self._pick(act_SF), f.p, f.down_seed), f.A_down, self.groups) * f.scaling
        y_SD.index_add_(0, self.rows_H, _linear(z_HR, f.B_down, self.groups).to(y_SD.dtype))

    def down_backward(
        self, u_SF: Tensor, dweight_S: Tensor, act_SF: Tensor, grad_SD: Tensor, weight_S1: Tensor
    ) -> None:
        """Makes the gradients of A, where it trains, and B; adds the input's, not yet times the routing weights, to
        `u`, and the routing weights' to `dweight`: <g, B A h> is <B^T g, A h>."""
        f = self.factors
        act_HF, g_HD = _dropped(self._pick(act_SF), f.p, f.down_seed), self._pick(grad_SD)
        weight_H1 = weight_S1.index_select(0, self.rows_H)
        g_HR = _linear(g_HD, f.B_down.transpose(1, 2), self.groups) * f.scaling
        z_HR = _linear(act_HF, f.A_down, self.groups)
        wide = dweight_S.dtype
        dweight_S.index_add_(0, self.rows_H, torch.linalg.vecdot(g_HR.to(wide), z_HR.to(wide)))
        dA = _outer((g_HR * weight_H1).to(f.dtype), act_HF, self.groups) if f.trains_A else None
        f.down_gradients = dA, _outer(g_HD, (z_HR * (weight_H1 * f.scaling)).to(f.dtype), self.groups)
        du_HF = _dropped(_linear(g_HR, f.A_down.transpose(1, 2), self.groups), f.p, f.down_seed)
        u_SF.index_add_(0, self.rows_H, du_HF.to(u_SF.dtype))

    def up_backward(self, experts: Any, dx_SD: Tensor, dup_SPF: Tensor, hidden_TD: Tensor) -> None:
        """Makes the gradients of A, where it trains, and B; adds the input's to `dx`."""
        f = self.factors
        token_H = self.token_S.index_select(0, self.rows_H)
        x_HD = _dropped(hidden_TD.index_select(0, token_H).to(f.dtype), f.p, f.up_seed)
        z_HPR = _linear(x_HD, f.A_up, self.groups) * f.scaling
        parts = [part.contiguous() for part in up_parts(experts, self._pick(dup_SPF))]
        pairs = zip(parts, f.split(z_HPR, 1), strict=True)
        dB = torch.cat([_outer(part, z_HR, self.groups) for part, z_HR in pairs], dim=1)
        pairs = zip(parts, f.split(f.B_up, 1), strict=True)
        g_parts = [_linear(part, B.transpose(1, 2), self.groups) for part, B in pairs]
        g_HPR = torch.cat(g_parts, dim=1) * f.scaling
        f.up_gradients = _outer(g_HPR, x_HD, self.groups) if f.trains_A else None, dB
        dx_HD = _dropped(_linear(g_HPR, f.A_up.transpose(1, 2), self.groups), f.p, f.up_seed)
        dx_SD.index_add_(0, self.rows_H, dx_HD.to(dx_SD.dtype))

    def _pick(self, x_SI: Tensor) -> Tensor:
        return x_SI.index_select(0, self.rows_H).to(self.factors.dtype)


class SlotHot:
    """What one adapter adds, for all rows where they are: kernels skip an expert that has no slot among the factors."""

    def __init__(self, factors: FactorsInPass, rows: Rows) -> None:
        self.factors, self.token_S, self.ends_E = factors, rows.token_S, rows.ends_E
        ids_N = factors.expert_ids_N
        slot_N = torch.arange(len(ids_N), dtype=torch.int32, device=ids_N.device)
        self.slot_E = torch.full_like(rows.ends_E, -1).index_copy_(0, ids_N, slot_N)

    def up(self, experts: Any, up_SPF: Tensor, x_SD: Tensor) -> None:
        """Adds the update of the projections into the experts to `up`."""
        f = self.factors
        z_SPR = self._product(_dropped(x_SD.to(f.dtype), f.p, f.up_seed), f.A_up, scaling=f.scaling)
        parts = up_parts(experts, up_SPF)
        for part, z_SR, B in zip(parts, f.split(z_SPR, 1), f.split(f.B_up, 1), strict=True):
            self._product(z_SR, B, add_to_SO=part)

    def down(self, y_SD: Tensor, act_SF: Tensor) -> None:
        """Adds the update of the projection out of the experts to `y`."""
        f = self.factors
        z_SR = self._product(_dropped(act_SF.to(f.dtype), f.p, f.down_seed), f.A_down, scaling=f.scaling)
        self._product(z_SR, f.B_down, add_to_SO=y_SD)

    def down_backward(
        self, u_SF: Tensor, dweight_S: Tensor, act_SF: Tensor, grad_SD: Tensor, weight_S1: Tensor
    ) -> None:
        """As `Hot.down_backward`."""
        f = self.factors
        act_SF, grad_SD = _dropped(act_SF.to(f.dtype), f.p, f.down_seed), grad_SD.to(f.dtype)
        g_SR = self._product(grad_SD, f.B_down.transpose(1, 2), scaling=f.scaling)
        z_SR = self._product(act_SF, f.A_down)
        wide = dweight_S.dtype
        dweight_S += torch.linalg.vecdot(g_SR.to(wide), z_SR.to(wide))
        dA = self._outer((g_SR * weight_S1).to(f.dtype), act_SF) if f.trains_A else None
        f.down_gradients = dA, self._outer(grad_SD, (z_SR * (weight_S1 * f.scaling)).to(f.dtype))
        self._add_dropped_product(u_SF, g_SR, f.A_down, f.down_seed)

    def up_backward(self, experts: Any, dx_SD: Tensor, dup_SPF: Tensor, hidden_TD: Tensor) -> None:
        """As `Hot.up_backward`."""
        f = self.factors
        x, row_S = hidden_TD.to(f.dtype), None if f.p else self.token_S
        if f.p:  # each row has a mask of its own
            x = _dropped(x.index_select(0, self.token_S), f.p, f.up_seed)
        z_SPR = self._product(x, f.A_up, row_S=row_S, scaling=f.scaling)
        parts = up_parts(experts, dup_SPF.to(f.dtype))
        dB = torch.cat([self._outer(part, z) for part, z in zip(parts, f.split(z_SPR, 1), strict=True)], dim=1)
        pairs = zip(parts, f.split(f.B_up, 1), strict=True)
        g_parts = [self._product(part, B.transpose(1, 2), scaling=f.scaling) for part, B in pairs]
        g_SPR = torch.cat(g_parts, dim=1)
        f.up_gradients = self._outer(g_SPR, x, row_S) if f.trains_A else None, dB
        self._add_dropped_product(dx_SD, g_SPR, f.A_up, f.up_seed)

    def _product(self, x_SI: Tensor, weight_NOI: Tensor, **options: Any) -> Tensor:
        return _gemm().grouped_gemm(x_SI, weight_NOI, self.ends_E, self.slot_E, **options)

    def _outer(self, y_SO: Tensor, x_SI: Tensor, row_S: Tensor | None = None) -> Tensor:
        return _gemm().grouped_outer(y_SO, x_SI, self.ends_E, self.factors.expert_ids_N, row_S=row_S)

    def _add_dropped_product(self, y_SI: Tensor, g_SR: Tensor, A: Tensor, seed: Any) -> None:
        if p := self.factors.p:
            y_SI += _dropped(self._product(g_SR, A.transpose(1, 2)), p, seed).to(y_SI.dtype)
        else:
            self._product(g_SR, A.transpose(1, 2), add_to_SO=y_SI)


def _linear(x_SI: Tensor, weight_GOI: Tensor, groups: Groups) -> Tensor:
    if torch.compiler.is_compiling():
        return _opaque_linear(x_SI, weight_GOI, groups.ends_G)
    if _kernels_for(x_SI.device, x_SI.dtype):
        return _gemm().grouped_gemm(x_SI, weight_GOI, groups.ends_G)
    return grouped_linear(x_SI, weight_GOI, groups)


def _outer(y_SO: Tensor, x_SI: Tensor, groups: Groups) -> Tensor:
    if torch.compiler.is_compiling():
        return _opaque_outer(y_SO, x_SI, groups.ends_G)
    if _kernels_for(x_SI.device, x_SI.dtype):
        return _gemm().grouped_outer(y_SO, x_SI, groups.ends_G)
    return grouped_outer(y_SO, x_SI, groups)


# What torch.compile puts into its graph as one operation: it knows torch's grouped product in bfloat16 only. The plain
# path calls it by its name, and needs its gradient.
@torch.library.custom_op("hotlora::grouped_linear", mutates_args=())
def _opaque_linear(x_SI: Tensor, weight_GOI: Tensor, ends_G: Tensor) -> Tensor:
    tail_S = torch.arange(x_SI.shape[0], device=x_SI.device) >= ends_G[-1]
    return _linear(x_SI, weight_GOI, Groups(ends_G, tail_S.unsqueeze(1)))


@_opaque_linear.register_fake
def _(x_SI: Tensor, weight_GOI: Tensor, ends_G: Tensor) -> Tensor:
    return x_SI.new_empty(x_SI.shape[0], weight_GOI.shape[1])


@torch.library.custom_op("hotlora::grouped_outer", mutates_args=())
def _opaque_outer(y_SO: Tensor, x_SI: Tensor, ends_G: Tensor) -> Tensor:
    return _outer(y_SO, x_SI, Groups(ends_G))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _opaque_linear_backward(ctx: Any, grad_SO: Tensor) -> tuple[Tensor | None, ...]:
    x_SI, weight_GOI, ends_G = ctx.saved_tensors
    dx_SI = _opaque_linear(grad_SO, weight_GOI.transpose(1, 2), ends_G) if ctx.needs_input_grad[0] else None
    return dx_SI, _opaque_outer(grad_SO, x_SI, ends_G) if ctx.needs_input_grad[1] else None, None


_opaque_linear.register_autograd(_opaque_linear_backward, setup_context=_save)


@_opaque_outer.register_fake
def _(y_SO: Tensor, x_SI: Tensor, ends_G: Tensor) -> Tensor:
    return x_SI.new_empty(len(ends_G), y_SO.shape[1], x_SI.shape[1])


@torch.library.custom_op("hotlora::dropped", mutates_args=())
def _opaque_dropped(x_HI: Tensor, p: float, seed: Tensor) -> Tensor:
    return _dropped(x_HI, p, int(seed))


@_opaque_dropped.register_fake
def _(x_HI: Tensor, p: float, seed: Tensor) -> Tensor:
    return torch.empty_like(x_HI)


def _dropped(x_HI: Tensor, p: float, seed: Any) -> Tensor:
    """The same seed gives the same mask."""
    if p == 0:
        return x_HI
    if torch.compiler.is_compiling():
        return _opaque_dropped(x_HI, p, seed)
    generator = torch.Generator(x_HI.device).manual_seed(seed)
    mask_HI = torch.empty_like(x_HI).bernoulli_(1 - p, generator=generator)
    return (x_HI * mask_HI) / (1 - p)


def _kernels_for(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products are made by our kernels."""
    chosen = os.environ.get("HOTLORA_KERNELS", "")
    if chosen not in ("", "torch", "triton"):
        raise HotLoraError(f"HOTLORA_KERNELS is {chosen!r}: it must be torch or triton, or not be set.")
    if chosen == "torch" or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        if major < 8 or (not chosen and dtype == torch.bfloat16 and major in _TORCH_HAS_A_KERNEL):
            return False
    elif device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1" or not chosen:
        return False
    if chosen and not _has_triton():
        raise HotLoraError("HOTLORA_KERNELS is triton, but Triton is not installed: pip install triton.")
    return _has_triton()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _gemm() -> Any:
    from .kernels import gemm  # it needs Triton, which is optional

    return gemm
