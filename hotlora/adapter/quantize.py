"""A frozen base whose routed experts are stored in 8 or 4 bits. The adapter keeps its own dtype.

transformers 5 keeps all experts of a layer in 3-D parameters, and 4-bit loading by bitsandbytes or torchao replaces
`nn.Linear` only: nearly all of the model stays in 16 bits without a word (bitsandbytes#1849, unsloth#5344). Here each
3-D parameter becomes a `QuantizedExperts` of the same name. What is multiplied is dequantized for that one product,
and again in backward: no dense copy outlives a product. `quantized` has what holds them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import ConversionOps, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..base.errors import HotLoraError, ModelError, PlanError
from ..base.heap import give_back
from ..hf.moe_layers import moe_layers, unwrap
from ..hf.stored import Failure
from ..layer.function import use_routed_layer
from .linears import LINEAR_SCALE_BYTES, Linears, check_linear_bits, linear_bits
from .offload import Offload
from .quantized import BLOCK, FLOATS, SCALE_BYTES, QuantizedExperts, bitsandbytes_functional
from .stacking import Unstacked, parts_of_experts
from .stored import (
    dense_weights,
    experts_modules,
    finish,
    holders_in,
    is_plain,
    packed_format,
    quantized_bits,
    replace_weight,
    stored_in,
)

_METHOD = "hotlora_experts"


def quantize_experts(
    model: nn.Module, bits: Literal[4, 8] = 4, keep: Mapping[int, Sequence[int]] | None = None
) -> nn.Module:
    """Stores the routed experts of `model` in `bits` bits, in place, and returns `model`.

    Only routed experts: attention, shared experts and embeddings keep their dtype, or what bitsandbytes has made of
    them. The model runs on hotlora's forward from here on (`layer.function.use_routed_layer`), trains by
    adapters only, and cannot be saved as a whole. Quantizing needs the memory of one projection of one layer more
    than the model has; `ExpertsQuantization` quantizes while it loads.

    Args:
        keep: decoder layer -> experts that are left as they are, such as `ExpertPlan.experts`: the cold ones alone are
            quantized then. A layer all of whose experts are kept is left alone.

    Raises:
        PlanError: `keep` names a layer or an expert that is not there.
        ModelError: no MoE layer, quantized already, with a merged adapter, on the meta device, or not in a 16- or
            32-bit float.
        HotLoraError: bits is not 4 or 8, or bitsandbytes is not installed.
    """
    _check_bits(bits)
    bitsandbytes_functional()
    modules, kept = experts_modules(model), _kept_ids(model, keep)
    if (there := stored_in(model)) is not None:
        raise ModelError(f"the experts are quantized to {there} already. Load the model again to change that.")
    if not is_plain(model):
        raise ModelError("the experts are offloaded. Load the model with ExpertsQuantization(bits, offload=True).")
    if any(getattr(module, "merged_adapters", None) for module in model.modules()):
        raise ModelError("an adapter is merged into the model, and could not be taken out again: call unmerge_adapter.")
    for path, experts in modules.items():
        for name, weight in dense_weights(experts):
            if weight.device.type == "meta":
                raise ModelError(f"{path}.{name} is on the meta device, without weights. Load the model's weights.")
            if type(weight) not in (nn.Parameter, Tensor) or weight.dtype not in FLOATS:
                raise ModelError(
                    f"{path}.{name} is {type(weight).__name__} of {weight.dtype}, and can be quantized from float32, "
                    "bfloat16 or float16. Load the model in one of them, without other quantization of its experts."
                )
    for path, experts in modules.items():
        for name in [name for name, weight in dense_weights(experts) if len(kept[path]) < len(weight)]:
            replace_weight(experts, name, QuantizedExperts.from_weight(getattr(experts, name), bits, kept[path]))
    finish(cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model))
    return model


def quantization_of(model: nn.Module) -> "ExpertsQuantization | None":
    """What would quantize a model as `model` is: bits of its experts, and who is kept; bits of other linear layers.
    None if there is nothing to do: all are dense, or experts are as the checkpoint has them.

    Raises:
        ModelError: no MoE layer.
    """
    bits = None if packed_format(model) else quantized_bits(model)
    linear = linear_bits(model)
    if bits is None:
        return None if linear is None else ExpertsQuantization(None, linear=linear)
    keep = {}
    for layer in moe_layers(model):
        holders = holders_in(unwrap(model.get_submodule(layer.experts)))
        kept = [holder.kept_ids for holder in holders if isinstance(holder, QuantizedExperts)]
        if ids := kept[0] if kept else tuple(range(layer.num_experts)):
            keep[layer.layer] = ids
    return ExpertsQuantization(bits, keep, linear)


def noted_quantization(model: nn.Module) -> dict[str, Any] | None:
    """What an adapter notes of how its base is stored: `checkpoint`, the format in which the checkpoint has the
    experts; or their `bits`, and by layer those to `keep`; `linear`, the bits of other linear layers. None: all dense.
    `load.base_quantization` reads it.

    ModelError: no MoE layer.
    """
    noted: dict[str, Any] = {}
    if (format := packed_format(model)) is not None:
        noted["checkpoint"] = format
    if (found := quantization_of(model)) is not None:
        if found.bits is not None:
            noted |= {"bits": found.bits, "keep": {str(layer): list(ids) for layer, ids in (found.keep or {}).items()}}
        if found.linear is not None:
            noted["linear"] = found.linear
    return noted or None


@register_quantization_config(_METHOD)
class ExpertsQuantization(QuantizationConfigMixin):
    """`from_pretrained(..., quantization_config=ExpertsQuantization(4))` quantizes experts while it loads: at no time
    more than one projection of one layer is dense, and its parts while transformers stacks them.

    bits, keep: as `quantize_experts` takes them; bits may be None beside another option: experts stay as they are.
    linear: 4 or 8: attention, shared experts and dense MLPs too, in bitsandbytes' own linear layers.
    offload: keep all experts out of the device's memory: for a GPU they wait in RAM (`offload.keep_on_device` brings
        some of them back), or in a file; a CPU reads them from a file.
    offload_folder: where that file lies; a CPU needs it.

    Raises:
        HotLoraError: bits or linear is not 4 or 8, or bitsandbytes is not installed.
    """

    def __init__(
        self,
        bits: int | None = 4,
        keep: Mapping[int, Sequence[int]] | None = None,
        linear: int | None = None,
        *,
        offload: bool = False,
        offload_folder: str | Path | None = None,
        **_: Any,
    ) -> None:
        if bits is not None or (linear is None and not offload):
            _check_bits(bits)
        if linear is not None:
            check_linear_bits(linear)
        if bits is not None or linear is not None:
            bitsandbytes_functional()
        self.quant_method = _METHOD  # type: ignore[assignment]  # its enum is transformers' own methods
        self.bits, self.keep, self.linear = bits, keep, linear
        self.offload, self.failure = Offload(offload_folder) if offload else None, Failure()

    def __str__(self) -> str:
        experts = f"experts in {self.bits} bits" + (", some of them kept as they are" if self.keep else "")
        linears = f"linear layers in {self.linear} bits"
        return " and ".join([experts] * (self.bits is not None) + [linears] * (self.linear is not None))


def experts_in(
    bits: int | None, keep: Mapping[int, Sequence[int]] | None = None, linear: int | None = None, *,
    offload: bool = False, offload_folder: str | Path | None = None,
) -> ExpertsQuantization | None:  # fmt: skip
    """What `load_model` takes for experts in `bits` bits, but for those in `keep`, and other linear layers in `linear`
    bits, or for experts elsewhere; None leaves all as the checkpoint has them. 0 counts as None."""
    if not (bits or linear or offload):
        return None
    return ExpertsQuantization(
        bits or None, keep, linear or None, offload=offload, offload_folder=offload_folder
    )  # fmt: skip


@register_quantizer(_METHOD)
class _ExpertsQuantizer(HfQuantizer):
    """transformers' hooks into loading. The model that comes out is as `quantize_experts` leaves it."""

    quantization_config: ExpertsQuantization

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self.checkpoint_files = kwargs.get("checkpoint_files")
        config = self.quantization_config
        config.failure.error = None  # of a loading before
        kept = _kept_ids(model, config.keep)
        self.names = {
            f"{path}.{name}": kept[path]
            for path, experts in experts_modules(model).items()
            for name, weight in dense_weights(experts)
            if config.offload or (config.bits is not None and len(kept[path]) < len(weight))
        }
        self.linears = None if config.linear is None else Linears(config.linear)
        if self.linears is not None:
            self.linears.put_in(model, kwargs.get("device_map"))

    def __deepcopy__(self, memo: Any) -> "_ExpertsQuantizer":
        """transformers copies a conversion, and all that it holds, for each parameter."""
        return self

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.names or (self.linears is not None and self.linears.needs(model, param_name))

    def update_weight_conversions(self, weight_conversions: list[Any], *model: PreTrainedModel) -> list[Any]:
        """Experts that a checkpoint has one by one come one by one. transformers 5.17 gives no model."""
        conversions: list[Any] = super().update_weight_conversions(weight_conversions, *model)
        self.taken = [(one, one.operations) for one in conversions if hasattr(one, "operations")]
        for conversion, operations in self.taken:
            conversion.operations = [_OneByOne(self, operations)]
        return conversions

    def get_quantize_ops(self) -> ConversionOps:
        config = self.quantization_config
        return QuantizeOnLoad(self.names, config.bits, self.linears, config.offload, config.failure)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self.remove_quantization_config(model)
        for conversion, operations in self.taken:  # saving undoes the conversion's own steps
            conversion.operations = operations
        if self.linears is not None:
            self.linears.finish(model)
        if self.quantization_config.offload is not None:
            self.quantization_config.offload.finish(model, self.checkpoint_files)
        give_back()
        if is_plain(model) and self.linears is None:  # of a CPU, whose offloaded experts are tensors
            use_routed_layer(model)
        else:
            finish(model)

    @property
    def quantized_element_size(self) -> float | None:
        experts, linear = self.quantization_config.bits, self.quantization_config.linear
        bits = experts or linear
        return None if bits is None else bits / 8 + (SCALE_BYTES if experts else LINEAR_SCALE_BYTES) / BLOCK

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _OneByOne(ConversionOps):
    """In the place of the steps of a conversion: of one that stacks experts which are to be quantized, their parts."""

    def __init__(self, quantizer: _ExpertsQuantizer, operations: list[ConversionOps]) -> None:
        self.quantizer, self.operations = quantizer, operations

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        with self.quantizer.quantization_config.failure.of(name := kwargs["full_layer_name"]):
            if name in self.quantizer.names:
                parts = parts_of_experts(self.operations, input_dict, kwargs["source_patterns"])
                if parts is not None:
                    return {name: Unstacked(parts)}
            for operation in self.operations:
                input_dict = operation.convert(input_dict, **kwargs)
            return input_dict


