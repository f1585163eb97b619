"""Which dtypes this CPU or GPU multiplies matrices in at speed.

Most desktops have no instructions for bfloat16 (AVX2 alone), and few CPUs have any for float16. There torch's products
in them take up to a hundred times float32's time, and torch does not say so. Nor does it say it of GPUs below compute
capability 8.0 (T4, V100, RTX 20), which have units for float16 and emulate bfloat16; `is_bf16_supported()` is True.
"""

import logging
from functools import cache

import torch

_log = logging.getLogger(__name__)
_HALF = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def is_fast_on_cpu(dtype: torch.dtype) -> bool:
    """Whether torch has fast matrix products in `dtype` on this CPU, by what oneDNN says of its instructions."""
    if dtype not in _HALF:
        return True
    try:
        return bool(getattr(torch.ops.mkldnn, _HALF[dtype])())
    except (AttributeError, RuntimeError):  # torch was built without oneDNN
        return False


def cpu_dtype(dtype: torch.dtype) -> torch.dtype:
    """`dtype` itself, or float32 where this CPU has no instructions for it."""
    return dtype if is_fast_on_cpu(dtype) else torch.float32


def in_float32(dtype: torch.dtype) -> str:
    """What to say where a model of `dtype` is computed in float32; empty where nothing is lost."""
    if is_fast_on_cpu(dtype):
        return ""
    return f"this CPU has no instructions for {_name(dtype)}, the model's dtype: float32 is used, with twice the memory"


def slowness(dtype: torch.dtype) -> str:
    """What to say where `dtype` is computed in on this CPU all the same; empty where it is fast."""
    if is_fast_on_cpu(dtype):
        return ""
    return (
        f"this CPU has no instructions for {_name(dtype)}: matrix products take up to a hundred times float32's time. "
        "Leave out --dtype, or load the model in float32."
    )


@cache
def say_once(message: str) -> None:
    """A warning that a process gives once."""
    if message:
        _log.warning(message)


def say_if_slow(device: torch.device, dtype: torch.dtype) -> None:
    """Says once what a model in `dtype` costs on this CPU or GPU."""
    if device.type == "cpu":
        say_once(slowness(dtype))
    elif device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        say_once(
            "this GPU has no instructions for bfloat16, the model's dtype, and emulates it: --dtype float16 is several "
            "times faster, and is trained with loss scaling."
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
