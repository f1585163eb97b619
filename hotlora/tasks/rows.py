"""Rows of JSON from a file or the hub, each with its place, so that an error can say which one is wrong."""

import csv
import functools
import gzip
import itertools
import json
import logging
import re
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..base.errors import DataError
from ..base.files import (
    JSON_ERRORS,
    RepeatedKeyError,
    half_character,
    unique_keys,
    visible_files,
)
from .arrow import json_in, without_filling

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".csv", ".tsv", ".parquet")
_SPLITS = {
    "train": ("train", "training"), "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
}  # fmt: skip
"""The names of splits in those of files, as the Hub has them."""
_HUB_ID = re.compile(r"([^:\[\]]+)(?::([^:\[\]]+))?(?::([^:\[\]]+))?(\[[^\[\]]*\])?")
_HUB_PART = re.compile(r"\[(\d*):(\d+)\]")
_TABLES = {".csv": ",", ".tsv": "\t"}
_log = logging.getLogger(__name__)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # half of a pair, or a whole one
_LONG = re.compile(r"\d{4301}")
_decoder = json.JSONDecoder(object_pairs_hook=unique_keys)
_HUB_ERRORS = (OSError, ValueError, KeyError)  # no network, no such data set or split, no such configuration


class Row(NamedTuple):
    """One row and its place: `train.jsonl line 7`."""

    place: str
    values: dict[str, Any]


def read_rows(path: str | Path) -> list[Row]:
    """All of `iter_rows`."""
    return list(iter_rows(path))


def iter_rows(path: str | Path) -> Generator[Row]:
    """Reads JSON lines, or one JSON list of objects (either may be gzipped), a CSV or TSV table with a line of names,
    or a Parquet file. Of JSON lines and Parquet only some rows are in memory at a time.

    Raises:
        DataError: no such file, no rows, invalid JSON, a row that is not an object or that holds half a character (with
            its line).
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} is not a file; give a file of rows ({', '.join(SUFFIXES)}).")
    row = None
    try:
        for row in _parse_parquet(path) if path.suffix == ".parquet" else _parse_text(path):
            if not isinstance(row.values, dict):
                raise DataError(f"{row.place}: a row must be a JSON object, this is a {type(row.values).__name__}.")
            yield row
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read ({error}); it must be UTF-8 text, gzipped UTF-8 text, or Parquet (.parquet)."
        ) from error
    if row is None:
        raise DataError(f"{path} holds no rows; give a file with at least one.")


def _parse_text(path: Path) -> Iterator[Row]:
    # newline: lines end at \n alone, as U+2028 and its like may stand inside a JSON string.
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="\n") as file:
        if path.suffix in _TABLES:
            yield from _parse_table(path, file)
            return
        first = next((line for line in file if line.strip()), "")
        file.seek(0)
        yield from _parse_list(path, file.read()) if first.lstrip().startswith("[") else _parse_lines(path, file)


def folder_rows(folder: Path, split: str) -> Generator[Row]:
    """The rows of the files in a folder, or if it has none in the folders inside, by name; of those that are called
    after splits (train.jsonl, data/test-00000.parquet), `split`'s.

    Raises:
        DataError: no such files; a data set of `save_to_disk` that is broken.
    """
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        yield from _saved_rows(folder, split)
        return
    files = _files(folder, "*") or _files(folder, "**/*")
    if not files:
        raise DataError(f"{folder} holds no files of rows ({', '.join(SUFFIXES)}); give a folder that does, or a file.")
    of = {file: _split_of(file.relative_to(folder)) for file in files}
    if any(of.values()):
        chosen = [file for file in files if of[file] == split]
        left = sorted({str(file.relative_to(folder)) for file in files if of[file] != split})
        if not chosen:
            raise DataError(f"{folder} holds no file of the split {split!r}, only {', '.join(left)}: give one of them.")
        if left:
            # Those of training and tests have their own use; of the others nothing will be read.
            unread = any(of[file] not in ("train", "test") for file in files)
            told = _log.warning if unread else _log.info
            told("%s: the split %r is read, and not %s", folder, split, ", ".join(left))
        files = chosen
    for file in files:
        yield from iter_rows(file)


def _files(folder: Path, pattern: str) -> list[Path]:
    """Those that hold rows, and not what stands beside rows."""
    beside = (".chat.json", "dataset_infos.json", "dataset_info.json")
    found = visible_files(folder, pattern)
    return [file for file in found if file.name.endswith(SUFFIXES) and not file.name.endswith(beside)]


def _split_of(path: Path) -> str | None:
    words = re.split(r"[^a-z]+", path.as_posix().lower())
    return next((split for split, names in _SPLITS.items() if any(name in words for name in names)), None)


def _saved_rows(folder: Path, split: str) -> Iterator[Row]:
    """Of a data set that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    from datasets import DatasetDict, load_from_disk

    try:
        found = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is no whole data set of save_to_disk ({error}): write it again.") from error
    if isinstance(found, DatasetDict):
        if split not in found:
            raise DataError(f"{folder} has no split {split!r}; it has {', '.join(found)}: give {folder}/SPLIT.")
        found = found[split]
    yield from dataset_rows(found, str(folder))


