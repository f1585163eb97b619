"""What an adapter does to the rows of its hot experts: a low-rank update, DoRA's, or weights of their own.

An update has two sides. What an adapter hands over, with tensors that autograd knows (`LowRank`, `Full`), and what one
pass through the layer, forward or backward, works with: `in_pass` makes it. In a pass an update meets rows through what
the products of a device offer (`cpu.Hot`, `gpu.Hot`); rows of other experts are zero there, or left alone.

Every update may scale the base's own product: y = c * (W x) + bias + what is added. DoRA's c is its magnitude over
norm, and weights in the base's place have c = 0.

Shape suffixes: N hot experts, S rows (token-expert assignments, sorted by expert), R rank, D model width, F expert
width, P = 2 projections into an expert (gate and up), or 1 where experts have no gate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """Low-rank factors of the N hot experts of one layer. For hot expert n and its input x:

        gate += scaling * B_gate_up[n, :F] @ A_gate_up[n, :R] @ x
        up   += scaling * B_gate_up[n, F:] @ A_gate_up[n, R:] @ x
        down += scaling * B_down[n] @ A_down[n] @ (act(gate) * up)

    Gate and up have adapters of their own (MoE-Sieve s3, HELLoRA s3). Their A are stacked only so that one product
    makes both. Experts without a gate have the up projection's part alone.
    """

    expert_ids_N: Tensor
    """int64, ascending."""
    A_gate_up: Tensor
    """`[N, P*R, D]`: the gate's R rows, then the up projection's."""
    B_gate_up: Tensor
    """`[N, P*F, R]`: the gate's F rows, then the up projection's."""
    A_down: Tensor
    """`[N, R, F]`."""
    B_down: Tensor
    """`[N, D, R]`."""
    scaling: float | Tensor
    """lora_alpha / r; float64 `[N]` where experts have ranks of their own, whose factors have zeros up to the largest,
    R."""
    dropout: float = 0.0
    """Probability with which an input of the update is dropped; 0 outside training."""
    scale_up_NPF: Tensor | None = None
    """DoRA's magnitude over norm, of each output of gate and up (gate's first): those outputs are multiplied by it.
    None: no DoRA."""
    scale_down_ND: Tensor | None = None
    """The same for the projection out of the experts."""

    @property
    def tensors(self) -> list[Tensor]:
        """What autograd has to know of. DoRA's scales are in B, too: c B A x needs no array of all rows."""
        factors = [self.A_gate_up, self.B_gate_up, self.A_down, self.B_down]
        if self.scale_up_NPF is None or self.scale_down_ND is None:
            return factors
        factors[1] = self.scale_up_NPF.unsqueeze(2) * self.B_gate_up
        factors[3] = self.scale_down_ND.unsqueeze(2) * self.B_down
        return [*factors, self.scale_up_NPF, self.scale_down_ND]

    @property
    def num_tensors(self) -> int:
        """As many as `tensors` has."""
        return 4 if self.scale_up_NPF is None else 6

    def in_pass(self, tensors: Sequence[Tensor], dtype: torch.dtype, source: Any) -> "LowRankPass":
        """What a pass works with. tensors: as `tensors`; dtype: of the products; source: see `LowRankPass`."""
        return LowRankPass(self, tensors, dtype, source)


@dataclass(frozen=True)
class Full:
    """Weights of their own for the N chosen experts of one layer, in place of the frozen ones: full fine-tuning of
    these experts (ESFT)."""

    expert_ids_N: Tensor
    """int64, ascending."""
    up: Tensor
    """`[N, P*F, D]`: the gate's F rows, then the up projection's."""
    down: Tensor
    """`[N, D, F]`."""
    dropout = 0.0
    num_tensors = 2

    @property
    def tensors(self) -> list[Tensor]:
        return [self.up, self.down]

    def in_pass(self, tensors: Sequence[Tensor], dtype: torch.dtype, source: Any) -> "FullPass":
        return FullPass(self, tensors, dtype)


Update = LowRank | Full


