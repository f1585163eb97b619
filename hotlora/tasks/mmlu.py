"""MMLU: multiple-choice questions in 57 subjects, by log-likelihood of the answer's letter (acc).

A row of the hub's ``cais/mmlu`` (github.com/hendrycks/test, MIT), or of a file::

    {"question": "Find all c in Z_3 such that Z_3[x]/(x^2 + c) is a field.", "subject": "abstract_algebra",
     "choices": ["0", "1", "2", "3"], "answer": 1}

MMLU has no training split of its own: "train" is its validation split, of 1,531 questions; "test" has 14,042. The
prompt is lm-eval's, with its line on the subject, which rows without one leave out.
"""

from ..base.errors import DataError
from .choices import choice_example
from .rows import Row, need, need_text, published
from .task import Example, Task

HUB_ID = "cais/mmlu"
LETTERS = ("A", "B", "C", "D")
_FILES = {"train": ["validation.jsonl", "val.jsonl", "train.jsonl"], "test": ["test.jsonl"]}


def example(row: Row) -> Example:
    """A row as prompt and letters."""
    (question,) = need_text(row, "question")
    choices, answer = need(row, "choices", "answer")
    if not isinstance(choices, list) or len(choices) != len(LETTERS):
        raise DataError(f"{row.place}: 'choices' must be a list of {len(LETTERS)} texts, this is {str(choices)[:60]}.")
    about = ""
    if "subject" in row.values:
        subject = need_text(row, "subject")[0].replace("_", " ")
        about = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    options = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, choices, strict=True))
    return choice_example(row, f"{about}{question.strip()}\n{options}Answer:", LETTERS, answer)


TASK = Task("mmlu", "choice", "acc", published("mmlu", HUB_ID, "all", _FILES, example, {"train": "validation"}))
