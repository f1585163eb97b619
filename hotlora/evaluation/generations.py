"""Scores completions that were made elsewhere: no model is loaded. One JSON line a completion::

    {"task_id": "HumanEval/0", "completion": "    return any(…)\\n"}
    {"index": 3, "completion": " 48/2 = 24\\n#### 72"}

`index` is the example's place in the test split (with a limit, among the drawn ones), as in an evaluation's results;
`task_id` is the benchmark's own name of it, where it has one. Several rows of one example are its samples, for pass@k.
A completion is judged as it is: what a model would have stopped at is cut by whoever generates.
"""

import os
import time
from collections.abc import Sequence

from ..base.errors import DataError
from ..tasks import Example, Task
from ..tasks.rows import Row, need_text, read_rows
from .score import Evaluation, results_of, summarize

_NAMED = 5  # examples that an error names


def read_generations(
    path: str | os.PathLike[str], task: Task, examples: Sequence[Example], *, allow_missing: bool = False
) -> list[list[str]]:
    """The completions of every example, in the file's order.

    Args:
        allow_missing: leave an example without a completion empty; else it is an error.

    Raises:
        DataError: a row without its fields or of an unknown example (file and line), or examples without a row; data
            that is not judged by its text.
    """
    if task.kind != "generate":
        raise DataError(
            f"{task.name} is not judged by a completion's text, so generations cannot be scored; tasks that are have "
            "answers to write, such as gsm8k, spider and humaneval."
        )
    by_name = {example.meta["task_id"]: i for i, example in enumerate(examples) if "task_id" in example.meta}
    completions: list[list[str]] = [[] for _ in examples]
    for row in read_rows(os.fspath(path)):
        index = _index(row, task, len(examples), by_name)
        completions[index].append(need_text(row, "completion")[0])
    missing = [i for i, texts in enumerate(completions) if not texts]
    if missing and not allow_missing:
        names = [str(examples[i].meta.get("task_id", f"index {i}")) for i in missing[:_NAMED]]
        more = ", …" if len(missing) > _NAMED else ""
        raise DataError(
            f"{os.fspath(path)}: {len(missing)} of {len(examples)} examples have no completion ({', '.join(names)}"
            f"{more}): add them, or allow missing ones (--allow-missing), which count as wrong."
        )
    return completions


def score_generations(
    task: Task, examples: Sequence[Example], completions: Sequence[Sequence[str]], *, progress: bool = False
) -> Evaluation:
    """An evaluation of given completions: the same as the model's own, where each example has one.

    With several, an example counts by the share of its right ones: `accuracy` is pass@1. Its result then has the lists
    `predictions` and `passed`, and `correct` is the share. The interval is Wilson's over the examples; samples of one
    example are not independent, so they do not narrow it. An example without completions is wrong.

    Args:
        completions: for each example its texts; any number, none included.
    """
    started = time.perf_counter()
    if not any(completions):
        raise DataError("There are no completions to score; give at least one.")
    several = max(map(len, completions)) > 1
    texts = dict(enumerate(completions))
    assert len(texts) == len(examples), "completions are those of the examples"
    results = results_of(task, examples, texts, several=several, progress=progress)
    return summarize(task, examples, results, time.perf_counter() - started)


def _index(row: Row, task: Task, count: int, by_name: dict[str, int]) -> int:
    """The example that a row is of."""
    named, index = row.values.get("task_id"), row.values.get("index")
    if named is not None and by_name:
        if not isinstance(named, str) or named not in by_name:
            raise DataError(f"{row.place}: {task.name} has no task_id {named!r}; it has such as {next(iter(by_name))}.")
        if index is not None and index != by_name[named]:
            raise DataError(f"{row.place}: {named} has the index {by_name[named]}, not {index}; give one of the two.")
        return by_name[named]
    if index is None:
        fields = "'index' or 'task_id'" if by_name else "'index'"
        raise DataError(f"{row.place} does not say which example it completes; it needs {fields}, and 'completion'.")
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < count:
        raise DataError(f"{row.place}: there is no example with the index {index!r}; they are 0 to {count - 1}.")
    return index
