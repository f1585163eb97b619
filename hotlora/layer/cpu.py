"""Products as a CPU makes them: one expert after another, a block of experts at a time.

Rows are sorted by expert and their number is free to read, so an expert's rows are a slice: products write into
slices, and the low-rank products of a hot expert read its slice and add to it in place. Nothing is gathered for them.
An operation of torch's costs as much as a small product, so all experts' slices of an array are one operation, and what
is not a product is done for all of them together.

What a block makes on its way is small enough to stay in a cache, and for malloc to hand out again: pages for arrays as
large as all rows, fresh from the kernel each time, were a third of a layer's time at OLMoE's size. How experts fall
into blocks changes no bit where their width is a multiple of 64: a vector unit rounds its leftovers otherwise.

Shape suffixes: E experts, K experts per token, S rows of a block, n rows of one expert, N hot experts, H rows of hot
experts, I inputs, O outputs.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from ..base.heap import apart_from
from ..hf.experts_view import FrozenWeight

BLOCK_BYTES = 2**22
"""Of a block's widest array, but that a block has one expert at least."""

HALF = (torch.bfloat16, torch.float16)
_LEAST = 16  # rows: a matrix unit's own
_SHARE, _HOT_SHARE = 32, 8
"""One row in so many is multiplied in vain at most, by the base and by a low-rank update, so that shapes are few."""

Views = list[Tensor] | tuple[Tensor, ...]
"""Each expert's rows of an array."""


def seeded(seed: int) -> torch.Generator:
    """What masks are drawn from: one block's after the other's."""
    return torch.Generator().manual_seed(seed)


class Rows:
    """A block of the assignments, sorted by expert: S rows, whole experts, and in the last block those of experts on
    other devices."""

    def __init__(self, order_S: Tensor, by_expert: list[tuple[int, int, int]], top_k: int) -> None:
        self.order_S, self.token_S, self.by_expert = order_S, order_S // top_k, by_expert
        """by_expert: (expert, first row, last row + 1) of the experts that got a row."""
        self.experts = [expert for expert, _, _ in by_expert]
        sizes = [b - a for _, a, b in by_expert]
        self.sizes = [*sizes, len(order_S) - sum(sizes)]
        """of each expert's rows, and of those of experts on other devices"""

    @classmethod
    def blocks(cls, num_experts: int, top_k_index_TK: Tensor, row_bytes: int, is_partial: bool) -> "list[Rows]":
        """All rows. row_bytes: of the widest array. is_partial: whether an index may be no expert of this process."""
        apart_from(2 * BLOCK_BYTES)
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

    def views(self, x_S: Tensor) -> Views:
        """Each expert's rows of `x`."""
        return x_S.split(self.sizes)[:-1]

    def product(self, x_SI: Tensor, weight: FrozenWeight) -> Tensor:
        """Each row times its expert's weights `[S, O]`; zeros in rows of no expert here."""
        y_SO = x_SI.new_empty(x_SI.shape[0], weight.num_outputs)
        for expert, a, b in self.by_expert:
            is_rounded = x_SI.dtype in HALF and b - a > _LEAST  # fewer: of a generation's step
            stop = a + rounded(b - a, _SHARE) if is_rounded else b
            if stop <= len(y_SO):  # what comes after is not this expert's, and is overwritten
                torch.mm(x_SI[a:stop], weight.of(expert), out=y_SO[a:stop])
            else:
                filled_up = torch.nn.functional.pad(x_SI[a:b], (0, 0, 0, stop - b))
                y_SO[a:b] = torch.mm(filled_up, weight.of(expert))[: b - a]
        if self.sizes[-1]:
            y_SO[-self.sizes[-1] :] = 0
        return y_SO

    def outer(self, out_EOI: Tensor, y_SO: Tensor, x_SI: Tensor) -> None:
        """Sets `out` to the sum of y x^T over each expert's rows; experts without a row are left alone."""
        for expert, y_nO, x_nI in zip(self.experts, self.views(y_SO), self.views(x_SI), strict=True):
            out_EOI[expert] = y_nO.T @ x_nI

    def add_bias(self, y_SO: Tensor, bias_EO: Tensor) -> None:
        """Adds to each row its expert's row of `bias`, in place."""
        for expert, y_nO in zip(self.experts, self.views(y_SO), strict=True):
            y_nO += bias_EO[expert]

    def dot_bias(self, g_SO: Tensor, bias_EO: Tensor) -> Tensor:
        """`[S]`: each row's product with its expert's bias."""
        dots_S = g_SO.new_zeros(g_SO.shape[0])
        for expert, g_nO, dots_n in zip(self.experts, self.views(g_SO), self.views(dots_S), strict=True):
            torch.mv(g_nO, bias_EO[expert], out=dots_n)
        return dots_S

    def scaled(self, y_SO: Tensor, scale_EO: Tensor) -> Tensor:
        """Each row times its expert's row of `scale`."""
        scaled_SO = y_SO.clone()
        for expert, scaled_nO in zip(self.experts, self.views(scaled_SO), strict=True):
            scaled_nO *= scale_EO[expert].to(y_SO.dtype)
        return scaled_SO

    def add_sums(self, sums_EO: Tensor, y_SO: Tensor) -> None:
        """Adds to `sums` the sum over each expert's rows."""
        for expert, y_nO in zip(self.experts, self.views(y_SO), strict=True):
            sums_EO[expert] += y_nO.sum(0)

    def placed(self, all_S: Tensor | None, some_S: Tensor, num_rows: int) -> Tensor:
        """`all_S` with this block's rows in the places that the router gave them; made with the first block."""
        if all_S is None:
            all_S = some_S.new_empty(num_rows, *some_S.shape[1:])
        return all_S.index_copy_(0, self.order_S, some_S)


