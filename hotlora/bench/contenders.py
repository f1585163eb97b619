"""What `bench` compares: one model of random weights, its router skewed, and the adapters that are put on it.

All of KINDS adapt attention in the same way, with PEFT's own LoRA, and leave routers and shared experts alone: they
differ in the experts only. The papers' methods adapt what they say. No dropout.
"""

import copy
import math
import re
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..adapter.config import HotLoraConfig
from ..adapter.factors import pack
from ..adapter.mask import SparseMask
from ..adapter.mergeable import factor_slots
from ..base.errors import HotLoraError
from ..base.quiet import quiet
from ..hf.experts_view import ExpertsView
from ..hf.internals import internal
from ..hf.models import auto_class
from ..hf.moe_layers import attention_modules, moe_layers, unwrap
from ..routing.plan import ExpertPlan, select_experts
from ..routing.profile import RoutingProfile
from ..routing.profiler import profile_routing
from ..runs.methods import METHODS, PLACEMENTS
from . import axolotl, unsloth

_LARGE = 2**20  # elements: larger parameters are filled by copying, and given back between turns
_TILE = 2**20 - 3  # odd, so that the rows of a matrix differ
_LOWEST_TO_HIGHEST = 4.0  # widest spread of the routers' rows, in powers of e
KINDS = ("floor", "hot", "all", "peft", "loop", "unsloth", "axolotl")
_OTHER_LIBRARIES: dict[str, Any] = {"unsloth": unsloth, "axolotl": axolotl}
_METHODS = tuple(name for name in METHODS if name != "esft")  # how much esft trains depends on the data
_ADAPTER = ("train_attention", "train_router", "train_shared", "train_a", "use_dora")


@dataclass(frozen=True)
class Contender:
    """One way to adapt the model. `fraction` is of hot experts, else None.

    kind: one of KINDS; or a method, alone or with a placement (`hellora`, `lori-s-pure`), from `methods`.
    """

    kind: str
    fraction: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS and self.method[0] not in _METHODS:
            raise HotLoraError(
                f"contender {self.kind!r} does not exist: choose from {', '.join(KINDS)}, or a method: "
                f"{', '.join(_METHODS)}, each also with -pure or -gate."
            )
        if (self.kind == "hot") != (self.fraction is not None):
            raise HotLoraError(f"contender {self.kind!r} with fraction {self.fraction}: hot has one, others none.")

    @property
    def name(self) -> str:
        return self.kind if self.fraction is None else f"hot {100 * self.fraction:g}%"

    @property
    def options(self) -> dict[str, Any]:
        """A method's, as `methods` has them; empty for what is not by hotlora."""
        if self.kind in ("hot", "all"):
            return {"rule": self.kind, "fraction": self.fraction, "train_router": False, "train_shared": False}
        if self.kind in KINDS:
            return {}
        method, placement = self.method
        return {**METHODS[method], **PLACEMENTS[placement]}

    def plan(self, profile: RoutingProfile) -> ExpertPlan | None:
        """The experts to adapt, where the contender has such."""
        names = ("rule", "fraction", "experts_per_layer")
        chosen = {name: value for name, value in self.options.items() if name in names}
        if chosen.get("experts_per_layer") == "top_k":
            chosen["experts_per_layer"] = profile.num_experts_per_tok
        return select_experts(profile, **chosen) if chosen else None

    @property
    def method(self) -> tuple[str, str]:
        """(method, placement), where the kind is one of the papers'."""
        method, _, placement = self.kind.rpartition("-")
        return (method, placement) if placement in PLACEMENTS else (self.kind, "full")

    @property
    def missing(self) -> str | None:
        """Why this one cannot take part here, or None."""
        module = _OTHER_LIBRARIES.get(self.kind)
        return None if module is None else module.missing()


