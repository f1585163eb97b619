"""An adapter in the formats of others: vLLM, SGLang, plain PEFT, llama.cpp, MLX, a merged checkpoint. What each can
hold is checked here, before anything is written; a module for each format makes it."""

import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from ...base.errors import FileError, HotLoraError, ModelError
from ...base.files import atomic_folder, write_json
from ...base.options import did_you_mean
from ...hf.models import NANOS, named_base
from ...hf.moe_layers import attention_modules
from ..config import HotLoraConfig
from ..load import CONFIG_FILE, WEIGHTS_FILE
from ..on_top_of import described, merged_for_now, merged_into
from ..parallel import UNMERGED
from ..raw_weights import HotLoraRouter
from ..stored import check_mergeable
from . import gguf, mlx
from .merged import save_checkpoint
from .peft import peft_format
from .sglang import sglang_format, sglang_shared_format
from .shared import collect, without_adapters
from .vllm import NOT_APPLIED, vllm_format

_log = logging.getLogger(__name__)

_ADAPTERS: dict[str, Any] = {
    "vllm": vllm_format, "sglang": sglang_format, "sglang-shared": sglang_shared_format, "peft": peft_format,
    "gguf": gguf.gguf_format, "mlx": mlx.mlx_format,
}  # fmt: skip
FORMATS = (*_ADAPTERS, "merged")
SOURCE_FILE = "exported_from.json"
"""In an export: the SHA-256 of the weights of the saved adapter that it was made of."""
_SAVE: dict[str, Any] = {"gguf": gguf.save_gguf, "mlx": mlx.save_mlx}
_CHECK_FAMILY = {"gguf": gguf.check_family, "mlx": mlx.check_family}
_NOT_APPLIED = {"vllm": NOT_APPLIED, "mlx": mlx.NOT_APPLIED}


def export_adapter(
    model: nn.Module,
    output: str | Path,
    *,
    format: str,
    adapter_name: str = "default",
    merge_router: bool = False,
    drop_router: bool = False,
    merge_attention: bool = False,
    tokenizer: Any = None,
    restores: bool = True,
) -> Path:
    """As `hotlora.export_adapter`, without the card.

    restores: merged; the model is as it was afterwards, for which a copy of all adapted weights is held meanwhile.
    """
    output = check_export(format, output)
    if not isinstance(model, PeftModel):
        raise ModelError(f"{type(model).__name__} has no adapter. Give a PeftModel, as load_adapter returns it.")
    config = _config(model, adapter_name)
    _check_plain(config, format)
    modules: Any = model.get_base_model().named_modules()
    layers = {path: m for path, m in modules if isinstance(m, LoraLayer) and adapter_name in m.scaling}
    routers = [path for path, layer in layers.items() if isinstance(layer, HotLoraRouter)]
    model_type = _model_type(model.get_base_model())
    _CHECK_FAMILY.get(format, _any)(model_type)
    _check_router_choice(format, model_type, bool(routers), merge_router, drop_router)
    attention = not_applied(layers, format)
    _check_attention_choice(format, attention, merge_attention)
    if merged := [path for path, layer in layers.items() if layer.merged]:
        raise HotLoraError(f"{merged[0]} has an adapter merged in: call unmerge_adapter() first.")
    if format == "merged" or merge_router or merge_attention:
        check_mergeable(model.get_base_model())
    if format == "merged":
        tuner: Any = model.base_model
        with atomic_folder(output) as folder, merged_for_now(model.get_base_model(), [tuner.entry_of(adapter_name)]):
            save_checkpoint(model, adapter_name, list(layers), folder, tokenizer, restores=restores)
        return output
    into_base = [*(routers if merge_router else []), *attention]
    if (ground := merged_into(model)) and not into_base:
        _log.warning("the export is for the base with %s merged in: use it on a checkpoint of that", described(ground))
    held = {path: layer for path, layer in layers.items() if path not in attention}
    parts = collect(model, adapter_name, held, format)
    if not holds_router(format, model_type):
        parts = dataclasses.replace(parts, routers=[])
    if not holds_router(format, model_type) and not parts.experts and not parts.linears:
        raise HotLoraError(
            f"the adapter trains nothing else that format {format!r} holds, so nothing is left to export: use format "
            "'merged'."
        )
    base, source = model.get_base_model(), cast(Any, model.base_model).entry_of(adapter_name)
    with without_adapters(base):
        tensors, targets = _ADAPTERS[format](base, parts)
    save = _SAVE.get(format, _save_adapter)
    plain = (
        targets
        if format in _SAVE
        else {
            "task_type": config.task_type,
            "inference_mode": True,
            "base_model_name_or_path": None if into_base or ground else base_name(model, adapter_name),
            **targets,
        }
    )
    with atomic_folder(output) as folder:
        if into_base:
            save_checkpoint(model, adapter_name, into_base, folder / "base", tokenizer)
        save(plain, tensors, folder / "adapter" if into_base else folder)
        if format == "peft" and tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if source["weights_sha256"] is not None:
            write_json(folder / SOURCE_FILE, {"format": format, "weights_sha256": source["weights_sha256"]})
    return output


def adapter_in(output: Path) -> Path:
    """The adapter's folder in an export, which may have a base beside it."""
    return output / "adapter" if (output / "base").is_dir() else output


