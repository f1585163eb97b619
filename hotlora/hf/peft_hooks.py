"""All that hotlora changes in PEFT, so that PEFT's own ways take a HotLoraConfig. Plain PEFT goes on as without it. Of
transformers it is `load_adapter`, which swaps adapters by itself.

PEFT's tables of configs and tuners stay as they are, and a plain LoraConfig gets a plain LoraModel: each function here
hands on to PEFT's own what is not hotlora's. tests/test_peft_hooks.py holds every one of them to that.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.config import PeftConfigMixin
from peft.helpers import DoraCaching
from peft.optimizers import lorafa
from peft.tuners.lora import LoraModel
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils import hotswap, transformers_weight_conversion
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..base.errors import HotLoraError, PlanError
from ..base.unchanged import unchanged_on_error

_SPARSE = re.compile(r"\.lora_\w+\..*(\.values|\.kept)$")
_SPARSE_UNDER_A_NAME = re.compile(r"(\.lora_\w+)\.[^.]+(\.\w+\.(?:values|kept))$")


# DoRA's of experts and routers in older adapters. TRL knows one by "lora_magnitude_vector", and keeps it in float32
# where it casts the rest of an adapter to bf16.
_OLD_MAGNITUDES = (
    (r"\.lora_magnitude_(gate_up|down)", r".lora_magnitude_vector_\1"),
    (r"\.lora_magnitude\.", r".lora_magnitude_vectors."),
)


_resumes: ContextVar[bool] = ContextVar("resumes", default=False)


@contextmanager
def resuming() -> Iterator[None]:
    """Inside, a training's own checkpoint is loaded, whose plan may be a later one: re-profiling moves the adapter
    there after its tensors."""
    token = _resumes.set(True)
    try:
        yield
    finally:
        _resumes.reset(token)


def key_of_today(key: str) -> str:
    """A tensor's key as it is saved today. Older adapters hold the name that they were saved under in the keys of
    sparse factors of routers, and of experts with ranks of their own, and have other names of DoRA's magnitudes."""
    for old, new in _OLD_MAGNITUDES:
        key = re.sub(old, new, key)
    return _SPARSE_UNDER_A_NAME.sub(r"\1\2", key)


def install(
    config_class: type[LoraConfig],
    tuner_class: type[LoraModel],
    from_saved: Callable[[dict[str, Any]], LoraConfig],
    before_loading: Callable[[nn.Module, Any, str, dict[str, Tensor]], None],
    before_loading_again: Callable[[PeftModel, str, PeftConfig, str], None],
) -> None:
    """Called once, when `hotlora.adapter` is imported.

    config_class, tuner_class: hotlora's. from_saved: makes a config of a saved one, as a dict. before_loading(model,
    config, adapter_name, state_dict): called before PEFT loads tensors into an adapter of such a config.
    before_loading_again(model, adapter_name, saved_config, path): the same where the model had an adapter of the name
    already, and it or the saved one is of such a config.
    """
    _read_saved_configs(from_saved)
    _inject_by(config_class, tuner_class)
    _name_sparse_factors(config_class)
    _keep_names(config_class, before_loading)
    _keep_names_in_transformers(config_class)
    _refuse_conversion_at_save(config_class)
    _check_loading_again(config_class, before_loading_again)
    _refuse_hotswap(config_class)
    _refuse_lorafa()


@contextmanager
def dora_norms_kept() -> Iterator[None]:
    """PEFT's `DoraCaching`, which keeps B A of every adapted Linear beside the norms, as large as its weight; here the
    norms alone: once PEFT has those, it reads nothing of B A."""
    original: Any = DoraLinearLayer._cache_store

    @functools.wraps(original)
    def store(self: Any, key: str, value: Any) -> None:
        original(self, key, value.new_empty(0) if key.startswith("lora-weight") else value)

    with DoraCaching():
        DoraLinearLayer._cache_store = store  # type: ignore[method-assign]
        try:
            yield
        finally:
            DoraLinearLayer._cache_store = original  # type: ignore[method-assign]


def _read_saved_configs(from_saved: Callable[[dict[str, Any]], LoraConfig]) -> None:
    """A saved LORA config that holds a plan is ours: `from_pretrained` of every PEFT config ends here."""
    original = PeftConfigMixin.from_peft_type.__func__  # type: ignore[attr-defined]

    @functools.wraps(original)
    def from_peft_type(cls: Any, **saved: Any) -> Any:
        if saved.get("peft_type") != PeftType.LORA or not isinstance(saved.get("plan"), dict):
            return original(cls, **saved)
        try:
            return from_saved(saved)
        except TypeError as error:
            raise PlanError(f"the adapter's config is not one that this hotlora reads: {error}") from error

    PeftConfigMixin.from_peft_type = classmethod(from_peft_type)  # type: ignore[method-assign, assignment]


