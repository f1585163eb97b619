"""How the routed experts of a model are stored, and what cannot be done with them then."""

import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..base.errors import HotLoraError
from ..base.sizes import size_words
from ..hf.experts_view import ExpertsView
from ..hf.moe_layers import moe_layers, unwrap
from ..layer.function import use_routed_layer
from .linears import linear_bits
from .offload import OffloadedExperts
from .offload_embedding import HostEmbedding
from .packed import NAMES, PackedExperts
from .quantized import QuantizedExperts

HELD = (QuantizedExperts, PackedExperts, OffloadedExperts)
"""What holds experts that are no tensors: quantized here, packed in the checkpoint, or on the host of a GPU."""


def quantized_bits(model: nn.Module) -> int | None:
    """The bits of the experts of `model`, by `quantize_experts` or as its checkpoint has them; None: all are dense."""
    return next((holder.bits for holder in holders_in(model) if hasattr(holder, "bits")), None)


def is_plain(model: nn.Module) -> bool:
    """Whether all experts are tensors, which transformers' own forwards take."""
    return not any(isinstance(module, HELD) for module in model.modules())


def packed_format(model: nn.Module) -> str | None:
    """MXFP4 or FP8, where the experts of `model` are as its checkpoint packs them."""
    return next((NAMES[holder.bits] for holder in holders_in(model) if isinstance(holder, PackedExperts)), None)


def stored_in(model: nn.Module) -> str | None:
    """What the experts of `model` are stored in, in words; None: all are dense."""
    bits = quantized_bits(model)
    return packed_format(model) or (None if bits is None else f"{bits} bits")


def expert_bytes(model: nn.Module) -> int:
    """Bytes that the weights of all routed experts take now, quantized or not.

    Raises:
        ModelError: no MoE layer.
    """
    weights = (w for experts in experts_modules(model).values() for _, w in _weights(experts))
    return sum(weight.nbytes for weight in weights)


def quantized_parameters(model: nn.Module) -> int:
    """How many weights are held where `parameters()` does not see them: in few bits, or on the host."""
    return sum(module.numel() for module in model.modules() if isinstance(module, (*HELD, HostEmbedding)))


def check_mergeable(model: nn.Module) -> None:
    """HotLoraError if experts or linear layers of `model` are quantized, since requantizing would round a merged update
    away, or wait on the host for a GPU, or are spread over processes."""
    views = map(ExpertsView, experts_modules(model).values())
    if any(view.is_spread or view.is_expert_parallel for view in views):
        raise HotLoraError(
            "an adapter cannot be merged into experts that are spread over processes (FSDP2, expert parallelism): save "
            "the adapter with save_pretrained, load the base model whole, in one process, put the adapter on it with "
            "hotlora.load_adapter, and merge there."
        )
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
        for experts in experts_modules(model).values()
        for _, weight in dense_weights(experts)
        if type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point() and weight.itemsize > 1
    ]
    if dense:
        left = sum(weight.nbytes for weight in dense)
        total = sum(weight.nbytes for weight in (*model.parameters(), *model.buffers()))
        warnings.warn(
            f"{method} has quantized nn.Linear only: the experts are still in {str(dense[0].dtype)[6:]}, "
            f"{size_words(left)} of the model's {size_words(total)}. "
            "hotlora.quantize_experts(model) quantizes them too.",
            UserWarning,
            stacklevel=2,
        )


def experts_modules(model: nn.Module) -> dict[str, Any]:
    return {layer.experts: unwrap(model.get_submodule(layer.experts)) for layer in moe_layers(model)}


def dense_weights(experts: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The 3-D parameters; biases are 2-D."""
    return ((name, weight) for name, weight in experts.named_parameters(recurse=False) if weight.ndim == 3)


def _weights(experts: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from dense_weights(experts)
    yield from ((name, child) for name, child in experts.named_children() if isinstance(child, HELD))


def holders_in(module: nn.Module) -> Iterator[Any]:
    """Of the experts below that are no tensors, wherever they are."""
    for child in module.modules():
        if isinstance(child, HELD):
            yield child.holder if isinstance(child, OffloadedExperts) else child


def replace_weight(experts: nn.Module, name: str, holder: nn.Module) -> None:
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
