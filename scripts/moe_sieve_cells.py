"""Every number that MoE-Sieve prints, beside the same number from its published data.

One reading for a whole table: deviations with ddof 0, tests paired by seed. A cell that does not come out by it is
explained in EXPLAINED, or by the table's other reading, which then must give the printed digits.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from moe_sieve_data import KEYS, Data

from hotlora.adapter.count import parameters_from_config
from hotlora.evaluate.stats import PairedTest, paired_test
from hotlora.papers.configs import shape
from hotlora.report import published
from hotlora.report.published import MODELS
from hotlora.routing.plan import select_experts
from hotlora.routing.profile import RoutingProfile
from hotlora.routing.study import FRACTION, Study, experts_for, study

CONFIGS = Path(__file__).resolve().parent.parent / "benchmarks" / "configs"
CONFIG_OF = {
    "OLMoE-1B-7B": "olmoe-1b-7b", "Qwen1.5-MoE-A2.7B": "qwen1.5-moe-a2.7b", "DeepSeek-MoE-16B": "deepseek-moe-16b",
}  # fmt: skip
OLMOE = "OLMoE-1B-7B"
PAIRS = tuple(published.PAIRS)
CONDITION = {"all": "full_lora", "greedy": "budgetp25_bcount"}
LESS = 0.001
"""A printed p of "<.001"."""
SAMPLE, SORTED = "ddof 1", "each condition's scores sorted before pairing"

EXPLAINED: dict[tuple[str, str, str], str] = {
    ("Table 7", "layer 13", "covered by 16"): (
        "by count it is 72.47; by mass it is 72.71, but then layer 15 (74.70) is not the printed 74: no one reading "
        "gives all sixteen"
    ),
    ("Table 3", "Qwen1.5-MoE-A2.7B, hellaswag", "hot"): "89.248 rounds to 89.2; rounded to 89.25 first it gives 89.3",
    ("Table 5", "Qwen1.5-MoE-A2.7B, hellaswag", "uniform"): "as in table 3",
    ("Table 4", OLMOE, "checkpoint, saved"): "340 MB over 1.25 GB, with a GB of 1,024 MB; by parameters it is 72.7%",
    ("Table 4", "Qwen1.5-MoE-A2.7B", "checkpoint, saved"): "as OLMoE's: 606 MB over 2.04 GB of 1,024 MB each",
    ("Table 4", "Qwen1.5-MoE-A2.7B", "checkpoint, hot"): "605.3 MB of float32 weights; the file has a header, too",
}
"""(table, row, column) -> why it is not what is printed."""


@dataclass(frozen=True)
class Cell:
    """A printed number and what the data give. Percentages and points are what they say, not shares.

    Attributes:
        form: of both numbers, as `format` takes it; "" where they are words.
        here: None where the data do not have it.
        others: another reading -> its number.
    """

    table: str
    row: str
    column: str
    form: str
    printed: float | str
    here: float | str | None
    others: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str]:
        return self.table, self.row, self.column

    @property
    def status(self) -> str:
        """equal, explained, differs, or absent."""
        if self.here is None:
            return "absent"
        if self._is(self.here):
            return "equal"
        return "explained" if self.told else "differs"

    @property
    def told(self) -> str:
        """Why the number here is not the printed one."""
        if self.here is None or self._is(self.here):
            return ""
        by = next((f"comes out with {name}" for name, value in self.others.items() if self._is(value)), "")
        return by or EXPLAINED.get(self.key, "")

    def _is(self, value: float | str) -> bool:
        """A number in the middle of two prints is either."""
        if isinstance(value, str) or isinstance(self.printed, str):
            return value == self.printed
        if self.form == "p" and self.printed == LESS:
            return value < LESS
        digits = 3 if self.form == "p" else int(self.form.strip("+.fg") or 0)
        return abs(value - self.printed) <= 0.5 * 10**-digits + 1e-9


def cells(data: Data) -> list[Cell]:
    """All, in the paper's order; those that these data do not have are absent."""
    studies = {
        model: study(of, shared=MODELS[model]["shared"]) for model, of in data.profiles.items() if model in MODELS
    }
    made = [
        _models(data), _skew(studies), _figure_1(studies), _figure_2(studies), _section_3_2(data, studies),
        _figure_3(studies), _section_3_3(studies), _table_3(data), _table_4(), _section_6_1(data), _table_5(data),
        _section_6_2(data), _table_6(data), _section_7_2(data), _table_7(studies), _figure_5(studies), _table_8(data),
        _table_9(data), _table_10(data),
    ]  # fmt: skip
    return [cell for part in made for cell in part]


