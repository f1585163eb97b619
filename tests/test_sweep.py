"""Sweeps: what a file defines, what is run of it, and what is left when it fails or is killed."""

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from runs import run_training
from tiny_files import save_tiny_model, write_sums
from typer.testing import CliRunner

from hotlora.base.errors import HotLoraError
from hotlora.base.files import write_json
from hotlora.base.records import Record, find_records, read_record
from hotlora.cli.sweep import sweep as sweep_command
from hotlora.report.comparison import compare_runs
from hotlora.report.rows import table_rows
from hotlora.report.sections import read_sections
from hotlora.routing.profile import RoutingProfile
from hotlora.runs.options import EvalOptions, RunOptions
from hotlora.runs.sweep import Condition, Sweep, load_sweep, run_sweep, sweep_jobs
from hotlora.runs.sweep_runs import keep_failure, make_profile, score_adapter, score_base, train_run
from hotlora.runs.sweep_table import progress_table
from hotlora.runs.worker_pool import Job, worker_environment
from hotlora.training.config import TrainConfig

APP = typer.Typer()
APP.command()(sweep_command)


def make_sweep(*conditions: Condition, **changes) -> Sweep:
    return Sweep(**{"name": "s", "model": "nano", "data": "nano-math", "conditions": conditions, **changes})


def call(*words: object) -> tuple[int, str]:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(APP, [str(word) for word in words])
    assert not isinstance(done.exception, AssertionError | TypeError), done.exc_info
    return done.exit_code, done.output


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder)
    return folder


def test_conditions_times_seeds_and_their_shared_profiles(tmp_path: Path):
    sweep = make_sweep(
        Condition("base", train=False),
        Condition("hot"),
        Condition("small/lower", {"learning_rate": 1e-4, "fraction": 0.125}),
        Condition("long", {"max_length": 99}),
        Condition("sql", {"data": "nano-sql"}),
        Condition("given", {"plan": "plan.json"}),
        Condition("warm", {"warmup": "lora"}),
        seeds=(3, 1),
        config=TrainConfig(max_steps=7),
        options={"test_limit": 5, "limit": 9},
    )
    jobs = sweep_jobs(sweep, tmp_path)
    profiles = [job for job in jobs if job.function is make_profile]
    runs = {job.folder.relative_to(tmp_path).as_posix(): job for job in jobs if job not in profiles}
    names = ("hot", "small/lower", "long", "sql", "given", "warm")
    assert list(runs) == ["base", *(f"{name}/seed{seed}" for name in names for seed in (3, 1))]
    assert [job.arguments["data"] for job in profiles] == ["nano-math", "nano-math", "nano-sql"]
    assert [job.arguments["max_length"] for job in profiles] == [512, 99, 512]
    needs = [runs[f"{name}/seed3"].needs for name in names]
    assert needs == [profiles[0], profiles[0], profiles[1], profiles[2], None, None]
    assert runs["hot/seed1"].arguments["options"].profile == profiles[0].arguments["path"]
    assert all(runs[f"{name}/seed3"].arguments["options"].profile is None for name in ("given", "warm"))
    lower = runs["small/lower/seed1"]
    assert lower.arguments["options"] == RunOptions(
        model="nano", data="nano-math", max_steps=7, learning_rate=1e-4, seed=1, fraction=0.125, limit=9, test_limit=5,
        profile=profiles[0].arguments["path"],
    )  # fmt: skip
    assert lower.function is train_run
    base = runs["base"]
    assert base.function is score_base and base.seed is None
    assert base.arguments["data"] == "nano-math" and base.arguments["options"].limit == 5


