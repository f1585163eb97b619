"""ARC-Challenge: grade-school science questions, by log-likelihood per character of each answer (acc_norm).

A row of ``ARC-Challenge-Test.jsonl`` (allenai.org/data/arc, CC BY-SA 4.0)::

    {"id": "Mercury_7175875", "question": {"stem": "An astronomer observes that a planet rotates faster after a
     meteorite impact. Which is the most likely effect of this increase in rotation?", "choices": [{"text":
     "Planetary density will decrease.", "label": "A"}, {"text": "Planetary years will become longer.", "label":
     "B"}, {"text": "Planetary days will become shorter.", "label": "C"}, {"text": "Planetary gravity will become
     stronger.", "label": "D"}]}, "answerKey": "C"}

The hub's ``allenai/ai2_arc`` holds ``"question": "An astronomer …", "choices": {"text": […], "label": […]}``
in place of the second. OLMo's copy holds ``"query": "Question: …\\nAnswer:", "choices": […], "label": 2``.

There are 1,119 train and 1,172 test questions. Prompt and choices are lm-eval's: the answers' texts, not their letters.
"""

from typing import Any

from ..base.errors import DataError
from .choices import choice_example
from .rows import Row, need, need_text, published
from .task import Example, Task

HUB_ID = "allenai/ai2_arc"
_FILES = {"train": ["ARC-Challenge-Train.jsonl", "train.jsonl"], "test": ["ARC-Challenge-Test.jsonl", "test.jsonl"]}


def example(row: Row) -> Example:
    """A row of one of the three forms as prompt and answers."""
    if "query" in row.values:
        (query,) = need_text(row, "query")
        choices, label = need(row, "choices", "label")
        return choice_example(row, query, choices, label, "answers")
    question, answer = need(row, "question", "answerKey")
    if isinstance(question, dict):
        stem, options = question.get("stem"), question.get("choices")
        options = options if isinstance(options, list) else []
        pairs = [(option.get("text"), option.get("label")) for option in options if isinstance(option, dict)]
    else:
        stem, pairs = question, _columns(row)
    labels = [label for _, label in pairs]
    if not isinstance(stem, str) or answer not in labels:
        raise DataError(
            f"{row.place}: a question's text and answers are needed, and 'answerKey' must be one of their labels "
            f"({', '.join(map(str, labels)) or 'none'}), this is {answer!r}."
        )
    texts: list[Any] = [text for text, _ in pairs]
    return choice_example(row, f"Question: {stem}\nAnswer:", texts, labels.index(answer), "answers")


def _columns(row: Row) -> list[tuple[Any, Any]]:
    """The hub's two lists as (text, label) pairs."""
    (choices,) = need(row, "choices")
    texts, labels = (choices.get(key) for key in ("text", "label")) if isinstance(choices, dict) else (None, None)
    if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels):
        raise DataError(f"{row.place}: 'choices' must hold two lists of one length, 'text' and 'label'.")
    return list(zip(texts, labels, strict=True))


TASK = Task("arc_challenge", "choice", "acc_norm", published("arc_challenge", HUB_ID, "ARC-Challenge", _FILES, example))
