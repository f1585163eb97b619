"""Where the rule `auto` lands against fixed numbers of experts: nano's three tasks, adapters on experts alone.

hotlora sweep auto_k --processes 2
hotlora report runs/auto_k
"""

from typing import Any

from hotlora.papers.experts_alone import experts_alone

CONDITIONS: list[dict[str, Any]] = [
    *({"rule": "hot", "fraction": fraction} for fraction in (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)),
    {"rule": "all"},
    {"rule": "auto"},
]


def name(options: dict[str, Any]) -> str:
    return f"{options['rule']}-{options['fraction']:g}" if "fraction" in options else options["rule"]


SWEEP = experts_alone("auto_k", {name(options): options for options in CONDITIONS}, seeds=(0, 1))
