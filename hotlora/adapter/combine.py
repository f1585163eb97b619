"""One adapter's factors out of several others', layer by layer: PEFT's `add_weighted_adapter` for plans that differ."""

import math
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor

from .mergeable import MergeableLayer


def combine(module: LoraLayer, weights: dict[str, float], adapter_name: str, how: str) -> None:
    """Fills the new adapter's factors in one layer from those of the others that are there."""
    sources = {name: factor_pairs(module, name) for name in weights if name in module.r}
    for key, (A, B) in factor_pairs(module, adapter_name).items():
        A.detach().zero_()
        B.detach().zero_()
        start = 0
        for name, pairs in sources.items():
            if key not in pairs:
                continue
            (A_source, B_source), weight = pairs[key], weights[name] * module.scaling[name]
            if how == "cat":
                end = start + A_source.shape[-2]
                A.detach()[..., start:end, :] = A_source.detach()
                B.detach()[..., start:end] = B_source.detach() * weight
                start = end
            else:  # as PEFT has it: each factor takes the root of the weight, and one of them its sign
                A.detach().add_(A_source.detach(), alpha=math.copysign(abs(weight) ** 0.5, weight))
                B.detach().add_(B_source.detach(), alpha=abs(weight) ** 0.5)


def factor_pairs(module: Any, adapter: str) -> dict[Any, tuple[Tensor, Tensor]]:
    """An adapter's A `[..., R, in]` and B `[..., out, R]` in one layer, as views, under what each pair updates."""
    if isinstance(module, MergeableLayer):
        return module.factor_pairs(adapter)
    return {"weight": (module.lora_A[adapter].weight, module.lora_B[adapter].weight)}
