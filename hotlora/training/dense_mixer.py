"""DenseMixer's router gradient (Yao et al., ICLR 2026 submission 4HGIIekCx3; package densemixer 1.0.1).

A layer's output is y = Σ w_i E_i(x) over the K experts that a token is routed to, so a router learns nothing of the
others. DenseMixer passes the gradient straight through to the sum over all experts: with π the softmax over all E
experts, and s the sum of π over the K where the family normalizes them, else 1,

    forward   y = Σ over the K of (π_i / s) E_i(x)                    as without it, bit for bit
    backward  of Σ over the K of (π_i / s) E_i(x) + Σ over the rest of (π_i / sg(s)) E_i(x)

where the E_i of the rest are held fixed. So the rest adds <dL/dy, E_i(x)> / s to the gradient of π_i, and nothing to
that of anything else but what goes on from there; sg(s) as in the authors' files for OLMoE and Qwen3.

The outputs of the rest are computed in the backward pass, without gradients, K experts a token at a time, by the same
layer with the adapters that it has, and without dropout, which draws nothing then.

Shape suffixes: E experts, K experts per token, U = E - K not chosen, T tokens, D model width.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import HotLoraError
from ..hf.experts_view import ExpertsView
from ..hf.moe_layers import moe_layers, unwrap
from ..hf.routers import check_softmax_routers, scores_of
from ..layer.function import Autocast


@contextmanager
def dense_mixer(model: nn.Module) -> Iterator[None]:
    """Inside, while `model` trains, its routers get DenseMixer's gradient; in eval mode nothing is done.

    Costs (E - K) / K times the experts' forward for each step. Works with any trainer, with gradient checkpointing and
    on quantized experts.

    Raises:
        ModelError: a router is no softmax whose largest are taken.
        HotLoraError: no router trains, or experts are spread over processes.
    """
    check_softmax_routers(model, "dense_mixer")
    layers = [(model.get_submodule(layer.router), model.get_submodule(layer.experts)) for layer in moe_layers(model)]
    trained = [pair for pair in layers if any(p.requires_grad for p in pair[0].parameters())]
    if not trained:
        raise HotLoraError("dense_mixer is a gradient for routers, and none of this model trains: adapt the router.")
    views = [ExpertsView(unwrap(experts)) for _, experts in trained]
    if any(view.is_spread or view.is_expert_parallel or view.is_forwarded_by_others for view in views):
        raise HotLoraError(
            "dense_mixer needs all experts in each process: leave it out, or train without FSDP, DeepSpeed and expert "
            "parallelism."
        )
    with ExitStack() as hooks:
        for router, experts in trained:
            mixed = _Mixed()
            hooks.callback(router.register_forward_hook(mixed.keep_scores).remove)
            hooks.callback(experts.register_forward_hook(mixed.of_output, with_kwargs=True).remove)
        yield


class _Mixed:
    """The hooks of one layer."""

    def __init__(self) -> None:
        self.logits_TE: Tensor | None = None

    def keep_scores(self, router: nn.Module, args: Any, output: Any) -> None:
        self.logits_TE = scores_of(output)

    def of_output(self, experts: nn.Module, args: Any, kwargs: Any, output_TD: Tensor) -> Tensor | None:
        """The experts' output, with a gradient for the scores of those that were not chosen."""
        logits_TE, self.logits_TE = self.logits_TE, None
        if not (experts.training and torch.is_grad_enabled()) or logits_TE is None or not logits_TE.requires_grad:
            return None
        hidden_TD, index_TK, weights_TK = (*args, *kwargs.values())[:3]
        if index_TK.shape[1] == logits_TE.shape[1]:
            return None  # all are chosen
        rest_TU, weights_TU = _rest(logits_TE, index_TK, weights_TK)
        mixed: Tensor = _WithRest.apply(experts, output_TD, weights_TU, hidden_TD.detach(), rest_TU, index_TK.shape[1])
        return mixed


def _rest(logits_TE: Tensor, index_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    """The experts that are not chosen, ascending, and their weights, by which gradients reach the logits: `[T, U]`.

    s is read off the weights that the layer was given, with what a family multiplies all of them by.
    """
    wide = torch.promote_types(logits_TE.dtype, torch.float32)
    softmax_TE = logits_TE.softmax(-1, dtype=wide)
    is_chosen_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, index_TK, True)
    num_rest = logits_TE.shape[1] - index_TK.shape[1]
    rest_TU = is_chosen_TE.sort(dim=1, stable=True).indices[:, :num_rest]
    chosen_T1 = softmax_TE.detach().gather(1, index_TK).sum(1, keepdim=True)
    scale_T1 = weights_TK.detach().to(wide).sum(1, keepdim=True) / chosen_T1
    return rest_TU, softmax_TE.gather(1, rest_TU) * scale_T1


class _WithRest(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        experts: nn.Module,
        output_TD: Tensor,
        weights_TU: Tensor,
        hidden_TD: Tensor,
        rest_TU: Tensor,
        some: int,
    ) -> Tensor:
        """`output_TD`. some: experts of a token that are computed at a time."""
        ctx.experts, ctx.some, ctx.autocast = experts, some, Autocast(hidden_TD.device.type)
        ctx.dtype = weights_TU.dtype
        ctx.save_for_backward(hidden_TD, rest_TU)
        return output_TD.view_as(output_TD)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, rest_TU = ctx.saved_tensors
        grad_TD1 = grad_TD.to(ctx.dtype).unsqueeze(2)
        found = []
        with ctx.autocast.again(), _without_dropout(ctx.experts):
            for rest_TC in rest_TU.split(ctx.some, dim=1):
                output_TCD = _outputs(ctx.experts, hidden_TD, rest_TC)
                with ctx.autocast.off():
                    found.append((output_TCD.to(ctx.dtype) @ grad_TD1).squeeze(2))
        return None, grad_TD, torch.cat(found, dim=1), None, None, None


def _outputs(experts: nn.Module, hidden_TD: Tensor, index_TC: Tensor) -> Tensor:
    """Of each token the outputs of some experts, unweighted: `[T, C, D]`."""
    hidden_SD = hidden_TD.repeat_interleave(index_TC.shape[1], dim=0)
    output_SD: Tensor = experts(hidden_SD, index_TC.reshape(-1, 1), hidden_SD.new_ones(len(hidden_SD), 1))
    return output_SD.view(*index_TC.shape, -1)


@contextmanager
def _without_dropout(experts: nn.Module) -> Iterator[None]:
    """Of the adapters' inputs: torch's random numbers are those of a training without DenseMixer."""
    before, experts.training = experts.training, False
    try:
        yield
    finally:
        experts.training = before
