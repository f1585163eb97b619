"""People's own rows, scored: loss, perplexity, token accuracy and exact match, each with its interval."""

import json
import math
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest
import scipy.stats
import torch
from runs import run_evaluation, run_training
from tiny_tokenizer import byte_tokenizer
from typer.testing import CliRunner

import hotlora
from hotlora.base.errors import DataError, FileError, HotLoraError, ModelError
from hotlora.base.records import find_records, new_record, read_record, write_record
from hotlora.cli.main import app
from hotlora.evaluation.rouge import rouge_each, rouge_l
from hotlora.evaluation.score import RowLoss, response_scores
from hotlora.evaluation.stats import mean_interval, ratio_interval
from hotlora.report.sections import read_sections
from hotlora.report.tables import section_tables
from hotlora.tasks import Example
from hotlora.tasks.data import load_examples
from hotlora.tasks.own import own_task
from hotlora.tasks.tokens import tokenize


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("rows") / "my rows.jsonl"
    found = [{"prompt": f"say {'ab'[i % 2]}:", "completion": f" {'ab'[i % 2] * (1 + i % 3)}"} for i in range(24)]
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(file)


@pytest.fixture(scope="module")
def run(rows: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    run_training("nano", rows, folder, max_steps=30, batch_size=8, learning_rate=4e-3, r=8)
    return folder


def test_scores_equal_a_forward_by_hand(rows: str):
    model, tokenizer = hotlora.load("nano")
    data = tokenize(load_examples(rows), tokenizer, 512)
    each: list[RowLoss] = []
    found = response_scores(model, tokenizer, data, batch_size=5, rows=each)
    losses, right, counts = [], [], []
    for row in data:
        ids, mask = torch.tensor([row["input_ids"]]), torch.tensor(row["completion_mask"])[1:].bool()
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1][mask].double()
        labels = ids[0, 1:][mask]
        losses.append(float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum")))
        right.append(int((logits.argmax(-1) == labels).sum()))
        counts.append(len(labels))
    assert [(row.tokens, row.right) for row in each] == list(zip(counts, right, strict=True)), "each at its place"
    assert [row.loss for row in each] == pytest.approx(losses, rel=1e-4)
    assert found["tokens"] == sum(counts)
    assert found["loss"] == pytest.approx(sum(losses) / sum(counts), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / sum(counts)), rel=1e-4)
    assert found["token_accuracy"] == sum(right) / sum(counts)
    assert found["loss_ci"] == pytest.approx(ratio_interval(losses, counts), rel=1e-4)


def test_the_interval_of_a_ratio():
    """With equal counts it is the mean's; with others it is near the bootstrap's over examples."""
    values = [0.3, 1.2, 0.7, 2.0, 1.1]
    assert ratio_interval(values, [1] * 5) == pytest.approx(mean_interval(values))
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 40, 400)
    totals = counts * rng.normal(2.0, 0.5, 400) + rng.normal(0, 3, 400)
    low, high = ratio_interval(list(totals), list(counts))
    picked = rng.integers(0, 400, (4000, 400))
    drawn = totals[picked].sum(1) / counts[picked].sum(1)
    assert (low, high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), rel=0.01)
    assert all(math.isnan(end) for end in ratio_interval([1.0], [2]))
    assert all(math.isnan(end) for end in ratio_interval([1.0, 0.0], [2, 0])), "one example that counts"
    with pytest.raises(DataError, match="0 in sum"):
        ratio_interval([1.0, 2.0], [0, 0])


