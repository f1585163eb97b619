"""How a CPU computes the routed layer: one expert after another.

Rows are sorted by expert and their number is free to read, so an expert's rows are a slice: products write into
slices, and the low-rank products of a hot expert work on its slice in place. Nothing is gathered for them.

Shape suffixes as in `experts`; n rows of one expert.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .experts import HotFactors, up_parts


class Rows:
    """The S assignments, sorted by expert; rows of experts on other devices come last."""

    def __init__(self, num_experts: int, top_k_index_TK: Tensor) -> None:
        expert_S, self.order_S = torch.sort(top_k_index_TK.reshape(-1))
        self.top_k = top_k_index_TK.shape[1]
        ends = torch.searchsorted(expert_S, torch.arange(num_experts), right=True).tolist()
        self.spans = [(e, a, b) for e, (a, b) in enumerate(zip([0, *ends], ends, strict=False)) if b > a]
        """(expert, first row, last row + 1) of the experts that got a row."""

    @property
    def token_S(self) -> Tensor:
        return self.order_S // self.top_k

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
    """One adapter's factors in the dtype of their products, and its hot rows."""

    def __init__(self, factors: HotFactors, tensors: Sequence[Tensor], rows: Rows, dtype: torch.dtype) -> None:
        self.A_up, self.B_up, self.A_down, self.B_down = (t.detach().to(dtype) for t in tensors)
        self.scaling, self.p, self.dtype = factors.scaling, factors.dropout, dtype
        self.trains_A = tensors[0].requires_grad
        slots = {expert: n for n, expert in enumerate(factors.expert_ids_N.tolist())}
        self.spans = [(slots[expert], a, b) for expert, a, b in rows.spans if expert in slots]

    def up(self, experts: Any, up_SPF: Tensor, x_SD: Tensor, seed: int) -> None:
        """Adds the update of the projections into the experts to `up`."""
        for n, a, b, drop in self._dropped(seed):
            z_nPR = (drop(x_SD[a:b].to(self.dtype)) @ self.A_up[n].T).mul_(self.scaling)
            parts = up_parts(experts, up_SPF[a:b])
            for part, z_nR, B in zip(parts, self._split(z_nPR, 1), self._split(self.B_up[n], 0), strict=True):
                _add_product(part, z_nR, B.T)

    def down(self, y_SD: Tensor, act_SF: Tensor, seed: int) -> None:
        """Adds the update of the projection out of the experts to `y`."""
        for n, a, b, drop in self._dropped(seed):
            z_nR = (drop(act_SF[a:b].to(self.dtype)) @ self.A_down[n].T).mul_(self.scaling)
            _add_product(y_SD[a:b], z_nR, self.B_down[n].T)

    def down_backward(
        self, u_SF: Tensor, dweight_S: Tensor, act_SF: Tensor, grad_SD: Tensor, weight_S1: Tensor, seed: int
    ) -> tuple[Tensor | None, Tensor]:
        """Gradients of A, where it trains, and B; adds the input's, not yet times the routing weights, to `u`, and the
        routing weights' to `dweight`: <g, B A h> is <B^T g, A h>."""
        dA = torch.zeros_like(self.A_down) if self.trains_A else None
        dB = torch.zeros_like(self.B_down)
        for n, a, b, drop in self._dropped(seed):
            act_nF, g_nD = drop(act_SF[a:b].to(self.dtype)), grad_SD[a:b].to(self.dtype)
            g_nR = (g_nD @ self.B_down[n]).mul_(self.scaling)
            z_nR = act_nF @ self.A_down[n].T
            dweight_S[a:b] += torch.linalg.vecdot(g_nR.to(dweight_S.dtype), z_nR.to(dweight_S.dtype))
            if dA is not None:
                torch.mm((g_nR * weight_S1[a:b]).to(self.dtype).T, act_nF, out=dA[n])
            torch.mm(g_nD.T, (z_nR * (weight_S1[a:b] * self.scaling)).to(self.dtype), out=dB[n])
            _add_product(u_SF[a:b], g_nR, self.A_down[n], drop)
        return dA, dB

    def up_backward(
        self, experts: Any, dx_SD: Tensor, dup_SPF: Tensor, hidden_TD: Tensor, token_S: Tensor, seed: int
    ) -> tuple[Tensor | None, Tensor]:
        """Gradients of A, where it trains, and B; adds the input's to `dx`."""
        dA = torch.zeros_like(self.A_up) if self.trains_A else None
        dB = torch.zeros_like(self.B_up)
        for n, a, b, drop in self._dropped(seed):
            x_nD = drop(hidden_TD.index_select(0, token_S[a:b]).to(self.dtype))
            z_nPR = (x_nD @ self.A_up[n].T).mul_(self.scaling)
            parts = [part.to(self.dtype) for part in up_parts(experts, dup_SPF[a:b])]
            pairs = zip(parts, self._split(z_nPR, 1), strict=True)
            dB[n] = torch.cat([part.T @ z_nR for part, z_nR in pairs])
            pairs = zip(parts, self._split(self.B_up[n], 0), strict=True)
            g_nPR = torch.cat([part @ B for part, B in pairs], dim=1).mul_(self.scaling)
            if dA is not None:
                torch.mm(g_nPR.T, x_nD, out=dA[n])
            _add_product(dx_SD[a:b], g_nPR, self.A_up[n], drop)
        return dA, dB

    def _split(self, x: Tensor, dim: int) -> Sequence[Tensor]:
        """What is the gate's and what the up projection's, of `[., P*R]` or `[P*F, .]`."""
        return x.chunk(self.A_up.shape[1] // self.A_down.shape[1], dim)

    def _dropped(self, seed: int) -> Iterator[tuple[int, int, int, "_Dropout"]]:
        """The hot spans, each with its mask; the same seed gives the same masks."""
        generator = torch.Generator().manual_seed(seed)
        for n, a, b in self.spans:
            yield n, a, b, _Dropout(self.p, generator)


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
