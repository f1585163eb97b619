"""Names of other libraries that they do not promise to keep, and that hotlora uses all the same.

A name with an underscore, or of a module that its library's documentation leaves out. tests/test_internals.py looks for
each of them in the installed versions, and for uses that are not listed here. transformers' and TRL's are imported by
`internal`, where they are needed: without one of them all else works.
"""

import importlib.metadata
import pkgutil
from typing import Any

from ..base.errors import HotLoraError

_EXPERTS = "hf.experts_view cannot tell how a family lays out its experts"
_LAYER = "PEFT builds, moves or lists the layers of `adapter` in another way"
_TUNER = "PEFT no longer asks HotLoraModel here, so that plans are not bound, or merges not checked"
_RESUME = "training.sft_trainer does not resume a killed run, or tells a broken checkpoint by a stack trace"
_QUANTIZED = "adapter.quantize: experts are not quantized while a model loads"
_PACKED = "adapter.packed_loading: checkpoints in MXFP4 and FP8 are not loaded as they are stored"
_SUMS = "adapter.combine: adapters are not combined but by cat"
_PINNED = "offloaded experts take up to twice their size in RAM, unless PYTORCH_ALLOC_CONF says otherwise"
_STREAM = "tasks.rows: columns of JSON in a stream are refused, or filled with None, after remove_columns and map"
_DORA = "DoRA's norms are worked out for every token that is generated"
_META = "cost.estimate and `hotlora train` cannot tell the memory of a training before it starts"

