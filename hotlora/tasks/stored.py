"""Rows in a file that is mapped, instead of in memory: what 100,000 conversations hold would be a gigabyte."""

import json
import shutil
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, overload

import pyarrow as pa
from datasets.table import MemoryMappedTable

from .task import Example

_AT_A_TIME = 500  # rows
_SCHEMA = pa.schema(
    {
        "prompt": pa.large_string(), "completion": pa.large_string(), "choices": pa.list_(pa.string()),
        "label": pa.int64(), "meta": pa.string(), "text": pa.large_string(), "spans": pa.list_(pa.list_(pa.int64())),
        "place": pa.string(), "format": pa.string(), "source_hash": pa.string(),
    }
)  # fmt: skip


def mapped_table(parts: Iterable[pa.Table], schema: pa.Schema) -> MemoryMappedTable:
    """The parts as one table, in a temporary file that is deleted when the table is let go."""
    folder = tempfile.mkdtemp(prefix="hotlora-")
    try:
        file = str(Path(folder) / "rows.arrow")
        with pa.OSFile(file, "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for part in parts:
                writer.write_table(part)
        table = MemoryMappedTable.from_file(file)
    except BaseException:
        shutil.rmtree(folder)
        raise
    weakref.finalize(table, shutil.rmtree, folder, ignore_errors=True)  # Windows deletes no file that is mapped
    return table


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
