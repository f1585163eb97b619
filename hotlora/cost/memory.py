"""Bytes of a training step, from the sizes of its parts and from how they are stored. Arithmetic alone.

Shape suffixes as in `layer.function`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ..adapter.linears import LINEAR_SCALE_BYTES
from ..adapter.quantized import BLOCK, SCALE_BYTES
from ..base.errors import HotLoraError
from ..hf.forward import LOGITS
from ..layer import gpu
from ..training.activation_offloading import check_activation_offloading

LOSS_TILE = (4096, 32768)  # tokens, vocabulary: TRL makes logits in tiles no larger than this, and never keeps one
_LOSS_COPIES = 3  # float32 copies of the logits that are there at a time, on a CPU
_SCALES, _LINEAR_SCALES = SCALE_BYTES / BLOCK, LINEAR_SCALE_BYTES / BLOCK  # bytes a weight
_ON_THEIR_WAY = 5  # activations that TRL keeps on the card while copies of them are made

OFFLOADS = ("none", "cold", "all")
_FLOAT32_STATE = {
    "adamw_torch": 2, "adamw_torch_fused": 2, "ademamix": 3, "sgd": 0, "adagrad": 1, "rmsprop": 1, "rmsprop_bnb": 1,
    "rmsprop_bnb_32bit": 1, "lion_32bit": 1, "paged_adamw_32bit": 2, "paged_ademamix_32bit": 3, "paged_lion_32bit": 1,
}  # fmt: skip
_BYTE_STATE = {
    "adamw_8bit": 2, "adamw_bnb_8bit": 2, "ademamix_8bit": 3, "lion_8bit": 1, "rmsprop_bnb_8bit": 1,
    "paged_adamw_8bit": 2, "paged_ademamix_8bit": 3, "paged_lion_8bit": 1,
}  # fmt: skip
"""optimizer, by transformers' name -> numbers that it keeps for a weight: in float32, and in bitsandbytes' 8 bits."""
_BYTE_BLOCK, _BYTE_FROM = 256, 4096  # weights with a float32 scale of their own; smaller tensors stay in float32
_PAGED_FROM = 1e5  # weights; the state of smaller tensors stays on the card


@dataclass(frozen=True)
class ExpertLayer:
    """One layer's routed experts: how many weights each of their projections has."""

    num_experts: int
    hot: int
    """Experts that are adapted."""
    up: int
    """Of the projection into them, of all experts."""
    down: int


