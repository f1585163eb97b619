"""MBPP: short Python functions from a sentence and three tests; data to profile and train on, without a scorer.

A row of ``mbpp.jsonl`` (github.com/google-research/google-research, CC BY 4.0), or of the hub's
``google-research-datasets/mbpp``::

    {"text": "Write a python function to find the first repeated character in a given string.", "code": "def
     first_repeated_char(str1):\\r\\n  for index,c in enumerate(str1):\\r\\n    if str1[:index+1].count(c) > 1:
     \\r\\n      return c \\r\\n  return \\"None\\"", "task_id": 602, "test_setup_code": "", "test_list": ["assert
     first_repeated_char(\\"abcabc\\") == \\"a\\"", "assert first_repeated_char(\\"abc\\") == \\"None\\"",
     "assert first_repeated_char(\\"123123\\") == \\"1\\""], "challenge_test_list": []}

The prompt is the paper's (Austin et al. 2021), which lm-eval uses too. The one published file holds all splits:
by the paper, the tasks 601 to 974 are "train" and 11 to 510 "test"; 1 to 10 are few-shot examples, 511 to 600
validation. Line ends are made Unix's.
"""

from ..base.errors import DataError
from .rows import Row, load_rows, need, need_text
from .task import Example, Task

HUB_ID = "google-research-datasets/mbpp"
_IDS = {"train": range(601, 975), "test": range(11, 511)}


def example(row: Row) -> Example:
    """A row as the paper's prompt, and the code up to the paper's closing mark."""
    text, code = need_text(row, "text", "code")
    (tests,) = need(row, "test_list")
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise DataError(f"{row.place}: 'test_list' must be a list of texts, this is {str(tests)[:60]}.")
    code = code.rstrip("\r\n").replace("\r\n", "\n")
    listed = "".join(f"{test}\n" for test in tests)
    prompt = (
        f"You are an expert Python programmer, and here is your task: {text} "
        f"Your code should pass these tests:\n\n{listed}[BEGIN]\n"
    )
    return Example(prompt, f"{code}\n[DONE]")


def read(split: str, source: str | None, limit: int | None, seed: int) -> list[Example]:
    """374 train and 500 test tasks: the hub, the published file, or a folder that holds it."""
    rows = load_rows("mbpp", source, HUB_ID, "full", ["mbpp.jsonl"], split)
    picked = [row for row in rows if need(row, "task_id")[0] in _IDS[split]]
    if not picked:
        ids = _IDS[split]
        raise DataError(f"mbpp: no row is of the split {split!r}, whose task_id is {ids.start} to {ids.stop - 1}.")
    return [example(row) for row in picked]


TASK = Task("mbpp", "text", "loss", read)
