"""Files are whole or absent, and a broken one is named."""

import errno
import functools
import hashlib
import json
import math
import os
import shutil
import stat
from contextlib import nullcontext

import pytest
from safetensors import SafetensorError
from windows import as_windows, in_use

from hotlora.base import files
from hotlora.base.errors import FileError
from hotlora.base.files import (
    atomic_folder,
    atomic_path,
    file_in,
    is_full,
    read_json,
    read_json_lines,
    remove_leftovers,
    sha256_file,
    write_json,
)


def test_atomic_path_replaces_on_success_and_makes_folders(tmp_path):
    target = tmp_path / "new" / "folder" / "x.txt"
    for text in ("one", "two"):
        with atomic_path(target) as temporary:
            assert temporary.parent == target.parent and temporary.suffix == ".txt"
            temporary.write_text(text)
        assert target.read_text() == text
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.skipif(os.name == "nt", reason="Windows flushes no folders")
def test_what_is_renamed_into_place_is_on_the_disk_before(tmp_path, monkeypatch):
    """Else a power cut leaves the name with half of its content, or with none."""
    did = []
    for name in ("fsync", "replace", "rename"):
        plain = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, name=name, plain=plain: (did.append(name), plain(*given))[1])
    with atomic_path(tmp_path / "x.txt") as temporary:
        temporary.write_text("text")
    assert did == ["fsync", "replace", "fsync"], "the content, then the name"
    did.clear()
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "inside").mkdir(parents=True)
        (temporary / "inside" / "x.txt").write_text("text")
    assert did == ["fsync"] * 3 + ["rename"] + ["fsync"], "the file and both folders, then the name"


@pytest.mark.parametrize("code", ["EINVAL", "ENOTSUP", "ENOSYS", "EBADF", "EACCES", "EPERM", "EIO", "ENOSPC"])
@pytest.mark.parametrize("call", ["open", "fsync"])
@pytest.mark.skipif(os.name == "nt", reason="Windows flushes no folders")
def test_a_folder_that_cannot_be_flushed_does_not_undo_a_write(call, code, tmp_path, monkeypatch):
    """A folder without the right to read, network and FUSE file systems; a disk that fails is still told."""
    plain = getattr(os, call)

    def refused(asked, *given):
        is_folder = stat.S_ISDIR((os.fstat if call == "fsync" else os.stat)(asked).st_mode)
        if is_folder:
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
        return plain(asked, *given)

    monkeypatch.setattr(os, call, refused)
    with pytest.raises(FileError, match="cannot be written") if code in ("EIO", "ENOSPC") else nullcontext():
        write_json(tmp_path / "run.json", {})
    assert (tmp_path / "run.json").read_text() == "{}\n"


@pytest.mark.parametrize(
    ("code", "is_told"), [("EINVAL", False), ("ENOTSUP", False), ("ENOSYS", False), ("EACCES", True)]
)
@pytest.mark.skipif(os.name == "nt", reason="Windows flushes no folders")
def test_a_file_that_cannot_be_flushed(code, is_told, tmp_path, monkeypatch):
    def refused(_):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(os, "fsync", refused)
    with pytest.raises(FileError, match="cannot be written") if is_told else nullcontext():
        write_json(tmp_path / "run.json", {})
    assert (tmp_path / "run.json").exists() is not is_told


def test_a_link_inside_a_folder_need_not_lead_anywhere(tmp_path):
    with atomic_folder(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "link").symlink_to("nowhere")
    assert (tmp_path / "folder" / "link").is_symlink()


def test_atomic_path_leaves_the_old_file_on_failure(tmp_path):
    target = tmp_path / "x.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="stop"), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError("stop")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def _folder(path, text):
    path.mkdir()
    for name in ("a.txt", "b.txt"):
        (path / name).write_text(text)


