"""FLOPs of an adapter's forward pass, from a model's config alone."""

from collections.abc import Mapping
from pathlib import Path

from ..adapter.count import PARTS
from ..base.errors import HotLoraError
from ..hf.models import model_from_config
from ..hf.moe_layers import moe_layers, num_experts_per_tok
from ..routing.profile import experts_kept
from .estimate import coverage_at


def adapter_flops(
    config: str | Path,
    counts: Mapping[str, float],
    *,
    experts_per_layer: int | str | None = None,
    fraction: float | None = None,
    coverage: float | None = None,
) -> dict[str, float]:
    """Of LoRA, forward, a token: `attention`, `router`, `shared`, `experts`, and `per_token`, which is all of them.

    A factor's weight takes a multiply and an add for each token that it sees. That is every token, but in a routed
    expert: of a token's K assignments the share `coverage` meets an adapter. A mask on B, or a frozen A, saves none.

    Args:
        config: a config.json, its folder, or "nano".
        counts: of `parameters_from_config`, with the same budget, of LoRA with both factors trained.
        experts_per_layer, fraction: the budget; "top_k" is the router's K; none means all experts.
        coverage: share of the assignments that go to adapted experts; None: as in a layer whose loads have a CV of 1.

    Raises:
        HotLoraError: a coverage that is no share.
        PlanError: a budget out of range.
    """
    if coverage is not None and not 0 <= coverage <= 1:
        raise HotLoraError(f"coverage is {coverage}: it is a share, from 0 to 1.")
    model = model_from_config(config)
    layers, top_k = moe_layers(model), num_experts_per_tok(model)
    kept = [layer.num_experts for layer in layers]
    if experts_per_layer is not None or fraction is not None:
        number = top_k if experts_per_layer == "top_k" else experts_per_layer
        assert not isinstance(number, str)
        kept = [experts_kept(layer.num_experts, fraction, number) for layer in layers]
    if coverage is None:
        coverage = coverage_at(kept[0] / layers[0].num_experts)
    flops = {part: 2.0 * counts[part] for part in PARTS}
    flops["experts"] *= len(layers) / sum(kept) * top_k * coverage
    return {**flops, "per_token": sum(flops.values()), "coverage": coverage}
