"""Fine-tuning through TRL's trainer, in a run that may be killed any moment."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback, TrainerState

from ..base.errors import DataError, HotLoraError, Stopped
from ..base.files import read_json, write_json
from ..base.lock import locked
from ..base.processes import (
    all_objects,
    is_main,
    num_processes,
    wait_for_all,
)
from ..base.quiet import quiet
from ..base.records import peak_memory_bytes, reset_peak_memory
from ..base.signals import on_stop
from ..hf.forward import TEXTS, check_aux_loss_of, check_packing
from ..hf.routers import check_softmax_routers
from . import checkpoints, extend, guard
from .as_loaded import LoadedConfigs
from .config import TrainConfig
from .dense_mixer import dense_mixer
from .identity import check_same, same_run
from .progress import Recorder, shown
from .sft_trainer import Trainer, make_trainer
from .trackers import tracked
from .validation import Validation

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a training came to; `seconds` and `tokens` count the parts before a kill too.

    Attributes:
        loss_first, loss_last: mean response loss (nats a token) of the first and the last step's batch.
        tokens: non-padding tokens read, prompts included.
        resumed_from: the step that this process went on from; 0 where it began.
        metrics: the JSON lines file with step, loss, learning_rate, grad_norm, tokens, epoch and seconds, and eval_loss
            where it was taken.
        best_step, best_eval_loss: of the lowest held-out loss, where there were any.
        weights_step: the step whose weights the model has at the end.
        extended: `step` and `max_steps` of each time that the run was given another length: the step after which that
            was, and the steps that it had until then.
    """

    steps: int
    loss_first: float
    loss_last: float
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int | None
    resumed_from: int
    metrics: Path
    best_step: int | None = None
    best_eval_loss: float | None = None
    weights_step: int | None = None
    extended: list[dict[str, int]] = field(default_factory=list)


def train(
    model: Any,
    tokenizer: Any,
    dataset: Dataset,
    config: TrainConfig,
    output_dir: str | Path,
    *,
    identity: dict[str, Any] | None = None,
    held_out_loss: Callable[[], float] | None = None,
    held_out_score: Callable[[], Mapping[str, float]] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = False,
) -> TrainResult:
    """Trains a model's trainable parameters on `dataset`, in place.

    Called again with the same arguments and a freshly made model, it goes on from the last whole checkpoint
    in `output_dir` and ends where a run that was never killed ends: exactly so on one CPU. Called by several processes
    (torchrun), each with the same arguments, it trains over all of them; the first one writes the files. A checkpoint
    is for any number of processes, as long as a step has as many examples.

    Args:
        model: a PEFT model, or any causal LM with trainable parameters.
        dataset: from `tokens.tokenize`.
        output_dir: gets `checkpoints/`, `metrics.jsonl` and `train.json` (the resolved options).
        identity: what else must be equal for a checkpoint to belong to this run (data's hash, plan's hash,
        …).
        held_out_loss: what `config.eval_steps` takes, in nats a response token.
        held_out_score: what it takes besides: metric -> score.
        progress: whether to show a progress bar.

    Raises:
        HotLoraError: `output_dir` has checkpoints of a run with other options (each is named), or another process
            trains in it; an option that the model's family does not work with; a loss or gradients that are no finite
            numbers (step and examples are named); a full disk. The checkpoints that were whole stay.
        Stopped: SIGTERM or Ctrl-C came. There is a checkpoint of the last step.
    """
    with locked(output_dir):
        return _train(
            model,
            tokenizer,
            dataset,
            config,
            Path(output_dir),
            identity=identity,
            held_out_loss=held_out_loss,
            held_out_score=held_out_score,
            callbacks=callbacks,
            progress=progress,
        )


