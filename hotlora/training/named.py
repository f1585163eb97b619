"""What transformers knows by name: optimizers and schedules; checked before a model is loaded."""

import json
from dataclasses import MISSING, fields
from types import SimpleNamespace
from typing import Any

import torch
from transformers import get_scheduler
from trl import SFTConfig, SFTTrainer

from ..base.errors import HotLoraError
from ..base.quiet import quiet
from ..hf.internals import internal
from .config import TrainConfig


def check_optim(name: str) -> None:
    """HotLoraError: transformers has no such optimizer, or its package is not installed."""
    names = internal("transformers.training_args:OptimizerNames")
    known = sorted(optimizer.value for optimizer in names)
    if name not in known:
        raise HotLoraError(f"optim = {name!r} does not exist: choose one of {', '.join(known)}.")
    # Not an SFTConfig: making one sets up the devices.
    defaults = {f.name: None if f.default is MISSING else f.default for f in fields(SFTConfig)}
    arguments: Any = SimpleNamespace(**defaults | {"optim": names(name)})
    try:
        with quiet():
            SFTTrainer.get_optimizer_cls_and_kwargs(arguments)
    except Exception as error:  # each has its own
        reason = " ".join(str(error).split())
        raise HotLoraError(f"optim = {name!r} cannot be used here ({reason}): leave it out.") from error


def schedule_options(config: TrainConfig) -> dict[str, Any]:
    """`lr_scheduler_kwargs` as transformers takes them. HotLoraError: no JSON object, or not the schedule's."""
    text = config.lr_scheduler_kwargs
    try:
        options = json.loads(str(text or "{}"))
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise HotLoraError(f"lr_scheduler_kwargs = {text!r} is no JSON object: write it as '{{\"min_lr_rate\": 0.1}}'.")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        schedule = get_scheduler(config.lr_scheduler, optimizer, 1, 4, scheduler_specific_kwargs=options)
        for _ in range(4):
            optimizer.step()
            schedule.step()
    except Exception as error:  # of every kind, by what is missing or wrong
        reason = " ".join(str(error).split())
        raise HotLoraError(
            f"lr_scheduler = {config.lr_scheduler!r} with lr_scheduler_kwargs = {text!r} is none that transformers can "
            f"make ({reason})."
        ) from error
    return options
