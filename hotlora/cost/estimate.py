"""Memory and time of a training step before a run, from a model's config alone. Nothing of the model is loaded.

`activations` finds out what a step keeps, `memory` adds up bytes.
"""

import copy
import functools
import inspect
import math
import os
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, ParamSpec, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..adapter.config import HotLoraConfig
from ..adapter.offload_embedding import is_apart
from ..adapter.quantized import BLOCK
from ..base.errors import HotLoraError, ModelError
from ..base.quiet import quiet
from ..hf.experts_view import ExpertsView
from ..hf.linears import plain_linears
from ..hf.models import auto_class, config_text, model_from_config, own_dtype, packed_bytes
from ..hf.moe_layers import moe_layers, num_experts_per_tok, unwrap
from ..routing.plan import ExpertPlan
from ..routing.profile import experts_kept
from ..training.rank_growth import allocated
from .activations import activation_arrays, expert_row_bytes, masked_layers, rest_of_step
from .flops import expert_adapter_flops, forward_flops, perft_flops, step_flops
from .memory import ExpertLayer, Step, Storage, memory, transfer_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What families multiply their LM head's output with, or cap it at.
_AFTER_THE_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
_LAYER = re.compile(r"(.*\.layers\.\d+)\.")
_STORAGE = tuple(field.name for field in fields(Storage))
_P = ParamSpec("_P")


def estimate(config: str | Path, *, flops_per_second: float | None = None, **options: Any) -> dict[str, Any]:
    """What a training step needs: bytes by kind, FLOPs, and seconds.

    Args:
        config: a config.json, its folder, or "nano".
        flops_per_second: what the machine gets through; None: no time is estimated. `hotlora bench` measures it.
        options: `step_of`'s, and `memory.Storage`'s.

    Returns:
        `memory`: as `memory.memory` has it. `transfer_bytes`: of offloaded experts, a batch. `flops`: of a step, with
        what is computed again, and a token's.

    Raises:
        HotLoraError: as `step_of`; an option of storage that does not exist.
    """
    if flops_per_second is not None and not 0 < flops_per_second < math.inf:
        raise HotLoraError(f"{flops_per_second / 1e12:g} TFLOP/s is out of range: a rate is above 0.")
    storage, options = split(options)
    step = step_of(config, **options)
    flops = step.flops + (step.recomputed if storage.gradient_checkpointing else 0)
    result: dict[str, Any] = {
        "memory": memory(step, storage), "expert_bytes_per_token_layer": round(step.expert_row),
        "coverage": step.coverage, "trainable": step.trainable, "transfer_bytes": round(transfer_bytes(step, storage)),
        "flops": {"forward_per_token": dict(step.forward), "adapter_per_token": step.adapter, "step": flops},
        "tokens": step.tokens, "device": step.device, "dtype": step.dtype,
    }  # fmt: skip
    if flops_per_second:
        seconds = flops / flops_per_second
        speed = step.tokens / seconds
        result["time"] = {"flops_per_second": flops_per_second, "seconds_per_step": seconds, "tokens_per_second": speed}
    return result


def split(options: dict[str, Any]) -> tuple[Storage, dict[str, Any]]:
    """`estimate`'s options: how it is stored, and those of `step_of`."""
    stored = {name: value for name, value in options.items() if name in _STORAGE}
    return Storage(**stored), {name: value for name, value in options.items() if name not in _STORAGE}


def _once(function: Callable[_P, Step]) -> Callable[_P, Step]:
    """The same step is not found out twice: `--fit`, the check before a run and each run of a sweep ask for it."""
    found: dict[tuple[str | bool, ...], Step] = {}
    signature = inspect.signature(function)

    @functools.wraps(function)
    def once(*args: _P.args, **kwargs: _P.kwargs) -> Step:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        # The file may be another one by now. 4 and 4.0 are equal, and one of them is refused.
        content = config_text(given.arguments.pop("config"))
        key = (content, repr(given.arguments), torch.cuda.is_available(), os.environ.get("HOTLORA_KERNELS", ""))
        if key not in found:
            found[key] = function(*args, **kwargs)
        return found[key]

    return once


