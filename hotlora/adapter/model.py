"""HotLoRA as a PEFT adapter: LoRA on a plan's experts, and on attention, routers and shared experts.

`peft.get_peft_model(model, HotLoraConfig(plan=plan))` is plain PEFT. Attention and shared experts get PEFT's
own `lora.Linear`; the planned experts and the routers get the layers in `experts` and `raw_weights`.
"""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from ..base.errors import HotLoraError, PlanError
from ..base.unchanged import unchanged_on_error
from ..hf import peft_hooks
from ..layer.function import IMPLEMENTATION, use_routed_layer
from ..routing.plan import ExpertPlan
from .combine import check_how, check_weights, combine, factor_pairs
from .config import _SWITCHES, HotLoraConfig, from_saved, frozen_a
from .experts import HotExperts
from .factors import SeededFactor, SparseFactor, take_values
from .mergeable import UNMIXED, MergeableLayer, check_adapter_name, factor_slots
from .on_top_of import NO_FILE, Entry, check_ground, described, merged_into, missing, note_merged
from .parallel import UNMERGED
from .quantize import noted_quantization
from .stored import check_mergeable, is_plain, warn_if_experts_unquantized

# Of a config, besides the plan's experts and ranks: what an adapter's tensors are for, and how they are scaled. The
# rest acts in training alone, or notes where the adapter was made.
_DECIDE = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", *_SWITCHES, "train_a", "a_seed",
    "mask", "train_full_experts", "share_a", "perft", "perft_adapters", "perft_top_k", "modules_to_save",
    "trainable_token_indices",
)  # fmt: skip


