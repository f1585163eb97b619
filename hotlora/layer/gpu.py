"""Products as a GPU and torch.compile make them: all experts in one launch, and no number that the device would have to
be asked for.

The base's products are torch's grouped ones where torch has one kernel for them, and ours (`kernels`, in Triton)
elsewhere. The low-rank ones are ours wherever Triton is, since its kernels skip experts that have no factors; torch's
need factors of zeros for cold experts. `HOTLORA_KERNELS=torch` or `=triton` in the environment chooses for all;
`=fused` takes `kernels.fused` for the layers that it covers, which has not been timed on a GPU yet.

Where there is neither, experts are multiplied one after another, those alone that have rows and factors: the device is
asked once a layer where their rows end, for both passes.

In a compiled graph each product is one operation.

Shape suffixes: E experts, K experts per token, S rows (assignments), N hot experts, I inputs, O outputs.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from itertools import pairwise, repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.errors import HotLoraError
from ..base.precision import say_once
from ..hf.experts_view import FrozenWeight
from .updates import rows_at_once

# The major compute capabilities on which torch's grouped_mm is one kernel, for bfloat16; elsewhere it is a loop of
# products that asks the device (pytorch#161407, pytorch#194227). On a Hopper it was 1.45 times as fast as ours for the
# base's products, and slower for thin ones (docs/speed.md).
_TORCH_HAS_A_KERNEL = (9, 10)


BLOCK_BYTES = 2**28
"""Of weights that are quantized or packed at most so much is dense at once, or one expert; and of what is made of all
rows beside them."""

OnHost = Callable[[Tensor], list[int]]
"""What reads a device's numbers, for which the host waits until the device has done all that it was told."""


def seeded(seed: Any) -> Any:
    """What masks are drawn from: the same each time, since a pass has one block."""
    return seed