@_once
def step_of(
    config: str | Path,
    *,
    batch_size: int,
    max_length: int,
    layers: int | None = None,
    experts_per_layer: int | str | None = None,
    fraction: float | None = None,
    coverage: float | None = None,
    r: int = 32,
    train_attention: bool = True,
    train_router: bool = True,
    train_shared: bool = True,
    train_a: bool = True,
    share_a: bool = False,
    normalize_moe_lora: bool = False,
    grow_every: int | None = None,
    perft: str | None = None,
    perft_adapters: int = 1,
    perft_top_k: int = 1,
    padded: bool = False,
    packed: bool = False,
    attn_implementation: str | None = None,
    dtype: str = "auto",
    device: str | torch.device = "cuda",
) -> Step:
    """The parts of a training step of `batch_size` x `max_length` tokens.

    Args:
        config: a config.json, its folder, or "nano".
        layers: cut the model to its first layers.
        experts_per_layer, fraction: the budget, as for `select_experts`, or "top_k": the router's K; none means all.
        coverage: share of assignments to adapted experts; None: as in a layer whose loads have a CV of 1.
        padded: the rows of a batch are of several lengths, and not packed: attention has a mask, and keeps more.
        packed: all examples of a batch are one row, as TRL's packing has them. Attention has a mask over the whole of
            it, but for kernels that know where examples end, as flash_attention_2.
        attn_implementation: as `hotlora.load_model` takes it.
        dtype: of the base, and of what is computed; auto: as `train` has it, the config's own on a GPU and float32 on
            the CPU. Adapters are float32.
        device: cuda or cpu, what the step is for: its short-lived workspace differs. It need not be here: without
            CUDA one layer's experts are tried out on the CPU, where a little else is kept.

    Raises:
        FileError, ModelError: as `models.model_from_config`.
        PlanError: a budget or rank out of range.
        HotLoraError: anything else out of range.
    """
    for name, value in (("batch_size", batch_size), ("max_length", max_length)):
        if value < 1:
            raise HotLoraError(f"{name} is {value}: it must be 1 or more.")
    if coverage is not None and not 0 <= coverage <= 1:
        raise HotLoraError(f"coverage is {coverage}: it is a share, from 0 to 1.")
    device = device_of(device)
    cut = sized_config(config, layers)
    compute = torch_dtype(dtype, cut, device.type)
    meta = meta_model(cut)
    found = moe_layers(meta)
    kept = [layer.num_experts for layer in found]
    if experts_per_layer is not None or fraction is not None:
        number = cast(int | None, num_experts_per_tok(meta) if experts_per_layer == "top_k" else experts_per_layer)
        kept = [experts_kept(layer.num_experts, fraction, number) for layer in found]
    if coverage is None:
        coverage = coverage_at(kept[0] / found[0].num_experts)
    experts = {layer.layer: tuple(range(n)) for layer, n in zip(found, kept, strict=True)}
    if grow_every is not None:
        r = allocated(r, r)["r"]
    lora = HotLoraConfig(
        plan=ExpertPlan(experts, found[0].num_experts, rule="first", params={}), r=r,
        train_attention=train_attention, train_router=train_router, train_shared=train_shared, train_a=train_a,
        share_a=share_a, normalize_moe_lora=normalize_moe_lora, perft=perft, perft_adapters=perft_adapters,
        perft_top_k=perft_top_k,
    )  # fmt: skip
    masked, rows, length = masked_layers(cut, attn_implementation), batch_size, max_length
    if flattened := packed and masked != "none":
        masked, rows, length = "all", 1, batch_size * max_length
    try:
        on = device if device.type == "cuda" and torch.cuda.is_available() else torch.device("cpu")
        row = expert_row_bytes(meta, lora, coverage, compute, on)
        rest = rest_of_step(
            cut, lora, rows, length, compute, device.type, attn_implementation, flattened=flattened
        )  # fmt: skip
    except (RuntimeError, TypeError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"the activations of a {cut.model_type} model cannot be estimated from its config: {reason}"
        ) from error
    if perft is not None:
        of_experts = perft_flops(meta, r, perft, perft_adapters, perft_top_k, coverage)
    else:
        of_experts = expert_adapter_flops(meta, lora.rank_of_experts(meta), {layer.layer: coverage for layer in found})
    adapter = of_experts + 2.0 * rest.beside_experts
    forward = forward_flops(meta, length, masked)
    text, tokens = cut.get_text_config(), batch_size * max_length
    view = ExpertsView(unwrap(meta.get_submodule(found[0].experts)))
    of_layers = tuple(
        (kept + round(row * tokens) * (layer in experts), padding * padded)
        for layer, (kept, padding) in enumerate(rest.layers)
    )
    return Step(
        device=device.type, dtype=str(compute).removeprefix("torch."), itemsize=compute.itemsize, tokens=tokens,
        top_k=num_experts_per_tok(meta), packed=packed_bytes(cut), width=text.hidden_size, vocabulary=text.vocab_size,
        whole_logits=any(getattr(text, name, None) not in (None, 1) for name in _AFTER_THE_HEAD),
        expert_widths=(*view.widths, view.num_parts), activation=activation_arrays(view, compute),
        has_biases=view.has_biases, trained=rest.trained, frozen=rest.frozen,
        expert_row=row, rest=rest.kept, rest_again=rest.again,
        rest_backward=rest.backward, rest_padding=rest.padding if padded else 0, layers=of_layers, masks=rest.masks,
        length=length, flattened=flattened,
        coverage=coverage, forward=forward, adapter=adapter,
        expert_adapter=of_experts,
        flops=step_flops(forward, adapter, tokens), **_weights(meta, kept),
    )  # fmt: skip


