"""An adapter in the formats of others: vLLM, SGLang, plain PEFT, a merged checkpoint.

Shape suffixes: E experts, N adapted experts, D model width, F expert width, R rank.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from ...base.errors import FileError, HotLoraError, ModelError
from ...base.files import atomic_folder, write_json
from ...base.quiet import quiet
from ...hf.experts_view import ExpertsView
from ...hf.models import attention_modules, moe_layers
from ...routing.plan import ExpertPlan
from ..experts import HotExperts, HotLoraExperts
from ..load import CONFIG_FILE, WEIGHTS_FILE
from ..mergeable import MergeableLayer
from ..model import HotLoraConfig
from ..on_top_of import described, merged_for_now, merged_into
from ..raw_weights import HotLoraRouter, HotLoraWeights

_log = logging.getLogger(__name__)

FORMATS = ("vllm", "sglang", "peft", "merged")

PREFIX = "base_model.model."
# Linears under these names PEFT takes for parts of the routed experts, in many families (peft#3711).
_REWRITTEN_BY_PEFT = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
# MLA's up-projection of keys and values. vLLM takes its weight apart when it loads a model, and holds it by a reference
# that is older than its LoRA layers: an adapter's update is read, and applied nowhere (vllm#48974, of 0.25.1 and on).
_NOT_APPLIED = {"vllm": ("kv_b_proj",)}
_EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
_PER_EXPERT = re.compile(r"^(.*\.experts)\.0\.(\w+)\.weight$")


@dataclass(frozen=True)
class _Experts:
    """One layer's adapted experts; `factors`: projection -> (A `[N, R, in]`, B `[N, out, R]`)."""

    path: str
    module: Any
    """transformers' experts module."""
    ids: tuple[int, ...]
    num_experts: int
    factors: dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Linear:
    """An adapted 2-D weight: A `[R, in]`, B `[out, R]`."""

    path: str
    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class _Parts:
    """A whole adapter with one rank and one scaling, lora_alpha / r; what differed is folded into B."""

    r: int
    lora_alpha: int
    experts: list[_Experts]
    routers: list[_Linear]
    """Path: of the module that holds the weight."""
    linears: list[_Linear]
    """Attention and shared experts."""


def export_adapter(
    model: nn.Module,
    output: str | Path,
    *,
    format: str,
    adapter_name: str = "default",
    merge_router: bool = False,
    drop_router: bool = False,
    merge_attention: bool = False,
    tokenizer: Any = None,
) -> Path:
    """Writes a HotLoRA adapter in the format of a server or a library. `model` is left as it was.

    vllm: one pair of matrices for each expert and projection, zeros for the cold experts. sglang: the same,
    hot experts only. peft: a plain PEFT adapter (`target_parameters`), which `peft.PeftModel.from_pretrained`
    loads. merged: a whole checkpoint of the model with the adapter folded in.

    The servers' formats hold no router. An adapter that trains it needs either of

    - merge_router: `output/adapter` holds the rest, and `output/base` the base model with the routers'
      updates folded in. Serve the two together.
    - drop_router: the routers' updates are left out, so answers differ from the trained model's.

    vLLM applies no adapter to MLA's `kv_b_proj` (DeepSeek, Kimi, GLM-5, …). An adapter that trains it needs

    - merge_attention: its updates are folded into `output/base`, too.

    Args:
        model: a `PeftModel` with a HotLoRA adapter.
        output: a folder that is not there yet, or is empty.
        tokenizer: saved beside a checkpoint (merged, merge_router, merge_attention).

    Returns:
        `output`.

    Raises:
        HotLoraError: an unknown format or adapter, or something that the format cannot hold (named).
        FileError: `output` is taken.
    """
    output = check_export(format, output)
    if not isinstance(model, PeftModel):
        raise ModelError(f"{type(model).__name__} has no adapter. Give a PeftModel, as load_adapter returns it.")
    config = _config(model, adapter_name)
    _check_plain(config, format)
    layers = _lora_layers(model, adapter_name)
    routers = [path for path, layer in layers.items() if isinstance(layer, HotLoraRouter)]
    _check_router_choice(format, bool(routers), merge_router, drop_router)
    attention = not_applied(layers, format)
    _check_attention_choice(format, bool(attention), merge_attention)
    if merged := [path for path, layer in layers.items() if layer.merged]:
        raise HotLoraError(f"{merged[0]} has an adapter merged in: call unmerge_adapter() first.")
    if format == "merged":
        tuner: Any = model.base_model
        with atomic_folder(output) as folder, merged_for_now(model.get_base_model(), [tuner.entry_of(adapter_name)]):
            _save_checkpoint(model, adapter_name, list(layers), folder, tokenizer)
        return output
    into_base = [*(routers if merge_router else []), *attention]
    if (ground := merged_into(model)) and not into_base:
        _log.warning("the export is for the base with %s merged in: use it on a checkpoint of that", described(ground))
    held = {path: layer for path, layer in layers.items() if path not in attention}
    parts = _collect(model, adapter_name, held, format)
    if format != "peft" and not parts.experts and not parts.linears:
        raise HotLoraError(
            f"the adapter trains nothing else that format {format!r} holds, so nothing is left to export: use format "
            "'merged'."
        )
    base = model.get_base_model()
    with _without_adapters(base):
        if format == "peft":
            tensors, targets = _peft_format(parts)
            tensors = _as_peft_loads(base, tensors, LoraConfig(**targets))  # PEFT leaves a HotLoraConfig's as they are
        else:
            tensors, targets = _server_format(base, parts, format)
    plain = {
        "task_type": config.task_type,
        "inference_mode": True,
        "base_model_name_or_path": config.base_model_name_or_path,
        **targets,
    }
    with atomic_folder(output) as folder:
        if into_base:
            _save_checkpoint(model, adapter_name, into_base, folder / "base", tokenizer)
        _save_adapter(plain, tensors, folder / "adapter" if into_base else folder)
    return output


