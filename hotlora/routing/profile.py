"""Watches a model's router on data, and reads the result: which experts are hot, and how hot.

Shape suffixes: L MoE layers, E experts, K router's top-k, T tokens (batch x sequence, padding included).
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..base.errors import DataError, FileError, PlanError
from ..base.escape import one_line
from ..base.files import file_in
from ..base.tensor_files import load_tensors, save_tensors
from .picture import LOADS, grid_html

FORMAT = "hotlora.profile"
VERSION = "1"
SIGNALS = ("count", "mass", "mass_per_token", "saliency")
"""what may rank experts: `RoutingProfile.signal`"""
TOP = 4.0
"""Loads of more than so many uniform shares have one colour: one outlier must not flatten all others."""


@dataclass(frozen=True, eq=False)
class RoutingProfile:
    """How often, and how strongly, each expert of each layer was used on data (MoE-Sieve s3, HELLoRA s3).

    The metrics below read `counts`. A layer without a single count has no distribution: its metrics are nan.
    """

    layers: tuple[int, ...]
    """decoder indices of the L MoE layers, ascending"""
    counts: Tensor
    """int64 [L, E]: tokens that the router sent to each expert; a row sums to num_tokens x K, less those that a
    router with a choice to skip (zaya) sent to none, and times the runs of a layer that a model loops over
    (inkling2_loop)"""
    mass: Tensor
    """float64 [L, E]: sum of the gate weights as applied, over those tokens; all 0 where they are not known"""
    num_tokens: int
    """tokens seen, without padding"""
    num_experts_per_tok: int
    """K"""
    source: dict[str, Any] = field(default_factory=dict)
    """where the profile came from: the model's "fingerprint", "model", "data", ..."""
    saliency: Tensor | None = None
    """float64 [L, E]: sum over those tokens of gate weight x L2 norm of the expert's output; None where it was not
    gathered. Over the count it is REAP's saliency (arXiv 2510.13999), a mean"""

    def __post_init__(self) -> None:
        layers = tuple(self.layers)
        if self.counts.is_floating_point() or self.counts.dtype == torch.bool:
            raise DataError(f"counts are {self.counts.dtype}: they must be integers")
        shape = self.counts.shape
        if len(shape) != 2 or shape[0] != len(layers) or 0 in shape or self.mass.shape != shape:
            raise DataError(
                f"counts are {list(shape)}, mass is {list(self.mass.shape)}: both must be "
                f"[{len(layers)} layers, experts]"
            )
        is_index = all(isinstance(layer, int) and layer >= 0 for layer in layers)
        if not is_index or list(layers) != sorted(set(layers)):
            raise DataError(f"layers are {layers}: they must be ascending decoder indices")
        for name, least in (("num_tokens", 0), ("num_experts_per_tok", 1)):
            number = getattr(self, name)
            if not isinstance(number, int) or not least <= number < 2**63:
                raise DataError(f"{name} is {str(number)[:40]!r}: it must be an integer of {least} or more")
        if self.saliency is not None and self.saliency.shape != shape:
            raise DataError(f"saliency is {list(self.saliency.shape)}: it must be {list(shape)}, as counts are")
        self._check_numbers(layers)
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "counts", self.counts.to("cpu", torch.int64))
        object.__setattr__(self, "mass", self.mass.to("cpu", torch.float64))
        if self.saliency is not None:
            object.__setattr__(self, "saliency", self.saliency.to("cpu", torch.float64))

    def _check_numbers(self, layers: tuple[int, ...]) -> None:
        for layer, counts, mass in zip(layers, self.counts.to("cpu"), self.mass.to("cpu"), strict=True):
            if (least := int(counts.min())) < 0:
                raise DataError(f"counts: layer {layer} has {least}: a count is 0 or more")
            if counts.double().sum() >= 2**63:
                raise DataError(f"counts: layer {layer} adds up to more than 2^63")
            if not mass.isfinite().all():
                raise DataError(f"mass: layer {layer} has {mass[~mass.isfinite()][0]:g}: it must be finite")
        for layer, sums in zip(layers, () if self.saliency is None else self.saliency.to("cpu"), strict=False):
            if (wrong := sums[~(sums.isfinite() & (sums >= 0))]).numel():
                raise DataError(f"saliency: layer {layer} has {wrong[0]:g}: it must be finite, and 0 or more")

    @property
    def num_experts(self) -> int:
        """E"""
        return self.counts.shape[1]

    @property
    def has_mass(self) -> bool:
        """Whether gate weights are known: an imported profile may have counts alone, and then `mass` is 0."""
        return bool(self.mass.any()) or not self.counts.any()

    @property
    def hash(self) -> str:
        """Hex SHA-256 of the layers and numbers; `source` does not enter."""
        head = [list(self.layers), list(self.counts.shape), self.num_tokens, self.num_experts_per_tok]
        digest = hashlib.sha256(json.dumps(head).encode())
        for tensor in (self.counts, self.mass, *(() if self.saliency is None else (self.saliency,))):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def signal(self, name: str) -> Tensor:
        """[L, E], higher is hotter: the number that ranks experts, by its name.

        count: assignments. mass: summed gate weights. mass_per_token: mass over all tokens, ESFT's average gate score
        (arXiv 2407.01906 s3.2). saliency: gate weight x output norm, mean over the expert's tokens (REAP); 0 where it
        has none.

        PlanError: no such signal, or one that the profile does not hold.
        """
        check_signal(name)
        if name == "count":
            return self.counts
        if name.startswith("mass") and not self.has_mass:
            raise PlanError(
                f"the profile holds no gate weights, so there is no signal {name} (it was imported from "
                f"{self.source.get('imported', 'elsewhere')}): choose signal count, or profile the model"
            )
        if name == "mass":
            return self.mass
        if name == "mass_per_token":
            if self.num_tokens < 1:
                raise PlanError(
                    f"the profile says num_tokens = {self.num_tokens}, and mass_per_token (and rule 'cumulative' by "
                    "mass) needs weights a token: profile again, or choose signal count"
                )
            return self.mass / self.num_tokens
        if self.saliency is None:
            raise PlanError(
                "the profile holds no saliency: make it again with `hotlora profile --saliency`, or choose signal "
                "count or mass"
            )
        return self.saliency / self.counts.clamp(min=1)

    def shares(self) -> Tensor:
        """float64 [L, E]: each expert's share of its layer's assignments."""
        return self.counts.double() / self.counts.sum(dim=1, keepdim=True)

    def layer_cv(self) -> Tensor:
        """float64 [L]: CV (std / mean, ddof 0) of each layer's counts (MoE-Sieve s3.1)."""
        return _cv(self.counts)

    def mean_layer_cv(self) -> float:
        """Mean of `layer_cv`: the imbalance inside a layer (MoE-Sieve table 2)."""
        return self.layer_cv().mean().item()

    def global_cv(self) -> float:
        """CV of the counts summed over layers by expert index: what load balancing evens (MoE-Sieve s3.1)."""
        return _cv(self.counts.sum(dim=0, keepdim=True)).item()

    def cold_share(self) -> Tensor:
        """float64 [L]: share of a layer's experts below half of the uniform share (MoE-Sieve s3.2)."""
        totals = self.counts.sum(dim=1, keepdim=True)
        cold = (2 * self.num_experts * self.counts < totals).double().mean(dim=1)
        return torch.where(totals[:, 0] > 0, cold, torch.nan)

    def coverage(self, *, fraction: float | None = None, experts_per_layer: int | None = None) -> Tensor:
        """float64 [L]: share of assignments that go to a layer's busiest experts (MoE-Sieve s3.2, Cov@25%).

        Give one budget, as for `select_experts`. PlanError where it is out of range.
        """
        kept = experts_kept(self.num_experts, fraction, experts_per_layer)
        return self.shares().sort(dim=1, descending=True).values[:, :kept].sum(dim=1)

    def entropy(self) -> Tensor:
        """float64 [L]: entropy of a layer's shares over ln E; 1 = uniform (MoE-Sieve appendix A.1)."""
        return torch.special.entr(self.shares()).sum(dim=1) / math.log(self.num_experts)

    def __repr__(self) -> str:
        told = f"{len(self.layers)} layers × {self.num_experts} experts, top-{self.num_experts_per_tok}"
        told += f", {self.num_tokens:,} tokens, mean layer CV {self.mean_layer_cv():.2f}"
        made = [f"{name} {self.source[name]}" for name in ("model", "data") if self.source.get(name)]
        return f"RoutingProfile({'; '.join([told, *(one_line(text)[:80] for text in made)])})"

    def _repr_html_(self) -> str:
        """Each expert's load in its layer, as a heat map."""
        multiples = (self.shares() * self.num_experts).nan_to_num()
        levels = (multiples / TOP * (len(LOADS) - 1)).round().clamp(max=len(LOADS) - 1).int().tolist()
        sides = [f"CV {cv:.2f}" for cv in self.layer_cv().tolist()]
        scale = [(round(part * (len(LOADS) - 1)), f"{part * TOP:g}×") for part in (0, 0.25, 0.5)]
        legend = [*scale, (len(LOADS) - 1, f"{TOP:g}× the uniform share, or more")]
        return grid_html(repr(self), self.layers, levels, LOADS, sides, legend)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file; any other path is a folder that gets `profile.safetensors`."""
        names = ("layers", "num_tokens", "num_experts_per_tok", "source")
        meta = {name: getattr(self, name) for name in names}
        tensors = {"counts": self.counts.contiguous(), "mass": self.mass.contiguous()}
        if self.saliency is not None:
            tensors["saliency"] = self.saliency.contiguous()
        save_tensors(file_in(path, "profile.safetensors"), tensors, meta, format=FORMAT, version=VERSION)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "RoutingProfile":
        """Reads what `save` wrote. FileError, naming the file, where it is missing, cut short, altered or foreign."""
        file = file_in(path, "profile.safetensors")
        what, fix = "routing profile", "make it again with `hotlora profile`"
        tensors, meta = load_tensors(file, format=FORMAT, version=VERSION, what=what, fix=fix)
        try:
            return cls(
                tuple(meta["layers"]), tensors["counts"], tensors["mass"], meta["num_tokens"],
                meta["num_experts_per_tok"], dict(meta["source"]), tensors.get("saliency"),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(f"{file} is not a whole {what} ({error}): {fix}") from error


def check_signal(name: str) -> None:
    """PlanError: there is no such signal."""
    if name not in SIGNALS:
        raise PlanError(f"signal {name!r} does not exist: choose one of {', '.join(SIGNALS)}")


def experts_kept(num_experts: int, fraction: float | None, experts_per_layer: int | None) -> int:
    """The number of experts that a budget keeps in each layer: round(fraction x E), at least 1.

    PlanError: none or both given, or out of range.
    """
    if (fraction is None) == (experts_per_layer is None):
        raise PlanError(
            f"fraction is {fraction}, experts_per_layer is {experts_per_layer}: give exactly one of the two"
        )
    if experts_per_layer is not None:
        is_number = not isinstance(experts_per_layer, str) and experts_per_layer == int(experts_per_layer)
        if not is_number or not 1 <= experts_per_layer <= num_experts:
            raise PlanError(
                f"experts_per_layer is {experts_per_layer!r}: it must be an integer from 1 to {num_experts}"
            )
        return int(experts_per_layer)
    assert fraction is not None
    if not 0 < fraction <= 1:
        raise PlanError(f"fraction is {fraction}: it must be above 0 and at most 1, such as 0.25")
    return max(1, round(fraction * num_experts))


def hot_mask(scores: Tensor, kept: int) -> Tensor:
    """Boolean [..., L, E]: the `kept` highest scores of each layer; ties go to the lower index, as in `plan.hot`."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :kept]
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, order, True)


