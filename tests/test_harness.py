"""lm-eval on models in memory, with its data from local files; mostly skipped where lm-eval is not installed."""

import json
import random
import sys
from pathlib import Path

import pytest
from published import ABSENT, DATA
from tiny import fill, tiny_model, tiny_plan
from tiny_files import save_tiny_model
from tiny_tokenizer import byte_tokenizer
from zoo import zoo_model

from hotlora import HotLoraConfig
from hotlora.base.errors import DataError, HotLoraError
from hotlora.base.records import Record, read_record, write_record
from hotlora.cli import main as cli
from hotlora.evaluation.harness import evaluate_by_lm_eval, lm_eval_version, read_hashes, write_local_task
from hotlora.evaluation.score import Evaluation, example_id
from hotlora.runs import evaluation
from hotlora.runs.options import EvalOptions
from hotlora.tasks import get_task, gsm8k, hellaswag
from hotlora.tasks.rows import Row

try:
    import lm_eval
except ImportError:
    lm_eval = None
harness = pytest.mark.skipif(lm_eval is None, reason="lm-eval: pip install hotlora[eval]")
HELLASWAG = {
    "activity_label": "Kite [substeps] work", "ctx_a": "A man folds a kite.", "ctx_b": "he",
    "endings": ["[title] flies it.", "eats it.", "paints the whole of it red.", "sleeps."],
}  # fmt: skip


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """GSM8K's and HellaSwag's folders, with few and invented rows."""
    for name in ("gsm8k", "hellaswag"):
        (tmp_path / name).mkdir()
    rows = [{"question": f"What is {i} and {i}?", "answer": f"{i}+{i}\n#### {2 * i}"} for i in range(6)]
    for split in ("train", "test"):
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    endings = [{**HELLASWAG, "label": str(i % 4)} for i in range(4)]
    endings.insert(1, {"query": "Kite: A man. He", "endings": ["runs.", "a", "b", "c"], "label": 0})
    (tmp_path / "hellaswag" / "hellaswag_val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in endings))
    return tmp_path


def told(texts: dict[str, str]):
    """A model that gives each prompt the text that was written for it."""
    from lm_eval.api.model import LM

    class Told(LM):
        def generate_until(self, requests, **_):
            return [texts[request.args[0]] for request in requests]

        def loglikelihood(self, requests, **_):
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    return Told()


def variants(answer: str, draw: random.Random) -> str:
    """A generation that ends in `answer`, another number or none, in one of the ways in which models write it."""
    wrong = [str(draw.randrange(-20, 5000)), answer + "0", "-" + answer, f"{answer}.0"]
    number = draw.choice([answer] * 6 + wrong)
    shown = draw.choice(
        [number, f"{int(float(number)):,}", f"{number}.", f"${number}", f"{number} cakes", f"{number},"]
    )
    form = draw.choice(
        ["It is so.\n#### {}", " 1+1\n#### {}\n", "#### {}\n\n#### 5", "The answer is {}.", "####{}", "#### {} #### 7",
         "####  {}", "#### {}/2", "", "{}", "so\n#### {} ", "#### #### {}"]
    )  # fmt: skip
    return form.format(shown)


@harness
@pytest.mark.skipif(not (DATA / "gsm8k").is_dir(), reason=f"GSM8K: {ABSENT}")
def test_gsm8k_agrees_with_lm_eval_on_200_generations(tmp_path: Path):
    examples = get_task("gsm8k").load("test", str(DATA / "gsm8k"), None, 0)[:200]
    draw = random.Random(0)
    texts = {e.prompt: variants(gsm8k.final_answer(e.meta["answer"]), draw) for e in examples}
    report, (evaluation,) = evaluate_by_lm_eval(
        told(texts), None, [f"gsm8k:{DATA / 'gsm8k'}"], num_fewshot=0, limit=200
    )
    ours = [gsm8k.score(example, texts[example.prompt]) for example in examples]
    assert [r["correct"] for r in evaluation.results] == ours and 50 < sum(ours) < 150
    assert [r["id"] for r in evaluation.results] == [example_id(e) for e in examples]
    assert [r["prediction"] for r in evaluation.results] == [texts[e.prompt] for e in examples]
    assert report["results"]["gsm8k"]["exact_match,strict-match"] == evaluation.accuracy == sum(ours) / 200
    assert (evaluation.metric, evaluation.n) == ("exact_match", 200)


@harness
def test_the_one_known_difference_in_gsm8k(folder: Path):
    """lm-eval removes one trailing dot, hotlora all."""
    examples = [
        gsm8k.example(Row("", json.loads(line))) for line in (folder / "gsm8k" / "test.jsonl").read_text().splitlines()
    ]
    texts = {e.prompt: f"#### {2 * i}{'.' * i}" for i, e in enumerate(examples)}
    _, (evaluation,) = evaluate_by_lm_eval(told(texts), None, [f"gsm8k:{folder}/gsm8k"], num_fewshot=0)
    assert [r["correct"] for r in evaluation.results] == [True, True, False, False, False, False]
    assert all(gsm8k.score(example, texts[example.prompt]) for example in examples)


@harness
def test_an_adapted_model_in_memory(folder: Path):
    from hotlora.evaluation.generate import answer_batches
    from hotlora.evaluation.score import evaluate_task

    tokenizer = byte_tokenizer()
    base = tiny_model("olmoe", vocab_size=259, max_position_embeddings=1024)
    import peft

    model = peft.get_peft_model(base, HotLoraConfig(plan=tiny_plan(base), r=4)).eval()
    options = {"num_fewshot": 0, "batch_size": 2}
    _, before = evaluate_by_lm_eval(model, tokenizer, [f"hellaswag:{folder}/hellaswag"], **options)
    fill(model, seed=1, scale=1.0)
    tasks = [f"gsm8k:{folder}/gsm8k", f"hellaswag:{folder}/hellaswag"]
    report, after = evaluate_by_lm_eval(model, tokenizer, tasks, limit=3, **options)
    assert [e.task for e in after] == ["gsm8k", "hellaswag"] and [e.metric for e in after] == [
        "exact_match",
        "acc_norm",
    ]
    assert before[0].results[:3] != after[1].results, "the adapter takes part"
    examples = get_task("gsm8k").load("test", str(folder / "gsm8k"), None, 0)[:3]
    task = get_task("gsm8k")
    batches = answer_batches(model, tokenizer, examples, max_new_tokens=task.max_new_tokens, stop=task.stop)
    ours = {answer.index: answer.text for batch in batches for answer in batch}
    assert {r["index"]: r["prediction"] for r in after[0].results} == ours
    examples = get_task("hellaswag").load("test", str(folder / "hellaswag"), None, 0)[:3]
    found = evaluate_task(model, tokenizer, get_task("hellaswag"), examples)
    assert [r["id"] for r in after[1].results] == [r["id"] for r in found.results]
    assert [r["correct"] for r in after[1].results] == [r["correct"] for r in found.results]
    assert report["results"]["hellaswag"]["acc_norm,none"] == found.accuracy
    for theirs, mine, example in zip(after[1].results, found.results, examples, strict=True):
        whole = [value * len(choice) for value, choice in zip(mine["scores"], example.choices, strict=True)]
        assert [float(pair[0]) for pair in theirs["prediction"]] == pytest.approx(whole, rel=1e-4)
    json.dumps(report)


@harness
def test_choices_past_the_models_window_are_cut_as_lm_eval_cuts_them(folder: Path):
    from hotlora.evaluation.score import evaluate_task

    tokenizer, model = byte_tokenizer(), tiny_model("olmoe", vocab_size=259, max_position_embeddings=32)
    _, (theirs,) = evaluate_by_lm_eval(model, tokenizer, [f"hellaswag:{folder}/hellaswag"], num_fewshot=0)
    examples = get_task("hellaswag").load("test", str(folder / "hellaswag"), None, 0)
    found = evaluate_task(model, tokenizer, get_task("hellaswag"), examples)
    assert 0 < found.cut < len(examples)
    for their, mine, example in zip(theirs.results, found.results, examples, strict=True):
        whole = [value * len(choice) for value, choice in zip(mine["scores"], example.choices, strict=True)]
        assert [float(pair[0]) for pair in their["prediction"]] == pytest.approx(whole, rel=1e-4)


@harness
@pytest.mark.slow  # hundreds of tokens by a loop of many small kernels
def test_answers_do_not_depend_on_the_batch_where_padding_matters(folder: Path):
    model, tokenizer = zoo_model("deepseek_v4", vocab_size=259), byte_tokenizer()
    model.config.max_position_embeddings = 1024  # lm-eval cuts prompts to it
    rows = [{"question": "What is it?" + " Well?" * i, "answer": f"{i}\n#### {2 * i}"} for i in range(3)]
    (folder / "gsm8k" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = []
    for batch_size in (1, 3):
        tasks = [f"gsm8k:{folder}/gsm8k"]
        _, (evaluation,) = evaluate_by_lm_eval(model, tokenizer, tasks, num_fewshot=0, batch_size=batch_size)
        told.append([result["prediction"] for result in evaluation.results])
    assert told[0] == told[1] and len(set(told[0])) > 1


@harness
def test_the_command_keeps_a_record(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def call(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["hotlora", "evaluate", "--harness", "lm-eval", *map(str, words)])
        with pytest.raises(SystemExit):
            cli.main()
            raise SystemExit(0)
        captured = capsys.readouterr()
        return captured.out + captured.err

    model, out = folder / "model", folder / "run"
    tiny_model("olmoe", vocab_size=259, max_position_embeddings=1024).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    words = ("--model", model, "--tasks", f"hellaswag:{folder}/hellaswag", "-o", out, "--limit", 3)
    assert "hellaswag: acc_norm" in call(*words)
    record = read_record(out)
    assert record["harness"] == {"name": "lm-eval", "version": lm_eval_version(), "results": "results-lm-eval.json"}
    assert record["evaluation"]["hellaswag"]["n"] == 3 == record["data"]["test"]
    report = json.loads((out / "results-lm-eval.json").read_text())
    assert report["results"]["hellaswag"]["acc_norm,none"] == record["evaluation"]["hellaswag"]["accuracy"]
    assert len((out / "results-hellaswag.jsonl").read_text().splitlines()) == 3
    assert "hellaswag: acc_norm" in call(*words)  # done already
    assert "--limit 2 against 3" in call(*words[:-1], 2)
    assert "leave the engine and the sampling out" in call(*words, "--samples", 2, "--temperature", 1)
    assert "Give --harness lm-eval with --tasks" in call("--model", model, "--data", "gsm8k")


def test_edited_tasks_and_rows_are_another_evaluation(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """lm-eval itself is left out: what was there decides before it is asked."""
    asked = []

    def ask(*_, **__):
        asked.append(1)
        (folder / "own" / "__pycache__").mkdir(exist_ok=True)
        (folder / "own" / "__pycache__" / "utils.pyc").write_text(str(asked))
        return {}, [Evaluation("own", "acc", 1.0, 1, 1, 0.2, 1.0, [{"index": 0, "id": "x", "correct": True}], 0.1)]

    monkeypatch.setattr(evaluation, "lm_eval_version", lambda: "0")
    monkeypatch.setattr(evaluation, "evaluate_by_lm_eval", ask)
    model = save_tiny_model(folder / "model")
    (folder / "own" / "data").mkdir(parents=True)
    task, rows = folder / "own" / "own.yaml", folder / "own" / "data" / "rows.jsonl"
    task.write_text("task: own\n")
    rows.write_text("{}\n")
    packed = [rows.with_suffix(end) for end in (".parquet", ".arrow", ".tsv", ".jsonl.gz", ".jsonl.zst")]
    for file in packed:
        file.write_text("rows")

    def evaluated(tasks: tuple[str, ...], out: Path, own: Path | None = None) -> Record:
        return evaluation.run_harness(EvalOptions(model=model), [*tasks], out, include_path=own)

    for out in (folder / "out", folder / "own" / "out", folder / "own"):
        first = evaluated(("own",), out, folder / "own")
        assert evaluated(("own",), out, folder / "own") == first
        for file in (task, rows, *packed):
            before = file.read_text()
            file.write_text(before + "\n")
            with pytest.raises(HotLoraError, match="what is in --include-path is not what it was"):
                evaluated(("own",), out, folder / "own")
            file.write_text(before)
        (folder / "own" / "notes.txt").write_text(str(out))
        assert evaluated(("own",), out, folder / "own") == first, "nothing reads notes"
        config = {name: value for name, value in first["config"].items() if name != "include_hash"}
        write_record(out, first | {"config": config})
        assert evaluated(("own",), out, folder / "own")["started"] == first["started"], "an older record"
        write_record(out, first)
    assert len(asked) == 3

    first = evaluated((f"gsm8k:{folder}/gsm8k", "arc_easy"), folder / "local")
    (folder / "gsm8k").rename(folder / "moved")
    moved = (f"gsm8k:{folder}/moved", "arc_easy")
    assert evaluated(moved, folder / "local") == first
    local = folder / "moved" / "test.jsonl"
    local.write_text(local.read_text().replace("What is", "How much is"))
    with pytest.raises(HotLoraError, match=r"--tasks .* against"):
        evaluated(moved, folder / "local")
    with pytest.raises(DataError, match=r"no is not a folder: give the one that holds your tasks' configs"):
        evaluated(("own",), folder / "other", folder / "no")


def test_rows_of_text_and_large_files_are_read(tmp_path: Path):
    config, notes, large = tmp_path / "own.yaml", tmp_path / "notes.txt", tmp_path / "rows.jsonl"
    for reads in ("dataset_path: text", "data_files: rows/*.txt"):
        config.write_text(f"task: own\n{reads}\n")
        before = read_hashes(["own"], tmp_path)
        notes.write_text(reads)
        assert read_hashes(["own"], tmp_path) != before, reads
    with open(large, "wb") as file:
        file.truncate(2**26 + 1)  # a hole, which takes no place
    before = read_hashes(["own"], tmp_path)
    with open(large, "r+b") as file:
        file.seek(2**25 + 5000)
        file.write(b"x")
    assert read_hashes(["own"], tmp_path) != before, "as long as it was"


@harness
@pytest.mark.slow  # all of lm-eval's configs are read
def test_a_task_that_lm_eval_does_not_have():
    with pytest.raises(DataError, match="lm-eval has no task 'no-such'"):
        evaluate_by_lm_eval(told({}), None, ["no-such"])


@harness
def test_local_files_that_cannot_be_read(tmp_path: Path, folder: Path):
    with pytest.raises(DataError, match="piqa cannot be read from here for lm-eval; gsm8k and hellaswag can"):
        write_local_task("piqa", "here", tmp_path)
    with pytest.raises(DataError, match="is not a folder; lm-eval's gsm8k needs the folder"):
        write_local_task("gsm8k", folder / "gsm8k" / "test.jsonl", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds none of hellaswag_val\.jsonl"):
        write_local_task("hellaswag", tmp_path / "empty", tmp_path)
    (folder / "gsm8k" / "test.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(DataError, match=r"test\.jsonl line 1 has no field 'answer'"):
        write_local_task("gsm8k", folder / "gsm8k", tmp_path)
    assert hellaswag.FILES["test"][0] == "hellaswag_val.jsonl"


@pytest.mark.skipif(lm_eval is not None, reason="lm-eval is installed")
def test_without_lm_eval_the_error_names_the_extra():
    with pytest.raises(HotLoraError, match=r"lm-eval cannot be used .*: pip install hotlora\[eval\]"):
        evaluate_by_lm_eval(None, None, ["gsm8k"])