def _models(data: Data) -> Iterable[Cell]:
    for model, row in MODELS.items():
        profile = next(iter(data.profiles.get(model, {}).values()), None)
        config = shape(str(CONFIGS / CONFIG_OF[model] / "config.json")) if model in CONFIG_OF else {}
        here: dict[str, Any] = {name: config.get(name) for name in ("shared", "expert_to_ffn")}
        if profile is not None:
            here |= {"layers": len(profile.layers), "num_experts": profile.num_experts}
            here["num_experts_per_tok"] = profile.num_experts_per_tok
        heads = {"layers": "layers", "num_experts": "routed", "shared": "shared", "num_experts_per_tok": "top-k"}
        for name, head in heads.items():
            yield Cell("Table 1", model, head, ".0f", row[name], here.get(name))
        yield Cell("Table 1", model, "expert / FFN", ".2f", row["expert_to_ffn"], here["expert_to_ffn"])


def _skew(studies: Mapping[str, Study]) -> Iterable[Cell]:
    heads = {"global_cv": ("global CV", ".3f", 1), "layer_cv": ("layer CV", ".3f", 1), "ratio": ("ratio", ".1f", 1),
             "cold_share": ("cold, %", ".1f", 100), "coverage": ("covered by 25%, %", ".1f", 100)}  # fmt: skip
    for model, row in MODELS.items():
        for name, (head, form, times) in heads.items():
            here = times * studies[model]["mean"][name] if model in studies else None
            yield Cell("Table 2", model, head, form, times * row[name], here)


def _figure_1(studies: Mapping[str, Study]) -> Iterable[Cell]:
    ends = zip(published.RATIOS, (("OLMoE-1B-7B", "wikitext2"), ("Qwen1.5-MoE-A2.7B", "gsm8k")), strict=True)
    for printed, (model, task) in ends:
        here, others = None, {}
        if found := studies.get(model, _NONE)["datasets"].get(task):
            num_experts = studies[model]["model"]["num_experts"]
            here = found["ratio"]
            others = {"the layers' CV by ddof 1 over the global one by ddof 0": here * _more(num_experts)}
        yield Cell("Figure 1", f"{model}, {task}", "ratio", ".1f", printed, here, others)


def _figure_2(studies: Mapping[str, Study]) -> Iterable[Cell]:
    for model, row in MODELS.items():
        here = 100 * studies[model]["mean"]["coverage_with_shared"] if model in studies else None
        yield Cell(
            "Figure 2", model, "covered by 25%, shared included, %", ".0f", 100 * row["coverage_with_shared"], here
        )


def _section_3_2(data: Data, studies: Mapping[str, Study]) -> Iterable[Cell]:
    where = "Section 3.2"
    spider = data.profiles.get(OLMOE, {}).get("spider")
    needed = None if spider is None else experts_for(spider)
    for name, head in (("mean", "mean"), ("min", "fewest"), ("max", "most")):
        row, form = f"OLMoE-1B-7B, spider: experts for 60%, {head}", ".1f" if name == "mean" else ".0f"
        here = None if needed is None else getattr(needed, name)().item()
        yield Cell(where, row, "number", form, published.SPIDER_EXPERTS_FOR_60[name], here)
    entropy = {name: row["entropy"] for name, row in studies.get(OLMOE, _NONE)["datasets"].items()}
    code = [entropy[name] for name in ("mbpp", "spider", "codealpaca") if name in entropy]
    for head, printed, end in zip(("lowest", "highest"), published.CODE_ENTROPY, (min, max), strict=True):
        row, here = f"OLMoE-1B-7B: entropy of code data, {head}", end(code) if len(code) == 3 else None
        yield Cell(where, row, "number", ".2f", printed, here)
    for name in ("hellaswag", "wikitext2"):
        row = f"OLMoE-1B-7B: entropy of {name}"
        yield Cell(where, row, "number", ".2f", published.BROAD_ENTROPY, entropy.get(name))
    for model, (first, peak) in published.DEPTH_CV.items():
        profile = data.profiles.get(model, {}).get("spider")
        cv = profile.layer_cv().numpy() if profile is not None else np.array([])
        more = _more(profile.num_experts) if profile is not None else 1.0
        row, layer = f"{model}, spider: CV,", MODELS[model]["peak_layer"]
        for head, printed, pick in (("first layer", first, 0), ("peak", peak, cv.argmax() if cv.size else 0)):
            here, others = (float(cv[pick]), {SAMPLE: float(cv[pick] * more)}) if cv.size else (None, {})
            yield Cell(where, f"{row} {head}", "number", ".2f", printed, here, others)
        peak_layer = profile.layers[cv.argmax()] if profile is not None else None
        yield Cell(where, f"{row} layer of the peak", "number", ".0f", layer, peak_layer)


