"""The routed layer: frozen experts, and updates on the rows of the hot ones, as one autograd function.

Rows (token-expert assignments) are sorted by expert once, in the order in which the weights lie in memory, because a
grouped product needs both in the same order. The frozen products are transformers' own, row for row. Only the rows of
hot experts meet an update, which is made of activations, never of weights: nothing of the size of an expert is formed.

It keeps for backward the input `[T, D]`, the up projection's output `[S, P*F]`, the order of the rows and the routing
weights. The gate, and what the factors make of their inputs, are computed again. The routing weights' gradient needs no
output of the experts: for y = W h and a gradient g of w * y, <g, y> = <W^T g, h>, and W^T g is at hand.

`cpu` and `gpu` have the products, `updates` what is added; `kernels.fused` has the whole layer in a few kernels. A
compiled graph has the whole layer in it, without a break: forward and backward are traced, and each grouped product is
one operation of the graph.

Shape suffixes: E experts, K experts per token, T tokens, S = T*K rows (in a block: of the block), D model width,
F expert width, P = 2 projections into an expert (gate and up), or 1 where experts have no gate.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..base.errors import HotLoraError
from ..hf.experts_view import ExpertsView
from ..hf.internals import internal
from . import cpu, gpu
from .updates import Update, compute_dtype, dots, rows_at_once


def routed_experts(
    experts: Any, hidden_TD: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor, updates: Sequence[Update] = ()
) -> Tensor:
    """Output `[T, D]` of an experts module, with `updates` on its hot experts.

    Several updates add up. With B = 0, or without updates, this is transformers' `grouped_mm_experts_forward` bit for
    bit. An index equal to `num_experts` (an expert on another device, under expert parallelism) contributes nothing.
    Weights of the experts that train get their gradients; what is quantized gets none.
    """
    updates = [update for update in updates if len(update.expert_ids_N) > 0]
    # `cpu` reads how many rows each expert has, which a compiled graph cannot.
    products = cpu if hidden_TD.device.type == "cpu" and not torch.compiler.is_compiling() else gpu
    return routed_experts_by(products, ExpertsView(experts), hidden_TD, top_k_index_TK, top_k_weights_TK, updates)


def routed_experts_by(
    products: Any,
    view: ExpertsView,
    hidden_TD: Tensor,
    top_k_index_TK: Tensor,
    top_k_weights_TK: Tensor,
    updates: Sequence[Update],
) -> Tensor:
    """`routed_experts` by the products of `cpu` or `gpu`. updates: none without an expert."""
    if products is gpu and gpu.use_fused(hidden_TD):
        from .kernels import fused  # which needs Triton

        if fused.covers(view, hidden_TD, top_k_weights_TK, updates):
            (update,) = updates or (None,)
            seeds = _two_seeds() if update is not None and update.dropout else (0, 0)
            its = [] if update is None else update.tensors
            arguments = (hidden_TD, top_k_index_TK, top_k_weights_TK, *view.tensors(), *its)
            summed: Tensor = fused.FusedExperts.apply(view, update, seeds, *arguments)
            return summed
    layer = Layer(view, updates, products)
    tensors = [*view.tensors(), *(tensor for update in updates for tensor in update.tensors)]
    return RoutedExperts.apply(layer, hidden_TD, top_k_index_TK, top_k_weights_TK, *tensors)


IMPLEMENTATION = "hotlora"
"""The layer's name among transformers' own."""


def use_routed_layer(model: Any) -> None:
    """Makes `routed_experts` the forward of a transformers model's experts, as `set_experts_implementation` does."""
    _register()
    model.set_experts_implementation(IMPLEMENTATION)


@contextmanager
def updates_on(experts: Any, updates: Sequence[Update]) -> Iterator[None]:
    """Inside, the experts' own forward computes `routed_experts` with `updates`, on what reaches it."""
    experts.hotlora_updates = updates
    try:
        yield
    finally:
        del experts.hotlora_updates


