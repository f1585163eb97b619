"""Examples to token batches: tasks, local files and hub data sets; responses carry the loss."""

import hashlib
import json
import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from .errors import DataError
from .tasks import TASKS, Example, Task, gsm8k
from .tasks.rows import SUFFIXES, Row, hub_rows, need_text, read_rows

_log = logging.getLogger(__name__)

ALLOWED_FIELDS = "prompt + completion, messages, or question + answer (GSM8K's)"
IGNORE = -100  # the label of a token without loss


def task_of(source: str) -> Task | None:
    """The task that `source` names: its name, or its name and local files, `gsm8k:data/gsm8k`. Else None."""
    return TASKS.get(source.partition(":")[0])


def load_examples(
    source: str, split: str = "train", limit: int | None = None, seed: int = 0, tokenizer: Any = None
) -> list[Example]:
    """The examples of a split of a task, a local file or a hub data set.

    Args:
        source: a task's name (`nano-math`), a task and its local files (`spider:/data/spider`), a JSONL or
        JSON
            file, or a hub id (`openai/gsm8k:main` names a configuration). Rows of a file or of the hub hold
            `prompt` and `completion`, or `messages`, or GSM8K's `question` and `answer`. A file is one split,
            whatever `split` says.
        split: "train" or "test"; for a hub id, any split it has.
        limit: at most so many examples, drawn by `seed` and left in their order; a generated task draws anew.
        tokenizer: whose chat template turns `messages` into text.

    Raises:
        DataError: no such source or split; no rows; a row without its fields (file and line).
    """
    if limit is not None and limit < 1:
        raise DataError(f"A limit of {limit} examples leaves none; give at least 1.")
    task = task_of(source)
    if task is not None:
        examples = task.load(split, source.partition(":")[2] or None, limit, seed)
    else:
        examples = [_example(row, tokenizer) for row in _rows(source, split)]
    if limit is None or limit >= len(examples):
        return examples
    return [examples[i] for i in sorted(random.Random(seed).sample(range(len(examples)), limit))]


def data_hash(examples: Sequence[Example]) -> str:
    """SHA-256 over every example's prompt and completion, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.prompt, example.completion]).encode())
    return digest.hexdigest()


def _rows(source: str, split: str) -> list[Row]:
    path = Path(source).expanduser()
    if path.is_file():
        return read_rows(path)
    name, _, config = source.partition(":")
    if path.exists() or source.endswith(SUFFIXES) or source[:1] in "./~" or name.count("/") != 1:
        raise DataError(
            f"There is no data {source!r}: it is no file here and no task; give a file of JSON lines, a hub "
            f"id (owner/name), or one of {', '.join(TASKS)}."
        )
    return hub_rows(name, split, config or None)


def _example(row: Row, tokenizer: Any) -> Example:
    fields = row.values.keys()
    if {"prompt", "completion"} <= fields:
        prompt, completion = need_text(row, "prompt", "completion")
        return Example(prompt, completion)
    if "messages" in fields:
        return _conversation(row, tokenizer)
    if {"question", "answer"} <= fields:
        return gsm8k.example(row)
    raise DataError(f"{row.place}: has {', '.join(sorted(fields)) or 'no fields'}; a row needs {ALLOWED_FIELDS}.")


def _conversation(row: Row, tokenizer: Any) -> Example:
    """The last message, the assistant's, is the response; all before it is the prompt.

    Without a chat template the text is `User: …`, a blank line, `Assistant: …`.
    """
    messages = row.values["messages"]
    whole = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not whole or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(
            f"{row.place}: 'messages' must be a list of two or more objects with 'role' and 'content', and "
            "the last one's role must be 'assistant'."
        )
    if getattr(tokenizer, "chat_template", None):
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        if text.startswith(prompt):
            return Example(prompt, text[len(prompt) :].rstrip("\n"), meta={"chat": True})
        # Some templates rewrite the turns before the last; the response itself is still what was said.
        return Example(prompt, messages[-1]["content"], meta={"chat": True})
    told = "".join(f"{m['role'].capitalize()}: {m['content']}\n\n" for m in messages[:-1])
    return Example(f"{told}Assistant:", f" {messages[-1]['content']}")


def encode_prompt(example: Example, tokenizer: Any) -> list[int]:
    """Token ids of the prompt, with the tokenizer's own opening tokens, in training and evaluation alike."""
    # A chat template has written its special tokens already.
    # verbose: a text longer than the model takes is cut later, and told then.
    ids = tokenizer(example.prompt, add_special_tokens=not example.meta.get("chat", False), verbose=False)["input_ids"]
    while ids and ids[-1] == tokenizer.eos_token_id and ids[-1] != tokenizer.bos_token_id:
        ids = ids[:-1]  # some tokenizers close every text; the response must follow
    return ids


