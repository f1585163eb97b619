"""Rows of a file are not all in memory."""

import gc
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from datasets.utils.logging import disable_progress_bar
from test_chat import CHATML, tokenizer_of
from test_data import write_lines

from hotlora.base.errors import DataError, FileError
from hotlora.tasks.data import data_hash, load_examples
from hotlora.tasks.split import drawn, held_out
from hotlora.tasks.stored import StoredExamples
from hotlora.tasks.task import Example
from hotlora.tasks.tokens import batches, tokenize


@pytest.fixture(autouse=True)
def temporary(monkeypatch):
    """A short path, as workers put sockets there."""
    with tempfile.TemporaryDirectory(prefix="s-") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)
        gc.collect()


def examples_of(number: int) -> list[Example]:
    whole = Example("p", "c", ("a", "b"), 1, {"answer": "12"}, "text", ((0, 1), (2, 4)), "f line 1", "format", "hash")
    return [
        whole,
        Example("ä\n\u2028", ""),
        *(
            replace(whole, prompt=f"p {i}", text=None if i % 3 else f"t {i}", spans=(), source_hash=None)
            for i in range(number - 2)
        ),
    ]


def test_stored_examples_are_the_examples():
    examples = examples_of(1203)
    stored = StoredExamples.write(iter(examples))
    assert stored == examples and examples == stored and list(stored) == examples
    assert stored[0] == examples[0] and stored[-1] == examples[-1] and stored[498:503] == examples[498:503]
    assert [e.place for e in stored[:1]] == ["f line 1"] and [e.format for e in stored[:1]] == ["format"]
    assert stored[::400] == examples[::400] and stored[2:2] == [] and stored.index(examples[7]) == 7
    some = stored.picked([5, 1200, 7])
    assert list(some) == [examples[5], examples[1200], examples[7]] == list(some.picked([2, 1, 0]))[::-1]
    assert len(stored.picked([])) == 0 and not list(stored.picked([])) and stored != examples[1:]
    with pytest.raises(IndexError):
        stored[1203]
    assert drawn(stored, 10, 3) == drawn(examples, 10, 3)
    for ours, theirs in zip(held_out(stored, 0.2), held_out(examples, 0.2), strict=True):
        assert isinstance(ours, StoredExamples) and ours == theirs
    assert data_hash(stored) == data_hash(examples)


def test_the_file_goes_with_its_examples(temporary):
    stored = StoredExamples.write(examples_of(3))
    part = stored.picked([1])
    assert len(list(temporary.iterdir())) == 1
    del stored
    gc.collect()
    assert part[0] == examples_of(3)[1] and len(list(temporary.iterdir())) == 1
    del part
    gc.collect()
    assert not list(temporary.iterdir())


def test_a_bad_row_leaves_no_file(tmp_path, temporary):
    path = write_lines(tmp_path / "rows.jsonl", *[{"prompt": "a", "completion": "b"}] * 1000, {"prompt": "a"})
    with pytest.raises(DataError, match="line 1001"):
        load_examples(path)
    with pytest.raises(DataError, match="embedding has 5 rows"):
        tokenize([Example("a", "b")], tokenizer_of(CHATML), 64, vocab_size=5)
    gc.collect()
    assert not list(temporary.iterdir())


def test_more_rows_take_no_more_memory(tmp_path):
    """Of Python's: what is mapped from a file can be given back at any time."""
    tokenizer = tokenizer_of(CHATML)

    def peak(number: int) -> int:
        messages = [{"role": "user", "content": "what " * 30}, {"role": "assistant", "content": "that " * 30}]
        path = write_lines(tmp_path / "rows.jsonl", *[{"messages": messages}] * number)
        gc.collect()
        tracemalloc.start()
        examples = load_examples(path, tokenizer=tokenizer)
        data_hash(examples)
        dataset = tokenize(examples, tokenizer, 2048)
        assert sum(len(batch["input_ids"]) for batch in batches(dataset, tokenizer, 16)) == number
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    peak(10)  # what is loaded once
    assert peak(3000) < 1.25 * peak(750)


def tokens_of(number: int):
    return tokenize(StoredExamples.write(examples_of(number)), tokenizer_of(CHATML), 64)


@pytest.mark.parametrize(
    "made",
    [
        lambda dataset: dataset,
        lambda dataset: dataset.select([1, 5, 7]),
        lambda dataset: dataset.select(range(3, 9)).select_columns(["index"]),
        lambda dataset: dataset.shuffle(seed=1).remove_columns(["cut"]),
        lambda dataset: dataset.train_test_split(0.2)["test"],
    ],
)
def test_tokens_live_as_long_as_any_data_set_made_of_them(made, temporary):
    """By their path, too, which is all that a process gets of them that is spawned."""
    dataset = made(tokens_of(20))
    gc.collect()
    assert len(list(temporary.iterdir())) == 1
    assert pickle.loads(pickle.dumps(dataset))["index"][:] == dataset["index"][:]
    del dataset
    gc.collect()
    assert not list(temporary.iterdir())


def test_workers_read_tokens(temporary):
    disable_progress_bar()
    dataset = tokens_of(20)
    assert dataset.map(_doubled, num_proc=2)["index"][:] == [2 * index for index in dataset["index"]]
    if (pid := os.fork()) == 0:
        del dataset
        gc.collect()
        os._exit(0)
    os.waitpid(pid, 0)
    assert len(list(temporary.iterdir())) == 1


def _doubled(row):
    return {"index": 2 * row["index"]}


@pytest.mark.parametrize("folder", ["not there", "a file"])
def test_where_no_temporary_file_can_be_written(folder, tmp_path, monkeypatch):
    (tmp_path / "a file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / folder))
    with pytest.raises(FileError, match=rf"{folder} cannot be written to .*TMPDIR"):
        StoredExamples.write(examples_of(3))


def test_a_full_disk_is_told_and_leaves_nothing(temporary):
    resource = pytest.importorskip("resource")
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        with pytest.raises(FileError, match=r"full.*TMPDIR"):
            StoredExamples.write(examples_of(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list(temporary.iterdir())


def test_what_a_killed_process_left_is_deleted_by_the_next(temporary):
    code = (
        "import sys, time; from hotlora.tasks.stored import StoredExamples; from hotlora.tasks.task import Example\n"
        "some = StoredExamples.write([Example('a', 'b')]); print(1, flush=True); time.sleep(100)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(temporary)}
    )
    process.stdout.read(1)
    (file,) = temporary.glob("*/*")
    old = time.time() - 3600
    os.utime(file, (old, old))
    first = StoredExamples.write(examples_of(3))
    assert file.is_file()  # it is in use
    process.kill()
    process.wait()
    process.stdout.close()
    second = StoredExamples.write(examples_of(4))
    assert not file.parent.exists() and len(list(temporary.iterdir())) == len([first, second])
