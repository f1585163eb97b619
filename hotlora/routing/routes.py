"""Routes: the experts that tokens went to, kept by text or recorded from a model that runs.

Shape suffixes: L MoE layers, B rows, S positions, K router's top-k, T tokens (B x S), N tokens of a text.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..base.errors import DataError
from ..hf.moe_layers import MoELayer, is_no_expert, moe_layers, skips_tokens

UNKNOWN = -1
"""In the place of an expert: no route is known, the router chooses."""
_MOST = np.iinfo(np.int16).max
"""The highest id of an expert that is kept."""


class Routes:
    """The experts of many texts, each found by its tokens, in whatever batch a trainer puts it."""

    def __init__(self) -> None:
        self._routes: dict[bytes, np.ndarray[Any, Any]] = {}
        self._checked: set[bytes] = set()
        self.found = 0
        """texts that were asked for and had routes"""
        self.missing = 0
        """texts that were asked for and had none"""

    def __len__(self) -> int:
        return len(self._routes)

    def add(self, token_ids: Sequence[int] | Tensor, expert_ids: Any) -> None:
        """The experts of one text, prompt and completion.

        Args:
            token_ids: N of them, without padding.
            expert_ids: integers [N', L, K], as vLLM and SGLang return them: of the first N' of the tokens. An engine
                never runs the last token, so N' is N - 1 as a rule; the router chooses for the rest. -1: not known.
                Of all decoder layers instead, as engines have them: the MoE layers are taken.

        Raises:
            DataError: other shapes, no integers, more experts than tokens, or ids out of range.
        """
        tokens, experts = np.asarray(token_ids), np.asarray(expert_ids)
        is_right = tokens.ndim == 1 and experts.ndim == 3 and len(experts) <= len(tokens)
        if not is_right or tokens.dtype.kind not in "iu" or experts.dtype.kind not in "iu":
            raise DataError(
                f"token_ids are {list(tokens.shape)} of {tokens.dtype} and expert_ids {list(experts.shape)} of "
                f"{experts.dtype}: give one text's tokens, and integers [tokens, layers, k] of no more tokens."
            )
        if experts.dtype in (np.uint16, np.uint32, np.uint64):  # -1, as an unsigned number
            experts = np.where(experts == np.iinfo(experts.dtype).max, UNKNOWN, experts.astype(np.int64))
        if experts.size and not (UNKNOWN <= experts.min() and experts.max() <= _MOST):
            raise DataError(f"expert_ids are {experts.min()} to {experts.max()}: they must be -1 to {_MOST}.")
        text = tokens.astype(np.int64).tobytes()
        self._routes[text] = all_or_none(experts.astype(np.int16))
        self._checked.discard(text)

    def clear(self) -> None:
        """Forgets all texts, as before the next rollouts."""
        self._routes.clear()
        self._checked.clear()

    def of(
        self, input_ids: Tensor, attention_mask: Tensor | None, layers: Sequence[int], top_k: int,
        position_ids: Tensor | None = None,
    ) -> Tensor | None:  # fmt: skip
        """int64 [L, B, S, K] on the CPU, -1 where no route is known; None where that is everywhere.

        input_ids, attention_mask, position_ids: [B, S]; where a row's positions begin again, another text begins.
        layers: decoder indices of the L MoE layers. Waits for the device.
        """
        for name, given in (("attention_mask", attention_mask), ("position_ids", position_ids)):
            if given is not None and given.shape != input_ids.shape:
                raise DataError(f"{name} is {list(given.shape)}: to find routes it must be {list(input_ids.shape)}.")
        ids = input_ids.cpu().numpy()
        mask = np.ones_like(ids, dtype=bool) if attention_mask is None else attention_mask.cpu().numpy().astype(bool)
        positions = None if position_ids is None else position_ids.cpu().numpy()
        expert_ids = np.full((len(layers), *ids.shape, top_k), UNKNOWN, dtype=np.int64)
        found = 0
        texts = [
            (row, places) for row, is_token in enumerate(mask)
            for places in _texts(is_token, None if positions is None else positions[row])
        ]  # fmt: skip
        for row, places in texts:
            text = ids[row, places].tobytes()
            if (experts := self._routes.get(text)) is None:
                continue
            if experts.shape[1] > max(len(layers), max(layers)):  # engines have the dense layers, too
                experts = experts[:, list(layers)]
            if experts.shape[1:] != (len(layers), top_k):
                raise DataError(
                    f"a text's expert_ids have {experts.shape[1]} layers of {experts.shape[2]} experts; the model "
                    f"sends each token to {top_k} experts in {len(layers)} MoE layers."
                )
            if text not in self._checked:  # not when added: engines fill the dense layers with zeros
                check_distinct(experts, "expert_ids of Routes")
                self._checked.add(text)
            expert_ids[:, row, places[: len(experts)]] = experts.transpose(1, 0, 2)
            found += 1
        self.found, self.missing = self.found + found, self.missing + len(texts) - found
        return torch.from_numpy(expert_ids) if found else None


@contextmanager
def record_routing(model: nn.Module) -> Iterator["Recorded"]:
    """Inside, the experts of every token that the model runs are kept, as an engine returns them.

        with record_routing(model) as recorded:
            model.generate(**inputs)
        routes.add(tokens, recorded.expert_ids()[:, 0].transpose(0, 1))    # of row 0

    Yields:
        What is kept: `expert_ids()` has it, once the model has run.
    """
    layers = moe_layers(model)
    recorded = Recorded(layers, skips_tokens(model))
    with ExitStack() as stack:
        stack.callback(decoder_of(model).register_forward_pre_hook(recorded.begin, with_kwargs=True).remove)
        for number, layer in enumerate(layers):
            experts = model.get_submodule(layer.experts)
            stack.callback(experts.register_forward_pre_hook(recorded.hook(number), with_kwargs=True).remove)
        yield recorded


class Recorded:
    """What `record_routing` has seen."""

    def __init__(self, layers: Sequence[MoELayer], skips_tokens: bool) -> None:
        self._layers, self._skips_tokens = layers, skips_tokens
        self._seen: list[list[Tensor]] = [[] for _ in layers]
        self._shapes: list[tuple[int, int]] = []

    def begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = tokens_of(args, kwargs)
        self._shapes.append((tokens.shape[0], tokens.shape[1]))

    def hook(self, number: int) -> Any:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            index_TK, weight_TK = (*args, *kwargs.values())[1:3]
            if self._skips_tokens:
                is_none = is_no_expert(index_TK, weight_TK.reshape(index_TK.shape))
                index_TK = index_TK.masked_fill(is_none, self._layers[number].num_experts)
            self._seen[number].append(index_TK.detach().reshape(*self._shapes[-1], -1).clone())

        return keep

    def expert_ids(self) -> Tensor:
        """int64 [L, B, S, K] on the CPU: of all forwards one after another, as generation with a cache runs them.

        DataError: none was run, of other numbers of rows, or by a family that runs a layer several times.
        """
        runs = len(self._shapes)
        if not runs or len({rows for rows, _ in self._shapes}) > 1 or any(len(seen) != runs for seen in self._seen):
            rows, times = [rows for rows, _ in self._shapes], sorted({len(seen) for seen in self._seen})
            raise DataError(
                f"forwards of {rows} rows were recorded, in which each layer ran {times} times: record forwards of the "
                "same rows, by a model that runs each layer once."
            )
        return torch.stack([torch.cat(seen, dim=1).to("cpu", torch.int64) for seen in self._seen])


def tokens_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """input_ids [B, S], or the embeddings [B, S, D] in their place."""
    for value in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")):
        if isinstance(value, Tensor):
            return value
    raise DataError("the model was run without input_ids.")


def decoder_of(model: nn.Module) -> nn.Module:
    """What each forward runs, however the model is wrapped: PEFT and trainers call an inner forward itself."""
    whole: Any = model
    inner = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    return getattr(inner, inner.base_model_prefix, inner)


def _texts(is_token: np.ndarray[Any, Any], positions: np.ndarray[Any, Any] | None) -> list[np.ndarray[Any, Any]]:
    """The places of each text in a row: one, but where positions begin again."""
    places = np.flatnonzero(is_token)
    if positions is None:
        return [places]
    return np.split(places, np.flatnonzero(np.diff(positions[places]) <= 0) + 1)


def check_distinct(expert_ids: np.ndarray[Any, Any], name: str) -> None:
    """[…, K]. DataError: an expert twice for one token."""
    in_order = np.sort(expert_ids, axis=-1)
    if ((in_order[..., 1:] == in_order[..., :-1]) & (in_order[..., 1:] >= 0)).any():
        raise DataError(f"{name} name an expert twice for one token: a router chooses each once.")


def all_or_none(expert_ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[…, K]: where one is not known, none is: a router that chose the others might choose a known one again."""
    return np.where((expert_ids < 0).any(axis=-1, keepdims=True), expert_ids.dtype.type(UNKNOWN), expert_ids)
