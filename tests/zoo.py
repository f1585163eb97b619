"""A tiny model of every MoE family of the installed transformers, found by reading the package.

A family is a modeling file that decorates its experts with `use_experts_implementation`. Its default config is
shrunk by the names of its fields; a family whose default config cannot be shrunk that way has a line in `MEND`.
"""

import copy
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

NUM_EXPERTS, TOP_K, VOCAB = 8, 2, 128
_MODELS = Path(transformers.__file__).parent / "models"

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    # Far above the usual 0.02, so that a random router has opinions and no near-ties.
    "initializer_range": 0.2,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), NUM_EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), TOP_K),
    **dict.fromkeys(("n_group", "num_expert_group", "topk_group"), 2),
    **dict.fromkeys(("hidden_size", "d_model", "text_hidden_size", "out_hidden_size", "moe_hidden_size"), 32),
    **dict.fromkeys(("hidden_size_per_layer_input", "projection_dim", "projector_hidden_size"), 32),
    **dict.fromkeys(("adapter_in_dim", "adapter_out_dim", "adapter_input_size"), 32),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "index_n_heads", "indexer_n_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("index_head_dim", "linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "hc_lowrank"), 16),
    **dict.fromkeys(("qk_head_dim", "router_hidden_size"), 16),
    **dict.fromkeys(("linear_num_heads", "linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("mamba_num_heads", "mamba_n_heads", "n_groups"), 4),
    **dict.fromkeys(("mamba_head_dim", "mamba_d_head", "ssm_state_size", "mamba_d_state", "mamba_dt_rank"), 8),
    **dict.fromkeys(("depth", "encoder_layers"), 2),
    **dict.fromkeys(("image_size", "patch_size"), 16),
    **dict.fromkeys(("mlp_dim", "ffn_dim", "encoder_ffn_dim", "downsample_hidden_size", "output_dim"), 16),
    "num_position_embeddings": 64,
}  # fmt: skip
_DROPPED = {
    "transformers_version", "model_type", "_name_or_path", "architectures", "dtype", "id2label", "label2id",
    "output_attentions", "output_hidden_states", "return_dict", "is_encoder_decoder", "chunk_size_feed_forward",
    "problem_type", "per_layer_config",
}  # fmt: skip
_TOKENS = re.compile(r"token_(id|index)$")


def _in_text(**values: Any) -> dict[str, Any]:
    return {f"text_config.{name}": value for name, value in values.items()}


# What the names of a family's fields cannot tell; a dotted name is a sub-config's field.
_GEMMA4 = {
    "enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 16,
    "vocab_size_per_layer_input": 128, "per_layer_config": {"1": {"head_dim": 16}, "2": {"head_dim": 16}},
}  # fmt: skip
_GROUPS = {"n_group": 2, "topk_group": 2, "num_experts_per_tok": 2}
_QSA = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}  # fmt: skip
_FEWER_HEADS = {"2": {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 8, "qk_nope_head_dim": 8}}
# The second of three layers runs twice for each token.
_LOOP = {
    "loop_layer_index_start": 1, "loop_layer_index_end": 2, "loop_num_passes": 2, "loop_gate_rank": 8,
    "n_layers_per_attn_res_block": 1, "rel_extent": 16, "unpadded_vocab_size": VOCAB,
}  # fmt: skip
_M_ROPE = {"rope_type": "default", "rope_theta": 1e4}
MEND: dict[str, dict[str, Any]] = {
    "deepseek_ocr2": _in_text(mlp_layer_types=["dense", "sparse", "sparse"], **_GROUPS),
    "deepseek_v2": _GROUPS,
    "deepseek_v3": {"first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "dots3_note": _in_text(per_layer_config=_FEWER_HEADS, head_dim=16),
    "dots3_note_text": {"per_layer_config": _FEWER_HEADS, "head_dim": 16},
    "ernie4_5_vl_moe": _in_text(rope_parameters={**_M_ROPE, "mrope_section": [1, 1, 2]}),
    "gemma4": _in_text(**_GEMMA4),
    "gemma4_text": _GEMMA4,
    "glm4v_moe": _in_text(rope_parameters={**_M_ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}),
    "glm5_next": _in_text(qk_rope_head_dim=0, head_dim=0),
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "hy_v4_vl": {
        **_in_text(rope_parameters={**_M_ROPE, "mrope_section": [2, 1, 1]}),
        "vision_config.max_image_size": 32,
    },
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 8, "moe_topk": [2] * 3},
    "inkling2_loop": _in_text(**_LOOP),
    "inkling2_loop_text": _LOOP,
    "jamba": {"num_hidden_layers": 5},
    "inkling_mm_model": {"vision_config.patch_size": 4, "vision_config.n_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "full_attention"], "num_dense_layers": 1},
    "mistral4": {"head_dim": 16},
    "muse_spark": {"audio_config.hidden_sizes": [8, 8, 8, 8], "audio_config.depths": [1, 1, 1, 1]},
    "phimoe": {"router_jitter_noise": 0.4},  # lets the second expert's gradient live in sparsemixer
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 110},
    "qwen4_exp": _in_text(**_QSA),
    "qwen4_exp_text": _QSA,
    "zaya": {"num_experts_per_tok": 1},
}
# Older versions of transformers lack some families.
MEND = {model_type: values for model_type, values in MEND.items() if model_type in CONFIG_MAPPING}


