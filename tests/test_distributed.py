"""Real processes over gloo: several do what one does. `distributed_ranks.py` is what they run."""

import importlib.util
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers.distributed import DistributedConfig
from typer.testing import CliRunner

from hotlora.base.errors import HotLoraError
from hotlora.base.processes import _hint_at_one_process, launched_device, sharding, shared_out, start, summed
from hotlora.cli.main import app
from hotlora.routing.profile import RoutingProfile
from hotlora.training.identity import same_run

HERE = Path(__file__).parent
CAN_SHARD = "ep_size" in inspect.signature(DistributedConfig.__init__).parameters
"""Whether the installed transformers can shard a model while it loads; 5.17 cannot."""
CONFIGS = HERE.parent / "configs"
ALONE = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def run_script(name: str, *words: object) -> dict:
    """The JSON that one of the scripts beside the tests prints."""
    done = subprocess.run(
        [sys.executable, HERE / name, *map(str, words)],
        env=ALONE | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"},
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def run_ranks(folder: Path, *jobs: str) -> dict[str, list[int]]:
    """The exit codes of each job's processes; what they wrote is in `folder`."""
    return run_script("distributed_ranks.py", folder, *jobs)


def said(folder: Path, job: str) -> str:
    return "\n".join(log.read_text() for log in sorted(folder.glob(f"{job.replace(':', '-')}.*.log")))


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    jobs = ("one:1", "ddp:2", "fsdp:2", "experts:2", "ddp:4", "fsdp:4", "experts:4", "profile:1", "profile:2")
    resumed = ("calm:1", "resume:4", "resume:2", "resume:1")
    uneven = ("uneven:1", "uneven:2", "uneven:4")
    broken = ("failing:2", "other_data:2", "gone:2")
    return folder, run_ranks(folder, *jobs, *broken, "others_trainer:1", "others_trainer:2", *resumed, *uneven)


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    jobs = ("one:1", "fsdp_checkpointing:2", "experts_twice:4", "others_trainer:1", "others_trainer:4", "families:2")
    return folder, run_ranks(folder, *jobs)


def assert_same_training(folder: Path, one: str, many: str) -> None:
    """Loss at every step, the adapter's file, and what else a run tells; rounding apart."""
    ours, theirs = (
        list(map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())) for name in (one, many)
    )
    assert [row.get("step") for row in ours] == [row.get("step") for row in theirs] and len(ours) >= 4
    assert [row.get("tokens") for row in ours] == [row.get("tokens") for row in theirs]
    torch.testing.assert_close(
        torch.tensor([row["loss"] for row in theirs]), torch.tensor([row["loss"] for row in ours]), rtol=1e-5, atol=0
    )
    ours, theirs = (load_file(folder / name / "adapter" / "adapter_model.safetensors") for name in (one, many))
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
    assert all(tensor.abs().max() > 0 for tensor in ours.values()), "every factor has been trained"
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=5e-5, msg=name)
    configs = [json.loads((folder / name / "adapter" / "adapter_config.json").read_text()) for name in (one, many)]
    for config in configs:
        config["plan"].pop("profile_hash", None)
        config.pop("weights_sha256", None)
    assert configs[0] == configs[1]


def assert_same_run(folder: Path, one: str, many: str, processes: int) -> None:
    assert_same_training(folder, one, many)
    ours, theirs = (json.loads((folder / name / "run.json").read_text()) for name in (one, many))
    assert theirs["status"] == "done" and theirs["config"]["processes"] == processes
    assert theirs["parameters"] == ours["parameters"]
    assert theirs["training"]["test_loss"] == pytest.approx(ours["training"]["test_loss"], rel=1e-6)
    assert theirs["training"]["test_loss"] < theirs["training"]["test_loss_before"]
    profiles = [RoutingProfile.load(folder / name / "profile.safetensors") for name in (one, many)]
    assert torch.equal(profiles[0].counts, profiles[1].counts)
    torch.testing.assert_close(profiles[0].mass, profiles[1].mass, rtol=1e-6, atol=1e-6)
    losses = [(folder / name / "losses.jsonl").read_text().splitlines() for name in (one, many)]
    for ours, theirs in zip(*(map(json.loads, lines) for lines in losses), strict=True):
        assert theirs == {**ours, "loss": pytest.approx(ours["loss"], rel=1e-4), "right": theirs["right"]}
    names = sorted(path.name for path in (folder / many).iterdir() if path.name != ".lock")
    assert names == ["adapter", "checkpoints", "losses.jsonl", "metrics.jsonl", "plan.json", "profile.safetensors",
                     "run.json", "train.json"]  # fmt: skip


