"""What the formats share: an adapter's tensors at one rank and one scaling, and the names of a family's checkpoints.

Shape suffixes: E experts, N adapted experts, D model width, F expert width, R rank.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...base.errors import HotLoraError
from ...hf.experts_view import ExpertsView
from ...hf.internals import internal
from ...hf.linears import quantized_bits_of
from ...hf.moe_layers import moe_layers
from ...routing.plan import ExpertPlan
from ..config import HotLoraConfig
from ..experts import HotLoraExperts
from ..raw_weights import HotLoraRouter, HotLoraWeights

PREFIX = "base_model.model."
_PER_EXPERT = re.compile(r"^(.*\.experts)\.0\.(\w+)\.weight$")


@dataclass(frozen=True)
class ExpertFactors:
    """One layer's adapted experts; `factors`: projection -> (A `[N, R, in]`, B `[N, out, R]`)."""

    path: str
    module: Any
    """transformers' experts module."""
    ids: tuple[int, ...]
    num_experts: int
    factors: dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LinearFactors:
    """An adapted 2-D weight: A `[R, in]`, B `[out, R]`."""

    path: str
    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class AdapterFactors:
    """A whole adapter with one rank and one scaling, lora_alpha / r; what differed is folded into B."""

    r: int
    lora_alpha: int
    experts: list[ExpertFactors]
    routers: list[LinearFactors]
    """Path: of the module that holds the weight."""
    linears: list[LinearFactors]
    """Attention and shared experts."""


def collect(model: PeftModel, adapter: str, layers: dict[str, Any], format: str) -> AdapterFactors:
    """The adapter's tensors, on the CPU.

    Raises:
        HotLoraError: a layer that `format` cannot hold.
    """
    config = cast(HotLoraConfig, model.peft_config[adapter])
    ranks = ExpertPlan.from_dict(config.plan).ranks or {}
    r = max(*(layer.r[adapter] for layer in layers.values()), *(r for its in ranks.values() for r in its), 1)
    scaling = config.lora_alpha / r
    moe = {layer.experts: layer for layer in moe_layers(model.get_base_model())}
    holders = {layer.router: f"{layer.router}.{layer.router_weight}".rpartition(".")[0] for layer in moe.values()}
    parts = AdapterFactors(r, config.lora_alpha, [], [], [])
    for path, layer in layers.items():
        fold = layer.scaling[adapter] / scaling
        if isinstance(layer, HotLoraExperts):
            factors = _projections(layer, adapter, r, fold)
            ids = layer.expert_ids[adapter]
            parts.experts.append(ExpertFactors(path, layer.get_base_layer(), ids, moe[path].num_experts, factors))
        elif isinstance(layer, HotLoraRouter):
            A, B = layer.factor_pairs(adapter)["weight"]
            parts.routers.append(LinearFactors(holders[path], *at_rank(A, B, r, fold)))
        elif isinstance(layer, HotLoraWeights):
            raise HotLoraError(
                f"format {format!r} cannot hold {path}: the shared experts of this family are no Linears. Use format "
                "'merged', or train with train_shared=False."
            )
        elif isinstance(layer, LoraLinear) or quantized_bits_of(layer.get_base_layer()):
            matrices = cast(Any, layer)
            A, B = matrices.lora_A[adapter].weight, matrices.lora_B[adapter].weight
            parts.linears.append(LinearFactors(path, *at_rank(A, B, r, fold)))
        else:
            raise HotLoraError(f"{path} has an adapter of another kind ({type(layer).__name__}): use format 'merged'.")
    return parts


def at_rank(A: Tensor, B: Tensor, r: int, fold: float) -> tuple[Tensor, Tensor]:
    """A `[..., R, in]` and B `[..., out, R]` padded to rank r, and B times what its scaling was off by."""
    A, B = A.detach().cpu(), B.detach().cpu()
    missing = r - A.shape[-2]
    if missing:
        A = nn.functional.pad(A, (0, 0, 0, missing))
        B = nn.functional.pad(B, (0, missing))
    return A, B if fold == 1 else (B.double() * fold).to(B.dtype)


def _projections(layer: HotLoraExperts, adapter: str, r: int, fold: float) -> dict[str, tuple[Tensor, Tensor]]:
    """gate (where there is one), up and down: A `[N, R, in]`, B `[N, out, R]`, at one rank."""
    pairs = {key: at_rank(A, B, r, fold) for key, (A, B) in layer.factor_pairs(adapter).items()}
    names = ("gate", "up", "down")[-layer.view.num_parts - 1 :]
    ids = layer.expert_ids[adapter]
    return {
        name: (torch.stack([pairs[e, name][0] for e in ids]), torch.stack([pairs[e, name][1] for e in ids]))
        for name in names
    }


