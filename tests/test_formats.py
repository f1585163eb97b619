"""Formats and files of people's own data, read as users of TRL and LLaMA-Factory expect."""

import csv
import functools
import json
import logging
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict
from test_chat import CHATML, TOOLS, tokenizer_of
from tiny_tokenizer import byte_tokenizer

from hotlora.base.errors import DataError
from hotlora.tasks import Example
from hotlora.tasks.data import data_hash, load_examples, trained_parts
from hotlora.tasks.in_memory import save_rows
from hotlora.tasks.rows import arrow_rows, dataset_rows, folder_rows, hub_rows, read_rows
from hotlora.tasks.stored import StoredExamples
from hotlora.tasks.tokens import tokenize, told

ASKED, SAID = "What is 2 + 3?", "It is 5."
TALK = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]
WRITTEN = f"<|im_start|>user\n{ASKED}<|im_end|>\n<|im_start|>assistant\n{SAID}<|im_end|>\n"


def read(folder: Path, *rows: dict, tokenizer=None, **options) -> list[Example]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_examples(str(path), tokenizer=tokenizer or tokenizer_of(CHATML), **options)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        {"prompt": TALK[:1], "completion": TALK[1:]},
        {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": SAID}]},
        {"conversations": TALK},
        {"conversation": [{"from": "user", "value": ASKED}, {"from": "assistant", "value": SAID}]},
        {"instruction": ASKED, "input": "", "output": SAID},
        {"instruction": ASKED, "output": SAID, "system": "", "history": []},
        {"messages": json.dumps(TALK)},
    ],
    ids=str,
)
def test_conversations_of_all_formats_are_one(row: dict, tmp_path: Path):
    (example,) = read(tmp_path, row)
    assert example.text == WRITTEN
    assert [str(example.text)[a:b] for a, b in example.spans] == [f"{SAID}<|im_end|>"]


@pytest.mark.parametrize(("first", "is_told"), [("Be brief.", False), ("Be long.", True)])
def test_sharegpts_system_beside_a_turn_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, first: str, is_told: bool
):
    turns = [{"from": "system", "value": first}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    (example,) = read(tmp_path, {"system": "Be brief.", "conversations": turns}, tokenizer=tokenizer_of("qwen3"))
    assert example.prompt.count(first) == 1
    assert ("'system' is left out, as the first turn is another one of it" in caplog.text) == is_told


def test_sharegpt_keeps_reasoning(tmp_path: Path):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "reasoning_content": "so it is"}]
    (example,) = read(tmp_path, {"conversations": turns}, tokenizer=tokenizer_of("qwen3"))
    assert "so it is" in example.text


def test_sharegpt_with_system_tools_and_calls(tmp_path: Path):
    call = {"name": "get_weather", "arguments": {"city": "Paris"}}
    row = {
        "system": "Be brief.",
        "tools": json.dumps(TOOLS),
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "21 C"},
            {"from": "gpt", "value": "Warm."},
        ],
    }
    (example,) = read(tmp_path, row, tokenizer=tokenizer_of("qwen3"))
    (same,) = read(
        tmp_path,
        {
            "tools": TOOLS,
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Weather?"},
                {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
                {"role": "tool", "content": "21 C"},
                {"role": "assistant", "content": "Warm."},
            ],
        },
        tokenizer=tokenizer_of("qwen3"),
    )
    assert example.text == same.text and example.spans == same.spans and len(example.spans) == 2


def test_alpaca_with_an_input_a_system_message_and_turns_before(tmp_path: Path):
    row = {"instruction": "Add.", "input": "2, 3", "output": "5", "system": "Be brief.", "history": [["Hi", "Hello."]]}
    (example,) = read(tmp_path, row)
    assert [str(example.text)[a:b] for a, b in example.spans] == ["Hello.<|im_end|>", "5<|im_end|>"]
    assert "system\nBe brief." in str(example.text) and "user\nAdd.\n2, 3<" in str(example.text)


