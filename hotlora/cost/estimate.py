"""Memory and time of a training step before a run, from a model's config alone.

Nothing of the model is loaded. What autograd keeps is not guessed by a formula, which would go stale with the code:
the model is run without weights, with its routed experts left out; and one layer's experts are run for real, on a
few tokens and two experts.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel

from ..adapter.config import HotLoraConfig
from ..adapter.count import count_parameters
from ..adapter.experts import HotLoraExperts
from ..base.errors import HotLoraError, ModelError
from ..base.quiet import quiet
from ..hf.experts_view import ExpertsView
from ..hf.internals import internal
from ..hf.models import auto_class, model_from_config, moe_layers, num_experts_per_tok, own_dtype, packed_bytes, unwrap
from ..routing.plan import ExpertPlan
from ..routing.profile import experts_kept
from .flops import attention_adapter_flops, expert_adapter_flops, forward_flops, step_flops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOSS_TILE = (4096, 32768)  # tokens, vocabulary: TRL makes logits in tiles no larger than this, and never keeps one
_LOSS_COPIES = 7  # float32 copies of a tile that TRL's backward has at a time where there is no Triton
_PROBED = (64, 192)  # tokens
_SCALES = 4 / 64  # bytes a weight, of `quantize`'s float32 scales


class SavedBytes:
    """Bytes that autograd keeps for the backward pass of what is run inside. Each storage counts once, in whole;
    those of the model's weights, and of `others`, do not."""

    def __init__(self, model: nn.Module, *others: Tensor) -> None:
        self.total = 0
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
            self.total += storage.nbytes()
        return tensor


