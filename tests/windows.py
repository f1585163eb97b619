"""What Windows does, where there is none: it refuses to rename and to delete what is in use."""

import os
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any


def as_windows(monkeypatch: Any, *modules: ModuleType) -> None:
    """For these modules alone: pathlib and the standard library go on as they are."""
    for module in modules:
        monkeypatch.setattr(module, "os", SimpleNamespace(**{**vars(os), "name": "nt"}))


def in_use(*_: Any, **__: Any) -> None:
    raise PermissionError(13, "The process cannot access the file because it is being used by another process")


def refuse_what_is_open(monkeypatch: Any) -> None:
    """os.unlink, os.replace and os.rename as on Windows: not of a file that this process has open or mapped."""

    def is_open(path: Any, folder: int | None) -> bool:
        place = Path(os.readlink(f"/proc/self/fd/{folder}") if folder is not None else ".") / path
        path = str(place.absolute())
        opened = {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if os.path.islink(link)}
        return not os.path.isdir(path) and (path in opened or path in Path("/proc/self/maps").read_text())

    for name in ("unlink", "replace", "rename"):
        plain = getattr(os, name)

        def checked(*paths: Any, plain: Any = plain, dir_fd: int | None = None, **more: Any) -> None:
            if any(is_open(path, dir_fd) for path in paths):
                in_use()
            plain(*paths, **({"dir_fd": dir_fd} if dir_fd is not None else {}), **more)

        monkeypatch.setattr(os, name, checked)
