"""Options as dataclasses: a field has its type, its default and one line of help.

The command line, `--config FILE.yaml` and the docs are made from these. Imports nothing heavy.
"""

import dataclasses
import difflib
import json
import numbers
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import yaml

from .errors import FileError, HotLoraError
from .hints import MEANT, NEEDLESS

ALIASES = {
    "num_train_epochs": "epochs", "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size", "lr_scheduler_type": "lr_scheduler",
    "load_best_model_at_end": "load_best", "activation_checkpointing": "gradient_checkpointing",
    "max_seq_length": "max_length", "output_dir": "output",
}  # fmt: skip
"""transformers' and TRL's names of a training's options that are called otherwise here: each is taken, too, on the
command line, in a YAML file, in Python and in a sweep."""
_FEW = 20  # names that an error lists
_LISTS = (Sequence, list)
_DATA = ("data", "test_data")
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    NoneType: "none",
}


def option(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    panel: str | None = None,
    flags: tuple[str, ...] = (),
    cli: bool = True,
    resume: str | None = "same",
) -> Any:
    """A field of an `Options` dataclass.

    Args:
        help: one line, with the unit.
        panel: the heading that `--help` and the docs list it under.
        flags: how the command line calls it, where not by its own name.
        cli: whether the command line has it; what only a method's name sets is not there.
        resume: same: a run that goes on must have the same; free: its record holds it, and it may change; None: its
            record does not hold it (it changes nothing, or what it names is held by a hash).
    """
    metadata = {"help": help, "panel": panel, "flags": flags, "cli": cli, "resume": resume}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """HotLoraError, naming the option, where a value is of another type than its field."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, converted(field.name, getattr(self, field.name), field.type))

    def changed(self, names: Iterable[str]) -> list[str]:
        """Those of these options that are not at their defaults."""
        return [name for name in names if getattr(self, name) != getattr(type(self), name)]

    def recorded(self) -> dict[str, Any]:
        """What a run's record holds of these."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata["resume"]}


