"""Trackers really run, where they are installed: what a training logs arrives in what they write."""

import inspect
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.integrations import TensorBoardCallback

from hotlora.base.errors import HotLoraError
from hotlora.runs.options import RunOptions
from hotlora.training.trackers import _writer, check_report_to, trackers

ROOT = Path(__file__).resolve().parents[1]
SHORT = (
    "train -m nano -d nano-math --limit 60 --test-limit 4 --eval-steps 2 --save-steps 2 --batch-size 4 --r 4 "
    "--max-length 48 --no-preflight --profile-fraction 0.2"
).split()


def test_names_of_trackers(monkeypatch: pytest.MonkeyPatch):
    installed: list[str] = ["tensorboard", "trackio"]
    monkeypatch.setattr(
        "hotlora.training.trackers.internal",
        lambda name: (lambda: installed) if "available" in name else {"tensorboard": 0, "trackio": 0, "wandb": 0},
    )
    assert trackers("none") == [] and trackers("all") == installed and trackers("trackio") == ["trackio"]
    assert trackers("tensorboard, trackio") == installed
    for name in ("", "nothing", "tensorboard,nothing", "all,trackio"):
        with pytest.raises(HotLoraError, match=f"report_to = '{name}' does not exist: it must be none, all, or some"):
            trackers(name)
    with pytest.raises(HotLoraError, match="'wandb' needs a package that is not installed: install wandb, or leave it"):
        trackers("tensorboard,wandb")
    installed.clear()
    with pytest.raises(HotLoraError, match="'all' finds no tracker that is installed: install one"):
        trackers("all")


def test_where_tensorboards_logs_go_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    """Its own default is runs/ of the working directory, where hotlora's runs are."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=dict))
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    assert _writer(tmp_path, 3) == {"log_dir": str(tmp_path / "logs"), "purge_step": 4}
    assert f"tensorboard: logs in {tmp_path / 'logs'}" in capfd.readouterr().err
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "mine")
    assert 'getenv("TENSORBOARD_LOGGING_DIR"' in inspect.getsource(TensorBoardCallback)
    assert _writer(tmp_path, 0) == {"log_dir": "mine", "purge_step": 1}


def run(folder: Path, *more: object, **environment: str) -> str:
    """The command in a process of its own, which logs where a test looks; what it said."""
    home = {"HOME": str(folder), "TRACKIO_DIR": str(folder / "trackio"), "WANDB_MODE": "offline", **environment}
    done = subprocess.run(
        [sys.executable, "-m", "hotlora", *SHORT, *map(str, more)], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **home},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr + done.stdout


def rows(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """As a tracker is to have them: `train/loss` and its like -> (step, value)."""
    found: dict[str, list[tuple[int, float]]] = {"train/loss": [], "eval/loss": [], "eval/exact_match": []}
    for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        for theirs, ours in (
            ("train/loss", "loss"),
            ("eval/loss", "eval_loss"),
            ("eval/exact_match", "eval_exact_match"),
        ):
            if ours in row:
                found[theirs].append((row["step"], pytest.approx(row[ours], rel=1e-6)))
    assert [step for step, _ in found["eval/loss"]] == [2, 4] and len(found["train/loss"]) == 4
    return found


def test_tensorboard(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = run(tmp_path, "-o", "out", "--max-steps", 3, "--report-to", "tensorboard")
    assert "tensorboard: logs in out/logs" in told
    (tmp_path / "out" / "checkpoints" / "checkpoint-3" / "complete.json").unlink()  # as if it was killed after step 2's
    run(tmp_path, "-o", "out", "--max-steps", 4, "--extend", "--report-to", "tensorboard")
    log = EventAccumulator(str(tmp_path / "out" / "logs"))
    log.Reload()
    for name, expected in rows(tmp_path / "out").items():
        assert [(event.step, event.value) for event in log.Scalars(name)] == expected


def trackio_rows(folder: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    (file,) = (folder / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        for name, text in database.execute("select run_name, metrics from metrics order by id"):
            row = json.loads(text)
            for key, value in row.items():
                found.setdefault(name, {}).setdefault(key, []).append((row["train/global_step"], value))
    return found


def test_trackio(tmp_path: Path):
    """Two runs in folders of one name are two; a run that goes on is one."""
    pytest.importorskip("trackio")
    for place in ("a/out", "b/out"):
        (tmp_path / place[0]).mkdir()
        run(tmp_path, "-o", place, "--max-steps", 2, "--report-to", "trackio")
        run(tmp_path, "-o", place, "--max-steps", 4, "--extend", "--report-to", "trackio")
    found = trackio_rows(tmp_path)
    assert sorted(name.rpartition("-")[0] for name in found) == ["a-out", "b-out"]
    for name, logged in found.items():
        for metric, expected in rows(tmp_path / name[0] / "out").items():
            assert logged[metric] == expected


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wandb: Any = pytest.importorskip("wandb")
    run(tmp_path, "-o", "out", "--max-steps", 2, "--report-to", "wandb")
    run(tmp_path, "-o", "out", "--max-steps", 4, "--extend", "--report-to", "wandb")
    name = (tmp_path / "out" / "logs" / "name.txt").read_text().strip()
    logs = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
    assert len(logs) == 2 and {file.stem for file in logs} == {f"run-{name.rpartition('-')[2]}"}, "one run"
    written = b"".join(file.read_bytes() for file in logs)
    for metric, values in rows(tmp_path / "out").items():
        assert written.count(metric.encode()) >= len(values)
    monkeypatch.delenv("WANDB_MODE", raising=False)

    def refuse() -> None:
        raise ValueError("No API key configured.")

    monkeypatch.setattr(wandb, "login", refuse)
    with pytest.raises(HotLoraError, match=r"'wandb' cannot be used here \(No API key configured\): set wandb up, or"):
        check_report_to("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_report_to("wandb")


def test_the_option_takes_several():
    assert RunOptions(model="nano", data="d", report_to="tensorboard,wandb").report_to == "tensorboard,wandb"
