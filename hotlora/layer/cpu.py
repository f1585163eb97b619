"""Products as a CPU makes them: one expert after another, a block of experts at a time.

Rows are sorted by expert and their number is free to read, so an expert's rows are a slice: products write into
slices, and the low-rank products of a hot expert work on its slice in place. Nothing is gathered for them.

What a block makes on its way is small enough to stay in a cache, and for malloc to hand out again: pages for arrays as
large as all rows, fresh from the kernel each time, were a third of a layer's time at OLMoE's size. How experts fall
into blocks changes no bit where their width is a multiple of 64: a vector unit rounds its leftovers otherwise.

Shape suffixes: E experts, K experts per token, S rows of a block, n rows of one expert, N hot experts, I inputs,
O outputs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..hf.experts_view import FrozenWeight

BLOCK_BYTES = 2**22
"""Of a block's widest array, but that a block has one expert at least."""


def seeded(seed: int) -> torch.Generator:
    """What masks are drawn from: one block's after the other's."""
    return torch.Generator().manual_seed(seed)


class Rows:
    """A block of the assignments, sorted by expert: S rows, whole experts, and in the last block those of experts on
    other devices."""

    def __init__(self, order_S: Tensor, by_expert: list[tuple[int, int, int]], top_k: int) -> None:
        self.order_S, self.token_S, self.by_expert = order_S, order_S // top_k, by_expert
        """by_expert: (expert, first row, last row + 1) of the experts that got a row."""

    @classmethod
    def blocks(cls, num_experts: int, top_k_index_TK: Tensor, row_bytes: int, is_partial: bool) -> "list[Rows]":
        """All rows. row_bytes: of the widest array. is_partial: whether an index may be no expert of this process."""
        expert_S, order_S = torch.sort(top_k_index_TK.reshape(-1))
        ends = torch.searchsorted(expert_S, torch.arange(num_experts), right=True).tolist()
        blocks: list[Rows] = []
        by_expert: list[tuple[int, int, int]] = []
        start = 0
        for expert, (a, b) in enumerate(zip([0, *ends], ends, strict=False)):
            if by_expert and (b - start) * row_bytes > BLOCK_BYTES:
                blocks.append(cls(order_S[start:a], by_expert, top_k_index_TK.shape[1]))
                by_expert, start = [], a
            if b > a:
                by_expert.append((expert, a - start, b - start))
        return [*blocks, cls(order_S[start:], by_expert, top_k_index_TK.shape[1])]

    def product(self, x_SI: Tensor, weight: FrozenWeight) -> Tensor:
        """Each row times its expert's weights `[S, O]`; zeros in rows of no expert here."""
        y_SO = x_SI.new_empty(x_SI.shape[0], weight.num_outputs)
        end = 0
        for expert, a, end in self.by_expert:
            torch.mm(x_SI[a:end], weight.of(expert), out=y_SO[a:end])
        y_SO[end:] = 0
        return y_SO

    def outer(self, out_EOI: Tensor, y_SO: Tensor, x_SI: Tensor) -> None:
        """Sets `out` to the sum of y x^T over each expert's rows; experts without a row are left alone."""
        for expert, a, b in self.by_expert:
            out_EOI[expert] = y_SO[a:b].T @ x_SI[a:b]

    def add_bias(self, y_SO: Tensor, bias_EO: Tensor) -> None:
        """Adds to each row its expert's row of `bias`, in place."""
        for expert, a, b in self.by_expert:
            y_SO[a:b] += bias_EO[expert]

    def dot_bias(self, g_SO: Tensor, bias_EO: Tensor) -> Tensor:
        """`[S]`: each row's product with its expert's bias."""
        dots_S = g_SO.new_zeros(g_SO.shape[0])
        for expert, a, b in self.by_expert:
            dots_S[a:b] = g_SO[a:b] @ bias_EO[expert]
        return dots_S

    def scaled(self, y_SO: Tensor, scale_EO: Tensor) -> Tensor:
        """Each row times its expert's row of `scale`."""
        scaled_SO = y_SO.clone()
        for expert, a, b in self.by_expert:
            scaled_SO[a:b] *= scale_EO[expert].to(y_SO.dtype)
        return scaled_SO

    def add_sums(self, sums_EO: Tensor, y_SO: Tensor) -> None:
        """Adds to `sums` the sum over each expert's rows."""
        for expert, a, b in self.by_expert:
            sums_EO[expert] += y_SO[a:b].sum(0)

    def placed(self, all_S: Tensor | None, some_S: Tensor, num_rows: int) -> Tensor:
        """`all_S` with this block's rows in the places that the router gave them; made with the first block."""
        if all_S is None:
            all_S = some_S.new_empty(num_rows, *some_S.shape[1:])
        return all_S.index_copy_(0, self.order_S, some_S)


@dataclass(frozen=True)
class ExpertRows:
    """The rows of a hot expert, `a` to `b`, and among its neighbours' those from `start` to `stop`, which its products
    are made for: of a few round numbers, since a library that compiles a product for each shape it meets (oneDNN, in
    half precision) takes longer for that than for the product."""

    n: int
    """its place among the hot experts"""
    a: int
    b: int
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        """Those that products are made for."""
        return slice(self.start, self.stop)

    def own(self, z: Tensor) -> Tensor:
        """`z`, of `rows`, with the neighbours' set to zero: what is made of it adds nothing to theirs."""
        if (self.start, self.stop) == (self.a, self.b):
            return z
        z = z.clone()
        z[: self.a - self.start] = 0
        z[self.b - self.start :] = 0
        return z