@dataclass(frozen=True)
class Step:
    """What a training step is made of, however it is stored. Numbers of weights, where nothing else is said."""

    device: str
    dtype: str
    """Of the base, and of what is computed."""
    itemsize: int
    """Bytes of a number in it."""
    tokens: int
    top_k: int
    width: int
    """D"""
    expert_widths: tuple[int, int, int]
    """D, F and P of the routed experts."""
    activation: tuple[float, float, float]
    """As `activations.activation_arrays` has it."""
    has_biases: bool
    """Whether experts have biases."""
    vocabulary: int
    whole_logits: bool
    """Whether the family's logits are not its LM head's output, and so are not made in chunks on a CPU."""
    experts: tuple[ExpertLayer, ...]
    packed: float | None
    """Bytes of a routed expert's weight in a checkpoint that has them in few bits; None: it has them dense."""
    linear: tuple[int, ...]
    """Of each nn.Linear that `quantize_linear` stores in few bits."""
    other: int
    """All that is left."""
    embedding: int
    """Of it the table, where it is no weight of the head."""
    head: int
    blocks: tuple[tuple[int, int], ...]
    """Of each decoder layer: in routed experts, and beside them."""
    trained: tuple[tuple[int, ...], ...]
    """Shapes."""
    frozen: int
    """Numbers of the adapter that do not train."""
    expert_row: float
    """Bytes that a layer's routed experts keep, a token."""
    rest: int
    """Bytes that all else keeps."""
    rest_again: int
    """Of it what several operations keep."""
    rest_backward: int
    """What its backward makes at a time, in one layer."""
    rest_padding: int
    """What it keeps besides where rows have padding, as in all batches of several examples that are not packed."""
    layers: tuple[tuple[int, int], ...]
    """Of each decoder layer: bytes that it keeps, its routed experts' too; and besides where rows have padding."""
    masks: int
    """Bytes of what all layers share, as attention's masks, which gradient checkpointing holds to the end."""
    length: int
    """Tokens of a row: of an example, or of all where they are flattened."""
    flattened: bool
    """Whether all examples are one row, packed, whose attention has a mask over the whole of it: memory and time then
    grow with the square of the batch."""
    coverage: float
    """Share of assignments to adapted experts."""
    forward: Mapping[str, float]
    """FLOPs a token, as `flops.forward_flops` has them."""
    adapter: float
    """The same of the adapter; and of its part on routed experts."""
    expert_adapter: float
    flops: float
    """Of a step without recomputation."""

    @property
    def num_experts(self) -> int:
        """E"""
        return self.experts[0].num_experts

    @property
    def expert_weights(self) -> int:
        return sum(layer.up + layer.down for layer in self.experts)

    @property
    def trainable(self) -> int:
        return sum(map(math.prod, self.trained))

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"

    def of_tokens(self, tokens: int) -> "Step":
        """With batches of so many tokens, in rows of the same length: no way to another batch of flattened ones."""
        factor = tokens / self.tokens
        sizes = {
            name: round(getattr(self, name) * factor)
            for name in ("rest", "rest_again", "rest_backward", "rest_padding", "masks")
        }
        layers = tuple((round(kept * factor), round(padding * factor)) for kept, padding in self.layers)
        return replace(self, tokens=tokens, flops=self.flops * factor, layers=layers, **sizes)

    @property
    def recomputed(self) -> float:
        """FLOPs that gradient checkpointing adds."""
        return self.tokens * (sum(self.forward.values()) - self.forward["head"] + self.adapter)


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How weights, the optimizer's state and activations are stored: options of a run, by their names."""

    quantize: int | None = None
    """Bits of the routed experts; None: as the checkpoint has them; 0: dense."""
    keep_hot: bool = False
    quantize_linear: int | None = None
    offload: str = "none"
    offload_folder: object = None
    """Where it is given, offloaded experts are on disk, also those of a GPU."""
    optim: str = "adamw_torch_fused"
    gradient_checkpointing: bool = False
    activation_offloading: bool = False
    gradient_accumulation_steps: int = 1

    def __post_init__(self) -> None:
        for name in ("quantize", "quantize_linear"):
            if (bits := getattr(self, name)) not in (None, 0, 4, 8):
                raise HotLoraError(f"{name} is {bits}: it must be 4 or 8 bits.")
        if self.offload not in OFFLOADS:
            raise HotLoraError(f"offload is {self.offload!r}: choose one of {', '.join(OFFLOADS)}.")
        state_bytes(self.optim, ())


def memory(step: Step, storage: Storage) -> dict[str, int]:
    """Bytes by kind, and the device's `total`: weights, staging (of offloaded experts, on their way), adapter,
    gradients, optimizer, activations, workspace (what the peak takes beyond these: it is less where gradients come only
    as activations go). Beside the total: `host`, the most that a GPU's run has in RAM, and `disk`, what is read from a
    file that is mapped.
    """
    here, away = expert_bytes(step, storage)
    bits = storage.quantize_linear
    linear = sum(step.linear) * (bits / 8 + _LINEAR_SCALES if bits else step.itemsize)
    stays, leaves = state_bytes(storage.optim, step.trained)
    if step.on_cpu:
        stays, leaves = stays + leaves, 0
    is_on_disk = step.on_cpu or storage.offload_folder is not None
    gradients = step.trainable * 4.0
    moved = activation_bytes(step, storage)
    activations, peak = _peak(step, storage, gradients, moved)
    table = step.embedding * step.itemsize if storage.offload != "none" else 0  # stays in the checkpoint's file
    kinds = {
        "weights": here + linear + step.other * step.itemsize - table,
        "staging": 0 if step.on_cpu else _staging(step, storage),
        "adapter": (step.trainable + step.frozen) * 4,
        "gradients": gradients,
        "optimizer": stays,
        "activations": activations,
        "workspace": max(0.0, peak - activations - gradients),
    }
    found = {kind: round(size) for kind, size in kinds.items()}
    host = leaves + moved + (0 if is_on_disk else away)
    if storage.offload == "cold" and not is_on_disk:
        host = max(host, _while_loading(step, storage))
    return found | {"total": sum(found.values()), "host": round(host), "disk": round(away if is_on_disk else 0)}


