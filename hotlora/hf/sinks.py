"""Attention with sinks, as in gpt_oss, by torch's fused kernels: no array of scores, forward or backward.

transformers has such kernels for some cards (`flash_attention_4`, those of the Hub), and `flex_attention`, which is
compiled anew for each length and knows no sinks on a CPU. By itself it takes eager attention, which keeps several
arrays of B x H x T x T.

A sink is a key that each query sees, with a logit a head and without a value. Queries get one channel more, which holds
the logit; in it the sink's key has 1 and all other keys have 0.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "hotlora_sinks"
"""An `attn_implementation`, once this file is imported."""

FAMILIES = ("flint", "gpt_oss", "granitemoe_swa", "mimo_v2_flash")
"""Where transformers takes eager attention, and this is the same. Not deepseek_v4 and hy_v4, whose masks are sparse."""

_CHANNELS = 8  # heads stay as wide as kernels want them
_KEYS = 16  # a mask over a multiple of so many keys is not copied once more by torch's kernels on a GPU


def default_attention(config: PreTrainedConfig) -> str | None:
    """What `hotlora.load_model` takes where no attention is asked for; None: transformers' choice."""
    return NAME if config.get_text_config().model_type in FAMILIES else None


def attention_with_sinks(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls attention.

    query: `[B, H, T, D]`. key, value: `[B, H_kv, S, D]`. attention_mask: `[B, 1, T, S]`, of bools or to be added.
    s_aux: a logit a head, `[H]`; None: a layer without sinks. Returns `[B, T, H, D]`.
    """
    if s_aux is None:
        plain = (module, query, key, value, attention_mask, dropout, scaling, is_causal)
        return sdpa_attention_forward(*plain, **kwargs)[0], None
    length, width, width_v = query.shape[2], query.shape[3], value.shape[3]
    scaling = width**-0.5 if scaling is None else scaling
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_causal = is_causal and attention_mask is None and length > 1
    # Kernels count from the first query and the first key: where no mask says so, the sink gets a query of its own.
    logits = F.pad((s_aux / scaling).to(query.dtype).view(-1, 1, 1), (width, _CHANNELS - 1))
    query = F.pad(query, (0, _CHANNELS, int(is_causal), 0)) + logits
    # The sink's key is the last of the new ones; the mask hides those before it.
    more = 1 if attention_mask is None else _KEYS - key.shape[2] % _KEYS
    key = F.pad(key, (0, _CHANNELS, more, 0))
    with torch.no_grad():  # of the new channel, which the backward pass drops
        key[:, :, more - 1, width] = 1
    # Kernels that keep no scores want v as wide as q and k; where it was not, as in MiMo, nothing is to be kept.
    value = F.pad(value, (0, _CHANNELS if width_v == width else 0, more, 0))
    if attention_mask is not None:
        is_bool = attention_mask.dtype == torch.bool
        hidden = False if is_bool else torch.finfo(attention_mask.dtype).min
        attention_mask = F.pad(attention_mask, (more, 0), value=hidden)
        attention_mask[..., more - 1] = is_bool  # True, or 0 to be added
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    return out[:, int(is_causal) :, :, :width_v], None


AttentionInterface.register(NAME, attention_with_sinks)
AttentionMaskInterface.register(NAME, sdpa_mask)