class QuantizeOnLoad(ConversionOps):
    """What is quantized of weights as they are read; another linear layer's goes into bitsandbytes'."""

    def __init__(
        self,
        names: Mapping[str, Sequence[int]],
        bits: int | None = None,
        linears: Linears | None = None,
        offload: Offload | None = None,
        failure: Failure | None = None,
    ) -> None:
        self.names, self.bits, self.linears, self.offload = names, bits, linears, offload
        self.failure = failure or Failure()

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Puts the holders where they belong, and leaves to transformers what is not to be quantized."""
        with self.failure.of(kwargs["full_layer_name"]):
            return self._converted(input_dict, **kwargs)

    def _converted(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        model = kwargs["model"]
        for name in list(input_dict):
            value = input_dict[name]
            weight = value[0] if isinstance(value, list) else value
            if name in self.names:
                del input_dict[name], value
                held = self._held(weight, self.names[name])
                if isinstance(held, Tensor):
                    input_dict[name] = held
                    continue
                path, _, attribute = name.rpartition(".")
                replace_weight(model.get_submodule(path), attribute, held)
                kwargs["missing_keys"].discard(name)
            elif self.linears is not None and self.linears.needs(model, name):
                input_dict[name] = self.linears.stored(model, name, weight)
        return input_dict

    def _held(self, weight: Any, kept: Sequence[int]) -> nn.Module | Tensor:
        """The experts as they are to be kept, and where."""
        if self.bits is not None and len(kept) < len(weight):
            weight = QuantizedExperts.from_weight(weight, self.bits, kept)
        elif isinstance(weight, Unstacked):
            weight = weight.stacked()
        return weight if self.offload is None else self.offload(weight)


def _kept_ids(model: nn.Module, keep: Mapping[int, Sequence[int]] | None) -> dict[str, tuple[int, ...]]:
    """Path of each experts module -> the experts that are left as they are, ascending."""
    keep, layers = keep or {}, {layer.layer: layer for layer in moe_layers(model)}
    for number, ids in keep.items():
        if number not in layers:
            raise PlanError(f"keep names layer {number}, which has no experts: there are {list(layers)}.")
        if wrong := [e for e in ids if not 0 <= e < layers[number].num_experts]:
            raise PlanError(f"keep names expert {wrong[0]} of layer {number}, of {layers[number].num_experts} experts.")
    return {layer.experts: tuple(sorted(set(keep.get(number, ())))) for number, layer in layers.items()}


def _check_bits(bits: Any) -> None:
    if bits not in (4, 8) or isinstance(bits, bool):
        raise HotLoraError(f"bits={bits!r} must be 4 or 8.")
