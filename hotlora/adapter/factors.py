"""Two ways to hold a factor other than as a parameter: A frozen, from a seed; and of B only some entries.

LoRI (arXiv 2504.07448, section 3) freezes A and trains a tenth of B. Neither is kept in full here: an A that its seed
gives back is not saved, and of B only the kept entries are parameters, with gradients and optimizer state of their own.
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import HotLoraError


class SeededFactor(nn.Module):
    """A factor that does not train and is not saved: its seed and its name give it back.

    Its values are float32 whatever the model is cast to, so that they stay those that the seed gives.
    """

    values: Tensor

    def __init__(self, shape: torch.Size | tuple[int, ...], seed: int, name: str, device: torch.device) -> None:
        super().__init__()
        self.shape, self.seed, self.name = tuple(shape), seed, name
        self._trained: tuple[Any, str] | None = None
        self.register_buffer("values", self._drawn(device), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The factor in the dtype of the one that it is multiplied with."""
        if self._trained is None:
            return self.values
        held, key = self._trained
        return self.values.to(factor_dtype(held[key]))

    def go_with(self, held: Any, key: str) -> None:
        """Names the factor that trains beside this one: it is what `held` has under `key`."""
        self._trained = held, key

    def restore(self, device: torch.device) -> None:
        """Draws the factor again where loading has left it without values."""
        if self.values.device.type == "meta":
            self.values = self._drawn(device)

    def digest(self) -> str:
        """Hex SHA-256 of its name, its shape and its values."""
        found = hashlib.sha256(f"{self.name}:{list(self.shape)}:".encode())
        found.update(self.values.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return found.hexdigest()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)

    def _apply(self, fn: Any, recurse: bool = True) -> "SeededFactor":
        """What `.to()` and its like do, but for the dtype; where they make values of none, those are drawn."""
        values = self.values
        super()._apply(fn, recurse)
        device = self.values.device
        self.values = self._drawn(device) if values.device.type == "meta" else values.to(device)
        return self

    def _drawn(self, device: torch.device) -> Tensor:
        if device.type == "meta":
            return torch.empty(self.shape, dtype=torch.float32, device=device)
        digest = hashlib.sha256(f"{self.seed}:{self.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return kaiming_uniform(self.shape, generator).to(device)


class SparseFactor(nn.Module):
    """A factor of which only the entries that a mask keeps exist; the others are zero.

    `values [1, kept]` are the parameters. Where they stand is one bit an entry (`kept`, packed by eight): half of what
    16-bit indices would take at a tenth. Both are saved.
    """

    kept: Tensor

    def __init__(
        self, shape: torch.Size | tuple[int, ...], num_kept: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.shape, self._is_checked = tuple(shape), False
        self.values = nn.Parameter(torch.zeros(1, num_kept, device=device, dtype=dtype))
        bits = torch.zeros(1, -(-math.prod(self.shape) // 8), dtype=torch.uint8, device=device)
        self.register_buffer("kept", bits)

    @property
    def weight(self) -> Tensor:
        """The whole factor, made anew; gradients reach the kept entries alone.

        Low-rank products take it dense: a tenth of the entries, scattered, is too many for a sparse product to pay.

        HotLoraError: where the entries stand was not loaded with the values.
        """
        if not self._is_checked and self.kept.device.type != "meta":  # once, for the device is waited for
            if int(unpack(self.kept, self.shape).sum()) != self.values.shape[1]:
                raise HotLoraError(
                    "a sparse factor was loaded without its mask, as transformers' own load_adapter does with older "
                    "adapters: use hotlora.load_adapter or peft.PeftModel.from_pretrained; saved again, it loads there "
                    "as well."
                )
            self._is_checked = True
        return _Scatter.apply(self.values, self.kept, self.shape)

    @torch.no_grad()
    def keep(self, mask: Tensor) -> None:
        """Sets which entries exist: bool, of the factor's shape, with as many entries as there are values."""
        self.kept.copy_(pack(mask))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class _Scatter(torch.autograd.Function):
    """Keeps nothing for backward but what the factor holds anyway."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, kept: Tensor, shape: tuple[int, ...]) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(kept)
        ctx.num_kept = values.shape[1]
        dense = values.new_zeros(math.prod(shape))
        return dense.index_copy_(0, _places(kept, ctx.num_kept), values[0]).view(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        return grad.flatten().index_select(0, _places(kept, ctx.num_kept)).unsqueeze(0), None, None


def factor_values(held: Any) -> Tensor:
    """The factor as a tensor, whichever way it is held."""
    return held if isinstance(held, Tensor) else held.weight


def factor_dtype(held: Any) -> torch.dtype:
    """The dtype of `factor_values`, without making them."""
    return held.values.dtype if isinstance(held, SparseFactor) else factor_values(held).dtype


def take_values(held: Any, source: Any) -> None:
    """Gives one adapter's entry the values of another's, in their dtype: PEFT casts a new adapter from the base's dtype
    to float32 after it is put on, and values that are copied before would be rounded."""
    for ours, theirs in zip(_tensors(held), _tensors(source), strict=True):
        ours.data = theirs.detach().clone()


def _tensors(held: Any) -> list[Tensor]:
    """The parameters and saved buffers of an entry."""
    return [held] if isinstance(held, Tensor) else list(held.state_dict(keep_vars=True).values())


def new_factor(shape: tuple[int, ...], device: torch.device, is_zero: bool = False) -> nn.Parameter:
    """kaiming_uniform_(a=sqrt(5)) of every matrix by itself, as PEFT's Linear.

    Drawn on the CPU, so that one seed gives one adapter whatever the device; not drawn at all for a model without
    weights.
    """
    if is_zero or device.type == "meta":
        on = "meta" if device.type == "meta" else "cpu"
        return nn.Parameter(torch.zeros(shape, device=on, dtype=torch.float32))
    return nn.Parameter(kaiming_uniform(shape))


def kaiming_uniform(shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    """What kaiming_uniform_(a=sqrt(5)) draws: the bound is 1/sqrt(in_features). In float32 and on the CPU, whatever
    torch's defaults are: one seed gives one factor."""
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)


def pack(mask: Tensor) -> Tensor:
    """uint8 `[1, ceil(n / 8)]`: the n entries of a bool mask, the first in the lowest bit."""
    flat = mask.flatten().to(torch.uint8)
    flat = nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (flat << _bits(flat.device)).sum(dim=1, dtype=torch.uint8).unsqueeze(0)


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The bool mask that `pack` was given."""
    bits = (packed.view(-1, 1) >> _bits(packed.device)) & 1
    return bits.flatten()[: math.prod(shape)].view(shape).bool()


def _places(packed: Tensor, number: int) -> Tensor:
    """int64 `[number]`: the kept entries' places, ascending. The number is known, so no device is waited for."""
    bits = ((packed.view(-1, 1) >> _bits(packed.device)) & 1).flatten()
    return torch.nonzero_static(bits, size=number).squeeze(1)


def _bits(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


class FactorDict(nn.ParameterDict):
    """Adapter -> what holds its factor: a parameter, or a module with parameters.

    `items` gives the parameters themselves, under their adapter: PEFT asks each for its `requires_grad` and `device`
    (get_layer_status, and with it disable_adapter), which a module has not.
    """

    def items(self) -> Iterator[tuple[str, Any]]:  # type: ignore[override]
        for name in self.keys():
            held = self[name]
            for parameter in [held] if isinstance(held, Tensor) else held.parameters():
                yield name, parameter


@dataclass(frozen=True)
class Slot:
    """Where one factor of an adapter is held, so that it can be held in another way."""

    name: str
    """As it is saved: the module's path, and its own name."""
    is_A: bool
    held: Any
    """The ParameterDict or ModuleDict that holds it under `key`."""
    key: str
    parts: int = 1
    """2 where gate and up lie one after the other."""

    @property
    def values(self) -> Tensor:
        """The factor's values, whichever way it is held."""
        return factor_values(self.held[self.key])

    def hold(self, factor: nn.Module) -> None:
        """Holds `factor` in place of what is held now."""
        del self.held[self.key]  # torch puts no module where a parameter is
        self.held[self.key] = factor


def low_rank_products(A_gate_up: Tensor, B_gate_up: Tensor, A_down: Tensor, B_down: Tensor) -> tuple[Tensor, Tensor]:
    """B @ A of gate and up `[..., P*F, D]`, and of down `[..., D, F]`, in float32 at least: of an expert, or many."""
    A_gate_up, B_gate_up, A_down, B_down = map(at_least_float32, (A_gate_up, B_gate_up, A_down, B_down))
    parts = A_gate_up.shape[-2] // A_down.shape[-2]
    pairs = zip(B_gate_up.chunk(parts, dim=-2), A_gate_up.chunk(parts, dim=-2), strict=True)
    with in_their_own_dtype(A_down):
        return torch.cat([B @ A for B, A in pairs], dim=-2), B_down @ A_down


def in_their_own_dtype(x: Tensor) -> AbstractContextManager[Any]:
    """Products inside are in the dtype of their factors: autocast would round those of float32 in training, and there
    alone."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
