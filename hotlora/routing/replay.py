"""Routes are recorded, and replayed: a trainer uses the experts that an inference engine has used for the same tokens.

An engine's kernels round otherwise than the trainer's, so that near-ties of the router's scores fall the other way, and
in reinforcement learning other experts are trained than those that wrote the text. With the engine's routes replayed,
each token goes through the engine's experts, weighted by the live router, which learns as before (rollout routing
replay: arXiv 2510.11370).

Shape suffixes: L MoE layers, B rows, S positions, K router's top-k, T tokens (B x S), E experts, N tokens of a text.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from ..base.errors import DataError, ModelError
from ..hf import models

_log = logging.getLogger(__name__)
_UNKNOWN = -1
"""In the place of an expert: no route is known, the router chooses."""
_MOST = np.iinfo(np.int16).max
"""The highest id of an expert that is kept."""


class Routes:
    """The experts of many texts, each found by its tokens, in whatever batch a trainer puts it."""

    def __init__(self) -> None:
        self._routes: dict[bytes, np.ndarray[Any, Any]] = {}
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
            experts = np.where(experts == np.iinfo(experts.dtype).max, _UNKNOWN, experts.astype(np.int64))
        if experts.size and not (_UNKNOWN <= experts.min() and experts.max() <= _MOST):
            raise DataError(f"expert_ids are {experts.min()} to {experts.max()}: they must be -1 to {_MOST}.")
        self._routes[tokens.astype(np.int64).tobytes()] = experts.astype(np.int16)

    def clear(self) -> None:
        """Forgets all texts, as before the next rollouts."""
        self._routes.clear()

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
        expert_ids = np.full((len(layers), *ids.shape, top_k), _UNKNOWN, dtype=np.int64)
        found = 0
        texts = [
            (row, places) for row, is_token in enumerate(mask)
            for places in _texts(is_token, None if positions is None else positions[row])
        ]  # fmt: skip
        for row, places in texts:
            if (experts := self._routes.get(ids[row, places].tobytes())) is None:
                continue
            if experts.shape[1] > max(len(layers), max(layers)):  # engines have the dense layers, too
                experts = experts[:, list(layers)]
            if experts.shape[1:] != (len(layers), top_k):
                raise DataError(
                    f"a text's expert_ids have {experts.shape[1]} layers of {experts.shape[2]} experts; the model "
                    f"sends each token to {top_k} experts in {len(layers)} MoE layers."
                )
            expert_ids[:, row, places[: len(experts)]] = experts.transpose(1, 0, 2)
            found += 1
        self.found, self.missing = self.found + found, self.missing + len(texts) - found
        return torch.from_numpy(expert_ids) if found else None


@contextmanager
def replay_routing(model: nn.Module, expert_ids: Tensor | Routes) -> Iterator[None]:
    """Inside, tokens go to the experts given, forward and backward; how much each counts, the live router says.

    The scores of the given experts come from the router as it is, by the family's own formula, and carry its
    gradients; only the choice of the largest is replaced. A model that is adapted by PEFT may be given, and gradient
    checkpointing used, where the backward of each forward comes before the next one that has gradients.

        with replay_routing(model, routes):
            trainer.train()

    Args:
        expert_ids: `Routes`, whose texts are found by each row's tokens (generation with a cache is left alone, as its
            routes are to be found out); or integers [L, B, S, K] for each forward of that many rows and positions.
            Distinct experts in each K, in any order. -1: the router chooses.

    Raises:
        DataError: ids of another shape, out of range, or twice for one token.
        ModelError: a family whose router does not choose by top-k (phimoe), found in the first forward; under gradient
            checkpointing two forwards of other experts before their backward.
    """
    layers = models.moe_layers(model)
    replay = _Replay(layers, models.num_experts_per_tok(model), models.expert_groups(model), models.skips_tokens(model))
    fixed = None if isinstance(expert_ids, Routes) else replay.checked(expert_ids, "expert_ids")

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(expert_ids, Routes):
            replay.given = _routes_of(expert_ids, [layer.layer for layer in layers], replay.top_k, args, kwargs)
            if replay.given is not None:
                replay.given = replay.checked(replay.given, "expert_ids of Routes")
        else:
            replay.given = fixed
            shape = list(_tokens(args, kwargs).shape[:2])
            if fixed is not None and list(fixed.shape[1:3]) != shape:
                raise DataError(
                    f"expert_ids are of {list(fixed.shape[1:3])} rows and positions, and the forward has {shape}."
                )
        replay.keep()

    with ExitStack() as stack:
        stack.callback(replay.end)
        if isinstance(expert_ids, Routes):
            stack.callback(_tell_none, expert_ids, expert_ids.found, expert_ids.missing)
        stack.callback(_decoder(model).register_forward_pre_hook(begin, with_kwargs=True).remove)
        for number, layer in enumerate(layers):
            scope, experts = _scope(model, layer), model.get_submodule(layer.experts)
            stack.callback(scope.register_forward_pre_hook(replay.enter(number)).remove)
            stack.callback(scope.register_forward_hook(replay.leave(number), always_call=True).remove)
            stack.callback(experts.register_forward_pre_hook(replay.check(number), with_kwargs=True).remove)
        yield


@contextmanager
def record_routing(model: nn.Module) -> Iterator["Recorded"]:
    """Inside, the experts of every token that the model runs are kept, as an engine returns them.

    with record_routing(model) as recorded:
        model.generate(**inputs)
    routes.add(tokens, recorded.expert_ids()[:, 0].transpose(0, 1))    # of row 0
    """
    layers = models.moe_layers(model)
    recorded = Recorded(layers, models.skips_tokens(model))
    with ExitStack() as stack:
        stack.callback(_decoder(model).register_forward_pre_hook(recorded.begin, with_kwargs=True).remove)
        for number, layer in enumerate(layers):
            experts = model.get_submodule(layer.experts)
            stack.callback(experts.register_forward_pre_hook(recorded.hook(number), with_kwargs=True).remove)
        yield recorded


class Recorded:
    """What `record_routing` has seen."""

    def __init__(self, layers: Sequence[models.MoELayer], skips_tokens: bool) -> None:
        self._layers, self._skips_tokens = layers, skips_tokens
        self._seen: list[list[Tensor]] = [[] for _ in layers]
        self._shapes: list[tuple[int, int]] = []

    def begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = _tokens(args, kwargs)
        self._shapes.append((tokens.shape[0], tokens.shape[1]))

    def hook(self, number: int) -> Any:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            index_TK, weight_TK = (*args, *kwargs.values())[1:3]
            if self._skips_tokens:  # no expert is handed on as the first, with weight 0
                is_none = (index_TK == 0) & (weight_TK.reshape(index_TK.shape) == 0)
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


class _Replay:
    """What the hooks of `replay_routing` share.

    `given` is the current forward's, [L, B, S, K] on the CPU. Gradient checkpointing runs the layers again in the
    backward, in a thread of its own on a GPU, so that the mode must be entered by each layer; they then get `kept`, of
    the last forward with gradients. Nothing tells a layer which forward is run again, so it can be but that one.
    """

    def __init__(
        self, layers: Sequence[models.MoELayer], top_k: int, num_groups: int | None, skips_tokens: bool
    ) -> None:
        self.layers, self.top_k, self.num_groups, self.skips_tokens = layers, top_k, num_groups, skips_tokens
        self.given: Tensor | None = None
        self.modes: list[list[_Choice]] = [[] for _ in layers]
        self.is_checked = [False] * len(layers)
        self.kept: Tensor | None = None
        self.is_fresh, self.are_several = True, False
        """no forward with gradients yet; several of other experts since the last backward"""
        self.reruns = [0] * len(layers)

    def keep(self) -> None:
        """At the begin of a forward."""
        if not torch.is_grad_enabled():
            return
        is_first = any(self.reruns) or self.is_fresh
        self.are_several = not is_first and (self.are_several or self.given is not self.kept)
        self.is_fresh = False
        self.kept, self.reruns = self.given, [0] * len(self.layers)

    def end(self) -> None:
        """An interrupt (KeyboardInterrupt) runs no hook: no mode must stay."""
        for modes in self.modes:
            while modes:
                modes.pop().__exit__(None, None, None)

    def checked(self, expert_ids: Tensor, name: str) -> Tensor:
        if not isinstance(expert_ids, Tensor):
            raise DataError(f"{name} are {type(expert_ids).__name__}: they must be a tensor of integers, or Routes.")
        wanted = f"[{len(self.layers)} layers, rows, positions, {self.top_k} experts]"
        if (
            not expert_ids.numel()
            or expert_ids.ndim != 4
            or expert_ids.shape[0] != len(self.layers)
            or expert_ids.shape[3] != self.top_k
        ):
            raise DataError(f"{name} are {list(expert_ids.shape)}: they must be {wanted}.")
        if expert_ids.is_floating_point() or expert_ids.dtype == torch.bool:
            raise DataError(f"{name} are {expert_ids.dtype}: they must be integers.")
        ids = expert_ids.to(torch.int64)
        for layer, of_layer in zip(self.layers, ids, strict=True):
            least, most = int(of_layer.min()), int(of_layer.max())
            highest = layer.num_experts - 1 + self.skips_tokens
            if least < _UNKNOWN or most > highest:
                raise DataError(
                    f"{name} of layer {layer.layer} are {least} to {most}: the model has experts 0 to {highest} (-1: "
                    "not known)."
                )
        in_order = ids.sort(dim=-1).values
        if ((in_order[..., 1:] == in_order[..., :-1]) & (in_order[..., 1:] >= 0)).any():
            raise DataError(f"{name} name an expert twice for one token: a router chooses each once.")
        # All K of a token are known or none: a part of them would leave the router to choose one of them again.
        return torch.where((ids < 0).any(dim=-1, keepdim=True), _UNKNOWN, ids)

    def kept_of(self, number: int) -> Tensor | None:
        """For a layer that is run again."""
        self.reruns[number] += 1
        if self.are_several and self.reruns[number] > 1:
            raise ModelError(
                "gradient checkpointing runs two forwards before their backward again, and their experts differ: call "
                "backward after each, or leave gradient checkpointing out."
            )
        return self.kept

    def enter(self, number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            given = self.kept_of(number) if _is_backward() else self.given
            if given is not None:
                mode = _Choice(given[number].flatten(0, 1), self.layers[number].num_experts, self.num_groups)
                mode.__enter__()
                self.modes[number].append(mode)

        return hook

    def leave(self, number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self.modes[number]:
                self.modes[number].pop().__exit__(None, None, None)

        return hook

    def check(self, number: int) -> Any:
        """Once a layer, as it waits for the device."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.modes[number] or self.is_checked[number]:
                return
            choices = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, _Choice)]
            if choices and choices[-1] is not self.modes[number][-1]:
                return  # another replay, inside this one, chooses
            index_TK = (*args, *kwargs.values())[1].detach().cpu()
            wanted_TK = self.modes[number][-1].given_TK.view(index_TK.shape)
            if self.skips_tokens:  # no expert is handed on as the first
                wanted_TK = wanted_TK.masked_fill(wanted_TK == self.layers[number].num_experts, 0)
            if not ((index_TK == wanted_TK) | (wanted_TK < 0)).all():
                layer = self.layers[number]
                raise ModelError(
                    f"the experts of layer {layer.layer} are not those that were given: {layer.router} does not choose "
                    "by torch.topk, so that this family's routing cannot be replayed."
                )
            self.is_checked[number] = bool((wanted_TK >= 0).any())

        return hook


