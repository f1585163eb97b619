"""What our own model says of the texts: without the adapter, with it, and with one part of it left out.

Shape suffixes: P texts, S tokens of a text, C tokens asked for, R rows of a batch, T tokens of a batch, K router's
top-k, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..adapter.experts import HotExperts
from ..adapter.raw_weights import HotLoraRouter
from ..base.processes import device_of
from ..hf.forward import inference, logits_at
from ..hf.moe_layers import attention_modules, moe_layers
from ..routing.replay import replay_routing
from .texts import Part

ASKED = 12
"""C: the text's own next token, and those that the adapted model finds likeliest."""
_TOKENS_AT_ONCE = 4096
_LOGITS_AT_ONCE = 2**28
SCALES = (0.25, 0.5, 2.0)
"""Of the whole adapter. With none of it and all of it they show what any scale would do."""
_ALL, _NONE = -2, -3
"""In the place of an expert that is left out."""


@dataclass(frozen=True)
class Effects:
    """What leaving out parts of an adapter does to the log-probabilities, in our own model."""

    experts: dict[Part, dict[int, Tensor]]
    """Of each adapted expert: text -> float64 [S - 1, C], the log-probabilities without its update less those of the
    whole adapter. A text that does not reach the expert is left out."""
    groups: dict[int | str, Tensor]
    """The same of all updates of a kind, "experts", "attention", "router" or "shared experts", and of the experts of a
    layer, by its number: float64 [P, S - 1, C]."""
    scaled: dict[float, Tensor]
    """The same of the whole adapter at so many times its scale."""


def tokens_asked(model: nn.Module, texts_PS: Tensor) -> Tensor:
    """int64 `[P, S - 1, C]`."""
    with inference(model):
        logits_PSV = _logits(model, texts_PS)
    likely = logits_PSV.topk(min(ASKED - 1, logits_PSV.shape[-1]), dim=-1).indices.cpu()
    return torch.cat([texts_PS[:, 1:, None], likely], dim=-1)


def log_probs(model: nn.Module, texts_PS: Tensor, tokens_PSC: Tensor) -> Tensor:
    """float64 `[P, S - 1, C]` on the CPU."""
    with inference(model):
        logits_PSV = _logits(model, texts_PS)
    tokens = tokens_PSC.to(logits_PSV.device)
    found = logits_PSV.gather(-1, tokens) - logits_PSV.logsumexp(-1, keepdim=True)
    return found.cpu().double()  # in this order: mps has no float64


def _logits(model: nn.Module, texts_PS: Tensor) -> Tensor:
    positions = torch.arange(texts_PS.shape[1] - 1)
    device = device_of(model)
    return logits_at(model, {"input_ids": texts_PS.to(device)}, positions.to(device)).logits.float()


