"""Counts, gate weights and scores of experts in JSON: one number an expert and layer, or counts of each example."""

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...base.errors import DataError
from .found import MOST_EXPERTS, Found, Known, check_counts, check_layers, spans, tokens_of

_COUNTS = ("counts", "count", "cnt", "expert_frequency")
_MASS = ("mass", "gate", "gate_sum")
_SALIENCY = ("sal", "saliency_sum", "weighted_ean_sum")  # sums; `reap` and `saliency` may be means, so they are scores
_TOKENS = ("num_tokens", "tokens")
_EXPERTS = ("num_experts", "n_expert", "n_experts")
_DATA = ("data", "dataset")
_READ = ("model", "layers", "num_experts_per_tok", "assignments_per_layer", "examples", *_TOKENS, *_EXPERTS, *_DATA)
ESFT_SCORES = ("token_scores", "gate_scores")


def read_tables(data: Mapping[str, Any], file: Path, known: Known) -> Found | None:
    """The routing in a JSON object of one of these forms; None where it has none.

    - `counts` [L][E], and `mass` (or `gate`) and scores of any name, [L][E] each; `layers`, decoder indices (absent:
      from 0), `num_tokens` or `num_experts_per_tok`;
    - `examples`: a list of examples, each a list of layers, each a list of pairs (expert, count);
    - `layers`: an object from decoder index to lists of E: `cnt`, `gate`, `sal` as REAP-style tools write them;
    - ESFT's summary.json: `token_scores` and `gate_scores`, from layer to expert to score.

    DataError, naming the file and the number, where it is none.
    """
    if any(name in data for name in ESFT_SCORES):
        return _summary(data, file, known)
    if "examples" in data:
        return _examples(data, file, known)
    by_layer = data.get("layers") if isinstance(data.get("layers"), dict) else data
    if by_layer and all(_is_layer(key) and isinstance(value, dict) for key, value in by_layer.items()):
        rest = {} if by_layer is data else {key: value for key, value in data.items() if key != "layers"}
        return _counts({**rest, **_by_column(by_layer, file)}, file, known, "counts by layer")
    if any(name in data for name in _COUNTS):
        return _counts(data, file, known, "counts")
    return None


def is_counts(shape: Sequence[int], known: Known) -> bool:
    """Whether an integer array is the model's [L, E], with its dense layers or without: no token has E experts."""
    if known.layers is None or known.num_experts in (None, known.num_experts_per_tok):
        return False
    return tuple(shape) in {(number, known.num_experts) for number in (len(known.layers), known.num_hidden_layers)}


def read_counts(array: np.ndarray[Any, Any], file: Path, known: Known) -> Found:
    """Of an array that `is_counts`."""
    assert known.layers is not None
    layers = known.layers if len(array) == len(known.layers) else tuple(range(len(array)))
    # As in routed experts, a dense layer has zeros; any other is told to be none of the model's.
    kept = [row for row, layer in enumerate(layers) if layer in known.layers or array[row].any()]
    data = {"counts": array[kept].tolist(), "layers": [layers[row] for row in kept]}
    return _counts(data, file, known, "counts")


