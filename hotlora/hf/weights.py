"""Whether a model is what it was: its files, told apart without reading gigabytes."""

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import huggingface_hub

from ..base.errors import FileError
from .models import model_source

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_BESIDE = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt")
_BLOCK = 4096
_SMALL_FILE, _SMALL_TENSOR = 2**26, 2**20  # bytes that are read in whole
_FURTHEST = 2**22
"""bytes from a block to the next: less than an expert has in a checkpoint of gigabytes"""


def model_hash(name_or_path: str | Path) -> str | None:
    """Of a folder a SHA-256 over its config and tokenizer, and over its weights: files of up to 64 MB in whole; of
    larger ones all tensors of up to 1 MB (norms, routers), and evenly spaced blocks of the others. The same for a copy
    of it, another wherever a matrix was changed. 60 GB cost about 100 MB, in 20,000 reads.

    Of a name on the Hub the commit in its cache, None where there is none: the network is not asked.
    """
    source = model_source(name_or_path)
    folder = Path(source)
    if not folder.is_dir():
        cached = huggingface_hub.try_to_load_from_cache(source, "config.json")
        return Path(cached).parent.name if isinstance(cached, str) else None
    read = []
    for patterns, is_whole in ((_BESIDE, True), (_WEIGHTS, False)):
        for file in sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}):
            found = file.stat()
            read.append((file, found.st_size, found.st_mtime_ns, is_whole))
    return _hash(tuple(read))


@functools.lru_cache(maxsize=16)
def _hash(files: tuple[tuple[Path, int, int, bool], ...]) -> str:
    """Of files by their sizes and times: a sweep scores one model many times."""
    digest = hashlib.sha256()
    for file, _, _, is_whole in files:
        _add(digest, file, is_whole)
    return digest.hexdigest()


def _add(digest: "hashlib._Hash", file: Path, is_whole: bool) -> None:
    try:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with open(file, "rb") as stream:
            for start, end in [(0, size)] if is_whole or size <= _SMALL_FILE else _parts(stream, file, size):
                step, block = (_FURTHEST, _BLOCK) if end - start > _SMALL_TENSOR and not is_whole else (2**20, 2**20)
                for place in range(start, end, step):
                    stream.seek(place)
                    digest.update(stream.read(min(block, end - place)))
    except OSError as error:
        raise FileError(f"{file} cannot be read ({error.strerror}): check the path") from error


def _parts(stream: BinaryIO, file: Path, size: int) -> Iterator[tuple[int, int]]:
    """Where each tensor is, by a safetensors file's header, which is the first part; all of other files."""
    if file.suffix != ".safetensors":
        yield 0, size
        return
    try:
        begin = 8 + int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(min(begin - 8, size)))
        places = sorted(its["data_offsets"] for name, its in header.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError):  # broken: loading tells it
        yield 0, size
        return
    yield 0, begin
    for start, end in places:
        yield begin + start, begin + end