def test_a_condition_has_the_words_of_train(tmp_path: Path):
    sweep = make_sweep(
        Condition("sieve", {"method": "sieve", "placement": "pure"}),
        Condition("preset", {"preset": "hellora-math", "batch_size": 2}),
        config=TrainConfig(max_steps=7, learning_rate=2e-3, seed=9),
    )
    by_name = {job.name: job.arguments["options"] for job in sweep_jobs(sweep, tmp_path) if job.function is train_run}
    config = by_name["sieve"]
    assert (config.lora_dropout, config.train_attention, config.max_steps, config.seed) == (0.05, False, 7, 0)
    assert by_name["sieve"].fraction == 0.25 and by_name["sieve"].condition == "sieve-pure"
    config = by_name["preset"]
    assert (config.learning_rate, config.lr_scheduler, config.batch_size) == (2e-3, "constant", 2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"conditions": ()}, "the sweep s has no condition"),
        ({"seeds": ()}, "the sweep s has no seed"),
        ({"seeds": (1, 2, 1)}, "has the seed 1 twice"),
        ({"seeds": (-1,)}, "has the seed -1: seeds are integers from 0"),
        ({"seeds": ("a",)}, "has the seed 'a'"),
        ({"conditions": [Condition("a"), Condition("a")]}, "has the condition a twice"),
        ({"conditions": [Condition("../a")]}, r"'\.\./a' cannot name"),
        ({"conditions": [Condition("a b")]}, "'a b' cannot name"),
        ({"conditions": [Condition("profiles/a")]}, "'profiles/a' cannot name"),
        ({"name": ""}, "'' cannot name"),
        (
            {"conditions": [Condition("a", {"fractoin": 0.5})]},
            r"options fractoin \(did you mean fraction\?\), which a sweep's runs do not take",
        ),
        ({"conditions": [Condition("a", {"seed": 1})]}, "s: a has the options seed"),
        ({"conditions": [Condition("a", {"output": "b"})]}, "s: a has the options output"),
        ({"options": {"config": TrainConfig()}}, "s: a has the options config"),
        ({"options": {"scores": torch.ones(2)}}, "s: a: options must be plain values"),
        ({"options": {"r": 0}}, "s: a: r = 0 is out of range"),
        ({"options": {"method": "loar"}}, "s: a: method 'loar' does not exist"),
        # what a run would say when its profile is made, and its model loaded
        ({"options": {"rule": "nope"}}, "s: a: rule 'nope' does not exist: choose one of hot, all"),
        ({"options": {"rule": "hot", "p": 0.5}}, "s: a: rule 'hot' does not read p"),
        ({"options": {"signal": "sum"}}, "s: a: signal 'sum' does not exist"),
        ({"options": {"test_limit": 0}}, "s: a: test_limit = 0 is out of range: it must be 1 or more"),
        ({"options": {"quantize": 5}}, "s: a: quantize = 5 is out of range: it must be 8 or 4 bits, or 0"),
        ({"options": {"optim": "adma"}}, "s: a: optim = 'adma' does not exist"),
        ({"options": {"dtype": "int8"}}, "s: a: dtype 'int8' does not exist"),
        # what a training's own score does not do
        (
            {"conditions": [Condition("a", {"samples": 20, "temperature": 0.2})]},
            "s: a: samples = 20, temperature = 0.2 would change nothing.*"
            r"Condition\('a-sampled', {'samples': 20, 'temperature': 0.2}, scores='a'\)",
        ),
        ({"options": {"top_p": 0.9}}, "s: a: top_p = 0.9 would change nothing: a training scores greedy answers"),
    ],
)
def test_a_wrong_sweep_is_named(change, says):
    with pytest.raises(HotLoraError, match=says):
        make_sweep(**{"conditions": [Condition("a")], **change})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("SWEEPS = 1", "defines no SWEEP"),
        ("SWEEP = 1", "defines no SWEEP"),
        ("1 / 0", "cannot be run: ZeroDivisionError: division by zero"),
        ("SWEEP = (", "cannot be run: SyntaxError"),
        ("from hotlora.runs.sweep import Sweep\nSWEEP = Sweep('s', 'nano', 'nano-math', [])", "has no condition"),
        (None, "does not exist: give a Python file that defines SWEEP"),
    ],
)
def test_a_file_that_defines_no_sweep_is_named(tmp_path: Path, text, says):
    path = tmp_path / "study.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(HotLoraError, match=says) as caught:
        load_sweep(path)
    assert str(path) in str(caught.value)


