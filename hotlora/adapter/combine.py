"""One adapter's factors out of several others', layer by layer: PEFT's `add_weighted_adapter` for plans that differ."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from torch import Tensor

from ..base.errors import HotLoraError
from .mergeable import MergeableLayer

_PRUNED = {"ties": ties, "dare_linear": dare_linear, "dare_ties": dare_ties, "magnitude_prune": magnitude_prune}
"""PEFT's sums of factors of which a share (the density) is kept"""
DENSITY = 0.5
_WITH_SIGNS = ("ties", "dare_ties")
_SIGN_METHODS = ("total", "frequency")
"""How those elect the sign that counts; PEFT's default is the first."""


def check_how(how: str, density: float | None, sign_method: str | None = None) -> None:
    """HotLoraError: no such combination_type, or a density or majority_sign_method that it has no use for or that is
    out of range."""
    known = ("cat", "linear", *_PRUNED)
    if how not in known:
        raise HotLoraError(f"combination_type={how!r} is not supported on experts: give {', '.join(known)}.")
    if density is not None and how not in _PRUNED:
        raise HotLoraError(f"density={density} is of {', '.join(_PRUNED)}, and combination_type is {how!r}.")
    if density is not None and not (isinstance(density, Real) and 0 < density < 1):
        raise HotLoraError(f"density={density} must be above 0 and below 1: the share of each factor that is kept.")
    if sign_method is not None and how not in _WITH_SIGNS:
        raise HotLoraError(
            f"majority_sign_method={sign_method!r} is of {', '.join(_WITH_SIGNS)}, and combination_type is {how!r}."
        )
    if sign_method not in (None, *_SIGN_METHODS):
        raise HotLoraError(f"majority_sign_method={sign_method!r} does not exist: give {' or '.join(_SIGN_METHODS)}.")


def check_weights(weights: Sequence[float]) -> None:
    """HotLoraError: one is no finite number."""
    if bad := [weight for weight in weights if not (isinstance(weight, Real) and math.isfinite(weight))]:
        raise HotLoraError(f"weights={list(weights)} must be finite numbers, and {bad[0]!r} is none.")


def combine(
    module: LoraLayer,
    weights: dict[str, float],
    adapter_name: str,
    how: str,
    density: float | None = None,
    sign_method: str | None = None,
) -> None:
    """Fills the new adapter's factors in one layer from those of the others that are there."""
    sources = {name: factor_pairs(module, name) for name in weights if name in module.r}
    for key, (A, B) in factor_pairs(module, adapter_name).items():
        A.detach().zero_()
        B.detach().zero_()
        found = {name: pairs[key] for name, pairs in sources.items() if key in pairs}
        scales = [weights[name] * module.scaling[name] for name in found]
        start = 0
        if how == "cat":
            for (A_source, B_source), scale in zip(found.values(), scales, strict=True):
                end = start + A_source.shape[-2]
                A.detach()[..., start:end, :] = A_source.detach()
                B.detach()[..., start:end] = B_source.detach() * scale
                start = end
        elif found:  # as PEFT has it: each factor takes the root of the weight, and A its sign
            signed = [math.copysign(abs(scale) ** 0.5, scale) for scale in scales]
            As, Bs = zip(*found.values(), strict=True)
            A.detach().copy_(_summed(As, signed, how, density, sign_method))
            B.detach().copy_(_summed(Bs, [*map(abs, signed)], how, density, sign_method))


def _summed(
    factors: Sequence[Tensor], weights: list[float], how: str, density: float | None, sign_method: str | None
) -> Tensor:
    factors = [factor.detach() for factor in factors]
    of_each = torch.tensor(weights, device=factors[0].device)
    if how == "linear":
        return task_arithmetic(factors, of_each)
    share = DENSITY if density is None else density
    if not int(share * factors[0].numel()):
        raise HotLoraError(
            f"density={share:g} keeps none of the {factors[0].numel():,} values of a factor: give a larger one."
        )
    options = {"majority_sign_method": sign_method or _SIGN_METHODS[0]} if how in _WITH_SIGNS else {}
    found: Tensor = _PRUNED[how](factors, of_each, share, **options)
    return found


def factor_pairs(module: Any, adapter: str) -> dict[Any, tuple[Tensor, Tensor]]:
    """An adapter's A `[..., R, in]` and B `[..., out, R]` in one layer, as views, under what each pair updates."""
    if isinstance(module, MergeableLayer):
        return module.factor_pairs(adapter)
    return {"weight": (module.lora_A[adapter].weight, module.lora_B[adapter].weight)}
