"""What a run says, and in which order: errors before anything long, one each; lines in place of bars in a pipe."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
from runs import run_training
from tiny_files import save_tiny_model, write_sums
from typer.testing import CliRunner

from hotlora.base.errors import HotLoraError
from hotlora.cli.main import app
from hotlora.hf.models import load_model, load_tokenizer
from hotlora.tasks.data import load_examples
from hotlora.training.progress import ProgressLines


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("here")
    save_tiny_model(folder / "model")
    write_sums(folder / "rows.jsonl")
    return folder


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def train(*words: object):
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, ["train", *map(str, words)])


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "nano", "-d", "nano-math", "--fraction", "25"],
        ["-m", "nano", "-d", "nano-math", "--r", "0"],
        ["-m", "nano", "-d", "data/typo.jsonl"],
        ["-m", "./typo", "-d", "nano-math"],
        ["-m", "nano", "-d", "nano-math", "--attn-implementation", "foo"],
        ["-m", "nano", "-d", "nano-math", "--eval-steps", "3", "--test-split", "0.1"],
        ["-m", "nano", "-d", "nano-math", "--report-to", "foo"],
    ],
)
def test_an_error_comes_alone(tmp_path: Path, words: list[str]):
    done = train(*words, "-o", tmp_path / "run")
    assert isinstance(done.exception, HotLoraError)
    assert "training" not in done.stderr and "memory" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_lines_in_place_of_bars(here: Path, tmp_path: Path):
    """In a process of its own, whose output is a pipe: no bars, whoever makes them."""
    words = [sys.executable, "-m", "hotlora", "train", "-m", here / "model", "-d", here / "rows.jsonl", "--epochs", "4"]
    words += ["--batch-size", "4", "--r", "2", "--max-length", "64", "--eval-steps", "12", "--test-split", "0.2"]
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run([*words, "-o", tmp_path / "run"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert not re.search(r"it/s|Loading weights|Writing model|\r|━", done.stderr), done.stderr
    assert lines[0].startswith("training ") and any(line.startswith("data: ") for line in lines[:3])
    steps = [line for line in lines if line.startswith("step ")]
    total = json.loads((tmp_path / "run" / "run.json").read_text())["training"]["steps"]
    assert 9 <= len(steps) <= 11 and steps[-1].startswith(f"step {total}/{total}, loss ")
    assert "held-out" in steps[-1] and "left" in steps[0] and "held-out" not in steps[0]
    # Done already: nothing is announced again.
    done = train("-m", here / "model", "-d", here / "rows.jsonl", "--epochs", 4, "--batch-size", 4, "--r", 2,
                 "--max-length", 64, "--eval-steps", 12, "--test-split", 0.2, "-o", tmp_path / "run")  # fmt: skip
    assert done.exit_code == 0 and "training" not in done.stderr and "held-out" in done.stdout


def test_a_line_every_minute(capfd, monkeypatch):
    class State:
        global_step, max_steps, is_world_process_zero = 0, 1000, True

    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    lines, state = ProgressLines(), State()
    lines.on_train_begin(None, state, None)
    for step in range(1, 31):
        state.global_step, now[0] = step, 25.0 * step
        lines.on_log(None, state, None, logs={"loss": 1.0})
    said = capfd.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in said] == [f"step {n}/1000" for n in range(3, 31, 3)]
    assert said[0] == "step 3/1000, loss 1.0000, 6:55:25 left"


def test_a_name_that_may_be_a_mistyped_path_is_told_in_seconds(no_hub):
    started = time.perf_counter()
    for load in (load_tokenizer, load_model):
        with pytest.raises(HotLoraError, match="'typo/typo' is no folder here, and the Hub cannot be reached"):
            load("typo/typo")
    with pytest.raises(HotLoraError, match="'typo/typo' is no file or folder here, and the Hub cannot be reached"):
        load_examples("typo/typo")
    assert time.perf_counter() - started < 10


def test_attention_that_cannot_be_is_told_with_what_is_allowed(here: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("hotlora.runs.training.load_base", lambda *a, **k: pytest.fail("a model was loaded"))
    for name in ("foo", "flash_attention_2"):
        with pytest.raises(HotLoraError, match=f"attn_implementation = '{name}' cannot .*leave it out, or give .*sdpa"):
            run_training(str(here / "model"), str(here / "rows.jsonl"), tmp_path, attn_implementation=name)
        with pytest.raises(HotLoraError, match=f"attn_implementation = '{name}' cannot"):
            load_model("nano", attn_implementation=name)
