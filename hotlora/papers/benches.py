"""Recipes that `bench` makes: throughput of the papers' methods. Weights are random; only the model's config is read.

Contenders of one bench take turns step by step, so their ratios hold on a machine whose speed drifts. HELLoRA's three
placements are a bench each: all eighteen at once would need as much memory as all of their optimizers.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..adapter.count import parameters_from_config
from ..base.files import write_json
from ..bench.bench import run_bench
from ..bench.contenders import BenchConfig
from ..bench.report import read_result
from ..report.comparison_table import NONE
from ..report.figures import COLD, HOT, INK, WIDTH, style
from ..report.published import COST, HELLORA_SPEEDUP, SAVED, THROUGHPUT
from ..report.tables import human_seconds
from ..runs.methods import counted_options
from .direct import Direct, Tell
from .needs import bench_needs, config_file, number_of
from .recipe import Column
from .result import Result
from .settings import OLMOE, QWEN, Setting

FOLDER = "benches"
_PLACEMENTS = ("pure", "gate", "full")
_LABELS = {
    "fft": "FFT", "lora": "LoRA", "lori-d": "LoRI-D", "lori-s": "LoRI-S", "hellora": "HELLoRA",
    "hellori-d": "HELLoRI-D", "hellori-s": "HELLoRI-S",
}  # fmt: skip
# On a GPU as many tokens as keep it busy; a sequence is as long as the trainings' may be.
_LARGE = {"tokens": 8192, "length": 512}
_NANO = {"tokens": 2048, "length": 256, "r": 8}
_BYTES = 4  # adapters are kept in float32
_COST_NOTES = [
    "Checkpoints are counted at four bytes a parameter.",
    "The paper's savings are as it prints them; its checkpoints' sizes give 72.8% and 70.3%.",
]
_NOT_OPTIONS = ("model", "contenders", "fractions")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class BenchRecipe(Direct):
    """A table or figure of throughput, or of cost.

    Attributes:
        models: each is timed.
        benches: name of a bench -> its contenders.
        settings: of `BenchConfig`, where the user gives none.
        view: "table", "figure" or "cost".
    """

    models: Sequence[str] = ()
    benches: Mapping[str, Sequence[str]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    view: str = "table"

    def __post_init__(self) -> None:
        names = {field.name for field in dataclasses.fields(BenchConfig)} - set(_NOT_OPTIONS)
        self.check_options(names)

    def needs(self, tflops: float | None = None) -> list[str]:
        kinds = [kind for contenders in self.benches.values() for kind in contenders]
        benches = number_of(len(self.models) * len(self.benches), "bench", "benches")
        lines = [
            f"{benches} of {len(kinds) * len(self.models)} contenders in all",
            "an idle machine, for what else runs is timed too; random weights, no data",
        ]
        for model in self.models:
            lines += bench_needs(model, self._options(), kinds)
        return lines

    def state(self, output: Path) -> list[tuple[str, Path, str]]:
        files = [
            (f"{model}, {name}", _file(output, model, name)) for model in self.models for name in self.benches
        ]  # fmt: skip
        return [(what, file, "done" if file.is_file() else "new") for what, file in files]

    def run(self, output: Path, tell: Tell) -> None:
        for model in self.models:
            for name, contenders in self.benches.items():
                file = _file(output, model, name)
                if file.is_file():
                    continue
                tell(f"bench {name} of {model}")
                config = BenchConfig(config_file(model), contenders=tuple(contenders), **self._options())
                result = run_bench(config, tell=tell)
                result["recipe"] = {"model": model, "counts": self.counts(model, contenders, config.r)}
                write_json(file, result)

    def result(self, folder: Path) -> Result | None:
        found = {
            (model, name): read_result(file)
            for model in self.models for name in self.benches
            if (file := _file(folder, model, name)).is_file()
        }  # fmt: skip
        if not found:
            return None
        made = {"table": self._throughput, "figure": self._figure, "cost": self._cost}[self.view](found)
        columns, rows, numbers, figures = made
        notes = [_words(key, result) for key, result in found.items()]
        notes += _COST_NOTES if self.view == "cost" else []
        lacking = [f"{model}, {name}: no bench." for model in self.models for name in self.benches
                   if (model, name) not in found]  # fmt: skip
        failed = [
            f"{row['name']}: {row['reason']}" for result in found.values() for row in result["contenders"]
            if row["status"] != "done"
        ]  # fmt: skip
        return Result(self.name, self.title, self.where, columns, rows, numbers, [*notes, *lacking, *failed], figures)

    def _options(self) -> dict[str, Any]:
        return {**self.settings, **self.options}

    def counts(self, model: str, contenders: Sequence[str], r: int) -> dict[str, int]:
        """Contender -> trained parameters, by the whole model's config."""
        file, counts = config_file(model), {}
        for kind in contenders:
            method, placement = _parts(kind)
            options = counted_options(method, placement)
            options = options if options.get("full") else {**options, "r": r}
            counts[kind] = int(parameters_from_config(file, **options)["trainable"])
        return counts

    def _throughput(self, found: Mapping[tuple[str, str], Row]) -> tuple[Any, Any, Any, Any]:
        """HELLoRA's table 6: methods by placements, each also over LoRA in the same placement."""
        columns = ["", "trained"]
        for placement in ("_pure", "_gate", "all"):
            columns += [f"{placement}: tokens/s", "× LoRA", "published: samples/s", "× LoRA"]
        rows, numbers = [], []
        for method, published in THROUGHPUT.items():
            counted: int | None = None
            cells = []
            for placement, printed, reference in zip(_PLACEMENTS, published, THROUGHPUT["lora"], strict=True):
                bench = found.get((self.models[0], f"hellora-{placement}"))
                kind = _kind(method, placement)
                row, lora = _row(bench, kind), _row(bench, _kind("lora", placement))
                ratio = over(row, lora)
                counted = bench["recipe"]["counts"].get(kind) if bench else counted
                cells += [_rate(row), _times(ratio), f"{printed:.2f}", f"{printed / reference:.2f}"]
                numbers.append({
                    "method": method, "placement": placement, "tokens_per_second": _speed(row),
                    "over_lora": ratio, "published_samples_per_second": printed,
                    "published_over_lora": printed / reference,
                })  # fmt: skip
            rows.append([_LABELS[method], NONE if counted is None else f"{counted:,}", *cells])
        return columns, rows, numbers, {}

    def _figure(self, found: Mapping[tuple[str, str], Row]) -> tuple[Any, Any, Any, Any]:
        """HELLoRA's figure 5: every method with all of its adapters, and full fine-tuning."""
        (bench,) = found.values()
        rows, numbers, bars = [], [], {}
        lora, fft = _row(bench, "lora"), _row(bench, "fft")
        for method, label in _LABELS.items():
            row = _row(bench, method)
            printed = THROUGHPUT.get(method, (None, None, None))[2]
            ratios = over(row, lora), over(row, fft)
            shown = NONE if printed is None else f"{printed:.2f}"
            rows.append([label, _rate(row), *map(_times, ratios), shown])
            numbers.append({
                "method": method, "tokens_per_second": _speed(row), "over_lora": ratios[0], "over_fft": ratios[1],
                "published_samples_per_second": printed,
            })  # fmt: skip
            if row is not None:
                bars[label] = [bench["settings"]["tokens"] / second for second in row["seconds"]["step"]["all"]]
        told = HELLORA_SPEEDUP
        rows.append(["published, HELLoRA", NONE, f"{told['lora']:.2f}", f"{told['fft']:.1f}", NONE])
        columns = ["", "tokens/s", "× LoRA", "× FFT", "published: samples/s (table 6)"]
        return columns, rows, numbers, {"": throughput_figure(bars)}

    def _cost(self, found: Mapping[tuple[str, str], Row]) -> tuple[Any, Any, Any, Any]:
        """MoE-Sieve's table 4: parameters, checkpoint and time of all experts and of the hot quarter."""
        lines: list[tuple[str, dict[str, Sequence[float | None]], Mapping[str, float]]] = []
        for (model, _), bench in found.items():
            full, hot = (bench["recipe"]["counts"][kind] for kind in ("lora", "sieve"))
            timed = (_row(bench, "lora"), _row(bench, "sieve"))
            seconds = [None if row is None else row["seconds"]["step"]["median"] for row in timed]
            lines.append((f"{Path(model).name} (here)", {
                "parameters": (full, hot), "bytes": (_BYTES * full, _BYTES * hot), "seconds": seconds,
            }, {}))  # fmt: skip
        lines += [(f"{model} (paper)", dict(cost), SAVED[model]) for model, cost in COST.items()]
        rows, numbers = [], []
        for label, cost, printed in lines:
            cells, number = [], {"model": label}
            for what, (full, hot) in cost.items():
                saved = printed.get(what, None if full is None or hot is None else 1 - hot / full)
                cells += [_arrow(what, full, hot), NONE if saved is None else f"{saved:.1%}"]
                number |= {f"{what}_all": full, f"{what}_hot": hot, f"{what}_saved": saved}  # type: ignore[dict-item]
            rows.append([label, *cells])
            numbers.append(number)
        columns = ["", "parameters, all → hot", "saved", "checkpoint", "saved", "time (here of a step)", "saved"]
        return columns, rows, numbers, {}


