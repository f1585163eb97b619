"""Names of options as people may write them: with underscores, or as other libraries call them."""

import re
from collections.abc import Collection
from typing import Any

from typer.core import TyperGroup

from ..base.errors import HotLoraError
from ..base.options import meant, needless

_RUN = ("run", "runs", "adapter", "adapters")
_FIRST = {"data": ("source", "data"), "model": ("model",), "profile": ("profile",), **dict.fromkeys(_RUN, _RUN)}
"""What some commands take as their first word, by its names in these, and others by an option."""
_OPTION = re.compile(r"\A--[A-Za-z][\w-]*(?==|\Z)")


def with_dashes(words: list[str]) -> list[str]:
    """--lora_alpha as --lora-alpha; behind a bare -- no word is an option."""
    end = words.index("--") if "--" in words else len(words)
    return [_OPTION.sub(lambda found: found[0].replace("_", "-"), word, count=1) for word in words[:end]] + words[end:]


def check_once(words: list[str]) -> None:
    """HotLoraError where data or an adapter are named twice: of an option given twice the last one counts, and here it
    would be a part of what was meant."""
    words = words[: words.index("--")] if "--" in words else words
    for flags in (("--data", "-d"), ("--test-data",)):
        if sum(word.partition("=")[0] in flags for word in words) > 1:
            raise HotLoraError(f"{flags[0]} is given twice: give one file, or a folder with all of the files.")
    adapter = ("--adapter", "-a") if words[0] == "verify" else ("--adapter",)
    if sum(word.partition("=")[0] in adapter for word in words) > 1:
        raise HotLoraError("--adapter is given twice: give one; `hotlora combine` makes one adapter of several.")


class Commands(TyperGroup):
    """Options are taken with underscores, too; one that does not exist is told with what it is called here."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = with_dashes(args)
        if words[:1] and words[0] in ("train", "evaluate", "generate", "verify"):
            check_once(words)
        return super().parse_args(ctx, words)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            if told := _told(error):
                error.message = f"{str(error.message).rstrip('.')}. {told}"  # type: ignore[attr-defined]
                error.possibilities = None  # type: ignore[attr-defined]
            raise


def _told(error: Any) -> str | None:
    kind = type(error).__name__  # Typer's newer releases have a click of their own, so the class is another one
    return _of_option(error) if kind == "NoSuchOption" else _of_words(error) if kind == "UsageError" else None


def _flags(error: Any) -> dict[str, str]:
    """Of the command, each option's name and what it is called on the command line."""
    options = error.ctx.command.params if error.ctx else ()
    return {o.name: o.opts[0] for o in options if o.name and o.opts and o.opts[0].startswith("--")}


def _of_words(error: Any) -> str | None:
    flags = [flag for name, flag in _flags(error).items() if name in ("data", "model", "adapter")]
    is_one = "extra argument" in str(error.message) and "--adapter" in flags
    return f"Each is named here: {', '.join(flags)}." if is_one else None


def _of_option(error: Any) -> str | None:
    flags = _flags(error)
    if first := _first(error, _FIRST.get(error.option_name.strip("-"), ())):
        return f"It stands without an option: {error.ctx.command_path} {first}."
    if near := meant(error.option_name, flags):
        name, *value = near.split()
        return f"Did you mean {' '.join([flags[name], *value])}?"
    why = needless(error.option_name)
    return f"{why[0].upper()}{why[1:]}." if why else None


def _first(error: Any, names: Collection[str]) -> str | None:
    """What the command takes without an option, as its usage has it, if it is one of these."""
    options = error.ctx.command.params if error.ctx else ()
    words = [o for o in options if o.param_type_name == "argument" and o.name in names]
    return (words[0].metavar or words[0].name).upper() if words else None
