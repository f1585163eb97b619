"""What an adapter trains, counted: of a model, or of what only a config.json describes."""

import math
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from ..base.errors import ModelError
from ..base.quiet import quiet
from ..hf.models import model_from_config
from ..hf.moe_layers import attention_modules, moe_layers, num_experts_per_tok
from ..routing.plan import ExpertPlan
from ..routing.profile import experts_kept
from .factors import SeededFactor, SparseFactor
from .model import HotLoraConfig
from .stored import quantized_parameters

PARTS = ("attention", "router", "shared", "experts")


def count_parameters(model: nn.Module) -> dict[str, int | float]:
    """Parameters of an adapted model, on any device, meta too.

    `trainable`, `total` (base and adapters) and `percent` are those of PEFT's `print_trainable_parameters`;
    then the trainable ones in `attention`, `router`, `shared` and `experts`.

    Raises:
        ModelError: the model has no adapter.
    """
    if not isinstance(model, PeftModel):
        raise ModelError(f"{type(model).__name__} has no adapter. Give the result of peft.get_peft_model.")
    trainable, total = model.get_nb_trainable_parameters()
    total += quantized_parameters(model) + sum(_not_held(module) for module in model.modules())
    counts: dict[str, int | float] = {"trainable": trainable, "total": total, "percent": 100 * trainable / total}
    for part, paths in _part_paths(model).items():
        parameters = (p for path in paths for p in model.get_submodule(path).parameters())
        counts[part] = sum(p.numel() for p in parameters if p.requires_grad)
    return counts


def weights_beside_experts(model: PeftModel) -> int:
    """Weights of an adapter's factors on attention, routers and shared experts, whether they train or not: every token
    meets each of them."""
    paths = [path for part, paths in _part_paths(model).items() if part != "experts" for path in paths]
    modules = [module for path in paths for module in model.get_submodule(path).modules()]
    held = sum(p.numel() for module in modules for p in module.parameters(recurse=False) if p.requires_grad)
    return held + sum(map(_not_held, modules))


def _not_held(module: nn.Module) -> int:
    """Weights of an adapter that are no parameters: a frozen A, and what a mask leaves out of B. PEFT's share counts
    them."""
    if isinstance(module, SeededFactor):
        return math.prod(module.shape)
    if isinstance(module, SparseFactor):
        return math.prod(module.shape) - module.values.numel()
    return 0


def parameters_from_config(
    config: str | Path,
    *,
    experts_per_layer: int | str | None = None,
    fraction: float | None = None,
    keep: float | None = None,
    full: bool = False,
    **adapter: Any,
) -> dict[str, int | float]:
    """`count_parameters` of a model that only its config.json describes; no budget means all experts.

    Which experts they are does not matter to the count, so the first ones stand for any.

    Args:
        experts_per_layer: "top_k" is as many as the router chooses for a token.
        keep: share of B that a mask keeps (LoRI-S). It is chosen over the whole model, so that `trainable` is exact
            and what each part has of it is what it has on average.
        full: full fine-tuning: every weight, and no adapter.
        adapter: of `HotLoraConfig`: r, train_attention, use_dora, ...

    Raises:
        FileError, ModelError: as `models.model_from_config`.
        PlanError: a budget or rank out of range.
    """
    model = model_from_config(config)
    layers = moe_layers(model)
    if experts_per_layer == "top_k":
        experts_per_layer = num_experts_per_tok(model)
    if full:
        return _all_parameters(model)
    kept = {layer.layer: layer.num_experts for layer in layers}
    if experts_per_layer is not None or fraction is not None:
        number = cast(int | None, experts_per_layer)
        kept = {layer.layer: experts_kept(layer.num_experts, fraction, number) for layer in layers}
    plan = ExpertPlan(
        experts={layer: tuple(range(number)) for layer, number in kept.items()},
        num_experts=layers[0].num_experts,
        rule="first",
        params={},
    )
    with torch.device("meta"), quiet():
        adapted = get_peft_model(model, HotLoraConfig(plan=plan, **adapter))
    counts = count_parameters(adapted)
    if keep is not None:
        counts |= {name: round(keep * counts[name]) for name in ("trainable", *PARTS)}
        counts["percent"] = 100 * counts["trainable"] / counts["total"]
    return counts


def _all_parameters(model: nn.Module) -> dict[str, int | float]:
    number = sum(p.numel() for p in model.parameters())
    counts: dict[str, int | float] = {"trainable": number, "total": number, "percent": 100.0}
    for part, paths in _part_paths(model).items():
        counts[part] = sum(p.numel() for path in paths for p in model.get_submodule(path).parameters())
    return counts


def _part_paths(model: nn.Module) -> dict[str, list[str]]:
    layers = moe_layers(model)
    return {
        "attention": attention_modules(model),
        "router": [layer.router for layer in layers],
        "shared": [path for layer in layers for path in layer.shared],
        "experts": [layer.experts for layer in layers],
    }
