"""The routed layer in few kernels, for a GPU with Triton: what surrounds the products happens inside of them.

Forward: rows are sorted by counting; the up projection gathers its rows by index and makes A x of hot rows beside it;
one kernel makes the activation, hot rows' updates of gate and up added on the way, and A_down of it; the projection out
adds B_down, bias and the routing weight before it writes; a last kernel sums each token's K rows. Backward is the same
way back. No array of S rows is copied, masked or scattered.

It covers LoRA on a dense, frozen base with one update at a time; `covers` says no to the rest, which `function` does.

Shape suffixes as in `function`, and N hot experts, R rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...hf.experts_view import ExpertsView
from ..updates import LowRank, Update, compute_dtype
from .activation import Factors, Gate, activation
from .activation_backward import activation_backward
from .combine import combine
from .gram import Side, gram
from .product import Low, Order, Thin, product
from .sort import counting_sort

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST_RANK = 64
_GATES: dict[Any, Gate | None] = {}
"""by what an experts module's activation depends on"""


def covers(view: ExpertsView, hidden_TD: Tensor, top_k_weights_TK: Tensor, updates: Sequence[Update]) -> bool:
    """Whether `FusedExperts` can compute this layer."""
    if hidden_TD.shape[0] == 0 or len(updates) > 1 or view.is_quantized or view.norm_after is not None:
        return False
    if any(tensor is not None and tensor.requires_grad for tensor in view.tensors()):
        return False
    weight = view.down(view.tensors()[1])
    if weight.dtype not in _DTYPES or hidden_TD.shape[0] * top_k_weights_TK.shape[1] >= 2**31:
        return False
    return all(_covers_update(update, weight.dtype) for update in updates) and gate_of(view) is not None


def _covers_update(update: Update, dtype: torch.dtype) -> bool:
    if not isinstance(update, LowRank) or update.scale_up_NPF is not None or isinstance(update.scaling, Tensor):
        return False
    return compute_dtype(update) == dtype and update.A_down.shape[1] <= _LARGEST_RANK


def gate_of(view: ExpertsView) -> Gate | None:
    """The `Gate` that computes what the experts' own activation does on a few values; None: none does.

    Found out by trying, since a family may have an activation of its own.
    """
    experts = view.experts
    act_fn = getattr(experts, "act_fn", None)
    settings = {name: value for name, value in vars(experts).items() if isinstance(value, int | float | str)}
    key = (type(experts), repr(act_fn), view.num_parts, view.is_interleaved, tuple(sorted(settings.items())))
    if isinstance(act_fn, torch.nn.Module) and any(True for _ in act_fn.parameters()):
        return None
    if key not in _GATES:
        _GATES[key] = _tried(view)
    return _GATES[key]


def _tried(view: ExpertsView) -> Gate | None:
    layout = {"is_gated": view.num_parts == 2, "is_interleaved": view.is_interleaved}
    gates = [Gate(kind, **layout) for kind in ("silu", "gelu", "gelu_tanh", "relu2")]
    numbers: list[Any] = [getattr(view.experts, name, None) for name in ("alpha", "limit")]
    if all(isinstance(number, int | float) for number in numbers):
        gates.insert(0, Gate("gpt_oss", alpha=numbers[0], limit=numbers[1], **layout))
    values = torch.cat([torch.linspace(-1000, 1000, 9), torch.linspace(-30, 30, 31), torch.linspace(-3, 3, 31)])
    pairs = torch.cartesian_prod(values, values)
    probe = pairs if view.num_parts == 2 else pairs[:, :1].contiguous()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        expected = view.activation(probe).reshape(-1)
        for gate in gates:
            if torch.allclose(gate.of(probe).reshape(-1), expected, rtol=1e-5, atol=1e-6):
                return gate
    return None


class FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        view: ExpertsView,
        update: LowRank | None,
        seeds: tuple[int, int],
        hidden_TD: Tensor,
        top_k_index_TK: Tensor,
        top_k_weights_TK: Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:
        """tensors: as `ExpertsView.tensors`, then the update's."""
        run = _Pass(view, update, seeds, tensors)
        top_k = top_k_index_TK.shape[1]
        order = Order(*counting_sort(top_k_index_TK, view.num_experts), top_k)
        x_TD, weights_S = hidden_TD.to(run.up.dtype).contiguous(), top_k_weights_TK.reshape(-1)
        its, thin, low = run.factors, None, None
        if its is not None:
            thin = Thin(its.ids_N, its.A_up, its.scaling, its.p, its.up_seed)
        up_SPF, z_up_SPR, _ = product(x_TD, run.up, order, gather=True, thin=thin, bias_EO=run.biases[0])
        act_SF, z_down_SR = activation(up_SPF, run.gate, order, z_up_SPR, its)
        if its is not None and z_down_SR is not None:
            low = Low(its.ids_N, z_down_SR, its.B_down)
        y_SD, _, _ = product(act_SF, run.down, order, low=low, bias_EO=run.biases[1], weights_S=weights_S)
        ctx.view, ctx.update, ctx.seeds, ctx.order = view, update, seeds, order
        ctx.save_for_backward(hidden_TD, top_k_weights_TK, up_SPF, z_up_SPR, z_down_SR, *tensors)
        return combine(y_SD, order.place_S, top_k).to(hidden_TD.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, top_k_weights_TK, up_SPF, z_up_SPR, z_down_SR, *tensors = ctx.saved_tensors
        order, run = ctx.order, _Pass(ctx.view, ctx.update, ctx.seeds, tensors)
        its, weights_S = run.factors, top_k_weights_TK.reshape(-1)
        x_TD, grad_TD = (t.to(run.up.dtype).contiguous() for t in (hidden_TD, grad_TD))
        thin, low = None, None
        if its is not None:
            thin = Thin(its.ids_N, its.B_down.transpose(1, 2), its.scaling)
        dact_SF, g_down_SR, dots_S = product(
            grad_TD, run.down.transpose(1, 2), order, gather=True, thin=thin, dot_EI=run.biases[1]
        )
        found = activation_backward(
            dact_SF, up_SPF, weights_S, run.gate, order, dots_S=dots_S, z_up_SPR=z_up_SPR, g_down_SR=g_down_SR,
            factors=its,
        )  # fmt: skip
        del dact_SF
        gradients = run.gradients(
            ctx.needs_input_grad, order, x_TD, grad_TD, weights_S, found, (z_up_SPR, z_down_SR, g_down_SR)
        )
        dup_SPF, g_SPR, dweight_S = found.dup_SPF, found.g_SPR, found.dweight_S
        del found  # the activation with it, before dx, which is the largest array
        if its is not None and g_SPR is not None:
            low = Low(its.ids_N, g_SPR, its.A_up.transpose(1, 2), its.p, its.up_seed)
        dhidden_TD = None
        if ctx.needs_input_grad[3]:
            dx_SD, _, _ = product(dup_SPF, run.up.transpose(1, 2), order, low=low)
            dhidden_TD = combine(dx_SD, order.place_S, order.top_k).to(hidden_TD.dtype)
        none = [None] * (len(tensors) - len(gradients))
        return None, None, None, dhidden_TD, None, dweight_S.view(top_k_weights_TK.shape), *none, *gradients


class _Pass:
    """What forward and backward share: weights `[E, outputs, inputs]`, and the factors as kernels take them."""

    def __init__(
        self, view: ExpertsView, update: LowRank | None, seeds: tuple[int, int], tensors: Sequence[Tensor | None]
    ) -> None:
        gate = gate_of(view)
        assert gate is not None  # `covers` has asked
        self.gate = gate
        self.up, self.down = view.up(tensors[0]).all().transpose(1, 2), view.down(tensors[1]).all().transpose(1, 2)
        self.biases = tensors[2:4]
        self.factors: Factors | None = None
        if update is not None:
            A_up, B_up, A_down, B_down = (t.detach() for t in tensors[4:8] if t is not None)
            self.factors = Factors(
                update.expert_ids_N, A_up, B_up, A_down, B_down, float(update.scaling), update.dropout, *seeds
            )

    def gradients(
        self, needed: Sequence[bool], order: Any, x_TD: Tensor, grad_TD: Tensor, weights_S: Tensor, found: Any,
        z: tuple[Any, Any, Any],
    ) -> list[Tensor | None]:  # fmt: skip
        """Of the four factors, those that train."""
        its, (z_up_SPR, z_down_SR, g_down_SR) = self.factors, z
        if its is None:
            return []
        parts, ids = 2 if self.gate.is_gated else 1, its.ids_N
        made: list[Tensor | None] = [None] * 4
        wants = needed[-4:]
        if wants[0]:
            made[0] = gram(Side(found.g_SPR), Side(x_TD, True), order, ids, its.A_up.dtype, p=its.p, seed=its.up_seed)
        if wants[1]:
            made[1] = gram(
                Side(found.dup_SPF), Side(z_up_SPR), order, ids, its.B_up.dtype, parts=parts,
                interleaved=self.gate.is_interleaved,
            )  # fmt: skip
        if wants[2]:
            made[2] = gram(
                Side(g_down_SR),
                Side(found.act_SF),
                order,
                ids,
                its.A_down.dtype,
                weights_S=weights_S,
                p=its.p,
                seed=its.down_seed,
            )
        if wants[3]:
            made[3] = gram(Side(grad_TD, True), Side(z_down_SR), order, ids, its.B_down.dtype, weights_S=weights_S)
        return made
