"""Whether an adapter in memory still has the values that its file holds."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

Digests = dict[str, dict[torch.dtype, str]]
"""Tensor's key -> dtype -> hex SHA-256 of its values in that dtype."""

_HALVES = (torch.bfloat16, torch.float16)


def digests(tensors: Mapping[str, Tensor]) -> Digests:
    """Of loaded tensors, in each dtype that a model may hold them in: a cast is no change.

    Values, and not torch's version counters, which a write through `.data` leaves as they are.
    """
    return {
        _plain(key): {dtype: _digest(tensor.to(dtype)) for dtype in _dtypes(tensor)} for key, tensor in tensors.items()
    }


def is_as_loaded(tensors: Mapping[str, Tensor], loaded: Digests) -> bool:
    """Whether all of an adapter's tensors have the values that `digests` was given. False where they have none."""
    return all(
        tensor.device.type != "meta"
        and loaded.get(_plain(key), {}).get(dtype := _held(tensor)) == _digest(tensor.to(dtype))
        for key, tensor in tensors.items()
    )


def _plain(key: str) -> str:
    """As a tuner names it, which PeftModel wraps."""
    return key.removeprefix("base_model.")


def _dtypes(tensor: Tensor) -> tuple[torch.dtype, ...]:
    return (torch.float32, *_HALVES) if tensor.is_floating_point() else (tensor.dtype,)


def _held(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.is_floating_point() and tensor.dtype not in _HALVES else tensor.dtype


def _digest(tensor: Tensor) -> str:
    found = hashlib.sha256(f"{list(tensor.shape)}:".encode())
    found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