def rounded(size: int, share: int) -> int:
    """So many rows, and at most one in `share` more, but at least a matrix unit's own: one of few round numbers.

    A library that compiles a product for each shape that it meets (oneDNN, in half precision) takes longer for that
    than for a thin product, and keeps the last 1024, of 0.6 MB each."""
    step = max(_LEAST, 1 << max(0, size.bit_length() - share.bit_length()))
    return -(-size // step) * step


@dataclass(frozen=True)
class ExpertRows:
    """The rows of a hot expert, `a` to `b`, and among its neighbours' those from `start` to `stop`, which its products
    are made for (`rounded`)."""

    n: int
    """its place among the hot experts"""
    a: int
    b: int
    start: int
    stop: int

    @property
    def neighbours(self) -> list[int]:
        """Which of the rows that products are made for are the neighbours', from 0 on."""
        return [*range(self.a - self.start), *range(self.b - self.start, self.stop - self.start)]


def expert_rows(n: int, a: int, b: int, num_rows: int, is_rounded: bool) -> ExpertRows:
    """With the neighbours after it, or else before it, where the block has so many."""
    wide = rounded(b - a, _HOT_SHARE)
    if not is_rounded or wide > num_rows:
        return ExpertRows(n, a, b, a, b)
    start = min(a, num_rows - wide)
    return ExpertRows(n, a, b, start, start + wide)


class Hot:
    """The rows of one update's experts in a block. What is made of them has H rows, one expert's after the other's,
    with zeros in those of their neighbours (`ExpertRows`)."""

    def __init__(self, rows: Rows, update: Any) -> None:
        self.dtype, self.token_S = update.dtype, rows.token_S
        slots = {expert: n for n, expert in enumerate(update.expert_ids_N.tolist())}
        # A mask is drawn for an expert's own rows.
        is_rounded = update.dtype in HALF and update.p == 0
        num_rows = len(rows.order_S)
        self.by_expert = [expert_rows(slots[e], a, b, num_rows, is_rounded) for e, a, b in rows.by_expert if e in slots]
        self.has_rows = bool(self.by_expert)
        if not self.has_rows:
            return
        self.some = slice(self.by_expert[0].n, self.by_expert[-1].n + 1)
        """this block's experts among the hot ones"""
        self.sizes = [its.stop - its.start for its in self.by_expert]
        edges = [0, *(edge for its in self.by_expert for edge in (its.a, its.b)), num_rows]
        self.gaps_and_sizes = [after - before for before, after in pairwise(edges)]
        """in turn the rows between hot experts, and a hot expert's own"""
        starts = accumulate(self.sizes, initial=0)
        neighbours = [at + i for its, at in zip(self.by_expert, starts, strict=False) for i in its.neighbours]
        self.neighbours = torch.tensor(neighbours) if neighbours else None

    def rows(self, x_SI: Tensor) -> Views:
        """Each hot expert's rows of `x`, and its neighbours', as products take them."""
        return self._views(x_SI.to(self.dtype))

    def own(self, x_S: Tensor) -> Tensor:
        """`[H, ...]`: the rows of `x` that are hot."""
        return self._without_neighbours(torch.cat(self._views(x_S)))

    def picked(self, x_TI: Tensor) -> Tensor:
        """`[H, I]`: of each hot row its token's."""
        return self._without_neighbours(x_TI.index_select(0, torch.cat(self._views(self.token_S)))).to(self.dtype)

    def weights(self, *weights_N: Tensor) -> list[Tensor]:
        """As products take them: of this block's experts."""
        return [weight_N[self.some].to(self.dtype) for weight_N in weights_N]

    def product(self, x: Tensor | Views, weight_NOI: Tensor, scaling: float | Tensor = 1.0) -> Tensor:
        """`[H, O]`: scaling * weight[n] @ x. x: as `rows` or other methods give it; weight: as `weights`, also a part
        of it; scaling: one, or each expert's `[N]`."""
        y_HO = weight_NOI.new_empty(sum(self.sizes), weight_NOI.shape[1])
        weights = self._of_each(weight_NOI.transpose(1, 2))
        for x_nI, weight_IO, y_nO in zip(self._split(x), weights, self._split(y_HO), strict=True):
            torch.mm(x_nI, weight_IO, out=y_nO)
        self._without_neighbours(y_HO)
        if isinstance(scaling, Tensor):
            return y_HO.mul_(self.by_rows(scaling, self.dtype))
        return y_HO if scaling == 1 else y_HO.mul_(scaling)

    def by_rows(self, scaling_N: Tensor, dtype: torch.dtype) -> Tensor:
        """`[H, 1]`: of each hot row its expert's, in float32 at least."""
        each = [scaling_N[its.n].expand(size) for its, size in zip(self.by_expert, self.sizes, strict=True)]
        return torch.cat(each).to(torch.promote_types(dtype, torch.float32)).unsqueeze(1)

    def add(self, y_S: Tensor, x_H: Tensor) -> None:
        """y += x in hot rows, in place and in y's dtype."""
        for y_n, x_n in zip(self._views(y_S), x_H.to(y_S.dtype).split(self.sizes), strict=True):
            y_n += x_n

    def add_product(self, y_SO: Tensor, x_HI: Tensor, weight_NOI: Tensor, drop: "Dropout | None" = None) -> None:
        """y += drop(weight[n] @ x) in hot rows, in place and in y's dtype."""
        if y_SO.dtype != self.dtype or (drop is not None and drop.p):
            product_HO = self.product(x_HI, weight_NOI)
            return self.add(y_SO, product_HO if drop is None else drop(product_HO))
        weights = self._of_each(weight_NOI.transpose(1, 2))
        for y_nO, x_nI, weight_IO in zip(self._views(y_SO), self._split(x_HI), weights, strict=True):
            y_nO.addmm_(x_nI, weight_IO)

    def outer(self, out_NOI: Tensor, y: Tensor | Views, x: Tensor | Views) -> None:
        """Sets `out` to the sum of y x^T over each hot expert's rows; of experts without a row it is zero already.
        One of y and x has zeros in neighbours' rows."""
        (made_NOI,) = self.weights(out_NOI)  # itself, or a copy in another dtype
        for out_OI, y_nO, x_nI in zip(self._of_each(made_NOI), self._split(y), self._split(x), strict=True):
            torch.mm(y_nO.T, x_nI, out=out_OI)
        if made_NOI.dtype != out_NOI.dtype:
            out_NOI[self.some].copy_(made_NOI)

    def dropout(self, p: float, source: torch.Generator) -> "Dropout":
        return Dropout(p, source)

    def _views(self, x_S: Tensor) -> Views:
        """Each hot expert's rows of `x`, and its neighbours'."""
        if self.neighbours is not None:
            return [x_S[its.start : its.stop] for its in self.by_expert]
        return x_S.split(self.gaps_and_sizes)[1::2]

    def _split(self, x: Tensor | Views) -> Views:
        """Each hot expert's rows of what was made of them."""
        return x.to(self.dtype).split(self.sizes) if isinstance(x, Tensor) else x

    def _of_each(self, weight_NOI: Tensor) -> list[Tensor]:
        """Of each hot expert with rows; weight: of the block's experts."""
        weights = weight_NOI.unbind()
        return [weights[its.n - self.some.start] for its in self.by_expert]

    def _without_neighbours(self, x_H: Tensor) -> Tensor:
        return x_H if self.neighbours is None else x_H.index_fill_(0, self.neighbours, 0)


class Dropout:
    """The same masks at each call, drawn at the first."""

    def __init__(self, p: float, source: torch.Generator) -> None:
        self.p, self.source = p, source
        self.mask_HI: Tensor | None = None

    def __call__(self, x: Tensor | Views) -> Any:
        """`[H, I]`: `x`, dropped."""
        if not self.p:
            return x
        x_HI = x if isinstance(x, Tensor) else torch.cat(x)
        if self.mask_HI is None:
            self.mask_HI = torch.empty_like(x_HI).bernoulli_(1 - self.p, generator=self.source)
        return (x_HI * self.mask_HI).div_(1 - self.p)
