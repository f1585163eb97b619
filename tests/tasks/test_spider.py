import itertools
import json
import logging
import random
import sqlite3
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published import ABSENT, DATA

from hotlora.base.errors import DataError
from hotlora.evaluation.generate import cut
from hotlora.tasks import spider
from hotlora.tasks.spider import TASK, database_schema, databases, normalise, same_answer, score, table_schemas
from hotlora.tasks.sql_sandbox import SqlSandbox

REAL = DATA / "spider"
real = pytest.mark.skipif(not REAL.is_dir(), reason=f"Spider: {ABSENT}")


def write_database(path: Path, people: list[tuple]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE people (name TEXT, town TEXT, age INTEGER)")
    connection.execute("CREATE TABLE pets (owner TEXT)")
    connection.executemany("INSERT INTO people VALUES (?, ?, ?)", people)
    connection.commit()
    connection.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_database(
        tmp_path / "database" / "town" / "town.sqlite",
        [("Ann", "Rye", 3), ("Bo", "Rye", 5), ("Cy", "Ely", 5)],
    )
    rows = [
        {"db_id": "town", "question": "Who is 5?", "query": "SELECT name FROM people WHERE age = 5"},
        {"db_id": "gone", "question": "Who?", "query": "SELECT 1"},
    ]
    (tmp_path / "dev.json").write_text(json.dumps(rows))
    return tmp_path


def load_one(folder: Path, gold: str) -> spider.Example:
    (folder / "dev.json").write_text(json.dumps([{"db_id": "town", "question": "?", "query": gold}]))
    return TASK.load("test", str(folder), None, 0)[0]


def test_prompt_and_what_is_left_out(folder: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        (example,) = TASK.load("test", str(folder), None, 0)
    assert "1 of 2 questions left out: no database for gone" in caplog.text
    assert example.prompt == "Database:\npeople(name, town, age)\npets(owner)\nQuestion: Who is 5?\nSQL:"
    assert example.completion == " SELECT name FROM people WHERE age = 5"


@pytest.mark.parametrize(
    ("gold", "predicted", "right"),
    [
        (
            "SELECT name FROM people WHERE age = 5",
            "select NAME from people where age > 4 order by name desc",
            True,
        ),
        ("SELECT name, age FROM people", "SELECT age, name FROM people", True),
        ("SELECT name FROM people ORDER BY age", "SELECT name FROM people ORDER BY age DESC", False),
        ("SELECT DISTINCT town FROM people", "SELECT town FROM people", True),  # DISTINCT goes on both sides
        ("SELECT town FROM people", "SELECT town FROM people GROUP BY town", False),  # a multiset of rows
        ("SELECT name FROM people WHERE age > = 5", "SELECT name FROM people WHERE age >= 5", True),
        (
            "SELECT name FROM people WHERE age = 99",
            "SELECT name, age FROM people WHERE age = 98",
            True,
        ),  # both empty
        ("SELECT count(*) FROM people", "SELECT 3.0", True),  # numbers, as Python compares them
        ("SELECT count(*) FROM people", "SELECT '3'", False),
        ("SELECT name FROM people", "SELECT name FROM peeple", False),
        ("SELECT name FROM people", "", False),
        ("SELECT name FROM people", "no SQL ' at ( all", False),
        ("SELECT name FROM people", "DROP TABLE people", False),
        (
            "SELECT name FROM people",
            "SELECT name FROM people; DELETE FROM people",
            True,
        ),  # the first statement counts
    ],
)
def test_execution_rules(folder: Path, gold: str, predicted: str, right: bool):
    assert score(load_one(folder, gold), f" {predicted}") is right


@pytest.mark.parametrize("text", ["", "  \n", ";", "-- I do not know.", "/* SELECT 1 */", "; SELECT name FROM people"])
def test_no_query_is_wrong_where_gold_gives_no_rows(folder: Path, text: str):
    """SQLite runs it and gives no rows, too; published gold queries without rows are 49 of 972."""
    example = load_one(folder, "SELECT name FROM people WHERE age = 99")
    assert score(example, "SELECT name FROM people WHERE age > 98") and not score(example, text)


def test_every_database_of_the_folder_counts(folder: Path):
    gold, lucky = "SELECT max(age) FROM people", "SELECT 5"
    example = load_one(folder, gold)
    assert TASK.metric_name([example]) == "execution_accuracy" and score(example, lucky)
    write_database(folder / "database" / "town" / "town_2.sqlite", [("Di", "Ely", 7)])
    example = load_one(folder, gold)
    assert TASK.metric_name([example]) == "test_suite_accuracy"
    assert not score(example, lucky) and score(example, "SELECT age FROM people ORDER BY age DESC LIMIT 1")


def test_a_gold_query_that_fails_is_the_datas_fault(folder: Path):
    with pytest.raises(DataError, match=r"gold query .* no such column: shoe"):
        score(load_one(folder, "SELECT shoe FROM people"), "SELECT 1")


def test_sources_that_are_not_whole(tmp_path: Path):
    with pytest.raises(DataError, match="give its folder"):
        TASK.load("test", None, None, 0)
    with pytest.raises(DataError, match="does not exist"):
        TASK.load("test", str(tmp_path / "no"), None, 0)
    with pytest.raises(DataError, match=r"holds none of dev\.json"):
        TASK.load("test", str(tmp_path), None, 0)
    (tmp_path / "train_spider.json").write_text(json.dumps([{"db_id": "gone", "question": "?", "query": "SELECT 1"}]))
    with pytest.raises(DataError, match=r"row 1: nothing tells the tables of 'gone'"):
        TASK.load("train", str(tmp_path), None, 0)


def test_normalise():
    assert normalise("SELECT count(DISTINCT a) FROM t WHERE y ! = YEAR(CURDATE())").split() == [
        "SELECT", "count(", "a)", "FROM", "t", "WHERE", "y", "!=", "2020"
    ]  # fmt: skip
    assert normalise("SELECT 'distinct' FROM distinct_t") == "SELECT 'distinct' FROM distinct_t"


values = st.sampled_from([None, 0, 1, 1.0, 2.5, "a", "b", ""])


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 3).flatmap(
        lambda width: st.tuples(*(st.lists(st.tuples(*[values] * width), max_size=4) for _ in range(2)))
    ),
    st.booleans(),
)
def test_same_answer_is_what_trying_every_permutation_says(tables: tuple[list, list], ordered: bool):
    gold, predicted = tables

    def agree(columns: tuple[int, ...]) -> bool:
        turned = [tuple(row[i] for i in columns) for row in predicted]
        return gold == turned if ordered else Counter(gold) == Counter(turned)

    expected = len(gold) == len(predicted) and (
        not gold or any(agree(columns) for columns in itertools.permutations(range(len(gold[0]))))
    )
    assert same_answer(gold, predicted, ordered) is expected


