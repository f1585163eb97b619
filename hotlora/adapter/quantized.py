"""Frozen experts in 8 or 4 bits: what holds them, and how one of them is made dense.

The arithmetic is bitsandbytes': NF4 (QLoRA s3) for 4 bits, 255 evenly spaced levels for 8 bits, in blocks of 64
weights with a scale each. Scales are rounded to bfloat16, which moves a weight by 0.2% at most. Shape suffixes: E
experts.
"""

import ctypes
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..base.errors import HotLoraError
from ..hf.coded import Coded

BLOCK = 64
"""Weights with a scale of their own."""
SCALE_BYTES = 2
"""Of one, a bfloat16."""
# Kernels count in int32; so far from the limit, what is made for them stays small too.
_MOST_AT_ONCE = 2**30
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What can be quantized, and come out again."""
_NAMES = dict(zip(FLOATS, ("fp32", "bf16", "fp16"), strict=True))


class QuantizedExperts(nn.Module):
    """One frozen 3-D parameter, quantized expert by expert. It has buffers only: nothing of it trains.

    `shape`, `dtype` and `device` are those of what it stands for. `.to(dtype)` changes what `dequantize` returns and
    leaves the stored values alone.
    """

    packed: Tensor
    """uint8 `[E - n, bytes of an expert]`."""
    scale_bits: Tensor
    """int16 `[E - n, blocks of an expert]`: bfloat16 scales by their bits, which `.to(dtype)` leaves as they are."""
    kept: Tensor
    """`[n, ., .]`: the weights of the experts that are left as they were; n may be 0. It carries the dtype."""
    _kept_index: Tensor
    _cold_index: Tensor
    _place_index: Tensor
    """Of each expert, where it is: in `packed`, or after all that is there in `kept`."""
    stored = ("packed", "scale_bits")
    """What is large, a row for each of `stored_ids`."""
    is_dense = False

    def __init__(
        self, packed: Tensor, scale_bits: Tensor, shape: torch.Size, bits: int, kept: Tensor, kept_ids: Sequence[int]
    ) -> None:
        super().__init__()
        self.shape, self.bits, self.kept_ids = shape, bits, tuple(kept_ids)
        self.stored_ids = tuple(expert for expert in range(shape[0]) if expert not in self.kept_ids)
        self.register_buffer("packed", packed)
        self.register_buffer("scale_bits", scale_bits)
        self.register_buffer("kept", kept)
        ids_by_place = (*self.stored_ids, *self.kept_ids)
        place_of = {expert: place for place, expert in enumerate(ids_by_place)}
        places = [place_of[expert] for expert in range(shape[0])]
        for name, ids in (
            ("_kept_index", self.kept_ids), ("_cold_index", self.stored_ids), ("_place_index", places)
        ):  # fmt: skip
            index = torch.tensor(ids, dtype=torch.int64, device=packed.device)
            self.register_buffer(name, index, persistent=False)

    @classmethod
    @torch.no_grad()
    def from_weight(cls, weight: Tensor | Sequence[Tensor], bits: int, keep: Sequence[int] = ()) -> "QuantizedExperts":
        """Quantizes `weight` `[E, ., .]` on its device, one expert at a time: little more memory than the result.

        weight: also what has an expert's matrix in each of its places, made when it is asked for.
        keep: experts that are left as they are, ascending; not all of them.
        """
        cold = [expert for expert in range(len(weight)) if expert not in keep]
        packed = scales = torch.empty(0)
        for place, expert in enumerate(cold):
            its, absmax = _quantize(weight[expert].detach().reshape(-1), bits)
            if place == 0:
                packed, scales = (one.new_empty(len(cold), len(one)) for one in (its, absmax))
            packed[place], scales[place] = its, absmax
        shape = torch.Size((len(weight), *weight[cold[0]].shape))
        kept = [weight[expert].detach() for expert in keep]
        dense = torch.stack(kept) if kept else weight[cold[0]].new_empty(0, *shape[1:])
        return cls(packed, scales.view(torch.int16), shape, bits, dense, keep)

    @property
    def dtype(self) -> torch.dtype:
        return self.kept.dtype

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.packed.nbytes + self.scale_bits.nbytes + self.kept.nbytes

    def numel(self) -> int:
        """How many weights it stands for."""
        return self.shape.numel()

    @torch.no_grad()
    def dequantize(self) -> Tensor:
        """Dense weights of all experts, `shape` in `dtype`."""
        cold = self._dense(slice(None))
        if not self.kept_ids:
            return cold
        dense = cold.new_empty(self.shape)
        return dense.index_copy_(0, self._cold_index, cold).index_copy_(0, self._kept_index, self.kept)

    is_transposed = False
    """Matrices are held as the parameter has them."""

    @torch.no_grad()
    def some(self, start: int, stop: int) -> Tensor:
        """Dense weights of the experts from `start` to `stop`, `[stop - start, ., .]` in `dtype`."""
        cold = [place for place, expert in enumerate(self.stored_ids) if start <= expert < stop]
        kept = [place for place, expert in enumerate(self.kept_ids) if start <= expert < stop]
        if not kept:
            return self._dense(slice(cold[0], cold[-1] + 1))
        dense = self.kept.new_empty(stop - start, *self.shape[1:])
        dense.index_copy_(0, self._kept_index[kept[0] : kept[-1] + 1] - start, self.kept[kept[0] : kept[-1] + 1])
        if cold:
            some = slice(cold[0], cold[-1] + 1)
            dense.index_copy_(0, self._cold_index[some] - start, self._dense(some))
        return dense

    @torch.no_grad()
    def chosen(self, ids: Tensor) -> Tensor:
        """Dense weights of the experts in `ids` (int64, on the device), `[len(ids), ., .]` in `dtype`."""
        place, num_cold = self._place_index[ids], len(self.stored_ids)
        if not self.kept_ids:
            return self._dense(place)
        cold, kept = self._dense(place.clamp(max=num_cold - 1)), self.kept[(place - num_cold).clamp(min=0)]
        return torch.where((place < num_cold).view(-1, 1, 1), cold, kept, out=cold)

    def coded(self) -> Coded:
        """As a kernel decodes it."""
        _, rows, columns = self.shape
        places = torch.full((2, self.shape[0]), -1, dtype=torch.int32, device=self.device)
        for place, index in zip(places, (self._cold_index, self._kept_index), strict=True):
            place[index] = torch.arange(len(index), dtype=torch.int32, device=self.device)
        return Coded(
            packed=self.packed, scales=self.scale_bits, table=_table(self.bits, self.device), bits=self.bits, rows=rows,
            columns=columns, block=(0, BLOCK), is_high_first=True, kept=self.kept, place_E=places[0],
            place_in_kept_E=places[1],
        )  # fmt: skip

    @torch.no_grad()
    def expert(self, number: int) -> Tensor:
        """Dense weights of one expert, `shape[1:]` in `dtype`. On a CPU they stand until this thread's next call."""
        if number in self.kept_ids:
            return self.kept[self.kept_ids.index(number)]
        place = self.stored_ids.index(number)
        if self.device.type == "cpu" and (decode := _decoder(self.bits, self.dtype)):
            packed, scales = self.packed[place], _floats(self.scale_bits[place])
            dense = _scratch(len(scales) * BLOCK, self.dtype)
            decode(packed, scales, dense)
            return dense[: self.shape[1:].numel()].view(self.shape[1:])
        return self._dense(slice(place, place + 1))[0]

    def _dense(self, places: slice | Tensor) -> Tensor:
        """Of the quantized experts that lie there."""
        packed, scales = self.packed[places], _floats(self.scale_bits[places])
        # bitsandbytes has no float64.
        dtype = self.dtype if self.dtype in FLOATS else torch.float32
        per_expert = scales.shape[1] * BLOCK
        step = max(1, _MOST_AT_ONCE // per_expert)
        parts = [
            _dequantize(p, s, self.bits, dtype) for p, s in zip(packed.split(step), scales.split(step), strict=True)
        ]
        dense = parts[0] if len(parts) == 1 else torch.cat(parts)
        return dense[:, : self.shape[1:].numel()].reshape(-1, *self.shape[1:]).to(self.dtype)

    def extra_repr(self) -> str:
        kept = f", kept={self.kept_ids}" if self.kept_ids else ""
        return f"{tuple(self.shape)}, bits={self.bits}, dtype={self.dtype}{kept}"


@functools.cache
def bitsandbytes_functional() -> Any:
    """bitsandbytes' functions. HotLoraError: it cannot be imported."""
    try:
        import bitsandbytes.functional as bnb
    except ImportError as error:
        raise HotLoraError(
            f"quantized experts need bitsandbytes, which cannot be imported ({error}). "
            "Install it: pip install hotlora[quantize]"
        ) from error
    return bnb


_SCRATCH = threading.local()


def _scratch(numel: int, dtype: torch.dtype) -> Tensor:
    """The same memory at each call of a thread. One expert after the other in memory of its own is not given back as
    it should be: glibc puts what oneDNN keeps of each new shape between them, and a step took 2 GB more at OLMoE's
    size."""
    if getattr(_SCRATCH, "bytes", None) is None or _SCRATCH.bytes.numel() < numel * dtype.itemsize:
        with torch.inference_mode(False):
            _SCRATCH.bytes = torch.empty(numel * dtype.itemsize, dtype=torch.uint8)
    dense: Tensor = _SCRATCH.bytes[: numel * dtype.itemsize].view(dtype)
    return dense


@functools.cache
def _decoder(bits: int, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], None] | None:
    """Writes what `packed` and `scales` stand for into a tensor that is there, which bitsandbytes' own operations do
    not do on a CPU. None: its library has none for this dtype."""
    try:
        from bitsandbytes.cextension import lib

        name = f"cdequantize_blockwise_cpu_{'nf4_' if bits == 4 else ''}{_NAMES[dtype]}"
        native = getattr(lib._lib, name)
    except (ImportError, AttributeError, KeyError):
        return None
    block, levels = ctypes.c_longlong(BLOCK), _levels(torch.device("cpu"))

    def decode(packed: Tensor, scales: Tensor, dense: Tensor) -> None:
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (packed, scales, dense)]
        number = ctypes.c_longlong(dense.numel())
        if bits == 4:  # as one row: a block must not run over a row's end
            native(*pointers, block, ctypes.c_longlong(1), number)
        else:
            native(ctypes.c_void_p(levels.data_ptr()), *pointers, block, number)

    return decode