def test_alpaca_without_a_template_is_alpacas_own_prompt(tmp_path: Path):
    (example,) = read(tmp_path, {"instruction": "Add.", "input": "2, 3", "output": "5"}, tokenizer=byte_tokenizer())
    assert example.text is None and example.prompt.startswith("Below is an instruction that describes a task, paired")
    assert example.prompt.endswith("### Input:\n2, 3\n\n### Response:") and example.completion == "\n5"
    (without,) = read(tmp_path, {"instruction": "Add.", "input": None, "output": "5"}, apply_chat_template=False)
    assert "### Input" not in without.prompt and without.text is None


def test_a_text_is_trained_in_whole(tmp_path: Path):
    tokenizer = byte_tokenizer()
    (plain,) = read(tmp_path, {"text": "Once upon a time."}, tokenizer=tokenizer)
    (row,) = tokenize([plain], tokenizer, 100)
    assert tokenizer.decode(row["input_ids"]) == f"Once upon a time.{tokenizer.eos_token}" and all(
        row["completion_mask"]
    )
    # A template has written it, special tokens and all: none is added.
    written = f"{tokenizer.bos_token}user\nHi{tokenizer.eos_token}"
    (row,) = tokenize(read(tmp_path, {"text": written}, tokenizer=tokenizer), tokenizer, 100)
    assert tokenizer.decode(row["input_ids"]) == written


def test_whether_the_template_writes_prompts_and_completions(tmp_path: Path):
    row = {"prompt": f"{ASKED} ", "completion": f" {SAID}"}
    (plain,) = read(tmp_path, row)
    assert (plain.text, plain.prompt, plain.completion) == (None, f"{ASKED} ", f" {SAID}")
    assert "prompt + completion, as they are" in plain.format
    (asked,) = read(tmp_path, row, apply_chat_template=True)
    assert asked.text == WRITTEN and "by the chat template" in asked.format
    (asked,) = read(tmp_path, {"question": ASKED, "answer": SAID}, apply_chat_template=True)
    assert asked.text == WRITTEN
    (talk,) = read(tmp_path, {"messages": TALK}, apply_chat_template=False)
    assert talk.text is None and talk.prompt == f"User: {ASKED}\n\nAssistant:"
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        read(tmp_path, row, tokenizer=byte_tokenizer(), apply_chat_template=True)


def test_all_of_a_prompt_and_its_completion(tmp_path: Path):
    tokenizer = byte_tokenizer()
    rows = read(tmp_path, {"prompt": "ab", "completion": "cd"}, tokenizer=tokenizer, train_on="all")
    (made,) = tokenize(rows, tokenizer, 100)
    assert sum(made["completion_mask"]) == len("abcd") + 1
    assert trained_parts("all", rows) == "all"
    rows = read(tmp_path, {"prompt": "ab", "completion": "cd"}, tokenizer=tokenizer)
    (made,) = tokenize(rows, tokenizer, 100)
    assert sum(made["completion_mask"]) == len("cd") + 1 and trained_parts("assistant", rows) is None
    (task,) = load_examples("nano-math", limit=1, train_on="all")
    assert task.spans == ((0, len(task.prompt)),)


