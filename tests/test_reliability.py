"""Runs that are killed, ended, filled up or damaged: what was good is kept, and the message says where."""

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_train import CONFIG, EXAMPLES, TOKENIZER, adapted, adapter_tensors, dataset
from tiny import tiny_model, tiny_plan

from hotlora import HotLoraConfig, RoutingProfile, load_adapter
from hotlora.adapter.mask import SparseMask
from hotlora.base.errors import DataError, FileError, HotLoraError
from hotlora.base.lock import locked
from hotlora.tasks import Example
from hotlora.tasks.data import load_examples
from hotlora.tasks.tokens import tokenize
from hotlora.training import checkpoints
from hotlora.training.trainer import train

posix = pytest.mark.skipif(os.name != "posix", reason="signals, locks and limits of POSIX")


def script(name: str, *words: object) -> dict:
    """The JSON that one of the scripts beside the tests prints. The folder, which is given first, must exist."""
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests.parent}:{tests}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(tests / name), *map(str, words)],
        env=environment, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@posix
@pytest.mark.parametrize(
    ("kills", "way"),
    [
        (4, "lora"), (4, "dr-lora"), (3, "fft"), pytest.param(20, "lora", marks=pytest.mark.slow),
        pytest.param(8, "offload", marks=pytest.mark.slow),
        pytest.param(8, "offload-quantized", marks=pytest.mark.slow),
        pytest.param(8, "perft-r", marks=pytest.mark.slow), pytest.param(8, "dense-mixer", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_killed_in_any_stage_a_run_ends_as_a_calm_one(tmp_path: Path, kills: int, way: str):
    report = script("killed_run.py", tmp_path, 0, kills, way)
    assert [kill["code"] for kill in report["kills"]] == [-9] * kills
    assert {kill["kind"] for kill in report["kills"]} == {"step", "save", "time"}
    assert report["code"] == 0 and all(report["same"].values()) and not report["leftovers"]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return script("ended_runs.py", tmp_path_factory.mktemp("ended"), 1)


@posix
def test_sigterm_saves_and_exits_with_143(ended: dict):
    report = ended["sigterm"]
    assert report["code"] == 143 and report["checkpoint"] == report["steps"] >= 4
    assert f"stopped by SIGTERM after step {report['steps']} of 24" in report["said"]
    assert "Traceback" not in report["said"] and (report["status"], report["again"]) == ("failed", 0)
    assert report["resumed_from"] == report["steps"] and report["same"], "the same command goes on to the same end"


@posix
def test_ctrl_c_saves_and_says_how_to_go_on(ended: dict):
    report = ended["ctrl-c"]
    assert report["code"] == 130 and report["checkpoint"] == report["steps"] >= 4, report
    assert "Ctrl-C: saving a checkpoint after this step" in report["said"]
    assert f"stopped by Ctrl-C after step {report['steps']} of 24" in report["said"]
    assert "is whole: rerun the same command to resume from it" in report["said"]
    assert "Traceback" not in report["said"] and not report["left"] and report["status"] == "failed"
    assert report["again"] == 0 and report["resumed_from"] == report["steps"] and report["same"]


@posix
@pytest.mark.parametrize("stage", ["loading", "profiling"])
def test_ctrl_c_before_training_leaves_nothing_half_written(ended: dict, stage: str):
    report = ended[f"ctrl-c-{stage}"]
    assert report["code"] == 130 and report["steps"] == 0, report
    assert "stopped by Ctrl-C: nothing is half-written; run the same command again to resume" in report["said"]
    assert "Traceback" not in report["said"] and not report["left"] and report["again"] == 0 and report["same"]


@posix
def test_a_second_ctrl_c_ends_at_once(ended: dict):
    report = ended["ctrl-c-twice"]
    assert report["code"] == -2 and report["steps"] == 3 and report["checkpoint"] == 0, "killed in the first save"
    assert report["status"] == "running" and report["again"] == 0 and report["same"]


@posix
def test_sigterm_to_a_sweep_lets_its_worker_save(ended: dict):
    report = ended["sweep"]
    assert report["code"] == 143 and "Traceback" not in report["said"], report["said"]
    assert report["resumed_from"] == report["steps"] >= 4 and report["again"] == 0 and report["same"]


@posix
def test_a_second_run_in_the_folder_is_refused(ended: dict):
    report = ended["two"]
    assert report["code"] == 1 and f"both is in use by process {report['first']} on" in report["said"]
    assert report["first_code"] == 0 and report["same"], "the first one did not notice"


@posix
@pytest.mark.parametrize("kind", ["full", "limit"])
def test_a_full_disk_leaves_the_checkpoint_before_whole(ended: dict, kind: str):
    if ended[kind] is None:
        pytest.skip("this system gives an unprivileged process no disk of its own (user namespaces are off)")
    for report in ended[kind]:
        before = report["step"] - 3
        assert report["code"] == 1 and report["checkpoint"] == before, report
        assert f"checkpoint-{report['step']}" not in report["left"], "what was half written takes no room"
        assert "/checkpoints cannot be written to: the disk or a quota is full" in report["said"]
        assert f"checkpoint-{before} is whole: rerun the same command to resume from it" in report["said"]
        assert "Traceback" not in report["said"]
        assert report["again"] == 0 and report["resumed_from"] == before and report["same"]


@posix
def test_a_lock_is_the_processs_own_and_may_be_taken_again(tmp_path: Path):
    code = (
        "import sys\nfrom hotlora.base.lock import locked\n"
        "try:\n    with locked(sys.argv[1]): pass\nexcept Exception as error: print(type(error).__name__, error)"
    )
    other = [sys.executable, "-c", code, str(tmp_path)]
    (tmp_path / ".0123456789ab-run.json").write_text("half")
    with locked(tmp_path), locked(tmp_path):
        said = subprocess.run(other, capture_output=True, text=True, check=True).stdout
        assert said.startswith(f"HotLoraError {tmp_path} is in use by process {os.getpid()} on")
    assert subprocess.run(other, capture_output=True, text=True, check=True).stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == [".lock"], "what a killed process left half-written is gone"
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be written to"), locked(tmp_path / "file" / "folder"):
        pass


# Numbers that are none


@pytest.fixture
def poisoned() -> list[Example]:
    """24 examples, and one with a byte whose embedding is no number."""
    return [*EXAMPLES[:17], Example("17 and 3 ~", " make 20"), *EXAMPLES[17:]]


def poisoned_model():
    base = tiny_model("olmoe", vocab_size=259)
    base.get_input_embeddings().weight.data[TOKENIZER("~")["input_ids"][0]] = torch.nan
    torch.manual_seed(0)
    return get_peft_model(base, HotLoraConfig(plan=tiny_plan(base), r=4, lora_alpha=8))


@pytest.mark.parametrize("packing", [False, True])
def test_a_loss_that_is_no_number_names_the_step_and_its_examples(tmp_path: Path, poisoned, packing: bool):
    config = replace(CONFIG, save_steps=1, max_steps=20, packing=packing, batch_size=2 if packing else 4)
    with pytest.raises(HotLoraError, match=r"step (\d+): the loss is nan and the norm of the grad.*nan") as caught:
        train(poisoned_model(), TOKENIZER, tokenize(poisoned, TOKENIZER, 64), config, tmp_path)
    message = str(caught.value)
    step = int(message.partition("step ")[2].partition(":")[0])
    named = message.partition("examples ")[2].partition(" (")[0].split(", ")
    assert "17" in named and (packing or len(named) == 4)
    last = checkpoints.last_whole(tmp_path / "checkpoints")
    assert checkpoints.step_of(last) == step - 1, "the step is not saved"
    if last is not None:
        assert f"the last good adapter is in {last}." in message
        weights = load_adapter(tiny_model("olmoe", vocab_size=259), last).state_dict()
        assert all(tensor.isfinite().all() for name, tensor in weights.items() if "lora_" in name)
    assert [row["step"] for row in checkpoints.read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, step))


def test_examples_that_are_left_out_do_not_shift_the_names(tmp_path: Path, poisoned):
    data = tokenize([Example("x" * 90, "y"), *poisoned], TOKENIZER, 64)
    with pytest.raises(HotLoraError, match=r"examples (\d+, )*18[ ,]"):
        train(poisoned_model(), TOKENIZER, data, replace(CONFIG, max_steps=20), tmp_path)


def test_weights_that_overflow_are_not_saved(tmp_path: Path):
    config = replace(CONFIG, learning_rate=1e38, lr_scheduler="constant", max_grad_norm=0.0, save_steps=1)
    with pytest.raises(HotLoraError, match=r"step \d: (.*not finite|the loss is).*no checkpoint before|last good"):
        train(adapted(), TOKENIZER, dataset(), config, tmp_path)
    for path in (tmp_path / "checkpoints").glob("*/adapter_model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


# Damage


def flip(path: Path, at: int = -7) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """A training's folder, and the adapter that came of it."""
    folder, model = tmp_path_factory.mktemp("calm"), adapted()
    train(model, TOKENIZER, dataset(), CONFIG, folder)
    return folder, adapter_tensors(model)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "complete.json"])
def test_a_damaged_checkpoint_is_left_out_for_the_one_before(tmp_path: Path, caplog, calm: tuple, name: str):
    shutil.copytree(calm[0], tmp_path / "run")
    flip(tmp_path / "run" / "checkpoints" / "checkpoint-6" / name)
    model = adapted()
    with caplog.at_level(logging.WARNING, logger="hotlora"):
        result = train(model, TOKENIZER, dataset(), CONFIG, tmp_path / "run")
    (warning,) = [r.getMessage() for r in caplog.records if "damaged" in r.getMessage()]
    assert "checkpoint-6 is damaged" in warning and name in warning and "from the one before" in warning
    assert result.resumed_from == 4
    for key, tensor in calm[1].items():
        assert torch.equal(adapter_tensors(model)[key], tensor)
    assert checkpoints.damage(tmp_path / "run" / "checkpoints" / "checkpoint-6") is None, "written anew"


def test_checkpoints_of_before_there_were_hashes_are_whole(tmp_path: Path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "weights").write_bytes(b"12345")
    (tmp_path / "checkpoint-3" / "complete.json").write_text('{"version": 1, "files": {"weights": 5}}')
    assert checkpoints.last_whole(tmp_path) == tmp_path / "checkpoint-3"
    (tmp_path / "checkpoint-3" / "weights").write_bytes(b"1234")
    assert checkpoints.last_whole(tmp_path) is None


def test_damaged_metrics_are_named(tmp_path: Path, calm: tuple):
    shutil.copytree(calm[0], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for line in (b"[1]\n", b'{"loss": 1}\n', b'{"step": "2"}\n', b"\xff\n"):
        path.write_bytes(lines[0] + line + b"".join(lines[2:]))
        with pytest.raises(FileError, match=r"metrics\.jsonl, line 2 is no row of metrics"):
            train(adapted(), TOKENIZER, dataset(), CONFIG, tmp_path)
    path.write_bytes(b"".join(lines) + b"\0\0\n")  # past what the checkpoint needs
    train(adapted(), TOKENIZER, dataset(), CONFIG, tmp_path)


@pytest.mark.parametrize("kind", ["profile", "mask"])
def test_every_flipped_byte_of_a_profile_or_mask_is_found(tmp_path: Path, kind: str):
    file = tmp_path / f"{kind}.safetensors"
    if kind == "profile":
        numbers = torch.arange(16).view(2, 8)
        RoutingProfile((0, 1), numbers, numbers.double(), 60, 1, {"data": "x"}).save(file)
        load = RoutingProfile.load
    else:
        bits = {"a.lora_B": torch.tensor([255, 3, 0], dtype=torch.uint8)}
        SparseMask(bits, {"a.lora_B": (4, 6)}, 0.4, "model", 0, {"seed": 0}).save(file)
        load = SparseMask.load
    whole = load(file)
    content = file.read_bytes()
    for at in range(0, len(content), 3):
        flip(file, at)
        try:
            found = load(file)
        except FileError as error:
            assert str(file) in str(error) and "make it again" in str(error)
        else:  # the JSON head has spaces and names that say nothing
            assert repr(vars(found)) == repr(vars(whole)), at
        file.write_bytes(content)
    with safe_open(file, "pt") as stored:
        tensors, head = {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata()
    save_file(tensors, file, {key: value for key, value in head.items() if key != "sha256"})
    assert repr(vars(load(file))) == repr(vars(whole)), "files of before there was a hash"


def test_a_damaged_data_shard_is_named(tmp_path: Path):
    import gzip

    shard = tmp_path / "shard.jsonl.gz"
    rows = "".join(json.dumps({"prompt": e.prompt, "completion": e.completion}) + "\n" for e in EXAMPLES)
    content = gzip.compress(rows.encode())
    for at in range(0, len(content), 3):
        shard.write_bytes(content)
        flip(shard, at)
        try:
            found = load_examples(str(shard))
        except DataError as error:
            assert "shard.jsonl.gz" in str(error)
        else:
            assert found == EXAMPLES, "gzip's head holds a time and a system, too"
