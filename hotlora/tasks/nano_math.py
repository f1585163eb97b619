"""nano-math: generated arithmetic word problems in GSM8K's row format, prompt and scorer.

A row::

    {"question": "Will has 29 balls. He buys 2 boxes with 6 balls in each. How many balls does Will have
     now?", "answer": "2 * 6 = 12\\n29 + 12 = 41\\n#### 41"}
"""

from ..nano import math
from . import gsm8k
from .rows import Row
from .task import Example, Task

NUM_ROWS = {"train": 2000, "test": 200}


def read(split: str, source: str | None, limit: int | None, seed: int) -> list[Example]:
    """`limit` rows (2,000 train, 200 test unless given) drawn by `seed`; no question is in both splits."""
    rows = math.rows(split, limit or NUM_ROWS.get(split, 1), seed)
    return [gsm8k.example(Row(f"nano-math {split} row {i}", row)) for i, row in enumerate(rows, start=1)]


TASK = Task("nano-math", "generate", "exact_match", read, gsm8k.score, max_new_tokens=64, stop=gsm8k.STOP)