def _inject_by(config_class: type[LoraConfig], tuner_class: type[LoraModel]) -> None:
    """A LoraModel becomes ours when the first adapter of ours is put on it."""
    original: Any = LoraModel.inject_adapter

    @functools.wraps(original)
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if type(self) is not LoraModel or not isinstance(self.peft_config[adapter_name], config_class):
            original(self, model, adapter_name, *args, **kwargs)
            return
        with unchanged_on_error(self):
            self.__class__ = tuner_class
            self.inject_adapter(model, adapter_name, *args, **kwargs)

    LoraModel.inject_adapter = inject_adapter  # type: ignore[method-assign]


def _name_sparse_factors(config_class: type[LoraConfig]) -> None:
    """PEFT takes the adapter's name out of a key where it is the last part or the one before: a sparse factor has its
    `values` and `kept` after that."""
    remove: Any = LoraModel._remove_adapter_name_from_key.__func__  # type: ignore[attr-defined]
    remap: Any = LoraModel._remap_adapter_state_dict_for_load.__func__  # type: ignore[attr-defined]

    @functools.wraps(remove)
    def remove_adapter_name(cls: Any, key: str, adapter_name: str) -> str:
        if not (sparse := _SPARSE.search(key)):
            return str(remove(cls, key, adapter_name))
        return remove(cls, key.removesuffix(sparse[1]), adapter_name) + sparse[1]

    @functools.wraps(remap)
    def remap_for_load(cls: Any, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]) -> Any:
        if isinstance(config, config_class):
            state_dict = {key_of_today(key): tensor for key, tensor in state_dict.items()}
        return remap(cls, model, config, adapter_name, state_dict)

    LoraModel._remove_adapter_name_from_key = classmethod(remove_adapter_name)  # type: ignore[method-assign, assignment]
    LoraModel._remap_adapter_state_dict_for_load = classmethod(remap_for_load)  # type: ignore[method-assign, assignment]


def _keep_names(
    config_class: type[LoraConfig], before_loading: Callable[[nn.Module, Any, str, dict[str, Tensor]], None]
) -> None:
    """PEFT renames loaded keys from a checkpoint's names to the model's. Ours are the model's already, and some
    families (deepseek_ocr2, laguna, ...) would have them renamed twice, and lost."""
    original = transformers_weight_conversion.convert_peft_adapter_state_dict_for_transformers

    @functools.wraps(original)
    def convert(
        model: nn.Module, peft_config: Any, adapter_state_dict: dict[str, Tensor], adapter_name: str = "default"
    ) -> dict[str, Tensor]:
        if not isinstance(peft_config, config_class):
            return original(model, peft_config, adapter_state_dict, adapter_name)
        before_loading(model, peft_config, adapter_name, adapter_state_dict)
        return adapter_state_dict

    transformers_weight_conversion.convert_peft_adapter_state_dict_for_transformers = convert


def _keep_names_in_transformers(config_class: type[LoraConfig]) -> None:
    """The same where transformers loads an adapter by itself (`model.load_adapter`, `from_pretrained` of an adapter):
    it takes the renamings from PEFT, and does the rest. Of those ours need what is of an adapter alone."""
    original = transformers_weight_conversion.build_peft_weight_mapping
    renaming = transformers_weight_conversion.WeightRenaming

    @functools.wraps(original)
    def build(weight_conversions: Any, adapter_name: str, peft_config: Any = None) -> Any:
        found = original(weight_conversions, adapter_name, peft_config=peft_config)
        if not isinstance(peft_config, config_class):
            return found
        of_the_model = {id(conversion) for conversion in weight_conversions or ()}
        kept = [its for its in found if isinstance(its, renaming) and id(its) not in of_the_model]
        # DoRA's of a Linear, which PEFT saves without the last part of its name, and appends in its own loading alone.
        last_part = (rf"(lora_magnitude_vector\.{re.escape(adapter_name)})$", r"\1.weight")
        return [*kept, *(renaming(*names) for names in (last_part, *_OLD_MAGNITUDES))]

    transformers_weight_conversion.build_peft_weight_mapping = build


