"""The PEFT layers around modules that hold their weights raw: routers, and inkling's shared experts."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..base.errors import PlanError
from .factors import Slot, at_least_float32, factor_values, in_their_own_dtype, new_factor
from .mergeable import MergeableLayer


class HotLoraWeights(MergeableLayer):
    """LoRA made in the weights of a module that holds them raw: `forward` runs the module's own code on
    W + scaling * B @ A.

    For shared experts in 3-D parameters (inkling), and, by `HotLoraRouter`, for routers. The sum is rounded to the
    weight's dtype, and dropout does not apply. With `use_dora` each row of the sum has a magnitude of its own.
    """

    adapter_layer_names = (*LoraLayer.adapter_layer_names, "lora_magnitude_vectors")

    def _prepare(self) -> None:
        self._weights: dict[str, str] = {}
        """name among the factors -> path of the parameter in the base layer"""
        self.lora_magnitude_vectors = nn.ModuleDict()

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
            factors["A"][name] = new_factor((*groups, r, in_features), parameter.device)
            is_zero = bool(config.init_lora_weights)
            factors["B"][name] = new_factor((*groups, out_features, r), parameter.device, is_zero)
        self.lora_A[adapter_name], self.lora_B[adapter_name] = factors["A"], factors["B"]  # type: ignore[assignment]
        self._add_adapter(adapter_name, r, lora_alpha, config)
        if config.use_dora:
            magnitudes = {name: nn.Parameter(self._norms(adapter_name, name)) for name in self._weights}
            self.lora_magnitude_vectors[adapter_name] = nn.ParameterDict(magnitudes)
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        active = self._active_here(adapter_names)
        if not active:
            return self.base_layer(*args, **kwargs)
        base: Any = self.get_base_layer()
        if hasattr(base, "unshard"):  # FSDP has it by itself, in a dtype of its own: it is read before its forward
            base.set_reshard_after_forward(False)
            base.unshard()
        adapted = {}
        for name, weight in self._weights.items():
            parameter = self.get_base_layer().get_parameter(weight)
            delta = torch.stack([self._delta(adapter, name) for adapter in active]).sum(0)
            adapted[weight] = (parameter.to(delta.dtype) + delta).to(parameter.dtype)
        return torch.func.functional_call(self.base_layer, adapted, args, kwargs)

    def factor_pairs(self, adapter: str) -> dict[Any, tuple[Tensor, Tensor]]:
        A, B = cast(Any, self.lora_A[adapter]), cast(Any, self.lora_B[adapter])
        return {name: (factor_values(A[name]), factor_values(B[name])) for name in self._weights}

    def slots(self, path: str, adapter: str) -> Iterator[Slot]:
        for name in ("lora_A", "lora_B"):
            for key in getattr(self, name)[adapter]:
                yield Slot(f"{path}.{name}.{key}", name == "lora_A", getattr(self, name)[adapter], key)

    def _names(self, weights: tuple[str, ...]) -> dict[str, str]:
        return {weight.rpartition(".")[2]: weight for weight in weights}

    def _delta(self, adapter: str, name: str) -> Tensor:
        """What is added to the weight, in float32 at least."""
        delta = self._low_rank(adapter, name)
        if adapter not in self.lora_magnitude_vectors:
            return delta
        weight = self.get_base_layer().get_parameter(self._weights[name]).to(delta.dtype)
        norms = self._once((adapter, name), lambda: self._norms(adapter, name))
        scale = cast(Any, self.lora_magnitude_vectors[adapter])[name] / norms
        return scale.unsqueeze(-1) * (weight + delta) - weight

    def _low_rank(self, adapter: str, name: str) -> Tensor:
        A, B = self.factor_pairs(adapter)[name]
        with in_their_own_dtype(A):
            return at_least_float32(B) @ at_least_float32(A) * self.scaling[adapter]

    @torch.no_grad()
    def _norms(self, adapter: str, name: str) -> Tensor:
        """Of the rows of W + scaling * B @ A; DoRA's norm carries no gradient (its section 4.3)."""
        low_rank = self._low_rank(adapter, name)
        weight = self.get_base_layer().get_parameter(self._weights[name]).to(low_rank.device, low_rank.dtype)
        return torch.linalg.vector_norm(weight + low_rank, dim=-1)

    def _deltas(self, adapter: str) -> Iterator[tuple[Tensor, list[int] | slice, Tensor]]:
        for name, (weight, rows) in zip(self._weights, self.merge_targets(adapter), strict=True):
            yield weight, rows, self._delta(adapter, name)

    def merge_targets(self, adapter: str) -> Iterator[tuple[Tensor, list[int] | slice]]:
        for weight in self._weights.values():
            yield self.get_base_layer().get_parameter(weight), slice(None)

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
