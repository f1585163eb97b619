"""A whole run of several processes, once undisturbed, and once with one of them, or all, killed again and again.

    python killed_ranks.py FOLDER SCENARIO PROCESSES SEED KILLS

Run by test_distributed and scripts/reliability.py. SCENARIO is one of distributed_ranks: ddp, fsdp, experts. A kill is
SIGKILL, of one random process or of all at once: after a random time (in loading, profiling, training or evaluation),
some milliseconds after a random step, in the middle of the next save, or, the last one, in the middle of saving the
adapter. Whoever is left is waited for. The processes are forked children, so that torch is imported once, in the
environment that a launcher gives them. Prints one JSON object.
"""

import gc
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed_ranks
import torch
from distributed_ranks import PATIENCE, exit_codes, fork_ranks, prepare
from killed_run import SAVES, outcome, steps_of
from transformers import Trainer

from hotlora.runs import training as run
from hotlora.training import checkpoints

STEPS_A_KILL = 5
LONGEST = 2.0  # seconds until a kill at a random time, after half the time that the calm run took to its first step
LEFT = 60.0  # seconds that who is left has to end by itself
OF_ALL = ((Trainer, "_save_optimizer_and_scheduler"), (Trainer, "_save_rng_state"))  # what not only the first one saves
ADAPTER = (run, "_save_adapter")


def launch(folder: Path, output: Path, scenario: str, many: int, steps: int, die_in: dict[int, Any]) -> list[int]:
    """The processes of one training; die_in: rank -> the function in which it is killed."""

    def work() -> None:
        place = die_in.get(int(os.environ["RANK"]))
        if place is not None:
            setattr(*place, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
        getattr(distributed_ranks, scenario)(output, config={"max_steps": steps, "lora_dropout": 0.1})

    return fork_ranks(work, many, output)


def ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait_until(happened: Callable[[], bool], children: list[int]) -> None:
    """Or until one of the processes has ended, for what reason ever."""
    end = time.monotonic() + PATIENCE
    while not happened() and not any(map(ended, children)) and time.monotonic() < end:
        time.sleep(0.002)


def one_kill(
    start: Callable[[dict[int, Any]], list[int]], kind: str, killed: Path, many: int, wait: float, chance: random.Random
) -> dict[str, Any] | None:
    """Starts the training, kills, and waits for the others. What came of it; None where all was done before."""
    victims = list(range(many)) if chance.random() < 0.3 else [chance.randrange(many)]
    places = {rank: chance.choice(SAVES if rank == 0 else OF_ALL) for rank in victims} if kind == "save" else {}
    if kind == "adapter":
        places = dict.fromkeys(victims, ADAPTER)
    before = steps_of(killed)
    children = start(places)
    if places:
        wait_until(lambda: all(ended(children[rank]) for rank in victims), children)
    elif kind == "time":
        # On a fast machine not past the steps that are a kill's own, or all would be done before the last one.
        end = time.monotonic() + chance.uniform(0, wait)
        wait_until(lambda: time.monotonic() >= end or steps_of(killed) >= before + STEPS_A_KILL, children)
    else:
        step = before + chance.randint(1, STEPS_A_KILL)
        wait_until(lambda: steps_of(killed) >= step, children)
        time.sleep(chance.uniform(0, 0.03))
    if not places:
        for rank in victims:
            os.kill(children[rank], signal.SIGKILL)  # not reaped yet, so it is no other process
    began = time.monotonic()
    codes = exit_codes(children, LEFT)
    if not any(codes):
        return None
    last = checkpoints.last_complete(killed / "checkpoints")
    return {
        "kind": kind, "victims": victims, "codes": codes, "seconds": round(time.monotonic() - began, 2),
        "steps": steps_of(killed), "checkpoint": checkpoints.step_of(last),
    }  # fmt: skip


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """The largest ones of a step's loss, relative, and of a weight; `close`: by what test_distributed allows."""
    losses, others = (torch.tensor([loss for _, loss, _ in run["losses"]]) for run in (ours, theirs))
    pairs = [(torch.tensor(theirs["adapter"][name]), torch.tensor(one)) for name, one in ours["adapter"].items()]
    close = torch.allclose(others, losses, rtol=1e-5, atol=0)
    return {
        "close": close and all(torch.allclose(*pair, rtol=1e-3, atol=5e-5) for pair in pairs),
        "furthest": {
            "loss": float(((others - losses) / losses).abs().max()),
            "weight": max(float((a - b).abs().max()) for a, b in pairs),
        },
    }


def main(folder: Path, scenario: str, many: int, seed: int, kills: int) -> None:
    prepare(folder)
    gc.freeze()
    steps = STEPS_A_KILL * kills
    calm, killed = folder / "calm", folder / "killed"

    def start(output: Path, places: dict[int, Any]) -> list[int]:
        return launch(folder, output, scenario, many, steps, places)

    began = time.monotonic()
    children = start(calm, {})
    wait_until(lambda: steps_of(calm) > 0, children)
    first = time.monotonic() - began
    assert not any(exit_codes(children)), f"{calm}.*.log say why"

    chance, done = random.Random(seed), []
    kinds = ["step", "save", "time"] + [chance.choice(("step", "save", "time")) for _ in range(max(0, kills - 4))]
    for kind in (*kinds[: kills - 1], "adapter"):
        kill = one_kill(lambda places: start(killed, places), kind, killed, many, first / 2 + LONGEST, chance)
        if kill is None:
            break
        done.append(kill)
    codes = exit_codes(start(killed, {}))
    report: dict[str, Any] = {"kills": done, "codes": codes, "steps": steps}
    if not any(codes):
        ours, theirs = outcome(calm), outcome(killed)
        report["same"] = {name: ours[name] == theirs[name] for name in ours}
        report |= differences(ours, theirs)
        report["leftovers"] = [path.name for path in killed.rglob(".*-*")]
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