def over(row: Row | None, other: Row | None) -> float | None:
    """How many times as fast a contender is: the median of the ratios within rounds."""
    if row is None or other is None:
        return None
    pairs = zip(row["seconds"]["step"]["all"], other["seconds"]["step"]["all"], strict=True)
    return statistics.median(theirs / ours for ours, theirs in pairs)


def throughput_figure(bars: Mapping[str, Sequence[float]]) -> Figure:
    """Tokens a second of each method: the median, and all rounds as dots."""
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    style(axes)
    for x, (label, values) in enumerate(bars.items()):
        axes.bar(x, statistics.median(values), color=HOT if label.startswith("HELL") else COLD, width=0.62)
        axes.plot([x] * len(values), values, "o", color=INK, markersize=3)
    axes.set_xticks(range(len(bars)), list(bars))
    axes.set_ylabel("tokens a second", color=INK)
    return figure


def _file(output: Path, model: str, name: str) -> Path:
    return output / FOLDER / Column(name, model, name).folder.split("/")[0] / f"{name}.json"


def _kind(method: str, placement: str) -> str:
    return method if placement == "full" else f"{method}-{placement}"


def _parts(kind: str) -> tuple[str, str]:
    method, _, placement = kind.rpartition("-")
    return (method, placement) if placement in _PLACEMENTS else (kind, "full")


