"""From an engine's log-probabilities and ours to what the engine applies, expert by expert.

The engine's change (with the adapter less without) is held against our own model's. What is left is rounding, or the
effect of parts that the engine leaves out: these are found one after another, by which of them explains most of it.

Shape suffixes: P texts, S tokens of a text, C tokens asked for, N parts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .expected import Effects
from .texts import Part

_SURE = 1 / 8
"""The standard error of a share at which a part can be told: none and half of its update are four of them apart."""
_OFF = 1 / 4
"""A share that is this far from 1, and by four standard errors, is not that of a part that is applied."""
_ERRORS = 4
_EXACT = 1 / 100
"""A standard error below which one position is enough to tell a part. Above it the strongest position of each does not
count: near-ties of a router fall otherwise in another precision, and one such route would decide."""
_BASE_AGREES = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}
"""Mean differences of the base's log-probabilities, by what the engine computes in."""
_BASE_AGREES_QUANTIZED = 0.5
_ROUNDING = 4
"""The engine's change may differ from ours by so many times what its base differs by,"""
_LEAST = 1e-4
"""or by this many nats where an engine rounds more than float32;"""
_LEAST_EXACT, _OF_EFFECT = 5e-6, 2e-5
"""in float32 by so many, and this share of what the adapter changes: merged weights round by themselves, and the base
may not differ at all."""
_EXACT_BASE = 3e-5
"""A base that differs by more (root mean square) is not computed in float32 throughout, whatever the engine says."""
_USUAL = 2
"""Where an engine rounds more than float32, positions count less that are off by more than so many times the median."""
_FOUND = 64
"""parts that are looked for at most"""

APPLIED, PARTLY, MISSING, UNTOLD, UNREACHED = "applied", "in part", "missing", "cannot be told", "not reached"
_EVERYTHING = "everything"

Name = Part | int | str
"""An expert (layer, id); all experts of a layer; a kind; everything."""


@dataclass(frozen=True)
class PartVerdict:
    """One expert, all experts of a layer, or all updates of a kind."""

    part: Name
    status: str
    """applied, in part, missing, cannot be told, not reached"""
    share: float | None = None
    """Of its update that the engine applies: 1 is all, 0 none. None where no text reaches it."""
    error: float | None = None
    """The share's standard error."""


@dataclass(frozen=True)
class Verdict:
    """What an engine makes of an exported adapter."""

    applied: str
    """yes, partly, no, cannot be told; or base differs, where nothing can be said of the adapter"""
    parts: list[PartVerdict]
    """The experts, then the layers' experts together, then the other kinds."""
    share: float
    """Of the adapter's whole effect that the engine shows."""
    scale: float | None
    """Where no missing parts explain the difference, and another scale of the whole adapter does: that scale."""
    base_mean: float
    """Mean absolute difference of the base's log-probabilities, in nats."""
    base_max: float
    effect: float
    """Root mean square of what the adapter changes in our own model, in nats."""
    difference: float
    """Root mean square of the difference between the engine's change and ours, in nats."""
    unexplained: float
    """The same, without what the parts that are found missing explain."""
    compared: int
    """Numbers compared."""


def judge(
    base: Tensor, whole: Tensor, engine_base: Tensor, engine_whole: Tensor, effects: Effects, *, dtype: str
) -> Verdict:
    """All tensors float64 `[P, S - 1, C]`; not a number where the engine gave none."""
    valid = (engine_base + engine_whole).isfinite()
    off_base, effect, rest = (
        torch.where(valid, difference, 0.0)
        for difference in (engine_base - base, whole - base, (engine_whole - engine_base) - (whole - base))
    )
    count = max(int(valid.sum()), 1)

    def rms(values: Tensor) -> float:
        return float(values.square().sum() / count) ** 0.5

    is_exact = dtype == "float32" and rms(off_base) <= _EXACT_BASE
    names, changes_NPSC = _dense(effects, effect, valid)
    changes = changes_NPSC.flatten(1)
    gone = _explained(changes, rest, is_exact)
    left = rest - (gone @ changes).view_as(rest)
    more, errors = _alone(changes, left, is_exact)
    more = torch.where(gone == 0, more, 0.0)
    share_of = {name: (float(gone[n]), float(more[n]), float(errors[n])) for n, name in enumerate(names)}

    def verdict(name: Name, *above: Name) -> PartVerdict:
        if name not in share_of:
            return PartVerdict(name, UNREACHED)
        own, more, error = share_of[name]
        with_it = sum(share_of[group][0] for group in above if group in share_of)
        if with_it > 1 - _OFF:
            error = min(share_of[g][2] for g in above if g in share_of)
            if not own:
                return PartVerdict(name, MISSING, 1 - with_it, error)
            return _verdict(name, 1 - with_it - own, error, is_found=True)
        return _verdict(name, 1 - with_it - own - more, error, is_found=own != 0)

    parts = [verdict(part, part[0], "experts", _EVERYTHING) for part in effects.experts]
    parts += [verdict(layer, "experts", _EVERYTHING) for layer in effects.groups if isinstance(layer, int)]
    parts += [verdict(kind, _EVERYTHING) for kind in effects.groups if isinstance(kind, str) and kind != "experts"]
    base_mean = float(off_base.abs().sum() / count)
    size = max(float(effect.square().sum()), 1e-30)
    share = float(((effect + rest) * effect).sum()) / size
    least = _LEAST_EXACT + _OF_EFFECT * rms(effect) if is_exact else _LEAST
    is_rounding = _typical(left, is_exact) <= max(_ROUNDING * _typical(off_base, is_exact), least)
    scale = None
    if not is_rounding:
        curve = {
            0.0: -effect,
            1.0: torch.zeros_like(effect),
            **{g: torch.where(valid, its, 0.0) for g, its in effects.scaled.items()},
        }
        best, off_curve = _nearest_scale(rest, curve)
        if rms(off_curve) < rms(left) / 2:
            scale, left = best, off_curve
            parts = [
                p if p.status == UNREACHED else PartVerdict(p.part, MISSING if best < _OFF else PARTLY, best)
                for p in parts
            ]
    if not valid.any() or base_mean > _BASE_AGREES.get(dtype, _BASE_AGREES_QUANTIZED):
        applied = "base differs"
    elif share_of[_EVERYTHING][0] > 1 - _OFF:
        applied = "no"
    elif gone.any() or not is_rounding:
        applied = "partly"
    else:
        applied = "yes" if share_of[_EVERYTHING][2] <= _SURE else "cannot be told"
    return Verdict(
        applied, parts, share, scale, base_mean, float(off_base.abs().max()), rms(effect), rms(rest), rms(left), count
    )