def check_export(format: str, output: str | Path) -> Path:
    """`output`, if it is free and `format` exists; else an error as of `export_adapter`."""
    output = Path(output)
    if format not in FORMATS:
        raise HotLoraError(f"format {format!r} does not exist: choose one of {', '.join(FORMATS)}.")
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise FileError(f"{output} is there already and not empty: give a new folder for the export.")
    return output


def check_config(config: HotLoraConfig, format: str, *, merge_router: bool, drop_router: bool) -> None:
    """HotLoraError for what `export_adapter` refuses by an adapter's config alone."""
    _check_plain(config, format)
    _check_router_choice(format, config.train_router, merge_router, drop_router)


def check_attention(config: HotLoraConfig, base: nn.Module, format: str, *, merge_attention: bool) -> None:
    """HotLoraError for what it refuses by the base's modules besides; they may be on the meta device."""
    trained = attention_modules(base) if config.train_attention else []
    _check_attention_choice(format, bool(not_applied(trained, format)), merge_attention)


def not_applied(paths: Iterable[str], format: str) -> list[str]:
    """Those of some modules whose updates a server would read and not apply."""
    return [path for path in paths if path.rpartition(".")[2] in _NOT_APPLIED.get(format, ())]


# What is in the model


def _config(model: PeftModel, adapter_name: str) -> HotLoraConfig:
    config = model.peft_config.get(adapter_name)
    if config is None:
        raise HotLoraError(
            f"the model has no adapter {adapter_name!r}: its adapters are {', '.join(sorted(model.peft_config))}."
        )
    if not isinstance(config, HotLoraConfig):
        raise HotLoraError(f"adapter {adapter_name!r} is not a hotlora adapter: save it with save_pretrained.")
    return config


def _lora_layers(model: PeftModel, adapter_name: str) -> dict[str, Any]:
    modules = model.get_base_model().named_modules()
    return {path: m for path, m in modules if isinstance(m, LoraLayer) and adapter_name in m.scaling}


def _check_router_choice(format: str, has_router: bool, merge_router: bool, drop_router: bool) -> None:
    if merge_router and drop_router:
        raise HotLoraError("merge_router and drop_router exclude each other: give one.")
    chosen = "merge_router" if merge_router else "drop_router" if drop_router else None
    if chosen and format in ("peft", "merged"):
        raise HotLoraError(f"format {format!r} holds the router: leave {chosen} out.")
    if chosen and not has_router:
        raise HotLoraError(f"the adapter does not train the router: leave {chosen} out.")
    if has_router and not chosen and format in ("vllm", "sglang"):
        raise HotLoraError(
            f"format {format!r} cannot hold the adapter's router updates. Give merge_router=True (--merge-router), "
            "which writes the base model with the routers' updates beside the adapter, or drop_router=True "
            "(--drop-router), which leaves them out: answers then differ from the trained model's."
        )


def _check_attention_choice(format: str, has_such: bool, merge_attention: bool) -> None:
    if has_such and not merge_attention:
        raise HotLoraError(
            f"format {format!r} cannot hold the adapter's updates of attention's {_NOT_APPLIED[format][0]}: the server "
            "would read them and apply them nowhere. Give merge_attention=True (--merge-attention), which writes the "
            "base model with these updates beside the adapter, or train without attention (--no-attention)."
        )
    if merge_attention and not has_such:
        raise HotLoraError(f"format {format!r} holds all of this adapter's attention: leave merge_attention out.")