def _figure_3(studies: Mapping[str, Study]) -> Iterable[Cell]:
    overlaps = studies.get(OLMOE, _NONE)["overlap"]
    place = {name: i for i, name in enumerate(overlaps["names"])}
    for (one, other), printed in published.JACCARD.items():
        there = one in place and other in place
        here = overlaps["jaccard"][place[one]][place[other]] if there else None
        yield Cell("Figure 3", one, other, ".2f", printed, here)


def _section_3_3(studies: Mapping[str, Study]) -> Iterable[Cell]:
    for model, row in MODELS.items():
        here = studies[model]["mean"]["signals_jaccard"] if model in studies else None
        yield Cell("Section 3.3", model, "count and mass, Jaccard", ".3f", row["signals_jaccard"], here)
    for model, row in MODELS.items():
        yield Cell("Figure 6", model, "a tenth of the examples, Jaccard", ".3f", row["stability"], None)
    for model, value in published.MBPP_STABILITY.items():
        yield Cell("Figure 6", f"{model}, mbpp", "a tenth of the examples, Jaccard", ".2f", value, None)


def _table_3(data: Data) -> Iterable[Cell]:
    for pair in PAIRS:
        row, test = _name(pair), _against_all(data, pair, "hot")
        for what in ("all", "hot"):
            yield from _mean_and_sd("Table 3", row, what, published.PAIRS[pair][what], _scores(data, pair, what))
        told = published.EQUIVALENCE[pair]
        here = [None] * 3 if test is None else [test.mean, *test.interval]
        numbers = zip(("difference", "low", "high"), (told["difference"], *told["interval"]), here, strict=True)
        for head, printed, number in numbers:
            yield Cell("Table 3", row, head, "+.2f", printed, number)
        equal = None if test is None else "yes" if test.tost[2] < 0.05 else "no"
        yield Cell("Table 3", row, "within 2 points", "", "yes" if told["tost"][2] < 0.05 else "no", equal)


@cache
def _table_4() -> Sequence[Cell]:
    return list(_costs())


def _costs() -> Iterable[Cell]:
    for model, cost in published.COST.items():
        file = CONFIGS / CONFIG_OF[model] / "config.json"
        kept = round(FRACTION * MODELS[model]["num_experts"])
        counts = [int(parameters_from_config(file, experts_per_layer=k, r=32)["trainable"]) for k in (None, kept)]
        saved = 100 * (1 - counts[1] / counts[0])
        for head, printed, count in zip(("all", "hot"), cost["parameters"], counts, strict=True):
            yield Cell("Table 4", model, f"parameters, {head}, M", ".1f", printed / 1e6, count / 1e6)
        told = published.SAVED[model]
        yield Cell("Table 4", model, "parameters, saved, %", ".1f", 100 * told["parameters"], saved)
        full, hot = cost["bytes"]
        yield Cell("Table 4", model, "checkpoint, all, GB", ".2f", full / 1e9, 4 * counts[0] / 1e9)
        yield Cell("Table 4", model, "checkpoint, hot", ".0f", hot / 1e6, 4 * counts[1] / 1e6)
        yield Cell("Table 4", model, "checkpoint, saved", ".1f", 100 * told["bytes"], saved)
        yield Cell("Table 4", model, "time, saved, %", ".0f", 100 * told["seconds"], None)


def _section_6_1(data: Data) -> Iterable[Cell]:
    pair = (OLMOE, "gsm8k")
    for k, printed in published.RANDOM.items():
        row, runs = f"{k} of 64", {what: _scores(data, pair, f"{what}k{k}") for what in ("hot", "rand")}
        yield from _mean_and_sd("Section 6.1", row, "hot", printed["hot"], runs["hot"])
        yield from _mean_and_sd("Section 6.1", row, "random", printed["random"], runs["rand"])
        test = paired(runs["hot"], runs["rand"])
        yield Cell(
            "Section 6.1", row, "difference", "+.1f", published.RANDOM_DIFFERENCE[k], test.mean if test else None
        )


