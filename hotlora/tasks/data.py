"""Examples to token batches: tasks, local files and hub data sets; responses carry the loss."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from ..base.errors import DataError
from ..base.files import read_json
from . import TASKS, Example, Task, gsm8k
from .chat import ChatTemplate, Notes
from .messages import as_plain_text, is_empty, read_conversation
from .rows import SUFFIXES, Row, hub_rows, need_text, read_rows
from .split import drawn

_log = logging.getLogger(__name__)

ALLOWED_FIELDS = "prompt + completion, messages, or question + answer (GSM8K's)"
IGNORE = -100  # the label of a token without loss
_ANCHORS = ("\n", ":", "a", "1", ")", "é")  # texts to tokenize a completion behind; one must not join with it
_CHAT_FILE = ".chat.json"  # beside FILE.jsonl, for all its rows
_CHAT_FIELDS = ("tools", "chat_template_kwargs")


def task_of(source: str) -> Task | None:
    """The task that `source` names: its name, or its name and local files, `gsm8k:data/gsm8k`. Else None."""
    return TASKS.get(source.partition(":")[0])


def load_examples(
    source: str,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    now: datetime | None = None,
) -> list[Example]:
    """The examples of a split of a task, a local file or a hub data set.

    Args:
        source: a task's name (`nano-math`), a task and its local files (`spider:/data/spider`), a JSONL or JSON
            file, or a hub id (`openai/gsm8k:main` names a configuration). Rows of a file or of the hub hold
            `prompt` and `completion`, or `messages`, or GSM8K's `question` and `answer`. A file is one split,
            whatever `split` says.
        split: "train" or "test"; for a hub id, any split it has.
        limit: at most so many examples, drawn by `seed` and left in their order; a generated task draws anew.
        tokenizer: whose chat template turns `messages` into text.
        tools, chat_template_kwargs: what the template is given besides, as `apply_chat_template` takes it; None: what
            FILE.chat.json beside FILE.jsonl holds under these names. A row may have its own: its tools come in place
            of these, its chat_template_kwargs come before them.
        now: the time that a template which writes the date is told; None: the present.

    Raises:
        DataError: no such source or split; no rows; a row without its fields, or that the chat template refuses (file
            and line).
    """
    if limit is not None and limit < 1:
        raise DataError(f"A limit of {limit} examples leaves none; give at least 1.")
    task = task_of(source)
    if task is not None:
        examples = task.load(split, source.partition(":")[2] or None, limit, seed)
    else:
        notes: Notes = {}
        shared = _chat_options(source)
        shared |= {"tools": list(tools)} if tools is not None else {}
        shared |= {"chat_template_kwargs": chat_template_kwargs} if chat_template_kwargs is not None else {}
        has_template = bool(getattr(tokenizer, "chat_template", None))
        template = ChatTemplate(tokenizer, now or datetime.now(), notes) if has_template else None
        rows = _rows(source, split)
        examples = [_example(row, tokenizer, template, shared, notes) for row in rows]
        for note, place in notes.items():
            _log.warning("%s: %s (told once)", place, note)
        empty = [row.place for row, example in zip(rows, examples, strict=True) if _is_empty(row, example)]
        if empty:
            _log.warning(
                "%d of %d rows have an empty answer, from which a model learns to say nothing; the first: %s",
                len(empty), len(rows), empty[0],
            )  # fmt: skip
    return drawn(examples, limit, seed)


def data_hash(examples: Sequence[Example]) -> str:
    """SHA-256 over every example's prompt and completion, in order; of a conversation, over what was read."""
    digest = hashlib.sha256()
    for example in examples:
        read = [example.source_hash] if example.source_hash else [example.prompt, example.completion]
        digest.update(json.dumps(read).encode())
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


def _chat_options(source: str) -> dict[str, Any]:
    """What FILE.chat.json says for all rows of FILE.jsonl."""
    path = Path(source).expanduser()
    if not path.is_file():
        return {}
    suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), path.suffix)
    beside = path.with_name(path.name.removesuffix(suffix) + _CHAT_FILE)
    if not beside.is_file():
        return {}
    found = read_json(beside)
    if unknown := sorted(set(found).difference(_CHAT_FIELDS)):
        raise DataError(f"{beside}: has {', '.join(unknown)}; it may hold {' and '.join(_CHAT_FIELDS)}.")
    if not isinstance(found.get("chat_template_kwargs", {}), dict):
        raise DataError(f"{beside}: 'chat_template_kwargs' must be an object.")
    _log.info("%s for all rows, from %s", " and ".join(found), beside)
    return found


