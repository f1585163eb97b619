"""Weights by codes and scales, as a kernel decodes them: what all kinds of packed experts have in common."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Coded:
    """n experts' matrices of `rows` x `columns`, row after row: weight = table[code] * scale, rounded once."""

    packed: Tensor
    """uint8 `[n, bytes]`: a code a byte, or two."""
    scales: Tensor
    """`[n, blocks]`: int32 and int16, float32 and bfloat16 by their bits; or uint8, exponents of two, bias 127."""
    table: Tensor
    """float32 `[16]` or `[256]`."""
    bits: int
    rows: int
    columns: int
    block: tuple[int, int]
    """Rows and columns that share a scale. (0, B): B weights in the order of all of a matrix, ends of rows aside."""
    is_high_first: bool
    """Of two codes in a byte, whether the first one is in its upper half."""
    kept: Tensor
    """`[k, rows, columns]`: experts that are no codes."""
    place_E: Tensor
    """int32: where in `packed` each expert is; -1: it is in `kept`."""
    place_in_kept_E: Tensor
    """int32: the same of `kept`."""
