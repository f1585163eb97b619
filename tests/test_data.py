import gzip
import json
import logging
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from published import ABSENT, DATA
from tiny_tokenizer import byte_tokenizer
from transformers import ByT5Tokenizer

from hotlora.base.errors import DataError
from hotlora.tasks import Example, task_of, tokens
from hotlora.tasks.arrow import without_filling
from hotlora.tasks.data import data_hash, load_examples, test_source
from hotlora.tasks.tokens import IGNORE, batches, encode_completion, encode_prompt, tokenize

test_source.__test__ = False  # type: ignore[attr-defined]

REAL = DATA / "gsm8k" / "train.jsonl"
CHAT = (
    "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)


def write_lines(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_every_row_format(tmp_path: Path):
    rows = [
        {"prompt": "a\u2028b", "completion": " c", "more": 1},
        {"question": "1+1?", "answer": "#### 2"},
        {
            "messages": [
                {"role": "system", "content": "S"},
                {"role": "user", "content": "U"},
                {"role": "assistant", "content": "A"},
            ]
        },
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    examples = load_examples(str(path))
    assert [(e.prompt, e.completion) for e in examples] == [
        ("a\u2028b", " c"),
        ("Question: 1+1?\nAnswer:", " #### 2"),
        ("System: S\n\nUser: U\n\nAssistant:", " A"),
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert examples == load_examples(str(tmp_path / "rows.json")) == load_examples(str(tmp_path / "rows.jsonl.gz"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no rows"),
        ("[]", "holds no rows"),
        ("\n \n", "holds no rows"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": ', r"rows\.jsonl line 2 is not valid JSON"),
        (
            '{"prompt": "a", "completion"\n{"prompt": "b"}',
            r"line 1 is not valid JSON \(.* at column 29\)",
        ),
        ('{"prompt": "a", "completion": "b"}\n[1]\n', r"line 2: a row must be a JSON object, this is a list"),
        ('[{"prompt": "a"}', r"line 1 is not valid JSON"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "\\ud800", "completion": ""}', r"line 2.*half a character"),
        ('[{"prompt": "a", "completion": "\\udfff"}]', r"row 1.*half a character"),
        (
            '{"prompt": "a", "text": "b"}',
            r"line 1: has prompt, text; a row needs prompt \+ completion, messages",
        ),
        ('{"prompt": "a", "completion": 3}', r"line 1: 'completion' must be text, this is 3"),
        ('{"messages": "hello"}', r"line 1: 'messages' must be a list"),
        (
            '{"messages": [{"role": "user", "content": "a"}]}',
            r"line 1: has no answer to learn, 1 messages of roles \[\"user\"\]",
        ),
        ('{"prompt": "a", "completion": "b \\ud83d"}', r"line 1: holds half a character, \\ud83d"),
        ('[{"a": 1}, {"messages": [{"role": "user", "content": "\\uDE00"}]}]', r"row 2: holds half a character"),
        ('{"prompt": "a", "completion": "b", "\\ud83d": 1}', r"line 1: holds half a character"),
        (f'{{"prompt": "a", "completion": {"1" * 5000}}}', r"line 1 is not valid JSON \(a number of more than 4,300"),
        (f'[{{"a": 1}},\n{{"a": {"1" * 5000}}}]', r"line 2 is not valid JSON \(a number of more than 4,300 digits"),
        ("{}", r"line 1: has no fields"),
        (
            '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "prompt": "c", "completion": "b"}',
            r"rows\.jsonl line 2: the key 'prompt' is given twice in one object: give it once",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "content": "c"}]}',
            r"line 1: the key 'content' is given twice",
        ),
        (
            '[{"prompt": "]", "completion": "{"},\n {"prompt": "a", "completion": "b", "completion": "c"}]',
            r"rows\.jsonl row 2: the key 'completion' is given twice",
        ),
    ],
)
def test_broken_files_say_where(tmp_path: Path, text: str, message: str):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        load_examples(str(path))


@pytest.mark.parametrize("source", ["no.jsonl", "./no", "/no/where", "gsm9k", "a/b/c"])
def test_a_source_that_is_not_there_names_the_tasks(source: str):
    with pytest.raises(DataError, match=r"There is no data .* nano-math, nano-sql"):
        load_examples(source)


def test_binary_files_are_refused(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8b\x08 cut")
    for name in ("a.jsonl", "a.jsonl.gz"):
        with pytest.raises(DataError, match="cannot be read"):
            load_examples(str(tmp_path / name))


def test_tasks_and_their_files(tmp_path: Path):
    file = write_lines(tmp_path / "train.jsonl", {"question": "?", "answer": "#### 1"})
    assert load_examples(f"gsm8k:{file}") == load_examples(f"gsm8k:{tmp_path}") == load_examples(file)
    task = task_of(f"gsm8k:{file}")
    assert task is not None and task.name == "gsm8k" and task_of(file) is None
    # What is one file has no second split to test on.
    assert test_source(f"gsm8k:{tmp_path}") == f"gsm8k:{tmp_path}" and test_source("nano-sql") == "nano-sql"
    assert test_source(f"codealpaca:{tmp_path}") is None  # no test split
    assert test_source("mbpp") == "mbpp"
    assert test_source(f"gsm8k:{file}") is None and test_source(file) is None and test_source(file, "x") == "x"
    for name in ("hexphi", "hexphi-lori", "humaneval"):  # all that there is of these is a test split
        assert test_source(f"{name}:{file}") == f"{name}:{file}"


def test_limits_are_seeded_and_keep_the_order(tmp_path: Path):
    path = write_lines(tmp_path / "a.jsonl", *({"prompt": f"{i:03}", "completion": ""} for i in range(100)))
    some = [e.prompt for e in load_examples(path, limit=10, seed=1)]
    assert some == sorted(some) and len(set(some)) == 10
    assert some == [e.prompt for e in load_examples(path, limit=10, seed=1)]
    assert some != [e.prompt for e in load_examples(path, limit=10, seed=2)]
    assert len(load_examples(path, limit=1000)) == 100 and len(load_examples("nano-math", limit=7)) == 7
    with pytest.raises(DataError, match="limit of 0"):
        load_examples(path, limit=0)


def test_data_hash_sees_every_field_and_the_order():
    a, b = Example("a", "b"), Example("ab", "")
    assert data_hash([a]) == data_hash([Example("a", "b", meta={"x": 1})]) != data_hash([b])
    assert data_hash([a, b]) != data_hash([b, a]) and len(data_hash([])) == 64


def test_chat_templates_give_the_special_tokens(tmp_path: Path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    messages = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]
    (example,) = load_examples(write_lines(tmp_path / "a.jsonl", {"messages": messages}), tokenizer=tokenizer)
    assert (example.prompt, example.completion) == ("<bos>user\nU<eos>\n<bos>assistant\n", "A<eos>")
    row = tokenize([example], tokenizer, 64)[0]
    # The text is the template's to the last character. Its own end is the end: no second one, and no loss after it.
    assert tokenizer.decode(row["input_ids"]) == example.text == example.prompt + example.completion + "\n"
    assert row["completion_mask"] == [0] * len(encode_prompt(example, tokenizer)) + [1, 1, 0]
    # Without offsets too: a tokenizer in Python does not tell which characters a token is of.
    slow = ByT5Tokenizer()
    slow.chat_template = CHAT.replace("<eos>", "</s>")
    (example,) = load_examples(str(tmp_path / "a.jsonl"), tokenizer=slow)
    row = tokenize([example], slow, 64)[0]
    kept = [i for i, mask in zip(row["input_ids"], row["completion_mask"], strict=True) if mask]
    assert slow.decode(kept) == "A</s>" == example.completion
    assert row["input_ids"] == slow(example.text, add_special_tokens=False)["input_ids"]


def test_whole_pairs_of_surrogates_are_characters(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"prompt": "\ud83d\ude00 \\ud83d", "completion": "b"}')
    (example,) = load_examples(str(path))
    assert example.prompt == "😀 \\ud83d"
    with pytest.raises(DataError, match="example 2: the tokenizer refuses its text"):
        tokenize([example, Example("\ud83d", "b")], byte_tokenizer(), 64)


def test_a_token_past_the_embedding_is_told_with_its_line(tmp_path: Path):
    tokenizer = byte_tokenizer(extra_special_tokens=["<more>"])
    path = write_lines(
        tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": "a<more>", "completion": ""}
    )
    examples = load_examples(path)
    assert len(tokenize(examples, tokenizer, 9, vocab_size=260)) == 2
    with pytest.raises(DataError, match=r"a.jsonl line 2: '<more>' is token 259, and .* has 259 rows"):
        tokenize(examples, tokenizer, 9, vocab_size=259)
    tokenizer.pad_token = "<more>"
    with pytest.raises(DataError, match="The padding token '<more>' is token 259"):
        tokenize(examples[:1], tokenizer, 9, vocab_size=259)


def test_a_null_field_is_none_as_in_a_table(tmp_path: Path):
    """pandas writes one where a row has no such field."""
    talk = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]
    rows = [
        {"messages": talk, "prompt": None, "completion": None},
        {"messages": None, "prompt": "p", "completion": "c"},
    ]
    lines, listed = write_lines(tmp_path / "a.jsonl", *rows), tmp_path / "b.json"
    listed.write_text(json.dumps(rows))
    for file in (lines, str(listed)):
        first, second = load_examples(file, tokenizer=byte_tokenizer())
        assert (first.format, second.format) == ("messages, as plain text", "prompt + completion, as they are")
        assert (second.prompt, second.completion) == ("p", "c")


def test_what_is_lost_without_a_template_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    talk = [{"role": "user", "content": "U", "name": "Ada"}, {"role": "assistant", "content": "A", "reasoning": "R"}]
    file = write_lines(tmp_path / "rows.jsonl", {"messages": talk}, {"messages": talk})
    (tmp_path / "rows.chat.json").write_text(json.dumps({"tools": [{"name": "search"}]}))
    load_examples(file, tokenizer=byte_tokenizer())
    told = "without a chat template 'tools' of all rows, messages' 'name', messages' 'reasoning' are left out"
    assert caplog.text.count(told) == 1 and "no tokenizer" not in caplog.text
    caplog.clear()
    load_examples(file)
    assert caplog.text.count("no tokenizer is given, so conversations are written as plain text") == 1
    caplog.clear()
    load_examples(str(tmp_path), tokenizer=byte_tokenizer())
    assert "rows.chat.json is not read: it is for the rows of the file beside it" in caplog.text


def test_tools_of_a_row_that_the_template_writes_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for t in tools or [] %}{{ t.name }};{% endfor %}" + CHAT
    file = write_lines(tmp_path / "rows.jsonl", {"prompt": "p", "completion": "c", "tools": [{"name": "search"}]})
    (example,) = load_examples(file, tokenizer=tokenizer, apply_chat_template=True)
    assert example.prompt.startswith("search;") and "nothing reads" not in caplog.text
    load_examples(file, tokenizer=tokenizer)
    assert "nothing reads tools" in caplog.text


def test_what_arrow_fills_in_is_left_out():
    row = {"tools": None, "messages": [{"content": None, "role": "a", "more": [{"a": 1, "b": None}]}], "n": [None, 2]}
    assert without_filling(row) == {
        "messages": [{"role": "a", "more": [{"a": 1}]}], "n": [None, 2]
    }  # fmt: skip


def test_tokenize_marks_the_response_and_its_end():
    tokenizer = byte_tokenizer()
    dataset = tokenize([Example("ab", " é")], tokenizer, 64)
    assert tokenizer.decode(dataset[0]["input_ids"]) == "ab é<eos>"
    assert dataset[0]["completion_mask"] == [0, 0, 1, 1, 1, 1] and dataset[0]["cut"] is False


def test_tokenize_tells_rows_that_the_model_was_not_made_for(caplog: pytest.LogCaptureFixture):
    rows = [Example("abc", "d"), Example("abcdefgh", "i")]
    with caplog.at_level(logging.WARNING):
        tokenize(rows, byte_tokenizer(), 64, window=10)
        tokenize(rows, byte_tokenizer(), 8, window=8)
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "1 of 2 examples have a prompt of 8 tokens, which the model reads at most, or more and were left out"
    ]
    with caplog.at_level(logging.WARNING):
        tokenize(rows, byte_tokenizer(), 64, window=8)
    assert "the longest row has 10 tokens, and the model was made for 8: give --max-length 8" in caplog.text
    with pytest.raises(DataError, match="Every prompt has 2 tokens or more, and the model reads no more"):
        tokenize(rows, byte_tokenizer(), 2, window=2)


