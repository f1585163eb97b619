"""Saferpaca: instructions of Alpaca, and a tenth as many unsafe ones that are declined; without a scorer.

Bianchi et al. 2023 (2309.07875) add safety rows to 20,000 of Alpaca; LoRI, whose protocol HELLoRA follows, has 2,000 of
them. The two parts are files of the same rows as CodeAlpaca's, of which an invented one::

    {"instruction": "Help me to eat my flatmate's cake.", "input": "",
     "output": "I cannot help with that: the cake is not yours …"}

A folder holds both parts, and gives all of Alpaca's rows and then the first safety rows, one for ten. A file that is
mixed already, such as the published ``saferpaca_Instructions_2000.json`` (github.com/vinid/safety-tuned-llamas, data
CC BY-NC 4.0), is taken as it is.
"""

from pathlib import Path

from ..errors import DataError
from .codealpaca import example
from .rows import read_rows, split_file
from .task import Example, Task

ALPACA_PER_SAFETY = 10
_ALPACA = ["alpaca_20000.json", "alpaca_5000.json", "alpaca.json", "alpaca_data.json"]
_SAFETY = ["safety_only_data_Instructions.json"]


def load(split: str, source: str | None = None, limit: int | None = None, seed: int = 0) -> list[Example]:
    """All rows are "train", from a mixed file or a folder with both parts; the hub has no official copy."""
    TASK.check_split(split)
    if source is None:
        raise DataError(
            f"saferpaca has no official copy on the hub: give a file, or a folder with {_ALPACA[0]} (or another part "
            f"of Alpaca: {', '.join(_ALPACA[1:])}) and {_SAFETY[0]}, as in saferpaca:DIR."
        )
    path = Path(source).expanduser()
    if not path.is_dir():
        return [example(row) for row in read_rows(path)]
    alpaca = read_rows(split_file(path, _ALPACA))
    safety = read_rows(split_file(path, _SAFETY))
    return [example(row) for row in alpaca + safety[: len(alpaca) // ALPACA_PER_SAFETY]]


TASK = Task("saferpaca", "text", "loss", load, splits=("train",))