def encode_completion(example: Example, completion: str, prompt_ids: Sequence[int], tokenizer: Any) -> list[int]:
    """Token ids of a completion such that prompt + completion reads as one text and the prompt stays.

    Tokenized together where that keeps the prompt's tokens, else apart: at evaluation the model meets the
    prompt's own tokens, so training must show the same.
    """
    special = not example.meta.get("chat", False)
    joint = tokenizer(example.prompt + completion, add_special_tokens=special, verbose=False)["input_ids"]
    if joint[: len(prompt_ids)] == list(prompt_ids):
        ids = joint[len(prompt_ids) :]
    else:
        ids = tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def tokenize(examples: Sequence[Example], tokenizer: Any, max_length: int) -> Dataset:
    """Examples as token ids, with a mask that says which tokens are the response.

    Longer examples are cut at `max_length` from the right, so they lose the end-of-text token: the model does
    not learn to stop in mid-answer. Those whose prompt alone is that long would have no response left and are
    left out. The log says how many of each.

    Returns:
        A data set with `input_ids`, `completion_mask` (0 prompt, 1 response and the end-of-text token after
        it), `cut` (whether the example was cut) and `index` (its place among `examples`).

    Raises:
        DataError: no examples, a tokenizer without an end-of-text token, or no response left in any example.
    """
    if not examples:
        raise DataError("There are no examples to tokenize; give at least one.")
    if tokenizer.eos_token_id is None:
        raise DataError("The tokenizer has no end-of-text token (eos_token); set one, so that answers end.")
    rows: dict[str, list] = {"input_ids": [], "completion_mask": [], "cut": [], "index": []}
    num_without = 0
    for index, example in enumerate(examples):
        prompt = encode_prompt(example, tokenizer)
        ids = [
            *prompt,
            *encode_completion(example, example.completion, prompt, tokenizer),
            tokenizer.eos_token_id,
        ]
        if len(prompt) >= max_length:
            num_without += 1
            continue
        mask = [0] * len(prompt) + [1] * (len(ids) - len(prompt))
        rows["input_ids"].append(ids[:max_length])
        rows["completion_mask"].append(mask[:max_length])
        rows["cut"].append(len(ids) > max_length)
        rows["index"].append(index)
    if not rows["input_ids"]:
        raise DataError(f"Every prompt has {max_length} tokens (max_length) or more: give a larger max_length.")
    if num_cut := sum(rows["cut"]):
        _log.warning("%d of %d examples are longer than %d tokens and were cut", num_cut, len(examples), max_length)
    if num_without:
        _log.warning(
            "%d of %d examples have a prompt of %d tokens or more and were left out",
            num_without, len(examples), max_length,
        )  # fmt: skip
    return Dataset.from_dict(rows)


def batches(dataset: Dataset, tokenizer: Any, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of similar length, padded on the right, the longest first.

    Yields:
        `input_ids`, `attention_mask` and `labels` (-100 where no loss is), each int64 `[B, S]` on the CPU.
        Every example comes once; the last batch may be smaller.
    """
    if batch_size < 1:
        raise DataError(f"A batch size of {batch_size} is out of range; give at least 1.")
    all_ids, all_masks = dataset["input_ids"][:], dataset["completion_mask"][:]
    order = sorted(range(len(all_ids)), key=lambda i: -len(all_ids[i]))  # a stable sort: the same order every time
    for start in range(0, len(order), batch_size):
        picked = order[start : start + batch_size]
        ids = [torch.tensor(all_ids[i]) for i in picked]
        labels = [row.masked_fill(torch.tensor(all_masks[i]) == 0, IGNORE) for row, i in zip(ids, picked, strict=True)]
        yield {
            "input_ids": pad(ids, tokenizer.pad_token_id),
            "attention_mask": pad([torch.ones_like(row) for row in ids], 0),
            "labels": pad(labels, IGNORE),
        }


def pad(rows: Sequence[torch.Tensor], value: int | None, side: str = "right") -> torch.Tensor:
    """Rows of different lengths as one `[B, S]` tensor; without a padding token, 0 stands in, masked."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value or 0, padding_side=side)


def test_source(data: str, test_data: str | None = None) -> str | None:
    """Where test examples come from: `test_data`, else `data` where it is a task with its own test split.

    A single file is one split, so a task read from one has no other, unless all that it has is a test split; and some
    data has none at all.
    """
    if test_data is not None:
        return test_data
    task, local = task_of(data), data.partition(":")[2]
    if task is None or "test" not in task.splits:
        return None
    if "train" in task.splits and Path(local).expanduser().is_file():
        return None
    return data
