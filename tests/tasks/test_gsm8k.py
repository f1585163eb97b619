import json
from pathlib import Path

import pytest
from published import ABSENT, DATA

from hotlora.base.errors import DataError
from hotlora.evaluation.generate import cut
from hotlora.tasks import gsm8k
from hotlora.tasks.data import load_examples
from hotlora.tasks.gsm8k import LORI, TASK, final_answer, lori_number, lori_score, score
from hotlora.tasks.rows import Row

REAL = DATA / "gsm8k"
ROW = {
    "question": "Natalia sold 48 clips, then half as many. How many?",
    "answer": "48/2 = <<48/2=24>>24\n#### 1,072",
}


def test_example_keeps_the_published_answer():
    example = gsm8k.example(Row("here", ROW))
    assert example.prompt == "Question: Natalia sold 48 clips, then half as many. How many?\nAnswer:"
    assert example.completion == " " + ROW["answer"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so\n#### 72", "72"),
        ("#### 1,234.", "1234"),
        ("#### -3.50", "-3.50"),
        ("#### 5 or #### 6", "5"),  # the first counts
        ("the answer is 72", None),
        ("####72", None),
        ("#### $72", None),  # as the published expression reads it
        ("#### ...", None),
    ],
)
def test_final_answer(text: str, answer: str | None):
    assert final_answer(text) == answer


def test_score_compares_strings_without_commas():
    example = gsm8k.example(Row("here", ROW))
    assert score(example, "#### 1072") and score(example, " anything\n#### 1,072.")
    assert not score(example, "#### 1072.0") and not score(example, "1072")


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" 48/2 = <<48/2=24>>24\n#### 1072", True),
        ("#### 1,072", True),
        ("#### 1072.", True),
        ("#### 1072..", True),  # lm-eval removes one dot only
        ("#### 1,0,7,2,", True),
        ("#### 1072 dollars", True),
        ("#### 1072/2", True),  # the expression ends at the slash
        ("#### 1072\n\nQuestion: another\nAnswer: #### 5", True),  # the first counts
        ("#### 1073\n#### 1072", False),
        ("#### -1072", False),
        ("#### 1072.00", False),  # compared as text
        ("#### $1,072", False),  # no number after the mark, by the published expression
        ("####1072", False),
        ("####  1072", False),
        ("#### \n1072", False),
        ("####\u00a01072", False),
        ("The answer is 1072.", False),  # lm-eval's flexible match would take it
        ("#### .", False),
        ("", False),
    ],
)
def test_score_is_lm_evals_strict_match(text: str, right: bool):
    assert score(gsm8k.example(Row("here", ROW)), text) is right


def test_lm_evals_stops_and_length_end_an_answer():
    """Its gsm8k.yaml, version 3: `until`, and the 256 tokens that hold where a task names no number."""
    assert TASK.stop == ("Question:", "</s>", "<|im_end|>") and TASK.max_new_tokens == 256
    assert LORI.stop == () and LORI.max_new_tokens == 512
    example = gsm8k.example(Row("here", {**ROW, "answer": "First, half.\n\nThen 48 more.\n#### 72"}))
    assert cut(f"{example.completion} Question: next\n#### 5", TASK.stop).endswith("#### 72 ")
    assert score(example, cut(example.completion, TASK.stop))


def test_a_row_without_its_answer_says_where(tmp_path: Path):
    (tmp_path / "train.jsonl").write_text(json.dumps(ROW) + "\n\n" + json.dumps({"question": "?"}) + "\n")
    with pytest.raises(DataError, match=r"train\.jsonl line 3 has no field 'answer'; it has question"):
        TASK.load("train", str(tmp_path), None, 0)


def test_sources_that_are_not_there(tmp_path: Path):
    with pytest.raises(DataError, match=r"holds none of test\.jsonl"):
        TASK.load("test", str(tmp_path), None, 0)
    with pytest.raises(DataError, match="does not exist"):
        TASK.load("test", str(tmp_path / "no.jsonl"), None, 0)
    with pytest.raises(DataError, match="no split 'dev'"):
        TASK.load("dev", str(tmp_path), None, 0)


def test_loris_prompt_and_target():
    example = gsm8k.lori_example(Row("here", ROW))
    assert example.prompt == (
        "Natalia sold 48 clips, then half as many. How many?\nAnswer the above question. First think step by step and "
        "then answer the final number.\n"
    )
    assert example.completion == "48/2 = <<48/2=24>>24\nThe final answer is:  1,072"
    assert (LORI.name, LORI.metric, LORI.max_new_tokens, LORI.stop) == ("gsm8k-lori", "exact_match", 512, ())


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("24 + 48\nThe final answer is:  72", 72.0),
        ("The final answer is: 1,072.50 dollars, not 3", 1072.5),
        ("The final answer is: $-18.", -18.0),
        ("The final answer is: 5 or 6. The final answer is: 7", 5.0),  # the first after the words
        ("2 The final answer is: none. The final answer is: 7", 7.0),  # none up to the next such words: the last of all
        ("12 and 13\n#### 14", 14.0),  # without the words: the last
        ("14. The final answer is: nothing", 14.0),
        ("The final answer is:72", 72.0),  # no space, so not the words: the last
        ("the final answer is: 3, then 4", 4.0),
        ("nothing", None),
        ("", None),
    ],
)
def test_loris_number(text: str, number: float | None):
    assert lori_number(text) == number


def test_lori_compares_floats_of_prompt_and_answer():
    example = gsm8k.lori_example(Row("here", ROW))
    assert lori_score(example, "The final answer is: 1072.0") and lori_score(example, "so it is 1,072.")
    assert not lori_score(example, "The final answer is: 1073") and not lori_score(
        example, "The final answer is: -1072"
    )
    # An answer without a number: the last of the question, as LoRI reads the two as one text.
    assert not lori_score(example, "")
    assert lori_score(gsm8k.lori_example(Row("here", {**ROW, "answer": "#### 48"})), "I do not know.")
    assert not lori_score(gsm8k.lori_example(Row("here", {"question": "How many?", "answer": "#### none"})), "none")


def test_loris_task_reads_the_same_files(tmp_path: Path):
    (tmp_path / "test.jsonl").write_text(json.dumps(ROW) + "\n")
    (example,) = load_examples(f"gsm8k-lori:{tmp_path}", "test")
    assert example == gsm8k.lori_example(Row("here", ROW))
    with pytest.raises(DataError, match="gsm8k-lori has no split 'dev'"):
        load_examples(f"gsm8k-lori:{tmp_path}", "dev")
    with pytest.raises(DataError, match=r"gsm8k-lori: .* does not exist"):
        load_examples(f"gsm8k-lori:{tmp_path}/no.jsonl", "test")


@pytest.mark.skipif(not REAL.is_dir(), reason=f"GSM8K: {ABSENT}")
@pytest.mark.parametrize(("split", "n"), [("train", 7473), ("test", 1319)])
def test_every_published_answer_is_right(split: str, n: int):
    for task in (TASK, LORI):
        examples = task.load(split, str(REAL), None, 0)
        assert task.score is not None and len(examples) == n
        assert all(task.score(example, cut(example.completion, task.stop)) for example in examples)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"GSM8K: {ABSENT}")
def test_questions_whose_last_number_is_the_answer():
    """What LoRI's reading gives to a model that writes nothing; the number in `lori_score`."""
    assert sum(lori_score(example, "") for example in LORI.load("test", str(REAL), None, 0)) == 30
