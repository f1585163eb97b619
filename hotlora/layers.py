"""The two PEFT layers of a HotLoRA adapter: around an experts module, and around a router.

Neither is a Linear: experts hold all their weights in 3-D parameters, a router holds a raw `[E, D]` weight.
"""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from .errors import HotLoraError, PlanError
from .experts import HotFactors, routed_experts


class MergeableLayer(nn.Module, LoraLayer):
    """What both share: an update that can go into the base layer's weights and come out again."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name

    def _deltas(self, adapter: str) -> Iterator[tuple[Tensor, list[int] | slice, Tensor]]:
        """(parameter, rows, what the adapter adds to them), in float32 at least."""
        raise NotImplementedError

    def _active_here(self, adapter_names: list[str] | None) -> list[str]:
        """Active adapters that have weights in this layer; none while the adapters are disabled or merged."""
        if adapter_names is not None:
            raise HotLoraError("adapter_names: several adapters in a batch are not supported. Use set_adapter.")
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return []
        return [] if self.merged else [name for name in self.active_adapters if name in self.scaling]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the updates to the base weights. `safe_merge` refuses weights that would not be finite."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.scaling:
                self._add(name, 1, safe_merge)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Takes merged updates out again, up to the rounding of the base weights' dtype."""
        while self.merged_adapters:
            self._add(self.merged_adapters.pop(), -1, False)

    @torch.no_grad()
    def _add(self, adapter: str, sign: int, safe: bool) -> None:
        updated = [
            (weight, rows, (weight.data[rows].to(delta.dtype) + sign * delta).to(weight.dtype))
            for weight, rows, delta in self._deltas(adapter)
        ]
        if safe and not all(new.isfinite().all() for _, _, new in updated):
            raise HotLoraError(
                f"merging adapter {adapter!r} gives weights that are not finite: it is broken. Train it anew."
            )
        for weight, rows, new in updated:
            weight.data[rows] = new


