"""Runs Python that a model wrote, in a process of its own and apart from everything else, as far as the system allows.

Three levels, the strongest that works here being used:

- "namespaces": Linux namespaces of its own, made by unshare(2). No network, no files but the interpreter's libraries
  (read-only) and an empty /tmp in memory, no other process to see, and no user's rights.
- "bubblewrap": the same by `bwrap`, for systems that let only it make namespaces.
- "limits": limits of memory, CPU time, file size and processes alone. The program runs as you, with your files and
  your network; where hotlora runs as root, as a user that nobody is.

docs/evaluation.md says what none of them protects against.
"""

import functools
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ..base.errors import HotLoraError

Level = Literal["namespaces", "bubblewrap", "limits"]

TIMEOUT_S = 3.0  # the published harness's
MEMORY_MB = 512
_GRACE_S = 10.0  # for starting and ending the process, besides the program's own time
_JAIL = Path(__file__).with_name("python_jail.py")
_SETUP_FAILED = 3  # python_jail's
_PROBE = "import decimal, hashlib, heapq\nassert hashlib.md5(b'').digest()"
# numpy starts a thread a core otherwise, and each takes address space.
_ENVIRONMENT = {"HOME": "/tmp", "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PythonResult:
    """Whether a program came to its end; if not, `error` says what stopped it, in the program's own words."""

    passed: bool
    error: str | None = None


class _NoSuchLevelError(Exception):
    """This system cannot isolate a program so; the program was not run."""


def run_python(
    program: str, *, timeout_s: float = TIMEOUT_S, memory_mb: int = MEMORY_MB, level: Level | None = None
) -> PythonResult:
    """Runs `program` and says whether it came to its end without an exception.

    What it prints is dropped, its standard input is empty, and its environment holds nothing of the caller's. It is
    run once; when it ends or its time is up, so do its children.

    Args:
        timeout_s: wall-clock seconds, after which it is killed.
        memory_mb: MiB of address space for each of its processes, of which there may be 8.
        level: None: `sandbox_level()`.

    Raises:
        HotLoraError: nothing here isolates a program, or not at `level`.
    """
    level = level or sandbox_level()
    try:
        return _run(program, level, timeout_s, memory_mb)
    except _NoSuchLevelError as error:
        raise HotLoraError(
            f"The program was not run: isolation by {level} does not work here ({error}); "
            f"what does is {sandbox_level()}."
        ) from error


@functools.cache
def sandbox_level() -> Level:
    """The strongest isolation that works on this system: "namespaces", "bubblewrap" or "limits".

    Raises:
        HotLoraError: none does, as on Windows; or only limits would, and as root.
    """
    reasons = []
    for level in get_args(Level):
        try:
            result = _run(_PROBE, level, timeout_s=10.0, memory_mb=MEMORY_MB)
        except _NoSuchLevelError as error:
            reasons.append(f"{level}: {error}")
            continue
        if not result.passed:
            reasons.append(f"{level}: {result.error}")
            continue
        if level == "limits":
            on_linux = sys.platform == "linux"
            _log.warning(
                "Python that a model wrote runs with limits alone, and can read and write what you can%s: %s. "
                "Use a machine that holds nothing of value, or %s.",
                "" if on_linux else ", and take all memory",
                "; ".join(reasons),
                "install bubblewrap" if on_linux else "Linux",
            )
        return level
    raise HotLoraError(
        f"Nothing here isolates Python that a model wrote, so it is not run ({'; '.join(reasons)}): use Linux, as a "
        "user who may make namespaces, or with bubblewrap installed."
    )


def _run(program: str, level: Level, timeout_s: float, memory_mb: int) -> PythonResult:
    if os.name != "posix":
        raise _NoSuchLevelError("it needs a POSIX system")
    if level != "limits" and sys.platform != "linux":
        raise _NoSuchLevelError("it needs Linux")
    with tempfile.TemporaryDirectory(prefix="hotlora-", ignore_cleanup_errors=True) as folder:
        try:
            # -I: nothing of the user's environment or folders is imported.
            done = subprocess.run(
                _command(level, folder, timeout_s, memory_mb),
                input=program.encode("utf-8", "surrogatepass"),
                capture_output=True,
                env=_ENVIRONMENT,
                cwd="/",
                start_new_session=True,
                timeout=timeout_s + _GRACE_S,
            )
        except subprocess.TimeoutExpired:
            return PythonResult(False, f"timed out after {timeout_s:g} s")
        except OSError as error:  # no bwrap
            raise _NoSuchLevelError(str(error)) from error
    if done.returncode == 0 and done.stdout:
        return PythonResult(**json.loads(done.stdout))
    if done.returncode == _SETUP_FAILED or (level == "bubblewrap" and done.stderr):
        raise _NoSuchLevelError(done.stderr.decode(errors="replace").strip())
    return PythonResult(False, "it ended the process that runs it")


def _command(level: Level, folder: str, timeout_s: float, memory_mb: int) -> list[str]:
    python = [sys.executable, "-I", "-B"]
    limits = [str(timeout_s), str(memory_mb)]
    if level != "bubblewrap":
        return [*python, str(_JAIL), level, *limits, folder]
    if os.geteuid() == 0:  # the limit of processes does not hold for root
        raise _NoSuchLevelError("not as root")
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise _NoSuchLevelError("bwrap is not installed")
    seen = [sys.base_prefix, sys.prefix, "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/nix/store"]
    binds = [word for path in seen for word in ("--ro-bind-try", path, path)]
    words = ["--unshare-all", "--die-with-parent", "--cap-drop", "ALL", "--hostname", "sandbox"]
    words += ["--dev", "/dev"]
    # What bwrap makes is in memory that no limit counts: read-only then.
    sealed = ["--remount-ro", "/dev", "--remount-ro", "/"]
    return [
        bwrap, *words, "--bind", folder, "/tmp", *binds, "--ro-bind", str(_JAIL), "/jail.py", *sealed,
        *python, "/jail.py", "limits", *limits, "/tmp",
    ]  # fmt: skip
