"""Rows of a file are not all in memory."""

import gc
import tempfile
import tracemalloc
from dataclasses import replace

import pytest
from test_chat import CHATML, tokenizer_of
from test_data import write_lines

from hotlora.base.errors import DataError
from hotlora.tasks.data import data_hash, load_examples
from hotlora.tasks.split import drawn, held_out
from hotlora.tasks.stored import StoredExamples
from hotlora.tasks.task import Example
from hotlora.tasks.tokens import batches, tokenize


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


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
        messages = [{"role": "user", "content": "what " * 100}, {"role": "assistant", "content": "that " * 100}]
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
    assert peak(4000) < 1.25 * peak(1000)
