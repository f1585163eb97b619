"""Which experts of each layer get an adapter: one function per rule, one readable file."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import FileError, PlanError
from .files import file_in, read_json, write_json
from .routing import RoutingProfile, experts_kept

VERSION = 1
SIGNALS = ("count", "mass")
DEFAULT_FRACTION = 0.25  # MoE-Sieve s4


@dataclass(frozen=True)
class ExpertPlan:
    """The experts that get an adapter, per decoder layer, and how they were chosen.

    Layers and expert ids are put in ascending order (with their ranks). An id out of range, one that is
    given twice, or ranks that do not match the experts raise PlanError.
    """

    experts: dict[int, tuple[int, ...]]
    """decoder layer -> ascending expert ids; an empty tuple leaves that layer's routed experts frozen"""
    num_experts: int
    """routed experts per layer of the model, E"""
    rule: str
    params: dict[str, Any]
    """the rule's parameters: fraction, experts_per_layer, signal, seed; those that the rule reads"""
    profile_hash: str | None = None
    fingerprint: str | None = None
    """`models.fingerprint` of the model that the profile was made on"""
    ranks: dict[int, tuple[int, ...]] | None = None
    """optional rank of each expert's adapter, in the order of `experts`; None = the config's `r` for all"""

    def __post_init__(self) -> None:
        if not _is_int(self.num_experts) or self.num_experts < 1:
            raise PlanError(f"num_experts is {self.num_experts!r}: it must be a positive integer")
        if not self.experts:
            raise PlanError("the plan names no layer: give each MoE layer's decoder index its expert ids")
        if self.ranks is not None and set(self.ranks) != set(self.experts):
            raise PlanError(
                f"ranks are given for layers {sorted(self.ranks)}, experts for {sorted(self.experts)}: "
                "the two must name the same layers"
            )
        experts, ranks = {}, {}
        for layer in sorted(self.experts):
            ids = _checked_ids(layer, self.experts[layer], self.num_experts)
            order = sorted(range(len(ids)), key=ids.__getitem__)
            experts[layer] = tuple(ids[i] for i in order)
            if self.ranks is not None:
                layer_ranks = _checked_ranks(layer, self.ranks[layer], len(ids))
                ranks[layer] = tuple(layer_ranks[i] for i in order)
        object.__setattr__(self, "experts", experts)
        object.__setattr__(self, "ranks", ranks if self.ranks is not None else None)

    def __hash__(self) -> int:
        return int(self.hash[:15], 16)

    @property
    def hash(self) -> str:
        """Hex SHA-256 of the plan's content."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """What `plan.json` holds: layers are string keys."""
        return {
            "version": VERSION,
            "rule": self.rule,
            "params": dict(self.params),
            "fingerprint": self.fingerprint,
            "profile_hash": self.profile_hash,
            "num_experts": self.num_experts,
            "experts": {str(layer): list(ids) for layer, ids in self.experts.items()},
            "ranks": self.ranks and {str(layer): list(ranks) for layer, ranks in self.ranks.items()},
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ExpertPlan":
        """The plan in `to_dict`'s form. PlanError where it is not one."""
        if data.get("version") != VERSION:
            raise PlanError(
                f"plan version {data.get('version')!r}: this hotlora reads version {VERSION}; "
                "make the plan again with `hotlora plan`"
            )
        required = {"num_experts", "experts"}
        allowed = required | {"version", "rule", "params", "fingerprint", "profile_hash", "ranks"}
        if missing := required - set(data):
            raise PlanError(f"the plan lacks {sorted(missing)}: add them, or run `hotlora plan` again")
        if unknown := set(data) - allowed:
            raise PlanError(f"the plan has unknown keys {sorted(unknown)}: allowed are {sorted(allowed)}")
        params = data.get("params") or {}
        if not isinstance(params, dict):
            raise PlanError(f"params is {params!r}: it must be an object")
        ranks = data.get("ranks")
        return cls(
            experts=_int_keys("experts", data["experts"]),
            num_experts=data["num_experts"],
            rule=str(data.get("rule", "manual")),
            params=dict(params),
            profile_hash=data.get("profile_hash"),
            fingerprint=data.get("fingerprint"),
            ranks=None if ranks is None else _int_keys("ranks", ranks),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a JSON file; a path without `.json` is a folder and gets `plan.json`."""
        write_json(file_in(path, "plan.json"), self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ExpertPlan":
        """Reads what `save` wrote or a person edited.

        FileError: no such file, not whole JSON, or another version. PlanError: content that is no plan.
        Both name the file.
        """
        file = file_in(path, "plan.json")
        data = read_json(file)
        try:
            return cls.from_dict(data)
        except PlanError as error:
            kind = PlanError if data.get("version") == VERSION else FileError
            raise kind(f"{file}: {error}") from error


def hot(scores: Tensor, experts_per_layer: int, seed: int) -> list[list[int]]:
    """The experts with the highest score in each layer (MoE-Sieve s4, HELLoRA s3). Ties: the lower id."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :experts_per_layer].tolist()


def cold(scores: Tensor, experts_per_layer: int, seed: int) -> list[list[int]]:
    """The experts with the lowest score in each layer: HELLoRA's ablation. Ties: the lower id."""
    return scores.sort(dim=1, stable=True).indices[:, :experts_per_layer].tolist()


def random(scores: Tensor, experts_per_layer: int, seed: int) -> list[list[int]]:
    """Experts drawn uniformly in each layer (MoE-Sieve s6.1). One seed's smaller draws lie in its larger."""
    generator = torch.Generator().manual_seed(seed)
    num_layers, num_experts = scores.shape
    draws = [torch.randperm(num_experts, generator=generator) for _ in range(num_layers)]
    return [draw[:experts_per_layer].tolist() for draw in draws]


def all_experts(scores: Tensor, experts_per_layer: int, seed: int) -> list[list[int]]:
    """Every expert: vanilla LoRA."""
    return [list(range(scores.shape[1])) for _ in range(scores.shape[0])]


Rule = Callable[[Tensor, int, int], list[list[int]]]
RULES: dict[str, Rule] = {"hot": hot, "all": all_experts, "random": random, "cold": cold}
"""name -> rule(scores [L, E], experts_per_layer, seed) -> expert ids per layer, in any order"""


def select_experts(
    profile: RoutingProfile,
    *,
    rule: str = "hot",
    fraction: float | None = None,
    experts_per_layer: int | None = None,
    signal: str = "count",
    seed: int = 0,
) -> ExpertPlan:
    """Chooses, in each layer by itself, the experts to adapt (MoE-Sieve s4, step 2; HELLoRA s3).

    fraction: share of each layer's E experts, rounded, at least one; 0.25 when no budget is given.
    experts_per_layer: the number itself, in place of `fraction`.
    signal: "count" ranks by assignments, "mass" by summed gate weights. seed: read by "random" only.

    PlanError: a rule or signal that does not exist, both budgets at once, or a budget out of range.
    """
    if rule not in RULES:
        raise PlanError(f"rule {rule!r} does not exist: choose one of {', '.join(RULES)}")
    if signal not in SIGNALS:
        raise PlanError(f"signal {signal!r} does not exist: choose one of {', '.join(SIGNALS)}")
    num_experts = profile.counts.shape[1]
    params: dict[str, Any] = {}
    if fraction is None and experts_per_layer is None:
        fraction = 1.0 if rule == "all" else DEFAULT_FRACTION
    kept = experts_kept(num_experts, fraction, experts_per_layer)
    if rule == "all":
        if kept != num_experts:
            raise PlanError(
                f"rule 'all' keeps all {num_experts} experts, but the budget asks for {kept}: "
                "leave the budget out, or choose another rule"
            )
    else:
        params = {"fraction": fraction} if fraction is not None else {}
        params["experts_per_layer"] = kept
        params |= {"seed": seed} if rule == "random" else {"signal": signal}
    scores = profile.counts if signal == "count" else profile.mass
    chosen = RULES[rule](scores, kept, seed)
    return ExpertPlan(
        experts={layer: tuple(sorted(ids)) for layer, ids in zip(profile.layers, chosen, strict=True)},
        num_experts=num_experts,
        rule=rule,
        params=params,
        profile_hash=profile.hash,
        fingerprint=profile.source.get("fingerprint"),
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _checked_ids(layer: Any, ids: Any, num_experts: int) -> list[int]:
    if not _is_int(layer) or layer < 0:
        raise PlanError(f"layer {layer!r}: a layer is the decoder's index, an integer from 0")
    if not isinstance(ids, list | tuple) or not all(map(_is_int, ids)):
        raise PlanError(f"layer {layer}: experts are {ids!r}; they must be a list of integers")
    for expert in ids:
        if not 0 <= expert < num_experts:
            raise PlanError(f"layer {layer}: expert {expert} does not exist; ids are 0 to {num_experts - 1}")
    if len(set(ids)) != len(ids):
        twice = sorted({expert for expert in ids if ids.count(expert) > 1})
        raise PlanError(f"layer {layer}: experts {twice} are given twice; name each expert once")
    return list(ids)


def _checked_ranks(layer: int, ranks: Any, expected: int) -> list[int]:
    if not isinstance(ranks, list | tuple) or not all(_is_int(rank) and rank > 0 for rank in ranks):
        raise PlanError(f"layer {layer}: ranks are {ranks!r}; they must be a list of positive integers")
    if len(ranks) != expected:
        raise PlanError(f"layer {layer}: {len(ranks)} ranks for {expected} experts; give one rank per expert")
    return list(ranks)


def _int_keys(name: str, data: Any) -> dict[int, Any]:
    if not isinstance(data, dict):
        raise PlanError(f"{name} is {data!r}: it must map each decoder layer to a list")
    for key in data:
        if not (str(key).isdecimal() and str(int(key)) == str(key)):
            raise PlanError(f'{name} has the layer {key!r}: a layer is the decoder\'s index, such as "3"')
    return {int(key): value for key, value in data.items()}