NAMES = {
    "transformers.integrations.moe:use_experts_implementation": "hf.moe_layers cannot tell a dense model from one "
    "whose experts are computed in another way",
    "transformers.integrations.moe:ALL_EXPERTS_FUNCTIONS.register": "no adapter on experts: the routed layer is not "
    "among transformers' implementations of experts",
    "transformers.integrations.moe:_grouped_linear": "PERFT's adapters are not computed",
    "transformers.integrations.moe#_apply_gate": _EXPERTS,
    "transformers.integrations.moe#has_gate": _EXPERTS,
    "transformers.integrations.moe#has_bias": _EXPERTS,
    "transformers.integrations.moe#is_transposed": _EXPERTS,
    "transformers.integrations.moe#is_concatenated": _EXPERTS,
    "transformers.integrations.moe#_is_expert_parallel": "hf.experts_view takes a process's experts for all of them, "
    "under expert parallelism",
    "transformers.integrations.moe#has_post_expert_norm": "hf.experts_view leaves out the norm after experts (inkling)",
    "torch:_C._accelerator_setAllocatorSettings": _PINNED,
    "transformers:PreTrainedConfig._experts_implementation": "adapter.model does not give a model its own forward of "
    "experts back when the adapter is unloaded",
    "transformers.integrations.peft#_hotswap_enabled": "hf.peft_hooks: transformers' load_adapter swaps a part of an "
    "adapter, after enable_peft_hotswap",
    "transformers.core_model_loading:revert_weight_conversion": "adapter.formats names experts as transformers does, "
    "and not as servers read them",
    "transformers.integrations:INTEGRATION_TO_CALLBACK": "--report-to is not checked before training",
    "transformers.integrations:get_available_reporting_integrations": "--report-to is not checked before training",
    "peft.utils.merge_utils:task_arithmetic": _SUMS,
    "peft.utils.merge_utils:ties": _SUMS,
    "peft.utils.merge_utils:dare_linear": _SUMS,
    "peft.utils.merge_utils:dare_ties": _SUMS,
    "peft.utils.merge_utils:magnitude_prune": _SUMS,
    "datasets.iterable_dataset#_ex_iterable": _STREAM,
    "datasets.iterable_dataset#iter_arrow": _STREAM,
    "datasets.table:MemoryMappedTable": "tasks.stored: rows of data are not read from their file",
    "torch.utils._pytree:tree_leaves": _META,
    "transformers.training_args:OptimizerNames": "--optim is not checked before training",
    "transformers.masking_utils:find_packed_sequence_indices": _META,
    "transformers.utils.chat_template_utils:render_jinja_template": "tasks.chat does not find where an answer begins "
    "by a template's {% generation %}",
    "transformers.quantizers:HfQuantizer._process_model_before_weight_loading": _QUANTIZED,
    "transformers.quantizers:HfQuantizer._process_model_after_weight_loading": _QUANTIZED,
    "bitsandbytes.cextension:lib._lib": "adapter.quantized takes memory of its own for each expert that a CPU "
    "multiplies",
    "transformers.quantizers:HfQuantizer.update_weight_conversions": _PACKED,
    "transformers.integrations.mxfp4:Mxfp4Dequantize": _PACKED,
    "transformers.integrations.finegrained_fp8:Fp8Dequantize": _PACKED,
    "transformers.core_model_loading:MergeModulelist": _PACKED,
    "transformers.core_model_loading:Concatenate": _PACKED,
    "transformers:PreTrainedModel._keep_in_fp32_modules": "hf.linears quantizes what a family keeps in float32",
    "transformers:PreTrainedModel._keep_in_fp32_modules_strict": "hf.linears quantizes what a family keeps in float32",
    "transformers:PreTrainedModel._keys_to_ignore_on_load_unexpected": "adapter.formats: a merged checkpoint's config "
    "names layers that are not in it",
    "transformers.initialization:no_init_weights": "bench draws every weight of a model twice",
    "transformers.modeling_utils#_is_hf_initialized": "bench draws every weight of a model twice",
    "transformers:PreTrainedModel.initialize_weights": "bench cannot make a model of random weights",
    "transformers:TrainingArguments#_n_gpu": "a process that sees several GPUs ends before its first step",
    "trl:SFTTrainer._load_from_checkpoint": _RESUME,
    "trl:SFTTrainer._issue_warnings_after_load": _RESUME,
    "trl:SFTTrainer._load_optimizer_and_scheduler": _RESUME,
    "trl:SFTTrainer._load_rng_state": _RESUME,
    "trl:SFTTrainer._save": "checkpoints hold the configs that the trainer has changed",
    "trl:SFTTrainer._save_checkpoint": "a checkpoint may hold weights that are no numbers",
    "trl:SFTTrainer._send_telemetry": "TRL reports usage to its makers",
    "trl:SFTTrainer._track_num_input_tokens": "train.json counts tokens of rows that no process trained on",
    "trl:SFTTrainer.get_batch_samples": "messages do not name the examples of a step that went wrong",
    "trl:SFTTrainer.create_model_card": "TRL writes a card into every checkpoint",
    "trl.trainer.sft_trainer:DataCollatorForLanguageModeling": "hf.forward cannot check --packing",
    "trl.trainer.utils:add_fused_lm_head": "bench times another loss than training's",
    "torch:UntypedStorage._cdata": "cost.estimate and bench count the bytes of a storage twice",
    "trl.chat_template_utils:has_generation_markers": "tasks.chat does not know TRL's variants of chat templates",
    "peft.tuners.lora:Linear": "adapter.formats.collect does not know attention's adapters",
    "peft.tuners.lora:LoraLayer._get_base_layer_device_and_dtype": _LAYER,
    "peft.tuners.lora:LoraLayer._get_in_out_features": _LAYER,
    "peft.tuners.lora:LoraLayer._move_adapter_to_device_of_base_layer": _LAYER,
    "peft.tuners.lora:LoraLayer._active_adapter": _LAYER,
    "peft.tuners.lora:dora": _DORA,
    "peft.tuners.lora.dora:DoraLinearLayer": _DORA,
    "peft.tuners.lora.dora:DoraLinearLayer._cache_store": "answers by DoRA take as much memory again as attention's "
    "weights",
    "peft.helpers:DoraCaching": _DORA,
    "peft.tuners.tuners_utils:BaseTunerLayer": _LAYER,
    "peft.tuners.tuners_utils:check_adapters_to_merge": "adapter.mergeable does not know which adapters to merge",
    "peft:LoraModel._cast_adapter_dtype": "adapter.model: combined adapters are rounded to the base's dtype, and "
    "loaded ones train",
    "peft:LoraModel._check_merge_allowed": _TUNER,
    "peft:LoraModel._create_new_module": _TUNER,
    "peft:LoraModel._enable_peft_forward_hooks": "adapter.model: a model that has refused adapter_names refuses all",
    "peft:LoraModel._prepare_adapter_config": _TUNER,
    "peft:LoraModel._replace_module": _TUNER,
    "peft:LoraModel._unload_and_optionally_merge": _TUNER,
    "peft:LoraModel._remap_adapter_state_dict_for_load": "hf.peft_hooks: sparse factors are not loaded",
    "peft:LoraModel._remove_adapter_name_from_key": "hf.peft_hooks: sparse factors are saved under an adapter's name",
    "peft.config:PeftConfigMixin.from_peft_type": "hf.peft_hooks: a saved plan is not read as one",
    "peft.optimizers.lorafa:LoraFAOptimizer": "hf.peft_hooks: LoRA-FA's optimizer trains experts wrongly",
    "peft.utils.hotswap:check_hotswap_configs_compatible": "hf.peft_hooks: hotswap_adapter loads a part of an adapter",
    "peft.utils.other:get_pattern_key": "adapter.formats.import_peft reads wrong ranks",
    "peft.utils.transformers_weight_conversion:WeightRenaming": "hf.peft_hooks: transformers' own load_adapter loses "
    "tensors",
    "peft.utils.transformers_weight_conversion:build_peft_weight_mapping": "hf.peft_hooks: transformers' own "
    "load_adapter loses tensors",
    "peft.utils.transformers_weight_conversion:convert_peft_adapter_state_dict_for_transformers": "hf.peft_hooks and "
    "adapter.formats: some families' adapters lose tensors",
    "peft.utils.transformers_weight_conversion:convert_peft_config_for_transformers": "adapter.formats.import_peft does"
    " not read adapters of transformers 4",
    "torch.nn.modules.module#_is_replica": "adapter.mergeable: a model under nn.DataParallel fails by a stack trace",
    "torch.nn:Module._apply": "adapter.factors rounds a frozen A with the model",
    "torch:ops.mkldnn._is_mkldnn_bf16_supported": "base.precision takes every CPU for a slow one",
    "torch:ops.mkldnn._is_mkldnn_fp16_supported": "base.precision takes every CPU for a slow one",
    "torch.distributed.distributed_c10d:_get_default_store": "base.processes: each process tells its own error",
    "torch.optim.adamw:adamw": "train.row_steps: re-profiling cannot step new experts",
    "torch._subclasses.fake_tensor:FakeTensorMode": _META,
    "torch:_C._current_graph_task_id": "routing.replay does not see that a layer is computed again in backward",
    "torch.overrides:_get_current_function_mode_stack": "routing.replay: of two replays, the outer one chooses",
    "torch.utils._python_dispatch:TorchDispatchMode": "bench does not count operations",
}  # fmt: skip
"""`module:name`, or `module#name` of what a module gives to objects: what of hotlora breaks without it."""


def internal(name: str) -> Any:
    """The object of a name in `NAMES`. HotLoraError: the installed library does not have it."""
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        library = name.partition(":")[0].partition(".")[0]
        raise HotLoraError(
            f"{library} {importlib.metadata.version(library)} has no {name}, without which {NAMES[name]}. Install the "
            f"{library} that hotlora was tested with (constraints.txt), or a newer hotlora."
        ) from error
