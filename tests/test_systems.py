"""Windows and macOS, where there are none: what they refuse is refused here, and what they lack is taken away."""

import logging
import os
import sys
import tempfile
import time
from pathlib import PureWindowsPath
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model
from torch import Tensor
from windows import as_windows, refuse_what_is_open

import hotlora
from hotlora.adapter import offload
from hotlora.adapter.experts import HotExperts
from hotlora.base import lock
from hotlora.base.errors import DataError, FileError
from hotlora.base.tensor_files import load_tensors, save_tensors
from hotlora.cli import saved, talk
from hotlora.engines.expected import log_probs, tokens_asked
from hotlora.evaluation.score import _by_token
from hotlora.report import card
from hotlora.report.leaderboard_protocol import method_of
from hotlora.runs import load, worker_pool
from hotlora.runs.study import names_of
from hotlora.tasks import python_sandbox, stored
from hotlora.tasks.data import load_examples

BAD_ROWS = [{"prompt": "a", "completion": " b"}] * 3000 + [{"prompt": "a", "completion": 3}]


def test_what_is_scored_becomes_float64_on_the_cpu(monkeypatch):
    """A Mac's GPU (mps) has no float64."""
    cpu, double = Tensor.cpu, Tensor.double
    brought = []

    def bring(tensor):
        brought.append(cpu(tensor))
        return brought[-1]

    def widen(tensor):
        assert any(tensor is one for one in brought), "a tensor of the device"
        return double(tensor)

    model, texts = tiny_model("olmoe"), torch.tensor([[1, 2, 3, 4]])
    tokens = tokens_asked(model, texts)
    monkeypatch.setattr(Tensor, "cpu", bring)
    monkeypatch.setattr(Tensor, "double", widen)
    assert log_probs(model, texts, tokens).dtype == torch.float64
    found, _, _ = _by_token(model, {"input_ids": texts, "labels": texts})
    assert found.dtype == torch.float64 and found.shape == (1, 3)


def test_the_scalings_of_experts_are_float32_on_a_macs_gpu(monkeypatch):
    made = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda numbers, dtype, device: (made(numbers, dtype=dtype), device))
    for device, dtype in (("mps", torch.float32), ("cuda", torch.float64), ("cpu", torch.float64)):
        sent, there = HotExperts._sent(SimpleNamespace(_on_device={}), (0.5, 2.0), torch.device(device))
        assert sent.dtype == dtype and there.type == device


def test_a_file_is_written_again_while_what_was_read_of_it_is_in_use(tmp_path, monkeypatch):
    refuse_what_is_open(monkeypatch)
    file, kind = tmp_path / "profile.safetensors", {"format": "x", "version": "1"}
    save_tensors(file, {"counts": torch.arange(4096)}, {}, **kind)
    tensors, _ = load_tensors(file, **kind, what="x", fix="make it")
    save_tensors(file, {"counts": torch.zeros(4096)}, {}, **kind)
    assert torch.equal(tensors["counts"], torch.arange(4096))


def test_a_row_that_is_refused_leaves_no_file_open(tmp_path, monkeypatch):
    """Else the error is that of the file, which cannot be deleted, instead of the row's."""
    refuse_what_is_open(monkeypatch)
    with pytest.raises(DataError, match="line 3001"):
        load_examples(BAD_ROWS)
    with pytest.raises(DataError, match="line 3001"):
        hotlora.evaluate("nano", BAD_ROWS, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="line 3001"):
        hotlora.profile("nano", BAD_ROWS, progress=False)


def test_what_cannot_be_deleted_hides_no_error(tmp_path, monkeypatch):
    """As while a scanner for viruses reads it."""
    refuse_what_is_open(monkeypatch)
    held = []

    def hold(_, source, *__, **___):
        held.append(open(source))
        raise DataError("the row is wrong")

    monkeypatch.setattr("hotlora.runs.evaluation.run_evaluation", hold)
    with pytest.raises(DataError, match="the row is wrong"):
        hotlora.evaluate("nano", BAD_ROWS, tmp_path / "out", progress=False)
    held[0].close()


def test_a_drives_letter_is_no_task():
    assert names_of(["C:/data/rows.jsonl", "gsm8k:D:/gsm8k", "openai/math:main"]) == ["rows", "gsm8k", "math"]
    for data, method in (("C:/rows.jsonl", "hot"), ("gsm8k:C:/rows", "rows/hot"), ("openai/rows:main", "hot")):
        record = {"condition": "rows/hot", "data": {"name": data}, "model": {"name": "nano"}}
        assert method_of(record) == method


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("C:\\Users\\me\\rows.jsonl", "rows.jsonl"),
        ("C:\\Users\\me\\model", "model"),
        ("C:/model", "model"),
        ("gsm8k:C:\\Users\\me\\gsm8k", "gsm8k"),
        ("gsm8k:/home/me/gsm8k", "gsm8k"),
        ("openai/gsm8k:main", "openai/gsm8k:main"),
        ("allenai/OLMoE-1B-7B-0924", "allenai/OLMoE-1B-7B-0924"),
    ],
)
def test_a_card_tells_a_path_of_windows_by_its_last_name(name, told):
    assert card._shared(name) == told


