import json
import shutil
import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch
from runs import run_evaluation
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tiny_files import save_tiny_model, write_sums
from tiny_tokenizer import byte_tokenizer

from hotlora.base.errors import DataError, HotLoraError
from hotlora.base.records import Record, write_record
from hotlora.evaluation.generate import Sampling, answer_batches
from hotlora.evaluation.score import evaluate_task, response_loss
from hotlora.hf.weights import model_hash
from hotlora.runs.evaluation import run_held_out
from hotlora.runs.options import EvalOptions
from hotlora.tasks import TASKS, Example, Task, get_task
from hotlora.tasks.data import data_hash, load_examples, scorer_hash
from hotlora.tasks.tokens import tokenize

TOKENIZER = byte_tokenizer()
EXAMPLES = [Example("q" * (1 + 3 * i % 7) + str(i), f" answer {i}") for i in range(7)]


def generate(model, tokenizer, examples: list[Example], **options) -> list[str]:
    answers = [answer for batch in answer_batches(model, tokenizer, examples, **options) for answer in batch]
    return [answer.text for answer in sorted(answers, key=lambda answer: answer.index)]


def choice_scores(model, examples: list[Example], task: str = "nano-choice", **options) -> list[list[float]]:
    return [r["scores"] for r in evaluate_task(model, TOKENIZER, get_task(task), examples, **options).results]


@pytest.fixture(scope="module")
def model():
    return tiny_model("olmoe", vocab_size=259, max_position_embeddings=256)


def greedy(model, prompt: str, n: int) -> str:
    """One token at a time, alone and without a cache."""
    ids = TOKENIZER(prompt)["input_ids"]
    start = len(ids)
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == TOKENIZER.eos_token_id:
            break
    return TOKENIZER.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batched_generation_is_greedy_generation(model, batch_size: int):
    texts = generate(model, TOKENIZER, EXAMPLES, max_new_tokens=12, batch_size=batch_size)
    assert texts == [greedy(model, example.prompt, 12) for example in EXAMPLES]


def test_stop_texts_end_a_row_and_are_left_out(model):
    (whole,) = generate(model, TOKENIZER, EXAMPLES[:1], max_new_tokens=24)
    stop = whole[5:8]
    (text,) = generate(model, TOKENIZER, EXAMPLES[:1], max_new_tokens=24, stop=(stop, "never this"))
    assert text == whole[: whole.index(stop)]
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    generate(model, TOKENIZER, EXAMPLES[:1], max_new_tokens=24, stop=(stop,))
    handle.remove()
    assert len(calls) <= 9, "it goes on after the stop text"


def test_end_of_text_ends_a_row(model):
    (whole,) = generate(model, TOKENIZER, EXAMPLES[:1], max_new_tokens=24)
    end = next(character for character in whole[1:] if "!" <= character <= "~")
    (text,) = generate(model, byte_tokenizer(eos_token=end), EXAMPLES[:1], max_new_tokens=24)
    assert text == whole[: whole.index(end)]


def likelihood(model, prompt: str, ending: str) -> float:
    start, ids = len(TOKENIZER(prompt)["input_ids"]), TOKENIZER(prompt + ending)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logits[t - 1, ids[t]]) for t in range(start, len(ids)))


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_choices_by_likelihood_a_character(model, batch_size: int):
    examples = [Example("p" * (2 + i), "", choices=("é", "two words", "x" * (1 + i)), label=i % 3) for i in range(5)]
    scores = choice_scores(model, examples, batch_size=batch_size)
    for example, row in zip(examples, scores, strict=True):
        expected = [likelihood(model, example.prompt, f" {c}") / len(c) for c in example.choices]
        assert row == pytest.approx(expected, rel=1e-5)
    task = get_task("nano-choice")
    evaluation = evaluate_task(model, TOKENIZER, task, examples, batch_size=batch_size)
    best = [max(range(3), key=row.__getitem__) for row in scores]
    assert [r["prediction"] for r in evaluation.results] == best
    assert evaluation.correct == sum(b == e.label for b, e in zip(best, examples, strict=True))
    assert (evaluation.metric, evaluation.n) == ("acc_norm", 5)


