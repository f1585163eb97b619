"""Recipes that `bench` makes: throughput of the papers' methods. Weights are random; only the model's config is read.

Contenders of one bench take turns step by step, so their ratios hold on a machine whose speed drifts. HELLoRA's three
placements are a bench each: all eighteen at once would need as much memory as all of their optimizers.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapter.count import parameters_from_config
from ..base.files import write_json
from ..bench.bench import run_bench
from ..bench.contenders import BenchConfig, Contender
from ..bench.report import read_result
from ..cost.estimate import sized_config
from ..hf.models import config_file
from ..report.figures import COLD, HOT, INK, WIDTH, Figure, style
from ..report.published import COST, HELLORA_SPEEDUP, SAVED, THROUGHPUT
from ..report.text import NONE, human_seconds, shown
from ..runs.methods import counted_options
from .direct import Direct, Tell, holds_another
from .needs import bench_needs, number_of
from .recipe import model_folder, model_name
from .result import Number, Result, Shown
from .settings import LABELS, OLMOE, QWEN, Setting

FOLDER = "benches"
_PLACEMENTS = ("pure", "gate", "full")
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


@dataclass(frozen=True, kw_only=True)
class BenchRecipe(Direct):
    """A table or figure of throughput, or of cost.

    Attributes:
        models: each is timed.
        benches: name of a bench -> its contenders.
        settings: of `BenchConfig`, where the user gives none.
        show: (model, name of a bench) -> its result, as a table or figure.
    """

    models: Sequence[str]
    benches: Mapping[str, Sequence[str]]
    settings: Mapping[str, Any]
    show: Callable[[Mapping[tuple[str, str], Row]], Shown]

    def __post_init__(self) -> None:
        self.check_options({field.name for field in dataclasses.fields(BenchConfig)} - set(_NOT_OPTIONS))

    def needs(self, tflops: float | None = None) -> list[str]:
        kinds = [kind for contenders in self.benches.values() for kind in contenders]
        benches = number_of(len(self.models) * len(self.benches), "bench", "benches")
        lines = [
            f"{benches} of {len(kinds) * len(self.models)} contenders in all",
            "an idle machine, for what else runs is timed too; random weights, no data",
        ]
        for model in self.models:
            lines += bench_needs(model, {**self.settings, **self.options}, kinds)
        return lines

    def files(self, output: Path) -> list[tuple[str, Path, Path]]:
        return [(f"{model}, {name}", file, file) for (model, name), file in self._results(output).items()]

    def run(self, output: Path, tell: Tell) -> None:
        missing = {}
        for (model, name), file in self._results(output).items():
            config = BenchConfig(
                config_file(model), contenders=tuple(self.benches[name]), **{**self.settings, **self.options}
            )
            if file.is_file():
                _check_same(file, model, config)
            else:
                missing[model, name, file] = config
        for (model, name, file), config in missing.items():
            tell(f"bench {name} of {model}")
            result = run_bench(config, tell=tell)
            counts = self.counts(model, config.contenders, config.r)
            result["recipe"] = {"model": model, "counts": counts, "layers": num_layers(config.model)}
            write_json(file, result)

    def result(self, folder: Path) -> Result | None:
        files = self._results(folder)
        found = {key: read_result(file) for key, file in files.items() if file.is_file()}
        found = {(model, name): bench for (model, name), bench in found.items() if bench["recipe"]["model"] == model}
        if not found:
            return None
        shown = self.show(found)
        lacking = [f"{model}, {name}: no bench." for model, name in files if (model, name) not in found]
        rows = [row for result in found.values() for row in result["contenders"]]
        failed = [f"{row['name']}: {row['reason']}" for row in rows if row["status"] != "done"]
        shown.notes = [*(_words(key, result) for key, result in found.items()), *shown.notes, *lacking, *failed]
        return self.over(shown)

    def _results(self, output: Path) -> dict[tuple[str, str], Path]:
        """(model, name of a bench) -> its result's file."""
        folders = {model: output / FOLDER / model_folder(model) for model in self.models}
        return {(model, name): at / f"{name}.json" for model, at in folders.items() for name in self.benches}

    def counts(self, model: str, contenders: Sequence[str], r: int) -> dict[str, int]:
        """Contender -> trained parameters, by the whole model's config."""
        file, counts = config_file(model), {}
        for kind in contenders:
            options = counted_options(*Contender(kind).method)
            options = options if options.get("full") else {**options, "r": r}
            counts[kind] = int(parameters_from_config(file, **options)["trainable"])
        return counts


