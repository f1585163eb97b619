"""How far the hot experts of one text move when the model changes: other precision, or training.

Shape suffixes: L MoE layers, E experts, X examples.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.errors import DataError
from .profile import hot_mask, hot_overlap

DRAWS = 200


def drift(before_XLE: Tensor, after_XLE: Tensor, kept: int, *, draws: int = DRAWS, seed: int = 0) -> dict[str, Any]:
    """Two models' hot experts on the same examples, and what chance would have made of them.

    Args:
        before_XLE, after_XLE: int [X, L, E], the same examples' counts on the model before and after
            (`profile_examples` returns them).
        kept: hot experts of a layer.
        draws: resamples of the examples, for each of the intervals.

    Returns:
        "jaccard": of the two hot sets, mean over layers; "interval": its 95% bootstrap interval, over examples drawn
        again, the same for both models; "by_layer".
        "halves": the examples cut at random in two, the hot set before on the one against that after on the other;
        "halves_alone": the same of before and before, what two texts of that length differ by without any change.
        Each is a mean over cuts. Where the first is not below the second, the change is less than what another text of
        half the length would have changed. "beyond_halves": share of the cuts whose first is below their second.
        "moved": share of the hot experts after that were not hot before. "covered": share of the assignments after that
        go to the hot experts after; "still_covered": that go to those of before.

    Raises:
        DataError: the examples differ in number or shape, or there are fewer than 2.
    """
    if before_XLE.shape != after_XLE.shape or len(before_XLE) < 2:
        raise DataError(
            f"counts are {list(before_XLE.shape)} before and {list(after_XLE.shape)} after: give both of the same "
            "examples, 2 or more"
        )
    before, after = before_XLE.double(), after_XLE.double()
    hot_before, hot_after = (hot_mask(counts.sum(dim=0), kept) for counts in (before, after))
    by_layer = hot_overlap(hot_before, hot_after)
    shares = after.sum(dim=0) / after.sum(dim=(0, 2)).clamp(min=1)[:, None]
    random = np.random.default_rng(seed)
    again = [_again(before, after, kept, random) for _ in range(draws)]
    halves = np.array([_halves(before, after, kept, random) for _ in range(draws)])
    return {
        "examples": len(before), "experts_per_layer": kept, "draws": draws,
        "jaccard": by_layer.mean().item(), "interval": np.quantile(again, [0.025, 0.975]).tolist(),
        "by_layer": by_layer.tolist(),
        "halves": halves[:, 0].mean().item(), "halves_alone": halves[:, 1].mean().item(),
        "beyond_halves": float((halves[:, 0] < halves[:, 1]).mean()),
        "moved": (hot_after & ~hot_before).sum().item() / (kept * len(by_layer)),
        "covered": (shares * hot_after).sum(dim=1).mean().item(),
        "still_covered": (shares * hot_before).sum(dim=1).mean().item(),
    }  # fmt: skip


def _again(before: Tensor, after: Tensor, kept: int, random: np.random.Generator) -> float:
    """Jaccard on examples drawn with replacement: how often each is drawn weighs its counts."""
    drawn = random.integers(len(before), size=len(before))
    times = torch.from_numpy(np.bincount(drawn, minlength=len(before))).double()
    hot = [hot_mask(torch.einsum("x,xle->le", times, counts), kept) for counts in (before, after)]
    return hot_overlap(*hot).mean().item()


def _halves(before: Tensor, after: Tensor, kept: int, random: np.random.Generator) -> tuple[float, float]:
    """Of one cut: before against after, and before against before."""
    order = torch.from_numpy(random.permutation(len(before)))
    one, other = order[: len(order) // 2], order[len(order) // 2 :]
    first = hot_mask(before[one].sum(dim=0), kept)
    changed, same = (hot_mask(counts[other].sum(dim=0), kept) for counts in (after, before))
    return hot_overlap(first, changed).mean().item(), hot_overlap(first, same).mean().item()