def _dense(effects: Effects, effect: Tensor, valid: Tensor) -> tuple[list[Name], Tensor]:
    """The parts that can be left out, and `[N, P, S - 1, C]`, what that does; zeros where the engine gave no number."""
    found: dict[Name, Tensor] = {}
    for part, texts in effects.experts.items():
        if texts:
            found[part] = torch.zeros_like(effect)
            for text, change in texts.items():
                found[part][text] = change
    found |= dict[Name, Tensor](effects.groups.items())
    found[_EVERYTHING] = -effect
    return list(found), torch.where(valid, torch.stack(list(found.values())), 0.0)


def _at_positions(values: Tensor) -> Tensor:
    """Root mean squares over a position's tokens: `[..., C]` to `[...]`."""
    return values.square().mean(-1).sqrt()


def _typical(values_PSC: Tensor, is_exact: bool) -> float:
    """The root mean square; where an engine rounds more the median position's, for some are off by an expert."""
    return float(values_PSC.square().mean().sqrt() if is_exact else _at_positions(values_PSC).median())


def _weights(left_PSC: Tensor, is_exact: bool) -> Tensor:
    """`[P, S - 1, 1]`: where an engine rounds more, positions count less in which more is left than in most."""
    at_positions = _at_positions(left_PSC)
    if is_exact:
        return torch.ones_like(at_positions)[..., None]
    return (_USUAL * at_positions.median() / at_positions.clamp(min=1e-30)).clamp(max=1)[..., None]


def _alone(changes: Tensor, left_PSC: Tensor, is_exact: bool) -> tuple[Tensor, Tensor]:
    """How much of each part is gone, if it alone made what is left, and its standard error: `[N]` each.

    changes: `[N, M]`
    """
    weights = _weights(left_PSC, is_exact)
    left = left_PSC * weights
    weighted_NTC = changes.view(-1, *left.shape).mul(weights).flatten(1, 2)
    at_positions = weighted_NTC.square().sum(-1)
    size = at_positions.sum(1).clamp(min=1e-30)
    gone = (weighted_NTC.flatten(1) @ left.flatten()) / size
    noise = ((left.square().sum() - gone.square() * size).clamp(min=0) / left.numel()).sqrt().clamp(min=1e-9)
    # What an engine rounds at a position may change all of its tokens together.
    together = left.shape[-1]
    errors = noise * (together / size).sqrt()
    weak = (size - at_positions.max(1).values).clamp(min=1e-30)
    return gone, torch.where(errors <= _EXACT, errors, noise * (together / weak).sqrt())


def _explained(changes: Tensor, rest_PSC: Tensor, is_exact: bool) -> Tensor:
    """How much of each part is gone `[N]`: orthogonal matching pursuit. 0 of all but the few that are needed.

    changes: `[N, M]`
    """
    gone = torch.zeros(len(changes), dtype=changes.dtype)
    picked: list[int] = []
    left = rest_PSC
    while len(picked) < _FOUND:
        alone, errors = _alone(changes, left, is_exact)
        weights = _weights(left, is_exact).expand_as(left).flatten()
        is_off = alone.abs() > (_ERRORS * errors).clamp(min=_OFF)
        gains = torch.where(is_off, alone.square() * (changes * weights).square().sum(1), 0.0)
        gains[picked] = 0.0
        if not gains.any():
            break
        picked.append(int(gains.argmax()))
        some = changes[picked] * weights
        gone[picked] = torch.linalg.lstsq(some.T, rest_PSC.flatten() * weights).solution
        left = rest_PSC - (gone @ changes).view_as(rest_PSC)
    return gone


def _nearest_scale(rest: Tensor, curve: dict[float, Tensor]) -> tuple[float, Tensor]:
    """The scale of the whole adapter at which our model comes nearest to the engine, and what is left then.

    curve: what some scales change; in between a polynomial runs through them (Lagrange's).
    """
    best, nearest = 1.0, rest
    for step in range(61):
        at = step / 20
        change = torch.zeros_like(rest)
        for g, its in curve.items():
            weight = 1.0
            for other in curve:
                weight *= (at - other) / (g - other) if other != g else 1
            change += weight * its
        if (rest - change).norm() < nearest.norm():
            best, nearest = at, rest - change
    return best, nearest


def _verdict(part: Name, share: float, error: float, is_found: bool) -> PartVerdict:
    """is_found: it is one of those that explain the difference."""
    off = abs(1 - share)
    if error > _SURE and not is_found:
        status = UNTOLD
    elif off <= max(_OFF, _ERRORS * error):
        status = APPLIED
    else:
        status = MISSING if share < _OFF else PARTLY
    return PartVerdict(part, status, share, error)
