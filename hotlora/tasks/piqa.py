"""PIQA: which of two solutions reaches an everyday goal, by log-likelihood per character (acc_norm).

A line of ``valid.jsonl`` (yonatanbisk.com/piqa, AFL-3.0), and the same line of ``valid-labels.lst``::

    {"goal": "How do I ready a guinea pig cage for it's new occupants?", "sol1": "Provide the guinea pig with a
     cage full of a few inches of bedding made of ripped paper strips, you will also need to supply it with a
     water bottle and a food dish.", "sol2": "Provide the guinea pig with a cage full of a few inches of bedding
     made of ripped jeans material, you will also need to supply it with a water bottle and a food dish."}

    0

The rows of the hub's ``baber/piqa`` hold ``"label": 0`` besides. The published test labels are hidden, so the
split "test" is the validation split, as everywhere.
"""

from pathlib import Path

from ..base.errors import DataError
from .choices import choice_example
from .rows import Row, load_rows, need, need_text
from .task import Example, Task

HUB_ID = "baber/piqa"
_FILES = {"train": ["train.jsonl"], "test": ["valid.jsonl", "validation.jsonl"]}


def example(row: Row) -> Example:
    """A row that holds its label, as lm-eval's prompt and the two solutions."""
    goal, *solutions = need_text(row, "goal", "sol1", "sol2")
    (label,) = need(row, "label")
    return choice_example(row, f"Question: {goal}\nAnswer:", solutions, label, "solutions")


def labels_beside(place: str) -> list[str] | None:
    """The lines of ``train-labels.lst`` beside ``train.jsonl``, in whose line 7 a row's `place` is; None if absent."""
    file = Path(place.rpartition(" line ")[0])
    labels = file.with_name(f"{file.name.split('.')[0]}-labels.lst")
    return labels.read_text(encoding="utf-8").split() if labels.is_file() else None


def read(split: str, source: str | None, limit: int | None, seed: int) -> list[Example]:
    """16,113 train and 1,838 validation rows: the hub, or a file or folder with its labels beside."""
    rows = load_rows("piqa", source, HUB_ID, None, _FILES[split], {"test": "validation"}.get(split, split))
    if "label" not in rows[0].values and (labels := labels_beside(rows[0].place)) is not None:
        if len(labels) != len(rows):
            raise DataError(f"{rows[-1].place} is the last of {len(rows)} rows, but there are {len(labels)} labels.")
        rows = [Row(row.place, {**row.values, "label": label}) for row, label in zip(rows, labels, strict=True)]
    return [example(row) for row in rows]


TASK = Task("piqa", "choice", "acc_norm", read)
