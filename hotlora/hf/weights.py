"""Whether a model is what it was: its files, told apart without reading gigabytes."""

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import huggingface_hub

from ..base.errors import FileError
from ..base.files import read_json, sha256_file
from .models import model_source

_TRAINED_ON = ("config.json", "tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt")
_FILES = (*_TRAINED_ON, "generation_config.json", "*.safetensors", "pytorch_model*.bin")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""where transformers looks for weights: the first that is there"""
_BLOCK = 4096
_SMALL_FILE, _SMALL_TENSOR = 2**26, 2**20  # bytes that are read in whole
_FURTHEST = 2**22
"""bytes from a block to the next, at most: in a tensor of experts each has a block of its own, however small it is"""


def model_hash(name_or_path: str | Path) -> str | None:
    """`folder_hash`; of a name on the Hub the commit in its cache, or None: the network is not asked."""
    if found := folder_hash(name_or_path):
        return found
    cached = huggingface_hub.try_to_load_from_cache(model_source(name_or_path), "config.json")
    return Path(cached).parent.name if isinstance(cached, str) else None


def folder_hash(name_or_path: str | Path) -> str | None:
    """Of a folder a SHA-256 over its config and tokenizer, and over its weights: files of up to 64 MB in whole; of
    larger ones all tensors of up to 1 MB (norms, routers), and evenly spaced blocks of the others, at least one of each
    expert. The same for a copy of it, another wherever a matrix was changed. 60 GB cost about 100 MB, in 20,000 reads.

    None of a name on the Hub.
    """
    folder = Path(model_source(name_or_path))
    if not folder.is_dir():
        return None
    return _hashes(_told(_found(folder, _FILES)))[0]


def file_hashes(name_or_path: str | Path) -> dict[str, str]:
    """File -> hash, as `folder_hash` makes it, of those of a folder that a training reads: its config and tokenizer,
    and the weights that are loaded of it. Empty of a name on the Hub."""
    folder = Path(model_source(name_or_path))
    first = next((file for name in _WEIGHTS if (file := folder / name).is_file()), None)
    files = _found(folder, _TRAINED_ON)
    if first is not None:
        files.append(first)
    if first is not None and first.suffix == ".json":
        with suppress(FileError, KeyError, AttributeError, TypeError):  # broken: loading tells it
            files += [folder / name for name in sorted(set(read_json(first)["weight_map"].values()))]
    files = [file for file in files if file.is_file()]
    _, each = _hashes(_told(_found(folder, _FILES)))  # read once for both
    return {file.name: each.get(file) or _hashes(_told([file]))[0] for file in files}


def _found(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def _told(files: Sequence[Path]) -> tuple[tuple[Path, int, int], ...]:
    stats = [file.stat() for file in files]
    return tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in zip(files, stats, strict=True))


@functools.lru_cache(maxsize=64)
def _hashes(files: tuple[tuple[Path, int, int], ...]) -> tuple[str, dict[Path, str]]:
    """Of all files together, and of each. By their sizes and times: a sweep scores one model many times."""
    whole, each = hashlib.sha256(), {}
    for file, size, _ in files:
        own = hashlib.sha256()
        for part in _sample(file, size):
            whole.update(part)
            own.update(part)
        each[file] = own.hexdigest()
    return whole.hexdigest(), each


def _sample(file: Path, size: int) -> Iterator[bytes]:
    yield f"{file.name} {size}\n".encode()
    if size <= _SMALL_FILE:
        yield sha256_file(file).encode()
        return
    try:
        with open(file, "rb") as stream:
            for start, end, step in _parts(stream, file, size):
                is_whole = end - start <= _SMALL_TENSOR
                for place in (start,) if is_whole else range(start, end, step):
                    stream.seek(place)
                    yield stream.read(end - start if is_whole else min(_BLOCK, end - place))
    except OSError as error:
        raise FileError(f"{file} cannot be read ({error.strerror}): check the path") from error


def _parts(stream: BinaryIO, file: Path, size: int) -> Iterator[tuple[int, int, int]]:
    """Where each tensor begins and ends, by a safetensors file's header, which is the first part, and how far apart its
    blocks are; all of other files."""
    whole = 0, size, _FURTHEST
    if file.suffix != ".safetensors":
        yield whole
        return
    try:
        begin = 8 + int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(min(begin - 8, size)))
        tensors = [its for name, its in header.items() if name != "__metadata__"]
        places = sorted((*its["data_offsets"], _step(its)) for its in tensors)
    except (ValueError, KeyError, TypeError, AttributeError):  # broken: loading tells it
        yield whole
        return
    yield 0, begin, _FURTHEST
    for start, end, step in places:
        yield begin + start, begin + end, step


def _step(tensor: Mapping[str, Any]) -> int:
    """Of experts in one tensor `[E, …]` at most the bytes of an expert, so that another in its place is seen."""
    start, end = tensor["data_offsets"]
    shape = tensor.get("shape", ())
    experts = shape[0] if len(shape) > 2 else 1
    return min(_FURTHEST, max(_BLOCK, (end - start) // max(1, experts)))
