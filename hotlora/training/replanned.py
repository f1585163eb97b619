"""A trained adapter under another plan: experts with ranks of their own, in place of those that it was trained with."""

import dataclasses
from collections.abc import Mapping

import torch
from peft import PeftModel
from torch import Tensor

from ..adapter.config import HotLoraConfig
from ..adapter.experts import HotLoraExperts
from ..hf.moe_layers import moe_layers
from ..routing.plan import ExpertPlan

FACTORS = HotLoraExperts.adapter_layer_names[:4]
"""Where a layer of experts has A and B of gate and up, and of down."""


def planned_experts(model: PeftModel) -> dict[int, HotLoraExperts]:
    """Decoder layer -> its experts with the adapter's factors, of the layers that the plan has experts of."""
    base = model.get_base_model()
    found = {layer.layer: base.get_submodule(layer.experts) for layer in moe_layers(base)}
    return {layer: module for layer, module in found.items() if isinstance(module, HotLoraExperts)}


@torch.no_grad()
def put_under_plan(model: PeftModel, plan: ExpertPlan, held: Mapping[tuple[int, int], list[list[Tensor]]]) -> None:
    """Makes `plan` that of `model`'s adapter. What it adds is the sum of what it is given; all but the experts stays.

    held: (layer, expert) -> factors that lie one after another in the expert's rank, each A and B of gate and up, and
        of down, at the scaling of the adapter as it is.
    """
    config = model.peft_config["default"]
    assert isinstance(config, HotLoraConfig)
    others = {
        name: p.detach().clone()
        for name, p in model.named_parameters()
        if "lora_" in name and not any(f".{n}." in name for n in FACTORS)
    }
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
    fields |= {"plan": plan, "target_modules": None, "target_parameters": None}
    model.delete_adapter("default")
    model.add_adapter("default", HotLoraConfig(**fields))
    model.set_adapter("default")
    parameters = dict(model.named_parameters())
    for name, value in others.items():
        parameters[name].copy_(value)
    for layer, experts in planned_experts(model).items():
        _fill(experts, {expert: held[layer, expert] for expert in experts.expert_ids["default"]})


def _fill(module: HotLoraExperts, held: dict[int, list[list[Tensor]]]) -> None:
    """Each expert's factors one after another, at the rank of all of them together."""
    for (expert, part), (A, B) in module.factor_pairs("default", folded=False).items():
        start = 0
        # The scaling of a rank of its own is another: B makes up for it.
        scale = module.scaling["default"] / module.scaling_of("default", expert)
        for A_up, B_up, A_down, B_down in held[expert]:
            parts = A_up.shape[0] // A_down.shape[0]
            n = parts - 1 if part == "up" else 0
            A_mine, B_mine = (A_down, B_down) if part == "down" else (A_up.chunk(parts)[n], B_up.chunk(parts)[n])
            end = start + A_mine.shape[0]
            A[start:end].copy_(A_mine)
            B[:, start:end].copy_(B_mine * scale)
            start = end