def device_of(name: str | torch.device) -> torch.device:
    """HotLoraError: no such kind of device."""
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise HotLoraError(f"device is {str(name)!r}: give cuda or cpu.") from error


def _weights(meta: PreTrainedModel, kept: list[int]) -> dict[str, Any]:
    """Numbers of weights, as `Step` has them. kept: of each MoE layer's experts, how many are adapted."""
    layers, head, embedding = moe_layers(meta), meta.get_output_embeddings(), cast(Any, meta.get_input_embeddings())
    modules: list[Any] = [unwrap(meta.get_submodule(layer.experts)) for layer in layers]
    routed = {id(p) for module in modules for p in module.parameters(recurse=False) if p.ndim == 3}
    views = [ExpertsView(module) for module in modules]
    experts = [
        ExpertLayer(layer.num_experts, hot, getattr(view.experts, view.up_name).numel(), view.experts.down_proj.numel())
        for layer, hot, view in zip(layers, kept, views, strict=True)
    ]
    linear = [module.weight.numel() for module in plain_linears(meta).values() if module.in_features % BLOCK == 0]
    blocks: dict[str, list[int]] = {}
    for name, parameter in meta.named_parameters():
        if match := _LAYER.match(name):
            blocks.setdefault(match[1], [0, 0])[id(parameter) not in routed] += parameter.numel()
    total = sum(p.numel() for p in meta.parameters())
    of_experts = sum(layer.up + layer.down for layer in experts)
    return {
        "experts": tuple(experts), "linear": tuple(linear), "other": total - of_experts - sum(linear),
        "embedding": embedding.weight.numel() if is_apart(meta) else 0, "head": head.weight.numel(),
        "blocks": tuple((a, b) for a, b in blocks.values()),
    }  # fmt: skip


def coverage_at(fraction: float, cv: float = 1.0) -> float:
    """Share of assignments that the busiest `fraction` of experts take, where loads are lognormal with this CV."""
    if not 0 < fraction < 1:
        return float(fraction >= 1)
    sigma = math.sqrt(math.log1p(cv * cv))
    quantile = torch.special.ndtri(torch.tensor(1 - fraction, dtype=torch.float64))
    return float(torch.special.ndtr(sigma - quantile))


def sized_config(config: str | Path, layers: int | None = None) -> PreTrainedConfig:
    """A model's config, cut to its first `layers` decoder layers. Per-layer lists are cut with it."""
    whole = copy.deepcopy(model_from_config(config).config)
    text = whole.get_text_config()
    depth = text.num_hidden_layers
    if layers is None:
        return whole
    if not 1 <= layers <= depth:
        raise HotLoraError(f"layers is {layers}: this model has {depth}; give 1 to {depth}.")
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == depth:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return whole


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config without weights. ModelError where no MoE layer is left."""
    with torch.device("meta"), quiet():
        model: PreTrainedModel = auto_class(config).from_config(copy.deepcopy(config))
    moe_layers(model)
    return model


def torch_dtype(name: str, config: PreTrainedConfig, device_type: str = "cuda") -> torch.dtype:
    """float32, bfloat16 or float16; "auto" is as `load_model` has it: the config's own, and float32 on a CPU."""
    if name == "auto":
        return torch.float32 if device_type == "cpu" else own_dtype(config)
    if name not in DTYPES:
        raise HotLoraError(f"dtype is {name!r}: choose one of auto, {', '.join(DTYPES)}.")
    return DTYPES[name]
