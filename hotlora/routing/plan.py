"""Which experts of each layer get an adapter: chosen by a rule, kept in one readable file."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from ..base.errors import FileError, PlanError
from ..base.escape import one_line
from ..base.files import file_in, read_json, write_json
from ..base.options import did_you_mean
from .picture import CHOICE, grid_html
from .profile import SIGNALS, RoutingProfile, check_signal, experts_kept
from .rules import BY_SHARE, READS, RULES
from .scores import Scores, layer_keys, read_scores
from .selection import Selection

VERSION = 1
MOST_RANK = 65536  # more than any matrix is wide
DEFAULT_FRACTION = 0.25  # MoE-Sieve s4
DEFAULT_P = {
    **{("coverage", signal): 0.6 for signal in SIGNALS},  # MoE-Sieve s6.2
    ("cumulative", "count"): 0.2,  # ESFT's token score
    ("cumulative", "mass"): 0.1, ("cumulative", "mass_per_token"): 0.1,  # ESFT's gate score
}  # fmt: skip
_log = logging.getLogger(__name__)


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
    """the rule's parameters, such as experts_per_layer and signal; those that the rule reads"""
    profile_hash: str | None = None
    fingerprint: str | None = None
    """`moe_layers.fingerprint` of the model that the profile was made on"""
    ranks: dict[int, tuple[int, ...]] | None = None
    """optional rank of each expert's adapter, in the order of `experts`; None = the config's `r` for all"""

    def __post_init__(self) -> None:
        if not _is_int(self.num_experts) or self.num_experts < 1:
            raise PlanError(f"num_experts is {self.num_experts!r}: it must be a positive integer")
        for name, kind, told in (
            ("rule", str, "a string, such as 'manual'"), ("params", dict, "an object, such as {}"),
            ("profile_hash", str | None, "a string, or null"), ("fingerprint", str | None, "a string, or null"),
        ):  # fmt: skip
            if not isinstance(value := getattr(self, name), kind):
                raise PlanError(f"{name} is {value!r}: it must be {told}")
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
            experts[layer] = tuple(sorted(ids))
            if self.ranks is not None:
                rank_of = dict(zip(ids, _checked_ranks(layer, self.ranks[layer], len(ids)), strict=True))
                ranks[layer] = tuple(rank_of[expert] for expert in experts[layer])
        object.__setattr__(self, "experts", experts)
        object.__setattr__(self, "ranks", ranks if self.ranks is not None else None)

    def __hash__(self) -> int:
        return int(self.hash[:15], 16)

    @property
    def summary(self) -> str:
        """The rule, and how many experts it chose: hot: 48 of 192 experts in 6 layers, 4 to 12 in each."""
        sizes = [len(ids) for ids in self.experts.values()]
        each = f", {min(sizes)} to {max(sizes)} in each" if len(set(sizes)) > 1 else ""
        ranks = {rank for ranks in (self.ranks or {}).values() for rank in ranks}
        ranked = f", ranks {min(ranks)} to {max(ranks)}" if ranks else ""
        total = self.num_experts * len(sizes)
        return f"{one_line(self.rule)}: {sum(sizes)} of {total} experts in {len(sizes)} layers{each}{ranked}"

    def __repr__(self) -> str:
        return f"ExpertPlan({self.summary})"

    def _repr_html_(self) -> str:
        """The chosen experts of each layer, and their number."""
        levels = [[int(expert in ids) for expert in range(self.num_experts)] for ids in self.experts.values()]
        sides = [str(len(ids)) for ids in self.experts.values()]
        return grid_html(repr(self), [*self.experts], levels, CHOICE, sides, [(1, "chosen"), (0, "left frozen")])

    @property
    def hash(self) -> str:
        """Hex SHA-256 of the plan's content."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """What `plan.json` holds: layers are string keys."""
        return {
            "version": VERSION, "rule": self.rule, "params": dict(self.params), "fingerprint": self.fingerprint,
            "profile_hash": self.profile_hash, "num_experts": self.num_experts,
            "experts": {str(layer): list(ids) for layer, ids in self.experts.items()},
            "ranks": self.ranks and {str(layer): list(ranks) for layer, ranks in self.ranks.items()},
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ExpertPlan":
        """The plan in `to_dict`'s form. PlanError where it is not one."""
        if not _is_this_version(data):
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
        given = {"rule": "manual", "params": {}} | {name: value for name, value in data.items() if name != "version"}
        given["experts"] = layer_keys("experts", data["experts"])
        if data.get("ranks") is not None:
            given["ranks"] = layer_keys("ranks", data["ranks"])
        return cls(**given)

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
            kind = PlanError if _is_this_version(data) else FileError
            raise kind(f"{file}: {error}") from error


