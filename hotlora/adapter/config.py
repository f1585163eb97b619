"""`HotLoraConfig`: what of a model an adapter trains, and how; checked against the model before anything changes."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from ..base.errors import FileError, ModelError, PlanError
from ..base.files import read_json, sha256_file, write_json
from ..hf.moe_layers import attention_modules, check_in_memory, fingerprint, moe_layers, num_experts_per_tok, unwrap
from ..routing.plan import ExpertPlan
from .experts import HotFullExperts, HotLoraExperts
from .factors import SeededFactor, Slot
from .loaded import Digests, digests, is_as_loaded
from .mask import SparseMask
from .mergeable import MergeableLayer
from .on_top_of import NO_FILE, Entry, options_hash
from .parallel import KINDS, ParallelAdapters
from .raw_weights import HotLoraRouter, HotLoraWeights

WEIGHTS_HASH = "weights_sha256"
"""Key of `adapter_config.json`: SHA-256 of the weights' file. PEFT leaves it alone."""
A_HASH = "a_sha256"
"""Key of `adapter_config.json`: SHA-256 of a frozen A, which is in no file. Older adapters have none."""
# In `repr`: what comes first, and what is the same for all or worked out.
_NOT_TOLD = ("plan", "r", "lora_alpha", "target_modules", "task_type", "peft_type", "peft_version")
_NEEDS_HOTLORA = (
    "of this adapter (this adapter needs hotlora: pip install hotlora, then hotlora.load, or import hotlora.adapter "
    "before PEFT loads it; hotlora export --format peft makes one that does without)"
)
"""In place of `target_modules` in a saved config, where hotlora finds them anew. PEFT without hotlora looks for such
modules, finds none, and says so with these words."""
_SWITCHES = ("train_attention", "train_router", "train_shared")

