"""A training's steps as they come: in the metrics file, and in the terminal."""

import json
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from ..base.files import append_to, finite
from ..base.processes import wait_for_all
from . import checkpoints

_QUIET = 60.0  # seconds without a line


class Recorder(TrainerCallback):
    """Appends each step to the metrics file, and marks a checkpoint once it is whole."""

    def __init__(self, path: Path, seconds_before: float) -> None:
        self.path, self.seconds_before, self.started = path, seconds_before, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs or not state.is_world_process_zero:
            return
        row = {
            "step": state.global_step,
            **{name: logs.get(name) for name in ("loss", "learning_rate", "grad_norm")},
        }
        row |= {"tokens": int(state.num_input_tokens_seen), "epoch": state.epoch}
        row |= {name: value for name, value in logs.items() if name.startswith("eval_")}
        row["seconds"] = round(self.seconds_before + time.perf_counter() - self.started, 3)
        with append_to(self.path) as file:
            file.write(json.dumps(finite(row), allow_nan=False) + "\n")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wait_for_all()  # each writes the state of its random numbers
        if state.is_world_process_zero:
            checkpoints.mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def shown() -> TrainerCallback:
    """A bar in a terminal, lines elsewhere."""
    return ProgressBar() if Console(stderr=True).is_terminal else ProgressLines()


def _held_out(logs: Mapping[str, Any]) -> str:
    """`held-out 0.1234, exact match 45.0%`"""
    scores = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
    told = [f"held-out {scores.pop('loss'):.4f}"]
    return ", ".join([*told, *(f"{metric.replace('_', ' ')} {score:.1%}" for metric, score in scores.items())])


class ProgressLines(TrainerCallback):
    """Steps, losses and time left as a line, at every tenth of the way, and after a minute without one."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first, self.started = state.global_step, time.perf_counter()
        self.told_step, self.told_at, self.held_out = state.global_step, self.started, ""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            self.held_out = f", {_held_out(logs)} after step {state.global_step}"
        step, total, now = state.global_step, state.max_steps, time.perf_counter()
        if step * 10 // total == self.told_step * 10 // total and now - self.told_at < _QUIET:
            return
        self.told_step, self.told_at = step, now
        seconds = (now - self.started) / (step - self.first) * (total - step)
        left = f", {timedelta(seconds=round(seconds))} left" if step < total else ""
        print(f"step {step}/{total}, loss {logs['loss']:.4f}{self.held_out}{left}", file=sys.stderr, flush=True)


class ProgressBar(TrainerCallback):
    """Steps, loss and time left, in the terminal."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[held_out]}"),
            TimeRemainingColumn(), console=Console(stderr=True), transient=True,
            disable=not state.is_world_process_zero,
        )  # fmt: skip
        self.task = self.bar.add_task(
            "training", total=state.max_steps, completed=state.global_step, loss="-", held_out=""
        )
        self.bar.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.bar.update(self.task, completed=state.global_step, loss=f"{logs['loss']:.4f}")
            if "eval_loss" in logs:
                self.bar.update(self.task, held_out=_held_out(logs))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.stop()
