"""The PEFT layers around an experts module, which holds all its experts' weights in 3-D parameters."""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..base.errors import HotLoraError, PlanError
from ..hf.experts_view import ExpertsView
from ..layer.function import routed_experts, updates_on
from ..layer.updates import Full, LowRank, Update
from .factors import FactorDict, Slot, at_least_float32, factor_values, low_rank_products, new_factor, take_values
from .mergeable import MergeableLayer


class HotExperts(MergeableLayer):
    """What adapters on the planned experts of one layer share, around transformers' experts module."""

    other_param_names = (*LoraLayer.other_param_names, "expert_ids")

    def _prepare(self) -> None:
        for name in self.adapter_layer_names:
            setattr(self, name, FactorDict())
        self.expert_ids: dict[str, tuple[int, ...]] = {}
        self._groups: dict[str, list[_Group]] = {}
        self._on_device: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}
        self._rank_masks: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def lora_A(self) -> nn.ParameterDict:  # type: ignore[override]
        """PEFT asks `name in layer.lora_A` to learn whether a layer has an adapter."""
        return getattr(self, self.adapter_layer_names[0])

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, adapter_names: Any = None
    ) -> Tensor:
        """Output `[T, D]` for hidden `[T, D]`, the chosen experts `[T, K]` and their weights `[T, K]`."""
        active = self._active_here(adapter_names)
        if not active:
            return self.base_layer(hidden_states, top_k_index, top_k_weights)
        updates: Sequence[Update] = [self.update(name) for name in active]
        experts: Any = self.get_base_layer()
        if not self.view.is_forwarded_by_others:
            return routed_experts(experts, hidden_states, top_k_index, top_k_weights, updates)
        here = self.view.ids_here
        if len(here) < self.view.num_experts_everywhere:
            ids = [self.expert_ids[name] for name in active]
            hidden_states, updates = _updates_here(here, ids, hidden_states, cast(Any, updates))
        with updates_on(experts, updates):  # and their forward is the routed layer since the adapter was injected
            output: Tensor = experts(hidden_states, top_k_index, top_k_weights)
        return output

    @property
    def view(self) -> ExpertsView:
        """The experts module, as all families look alike."""
        return ExpertsView(self.get_base_layer())

    def update(self, adapter: str) -> Update:
        """What `adapter` adds, as the layer takes it; dropout is 0 outside training."""
        raise NotImplementedError

    def get_delta_weight(self, adapter: str) -> tuple[Tensor, Tensor]:
        """What a merge adds: `[N, P*F, D]`, gate rows before up rows, and `[N, D, F]`, in float32 at least."""
        raise NotImplementedError

    def copy_adapter(self, source: str, target: str) -> None:
        """Gives `target`, of the same plan and ranks, the values of `source`."""
        for name in self.adapter_layer_names:
            held = getattr(self, name)
            if source in held:
                take_values(held[target], held[source])

    def _deltas(self, adapter: str) -> Iterator[tuple[Tensor, list[int] | slice, Tensor]]:
        deltas = self.view.own_layout(*self.get_delta_weight(adapter))
        for (weight, ids), delta in zip(self.merge_targets(adapter), deltas, strict=True):
            yield weight, ids, delta

    def merge_targets(self, adapter: str) -> Iterator[tuple[Tensor, list[int] | slice]]:
        yield from self.view.parameters_of(self.expert_ids[adapter])

    def _ids_planned(self, config: LoraConfig, path: str) -> tuple[int, ...]:
        ids = getattr(config, "_expert_ids", {}).get(path)
        if not ids:
            raise PlanError(f"{path} takes adapters from a HotLoraConfig only, with a plan that names it.")
        return tuple(ids)

    def _base_weights(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The frozen weights of some experts, copied: `[N, P*F, D]`, gate rows before up rows, and `[N, D, F]`."""
        if self.view.is_spread:
            raise HotLoraError(
                "DoRA and full experts read the experts' own weights, and those are spread over processes: train "
                "without FSDP and expert parallelism, or without DoRA and full experts."
            )
        return self.view.weights_of(ids)

    def _sent(self, numbers: tuple[int, ...] | tuple[float, ...], device: torch.device) -> Tensor:
        """int64 or float64 (float32 on mps, which has no other), on the device, sent there once. Not a buffer: buffers
        made on meta are lost with it."""
        key = (numbers, device)
        if key not in self._on_device:
            floats = torch.float32 if device.type == "mps" else torch.float64
            kind = torch.int64 if isinstance(numbers[0], int) else floats
            with torch.inference_mode(False):  # a tensor born in inference mode could not be used in training later
                self._on_device[key] = torch.tensor(numbers, dtype=kind, device=device)
        return self._on_device[key]

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int] | tuple[None, None]:
        return None, None

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, torch.dtype]:
        return ExpertsView(base_layer).device_and_dtype


def _updates_here(
    here: range, ids: Sequence[tuple[int, ...]], hidden_TD: Tensor, updates: Sequence[LowRank]
) -> tuple[Tensor, list[LowRank]]:
    """Of each adapter's factors, whose experts are `ids`, those of the experts that this process has, numbered as they
    are here; and the input, through which they hang together for the backward pass."""
    names = ("A_gate_up", "B_gate_up", "A_down", "B_down")
    hidden_TD, *tensors = _InStep.apply(hidden_TD, *(getattr(update, name) for update in updates for name in names))
    parts = []
    for i, (its, update) in enumerate(zip(ids, updates, strict=True)):
        some = slice(bisect_left(its, here.start), bisect_left(its, here.stop))
        own: dict[str, Any] = dict(zip(names, (t[some] for t in tensors[4 * i : 4 * i + 4]), strict=True))
        if isinstance(update.scaling, Tensor):
            own["scaling"] = update.scaling[some]
        parts.append(replace(update, expert_ids_N=update.expert_ids_N[some] - here.start, **own))
    return hidden_TD, parts


class _InStep(torch.autograd.Function):
    """Hands everything on. Backward, every factor has its gradient at the same place on every process, be it zeros:
    under expert parallelism a process may have none of an adapter's experts, and gradients are summed one by one."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return grads


@dataclass(frozen=True)
class _Group:
    """The experts of one adapter that share a rank, and the name under which their tensors are held: None where all
    experts share it."""

    ids: tuple[int, ...]
    r: int
    name: str | None


class HotLoraExperts(HotExperts):
    """Low-rank updates on the planned experts of one layer.

    Holds per adapter what `layer.updates.LowRank` describes, as parameters that are saved under their own names. Where
    a plan gives ranks, the experts of each rank have tensors of their own. With `share_a` A of gate and up and B of
    down are `[1, …]`, of all experts. With `use_dora` the experts' outputs have magnitudes besides: of gate and up
    `[N, P*F]`, and of down `[N, D]`.
    """

    adapter_layer_names = (
        *("lora_A_gate_up", "lora_B_gate_up", "lora_A_down", "lora_B_down"),
        *("lora_magnitude_vector_gate_up", "lora_magnitude_vector_down"),
    )
    lora_magnitude_vector_down: nn.ParameterDict

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        path = kwargs["target_name"]
        ids = self._ids_planned(config, path)
        ranks = getattr(config, "_ranks", {}).get(path) or (r,) * len(ids)
        if config.use_dora and self.view.is_quantized:
            raise _not_dense("use_dora", path)
        parts, (width, expert_width) = self.view.num_parts, self.view.widths
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        groups = []
        for rank in sorted(set(ranks)):
            chosen = tuple(e for e, its in zip(ids, ranks, strict=True) if its == rank)
            groups.append(_Group(chosen, rank, None if len(set(ranks)) == 1 and rank == r else f"rank_{rank}"))
        self.expert_ids[adapter_name], self._groups[adapter_name] = ids, groups
        self._rank_masks.pop(adapter_name, None)
        for group in groups:
            n, r_n = len(group.ids), group.r
            outer = 1 if getattr(config, "share_a", False) else n
            shapes = {
                "lora_A_gate_up": (outer, parts * r_n, width),
                "lora_B_gate_up": (n, parts * expert_width, r_n),
                "lora_A_down": (n, r_n, expert_width),
                "lora_B_down": (outer, width, r_n),
            }
            for name, shape in shapes.items():
                is_zero = "_B_" in name and bool(config.init_lora_weights)
                self._hold(name, adapter_name, group, new_factor(shape, device, is_zero))
        self._add_adapter(adapter_name, r, lora_alpha, config)
        if config.use_dora:
            for group in groups:
                for name, norms in zip(self.adapter_layer_names[4:], self._norms(adapter_name, group), strict=True):
                    self._hold(name, adapter_name, group, nn.Parameter(norms))
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def update(self, adapter: str) -> LowRank:
        """Where experts have ranks of their own, all at the largest: parameters, their gradients and an optimizer's
        state are of the true ranks, and the zeros are added for one forward."""
        groups, ids = self._groups[adapter], self.expert_ids[adapter]
        tensors = [[*self._tensors_of(adapter, group), *self._dora_scales(adapter, group)] for group in groups]
        device = tensors[0][0].device
        scaling: float | Tensor = self._scaling(adapter, groups[0])
        if adapter in self._rank_masks:
            gate_up, down = self._rank_masks[adapter]
            B = tensors[0][1]
            tensors[0][1] = (B.unflatten(1, (gate_up.shape[1], -1)) * gate_up).flatten(1, 2)
            tensors[0][3] = tensors[0][3] * down
        if len(groups) > 1:
            scaling = self._sent(tuple(self.scaling_of(adapter, expert) for expert in ids), device)
            by_group = [expert for group in groups for expert in group.ids]
            order = self._sent(tuple(by_group.index(expert) for expert in ids), device)
            padded = [_padded(its, groups[-1].r, self.view.num_parts) for its in tensors]
            tensors = [[torch.cat(its).index_select(0, order) for its in zip(*padded, strict=True)]]
        A_gate_up, B_gate_up, A_down, B_down, *dora = tensors[0]
        p = cast(nn.Dropout, self.lora_dropout[adapter]).p if self.training else 0.0
        return LowRank(self._sent(ids, device), A_gate_up, B_gate_up, A_down, B_down, scaling, p, *dora)

    def get_delta_weight(self, adapter: str) -> tuple[Tensor, Tensor]:
        """What a merge adds to the planned experts, in float32 at least: `[N, P*F, D]` and `[N, D, F]`, gate rows
        before up rows whatever the base's layout. scaling * B @ A; with DoRA what its magnitudes make of it."""
        ups: dict[int, Tensor] = {}
        downs: dict[int, Tensor] = {}
        for group in self._groups[adapter]:
            up, down = self._low_rank(adapter, group)
            if scales := self._dora_scales(adapter, group):
                up, down = (
                    scale.detach().unsqueeze(2) * (weight + delta) - weight
                    for weight, delta, scale in zip(self._base_weights(group.ids), (up, down), scales, strict=True)
                )
            if len(self._groups[adapter]) == 1:
                return up, down
            ups |= dict(zip(group.ids, up.unbind(), strict=True))
            downs |= dict(zip(group.ids, down.unbind(), strict=True))
        ids = self.expert_ids[adapter]
        return torch.stack([ups[e] for e in ids]), torch.stack([downs[e] for e in ids])

    def move(self, adapter: str, ids: tuple[int, ...]) -> None:
        """The adapter's factors are those of other experts from now on, as many as before."""
        (group,) = self._groups[adapter]
        assert len(ids) == len(group.ids)
        self.expert_ids[adapter], self._groups[adapter] = ids, [replace(group, ids=ids)]

    def keep_ranks(self, adapter: str, up_NR: Tensor, down_NR: Tensor) -> None:
        """Only these ranks (bool) of the projections into the experts and out of them train from now on, and none of
        the gate. The others must be zero in B: they stay so. For factors of one rank."""
        assert len(self._groups[adapter]) == 1
        gate_up = up_NR.new_zeros(len(up_NR), self.view.num_parts, 1, up_NR.shape[1])
        gate_up[:, -1, 0] = up_NR
        self._rank_masks[adapter] = gate_up, down_NR[:, None]

    def scaling_of(self, adapter: str, expert: int) -> float:
        """lora_alpha / r, or over its root, of one expert."""
        return next(self._scaling(adapter, group) for group in self._groups[adapter] if expert in group.ids)

    def factor_pairs(self, adapter: str, folded: bool = True) -> dict[Any, tuple[Tensor, Tensor]]:
        """Under (expert id, "gate" | "up" | "down"). folded: B has in it what an expert's own rank changes of the
        adapter's scaling, where it does; else all are views."""
        pairs: dict[Any, tuple[Tensor, Tensor]] = {}
        for group in self._groups[adapter]:
            A_gate_up, B_gate_up, A_down, B_down = self._tensors_of(adapter, group)
            names = ("gate", "up") if A_gate_up.shape[1] > A_down.shape[1] else ("up",)
            fold = self._scaling(adapter, group) / self.scaling[adapter]
            for n, expert in enumerate(group.ids):
                A_parts, B_parts = A_gate_up[n].chunk(len(names)), B_gate_up[n].chunk(len(names))
                pairs |= {(expert, name): (A, B) for name, A, B in zip(names, A_parts, B_parts, strict=True)}
                pairs[expert, "down"] = (A_down[n], B_down[n])
                if folded and fold != 1:  # the layer's one scaling is the adapter's, at the config's r
                    pairs |= {(e, name): (A, B * fold) for (e, name), (A, B) in pairs.items() if e == expert}
        return pairs

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}: {len(group.ids)} experts, r={group.r}"
            for name, groups in self._groups.items()
            for group in groups
        )

    def slots(self, path: str, adapter: str) -> Iterator[Slot]:
        for group in self._groups[adapter]:
            for name in self.adapter_layer_names[:4]:
                parts = self.view.num_parts if "gate_up" in name else 1
                own = f"{path}.{name}" if group.name is None else f"{path}.{name}.{group.name}"
                yield Slot(own, "_A_" in name, *self._place(name, adapter, group), parts)

    def _place(self, name: str, adapter: str, group: _Group) -> tuple[Any, str]:
        """What holds a group's tensor, and under which key."""
        held = getattr(self, name)
        if group.name is None:
            return held, adapter
        if adapter not in held:
            held[adapter] = nn.ParameterDict()
        return held[adapter], group.name

    def _hold(self, name: str, adapter: str, group: _Group, parameter: nn.Parameter) -> None:
        held, key = self._place(name, adapter, group)
        held[key] = parameter

    def _held(self, name: str, adapter: str, group: _Group) -> Any:
        held, key = self._place(name, adapter, group)
        return held[key]

    def _tensors_of(self, adapter: str, group: _Group) -> list[Tensor]:
        """`[N, …]` each; what experts share takes no room N times, and its gradient is the sum of theirs."""
        held = [factor_values(self._held(name, adapter, group)) for name in self.adapter_layer_names[:4]]
        return [its if len(its) == len(group.ids) else its.expand(len(group.ids), -1, -1) for its in held]

    def _scaling(self, adapter: str, group: _Group) -> float:
        """lora_alpha / r, or over its root, of the group's own r."""
        ratio = self.r[adapter] / group.r
        return self.scaling[adapter] * (math.sqrt(ratio) if self.use_rslora[adapter] else ratio)

    def _low_rank(self, adapter: str, group: _Group) -> tuple[Tensor, Tensor]:
        """scaling * B @ A, `[N, P*F, D]` and `[N, D, F]`, in float32 at least."""
        gate_up, down = low_rank_products(*self._tensors_of(adapter, group))
        scaling = self._scaling(adapter, group)
        return gate_up * scaling, down * scaling

    def _dora_scales(self, adapter: str, group: _Group) -> tuple[Tensor, ...]:
        """Magnitude over norm: `[N, P*F]` and `[N, D]`, or none. The norm carries no gradient (DoRA, section 4.3)."""
        if adapter not in self.lora_magnitude_vector_down:
            return ()
        both_norms = self._once((adapter, group), lambda: self._norms(adapter, group))
        up, down = (
            self._held(name, adapter, group) / norms
            for name, norms in zip(self.adapter_layer_names[4:], both_norms, strict=True)
        )
        return up, down

    @torch.no_grad()
    def _norms(self, adapter: str, group: _Group) -> tuple[Tensor, Tensor]:
        """Of the rows of W + scaling * B @ A, expert by expert: no more than one expert is held in float32."""
        factors, scaling = self._tensors_of(adapter, group), self._scaling(adapter, group)
        ups, downs = [], []
        for n, expert in enumerate(group.ids):
            update_up, update_down = low_rank_products(*(factor[n] for factor in factors))
            # On the factors' device: they have no values yet where a saved adapter is about to be loaded.
            up, down = (at_least_float32(weight[0]).to(update_up.device) for weight in self._base_weights([expert]))
            ups.append(torch.linalg.vector_norm(up.add_(update_up, alpha=scaling), dim=1))
            downs.append(torch.linalg.vector_norm(down.add_(update_down, alpha=scaling), dim=1))
        return torch.stack(ups), torch.stack(downs)