VARIANTS = tuple(field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant"))
"""PEFT's options that make another method of LoRA: DoRA, aLoRA, KaSA, ..."""
# LoraConfig's options that the layers below do not implement, with the value that leaves each one off.
_UNSUPPORTED: dict[str, Any] = {
    "bias": "none",
    "lora_bias": False,
    "target_parameters": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layer_replication": None,
}
HEADS = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
"""transformers' heads that write no text, and PEFT's task_type for them"""


class _Bound(set[str]):
    """Targets that `HotLoraConfig.bind` worked out for a model, not a user's."""


@dataclass
class HotLoraConfig(LoraConfig):
    """LoRA on the experts of a plan (MoE-Sieve s3, HELLoRA s3). HELLoRA's r and alpha are the defaults.

    Planned experts get separate gate, up and down adapters. The targets follow from the plan and the three
    switches, so `target_modules` cannot be given. `lora_dropout` drops inputs of the updates; it does not
    touch the router, whose update is made in its weight. The plan is saved inside `adapter_config.json`.

    Raises:
        PlanError: no plan or a broken one, r or dropout out of range, an option that is not supported.
    """

    r: int = 32
    lora_alpha: int = 64
    lora_dropout: float = 0.0
    task_type: Any = "CAUSAL_LM"
    plan: Any = None
    """An `ExpertPlan`, or one as a dict; held as a dict."""
    train_attention: bool = True
    """q, k, v, o of all decoder layers, dense ones too."""
    train_router: bool = True
    """The router of every MoE layer, planned or not."""
    train_shared: bool = True
    """The shared experts of every MoE layer, without their scalar gate."""
    train_a: bool = True
    """False freezes A everywhere (LoRA-FA, LoRI). A is then drawn from `a_seed` and is not saved: the seed gives it
    back."""
    a_seed: int | None = None
    """Of a frozen A; None: the mask's, or 0."""
    mask: Any = None
    """Trains only some entries of B (LoRI-S): a `SparseMask` or its file. In a saved config: the number of entries
    that each B keeps."""
    train_full_experts: bool = False
    """Weights of their own for the planned experts in place of low-rank updates (ESFT)."""
    share_a: bool = False
    """One A of gate and one of up for all planned experts of a layer, and one B of down: the factors on the model's
    width. SGLang calls it shared-outer LoRA."""
    perft: str | None = None
    """E, R or D: PERFT's adapters beside the experts in place of updates of their projections (`parallel`)."""
    perft_adapters: int = 1
    """Of R and D: how many a layer has."""
    perft_top_k: int = 1
    """Of R: how many of them its router chooses for a token."""
    normalize_moe_lora: bool = False
    """Gives every planned expert the rank r / K, where the router sends a token to K experts, and leaves lora_alpha as
    it is: Megatron-Bridge's option of this name, NeMo AutoModel's `moe_rank_scaling`. Attention, routers and shared
    experts keep r. The plan has the ranks once it has been bound to a model."""
    base_quantization: dict[str, Any] | None = None
    """How the base was stored in training, as `quantize.noted_quantization` has it. It is set when an adapter to train
    is put on a model; `load.base_quantization` reads it."""
    on_top_of: list[Entry] | None = None
    """The adapters that were merged into the base before training, as `on_top_of.Entry`. It is set when an adapter to
    train is put on a model; on a base without them a saved adapter is refused. None: of a hotlora that did not note
    it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.plan is None:
            raise PlanError("HotLoraConfig needs a plan: make one with hotlora.select_experts(profile).")
        if self.target_modules is not None and not isinstance(self.target_modules, _Bound):
            raise PlanError(
                f"target_modules={self.target_modules!r} cannot be given: the plan names the experts, and "
                "train_attention, train_router and train_shared switch the rest."
            )
        plan = self.plan if isinstance(self.plan, ExpertPlan) else ExpertPlan.from_dict(_as_dict(self.plan))
        self.plan = plan.to_dict()
        if not isinstance(self.r, int) or self.r < 1:
            raise PlanError(f"r={self.r!r} must be a whole number of at least 1; the papers use 32.")
        if not 0 <= self.lora_dropout < 1:
            raise PlanError(f"lora_dropout={self.lora_dropout!r} must be at least 0 and below 1, such as 0.05.")
        for name, off in _UNSUPPORTED.items():
            if getattr(self, name) != off:
                raise PlanError(f"{name}={getattr(self, name)!r} is not supported: leave it at {off!r}.")
        for name in VARIANTS:
            if name != "use_dora" and getattr(self, name):
                raise PlanError(f"{name} is not supported on experts and routers: leave it off.")
        if not isinstance(self.init_lora_weights, bool):
            raise PlanError(f"init_lora_weights={self.init_lora_weights!r} is not supported: give True or False.")
        self._check_factors()
        self.target_modules = self.target_parameters = None
        # What is where in the model, by module path; set by `bind`, not saved.
        self._expert_ids: dict[str, tuple[int, ...]] = {}
        self._ranks: dict[str, tuple[int, ...]] = {}
        self._raw_weights: dict[str, tuple[str, ...]] = {}
        self._routers: set[str] = set()
        self._norm_topk = False
        """whether the model's routers make the chosen experts' weights sum to 1"""
        # SHA-256 of the frozen A that the model has, and of the one that the adapter was saved with.
        self._a_hash: str | None = None
        self._saved_a_hash: str | None = None
        self._source: Entry = dict(NO_FILE)
        """The file that the adapter was loaded from, as it is noted in a model that it is merged into."""
        self._loaded: Digests | None = None
        """Of the values that were loaded from it."""

    def __repr__(self) -> str:
        """What differs from the defaults; the plan and other long values in short."""
        told = [f"plan={ExpertPlan.from_dict(self.plan)!r}", f"r={self.r}", f"lora_alpha={self.lora_alpha}"]
        for field in dataclasses.fields(self):
            value, default = getattr(self, field.name), _default(field)
            if field.name in _NOT_TOLD or value == default or not (value or default):
                continue
            is_long = isinstance(value, Mapping | list | tuple | set) and len(value) > 3
            told.append(f"{field.name}={f'<{len(value)} entries>' if is_long else repr(value)}")
        return f"HotLoraConfig({', '.join(told)})"

    def _check_factors(self) -> None:
        if isinstance(self.mask, str | os.PathLike):
            self.mask = SparseMask.load(self.mask)
        self._mask = self.mask if isinstance(self.mask, SparseMask) else None
        if self._mask is not None:
            self.mask = self._mask.num_kept()
        if self.mask is not None and (self.train_a or self.use_dora or self.train_full_experts):
            raise PlanError("mask is LoRI's: it needs train_a=False, and neither use_dora nor train_full_experts.")
        if self.train_full_experts and not self.train_a:
            raise PlanError(
                "train_full_experts leaves no A that could be frozen: leave out one of it and train_a=False."
            )
        if self.train_full_experts and self.use_dora:
            raise PlanError(
                "train_full_experts leaves no low-rank update that use_dora could act on: drop one of the two."
            )
        if self.normalize_moe_lora and self.train_full_experts:
            raise PlanError("train_full_experts leaves no rank to divide: leave out one of it and normalize_moe_lora.")
        if self.share_a:
            self._check_shared()
        if self.perft is not None:
            self._check_perft()
        elif (self.perft_adapters, self.perft_top_k) != (1, 1):
            raise PlanError(
                f"perft_adapters={self.perft_adapters} and perft_top_k={self.perft_top_k} are of PERFT: leave them "
                "out, or give perft."
            )
        if self.a_seed is None and not self.train_a:
            self.a_seed = self._mask.a_seed if self._mask is not None else 0

    def _check_shared(self) -> None:
        if self.train_full_experts:
            raise PlanError("train_full_experts leaves no low-rank update whose A could be shared: leave out share_a.")
        for layer, ranks in (self.plan["ranks"] or {}).items():
            if len(set(ranks)) > 1:
                raise PlanError(
                    f"share_a needs one rank for all experts of a layer, and the plan gives layer {layer} the ranks "
                    f"{sorted(set(ranks))}: take the ranks out of the plan, or leave out share_a."
                )

    def _check_perft(self) -> None:
        if self.perft not in KINDS:
            raise PlanError(f"perft={self.perft!r} does not exist: choose one of {', '.join(KINDS)}.")
        others = self.share_a or self.use_dora or self.train_full_experts or self.normalize_moe_lora
        if not self.train_a or others or self.plan["ranks"]:
            raise PlanError(
                "perft has adapters of one rank beside the experts: leave out DoRA, a frozen or shared A, full "
                "experts, normalize_moe_lora and ranks."
            )
        if self.perft == "E" and (self.perft_adapters, self.perft_top_k) != (1, 1):
            raise PlanError(
                "perft='E' has one adapter for each planned expert: leave out perft_adapters and perft_top_k."
            )
        if self.perft == "D" and self.perft_top_k != 1:
            raise PlanError("perft='D' has no router: leave out perft_top_k.")
        if not 1 <= self.perft_top_k <= self.perft_adapters and self.perft != "E":
            raise PlanError(
                f"perft_top_k={self.perft_top_k} and perft_adapters={self.perft_adapters}: both must be 1 or more, and "
                "a router cannot choose more than there are."
            )

    def to_dict(self) -> dict[str, Any]:
        """What `adapter_config.json` holds; the targets in order, so that equal adapters give equal files."""
        data = super().to_dict()
        return {key: sorted(value) if isinstance(value, set) else value for key, value in data.items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT calls it when the weights are written: their hash, and that of a frozen A, go beside the options, so
        that loading knows them again. transformers calls it before, when older weights may lie there: only PEFT gives
        an auto_mapping_dict."""
        are_written = "auto_mapping_dict" in kwargs
        super().save_pretrained(save_directory, **kwargs)
        weights, file = (Path(save_directory) / name for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME))
        more = {WEIGHTS_HASH: sha256_file(weights)} if are_written and weights.is_file() else {}
        if self._a_hash is not None:
            more[A_HASH] = self._a_hash
        if self._is_ours():
            more["target_modules"] = _NEEDS_HOTLORA
        if more:
            write_json(file, {**read_json(file), **more})

    def _is_ours(self) -> bool:
        """Whether PEFT alone could not load it, or would load something else: it draws an A that is not in the file."""
        paths = () if self.target_modules is None else self.target_modules
        return not self.train_a or any(self._layer_class(path) is not None for path in paths)

    def check_a(self, factors: Iterable[SeededFactor]) -> None:
        """Notes which frozen A a model has. FileError: the adapter was saved with another one."""
        digests = sorted(factor.digest() for factor in factors)
        self._a_hash = hashlib.sha256("".join(digests).encode()).hexdigest()
        if self._saved_a_hash not in (None, self._a_hash):
            raise FileError(
                f"the frozen A that a_seed={self.a_seed} gives here is not the one that the adapter was trained with "
                f"({A_HASH} {self._a_hash[:12]}…, saved {str(self._saved_a_hash)[:12]}…). Put a_seed back if it was "
                "changed, take the torch and hotlora that it was trained with, or train again."
            )

    def note_loaded(self, tensors: Mapping[str, Tensor]) -> None:
        """Called with what is loaded from the adapter's file; what is loaded over it later is not the file's."""
        if self._loaded is None and self.inference_mode and self._source["weights_sha256"] is not None:
            self._loaded = digests(tensors)

    def source(self, tensors: Callable[[], Mapping[str, Tensor]]) -> Entry:
        """What a model notes that the adapter is merged into: its file, if `tensors()`, the adapter's by their keys,
        still are what was loaded from it."""
        if self.inference_mode and self._loaded is not None and is_as_loaded(tensors(), self._loaded):
            return self._source
        return dict(NO_FILE)

    def rank_of_experts(self, model: nn.Module) -> int:
        """Of a planned expert whose plan gives it none. PlanError: r / K is no whole number (`normalize_moe_lora`)."""
        if not self.normalize_moe_lora:
            return self.r
        K = num_experts_per_tok(model)
        if self.r % K:
            near = dict.fromkeys(max(self.r // K + more, 1) * K for more in (0, 1))
            raise PlanError(
                f"normalize_moe_lora divides r={self.r} by the {K} experts that a token is sent to "
                f"(num_experts_per_tok): r must be a multiple of {K}, such as {' or '.join(map(str, near))}."
            )
        return self.r // K

    def _with_ranks(self, plan: ExpertPlan, model: nn.Module) -> ExpertPlan:
        """The plan with the ranks of `normalize_moe_lora`; one that was saved with an adapter has them."""
        rank = self.rank_of_experts(model)
        found = {rank for ranks in (plan.ranks or {}).values() for rank in ranks}
        if found - {rank}:
            raise PlanError(
                f"the plan gives experts ranks of its own ({', '.join(map(str, sorted(found)))}), and "
                f"normalize_moe_lora gives each r / K = {rank}: take the ranks out of the plan, or leave out "
                "normalize_moe_lora."
            )
        return dataclasses.replace(plan, ranks={layer: (rank,) * len(ids) for layer, ids in plan.experts.items()})

    def bind(self, model: nn.Module) -> None:
        """Checks the plan against `model` and sets the targets to exact module names; leaves `model` as it is.
        With `normalize_moe_lora` the plan gets its ranks.

        Raises:
            PlanError: the plan is for another model or names a layer that is not there, or nothing would train.
            ModelError: the model is not supported, has a head for another task_type, or some of its weights are
                offloaded.
        """
        self._check_task(model)
        check_in_memory(model)
        plan = ExpertPlan.from_dict(self.plan)
        layers = {layer.layer: layer for layer in moe_layers(model)}
        if plan.fingerprint is not None and plan.fingerprint != fingerprint(model):
            raise PlanError(
                f"the plan was made for {plan.fingerprint}, but this model is {fingerprint(model)}. "
                "Profile this model and select experts again."
            )
        if missing := sorted(set(plan.experts) - set(layers)):
            raise PlanError(f"the plan names layers {missing}; this model's MoE layers are {sorted(layers)}.")
        for index, ids in plan.experts.items():
            if plan.num_experts != (there := layers[index].num_experts):
                raise PlanError(
                    f"the plan is for {plan.num_experts} experts and names {list(ids)} in layer {index}, "
                    f"where there are {there}: 0 to {there - 1}. Profile this model and select experts again."
                )
        if self.normalize_moe_lora:
            plan = self._with_ranks(plan, model)
        expert_ids = {layers[index].experts: ids for index, ids in plan.experts.items() if ids}
        ranks = {layers[index].experts: ranks for index, ranks in (plan.ranks or {}).items() if ranks}
        routers = {layer.router: (layer.router_weight,) for layer in layers.values()} if self.train_router else {}
        shared = {path for layer in layers.values() for path in layer.shared} if self.train_shared else set()
        attention = attention_modules(model) if self.train_attention else []
        if not (targets := {*expert_ids, *routers, *shared, *attention}):
            raise PlanError(
                "nothing would be trained: the plan has no expert, and attention, routers and shared experts "
                "are off. Plan at least one expert, or switch one of them on."
            )
        self._norm_topk = getattr(unwrap(model).config.get_text_config(), "norm_topk_prob", True)
        raw = {path: weights for path in shared if (weights := _raw_weights(unwrap(model.get_submodule(path))))}
        self.plan = plan.to_dict()
        self._expert_ids, self._ranks, self._routers = expert_ids, ranks, set(routers)
        self._raw_weights = {**routers, **raw}
        for path in (*expert_ids, *routers, *raw):
            module, kind = model.get_submodule(path), cast(type[nn.Module], self._layer_class(path))
            if isinstance(module, BaseTunerLayer) and not isinstance(module, kind):
                raise ModelError(
                    f"{path} already has an adapter of another kind ({type(module).__name__}, and this config's is "
                    f"{kind.__name__}). Unload it, use a fresh base model, or plan other layers."
                )
        self.target_modules = _Bound(targets)  # type: ignore[assignment]

    def _check_task(self, model: nn.Module) -> None:
        """ModelError where PEFT's wrapper for models that write text would trip over one that does not."""
        kind = type(model).__name__
        task = next((task for head, task in HEADS.items() if kind.endswith(head)), None)
        if task is not None and self.task_type == "CAUSAL_LM":
            raise ModelError(
                f"task_type='CAUSAL_LM', a HotLoraConfig's default, is for models that write text, and this one is a "
                f"{kind}: give task_type={task!r}, with which its head trains, too."
            )

    def _layer_class(self, path: str) -> "type[MergeableLayer] | None":
        """Ours for what `bind` has found at `path`; None where PEFT's own Linear does."""
        if path in self._expert_ids:
            if self.perft is not None:
                return ParallelAdapters
            return HotFullExperts if self.train_full_experts else HotLoraExperts
        if path in self._routers:
            return HotLoraRouter
        return HotLoraWeights if path in self._raw_weights else None


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _raw_weights(module: nn.Module) -> tuple[str, ...]:
    """The 3-D parameters of shared experts that are no Linears."""
    return () if isinstance(module, nn.Linear) else tuple(n for n, p in module.named_parameters() if p.ndim == 3)


def from_saved(saved: dict[str, Any]) -> HotLoraConfig:
    """The targets that were saved are left out: they are worked out again, for the model at hand."""
    others = ("target_modules", "target_parameters", WEIGHTS_HASH, A_HASH)
    config = HotLoraConfig(**{name: value for name, value in saved.items() if name not in others})
    config._saved_a_hash = saved.get(A_HASH)
    config._source |= {"weights_sha256": saved.get(WEIGHTS_HASH), "options_sha256": options_hash(saved)}
    return config


def frozen_a(slots: Iterable[Slot]) -> list[SeededFactor]:
    """Those of some slots that hold an A which its seed gives back."""
    return [factor for slot in slots if isinstance(factor := slot.held[slot.key], SeededFactor)]


def _as_dict(plan: Any) -> dict[str, Any]:
    data = plan.to_dict() if hasattr(plan, "to_dict") else plan
    if not isinstance(data, dict):
        raise PlanError(f"plan={plan!r} is not a plan. Give an ExpertPlan, or one as a dict.")
    return data
