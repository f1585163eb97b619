"""Real processes over gloo: several do what one does. `distributed_ranks.py` is what they run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from hotlora.cli import app
from hotlora.config import same_run
from hotlora.distributed import sharding, shared_out, summed
from hotlora.errors import HotLoraError
from hotlora.routing import RoutingProfile

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs"
ALONE = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def run_ranks(folder: Path, *jobs: str) -> dict[str, list[int]]:
    """The exit codes of each job's processes; what they wrote is in `folder`."""
    done = subprocess.run(
        [sys.executable, HERE / "distributed_ranks.py", folder, *jobs],
        env=ALONE | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"},
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def said(folder: Path, job: str) -> str:
    return "\n".join(log.read_text() for log in sorted(folder.glob(f"{job.replace(':', '-')}.*.log")))


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    jobs = ("one:1", "ddp:2", "fsdp:2", "experts:2", "profile:1", "profile:2", "failing:2")
    return folder, run_ranks(folder, *jobs, "others_trainer:1", "others_trainer:2")


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    jobs = ("one:1", "fsdp_checkpointing:2", "ddp:4", "fsdp:4", "experts:4", "experts_twice:4", "others_trainer:1")
    return folder, run_ranks(
        folder, *jobs, "families:2", "others_trainer:4", "calm:1", "resume:4", "resume:2", "resume:1"
    )


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
    names = sorted(path.name for path in (folder / many).iterdir() if path.name != ".lock")
    assert names == ["adapter", "checkpoints", "metrics.jsonl", "plan.json", "profile.safetensors", "run.json",
                     "train.json"]  # fmt: skip


@pytest.mark.parametrize("job", ["ddp:2", "fsdp:2", "experts:2"])
def test_two_processes_train_what_one_trains(quick, job):
    folder, codes = quick
    assert codes["one:1"] == [0] and codes[job] == [0, 0], said(folder, job)
    assert_same_run(folder, "one-1", job.replace(":", "-"), 2)


def test_two_processes_profile_what_one_profiles_to_the_bit(quick):
    folder, codes = quick
    assert codes["profile:1"] == [0] and codes["profile:2"] == [0, 0], said(folder, "profile:2")
    one, two = (RoutingProfile.load(folder / f"profile-{n}") for n in (1, 2))
    assert two.hash == one.hash and two.num_tokens == one.num_tokens == sum(2 * (5 + i) - 2 for i in range(5))


def test_under_fsdp_of_others_the_adapter_is_sharded_and_saved_whole(quick):
    """PEFT's own adapters on experts fail there (peft#3080)."""
    folder, codes = quick
    assert codes["others_trainer:1"] == [0] and codes["others_trainer:2"] == [0, 0], said(folder, "others_trainer:2")
    assert_same_training(folder, "others_trainer-1", "others_trainer-2")


def test_an_error_in_one_process_ends_all_with_one_message(quick):
    folder, codes = quick
    assert codes["failing:2"] == [1, 1]
    logs = said(folder, "failing:2")
    assert logs.count("error:") == 1 and "broken.jsonl" in logs and "Traceback" not in logs


@pytest.mark.slow
@pytest.mark.parametrize("job", ["fsdp_checkpointing:2", "ddp:4", "fsdp:4", "experts:4", "experts_twice:4"])
def test_more_processes_and_ways_train_what_one_trains(slow, job):
    folder, codes = slow
    assert codes["one:1"] == [0] and not any(codes[job]), said(folder, job)
    assert_same_run(folder, "one-1", job.replace(":", "-"), len(codes[job]))


@pytest.mark.slow
def test_families_compute_spread_what_they_compute_whole(slow):
    """Errors are against float32: rounding, in bfloat16 no more than a whole model's own."""
    folder, codes = slow
    assert codes["families:2"] == [0, 0], said(folder, "families:2")
    found = json.loads((folder / "families-2").read_text())
    assert len(found) == 4 * 6
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
def test_a_checkpoint_of_four_processes_goes_on_in_two_and_then_in_one(slow):
    folder, codes = slow
    assert not any(code for job in ("calm:1", "resume:4", "resume:2", "resume:1") for code in codes[job]), said(
        folder, "resume"
    )
    assert_same_training(folder, "calm-1", "resume")
    record = json.loads((folder / "resume" / "run.json").read_text())
    assert record["status"] == "done" and record["training"]["resumed_from"] == 4 and record["config"]["processes"] == 1


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
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert sharding() is None
    with pytest.raises(HotLoraError, match="expert_parallel = 2 must divide the number of processes, and that is 1"):
        sharding(2)


def test_a_run_is_the_same_whoever_has_its_examples():
    options = {"batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1.0, "save_steps": 5}
    assert same_run(options) == {"learning_rate": 1.0, "examples_per_step": 8}
    assert same_run({**options, "batch_size": 1, "processes": 4}) == same_run(options)
    assert same_run({**options, "processes": 4}) != same_run(options)


def test_commands_of_one_process_say_so():
    done = CliRunner().invoke(app, ["evaluate", "--data", "nano-math", "--model", "nano"], env={"WORLD_SIZE": "2"})
    assert isinstance(done.exception, HotLoraError)
    assert "hotlora evaluate runs in one process" in str(done.exception)
