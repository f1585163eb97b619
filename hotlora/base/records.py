"""A run's `run.json`: what was asked, on what, with what outcome. One file per training or evaluation run."""

import gc
import importlib.metadata
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from .errors import FileError
from .files import file_in, read_json, read_json_lines, write_json

VERSION = 1
SAME_LOSS = 0.02
"""Share by which a model's loss before training may differ, which tells other weights of the same shape: quantized
experts and another precision move it by less than 1%."""
STATUSES = ("running", "done", "failed")

Kind = type | tuple[type, ...]

# Key -> type, for the record and for those of its sections that are there. Other keys are the run's own.
_REQUIRED: dict[str, Kind] = {
    "version": int,
    "name": str,
    "condition": str,
    "status": str,
    "seed": int,
    "started": str,
    "model": dict,
    "data": dict,
}
_SECTIONS: dict[str, dict[str, Kind]] = {
    "model": {"name": str, "fingerprint": str},
    "data": {"name": str},
    "config": {},
    "profile": {"path": str},
    "plan": {"path": str, "rule": str},
    "parameters": {"trainable": int, "total": int},
    "training": {},
    "evaluation": {},
    "environment": {},
    "sweep": {"name": str, "condition": str},
}
# Those that may be there, or null.
_OPTIONAL: dict[str, dict[str, Kind]] = {
    "config": {
        **dict.fromkeys(("test_hash", "test_data", "scorer_hash", "engine", "harness", "train_on"), str),
        **dict.fromkeys(("tasks", "tasks_hash"), list),
        **dict.fromkeys(("max_new_tokens", "num_fewshot"), int),
        "sampling": dict,
    },
    "sweep": {"model": str},
    "data": {"train": int, "test": int},
    "model": {"test_loss": (int, float), "files": dict},
    "parameters": {"percent": (int, float), "adapter_bytes": int},
    "training": {
        **dict.fromkeys(("tokens_per_second", "loss_first", "loss_last", "seconds", "dense_seconds"), (int, float)),
        **dict.fromkeys(("test_loss", "test_loss_before", "best_eval_loss"), (int, float)),
        **dict.fromkeys(("steps", "tokens", "peak_memory_bytes", "best_step"), int),
        "metrics": str,
    },
}
_TOP: dict[str, Kind] = {"seconds": (int, float), "error": str}
_RESULT: dict[str, Kind] = {
    **dict.fromkeys(("ci_low", "ci_high", "loss", "perplexity", "token_accuracy", "rouge_l"), (int, float)),
    **dict.fromkeys(("loss_ci", "perplexity_ci", "token_accuracy_ci", "rouge_l_ci"), list),
    **dict.fromkeys(("unfinished", "max_new_tokens"), int),
    "results": str,
}
_EVALUATION: dict[str, Kind] = {"metric": str, "accuracy": (int, float), "n": int, "correct": (int, float)}

Record = dict[str, Any]


def new_record(
    *, name: str, condition: str, model: Mapping[str, Any], data: Mapping[str, Any], seed: int = 0,
    device: str = "auto", **sections: Any,
) -> Record:  # fmt: skip
    """A record with status "running", the time in UTC and the environment; `sections` are added as given.

    device: as the command is given it.
    """
    record = {
        "version": VERSION,
        "name": name,
        "condition": condition,
        "status": "running",
        "seed": seed,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": None,
        "model": dict(model),
        "data": dict(data),
        "config": {},
        **sections,
        "environment": environment(device),
    }
    return validate(record, "the new record")


def write_record(folder: str | os.PathLike[str], record: Record) -> Path:
    """Writes `folder`/run.json, whole or not at all, and returns its path."""
    path = file_in(folder, "run.json")
    write_json(path, validate(record, str(path)))
    return path


def read_record(path: str | os.PathLike[str]) -> Record:
    """The record in a run.json, or in the folder that holds one. FileError where it is not a whole record."""
    file = file_in(path, "run.json")
    record = validate(read_json(file), str(file))
    _check_finite(record, str(file))
    record.setdefault("config", {})  # of a sweep's run that died before it had one
    return record


def read_results(path: str | os.PathLike[str], *keys: str) -> list[dict[str, Any]]:
    """An evaluation's results, one dict an example, each with `correct` and `keys`.

    FileError, naming file and line: `correct` is neither true, false nor a share, `index` no number, `id` no text.
    """
    rows = read_json_lines(path, "correct", *keys)
    for number, row in enumerate(rows, start=1):
        share, index, example = row["correct"], row.get("index", 0), row.get("id", "")
        if not (isinstance(share, int | float) and 0 <= share <= 1 and isinstance(index, int)):
            raise FileError(
                f"{path}, line {number}: correct is {share!r} and index {index!r}; correct must be true, false or a "
                "share, and index a number: evaluate again"
            )
        if not isinstance(example, str):
            raise FileError(f"{path}, line {number}: id is {example!r}; it must be text: evaluate again")
    return rows