class HotLoraModel(LoraModel):
    """PEFT's LoRA, which binds a HotLoraConfig to the model. Any other LoraConfig goes through unchanged.

    `_prepare_adapter_config` is where PEFT fills in a config's targets: before anything of the model is
    changed, and after MoE targets have been rewritten for transformers 5 (peft#3711), so that the exact
    names which `bind` sets stay as they are.
    """

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        if isinstance(config, HotLoraConfig):  # used before: PEFT would rewrite its exact targets (peft#3711)
            config.target_modules = config.target_parameters = None
            check_adapter_name(adapter_name)
        with unchanged_on_error(self):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            if isinstance(config, HotLoraConfig):
                self._hold_factors(config, adapter_name)
        if isinstance(config, HotLoraConfig):
            self._use_routed_layer()
        if isinstance(config, HotLoraConfig) and adapter_name == "ref" and self.peft_config.get("default") is config:
            self._copy_to_reference()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT's puts new parameters in place of a ParameterDict's, which would train where the old ones did not."""
        frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for name, parameter in self.model.named_parameters():
            if name in frozen:
                parameter.requires_grad_(False)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT puts its hooks on before a layer can refuse, and an error leaves them there."""
        if kwargs.get("adapter_names") is not None:
            if any(isinstance(config, HotLoraConfig) for config in self.peft_config.values()):
                raise HotLoraError(UNMIXED)
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def _use_routed_layer(self) -> None:
        """The experts' own forward is ours from here on, since FSDP and expert parallelism go through that one."""
        before = self.model.config._experts_implementation
        if before != IMPLEMENTATION:
            self._implementation_before = before
            use_routed_layer(self.model)

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's. In place of the active adapter each layer takes its own first one, and plans leave layers out: all
        take the same here. Nothing trains that did not before."""
        active = [name for name in self.active_adapters if name != adapter_name]
        was_active = adapter_name in self.active_adapters
        trained = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        super().delete_adapter(adapter_name)
        if was_active:
            self.set_adapter(active or sorted(self.peft_config)[:1])
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """PEFT's. HotLoraError: a name that no adapter has; a layer would go on with an active adapter, since it has
        none of those that are merged."""
        names = self.active_adapters if adapter_names is None else adapter_names
        self._check_names(names)
        merged = {*names, *self._merged()}
        for path, layer in self.model.named_modules():
            if not isinstance(layer, LoraLayer) or not merged.isdisjoint(layer.scaling):
                continue
            if others := [name for name in self.active_adapters if name in layer.scaling]:
                raise HotLoraError(
                    f"{others} are active, and {path} has no part of {names}: it would go on with what is active. "
                    f"Call model.base_model.set_adapter({names!r}) first."
                )
        super().merge_adapter(adapter_names, safe_merge)

    def _check_names(self, names: list[str]) -> None:
        if unknown := [name for name in names if name not in self.peft_config]:
            raise HotLoraError(
                f"adapter_names={names!r} must be a list of the model's adapters, {[*self.peft_config]}, and "
                f"{unknown[0]!r} is none of them."
            )

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        """PEFT's, for merge_and_unload and unload; the model's config then names all that is merged in."""
        asked = kwargs.get("adapter_names") or (args[2] if len(args) > 2 else None) or self.active_adapters
        self._check_names(asked if merge else [])
        names = dict.fromkeys([*self._merged(), *(asked if merge else [])])
        entries = [self.entry_of(name) for name in names]
        model: Any = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        note_merged(model, entries)
        if hasattr(self, "_implementation_before") and is_plain(model):
            model.set_experts_implementation(self._implementation_before)
        return model

    def _merged(self) -> list[str]:
        """Adapters that `merge_adapter` has put into the weights, in that order."""
        layers = (module for module in self.model.modules() if isinstance(module, LoraLayer))
        return list(dict.fromkeys(name for layer in layers for name in layer.merged_adapters))

    def entry_of(self, adapter_name: str) -> Entry:
        """What a model notes that the adapter is merged into."""
        config = self.peft_config[adapter_name]
        if not isinstance(config, HotLoraConfig):
            return dict(NO_FILE)
        return config.source(
            lambda: get_peft_model_state_dict(self, adapter_name=adapter_name, save_embedding_layers=False)
        )

    def _copy_to_reference(self) -> None:
        """TRL's reference is a copy of "default". It copies parameters with `.default.` in their names: not the
        experts' and trained tokens', and of a sparse factor not where its entries stand."""
        for name, parameter in (parameters := dict(self.model.named_parameters())).items():
            if name.endswith("trainable_tokens_delta.default"):
                parameters[name.removesuffix("default") + "ref"].data = parameter.detach().clone()
        for module in self.model.modules():
            if isinstance(module, HotExperts) and "ref" in module.scaling:
                module.copy_adapter("default", "ref")
        pairs = zip(factor_slots(self.model, "default"), factor_slots(self.model, "ref"), strict=True)
        for source, target in pairs:
            if isinstance(sparse := source.held[source.key], SparseFactor):
                take_values(target.held[target.key], sparse)

    def _hold_factors(self, config: HotLoraConfig, adapter_name: str) -> None:
        """A from its seed, and of B the kept entries alone, where the config says so."""
        if config.train_a and config.mask is None:
            return
        slots = list(factor_slots(self.model, adapter_name))
        if not config.train_a:
            assert config.a_seed is not None
            of_B = {slot.name: slot for slot in slots if not slot.is_A}
            for slot in (slot for slot in slots if slot.is_A):
                values = slot.values
                factor = SeededFactor(values.shape, config.a_seed, slot.name, values.device)
                B = of_B[".lora_B".join(slot.name.rsplit(".lora_A", 1))]
                factor.go_with(B.held, B.key)
                slot.hold(factor)
            if all(factor.values.device.type != "meta" for factor in frozen_a(slots)):
                config.check_a(frozen_a(slots))
        if config.mask is None:
            return
        if wrong := {slot.name for slot in slots if not slot.is_A} ^ set(config.mask):
            raise PlanError(f"the mask is for another adapter: {sorted(wrong)[0]} is in only one of the two.")
        for slot in (slot for slot in slots if not slot.is_A):
            values = slot.values
            sparse = SparseFactor(values.shape, config.mask[slot.name], values.device, values.dtype)
            if config._mask is not None:
                sparse.keep(config._mask.entries(slot.name, values.shape))
            slot.hold(sparse.requires_grad_(not config.inference_mode))

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        if not isinstance(peft_config, HotLoraConfig):
            return super()._prepare_adapter_config(peft_config, model_config)
        peft_config.bind(self.model)
        check_ground(peft_config.on_top_of, self.model)
        warn_if_experts_unquantized(self.model)
        if not peft_config.inference_mode:  # one that is only loaded stays as it was trained
            peft_config.base_quantization = noted_quantization(self.model)
            peft_config.on_top_of = merged_into(self.model)
        return peft_config

    def _replace_module(self, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        if isinstance(new_module, HotExperts):
            # PEFT asks the child's first parameter for its device, and quantized experts have none. Our layer has put
            # its factors where the base is.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _check_merge_allowed(self) -> None:
        """PEFT asks before it merges anything, so nothing is half merged."""
        super()._check_merge_allowed()
        if any(getattr(config, "perft", None) for config in self.peft_config.values()):
            raise HotLoraError(UNMERGED)
        if any(isinstance(config, HotLoraConfig) for config in self.peft_config.values()):
            check_mergeable(self.model)

    @staticmethod
    def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        if isinstance(lora_config, HotLoraConfig):
            if kind := lora_config._layer_class(kwargs["target_name"]):
                return kind(target, adapter_name, lora_config, **kwargs)
        return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)

    def add_weighted_adapter(  # type: ignore[override]
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str | None = None,
        density: float | None = None,
        majority_sign_method: str | None = None,
        **kwargs: Any,
    ) -> None:
        """PEFT's, for adapters of several tasks whose plans differ: the new plan is the union of theirs.

        combination_type: "cat" (the default) adds the updates exactly, with the sum of the ranks; "linear" adds the
        factors, at one rank that all must share; "ties", "dare_linear", "dare_ties" and "magnitude_prune" are PEFT's
        sums of factors of which the share `density` (0.5) is kept, DARE's drawn by torch's seed. An expert that one of
        them leaves out gets the others' part. majority_sign_method: of "ties" and "dare_ties", "total" (the default) or
        "frequency". PEFT's svd_* options are not taken.
        """
        configs = [self.peft_config.get(name) for name in adapters]
        hot = [config for config in configs if isinstance(config, HotLoraConfig)]
        if not hot:
            options: dict[str, Any] = {} if combination_type is None else {"combination_type": combination_type}
            options |= {} if density is None else {"density": density}
            options |= {} if majority_sign_method is None else {"majority_sign_method": majority_sign_method}
            super().add_weighted_adapter(adapters, weights, adapter_name, **options, **kwargs)
            return
        if kwargs:
            raise HotLoraError(
                f"add_weighted_adapter makes no use of {', '.join(kwargs)} with adapters of a HotLoraConfig: leave it "
                "out. It takes combination_type, density and majority_sign_method."
            )
        if len(hot) < len(adapters) or len(weights) != len(adapters):
            names = [name for name, config in self.peft_config.items() if isinstance(config, HotLoraConfig)]
            raise HotLoraError(
                f"adapters={adapters} and weights={weights}: give one weight each for adapters of this model that "
                f"were made by a HotLoraConfig: {names}."
            )
        if adapter_name in self.peft_config:
            raise HotLoraError(f"the model already has an adapter {adapter_name!r}: give another adapter_name.")
        how = combination_type or "cat"
        check_how(how, density, majority_sign_method)
        check_weights(weights)
        config = _combined_config(hot, how)
        with unchanged_on_error(self):
            self.peft_config[adapter_name] = config
            self.inject_adapter(self.model, adapter_name)
            self._cast_adapter_dtype(adapter_name)  # out of the base's: sums are not rounded to that
            for module in self.model.modules():
                if isinstance(module, LoraLayer) and adapter_name in module.r:
                    shares = dict(zip(adapters, weights, strict=True))
                    combine(module, shares, adapter_name, how, density, majority_sign_method)
                    for factor in (f for pair in factor_pairs(module, adapter_name).values() for f in pair):
                        factor.requires_grad_(False)


def check_combined(configs: list[HotLoraConfig], how: str, density: float | None = None) -> None:
    """HotLoraError where `add_weighted_adapter` would refuse adapters with these configs."""
    check_how(how, density)
    _combined_config(configs, how)


def _combined_config(configs: list[HotLoraConfig], how: str) -> HotLoraConfig:
    """Of rank and alpha equal, so that the scaling is 1: weights and scalings go into the factors."""
    if any(config.use_dora or config.train_full_experts or config.perft for config in configs):
        raise HotLoraError(
            "adapters with use_dora, train_full_experts or perft are no sums of low-rank updates, so they cannot be "
            "combined: merge_and_unload() them one after another, but for perft, which cannot be merged."
        )
    for name in ("modules_to_save", "trainable_token_indices"):
        if any(getattr(config, name) for config in configs):
            raise HotLoraError(
                f"an adapter with {name} cannot be combined: it has whole weights beside its low-rank updates, which "
                "have no weighted sum here. merge_and_unload() it, and train the others on top of it."
            )
    grounds = [config.on_top_of or [] for config in configs]
    if any(missing(a, b) for a in grounds for b in grounds):
        names = "; ".join(described(ground) or "the base alone" for ground in grounds)
        raise HotLoraError(
            f"the adapters were trained on top of different adapters ({names}), so their sum belongs to no base: "
            "combine those that share one."
        )
    plans = [ExpertPlan.from_dict(config.plan) for config in configs]
    found = [_ranks(config, plan) for config, plan in zip(configs, plans, strict=True)]
    ranks = [max(its) for its in found]
    if how != "cat" and (len(set(ranks)) > 1 or any(len(its) > 1 for its in found)):
        every = list(dict.fromkeys(rank for its in found for rank in sorted(its, reverse=True)))
        raise HotLoraError(
            f"{how!r} needs adapters of one rank, and these have {every}: train both with one --r for all experts, or "
            "use 'cat'."
        )
    layers = sorted({layer for plan in plans for layer in plan.experts})
    union = dataclasses.replace(
        plans[0],
        experts={i: tuple(sorted({e for plan in plans for e in plan.experts.get(i, ())})) for i in layers},
        rule="union",
        params={"rules": [plan.rule for plan in plans]},
        profile_hash=None,
        ranks=None,
    )
    r = sum(ranks) if how == "cat" else ranks[0]
    switches: dict[str, Any] = {name: any(getattr(c, name) for c in configs) for name in _SWITCHES}
    bases = [config.base_quantization for config in configs]
    base = bases[0] if all(found == bases[0] for found in bases) else None
    return HotLoraConfig(
        plan=union, r=r, lora_alpha=r, inference_mode=True, task_type=configs[0].task_type, base_quantization=base,
        on_top_of=grounds[0], **switches,
    )  # fmt: skip


def _ranks(config: HotLoraConfig, plan: ExpertPlan) -> set[int]:
    """Every rank that an adapter has somewhere."""
    return {
        config.r,
        *(config.rank_pattern or {}).values(),
        *(r for ranks in (plan.ranks or {}).values() for r in ranks),
    }


def _before_loading(model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Notes what is loaded, and draws a frozen A that PEFT left without values (low_cpu_mem_usage): it is not
    among it."""
    for module in model.modules():
        if isinstance(module, MergeableLayer):
            module._cached.clear()
    empty = [factor for factor in frozen_a(factor_slots(model, adapter_name)) if factor.values.device.type == "meta"]
    for factor in empty:
        factor.restore(next(iter(state_dict.values())).device)
    if empty:
        config.check_a(frozen_a(factor_slots(model, adapter_name)))
    config.note_loaded({peft_hooks.key_of_today(key): tensor for key, tensor in state_dict.items()})


