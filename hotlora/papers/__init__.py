"""The papers' tables and figures as recipes, and studies of our own: `hotlora sweep NAME`."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..base.errors import FileError, HotLoraError
from ..runs.sweep import Sweep, load_sweep
from . import benches, configs, hellora, moe_sieve, profiles
from .direct import Direct
from .recipe import Recipe
from .settings import EXAMPLE, Setting, check_set, task_called
from .studies import STUDIES

__all__ = ["EXAMPLE", "RECIPES", "Direct", "Recipe", "Setting", "find_recipe", "names"]

_MAKERS: dict[str, Callable[[str, Setting], Recipe | Direct]] = {
    **hellora.RECIPES, **configs.HELLORA, **profiles.HELLORA, **benches.HELLORA,
    **moe_sieve.RECIPES, **configs.MOE_SIEVE, **profiles.MOE_SIEVE, **benches.MOE_SIEVE,
}  # fmt: skip
RECIPES: Mapping[str, Callable[[Setting], Recipe | Direct]] = {
    name: partial(make, name) for name, make in _MAKERS.items()
}
_DEFAULT = Setting()


def find_recipe(file_or_name: str | os.PathLike[str], setting: Setting = _DEFAULT) -> Sweep | Direct:
    """What a recipe runs in a setting: a sweep of trainings, or by itself; or the `SWEEP` of a Python file or study.

    FileError: there is no such file or recipe. HotLoraError: the file fails, or a setting for what has none, or files
    of a task that it does not read.
    """
    name = str(file_or_name)
    if name in RECIPES:
        recipe = RECIPES[name](setting)
        _check_sources(recipe, setting)
        if not isinstance(recipe, Recipe):
            if setting.seeds is not None:
                raise HotLoraError(f"{name} trains nothing, and has no seeds: leave out --seeds.")
            return recipe
        check_set(recipe, setting.options)
        return recipe.sweep()
    if name not in STUDIES and not name.endswith(".py"):
        raise FileError(f"{name} is no Python file and no recipe: give FILE.py, or one of {', '.join(names())}.")
    if setting != _DEFAULT:
        raise HotLoraError(f"{name} says itself what it runs: leave out --model, --seeds, --data and --set.")
    return STUDIES[name]() if name in STUDIES else load_sweep(Path(file_or_name))


def _check_sources(recipe: Recipe | Direct, setting: Setting) -> None:
    for task in setting.sources:
        others = {other: source for other, source in setting.sources.items() if other != task}
        if RECIPES[recipe.name](replace(setting, sources=others)).reads() == recipe.reads():
            tasks = recipe.tasks if isinstance(recipe, profiles.ProfileRecipe) else recipe.reads()
            files = {task_called(name) for name in tasks if not name.startswith("nano-")}
            together = "on nano it takes all of" if setting.is_nano else "it takes"
            takes = f"{together} {', '.join(sorted(files))}" if files else "it reads no files: leave it out"
            end = ", or none" if files and setting.is_nano else ""
            raise HotLoraError(f"--data {task} changes nothing in {recipe.name}: {takes}{end}.")


def names() -> list[str]:
    """Of every recipe and study."""
    return sorted([*RECIPES, *STUDIES])
