"""How a CPU computes the routed layer: one expert after another, a block of experts at a time.

Rows are sorted by expert and their number is free to read, so an expert's rows are a slice: products write into
slices, and the low-rank products of a hot expert work on its slice in place. Nothing is gathered for them.

What a block makes on its way is small enough to stay in a cache, and for malloc to hand out again: pages for arrays as
large as all rows, fresh from the kernel each time, were a third of a layer's time at OLMoE's size. How experts fall
into blocks changes no bit where their width is a multiple of 64: a vector unit rounds its leftovers otherwise.

Shape suffixes as in `experts`; n rows of one expert.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .experts import FactorsInPass, up_parts

BLOCK_BYTES = 2**22
"""Of a block's widest array, but that a block has one expert at least."""


class Rows:
    """A block of the assignments, sorted by expert: S rows, whole experts, and in the last block those of experts on
    other devices."""

    def __init__(self, order_S: Tensor, spans: list[tuple[int, int, int]], top_k: int) -> None:
        self.order_S, self.token_S, self.spans = order_S, order_S // top_k, spans
        """spans: (expert, first row, last row + 1) of the experts that got a row."""

    @classmethod
    def blocks(cls, num_experts: int, top_k_index_TK: Tensor, row_bytes: int) -> "list[Rows]":
        """All rows. row_bytes: of the widest array."""
        expert_S, order_S = torch.sort(top_k_index_TK.reshape(-1))
        ends = torch.searchsorted(expert_S, torch.arange(num_experts), right=True).tolist()
        blocks: list[Rows] = []
        spans: list[tuple[int, int, int]] = []
        start = 0
        for expert, (a, b) in enumerate(zip([0, *ends], ends, strict=False)):
            if spans and (b - start) * row_bytes > BLOCK_BYTES:
                blocks.append(cls(order_S[start:a], spans, top_k_index_TK.shape[1]))
                spans, start = [], a
            if b > a:
                spans.append((expert, a - start, b - start))
        return [*blocks, cls(order_S[start:], spans, top_k_index_TK.shape[1])]

    def product(self, x_SI: Tensor, weight_EIO: Tensor) -> Tensor:
        """Each row times its expert's weights `[S, O]`; zeros in rows of no expert here."""
        y_SO = x_SI.new_empty(x_SI.shape[0], weight_EIO.shape[2])
        end = 0
        for expert, a, end in self.spans:
            torch.mm(x_SI[a:end], weight_EIO[expert], out=y_SO[a:end])
        y_SO[end:] = 0
        return y_SO

    def add_bias(self, y_SO: Tensor, bias_EO: Tensor) -> None:
        for expert, a, b in self.spans:
            y_SO[a:b] += bias_EO[expert]

    def dot_bias(self, g_SO: Tensor, bias_EO: Tensor) -> Tensor:
        """`[S]`: each row's product with its expert's bias."""
        dots_S = g_SO.new_zeros(g_SO.shape[0])
        for expert, a, b in self.spans:
            dots_S[a:b] = g_SO[a:b] @ bias_EO[expert]
        return dots_S


@dataclass(frozen=True)
class _Span:
    """The rows of a hot expert, `a` to `b`, and among its neighbours' those from `start` to `stop`, which its products
    are made for: of a few round numbers, since a library that compiles a product for each shape it meets (oneDNN, in
    half precision) takes longer for that than for the product."""

    n: int
    """its place among the factors"""
    a: int
    b: int
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    def own(self, z: Tensor) -> Tensor:
        """`z`, of `rows`, with the neighbours' set to zero: what is made of it adds nothing to theirs."""
        if self.stop - self.start > self.b - self.a:
            z[: self.a - self.start] = 0
            z[self.b - self.start :] = 0
        return z


