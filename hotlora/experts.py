"""The mathematics of a routed layer with low-rank updates on the rows of its hot experts.

Shape suffixes: E experts, K experts per token, T tokens, S = T*K assignments (rows), D model width, F expert
width, N hot experts, H rows routed to a hot expert, R rank, P = 2 projections into the expert (gate and up), or 1
where experts have no gate.

A family differs from another in what transformers' `use_experts_implementation` says of it (a gate or none,
biases, weights transposed, gate and up interleaved, a norm after the expert) and in its `_apply_gate`. The factors
have one layout for all.

Rows are sorted by expert once, in the order in which the frozen weights lie in memory, because a grouped
product needs both in the same order. The frozen products are transformers' own, row for row. The hot rows are
then picked out by index, still sorted by expert, and only they meet the low-rank factors: the update is made
of activations, never of weights, so nothing of the size of an expert is formed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class HotFactors:
    """Low-rank factors of the N hot experts of one layer. For hot expert n and its input x:

        gate += scaling * B_gate_up[n, :F] @ A_gate_up[n, :R] @ x
        up   += scaling * B_gate_up[n, F:] @ A_gate_up[n, R:] @ x
        down += scaling * B_down[n] @ A_down[n] @ (act(gate) * up)

    Gate and up have adapters of their own (MoE-Sieve s3, HELLoRA s3). Their A are stacked only so that one
    product makes both. Experts without a gate have the up projection's part alone.
    """

    expert_ids_N: Tensor
    """int64, ascending: hot rows are kept in the order of the experts."""
    A_gate_up: Tensor
    """`[N, P*R, D]`: the gate's R rows, then the up projection's."""
    B_gate_up: Tensor
    """`[N, P*F, R]`: the gate's F rows, then the up projection's."""
    A_down: Tensor
    """`[N, R, F]`."""
    B_down: Tensor
    """`[N, D, R]`."""
    scaling: float
    """lora_alpha / r."""
    dropout: float = 0.0
    """Probability with which an input of the update is dropped; 0 outside training."""
    scale_up_NPF: Tensor | None = None
    """DoRA's magnitude over norm, of each output of gate and up (gate's first): those outputs are multiplied by it.
    None: no DoRA."""
    scale_down_ND: Tensor | None = None
    """The same for the projection out of the experts."""

    @property
    def is_low_rank(self) -> bool:
        """Whether the update is B A x and nothing else."""
        return self.scale_up_NPF is None


class FactorsInPass:
    """What one pass, forward or backward, has of one adapter: its factors, what draws its masks, and its gradients."""

    def __init__(
        self, factors: HotFactors, tensors: Sequence[Tensor], dtype: torch.dtype, seeds: tuple[Any, Any], at_once: bool
    ) -> None:
        """tensors: the four of `factors`, in its order. dtype: of their products. seeds: of the masks into the experts
        and out of them; the same seed gives the same masks. at_once: whether factors are cast here, or each expert's
        where it is used."""
        own = [t.detach() for t in tensors]
        self.A_up, self.B_up, self.A_down, self.B_down = [t.to(dtype) for t in own] if at_once else own
        self.expert_ids_N, self.scaling, self.dtype = factors.expert_ids_N, factors.scaling, dtype
        self.p, (self.up_seed, self.down_seed) = factors.dropout, seeds
        self.trains_A = tensors[0].requires_grad

    @cached_property
    def slots(self) -> dict[int, int]:
        """Expert -> its place among the factors; on a GPU reading it would be a host sync."""
        return {expert: n for n, expert in enumerate(self.expert_ids_N.tolist())}

    @cached_property
    def up_gradients(self) -> tuple[Tensor | None, Tensor]:
        """Of A, or None where it does not train, and of B: zeros, to be added to or replaced."""
        return torch.zeros_like(self.A_up) if self.trains_A else None, torch.zeros_like(self.B_up)

    @cached_property
    def down_gradients(self) -> tuple[Tensor | None, Tensor]:
        return torch.zeros_like(self.A_down) if self.trains_A else None, torch.zeros_like(self.B_down)

    @cached_property
    def up_generator(self) -> torch.Generator:
        """Draws one block's masks after the other's."""
        return torch.Generator().manual_seed(self.up_seed)

    @cached_property
    def down_generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.down_seed)

    def split(self, x: Tensor, dim: int) -> Sequence[Tensor]:
        """What is the gate's and what the up projection's, of an array with P*R or P*F in `dim`."""
        return x.chunk(self.A_up.shape[1] // self.A_down.shape[1], dim)


@dataclass(frozen=True)
class HotWeights:
    """Weights of their own for the N chosen experts of one layer, in place of the frozen ones: full fine-tuning of
    these experts (ESFT)."""

    expert_ids_N: Tensor
    """int64, ascending."""
    up: Tensor
    """`[N, P*F, D]`: the gate's F rows, then the up projection's."""
    down: Tensor
    """`[N, D, F]`."""
    is_low_rank = False


@dataclass(frozen=True)
class Groups:
    """How rows that are sorted by group fall into G groups."""

    ends_G: Tensor
    """int32: group g is the rows from `ends_G[g - 1]` to `ends_G[g]`."""
    tail_S1: Tensor | None = None
    """bool `[S, 1]`: rows past the last group, which grouped_mm leaves uninitialised; None: none are."""


def plain_routed_experts(
    experts: Any,
    hidden_TD: Tensor,
    top_k_index_TK: Tensor,
    top_k_weights_TK: Tensor,
    factors: Sequence[HotFactors | HotWeights] = (),
) -> Tensor:
    """Output `[T, D]` of a frozen experts module, with the updates of `factors` on its hot experts.

    The updates of several adapters add up. With B = 0, or without factors, this is transformers'
    `grouped_mm_experts_forward` bit for bit. An index equal to `num_experts` (an expert on another device, under
    expert parallelism) contributes nothing.
    """
    num_tokens, top_k = top_k_index_TK.shape
    expert_S, order_S = torch.sort(top_k_index_TK.reshape(-1))
    token_S = order_S // top_k
    local_E = torch.arange(experts.num_experts, device=expert_S.device)
    ends_E = torch.searchsorted(expert_S, local_E, right=True, out_int32=True)
    elsewhere_S1 = (expert_S >= experts.num_experts).unsqueeze(1) if _may_be_elsewhere(experts) else None
    rows = _Rows(expert_S, Groups(ends_E, elsewhere_S1))
    count_is_free = expert_S.device.type == "cpu" and not torch.compiler.is_compiling()
    hots = [
        _HotRows(*hot_rows(expert_S, ends_E, f.expert_ids_N, count_is_free), f)
        for f in factors
        if len(f.expert_ids_N) > 0
    ]

    x_SD = hidden_TD.index_select(0, token_S)
    up_SPF = _with_updates(experts, up_projection(experts), x_SD, rows, hots)
    act_SF = experts._apply_gate(up_SPF) if experts.has_gate else experts.act_fn(up_SPF)
    y_SD = _with_updates(experts, "down_proj", act_SF, rows, hots)
    if has_norm_after(experts):
        y_SD = experts.post_expert_norm(y_SD)

    y_SD = y_SD * top_k_weights_TK.reshape(-1).index_select(0, order_S).unsqueeze(1)
    position_S = torch.empty_like(order_S)
    position_S[order_S] = torch.arange(len(order_S), device=order_S.device)
    return y_SD.index_select(0, position_S).view(num_tokens, top_k, hidden_TD.shape[1]).sum(dim=1).to(hidden_TD.dtype)


def _may_be_elsewhere(experts: Any) -> bool:
    """Whether an index may name an expert of another device; transformers 5.17 does not say."""
    return getattr(experts, "_is_expert_parallel", True)


def has_norm_after(experts: Any) -> bool:
    """Whether each expert's output is normed, which transformers has since 5.20."""
    return getattr(experts, "has_post_expert_norm", False)


