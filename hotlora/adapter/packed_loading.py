"""Loads a checkpoint in MXFP4 or block FP8 with its experts as they are in the file (`packed.PackedExperts`).

transformers' own quantizers put kernels in the experts' place, which need a GPU and train no adapter, or make all
dense.
Here a quantizer of ours asks transformers' for the conversions of its format, which name what a family's checkpoint has
and where it goes, and in each replaces the step that makes weights dense. Other layers in FP8 are made dense.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ConversionOps, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer, HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..base.errors import ModelError
from ..base.precision import say_once
from ..hf.experts_view import is_experts
from ..hf.internals import internal
from ..hf.models import LOADERS
from ..hf.stored import Failure
from .linears import Linears, linear_bits
from .offload import Offload
from .packed import NAMES, PackedExperts, held_scales, whole_blocks
from .quantize import ExpertsQuantization, QuantizeOnLoad
from .stacking import parts_of_experts, stacked
from .stored import finish, quantized_bits

_METHOD = "hotlora_packed"
# transformers' steps that make a format dense, and those that may follow with weights that stay packed: they take a
# weight's scales as they take the weight. Two weights in a byte are not to be transposed.
_DEQUANTIZE = (
    "transformers.integrations.mxfp4:Mxfp4Dequantize", "transformers.integrations.finegrained_fp8:Fp8Dequantize",
)  # fmt: skip
_FOLLOW = {4: ("MergeModulelist", "Concatenate"), 8: ("MergeModulelist", "Concatenate", "Transpose")}


@register_quantization_config(_METHOD)
class PackedCheckpoint(QuantizationConfigMixin):
    """How a checkpoint whose weights are in MXFP4 or block FP8 is loaded.

    Args:
        checkpoint: the `quantization_config` of its config.json.
        dequantize: make the experts dense, too.
        linear: 4 or 8: store other linear layers in so many bits.
        offload: where the experts wait, outside the device's memory.
    """

    def __init__(
        self,
        checkpoint: Mapping[str, Any],
        dequantize: bool = False,
        linear: int | None = None,
        offload: Offload | None = None,
        failure: Failure | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = _METHOD  # type: ignore[assignment]  # its enum is transformers' own methods
        self.checkpoint, self.dequantize, self.linear, self.offload = dict(checkpoint), dequantize, linear, offload
        self.failure = failure or Failure()


def _stored(checkpoint: dict[str, Any], given: Any, dequantize: bool) -> dict[str, Any] | None:
    """What config.json is to say for transformers to come here; None: what is given goes to transformers as it is.

    ModelError: experts that are packed already would be quantized.
    """
    _check_blocks(checkpoint)
    linear = offload = None
    if isinstance(given, ExpertsQuantization) and given.bits is None:
        given, linear, offload = None, given.linear, given.offload
    if linear is not None and not hasattr(HfQuantizer, "get_new_dtype"):
        raise ModelError(
            "linear layers beside packed experts cannot be quantized with this transformers: install a newer one, "
            "or leave out --quantize-linear."
        )
    if isinstance(given, ExpertsQuantization):
        name = NAMES[4] if checkpoint["quant_method"] == "mxfp4" else NAMES[8]
        raise ModelError(
            f"its experts are stored in {name} already, and are trained on as they are: leave out the quantization "
            "(--quantize); 0 makes them dense."
        )
    if given is not None:
        return None
    if offload is not None and dequantize:
        raise ModelError("its experts are offloaded as they are packed: leave out one of offload and dequantize.")
    how = {"dequantize": dequantize, "linear": linear, "offload": offload, "failure": Failure()}
    return {"quant_method": _METHOD, "checkpoint": checkpoint, **how}


def _check_blocks(checkpoint: dict[str, Any]) -> None:
    """ModelError: blocks that are none, or another kind of FP8."""
    sizes = checkpoint.get("weight_block_size")
    if sizes is not None and not (
        isinstance(sizes, list | tuple) and len(sizes) == 2 and all(isinstance(n, int) and n > 0 for n in sizes)
    ):
        raise ModelError(f"weight_block_size in its config.json is {sizes!r}: it must be two numbers of 1 or more.")
    if (format := checkpoint.get("fmt", "e4m3")) not in ("e4m3", "float8_e4m3fn"):
        raise ModelError(f"its weights are in FP8 of the kind {format!r} (fmt in its config.json); e4m3 is read.")


LOADERS.update(dict.fromkeys(("mxfp4", "fp8", "mxfp8"), _stored))


@register_quantizer(_METHOD)
class _PackedQuantizer(HfQuantizer):
    """transformers' hooks into loading."""

    quantization_config: PackedCheckpoint
    num_dense = 0
    """How many layers were in a packed format, and are dense."""

    def __deepcopy__(self, memo: Any) -> "_PackedQuantizer":
        """transformers copies a conversion, and all that it holds, for each parameter."""
        return self

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self.checkpoint_files = kwargs.get("checkpoint_files")
        linear = self.quantization_config.linear
        self.linears = None if linear is None else Linears(linear)
        if self.linears is not None:
            self.linears.put_in(model, kwargs.get("device_map"))

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return self.linears is not None and self.linears.needs(model, param_name)

    def update_weight_conversions(self, weight_conversions: list[Any], *model: PreTrainedModel) -> list[Any]:
        """Of the format's own quantizer. transformers 5.17 gives no model."""
        config = {**self.quantization_config.checkpoint, "dequantize": True}
        theirs = AutoHfQuantizer.from_config(config, pre_quantized=True)
        conversions: list[Any] = theirs.update_weight_conversions(weight_conversions, *model)
        dense = tuple(internal(name) for name in _DEQUANTIZE)
        found = [one for one in conversions if isinstance(getattr(one, "operations", [None])[0], dense)]
        assert found, "no conversion makes the format's weights dense"
        for conversion in found:
            conversion.operations = [_FromPacked(self, conversion.operations[1:])]
        return conversions

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """None where what is read may be packed: the operation is told what it is to become."""
        if self.linears is not None:  # transformers sets this for what is not packed
            converter.quantization_operation = QuantizeOnLoad({}, linears=self.linears)
        operation = getattr(converter, "operations", [None])[0]
        if not isinstance(operation, _FromPacked):
            its = param.get_dtype() if hasattr(param, "get_dtype") else str(param.dtype)
            if its.startswith(("F8", "torch.float8")):
                raise ModelError(
                    "it has weights in FP8 under a name that is not read, and without scales they are wrong."
                )
            return super().get_new_dtype(converter, param, dtype)
        operation.dtype = dtype
        return None

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes of a weight: transformers reserves memory of a GPU by it."""
        is_packed = param.ndim == 3 and not self.quantization_config.dequantize
        return 0.5 if is_packed else param.element_size()

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self.remove_quantization_config(model)
        # It has the steps of this loading, and would be undone in saving; transformers 5.24 drops it, too.
        model.__dict__.pop("_weight_conversions", None)
        if self.quantization_config.offload is not None:
            self.quantization_config.offload.finish(model, self.checkpoint_files)
        bits, told = quantized_bits(model), []
        if self.linears is not None:
            self.linears.finish(model)
        if bits or linear_bits(model):
            finish(model)
        if bits:
            told.append(f"the experts stay in {NAMES[bits]}, as the checkpoint has them")
        if self.num_dense:
            told.append(f"{self.num_dense} other weights in its format are made dense ({str(model.dtype)[6:]})")
        say_once("; ".join(told))

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _FromPacked(ConversionOps):
    """In the place of transformers' step that makes a format's weights dense: experts become `PackedExperts`.

    operations: what follows in the conversion, such as stacking experts.
    """

    def __init__(self, hf_quantizer: _PackedQuantizer, operations: list[ConversionOps]) -> None:
        self.hf_quantizer, self.operations = hf_quantizer, operations
        self.dtype: torch.dtype | None = None

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        with self.hf_quantizer.quantization_config.failure.of(kwargs["full_layer_name"]):
            return self._converted(input_dict, **kwargs)

    def _converted(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        name, model = kwargs["full_layer_name"], kwargs["model"]
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        parameter = getattr(module, attribute)
        parts = _parts(input_dict, self.hf_quantizer.quantization_config.checkpoint)
        if self._stay_packed(module, parameter, [part for its in parts.values() for part in its]):
            holder: nn.Module = self._packed(parts, parameter, kwargs)
            if (offload := self.hf_quantizer.quantization_config.offload) is not None:
                holder = offload(holder)
            delattr(module, attribute)
            setattr(module, attribute, holder)
            kwargs["missing_keys"].discard(name)
            return {}
        self.hf_quantizer.num_dense += any(part.scales is not None for its in parts.values() for part in its)
        dtype = self.dtype or parameter.dtype
        made = self._followed({key: [part.dense(dtype) for part in its] for key, its in parts.items()}, kwargs)
        return made if self.operations else {name: _only(made)}

    def _stay_packed(self, module: nn.Module, parameter: Tensor, parts: "list[_Part]") -> bool:
        if self.hf_quantizer.quantization_config.dequantize or parameter.ndim != 3 or not is_experts(module):
            return False
        kinds = {part.kind for part in parts}
        if None in kinds or len(kinds) > 1:
            return False
        return all(type(operation).__name__ in _FOLLOW[parts[0].bits] for operation in self.operations)

    def _packed(self, parts: "dict[str, list[_Part]]", parameter: Tensor, kwargs: dict[str, Any]) -> PackedExperts:
        ((first, *_), *_) = parts.values()
        packed = self._followed({key: [part.weight for part in its] for key, its in parts.items()}, kwargs)
        scales = self._followed({key: [part.scales for part in its] for key, its in parts.items()}, kwargs)
        dtype = self.dtype or parameter.dtype
        holder = PackedExperts(_only(packed), _only(scales), first.bits, dtype, first.is_transposed)
        if holder.shape != parameter.shape:
            raise ValueError(f"the checkpoint has weights of {tuple(holder.shape)}, not {tuple(parameter.shape)}.")
        return holder

    def _followed(self, tensors: dict[str, list[Any]], kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the conversion makes of them."""
        parts = parts_of_experts(self.operations, tensors, kwargs["source_patterns"])
        if parts is not None:
            return {kwargs["target_patterns"][0]: stacked(parts)}
        for operation in self.operations:
            tensors = operation.convert(tensors, **kwargs)
        return tensors


