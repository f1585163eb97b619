"""What a file says of a model's routing, and what is known of the model beforehand.

Shape suffixes: L MoE layers, E experts, K router's top-k, T tokens.
"""

import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ...base.errors import DataError, FileError, HotLoraError
from ...base.files import JSON_ERRORS

MOST_EXPERTS = 65536  # more than any layer has: a number from a file makes a table of that size
_BROKEN = (
    *JSON_ERRORS, TypeError, KeyError, EOFError, OverflowError, MemoryError, RuntimeError, NotImplementedError,
    SafetensorError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@dataclass(frozen=True)
class Known:
    """What is known of the model: from its config, or from options; None where it is not."""

    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    layers: tuple[int, ...] | None = None
    """decoder indices of the MoE layers"""
    num_hidden_layers: int | None = None
    """decoder layers, dense ones too"""
    fingerprint: str | None = None
    name: str | None = None
    skips_tokens: bool = False
    """whether the router sends some tokens to no expert"""
    norm_topk_prob: bool | None = None
    """whether a softmax router renormalizes the chosen weights; None: not known"""
    router: str = ""
    """why the experts are not the K highest logits; empty where they are, as far as is known"""

    def need(self, name: str, file: Path, why: str) -> int:
        """num_experts or num_experts_per_tok. DataError, with the options that give it, where it is not known."""
        value: int | None = getattr(self, name)
        if value is None:
            raise DataError(
                f"{file} does not say {why}: give the model (--model CONFIG), or --{name.replace('_', '-')}"
            )
        return value


@dataclass(frozen=True)
class Found:
    """A file's routing, of whatever form."""

    form: str
    """in words"""
    layers: tuple[int, ...]
    counts: Tensor | None
    """int64 [L, E]; None: scores alone"""
    num_tokens: int = 0
    num_experts_per_tok: int = 0
    mass: Tensor | None = None
    """float64 [L, E]"""
    saliency: Tensor | None = None
    """float64 [L, E]: sum over the expert's tokens of gate weight x output norm"""
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    """float64 [L, E] each: what else the file says of each expert"""
    skipped: int = 0
    """tokens left out: padding, or without experts"""
    ignored: tuple[str, ...] = ()
    model: str | None = None
    data: str | None = None


@contextmanager
def whole(file: Path) -> Iterator[None]:
    """Tells what a broken file trips over as one FileError with its name."""
    try:
        yield
    except HotLoraError:
        raise
    except OSError as error:
        raise FileError(f"{file} cannot be read ({error.strerror or error}): check the path") from error
    except _BROKEN as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise FileError(f"{file} is not a whole file of routing ({text}): write it again, or restore a copy") from error


def together(found: Sequence[tuple[Path, Found]]) -> Found:
    """The sum of several files of one form and model. DataError, naming two files, where they are not."""
    first_file, total = found[0]
    for file, other in found[1:]:
        for name in ("form", "layers", "num_experts_per_tok"):
            ours, theirs = getattr(total, name), getattr(other, name)
            if ours != theirs:
                raise DataError(
                    f"{first_file} has {name} {ours}, {file} has {theirs}: import files of one form and model together"
                )
        shapes = [None if part.counts is None else list(part.counts.shape) for part in (total, other)]
        if shapes[0] != shapes[1]:
            raise DataError(f"{first_file} has counts {shapes[0]}, {file} has {shapes[1]}: they do not add up")
        if total.counts is None or other.counts is None:
            raise DataError(f"{first_file} and {file} hold scores, which do not add up: import one file")
        dropped = [f"{name} of several files (scores do not add up)" for name in sorted({*total.scores, *other.scores})]
        sums: dict[str, Any] = {}
        for name in ("mass", "saliency"):
            one, more = getattr(total, name), getattr(other, name)
            sums[name] = None if one is None or more is None else one + more
            if (one is None) != (more is None):
                dropped.append(f"{name}, which not all files have")
        total = replace(
            total, counts=total.counts + other.counts, scores={},
            num_tokens=total.num_tokens + other.num_tokens, skipped=total.skipped + other.skipped, **sums,
            ignored=tuple(dict.fromkeys((*total.ignored, *other.ignored, *dropped))),
            data=total.data if total.data == other.data else ", ".join(filter(None, (total.data, other.data))),
        )  # fmt: skip
    return total


def tokens_of(sums: Sequence[int], layers: Sequence[int], top_k: int, file: Path, skips: bool = False) -> int:
    """Tokens of which each layer has K assignments. DataError, with the numbers, where the layers do not agree.

    sums: each layer's assignments. skips: a layer may have fewer.
    """
    most = max(sums)
    if not skips and min(sums) != most:
        layer, least = next((layer, total) for layer, total in zip(layers, sums, strict=True) if total != most)
        other = layers[list(sums).index(most)]
        raise DataError(
            f"{file}: layer {layer} has {least:,} assignments, layer {other} has {most:,}: each must have tokens x "
            f"{top_k}, the router's K"
        )
    if most % top_k:
        raise DataError(f"{file}: a layer has {most:,} assignments, which are no whole number of tokens x {top_k}")
    return most // top_k


def check_layers(layers: Sequence[int], file: Path, known: Known) -> None:
    """DataError where these are not the model's MoE layers."""
    if known.layers is None or tuple(layers) == known.layers:
        return
    raise DataError(
        f"{file} has layers {spans(layers)}, and the MoE layers of {known.name} are {spans(known.layers)}: they must "
        "be the same"
    )


def spans(numbers: Sequence[int]) -> str:
    """0 to 3, 5: ascending numbers, briefly."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first} to {last}" for first, last in runs)


def check_counts(
    counts: Tensor, layers: Sequence[int], file: Path, mass: Tensor | None = None, saliency: Tensor | None = None
) -> None:
    """DataError, with layer, expert and number, where counts are negative, or mass or saliency are not finite,
    negative, or there without a count."""
    tables: list[tuple[str, Tensor, Any, str]] = [("counts", counts, counts < 0, "0 or more")]
    tables.append(("counts", counts, counts >= 2**53, "less than 2^53"))
    for name, sums in (("mass", mass), ("saliency", saliency)):
        if sums is not None:
            tables.append((name, sums, ~(sums.isfinite() & (sums >= 0)), "finite, and 0 or more"))
            tables.append((name, sums, (sums > 0) & (counts == 0), "0 where the count is 0"))
    for name, table, wrong, allowed in tables:
        if wrong.any():
            row, expert = (int(index) for index in torch.nonzero(wrong)[0])
            raise DataError(
                f"{file}: {name} of layer {layers[row]}, expert {expert}, is {table[row, expert].item():g}: it must be "
                f"{allowed}"
            )
