"""Examples to token batches; what carries no training loss is masked."""

import logging
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset

from ..base.errors import DataError
from .stored import mapped_table
from .task import TRAINED, Example

_log = logging.getLogger(__name__)

# At a time, of examples and of their characters: a tokenizer takes sixty times a text's memory while it works.
_AT_A_TIME, _CHARACTERS = 250, 1_000_000
_SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "completion_mask": pa.list_(pa.int8()),
        "labels": pa.list_(pa.int32()),
        "cut": pa.bool_(),
        "length": pa.int64(),
        "index": pa.int64(),
    }
)
IGNORE = -100  # the label of a token without loss
_ANCHORS = ("\n", ":", "a", "1", ")", "é")  # texts to tokenize a completion behind; one must not join with it


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


def tokenize(
    examples: Sequence[Example],
    tokenizer: Any,
    max_length: int,
    *,
    vocab_size: int | None = None,
    window: int | None = None,
) -> Dataset:
    """Examples as token ids, with a mask that says which tokens carry loss.

    A prompt and its completion get an end-of-text token; a conversation is what its chat template wrote, no more.
    Longer examples are cut at `max_length` from the right, so they lose their end: the model does not learn to stop in
    mid-answer. Those of which nothing that carries loss is left, as their prompt alone is that long, are left out. The
    log says how many of each.

    Args:
        vocab_size: rows of the model's embedding, which every token id must be below; None: not looked at.
        window: tokens that the model reads at most; rows that are longer are told. None: not known.

    Returns:
        A data set with `input_ids`, `labels` (-100 where there is no loss; TRL's and transformers' trainers take them
        as they are), `completion_mask` (1 where there is some; the end-of-text token has it), `cut` (whether the
        example was cut), `length` (its tokens before that) and `index` (its place among `examples`).

    Raises:
        DataError: no examples, a tokenizer without an end-of-text token, nothing with loss left in any example; or a
            text that the tokenizer refuses, or a token id past the embedding (file and line).
    """
    if not examples:
        raise DataError("There are no examples to tokenize; give at least one.")
    if tokenizer.eos_token_id is None:
        raise DataError("The tokenizer has no end-of-text token (eos_token); set one, so that answers end.")
    if vocab_size is not None and (tokenizer.pad_token_id or 0) >= vocab_size:
        raise DataError(f"The padding token {_past(tokenizer, tokenizer.pad_token_id, vocab_size)}")
    table = mapped_table(_token_tables(examples, tokenizer, max_length, vocab_size), _SCHEMA)
    # By itself Dataset looks at the whole table for a fingerprint.
    dataset = Dataset(table, fingerprint=uuid4().hex)
    if not len(dataset):
        raise DataError(
            f"Every prompt has {max_length} tokens or more, and the model reads no more: give shorter rows."
            if max_length == window
            else f"Every prompt has {max_length} tokens (max_length) or more: give a larger max_length."
        )
    than = f"{max_length} tokens" + (", which the model reads at most," if max_length == window else "")
    if num_cut := sum(dataset["cut"]):
        _log.warning("%d of %d examples are longer than %s and were cut", num_cut, len(examples), than)
    if num_without := len(examples) - len(dataset):
        _log.warning(
            "%d of %d examples have a prompt of %s or more and were left out", num_without, len(examples), than
        )
    longest = min(pc.max(dataset.data["length"]).as_py(), max_length)
    if window is not None and longest > window:
        _log.warning(
            "the longest row has %d tokens, and the model was made for %d: give --max-length %d, or stretch its "
            "positions in config.json (rope_scaling)", longest, window, window,
        )  # fmt: skip
    return dataset


def _token_tables(
    examples: Sequence[Example], tokenizer: Any, max_length: int, vocab_size: int | None
) -> Iterator[pa.Table]:
    for start, some in _groups(examples):
        rows: dict[str, list] = {name: [] for name in _SCHEMA.names}
        for index, (ids, mask) in enumerate(_encoded(some, tokenizer, start), start):
            if vocab_size is not None and max(ids, default=0) >= vocab_size:
                raise DataError(f"{_place(some[index - start], index)}: {_past(tokenizer, max(ids), vocab_size)}")
            if not any(mask[:max_length]):
                continue
            rows["input_ids"].append(ids[:max_length])
            rows["completion_mask"].append(mask[:max_length])
            rows["labels"].append([i if m else IGNORE for i, m in zip(ids[:max_length], mask, strict=False)])
            rows["cut"].append(len(ids) > max_length)
            rows["length"].append(len(ids))
            rows["index"].append(index)
        yield pa.table(rows, schema=_SCHEMA)


