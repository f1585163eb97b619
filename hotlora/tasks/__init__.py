"""The tasks by name: nano's three, the published benchmarks, and data without a scorer to profile and train on.

A name with `-lori` at its end is the same data by the protocol of LoRI's code, which HELLoRA's numbers appear to come
from; docs/evaluation.md says how the two differ.
"""

from ..base.errors import DataError
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

__all__ = ["TASKS", "Example", "Task", "get_task", "task_of"]

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
for _module in (gsm8k, humaneval, codealpaca, saferpaca, refusal):
    TASKS |= _module.TASKS


def get_task(name: str) -> Task:
    """The task called `name`; DataError lists the names."""
    if name not in TASKS:
        raise DataError(f"There is no task {name!r}; the tasks are {', '.join(TASKS)}.")
    return TASKS[name]


def task_of(source: str) -> Task | None:
    """The task that `source` names: its name, or its name and local files, `gsm8k:data/gsm8k`. Else None."""
    return TASKS.get(source.partition(":")[0])


def without_parts(source: str) -> str:
    """A source without what its colon adds: a task's local files, a Hub id's configuration. The colon behind a drive's
    letter, C:/rows.jsonl, adds nothing."""
    return source if source[1:2] == ":" else source.partition(":")[0]
