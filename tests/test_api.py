"""hotlora.train and hotlora.profile are the commands, from Python; what editors and type checkers know of them."""

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_type_hints

import pandas
import pytest
import torch
from datasets import Dataset
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

import hotlora
from hotlora.base.errors import FileError, HotLoraError, ModelError
from hotlora.base.options import ALIASES
from hotlora.base.records import read_record, write_record
from hotlora.runs import evaluation, profiling, training
from hotlora.runs import folder as folder_of_runs
from hotlora.runs.folder import is_begun
from hotlora.runs.keywords import EvaluateKeywords, ProfileKeywords, TrainKeywords
from hotlora.runs.options import EvalOptions, ProfileOptions, RunOptions
from hotlora.training import trainer

ROOT = Path(hotlora.__file__).parents[1]
SHORT: dict[str, Any] = {
    "max_steps": 2, "batch_size": 4, "limit": 40, "test_limit": 4, "r": 4, "lora_alpha": 8, "max_length": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    row = {"prompt": "Question: 3 + 4 =\nAnswer:", "completion": " 7"}
    file.write_text((json.dumps(row) + "\n") * 40)
    return file


@pytest.fixture(scope="module")
def run(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> hotlora.Run:
    disable_progress_bar()
    return hotlora.train("nano", rows, tmp_path_factory.mktemp("api") / "run", progress=False, **SHORT)


def test_train_gives_what_one_goes_on_with(run: hotlora.Run):
    assert run.record == read_record(run.folder) and run.record["status"] == "done"
    assert (run.folder / "adapter" / "README.md").is_file(), "the card, as the command writes it"
    assert run.plan.rule == "hot" and run.plan.hash == run.record["plan"]["hash"]
    assert run.profile.hash == run.record["profile"]["hash"]
    assert [row["step"] for row in run.metrics] == [1, 2]
    prompt = run.tokenizer("Question: 3 + 4 =", return_tensors="pt")
    by_hand, _ = hotlora.load(run.folder)
    with torch.no_grad():
        assert torch.equal(run.model(**prompt).logits, by_hand(**prompt).logits)
    assert run.model is run.model, "loaded once"
    assert repr(run) == f"Run({str(run.folder)!r}: hot 25%, done, 2 steps, loss {_losses(run)})"


def _losses(run: hotlora.Run) -> str:
    training = run.record["training"]
    return f"{training['loss_first']:.4f} → {training['loss_last']:.4f}"


def test_rows_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Question: 3 + {i} =\nAnswer:", "completion": f" {3 + i}"} for i in range(40)]
    data, held_out = Dataset.from_list(rows), pandas.DataFrame(rows[:4])
    run = hotlora.train("nano", data, test_data=held_out, progress=False, **SHORT)
    assert run.folder == Path("runs/nano-rows_in_memory-hot-seed0")
    kept = [json.loads(line) for line in (run.folder / "data.jsonl").read_text().splitlines()]
    assert kept == rows and run.record["data"]["train"] == 40 and run.record["data"]["test"] == 4
    assert hotlora.train("nano", iter(rows), test_data=rows[:4], progress=False, **SHORT).record == run.record
    with pytest.raises(HotLoraError, match="holds other rows"):
        hotlora.train("nano", rows[1:], test_data=rows[:4], progress=False, **SHORT)
    # A start that never began holds no folder.
    with pytest.raises(HotLoraError, match=r"data\.jsonl line 1"):
        hotlora.train("nano", [{"ask": "a", "reply": "b"}], "runs/new", progress=False, **SHORT)
    new = Path("runs/new")
    assert (new / "data.jsonl").is_file() and not is_begun(new)
    hotlora.train("nano", rows, new, progress=False, **SHORT)
    assert is_begun(new)
    write_record(new, {**read_record(new), "status": "failed"})
    assert is_begun(new), "there is a checkpoint"
    shutil.rmtree(new / "checkpoints")
    assert not is_begun(new)
    profiled = hotlora.profile("nano", rows, progress=False)
    assert profiled.source["data"] == "rows in memory"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert profiled.hash == hotlora.profile("nano", "rows.jsonl", progress=False).hash
    with pytest.raises(HotLoraError, match="no rows"):
        hotlora.profile("nano", [], progress=False)


def test_a_run_is_opened_again(run: hotlora.Run, rows: Path, tmp_path: Path):
    assert hotlora.Run(run.folder).record == run.record
    with pytest.raises(FileError, match=r"run\.json"):
        hotlora.Run(tmp_path)
    again = hotlora.train("nano", rows, run.folder, progress=False, **SHORT)
    assert again.record == run.record, "it was done already"
    with pytest.raises(HotLoraError, match=r"learning.rate"):
        hotlora.train("nano", rows, run.folder, progress=False, learning_rate=1e-3, **SHORT)


def test_methods_and_the_folder_of_its_own_name(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run = hotlora.train("nano", str(rows), method="lora", placement="gate", seed=3, progress=False, **SHORT)
    assert run.folder == Path("runs/nano-rows-lora_gate-seed3") or run.folder == Path("runs/nano-rows-lora-gate-seed3")
    assert run.plan.rule == "all" and run.record["seed"] == 3


def test_silence(rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    enable_progress_bar()  # transformers', as a user has it
    try:
        hotlora.train("nano", rows, tmp_path / "run", progress=False, **SHORT)
        hotlora.profile("nano", rows, limit=8, progress=False)
        assert capfd.readouterr() == ("", "")
        hotlora.profile("nano", rows, limit=8)
        assert "Loading weights" in capfd.readouterr().err
    finally:
        disable_progress_bar()


def test_what_is_told(rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    hotlora.train("nano", rows, tmp_path / "run", **SHORT)
    told = capfd.readouterr().err
    assert f"training nano on {rows} into {tmp_path / 'run'}" in told and "memory: a step" in told
    hotlora.train("nano", rows, tmp_path / "run", **SHORT)
    again = capfd.readouterr().err
    assert f"{tmp_path / 'run'} is done: nothing was trained now" in again and "is done" not in told


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="only that one gets signals")
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_leaves_the_session_alive_and_the_run_to_go_on_with(times: int, rows: Path, tmp_path: Path):
    folder, many = tmp_path / "run", {**SHORT, "max_steps": 400}
    metrics = folder / "metrics.jsonl"

    def press() -> None:
        while not (metrics.is_file() and metrics.stat().st_size):  # in the middle of training
            time.sleep(0.01)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)

    says = r"checkpoint-\d+ is whole: rerun" if times == 1 else ""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        threading.Thread(target=press, daemon=True).start()
        with pytest.raises(KeyboardInterrupt, match=says):
            hotlora.train("nano", rows, folder, progress=False, evaluate=False, **many)
    finally:
        signal.signal(signal.SIGINT, before)
    assert read_record(folder)["status"] == "failed"


@pytest.mark.parametrize("ends", ["whole", "without memory"])
@pytest.mark.parametrize(
    ("work", "loads", "fails"),
    [
        (hotlora.train, (training, "load_base"), (trainer, "_run")),
        (hotlora.profile, (folder_of_runs, "load_base"), (profiling, "profile_until")),
        (hotlora.evaluate, (evaluation, "load_base"), (evaluation, "evaluate_task")),
    ],
    ids=["train", "profile", "evaluate"],
)
def test_no_model_is_left(
    work: Any, loads: Any, fails: Any, ends: str, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On a GPU the next cell's model would find no room: models have cycles, and a notebook keeps its last error."""
    models, load = [], getattr(*loads)

    def loaded(*given: Any, **options: Any) -> Any:
        models.append(weakref.ref(model := load(*given, **options)))
        return model

    def no_room(*given: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(*loads, loaded)
    kept: BaseException | None = None
    options = SHORT if work is hotlora.train else {"batch_size": 4}
    if ends == "whole":
        work("nano", rows, tmp_path / "run", progress=False, **options)
    else:
        monkeypatch.setattr(*fails, no_room)
        try:
            work("nano", rows, tmp_path / "run", progress=False, **options)
        except (HotLoraError, RuntimeError) as error:
            kept = error
        assert kept is not None and kept.__traceback__ is not None
    assert models and not any(model() for model in models)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("learning_rat", "learning_rate"), ("lr", "learning_rate"), ("num_train_epoch", "num_train_epochs"),
        ("per_device_train_batch", "per_device_train_batch_size"), ("eval_dataset", "test_data"), ("metod", "method"),
    ],
)  # fmt: skip
def test_an_unknown_option_is_one_error_that_names_the_nearest(given: str, meant: str, tmp_path: Path):
    with pytest.raises(HotLoraError, match=rf"train.* has no option {given} \(did you mean {meant}\?\)"):
        hotlora.train("nano", "nano-math", tmp_path / "run", **{given: 1})  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_transformers_names_are_keywords(rows: Path, tmp_path: Path):
    theirs: dict[str, Any] = {name: value for name, value in SHORT.items() if name != "batch_size"}
    run = hotlora.train(
        "nano", rows, output_dir=tmp_path / "run", per_device_train_batch_size=4, lr_scheduler_type="linear",
        progress=False, **theirs,
    )  # fmt: skip
    assert run.folder == tmp_path / "run"
    assert (run.record["config"]["batch_size"], run.record["config"]["lr_scheduler"]) == (4, "linear")
    with pytest.raises(HotLoraError, match="per_device_train_batch_size and batch_size are one option"):
        hotlora.train("nano", rows, tmp_path / "run", per_device_train_batch_size=4, progress=False, **SHORT)
    with pytest.raises(HotLoraError, match="output_dir and output are one option"):
        hotlora.train("nano", rows, tmp_path / "run", output_dir=tmp_path / "run")
    with pytest.raises(
        HotLoraError, match=r"profile.* has no option per_device_train_batch_size \(did you mean batch_s"
    ):
        hotlora.profile("nano", rows, per_device_train_batch_size=4)  # type: ignore[call-arg]


def test_an_option_of_the_other_function(tmp_path: Path):
    with pytest.raises(HotLoraError, match=r"profile.* has no option epochs"):
        hotlora.profile("nano", "nano-math", epochs=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data": ""}, "the data's name is empty"),
        ({"data": " "}, "the data's name is empty"),
        ({"test_data": ""}, "the data's name is empty"),
        ({"output": ""}, "output is '': give a folder"),
        ({"output": 5}, "output is 5: give a folder"),
        ({"method": 5}, "method 5 does not exist"),
        ({"method": ""}, "method '' does not exist"),
        ({"placement": ["pure"]}, r"placement \['pure'\] does not exist"),
        ({"columns": ""}, "columns = '': give each name once"),
    ],
    ids=str,
)
def test_empty_names_are_no_folders_and_no_defaults(given, message, tmp_path, monkeypatch):
    """An unset variable of the shell; as a path it would be the folder that one is in, with whatever rows it has."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    given = {"data": "rows.jsonl", "output": "run", **given}
    with pytest.raises(HotLoraError, match=message):
        hotlora.train("nano", max_steps=1, preflight=False, progress=False, **given)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_wrong_value_is_told_before_anything_starts(tmp_path: Path):
    with pytest.raises(HotLoraError, match="max_steps"):
        hotlora.train("nano", "nano-math", tmp_path / "run", max_steps="three")  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_loaded_already_is_for_other_functions():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"Linear.*HotLoraConfig.*get_peft_model.*SFTTrainer"):
        hotlora.train(model, "nano-math")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"Linear.*profile_routing"):
        hotlora.profile(model, "nano-math")  # type: ignore[arg-type]


def test_profile(rows: Path, tmp_path: Path):
    found = hotlora.profile("nano", rows, tmp_path / "profile.safetensors", limit=10, progress=False)
    assert found.source["examples"] == 10 and found.num_tokens > 0
    assert hotlora.RoutingProfile.load(tmp_path / "profile.safetensors").hash == found.hash
    assert hotlora.profile("nano", rows, limit=10, progress=False).hash == found.hash
    assert found.source["stability"] is None and found.saliency is None
    assert hotlora.profile("nano", rows, limit=10, progress=False, saliency=True).saliency is not None
    assert "until" not in hotlora.profile("nano", rows, limit=10, progress=False, profile_until=1).source
    with pytest.raises(HotLoraError, match=r"profile_until = 0 is out of range: it must be in \(0, 1\]"):
        hotlora.profile("nano", rows, profile_until=0)
    with pytest.raises(HotLoraError, match="batch_size"):
        hotlora.profile("nano", rows, batch_size=0)


# What editors and type checkers know


@pytest.mark.parametrize(
    ("keywords", "options", "function", "own"),
    [
        (TrainKeywords, RunOptions, "train", {"test_data", "method", "preset", "placement", "preflight", "progress"}),
        (ProfileKeywords, ProfileOptions, "profile", {"progress"}),
        (
            EvaluateKeywords,
            EvalOptions,
            "evaluate",
            {
                "model",
                "samples",
                "temperature",
                "top_p",
                "seed",
                "engine",
                "rouge",
                "progress",
            },
        ),
    ],
)
def test_every_option_is_a_keyword_with_its_type_and_default(keywords: Any, options: Any, function: str, own: set[str]):
    known = {f.name: f for f in fields(options) if f.metadata["cli"] and f.name not in ("model", "data", "test_data")}
    left = {"profile": ("on_top_of", "keep_hot"), "evaluate": ("adapter", "expert_parallel")}.get(function, ())
    known = {name: field for name, field in known.items() if name not in left}
    typed = {name: f.type for name, f in known.items()}
    if function == "train":
        typed |= {theirs: typed.get(ours, str | os.PathLike[str] | None) for theirs, ours in ALIASES.items()}
    assert get_type_hints(keywords) == typed, "run python scripts/docs.py"
    assert not keywords.__required_keys__
    parameters = inspect.signature(getattr(hotlora, function)).parameters
    first = ["run" if function == "evaluate" else "model", "data", "output"]
    assert list(parameters)[:3] == first
    assert parameters.keys() - set(first) == known.keys() | own
    assert {name: parameters[name].default for name in known} == {name: f.default for name, f in known.items()}


def test_a_type_checker_knows_the_options(tmp_path: Path):
    """Of the package, not of torch and its like: those take mypy minutes."""
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nignore_missing_imports = true\n"
        "[mypy-torch.*,transformers.*,peft.*,trl.*,datasets.*,numpy.*,scipy.*,accelerate.*,matplotlib.*,rich.*]\n"
        "follow_imports = skip\nfollow_imports_for_stubs = true\n"
    )
    (tmp_path / "script.py").write_text(
        textwrap.dedent("""
            import hotlora

            run = hotlora.train("nano", "nano-math", "out", max_steps=3, method="hellora")
            reveal_type(run)
            reveal_type(hotlora.profile("nano", "nano-math", limit=10))
            hotlora.train("nano", "nano-math", "out", max_step=3)
            hotlora.train("nano", "nano-math", "out", max_steps="three")
        """)
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", "script.py"],
        cwd=tmp_path, capture_output=True, text=True, env=_environment(),
    )  # fmt: skip
    told = [line.split(": ", 1)[1] for line in done.stdout.splitlines() if line.startswith("script.py")]
    assert 'note: Revealed type is "hotlora.runs.load.Run"' in told, done.stdout + done.stderr
    assert 'note: Revealed type is "hotlora.routing.profile.RoutingProfile"' in told
    errors = [line for line in told if line.startswith("error")]
    assert len(errors) == 2 and '"max_step"' in errors[0] and '"max_steps"' in errors[1]


@pytest.mark.skipif(int(version("setuptools").split(".")[0]) < 77, reason="pyproject.toml asks for setuptools 77")
def test_all_files_that_the_package_needs_are_in_it():
    code = """
        from setuptools import Distribution
        distribution = Distribution({"script_name": "setup.py"})
        distribution.parse_config_files()
        command = distribution.get_command_obj("build_py")
        command.ensure_finalized()
        print(*command.get_outputs(), sep="\\n")
    """
    packed = {line.partition("build/lib/")[2] for line in _python(code, ROOT).stdout.splitlines()}
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hotlora").rglob("*") if path.is_file()}
    kept = {name for name in there if "__pycache__" not in name}
    assert "hotlora/py.typed" in packed and kept == packed


def test_importing_hotlora_loads_nothing_heavy():
    code = "import hotlora, sys; hotlora.HotLoraError; print({'torch', 'typer', 'yaml'} & sys.modules.keys())"
    assert _python(code, ROOT).stdout.strip() == "set()"


def _python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True, check=True)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "MYPYPATH": str(ROOT)}