def _check_plain(config: HotLoraConfig, format: str) -> None:
    for name in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, name, None):
            raise HotLoraError(f"an adapter with {name} cannot be exported: use merge_and_unload().")
    for name in ("use_dora", "train_full_experts"):
        if getattr(config, name) and format != "merged":
            raise HotLoraError(f"format {format!r} cannot hold an adapter with {name}: use format 'merged'.")


def _collect(model: PeftModel, adapter: str, layers: dict[str, Any], format: str) -> _Parts:
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
    parts = _Parts(r, config.lora_alpha, [], [], [])
    for path, layer in layers.items():
        fold = layer.scaling[adapter] / scaling
        if isinstance(layer, HotLoraExperts):
            factors = _projections(layer, adapter, r, fold)
            ids = layer.expert_ids[adapter]
            parts.experts.append(_Experts(path, layer.get_base_layer(), ids, moe[path].num_experts, factors))
        elif isinstance(layer, HotLoraRouter):
            A, B = layer.factor_pairs(adapter)["weight"]
            parts.routers.append(_Linear(holders[path], *uniform(A, B, r, fold)))
        elif isinstance(layer, HotLoraWeights):
            raise HotLoraError(
                f"format {format!r} cannot hold {path}: the shared experts of this family are no Linears. Use format "
                "'merged', or train with train_shared=False."
            )
        elif isinstance(layer, LoraLinear):
            matrices = cast(Any, layer)
            A, B = matrices.lora_A[adapter].weight, matrices.lora_B[adapter].weight
            parts.linears.append(_Linear(path, *uniform(A, B, r, fold)))
        else:
            raise HotLoraError(f"{path} has an adapter of another kind ({type(layer).__name__}): use format 'merged'.")
    return parts


def uniform(A: Tensor, B: Tensor, r: int, fold: float) -> tuple[Tensor, Tensor]:
    """A `[..., R, in]` and B `[..., out, R]` padded to rank r, and B times what its scaling was off by."""
    A, B = A.detach().cpu(), B.detach().cpu()
    missing = r - A.shape[-2]
    if missing:
        A = nn.functional.pad(A, (0, 0, 0, missing))
        B = nn.functional.pad(B, (0, missing))
    return A, B if fold == 1 else (B.double() * fold).to(B.dtype)


def _projections(layer: HotLoraExperts, adapter: str, r: int, fold: float) -> dict[str, tuple[Tensor, Tensor]]:
    """gate (where there is one), up and down: A `[N, R, in]`, B `[N, out, R]`, at one rank."""
    pairs = {key: uniform(A, B, r, fold) for key, (A, B) in layer.factor_pairs(adapter).items()}
    names = ("gate", "up", "down")[-layer.view.num_parts - 1 :]
    ids = layer.expert_ids[adapter]
    return {
        name: (torch.stack([pairs[e, name][0] for e in ids]), torch.stack([pairs[e, name][1] for e in ids]))
        for name in names
    }


# Servers: a pair of matrices for each expert


def _server_format(base: Any, parts: _Parts, format: str) -> tuple[dict[str, Tensor], dict]:
    tensors: dict[str, Tensor] = {}
    modules: set[str] = set()
    for experts in parts.experts:
        root, names = _expert_names(base, experts, format)
        slots = {expert: n for n, expert in enumerate(experts.ids)}
        for expert in range(experts.num_experts) if format == "vllm" else experts.ids:
            for projection, (A, B) in experts.factors.items():
                key = f"{PREFIX}{root}.{expert}.{names[projection]}"
                n = slots.get(expert)
                for side, factor in (("A", A), ("B", B)):
                    tensor = torch.zeros_like(factor[0]) if n is None else factor[n].clone()
                    tensors[f"{key}.lora_{side}.weight"] = tensor.contiguous()
        modules.update(names[projection] for projection in experts.factors)
    for linear in parts.linears:
        path = _checkpoint_key(base, linear.path)
        tensors |= _pair(path, linear.A, linear.B)
        modules.add(path.rpartition(".")[2])
    return tensors, {"r": parts.r, "lora_alpha": parts.lora_alpha, "target_modules": sorted(modules)}