def _table_5(data: Data) -> Iterable[Cell]:
    for pair in PAIRS:
        row = _name(pair)
        for what, head in (("hot", "uniform"), ("greedy", "greedy")):
            yield from _mean_and_sd("Table 5", row, head, published.PAIRS[pair][what], _scores(data, pair, what))
        profile = data.profiles.get(pair[0], {}).get(pair[1])
        experts, covered = greedy(profile) if profile is not None else ([], [])
        fewest, most, percent = published.GREEDY[pair]
        yield Cell("Table 5", row, "fewest", ".0f", fewest, min(experts, default=None))
        yield Cell("Table 5", row, "most", ".0f", most, max(experts, default=None))
        yield Cell("Table 5", row, "covered, %", ".1f", percent, float(np.mean(covered)) if covered else None)


def _section_6_2(data: Data) -> Iterable[Cell]:
    for task, printed in published.COV60.items():
        for head, condition, number in zip(("coverage 60%", "hot 25%"), ("cov60", "hot"), printed, strict=True):
            runs = _scores(data, (OLMOE, task), condition)
            yield Cell("Section 6.2", f"{OLMOE}, {task}", head, ".1f", number, _mean(runs))


def _table_6(data: Data) -> Iterable[Cell]:
    for pair in PAIRS:
        row = _name(pair)
        full, hot, ratio = published.SEED_SD[pair]
        every, some = (_scores(data, pair, what) for what in ("all", "hot"))
        for head, printed, runs in (("all", full, every), ("hot", hot, some)):
            yield _deviation("Table 6", row, head, 100 * printed, runs)
        here = _sd(some) / _sd(every) if some and every else None
        yield Cell("Table 6", row, "hot / all", ".2f", ratio, here)
    for pair, printed in zip((PAIRS[0], PAIRS[3], PAIRS[1], PAIRS[4]), (43, 64, 42, 41), strict=True):
        every, some = (_scores(data, pair, what) for what in ("all", "hot"))
        here = 100 * (1 - _sd(some) / _sd(every)) if some and every else None
        yield Cell("Section 7.1", _name(pair), "lower by, %", ".0f", printed, here)


def _section_7_2(data: Data) -> Iterable[Cell]:
    for head, condition, printed in (("32 of 64", "hotk32", 81.2), ("all", "all", 80.5)):
        here = _mean(_scores(data, (OLMOE, "hellaswag"), condition))
        yield Cell("Section 7.2", f"{OLMOE}, hellaswag", head, ".1f", printed, here)


def _table_7(studies: Mapping[str, Study]) -> Iterable[Cell]:
    heads = {"cv": ("CV", ".2f", 1), "cold_share": ("cold, %", ".0f", 100), "coverage": ("covered by 16", ".0f", 100),
             "entropy": ("entropy", ".3f", 1)}  # fmt: skip
    found = studies.get(OLMOE, _NONE)["datasets"].get("spider")
    for layer in range(MODELS[OLMOE]["layers"]):
        for name, (head, form, times) in heads.items():
            here = times * found["by_layer"][name][layer] if found else None
            yield Cell("Table 7", f"layer {layer}", head, form, times * published.OLMOE_SPIDER[name][layer], here)


def _figure_5(studies: Mapping[str, Study]) -> Iterable[Cell]:
    rows = studies.get(OLMOE, _NONE)["datasets"]
    for task, printed in published.ENTROPY.items():
        here = rows[task]["entropy"] if task in rows else None
        yield Cell("Figure 5", task, "entropy", ".4f", printed, here)


def _table_8(data: Data) -> Iterable[Cell]:
    for pair in PAIRS:
        told = published.EQUIVALENCE[pair]
        by_seed, apart = _against_all(data, pair, "hot"), _against_all(data, pair, "hot", is_sorted=True)
        here = by_seed.mean if by_seed else None
        yield Cell("Table 8", _name(pair), "difference", "+.2f", told["difference"], here)
        for bound, printed in told["tost"].items():
            yield _test_cell(
                pair, f"within {bound}", printed, by_seed and by_seed.tost[bound], apart and apart.tost[bound]
            )
        yield _test_cell(pair, "t test", told["t_test"], by_seed and by_seed.p, apart and apart.p)


