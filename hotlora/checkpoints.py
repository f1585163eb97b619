"""Training that is killed and goes on: which checkpoint is whole, and whether it belongs to the same run."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from .errors import HotLoraError
from .files import atomic_path, read_json, write_json

_MARK = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def mark_complete(checkpoint: Path) -> None:
    """Writes, last of all, a mark with every file's size: a checkpoint without it was cut short."""
    sizes = {str(p.relative_to(checkpoint)): p.stat().st_size for p in sorted(checkpoint.rglob("*")) if p.is_file()}
    sizes.pop(_MARK, None)
    write_json(checkpoint / _MARK, {"version": 1, "files": sizes})


def is_complete(checkpoint: Path) -> bool:
    """Whether the mark is there and every file that it names has its size."""
    try:
        sizes = read_json(checkpoint / _MARK)["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (HotLoraError, OSError, KeyError):
        return False


def last_complete(folder: Path) -> Path | None:
    """The furthest whole checkpoint in `folder`; None where there is none."""
    complete = [path for _, path in _checkpoints(folder) if is_complete(path)]
    return complete[-1] if complete else None


def remove_incomplete(folder: Path) -> None:
    """Deletes what a kill left half-written, so that it is neither counted nor rotated as a checkpoint."""
    for _, path in _checkpoints(folder):
        if not is_complete(path):
            shutil.rmtree(path)


def step_of(checkpoint: Path | None) -> int:
    """The optimizer step that a checkpoint was taken after; 0 for None."""
    found = _NAME.fullmatch(checkpoint.name) if checkpoint else None
    return int(found[1]) if found else 0


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    paths = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted((step_of(path), path) for path in paths)


def check_same(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    """Raises HotLoraError, naming each option that differs, unless `folder` holds a run with the same."""
    new = json.loads(json.dumps(new))  # as the file holds it: lists for tuples
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if keys:
        differences = ", ".join(f"{key} was {_show(old.get(key))} and is {_show(new.get(key))}" for key in keys)
        raise HotLoraError(
            f"{folder} holds another run: {differences}. Give the same options to go on with it, another "
            "folder to start a new run, or delete the folder."
        )


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_metrics(path: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """The rows of a metrics file up to `last_step`; a last line that a kill cut short is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            if last_step is not None and row["step"] > last_step:
                break
            rows.append(row)
    return rows


def write_metrics(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replaces the file by `rows`."""
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