def _counts(data: Mapping[str, Any], file: Path, known: Known, form: str) -> Found:
    given = {name: data[name] for name in _COUNTS if name in data}
    if len(given) > 1:
        raise DataError(f"{file} has {' and '.join(given)}: keep one of them")
    ((name, value),) = given.items()
    counts = _whole(table(value, name, file), name, file)
    keyed = {key: tuple(_sorted_layers(table, key, file)) for key, table in data.items() if _maps_layers(key, table)}
    layers = _layers(data, len(counts), file, known, keyed.get(name))
    check_layers(layers, file, known)
    for key, theirs in keyed.items():
        if theirs != layers and theirs != keyed.get(name):
            raise DataError(f"{file}: {key} have layers {spans(theirs)}, {name} {spans(layers)}: they must be the same")
    num_experts = _number(data, _EXPERTS, file, MOST_EXPERTS) or known.num_experts
    if num_experts not in (None, counts.shape[1]):
        raise DataError(f"{file}: {name} have {counts.shape[1]} experts a layer, and the model has {num_experts}")
    mass, saliency, scores, ignored = None, None, {}, []
    for key, value in data.items():
        if key in (*_READ, name):
            continue
        if key not in keyed and not (isinstance(value, list) and value and isinstance(value[0], list)):
            ignored.append(key)
            continue
        found = table(value, key, file)
        if found.shape != counts.shape:
            raise DataError(f"{file}: {name} are {list(counts.shape)}, {key} is {list(found.shape)}: they must agree")
        if key in _MASS and mass is None:
            mass = found.double()
        elif key in _SALIENCY and saliency is None:
            saliency = found.double()
        else:
            scores[key] = _finite(found.double(), key, layers, file)
    check_counts(counts, layers, file, mass, saliency)
    num_tokens, top_k = _sizes(data, counts, layers, file, known)
    return Found(
        form, layers, counts, num_tokens, top_k, mass, saliency, scores, ignored=tuple(ignored),
        model=_text(data, ("model",)), data=_text(data, _DATA),
    )  # fmt: skip


def _examples(data: Mapping[str, Any], file: Path, known: Known) -> Found:
    examples = data["examples"]
    if not isinstance(examples, list) or not examples or not all(isinstance(rows, list) for rows in examples):
        raise DataError(f"{file}: examples must be a list of examples, each a list of layers")
    num_layers = len(examples[0])
    layers = _layers(data, num_layers, file, known)
    check_layers(layers, file, known)
    num_experts = _number(data, _EXPERTS, file, MOST_EXPERTS) or known.need(
        "num_experts", file, "how many experts a layer has"
    )
    sums = np.zeros((len(examples), num_layers), np.int64)
    counts = torch.zeros(num_layers, num_experts, dtype=torch.int64)
    for index, rows in enumerate(examples):
        if len(rows) != num_layers:
            raise DataError(f"{file}: example {index} has {len(rows)} layers, example 0 has {num_layers}")
    for row, layer in enumerate(layers):
        try:
            flat = [*chain.from_iterable(example[row] for example in examples)]
            pairs = _integers(flat).reshape(-1, 2)
            places = np.repeat(np.arange(len(examples)), [len(example[row]) for example in examples])
            np.add.at(sums[:, row], places, pairs[:, 1])
        except (TypeError, ValueError, IndexError) as error:
            raise DataError(f"{file}: layer {layer}: an example's layer must be pairs (expert, count)") from error
        ids = pairs[:, 0]
        if len(pairs) and not (0 <= ids.min() and ids.max() < num_experts):
            wrong = ids[(ids < 0) | (ids >= num_experts)][0]
            raise DataError(f"{file}: layer {layer} has expert {wrong}: ids are 0 to {num_experts - 1}")
        if len(pairs) and pairs[:, 1].min() < 0:
            raise DataError(f"{file}: layer {layer} has the count {pairs[:, 1].min()}: it must be 0 or more")
        counts[row].index_add_(0, torch.from_numpy(ids.copy()), torch.from_numpy(pairs[:, 1].copy()))
    for index, each in enumerate(sums.tolist()):
        if len(set(each)) > 1 and not known.skips_tokens:
            raise DataError(
                f"{file}: example {index} has {each[0]:,} assignments in layer {layers[0]}, and others in others "
                f"({spread(each)}): each must have tokens x K"
            )
    num_tokens, top_k = _sizes(data, counts, layers, file, known)
    ignored = tuple(key for key in data if key not in _READ)
    return Found(
        "counts of each example", layers, counts, num_tokens, top_k, ignored=ignored,
        model=_text(data, ("model",)), data=_text(data, _DATA),
    )  # fmt: skip


def spread(numbers: Sequence[int]) -> str:
    return f"{min(numbers):,} to {max(numbers):,}"


