"""ARC-Challenge, PIQA, BoolQ and MMLU: every published row form, lm-eval's prompts, and what breaks."""

import json
from pathlib import Path

import pytest
from published import ABSENT, DATA

from hotlora.base.errors import DataError
from hotlora.tasks import arc_challenge, boolq, get_task, mmlu, piqa
from hotlora.tasks.data import load_examples
from hotlora.tasks.rows import Row

ARC = {
    "id": "Mercury_7175875",
    "question": {
        "stem": "What follows?",
        "choices": [{"text": "Longer years.", "label": "1"}, {"text": "Shorter days.", "label": "2"}],
    },
    "answerKey": "2",
}
BOOLQ = {"question": "is it so", "title": "Fuel", "answer": False, "passage": "All of it."}
MMLU = {"question": " Find c. ", "subject": "abstract_algebra", "choices": ["0", "1", "2", "3"], "answer": 1}


def test_arc_challenge_in_three_forms():
    hub = {
        **ARC,
        "question": "What follows?",
        "choices": {"text": ["Longer years.", "Shorter days."], "label": ["1", "2"]},
    }
    olmo = {
        "query": "Question: What follows?\nAnswer:",
        "choices": ["Longer years.", "Shorter days."],
        "label": 1,
    }
    examples = [arc_challenge.example(Row("here", row)) for row in (ARC, hub, olmo)]
    assert examples[0] == examples[1] == examples[2]
    assert examples[0].prompt == "Question: What follows?\nAnswer:" and examples[0].completion == " Shorter days."
    assert examples[0].choices == ("Longer years.", "Shorter days.") and examples[0].label == 1


def test_boolq_in_three_forms():
    hub = {"question": "is it so", "passage": "Fuel -- All of it.", "label": 0, "idx": 7}
    olmo = {
        "query": "Fuel -- All of it.\nQuestion: is it so?\nAnswer:",
        "choices": ["yes", "no"],
        "label": 1,
    }
    examples = [boolq.example(Row("here", row)) for row in (BOOLQ, hub, olmo)]
    assert examples[0] == examples[1] == examples[2]
    assert examples[0].prompt == "Fuel -- All of it.\nQuestion: is it so?\nAnswer:"
    assert examples[0].choices == ("no", "yes") and examples[0].label == 0 and examples[0].completion == " no"
    assert boolq.example(Row("here", {**BOOLQ, "answer": True})).completion == " yes"


def test_mmlu_names_the_subject_and_answers_with_letters():
    example = mmlu.example(Row("here", MMLU))
    assert example.prompt == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "Find c.\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer:"
    )
    assert example.choices == ("A", "B", "C", "D") and example.completion == " B"
    without = {key: value for key, value in MMLU.items() if key != "subject"}
    assert mmlu.example(Row("here", without)).prompt.startswith("Find c.\n")


def test_piqa_reads_the_labels_beside(tmp_path: Path):
    rows = [{"goal": f"goal {i}", "sol1": "one", "sol2": "two"} for i in range(3)]
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"{name}-labels.lst").write_text("0\n1\n1\n" if name == "train" else "1\n0\n0\n")
    train = load_examples(f"piqa:{tmp_path}")
    assert [e.label for e in train] == [0, 1, 1] and [e.label for e in load_examples(f"piqa:{tmp_path}", "test")] == [
        1,
        0,
        0,
    ]
    assert train == load_examples(f"piqa:{tmp_path / 'train.jsonl'}")
    assert train[1].prompt == "Question: goal 1\nAnswer:" and train[1].choices == ("one", "two")
    (tmp_path / "train-labels.lst").write_text("0\n1\n")
    with pytest.raises(DataError, match=r"line 3 is the last of 3 rows, but there are 2 labels"):
        load_examples(f"piqa:{tmp_path}")
    (tmp_path / "train-labels.lst").write_text("0\n1\n2\n")
    with pytest.raises(DataError, match=r"line 3: label '2' is none of the 2 solutions"):
        load_examples(f"piqa:{tmp_path}")
    (tmp_path / "train-labels.lst").unlink()
    with pytest.raises(DataError, match="has no field 'label'"):
        load_examples(f"piqa:{tmp_path}")
    assert piqa.example(Row("here", {**rows[0], "label": 1})).completion == " two"


@pytest.mark.parametrize(
    ("task", "row", "says"),
    [
        (arc_challenge, {**ARC, "answerKey": "C"}, r"one of their labels \(1, 2\), this is 'C'"),
        (arc_challenge, {**ARC, "question": "What?"}, "has no field 'choices'"),
        (arc_challenge, {**ARC, "question": {"stem": 3}}, "labels .none., this is '2'"),
        (arc_challenge, {**ARC, "question": "What?", "choices": ["a"]}, "two lists of one length"),
        (arc_challenge, {"id": "x"}, "has no field 'question'"),
        (boolq, {**BOOLQ, "answer": "maybe"}, "label 'maybe' is none of the 2 answers"),
        (boolq, {"query": "?", "choices": ["so", "no"], "label": 0}, "answers are so, no, they must be yes and no"),
        (mmlu, {**MMLU, "answer": 4}, r"label 4 is none of the 4 choices \(0 to 3\)"),
        (mmlu, {**MMLU, "choices": ["0"]}, "must be a list of 4 texts"),
        (piqa, {"goal": "g", "sol1": 1, "sol2": "b", "label": 0}, "'sol1' must be text"),
    ],
)
def test_broken_rows_say_what_is_wrong(task, row, says):
    with pytest.raises(DataError, match=f"here.*{says}"):
        task.example(Row("here", row))


@pytest.mark.parametrize("name", ["arc_challenge", "piqa", "boolq", "mmlu"])
def test_kinds_metrics_and_splits(name):
    task = get_task(name)
    assert task.kind == "choice" and task.score is None and task.name == name
    assert task.metric == ("acc" if name in ("boolq", "mmlu") else "acc_norm")
    with pytest.raises(DataError, match=f"{name} has no split 'dev'; its splits are train, test"):
        task.load("dev", None, None, 0)


@pytest.mark.skipif(not (DATA / "arc_challenge").is_dir(), reason=f"ARC, PIQA, BoolQ, MMLU: {ABSENT}")
@pytest.mark.parametrize(
    ("name", "train", "test"),
    [
        ("arc_challenge", 1119, 1172),
        ("piqa", 16113, 1838),
        ("boolq", 9427, 3270),
        ("mmlu", 1531, 14042),
    ],
)
def test_published_rows(name: str, train: int, test: int):
    for split, n in (("train", train), ("test", test)):
        examples = get_task(name).load(split, str(DATA / name), None, 0)
        assert len(examples) == n
        assert all(e.prompt.endswith("\nAnswer:") and e.completion == f" {e.choices[e.label]}" for e in examples)
