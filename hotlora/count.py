"""What an adapter trains, counted: of a model, or of what only a config.json describes."""

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from .adapter import HotLoraConfig
from .errors import ModelError
from .models import attention_modules, model_from_config, moe_layers
from .plan import ExpertPlan
from .quantize import quantized_parameters
from .quiet import quiet
from .routing import experts_kept


def count_parameters(model: nn.Module) -> dict[str, int | float]:
    """Parameters of an adapted model, on any device, meta too.

    `trainable`, `total` (base and adapters) and `percent` are those of PEFT's `print_trainable_parameters`;
    then the trainable ones in `attention`, `router`, `shared` and `experts`.

    Raises:
        ModelError: the model has no adapter.
    """
    if not isinstance(model, PeftModel):
        raise ModelError(f"{type(model).__name__} has no adapter. Give the result of peft.get_peft_model.")
    layers = moe_layers(model)
    parts = {
        "attention": attention_modules(model),
        "router": [layer.router for layer in layers],
        "shared": [path for layer in layers for path in layer.shared],
        "experts": [layer.experts for layer in layers],
    }
    trainable, total = model.get_nb_trainable_parameters()
    total += quantized_parameters(model)
    counts: dict[str, int | float] = {
        "trainable": trainable,
        "total": total,
        "percent": 100 * trainable / total,
    }
    for part, paths in parts.items():
        parameters = (p for path in paths for p in model.get_submodule(path).parameters())
        counts[part] = sum(p.numel() for p in parameters if p.requires_grad)
    return counts


def parameters_from_config(
    config: str | Path,
    *,
    experts_per_layer: int | None = None,
    fraction: float | None = None,
    r: int = 32,
    train_attention: bool = True,
    train_router: bool = True,
    train_shared: bool = True,
) -> dict[str, int | float]:
    """`count_parameters` of a model that only its config.json describes; no budget means all experts.

    Which experts they are does not matter to the count, so the first ones stand for any.

    Raises:
        FileError, ModelError: as `models.model_from_config`. PlanError: a budget or rank out of range.
    """
    model = model_from_config(config)
    layers = moe_layers(model)
    kept = {layer.layer: layer.num_experts for layer in layers}
    if experts_per_layer is not None or fraction is not None:
        kept = {layer.layer: experts_kept(layer.num_experts, fraction, experts_per_layer) for layer in layers}
    plan = ExpertPlan(
        experts={layer: tuple(range(number)) for layer, number in kept.items()},
        num_experts=layers[0].num_experts,
        rule="first",
        params={},
    )
    with torch.device("meta"), quiet():
        adapted = get_peft_model(
            model,
            HotLoraConfig(
                plan=plan,
                r=r,
                train_attention=train_attention,
                train_router=train_router,
                train_shared=train_shared,
            ),
        )
    return count_parameters(adapted)