def find_records(folder: str | os.PathLike[str], skipped: dict[Path, str] | None = None) -> dict[Path, Record]:
    """Every run.json in `folder` and below, by the run's folder, in the order of the paths. A run inside of another
    run's folder is a stage of that (a warm-up, LoRI's dense run), and is left out.

    skipped: gets the folder of each record that is broken or foreign, and what is wrong with it; None: an error.

    FileError: the folder does not exist, or, without `skipped`, a record in it is broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileError(f"{folder} is not a folder: give the folder that holds the runs")
    runs = {file.parent for file in folder.rglob("run.json")}
    whole = [run for run in sorted(runs) if not runs & set(run.parents)]
    found = {}
    for run in whole:
        try:
            found[run] = read_record(run)
        except FileError as error:
            if skipped is None:
                raise
            skipped[run] = str(error)
    return found


def validate(record: Mapping[str, Any], where: str) -> Record:
    """The record, if it has what every reader needs; FileError, naming `where` and the key, if not."""
    version = record.get("version")
    if version != VERSION:
        raise FileError(f"{where} has version {version!r}, and this hotlora reads {VERSION}: run again")
    _check(record, _REQUIRED, where)
    if record["status"] not in STATUSES:
        raise FileError(f"{where}: status is {record['status']!r}; it must be one of {', '.join(STATUSES)}")
    for section, keys in _SECTIONS.items():
        value = record.get(section)
        if value is None:  # base has no plan; a run that failed has no evaluation
            continue
        if not isinstance(value, Mapping):
            raise FileError(f"{where}: {section} is {value!r}; it must be an object")
        _check(value, keys, f"{where}: {section}")
        _check_present(value, _OPTIONAL.get(section, {}), f"{where}: {section}")
    for task, result in (record.get("evaluation") or {}).items():
        if not isinstance(result, Mapping):
            raise FileError(f"{where}: evaluation of {task} is {result!r}; it must be an object")
        _check(result, _EVALUATION, f"{where}: evaluation of {task}")
        _check_present(result, _RESULT, f"{where}: evaluation of {task}")
        if not (0 <= result["accuracy"] <= 1 and 0 <= result["correct"] <= result["n"]):
            told = ", ".join(f"{key} {result[key]}" for key in ("accuracy", "correct", "n"))
            raise FileError(f"{where}: evaluation of {task} has {told}: a share, and so many of n, are needed")
    _check_present(record, _TOP, where)
    return dict(record)


def environment(device: str = "auto") -> dict[str, Any]:
    """Versions of what computes the numbers, and the device: the first GPU's name, or the CPU's; a Mac's GPU, which is
    taken if it is asked for alone, by its name in torch."""
    versions: dict[str, str | None] = {}
    for package in ("hotlora", "torch", "transformers", "peft", "trl"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # hotlora, run from a checkout that is not installed
            versions[package] = None
    if device.startswith("mps"):
        name = f"{_cpu_name()}, mps"
    elif torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        threads = torch.get_num_threads()
        name = f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"
    return versions | {"python": platform.python_version(), "device": name, "git": _commit()}


def reset_peak_memory() -> None:
    """Starts `peak_memory_bytes` anew from what is held now; where the system cannot, the peak stays the process's."""
    if torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)
        return
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak becomes the present resident size
    except OSError:
        pass


def peak_memory_bytes() -> int | None:
    """Most memory held since `reset_peak_memory`: on the GPUs where there are any, else by this process.

    None where it is unknown.
    """
    if torch.cuda.is_available():
        return sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def _check(record: Mapping[str, Any], keys: Mapping[str, Kind], where: str) -> None:
    for key, kind in keys.items():
        if key not in record:
            raise FileError(f"{where} lacks {key!r}: it is not a whole run record; run again")
        if not isinstance(record[key], kind) or isinstance(record[key], bool):
            names = "number" if isinstance(kind, tuple) else kind.__name__
            raise FileError(f"{where}: {key} is {record[key]!r}; it must be of type {names}")
        if isinstance(record[key], int) and abs(record[key]) > sys.float_info.max:
            digits = len(str(record[key]))
            raise FileError(f"{where}: {key} has {digits} digits; it must be a number that a float holds")


def _check_finite(value: Any, where: str) -> None:
    """JSON has no NaN or infinity, and hotlora writes none; another program may, or a number of too many digits."""
    if isinstance(value, float) and not math.isfinite(value):
        raise FileError(f"{where} is {value}; it must be a finite number or null")
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        _check_finite(item, f"{where}: {key}")


def _check_present(record: Mapping[str, Any], keys: Mapping[str, Kind], where: str) -> None:
    _check(record, {key: kind for key, kind in keys.items() if record.get(key) is not None}, where)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of hotlora's own checkout; None for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
