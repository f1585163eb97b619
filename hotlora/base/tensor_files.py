"""Safetensors files of hotlora's own: tensors and JSON under a name and a version, with a hash of both."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import FileError
from .files import JSON_ERRORS, atomic_path


def save_tensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], meta: Mapping[str, Any], *, format: str, version: str
) -> None:
    """Writes a file with the tensors, and in its metadata `format`, `version`, `meta` as JSON, and the SHA-256."""
    text = json.dumps(meta)
    head = {"format": format, "version": version, "json": text, "sha256": digest_of(tensors, text)}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, head)


def load_tensors(
    path: str | os.PathLike[str], *, format: str, version: str, what: str, fix: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the meta of a file that `save_tensors` wrote; the hash is compared where the file has one.

    FileError, naming the file, `what` it should be and the `fix`: it is missing, cut short, foreign or altered.
    """
    file = Path(path)
    if not file.is_file():
        raise FileError(f"{file} does not exist: check the path, or {fix}")
    try:
        with safe_open(file, "pt") as stored:
            head = stored.metadata() or {}
            if head.get("format") != format:
                raise FileError(f"{file} is a safetensors file, but not a {what}: {fix}")
            if head.get("version") != version:
                raise FileError(f"{file} has version {head.get('version')!r}, this hotlora reads {version!r}: {fix}")
            # Copied out of the map: Windows replaces no file that is mapped, as a profile may be while it is in use.
            tensors = {name: stored.get_tensor(name).clone() for name in stored.keys()}
            text = head["json"]
        # Older files have none.
        if head.get("sha256", found := digest_of(tensors, text)) != found:
            raise FileError(f"{file} is damaged: its content is not what was written (another SHA-256): {fix}")
        meta = json.loads(text)
    except (OSError, SafetensorError, KeyError, *JSON_ERRORS) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{file} is not a whole {what} ({error}): {fix}") from error
    if not isinstance(meta, dict):
        raise FileError(f"{file} is not a whole {what} (its json is no object): {fix}")
    return tensors, meta


def digest_of(tensors: Mapping[str, Tensor], text: str) -> str:
    """Hex SHA-256 of the JSON and of every tensor's name, dtype, shape and values, by name."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