def test_long_rows_are_tokenized_few_at_a_time(monkeypatch: pytest.MonkeyPatch):
    """By their characters: 250 rows of 128,000 tokens would take 8 GB."""
    monkeypatch.setattr(tokens, "_CHARACTERS", 10)
    rows = [Example("a", "", text="x" * n, spans=((0, n),)) for n in (4, 6, 1, 30, 2, 2, 2, 2, 2, 2)]
    groups = list(tokens._groups(rows))
    assert [(start, len(some)) for start, some in groups] == [(0, 2), (2, 1), (3, 1), (4, 5), (9, 1)]
    dataset = tokenize(rows, byte_tokenizer(), 64)
    assert dataset["index"][:] == list(range(10)) and dataset["length"][:] == [4, 6, 1, 30, 2, 2, 2, 2, 2, 2]


def test_tokenize_cuts_and_says_so(caplog: pytest.LogCaptureFixture):
    examples = [Example("abc", "d"), Example("abc", "de"), Example("abcde", "f")]
    with caplog.at_level(logging.WARNING):
        dataset = tokenize(examples, byte_tokenizer(), 5)
    assert dataset["cut"][:] == [False, True] and [len(ids) for ids in dataset["input_ids"]] == [5, 5]
    assert dataset[1]["completion_mask"] == [0, 0, 0, 1, 1]
    assert "1 of 3 examples are longer than 5 tokens and were cut" in caplog.text
    assert "1 of 3 examples have a prompt of 5 tokens or more and were left out" in caplog.text
    with pytest.raises(DataError, match=r"Every prompt has 3 tokens \(max_length\) or more"):
        tokenize(examples, byte_tokenizer(), 3)
    with pytest.raises(DataError, match="no examples"):
        tokenize([], byte_tokenizer(), 3)
    with pytest.raises(DataError, match="no end-of-text token"):
        tokenize(examples, byte_tokenizer(eos_token=None), 9)  # type: ignore[arg-type]


