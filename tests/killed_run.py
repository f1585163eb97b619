"""A whole run (profile, plan, training, evaluation) once undisturbed, and once killed again and again.

    python killed_run.py FOLDER SEED KILLS [WAY]

Run by test_reliability and scripts/reliability.py. A kill is SIGKILL, and comes in one of three ways, by the seed:
after a random time (in loading, profiling, training or evaluation), some milliseconds after a random step, or in the
middle of the next save. The runs are forked children, so that torch is imported once. Prints one JSON object.
"""

import gc
import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from runs import run_training
from safetensors.torch import load_file
from tiny import tiny_model
from tiny_files import write_sums
from tiny_tokenizer import byte_tokenizer
from transformers import Trainer, trainer

from hotlora.base.records import read_record
from hotlora.training import checkpoints
from hotlora.training.config import TrainConfig

STEPS_A_KILL = 5
LONGEST = 1.0  # seconds until a kill at a random time
WAYS: dict[str, dict[str, Any]] = {
    "lora": {},
    "fft": {"method": "fft"},
    "dr-lora": {"method": "dr-lora", "grow_every": 4},
    "perft-r": {"method": "perft-r"},
    "dense-mixer": {"dense_mixer": True},
    "offload": {"offload": "all"},
    "offload-quantized": {"offload": "all", "quantize": 4},
}
TIMES = ("started", "seconds", "tokens_per_second", "peak_memory_bytes", "resumed_from")
# Where a save may be cut: the weights are there and no optimizer, all but the random state, all but the mark, …
SAVES = (
    (Trainer, "_save_optimizer_and_scheduler"),
    (Trainer, "_save_rng_state"),
    (trainer, "rotate_checkpoints"),
    (checkpoints, "mark_complete"),
)


def run_once(folder: Path, output: Path, steps: int, way: str) -> None:
    config = TrainConfig(
        max_steps=steps, batch_size=4, save_steps=3, learning_rate=3e-3, r=4, lora_alpha=8, max_length=64,
        lora_dropout=0.1, lr_scheduler="cosine",
    )  # fmt: skip
    rows = str(folder / "rows.jsonl")
    run_training(str(folder / "model"), rows, output, config=config, test_data=rows, **WAYS[way])


def start(folder: Path, output: Path, steps: int, way: str, die_in: tuple[Any, str] | None = None) -> int:
    child = os.fork()
    if child == 0:
        if die_in is not None:
            setattr(*die_in, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
        try:
            run_once(folder, output, steps, way)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def steps_of(output: Path) -> int:
    path = output / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_step(output: Path, step: int, child: int, seconds: float = math.inf) -> None:
    """Or so long, or until the child has ended."""
    end = time.monotonic() + seconds
    while steps_of(output) < step and time.monotonic() < end:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
        time.sleep(0.002)


def timeless(value: object) -> object:
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in TIMES}
    return value


def outcome(output: Path) -> dict[str, Any]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    rows = [(row["step"], row["loss"], row["tokens"]) for row in map(json.loads, lines)]
    file = output / "adapter" / "adapter_model.safetensors"
    file = file if file.is_file() else output / "model" / "model.safetensors"
    weights = {name: tensor.tolist() for name, tensor in load_file(file).items()}
    plan = (output / "plan.json").read_text() if (output / "plan.json").is_file() else None
    return {"record": timeless(read_record(output)), "losses": rows, "adapter": weights, "plan": plan}


def main(folder: Path, seed: int, kills: int, way: str = "lora") -> None:
    tiny_model("olmoe", vocab_size=259, max_position_embeddings=128).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    write_sums(folder / "rows.jsonl")
    gc.freeze()
    steps = STEPS_A_KILL * kills
    calm, killed = folder / "calm", folder / "killed"
    began = time.monotonic()
    assert wait(start(folder, calm, steps, way)) == 0
    whole = time.monotonic() - began

    chance, done = random.Random(seed), []
    while len(done) < kills:
        kind = ("step", "save", "time")[len(done)] if len(done) < 3 else chance.choice(("step", "save", "time"))
        before = steps_of(killed)
        child = start(folder, killed, steps, way, chance.choice(SAVES) if kind == "save" else None)
        if kind == "time":
            # On a fast machine not past the steps that are a kill's own, or all would be done before the last one.
            seconds = chance.uniform(0, min(LONGEST, 0.5 * whole))
            wait_for_step(killed, before + STEPS_A_KILL, child, seconds)
        elif kind == "step":
            wait_for_step(killed, before + chance.randint(1, STEPS_A_KILL), child)
            time.sleep(chance.uniform(0, 0.03))
        if kind != "save":
            os.kill(child, signal.SIGKILL)
        if (code := wait(child)) == 0:  # too late: it was done
            break
        last = checkpoints.last_complete(killed / "checkpoints")
        done.append({"kind": kind, "code": code, "steps": steps_of(killed), "checkpoint": checkpoints.step_of(last)})
    code = wait(start(folder, killed, steps, way))
    ours, theirs = outcome(calm), outcome(killed)
    report = {name: ours[name] == theirs[name] for name in ours}
    leftovers = [path.name for path in killed.rglob(".*-*")]
    print(json.dumps({"kills": done, "code": code, "same": report, "leftovers": leftovers, "steps": steps}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
