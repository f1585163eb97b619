"""Finds each MoE layer's experts, router, shared experts and attention in a model of any family.

The only file that knows the names of transformers' modules. An experts module is one that transformers'
`use_experts_implementation` has decorated, so that any family which does is supported. The parts around it are
found by the few names that all families share, and by the shapes of what they hold.
"""

import hashlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..base.errors import ModelError
from .experts_view import ExpertsView, is_experts

_ROUTERS = ("gate", "router")
# q, k, v and o under the names of all families: MLA's split ones, fused ones, linear attention's. Not the gates
# of gated attention, not indexers, and not the mixers of state space models, whose kernels read `out_proj.weight`.
_QUERY = re.compile(r"(in_proj_)?q(kvz?)?(_(a|b|gate))?(_proj)?")
_ATTENTION = re.compile(r"in_proj_qkvz?|(q|k|v|kv|qkv|o|out)(_(a|b|gate))?_proj(_with_mqa|_current|_delayed)?")
_NOT_ATTENTION = re.compile(r"indexer|compressor")
# Names under which a config counts its experts, which tells an unsupported MoE family from a dense model, and
# the experts of a token.
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
_GROUPS = ("n_group", "num_expert_group")
_SKIP_TOKENS = ("zaya",)


@dataclass(frozen=True)
class MoELayer:
    """Where one MoE layer's parts are. Every path is a module path in the model it was found in."""

    layer: int
    """The decoder layer's index, never the ordinal among MoE layers."""
    experts: str
    """The module that holds all routed experts, e.g. `model.layers.3.mlp.experts`."""
    router: str
    """The module that chooses experts, e.g. `model.layers.3.mlp.gate`."""
    router_weight: str
    """The parameter of the router whose rows are the experts' scores, e.g. `weight` or `proj.weight`."""
    shared: tuple[str, ...]
    """The shared experts' Linears, never the scalar `shared_expert_gate`; or the module that holds all shared
    experts as 3-D parameters."""
    attention: tuple[str, ...]
    """The q, k, v, o Linears of this decoder layer; under MLA and in linear attention what they are split into or
    fused in. None in a layer whose mixer is a state space model."""
    num_experts: int
    """E."""


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of `model`'s text decoder, ascending by decoder index.

    Works on a transformers model, on a `PeftModel` around one, and on the meta device. In an adapted model a
    path is the wrapper's, which takes the same arguments as the module it wraps. Vision towers are left alone,
    and so are the experts that see image tokens only.

    Raises:
        ModelError: the family is not supported, or the model has no MoE layer.
    """
    modules = dict(_modules(model))
    decoders = _decoder_layers(model, modules)
    layers = []
    for index, decoder in decoders.items():
        inside = _inside(decoder, modules)
        for path, module in inside.items():
            if not is_experts(module) or "vision" in path:
                continue
            num_experts = ExpertsView(module).num_experts_everywhere
            router, router_weight = _router(path, inside, num_experts)
            layers.append(
                MoELayer(
                    layer=index,
                    experts=path,
                    router=router,
                    router_weight=router_weight,
                    shared=_shared_paths(path, decoder, inside),
                    attention=_attention_paths(decoder, inside),
                    num_experts=num_experts,
                )
            )
    if not layers:
        raise _no_experts(model)
    if len({layer.layer for layer in layers}) < len(layers):
        raise ModelError(f"a decoder layer has several experts modules: {[layer.experts for layer in layers]}.")
    return sorted(layers, key=lambda layer: layer.layer)


def attention_modules(model: nn.Module) -> list[str]:
    """Paths of `MoELayer.attention` of all decoder layers, dense ones too, in the order of the layers."""
    modules = dict(_modules(model))
    decoders = _decoder_layers(model, modules)
    in_order = [decoders[index] for index in sorted(decoders)]
    return [name for decoder in in_order for name in _attention_paths(decoder, _inside(decoder, modules))]


def num_experts_per_tok(model: nn.Module) -> int:
    """K: how many routed experts each token is sent to.

    Raises:
        ModelError: the config does not say.
    """
    config = _config(model)
    for name in _TOP_K:
        if value := getattr(config, name, None):
            return int(max(value)) if isinstance(value, list | tuple) else int(value)
    raise ModelError(f"the config of this {config.model_type} model has none of {', '.join(_TOP_K)}.")


def check_in_memory(model: nn.Module) -> None:
    """ModelError where Accelerate keeps some of the model's weights elsewhere until each is used: PEFT's layers do not
    work on such weights, and gradients do not pass through them."""
    away = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    if away and any(map(has_offloaded_params, model.modules())):
        raise ModelError(
            f"{len(away)} of the model's weights, {away[0]} the first, are offloaded to disk or to the CPU's memory "
            "(device_map), where they cannot be adapted: load the model without device_map, its experts in 4 bits "
            "(quantize=4), or spread over several GPUs."
        )


def expert_groups(model: nn.Module) -> int | None:
    """How many groups of experts a router chooses from, before it chooses experts of these; None: it has no groups."""
    config = _config(model)
    found = next((number for name in _GROUPS if (number := getattr(config, name, None))), 1)
    return found if found > 1 else None


def skips_tokens(model: nn.Module) -> bool:
    """Whether a router may send a token to no expert, which it hands on as expert 0 with weight 0.

    In other families a weight of 0 is that of a choice, of a softmax that has underflowed.
    """
    return _config(model).model_type in _SKIP_TOKENS


def is_no_expert(index: Tensor, weight: Tensor) -> Tensor:
    """Of a family that `skips_tokens`: which choices, of indices and weights of one shape, are of no expert."""
    return (index == 0) & (weight == 0)


def fingerprint(model: nn.Module) -> str:
    """What a plan was made for, such as `olmoe-3f2a91c0b4d7`: the family and the first 12 hex digits of a sha256.

    Hashes the number of decoder layers and, for each MoE layer, its index and E, K, D, F. Weights, dtype, device and
    adapters do not enter, so a fine-tuned sister model shares it and a model on the meta device has it.
    """
    config = _config(model)
    found = moe_layers(model)
    top_k = num_experts_per_tok(model)
    layers = []
    for layer in found:
        width, expert_width = ExpertsView(unwrap(model.get_submodule(layer.experts))).widths
        layers.append([layer.layer, layer.num_experts, top_k, width, expert_width])
    structure = json.dumps({"num_hidden_layers": config.num_hidden_layers, "moe_layers": layers}, sort_keys=True)
    return f"{config.model_type}-{hashlib.sha256(structure.encode()).hexdigest()[:12]}"


def unwrap(module: nn.Module) -> Any:
    """The transformers module inside of any number of PEFT layers."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def _config(model: nn.Module) -> PreTrainedConfig:
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise ModelError(f"{type(model).__name__} has no transformers config. Give a transformers model.")
    return config.get_text_config()


