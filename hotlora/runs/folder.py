"""What every kind of run shares: the base model it starts from, its folder, its record."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from ..adapter.config import HEADS
from ..adapter.load import (
    WEIGHTS_FILE,
    load_adapter,
    needs_dense_experts,
    planned_experts,
    saved_config,
    saved_options_hash,
)
from ..adapter.offload import keep_on_device
from ..adapter.on_top_of import Entry, described, missing, noted
from ..adapter.parallel import UNMERGED
from ..adapter.quantize import experts_in
from ..base.errors import FileError, HotLoraError
from ..base.files import sha256_file
from ..base.lock import locked
from ..base.processes import all_objects, first_failure, is_main, sharding, wait_for_all
from ..base.processes import described as described_error
from ..base.quiet import quiet
from ..base.records import Record, read_record, write_record
from ..evaluation.score import Evaluation
from ..hf.models import checked_device, load_config, load_model
from ..training import checkpoints
from ..training.config import TrainConfig
from ..training.extend import check_extension, ends_elsewhere
from ..training.identity import FREE_OPTIONS, check_same, same_run
from .options import check_offload

_log = logging.getLogger(__name__)


def load_base(
    model: str,
    on_top_of: Sequence[str | Path] = (),
    *,
    quantize: int | None = None,
    quantize_linear: int | None = None,
    keep: Mapping[int, Sequence[int]] | None = None,
    offload: str = "none",
    offload_folder: str | Path | None = None,
    adapter: str | Path | None = None,
    expert_parallel: int = 1,
    **options: Any,
) -> Any:
    """The base model as `models.load_model` takes `options`, with the adapters of earlier tasks merged into it.

    on_top_of, adapter: as `underneath` takes them. keep: as `quantize.quantize_experts` takes it.
    quantize, quantize_linear: as `quantize.experts_in` takes them; 0, adapters that are merged in, and DoRA and full
    experts make packed experts of a checkpoint dense.
    offload: all, none, or cold: the adapter's experts are on the device then.
    offload_folder: as `ExpertsQuantization` takes it; None: on a CPU the working folder.
    expert_parallel: as `distributed.sharding` takes it.
    """
    if adapter is not None:
        _check_head(adapter)
    on_top_of = underneath(model, on_top_of, adapter)
    spread = sharding(expert_parallel)
    if spread and (quantize or quantize_linear or on_top_of or offload != "none"):
        raise HotLoraError(
            "weights that are spread over processes cannot be quantized, offloaded or merged into: leave out "
            "--quantize, --quantize-linear, --offload and --on-top-of, or launch without FSDP and expert parallelism."
        )
    check_offload(offload, offload_folder)
    if offload != "none" and checked_device(options.get("device", "auto")).type == "cpu":
        offload_folder = offload_folder or Path.cwd()
    if spread:
        options["distributed_config"] = spread
    stored = experts_in(quantize, keep, quantize_linear, offload=offload != "none", offload_folder=offload_folder)
    is_dense = bool(on_top_of) or (adapter is not None and needs_dense_experts(adapter))
    base: Any = load_model(model, quantization_config=stored, dequantize=quantize == 0 or is_dense, **options)
    for folder in on_top_of:
        with quiet():
            base = cast(Any, load_adapter(base, folder)).merge_and_unload()
    if offload == "cold" and adapter is not None:
        keep_on_device(base, planned_experts(adapter))
    return base


def _check_head(adapter: str | Path) -> None:
    """HotLoraError: the adapter is for a classifier, and a language model would be loaded for it."""
    task = saved_config(adapter).task_type
    if head := next((head for head, own in HEADS.items() if own == task), None):
        raise HotLoraError(
            f"{adapter} is for a model with another head than a language model's (task_type {task}): load its base "
            f"with transformers.AutoModel{head}, and then hotlora.load_adapter(base, folder)."
        )


def data_time(output: Path) -> datetime:
    """When the run in `output` first read its data, or the present, for all processes: a chat template may write the
    date, and a run that goes on the next day must not train on other tokens."""
    told = read_record(output)["data"].get("read_at") if (output / "run.json").is_file() else None
    try:
        now = datetime.fromisoformat(told) if told is not None else datetime.now().replace(microsecond=0)
    except (TypeError, ValueError) as error:
        raise FileError(f"{output / 'run.json'}: read_at is {told!r}; it must be a time in ISO 8601") from error
    return all_objects(now)[0]


def underneath(model: str, on_top_of: Sequence[str | Path] = (), adapter: str | Path | None = None) -> list[str | Path]:
    """The adapters to merge into `model` before `adapter`, or anything new, goes onto it: `on_top_of`, and before each
    of them, and before `adapter`, those that it was trained on top of and that are not there yet.

    on_top_of: adapters' folders, or runs'.

    FileError: one of these is not where it was, or is not what it was.
    """
    there = noted(load_config(model))
    found: list[str | Path] = []

    def add_needed(folder: str | Path) -> None:
        for entry in missing(saved_config(folder).on_top_of or [], there):
            found.append(_located(entry, folder))
            there.append(entry)

    for folder in map(adapter_in, on_top_of):
        add_needed(folder)
        found.append(folder)
        digest = sha256_file(Path(folder) / WEIGHTS_FILE)
        there.append({"path": str(folder), "weights_sha256": digest, "options_sha256": saved_options_hash(folder)})
    if adapter is not None:
        add_needed(adapter)
    check_has_no_perft(found)
    return found


def hashes_underneath(on_top_of: Sequence[str | Path]) -> dict[str, list[str]]:
    """What a run's identity holds of the adapters that `underneath` found."""
    if not on_top_of:
        return {"on_top_of": []}
    return {
        "on_top_of": [sha256_file(Path(folder) / WEIGHTS_FILE) for folder in on_top_of],
        "on_top_of_options_hash": [saved_options_hash(folder) for folder in on_top_of],
    }


