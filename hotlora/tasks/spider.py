"""Spider: questions to SQL, scored by running gold and prediction on the question's databases.

A row of ``dev.json`` (github.com/taoyds/spider, CC BY-SA 4.0; its parsed fields left out)::

    {"db_id": "concert_singer", "question": "How many singers do we have?",
     "query": "SELECT count(*) FROM singer"}

It stands in a folder with ``tables.json`` and ``database/<db_id>/<db_id>.sqlite``. The rows of the copy that
Spider-Syn publishes, with ``SpiderQuestion`` in place of ``question``, are read too.

The rules are those of the official test-suite scorer (github.com/taoyds/test-suite-sql-eval): on every
``*.sqlite`` of the database's folder, DISTINCT removed on both sides, the answers must have the same shape
and agree under some permutation of the columns, as multisets of rows, or in order where the gold query says
ORDER BY. With one file in each folder this is plain execution accuracy, and is called so.
"""

import atexit
import functools
import json
import logging
import re
import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from ..base.errors import DataError
from ..base.files import sha256_file
from .rows import Row, need, need_text, read_rows, split_file
from .sql_sandbox import SqlSandbox
from .task import Example, Task

STOP = ("\n\n", "\nQuestion:", "\nDatabase:", ";")
_FILES = {
    "train": ["train_spider.json", "train.json", "train.jsonl", "spider_syn_train_spider.json"],
    "test": ["dev.json", "dev.jsonl", "test.json", "test.jsonl"],
}
_THIS_YEAR = re.compile(r"YEAR\s*\(\s*CURDATE\s*\(\s*\)\s*\)\s*", re.IGNORECASE)
_log = logging.getLogger(__name__)

SqlRow = tuple[Any, ...]


def example(row: Row, schema: str, folder: Path) -> Example:
    """A row as prompt, completion and what the scorer needs: the gold query and the database's folder."""
    question, query = need_text(row, "SpiderQuestion" if "SpiderQuestion" in row.values else "question", "query")
    prompt = f"Database:\n{schema}\nQuestion: {question.strip()}\nSQL:"
    meta = {"query": query, "folder": str(folder), "databases": len(databases(folder))}
    return Example(prompt, f" {query.strip().rstrip(';').rstrip()}", meta=meta)


def databases(folder: Path) -> list[Path]:
    """Every ``*.sqlite`` of a database's folder, by name; none where there is no such folder."""
    return sorted(folder.glob("*.sqlite"))


def database_schema(path: Path) -> str:
    """One line a table, ``singer(name, country, age)``, read from an SQLite file."""
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as connection:
        tables = connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT GLOB 'sqlite_*' ORDER BY rowid"
        )
        columns = "SELECT name FROM pragma_table_info(?)"
        return "\n".join(
            f"{table}({', '.join(name for (name,) in connection.execute(columns, (table,)))})"
            for (table,) in tables.fetchall()
        )


def table_schemas(path: Path) -> dict[str, str]:
    """The same lines for every database of a ``tables.json``, by db_id."""
    schemas = {}
    for row in read_rows(path):
        (db_id,) = need_text(row, "db_id")
        names, described = need(row, "table_names_original", "column_names_original")
        try:
            tables: list[list[str]] = [[] for _ in names]
            for table, column in described:
                if table >= 0:  # -1 is *
                    tables[table].append(column)
            schemas[db_id] = "\n".join(f"{n}({', '.join(columns)})" for n, columns in zip(names, tables, strict=True))
        except (TypeError, ValueError, IndexError) as error:
            raise DataError(
                f"{row.place}: the tables of {db_id!r} are not as Spider has them ({error}): a list of names, and of "
                "[table's number, column's name]."
            ) from error
    return schemas


def read(split: str, source: str | None, limit: int | None, seed: int) -> list[Example]:
    """7,000 train and 1,034 dev questions from a folder with the published files, or one of its files.

    The split "test" is dev, as everywhere. A dev question whose database is not there cannot be scored: it is
    left out, and the log says how many. A train question needs its tables' names only.
    """
    if source is None:
        raise DataError(
            "spider needs its databases, which are on no hub: download Spider and give its folder, "
            "as in `spider:/data/spider` (dev.json, train_spider.json, tables.json, database/)."
        )
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(f"spider: {source} does not exist; give Spider's folder (dev.json, tables.json, database/).")
    file = split_file(path, _FILES[split]) if path.is_dir() else path
    root = file.parent
    named = table_schemas(root / "tables.json") if (root / "tables.json").is_file() else {}
    examples, missing = [], Counter[str]()
    for row in read_rows(file):
        (db_id,) = need_text(row, "db_id")
        folder = root / "database" / db_id
        there = databases(folder)
        if split == "test" and not there:
            missing[db_id] += 1
            continue
        if db_id not in named:
            if not there:
                raise DataError(
                    f"{row.place}: nothing tells the tables of {db_id!r}; tables.json must list it, or "
                    f"{folder}/{db_id}.sqlite must exist."
                )
            named[db_id] = database_schema(there[0])
        examples.append(example(row, named[db_id], folder))
    if missing:
        left_out, total = missing.total(), missing.total() + len(examples)
        _log.warning("spider: %d of %d questions left out: no database for %s", left_out, total, ", ".join(missing))
    if not examples:
        raise DataError(f"spider: {root / 'database'} holds none of the databases that {file.name} asks about.")
    return examples


