"""Runner files, called in the engines' own environments."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..base.errors import HotLoraError
from ..base.files import write_json
from .runner import Answer, LogProbs, Request

_ERROR = re.compile(r"(?:^|: )[\w.]*(?:Error|Exception)(?:: |$)")


@dataclass(frozen=True)
class Engine:
    """An engine that can be asked."""

    runner: str
    """Its file here."""
    takes: tuple[str, ...]
    """The kinds of exports that it loads, as of `exported.kind_of`."""
    install: str


ENGINES = {
    "transformers": Engine("transformers_runner.py", ("merged",), "pip install transformers"),
    "vllm": Engine("vllm_runner.py", ("per-expert", "merged"), "pip install vllm"),
    "sglang": Engine("sglang_runner.py", ("per-expert", "shared-outer", "merged"), "pip install sglang"),
    "peft": Engine("peft_runner.py", ("peft",), "pip install peft"),
    "llama.cpp": Engine("llama_cpp_runner.py", ("gguf",), "pip install llama-cpp-python"),
    "mlx": Engine("mlx_runner.py", ("mlx", "merged"), "pip install mlx-lm"),
}


def engine_named(name: str) -> Engine:
    """HotLoraError: there is none."""
    if name not in ENGINES:
        raise HotLoraError(f"engine {name!r} does not exist: choose one of {', '.join(ENGINES)}.")
    return ENGINES[name]


def check_engine(name: str, python: str | None = None) -> dict[str, str]:
    """The versions of the engine and of what it stands on, in the environment that `python` belongs to; nothing of it
    is imported.

    HotLoraError: no such interpreter, or the engine is not installed there.
    """
    engine = engine_named(name)
    done = _run([_interpreter(python), _file(engine)], f"engine {name}")
    try:
        found: dict[str, Any] = json.loads(done.stdout)
        versions, missing = dict(found["versions"]), list(found["missing"])
    except (ValueError, KeyError, TypeError):
        raise HotLoraError(f"{python} is no Python of 3.10 or newer: {_last_line(done)}") from None
    if missing:
        where = python or "this environment"
        raise HotLoraError(
            f"the engine {name} needs {' and '.join(missing)}, which {where} does not have: {engine.install} there, or "
            "give --python, the interpreter of the environment that has it."
        )
    return versions


def ask(name: str, request: Request, python: str | None = None) -> tuple[Tensor, Tensor, Answer]:
    """The engine's log-probabilities, float64 `[P, S - 1, C]`: of the base, and with the export. Not a number where it
    gives none.

    HotLoraError: it failed, with the last that it said; or gave other numbers than were asked for.
    """
    with TemporaryDirectory(prefix="hotlora-verify-") as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "answer.json"
        write_json(asked, vars(request))
        command = [_interpreter(python), _file(engine_named(name)), str(asked), str(answered)]
        done = _run(command, f"engine {name}")
        if done.returncode or not answered.is_file():
            raise HotLoraError(f"the engine {name} could not load or run {request.export}: {_last_line(done)}")
        answer = Answer(**json.loads(answered.read_text(encoding="utf-8")))
    shape = (len(request.tokens), len(request.tokens[0]), len(request.tokens[0][0]))
    return _tensor(answer.base, shape, name), _tensor(answer.adapted, shape, name), answer


def _tensor(values: LogProbs, shape: Sequence[int], name: str) -> Tensor:
    try:
        numbers = [[[float("nan") if x is None else x for x in row] for row in text] for text in values]
        found = torch.tensor(numbers, dtype=torch.float64)
    except (TypeError, ValueError):
        found = torch.zeros(0)
    if found.shape != torch.Size(shape):
        raise HotLoraError(f"the engine {name} answered with other numbers than the {list(shape)} that were asked for.")
    return found


def _interpreter(python: str | None) -> str:
    return python or sys.executable


def _file(engine: Engine) -> str:
    return str(Path(__file__).parent / engine.runner)


def _run(command: list[str], what: str) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    except OSError as error:
        raise HotLoraError(
            f"{what}: {command[0]} cannot be run ({error.strerror}): give --python, the path of a Python interpreter."
        ) from error


def _last_line(done: "subprocess.CompletedProcess[str]") -> str:
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    lines = [line for line in lines if _ERROR.search(line)] or lines  # engines say more after an error
    return (lines[-1] if lines else f"it ended with code {done.returncode} and said nothing")[:500]
