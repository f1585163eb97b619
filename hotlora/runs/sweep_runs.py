"""What a sweep's processes do: profiles, trainings, and the scores of the model as it is."""

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..base.errors import FileError
from ..base.records import Record, new_record, read_record, write_record
from ..evaluation.generate import Sampling
from ..hf.models import load_tokenizer, vocab_size
from ..routing.profile import RoutingProfile
from ..tasks import task_of
from ..tasks.chat import template_source
from ..tasks.data import data_hash, load_examples
from ..tasks.tokens import tokenize
from .evaluation import run_evaluation, run_held_out
from .folder import load_base
from .options import EvalOptions, RunOptions
from .profiling import Watching, profile_data, profile_sample
from .stages import run_method
from .worker_pool import Job

SAMPLING = tuple(field.name for field in dataclasses.fields(Sampling) if field.name != "seed")


def train_run(kept: Mapping[str, Any], options: RunOptions, output: Path) -> Record:
    """`run_method`, and `kept` beside it in the record."""
    return _mark(run_method(options, output), output, kept)


def score_base(kept: Mapping[str, Any], options: EvalOptions, output: Path, **arguments: Any) -> Record:
    """The score of a model as it is, and `kept` beside it in the record."""
    return _mark(_scored(options, output, **arguments), output, kept)


def score_adapter(
    kept: Mapping[str, Any], options: EvalOptions, output: Path, trained: Path, seed: int, **arguments: Any
) -> Record:
    """The adapter, or the model, that the run in `trained` left, on other data."""
    marks = {**kept, "seed": seed}
    if (trained / "model").is_dir():
        options = replace(options, model=str(trained / "model"), on_top_of=())  # they are in it
        marks |= {name: read_record(trained)[name] for name in ("name", "condition")}  # it is no base
    else:
        options = replace(options, adapter=trained / "adapter")
    return _mark(_scored(options, output, **arguments), output, marks)


def _scored(
    options: EvalOptions, output: Path, *, data: str, max_length: int, sampling: Mapping[str, Any],
    held_out_of: Mapping[str, Any] = MappingProxyType({}),
) -> Record:  # fmt: skip
    """Of the task; where the data names none, or one without a scorer, or rows of the training's are held out, the
    held-out loss, as of a training."""
    task = task_of(data)
    if held_out_of or task is None or task.kind == "text":
        return run_held_out(options, data, output, max_length=max_length, **held_out_of)
    return run_evaluation(options, data, output, sampling=Sampling(**sampling))[0]


def make_profile(
    path: Path,
    model: str,
    data: str,
    limit: int | None,
    profile_fraction: float,
    dtype: str,
    device: str,
    quantize: int | None,
    max_length: int,
    batch_size: int,
    quantize_linear: int | None = None,
    attn_implementation: str | None = None,
    profile_until: float = 1.0,
    saliency: bool = False,
    offload: str = "none",
    offload_folder: str | Path | None = None,
    **reading: Any,
) -> None:
    """Writes the routing profile that `run_training` would make of these options, unless it is there.

    profile_until: until when the hot 25% are settled, whatever the rules of the runs that share the profile.
    """
    watching = Watching(profile_until, saliency=saliency)
    tokenizer = load_tokenizer(model)
    examples = profile_sample(
        load_examples(data, "train", limit=limit, tokenizer=tokenizer, tell_unread=False, **reading), profile_fraction
    )
    wanted = {"data_hash": data_hash(examples), **template_source(tokenizer, examples)}
    try:
        found = RoutingProfile.load(path)
        if watching.is_held_by(found) and all(found.source.get(name) == value for name, value in wanted.items()):
            return
    except FileError:
        pass  # none yet
    dataset = tokenize(examples, tokenizer, max_length, vocab_size=vocab_size(model))
    base = load_base(
        model, dtype=dtype, device=device, quantize=quantize, quantize_linear=quantize_linear, offload=offload,
        offload_folder=offload_folder, attn_implementation=attn_implementation,
    )  # fmt: skip
    profile_data(
        base,
        tokenizer,
        examples,
        data,
        model,
        batch_size=batch_size,
        max_length=max_length,
        dataset=dataset,
        watching=watching,
    ).save(path)


def keep_failure(job: Job) -> None:
    """Says in the run's record that it failed, where the run could not say so itself."""
    arguments = job.arguments
    try:
        record = read_record(job.folder)
    except FileError:
        options = arguments["options"]
        data, condition = arguments.get("data"), "base"
        if isinstance(options, RunOptions):
            data, condition = options.data, options.condition or options.rule
        record = new_record(
            name=job.name, condition=condition, seed=job.seed or 0,
            device=options.device, model={"name": options.model, "fingerprint": ""}, data={"name": data},
        )  # fmt: skip
    if record["status"] != "done":  # a run with other options, which is left as it is
        write_record(job.folder, {**record, **arguments["kept"], "status": "failed", "error": job.error})


def _mark(record: Record, output: Path, kept: Mapping[str, Any]) -> Record:
    if {**record, **kept} != record:
        record |= kept
        write_record(output, record)
    return record
