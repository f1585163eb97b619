"""vLLM's format: a pair of matrices for each expert and projection under the checkpoint's own names, zeros for the cold
experts."""

from typing import Any

from torch import Tensor

from ...base.errors import HotLoraError
from .shared import AdapterFactors, ExpertFactors, checkpoint_experts, expert_names, server_format

# MLA's up-projection of keys and values. vLLM takes its weight apart when it loads a model, and holds it by a reference
# that is older than its LoRA layers: an adapter's update is read, and applied nowhere (vllm#48974, of 0.25.1 and on).
NOT_APPLIED = ("kv_b_proj",)


_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
LARGEST_RANK = _RANKS[-1]


def room_for(rank: int) -> int:
    """The least `--max-lora-rank` that vLLM has and an adapter of this rank fits in (0.32, 0.33: `MaxLoRARanks`).

    HotLoraError: there is none.
    """
    if rank > LARGEST_RANK:
        raise HotLoraError(f"vLLM takes adapters of rank {LARGEST_RANK} at most, and this one has {rank}: merge it.")
    return next(size for size in _RANKS if size >= rank)


def vllm_format(base: Any, parts: AdapterFactors) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config. base: the plain model, whose adapters are out of the way.

    HotLoraError: a rank that vLLM does not take.
    """
    room_for(parts.r)
    return server_format(base, parts, _names, has_cold=True)


def _names(base: Any, experts: ExpertFactors) -> tuple[str, dict[str, str]]:
    """As the checkpoint has them, such as Mixtral's `block_sparse_moe.experts.0.w1`."""
    names = expert_names(experts)
    root, found = checkpoint_experts(base, experts)
    if len(found) == len(names):
        return root, dict(zip(names, found, strict=True))
    if base.config.get_text_config().model_type == "gpt_oss":  # a fused checkpoint, whose parts vLLM names so (0.32)
        return root, {"gate": "w1", "up": "w3", "down": "w2"}
    return root, names
