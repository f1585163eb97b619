"""Frozen experts as a checkpoint ships them: blocks of 4- or 8-bit floats that share a scale, not unpacked as a whole.

MXFP4 (OCP Microscaling Formats 1.0, as gpt-oss ships it): E2M1 numbers, two to a byte, the even column in the low half;
32 along a row share a power of two (E8M0: its exponent in a byte, with a bias of 127). Block FP8 (DeepSeek-V3's
`weight_scale_inv`): E4M3 numbers, of which a rectangle, 128 x 128 by default, shares a float. A weight is its number
times its scale in float32, rounded to the model's dtype once: as transformers dequantizes it.

Shape suffixes: E experts, R rows of blocks, C columns of blocks.
"""

import functools
import math

import torch
from torch import Tensor, nn

from ..hf.coded import Coded

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
NAMES = {4: "MXFP4", 8: "FP8"}
"""What the formats are called, by bits."""
_MOST_AT_ONCE = 2**26
"""Weights that are decoded in one go, but one expert at least: what is made on the way is a few times as large."""


class PackedExperts(nn.Module):
    """One frozen 3-D parameter, as `quantized.QuantizedExperts` holds one. It has buffers only: nothing of it trains.

    `shape`, `dtype` and `device` are those of what it stands for. `.to(dtype)` changes what `dequantize` returns and
    leaves the stored values alone. A checkpoint's bytes that are mapped from its file stay mapped.
    """

    packed: Tensor
    """uint8 `[E, rows, bytes of a row]`."""
    scales: Tensor
    """`[E, R, C]`: uint8, exponents of two; or int32, floats by their bits, which `.to(bfloat16)` does not round."""
    like: Tensor
    """Empty; it carries the dtype."""
    stored = ("packed", "scales")
    """What is large, a row for each of `stored_ids`."""
    is_dense = False
    kept_ids: tuple[int, ...] = ()
    """No expert is in anything else."""
    is_transposed: bool
    """Whether matrices are held the other way round than the parameter has them."""

    def __init__(self, packed: Tensor, scales: Tensor, bits: int, dtype: torch.dtype, is_transposed: bool) -> None:
        """packed, scales: `[E, rows, .]` and `[E, R, C]`, which divides rows and columns: `whole_blocks`.
        is_transposed: the parameter is `[E, columns, rows]`."""
        super().__init__()
        rows, columns = packed.shape[1], packed.shape[2] * 8 // bits
        self.bits, self.is_transposed, self.stored_ids = bits, is_transposed, tuple(range(len(packed)))
        self.shape = torch.Size((len(packed), *((columns, rows) if is_transposed else (rows, columns))))
        self._blocks = (scales.shape[1], rows // scales.shape[1], scales.shape[2], columns // scales.shape[2])
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=packed.device), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.packed.nbytes + self.scales.nbytes

    def numel(self) -> int:
        """How many weights it stands for."""
        return self.shape.numel()

    @torch.no_grad()
    def dequantize(self) -> Tensor:
        """Dense weights of all experts, `shape` in `dtype`."""
        return self.some(0, len(self.packed))

    @torch.no_grad()
    def expert(self, number: int) -> Tensor:
        """Dense weights of one expert, `shape[1:]` in `dtype`."""
        return self.some(number, number + 1)[0]

    @torch.no_grad()
    def some(self, start: int, stop: int) -> Tensor:
        """Dense weights of the experts from `start` to `stop`, `[stop - start, ., .]` in `dtype`."""
        return self._dense(self.packed[start:stop], self.scales[start:stop])

    @torch.no_grad()
    def chosen(self, ids: Tensor) -> Tensor:
        """Dense weights of the experts in `ids` (int64, on the device), `[len(ids), ., .]` in `dtype`."""
        return self._dense(self.packed[ids], self.scales[ids])

    def _dense(self, packed: Tensor, scales: Tensor) -> Tensor:
        step = max(1, _MOST_AT_ONCE // self.shape[1:].numel())
        parts = [self._decoded(*both) for both in zip(packed.split(step), scales.split(step), strict=True)]
        dense = parts[0] if len(parts) == 1 else torch.cat(parts)
        return dense.transpose(1, 2) if self.is_transposed else dense

    def _decoded(self, packed: Tensor, scales: Tensor) -> Tensor:
        """`[n, rows, columns]`"""
        scales = scale_values(scales)
        # A number of two bits times a power of two is exact in bfloat16, too, whose exponents are float32's.
        is_exact = self.bits == 4 and self.scales.dtype == torch.uint8 and self.dtype == torch.bfloat16
        values = decoded(packed, self.bits, torch.bfloat16 if is_exact else torch.float32)
        values.unflatten(2, self._blocks[2:]).unflatten(1, self._blocks[:2]).mul_(
            scales.to(values.dtype)[:, :, None, :, None]
        )
        return values.to(self.dtype)

    def coded(self) -> Coded:
        """As a kernel decodes it, `[O, I]` or transposed as it is held."""
        num_experts = len(self.packed)
        rows, columns = self.packed.shape[1], self.packed.shape[2] * 8 // self.bits
        numbers = torch.arange(2**self.bits, dtype=torch.uint8, device=self.device)
        return Coded(
            packed=self.packed.flatten(1), scales=self.scales.flatten(1),
            table=decoded(numbers, self.bits, torch.float32).view(len(numbers), -1)[:, 0].contiguous(),
            bits=self.bits, rows=rows, columns=columns, block=(self._blocks[1], self._blocks[3]), is_high_first=False,
            kept=torch.empty(0, rows, columns, dtype=self.dtype, device=self.device),
            place_E=torch.arange(num_experts, dtype=torch.int32, device=self.device),
            place_in_kept_E=torch.full((num_experts,), -1, dtype=torch.int32, device=self.device),
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {NAMES[self.bits]}, dtype={self.dtype}"


def decoded(packed: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The numbers in `packed` (uint8), without their scales; in 4 bits the last dimension is twice as long."""
    table, codes = _table(bits, dtype, packed.device), packed.reshape(-1)
    found = table.new_empty(len(codes))
    # On a CPU a piece of indices that stays in its cache: pages for all of them take longer than the rest.
    step = 2**18 if packed.device.type == "cpu" else max(1, len(codes))
    for some, place in zip(codes.split(step), found.split(step), strict=True):
        torch.index_select(table, 0, some.int(), out=place)
    return found.view(dtype).view(*packed.shape[:-1], -1)


def scale_values(scales: Tensor) -> Tensor:
    """float32: what is held as exponents (uint8) or bits (int32)."""
    if scales.dtype == torch.int32:
        return scales.view(torch.float32)
    # An exponent's bits of a float32 are the byte; 2^-127 has none.
    return torch.where(scales == 0, 1 << 22, scales.int() << 23).to(torch.int32).view(torch.float32)


def held_scales(scales: Tensor) -> Tensor:
    """As `PackedExperts` holds what a checkpoint has: E8M0, its bytes, or a float of any width."""
    if scales.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return scales.view(torch.uint8)
    return scales.float().view(torch.int32)


def whole_blocks(scales: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """`[..., R, C]`: scales for blocks that divide a weight of this `shape`.

    A checkpoint's last block ends with the weight: of 192 rows in blocks of 128 it has 64. Then there are smaller
    blocks here, of which several have the same scale. Blocks of another size than `block` divide the weight.

    ValueError: there are not as many scales as blocks.
    """
    if scales.numel() == 1:
        return scales.reshape(1, 1)
    for dim, size, step in zip((-2, -1), shape, block, strict=True):
        if scales.shape[dim] == -(-size // step):
            if (common := math.gcd(size, step)) < min(step, size):
                scales = scales.repeat_interleave(step // common, dim).narrow(dim, 0, size // common)
        elif size % scales.shape[dim]:
            raise ValueError(f"{tuple(scales.shape)} scales for weights of {shape} in blocks of {block}.")
    return scales


@functools.cache
def _table(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[256]`: what each byte says, as an integer as wide as its numbers are together."""
    with torch.inference_mode(False):
        every = torch.arange(256, dtype=torch.uint8)
        if bits == 8:
            numbers = every.view(torch.float8_e4m3fn).to(dtype)
        else:
            numbers = torch.tensor(_E2M1, dtype=dtype)[torch.stack([every & 15, every >> 4], dim=1).long()]
        width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[numbers.nbytes // 256]
        return numbers.view(width).reshape(256).to(device)
