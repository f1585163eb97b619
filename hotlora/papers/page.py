"""A store of recipes' runs -> every table and figure that they make, model by model. Loads no model."""

import os
from pathlib import Path

from ..base.errors import DataError
from ..base.records import find_records
from ..report.page import has_recipes
from . import RECIPES, configs
from .claims import claims_result
from .recipe import Recipe, condition_name, model_folder
from .result import Result, write_results
from .scores import result
from .settings import MIXTRAL, OLMOE, QWEN, Setting

_PAPERS_OWN = (OLMOE, MIXTRAL, QWEN)


def write_tables(runs: str | os.PathLike[str], output: str | os.PathLike[str]) -> list[Path]:
    """OUTPUT/tables-MODEL/ with every table and figure that the runs make, as HTML, Markdown, CSV, LaTeX and PNG.

    Returns the HTML pages, one for each model; the papers' own models share one.

    DataError: no recipe has a run that is done.
    """
    runs, output = Path(runs), Path(output)
    settings = _settings(runs)
    pages = []
    for setting in settings:
        results = table_results(setting, runs)
        if any(result.name not in configs.HELLORA for result in results):  # hyperparameters need no run
            name = setting.model or "papers"
            preface = "Made from the runs' records alone, beside what the papers print."
            if setting.is_nano:
                preface += (
                    f" {name} is a small model on small tasks: it compares methods, and proves nothing of large models."
                )
            folder = output / f"tables-{model_folder(name)}"
            pages.append(write_results(results, folder, f"The papers' tables on {name}", preface))
    if not pages:
        raise DataError(f"no recipe has a run that is done in {runs}: run `hotlora sweep NAME` first.")
    return pages


def _settings(runs: Path) -> list[Setting]:
    """The papers' own models share one, as far as the papers have them in a recipe; each other has one."""
    covered = {
        condition_name(row, column)
        for make in RECIPES.values() if isinstance(recipe := make(Setting()), Recipe)
        for row, column in recipe.places()
    }  # fmt: skip
    own, others = False, set()
    for record in find_records(runs, {}).values():
        if not has_recipes([record]) or "scores" in record["sweep"]:  # of a training that is there, too
            continue
        model = str(record["model"]["name"])
        if model in _PAPERS_OWN and record["sweep"]["condition"] in covered:
            own = True
        else:
            others.add(model)
    return [*([Setting()] if own else []), *(Setting(model) for model in sorted(others))]


def table_results(setting: Setting, runs: Path) -> list[Result]:
    """What is there of every recipe in a setting; the claims come first."""
    recipes = [make(setting) for make in RECIPES.values()]
    trainings = {recipe.name: recipe for recipe in recipes if isinstance(recipe, Recipe)}
    claims = claims_result(trainings, runs)
    found = [result(recipe, runs) if isinstance(recipe, Recipe) else recipe.result(runs) for recipe in recipes]
    return [some for some in [claims, *found] if some is not None]
