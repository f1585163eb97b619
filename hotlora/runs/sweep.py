"""Conditions x seeds -> one run record each: a study in one Python file, its runs one after another or side by side.

Started again, it goes on: what is done is left alone, what was stopped continues from its last checkpoint.
"""

import dataclasses
import hashlib
import inspect
import json
import os
import re
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from ..base.errors import DataError, FileError, HotLoraError
from ..base.escape import lines
from ..base.files import FOLDER_NAME
from ..base.lock import locked
from ..base.options import ALIASES, by_own_names, suggest
from ..evaluation.generate import Sampling
from ..tasks import task_of
from ..tasks.data import test_source
from ..training.config import TrainConfig
from .checks import check_values
from .methods import resolve
from .options import DataOptions, EvalOptions, RunOptions
from .profiling import Watching
from .sweep_runs import SAMPLING, keep_failure, make_profile, score_adapter, score_base, train_run
from .sweep_table import progress_table, state, title
from .worker_pool import Job, check_is_no_worker, default_processes, run_jobs

PROFILES = "profiles"

_DEFAULT = TrainConfig()
_FIELDS = dataclasses.asdict(_DEFAULT)
_OPTIONS = {
    *inspect.signature(resolve).parameters, *(field.name for field in dataclasses.fields(RunOptions)), *SAMPLING
} - {"given", "seed", "fit", "push_to_hub", "hub_private_repo"}  # fmt: skip
# What a profile depends on, besides the training examples.
_PROFILE = ("model", "data", "limit", "profile_fraction", "dtype", "device", "quantize", "max_length")


