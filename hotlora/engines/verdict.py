"""From an engine's log-probabilities and ours to what the engine applies, expert by expert.

The engine's change (with the adapter less without) is held against our own model's. What is left is rounding, or the
effect of parts that the engine leaves out: these are found one after another, by which of them explains most of it.

Shape suffixes: P texts, S tokens of a text, C tokens asked for, N parts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .expected import Effects
from .texts import Part

_SURE = 1 / 8
"""The standard error of a share at which a part can be told: none and half of its update are four of them apart."""
_OFF = 1 / 4
"""A share that is this far from 1, and by four standard errors, is not that of a part that is applied."""
_ERRORS = 4
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

    names, changes = _dense(effects, effect, valid)
    changes = changes.reshape(len(names), -1)
    gone = _explained(changes, rest.flatten(), effect.shape[-1])
    left = rest.flatten() - gone @ changes
    sizes = changes.square().sum(1).clamp(min=1e-30)
    # What an engine rounds at a position may change all of its tokens together.
    errors = max(rms(left), 1e-9) * (effect.shape[-1] / sizes).sqrt()
    gone_more = torch.where(gone == 0, changes @ left / sizes, 0.0)
    share_of = {name: (float(gone[n]), float(gone_more[n]), float(errors[n])) for n, name in enumerate(names)}

    def verdict(name: Part | str, *above: Name) -> PartVerdict:
        if name not in share_of:
            return PartVerdict(name, UNREACHED)
        own, more, error = share_of[name]
        return _verdict(name, 1 - own - more - sum(share_of[group][0] for group in above), error)

    parts = [verdict(part, part[0], "experts", _EVERYTHING) for part in effects.experts]
    parts += [verdict(kind, _EVERYTHING) for kind in effects.groups if isinstance(kind, str) and kind != "experts"]
    base_mean = float(off_base.abs().sum() / count)
    size = max(float(effect.square().sum()), 1e-30)
    share = float(((effect + rest) * effect).sum()) / size
    is_rounding = rms(left) <= max(_ROUNDING * rms(off_base), _LEAST)
    if not valid.any() or base_mean > _BASE_AGREES.get(dtype, _BASE_AGREES_QUANTIZED):
        applied = "base differs"
    elif share_of[_EVERYTHING][0] > 1 - _OFF:
        applied = "no"
    elif gone.any() or not is_rounding:
        applied = "partly"
    else:
        applied = "yes" if share_of[_EVERYTHING][2] <= _SURE else "cannot be told"
    return Verdict(
        applied, parts, share, base_mean, float(off_base.abs().max()), rms(effect), rms(rest), rms(left), count
    )


def _dense(effects: Effects, effect: Tensor, valid: Tensor) -> tuple[list[Name], Tensor]:
    """The parts that can be left out, and `[N, P, S - 1, C]`, what that does; zeros where the engine gave no number."""
    found: dict[Name, Tensor] = {}
    for part, texts in effects.experts.items():
        if texts:
            found[part] = torch.zeros_like(effect)
            for text, change in texts.items():
                found[part][text] = change
    found |= effects.groups
    found[_EVERYTHING] = -effect
    return list(found), torch.where(valid, torch.stack(list(found.values())), 0.0)


def _explained(changes: Tensor, rest: Tensor, coherent: int) -> Tensor:
    """How much of each part is gone `[N]`: orthogonal matching pursuit. 0 of all but the few that are needed.

    changes: `[N, M]`. rest: `[M]`. coherent: numbers that are rounded together.
    """
    gone = torch.zeros(len(changes), dtype=changes.dtype)
    sizes = changes.square().sum(1).clamp(min=1e-30)
    count = max(int((changes != 0).any(0).sum()), 1)
    picked: list[int] = []
    left = rest
    while len(picked) < _FOUND:
        alone = changes @ left / sizes
        noise = (left - alone[:, None] * changes).square().sum(1) / count
        errors = (noise * coherent / sizes).sqrt().clamp(min=1e-9)
        gains = torch.where((alone.abs() > _OFF) & (alone.abs() > _ERRORS * errors), alone.square() * sizes, 0.0)
        gains[picked] = 0.0
        if not gains.any():
            break
        picked.append(int(gains.argmax()))
        some = changes[picked]
        gone[picked] = torch.linalg.lstsq(some.T, rest).solution
        left = rest - gone @ changes
    return gone


def _verdict(part: Part | str, share: float, error: float) -> PartVerdict:
    off = abs(1 - share)
    if error > _SURE:
        status = UNTOLD
    elif off <= max(_OFF, _ERRORS * error):
        status = APPLIED
    else:
        status = MISSING if share < _OFF else PARTLY
    return PartVerdict(part, status, share, error)


def as_json(verdict: Verdict) -> dict[str, Any]:
    """Plain data. An expert is [layer, id]."""
    return {**vars(verdict), "parts": [vars(part) for part in verdict.parts]}
