"""Jobs that write into folders, done by worker processes: one that fails or dies leaves the others alone.

A worker keeps to itself what libraries print: it goes to `log.txt` in the job's folder. When the process that started
the workers ends, in whatever way, they end.
"""

import gc
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from ..base.errors import HotLoraError, Stopped
from ..base.files import append_to
from ..base.heap import free
from ..base.signals import on_stop, say, stop, without_ctrl_c

LOG = "log.txt"
_NAME = "hotlora worker"
START = "spawn"  # a fork would inherit locks and threads of torch
PATIENCE = 30  # seconds, for a worker that was asked to end: it may be saving a checkpoint


@dataclass(eq=False)
class Job:
    """A call of an importable function, and what became of it."""

    name: str
    folder: Path
    function: Callable[..., Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    needs: "Job | None" = None
    """a job that must be done before"""
    seed: int | None = None
    status: str = "waiting"
    """waiting, running, done or failed"""
    result: Any = None
    error: str | None = None


def check_is_no_worker() -> None:
    """HotLoraError: this is a worker, which a script without a guard makes begin its own sweep anew."""
    if multiprocessing.current_process().name == _NAME:
        raise HotLoraError(
            "each run's process imports the script that began the sweep, and this one begins it again: put the call of "
            'run_sweep under `if __name__ == "__main__":`.'
        )


def default_processes() -> int:
    """One for each GPU; on the CPU one."""
    return max(1, torch.cuda.device_count())


def run_jobs(jobs: Sequence[Job], processes: int, ended: Callable[[Job], None]) -> None:
    """Does every job, up to `processes` at a time, in their order, and sets its status, result and error.

    ended: is called with each job that is done or failed, in this process. A job whose `needs` failed fails with it.
    """
    workers: list[_Worker] = []
    try:
        while True:
            for job in jobs:
                if job.status == "waiting" and job.needs and job.needs.status == "failed":
                    job.status, job.error = "failed", f"{job.needs.name}: {job.needs.error}"
                    ended(job)
            for job in (job for job in jobs if job.status == "waiting"):
                if job.needs is None or job.needs.status == "done":
                    if (worker := _idle(workers, processes)) is None:
                        break
                    worker.start(job)
            busy = {worker.connection: worker for worker in workers if worker.job}
            if not busy:
                return
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                job = worker.finish()
                if not worker.process.is_alive():
                    workers.remove(worker)
                    worker.end()
                ended(job)
    except BaseException as error:  # also Ctrl-C in Python, and what `ended` raises
        is_asked = isinstance(error, Stopped | KeyboardInterrupt)
        if is_asked and any(worker.job for worker in workers):
            say(f"waiting at most {PATIENCE} s for what runs to save a checkpoint")
        if not (is_asked and os.name == "nt"):  # there Ctrl-C has reached them, too, and this would kill them
            for worker in workers:  # a training saves a checkpoint, and ends
                worker.process.terminate()
        raise
    finally:
        for worker in workers:
            worker.end()


def _idle(workers: "list[_Worker]", processes: int) -> "_Worker | None":
    """A worker without a job; a new one as long as there may be more."""
    for worker in workers:
        if worker.job is None:
            return worker
    taken = {worker.number for worker in workers}
    free = [number for number in range(processes) if number not in taken]
    if not free:
        return None
    workers.append(_Worker(free[0], processes))
    return workers[-1]


class _Worker:
    """A worker process, from the side that gives it jobs."""

    def __init__(self, number: int, processes: int) -> None:
        self.number = number
        self.job: Job | None = None
        context: Any = multiprocessing.get_context(START)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), name=_NAME)
        with _environment(worker_environment(number, processes, torch.cuda.device_count())), without_ctrl_c():
            self.process.start()
        theirs.close()

    def start(self, job: Job) -> None:
        self.job, job.status = job, "running"
        try:
            self.connection.send(job.folder)
            self.connection.send((job.function, job.arguments))
        except OSError:  # it died while it had nothing to do; `finish` says so
            pass

    def finish(self) -> Job:
        """The job that was running, with what became of it."""
        job, self.job = self.job, None
        assert job is not None
        try:
            is_done, answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            is_done = False
            answer = f"its process ended with exit code {code}: killed, out of memory, or what it printed"
        job.status = "done" if is_done else "failed"
        job.result, job.error = (answer, None) if is_done else (None, answer)
        return job

    def end(self) -> None:
        if self.job is None and self.process.is_alive():
            try:
                self.connection.send(None)
            except OSError:
                pass
        # One with a job is being interrupted, too: it may be writing its record.
        self.process.join(timeout=PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()


def worker_environment(number: int, processes: int, num_gpus: int) -> dict[str, str]:
    """Which GPU worker `number` sees, or on the CPU its share of the threads; what is set already stays."""
    if num_gpus > 0:
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        devices = given.split(",") if given else [str(gpu) for gpu in range(num_gpus)]
        return {"CUDA_VISIBLE_DEVICES": devices[number % num_gpus]}
    if processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        return {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes))}
    return {}


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    """For a process that is started inside: CUDA reads its variables once, at the first import that asks for it."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _work(connection: Connection) -> None:
    """What a worker process does: jobs, until it is told that there are no more."""
    _end_with_parent()
    while True:
        try:
            folder = connection.recv()
        except (EOFError, OSError, KeyboardInterrupt):
            return
        if folder is None:
            gc.unfreeze()  # else what is bound to C++ is told as leaked at the end
            return
        with _output_to(folder / LOG):
            try:
                function, arguments = connection.recv()  # imports what the function needs
                if not gc.get_freeze_count():
                    gc.freeze()  # a run collects garbage more than once; what was imported is none
                with on_stop(stop):
                    answer = True, function(**arguments)
            except KeyboardInterrupt:
                return
            except Exception as error:
                traceback.print_exc()
                answer = False, f"{type(error).__name__}: {error}"
        free()  # the next job's model needs the room
        connection.send(answer)


def _end_with_parent() -> None:
    """Two processes must not write one run: the parent may be killed, and its command started again."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Sends stdout and stderr, those of C libraries too, to the end of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept, before = [os.dup(1), os.dup(2)], [sys.stdout, sys.stderr]
    with append_to(path, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # New ones: on Windows those of a console write to it, wherever the descriptors lead. They are not closed, as a
    # logger that was made inside keeps them.
    sys.stdout, sys.stderr = (open(number, "a", 1, "utf-8", "backslashreplace", closefd=False) for number in (1, 2))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr, *before):
            with suppress(OSError, ValueError):  # no error but the run's
                stream.flush()
        sys.stdout, sys.stderr = before
        for number, descriptor in zip((1, 2), kept, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)