def _check_same(file: Path, model: str, config: BenchConfig) -> None:
    """HotLoraError: the bench there is another model's, or was made with other settings. What the machine decides
    (auto) may be any."""
    result = read_result(file)
    made = result["settings"]
    if result["recipe"]["model"] != model:
        raise holds_another(file, "a bench of", result["recipe"]["model"], model)
    asked = {name: value for name, value in dataclasses.asdict(config).items() if value not in ("auto", None)}
    asked |= {"contenders": list(config.contenders), "fractions": list(config.fractions)}
    if config.layers is None:
        asked["layers"] = num_layers(config.model)
    del asked["model"]  # its config's file, which may lie elsewhere on another machine
    for name, value in asked.items():
        if made[name] != value:
            raise holds_another(file, f"a bench with {name}", repr(made[name]), repr(value))


def num_layers(config: str) -> int:
    """Of a whole model."""
    return int(sized_config(config).get_text_config().num_hidden_layers)


def _throughput(found: Mapping[tuple[str, str], Row]) -> Shown:
    """HELLoRA's table 6: methods by placements, each also over LoRA in the same placement."""
    benches = {name.removeprefix("hellora-"): bench for (_, name), bench in found.items()}
    columns = ["", "trained"]
    for placement in ("_pure", "_gate", "all"):
        columns += [f"{placement}: tokens/s", "× LoRA", "published: samples/s", "× LoRA"]
    table = Shown(columns)
    for method, published in THROUGHPUT.items():
        counted: int | None = None
        cells = []
        for placement, printed, reference in zip(_PLACEMENTS, published, THROUGHPUT["lora"], strict=True):
            bench, kind = benches.get(placement), _kind(method, placement)
            row, lora = _row(bench, kind), _row(bench, _kind("lora", placement))
            counted = bench["recipe"]["counts"].get(kind) if bench else counted
            ratio, ours = over(row, lora), row["tokens_per_second"] if row else None
            cells += [shown(ours, ",.0f"), shown(ratio, ".2f"), f"{printed:.2f}", f"{printed / reference:.2f}"]
            table.numbers.append({
                "method": method, "placement": placement, "tokens_per_second": ours,
                "over_lora": ratio, "published_samples_per_second": printed,
                "published_over_lora": printed / reference,
            })  # fmt: skip
        table.rows.append([LABELS[method], shown(counted, ","), *cells])
    return table


def _methods(found: Mapping[tuple[str, str], Row]) -> Shown:
    """HELLoRA's figure 5: every method with all of its adapters, and full fine-tuning."""
    (bench,) = found.values()
    bars = {}
    table = Shown(["", "tokens/s", "× LoRA", "× FFT", "published: samples/s (table 6)"])
    for method in ("fft", *THROUGHPUT):
        row = _row(bench, method)
        printed = THROUGHPUT.get(method, (None, None, None))[2]
        ours = row["tokens_per_second"] if row else None
        ratios = [over(row, _row(bench, other)) for other in ("lora", "fft")]
        cells = [shown(ours, ",.0f"), *(shown(ratio, ".2f") for ratio in ratios), shown(printed, ".2f")]
        table.add(
            [LABELS[method], *cells], method=method, tokens_per_second=ours, over_lora=ratios[0], over_fft=ratios[1],
            published_samples_per_second=printed,
        )  # fmt: skip
        if row is not None:
            bars[LABELS[method]] = [bench["settings"]["tokens"] / second for second in row["seconds"]["step"]["all"]]
    told = HELLORA_SPEEDUP
    table.rows.append(["published, HELLoRA", NONE, f"{told['lora']:.2f}", f"{told['fft']:.1f}", NONE])
    table.figures = {"": throughput_figure(bars)}
    return table


