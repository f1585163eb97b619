"""Router logits as transformers returns them with output_router_logits: for each MoE layer one tensor [T, E].

Shape suffixes: L MoE layers, E experts, K router's top-k, T tokens (padding included, unless attention_mask says).
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...base.errors import DataError
from .arrays import Stored, by_layer
from .found import Found, Known, check_layers

MASK = "attention_mask"
_ROWS = 2**15  # tokens of a layer that are read at once


def read_logits(arrays: Mapping[str, Stored], file: Path, known: Known) -> Found:
    """The K highest logits of each token, counted; their softmax weights are the mass where the config says how they
    are normalized.

    arrays: [T, E] for each layer with its number in its name, or one array [L, T, E]; and `attention_mask` [B, S] with
    B·S = T, where there is padding. DataError: other shapes, logits that are not finite, a router that does not take
    the highest.
    """
    if known.router:
        raise DataError(f"{file} holds router logits, and {known.router}: import the ids that it chose instead")
    arrays = dict(arrays)
    mask = arrays.pop(MASK, None)
    wanted = "router logits [layers, tokens, experts], or [tokens, experts] for each layer"
    if len(arrays) == 1 and len(next(iter(arrays.values())).shape) == 3:
        (array,) = arrays.values()
        num_layers, num_tokens, num_experts = array.shape
        numbers = tuple(range(num_layers))
        parts = [(array.flat, layer * num_tokens) for layer in numbers]
    else:
        layers = by_layer(arrays, file, wanted)
        shapes = {part.shape for part in layers.values()}
        if len(shapes) != 1:
            raise DataError(f"{file}: layers have router logits {sorted(shapes)}: each must have [tokens, experts]")
        ((num_tokens, num_experts),) = shapes
        numbers, parts = tuple(layers), [(part, 0) for part in layers.values()]
    top_k = known.need("num_experts_per_tok", file, "how many experts a token is sent to")
    if known.num_experts not in (None, num_experts) or not 1 <= top_k <= num_experts:
        raise DataError(
            f"{file} has router logits of {num_experts} experts, and the model has {known.num_experts or '?'}, "
            f"{top_k} a token: {wanted}"
        )
    if known.layers is not None and len(known.layers) == len(numbers) and numbers == tuple(range(len(numbers))):
        numbers = known.layers  # transformers counts MoE layers alone
    check_layers(numbers, file, known)
    is_token = _mask(mask, num_tokens, file)
    counts = torch.zeros(len(parts), num_experts, dtype=torch.int64)
    mass = torch.zeros(len(parts), num_experts, dtype=torch.float64)
    for row, (part, at) in enumerate(parts):
        for start in range(0, num_tokens, _ROWS):
            stop = min(start + _ROWS, num_tokens)
            logits = torch.from_numpy(part.rows(at + start, at + stop).astype(np.float32))[is_token[start:stop]]
            if not logits.isfinite().all():
                token = int(torch.nonzero(~logits.isfinite().all(dim=1))[0])
                raise DataError(
                    f"{file}: layer {numbers[row]} has router logits that are not finite, near token {token}"
                )
            top = logits.topk(top_k, dim=1)
            flat = top.indices.flatten()
            counts[row] += torch.bincount(flat, minlength=num_experts)
            weights = logits.softmax(dim=1).gather(1, top.indices).double()
            if known.norm_topk_prob:
                weights /= weights.sum(dim=1, keepdim=True)
            mass[row].index_add_(0, flat, weights.flatten())
    return Found(
        "router logits", numbers, counts, int(is_token.sum()), top_k, None if known.norm_topk_prob is None else mass,
        skipped=int((~is_token).sum()),
    )  # fmt: skip


def _mask(mask: Stored | None, num_tokens: int, file: Path) -> Tensor:
    if mask is None:
        return torch.ones(num_tokens, dtype=torch.bool)
    if int(np.prod(mask.shape)) != num_tokens or not mask.shape or mask.dtype.kind not in "iu":
        raise DataError(
            f"{file}: attention_mask is {list(mask.shape)} of {mask.dtype}, and there are {num_tokens} tokens"
        )
    return torch.from_numpy(mask.rows(0, mask.shape[0]).reshape(-1).astype(np.int64)).bool()
