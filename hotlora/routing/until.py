"""How many examples a profile needs: read in random order until the experts that a rule chooses are settled.

How settled they are is told by a bootstrap over examples, which routing depends on far more than on single tokens.

Shape suffixes: L MoE layers, E experts, X examples, B resamples.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..base.errors import DataError
from .plan import DEFAULT_FRACTION, ExpertPlan, selected
from .profile import RoutingProfile
from .profiler import Watch
from .rules import READS, RULES
from .selection import UNTIL, Selection

FIRST, GROWTH = 64, 1.25
"""Examples before the first look, and how many times as many there are at each one after it."""
RESAMPLES = 100
LOW = 0.05
"""Share of the resamples below `Stability.low`."""
FEWEST = 16
"""Examples that a bootstrap may be made of."""
_MOST_ROWS = 1024
"""Rows that are resampled: of more examples neighbours in the random order are added up."""


@dataclass(frozen=True)
class Stability:
    """How far the experts chosen from some examples are those that any more such data would choose: Jaccard, mean over
    layers."""

    mean: float
    low: float
    """what it is at least, 19 times in 20"""


def looks(num_examples: int) -> list[int]:
    """After how many examples it is asked whether they are enough; the last is all."""
    found, number = [], FIRST
    while number < num_examples:
        found.append(number)
        number = math.ceil(number * GROWTH)
    return [*found, num_examples]


def stability(tables: Mapping[str, Tensor], plan: ExpertPlan, profile: RoutingProfile, *, seed: int = 0) -> Stability:
    """Of `plan`, which was chosen from `profile`, by a bootstrap over the profile's examples.

    Examples are drawn with replacement, as many as there are, and the plan's rule chooses from their sums. How far
    that choice is from the plan says how far the plan is from the choice of all data that the examples are a sample of.

    tables: "count", and what else the plan's signal reads ("mass", "saliency"): [X, L, E], each example's own.

    DataError: fewer than 16 examples.
    """
    num_rows = len(tables["count"])
    if num_rows < FEWEST:
        raise DataError(f"{num_rows} examples are too few for a bootstrap: give at least {FEWEST}")
    random = np.random.default_rng(seed)
    weights_BX = torch.from_numpy(random.multinomial(num_rows, np.full(num_rows, 1 / num_rows), RESAMPLES)).double()
    drawn = {
        name: (weights_BX @ table.double().flatten(1)).view(RESAMPLES, *table.shape[1:])
        for name, table in tables.items()
    }
    ours = [set(ids) for ids in plan.experts.values()]
    found = []
    for i in range(RESAMPLES):
        counts = drawn["count"][i].round().long()
        tokens = profile.num_tokens * int(counts.sum()) // int(profile.counts.sum())
        mass, saliency = (drawn[name][i] if name in drawn else None for name in ("mass", "saliency"))
        mass = profile.mass if mass is None else mass
        again = replace(profile, counts=counts, mass=mass, num_tokens=tokens, saliency=saliency)
        theirs = RULES[plan.rule](again.signal(_ranking(plan)), plan.params)
        found.append(_jaccard(ours, theirs))
    return Stability(float(np.mean(found)), float(np.quantile(found, LOW)))


def profile_until(
    model: nn.Module,
    batches_of: Callable[[Sequence[int]], Iterable[Mapping[str, Tensor]]],
    num_examples: int,
    *,
    until: float = UNTIL,
    selection: Selection | None = None,
    seed: int = 0,
    saliency: bool = False,
    progress: bool = False,
    source: Mapping[str, Any] | None = None,
    share_out: bool = False,
) -> RoutingProfile:
    """`profiler.profile_routing` on as many examples as settle which experts are chosen, or on all.

    They are drawn in an order of `seed`'s. After 64, and then after each quarter more, a bootstrap over those that
    were read estimates how far the chosen experts agree with those that any more such data would choose; when the
    estimate reaches `until`, that is enough.

    Args:
        batches_of: the batches of some examples, given their places, as `profile_routing` takes them.
        num_examples: of how many.
        until: Jaccard of the chosen experts, mean over layers, above 0 and below 1.
        selection: the rule, budget and signal that choose; the hot 25% by count where it is None, or a rule that no
            profile changes (all, random, scores).

    Returns:
        A profile whose `source` has, besides: "examples", the number read; "drawn_from", all of them; "until", what
        was asked for; "stability", the last estimate ("mean", "low"; None where there are fewer than 16 examples).

    Raises:
        HotLoraError: as `profile_routing` and `select_experts`; `until` is out of range.
    """
    if not 0 < until < 1:
        raise DataError(f"until is {until}: it must be above 0 and below 1, such as {UNTIL}")
    selection = chosen_for(selection)
    order = np.random.default_rng(seed).permutation(num_examples)
    names = ("count",) if selection.signal == "count" else ("count", selection.signal.removesuffix("_per_token"))
    with Watch(model, saliency=saliency or "saliency" in names, share_out=share_out, by_example=names) as watch:

        def read(start: int, end: int) -> tuple[dict[str, Tensor], RoutingProfile]:
            told = f"profiling {start:,} to {end:,} of {num_examples:,} examples" if start else "profiling"
            watch.run(batches_of(order[start:end].tolist()), progress=progress, told=told)
            return watch.examples(), watch.profile(source)

        profile, examples, found = settled(read, num_examples, until, selection, seed=seed)
    more = {
        "drawn_from": num_examples, "until": asked(until, selection, seed),
        "stability": None if found is None else asdict(found),
    }  # fmt: skip
    return replace(profile, source={**profile.source, "examples": examples, **more})


def settled(
    read: Callable[[int, int], tuple[Mapping[str, Tensor], RoutingProfile]],
    num_examples: int,
    until: float,
    selection: Selection,
    *,
    seed: int = 0,
) -> tuple[RoutingProfile, int, Stability | None]:
    """(the profile of as many examples as are enough, their number, how stable they are).

    read: examples from the first place up to the second -> the tables of each, as `stability` takes them, and the
        profile of all up to there.
    """
    rows: dict[str, Tensor] = {}
    start = 0
    for end in looks(num_examples):
        more, profile = read(start, end)
        rows = {name: _thinned(torch.cat([rows[name], table]) if rows else table) for name, table in more.items()}
        start = end
        found = None
        if end >= FEWEST:
            found = stability(rows, selected(profile, selection, seed=seed), profile, seed=seed)
            if found.mean >= until:
                break
    return profile, start, found


def chosen_for(selection: Selection | None) -> Selection:
    """The selection whose experts are to be settled: the default one where no profile changes it."""
    if selection is None or "signal" not in READS.get(selection.rule, ()):
        return Selection(fraction=DEFAULT_FRACTION)
    return selection


def asked(until: float, selection: Selection | None, seed: int) -> dict[str, Any]:
    """What a profile was asked to be read until, as its source holds it."""
    chosen = {name: value for name, value in asdict(chosen_for(selection)).items() if value is not None}
    return {"jaccard": until, "seed": seed, "experts": chosen}


def _ranking(plan: ExpertPlan) -> str:
    """The signal whose numbers the rule reads."""
    signal: str = plan.params["signal"]
    return "mass_per_token" if plan.rule == "cumulative" and signal == "mass" else signal


def _jaccard(ours: Sequence[set[int]], theirs: Sequence[Sequence[int]]) -> float:
    found = [len(a.intersection(b)) / len(a.union(b)) if a or b else 1.0 for a, b in zip(ours, theirs, strict=True)]
    return sum(found) / len(found)


def _thinned(rows_XLE: Tensor) -> Tensor:
    """At most so many rows as are resampled, by adding up neighbours: they are drawn at random, so their sums vary as
    they do by themselves."""
    while len(rows_XLE) > _MOST_ROWS:
        even = len(rows_XLE) // 2 * 2
        rows_XLE = torch.cat([rows_XLE[:even].unflatten(0, (-1, 2)).sum(dim=1), rows_XLE[even:]])
    return rows_XLE


def is_settled(profile: RoutingProfile) -> bool:
    """Whether a profile reached what it was to be read until; True where all was to be read."""
    asked_for, found = profile.source.get("until"), profile.source.get("stability")
    return asked_for is None or (found is not None and found["mean"] >= asked_for["jaccard"])


def told_stability(profile: RoutingProfile) -> str | None:
    """What a profile of `profile_until` read and how stable it is, without a full stop; None of another profile."""
    source = profile.source
    if "until" not in source:
        return None
    read, number = source["examples"], source["drawn_from"]
    some = f"{read:,} of {number:,} examples" if read < number else f"all {number:,} examples"
    told = f"profiled on {some}, {profile.num_tokens:,} tokens"
    if (found := source["stability"]) is None:
        return f"{told}, too few to say how stable the chosen experts are"
    chosen = source["until"]["experts"]
    words = {"rule": "{}", "signal": "by {}"}
    what = ", ".join(words.get(name, f"{name} {{}}").format(value) for name, value in chosen.items())
    # Rounded up it could seem to reach what it lacks.
    mean, low = (math.floor(100 * found[name] + 1e-9) / 100 for name in ("mean", "low"))
    told += (
        f": the chosen experts ({what}) overlap {mean:.2f} with those that any more such data would choose (Jaccard; "
        f"{low:.2f} or more, 19 times in 20)"
    )
    return told if is_settled(profile) else f"{told}, short of profile_until = {source['until']['jaccard']:g}"
