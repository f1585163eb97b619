"""Files that another put where a run writes: never emptied, and the error that came first is told."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hotlora.base.errors import FileError
from hotlora.base.files import append_to
from hotlora.base.lock import locked

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links and limits of POSIX")


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_lock_that_is_a_link_is_refused_and_its_file_kept(tmp_path: Path, link):
    (tmp_path / "run").mkdir()
    (tmp_path / "thesis.txt").write_text("years of work")
    link(tmp_path / "thesis.txt", tmp_path / "run" / ".lock")
    with pytest.raises(FileError, match=r"run/\.lock is a link: delete it"), locked(tmp_path / "run"):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_lock_that_is_no_file_is_refused_at_once(tmp_path: Path):
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(FileError, match=r"\.lock is no file"), locked(tmp_path):
        pass
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "nowhere" / ".lock").symlink_to(tmp_path / "not there")
    with pytest.raises(FileError, match="is a link"), locked(tmp_path / "nowhere"):
        pass
    assert not (tmp_path / "not there").exists()


def test_another_programs_lock_file_is_locked_and_left_as_it_is(tmp_path: Path):
    (tmp_path / ".lock").write_text("somebody's own")
    with locked(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == "somebody's own"


def test_what_is_appended_goes_through_no_link(tmp_path: Path):
    (tmp_path / "notes").write_text("mine\n")
    (tmp_path / "log.txt").symlink_to(tmp_path / "notes")
    with pytest.raises(FileError, match=r"log\.txt is a link"):
        append_to(tmp_path / "log.txt")
    assert (tmp_path / "notes").read_text() == "mine\n"


def test_on_a_full_disk_the_error_that_came_first_is_told(tmp_path: Path):
    code = (
        "import resource, sys\nfrom hotlora.base.errors import HotLoraError\nfrom hotlora.base.lock import locked\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))\n"
        "try:\n    with locked(sys.argv[1]): raise HotLoraError('the named error')\n"
        "except BaseException as error: print(type(error).__name__, error)"
    )
    said = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True).stdout
    assert said == "HotLoraError the named error\n"
