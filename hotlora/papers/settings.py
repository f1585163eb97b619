"""On what a paper's tables are made: its models, tasks and hyperparameters, or nano and its own."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

from ..base.errors import HotLoraError
from ..base.options import ALIASES, twice
from ..hf.models import NANOS
from ..runs.methods import METHODS, MOE_SIEVE, PLACEMENTS
from ..runs.options import BUDGETS, DataOptions, RunOptions
from ..runs.sweep_runs import SAMPLING
from .recipe import Column, Recipe, Row

EXAMPLE = "--set max_steps=300, or on one task --set gsm8k.max_steps=300"
OLMOE = "allenai/OLMoE-1B-7B-0924"
MIXTRAL = "mistralai/Mixtral-8x7B-v0.1"
QWEN = "Qwen/Qwen1.5-MoE-A2.7B"

# LoRI's protocol, which HELLoRA's numbers appear to come from.
_SAMPLED = {"samples": 20, "temperature": 0.2, "top_p": 0.95}
HELLORA_TASKS = {
    "GSM8K": Column("GSM8K", OLMOE, "gsm8k-lori", "math"),
    "HUMAN": Column("HUMAN", OLMOE, "codealpaca-lori", "code", scored={"data": "humaneval-lori", **_SAMPLED}),
    "SAFE": Column("SAFE", OLMOE, "saferpaca-lori", "safety", scored={"data": "hexphi-lori"}),
}
# Of HellaSwag's 39,905 training rows its code takes about 7,500.
_CUT = {"HellaSwag": {"limit": 7500}}
SIEVE_TASKS = {
    name: Column(name, OLMOE, name.lower(), options=_CUT.get(name, {})) for name in ("Spider", "GSM8K", "HellaSwag")
}
STANDS_FOR = {
    "gsm8k": "nano-math", "spider": "nano-sql", "codealpaca": "nano-sql", "saferpaca": "nano-choice",
    "hellaswag": "nano-choice",
}  # fmt: skip
"""a paper's data set -> nano's task"""

LABELS = {
    "fft": "FFT", "lora": "LoRA", "dora": "DoRA", "lori-d": "LoRI-D", "lori-s": "LoRI-S", "hellora": "HELLoRA",
    "hellori-d": "HELLoRI-D", "hellori-s": "HELLoRI-S",
}  # fmt: skip
"""methods as HELLoRA prints them"""

# HELLoRA's table 1 has a number of seeds, MoE-Sieve's released runs have these.
SEEDS: dict[str, Sequence[int]] = {"hellora": range(10), "moe-sieve": (42, 99, 123, 456, 777, 789, 2026, 6969)}
NANO_SEEDS: dict[str, Sequence[int]] = {"hellora": range(3), "moe-sieve": range(8)}

# The best of a grid on nano-math with a seed of its own (docs/log.md).
NANO_RATES = {
    "fft": 1e-3, "lora": 8e-3, "dora": 8e-3, "lori-d": 1.6e-2, "lori-s": 6.4e-2, "hellora": 8e-3, "hellori-d": 1.6e-2,
    "hellori-s": 6.4e-2, "sieve": 8e-3, "esft": 3e-3,
}  # fmt: skip
# As many as tell methods apart: with more, LoRA on all experts is right in all of nano-sql.
_NANO_STEPS = {"nano-math": 60, "nano-sql": 40, "nano-choice": 80}
_NANO = {
    "batch_size": 16, "lr_scheduler": "linear", "warmup_ratio": 0.1, "r": 8, "lora_alpha": 16,
    "max_length": 256, "limit": 2000, "test_limit": 200, "profile_fraction": 1.0,
}  # fmt: skip

_FLAGS = {"model": "--model MODEL", "data": "--data TASK=FILES", "output": "--output FOLDER"}
"""what other flags of `hotlora sweep` say"""
_SEEDS = "--seeds NUMBER"
# What a row is: its method, and what only a method's name sets.
_OF_ROWS = {"method", "preset", "rule", "plan"} | {f.name for f in fields(RunOptions) if not f.metadata["cli"]}

# Of a training's options those that a run that only scores reads, too (`runs.sweep`).
_SCORING = {
    "test_data", "test_split", "test_limit", "limit", "max_length", "eval_batch_size", "dtype", "device",
    "attn_implementation", "offload", "offload_folder", *(field.name for field in fields(DataOptions)),
}  # fmt: skip
_OF_BASE = {"on_top_of", "quantize", "quantize_linear"}  # an adapter brings these along from its training


@dataclass(frozen=True)
class Setting:
    """What a user may say of a recipe.

    Attributes:
        model: in place of the paper's; nano or nano-qwen brings its own tasks, hyperparameters and number of seeds.
        sources: task name -> local files or a hub id, for those that are not on the hub under their own name.
        seeds: how many; None: as many as the paper has.
        options: of every run, before everything else; TASK.NAME: of the runs on that task, before these.

    HotLoraError: an option without its name or task, twice, or one that another of these says.
    """

    model: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    seeds: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names: dict[str, str] = {}
        for given in self.options:
            task, dot, name = given.rpartition(".")
            if not name or (dot and not task):
                raise HotLoraError(f"--set {given} names no option: give it as in {EXAMPLE}.")
            ours = ALIASES.get(name, name)
            if ours in _FLAGS:
                raise _instead(given, _FLAGS[ours])
            if (key := f"{task_called(task)}{dot}{ours}") in names:
                raise twice(names[key], given)
            names[key] = given
        object.__setattr__(self, "options", {name: self.options[given] for name, given in names.items()})

    @property
    def is_nano(self) -> bool:
        return self.model in NANOS

    def options_on(self, data: str) -> dict[str, Any]:
        """`options` of the runs on one task, which is named as `--data` has it."""
        task = task_called(data)
        parts = [(name.rpartition("."), value) for name, value in self.options.items()]
        return {name: value for of in ("", task) for (one, _, name), value in parts if one == of}

    def models(self, *papers: str) -> tuple[str, ...]:
        """The user's, else the paper's."""
        return papers if self.model is None else (self.model,)


def recipe(
    title: str, where: str, columns: Sequence[Column], rows: Sequence[Row], **rest: Any
) -> Callable[[str, Setting], Recipe]:
    """What makes a recipe of a name, such as hellora-table-2, in a setting: its columns are put on the setting's model
    and data, and each cell gets its hyperparameters. Columns of one task on several models are one on a user's model.
    """

    def make(name: str, setting: Setting) -> Recipe:
        paper = "hellora" if name.startswith("hellora") else "moe-sieve"
        own: dict[str, Column] = {}  # of several models the first, whose numbers the rows have under a task's own name
        for column in columns:
            own.setdefault(column.data, replace(column, name=column.name.split()[-1]))
        placed = [_placed(column, setting) for column in (columns if setting.model is None else own.values())]
        if setting.seeds is not None and setting.seeds < 1:
            raise HotLoraError(f"seeds is {setting.seeds}: it must be 1 or more.")
        known = (NANO_SEEDS if setting.is_nano else SEEDS)[paper]
        further = (seed for seed in itertools.count() if seed not in known)
        seeds = list(itertools.islice(itertools.chain(known, further), setting.seeds or len(known)))
        tasks = dict.fromkeys(task_called(column.data) for column in placed)
        if others := sorted({name.rpartition(".")[0] for name in setting.options} - {"", *tasks}):
            raise HotLoraError(f"{name} has no runs on {others[0]}, whose options are set: it has {', '.join(tasks)}.")
        options, scoring = partial(_options, paper, setting), partial(_scoring, setting)
        return Recipe(name, title, where, placed, rows, seeds, options, scoring, **rest)

    return make


def check_set(trainings: Recipe, options: Mapping[str, Any]) -> None:
    """HotLoraError: `--set` says which seeds, or what the recipe's rows are, or what no recipe's run has."""
    of_rows = _OF_ROWS | _said_by(trainings.rows)
    for given in options:
        option = given.rpartition(".")[2]
        if option in ("seed", "seeds"):
            raise _instead(given, _SEEDS)
        if option in of_rows:
            raise HotLoraError(
                f"--set does not take {given}: the rows of {trainings.name} say that themselves. Leave it out, or "
                "write a sweep of your own (docs/sweep.md)."
            )
        if option == "extend":
            raise HotLoraError(
                f"--set does not take {given}: a recipe's runs are not trained on. Give max_steps or epochs, and "
                "another --output."
            )
        if option in SAMPLING:
            _check_sampling(trainings, given)


def _said_by(rows: Sequence[Row]) -> set[str]:
    """Options in which rows differ, by their own or by their method's and placement's; any budget where one does."""
    trained = [row for row in rows if row.method]
    placed = {name for row in trained if "placement" in row.options for name in ("placement", *PLACEMENTS["pure"])}
    says = [
        {**METHODS[row.method or ""], **PLACEMENTS[row.options.get("placement", "full")], **row.options}
        for row in trained
    ]
    names = {name for options in says for name in options}
    differ = {name for name in names if any(options.get(name) != says[0].get(name) for options in says)}
    own = {name for row in trained for name in row.options}
    return placed | differ | (set(BUDGETS) if (differ | own) & set(BUDGETS) else set())


def _check_sampling(trainings: Recipe, given: str) -> None:
    """Trainings answer greedily: how answers are drawn is for columns that runs of their own score."""
    task, _, option = given.rpartition(".")
    tasks = {task_called(column.data): column.scored is not None for column in trainings.columns}
    if greedy := [name for name, is_drawn in tasks.items() if task in ("", name) and not is_drawn]:
        others = [name for name, is_drawn in tasks.items() if is_drawn]
        fix = f"Give {', '.join(f'{name}.{option}' for name in others)}." if others else "Leave it out."
        raise HotLoraError(
            f"--set does not take {given}: on {', '.join(greedy)} the trainings of {trainings.name} answer greedily. "
            f"{fix}"
        )


def _instead(given: str, flag: str) -> HotLoraError:
    return HotLoraError(f"--set does not take {given}: give {flag} in its place.")


def _placed(column: Column, setting: Setting) -> Column:
    model = setting.model or column.model
    column = replace(column, printed_of=column.model)
    if setting.is_nano:
        return replace(column, model=model, data=STANDS_FOR[column.data.removesuffix("-lori")], scored=None, options={})
    scored = column.scored and {**column.scored, "data": source_of(column.scored["data"], setting)}
    return replace(column, model=model, data=source_of(column.data, setting), scored=scored)


def task_called(data: str) -> str:
    """What a user calls a paper's task: gsm8k, whoever's prompt it is in."""
    return data.partition(":")[0].removesuffix("-lori")


def source_of(data: str, setting: Setting) -> str:
    """A task with the user's files for it, as `load_examples` takes it."""
    source = setting.sources.get(data, setting.sources.get(task_called(data)))
    return data if source is None else f"{data}:{source}"


def _options(paper: str, setting: Setting, row: Row, column: Column) -> dict[str, Any]:
    assert row.method is not None
    if setting.is_nano:
        steps = _NANO_STEPS[column.data]
        given = {"method": row.method, **_NANO, "learning_rate": NANO_RATES[row.method]}
        given |= {"max_steps": steps, "save_steps": steps}
        if METHODS[row.method].get("keep"):
            given["dense_learning_rate"] = NANO_RATES[row.method.removesuffix("-s") + "-d"]
    elif paper == "hellora":
        given = {"preset": f"{row.method}-{column.domain}"}
    else:
        given = {"method": row.method, **MOE_SIEVE}
    own = {name: value for name, value in setting.options_on(column.data).items() if name not in SAMPLING}
    return {**given, **row.options, **own}


def _scoring(setting: Setting, row: Row, column: Column) -> dict[str, Any]:
    read = _SCORING | (_OF_BASE if row.method is None else set()) | (set(SAMPLING) if column.scored else set())
    return {name: value for name, value in setting.options_on(column.data).items() if name in read}
