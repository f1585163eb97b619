"""Rows in memory, kept as a file."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

from ..base.errors import DataError
from ..base.files import atomic_path, sha256_file
from .arrow import without_filling
from .rows import arrow_rows, dataset_rows, given_twice


def save_rows(data: Any, path: Path, *, replace: bool = False) -> Path:
    """Writes rows that are in memory as JSON lines, so that a run can be resumed from its folder alone.

    Args:
        data: a list of dictionaries, or any iterable of them such as a `datasets.Dataset` or `IterableDataset`; or a
            DataFrame of pandas or polars, or an Arrow table.
        replace: other rows that are there, as nothing was made of them.

    Returns:
        `path`, which may hold the same rows already.

    Raises:
        DataError: a row that is no dictionary, or holds what JSON cannot; no rows; other rows in `path`.
    """
    if hasattr(data, "to_dicts"):  # of polars
        data = data.to_dicts()
    elif hasattr(data, "to_dict") and hasattr(data, "columns"):  # of pandas
        if twice := given_twice(list(data.columns)):
            raise DataError(f"data has the column {twice!r} twice: give each its own name.")
        data = (
            {k: v for k, v in row.items() if not (isinstance(v, float) and v != v)} for row in data.to_dict("records")
        )
    if isinstance(data, Mapping) and all(
        isinstance(v, list) and not any(isinstance(item, Mapping) for item in v) for v in data.values()
    ):
        raise DataError("data is a dictionary of columns: give datasets.Dataset.from_dict(data).")
    if not isinstance(data, Iterable) and not hasattr(data, "to_pylist"):
        raise DataError(f"data is a {type(data).__name__}: give a path, a name, or rows as dictionaries.")
    if isinstance(data, Mapping) and not any(_is_many(value) for value in data.values()):
        raise DataError("data is one row, a dictionary: give a list of rows, [data].")
    if isinstance(data, Mapping):
        raise DataError(f"data has the splits {', '.join(map(str, data))}: give one of them, as data[split].")
    digest, number = hashlib.sha256(), 0
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        for number, row in enumerate(_cleaned(data), start=1):
            if not isinstance(row, Mapping):
                raise DataError(f"row {number} of the data is a {type(row).__name__}: give dictionaries.")
            try:
                line = json.dumps(row, default=_plain).encode() + b"\n"
            except (TypeError, ValueError, RecursionError) as error:
                raise DataError(f"row {number} of the data holds what JSON cannot: {error}: leave it out.") from error
            digest.update(line)
            file.write(line)
        if not number:
            raise DataError("data holds no rows: give at least one.")
        file.flush()
        if not replace and path.is_file() and sha256_file(path) != digest.hexdigest():
            raise DataError(f"{path} holds other rows: give another output folder, or delete it.")
    return path


def _cleaned(data: Any) -> Iterator[Any]:
    """The rows without what Arrow fills in, and with their JSON as values."""
    if hasattr(data, "to_pylist"):  # of Arrow
        yield from (row.values for row in arrow_rows([data], "data"))
    elif getattr(data, "features", None):  # of `datasets`
        yield from (row.values for row in dataset_rows(data, "data"))
    else:
        yield from (without_filling(dict(row)) if isinstance(row, Mapping) else row for row in data)


def _is_many(value: Any) -> bool:
    """Whether it is rows, as of a split: no field of one row."""
    listed = isinstance(value, list) and any(isinstance(item, Mapping) for item in value)
    is_talk = listed and all(isinstance(item, Mapping) and ("role" in item or "from" in item) for item in value)
    return (listed and not is_talk) or (
        not isinstance(value, str | bytes | list | Mapping) and hasattr(value, "__iter__")
    )


def _plain(value: Any) -> Any:
    """What JSON has for numpy's arrays and numbers; times and decimals as text."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, date | time | Decimal):
        return str(value)
    raise TypeError(f"a {type(value).__name__}, {str(value)[:40]!r}")
