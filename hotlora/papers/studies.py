"""Our own studies on nano. Those of docs/preregistered.md were decided before their first run.

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
LONGER = 1.25
"""Steps of the hot quarter at r 16 in the time of one of DR-LoRA at r 6: of processor time, median of three runs"""
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


def learned() -> Sweep:
    """Whether a selection that learns beats one that stays, at one number of trained parameters of experts (442,368)
    and, with more steps for the one that stays, at one time. Decided beforehand: docs/preregistered.md."""
    conditions = []
    for task, steps in {"nano-math": 150, "nano-sql": 150, "nano-choice": 300}.items():
        quarter = {"fraction": 0.25, "r": 16, "lora_alpha": 32, "placement": "gate"}
        static = {"rule": "hot", **quarter}
        how: dict[str, dict[str, Any]] = {
            "static": static,
            "reprofile": {**static, "reprofile_every": steps // 6},
            # Two of three projections: r 6 of all 32 experts is r 16 of 8.
            "dr-lora": {"method": "dr-lora", "r": 6, "lora_alpha": 12, "grow_every": steps // 30},
            "all": {"rule": "all", "r": 4, "lora_alpha": 8, "placement": "gate"},
            "random": {"rule": "random", **quarter},
            "static-longer": {**static, "max_steps": round(steps * LONGER)},
        }
        for name, options in how.items():
            conditions.append(Condition(f"{task}/{name}", {"data": task, "max_steps": steps, **options}))
    options = {"profile_fraction": 1.0, "limit": TRAIN_EXAMPLES, "test_limit": 500}
    return Sweep("learned", "nano", TASKS[0], conditions, seeds=range(8), config=_LONG, options=options)


def cold_noise() -> Sweep:
    """Whether experts that the router rarely uses add noise (MoE-Sieve, section 7.3): hot ones, half of them random,
    or all random, at three budgets, sixteen seeds. Decided beforehand: docs/preregistered.md."""
    conditions = [
        Condition(f"{share:g}/{rule.replace('hot+random', 'half')}", {"rule": rule, "fraction": share})
        for share in (1 / 8, 1 / 4, 1 / 2)
        for rule in ("hot", "hot+random", "random")
    ]
    options = {"placement": "pure", "profile_fraction": 1.0, "limit": TRAIN_EXAMPLES, "test_limit": 500}
    return Sweep("cold_noise", "nano", "nano-math", conditions, seeds=range(16), config=CONFIG, options=options)


STUDIES: dict[str, Callable[[], Sweep]] = {
    "auto_k": auto_k, "cold_noise": cold_noise, "learned": learned, "quantized": quantized, "reprofile": reprofile,
}  # fmt: skip


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