def _texts(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("refused", [None, "old", "new"])
def test_a_folder_is_whole_where_a_file_of_the_old_one_cannot_be_deleted(tmp_path, monkeypatch, refused):
    """Windows refuses to delete what is in use, and mostly to rename its folder."""
    folder = tmp_path / "folder"
    _folder(folder, "old")
    unlink, rename = os.unlink, os.rename

    def unlink_but_b(path, **more):
        in_use() if str(path).endswith("b.txt") else unlink(path, **more)

    def rename_but_refused(source, target):
        is_refused = source == folder if refused == "old" else (source / "b.txt").read_text() == refused
        in_use() if is_refused else rename(source, target)

    monkeypatch.setattr(os, "unlink", unlink_but_b)
    monkeypatch.setattr(os, "rename", rename_but_refused)
    with pytest.raises(FileError, match="used by another process") if refused else nullcontext():
        with atomic_folder(folder) as temporary:
            _folder(temporary, "new")
    assert _texts(folder) == dict.fromkeys(("a.txt", "b.txt"), "old" if refused else "new")


@pytest.mark.parametrize("refused", [None, "copy", "delete", "new"])
def test_a_folder_of_a_containers_image_is_replaced(tmp_path, monkeypatch, refused):
    """Which its overlay of file systems does not rename; whatever fails then, the folder is there as it was."""
    folder = tmp_path / "folder"
    _folder(folder, "old")
    rename, unlink, copy = os.rename, os.unlink, shutil.copy2

    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    def rename_of_upper_layer(source, target):
        if source == folder:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        fails() if refused == "new" and (source / "b.txt").read_text() == "new" else rename(source, target)

    def unlink_but_b(path, **more):
        fails() if refused == "delete" and path == "b.txt" and once.pop("b", False) else unlink(path, **more)

    def copy_but_b(source, target, **more):
        return fails() if refused == "copy" and source.endswith("b.txt") else copy(source, target, **more)

    once = {"b": True}
    monkeypatch.setattr(os, "rename", rename_of_upper_layer)
    monkeypatch.setattr(os, "unlink", unlink_but_b)
    monkeypatch.setattr(shutil, "copytree", functools.partial(shutil.copytree, copy_function=copy_but_b))
    with pytest.raises(FileError, match=r"Input/output error|b\.txt") if refused else nullcontext():
        with atomic_folder(folder) as temporary:
            _folder(temporary, "new")
    assert _texts(folder) == dict.fromkeys(("a.txt", "b.txt"), "old" if refused else "new")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_replaces_no_file_and_no_link(tmp_path):
    """What a link points to is somebody's."""
    _folder(tmp_path / "elsewhere", "theirs")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").write_text("text")
    for name in ("link", "file"):
        with pytest.raises(FileError, match="cannot be written"), atomic_folder(tmp_path / name) as temporary:
            temporary.mkdir()
    assert (tmp_path / "file").read_text() == "text" and (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "file", "link"]


def test_on_windows_a_rename_waits_for_who_reads_the_file(tmp_path, monkeypatch):
    """A scanner for viruses opens each new file for some milliseconds."""
    as_windows(monkeypatch, files)
    waited, refuse, replace = [], [in_use] * 2, os.replace
    monkeypatch.setattr(files.time, "sleep", waited.append)
    monkeypatch.setattr(files.os, "replace", lambda *paths: (refuse.pop() if refuse else replace)(*paths))
    with atomic_path(tmp_path / "x.txt") as temporary:
        temporary.write_text("text")
    assert (tmp_path / "x.txt").read_text() == "text" and waited == [0.1, 0.2]
    monkeypatch.setattr(files.os, "replace", in_use)
    with pytest.raises(FileError, match="used by another process"), atomic_path(tmp_path / "x.txt") as temporary:
        temporary.write_text("other")
    assert (tmp_path / "x.txt").read_text() == "text" and sum(waited) == pytest.approx(2.3)


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        # As safetensors and torch say it.
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)"), False),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), True),
        (RuntimeError("basic_ios::clear: iostream error"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_a_full_disk_is_known_whoever_tells_of_it(tmp_path, error, full):
    assert is_full(error) is full
    with pytest.raises(FileError if full or isinstance(error, OSError) else type(error)) as caught:
        with atomic_path(tmp_path / "x.pt") as temporary:
            temporary.write_text("half")
            raise error
    assert not full or "x.pt cannot be written: the disk or a quota is full" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "x.json", tmp_path / ("a" * 300), "/"):
        with pytest.raises(FileError, match="written"):
            write_json(path, {})
    (tmp_path / ".0123456789ab-x.json").write_text("half")
    (tmp_path / ".0123456789ab-adapter").mkdir()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


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
        (b'{"a": ["x", {"\\ud83d": 1}]}', r"half a character \(\\ud83d\)"),
        (b'{"a": ' + b"7" * 5000 + b"}", "5000 digits"),
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
    path.write_text('{"step": 1}\n{"step": 2, "x": "\\udc00"}\n')
    with pytest.raises(FileError, match=r"line 2: .*half a character \(\\udc00\)"):
        read_json_lines(path)
    path.write_text('{"x": "\\ud83d\\ude00"}\n')
    assert read_json_lines(path) == [{"x": "😀"}], "two halves are one character"
    with pytest.raises(FileError, match="cannot be read"):
        read_json_lines(tmp_path / "none")