def selected(profile: RoutingProfile, selection: Selection, *, seed: int = 0) -> ExpertPlan:
    """`select_experts` with options, whose experts_per_layer may be "top_k": the router's K."""
    options = {field.name: getattr(selection, field.name) for field in fields(Selection)}
    if options["experts_per_layer"] == "top_k":
        options["experts_per_layer"] = profile.num_experts_per_tok
    elif isinstance(number := options["experts_per_layer"], str):
        raise PlanError(f"experts_per_layer = {number!r}: give a number, or top_k for the router's own.")
    return select_experts(profile, **options, seed=seed)


def check_rule(rule: str, signal: str, budgets: Mapping[str, Any]) -> None:
    """PlanError: a rule or signal that does not exist, or a budget that the rule does not read, that is one of two, or
    that is out of range whatever the model.

    budgets: those of `select_experts`, by name; None is not given.
    """
    if rule not in RULES:
        raise PlanError(f"rule {rule!r} does not exist{did_you_mean(rule, RULES)}: choose one of {', '.join(RULES)}")
    check_signal(signal)
    reads = READS[rule]
    if unread := [name for name, value in budgets.items() if value is not None and name not in reads]:
        read = ", ".join(name for name in budgets if name in reads)
        raise PlanError(
            f"rule {rule!r} does not read {', '.join(unread)}: leave it out; it reads {read or 'no budget'}"
        )
    numbers = [name for name in ("budget", "fraction", "experts_per_layer") if budgets.get(name) is not None]
    if len(numbers) > 1:
        raise PlanError(f"give exactly one of {' and '.join(numbers)}")
    if rule == "all" and (share := budgets.get("fraction")) is not None and 0 < share < 1:
        raise PlanError(
            f"rule 'all' keeps all experts, but fraction {share} asks for some: leave it out, or choose another rule"
        )
    for name, example in (("fraction", DEFAULT_FRACTION), ("p", 0.6)):
        if (share := budgets.get(name)) is not None and not 0 < share <= 1:
            raise PlanError(f"{name} is {share}: it must be above 0 and at most 1, such as {example}")


def select_experts(
    profile: RoutingProfile,
    *,
    rule: str = "hot",
    fraction: float | None = None,
    experts_per_layer: int | None = None,
    p: float | None = None,
    budget: int | None = None,
    signal: str = "count",
    seed: int = 0,
    fillers: int | None = None,
    scores: Scores | None = None,
) -> ExpertPlan:
    """Chooses the experts to adapt (MoE-Sieve s4, step 2; HELLoRA s3); `rules` has a function for each rule.

    rule: "hot", "all", "random", "cold", "global", "greedy", "coverage", "cumulative", "hot+random", "scores", "auto".
    fraction: share of each layer's E experts, rounded, at least one; 0.25 when no budget is given.
    experts_per_layer: the number itself, in place of `fraction`.
    p: share of a layer's assignments or gate weights that "coverage" (0.6) and "cumulative" by count (0.2) reach; for
        "cumulative" by mass (0.1) the sum of the chosen experts' mean gate weights a token, ESFT's gate score.
    budget: experts over all layers, for "greedy", in place of the two.
    signal: what ranks: "count" (assignments), "mass" (summed gate weights), "mass_per_token" (the same a token: ESFT's
        gate score) or "saliency" (gate weight x output norm, mean over an expert's tokens: REAP's), which a profile
        holds where it was gathered. seed: of what a rule draws.
    fillers: how many of "hot+random" are random; half, rounded down, when not given.
    scores: for the rule "scores": a file, a dict from layer to E numbers, or a tensor [L, E].

    PlanError: a rule or signal that does not exist, a budget that the rule does not read, two at once or one out of
    range, or, by a rule that compares shares, a layer without assignments. And as `scores.read_scores`.
    """
    budgets = {
        "fraction": fraction, "experts_per_layer": experts_per_layer, "p": p, "budget": budget, "fillers": fillers,
        "scores": scores,
    }  # fmt: skip
    check_rule(rule, signal, budgets)
    reads = READS[rule]
    fingerprint = profile.source.get("fingerprint")
    num_layers, num_experts = profile.counts.shape
    table = profile.signal(signal if "signal" in reads else "count")
    if rule == "cumulative" and signal == "saliency":
        raise PlanError(
            "rule 'cumulative' adds up ESFT's scores, by count, mass or mass_per_token: for saliency choose coverage"
        )
    params: dict[str, Any] = {}
    if "p" in reads:
        params["p"] = float(DEFAULT_P[rule, signal] if p is None else p)
    elif "fraction" in reads:
        params |= _budget(rule, (num_layers, num_experts), fraction, experts_per_layer, budget)
    if "fillers" in reads:
        kept = params["experts_per_layer"]
        params["fillers"] = kept // 2 if fillers is None else fillers
        if not _is_int(params["fillers"]) or not 0 <= params["fillers"] <= kept:
            raise PlanError(f"fillers is {fillers!r}: it must be an integer from 0 to the {kept} experts of a layer")
    if "signal" in reads:
        params["signal"] = signal
    if "seed" in reads:
        if not -(2**63) <= seed < 2**63:
            raise PlanError(f"seed is {seed}: it must be an integer of 64 bits")
        params["seed"] = seed
    if "scores" in reads:
        if scores is None:
            raise PlanError(f"rule {rule!r} needs scores: give a file, a dict from layer to scores, or a tensor")
        table, params["scores_hash"] = read_scores(scores, profile.layers, num_experts, fingerprint)
    if rule in BY_SHARE:
        _check_shares(rule, profile.layers, table)
    if rule == "cumulative" and signal != "count":
        table = profile.signal("mass_per_token")
        _tell_unreached(profile.layers, table, params["p"])
    chosen = RULES[rule](table, params)
    experts = {layer: tuple(sorted(ids)) for layer, ids in zip(profile.layers, chosen, strict=True)}
    return ExpertPlan(experts, num_experts, rule, params, profile.hash, fingerprint)


