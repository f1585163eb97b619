"""How far a sweep is, as tables for the terminal."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from rich.markup import escape
from rich.table import Column, Table

from ..base.records import Record, read_record
from ..training.checkpoints import last_complete, step_of
from .sweep_runs import make_profile, train_run
from .worker_pool import Job

_COLUMNS = 6
"""Seeds that have a column each; a line of 80 characters holds no more."""


def progress_table(name: str, jobs: Sequence[Job]) -> Table:
    """Conditions by seeds, each with its score, its step, or why it has none. A profile has a row until it is made.

    Of many seeds how many are done, and their mean score.
    """
    runs = [job for job in jobs if job.function is not make_profile]
    num_done, num_failed = (sum(job.status == status for job in runs) for status in ("done", "failed"))
    told = f"{name}: {num_done} of {len(runs)} runs done" + (f", {num_failed} failed" if num_failed else "")
    table = Table(title=told, title_style="red" if num_failed else "bold", min_width=len(told) + 2)
    table.add_column("condition", overflow="fold")
    seeds: list[int | None] = list(dict.fromkeys(job.seed for job in runs if job.seed is not None)) or [None]
    rows: dict[str, dict[int | None, Job]] = {}
    for job in jobs:
        if job.function is not make_profile or job.status != "done":
            rows.setdefault(job.name, {})[job.seed] = job
    if len(seeds) > _COLUMNS:
        for name in ("done", "mean"):
            table.add_column(name, justify="right")
        table.add_column("now")
        for condition, cells in rows.items():
            table.add_row(escape(condition), *_over_seeds(list(cells.values())))
        return table
    for seed in seeds:
        table.add_column("" if seed is None else f"seed {seed}", justify="right")
    for condition, cells in rows.items():
        row = [cells.get(seed) or cells.get(None) for seed in seeds]
        table.add_row(escape(condition), *(_cell(job) if job else "" for job in (row[:1] if None in cells else row)))
    return table


def runs_table(jobs: Sequence[Job]) -> Table:
    """Every run, where it lies, and how far it is on disk."""
    table = Table("run", Column("folder", overflow="fold"), "state")  # a path that is cut short helps nobody
    for job in jobs:
        if job.function is not make_profile:
            table.add_row(*map(escape, (title(job), str(job.folder), _on_disk(job.folder))))
    return table


def title(job: Job) -> str:
    return job.name if job.seed is None else f"{job.name}, seed {job.seed}"


def state(job: Job) -> str:
    """A job in a few words."""
    if job.status == "done" and job.result is not None:
        return _score(job.result)
    if job.status == "running" and job.function is train_run:
        for stage in ("", "dense", "warmup"):  # what comes last is looked for first
            if (job.folder / stage / "metrics.jsonl").is_file():
                steps = job.arguments["options"].max_steps if stage != "warmup" else None
                return f"{stage} step {_step(job.folder / stage)}".strip() + (f"/{steps}" if steps else "")
    return job.status


def _cell(job: Job) -> str:
    return f"[red]{job.status}[/]" if job.status == "failed" else state(job)


def _over_seeds(jobs: Sequence[Job]) -> tuple[str, str, str]:
    """How many of a condition's runs are done, their mean score, and what the others do."""
    done = [job for job in jobs if job.status == "done"]
    scored = [found for job in done if job.result is not None and (found := _number(job.result)) is not None]
    values = [value for value, _ in scored]
    mean = scored[0][1].format(fmean(values)) if scored else ""
    now = [job for job in jobs if job.status in ("running", "failed")]
    told = [f"{'' if job.seed is None else f'seed {job.seed} '}{_cell(job)}" for job in now]
    return f"{len(done)} of {len(jobs)}", mean, ", ".join(told)


def _score(record: Record) -> str:
    found = _number(record)
    return "done" if found is None else found[1].format(found[0])


def _number(record: Record) -> tuple[float, str] | None:
    """The task's score, without a task the held-out loss or that of the last step; and how it is shown."""
    for result in (record.get("evaluation") or {}).values():
        return result["accuracy"], "{:.1%}"
    training = record.get("training") or {}
    loss = training.get("test_loss", training.get("loss_last"))
    return None if loss is None else (loss, "loss {:.4f}")


def _step(folder: Path) -> int:
    """The last step that a run has logged; 0 before the first."""
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            rows = file.read().split(b"\n")
        return int(json.loads(rows[-2])["step"])  # the last line may still be being written
    except (OSError, ValueError, KeyError, IndexError):
        return 0


def _on_disk(folder: Path) -> str:
    if not (folder / "run.json").is_file():
        return "new"
    record = read_record(folder)
    if record["status"] == "done":
        return f"done, {_score(record)}"
    step = step_of(last_complete(folder / "checkpoints"))
    return f"{record['status']}, resumes from step {step}" if step else record["status"]