def check_export(format: str, output: str | Path) -> Path:
    """`output`, if it is free and `format` exists; else an error as of `export_adapter`."""
    output = Path(output)
    if format not in FORMATS:
        near = did_you_mean(format, FORMATS)
        raise HotLoraError(f"format {format!r} does not exist{near}: choose one of {', '.join(FORMATS)}.")
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise FileError(f"{output} is there already and not empty: give a new folder.")
    if output.is_symlink() or output.is_mount():  # what is made takes the folder's place, all at once
        raise FileError(f"{output} is a link or a mount point: give a new folder inside it.")
    if format == "gguf":
        gguf.check_installed()
    return output


def base_name(model: PeftModel, adapter_name: str = "default") -> str | None:
    """The adapter's base, as a folder, a name on the Hub or nano; None of one that came from nowhere."""
    noted = model.peft_config[adapter_name].base_model_name_or_path
    name: str | None = noted or getattr(model.get_base_model(), "name_or_path", None) or None
    return next((nano for nano, path in NANOS.items() if name == str(path)), name and named_base(name))


def check_config(config: HotLoraConfig, format: str, *, merge_router: bool, drop_router: bool) -> None:
    """HotLoraError for what `export_adapter` refuses by an adapter's config alone, whatever the base."""
    _check_plain(config, format)
    if format != "mlx":  # there the family decides
        _check_router_choice(format, "", config.train_router, merge_router, drop_router)


def check_base(
    config: HotLoraConfig, base: nn.Module, format: str, *, merge_router: bool, drop_router: bool, merge_attention: bool
) -> None:
    """HotLoraError for what it refuses by the base's modules, too, which may be on the meta device."""
    _CHECK_FAMILY.get(format, _any)(_model_type(base))
    _check_router_choice(format, _model_type(base), config.train_router, merge_router, drop_router)
    trained = attention_modules(base) if config.train_attention else []
    _check_attention_choice(format, not_applied(trained, format), merge_attention)


def not_applied(paths: Iterable[str], format: str) -> list[str]:
    """Those of some modules whose updates an engine would read and not apply."""
    if format == "gguf":
        return gguf.not_applied(list(paths))
    return [path for path in paths if path.rpartition(".")[2] in _NOT_APPLIED.get(format, ())]


def holds_router(format: str, model_type: str) -> bool:
    """Whether a format has a place for a family's routers' updates."""
    return format in ("peft", "gguf", "merged") or (format == "mlx" and mlx.holds_router(model_type))


def _model_type(base: Any) -> str:
    return str(base.config.get_text_config().model_type)


def _any(model_type: str) -> None:
    """Most formats hold every family."""


def _config(model: PeftModel, adapter_name: str) -> HotLoraConfig:
    config = model.peft_config.get(adapter_name)
    if config is None:
        raise HotLoraError(
            f"the model has no adapter {adapter_name!r}: its adapters are {', '.join(sorted(model.peft_config))}."
        )
    if not isinstance(config, HotLoraConfig):
        raise HotLoraError(f"adapter {adapter_name!r} is not a hotlora adapter: save it with save_pretrained.")
    return config


def _check_router_choice(format: str, model_type: str, has_router: bool, merge_router: bool, drop_router: bool) -> None:
    if merge_router and drop_router:
        raise HotLoraError("merge_router and drop_router exclude each other: give one.")
    chosen = "merge_router" if merge_router else "drop_router" if drop_router else None
    if chosen and holds_router(format, model_type):
        raise HotLoraError(f"format {format!r} holds the router: leave {chosen} out.")
    if chosen and not has_router:
        raise HotLoraError(f"the adapter does not train the router: leave {chosen} out.")
    if has_router and not chosen and not holds_router(format, model_type):
        raise HotLoraError(
            f"format {format!r} cannot hold the adapter's router updates. Give merge_router=True (--merge-router), "
            "which writes the base model with the routers' updates beside the adapter, or drop_router=True "
            "(--drop-router), which leaves them out: answers then differ from the trained model's."
        )


def _check_attention_choice(format: str, attention: list[str], merge_attention: bool) -> None:
    if attention and not merge_attention:
        names = sorted({path.rpartition(".")[2] for path in attention})
        raise HotLoraError(
            f"format {format!r} cannot hold the adapter's updates of attention's {' and '.join(names)}: the engine "
            "would read them and apply them nowhere. Give merge_attention=True (--merge-attention), which writes the "
            "base model with these updates beside the adapter, or train without attention (--no-attention)."
        )
    if merge_attention and not attention:
        raise HotLoraError(f"format {format!r} holds all of this adapter's attention: leave merge_attention out.")


def _check_plain(config: HotLoraConfig, format: str) -> None:
    for name in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, name, None):
            raise HotLoraError(f"an adapter with {name} cannot be exported: use merge_and_unload().")
    if config.perft is not None:
        raise HotLoraError(UNMERGED)
    for name in ("use_dora", "train_full_experts"):
        if getattr(config, name) and format != "merged":
            raise HotLoraError(f"format {format!r} cannot hold an adapter with {name}: use format 'merged'.")
    if format == "sglang-shared" and not config.share_a:
        raise HotLoraError(
            "format 'sglang-shared' holds what was trained with share_a (--share-a), and this adapter has an A and a B "
            "for each expert: use format 'sglang'."
        )


def _save_adapter(config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> None:
    folder.mkdir(parents=True)
    data = LoraConfig(**config).to_dict()
    data = {key: sorted(value) if isinstance(value, set) else value for key, value in data.items()}
    write_json(folder / CONFIG_FILE, data)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
