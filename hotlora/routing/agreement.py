"""Whether the signals of a profile choose the same experts, and what depends on it where they do not."""

from dataclasses import dataclass

from .plan import DEFAULT_FRACTION
from .profile import RoutingProfile, experts_kept, hot_mask, hot_overlap

AGREE = 0.85
"""Jaccard from which two signals are said to choose the same. Count and mass of OLMoE and Qwen1.5-MoE are at 0.88 to
0.99, of GLM-5.2, with 256 experts a layer, at 0.56 to 0.77 (docs/method.md)."""

NEAR = 0.95
"""What the hot experts by count have of what those by the signal have: from there, little depends on the choice."""


@dataclass(frozen=True)
class Agreement:
    """The hot experts by count against those by another signal, means over layers."""

    signal: str
    jaccard: float
    by_count: float
    """share of the layer's whole mass (saliency: of its sum) that the hot experts by count have"""
    by_signal: float
    """the share that those by the signal have"""

    @property
    def matters(self) -> bool:
        """Whether much depends on which of the two signals chooses."""
        return self.by_count < NEAR * self.by_signal

    def __str__(self) -> str:
        what = {"mass": "gate weights", "saliency": "gate weights times output norms"}[self.signal]
        if self.by_count > self.by_signal and self.signal == "saliency":
            meaning = "saliency, a mean, ranks experts high that few tokens are sent to"
        elif not self.matters:
            meaning = "what differs is mostly near the edge of the budget, so that either will do"
        else:
            meaning = f"a plan by --signal {self.signal} adapts experts that weigh more there"
        return (
            f"count and {self.signal} choose other experts: their hot {DEFAULT_FRACTION:.0%} overlap "
            f"{self.jaccard:.2f} (Jaccard). Those by count have {self.by_count:.1%} of a layer's {what}, those by "
            f"{self.signal} {self.by_signal:.1%}: {meaning}"
        )


def agreements(profile: RoutingProfile, fraction: float = DEFAULT_FRACTION) -> list[Agreement]:
    """Count against mass, and against saliency, where the profile holds them, by the hot `fraction` of each layer."""
    kept = experts_kept(profile.num_experts, fraction, None)
    totals = {"mass": profile.mass} if profile.has_mass else {}
    totals |= {} if profile.saliency is None else {"saliency": profile.saliency}
    by_count, found = hot_mask(profile.counts, kept), []
    for signal, total in totals.items():
        by_signal = hot_mask(profile.signal(signal), kept)
        jaccard = hot_overlap(by_count, by_signal)
        shares = [((total * mask).sum(dim=1) / total.sum(dim=1)).nanmean().item() for mask in (by_count, by_signal)]
        found.append(Agreement(signal, jaccard.mean().item(), *shares))
    return found


def disagreements(profile: RoutingProfile) -> list[Agreement]:
    """Those below `AGREE`."""
    return [agreement for agreement in agreements(profile) if agreement.jaccard < AGREE]
