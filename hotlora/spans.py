"""How a CPU computes the routed layer: one expert after another, a block of experts at a time.

Rows are sorted by expert and their number is free to read, so an expert's rows are a slice: products write into
slices, and the low-rank products of a hot expert work on its slice in place. Nothing is gathered for them.

What a block makes on its way is small enough to stay in a cache, and for malloc to hand out again: pages for arrays as
large as all rows, fresh from the kernel each time, were a third of a layer's time at OLMoE's size. How experts fall
into blocks changes no bit where their width is a multiple of 64: a vector unit rounds its leftovers otherwise.

Shape suffixes as in `experts`; n rows of one expert.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .experts import CastFactors, up_parts

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


class Hot:
    """What one adapter adds to its hot experts in a block of rows."""

    def __init__(self, factors: CastFactors, rows: Rows) -> None:
        self.factors, self.token_S = factors, rows.token_S
        slots = {expert: n for n, expert in enumerate(factors.expert_ids_N.tolist())}
        self.spans = [(slots[expert], a, b) for expert, a, b in rows.spans if expert in slots]

    def up(self, experts: Any, up_SPF: Tensor, x_SD: Tensor) -> None:
        """Adds the update of the projections into the experts to `up`."""
        f = self.factors
        for n, a, b, drop in self._dropped(f.up_generator):
            z_nPR = (drop(x_SD[a:b].to(f.dtype)) @ f.A_up[n].T).mul_(f.scaling)
            parts = up_parts(experts, up_SPF[a:b])
            for part, z_nR, B in zip(parts, f.split(z_nPR, 1), f.split(f.B_up[n], 0), strict=True):
                _add_product(part, z_nR, B.T)

    def down(self, y_SD: Tensor, act_SF: Tensor) -> None:
        """Adds the update of the projection out of the experts to `y`."""
        f = self.factors
        for n, a, b, drop in self._dropped(f.down_generator):
            z_nR = (drop(act_SF[a:b].to(f.dtype)) @ f.A_down[n].T).mul_(f.scaling)
            _add_product(y_SD[a:b], z_nR, f.B_down[n].T)

    def down_backward(
        self, u_SF: Tensor, dweight_S: Tensor, act_SF: Tensor, grad_SD: Tensor, weight_S1: Tensor
    ) -> None:
        """Makes the gradients of A, where it trains, and B; adds the input's, not yet times the routing weights, to
        `u`, and the routing weights' to `dweight`: <g, B A h> is <B^T g, A h>."""
        f = self.factors
        dA, dB = f.down_gradients
        for n, a, b, drop in self._dropped(f.down_generator):
            act_nF, g_nD = drop(act_SF[a:b].to(f.dtype)), grad_SD[a:b].to(f.dtype)
            g_nR = (g_nD @ f.B_down[n]).mul_(f.scaling)
            z_nR = act_nF @ f.A_down[n].T
            dweight_S[a:b] += torch.linalg.vecdot(g_nR.to(dweight_S.dtype), z_nR.to(dweight_S.dtype))
            if dA is not None:
                torch.mm((g_nR * weight_S1[a:b]).to(f.dtype).T, act_nF, out=dA[n])
            torch.mm(g_nD.T, (z_nR * (weight_S1[a:b] * f.scaling)).to(f.dtype), out=dB[n])
            _add_product(u_SF[a:b], g_nR, f.A_down[n], drop)

    def up_backward(self, experts: Any, dx_SD: Tensor, dup_SPF: Tensor, hidden_TD: Tensor) -> None:
        """Makes the gradients of A, where it trains, and B; adds the input's to `dx`."""
        f = self.factors
        dA, dB = f.up_gradients
        for n, a, b, drop in self._dropped(f.up_generator):
            x_nD = drop(hidden_TD.index_select(0, self.token_S[a:b]).to(f.dtype))
            z_nPR = (x_nD @ f.A_up[n].T).mul_(f.scaling)
            parts = [part.to(f.dtype) for part in up_parts(experts, dup_SPF[a:b])]
            pairs = zip(parts, f.split(z_nPR, 1), strict=True)
            dB[n] = torch.cat([part.T @ z_nR for part, z_nR in pairs])
            pairs = zip(parts, f.split(f.B_up[n], 0), strict=True)
            g_nPR = torch.cat([part @ B for part, B in pairs], dim=1).mul_(f.scaling)
            if dA is not None:
                torch.mm(g_nPR.T, x_nD, out=dA[n])
            _add_product(dx_SD[a:b], g_nPR, f.A_up[n], drop)

    def _dropped(self, generator: torch.Generator) -> Iterator[tuple[int, int, int, "_Dropout"]]:
        """The hot spans, each with its mask."""
        for n, a, b in self.spans:
            yield n, a, b, _Dropout(self.factors.p, generator)


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
