"""One function per rule: which experts of each layer get an adapter.

A rule takes scores [L, E], where higher is hotter, and params, of which it reads what its docstring names. It gives
back the expert ids of each layer, in any order. Ties go to the lower layer, then to the lower id. Shares are compared
as fractions, so that 6 of 10 assignments are 0.6.

Shape suffixes: L MoE layers, E experts.
"""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import accumulate, takewhile
from typing import Any

import torch
from torch import Tensor

Params = Mapping[str, Any]
Rule = Callable[[Tensor, Params], list[list[int]]]


def hot(scores: Tensor, params: Params) -> list[list[int]]:
    """The `experts_per_layer` highest scores of each layer (MoE-Sieve s4, HELLoRA s3)."""
    return _ranked(scores)[:, : params["experts_per_layer"]].tolist()


def all_experts(scores: Tensor, params: Params) -> list[list[int]]:
    """Every expert: vanilla LoRA."""
    return [list(range(scores.shape[1])) for _ in range(scores.shape[0])]


def random(scores: Tensor, params: Params) -> list[list[int]]:
    """`experts_per_layer`, drawn uniformly in each layer by `seed` (MoE-Sieve s6.1).

    One seed's smaller draws lie in its larger ones.
    """
    return [draw[: params["experts_per_layer"]] for draw in _draws(scores, params["seed"])]


def cold(scores: Tensor, params: Params) -> list[list[int]]:
    """The `experts_per_layer` lowest scores of each layer: HELLoRA's `_C` (its s4.5.1)."""
    return scores.sort(dim=1, stable=True).indices[:, : params["experts_per_layer"]].tolist()


def global_hot(scores: Tensor, params: Params) -> list[list[int]]:
    """The same `experts_per_layer` ids in every layer, by scores summed over layers: HELLoRA's `_M` (its s4.5.1)."""
    return hot(scores.sum(dim=0, keepdim=True), params) * len(scores)


def greedy(scores: Tensor, params: Params) -> list[list[int]]:
    """`budget` experts over all layers, each step the one that adds most coverage (MoE-Sieve s6.2, appendix C).

    A layer's gains only fall as it gets more experts, so all steps together are the `budget` largest shares. No
    layer is sure of an expert.
    """
    gains = []
    for layer, row in enumerate(_exact(scores)):
        total = sum(row) or 1  # without assignments there is nothing to gain
        gains += [(-score / total, layer, expert) for expert, score in enumerate(row)]
    chosen: list[list[int]] = [[] for _ in range(len(scores))]
    for _, layer, expert in sorted(gains)[: params["budget"]]:
        chosen[layer].append(expert)
    return chosen


def covering(scores: Tensor, params: Params) -> list[list[int]]:
    """The fewest of each layer's hottest experts whose shares add up to `p` or more (MoE-Sieve s6.2)."""
    p = Fraction(str(params["p"]))  # the number that was written: 0.7 is 7/10, and not the nearest double
    return _fewest(scores, [p * sum(row) for row in _exact(scores)])


def cumulative(scores: Tensor, params: Params) -> list[list[int]]:
    """ESFT's rule: a layer's hottest experts are added while the sum of their scores is below `p`.

    By count the score is the share of the layer's assignments, as in `covering`. By mass it is the mean gate weight
    over all tokens, which `scores` must be: where a token's weights do not sum to 1, neither do these, and where they
    all together stay below `p`, every expert is chosen.
    """
    if params["signal"] == "count":
        return covering(scores, params)
    return _fewest(scores, [Fraction(str(params["p"]))] * len(scores))


def hot_and_random(scores: Tensor, params: Params) -> list[list[int]]:
    """`experts_per_layer`, of which `fillers` are drawn by `seed` from all but the others, the hottest.

    What MoE-Sieve leaves to future work (its s7.3). Without fillers it is `hot`; with nothing else, `random`.
    """
    kept = params["experts_per_layer"] - params["fillers"]
    chosen = []
    for order, draw in zip(_ranked(scores).tolist(), _draws(scores, params["seed"]), strict=True):
        hottest = set(order[:kept])
        rest = [expert for expert in draw if expert not in hottest]
        chosen.append(order[:kept] + rest[: params["fillers"]])
    return chosen


def auto(scores: Tensor, params: Params) -> list[list[int]]:
    """The experts above the uniform share 1/E of their layer; where there is none, the first.

    No other number k of a layer's hottest experts has a larger coverage(k) - k/E; docs/method.md says why that one.
    """
    num_experts = scores.shape[1]
    chosen = []
    for row in _exact(scores):
        uniform = sum(row) / num_experts
        chosen.append([expert for expert, score in enumerate(row) if score > uniform] or [0])
    return chosen


_PER_LAYER = ("fraction", "experts_per_layer")
_RULES: dict[str, tuple[Rule, tuple[str, ...]]] = {
    "hot": (hot, (*_PER_LAYER, "signal")),
    "all": (all_experts, _PER_LAYER),  # a budget only where it is everything
    "random": (random, (*_PER_LAYER, "seed")),
    "cold": (cold, (*_PER_LAYER, "signal")),
    "global": (global_hot, (*_PER_LAYER, "signal")),
    "greedy": (greedy, (*_PER_LAYER, "budget", "signal")),
    "coverage": (covering, ("p", "signal")),
    "cumulative": (cumulative, ("p", "signal")),
    "hot+random": (hot_and_random, (*_PER_LAYER, "fillers", "signal", "seed")),
    "scores": (hot, (*_PER_LAYER, "scores")),
    "auto": (auto, ("signal",)),
}
RULES: dict[str, Rule] = {name: rule for name, (rule, _) in _RULES.items()}
READS: dict[str, tuple[str, ...]] = {name: reads for name, (_, reads) in _RULES.items()}
"""which of `select_experts`' options a rule reads"""
SAME_NUMBER = ("hot", "all", "random", "cold", "hot+random", "scores")
"""rules that keep as many experts of a layer, whatever its routing"""
BY_SHARE = ("greedy", "coverage", "cumulative", "auto")
"""rules that compare shares of a layer, which one without assignments does not have"""


def _ranked(scores: Tensor) -> Tensor:
    """int64 [L, E]: expert ids, the highest score first."""
    return scores.sort(dim=1, descending=True, stable=True).indices


def _draws(scores: Tensor, seed: int) -> list[list[int]]:
    """All E ids of each layer in an order drawn by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(scores.shape[1], generator=generator).tolist() for _ in range(scores.shape[0])]


def _fewest(scores: Tensor, targets: Sequence[Fraction]) -> list[list[int]]:
    """The fewest of each layer's experts, the hottest first, that add up to its target or more."""
    chosen = []
    for row, order, target in zip(_exact(scores), _ranked(scores).tolist(), targets, strict=True):
        below = takewhile(lambda total: total < target, accumulate(row[expert] for expert in order))  # noqa: B023
        chosen.append(order[: 1 + sum(1 for _ in below)])
    return chosen


def _exact(scores: Tensor) -> list[list[Fraction]]:
    return [[Fraction(score) for score in row] for row in scores.tolist()]
