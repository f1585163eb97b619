"""The command `hotlora train` ended from outside: by SIGTERM or Ctrl-C, by a second one in its folder, by a full disk.

    python ended_runs.py FOLDER FULL

Run by test_reliability and scripts/reliability.py; FULL is how many full disks to try. The commands run in forked
children, so that torch is imported once. Prints one JSON object.
"""

import ctypes
import gc
import json
import os
import random
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from killed_run import outcome, steps_of, wait, wait_for_step
from tiny import tiny_model
from tiny_files import write_sums
from tiny_tokenizer import byte_tokenizer
from transformers import Trainer

from hotlora.base.records import read_record
from hotlora.cli import main as cli
from hotlora.runs import training as run
from hotlora.runs import worker_pool as crew
from hotlora.training import checkpoints

SAVE_STEPS = 3
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
DISK = 64_000_000  # bytes


def words(folder: Path, output: Path) -> list[str]:
    text = (
        f"train --model {folder}/model --data {folder}/rows.jsonl --test-data {folder}/rows.jsonl --output {output} "
        f"--max-steps 24 --save-steps {SAVE_STEPS} --batch-size 4 --r 4 --lora-alpha 8 --max-length 64 "
        "--learning-rate 3e-3 --lora-dropout 0.1 --no-preflight"  # a second in each process
    )
    return text.split()


def command(words: list[str]) -> int:
    """The exit code of the command, run in this process."""
    sys.argv = ["hotlora", *words]
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def in_child(log: Path, what: Callable[[], int]) -> int:
    """A forked process that does `what`, exits with its result and prints to `log`."""
    child = os.fork()
    if child == 0:
        for number in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        try:
            code = what()
            sys.stdout.flush()
            os._exit(code)
        except BaseException:
            traceback.print_exc()
            os._exit(100)
    return child


def sigterm(folder: Path, calm: Any) -> dict[str, Any]:
    output, log = folder / "sigterm", folder / "sigterm.log"
    child = in_child(log, lambda: command(words(folder, output)))
    wait_for_step(output, 4, child)
    os.kill(child, signal.SIGTERM)
    code = wait(child)
    return {**after_a_signal(folder, output, log, code), "same": outcome(output) == calm}


def ctrl_c(folder: Path, calm: Any) -> dict[str, Any]:
    """Ctrl-C to the real command, in a process of its own."""
    output, log = folder / "ctrl-c", folder / "ctrl-c.log"
    with open(log, "wb") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", "hotlora", *words(folder, output)], stdout=file, stderr=subprocess.STDOUT
        )
    wait_for_step(output, 4, child.pid)
    child.send_signal(signal.SIGINT)
    return {**after_a_signal(folder, output, log, child.wait()), "same": outcome(output) == calm}


def after_a_signal(folder: Path, output: Path, log: Path, code: int) -> dict[str, Any]:
    """How the command ended, and that it goes on: `outcome` is to be had afterwards."""
    record, last = read_record(output), checkpoints.last_whole(output / "checkpoints")
    report = {
        "code": code, "steps": steps_of(output), "checkpoint": checkpoints.step_of(last), "said": log.read_text(),
        "status": record["status"], "error": record.get("error"),
        "left": [path.name for path in output.rglob(".*-*")],
    }  # fmt: skip
    report["again"] = wait(in_child(log, lambda: command(words(folder, output))))
    report["resumed_from"] = read_record(output)["training"]["resumed_from"]
    return report


def ctrl_c_in(folder: Path, name: str, calm: Any, module: Any, function: str, times: int = 1) -> dict[str, Any]:
    """Ctrl-C, `times`, when the command calls a function of a module or class."""
    output, log = folder / name, folder / f"{name}.log"

    def stopped() -> int:
        def pressing(*args: Any, **kwargs: Any) -> Any:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
            return original(*args, **kwargs)

        original = getattr(module, function)
        setattr(module, function, pressing)
        return command(words(folder, output))

    code = wait(in_child(log, stopped))
    return {**after_a_signal(folder, output, log, code), "same": outcome(output) == calm}


def two_at_once(folder: Path, calm: Any) -> dict[str, Any]:
    output, log = folder / "both", folder / "both.log"
    first = in_child(folder / "first.log", lambda: command(words(folder, output)))
    wait_for_step(output, 2, first)
    os.kill(first, signal.SIGSTOP)  # or it may have ended before the second one looks
    code = wait(in_child(log, lambda: command(words(folder, output))))
    os.kill(first, signal.SIGCONT)
    report = {"code": code, "said": log.read_text(), "first": first, "first_code": wait(first)}
    return {**report, "same": outcome(output) == calm}


