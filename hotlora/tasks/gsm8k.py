"""GSM8K: grade-school arithmetic word problems, scored by exact match of the number after ``####``.

A row of ``train.jsonl`` (github.com/openai/grade-school-math, MIT), or of the hub's ``openai/gsm8k``::

    {"question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in
      May. How many clips did Natalia sell altogether in April and May?",
     "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\\nNatalia sold 48+24 = <<48+24=72>>72 clips
      altogether in April and May.\\n#### 72"}

The answer is trained on as published, with its ``<<48/2=24>>`` calculator marks, as lm-eval shows it to
models. An answer ends at lm-eval's `until` texts, or after its 256 tokens: some published answers have blank lines.
There are 7,473 train and 1,319 test problems.

`gsm8k-lori` is LoRI's protocol (2504.07448), which HELLoRA's numbers appear to come from: another prompt, "The final
answer is: " in place of ``####``, and numbers compared as floats. It is zero-shot and greedy, with 512 new tokens.
"""

import re
from functools import partial

from .rows import Row, need_text, published
from .task import Example, Task

HUB_ID = "openai/gsm8k"
_FILES = {split: [f"{split}.jsonl", f"{split}.jsonl.gz"] for split in ("train", "test")}
STOP = ("Question:", "</s>", "<|im_end|>")  # `until` of lm-eval's gsm8k: a blank line ends nothing
_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")  # lm-eval's strict match, the official extraction

LORI_INSTRUCTION = "\nAnswer the above question. First think step by step and then answer the final number.\n"
LORI_ANSWER = "The final answer is: "
_NUMBER = re.compile(r"-?\d+\.?\d*")


def example(row: Row) -> Example:
    """A row as prompt, completion and gold answer."""
    question, answer = need_text(row, "question", "answer")
    return Example(f"Question: {question}\nAnswer:", f" {answer}", meta={"answer": answer})


def final_answer(text: str) -> str | None:
    """The number after the first ``#### ``, without commas and trailing dots; None where there is none.

    As published, a ``$`` between the two makes the answer no answer.
    """
    found = _ANSWER.search(text)
    return found[1].replace(",", "").rstrip(".") or None if found else None


def score(example: Example, text: str) -> bool:
    """Exact match of the final numbers, compared as strings: ``18`` is not ``18.0``."""
    answer = final_answer(text)
    return answer is not None and answer == final_answer(example.meta["answer"])


def lori_example(row: Row) -> Example:
    """A row as LoRI trains on it and asks it."""
    question, answer = need_text(row, "question", "answer")
    target = answer.replace("####", LORI_ANSWER)
    return Example(question + LORI_INSTRUCTION, target, meta={"answer": target})


def lori_number(text: str) -> float | None:
    """The first number from "The final answer is: " to the next such words, without commas; else the last of all."""
    text = text.replace(",", "")
    after = text.split(LORI_ANSWER)[1:]
    found = (_NUMBER.findall(after[0])[:1] if after else []) or _NUMBER.findall(text)[-1:]
    return float(found[0]) if found else None


def lori_score(example: Example, text: str) -> bool:
    """Equal as floats: ``18`` is ``18.0``. LoRI reads prompt and answer as one text, and so does this.

    So an answer without a number is given the question's last one, which is right in 30 of the 1,319 test problems.
    """
    answer = lori_number(example.prompt + text)
    return answer is not None and answer == lori_number(example.meta["answer"])


_read = partial(published, hub=HUB_ID, config="main", files=_FILES)
TASK = Task("gsm8k", "generate", "exact_match", _read("gsm8k", make=example), score, max_new_tokens=256, stop=STOP)
LORI = Task(
    "gsm8k-lori", "generate", "exact_match", _read("gsm8k-lori", make=lori_example), lori_score, max_new_tokens=512
)
TASKS = {task.name: task for task in (TASK, LORI)}
