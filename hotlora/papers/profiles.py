"""Recipes that routing profiles make. A model is profiled once on a data set, and all recipes read that.

Shape suffixes as in `study`: L MoE layers, E experts, X examples.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapter.load import load_adapter
from ..base.errors import HotLoraError
from ..base.files import write_json
from ..base.records import read_record
from ..hf.models import NANOS, load_tokenizer
from ..report.published import DATASETS
from ..routing.profile import RoutingProfile
from ..routing.study import Study, load_study, study
from ..runs.folder import data_time, load_base
from ..runs.methods import resolve
from ..runs.options import PROFILE_FRACTION, RunOptions
from ..runs.profiling import profile_data, profile_sample
from ..runs.study import run_study
from ..runs.training import run_training
from ..tasks.data import load_examples
from ..training.config import TrainConfig
from ..training.identity import check_same, same_run
from . import hellora
from . import profile_tables as tables
from .direct import Direct, Tell
from .needs import profile_needs
from .profile_tables import Profiled, WarmUp
from .recipe import Column, model_name
from .result import Result, Shown
from .settings import HELLORA_TASKS, MIXTRAL, OLMOE, QWEN, STANDS_FOR, Setting, source_of

FOLDER = "profiles"
_STUDY, _PROFILE, _WARMED, _SLICE = "study.json", "profile.safetensors", "warmed-up.safetensors", "profile.safetensors"
_PROFILING = ("limit", "batch_size", "max_length", "dtype", "device", "quantize")
# The warm-up is an epoch of a tenth of the data.
_TRAINED = {field.name for field in dataclasses.fields(TrainConfig) if field.metadata["cli"]} - {
    "extend",
    "max_steps",
    "epochs",
}
_NANO_LIMIT = {"limit": 2000}  # as its trainings
_HELLORA_TASKS = tuple(column.data for column in HELLORA_TASKS.values())
# DeepSeek-MoE-16B, the third of MoE-Sieve's models, has code of its own, which hotlora does not run.
_SIEVE_MODELS = (OLMOE, QWEN)


@dataclass(frozen=True, kw_only=True)
class ProfileRecipe(Direct):
    """A table or figure of routing.

    Attributes:
        models: each is profiled on all of the tasks.
        tasks: the papers' data sets.
        stand_ins: the tasks of nano that stand for them; empty on other models.
        sources: task -> what `run` profiles, as `hotlora profile` takes it.
        show: what of the profiles is shown.
        warm_up: the training of HELLoRA's figure 3, of the first model on the first task: options of a run.
    """

    models: Sequence[str]
    tasks: Sequence[str]
    stand_ins: Sequence[str]
    sources: Mapping[str, str]
    show: Callable[[Sequence[Profiled]], Shown]
    warm_up: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self.check_options({*_PROFILING, *(_TRAINED if self.warm_up is not None else ())})

    def needs(self, tflops: float | None = None) -> list[str]:
        lines = profile_needs(self.models, list(self.sources.values()), self._profiling(), tflops)
        if self.warm_up is not None:
            lines.append("and a warm-up: LoRA on all experts for an epoch of a tenth of the data.")
        return lines

    def reads(self) -> list[str]:
        return list(self.sources.values())

    def files(self, output: Path) -> list[tuple[str, Path, Path]]:
        made = [(f"{m} on {task}", _folder(output, m, task), _STUDY) for m in self.models for task in self.sources]
        if self.warm_up is not None:
            made.append(("warm-up", self._warm_up_folder(output, next(iter(self.sources))), _WARMED))
        return [(what, folder, folder / file) for what, folder, file in made]

    def run(self, output: Path, tell: Tell) -> None:
        made = {
            _folder(output, model, task): (model, source)
            for model in self.models for task, source in self.sources.items()
        }  # fmt: skip
        there = {folder for folder in made if (folder / _STUDY).is_file()}
        for folder in there:
            _check_same(folder, *made[folder], self._profiling())
        if self.warm_up is not None:
            self._check_warm_up(output)
        for folder, (model, source) in made.items():
            if folder not in there:
                _profile(model, source, folder, self._profiling(), tell)
        if self.warm_up is not None:
            self._run_warm_up(output, tell)

    def result(self, folder: Path) -> Result | None:
        tasks = self._tasks_in(folder)
        found = [_read(folder, model, tasks) for model in self.models] if tasks else []
        there = [some for some in found if some is not None]
        if not there:
            return None
        if self.warm_up is not None:
            there = [dataclasses.replace(there[0], warm_up=self._read_warm_up(folder, tasks[0]))]
        shown = self.show(there)
        shown.notes += self._missing(folder, tasks)
        return self.over(shown)

    def _profiling(self) -> dict[str, Any]:
        given = {name: value for name, value in self.options.items() if name in _PROFILING}
        return {**(_NANO_LIMIT if NANOS.keys() & set(self.models) else {}), **given}

    def _tasks_in(self, folder: Path) -> list[str]:
        """The tasks of which a store has profiles: the papers' if it has all of them, else nano's."""
        for tasks in (list(self.tasks), list(self.stand_ins)):
            if tasks and all(_is_there(folder, model, task) for model in self.models for task in tasks):
                return tasks
        return [task for task in self.tasks if any(_is_there(folder, model, task) for model in self.models)]

    def _missing(self, folder: Path, tasks: Sequence[str]) -> list[str]:
        wanted = self.tasks if set(tasks) & set(self.tasks) else tasks
        pairs = [(model, task) for model in self.models for task in wanted]
        return [f"{model} on {task}: no profile." for model, task in pairs if not _is_there(folder, model, task)]

    def _warm_up_folder(self, output: Path, task: str) -> Path:
        return _folder(output, self.models[0], f"{task}-warm-up")

    def _warm_up_options(self) -> RunOptions:
        """Its `limit` is of all of the data, of which a tenth is trained on."""
        assert self.warm_up is not None
        return dataclasses.replace(
            resolve(**{**self.warm_up, "model": self.models[0], "data": next(iter(self.sources.values()))}),
            epochs=1, max_steps=None, rule="all", profile_fraction=1.0, evaluate=False, condition="warm-up",
        )  # fmt: skip

    def _check_warm_up(self, output: Path) -> None:
        """HotLoraError: the store holds a warm-up by other options."""
        folder = self._warm_up_folder(output, next(iter(self.sources)))
        if not (folder / _WARMED).is_file():
            return
        made, asked = read_record(folder)["config"], self._warm_up_options().recorded()
        # A record that is older than an option of training lacks it: `check_same` takes its default.
        names = (made.keys() & asked.keys() - {"test_data"}) | {field.name for field in dataclasses.fields(TrainConfig)}
        old, new = ({name: of[name] for name in names if name in of} for of in (made, asked))
        check_same(same_run(old), same_run(new), folder)

    def _run_warm_up(self, output: Path, tell: Tell) -> None:
        """A tenth of the data by the base, and by the model after an epoch of LoRA on all experts (HELLoRA s4.1)."""
        model, (task, source) = self.models[0], next(iter(self.sources.items()))
        folder = self._warm_up_folder(output, task)
        if (folder / _WARMED).is_file():
            return
        options = self._warm_up_options()
        tokenizer = load_tokenizer(model)
        examples = load_examples(source, "train", limit=options.limit, tokenizer=tokenizer)
        number = len(profile_sample(examples, PROFILE_FRACTION))
        tell(f"warm-up of {model} on {number} examples of {task}")
        run_training(dataclasses.replace(options, limit=number), folder)
        some = load_examples(source, "train", limit=number, tokenizer=tokenizer, now=data_time(folder))
        warmed = load_adapter(load_base(model, **options.loading()), folder / "adapter")
        profile = profile_data(
            warmed, tokenizer, some, source, model, batch_size=options.batch_size, max_length=options.max_length
        )
        profile.save(folder / _WARMED)

    def _read_warm_up(self, folder: Path, task: str) -> WarmUp | None:
        made = self._warm_up_folder(folder, task)
        if not (made / _WARMED).is_file():
            return None
        rate = read_record(made)["config"]["learning_rate"]
        return WarmUp(RoutingProfile.load(made / _SLICE), RoutingProfile.load(made / _WARMED), rate)


def _folder(output: Path, model: str, task: str) -> Path:
    return output / FOLDER / Column(task, model, task).folder


def _is_there(output: Path, model: str, task: str) -> bool:
    return (_folder(output, model, task) / _STUDY).is_file()


def _profile(model: str, source: str, folder: Path, options: Mapping[str, Any], tell: Tell) -> None:
    """The profile and, of one data set, the study, which holds how stable subsamples are."""
    tell(f"profiling {model} on {source}")
    found, profiles = run_study([source], model, tell=tell, **options)
    (profile,) = profiles.values()
    profile.save(folder / _PROFILE)
    write_json(folder / _STUDY, found)


def _check_same(folder: Path, model: str, source: str, options: Mapping[str, Any]) -> None:
    found = load_study(folder / _STUDY)
    (row,) = found["datasets"].values()
    given = inspect.signature(run_study).parameters
    names = ("limit", "max_length", "dtype", "quantize", "quantize_linear")
    asked = {name: options.get(name, given[name].default) for name in names}
    here = {name: found["settings"].get(name, given[name].default) for name in names}
    asked |= {"model": model, "data": source}
    here |= {"model": found["model"]["name"], "data": row["data"]}
    for name, value in asked.items():
        if here[name] != value:
            raise HotLoraError(
                f"{folder} holds a profile with {name} {here[name]!r}, and {value!r} is asked for: delete the folder, "
                "or give another --output."
            )


def _read(output: Path, model: str, tasks: Sequence[str]) -> Profiled | None:
    there = [task for task in tasks if _is_there(output, model, task)]
    if not there:
        return None
    parts = {task: load_study(_folder(output, model, task) / _STUDY) for task in there}
    profiles = {task: RoutingProfile.load(_folder(output, model, task) / _PROFILE) for task in there}
    whole: Study = study(profiles, shared=max(part["model"]["shared"] for part in parts.values()))
    for task, part in parts.items():
        (whole["datasets"][task],) = part["datasets"].values()
    return Profiled(model_name(model), whole, profiles)


def _recipe(
    title: str, where: str, show: Callable[[Sequence[Profiled]], Shown], models: Sequence[str], tasks: Sequence[str],
    warm_up: Callable[[Setting], Mapping[str, Any]] | None = None,
) -> Callable[[str, Setting], ProfileRecipe]:  # fmt: skip
    """What makes a recipe of a name in a setting: on the setting's model and data, or on nano's tasks."""

    def make(name: str, setting: Setting) -> ProfileRecipe:
        sources, stand_ins = {task: source_of(task, setting) for task in tasks}, []
        if setting.is_nano:
            papers = [task.removesuffix("-lori") for task in tasks]
            stand_ins = list(dict.fromkeys(STANDS_FOR[task] for task in papers if task in STANDS_FOR))
            given = {task: setting.sources.get(task) or setting.sources.get(f"{task}-lori") for task in papers}
            own = {task: task for task in stand_ins}
            sources = {task: f"{task}:{path}" for task, path in given.items()} if all(given.values()) else own
        return ProfileRecipe(
            name, title, where, setting.options, models=setting.models(*models),
            tasks=papers if setting.is_nano else tasks, stand_ins=stand_ins, sources=sources, show=show,
            warm_up=None if warm_up is None else warm_up(setting),
        )  # fmt: skip

    return make


def _lora(setting: Setting) -> Mapping[str, Any]:
    """The options of table 2's LoRA on the first task."""
    table = hellora.table_2(setting)
    row = next(row for row in table.rows if row.name == "lora")
    return table.options(row, table.columns[0])


