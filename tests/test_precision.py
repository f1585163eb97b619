"""CPUs without instructions for half precision: what is computed in which dtype, and what is said.

oneDNN is told to use AVX2 alone, as most desktops have it, in a process of its own: it asks once.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from hotlora.precision import cpu_dtype, is_fast_on_cpu

ROOT = Path(__file__).parent.parent
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
SCRIPT = """
import json, sys, time
import torch
from dataclasses import replace
from tiny import tiny_batch
from hotlora.bench import _resolved
from hotlora.contenders import BenchConfig
from hotlora.models import load_model
from hotlora.precision import is_fast_on_cpu
from hotlora.routing import profile_routing
from hotlora.worker import Worker, matrix_rate

folder, bf16, cpu = sys.argv[1], torch.bfloat16, torch.device("cpu")
found = {"is_fast": is_fast_on_cpu(bf16)}
for _ in range(2):
    found["loaded"] = str(load_model(folder, device="cpu").dtype)
print("asked", file=sys.stderr)
for _ in range(2):
    model = load_model(folder, device="cpu", dtype=bf16)
    found["asked"] = str(model.dtype)
    profile_routing(model, [tiny_batch()])
config = BenchConfig(model=folder, tokens=32, device="cpu")
found["bench"] = _resolved(config).dtype
found["bench asked"] = _resolved(replace(config, dtype="bfloat16")).dtype
start = time.perf_counter()
found["rate"] = matrix_rate(bf16, cpu)
found["rate took"] = time.perf_counter() - start
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def on_avx2(tmp_path_factory):
    """What the script found, and its standard error, in parts."""
    folder = tmp_path_factory.mktemp("bf16")
    tiny_model("olmoe").to(torch.bfloat16).save_pretrained(folder)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True, timeout=300,
        env={**os.environ, **AVX2, "PYTHONPATH": path},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    if found["is_fast"]:
        pytest.skip("oneDNN cannot be told here to do without bfloat16 instructions")
    return found, result.stderr


def test_float32_by_default_and_said_once(on_avx2):
    found, said = on_avx2
    assert found["loaded"] == "torch.float32"
    assert said.partition("asked")[0].count("no instructions for bfloat16, the model's dtype: float32 is used") == 1


def test_what_is_asked_for_is_done_and_its_cost_said_once(on_avx2):
    found, said = on_avx2
    assert found["asked"] == "torch.bfloat16"
    assert said.partition("asked")[2].count("a hundred times float32's time") == 1


def test_a_benchmark_is_in_float32_unless_asked(on_avx2):
    found, _ = on_avx2
    assert (found["bench"], found["bench asked"]) == ("float32", "bfloat16")


def test_the_matrix_rate_takes_seconds_whatever_the_rate(on_avx2):
    found, _ = on_avx2
    assert found["rate"] > 0 and found["rate took"] < 15


def test_other_dtypes_are_never_slow():
    for dtype in (torch.float32, torch.float64, torch.int8):
        assert is_fast_on_cpu(dtype) and cpu_dtype(dtype) == dtype


def test_float32_where_it_is_slow():
    for dtype in (torch.bfloat16, torch.float16):
        assert cpu_dtype(dtype) == (dtype if is_fast_on_cpu(dtype) else torch.float32)
