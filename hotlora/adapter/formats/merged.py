"""A whole checkpoint of the model with an adapter, or a part of it, folded in."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch import Tensor

from ...base.files import read_json, write_json
from ...base.quiet import quiet
from ..mergeable import MergeableLayer
from .shared import without_adapters

_log = logging.getLogger(__name__)
_FURTHER = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")


def save_checkpoint(
    model: PeftModel, adapter: str, paths: list[str], folder: Path, tokenizer: Any, *, restores: bool = True
) -> None:
    """The base model with the adapter of the layers at `paths` folded in.

    restores: the weights are put back afterwards; a copy of all adapted ones is held for that.
    """
    base = cast(Any, model.get_base_model())
    layers = [base.get_submodule(path) for path in paths]
    with _merged(layers, adapter, restores), without_adapters(base), quiet():
        base.save_pretrained(folder)
    _add_old_names(base.config, folder / "config.json")
    _take_back_lost_layers(base, folder / "config.json")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _add_old_names(config: Any, file: Path) -> None:
    """What transformers 5 has under other names, as published checkpoints and engines have it: mlx-lm reads no
    `rope_parameters`, and takes a default, or fails."""
    saved = read_json(file)
    count = config.attribute_map.get("num_experts")
    old = {"num_experts": saved[count]} if count in saved else {}
    rope = saved.get("rope_parameters") or {}
    old |= {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    write_json(file, {**old, **saved})


def _take_back_lost_layers(base: Any, file: Path) -> None:
    """Layers that predict further tokens are in published checkpoints, but transformers loads them for few families, so
    that they are not saved: engines, which draft with them, must not look for them."""
    saved = read_json(file)
    parts = [part for part in (saved, saved.get("text_config")) if isinstance(part, dict)]
    said = [(part, name) for part in parts for name in _FURTHER if isinstance(part.get(name), int) and part[name] > 0]
    if not said or not base._keys_to_ignore_on_load_unexpected:
        return
    for part, name in said:
        part[name] = 0
    write_json(file, saved)
    _log.warning(
        "the layers that predict further tokens (%s) are not in %s, since transformers does not load them: an engine "
        "cannot draft with them.", said[0][1], file.parent,
    )  # fmt: skip


@contextmanager
def _merged(layers: list[Any], adapter: str, restores: bool) -> Iterator[None]:
    """Folds the adapter into the layers' weights, and puts the very same weights back afterwards."""
    touched = [found for layer in layers for found in _touched(layer, adapter)] if restores else []
    kept = [(weight, rows, weight.data[rows].clone()) for weight, rows in touched]
    try:
        for layer in layers:
            layer.merge(adapter_names=[adapter])
            if isinstance(layer, MergeableLayer):  # of all layers it would be a second copy
                layer.replaced.clear()
        yield
    finally:
        for weight, rows, data in kept:
            weight.data[rows] = data
        for layer in layers:
            layer.merged_adapters.clear()


def _touched(layer: Any, adapter: str) -> Iterator[tuple[Tensor, list[int] | slice]]:
    """The weights that merging changes: of experts the planned rows, which may be a small part of the model."""
    if isinstance(layer, MergeableLayer):
        yield from layer.merge_targets(adapter)
    else:
        yield from ((weight, slice(None)) for weight in layer.get_base_layer().parameters())