@dataclass(frozen=True)
class _Rows:
    expert_S: Tensor
    """int64, ascending: each row's expert."""
    groups: Groups


def _with_updates(experts: Any, name: str, x_SI: Tensor, rows: _Rows, hots: "list[_HotRows]") -> Tensor:
    """One projection `[S, O]` with all adapters' updates."""
    y_SO = _base_linear(experts, name, x_SI, rows)
    updates = [(hot.rows_H, _update(experts, name, x_SI, y_SO, rows, hot)) for hot in hots]
    for rows_H, update_HO in updates:
        # In place is safe: autograd keeps no grouped product's output.
        y_SO.index_add_(0, rows_H, update_HO.to(y_SO.dtype))
    return y_SO


def _base_linear(experts: Any, name: str, x_SI: Tensor, rows: _Rows) -> Tensor:
    """The frozen product of one projection, with its bias."""
    weight = getattr(experts, name)
    x_SI = x_SI.to(weight.dtype)
    if isinstance(weight, Tensor):
        y_SO = grouped_linear(x_SI, weight.transpose(1, 2) if experts.is_transposed else weight, rows.groups)
    else:  # a `quantize.QuantizedExperts`
        y_SO = weight.grouped_linear(x_SI, rows.groups, transposed=experts.is_transposed)
    if experts.has_bias:
        y_SO.add_(_biases(experts, name, rows.expert_S))
    return y_SO