def _summary(data: Mapping[str, Any], file: Path, known: Known) -> Found:
    scores: dict[str, Tensor] = {}
    layers: tuple[int, ...] = ()
    for name in (name for name in ESFT_SCORES if name in data):
        columns = _sorted_layers(data[name], name, file)
        rows = []
        for layer, row in columns.items():
            if not isinstance(row, dict) or sorted(row, key=str) != sorted(map(str, range(len(row)))):
                raise DataError(f"{file}: {name}, layer {layer}: it must map each expert, from 0, to its score")
            rows.append([row[str(expert)] for expert in range(len(row))])
        if layers and layers != tuple(columns):
            raise DataError(f"{file}: token_scores have layers {list(layers)}, gate_scores {list(columns)}")
        layers = tuple(columns)
        scores[name] = _finite(table(rows, name, file).double(), name, layers, file)
    check_layers(layers, file, known)
    ignored = tuple(key for key in data if key not in ESFT_SCORES)
    return Found("ESFT's summary", layers, None, scores=scores, ignored=ignored)


def table(value: Any, name: str, file: Path) -> Tensor:
    """[L, E] of a list of lists of numbers, or an object from layer to such lists. DataError where it is none."""
    if isinstance(value, dict):
        value = [*_sorted_layers(value, name, file).values()]
    if not isinstance(value, list) or not value or not all(isinstance(row, list) and row for row in value):
        raise DataError(f"{file}: {name} must be a list of layers, each a list of a number an expert")
    sizes = [len(row) for row in value]
    if len(set(sizes)) > 1:
        raise DataError(f"{file}: {name} have {spread(sizes)} experts a layer: every layer must have as many")
    try:
        array = _numbers([*chain.from_iterable(value)])
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{file}: {name} hold what is no number of 64 bits: give numbers alone") from error
    return torch.from_numpy(array).view(len(value), sizes[0])


def _numbers(flat: list[Any]) -> np.ndarray[Any, Any]:
    """int64, or float64 where one is no integer. TypeError: what is no number, such as true."""
    if not all(type(value) in (int, float) for value in flat):
        raise TypeError
    return np.array(flat, np.int64 if all(type(value) is int for value in flat) else np.float64)


def _integers(flat: list[Any]) -> np.ndarray[Any, Any]:
    """int64 [N, 2] of pairs."""
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in flat):
        raise TypeError
    array = _numbers([*chain.from_iterable(flat)])
    if array.dtype != np.int64 and len(array):
        raise TypeError
    return array.astype(np.int64)


def _whole(found: Tensor, name: str, file: Path) -> Tensor:
    """int64: floats are taken where they are whole numbers."""
    if found.is_floating_point() and not (found == found.round()).all():
        raise DataError(f"{file}: {name} hold {found[found != found.round()][0]:g}: counts are whole numbers")
    if found.is_floating_point() and (found.abs() >= 2**53).any():
        raise DataError(f"{file}: {name} hold {found.abs().max():g}, which a float cannot count exactly")
    return found.to(torch.int64)


def _finite(found: Tensor, name: str, layers: Sequence[int], file: Path) -> Tensor:
    if not found.isfinite().all():
        row, expert = (int(index) for index in torch.nonzero(~found.isfinite())[0])
        raise DataError(f"{file}: {name} of layer {layers[row]}, expert {expert}, is {found[row, expert]:g}")
    return found


