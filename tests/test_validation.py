"""Held-out losses during training: what is written, which weights are kept, when it ends, also where it was killed."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import run_method, run_options, run_training
from safetensors.torch import load_file, save_file
from tiny_files import save_tiny_model
from tiny_tokenizer import byte_tokenizer

import hotlora
from hotlora.base.errors import DataError, HotLoraError
from hotlora.base.records import read_record
from hotlora.evaluation.score import response_loss
from hotlora.routing.profile import RoutingProfile
from hotlora.runs import training
from hotlora.tasks import Example
from hotlora.tasks.data import load_examples
from hotlora.tasks.split import held_out
from hotlora.tasks.tokens import tokenize
from hotlora.training.validation import Validation

TOKENIZER = byte_tokenizer()
SHORT = {
    "max_steps": 8, "batch_size": 4, "save_steps": 3, "r": 4, "lora_alpha": 8, "max_length": 64, "eval_steps": 2,
    "lr_scheduler": "constant",
}  # fmt: skip


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    return save_tiny_model(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Training rows, and held-out rows that say the opposite: after some steps their loss grows."""
    folder = tmp_path_factory.mktemp("rows")
    for name, answer in (("train", " yes it is"), ("test", " q!#~ 0^Z")):
        rows = [{"prompt": f"is {i} a number?", "completion": answer} for i in range(24)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "train.jsonl"), str(folder / "test.jsonl")


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def held_out_loss(run: Path, data: tuple[str, str]) -> float:
    model, tokenizer = hotlora.load(run)
    return response_loss(model, tokenizer, tokenize(load_examples(data[1]), tokenizer, 64), batch_size=64)


def test_losses_are_written_and_training_is_not_touched(model_folder, data, tmp_path):
    record = run_training(model_folder, data[0], tmp_path / "run", test_data=data[1], **SHORT)
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 4, 6, 8]
    assert rows[-1]["eval_loss"] == record["training"]["test_loss"]
    losses = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    best = min(losses, key=losses.__getitem__)
    assert (record["training"]["best_step"], record["training"]["best_eval_loss"]) == (best, losses[best])
    plain = {**SHORT, "eval_steps": None}
    run_training(model_folder, data[0], tmp_path / "plain", test_data=data[1], **plain)
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "plain")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_tasks_score_is_taken_too(tmp_path, capfd):
    """And training is not touched by it."""
    options = {**SHORT, "max_steps": 4, "limit": 64, "test_limit": 6}
    record = run_training("nano", "nano-math", tmp_path / "run", progress=True, **options)
    rows = metrics(tmp_path / "run")
    found = {row["step"]: row["eval_exact_match"] for row in rows if "eval_exact_match" in row}
    assert sorted(found) == [2, 4] and found[4] == record["evaluation"]["nano-math"]["accuracy"]
    assert "exact match" in capfd.readouterr().err
    run_training("nano", "nano-math", tmp_path / "plain", **{**options, "eval_steps": None})
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "plain")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    run_training("nano", "nano-math", tmp_path / "loss", evaluate=False, **options)
    assert not any("eval_exact_match" in row for row in metrics(tmp_path / "loss"))


def test_the_best_weights_are_kept(model_folder, data, tmp_path):
    options = {**SHORT, "max_steps": 30, "learning_rate": 2e-2, "load_best": True}
    record = run_training(model_folder, data[0], tmp_path / "run", test_data=data[1], **options)
    losses = {row["step"]: row["eval_loss"] for row in metrics(tmp_path / "run") if "eval_loss" in row}
    best = min(losses, key=losses.__getitem__)
    assert best < 30 and losses[30] > losses[best], "or this shows nothing"
    assert record["training"]["best_step"] == record["training"]["weights_step"] == best
    assert record["training"]["test_loss"] == losses[best]
    assert held_out_loss(tmp_path / "run", data) == pytest.approx(losses[best], rel=1e-6)
    assert [path.name for path in (tmp_path / "run").glob("best-*")] == [f"best-{best}.safetensors"]


