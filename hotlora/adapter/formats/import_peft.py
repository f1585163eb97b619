"""A plain PEFT adapter on experts, read as a HotLoRA adapter: the way back from `export_adapter(format="peft")`.

Shape suffixes: E experts, R rank.
"""

import copy
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn

from ...base.errors import FileError, HotLoraError
from ...base.files import read_json
from ...base.quiet import quiet
from ...base.unchanged import unchanged_on_error
from ...hf.experts_view import ExpertsView
from ...hf.moe_layers import MoELayer, attention_modules, fingerprint, moe_layers, unwrap
from ...routing.plan import ExpertPlan
from ..config import VARIANTS
from ..load import CONFIG_FILE, WEIGHTS_FILE, check_kinds, read_weights
from ..model import HotLoraConfig
from .peft import loaded_by_peft
from .shared import PREFIX, at_rank


def import_adapter(
    base_model: nn.Module, path: str | Path, adapter_name: str = "default", is_trainable: bool = False
) -> PeftModel:
    """A plain PEFT adapter on experts (`target_parameters`), as a HotLoRA adapter on the same base model.

    PEFT adapts all experts: those whose update is zero are left out of the plan (rule "imported"). Where
    PEFT has one A for gate and up, each gets its own copy. Modules that a HotLoRA adapter holds together,
    such as q, k, v and o, are all adapted if one of them was, the others with an update of zero; they train, too.
    lora_alpha, its scaling and lora_dropout are the adapter's own, so that it trains on as it would have in PEFT;
    where patterns give a module another scaling, B has what that is off by.

    Args:
        base_model: a plain model; wrapped in place, as in PEFT.

    Raises:
        FileError: no such folder, a truncated file, not a plain LoRA adapter, or keys that have no place in a HotLoRA
            adapter (named).
    """
    folder = Path(path).expanduser()
    config = _read_plain_config(folder)
    weights = read_weights(folder / WEIGHTS_FILE)
    own = [key for patterns in (config.rank_pattern, config.alpha_pattern) for key in patterns or ()]
    own = [key for key in own if _OF_GATE_OR_UP.search(key)]
    if own and any(re.search(r"\.experts\.\d+\.", key) for key in weights):
        raise FileError(
            f"{folder} has a pair for each expert, and a rank or an alpha of its own for {own[0]}: PEFT puts gate and "
            "up together, and loses it, so that the scale cannot be told."
        )
    if isinstance(base_model, PeftModel):
        raise HotLoraError("the model has an adapter already: give a plain base model to import_adapter.")
    layers, as_saved = moe_layers(base_model), copy.deepcopy(config)
    try:  # what PEFT does on loading: adapters of transformers 4 had a pair for each expert
        convert_peft_config_for_transformers(config, cast(Any, base_model), None)
        weights = loaded_by_peft(base_model, weights, config)
    except (ValueError, RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise FileError(f"{folder} cannot be brought to this model's layout: {error}") from error
    pairs = _pairs(weights, folder)
    experts = {layer.layer: _read_experts(base_model, layer, config, as_saved, pairs, folder) for layer in layers}
    attention = attention_modules(base_model)
    linears = {
        path: _scaled(pairs.pop(path), config, path)
        for path in [*attention, *(path for layer in layers for path in layer.shared)]
        if path in pairs
    }
    routers = {
        layer.router: _scaled(pairs.pop(path), config, f"{path}.{leaf}")
        for layer in layers
        for path, _, leaf in [f"{layer.router}.{layer.router_weight}".rpartition(".")]
        if path in pairs
    }
    if pairs:
        raise FileError(
            f"{folder / WEIGHTS_FILE} adapts {len(pairs)} modules that have no place in a HotLoRA adapter, such as "
            f"{sorted(pairs)[0]}: it holds routed experts, attention's q, k, v, o, routers and shared experts."
        )
    plan = ExpertPlan(
        experts={layer: ids for layer, (ids, _) in experts.items()},
        num_experts=layers[0].num_experts,
        rule="imported",
        params={},
        fingerprint=fingerprint(base_model),
    )
    found = [pair for _, factors in experts.values() for pair in factors.values()]
    found += [*linears.values(), *routers.values()]
    r = max((pair.A.shape[-2] for pair in found), default=1)
    alpha = as_saved.lora_alpha or r
    hot_config = HotLoraConfig(
        plan=plan,
        r=r,
        lora_alpha=alpha,
        lora_dropout=as_saved.lora_dropout,
        use_rslora=as_saved.use_rslora,
        train_attention=any(path in linears for path in attention),
        train_router=bool(routers),
        train_shared=any(path in linears for layer in layers for path in layer.shared),
        inference_mode=not is_trainable,
    )
    state = _hot_state(layers, experts, {**linears, **routers}, r, _scaling(as_saved, alpha, r))
    with unchanged_on_error(base_model):
        with quiet():
            model = cast(PeftModel, get_peft_model(cast(Any, base_model), hot_config, adapter_name=adapter_name))
        # What PEFT's adapter did not train keeps B = 0: an update of zero.
        try:
            loaded: Any = set_peft_model_state_dict(
                model, {PREFIX + key: tensor for key, tensor in state.items()}, adapter_name=adapter_name
            )
        except RuntimeError as error:  # other shapes
            problem = str(error).splitlines()[-1]
            raise FileError(f"{folder / WEIGHTS_FILE} does not fit this model: {problem}") from error
        assert not loaded.unexpected_keys, loaded.unexpected_keys
    return model if is_trainable else model.eval()


class _Pair(NamedTuple):
    """A `[..., R, in]` and B `[..., out, R]` as they are saved, and what PEFT multiplies their product by."""

    A: Tensor
    B: Tensor
    scaling: float


_OF_GATE_OR_UP = re.compile(r"\b(gate_proj|up_proj|w1|w3)\b")
_KEEP_THE_BASE = ("gaussian", "eva", "orthogonal")
"""init_lora_weights by which A and B alone start otherwise"""


def _read_plain_config(folder: Path) -> LoraConfig:
    if not folder.is_dir():
        raise FileError(f"{folder} is not a folder. Give the folder of a PEFT adapter.")
    file = folder / CONFIG_FILE
    data = read_json(file)
    if data.get("plan"):
        raise FileError(f"{file} holds an expert plan, so it is a hotlora adapter: use load_adapter.")
    if data.get("peft_type") != "LORA":
        raise FileError(f"{file} has peft_type {data.get('peft_type')!r}: only LORA adapters can be imported.")
    others = ("modules_to_save", "lora_bias", "fan_in_fan_out", "trainable_token_indices", "use_qalora")
    for name in (*VARIANTS, *others):
        if data.get(name):
            raise FileError(f"{file} has {name}, which a hotlora adapter does not hold.")
    start = data.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in _KEEP_THE_BASE:
        raise FileError(
            f"{file} has init_lora_weights {start!r}, by which PEFT changes the base's weights, too: convert the "
            "adapter to plain LoRA (PEFT's path_initial_model_for_weight_conversion), or merge it with PEFT."
        )
    if data.get("bias", "none") != "none":
        raise FileError(f"{file} has bias {data['bias']!r}, which a hotlora adapter does not hold.")
    names = (
        "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_parameters",
        "target_modules",
    )  # fmt: skip
    try:
        config = LoraConfig(**{name: data[name] for name in names if data.get(name) is not None})
        check_kinds(config, LoraConfig().to_dict())
    except (TypeError, ValueError) as error:
        raise FileError(f"{file} is not a LoRA adapter's config: {error} Save the adapter again.") from error
    return config


def _pairs(weights: dict[str, Tensor], folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module path -> A and B, as they are saved."""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in weights.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if match is None or tensor.ndim != 2 or not tensor.is_floating_point():
            raise FileError(f"{folder / WEIGHTS_FILE} holds {key}, which is not a LoRA matrix that can be imported.")
        found[match[1]][match[2]] = tensor
    if halves := [path for path, pair in found.items() if len(pair) != 2]:
        raise FileError(f"{folder / WEIGHTS_FILE} has only one of lora_A and lora_B for {halves[0]}. Save it again.")
    return {path: (pair["A"], pair["B"].to(pair["A"].dtype)) for path, pair in found.items()}


def _read_experts(
    model: nn.Module, layer: MoELayer, config: LoraConfig, as_saved: LoraConfig,
    pairs: dict[str, tuple[Tensor, Tensor]], folder: Path,
) -> tuple[tuple[int, ...], dict[str, _Pair]]:  # fmt: skip
    """A layer's experts with an update, ascending, and their factors by projection; takes them out of `pairs`.

    config: as PEFT has converted it, with twice the rank and alpha where it has put gate and up together: no scaling by
    the root of the rank is right by those, so that of `as_saved` is taken.
    """
    module = unwrap(model.get_submodule(layer.experts))
    targets = config.target_parameters or []
    present = ExpertsView(module).weight_names if layer.experts in pairs else []
    names = [name for name in present if _is_target(f"{layer.experts}.{name}", targets)]
    if joined := not names:  # there was a pair for each expert: no parameter is named, and all are there
        names = present
    factors: dict[str, _Pair] = {}
    for depth, name in enumerate(names):
        path = layer.experts + ".base_layer" * (len(names) - 1 - depth)
        if path not in pairs:
            raise FileError(f"{folder / WEIGHTS_FILE} has no lora_A at {path}, which is a target. Save it again.")
        was_named = _is_target(f"{layer.experts}.{name}", as_saved.target_parameters or [])
        by_root = config.use_rslora and not joined and not was_named and name == "gate_up_proj"
        scaling = as_saved if by_root else config
        factors |= _read_parameter(module, layer, name, pairs.pop(path), scaling, folder, joined or by_root)
    changed = [(pair.A.any(-1) & pair.B.any(1)).any(1) for pair in factors.values()]
    if not changed:
        return (), {}
    ids = torch.stack(changed).any(0).nonzero().flatten().tolist()
    return tuple(ids), {name: _Pair(A[ids], B[ids], scaling) for name, (A, B, scaling) in factors.items()}


def _is_target(name: str, targets: Sequence[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _read_parameter(
    module: Any, layer: MoELayer, name: str, pair: tuple[Tensor, Tensor], config: LoraConfig, folder: Path, joined: bool
) -> dict[str, _Pair]:
    """Projection -> A `[E, R, in]` and B `[E, out, R]` of one parameter.

    joined: PEFT has put gate and up together, at twice the rank that their scaling goes by.
    """
    (A, B), E = pair, layer.num_experts
    outs, ins = ExpertsView(module).shape_of(name)
    if A.shape[0] % E or A.shape[1] != ins or tuple(B.shape) != (outs, A.shape[0]):
        raise FileError(
            f"{folder / WEIGHTS_FILE}: {layer.experts}.{name} has lora_A {list(A.shape)} and lora_B {list(B.shape)}, "
            f"which do not fit {E} experts of {ins} inputs and {outs} outputs. It was made for another model."
        )
    r = A.shape[0] // E
    A_E, B_E = A.reshape(E, r, ins), B.reshape(outs, r, E).permute(2, 0, 1)
    target = f"{layer.experts}.{name}"
    if name != "gate_up_proj":
        return {name.removesuffix("_proj"): _scaled((A_E, B_E), config, target)}
    scaling = _scaled((A_E, B_E), config, target).scaling
    B_gate, B_up = (part.transpose(1, 2) for part in ExpertsView(module).split(B_E.transpose(1, 2)))
    gate, up, half = (A_E, B_gate), (A_E, B_up), r // 2
    if r % 2 == 0 and not B_gate[..., half:].any() and not B_up[..., :half].any():
        # Two adapters that were fused, block-diagonal: as export_adapter writes them, and PEFT itself.
        gate, up = (A_E[:, :half], B_gate[..., :half]), (A_E[:, half:], B_up[..., half:])
    if joined:
        return {"gate": _scaled(gate, config, target), "up": _scaled(up, config, target)}
    return {"gate": _Pair(*gate, scaling), "up": _Pair(*up, scaling)}


def _scaled(pair: tuple[Tensor, Tensor], config: LoraConfig, name: str) -> _Pair:
    """The pair with the scaling that PEFT gives it."""
    patterns = config.alpha_pattern or {}
    alpha = patterns.get(get_pattern_key(list(patterns), name), config.lora_alpha)
    return _Pair(*pair, _scaling(config, alpha, pair[0].shape[-2]))


def _scaling(config: LoraConfig, alpha: float, r: int) -> float:
    return alpha / (math.sqrt(r) if config.use_rslora else r)


def _hot_state(
    layers: list[MoELayer],
    experts: dict[int, tuple[tuple[int, ...], dict[str, _Pair]]],
    linears: dict[str, _Pair],
    r: int,
    scaling: float,
) -> dict[str, Tensor]:
    """The tensors of a HotLoRA adapter of rank r and one scaling, by the keys that it saves."""

    def at_its_rank(pair: _Pair) -> tuple[Tensor, Tensor]:
        return at_rank(pair.A, pair.B, r, pair.scaling / scaling)

    state: dict[str, Tensor] = {}
    for layer in layers:
        ids, factors = experts[layer.layer]
        if not ids:
            continue
        padded = {name: at_its_rank(pair) for name, pair in factors.items()}
        gate_up = [padded[name] for name in ("gate", "up") if name in padded]
        if gate_up:
            state[f"{layer.experts}.lora_A_gate_up"] = torch.cat([A for A, _ in gate_up], 1)
            state[f"{layer.experts}.lora_B_gate_up"] = torch.cat([B for _, B in gate_up], 1)
        if "down" in padded:
            state[f"{layer.experts}.lora_A_down"], state[f"{layer.experts}.lora_B_down"] = padded["down"]
    for path, pair in linears.items():
        A, B = at_its_rank(pair)
        state |= {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
    return state