def _row(bench: Row | None, kind: str) -> Row | None:
    rows = [] if bench is None else bench["contenders"]
    return next((row for row in rows if row["name"] == kind and row["status"] == "done"), None)


def _speed(row: Row | None) -> float | None:
    return None if row is None else row["tokens_per_second"]


def _rate(row: Row | None) -> str:
    return NONE if row is None else f"{row['tokens_per_second']:,.0f}"


def _times(ratio: float | None) -> str:
    return NONE if ratio is None else f"{ratio:.2f}"


def _arrow(what: str, full: float | None, hot: float | None) -> str:
    if full is None or hot is None:
        return NONE
    if what == "parameters":
        return f"{full / 1e6:,.1f}M → {hot / 1e6:,.1f}M"
    if what == "bytes":
        return f"{full / 1e6:,.0f} MB → {hot / 1e6:,.0f} MB"
    if full >= 60:
        return f"{human_seconds(full)} → {human_seconds(hot)}"
    return f"{full:.3g} s → {hot:.3g} s"


def _words(key: tuple[str, str], result: Row) -> str:
    settings, rounds = result["settings"], result["settings"]["rounds"]
    return (
        f"{key[0]}, bench {key[1]}: {result['environment']['device']}, {settings['dtype']}, {settings['tokens']:,} "
        f"tokens a step in sequences of {settings['length']}, rank {settings['r']}, {rounds} rounds in turn, random "
        "weights, no dropout, routers skewed to a CV of "
        f"{result['routing']['cv']:.2f}. Ratios are medians over rounds."
    )


def _make(
    paper: str, setting: Setting, name: str, title: str, where: str, models: Sequence[str],
    benches: Mapping[str, Sequence[str]], view: str,
) -> BenchRecipe:  # fmt: skip
    models = models if setting.model is None else (setting.model,)
    return BenchRecipe(
        f"{paper}-{name}", title, where, setting.options, models, benches, _NANO if setting.is_nano else _LARGE, view
    )


def _hellora_bench(placement: str) -> list[str]:
    return [_kind(method, placement) for method in THROUGHPUT] + (["fft"] if placement == "full" else [])


def hellora_table_6(setting: Setting) -> BenchRecipe:
    """Methods by what is adapted beside the experts."""
    benches = {f"hellora-{placement}": _hellora_bench(placement) for placement in _PLACEMENTS}
    return _make(
        "hellora", setting, "table-6", "Throughput by what is adapted", "HELLoRA, section 4.5.2, table 6", [OLMOE],
        benches, "table",
    )  # fmt: skip


def hellora_figure_5(setting: Setting) -> BenchRecipe:
    """Methods with all of their adapters, and full fine-tuning."""
    return _make(
        "hellora", setting, "figure-5", "Throughput of the methods", "HELLoRA, section 4.4, figure 5", [OLMOE],
        {"hellora-full": _hellora_bench("full")}, "figure",
    )  # fmt: skip


def sieve_table_4(setting: Setting) -> BenchRecipe:
    """What the hot quarter saves."""
    return _make(
        "moe-sieve", setting, "table-4", "What the hot quarter saves", "MoE-Sieve, section 5.2, table 4",
        [OLMOE, QWEN], {"moe-sieve": ["lora", "sieve"]}, "cost",
    )  # fmt: skip


HELLORA = {"table-6": hellora_table_6, "figure-5": hellora_figure_5}
MOE_SIEVE = {"table-4": sieve_table_4}
