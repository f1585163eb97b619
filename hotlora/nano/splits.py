"""Train and test rows drawn apart, for every generated task."""

import hashlib
import random
from collections.abc import Callable, Iterator

from ..base.errors import DataError

SPLITS = ("train", "test")


def split_of(key: str) -> str:
    """The one split that a row with this key belongs to: a fifth of all keys are test."""
    return "test" if hashlib.sha256(key.encode()).digest()[0] % 5 == 0 else "train"


def check_split(task: str, split: str) -> None:
    """Raises DataError for a split that does not exist."""
    if split not in SPLITS:
        raise DataError(f"{task} has no split {split!r}; its splits are {', '.join(SPLITS)}.")


def draw_rows(
    task: str,
    split: str,
    n: int,
    seed: int,
    generate: Callable[[random.Random], Iterator[dict]],
    key: Callable[[dict], str],
) -> list[dict]:
    """The first ``n`` different rows of ``split`` from a seeded generator.

    Args:
        generate: an endless stream of rows from a random generator.
        key: what makes two rows the same, and what decides a row's split.
    """
    check_split(task, split)
    drawn: dict[str, dict] = {}
    for row in generate(random.Random(f"{task} {split} {seed}")):
        if len(drawn) == n:
            break
        if split_of(key(row)) == split:
            drawn.setdefault(key(row), row)
    return list(drawn.values())
