"""Loads a model and its tokenizer, and finds each MoE layer's experts, router, shared experts and attention.

The only file that knows transformers' names. An experts module is one that transformers'
`use_experts_implementation` has decorated, so that any family which does is supported. The parts around it are
found by the few names that all families share, and by the shapes of what they hold.
"""

import copy
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from accelerate.utils import has_offloaded_params
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..base.errors import FileError, HotLoraError, ModelError
from ..base.precision import in_float32, say_once
from ..base.processes import own_device
from .connection import unreachable
from .experts_view import ExpertsView, is_experts
from .stored import Failure, check_complete, check_format, quantization_in

NANO = "nano"
NANO_PATH = Path(__file__).parents[1] / "nano" / "model"

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
LOADERS: dict[str, Callable[[dict[str, Any], Any, bool], dict[str, Any] | None]] = {}
"""By the `quant_method` of a checkpoint: what its config is to say of its quantization, given what it says, a
`quantization_config` and `dequantize`, for it to be loaded with its experts as they are; None: as given.
`adapter.packed_loading` fills it."""
_ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


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


def load_model(
    name_or_path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    quantization_config: Any = None,
    distributed_config: Any = None,
    attn_implementation: str | None = None,
    dequantize: bool = False,
) -> PreTrainedModel:
    """Loads a causal language model with MoE layers, in eval mode.

    Args:
        name_or_path: a local folder, a name on the Hub, or "nano" for the embedded model.
        dtype: "auto" is the checkpoint's own on an accelerator and float32 on the CPU, where half precision is slower;
            by far where the CPU has no instructions for it, which is said then.
        device: "auto" is cuda if there is one, else the CPU.
        quantization_config: as transformers takes it; `quantize.ExpertsQuantization(4)` stores the routed experts
            in 4 bits, which others leave alone.
        attn_implementation: as transformers takes it; None: its choice.
        dequantize: make the experts of a checkpoint in MXFP4 (gpt-oss) or block FP8 dense; by default they stay as they
            are stored, and adapters train on them.
        distributed_config: transformers' DistributedConfig: how the weights, which are frozen then, are spread over
            processes, each of which reads its own part.

    Raises:
        ModelError: not found, not a causal language model, or without MoE layers that are supported.
    """
    source = model_source(name_or_path)
    target = checked_device(device)
    if target.type == "cuda" and target.index is None:
        target = own_device() or target
    is_left_to_us, failure = dtype == "auto" and target.type == "cpu", None
    dtype = torch.float32 if is_left_to_us else dtype
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if is_left_to_us:
            say_once(in_float32(own_dtype(config)))
        _built(config, attn_implementation)  # before gigabytes of weights are read
        check_format(config, LOADERS, quantization_config)
        is_quantized = quantization_in(config) is not None
        stored = _quantization(config, quantization_config, dequantize, bool(distributed_config))
        failure = getattr(stored, "failure", None) or (quantization_in(config) or {}).get("failure")
        with failure.alone() if isinstance(failure, Failure) else nullcontext():
            model, found = auto_class(config).from_pretrained(
                source,
                config=config,
                dtype=dtype,
                trust_remote_code=False,
                quantization_config=stored,
                attn_implementation=attn_implementation,
                output_loading_info=True,
                **({"distributed_config": distributed_config} if distributed_config else {"device_map": {"": target}}),
            )
        check_complete(found, is_quantized)
        if model.dtype == torch.float64 and model.config._experts_implementation == "grouped_mm":
            model.set_experts_implementation("eager")  # grouped_mm, transformers' own choice, has no float64
        if distributed_config:  # now: what FSDP has gathered for a forward is frozen only if its shards were
            model.requires_grad_(False)
    except ModelError as error:
        raise ModelError(f"{name_or_path}: {error}") from None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of every kind: a broken file is told by whatever trips over it
        if isinstance(failure, Failure) and failure.error is not None:
            if isinstance(failure.error, ModelError):
                raise ModelError(f"{name_or_path}: {failure.error}") from failure.error
            raise failure.error from error
        fix = 'Give a folder with config.json and safetensors, a name on the Hub, or "nano".'
        if distributed_config:
            fix += " If it loads in one process, leave out --expert-parallel, or launch without FSDP."
        raise ModelError(
            f"no causal language model could be loaded from {str(name_or_path)!r}: {_first_line(error)} {fix}"
        ) from error
    return model.eval()


