"""The profiling study of MoE-Sieve's section 3: several data sets' profiles -> one record of numbers.

Shape suffixes: C data sets, L MoE layers, E experts, X examples.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from scipy.stats import rankdata
from torch import Tensor

from ..base.errors import DataError, FileError, PlanError
from ..base.files import read_json
from .profile import RoutingProfile, experts_kept, hot_mask, hot_overlap

FORMAT = "hotlora.study"
VERSION = 1
FRACTION = 0.25  # the budget of all hot sets here
COVERED = 0.60  # of a layer's assignments: the paper's cov60
SUBSAMPLE, DRAWS = 0.10, 50  # MoE-Sieve s3.3
SHUFFLES = 200
THIRDS = ("early", "middle", "late")

Study = dict[str, Any]


def study(
    profiles: Mapping[str, RoutingProfile],
    examples: Mapping[str, Tensor] | None = None,
    *,
    shared: float = 0.0,
    seed: int = 0,
) -> Study:
    """What section 3 of MoE-Sieve reports, of each data set and of all together. Plain JSON values.

    Args:
        profiles: name of a data set -> its profile; all of one model.
        examples: name -> int32 [X, L, E], as `profile_examples` returns them: these get "stability".
        shared: S, the number of routed experts that the model's shared experts are as wide as.
        seed: of the subsamples.

    Returns:
        "datasets": name -> "global_cv", "layer_cv" (mean over layers), "ratio", "shuffled" (`shuffled_cv`),
        "cold_share", "coverage" (of the hot 25%), "coverage_with_shared" ((S + K coverage) / (S + K)), "entropy",
        "experts_for_60", "by_layer" and "by_depth" (thirds of the layers) of the same, "signals" and "stability";
        "mean": the means over data sets, and the ratio of the mean CVs; "overlap": Jaccard of the hot sets, and a
        clustering of the data sets by it.

    Raises:
        DataError: no profile, profiles of different models, or examples of a data set without a profile.
    """
    if not profiles:
        raise DataError("there is no profile to study: give at least one data set")
    (one, first), *_ = profiles.items()
    for name, profile in profiles.items():
        _check_same_model(one, first, name, profile)
    examples = examples or {}
    if unknown := sorted(set(examples) - set(profiles)):
        raise DataError(f"there are examples of {', '.join(unknown)}, but profiles of {', '.join(profiles)}")
    kept = experts_kept(first.num_experts, FRACTION, None)
    datasets = {name: _metrics(profile, shared, kept) for name, profile in profiles.items()}
    for name, counts in examples.items():
        datasets[name]["stability"] = stability(counts, kept, seed=seed)
    return {
        "format": FORMAT, "version": VERSION,
        "settings": {
            "fraction": FRACTION, "experts_per_layer": kept, "covered": COVERED, "subsample": SUBSAMPLE,
            "draws": DRAWS, "seed": seed,
        },
        "model": {
            "name": first.source.get("model"), "fingerprint": first.source.get("fingerprint"),
            "layers": list(first.layers), "num_experts": first.num_experts,
            "num_experts_per_tok": first.num_experts_per_tok, "shared": shared,
        },
        "datasets": datasets, "mean": _means(datasets), "overlap": _overlaps(profiles, kept),
    }  # fmt: skip


def load_study(path: Any) -> Study:
    """A study from its JSON file. FileError where it is missing, cut short, or another kind of file."""
    found = read_json(path)
    if found.get("format") != FORMAT or found.get("version") != VERSION:
        raise FileError(
            f"{path} is no study of version {VERSION} (format {found.get('format')!r}, version "
            f"{found.get('version')!r}): make it with `hotlora profile --compare`"
        )
    return found


def overlap(
    a: RoutingProfile, b: RoutingProfile, *, fraction: float | None = None, experts_per_layer: int | None = None
) -> Tensor:
    """float64 [L]: Jaccard of two profiles' hot experts, by count, in each layer (HELLoRA figure 3).

    Such as of a warmed-up model and its base, or of a slice of the data and all of it. The budget is that of
    `select_experts`, 25% unless given. PlanError: another model's profile, or a budget out of range.
    """
    if a.layers != b.layers or a.num_experts != b.num_experts:
        raise PlanError(
            f"the profiles have {len(a.layers)} layers of {a.num_experts} experts and {len(b.layers)} of "
            f"{b.num_experts}: compare two profiles of one model"
        )
    if fraction is None and experts_per_layer is None:
        fraction = FRACTION
    kept = experts_kept(a.num_experts, fraction, experts_per_layer)
    return hot_overlap(hot_mask(a.counts, kept), hot_mask(b.counts, kept))


def experts_for(profile: RoutingProfile, covered: float = COVERED) -> Tensor:
    """float64 [L]: the fewest experts that take the share `covered` of a layer's assignments (MoE-Sieve s3.2)."""
    counts = profile.counts.double()
    totals = counts.sum(dim=1, keepdim=True)
    sums = counts.sort(dim=1, descending=True).values.cumsum(dim=1)
    needed = (sums < covered * totals * (1 - 1e-12)).sum(dim=1).double() + 1  # 1e-12: 0.07 x 100 is a little above 7
    return torch.where(totals[:, 0] > 0, needed, torch.nan)