def test_acc_ranks_whole_choices(model):
    """boolq's and mmlu's metric: not divided by the length, so that the two metrics can differ."""
    examples = [Example("p" * (2 + i), "", choices=("no", "yes, " * (1 + i)), label=0) for i in range(5)]
    scores = choice_scores(model, examples, "boolq")
    for example, row in zip(examples, scores, strict=True):
        assert row == pytest.approx([likelihood(model, example.prompt, f" {c}") for c in example.choices], rel=1e-5)
    evaluation = evaluate_task(model, TOKENIZER, get_task("boolq"), examples)
    assert evaluation.metric == "acc" and [r["scores"] for r in evaluation.results] == scores
    assert [r["prediction"] for r in evaluation.results] == [max(range(2), key=row.__getitem__) for row in scores]


@pytest.mark.parametrize("batch_size", [1, 64])
def test_choices_past_the_models_window_are_cut_on_the_left(caplog: pytest.LogCaptureFixture, batch_size: int):
    """As lm-eval does: the last 16 tokens before the choice's last one are what a window of 16 reads."""
    small = tiny_model("olmoe", vocab_size=259, max_position_embeddings=16)
    examples = [Example("abcdefgh" * n, "", choices=("no", "yes, yes"), label=0) for n in (1, 2, 3, 4)]
    widths: list[int] = []
    hook = small.register_forward_pre_hook(
        lambda _module, _args, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    scores = choice_scores(small, examples, batch_size=batch_size)
    hook.remove()
    assert max(widths) == 16
    for example, row in zip(examples, scores, strict=True):
        for choice, value in zip(example.choices, row, strict=True):
            start = max(0, len(f"{example.prompt} {choice}") - 17)
            assert value == pytest.approx(likelihood(small, example.prompt[start:], f" {choice}") / len(choice))
    assert "3 of 4 examples are longer than the model's window of 16 tokens" in caplog.text
    caplog.clear()
    evaluation = evaluate_task(small, TOKENIZER, get_task("nano-choice"), examples, batch_size=batch_size)
    assert [r["scores"] for r in evaluation.results] == [pytest.approx(row) for row in scores]
    assert [r.get("cut") for r in evaluation.results] == [None, 8, 16, 24]  # 8, 16, 24, 32 + 9 bytes; 17 of them count
    assert evaluation.summary()["cut"] == 3 and caplog.text.count("3 of 4 examples") == 1
    with pytest.raises(DataError, match="Example 0: choice 1 has 17 tokens, and the model's window is 16"):
        choice_scores(small, [Example("p", "", choices=("a", "b" * 16), label=0)])


def test_choices_are_checked_before_any_is_scored(tmp_path: Path):
    small = tiny_model("olmoe", vocab_size=259, max_position_embeddings=16)
    calls: list[int] = []
    small.register_forward_pre_hook(lambda *_: calls.append(1))
    good, long = [Example("pp", "", choices=("a", choice), label=0) for choice in ("b", "b" * 16)]
    last = Example("p", "", choices=long.choices, label=0)  # of the shortest prompt, so in the last group
    with pytest.raises(DataError, match="Example 2: choice 1 has 17 tokens"):
        evaluate_task(small, TOKENIZER, get_task("nano-choice"), [good, good, last], batch_size=1)
    assert not calls


def test_a_prompt_past_the_models_window_is_told(caplog: pytest.LogCaptureFixture):
    small = tiny_model("olmoe", vocab_size=259, max_position_embeddings=16)
    generate(small, TOKENIZER, [Example("p" * 16, ""), Example("p" * 15, "")], max_new_tokens=1)
    assert not caplog.text
    generate(small, TOKENIZER, [Example("p" * 17, ""), Example("p" * 15, "")], max_new_tokens=1)
    assert "1 of 2 prompts are longer than the model's window of 16 tokens" in caplog.text


def test_data_without_a_scorer_is_not_evaluated_on(model):
    with pytest.raises(DataError, match="mbpp has no scorer, so it cannot be evaluated on: it is data to profile"):
        evaluate_task(model, TOKENIZER, get_task("mbpp"), EXAMPLES)


def test_an_empty_choice_is_an_error(model):
    with pytest.raises(DataError, match="Example 0: choice 1 or its prompt is empty"):
        choice_scores(model, [Example("p", "", choices=("a", ""), label=0)])
    examples = [Example("p" * (9 - i), "", choices=("a", "b" * (i != 2)), label=0) for i in range(4)]
    with pytest.raises(DataError, match="Example 2: choice 1"):
        evaluate_task(model, TOKENIZER, get_task("boolq"), examples, batch_size=1)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_response_loss_counts_each_response_token_once(model, batch_size: int):
    dataset = tokenize(EXAMPLES, TOKENIZER, 64)
    total = sum(likelihood(model, e.prompt, e.completion + "<eos>") for e in EXAMPLES)
    tokens = sum(sum(row["completion_mask"]) for row in dataset)
    loss = response_loss(model, TOKENIZER, dataset, batch_size=batch_size)
    assert loss == pytest.approx(-total / tokens, rel=1e-5)


def test_evaluation_keeps_every_result_and_restores_the_model(model, tmp_path: Path):
    task = Task("echo", "generate", "exact_match", lambda *_: [], lambda e, text: len(text) % 2 == 0, max_new_tokens=4)
    model.train()
    evaluation = evaluate_task(model, TOKENIZER, task, EXAMPLES, batch_size=2)
    assert model.training
    model.eval()
    assert evaluation.correct == sum(r["correct"] for r in evaluation.results)
    assert (
        evaluation.accuracy == evaluation.correct / 7 and evaluation.ci_low <= evaluation.accuracy <= evaluation.ci_high
    )
    evaluation.write_results(tmp_path / "new" / "results.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "new" / "results.jsonl").read_text().splitlines()]
    assert rows == evaluation.results and [row["index"] for row in rows] == list(range(7))
    assert {"id", "prediction", "correct"} <= rows[0].keys()
    told = {"metric", "accuracy", "n", "correct", "ci_low", "ci_high", "seconds"}
    assert set(evaluation.summary()) == told | ({"unfinished"} if evaluation.unfinished else set())


def test_the_scorers_hash_is_of_choices_tests_and_databases(tmp_path: Path):
    def of(task: str, *examples: Example) -> str | None:
        return scorer_hash(TASKS[task], examples)

    one = Example("p", " x", ("x", "y", "z"), 0)
    assert of("hellaswag", one) != of("hellaswag", Example("p", " x", ("x", "very", "different"), 0))
    assert of("hellaswag", one) == of("hellaswag", Example("p", " x", ("x", "y", "z"), 0))
    tested, passed = (Example("p", " x", meta={"test": test, "entry_point": "f"}) for test in ("assert f()", "pass"))
    assert of("humaneval", tested) != of("humaneval", passed) and data_hash([tested]) == data_hash([passed])
    assert of("saferpaca", Example("p", " x")) is None and scorer_hash(None, [one]) is None

    found = []
    for place, rows in (("a", ("1", "2")), ("b", ("1", "2")), ("a", ("3",))):  # the last one in the first one's place
        folder = tmp_path / place / "town"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with closing(sqlite3.connect(folder / "town.sqlite")) as database:
            database.execute("CREATE TABLE people (age INTEGER)")
            database.executemany("INSERT INTO people VALUES (?)", rows)
            database.commit()
        meta = {"query": "SELECT 1", "folder": str(folder), "databases": 1}
        found.append(of("spider", Example("p", " SELECT 1", meta=meta)))
    assert found[0] == found[1] != found[2], "of what the files hold, wherever they lie"
    sql = load_examples("nano-sql", "test", limit=3)
    assert scorer_hash(TASKS["nano-sql"], sql) == "3de01e05674321ab33377d65f1d7142bad267e22735f583fe49c0e0fefecdedb", (
        "on every machine"
    )


def test_a_test_file_that_was_replaced_in_place_is_another_evaluation(tmp_path: Path):
    save_tiny_model(tmp_path / "model")
    row = {"task_id": "a/0", "prompt": "def f():\n", "entry_point": "f", "canonical_solution": "    return 1\n"}
    file = tmp_path / "HumanEval.jsonl"

    def evaluated(test: str) -> Record:
        file.write_text(json.dumps(row | {"test": f"def check(f):\n    {test}\n"}) + "\n")
        scored = {"output": tmp_path / "out", "max_new_tokens": 2}
        return run_evaluation(str(tmp_path / "model"), f"humaneval:{file}", **scored)[0]

    first = evaluated("assert f() == 1")
    assert evaluated("assert f() == 1") == first
    with pytest.raises(HotLoraError, match=r"what judges the test data's answers .* is not what it was"):
        evaluated("pass")
    of_old = {name: value for name, value in first["config"].items() if name != "scorer_hash"}
    write_record(tmp_path / "out", first | {"config": of_old})
    assert evaluated("pass")["started"] == first["started"], "an older record does not hold it"


def test_a_seed_alone_draws_nothing(model, tmp_path: Path):
    choice = [Example("p", " x", ("x", "y"), 0)]
    first, again = (
        evaluate_task(model, TOKENIZER, get_task("nano-choice"), choice, sampling=Sampling(seed=seed))
        for seed in (0, 5)
    )
    assert first.results == again.results
    with pytest.raises(DataError, match="nothing is drawn"):
        evaluate_task(model, TOKENIZER, get_task("nano-choice"), choice, sampling=Sampling(temperature=1.0))
    save_tiny_model(tmp_path / "model")
    scored = {"output": tmp_path / "out", "limit": 2, "max_new_tokens": 2}
    record, _ = run_evaluation(str(tmp_path / "model"), "nano-math", **scored, sampling=Sampling(seed=5))
    assert "sampling" not in record["config"]
    of_old = record["config"] | {"sampling": {"samples": 1, "temperature": 0.0, "top_p": 1.0, "seed": 5}}
    write_record(tmp_path / "out", record | {"config": of_old})
    again, _ = run_evaluation(str(tmp_path / "model"), "nano-math", **scored, sampling=Sampling(seed=5))
    assert again["config"] == of_old, "done already"


def scored_again(model: Path, data: str, out: Path, **options) -> Record:
    return run_evaluation(str(model), data, out, limit=4, batch_size=2, **options)[0]


def double_weights(model: Path) -> None:
    file = model / "model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def test_other_weights_at_the_same_place_are_another_evaluation(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model, out = tmp_path / "model", tmp_path / "out"
    save_tiny_model(model)
    first = scored_again(model, "nano-math", out)
    assert scored_again(model, "nano-math", out) == first
    assert f"{out} is done already: nothing of it is run again" in caplog.text
    double_weights(model)
    with pytest.raises(HotLoraError, match=r"the model \(its weights, config or tokenizer; .*\) is not what it was"):
        scored_again(model, "nano-math", out)
    write_record(out, first | {"status": "running"})  # killed before its end: no answers of two models in one file
    with pytest.raises(HotLoraError, match=r"the model \(its weights"):
        scored_again(model, "nano-math", out)
    of_old = {name: value for name, value in first["config"].items() if name != "model_hash"}
    write_record(out, first | {"config": of_old})
    assert scored_again(model, "nano-math", out)["started"] == first["started"], "an older record does not hold it"
    held = partial(run_held_out, EvalOptions(model=str(model), limit=2), write_sums(tmp_path / "sums.jsonl"))
    assert held(tmp_path / "held") == held(tmp_path / "held")
    double_weights(model)
    with pytest.raises(HotLoraError, match=r"the model \(its weights"):
        held(tmp_path / "held")


def test_an_evaluation_goes_on_where_its_files_lie_elsewhere(tmp_path: Path):
    old, new = tmp_path / "old", tmp_path / "new"
    save_tiny_model(old / "model")
    sums = Path(write_sums(old / "sums.jsonl"))
    first = scored_again(old / "model", str(sums), old / "out")
    old.rename(new)
    assert scored_again(new / "model", str(new / "sums.jsonl"), new / "out") == first
    sums = new / "sums.jsonl"
    sums.write_text(sums.read_text().replace("make", "give"))
    with pytest.raises(HotLoraError, match=r"--data .*/new/sums.jsonl against .*/old/sums.jsonl"):
        scored_again(new / "model", str(sums), new / "out")


def test_a_models_hash_is_of_its_files_and_cheap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = tmp_path / "model"
    save_tiny_model(model)
    hashes = [model_hash(model)]
    for file in ("model.safetensors", "config.json", "tokenizer_config.json"):
        data = bytearray((model / file).read_bytes())
        data[-3] ^= 1
        (model / file).write_bytes(data)
        hashes.append(model_hash(model))
    (model / "README.md").write_text("of nothing")
    shutil.copytree(model, tmp_path / "copy")
    assert model_hash(tmp_path / "copy") == model_hash(model) == hashes[-1] and len(set(hashes)) == 4
    with open(model / "model-2.safetensors", "wb") as large:
        large.truncate(2**36)  # 64 GiB, of which no block is on the disk
        hashes.append(model_hash(model))
        large.seek(2**35 + 12345)
        large.write(b"\1" * 2**22)  # an expert
    assert model_hash(model) not in hashes

    def changed(file: Path, place: int) -> str | None:
        with open(file, "r+b") as stream:
            stream.seek(place)
            stream.write(b"\1")
        return model_hash(model)

    (model / "model-2.safetensors").unlink()
    (model / "small.safetensors").write_bytes(bytes(2**24))
    before = model_hash(model)
    assert changed(model / "small.safetensors", 2**23 + 7777) != before, "a file of 16 MB is read whole"
    header = {"large": {"data_offsets": [0, 2**27]}, "norm": {"data_offsets": [2**27, 2**27 + 8192]}}
    text = json.dumps(header).encode()
    with open(model / "large.safetensors", "wb") as large:
        large.write(len(text).to_bytes(8, "little") + text)
        large.truncate(8 + len(text) + 2**27 + 8192)
    before = model_hash(model)
    assert changed(model / "large.safetensors", 8 + len(text) + 2**27 + 5000) != before, "so is a small tensor"
    expert = 2**27 // 64  # 2 MiB: of 64 experts in one tensor each is looked at
    header = {"experts": {"data_offsets": [0, 2**27], "shape": [64, 1024, 1024]}}
    text = json.dumps(header).encode()
    with open(model / "large.safetensors", "wb") as large:
        large.write(len(text).to_bytes(8, "little") + text)
        large.truncate(8 + len(text) + 2**27)
    for number in (1, 62, 63):
        before = model_hash(model)
        assert changed(model / "large.safetensors", 8 + len(text) + number * expert + 100) != before, number

    cache = tmp_path / "models--a--b" / "snapshots" / "c0ffee" / "config.json"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(cache))
    assert model_hash("a/b") == "c0ffee"


def test_nothing_to_evaluate(model):
    with pytest.raises(DataError, match="no examples to evaluate"):
        evaluate_task(model, TOKENIZER, get_task("nano-math"), [])
    with pytest.raises(DataError, match="batch size of 0"):
        generate(model, TOKENIZER, EXAMPLES, max_new_tokens=1, batch_size=0)
