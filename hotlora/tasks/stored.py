"""Rows in a file that is mapped, instead of in memory: what 100,000 conversations hold would be a gigabyte."""

import json
import mmap
import os
import shutil
import tempfile
import time
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any, overload

import pyarrow as pa
from datasets.table import MemoryMappedTable

from ..base.errors import FileError
from ..base.files import full_disk, is_full
from .task import Example

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_PREFIX, _FILE = "hotlora-rows-", "rows.arrow"
_MIN_AGE = 60  # seconds: a file that was just made may not be locked yet
_AT_A_TIME = 500  # rows
_SCHEMA = pa.schema(
    {
        "prompt": pa.large_string(), "completion": pa.large_string(), "choices": pa.list_(pa.string()),
        "label": pa.int64(), "meta": pa.string(), "text": pa.large_string(), "spans": pa.list_(pa.list_(pa.int64())),
        "place": pa.string(), "format": pa.string(), "source_hash": pa.string(),
    }
)  # fmt: skip


def mapped_table(parts: Iterable[pa.Table], schema: pa.Schema) -> MemoryMappedTable:
    """The parts as one table, in a temporary file that is deleted when no table that was made of it is in use any more.

    FileError: the folder of temporary files cannot be written to.
    """
    with _told():
        _remove_leftovers()
        folder = tempfile.mkdtemp(prefix=_PREFIX)
    file = Path(folder) / _FILE
    try:
        with _told(), open(file, "x+b") as opened:
            _lock(opened, wait=True)
            with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
                for part in parts:
                    writer.write_table(part)
            content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)  # keeps the file open, and so its lock
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    # Every array of every table that is made of this one keeps the map, whichever of the tables live on. By its path
    # `datasets` opens the file again, in each process that it starts.
    weakref.finalize(content, _remove, folder, os.getpid())
    return MemoryMappedTable(pa.ipc.open_stream(pa.py_buffer(content)).read_all(), str(file))


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # and no fork of it
        shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers() -> None:
    """Deletes what processes that were killed left: files whose lock nobody holds. Windows, without locks, deletes none
    that is in use, also when its own process ends."""
    for file in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_FILE}"):
        with suppress(OSError):  # another user's, or just gone, or in use
            if time.time() - file.stat().st_mtime > _MIN_AGE:
                with nullcontext() if fcntl is None else open(file, "rb") as opened:
                    if opened is None or _lock(opened):
                        file.unlink()
                        file.parent.rmdir()


def _lock(opened: IO[bytes], *, wait: bool = False) -> bool:
    """Whether it could be locked; a lock ends with all processes that have the file open."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # held by another process, or the file system has no locks
        return False
    return True


@contextmanager
def _told() -> Iterator[None]:
    """What the system refuses, as a FileError."""
    try:
        yield
    except OSError as error:
        folder = next((place for place in (tempfile.tempdir, os.environ.get("TMPDIR")) if place), "/tmp")
        reason = full_disk(Path(folder)) if is_full(error) else error.strerror or error
        raise FileError(
            f"{folder} cannot be written to ({reason}), and the rows of the data are kept there while they are in use: "
            "name another folder in TMPDIR"
        ) from error


class StoredExamples(Sequence[Example]):
    """Examples in a file. Each is made anew when it is asked for."""

    def __init__(self, table: MemoryMappedTable, places: Sequence[int] | None = None) -> None:
        """places: the table's rows that these examples are, in order; None: all."""
        self._table = table
        self._places: Sequence[int] = range(table.num_rows) if places is None else array("q", places)

    @classmethod
    def write(cls, examples: Iterable[Example]) -> "StoredExamples":
        remaining = iter(examples)
        some = iter(lambda: list(islice(remaining, _AT_A_TIME)), [])
        return cls(mapped_table(map(_as_table, some), _SCHEMA))

    def picked(self, places: Iterable[int]) -> "StoredExamples":
        """Those at `places` among these."""
        return StoredExamples(self._table, [self._places[place] for place in places])

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        if isinstance(place, slice):
            return self._read(self._places[place])
        return self._read([self._places[place]])[0]

    def __iter__(self) -> Iterator[Example]:
        for start in range(0, len(self), _AT_A_TIME):
            yield from self[start : start + _AT_A_TIME]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as a list's

    def __repr__(self) -> str:
        return f"<{len(self):,} examples>"

    def _read(self, places: Sequence[int]) -> list[Example]:
        if isinstance(places, range) and places.step == 1:
            found = self._table.slice(places.start, len(places))
        else:
            found = self._table.fast_gather(list(places)) if len(places) else self._table.slice(0, 0)
        return [_as_example(row) for row in found.to_pylist()]


def _as_table(examples: Sequence[Example]) -> pa.Table:
    rows = [{**vars(example), "meta": json.dumps(example.meta)} for example in examples]
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def _as_example(row: dict[str, Any]) -> Example:
    spans = tuple((start, stop) for start, stop in row["spans"])
    return Example(**{**row, "meta": json.loads(row["meta"]), "spans": spans, "choices": tuple(row["choices"])})
