"""Which form a file is of, and what it says."""

import gzip
import json
import os
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO

from ...base.errors import DataError, FileError
from . import arrays, esft
from .found import Found, Known, together, whole
from .logits import MASK, read_logits
from .routed import counted
from .tables import is_counts, read_counts, read_tables

Files = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
_FORMS = (
    "counts as JSON or an array, counts of each example, ESFT's expert scores or summary.json, REAP-style saliency, "
    "routed experts of vLLM or SGLang (.npy, .npz, .safetensors, .json, .jsonl) or router_logits: docs/import.md has "
    "each"
)


def read_routing(files: Files, known: Known) -> Found:
    """What the files say, of whatever form, added up. FileError, DataError: as `imported.import_profile`."""
    paths = [Path(file) for file in ([files] if isinstance(files, str | os.PathLike) else files)]
    if not paths:
        raise DataError("no file was given: give one or several")
    if len({path.resolve() for path in paths}) < len(paths):
        raise DataError(f"a file is given twice: {', '.join(map(str, paths))}"[:400])
    text = [part for path in paths for part in (_files_in(path) if path.is_dir() else [path])]
    if any(map(esft.is_esft, text)):
        if not all(map(esft.is_esft, text)):
            raise DataError(f"{text[0]} and {text[-1]} are of two forms: import files of one form together")
        return esft.read_esft(text, known)
    found = []
    for path in text:
        if not path.is_file():
            raise FileError(f"{path} does not exist, or is no file: check the path")
        with whole(path):
            found.append((path, _read_file(path, known)))
    return together(found)


def _files_in(folder: Path) -> list[Path]:
    """ESFT's, where there are any; else all whose names end as those of a form. FileError where there is none."""
    endings = (".npy", ".npz", ".safetensors", ".json", ".jsonl", ".json.gz", ".jsonl.gz")
    found = esft.files_in(folder) or sorted(path for path in folder.iterdir() if path.name.endswith(endings))
    if not found:
        raise FileError(
            f"{folder} is a folder without ESFT's expert_weights_LAYER.txt, and without files in {', '.join(endings)}: "
            "give a folder that has them, or files"
        )
    return found


def _read_file(file: Path, known: Known) -> Found:
    with open(file, "rb") as stream:
        head = stream.read(16)
    if head.startswith(b"\x93NUMPY"):
        return _arrays(arrays.npy(file), file, known)
    is_torch = file.suffix in (".pt", ".pth", ".pkl", ".bin")
    if head.startswith(b"PK") and not is_torch:  # torch.save writes a zip file, too
        return _arrays(arrays.npz(file), file, known)
    if head[8:9] == b"{" and file.suffix == ".safetensors":
        return _arrays(arrays.safetensors(file), file, known)
    if head.startswith(b"\x80") or is_torch:
        raise FileError(
            f"{file} is pickled, or no file of routing: nothing is unpickled; save it as .safetensors or .npz"
        )
    return _json(file, known)


def _json(file: Path, known: Known) -> Found:
    """JSON, or JSON lines, of which each is an answer of a server; gzip or not."""
    with _opened(file) as stream:
        first = stream.readline()
        try:
            data = json.loads(first)
        except ValueError:
            data = None
        rest = stream.readline() if data is not None else b""
        if data is not None and rest.strip():
            lines = (json.loads(line) for line in _lines(first, rest, stream))
            blocks = arrays.answers(lines, file, known)
            if (one := next(blocks, None)) is None:
                raise FileError(
                    f"{file}: no line has routed_experts with a token in them: start vLLM or SGLang with "
                    "--enable-return-routed-experts, and for SGLang ask for return_routed_experts in each request"
                )
            return counted(chain([one], blocks), None, file, known)
        if data is None:
            data = json.loads(first + stream.read())
    if isinstance(data, dict) and "scores" in data and "version" in data:
        raise FileError(f"{file} is a file of scores already: give it to --rule scores")
    if isinstance(data, dict) and (found := read_tables(data, file, known)) is not None:
        return found
    blocks = arrays.answers(iter([data]), file, known)
    if (one := next(blocks, None)) is None:
        raise FileError(f"{file} holds no routing that is known: it may hold {_FORMS}")
    return counted(chain([one], blocks), None, file, known)


def _lines(first: bytes, second: bytes, stream: IO[bytes]) -> Iterator[bytes]:
    yield first
    yield second
    yield from (line for line in stream if line.strip())


def _opened(file: Path) -> IO[bytes]:
    with open(file, "rb") as stream:
        is_gzip = stream.read(2) == b"\x1f\x8b"
    return gzip.open(file) if is_gzip else open(file, "rb")  # type: ignore[return-value]


def _arrays(stored: list[arrays.Stored], file: Path, known: Known) -> Found:
    by_name = {array.name: array for array in stored}
    if not by_name:
        raise FileError(f"{file} holds no array")
    if {"counts", "mass"} <= set(by_name) <= {"counts", "mass", "saliency"}:
        raise FileError(f"{file} is a profile already: give it to --profile")
    numbers = {name: array for name, array in by_name.items() if name != MASK}
    is_float = {array.dtype.kind == "f" or array.is_bfloat16 for array in numbers.values()}
    if len(is_float) != 1:
        raise DataError(
            f"{file} holds floats and integers ({', '.join(sorted(by_name))[:200]}): keep those of one kind"
        )
    if is_float == {True}:
        return read_logits(by_name, file, known)
    if len(numbers) == 1 and is_counts((array := next(iter(numbers.values()))).shape, known):
        return read_counts(array.rows(0, array.shape[0]), file, known)
    blocks, layers = arrays.routed(numbers)
    return counted(iter(blocks), layers, file, known)
