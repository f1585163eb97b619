"""Scores of experts that were made elsewhere: from a file, a dict or a tensor."""

import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.errors import FileError, PlanError
from ..base.files import read_json

VERSION = 1

Scores = str | os.PathLike[str] | Mapping[int, Sequence[float]] | Tensor


def read_scores(
    scores: Scores, layers: Sequence[int], num_experts: int, fingerprint: str | None = None
) -> tuple[Tensor, str]:
    """One score for each expert of each layer, float64 [L, E], and a hex SHA-256 of layers and scores.

    scores: a JSON file (docs/files.md), a dict from decoder layer to E numbers, or a tensor [L, E] in the order
    of `layers`. fingerprint: the model's; scores that name another one are refused.

    FileError: no such file, not whole JSON, or another version. PlanError: scores that are not finite numbers,
    missing or foreign layers, another number of experts, or another model's. Both name the file.
    """
    if isinstance(scores, Tensor):
        if scores.shape != (len(layers), num_experts):
            raise PlanError(
                f"scores are a tensor {list(scores.shape)}: give [{len(layers)} layers, {num_experts} experts]"
            )
        return _checked(dict(zip(layers, scores.tolist(), strict=True)), layers, num_experts)
    if isinstance(scores, Mapping):
        return _checked(scores, layers, num_experts)
    data = read_json(scores)
    if type(data.get("version")) is not int or data["version"] != VERSION:
        raise FileError(f"{scores}: scores of version {data.get('version')!r}; this hotlora reads version {VERSION}")
    try:
        if unknown := set(data) - {"version", "fingerprint", "scores"}:
            raise PlanError(f"unknown keys {sorted(unknown)}: allowed are version, fingerprint and scores")
        theirs = data.get("fingerprint")
        if theirs is not None and fingerprint is not None and theirs != fingerprint:
            raise PlanError(f"scores are for {theirs}, the profile is of {fingerprint}: give this model's scores")
        return _checked(layer_keys("scores", data.get("scores")), layers, num_experts)
    except PlanError as error:
        raise PlanError(f"{scores}: {error}") from error


def layer_keys(name: str, data: Any) -> dict[int, Any]:
    """JSON's object of layers, with decoder indices as keys. PlanError, naming `name`, where it is none."""
    if not isinstance(data, dict):
        raise PlanError(f"{name} is {data!r}: it must map each decoder layer to a list")
    for key in data:
        if not re.fullmatch("0|[1-9][0-9]{0,8}", str(key)):
            raise PlanError(f'{name} has the layer {str(key)[:40]!r}: a layer is the decoder\'s index, such as "3"')
    return {int(key): value for key, value in data.items()}


def _checked(rows: Mapping[int, Any], layers: Sequence[int], num_experts: int) -> tuple[Tensor, str]:
    if missing := sorted(set(layers) - set(rows)):
        raise PlanError(f"scores lack layers {missing}: give a list for each of the profile's layers")
    if foreign := sorted(set(rows) - set(layers), key=str):
        raise PlanError(f"scores have layers {foreign}: the profile has {list(layers)}")
    table = [_row(layer, rows[layer], num_experts) for layer in layers]
    digest = hashlib.sha256(json.dumps([list(layers), table]).encode()).hexdigest()
    return torch.tensor(table, dtype=torch.float64), digest


def _row(layer: int, row: Any, num_experts: int) -> list[float]:
    values = row.tolist() if hasattr(row, "tolist") else row
    if not isinstance(values, list | tuple) or len(values) != num_experts:
        size = len(values) if isinstance(values, list | tuple) else repr(values)
        raise PlanError(f"layer {layer}: {size} scores; give a list of {num_experts}, one an expert")
    for expert, value in enumerate(values):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) <= sys.float_info.max:
            raise PlanError(f"layer {layer}: the score of expert {expert} is {value!r}; it must be a finite number")
    return [float(value) for value in values]
