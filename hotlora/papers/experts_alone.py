"""What our own studies on nano share: its three tasks, and adapters on experts alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..runs.sweep import Condition, Sweep
from .demo import CONFIG, TASKS, TRAIN_EXAMPLES


def experts_alone(name: str, conditions: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]) -> Sweep:
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
