"""Recipes that need no run: hyperparameters, and models' shapes from their configs."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.errors import HotLoraError
from ..base.files import read_json, write_json
from ..cost.estimate import meta_model, sized_config
from ..hf.experts_view import ExpertsView
from ..hf.models import config_file
from ..hf.moe_layers import moe_layers, num_experts_per_tok, unwrap
from ..report import text
from ..report.published import MODELS
from ..runs.methods import METHODS
from ..runs.options import RunOptions
from ..runs.study import shared_experts
from . import hellora
from .direct import Direct, Tell, holds_another
from .recipe import Recipe, model_folder, model_name
from .result import Result, Shown
from .settings import OLMOE, QWEN, Setting, check_set

FOLDER = "configs"
_NUMBERS = ("layers", "num_experts", "shared", "num_experts_per_tok")


@dataclass(frozen=True, kw_only=True)
class HyperparameterTable(Direct):
    """HELLoRA's table 1, beside what its recipes train with."""

    trainings: Recipe

    def __post_init__(self) -> None:
        check_set(self.trainings, self.options)

    def needs(self, tflops: float | None = None) -> list[str]:
        return ["nothing: no run, no network"]

    def result(self, folder: Path) -> Result:
        shown = Shown(["", "published", "here"], texts=3, notes=[
            "LoRI's own hyperparameters stand for its methods here (arXiv 2504.07448); the table has them as others.",
            "Here: the recipes' own. What `--set` changed of runs is in their records.",
        ])  # fmt: skip
        for name, published, here in self._lines():
            shown.add([name, published, here], name=name, published=published, here=here)
        return self.over(shown)

    def _lines(self) -> list[tuple[str, str, str]]:
        def of(column: int, get: Callable[[RunOptions], Any]) -> str:
            return _grouped({label: get(options) for label, options in self._options(column).items()})

        def field_of(name: str, column: int = 0) -> str:
            return of(column, lambda options: getattr(options, name))

        epochs = "max_steps" if self._options(0)["LoRA"].max_steps is not None else "epochs"
        told = "steps" if epochs == "max_steps" else "epochs"
        k = METHODS["hellora"]["experts_per_layer"]
        return [
            ("adapter rank", "32", field_of("r")),
            ("batch size", "256 for FFT, 128 for others", field_of("batch_size")),
            ("learning rate, math", "4e-05 for FFT, 0.0004 for others", field_of("learning_rate")),
            ("learning rate, code", "0.0002 for FFT, 0.002 for others", field_of("learning_rate", 1)),
            ("learning rate, safety", "2e-05 for FFT, 0.0004 for others", field_of("learning_rate", 2)),
            (f"{told}, math", "3 epochs", field_of(epochs)),
            (f"{told}, code", "2 epochs", field_of(epochs, 1)),
            (f"{told}, safety", "1 epoch", field_of(epochs, 2)),
            ("samples to find hot experts", "10%", of(0, lambda options: f"{options.share_profiled:.0%}")),
            ("hot experts of a layer", "8", "the router's own K" if k == "top_k" else str(k)),
            ("scaling α", "64", field_of("lora_alpha")),
            ("seeds", "10", str(len(self.trainings.seeds))),
        ]

    def _options(self, column: int) -> dict[str, RunOptions]:
        """A method's label -> a run's resolved options."""
        place = self.trainings.columns[column]
        return {row.label: self.trainings.resolved(row, place) for row in self.trainings.rows if row.method}


@dataclass(frozen=True, kw_only=True)
class ShapeTable(Direct):
    """MoE-Sieve's table of models."""

    models: Sequence[str]

    def __post_init__(self) -> None:
        self.check_options(())

    def needs(self, tflops: float | None = None) -> list[str]:
        lines = ["no run, only configs"]
        for model in self.models:
            try:
                lines.append(f"{model}: {config_file(model)}")
            except HotLoraError as error:
                lines.append(str(error))
        return lines

    def files(self, output: Path) -> list[tuple[str, Path, Path]]:
        files = {model: output / FOLDER / f"{model_folder(model)}.json" for model in self.models}
        return [(f"shape of {model}", file, file) for model, file in files.items()]

    def run(self, output: Path, tell: Tell) -> None:
        for model, (what, _, file) in zip(self.models, self.files(output), strict=True):
            if not file.is_file():
                tell(what)
                write_json(file, {"model": model, **shape(config_file(model))})
            elif (made := read_json(file).get("model", model)) != model:
                raise holds_another(file, "the shape of", made, model)

    def result(self, folder: Path) -> Result | None:
        files = zip(self.models, self.files(folder), strict=True)
        there = {model: read_json(file) for model, (*_, file) in files if file.is_file()}
        there = {model: found for model, found in there.items() if found.get("model", model) == model}
        if not there:
            return None
        shown = Shown(["", "MoE layers", "routed", "shared", "top-K", "expert / FFN"], notes=[
            "Shared experts are counted in routed ones' widths. Expert / FFN is an expert's width over the config's "
            "intermediate_size; OLMoE's experts are its whole FFN.",
            "DeepSeek-MoE-16B needs code of its own, which hotlora does not run.",
        ])  # fmt: skip
        lines = [(f"{model_name(model)} (here)", found) for model, found in there.items()]
        lines += [(f"{name} (paper)", row) for name, row in MODELS.items()]
        for label, found in lines:
            numbers = {key: found[key] for key in (*_NUMBERS, "expert_to_ffn")}
            cells = [f"{found[key]:g}" for key in _NUMBERS]
            shown.add([label, *cells, text.shown(found["expert_to_ffn"], ".2f")], model=label, **numbers)
        return self.over(shown)


def shape(file: str) -> dict[str, float | None]:
    """A model's MoE layers, from its config alone."""
    config = sized_config(file)
    model = meta_model(config)
    layers = moe_layers(model)
    width = ExpertsView(unwrap(model.get_submodule(layers[0].experts))).widths[1]
    ffn = getattr(config.get_text_config(), "intermediate_size", None)
    return {
        "layers": len(layers),
        "num_experts": layers[0].num_experts,
        "shared": shared_experts(model),
        "num_experts_per_tok": num_experts_per_tok(model),
        "expert_to_ffn": width / ffn if ffn else None,
    }


def _grouped(values: Mapping[str, Any]) -> str:
    """ "4e-05 for FFT, 0.0004 for others": the most frequent value is the others'."""
    common = Counter(values.values()).most_common(1)[0][0]
    groups: dict[Any, list[str]] = {}
    for label, value in values.items():
        if value != common:
            groups.setdefault(value, []).append(label)
    told = [f"{_plain(value)} for {' and '.join(labels)}" for value, labels in groups.items()]
    return ", ".join([*told, f"{_plain(common)} for others"]) if told else _plain(common)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _hyperparameters(name: str, setting: Setting) -> HyperparameterTable:
    where = "HELLoRA, section 4.1, table 1"
    return HyperparameterTable(name, "Hyperparameters", where, setting.options, trainings=hellora.table_2(setting))


def _shapes(name: str, setting: Setting) -> ShapeTable:
    where = "MoE-Sieve, section 3.1, its first table"
    return ShapeTable(name, "The models", where, setting.options, models=setting.models(OLMOE, QWEN))


HELLORA = {"hellora-table-1": _hyperparameters}
MOE_SIEVE = {"moe-sieve-table-1": _shapes}
