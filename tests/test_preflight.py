"""What is said of memory before a model is loaded, and that what it advises does fit."""

import itertools
import json

import pytest
import torch
from runs import run_options
from typer.testing import CliRunner
from zoo import zoo_model

from hotlora.cli.main import app
from hotlora.cost import preflight as module
from hotlora.cost.estimate import estimate
from hotlora.cost.preflight import ROOM, layout, preflight
from hotlora.routing.plan import ExpertPlan
from hotlora.training.config import TrainConfig

SMALL = TrainConfig(batch_size=8, max_length=128, r=8)


def needed(config=SMALL, **options) -> int:
    """Of nano, by the estimate."""
    found = estimate(
        "nano", batch_size=config.batch_size, max_length=config.max_length, r=config.r, device="cpu",
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_accumulation_steps=config.gradient_accumulation_steps, **{"fraction": 0.25, **options},
    )  # fmt: skip
    return found["memory"]["total"]


def check(**options):
    given = {"model": "nano", "config": SMALL, "device": "cpu", **options}
    free = given.pop("free", None)
    return preflight(run_options(data="nano-math", **given), free=free)


def test_one_line_where_it_fits():
    found = check(free=10**10)
    assert found.fits and not found.remedies and found.needed == needed()
    assert (
        str(found) == f"memory: a step of 8 × 128 tokens needs about {needed() / 1e6:.0f} MB; 10.0 GB are free on cpu"
    )


def test_the_free_memory_is_the_machines():
    assert 10**7 < check().free < 10**14


def test_the_border_is_the_share_that_is_counted_on():
    just = round(needed() / ROOM)
    assert check(free=just + 2).fits and not check(free=just - 2).fits


def test_remedies_do_fit():
    """Each, by an estimate of its own; and the batch stays as large."""
    free = round(0.6 * needed() / ROOM)
    found = check(free=free)
    assert not found.fits and 1 <= len(found.remedies) <= 3
    for flags, size in found.remedies:
        words = flags.split()
        values = {name: int(value) for name, value in itertools.pairwise(words) if value.isdigit()}
        batch = values.get("--batch-size", SMALL.batch_size)
        assert batch * values.get("--gradient-accumulation-steps", 1) == SMALL.batch_size
        config = TrainConfig(
            batch_size=batch, max_length=values.get("--max-length", SMALL.max_length), r=8,
            gradient_checkpointing="--gradient-checkpointing" in words,
        )  # fmt: skip
        real = needed(config, quantize=values.get("--quantize"))
        assert real <= 1.1 * ROOM * free and size == pytest.approx(real, rel=0.25)
        assert f"{flags} (" in str(found)
    assert "it may not fit" in str(found)


@pytest.mark.parametrize(("batch", "steps", "checkpointing"), [(16, 1, False), (12, 2, True)])
def test_the_largest_batch_that_fits_is_advised(batch, steps, checkpointing):
    """Where free memory is 1% above an estimate of its own; a step keeps a little whatever the batch."""
    config = module.replace(
        SMALL, batch_size=batch, gradient_accumulation_steps=steps, gradient_checkpointing=checkpointing
    )
    sizes = [size for size in range(1, batch) if batch * steps % size == 0]
    for size in sizes[2:4]:
        more = batch * steps // size
        memory = needed(module.replace(config, batch_size=size, gradient_accumulation_steps=more))
        found = check(config=config, free=round(1.01 * memory / ROOM))
        advised = f"--batch-size {size} --gradient-accumulation-steps {more}"
        assert dict(found.remedies)[advised] == pytest.approx(memory, rel=0.01)


def test_no_gpus_are_advised_on_a_cpu():
    found = check(free=10**6)
    assert "GPU" not in str(found) and "a machine with more memory" in str(found)
    assert "several GPUs (configs/fsdp2.yaml)" in str(module.replace(found, device="cuda:0", fixed=0))


def test_quantizing_is_advised_where_weights_are_the_most():
    least = TrainConfig(batch_size=1, max_length=32, r=1, gradient_checkpointing=True)
    weights = estimate("nano", batch_size=1, max_length=32, r=1, device="cpu")["memory"]["weights"]
    found = check(config=least, free=round(0.9 * weights))
    assert any("--quantize" in flags for flags, _ in found.remedies), found


def test_a_budget_is_advised_where_all_experts_are_adapted():
    config = TrainConfig(batch_size=1, max_length=32, r=256, gradient_checkpointing=True)
    assert check(config=config, rule="all", free=10**10).needed > 1.5 * check(config=config, free=10**10).needed
    found = check(config=config, rule="all", free=round(0.6 * check(config=config, rule="all", free=10**10).needed))
    assert any(flags.startswith("--rule hot") for flags, _ in found.remedies), found


