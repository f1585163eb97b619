"""The routed layer as one autograd function, for frozen experts on a CPU.

It computes what `experts.plain_routed_experts` computes, with fewer passes over memory and less kept for backward.
Rows are sorted by expert, so an expert's rows are a slice: the low-rank products of a hot expert work on that slice in
place, and nothing is gathered for them. Kept are the input `[T, D]`, the up projection's output `[S, P*F]`, the
order of the rows and the routing weights. The gate, and what the low-rank factors make of their inputs, are computed
again. The routing weights' gradient needs no output of the experts: for y = W h and a gradient g of w * y,
<g, y> = <W^T g, h>, and W^T g is at hand.

Shape suffixes as in `experts`; n rows of one expert.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .experts import HotFactors, compute_dtype, has_norm_after, plain_routed_experts, up_projection


def routed_experts(
    experts: Any,
    hidden_TD: Tensor,
    top_k_index_TK: Tensor,
    top_k_weights_TK: Tensor,
    factors: Sequence[HotFactors] = (),
) -> Tensor:
    """`experts.plain_routed_experts`, by the fastest way that there is for these experts on this device."""
    factors = [adapter for adapter in factors if len(adapter.expert_ids_N) > 0]
    if not _is_fusable(experts, hidden_TD):
        return plain_routed_experts(experts, hidden_TD, top_k_index_TK, top_k_weights_TK, factors)
    tensors = [t for f in factors for t in (f.A_gate_up, f.B_gate_up, f.A_down, f.B_down)]
    output: Tensor = _RoutedExperts.apply(experts, factors, hidden_TD, top_k_index_TK, top_k_weights_TK, *tensors)
    return output


# The frozen base on the same code path: `model.set_experts_implementation("hotlora")`.
ALL_EXPERTS_FUNCTIONS.register("hotlora", routed_experts)


def _is_fusable(experts: Any, hidden_TD: Tensor) -> bool:
    """A GPU's number of rows cannot be read without waiting for it; quantized weights have a product of their own."""
    if hidden_TD.device.type != "cpu" or torch.compiler.is_compiling() or has_norm_after(experts):
        return False
    weights = (getattr(experts, up_projection(experts)), experts.down_proj)
    return all(isinstance(weight, Tensor) and not weight.requires_grad for weight in weights)


@dataclass(frozen=True)
class _Rows:
    """The S assignments, sorted by expert."""

    order_S: Tensor
    """int64: the place of each sorted row among the assignments `[T * K]`."""
    top_k: int
    spans: list[tuple[int, int, int]]
    """(expert, first row, last row + 1) of the experts that got a row."""

    @property
    def token_S(self) -> Tensor:
        return self.order_S // self.top_k

    def summed_by_token(self, x_SD: Tensor) -> Tensor:
        """`[T, D]`: the sum over each token's K rows, in the order in which the router chose them."""
        unsorted_SD = torch.empty_like(x_SD).index_copy_(0, self.order_S, x_SD)
        return unsorted_SD.view(-1, self.top_k, x_SD.shape[1]).sum(dim=1)


