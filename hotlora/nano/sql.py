"""nano-sql: questions about one small table, in Spider's own row format, scored by running them on sqlite.

A row: ``{"db_id": "ship_3", "question": "Show the name of ships with speed above 41.", "query": "SELECT name FROM
ship WHERE speed > 41"}``. A database has one table with a name, two more text columns and two number columns; the
databases of the test split are not those of the training split, as in Spider.
"""

import random
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .splits import check_split, draw_rows

TABLES = tuple(
    "ship singer student farm book city team shop park film horse car hotel river museum plane doctor bridge "
    "lake train garden poet camera school".split()
)
TEXT_COLUMNS: dict[str, tuple[str, ...]] = {
    "color": ("red", "blue", "green", "white", "black"),
    "country": ("Peru", "Chad", "Cuba", "Iran", "Fiji"),
    "type": ("old", "new", "small", "large", "rare"),
    "owner": ("Ana", "Ben", "Cora", "Dan", "Ella"),
    "region": ("north", "south", "east", "west"),
    "level": ("low", "high", "middle"),
}
NUMBER_COLUMNS = tuple("age price size weight score speed height rank cost points".split())
ENTRY_NAMES = tuple(
    "Alba Bora Cado Dumo Elko Faro Gila Hebo Isla Jura Kilo Lima Mola Nero Orla Pavo Rila Sena Tula Vigo".split()
)
DATABASES = 96
ROWS = 12


@dataclass(frozen=True)
class Database:
    """One table: ``name``, two text columns, two number columns, ``ROWS`` rows."""

    db_id: str
    table: str
    text_columns: tuple[str, str]
    number_columns: tuple[str, str]
    entries: tuple[tuple, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The table's columns, in order."""
        return ("name", *self.text_columns, *self.number_columns)


def make_database(rng: random.Random, number: int) -> Database:
    """A database from a seeded generator; ``number`` keeps its id unique."""
    table = TABLES[number % len(TABLES)]
    text = tuple(rng.sample(sorted(TEXT_COLUMNS), 2))
    numbers = tuple(rng.sample(NUMBER_COLUMNS, 2))
    names = rng.sample(ENTRY_NAMES, ROWS)
    values = [rng.sample(range(10, 99), ROWS) for _ in numbers]
    entries = tuple(
        (name, *(rng.choice(TEXT_COLUMNS[column]) for column in text), *(v[i] for v in values))
        for i, name in enumerate(names)
    )
    return Database(f"{table}_{number // len(TABLES)}", table, text, numbers, entries)  # type: ignore[arg-type]


def databases(split: str) -> list[Database]:
    """The databases of a split: a quarter of all are test, and no database is in both."""
    check_split("nano-sql", split)
    rng = random.Random("nano-sql databases")
    every = [make_database(rng, number) for number in range(DATABASES)]
    held_out = set(random.Random("nano-sql test").sample(range(DATABASES), DATABASES // 4))
    return [db for number, db in enumerate(every) if (number in held_out) == (split == "test")]


def plural(noun: str) -> str:
    """The plural of a table's name."""
    return {"city": "cities", "bridge": "bridges"}.get(noun, noun + "s")


def ask(rng: random.Random, db: Database) -> tuple[str, str]:
    """A question about ``db`` in the task's words, and its query; no answer is empty."""
    table, many = db.table, plural(db.table)
    text, number = rng.choice(db.text_columns), rng.choice(db.number_columns)
    shown = rng.choice([c for c in db.columns if c not in (text, number)])
    entry = rng.choice(db.entries)
    word = entry[db.columns.index(text)]
    ranked = sorted(e[db.columns.index(number)] for e in db.entries)
    threshold = rng.choice(ranked[2:-2])
    return rng.choice((
        (f"How many {many} are there?", f"SELECT count(*) FROM {table}"),
        (f"What is the average {number} of the {many}?", f"SELECT avg({number}) FROM {table}"),
        (f"What is the highest {number} of the {many}?", f"SELECT max({number}) FROM {table}"),
        (f"What is the lowest {number} of the {many}?", f"SELECT min({number}) FROM {table}"),
        (f"Show the {shown} of {many} with {number} above {threshold}.",
         f"SELECT {shown} FROM {table} WHERE {number} > {threshold}"),
        (f"Show the {shown} of {many} with {number} below {threshold}.",
         f"SELECT {shown} FROM {table} WHERE {number} < {threshold}"),
        (f"Which {shown} do {many} with {text} {word} have?",
         f"SELECT {shown} FROM {table} WHERE {text} = '{word}'"),
        (f"How many {many} have {text} {word}?", f"SELECT count(*) FROM {table} WHERE {text} = '{word}'"),
        (f"Which {table} has the highest {number}? Give its name.",
         f"SELECT name FROM {table} ORDER BY {number} DESC LIMIT 1"),
        (f"Which {table} has the lowest {number}? Give its name.",
         f"SELECT name FROM {table} ORDER BY {number} LIMIT 1"),
        (f"For each {text}, how many {many} are there?",
         f"SELECT {text}, count(*) FROM {table} GROUP BY {text}"),
    ))  # fmt: skip


def rows(split: str, n: int, seed: int = 0) -> list[dict]:
    """``n`` rows of ``split`` ("train" or "test"), each about one of that split's own databases."""
    pool = databases(split)

    def generate(rng: random.Random) -> Iterator[dict]:
        while True:
            db = rng.choice(pool)
            question, query = ask(rng, db)
            yield {"db_id": db.db_id, "question": question, "query": query}

    # The databases are drawn apart already: what would be the other split by its hash is simply not drawn.
    return draw_rows("nano-sql", split, n, seed, generate, key=lambda row: f"{row['db_id']} {row['question']}")


def write_databases(folder: Path) -> Path:
    """Write every database of both splits as ``folder/<db_id>/<db_id>.sqlite``, Spider's layout."""
    for db in databases("train") + databases("test"):
        path = folder / db.db_id / f"{db.db_id}.sqlite"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        connection = sqlite3.connect(path)
        types = ["TEXT"] * 3 + ["INTEGER"] * 2
        columns = ", ".join(f"{c} {t}" for c, t in zip(db.columns, types, strict=True))
        connection.execute(f"CREATE TABLE {db.table} ({columns})")
        connection.executemany(f"INSERT INTO {db.table} VALUES (?, ?, ?, ?, ?)", db.entries)
        connection.commit()
        connection.close()
    return folder