@dataclass(frozen=True)
class BenchConfig:
    """What is timed. A step is one forward, backward and AdamW update on `tokens` random tokens."""

    model: str = "nano"
    """A config.json, its folder, or nano. Only the config is read: the weights are random."""
    layers: int | None = None
    """Cut the model to its first layers."""
    tokens: int = 2048
    """Tokens of a step, all of them trained."""
    length: int | None = None
    """Tokens of a sequence; None: 2048, or the longest that the model and `tokens` allow."""
    r: int = 32
    dtype: str = "auto"
    """Of the base: auto is the config's own, and float32 on a CPU without instructions for that. In half precision the
    step runs under autocast, as in `train`."""
    device: str = "auto"
    cv: float = 1.0
    """Routers are skewed until each layer's counts have this CV."""
    contenders: tuple[str, ...] = KINDS
    fractions: tuple[float, ...] = (0.125, 0.25)
    """Shares of experts of the contender "hot", which takes part once for each."""
    rounds: int = 5
    """Timed steps of each contender."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "r", "rounds", *(("length",) if self.length is not None else ())):
            if getattr(self, name) < 1:
                raise HotLoraError(f"{name} is {getattr(self, name)}: it must be 1 or more.")
        if self.length is not None and self.tokens % self.length:
            raise HotLoraError(f"tokens is {self.tokens}, no multiple of length {self.length}: change one of the two.")
        if not 0 <= self.seed < 2**32:
            raise HotLoraError(f"seed is {self.seed}: it must be 0 or more and below 2^32.")
        if self.cv < 0:
            raise HotLoraError(f"cv is {self.cv}: it must be 0 or more.")
        if not self.contenders:
            raise HotLoraError(f"contenders is empty: name some of {', '.join(KINDS)}.")
        if wrong := [fraction for fraction in self.fractions if not 0 < fraction < 1]:
            raise HotLoraError(f"fraction is {wrong[0]}: it must be between 0 and 1; `all` has all experts.")
        names = [contender.name for contender in self.all_contenders()]
        if twice := [name for name in names if names.count(name) > 1]:
            raise HotLoraError(f"{twice[0]} takes part twice: name each contender, and each fraction, once.")

    def all_contenders(self) -> list[Contender]:
        """In order; "hot" once for each of the fractions."""
        hot = [Contender("hot", fraction) for fraction in self.fractions]
        return [c for kind in self.contenders for c in (hot if kind == "hot" else [Contender(kind)])]


class RandomModel:
    """A model of random weights, the same for the same config and seed. Its large weights can be given back and made
    again, so that several processes take turns with the memory of one."""

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        no_init_weights = internal("transformers.initialization:no_init_weights")
        with quiet(), torch.device(device), no_init_weights():
            self.model: PreTrainedModel = auto_class(config).from_config(config, dtype=dtype)
        # PEFT and the loop keep these very tensors, or views of them.
        self._large = [p for p in self.model.parameters() if p.numel() >= _LARGE]
        self._sizes = [p.untyped_storage().nbytes() for p in self._large]
        for parameter in self._large:
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        torch.manual_seed(seed)
        std = getattr(config.get_text_config(), "initializer_range", None) or 0.02
        self._tile = torch.randn(_TILE, device=device).mul_(std).to(dtype)
        self.model.initialize_weights()
        self._fill()
        self.model.requires_grad_(False)

    @torch.no_grad()
    def sleep(self) -> None:
        """Gives the large weights' memory back. The model cannot run until `wake`."""
        for parameter in self._large:
            parameter.untyped_storage().resize_(0)

    @torch.no_grad()
    def wake(self) -> None:
        """Makes them again, with the same values."""
        for parameter, size in zip(self._large, self._sizes, strict=True):
            parameter.untyped_storage().resize_(size)
        self._fill()

    def _fill(self) -> None:
        for i, parameter in enumerate(self._large):
            flat, tile = parameter.data.view(-1), self._tile.roll(7919 * i).to(parameter.dtype)
            whole = len(flat) // _TILE * _TILE
            flat[:whole].view(-1, _TILE).copy_(tile)
            flat[whole:].copy_(tile[: len(flat) - whole])


@torch.no_grad()
def skew_routers(model: nn.Module, spreads: list[float], seed: int) -> None:
    """Gives each layer's router weights whose rows differ in length: lognormal with the layer's spread, at random
    places. An expert with a longer row has scores further from zero, and is chosen more often."""
    for layer, spread in zip(moe_layers(model), spreads, strict=True):
        weight = unwrap(model.get_submodule(layer.router)).get_parameter(layer.router_weight)
        rows, width = weight.shape
        generator = torch.Generator().manual_seed(seed * 1_000_003 + layer.layer)
        normal = torch.randn(rows, width, generator=generator) / math.sqrt(width)
        places = torch.randperm(rows, generator=generator)
        lengths = torch.special.ndtri((places + 0.5) / rows).mul(spread).exp()
        weight.copy_(normal * lengths[:, None])


def spreads_for(model: PreTrainedModel, input_ids: Tensor, cv: float, seed: int) -> list[float]:
    """The spread for each layer at which the CV of its counts on `input_ids` is near `cv`; the nearest end of the
    range where none is."""
    layers = len(moe_layers(model))
    low, high = [0.0] * layers, [_LOWEST_TO_HIGHEST] * layers
    for _ in range(10):
        middle = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
        skew_routers(model, middle, seed)
        for i, found in enumerate(profile_routing(model, [{"input_ids": input_ids}]).layer_cv().tolist()):
            (low if found < cv else high)[i] = middle[i]
    return [(a + b) / 2 for a, b in zip(low, high, strict=True)]