def expert_rows(n: int, a: int, b: int, num_rows: int, is_rounded: bool) -> ExpertRows:
    """With the neighbours after it, or else before it, where the block has so many."""
    size = b - a
    step = max(16, 1 << max(0, size.bit_length() - 4))  # at most an eighth more, and 16: a matrix unit's own rows
    wide = -(-size // step) * step
    if not is_rounded or wide > num_rows:
        return ExpertRows(n, a, b, a, b)
    start = min(a, num_rows - wide)
    return ExpertRows(n, a, b, start, start + wide)


class Hot:
    """The rows of one update's experts in a block. Factors are cast expert by expert, where they are used."""

    def __init__(self, rows: Rows, update: Any) -> None:
        self.dtype, self.token_S = update.dtype, rows.token_S
        slots = {expert: n for n, expert in enumerate(update.expert_ids_N.tolist())}
        # A mask is drawn for an expert's own rows.
        is_rounded = update.dtype in (torch.bfloat16, torch.float16) and update.p == 0
        num_rows = len(rows.order_S)
        self.by_expert = [expert_rows(slots[e], a, b, num_rows, is_rounded) for e, a, b in rows.by_expert if e in slots]

    def picked(self, x_TI: Tensor) -> Tensor:
        """`[S, I]`: of each hot row its token's; others hold anything."""
        x_SI = x_TI.new_empty(len(self.token_S), x_TI.shape[1])
        for its in self.by_expert:
            torch.index_select(x_TI, 0, self.token_S[its.rows], out=x_SI[its.rows])
        return x_SI

    def product(self, x_SI: Tensor, weight_NOI: Tensor, scaling: float | Tensor = 1.0) -> Tensor:
        """`[S, O]`: scaling * weight[n] @ x in hot rows, zero in others. scaling: one, or each expert's `[N]`."""
        y_SO = x_SI.new_zeros(x_SI.shape[0], weight_NOI.shape[1], dtype=self.dtype)
        for its in self.by_expert:
            y_nO = x_SI[its.rows].to(self.dtype) @ weight_NOI[its.n].to(self.dtype).T
            own_nO = y_nO[its.a - its.start : its.b - its.start]
            factor = scaling[its.n] if isinstance(scaling, Tensor) else scaling
            y_SO[its.a : its.b] = own_nO if factor == 1 else own_nO.mul_(factor)
        return y_SO

    def by_rows(self, scaling_N: Tensor, dtype: torch.dtype) -> Tensor:
        """`[S, 1]`: of each hot row its expert's, in float32 at least."""
        scaling_S1 = torch.ones(len(self.token_S), 1, dtype=torch.promote_types(dtype, torch.float32))
        for its in self.by_expert:
            scaling_S1[its.a : its.b] = scaling_N[its.n]
        return scaling_S1

    def add_product(self, y_SO: Tensor, x_SI: Tensor, weight_NOI: Tensor, drop: "Dropout | None" = None) -> None:
        """y += drop(weight[n] @ x) in hot rows, in place and in y's dtype."""
        for its in self.by_expert:
            x_nI, weight_IO = its.own(x_SI[its.rows].to(self.dtype)), weight_NOI[its.n].to(self.dtype).T
            y_nO = y_SO[its.rows]
            if y_SO.dtype == self.dtype and (drop is None or drop.p == 0):
                y_nO.addmm_(x_nI, weight_IO)
            else:
                product = x_nI @ weight_IO
                y_nO.add_((product if drop is None else drop.of(its, product)).to(y_SO.dtype))

    def outer(self, out_NOI: Tensor, y_SO: Tensor, x_SI: Tensor) -> None:
        """Sets `out` to the sum of y x^T over each hot expert's rows; experts without a row are left alone."""
        for its in self.by_expert:
            y_nO, x_nI = y_SO[its.rows].to(self.dtype), x_SI[its.rows].to(self.dtype)
            if y_nO.shape[1] < x_nI.shape[1]:  # the thinner one is the cheaper to copy
                y_nO = its.own(y_nO)
            else:
                x_nI = its.own(x_nI)
            out_NOI[its.n] = y_nO.T @ x_nI

    def dropout(self, x_SI: Tensor, p: float, source: torch.Generator) -> "Dropout":
        """Masks of x's shape for the hot rows, drawn now."""
        return Dropout(self, x_SI, p, source)


class Dropout:
    """The same masks at each call."""

    def __init__(self, hot: Hot, x_SI: Tensor, p: float, source: torch.Generator) -> None:
        self.hot, self.p = hot, p
        self.masks = {
            its.n: x_SI.new_empty(its.b - its.a, x_SI.shape[1], dtype=hot.dtype).bernoulli_(1 - p, generator=source)
            for its in (hot.by_expert if p else ())
        }

    def __call__(self, x_SI: Tensor) -> Tensor:
        """`x`; its hot rows dropped, where rows are, and the others not to be read."""
        if not self.p:
            return x_SI
        dropped_SI = x_SI.new_empty(x_SI.shape, dtype=self.hot.dtype)
        for its in self.hot.by_expert:
            dropped_SI[its.rows] = self.of(its, x_SI[its.rows].to(self.hot.dtype))
        return dropped_SI

    def of(self, its: ExpertRows, x_nI: Tensor) -> Tensor:
        """`x` `[n, I]`, of one expert's own rows, dropped."""
        return (x_nI * self.masks[its.n]).div_(1 - self.p) if self.p else x_nI
