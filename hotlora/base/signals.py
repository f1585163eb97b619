"""What asks a process to end: SIGTERM, from batch queues, containers and spot machines, and Ctrl-C (SIGINT)."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from .errors import Stopped

NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


@contextmanager
def on_stop(handler: Callable[[str], None]) -> Iterator[None]:
    """Calls `handler` with "SIGTERM" or "Ctrl-C" at the first of these signals, while inside.

    A second Ctrl-C ends the process at once; where the first would have been a KeyboardInterrupt, as in a notebook, the
    second is one, and the session goes on. A second SIGTERM changes nothing, nor does a second Ctrl-C under
    torchrun: launchers pass on what the process has got already. In a thread, which gets no signals, nothing changes,
    nor where a signal is ignored, as Ctrl-C is in a shell's background job.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in NAMES}
    watched = [number for number in NAMES if before[number] is not signal.SIG_IGN]
    launched = "WORLD_SIZE" in os.environ
    in_python = before[signal.SIGINT] is signal.default_int_handler
    second = signal.default_int_handler if in_python else signal.SIG_DFL

    def first(number: int, frame: Any) -> None:
        for each in watched:
            at_once = each == signal.SIGINT and not launched
            signal.signal(each, second if at_once else lambda number, frame: None)
        handler(NAMES[signal.Signals(number)])

    for number in watched:
        signal.signal(number, first)
    try:
        yield
    finally:
        for number in watched:
            signal.signal(number, before[number] or signal.SIG_DFL)


def stop(by: str) -> None:
    """A handler that unwinds, so that nothing is left half-written."""
    raise Stopped(f"stopped by {by}: nothing is half-written; run the same command again to resume", by)


def say(text: str) -> None:
    """A line on stderr from inside a handler, which may have come in the middle of another write."""
    if os.environ.get("RANK", "0") == "0":
        show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar hides it, and may not end
        with suppress(OSError):
            os.write(2, f"{show_cursor}\n{text}\n".encode())


@contextmanager
def without_ctrl_c() -> Iterator[None]:
    """A process that is started inside ignores Ctrl-C, which a terminal sends to all of a command's processes: the one
    that started it ends it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