def _groups(examples: Sequence[Example]) -> Iterator[tuple[int, Sequence[Example]]]:
    """All examples in turn, some at a time, with the place of the first of them."""
    for begin in range(0, len(examples), _AT_A_TIME):
        some = examples[begin : begin + _AT_A_TIME]
        start = characters = 0
        for index, example in enumerate(some):
            length = len(example.prompt if example.text is None else example.text)
            if characters and characters + length > _CHARACTERS:
                yield begin + start, some[start:index]
                start, characters = index, 0
            characters += length
        yield begin + start, some[start:]


def token_lengths(dataset: Dataset) -> list[int]:
    """The number of tokens of each row, without a list of its ids being made."""
    ids = dataset.select_columns("input_ids").with_format("arrow")[:]["input_ids"]
    return pc.list_value_length(ids).to_pylist()


def told(examples: Sequence[Example], dataset: Dataset, train_on: str) -> str:
    """A line on what is trained: rows, their formats, tokens, the share that carries loss, what is cut or left out."""
    lengths = token_lengths(dataset)
    num_tokens, num_trained = sum(lengths), pc.sum(pc.list_flatten(dataset.data["completion_mask"])).as_py()
    formats = Counter(example.format for example in examples)
    read = [what if len(formats) == 1 else f"{number:,} {what}" for what, number in formats.most_common() if what]
    text = f"{len(examples):,} row{'s' * (len(examples) != 1)}" + (f" ({'; '.join(read)})" if read else "")
    text += (
        f", {num_tokens:,} tokens, {num_trained / num_tokens:.0%} of them carry loss ({TRAINED[train_on]}); the "
        f"longest has {max(lengths):,}"
    )
    cut, left_out = pc.sum(dataset.data["cut"]).as_py(), len(examples) - len(dataset)
    if cut:
        most = pc.max(dataset.data["length"]).as_py()
        text += f"; {cut:,} cut" + ("" if left_out else f" (--max-length {most} would cut none)")
    return text + (f"; {left_out:,} left out, whose loss is all cut" if left_out else "")


def _encoded(examples: Sequence[Example], tokenizer: Any, start: int) -> Iterator[tuple[list[int], list[int]]]:
    """Each example's token ids, and 1 for each that carries loss. Conversations are tokenized together, as a fast
    tokenizer does that on all cores."""
    texts = [example.text for example in examples if example.text is not None]
    together: Any = None
    if tokenizer.is_fast and texts:
        try:
            together = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        except (TypeError, UnicodeEncodeError):
            pass  # one at a time, to say which
    number = 0
    for index, example in enumerate(examples, start):
        try:
            if example.text is None or together is None:
                yield _encode(example, tokenizer, _place(example, index))
            else:
                ids, offsets = together["input_ids"][number], together["offset_mapping"][number]
                yield ids, _mask(example.spans, [end for _, end in offsets])
            number += example.text is not None
        except (TypeError, UnicodeEncodeError) as error:  # a lone surrogate, by the tokenizer's way to say it
            place = _place(example, index)
            raise DataError(f"{place}: the tokenizer refuses its text ({error}): give whole characters.") from error


def _place(example: Example, index: int) -> str:
    return example.place or f"example {index + 1}"


def _past(tokenizer: Any, token_id: int, vocab_size: int) -> str:
    token = tokenizer.convert_ids_to_tokens(token_id)
    return (
        f"{token!r} is token {token_id}, and the model's embedding has {vocab_size} rows: give the model's own "
        "tokenizer, or resize the model's embedding and save it."
    )