def test_same_answer_takes_no_factorial_time_for_equal_columns():
    chance = random.Random(0)
    rows = [tuple(chance.choice("ab") for _ in range(12)) for _ in range(30)]
    turned = [row[::-1] for row in rows]
    assert same_answer(rows, chance.sample(turned, len(turned)), ordered=False)
    assert same_answer([("x",) * 12] * 5, [("x",) * 12] * 5, ordered=True)


@pytest.fixture(scope="module")
def published() -> list[spider.Example]:
    return TASK.load("test", str(REAL), None, 0)


@real
def test_published_gold_queries_are_right(published: list[spider.Example]):
    assert len(published) == 972  # 62 of the 1,034 ask about a database that this copy lacks
    assert TASK.metric_name(published) == "execution_accuracy"
    assert not any(score(example, "") for example in published)
    assert [example.completion for example in published if not score(example, cut(example.completion, TASK.stop))] == []


@real
def test_rewrites_of_published_queries_pass_and_wrong_ones_fail(published: list[spider.Example]):
    """On a third of them: other columns' order, names and rows' order; then a row too few, each row twice."""
    passed = []
    with SqlSandbox() as sandbox:
        for example in published[::3]:
            gold = example.meta["query"].rstrip("; ")
            rows = sandbox.run(databases(Path(example.meta["folder"]))[0], normalise(gold)).rows
            assert rows is not None
            columns = [f"c{i}" for i in range(len(rows[0]) if rows else 1)]
            turned = ", ".join(f"{name} AS other_{name}" for name in reversed(columns))
            if rows:
                renamed = f"WITH answer({', '.join(columns)}) AS ({gold}) SELECT {turned} FROM answer"
                assert score(example, renamed, sandbox), renamed
                few = f"SELECT * FROM ({gold}) LIMIT {len(rows) - 1}"
                twice = f"SELECT * FROM ({gold}) UNION ALL SELECT * FROM ({gold})"
                assert not score(example, few, sandbox) and not score(example, twice, sandbox), gold
            if "order by" not in gold.lower():
                passed.append(score(example, f"SELECT * FROM ({gold}) ORDER BY random()", sandbox))
    assert all(passed) and len(passed) > 200