def _before_loading_again(model: PeftModel, adapter_name: str, saved: PeftConfig, path: str) -> None:
    """HotLoraError: the saved tensors mean something else in the adapter that has the name. PlanError: as `bind`."""
    there: Any = model.peft_config[adapter_name]
    if isinstance(there, HotLoraConfig) != isinstance(saved, HotLoraConfig):
        told = ["no HotLoraConfig" if isinstance(there, HotLoraConfig) else "a HotLoraConfig"]
    else:
        assert isinstance(saved, HotLoraConfig)
        its, new = (json.loads(json.dumps(config.to_dict(), default=sorted)) for config in (there, saved))
        for config in (its, new):  # PEFT adds a classifier's names at each model that it makes
            config["modules_to_save"] = sorted(set(config["modules_to_save"] or ()))
        told = [f"{name}={new[name]!r} and not {its[name]!r}" for name in _DECIDE if new[name] != its[name]]
        told += [f"other {name}" for name in ("experts", "ranks") if new["plan"][name] != its["plan"][name]]
        if there._a_hash is not None and saved._saved_a_hash not in (None, there._a_hash):
            told.append("another frozen A")
    if told:
        raise HotLoraError(
            f"the model already has an adapter {adapter_name!r}, and the one in {path} has {', '.join(told)}: PEFT "
            "would put its tensors into the one that is there. Give another adapter_name, or delete_adapter"
            f"({adapter_name!r}) first; of PeftModel.from_pretrained leave out config."
        )
    assert isinstance(saved, HotLoraConfig)
    check_ground(saved.on_top_of, model)


peft_hooks.install(HotLoraConfig, HotLoraModel, from_saved, _before_loading, _before_loading_again)