def _while_loading(step: Step, storage: Storage) -> float:
    """What is in RAM before it is known which experts are cold: all wait there while the router is profiled, and what
    then stays of a projection is copied before the whole is given back."""
    everything = replace(storage, offload="all", keep_hot=False)
    cold = [_placed(step, storage, layer, n)[1] for layer in step.experts for n in (layer.up, layer.down)]
    return expert_bytes(step, everything)[1] + max(cold)


def expert_bytes(step: Step, storage: Storage) -> tuple[float, float]:
    """Of the routed experts' weights: on the device, and elsewhere."""
    parts = [_placed(step, storage, layer, layer.up + layer.down) for layer in step.experts]
    here, away = (sum(sizes) for sizes in zip(*parts, strict=True))
    return here, away


def transfer_bytes(step: Step, storage: Storage) -> float:
    """Bytes of offloaded experts that come to the device in one batch's forward and backward. Under gradient
    checkpointing a layer's are there for its second forward, and those into the experts again for its backward."""
    _, away = expert_bytes(step, storage)
    ups = sum(layer.up for layer in step.experts) / step.expert_weights
    return away * (2 + (ups if storage.gradient_checkpointing else 0))


def activation_bytes(step: Step, storage: Storage) -> float:
    """What `activation_offloading` has in RAM alone at the end of a forward: under gradient checkpointing all but the
    last layers' inputs; else all but the last layer's, and but for what several operations keep: TRL copies it for the
    first, and leaves it on the card for the others."""
    if not storage.activation_offloading:
        return 0.0
    check_activation_offloading(storage.activation_offloading, step.device)
    layers = len(step.blocks)
    if storage.gradient_checkpointing:
        return _inputs(step) * (1 - min(layers, _ON_THEIR_WAY) / layers)
    return (_kept(step, False) - step.rest_again) * (1 - 1 / layers)


def _inputs(step: Step) -> float:
    """Of all decoder layers."""
    return step.tokens * step.width * step.itemsize * len(step.blocks)


def _is_padded(step: Step) -> bool:
    """One row has no padding."""
    return step.rest_padding > 0 and step.tokens > step.length


def _kept(step: Step, recomputes: bool) -> float:
    """Of a forward's activations, what is there for the backward."""
    if recomputes:
        mask = step.tokens * step.length if _is_padded(step) else 0  # of bools
        return _inputs(step) + step.masks + mask
    padding = step.rest_padding if _is_padded(step) else 0
    return step.rest + padding + step.expert_row * step.tokens * len(step.experts)


def quantized_bytes(bits: int) -> float:
    """Of an expert's weight in `bits` bits, its share of the scales included."""
    return bits / 8 + _SCALES


def state_bytes(optim: str, trained: Iterable[tuple[int, ...]]) -> tuple[float, float]:
    """What an optimizer keeps for parameters of these shapes: on the card, and in memory that CUDA moves to RAM when
    the card's is needed.

    HotLoraError: one that is not known here.
    """
    stays = leaves = 0.0
    for shape in trained:
        weights = math.prod(shape)
        size = 4.0 * weights * (_FLOAT32_STATE | _BYTE_STATE).get(optim, 0)
        scales = 0.0
        if optim in _BYTE_STATE and weights >= _BYTE_FROM:
            size /= 4
            scales = 4.0 * _BYTE_STATE[optim] * math.ceil(weights / _BYTE_BLOCK)
        if optim == "adafactor":  # a mean of each row and of each column
            size = 4.0 * (weights / shape[-1] + weights / shape[-2] if len(shape) > 1 else weights)
        is_paged = optim.startswith("paged_") and weights >= _PAGED_FROM
        stays, leaves = stays + scales + (0 if is_paged else size), leaves + (size if is_paged else 0)
    if optim not in (known := (*_FLOAT32_STATE, *_BYTE_STATE, "adafactor")):
        raise HotLoraError(f"the estimate does not know the optimizer {optim}: it knows {', '.join(known)}.")
    return stays, leaves


def few_bits(step: Step, storage: Storage) -> float | None:
    """Bytes of a routed expert's weight; None: it is dense."""
    return quantized_bytes(storage.quantize) if storage.quantize else step.packed if storage.quantize is None else None


