"""Gradient checkpointing that keeps each layer's choice of experts.

A layer under checkpointing runs twice, and two runs need not round alike: other kernels, other layouts, reductions in
another order. A token near the border between two experts could then go to another expert in the second run, and
gradients would belong to a routing that made no output. So the experts' ids, 4 bytes an assignment, are kept from the
first run; everything else is computed again.

    model.gradient_checkpointing_enable(hotlora.training.gradient_checkpointing.checkpoint_kwargs())
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_TOP_K = (torch.topk, Tensor.topk)
# phimoe takes its experts by the largest score, one after the other.
_MAX = (torch.max, Tensor.max)
# No router chooses more experts for a token. Indexers of sparse attention choose more positions: they choose again.
_TOP_K_AT_MOST = 64


def checkpoint_kwargs() -> dict[str, Any]:
    """Arguments of `torch.utils.checkpoint.checkpoint`, and so `gradient_checkpointing_kwargs` of transformers'.

    A trainer that writes its arguments as JSON (to TensorBoard, say) cannot write these: give them to the model then,
    by a callback's `on_train_begin`, as `train` does: `model.gradient_checkpointing_enable(checkpoint_kwargs())`.
    """
    return {"use_reentrant": False, "context_fn": _first_and_second_run}


def _first_and_second_run() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    kept: list[Tensor] = []
    return _KeptChoice(kept, is_first=True), _KeptChoice(kept, is_first=False)


class _KeptChoice(TorchFunctionMode):
    """Takes the ids from `kept` in the second run. The scores are picked by id in both, so that autograd keeps the
    same tensors in both, which checkpointing wants."""

    def __init__(self, kept: list[Tensor], is_first: bool) -> None:
        super().__init__()
        self.kept, self.is_first, self.used = kept, is_first, 0

    def __enter__(self) -> "_KeptChoice":
        self.used = 0  # a graph that is kept is run through again
        super().__enter__()
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        scores = _argument("input", 0, args, kwargs)
        if func in _TOP_K and _argument("k", 1, args, kwargs) <= _TOP_K_AT_MOST:
            return torch.return_types.topk(
                self._chosen(scores, func, args, kwargs, _argument("dim", 2, args, kwargs, -1))
            )
        if func in _MAX and scores.ndim == 2 and isinstance(dim := _argument("dim", 1, args, kwargs), int):
            return torch.return_types.max(self._chosen(scores, func, args, kwargs, dim))
        return func(*args, **kwargs)

    def _chosen(self, scores: Tensor, func: Any, args: Any, kwargs: Any, dim: int) -> tuple[Tensor, Tensor]:
        if self.is_first:
            with torch.no_grad():
                _, index = func(*args, **kwargs)
            self.kept.append(index.to(torch.int32))
        else:
            index = self.kept[self.used].to(torch.int64)
            self.used += 1
        if index.ndim < scores.ndim:  # max without keepdim
            return scores.gather(dim, index.unsqueeze(dim)).squeeze(dim), index
        return scores.gather(dim, index), index


def _argument(name: str, position: int, args: Any, kwargs: Any, default: Any = None) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)