def test_each_worker_has_its_gpu_or_its_threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [worker_environment(i, 3, 2)["CUDA_VISIBLE_DEVICES"] for i in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert [worker_environment(i, 2, 2)["CUDA_VISIBLE_DEVICES"] for i in range(2)] == ["4", "6"]
    assert worker_environment(0, 1, 0) == {}
    assert worker_environment(0, 2, 0) == {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // 2))}
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert worker_environment(0, 2, 0) == {}


def test_a_shared_profile_is_made_again_only_for_other_data(model_folder: Path, tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    settings = {
        "path": tmp_path / "p" / "profile.safetensors", "model": str(model_folder), "data": str(rows), "limit": None,
        "profile_fraction": 0.5, "dtype": "auto", "device": "cpu", "quantize": None, "max_length": 64, "batch_size": 4,
    }  # fmt: skip
    seen = []
    for end in ("!", "!", "?"):
        rows.write_text("".join(json.dumps({"prompt": f"{i}", "completion": end}) + "\n" for i in range(200)))
        make_profile(**settings)
        seen.append(RoutingProfile.load(tmp_path / "p").source["data_hash"])
        times = settings["path"].stat().st_mtime_ns
        make_profile(**settings)
        assert settings["path"].stat().st_mtime_ns == times
    assert seen[0] == seen[1] != seen[2]
    config = TrainConfig(max_steps=1, batch_size=4, r=2, max_length=64)
    options = {"profile_fraction": 0.5, "device": "cpu", "evaluate": False}
    record = run_training(str(model_folder), str(rows), tmp_path / "run", config=config, **options)
    assert record["profile"]["hash"] == RoutingProfile.load(tmp_path / "p").hash  # what a run makes by itself


def test_a_sweeps_profile_is_found_again_where_it_says_how_much_is_read(tmp_path: Path):
    """Folders of sweeps from before --profile-until keep their names; a default reads until the hot 25% are settled."""
    folders = {}
    for name, options in {
        "half": {"profile_fraction": 0.5}, "tenth": {"profile_fraction": 0.1}, "default": {},
        "mass": {"signal": "mass"}, "saliency": {"signal": "saliency"},
        "random": {"rule": "random", "signal": "saliency"},
    }.items():  # fmt: skip
        job = sweep_jobs(Sweep("s", "nano", "nano-math", [Condition("c", options)]), tmp_path)[0]
        folders[name] = job.folder.name
        assert job.arguments.get("profile_until") == (None if "profile_fraction" in options else 0.95)
        assert job.arguments.get("saliency") == (True if name == "saliency" else None)
    assert (folders["half"], folders["tenth"]) == ("nano-math-043f6b83", "nano-math-8a5b9c96")
    assert folders["default"] == folders["mass"] == folders["random"] != folders["saliency"]


def test_runs_of_a_sweep_have_the_profile_that_is_settled(model_folder: Path, tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}", "completion": "!"}) + "\n" for i in range(100)))
    options = {"device": "cpu", "evaluate": False, "profile_until": 0.4}
    config = TrainConfig(max_steps=1, batch_size=4, r=2, max_length=64)
    sweep = Sweep("s", str(model_folder), str(rows), [Condition("c", options)], config=config)
    profile, run = sweep_jobs(sweep, tmp_path / "runs")
    profile.function(**profile.arguments)
    found = RoutingProfile.load(profile.folder)
    assert (found.source["examples"], found.source["drawn_from"]) == (64, 100)
    made = profile.folder.joinpath("profile.safetensors").stat().st_mtime_ns
    profile.function(**profile.arguments)
    assert profile.folder.joinpath("profile.safetensors").stat().st_mtime_ns == made
    run.function(**run.arguments)
    record = json.loads((run.folder / "run.json").read_text())
    # The run makes none, so it is as one that had this profile before there was --profile-until.
    assert record["config"]["profile_until"] == 1.0 and record["profile"]["hash"] == found.hash
    assert record["profile"]["examples"] == 64


FILE = """
from hotlora.training.config import TrainConfig
from hotlora.runs.sweep import Condition, Sweep

SWEEP = Sweep(
    "study", {model!r}, "nano-choice",
    [
        Condition("base", train=False),
        Condition("greedy", {{"rule": "greedy", "budget": 1}}),
        Condition("wrong", {{"rule": "hot", "experts_per_layer": 99}}),
    ],
    seeds=(0, 1), config=TrainConfig(max_steps=2, batch_size=2, r=2, max_length=256),
    options={{"limit": 8, "test_limit": 4}},
)
"""


def test_the_command_runs_two_at_a_time_and_tells_what_failed(
    model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    file, output = tmp_path / "study.py", tmp_path / "out"
    file.write_text(FILE.format(model=str(model_folder)))
    code, text = call(file, "-o", output, "--dry-run")
    assert code == 0 and text.count(" new ") == 5 and not output.exists()
    assert "…" not in text  # no path is cut short

    code, text = call(file, "-o", output, "--processes", 2)
    assert code == 1 and "study: 3 of 5 runs done, 2 failed" in text
    assert "\none page of all runs: " in text
    assert "leaked" not in capfd.readouterr().err  # by nanobind, of what a worker's collector was told to leave
    assert text.count("failed: PlanError: experts_per_layer is 99: it must be an integer from 1 to") == 2
    assert str(output / "wrong" / "seed1" / "log.txt") in text and f"hotlora report {output}" in text
    records = {folder.relative_to(output).as_posix(): record for folder, record in find_records(output).items()}
    assert {name: record["status"] for name, record in records.items()} == {
        "base": "done", "greedy/seed0": "done", "greedy/seed1": "done",
        "wrong/seed0": "failed", "wrong/seed1": "failed",
    }  # fmt: skip
    assert "PlanError" in (output / "wrong" / "seed0" / "log.txt").read_text()
    assert {records[f"greedy/seed{seed}"]["profile"]["hash"] for seed in (0, 1)} == {
        RoutingProfile.load(path).hash for path in (output / "profiles").rglob("*.safetensors")
    }
    for name, record in records.items():
        assert record["sweep"] == {"name": "study", "condition": name.split("/")[0]}
    greedy = json.loads((output / "greedy" / "seed0" / "plan.json").read_text())["experts"]
    assert sorted(map(len, greedy.values())) == [0, 1]  # a layer without an adapted expert trains, too
    assert records["base"]["evaluation"]["nano-choice"]["n"] == 4
    assert f"{records['base']['evaluation']['nano-choice']['accuracy']:.1%}" in text

    code, text = call(file, "-o", output, "--dry-run")
    assert text.count("done, ") == 3 and text.count("failed") == 2


def test_processes_and_files_are_checked(tmp_path: Path):
    file = tmp_path / "study.py"
    file.write_text(FILE.format(model="nano"))
    done = CliRunner().invoke(APP, [str(file), "-o", str(tmp_path / "out"), "--processes", "0"])
    assert isinstance(done.exception, HotLoraError) and "processes is 0" in str(done.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name != "posix", reason="kills processes by signal")
@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--set =3", "--set =3 is not NAME=VALUE: give it as in --set max_steps=300, or on one task --set gsm8k.max_"),
        ("--set max_steps", "--set max_steps is not NAME=VALUE: give it as in --set max_steps=300"),
        ("--set .max_steps=3", r"--set \.max_steps names no option: give it as in --set max_steps=300"),
        ("--set max_steps=3 --set max_steps=4", "--set max_steps is given twice, 3 and 4: leave one of them out"),
        ("--data gsm8k=a --data gsm8k=b", "--data gsm8k is given twice, a and b"),
        ("--data gsm8k", "--data gsm8k is not NAME=VALUE: give it as in --data gsm8k=data/gsm8k"),
        ("--set seed=1", "give --seeds NUMBER in its place"),
        ("--set test_limit=0", "test_limit = 0 is out of range"),
        ("--tflops -4", "tflops is -4: it must be above 0"),
        ("--tflops inf", "tflops is inf: it must be above 0"),
        ("--tflops nan", "tflops is nan: it must be above 0"),
        ("--seeds -2", "seeds is -2: it must be 1 or more"),
        ("--seeds 0", "seeds is 0: it must be 1 or more"),
        ("--set fraction=7", "--set does not take fraction: the rows of hellora-table-2 say that themselves"),
    ],
)
def test_what_is_wrong_about_a_recipe_is_told_before_anything_runs(tmp_path: Path, words: str, says: str):
    words = f"hellora-table-2 --model nano --dry-run -o {tmp_path / 'out'} {words}"
    done = CliRunner().invoke(APP, words.split())
    assert isinstance(done.exception, HotLoraError), done.output
    assert re.search(says, str(done.exception)) and not done.output, str(done.exception)
    assert not (tmp_path / "out").exists()


def test_a_runs_own_folder_is_no_sweeps(tmp_path: Path):
    """What lies below it would count as its stages, and be found by no command."""
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(HotLoraError, match="is a run's own folder"):
        sweep_jobs(make_sweep(Condition("a", {"rule": "hot"})), tmp_path)


def test_what_is_not_here_stops_no_sweep_from_being_listed(tmp_path: Path):
    """Neither the model nor the data nor a GPU."""
    options = {"rule": "hot", "device": "cuda:7", "quantize": 4}
    jobs = sweep_jobs(make_sweep(Condition("a", options), model="no/model", data="no/rows.jsonl"), tmp_path)
    assert [job.name for job in jobs] == ["profile of no/rows.jsonl", "a"]


def test_killed_twice_it_ends_with_the_records_of_a_calm_sweep(tmp_path: Path):
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests.parent}:{tests}", "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(tests / "killed_sweep.py"), str(tmp_path)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    statuses = {"hot/seed0": "done", "hot/seed1": "done", "wrong/seed0": "failed", "wrong/seed1": "failed"}
    assert report["codes"] == [2, -9, -9, 2, 2] and report["records"] == statuses  # two fail in each sweep
    assert report["gone"] == [True, True], "a killed sweep's workers end by themselves"
    assert report["same"] and min(report["resumed"]) > 0 and report["left_alone"] == [True, True]
    # A worker that is killed is one failed run; the next start mends it.
    assert report["worker"]["code"] == 3 and report["worker"]["hot/seed1"] == ["done", None]
    status, error = report["worker"]["hot/seed0"]
    assert status == "failed" and "its process ended with exit code -9" in error and report["mended"]
    assert report["other"] == 4 and report["kept"]


def test_a_run_that_died_before_it_wrote_anything_is_made_again(tmp_path: Path):
    sweep = Sweep("s", "nano", "nano-math", [Condition("base", train=False)], seeds=(0,), options={"test_limit": 2})
    (job,) = sweep_jobs(sweep, tmp_path)
    job.status, job.error = "failed", "its process ended with exit code -9"
    keep_failure(job)
    record = read_record(job.folder)
    del record["config"]  # as before
    write_json(job.folder / "run.json", record)
    (job,) = run_sweep(sweep, tmp_path)
    assert (job.status, job.error) == ("done", None)


def test_a_script_without_a_guard_is_told(tmp_path: Path):
    """Each run's process imports it again."""
    script = tmp_path / "script.py"
    script.write_text(f"""
from hotlora import run_sweep
from hotlora.runs.sweep import Condition, Sweep
sweep = Sweep("s", "nano", "nano-math", [Condition("base", train=False)], seeds=(0,), options={{"test_limit": 2}})
print([(job.status, job.error) for job in run_sweep(sweep, {str(tmp_path / "runs")!r})])
""")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert 'put the call of run_sweep under `if __name__ == "__main__":`' in done.stderr
    assert "exit code 1: killed, out of memory, or what it printed" in done.stdout


def test_the_guides_sweep_builds(tmp_path: Path):
    guide = (Path(__file__).parents[1] / "docs" / "sweep.md").read_text()
    (tmp_path / "placement.py").write_text(re.findall(r"```python\n(.*?)```", guide, re.DOTALL)[0])
    jobs = sweep_jobs(load_sweep(tmp_path / "placement.py"), tmp_path)
    assert len(jobs) == 1 + 1 + 4 * 8 and jobs[0].function is make_profile


def test_fields_of_the_config_are_options():
    for name, value in asdict(TrainConfig()).items():
        if name == "seed":
            continue
        sweep = make_sweep(Condition("a", {name: value}))
        assert sweep.options_of(sweep.conditions[0])[name] == value


def test_what_is_offloaded_in_training_is_so_in_profile_and_scores(tmp_path: Path):
    conditions = (Condition("base", train=False), Condition("hot", {"rule": "hot"}), Condition("other", scores="hot"))
    sweep = make_sweep(*conditions, options={"offload": "all", "offload_folder": str(tmp_path)})
    jobs = sweep_jobs(sweep, tmp_path / "out")
    assert len(jobs) == 4
    for job in jobs:
        options = job.arguments.get("options")
        found = (options.offload, options.offload_folder) if options else job.arguments
        if job.function is make_profile:
            found = (job.arguments["offload"], job.arguments["offload_folder"])
        assert found == ("all", str(tmp_path)), job.name


def test_what_is_merged_into_a_trained_model_is_not_merged_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "fft" / "model").mkdir(parents=True)
    (tmp_path / "lora" / "adapter").mkdir(parents=True)
    seen = {}
    monkeypatch.setattr(
        "hotlora.runs.sweep_runs._scored", lambda options, output, **more: seen.update(it=options) or {}
    )
    monkeypatch.setattr("hotlora.runs.sweep_runs._mark", lambda record, output, kept: record)
    monkeypatch.setattr("hotlora.runs.sweep_runs.read_record", lambda folder: {"name": "fft", "condition": "fft"})
    for name, under in (("fft", ()), ("lora", ("earlier",))):
        score_adapter({}, EvalOptions(model="nano", on_top_of=("earlier",)), tmp_path, trained=tmp_path / name, seed=0)
        assert seen["it"].on_top_of == under


