"""CodeAlpaca: instructions about code and their answers; data to profile and train on, without a scorer.

A row of ``code_alpaca_20k.json`` (github.com/sahil280114/codealpaca, CC BY 4.0), or of the hub's
``sahil2801/CodeAlpaca-20k``::

    {"instruction": "Classify the numbers in the list as even or odd.", "input": "[2, 3, 4, 6, 9]",
     "output": "Even: [2, 4, 6]\\nOdd: [3, 9]"}

All of the 20,022 rows are "train". The prompt is Alpaca's, which the authors trained with; many rows have an empty
input, and Alpaca's other prompt.

`codealpaca-lori` has the blanks of LoRI's prompts (2504.07448), which its code's layout put there: every line of
Alpaca's prompt but the first is indented by 20 spaces, the answer begins after 20 in a line of its own, and the first
line of the prompt without an input ends in one.
"""

from functools import partial

from .rows import Row, need_text, published
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
_LORI_INDENT = " " * 20


def example(row: Row) -> Example:
    """A row as Alpaca's prompt, and the answer on a new line."""
    instruction, given, output = need_text(row, "instruction", "input", "output")
    prompt = (_WITH_INPUT if given else _WITHOUT).format(instruction=instruction, input=given)
    return Example(prompt, f"\n{output}")


def lori_example(row: Row) -> Example:
    """A row with the blanks of LoRI's prompt; the answer has none before it."""
    instruction, given, output = need_text(row, "instruction", "input", "output")
    first, *lines = (_WITH_INPUT if given else _WITHOUT.replace("request.", "request. ")).split("\n")
    template = "\n".join([first, *(_LORI_INDENT + line if line else line for line in lines), _LORI_INDENT])
    return Example(template.format(instruction=instruction, input=given), output)


_read = partial(published, hub=HUB_ID, config=None, files={"train": _FILES})
_task = partial(Task, kind="text", metric="loss", splits=("train",))
TASK = _task("codealpaca", read=_read("codealpaca", make=example))
LORI = _task("codealpaca-lori", read=_read("codealpaca-lori", make=lori_example))
TASKS = {task.name: task for task in (TASK, LORI)}
