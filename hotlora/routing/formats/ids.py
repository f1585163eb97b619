"""Counts expert ids by layer, as fast as memory allows: routed experts of a server's requests are gigabytes.

A token's K experts are distinct. So two neighbours that are equal are no routing: servers write zeros or -1 for layers
that have no experts, and for tokens that they did not record.

Shape suffixes: L layers of the array, E experts, K router's top-k, T tokens, P = T·K/2 pairs of neighbours.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...base.errors import DataError

Ids = np.ndarray[tuple[int, int, int], np.dtype[np.integer]]
_BLOCK = 2**25
"""ids that all workers together hold: tens of megabytes, whatever the file's size"""
_FEW = 2**15
"""ids of a layer, below which a call for each layer takes longer than counting all layers at once"""
_PIECE = 2**18
"""ids that are turned at once: they stay in a core's cache"""


@dataclass(frozen=True)
class Blocks:
    """Routed experts [T, L, K] that are read piece by piece."""

    shape: tuple[int, ...]
    """T, L, K"""
    read: Callable[[int, int], Ids]
    """tokens from the first to before the second"""

    @property
    def num_tokens(self) -> int:
        return self.shape[0]

    def pieces(self, workers: int) -> list[tuple[int, int]]:
        step = max(1, _BLOCK // workers // (self.shape[1] * self.shape[2]))
        return [(start, min(start + step, self.num_tokens)) for start in range(0, self.num_tokens, step)]


@dataclass
class Tally:
    """The sum over blocks."""

    counts: np.ndarray[tuple[int, int], np.dtype[np.int64]]
    """[L, E]"""
    empty: np.ndarray[tuple[int], np.dtype[np.int64]]
    """[L]: tokens whose experts of the layer are all 0, or all -1: none"""
    num_tokens: int = 0

    def add(self, other: "Tally") -> None:
        self.counts += other.counts
        self.empty += other.empty
        self.num_tokens += other.num_tokens


def tally(parts: Iterable[Blocks], num_layers: int, top_k: int, num_experts: int, file: Path) -> Tally:
    """The counts of all parts. DataError, with token, layer and id, where an id is out of range or a token has an
    expert twice."""
    total = Tally(np.zeros((num_layers, num_experts), np.int64), np.zeros(num_layers, np.int64))
    workers = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:  # torch and numpy work outside of Python's lock
        for part in parts:
            if part.shape[1:] != (num_layers, top_k):
                raise DataError(
                    f"{file} has routed experts [tokens, {num_layers} layers, {top_k}] and {list(part.shape)}: they "
                    "must agree"
                )

            def count(piece: tuple[int, int], part: Blocks = part, before: int = total.num_tokens) -> Tally:
                return _tally_block(part.read(*piece), num_experts, before + piece[0], file)

            for found in pool.map(count, part.pieces(workers)):
                total.add(found)
    return total


def _tally_block(ids: Ids, num_experts: int, first: int, file: Path) -> Tally:
    num_tokens, num_layers, top_k = ids.shape
    narrow = np.uint8 if num_experts <= 256 else np.uint16
    if ids.dtype != narrow:
        if ids.min() < 0 or ids.max() >= num_experts:
            return _tally_slowly(ids, num_experts, first, file)
        ids = ids.astype(narrow)
    if num_tokens * top_k < _FEW:
        return _tally_few(ids, num_experts, first, file)
    by_layer = _turned(ids)
    if ids.dtype == np.uint8 and top_k % 2 == 0:
        found = [_pairs(row.view(np.uint16)) for row in by_layer]
    else:
        rows = by_layer.reshape(num_layers, num_tokens, top_k)
        bins = 2 ** (8 * ids.itemsize)
        found = [(_bincount(row.ravel(), bins), bool((row[:, 1:] == row[:, :-1]).any())) for row in rows]
    counts = torch.stack([row for row, _ in found])
    if any(repeats for _, repeats in found) or counts[:, num_experts:].any():
        return _tally_slowly(ids, num_experts, first, file)
    return Tally(counts[:, :num_experts].numpy(), np.zeros(num_layers, np.int64), num_tokens)


def _tally_few(ids: Ids, num_experts: int, first: int, file: Path) -> Tally:
    num_tokens, num_layers, _ = ids.shape
    if ids.max() >= num_experts or (ids[..., 1:] == ids[..., :-1]).any():
        return _tally_slowly(ids, num_experts, first, file)
    return Tally(_by_layer(ids, num_experts), np.zeros(num_layers, np.int64), num_tokens)


def _by_layer(ids: Ids, num_experts: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """[L, E] of [T, L, K]."""
    num_layers = ids.shape[1]
    flat = ids + np.arange(num_layers)[:, None] * num_experts
    return np.bincount(flat.ravel(), minlength=num_layers * num_experts).reshape(num_layers, num_experts)


def _pairs(row: np.ndarray[tuple[int], np.dtype[np.uint16]]) -> tuple[torch.Tensor, bool]:
    """(the counts of the ids in pairs of neighbours, int64 [256]; whether a pair is the same id twice): half the steps
    of counting ids one by one."""
    grid = _bincount(row, 2**15).view(-1, 256)  # [second, first], of 128 rows or 256
    counts = grid.sum(dim=0)
    counts[: len(grid)] += grid.sum(dim=1)
    return counts, bool(grid.diagonal().any())


def _turned(ids: Ids) -> np.ndarray[tuple[int, int], np.dtype[np.integer]]:
    """[L, T·K] of [T, L, K]: by whole tokens of a layer where those are words of the machine."""
    num_tokens, num_layers, top_k = ids.shape
    size = top_k * ids.dtype.itemsize
    if size in (2, 4, 8) and ids.flags.c_contiguous:
        words = ids.view(f"u{size}")[..., 0]
        turned = np.empty((num_layers, num_tokens), words.dtype)
    else:
        words = ids
        turned = np.empty((num_layers, num_tokens, top_k), ids.dtype)
    step = max(1, _PIECE // (num_layers * top_k))
    for start in range(0, num_tokens, step):
        turned[:, start : start + step] = words[start : start + step].swapaxes(0, 1)
    return turned.reshape(num_layers, -1).view(ids.dtype)


def _bincount(row: np.ndarray[tuple[int], np.dtype[np.integer]], bins: int) -> torch.Tensor:
    """int64 [bins], or as many as the type has numbers. numpy's own takes three times as long; torch has no uint16,
    which are taken as int16 where that is the same."""
    if row.dtype == np.uint16:
        signed = row.view(np.int16)
        row, bins = (signed, bins) if len(row) and signed.min() >= 0 else (row.astype(np.int32), 2**16)
    return torch.bincount(torch.from_numpy(row), minlength=bins)


def _tally_slowly(ids: Ids, num_experts: int, first: int, file: Path) -> Tally:
    """The same of a block that holds tokens without routing, or what is wrong."""
    num_tokens, num_layers, top_k = ids.shape
    same = (ids == ids[..., :1]).all(axis=-1)
    empty = same & (((ids[..., 0] == 0) & (top_k > 1)) | _is_none(ids[..., 0], num_experts))
    valid = ids[~empty].astype(np.int64)  # [N, K]
    wrong = (valid < 0) | (valid >= num_experts)
    if not wrong.any():
        ordered = np.sort(valid, axis=-1)
        wrong = ordered[..., 1:] == ordered[..., :-1]
    if wrong.any():
        row = int(np.argmax(wrong.any(axis=-1)))
        token, layer = (int(index) for index in np.argwhere(~empty)[row])
        raise DataError(
            f"{file}: token {first + token}, layer {layer} of the array, has the experts {valid[row].tolist()}: they "
            f"must be {top_k} different ids from 0 to {num_experts - 1}; axes are [tokens, layers, k]"
        )
    layer_N = np.nonzero(~empty)[1]
    flat = (layer_N[:, None] * num_experts + valid).ravel()
    counts = np.bincount(flat, minlength=num_layers * num_experts).reshape(num_layers, num_experts)
    return Tally(counts, empty.sum(axis=0), num_tokens)


def _is_none(ids: Ids, num_experts: int) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """-1, or what it is in an unsigned type, where that is no expert."""
    largest = np.iinfo(ids.dtype).max
    return (ids == largest) & (largest >= num_experts) if ids.dtype.kind == "u" else ids == -1
