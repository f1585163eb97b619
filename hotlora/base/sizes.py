"""Sizes of memory in words: "24GB", "22.5 GiB"."""

import re

from .errors import HotLoraError

_UNITS = {"MB": 1e6, "GB": 1e9, "TB": 1e12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(name: str, text: str) -> int:
    """Bytes: GB is 10^9, GiB is 2^30.

    HotLoraError: no number above 0 with one of the units. name: the option that it was given as.
    """
    match = _SIZE.fullmatch(text)
    factor = {unit.lower(): size for unit, size in _UNITS.items()}.get(match[2].lower()) if match else None
    if not match or factor is None or not float(match[1]):
        units = ", ".join(_UNITS)
        raise HotLoraError(f"{name} is {text!r}: give a number with its unit, as 24GB or 22.5GiB (units: {units}).")
    return int(float(match[1]) * factor)


def size_words(num_bytes: float) -> str:
    """10^9 to a GB."""
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:,.1f} GB"
    return f"{num_bytes / 1e6:.0f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e6:.2f} MB"