class HotLoraExperts(MergeableLayer):
    """Low-rank updates on the planned experts of one layer, around transformers' experts module.

    Holds per adapter what `experts.HotFactors` describes, as parameters that are saved under their own names.
    """

    adapter_layer_names = ("lora_A_gate_up", "lora_B_gate_up", "lora_A_down", "lora_B_down")
    other_param_names = (*LoraLayer.other_param_names, "expert_ids")

    lora_A_gate_up: nn.ParameterDict
    lora_B_gate_up: nn.ParameterDict
    lora_A_down: nn.ParameterDict
    lora_B_down: nn.ParameterDict

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        config, r, lora_alpha = kwargs.pop("config"), kwargs.pop("r"), kwargs.pop("lora_alpha")
        super().__init__(base_layer, adapter_name, **kwargs)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.expert_ids: dict[str, tuple[int, ...]] = {}
        self._ids_on_device: dict[tuple[str, torch.device], Tensor] = {}
        self.update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    @property
    def lora_A(self) -> nn.ParameterDict:  # type: ignore[override]
        """PEFT asks `name in layer.lora_A` to learn whether a layer has an adapter."""
        return self.lora_A_gate_up

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        path = kwargs["target_name"]
        ids = getattr(config, "_expert_ids", {}).get(path)
        if not ids:
            raise PlanError(f"{path} takes adapters from a HotLoraConfig only, with a plan that names it.")
        experts: Any = self.get_base_layer()
        _, width, expert_width = experts.down_proj.shape
        shapes = {
            "lora_A_gate_up": (len(ids), 2 * r, width),
            "lora_B_gate_up": (len(ids), 2 * expert_width, r),
            "lora_A_down": (len(ids), r, expert_width),
            "lora_B_down": (len(ids), width, r),
        }
        # Drawn on the CPU, as PEFT's Linear is, so that one seed gives one adapter whatever the device; not
        # drawn at all for a model without weights.
        device = "meta" if experts.down_proj.device.type == "meta" else "cpu"
        for name, shape in shapes.items():
            factor = torch.empty(shape, device=device)
            if "_B_" in name and config.init_lora_weights:
                factor.zero_()
            else:
                # kaiming_uniform_(a=sqrt(5)) of every factor by itself: the bound is 1/sqrt(in_features).
                bound = 1 / math.sqrt(shape[-1])
                factor.uniform_(-bound, bound)
            getattr(self, name)[adapter_name] = nn.Parameter(factor)
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.use_rslora[adapter_name] = config.use_rslora
        self.scaling[adapter_name] = lora_alpha / math.sqrt(r) if config.use_rslora else lora_alpha / r
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)
        self.expert_ids[adapter_name] = ids
        self._ids_on_device.clear()
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, adapter_names: Any = None
    ) -> Tensor:
        active = self._active_here(adapter_names)
        if not active:
            return self.base_layer(hidden_states, top_k_index, top_k_weights)
        if len(active) > 1:
            raise HotLoraError(f"adapters {active} are active at once, experts take one: use set_adapter.")
        factors = self.factors(active[0])
        return routed_experts(self.get_base_layer(), hidden_states, top_k_index, top_k_weights, factors)

    def factors(self, adapter: str) -> HotFactors:
        """The factors of `adapter` as the mathematics takes them; dropout is 0 outside training."""
        A_gate_up, B_gate_up, A_down, B_down = self._parameters_of(adapter)
        dropout = cast(nn.Dropout, self.lora_dropout[adapter])
        return HotFactors(
            self._ids(adapter, A_gate_up.device),
            A_gate_up,
            B_gate_up,
            A_down,
            B_down,
            scaling=self.scaling[adapter],
            dropout=dropout.p if self.training else 0.0,
        )

    def get_delta_weight(self, adapter: str) -> tuple[Tensor, Tensor]:
        """scaling * B @ A of the planned experts, in float32 at least: `[N, 2F, D]` and `[N, D, F]`."""
        A_gate_up, B_gate_up, A_down, B_down = map(_at_least_float32, self._parameters_of(adapter))
        num_hot, _, width = A_gate_up.shape
        rank = B_gate_up.shape[-1]
        B_N2FR = B_gate_up.reshape(num_hot, 2, -1, rank)
        gate_up = (B_N2FR @ A_gate_up.reshape(num_hot, 2, rank, width)).reshape(num_hot, -1, width)
        return gate_up * self.scaling[adapter], B_down @ A_down * self.scaling[adapter]

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {len(ids)} experts, r={self.r[name]}" for name, ids in self.expert_ids.items())

    def _deltas(self, adapter: str) -> Iterator[tuple[Tensor, list[int] | slice, Tensor]]:
        experts: Any = self.get_base_layer()
        ids = list(self.expert_ids[adapter])
        gate_up, down = self.get_delta_weight(adapter)
        yield experts.gate_up_proj, ids, gate_up
        yield experts.down_proj, ids, down

    def _parameters_of(self, adapter: str) -> list[Tensor]:
        return [getattr(self, name)[adapter] for name in self.adapter_layer_names]

    def _ids(self, adapter: str, device: torch.device) -> Tensor:
        """Expert ids on the device, sent there once. Not a buffer: buffers made on meta are lost with it."""
        key = (adapter, device)
        if key not in self._ids_on_device:
            with torch.inference_mode(False):  # a tensor born in inference mode could not be used in training later
                self._ids_on_device[key] = torch.tensor(self.expert_ids[adapter], device=device)
        return self._ids_on_device[key]

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int] | tuple[None, None]:
        return None, None

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, torch.dtype]:
        return base_layer.gate_up_proj.device, base_layer.gate_up_proj.dtype


class HotLoraRouter(MergeableLayer):
    """LoRA on a router that holds a raw `[E, D]` weight: the family's own routing runs on W + scaling * B @
    A.

    The update is made in the weight, so the sum is rounded to the weight's dtype and dropout does not apply.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        config, r, lora_alpha = kwargs.pop("config"), kwargs.pop("r"), kwargs.pop("lora_alpha")
        super().__init__(base_layer, adapter_name, **kwargs)
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def forward(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        active = self._active_here(adapter_names)
        if not active:
            return self.base_layer(*args, **kwargs)
        weight = cast(Tensor, self.get_base_layer().weight)
        delta = torch.stack([self.get_delta_weight(name) for name in active]).sum(0)
        adapted = (weight.to(delta.dtype) + delta).to(weight.dtype)
        return torch.func.functional_call(self.base_layer, {"weight": adapted}, args, kwargs)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """scaling * B @ A, `[E, D]`, in float32 at least."""
        A, B = cast(nn.Linear, self.lora_A[adapter]), cast(nn.Linear, self.lora_B[adapter])
        return _at_least_float32(B.weight) @ _at_least_float32(A.weight) * self.scaling[adapter]

    def _deltas(self, adapter: str) -> Iterator[tuple[Tensor, list[int] | slice, Tensor]]:
        yield cast(Tensor, self.get_base_layer().weight), slice(None), self.get_delta_weight(adapter)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        out_features, in_features = cast(Tensor, module.weight).shape
        return in_features, out_features


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
