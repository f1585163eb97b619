"""MoE-Sieve's tables of trainings, from its scores of every seed."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache

import numpy as np
from moe_sieve_cell import CONFIG_OF, CONFIGS, OLMOE, SAMPLE, SORTED, Cell
from moe_sieve_counts import greedy
from moe_sieve_data import KEYS, Data

from hotlora.adapter.count import parameters_from_config
from hotlora.evaluation.stats import PairedTest, paired_test
from hotlora.report import published
from hotlora.report.published import MODELS
from hotlora.routing.study import FRACTION

PAIRS = tuple(published.PAIRS)
CONDITION = {"all": "full_lora", "greedy": "budgetp25_bcount"}


def table_3(data: Data) -> Iterable[Cell]:
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
def table_4() -> Sequence[Cell]:
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
        yield Cell("Table 4", model, "checkpoint, hot, MB", ".0f", hot / 1e6, 4 * counts[1] / 1e6)
        yield Cell("Table 4", model, "checkpoint, saved, %", ".1f", 100 * told["bytes"], saved)
        yield Cell("Table 4", model, "time, saved, %", ".0f", 100 * told["seconds"], None)


def section_6_1(data: Data) -> Iterable[Cell]:
    pair = (OLMOE, "gsm8k")
    for k, printed in published.RANDOM.items():
        row, runs = f"{k} of 64", {what: _scores(data, pair, f"{what}k{k}") for what in ("hot", "rand")}
        yield from _mean_and_sd("Section 6.1", row, "hot", printed["hot"], runs["hot"])
        yield from _mean_and_sd("Section 6.1", row, "random", printed["random"], runs["rand"])
        test = paired(runs["hot"], runs["rand"])
        yield Cell(
            "Section 6.1", row, "difference", "+.1f", published.RANDOM_DIFFERENCE[k], test.mean if test else None
        )


def table_5(data: Data) -> Iterable[Cell]:
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


def section_6_2(data: Data) -> Iterable[Cell]:
    for task, printed in published.COV60.items():
        for head, condition, number in zip(("coverage 60%", "hot 25%"), ("cov60", "hot"), printed, strict=True):
            runs = _scores(data, (OLMOE, task), condition)
            yield Cell("Section 6.2", f"{OLMOE}, {task}", head, ".1f", number, _mean(runs))


def table_6(data: Data) -> Iterable[Cell]:
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


def section_7_2(data: Data) -> Iterable[Cell]:
    for head, condition, printed in (("32 of 64", "hotk32", 81.2), ("all", "all", 80.5)):
        here = _mean(_scores(data, (OLMOE, "hellaswag"), condition))
        yield Cell("Section 7.2", f"{OLMOE}, hellaswag", head, ".1f", printed, here)


def table_8(data: Data) -> Iterable[Cell]:
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


def table_10(data: Data) -> Iterable[Cell]:
    for task, rows in published.SWEEP.items():
        for what, printed in rows.items():
            condition = f"hotk{what}" if what.isdigit() else what
            name = f"hot {what} of 64" if what.isdigit() else what
            yield from _mean_and_sd(
                "Table 10", f"{task}, {name}", "accuracy", printed, _scores(data, (OLMOE, task), condition)
            )


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
