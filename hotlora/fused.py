"""The routed layer as one autograd function, for frozen experts.

It computes what `experts.plain_routed_experts` computes, and keeps less for backward: the input `[T, D]`, the up
projection's output `[S, P*F]`, the order of the rows and the routing weights. The gate, and what the low-rank factors
make of their inputs, are computed again. The routing weights' gradient needs no output of the experts: for y = W h and
a gradient g of w * y, <g, y> = <W^T g, h>, and W^T g is at hand.

`spans` has the products as a CPU makes them, `grouped` as a GPU and torch.compile do. A compiled graph has the whole
layer in it, without a break: forward and backward are traced, and each grouped product is one operation of the graph.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from . import grouped, spans
from .experts import (
    FactorsInPass,
    HotFactors,
    HotWeights,
    compute_dtype,
    has_norm_after,
    local_weight,
    plain_routed_experts,
    up_projection,
)


def routed_experts(
    experts: Any,
    hidden_TD: Tensor,
    top_k_index_TK: Tensor,
    top_k_weights_TK: Tensor,
    factors: Sequence[HotFactors | HotWeights] = (),
) -> Tensor:
    """`experts.plain_routed_experts`, by the fastest way that there is for these experts on this device."""
    factors = [adapter for adapter in factors if len(adapter.expert_ids_N) > 0]
    low_rank = [adapter for adapter in factors if isinstance(adapter, HotFactors) and adapter.is_low_rank]
    if not _is_fusable(experts) or len(low_rank) < len(factors):
        return plain_routed_experts(experts, hidden_TD, top_k_index_TK, top_k_weights_TK, factors)
    tensors = [t for f in low_rank for t in (f.A_gate_up, f.B_gate_up, f.A_down, f.B_down)]
    # `spans` reads how many rows each expert has, which a compiled graph cannot.
    way = spans if hidden_TD.device.type == "cpu" and not torch.compiler.is_compiling() else grouped
    output: Tensor = RoutedExperts.apply(way, experts, low_rank, hidden_TD, top_k_index_TK, top_k_weights_TK, *tensors)
    return output


IMPLEMENTATION = "hotlora"
"""The frozen base on the same code path: `model.set_experts_implementation("hotlora")`."""
ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, routed_experts)
_WITH_FACTORS = "hotlora_with_factors"


def has_own_forward(experts: Any) -> bool:
    """Whether something must happen around the experts' own forward: tokens that go to other processes (expert
    parallelism), or weights that are gathered for it (FSDP)."""
    return "forward" in vars(experts) or hasattr(experts, "unshard")


@contextmanager
def adapted(experts: Any, factors: Sequence[HotFactors | HotWeights]) -> Iterator[None]:
    """Inside, the experts' own forward computes `routed_experts` with `factors`, on what reaches it."""
    config = experts.config
    experts.config = SimpleNamespace(_experts_implementation=_WITH_FACTORS)
    experts.hotlora_factors = factors
    try:
        yield
    finally:
        experts.config = config
        del experts.hotlora_factors


def _with_factors(experts: Any, hidden_TD: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor) -> Tensor:
    return routed_experts(experts, hidden_TD, top_k_index_TK, top_k_weights_TK, experts.hotlora_factors)


ALL_EXPERTS_FUNCTIONS.register(_WITH_FACTORS, _with_factors)


def _is_fusable(experts: Any) -> bool:
    """Not for weights that train, nor for quantized ones, which have a product of their own."""
    if has_norm_after(experts):
        return False
    weights = (getattr(experts, up_projection(experts)), experts.down_proj)
    return all(isinstance(weight, Tensor) and not weight.requires_grad for weight in weights)


class RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        way: Any,
        experts: Any,
        factors: list[HotFactors],
        hidden_TD: Tensor,
        top_k_index_TK: Tensor,
        top_k_weights_TK: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        """way: `spans` or `grouped`. tensors: four of each adapter, in the order of `HotFactors`."""
        ctx.way, ctx.experts, ctx.factors = way, experts, factors
        ctx.autocast = _Autocast(hidden_TD.device.type)
        ctx.compute_dtypes = [compute_dtype(adapter) for adapter in factors]
        ctx.seeds = [_two_seeds() if adapter.dropout else (0, 0) for adapter in factors]
        ctx.blocks = way.Rows.blocks(experts.num_experts, top_k_index_TK, _row_bytes(experts))
        adapters, ups = _cast(ctx, tensors), []
        y_SD: Any = None
        for rows in ctx.blocks:
            up_SPF, some_SD = _forward(ctx, rows, adapters, hidden_TD)
            y_SD = _placed(y_SD, rows, some_SD * _by_rows(rows, top_k_weights_TK), top_k_index_TK.numel())
            ups.append(up_SPF)
        ctx.save_for_backward(hidden_TD, top_k_weights_TK, *ups, *tensors)
        return _summed_by_token(y_SD, top_k_index_TK.shape[1]).to(hidden_TD.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, top_k_weights_TK, *saved = ctx.saved_tensors
        ups, tensors = saved[: len(ctx.blocks)], saved[len(ctx.blocks) :]
        adapters = _cast(ctx, tensors)
        dx_SD: Any = None
        dweight_S: Any = None
        for rows, up_SPF in zip(ctx.blocks, ups, strict=True):
            some_SD, its_S = _backward(ctx, rows, adapters, up_SPF, hidden_TD, top_k_weights_TK, grad_TD)
            dx_SD = _placed(dx_SD, rows, some_SD, top_k_weights_TK.numel())
            dweight_S = _placed(dweight_S, rows, its_S, top_k_weights_TK.numel())
        dhidden_TD = _summed_by_token(dx_SD, top_k_weights_TK.shape[1]).to(hidden_TD.dtype)
        dweight_TK = dweight_S.view(top_k_weights_TK.shape).to(top_k_weights_TK.dtype)
        made = [grad for adapter in adapters for grad in (*adapter.up_gradients, *adapter.down_gradients)]
        grads = [None if grad is None else grad.to(tensor.dtype) for grad, tensor in zip(made, tensors, strict=True)]
        return None, None, None, dhidden_TD, None, dweight_TK, *grads


def _forward(ctx: Any, rows: Any, adapters: Sequence[FactorsInPass], hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Of a block of rows the outputs of the up projection `[S, P*F]` and of the experts `[S, D]`."""
    experts, hots = ctx.experts, [ctx.way.hot(adapter, rows) for adapter in adapters]
    with ctx.autocast.off():
        x_SD = hidden_TD.index_select(0, rows.token_S)
        up_SPF = _base_linear(experts, up_projection(experts), x_SD, rows)
        for hot in hots:
            hot.up(experts, up_SPF, x_SD)
        del x_SD
    with ctx.autocast.again():
        act_SF = _activation(experts, up_SPF)
    with ctx.autocast.off():
        y_SD = _base_linear(experts, "down_proj", act_SF, rows)
        for hot in hots:
            hot.down(y_SD, act_SF)
    return up_SPF, y_SD


def _backward(
    ctx: Any,
    rows: Any,
    adapters: Sequence[FactorsInPass],
    up_SPF: Tensor,
    hidden_TD: Tensor,
    top_k_weights_TK: Tensor,
    grad_TD: Tensor,
) -> tuple[Tensor, Tensor]:
    """Of a block of rows the gradients of the experts' input `[S, D]` and of the routing weights `[S]`."""
    hots = [ctx.way.hot(adapter, rows) for adapter in adapters]
    weight_S1 = _by_rows(rows, top_k_weights_TK)
    dup_SPF, dweight_S = _down_backward(ctx, rows, hots, up_SPF, grad_TD.index_select(0, rows.token_S), weight_S1)
    dx_SD = _base_linear_backward(ctx.experts, up_projection(ctx.experts), dup_SPF, rows)
    for hot in hots:
        hot.up_backward(ctx.experts, dx_SD, dup_SPF, hidden_TD)
    return dx_SD, dweight_S


def _down_backward(
    ctx: Any, rows: Any, hots: Sequence[Any], up_SPF: Tensor, grad_SD: Tensor, weight_S1: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the up projection's output and of the routing weights `[S]`.

    A function of its own, so that what is as large as the rows is given back before the next half.
    """
    experts = ctx.experts
    with ctx.autocast.again():
        act_SF, pull_back = _activation_and_pull_back(experts, up_SPF)
    # The gradient of the activation, not yet times the routing weights.
    u_SF = _base_linear_backward(experts, "down_proj", grad_SD, rows)
    wide = torch.promote_types(u_SF.dtype, torch.float32)
    dweight_S = torch.linalg.vecdot(u_SF.to(wide), act_SF.to(wide))
    if experts.has_bias:
        bias_EO = local_weight(experts, "down_proj_bias").to(grad_SD.dtype)
        dweight_S += rows.dot_bias(grad_SD, bias_EO).to(wide)
    for hot in hots:
        hot.down_backward(u_SF, dweight_S, act_SF, grad_SD, weight_S1)
    return pull_back((u_SF * weight_S1).to(act_SF.dtype)), dweight_S


def _row_bytes(experts: Any) -> int:
    """Of a row's widest array."""
    weight = local_weight(experts, up_projection(experts))
    return max(weight.shape[1:]) * int(weight.element_size())


def _cast(ctx: Any, tensors: Sequence[Tensor]) -> list[FactorsInPass]:
    return [
        FactorsInPass(factors, tensors[4 * i : 4 * i + 4], dtype, seeds, at_once=ctx.way is grouped)
        for i, (factors, dtype, seeds) in enumerate(zip(ctx.factors, ctx.compute_dtypes, ctx.seeds, strict=True))
    ]


def _two_seeds() -> tuple[Any, Any]:
    """Drawn on the CPU, where no device has to be waited for. Numbers, but tensors in a compiled graph."""
    seeds = torch.randint(2**62, (2,))
    first, second = seeds[0], seeds[1]
    return (first, second) if torch.compiler.is_compiling() else (int(first), int(second))


def _activation(experts: Any, up_SPF: Tensor) -> Tensor:
    activation: Tensor = experts._apply_gate(up_SPF) if experts.has_gate else experts.act_fn(up_SPF)
    return activation


def _activation_and_pull_back(experts: Any, up_SPF: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The activation, and the function that gives its input's gradient for its own."""
    if torch.compiler.is_compiling():  # which does not trace autograd.grad
        act_SF, pull_back, *_ = torch.func.vjp(lambda up: _activation(experts, up), up_SPF)
        return act_SF, lambda grad_SF: pull_back(grad_SF)[0]
    with torch.enable_grad():
        up_SPF = up_SPF.detach().requires_grad_()
        act_SF = _activation(experts, up_SPF)
    return act_SF.detach(), lambda grad_SF: torch.autograd.grad(act_SF, up_SPF, grad_SF)[0]


def _base_linear(experts: Any, name: str, x_SI: Tensor, rows: Any) -> Tensor:
    """The frozen product of one projection with its bias `[S, O]`; zeros in rows of no expert here."""
    weight = local_weight(experts, name)
    weight_EIO = weight if experts.is_transposed else weight.transpose(1, 2)
    y_SO: Tensor = rows.product(x_SI.to(weight_EIO.dtype), weight_EIO)
    if experts.has_bias:
        rows.add_bias(y_SO, local_weight(experts, f"{name}_bias"))
    return y_SO


def _base_linear_backward(experts: Any, name: str, grad_SO: Tensor, rows: Any) -> Tensor:
    """The gradient of the projection's input `[S, I]`; zeros in rows of no expert here."""
    weight = local_weight(experts, name)
    weight_EOI = weight.transpose(1, 2) if experts.is_transposed else weight
    grad_SI: Tensor = rows.product(grad_SO.to(weight_EOI.dtype), weight_EOI)
    return grad_SI


def _by_rows(rows: Any, weights_TK: Tensor) -> Tensor:
    """`[S, 1]`"""
    return weights_TK.reshape(-1).index_select(0, rows.order_S).unsqueeze(1)


def _placed(all_S: Tensor | None, rows: Any, some_S: Tensor, num_rows: int) -> Tensor:
    """`all_S` with a block's rows in the places that the router gave them; made with the first block."""
    if all_S is None:
        all_S = some_S.new_empty(num_rows, *some_S.shape[1:])
    return all_S.index_copy_(0, rows.order_S, some_S)


def _summed_by_token(x_SD: Tensor, top_k: int) -> Tensor:
    """`[T, D]`: the sum over each token's K rows, in the order in which the router chose them."""
    return x_SD.view(-1, top_k, x_SD.shape[1]).sum(dim=1)


class _Autocast:
    """The autocast in force when this was made."""

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        self.enabled = torch.is_autocast_enabled(device_type)
        self.dtype = torch.get_autocast_dtype(device_type)

    def again(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled)

    def off(self) -> AbstractContextManager[Any]:
        """For products whose dtypes are chosen here."""
        return torch.autocast(self.device_type, enabled=False)
