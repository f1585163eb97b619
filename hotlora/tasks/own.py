"""People's own rows as a task: an answer is right if it is the row's completion, blanks around it aside."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..base.errors import DataError
from .task import Example, Task
from .tokens import encode_completion, encode_prompt

_ROOM = 16  # tokens that an answer may be longer than the longest completion


def own_task(data: str, examples: Sequence[Example], tokenizer: Any) -> Task:
    """The task that these rows are; of texts alone one of kind "text". DataError: a row without a prompt or completion,
    which cannot be answered."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(data.rstrip("/")).stem).strip("-.") or "rows"
    if not any(example.prompt.strip() for example in examples):
        return Task(name, "text", "token_accuracy", lambda *_: list(examples), splits=("test",))
    longest = 0
    for number, example in enumerate(examples, 1):
        if not example.prompt.strip() or not example.completion.strip():
            raise DataError(
                f"{example.place or f'row {number}'} has no {'completion' if example.prompt.strip() else 'prompt'}, so "
                "nothing says what a right answer is: give rows with both, or messages that end with an answer."
            )
        prompt = encode_prompt(example, tokenizer)
        longest = max(longest, len(encode_completion(example, example.completion, prompt, tokenizer)))

    def is_same(example: Example, text: str) -> bool:
        ids = tokenizer(example.completion, add_special_tokens=False)["input_ids"]
        return text.strip() == tokenizer.decode(ids, skip_special_tokens=True).strip()

    return Task(name, "generate", "exact_match", lambda *_: list(examples), is_same, longest + _ROOM, splits=("test",))
