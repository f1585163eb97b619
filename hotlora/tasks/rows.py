"""Rows of JSON from a file or the hub, each with its place, so that an error can say which one is wrong."""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..base.errors import DataError
from ..base.files import JSON_ERRORS, half_character

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # half of a pair, or a whole one
_LONG = re.compile(r"\d{4301}")
_HUB_ERRORS = (OSError, ValueError, KeyError)  # no network, no such data set or split, no such configuration


class Row(NamedTuple):
    """One row and its place: `train.jsonl line 7`."""

    place: str
    values: dict[str, Any]


def read_rows(path: str | Path) -> list[Row]:
    """Reads JSON lines, or one JSON list of objects; either may be gzipped.

    Raises:
        DataError: no such file, no rows, invalid JSON, a row that is not an object or that holds half a character (with
            its line).
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} is not a file; give a file of JSON lines ({', '.join(SUFFIXES)}).")
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); it must be UTF-8 text, or gzipped UTF-8 text.") from error
    rows = list(_parse_list(path, text) if text.lstrip().startswith("[") else _parse_lines(path, text))
    if not rows:
        raise DataError(f"{path} holds no rows; give a file with at least one JSON object.")
    for place, values in rows:
        if not isinstance(values, dict):
            raise DataError(f"{place}: a row must be a JSON object, this is a {type(values).__name__}.")
    if _SURROGATE.search(text):
        check_characters(rows)
    return rows


def check_characters(rows: Sequence[Row]) -> None:
    """No tokenizer, and no file, takes a lone surrogate, which JSON can hold: half of an emoji that was cut."""
    for place, values in rows:
        if half := half_character(values):
            raise DataError(
                f"{place}: holds half a character, {half} (a lone surrogate), which is no text: give the whole "
                "character, or delete it."
            )


def _parse_lines(path: Path, text: str) -> Iterator[Row]:
    # Not str.splitlines: it also cuts at U+2028 and its like, which may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield Row(f"{path} line {number}", json.loads(line))
            except JSON_ERRORS as error:
                raise DataError(
                    f"{path} line {number} is not valid JSON ({_why(error)}); each line must be one whole JSON object."
                ) from error


def _parse_list(path: Path, text: str) -> Iterator[Row]:
    try:
        values = json.loads(text)
    except JSON_ERRORS as error:
        long = _LONG.search(text)
        at = error.lineno if isinstance(error, json.JSONDecodeError) else long and text.count("\n", 0, long.start()) + 1
        raise DataError(f"{path}{f' line {at}' if at else ''} is not valid JSON ({_why(error)}).") from error
    for number, row in enumerate(values, start=1):
        yield Row(f"{path} row {number}", row)


def _why(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    if isinstance(error, ValueError):
        return "a number of more than 4,300 digits, which Python does not read; write it as text"
    return str(error)


def hub_rows(name: str, split: str, config: str | None = None) -> list[Row]:
    """The rows of a data set on the Hugging Face hub, or in its local cache."""
    from datasets import load_dataset

    try:
        rows = load_dataset(name, config, split=split)
    except _HUB_ERRORS as error:
        raise DataError(
            f"The data set {name!r} (split {split!r}) cannot be loaded from the hub: {error}. "
            "Check its name and the network, or give a local file."
        ) from error
    return [Row(f"{name} {split} row {number}", without_filling(row)) for number, row in enumerate(rows, start=1)]


def without_filling(row: dict[str, Any]) -> dict[str, Any]:
    """Arrow gives all objects of a column the same keys, None where a row had none: a template would write them."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cleaned(item) for key, item in value.items() if item is not None}
        return [cleaned(item) for item in value] if isinstance(value, list) else value

    return {key: cleaned(value) for key, value in row.items()}


def split_file(folder: Path, names: Sequence[str]) -> Path:
    """The first of `names` that is in `folder`; DataError names what was looked for."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder} holds none of {', '.join(names)}; give a folder that does, or one file.")


def load_rows(
    task: str, source: str | None, hub: str, config: str | None, files: Sequence[str], split: str
) -> list[Row]:
    """A published task's rows from a local file, a local folder, or the hub.

    Args:
        source: a file, a folder holding one of `files`, a hub id, or None for the hub id `hub`.
        split: the split's name on the hub.
    """
    if source is None or source == hub:
        return hub_rows(hub, split, config)
    path = Path(source).expanduser()
    if path.is_dir():
        return read_rows(split_file(path, files))
    if path.is_file() or path.suffix or source.count("/") != 1:
        if not path.is_file():
            raise DataError(f"{task}: {source} does not exist; give a file, a folder holding {files[0]}, or a hub id.")
        return read_rows(path)
    return hub_rows(source, split, config)


def published(
    task: str,
    hub: str,
    config: str | None,
    files: Mapping[str, Sequence[str]],
    make: Callable[[Row], Any],
    hub_splits: Mapping[str, str] | None = None,
) -> Callable[..., list[Any]]:
    """What reads a published task's examples: `Task.read`.

    Args:
        hub, config: where its rows are on the hub.
        files: split -> the names that its file may have in a local folder.
        make: a row as an example.
        hub_splits: the names that splits have on the hub, where they are others.
    """

    def read(split: str, source: str | None, *_: int | None) -> list[Any]:
        rows = load_rows(task, source, hub, config, files[split], (hub_splits or {}).get(split, split))
        return [make(row) for row in rows]

    return read


def need(row: Row, *fields: str) -> tuple[Any, ...]:
    """The values of `fields`; DataError says which one the row lacks, where, and what it has."""
    for field in fields:
        if field not in row.values:
            raise DataError(
                f"{row.place} has no field {field!r}; it has {', '.join(sorted(row.values)) or 'none'}; "
                f"needed are {', '.join(fields)}."
            )
    return tuple(row.values[field] for field in fields)


def need_text(row: Row, *fields: str) -> tuple[str, ...]:
    """Like `need`, for fields that must hold text."""
    values = need(row, *fields)
    for field, value in zip(fields, values, strict=True):
        if not isinstance(value, str):
            raise DataError(f"{row.place}: {field!r} must be text, this is {json.dumps(value, default=str)[:60]}.")
    return values