def _table_9(data: Data) -> Iterable[Cell]:
    profile = data.profiles.get(OLMOE, {}).get("gsm8k")
    experts, covered = greedy(profile) if profile is not None else ([], [])
    uniform = (100 * profile.coverage(fraction=FRACTION)).tolist() if profile is not None else []
    columns = {
        "greedy, experts": (".0f", published.GREEDY_EXPERTS, experts, 16.0),
        "uniform, covered, %": (".1f", published.UNIFORM_COVERAGE, uniform, 56.7),
        "greedy, covered, %": (".1f", published.GREEDY_COVERAGE, covered, 56.8),
    }
    for layer in range(16):
        for head, (form, printed, here, _) in columns.items():
            yield Cell("Table 9", f"layer {layer}", head, form, printed[layer], here[layer] if here else None)
    for head, (form, _, here, mean) in columns.items():
        yield Cell("Table 9", "mean", head, form, mean, float(np.mean(here)) if here else None)


def _table_10(data: Data) -> Iterable[Cell]:
    for task, rows in published.SWEEP.items():
        for what, printed in rows.items():
            condition = f"hotk{what}" if what.isdigit() else what
            name = f"hot {what} of 64" if what.isdigit() else what
            yield from _mean_and_sd(
                "Table 10", f"{task}, {name}", "accuracy", printed, _scores(data, (OLMOE, task), condition)
            )


def _more(num_experts: int) -> float:
    """A deviation by ddof 1 over the same by ddof 0."""
    return float(np.sqrt(num_experts / (num_experts - 1)))


_NONE: Study = {"datasets": {}, "mean": {}, "overlap": {"names": [], "jaccard": []}}


def greedy(profile: RoutingProfile) -> tuple[list[int], list[float]]:
    """Experts of each layer by `greedy` at 25%, and the percentage of the layer that they cover."""
    chosen = list(select_experts(profile, rule="greedy", fraction=FRACTION).experts.values())
    covered = [100 * row[list(ids)].sum().item() for row, ids in zip(profile.shares(), chosen, strict=True)]
    return [len(ids) for ids in chosen], covered


def paired(a: Mapping[int, float], b: Mapping[int, float], *, is_sorted: bool = False) -> PairedTest | None:
    """a - b over the seeds of both; is_sorted: over their scores in ascending order. None without a spread."""
    seeds = sorted(a.keys() & b.keys())
    if len(seeds) < 2:
        return None
    ours, theirs = ([runs[seed] for seed in seeds] for runs in (a, b))
    if is_sorted:
        ours, theirs = sorted(ours), sorted(theirs)
    found = paired_test(ours, theirs, bounds=(1, 2, 3))
    return found if found.interval else None


def _against_all(data: Data, pair: tuple[str, str], what: str, **how: bool) -> PairedTest | None:
    return paired(_scores(data, pair, what), _scores(data, pair, "all"), **how)


def _test_cell(pair: tuple[str, str], column: str, printed: float, here: float | None, apart: float | None) -> Cell:
    others = {} if apart is None else {SORTED: apart}
    return Cell("Table 8", _name(pair), column, "p", printed, here, others)


def _scores(data: Data, pair: tuple[str, str], what: str) -> Mapping[int, float]:
    """Seed -> points. what: a condition of the repository, or all, hot (25%), greedy."""
    key = next((key for key, model in KEYS.items() if model == pair[0]), "")
    quarter = f"hotk{round(FRACTION * MODELS[pair[0]]['num_experts'])}"
    condition = quarter if what == "hot" else CONDITION.get(what, what)
    return data.scores.get(key, {}).get(pair[1], {}).get(condition, {})


def _mean_and_sd(
    table: str, row: str, column: str, printed: Sequence[float], runs: Mapping[int, float]
) -> Iterable[Cell]:
    yield Cell(table, row, column, ".1f", printed[0], _mean(runs))
    yield _deviation(table, row, f"{column}, sd", printed[1], runs)


def _deviation(table: str, row: str, column: str, printed: float, runs: Mapping[int, float]) -> Cell:
    others = {SAMPLE: _sd(runs, ddof=1)} if runs else {}
    return Cell(table, row, column, ".1f", printed, _sd(runs) if runs else None, others)


def _mean(runs: Mapping[int, float]) -> float | None:
    return float(np.mean(list(runs.values()))) if runs else None


def _sd(runs: Mapping[int, float], ddof: int = 0) -> float:
    return float(np.std(list(runs.values()), ddof=ddof))


def _name(pair: tuple[str, str]) -> str:
    return ", ".join(pair)