def estimate(
    config: str | Path,
    *,
    batch_size: int,
    max_length: int,
    layers: int | None = None,
    experts_per_layer: int | None = None,
    fraction: float | None = None,
    coverage: float | None = None,
    r: int = 32,
    train_attention: bool = True,
    train_router: bool = True,
    train_shared: bool = True,
    share_a: bool = False,
    dtype: str = "auto",
    quantize: int | None = None,
    keep_hot: bool = False,
    gradient_checkpointing: bool = False,
    device: str | torch.device = "cuda",
    flops_per_second: float | None = None,
) -> dict[str, Any]:
    """What a training step of `batch_size` x `max_length` tokens needs: bytes by kind, FLOPs, and seconds.

    Args:
        config: a config.json, its folder, or "nano".
        layers: cut the model to its first layers.
        experts_per_layer, fraction: the budget, as for `select_experts`; none means all experts.
        coverage: share of assignments to adapted experts; None: as in a layer whose loads have a CV of 1.
        dtype: of the base, and of what is computed; auto: as `train` has it, the config's own on a GPU and float32 on
            the CPU. Adapters are float32.
        quantize: bits of the routed experts, 8 or 4.
        keep_hot: leave the adapted experts as they are; needs `quantize`.
        device: cuda or cpu, what the step is for: its short-lived workspace differs. It need not be here: without
            CUDA one layer's experts are tried out on the CPU, where a little else is kept.
        flops_per_second: what the machine gets through; None: no time is estimated. `hotlora bench` measures it.

    Raises:
        FileError, ModelError: as `models.model_from_config`. PlanError: a budget or rank out of range.
        HotLoraError: anything else out of range.
    """
    for name, value in (("batch_size", batch_size), ("max_length", max_length)):
        if value < 1:
            raise HotLoraError(f"{name} is {value}: it must be 1 or more.")
    if quantize not in (None, 0, 4, 8):
        raise HotLoraError(f"quantize is {quantize}: it must be 4 or 8 bits.")
    if coverage is not None and not 0 <= coverage <= 1:
        raise HotLoraError(f"coverage is {coverage}: it is a share, from 0 to 1.")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise HotLoraError(f"device is {str(device)!r}: give cuda or cpu.") from error
    cut = sized_config(config, layers)
    compute = torch_dtype(dtype, cut, device.type)
    meta = meta_model(cut)
    found = moe_layers(meta)
    kept = [layer.num_experts for layer in found]
    if experts_per_layer is not None or fraction is not None:
        kept = [experts_kept(layer.num_experts, fraction, experts_per_layer) for layer in found]
    if coverage is None:
        coverage = coverage_at(kept[0] / found[0].num_experts)
    tokens = batch_size * max_length
    experts = {layer.layer: tuple(range(n)) for layer, n in zip(found, kept, strict=True)}
    lora = HotLoraConfig(
        plan=ExpertPlan(experts, found[0].num_experts, rule="first", params={}), r=r,
        train_attention=train_attention, train_router=train_router, train_shared=train_shared, share_a=share_a,
    )  # fmt: skip
    weights = sum(p.numel() for p in meta.parameters())
    sizes = [sum(p.numel() for p in x.parameters()) for x in _experts(meta)]
    dense = sum(n * k / layer.num_experts for n, k, layer in zip(sizes, kept, found, strict=True)) if keep_hot else 0
    forward = forward_flops(meta, max_length)
    adapter = expert_adapter_flops(meta, r, {layer.layer: coverage for layer in found})
    adapter += attention_adapter_flops(meta, r) if train_attention else 0.0
    flops = step_flops(forward, adapter, tokens)
    try:
        on = device if device.type == "cuda" and torch.cuda.is_available() else torch.device("cpu")
        per_token = _expert_bytes(meta, lora, coverage, compute, on)
        rest, counts = _other_activations(cut, lora, batch_size, max_length, compute)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"the activations of a {cut.model_type} model cannot be estimated from its config: {reason}"
        ) from error
    trained = int(counts["trainable"])
    # Under autocast a factor is kept in the computation's dtype too, as long as it is needed.
    casts = 0 if compute == torch.float32 else int(counts["experts"]) * compute.itemsize
    activations = int(per_token * tokens * len(found)) + rest
    width = cut.get_text_config().hidden_size * compute.itemsize
    if gradient_checkpointing:
        num_layers = cut.get_text_config().num_hidden_layers
        activations = tokens * width * num_layers + activations // num_layers
    packed = packed_bytes(cut) if quantize is None else None
    memory = {
        "weights": int(
            (weights - sum(sizes) + dense) * compute.itemsize
            + (sum(sizes) - dense) * (quantized_bytes(quantize) if quantize else packed or compute.itemsize)
        ),
        "adapter": trained * 4 + casts,
        "gradients": trained * 4,
        "optimizer": trained * 8,
        "activations": activations,
        "workspace": workspace_bytes(meta, tokens, compute, device),
    }
    result: dict[str, Any] = {
        "memory": memory | {"total": sum(memory.values())}, "expert_bytes_per_token_layer": round(per_token),
        "coverage": coverage, "trainable": trained,
        "flops": {"forward_per_token": forward, "adapter_per_token": adapter, "step": flops},
        "tokens": tokens, "device": device.type, "dtype": str(compute).removeprefix("torch."),
    }  # fmt: skip
    if flops_per_second:
        seconds = flops / flops_per_second
        speed = tokens / seconds
        result["time"] = {"flops_per_second": flops_per_second, "seconds_per_step": seconds, "tokens_per_second": speed}
    return result


def coverage_at(fraction: float, cv: float = 1.0) -> float:
    """Share of assignments that the busiest `fraction` of experts take, where loads are lognormal with this CV."""
    if not 0 < fraction < 1:
        return float(fraction >= 1)
    sigma = math.sqrt(math.log1p(cv * cv))
    quantile = torch.special.ndtri(torch.tensor(1 - fraction, dtype=torch.float64))
    return float(torch.special.ndtr(sigma - quantile))