class HotFullExperts(HotExperts):
    """Full fine-tuning of the planned experts of one layer (ESFT): weights of their own, which start as the base's
    and stand in their place. The other experts stay frozen. No rank, no dropout."""

    adapter_layer_names = ("lora_full_gate_up", "lora_full_down")

    lora_full_gate_up: nn.ParameterDict
    lora_full_down: nn.ParameterDict

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        path = kwargs["target_name"]
        ids = self._ids_planned(config, path)
        if self.view.is_quantized:
            raise _not_dense("train_full_experts", path)
        self.expert_ids[adapter_name] = ids
        for name, weight in zip(self.adapter_layer_names, self._base_weights(ids), strict=True):
            getattr(self, name)[adapter_name] = nn.Parameter(weight.contiguous())
        self._add_adapter(adapter_name, r, lora_alpha, config)

    def update(self, adapter: str) -> Full:
        up, down = self._weights(adapter)
        return Full(self._sent(self.expert_ids[adapter], up.device), up, down)

    def get_delta_weight(self, adapter: str) -> tuple[Tensor, Tensor]:
        """What a merge adds to the planned experts, in float32 at least: `[N, P*F, D]` and `[N, D, F]`, gate rows
        before up rows whatever the base's layout."""
        pairs = zip(self._weights(adapter), self._base_weights(self.expert_ids[adapter]), strict=True)
        up, down = (at_least_float32(new.detach()) - at_least_float32(old) for new, old in pairs)
        return up, down

    def _replaces(self, adapter: str) -> bool:
        return True

    def _merged_values(self, adapter: str) -> list[tuple[Tensor, list[int] | slice, Tensor]]:
        values = self.view.own_layout(*(weight.detach() for weight in self._weights(adapter)))
        pairs = zip(self.merge_targets(adapter), values, strict=True)
        return [(weight, rows, value.to(weight.dtype)) for (weight, rows), value in pairs]

    def slots(self, path: str, adapter: str) -> Iterator[Slot]:
        yield from ()  # whole weights, no factors

    def _weights(self, adapter: str) -> tuple[Tensor, Tensor]:
        return self.lora_full_gate_up[adapter], self.lora_full_down[adapter]


def _padded(tensors: Sequence[Tensor], r: int, parts: int) -> list[Tensor]:
    """The factors of some experts with zeros up to rank r; DoRA's scales, which follow them, have none."""
    A_gate_up, B_gate_up, A_down, B_down, *scales = tensors
    missing, pad = r - A_down.shape[1], nn.functional.pad
    A_gate_up = pad(A_gate_up.unflatten(1, (parts, -1)), (0, 0, 0, missing)).flatten(1, 2)
    return [
        A_gate_up,
        pad(B_gate_up, (0, missing)),
        pad(A_down, (0, 0, 0, missing)),
        pad(B_down, (0, missing)),
        *scales,
    ]


def _not_dense(option: str, path: str) -> HotLoraError:
    return HotLoraError(
        f"{option} needs weights that are not quantized, and those of {path} are: load the base without quantization, "
        "a checkpoint in MXFP4 or FP8 with dequantize=True (--quantize 0)."
    )