@pytest.mark.parametrize("job", ["ddp:2", "fsdp:2", "experts:2", "ddp:4", "fsdp:4", "experts:4"])
def test_several_processes_train_what_one_trains(quick, job):
    folder, codes = quick
    if "ddp" not in job and not CAN_SHARD:
        assert all(codes[job]) and "this transformers cannot shard a model while it loads" in said(folder, job)
        return
    assert codes["one:1"] == [0] and not any(codes[job]), said(folder, job)
    assert_same_run(folder, "one-1", job.replace(":", "-"), len(codes[job]))


def test_two_processes_profile_what_one_profiles_to_the_bit(quick):
    folder, codes = quick
    assert codes["profile:1"] == [0] and codes["profile:2"] == [0, 0], said(folder, "profile:2")
    one, two = (RoutingProfile.load(folder / f"profile-{n}") for n in (1, 2))
    assert two.hash == one.hash and two.num_tokens == one.num_tokens == sum(2 * (5 + i) - 2 for i in range(5))
    one, two = (RoutingProfile.load(folder / f"profile-{n}" / "until.safetensors") for n in (1, 2))
    assert two.hash == one.hash and two.source == one.source and one.saliency is not None
    assert 64 <= one.source["examples"] <= 90 and 0.5 < one.source["stability"]["mean"] < 1


def test_under_fsdp_of_others_the_adapter_is_sharded_and_saved_whole(quick):
    """PEFT's own adapters on experts fail there (peft#3080)."""
    folder, codes = quick
    assert codes["others_trainer:1"] == [0] and codes["others_trainer:2"] == [0, 0], said(folder, "others_trainer:2")
    assert_same_training(folder, "others_trainer-1", "others_trainer-2")


def test_a_checkpoint_of_four_processes_goes_on_in_two_and_then_in_one(quick):
    folder, codes = quick
    assert not any(code for job in ("calm:1", "resume:4", "resume:2", "resume:1") for code in codes[job]), said(
        folder, "resume"
    )
    assert_same_training(folder, "calm-1", "resume")
    record = json.loads((folder / "resume" / "run.json").read_text())
    assert record["status"] == "done" and record["training"]["resumed_from"] == 4 and record["config"]["processes"] == 1


def test_an_error_in_one_process_ends_all_with_one_message(quick):
    folder, codes = quick
    assert codes["failing:2"] == [1, 1]
    logs = said(folder, "failing:2")
    assert logs.count("error:") == 1 and "broken.jsonl" in logs and "Traceback" not in logs


@pytest.mark.parametrize("job", ["uneven:2", "uneven:4"])
def test_no_example_is_read_twice_where_they_do_not_come_out_even(quick, job):
    """Accelerate fills the last batches up with the first examples again."""
    folder, codes = quick
    assert codes["uneven:1"] == [0] and not any(codes[job]), said(folder, job)
    assert_same_training(folder, "uneven-1", job.replace(":", "-"))
    records = [json.loads((folder / name / "run.json").read_text()) for name in ("uneven-1", job.replace(":", "-"))]
    assert records[0]["training"]["tokens"] == records[1]["training"]["tokens"]


def test_a_process_that_reads_other_data_ends_all(quick):
    folder, codes = quick
    assert codes["other_data:2"] == [1, 1]
    logs = said(folder, "other_data:2")
    assert logs.count("error:") == 1 and "process 1 was given another data_hash" in logs and "Traceback" not in logs
    assert not (folder / "other_data-2" / "run.json").exists()


def test_a_process_that_is_gone_is_told_in_the_record(quick):
    folder, codes = quick
    assert codes["gone:2"] == [1, -9]
    record = json.loads((folder / "gone-2" / "run.json").read_text())
    assert record["status"] == "failed" and "another process of this run is gone without a message" in record["error"]
    assert "Connection" not in record["error"] and "gloo" not in record["error"]