def _refuse_conversion_at_save(config_class: type[LoraConfig]) -> None:
    """`save_pretrained` can save what an adapter adds to its initial one (PiSSA, OLoRA, ...), at twice the rank: it
    joins the A and B of Linears, and knows nothing of a plan's ranks."""
    original: Any = PeftModel.save_pretrained

    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(original).bind(self, *args, **kwargs).arguments
        names = given.get("selected_adapters") or self.peft_config
        are_ours = any(isinstance(self.peft_config.get(name), config_class) for name in names)
        if are_ours and (path := given.get("path_initial_model_for_weight_conversion")) is not None:
            raise HotLoraError(
                f"path_initial_model_for_weight_conversion={path!r} is not supported with a HotLoraConfig, whose "
                "factors start as LoRA's and change no weight of the base: leave it out."
            )
        return original(self, *args, **kwargs)

    PeftModel.save_pretrained = save_pretrained  # type: ignore[method-assign]


def _check_loading_again(
    config_class: type[LoraConfig], before_loading_again: Callable[[PeftModel, str, PeftConfig, str], None]
) -> None:
    """PEFT reads no config where the name is taken: the tensors go into the adapter that is there."""
    original: Any = PeftModel.load_adapter

    @functools.wraps(original)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(original).bind(self, *args, **kwargs).arguments
        name, path = given["adapter_name"], str(given["model_id"])
        if name in self.peft_config and not _resumes.get():
            is_ours = isinstance(self.peft_config[name], config_class)
            saved: Any = None
            try:
                saved = PeftConfig.from_pretrained(path, **given.get("kwargs", {}))
            except (OSError, ValueError, LookupError, TypeError) as error:
                if is_ours or isinstance(error, HotLoraError):
                    raise
                # PEFT would not have read it: a folder of a plain adapter's weights alone is loaded as without us.
            if is_ours or isinstance(saved, config_class):
                before_loading_again(self, name, saved, path)
        return original(self, *args, **kwargs)

    PeftModel.load_adapter = load_adapter  # type: ignore[method-assign]


def _refuse_hotswap(config_class: type[LoraConfig]) -> None:
    """It looks for Linears alone. PEFT's `hotswap_adapter` checks first that two configs go together; transformers'
    `load_adapter(hotswap=True)`, or after `enable_peft_hotswap`, checks nothing."""
    check: Any = hotswap.check_hotswap_configs_compatible
    load: Any = PreTrainedModel.load_adapter

    def refuse(call: str, *configs: Any) -> None:
        if any(isinstance(config, config_class) for config in configs):
            raise HotLoraError(
                f"{call} is not supported with a HotLoraConfig: it replaces the matrices of Linears, and two "
                "plans may name other experts. Load the adapter under another name (hotlora.load_adapter(model, path, "
                "adapter_name)), call set_adapter, and delete_adapter the old one."
            )

    @functools.wraps(check)
    def check_configs(config0: Any, config1: Any) -> None:
        refuse("hotswap_adapter", config0, config1)
        check(config0, config1)

    @functools.wraps(load)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(load).bind(self, *args, **kwargs).arguments
        name, swaps = given.get("adapter_name"), given.get("hotswap", "auto")
        there = getattr(self, "peft_config", {}).get(name)
        if swaps == "auto":
            swaps = getattr(self, "_hotswap_enabled", False)
        if swaps and there is not None:
            config, path = given.get("peft_config"), given.get("peft_model_id")
            if config is None and path is not None and not isinstance(there, config_class):
                config = PeftConfig.from_pretrained(path, **(given.get("adapter_kwargs") or {}))
            refuse("load_adapter's hotswap", there, config)
        return load(self, *args, **kwargs)

    hotswap.check_hotswap_configs_compatible = check_configs
    PreTrainedModel.load_adapter = load_adapter  # type: ignore[method-assign]


def _refuse_lorafa() -> None:
    """`create_lorafa_optimizer` takes the adapters' parameters two by two, A and B of a Linear each."""
    original: Any = lorafa.LoraFAOptimizer.__init__

    @functools.wraps(original)
    def init(self: Any, params: Any, *args: Any, **kwargs: Any) -> None:
        params = list(params)
        names = [name for group in params if isinstance(group, dict) for name in group.get("names", ())]
        experts = [name for name in names if re.search(r"\.lora_([AB]|full)_\w+\.", name)]
        frozen = sum(".lora_A." in name for name in names) < sum(".lora_B." in name for name in names)
        if experts or frozen:
            raise HotLoraError(
                "LoRA-FA's optimizer takes the A and B of Linears, one matrix each"
                + (f", and {experts[0]} holds those of several experts" if experts else ", and these A are frozen")
                + ". Train with HotLoraConfig(train_a=False), which freezes A, and with torch.optim.AdamW."
            )
        original(self, params, *args, **kwargs)

    lorafa.LoraFAOptimizer.__init__ = init  # type: ignore[method-assign]