def test_columns_by_other_names(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    row = {"ask": ASKED, "reply": SAID, "id": 3}
    (example,) = read(tmp_path, row, columns="prompt=ask, completion=reply")
    assert (example.prompt, example.completion) == (ASKED, SAID)
    assert "nothing reads id" in caplog.text and "ask" not in caplog.text.replace("tasks", "")
    caplog.clear()
    (example,) = read(tmp_path, {"prompt": "x", "ask": ASKED, "completion": SAID}, columns="prompt=ask")
    assert example.prompt == ASKED and "nothing reads prompt" in caplog.text
    caplog.clear()
    (turned,) = read(tmp_path, {"prompt": SAID, "completion": ASKED}, columns="prompt=completion,completion=prompt")
    assert (turned.prompt, turned.completion) == (ASKED, SAID)


ANSWERS = ("one", "two", "three")
TURNS = [turn for answer in ANSWERS for turn in (("user", f"ask {answer}"), ("assistant", answer))]


@pytest.mark.parametrize("template", [CHATML, None])
@pytest.mark.parametrize("train_on", ["assistant", "last"])
@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"train": False}], ids=str)
@pytest.mark.parametrize(
    "unlearned", [{"one"}, {"two"}, {"three"}, {"one", "three"}], ids=["one", "two", "three", "one+three"]
)
def test_answers_that_are_marked_are_not_learned(mark: dict, unlearned: set, train_on: str, template, tmp_path: Path):
    """OpenAI's, ms-swift's and Axolotl's marks; ShareGPT's turns have them, too."""
    tokenizer = tokenizer_of(template) if template else byte_tokenizer()
    of = [(role, text, mark if text in unlearned else {"weight": 1}) for role, text in TURNS]
    messages = [{"role": role, "content": text, **more} for role, text, more in of]
    turns = [{"from": {"user": "human"}.get(role, "gpt"), "value": text, **more} for role, text, more in of]
    end = "<|im_end|>" if template else ""
    learned = [text for role, text in TURNS if role == "assistant" and text not in unlearned]
    for row in ({"messages": messages}, {"conversations": turns}):
        (example,) = read(tmp_path, row, tokenizer=tokenizer, train_on=train_on)
        if template:
            said = [str(example.text)[a:b] for a, b in example.spans]
        else:
            said = [*(example.prompt[a:b].strip() for a, b in example.spans), example.completion.strip()]
        assert said == [f"{text}{end}" for text in (learned if train_on == "assistant" else learned[-1:])]


def test_a_row_in_which_nothing_is_learned_is_told(tmp_path: Path):
    messages = [{"role": role, "content": text, "weight": 0} for role, text in TURNS]
    with pytest.raises(DataError, match=r"has no answer to learn.*'weight': 0"):
        read(tmp_path, {"messages": messages})


def test_columns_as_a_mapping(tmp_path: Path):
    row = {"ask": "a", "reply": "b"}
    (example,) = read(tmp_path, row, columns={"prompt": "ask", "completion": "reply"})
    assert (example.prompt, example.completion) == ("a", "b")
    with pytest.raises(DataError, match="names what no format has: promt"):
        read(tmp_path, row, columns={"promt": "ask"})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("prompt", "give each name once, as in prompt=question"),
        ("prompt=a,prompt=b", "give each name once"),
        ("ask=prompt", r"no format has: ask.* \(did you mean prompt=ask\?\)"),
        ("promt=ask", r"names what no format has: promt \(did you mean prompt\?\)"),
        ("prompt=aks", r"line 1 has no field 'aks', which --columns names; it has ask, reply"),
    ],
)
def test_columns_that_do_not_exist(columns: str, message: str, tmp_path: Path):
    with pytest.raises(DataError, match=message):
        read(tmp_path, {"ask": "a", "reply": "b"}, columns=columns)
    with pytest.raises(DataError, match="nano-math is a task, whose prompt is its own"):
        load_examples("nano-math", columns="prompt=ask")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": TALK, "completion": "x"}, "'prompt' must be text"),
        ({"prompt": TALK, "completion": TALK[:1]}, r"has no answer to learn, its completion has 1 messages of roles"),
        ({"conversations": "hello"}, "'conversations' must be a list of objects with 'from' and 'value'"),
        ({"conversations": [{"from": "human"}]}, "each of 'conversations' needs 'from' and 'value'"),
        ({"conversations": []}, "has no answer to learn, 0 messages"),
        ({"prompt": "a", "completion": None}, r"has prompt \(completion: null\); a row needs"),
        ({"conversations": [{"from": "human", "value": "a"}], "system": ["b"]}, "'system' must be text"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{"}]}, "must be JSON"),
        ({"instruction": "a", "output": 1}, "'output' must be text"),
        ({"instruction": "a", "output": "b", "input": 1}, "'input' must be text"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "'history' must be a list of pairs"),
        ({"text": 1}, "'text' must be text"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "--columns completion=chosen"),
        ({"input": "a", "target": "b"}, "has input, target; a row needs .* --columns prompt=NAME,completion=NAME"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "has no answer to learn"),
    ],
    ids=str,
)
def test_rows_of_no_format_say_where_and_what(row: dict, message: str, tmp_path: Path):
    with pytest.raises(DataError, match=rf"rows\.jsonl line 1.*{message}"):
        read(tmp_path, row)