def server_format(
    base: Any,
    parts: AdapterFactors,
    names_of: Callable[[Any, ExpertFactors], tuple[str, dict[str, str]]],
    has_cold: bool,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config of a pair of matrices for each expert and projection.

    names_of: a layer's experts -> where the server looks for them, and each projection's name. has_cold: with zeros
    for the experts that are not adapted.
    """
    tensors: dict[str, Tensor] = {}
    modules: set[str] = set()
    for experts in parts.experts:
        root, names = names_of(base, experts)
        places = {expert: n for n, expert in enumerate(experts.ids)}
        for expert in range(experts.num_experts) if has_cold else experts.ids:
            for projection, (A, B) in experts.factors.items():
                n = places.get(expert)
                own = (torch.zeros_like(f[0]) if n is None else f[n].clone() for f in (A, B))
                tensors |= pair(f"{root}.{expert}.{names[projection]}", *own)
        modules.update(names[projection] for projection in experts.factors)
    for linear in parts.linears:
        path = checkpoint_path(base, linear.path)
        tensors |= pair(path, linear.A, linear.B)
        modules.add(path.rpartition(".")[2])
    return tensors, {"r": parts.r, "lora_alpha": parts.lora_alpha, "target_modules": sorted(modules)}


def all_experts(A: Tensor, B: Tensor, ids: Sequence[int], num_experts: int) -> tuple[Tensor, Tensor]:
    """A `[E, R, in]` and B `[E, out, R]`: zeros for the cold experts."""
    A_E, B_E = (factor.new_zeros(num_experts, *factor.shape[1:]) for factor in (A, B))
    A_E[list(ids)], B_E[list(ids)] = A, B
    return A_E, B_E


def expert_names(experts: ExpertFactors) -> dict[str, str]:
    """gate, up and down, as most name them."""
    return {projection: f"{projection}_proj" for projection in experts.factors}


def checkpoint_experts(base: Any, experts: ExpertFactors) -> tuple[str, list[str]]:
    """Where a layer's experts are in the family's checkpoints: `model.layers.0.mlp.experts`, and the projections'
    names there, such as Mixtral's w1, w3 and w2; no names where a checkpoint has all experts in one tensor."""
    view = ExpertsView(experts.module)
    D, F = view.widths
    root, found = experts.path, []
    for name, shape in ((view.up_name, (view.num_parts * F, D)), ("down_proj", (D, F))):
        keys = _checkpoint_keys(base, f"{experts.path}.{name}", (experts.num_experts, *shape))
        matches = [match for match in map(_PER_EXPERT.match, keys) if match]
        found += [match[2] for match in matches]
        root = matches[0][1] if matches else root
    return root, found


def checkpoint_path(base: Any, path: str) -> str:
    """A Linear's path in the family's checkpoints, which is what servers map from."""
    keys = _checkpoint_keys(base, f"{path}.weight", (1, 1))
    return keys[0].removesuffix(".weight") if len(keys) == 1 and keys[0].endswith(".weight") else path


def _checkpoint_keys(base: Any, key: str, shape: Sequence[int]) -> list[str]:
    weight = torch.empty(tuple(shape), device="meta")
    try:
        return list(internal("transformers.core_model_loading:revert_weight_conversion")(base, {key: weight}))
    except ValueError:  # a family that saves this weight only together with others (ernie4_5_vl_moe)
        return [key]


def pair(path: str, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """A and B under the keys of a module at `path`."""
    return {f"{PREFIX}{path}.lora_A.weight": A.contiguous(), f"{PREFIX}{path}.lora_B.weight": B.contiguous()}


@contextmanager
def without_adapters(base: nn.Module) -> Iterator[None]:
    """The modules as transformers knows them: its names and its conversion to the checkpoint's layout hold."""
    wrapped = [(path.rpartition("."), m) for path, m in base.named_modules() if isinstance(m, BaseTunerLayer)]
    try:
        for (parent, _, name), layer in wrapped:
            setattr(base.get_submodule(parent), name, layer.get_base_layer())
        yield
    finally:
        for (parent, _, name), layer in wrapped:
            setattr(base.get_submodule(parent), name, layer)
