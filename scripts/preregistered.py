"""The results of the preregistered studies, by the tests that were written down before their runs.

python scripts/preregistered.py quantized runs/quantized      # prints what docs/preregistered.md says of it

From the records of a sweep's runs, those under results/nano by default.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from hotlora.base.records import find_records
from hotlora.evaluation.stats import Interval, PairedTest, holm, mean_sd, paired_test, sd_ratio

RESULTS = Path(__file__).resolve().parent.parent / "results" / "nano"
TASKS = ("nano-math", "nano-sql", "nano-choice")
BOUND = 2.0  # points
ALPHA = 0.05
# Of a task's experts and routers, what is compared on equal parameters, and on equal time.
LEARNED = (
    ("reprofile", "static"), ("dr-lora", "static"), ("all", "static"), ("random", "static"),
    ("dr-lora", "static-longer"),
)  # fmt: skip
SHARES = {"0.125": "an eighth", "0.25": "a quarter", "0.5": "half"}


class Values(NamedTuple):
    """Of one condition, by seed."""

    scores: dict[int, float]
    """points"""
    losses: dict[int, float]
    """nats a token; none of what is only scored"""


def read(folder: Path) -> dict[str, Values]:
    """condition -> its runs'. Those that did not end are left out: `seeds` then says how many there are."""
    found: dict[str, Values] = {}
    for record in find_records(folder).values():
        if record["status"] == "done":
            values, seed = found.setdefault(record["sweep"]["condition"], Values({}, {})), record["seed"]
            (result,) = record["evaluation"].values()
            values.scores[seed] = 100 * result["accuracy"]
            if "training" in record:
                values.losses[seed] = record["training"]["test_loss"]
    return found


def paired(one: dict[int, float], other: dict[int, float], *bounds: float) -> PairedTest:
    """Over the seeds that both have."""
    seeds = sorted(one.keys() & other.keys())
    return paired_test([one[seed] for seed in seeds], [other[seed] for seed in seeds], bounds=bounds)


def quantized(folder: Path) -> str:
    found, lines, verdicts = read(folder), [], []
    for task in TASKS:
        base = found[f"{task}/not-quantized"].scores
        lines.append(f"| {task} | not quantized | {fmean(base.values()):.1f} | | |")
        for stored in ("8-bit-cold", "4-bit-cold", "4-bit"):
            for suffix in ("", "-on-base"):
                scores = found[f"{task}/{stored}{suffix}"].scores
                test = paired(scores, base, BOUND)
                verdicts.append(_equivalence(test))
                where = ", on the dense base" if suffix else ""
                name = stored.replace("-", " ").replace("bit", "bits") + where
                cells = (task, name, f"{fmean(scores.values()):.1f}", _difference(test, 1), verdicts[-1])
                lines.append(f"| {' | '.join(cells)} |")
    head = (
        "| task | experts stored in | score, % | against not quantized, points | within 2 points |\n"
        "|---|---|---:|---:|---|\n"
    )
    return f"{_share(verdicts)}\n\n{head}" + "\n".join(lines)


def learned(folder: Path) -> str:
    found, lines, better = read(folder), [], []
    verdicts = []
    for task in TASKS:
        losses = [paired(found[f"{task}/{a}"].losses, found[f"{task}/{b}"].losses) for a, b in LEARNED]
        corrected = holm([test.p for test in losses])
        for (a, b), test, p in zip(LEARNED, losses, corrected, strict=True):
            values = found[f"{task}/{a}"]
            score = paired(values.scores, found[f"{task}/{b}"].scores, BOUND)
            verdicts.append(_equivalence(score))
            if p is not None and p < ALPHA and test.mean < 0 and a != "random":
                better.append(f"{a} than {b} on {task}")
            cells = (
                task, f"{a} − {b}", f"{fmean(values.losses.values()):.4f}", _difference(test, 4), _p(test.p), _p(p),
                f"{fmean(values.scores.values()):.1f}", _difference(score, 1), verdicts[-1],
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    said = f"Lower held-out loss: {'; '.join(better)}." if better else "None beats static: no corrected p below 0.05."
    head = (
        "| task | pair | held-out loss | difference | p | p (Holm) | score, % | difference | within 2 points |\n"
        "|---|---|---:|---:|---:|---:|---:|---:|---|\n"
    )
    return f"{said} {_share(verdicts)}\n\n{head}" + "\n".join(lines)


def cold_noise(folder: Path) -> str:
    found, parts = read(folder), []
    for words, digits, which in (("score, points", 1, "scores"), ("held-out loss", 4, "losses")):
        pairs = [(share, kind) for share in SHARES for kind in ("half", "random")]
        tests = [
            paired(getattr(found[f"{share}/{kind}"], which), getattr(found[f"{share}/hot"], which))
            for share, kind in pairs
        ]
        lines = []
        for (share, kind), test, p in zip(pairs, tests, holm([test.p for test in tests]), strict=True):
            ours, hot = (mean_sd([*getattr(found[f"{share}/{name}"], which).values()]) for name in (kind, "hot"))
            ratio = sd_ratio(ours, hot)
            cells = (
                SHARES[share], kind, f"{ours.mean:.{digits}f} ± {ours.sd:.{digits}f}",
                f"{hot.mean:.{digits}f} ± {hot.sd:.{digits}f}", _difference(test, digits), _p(test.p), _p(p),
                "–" if ratio.ratio is None else f"{ratio.ratio:.2f} {_interval(ratio.interval, 2)}",
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        head = (
            f"| experts | filled with | {words} | hot alone | difference | p | p (Holm) | ratio of deviations |\n"
            "|---|---|---:|---:|---:|---:|---:|---:|\n"
        )
        parts.append(head + "\n".join(lines))
    told = "Mean ± standard deviation over seeds; differences and ratios are to hot alone."
    return "\n\n".join([told, *parts])


STUDIES: dict[str, Callable[[Path], str]] = {"quantized": quantized, "learned": learned, "cold_noise": cold_noise}


def seeds(folder: Path) -> str:
    """How many seeds the conditions have, and since when."""
    counts = sorted({len(values.scores) for values in read(folder).values()})
    started = min(record["started"] for record in find_records(folder).values())
    return f"{' to '.join(map(str, counts))} seeds a condition, the first begun {started[:16].replace('T', ' ')} UTC."


def _equivalence(test: PairedTest) -> str:
    p = test.tost[BOUND]
    if p is None:
        return "all differences are equal"
    return f"{'yes' if p < ALPHA else 'cannot tell'} (p {_p(p)})"


def _share(verdicts: Sequence[str]) -> str:
    yes, equal = (sum(verdict.startswith(word) for verdict in verdicts) for word in ("yes", "all"))
    also = f"; in {equal} all differences are equal, and there is no test" if equal else ""
    return f"Scores: {yes} of {len(verdicts)} are equivalent within 2 points{also}."


def _difference(test: PairedTest, digits: int) -> str:
    return f"{test.mean:+.{digits}f} {_interval(test.interval, digits)}".rstrip()


def _interval(interval: Interval | None, digits: int) -> str:
    return "" if interval is None else f"[{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def _p(p: float | None) -> str:
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def result(study: str, folder: Path) -> str:
    """What docs/preregistered.md says of a study."""
    return f"{seeds(folder)} {STUDIES[study](folder)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("folder", type=Path, nargs="?")
    args = parser.parse_args()
    print(result(args.study, args.folder or RESULTS / args.study))


if __name__ == "__main__":
    main()
