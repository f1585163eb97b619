"""What 8 and 4 bits cost: all routed experts quantized, the cold ones alone, or none. nano's three tasks.

The chosen experts are the hot quarter, and the adapter is on experts alone.

hotlora sweep quantized --processes 2
hotlora report runs/quantized
"""

from typing import Any

from hotlora.demo import CONFIG, TASKS, TRAIN_EXAMPLES
from hotlora.sweep import Condition, Sweep

CONDITIONS: dict[str, dict[str, Any]] = {
    "not-quantized": {},
    "8-bit": {"quantize": 8},
    "8-bit-cold": {"quantize": 8, "keep_hot": True},
    "4-bit": {"quantize": 4},
    "4-bit-cold": {"quantize": 4, "keep_hot": True},
}

SWEEP = Sweep(
    "quantized",
    "nano",
    TASKS[0],
    [
        Condition(f"{task}/{name}", {"data": task, "rule": "hot", "fraction": 0.25, **options})
        for task in TASKS
        for name, options in CONDITIONS.items()
    ],
    seeds=(0, 1, 2),
    config=CONFIG,
    options={
        "train_attention": False,
        "train_router": False,
        "profile_fraction": 1.0,
        "limit": TRAIN_EXAMPLES,
        "test_limit": 200,
    },
)
