"""The papers' tables and figures as recipes, and studies of our own: `hotlora sweep NAME`."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from ..errors import FileError, HotLoraError
from ..sweep import Sweep, load_sweep
from . import hellora, moe_sieve
from .recipe import Recipe
from .settings import Setting

__all__ = ["RECIPES", "Recipe", "Setting", "find_sweep"]

RECIPES: Mapping[str, Callable[[Setting], Recipe]] = {
    **{f"hellora-{name}": recipe for name, recipe in hellora.RECIPES.items()},
    **{f"moe-sieve-{name}": recipe for name, recipe in moe_sieve.RECIPES.items()},
}
_STUDIES = ("auto_k",)
_DEFAULT = Setting()


def find_sweep(file_or_name: str | os.PathLike[str], setting: Setting = _DEFAULT) -> Sweep:
    """The sweep of a recipe in a setting; or the `SWEEP` of a Python file, or of a study by name.

    FileError: there is no such file or recipe. HotLoraError: the file fails, or a setting for what has none.
    """
    name = str(file_or_name)
    if name in RECIPES:
        return RECIPES[name](setting).sweep()
    if name in _STUDIES:
        path = Path(__file__).parent / f"{name}.py"
    elif name.endswith(".py"):
        path = Path(file_or_name)
    else:
        raise FileError(f"{name} is no Python file and no recipe: give FILE.py, or one of {', '.join(names())}.")
    if setting != _DEFAULT:
        raise HotLoraError(f"{name} says itself what it runs: leave out --model, --seeds, --data and --set.")
    return load_sweep(path)


def names() -> list[str]:
    """Of every recipe and study."""
    return sorted([*RECIPES, *_STUDIES])
