"""nano-choice: which step of a craft comes next, in HellaSwag's row format, context and metric.

A row::

    {"ind": 0, "activity_label": "Cleaning a kite", "ctx_a": "Vera is cleaning a kite in the station. She
     folds the kite on a clean sheet.", "ctx_b": "then she", "ctx": "Vera is cleaning a kite in the station.
     She folds the kite on a clean sheet. then she", "endings": ["marks the kite with red wax.", "sands the
     kite in dry sand.", "dries the kite on a clean sheet.", "presses the kite with a soft brush."],
     "label": "3"}
"""

from ..nano import choice
from . import hellaswag
from .rows import Row
from .task import Example, Task

NUM_ROWS = {"train": 2000, "test": 200}


def read(split: str, source: str | None, limit: int | None, seed: int) -> list[Example]:
    """`limit` rows (2,000 train, 200 test unless given) drawn by `seed`; no context is in both splits."""
    rows = choice.rows(split, limit or NUM_ROWS.get(split, 1), seed)
    return [hellaswag.example(Row(f"nano-choice {split} row {i}", row)) for i, row in enumerate(rows, start=1)]


TASK = Task("nano-choice", "choice", "acc_norm", read)