@dataclass(frozen=True)
class _Part:
    """One tensor of a checkpoint."""

    weight: Tensor
    """uint8 `[..., rows, bytes of a row]` where it has scales; else any float."""
    scales: Tensor | None
    """As `PackedExperts` holds them, for blocks that divide the weight; None: it is not packed."""
    bits: int
    is_transposed: bool = False
    """Whether the model's parameter has its rows as columns."""

    @property
    def kind(self) -> tuple[Any, ...] | None:
        """What packed weights that are joined must share; None: it is not packed."""
        if self.scales is None:
            return None
        blocks = (self.weight.shape[dim] // self.scales.shape[dim] for dim in (-2, -1))
        return self.bits, self.scales.dtype, *blocks

    def dense(self, dtype: torch.dtype) -> Tensor:
        if self.scales is None:
            return self.weight.to(dtype)
        weight, scales = (tensor if tensor.ndim == 3 else tensor[None] for tensor in (self.weight, self.scales))
        dense = PackedExperts(weight, scales, self.bits, dtype, self.is_transposed).dequantize().contiguous()
        return dense if self.weight.ndim == 3 else dense[0]


def _parts(tensors: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> dict[str, list[_Part]]:
    """By the patterns that name weights, in their order; patterns of scales are left out."""
    found: dict[str, list[_Part]] = {}
    by_name = {pattern.removesuffix("$"): value for pattern, value in tensors.items()}
    for pattern, value in tensors.items():
        name = pattern.removesuffix("$")
        if name.endswith(("_scales", "_scale_inv", "activation_scale")):
            continue
        is_mxfp4 = name.endswith("_blocks")
        scales = by_name.get(f"{name.removesuffix('_blocks')}_scales" if is_mxfp4 else f"{name}_scale_inv")
        weights = value if isinstance(value, list) else [value]
        if scales is None:
            if any(weight.element_size() == 1 for weight in weights):
                raise ValueError(f"{name} has no scales")
            found[pattern] = [_Part(weight, None, 8) for weight in weights]
            continue
        scales = scales if isinstance(scales, list) else [scales]
        if len(weights) != len(scales):
            raise ValueError(f"there are {len(weights)} of {name}, and {len(scales)} of its scales")
        block = checkpoint.get("weight_block_size")
        found[pattern] = [_mxfp4(w, s) if is_mxfp4 else _fp8(w, s, block) for w, s in zip(weights, scales, strict=True)]
    if not found:
        raise ValueError(f"there are scales alone ({', '.join(by_name)}), and no weights")
    return found


def _mxfp4(blocks: Tensor, scales: Tensor) -> _Part:
    """blocks `[E, rows, C, 16]`, of a parameter `[E, columns, rows]`; scales `[E, rows, C]`."""
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise ValueError(f"blocks and scales are {blocks.dtype} and {scales.dtype}, and must be bytes (uint8)")
    if blocks.ndim != 4 or blocks.shape[-1] != 16 or scales.shape != blocks.shape[:3]:
        raise ValueError(f"scales of {tuple(scales.shape)} do not go with blocks of {tuple(blocks.shape)}")
    return _Part(blocks.flatten(2), held_scales(scales), 4, True)


def _fp8(weight: Tensor, scales: Tensor, block: tuple[int, int] | None) -> _Part:
    """Of a checkpoint in FP8, some of which have experts in MXFP4: two to an int8."""
    bits = 4 if weight.dtype in (torch.int8, torch.float4_e2m1fn_x2) else 8
    if bits == 8 and weight.dtype != torch.float8_e4m3fn:
        if weight.dtype.itemsize == 1:
            raise ValueError(f"weights with scales are {weight.dtype}; float8_e4m3fn is read.")
        weight = weight.to(torch.float8_e4m3fn)  # transformers 5.17 has cast it, without a loss
    if not (scales.is_floating_point() or scales.dtype == torch.uint8):
        raise ValueError(f"scales are {scales.dtype}, and must be floats or exponents (uint8)")
    weight = weight.view(torch.uint8)
    shape = (weight.shape[-2], weight.shape[-1] * 8 // bits)
    grid = tuple(-(-size // step) for size, step in zip(shape, block or shape, strict=True))
    if bits == 8 and block is not None and grid != ((1, 1) if scales.numel() == 1 else tuple(scales.shape[-2:])):
        raise ValueError(f"{tuple(scales.shape)} scales for weights of {shape} in blocks of {tuple(block)}")
    sizes = (1, 32) if bits == 4 else tuple(block or shape)
    return _Part(weight, whole_blocks(held_scales(scales), shape, sizes), bits)  # type: ignore[arg-type]


def _only(tensors: dict[str, Any]) -> Tensor:
    (value,) = tensors.values()
    return value[0] if isinstance(value, list) else value