def effects(
    model: nn.Module, texts_PS: Tensor, tokens_PSC: Tensor, whole_PSC: Tensor, uses: Tensor, parts: Sequence[Part],
    kinds: Mapping[str, Sequence[Any]], routes: Tensor | None = None,
) -> Effects:  # fmt: skip
    """Of each of `parts`, of each layer's experts, and of each of `kinds`, as `kinds_of` has them.

    Each expert is left out in a row of its own for each text that reaches it, many rows in one forward.

    whole_PSC: `log_probs` with the whole adapter. uses: `[P, len(parts)]`, as of `texts.uses_of`. routes: the experts
    of the whole adapter's forward, int64 `[L, P, S, K]`, which are kept to; None: each forward's own.
    """

    def found_for(texts: list[int]) -> Tensor:
        with nullcontext() if routes is None else replay_routing(model, routes[:, texts]):
            return log_probs(model, texts_PS[texts], tokens_PSC[texts])

    all_texts = list(range(len(texts_PS)))
    layers = sorted({layer for layer, _ in parts})
    rows: list[tuple[int, int | None, int]] = [(*parts[n], text) for n, text in uses.T.nonzero().tolist()]
    rows += [(layer, None, text) for layer in layers for text in range(len(texts_PS))]
    experts: dict[Part, dict[int, Tensor]] = {part: {} for part in parts}
    groups: dict[int | str, Tensor] = {layer: torch.zeros_like(whole_PSC) for layer in layers}
    vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr,operator]
    length = texts_PS.shape[1]
    at_once = max(1, min(_TOKENS_AT_ONCE, _LOGITS_AT_ONCE // vocabulary) // length)
    for start in range(0, len(rows), at_once):
        some = rows[start : start + at_once]
        texts = [text for _, _, text in some]
        with left_out(model, [(layer, expert) for layer, expert, _ in some], length):
            found = found_for(texts)
        for (layer, expert, text), without in zip(some, found, strict=True):
            if expert is None:
                groups[layer][text] = without - whole_PSC[text]
            else:
                experts[layer, expert][text] = without - whole_PSC[text]
    for kind, modules in kinds.items():
        with at_scale(modules, 0):
            groups[kind] = found_for(all_texts) - whole_PSC
    scaled: dict[float, Tensor] = {}
    for factor in SCALES:
        with at_scale([module for modules in kinds.values() for module in modules], factor):
            scaled[factor] = log_probs(model, texts_PS, tokens_PSC) - whole_PSC
    return Effects(experts, groups, scaled)


@contextmanager
def left_out(model: nn.Module, parts_R: Sequence[tuple[int, int | None]], length: int) -> Iterator[None]:
    """Inside, row r of a forward goes without the update of one expert, or of all of a layer (None): `parts_R[r]`.

    length: S.
    """
    with ExitStack() as stack:
        for layer in moe_layers(model):
            module = model.get_submodule(layer.experts)
            left = [(_ALL if e is None else e) if at == layer.layer else _NONE for at, e in parts_R]
            if isinstance(module, HotExperts) and set(left) != {_NONE}:
                hook = _exchange(torch.tensor(left).repeat_interleave(length))
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _exchange(left_T: Tensor) -> Any:
    """A hook that takes of each token's experts the one that is left out, or all, from the base."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        hidden, index, weight = (*args, *kwargs.values())[:3]
        index_TK, left_T1 = index.reshape(-1, index.shape[-1]), left_T.to(index.device)[:, None]
        token, choice = ((index_TK == left_T1) | (left_T1 == _ALL)).nonzero().unbind(1)
        if not len(token):
            return None
        given = (
            hidden.reshape(len(index_TK), -1)[token], index_TK[token, choice, None],
            weight.reshape(index_TK.shape)[token, choice, None],
        )  # fmt: skip
        change = module.base_layer(*given) - module.forward(*given)
        flat = output.reshape(len(index_TK), -1).clone()
        return flat.index_add_(0, token, change.to(flat.dtype)).view_as(output)

    return hook


def kinds_of(model: nn.Module) -> dict[str, list[Any]]:
    """The adapted modules by kind, of those that there are."""
    attention = set(attention_modules(model))
    shared = {path for layer in moe_layers(model) for path in layer.shared}
    kinds: dict[str, list[Any]] = {"experts": [], "attention": [], "router": [], "shared experts": []}
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer) or not any(module.scaling.values()):
            continue
        if isinstance(module, HotExperts):
            kinds["experts"].append(module)
        elif isinstance(module, HotLoraRouter):
            kinds["router"].append(module)
        elif path in attention:
            kinds["attention"].append(module)
        elif path in shared:
            kinds["shared experts"].append(module)
    return {kind: modules for kind, modules in kinds.items() if modules}


@contextmanager
def at_scale(layers: Sequence[Any], factor: float) -> Iterator[None]:
    """Inside, the adapters of these layers add so many times what they do; at 0 they are off, DoRA too."""
    kept = [dict(layer.scaling) for layer in layers]
    trained = {part: part.requires_grad for layer in layers for part in layer.parameters()}
    try:
        for layer, scaling in zip(layers, kept, strict=True):
            layer.scaling.update({name: factor * value for name, value in scaling.items()})
            if not factor:
                layer.enable_adapters(False)
        yield
    finally:
        for layer, scaling in zip(layers, kept, strict=True):
            if not factor:
                layer.enable_adapters(True)
            layer.scaling.update(scaling)
        for part, is_trained in trained.items():  # PEFT takes adapters that are on for trained ones
            part.requires_grad_(is_trained)
