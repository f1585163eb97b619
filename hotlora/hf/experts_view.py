"""transformers' experts modules, as the routed layer and the adapters need them.

A family differs from another in what transformers' `use_experts_implementation` says of it (a gate or none, biases,
weights transposed, gate and up interleaved, a norm after the expert) and in its `_apply_gate`. No other file reads
these. Here all families look alike: a projection into the experts, whose outputs are P parts (gate and up, or up
alone), an activation, and a projection out of them.

Shape suffixes: E experts, S rows (token-expert assignments), D model width, F expert width, P parts, N chosen experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

_DEFAULT_GATE = "transformers.integrations.moe"


def is_experts(module: Any) -> bool:
    """Whether transformers' `use_experts_implementation` has decorated the class of `module`."""
    return hasattr(module, "_apply_gate") and hasattr(module, "is_transposed") and hasattr(module, "down_proj")


@dataclass(frozen=True)
class FrozenWeight:
    """One projection's weights of all experts, dense or quantized."""

    value: Any
    """A Tensor; or what has its `shape`, `dtype`, `expert(e)` and `dequantize()`, and where it is not `is_dense`,
    `some(start, stop)`, `chosen(ids)` and `coded()`."""
    is_transposed: bool
    """`[E, inputs, outputs]` rather than `[E, outputs, inputs]`."""

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    @property
    def num_outputs(self) -> int:
        """O of `[E, I, O]`."""
        return int(self.value.shape[2 if self.is_transposed else 1])

    @property
    def T(self) -> "FrozenWeight":
        """The product with it makes an input's gradient out of an output's."""
        return FrozenWeight(self.value, not self.is_transposed)

    def of(self, expert: int) -> Tensor:
        """`[inputs, outputs]`; a quantized one is dense for as long as it is held."""
        if isinstance(self.value, Tensor):
            return self._views[expert]
        weight: Tensor = self.value.expert(expert)
        return weight if self.is_transposed else weight.T

    @cached_property
    def _views(self) -> Sequence[Tensor]:
        """Of each expert, made at once: an operation each costs more than a small product."""
        return self.all().unbind()

    @property
    def is_held(self) -> bool:
        """Whether it is not dense where it is multiplied: quantized, or packed."""
        return not (isinstance(self.value, Tensor) or self.value.is_dense)

    def some(self, start: int, stop: int) -> Tensor:
        """`[stop - start, inputs, outputs]` of some experts; quantized ones are dense for as long as they are held."""
        weight: Tensor = self.value[start:stop] if isinstance(self.value, Tensor) else self.value.some(start, stop)
        return weight if self.is_transposed else weight.transpose(1, 2)

    def chosen(self, ids: Tensor) -> Tensor:
        """`[len(ids), inputs, outputs]` of the experts in `ids`, int64; the host need not know which."""
        weight: Tensor = self.value[ids] if isinstance(self.value, Tensor) else self.value.chosen(ids)
        return weight if self.is_transposed else weight.transpose(1, 2)

    def all(self) -> Tensor:
        """`[E, inputs, outputs]`; quantized ones are dense for as long as they are held."""
        weight: Tensor = self.value if isinstance(self.value, Tensor) else self.value.dequantize()
        return weight if self.is_transposed else weight.transpose(1, 2)