def remove_distinct(sql: str) -> str:
    """`sql` without its DISTINCT keywords, as the official scorer removes them."""
    import sqlparse

    statements = sqlparse.parse(sql)
    tokens = [token.value for token in statements[0].flatten()] if statements else []
    return "".join(token for token in tokens if token.lower() != "distinct")


def normalise(sql: str) -> str:
    """The official scorer's rewrites: split operators joined, MySQL's current year, no DISTINCT."""
    sql = sql.replace("> =", ">=").replace("< =", "<=").replace("! =", "!=")
    return _THIS_YEAR.sub("2020", remove_distinct(sql)).strip()


def same_answer(gold: Sequence[SqlRow], predicted: Sequence[SqlRow], ordered: bool) -> bool:
    """Whether two query answers agree under some permutation of the columns.

    Args:
        ordered: compare in order; otherwise as multisets of rows.
    """
    if not gold and not predicted:
        return True
    if len(gold) != len(predicted) or len(gold[0]) != len(predicted[0]):
        return False

    def view(rows: Sequence[SqlRow], columns: Sequence[int]) -> Any:
        picked = [tuple(row[column] for column in columns) for row in rows]
        return picked if ordered else Counter(picked)

    num_columns = len(gold[0])
    wanted = [view(gold, range(end + 1)) for end in range(num_columns)]

    # Grow the permutation a column at a time and drop it at the first prefix that differs: the official
    # scorer enumerates all of them, which is n! for columns that hold the same values.
    def extend(chosen: tuple[int, ...]) -> bool:
        if len(chosen) == num_columns:
            return True
        return any(
            view(predicted, (*chosen, column)) == wanted[len(chosen)] and extend((*chosen, column))
            for column in range(num_columns)
            if column not in chosen
        )

    return extend(())


def judged_by(example: Example) -> dict[str, Any]:
    """The gold query, and each database by its name and SHA-256."""
    found = databases(Path(example.meta["folder"]))
    return {"query": example.meta["query"], "databases": {path.name: _file_hash(path) for path in found}}


def _file_hash(path: Path) -> str:
    """Many questions are of one database, which may be large."""
    there = path.stat()
    return _hashed(path, there.st_size, there.st_mtime_ns)


@functools.cache
def _hashed(path: Path, size: int, modified: int) -> str:
    return sha256_file(path)


@functools.cache
def _sandbox() -> SqlSandbox:
    sandbox = SqlSandbox()
    atexit.register(sandbox.close)
    return sandbox


def score(example: Example, text: str, sandbox: SqlSandbox | None = None) -> bool:
    """Whether the predicted query gives gold's answer on every database of the example's folder.

    Raises:
        DataError: the folder has no database, or the gold query itself does not run on one.
    """
    sandbox = sandbox or _sandbox()
    gold_sql = normalise(example.meta["query"])
    ordered = "order by" in gold_sql.lower()
    paths = databases(Path(example.meta["folder"]))
    if not paths:
        raise DataError(f"{example.meta['folder']} holds no *.sqlite file; give the folder that has the databases.")
    try:
        predicted_sql = normalise(text.strip())
    except (ValueError, RecursionError):  # sqlparse refuses texts nested too deep or too long
        return False
    for path in paths:
        predicted = sandbox.run(path, predicted_sql)
        if predicted.rows is None:
            return False
        gold = sandbox.run(path, gold_sql)
        if gold.rows is None:
            raise DataError(f"The gold query {json.dumps(gold_sql)} fails on {path}: {gold.error}")
        if not same_answer(gold.rows, predicted.rows, ordered):
            return False
    return True


TASK = Task(
    "spider", "generate", "execution_accuracy", read, score,
    max_new_tokens=256, stop=STOP, needs_files=True, judged_by=judged_by,
)  # fmt: skip
