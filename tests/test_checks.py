"""Every option is checked before weights are read: the model's folder here has none, so whoever loads it fails."""

import json
import re
import sys
from pathlib import Path

import pytest
from peft import get_peft_model
from tiny import tiny_batch, tiny_model, tiny_plan
from tiny_tokenizer import byte_tokenizer

from hotlora import HotLoraConfig, select_experts
from hotlora.base.errors import HotLoraError
from hotlora.base.precision import say_once
from hotlora.cli import main as cli
from hotlora.routing.profiler import profile_routing
from hotlora.runs.checks import check_run
from hotlora.runs.methods import resolve
from hotlora.runs.options import RunOptions
from hotlora.training.identity import differences


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model (no weights), rows.jsonl, an adapter, plans and a profile of this model and of another one."""
    folder = tmp_path_factory.mktemp("checks")
    base = tiny_model("olmoe", vocab_size=259, max_position_embeddings=512)
    base.config.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    for name, model in (("", base), ("other-", tiny_model("olmoe", vocab_size=259, num_experts=4))):
        profile = profile_routing(model, [tiny_batch()])
        profile.save(folder / f"{name}profile.safetensors")
        select_experts(profile).save(folder / f"{name}plan.json")
        plan = tiny_plan(model, {0: [1], 1: [2]})
        get_peft_model(model, HotLoraConfig(plan=plan, r=2)).save_pretrained(folder / f"{name}adapter")
    rows = ({"prompt": f"{i} and", "completion": f" {i}"} for i in range(6))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path):
    """What a command that must fail says."""

    def run(words: str) -> str:
        words = words.format(folder=folder, out=tmp_path / "out", tmp=tmp_path)
        monkeypatch.setattr(sys, "argv", ["hotlora", *words.split()])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr().err
        assert ended.value.code == 1 and said.count("error:") == 1 and "Traceback" not in said, said
        assert not (tmp_path / "out").exists(), "nothing was begun"
        return " ".join(said.split())

    return run


TRAIN = "train --model {folder}/model --data {folder}/rows.jsonl -o {out} --no-preflight"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--fraction 25", "fraction is 25.0: it must be above 0 and at most 1"),
        ("--experts-per-layer 9", "experts_per_layer is 9: it must be an integer from 1 to 8"),
        ("--rule greedy --budget 17", "budget is 17: it must be an integer from 1 to 16"),
        ("--rule coverage --p 2", "p is 2.0: it must be above 0 and at most 1"),
        ("--rule hot+random --fillers 9", "fillers is 9"),
        ("--rule hot --p 0.5", "rule 'hot' does not read p"),
        ("--rule scores", "needs scores"),
        ("--rule hottest", "rule 'hottest' does not exist"),
        ("--signal sum", "signal 'sum' does not exist"),
        ("--rule random --plan-seed 9223372036854775808", "seed is 9223372036854775808"),
        ("--plan {folder}/other-plan.json", "the plan was made for olmoe-"),
        ("--profile {folder}/other-profile.safetensors", "other-profile.safetensors is the profile of olmoe-"),
        ("--report-to dvclive", "report_to = 'dvclive' needs a package that is not installed"),
        ("--report-to nothing", "report_to = 'nothing' does not exist"),
        ("--device cuda:1", "a training runs on the first GPU that its process sees. Set CUDA_VISIBLE_DEVICES=1"),
        ("--dtype int8", "dtype 'int8' does not exist"),
        ("--dtype float8_e4m3fn", "'float8_e4m3fn' does not exist: give auto, float32, bfloat16, float16 or float64"),
        ("--quantize 3", "quantize = 3 is out of range: it must be 8 or 4 bits, or 0"),
        ("--quantize-linear 5", "quantize_linear = 5 is out of range"),
        ("--limit 0", "limit = 0 is out of range: it must be 1 or more"),
        ("--test-limit 0", "test_limit = 0 is out of range: it must be 1 or more"),
        ("--learning-rate inf", "learning_rate = inf is out of range"),
        ("--epochs inf", "epochs = inf is out of range"),
        ("--reprofile-every 0", "reprofile_every = 0 is out of range"),
        ("--reprofile-every 2 --reprofile-left keep", "reprofile_left is 'keep'"),
        ("--reprofile-every 2 --dora", "re-profiling moves plain LoRA factors only"),
        ("--reprofile-every 2 --share-a", "re-profiling moves plain LoRA factors only"),
        ("--reprofile-every 2 --rule random", "rule 'random' chooses the same experts whatever is profiled"),
        ("--reprofile-every 2 --rule coverage", "keeps the number of experts of each layer, and rule 'coverage' may"),
        ("--reprofile-every 2 --rule greedy", "may change it: choose one of hot, cold, hot+random, or leave out"),
        ("--reprofile-every 2 --optim adagrad", "re-profiling moves an expert's rows of AdamW's state, and optim is"),
        ("--reprofile-every 2 --reprofile-left merge --quantize 4", "cannot be merged into quantized experts"),
        ("--rule hot --plan-seed 3", "plan_seed is of rules that draw (random, hot+random), and rule is 'hot'"),
        ("--perft R --fraction 0.5", "perft R has its adapters beside all experts of a layer, and rule 'hot' chooses"),
        ("--method perft-d --rule cold", "perft D has its adapters beside all experts"),
        ("--perft-adapters 4", "perft_adapters=4 and perft_top_k=1 are of PERFT"),
        ("--method esft --lora-fa", "train_full_experts leaves no A that could be frozen"),
        ("--method lori-s --dora", "LoRI's sparse run trains entries of B alone: leave out use_dora (--dora)"),
        ("--method esft --share-a", "train_full_experts leaves no low-rank update whose A could be shared"),
        ("--method lori-s --keep 2", "keep is 2.0"),
        ("--method lori-s --granularity row", "granularity 'row' does not exist"),
        ("--method lori-s --dense-learning-rate 0", "learning_rate = 0.0 is out of range"),
        (
            "--method fft --dtype float16",
            "loss scaling has none in float16: leave dtype out, or give float32",
        ),
        ("--method fft --dora", "full fine-tuning has no adapter: leave use_dora (--dora) out"),
        ("--plan {folder}/plan.json --rule hottest", "rule 'hottest' does not exist"),
        ("--warmup lora --fraction 25", "fraction is 25.0"),
        ("--warmup lora --reprofile-every 0", "reprofile_every = 0"),
    ],
)
def test_training_options_are_checked_before_a_model_is_loaded(refused, words: str, says: str):
    assert says in refused(f"{TRAIN} {words}")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("profile --model {folder}/model --data {folder}/rows.jsonl -o /dev/null/x", "/dev/null/x.* cannot be written"),
        ("profile --model {folder}/model --data {folder}/rows.jsonl --batch-size 0", "batch_size = 0 is out of range"),
        ("profile --model {folder}/model --data {folder}/rows.jsonl --dtype x", "dtype 'x' does not exist"),
        ("profile a:b --compare --model {folder}/model -o /dev/null/x", "/dev/null/x.* cannot be written"),
        ("merge --model {folder}/model {folder}/adapter -o /dev/null/x", "/dev/null/x cannot be written"),
        ("merge --model {folder}/model {folder}/other-adapter -o {out}", "other-adapter: the plan was made for olmoe"),
        ("export --model {folder}/model {folder}/adapter -o {out} -f peft --dtype x", "dtype 'x' does not exist"),
        ("combine --model {folder}/model {folder}/adapter {folder}/other-adapter -o {out}", "other-adapter: the plan"),
        ("evaluate --model {folder}/model --data nano-math --batch-size 0", "batch_size = 0 is out of range"),
        ("evaluate --model {folder}/model --data nano-math --allow-missing", "give --generations, too"),
        (
            "evaluate --model {folder}/model --harness lm-eval --tasks x --apply-chat-template --seed 3",
            "lm-eval writes prompts and draws answers by itself: leave apply_chat_template, seed out",
        ),
        ("data {folder}/rows.jsonl --model {folder}/model --split test", "rows.jsonl is one file: leave it out"),
        ("sweep hellora-table-1 -o {out} --processes 2", "trains nothing, so that no runs are side by side"),
        ("evaluate --model {folder}/model --data nano-math --adapter {folder}/other-adapter", "the plan was made for"),
        ("evaluate --model {folder}/model --data nano-math --device cuda:99", "device 'cuda:99' does not exist"),
        ("train --model {folder}/model --data {folder}/rows.jsonl -o /dev/null/x", "/dev/null/x cannot be written"),
    ],
)
def test_other_commands_check_first_too(refused, words: str, says: str):
    assert re.search(says, refused(words))


def test_options_of_an_adapter_that_is_not_there_are_told(folder: Path, caplog: pytest.LogCaptureFixture):
    """Not refused: a sweep has them for all of its methods."""
    files = {"model": str(folder / "model"), "data": str(folder / "rows.jsonl")}
    say_once.cache_clear()
    for method in ("hellora", "esft", "fft"):
        check_run(resolve(method, **files, r=8, use_rslora=True))
        assert ("these options change nothing: r, use_rslora" in caplog.text) == (method != "hellora"), method
        say_once.cache_clear()
        caplog.clear()


def test_a_probe_of_the_output_leaves_nothing(refused, tmp_path: Path):
    refused("profile --model {tmp}/nowhere --data {folder}/rows.jsonl -o {tmp}/a/b/profile.safetensors")
    assert not list(tmp_path.iterdir())


def test_another_run_is_told_in_the_command_lines_words():
    before = {
        "learning_rate": 4e-4, "batch_size": 16, "train_a": True, "use_dora": False, "data": "a.jsonl",
        "data_hash": "3f2a", "test_data": "t.jsonl", "test_hash": "aa", "plan_hash": None, "profile_hash": "1234",
        "rule": "hot", "sampling": {"samples": 2, "seed": 0}, "on_top_of": ["77"], "experts_per_layer": None,
    }  # fmt: skip
    assert differences(before, dict(before)) == []
    assert differences(before, {**before, "learning_rate": 1e-4}) == ["--learning-rate 0.0001 against 0.0004"]
    assert differences(before, {**before, "data_hash": "9c"}) == ["the training data (--data) is not what it was"]
    assert differences(before, {**before, "data": "b.jsonl", "data_hash": "9c", "test_hash": "bb"}) == [
        "--data b.jsonl against a.jsonl"
    ]
    now = {**before, "plan_hash": "55", "profile_hash": None, "on_top_of": ["78"], "train_a": False, "use_dora": True}
    assert differences(before, now) == [
        "--on-top-of is not what it was", "the plan (--plan, or the rule's) was not given before",
        "--profile was given before", "--lora-fa on against off", "--dora on against off",
    ]  # fmt: skip
    assert differences(before, {**before, "sampling": {"samples": 4, "seed": 0}}) == ["--samples 4 against 2"]
    hexes = re.compile(r"\b[0-9a-f]{8,}\b")
    assert not hexes.search(" ".join(differences(dict.fromkeys(before), {**before, "data_hash": "f" * 64})))


def test_what_lies_elsewhere_with_the_same_hash_is_no_difference():
    """But the name of a task, which says how answers are judged."""
    for name, noted in (
        ("adapter", "adapter_hash"), ("data", "data_hash"), ("data", "test_hash"), ("test_data", "test_hash"),
        ("scores", "scores_hash"), ("generations", "generations_hash"), ("model", "model_hash"),
        ("include_path", "include_hash"),
    ):  # fmt: skip
        flag = name.replace("_", "-")
        before, now = {name: "/old/x", noted: "h"}, {name: "/new/x", noted: "h"}
        assert differences(before, now) == []
        assert differences(before, now | {noted: "i"}) == [f"--{flag} /new/x against /old/x"]
        assert differences({name: "/old/x"}, {name: "/new/x"}) == [f"--{flag} /new/x against /old/x"]
        assert differences(before, {name: None, noted: "h"}) == [f"--{flag} none against /old/x"]
    read = {"data_hash": "h", "test_hash": "i"}
    assert differences({"data": "gsm8k:/old", **read}, {"data": "gsm8k", **read}) == []
    for other in ("boolq:/old", "/old"):
        assert differences({"data": "gsm8k:/old", **read}, {"data": other, **read}) == [
            f"--data {other} against gsm8k:/old"
        ]
    # What judges the answers is told where the place is no difference any more.
    judged = {"data": "spider:/new", **read, "scorer_hash": "k"}
    assert differences({**judged, "data": "spider:/old", "scorer_hash": "j"}, judged) == [
        "what judges the test data's answers (tests, choices, databases) is not what it was"
    ]
    tasks = {"tasks": ["gsm8k:/old", "arc_easy"], "tasks_hash": ["h", None]}
    assert differences(tasks, {**tasks, "tasks": ["gsm8k:/new", "arc_easy"]}) == []
    for change in ({"tasks": ["gsm8k:/new", "piqa"]}, {"tasks": ["gsm8k:/new", "arc_easy"], "tasks_hash": ["i", None]}):
        assert len(differences(tasks, {**tasks, **change})) == 1


def test_sequences_are_not_spread_over_processes(monkeypatch: pytest.MonkeyPatch):
    """What accelerate launch --use_parallelism_config sets; its own error comes after the profile, in a traceback."""
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "1")
    with pytest.raises(HotLoraError, match=r"a parallelism_config \(cp_size 2\).*leave these out"):
        check_run(RunOptions(model="nano", data="nano-math"))
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "1")
    check_run(RunOptions(model="nano", data="nano-math"))