@pytest.mark.parametrize(
    ("scenario", "many", "kills"),
    [("ddp", 2, 4), *(pytest.param(*way, 20, marks=pytest.mark.slow) for way in (("ddp", 2), ("fsdp", 2), ("ddp", 4)))],
)
def test_killed_processes_go_on_to_the_end_of_calm_ones(tmp_path, scenario, many, kills):
    """Bit for bit where two sum; DDP sums in another order after a first step, and of four that is another rounding."""
    report = run_script("killed_ranks.py", tmp_path, scenario, many, 0, kills)
    assert len(report["kills"]) == kills and not any(report["codes"])
    for kill in report["kills"]:
        assert all(kill["codes"][rank] == -signal.SIGKILL for rank in kill["victims"]) and all(kill["codes"])
    assert report["same"]["plan"] and report["close"] and not report["leftovers"]
    assert many > 2 or all(report["same"].values())


@pytest.mark.slow
@pytest.mark.parametrize("job", ["fsdp_checkpointing:2", "experts_twice:4"])
def test_more_ways_train_what_one_trains(slow, job):
    folder, codes = slow
    assert codes["one:1"] == [0] and not any(codes[job]), said(folder, job)
    assert_same_run(folder, "one-1", job.replace(":", "-"), len(codes[job]))


@pytest.mark.slow
def test_families_compute_spread_what_they_compute_whole(slow):
    """Errors are against float32: rounding, in bfloat16 no more than a whole model's own."""
    folder, codes = slow
    assert codes["families:2"] == [0, 0], said(folder, "families:2")
    found = json.loads((folder / "families-2").read_text())
    assert len(found) == 4 * 7
    for name, errors in found.items():
        for whole, spread in zip(errors["whole"], errors["spread"], strict=True):
            assert spread <= 1.5 * whole + 1e-5, (name, errors)
        assert "float32" not in name or errors["whole"] == [0, 0]


@pytest.mark.slow
def test_four_processes_of_another_trainer_shard_the_adapter(slow):
    folder, codes = slow
    assert not any(codes["others_trainer:4"]), said(folder, "others_trainer:4")
    assert_same_training(folder, "others_trainer-1", "others_trainer-4")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp2.yaml", "fsdp2-offload.yaml"])
