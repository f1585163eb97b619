import pytest

from hotlora.base.errors import DataError
from hotlora.tasks import TASKS, get_task, gsm8k, hellaswag, spider

NANO = ("nano-math", "nano-sql", "nano-choice")
REAL = {"nano-math": gsm8k, "nano-sql": spider, "nano-choice": hellaswag}


@pytest.mark.parametrize("name", NANO)
def test_nano_goes_through_the_published_tasks_code(name: str):
    task, real = get_task(name), REAL[name].TASK
    assert (task.kind, task.metric, task.score, task.stop) == (real.kind, real.metric, real.score, real.stop)
    train, test = task.load("train", None, None, 0), task.load("test", None, None, 0)
    assert (len(train), len(test)) == (2000, 200)
    assert not {e.prompt for e in train} & {e.prompt for e in test}
    assert task.load("test", None, 5, 1) == task.load("test", None, 5, 1) != task.load("test", None, 5, 2)


@pytest.mark.parametrize("name", ["nano-math", "nano-sql"])
def test_the_gold_answers_are_right_and_others_are_not(name: str):
    task = get_task(name)
    assert task.score is not None
    examples = task.load("test", None, 30, 0)
    assert all(task.score(example, example.completion) for example in examples)
    assert not any(task.score(example, "SELECT 'no'\n#### 123456") for example in examples)
    # A text stops at the first of these, so no gold answer may hold one.
    assert not any(stop in example.completion for example in examples for stop in task.stop)


def test_names():
    benchmarks = {"gsm8k", "spider", "hellaswag", "arc_challenge", "piqa", "boolq", "mmlu"}
    refusals, unscored = (
        {"hexphi", "advbench", "malicious_instructions"},
        {"codealpaca", "saferpaca", "mbpp", "wikitext2"},
    )
    by_lori = {f"{name}-lori" for name in ("gsm8k", "humaneval", "codealpaca", "saferpaca", "hexphi")}
    assert set(TASKS) == {*NANO, *benchmarks, *refusals, *unscored, "humaneval", *by_lori}
    assert all(task.name == name for name, task in TASKS.items())
    with pytest.raises(DataError, match="no task 'gsm9k'; the tasks are nano-math, nano-sql"):
        get_task("gsm9k")
    with pytest.raises(DataError, match="no split 'dev'"):
        get_task("nano-choice").load("dev", None, None, 0)
