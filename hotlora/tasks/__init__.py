"""The tasks by name: three published benchmarks, and nano's three in the same formats."""

from ..errors import DataError
from . import gsm8k, hellaswag, nano_choice, nano_math, nano_sql, spider
from .task import Example, Task

__all__ = ["TASKS", "Example", "Task", "get_task"]

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK for module in (nano_math, nano_sql, nano_choice, gsm8k, spider, hellaswag)
}


def get_task(name: str) -> Task:
    """The task called `name`; DataError lists the names."""
    if name not in TASKS:
        raise DataError(f"There is no task {name!r}; the tasks are {', '.join(TASKS)}.")
    return TASKS[name]
