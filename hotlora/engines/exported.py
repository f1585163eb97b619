"""What lies in an exported folder, found out before anything is loaded."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from ..adapter.formats.export import SOURCE_FILE
from ..adapter.formats.gguf import GGUF_FILE, check_file
from ..adapter.formats.mlx import MLX_WEIGHTS_FILE
from ..adapter.load import CONFIG_FILE, WEIGHTS_FILE
from ..base.errors import FileError
from ..base.files import read_json, sha256_file

_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Exported:
    """An export on disk."""

    kind: str
    """merged (a whole checkpoint), peft (a plain PEFT adapter), per-expert (a pair of matrices for each expert),
    shared-outer (the same with factors that experts share), gguf or mlx"""
    path: Path
    """What the engine loads as the adapter, or the checkpoint."""
    base: Path | None
    """A base of its own, with what the adapter's format cannot hold."""


def read_export(folder: str | Path) -> Exported:
    """FileError: nothing that `export` writes, or half of it."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise FileError(f"{path} is not a folder: give the folder that hotlora export wrote.")
    base, adapter = path / "base", path / "adapter"
    if base.is_dir() or (adapter.is_dir() and not (path / CONFIG_FILE).is_file()):
        if (path / "run.json").is_file():
            raise FileError(f"{path} is a run, and no export: export it first (hotlora export).")
        for part in (base, adapter):
            if not part.is_dir():
                raise FileError(f"{path} is half an export: {part.name}/ is missing; export again.")
        _check_weights(base, "model.safetensors")
        return _exported(adapter, base)
    _check_is_whole(path)
    return _exported(path, None)


def _check_is_whole(path: Path) -> None:
    """FileError: the adapter of an export with a base of its own, which is beside it; such a one notes no other. (MLX's
    notes none at all.)"""
    config, beside = path / CONFIG_FILE, path.resolve().parent / "base" / "config.json"
    if path.resolve().name != "adapter" or not beside.is_file() or not config.is_file():
        return
    saved = read_json(config)
    if not saved.get("plan") and saved.get("base_model_name_or_path", "") is None:
        raise FileError(f"{path} is half an export, whose base lies beside it: give {path.parent}.")


def _exported(folder: Path, base: Path | None) -> Exported:
    kind = _kind_of(folder)
    return Exported(kind, folder / GGUF_FILE if kind == "gguf" else folder, base)


def _kind_of(folder: Path) -> str:
    if (folder / CONFIG_FILE).is_file():
        config = read_json(folder / CONFIG_FILE)
        if config.get("plan"):
            raise FileError(f"{folder} is a hotlora adapter, and no export: export it first (hotlora export).")
        if config.get("lora_parameters"):
            _check_weights(folder, MLX_WEIGHTS_FILE)
            return "mlx"
        _check_weights(folder, WEIGHTS_FILE)
        if config.get("target_parameters"):
            return "peft"
        is_shared = any(len(shape) == 3 for shape in _shapes(folder / WEIGHTS_FILE).values())
        return "shared-outer" if is_shared else "per-expert"
    if (folder / GGUF_FILE).is_file():
        check_file(folder / GGUF_FILE)
        return "gguf"
    if (folder / "config.json").is_file():
        _check_weights(folder, "model.safetensors")
        return "merged"
    raise FileError(
        f"{folder} is no export: it has neither {CONFIG_FILE} nor {GGUF_FILE} nor config.json; export again."
    )


def _check_weights(folder: Path, name: str) -> None:
    """FileError: not all of the weights are there, or a file is cut short."""
    index = folder / f"{name}.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [name]
    for part in names:
        _shapes(folder / part)


def _shapes(file: Path) -> dict[str, list[int]]:
    """Of a safetensors file, from its head. FileError: missing, or cut short."""
    if not file.is_file():
        raise FileError(f"{file.parent} is half an export: {file.name} is missing; export again.")
    try:
        with safe_open(file, "pt") as tensors:
            return {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise FileError(f"{file} is cut short or no safetensors file ({error}): export again.") from error


def check_source(folder: str | Path, adapter: Path) -> None:
    """FileError: what `export` wrote into the folder is of other weights than this saved adapter's."""
    noted = Path(folder).expanduser() / SOURCE_FILE
    if noted.is_file() and read_json(noted).get("weights_sha256") != sha256_file(adapter / WEIGHTS_FILE):
        raise FileError(
            f"{folder} was exported from another adapter than {adapter}, or from other weights of it: give the one "
            "that it was exported from (--adapter), or export again."
        )


def check_belongs(exported: Exported, base: nn.Module, name: str) -> None:
    """FileError where an exported adapter is for another base than this one, by its layers and widths.

    base: may be on the meta device.
    """
    if exported.kind in ("merged", "gguf"):  # llama.cpp itself compares names and shapes
        return
    widths = {size for parameter in base.parameters() for size in parameter.shape}
    num_layers = base.config.get_text_config().num_hidden_layers  # type: ignore[union-attr,operator]
    file = exported.path / (MLX_WEIGHTS_FILE if exported.kind == "mlx" else WEIGHTS_FILE)
    for key, shape in _shapes(file).items():
        found = _LAYER.search(key)
        width = shape[0] if key.endswith(".lora_a") and len(shape) == 2 else shape[-1]
        if (found and int(found[1]) >= num_layers) or (".lora_a" in key.lower() and width not in widths):
            raise FileError(
                f"{exported.path} is for another base than {name}: {key} is {shape}, and that has {num_layers} layers "
                f"and no weight of such a width. Give the base that it was exported for (--model)."
            )