def _biases(experts: Any, name: str, expert_S: Tensor) -> Tensor:
    """`[S, O]`"""
    bias_SO: Tensor = getattr(experts, f"{name}_bias").index_select(0, expert_S.clamp(max=experts.num_experts - 1))
    return bias_SO


def local_weight(experts: Any, name: str) -> Any:
    """The weights, or of weights that are spread over processes by expert those that are here."""
    weight = getattr(experts, name)
    return weight.to_local() if hasattr(weight, "to_local") else weight


def ids_here(experts: Any) -> range:
    """The experts whose weights this process has: all, but for expert parallelism, which gives each process a run."""
    number = int(experts.num_experts)
    mesh = getattr(experts.down_proj, "device_mesh", None)
    if mesh is None or not getattr(experts, "_is_expert_parallel", False):
        return range(number)
    start = mesh.get_local_rank("ep") * number
    return range(start, start + number)


def up_projection(experts: Any) -> str:
    """The name of the weights that lead into an expert."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def grouped_linear(x_SI: Tensor, weight_GOI: Tensor, groups: Groups) -> Tensor:
    """`y[s] = weight[group of s] @ x[s]`, `[S, O]`; past the last group zero, here and in x's grad."""
    if torch.compiler.is_compiling():  # `grouped` has the operation
        return cast(Tensor, torch.ops.hotlora.grouped_linear(x_SI, weight_GOI, groups.ends_G))
    if groups.tail_S1 is not None:
        x_SI = x_SI.masked_fill(groups.tail_S1, 0)
    if _grouped_mm_takes(x_SI, weight_GOI):
        y_SO = F.grouped_mm(x_SI, weight_GOI.transpose(1, 2), offs=groups.ends_G)
    else:
        ends = groups.ends_G.tolist()
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        parts = x_SI.split([*sizes, x_SI.shape[0] - sum(sizes)])
        products = [part @ weight.T for part, weight in zip(parts, weight_GOI.unbind(), strict=False)]
        y_SO = torch.cat([*products, x_SI.new_zeros(parts[-1].shape[0], weight_GOI.shape[1])])
    return y_SO if groups.tail_S1 is None else y_SO.masked_fill(groups.tail_S1, 0)


def grouped_outer(y_SO: Tensor, x_SI: Tensor, groups: Groups) -> Tensor:
    """`[G, O, I]`: the sum of y[s] x[s]^T over each group's rows; rows past the last group take no part.

    The weight's gradient in `grouped_linear`.
    """
    if _grouped_mm_takes(x_SI, y_SO.unsqueeze(0)):
        return F.grouped_mm(y_SO.T, x_SI, offs=groups.ends_G)
    ends = groups.ends_G.tolist()
    spans = zip([0, *ends], ends, strict=False)
    return torch.stack([y_SO[a:b].T @ x_SI[a:b] for a, b in spans])


def up_parts(experts: Any, up_SPF: Tensor) -> Sequence[Tensor]:
    """The gate's and the up projection's share of what experts have together, as views; all of it without a gate."""
    if not experts.has_gate:
        return [up_SPF]
    return up_SPF.chunk(2, dim=1) if experts.is_concatenated else [up_SPF[:, 0::2], up_SPF[:, 1::2]]


def _grouped_mm_takes(x_SI: Tensor, weight_GOI: Tensor) -> bool:
    """float64 is refused, and so is any stride that is no multiple of 16 bytes, in forward or backward."""
    if x_SI.shape[0] == 0 or x_SI.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if x_SI.device.type == "cuda":
        if torch.cuda.get_device_capability(x_SI.device) < (8, 0):
            return False
    elif x_SI.device.type != "cpu":
        return False
    step = 16 // x_SI.element_size()
    return all(n % step == 0 for n in (x_SI.stride(0), max(weight_GOI.stride()[1:]), *weight_GOI.shape[1:]))


@dataclass(frozen=True)
class _HotRows:
    rows_H: Tensor
    """int64: the hot rows' places among the sorted rows, ascending, so sorted by expert too."""
    groups: Groups
    factors: HotFactors | HotWeights