def shuffled_cv(counts: Tensor, *, shuffles: int = SHUFFLES, seed: int = 0) -> dict[str, float]:
    """The global CV of counts [L, E] whose experts are numbered at random in each layer, and the real one among those.

    An expert's number means nothing across layers. Where layers have nothing to do with each other, the global CV is
    what shuffling gives, and the ratio of layer CV to it is near the root of L whatever the router does. A loss that
    balances an expert's sum over layers brings it below. nan without any skew.

    Returns:
        "global_cv": root of its mean square over all shuffles, exactly; "ratio": mean layer CV over that; "below":
        share of `shuffles` random ones whose global CV is below the real one (0.5 where it is one like them).
    """
    values = counts.double().numpy()
    spread, total = math.sqrt(values.var(axis=1).sum()), values.mean(axis=1).sum()
    if not spread:
        return dict.fromkeys(("global_cv", "ratio", "below"), math.nan)
    expected = spread / total
    rows = values[values.sum(axis=1) > 0]
    layer_cv = (rows.std(axis=1) / rows.mean(axis=1)).mean()
    random = np.random.default_rng(seed)
    found = np.array([random.permuted(values, axis=1).sum(axis=0).std() for _ in range(shuffles)])
    return {
        "global_cv": expected, "ratio": _ratio(layer_cv, expected),
        "below": float((found < values.sum(axis=0).std()).mean()),
    }  # fmt: skip


def signals(profile: RoutingProfile, kept: int) -> dict[str, Any]:
    """Count against mass: Jaccard of the two hot sets, Spearman's rank correlation of the scores (MoE-Sieve s3.3)."""
    jaccard = hot_overlap(hot_mask(profile.counts, kept), hot_mask(profile.mass, kept))
    if not profile.has_mass:  # an imported profile of counts alone
        jaccard = torch.full_like(jaccard, torch.nan)
    spearman = [_spearman(count, mass) for count, mass in zip(profile.counts, profile.mass, strict=True)]
    return {
        "jaccard": jaccard.mean().item(),
        "spearman": _mean(spearman),
        "by_layer": {"jaccard": jaccard.tolist(), "spearman": spearman},
    }


def stability(
    examples_XLE: Tensor, kept: int, *, share: float = SUBSAMPLE, draws: int = DRAWS, seed: int = 0
) -> dict[str, Any]:
    """How well subsamples of the examples find the hot experts of all examples (MoE-Sieve s3.3, appendix A.3).

    Each draw takes the share of the examples, without replacement, adds up their counts, and compares the hot sets:
    Jaccard, mean over layers. No pass through the model is made. Where there are no more than `draws` subsamples, as
    of a few parts in the place of examples, each is taken once.

    Args:
        examples_XLE: int [X, L, E], each example's counts.
    """
    num_examples = len(examples_XLE)
    if num_examples < 2:
        raise DataError(f"{num_examples} examples have no subsample: give at least 2")
    size = max(1, round(share * num_examples))
    whole = hot_mask(examples_XLE.sum(dim=0), kept)
    random = np.random.default_rng(seed)
    if num_examples <= draws and math.comb(num_examples, size) <= draws:
        subsamples = np.array(list(combinations(range(num_examples), size)))
    else:
        subsamples = np.array([np.sort(random.choice(num_examples, size, replace=False)) for _ in range(draws)])
    found = []
    for picked in torch.from_numpy(subsamples):
        found.append(hot_overlap(hot_mask(examples_XLE[picked].sum(dim=0), kept), whole))
    jaccard_DL = torch.stack(found)
    by_draw = jaccard_DL.mean(dim=1)
    return {
        "examples": num_examples, "subsample": size, "draws": len(found), "mean": by_draw.mean().item(),
        "min": by_draw.min().item(), "max": by_draw.max().item(), "by_layer": jaccard_DL.mean(dim=0).tolist(),
    }  # fmt: skip


