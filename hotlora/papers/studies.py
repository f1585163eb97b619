"""Our own studies on nano: its three tasks, with adapters on experts alone.

hotlora sweep NAME --processes 2
hotlora report runs/NAME
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..runs.sweep import Condition, Sweep
from ..training.config import TrainConfig
from .demo import TASKS, TRAIN_EXAMPLES

_HOT = {"rule": "hot", "fraction": 0.25}
# Enough steps for LoRA on all experts to learn the tasks, few enough that a difference can show; the same for all.
CONFIG = TrainConfig(
    max_steps=100, batch_size=24, learning_rate=2e-3, warmup_ratio=0.1, lr_scheduler="linear", r=8, lora_alpha=16,
    max_length=256, save_steps=50,
)  # fmt: skip


# Until nearly all of a task is learnt: there seeds differ by a point, and not by ten.
_LONG = TrainConfig(
    batch_size=16, learning_rate=4e-3, warmup_ratio=0.1, lr_scheduler="linear", r=8, lora_alpha=16, max_length=256,
    save_steps=1000,
)  # fmt: skip
_STEPS = {"nano-math": 150, "nano-sql": 150, "nano-choice": 500}


def auto_k() -> Sweep:
    """Where the rule `auto` lands against fixed numbers of experts."""
    conditions: dict[str, dict[str, Any]] = {
        f"hot-{fraction:g}": {"rule": "hot", "fraction": fraction} for fraction in (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
    }
    return _experts_alone("auto_k", {**conditions, "all": {"rule": "all"}, "auto": {"rule": "auto"}}, seeds=(0, 1))


def quantized() -> Sweep:
    """What 8 and 4 bits cost near the end of learning: in the cold experts, or in all; and what an adapter that was
    trained on 4 bits scores on the base as it is. Decided beforehand: docs/preregistered.md."""
    stored: dict[str, dict[str, Any]] = {
        "not-quantized": {}, "8-bit-cold": {"quantize": 8, "keep_hot": True},
        "4-bit-cold": {"quantize": 4, "keep_hot": True}, "4-bit": {"quantize": 4},
    }  # fmt: skip
    conditions = []
    for name, how in stored.items():
        for task, steps in _STEPS.items():
            conditions.append(Condition(f"{task}/{name}", {"data": task, "max_steps": steps, **how}))
            if "quantize" in how:
                options = {"data": task, "quantize": 0}
                conditions.append(Condition(f"{task}/{name}-on-base", options, scores=f"{task}/{name}"))
    options = {**_HOT, "profile_fraction": 1.0, "limit": TRAIN_EXAMPLES, "test_limit": 500}
    return Sweep("quantized", "nano", TASKS[0], conditions, seeds=range(8), config=_LONG, options=options)


def reprofile() -> Sweep:
    """What choosing the hot quarter again while training buys: never, or three times in 100 steps."""
    again = {**_HOT, "reprofile_every": 25}
    conditions: dict[str, dict[str, Any]] = {
        "once": _HOT,
        "every-25": again,
        "every-25-merge": {**again, "reprofile_left": "merge"},
    }
    return _experts_alone("reprofile", conditions, seeds=(0, 1))


STUDIES: dict[str, Callable[[], Sweep]] = {"auto_k": auto_k, "quantized": quantized, "reprofile": reprofile}


def _experts_alone(name: str, conditions: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]) -> Sweep:
    """Each condition, by name the options of its runs, on each task: TASK/CONDITION."""
    on_each = [
        Condition(f"{task}/{condition}", {"data": task, **options})
        for task in TASKS
        for condition, options in conditions.items()
    ]
    options = {
        "train_attention": False, "train_router": False, "profile_fraction": 1.0, "limit": TRAIN_EXAMPLES,
        # 200 questions tell 14 points apart; the held-out loss, of the same questions, less.
        "test_limit": 200,
    }  # fmt: skip
    return Sweep(name, "nano", TASKS[0], on_each, seeds=seeds, config=CONFIG, options=options)