@dataclass(frozen=True)
class Condition:
    """One way to train, run once for each seed.

    options: what sets it apart, in the words of `hotlora train`: fields of `RunOptions`, and `methods.resolve`'s names.
    train: False scores the model as it is, once.
    scores: the name of a condition before this one, whose adapters are scored on this one's data, seed by seed, in
        place of a training. The base is quantized as it was in training, unless `options` here say otherwise.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    train: bool = True
    scores: str | None = None


@dataclass(frozen=True)
class Sweep:
    """Conditions times seeds on one model and data set; a condition's options may name others.

    config, options: for all conditions, as if given in each; a condition's own come first. Of `config` what differs
        from TrainConfig's defaults is meant.

    HotLoraError: a name that is no folder's, or is given twice; no condition, no seed; an option that does not exist
        or is out of range.
    """

    name: str
    model: str
    data: str
    conditions: Sequence[Condition]
    seeds: Sequence[int] = (0,)
    config: TrainConfig = _DEFAULT
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [condition.name for condition in self.conditions]
        for name in (self.name, *names):
            if not FOLDER_NAME.fullmatch(name) or name.split("/")[0] == PROFILES:
                raise HotLoraError(
                    f"{name!r} cannot name a sweep or condition: use letters, digits and _ . + -, with / for a folder "
                    f"inside another, and not {PROFILES!r}."
                )
        for what, values in (("condition", names), ("seed", [str(seed) for seed in self.seeds])):
            if not values:
                raise HotLoraError(f"the sweep {self.name} has no {what}: give at least one.")
            if twice := {value for value in values if values.count(value) > 1}:
                raise HotLoraError(f"the sweep {self.name} has the {what} {min(twice)} twice.")
        if wrong := [seed for seed in self.seeds if not isinstance(seed, int) or seed < 0]:
            raise HotLoraError(f"the sweep {self.name} has the seed {wrong[0]!r}: seeds are integers from 0.")
        trained: set[str] = set()
        for condition in self.conditions:
            options = self.options_of(condition)
            written = {ALIASES[name]: name for name in (*self.options, *condition.options) if name in ALIASES}
            _check_options({written.get(n, n): value for n, value in options.items()}, f"{self.name}: {condition.name}")
            if condition.scores is not None and condition.scores not in trained:
                raise HotLoraError(
                    f"{self.name}: {condition.name} scores the adapters of {condition.scores!r}, which is no condition "
                    f"that trains before it ({', '.join(sorted(trained)) or 'none does'})."
                )
            try:
                resolved = self.resolved(condition)
                if condition.train and condition.scores is None:
                    trained.add(condition.name)
                    _check_greedy(condition.name, options)
                    check_values(resolved)
            except HotLoraError as error:
                raise HotLoraError(f"{self.name}: {condition.name}: {error}") from error

    def options_of(self, condition: Condition) -> dict[str, Any]:
        """All that is given for a condition, the model and the data among it."""
        changed = {name: value for name, value in dataclasses.asdict(self.config).items() if value != _FIELDS[name]}
        changed.pop("seed", None)
        shared, own = (by_own_names(given, ALIASES) for given in (self.options, condition.options))
        return {"model": self.model, "data": self.data, **changed, **shared, **own}

    def resolved(self, condition: Condition, **more: Any) -> RunOptions:
        """A condition's options as a run takes them; those of how answers are drawn are `run_evaluation`'s."""
        options = {**self.options_of(condition), **more}
        return resolve(**{name: value for name, value in options.items() if name not in SAMPLING})


def load_sweep(file: str | os.PathLike[str]) -> Sweep:
    """The `SWEEP` that a Python file defines.

    FileError: there is no such file. HotLoraError: the file fails, or defines no SWEEP.
    """
    path = Path(file)
    if not path.is_file():
        raise FileError(f"{path} does not exist: give a Python file that defines SWEEP.")
    try:
        found = runpy.run_path(str(path)).get("SWEEP")
    except HotLoraError as error:
        raise HotLoraError(f"{path}: {error}") from error
    except Exception as error:
        raise HotLoraError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    if not isinstance(found, Sweep):
        raise HotLoraError(f"{path} defines no SWEEP: end it with SWEEP = Sweep(name, model, data, conditions).")
    return found


def run_sweep(
    sweep: Sweep,
    output: str | os.PathLike[str],
    *,
    processes: int | None = None,
    console: Console | None = None,
) -> list[Job]:
    """Makes every run, in OUTPUT/CONDITION/seedK, and gives back what became of each; failures do not stop it.

    Runs with the same model, data and profile settings share one profile, in OUTPUT/profiles.

    A script calls it under `if __name__ == "__main__":`, since each process imports the script again.

    processes: runs at a time, each in a process of its own; None: one for each GPU, on the CPU one.
    console: shows a live table; where it is no terminal, a line for each run that ends.
    """
    check_is_no_worker()
    if processes is not None and processes < 1:
        raise HotLoraError(f"processes is {processes}: it must be 1 or more.")
    jobs = sweep_jobs(sweep, output)
    console = console or Console(quiet=True)

    def ended(job: Job) -> None:
        if job.status == "failed" and job.function is not make_profile:
            keep_failure(job)
        if not console.is_terminal:
            told = lines(f"{title(job)}: {job.error or state(job)}")
            console.print(told, highlight=False, markup=False, soft_wrap=True)

    table = Live(console=console, get_renderable=lambda: progress_table(sweep.name, jobs), refresh_per_second=2)
    with locked(output), table:
        run_jobs(jobs, processes or default_processes(), ended)
    if not console.is_terminal:
        console.print()  # Live ends its line in a terminal alone
    return jobs


def sweep_jobs(sweep: Sweep, output: str | os.PathLike[str]) -> list[Job]:
    """A sweep's profiles and runs, in their order. Nothing is run."""
    output = Path(output)
    if (output / "run.json").is_file():
        raise HotLoraError(
            f"{output} is a run's own folder (run.json), where a sweep's runs would not be found again: give --output, "
            "or the sweep another name."
        )
    profiles: dict[Path, Job] = {}
    jobs: list[Job] = []
    for condition in sweep.conditions:
        own, given = condition.options, sweep.options_of(condition)
        options = sweep.resolved(condition)
        folder = output / condition.name
        kept = {"sweep": {"name": sweep.name, "condition": condition.name}}
        if not condition.train:
            arguments = _scoring(
                options, given, folder, kept, {"quantize": options.quantize, "quantize_linear": options.quantize_linear}
            )
            jobs.append(Job(condition.name, folder, score_base, arguments))
            continue
        if condition.scores is not None:
            for seed in sweep.seeds:
                at = folder / f"seed{seed}"
                trained = next(job for job in jobs if (job.name, job.seed) == (condition.scores, seed))
                mark = {"sweep": {**kept["sweep"], "scores": condition.scores}}
                if trained.arguments["options"].full:  # the record's own model is what that run left, one a seed
                    mark["sweep"]["model"] = options.model
                stored = {name: own[name] for name in ("quantize", "quantize_linear", "keep_hot") if name in own}
                arguments = _scoring(options, given, at, mark, stored) | {"trained": trained.folder, "seed": seed}
                jobs.append(Job(condition.name, at, score_adapter, arguments, trained, seed))
            continue
        needs = _profile_job(options, output)
        if needs is not None:
            needs = profiles.setdefault(needs.folder, needs)
            options = replace(options, profile=needs.folder / "profile.safetensors")
        for seed in sweep.seeds:
            at = folder / f"seed{seed}"
            arguments = {"options": replace(options, seed=seed), "output": at, "kept": kept}
            jobs.append(Job(condition.name, at, train_run, arguments, needs, seed))
    return [*profiles.values(), *jobs]


