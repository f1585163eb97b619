"""Routed experts of served requests: counts of a model's layers out of the layers of an array.

Shape suffixes: L layers of the array, E experts, K router's top-k, T tokens.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...base.errors import DataError
from .found import Found, Known, check_counts, check_layers, spans
from .ids import Blocks, tally


def counted(blocks: Iterator[Blocks], layers: tuple[int, ...] | None, file: Path, known: Known) -> Found:
    """layers: decoder indices of the arrays' layers, where their names say; else they are the model's."""
    num_experts = known.need("num_experts", file, "how many experts a layer has")
    first = next((block for block in blocks if block.num_tokens), None)
    if first is None or 0 in first.shape:
        raise DataError(f"{file} holds no routed experts of any token")
    num_layers, top_k = first.shape[1:]
    if known.num_experts_per_tok not in (None, top_k):
        raise DataError(
            f"{file} has [tokens, {num_layers}, {top_k}] expert ids, and {known.name or 'the model'} sends "
            f"a token to {known.num_experts_per_tok}: the axes must be [tokens, layers, k]"
        )

    def parts() -> Iterator[Blocks]:
        yield first
        yield from (block for block in blocks if block.num_tokens)

    total = tally(parts(), num_layers, top_k, num_experts, file)
    if top_k == 1:  # zeros of a dense layer are expert 0 to `tally`
        is_dense = (total.counts[:, 1:].sum(axis=1) == 0) & (total.counts[:, 0] > 0)
        if known.layers is not None:
            is_dense &= ~np.isin(_decoder_indices(num_layers, layers, known), known.layers)
        if not is_dense.all():
            total.empty[is_dense] += total.counts[is_dense, 0]
            total.counts[is_dense] = 0
    places, indices = _places(num_layers, layers, total.empty, total.num_tokens, file, known)
    counts, empty = total.counts[places], total.empty[places]
    if empty.min() != empty.max():
        layer, other = indices[int(empty.argmax())], indices[int(empty.argmin())]
        raise DataError(
            f"{file}: layer {layer} has no experts (zeros or -1) for {empty.max():,} of {total.num_tokens:,} tokens, "
            f"layer {other} for {empty.min():,}: each layer must have the same tokens"
        )
    num_tokens = total.num_tokens - int(empty[0])
    if not num_tokens:
        raise DataError(f"{file}: no token has experts: all ids are 0 or -1")
    ignored = []
    if others := sorted(set(range(num_layers)) - set(places)):
        ignored.append(f"layers without experts ({spans(others)} of the array)")
    table = torch.from_numpy(np.ascontiguousarray(counts))
    check_counts(table, indices, file)
    if int(table.max()) > num_tokens:
        raise DataError(
            f"{file}: an expert has {int(table.max()):,} of {num_tokens:,} tokens, more than once each: the axes must "
            "be [tokens, layers, k]"
        )
    return Found("routed experts", indices, table, num_tokens, top_k, skipped=int(empty[0]), ignored=tuple(ignored))


def _decoder_indices(number: int, layers: tuple[int, ...] | None, known: Known) -> tuple[int, ...]:
    """Of the array's layers: servers write a layer for each decoder layer, dense ones too, or for MoE layers alone."""
    if known.layers is not None and (layers or tuple(range(number))) == tuple(range(len(known.layers))):
        return known.layers
    return layers or tuple(range(number))


def _places(
    number: int, layers: tuple[int, ...] | None, empty: Any, num_tokens: int, file: Path, known: Known
) -> tuple[list[int], tuple[int, ...]]:
    """(the array's layers that count, their decoder indices)"""
    routed = [place for place in range(number) if empty[place] < num_tokens]
    if not routed:
        raise DataError(f"{file}: no layer has experts: all ids are 0 or -1")
    indices = _decoder_indices(number, layers, known)
    if known.layers is None:
        return routed, tuple(indices[place] for place in routed)
    if layers is None and number not in (len(known.layers), known.num_hidden_layers):
        raise DataError(
            f"{file} has {number} layers, and {known.name} has {len(known.layers)} MoE layers ({spans(known.layers)}) "
            f"of {known.num_hidden_layers}: one of the two numbers must be the file's"
        )
    kept = [place for place in range(number) if indices[place] in known.layers]
    check_layers(sorted({indices[place] for place in (*kept, *routed)}), file, known)
    return kept, tuple(indices[place] for place in kept)