def dataset_rows(data: Any, where: str) -> Iterator[Row]:
    """The rows of a `datasets.Dataset` or `IterableDataset`. JSON is read from its text here: `datasets` makes
    0.7000000000000001 of 0.7 and None of NaN, and refuses 2**64."""
    has_json = json_in(data.features.arrow_schema) if data.features else {}
    given = getattr(data, "format", {})  # an IterableDataset has none
    is_decoded = given.get("type") == "custom"  # a transform of the user's takes decoded values
    # Behind map, remove_columns or rename_column a stream's are decoded, and Arrow would be made of them anew: JSON of
    # mixed types is refused there, and None stands for what an object has not.
    if has_json and (stream := getattr(data, "_ex_iterable", None)) is not None and not stream.iter_arrow:
        data, is_decoded = data.with_format(None), True
    if not has_json or is_decoded:
        for number, row in enumerate(data, start=1):
            yield Row(f"{where} row {number}", without_filling(row, has_json))
        return
    columns = {"columns": given["columns"]} if given else {}
    yield from arrow_rows(data.with_format("arrow", **columns), where)


def arrow_rows(tables: Iterable[Any], where: str) -> Iterator[Row]:
    """The rows of Arrow's tables or batches, which are parts of one."""
    number = 0
    for table in tables:
        has_json = json_in(getattr(table, "schema", ()))  # an array of structs has none
        for row in table.to_pylist():
            number += 1
            place = f"{where} row {number}"
            yield Row(place, without_filling(row, has_json, functools.partial(_read_cell, place)))


def _read_cell(place: str, text: str) -> Any:
    return _decoded(
        text, place, f"a column of JSON holds {text[:40]!r}: fix that value, or write the column as one of text"
    )


def check_characters(rows: Sequence[Row]) -> None:
    """No tokenizer, and no file, takes a lone surrogate, which JSON can hold: half of an emoji that was cut."""
    for place, values in rows:
        if half := half_character(values):
            raise DataError(
                f"{place}: holds half a character, {half} (a lone surrogate), which is no text: give the whole "
                "character, or delete it."
            )


def _parse_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if twice := given_twice(file.schema_arrow.names):
            raise DataError(f"{path} has the column {twice!r} twice: give each its own name.")
        yield from arrow_rows(file.iter_batches(1000), str(path))
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet ({error}): write it again.") from error


def _parse_table(path: Path, file: Iterable[str]) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    done = 0
    reader = csv.DictReader(file, delimiter=_TABLES[path.suffix], strict=True)
    try:
        if twice := given_twice(reader.fieldnames or ()):
            raise DataError(f"{path} has the column {twice!r} twice: give each its own name.")
        done = reader.line_num
        for row in reader:
            fields = [*row.pop(None, []), *row.values()]  # more than names; None: fewer
            start = reader.line_num - sum(field.count("\n") for field in fields if field is not None)
            done = reader.line_num
            if len(fields) > len(row) or None in fields:
                raise DataError(
                    f"{path} line {start}: has not as many fields as the first line has names: quote a text "
                    "that holds the separator, quotes or line ends."
                )
            yield Row(f"{path} line {start}", dict(row))
    except csv.Error as error:
        raise DataError(f"{path} line {done + 1} is no table's ({error}): quote texts as CSV does.") from error


def given_twice(names: Sequence[str]) -> str | None:
    """A name that is there more than once: of two columns, readers give the last one."""
    return next((name for name, number in Counter(names).items() if name and number > 1), None)


