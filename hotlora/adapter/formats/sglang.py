"""SGLang's format: a pair of matrices for each hot expert and projection.

Shape suffixes: N adapted experts, R rank.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .shared import PREFIX, AdapterFactors, ExpertFactors, at_rank, checkpoint_experts, expert_names, server_format

# SGLang lays out gate's and up's B in turn, as these families' weights are. It then multiplies the first half of the
# rows by gate's A and the second by up's, so the two A must be the same (0.5.23: `_slice_moe_b_2d`, and
# `_add_lora_gate_up_delta`; one A for both is what PEFT trains).
_ONE_A = ("gpt_oss",)


def sglang_format(base: Any, parts: AdapterFactors) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config. base: the plain model, whose adapters are out of the way."""
    return server_format(base, _of_family(base, parts), _names, has_cold=False)


def sglang_shared_format(base: Any, parts: AdapterFactors) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same, of an adapter whose experts share their outer factors: each of these once, `[1, …]`, under the experts'
    own path, by which SGLang knows the form (0.5.23: `_detect_shared_outer_loras`)."""
    parts = _of_family(base, parts)
    tensors, config = server_format(base, parts, _names, has_cold=False)
    for experts in parts.experts:
        root, names = _names(base, experts)
        for projection, name in names.items():
            side, factor = ("B", 1) if projection == "down" else ("A", 0)
            for expert in experts.ids:
                del tensors[f"{PREFIX}{root}.{expert}.{name}.lora_{side}.weight"]
            tensors[f"{PREFIX}{root}.{name}.lora_{side}.weight"] = experts.factors[projection][factor][:1].clone()
    return tensors, config


def _of_family(base: Any, parts: AdapterFactors) -> AdapterFactors:
    return _with_one_A(parts) if base.config.get_text_config().model_type in _ONE_A else parts


def _names(base: Any, experts: ExpertFactors) -> tuple[str, dict[str, str]]:
    """SGLang goes by the layer's index, the expert's, and gate, up and down. Without a gate, up is called so (0.5.23:
    `normalize_gate_up_proj`; under its own name it ends the server)."""
    names = expert_names(experts)
    if "gate" not in names:
        names["up"] = "gate_proj"
    return checkpoint_experts(base, experts)[0], names


def _with_one_A(parts: AdapterFactors) -> AdapterFactors:
    """The same updates at twice the rank, with one A for gate and up."""
    r = 2 * parts.r
    linears = [replace(linear, A=A, B=B) for linear in parts.linears for A, B in [at_rank(linear.A, linear.B, r, 1.0)]]
    return replace(
        parts,
        r=r,
        lora_alpha=2 * parts.lora_alpha,
        linears=linears,
        experts=[replace(experts, factors=_joined(experts.factors, r)) for experts in parts.experts],
    )


def _joined(factors: dict[str, tuple[Tensor, Tensor]], r: int) -> dict[str, tuple[Tensor, Tensor]]:
    (A_gate, B_gate), (A_up, B_up) = factors["gate"], factors["up"]
    A = torch.cat([A_gate, A_up], 1)
    return {
        "gate": (A, nn.functional.pad(B_gate, (0, A_up.shape[1]))),
        "up": (A, nn.functional.pad(B_up, (A_gate.shape[1], 0))),
        "down": at_rank(*factors["down"], r, 1.0),
    }
