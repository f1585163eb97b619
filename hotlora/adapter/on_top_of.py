"""The adapters that are merged into a base model: noted in its config, and so in every checkpoint that is saved of it.

An adapter is a difference to the weights that it was trained on. One that was trained on such a base holds the note,
too, and is refused on a base that lacks what the note names.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..base.errors import FileError, PlanError

MERGED = "hotlora_merged"
"""Key in a model's config: a list of `Entry`, in the order of merging."""

Entry = dict[str, str | None]
"""`path` of the adapter's folder, `weights_sha256` of its file and `options_sha256` (`options_hash`; older ones have
none); None for an adapter that came from no file."""
NO_FILE: Entry = {"path": None, "weights_sha256": None}
HASHES = ("weights_sha256", "options_sha256")
_OF_UPDATE = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "normalize_moe_lora")


def options_hash(saved: Mapping[str, Any]) -> str:
    """Of a saved adapter's config a SHA-256 over what says how much its weights add, and to which experts. Paths, which
    a push to the Hub takes out, and options of which a later PEFT has more are not in it."""
    told = {name: saved.get(name) or None for name in _OF_UPDATE} | {"experts": saved["plan"].get("experts")}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def merged_into(model: nn.Module) -> list[Entry]:
    """What is merged into a model, or into the model that a PEFT model wraps."""
    return noted(getattr(model, "config", None))


def noted(config: Any) -> list[Entry]:
    """What a model's config says of it. FileError: it is no such note."""
    entries = getattr(config, MERGED, None)
    try:
        check_entries(MERGED, entries)
    except TypeError as error:
        raise FileError(f"the model's config.json is broken: {error} Merge the adapters again.") from error
    return list(entries or [])


def note_merged(model: nn.Module, entries: Sequence[Entry]) -> None:
    """After `entries` have been merged into a model."""
    if entries:
        setattr(model.config, MERGED, [*merged_into(model), *entries])


@contextmanager
def merged_for_now(model: nn.Module, entries: Sequence[Entry]) -> Iterator[None]:
    """Inside, `entries` are noted in a model."""
    config: Any = model.config
    had, before = hasattr(config, MERGED), merged_into(model)
    note_merged(model, entries)
    try:
        yield
    finally:
        if had:
            setattr(config, MERGED, before)
        elif entries:
            delattr(config, MERGED)


def missing(needed: Sequence[Entry], there: Sequence[Entry]) -> list[Entry]:
    """Those of `needed` that are not `there`. An adapter that came from no file may be any."""
    left = list(there)
    absent = []
    for entry in sorted(needed, key=lambda entry: entry["weights_sha256"] is None):  # the known ones first
        if fitting := [found for found in left if _may_be(entry, found)]:
            known = [found for found in fitting if found["weights_sha256"] == entry["weights_sha256"]]
            left.remove((known or fitting)[0])
        else:
            absent.append(entry)
    return absent


def _may_be(a: Entry, b: Entry) -> bool:
    """Whether both can be of one adapter: what one of them does not tell is no difference."""
    return all(None in (pair := (a.get(name), b.get(name))) or pair[0] == pair[1] for name in HASHES)


def check_ground(on_top_of: Sequence[Entry] | None, model: nn.Module) -> None:
    """PlanError where an adapter with this note does not belong on `model`."""
    if absent := missing(on_top_of or [], merged_into(model)):
        raise PlanError(
            f"the adapter was trained on top of {described(absent)}, which this model does not have merged in, so its "
            "answers would be wrong. Merge it first: model = hotlora.load_adapter(model, PATH).merge_and_unload(); on "
            "the command line, --on-top-of PATH."
        )


def described(entries: Sequence[Entry]) -> str:
    """For messages: the adapters' folders."""
    return " and ".join(entry["path"] or "an adapter that was merged in memory" for entry in entries)


def check_entries(name: str, entries: Any) -> None:
    """TypeError where a saved config's note is not one."""
    if entries is not None and not (
        isinstance(entries, list)
        and all(
            isinstance(entry, dict)
            and {"path", "weights_sha256"} <= entry.keys() <= {"path", *HASHES}
            and all(value is None or isinstance(value, str) for value in entry.values())
            for entry in entries
        )
    ):
        raise TypeError(f"{name} is {entries!r}; it must be a list of objects with path and weights_sha256.")