def test_of_many_seeds_the_terminal_shows_how_many_are_done_and_their_mean(tmp_path: Path):
    def job(seed: int, status: str, score: float | None = None) -> Job:
        result = None if score is None else {"evaluation": {"nano-math": {"accuracy": score}}}
        return Job("nano/hot", tmp_path / str(seed), train_run, {}, seed=seed, status=status, result=result)

    jobs = [*(job(seed, "done", seed / 10) for seed in range(6)), job(6, "failed"), job(7, "waiting")]
    for chosen, wanted in (
        (jobs[:6], ["nano/hot", "0.0%", "10.0%", "20.0%", "30.0%", "40.0%", "50.0%"]),
        (jobs, ["nano/hot", "6 of 8", "25.0%", "seed 6 failed"]),
    ):
        console = Console(width=80, file=io.StringIO())
        console.print(progress_table("many", chosen))
        (row,) = (line for line in console.file.getvalue().splitlines() if "nano/hot" in line)
        assert [cell.strip() for cell in row.strip("│ ").split("│")] == wanted


def test_without_a_task_the_held_out_loss_is_the_score(model_folder: Path, tmp_path: Path):
    rows, held = tmp_path / "rows.jsonl", tmp_path / "held.jsonl"
    for file, start in ((rows, 0), (held, 100)):
        lines = (json.dumps({"prompt": f"{i} + 1 =", "completion": f" {i + 1}"}) for i in range(start, start + 12))
        file.write_text("\n".join(lines))
    sweep = make_sweep(
        Condition("base", train=False), Condition("hot"), Condition("all", {"rule": "all"}),
        Condition("hot-again", scores="hot"),
        model=str(model_folder), data=str(rows), options={"test_data": str(held)},
        config=TrainConfig(max_steps=2, batch_size=4, r=2, learning_rate=0.01, max_length=64),
    )  # fmt: skip
    records = {}
    for job in sweep_jobs(sweep, tmp_path / "out"):
        result = job.function(**job.arguments)
        if job.function is not make_profile:
            records[job.name] = result
            assert job.function(**job.arguments) == result, "done is left alone"
    losses = {name: record["training"]["test_loss"] for name, record in records.items()}
    assert losses["base"] == records["hot"]["training"]["test_loss_before"] != losses["hot"]
    assert losses["hot-again"] == pytest.approx(losses["hot"], rel=1e-6)
    (table,) = compare_runs(tmp_path / "out", "base").tables
    assert table.measure == "held-out loss"
    found = {row.condition: dict(row.values) for row in table.rows}
    assert found["base"] == {None: losses["base"]} and found["hot"] == {0: losses["hot"]}
    (section,) = (some for some in read_sections(find_records(tmp_path / "out")) if some.data == str(rows))
    shown = {row.name: row.cells["accuracy"] for row in table_rows(section, section.data)}
    assert shown["base"] == f"{losses['base']:.4f}" and shown["all"] == f"{losses['all']:.4f}"