def _span(n: int, a: int, b: int, num_rows: int, is_rounded: bool) -> _Span:
    """With the neighbours after it, or else before it, where the block has so many."""
    size = b - a
    step = max(16, 1 << max(0, size.bit_length() - 4))  # at most an eighth more, and 16: a matrix unit's own rows
    wide = -(-size // step) * step
    if not is_rounded or wide > num_rows:
        return _Span(n, a, b, a, b)
    start = min(a, num_rows - wide)
    return _Span(n, a, b, start, start + wide)


class Hot:
    """What one adapter adds to its hot experts in a block of rows."""

    def __init__(self, factors: FactorsInPass, rows: Rows) -> None:
        self.factors, self.token_S = factors, rows.token_S
        slots = factors.slots
        # A mask is drawn for an expert's own rows.
        is_rounded = factors.dtype in (torch.bfloat16, torch.float16) and factors.p == 0
        self.spans = [
            _span(slots[expert], a, b, len(rows.order_S), is_rounded) for expert, a, b in rows.spans if expert in slots
        ]

    def up(self, experts: Any, up_SPF: Tensor, x_SD: Tensor) -> None:
        """Adds the update of the projections into the experts to `up`."""
        f = self.factors
        for span, drop in self._dropped(f.up_generator):
            A, B = (t[span.n].to(f.dtype) for t in (f.A_up, f.B_up))
            z_nPR = span.own((drop(x_SD[span.rows].to(f.dtype)) @ A.T).mul_(f.scaling))
            parts = up_parts(experts, up_SPF[span.rows])
            for part, z_nR, B_part in zip(parts, f.split(z_nPR, 1), f.split(B, 0), strict=True):
                _add_product(part, z_nR, B_part.T)

    def down(self, y_SD: Tensor, act_SF: Tensor) -> None:
        """Adds the update of the projection out of the experts to `y`."""
        f = self.factors
        for span, drop in self._dropped(f.down_generator):
            A, B = (t[span.n].to(f.dtype) for t in (f.A_down, f.B_down))
            z_nR = span.own((drop(act_SF[span.rows].to(f.dtype)) @ A.T).mul_(f.scaling))
            _add_product(y_SD[span.rows], z_nR, B.T)

    def down_backward(
        self, u_SF: Tensor, dweight_S: Tensor, act_SF: Tensor, grad_SD: Tensor, weight_S1: Tensor
    ) -> None:
        """Makes the gradients of A, where it trains, and B; adds the input's, not yet times the routing weights, to
        `u`, and the routing weights' to `dweight`: <g, B A h> is <B^T g, A h>."""
        f = self.factors
        dA, dB = f.down_gradients
        for span, drop in self._dropped(f.down_generator):
            n, rows = span.n, span.rows
            A, B = (t[n].to(f.dtype) for t in (f.A_down, f.B_down))
            act_nF, g_nD = drop(act_SF[rows].to(f.dtype)), grad_SD[rows].to(f.dtype)
            g_nR, z_nR = span.own((g_nD @ B).mul_(f.scaling)), span.own(act_nF @ A.T)
            dweight_S[rows] += torch.linalg.vecdot(g_nR.to(dweight_S.dtype), z_nR.to(dweight_S.dtype))
            if dA is not None:
                dA[n] = (g_nR * weight_S1[rows]).to(f.dtype).T @ act_nF
            dB[n] = g_nD.T @ (z_nR * (weight_S1[rows] * f.scaling)).to(f.dtype)
            _add_product(u_SF[rows], g_nR, A, drop)

    def up_backward(self, experts: Any, dx_SD: Tensor, dup_SPF: Tensor, hidden_TD: Tensor) -> None:
        """Makes the gradients of A, where it trains, and B; adds the input's to `dx`."""
        f = self.factors
        dA, dB = f.up_gradients
        for span, drop in self._dropped(f.up_generator):
            n, rows = span.n, span.rows
            A, B = (t[n].to(f.dtype) for t in (f.A_up, f.B_up))
            x_nD = drop(hidden_TD.index_select(0, self.token_S[rows]).to(f.dtype))
            z_nPR = span.own((x_nD @ A.T).mul_(f.scaling))
            parts = [part.to(f.dtype) for part in up_parts(experts, dup_SPF[rows])]
            dB[n] = torch.cat([part.T @ z_nR for part, z_nR in zip(parts, f.split(z_nPR, 1), strict=True)])
            pairs = zip(parts, f.split(B, 0), strict=True)
            g_nPR = span.own(torch.cat([part @ B_part for part, B_part in pairs], dim=1).mul_(f.scaling))
            if dA is not None:
                dA[n] = g_nPR.T @ x_nD
            _add_product(dx_SD[rows], g_nPR, A, drop)

    def _dropped(self, generator: torch.Generator) -> Iterator[tuple[_Span, "_Dropout"]]:
        """The hot spans, each with its mask."""
        for span in self.spans:
            yield span, _Dropout(self.factors.p, generator)


hot = Hot  # by the name that `grouped` has


class _Dropout:
    """One span's mask, drawn at first use."""

    def __init__(self, p: float, generator: torch.Generator) -> None:
        self.p, self.generator, self.mask = p, generator, torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        if self.p == 0:
            return x
        if not self.mask.numel():
            self.mask = torch.empty_like(x).bernoulli_(1 - self.p, generator=self.generator)
        return (x * self.mask).div_(1 - self.p)


def _add_product(y: Tensor, a: Tensor, b: Tensor, drop: _Dropout | None = None) -> None:
    """y += drop(a @ b), in y's dtype and in place."""
    if y.dtype == a.dtype and (drop is None or drop.p == 0):
        y.addmm_(a, b)
    else:
        product = a @ b
        y.add_((product if drop is None else drop(product)).to(y.dtype))