def _forward_of_experts(experts: Any, hidden_TD: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor) -> Tensor:
    updates = getattr(experts, "hotlora_updates", ())
    return routed_experts(experts, hidden_TD, top_k_index_TK, top_k_weights_TK, updates)


def _register() -> None:
    internal("transformers.integrations.moe:ALL_EXPERTS_FUNCTIONS").register(IMPLEMENTATION, _forward_of_experts)


with suppress(HotLoraError):  # which is told where the layer is asked for
    _register()  # a pickled model has the name in its config, and is read back by processes that ask for nothing


@dataclass(frozen=True)
class Layer:
    """What autograd need not know of."""

    view: ExpertsView
    updates: Sequence[Update]
    products: Any
    """`cpu` or `gpu`"""


class RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        layer: Layer,
        hidden_TD: Tensor,
        top_k_index_TK: Tensor,
        top_k_weights_TK: Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:
        """tensors: as `ExpertsView.tensors`, then each update's."""
        view, (width, expert_width) = layer.view, layer.view.widths
        ctx.layer, ctx.autocast = layer, Autocast(hidden_TD.device.type)
        ctx.dtypes = [compute_dtype(update) for update in layer.updates]
        ctx.seeds = [_two_seeds() if update.dropout else (0, 0) for update in layer.updates]
        row_bytes = max(width, view.num_parts * expert_width) * hidden_TD.element_size()
        blocks = layer.products.Rows.blocks
        ctx.blocks = blocks(view.num_experts, top_k_index_TK, row_bytes, view.may_be_elsewhere)
        run = _Pass(ctx, tensors)
        ups: list[Tensor] = []
        y_SD: Tensor | None = None
        for rows in ctx.blocks:
            up_SPF, some_SD = run.forward(rows, hidden_TD)
            y_SD = rows.placed(y_SD, some_SD, top_k_index_TK.numel())
            del some_SD  # as large as all rows, where there is one block
            ups.append(up_SPF)
        ctx.save_for_backward(hidden_TD, top_k_weights_TK, *ups, *tensors)
        return _weighted_sums(y_SD, top_k_weights_TK, layer.products.BLOCK_BYTES).to(hidden_TD.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, top_k_weights_TK, *saved = ctx.saved_tensors
        ups, tensors = saved[: len(ctx.blocks)], saved[len(ctx.blocks) :]
        run = _Pass(ctx, tensors)
        run.make_gradients()
        dx_SD: Tensor | None = None
        dweight_S: Any = None
        for rows, up_SPF in zip(ctx.blocks, ups, strict=True):
            some_SD, its_S = run.backward(rows, up_SPF, hidden_TD, top_k_weights_TK, grad_TD)
            dx_SD = rows.placed(dx_SD, some_SD, top_k_weights_TK.numel())
            del some_SD
            dweight_S = rows.placed(dweight_S, its_S, top_k_weights_TK.numel())
        dhidden_TD = _summed_by_token(dx_SD, top_k_weights_TK.shape[1]).to(hidden_TD.dtype)
        dweight_TK = dweight_S.view(top_k_weights_TK.shape).to(top_k_weights_TK.dtype)
        return None, dhidden_TD, None, dweight_TK, *run.gradients()


class _Pass:
    """One pass through the layer, forward or backward: all tensors, each where it belongs."""

    def __init__(self, ctx: Any, tensors: Sequence[Tensor | None]) -> None:
        self.view, self.products, updates = ctx.layer.view, ctx.layer.products, ctx.layer.updates
        self.autocast = ctx.autocast
        own = len(tensors) - sum(update.num_tensors for update in updates)
        self.own, rest = tensors[:own], tensors[own:]
        self.weights = self.view.up(self.own[0]), self.view.down(self.own[1])
        self.weights_T = self.weights[0].T, self.weights[1].T
        self.biases, self.norm_parameters = self.own[2:4], self.own[4:]
        self.updates: list[Any] = []
        self.tensors_of: list[Any] = []
        for update, dtype, (up_seed, down_seed) in zip(updates, ctx.dtypes, ctx.seeds, strict=True):
            its, rest = rest[: update.num_tensors], rest[update.num_tensors :]
            source = [update.dropout and self.products.seeded(seed) for seed in (up_seed, down_seed, down_seed)]
            self.updates.append(update.in_pass(its, dtype, source))
            self.tensors_of.append(its)
        self.base_scales = self._base_scale(0), self._base_scale(1)

    def _base_scale(self, place: int) -> Tensor | None:
        """`[E, O]`: what each of the base's outputs is multiplied by, up or down. None: by nothing."""
        scales = [(u.expert_ids_N, u.base_scales[place]) for u in self.updates if u.base_scales]
        if not scales:
            return None
        scale_EO = scales[0][1].new_ones(self.view.num_experts, scales[0][1].shape[1])
        for ids_N, scale_NO in scales:
            scale_EO.index_add_(0, ids_N, scale_NO.to(scale_EO.dtype) - 1)
        return self.view.join(scale_EO) if place == 0 else scale_EO

    def _hots(self, rows: Any) -> list[tuple[Any, Any]]:
        """The updates that some of these rows meet, each with its rows."""
        hots = [(update, self.products.Hot(rows, update)) for update in self.updates]
        return [(update, hot) for update, hot in hots if hot.has_rows]

    def forward(self, rows: Any, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Of a block of rows the outputs of the up projection `[S, P*F]` and of the experts `[S, D]`."""
        hots = self._hots(rows)
        with self.autocast.off():
            x_SD = hidden_TD.index_select(0, rows.token_S)
            up_SPF = self._base(0, rows, x_SD)
            for update, hot in hots:
                update.up(hot, self.view.split(up_SPF), x_SD)
            del x_SD
        with self.autocast.again():
            act_SF = self.view.activation(up_SPF)
        y_SD = self._down(rows, hots, act_SF)
        if self.view.norm_after is not None:
            with self.autocast.again():
                y_SD = self.view.norm_after(y_SD)
        return up_SPF, y_SD

    def backward(
        self, rows: Any, up_SPF: Tensor, hidden_TD: Tensor, top_k_weights_TK: Tensor, grad_TD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of a block of rows the gradients of the experts' input `[S, D]` and of the routing weights `[S]`."""
        hots = self._hots(rows)
        weight_S1 = _by_rows(rows, top_k_weights_TK)
        dup_SPF, dweight_S = self._down_backward(rows, hots, up_SPF, grad_TD, weight_S1)
        dx_SD = self._base_backward(0, rows, dup_SPF)
        if self._wants_own_gradients(0):
            self._own_gradients(0, rows, dup_SPF, hidden_TD.index_select(0, rows.token_S))
        for update, hot in hots:
            update.up_backward(hot, dx_SD, self.view.split(dup_SPF), hidden_TD)
        return dx_SD, dweight_S

    def _down_backward(
        self, rows: Any, hots: Sequence[tuple[Any, Any]], up_SPF: Tensor, grad_TD: Tensor, weight_S1: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the up projection's output and of the routing weights `[S]`.

        A function of its own, so that what is as large as the rows is given back before the next half.
        """
        with self.autocast.again():
            act_SF, pull_back = _with_pull_back(self.view.activation, up_SPF)
        grad_SD = grad_TD.index_select(0, rows.token_S)
        through_norm_S: Tensor | None = None
        if self.view.norm_after is not None:
            grad_SD, through_norm_S = self._norm_backward(rows, hots, act_SF, grad_SD, weight_S1)
            weight_S1 = torch.ones_like(weight_S1)  # the norm's input does not see it
        # The gradient of the activation, not yet times the routing weights.
        u_SF = self._base_backward(1, rows, grad_SD)
        dweight_S = dots(act_SF, u_SF)
        if (bias_ED := self.biases[1]) is not None:
            dweight_S += rows.dot_bias(grad_SD, bias_ED.to(grad_SD.dtype)).to(dweight_S.dtype)
        for update, hot in hots:
            update.down_backward(hot, u_SF, dweight_S, act_SF, grad_SD, weight_S1)
        if self._wants_own_gradients(1):
            self._own_gradients(1, rows, (grad_SD * weight_S1).to(grad_SD.dtype), act_SF)
        dtype = act_SF.dtype
        del grad_SD, act_SF  # what is next makes as much again
        u_SF = (u_SF * weight_S1).to(dtype)
        (dup_SPF,) = pull_back(u_SF)
        return dup_SPF, dweight_S if through_norm_S is None else through_norm_S

    def _norm_backward(
        self, rows: Any, hots: Sequence[tuple[Any, Any]], act_SF: Tensor, grad_SD: Tensor, weight_S1: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the norm's input and of the routing weights. The input is computed again."""
        norm = self.view.norm_after
        assert norm is not None
        names = [name for name, _ in norm.named_parameters()]

        def normed(y_SD: Tensor, *parameters: Tensor) -> Tensor:
            return torch.func.functional_call(norm, dict(zip(names, parameters, strict=True)), y_SD)

        y_SD = self._down(rows, hots, act_SF, again=True)
        with self.autocast.again():
            normed_SD, pull_back = _with_pull_back(normed, y_SD, *norm.parameters())
        dweight_S = dots(grad_SD, normed_SD)
        dy_SD, *dparameters = pull_back((grad_SD * weight_S1).to(normed_SD.dtype))
        for total, some in zip(self.own_gradients[4:], dparameters, strict=True):
            if total is not None:
                total += some
        return dy_SD, dweight_S

    def _down(self, rows: Any, hots: Sequence[tuple[Any, Any]], act_SF: Tensor, again: bool = False) -> Tensor:
        """The projection out of the experts, `[S, D]`. again: for a second time in one pass."""
        with self.autocast.off():
            y_SD = self._base(1, rows, act_SF)
            for update, hot in hots:
                update.down(hot, y_SD, act_SF, again)
        return y_SD

    def _base(self, place: int, rows: Any, x_SI: Tensor) -> Tensor:
        """The base's projection `[S, O]`, up or down, with its scale and bias; zeros in rows of no expert here."""
        weight, scale_EO, bias_EO = self.weights[place], self.base_scales[place], self.biases[place]
        y_SO: Tensor = rows.product(x_SI.to(weight.dtype), weight)
        if scale_EO is not None:
            y_SO = rows.scaled(y_SO, scale_EO)
        if bias_EO is not None:
            rows.add_bias(y_SO, bias_EO)
        return y_SO

    def _base_backward(self, place: int, rows: Any, grad_SO: Tensor) -> Tensor:
        """The gradient of the projection's input `[S, I]`; zeros in rows of no expert here."""
        weight, scale_EO = self.weights_T[place], self.base_scales[place]
        if scale_EO is not None:
            grad_SO = rows.scaled(grad_SO, scale_EO)
        return rows.product(grad_SO.to(weight.dtype), weight)

    def make_gradients(self) -> None:
        """Zeros for all that trains, which `backward` fills, a block after the other."""
        self.own_gradients = [None if t is None or not t.requires_grad else torch.zeros_like(t) for t in self.own]
        scales_train = any(tensor.requires_grad for tensors in self.tensors_of for tensor in tensors[4:])
        self.scale_gradients = [
            None if scale is None or not scales_train else torch.zeros_like(scale) for scale in self.base_scales
        ]
        for update, tensors in zip(self.updates, self.tensors_of, strict=True):
            update.make_gradients(tensors)

    def _wants_own_gradients(self, place: int) -> bool:
        wanted = (self.own_gradients[place], self.own_gradients[place + 2], self.scale_gradients[place])
        return any(gradient is not None for gradient in wanted)

    def _own_gradients(self, place: int, rows: Any, grad_SO: Tensor, x_SI: Tensor) -> None:
        """Of the base's weights and biases, where they train, and of their scale."""
        dweight, dbias = self.own_gradients[place], self.own_gradients[place + 2]
        dscale, scale_EO, weight = self.scale_gradients[place], self.base_scales[place], self.weights[place]
        x_SI = x_SI.to(weight.dtype)
        if dbias is not None:
            rows.add_sums(dbias, grad_SO)
        if dscale is not None:
            rows.add_sums(dscale, (grad_SO * rows.product(x_SI, weight)).to(dscale.dtype))
        if dweight is not None:
            grad_SO = grad_SO if scale_EO is None else rows.scaled(grad_SO, scale_EO)
            out_EOI = dweight.transpose(1, 2) if weight.is_transposed else dweight
            rows.outer(out_EOI, grad_SO.to(weight.dtype), x_SI)

    def gradients(self) -> list[Tensor | None]:
        """Of `tensors`, in their order and dtypes."""
        found = list(self.own_gradients)
        for update, tensors in zip(self.updates, self.tensors_of, strict=True):
            if len(tensors) > 4:
                dup, ddown = (d if d is None else d.index_select(0, update.expert_ids_N) for d in self.scale_gradients)
                update.gradients[4:] = [None if dup is None else torch.cat(self.view.split(dup), dim=1), ddown]
            pairs = zip(update.gradients, tensors, strict=True)
            found += [None if grad is None else grad.to(tensor.dtype) for grad, tensor in pairs]
        return found


def _by_rows(rows: Any, weights_TK: Tensor) -> Tensor:
    """`[S, 1]`"""
    return weights_TK.reshape(-1).index_select(0, rows.order_S).unsqueeze(1)


def _weighted_sums(y_SD: Any, weights_TK: Tensor, block_bytes: int) -> Tensor:
    """`[T, D]`: the sum over each token's K rows times their weights, in the order in which the router chose them.

    Products are made of so many bytes at a time: of all rows they would be the largest array of a forward, twice over
    where routing weights are float32.
    """
    y_TKD = y_SD.view(*weights_TK.shape, y_SD.shape[1])
    bytes_of_token = y_TKD[:1].numel() * torch.promote_types(y_SD.dtype, weights_TK.dtype).itemsize
    step = rows_at_once(len(y_TKD), bytes_of_token, block_bytes)
    blocks = zip(y_TKD.split(step), weights_TK.unsqueeze(2).split(step), strict=True)
    sums = [(y_tKD * weight_tK1).sum(dim=1) for y_tKD, weight_tK1 in blocks]
    return sums[0] if len(sums) == 1 else torch.cat(sums)


def _summed_by_token(x_SD: Any, top_k: int) -> Tensor:
    """`[T, D]`: the sum over each token's K rows, in the order in which the router chose them."""
    return x_SD.view(-1, top_k, x_SD.shape[1]).sum(dim=1)


def _two_seeds() -> tuple[Any, Any]:
    """Drawn on the CPU, where no device has to be waited for. Numbers, but tensors in a compiled graph."""
    seeds = torch.randint(2**62, (2,))
    first, second = seeds[0], seeds[1]
    return (first, second) if torch.compiler.is_compiling() else (int(first), int(second))


def _with_pull_back(
    function: Callable[..., Tensor], *inputs: Tensor
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
    """The function's value, and what gives its inputs' gradients for its own."""
    if torch.compiler.is_compiling():  # which does not trace autograd.grad
        value, pull_back, *_ = torch.func.vjp(function, *inputs)
        return value, pull_back
    with torch.enable_grad():
        inputs = tuple(tensor.detach().requires_grad_() for tensor in inputs)
        value = function(*inputs)
    edge = torch.autograd.graph.get_gradient_edge(value)  # which does not hold the value
    return value.detach(), lambda grad: torch.autograd.grad(edge, inputs, grad)


class Autocast:
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
