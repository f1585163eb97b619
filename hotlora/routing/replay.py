"""Routes are replayed: a trainer uses the experts that an inference engine has used for the same tokens.

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

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from ..base.errors import DataError, ModelError
from ..hf.moe_layers import MoELayer, expert_groups, moe_layers, num_experts_per_tok, skips_tokens
from .routes import UNKNOWN, Routes, all_or_none, check_distinct, decoder_of, tokens_of

_log = logging.getLogger(__name__)


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
    layers = moe_layers(model)
    replay = _Replay(layers, num_experts_per_tok(model), expert_groups(model), skips_tokens(model))
    fixed = None if isinstance(expert_ids, Routes) else replay.checked(expert_ids, "expert_ids")

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal fixed
        tokens = tokens_of(args, kwargs)
        if isinstance(expert_ids, Routes):
            given = _routes_of(expert_ids, [layer.layer for layer in layers], replay.top_k, args, kwargs)
            if given is not None:
                replay.check_range(given, "expert_ids of Routes")
                given = given.to(tokens.device, non_blocking=True)
        else:
            assert fixed is not None
            if fixed.shape[1:3] != tokens.shape[:2]:
                raise DataError(
                    f"expert_ids are of {list(fixed.shape[1:3])} rows and positions, and the forward has "
                    f"{list(tokens.shape[:2])}."
                )
            given = fixed = fixed.to(tokens.device)
        replay.given = given
        replay.keep()

    with ExitStack() as stack:
        stack.callback(replay.end)
        if isinstance(expert_ids, Routes):
            stack.callback(_tell_none, expert_ids, expert_ids.found, expert_ids.missing)
        stack.callback(decoder_of(model).register_forward_pre_hook(begin, with_kwargs=True).remove)
        for number, layer in enumerate(layers):
            scope, experts = _scope(model, layer), model.get_submodule(layer.experts)
            stack.callback(scope.register_forward_pre_hook(replay.enter(number)).remove)
            stack.callback(scope.register_forward_hook(replay.leave(number), always_call=True).remove)
            stack.callback(experts.register_forward_pre_hook(replay.check(number), with_kwargs=True).remove)
        yield


class _Replay:
    """What the hooks of `replay_routing` share.

    `given` is the current forward's, [L, B, S, K] where the tokens are. Gradient checkpointing runs the layers again in
    the backward, in a thread of its own on a GPU, so that the mode must be entered by each layer; they then get `kept`,
    of the last forward with gradients. Nothing tells a layer which forward is run again, so it can be but that one.
    """

    def __init__(self, layers: Sequence[MoELayer], top_k: int, num_groups: int | None, skips_tokens: bool) -> None:
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
        ids = expert_ids.to("cpu", torch.int64)
        self.check_range(ids, name)
        check_distinct(ids.numpy(), name)
        return torch.from_numpy(all_or_none(ids.numpy()))

    def check_range(self, ids: Tensor, name: str) -> None:
        least, most = ids.flatten(1).amin(dim=1).tolist(), ids.flatten(1).amax(dim=1).tolist()
        for layer, low, high in zip(self.layers, least, most, strict=True):
            highest = layer.num_experts - 1 + self.skips_tokens
            if low < UNKNOWN or high > highest:
                raise DataError(
                    f"{name} of layer {layer.layer} are {low} to {high}: the model has experts 0 to {highest} (-1: not "
                    "known)."
                )

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
            wanted_TK = self.modes[number][-1].given_TK.cpu().view(index_TK.shape)
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
    tokens = tokens_of(args, kwargs)
    if kwargs.get("past_key_values") is not None or kwargs.get("use_cache") or not len(routes):
        return None  # generation
    if tokens.is_floating_point():
        raise DataError("the model was given embeddings: routes are found by token ids.")
    positions = kwargs.get("position_ids")
    if positions is not None and (positions.ndim != 2 or positions.shape[1] != tokens.shape[1]):
        positions = None  # of images, as several axes
    positions = None if positions is None else positions.expand(tokens.shape)
    return routes.of(tokens, kwargs.get("attention_mask"), layers, top_k, positions)


def _tell_none(routes: Routes, found: int, missing: int) -> None:
    """At the end of a replay."""
    if routes.found == found and routes.missing > missing:
        _log.warning(
            "none of %s texts has routes, so the router chose all experts: add each text with the tokens that the "
            "model is given, prompt and completion.", f"{routes.missing - missing:,}",
        )  # fmt: skip


def _is_backward() -> bool:
    task: int = torch._C._current_graph_task_id()
    return task != -1


def _scope(model: nn.Module, layer: MoELayer) -> nn.Module:
    """The innermost module that holds the router and the experts, or the router, where that is a whole decoder layer
    (gemma4): its hooks do not run when gradient checkpointing runs the layer again."""
    parts = [path.replace(".", "/") for path in (layer.experts, layer.router)]
    scope = model.get_submodule(os.path.commonpath(parts).replace("/", "."))
    return model.get_submodule(layer.router) if hasattr(scope, "gradient_checkpointing") else scope