def _expert_names(base: Any, experts: _Experts, format: str) -> tuple[str, dict[str, str]]:
    """Where a server looks for a layer's experts: `model.layers.0.mlp.experts`, and each projection's name.

    vLLM goes by the checkpoint's own names, such as Mixtral's `block_sparse_moe.experts.0.w1`. SGLang goes by
    the layer's index, the expert's, and gate, up and down.
    """
    plain = {projection: f"{projection}_proj" for projection in experts.factors}
    F, D = experts.factors["down"][0].shape[-1], experts.factors["down"][1].shape[-2]
    wide = ("gate_up_proj", 2 * F) if "gate" in plain else ("up_proj", F)
    root, found = experts.path, []
    for name, shape in ((wide[0], (wide[1], D)), ("down_proj", (D, F))):
        keys = _checkpoint_keys(base, f"{experts.path}.{name}", (experts.num_experts, *shape))
        matches = [match for match in map(_PER_EXPERT.match, keys) if match]
        found += [match[2] for match in matches]
        root = matches[0][1] if matches else root
    if format == "sglang":
        return root, plain
    if len(found) == len(plain):
        return root, dict(zip(plain, found, strict=True))
    if base.config.get_text_config().model_type == "gpt_oss":  # a fused checkpoint, whose parts vLLM names so (0.32)
        return root, {"gate": "w1", "up": "w3", "down": "w2"}
    return root, plain


def _checkpoint_key(base: Any, path: str) -> str:
    """A Linear's path in the family's checkpoints, which is what servers map from."""
    keys = _checkpoint_keys(base, f"{path}.weight", (1, 1))
    return keys[0].removesuffix(".weight") if len(keys) == 1 and keys[0].endswith(".weight") else path


def _checkpoint_keys(base: Any, key: str, shape: Sequence[int]) -> list[str]:
    weight = torch.empty(tuple(shape), device="meta")
    try:
        return list(revert_weight_conversion(base, {key: weight}))
    except ValueError:  # a family that saves this weight only together with others (ernie4_5_vl_moe)
        return [key]


