"""BoolQ: yes-or-no questions about a passage, by log-likelihood of the two words (acc).

A row of ``dev.jsonl`` (github.com/google-research-datasets/boolean-questions, CC BY-SA 3.0)::

    {"question": "does ethanol take more energy make that produces", "title": "Ethanol fuel", "answer": false,
     "passage": "All biomass goes through at least some of these steps: it needs to be grown, collected, dried,
     …"}

The rows of the hub's ``aps/super_glue`` (boolq) hold ``"passage": "Ethanol fuel -- All biomass goes …"`` and
``"label": 0`` (no) in place of title and answer. OLMo's copy holds ``"query": "Ethanol fuel -- All biomass goes
…\\nQuestion: does ethanol …?\\nAnswer:", "choices": ["yes", "no"], "label": 1``. All become lm-eval's
prompt; a row without a title has none there. The published test labels are hidden, so the split "test" is the
development split, as everywhere: 9,427 train and 3,270 development questions.
"""

from ..base.errors import DataError
from .choices import choice_example
from .rows import Row, need, need_text, published
from .task import Example, Task

HUB_ID = "aps/super_glue"
CHOICES = ("no", "yes")  # lm-eval's order: a tie goes to the lower index
_FILES = {"train": ["train.jsonl"], "test": ["dev.jsonl", "validation.jsonl", "val.jsonl"]}


def example(row: Row) -> Example:
    """A row of one of the three forms as prompt and answer."""
    if "query" in row.values:
        (prompt,) = need_text(row, "query")
        choices, label = need(row, "choices", "label")
        found = choice_example(row, prompt, choices, label, "answers")
        if sorted(found.choices) != sorted(CHOICES):
            raise DataError(f"{row.place}: the answers are {', '.join(found.choices)}, they must be yes and no.")
        return choice_example(row, prompt, CHOICES, CHOICES.index(found.completion.strip()), "answers")
    passage, question = need_text(row, "passage", "question")
    if "title" in row.values:
        passage = f"{need_text(row, 'title')[0]} -- {passage}"
    (answer,) = need(row, "label" if "label" in row.values else "answer")
    # Python's False is 0: the published answers and the hub's labels are one.
    label = int(answer) if isinstance(answer, bool) else answer
    return choice_example(row, f"{passage}\nQuestion: {question}?\nAnswer:", CHOICES, label, "answers")


TASK = Task("boolq", "choice", "acc", published("boolq", HUB_ID, "boolq", _FILES, example, {"test": "validation"}))
