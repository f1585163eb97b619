"""A frozen base whose routed experts are stored in 8 or 4 bits. The adapter keeps its own dtype.

transformers 5 keeps all experts of a layer in 3-D parameters, and 4-bit loading by bitsandbytes or torchao replaces
`nn.Linear` only: nearly all of the model stays in 16 bits without a word (bitsandbytes#1849, unsloth#5344). Here each
3-D parameter becomes a `QuantizedExperts` of the same name. What is multiplied is dequantized for that one product,
and again in backward: no dense copy outlives a product. `quantized` has what holds them.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
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
from ..base.sizes import size_words
from ..hf.models import moe_layers, unwrap
from ..hf.stored import Failure
from ..layer.function import use_routed_layer
from .linears import Linears, check_linear_bits, linear_bits
from .offload import Offload, OffloadedExperts
from .packed import NAMES, PackedExperts
from .quantized import BLOCK, FLOATS, QuantizedExperts, bitsandbytes_functional
from .stacking import Unstacked, parts_of_experts

_METHOD = "hotlora_experts"
HELD = (QuantizedExperts, PackedExperts, OffloadedExperts)
"""What holds experts that are no tensors: quantized here, packed in the checkpoint, or on the host of a GPU."""


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
    modules, kept = _experts_modules(model), _kept_ids(model, keep)
    if (there := stored_in(model)) is not None:
        raise ModelError(f"the experts are quantized to {there} already. Load the model again to change that.")
    if not is_plain(model):
        raise ModelError("the experts are offloaded. Load the model with ExpertsQuantization(bits, offload=True).")
    if any(getattr(module, "merged_adapters", None) for module in model.modules()):
        raise ModelError("an adapter is merged into the model, and could not be taken out again: call unmerge_adapter.")
    for path, experts in modules.items():
        for name, weight in _dense_weights(experts):
            if weight.device.type == "meta":
                raise ModelError(f"{path}.{name} is on the meta device, without weights. Load the model's weights.")
            if type(weight) not in (nn.Parameter, Tensor) or weight.dtype not in FLOATS:
                raise ModelError(
                    f"{path}.{name} is {type(weight).__name__} of {weight.dtype}, and can be quantized from float32, "
                    "bfloat16 or float16. Load the model in one of them, without other quantization of its experts."
                )
    for path, experts in modules.items():
        for name in [name for name, weight in _dense_weights(experts) if len(kept[path]) < len(weight)]:
            _replace(experts, name, QuantizedExperts.from_weight(getattr(experts, name), bits, kept[path]))
    finish(cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model))
    return model


def quantized_bits(model: nn.Module) -> int | None:
    """The bits of the experts of `model`, by `quantize_experts` or as its checkpoint has them; None: all are dense."""
    return next((holder.bits for holder in _holders(model) if hasattr(holder, "bits")), None)


def is_plain(model: nn.Module) -> bool:
    """Whether all experts are tensors, which transformers' own forwards take."""
    return not any(isinstance(module, HELD) for module in model.modules())


def packed_format(model: nn.Module) -> str | None:
    """MXFP4 or FP8, where the experts of `model` are as its checkpoint packs them."""
    return next((NAMES[holder.bits] for holder in _holders(model) if isinstance(holder, PackedExperts)), None)


def stored_in(model: nn.Module) -> str | None:
    """What the experts of `model` are stored in, in words; None: all are dense."""
    bits = quantized_bits(model)
    return packed_format(model) or (None if bits is None else f"{bits} bits")


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
        holders = _holders(unwrap(model.get_submodule(layer.experts)))
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


def expert_bytes(model: nn.Module) -> int:
    """Bytes that the weights of all routed experts take now, quantized or not.

    Raises:
        ModelError: no MoE layer.
    """
    weights = (w for experts in _experts_modules(model).values() for _, w in _weights(experts))
    return sum(weight.nbytes for weight in weights)


def quantized_parameters(model: nn.Module) -> int:
    """How many weights are held in quantized or packed experts, where `parameters()` does not see them."""
    return sum(module.numel() for module in model.modules() if isinstance(module, HELD))


def check_mergeable(model: nn.Module) -> None:
    """HotLoraError if experts or linear layers of `model` are quantized, since requantizing would round a merged update
    away, or wait on the host for a GPU."""
    if any(isinstance(module, OffloadedExperts) for module in model.modules()):
        raise HotLoraError(
            "an adapter cannot be merged into experts that are offloaded from a GPU: load the base model without "
            "offload, or on the CPU (--device cpu), put the adapter on it with hotlora.load_adapter, and merge there."
        )
    if (format := packed_format(model)) is not None:
        raise HotLoraError(
            f"an adapter cannot be merged into experts in {format}, as the checkpoint has them: packing them again "
            "would round the update away. Merge it into the dequantized base: load that with load_model(..., "
            "dequantize=True) (--quantize 0), put the adapter on it with hotlora.load_adapter, and merge there."
        )
    if (bits := quantized_bits(model)) is not None:
        raise HotLoraError(
            f"an adapter cannot be merged into experts of {bits} bits: quantizing them again would round the "
            "update away. Load the base model without quantization, put the adapter on it with "
            "hotlora.load_adapter, and merge there."
        )
    if (bits := linear_bits(model)) is not None:
        raise HotLoraError(
            f"an adapter cannot be merged into linear layers of {bits} bits: quantizing them again would round the "
            "update away. Load the base model without quantization (--quantize-linear 0), put the adapter on it with "
            "hotlora.load_adapter, and merge there."
        )


