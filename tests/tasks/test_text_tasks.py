"""CodeAlpaca, MBPP and WikiText-2: data without a scorer."""

import json
from pathlib import Path

import pytest
from published import ABSENT, DATA
from tiny_tokenizer import byte_tokenizer

from hotlora.base.errors import DataError
from hotlora.tasks import codealpaca, get_task, mbpp
from hotlora.tasks.data import load_examples
from hotlora.tasks.rows import Row
from hotlora.tasks.tokens import tokenize

MBPP = {
    "text": "Write a function.",
    "code": "def f(x):\r\n  return x\r",
    "task_id": 601,
    "test_list": ["assert f(1) == 1", "assert f(2) == 2"],
}
WIKI = " \n = Robert Boulter = \n \n Robert Boulter is an actor . \n = = Career = = \n \n In 2000 = good . \n"


def test_codealpaca_has_alpacas_two_prompts():
    row = {"instruction": "Sort it.", "input": "[2, 1]", "output": "[1, 2]"}
    example = codealpaca.example(Row("here", row))
    assert example.prompt.startswith("Below is an instruction that describes a task, paired with an input")
    assert example.prompt.endswith("### Instruction:\nSort it.\n\n### Input:\n[2, 1]\n\n### Response:")
    assert example.completion == "\n[1, 2]"
    example = codealpaca.example(Row("here", {**row, "input": ""}))
    assert example.prompt.endswith(
        "that appropriately completes the request.\n\n### Instruction:\nSort it.\n\n### Response:"
    )
    with pytest.raises(DataError, match="here has no field 'output'"):
        codealpaca.example(Row("here", {"instruction": "a", "input": ""}))


def test_loris_prompts_have_the_blanks_of_its_code():
    row = {"instruction": "Sort it.\nThen stop.", "input": "[2, 1]", "output": "[1, 2]"}
    example = codealpaca.lori_example(Row("here", row))
    pad = " " * 20
    assert example.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
        f"{pad}### Instruction:\n{pad}Sort it.\nThen stop.\n\n{pad}### Input:\n{pad}[2, 1]\n\n{pad}### Response:\n{pad}"
    )
    assert example.completion == "[1, 2]"
    assert codealpaca.lori_example(Row("here", {**row, "input": ""})).prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n\n"
        f"{pad}### Instruction:\n{pad}Sort it.\nThen stop.\n\n{pad}### Response:\n{pad}"
    )


def test_codealpaca_from_a_folder_and_its_one_split(tmp_path: Path):
    row = {"instruction": "a {b}", "input": "{c}", "output": "d"}
    (tmp_path / "code_alpaca_20k.json").write_text(json.dumps([row, row]))
    assert len(load_examples(f"codealpaca:{tmp_path}")) == 2
    assert load_examples(f"codealpaca-lori:{tmp_path}") == [codealpaca.lori_example(Row("here", row))] * 2
    with pytest.raises(DataError, match="codealpaca has no split 'test'; its splits are train"):
        load_examples(f"codealpaca:{tmp_path}", "test")


def test_mbpp_takes_the_papers_prompt_and_splits(tmp_path: Path):
    example = mbpp.example(Row("here", MBPP))
    assert example.prompt == (
        "You are an expert Python programmer, and here is your task: Write a function. Your code should pass these "
        "tests:\n\nassert f(1) == 1\nassert f(2) == 2\n[BEGIN]\n"
    )
    assert example.completion == "def f(x):\n  return x\n[DONE]"
    file = tmp_path / "mbpp.jsonl"
    file.write_text("".join(json.dumps({**MBPP, "task_id": i}) + "\n" for i in (1, 10, 11, 510, 511, 600, 601, 974)))
    assert len(load_examples(f"mbpp:{tmp_path}")) == 2 == len(load_examples(f"mbpp:{file}", "test"))
    file.write_text(json.dumps({**MBPP, "task_id": 5}) + "\n")
    with pytest.raises(DataError, match=r"no row is of the split 'train', whose task_id is 601 to 974"):
        load_examples(f"mbpp:{tmp_path}")
    with pytest.raises(DataError, match="'test_list' must be a list of texts"):
        mbpp.example(Row("here", {**MBPP, "test_list": "assert"}))


def test_wikitext_is_paragraphs_without_a_prompt(tmp_path: Path):
    (tmp_path / "wiki.train.tokens").write_text(WIKI)
    (tmp_path / "test.txt").write_text(WIKI)
    examples = load_examples(f"wikitext2:{tmp_path}")
    assert [(e.prompt, e.completion) for e in examples] == [
        ("", "Robert Boulter is an actor ."),
        ("", "In 2000 = good ."),
    ]
    assert examples == load_examples(f"wikitext2:{tmp_path}", "test") == load_examples(f"wikitext2:{tmp_path}/test.txt")
    tokenizer = byte_tokenizer()
    row = tokenize(examples, tokenizer, 64)[1]
    assert tokenizer.decode(row["input_ids"]) == "In 2000 = good .<eos>" and all(row["completion_mask"])
    (tmp_path / "test.txt").write_text(" \n = Only this = \n")
    with pytest.raises(DataError, match="holds no paragraph"):
        load_examples(f"wikitext2:{tmp_path}", "test")
    (tmp_path / "test.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="must be UTF-8"):
        load_examples(f"wikitext2:{tmp_path}", "test")
    with pytest.raises(DataError, match="cannot be read"):
        load_examples("wikitext2:no/such.txt")


@pytest.mark.parametrize("name", ["codealpaca", "codealpaca-lori", "saferpaca-lori", "mbpp", "wikitext2"])
def test_data_without_a_scorer_says_what_it_is_good_for(name: str):
    task = get_task(name)
    assert task.kind == "text" and task.score is None and task.name == name
    with pytest.raises(DataError, match=f"{name} has no scorer, .* to profile the router and to train on"):
        task.check_scored()
    get_task("piqa").check_scored()


@pytest.mark.skipif(not (DATA / "mbpp").is_dir(), reason=f"CodeAlpaca, MBPP, WikiText-2: {ABSENT}")
@pytest.mark.parametrize(
    ("name", "split", "n"),
    [
        ("codealpaca", "train", 20022),
        ("codealpaca-lori", "train", 20022),
        ("mbpp", "train", 374),
        ("mbpp", "test", 500),
        ("wikitext2", "train", 17556),
        ("wikitext2", "test", 2185),
    ],
)
def test_published_rows(name: str, split: str, n: int):
    examples = get_task(name).load(split, str(DATA / name.removesuffix("-lori")), None, 0)
    assert len(examples) == n and not any("\r" in e.completion for e in examples)