def _example(
    row: Row, tokenizer: Any, template: ChatTemplate | None, shared: Mapping[str, Any], notes: Notes
) -> Example:
    fields = row.values.keys()
    read: tuple[str, ...]
    if {"prompt", "completion"} <= fields:
        read = ("prompt", "completion")
        prompt, completion = need_text(row, *read)
        example = Example(prompt, completion, place=row.place)
    elif "messages" in fields:
        read = ("messages", *(_CHAT_FIELDS if template else ()))
        talk = read_conversation(row, shared.get("tools"), shared.get("chat_template_kwargs"))
        example = template.example(talk) if template else as_plain_text(talk, sized=tokenizer is None)
    elif {"question", "answer"} <= fields:
        read = ("question", "answer")
        example = replace(gsm8k.example(row), place=row.place)
    else:
        raise DataError(f"{row.place}: has {', '.join(sorted(fields)) or 'no fields'}; a row needs {ALLOWED_FIELDS}.")
    for name in sorted(fields - set(read)):
        notes.setdefault(f"nothing reads the column {name!r}", row.place)
    return example


def _is_empty(row: Row, example: Example) -> bool:
    talk = example.source_hash is not None
    return is_empty(row.values["messages"][-1]) if talk else not example.completion.strip()


def encode_prompt(example: Example, tokenizer: Any) -> list[int]:
    """Token ids of the prompt, with the tokenizer's own opening tokens, in training and evaluation alike."""
    # A chat template has written its special tokens already.
    # verbose: a text longer than the model takes is cut later, and told then.
    chat = example.text is not None
    ids = tokenizer(example.prompt, add_special_tokens=not chat, verbose=False)["input_ids"]
    if not chat and ids and ids[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:
        # Some tokenizers close every text; the response must follow. What the prompt itself ends with stays.
        own = tokenizer(example.prompt, add_special_tokens=False, verbose=False)["input_ids"]
        added = _num_last(ids, tokenizer.eos_token_id) - _num_last(own, tokenizer.eos_token_id)
        ids = ids[: len(ids) - added]
    return ids


def _num_last(ids: Sequence[int], token_id: int) -> int:
    """How many times `token_id` stands at the end."""
    return next((n for n, other in enumerate(reversed(ids)) if other != token_id), len(ids))


def encode_completion(example: Example, completion: str, prompt_ids: Sequence[int], tokenizer: Any) -> list[int]:
    """Token ids of a completion such that prompt + completion reads as one text and the prompt stays.

    Tokenized together where that keeps the prompt's tokens, else apart: at evaluation the model meets the
    prompt's own tokens, so training must show the same.
    """
    special = example.text is None
    joint = tokenizer(example.prompt + completion, add_special_tokens=special, verbose=False)["input_ids"]
    if joint[: len(prompt_ids)] == list(prompt_ids):
        ids = joint[len(prompt_ids) :]
    else:
        ids = _encode_apart(completion, prompt_ids, joint, tokenizer)
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _encode_apart(completion: str, prompt_ids: Sequence[int], joint: list[int], tokenizer: Any) -> list[int]:
    """The completion's own ids, which behind the prompt's read as the joint text does.

    Llama's and Mixtral's tokenizers put a blank before every text, so there it is tokenized behind another one, whose
    ids are cut off.
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def text_of(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False).removesuffix(tokenizer.eos_token or "")

    apart, wanted = encode(completion), text_of(joint)
    if text_of([*prompt_ids, *apart]) == wanted:
        return apart
    for anchor in _ANCHORS:
        head, both = encode(anchor), encode(anchor + completion)
        if both[: len(head)] == head and text_of([*prompt_ids, *both[len(head) :]]) == wanted:
            return both[len(head) :]
    return apart  # a tokenizer whose ids do not give a text back, as by an unknown token


def tokenize(examples: Sequence[Example], tokenizer: Any, max_length: int, *, vocab_size: int | None = None) -> Dataset:
    """Examples as token ids, with a mask that says which tokens are the response.

    A prompt and its completion get an end-of-text token; a conversation is what its chat template wrote, no more.
    Longer examples are cut at `max_length` from the right, so they lose their end: the model does not learn to stop in
    mid-answer. Those whose prompt alone is that long would have no response left and are left out. The log says how
    many of each.

    Args:
        vocab_size: rows of the model's embedding, which every token id must be below; None: not looked at.

    Returns:
        A data set with `input_ids`, `completion_mask` (0 prompt, 1 response and the end-of-text token after
        it), `cut` (whether the example was cut) and `index` (its place among `examples`).

    Raises:
        DataError: no examples, a tokenizer without an end-of-text token, no response left in any example; or a text
            that the tokenizer refuses, or a token id past the embedding (file and line).
    """
    if not examples:
        raise DataError("There are no examples to tokenize; give at least one.")
    if tokenizer.eos_token_id is None:
        raise DataError("The tokenizer has no end-of-text token (eos_token); set one, so that answers end.")
    if vocab_size is not None and (tokenizer.pad_token_id or 0) >= vocab_size:
        raise DataError(f"The padding token {_past(tokenizer, tokenizer.pad_token_id, vocab_size)}")
    rows: dict[str, list] = {"input_ids": [], "completion_mask": [], "cut": [], "index": []}
    num_without = 0
    for index, example in enumerate(examples):
        place = example.place or f"example {index + 1}"
        try:
            ids, mask = _encode(example, tokenizer, place)
        except (TypeError, UnicodeEncodeError) as error:  # a lone surrogate, by the tokenizer's way to say it
            raise DataError(f"{place}: the tokenizer refuses its text ({error}): give whole characters.") from error
        if vocab_size is not None and max(ids, default=0) >= vocab_size:
            raise DataError(f"{place}: {_past(tokenizer, max(ids), vocab_size)}")
        if not any(mask[:max_length]):
            num_without += 1
            continue
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


def _past(tokenizer: Any, token_id: int, vocab_size: int) -> str:
    token = tokenizer.convert_ids_to_tokens(token_id)
    return (
        f"{token!r} is token {token_id}, and the model's embedding has {vocab_size} rows: give the model's own "
        "tokenizer, or resize the model's embedding and save it."
    )


def _encode(example: Example, tokenizer: Any, place: str) -> tuple[list[int], list[int]]:
    """(token ids, 1 for each that carries loss)."""
    if example.text is None:
        prompt = encode_prompt(example, tokenizer)
        ids = [*prompt, *encode_completion(example, example.completion, prompt, tokenizer), tokenizer.eos_token_id]
        return ids, [0] * len(prompt) + [1] * (len(ids) - len(prompt))
    fast = tokenizer.is_fast
    encoded = tokenizer(example.text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    ids = encoded["input_ids"]
    if fast:
        ends = [end for _, end in encoded["offset_mapping"]]
    else:
        ends = _ends(example, ids, tokenizer, place)
    mask: list[int] = []
    start = 0
    for end in ends:
        # From where the token before ended: some tokenizers leave blanks out of a token's offsets. Several tokens of
        # one character have one end.
        inside = any(start < b and a < end for a, b in example.spans) if end > start else bool(mask and mask[-1])
        mask.append(int(inside))
        start = max(start, end)
    return ids, mask


def _ends(example: Example, ids: list[int], tokenizer: Any, place: str) -> list[int]:
    """Where each token ends, as far as the spans need it, by a tokenizer in Python, which does not tell."""
    assert example.text is not None
    ends = [len(example.text)] * len(ids)
    for edge in sorted({edge for span in example.spans for edge in span}, reverse=True):
        head = tokenizer(example.text[:edge], add_special_tokens=False, verbose=False)["input_ids"]
        if ids[: len(head)] != head:
            raise DataError(
                f"{place}: this tokenizer does not tell which characters a token is of, and the answer begins or ends "
                "inside of one: use the model's fast tokenizer (tokenizer.json)."
            )
        ends[: len(head)] = [edge] * len(head)
    return ends


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
