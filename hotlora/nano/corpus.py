"""The text that nano is pretrained on: four domains, generated from a seed or read from a folder.

- ``math``: sums, and short problems worked in words and in a form that the nano tasks do not use;
- ``sql``: tables, comments and queries, in other words than nano-sql's questions;
- ``craft``: people doing things to things, in any order: the words of nano-choice without its facts;
- ``text``: paragraphs from a folder of plain text or JSONL that the user names (none, and the share is split).
"""

import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from ..base.errors import DataError
from .choice import GERUNDS, OBJECTS, TOOLS, VERBS, step_text
from .math import OPERATE
from .sql import Database, make_database, plural
from .words import PLACES, THINGS, person, two_people

SHARES = {"math": 0.36, "sql": 0.24, "craft": 0.14, "text": 0.26}
"""Share of each domain's characters in the pretraining text."""


def _sum(rng: random.Random) -> tuple[int, str, int]:
    """An operation whose operands and result all lie in 0–99."""
    kind = rng.random()
    if kind < 0.4:
        a = rng.randint(0, 90)
        return a, "+", rng.randint(0, 99 - a if rng.random() < 0.5 else min(25, 99 - a))
    if kind < 0.8:
        a = rng.randint(1, 99)
        return a, "-", rng.randint(0, a if rng.random() < 0.5 else min(25, a))
    return rng.randint(2, 12), "*", rng.randint(2, 8)


def _sums(rng: random.Random) -> str:
    lines = []
    for _ in range(rng.randint(4, 12)):
        a, operator, b = _sum(rng)
        lines.append(f"{a} {operator} {b} = {OPERATE[operator](a, b)}")
    return rng.choice(("\n", "\n", " ; ", ", ")).join(lines)


def _doubles(rng: random.Random) -> str:
    n = rng.randint(2, 45)
    return rng.choice((
        f"twice {n} is {2 * n}. {n} * 2 = {2 * n}",
        f"{n} and {n} make {2 * n}. {n} + {n} = {2 * n}",
        f"half of {2 * n} is {n}. {2 * n} - {n} = {n}",
    ))  # fmt: skip


def _worked_problem(rng: random.Random) -> str:
    """A told problem, its sums, its result: ``… Work: 14 + 7 = 21 , 21 - 5 = 16 . Result 16.``"""
    name, he = person(rng)
    thing, have = rng.choice(THINGS), rng.randint(2, 45)
    story = [f"{name} had {have} {thing}."]
    work = []
    for _ in range(rng.randint(1, 3)):
        amount = rng.randint(1, 25)
        kind = rng.random()
        if kind < 0.42 and have >= amount:
            verb = rng.choice(("lost", "sold", "gave away", "broke", "dropped", "used", "threw out"))
            story.append(f"{he.capitalize()} {verb} {amount} of them.")
            operator = "-"
        elif kind < 0.85 and have + amount < 100:
            verb = rng.choice(("bought", "found", "got", "picked", "won", "made", "borrowed"))
            story.append(f"{he.capitalize()} {verb} {amount} more.")
            operator = "+"
        else:
            sacks, each = rng.randint(2, 4), rng.randint(2, 6)
            if have + sacks * each > 99:
                break
            story.append(f"{he.capitalize()} got {sacks} sacks of {each} {thing}.")
            work.append(f"{sacks} * {each} = {sacks * each}")
            operator, amount = "+", sacks * each
        work.append(f"{have} {operator} {amount} = {OPERATE[operator](have, amount)}")
        have = OPERATE[operator](have, amount)
    if not work:
        return _sums(rng)
    ask = rng.choice(("Count them.", f"Count the {thing}.", f"So {name} holds how many?"))
    return f"{' '.join(story)} {ask} Work: {' , '.join(work)} . Result {have}."


def _two_hold(rng: random.Random) -> str:
    """Two people's things, together or apart, in statements."""
    (a, _), (b, _) = two_people(rng)
    thing, m, n = rng.choice(THINGS), rng.randint(2, 48), rng.randint(2, 48)
    big, small = max(m, n), min(m, n)
    return rng.choice((
        f"{a} holds {m} {thing} and {b} holds {n}. In all {m} + {n} = {m + n} {thing}.",
        f"{a} holds {big} {thing} and {b} holds {small}. {a} is ahead by {big} - {small} = {big - small}.",
        f"{a} holds {small} {thing}. {b} holds {big - small} more: {small} + {big - small} = {big}.",
    ))  # fmt: skip


def math_document(rng: random.Random) -> str:
    """One document of the math domain."""
    return rng.choices((_sums, _doubles, _worked_problem, _two_hold), weights=(3, 1, 6, 2))[0](rng)