def _parse_lines(path: Path, file: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            place = f"{path} line {number}"
            yield Row(place, _decoded(line.rstrip("\r\n"), place, "each line must be one whole JSON object"))


def _decoded(text: str, place: str, needed: str) -> Any:
    try:
        value = _decoder.decode(text)
    except RepeatedKeyError as error:
        raise DataError(f"{place}: {error} in one object: give it once.") from error
    except JSON_ERRORS as error:
        raise DataError(f"{place} is not valid JSON ({_why(error)}); {needed}.") from error
    if _SURROGATE.search(text):
        check_characters([Row(place, value)])
    return value


def _parse_list(path: Path, text: str) -> Iterator[Row]:
    try:
        values = _decoder.decode(text)
    except RepeatedKeyError as error:
        raise DataError(f"{path} row {_first_refused(text)}: {error} in one object: give it once.") from error
    except JSON_ERRORS as error:
        long = _LONG.search(text)
        at = error.lineno if isinstance(error, json.JSONDecodeError) else long and text.count("\n", 0, long.start()) + 1
        raise DataError(f"{path}{f' line {at}' if at else ''} is not valid JSON ({_why(error)}).") from error
    rows = [Row(f"{path} row {number}", row) for number, row in enumerate(values, start=1)]
    if _SURROGATE.search(text):
        check_characters(rows)
    yield from rows


def _first_refused(text: str) -> int:
    """The number of the first row, in the text of a list, that has a key twice."""
    place = text.index("[") + 1
    number = 1
    while True:
        while text[place] in " \t\r\n,":
            place += 1
        try:
            _, place = _decoder.raw_decode(text, place)
        except RepeatedKeyError:
            return number
        number += 1


def _why(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    if isinstance(error, ValueError):
        return "a number of more than 4,300 digits, which Python does not read; write it as text"
    return str(error)


def hub_rows(name: str, split: str, config: str | None = None) -> Generator[Row]:
    """The rows of a data set on the Hugging Face Hub, or in its local cache, one after the other.

    Of a part `[a:b]` of a split that is not in the cache no more is read than that; a whole split, and any other part,
    is first prepared in the cache by `datasets`.

    name: `owner/name`, with a configuration, a split, or both behind it, and a part of the split in brackets:
        `owner/name:config:split[:1000]`. What stands there comes before `split` and `config`.
    """
    import datasets

    from ..hf.connection import unreachable

    found = _HUB_ID.fullmatch(name)
    if found is None:
        raise DataError(f"{name!r} is no Hub id: give it as owner/name, owner/name:split or owner/name:config:split.")
    name, first, second, part = found[1], found[2], found[3], found[4] or ""
    is_cached = (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir()
    if not is_cached and (away := unreachable()):
        raise DataError(
            f"{name!r} is no file or folder here, and the Hub cannot be reached ({away}): check the path, or the "
            "network."
        )
    ways = [(config, split)]
    if second:
        ways = [(first, second)]
    elif first:  # a configuration, or else a split
        ways = [(first, split), (config, first)]
    error: Exception | None = None
    for config, split in ways:
        try:
            rows = _hub_split(name, config, split, part)
        except (*_HUB_ERRORS, datasets.exceptions.DatasetsError) as failed:
            error = error or failed
            continue
        yield from _placed(*rows, f"{name} {split}{part}")
        return
    tried = " or ".join(f"split {split + part!r}" + (f" of {config!r}" if config else "") for config, split in ways)
    raise DataError(
        f"The data set {name!r} ({tried}) cannot be loaded from the Hub: {error}. Check its name and the network, or "
        "give a local file."
    ) from error


def _hub_split(name: str, config: str | None, split: str, part: str) -> tuple[Any, int | None]:
    """A data set, and how many of its rows are meant; None: all."""
    import datasets

    found = _HUB_PART.fullmatch(part)
    if found is not None:
        prepared = Path(datasets.load_dataset_builder(name, config).cache_dir)
        if not (prepared / "dataset_info.json").is_file():
            start, stop = int(found[1] or 0), int(found[2])
            rows = datasets.load_dataset(name, config, split=split, streaming=True)
            return rows.skip(start), max(stop - start, 0)  # `take` would look for one row more
    return datasets.load_dataset(name, config, split=split + part), None


def _placed(data: Any, most: int | None, where: str) -> Iterator[Row]:
    number = 0
    try:
        for row in itertools.islice(dataset_rows(data, where), most):
            number += 1
            yield row
    except DataError:  # a row's own
        raise
    except Exception as error:  # of the network, of `datasets`, of Arrow
        raise DataError(
            f"{where} cannot be read to its end, after row {number} ({type(error).__name__}: {error}): the Hub or its "
            "data set fails; try again, or give a local file."
        ) from error
    if not number:
        raise DataError(f"{where} holds no rows; give a part with at least one.")


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
        return list(hub_rows(hub, split, config))
    path = Path(source).expanduser()
    if path.is_dir():
        return read_rows(split_file(path, files))
    if path.is_file() or path.suffix or source.count("/") != 1:
        if not path.is_file():
            raise DataError(f"{task}: {source} does not exist; give a file, a folder holding {files[0]}, or a hub id.")
        return read_rows(path)
    return list(hub_rows(source, split, config))


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