def _encode(example: Example, tokenizer: Any, place: str) -> tuple[list[int], list[int]]:
    """(token ids, 1 for each that carries loss)."""
    if example.text is not None:
        return _with_mask(example.text, example.spans, tokenizer, place, add_special_tokens=False)
    prompt = encode_prompt(example, tokenizer)
    mask = [0] * len(prompt)
    if example.spans:
        _, mask = _with_mask(example.prompt, example.spans, tokenizer, place, add_special_tokens=True)
        mask = mask[: len(prompt)]  # without the end-of-text tokens that a tokenizer added
    ids = [*prompt, *encode_completion(example, example.completion, prompt, tokenizer), tokenizer.eos_token_id]
    return ids, mask + [1] * (len(ids) - len(prompt))


def _with_mask(
    text: str, spans: Sequence[tuple[int, int]], tokenizer: Any, place: str, *, add_special_tokens: bool
) -> tuple[list[int], list[int]]:
    fast = tokenizer.is_fast
    options = {"add_special_tokens": add_special_tokens, "verbose": False}
    encoded = tokenizer(text, return_offsets_mapping=fast, **options)
    ids = encoded["input_ids"]
    ends = [end for _, end in encoded["offset_mapping"]] if fast else _ends(text, spans, ids, tokenizer, place, options)
    return ids, _mask(spans, ends)


def _mask(spans: Sequence[tuple[int, int]], ends: Sequence[int]) -> list[int]:
    """1 for each token that has a character of a span, by where tokens end.

    From where the token before ended: some tokenizers leave blanks out of a token's offsets. Several tokens of one
    character have one end, and an added special token has the one before it.
    """
    ends = list(accumulate(ends, max))
    mask = [0] * len(ends)
    for a, b in spans:
        first = bisect_right(ends, a)
        last = bisect_left(ends, b, lo=first)
        stop = bisect_right(ends, ends[last]) if last < len(ends) else last
        mask[first:stop] = [1] * (stop - first)
    return mask


def _ends(
    text: str, spans: Sequence[tuple[int, int]], ids: list[int], tokenizer: Any, place: str, options: dict[str, Any]
) -> list[int]:
    """Where each token ends, as far as the spans need it, by a tokenizer in Python, which does not tell."""
    ends = [len(text)] * len(ids)
    for edge in sorted({edge for span in spans for edge in span}, reverse=True):
        head = tokenizer(text[:edge], **options)["input_ids"]
        if edge < len(text) and ids[: len(head)] != head:
            raise DataError(
                f"{place}: this tokenizer does not tell which characters a token is of, and the answer begins or ends "
                "inside of one: use the model's fast tokenizer (tokenizer.json)."
            )
        ends[: len(head)] = [edge] * len(head)
    return ends


MOST_TOKENS = 2**14
"""Of a batch that is not trained on: 64 rows of 256. More would be no faster on any device, and need more memory than a
step of training."""


def batch_places(dataset: Dataset, batch_size: int, most_tokens: int = MOST_TOKENS) -> list[list[int]]:
    """The places of the rows of each batch that `batches` makes.

    DataError: a batch size below 1.
    """
    if batch_size < 1:
        raise DataError(f"A batch size of {batch_size} is out of range; give at least 1.")
    lengths = token_lengths(dataset)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # a stable sort: the same order every time
    groups, start = [], 0
    while start < len(order):
        rows = max(1, min(batch_size, most_tokens // max(1, lengths[order[start]])))
        groups.append(order[start : start + rows])
        start += rows
    return groups


def batches(
    dataset: Dataset, tokenizer: Any, batch_size: int, most_tokens: int = MOST_TOKENS
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of similar length, padded on the right, the longest first: of `batch_size` rows, or of fewer where those
    would have more than `most_tokens`, padding included.

    Yields:
        `input_ids`, `attention_mask` and `labels` (-100 where no loss is), each int64 `[B, S]` on the CPU.
        Every example comes once; the last batch may be smaller.
    """
    for places in batch_places(dataset, batch_size, most_tokens):
        rows = dataset[places]
        ids = [torch.tensor(row) for row in rows["input_ids"]]
        yield {
            "input_ids": pad(ids, tokenizer.pad_token_id),
            "attention_mask": pad([torch.ones_like(row) for row in ids], 0),
            "labels": pad([torch.tensor(row) for row in rows["labels"]], IGNORE),
        }


def pad(rows: Sequence[torch.Tensor], value: int | None, side: str = "right") -> torch.Tensor:
    """Rows of different lengths as one `[B, S]` tensor; without a padding token, 0 stands in, masked."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value or 0, padding_side=side)
