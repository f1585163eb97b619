"""Loads a model, its config and its tokenizer: a folder, a name on the Hub, or nano."""

import copy
import json
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
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
from ..base.processes import launched_device
from .connection import unreachable
from .moe_layers import moe_layers
from .sinks import default_attention
from .stored import Failure, check_complete, check_format, quantization_in

_NANO_FOLDER = Path(__file__).parents[1] / "nano"
NANOS = {"nano": _NANO_FOLDER / "model", "nano-qwen": _NANO_FOLDER / "qwen"}
"""The embedded models by name: one of OLMoE's form, and one of Qwen's, with shared experts and normalised top-k."""

LOADERS: dict[str, Callable[[dict[str, Any], Any, bool], dict[str, Any] | None]] = {}
"""By the `quant_method` of a checkpoint: what its config is to say of its quantization, given what it says, a
`quantization_config` and `dequantize`, for it to be loaded with its experts as they are; None: as given.
`adapter.packed_loading` fills it."""
_ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


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
        device: "auto" is cuda if there is one, else the CPU. Of several processes that were launched each takes its own
            GPU.
        quantization_config: as transformers takes it; `quantize.ExpertsQuantization(4)` stores the routed experts
            in 4 bits, which others leave alone.
        attn_implementation: as transformers takes it; None: its choice, but `sinks.NAME` for families with sinks. (For
            transformers' continuous batching and output_attentions: "eager".)
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
        target = launched_device() or target
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
                attn_implementation=attn_implementation or default_attention(config),
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


def named_base(model: str) -> str:
    """What an adapter notes as its base: a folder from the root, for it may be loaded from anywhere; else as the user
    calls it, for the embedded model's folder is another one on every machine."""
    folder = Path(model).expanduser()
    return os.path.abspath(folder) if model not in NANOS and folder.is_dir() else model


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


def context_length(config: Any, tokenizer: Any) -> int | None:
    """Tokens that the model reads at most, looked for where lm-eval does, and in what RoPE is stretched to, which
    Qwen's recipe for YaRN leaves out there; None where nothing tells."""
    config = config.get_text_config()
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if (length := getattr(config, name, None)) is not None:
            return max(int(length), _stretched(getattr(config, "rope_parameters", None)))
    length = tokenizer.model_max_length  # transformers has 10^30 where nothing tells
    return int(length) if length < int(1e30) else None


def _stretched(rope: Any) -> int:
    """Positions that a config's rope_parameters reach, or those of one of its kinds of layers; 0: it does not say."""
    if not isinstance(rope, Mapping):
        return 0
    if (original := rope.get("original_max_position_embeddings")) and (factor := rope.get("factor")):
        return int(original * factor)
    return max((_stretched(kind) for kind in rope.values()), default=0)


def own_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The dtype that transformers loads a config's model in by "auto", of one with a text model: the whole's before
    that's; float32 where neither says."""
    stated = (config.dtype, config.get_text_config().dtype)
    return next((dtype for dtype in stated if isinstance(dtype, torch.dtype)), torch.float32)


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
    file = _config_of(path)
    try:
        config = _shapes_of(file) or AutoConfig.from_pretrained(str(file), trust_remote_code=False)
    except Exception as error:
        raise FileError(
            f"{file} is not a config.json that transformers knows: {_first_line(error)} "
            "It must be JSON with a `model_type`."
        ) from error
    return _built(config)


def config_text(path: str | Path) -> str:
    """What the file holds that `model_from_config` reads. FileError: it is missing."""
    return _config_of(path).read_text(encoding="utf-8", errors="replace")


def _config_of(path: str | Path) -> Path:
    file = NANOS.get(str(path)) or Path(path).expanduser()
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise FileError(f"{file} does not exist. Give a model's config.json, or the folder that holds it.")
    return file


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
    if text in NANOS:
        if not (NANOS[text] / "config.json").is_file():
            raise ModelError(f"the embedded model is not in {NANOS[text]}. Install the package again.")
        return str(NANOS[text])
    path = Path(text).expanduser()
    if path.is_dir():
        return str(path)
    is_local = isinstance(name_or_path, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1
    if is_local or path.exists() or path.parent.is_dir():  # a name on the Hub has an owner: OWNER/NAME
        raise ModelError(
            f"{text!r} is not a folder. Give the folder that holds the model's config.json, OWNER/NAME on the Hub, or "
            "'nano'."
        )
    if not isinstance(huggingface_hub.try_to_load_from_cache(text, "config.json"), str) and (away := unreachable()):
        raise ModelError(
            f"{text!r} is no folder here, and the Hub cannot be reached ({away}): check the path, or the network."
        )
    return text


def config_file(model: str) -> str:
    """A model's config as `model_from_config` takes it; of one on the Hub the config.json alone is fetched.

    ModelError: as `model_source`; the Hub has none of it for this user.
    """
    if Path(model).expanduser().is_file() or Path(source := model_source(model)).is_dir():
        return model
    if isinstance(cached := huggingface_hub.try_to_load_from_cache(source, "config.json"), str):
        return cached
    try:
        return huggingface_hub.hf_hub_download(source, "config.json")
    except Exception as error:  # each network client has errors of its own
        raise ModelError(f"the config of {model} cannot be read ({_first_line(error)}) Give a folder.") from error


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


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(". ") + "."