def compute_dtype(update: Update) -> torch.dtype:
    """The factors' own, as in PEFT's Linear. Autocast does not know grouped products, so it is followed by hand."""
    device_type = update.expert_ids_N.device.type
    own = (update.down if isinstance(update, Full) else update.A_down).dtype
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else own


def rows_at_once(rows: int, row_bytes: int, most: int) -> int:
    """Of blocks of `most` bytes, one row at least. A compiled graph has one block, as the number of rows may change."""
    return rows if torch.compiler.is_compiling() else max(1, most // max(1, row_bytes))


def dots(x_SI: Tensor, y_SI: Tensor) -> Tensor:
    """`[S]`: of each row the product of x and y, in float32 at least."""
    wide = torch.promote_types(torch.promote_types(x_SI.dtype, y_SI.dtype), torch.float32)
    if x_SI.dtype == wide:
        return torch.linalg.vecdot(x_SI, y_SI.to(wide))
    return x_SI.to(wide).mul_(y_SI).sum(-1)  # vecdot in one float32 array, not three


class LowRankPass:
    """One adapter's factors in one pass, forward or backward, and their gradients."""

    def __init__(self, update: LowRank, tensors: Sequence[Tensor], dtype: torch.dtype, source: Any) -> None:
        """tensors: as `LowRank.tensors`. dtype: of the products. source: what masks are drawn from, into the experts,
        out of them, and out of them once more in the same pass; the same gives the same masks."""
        self.expert_ids_N, self.scaling, self.p, self.dtype = update.expert_ids_N, update.scaling, update.dropout, dtype
        self.A_up, self.B_up, self.A_down, self.B_down = (t.detach() for t in tensors[:4])
        self.up_source, self.down_source, self.down_again = source
        self.base_scales = tuple(t.detach() for t in tensors[4:])
        """of the base's outputs into the experts and out of them, `[N, P*F]` and `[N, D]`; none without DoRA"""
        self.gradients: list[Tensor | None] = []

    def make_gradients(self, tensors: Sequence[Tensor]) -> None:
        """Zeros, which `up_backward` and `down_backward` fill; None for what does not train."""
        self.gradients = [torch.zeros_like(t) if t.requires_grad else None for t in tensors]

    def up(self, hot: Any, parts: Sequence[Tensor], x_SD: Tensor) -> None:
        """Adds the update of the projections into the experts to their outputs' `parts`."""
        A_up, B_up = hot.weights(self.A_up, self.B_up)
        dropped = hot.dropout(self.p, self.up_source)(hot.rows(x_SD))
        z_HPR = hot.product(dropped, A_up, self.scaling)
        for part, z_HR, B in zip(parts, z_HPR.chunk(len(parts), 1), B_up.chunk(len(parts), 1), strict=True):
            hot.add_product(part, z_HR, B)

    def down(self, hot: Any, y_SD: Tensor, act_SF: Tensor, again: bool = False) -> None:
        """Adds the update of the projection out of the experts to `y`. again: for a second time in one pass."""
        A_down, B_down = hot.weights(self.A_down, self.B_down)
        dropped = hot.dropout(self.p, self.down_again if again else self.down_source)(hot.rows(act_SF))
        hot.add_product(y_SD, hot.product(dropped, A_down, self.scaling), B_down)

    def down_backward(
        self, hot: Any, u_SF: Tensor, dweight_S: Tensor, act_SF: Tensor, grad_SD: Tensor, weight_S1: Tensor
    ) -> None:
        """Makes the gradients of A, where it trains, and B; adds the input's, not yet times the routing weights, to
        `u`, and the routing weights' to `dweight`: <g, B A h> is <B^T g, A h>."""
        A_down, B_down = hot.weights(self.A_down, self.B_down)
        drop = hot.dropout(self.p, self.down_source)
        dropped, grad, weight_H1 = drop(hot.rows(act_SF)), hot.rows(grad_SD), hot.own(weight_S1)
        g_HR = hot.product(grad, B_down.transpose(1, 2), self.scaling)
        z_HR = hot.product(dropped, A_down)
        hot.add(dweight_S, dots(g_HR, z_HR))
        dA, dB = self.gradients[2:4]
        if dA is not None:
            hot.outer(dA, g_HR * weight_H1, dropped)
        if dB is not None:
            each = hot.by_rows(self.scaling, weight_S1.dtype) if isinstance(self.scaling, Tensor) else self.scaling
            hot.outer(dB, grad, z_HR * (weight_H1 * each).to(weight_S1.dtype))
        hot.add_product(u_SF, g_HR, A_down.transpose(1, 2), drop)

    def up_backward(self, hot: Any, dx_SD: Tensor, dparts: Sequence[Tensor], hidden_TD: Tensor) -> None:
        """Makes the gradients of A, where it trains, and B; adds the input's to `dx`."""
        A_up, B_up = hot.weights(self.A_up, self.B_up)
        drop, number = hot.dropout(self.p, self.up_source), len(dparts)
        dropped, dparts = drop(hot.picked(hidden_TD)), [hot.rows(dpart) for dpart in dparts]
        z_HPR = hot.product(dropped, A_up, self.scaling)
        dA, dB = self.gradients[:2]
        if dB is not None:
            for dB_part, dpart, z_HR in zip(dB.chunk(number, 1), dparts, z_HPR.chunk(number, 1), strict=True):
                hot.outer(dB_part, dpart, z_HR)
        B_parts = B_up.transpose(1, 2).chunk(number, 2)
        g_HPR = torch.cat([hot.product(d, B, self.scaling) for d, B in zip(dparts, B_parts, strict=True)], dim=1)
        if dA is not None:
            hot.outer(dA, g_HPR, dropped)
        del dropped  # as large as dx, and so is what comes
        hot.add_product(dx_SD, g_HPR, A_up.transpose(1, 2), drop)


class FullPass:
    """The chosen experts' own weights in one pass, and their gradients."""

    def __init__(self, update: Full, tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.expert_ids_N, self.dtype, self.p = update.expert_ids_N, dtype, 0.0
        self.up_weight, self.down_weight = (t.detach() for t in tensors)
        self.base_scales = tuple(t.new_zeros(t.shape[:2]) for t in (self.up_weight, self.down_weight))
        self.gradients: list[Tensor | None] = []

    def make_gradients(self, tensors: Sequence[Tensor]) -> None:
        self.gradients = [torch.zeros_like(t) if t.requires_grad else None for t in tensors]

    def up(self, hot: Any, parts: Sequence[Tensor], x_SD: Tensor) -> None:
        (up,), x = hot.weights(self.up_weight), hot.rows(x_SD)
        # Not into `part` at once: with columns apart, torch's rounding there depends on the weights' address.
        for part, weight in zip(parts, up.chunk(len(parts), 1), strict=True):
            hot.add(part, hot.product(x, weight))

    def down(self, hot: Any, y_SD: Tensor, act_SF: Tensor, again: bool = False) -> None:
        hot.add_product(y_SD, hot.own(act_SF), *hot.weights(self.down_weight))

    def down_backward(
        self, hot: Any, u_SF: Tensor, dweight_S: Tensor, act_SF: Tensor, grad_SD: Tensor, weight_S1: Tensor
    ) -> None:
        """As `LowRankPass.down_backward`."""
        (down,), act_HF = hot.weights(self.down_weight), hot.own(act_SF)
        u_HF = hot.product(hot.rows(grad_SD), down.transpose(1, 2))
        hot.add(dweight_S, dots(u_HF, act_HF))
        hot.add(u_SF, u_HF)
        if (ddown := self.gradients[1]) is not None:
            hot.outer(ddown, hot.rows(grad_SD * weight_S1), act_HF)

    def up_backward(self, hot: Any, dx_SD: Tensor, dparts: Sequence[Tensor], hidden_TD: Tensor) -> None:
        """As `LowRankPass.up_backward`."""
        (up,), x_HD = hot.weights(self.up_weight), hot.picked(hidden_TD)
        for i, (dpart, weight) in enumerate(zip(dparts, up.chunk(len(dparts), 1), strict=True)):
            hot.add_product(dx_SD, hot.own(dpart), weight.transpose(1, 2))
            if (dup := self.gradients[0]) is not None:
                hot.outer(dup.chunk(len(dparts), 1)[i], hot.rows(dpart), x_HD)