def test_a_sweep_whose_folder_and_data_were_moved_goes_on(model_folder: Path, tmp_path: Path):
    """Adapters and whole models that it scores lie elsewhere then, and are the same."""

    def done(place: Path) -> dict[str, Record]:
        sweep = make_sweep(
            Condition("base", train=False), Condition("hot"), Condition("whole", {"method": "fft"}),
            Condition("hot-again", scores="hot"), Condition("whole-again", scores="whole"),
            model=str(model_folder), data=str(place / "rows.jsonl"), options={"test_data": str(place / "rows.jsonl")},
            config=TrainConfig(max_steps=1, batch_size=4, r=2, max_length=64),
        )  # fmt: skip
        return {job.name: job.function(**job.arguments) for job in sweep_jobs(sweep, place / "out")}

    (tmp_path / "old").mkdir()
    write_sums(tmp_path / "old" / "rows.jsonl")
    before = done(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    after = done(tmp_path / "new")
    del before[f"profile of {tmp_path}/old/rows.jsonl"], after[f"profile of {tmp_path}/new/rows.jsonl"]
    assert after == before and len(after) == 5
    file = tmp_path / "new/out/whole/seed0/model/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(HotLoraError, match=r"holds another run: --model .*new/.* against .*old/"):
        done(tmp_path / "new")


def test_drawn_answers_are_of_what_scores(tmp_path: Path):
    drawn = {"samples": 20, "temperature": 0.2}
    sweep = make_sweep(
        Condition("base", drawn, train=False), Condition("a"), Condition("a-drawn", drawn, scores="a"), seeds=(0, 1)
    )
    jobs = [job for job in sweep_jobs(sweep, tmp_path) if "sampling" in job.arguments]
    assert [(job.name, job.arguments["sampling"]) for job in jobs] == [("base", drawn), *[("a-drawn", drawn)] * 2]


@pytest.mark.parametrize(
    ("data", "drawn", "says"),
    [
        ("nano-choice", {"temperature": 0.2}, "on nano-choice no answer is drawn: leave temperature out"),
        ("mbpp", {"temperature": 0.2, "samples": 3}, "on mbpp no answer is drawn: leave samples, temperature out"),
        ("nano-math", {"temperature": -1.0}, r"temperature = -1\.0 is out of range"),
        ("nano-math", {"samples": 3}, "give a temperature above 0"),
    ],
)
def test_what_cannot_be_drawn_is_told_before_anything_runs(tmp_path: Path, data: str, drawn: dict, says: str):
    sweep = make_sweep(Condition("a"), Condition("a-drawn", {"data": data, **drawn}, scores="a"))
    with pytest.raises(HotLoraError, match=says):
        sweep_jobs(sweep, tmp_path)


def write_mbpp(file: Path) -> None:
    """Five problems of each split."""
    ids = (*range(601, 606), *range(11, 16))
    rows = [{"text": f"Write {i}.", "code": f"def f(): return {i}", "task_id": i, "test_list": ["f()"]} for i in ids]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_a_task_without_a_scorer_has_a_held_out_loss_in_every_condition(
    model_folder: Path, tmp_path: Path, train_on: str
):
    write_mbpp(tmp_path / "mbpp.jsonl")
    sweep = make_sweep(
        Condition("base", train=False), Condition("hot"), Condition("again", scores="hot"),
        model=str(model_folder), data=f"mbpp:{tmp_path}",
        options={"train_on": train_on, "max_steps": 2, "batch_size": 2, "r": 2, "max_length": 256},
    )  # fmt: skip
    found = {job.name: job.function(**job.arguments) for job in sweep_jobs(sweep, tmp_path / "out")}
    losses = {name: record["training"]["test_loss"] for name, record in found.items() if record is not None}
    assert losses["base"] == pytest.approx(found["hot"]["training"]["test_loss_before"], rel=1e-5)
    assert losses["again"] == pytest.approx(losses["hot"], rel=1e-5) and losses["hot"] != losses["base"]
    rows = {row.condition: row for row in compare_runs(tmp_path / "out", "hot").tables[0].rows}
    assert rows["base"].against.test.n == rows["again"].against.test.n == 1


def test_scores_of_a_fully_trained_model_are_one_condition_of_one_table(model_folder: Path, tmp_path: Path):
    rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(12)]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = {"data": str(tmp_path / "held.jsonl"), "test_data": str(tmp_path / "held.jsonl")}
    sweep = make_sweep(
        Condition("fft", {**held, "method": "fft"}), Condition("hot", held),
        Condition("fft-again", held, scores="fft"), Condition("hot-again", held, scores="hot"),
        model=str(model_folder), seeds=(0, 1),
        options={"max_steps": 1, "batch_size": 2, "r": 2, "max_length": 64},
    )  # fmt: skip
    for job in sweep_jobs(sweep, tmp_path / "out"):
        first = job.function(**job.arguments)
        if job.function is score_adapter:
            assert job.function(**job.arguments) == first, "done is left alone"
    (table,) = compare_runs(tmp_path / "out", "hot").tables
    found = {row.condition: row for row in table.rows}
    assert table.model == str(model_folder) and found["fft-again"].against.seeds == (0, 1)
    assert found["fft-again"].values == pytest.approx(found["fft"].values, rel=1e-5)
    records = find_records(tmp_path / "out")
    (section,) = read_sections(records)
    assert len(section.records) == len(records) == 8
    assert {record["condition"] for record in records.values()} == {"fft", "hot", "adapter"}, "and no base"