def _placed(step: Step, storage: Storage, layer: ExpertLayer, weights: int) -> tuple[float, float]:
    """Bytes of so many of a layer's expert weights: on the device, and elsewhere."""
    share = layer.hot / layer.num_experts
    stored = few_bits(step, storage) or step.itemsize
    is_kept = storage.keep_hot and bool(storage.quantize)
    hot, cold = share * weights * (step.itemsize if is_kept else stored), (1 - share) * weights * stored
    if storage.offload == "none":
        return hot + cold, 0.0
    if is_kept or (storage.offload == "cold" and not step.on_cpu):
        return hot, cold
    return 0.0, hot + cold


def _staging(step: Step, storage: Storage) -> float:
    """Two slots for the largest projection: of what is multiplied, and of what comes next."""
    return 2 * max(_placed(step, storage, layer, max(layer.up, layer.down))[1] for layer in step.experts)


def _peak(step: Step, storage: Storage, gradients: float, moved: float) -> tuple[float, float]:
    """What is kept from forward to backward; and what the peak takes besides, with the gradients that are there.

    It is the highest of three moments: the loss, which has a tile of logits; the last layer's backward, where its rows
    of experts have gradients, or its attention (with whole scores, where a family has no fused kernel, or with what is
    made of a mask of bools); and the first layer's, when all gradients of what trains are there and the activations are
    gone.
    """
    layers, adds_up = len(step.blocks), storage.gradient_accumulation_steps > 1
    one = max(kept + padding * _is_padded(step) for kept, padding in step.layers)
    in_loss = _kept(step, storage.gradient_checkpointing) - moved
    kept = in_loss + one * storage.gradient_checkpointing
    logits, rows = _logits(step), max(_rows(step, storage), step.rest_backward, step.masks)
    moments = (
        in_loss + logits + gradients * adds_up,
        kept + rows + (gradients if adds_up else gradients / layers),
        one + rows + gradients,
    )
    return kept, max(moments)


def _logits(step: Step) -> float:
    if step.on_cpu:
        logits = step.tokens * step.vocabulary
        return (logits if step.whole_logits else min(logits, LOGITS)) * 4 * _LOSS_COPIES
    return min(step.tokens, LOSS_TILE[0]) * LOSS_TILE[1] * step.itemsize  # of this width whatever the vocabulary


def _rows(step: Step, storage: Storage) -> float:
    """The most that one layer's experts make at a time, beyond what they keep: in `layer.function` as on a GPU."""
    width, expert_width, parts = step.expert_widths
    rows, size = step.tokens * step.top_k, step.itemsize
    d, f, wide = rows * width * size, rows * expert_width * size, max(4 / size, 1)
    made_forward, kept, made_backward = step.activation
    # The experts' outputs where they come by token, and their products with float32 routing weights.
    forward = max(made_forward * f, d + min(d * wide, gpu.BLOCK_BYTES))
    # Their gradient, those of the activation, the activation and what it keeps, and a product for the routing weights'.
    of_down = d + (1 + kept + wide) * f
    if step.has_biases:  # of the rows' experts, in blocks
        forward = max(forward, f + d + min(d, gpu.BLOCK_BYTES))
        of_down = max(of_down, d + (1 + kept) * f + 2 * min(d, gpu.BLOCK_BYTES))
    of_activation = (1 + made_backward) * f  # and its gradient
    of_up = 2 * d + parts * f  # the experts' inputs and their gradient, and that of gate and up
    made = [_made_dense(step, storage, layer, n) for layer in step.experts for n in (layer.up, layer.down)]
    linear = max(step.linear, default=0) * step.itemsize if storage.quantize_linear else 0.0
    with_dense = d + (1 + kept) * f + max(made)  # a product with stored weights, when the others are not there
    return max(forward, of_down, of_activation, of_up, with_dense, linear)


def _made_dense(step: Step, storage: Storage, layer: ExpertLayer, weights: int) -> float:
    """What is made of a projection's stored weights for a product."""
    stored = few_bits(step, storage)
    if step.on_cpu:  # one expert after another
        return weights / layer.num_experts * step.itemsize if stored else 0.0
    share = layer.hot / layer.num_experts
    keeps = storage.keep_hot and bool(storage.quantize) and share > 0
    made = 0.0
    if stored:  # in parts, which are then put together
        expert = weights / layer.num_experts * step.itemsize
        made = 2 * min(weights * step.itemsize, max(expert, gpu.BLOCK_BYTES))
    if storage.offload == "cold" and not keeps and 0 < share < 1:  # those that came, and those that were there
        made += weights * (stored or step.itemsize)
    return made
