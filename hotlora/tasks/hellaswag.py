"""HellaSwag: which of four endings follows, by log-likelihood per character (acc_norm).

A row of ``hellaswag_val.jsonl`` (github.com/rowanz/hellaswag, MIT), or of the hub's ``Rowan/hellaswag``::

    {"ind": 24, "activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof.",
     "ctx_b": "he", "ctx": "A man is sitting on a roof. he", "endings": ["is using wrap to wrap a pair of
     skis.", "is ripping level tiles off.", "is holding a rubik's cube.", "starts pulling up roofing on a
     roof."], "source_id": "activitynet~v_-JhWjGDPHMY", "split": "val", "split_type": "indomain",
     "label": "3"}

Some copies hold ``"query": "Roof shingle removal: A man is sitting on a roof. He"`` in place of the first
four. The published test labels are hidden, so the split "test" is the validation split, as everywhere: 39,905 train and
10,042 validation rows.
"""

import re

from ..base.errors import DataError
from .choices import choice_example
from .rows import Row, need, need_text, published
from .task import Example, Task

HUB_ID = "Rowan/hellaswag"
FILES = {
    "train": ["hellaswag_train.jsonl", "hellaswag_train.jsonl.gz", "train.jsonl", "train.jsonl.gz"],
    "test": ["hellaswag_val.jsonl", "hellaswag_val.jsonl.gz", "validation.jsonl", "val.jsonl", "test.jsonl"],
}


def clean(text: str) -> str:
    """lm-eval's clean-up: WikiHow's ``[title]`` becomes a full stop, other bracketed text goes."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def example(row: Row) -> Example:
    """A row as context and endings; the right ending is the completion to train on."""
    if "query" in row.values:
        (context,) = need_text(row, "query")
    else:
        label, ctx_a, ctx_b = need_text(row, "activity_label", "ctx_a", "ctx_b")
        context = f"{label}: {ctx_a} {ctx_b.capitalize()}"
    endings, answer = need(row, "endings", "label")
    if not isinstance(endings, list):
        raise DataError(f"{row.place}: 'endings' must be a list of texts, this is {str(endings)[:60]}.")
    choices = [clean(ending) if isinstance(ending, str) else ending for ending in endings]
    return choice_example(row, clean(context), choices, answer, "endings")


_read = published("hellaswag", HUB_ID, None, FILES, example, {"test": "validation"})
TASK = Task("hellaswag", "choice", "acc_norm", _read)