HELLORA = {
    "hellora-figure-1": _recipe("Load of a layer's experts, and by index over all layers",
                                "HELLoRA, section 1, figure 1", tables.layer_and_global, [OLMOE], _HELLORA_TASKS[:1]),
    "hellora-figure-3": _recipe("Hot experts of the warm-up against the real ones", "HELLoRA, section 4.1, figure 3",
                                tables.warm_up, [OLMOE], _HELLORA_TASKS[:1], _lora),
    "hellora-figure-4": _recipe("Loads of experts in five layers on three tasks", "HELLoRA, section 4.2, figure 4",
                                tables.five_layers, [OLMOE], _HELLORA_TASKS),
    "hellora-figure-6": _recipe("Loads of experts in five layers on three tasks, Mixtral",
                                "HELLoRA, appendix B, figure 6", tables.five_layers, [MIXTRAL], _HELLORA_TASKS),
}  # fmt: skip
MOE_SIEVE = {
    "moe-sieve-table-2": _recipe("Skew inside layers and over all layers", "MoE-Sieve, section 3.1, table 2",
                                 tables.skew, _SIEVE_MODELS, DATASETS),
    "moe-sieve-table-7": _recipe("Layer by layer on Spider", "MoE-Sieve, appendix A.1, table 7", tables.by_layer,
                                 [OLMOE], ["spider"]),
    "moe-sieve-table-9": _recipe("The same number of experts in each layer, or greedily spread",
                                 "MoE-Sieve, appendix C, table 9", tables.greedy, [OLMOE], ["gsm8k"]),
    "moe-sieve-figure-1": _recipe("Layer CV over global CV", "MoE-Sieve, section 3.1, figure 1", tables.ratios,
                                  _SIEVE_MODELS, DATASETS),
    "moe-sieve-figure-2": _recipe("Coverage of a token by the busiest experts", "MoE-Sieve, section 3.2, figure 2",
                                  tables.coverage, _SIEVE_MODELS, DATASETS),
    "moe-sieve-figure-3": _recipe("Overlap of the hot experts of two data sets", "MoE-Sieve, section 3.2, figure 3",
                                  tables.overlaps, [OLMOE], DATASETS),
    "moe-sieve-figure-5": _recipe("Load of all experts on all data sets", "MoE-Sieve, appendix A.2, figure 5",
                                  tables.heat_maps, [OLMOE], DATASETS),
    "moe-sieve-figure-6": _recipe("Hot experts of a tenth of the examples", "MoE-Sieve, appendix A.3, figure 6",
                                  tables.stability, _SIEVE_MODELS, DATASETS),
}  # fmt: skip
