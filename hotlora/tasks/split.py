"""Rows that are held out of the training data."""

import hashlib
import random
from collections.abc import Sequence

from ..base.errors import DataError
from .stored import StoredExamples
from .task import Example


def held_out(examples: Sequence[Example], share: float) -> tuple[Sequence[Example], Sequence[Example]]:
    """(rows to train on, rows that are held out: about `share` of them).

    A hash of each prompt, of each conversation, or of each text that has no prompt, says where it goes: equal ones are
    on one side, and rows that are added later move no other. DataError: one side would be empty.
    """
    kept: list[int] = []
    out: list[int] = []
    for place, example in enumerate(examples):
        (out if _position(example) < share else kept).append(place)
    if not kept or not out:
        what = "held out" if not out else "left to train on"
        raise DataError(
            f"of {len(examples)} rows, test_split = {share} leaves none {what}: give another share, or test_data."
        )
    return picked(examples, kept), picked(examples, out)


def drawn(examples: Sequence[Example], limit: int | None, seed: int = 0) -> Sequence[Example]:
    """At most `limit` of them, drawn by `seed`, in their order."""
    if limit is None or limit >= len(examples):
        return examples
    return picked(examples, sorted(random.Random(seed).sample(range(len(examples)), limit)))


def picked(examples: Sequence[Example], places: Sequence[int]) -> Sequence[Example]:
    """Those at `places`; stored ones stay where they are."""
    if isinstance(examples, StoredExamples):
        return examples.picked(places)
    return [examples[place] for place in places]


def _position(example: Example) -> float:
    """In [0, 1), by the row alone."""
    read = example.source_hash or example.prompt or example.completion
    digest = hashlib.sha256(read.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
