"""Routing that others measured, as profiles and scores: `hotlora.import_profile`, `hotlora.import_scores`."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.errors import DataError
from ..base.files import check_writable, file_in, write_json
from .formats.found import MOST_EXPERTS, Found, Known, spans
from .formats.reading import Files, read_routing
from .profile import RoutingProfile
from .scores import VERSION


def import_profile(
    files: Files,
    output: str | os.PathLike[str] | None = None,
    *,
    model: str | os.PathLike[str] | None = None,
    num_experts: int | None = None,
    num_experts_per_tok: int | None = None,
) -> RoutingProfile:
    """The profile in files that others wrote, as `hotlora import` makes it (docs/import.md has the forms).

        profile = hotlora.import_profile("routed_experts.npy", model="Qwen/Qwen3-30B-A3B")

    Args:
        files: one file or several of one form, whose counts add up; or a folder of them.
        output: a .safetensors file or a folder to save it to; None: it is not saved. Scores beside the counts are
            written beside it, `NAME-reap.json` of its name.
        model: a config.json, its folder, nano, or a name on the Hub; no weights are read. Layers, experts and K are
            checked, and the profile is bound to the model; without one, `train` checks layers and experts alone.
        num_experts, num_experts_per_tok: of the model, where neither it nor the files say.

    Returns:
        A profile whose `source` says what was read. Where the files hold no gate weights, its mass is 0.

    Raises:
        FileError: a file that is not whole, or of no known form.
        DataError: numbers that cannot be, with file, layer and number; scores alone.
        ModelError: no such model.
    """
    return imported(files, output, model, num_experts, num_experts_per_tok)[0]


def import_scores(
    files: Files,
    *,
    model: str | os.PathLike[str] | None = None,
    num_experts: int | None = None,
    num_experts_per_tok: int | None = None,
) -> dict[str, Tensor]:
    """The scores in the same files: name to float64 [L, E], for `select_experts(rule="scores", scores=…)`.

    Such as REAP's saliency, and ESFT's token_scores and gate_scores. Arguments and errors as `import_profile`; empty
    where there is none.
    """
    found = read_routing(files, _known(model, num_experts, num_experts_per_tok))
    return dict(found.scores)


def imported(
    files: Files, output: str | os.PathLike[str] | None, model: str | os.PathLike[str] | None,
    num_experts: int | None, num_experts_per_tok: int | None,
) -> tuple[RoutingProfile, str, list[Path]]:  # fmt: skip
    """The profile, what was read in one line, and the scores' files. Writes both where there is an output."""
    known = _known(model, num_experts, num_experts_per_tok)
    target = None if output is None else file_in(output, "profile.safetensors")
    if target is not None:
        check_writable(target)
    found = read_routing(files, known)
    if found.counts is None:
        raise DataError(
            f"{found.form} holds scores ({', '.join(found.scores)}) and no counts, which make a profile: give "
            "-o NAME.json to write scores, for --rule scores"
        )
    profile = _profile(found, known)
    written = []
    if target is not None:
        written = write_scores(found, known, target)
        profile.save(target)
    return profile, _told(found), written


def imported_scores(
    files: Files, output: Path, model: str | os.PathLike[str] | None, num_experts: int | None,
    num_experts_per_tok: int | None,
) -> tuple[str, list[Path]]:  # fmt: skip
    """Writes the scores in the files alone: what was read, and the files. DataError where there are none."""
    known = _known(model, num_experts, num_experts_per_tok)
    check_writable(output)
    found = read_routing(files, known)
    if not found.scores:
        raise DataError(f"{found.form} holds no scores but counts: give -o NAME.safetensors for a profile")
    return _told(found), write_scores(found, known, output)


def write_scores(found: Found, known: Known, output: Path) -> list[Path]:
    """One file a score, `STEM-NAME.json` beside `output`, as `--rule scores` reads it."""
    written = []
    for name, table in found.scores.items():
        safe = "".join(letter if letter.isalnum() or letter in "_-" else "_" for letter in name)[:40]
        rows = {str(layer): row for layer, row in zip(found.layers, table.tolist(), strict=True)}
        path = output.with_name(f"{output.stem}-{safe or 'scores'}.json")
        write_json(path, {"version": VERSION, "fingerprint": known.fingerprint, "scores": rows})
        written.append(path)
    return written


def _profile(found: Found, known: Known) -> RoutingProfile:
    assert found.counts is not None
    source: dict[str, Any] = {"imported": found.form}
    if known.fingerprint is not None:
        source["fingerprint"] = known.fingerprint
    for name, value in (("model", known.name or found.model), ("data", found.data)):
        if value:
            source[name] = value
    mass = torch.zeros(found.counts.shape, dtype=torch.float64) if found.mass is None else found.mass
    return RoutingProfile(
        found.layers, found.counts, mass, found.num_tokens, found.num_experts_per_tok, source, found.saliency
    )


def _told(found: Found) -> str:
    text = f"{found.form}: "
    shape = next(iter(found.scores.values())).shape if found.counts is None else found.counts.shape
    if found.counts is not None:
        text += f"{found.num_tokens:,} tokens, "
    text += f"{shape[0]} layers ({spans(found.layers)}) of {shape[1]} experts"
    if found.counts is not None:
        text += f", {found.num_experts_per_tok} a token"
        held = [name for name in ("mass", "saliency") if getattr(found, name) is not None]
        text += f"; with {' and '.join(held)}" if held else "; counts alone, so no signal but count"
    if found.skipped:
        text += f"; without {found.skipped:,} tokens that are padding or have no experts (zeros or -1)"
    return text + (f"; ignored: {', '.join(found.ignored)}" if found.ignored else "")


def _known(model: str | os.PathLike[str] | None, num_experts: int | None, num_experts_per_tok: int | None) -> Known:
    for name, value in (("num_experts", num_experts), ("num_experts_per_tok", num_experts_per_tok)):
        if value is not None and not 1 <= value <= MOST_EXPERTS:
            raise DataError(f"{name} is {value}: it must be a number from 1 to {MOST_EXPERTS:,}")
    if model is None:
        return Known(num_experts, num_experts_per_tok)
    from .formats.model import known_of

    known = known_of(model)
    for name, value in (("num_experts", num_experts), ("num_experts_per_tok", num_experts_per_tok)):
        if value not in (None, getattr(known, name)):
            raise DataError(f"{name} is {value}, and {known.name} has {getattr(known, name)}: leave it out")
    return known
