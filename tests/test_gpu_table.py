"""benchmarks/gpu_table.py, as far as a CPU shows it."""

import json

import pytest
from test_kernels import run_script
from test_layer_traffic import ROOT, load_script

script = load_script("gpu_table")


def row(name: str, step: float, memory: float) -> dict:
    return {
        "name": name, "status": "done", "seconds": {"step": {"median": step}}, "tokens_per_second": 16384 / step,
        "peak_memory_bytes": memory, "share_of_rate": 0.4,
    }  # fmt: skip


def test_the_table_sets_what_was_measured_beside_what_is_asked():
    rows = {"floor": row("floor", 0.4, 5e10), "hot 25%": row("hot 25%", 0.25, 3e10), "peft": row("peft", 0.5, 8e10)}
    rows["unsloth"] = {"name": "unsloth", "status": "missing", "reason": "not installed"}
    text = script.table(rows)
    assert "| hot 25% | 250 | 0.62 | 65,536 | 30.0 | 40% |" in text and "| unsloth | missing: not installed |" in text
    assert "| hot 25% over the floor, step time | 0.62 | ≤ 0.65 |" in text
    assert "| tokens/s over PEFT target_parameters | 2.00 | ≥ 1.85 |" in text
    assert "| tokens/s over Unsloth, all experts | – | ≥ 1.6 |" in text
    assert "| peak memory over PEFT | 0.38 | ≤ 0.45 |" in text


@pytest.mark.slow
def test_it_runs(tmp_path):
    output = tmp_path / "table.json"
    text = run_script(
        str(ROOT / "benchmarks" / "gpu_table.py"), "--model", "nano", "--tokens", "64", "--steps", "1",
        "--output", str(output),
    )  # fmt: skip
    found = {row["name"]: row["status"] for row in json.loads(output.read_text())["contenders"]}
    assert found["floor"] == found["hot 25%"] == found["all"] == "done" and "| asked |" in text