def hot_overlap(a: Tensor, b: Tensor) -> Tensor:
    """float64 [L]: |a and b| / |a or b| of two boolean [L, E]."""
    return (a & b).sum(dim=-1).double() / (a | b).sum(dim=-1).clamp(min=1)


def jaccard(a: Any, b: Any) -> float:
    """Mean over layers of |a ∩ b| / |a ∪ b| of two plans' experts (MoE-Sieve s3.2); 1 = the same experts.

    Takes plans, or dicts from a decoder layer to expert ids. Two empty layers are the same. PlanError where
    the two do not name the same layers.
    """
    ours: Mapping[int, Sequence[int]] = getattr(a, "experts", a)
    theirs: Mapping[int, Sequence[int]] = getattr(b, "experts", b)
    if set(ours) != set(theirs) or not ours:
        raise PlanError(f"the plans name layers {sorted(ours)} and {sorted(theirs)}: compare two plans of one model")
    scores = []
    for layer in ours:
        one, other = set(ours[layer]), set(theirs[layer])
        scores.append(len(one & other) / len(one | other) if one | other else 1.0)
    return sum(scores) / len(scores)


def _cv(counts: Tensor) -> Tensor:
    values = counts.double()
    return values.std(dim=1, correction=0) / values.mean(dim=1)
