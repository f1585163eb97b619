"""PERFT's adapters (arXiv 2411.08212, 2508.02587 and their authors' code): beside the experts, around them as a whole.

Each is B A of rank r from the model's width back to it, without an activation (their LoRA form). It gets what the
experts get, and is added to what they give: no weight of the base can hold it, and servers do not know it.

    E  one for every planned expert, for its tokens, times their routing weights
    R  M of them with a router of their own, which chooses K for each token
    D  M of them for every token, added up; with M = 1 it is PERFT-S

Readings: B starts at zero (theirs at 1e-6 times normal numbers), so that training starts at the base exactly. R weights
its adapters by its own router, as the text says; their OLMoE code takes the base router's weights. R's router starts as
A does, and A as PEFT's. They stand at the experts module: where a family projects its input first, or scales what it
gives, that goes for them, too. No load-balancing loss for R's router: hotlora's is the base router's alone, and off
unless asked for.

Shape suffixes: M adapters, R rank, D model width, T tokens, K chosen, S = T*K rows sorted by adapter.
"""

from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from ..base.errors import HotLoraError
from ..layer.gpu import grouped_linear, grouped_outer
from .experts import HotExperts
from .factors import at_least_float32, in_their_own_dtype, new_factor

KINDS = ("E", "R", "D")


class ParallelAdapters(HotExperts):
    """`perft` on one layer: around transformers' experts module.

    Holds per adapter A `[M, R, D]`, B `[M, D, R]`, and for R the router `[M, D]`.
    """

    adapter_layer_names = ("lora_A_parallel", "lora_B_parallel", "lora_router_parallel")

    lora_A_parallel: nn.ParameterDict
    lora_B_parallel: nn.ParameterDict
    lora_router_parallel: nn.ParameterDict

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        options: Any = config
        ids = self._ids_planned(config, kwargs["target_name"])
        self.expert_ids[adapter_name] = ids
        self._options[adapter_name] = options
        place_of = {expert: n for n, expert in enumerate(ids)}
        self._places[adapter_name] = tuple(place_of.get(e, len(ids)) for e in range(self.view.num_experts + 1))
        number = len(ids) if options.perft == "E" else options.perft_adapters
        width, device = self.view.widths[0], self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        is_zero = bool(config.init_lora_weights)
        self.lora_A_parallel[adapter_name] = new_factor((number, r, width), device)
        self.lora_B_parallel[adapter_name] = new_factor((number, width, r), device, is_zero)
        if options.perft == "R":
            self.lora_router_parallel[adapter_name] = new_factor((number, width), device)
        self._add_adapter(adapter_name, r, lora_alpha, config)

    def _prepare(self) -> None:
        super()._prepare()
        self._options: dict[str, Any] = {}
        self._places: dict[str, tuple[int, ...]] = {}
        """adapter -> each expert's place in the plan, past the last one where it has none"""

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, adapter_names: Any = None
    ) -> Tensor:
        """As `HotExperts.forward`: `[T, D]`."""
        output: Tensor = self.base_layer(hidden_states, top_k_index, top_k_weights)
        for name in self._active_here(adapter_names):
            output = output + self._added(name, hidden_states, top_k_index, top_k_weights).to(output.dtype)
        return output

    def _added(self, name: str, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        A_MRD, B_MDR = self.lora_A_parallel[name], self.lora_B_parallel[name]
        x_TD = self.lora_dropout[name](hidden_TD.to(A_MRD.dtype))
        kind, scaling = self._options[name].perft, self.scaling[name]
        if kind == "D":
            z = nn.functional.linear(x_TD, A_MRD.flatten(0, 1))
            return nn.functional.linear(z, B_MDR.transpose(0, 1).flatten(1, 2)) * scaling
        if kind == "R":
            index_TK, weight_TK = self._routed(name, hidden_TD)
        else:
            index_TK, weight_TK = self._of_planned(name, index_TK, weight_TK.reshape(index_TK.shape))
        return _routed_low_rank(x_TD, index_TK, weight_TK.to(x_TD.dtype) * scaling, A_MRD, B_MDR)

    def _routed(self, name: str, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        """By a router of their own; as its model's, it makes the chosen ones' weights sum to 1 or does not."""
        router_MD, options = self.lora_router_parallel[name], self._options[name]
        with in_their_own_dtype(router_MD):
            share_TM = nn.functional.linear(at_least_float32(hidden_TD), at_least_float32(router_MD)).softmax(-1)
        weight_TK, index_TK = share_TM.topk(options.perft_top_k)
        if options._norm_topk:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        return index_TK, weight_TK

    def _of_planned(self, name: str, index_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Experts by their place in the plan; the others past the last place."""
        place_E = self._sent(self._places[name], index_TK.device)
        return place_E[index_TK.clamp(0, self.view.num_experts)], weight_TK

    def get_delta_weight(self, adapter: str) -> tuple[Tensor, Tensor]:
        raise HotLoraError(UNMERGED)

    def _deltas(self, adapter: str) -> Any:
        raise HotLoraError(UNMERGED)

    def slots(self, path: str, adapter: str) -> Any:
        yield from ()  # none of one of the base's weights


UNMERGED = (
    "PERFT's adapters stand beside the experts, and no weight of the base can hold them: they cannot be merged or "
    "exported. Use the adapter with hotlora (hotlora.load, hotlora chat, evaluate), or train with another method."
)


def _routed_low_rank(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, A_MRD: Tensor, B_MDR: Tensor) -> Tensor:
    """The sum over a token's K adapters of weight * B A x, `[T, D]`; an index of M is none."""
    number, top_k = len(A_MRD), index_TK.shape[1]
    adapter_S, order_S = index_TK.flatten().sort(stable=True)
    ends_M = torch.searchsorted(adapter_S, torch.arange(number, device=x_TD.device), right=True).to(torch.int32)
    is_one_S1, token_S = (adapter_S < number)[:, None], order_S // top_k
    x_SD = torch.where(is_one_S1, x_TD[token_S], 0)
    y_SD = _GroupedLinear.apply(_GroupedLinear.apply(x_SD, A_MRD, ends_M), B_MDR, ends_M)
    y_SD = torch.where(is_one_S1, y_SD, 0) * weight_TK.flatten()[order_S, None]
    return torch.zeros_like(x_TD).index_add(0, token_S, y_SD)


class _GroupedLinear(torch.autograd.Function):
    """`grouped_linear` with gradients; rows past the last expert hold anything, in both directions."""

    @staticmethod
    def forward(ctx: Any, x_SI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x_SI, weight_EOI, ends_E)
        return grouped_linear(x_SI, weight_EOI, ends_E)

    @staticmethod
    def backward(ctx: Any, grad_SO: Tensor) -> tuple[Tensor, Tensor, None]:
        x_SI, weight_EOI, ends_E = ctx.saved_tensors
        grad_SO = grad_SO.contiguous()
        dx_SI = grouped_linear(grad_SO, weight_EOI.transpose(1, 2).contiguous(), ends_E)
        return dx_SI, grouped_outer(grad_SO, x_SI, ends_E), None
