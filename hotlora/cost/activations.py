"""What autograd keeps for the backward pass of a training step, in bytes, before a model is loaded.

It is not guessed by a formula, which would go stale with the code: the model is run without weights, with its routed
experts left out; and one layer's experts are run for real, on a few tokens and two experts.
"""

import copy
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from ..adapter.config import HotLoraConfig
from ..adapter.count import weights_beside_experts
from ..base.quiet import quiet
from ..hf.experts_view import ExpertsView
from ..hf.internals import internal
from ..hf.models import auto_class
from ..hf.moe_layers import moe_layers, num_experts_per_tok, unwrap
from ..hf.sinks import NAME as SINKS
from ..hf.sinks import default_attention

_PROBED = (64, 192)  # tokens


class SavedBytes:
    """Bytes that autograd keeps for the backward pass of what is run inside. Each storage counts once, in whole;
    those of the model's weights, and of `others`, do not. `again`: bytes of those that several operations keep."""

    def __init__(self, model: nn.Module, *others: Tensor) -> None:
        self.total = self.again = 0
        self._times: dict[int, int] = {}
        tensors = (*model.parameters(), *model.buffers(), *others)
        # Held as long as this is: where one is freed before, another could get its address and would not be counted.
        self._seen = {storage._cdata: storage for storage in (t.untyped_storage() for t in tensors)}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> "SavedBytes":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = storage
            self._times[storage._cdata] = 0
            self.total += storage.nbytes()
        if storage._cdata in self._times:
            self._times[storage._cdata] += 1
            self.again += storage.nbytes() * (self._times[storage._cdata] == 2)
        return tensor


def autocast(device_type: str, dtype: torch.dtype) -> torch.autocast:
    """As `train` has it: in half precision the adapters, which are float32, are computed in the base's dtype."""
    return torch.autocast(device_type, dtype=dtype, enabled=dtype != torch.float32)


def expert_row_bytes(
    model: PreTrainedModel, lora: HotLoraConfig, coverage: float, dtype: torch.dtype, device: torch.device
) -> float:
    """Bytes a token that one layer's experts keep, by running two of them: one adapted, which gets `coverage` of the
    assignments, and one not. What is kept whatever the tokens is not in it, nor are the layer's inputs."""
    experts, top_k = unwrap(model.get_submodule(moe_layers(model)[0].experts)), num_experts_per_tok(model)
    two = _two_experts(experts, dtype, device)
    bound = copy.copy(lora)
    bound._expert_ids = {"two": (0,)}
    kind: Any = bound._layer_class("two")
    layer = kind(two, "default", bound, r=lora.r, lora_alpha=lora.lora_alpha, target_name="two").train()
    totals = []
    for tokens in _PROBED:
        hidden_TD = torch.zeros(tokens, ExpertsView(experts).widths[0], dtype=dtype, device=device, requires_grad=True)
        weights_TK = torch.full((tokens, top_k), 1 / top_k, dtype=dtype, device=device, requires_grad=True)
        index_S = torch.ones(tokens * top_k, dtype=torch.int64, device=device)
        index_S[: round(coverage * tokens * top_k)] = 0
        with autocast(device.type, dtype), SavedBytes(layer, hidden_TD, weights_TK) as saved:
            layer(hidden_TD, index_S.view(tokens, top_k), weights_TK)
        totals.append(saved.total)
    return (totals[1] - totals[0]) / (_PROBED[1] - _PROBED[0])


def _two_experts(experts: Any, dtype: torch.dtype, device: torch.device) -> Any:
    two = copy.deepcopy(experts)  # without weights: the model is on the meta device
    for name, p in experts.named_parameters(recurse=False):
        weights = torch.zeros(2, *p.shape[1:], dtype=dtype, device=device)
        setattr(two, name, nn.Parameter(weights, requires_grad=False))
    two.num_experts = 2
    return two


