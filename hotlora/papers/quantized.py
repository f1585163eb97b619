"""What 8 and 4 bits cost: all routed experts quantized, the cold ones alone, or none. nano's three tasks.

The chosen experts are the hot quarter, and the adapter is on experts alone.

hotlora sweep quantized --processes 2
hotlora report runs/quantized
"""

from typing import Any

from hotlora.papers.experts_alone import experts_alone

_HOT = {"rule": "hot", "fraction": 0.25}
CONDITIONS: dict[str, dict[str, Any]] = {
    "not-quantized": _HOT,
    "8-bit": {**_HOT, "quantize": 8},
    "8-bit-cold": {**_HOT, "quantize": 8, "keep_hot": True},
    "4-bit": {**_HOT, "quantize": 4},
    "4-bit-cold": {**_HOT, "quantize": 4, "keep_hot": True},
}

SWEEP = experts_alone("quantized", CONDITIONS, seeds=(0, 1, 2))
