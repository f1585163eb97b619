"""A multiple-choice row as an example, with a word on where its label is wrong."""

from collections.abc import Sequence
from typing import Any

from ..base.errors import DataError
from .rows import Row
from .task import Example


def choice_example(row: Row, prompt: str, choices: Sequence[str], label: Any, what: str = "choices") -> Example:
    """An example of kind "choice"; the right choice is the completion to train on.

    Args:
        label: index of the right choice, as a number or as text.
        what: what the task calls its choices, for the error.

    Raises:
        DataError: a choice that is not text, or a label that is no index of one.
    """
    if not isinstance(choices, list | tuple) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{row.place}: the {what} must be a list of texts, this is {str(choices)[:60]}.")
    if str(label) not in {str(index) for index in range(len(choices))}:
        raise DataError(f"{row.place}: label {label!r} is none of the {len(choices)} {what} (0 to {len(choices) - 1}).")
    right = int(label)
    return Example(prompt, f" {choices[right]}", tuple(choices), right)
