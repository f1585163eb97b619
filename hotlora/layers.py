"""The PEFT layers of a HotLoRA adapter: around an experts module, and around a router.

Neither is a Linear: experts hold all their weights in 3-D parameters, a router holds a raw `[E, D]` weight or
works on its Linear's scores before it returns.
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
from .experts import HotFactors
from .fused import routed_experts
from .models import expert_widths


class MergeableLayer(nn.Module, LoraLayer):
    """What all share: an update that can go into the base layer's weights and come out again."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        r, lora_alpha = kwargs.pop("r"), kwargs.pop("lora_alpha")
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self._prepare()
        self.update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def _prepare(self) -> None:
        """Makes the containers of what `update_layer` adds."""

    def _add_adapter(self, adapter: str, r: int, lora_alpha: int, config: LoraConfig) -> None:
        """What PEFT keeps of every adapter, once its factors are in place."""
        self.r[adapter] = r
        self.lora_alpha[adapter] = lora_alpha
        self.use_rslora[adapter] = config.use_rslora
        self.scaling[adapter] = lora_alpha / math.sqrt(r) if config.use_rslora else lora_alpha / r
        self.lora_dropout[adapter] = nn.Dropout(config.lora_dropout)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def factor_pairs(self, adapter: str) -> dict[Any, tuple[Tensor, Tensor]]:
        """The adapter's low-rank pairs, as views: A `[..., R, in]`, B `[..., out, R]`, under what each updates."""
        raise NotImplementedError

    def _deltas(self, adapter: str) -> Iterator[tuple[Tensor, list[int] | slice, Tensor]]:
        """(parameter, rows, what the adapter adds to them), in float32 at least and in the parameter's layout."""
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

    def _prepare(self) -> None:
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.expert_ids: dict[str, tuple[int, ...]] = {}
        self._ids_on_device: dict[tuple[str, torch.device], Tensor] = {}

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
        parts = 2 if experts.has_gate else 1
        width, expert_width = expert_widths(experts)
        shapes = {
            "lora_A_gate_up": (len(ids), parts * r, width),
            "lora_B_gate_up": (len(ids), parts * expert_width, r),
            "lora_A_down": (len(ids), r, expert_width),
            "lora_B_down": (len(ids), width, r),
        }
        for name, shape in shapes.items():
            is_zero = "_B_" in name and bool(config.init_lora_weights)
            getattr(self, name)[adapter_name] = _new_factor(shape, experts.down_proj.device, is_zero)
        self.expert_ids[adapter_name] = ids
        self._ids_on_device.clear()
        self._add_adapter(adapter_name, r, lora_alpha, config)

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, adapter_names: Any = None
    ) -> Tensor:
        active = self._active_here(adapter_names)
        if not active:
            return self.base_layer(hidden_states, top_k_index, top_k_weights)
        factors = [self.factors(name) for name in active]
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

    @torch.no_grad()
    def copy_adapter(self, source: str, target: str) -> None:
        """Gives `target`, of the same plan and rank, the values of `source`."""
        for ours, theirs in zip(self._parameters_of(target), self._parameters_of(source), strict=True):
            ours.copy_(theirs)

    def get_delta_weight(self, adapter: str) -> tuple[Tensor, Tensor]:
        """scaling * B @ A of the planned experts, in float32 at least: `[N, P*F, D]` and `[N, D, F]`, gate rows
        before up rows whatever the base's layout."""
        A_gate_up, B_gate_up, A_down, B_down = map(_at_least_float32, self._parameters_of(adapter))
        parts = A_gate_up.shape[1] // A_down.shape[1]
        pairs = zip(B_gate_up.chunk(parts, dim=1), A_gate_up.chunk(parts, dim=1), strict=True)
        gate_up = torch.cat([B @ A for B, A in pairs], dim=1)
        return gate_up * self.scaling[adapter], B_down @ A_down * self.scaling[adapter]

    def factor_pairs(self, adapter: str) -> dict[Any, tuple[Tensor, Tensor]]:
        """Under (expert id, "gate" | "up" | "down")."""
        A_gate_up, B_gate_up, A_down, B_down = self._parameters_of(adapter)
        names = ("gate", "up") if A_gate_up.shape[1] > A_down.shape[1] else ("up",)
        pairs: dict[Any, tuple[Tensor, Tensor]] = {}
        for n, expert in enumerate(self.expert_ids[adapter]):
            A_parts, B_parts = A_gate_up[n].chunk(len(names)), B_gate_up[n].chunk(len(names))
            pairs |= {(expert, name): (A, B) for name, A, B in zip(names, A_parts, B_parts, strict=True)}
            pairs[expert, "down"] = (A_down[n], B_down[n])
        return pairs

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {len(ids)} experts, r={self.r[name]}" for name, ids in self.expert_ids.items())

    def _deltas(self, adapter: str) -> Iterator[tuple[Tensor, list[int] | slice, Tensor]]:
        experts: Any = self.get_base_layer()
        ids = list(self.expert_ids[adapter])
        up, down = self.get_delta_weight(adapter)
        if experts.has_gate and not experts.is_concatenated:
            up = torch.stack(up.chunk(2, dim=1), dim=2).flatten(1, 2)
        if experts.is_transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        yield experts.gate_up_proj if experts.has_gate else experts.up_proj, ids, up
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
        return base_layer.down_proj.device, base_layer.down_proj.dtype


