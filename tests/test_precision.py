"""CPUs without instructions for half precision: what is computed in which dtype, and what is said."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_config, tiny_model

from hotlora.base.precision import cpu_dtype, is_fast_on_cpu, say_if_slow, say_once
from hotlora.bench.bench import _resolved
from hotlora.bench.contenders import BenchConfig
from hotlora.bench.worker import matrix_rate

ROOT = Path(__file__).parent.parent
SCRIPT = """
import sys
import torch
from tiny import tiny_batch
from hotlora.hf.models import load_model
from hotlora.base.precision import is_fast_on_cpu
from hotlora.routing.profiler import profile_routing

folder = sys.argv[1]
print("fast" if is_fast_on_cpu(torch.bfloat16) else "slow", file=sys.stderr)
for options in ({}, {"dtype": torch.bfloat16}):
    for _ in range(2):
        model = load_model(folder, device="cpu", **options)
        profile_routing(model, [tiny_batch()])
    print(model.dtype, file=sys.stderr)
"""
HALF = ("bfloat16", "float16")


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What a process says that loads and runs a bfloat16 checkpoint where oneDNN may use AVX2 alone, as most desktops
    have it: first as it is by default, then in bfloat16. A process of its own, since oneDNN asks once."""
    folder = tmp_path_factory.mktemp("bf16")
    tiny_model("olmoe").to(torch.bfloat16).save_pretrained(folder)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": path},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    if "slow" not in result.stderr.splitlines():
        pytest.skip("oneDNN cannot be told here to do without bfloat16 instructions")
    return result.stderr


def test_float32_by_default_and_said_once(said):
    by_default, _, _ = said.partition("torch.float32")
    assert "torch.bfloat16" not in by_default
    assert by_default.count("no instructions for bfloat16, the model's dtype: float32 is used") == 1


def test_what_is_asked_for_is_done_and_its_cost_said_once(said):
    _, _, asked = said.partition("torch.float32")
    assert "torch.bfloat16" in asked
    assert asked.count("up to a hundred times float32's time") == 1 and "Leave out --dtype" in asked


@pytest.mark.parametrize("dtype", HALF)
def test_a_benchmark_is_in_float32_unless_asked(dtype, tmp_path):
    tiny_config("olmoe", dtype=dtype).save_pretrained(tmp_path)
    config = BenchConfig(model=str(tmp_path), tokens=32, device="cpu")
    fast = dtype if is_fast_on_cpu(getattr(torch, dtype)) else "float32"
    assert _resolved(config).dtype == fast
    assert _resolved(replace(config, dtype=dtype)).dtype == dtype


def test_the_matrix_rate_takes_seconds_whatever_the_rate():
    """Nearly no CPU has instructions for float16, where the product that is timed elsewhere takes half a minute."""
    start = time.perf_counter()
    assert matrix_rate(torch.float16, torch.device("cpu")) > 0
    assert time.perf_counter() - start < 20


def test_which_dtypes_are_fast():
    for dtype in (torch.float32, torch.float64, torch.int8):
        assert is_fast_on_cpu(dtype) and cpu_dtype(dtype) == dtype
    for name in HALF:
        dtype = getattr(torch, name)
        assert cpu_dtype(dtype) == (dtype if is_fast_on_cpu(dtype) else torch.float32)


def test_a_gpu_that_emulates_bfloat16_is_told(monkeypatch, caplog):
    """A T4's compute capability is 7.5, and torch says there that bfloat16 is supported."""
    said = []
    for capability in ((7, 5), (8, 0)):
        for dtype in (torch.bfloat16, torch.float16):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
            say_once.cache_clear()
            caplog.clear()
            say_if_slow(torch.device("cuda"), dtype)
            said.append("--dtype float16" in caplog.text)
    assert said == [True, False, False, False]