def sigterm_to_a_sweep(folder: Path, calm: Any) -> dict[str, Any]:
    """Its worker is forked, too, and trains as the calm run does."""
    output, log, file = folder / "sweep", folder / "sweep.log", folder / "study.py"
    file.write_text(
        "from hotlora.runs.sweep import Condition, Sweep\nfrom hotlora.training.config import TrainConfig\n"
        f"config = TrainConfig(max_steps=24, save_steps={SAVE_STEPS}, batch_size=4, r=4, lora_alpha=8, max_length=64, "
        "learning_rate=3e-3, lora_dropout=0.1)\n"
        f"SWEEP = Sweep('s', '{folder}/model', '{folder}/rows.jsonl', [Condition('hot')], (0,), config, "
        f"{{'test_data': '{folder}/rows.jsonl'}})\n"
    )
    sweep, run = ["sweep", str(file), "--output", str(output)], output / "hot" / "seed0"
    child = in_child(log, lambda: command(sweep))
    wait_for_step(run, 4, child)
    os.kill(child, signal.SIGTERM)
    code, steps = wait(child), steps_of(run)
    report = {
        "code": code,
        "steps": steps,
        "said": log.read_text(),
        "again": wait(in_child(log, lambda: command(sweep))),
    }
    report["resumed_from"] = read_record(run)["training"]["resumed_from"]
    found = outcome(run)
    return {**report, "same": all(found[name] == calm[name] for name in ("losses", "adapter", "plan"))}


def own_disk(at: Path) -> bool:
    """Whether this process, which has one thread, could mount a small disk of its own at `at`."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0:
        return False
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    except OSError:
        return False
    at.mkdir(parents=True, exist_ok=True)
    return libc.mount(b"none", str(at).encode(), b"tmpfs", 0, f"size={DISK}".encode()) == 0


def fill(disk: Path, leave: int) -> Path:
    """Fills a disk but for about `leave` bytes."""
    filler = disk / "filler"
    space = os.statvfs(disk)
    with open(filler, "wb") as file:
        left = space.f_bavail * space.f_frsize - leave
        while left > 0:
            left -= file.write(bytes(min(left, 1 << 20)))
    return filler


def full_disk(folder: Path, output: Path, step: int, leave: int, disk: Path | None, log: Path) -> dict[str, Any]:
    """The command as its disk fills up right before the checkpoint of `step`, in this process; then with room again.

    disk: a disk of our own; None: no file may grow past `leave` bytes, which the system tells in the same way.
    """
    save, limits = Trainer._save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(self: Trainer, *args: Any) -> None:
        if self.state.global_step == step:
            if disk is None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (leave, limits[1]))
            else:
                fill(disk, leave)
        save(self, *args)

    Trainer._save_checkpoint = filling
    before = log.stat().st_size if log.exists() else 0
    code = command(words(folder, output))
    Trainer._save_checkpoint = save
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if disk is not None:
        (disk / "filler").unlink()
    left = sorted(path.name for path in (output / "checkpoints").iterdir())
    whole = checkpoints.last_whole(output / "checkpoints")
    said = log.read_bytes()[before:].decode(errors="replace")
    again = command(words(folder, output))
    return {
        "step": step, "leave": leave, "code": code, "said": said, "left": left, "again": again,
        "checkpoint": checkpoints.step_of(whole), "resumed_from": read_record(output)["training"]["resumed_from"],
    }  # fmt: skip


def full_disks(folder: Path, calm: Any, count: int, has_disk: bool) -> dict[str, Any] | None:
    """`count` times: None where this system gives us no disk of our own."""
    found, log, chance = folder / f"full-{has_disk}.json", folder / f"full-{has_disk}.log", random.Random(0)
    disk = folder / "disk"

    def many() -> int:
        if has_disk and not own_disk(disk):
            return 77
        reports = []
        for number in range(count):
            # A file that may not grow past a limit may be the log, too.
            step, least = SAVE_STEPS * chance.randint(2, 7), 0 if has_disk else 30_000
            leave = chance.randint(least, 100_000 if has_disk else 55_000) if number else least
            output = (disk if has_disk else folder) / f"full{number}"
            report = full_disk(folder, output, step, leave, disk if has_disk else None, log)
            reports.append({**report, "same": outcome(output) == calm})
        found.write_text(json.dumps(reports))
        return 0

    code = wait(in_child(log, many))
    if code == 77:
        return None
    assert code == 0, log.read_text()[-3000:]
    return json.loads(found.read_text())


def main(folder: Path, full: int) -> None:
    tiny_model("olmoe", vocab_size=259, max_position_embeddings=128).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    write_sums(folder / "rows.jsonl")
    gc.freeze()
    crew.START = "fork"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    assert wait(in_child(folder / "calm.log", lambda: command(words(folder, folder / "calm")))) == 0
    calm = outcome(folder / "calm")
    report = {
        "sigterm": sigterm(folder, calm),
        "ctrl-c": ctrl_c(folder, calm),
        "ctrl-c-loading": ctrl_c_in(folder, "loading", calm, run, "load_base"),
        "ctrl-c-profiling": ctrl_c_in(folder, "profiling", calm, run, "profile_data"),
        "ctrl-c-twice": ctrl_c_in(folder, "twice", calm, Trainer, "_save_checkpoint", times=2),
        "two": two_at_once(folder, calm),
        "sweep": sigterm_to_a_sweep(folder, calm),
        "full": full_disks(folder, calm, full, has_disk=True),
        "limit": full_disks(folder, calm, full, has_disk=False),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