def _cost(found: Mapping[tuple[str, str], Row]) -> Shown:
    """MoE-Sieve's table 4: parameters, checkpoint and time of all experts and of the hot quarter."""
    lines: list[tuple[str, Mapping[str, Sequence[float | None]], Mapping[str, float]]] = []
    for (model, _), bench in found.items():
        kinds = ("lora", "sieve")
        counts = [bench["recipe"]["counts"][kind] for kind in kinds]
        timed = [_row(bench, kind) for kind in kinds]
        seconds = [row["seconds"]["step"]["median"] if row else None for row in timed]
        sizes = {"parameters": counts, "bytes": [_BYTES * count for count in counts], "seconds": seconds}
        lines.append((f"{model_name(model)} (here)", sizes, {}))
    lines += [(f"{model} (paper)", cost, SAVED[model]) for model, cost in COST.items()]
    columns = ["", "parameters, all → hot", "saved", "checkpoint", "saved", "time (here of a step)", "saved"]
    table = Shown(columns, notes=[*_COST_NOTES])
    for label, cost, printed in lines:
        cells: list[str] = []
        numbers: dict[str, Number] = {}
        for what, (full, hot) in cost.items():
            saved = printed.get(what, None if full is None or hot is None else 1 - hot / full)
            cells += [_arrow(what, full, hot), shown(saved, ".1%")]
            numbers |= {f"{what}_all": full, f"{what}_hot": hot, f"{what}_saved": saved}
        table.add([label, *cells], model=label, **numbers)
    return table


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
    axes.set_ylabel("tokens a second")
    return figure


def _kind(method: str, placement: str) -> str:
    return method if placement == "full" else f"{method}-{placement}"


def _row(bench: Row | None, kind: str) -> Row | None:
    rows = [] if bench is None else bench["contenders"]
    return next((row for row in rows if row["name"] == kind and row["status"] == "done"), None)


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
    layers, whole = settings["layers"], result["recipe"].get("layers")  # older ones do not say how many it has
    cut = (
        f"its first {layers} of {whole} layers (parameters are counted of all), " if whole not in (None, layers) else ""
    )
    return (
        f"{key[0]}, bench {key[1]}: {cut}{result['environment']['device']}, {settings['dtype']}, "
        f"{settings['tokens']:,} tokens a step in sequences of {settings['length']}, rank {settings['r']}, "
        f"{rounds} rounds in turn, random weights, no dropout, routers skewed to a CV of "
        f"{result['routing']['cv']:.2f}. Ratios are medians over rounds."
    )


def _recipe(
    title: str, where: str, models: Sequence[str], benches: Mapping[str, Sequence[str]],
    show: Callable[[Mapping[tuple[str, str], Row]], Shown],
) -> Callable[[str, Setting], BenchRecipe]:  # fmt: skip
    def make(name: str, setting: Setting) -> BenchRecipe:
        return BenchRecipe(
            name, title, where, setting.options, models=setting.models(*models), benches=benches,
            settings=_NANO if setting.is_nano else _LARGE, show=show,
        )  # fmt: skip

    return make


_FULL = {"hellora-full": [*THROUGHPUT, "fft"]}
_PLACED = {f"hellora-{placement}": [f"{method}-{placement}" for method in THROUGHPUT] for placement in ("pure", "gate")}
HELLORA = {
    "hellora-table-6": _recipe(
        "Throughput by what is adapted", "HELLoRA, section 4.5.2, table 6", [OLMOE], {**_PLACED, **_FULL}, _throughput
    ),
    "hellora-figure-5": _recipe(
        "Throughput of the methods", "HELLoRA, section 4.4, figure 5", [OLMOE], _FULL, _methods
    ),
}  # fmt: skip
MOE_SIEVE = {
    "moe-sieve-table-4": _recipe(
        "What the hot quarter saves", "MoE-Sieve, section 5.2, table 4", [OLMOE, QWEN],
        {"moe-sieve": ["lora", "sieve"]}, _cost,
    )
}  # fmt: skip
