"""How a run selects the experts that it adapts. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path

from ..base.options import Options, option

UNTIL = 0.95
"""Jaccard of a profile's chosen experts with those that any more such data would choose, at which it is enough."""
_PANEL = "Which experts"


@dataclass(frozen=True, kw_only=True)
class Selection(Options):
    """A rule and its budget, as `plan.select_experts` takes them."""

    rule: str = option(
        "How experts are chosen: hot, all, random, cold, global, greedy, coverage, cumulative, hot+random, scores or "
        "auto.", "hot", panel=_PANEL,
    )  # fmt: skip
    fraction: float | None = option("Share of each layer's experts to adapt (default 0.25).", None, panel=_PANEL)
    experts_per_layer: int | str | None = option(
        "Their number, in place of --fraction; top_k: as many as the router chooses for a token.", None, panel=_PANEL
    )
    p: float | None = option(
        "Share of each layer's routing to reach: coverage (default 0.6), cumulative (0.2; by mass 0.1 of a token's "
        "gate weight).", None, panel=_PANEL,
    )  # fmt: skip
    budget: int | None = option("greedy: experts over all layers, in place of --fraction.", None, panel=_PANEL)
    fillers: int | None = option("hot+random: how many are random (default half).", None, panel=_PANEL)
    scores: str | Path | None = option("scores: a JSON file of each expert's score.", None, panel=_PANEL)
    signal: str = option(
        "What ranks experts: count (assignments), mass (gate weights), mass_per_token (the same a token: ESFT's gate "
        "score) or saliency (gate weight x output norm: REAP's; of a profile made with --saliency).", "count",
        panel=_PANEL,
    )  # fmt: skip
