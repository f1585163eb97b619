"""Files that are whole or absent: written beside, then renamed; read with a word on what is wrong."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from .errors import FileError

FOLDER_NAME = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]*(/[A-Za-z0-9_+-][A-Za-z0-9_.+-]*)*")
"""A name that may be a folder's, or one inside another, and leads nowhere else."""
_NUMBERS = re.compile(r"\[\n\s*((?:-?[\d.eE+-]+,\s*)*-?[\d.eE+-]+)\n\s*\]")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LOST = (errno.EIO, errno.ENOSPC, errno.EDQUOT)
_UNFLUSHED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""what file systems answer that cannot flush"""
# safetensors and torch put what the system says into errors of their own.
_FULL_TEXT = re.compile(
    r"os error (27|28|122)\b|No space left|inline_container.*unexpected pos|PytorchStreamWriter failed|iostream error"
)
# JSON may also nest deeper than Python goes, or hold a number of more digits than Python reads.
JSON_ERRORS = (ValueError, RecursionError)
_TEMPORARY = re.compile(r"\.[0-9a-f]{12}-.+")


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; it takes `path`'s place on success and is removed on failure.

    Makes the parent folders. The temporary name keeps the suffix, by which some writers choose a format. FileError,
    naming `path`, where it cannot be written: a full disk, no permission.
    """
    with _beside_made(Path(path)) as temporary:
        try:
            yield temporary
            flush(temporary)
            _patiently(os.replace, temporary, path)
            flush(Path(path).parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The same for a folder: yields a new name beside `path`, whose folder replaces `path`'s on success."""
    path = Path(path)
    with _beside_made(path) as temporary:
        old = _beside(path)
        try:
            yield temporary
            _flush_all(temporary)
            if path.is_dir() and not path.is_symlink():
                _put_aside(path, old)
            try:
                _patiently(os.rename, temporary, path)
            except OSError:
                if old.exists():
                    old.rename(path)
                raise
            flush(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _put_aside(path: Path, old: Path) -> None:
    """Gives a folder another name; whole, or not at all."""
    try:
        # Deleting stops at the first file that Windows refuses, as one is in use.
        return _patiently(os.rename, path, old)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    # A container's file system does not rename a folder of its image, from a lower layer; it copies and deletes.
    try:
        shutil.copytree(path, old, symlinks=True)
        _flush_all(old)
    except BaseException:
        shutil.rmtree(old, ignore_errors=True)
        raise
    try:
        shutil.rmtree(path)
    except BaseException:
        shutil.copytree(old, path, symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(old, ignore_errors=True)
        raise


def _patiently(rename: Callable[[Path, Path], None], source: Path, target: str | os.PathLike[str]) -> None:
    """Windows refuses while another program reads either, as one that looks for viruses does: soon it has ended."""
    for seconds in (0.1, 0.2, 0.5, 1.2) if os.name == "nt" else ():
        with suppress(PermissionError):
            return rename(source, Path(target))
        time.sleep(seconds)
    rename(source, Path(target))


def _flush_all(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        flush(path)


def flush(path: Path) -> None:
    """Waits until a file's content, or a folder's names, are on the disk: after a power cut a name may be there whose
    content was in memory alone. Where the system has no way to do so, what is written stays written."""
    if os.name == "nt" or path.is_symlink():  # Windows flushes no folders; a link has no content
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # A folder that may be written need not be readable, and file systems refuse to flush folders in many ways.
        is_lost = error.errno in _LOST if path.is_dir() else error.errno not in _UNFLUSHED
        if is_lost:
            raise


def check_writable(path: str | os.PathLike[str]) -> None:
    """FileError, naming `path`, where it could not be written later. Leaves nothing behind."""
    path = Path(path)
    temporary = _beside(path)
    made = [folder for folder in path.absolute().parents if not folder.exists()]
    with _named(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()


def _beside(path: Path) -> Path:
    if not path.name:
        raise FileError(f"{str(path)!r} has no name that could be written: give a file or a folder")
    return path.with_name(f".{uuid.uuid4().hex[:12]}-{path.name}")


@contextmanager
def _beside_made(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, in its folder, which is made."""
    temporary = _beside(path)
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Tells what the system refuses to write as one FileError with the path."""
    try:
        yield
    except Exception as error:
        if is_full(error):
            raise FileError(f"{path} cannot be written: {full_disk(path)}; what was there is as it was") from error
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise FileError(f"{path} cannot be written ({reason}): check the path and its permissions") from error
        raise


def is_full(error: BaseException) -> bool:
    """Whether a write failed because the disk, a quota or the allowed size of a file is used up."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return not isinstance(error, FileError) and _FULL_TEXT.search(str(error)) is not None


def full_disk(path: Path) -> str:
    """What to say of it: how much is free where `path` is, and the fix."""
    there = next((folder for folder in (path, *path.absolute().parents) if folder.is_dir()), Path("/"))
    free = shutil.disk_usage(there).free / 1e6
    return (
        f"the disk or a quota is full, or a file has the largest size that is allowed ({free:,.1f} MB are free); make "
        "room, or write to another disk"
    )


def remove_leftovers(folder: Path, min_age: float = 0) -> None:
    """Deletes what processes that were killed had half written beside files of `folder`. Nobody else may be writing
    there, or not for `min_age` seconds at one of them."""
    for path in folder.iterdir():
        with suppress(OSError):  # just gone; on Windows, in use
            if _TEMPORARY.fullmatch(path.name) and (not min_age or time.time() - path.stat().st_mtime > min_age):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def append_to(path: str | os.PathLike[str], mode: str = "a", buffering: int = -1) -> IO[Any]:
    """Opens a file of our own to append to it, UTF-8 where it is text. A folder may come from somebody else: FileError
    where the name is a link, whose target would be written to, or no file."""
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe without a reader must not wait
    path = Path(path)
    try:
        file = open(
            path, mode, buffering, None if "b" in mode else "utf-8", opener=lambda name, own: os.open(name, own | flags)
        )
    except OSError as error:
        if path.is_symlink():
            raise FileError(f"{path} is a link: delete it, and nothing else is written to") from error
        if path.exists() and not path.is_file():
            raise FileError(f"{path} is no file: delete it, or give another folder") from error
        raise
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        file.close()
        kind = "a link" if stat.S_ISREG(found.st_mode) else "no file"
        raise FileError(f"{path} is {kind}: delete it, and nothing else is written to")
    return file


def file_in(path: str | os.PathLike[str], name: str) -> Path:
    """`path` itself where it is a file or ends like `name`; otherwise a folder, so `path/name`."""
    path = Path(path)
    return path if path.is_file() or path.suffix == Path(name).suffix else path / name


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text, whole or not at all. FileError: as `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Indented JSON, with each list of numbers on one line. JSON has no NaN or infinity: they become null."""
    text = json.dumps(finite(obj), indent=2, ensure_ascii=False, allow_nan=False)
    # A JSON string holds no raw line break, so this touches lists only.
    text = _NUMBERS.sub(lambda found: "[" + " ".join(found[1].split()) + "]", text)
    write_text(path, text + "\n")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file. FileError, naming the file, where it is missing, cut short or foreign."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        obj = whole_text(json.loads(text, object_pairs_hook=unique_keys), text)
    except FileNotFoundError:
        raise FileError(f"{path} does not exist: check the path, or run the step that writes it") from None
    except OSError as error:
        raise FileError(f"{path} cannot be read ({error.strerror}): give a readable JSON file") from error
    except JSON_ERRORS as error:
        raise FileError(
            f"{path} is not whole JSON ({error}): it was cut short or is another kind of file; "
            "write it again or restore a copy"
        ) from error
    if not isinstance(obj, dict):
        raise FileError(f"{path} holds a JSON {type(obj).__name__}, not an object: another kind of file")
    return obj


def read_json_lines(path: str | os.PathLike[str], *keys: str) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, each with `keys`. FileError, naming file and line, if not.

    A last line without its line break is still being written, and is left out.
    """
    rows = []
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                if not line.endswith("\n"):
                    break
                row = whole_text(json.loads(line), line)
                if not isinstance(row, dict) or not all(key in row for key in keys):
                    raise ValueError(f"an object with {', '.join(keys) or 'any keys'} was expected")
                rows.append(row)
    except OSError as error:
        raise FileError(f"{path} cannot be read ({error.strerror}): check the path") from error
    except JSON_ERRORS as error:
        raise FileError(f"{path}, line {len(rows) + 1}: {error}; write the file again") from error
    return rows


def visible_files(folder: Path, pattern: str = "**/*") -> list[Path]:
    """The files below `folder` by `pattern`, in order, but for those that are hidden in it."""
    found = (file for file in folder.glob(pattern) if file.is_file())
    return sorted(file for file in found if not any(part[0] == "." for part in file.relative_to(folder).parts))


def whole_text(obj: Any, source: str) -> Any:
    """`obj`, which the JSON in `source` says; ValueError where a text in it holds half a character: JSON can write one
    half of a surrogate pair, and nothing can encode it."""
    if "\\u" in source and (half := half_character(obj)):
        raise ValueError(f"a text holds half a character ({half}), which is none")
    return obj


def half_character(obj: Any) -> str:
    """The first lone surrogate in an object's texts, as `\\ud83d`; empty where there is none."""
    try:
        json.dumps(obj, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return ascii(error.object[error.start])[1:-1]
    return ""


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file's bytes."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FileError(f"{path} cannot be read ({error.strerror}): check the path") from error


class RepeatedKeyError(ValueError):
    """An object in JSON has a key twice."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, as `object_pairs_hook`: of a key that is repeated Python would keep the last value."""
    obj = dict(pairs)
    if len(obj) != len(pairs):
        keys = [key for key, _ in pairs]
        raise RepeatedKeyError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return obj


def finite(obj: Any) -> Any:
    """With None for each NaN and infinity, which JSON has no word for."""
    if isinstance(obj, dict):
        return {key: finite(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [finite(value) for value in obj]
    return None if isinstance(obj, float) and not math.isfinite(obj) else obj
