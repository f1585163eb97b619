"""One layer's assignments, added up on the device that its experts live on.

Shape suffixes: E experts, K router's top-k, T tokens, S assignments, C tables, B rows of a batch, D model width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..base import processes
from ..base.errors import ModelError
from ..hf.experts_view import ExpertsView
from ..hf.moe_layers import is_no_expert, unwrap

# What is summed is integers of these units: then a sum does not depend on the order in which a GPU's atomics add, and
# devices without float64 (mps) keep full precision. A float32 weight above 2**-13 is exact. Norms may be larger, and
# sum to 2**33 at most.
UNITS = {"count": 1.0, "mass": 2.0**-36, "saliency": 2.0**-30}
"""the tables, in their order"""


class Counter:
    """Sums one layer's assignments on the device that its experts live on. Never waits for that device."""

    def __init__(self, num_experts: int, held: tuple[str, ...], by_example: list[int], skips_tokens: bool) -> None:
        self.num_experts = num_experts
        self.held = held
        """the C tables' names, of `UNITS`"""
        self.by_example = by_example
        """of which of them each example's own are kept"""
        self.skips_tokens = skips_tokens
        self.num_rows = 0
        """B, the current batch's rows; its tokens come row after row"""
        self.runs = 0
        """how often the layer has run for the current batch: more than once in a model that loops over layers"""
        self.rows: list[Tensor] = []
        """int64 [B, `by_example`, E] of every batch since they were asked for"""
        self.masks: dict[torch.device, Tensor] = {}
        """the current batch's token mask [T], on each device that asked"""
        self.sums: Tensor | None = None
        """int64 [C, E + 1]: in units; the last column takes what does not count"""
        self.bad: Tensor | None = None
        """int64 []: gate weights that are not finite"""
        self.skipped: Tensor | int = 0
        """int64 []: choices of no expert, if `skips_tokens`: expert 0 with weight 0"""
        self.is_expert_parallel = False
        self._waiting: tuple[Tensor, list[Tensor], torch.Size] | None = None
        """of the current call, with saliency: columns [S], counts and mass [S] in units, and the hidden's shape"""

    @property
    def with_saliency(self) -> bool:
        return "saliency" in self.held

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Reads hidden [T, D], top_k_index [T, K], top_k_weights [T, K] by position: their names differ.

        With saliency, gives each assignment to the experts as a token of its own, [S, D], [S, 1] and [S, 1].
        """
        if not self.masks:  # a probe
            return None
        hidden_TD, index_TK, weight_TK = (*args, *kwargs.values())[:3]
        device = index_TK.device
        if self.sums is None:
            self.sums = torch.zeros(len(self.held), self.num_experts + 1, dtype=torch.int64, device=device)
            self.bad = torch.zeros((), dtype=torch.int64, device=device)
            self.is_expert_parallel = ExpertsView(unwrap(module)).is_expert_parallel
            if self.is_expert_parallel and self.with_saliency:
                raise ModelError("saliency is not gathered under expert parallelism: leave one of the two out")
        if device not in self.masks:
            self.masks[device] = next(iter(self.masks.values())).to(device, non_blocking=True)
        mask_T = self.masks[device]
        assert mask_T.numel() == len(index_TK), "the experts must see every token of the batch once"
        weight_TK = weight_TK.reshape(index_TK.shape)
        here_TK = mask_T[:, None] & (index_TK >= 0) & (index_TK < self.num_experts)
        skipped_TK = is_no_expert(index_TK, weight_TK) if self.skips_tokens else torch.zeros_like(here_TK)
        counted_TK = here_TK & ~skipped_TK
        self.skipped = self.skipped + (here_TK & ~counted_TK).sum()
        units_TK = self._units(weight_TK, "mass", counted_TK)
        column_S = torch.where(counted_TK, index_TK, self.num_experts).flatten()
        values = [torch.ones_like(column_S), units_TK.flatten()]
        self.runs += 1
        if not self.with_saliency:
            self._add(column_S, values)
            return None
        self._waiting = column_S, values, hidden_TD.shape
        apart = (
            hidden_TD.reshape(len(index_TK), -1).repeat_interleave(index_TK.shape[1], dim=0),
            index_TK.reshape(-1, 1), weight_TK.reshape(-1, 1),
        )  # fmt: skip
        given = (*apart, *(*args, *kwargs.values())[3:])
        return given[: len(args)], dict(zip(kwargs, given[len(args) :], strict=True))

    def add_up(self, module: nn.Module, args: tuple[Any, ...], output_SD: Tensor) -> Tensor | None:
        """With saliency: reads the norm of each assignment's weighted output [S, D], and gives back those of a token
        added up, as the experts would have."""
        if self._waiting is None:
            return None
        (column_S, values, shape), self._waiting = self._waiting, None
        kind = torch.promote_types(output_SD.dtype, torch.float32)
        norm_S = torch.linalg.vector_norm(output_SD, dim=-1, dtype=kind)
        self._add(column_S, [*values, self._units(norm_S, "saliency", column_S < self.num_experts)])
        return output_SD.view(-1, len(column_S) // shape[:-1].numel(), shape[-1]).sum(dim=1).view(shape)

    def _units(self, values: Tensor, name: str, counted: Tensor) -> Tensor:
        """int64, 0 where not finite, or so large that it would not fit."""
        finite = values.abs() < 2.0**62 * UNITS[name]  # not so for nan
        assert self.bad is not None
        self.bad += (counted & ~finite).sum()
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        return (torch.where(finite, values, 0) / UNITS[name]).round().to(torch.int64)

    def _add(self, column_S: Tensor, values: list[Tensor]) -> None:
        values_CS = torch.stack(values)
        assert self.sums is not None
        self.sums.index_add_(1, column_S, values_CS)
        if not self.by_example:
            return
        rows = self._by_row(column_S, values_CS[self.by_example])
        if self.runs > 1:
            self.rows[-1] += rows
        else:
            self.rows.append(rows)

    def _by_row(self, column_S: Tensor, values_CS: Tensor) -> Tensor:
        """int64 [B, C, E]: the batch's sums, by row; `column_S` is E for what does not count."""
        width = self.num_experts + 1
        slots = max(1, len(column_S) // max(1, self.num_rows))  # of one row
        row_S = torch.arange(len(column_S), device=column_S.device) // slots
        sums = torch.zeros(len(values_CS), self.num_rows * width, dtype=torch.int64, device=column_S.device)
        sums.index_add_(1, row_S * width + column_S, values_CS)
        return sums.view(len(values_CS), self.num_rows, width)[:, :, :-1].transpose(0, 1)

    def rows_to_host(self) -> list[Tensor]:
        """The kept rows of every batch, [B, C, E], which are not kept any longer."""
        rows, self.rows = self.rows, []
        return [batch.cpu() for batch in rows]


def in_units(table: Tensor, name: str) -> Tensor:
    """int64 counts as they are; mass and saliency as float64, from units."""
    return table.clone() if name == "count" else table.double() * UNITS[name]


def sums_of(counters: Sequence[Counter], *, share_out: bool) -> tuple[dict[str, Tensor], Tensor, int]:
    """The tables [L, E] by name, the choices [L] of no expert, and how many numbers were not finite; with share_out
    those of all processes, summed in integers: exact, whatever the order.

    ModelError: a layer's experts were not called.
    """
    if any(counter.sums is None for counter in counters):
        raise ModelError("an MoE layer's experts were not called: this model's forward is not supported")
    sums_LCE = torch.stack([counter.sums[:, :-1].cpu() for counter in counters if counter.sums is not None])
    rest_L2 = torch.tensor([[int(counter.skipped), int(counter.bad or 0)] for counter in counters])
    if share_out:
        sums_LCE, rest_L2 = processes.summed(sums_LCE), processes.summed(rest_L2)
    skipped_L, bad_L = rest_L2.unbind(dim=1)
    names = counters[0].held
    tables = {name: in_units(table, name) for name, table in zip(names, sums_LCE.unbind(dim=1), strict=True)}
    return tables, skipped_L, int(bad_L.sum())