def _comment_and_query(rng: random.Random, db: Database) -> tuple[str, str]:
    """A comment in plain words and its query: the same shapes as nano-sql asks for, in other words."""
    table, many = db.table, plural(db.table)
    text, number = rng.choice(db.text_columns), rng.choice(db.number_columns)
    shown = rng.choice([c for c in db.columns if c not in (text, number)])
    word, n = rng.choice(db.entries)[db.columns.index(text)], rng.randint(10, 98)
    entries = rng.choice((table, many, f"all {many}"))
    return rng.choice((
        (f"count {entries}", f"SELECT count(*) FROM {table}"),
        (f"mean {number}, {entries}", f"SELECT avg({number}) FROM {table}"),
        (f"top {number} over {entries}", f"SELECT max({number}) FROM {table}"),
        (f"least {number} over {entries}", f"SELECT min({number}) FROM {table}"),
        (f"total {number}, {entries}", f"SELECT sum({number}) FROM {table}"),
        (f"{shown} if {number} over {n}", f"SELECT {shown} FROM {table} WHERE {number} > {n}"),
        (f"{shown} if {number} under {n}", f"SELECT {shown} FROM {table} WHERE {number} < {n}"),
        (f"{shown} if {number} is {n}", f"SELECT {shown} FROM {table} WHERE {number} = {n}"),
        (f"{shown} if {text} is {word}", f"SELECT {shown} FROM {table} WHERE {text} = '{word}'"),
        (f"count if {text} is {word}", f"SELECT count(*) FROM {table} WHERE {text} = '{word}'"),
        (f"{shown} by {number}, big first", f"SELECT {shown} FROM {table} ORDER BY {number} DESC"),
        (f"{shown} by {number}", f"SELECT {shown} FROM {table} ORDER BY {number}"),
        (f"{shown} of the top {number}", f"SELECT {shown} FROM {table} ORDER BY {number} DESC LIMIT 1"),
        (f"{shown} of the least {number}", f"SELECT {shown} FROM {table} ORDER BY {number} LIMIT 1"),
        (f"per {text} the count", f"SELECT {text}, count(*) FROM {table} GROUP BY {text}"),
        (f"every {shown}", f"SELECT {shown} FROM {table}"),
        (f"different {text}", f"SELECT DISTINCT {text} FROM {table}"),
    ))  # fmt: skip


def sql_document(rng: random.Random) -> str:
    """One document of the sql domain: a table, then commented queries on it."""
    db = make_database(rng, rng.randrange(10_000))
    head = rng.choice((
        f"CREATE TABLE {db.table} ({', '.join(db.columns)});",
        f"-- {db.table}: {', '.join(db.columns)}",
        f"table {db.table}({', '.join(db.columns)})",
    ))  # fmt: skip
    lines = [head]
    for _ in range(rng.randint(2, 6)):
        comment, query = _comment_and_query(rng, db)
        lines += [f"-- {comment}", f"{query};"]
    return "\n".join(lines)


def craft_document(rng: random.Random) -> str:
    """One document of the craft domain: someone's day, every step drawn at random."""
    name, he = person(rng)
    thing = rng.choice(OBJECTS)
    story = [f"{name} was {rng.choice(GERUNDS)} a {thing} in the {rng.choice(PLACES)}."]
    for _ in range(rng.randint(2, 6)):
        start = rng.choice((f"{he.capitalize()} ", f"Then {he} ", f"After that {he} ", f"Later {name} "))
        story.append(start + step_text((rng.choice(VERBS), rng.choice(TOOLS)), thing))
    return " ".join(story)


def read_texts(folder: Path) -> list[str]:
    """Every text under ``folder``: paragraphs of ``*.txt``, and the strings of ``*.jsonl`` and ``*.jsonl.gz`` rows.

    Of a multiple-choice row (``query``, ``endings``, ``label``) the text is the query with its right ending.

    Raises:
        DataError: the folder is missing or holds no such file.
    """
    if not folder.is_dir():
        raise DataError(f"text folder {folder} does not exist; name a folder of .txt or .jsonl files.")
    texts: list[str] = []
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".txt":
            texts += [p.strip() for p in path.read_text(encoding="utf-8").split("\n\n") if p.strip()]
        elif path.name.endswith((".jsonl", ".jsonl.gz")):
            opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
            with opened as lines:
                texts += [text for line in lines if (text := _row_text(json.loads(line)))]
    if not texts:
        raise DataError(f"text folder {folder} holds no .txt, .jsonl or .jsonl.gz file with text in it.")
    return texts


def _row_text(row: dict) -> str:
    if "endings" in row and "query" in row:
        ending = row["endings"][int(row["label"])]
        return row["query"] + ("" if ending.startswith(",") else " ") + ending
    return " ".join(value for value in row.values() if isinstance(value, str) and " " in value)


def documents(seed: int, texts: list[str] | None = None) -> Iterator[tuple[str, str]]:
    """An endless, seeded stream of (domain, document), each domain by its share of characters."""
    rng = random.Random(f"nano corpus {seed}")
    makers: dict[str, Callable[[random.Random], str]] = {
        "math": math_document,
        "sql": sql_document,
        "craft": craft_document,
    }
    if texts:
        makers["text"] = lambda rng: rng.choice(texts)
    written = dict.fromkeys(makers, 0)
    while True:
        domain = min(makers, key=lambda d: written[d] / SHARES[d])
        document = makers[domain](rng)
        written[domain] += len(document)
        yield domain, document