class _Choice(TorchFunctionMode):
    """While one MoE layer runs, `topk` over its experts chooses those given."""

    def __init__(self, given_TK: Tensor, num_experts: int, num_groups: int | None) -> None:
        super().__init__()
        self.given_TK, self.num_experts, self.num_groups = given_TK, num_experts, num_groups

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func not in (torch.topk, Tensor.topk):
            return func(*args, **(kwargs or {}))
        kwargs = kwargs or {}
        return self._chosen(func, args[0] if args else kwargs["input"], args, kwargs)

    def _chosen(self, func: Any, scores: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        num_tokens, top_k = self.given_TK.shape
        width = scores.shape[-1]
        if self.num_groups is not None and scores.shape == (num_tokens, self.num_groups):
            # The groups of the given experts are open, whatever their scores: these serve to choose and no more.
            given_TK = self.given_TK.to(scores.device)
            group_TK = given_TK.clamp(min=0) // (self.num_experts // width)
            infinite = torch.full_like(group_TK, torch.inf, dtype=scores.dtype).masked_fill(given_TK < 0, -torch.inf)
            raised = scores.detach().scatter_reduce(-1, group_TK, infinite, "amax")
            return func(raised, *args[1:], **{name: value for name, value in kwargs.items() if name != "input"})
        values, index = func(*args, **kwargs)
        # Some routers have a column more, for no expert (zaya).
        if width not in (self.num_experts, self.num_experts + 1) or index.shape[-1] != top_k:
            return values, index
        if index.numel() != num_tokens * top_k:
            return values, index
        given = self.given_TK.to(index.device).view(index.shape)
        index = torch.where(given < 0, index, given)
        return torch.return_types.topk((scores.gather(-1, index), index))


def _routes_of(
    routes: Routes, layers: Sequence[int], top_k: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    tokens = _tokens(args, kwargs)
    if kwargs.get("past_key_values") is not None or kwargs.get("use_cache") or not len(routes):
        return None  # generation
    if tokens.is_floating_point():
        raise DataError("the model was given embeddings: routes are found by token ids.")
    positions = kwargs.get("position_ids")
    if positions is not None and (positions.ndim != 2 or positions.shape[1] != tokens.shape[1]):
        positions = None  # of images, as several axes
    positions = None if positions is None else positions.expand(tokens.shape)
    return routes.of(tokens, kwargs.get("attention_mask"), layers, top_k, positions)


def _texts(is_token: np.ndarray[Any, Any], positions: np.ndarray[Any, Any] | None) -> list[np.ndarray[Any, Any]]:
    """The places of each text in a row: one, but where positions begin again."""
    places = np.flatnonzero(is_token)
    if positions is None:
        return [places]
    return np.split(places, np.flatnonzero(np.diff(positions[places]) <= 0) + 1)


def _tell_none(routes: Routes, found: int, missing: int) -> None:
    """At the end of a replay."""
    if routes.found == found and routes.missing > missing:
        _log.warning(
            "none of %s texts has routes, so the router chose all experts: add each text with the tokens that the "
            "model is given, prompt and completion.", f"{routes.missing - missing:,}",
        )  # fmt: skip


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """input_ids [B, S], or the embeddings [B, S, D] in their place."""
    for value in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")):
        if isinstance(value, Tensor):
            return value
    raise DataError("the model was run without input_ids.")


def _decoder(model: nn.Module) -> nn.Module:
    """What each forward runs, however the model is wrapped: PEFT and trainers call an inner forward itself."""
    whole: Any = model
    inner = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    return getattr(inner, inner.base_model_prefix, inner)


def _is_backward() -> bool:
    task: int = torch._C._current_graph_task_id()
    return task != -1


def _scope(model: nn.Module, layer: models.MoELayer) -> nn.Module:
    """The innermost module that holds the router and the experts, or the router, where that is a whole decoder layer
    (gemma4): its hooks do not run when gradient checkpointing runs the layer again."""
    parts = [path.replace(".", "/") for path in (layer.experts, layer.router)]
    scope = model.get_submodule(os.path.commonpath(parts).replace("/", "."))
    return model.get_submodule(layer.router) if hasattr(scope, "gradient_checkpointing") else scope