def test_accelerate_launches_with_the_configuration(tmp_path, config):
    output = tmp_path / "run"
    words = f"--num_processes 2 --main_process_port 0 -m hotlora train --model nano --data nano-math -o {output}"
    words += " --max-steps 2 --batch-size 2 --limit 64 --test-limit 3"
    done = subprocess.run(
        [Path(sys.executable).parent / "accelerate", "launch", "--config_file", CONFIGS / config, *words.split()],
        cwd=HERE.parent, env=ALONE | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((output / "run.json").read_text())
    assert record["status"] == "done" and record["config"]["processes"] == 2
    assert record["evaluation"]["nano-math"]["n"] == 3
    assert len((output / "results-nano-math.jsonl").read_text().splitlines()) == 3
    assert done.stdout.count("held-out response loss") == 1


def words_of(launcher: str) -> list[object]:
    if launcher == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--"]
    options = ["--config_file", CONFIGS / launcher, "--num_processes", "2", "--main_process_port", "0", "-m"]
    return [sys.executable, "-m", "accelerate.commands.launch", *options]


def launched(launcher: str, folder: Path, output: Path) -> subprocess.Popen:
    """What `one` of distributed_ranks does, as a user starts it."""
    words = "--max-steps 4 --batch-size 2 --learning-rate 3e-3 --r 4 --lora-alpha 8 --save-steps 2 --max-length 64"
    files = ["--model", folder / "model", "--data", folder / "train.jsonl", "--test-data", folder / "test.jsonl"]
    files += ["-o", output, "--fraction", "0.375", "--device", "cpu"]
    return subprocess.Popen(
        [*words_of(launcher), "hotlora", "train", *files, *words.split()],
        cwd=HERE.parent, env=ALONE | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def kill_at_step(step: int, rank: int, launcher: subprocess.Popen, output: Path) -> list[psutil.Process]:
    """The processes that the launcher had started."""
    metrics, end = output / "metrics.jsonl", time.monotonic() + 900  # DeepSpeed compiles first
    while not (metrics.is_file() and metrics.read_bytes().count(b"\n") >= step):
        if launcher.poll() is not None or time.monotonic() > end:
            launcher.terminate()
            pytest.fail(launcher.communicate()[0])
        time.sleep(0.005)
    ranks = [child for child in psutil.Process(launcher.pid).children(recursive=True) if "RANK" in child.environ()]
    next(child for child in ranks if child.environ()["RANK"] == str(rank)).send_signal(signal.SIGKILL)
    return ranks


no_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install deepspeed"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", ["torchrun", "fsdp2.yaml", pytest.param("deepspeed-zero3.yaml", marks=no_deepspeed)]
)
def test_a_launcher_ends_the_others_and_the_same_command_goes_on(quick, launcher):
    folder, codes = quick
    assert codes["one:1"] == [0]
    command = launched(launcher, folder, folder / launcher)
    first = kill_at_step(3, rank=1, launcher=command, output=folder / launcher)
    told = command.communicate(timeout=300)[0]
    assert command.returncode == 1 and "SIGKILL" in told, told
    # The launcher tells, and so does who is left if it gets to it before it is ended.
    assert told.count("error: another process of this command is gone") == told.count("error: ") <= 1, told
    assert not any(process.is_running() for process in first)
    again = launched(launcher, folder, folder / launcher)
    told = again.communicate(timeout=600)[0]
    assert again.returncode == 0, told
    assert_same_run(folder, "one-1", launcher, 2)
    assert json.loads((folder / launcher / "run.json").read_text())["training"]["resumed_from"] in (2, 4)


@pytest.mark.parametrize("config", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_every_configuration_says_how_it_is_used(config):
    lines = (CONFIGS / config).read_text().splitlines()
    assert any(
        line.startswith("#") and f"accelerate launch --config_file configs/{config} -m hotlora train" in line
        for line in lines[:4]
    )
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(CONFIGS / config))
    assert loaded.num_machines == 1 and loaded.num_processes == 8
    assert loaded.distributed_type == yaml.safe_load("\n".join(lines))["distributed_type"]


def test_in_a_process_by_itself_all_work_is_its_own(monkeypatch):
    assert list(shared_out("abc")) == [("a", True), ("b", True), ("c", True)]
    assert torch.equal(summed(torch.tensor([2**53 + 1])), torch.tensor([2**53 + 1]))
    monkeypatch.setattr("hotlora.base.processes._wishes", set())  # nothing is left for other tests
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert sharding() is None
    with pytest.raises(HotLoraError, match="expert_parallel = 2 must divide the number of processes, and that is 1"):
        sharding(2)


def test_a_run_is_the_same_whoever_has_its_examples():
    options = {"batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1.0, "save_steps": 5}
    assert same_run(options) == {"learning_rate": 1.0, "examples_per_step": 8}
    assert same_run({**options, "batch_size": 1, "processes": 4}) == same_run(options)
    assert same_run({**options, "processes": 4}) != same_run(options)


def test_a_script_that_loads_before_it_joins_the_others_takes_its_own_gpu(monkeypatch, caplog):
    """TRL joins them in SFTConfig, after the model is loaded and profiled: all would be on the first GPU."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert launched_device() == torch.device("cuda:3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # the launcher shows each process its own alone
    assert launched_device() == torch.device("cuda:0")
    assert list(shared_out([1, 2])) == [(1, True), (2, True)]
    assert "4 processes were launched and have not joined" in caplog.text and "PartialState()" in caplog.text
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launched_device() is None


def test_accelerate_that_starts_one_process_on_a_cpu_is_hinted_at(monkeypatch, caplog):
    """What `accelerate launch --cpu --num_processes 2` leaves in the environment of the one process that it starts."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    _hint_at_one_process.cache_clear()
    start("cpu")
    start("cpu")
    assert caplog.text.count("torchrun --nproc-per-node N") == 1
    caplog.clear()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")  # on a GPU
    _hint_at_one_process.cache_clear()
    start("cpu")
    assert not caplog.text


def test_commands_of_one_process_say_so():
    done = CliRunner().invoke(app, ["evaluate", "--data", "nano-math", "--model", "nano"], env={"WORLD_SIZE": "2"})
    assert isinstance(done.exception, HotLoraError)
    assert "hotlora evaluate runs in one process" in str(done.exception)