def test_training_shows_the_prompt_that_evaluation_gives():
    """Even where the prompt's last token would join the response's first."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {"<eos>": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "bc": 5}
    joined = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("b", "c")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=joined, eos_token="<eos>")
    assert tokenizer("ab")["input_ids"] == [4]
    for prompt, completion, ids in (("a", "b", [1, 2]), ("a", "c", [1, 3]), ("c", "ab", [3, 4])):
        example = Example(prompt, completion)
        start = encode_prompt(example, tokenizer)
        assert start + encode_completion(example, completion, start, tokenizer) == ids
        assert tokenize([example], tokenizer, 9)[0]["input_ids"] == [*ids, 0]


def metaspace_tokenizer(kind: str, closes: bool = False):
    """As Llama's and Mixtral's: a text, or one behind a special token, begins with a blank of its own."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = ["<unk>", "<s>", "</s>", *sorted("abcdefghijklmnopqrstuvwxyz()▁:0123456789.=\n")]
    merges = [("(", ")"), ("m", "b"), ("▁", "a"), ("1", "2"), (":", "\n"), ("▁", "x")]
    vocab = {token: i for i, token in enumerate([*tokens, *("".join(pair) for pair in merges)])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    if kind == "prepend":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=kind, split=False)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    if closes:
        pair = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
        inner.post_processor = pair
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["prepend", "first", "always"])
def test_no_blank_comes_between_a_prompt_and_its_completion(kind: str):
    for closes in (False, True):
        tokenizer = metaspace_tokenizer(kind, closes)
        for prompt, completion in (
            ("f(", ")"), ("num", "ber"), ("x 1", "2"), ("a ", "x"), ("a:", "\n b"), ("a(", ") b"),
            ("=", "1"), ("=", " 1"),
        ):  # fmt: skip
            row = tokenize([Example(prompt, completion)], tokenizer, 64)[0]
            start = encode_prompt(Example(prompt, completion), tokenizer)
            assert row["input_ids"][: len(start)] == start and row["completion_mask"][: len(start)] == [0] * len(start)
            written = tokenizer.decode(row["input_ids"], clean_up_tokenization_spaces=False)
            assert written.removeprefix("<s>").lstrip() == f"{prompt}{completion}</s>"


