"""How a GPU computes the routed layer: all experts in one grouped product, and no number that it would have to be
asked for.

How many rows are hot is not known to the host, so the hot rows' arrays have S rows: hot ones first, sorted by expert,
then a tail that grouped products skip and that is masked.

Shape suffixes as in `experts`; here H = S.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .experts import Groups, HotFactors, grouped_linear, grouped_outer, hot_rows, up_parts


class Rows:
    """The S assignments, sorted by expert; rows of experts on other devices come last."""

    def __init__(self, num_experts: int, top_k_index_TK: Tensor) -> None:
        self.expert_S, self.order_S = torch.sort(top_k_index_TK.reshape(-1))
        self.top_k = top_k_index_TK.shape[1]
        ids_E = torch.arange(num_experts, device=self.expert_S.device)
        self.ends_E = torch.searchsorted(self.expert_S, ids_E, right=True, out_int32=True)
        self.groups = Groups(self.ends_E, (self.expert_S >= num_experts).unsqueeze(1))

    @property
    def token_S(self) -> Tensor:
        return self.order_S // self.top_k

    def product(self, x_SI: Tensor, weight_EIO: Tensor) -> Tensor:
        """Each row times its expert's weights `[S, O]`; zeros in rows of no expert here."""
        return grouped_linear(x_SI, weight_EIO.transpose(1, 2), self.groups)

    def add_bias(self, y_SO: Tensor, bias_EO: Tensor) -> None:
        y_SO += self._bias_of_rows(bias_EO)

    def dot_bias(self, g_SO: Tensor, bias_EO: Tensor) -> Tensor:
        """`[S]`: each row's product with its expert's bias."""
        return torch.linalg.vecdot(g_SO, self._bias_of_rows(bias_EO).to(g_SO.dtype))

    def _bias_of_rows(self, bias_EO: Tensor) -> Tensor:
        elsewhere_S1 = self.groups.tail_S1
        assert elsewhere_S1 is not None
        bias_SO = bias_EO.index_select(0, self.expert_S.clamp(max=len(bias_EO) - 1))
        return bias_SO.masked_fill(elsewhere_S1, 0)


class Hot:
    """One adapter's factors in the dtype of their products, and its hot rows."""

    def __init__(self, factors: HotFactors, tensors: Sequence[Tensor], rows: Rows, dtype: torch.dtype) -> None:
        self.A_up, self.B_up, self.A_down, self.B_down = (t.detach().to(dtype) for t in tensors)
        self.scaling, self.p, self.dtype = factors.scaling, factors.dropout, dtype
        self.rows_H, self.groups = hot_rows(rows.expert_S, rows.ends_E, factors.expert_ids_N, count_is_free=False)

    def up(self, experts: Any, up_SPF: Tensor, x_SD: Tensor, seed: int) -> None:
        """Adds the update of the projections into the experts to `up`."""
        x_HD = self._dropped(self._pick(x_SD), seed)
        z_HPR = grouped_linear(x_HD, self.A_up, self.groups) * self.scaling
        pairs = zip(up_parts(experts, up_SPF), self._split(z_HPR), self._split(self.B_up), strict=True)
        for part, z_HR, B in pairs:
            part.index_add_(0, self.rows_H, grouped_linear(z_HR, B, self.groups).to(part.dtype))

    def down(self, y_SD: Tensor, act_SF: Tensor, seed: int) -> None:
        """Adds the update of the projection out of the experts to `y`."""
        act_HF = self._dropped(self._pick(act_SF), seed)
        z_HR = grouped_linear(act_HF, self.A_down, self.groups) * self.scaling
        y_SD.index_add_(0, self.rows_H, grouped_linear(z_HR, self.B_down, self.groups).to(y_SD.dtype))

    def down_backward(
        self, u_SF: Tensor, dweight_S: Tensor, act_SF: Tensor, grad_SD: Tensor, weight_S1: Tensor, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Gradients of A and B; adds the input's, not yet times the routing weights, to `u`, and the routing weights'
        to `dweight`: <g, B A h> is <B^T g, A h>."""
        act_HF, g_HD = self._dropped(self._pick(act_SF), seed), self._pick(grad_SD)
        weight_H1 = weight_S1.index_select(0, self.rows_H)
        g_HR = grouped_linear(g_HD, self.B_down.transpose(1, 2), self.groups) * self.scaling
        z_HR = grouped_linear(act_HF, self.A_down, self.groups)
        wide = dweight_S.dtype
        dweight_S.index_add_(0, self.rows_H, torch.linalg.vecdot(g_HR.to(wide), z_HR.to(wide)))
        dA = grouped_outer((g_HR * weight_H1).to(self.dtype), act_HF, self.groups)
        dB = grouped_outer(g_HD, (z_HR * (weight_H1 * self.scaling)).to(self.dtype), self.groups)
        du_HF = self._dropped(grouped_linear(g_HR, self.A_down.transpose(1, 2), self.groups), seed)
        u_SF.index_add_(0, self.rows_H, du_HF.to(u_SF.dtype))
        return dA, dB

    def up_backward(
        self, experts: Any, dx_SD: Tensor, dup_SPF: Tensor, hidden_TD: Tensor, token_S: Tensor, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Gradients of A and B; adds the input's to `dx`."""
        token_H = token_S.index_select(0, self.rows_H)
        x_HD = self._dropped(hidden_TD.index_select(0, token_H).to(self.dtype), seed)
        z_HPR = grouped_linear(x_HD, self.A_up, self.groups) * self.scaling
        parts = [part.contiguous() for part in up_parts(experts, self._pick(dup_SPF))]
        pairs = zip(parts, self._split(z_HPR), strict=True)
        dB = torch.cat([grouped_outer(part, z_HR, self.groups) for part, z_HR in pairs], dim=1)
        pairs = zip(parts, self._split(self.B_up), strict=True)
        g_parts = [grouped_linear(part, B.transpose(1, 2), self.groups) for part, B in pairs]
        g_HPR = torch.cat(g_parts, dim=1) * self.scaling
        dA = grouped_outer(g_HPR, x_HD, self.groups)
        dx_HD = self._dropped(grouped_linear(g_HPR, self.A_up.transpose(1, 2), self.groups), seed)
        dx_SD.index_add_(0, self.rows_H, dx_HD.to(dx_SD.dtype))
        return dA, dB

    def _pick(self, x_SI: Tensor) -> Tensor:
        return x_SI.index_select(0, self.rows_H).to(self.dtype)

    def _split(self, x: Tensor) -> Sequence[Tensor]:
        """What is the gate's and what the up projection's, of `[H, P*R]` or `[N, P*F, R]`."""
        return x.chunk(self.A_up.shape[1] // self.A_down.shape[1], dim=1)

    def _dropped(self, x_HI: Tensor, seed: int) -> Tensor:
        """The same seed gives the same mask."""
        if self.p == 0:
            return x_HI
        generator = torch.Generator(x_HI.device).manual_seed(seed)
        mask_HI = torch.empty_like(x_HI).bernoulli_(1 - self.p, generator=generator)
        return (x_HI * mask_HI) / (1 - self.p)