def check_has_no_perft(adapters: Sequence[str | Path]) -> None:
    """HotLoraError: one of these stands beside the experts, and no weight of the base can hold it."""
    if any(saved_config(folder).perft for folder in adapters):
        raise HotLoraError(UNMERGED)


def adapter_in(path: str | Path) -> str | Path:
    """The adapter's folder of a run's; what is no run's as it is. FileError: the run has none."""
    folder = Path(path).expanduser()
    if not (folder / "run.json").is_file():
        return path
    if not (folder / "adapter").is_dir():
        has = "a whole model, of full fine-tuning" if (folder / "model").is_dir() else "no adapter yet"
        raise FileError(f"{folder} is a run with {has}: give one that ended with an adapter.")
    return folder / "adapter"


def _located(entry: Entry, needed_by: str | Path) -> Path:
    """Where an adapter lies that another was trained on top of."""
    what = f"{needed_by} was trained on top of {described([entry])}"
    advice = "give its folder (--on-top-of, where a command has it), or as the base a model with it merged in (--model)"
    # Older adapters note a path from where they were trained, which is mostly a folder above them.
    above = Path(needed_by).expanduser().absolute().parents
    places = [folder / entry["path"] for folder in (Path(), *above)] if entry["path"] is not None else []
    there = [place for place in dict.fromkeys(places) if (place / WEIGHTS_FILE).is_file()]
    if not there:
        raise FileError(f"{what}, and that is not there: {advice}.")
    path = next((place for place in there if sha256_file(place / WEIGHTS_FILE) == entry["weights_sha256"]), None)
    if path is None:
        raise FileError(f"{what}, and that has other weights now (another SHA-256): {advice}.")
    if entry.get("options_sha256") not in (None, saved_options_hash(path)):
        raise FileError(f"{what}, and that has another lora_alpha, scaling or plan now: put it back, or {advice}.")
    return path


def finished(
    output: Path, options: dict[str, Any], results: Path | None = None, *, longer: TrainConfig | None = None
) -> Record | None:
    """The record in `output` if it is done with the same options; an error if other work would be lost.

    Args:
        results: a file of results that this work goes on from; without a record, nothing says what they are of.
        longer: the options of a training that is to go on past the end that the one in `output` has (`--extend`).
    """
    if output.exists() and not output.is_dir():
        raise FileError(f"{output} is a file: give another folder (--output).")
    if longer is not None and not (output / "run.json").is_file():
        raise HotLoraError(f"{output} holds no run to extend: leave --extend out, or give the run's folder (--output).")
    if not (output / "run.json").is_file():
        if results is not None:
            results.unlink(missing_ok=True)
        return None
    record = read_record(output)
    done = record["status"] == "done"
    begun = results is not None and results.is_file()
    if done or begun or checkpoints.last_complete(output / "checkpoints"):
        # The size of a batch can change the last bits, so the rest of an evaluation is made in the same batches.
        free = (*FREE_OPTIONS, "eval_batch_size") if done else FREE_OPTIONS
        old, new = same_run(record["config"], free), same_run(options, free)
        check_same(old, new, output, extend=longer is not None)
        if longer is not None and ends_elsewhere(old, new):
            check_extension(output, longer)
            return None
    elif longer is not None:
        check_extension(output, longer)
    if done:
        if is_main():
            _log.warning("%s is done already: nothing of it is run again", output)
    return record if done else None


def is_begun(output: Path) -> bool:
    """Whether `output` holds work that other rows would be lost to: a record, of the run or of one of its stages, but
    of one that failed before anything was kept."""

    def keeps(folder: Path) -> bool:
        kept = checkpoints.last_complete(folder / "checkpoints") or any(folder.glob("results-*.jsonl"))
        return bool(kept) or read_record(folder)["status"] != "failed"

    return any(keeps(file.parent) for file in (*output.glob("run.json"), *output.glob("*/run.json")))


@contextmanager
def recorded(record: Record, output: Path | None) -> Iterator[None]:
    """Writes the record when the run starts, and when it ends, well or not. Meanwhile no other run may be there.

    Of several processes the first writes; each leaves when all are done.
    """
    started = time.perf_counter()

    def write() -> None:
        if output is not None and is_main():
            write_record(output, record)

    with locked(output) if output is not None else nullcontext():
        write()
        try:
            yield
        except BaseException as error:
            record |= {"status": "failed", "error": first_failure(described_error(error))[0]}
            record["seconds"] = round(time.perf_counter() - started, 3)
            with suppress(FileError):  # on a full disk: what came first is told
                write()
            raise
        record |= {"status": "done", "seconds": round(time.perf_counter() - started, 3)}
        write()
        wait_for_all()


def save_evaluation(evaluation: Evaluation, output: Path | None) -> dict[str, Any]:
    summary = evaluation.summary()
    if output is not None:
        summary["results"] = f"results-{evaluation.task}.jsonl"
        if is_main():
            evaluation.write_results(output / summary["results"])
    return {evaluation.task: summary}
