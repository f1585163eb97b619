"""Floating-point operations of a training step, by formula: from a model's shapes alone, on any device, meta too.

A multiply and an add are two. Matrix products are counted: Linears, routed experts, routers, the causal half of
attention's scores. Norms, activations, embeddings, convolutions and state space scans are not.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..hf.experts_view import ExpertsView
from ..hf.moe_layers import attention_modules, moe_layers, num_experts_per_tok, unwrap

_NO_SCORES = re.compile("linear|mamba|conv|recurrent|moe|mlp")  # kinds of layers without softmax attention
_TOWERS = re.compile("vision|visual|audio")


def forward_flops(model: PreTrainedModel, length: int, masked: str = "none") -> dict[str, float]:
    """Of the base model's forward pass, a token, in rows of `length` tokens.

    masked: layers whose attention works out the scores of all keys, those that a mask hides too: none, those with a
    `sliding` window shorter than the row, or all.

    Keys: experts (routed), router, attention (the adapted projections), scores, dense (all other Linears: shared
    experts, dense layers), head.
    """
    top_k = num_experts_per_tok(model)
    attention = set(attention_modules(model))
    flops = dict.fromkeys(("experts", "router", "attention", "scores", "dense", "head"), 0.0)
    counted: set[int] = set()
    for layer in moe_layers(model):
        flops["experts"] += 2.0 * top_k * _expert_weights(model.get_submodule(layer.experts))
        weight = model.get_submodule(layer.router).get_parameter(layer.router_weight)
        flops["router"] += 2.0 * weight.numel()
        counted.add(id(weight))
        for path in layer.shared:
            shared = model.get_submodule(path)
            if not isinstance(shared, nn.Linear):  # raw 3-D parameters, all of which see every token
                flops["dense"] += 2.0 * sum(p.numel() for p in shared.parameters() if p.ndim == 3)
    for path in attention:
        flops["attention"] += 2.0 * _weight(model, path).numel()
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        other = type(module) is nn.Linear and module is not head and path not in attention
        if other and id(module.weight) not in counted and not _TOWERS.search(path):
            flops["dense"] += 2.0 * module.weight.numel()
    flops["head"] = 2.0 * head.weight.numel()
    flops["scores"] = _score_flops(model.config.get_text_config(), length, masked)
    return flops


def attention_adapter_flops(model: PreTrainedModel, r: int) -> float:
    """Of LoRA on attention, forward, a token."""
    return sum(2.0 * r * sum(_weight(model, path).shape) for path in attention_modules(model))


def expert_adapter_flops(
    model: PreTrainedModel, r: int, coverage: Mapping[int, float], *, shared_a: bool = False
) -> float:
    """Of split LoRA on experts, forward, a token.

    coverage: decoder layer -> share of its assignments that go to an adapted expert, in [0, 1]. shared_a: gate and up
    have one A, as on PEFT's fused parameter.
    """
    top_k, total = num_experts_per_tok(model), 0.0
    for layer in moe_layers(model):
        view = ExpertsView(unwrap(model.get_submodule(layer.experts)))
        pairs = (view.num_parts + 1) * sum(view.widths)
        if shared_a:
            pairs -= (view.num_parts - 1) * view.widths[0]
        total += 2.0 * r * top_k * pairs * coverage.get(layer.layer, 0.0)
    return total


def perft_flops(model: PreTrainedModel, r: int, kind: str, adapters: int, top_k: int, coverage: float) -> float:
    """Of PERFT's adapters beside the experts, forward, a token. kind: E, R or D; top_k: that of R's own router;
    coverage: of E, the share of assignments to planned experts."""
    layers = moe_layers(model)
    width = ExpertsView(unwrap(model.get_submodule(layers[0].experts))).widths[0]
    applied = {"E": num_experts_per_tok(model) * coverage, "R": top_k, "D": adapters}[kind]
    router = 2.0 * adapters * width if kind == "R" else 0.0
    return len(layers) * (applied * 2.0 * r * 2 * width + router)


def step_flops(forward: Mapping[str, float], adapter: float, tokens: int) -> float:
    """Of a step on a frozen base: the base's forward, its backward to the inputs alone (which is as much, and twice
    as much for the scores), and three times the adapter's forward."""
    return tokens * (2 * sum(forward.values()) + forward["scores"] + 3 * adapter)


def dense_update_flops(model: PreTrainedModel, forward: Mapping[str, float], r: int, tokens: int) -> float:
    """What PEFT's `target_parameters` does on experts in a step: it builds W + BA for all experts, forms the dense
    gradient of W from all rows, and takes the factors' gradients from that."""
    experts: list[Any] = [model.get_submodule(layer.experts) for layer in moe_layers(model)]
    weights = sum(x.num_experts * _expert_weights(x) for x in experts)
    return forward["experts"] * tokens + 3 * 2.0 * r * weights


def _expert_weights(experts: Any) -> int:
    """Of one expert."""
    return ExpertsView(unwrap(experts)).num_weights_of_an_expert


def _weight(model: PreTrainedModel, path: str) -> Tensor:
    return model.get_submodule(path).get_parameter("weight")


def _score_flops(config: Any, length: int, masked: str) -> float:
    """Queries times keys, and the weights times values, a token, over all layers with softmax attention. Sparse
    attention counts as full."""
    layers = getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["attention"] * config.num_hidden_layers
    total = 0.0
    for layer, kind in zip(layers, kinds, strict=True):
        if _NO_SCORES.search(kind):
            continue
        heads = layer.num_attention_heads
        head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // heads
        query = (getattr(layer, "qk_nope_head_dim", 0) or 0) + (getattr(layer, "qk_rope_head_dim", 0) or 0)
        width = (query or head_dim) + (getattr(layer, "v_head_dim", None) or head_dim)
        window = min(getattr(layer, "sliding_window", None) or length, length) if "sliding" in kind else length
        has_mask = masked == "all" or (masked == "sliding" and window < length)
        keys = length if has_mask else window - window * window / (2 * length)  # of a token, on average
        total += 2.0 * heads * width * keys
    return total