def _pair(path: str, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    return {f"{PREFIX}{path}.lora_A.weight": A.contiguous(), f"{PREFIX}{path}.lora_B.weight": B.contiguous()}


# Plain PEFT: target_parameters


def _peft_format(parts: _Parts) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    modules, parameters = [], []
    for experts in parts.experts:
        names = expert_parameters(experts.module)
        for depth, name in enumerate(names):
            A, B = _all_experts(*_fused(experts, name), experts.ids, experts.num_experts)
            # PEFT wraps a module once for each of its parameters, the first one innermost.
            path = experts.path + ".base_layer" * (len(names) - 1 - depth)
            tensors |= _pair(path, *_stacked(A, B))
            parameters.append(f"{experts.path}.{name}")
    for linear in parts.linears:
        tensors |= _pair(linear.path, linear.A, linear.B)
        if linear.path.rpartition(".")[2] in _REWRITTEN_BY_PEFT:
            parameters.append(f"{linear.path}.weight")
        else:
            modules.append(linear.path)
    for router in parts.routers:
        tensors |= _pair(router.path, router.A, router.B)
        parameters.append(f"{router.path}.weight")
    targets: dict[str, Any] = {
        "r": parts.r,
        "lora_alpha": parts.lora_alpha,
        "target_modules": sorted(modules),  # never None: PEFT would choose some by itself
        "target_parameters": sorted(parameters),
    }
    if fused := [experts for experts in parts.experts if "gate" in experts.factors]:
        # The fused adapter has twice the rank. It is the default, and the others are the exception, because
        # PEFT warns of patterns that match no target module, and readers without patterns see the largest rank.
        others = rf".*(?<!\.{fused[0].path.rpartition('.')[2]}\.gate_up_proj)"
        targets |= {
            "r": 2 * parts.r,
            "lora_alpha": 2 * parts.lora_alpha,
            "rank_pattern": {others: parts.r},
            "alpha_pattern": {others: parts.lora_alpha},
        }
    return tensors, targets


def _as_peft_loads(base: Any, tensors: dict[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """The tensors under keys that PEFT finds again: on loading it renames keys from the checkpoint's names to the
    model's, and in some families (laguna, deepseek_ocr2) renames the model's own names once more.

    Raises:
        HotLoraError: PEFT cannot load adapters of this family.
    """
    renamed = {}
    moved = tensors.keys() - loaded_by_peft(base, tensors, config).keys()
    for key, tensor in tensors.items():
        path, _, rest = key.removeprefix(PREFIX).partition(".lora_")
        renamed[f"{PREFIX}{_checkpoint_key(base, path)}.lora_{rest}" if key in moved else key] = tensor
    loaded = loaded_by_peft(base, renamed, config)
    if lost := sorted(tensors.keys() - loaded.keys()):
        raise HotLoraError(
            f"format 'peft': PEFT renames {lost[0]} when it loads an adapter of a {base.config.model_type} model, and "
            "would leave it out. Use another format, or save_pretrained and hotlora.load_adapter."
        )
    return renamed


def loaded_by_peft(base: Any, tensors: dict[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    return convert_peft_adapter_state_dict_for_transformers(base, config, tensors)


def expert_parameters(experts: Any) -> list[str]:
    """The names of the experts' weights, in the order in which PEFT meets them."""
    return [name for name, _ in experts.named_parameters(recurse=False) if name in _EXPERT_PARAMETERS]


def _fused(experts: _Experts, name: str) -> tuple[Tensor, Tensor]:
    """A `[N, R, in]` and B `[N, out, R]` of one parameter of the base; gate_up_proj has rank 2R."""
    if name != "gate_up_proj":
        return experts.factors[name.removesuffix("_proj")]
    (A_gate, B_gate), (A_up, B_up) = experts.factors["gate"], experts.factors["up"]
    A = torch.cat([A_gate, A_up], 1)
    B_gate = nn.functional.pad(B_gate, (0, A_up.shape[1]))
    B_up = nn.functional.pad(B_up, (A_gate.shape[1], 0))
    if ExpertsView(experts.module).is_interleaved:
        return A, torch.stack([B_gate, B_up], 2).flatten(1, 2)
    return A, torch.cat([B_gate, B_up], 1)


def _all_experts(A: Tensor, B: Tensor, ids: Sequence[int], num_experts: int) -> tuple[Tensor, Tensor]:
    """A `[E, R, in]` and B `[E, out, R]`: zeros for the cold experts."""
    A_E, B_E = (factor.new_zeros(num_experts, *factor.shape[1:]) for factor in (A, B))
    A_E[list(ids)], B_E[list(ids)] = A, B
    return A_E, B_E


def _stacked(A_E: Tensor, B_E: Tensor) -> tuple[Tensor, Tensor]:
    """As PEFT's ParamWrapper holds all experts: A `[E * R, in]`, expert slowest; B `[out, R * E]`, fastest."""
    return A_E.flatten(0, 1), B_E.permute(1, 2, 0).flatten(1)


def _save_adapter(config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> None:
    folder.mkdir(parents=True)
    data = LoraConfig(**config).to_dict()
    data = {key: sorted(value) if isinstance(value, set) else value for key, value in data.items()}
    write_json(folder / CONFIG_FILE, data)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


# Checkpoints with the adapter, or its routers, folded in


def _save_checkpoint(model: PeftModel, adapter: str, paths: list[str], folder: Path, tokenizer: Any) -> None:
    """The base model with the adapter of the layers at `paths` folded in."""
    base = cast(Any, model.get_base_model())
    layers = [base.get_submodule(path) for path in paths]
    with _merged(layers, adapter), _without_adapters(base), quiet():
        base.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@contextmanager
def _merged(layers: list[Any], adapter: str) -> Iterator[None]:
    """Folds the adapter into the layers' weights, and puts the very same weights back afterwards."""
    kept = [(weight, rows, weight.data[rows].clone()) for layer in layers for weight, rows in _touched(layer, adapter)]
    try:
        for layer in layers:
            layer.merge(adapter_names=[adapter])
        yield
    finally:
        for weight, rows, data in kept:
            weight.data[rows] = data
        for layer in layers:
            layer.merged_adapters.clear()
            if isinstance(layer, MergeableLayer):
                layer.replaced.clear()


@contextmanager
def _without_adapters(base: nn.Module) -> Iterator[None]:
    """The modules as transformers knows them: its names and its conversion to the checkpoint's layout hold."""
    wrapped = [(path.rpartition("."), m) for path, m in base.named_modules() if isinstance(m, BaseTunerLayer)]
    try:
        for (parent, _, name), layer in wrapped:
            setattr(base.get_submodule(parent), name, layer.get_base_layer())
        yield
    finally:
        for (parent, _, name), layer in wrapped:
            setattr(base.get_submodule(parent), name, layer)


def _touched(layer: Any, adapter: str) -> Iterator[tuple[Tensor, list[int] | slice]]:
    """The weights that merging changes: of experts the planned rows, which may be a small part of the model."""
    base = layer.get_base_layer()
    if isinstance(layer, HotExperts):
        ids = list(layer.expert_ids[adapter])
        yield from ((getattr(base, name), ids) for name in expert_parameters(base))
    else:
        yield from ((weight, slice(None)) for weight in base.parameters())