def converted(name: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`, a field's type, has it: 4 for 4.0, a number for "4e-4" (YAML reads it as text), a tuple for a
    list. HotLoraError where it cannot be."""
    allowed = (get_args(kind) if get_origin(kind) not in _LISTS else (kind,)) or (kind,)
    for one in allowed:
        if get_origin(one) is Mapping and isinstance(value, Mapping):
            return _as_text(name, value, get_args(one)[1])
        if get_origin(one) in _LISTS and isinstance(value, str | os.PathLike | list | tuple):
            values = (value,) if isinstance(value, str | os.PathLike) else value
            return tuple(converted(name, each, get_args(one)[0]) for each in values)
    if (value is None and NoneType in allowed) or (isinstance(value, bool) and bool in allowed):
        return value
    if isinstance(value, str):
        number = _number(value, allowed)
        if number is not None or str in allowed:
            return value if number is None else number
        if Path in allowed:
            return Path(value)
    elif isinstance(value, os.PathLike) and (Path in allowed or str in allowed):
        return value if Path in allowed else os.fspath(value)
    elif isinstance(value, numbers.Real) and not isinstance(value, bool):
        if float in allowed and (not isinstance(value, int) or abs(value) < 2**53):
            return value if isinstance(value, int) else float(value)
        if int in allowed and (isinstance(value, numbers.Integral) or float(value).is_integer()):
            return int(value) if isinstance(value, numbers.Integral) else int(float(value))
    words = " or ".join("a mapping" if get_origin(one) is Mapping else _WORDS.get(one, "a list") for one in allowed)
    one = " Give one, or a folder with all of the files." if name in _DATA and isinstance(value, list | tuple) else ""
    raise HotLoraError(f"{name} = {value!r} has the wrong type: it must be {words}.{one}")


def _as_text(name: str, value: Mapping[Any, Any], kind: Any) -> str:
    """A mapping as the command line has it: of names, a=b,c=d; of anything, JSON."""
    if kind is not str:
        try:
            return json.dumps(dict(value))
        except (TypeError, ValueError) as error:
            raise HotLoraError(f"{name} = {value!r} holds what JSON cannot ({error}).") from error
    words = [*value, *value.values()]
    if wrong := next((word for word in words if not isinstance(word, str) or set(word) & {"=", ","}), None):
        raise HotLoraError(f"{name} = {dict(value)!r}: {wrong!r} is no name, a text without '=' and ','.")
    return ",".join(f"{theirs}={ours}" for theirs, ours in value.items())


def _number(text: str, allowed: tuple[Any, ...]) -> float | int | None:
    for kind in (int, float):
        if kind in allowed and "_" not in text:
            try:
                return kind(text)
            except ValueError:
                pass
    return None


def by_own_names(given: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """`given` with the names that `aliases` maps others to. HotLoraError: an option under both."""
    for theirs, ours in aliases.items():
        if theirs in given and ours in given:
            raise twice(theirs, ours)
    return {aliases.get(name, name): value for name, value in given.items()}


def twice(theirs: str, ours: str) -> HotLoraError:
    return HotLoraError(f"{theirs} and {ours} are one option: give one of them.")


def suggest(unknown: Iterable[str], known: Iterable[str]) -> str:
    """For an error about names that do not exist: each with the nearest that does; all, where none is near and they are
    few."""
    known = sorted(known)
    hints = {name: hint(name, known) for name in unknown}
    told = ", ".join(f"{name} ({found})" if found else name for name, found in hints.items())
    if all(hints.values()):
        return told
    return f"{told}; there are {', '.join(known)}" if len(known) <= _FEW else f"{told} (docs/options.md has all)"


def hint(name: str, known: Collection[str]) -> str | None:
    """What one name may stand for, in words; None: nothing is near."""
    if near := meant(name, known):
        return f"did you mean {near}?"
    return needless(name)


def did_you_mean(value: object, known: Iterable[str]) -> str:
    """For an error about a value that does not exist: " (did you mean …?)", or nothing where none is near."""
    near = difflib.get_close_matches(str(value), list(known), 1)
    return f" (did you mean {near[0]}?)" if near else ""


def needless(name: str) -> str | None:
    """Why there is no option of another library's name here."""
    why = NEEDLESS.get(name.strip("-").replace("-", "_"))
    return f"leave it out: {why}" if why else None


def meant(name: str, known: Collection[str]) -> str | None:
    """The option that another library calls so, with a value where it has one, or else the nearest name."""
    name = name.strip("-").replace("-", "_")
    found = ALIASES.get(name) or MEANT.get(name)
    if found is not None and found.split()[0] in known:
        return found
    return None if name in NEEDLESS else next(iter(difflib.get_close_matches(name, known, 1)), None)


def read_yaml(
    file: str | os.PathLike[str], known: Mapping[str, Any], aliases: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Options from a YAML file, NAME: VALUE; max-steps is max_steps. What is null is left to its default.

    known: name -> type. aliases: other names -> those.

    FileError: there is no such file. HotLoraError: it is no YAML of that kind, has a name that does not exist (the
    nearest is named) or twice, or a value of another type; each says the file.
    """
    path = Path(file)
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise FileError(f"{path} cannot be read ({error.strerror}): --config takes a YAML file.") from error
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).replace('"<unicode string>"', "it").split())
        raise HotLoraError(f"{path} is not valid YAML: {reason}") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise HotLoraError(f"{path} holds no options: write NAME: VALUE, one a line, as in learning_rate: 4e-4.")
    aliases = aliases or {}
    found = _with_underscores(path, found, {*known, *aliases})
    if unknown := [str(name) for name in found if name not in known and name not in aliases]:
        raise HotLoraError(f"{path} has options that do not exist: {suggest(unknown, {*known, *aliases})}.")
    try:
        found = by_own_names(found, aliases)
        return {name: converted(name, value, known[name]) for name, value in found.items() if value is not None}
    except HotLoraError as error:
        raise HotLoraError(f"{path}: {error}") from error


def _with_underscores(path: Path, found: Mapping[Any, Any], known: Collection[str]) -> dict[Any, Any]:
    """Names as the command line spells them, by their own. HotLoraError: one in both ways."""
    own = {name: str(name).replace("-", "_") for name in found}
    own = {name: underscored if underscored in known else name for name, underscored in own.items()}
    if twice := [name for name in found if name != own[name] and own[name] in found]:
        raise HotLoraError(f"{path}: {own[twice[0]]} is given twice, also as {twice[0]}.")
    return {own[name]: value for name, value in found.items()}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader takes the last of two equal names; here they are an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise yaml.YAMLError(f"{min(repeated)} is given twice")
        return super().construct_mapping(node, deep)