def test_tables_and_parquet_hold_the_same_rows(tmp_path: Path):
    rows = [{"prompt": "a, b\nc", "completion": ' say "x"'}, {"prompt": "é\u2028", "completion": " 0012"}]
    expected = read(tmp_path, *rows)
    for suffix, separator in ((".csv", ","), (".tsv", "\t")):
        with open(tmp_path / f"rows{suffix}", "w", newline="", encoding="utf-8-sig") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter=separator)
            table.writeheader()
            table.writerows(rows)
        found = load_examples(str(tmp_path / f"rows{suffix}"))
        assert found == expected and data_hash(found) == data_hash(expected)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert load_examples(str(tmp_path / "rows.parquet")) == expected


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("rows.csv", b"prompt,completion\na,b,c\n", r"rows\.csv line 2: has not as many fields"),
        ("rows.csv", b"prompt,completion\na\n", r"rows\.csv line 2: has not as many fields"),
        ("rows.csv", b'prompt,completion\n"a\n\nb",c\n\n"d\ne"\n', r"rows\.csv line 6: has not as many fields"),
        ("rows.csv", b'prompt,completion\n"a\nb",c\nd,"e\nf\n', r"rows\.csv line 4 is no table"),
        ("rows.csv", b'prompt,completion\na,"b\n', r"rows\.csv line \d: is no table|rows\.csv line \d is no table"),
        ("rows.csv", b"prompt,completion,completion\na,b,c\n", "has the column 'completion' twice"),
        ("rows.csv", b"prompt,completion\n", "holds no rows"),
        ("rows.csv", b"", "holds no rows"),
        ("rows.csv", b"\xff\xfe\x00", "cannot be read"),
        ("rows.parquet", b"PAR1", "cannot be read as Parquet"),
        ("rows.parquet", b"", "cannot be read as Parquet"),
    ],
)
def test_broken_tables_say_where(name: str, data: bytes, message: str, tmp_path: Path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        load_examples(str(tmp_path / name))


def test_a_folder_is_its_files(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    folder = tmp_path / "data"
    (folder / "more").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl", "more/c.jsonl", ".hidden.jsonl", "a.chat.json"):
        text = "{}" if name == "a.chat.json" else json.dumps({"prompt": name, "completion": "x"}) + "\n"
        (folder / name).write_text(text)
    assert [e.prompt for e in load_examples(str(folder))] == ["a.jsonl", "b.jsonl"]
    for name in ("train-0.jsonl", "train-1.jsonl", "test.jsonl"):
        (folder / name).write_text(json.dumps({"prompt": name, "completion": "x"}) + "\n")
    assert [e.prompt for e in load_examples(str(folder))] == ["train-0.jsonl", "train-1.jsonl"]
    assert "'train' is read, and not a.jsonl, b.jsonl, test.jsonl" in caplog.text
    assert {record.levelname for record in caplog.records} == {"WARNING"}, "a training shows no others"
    assert [e.prompt for e in load_examples(str(folder), "test")] == ["test.jsonl"]
    with pytest.raises(DataError, match=r"holds no file of the split 'validation', only .*test.jsonl"):
        load_examples(str(folder), "validation")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"holds no files of rows"):
        load_examples(str(tmp_path / "none"))


def test_a_saved_data_set(tmp_path: Path):
    rows = [{"messages": TALK, "tools": None}, {"messages": [*TALK, *TALK], "tools": None}]
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(tmp_path / "saved")
    found = load_examples(str(tmp_path / "saved"), tokenizer=tokenizer_of(CHATML))
    assert found[0].text == WRITTEN and len(found[1].spans) == 2
    assert load_examples(str(tmp_path / "saved" / "train"), tokenizer=tokenizer_of(CHATML)) == found
    with pytest.raises(DataError, match=r"has no split 'test'; it has train: give .*SPLIT"):
        list(folder_rows(tmp_path / "saved", "test"))


def test_a_hub_id_with_a_split_and_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`datasets` takes a folder of that name for the Hub's data set: its own reading of splits and parts."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "cache" / "owner___name").mkdir(parents=True)  # or it would be asked for whether the Hub can be reached
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    for split, number in (("train", 5), ("test", 2)):
        rows = "".join(json.dumps({"prompt": f"{split} {i}", "completion": "x"}) + "\n" for i in range(number))
        (tmp_path / "owner" / "name" / f"{split}.jsonl").write_text(rows)

    def prompts(name: str, split: str = "train") -> list[str]:
        return [row.values["prompt"] for row in hub_rows(name, split)]

    assert len(prompts("owner/name")) == 5 and len(prompts("owner/name", "test")) == 2
    assert prompts("owner/name:test") == ["test 0", "test 1"]
    assert prompts("owner/name[:2]") == ["train 0", "train 1"]
    assert prompts("owner/name:train[3:]") == prompts("owner/name:default:train[3:]") == ["train 3", "train 4"]
    assert [row.place for row in hub_rows("owner/name:test[1:2]", "train")] == ["owner/name test[1:2] row 1"]
    assert [row.place for row in hub_rows("owner/name:test", "train")][1] == "owner/name test row 2"
    rows = hub_rows("owner/name", "train")
    assert next(rows).values["prompt"] == "train 0" and len(list(rows)) == 4
    for wrong in ("owner/name:a:b:c", "owner/name[:2", "owner/name:validation", "owner/name:no:train"):
        with pytest.raises(DataError, match=r"no Hub id|cannot be loaded from the Hub"):
            next(hub_rows(wrong, "train"))


def test_a_part_of_a_hub_data_set_is_all_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The second file of the split is broken, so that reading it is an error."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "cache" / "owner___name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    rows = "".join(json.dumps({"prompt": f"train {i}", "completion": "x"}) + "\n" for i in range(5))
    (folder / "train-00000-of-00002.jsonl").write_text(rows)
    (folder / "train-00001-of-00002.jsonl").write_text("{broken\n")
    examples = load_examples("owner/name:train[1:4]")
    assert [example.prompt for example in examples] == ["train 1", "train 2", "train 3"]
    assert isinstance(examples, StoredExamples), "in a mapped file, as a local file's"
    assert examples[0].place == "owner/name train[1:4] row 1"
    assert not list((tmp_path / "cache").rglob("*.arrow")), "nothing was prepared"
    assert len(load_examples("owner/name[:2]")) == 2
    with pytest.raises(DataError, match="cannot be loaded from the Hub"):
        load_examples("owner/name:train")
    with pytest.raises(
        DataError, match=r"train\[4:6\].* cannot be read to its end, after row 1 .*: the Hub or its data"
    ):
        load_examples("owner/name:train[4:6]")
    (folder / "train-00001-of-00002.jsonl").unlink()
    with pytest.raises(DataError, match=r"owner/name train\[7:9\] holds no rows"):
        load_examples("owner/name:train[7:9]")
    assert len(load_examples("owner/name:train[3:]")) == 2, "up to the end: all is prepared"
    assert list((tmp_path / "cache").rglob("*.arrow"))
    monkeypatch.setattr(datasets, "load_dataset", functools.partial(_never_streaming, datasets.load_dataset))
    assert len(load_examples("owner/name:train[3:5]")) == 2, "what is prepared is not asked for again"


def _never_streaming(load_dataset: Any, *args: Any, **options: Any) -> Any:
    assert not options.get("streaming")
    return load_dataset(*args, **options)


def test_what_is_trained_in_one_line(tmp_path: Path):
    tokenizer = tokenizer_of(CHATML)
    rows = read(
        tmp_path, {"messages": TALK}, {"messages": TALK}, {"prompt": "a", "completion": "b"}, {"text": "c" * 200}
    )
    dataset = tokenize(rows, tokenizer, 100)
    line = told(rows, dataset, "assistant")
    num = sum(map(len, dataset["input_ids"]))
    assert line.startswith("4 rows (2 messages, by the chat template; 1 prompt + completion, as they are; 1 text, as")
    assert f", {num:,} tokens, " in line and "(every answer); the longest has 100; 1 cut" in line
    assert line.endswith(f"(--max-length {max(dataset['length'])} would cut none)") and max(dataset["length"]) > 200
    whole = tokenize(rows, tokenizer, max(dataset["length"]))
    assert "cut" not in told(rows, whole, "assistant")


def test_rows_in_memory_are_kept_beside_the_run(tmp_path: Path):
    rows = [{"messages": TALK, "more": None}, {"prompt": "a", "completion": "b"}]
    kept = save_rows(rows, tmp_path / "run" / "data.jsonl")
    assert [json.loads(line) for line in kept.read_text().splitlines()] == [{"messages": TALK}, rows[1]]
    before = kept.stat().st_size
    assert save_rows(iter(rows), kept) == kept and kept.stat().st_size == before
    with pytest.raises(DataError, match=r"data.jsonl holds other rows: give another output folder"):
        save_rows(rows[1:], kept)
    other = save_rows(rows[1:], tmp_path / "other" / "data.jsonl")
    assert save_rows(rows, other, replace=True).read_bytes() == kept.read_bytes()
    assert kept.stat().st_size == before and len(list(kept.parent.iterdir())) == 1
    dataset = Dataset.from_list([{"messages": TALK}])
    for data in (dataset, dataset.to_iterable_dataset(), dataset.to_pandas()):
        path = save_rows(data, tmp_path / type(data).__name__ / "data.jsonl")
        assert load_examples(str(path), tokenizer=tokenizer_of(CHATML))[0].text == WRITTEN
    path = save_rows(pyarrow.table({"text": ["a"], "at": [datetime(2026, 1, 2)]}), tmp_path / "arrow" / "data.jsonl")
    assert json.loads(path.read_text()) == {"text": "a", "at": "2026-01-02 00:00:00"}


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="datasets writes values of mixed types since version 5")
def test_values_of_mixed_types_in_parquet_are_those_that_were_written(tmp_path: Path):
    """`datasets` keeps them as JSON in strings: a schema of a tool must not be shown to a model as a text."""

    def tool(name: str, **properties: dict) -> dict:
        return {"function": {"name": name, "parameters": {"properties": properties}}}

    def called(**arguments: object) -> list[dict]:
        call = {"function": {"name": "f", "arguments": arguments}}
        return [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]

    rows = [
        {"messages": called(city="Bern"), "tools": [tool("a", city={"type": "string"})]},
        {"messages": called(n=None), "tools": [tool("b", n={"type": "integer", "default": None})]},
    ]
    path, made = tmp_path / "rows.parquet", datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    made.to_parquet(path)
    assert [row.values for row in read_rows(path)] == rows, "a null too is one that was written"
    made.save_to_disk(tmp_path / "saved")
    assert [row.values for row in folder_rows(tmp_path / "saved", "train")] == rows
    save_rows(made, tmp_path / "rows.jsonl")
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == rows


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="datasets has columns of JSON since version 5")
@pytest.mark.parametrize(
    "change",
    [
        lambda stream: stream.remove_columns("id"),
        lambda stream: stream.rename_column("id", "other"),
        lambda stream: stream.map(dict, features=stream.features),
        lambda stream: stream.remove_columns("id").shuffle(seed=0, buffer_size=1).with_format("torch"),
        lambda stream: stream.with_format("torch").select_columns(["mixed", "messages"]),
    ],
)
def test_columns_of_json_in_a_stream_that_was_changed(change, tmp_path: Path):
    """Such a stream has features and decoded values: Arrow refuses those of mixed types, and fills in the others."""
    call = {"function": {"name": "f", "arguments": {"city": "Bern"}}}
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    null = [talk[0], talk[1] | {"tool_calls": [{"function": {"name": "f", "arguments": {"n": None}}}]}]
    rows = [
        {"id": 1, "mixed": [1, "a"], "messages": talk},
        {"id": 2, "mixed": {"a": None}, "messages": null},
        {"id": 3, "mixed": "words", "messages": talk},
    ]
    written = [{"mixed": row["mixed"], "messages": row["messages"]} for row in rows]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = datasets.load_dataset("json", data_files=str(path), split="train", streaming=True, cache_dir=tmp_path)
    for data in (stream, Dataset.from_list(rows, on_mixed_types="use_json").to_iterable_dataset()):
        found = [row.values for row in dataset_rows(change(data), "data")]
        assert [{name: row[name] for name in written[0]} for row in found] == written