def _sizes(data: Mapping[str, Any], counts: Tensor, layers: Sequence[int], file: Path, known: Known) -> tuple[int, int]:
    """(tokens, K), from what the file says, the model, and the counts, which all must agree."""
    sums = counts.sum(dim=1).tolist()
    if not any(sums):
        raise DataError(f"{file}: all counts are 0: there is no routing in it")
    said = data.get("assignments_per_layer")
    if said is not None and said != sums:
        raise DataError(f"{file}: assignments_per_layer are {str(said)[:80]}, and the counts add up to {sums[:3]}, …")
    num_tokens, top_k = _number(data, _TOKENS, file), _number(data, ("num_experts_per_tok",), file)
    if top_k and known.num_experts_per_tok and top_k != known.num_experts_per_tok:
        raise DataError(f"{file} says num_experts_per_tok {top_k}, and the model has {known.num_experts_per_tok}")
    top_k = top_k or known.num_experts_per_tok
    if top_k is None and num_tokens:
        top_k = max(sums) // num_tokens
        if top_k < 1 or top_k > counts.shape[1] or top_k * num_tokens != max(sums):
            raise DataError(
                f"{file} says {num_tokens:,} tokens, and layers have {spread(sums)} assignments: each must have tokens "
                "x K, a whole number"
            )
    if top_k is None:
        top_k = known.need("num_experts_per_tok", file, "how many experts a token is sent to")
    found = tokens_of(sums, layers, top_k, file, known.skips_tokens)
    if num_tokens is not None and num_tokens != found and not known.skips_tokens:
        raise DataError(
            f"{file} says {num_tokens:,} tokens of {top_k} experts each, and layer {layers[0]} has {sums[0]:,} "
            f"assignments, which is {found:,} tokens"
        )
    return num_tokens or found, top_k


def _layers(
    data: Mapping[str, Any], number: int, file: Path, known: Known, keys: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    """Decoder indices: the file's, or the model's, or from 0. keys: those of counts that are mapped by layer; from 0
    without a gap they may be MoE layers in their order."""
    given = data.get("layers")
    if keys is not None and keys != tuple(range(number)):
        if given not in (None, list(keys)):
            raise DataError(f"{file}: counts have layers {spans(keys)}, and layers are {str(given)[:80]}: keep one")
        return keys
    if given is None:
        return known.layers if known.layers is not None and len(known.layers) == number else tuple(range(number))
    is_right = isinstance(given, list) and all(type(layer) is int and 0 <= layer < 10**9 for layer in given)
    if not is_right or given != sorted(set(given)) or len(given) != number:
        raise DataError(f"{file}: layers are {str(given)[:80]}: they must be {number} ascending decoder indices")
    return tuple(given)


def _by_column(by_layer: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """{name: [L][E]} and `layers`, of {layer: {name: [E]}}."""
    rows = _sorted_layers(by_layer, "layers", file)
    names = list(next(iter(rows.values())))
    for layer, row in rows.items():
        if list(row) != names and set(row) != set(names):
            raise DataError(f"{file}: layer {layer} has {sorted(row)}, another {sorted(names)}: they must agree")
    if not set(names) & set(_COUNTS):
        raise DataError(f"{file}: layers have {sorted(names)[:8]}, and none of {', '.join(_COUNTS)}")
    columns = {name: [row[name] for row in rows.values()] for name in names}
    lists = {name: column for name, column in columns.items() if all(isinstance(row, list) for row in column)}
    return {**lists, **{name: None for name in columns if name not in lists}, "layers": list(rows)}


def _sorted_layers(value: Any, name: str, file: Path) -> dict[int, Any]:
    if not isinstance(value, dict) or not value or not all(map(_is_layer, value)):
        raise DataError(f'{file}: {name} must map decoder indices, such as "3", to an expert\'s numbers')
    return {layer: value[str(layer)] for layer in sorted(map(int, value))}


def _maps_layers(key: str, value: Any) -> bool:
    """Whether a table [L][E] is an object from decoder index to a list."""
    is_map = key not in _READ and isinstance(value, dict) and bool(value)
    return is_map and all(_is_layer(layer) and isinstance(row, list) for layer, row in value.items())


def _is_layer(key: Any) -> bool:
    return re.fullmatch("0|[1-9][0-9]{0,8}", str(key)) is not None


def _number(data: Mapping[str, Any], names: Sequence[str], file: Path, most: int = 2**62) -> int | None:
    for name in names:
        value = data.get(name)
        if value is not None:
            if type(value) is not int or not 1 <= value <= most:
                raise DataError(f"{file}: {name} is {str(value)[:40]}: it must be an integer from 1 to {most:,}")
            return value
    return None


def _text(data: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((data[name] for name in names if isinstance(data.get(name), str)), None)