# Decorated, and not for us: they generate no text token after token.
NOT_CAUSAL = {
    "diffusion_gemma": "denoises blocks of text; its decoder reads no input_ids",
    "openai_privacy_filter": "classifies tokens",
}


def runs_of(model_type: str, layers: Sequence[Any]) -> list[int]:
    """How often each of the MoE layers of `zoo_model` runs for a token."""
    return [1 + (layer.layer == 1 and model_type.startswith("inkling2_loop")) for layer in layers]


@cache
def families() -> dict[str, str]:
    """model_type -> the class that trains and generates text, of every family, multimodal wrappers too."""
    files = {path.parent.name: path.read_text() for path in _MODELS.glob("*/modeling_*.py")}
    found = {}
    for mapping in ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"):
        for model_type, name in getattr(modeling_auto, mapping).items():
            for folder in decorated_folders() - NOT_CAUSAL.keys():
                if f"\nclass {name}(" in files[folder]:
                    found.setdefault(model_type, name)
    return dict(sorted(found.items()))


@cache
def decorated_folders() -> set[str]:
    """The folders of transformers' `models/` whose experts are behind the interface."""
    files = _MODELS.glob("*/modeling_*.py")
    return {path.parent.name for path in files if "@use_experts_implementation" in path.read_text()}


def zoo_config(model_type: str, vocab_size: int = VOCAB) -> PreTrainedConfig:
    """A config of `model_type` with 3 to 5 layers, one of each kind of its own; E = 8, K = 2 where it can be."""
    values = _shrunk(CONFIG_MAPPING[model_type]())
    for name, value in MEND.get(model_type, {}).items():
        target, (*parts, last) = values, name.split(".")
        for part in parts:
            target = target[part]
        target[last] = value
    for part in (values, values.get("text_config", {})):
        for name in ("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"):
            if name in part:
                part[name] = vocab_size
    return CONFIG_MAPPING[model_type](**values)


def zoo_model(
    model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, vocab_size: int = VOCAB
) -> PreTrainedModel:
    """A model of the family in eval mode and frozen; the same weights for the same arguments."""
    return copy.deepcopy(_zoo_model(model_type, seed, dtype, vocab_size))  # which takes less than half as long


@cache
def _zoo_model(model_type: str, seed: int, dtype: torch.dtype, vocab_size: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = zoo_config(model_type, vocab_size)
        model = getattr(transformers, families()[model_type])._from_config(config, dtype=dtype)
        for parameter in model.parameters():
            # Some routers, gates and scales start at zero or empty: experts would tie, gradients vanish.
            if not parameter.isfinite().all() or parameter.abs().max() < 1e-3:
                parameter.data.normal_(0, 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):  # deepseek_v4's fixed table from tokens to experts
                buffer.copy_(torch.rand(len(buffer), NUM_EXPERTS).argsort(1)[:, :TOP_K])
    # Frozen, for torch.matmul rounds differently for a weight that could have a gradient.
    return model.eval().requires_grad_(False)


def _shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    data = {name: value for name, value in config.to_dict().items() if name not in _DROPPED}
    num_layers = data.get("num_hidden_layers")
    if num_layers:  # a list of the layers themselves, such as `kv_source_layers`, is the config's own to make
        data = {name: value for name, value in data.items() if value != list(range(num_layers))}
    per_layer = {k: v for k, v in data.items() if isinstance(v, list) and num_layers and len(v) == num_layers}
    picks = _one_of_each(list(zip(*per_layer.values(), strict=True)) or [()] * (num_layers or 0))
    ids = iter(range(100, VOCAB))
    values: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, dict) and "model_type" in value:
            values[name] = _shrunk(getattr(config, name))
        elif name in per_layer:
            values[name] = [value[i] for i in picks]
        elif name == "num_hidden_layers":
            values[name] = len(picks)
        elif _TOKENS.search(name) and isinstance(value, int):
            values[name] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}.get(name) or next(ids)
        elif _TOKENS.search(name) and isinstance(value, list):
            values[name] = 1
        elif name == "num_key_value_heads" and value == data["num_attention_heads"]:
            values[name] = _SIZES["num_attention_heads"]  # as many, where the family wants it
        elif value is not None:
            values[name] = _small(name, value)
    return values


def _one_of_each(kinds: list[tuple[Any, ...]]) -> list[int]:
    """The first layer of each kind, and of the last kind as many as make three layers."""
    picks = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    for i in reversed(range(len(kinds))):
        if len(picks) < 3 and i not in picks:
            picks.append(i)
    return sorted(picks)


def _small(name: str, value: Any) -> Any:
    if name in _SIZES:
        return _SIZES[name]
    if "intermediate_size" in name:
        return [16] * len(value) if isinstance(value, list) else 16
    return value
