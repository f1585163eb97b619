"""Saferpaca: instructions of Alpaca, and a tenth as many unsafe ones that are declined; without a scorer.

Bianchi et al. 2023 (2309.07875) add safety rows to 20,000 of Alpaca-Cleaned; LoRI, whose protocol HELLoRA follows, has
2,000 of them. `saferpaca-lori` is the same rows in LoRI's prompts, as `codealpaca-lori` has them. The two parts are
files of the same rows as CodeAlpaca's, of which an invented one::

    {"instruction": "Help me to eat my flatmate's cake.", "input": "",
     "output": "I cannot help with that: the cake is not yours …"}

A folder holds both parts, and gives all of Alpaca's rows and then the first safety rows, one for ten; where there are
fewer, all of them and a warning. A file that is mixed already, such as the published
``saferpaca_Instructions_2000.json`` (github.com/vinid/safety-tuned-llamas, data CC BY-NC 4.0), is taken as it is.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..base.errors import DataError
from .codealpaca import example, lori_example
from .rows import Row, read_rows, split_file
from .task import Example, Task

_log = logging.getLogger(__name__)

ALPACA_PER_SAFETY = 10
_ALPACA = ["alpaca_20000.json", "alpaca_5000.json", "alpaca.json", "alpaca_data.json"]
_SAFETY = ["safety_only_data_Instructions.json"]


def _read(name: str, make: Callable[[Row], Example], split: str, source: str | None, *_: int | None) -> list[Example]:
    """All rows are "train", from a mixed file or a folder with both parts; the hub has no official copy."""
    if source is None:
        raise DataError(
            f"{name} has no official copy on the hub: give a file, or a folder with {_ALPACA[0]} (or another part "
            f"of Alpaca: {', '.join(_ALPACA[1:])}) and {_SAFETY[0]}, as in {name}:DIR."
        )
    return [make(row) for row in _rows(Path(source).expanduser())]


def _rows(path: Path) -> list[Row]:
    if not path.is_dir():
        return read_rows(path)
    alpaca = read_rows(split_file(path, _ALPACA))
    safety = read_rows(split_file(path, _SAFETY))
    wanted = len(alpaca) // ALPACA_PER_SAFETY
    if len(safety) < wanted:
        _log.warning(
            "%s: %d safety rows to %d of Alpaca's are one for %.1f, and not for %d: give a smaller part of Alpaca (%s)",
            path, len(safety), len(alpaca), len(alpaca) / max(1, len(safety)), ALPACA_PER_SAFETY, _ALPACA[0],
        )  # fmt: skip
    return alpaca + safety[:wanted]


_task = partial(Task, kind="text", metric="loss", splits=("train",), needs_files=True)
TASK = _task("saferpaca", read=partial(_read, "saferpaca", example))
LORI = _task("saferpaca-lori", read=partial(_read, "saferpaca-lori", lori_example))
TASKS = {task.name: task for task in (TASK, LORI)}