def test_the_best_weights_of_the_checkpoint_before_stay(tmp_path, monkeypatch):
    """A kill before the new checkpoint is marked complete: on a GPU the steps since may come out otherwise."""
    model = torch.nn.Linear(2, 2)
    state = SimpleNamespace(global_step=0, max_steps=99)
    losses = iter([3.0, 2.0, 1.0, 5.0, 6.0])
    held = Validation(lambda: next(losses), every=1, folder=tmp_path, keep_best=True)
    arguments = SimpleNamespace(output_dir=str(tmp_path / "checkpoints"))
    # step -> the checkpoints that are there when it is saved (two stay), and the files that are needed then
    saves = {1: ((1,), {1}), 2: ((1, 2), {1, 2}), 4: ((2, 4), {2, 3}), 5: ((4, 5), {3})}
    for step in range(1, 6):
        state.global_step = step
        held.on_step_end(arguments, state, None, model=model)
        if step in saves:
            there, needed = saves[step]
            shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
            for saved in there:
                (tmp_path / "checkpoints" / f"checkpoint-{saved}").mkdir(parents=True)
            held.on_save(arguments, state, None)
            assert {path.name for path in tmp_path.glob("best-*")} == {f"best-{n}.safetensors" for n in needed}


@pytest.mark.parametrize("harm", [lambda file: file.unlink(), lambda file: file.write_bytes(b"half")])
def test_a_run_whose_best_weights_are_lost_ends_with_its_last(tmp_path, caplog, harm):
    """After a power cut, say: a rerun cannot bring them back, and it may not leave --load-best out."""
    rows = [{"step": 1, "eval_loss": 1.0}, {"step": 2, "eval_loss": 2.0}]
    model, held = torch.nn.Linear(2, 2), Validation(lambda: 0.0, every=1, folder=tmp_path, rows=rows, keep_best=True)
    save_file({name: torch.zeros_like(p) for name, p in model.named_parameters()}, tmp_path / "best-1.safetensors")
    last = model.weight.clone()
    harm(tmp_path / "best-1.safetensors")
    assert held.restore(model) is False and torch.equal(model.weight, last)
    assert "cannot be read" in caplog.text and "those of the last step, 2" in caplog.text
    save_file({name: torch.zeros_like(p) for name, p in model.named_parameters()}, tmp_path / "best-1.safetensors")
    assert held.restore(model) is True and not model.weight.any()


def test_the_best_weights_of_an_older_dora_run_have_names_of_then(tmp_path):
    model = torch.nn.ModuleDict({"experts": torch.nn.Module()})
    held_down = torch.nn.ParameterDict({"default": torch.nn.Parameter(torch.ones(2))})
    model["experts"].lora_magnitude_vector_down = held_down
    rows = [{"step": 1, "eval_loss": 1.0}, {"step": 2, "eval_loss": 2.0}]
    save_file({"experts.lora_magnitude_down.default": torch.full((2,), 3.0)}, tmp_path / "best-1.safetensors")
    held = Validation(lambda: 0.0, every=1, folder=tmp_path, rows=rows, keep_best=True)
    assert held.restore(model) and held_down["default"].tolist() == [3.0, 3.0]


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path):
    rows = [{"step": step, "eval_loss": loss} for step, loss in enumerate([math.nan, 2.0, 1.0, math.nan, 1.5], start=1)]
    assert Validation(lambda: 0.0, every=1, folder=tmp_path, rows=rows).best_step == 3
    assert Validation(lambda: 0.0, every=1, folder=tmp_path, rows=rows[:1]).best_step is None
    assert Validation(lambda: 0.0, every=1, folder=tmp_path, rows=rows, patience=2).is_over
    assert not Validation(lambda: 0.0, every=1, folder=tmp_path, rows=rows[:1], patience=1).is_over
    rows[3]["eval_loss"] = None  # as the metrics file has it, in JSON: it counts as one of those that are no better
    assert Validation(lambda: 0.0, every=1, folder=tmp_path, rows=rows, patience=2).is_over


def test_a_run_that_is_stopped_before_its_first_held_out_loss_has_no_best(tmp_path):
    Validation(lambda: 0.0, every=50, folder=tmp_path, keep_best=True).restore(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("steps", "every", "patience", "is_told"), [(8, 3, 3, True), (8, 3, 2, False), (5, 9, 1, True)]
)
def test_a_patience_that_no_run_of_this_length_exhausts_is_told(tmp_path, caplog, steps, every, patience, is_told):
    """It takes one held-out loss more than `patience` to stop: after step 3, 6 and 8 there are three."""
    validation = Validation(lambda: 0.0, every=every, folder=tmp_path, patience=patience)
    validation.on_train_begin(None, SimpleNamespace(max_steps=steps), None)
    told = f"early_stopping_patience {patience} cannot end this run"
    assert (told in caplog.text) == is_told
    control, state = SimpleNamespace(should_training_stop=False), SimpleNamespace(max_steps=steps)
    for step in range(1, steps + 1):
        state.global_step = step
        validation.on_step_end(None, state, control)
    assert control.should_training_stop != is_told