JOINED = (
    "SELECT T2.name ,  count(*) FROM concert AS T1 JOIN stadium AS T2 ON T1.stadium_id  =  T2.stadium_id "
    "GROUP BY T1.stadium_id"
)
ORDERED = "SELECT name ,  country ,  age FROM singer ORDER BY age DESC"
OLDER = "SELECT DISTINCT country FROM singer WHERE age  >  20"
YEARS = "SELECT count(*) FROM concert WHERE YEAR  =  2014 OR YEAR  =  2015"


@real
@pytest.mark.parametrize(
    ("gold", "predicted", "right"),
    [
        (
            JOINED,
            "select count(*), s.name from stadium s, concert c where s.stadium_id = c.stadium_id "
            "group by s.stadium_id, s.name",
            True,
        ),
        (
            JOINED,
            "SELECT s.name AS place, (SELECT count(*) FROM concert c WHERE c.stadium_id = s.stadium_id) AS n "
            "FROM stadium s WHERE s.stadium_id IN (SELECT stadium_id FROM concert)",
            True,
        ),
        (JOINED, JOINED.replace("ON T1.stadium_id  =  T2.stadium_id ", ""), False),
        (JOINED, JOINED.replace("T2.stadium_id GROUP", "T1.stadium_id GROUP"), False),
        (
            JOINED,
            "SELECT s.name, count(*) FROM stadium AS s LEFT JOIN concert AS c ON c.stadium_id = s.stadium_id "
            "GROUP BY s.stadium_id",
            False,
        ),
        (JOINED, f"{JOINED} LIMIT 2", False),
        (JOINED, JOINED.replace(",  count(*)", ""), False),  # a column too few
        (ORDERED, "SELECT age a, name n, country c FROM singer ORDER BY -age", True),
        (ORDERED, ORDERED.replace(" DESC", ""), False),
        (ORDERED, ORDERED.replace(" ORDER BY age DESC", ""), False),
        (ORDERED, f"{ORDERED} LIMIT 5", False),
        (OLDER, "SELECT country FROM singer WHERE NOT age <= 20 ORDER BY 1 DESC", True),
        (OLDER, OLDER.replace("20", "41"), False),
        (
            YEARS,
            "SELECT sum(n) FROM (SELECT count(*) n FROM concert WHERE Year IN ('2014', '2015') GROUP BY Year)",
            True,
        ),
        (YEARS, YEARS.replace("2015", "2013"), False),
        (YEARS, "SELECT '6'", False),  # the right number, as text
    ],
)
def test_rewrites_and_mistakes_by_hand(published: list[spider.Example], gold: str, predicted: str, right: bool):
    example = next(example for example in published if example.meta["query"] == gold)
    assert score(example, predicted) is right


@real
def test_published_train_rows_and_schemas():
    examples = TASK.load("train", str(REAL), None, 0)
    assert len(examples) == 7000 and "head(head_ID, name, born_state, age)" in examples[0].prompt
    assert examples[0].completion == " SELECT count(*) FROM head WHERE age  >  56"
    listed = table_schemas(REAL / "tables.json")["concert_singer"]
    assert sorted(listed.split("\n")) == sorted(
        database_schema(REAL / "database" / "concert_singer" / "concert_singer.sqlite").split("\n")
    )