def _train(
    model: Any,
    tokenizer: Any,
    dataset: Dataset,
    config: TrainConfig,
    output: Path,
    *,
    identity: dict[str, Any] | None,
    held_out_loss: Callable[[], float] | None,
    held_out_score: Callable[[], Mapping[str, float]] | None,
    callbacks: Sequence[TrainerCallback],
    progress: bool,
) -> TrainResult:
    folder, metrics = output / "checkpoints", output / "metrics.jsonl"
    if not len(dataset):
        raise DataError("The training data has no examples; give at least one.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise HotLoraError("The model has no trainable parameter: put an adapter on it first.")
    check_family(model, tokenizer, config)
    resolved = {**config.recorded(), **(identity or {}), "examples": len(dataset)}
    resolved["processes"] = num_processes()
    checkpoint = checkpoints.last_whole(folder)
    extended: list[dict[str, int]] = []
    if checkpoint is not None:
        old = read_json(output / "train.json")
        extended = old.pop("extended", [])
        check_same(same_run(old), same_run(resolved), output, extend=config.extend)
        if extend.ends_elsewhere(old, resolved):
            extend.check_extension(output, config)
            extended = [*extended, extend.entry(checkpoint)]
        _log.info("going on from %s", checkpoint)
    start = checkpoints.step_of(checkpoint)
    rows = checkpoints.read_metrics(metrics, start)
    wait_for_all()  # until each has read what was there
    if is_main():
        checkpoints.remove_incomplete(folder, checkpoint)
        write_json(output / "train.json", {**resolved, "extended": extended} if extended else resolved)
        checkpoints.write_metrics(metrics, rows)
    wait_for_all()

    reset_peak_memory()
    recorder = Recorder(metrics, seconds_before=rows[-1]["seconds"] if rows else 0.0)
    stopping = guard.StopOnSignal()
    validation = None
    if held_out_loss is not None and config.eval_steps is not None:
        validation = Validation(
            held_out_loss, every=config.eval_steps, folder=output, rows=rows, keep_best=config.load_best,
            patience=config.early_stopping_patience, score=held_out_score,
        )  # fmt: skip
        callbacks = [*callbacks, validation]
    ours: list[TrainerCallback] = [recorder, stopping, *([shown()] if progress else [])]
    configs = LoadedConfigs(model)
    try:
        trainer = make_trainer(model, tokenizer, dataset, config, folder, [*callbacks, *ours])
        trainer.configs, trainer.validation, trainer.extended = configs, validation, extended
        with dense_mixer(model) if config.dense_mixer else nullcontext():
            _run(trainer, checkpoint, stopping, callbacks)
        has_best = validation is None or validation.restore(model)
    finally:
        configs.restore()

    if stopping.asked:
        state, by = trainer.state, next(filter(None, all_objects(stopping.by)))
        where = f"after step {state.global_step} of {state.max_steps}"
        raise Stopped(f"stopped by {by} {where}: {checkpoints.going_on(folder)}.", by)

    wait_for_all()  # until the main process has written the last row
    rows = checkpoints.read_metrics(metrics)
    if not rows:
        raise HotLoraError(f"{metrics} holds no steps though training ended: delete {output} and train again.")
    tokens, seconds = rows[-1]["tokens"], rows[-1]["seconds"]
    best = validation.best_step if validation else None
    return TrainResult(
        steps=rows[-1]["step"], loss_first=rows[0]["loss"], loss_last=rows[-1]["loss"], tokens=tokens,
        seconds=seconds, tokens_per_second=tokens / seconds if seconds > 0 else 0.0,
        peak_memory_bytes=peak_memory_bytes(), resumed_from=start, metrics=metrics,
        best_step=best, best_eval_loss=validation.found[best] if validation and best is not None else None,
        weights_step=best if best is not None and config.load_best and has_best else rows[-1]["step"],
        extended=extended,
    )  # fmt: skip


def check_family(model: Any, tokenizer: Any, config: TrainConfig) -> None:
    """Tells, in a short forward, of options that the model's family does not work with. Changes nothing.

    Raises:
        HotLoraError: packing, where packed examples see each other or do not run; the load-balancing loss, where there
            is none; DenseMixer, where routers are of another kind.
    """
    if config.dense_mixer:
        check_softmax_routers(model, "dense_mixer")
    check_aux_loss_of(model, tokenizer(TEXTS[0])["input_ids"], config.aux_loss_coef)
    if config.packing:
        check_packing(model, [tokenizer(text)["input_ids"] for text in TEXTS])


def _run(
    trainer: Trainer, checkpoint: Path | None, stopping: guard.StopOnSignal, callbacks: Sequence[TrainerCallback]
) -> None:
    """Trains to the end, from `checkpoint` on."""
    folder, start = Path(str(trainer.args.output_dir)), checkpoints.step_of(checkpoint)
    with quiet(), on_stop(stopping.ask), checkpoints.told_when_full(folder):
        ended = trainer.validation is not None and trainer.validation.is_over
        if trainer.extended:
            trainer.args.warmup_steps = trainer.args.get_warmup_steps(trainer.extended[0]["max_steps"])
        goes_on = bool(trainer.extended) and trainer.extended[-1]["step"] == start
        if checkpoint and not goes_on:
            ended = ended or start >= read_json(checkpoint / "trainer_state.json")["max_steps"]
        if checkpoint and ended:
            # Killed after the last step. transformers would train one step more.
            trainer._load_from_checkpoint(str(checkpoint), trainer.model)
            trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            for callback in callbacks:
                callback.on_train_begin(trainer.args, trainer.state, trainer.control)
        else:
            with tracked(trainer, folder.parent, start):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