def warn_if_experts_unquantized(model: nn.Module) -> None:
    """UserWarning where bitsandbytes or torchao has quantized `model` and left its experts in 16 or 32 bits.

    Raises:
        ModelError: no MoE layer.
    """
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    method = str(getattr(method, "value", method))
    if method not in ("bitsandbytes", "torchao"):
        return
    # A subclass of Tensor with a float's dtype is torchao's, quantized.
    dense = [
        weight
        for experts in _experts_modules(model).values()
        for _, weight in _dense_weights(experts)
        if type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point() and weight.itemsize > 1
    ]
    if dense:
        left = sum(weight.nbytes for weight in dense)
        total = sum(weight.nbytes for weight in (*model.parameters(), *model.buffers()))
        warnings.warn(
            f"{method} has quantized nn.Linear only: the experts are still in {str(dense[0].dtype)[6:]}, "
            f"{size_words(left)} of the model's {size_words(total)}. hotlora.quantize_experts(model) quantizes them too.",
            UserWarning,
            stacklevel=2,
        )


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
        config = self.quantization_config
        config.failure.error = None  # of a loading before
        kept = _kept_ids(model, config.keep)
        self.names = {
            f"{path}.{name}": kept[path]
            for path, experts in _experts_modules(model).items()
            for name, weight in _dense_weights(experts)
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
        for conversion in conversions:
            if hasattr(conversion, "operations"):
                conversion.operations = [_OneByOne(self, conversion.operations)]
        return conversions

    def get_quantize_ops(self) -> ConversionOps:
        config = self.quantization_config
        return QuantizeOnLoad(self.names, config.bits, self.linears, config.offload, config.failure)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self.remove_quantization_config(model)
        if self.linears is not None:
            self.linears.finish(model)
        if self.quantization_config.offload is not None:
            self.quantization_config.offload.say()
        give_back()
        if is_plain(model) and self.linears is None:  # of a CPU, whose offloaded experts are tensors
            use_routed_layer(model)
        else:
            finish(model)

    @property
    def quantized_element_size(self) -> float | None:
        bits = self.quantization_config.bits or self.quantization_config.linear
        return None if bits is None else bits / 8 + 4 / BLOCK

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
                _replace(model.get_submodule(path), attribute, held)
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


def _experts_modules(model: nn.Module) -> dict[str, Any]:
    return {layer.experts: unwrap(model.get_submodule(layer.experts)) for layer in moe_layers(model)}


def _kept_ids(model: nn.Module, keep: Mapping[int, Sequence[int]] | None) -> dict[str, tuple[int, ...]]:
    """Path of each experts module -> the experts that are left as they are, ascending."""
    keep, layers = keep or {}, {layer.layer: layer for layer in moe_layers(model)}
    for number, ids in keep.items():
        if number not in layers:
            raise PlanError(f"keep names layer {number}, which has no experts: there are {list(layers)}.")
        if wrong := [e for e in ids if not 0 <= e < layers[number].num_experts]:
            raise PlanError(f"keep names expert {wrong[0]} of layer {number}, of {layers[number].num_experts} experts.")
    return {layer.experts: tuple(sorted(set(keep.get(number, ())))) for number, layer in layers.items()}


def _dense_weights(experts: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The 3-D parameters; biases are 2-D."""
    return ((name, weight) for name, weight in experts.named_parameters(recurse=False) if weight.ndim == 3)


def _weights(experts: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from _dense_weights(experts)
    yield from ((name, child) for name, child in experts.named_children() if isinstance(child, HELD))


def _holders(module: nn.Module) -> Iterator[Any]:
    """Of the experts below that are no tensors, wherever they are."""
    for child in module.modules():
        if isinstance(child, HELD):
            yield child.holder if isinstance(child, OffloadedExperts) else child


def _replace(experts: nn.Module, name: str, holder: nn.Module) -> None:
    delattr(experts, name)
    setattr(experts, name, holder)


def finish(model: PreTrainedModel) -> None:
    """Makes a model with held experts run on hotlora's forward, and not be saved as a whole."""
    use_routed_layer(model)
    # On the instance: PeftModel's own save_pretrained, which saves the adapter, stays as it is.
    model.__dict__["save_pretrained"] = _refuse_to_save


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise HotLoraError(
        "a model with experts quantized by hotlora cannot be saved: no other program could read it. Save the adapter "
        "(PeftModel.save_pretrained); the base stays the checkpoint that it was loaded from."
    )


def _check_bits(bits: Any) -> None:
    if bits not in (4, 8) or isinstance(bits, bool):
        raise HotLoraError(f"bits={bits!r} must be 4 or 8.")
