"""The baseline `axolotl`: the LoRA of PEFT's `target_parameters`, computed by Axolotl's ScatterMoE-LoRA kernels.

As Axolotl's KernelsPlugin does with `use_scattermoe`: its kernels become an implementation of transformers' experts,
and PEFT's ParamWrapper hands A and B to them. Both hold for the whole process, so nothing is imported before `adapted`,
and `bench` gives each contender a process of its own.
"""

import importlib.util
from importlib.metadata import version
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from ..base.errors import ModelError
from ..cost.activations import autocast
from ..hf.moe_layers import moe_layers, unwrap

_TOKENS = 16  # of the forward that shows whose code runs; a multiple of 16, as the bench's, or Triton compiles twice
_NODE = "ScatterMoELoRABackward"  # in autograd's graph, once for each adapted weight
_TOLERANCE = 0.03  # of a layer's output in norm: bfloat16 and TF32 are well within, another activation is not


def missing() -> str | None:
    """Why Axolotl cannot take part here, or None. Imports nothing of it."""
    if importlib.util.find_spec("axolotl") is None:
        return "not installed"
    if importlib.util.find_spec("triton") is None:
        return "installed, but Triton is not"
    return None if torch.cuda.is_available() else "installed, but its kernels need a GPU"


def adapted(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """`model` with PEFT's adapters, the experts' computed by Axolotl. All else stays as it is for the others: PEFT's
    LoRA on attention, transformers' attention, the loss that the model has.

    config: with the experts' fused weights as `target_parameters`.

    Raises:
        ModelError: Axolotl does not compute this family's experts, or computes something else.
    """
    from axolotl.integrations.kernels.libs.scattermoe_lora.experts import register_scattermoe_experts

    register_scattermoe_experts()
    before = model.config._experts_implementation
    experts = [unwrap(model.get_submodule(layer.experts)) for layer in moe_layers(model)]
    model.set_experts_implementation("scattermoe")
    wrapped = cast(PeftModel, get_peft_model(model, config)).train()
    try:
        calls, fused = _forward(wrapped, model, experts)
    except (NotImplementedError, AttributeError, TypeError) as error:  # what its forward misses in the experts module
        raise _not_taken(model, str(error)) from error
    model.set_experts_implementation(before)
    difference = max((_difference(model, call) for call in calls), default=0.0)
    model.set_experts_implementation("scattermoe")
    if fused != 2 * len(experts):
        raise _not_taken(model, f"its kernels ran for {fused} of {2 * len(experts)} adapted weights")
    if not difference <= _TOLERANCE:
        raise _not_taken(model, f"its output is {difference:.0%} off transformers'")
    return wrapped


def _not_taken(model: PreTrainedModel, why: str) -> ModelError:
    return ModelError(
        f"Axolotl {version('axolotl')} does not compute LoRA on the experts of {model.config.model_type} here: leave "
        f"the contender axolotl out. In a forward on a few tokens: {why}"
    )


def _forward(wrapped: PeftModel, model: PreTrainedModel, experts: list[Any]) -> tuple[list[tuple[Any, ...]], int]:
    """What each experts module was given and gave, and how often Axolotl's function is in the graph."""
    calls: list[tuple[Any, ...]] = []
    hooks = [e.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True) for e in experts]
    with autocast(model.device.type, model.dtype):
        logits = wrapped(input_ids=torch.arange(_TOKENS, device=model.device)[None]).logits
    for hook in hooks:
        hook.remove()
    nodes, waiting = set(), [logits.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            waiting += [following for following, _ in node.next_functions]
    return calls, sum(type(node).__name__ == _NODE for node in nodes)


@torch.no_grad()
def _difference(model: PreTrainedModel, call: tuple[Any, ...]) -> float:
    """Of an experts module's output from what transformers makes of the same inputs, relative in norm. B is 0."""
    experts, args, kwargs, output = call
    with autocast(model.device.type, model.dtype):
        expected: Tensor = experts(*args, **kwargs)
    return ((output.float() - expected.float()).norm() / expected.float().norm()).item()
