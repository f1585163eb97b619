import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hotlora.tasks.sql_sandbox import SqlSandbox

FOREVER = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "a #1?.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE t (a INTEGER, b TEXT, edit REAL, c BLOB)")
    connection.execute(
        "INSERT INTO t VALUES (1, 'x\u2028é', 1.5, X'00ff'), (NULL, CAST(X'61ff62' AS TEXT), -9e999, NULL)"
    )
    connection.commit()
    connection.close()
    return path


@pytest.fixture(scope="module")
def sandbox() -> Iterator[SqlSandbox]:
    with SqlSandbox(timeout_s=1.0, max_rows=1000) as sandbox:
        yield sandbox


def test_values_come_back_as_they_are(sandbox: SqlSandbox, database: Path):
    result = sandbox.run(database, "SELECT a, b, edit, c FROM t;")
    # Text that is not UTF-8 loses what cannot be read.
    assert result.error is None
    assert result.rows == [(1, "x\u2028é", 1.5, b"\x00\xff"), (None, "ab", float("-inf"), None)]
    assert sandbox.run(database, "SELECT upper(b) FROM t WHERE 0").rows == []


@pytest.mark.parametrize(
    ("sql", "error"),
    [
        ("DROP TABLE t", "not authorized"),
        ("INSERT INTO t (a) VALUES (2)", "not authorized"),
        ("CREATE TEMP TABLE u (a)", "not authorized"),
        ("ATTACH DATABASE 'other.sqlite' AS other", "not authorized"),
        ("PRAGMA query_only = OFF", "not authorized"),
        ("SELECT * FROM pragma_database_list", "prohibited|not authorized"),
        ("BEGIN", "not authorized"),
        ("VACUUM INTO 'copy.sqlite'", "authorization denied"),
        ("SELECT load_extension('x')", "not authorized"),
        ("SELECT a FROM", "incomplete input|syntax error"),
        ("SELEKT 1", "syntax error"),
        ("SELECT nobody FROM t", "no such column"),
        ("SELECT 1; SELECT 2", "one statement"),
        ("", "holds no query"),
        (" -- SELECT 1", "holds no query"),
        ("SELECT '\x00'", "null character"),
        ("SELECT length(zeroblob(999999999))", "too big"),
        ("SELECT a FROM t WHERE b = ?", "binding"),
    ],
)
def test_anything_but_one_query_is_refused(sandbox: SqlSandbox, database: Path, sql: str, error: str):
    before = database.read_bytes()
    result = sandbox.run(database, sql)
    assert result.rows is None and result.error is not None
    assert any(part in result.error for part in error.split("|")), result.error
    assert database.read_bytes() == before and os.listdir(database.parent) == [database.name]


def test_a_query_without_end_is_killed_on_time(sandbox: SqlSandbox, database: Path):
    assert sandbox._worker is not None
    pid, started = sandbox._worker.pid, time.monotonic()
    result = sandbox.run(database, FOREVER)
    assert result.rows is None and "timeout: ran longer than 1 s" in str(result.error)
    assert time.monotonic() - started < 3
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert sandbox.run(database, "SELECT 1").rows == [(1,)]  # a fresh worker


def test_too_many_rows(sandbox: SqlSandbox, database: Path):
    endless = FOREVER.replace("count(*)", "i")
    assert "more than 1000 rows" in str(sandbox.run(database, endless).error)
    assert len(sandbox.run(database, endless + " LIMIT 1000").rows or []) == 1000


@pytest.mark.skipif(os.name != "posix", reason="memory limits need a POSIX system")
def test_memory_is_limited(database: Path):
    with SqlSandbox(timeout_s=20, memory_mb=100) as sandbox:
        sort = FOREVER.replace("SELECT count(*) FROM n", "SELECT i, hex(randomblob(1000)) AS h FROM n ORDER BY h")
        assert "memory" in str(sandbox.run(database, sort).error).lower()
        assert sandbox.run(database, "SELECT 1").rows == [(1,)]


def test_a_file_that_is_no_database(sandbox: SqlSandbox, tmp_path: Path):
    (tmp_path / "text.sqlite").write_text("no database " * 100)
    assert "not a database" in str(sandbox.run(tmp_path / "text.sqlite", "SELECT * FROM t").error)
    assert "unable to open" in str(sandbox.run(tmp_path / "gone.sqlite", "SELECT 1").error)
    assert not (tmp_path / "gone.sqlite").exists()


def test_a_worker_that_dies_is_replaced(database: Path):
    sandbox = SqlSandbox()
    assert sandbox.run(database, "SELECT 1").rows == [(1,)]
    assert sandbox._worker is not None
    sandbox._worker.kill()
    sandbox._worker.wait()
    assert sandbox.run(database, "SELECT 2").rows == [(2,)]
    sandbox.close()
    sandbox.close()
