import json
from pathlib import Path

import pytest
from published import ABSENT, DATA

from hotlora.errors import DataError
from hotlora.tasks import gsm8k
from hotlora.tasks.gsm8k import TASK, final_answer, score
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


@pytest.mark.skipif(not REAL.is_dir(), reason=f"GSM8K: {ABSENT}")
@pytest.mark.parametrize(("split", "n"), [("train", 7473), ("test", 1319)])
def test_every_published_answer_is_right(split: str, n: int):
    examples = TASK.load(split, str(REAL), None, 0)
    assert len(examples) == n and all(score(example, example.completion) for example in examples)
