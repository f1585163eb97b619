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
"""or by this many nats."""
_FOUND = 64
"""parts that are looked for at most"""

APPLIED, PARTLY, MISSING, UNTOLD, UNREACHED = "applied", "in part", "missing", "cannot be told", "not reached"
_EVERYTHING = "everything"

Name = Part | int | str
"""An expert (layer, id); all experts of a layer; a kind; everything."""


@dataclass(frozen=True)
class PartVerdict:
    """One expert, or all updates of a kind."""

    part: Part | str
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
    """The experts, then the other kinds."""
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

    names, changes_NPSC = _dense(effects, effect, valid)
    changes, weak = changes_NPSC.flatten(1), _without_strongest(changes_NPSC)
    gone = _explained(changes, weak, rest.flatten(), effect.shape[-1])
    left = rest.flatten() - gone @ changes
    more = torch.where(gone == 0, changes @ left / _size(changes), 0.0)
    errors = _errors(max(rms(left), 1e-9), changes, weak, effect.shape[-1])
    share_of = {name: (float(gone[n]), float(more[n]), float(errors[n])) for n, name in enumerate(names)}

    def verdict(name: Part | str, *above: Name) -> PartVerdict:
        if name not in share_of:
            return PartVerdict(name, UNREACHED)
        own, more, error = share_of[name]
        with_it = sum(share_of[group][0] for group in above if group in share_of)
        if with_it > 1 - _OFF:
            return PartVerdict(name, MISSING, 1 - with_it - own, min(share_of[g][2] for g in above if g in share_of))
        return _verdict(name, 1 - with_it - own - more, error)

    parts = [verdict(part, part[0], "experts", _EVERYTHING) for part in effects.experts]
    parts += [verdict(kind, _EVERYTHING) for kind in effects.groups if isinstance(kind, str) and kind != "experts"]
    base_mean = float(off_base.abs().sum() / count)
    size = max(float(effect.square().sum()), 1e-30)
    share = float(((effect + rest) * effect).sum()) / size
    is_rounding = rms(left) <= max(_ROUNDING * rms(off_base), _LEAST)
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
    found.update(effects.groups)
    found[_EVERYTHING] = -effect
    return list(found), torch.where(valid, torch.stack(list(found.values())), 0.0)


def _without_strongest(changes_NPSC: Tensor) -> Tensor:
    """`[N]`: the squared size of each change without the position where it is largest."""
    at_positions = changes_NPSC.square().sum(-1).flatten(1)
    return at_positions.sum(1) - at_positions.max(1).values


def _size(changes: Tensor) -> Tensor:
    return changes.square().sum(1).clamp(min=1e-30)


def _errors(noise: float | Tensor, changes: Tensor, weak: Tensor, together: int) -> Tensor:
    """`[N]`: standard errors of the shares. noise: root mean square. together: numbers of a position, which what an
    engine rounds there may change alike."""
    exact = noise * (together / _size(changes)).sqrt()
    return torch.where(exact <= _EXACT, exact, noise * (together / weak.clamp(min=1e-30)).sqrt())


def _explained(changes: Tensor, weak: Tensor, rest: Tensor, together: int) -> Tensor:
    """How much of each part is gone `[N]`: orthogonal matching pursuit. 0 of all but the few that are needed.

    changes: `[N, M]`. rest: `[M]`. weak, together: as in `_errors`.
    """
    gone = torch.zeros(len(changes), dtype=changes.dtype)
    sizes = _size(changes)
    count = max(int((changes != 0).any(0).sum()), 1)
    picked: list[int] = []
    left = rest
    while len(picked) < _FOUND:
        alone = changes @ left / sizes
        noise = ((left.square().sum() - alone.square() * sizes).clamp(min=0) / count).sqrt().clamp(min=1e-9)
        is_off = alone.abs() > (_ERRORS * _errors(noise, changes, weak, together)).clamp(min=_OFF)
        gains = torch.where(is_off, alone.square() * sizes, 0.0)
        gains[picked] = 0.0
        if not gains.any():
            break
        picked.append(int(gains.argmax()))
        some = changes[picked]
        gone[picked] = torch.linalg.lstsq(some.T, rest).solution
        left = rest - gone @ changes
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


def _verdict(part: Part | str, share: float, error: float) -> PartVerdict:
    off = abs(1 - share)
    if error > _SURE:
        status = UNTOLD
    elif off <= max(_OFF, _ERRORS * error):
        status = APPLIED
    else:
        status = MISSING if share < _OFF else PARTLY
    return PartVerdict(part, status, share, error)
