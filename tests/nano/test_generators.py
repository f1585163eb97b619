"""The generated tasks and the pretraining text: seeded, sound, and drawn apart."""

import gzip
import itertools
import json
import re
import sqlite3
from pathlib import Path

import pytest

from hotlora.base.errors import DataError
from hotlora.nano import choice, corpus, math, sql


def test_every_sum_is_right_and_small():
    for row in math.rows("train", 500):
        *steps, last = row["answer"].split("\n")
        for step in steps:
            a, operator, b, result = re.fullmatch(r"(\d+) ([-+*]) (\d+) = (\d+)", step).groups()
            assert int(result) == math.OPERATE[operator](int(a), int(b)) and 0 <= int(result) <= 99
        assert last == f"#### {result}" and len(steps) == 2
        asked = {int(n) for n in re.findall(r"\d+", row["question"])}
        assert int(re.match(r"\d+", steps[0])[0]) in asked


def test_a_craft_has_one_next_step():
    following = {}
    for row in choice.rows("train", 1000) + choice.rows("test", 200):
        right = row["endings"][int(row["label"])]
        assert len(set(row["endings"])) == 4
        step = row["ctx_a"].split(". ")[1].split(" ", 1)[1]
        assert following.setdefault((row["activity_label"], step), right) == right
    assert len(following) == choice.CRAFTS * (choice.STEPS - 1)


def test_databases_are_apart_and_every_question_has_an_answer(tmp_path: Path):
    sql.write_databases(tmp_path)
    ids = {split: {db.db_id for db in sql.databases(split)} for split in ("train", "test")}
    assert not ids["train"] & ids["test"] and len(ids["train"] | ids["test"]) == sql.DATABASES
    for split in ids:
        for row in sql.rows(split, 150):
            assert row["db_id"] in ids[split]
            with sqlite3.connect(tmp_path / row["db_id"] / f"{row['db_id']}.sqlite") as connection:
                assert connection.execute(row["query"]).fetchall()


@pytest.mark.parametrize("rows", [math.rows, sql.rows, choice.rows])
def test_the_seed_decides_and_splits_are_apart(rows):
    def text(drawn: list[dict]) -> set[str]:
        return {json.dumps({k: v for k, v in row.items() if k not in ("ind", "endings", "label")}) for row in drawn}

    assert rows("test", 20, seed=3) == rows("test", 20, seed=3) != rows("test", 20, seed=4)
    assert not text(rows("train", 1000, seed=1)) & text(rows("test", 200, seed=2))
    with pytest.raises(DataError, match="no split 'dev'; its splits are train, test"):
        rows("dev", 1)


def test_the_text_keeps_its_shares_and_gives_no_craft_away():
    written = dict.fromkeys(corpus.SHARES, 0)
    documents = list(itertools.islice(corpus.documents(0, ["one text " * 20, "another " * 30]), 3000))
    for domain, document in documents:
        written[domain] += len(document)
    for domain, share in corpus.SHARES.items():
        assert written[domain] / sum(written.values()) == pytest.approx(share, abs=0.02)
    assert documents[:50] == list(itertools.islice(corpus.documents(0, ["one text " * 20, "another " * 30]), 50))
    assert not any("####" in document or "Question:" in document for _, document in documents)


def test_texts_of_a_folder(tmp_path: Path):
    with pytest.raises(DataError, match="does not exist"):
        corpus.read_texts(tmp_path / "none")
    with pytest.raises(DataError, match=r"holds no \.txt"):
        corpus.read_texts(tmp_path)
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps({"query": "He ran. Then", "endings": ["he sat.", "he fell."], "label": 1}) + "\n")
    assert corpus.read_texts(tmp_path) == ["one", "two", "He ran. Then he fell."]