def _budget(
    rule: str, shape: tuple[int, int], fraction: float | None, experts_per_layer: int | None, budget: int | None
) -> dict[str, Any]:
    """The budget as it was given, and as the rule reads it: experts of each layer, or of all. shape: (L, E)"""
    num_layers, num_experts = shape
    if budget is not None:
        if not _is_int(budget) or not 1 <= budget <= num_layers * num_experts:
            raise PlanError(
                f"budget is {budget!r}: it must be an integer from 1 to {num_layers * num_experts}, "
                f"which is all {num_experts} experts of {num_layers} layers"
            )
        return {"budget": budget}
    if fraction is None and experts_per_layer is None:
        fraction = 1.0 if rule == "all" else DEFAULT_FRACTION
    kept = experts_kept(num_experts, fraction, experts_per_layer)
    if rule == "all":
        if kept != num_experts:
            raise PlanError(
                f"rule 'all' keeps all {num_experts} experts, but the budget asks for {kept}: "
                "leave the budget out, or choose another rule"
            )
        return {}
    params: dict[str, Any] = {"fraction": fraction} if fraction is not None else {}
    params["experts_per_layer"] = kept
    return params | ({"budget": kept * num_layers} if rule == "greedy" else {})


def _is_this_version(data: dict[str, Any]) -> bool:
    return _is_int(data.get("version")) and data["version"] == VERSION


def _check_shares(rule: str, layers: Sequence[int], table: Tensor) -> None:
    for layer, total in zip(layers, table.sum(dim=1).tolist(), strict=True):
        if not total > 0:
            raise PlanError(
                f"layer {layer} has no assignments in the profile, and rule {rule!r} compares shares of them: "
                "profile more data, or choose a rule that only ranks, such as hot"
            )


def _tell_unreached(layers: Sequence[int], gate_scores: Tensor, p: float) -> None:
    sums = zip(layers, gate_scores.sum(dim=1).tolist(), strict=True)
    if short := [f"layer {layer}: {total:.3g}" for layer, total in sums if total < p * (1 - 1e-6)]:
        _log.warning(
            "p = %s is more than a token's gate weights add up to (%s), so all experts are chosen there; ESFT's own "
            "p is 0.1.", p, ", ".join(short),
        )  # fmt: skip


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
    if not isinstance(ranks, list | tuple) or not all(_is_int(rank) and 0 < rank <= MOST_RANK for rank in ranks):
        raise PlanError(
            f"layer {layer}: ranks are {str(ranks)[:200]}; they must be a list of positive integers up to {MOST_RANK}"
        )
    if len(ranks) != expected:
        raise PlanError(f"layer {layer}: {len(ranks)} ranks for {expected} experts; give one rank per expert")
    return list(ranks)
