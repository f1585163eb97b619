"""Every script of examples/ runs, with few steps, and does what it says."""

import json
import math
import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hotlora

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


def run(script: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    """How the script exits (None: by its end) and what it printed, with one step. In this process, for speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("STEPS", "1")
        code = None
        try:
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
    return code, capsys.readouterr().out


def learned(folder: Path, on_top_of: Path | None = None) -> None:
    """The folder holds a whole adapter whose experts, attention and router have all left B = 0."""
    base = hotlora.load_model("nano")
    if on_top_of is not None:
        base = hotlora.load_adapter(base, on_top_of).merge_and_unload()
    model = hotlora.load_adapter(base, folder)
    parts = {"experts": 0, "self_attn": 0, "gate": 0}
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            assert tensor.isfinite().all() and tensor.any(), name
            parts[next(part for part in parts if f".{part}." in name)] += 1
    assert all(parts.values())


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which trl_sft.py has run."""
    folder = tmp_path_factory.mktemp("examples")
    paths = [str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "STEPS": "2"}
    command = [sys.executable, str(EXAMPLES / "trl_sft.py")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert finite("Loss", done.stdout) < 10
    return folder


def finite(label: str, text: str) -> float:
    """The number after `label`."""
    found = re.findall(rf"{label} (\S+)", text)
    assert found, text
    value = float(found[-1].rstrip("%;,."))
    assert math.isfinite(value)
    return value


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_read_at_a_glance(script: Path):
    assert len(script.read_text().splitlines()) < (60 if script.name == "grpo_replay.py" else 40)
    assert script.name in (EXAMPLES / "README.md").read_text()


def test_three_lines_of_the_sft_script_are_hotloras(tuned: Path):
    lines = (EXAMPLES / "trl_sft.py").read_text().splitlines()
    assert [line.partition(" = ")[0] for line in lines if re.search(r"# .*\d of 3", line)] == [
        "profile",
        "plan",
        "config",
    ]
    assert sum("hotlora." in line and not line.startswith(("import", "from")) for line in lines) == 3
    learned(tuned / "runs/examples/sft/adapter")


def test_grpo_goes_on_from_the_sft_adapter(tuned: Path, capsys: pytest.CaptureFixture[str]):
    code, text = run("grpo.py", tuned, capsys)
    assert code is None and 0 <= finite("Reward from", text) <= 1
    learned(tuned / "runs/examples/grpo/adapter")


def test_grpo_replays_the_engines_experts(tuned: Path, capsys: pytest.CaptureFixture[str]):
    code, text = run("grpo_replay.py", tuned, capsys)
    assert code is None and "64 rows went to the engine's experts, 0 to others" in text
    assert (tuned / "runs/examples/grpo_replay/adapter/adapter_model.safetensors").is_file()


def test_dpo_learns_an_adapter_of_its_own(tuned: Path, capsys: pytest.CaptureFixture[str]):
    code, text = run("dpo.py", tuned, capsys)
    assert code is None and finite("Loss", text) < 1
    learned(tuned / "runs/examples/dpo/adapter", on_top_of=tuned / "runs/examples/sft/adapter")
    first, second = (
        json.loads((tuned / f"runs/examples/{x}/adapter/adapter_config.json").read_text()) for x in ("sft", "dpo")
    )
    assert first["plan"] == second["plan"]


def test_plain_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, text = run("plain_loop.py", tmp_path, capsys)
    assert code is None and finite("step 1: loss", text) < 10
    assert re.search(r"^Question: .*\nAnswer:", text, re.M) and "trainable params" in text
    learned(tmp_path / "runs/examples/plain")


def test_two_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, text = run("two_tasks.py", tmp_path, capsys)
    assert code is None and 0 < finite("The two plans share", text) < 100
    assert len(re.findall(r"adapter (?:math|sql): \d+% of \d+ on nano-(?:math|sql)", text)) == 4
    folder = tmp_path / "runs/examples/two-tasks"
    for name in ("math", "sql"):
        learned(folder / name)
    plans = [
        json.loads((folder / name / "adapter_config.json").read_text())["plan"]["experts"] for name in ("math", "sql")
    ]
    assert plans[0] != plans[1]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_serving_exports_as_far_as_the_engine_is_there(engine: str, tuned: Path, capsys: pytest.CaptureFixture[str]):
    if find_spec(engine):
        pytest.skip(f"{engine} is installed: this is the test for machines without it")
    code, text = run(f"serve_{engine}.py", tuned, capsys)
    assert "not installed here" in code and "pip install" in code and f"{engine}/adapter" in text
    folder = tuned / f"runs/examples/{engine}"
    assert (folder / "base/config.json").is_file() and (folder / "base/tokenizer.json").is_file()
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 8
    exported, source = tensors(folder / "adapter"), tuned / "runs/examples/sft/adapter"
    plan = json.loads((source / "adapter_config.json").read_text())["plan"]
    for layer, hot in plan["experts"].items():
        # vLLM wants every expert's three projections, SGLang takes those that are there.
        present = range(plan["num_experts"]) if engine == "vllm" else hot
        for expert in range(plan["num_experts"]):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                key = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{projection}.lora_B.weight"
                assert (key in exported) == (expert in present)
                assert expert not in hot or exported[key].any()
                assert expert in hot or key not in exported or not exported[key].any()
    assert not any(".gate.lora_" in key for key in exported), "the router's update is in the base"
