"""A saved HotLoRA adapter, read back onto a base model."""

import os
from pathlib import Path
from typing import Any

from peft import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    LoraConfig,
    PeftModel,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..base.errors import FileError, HotLoraError, PlanError
from ..base.files import read_json, sha256_file
from ..base.quiet import quiet
from ..base.unchanged import unchanged_on_error
from ..hf.models import load_model as load_model
from ..hf.peft_hooks import key_of_today
from ..hf.stopping import add_stop_tokens, saved_stop_tokens
from ..routing.plan import ExpertPlan
from .config import A_HASH, WEIGHTS_HASH, HotLoraConfig, from_saved
from .mergeable import check_adapter_name
from .on_top_of import check_entries, check_ground, options_hash
from .packed import NAMES
from .quantize import ExpertsQuantization, experts_in

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def load_adapter(
    base_model: nn.Module, path: str | Path, adapter_name: str = "default", is_trainable: bool = False
) -> PeftModel:
    """The base model with a saved adapter on it, as `PeftModel.save_pretrained` wrote it.

    A plain model is wrapped, in place as in PEFT, and the adapter is active. To a `PeftModel` the adapter is
    added under `adapter_name`; call `set_adapter` to use it. The model's generation config gets the tokens that end an
    answer by the one beside the adapter. On an error the model is as it was.

    Raises:
        FileError: no such folder, not a hotlora adapter, a truncated file, weights that are not those that were saved,
            or that do not fit the config.
        PlanError: the adapter was made for another model, or on top of an adapter that is not merged into this one.
        HotLoraError: an adapter_name that is taken, or that torch cannot take.
    """
    check_adapter_name(adapter_name)
    folder = Path(path).expanduser()
    data = _read_config(folder)
    saved_hash = data.get(WEIGHTS_HASH)
    config = _config(folder / CONFIG_FILE, data)
    config.inference_mode = not is_trainable
    check_ground(config.on_top_of, base_model)
    weights, ends = read_weights(folder / WEIGHTS_FILE, saved_hash), saved_stop_tokens(folder)
    # From the root: what is trained on top of it may be loaded from anywhere.
    digest = saved_hash or sha256_file(folder / WEIGHTS_FILE)
    config._source |= {"path": os.path.abspath(folder), "weights_sha256": digest}
    weights = {key_of_today(key): tensor for key, tensor in weights.items()}
    if isinstance(base_model, PeftModel) and adapter_name in base_model.peft_config:
        raise HotLoraError(
            f"the model already has an adapter {adapter_name!r}: give another adapter_name, or delete it."
        )
    with unchanged_on_error(base_model):
        model = _put_on(base_model, config, adapter_name, folder / CONFIG_FILE)
        problem = _mismatch(get_peft_model_state_dict(model, adapter_name=adapter_name), weights)
        if problem:
            raise FileError(f"{folder / WEIGHTS_FILE} does not fit {folder / CONFIG_FILE}: {problem}. Save it again.")
        set_peft_model_state_dict(model, weights, adapter_name=adapter_name)
        if is_trainable:
            model.set_requires_grad(adapter_name)
        add_stop_tokens(model.get_base_model(), ends)
    return model if is_trainable else model.eval()


