"""Hot experts of two models on the same examples: the numbers by hand, and what chance alone gives."""

import numpy as np
import pytest
import torch

from hotlora.base.errors import DataError
from hotlora.routing.drift import drift
from hotlora.routing.plan import select_experts
from hotlora.routing.profile import RoutingProfile, jaccard

X, L, E, KEPT = 60, 3, 16, 4


def counts_of(seed: int, weights: np.ndarray | None = None) -> torch.Tensor:
    """Of X examples, each with a taste of its own."""
    random = np.random.default_rng(seed)
    weights = np.linspace(1, 3, E) if weights is None else weights
    return torch.from_numpy(random.poisson(random.gamma(2.0, weights, (X, L, E)))).int()


def plan_of(examples: torch.Tensor):
    counts = examples.sum(dim=0).long()
    return select_experts(RoutingProfile(tuple(range(L)), counts, counts.double(), 9, 2), experts_per_layer=KEPT)


def test_the_sets_are_the_plans_and_the_shares_are_of_the_routing_after():
    before, after = counts_of(0), counts_of(1, np.roll(np.linspace(1, 3, E), 2))
    found, (old, new) = drift(before, after, KEPT, draws=5), (plan_of(before), plan_of(after))
    assert found["jaccard"] == pytest.approx(jaccard(old, new)) == pytest.approx(np.mean(found["by_layer"]))
    routed = after.sum(dim=0).double()
    for key, plan in (("covered", new), ("still_covered", old)):
        shares = [routed[i, list(plan.experts[i])].sum() / routed[i].sum() for i in range(L)]
        assert found[key] == pytest.approx(np.mean(shares))
    moved = [len(set(new.experts[i]) - set(old.experts[i])) for i in range(L)]
    assert found["moved"] == pytest.approx(sum(moved) / (KEPT * L)) and found["moved"] > 0
    assert found["still_covered"] < found["covered"]


def test_the_interval_is_of_examples_drawn_again():
    before, after = counts_of(0), counts_of(1)
    found, random, scores = drift(before, after, KEPT, draws=40, seed=3), np.random.default_rng(3), []
    for _ in range(40):
        drawn = random.integers(X, size=X)
        scores.append(jaccard(plan_of(before[drawn]), plan_of(after[drawn])))
    assert found["interval"] == pytest.approx(np.quantile(scores, [0.025, 0.975]))


def test_one_model_against_itself_has_not_drifted():
    examples = counts_of(2)
    found = drift(examples, examples, KEPT, draws=50)
    assert (found["jaccard"], found["interval"], found["moved"]) == (1, [1, 1], 0)
    assert found["halves"] == found["halves_alone"] < 1 and found["beyond_halves"] == 0


def test_a_small_change_is_within_chance_and_a_large_one_beyond_it():
    examples = counts_of(2)
    nudged = examples.clone()
    nudged[0] += counts_of(5)[0]  # one example of sixty
    small = drift(examples, nudged, KEPT, draws=100)
    assert small["jaccard"] > small["halves_alone"] and small["beyond_halves"] < 0.9
    large = drift(examples, counts_of(3, np.linspace(3, 1, E)), KEPT, draws=100)
    assert large["halves"] < large["halves_alone"] and large["beyond_halves"] == 1


def test_other_examples_are_refused():
    with pytest.raises(DataError, match=r"\[60, 3, 16\] before and \[59, 3, 16\] after: give both of the same"):
        drift(counts_of(0), counts_of(0)[1:], KEPT)
    with pytest.raises(DataError, match="2 or more"):
        drift(counts_of(0)[:1], counts_of(0)[:1], KEPT)
