"""nano-sql: questions about generated databases, in Spider's row format, prompt and scorer.

A row::

    {"db_id": "singer_1", "question": "Show the name of singers with cost below 31.",
     "query": "SELECT name FROM singer WHERE cost < 31"}
"""

import functools
import tempfile
from pathlib import Path

from ..nano import sql
from . import spider
from .rows import Row
from .task import Example, Task

NUM_ROWS = {"train": 2000, "test": 200}


@functools.cache
def _databases() -> tuple[Path, tempfile.TemporaryDirectory]:
    """The generated databases, written once a process; the second part keeps the folder until it ends."""
    folder = tempfile.TemporaryDirectory(prefix="nano-sql-")
    return sql.write_databases(Path(folder.name)), folder


def read(split: str, source: str | None, limit: int | None, seed: int) -> list[Example]:
    """`limit` rows (2,000 train, 200 test unless given) drawn by `seed`; no database is in both splits."""
    rows = sql.rows(split, limit or NUM_ROWS.get(split, 1), seed)
    folder, _ = _databases()
    schemas = functools.cache(lambda db_id: spider.database_schema(folder / db_id / f"{db_id}.sqlite"))
    return [
        spider.example(Row(f"nano-sql {split} row {i}", row), schemas(row["db_id"]), folder / row["db_id"])
        for i, row in enumerate(rows, start=1)
    ]


def judged_by(example: Example) -> dict[str, str]:
    """The gold query: the databases are generated, and their files have the version of sqlite that wrote them."""
    return {"query": example.meta["query"]}


TASK = Task(
    "nano-sql", "generate", "execution_accuracy", read, spider.score,
    max_new_tokens=64, stop=spider.STOP, judged_by=judged_by,
)  # fmt: skip
