"""What Windows does, where there is none: it refuses to rename and to delete what is in use."""

import os
from types import ModuleType, SimpleNamespace
from typing import Any


def as_windows(monkeypatch: Any, *modules: ModuleType) -> None:
    """For these modules alone: pathlib and the standard library go on as they are."""
    for module in modules:
        monkeypatch.setattr(module, "os", SimpleNamespace(**{**vars(os), "name": "nt"}))


def in_use(*_: Any, **__: Any) -> None:
    raise PermissionError(13, "The process cannot access the file because it is being used by another process")