def hot_rows(expert_S: Tensor, ends_E: Tensor, expert_ids_N: Tensor, count_is_free: bool) -> tuple[Tensor, Groups]:
    """Places `[H]` of the hot rows among the rows that are sorted by expert, ascending, and their groups.

    The hot rows and nothing else where their number is free to read, as on the CPU. On a GPU reading it would be a
    host sync: there H is S, hot rows come first, and the others are a tail that grouped_mm skips.
    """
    sizes_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    ends_N = sizes_E.index_select(0, expert_ids_N).cumsum(0, dtype=torch.int32)
    # One place more than experts, for the index that means "on another device".
    hot_E = torch.zeros(len(ends_E) + 1, dtype=torch.bool, device=expert_S.device)
    hot_S = hot_E.index_fill_(0, expert_ids_N, True).index_select(0, expert_S)
    if count_is_free:
        return hot_S.nonzero().squeeze(1), Groups(ends_N)
    rows_S = torch.sort(hot_S, descending=True, stable=True).indices
    tail_S = torch.arange(len(rows_S), device=rows_S.device) >= ends_N[-1]
    return rows_S, Groups(ends_N, tail_S.unsqueeze(1))


def _update(experts: Any, name: str, x_SI: Tensor, base_SO: Tensor, rows: _Rows, hot: _HotRows) -> Tensor:
    """`[H, O]`: what one adapter adds to one projection of its hot rows, in the order in which the experts have it."""
    factors, is_up = hot.factors, name != "down_proj"
    x_HI = x_SI.index_select(0, hot.rows_H).to(compute_dtype(factors))
    if isinstance(factors, HotFactors):
        update_HO = _up_update(x_HI, hot.groups, experts, factors) if is_up else _down_update(x_HI, hot.groups, factors)
        scale_NO = factors.scale_up_NPF if is_up else factors.scale_down_ND
    else:
        weight_NOI = (factors.up if is_up else factors.down).to(x_HI.dtype)
        update_HO, scale_NO = grouped_linear(x_HI, weight_NOI, hot.groups), None
    if is_up and experts.has_gate and not experts.is_concatenated:
        update_HO = _interleaved(update_HO)
    if factors.is_low_rank:
        return update_HO
    expert_H = rows.expert_S.index_select(0, hot.rows_H)
    base_HO = base_SO.index_select(0, hot.rows_H)
    bias_HO = _biases(experts, name, expert_H) if experts.has_bias else 0
    if scale_NO is None:
        update_HO = (update_HO + bias_HO) - base_HO
    else:  # as PEFT's DoRA: (c - 1) W x + c B A x
        if is_up and experts.has_gate and not experts.is_concatenated:
            scale_NO = _interleaved(scale_NO)
        slot_H = torch.searchsorted(factors.expert_ids_N, expert_H).clamp(max=len(scale_NO) - 1)
        scale_HO = scale_NO.index_select(0, slot_H)
        update_HO = (scale_HO - 1) * (base_HO - bias_HO) + scale_HO * update_HO
    return update_HO if hot.groups.tail_S1 is None else update_HO.masked_fill(hot.groups.tail_S1, 0)


def _up_update(x_HD: Tensor, groups: Groups, experts: Any, factors: HotFactors) -> Tensor:
    """`[H, P*F]`: gate, then up."""
    parts, dtype = (2 if experts.has_gate else 1), x_HD.dtype
    x_HD = F.dropout(x_HD, factors.dropout)  # one mask for gate and up
    z_HPR = grouped_linear(x_HD, factors.A_gate_up.to(dtype), groups) * factors.scaling
    B_parts = factors.B_gate_up.to(dtype).chunk(parts, dim=1)
    updates = [grouped_linear(z, B, groups) for z, B in zip(z_HPR.chunk(parts, dim=1), B_parts, strict=True)]
    return torch.cat(updates, dim=1)


def _down_update(act_HF: Tensor, groups: Groups, factors: HotFactors) -> Tensor:
    dtype = act_HF.dtype
    z_HR = grouped_linear(F.dropout(act_HF, factors.dropout), factors.A_down.to(dtype), groups) * factors.scaling
    return grouped_linear(z_HR, factors.B_down.to(dtype), groups)


def _interleaved(x_HO: Tensor) -> Tensor:
    """Gate and up in turn, out of gate then up."""
    # By index, for the backward of a stack hands a grouped product strides that it does not take.
    places = torch.arange(x_HO.shape[1], device=x_HO.device).view(2, -1).T.flatten()
    return x_HO.index_select(1, places)


def compute_dtype(factors: HotFactors | HotWeights) -> torch.dtype:
    """The factors' own, as in PEFT's Linear. Autocast does not know grouped_mm, so it is followed by hand."""
    own = factors.A_down if isinstance(factors, HotFactors) else factors.down
    device_type = own.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else own.dtype