@functools.cache
def _levels(device: torch.device) -> Tensor:
    """Of 8 bits, float32 `[256]`. On weights their error is 0.6 of that of bitsandbytes' own dynamic levels."""
    with torch.inference_mode(False):
        levels: Tensor = bitsandbytes_functional().create_linear_map(signed=True, total_bits=8)
        return levels.to(device)


@functools.cache
def _table(bits: int, device: torch.device) -> Tensor:
    """float32: what each code of 4 or 8 bits stands for."""
    if bits == 8:
        return _levels(device).float()
    with torch.inference_mode(False):
        levels: Tensor = bitsandbytes_functional().get_4bit_type("nf4", device="cpu")
        return levels.float().to(device)


def _floats(scale_bits: Tensor) -> Tensor:
    """float32, as bitsandbytes takes scales."""
    return scale_bits.view(torch.bfloat16).float()


def _quantize(flat: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """uint8 `[bytes]` and bfloat16 `[blocks]` of one expert, filled up with zeros to whole blocks."""
    flat = nn.functional.pad(flat, (0, -flat.numel() % BLOCK))
    if bits == 4:
        packed, state = bitsandbytes_functional().quantize_4bit(flat, blocksize=BLOCK, quant_type="nf4")
    else:
        packed, state = bitsandbytes_functional().quantize_blockwise(flat, code=_levels(flat.device), blocksize=BLOCK)
    most = torch.finfo(flat.dtype).max * (1 - 2**-8)  # rounded up, the largest weight of all would overflow
    return packed.view(-1), state.absmax.clamp(max=most).to(torch.bfloat16)


def _dequantize(packed: Tensor, scales: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """`[n, weights of an expert]`, the filling included.

    An expert is a row of whole blocks: bitsandbytes' kernel for the CPU goes row by row, and where a block of the
    shape that it is given runs over the end of a row, its numbers are wrong (seen in 0.50.2).
    """
    bnb = bitsandbytes_functional()
    absmax = scales.reshape(-1)
    if bits == 8:
        state = bnb.QuantState(absmax, code=_levels(packed.device), blocksize=BLOCK, dtype=dtype)
        return cast(Tensor, bnb.dequantize_blockwise(packed, state))
    shape = torch.Size((packed.shape[0], 2 * packed.shape[1]))
    state = bnb.QuantState(absmax, shape=shape, blocksize=BLOCK, quant_type="nf4", dtype=dtype)
    return cast(Tensor, bnb.dequantize_4bit(packed.reshape(-1, 1), state))
