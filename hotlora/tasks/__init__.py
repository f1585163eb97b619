"""The tasks by name: nano's three, the published benchmarks, and data without a scorer to profile and train on."""

from ..errors import DataError
from . import (
    arc_challenge,
    boolq,
    codealpaca,
    gsm8k,
    hellaswag,
    humaneval,
    mbpp,
    mmlu,
    nano_choice,
    nano_math,
    nano_sql,
    piqa,
    refusal,
    saferpaca,
    spider,
    wikitext2,
)
from .task import Example, Task

__all__ = ["TASKS", "Example", "Task", "get_task"]

_PUBLISHED = (
    gsm8k,
    spider,
    hellaswag,
    humaneval,
    arc_challenge,
    piqa,
    boolq,
    mmlu,
    codealpaca,
    saferpaca,
    mbpp,
    wikitext2,
)
TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in (nano_math, nano_sql, nano_choice, *_PUBLISHED)}
TASKS |= refusal.TASKS


def get_task(name: str) -> Task:
    """The task called `name`; DataError lists the names."""
    if name not in TASKS:
        raise DataError(f"There is no task {name!r}; the tasks are {', '.join(TASKS)}.")
    return TASKS[name]