def packing(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The `quantization_config` of a checkpoint whose experts stay as they are stored; None of any other."""
    for part in (config, config.get_text_config()):
        found = getattr(part, "quantization_config", None)
        if isinstance(found, dict) and found.get("quant_method") in LOADERS:
            return found
    return None


def packed_bytes(config: PreTrainedConfig) -> float | None:
    """Bytes of an expert's weight, with its share of the scales, as a packed checkpoint has them; None of others."""
    if (checkpoint := packing(config)) is None:
        return None
    if checkpoint["quant_method"] == "mxfp4":
        return 0.5 + 1 / 32
    rows, columns = checkpoint.get("weight_block_size") or (128, 128)
    return 1 + 4 / (rows * columns)


def is_stored_quantized(path: str | Path) -> bool:
    """Whether the checkpoint of a `config.json` (or a folder with one) is quantized, by whomever."""
    config = model_from_config(path).config
    return any(getattr(part, "quantization_config", None) is not None for part in (config, config.get_text_config()))


def check_packed(name_or_path: str | Path, config: PreTrainedConfig, given: Any, dequantize: bool = False) -> None:
    """ModelError: `load_model` would not take a checkpoint in this format, or not with this `quantization_config`."""
    try:
        check_format(config, LOADERS, given)
        if (checkpoint := packing(config)) is not None:
            LOADERS[checkpoint["quant_method"]](dict(checkpoint), given, dequantize)
    except ModelError as error:
        raise ModelError(f"{name_or_path}: {error}") from None


def _quantization(config: PreTrainedConfig, given: Any, dequantize: bool, is_spread: bool) -> Any:
    """What transformers is to be given; a packed checkpoint's config is changed, so that it is loaded as it is."""
    checkpoint = packing(config)
    if checkpoint is None:
        return given
    if is_spread:  # transformers shards what it has made dense
        say_once(
            f"the experts, in {checkpoint['quant_method']} in the checkpoint, are made dense: weights that are spread "
            "over processes are not kept packed"
        )
        checkpoint["dequantize"] = True
        return given
    stored = LOADERS[checkpoint["quant_method"]](dict(checkpoint), given, dequantize)
    if stored is None:
        return given
    checkpoint.clear()
    checkpoint.update(stored)
    return None


def checked_device(device: str | torch.device) -> torch.device:
    """The device that `load_model` means by it. ModelError: there is none such here."""
    try:
        target = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError as error:
        raise ModelError(f"device {str(device)!r} does not exist: give auto, cpu, cuda or cuda:0.") from error
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ModelError(f"device {str(device)!r} does not exist: there are {count} GPUs here. Give auto or cpu.")
    return target


def checked_dtype(dtype: str | torch.dtype) -> None:
    """ModelError: none that a model is trained or run in."""
    name = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    if name not in ("auto", "float32", "bfloat16", "float16", "float64"):
        raise ModelError(f"dtype {str(dtype)!r} does not exist: give auto, float32, bfloat16, float16 or float64.")


def structure(name_or_path: str | Path, attn_implementation: str | None = None) -> PreTrainedModel:
    """The model's modules and shapes on the meta device, from its config alone. ModelError: as `load_model`."""
    config = load_config(name_or_path)
    try:
        return _built(config, attn_implementation)
    except ModelError as error:
        raise ModelError(f"{name_or_path}: {error}") from None


def load_config(name_or_path: str | Path) -> PreTrainedConfig:
    """The config that belongs to `load_model(name_or_path)`.

    Raises:
        ModelError: not found.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(model_source(name_or_path), trust_remote_code=False)
    except HotLoraError:
        raise
    except Exception as error:
        raise ModelError(f"no config could be loaded from {str(name_or_path)!r}: {_first_line(error)}") from error
    return config


def checkpoint_dtype(name_or_path: str | Path) -> torch.dtype:
    """The dtype that a checkpoint is saved in; float32 where its config does not say. Raises as `load_config`."""
    return own_dtype(load_config(name_or_path))


def vocab_size(name_or_path: str | Path) -> int | None:
    """Rows of a checkpoint's embedding, by its config; None where it does not say. Raises as `load_config`."""
    return getattr(load_config(name_or_path).get_text_config(), "vocab_size", None)


def own_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The dtype that a config states for its text model; float32 where it does not say."""
    stated = config.get_text_config().dtype
    return stated if isinstance(stated, torch.dtype) else torch.float32


def load_tokenizer(name_or_path: str | Path) -> Any:
    """The tokenizer that belongs to `load_model(name_or_path)`: padding on the right, with a pad token.

    Raises:
        ModelError: not found.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_source(name_or_path), trust_remote_code=False)
    except HotLoraError:
        raise
    except Exception as error:  # tokenizers knows no other kind
        raise ModelError(
            f"no tokenizer could be loaded from {str(name_or_path)!r}: {_first_line(error)} "
            'Give a folder with tokenizer.json, a name on the Hub, or "nano".'
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def model_from_config(path: str | Path) -> PreTrainedModel:
    """The model that a `config.json` (or a folder with one) describes, on the meta device: shapes without weights.

    Raises:
        FileError: the file is missing or is not a transformers config.
        ModelError: the config is of a dense or an unsupported model.
    """
    file = NANO_PATH if str(path) == NANO else Path(path).expanduser()
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise FileError(f"{file} does not exist. Give a model's config.json, or the folder that holds it.")
    try:
        config = _shapes_of(file) or AutoConfig.from_pretrained(str(file), trust_remote_code=False)
    except Exception as error:
        raise FileError(
            f"{file} is not a config.json that transformers knows: {_first_line(error)} "
            "It must be JSON with a `model_type`."
        ) from error
    return _built(config)


# Models of remote code with the modules, shapes and names of fields of a family of transformers.
_SHAPED_AS = {"deepseek": "glm4_moe"}  # DeepSeek-MoE-16B


def _shapes_of(file: Path) -> PreTrainedConfig | None:
    """The config of a model that transformers itself does not know, as that of a family with the same shapes: enough to
    count parameters and FLOPs. None of any other."""
    raw = json.loads(file.read_text(encoding="utf-8"))
    known = _SHAPED_AS.get(raw.get("model_type", "")) if isinstance(raw, dict) else None
    if known is None:
        return None
    drop = ("model_type", "auto_map", "architectures", "transformers_version")
    fields = {name: value for name, value in raw.items() if name not in drop}
    heads, width = raw["num_attention_heads"], raw["hidden_size"]
    return AutoConfig.for_model(known, **{"head_dim": width // heads, **fields})


def model_source(name_or_path: str | Path) -> str:
    """A folder or Hub name for transformers. A missing folder is told here, before the Hub is asked."""
    text = str(name_or_path)
    if text == NANO:
        if not (NANO_PATH / "config.json").is_file():
            raise ModelError(f"the embedded model is not in {NANO_PATH}. Install the package again.")
        return str(NANO_PATH)
    path = Path(text).expanduser()
    if path.is_dir():
        return str(path)
    is_local = isinstance(name_or_path, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1
    if is_local or path.exists() or path.parent.is_dir():  # a name on the Hub has an owner: OWNER/NAME
        raise ModelError(
            f"{text!r} is not a folder. Give the folder that holds the model's config.json, OWNER/NAME on the Hub, or "
            f"{NANO!r}."
        )
    if not isinstance(huggingface_hub.try_to_load_from_cache(text, "config.json"), str) and (away := unreachable()):
        raise ModelError(
            f"{text!r} is no folder here, and the Hub cannot be reached ({away}): check the path, or the network."
        )
    return text


def auto_class(config: PreTrainedConfig) -> Any:
    """The auto class that trains and generates text with this config: for a multimodal wrapper the wrapper's."""
    for auto, mapping in (
        (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
        (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    ):
        if type(config) in mapping:
            return auto
    raise ModelError(
        f"this {config.model_type} model is no causal language model, and hotlora fine-tunes no other: use one whose "
        "decoder alone generates text."
    )


def _built(config: PreTrainedConfig, attn_implementation: str | None = None) -> PreTrainedModel:
    """The model's modules and shapes, without weights. ModelError: it has no MoE layers that are supported, or not this
    attention."""
    auto = auto_class(config)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto.from_config(config).eval()
    except Exception as error:  # of every kind: a broken config is told by whatever trips over it
        raise ModelError(
            f"transformers cannot build a {config.model_type} model from this config: {_first_line(error)}"
        ) from error
    moe_layers(model)
    if attn_implementation is not None:
        try:
            with torch.device("meta"):
                auto.from_config(copy.deepcopy(config), attn_implementation=attn_implementation)
        except Exception as error:  # of every kind: each has checks of its own
            raise ModelError(
                f"attn_implementation = {attn_implementation!r} cannot be used with this {config.model_type} model "
                f"({_first_line(error)}): leave it out, or give one of {', '.join(_ATTENTIONS)}."
            ) from error
    return model


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


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(". ") + "."
