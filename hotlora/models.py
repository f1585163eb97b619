"""Loads a model and its tokenizer, and finds each MoE layer's experts, router, shared experts and attention.

The only file that knows transformers' names. What can be read off the modules is read off the modules: an
experts module is one that transformers' `use_experts_implementation` has decorated, its router is the sibling
that holds an `[E, D]` weight, and shared experts are the siblings that hold Linears of their own.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from .errors import FileError, ModelError

NANO = "nano"
NANO_PATH = Path(__file__).parent / "nano" / "model"

SUPPORTED = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")

_ATTENTION = "self_attn"
_ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
_DECODER_LAYER = re.compile(r"^(?:.*\.)?layers\.(\d+)(?=\.|$)")
# Names under which a config counts its experts: tells an unsupported MoE family from a dense model.
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class MoELayer:
    """Where one MoE layer's parts are. Every path is a module path in the model it was found in."""

    layer: int
    """The decoder layer's index, never the ordinal among MoE layers."""
    experts: str
    """The module that holds all routed experts, e.g. `model.layers.3.mlp.experts`."""
    router: str
    """The module that chooses experts, e.g. `model.layers.3.mlp.gate`."""
    shared: tuple[str, ...]
    """The shared experts' Linears; never the scalar `shared_expert_gate`."""
    attention: tuple[str, ...]
    """The q, k, v, o Linears of this decoder layer."""
    num_experts: int
    """E."""


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of `model`, ascending by decoder index.

    Works on a transformers model, on a `PeftModel` around one, and on the meta device. In an adapted model a
    path is the wrapper's, which takes the same arguments as the module it wraps.

    Raises:
        ModelError: the family is not supported, or the model has no MoE layer.
    """
    _check_family(_config(model))
    modules = dict(_modules(model))
    layers = []
    for path, module in modules.items():
        if not _is_experts(module):
            continue
        decoder = _decoder_path(path)
        block = path.rpartition(".")[0]
        siblings = {name: m for name, m in modules.items() if name.startswith(f"{block}.") and name != path}
        num_experts = cast(int, module.num_experts)
        layers.append(
            MoELayer(
                layer=int(decoder.rpartition(".")[2]),
                experts=path,
                router=_router_path(block, siblings, num_experts),
                shared=tuple(
                    name
                    for name, m in siblings.items()
                    # A Linear that hangs on the block itself is the scalar gate; an expert's hang one deeper.
                    if isinstance(m, nn.Linear) and name.count(".") > block.count(".") + 1
                ),
                attention=_attention_paths(decoder, modules),
                num_experts=num_experts,
            )
        )
    if not layers:
        raise ModelError(
            f"this {_config(model).model_type} model has no MoE layer: all of its decoder layers are dense. "
            "Use a model with routed experts."
        )
    return sorted(layers, key=lambda layer: layer.layer)


def attention_modules(model: nn.Module) -> list[str]:
    """Paths of the q, k, v, o Linears of all decoder layers, dense ones too, in the order of the layers."""
    _check_family(_config(model))
    modules = dict(_modules(model))
    decoders = [path for path in modules if (match := _DECODER_LAYER.match(path)) and match.end() == len(path)]
    return [name for decoder in decoders for name in _attention_paths(decoder, modules)]


def num_experts_per_tok(model: nn.Module) -> int:
    """K: how many routed experts each token is sent to."""
    config = _config(model)
    _check_family(config)
    return int(config.num_experts_per_tok)


def fingerprint(model: nn.Module) -> str:
    """What a plan was made for, such as `olmoe-3f2a91c0b4d7`: the family and the first 12 hex digits of a
    sha256.

    Hashes the number of decoder layers and, for each MoE layer, its index and E, K, D, F. Weights, dtype,
    device and adapters do not enter, so a fine-tuned sister model shares it and a model on the meta device
    has it.
    """
    config = _config(model)
    top_k = num_experts_per_tok(model)
    layers = []
    for layer in moe_layers(model):
        experts = unwrap(model.get_submodule(layer.experts))
        _, width, expert_width = experts.down_proj.shape  # [E, D, F]
        layers.append([layer.layer, layer.num_experts, top_k, width, expert_width])
    structure = json.dumps({"num_hidden_layers": config.num_hidden_layers, "moe_layers": layers}, sort_keys=True)
    return f"{config.model_type}-{hashlib.sha256(structure.encode()).hexdigest()[:12]}"


def unwrap(module: nn.Module) -> Any:
    """The transformers module inside of any number of PEFT layers."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def load_model(
    name_or_path: str | Path, *, dtype: str | torch.dtype = "auto", device: str | torch.device = "auto"
) -> PreTrainedModel:
    """Loads a causal language model with MoE layers, in eval mode.

    Args:
        name_or_path: a local folder, a name on the Hub, or "nano" for the embedded model.
        dtype: "auto" is the checkpoint's own on an accelerator and float32 on the CPU, where half precision is slower.
        device: "auto" is cuda if there is one, else the CPU.

    Raises:
        ModelError: not found, not a causal language model, or without MoE layers that are supported.
    """
    source = _source(name_or_path)
    target = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
    if dtype == "auto" and target.type == "cpu":
        dtype = torch.float32
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        _check_family(config)
        model = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, trust_remote_code=False, device_map={"": target}
        )
    except ModelError as error:
        raise ModelError(f"{name_or_path}: {error}") from None
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"no causal language model could be loaded from {str(name_or_path)!r}: {_first_line(error)} "
            'Give a folder with config.json and safetensors, a name on the Hub, or "nano".'
        ) from error
    moe_layers(model)
    return model.eval()


