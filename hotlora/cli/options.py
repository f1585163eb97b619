"""A command's options, made from the dataclasses that hold them, and from a YAML file; and the commands' consoles."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from functools import wraps
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from ..base.errors import HotLoraError
from ..base.options import Options, converted, read_yaml, twice
from ..runs.options import RunOptions


class _Console(Console):
    """Prints words as they are: a path keeps its brackets and is not broken at the end of a line; tables are fitted."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.width = None  # type: ignore[assignment]  # COLUMNS is read when a table is fitted, not at import

    def print(self, *objects: Any, **options: Any) -> None:
        if all(isinstance(shown, str | Text) for shown in objects):
            options = {"soft_wrap": True, "markup": False, "highlight": False} | options
        super().print(*objects, **options)


out = _Console()
err = _Console(stderr=True)


def error_line(message: str, what: str = "error:") -> Text:
    """What went wrong, behind a red word."""
    return Text.assemble((what, "bold red"), f" {message}")


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_GIVEN = ("COMMANDLINE", "DEFAULT_MAP")


def options_of(
    options: type[Options], *, only: Sequence[str] = (), leave: Sequence[str] = (),
    aliases: Mapping[str, str] | None = None,
) -> Callable[[Any], Any]:  # fmt: skip
    """A command with an option for each field of `options`, and with --config FILE.yaml for all of its options.

    The command gets those of the fields that were given, on the command line or in the file, as keywords, and its own
    parameters as Typer gives them.

    Args:
        only, leave: these fields alone; all but these.
        aliases: other names -> those of options that the command has; of the rest nothing is made.
    """
    chosen = [f for f in fields(options) if f.metadata["cli"] and f.name not in leave and (not only or f.name in only)]
    types = {field.name: field.type for field in chosen}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
        known = {p.name: _plain(p.annotation) for p in own} | types
        others = {theirs: ours for theirs, ours in (aliases or {}).items() if ours in known}
        made = [_parameter(field, [theirs for theirs in others if others[theirs] == field.name]) for field in chosen]
        required = [p for p in made if p.default is p.empty]  # these are shown first
        parameters = [*required, *own, *(p for p in made if p.default is not p.empty)]
        parameters += [_hidden(theirs, known[ours]) for theirs, ours in others.items()]

        def read(context: typer.Context, file: Path | None) -> Path | None:
            if file is not None:
                context.default_map = read_yaml(file, known, others)
            return file

        config = Annotated[
            Path | None,
            typer.Option(
                "--config", callback=read, is_eager=True, metavar="FILE.yaml",
                help="Take options from a YAML file (learning_rate: 4e-4); the command line comes first.",
            ),
        ]  # fmt: skip

        @wraps(command)
        def run(context: typer.Context, config: Path | None = None, **values: Any) -> None:
            given = {name for name in known if _source(context, name) in _GIVEN}
            for theirs, ours in others.items():
                value = values.pop(theirs)
                if _source(context, theirs) == _GIVEN[0]:
                    if _source(context, ours) == _GIVEN[0]:
                        raise twice(theirs, ours)
                    values[ours] = value
                    given.add(ours)
            for name, kind in types.items():
                if name in given:
                    if values[name] is None and get_origin(kind) is Sequence:
                        values[name] = ()  # an empty list in a file, which Typer makes None
                    values[name] = converted(name, values[name], kind)
                else:
                    del values[name]
            command(**values)

        parameters = [
            inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
            *(p.replace(kind=p.KEYWORD_ONLY) for p in parameters),
            inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=config),
        ]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def of(name: str, options: type[Options] = RunOptions, **changes: Any) -> Any:
    """The annotation of one field, for a command's own parameter. changes: of the help or the panel."""
    (field,) = (field for field in fields(options) if field.name == name)
    return _annotation(field, **changes)


def _source(context: typer.Context, name: str) -> str | None:
    """Where an option's value is from, by click's name."""
    source = context.get_parameter_source(name)
    return source and source.name


def _hidden(theirs: str, kind: Any) -> inspect.Parameter:
    """An option under another name, which is told where its own one is."""
    told = typer.Option(_flag(theirs), hidden=True)
    optional: Any = _typer_type(kind) | None
    annotation: Any = Annotated[optional, told]
    return inspect.Parameter(theirs, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parameter(field: Field[Any], also: Sequence[str] = ()) -> inspect.Parameter:
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    if get_origin(field.type) is Sequence:
        default = None
    told = " ".join([field.metadata["help"], *(f"Also {_flag(theirs)}." for theirs in also)])
    annotation = _annotation(field, told)
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _annotation(field: Field[Any], help: str | None = None, panel: str | None = None) -> Any:
    flag = _flag(field.name)
    flags = field.metadata["flags"] or ((f"{flag}/--no-{flag[2:]}",) if field.type is bool else (flag,))
    told = typer.Option(
        *flags, help=escape(help or field.metadata["help"]), rich_help_panel=panel or field.metadata["panel"]
    )
    return Annotated[_typer_type(field.type), told]


def _typer_type(kind: Any) -> Any:
    """What Typer takes for a field's type: it knows no unions but with None."""
    if get_origin(kind) is Sequence:
        return list[Path] | None
    kinds = get_args(kind) or (kind,)
    one = Path if Path in kinds else str if str in kinds else next(k for k in kinds if k is not NoneType)
    return one | None if NoneType in kinds else one


def _plain(annotation: Any) -> Any:
    """The type in an `Annotated`."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def number_list(name: str, text: str, kind: type) -> tuple[Any, ...]:
    """The numbers of an option that takes several."""
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise HotLoraError(f"--{name} is {text!r}: give numbers with commas between, such as 1,2.") from None


def named(option: str, pairs: Sequence[str] | None, example: str) -> dict[str, str]:
    """NAME=VALUE, some times, as a dictionary. HotLoraError: a pair that is none (`example` shows one), or a name
    twice."""
    found: dict[str, str] = {}
    for pair in pairs or ():
        name, sign, value = pair.partition("=")
        if not (name and sign and value):
            raise HotLoraError(f"{option} {pair} is not NAME=VALUE: give it as in {example}.")
        if name in found:
            raise HotLoraError(f"{option} {name} is given twice, {found[name]} and {value}: leave one of them out.")
        found[name] = value
    return found
