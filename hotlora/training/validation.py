"""The held-out loss and score during training: in the metrics; the loss for the best adapter, too, and to stop where it
gets no better."""

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from ..base.files import atomic_path
from ..base.processes import is_main, wait_for_all
from ..base.signals import say
from ..hf.peft_hooks import key_of_today
from . import checkpoints

_log = logging.getLogger(__name__)
_NAME = re.compile(r"best-(\d+)\.safetensors")


class Validation(TrainerCallback):
    """Takes `loss()`, and `score()` where there is one, after every `every` optimizer steps.

    Args:
        score: metric -> score, such as {"exact_match": 0.5}; it decides nothing.
        rows: of the metrics of a run that is resumed, up to its checkpoint.
        folder: gets best-STEP.safetensors, the trained weights after the best step, if `keep_best`.
        patience: evaluations in a row without a lower loss, after which training ends; None: it goes on.
    """

    def __init__(
        self,
        loss: Callable[[], float],
        *,
        every: int,
        folder: Path,
        rows: Sequence[Mapping[str, Any]] = (),
        patience: int | None = None,
        keep_best: bool = False,
        score: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        self.score = score
        self.loss, self.every, self.folder, self.patience, self.keep_best = loss, every, folder, patience, keep_best
        losses = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
        self.found = {step: math.nan if loss is None else loss for step, loss in losses.items()}
        """step -> held-out loss, nats a response token; NaN, where it was no finite number"""
        self.scores: dict[int, dict[str, float]] = {}
        """step -> `eval_METRIC` -> score"""

    @property
    def best_step(self) -> int | None:
        """The first step of the lowest loss; None before there is one."""
        return self._best()

    def _best(self, until: float = math.inf) -> int | None:
        steps = [step for step, loss in self.found.items() if step <= until and not math.isnan(loss)]
        return min(steps, key=lambda step: (self.found[step], step), default=None)

    @property
    def is_over(self) -> bool:
        """Whether the last `patience` evaluations were no better than the best one before them."""
        if self.patience is None or self.best_step is None:
            return False
        return sum(step > self.best_step for step in self.found) >= self.patience

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        taken = math.ceil(state.max_steps / self.every)  # the last step has one, too
        if self.patience is not None and taken <= self.patience and is_main():
            _log.warning(
                "early_stopping_patience %d cannot end this run: held-out losses in %d steps (eval_steps %d): %d, "
                "and it needs more than %d",
                self.patience, state.max_steps, self.every, taken, self.patience,
            )  # fmt: skip

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        step = state.global_step
        if step % self.every and step < state.max_steps:
            return
        self.found[step] = self.loss()
        if self.score is not None:
            self.scores[step] = {f"eval_{metric}": value for metric, value in self.score().items()}
        if self.keep_best and self.best_step == step and is_main():
            with atomic_path(self._file(step)) as temporary:
                save_file({name: p.detach().contiguous() for name, p in _trained(model).items()}, temporary)
        if self.is_over:
            say(f"the held-out loss is lowest after step {self.best_step}; training ends after step {step}")
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A run that is resumed needs the best weights until the checkpoint that it resumes from: one is as good as
        lost while it is not marked complete, or damaged, and then it is the one before."""
        if is_main():
            needed = {self._file(self._best(step)) for step in (*checkpoints.steps(Path(args.output_dir)), math.inf)}
            for file in self.folder.glob("best-*.safetensors"):
                if _NAME.fullmatch(file.name) and file not in needed:
                    file.unlink()

    def restore(self, model: nn.Module) -> bool:
        """Gives the model its weights after the best step, if they are wanted and others. Where their file is gone or
        broken, those of the last step stay; that is said, and False."""
        wait_for_all()
        if not self.keep_best or self.best_step is None or self.best_step == max(self.found):
            return True
        file = self._file(self.best_step)
        try:
            best = load_file(file)
        except (OSError, SafetensorError) as error:
            _log.warning(
                "%s, with the weights of the lowest held-out loss, cannot be read (%s): the adapter has those of the "
                "last step, %d.", file, error, max(self.found),
            )  # fmt: skip
            return False
        trained = _trained(model)
        best = {name if name in trained else key_of_today(name): tensor for name, tensor in best.items()}
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(best[name].to(parameter.device))
        return True

    def _file(self, step: int | None) -> Path:
        return self.folder / f"best-{step}.safetensors"


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
