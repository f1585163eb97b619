import pytest
from published import ABSENT, DATA

from hotlora.base.errors import DataError
from hotlora.tasks import hellaswag
from hotlora.tasks.hellaswag import TASK, clean
from hotlora.tasks.rows import Row

REAL = DATA / "hellaswag"
ROW = {
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is [sic] sitting on a roof.",
    "ctx_b": "he",
    "endings": ["skis [title] Now", "rips tiles.", "holds a cube.", "[step] starts."],
    "label": "3",
}


def test_context_and_endings_as_lm_eval_makes_them():
    example = hellaswag.example(Row("here", ROW))
    assert example.prompt == "Roof shingle removal: A man is sitting on a roof. He"
    # A space stays where bracketed text stood first, as in lm-eval.
    assert example.choices == ("skis. Now", "rips tiles.", "holds a cube.", " starts.") and example.label == 3
    assert example.completion == "  starts."


def test_clean_matches_the_published_preprocessing():
    assert clean(" How to [header] bake [title] Mix  it. [substeps] Then") == "How to bake. Mix it. Then"


def test_rows_with_a_query():
    row = {"query": "Canoeing: Two women. One", "endings": ["a", "b"], "label": 1}
    assert hellaswag.example(Row("here", row)).prompt == "Canoeing: Two women. One"


@pytest.mark.parametrize("label", ["4", "", "-1", None])
def test_a_label_that_is_no_ending(label: str | None):
    with pytest.raises(DataError, match=r"here: label .* is none of the 4 endings"):
        hellaswag.example(Row("here", {**ROW, "label": label}))


@pytest.mark.skipif(not REAL.is_dir(), reason=f"HellaSwag: {ABSENT}")
@pytest.mark.parametrize(("split", "n"), [("train", 39905), ("test", 10042)])
def test_published_rows(split: str, n: int):
    examples = TASK.load(split, str(REAL), None, 0)
    assert len(examples) == n
    assert all(len(e.choices) == 4 and e.label in range(4) and "[" not in e.prompt for e in examples[:500])
