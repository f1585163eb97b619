"""Training that is killed and goes on: which checkpoint is whole, and whether it belongs to the same run."""

import json
import logging
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..base.errors import FileError, HotLoraError
from ..base.files import JSON_ERRORS, atomic_path, finite, flush, full_disk, is_full, read_json, sha256_file, write_json

_MARK = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_log = logging.getLogger(__name__)


def mark_complete(checkpoint: Path) -> None:
    """Writes, last of all, a mark with every file's size and SHA-256: a checkpoint without it was cut short."""
    files = {str(p.relative_to(checkpoint)): p for p in sorted(checkpoint.rglob("*")) if p.is_file()}
    files.pop(_MARK, None)
    for path in (*files.values(), checkpoint):
        flush(path)
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        hashes = dict(zip(files, pool.map(sha256_file, files.values()), strict=True))
    sizes = {name: path.stat().st_size for name, path in files.items()}
    write_json(checkpoint / _MARK, {"version": 1, "files": sizes, "sha256": hashes})


def is_complete(checkpoint: Path) -> bool:
    """Whether the mark is there and every file that it names has its size. Reads no weights."""
    try:
        sizes = read_json(checkpoint / _MARK)["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (HotLoraError, OSError, KeyError, AttributeError, TypeError):
        return False


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint that has a mark, by its files' hashes; None where it is whole."""
    try:
        mark = read_json(checkpoint / _MARK)
        hashes = mark.get("sha256", {})  # older marks have none
        for name, size in mark["files"].items():
            if not (file := checkpoint / name).is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes where {size} were written"
            if name in hashes and sha256_file(file) != hashes[name]:
                return f"{name} is not what was written (another SHA-256)"
    except FileError as error:
        return str(error)
    except (KeyError, AttributeError, TypeError, OSError) as error:
        return f"{_MARK} is broken ({error})"
    return None


def last_complete(folder: Path) -> Path | None:
    """The furthest checkpoint in `folder` that is complete; None where there is none."""
    complete = [path for _, path in _checkpoints(folder) if is_complete(path)]
    return complete[-1] if complete else None


def last_whole(folder: Path) -> Path | None:
    """The furthest checkpoint in `folder` whose files are what was written; a warning names each damaged one."""
    for _, path in reversed(_checkpoints(folder)):
        if not (path / _MARK).is_file():
            continue  # a kill in mid-save
        wrong = damage(path)
        if wrong is None:
            return path
        _log.warning("%s is damaged: %s; it is left out, and training resumes from the one before", path, wrong)
    return None


def remove_incomplete(folder: Path, last: Path | None = None) -> None:
    """Deletes what a kill left half-written, and what lies past `last`, the checkpoint to go on from: neither may be
    counted or rotated as a checkpoint."""
    for step, path in _checkpoints(folder):
        if not is_complete(path) or (last is not None and step > step_of(last)):
            shutil.rmtree(path)


def steps(folder: Path) -> list[int]:
    """The steps of all checkpoints in `folder`, whole or not, ascending."""
    return [step for step, _ in _checkpoints(folder)]


def step_of(checkpoint: Path | None) -> int:
    """The optimizer step that a checkpoint was taken after; 0 for None."""
    found = _NAME.fullmatch(checkpoint.name) if checkpoint else None
    return int(found[1]) if found else 0


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    paths = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted((step_of(path), path) for path in paths)


def going_on(folder: Path) -> str:
    """For a message: from where the same command resumes."""
    last = last_complete(folder)
    return f"{last} is whole: rerun the same command to resume from it" if last else "no checkpoint was written before"


@contextmanager
def told_when_full(folder: Path) -> Iterator[None]:
    """A disk that fills up while inside is one FileError that names `folder`, and its last whole checkpoint; the one
    that was being written is removed."""
    try:
        yield
    except Exception as error:
        if not is_full(error) and not (isinstance(error, FileError) and is_full(error.__cause__ or error)):
            raise
        for _, path in _checkpoints(folder):
            if not (path / _MARK).is_file():
                shutil.rmtree(path, ignore_errors=True)
        raise FileError(f"{folder} cannot be written to: {full_disk(folder)}. {_up(going_on(folder))}.") from error


def _up(text: str) -> str:
    return text[:1].upper() + text[1:]


def read_metrics(path: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """The rows of a metrics file up to `last_step`; a last line that a kill cut short is left out.

    FileError, naming file and line, where another line is no row.
    """
    rows: list[dict[str, Any]] = []
    if not path.is_file():
        return rows
    for line in path.read_bytes().split(b"\n")[:-1]:
        if last_step is not None and (rows[-1]["step"] if rows else 0) >= last_step:
            break
        try:
            row = json.loads(line)
            step = row["step"]
            if not isinstance(step, int):
                raise TypeError(f"the step is {step!r}")
        except (*JSON_ERRORS, KeyError, TypeError) as error:
            raise FileError(
                f"{path}, line {len(rows) + 1} is no row of metrics ({error}): the file was damaged; correct the line, "
                "or delete the run's folder and train again"
            ) from error
        if last_step is not None and step > last_step:
            break
        rows.append(row)
    return rows


def write_metrics(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replaces the file by `rows`."""
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(finite(row)) + "\n" for row in rows), encoding="utf-8")
