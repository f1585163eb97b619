"""GSM8K: grade-school arithmetic word problems, scored by exact match of the number after ``####``.

A row of ``train.jsonl`` (github.com/openai/grade-school-math, MIT), or of the hub's ``openai/gsm8k``::

    {"question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in
      May. How many clips did Natalia sell altogether in April and May?",
     "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\\nNatalia sold 48+24 = <<48+24=72>>72 clips
      altogether in April and May.\\n#### 72"}

The answer is trained on as published, with its ``<<48/2=24>>`` calculator marks, as lm-eval shows it to
models.
"""

import re

from .rows import Row, load_rows, need_text
from .task import Example, Task

HUB_ID = "openai/gsm8k"
STOP = ("\nQuestion:", "\n\n")
_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")  # lm-eval's strict match, the official extraction


def example(row: Row) -> Example:
    """A row as prompt, completion and gold answer."""
    question, answer = need_text(row, "question", "answer")
    return Example(f"Question: {question}\nAnswer:", f" {answer}", meta={"answer": answer})


def final_answer(text: str) -> str | None:
    """The number after the first ``#### ``, without commas and trailing dots; None where there is none.

    As published, a ``$`` between the two makes the answer no answer.
    """
    found = _ANSWER.search(text)
    return found[1].replace(",", "").rstrip(".") or None if found else None


def score(example: Example, text: str) -> bool:
    """Exact match of the final numbers, compared as strings: ``18`` is not ``18.0``."""
    answer = final_answer(text)
    return answer is not None and answer == final_answer(example.meta["answer"])


def load(split: str, source: str | None = None, limit: int | None = None, seed: int = 0) -> list[Example]:
    """7,473 train and 1,319 test problems: the hub, a file, or a folder with train.jsonl and test.jsonl."""
    TASK.check_split(split)
    rows = load_rows("gsm8k", source, HUB_ID, "main", [f"{split}.jsonl", f"{split}.jsonl.gz"], split)
    return [example(row) for row in rows]


TASK = Task("gsm8k", "generate", "exact_match", load, score, max_new_tokens=512, stop=STOP)