def test_own_rows_are_scored(rows: str, run: Path, tmp_path: Path):
    record, _ = run_evaluation("nano", rows, tmp_path / "out", adapter=run / "adapter")
    found = record["evaluation"]["my-rows"]
    assert found["metric"] == "exact_match" and found["n"] == 24 and 0 < found["accuracy"] <= 1
    assert record["evaluation"] == read_record(tmp_path / "out")["evaluation"]
    examples = load_examples(rows)
    results = [json.loads(line) for line in (tmp_path / "out" / "results-my-rows.jsonl").read_text().splitlines()]
    for result in results:
        right = result["prediction"].strip() == examples[result["index"]].completion.strip()
        assert result["correct"] is right
    assert found["loss_ci"][0] < found["loss"] < found["loss_ci"][1]
    assert run_evaluation("nano", rows, tmp_path / "out", adapter=run / "adapter") == (record, None)
    with pytest.raises(HotLoraError, match="--attn-implementation eager against none"):
        run_evaluation("nano", rows, tmp_path / "out", adapter=run / "adapter", attn_implementation="eager")
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="file is a file: give another folder"):
        run_evaluation("nano", rows, tmp_path / "file", adapter=run / "adapter")
    base, _ = run_evaluation("nano", rows)
    assert base["evaluation"]["my-rows"]["loss"] > found["loss"]


def scored(folder: Path) -> tuple[float, dict]:
    config = read_record(folder)["config"]
    return read_record(folder)["evaluation"]["my-rows"]["loss"], config


def test_the_rows_that_a_training_held_out_are_scored(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = str(tmp_path / "my rows.jsonl")
    Path(rows).write_text("".join(f'{{"prompt": "say {i}:", "completion": " {i}"}}\n' for i in range(24)))
    record = run_training("nano", rows, tmp_path / "run", test_split=0.4, max_steps=1, batch_size=4, r=4)

    def told_with(split: float | None) -> tuple[dict, str]:
        caplog.clear()
        found, _ = run_evaluation("nano", rows, adapter=tmp_path / "run" / "adapter", test_split=split)
        return found["evaluation"]["my-rows"], caplog.text

    held, told = told_with(0.4)
    assert held["n"] == record["data"]["test"] and told == ""
    assert held["loss"] == pytest.approx(record["training"]["test_loss"], abs=1e-5)
    assert "was trained on" not in told_with(0.2)[1], "some of them"
    for split in (None, 0.9):
        assert "was trained on rows of" in (told := told_with(split)[1])
        assert "my rows.jsonl: --test-split 0.4 scores those that it held out" in told
    with pytest.raises(DataError, match="nano-math holds out rows of its own: leave test_split out"):
        run_evaluation("nano", "nano-math", test_split=0.4)
    shutil.copy(rows, moved := tmp_path / "moved.jsonl")
    caplog.clear()
    run_evaluation("nano", str(moved), adapter=tmp_path / "run" / "adapter", limit=2)
    assert "was trained on rows of" in caplog.text, "by what they are, not by their name"
    shutil.copytree(tmp_path / "run" / "adapter", tmp_path / "foreign" / "final")
    (tmp_path / "foreign" / "run.json").write_text("{}")
    run_evaluation("nano", rows, adapter=tmp_path / "foreign" / "final", limit=2)


def test_the_command_finds_the_base_and_compare_takes_the_results(rows: str, run: Path, tmp_path: Path):
    both = ["--model", "nano", "--adapter", str(run)]
    for name, words in (("tuned", ["--adapter", str(run)]), ("base", ["--model", "nano"]), ("both", both)):
        done = CliRunner().invoke(app, ["evaluate", "--data", rows, *words, "-o", str(tmp_path / name)])
        assert done.exit_code == 0, done.output
        assert "perplexity" in done.output and "token accuracy" in done.output
    (tuned, _), (other, _) = (scored(tmp_path / name) for name in ("tuned", "both"))
    assert tuned == other
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "tuned"), str(tmp_path / "base")])
    assert done.exit_code == 0 and "my-rows" in done.output


