"""A run's record: written whole, read with checks."""

import json
import platform
from datetime import datetime
from pathlib import Path

import pytest
import torch

from hotlora.base.errors import FileError
from hotlora.base.records import (
    environment,
    find_records,
    new_record,
    peak_memory_bytes,
    read_record,
    reset_peak_memory,
    validate,
    write_record,
)

MODEL = {"name": "nano", "fingerprint": "olmoe-3f2a91c0b4d7"}
RESULT = {"metric": "exact_match", "accuracy": 0.62, "n": 200, "correct": 124}


def make(**fields):
    return new_record(name="hot 25%", condition="hot", model=MODEL, data={"name": "nano-math"}, **fields)


def test_a_new_record_says_what_runs_where():
    record = make(seed=3, config={"r": 8})
    assert (record["version"], record["status"], record["seed"]) == (1, "running", 3)
    assert record["config"] == {"r": 8}
    assert datetime.fromisoformat(record["started"]).tzinfo is not None
    assert record["environment"]["torch"].split("+")[0] == torch.__version__.split("+")[0]  # the build may be left out


def test_write_and_read(tmp_path):
    record = make(evaluation={"nano-math": RESULT}, own_key=[1, 2]) | {"status": "done", "seconds": 1.5}
    path = write_record(tmp_path / "hot", record)
    assert path == tmp_path / "hot" / "run.json"
    assert read_record(path) == read_record(tmp_path / "hot") == record
    assert list(json.loads(path.read_text()))[:3] == ["version", "name", "condition"]


def test_a_diverged_loss_can_be_recorded(tmp_path):
    write_record(tmp_path, make(training={"loss_last": float("nan")}))
    assert read_record(tmp_path)["training"]["loss_last"] is None


def test_find_records_by_folder(tmp_path):
    for name in ("b", "a/deep"):
        write_record(tmp_path / name, make())
    assert list(find_records(tmp_path)) == [tmp_path / "a" / "deep", tmp_path / "b"]
    (tmp_path / "empty").mkdir()
    assert find_records(tmp_path / "empty") == {}
    write_record(tmp_path / "b" / "warmup", make())  # a stage of b
    assert list(find_records(tmp_path)) == [tmp_path / "a" / "deep", tmp_path / "b"]
    assert list(find_records(tmp_path / "b")) == [tmp_path / "b"]
    with pytest.raises(FileError, match="none is not a folder"):
        find_records(tmp_path / "none")
    (tmp_path / "b" / "run.json").write_text('{"version": 1')
    with pytest.raises(FileError, match="cut short"):
        find_records(tmp_path)


@pytest.mark.parametrize("key", ["name", "condition", "status", "seed", "started", "model", "data"])
def test_a_missing_key_is_named(tmp_path, key):
    record = make()
    del record[key]
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(FileError, match=rf"run\.json lacks '{key}'"):
        read_record(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "x/run.json has version 2, and this hotlora reads 1"),
        ({"status": "ok"}, "status is 'ok'; it must be one of running, done, failed"),
        ({"seed": "0"}, "seed is '0'; it must be of type int"),
        ({"seed": True}, "seed is True"),
        ({"model": {"name": "nano"}}, "model lacks 'fingerprint'"),
        ({"plan": ["x"]}, "plan is .* must be an object"),
        ({"parameters": {"trainable": 1}}, "parameters lacks 'total'"),
        ({"evaluation": {"math": {"metric": "m", "n": 1}}}, "evaluation of math lacks 'accuracy'"),
        ({"evaluation": {"math": 0.5}}, "evaluation of math is 0.5"),
    ],
)
def test_a_wrong_value_is_named(change, says):
    with pytest.raises(FileError, match=says):
        validate(make() | change, "x/run.json")


def test_sections_that_a_run_does_not_have_may_be_absent_or_null():
    assert validate(make() | {"plan": None, "profile": None}, "x")["plan"] is None


def test_environment_and_memory():
    assert environment("mps")["device"].endswith(", mps"), "no CPU, and no GPU that CUDA sees"
    found = environment()
    assert set(found) == {"hotlora", "torch", "transformers", "peft", "trl", "python", "device", "git"}
    assert found["python"] == platform.python_version() and found["device"]
    json.dumps(found)
    peak = peak_memory_bytes()
    assert peak is not None and (torch.cuda.is_available() or peak > 50e6)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_the_peak_starts_anew():
    block = bytearray(b"x" * 300_000_000)
    high = peak_memory_bytes()
    del block
    reset_peak_memory()
    low = peak_memory_bytes()
    assert high is not None and low is not None and low < high - 200e6