def test_an_adapters_name_on_the_hub_reaches_it_by_windows_paths(monkeypatch):
    """As the command line makes them: o/n becomes o\\n."""
    asked, name = [], PureWindowsPath("lab/mine")

    def ask(name: str) -> None:
        asked.append(name)
        raise FileError("enough")

    monkeypatch.setattr(load, "adapter_on_hub", ask)
    for way in (
        lambda: load.load(name), lambda: load.load_adapter(tiny_model(), name), lambda: saved.noted(name, None),
        lambda: talk.chat.__wrapped__(name), lambda: talk.generate.__wrapped__("2 + 2 =", name),
    ):  # fmt: skip
        with pytest.raises(FileError, match="enough"):
            way()
    assert asked == ["lab/mine"] * 5
    monkeypatch.setattr(load, "adapter_on_hub", lambda name: None)
    assert load.find(PureWindowsPath("lab/moe")).model == "lab/moe", "a model's name"


class Console:
    """sys.stdout of a console on Windows, after another file took its descriptor."""

    def write(self, text=""):
        raise OSError(6, "The handle is invalid")

    flush = write


def test_a_workers_output_goes_to_its_log_in_a_console(tmp_path, monkeypatch):
    console = Console()
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setattr(sys, "stderr", console)
    log = logging.getLogger("test_systems")
    for name in ("first", "second"):
        with pytest.raises(RuntimeError, match="the run's own"), worker_pool._output_to(tmp_path / f"{name}.txt"):
            if not log.handlers:
                log.addHandler(logging.StreamHandler())
            print(f"{name} ✓")
            print(f"{name} error", file=sys.stderr)
            os.write(1, b"of C\n")
            log.warning("logged")
            raise RuntimeError("the run's own")
        assert sys.stdout is console and sys.stderr is console
        told = (tmp_path / f"{name}.txt").read_text("utf-8")
        assert told == f"{name} ✓\n{name} error\nof C\nlogged\n"
    log.handlers.clear()


@pytest.mark.parametrize(
    ("system", "error", "is_ended"),
    [("posix", KeyboardInterrupt, True), ("nt", KeyboardInterrupt, False), ("nt", RuntimeError, True)],
)
def test_ctrl_c_kills_no_worker_on_windows(tmp_path, monkeypatch, system, error, is_ended):
    """There `terminate` ends a process at once; Ctrl-C in the console reaches all of them."""
    if system == "nt":
        as_windows(monkeypatch, worker_pool)
    did = []
    worker = SimpleNamespace(job=None, connection=0, process=SimpleNamespace(terminate=lambda: did.append("terminate")))
    worker.start = lambda job: setattr(worker, "job", job) or setattr(job, "status", "running")
    worker.end = lambda: did.append("end")

    def idle(workers, processes):
        workers.append(worker)
        return worker

    def wait(connections):
        raise error

    monkeypatch.setattr(worker_pool, "_idle", idle)
    monkeypatch.setattr(worker_pool, "wait", wait)
    with pytest.raises(error):
        worker_pool.run_jobs([worker_pool.Job("a", tmp_path, print)], 1, print)
    assert did == (["terminate", "end"] if is_ended else ["end"])


def test_windows_offloads_to_no_file(tmp_path, monkeypatch):
    as_windows(monkeypatch, offload)
    with pytest.raises(FileError, match=r"Windows deletes no file that is mapped.*--quantize 4"):
        offload.MappedFolder(tmp_path)


def test_leftovers_go_where_there_are_no_locks(tmp_path, monkeypatch):
    """Windows: what is old and not in use."""
    refuse_what_is_open(monkeypatch)
    monkeypatch.setattr(lock, "fcntl", None)
    monkeypatch.setattr(stored, "fcntl", None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = ["old", "open", "new"]
    for name in names:
        rows = tmp_path / f"hotlora-rows-{name}" / "rows.arrow"
        rows.parent.mkdir()
        half = tmp_path / "run" / f".0123456789ab-{name}"
        half.parent.mkdir(exist_ok=True)
        for file in (rows, half):
            file.write_text("text")
            if name != "new":
                os.utime(file, (time.time() - 200_000,) * 2)
    with open(tmp_path / "hotlora-rows-open" / "rows.arrow"), open(tmp_path / "run" / ".0123456789ab-open"):
        stored._remove_leftovers()
        with lock.locked(tmp_path / "run"):
            assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
                ".0123456789ab-new", ".0123456789ab-open",
            ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hotlora-rows-new", "hotlora-rows-open", "run"]
    with lock.locked(tmp_path / "not" / "there"):
        pass


def test_a_mac_has_limits_alone_and_says_what_they_leave_open(monkeypatch, caplog):
    monkeypatch.setattr(sys, "platform", "darwin")
    for level in ("namespaces", "bubblewrap"):
        with pytest.raises(python_sandbox._NoSuchLevelError, match="it needs Linux"):
            python_sandbox._run("x = 1", level, 10, 512)
    done = python_sandbox.subprocess.CompletedProcess([], 0, b'{"passed": true, "error": null}', b"")
    monkeypatch.setattr(python_sandbox.subprocess, "run", lambda *_, **__: done)
    assert python_sandbox.sandbox_level.__wrapped__() == "limits"
    assert "can read and write what you can, and take all memory: namespaces: it needs Linux" in caplog.text