def _json_table(cells: list[str | None], **columns: pyarrow.Array) -> pyarrow.Table:
    """The cells as text, in a list and in a struct, in columns of Arrow's JSON."""
    kind = datasets.Json()
    features = datasets.Features({"json": kind, "listed": datasets.List(kind), "inside": {"level": kind, "more": kind}})
    inside = [{"level": cell, "more": None} for cell in cells]
    table = pyarrow.table({"json": cells, "listed": [[cell] for cell in cells], "inside": inside})
    table = table.cast(features.arrow_schema)
    for name, column in columns.items():
        table = table.append_column(name, column)
    return table


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="datasets has columns of JSON since version 5")
def test_numbers_in_columns_of_json_are_those_that_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`datasets` gives 0.7000000000000001, 3.0000000000000004e-05, an error, and again an error."""
    assert repr(next(arrow_rows([_json_table(["NaN"])], "")).values["json"]) == "nan"
    cells = ['{"level":0.7}', "3e-05", "18446744073709551616", '{"n":null,"s":"7"}', None]
    values = [{"level": 0.7}, 3e-05, 2**64, {"n": None, "s": "7"}, None]
    rows = [{"json": value, "listed": [value], "inside": {"level": value}} for value in values[:-1]]
    rows.append({"listed": [None], "inside": {}})
    table = _json_table(cells)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert [row.values for row in read_rows(tmp_path / "rows.parquet")] == rows
    made = Dataset(table)
    made.save_to_disk(tmp_path / "saved")
    assert [row.values for row in folder_rows(tmp_path / "saved", "train")] == rows
    for number, data in enumerate((made, made.to_iterable_dataset(), table)):
        path = save_rows(data, tmp_path / f"{number}.jsonl")
        assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    fewer = made.with_format(columns=["json"]).select([1, 0])
    assert [row.values for row in dataset_rows(fewer, "fewer")] == [{"json": 3e-05}, {"json": {"level": 0.7}}]
    changed = made.select([0]).with_transform(lambda batch: {"changed": [str(cell) for cell in batch["json"]]})
    assert "level" in next(dataset_rows(changed, "changed")).values["changed"], "a transform takes decoded values"
    # From the Hub, whole and as a stream.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "cache" / "owner___name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    pyarrow.parquet.write_table(table, tmp_path / "owner" / "name" / "train.parquet")
    assert [row.values for row in hub_rows("owner/name[1:4]", "train")] == rows[1:4]
    assert [row.values for row in hub_rows("owner/name", "train")] == rows


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="datasets has columns of JSON since version 5")
def test_a_column_of_json_beside_others(tmp_path: Path):
    """Of which `datasets` need not know each type."""
    counts = pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    pyarrow.parquet.write_table(_json_table(["0.7"], counts=counts), tmp_path / "rows.parquet")
    (row,) = read_rows(tmp_path / "rows.parquet")
    assert row.values == {"json": 0.7, "listed": [0.7], "inside": {"level": 0.7}, "counts": [("a", 1)]}
    for cell, message in (
        (
            '{"a": ',
            r"row 2 is not valid JSON \(Expecting value at column 7\); a column of JSON holds '\{\"a\": '",
        ),
        ('{"a": 1, "a": 2}', r"rows.parquet row 2: the key 'a' is given twice"),
        (r'"\ud83d"', r"rows.parquet row 2: holds half a character"),
    ):
        pyarrow.parquet.write_table(_json_table(["1", cell]), tmp_path / "rows.parquet")
        with pytest.raises(DataError, match=message):
            read_rows(tmp_path / "rows.parquet")
    Dataset(_json_table(["1", "{"])).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"saved row 2 is not valid JSON"):
        list(folder_rows(tmp_path / "saved", "train"))


def test_columns_of_parquet(tmp_path: Path):
    a, b = pyarrow.array(["a"]), pyarrow.array(["b"])
    pyarrow.parquet.write_table(
        pyarrow.Table.from_arrays([a, b, a], names=["prompt", "completion", "completion"]), tmp_path / "twice.parquet"
    )
    with pytest.raises(DataError, match="twice.parquet has the column 'completion' twice".replace(".", r"\.")):
        load_examples(str(tmp_path / "twice.parquet"))
    messages = [{**message, "at": datetime(2026, 1, 2), "raw": b"x"} for message in TALK]  # what JSON does not have
    pyarrow.parquet.write_table(pyarrow.table({"messages": [messages]}), tmp_path / "times.parquet")
    (example,) = load_examples(str(tmp_path / "times.parquet"), tokenizer=tokenizer_of(CHATML))
    assert example.text == WRITTEN


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data holds no rows"),
        (["a"], "row 1 of the data is a str: give dictionaries"),
        ([{"prompt": "a"}, {"prompt": b"a"}], "row 2 of the data holds what JSON cannot: a bytes"),
        ([{"prompt": {1}}], r"JSON cannot: a set, '\{1\}': leave it out"),
        (5, "data is a int: give a path, a name, or rows"),
        (pandas.DataFrame([["a", "b", "c"]], columns=["prompt", "text", "text"]), "has the column 'text' twice"),
        ({"prompt": ["a"], "completion": ["b"]}, r"a dictionary of columns: give datasets\.Dataset\.from_dict"),
        ({"prompt": "a", "completion": "b"}, r"data is one row, a dictionary: give a list of rows, \[data\]"),
        ({"messages": TALK}, r"data is one row, a dictionary: give a list of rows, \[data\]"),
        ({"train": [{}]}, r"has the splits train: give one of them, as data\[split\]"),
    ],
    ids=str,
)
def test_rows_in_memory_that_are_none(data: object, message: str, tmp_path: Path):
    with pytest.raises(DataError, match=message):
        save_rows(data, tmp_path / "data.jsonl")
    assert not list(tmp_path.iterdir())


def test_a_folder_may_lie_in_a_hidden_one(tmp_path: Path):
    folder = tmp_path / ".data" / "mine"
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    assert len(load_examples(str(folder))) == 1