def sized_config(config: str | Path, layers: int | None = None) -> PreTrainedConfig:
    """A model's config, cut to its first `layers` decoder layers. Per-layer lists are cut with it."""
    whole = copy.deepcopy(model_from_config(config).config)
    text = whole.get_text_config()
    depth = text.num_hidden_layers
    if layers is None:
        return whole
    if not 1 <= layers <= depth:
        raise HotLoraError(f"layers is {layers}: this model has {depth}; give 1 to {depth}.")
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == depth:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return whole


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config without weights. ModelError where no MoE layer is left."""
    with torch.device("meta"), quiet():
        model: PreTrainedModel = auto_class(config).from_config(copy.deepcopy(config))
    moe_layers(model)
    return model


def torch_dtype(name: str, config: PreTrainedConfig, device_type: str = "cuda") -> torch.dtype:
    """float32, bfloat16 or float16; "auto" is as `load_model` has it: the config's own, and float32 on a CPU."""
    if name == "auto":
        return torch.float32 if device_type == "cpu" else own_dtype(config)
    if name not in DTYPES:
        raise HotLoraError(f"dtype is {name!r}: choose one of auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def autocast(device_type: str, dtype: torch.dtype) -> torch.autocast:
    """As `train` has it: in half precision the adapters, which are float32, are computed in the base's dtype."""
    return torch.autocast(device_type, dtype=dtype, enabled=dtype != torch.float32)


def _experts(model: nn.Module) -> list[Any]:
    return [unwrap(model.get_submodule(layer.experts)) for layer in moe_layers(model)]


def _expert_bytes(
    model: PreTrainedModel, lora: HotLoraConfig, coverage: float, dtype: torch.dtype, device: torch.device
) -> float:
    """Bytes a token that one layer's experts keep, by running two of them: one adapted, which gets `coverage` of the
    assignments, and one not. What is kept whatever the tokens is not in it, nor are the layer's inputs."""
    experts, top_k = _experts(model)[0], num_experts_per_tok(model)
    two = _two_experts(experts, dtype, device)
    bound = copy.copy(lora)
    bound._expert_ids = {"two": (0,)}
    layer = HotLoraExperts(two, "default", bound, r=lora.r, lora_alpha=lora.lora_alpha, target_name="two").train()
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


def _other_activations(
    config: PreTrainedConfig, lora: HotLoraConfig, batch_size: int, length: int, dtype: torch.dtype
) -> tuple[int, Mapping[str, float]]:
    """Bytes that all but the routed experts keep, and the counts of parameters: the adapted decoder, run on tensors
    that have shapes only."""
    with torch.device("meta"), quiet():
        base = auto_class(config).from_config(copy.deepcopy(config), dtype=dtype)
        model = get_peft_model(base, lora).train()
    with FakeTensorMode(), quiet():
        _on_cpu(model)
        ids = torch.zeros(batch_size, length, dtype=torch.int64)
        with _without_experts(model), _unpacked(), autocast("cpu", dtype), SavedBytes(model) as saved:
            base.get_decoder()(input_ids=ids, use_cache=False)
        counts = count_parameters(model)
    last = batch_size * length * config.get_text_config().hidden_size * dtype.itemsize  # what the loss keeps
    return saved.total + last, counts


def _on_cpu(model: nn.Module) -> None:
    """From the meta device to tensors that say they are on the CPU, where attention takes its fused kernels."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            new = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(new, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


class _Inputs(torch.autograd.Function):
    """In the place of routed experts: keeps their inputs, and nothing else."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(hidden_TD, top_k_weights)
        return torch.empty_like(hidden_TD)


@contextmanager
def _without_experts(model: nn.Module) -> Iterator[None]:
    modules: list[Any] = [model.get_submodule(layer.experts) for layer in moe_layers(model)]
    for module in modules:
        module.forward = _Inputs.apply
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


def quantized_bytes(bits: int) -> float:
    """Of a weight in `bits` bits, its share of the scales included."""
    return bits / 8 + _SCALES


def workspace_bytes(model: nn.Module, tokens: int, dtype: torch.dtype, device: torch.device) -> int:
    """Short-lived at the peak: the loss's tile of logits, or the gradients of one layer's rows."""
    config = cast(PreTrainedConfig, model.config).get_text_config()
    rows, columns = min(tokens, LOSS_TILE[0]), min(config.vocab_size, LOSS_TILE[1])
    logits = rows * LOSS_TILE[1] * dtype.itemsize  # its buffer has this width whatever the vocabulary
    if device.type == "cpu":
        logits += rows * columns * 4 * _LOSS_COPIES
        logits += columns * config.hidden_size * 4 if dtype != torch.float32 else 0
    experts = _experts(model)[0]
    view = ExpertsView(experts)
    width, expert_width = view.widths
    row = 2 * width + (view.num_parts + 1) * expert_width
    return max(logits, tokens * num_experts_per_tok(model) * row * dtype.itemsize)