class Rows:
    """The S assignments, sorted by expert; rows of experts on other devices come last."""

    @classmethod
    def blocks(cls, num_experts: int, top_k_index_TK: Tensor, row_bytes: int, is_partial: bool) -> "list[Rows]":
        """All rows in one: what a GPU has to do is done in few launches."""
        return [cls(num_experts, top_k_index_TK, is_partial)]

    def __init__(self, num_experts: int, top_k_index_TK: Tensor, is_partial: bool) -> None:
        self.expert_S, self.order_S = torch.sort(top_k_index_TK.reshape(-1))
        self.token_S, self.is_partial = self.order_S // top_k_index_TK.shape[1], is_partial
        self.place_S = torch.sort(self.order_S).indices
        """where each of a token's rows went"""
        ids_E = torch.arange(num_experts, device=self.expert_S.device)
        self.ends_E = torch.searchsorted(self.expert_S, ids_E, right=True, out_int32=True)
        self.elsewhere_S1: Tensor | None = None
        """bool: rows of no expert here; None: there are none"""
        if is_partial:
            self.elsewhere_S1 = (self.expert_S >= num_experts).unsqueeze(1)
            self.expert_S = self.expert_S.clamp(max=num_experts - 1)
        self._read: dict[Tensor, list[int]] = {}

    def on_host(self, numbers: Tensor) -> list[int]:
        """Read once, for all products of both passes."""
        if numbers not in self._read:
            self._read[numbers] = numbers.tolist()
        return self._read[numbers]

    @cached_property
    def filled_first_E(self) -> Tensor:
        """All experts, those that have rows before the others."""
        sizes_E = self.ends_E.diff(prepend=self.ends_E.new_zeros(1))
        return torch.argsort(sizes_E.clamp(max=1), descending=True, stable=True)

    def product(self, x_SI: Tensor, weight: FrozenWeight) -> Tensor:
        """Each row times its expert's weights `[S, O]`; zeros in rows of no expert here."""
        x_SI = self._here(x_SI)
        if weight.is_held and not torch.compiler.is_compiling():
            return self._here(_held_product(self, x_SI, weight))
        return self._here(_call(grouped_linear, x_SI, weight.all().transpose(1, 2), self.ends_E, on_host=self.on_host))

    def outer(self, out_EOI: Tensor, y_SO: Tensor, x_SI: Tensor) -> None:
        """Sets `out` to the sum of y x^T over each expert's rows."""
        out_EOI.copy_(_call(grouped_outer, y_SO.contiguous(), x_SI, self.ends_E, on_host=self.on_host))

    def add_bias(self, y_SO: Tensor, bias_EO: Tensor) -> None:
        """Adds to each row its expert's row of `bias`, in place."""
        for y_sO, bias_sO in self._with_values(y_SO, bias_EO):
            y_sO += bias_sO

    def dot_bias(self, g_SO: Tensor, bias_EO: Tensor) -> Tensor:
        """`[S]`: each row's product with its expert's bias."""
        blocks = self._with_values(g_SO, bias_EO)
        return torch.cat([torch.linalg.vecdot(g_sO, bias_sO.to(g_SO.dtype)) for g_sO, bias_sO in blocks])

    def scaled(self, y_SO: Tensor, scale_EO: Tensor) -> Tensor:
        """Each row times its expert's row of `scale`."""
        return torch.cat([y_sO * scale_sO.to(y_SO.dtype) for y_sO, scale_sO in self._with_values(y_SO, scale_EO)])

    def add_sums(self, sums_EO: Tensor, y_SO: Tensor) -> None:
        """Adds to `sums` the sum over each expert's rows."""
        y_SO = y_SO.to(sums_EO.dtype).contiguous()
        ones_S8 = y_SO.new_ones(y_SO.shape[0], 8)  # torch's grouped product takes rows of 16 bytes and more
        sums_EO += _call(grouped_outer, y_SO, ones_S8, self.ends_E, on_host=self.on_host)[:, :, 0]

    def placed(self, all_S: Tensor | None, some_S: Tensor, num_rows: int) -> Tensor:
        """All rows in the places that the router gave them: gathered, since a scatter writes row by row."""
        return some_S.index_select(0, self.place_S)

    def _with_values(self, y_SO: Tensor, values_EO: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of rows, and of each row its expert's values: `BLOCK_BYTES` of them at a time, which are as large as
        the rows. A compiled graph makes none of them."""
        step = rows_at_once(len(y_SO), values_EO[:1].numel() * values_EO.element_size(), BLOCK_BYTES)
        elsewhere: Any = repeat(None) if self.elsewhere_S1 is None else self.elsewhere_S1.split(step)
        for y_sO, expert_s, elsewhere_s1 in zip(y_SO.split(step), self.expert_S.split(step), elsewhere, strict=False):
            values_sO = values_EO.index_select(0, expert_s)
            yield y_sO, values_sO if elsewhere_s1 is None else values_sO.masked_fill_(elsewhere_s1, 0)

    def _here(self, x_SI: Tensor) -> Tensor:
        return x_SI if self.elsewhere_S1 is None else x_SI.masked_fill(self.elsewhere_S1, 0)


class Hot:
    """The rows of one update's experts, where they are among all rows."""

    def __init__(self, rows: Rows, update: Any) -> None:
        self.dtype, self.ids_N, self.is_partial = update.dtype, update.expert_ids_N, rows.is_partial
        self.on_host = rows.on_host
        self.token_S, self.expert_S, self.ends_E = rows.token_S, rows.expert_S, rows.ends_E
        slot_N = torch.arange(len(self.ids_N), dtype=torch.int32, device=self.ids_N.device)
        self.slot_E = torch.full_like(rows.ends_E, -1).index_copy_(0, self.ids_N, slot_N)
        self.has_rows = True
        """For all that the host knows."""

    def rows(self, x_SI: Tensor) -> Tensor:
        """As products take them."""
        return x_SI.to(self.dtype)

    def own(self, x_S: Tensor) -> Tensor:
        """Cold rows are not told apart."""
        return x_S

    def picked(self, x_TI: Tensor) -> Tensor:
        """`[S, I]`: of each row its token's."""
        return x_TI.index_select(0, self.token_S).to(self.dtype)

    def weights(self, *weights_N: Tensor) -> list[Tensor]:
        """As products take them."""
        return [weight_N.to(self.dtype) for weight_N in weights_N]

    def product(self, x_SI: Tensor, weight_NOI: Tensor, scaling: float | Tensor = 1.0) -> Tensor:
        """`[S, O]`: scaling * weight[n] @ x in hot rows, zero in others. scaling: one, or each expert's `[N]`."""
        if isinstance(scaling, Tensor):
            return (self.product(x_SI, weight_NOI) * self.by_rows(scaling, self.dtype)).to(self.dtype)
        rows = (self.ends_E, self.slot_E, self.ids_N)
        return _call(hot_linear, x_SI, weight_NOI, *rows, scaling, self.is_partial, on_host=self.on_host)

    def by_rows(self, scaling_N: Tensor, dtype: torch.dtype) -> Tensor:
        """`[S, 1]`: of each hot row its expert's, in float32 at least."""
        slot_S = self.slot_E.index_select(0, self.expert_S).clamp(min=0)
        return scaling_N.to(torch.promote_types(dtype, torch.float32)).index_select(0, slot_S).unsqueeze(1)

    def add(self, y_S: Tensor, x_S: Tensor) -> None:
        """y += x, in place and in y's dtype. x: zero in cold rows."""
        y_S += x_S.to(y_S.dtype)

    def add_product(self, y_SO: Tensor, x_SI: Tensor, weight_NOI: Tensor, drop: "Dropout | None" = None) -> None:
        """y += drop(weight[n] @ x) in hot rows, in place and in y's dtype."""
        x_SI = x_SI.to(self.dtype)
        if torch.compiler.is_compiling() or (drop is not None and drop.p) or not use_kernels(x_SI, is_thin=True):
            product = self.product(x_SI, weight_NOI)
            self.add(y_SO, product if drop is None else drop(product))
        else:
            _gemm().grouped_gemm(x_SI, weight_NOI, self.ends_E, self.slot_E, add_to_SO=y_SO)

    def outer(self, out_NOI: Tensor, y_SO: Tensor, x_SI: Tensor) -> None:
        """Sets `out` to the sum of y x^T over each hot expert's rows."""
        y_SO, x_SI = y_SO.to(self.dtype), x_SI.to(self.dtype)
        out_NOI.copy_(_call(hot_outer, y_SO, x_SI, self.ends_E, self.ids_N, on_host=self.on_host))

    def dropout(self, p: float, source: Any) -> "Dropout":
        return Dropout(self, p, source)


class Dropout:
    """The same masks at each call, drawn each time: those that a CPU draws."""

    def __init__(self, hot: Hot, p: float, seed: Any) -> None:
        self.dtype, self.p, self.seed = hot.dtype, p, seed
        if p:
            self.place_S = (hot.slot_E.index_select(0, hot.expert_S) >= 0).cumsum(0).sub(1).clamp(min=0)

    def __call__(self, x_SI: Tensor) -> Tensor:
        """`x`; its hot rows dropped, where rows are, and the others not to be read."""
        if self.p == 0:
            return x_SI
        return _call(dropped, x_SI.to(self.dtype), self.p, self.seed, self.place_S)


def grouped_linear(x_SI: Tensor, weight_EOI: Tensor, ends_E: Tensor, on_host: OnHost = Tensor.tolist) -> Tensor:
    """`y[s] = weight[expert of s] @ x[s]`, `[S, O]`; rows past the last expert hold anything."""
    if use_kernels(x_SI):
        return _gemm().grouped_gemm(x_SI, weight_EOI, ends_E)
    if _grouped_mm_takes(x_SI, x_SI.stride(0), max(weight_EOI.stride()[1:]), *weight_EOI.shape[1:]):
        return F.grouped_mm(x_SI, weight_EOI.transpose(1, 2), offs=ends_E)
    return _linear(x_SI, weight_EOI, _spans(on_host(ends_E)), x_SI.new_empty(x_SI.shape[0], weight_EOI.shape[1]))


def _held_product(rows: Rows, x_SI: Tensor, weight: FrozenWeight) -> Tensor:
    """`grouped_linear` of weights that are quantized or packed: `BLOCK_BYTES` of them are dense at once, or a tile."""
    ends_E, num_experts = rows.ends_E, len(rows.ends_E)
    if use_fused(x_SI) and x_SI.dtype == weight.dtype:
        from .kernels.coded_gemm import coded_gemm  # which needs Triton

        # The parameter is [E, I, O] where `is_transposed`; and may be held the other way round.
        return coded_gemm(x_SI, weight.value.coded(), ends_E, weight.is_transposed != weight.value.is_transposed)
    step = max(1, BLOCK_BYTES // (weight.value.shape[1:].numel() * weight.dtype.itemsize))
    if 0 < len(x_SI) < num_experts:  # of a generation's step: each row's own weights, whose number is known beforehand
        parts = zip(x_SI.unsqueeze(1).split(step), rows.expert_S.split(step), strict=True)
        return torch.cat([torch.bmm(x_n1I, weight.chosen(expert_n)) for x_n1I, expert_n in parts]).squeeze(1)
    is_ours = use_kernels(x_SI)
    if step >= num_experts and (is_ours or _grouped_mm_takes(x_SI, x_SI.stride(0), *weight.value.shape[1:])):
        return grouped_linear(x_SI, weight.all().transpose(1, 2), ends_E)
    y_SO = x_SI.new_zeros(x_SI.shape[0], weight.num_outputs)
    if is_ours:  # which need not know which rows are an expert's
        for a in range(0, num_experts, step):
            b = min(a + step, num_experts)
            slot_E = torch.arange(-a, num_experts - a, dtype=torch.int32, device=x_SI.device)
            slot_E = slot_E.masked_fill(slot_E >= b - a, -1).clamp(min=-1)
            _gemm().grouped_gemm(x_SI, weight.some(a, b).transpose(1, 2), ends_E, slot_E, add_to_SO=y_SO)
        return y_SO
    spans = _spans(rows.on_host(ends_E))
    filled = [expert for expert, (a, b) in enumerate(spans) if a < b]
    for place in range(0, len(filled), step):
        its = filled[place : place + step]
        first, last, start, stop = its[0], its[-1], spans[its[0]][0], spans[its[-1]][1]
        if last - first < len(its):
            dense, its_ends = weight.some(first, last + 1), ends_E[first : last + 1] - start
        else:
            ids = rows.filled_first_E[place : place + len(its)]
            dense, its_ends = weight.chosen(ids), ends_E.index_select(0, ids) - start
        read = {its_ends: [spans[expert][1] - start for expert in its]}  # what is known need not be asked for
        y_SO[start:stop] = grouped_linear(x_SI[start:stop], dense.transpose(1, 2), its_ends, read.__getitem__)
    return y_SO


def grouped_outer(y_SO: Tensor, x_SI: Tensor, ends_E: Tensor, on_host: OnHost = Tensor.tolist) -> Tensor:
    """`[E, O, I]`: the sum of y[s] x[s]^T over each expert's rows; rows past the last expert take no part."""
    if use_kernels(x_SI):
        return _gemm().grouped_outer(y_SO, x_SI, ends_E)
    if _grouped_mm_takes(x_SI, x_SI.stride(0), max(y_SO.stride()), *y_SO.shape):
        return F.grouped_mm(y_SO.T, x_SI, offs=ends_E)
    return _outer(y_SO, x_SI, _spans(on_host(ends_E)))


def hot_linear(
    x_SI: Tensor,
    weight_NOI: Tensor,
    ends_E: Tensor,
    slot_E: Tensor,
    ids_N: Tensor,
    scaling: float,
    is_partial: bool,
    on_host: OnHost = Tensor.tolist,
) -> Tensor:
    """`[S, O]`: scaling * weight[slot of s's expert] @ x[s]; zeros where that is -1, and past the last expert, where
    there are rows past it (`is_partial`). ids: the experts of the slots."""
    if use_kernels(x_SI, is_thin=True):
        return _gemm().grouped_gemm(x_SI, weight_NOI, ends_E, slot_E, scaling=scaling)
    if not _grouped_mm_takes(x_SI, *weight_NOI.shape[1:]):
        spans = _spans(on_host(ends_E))
        its = [spans[expert] for expert in on_host(ids_N)]
        y_SO = _linear(x_SI, weight_NOI, its, x_SI.new_zeros(x_SI.shape[0], weight_NOI.shape[1]))
        return y_SO if scaling == 1 else y_SO.mul_(scaling)
    weight_EOI = weight_NOI.index_select(0, slot_E.clamp(min=0)) * (slot_E >= 0).view(-1, 1, 1)
    y_SO = grouped_linear(x_SI.contiguous(), weight_EOI.contiguous(), ends_E)
    if scaling != 1:
        y_SO.mul_(scaling)
    if not is_partial:
        return y_SO
    row_S1 = torch.arange(len(x_SI), device=x_SI.device).unsqueeze(1)
    return y_SO.masked_fill(row_S1 >= ends_E[-1], 0)


def hot_outer(y_SO: Tensor, x_SI: Tensor, ends_E: Tensor, ids_N: Tensor, on_host: OnHost = Tensor.tolist) -> Tensor:
    """`[N, O, I]`: `grouped_outer` of the experts in `ids`."""
    if use_kernels(x_SI, is_thin=True):
        return _gemm().grouped_outer(y_SO, x_SI, ends_E, ids_N)
    if not _grouped_mm_takes(x_SI, x_SI.shape[1], *y_SO.shape):
        spans = _spans(on_host(ends_E))
        return _outer(y_SO, x_SI, [spans[expert] for expert in on_host(ids_N)])
    return grouped_outer(y_SO.contiguous(), x_SI.contiguous(), ends_E).index_select(0, ids_N)


def _linear(x_SI: Tensor, weight_nOI: Tensor, spans: list[tuple[int, int]], y_SO: Tensor) -> Tensor:
    """`y`, in which the rows of each span are those of x times its weights; others stay."""
    for (a, b), weight in zip(spans, weight_nOI.unbind(), strict=True):
        if a < b:
            torch.mm(x_SI[a:b], weight.T, out=y_SO[a:b])
    return y_SO


def _outer(y_SO: Tensor, x_SI: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """`[n, O, I]`: the sum of y[s] x[s]^T over the rows of each span."""
    sum_nOI = x_SI.new_zeros(len(spans), y_SO.shape[1], x_SI.shape[1])
    for (a, b), sum_OI in zip(spans, sum_nOI.unbind(), strict=True):
        if a < b:
            torch.mm(y_SO[a:b].T, x_SI[a:b], out=sum_OI)
    return sum_nOI


def dropped(x_SI: Tensor, p: float, seed: Any, place_S: Tensor) -> Tensor:
    """The same seed gives the same masks. place: which of the drawn rows is a row's mask."""
    generator = torch.Generator(x_SI.device).manual_seed(int(seed))
    mask_SI = torch.empty_like(x_SI, memory_format=torch.contiguous_format).bernoulli_(1 - p, generator=generator)
    mask_SI = mask_SI.index_select(0, place_S)
    return mask_SI.mul_(x_SI).div_(1 - p)


def _spans(ends: list[int]) -> list[tuple[int, int]]:
    """Of each expert the first row and the last one + 1."""
    return list(pairwise([0, *ends]))


def _is_one_kernel(of_gpu: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether torch's grouped product is, on a GPU of this compute capability."""
    return of_gpu[0] in _TORCH_HAS_A_KERNEL and dtype == torch.bfloat16


def _grouped_mm_takes(x_SI: Tensor, *lengths: int) -> bool:
    """float64 is refused, and so is any stride or size (`lengths`) that is no multiple of 16 bytes, in forward or
    backward. On a GPU whose kernel is a loop it would ask the device each time."""
    if x_SI.shape[0] == 0 or x_SI.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if (of_gpu := capability(x_SI.device)) is not None:
        if not _is_one_kernel(of_gpu, x_SI.dtype):
            return False
    elif x_SI.device.type != "cpu":
        return False
    return all(length % (16 // x_SI.element_size()) == 0 for length in lengths)


def use_fused(x: Tensor) -> bool:
    """Whether `kernels.fused` is asked for, which takes the layers that it covers: not by itself until it was timed."""
    is_asked = os.environ.get("HOTLORA_KERNELS") == "fused" and not torch.compiler.is_compiling()
    return is_asked and use_kernels(x, is_thin=True)


def use_kernels(x: Tensor, is_thin: bool = False) -> bool:
    """Whether products of `x` are made by our kernels. is_thin: with factors, of some experts only."""
    chosen = os.environ.get("HOTLORA_KERNELS", "")
    if chosen not in ("", "torch", "triton", "fused"):
        raise HotLoraError(f"HOTLORA_KERNELS is {chosen!r}: it must be torch, triton or fused, or not be set.")
    if chosen == "torch" or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if (of_gpu := capability(x.device)) is not None:
        if of_gpu[0] < 8 and chosen:
            say_once(
                f"HOTLORA_KERNELS is {chosen}, but this GPU's compute capability is {of_gpu[0]}.{of_gpu[1]} and "
                "hotlora's kernels need 8.0: torch's products are used."
            )
        if of_gpu[0] < 8 or (not chosen and not is_thin and _is_one_kernel(of_gpu, x.dtype)):
            return False
    elif x.device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1" or not chosen:
        return False
    if chosen and not _has_triton():
        raise HotLoraError(f"HOTLORA_KERNELS is {chosen}, but Triton is not installed: pip install triton.")
    return _has_triton()


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability; None: no GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _gemm() -> Any:
    from .kernels import gemm

    return gemm


# What torch.compile puts into its graph as one operation each: it knows torch's grouped product in bfloat16 only.
_SCHEMAS: dict[Any, str] = {
    grouped_linear: "(Tensor x, Tensor weight, Tensor ends) -> Tensor",
    grouped_outer: "(Tensor y, Tensor x, Tensor ends) -> Tensor",
    hot_linear: (
        "(Tensor x, Tensor weight, Tensor ends, Tensor slot, Tensor ids, float scaling, bool partial) -> Tensor"
    ),
    hot_outer: "(Tensor y, Tensor x, Tensor ends, Tensor ids) -> Tensor",
    dropped: "(Tensor x, float p, Tensor seed, Tensor place) -> Tensor",
}
_SHAPES: dict[Any, Any] = {
    grouped_linear: lambda x, weight, ends: x.new_empty(x.shape[0], weight.shape[1]),
    grouped_outer: lambda y, x, ends: x.new_empty(len(ends), y.shape[1], x.shape[1]),
    hot_linear: lambda x, weight, ends, slot, ids, scaling, partial: x.new_empty(x.shape[0], weight.shape[1]),
    hot_outer: lambda y, x, ends, ids: x.new_empty(len(ids), y.shape[1], x.shape[1]),
    dropped: lambda x, p, seed, place: torch.empty_like(x),
}
_OPERATIONS = {
    function: torch.library.custom_op(f"hotlora::{function.__name__}", function, mutates_args=(), schema=schema)
    for function, schema in _SCHEMAS.items()
}
for _function, _operation in _OPERATIONS.items():
    _operation.register_fake(_SHAPES[_function])


def _call(function: Any, *args: Any, **outside: Any) -> Tensor:
    """As an operation of the graph, where one is made. outside: what it is given where none is."""
    return _OPERATIONS[function](*args) if torch.compiler.is_compiling() else function(*args, **outside)
