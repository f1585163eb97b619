"""Texts that send tokens to every adapted expert: random tokens, of which the model's own router chooses.

Shape suffixes: P texts, S tokens of a text, L MoE layers, K router's top-k.
"""

from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import HotLoraError, ModelError
from ..base.processes import device_of
from ..hf.forward import inference, logits_at
from ..hf.models import load_tokenizer
from ..hf.moe_layers import moe_layers

LENGTH = 32
"""S: short, so that a text has few experts, and the engine's rounding little room to add up."""
DRAWN = 128
"""texts to choose from"""
MOST = 16
"""texts that are chosen at most, unless more are asked for"""
Part = tuple[int, int]
"""A decoder layer and one of its experts."""


def random_texts(model: Any, name_or_path: str, seed: int = 0) -> Tensor:
    """int64 `[DRAWN, S]`: drawn from the tokenizer's tokens for text; without one, from the whole vocabulary."""
    ids = _ordinary_tokens(model.config, name_or_path)
    draws = torch.randint(len(ids), (DRAWN, LENGTH), generator=torch.Generator().manual_seed(seed))
    return ids[draws]


def _ordinary_tokens(config: Any, name_or_path: str) -> Tensor:
    text = config.get_text_config()
    try:
        tokenizer = load_tokenizer(name_or_path)
        special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
        ids = [i for i in range(min(len(tokenizer), text.vocab_size)) if i not in special]
    except ModelError:
        ids = []
    if not ids:  # none there, or an empty one, as transformers makes of a folder without; configs name special tokens
        named = [item for part in (config, text) for item in part.to_dict().items()]
        named = [value for name, value in named if name.endswith(("token_id", "token_index"))]
        special = {i for value in named for i in (value if isinstance(value, list) else [value])}
        ids = [i for i in range(text.vocab_size) if i not in special]
    return torch.tensor(ids)


def routes_of(model: nn.Module, texts_PS: Tensor) -> dict[int, Tensor]:
    """Decoder layer -> the experts of each token, int64 `[P, S, K]` on the CPU; -1 where the router has skipped one."""
    seen: dict[int, list[Tensor]] = {}
    with inference(model), ExitStack() as stack:
        for layer in moe_layers(model):
            seen[layer.layer] = []
            hook = _kept(seen[layer.layer], texts_PS.shape)
            experts = model.get_submodule(layer.experts)
            stack.callback(experts.register_forward_pre_hook(hook, with_kwargs=True).remove)
        device = device_of(model)
        logits_at(model, {"input_ids": texts_PS.to(device)}, torch.zeros(1, dtype=torch.int64, device=device))
    return {layer: torch.cat(runs, dim=-1) for layer, runs in seen.items()}  # some families run a layer several times


def _kept(seen: list[Tensor], shape: torch.Size) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index, weight = (*args, *kwargs.values())[1:3]
        seen.append(index.masked_fill(weight.reshape(index.shape) == 0, -1).reshape(*shape, -1).cpu())

    return hook


def uses_of(routes: dict[int, Tensor], parts: Collection[Part]) -> Tensor:
    """int64 `[P, len(parts)]`: positions that each text sends to each expert. The last one predicts nothing here."""
    if not parts:
        return torch.zeros(len(next(iter(routes.values()))), 0, dtype=torch.int64)
    return torch.stack([(routes[layer][:, :-1] == expert).any(-1).sum(1) for layer, expert in parts], dim=1)


def chosen(uses: Tensor, least: int) -> list[int]:
    """A few texts that together reach every expert that any text reaches.

    uses: int64 `[P, N]`, as of `uses_of`. least: texts, where there are as many.
    """
    picked: list[int] = []
    reached = torch.zeros_like(uses[0], dtype=torch.bool)
    while len(picked) < min(max(MOST, least), len(uses)):
        gains = ((uses > 0) & ~reached).sum(1)
        gains[picked] = -1
        best = int(gains.argmax())
        if gains[best] <= 0 and len(picked) >= least:
            break
        picked.append(best)
        reached |= uses[best] > 0
    return sorted(picked)


def given_texts(rows: Iterable[Sequence[int]]) -> Tensor:
    """int64 `[P, S]`, P at most DRAWN: the rows' tokens one after another. HotLoraError: fewer than S."""
    ids = list(islice((token for row in rows for token in row), DRAWN * LENGTH))
    if len(ids) < LENGTH:
        raise HotLoraError(f"the data has {len(ids)} tokens: give {LENGTH} or more, or leave --data out.")
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
