"""Times `hotlora import` of a large array of routed experts beside reading its bytes: does it stream?

    python benchmarks/time_import.py --output benchmarks/import/DEVICE.json

Writes [tokens, layers, k] uint8 ids as a server returns them (10 million tokens of 48 layers x 8 are 3.84 GB) to
--folder and removes them at the end. In each round, in turn, each in a process of its own: `cat FILE` to /dev/null
twice, and the import; first with the file in the system's cache, then with the cache of the file dropped before each
pass. The import's time is that of `import_profile`; `process` is with the start of Python and torch. Peak memory is the
process's resident set, and `over` what the import added to it. Processor time is beside each, for machines that do
other work, too. The counts are compared with the right ones.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from hotlora.base.files import write_json
from hotlora.base.records import environment

EXPERTS = 128
_IMPORT = """
import json, resource, sys, time
from hotlora import import_profile
import hotlora.routing.imported
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, start, cpu = peak(), time.perf_counter(), time.process_time()
profile = import_profile(sys.argv[1], num_experts=int(sys.argv[2]))
print(json.dumps({
    "import": time.perf_counter() - start, "import, cpu": time.process_time() - cpu, "peak": peak(),
    "over": peak() - before, "counts": profile.counts.tolist(), "tokens": profile.num_tokens,
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    file = options.folder / f"routed-{os.getpid()}.npy"
    started = datetime.now(UTC).isoformat(timespec="seconds")
    rounds: dict[str, list[dict[str, float]]] = {"cached": [], "not cached": []}
    try:
        counts = write_ids(file, options.tokens, options.layers, options.k)
        size = file.stat().st_size
        for state, found in rounds.items():
            for _ in range(options.rounds):
                found.append(measure(file, state == "cached", counts, options.tokens))
    finally:
        file.unlink(missing_ok=True)
    result: dict[str, Any] = {
        "version": 1,
        "kind": "import",
        "started": started,
        "command": " ".join(["python", *sys.argv]),
        "settings": {name: getattr(options, name) for name in ("tokens", "layers", "k", "rounds")},
        "bytes": size,
        "seconds": {
            state: {name: {"median": median(found, name), "all": [row[name] for row in found]} for name in found[0]}
            for state, found in rounds.items()
        },
        "import_over_two_passes": {state: over(found) for state, found in rounds.items()},
        "memory": {
            name: {"bytes": most, "share of the file": most / size}
            for name in ("peak", "over")
            if (most := max(row.pop(name) for found in rounds.values() for row in found))
        },
        "environment": environment(),
    }
    for found in result["seconds"].values():
        found.pop("peak", None), found.pop("over", None)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, result)
    print(json.dumps({name: result[name] for name in ("import_over_two_passes", "memory")}, indent=2))


def write_ids(file: Path, tokens: int, layers: int, k: int) -> np.ndarray[Any, Any]:
    """Skewed, distinct ids: some thousand tokens, drawn, over and over. Returns the counts [L, E]."""
    generator = np.random.default_rng(0)
    skew = generator.normal(size=(layers, EXPERTS)).astype(np.float32)
    drawn = [
        np.argpartition(-(skew + generator.gumbel(size=(500, layers, EXPERTS))), k, axis=-1)[..., :k].astype(np.uint8)
        for _ in range(8)
    ]
    block = np.concatenate(drawn)
    header = {"descr": "|u1", "fortran_order": False, "shape": (tokens, layers, k)}
    counts = np.zeros((layers, EXPERTS), np.int64)
    with open(file, "wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for start in range(0, tokens, len(block)):
            part = block[: tokens - start]
            stream.write(part.tobytes())
            for layer in range(layers):
                counts[layer] += np.bincount(part[:, layer].ravel(), minlength=EXPERTS)
        stream.flush()
        os.fsync(stream.fileno())
    return counts


def measure(file: Path, is_cached: bool, counts: np.ndarray[Any, Any], tokens: int) -> dict[str, float]:
    def ready() -> None:
        if is_cached:
            subprocess.run(f"cat {file} > /dev/null", shell=True, check=True)
            return
        with open(file, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    found: dict[str, float] = {"two passes": 0.0, "two passes, cpu": 0.0}
    for _ in range(2):
        ready()
        start, cpu = time.perf_counter(), _children()
        subprocess.run(f"cat {file} > /dev/null", shell=True, check=True)
        found["two passes"] += time.perf_counter() - start
        found["two passes, cpu"] += _children() - cpu
    ready()
    start = time.perf_counter()
    words = [sys.executable, "-c", _IMPORT, str(file), str(EXPERTS)]
    done = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    found["process"] = time.perf_counter() - start
    assert done.pop("tokens") == tokens and np.array_equal(done.pop("counts"), counts), "the counts are wrong"
    return found | done


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def median(found: list[dict[str, float]], name: str) -> float:
    return statistics.median(row[name] for row in found)


def over(found: list[dict[str, float]]) -> dict[str, float]:
    ratios = [row["import"] / row["two passes"] for row in found]
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


if __name__ == "__main__":
    main()
