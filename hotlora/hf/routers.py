"""How a family's router chooses experts and weighs them, found out by running it alone on random numbers.

A list of names would not know a new family, nor a config that switches a router to groups, or to another score.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import ModelError
from .moe_layers import moe_layers, unwrap

_TOKENS = 64
_SPREAD = 3.0  # of the scores: the chosen experts' weights are to differ


def check_softmax_routers(model: nn.Module, name: str) -> None:
    """ModelError, for the option `name`, unless every router takes the K largest of a softmax over all experts, and
    weighs them by it, normalized over the K or not. model: on any device, meta too; its routers' weights do not
    matter."""
    for layer in moe_layers(model):
        router = unwrap(model.get_submodule(layer.router))
        if not _is_softmax_router(router, layer.num_experts, layer.router_weight):
            config: Any = model.config
            family = config.get_text_config().model_type
            raise ModelError(
                f"{name} is for routers that take the largest of a softmax over all experts, as OLMoE's, Qwen-MoE's, "
                f"Mixtral's and gpt-oss's do; {layer.router} of this {family} model scores, chooses or weighs experts "
                f"in another way: leave {name} out."
            )


def scores_of(output: Any) -> Tensor:
    """Of a router's output the logits of all experts, `[T, E]`, before the softmax."""
    scores: Tensor = output[0]
    return scores


def _is_softmax_router(router: nn.Module, num_experts: int, weight: str) -> bool:
    """A router may want more than hidden states, or give other things in another order: then it is none, too."""
    try:
        logits, weights, index = _run(router, weight)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, KeyError):
        return False
    if logits.shape != (_TOKENS, num_experts) or weights.shape != index.shape or index.ndim != 2:
        return False
    softmax = logits.double().softmax(-1)
    largest = softmax.topk(index.shape[1]).indices
    if not torch.equal(largest.sort().values, index.sort().values):
        return False
    ratio = weights.double() / softmax.gather(1, index)
    return bool(((ratio - ratio.mean(1, keepdim=True)).abs() <= 1e-3 * ratio.mean(1, keepdim=True).abs()).all())


@torch.no_grad()
def _run(router: nn.Module, weight: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[T, E]`, weights `[T, K]` and experts `[T, K]` of random tokens, by random weights and biases."""
    router = copy.deepcopy(router).to_empty(device="cpu").float().eval()
    draw = torch.Generator().manual_seed(0)
    for tensor in _numbers(router):
        tensor.copy_(torch.randn(tensor.shape, generator=draw))
    scoring = router.get_parameter(weight)
    hidden = torch.randn(_TOKENS, scoring.shape[1], generator=draw).to(scoring.dtype)
    scoring.mul_(_SPREAD * scoring.shape[1] ** -0.5)
    found = router(hidden)
    if not isinstance(found, tuple) or len(found) != 3 or found[2].is_floating_point():
        raise ValueError("a router gives logits, weights and experts")
    return scores_of(found), found[1], found[2]


def _numbers(router: nn.Module) -> Iterator[Tensor]:
    yield from router.parameters()
    yield from (buffer for buffer in router.buffers() if buffer.is_floating_point())
