"""Arrays of expert ids or router logits: .npy, .npz, safetensors, and servers' answers as JSON or JSON lines.

Nothing is unpickled, and files are read piece by piece.
"""

import base64
import binascii
import io
import json
import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from ...base.errors import DataError, FileError
from .found import Known
from .ids import Blocks, Ids

_MAGIC = b"\x93NUMPY"
_JOINED = 2**22
"""ids that answers are put together to"""
_KEYS = ("routed_experts", "prompt_routed_experts")
_SAFETENSORS = {
    "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8", "I64": "<i8",
    "F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "bf16",
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """An array in a file: where it begins, or the whole of it where it had to be read."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    file: Path
    offset: int = 0
    member: str | None = None
    """of a zip file"""
    is_bfloat16: bool = False
    """two bytes each, held as uint16"""

    def rows(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Of the first axis."""
        if self.member is not None:
            return self.whole_member[start:stop]
        shape = (stop - start, *self.shape[1:])
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        if not math.prod(shape):
            return np.zeros(shape, self.dtype)
        # A window, that is given back after use: the whole file would fill the process's memory.
        window = np.memmap(self.file, self.dtype, "r", self.offset + start * size, shape)
        return _as_float(window) if self.is_bfloat16 else np.asarray(window)

    @cached_property
    def flat(self) -> "Stored":
        """[A·B, C] of [A, B, C]."""
        return replace(self, shape=(self.shape[0] * self.shape[1], *self.shape[2:]))

    @cached_property
    def whole_member(self) -> np.ndarray[Any, Any]:
        assert self.member is not None
        with zipfile.ZipFile(self.file) as stored, stored.open(self.member) as stream:
            _, _, dtype = _header(stream, self.file)
            return _filled(stream.read(math.prod(self.shape) * dtype.itemsize + 1), self.shape, dtype, self.file)


def npy(file: Path) -> list[Stored]:
    """The array in a .npy file."""
    with open(file, "rb") as stream:
        fortran, shape, dtype = _header(stream, file)
        offset = stream.tell()
    _check_size(file, offset, shape, dtype)
    if fortran and len(shape) > 1:
        raise FileError(f"{file} is in Fortran's order: save it with numpy.ascontiguousarray")
    return [Stored(file.stem, shape, dtype, file, offset)]


def npz(file: Path) -> list[Stored]:
    """The arrays in a .npz file. Stored ones are read where they lie; compressed ones as a whole, one by one."""
    found = []
    with zipfile.ZipFile(file) as stored:
        for info in stored.infolist():
            with stored.open(info) as stream:
                start = stream.tell()
                fortran, shape, dtype = _header(stream, file)
                head = stream.tell() - start
            if fortran and len(shape) > 1:
                raise FileError(f"{file}: {info.filename} is in Fortran's order: save it with numpy.ascontiguousarray")
            name = info.filename.removesuffix(".npy")
            if info.compress_type != zipfile.ZIP_STORED:
                found.append(Stored(name, shape, dtype, file, member=info.filename))
                continue
            with open(file, "rb") as raw:
                raw.seek(info.header_offset)
                local = raw.read(30)
            offset = info.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(
                local[28:30], "little"
            )  # fmt: skip
            if head + math.prod(shape) * dtype.itemsize != info.file_size:
                raise FileError(
                    f"{file}: {info.filename} is cut short: {list(shape)} of {dtype} in {info.file_size - head:,} bytes"
                )
            found.append(Stored(name, shape, dtype, file, offset + head))
    return found


def safetensors(file: Path) -> list[Stored]:
    """The tensors in a safetensors file."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(size, 100_000_000):
            raise FileError(f"{file} is no safetensors file: its header would be {length:,} bytes of {size:,}")
        head = json.loads(stream.read(length))
    found = []
    for name, entry in head.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _SAFETENSORS:
            raise FileError(f"{file}: {name} is {entry['dtype']}: give integers, or float16, bfloat16 or float32")
        kind, shape = _SAFETENSORS[entry["dtype"]], tuple(int(size) for size in entry["shape"])
        dtype = np.dtype("<u2" if kind == "bf16" else kind)
        begin, end = (int(place) for place in entry["data_offsets"])
        if min((*shape, begin)) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
            raise FileError(f"{file}: {name} is damaged: {shape} of {entry['dtype']} in {end - begin:,} bytes")
        _check_size(file, 8 + length + begin, shape, dtype)
        found.append(Stored(name, shape, dtype, file, 8 + length + begin, is_bfloat16=kind == "bf16"))
    return found


def routed(arrays: Mapping[str, Stored]) -> tuple[list[Blocks], tuple[int, ...] | None]:
    """Integer arrays as blocks [T, L, K]: each one of three axes; or one a layer, [T, K], with the layer's number in
    its name, which then are the second part."""
    shapes = {array.shape for array in arrays.values()}
    if all(len(shape) == 3 for shape in shapes):
        return [Blocks(array.shape, array.rows) for array in arrays.values()], None
    file = next(iter(arrays.values())).file
    layers = by_layer(
        arrays, file,
        "expert ids [tokens, layers, k]; counts [layers, experts] with --model CONFIG, or as JSON, "
        '{"counts": [[...], ...]}; or expert ids [tokens, k] for each layer',
    )  # fmt: skip
    if len(shapes) > 1:
        raise DataError(f"{file}: layers have {sorted(shapes)} expert ids: each must have [tokens, k] of the same")
    ((num_tokens, top_k),) = shapes
    columns = list(layers.values())

    def read(start: int, stop: int) -> Ids:
        return np.stack([column.rows(start, stop) for column in columns], axis=1)

    return [Blocks((num_tokens, len(columns), top_k), read)], tuple(layers)


def by_layer(arrays: Mapping[str, Stored], file: Path, wanted: str) -> dict[int, Stored]:
    """Two-axis arrays by the last number in their names, ascending. DataError where that is not one for each."""
    found: dict[int, Stored] = {}
    for name, array in arrays.items():
        numbers = re.findall(r"\d+", name)
        if len(array.shape) != 2 or not numbers or int(numbers[-1]) in found:
            raise DataError(
                f"{file}: {name} is {list(array.shape)}: give {wanted}, its number in its name, such as layer3"
            )
        found[int(numbers[-1])] = array
    return dict(sorted(found.items()))


def answers(rows: Iterator[Any], file: Path, known: Known) -> Iterator[Blocks]:
    """The routed experts in a server's answers, wherever they stand in them: lists, base64 of a .npy file (vLLM), or
    base64 of int32 alone (SGLang), whose shape the model's config tells. Answers are put together to large blocks."""
    held: list[Ids] = []
    for array in _arrays(rows, file, known):
        if held and array.shape[1:] != held[0].shape[1:]:
            yield _joined(held)
            held = []
        held.append(array)
        if sum(part.size for part in held) >= _JOINED:
            yield _joined(held)
            held = []
    if held:
        yield _joined(held)


def _joined(arrays: list[Ids]) -> Blocks:
    array = np.concatenate(arrays)
    return Blocks(array.shape, partial(_slice, array))


def _arrays(rows: Iterator[Any], file: Path, known: Known) -> Iterator[Ids]:
    for number, row in enumerate(rows, 1):
        for value in _values(row):
            array = _decoded(value, f"{file}, answer {number}", known)
            if array.ndim != 3 or array.dtype.kind not in "iu" or 0 in array.shape[1:]:
                raise DataError(
                    f"{file}, answer {number}: routed experts are {list(array.shape)} of {array.dtype}: they must be "
                    "integers [tokens, layers, k]"
                )
            if len(array):
                yield array


def _slice(array: Ids, start: int, stop: int) -> Ids:
    return array[start:stop]


def _values(row: Any) -> Iterator[Any]:
    left = [row]
    while left:  # JSON may nest deeper than Python calls
        here = left.pop()
        if isinstance(here, list):
            left += (part for part in here if isinstance(part, dict | list))
        elif isinstance(here, dict):
            for key, value in here.items():
                if key in _KEYS and value is not None:
                    yield value
                elif isinstance(value, dict | list):
                    left.append(value)


def _decoded(value: Any, where: str, known: Known) -> np.ndarray[Any, Any]:
    if isinstance(value, list):
        try:
            return np.array(value) if value else np.zeros((0, 1, 1), np.int64)
        except (ValueError, OverflowError) as error:
            raise DataError(f"{where}: routed experts are ragged: they must be [tokens][layers][k]") from error
    if not isinstance(value, str):
        raise DataError(f"{where}: routed experts are {str(value)[:40]!r}: they must be lists, or base64")
    try:
        data = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: routed experts are text, and no base64 ({error})") from error
    if data.startswith(_MAGIC):
        stream = io.BytesIO(data)
        fortran, shape, dtype = _header(stream, Path(where))
        if fortran and len(shape) > 1:
            raise DataError(f"{where}: routed experts are in Fortran's order: save them with numpy.ascontiguousarray")
        return _filled(stream.read(), shape, dtype, Path(where))
    if known.num_hidden_layers is None or known.num_experts_per_tok is None:
        raise DataError(
            f"{where}: routed experts are int32 without a shape, as SGLang returns them: give --model CONFIG"
        )
    size = 4 * known.num_hidden_layers * known.num_experts_per_tok
    if len(data) % size:
        raise DataError(
            f"{where}: routed experts are {len(data):,} bytes, and a token of {known.name} has "
            f"{known.num_hidden_layers} layers x {known.num_experts_per_tok} int32, {size} bytes"
        )
    return np.frombuffer(data, "<i4").reshape(-1, known.num_hidden_layers, known.num_experts_per_tok)


def _header(stream: IO[bytes], file: Path) -> tuple[bool, tuple[int, ...], np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        else:
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
    except Exception as error:  # of every kind: numpy reads the header as Python's source
        raise FileError(f"{file} holds no .npy array ({' '.join(str(error).split())[:200]})") from error
    if dtype.kind not in "iuf":
        raise FileError(f"{file} holds {dtype}, which is not read (nothing is unpickled): save integers or floats")
    return fortran, shape, dtype


def _filled(data: bytes, shape: tuple[int, ...], dtype: np.dtype[Any], file: Path) -> np.ndarray[Any, Any]:
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise FileError(f"{file} is cut short: {list(shape)} of {dtype} in {len(data):,} bytes")
    return np.frombuffer(data, dtype).reshape(shape)


def _check_size(file: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    size, wanted = file.stat().st_size, offset + math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or wanted > size:
        raise FileError(f"{file} is cut short: {list(shape)} of {dtype} would end at byte {wanted:,} of {size:,}")


def _as_float(words: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float32 of bfloat16's two bytes."""
    return (words.astype("<u4") << 16).view("<f4")
