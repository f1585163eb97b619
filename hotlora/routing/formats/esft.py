"""ESFT's expert scores: the folder that its get_expert_scores.py writes, a file expert_weights_LAYER.txt a layer.

A line is a sequence: the ids of its tokens' experts, K a token, with tabs between; two tabs; as many gate weights. The
layer is the decoder's index. Several processes write a folder rank_0, rank_1, … each.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ...base.errors import DataError
from .found import Found, Known, check_layers, tokens_of, whole

_NAME = re.compile(r"expert_weights_(0|[1-9]\d{0,8})\.txt")


def is_esft(file: Path) -> bool:
    return _NAME.fullmatch(file.name) is not None


def files_in(folder: Path) -> list[Path]:
    """Its files, those in its rank_* folders included."""
    return [file for pattern in ("*.txt", "rank_*/*.txt") for file in sorted(folder.glob(pattern)) if is_esft(file)]


def read_esft(files: Sequence[Path], known: Known) -> Found:
    """Counts and gate weights of all files. DataError, with file and line, where a line is none, or layers do not have
    the same tokens."""
    first = files[0]
    num_experts = known.need("num_experts", first, "how many experts a layer has")
    top_k = known.need("num_experts_per_tok", first, "how many experts a token is sent to")
    counts: dict[int, torch.Tensor] = {}
    mass: dict[int, torch.Tensor] = {}
    for file in files:
        match = _NAME.fullmatch(file.name)
        assert match is not None
        layer = int(match[1])
        counts.setdefault(layer, torch.zeros(num_experts, dtype=torch.int64))
        mass.setdefault(layer, torch.zeros(num_experts, dtype=torch.float64))
        with whole(file), open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                ids, weights = _line(line.rstrip("\r\n"), f"{file}, line {number}", num_experts, top_k)
                counts[layer] += torch.bincount(ids, minlength=num_experts)
                mass[layer].index_add_(0, ids, weights)
    layers = tuple(sorted(counts))
    check_layers(layers, first, known)
    table = torch.stack([counts[layer] for layer in layers])
    num_tokens = tokens_of(table.sum(dim=1).tolist(), layers, top_k, first.parent, known.skips_tokens)
    return Found(
        "ESFT's expert scores", layers, table, num_tokens, top_k, torch.stack([mass[layer] for layer in layers])
    )


def _line(line: str, where: str, num_experts: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    left, _, right = line.partition("\t\t")
    try:
        ids = np.array([int(text) for text in left.split("\t")], np.int64)
        weights = np.array([float(text) for text in right.split("\t")], np.float64)
    except (ValueError, OverflowError) as error:
        raise DataError(f"{where}: it must be expert ids, two tabs, and gate weights, with tabs between") from error
    if len(ids) != len(weights) or len(ids) % top_k:
        raise DataError(
            f"{where}: {len(ids)} expert ids and {len(weights)} gate weights: they must be as many, {top_k} a token"
        )
    if ids.min() < 0 or ids.max() >= num_experts:
        raise DataError(f"{where}: ids from {ids.min()} to {ids.max()}: they must be 0 to {num_experts - 1}")
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise DataError(f"{where}: gate weights must be finite, and 0 or more")
    tokens = np.sort(ids.reshape(-1, top_k), axis=1)
    if (tokens[:, 1:] == tokens[:, :-1]).any():
        raise DataError(f"{where}: a token has an expert twice: is {top_k} the router's K?")
    return torch.from_numpy(ids), torch.from_numpy(weights)
