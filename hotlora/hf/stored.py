"""How a checkpoint's weights are stored, by its config.json, and whether all of them were found in it."""

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..base.errors import HotLoraError, ModelError

LINEAR_ONLY = ("bitsandbytes", "torchao")
"""Formats of linear layers, whose adapters PEFT trains; the experts of such a checkpoint are dense."""
_READ = "Of quantized checkpoints, those in MXFP4 (gpt-oss), block FP8 (fp8, mxfp8) and of bitsandbytes are read."
_CODES = (
    "_scale_inv", "_scales", "_blocks", "weight_scale", ".scales", ".qweight", ".qzeros", ".weight_packed", ".absmax",
)  # fmt: skip
"""How the names of what belongs to quantized weights end."""


class Failure:
    """The first error of a step of loading: transformers keeps the text of one, and goes on with the next weight."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __deepcopy__(self, memo: Any) -> "Failure":
        """transformers copies the configs of what it loads."""
        return self

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, transformers' table of all errors, with their traces, is left out where the first one is told."""
        logger = logging.getLogger("transformers.modeling_utils")
        logger.addFilter(self._is_none)
        try:
            yield
        finally:
            logger.removeFilter(self._is_none)

    def _is_none(self, record: logging.LogRecord) -> bool:
        return self.error is None

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Around a step for the parameter of this name. After an error no other one is begun."""
        if self.error is not None:
            raise self.error
        try:
            yield
        except (HotLoraError, torch.OutOfMemoryError) as error:
            self.error = error
            raise
        except Exception as error:  # of every kind: what a broken file has is told by whatever trips over it
            self.error = ModelError(f"{name}: {str(error).strip().rstrip('.')}. Get the checkpoint's files again.")
            raise self.error from error


def quantization_in(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The `quantization_config` of a checkpoint's config.json; None: its weights are stored as they are."""
    for part in (config, config.get_text_config()):
        found = getattr(part, "quantization_config", None)
        if found is not None:
            return found if isinstance(found, dict) else dict(found.to_dict())
    return None


def check_format(config: PreTrainedConfig, read: Collection[str], given: Any) -> None:
    """ModelError where the checkpoint is in a format that is not loaded, or not with this `quantization_config`.

    read: what of `quant_method` is loaded beside `LINEAR_ONLY`. transformers itself ignores what it does not know, and
    then reads codes as weights.
    """
    if (stored := quantization_in(config)) is None:
        return
    method = stored.get("quant_method")
    if method is None and (stored.get("load_in_4bit") or stored.get("load_in_8bit")):
        method = "bitsandbytes"  # as older ones have it
    method = None if method is None else str(getattr(method, "value", method))
    if method is None:
        raise ModelError(f"the quantization_config in its config.json names no quant_method. {_READ}")
    if method not in (*read, *LINEAR_ONLY):
        raise ModelError(
            f"its weights are quantized by {method} (quant_method in its config.json), which is not read: give the "
            f"checkpoint that was quantized, with --quantize 4 for as little memory. {_READ}"
        )
    if method in LINEAR_ONLY and given is not None and getattr(given, "quant_method", method) != method:
        raise ModelError(
            f"its linear layers are quantized by {method} already, and its experts are not: give the checkpoint that "
            "was quantized, with --quantize 4 --quantize-linear 4; or leave out quantize, quantize_linear and offload."
        )


def check_complete(found: Mapping[str, Collection[Any]], is_quantized: bool) -> None:
    """ModelError where weights are missing, which transformers draws at random, or are codes without their config.

    found: transformers' loading info. is_quantized: whether the config says so.
    """
    codes = sorted(name for name in found["unexpected_keys"] if str(name).endswith(_CODES))
    if codes and not is_quantized:
        raise ModelError(
            f"its weights are quantized (it has {codes[0]}), and its config.json has no quantization_config that says "
            "how: take the config.json that belongs to them."
        )
    if missing := sorted(map(str, found["missing_keys"])):
        more = f" and {len(missing) - 1} other weights" if missing[1:] else ""
        raise ModelError(f"it has no {missing[0]}{more}: get the checkpoint's files again.")