@pytest.mark.parametrize("what", ["run", "a Run", "adapter", "model"])
def test_python_gives_what_the_command_gives(rows: str, run: Path, tmp_path: Path, what: str):
    words = ["--model", "nano"] if what == "model" else ["--adapter", str(run)]
    done = CliRunner().invoke(app, ["evaluate", "--data", rows, *words, "-o", str(tmp_path / "shell"), "--json"])
    assert done.exit_code == 0, done.output
    (expected,) = json.loads(done.stdout.splitlines()[-1]).values()
    given = {"run": run, "a Run": hotlora.Run(run), "adapter": str(run / "adapter"), "model": "nano"}[what]
    found = hotlora.evaluate(given, rows, tmp_path / "python", progress=False)
    assert found.pop("task") == "my-rows" and found.pop("seconds") > 0
    for name in ("results", "losses"):
        kept = Path(found.pop(name))
        assert kept.parent == tmp_path / "python"
        assert kept.read_bytes() == (tmp_path / "shell" / expected.pop(name)).read_bytes()
    assert found == {name: value for name, value in expected.items() if name != "seconds"}
    assert found["loss_ci"][0] < found["loss"] < found["loss_ci"][1] and 0 <= found["token_accuracy"] < 1
    again = hotlora.evaluate(given, rows, tmp_path / "shell", progress=False)
    assert again["loss"] == found["loss"], "the same evaluation, so it is done"


def test_a_refused_evaluation_leaves_no_rows_behind(rows: str, run: Path, tmp_path: Path):
    listed = [json.loads(line) for line in Path(rows).read_text().splitlines()]
    before = sorted(run.iterdir())
    for output in (tmp_path / "new", run):
        with pytest.raises(HotLoraError):
            hotlora.evaluate(run, listed, output, engine="none", progress=False)
    assert not (tmp_path / "new").exists() and sorted(run.iterdir()) == before


