"""A run that is given more steps (`--extend`): it goes on from its last checkpoint, as if it had not ended there.

The order of the data does not depend on a run's length. The learning rate is, from there on, that of a schedule of the
new length, with the warm-up of the run as it began.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..base.errors import HotLoraError
from ..base.files import read_json
from . import checkpoints
from .config import TrainConfig
from .identity import LENGTH
from .validation import Validation


def ends_elsewhere(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether two runs' options differ in their length."""
    return any(old.get(name) != new.get(name) for name in LENGTH)


def check_extension(output: Path, config: TrainConfig) -> None:
    """HotLoraError: the run in `output` has no checkpoint to go on from, or `config` gives it nothing more to do."""
    last = checkpoints.last_complete(output / "checkpoints")
    rows = checkpoints.read_metrics(output / "metrics.jsonl", checkpoints.step_of(last)) if last else []
    if not rows:
        raise HotLoraError(f"{output} has no whole checkpoint to go on from: train anew in another folder.")
    step, epoch = rows[-1]["step"], rows[-1]["epoch"] or 0
    is_more = config.epochs > epoch + 1e-9 if config.max_steps is None else config.max_steps > step
    if not is_more:
        asked = f"--epochs {config.epochs:g}" if config.max_steps is None else f"--max-steps {config.max_steps}"
        raise HotLoraError(f"{output} has {step} steps ({epoch:g} epochs) already, and {asked} is no more: give more.")
    if config.eval_steps is not None:
        validation = Validation(
            lambda: math.nan, every=config.eval_steps, folder=output, rows=rows, patience=config.early_stopping_patience
        )
        if validation.is_over:
            raise HotLoraError(
                f"{output} was ended by early stopping after step {step}: its held-out loss was lowest after step "
                f"{validation.best_step}. Give a larger --early-stopping-patience, or none."
            )


def entry(checkpoint: Path) -> dict[str, int]:
    """What a record tells of an extension: the step that it began after, and the steps that were planned until then."""
    state = read_json(checkpoint / "trainer_state.json")
    return {"step": checkpoints.step_of(checkpoint), "max_steps": state["max_steps"]}


def follow_schedule(optimizer: Any, scheduler: Any) -> tuple[float, float]:
    """Gives an optimizer that was read from a checkpoint the rate that `scheduler` has at that step, which may be of
    another length; returns (the rate before, the rate now).

    transformers leaves the optimizer the rate of the old schedule for one more step: 0 where that had ended.
    """
    before = optimizer.param_groups[0]["lr"]
    factors = [rate(scheduler.last_epoch) for rate in scheduler.lr_lambdas]
    rates = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler.load_state_dict(scheduler.state_dict() | {"_last_lr": rates})
    return before, rates[0]