def _check_options(options: Mapping[str, Any], where: str) -> None:
    if unknown := sorted(name for name in options if ALIASES.get(name, name) not in _OPTIONS):
        raise HotLoraError(f"{where} has the options {suggest(unknown, _OPTIONS)}, which a sweep's runs do not take.")
    try:
        json.dumps(options, default=os.fspath)
    except (TypeError, ValueError) as error:
        raise HotLoraError(f"{where}: options must be plain values, such as JSON holds ({error}).") from error


def _check_greedy(name: str, options: Mapping[str, Any]) -> None:
    """HotLoraError: a training is to draw answers, and its own score is greedy."""
    drawn = {option: options[option] for option in SAMPLING if option in options}
    if drawn:
        told = ", ".join(f"{option} = {value!r}" for option, value in drawn.items())
        raise HotLoraError(
            f"{told} would change nothing: a training scores greedy answers. Leave it out here, and of the whole "
            f"sweep's options; score the adapters by a condition of its own, Condition('{name}-sampled', {drawn!r}, "
            f"scores={name!r})."
        )


def _scoring(
    options: RunOptions, given: Mapping[str, Any], folder: Path, kept: Mapping[str, Any], stored: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of `score_base` or `score_adapter`, such that it scores what `run_training` would."""
    data, split = test_source(options.data, options.test_data), {}
    if data is None and options.test_split is not None:
        data, split = options.data, {"split": options.test_split, "limit": options.limit}
    if data is None:
        raise DataError(f"{options.data} has no test examples of its own to score: give test_data.")
    task = task_of(data)
    is_loss = bool(split) or task is None or task.kind == "text"
    sampling = {name: given[name] for name in SAMPLING if name in given}
    if sampling and (is_loss or (task is not None and task.kind == "choice")):
        raise HotLoraError(f"on {data} no answer is drawn: leave {', '.join(sampling)} out.")
    Sampling(**sampling)  # an error here, and not when trainings have run
    # What is merged first needs the experts on the device.
    offload, there = ("none", None) if options.on_top_of else (options.offload, options.offload_folder)
    scored = EvalOptions(
        model=options.model, on_top_of=options.on_top_of, limit=options.test_limit, batch_size=options.eval_batch_size,
        dtype=options.dtype, device=options.device, attn_implementation=options.attn_implementation,
        offload=offload, offload_folder=there,
        **(options.reading() if task is None else {"train_on": options.train_on} if is_loss else {}), **stored,
    )  # fmt: skip
    return {
        "options": scored, "data": data, "output": folder, "kept": kept, "max_length": options.max_length,
        "sampling": sampling, "held_out_of": split,
    }  # fmt: skip


def _profile_job(options: RunOptions, output: Path) -> Job | None:
    """What makes the profile that runs share; None where a run profiles another model than the base, or none."""
    own = options.plan or options.profile or options.on_top_of or options.full or options.warmup != "none"
    if own or options.test_split is not None:  # the rows that are held out are not profiled
        return None
    settings = {name: getattr(options, name) for name in _PROFILE} | {"profile_fraction": options.share_profiled}
    also = {name: getattr(options, name) for name in ("attn_implementation", "quantize_linear")} | options.reading()
    settings |= {name: value for name, value in also.items() if value not in (None, DataOptions.train_on)}
    watching = Watching.of(options)  # where it is as before there was a choice, so is the folder's name
    settings |= {"profile_until": watching.until} if watching.until < 1 else {}
    settings |= {"saliency": True} if watching.saliency else {}
    digest = hashlib.sha256(json.dumps(settings, default=os.fspath).encode()).hexdigest()[:8]
    name = re.sub(r"[^A-Za-z0-9]+", "-", Path(str(settings["data"])).stem).strip("-")
    folder = output / PROFILES / f"{name}-{digest}"
    settings |= {"path": folder / "profile.safetensors", "batch_size": options.batch_size}
    settings |= {"offload": options.offload, "offload_folder": options.offload_folder}
    return Job(f"profile of {settings['data']}", folder, make_profile, settings)
