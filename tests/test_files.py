"""Files are whole or absent, and a broken one is named."""

import hashlib
import json
import math

import pytest

from hotlora.errors import FileError
from hotlora.files import atomic_path, file_in, read_json, read_json_lines, sha256_file, write_json


def test_atomic_path_replaces_on_success_and_makes_folders(tmp_path):
    target = tmp_path / "new" / "folder" / "x.txt"
    for text in ("one", "two"):
        with atomic_path(target) as temporary:
            assert temporary.parent == target.parent and temporary.suffix == ".txt"
            temporary.write_text(text)
        assert target.read_text() == text
    assert list(target.parent.iterdir()) == [target]


def test_atomic_path_leaves_the_old_file_on_failure(tmp_path):
    target = tmp_path / "x.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="stop"), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError("stop")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_json_round_trip_keeps_number_lists_on_one_line(tmp_path):
    path = tmp_path / "a" / "x.json"
    obj = {
        "ids": [3, 14, 15],
        "floats": [1.5, -2e-9, 3.0],
        "nested": [[1, 2], [3]],
        "text": "a [\n 1,\n 2]",
        "empty": [],
        "é": None,
        "dicts": [{"a": [1]}, {}],
    }
    write_json(path, obj)
    assert read_json(path) == obj
    assert '"ids": [3, 14, 15],\n' in path.read_text()


def test_nan_and_infinity_become_null(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"loss": math.nan, "list": (1, math.inf)})
    assert read_json(path) == {"loss": None, "list": [1, None]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a": 1, "b"', "cut short"),
        (b"", "cut short"),
        (b"\x80\x04\x95pickle", "another kind of file"),
        (b"[1, 2]", "a JSON list, not an object"),
        (b'{"3": [1], "3": [2]}', "'3' is given twice"),
    ],
)
def test_read_json_names_a_broken_file(tmp_path, content, says):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(FileError, match=says) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_read_json_names_what_cannot_be_read(tmp_path):
    with pytest.raises(FileError, match=r"none\.json does not exist"):
        read_json(tmp_path / "none.json")
    with pytest.raises(FileError, match="cannot be read"):
        read_json(tmp_path)


def test_every_truncation_is_an_error(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": [1, 2], "b": {"c": "text"}})
    content = path.read_bytes()
    for length in range(len(content.rstrip()) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(FileError):
            read_json(path)
    path.write_bytes(content)
    assert json.loads(content) == read_json(path)


def test_sha256_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"hot")
    assert sha256_file(path) == hashlib.sha256(b"hot").hexdigest()
    with pytest.raises(FileError, match="cannot be read"):
        sha256_file(tmp_path / "none")


def test_file_in(tmp_path):
    assert file_in(tmp_path, "plan.json") == tmp_path / "plan.json"
    assert file_in(tmp_path / "later", "plan.json") == tmp_path / "later" / "plan.json"
    assert file_in(tmp_path / "mine.json", "plan.json") == tmp_path / "mine.json"
    (tmp_path / "odd").write_text("a file")
    assert file_in(tmp_path / "odd", "plan.json") == tmp_path / "odd"


def test_read_json_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')  # the last line is still being written
    assert read_json_lines(path, "step") == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"loss": 2}\n')
    with pytest.raises(FileError, match=r"x\.jsonl, line 2: an object with step was expected"):
        read_json_lines(path, "step")
    path.write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(FileError, match="line 2"):
        read_json_lines(path)
    with pytest.raises(FileError, match="cannot be read"):
        read_json_lines(tmp_path / "none")