class LiveBytes(TorchDispatchMode):
    """The most bytes that are there at a time of what is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if (key := storage._cdata) not in self._seen | given:
                self._seen.add(key)
                weakref.finalize(storage, self._free, key, storage.nbytes())
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
        return result

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def activation_arrays(view: ExpertsView, dtype: torch.dtype) -> tuple[float, float, float]:
    """Arrays of all rows, `[S, F]`, that the experts' activation makes: the most in a forward; what is left of one with
    gradients; the most in its backward, what was left but for its value included."""
    up_SPF = torch.zeros(4, view.num_parts, view.widths[1], dtype=dtype)
    array = up_SPF[:, 0].numel() * dtype.itemsize
    with torch.no_grad(), LiveBytes() as forward:
        grad_SF = view.activation(up_SPF)
    with torch.enable_grad(), LiveBytes() as live:
        act_SF = view.activation(up_SPF.requires_grad_())
        left = live.now
        edge = torch.autograd.graph.get_gradient_edge(act_SF)
        del act_SF
        live.most = live.now
        torch.autograd.grad(edge, up_SPF, grad_SF)
    return forward.most / array, left / array, live.most / array


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)]


@dataclass(frozen=True)
class Rest:
    """The adapted decoder without its routed experts."""

    kept: int
    """Bytes that it keeps, and the loss."""
    again: int
    """Bytes of it that several operations keep, as the adapters of q, k and v their input."""
    layers: tuple[tuple[int, int], ...]
    """Of each decoder layer: bytes of it that it keeps, and `padding`'s."""
    masks: int
    """Bytes of what layers share: attention's masks, positions. Gradient checkpointing holds it to the end."""
    backward: int
    """Bytes that the backward pass of the layer that keeps most makes at a time."""
    padding: int
    """Bytes that attention on a GPU keeps besides where rows have padding: a mask that is added, in each layer, and k
    and v repeated for all heads of q."""
    trained: tuple[tuple[int, ...], ...]
    """Shapes of all parameters that train, those of the routed experts too."""
    frozen: int
    """Numbers of the adapter that do not train: a frozen A's."""
    beside_experts: int
    """Weights of the adapter that every token meets."""


def masked_layers(config: PreTrainedConfig, attn_implementation: str | None) -> str:
    """Whose attention works out the scores of all keys, whatever is masked: `all` layers', those with a `sliding`
    window, or `none`'s, as by kernels that know where a row's examples and windows end."""
    attention = _attention(config, attn_implementation)
    return "all" if attention == "eager" else "none" if attention == _KERNELS else "sliding"


def _attention(config: PreTrainedConfig, attn_implementation: str | None) -> str | None:
    attention = attn_implementation or default_attention(config)
    return attention if attention in (None, "eager", "sdpa", SINKS) else _KERNELS  # which need a GPU, or their library


def rest_of_step(
    config: PreTrainedConfig, lora: HotLoraConfig, batch_size: int, length: int, dtype: torch.dtype, device: str,
    attn_implementation: str | None = None, *, flattened: bool = False,
) -> Rest:  # fmt: skip
    """What all but the routed experts keep, by running the adapted decoder on tensors that have shapes only.

    device: cuda or cpu, whose kernels attention takes. flattened: rows hold several examples, and a mask keeps them
    apart.
    """
    attention = _attention(config, attn_implementation)
    with torch.device("meta"), quiet():
        base = auto_class(config).from_config(_plain_rope(config), dtype=dtype, attn_implementation=attention)
        of_base = _numbers(base)
        model = get_peft_model(base, lora).train()
    with FakeTensorMode(), quiet():
        _on_cpu(model)
        ids = torch.zeros(batch_size, length, dtype=torch.int64)
        kernels = _cuda_attention() if device == "cuda" else nullcontext([0])
        rows = nullcontext() if flattened else _unpacked()
        with _without_experts(model), rows, kernels as padding, autocast("cpu", dtype):
            kept, again, layers = _forward(base, model, ids, padding)
            largest = max(reversed(layers), key=lambda layer: layer.kept)
            with LiveBytes() as live:
                if largest.given.requires_grad:
                    torch.autograd.grad(largest.returned.sum(), largest.given)
                else:  # the first
                    largest.returned.sum().backward()
    shared = {storage._cdata: storage.nbytes() for layer in layers for storage in layer.shared}
    last = batch_size * length * config.get_text_config().hidden_size * dtype.itemsize  # what the loss keeps
    shapes = tuple(tuple(p.shape) for p in model.parameters() if p.requires_grad)
    frozen = _numbers(model) - of_base - sum(map(math.prod, shapes))
    return Rest(
        kept + last, again, tuple(layer.kept for layer in layers), sum(shared.values()), live.most, sum(padding),
        shapes, frozen, weights_beside_experts(model),
    )  # fmt: skip


