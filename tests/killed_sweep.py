"""Run as a script by test_sweep: makes a small sweep once undisturbed and once killed twice.

    python killed_sweep.py FOLDER

The sweeps run in forked children, and their workers are forked too, so that torch is imported once. Prints one JSON
object.
"""

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from tiny_files import save_tiny_model, write_sums

from hotlora.base.records import find_records
from hotlora.runs import worker_pool as crew
from hotlora.runs.sweep import PROFILES, Condition, Sweep, run_sweep
from hotlora.training.config import TrainConfig

TIMES = ("started", "seconds", "tokens_per_second", "peak_memory_bytes", "resumed_from")
CONFIG = TrainConfig(
    max_steps=16, batch_size=4, save_steps=3, learning_rate=3e-3, r=4, lora_alpha=8, max_length=64, lora_dropout=0.1
)


def make_sweep(folder: Path, kept: int) -> Sweep:
    conditions = [
        Condition("hot", {"rule": "hot", "experts_per_layer": kept}),
        Condition("wrong", {"rule": "hot", "experts_per_layer": 9}),
    ]
    rows = str(folder / "rows.jsonl")
    return Sweep("killed", str(folder / "model"), rows, conditions, (0, 1), CONFIG, {"test_data": rows})


def start(folder: Path, output: Path, kept: int = 3) -> int:
    child = os.fork()
    if child == 0:
        try:
            crew.START = "fork"
            jobs = run_sweep(make_sweep(folder, kept), output)
            os._exit(sum(job.status == "failed" for job in jobs))
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(100)
    return child


def wait_for(what: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.002)


def kill(child: int, victim: int) -> tuple[int, bool]:
    """Kills `victim`; the sweep's exit code, and whether all its processes are gone within seconds."""
    family = [psutil.Process(child), *psutil.Process(child).children(recursive=True)]
    os.kill(victim, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    _, alive = psutil.wait_procs(family[1:], timeout=10)
    return code, not alive


def steps(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def timeless(value: object) -> object:
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in TIMES}
    return value


def outcome(output: Path) -> dict[str, object]:
    records = {folder.relative_to(output).as_posix(): record for folder, record in find_records(output).items()}
    for record in records.values():
        if "error" in record:
            record["error"] = record["error"].replace(str(output), "OUTPUT")
    return {name: timeless(record) for name, record in records.items()}


def main(folder: Path) -> None:
    save_tiny_model(folder / "model")
    write_sums(folder / "rows.jsonl")
    gc.freeze()  # else each child copies what the collector touches
    calm, killed = folder / "calm", folder / "killed"
    codes = [os.waitstatus_to_exitcode(os.waitpid(start(folder, calm), 0)[1])]

    # In the first run, then in the second: the whole sweep, as a reboot would.
    gone = []
    for at, step in ((killed / "hot" / "seed0", 8), (killed / "hot" / "seed1", 5)):
        child = start(folder, killed)
        wait_for(lambda: steps(at) >= step)  # noqa: B023
        code, all_gone = kill(child, child)
        codes.append(code)
        gone.append(all_gone)
    first = (killed / "hot" / "seed0" / "run.json").stat().st_mtime_ns
    profile = next((killed / PROFILES).rglob("profile.safetensors")).stat().st_mtime_ns
    codes.append(os.waitstatus_to_exitcode(os.waitpid(start(folder, killed), 0)[1]))
    report = {
        "codes": codes, "gone": gone,
        "same": outcome(calm) == outcome(killed),
        "records": {name: record["status"] for name, record in outcome(killed).items()},
        "resumed": [find_records(killed)[killed / "hot" / f"seed{s}"]["training"]["resumed_from"] for s in (0, 1)],
        "left_alone": [
            (killed / "hot" / "seed0" / "run.json").stat().st_mtime_ns == first,
            next((killed / PROFILES).rglob("profile.safetensors")).stat().st_mtime_ns == profile,
        ],
    }  # fmt: skip

    # A worker alone, as the kernel does when memory runs out.
    worker = folder / "worker"
    child = start(folder, worker)
    wait_for(lambda: steps(worker / "hot" / "seed0") >= 5)
    code, _ = kill(child, psutil.Process(child).children()[0].pid)
    report["worker"] = {"code": code, **{n: [r["status"], r.get("error")] for n, r in outcome(worker).items()}}
    codes.append(os.waitstatus_to_exitcode(os.waitpid(start(folder, worker), 0)[1]))
    report["mended"] = outcome(calm) == outcome(worker)

    # Other options in the same folder: refused, and what is there stays.
    report["other"] = os.waitstatus_to_exitcode(os.waitpid(start(folder, worker, kept=4), 0)[1])
    report["kept"] = outcome(calm) == outcome(worker)
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