class _Hot:
    """One adapter's factors in the dtype of their products, and where its hot rows are."""

    def __init__(self, factors: HotFactors, tensors: Sequence[Tensor], rows: _Rows, dtype: torch.dtype) -> None:
        self.A_up, self.B_up, self.A_down, self.B_down = (t.detach().to(dtype) for t in tensors)
        self.scaling, self.p, self.dtype = factors.scaling, factors.dropout, dtype
        slots = {expert: n for n, expert in enumerate(factors.expert_ids_N.tolist())}
        self.spans = [(slots[expert], a, b) for expert, a, b in rows.spans if expert in slots]

    def split(self, x: Tensor, dim: int) -> Sequence[Tensor]:
        """What is the gate's and what the up projection's, of `[., P*R]` or `[P*F, .]`."""
        return x.chunk(self.A_up.shape[1] // self.A_down.shape[1], dim)

    def dropped(self, seed: int) -> Iterator[tuple[int, int, int, "_Dropout"]]:
        """The hot spans, each with its mask; the same seed gives the same masks."""
        generator = torch.Generator().manual_seed(seed)
        for n, a, b in self.spans:
            yield n, a, b, _Dropout(self.p, generator)


class _Dropout:
    """One span's mask, drawn at first use."""

    def __init__(self, p: float, generator: torch.Generator) -> None:
        self.p, self.generator, self.mask = p, generator, torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        if self.p == 0:
            return x
        if not self.mask.numel():
            self.mask = torch.empty_like(x).bernoulli_(1 - self.p, generator=self.generator)
        return (x * self.mask).div_(1 - self.p)


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        experts: Any,
        factors: list[HotFactors],
        hidden_TD: Tensor,
        top_k_index_TK: Tensor,
        top_k_weights_TK: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.experts, ctx.factors, ctx.autocast = experts, factors, _ambient_autocast()
        ctx.compute_dtype = [compute_dtype(adapter) for adapter in factors]
        ctx.seeds = [tuple(torch.randint(2**62, (2,)).tolist()) if f.dropout else (0, 0) for f in factors]
        ctx.rows = rows = _sorted_rows(experts, top_k_index_TK)
        weight_S1 = top_k_weights_TK.reshape(-1).index_select(0, rows.order_S).unsqueeze(1)
        with torch.autocast("cpu", enabled=False):
            hots = _hots(ctx, tensors)
            x_SD = hidden_TD.index_select(0, rows.token_S)
            up_SPF = _base_linear(experts, up_projection(experts), x_SD, rows)
            for hot, (seed, _) in zip(hots, ctx.seeds, strict=True):
                for n, a, b, drop in hot.dropped(seed):
                    z = (drop(x_SD[a:b].to(hot.dtype)) @ hot.A_up[n].T).mul_(hot.scaling)
                    parts = zip(_parts(experts, up_SPF[a:b]), hot.split(z, 1), hot.split(hot.B_up[n], 0), strict=True)
                    for part, z_nR, B in parts:
                        _add_product(part, z_nR, B.T)
            del x_SD
        with ctx.autocast():
            act_SF = _activation(experts, up_SPF)
        with torch.autocast("cpu", enabled=False):
            y_SD = _base_linear(experts, "down_proj", act_SF, rows)
            for hot, (_, seed) in zip(hots, ctx.seeds, strict=True):
                for n, a, b, drop in hot.dropped(seed):
                    z = (drop(act_SF[a:b].to(hot.dtype)) @ hot.A_down[n].T).mul_(hot.scaling)
                    _add_product(y_SD[a:b], z, hot.B_down[n].T)
            ctx.save_for_backward(hidden_TD, top_k_weights_TK, up_SPF, *tensors)
            return rows.summed_by_token(y_SD * weight_S1).to(hidden_TD.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        experts, rows = ctx.experts, ctx.rows
        hidden_TD, top_k_weights_TK, up_SPF, *tensors = ctx.saved_tensors
        hots, token_S = _hots(ctx, tensors), rows.token_S
        grads = [[torch.zeros_like(tensor) for tensor in tensors[i : i + 4]] for i in range(0, len(tensors), 4)]
        weight_S1 = top_k_weights_TK.reshape(-1).index_select(0, rows.order_S).unsqueeze(1)

        with torch.enable_grad(), ctx.autocast():
            up_SPF = up_SPF.detach().requires_grad_()
            act_SF = _activation(experts, up_SPF)
        act = act_SF.detach()
        grad_SD = grad_TD.index_select(0, token_S)
        # The gradient of the activation, not yet times the routing weights.
        u_SF = _base_linear_backward(experts, "down_proj", grad_SD, rows)
        for hot, (_, seed), (_, _, dA, dB) in zip(hots, ctx.seeds, grads, strict=True):
            for n, a, b, drop in hot.dropped(seed):
                act_nF, g_nD, weight_n1 = drop(act[a:b].to(hot.dtype)), grad_SD[a:b].to(hot.dtype), weight_S1[a:b]
                g_nR = (g_nD @ hot.B_down[n]).mul_(hot.scaling)
                z_nR = act_nF @ hot.A_down[n].T
                dA[n] = (g_nR * weight_n1).to(hot.dtype).T @ act_nF
                dB[n] = g_nD.T @ (z_nR * (weight_n1 * hot.scaling)).to(hot.dtype)
                _add_product(u_SF[a:b], g_nR, hot.A_down[n], drop)
        dweight_S = torch.linalg.vecdot(u_SF.to(_wide(u_SF)), act.to(_wide(u_SF)))
        if experts.has_bias:
            for expert, a, b in rows.spans:
                dweight_S[a:b] += (grad_SD[a:b] @ experts.down_proj_bias[expert]).to(dweight_S.dtype)
        del grad_SD
        (dup_SPF,) = torch.autograd.grad(act_SF, up_SPF, (u_SF * weight_S1).to(act_SF.dtype))
        del act_SF, act, u_SF

        dx_SD = _base_linear_backward(experts, up_projection(experts), dup_SPF, rows)
        for hot, (seed, _), (dA, dB, _, _) in zip(hots, ctx.seeds, grads, strict=True):
            for n, a, b, drop in hot.dropped(seed):
                x_nD = drop(hidden_TD.index_select(0, token_S[a:b]).to(hot.dtype))
                z_nPR = (x_nD @ hot.A_up[n].T).mul_(hot.scaling)
                grad_parts = [part.to(hot.dtype) for part in _parts(experts, dup_SPF[a:b])]
                pairs = zip(grad_parts, hot.split(z_nPR, 1), strict=True)
                dB[n] = torch.cat([part.T @ z_nR for part, z_nR in pairs])
                B_parts = hot.split(hot.B_up[n], 0)
                g_nPR = torch.cat([part @ B for part, B in zip(grad_parts, B_parts, strict=True)], dim=1)
                g_nPR.mul_(hot.scaling)
                dA[n] = g_nPR.T @ x_nD
                _add_product(dx_SD[a:b], g_nPR, hot.A_up[n], drop)
        dhidden_TD = rows.summed_by_token(dx_SD).to(hidden_TD.dtype)
        dweight_TK = torch.empty_like(dweight_S).index_copy_(0, rows.order_S, dweight_S).view(top_k_weights_TK.shape)
        flat = [grad for adapter in grads for grad in adapter]
        return None, None, dhidden_TD, None, dweight_TK.to(top_k_weights_TK.dtype), *flat


def _hots(ctx: Any, tensors: Sequence[Tensor]) -> list[_Hot]:
    return [
        _Hot(factors, tensors[4 * i : 4 * i + 4], ctx.rows, dtype)
        for i, (factors, dtype) in enumerate(zip(ctx.factors, ctx.compute_dtype, strict=True))
    ]


def _sorted_rows(experts: Any, top_k_index_TK: Tensor) -> _Rows:
    """Rows of experts on other devices come last, and are in no span."""
    expert_S, order_S = torch.sort(top_k_index_TK.reshape(-1))
    ends = torch.searchsorted(expert_S, torch.arange(experts.num_experts), right=True).tolist()
    spans = [(e, a, b) for e, (a, b) in enumerate(zip([0, *ends], ends, strict=False)) if b > a]
    return _Rows(order_S, top_k_index_TK.shape[1], spans)


def _activation(experts: Any, up_SPF: Tensor) -> Tensor:
    activation: Tensor = experts._apply_gate(up_SPF) if experts.has_gate else experts.act_fn(up_SPF)
    return activation


def _base_linear(experts: Any, name: str, x_SI: Tensor, rows: _Rows) -> Tensor:
    """The frozen product of one projection with its bias `[S, O]`; zeros in rows of no span."""
    weight_EIO = getattr(experts, name) if experts.is_transposed else getattr(experts, name).transpose(1, 2)
    y_SO = _product(x_SI.to(weight_EIO.dtype), weight_EIO, rows)
    if experts.has_bias:
        bias_EO = getattr(experts, f"{name}_bias")
        for expert, a, b in rows.spans:
            y_SO[a:b] += bias_EO[expert]
    return y_SO


def _base_linear_backward(experts: Any, name: str, grad_SO: Tensor, rows: _Rows) -> Tensor:
    """The gradient of the projection's input `[S, I]`; zeros in rows of no span."""
    weight_EOI = getattr(experts, name).transpose(1, 2) if experts.is_transposed else getattr(experts, name)
    return _product(grad_SO.to(weight_EOI.dtype), weight_EOI, rows)


def _product(x_SI: Tensor, weight_EIO: Tensor, rows: _Rows) -> Tensor:
    y_SO = x_SI.new_empty(x_SI.shape[0], weight_EIO.shape[2])
    end = 0
    for expert, a, end in rows.spans:
        torch.mm(x_SI[a:end], weight_EIO[expert], out=y_SO[a:end])
    y_SO[end:] = 0
    return y_SO


def _parts(experts: Any, up_nPF: Tensor) -> Sequence[Tensor]:
    """The gate's and the up projection's share of what experts have together, as views; all of it without a gate."""
    if not experts.has_gate:
        return [up_nPF]
    return up_nPF.chunk(2, dim=1) if experts.is_concatenated else [up_nPF[:, 0::2], up_nPF[:, 1::2]]


def _add_product(y: Tensor, a: Tensor, b: Tensor, drop: Any = None) -> None:
    """y += drop(a @ b), in y's dtype and in place."""
    if y.dtype == a.dtype and (drop is None or drop.p == 0):
        y.addmm_(a, b)
    else:
        product = a @ b
        y.add_((product if drop is None else drop(product)).to(y.dtype))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _ambient_autocast:
    """The autocast in force when this was made, to be entered again."""

    def __init__(self) -> None:
        self.enabled, self.dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def __call__(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype=self.dtype, enabled=self.enabled)
