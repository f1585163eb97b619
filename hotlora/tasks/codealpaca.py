"""CodeAlpaca: instructions about code and their answers; data to profile and train on, without a scorer.

A row of ``code_alpaca_20k.json`` (github.com/sahil280114/codealpaca, CC BY 4.0), or of the hub's
``sahil2801/CodeAlpaca-20k``::

    {"instruction": "Classify the numbers in the list as even or odd.", "input": "[2, 3, 4, 6, 9]",
     "output": "Even: [2, 4, 6]\\nOdd: [3, 9]"}

The prompt is Alpaca's, which the authors trained with; many rows have an empty input, and Alpaca's other prompt.
"""

from .rows import Row, load_rows, need_text
from .task import Example, Task

HUB_ID = "sahil2801/CodeAlpaca-20k"
_FILES = ["code_alpaca_20k.json", "code_alpaca_20k_reassembled.json", "train.jsonl"]
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_WITHOUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def example(row: Row) -> Example:
    """A row as Alpaca's prompt, and the answer on a new line."""
    instruction, given, output = need_text(row, "instruction", "input", "output")
    prompt = (_WITH_INPUT if given else _WITHOUT).format(instruction=instruction, input=given)
    return Example(prompt, f"\n{output}")


def load(split: str, source: str | None = None, limit: int | None = None, seed: int = 0) -> list[Example]:
    """20,022 rows, all of them "train": the hub, a file, or a folder with the published file."""
    TASK.check_split(split)
    return [example(row) for row in load_rows("codealpaca", source, HUB_ID, None, _FILES, split)]


TASK = Task("codealpaca", "text", "loss", load, splits=("train",))