class ExpertsView:
    """One experts module. It holds nothing of its own."""

    def __init__(self, experts: Any) -> None:
        self.experts = experts

    @property
    def num_experts(self) -> int:
        """Of this process, under expert parallelism."""
        return int(self.experts.num_experts)

    @property
    def num_experts_everywhere(self) -> int:
        """E, of all processes: under expert parallelism `num_experts` counts this process's own."""
        if self.is_expert_parallel:
            return int(self.experts.down_proj.shape[0])
        return self.num_experts

    @property
    def is_expert_parallel(self) -> bool:
        """Whether this process has some of the experts."""
        return bool(getattr(self.experts, "_is_expert_parallel", False))

    @property
    def may_be_elsewhere(self) -> bool:
        """Whether an index may name an expert of another process; transformers 5.17 does not say."""
        return bool(getattr(self.experts, "_is_expert_parallel", True))

    @property
    def ids_here(self) -> range:
        """The experts whose weights this process has: all, but for expert parallelism, which gives each process a
        run."""
        mesh = getattr(self.experts.down_proj, "device_mesh", None)
        if mesh is None or not self.is_expert_parallel:
            return range(self.num_experts)
        start = mesh.get_local_rank("ep") * self.num_experts
        return range(start, start + self.num_experts)

    @property
    def num_parts(self) -> int:
        """P: 2 where experts have a gate, else 1."""
        return 2 if self.experts.has_gate else 1

    def shape_of(self, name: str) -> tuple[int, int]:
        """(outputs, inputs) of a parameter by its name; of shared experts in 3-D parameters too."""
        _, outs, ins = getattr(self.experts, name).shape
        return (ins, outs) if getattr(self.experts, "is_transposed", False) else (outs, ins)

    @property
    def num_weights_of_an_expert(self) -> int:
        """Weights of one expert, all projections, without biases."""
        width, expert_width = self.widths
        return (self.num_parts + 1) * width * expert_width

    @property
    def is_quantized(self) -> bool:
        """Whether the weights are held in 8 or 4 bits."""
        return not isinstance(self.experts.down_proj, Tensor)

    @property
    def widths(self) -> tuple[int, int]:
        """D and F."""
        _, rows, columns = self.experts.down_proj.shape  # [E, D, F], or [E, F, D]
        return (columns, rows) if self.experts.is_transposed else (rows, columns)

    @property
    def device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        return self.experts.down_proj.device, self.experts.down_proj.dtype

    @property
    def up_name(self) -> str:
        """The name of the weights that lead into an expert."""
        return "gate_up_proj" if self.experts.has_gate else "up_proj"

    @property
    def weight_names(self) -> list[str]:
        """Of both projections, in the order in which every family's module has them while they are dense."""
        return [self.up_name, "down_proj"]

    @property
    def is_forwarded_by_others(self) -> bool:
        """Whether something must happen around the experts' own forward: tokens that go to other processes (expert
        parallelism), or weights that are gathered for it (FSDP)."""
        return "forward" in vars(self.experts) or hasattr(self.experts, "unshard")

    @property
    def has_norm_after(self) -> bool:
        """Whether each expert's output is normed, which transformers has since 5.20."""
        return getattr(self.experts, "has_post_expert_norm", False)

    @property
    def norm_after(self) -> nn.Module | None:
        """The norm of each expert's output; None in most families."""
        return self.experts.post_expert_norm if self.has_norm_after else None

    # What autograd has to know of: in this order, in `tensors` and in the arguments of `up` and the others.

    def tensors(self) -> list[Tensor | None]:
        """Weights up and down, their biases, and the norm's parameters; None for what there is not, or is quantized.

        Of weights that are spread over processes by expert those that are here.
        """
        found = [self._local(name) for name in (self.up_name, "down_proj")]
        found = [weight if isinstance(weight, Tensor) else None for weight in found]
        for name in (self.up_name, "down_proj"):
            found.append(self._local(f"{name}_bias") if self.experts.has_bias else None)
        return [*found, *(self.norm_after.parameters() if self.norm_after is not None else ())]

    def up(self, weight: Tensor | None) -> FrozenWeight:
        """The projection into the experts; `weight`: as in `tensors`."""
        return self._frozen(self.up_name, weight)

    def down(self, weight: Tensor | None) -> FrozenWeight:
        """The projection out of the experts; `weight`: as in `tensors`."""
        return self._frozen("down_proj", weight)

    def _frozen(self, name: str, weight: Tensor | None) -> FrozenWeight:
        return FrozenWeight(getattr(self.experts, name) if weight is None else weight, self.experts.is_transposed)

    def _local(self, name: str) -> Any:
        weight = getattr(self.experts, name)
        return weight.to_local() if hasattr(weight, "to_local") else weight

    def split(self, up_SPF: Tensor) -> Sequence[Tensor]:
        """The gate's and the up projection's share of what experts have together, as views; all of it without a
        gate."""
        if not self.experts.has_gate:
            return [up_SPF]
        if self.experts.is_concatenated:
            return up_SPF.chunk(2, dim=-1)
        return [up_SPF[..., 0::2], up_SPF[..., 1::2]]

    def join(self, up_NPF: Tensor) -> Tensor:
        """What has the gate's outputs before the up projection's, in the experts' own order."""
        if not self.is_interleaved:
            return up_NPF
        return torch.stack(up_NPF.chunk(2, dim=-1), dim=-1).flatten(-2)

    def activation(self, up_SPF: Tensor) -> Tensor:
        """`[S, F]`"""
        return self.experts._apply_gate(up_SPF) if self.experts.has_gate else self.experts.act_fn(up_SPF)

    def linears_of(self, expert: int) -> list[tuple[Tensor, Tensor | None]]:
        """(weight `[out, in]`, bias) of one expert's gate, where there is one, up and down, as views."""
        (up, up_bias), (down, down_bias) = (self._linear_of(expert, name) for name in (self.up_name, "down_proj"))
        ups = [part.T for part in self.split(up.T)]
        biases = [None] * len(ups) if up_bias is None else self.split(up_bias)
        return [*zip(ups, biases, strict=True), (down, down_bias)]

    def _linear_of(self, expert: int, name: str) -> tuple[Tensor, Tensor | None]:
        weight = getattr(self.experts, name).data[expert]
        bias = getattr(self.experts, f"{name}_bias").data[expert] if self.experts.has_bias else None
        return (weight.T if self.experts.is_transposed else weight), bias

    @property
    def has_own_gate(self) -> bool:
        """Whether the family has an activation of its own, other than act_fn(gate) * up."""
        return self.experts.has_gate and type(self.experts)._apply_gate.__module__ != _DEFAULT_GATE

    @property
    def has_biases(self) -> bool:
        """Of both projections."""
        return self.experts.has_bias

    @property
    def names_of_layout(self) -> list[str]:
        """Where the family departs from most, in docs/models.md's words."""
        flags = {
            "no gate": not self.experts.has_gate,
            "bias": self.experts.has_bias,
            "transposed": self.experts.is_transposed,
            "interleaved": not self.experts.is_concatenated,
            "norm after": self.has_norm_after,
        }
        return [name for name, is_so in flags.items() if is_so]

    def weights_of(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Some experts' weights, copied: `[N, P*F, D]`, gate rows before up rows, and `[N, D, F]`."""
        up, down = (getattr(self.experts, name).detach()[list(ids)] for name in (self.up_name, "down_proj"))
        if self.experts.is_transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        if self.is_interleaved:
            up = torch.cat([up[:, 0::2], up[:, 1::2]], dim=1)
        return up, down

    def own_layout(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """What `weights_of` gives, as the module's parameters have it."""
        up = self.join(up.transpose(1, 2)).transpose(1, 2) if self.is_interleaved else up
        return (up.transpose(1, 2), down.transpose(1, 2)) if self.experts.is_transposed else (up, down)

    def parameters_of(self, ids: Sequence[int]) -> list[tuple[Tensor, list[int]]]:
        """(parameter, rows) of both projections."""
        return [(getattr(self.experts, name), list(ids)) for name in (self.up_name, "down_proj")]

    @property
    def is_spread(self) -> bool:
        """Whether the weights are spread over processes."""
        return hasattr(self.experts.down_proj, "to_local")

    @property
    def is_interleaved(self) -> bool:
        """Whether gate and up have their outputs in turn."""
        return bool(self.experts.has_gate and not self.experts.is_concatenated)
