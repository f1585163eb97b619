"""Rows that are held out of the training data."""

import hashlib
import random
from collections.abc import Sequence

from ..base.errors import DataError
from .task import Example


def held_out(examples: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """(rows to train on, rows that are held out: about `share` of them).

    A hash of each prompt, or of each conversation, says where it goes: equal ones are on one side, and rows that are
    added later move no other. DataError: one side would be empty.
    """
    kept: list[Example] = []
    out: list[Example] = []
    for example in examples:
        (out if _place(example) < share else kept).append(example)
    if not kept or not out:
        what = "held out" if not out else "left to train on"
        raise DataError(
            f"of {len(examples)} rows, test_split = {share} leaves none {what}: give another share, or test_data."
        )
    return kept, out


def drawn(examples: Sequence[Example], limit: int | None, seed: int = 0) -> list[Example]:
    """At most `limit` of them, drawn by `seed`, in their order."""
    if limit is None or limit >= len(examples):
        return list(examples)
    return [examples[i] for i in sorted(random.Random(seed).sample(range(len(examples)), limit))]


def _place(example: Example) -> float:
    """In [0, 1), by the row alone."""
    digest = hashlib.sha256((example.source_hash or example.prompt).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