def _plain_rope(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy whose rotary embeddings take as much memory, and do not depend on how long a row turns out to be: that is
    not known of tensors that have shapes only."""
    copied = copy.deepcopy(config)
    rope = getattr(copied.get_text_config(), "rope_parameters", None) or {}
    for of_kind in (rope, *rope.values()):  # one for all layers, or one for each kind of them
        if isinstance(of_kind, dict) and of_kind.get("rope_type") == "dynamic":
            of_kind["rope_type"] = "default"
    return copied


def _forward(
    base: PreTrainedModel, model: nn.Module, ids: Tensor, padding: list[int]
) -> tuple[int, int, list["_Layer"]]:
    """`Rest.kept` and `again` of the decoder, and its layers."""
    with SavedBytes(model) as saved:
        with _decoder_layers(base, lambda: (saved.total, sum(padding))) as layers:
            base.get_decoder()(input_ids=ids, use_cache=False)
    return saved.total, saved.again, layers


class _Layer(NamedTuple):
    """A decoder layer that has run."""

    kept: tuple[int, int]
    """What it added to `count`."""
    shared: list[torch.UntypedStorage]
    """Of what it was given besides its input."""
    given: Tensor
    returned: Tensor


@contextmanager
def _decoder_layers(base: PreTrainedModel, count: Callable[[], tuple[int, int]]) -> Iterator[list[_Layer]]:
    found: list[_Layer] = []
    before = (0, 0)

    def begins(*_: Any) -> None:
        nonlocal before
        before = count()

    def ends(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        now, given = count(), dict(kwargs)
        hidden = args[0] if args else given.pop("hidden_states")
        kept = (now[0] - before[0], now[1] - before[1])
        found.append(_Layer(kept, _storages((args[1:], given)), hidden, tree_leaves(result)[0]))

    layers = base.get_decoder().layers
    handles = [layer.register_forward_pre_hook(begins) for layer in layers]
    handles += [layer.register_forward_hook(ends, with_kwargs=True) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _numbers(model: nn.Module) -> int:
    return sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))


def _on_cpu(model: nn.Module) -> None:
    """From the meta device to tensors that say they are on the CPU, where attention takes its fused kernels."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            new = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(new, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


class _Inputs(torch.autograd.Function):
    """In the place of routed experts: keeps their inputs, and nothing else. `trained` is what makes the output need a
    gradient, as their adapters do, whether or not the input does."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor, trained: Tensor
    ) -> Tensor:
        ctx.save_for_backward(hidden_TD, top_k_weights)
        return torch.empty_like(hidden_TD)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden_TD, top_k_weights = ctx.saved_tensors
        return torch.empty_like(hidden_TD), None, torch.empty_like(top_k_weights), None


class _CudaAttention(torch.autograd.Function):
    """In the place of attention's fused kernels on a GPU, which keep no scores, whatever the widths of heads: on a CPU
    torch makes them where v has another width than q and k, as in MLA."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:  # type: ignore[override]
        batch, heads, length, _ = q.shape
        out = q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)  # as kernels have it: no copy comes after
        # A mask of bools becomes one that is added, for each layer anew.
        masks = [] if mask is None else [q.new_empty(mask.shape) if mask.dtype == torch.bool else mask]
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32), *masks)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


def _attention_of_kernels(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *given: Any, **_: Any
) -> tuple[Tensor, None]:
    return cast(Tensor, _CudaAttention.apply(query, key, value, None)).transpose(1, 2), None


# In the place of flash_attention_2, flex_attention, …: rows are unpadded before, or a mask takes next to nothing.
_KERNELS = "hotlora_estimated"
AttentionInterface.register(_KERNELS, _attention_of_kernels)
AttentionMaskInterface.register(_KERNELS, lambda *given, **_: None)


@contextmanager
def _cuda_attention() -> Iterator[list[int]]:
    """Yields what each call would keep besides where rows have padding."""
    padding: list[int] = []

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        if attn_mask is None:
            repeated = (query.shape[1] // key.shape[1] - 1) * (key.nbytes + value.nbytes)
            padding.append(query.shape[0] * query.shape[2] * key.shape[2] * query.itemsize + repeated)
        return cast(Tensor, _CudaAttention.apply(query, key, value, attn_mask))

    plain = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield padding
    finally:
        nn.functional.scaled_dot_product_attention = plain


@contextmanager
def _without_experts(model: nn.Module) -> Iterator[None]:
    modules: list[Any] = [model.get_submodule(layer.experts) for layer in moe_layers(model)]
    trained = torch.empty(0, requires_grad=True)
    for module in modules:
        module.forward = lambda *given: _Inputs.apply(*given, trained)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


@contextmanager
def _unpacked() -> Iterator[None]:
    """transformers asks the values of position_ids whether sequences are packed, and without values builds a mask, at
    the size of length x length, which a real step has not."""
    from transformers import masking_utils

    asked = internal("transformers.masking_utils:find_packed_sequence_indices")
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = asked