def test_it_ends_where_the_loss_gets_no_better(model_folder, data, tmp_path):
    options = {**SHORT, "max_steps": 40, "learning_rate": 2e-2, "early_stopping_patience": 2}
    record = run_training(model_folder, data[0], tmp_path / "run", test_data=data[1], **options)
    losses = {row["step"]: row["eval_loss"] for row in metrics(tmp_path / "run") if "eval_loss" in row}
    best, last = min(losses, key=losses.__getitem__), max(losses)
    assert last == best + 4 == record["training"]["steps"] < 40
    assert run_training(model_folder, data[0], tmp_path / "run", test_data=data[1], **options) == record


@pytest.mark.parametrize("dies_at", [3, 6, 7])
def test_a_killed_run_ends_as_a_calm_one(model_folder, data, tmp_path, monkeypatch, dies_at):
    """Between evaluations, in the one that ends training, and after that: while the whole is scored."""
    options = {
        **SHORT, "max_steps": 40, "learning_rate": 2e-2, "early_stopping_patience": 2, "load_best": True,
        "test_data": data[1], "save_steps": 3,
    }  # fmt: skip
    calm = run_training(model_folder, data[0], tmp_path / "calm", **options)
    evaluations = len([row for row in metrics(tmp_path / "calm") if "eval_loss" in row])
    calls, real = [0], training.response_loss

    def dying(*args, **kwargs):
        calls[0] += 1
        if calls[0] == dies_at + 1:  # the first is before training
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(training, "response_loss", dying)
    with pytest.raises(KeyboardInterrupt):
        run_training(model_folder, data[0], tmp_path / "killed", **options)
    again = run_training(model_folder, data[0], tmp_path / "killed", **options)
    assert evaluations == 6, "where it dies goes by it"
    for key in ("steps", "best_step", "best_eval_loss", "test_loss", "loss_last"):
        assert again["training"][key] == calm["training"][key], key
    ours, theirs = weights(tmp_path / "killed"), weights(tmp_path / "calm")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"load_best": True}, HotLoraError, "give eval_steps"),
        ({"early_stopping_patience": 2}, HotLoraError, "give eval_steps"),
        ({"eval_steps": 0}, HotLoraError, "eval_steps = 0 is out of range"),
        ({"eval_steps": 2}, DataError, "give test_data or test_split"),
        ({"test_split": 1.5}, DataError, "test_split = 1.5 is out of range"),
        ({"test_split": 0.1, "test_data": "x"}, DataError, "leave test_split out"),
        ({"test_split": 0.1, "data": "nano-math"}, DataError, "holds out rows of its own"),
        ({"test_split": 1e-9}, DataError, "leaves none held out"),
        ({"optim": "adam_of_mine"}, HotLoraError, "optim = 'adam_of_mine' does not exist"),
        ({"lr_scheduler": "linear", "lr_scheduler_kwargs": "0.1"}, HotLoraError, "is no JSON object"),
        (
            {"lr_scheduler": "linear", "lr_scheduler_kwargs": '{"power": 2}'},
            HotLoraError,
            "can make .*power",
        ),
        ({"lr_scheduler_kwargs": '{"power": 2}'}, HotLoraError, "constant_with_warmup has no options"),
        ({"lr_scheduler": "constant", "warmup_steps": 2}, HotLoraError, "the schedule constant has no warm-up"),
        ({"lr_scheduler": "cosine_with_min_lr"}, HotLoraError, "none that transformers can make .*min_lr"),
        ({"save_total_limit": 1}, HotLoraError, "save_total_limit = 1 is out of range: it must be 2 or more"),
        ({"warmup_steps": -1}, HotLoraError, "warmup_steps = -1 is out of range"),
        ({"eval_steps": 2, "load_best": True, "reprofile_every": 2}, HotLoraError, "leave load_best out"),
    ],
)
def test_wrong_options_are_told_before_a_model_is_loaded(
    model_folder, data, tmp_path, monkeypatch, options, error, message
):
    monkeypatch.setattr(training, "load_base", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(error, match=message):
        run_training(model_folder, **{"data": data[0], "output": tmp_path / "run", **options})
    assert not (tmp_path / "run").exists()


def test_rows_are_held_out_by_their_prompts():
    rows = [Example(f"question {i % 400}", f" {i}") for i in range(800)]
    train, test = held_out(rows, 0.1)
    assert len(train) + len(test) == 800 and 0.05 < len(test) / 800 < 0.15
    assert not {row.prompt for row in train} & {row.prompt for row in test}
    texts = [Example("", f"text {i % 400}") for i in range(800)]  # without a prompt
    train_texts, test_texts = held_out(texts, 0.1)
    assert 0.05 < len(test_texts) / 800 < 0.15 and not set(map(repr, train_texts)) & set(map(repr, test_texts))
    more_train, more_test = held_out([*rows, *(Example(f"new {i}", "") for i in range(50))], 0.1)
    assert more_train[: len(train)] == train and more_test[: len(test)] == test


def test_a_run_with_rows_held_out(model_folder, data, tmp_path):
    record = run_training(model_folder, data[0], tmp_path / "run", test_split=0.3, **SHORT)
    train, test = held_out(load_examples(data[0]), 0.3)
    assert (record["data"]["train"], record["data"]["test"]) == (len(train), len(test))
    assert record["training"]["test_loss"] < record["training"]["test_loss_before"]
    assert run_options(model_folder, data[0], test_split=0.3).recorded()["test_split"] == 0.3


def test_other_optimizers_noise_and_attention(model_folder, data, tmp_path):
    """Under transformers' names: what they do is seen in what is trained."""
    found = {}
    for name, options in (
        ("plain", {}), ("sgd", {"optim": "sgd"}), ("noise", {"neftune_noise_alpha": 5.0}),
        ("eager", {"attn_implementation": "eager"}),
    ):  # fmt: skip
        short = {**SHORT, "eval_steps": None, "max_steps": 2}
        run_training(model_folder, data[0], tmp_path / name, **short, **options)
        found[name] = torch.cat([tensor.flatten() for _, tensor in sorted(weights(tmp_path / name).items())])
    assert (found["sgd"] - found["plain"]).abs().max() > 1e-4
    assert 0 < (found["noise"] - found["plain"]).abs().max()
    torch.testing.assert_close(found["eager"], found["plain"], rtol=0, atol=2e-2)


def test_schedules_under_transformers_names(model_folder, data, tmp_path):
    short = {**SHORT, "eval_steps": None, "max_steps": 6, "learning_rate": 1e-3, "save_steps": 1}
    options = {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr_rate": 0.5}', "warmup_steps": 2}
    run = tmp_path / "run"
    run_training(model_folder, data[0], run, **{**short, **options, "save_total_limit": 4})
    rates = [row["learning_rate"] for row in metrics(run)]
    assert rates[:3] == [0, 5e-4, 1e-3] and 5e-4 < rates[-1] < rates[2]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"checkpoint-{n}" for n in (3, 4, 5, 6)]


def test_a_warm_up_profiles_what_it_was_trained_on(model_folder, data, tmp_path):
    """Held-out rows are in neither."""
    options = {**SHORT, "eval_steps": None, "max_steps": 2, "warmup": "lora", "test_split": 0.3, "method": "hellora"}
    run_method(model_folder, data[0], tmp_path / "run", **options)
    warm = read_record(tmp_path / "run" / "warmup")
    profile = RoutingProfile.load(tmp_path / "run" / "warmup" / "warm-profile.safetensors")
    assert profile.source["examples"] == warm["data"]["train"]
    assert profile.source["data_hash"] == warm["data"]["hash"]


def test_a_limit_is_one_of_rows_held_out_too(model_folder, data, tmp_path):
    record = run_training(model_folder, data[0], tmp_path / "run", test_split=0.3, test_limit=2, **SHORT)
    _, test = held_out(load_examples(data[0]), 0.3)
    assert record["data"]["test"] == 2 < len(test)


@pytest.mark.parametrize("name", ["lomo", "schedule_free_adamw", "grokadamw"])
def test_an_optimizer_without_its_package_is_told_before_a_model_is_loaded(
    model_folder, data, tmp_path, monkeypatch, name
):
    monkeypatch.setattr(training, "load_base", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(HotLoraError, match=f"optim = '{name}' cannot be used here"):
        run_training(model_folder, data[0], tmp_path / "run", optim=name)