def test_the_experts_of_a_run(tmp_path):
    plan = ExpertPlan({layer: (0, 1) for layer in range(6)}, 32, "by hand", {})
    plan.save(tmp_path / "plan.json")
    two = needed(fraction=None, experts_per_layer=2)
    assert check(plan=tmp_path / "plan.json", free=10**10).needed == two
    assert check(experts_per_layer=2, free=10**10).needed == two
    most = needed(fraction=None)
    assert check(rule="all", free=10**10).needed == check(rule="coverage", free=10**10).needed == most


def test_nothing_helps():
    found = check(free=10**6)
    assert not found.fits and not found.is_hopeless and "No option makes it fit" in str(found)


def test_hopeless_is_for_what_cannot_swap():
    found = check(free=10**6)
    on_gpu = module.replace(found, device="cuda:0")
    assert on_gpu.is_hopeless and str(on_gpu).startswith("this does not fit: the model and the adapter's state alone")
    assert not module.replace(on_gpu, free=10**10).is_hopeless


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"full": True}, "full fine-tuning"),
        ({"config": TrainConfig(use_dora=True)}, "DoRA"),
        ({"config": TrainConfig(train_full_experts=True)}, "full experts"),
    ],
)
def test_unknown_is_said_in_one_line(options, reason):
    found = check(**options)
    assert str(found) == f"memory: whether it fits is not known (the estimate does not know {reason})"
    assert not found.is_hopeless


def test_growing_ranks_count_as_they_are_allocated():
    """At twice the rank that is aimed at, of all three projections; PERFT's as they are."""
    plain, at_most = check(rule="all"), check(rule="all", config=module.replace(SMALL, r=2 * SMALL.r))
    growing = check(rule="all", grow_every=5, config=module.replace(SMALL, lr_scheduler="linear"))
    assert plain.fixed < growing.fixed == at_most.fixed
    beside = check(rule="all", config=module.replace(SMALL, perft="D"))
    assert not beside.unknown and 0 < beside.fixed < plain.fixed


def test_a_family_that_cannot_be_estimated_stops_nothing(tmp_path, monkeypatch):
    zoo_model("olmoe").config.save_pretrained(tmp_path)

    def fails(*args, **kwargs):
        raise AttributeError("this one is odd\nin two lines")

    monkeypatch.setattr(module, "step_of", fails)
    found = check(model=tmp_path)
    assert str(found) == "memory: whether it fits is not known (this one is odd)" and not found.is_hopeless


@pytest.mark.parametrize("options", [{"model": "/not/there"}, {"device": "nonsense"}, {"plan": "/not/there.json"}])
def test_what_the_run_tells_better_is_left_to_it(options):
    assert check(**options) is None


def test_it_reads_no_weights(tmp_path):
    """A folder that has a config and nothing else."""
    config = zoo_model("qwen3_moe").config
    config.save_pretrained(tmp_path)
    assert check(model=tmp_path, free=10**11).fits


def train(tmp_path, *flags):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i} + 1 =", "completion": f" {i + 1}"}) + "\n" for i in range(4)))
    command = ["train", "--model", "nano", "--data", str(data), "--max-steps", "1", "--batch-size", "2", "--r", "2"]
    return CliRunner().invoke(
        app, [*command, "--max-length", "32", "--device", "cpu", "--output", str(tmp_path / "run"), *flags]
    )


def test_the_command_says_it_before_it_trains(tmp_path):
    result = train(tmp_path)
    assert result.exit_code == 0, result.output
    assert "memory: a step of 2 × 32 tokens needs about" in " ".join(result.stderr.split())
    assert "memory: a step" not in train(tmp_path, "--no-preflight").stderr


def test_the_command_stops_where_it_cannot_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "device_and_free", lambda name: (torch.device("cuda:0"), 10**6))
    result = train(tmp_path)
    assert result.exit_code != 0 and "--no-preflight" in str(result.exception or result.output)
    assert not (tmp_path / "run").exists()


def test_what_files_are_read_into_is_free_in_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("64000000000\n")
    (tmp_path / "memory.current").write_text("63000000000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\nactive_file 20000000000\ninactive_file 30000000000\n")
    assert module._left_in_container() == 51 * 10**9
    (tmp_path / "memory.max").write_text("max\n")
    assert module._left_in_container() == 1 << 62


def test_a_second_call_under_fsdp_is_counted_in_parts(monkeypatch):
    """The launcher's wish is taken out of the environment by the first one."""
    monkeypatch.setattr(module, "num_processes", lambda: 2)
    monkeypatch.setattr("hotlora.base.processes._wishes", set())
    assert layout(1) == "ddp"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert layout(1) == "fsdp"
    monkeypatch.setattr("hotlora.base.processes._wishes", {"fsdp"})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    assert layout(1) == "fsdp"