def test_rows_of_a_task_that_are_held_out_are_scored_so_in_every_condition(model_folder: Path, tmp_path: Path):
    """A task's own file has one split; the training holds out some of its rows, and has their loss alone."""
    rows = [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}\n#### {i + 1}"} for i in range(24)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sweep = make_sweep(
        Condition("base", train=False), Condition("hot"), model=str(model_folder),
        data=f"gsm8k:{tmp_path / 'train.jsonl'}",
        options={"test_split": 0.3, "max_steps": 1, "batch_size": 2, "r": 2, "max_length": 96},
    )  # fmt: skip
    found = {job.name: job.function(**job.arguments) for job in sweep_jobs(sweep, tmp_path / "out")}
    assert found["base"]["training"]["test_loss"] == pytest.approx(found["hot"]["training"]["test_loss_before"])


def test_rows_that_are_held_out_are_scored_on_the_model_as_it_is(model_folder: Path, tmp_path: Path):
    rows = [{"prompt": f"is {i} a number?", "completion": " yes it is"} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "max_steps": 2,
        "batch_size": 4,
        "r": 2,
        "max_length": 64,
        "test_split": 0.3,
        "limit": 20,
        "test_limit": 3,
    }
    sweep = Sweep(
        "s", str(model_folder), str(tmp_path / "rows.jsonl"), [Condition("base", train=False), Condition("hot")],
        options=options,
    )  # fmt: skip
    for job in sweep_jobs(sweep, tmp_path / "out"):
        job.function(**job.arguments)
    base, hot = (read_record(tmp_path / "out" / name) for name in ("base", "hot/seed0"))
    assert (
        base["config"]["test_hash"] == hot["config"]["test_hash"] and base["data"]["test"] == hot["data"]["test"] == 3
    )
    assert base["training"]["test_loss"] == pytest.approx(hot["training"]["test_loss_before"], rel=1e-5)
    compared = compare_runs(tmp_path / "out", "hot")
    assert [row.condition for row in compared.tables[0].rows] == ["base", "hot"]
