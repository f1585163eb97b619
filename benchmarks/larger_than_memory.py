"""Trains a model whose experts are larger than the memory that the process may use, and compares the adapter's bytes.

    sudo python benchmarks/larger_than_memory.py --output benchmarks/experts/cpu-limited.json

Layers of OLMoE-1B-7B with random weights in bfloat16. `hotlora train --offload all` runs in a memory cgroup (Linux,
root; page cache that it fills counts, too), `hotlora train` without one; both adapters must have the same bytes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from experts_elsewhere import save_model

GROUPS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))
LIMIT = ("memory.limit_in_bytes", "memory.max")
MOST = ("memory.max_usage_in_bytes", "memory.peak")
TRAIN = (
    "--data nano-math --limit 8 --test-limit 2 --no-evaluate --max-steps 2 --batch-size 2 --r 8 "
    "--dtype bfloat16 --device cpu --rule hot"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--limit-gb", type=float, default=2.0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    from hotlora.base.files import write_json
    from hotlora.base.records import environment
    from hotlora.hf.models import load_tokenizer, structure

    started = datetime.now(UTC).isoformat(timespec="seconds")
    limit = int(options.limit_gb * 1e9)
    with tempfile.TemporaryDirectory(dir=".") as temporary:
        folder = Path(temporary)
        save_model(folder / "model", options.layers, vocab_size=2048)
        load_tokenizer("nano").save_pretrained(folder / "model")
        named = structure(str(folder / "model")).named_parameters()
        experts = sum(p.numel() * 2 for name, p in named if ".experts." in name)
        found = {
            "in memory": run(folder, "plain", "", None),
            "offloaded, limited": run(folder, "limited", f"--offload all --offload-folder {folder}", limit),
        }
        ours, plain = (
            (folder / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("limited", "plain")
        )
    record = {
        "started": started, "layers": options.layers, "experts_bytes": experts, "limit_bytes": limit, "train": TRAIN,
        "environment": environment(), "runs": found, "adapters_equal": ours == plain,
    }  # fmt: skip
    options.output.parent.mkdir(exist_ok=True)
    write_json(options.output, record)
    print(
        json.dumps({key: record[key] for key in ("experts_bytes", "limit_bytes", "runs", "adapters_equal")}, indent=1)
    )


def run(folder: Path, name: str, more: str, limit: int | None) -> dict[str, Any]:
    """Seconds and, of a limited run, the most that it and its page cache had."""
    command = [
        sys.executable,
        "-m",
        "hotlora",
        "train",
        "--model",
        str(folder / "model"),
        *TRAIN.split(),
        *more.split(),
    ]
    command += ["--output", str(folder / name)]
    group = None
    if limit is not None:
        group = next(place for place in GROUPS if place.is_dir()) / f"hotlora-{os.getpid()}"
        group.mkdir()
        next(group / file for file in LIMIT if (group / file).exists()).write_text(str(limit))
    began = time.perf_counter()
    enter = (lambda: (group / "cgroup.procs").write_text(str(os.getpid()))) if group else None
    subprocess.run(command, check=True, preexec_fn=enter)  # type: ignore[arg-type]
    found: dict[str, Any] = {"seconds": time.perf_counter() - began}
    if group is not None:
        found["most_bytes"] = int(next(group / file for file in MOST if (group / file).exists()).read_text())
        group.rmdir()
    return found


if __name__ == "__main__":
    main()
