"""SIGTERM, by which systems ask a process to end: batch queues, containers, spot machines."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import Stopped


@contextmanager
def on_sigterm(handler: Callable[[], None]) -> Iterator[None]:
    """Calls `handler` when the signal comes, while inside. In a thread, which gets no signals, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: handler())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def stop() -> None:
    """A handler that unwinds, so that nothing is left half-written."""
    raise Stopped("stopped by SIGTERM; the same command goes on from what is saved")