def _put_on(base_model: nn.Module, config: HotLoraConfig, adapter_name: str, file: Path) -> PeftModel:
    try:
        if isinstance(base_model, PeftModel):
            base_model.add_adapter(adapter_name, config)
            return base_model
        peft_model = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
        with quiet():
            return peft_model(base_model, config, adapter_name=adapter_name)
    except FileError as error:
        raise FileError(f"{file}: {error}") from error
    except HotLoraError:
        raise
    except (AssertionError, AttributeError, ImportError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise FileError(f"{file} has an option that PEFT cannot carry out ({reason}).") from error


def base_quantization(path: str | Path) -> ExpertsQuantization | None:
    """How the base of a saved adapter was quantized in training, as `load_model` takes it; None where it was not, or
    had its experts as the checkpoint stores them, which `load_model` does by itself.

        model = load_adapter(load_model(name, quantization_config=base_quantization(path)), path)

    Raises:
        FileError, PlanError: as `load_adapter`.
        HotLoraError: it was, and bitsandbytes is not installed.
    """
    saved = saved_config(path).base_quantization
    if saved is None:
        return None
    keep = {int(layer): tuple(ids) for layer, ids in saved.get("keep", {}).items()}
    return experts_in(saved.get("bits"), keep, saved.get("linear"))


def needs_dense_experts(path: str | Path) -> bool:
    """Whether a saved adapter computes with its base's own expert weights, which then cannot be quantized or packed.
    FileError, PlanError: as `load_adapter`."""
    config = saved_config(path)
    return bool(config.use_dora or config.train_full_experts)


def planned_experts(path: str | Path) -> dict[int, tuple[int, ...]]:
    """Layer -> experts that a saved adapter is for. FileError, PlanError: as `load_adapter`."""
    return dict(ExpertPlan.from_dict(saved_config(path).plan).experts)


def saved_config(path: str | Path) -> HotLoraConfig:
    """The config of a saved adapter, without its weights. FileError, PlanError: as `load_adapter`."""
    folder = Path(path).expanduser()
    return _config(folder / CONFIG_FILE, _read_config(folder))


def saved_options_hash(path: str | Path) -> str:
    """`on_top_of.options_hash` of a saved adapter: with other options the same weights are another adapter."""
    return options_hash(_read_config(Path(path).expanduser()))


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise FileError(f"{folder} is not a folder. Give the folder that save_pretrained wrote the adapter to.")
    file = folder / CONFIG_FILE
    data = read_json(file)
    if not isinstance(data.get("plan"), dict):
        raise FileError(f"{file} holds no expert plan, so it is not a hotlora adapter. Load it with peft.PeftModel.")
    data["base_model_name_or_path"] = None  # PEFT notes the model that it is loaded onto
    return data


def _config(file: Path, data: dict[str, Any]) -> HotLoraConfig:
    try:
        config = from_saved(data)
        _check_own(config)
    except PlanError as error:
        raise PlanError(f"{file}: {error}") from error
    except (TypeError, ValueError) as error:
        raise FileError(f"{file} is not a hotlora adapter's config: {error} Save the adapter again.") from error
    if config.trainable_token_indices is not None:  # as TRL sets, too, for a chat template's new tokens
        raise HotLoraError(
            f"{file}: the adapter trains tokens of the embedding (trainable_token_indices), which are not loaded here. "
            "Give the base's embedding the tokenizer's size (base.resize_token_embeddings(len(tokenizer))), and then "
            "peft.PeftModel.from_pretrained(base, folder)."
        )
    return config


def check_kinds(config: LoraConfig, defaults: dict[str, Any]) -> None:
    """TypeError where an option is of another kind than its default: PEFT takes it, and trips over it later."""
    for name, default in defaults.items():
        value = getattr(config, name, None)
        kind: Any = {dict: dict, str: str, bool: bool, int: (int, float), float: (int, float)}.get(type(default))
        if value is not None and kind is not None and not isinstance(value, kind):
            raise TypeError(f"{name} is {value!r}, where {default!r} is of the right kind.")
        if name.endswith("_pattern") and not all(isinstance(number, int | float) for number in (value or {}).values()):
            raise TypeError(f"{name} is {value!r}; its values must be numbers.")


def _check_own(config: HotLoraConfig) -> None:
    """The same for what only a HotLoraConfig has."""
    check_kinds(config, HotLoraConfig(plan=config.plan).to_dict())
    mask = config.mask or {}
    if not isinstance(mask, dict) or not all(isinstance(kept, int) and kept >= 0 for kept in mask.values()):
        raise TypeError(f"mask is {mask!r}; it must have the number of entries that each B keeps.")
    if not _is_quantization(config.base_quantization):
        raise TypeError(
            f"base_quantization is {config.base_quantization!r}; it must be null, or have bits of 4 or 8, and in keep "
            "the experts of each layer that has some; or the checkpoint's format; and linear of 4 or 8."
        )
    check_entries("on_top_of", config.on_top_of)
    if config.a_seed is not None and (not isinstance(config.a_seed, int) or config.a_seed < 0):
        raise TypeError(f"a_seed is {config.a_seed!r}; it must be an integer from 0.")
    if not isinstance(config._saved_a_hash, str | None):
        raise TypeError(f"{A_HASH} is {config._saved_a_hash!r}; it must be a SHA-256 in hexadecimal digits.")


def _is_quantization(saved: Any) -> bool:
    if saved is None:
        return True
    if not isinstance(saved, dict) or not saved or saved.get("linear", 4) not in (4, 8):
        return False
    experts = saved.keys() - {"linear"}
    if experts != {"bits", "keep"}:
        return not experts or (experts == {"checkpoint"} and saved["checkpoint"] in NAMES.values())
    keep = saved["keep"]
    return saved["bits"] in (4, 8) and isinstance(keep, dict) and all(
        str(layer).isdecimal() and isinstance(ids, list) and all(type(expert) is int for expert in ids)
        for layer, ids in keep.items()
    )  # fmt: skip


def read_weights(file: Path, saved_hash: str | None = None) -> dict[str, Tensor]:
    """An adapter's tensors. FileError: no such file, or not a whole one, or not the one with this SHA-256."""
    if not file.is_file():
        raise FileError(f"{file} does not exist. Give the folder that save_pretrained wrote the adapter to.")
    try:
        weights = load_file(file)
    except (SafetensorError, OSError) as error:
        raise FileError(f"{file} is truncated or is not a safetensors file: {error}. Save it again.") from error
    if saved_hash is not None and sha256_file(file) != saved_hash:
        raise FileError(
            f"{file} is damaged: it is not the file that was saved (another SHA-256 than {CONFIG_FILE} has). Restore a "
            f"copy or train again; if you have changed it yourself, take {WEIGHTS_HASH!r} out of {CONFIG_FILE}."
        )
    return weights


def _mismatch(expected: dict[str, Tensor], found: dict[str, Tensor]) -> str | None:
    if missing := sorted(expected.keys() - found.keys()):
        return f"{len(missing)} tensors are missing, such as {missing[0]}"
    if unexpected := sorted(found.keys() - expected.keys()):
        return f"{len(unexpected)} tensors are unknown, such as {unexpected[0]}"
    for key, tensor in expected.items():
        if found[key].shape != tensor.shape:
            return f"{key} is {list(found[key].shape)} where {list(tensor.shape)} is needed"
    return None
