"""One run at a time in a folder: a lock that ends with the process that holds it, however that ends."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from .errors import FileError, HotLoraError
from .files import append_to, remove_leftovers

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
_DAY = 24 * 3600
_log = logging.getLogger(__name__)
_held: dict[Path, int] = {}
"""folder -> the process that locked it: a fork inherits this dict, and not the lock"""


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keeps other processes from `folder`, which is made, while inside. This process may lock it again.

    Of several ranks the first one locks. Not on Windows, and not where the file system has no locks (the log says so).

    HotLoraError: another process has it; the message says which. FileError: the folder cannot be written to, or its
    lock is a link.
    """
    folder = Path(folder).absolute()
    if fcntl is None and folder.is_dir():
        remove_leftovers(folder, _DAY)
    if fcntl is None or os.environ.get("RANK", "0") != "0" or _held.get(folder) == os.getpid():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Without a buffer: what a full disk refuses must not be tried again when the file is closed.
        file = append_to(folder / NAME, "ab+", buffering=0)
    except OSError as error:
        raise FileError(f"{folder} cannot be written to ({error.strerror}): give another folder") from error
    with file:
        file.seek(0)
        there = file.read(1000)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = there.decode(errors="replace").partition("\n")[0].strip() or "another process"
            raise HotLoraError(
                f"{folder} is in use by {holder}: wait for it, or end it, or give another folder (--output)."
            ) from None
        except OSError as error:
            _log.warning("%s cannot be locked (%s): see that nothing else runs in it", folder, error.strerror)
        holder = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M}\n"
        if not there or there.startswith(b"process "):  # else it is another program's
            with suppress(OSError):  # a full disk; the lock holds all the same
                file.truncate(0)
                file.write(holder.encode())
        remove_leftovers(folder)
        _held[folder] = os.getpid()
        try:
            yield
        finally:
            del _held[folder]
