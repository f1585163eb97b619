"""More steps for a run that has ended: as one that was that long from the start, where its rate is."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import run_method, run_training
from safetensors.torch import load_file, save_file
from tiny_files import save_tiny_model, write_sums
from tiny_tokenizer import byte_tokenizer

import hotlora
from hotlora.base.errors import FileError, HotLoraError
from hotlora.base.files import sha256_file
from hotlora.base.records import read_record
from hotlora.training import checkpoints
from hotlora.training import sft_trainer as trainer

TOKENIZER = byte_tokenizer()
SHORT = {
    "batch_size": 4, "save_steps": 4, "r": 4, "lora_alpha": 8, "max_length": 64, "lr_scheduler": "constant",
    "lora_dropout": 0.1, "learning_rate": 3e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    return save_tiny_model(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 rows: six steps an epoch."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    return write_sums(file)


def weights(run: Path) -> bytes:
    adapter = run / "adapter" / "adapter_model.safetensors"
    return (adapter if adapter.is_file() else run / "model" / "model.safetensors").read_bytes()


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("options", "first", "then"),
    [
        ({}, {"epochs": 1}, {"epochs": 2.5}),
        ({"lr_scheduler": "constant_with_warmup", "warmup_steps": 3}, {"max_steps": 3}, {"epochs": 1}),
        ({"full": True}, {"max_steps": 3}, {"max_steps": 6}),  # the family's own files have experts one by one
    ],
)
def test_an_extended_run_is_one_that_was_trained_in_one_go(model, data, tmp_path, options, first, then):
    run, whole, options = tmp_path / "run", tmp_path / "whole", {**SHORT, **options}
    ended = run_training(model, data, run, **options, **first)
    longer = run_training(model, data, run, **options, **then, extend=True)
    run_training(model, data, whole, **options, **then)
    assert weights(run) == weights(whole)
    same = ("step", "loss", "learning_rate", "grad_norm", "tokens", "epoch")
    assert [[row[n] for n in same] for row in metrics(run)] == [[row[n] for n in same] for row in metrics(whole)]
    before = ended["training"]["steps"]
    assert longer["training"]["extended"] == [{"step": before, "max_steps": before}]
    assert ended["training"]["extended"] == []
    assert (longer["status"], longer["training"]["resumed_from"]) == ("done", before)
    # The same command again changes nothing, with and without the word.
    for extend in (True, False):
        assert run_training(model, data, run, **options, **then, extend=extend) == longer


def test_a_full_checkpoint_that_lacks_weights_is_refused(model, data, tmp_path):
    """As one whose experts have the names of the family's own files: transformers would go on with the base's."""
    options = {**SHORT, "full": True}
    run_training(model, data, tmp_path / "run", **options, max_steps=3)
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-3"
    kept = load_file(checkpoint / "model.safetensors")
    whole = hotlora.load_model(str(tmp_path / "run" / "model")).state_dict()
    assert kept.keys() == whole.keys() and all(torch.equal(kept[name], whole[name]) for name in kept)
    lost = [name for name in kept if name.endswith("experts.down_proj")]
    save_file({name: kept[name] for name in kept if name not in lost}, checkpoint / "model.safetensors")
    checkpoints.mark_complete(checkpoint)
    with pytest.raises(FileError, match=f"checkpoint-3.*{len(lost)} of the model's weights are not in it, such as"):
        run_training(model, data, tmp_path / "run", **options, max_steps=6, extend=True)


@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
def test_the_rate_goes_on_as_in_a_schedule_of_the_new_length(model, data, tmp_path, capfd, scheduler):
    """Also in the first step, whose rate transformers takes from the checkpoint: there it is 0."""
    options = {**SHORT, "lr_scheduler": scheduler, "warmup_ratio": 0.5}
    run_training(model, data, tmp_path / "run", **options, max_steps=4)
    run_training(model, data, tmp_path / "run", **options, max_steps=12, extend=True)
    # The warm-up is that of the run as it began, 2 steps, and is not made longer.
    run_training(model, data, tmp_path / "whole", **options | {"warmup_steps": 2}, max_steps=12)
    extended, whole = metrics(tmp_path / "run"), metrics(tmp_path / "whole")
    assert extended[3]["learning_rate"] < whole[3]["learning_rate"]
    assert [row["learning_rate"] for row in extended[4:]] == [row["learning_rate"] for row in whole[4:]]
    assert extended[4]["learning_rate"] > 1e-3
    said = capfd.readouterr().err
    assert f"from step 4 on the learning rate is that of a {scheduler} schedule of 12 steps" in said


def test_an_extension_that_is_killed_goes_on(model, data, tmp_path, monkeypatch):
    run, calm = tmp_path / "run", tmp_path / "calm"
    first, then = {**SHORT, "lr_scheduler": "linear", "max_steps": 3}, {**SHORT, "lr_scheduler": "linear", "epochs": 2}
    run_training(model, data, run, **first)
    shutil.copytree(run, calm)
    run_training(model, data, calm, **then, extend=True)
    real = trainer.Trainer.training_step
    for steps, extend in ((0, True), (5, False)):  # before and after a checkpoint of its own
        left = [steps]

        def dying(*args, left=left, **kwargs):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return real(*args, **kwargs)

        monkeypatch.setattr(trainer.Trainer, "training_step", dying)
        with pytest.raises(KeyboardInterrupt):
            run_training(model, data, run, **then, extend=extend)
    monkeypatch.setattr(trainer.Trainer, "training_step", real)
    record = run_training(model, data, run, **then)
    assert weights(run) == weights(calm) and record["training"]["resumed_from"] == 8
    assert record["training"]["extended"] == [{"step": 3, "max_steps": 3}]
    assert [row["loss"] for row in metrics(run)] == [row["loss"] for row in metrics(calm)]


def test_twice_extended(model, data, tmp_path):
    for steps in (2, 3, 4):
        record = run_training(model, data, tmp_path / "run", **SHORT, max_steps=steps, extend=steps > 2)
    run_training(model, data, tmp_path / "whole", **SHORT, max_steps=4)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert [entry["step"] for entry in record["training"]["extended"]] == [2, 3]


def test_what_cannot_be_extended_is_told_before_a_model_is_loaded(model, data, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with pytest.raises(HotLoraError, match="holds no run to extend: leave --extend out"):
        run_training(model, data, run, **SHORT, max_steps=6, extend=True)
    assert not run.exists()
    run_training(model, data, run, **SHORT, max_steps=6)
    monkeypatch.setattr("hotlora.runs.training.load_base", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(HotLoraError, match=r"--max-steps 9 against 6.*or --extend to train this one on"):
        run_training(model, data, run, **SHORT, max_steps=9)
    for less in ({"max_steps": 5}, {"epochs": 0.9}):
        with pytest.raises(HotLoraError, match=r"has 6 steps \(1 epochs\) already.*give more"):
            run_training(model, data, run, **SHORT, **less, extend=True)
    with pytest.raises(HotLoraError, match=r"another run: --learning-rate 0.1 against 0.003 \(now"):
        run_training(model, data, run, **{**SHORT, "learning_rate": 0.1}, max_steps=9, extend=True)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(HotLoraError, match="has no whole checkpoint to go on from"):
        run_training(model, data, run, **SHORT, max_steps=9, extend=True)


def test_the_best_weights_and_the_patience_of_an_extended_run(model, tmp_path):
    """Held-out rows that say the opposite: after some steps their loss grows."""
    for name, answer in (("train", " yes it is"), ("test", " q!#~ 0^Z")):
        rows = [{"prompt": f"is {i} a number?", "completion": answer} for i in range(24)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        **SHORT, "learning_rate": 2e-2, "eval_steps": 2, "load_best": True, "test_data": str(tmp_path / "test.jsonl"),
    }  # fmt: skip
    data, run = str(tmp_path / "train.jsonl"), tmp_path / "run"
    # It ends past its best step; more steps do not begin at the best weights, but where it ended.
    first = run_training(model, data, run, **options, max_steps=12)
    assert first["training"]["best_step"] < 12
    best = weights(run)
    longer = run_training(model, data, run, **options, max_steps=16, extend=True)
    assert longer["training"]["best_step"] == first["training"]["best_step"] and weights(run) == best
    last, before = (load_file(run / "checkpoints" / f"checkpoint-{n}" / "adapter_model.safetensors") for n in (16, 12))
    assert any(not torch.equal(last[name], before[name]) for name in last)

    patient = {**options, "early_stopping_patience": 2, "max_steps": 40}
    stopped = run_training(model, data, tmp_path / "stopped", **patient)
    ended = stopped["training"]["steps"]
    assert ended < 40
    with pytest.raises(HotLoraError, match=r"ended by early stopping.*--early-stopping-patience"):
        run_training(model, data, tmp_path / "stopped", **{**patient, "max_steps": 50}, extend=True)
    more = {**patient, "early_stopping_patience": None, "max_steps": ended + 4}
    record = run_training(model, data, tmp_path / "stopped", **more, extend=True)
    assert record["training"]["steps"] == ended + 4
    assert record["training"]["extended"] == [{"step": ended, "max_steps": 40}]


def test_a_sparse_run_keeps_its_mask(model, data, tmp_path):
    options = {**SHORT, "lora_dropout": 0.0, "method": "lori-s"}
    run_method(model, data, tmp_path / "run", **options, max_steps=4)
    dense = read_record(tmp_path / "run" / "dense")
    run_method(model, data, tmp_path / "run", **options, max_steps=8, extend=True)
    mask = tmp_path / "run" / "mask.safetensors"
    run_method(model, data, tmp_path / "whole", **{**options, "max_steps": 8, "mask": mask})
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert read_record(tmp_path / "run" / "dense") == dense
    record = read_record(tmp_path / "run")
    assert record["training"]["steps"] == 8
    # Older runs hold the hash of the mask's file, not of what is in it.
    for name in ("run.json", "train.json"):
        held = json.loads((tmp_path / "run" / name).read_text())
        (held["config"] if name == "run.json" else held)["mask_hash"] = sha256_file(mask)
        (tmp_path / "run" / name).write_text(json.dumps(held))
    again = run_method(model, data, tmp_path / "run", **options, max_steps=8, extend=True)
    assert again["training"] == record["training"] and again["started"] == record["started"]