def test_rows_in_memory_are_evaluated_in_every_form(
    rows: str, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    listed = [json.loads(line) for line in Path(rows).read_text().splitlines()]
    expected = hotlora.evaluate(run, rows, progress=False, batch_size=8)
    assert "results" not in expected and "losses" not in expected
    capfd.readouterr()
    stream = datasets.Dataset.from_list(listed).to_iterable_dataset()
    for data in (listed, datasets.Dataset.from_list(listed), stream, pandas.DataFrame(listed)):
        found = hotlora.evaluate(run, data, progress=False, batch_size=8)
        assert found.pop("task") == "data"
        assert found | {"task": "my-rows", "seconds": expected["seconds"]} == expected
    assert capfd.readouterr() == ("", ""), "progress=False is silent"
    kept = hotlora.evaluate(run, listed, tmp_path / "out", progress=False)
    assert Path(kept["results"]) == tmp_path / "out" / "results-data.jsonl"
    with pytest.raises(DataError, match="holds other rows"):
        hotlora.evaluate(run, listed[1:], tmp_path / "out", progress=False)


def test_python_evaluates_tasks_and_draws(run: Path):
    found = hotlora.evaluate(run, "nano-math", limit=4, samples=2, temperature=1.0, seed=3, progress=False)
    assert (found["task"], found["metric"], found["n"]) == ("nano-math", "exact_match", 4) and "pass@1" in found


def test_wrong_evaluations_are_one_error(rows: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(HotLoraError, match=r"hotlora.evaluate has no option batchsize \(did you mean batch_size"):
        hotlora.evaluate(run, rows, batchsize=8)
    with pytest.raises(ModelError, match="is a OlmoeForCausalLM: give a run, "):
        hotlora.evaluate(hotlora.load_model("nano"), rows)
    with pytest.raises(FileError, match="does not exist"):
        hotlora.evaluate(tmp_path / "none", rows)
    with pytest.raises(HotLoraError, match="output is 3"):
        hotlora.evaluate(run, rows, 3)
    with pytest.raises(HotLoraError, match="engine vllm decides by itself on device, batch_size: leave them out"):
        hotlora.evaluate(run, rows, engine="vllm", batch_size=3, device="cpu", progress=False)
    with pytest.raises(HotLoraError, match="engine 'vlm' does not exist"):
        hotlora.evaluate(run, rows, engine="vlm", progress=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(HotLoraError, match="runs in one process"):
        hotlora.evaluate(run, rows)


def test_an_evaluation_by_another_template_is_another_one(tmp_path: Path):
    """The hash of conversations is of what was read, and no template is part of that."""
    talk = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 2)
    given = (tmp_path / "chats.jsonl", tmp_path / "scored")
    first, _ = run_evaluation("nano", *map(str, given))
    assert len(first["config"]["chat_template"]) == 64
    with pytest.raises(HotLoraError, match="holds another run: the model's chat template"):
        run_evaluation("nano", *map(str, given), apply_chat_template=False)
    record = read_record(tmp_path / "scored")
    del record["config"]["chat_template"]  # as evaluations before had none
    write_record(tmp_path / "scored", record)
    assert run_evaluation("nano", *map(str, given)) == (record, None) or record["status"] == "done"


def test_rouge_l_of_own_rows(rows: str, run: Path, tmp_path: Path):
    """As rouge-score has it for words of ASCII; other letters count, too, which it drops."""
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    texts = [("the cat sat", "the cat"), ("a-b, C!", "c a b"), ("", "x")]
    expected = [scorer.score(target, text)["rougeL"].fmeasure for target, text in texts]
    each = rouge_each([text for _, text in texts], [target for target, _ in texts])
    assert each == pytest.approx(expected)
    found = rouge_l(each)
    assert found["rouge_l"] == pytest.approx(sum(expected) / 3) and 0 < expected[0] < 1
    same = ["你好", "καλημέρα", "café"]
    assert rouge_l(rouge_each(same, same)) == {"rouge_l": 1.0, "rouge_l_ci": [1.0, 1.0]}
    assert rouge_l([1.0])["rouge_l_ci"] == [None, None]

    words = ["evaluate", "--data", rows, "--adapter", str(run), "--rouge", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    result = read_record(tmp_path / "out")["evaluation"]["my-rows"]
    assert f"ROUGE-L {result['rouge_l']:.4f} (95% " in done.output and result["accuracy"] <= result["rouge_l"] <= 1
    columns = section_tables(read_sections(find_records(tmp_path))[0])[0].columns
    assert "ROUGE-L" in columns.values()
    base = ["evaluate", "--data", rows, "--model", "nano", "--rouge", "-o", str(tmp_path / "base")]
    assert CliRunner().invoke(app, base).exit_code == 0
    paired = hotlora.compare_examples(tmp_path / "out", tmp_path / "base")
    by_name = {task.task: task for task in paired.tasks}
    assert by_name["my-rows, ROUGE-L"].a == pytest.approx(result["rouge_l"])
    assert result["rouge_l_ci"] == pytest.approx(list(mean_interval(_rouge_of(tmp_path / "out"))))


def _rouge_of(folder: Path) -> list[float]:
    return [json.loads(line)["rouge_l"] for line in (folder / "results-my-rows.jsonl").read_text().splitlines()]


def test_rouge_l_is_paired_row_by_row(tmp_path: Path):
    """On the rows that both have; the interval is scipy's of the paired t test."""
    rng = np.random.default_rng(0)
    values = {name: rng.uniform(0, 1, 30) for name in ("a", "b")}
    values["b"] = (values["a"] + values["b"]) / 2
    for name, rouge in values.items():
        some = list(enumerate(rouge))[: 30 if name == "a" else 25]
        lines = [{"index": i, "id": f"row{i}", "prediction": "x", "correct": False, "rouge_l": f} for i, f in some]
        (tmp_path / name).mkdir()
        (tmp_path / name / "results-mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        about = {"model": {"name": "m", "fingerprint": "f"}, "data": {"name": "mine", "hash": "h"}}
        record = new_record(name=name, condition=name, **about)
        summary = {
            "metric": "exact_match",
            "accuracy": 0.0,
            "n": len(some),
            "correct": 0,
            "ci_low": 0.0,
            "ci_high": 0.1,
        }
        kept = {"results": "results-mine.jsonl", "rouge_l": float(np.mean([f for _, f in some]))}
        record |= {"status": "done", "evaluation": {"mine": summary | kept}}
        write_record(tmp_path / name, record)
    _, rouge = hotlora.compare_examples(tmp_path / "a", tmp_path / "b").tasks
    ours, theirs = values["a"][:25], values["b"][:25]
    test = scipy.stats.ttest_rel(ours, theirs)
    assert (rouge.task, rouge.n, rouge.unit, rouge.mcnemar) == ("mine, ROUGE-L", 25, "0 to 1", None)
    assert [rouge.a, rouge.b] == pytest.approx([ours.mean(), theirs.mean()])
    assert rouge.difference == pytest.approx((ours - theirs).mean())
    assert rouge.interval == pytest.approx(list(test.confidence_interval(0.95)))
    assert (rouge.verdict == "differs") is bool(test.pvalue < 0.05)
    table = CliRunner().invoke(app, ["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert table.exit_code == 0 and "exact match, %; ROUGE-L, 0 to 1" in table.output
    file = tmp_path / "b" / "results-mine.jsonl"
    without = [{k: v for k, v in json.loads(line).items() if k != "rouge_l"} for line in file.open()]
    file.write_text("".join(json.dumps(line) + "\n" for line in without))
    one = hotlora.compare_examples(tmp_path / "a", tmp_path / "b")
    assert [task.task for task in one.tasks] == ["mine"]
    assert one.left_out == (f"mine, ROUGE-L: {tmp_path / 'b'} kept none of each example (hotlora evaluate --rouge).",)


def test_rouge_l_that_cannot_be_is_told_first(rows: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(HotLoraError, match="one answer to each of your own rows"):
        run_evaluation("nano", "nano-math", rouge=True)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(HotLoraError, match=r"pip install 'hotlora\[rouge\]'"):
        run_evaluation("nano", rows, rouge=True)


def test_conversations_are_compared_without_special_tokens(tmp_path: Path):
    tokenizer = hotlora.load_tokenizer("nano")
    talk = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b c"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    (example,) = load_examples(str(tmp_path / "rows.jsonl"), tokenizer=tokenizer)
    task = own_task("rows.jsonl", [example], tokenizer)
    assert task.score is not None
    assert task.score(example, " b c\n") and not task.score(example, "b") and not task.score(example, "b c d")


def test_a_row_without_an_answer_is_named():
    tokenizer = byte_tokenizer()
    with pytest.raises(DataError, match="row 2 has no completion"):
        own_task("x.jsonl", [Example("a", "b"), Example("a", " ")], tokenizer)
    with pytest.raises(DataError, match="row 2 has no prompt"):
        own_task("x.jsonl", [Example("a", "b"), Example("", "b")], tokenizer)


def test_texts_have_a_loss_over_all_of_their_tokens(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They have no answer that could be right: loss, perplexity and token accuracy, in every command."""
    texts = ["say a: a", "say b: bb", "say a: aaa", "Ann has 4 apples and buys 3."]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name, words in (("tuned", ["--adapter", str(run)]), ("base", ["--model", "nano"])):
        done = CliRunner().invoke(app, ["evaluate", "--data", str(file), *words, "-o", str(tmp_path / name)])
        assert done.exit_code == 0, done.output
        assert "texts: 4 texts" in done.output and "perplexity" in done.output and ", 31 tokens" in done.output
        assert "every example: " in done.output and "losses.jsonl" in done.output
    found = hotlora.evaluate(run, file, tmp_path / "tuned", progress=False)
    model, tokenizer = hotlora.load(run)
    losses, right, counts = [], [], []
    for text in texts:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].double()
        losses.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")))
        right.append(int((logits.argmax(-1) == ids[0, 1:]).sum()))
        counts.append(ids.shape[1] - 1)
    assert (found["metric"], found["n"], found["tokens"]) == ("token_accuracy", 4, sum(counts))
    assert found["loss"] == pytest.approx(sum(losses) / sum(counts), rel=1e-5)
    assert found["loss_ci"] == pytest.approx(ratio_interval(losses, counts), rel=1e-4)
    assert found["accuracy"] == found["token_accuracy"] == sum(right) / sum(counts)
    assert [found["ci_low"], found["ci_high"]] == found["token_accuracy_ci"] and "results" not in found
    kept = [json.loads(line) for line in Path(found["losses"]).read_text().splitlines()]
    assert [row["tokens"] for row in sorted(kept, key=lambda row: row["index"])] == counts
    paired = hotlora.compare_examples(tmp_path / "tuned", tmp_path / "base")
    assert [task.task for task in paired.tasks] == ["texts, loss", "texts, token accuracy"]
    page = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert page.exit_code == 0 and f"{100 * found['accuracy']:.1f}" in page.output
    one = hotlora.evaluate(run, [{"text": texts[3]}], progress=False)
    assert one["loss_ci"] == one["token_accuracy_ci"] == [None, None] and one["ci_low"] is None
    monkeypatch.setattr("hotlora.runs.evaluation.rouge_scorer", lambda: None)  # whether it is installed or not
    for options, told in (
        ({"rouge": True}, "ROUGE-L is of answers, and data has texts alone: leave --rouge out"),
        ({"samples": 2, "temperature": 1.0}, "data has texts alone, to which nothing is answered: leave --engine and"),
        ({"engine": "vllm"}, "data has texts alone|vllm"),
    ):
        with pytest.raises(HotLoraError, match=told):
            hotlora.evaluate(run, [{"text": text} for text in texts], progress=False, **options)


TURNS = [
    {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 + 3?"}, {"role": "assistant", "content": "6"},
]  # fmt: skip


def test_data_are_shown_as_the_model_will_see_them(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = tmp_path / "chat.jsonl"
    rows.write_text("".join(json.dumps({"messages": TURNS[: 2 * n], "id": n}) + "\n" for n in (1, 2, 2)))

    def call(*words: str) -> str:
        result = CliRunner().invoke(app, ["data", str(rows), "--model", "nano", *words])
        assert result.exit_code == 0, result.output
        return result.stdout

    shown = call("--rows", "2")
    assert "Assistant:⟦ 4<|endoftext|>⟧" in shown and "Assistant:⟦ 6<|endoftext|>⟧" in shown
    assert shown.count("chat.jsonl line") == 2 and "nothing reads id" in caplog.text
    assert "3 rows (messages, by the chat template)" in shown and "carry loss (every answer)" in shown
    found = {how: json.loads(call("--json", "--train-on", how)) for how in ("assistant", "last", "all")}
    number = {how: one["trained_tokens"] for how, one in found.items()}
    assert number["last"] < number["assistant"] < number["all"] == found["all"]["tokens"]
    assert [len(one["lengths"]) for one in found.values()] == [3, 3, 3]


def test_what_is_trained_is_of_a_runs_identity(tmp_path: Path):
    """Where it makes a difference: a run of prompts and completions, begun before there was a choice, goes on."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i} + 1", "completion": f" {i + 1}"}) + "\n" for i in range(8)))
    chat = tmp_path / "chat.jsonl"
    chat.write_text((json.dumps({"messages": TURNS}) + "\n") * 8)
    options = {"max_steps": 1, "batch_size": 4, "r": 2, "profile_fraction": 1.0}
    done = run_training("nano", str(rows), tmp_path / "texts", **options)
    assert done["config"]["train_on"] is None
    assert run_training("nano", str(rows), tmp_path / "texts", train_on="last", **options) == done
    with pytest.raises(HotLoraError, match="--train-on all against last"):
        run_training("nano", str(rows), tmp_path / "texts", train_on="all", **options)
    losses = {}
    for train_on in ("assistant", "last"):
        record = run_training("nano", str(chat), tmp_path / train_on, train_on=train_on, **options)
        losses[train_on] = record["training"]["loss_first"]
        assert record["config"]["train_on"] == (train_on if train_on == "assistant" else None)
    assert losses["assistant"] != losses["last"]
    with pytest.raises(HotLoraError, match="--train-on last against assistant"):
        run_training("nano", str(chat), tmp_path / "assistant", train_on="last", **options)


def test_runs_on_own_rows_are_compared_row_by_row(tmp_path: Path):
    """Trainings by their held-out rows; scorings by theirs. Equal to what a paired bootstrap over rows says."""
    rows = [{"prompt": f"say {i} twice:", "completion": f" {i} {i}" + " a" * (i % 4)} for i in range(80)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, rate in (("slow", 1e-4), ("fast", 4e-3)):
        run_training(
            "nano", str(tmp_path / "rows.jsonl"), tmp_path / name, max_steps=20, batch_size=8, learning_rate=rate, r=8,
            test_split=0.4,
        )  # fmt: skip
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "slow"), str(tmp_path / "fast"), "--json"])
    assert done.exit_code == 0, done.output
    loss, accuracy = json.loads(done.output)["tasks"]
    records = [read_record(tmp_path / name) for name in ("slow", "fast")]
    assert [loss["a"], loss["b"]] == pytest.approx([record["training"]["test_loss"] for record in records])
    assert loss["n"] == records[0]["data"]["test"] and loss["unit"] == "nats a token" and accuracy["unit"] == "%"
    a, b = (
        [json.loads(line) for line in (tmp_path / n / "losses.jsonl").read_text().splitlines()]
        for n in ("slow", "fast")
    )
    tokens = np.array([row["tokens"] for row in a])
    differences = np.array([x["loss"] - y["loss"] for x, y in zip(a, b, strict=True)])
    picked = np.random.default_rng(0).integers(0, len(a), (4000, len(a)))
    drawn = differences[picked].sum(1) / tokens[picked].sum(1)
    ends = np.quantile(drawn, [0.025, 0.975])
    assert loss["interval"] == pytest.approx(list(ends), abs=0.1 * (ends[1] - ends[0]))
    assert loss["difference"] == pytest.approx(differences.sum() / tokens.sum()) and loss["verdict"] == "differs"
    table = CliRunner().invoke(app, ["compare", str(tmp_path / "slow"), str(tmp_path / "fast")])
    assert table.exit_code == 0 and "loss, nats a token" in table.output


def test_columns_that_nothing_reads_are_told_by_data_and_train_alone(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    rows = tmp_path / "rows.jsonl"
    line = {"prompt": "say a:", "completion": " a", "id": 7}
    rows.write_text("".join(json.dumps(line | {"prompt": f"say {i}:"}) + "\n" for i in range(8)))
    common, short = ["--data", str(rows)], ["-m", "nano", "--max-steps", "1", "--r", "4", "--test-split", "0.3"]
    for words, tells in (
        (["data", str(rows), "-m", "nano"], True),
        (["train", *common, *short, "-o", str(tmp_path / "run"), "--no-preflight"], True),
        (["profile", *common, "-m", "nano", "-o", str(tmp_path / "profile")], False),
        (["evaluate", *common, "--adapter", str(run)], False),
    ):
        caplog.clear()
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        assert caplog.text.count("nothing reads id") == tells, words


def test_a_held_out_loss_that_is_no_number_is_told(tmp_path: Path):
    """JSON has none, so the record has null: the command's last words, the card and the report take it."""
    rows, folder = tmp_path / "rows.jsonl", tmp_path / "run"
    rows.write_text("".join(json.dumps({"prompt": f"say {i}:", "completion": " a"}) + "\n" for i in range(8)))
    words = f"train -m nano -d {rows} -o {folder} --max-steps 1 --r 4 --test-split 0.3 --no-preflight".split()
    assert CliRunner().invoke(app, words).exit_code == 0
    record = read_record(folder)
    record["training"]["test_loss"] = math.nan
    write_record(folder, record)
    assert read_record(folder)["training"]["test_loss"] is None
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 0, again.output
    assert "→ not a finite number (null in run.json)" in again.output
    assert "not a finite number (null in run.json), " in (folder / "adapter" / "README.md").read_text()
    assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == 0
    assert "Run(" in repr(hotlora.Run(folder))