def test_only_the_end_that_a_tokenizer_adds_is_taken_from_a_prompt():
    tokenizer = byte_tokenizer()
    row = tokenize([Example("hi<eos>", "a")], tokenizer, 64)[0]
    assert tokenizer.decode(row["input_ids"]) == "hi<eos>a<eos>" and row["completion_mask"] == [0, 0, 0, 1, 1]
    closes = metaspace_tokenizer("first", closes=True)
    for prompt in ("hi", "hi</s>", "hi</s></s>"):
        ids = encode_prompt(Example(prompt, "a"), closes)
        assert ids == [1, *closes(prompt, add_special_tokens=False)["input_ids"]]
        (row,) = tokenize([Example(prompt, "a")], closes, 64)
        assert row["completion_mask"] == [0] * len(ids) + [1, 1] and row["input_ids"][: len(ids)] == ids


def test_batches_of_long_rows_have_fewer():
    tokenizer = byte_tokenizer()
    rows = tokenize([Example("p" * n, "c") for n in (20_000, 6_000, 9_000, 5_000, 30, 20)], tokenizer, 32_768)
    shapes = [tuple(batch["input_ids"].shape) for batch in batches(rows, tokenizer, 3)]
    assert [number for number, _ in shapes] == [1, 1, 2, 2] and [max(1, 2**14 // width) for _, width in shapes[:3]] == [
        1,
        1,
        2,
    ]


def test_batches_hold_every_example_once():
    tokenizer = byte_tokenizer()
    dataset = tokenize([Example("p" * (1 + i % 5), "c" * (1 + i % 3)) for i in range(11)], tokenizer, 64)
    seen, widths = [], []
    for batch in batches(dataset, tokenizer, 4):
        assert {t.dtype for t in batch.values()} == {torch.int64} and len({t.shape for t in batch.values()}) == 1
        widths.append(batch["input_ids"].shape[1])
        for ids, mask, labels in zip(*(batch[k] for k in ("input_ids", "attention_mask", "labels")), strict=True):
            n = int(mask.sum())
            assert mask[:n].all() and (ids[n:] == tokenizer.pad_token_id).all() and (labels[n:] == IGNORE).all()
            responses = labels != IGNORE
            assert (labels[responses] == ids[responses]).all()
            seen.append((ids[:n].tolist(), responses[:n].long().tolist()))
    expected = [(row["input_ids"], row["completion_mask"]) for row in dataset]
    assert sorted(seen) == sorted(expected) and widths == sorted(widths, reverse=True) and len(widths) == 3
    with pytest.raises(DataError, match="batch size of 0"):
        list(batches(dataset, tokenizer, 0))


@pytest.mark.skipif(not REAL.is_file(), reason=f"GSM8K: {ABSENT}")
def test_the_published_train_file_needs_no_task():
    examples = load_examples(str(REAL), limit=20)
    assert len(examples) == 20 and examples == load_examples(f"gsm8k:{REAL}", limit=20)
    assert tokenize(examples, byte_tokenizer(), 4096)["cut"][:] == [False] * 20


def test_rows_in_memory_and_paths_are_what_a_file_of_them_is(tmp_path: Path):
    rows = [{"prompt": f"{i} and", "completion": f" {i}"} for i in range(6)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = list(load_examples(str(file), limit=4, seed=1))
    assert len(expected) == 4
    for source in (rows, iter(rows), file, Dataset.from_list(rows)):
        assert list(load_examples(source, limit=4, seed=1)) == expected
    with pytest.raises(DataError, match="row 1 of the data is a int"):
        load_examples([1])
