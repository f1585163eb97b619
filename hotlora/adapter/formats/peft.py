"""A plain PEFT adapter: `target_parameters`, as `peft.PeftModel.from_pretrained` loads it.

Shape suffixes: E experts, N adapted experts, R rank.
"""

from typing import Any

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from torch import Tensor, nn

from ...base.errors import HotLoraError
from ...hf.experts_view import ExpertsView
from .shared import PREFIX, AdapterFactors, ExpertFactors, all_experts, checkpoint_path, pair

# Linears under these names PEFT takes for parts of the routed experts, in many families (peft#3711).
_REWRITTEN_BY_PEFT = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def peft_format(base: Any, parts: AdapterFactors) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config. base: the plain model, whose adapters are out of the way.

    Raises:
        HotLoraError: PEFT cannot load adapters of this family.
    """
    tensors, targets = _targets(parts)
    return _as_peft_loads(base, tensors, LoraConfig(**targets)), targets  # PEFT leaves a HotLoraConfig's as they are


def _targets(parts: AdapterFactors) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    modules, parameters = [], []
    for experts in parts.experts:
        names = ExpertsView(experts.module).weight_names
        for depth, name in enumerate(names):
            A_E, B_E = all_experts(*_fused(experts, name), experts.ids, experts.num_experts)
            # PEFT wraps a module once for each of its parameters, the first one innermost.
            path = experts.path + ".base_layer" * (len(names) - 1 - depth)
            # Its ParamWrapper has all experts in one: A `[E * R, in]`, expert slowest; B `[out, R * E]`, fastest.
            tensors |= pair(path, A_E.flatten(0, 1), B_E.permute(1, 2, 0).flatten(1))
            parameters.append(f"{experts.path}.{name}")
    for linear in parts.linears:
        tensors |= pair(linear.path, linear.A, linear.B)
        if linear.path.rpartition(".")[2] in _REWRITTEN_BY_PEFT:
            parameters.append(f"{linear.path}.weight")
        else:
            modules.append(linear.path)
    for router in parts.routers:
        tensors |= pair(router.path, router.A, router.B)
        parameters.append(f"{router.path}.weight")
    targets: dict[str, Any] = {
        "r": parts.r,
        "lora_alpha": parts.lora_alpha,
        "target_modules": sorted(modules),  # never None: PEFT would choose some by itself
        "target_parameters": sorted(parameters),
    }
    if fused := [experts for experts in parts.experts if "gate" in experts.factors]:
        # The fused adapter has twice the rank. It is the default, and the others are the exception, because
        # PEFT warns of patterns that match no target module, and readers without patterns see the largest rank.
        others = rf".*(?<!\.{fused[0].path.rpartition('.')[2]}\.gate_up_proj)"
        targets |= {
            "r": 2 * parts.r,
            "lora_alpha": 2 * parts.lora_alpha,
            "rank_pattern": {others: parts.r},
            "alpha_pattern": {others: parts.lora_alpha},
        }
    return tensors, targets


def _as_peft_loads(base: Any, tensors: dict[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """The tensors under keys that PEFT finds again: on loading it renames keys from the checkpoint's names to the
    model's, and in some families (laguna, deepseek_ocr2) renames the model's own names once more.

    Raises:
        HotLoraError: PEFT cannot load adapters of this family.
    """
    renamed = {}
    moved = tensors.keys() - loaded_by_peft(base, tensors, config).keys()
    for key, tensor in tensors.items():
        path, _, rest = key.removeprefix(PREFIX).partition(".lora_")
        renamed[f"{PREFIX}{checkpoint_path(base, path)}.lora_{rest}" if key in moved else key] = tensor
    loaded = loaded_by_peft(base, renamed, config)
    if lost := sorted(tensors.keys() - loaded.keys()):
        raise HotLoraError(
            f"format 'peft': PEFT renames {lost[0]} when it loads an adapter of a {base.config.model_type} model, and "
            "would leave it out. Use another format, or save_pretrained and hotlora.load_adapter."
        )
    return renamed


def loaded_by_peft(base: Any, tensors: dict[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """The tensors by the keys under which PEFT looks for a model's parameters when it loads them."""
    return convert_peft_adapter_state_dict_for_transformers(base, config, tensors)


def _fused(experts: ExpertFactors, name: str) -> tuple[Tensor, Tensor]:
    """A `[N, R, in]` and B `[N, out, R]` of one parameter of the base; gate_up_proj has rank 2R."""
    if name != "gate_up_proj":
        return experts.factors[name.removesuffix("_proj")]
    (A_gate, B_gate), (A_up, B_up) = experts.factors["gate"], experts.factors["up"]
    A = torch.cat([A_gate, A_up], 1)
    B_gate = nn.functional.pad(B_gate, (0, A_up.shape[1]))
    B = torch.cat([B_gate, nn.functional.pad(B_up, (A_gate.shape[1], 0))], 1)
    return A, ExpertsView(experts.module).join(B.transpose(1, 2)).transpose(1, 2)