def adapted(model: PreTrainedModel, contender: Contender, plan: ExpertPlan | None, r: int) -> nn.Module:
    """`model` with the contender's adapters, or as it is where all its weights train; in training mode.

    plan: of the contender's experts, where it has such.
    """
    options = contender.options
    if options.get("full"):
        return model.requires_grad_(True).train()
    with quiet():
        if "rule" in options:
            own = {name: options[name] for name in _ADAPTER if name in options}
            config: LoraConfig = HotLoraConfig(plan=plan, r=r, lora_alpha=2 * r, **own)
            if "keep" in options:
                mask = random_mask(model, config, options["keep"])
                config = HotLoraConfig(plan=plan, r=r, lora_alpha=2 * r, mask=mask, **own)
        else:
            modules = [re.escape(path) for path in attention_modules(model)]
            if contender.kind == "loop":
                modules += [rf"{re.escape(path)}\.\d+\.[^.]+_linear" for path in unroll_experts(model)]
            fused = None
            if contender.kind in ("peft", *_OTHER_LIBRARIES):
                paths = {x.experts: ExpertsView(unwrap(model.get_submodule(x.experts))) for x in moe_layers(model)}
                fused = [f"{path}.{name}" for path, view in paths.items() for name in (view.up_name, "down_proj")]
            config = LoraConfig(
                r=r, lora_alpha=2 * r, target_modules="|".join(modules), target_parameters=fused,
                task_type="CAUSAL_LM",
            )  # fmt: skip
        if contender.kind in _OTHER_LIBRARIES:
            return cast(PeftModel, _OTHER_LIBRARIES[contender.kind].adapted(model, config))
        return cast(PeftModel, get_peft_model(model, config)).train()


def random_mask(model: PreTrainedModel, config: LoraConfig, keep: float) -> SparseMask:
    """A mask as large as LoRI-S's: which entries stay does not matter to time and memory."""
    with torch.device("meta"), quiet():
        empty = get_peft_model(auto_class(model.config).from_config(copy.deepcopy(model.config)), config)
    generator = torch.Generator().manual_seed(0)
    kept = {}
    for slot in factor_slots(empty.get_base_model(), "default"):
        if not slot.is_A:
            kept[slot.name] = torch.rand(slot.values.shape, generator=generator) < keep
            kept[slot.name].view(-1)[0] = True
    packed = {name: pack(mask) for name, mask in kept.items()}
    return SparseMask(packed, {name: tuple(mask.shape) for name, mask in kept.items()}, keep, "matrix", a_seed=0)


def unroll_experts(model: PreTrainedModel) -> list[str]:
    """Replaces each fused experts module by a loop over experts of three Linears, as transformers 4 had it. The
    Linears' weights are views of the fused ones. Returns the modules' paths."""
    paths = [layer.experts for layer in moe_layers(model)]
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, LoopedExperts(model.get_submodule(path)))
    return paths


class LoopedExperts(nn.ModuleList):
    """Experts as the papers ran them: each by itself, on its own tokens, added up by `index_add_`."""

    def __init__(self, experts: Any) -> None:
        super().__init__(LoopedExpert(experts, e) for e in range(experts.num_experts))

    def forward(self, hidden_TD: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor) -> Tensor:
        output_TD = torch.zeros_like(hidden_TD)
        mask_EKT = nn.functional.one_hot(top_k_index_TK, len(self)).permute(2, 1, 0)
        hit = mask_EKT.sum(dim=(1, 2)).nonzero().flatten().tolist()
        for e in hit:
            k, token = torch.where(mask_EKT[e])
            y = self[e](hidden_TD[token]) * top_k_weights_TK[token, k, None]
            output_TD.index_add_(0, token, y.to(hidden_TD.dtype))
        return output_TD


class LoopedExpert(nn.Module):
    """One expert as Linears. PEFT must not be given a target of which it thinks that transformers 4 called fused
    experts or routers so (gate_proj, w1, gate, …): it would put the adapters elsewhere (peft#3711)."""

    def __init__(self, experts: Any, e: int) -> None:
        super().__init__()
        self._view = ExpertsView(experts)
        self.post_expert_norm = self._view.norm_after
        self._act_fn: Any = getattr(experts, "act_fn", None)  # a family with an activation of its own may have none
        *gates, up, down = (_linear(*linear) for linear in self._view.linears_of(e))
        self.gate_linear: nn.Linear | None = gates[0] if gates else None
        self.up_linear, self.down_linear = up, down

    def forward(self, x: Tensor) -> Tensor:
        y = self.down_linear(self._activated(x))
        return y if self.post_expert_norm is None else self.post_expert_norm(y)

    def _activated(self, x: Tensor) -> Tensor:
        up = self.up_linear(x)
        if self.gate_linear is None:
            return self._act_fn(up)
        gate = self.gate_linear(x)
        if not self._view.has_own_gate:
            return self._act_fn(gate) * up
        return self._view.activation(self._view.join(torch.cat([gate, up], -1)))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
