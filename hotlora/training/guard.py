"""What ends a training early, with what was good kept: a signal, and a loss or gradients that are no numbers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback

from ..base.processes import all_objects
from ..base.signals import say

_NAMED = 64  # examples that a message names


class StopOnSignal(TrainerCallback):
    """Ends training after the step in which `ask` was called in some process, with a checkpoint of that step."""

    def __init__(self) -> None:
        self.asked = False
        self.by = ""
        """the signal that came to this process"""

    def ask(self, by: str) -> None:
        self.asked, self.by = True, by
        again = "; Ctrl-C again ends at once, without the steps since the last one" if by == "Ctrl-C" else ""
        say(f"{by}: saving a checkpoint after this step{again}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:  # all save together; the loss is gathered after every step, too
            flag = torch.tensor(int(self.asked), device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            self.asked = bool(flag)
        if self.asked:
            control.should_save = control.should_training_stop = True


def not_finite(logs: Mapping[str, Any]) -> str | None:
    """What of a step's logged numbers is NaN or infinite; None where nothing is."""
    names = {"loss": "the loss", "grad_norm": "the norm of the gradients"}
    found = [f"{names[name]} is {logs[name]}" for name in names if not math.isfinite(logs.get(name) or 0)]
    return " and ".join(found) or None


def broken_weights(model: nn.Module) -> int:
    """How many trainable tensors of the model, over all processes, hold a NaN or an infinity. Waits for the device."""
    trained = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    local = [t.to_local() if hasattr(t, "to_local") else t for t in trained]
    bad = sum((~t.isfinite().all()).to("cpu", torch.int64) for t in local)
    return sum(all_objects(int(bad)))


def examples_of(batches: Sequence[Mapping[str, Tensor]], dataset: Dataset) -> list[int]:
    """Which rows of `dataset`, from `tokens.tokenize`, are in the batches of all processes, by their tokens. Where the
    data has a column `index`, as `tokens.tokenize` makes it: its values."""
    asked = {row for batch in batches for row in _rows(batch)}
    index = dataset["index"][:] if "index" in dataset.column_names else range(len(dataset))
    place = {row: i for i, row in enumerate(map(tuple, dataset["input_ids"])) if row in asked}  # the last of equal rows
    found = list(place.values())
    return sorted({index[i] for several in all_objects(found) for i in several})


def _rows(batch: Mapping[str, Tensor]) -> Iterator[tuple[int, ...]]:
    """The examples' tokens: a padded batch has a row for each, a packed one begins each at position 0."""
    ids = batch["input_ids"].cpu()
    if "attention_mask" in batch:
        for row, mask in zip(ids, batch["attention_mask"].cpu().bool(), strict=True):
            yield tuple(row[mask].tolist())
    else:
        starts = (batch["position_ids"].cpu().flatten() == 0).nonzero()[:, 0].tolist()
        for start, end in zip(starts, [*starts[1:], ids.numel()], strict=True):
            yield tuple(ids.flatten()[start:end].tolist())


def name_examples(indices: Sequence[int]) -> str:
    more = f" and {len(indices) - _NAMED} more" if len(indices) > _NAMED else ""
    return ", ".join(map(str, indices[:_NAMED])) + more
