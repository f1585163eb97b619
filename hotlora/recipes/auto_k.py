"""Where the rule `auto` lands against fixed numbers of experts: nano's three tasks, adapters on experts alone.

hotlora sweep auto_k --processes 2
hotlora report runs/auto_k
"""

from typing import Any

from hotlora.demo import CONFIG, TASKS, TRAIN_EXAMPLES
from hotlora.sweep import Condition, Sweep

CONDITIONS: list[dict[str, Any]] = [
    *({"rule": "hot", "fraction": fraction} for fraction in (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)),
    {"rule": "all"},
    {"rule": "auto"},
]


def name(options: dict[str, Any]) -> str:
    return f"{options['rule']}-{options['fraction']:g}" if "fraction" in options else options["rule"]


SWEEP = Sweep(
    "auto_k",
    "nano",
    TASKS[0],
    [Condition(f"{task}/{name(options)}", {"data": task, **options}) for task in TASKS for options in CONDITIONS],
    seeds=(0, 1),
    config=CONFIG,
    options={
        "train_attention": False,
        "train_router": False,
        "profile_fraction": 1.0,
        "limit": TRAIN_EXAMPLES,
        # 200 questions tell 14 points apart; the held-out loss, of the same questions, less.
        "test_limit": 200,
    },
)