class HotLoraWeights(MergeableLayer):
    """LoRA made in the weights of a module that holds them raw: `forward` runs the module's own code on
    W + scaling * B @ A.

    For shared experts in 3-D parameters (inkling), and, by `HotLoraRouter`, for routers. The sum is rounded to the
    weight's dtype, and dropout does not apply.
    """

    def _prepare(self) -> None:
        self._weights: dict[str, str] = {}
        """name among the factors -> path of the parameter in the base layer"""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        path = kwargs["target_name"]
        weights = getattr(config, "_raw_weights", {}).get(path)
        if not weights:
            raise PlanError(f"{path} takes adapters from a HotLoraConfig only.")
        self._weights = self._names(weights)
        factors: dict[str, nn.ParameterDict] = {"A": nn.ParameterDict(), "B": nn.ParameterDict()}
        for name, weight in self._weights.items():
            parameter = self.get_base_layer().get_parameter(weight)
            *groups, out_features, in_features = parameter.shape
            factors["A"][name] = _new_factor((*groups, r, in_features), parameter.device)
            is_zero = bool(config.init_lora_weights)
            factors["B"][name] = _new_factor((*groups, out_features, r), parameter.device, is_zero)
        self.lora_A[adapter_name], self.lora_B[adapter_name] = factors["A"], factors["B"]  # type: ignore[assignment]
        self._add_adapter(adapter_name, r, lora_alpha, config)

    def forward(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        active = self._active_here(adapter_names)
        if not active:
            return self.base_layer(*args, **kwargs)
        adapted = {}
        for name, weight in self._weights.items():
            parameter = self.get_base_layer().get_parameter(weight)
            delta = torch.stack([self._delta(adapter, name) for adapter in active]).sum(0)
            adapted[weight] = (parameter.to(delta.dtype) + delta).to(parameter.dtype)
        return torch.func.functional_call(self.base_layer, adapted, args, kwargs)

    def factor_pairs(self, adapter: str) -> dict[Any, tuple[Tensor, Tensor]]:
        A, B = cast(Any, self.lora_A[adapter]), cast(Any, self.lora_B[adapter])
        return {name: (A[name], B[name]) for name in self._weights}

    def _names(self, weights: tuple[str, ...]) -> dict[str, str]:
        return {weight.rpartition(".")[2]: weight for weight in weights}

    def _delta(self, adapter: str, name: str) -> Tensor:
        A, B = self.factor_pairs(adapter)[name]
        return _at_least_float32(B) @ _at_least_float32(A) * self.scaling[adapter]

    def _deltas(self, adapter: str) -> Iterator[tuple[Tensor, list[int] | slice, Tensor]]:
        for name, weight in self._weights.items():
            yield self.get_base_layer().get_parameter(weight), slice(None), self._delta(adapter, name)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int] | tuple[None, None]:
        return None, None

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, torch.dtype]:
        parameter = base_layer.get_parameter(next(iter(self._weights.values())))
        return parameter.device, parameter.dtype


class HotLoraRouter(HotLoraWeights):
    """LoRA on the scores' weight `[E, D]` of a router, its own or that of a Linear inside of it: the family's
    routing runs on W + scaling * B @ A."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """scaling * B @ A, `[E, D]`, in float32 at least."""
        return self._delta(adapter, "weight")

    def _names(self, weights: tuple[str, ...]) -> dict[str, str]:
        (weight,) = weights
        return {"weight": weight}


def _new_factor(shape: tuple[int, ...], device: torch.device, is_zero: bool = False) -> nn.Parameter:
    """kaiming_uniform_(a=sqrt(5)) of every matrix by itself, as PEFT's Linear: the bound is 1/sqrt(in_features).

    Drawn on the CPU, so that one seed gives one adapter whatever the device; not drawn at all for a model without
    weights.
    """
    factor = torch.empty(shape, device="meta" if device.type == "meta" else "cpu")
    bound = 1 / math.sqrt(shape[-1])
    return nn.Parameter(factor.zero_() if is_zero else factor.uniform_(-bound, bound))


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
