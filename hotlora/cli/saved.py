"""Which base model and adapter a command is given: a run's folder, or a saved adapter's."""

from pathlib import Path
from typing import Annotated

import typer

Base = Annotated[str | None, typer.Option("--model", "-m", help="The base (default: what the adapter notes).")]


def noted(path: Path, model: str | None) -> tuple[str, Path]:
    """(base model, adapter) of a run's folder or an adapter's."""
    from ..base.errors import FileError
    from ..runs.load import find

    found = find(path, model)
    if found.adapter is None:
        raise FileError(f"{path} is not an adapter: give the folder that save_pretrained or a training wrote it to.")
    return found.model, found.adapter


def tuned(path: Path, model: str | None) -> tuple[str, Path | None]:
    """The same; of a run of full fine-tuning its model, and no adapter."""
    from ..runs.load import find

    if (path / "run.json").is_file() and (path / "model").is_dir():
        return find(path, model).model, None
    return noted(path, model)
