"""Memory that is used no more, given back: what Python, torch and glibc's malloc keep of it."""

import ctypes
import functools
import gc
import os
import sys

_M_MMAP_THRESHOLD = -3
_SET = ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def give_back() -> None:
    """What was freed goes back to the system: glibc keeps as much as the experts' size of what loading a model took."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def free() -> None:
    """Models that nobody uses, whose cycles Python clears late, and what torch keeps of a GPU's memory."""
    gc.collect()
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@functools.cache
def apart_from(num_bytes: int) -> None:
    """Arrays of so many bytes and more get pages of their own from here on, which go when the array goes.

    By itself glibc raises that size to 32 MB as such arrays are freed, and puts the next ones on its heap, where small
    things that stay keep the holes between them from being used again: a quarter of a step's memory at OLMoE's size.
    Left alone where the environment says otherwise.
    """
    if (libc := _glibc()) is not None and not any(name in os.environ for name in _SET):
        libc.mallopt(_M_MMAP_THRESHOLD, num_bytes)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt") else None
