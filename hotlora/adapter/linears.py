"""Linear layers beside the routed experts in 8 or 4 bits, by bitsandbytes' own layers, put there while a model loads.

Attention, shared experts and dense MLPs; `hf.linears` says which. PEFT puts its adapters on them as on any of
bitsandbytes' layers.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from ..base.errors import HotLoraError
from ..base.precision import say_once
from ..hf.linears import plain_linears, quantized_bits_of
from .quantized import BLOCK

LINEAR_SCALE_BYTES = 4
"""Of bitsandbytes' own, in float32."""

_FLAGS = ("is_loaded_in_4bit", "is_loaded_in_8bit")


def linear_bits(model: nn.Module) -> int | None:
    """The bits of bitsandbytes' linear layers in `model`; None: it has none."""
    return next((bits for module in model.modules() if (bits := quantized_bits_of(module))), None)


class Linears:
    """Loads linear layers of a model into bitsandbytes', by transformers' own quantizer for these.

    `put_in` before weights are loaded, `stored` for each that `needs` says, `finish` afterwards.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self._theirs: Any = None

    def put_in(self, model: PreTrainedModel, device_map: Any) -> None:
        """Layers without values in the place of those that are to be quantized.

        Rows that are no whole number of blocks stay as they are: bitsandbytes' kernel for a CPU gives wrong numbers
        where a block runs over the end of a row (seen in 0.50.2).
        """
        found = plain_linears(model)
        chosen = [path for path, module in found.items() if module.in_features % BLOCK == 0]
        if left := len(found) - len(chosen):
            say_once(f"{left} linear layers are not quantized: their rows are no whole number of {BLOCK} weights")
        every_other = rf"(?!(?:{'|'.join(map(re.escape, chosen)) or '$^'})$).*"
        config = BitsAndBytesConfig(
            load_in_4bit=self.bits == 4, load_in_8bit=self.bits == 8, llm_int8_skip_modules=[every_other],
            bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=model.dtype,
        )  # fmt: skip
        self._theirs = AutoHfQuantizer.from_config(config, pre_quantized=False)
        self._theirs.validate_environment(device_map=device_map)
        if chosen:
            self._theirs.preprocess_model(model, device_map=device_map)

    def needs(self, model: PreTrainedModel, name: str) -> bool:
        """Whether the parameter of this name is stored in such a layer."""
        return bool(self._theirs.param_needs_quantization(model, name))

    def stored(self, model: PreTrainedModel, name: str, value: Tensor) -> Tensor:
        """What the layer holds of the weight."""
        made: dict[str, Tensor] = self._theirs.get_quantize_ops().convert(
            {name: value}, full_layer_name=name, model=model, missing_keys=set()
        )
        return made[name]

    def finish(self, model: PreTrainedModel) -> None:
        """Tells PEFT and TRL, which ask the model; and works around what bitsandbytes' layers get wrong."""
        layers: list[Any] = [module for module in model.modules() if quantized_bits_of(module)]
        if layers:
            setattr(model, f"is_loaded_in_{self.bits}bit", True)
            logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line for each product
        for layer in layers:
            # On a CPU with bfloat16 it would store the weights in another way at its first evaluation, and from then on
            # pass no gradient to its input, in training too (seen in 0.50.2).
            layer.support_avx512bf16_for_cpu = False
            if self.bits == 8:  # it takes two or three dimensions (0.50.2); MLA's kv_b_proj has four
                layer.register_forward_pre_hook(_flattened)
                layer.register_forward_hook(_unflattened)


@contextmanager
def own_dtype_kept(model: nn.Module) -> Iterator[None]:
    """While a trainer of TRL's is made: it would make adapters on a model with such layers bfloat16, where they lose
    what an optimizer adds (its own default for QLoRA)."""
    found = [(module, name) for module in model.modules() for name in _FLAGS if name in module.__dict__]
    values = [module.__dict__.pop(name) for module, name in found]
    try:
        yield
    finally:
        for (module, name), value in zip(found, values, strict=True):
            setattr(module, name, value)


def _flattened(layer: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    layer.shape_given = args[0].shape[:-1]
    return (args[0].reshape(-1, args[0].shape[-1]), *args[1:])


def _unflattened(layer: Any, args: Any, output: Tensor) -> Tensor:
    return output.unflatten(0, layer.shape_given)


def check_linear_bits(bits: Any) -> None:
    """HotLoraError: neither 4 nor 8."""
    if bits not in (4, 8) or isinstance(bits, bool):
        raise HotLoraError(f"quantize_linear={bits!r} must be 4 or 8.")
