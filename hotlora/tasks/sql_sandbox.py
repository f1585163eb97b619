"""Runs SQL that a model wrote: read-only, in a process of its own, with limits on time, memory and rows.

The worker is this very file, run as a script: it needs the standard library only, so it starts in some 30 ms
and its memory limit is not spent on libraries. Requests and answers are JSON lines over its pipes. A query
past its time is ended by killing the worker; the next query starts a fresh one. Limits of memory and CPU need
a POSIX system; elsewhere the read-only rules, the row limit and the wall-clock limit still hold.
"""

import json
import queue
import sqlite3
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

TIMEOUT_S = 10.0
MEMORY_MB = 512
MAX_ROWS = 100_000
MAX_BYTES = 32 * 2**20  # of one answer, as JSON


@dataclass(frozen=True)
class SqlResult:
    """Rows of a query that ran, or what stopped it: exactly one of the two is None."""

    rows: list[tuple[Any, ...]] | None
    error: str | None = None


class SqlSandbox:
    """Runs one query at a time on SQLite files; use as a context manager, or call `close`.

    Args:
        timeout_s: wall-clock seconds for one query, after which its process is killed.
        memory_mb: MiB of address space for the process.
        max_rows: rows of an answer; a query that gives more is an error.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S, memory_mb: int = MEMORY_MB, max_rows: int = MAX_ROWS) -> None:
        self.timeout_s, self.memory_mb, self.max_rows = timeout_s, memory_mb, max_rows
        self._worker: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()
        self._lock = threading.Lock()

    def run(self, database: str | Path, sql: str) -> SqlResult:
        """The rows that `sql` gives on `database`, a file that is opened read-only.

        No query at all, anything but reading (writes, ATTACH, PRAGMA, extensions), several statements, an error in the
        SQL, or a limit that is reached, comes back as `error`.
        """
        with self._lock:
            worker = self._start()
            assert worker.stdin is not None
            try:
                worker.stdin.write(json.dumps({"database": str(Path(database).resolve()), "sql": sql}) + "\n")
                worker.stdin.flush()
                answer = self._answers.get(timeout=self.timeout_s)
            except queue.Empty:
                self._stop()
                return SqlResult(None, f"timeout: ran longer than {self.timeout_s:g} s")
            except OSError:  # the worker died between two queries
                answer = ""
            if not answer:
                self._stop()
                return SqlResult(None, "the process ended: out of its memory or CPU time")
        result = json.loads(answer)
        if "error" in result:
            return SqlResult(None, result["error"])
        return SqlResult([tuple(_decode(value) for value in row) for row in result["rows"]])

    def close(self) -> None:
        """Ends the process; a later `run` would start another."""
        with self._lock:
            self._stop()

    def __enter__(self) -> "SqlSandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> subprocess.Popen[str]:
        if self._worker is None or self._worker.poll() is not None:
            self._stop()
            # -I: nothing of the user's environment or folders is imported.
            command = [sys.executable, "-I", __file__, str(self.memory_mb), str(self.max_rows), str(self.timeout_s)]
            pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
            # A session of its own: Ctrl-C must not end it under a query, whose answer would then count as wrong.
            worker = subprocess.Popen(
                command, **pipes, stderr=subprocess.DEVNULL, encoding="utf-8", start_new_session=True
            )
            self._worker, self._answers = worker, queue.Queue()
            threading.Thread(target=_forward, args=(worker.stdout, self._answers), daemon=True).start()
        return self._worker

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.wait()
            assert self._worker.stdin is not None
            try:
                self._worker.stdin.close()
            except OSError:  # a request that was still in the buffer
                pass
            self._worker = None


def _forward(stdout: IO[str], answers: "queue.Queue[str]") -> None:
    """Hands on the worker's lines, then an empty one: waiting on a queue can time out everywhere."""
    with stdout:
        for line in stdout:
            answers.put(line)
    answers.put("")


def _encode(value: Any) -> Any:
    return {"blob": value.hex()} if isinstance(value, bytes) else value


def _decode(value: Any) -> Any:
    return bytes.fromhex(value["blob"]) if isinstance(value, dict) else value


# ---- the worker
# ----------------------------------------------------------------------------------------------------

_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}
_REFUSED_FUNCTIONS = {"load_extension", "fts3_tokenizer", "readfile", "writefile", "edit"}


def _authorize(action: int, arg1: str | None, arg2: str | None, *_: str | None) -> int:
    if action == sqlite3.SQLITE_FUNCTION:  # its name is the second argument
        return sqlite3.SQLITE_DENY if (arg2 or "").lower() in _REFUSED_FUNCTIONS else sqlite3.SQLITE_OK
    return sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY


def _connect(database: str) -> sqlite3.Connection:
    # immutable: no lock and no journal is made, so a folder that cannot be written to is fine.
    connection = sqlite3.connect(f"{Path(database).as_uri()}?mode=ro&immutable=1", uri=True, isolation_level=None)
    connection.text_factory = lambda data: data.decode(errors="ignore")  # as the official scorer reads text
    connection.execute("PRAGMA query_only = ON")
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 16 * 2**20)
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    connection.set_authorizer(_authorize)
    return connection


def _answer(database: str, sql: str, max_rows: int) -> dict[str, Any]:
    try:
        connection = _connect(database)
        try:
            rows, size = [], 0
            found = connection.execute(sql)
            if found.description is None:  # no columns: nothing, or a comment, which SQLite runs as well
                return {"error": "the text holds no query"}
            for row in found:
                rows.append([_encode(value) for value in row])
                size += sum(len(value) if isinstance(value, str | bytes) else 8 for value in row)
                if len(rows) > max_rows or size > MAX_BYTES:
                    return {"error": f"more than {max_rows} rows or {MAX_BYTES} bytes"}
            return {"rows": rows}
        finally:
            connection.close()
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    except MemoryError:
        return {"error": "MemoryError: out of its memory"}


def _limit(memory_mb: int) -> None:
    try:
        import resource
    except ImportError:  # not a POSIX system
        return
    for name, value in (("RLIMIT_AS", memory_mb * 2**20), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0)):
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (ValueError, OSError):  # macOS refuses RLIMIT_AS
            pass


def _limit_cpu(seconds: float) -> None:
    """Seconds more of CPU time from now on: a guard of its own should the parent be gone."""
    try:
        import resource
    except ImportError:
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(usage.ru_utime + usage.ru_stime + seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _work(memory_mb: int, max_rows: int, timeout_s: float) -> None:
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    _limit(memory_mb)
    for line in sys.stdin:
        _limit_cpu(timeout_s)
        request = json.loads(line)
        print(json.dumps(_answer(request["database"], request["sql"], max_rows)), flush=True)


if __name__ == "__main__":
    _work(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