def thirds(num_layers: int) -> dict[str, list[int]]:
    """The rows of the early, middle and late third of the layers; the earlier ones are the larger."""
    parts = np.array_split(np.arange(num_layers), len(THIRDS))
    return {name: part.tolist() for name, part in zip(THIRDS, parts, strict=True) if len(part)}


def _metrics(profile: RoutingProfile, shared: float, kept: int) -> dict[str, Any]:
    table = {
        "cv": profile.layer_cv(), "cold_share": profile.cold_share(), "coverage": profile.coverage(fraction=FRACTION),
        "entropy": profile.entropy(), "experts_for_60": experts_for(profile),
    }  # fmt: skip
    means = {name: _mean(values.tolist()) for name, values in table.items()}
    top_k, global_cv = profile.num_experts_per_tok, profile.global_cv()
    return {
        "tokens": profile.num_tokens,
        **{name: profile.source.get(name) for name in ("examples", "data", "data_hash")},
        "profile_hash": profile.hash,
        "global_cv": global_cv,
        "layer_cv": means["cv"],
        "ratio": _ratio(means.pop("cv"), global_cv),
        "shuffled": shuffled_cv(profile.counts),
        "coverage_with_shared": (shared + top_k * means["coverage"]) / (shared + top_k),
        **means,
        "by_layer": {name: values.tolist() for name, values in table.items()},
        "by_depth": {
            third: {name: _mean(values[rows].tolist()) for name, values in table.items()}
            for third, rows in thirds(len(profile.layers)).items()
        },
        "signals": signals(profile, kept),
    }


def _means(datasets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the data sets, as in the paper's table 2."""
    names = ("global_cv", "layer_cv", "cold_share", "coverage", "coverage_with_shared", "entropy", "experts_for_60")
    rows = list(datasets.values())
    means: dict[str, Any] = {name: _mean([row[name] for row in rows]) for name in names}
    means["ratio"] = _ratio(means["layer_cv"], means["global_cv"])
    means["shuffled_ratio"] = _mean([row["shuffled"]["ratio"] for row in rows])
    for name in ("jaccard", "spearman"):
        means[f"signals_{name}"] = _mean([row["signals"][name] for row in rows])
    if stable := [row["stability"]["mean"] for row in rows if "stability" in row]:
        means["stability"] = _mean(stable)
    return means


def _overlaps(profiles: Mapping[str, RoutingProfile], kept: int) -> dict[str, Any]:
    """Jaccard of every two data sets' hot experts, and the data sets clustered by 1 - Jaccard (average linkage)."""
    masks = [hot_mask(profile.counts, kept) for profile in profiles.values()]
    by_layer = [[hot_overlap(a, b) for b in masks] for a in masks]
    jaccard_CC = np.array([[layers.mean().item() for layers in row] for row in by_layer])
    order, tree = [0], []
    if len(masks) > 1:
        joined = linkage(squareform(1 - jaccard_CC, checks=False), method="average", optimal_ordering=True)
        order, tree = leaves_list(joined).tolist(), joined.tolist()
    layers = [[layers.tolist() for layers in row] for row in by_layer]
    return {
        "names": list(profiles), "jaccard": jaccard_CC.tolist(), "by_layer": layers, "order": order, "linkage": tree
    }  # fmt: skip


def clusters(overlaps: Mapping[str, Any]) -> list[set[str]]:
    """The data sets of every branch of the clustering, from the first that was joined to all."""
    names: Sequence[str] = overlaps["names"]
    branches = [{name} for name in names]
    for left, right, *_ in overlaps["linkage"]:
        branches.append(branches[int(left)] | branches[int(right)])
    return branches[len(names) :]


def _spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation, ties at their mean rank; nan where one of the two is constant."""
    x, y = (rankdata(values.numpy()) for values in (a, b))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def _mean(values: Sequence[float]) -> float:
    """Over those that are numbers: a layer without a single count has no metrics."""
    numbers = [value for value in values if not math.isnan(value)]
    return sum(numbers) / len(numbers) if numbers else math.nan


def _ratio(layer_cv: float, global_cv: float) -> float:
    return layer_cv / global_cv if global_cv else math.nan


def _check_same_model(name: str, profile: RoutingProfile, other: str, another: RoutingProfile) -> None:
    marks = [(p.layers, p.num_experts, p.num_experts_per_tok, p.source.get("fingerprint")) for p in (profile, another)]
    if marks[0] != marks[1]:
        shapes = [f"{len(m[0])} layers of {m[1]} experts, {m[2]} a token ({m[3]})" for m in marks]
        raise DataError(f"{name} was profiled on {shapes[0]}, {other} on {shapes[1]}: compare profiles of one model")
