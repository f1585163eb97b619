"""What a model's config says of its routing; no weights are read."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...hf.models import model_from_config, structure
from ...hf.moe_layers import fingerprint, moe_layers, num_experts_per_tok, skips_tokens
from .found import Known

_TOKENS = 64  # that a router is tried on


def known_of(model: str | os.PathLike[str]) -> Known:
    """model: a config.json, its folder, nano, or a name on the Hub. ModelError or FileError where there is none."""
    path = Path(model).expanduser()
    built = model_from_config(path) if path.is_file() else structure(str(model))
    layers = moe_layers(built)
    top_k = num_experts_per_tok(built)
    is_highest, norm_topk_prob = _tried(built.get_submodule(layers[0].router), top_k, built.config.get_text_config())
    name = built.config.get_text_config().model_type
    return Known(
        layers[0].num_experts, top_k, tuple(layer.layer for layer in layers),
        built.config.get_text_config().num_hidden_layers, fingerprint(built), str(model),
        skips_tokens(built), norm_topk_prob,
        "" if is_highest else f"the router of {name} does not choose the K highest of them (a bias, groups of experts)",
    )  # fmt: skip


def _tried(router: nn.Module, top_k: int, config: Any) -> tuple[bool, bool | None]:
    """(whether a router with random weights chooses the K highest logits; whether its weights are their softmax,
    renormalized or not; None: something else), seen on random input."""
    generator = torch.Generator().manual_seed(0)
    try:
        router = copy.deepcopy(router).to_empty(device="cpu").float()
        for tensor in (*router.parameters(), *router.buffers()):
            tensor.data = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        with torch.no_grad():
            outputs = router(torch.randn(_TOKENS, config.hidden_size, generator=generator) / config.hidden_size**0.5)
        logits, weights, indices = outputs
        return _compared(logits.float(), weights.float(), indices, top_k)
    except Exception:  # of every kind: a router of another call or result is not known
        return False, None


def _compared(logits: Tensor, weights: Tensor, indices: Tensor, top_k: int) -> tuple[bool, bool | None]:
    top = logits.topk(top_k, dim=1)
    if not torch.equal(top.indices.sort(dim=1).values, indices.sort(dim=1).values):
        return False, None
    plain = logits.softmax(dim=1).gather(1, indices)
    if weights.shape == logits.shape:  # of all experts, 0 but for the chosen
        weights = weights.gather(1, indices)
    for norm, wanted in ((False, plain), (True, plain / plain.sum(dim=1, keepdim=True))):
        if torch.allclose(weights, wanted, rtol=1e-3, atol=1e-6):
            return True, norm
    return True, None