def checkpoint_dtype(name_or_path: str | Path) -> torch.dtype:
    """The dtype that a checkpoint is saved in, by its config; float32 where it does not say.

    Raises:
        ModelError: not found.
    """
    try:
        config = AutoConfig.from_pretrained(_source(name_or_path), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"no config could be loaded from {str(name_or_path)!r}: {_first_line(error)}") from error
    return config.get_text_config().dtype or torch.float32


def load_tokenizer(name_or_path: str | Path) -> Any:
    """The tokenizer that belongs to `load_model(name_or_path)`: padding on the right, with a pad token.

    Raises:
        ModelError: not found.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(_source(name_or_path), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"no tokenizer could be loaded from {str(name_or_path)!r}: {_first_line(error)} "
            'Give a folder with tokenizer.json, a name on the Hub, or "nano".'
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def model_from_config(path: str | Path) -> PreTrainedModel:
    """The model that a `config.json` (or a folder with one) describes, on the meta device: shapes without
    weights.

    Raises:
        FileError: the file is missing or is not a transformers config.
        ModelError: the config is of a dense or an unsupported model.
    """
    file = NANO_PATH if str(path) == NANO else Path(path).expanduser()
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise FileError(f"{file} does not exist. Give a model's config.json, or the folder that holds it.")
    try:
        config = AutoConfig.from_pretrained(str(file), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise FileError(
            f"{file} is not a config.json that transformers knows: {_first_line(error)} "
            "It must be JSON with a `model_type`."
        ) from error
    _check_family(config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).eval()


def _source(name_or_path: str | Path) -> str:
    """A folder or Hub name for transformers. A missing folder is told here, before the Hub is asked."""
    text = str(name_or_path)
    if text == NANO:
        if not (NANO_PATH / "config.json").is_file():
            raise ModelError(f"the embedded model is not in {NANO_PATH}. Install the package again.")
        return str(NANO_PATH)
    path = Path(text).expanduser()
    if path.is_dir():
        return str(path)
    if isinstance(name_or_path, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or path.exists():
        raise ModelError(f"{text!r} is not a folder. Give the folder that holds the model's config.json.")
    return text


def _config(model: nn.Module) -> PreTrainedConfig:
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise ModelError(f"{type(model).__name__} has no transformers config. Give a transformers model.")
    return config.get_text_config()


def _check_family(config: PreTrainedConfig) -> None:
    config = config.get_text_config()
    if config.model_type in SUPPORTED:
        return
    supported = ", ".join(SUPPORTED)
    if not any(getattr(config, name, None) for name in _EXPERT_COUNTS):
        raise ModelError(
            f"a {config.model_type} model has no MoE layer, so it has no experts to choose from. "
            f"Use a model of one of the families {supported}."
        )
    raise ModelError(f"the MoE family {config.model_type} is not supported yet. Supported families: {supported}.")


def _modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Like `named_modules`, but a PEFT layer and its inside count as the one module that it wraps."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        inner = unwrap(child)
        yield path, inner
        yield from _modules(inner, f"{path}.")


def _is_experts(module: Any) -> bool:
    return hasattr(module, "_apply_gate") and hasattr(module, "is_transposed") and hasattr(module, "down_proj")


def _decoder_path(path: str) -> str:
    match = _DECODER_LAYER.match(path)
    if match is None:
        raise ModelError(f"the experts at {path} are not inside a decoder layer. This model's layout is not supported.")
    return match.group(0)


def _router_path(block: str, siblings: dict[str, nn.Module], num_experts: int) -> str:
    routers = [
        name
        for name, module in siblings.items()
        if isinstance(weight := getattr(module, "weight", None), torch.Tensor)
        and weight.ndim == 2
        and weight.shape[0] == num_experts
        and name.count(".") == block.count(".") + 1
    ]
    if len(routers) != 1:
        raise ModelError(f"{block} should have one router of {num_experts} rows, and has {routers or 'none'}.")
    return routers[0]


def _attention_paths(decoder: str, modules: dict[str, nn.Module]) -> tuple[str, ...]:
    names = (f"{decoder}.{_ATTENTION}.{linear}" for linear in _ATTENTION_LINEARS)
    return tuple(name for name in names if isinstance(modules.get(name), nn.Linear))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(". ") + "."