def _no_experts(model: nn.Module) -> ModelError:
    config = _config(model)
    # A family's file that has the decorator at hand uses it: then this model has dense layers only.
    file = sys.modules[type(_decoder(model)).__module__]
    parts = (config, getattr(config, "ffn_config", None))  # dbrx counts them in a part of its own
    counts = any(getattr(part, name, None) for part in parts for name in _EXPERT_COUNTS)
    if hasattr(file, "use_experts_implementation") or not counts:
        return ModelError(
            f"this {config.model_type} model has no MoE layer: all of its decoder layers are dense, so it has no "
            "experts to choose from. Use a model with routed experts."
        )
    return ModelError(
        f"the experts of this {config.model_type} model are not behind transformers' experts interface "
        "(use_experts_implementation), so nothing can be adapted for some of them only. Some families compute all "
        "experts in a way of their own (llama4, dbrx, jetmoe, longcat_flash, step3p7); some quantized checkpoints "
        "(mxfp4, fp8) replace the experts' class: load those with hotlora.load_model."
    )


def _modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Like `named_modules`, but a PEFT layer and its inside count as the one module that it wraps."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        inner = unwrap(child)
        yield path, inner
        yield from _modules(inner, f"{path}.")


def _inside(decoder: str, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    return {path: module for path, module in modules.items() if path.startswith(f"{decoder}.")}


def _decoder_layers(model: nn.Module, modules: dict[str, nn.Module]) -> dict[int, str]:
    """Decoder index -> path of the text decoder's layers; a wrapper's vision and audio towers have such too."""
    model_type, decoder = _config(model).model_type, _decoder(model)
    if "input_ids" not in inspect.signature(decoder.forward).parameters:
        raise ModelError(f"the decoder of a {model_type} model reads no input_ids: it is no causal language model.")
    prefix = next((f"{path}." for path, module in modules.items() if module is decoder), "")
    layer = re.compile(re.escape(prefix) + r"layers\.(\d+)")
    return {int(match[1]): path for path in modules if (match := layer.fullmatch(path))}


def _decoder(model: nn.Module) -> nn.Module:
    get_decoder = getattr(model, "get_decoder", None)
    return get_decoder() if callable(get_decoder) else model


def _router(experts: str, inside: dict[str, nn.Module], num_experts: int) -> tuple[str, str]:
    """The experts' sibling that routes, and its scoring weight: its own, or that of the Linear inside of it with
    a row for each expert. It may have a few rows more: for shared experts, or for an expert that does nothing."""
    block = experts.rpartition(".")[0]
    for path in (f"{block}.{name}" for name in _ROUTERS):
        if path not in inside:
            continue
        weight = getattr(inside[path], "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.shape[0] >= num_experts:
            return path, "weight"
        linears = [
            (module.out_features, name.removeprefix(f"{path}."))
            for name, module in inside.items()
            if name.startswith(f"{path}.") and isinstance(module, nn.Linear) and module.out_features >= num_experts
        ]
        if linears:
            return path, f"{min(linears)[1]}.weight"
    raise ModelError(
        f"no router was found for {experts}: {block} has no {' or '.join(_ROUTERS)} with a weight of at least "
        f"{num_experts} rows."
    )


def _shared_paths(experts: str, decoder: str, inside: dict[str, nn.Module]) -> tuple[str, ...]:
    """Shared experts have `shared` in their name and sit somewhere between the experts' block and the decoder
    layer. Where experts sit on the decoder layer itself, as in gemma4, its dense mlp runs beside them for every
    token, and is the shared expert."""
    block = experts.rpartition(".")[0]
    parents = [decoder]
    for name in block.removeprefix(decoder).split(".")[1:]:
        parents.append(f"{parents[-1]}.{name}")
    found: list[str] = []
    for path, module in inside.items():
        parent, _, name = path.rpartition(".")
        named = "shared" in name or (parent == block == decoder and name == "mlp")
        if parent not in parents or not named or isinstance(module, nn.Linear):  # a Linear is the scalar gate
            continue
        linears = [p for p, m in inside.items() if p.startswith(f"{path}.") and isinstance(m, nn.Linear)]
        found += linears or [path]
    return tuple(found)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether it is torch's own linear layer, or bitsandbytes' in its place; routers are often subclasses."""
    kind = type(module)
    return kind is nn.Linear or (isinstance(module, nn.Linear) and kind.__module__.startswith("bitsandbytes."))


def _attention_paths(decoder: str, inside: dict[str, nn.Module]) -> tuple[str, ...]:
    mixers: dict[str, list[str]] = {}
    for path, module in inside.items():
        names = path.removeprefix(f"{decoder}.").split(".")
        if names[-1] == "linear":  # inkling2's projections hold theirs since transformers 5.24
            names.pop()
        is_projection = is_plain_linear(module) and _ATTENTION.fullmatch(names[-1])
        if is_projection and not _NOT_ATTENTION.search(path):
            mixers.setdefault(names[0], []).append(path)
    # Convolutions and state space models have an out_proj too, and no query.
    return tuple(
        path
        for paths in mixers.values()
        if any(_QUERY.fullmatch(p.removesuffix(".linear").rpartition(".")[2]) for p in paths)
        for path in paths
    )
