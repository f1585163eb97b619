"""Comparisons of a sweep's conditions, from records made by hand with known results."""

import csv
import io
import json
import math
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import typer
from rich.console import Console
from scipy import stats as scipy_stats
from typer.testing import CliRunner

from hotlora.base import escape
from hotlora.base.errors import DataError, FileError, HotLoraError
from hotlora.base.records import new_record, write_record
from hotlora.cli.compare import compare
from hotlora.evaluation.stats import McNemar, paired_difference
from hotlora.report.comparison import as_dict, compare_runs
from hotlora.report.comparison_table import csv_text, latex, markdown, paired_table, terminal_tables
from hotlora.report.paired import as_dict as paired_dict
from hotlora.report.paired import compare_examples

APP = typer.Typer()
APP.command()(compare)
DOCS = Path(__file__).parents[1] / "docs" / "statistics.md"

SCORES = {
    "all": {0: 0.60, 1: 0.62, 2: 0.61, 3: 0.65},
    "hot": {0: 0.61, 1: 0.64, 2: 0.64, 3: 0.67},  # 1, 2, 3, 2 points more
    "near": {0: 0.601, 1: 0.619, 2: 0.611, 3: 0.649},
    "shifted": {0: 0.605, 1: 0.625, 2: 0.615, 3: 0.655},  # half a point more in every seed
}


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def write_run(
    root: Path, condition: str, seed: int | None, score: float | None, *, sweep="s", task="gsm8k", loss=None, **changes
) -> Path:
    """A run's record as a sweep leaves it; seed None: a model that is scored as it is."""
    folder = root / condition / ("" if seed is None else f"seed{seed}")
    n = changes.pop("n", 1000)
    sections = {"sweep": {"name": sweep, "condition": condition}} if sweep else {}
    if score is not None:
        sections["evaluation"] = {
            task: {"metric": "exact_match", "accuracy": score, "n": n, "correct": round(score * n)}
        }  # fmt: skip
    if seed is not None:
        sections["training"] = {"tokens_per_second": 2000.0 + seed} | ({} if loss is None else {"test_loss": loss})
    percent = 0.0 if seed is None else 4.3075 if condition.endswith("all") else 1.2131
    record = new_record(
        name=condition, condition=condition, seed=seed or 0, model={"name": "m", "fingerprint": "f"},
        data={"name": task}, parameters={"trainable": 10, "total": 100, "percent": percent}, **sections,
    )  # fmt: skip
    write_record(folder, {**record, "status": "done", **changes})
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for condition, scores in SCORES.items():
        for seed, score in scores.items():
            write_run(tmp_path / "runs", condition, seed, score)
    write_run(tmp_path / "runs", "base", None, 0.10)
    return tmp_path / "runs"


def rows_of(comparison, place=0):
    return {row.condition: row for row in comparison.tables[place].rows}


def test_known_results(runs: Path):
    comparison = compare_runs(runs)
    (table,) = comparison.tables
    assert (table.sweep, table.model, table.task, table.measure) == ("s", "m", "gsm8k", "exact match, %")
    assert [row.condition for row in table.rows] == ["base", "all", "hot", "near", "shifted"]
    assert comparison.left_out == ()
    rows = rows_of(comparison)
    assert rows["all"].summary.mean == pytest.approx(62) and rows["all"].against is None
    assert rows["all"].summary.sd == pytest.approx(math.sqrt(14 / 3))  # 60, 62, 61, 65
    assert (rows["all"].trainable_percent, rows["hot"].trainable_percent) == (4.3075, 1.2131)
    assert rows["hot"].tokens_per_second == 2001.5

    hot = rows["hot"].against
    error = math.sqrt(1 / 6)
    assert (hot.reference, hot.seeds, hot.test.n, hot.test.mean) == ("all", (0, 1, 2, 3), 4, pytest.approx(2))
    assert hot.test.sd == pytest.approx(math.sqrt(2 / 3))
    assert hot.test.interval == pytest.approx((2 - 3.182446 * error, 2 + 3.182446 * error))
    t = 2 / error
    tail = 0.5 - (math.atan(t / math.sqrt(3)) + t * math.sqrt(3) / (3 + t * t)) / math.pi
    assert hot.test.p == pytest.approx(2 * tail) and 0.016 < hot.test.p < 0.0165
    assert hot.test.tost[2] == pytest.approx(0.5) and hot.test.tost[1] == pytest.approx(1 - 0.0457, abs=1e-3)
    assert hot.verdict == "differs, but equivalent within 3 points"
    assert hot.sd_ratio.ratio == pytest.approx(math.sqrt(6 / (14 / 3)))  # 61, 64, 64, 67 against 60, 62, 61, 65
    near = rows["near"].against
    assert near.test.mean == pytest.approx(0) and near.test.p == pytest.approx(1)
    assert near.verdict == "equivalent within 1 point"
    assert rows["base"].against.verdict == "differs"


def test_equal_differences_and_their_verdict(runs: Path):
    comparison = compare_runs(runs)
    shifted = rows_of(comparison)["shifted"].against
    assert shifted.test.mean == pytest.approx(0.5) and shifted.test.sd == 0
    assert (shifted.test.p, shifted.test.interval, shifted.verdict) == (None, None, "cannot tell")
    assert shifted.test.tost == {1: None, 2: None, 3: None} and shifted.sd_ratio.ratio == pytest.approx(1)
    note = "shifted against all: all 4 differences are equal (sd 0): no interval and no test."
    assert comparison.tables[0].notes == (note,)


def test_a_small_certain_difference_is_both(tmp_path: Path):
    for seed in range(8):
        write_run(tmp_path, "all", seed, 0.6 + 0.01 * seed)
        write_run(tmp_path, "hot", seed, 0.6 + 0.01 * seed + 0.0073 + 0.0005 * (-1) ** seed)
    against = rows_of(compare_runs(tmp_path))["hot"].against
    assert against.verdict == "differs, but equivalent within 1 point"
    assert rows_of(compare_runs(tmp_path, margins=(0.5, 2)))["hot"].against.verdict == (
        "differs, but equivalent within 2 points"
    )


def test_a_base_without_seeds_is_compared_with_every_seed(runs: Path):
    base = rows_of(compare_runs(runs))["base"]
    assert base.values == {None: 10.0} and base.summary.sd is None
    assert (base.against.seeds, base.against.test.mean) == ((0, 1, 2, 3), pytest.approx(-52))
    assert base.against.test.sd == pytest.approx(math.sqrt(14 / 3)) and base.against.sd_ratio.ratio is None
    reversed_ = rows_of(compare_runs(runs, "base"))["all"].against
    assert reversed_.test.mean == pytest.approx(52) and reversed_.test.p == pytest.approx(base.against.test.p)


def test_missing_seeds_failed_runs_and_single_seeds_are_named(runs: Path):
    write_run(runs, "once", 2, 0.7)
    shutil.rmtree(runs / "near" / "seed1")
    write_run(runs, "hot", 3, None, status="failed", error="out of <memory>")
    write_run(runs, "hot", 9, 0.9)
    write_run(runs, "gone", 0, None, status="failed", error="no such file")
    comparison = compare_runs(runs)
    rows = rows_of(comparison)
    assert rows["near"].against.seeds == (0, 2, 3)
    assert rows["hot"].against.seeds == (0, 1, 2) and set(rows["hot"].values) == {0, 1, 2, 9}
    assert rows["hot"].against.test.mean == pytest.approx(2)
    once = rows["once"].against
    assert (once.seeds, once.test.mean, once.test.sd, once.verdict) == ((2,), pytest.approx(9), None, "cannot tell")
    notes = comparison.tables[0].notes
    assert "near: seed 1 is missing (no such run with this metric)." in notes
    assert "hot: seed 3 is missing (failed: out of <memory>)." in notes
    assert "all: seed 9 is missing (no such run with this metric)." in notes
    assert "once against all: one pair has no spread: no interval and no test." in notes
    assert not any("base: seed" in note for note in notes)
    assert comparison.left_out == (
        f"gone, seed 0 ({runs / 'gone' / 'seed0'}): failed: no such file",
        f"hot, seed 3 ({runs / 'hot' / 'seed3'}): failed: out of <memory>",
    )
    for text in (markdown(comparison), show(comparison, 200), as_json(comparison), latex(comparison)):
        assert re.search(r"out of \\?<memory>", text) and "seed 1 is missing" in text and "no such file" in text


def test_conditions_without_a_common_seed_or_a_reference_are_named(tmp_path: Path):
    write_run(tmp_path, "all", 0, 0.5)
    write_run(tmp_path, "hot", 1, 0.5)
    write_run(tmp_path, "sql", 0, 0.5, task="spider")
    comparison = compare_runs(tmp_path)
    assert rows_of(comparison)["hot"].against is None
    assert "hot: no seed in common with all." in comparison.tables[0].notes
    assert comparison.tables[1].notes == ("sql: no done run of all to compare it with.",)


def test_the_reference_beside_a_condition_comes_first(tmp_path: Path):
    for task, base in (("gsm8k", 0.5), ("spider", 0.7)):
        for seed in (0, 1):
            write_run(tmp_path, f"{task}/all", seed, base, task=task)
            write_run(tmp_path, f"{task}/hot", seed, base + 0.01 * (seed + 1), task=task)
    comparison = compare_runs(tmp_path)
    assert [table.task for table in comparison.tables] == ["gsm8k", "spider"]
    for table in comparison.tables:
        assert [row.condition for row in table.rows] == [f"{table.task}/all", f"{table.task}/hot"]
        assert table.rows[1].against.reference == f"{table.task}/all"
        assert table.rows[1].against.test.mean == pytest.approx(1.5)


def test_other_test_examples_are_named(runs: Path):
    write_run(runs, "hot", 1, 0.64, n=200)
    (note,) = [note for note in compare_runs(runs).tables[0].notes if "examples" in note]
    assert "all, base, hot, near, shifted on 1000 examples by exact_match; hot on 200 examples" in note


def test_what_was_measured_otherwise_is_not_paired(tmp_path: Path):
    """All experts on 100 examples, hot ones on 200 others: no difference, no p, no verdict."""
    for seed, (base, other) in enumerate(((0.3, 0.6), (0.31, 0.62), (0.29, 0.61))):
        write_run(tmp_path, "all", seed, base, n=100, config={"test_hash": "t" * 64})
        write_run(tmp_path, "hot", seed, other, n=200, config={"test_hash": "u" * 64})
    (table,) = compare_runs(tmp_path).tables
    assert [row.against for row in table.rows] == [None, None]
    assert "hot: no seed in common with all that was measured alike." in table.notes
    (note,) = [note for note in table.notes if "not paired" in note]
    assert "(test data, number of test examples): all on 100 examples by exact_match; hot on 200" in note
    assert "+3" not in markdown(compare_runs(tmp_path)) and "differs" not in markdown(compare_runs(tmp_path))


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"test_hash": "u" * 64}, "test data"),
        ({"scorer_hash": "u" * 64}, "what judges the answers"),
        ({"sampling": {"samples": 20, "temperature": 0.2, "top_p": 0.95, "seed": 0}}, "sampling"),
        ({"max_new_tokens": 9}, "tokens of an answer"),
        ({"data": "gsm8k:/here", "max_new_tokens": 512}, "tokens of an answer"),
        ({"tasks": ["piqa", "gsm8k:/edited"], "tasks_hash": [None, "u" * 64]}, "rows of the harness's task"),
        ({"tasks": ["gsm8k"], "include_hash": "u" * 64}, "files in --include-path"),
        ({"engine": "vllm"}, "engine"),
        ({"harness": "lm-eval 0.4.9", "num_fewshot": 5}, "harness"),
        ({"generations": "answers.jsonl"}, "engine"),
    ],
    ids=str,
)
def test_each_way_of_measuring_is_told_and_pairs_only_with_its_like(runs: Path, config: dict, word: str):
    known = {"test_hash": "t" * 64, "scorer_hash": "t" * 64, "include_hash": "t" * 64}
    known |= {"tasks": ["gsm8k:/here"], "tasks_hash": ["t" * 64]} if "tasks_hash" in config else {}
    for condition, scores in SCORES.items():
        for seed, score in scores.items():
            write_run(runs, condition, seed, score, config=known | (config if condition == "hot" else {}))
    rows = rows_of(compare_runs(runs))
    assert rows["hot"].against is None and rows["near"].against.test.n == 4
    assert any("not paired" in note and word in note for note in compare_runs(runs).tables[0].notes)
    write_run(runs, "hot", 2, SCORES["hot"][2], config=known)
    assert rows_of(compare_runs(runs))["hot"].against.seeds == (2,)


def test_what_older_records_lack_is_not_compared(runs: Path):
    known = {"test_hash": "t" * 64, "scorer_hash": "t" * 64}
    greedy = {"samples": 1, "temperature": 0.0, "top_p": 1.0, "seed": 5}
    for seed, score in SCORES["hot"].items():
        write_run(runs, "hot", seed, score, config=known | {"sampling": greedy if seed else None})
    assert rows_of(compare_runs(runs))["hot"].against.test.n == 4 and compare_runs(runs).tables[0].notes[1:] == ()


def test_the_tasks_own_length_of_an_answer_is_no_other_way(runs: Path):
    for seed, score in SCORES["hot"].items():
        write_run(runs, "hot", seed, score, config={"data": "gsm8k:/here", "max_new_tokens": 256})
    assert rows_of(compare_runs(runs))["hot"].against.test.n == 4 and compare_runs(runs).tables[0].notes[1:] == ()


def test_files_of_other_tasks_of_the_harness_are_not_compared(runs: Path):
    """Where the rows of a task itself are known, what else is there is not asked."""
    for condition, scores in SCORES.items():
        own = "u" if condition == "hot" else "t"
        config = {"tasks": ["gsm8k:/here", "hellaswag:/here"], "tasks_hash": ["t" * 64, own * 64], "include_hash": own}
        for seed, score in scores.items():
            write_run(runs, condition, seed, score, config=config)
    assert rows_of(compare_runs(runs))["hot"].against.test.n == 4


def test_held_out_losses_of_other_tokens_are_not_paired(tmp_path: Path):
    config = {"test_hash": "t" * 64, "max_length": 1024, "train_on": None}
    for seed in range(3):
        write_run(tmp_path, "all", seed, None, loss=0.5 + seed / 100, config=config)
        write_run(tmp_path, "hot", seed, None, loss=0.6 + seed / 90, config=config)
        write_run(tmp_path, "short", seed, None, loss=0.6 + seed / 90, config=config | {"max_length": 64})
        write_run(tmp_path, "asked", seed, None, loss=0.6 + seed / 90, config=config | {"train_on": "all"})
        other = config | {"chat_template": "f" * 64}
        write_run(tmp_path, "chat", seed, None, loss=0.6 + seed / 90, config=other)
        write_run(tmp_path, "talk", seed, None, loss=0.6 + seed / 90, config=config | {"chat_template": "e" * 64})
    against = {name: row.against for name, row in rows_of(compare_runs(tmp_path, "chat")).items()}
    assert against["talk"] is None
    against = {name: row.against for name, row in rows_of(compare_runs(tmp_path)).items()}
    assert against["hot"].test.n == 3 and against["short"] is against["asked"] is None


def test_sweeps_are_kept_apart_and_other_runs_named(runs: Path):
    for seed in (0, 1):
        write_run(runs / "other", "all", seed, 0.9, sweep="t")
    write_run(runs, "mine", 0, 0.9, sweep=None)
    write_run(runs / "hot" / "seed0", "warmup", 0, 0.9, sweep=None)  # a stage of a run
    write_run(runs, "later", 0, None, sweep=None, status="running")
    comparison = compare_runs(runs)
    assert [(table.sweep, len(table.rows)) for table in comparison.tables] == [("s", 5), ("t", 1)]
    assert comparison.left_out == (
        f"later, seed 0 ({runs / 'later' / 'seed0'}): left out, still running",
        f"mine, seed 0 ({runs / 'mine' / 'seed0'}): left out, not of a sweep",
    )


def test_holm_is_over_the_tables_conditions(runs: Path):
    plain, corrected = rows_of(compare_runs(runs)), rows_of(compare_runs(runs, holm=True))
    # Three conditions have a t test (shifted has none): base's p is the smallest, near's the largest.
    base, hot, near = (plain[name].against.test.p for name in ("base", "hot", "near"))
    assert base < hot < near
    for name, p in (("base", 3 * base), ("hot", 2 * hot), ("near", near), ("shifted", None)):
        against = corrected[name].against
        assert against.p_holm == (None if p is None else pytest.approx(p)) and against.test == plain[name].against.test
        assert plain[name].against.p_holm is None and plain[name].against.tost_holm is None
    near = corrected["near"].against
    assert near.tost_holm[1] == pytest.approx(3 * near.test.tost[1]) and near.verdict == "equivalent within 1 point"
    assert corrected["hot"].against.verdict == "differs"


def test_holm_can_undo_a_verdict(runs: Path):
    for i in range(3):
        for seed, score in SCORES["hot"].items():
            write_run(runs, f"hot{i}", seed, score)
    assert rows_of(compare_runs(runs))["hot"].against.verdict == "differs, but equivalent within 3 points"
    assert rows_of(compare_runs(runs, holm=True))["hot"].against.verdict == "cannot tell"


def test_held_out_loss(tmp_path: Path):
    for seed in range(3):
        write_run(tmp_path, "all", seed, None, loss=0.5 + 0.01 * seed)
        write_run(tmp_path, "hot", seed, None, loss=0.52 + 0.01 * seed + 0.001 * seed)
    write_run(tmp_path, "hot", 3, None, loss=None)
    comparison = compare_runs(tmp_path, metric="test_loss", margins=[0.05])
    hot = rows_of(comparison)["hot"].against
    assert hot.test.mean == pytest.approx(0.021) and hot.verdict == "differs, but equivalent within 0.05"
    assert comparison.tables[0].measure == "held-out loss"
    assert compare_runs(tmp_path, metric="test_loss").margins == ()
    assert "+0.0210" in markdown(comparison)
    assert compare_runs(tmp_path) == compare_runs(tmp_path, metric="test_loss"), "no run has a task"
    for seed in (0, 1, 2):
        write_run(tmp_path, "hot", seed, None)
        write_run(tmp_path, "all", seed, None)
    with pytest.raises(DataError, match="no run of a sweep here is done and has a score"):
        compare_runs(tmp_path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"reference": "al"},
            r"no condition is called 'al': there are all, base, hot, near, .*\(--reference\)",
        ),
        ({"metric": "f1"}, "metric 'f1' does not exist: there are score and test_loss"),
        ({"margins": (0, 1)}, "bound of equivalence 0 is out of range"),
    ],
)
def test_mistakes_are_named(runs: Path, options: dict, says: str):
    with pytest.raises(DataError, match=says):
        compare_runs(runs, **options)


def test_nothing_to_compare(tmp_path: Path, runs: Path):
    with pytest.raises(FileError, match="not a folder"):
        compare_runs(tmp_path / "none")
    write_run(tmp_path / "plain", "all", 0, 0.5, sweep=None)
    with pytest.raises(DataError, match=r"no run of a sweep.*not of a sweep"):
        compare_runs(tmp_path / "plain")
    told = r"hot/seed0 is one run's folder, with nothing to compare: give the folder that holds its sweep's runs, or"
    with pytest.raises(DataError, match=told):
        compare_runs(runs / "hot" / "seed0")
    shutil.copytree(runs / "hot", runs / "copies" / "hot")
    with pytest.raises(DataError, match="are both hot of the sweep s with the seed 0"):
        compare_runs(runs)


def show(comparison, width=80) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(terminal_tables(comparison), highlight=False, soft_wrap=False)
    return console.file.getvalue()


def as_json(comparison) -> str:
    return json.dumps(as_dict(comparison), allow_nan=False)


def test_every_output_has_the_same_numbers(runs: Path):
    comparison = compare_runs(runs, holm=True)
    hot = rows_of(comparison)["hot"].against
    p = f"{hot.p_holm:.3f}"
    text = show(comparison)
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    (row,) = [line.split() for line in text.splitlines() if line.strip().startswith("hot") and "[" in line]
    tost = [f"{hot.tost_holm[bound]:.3f}" for bound in (1, 2, 3)]
    assert row == ["hot", "+2.00", "[0.70,", "3.30]", p, *tost, "differs"]
    (row,) = [line for line in markdown(comparison).splitlines() if line.startswith("| hot")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:6] == ["hot", "4", "64.00 ± 2.45", "1.13", "1.21", "2,002"]
    assert cells[6:] == ["+2.00", "[0.70, 3.30]", p, *tost, "differs"]
    (line,) = [line for line in csv.DictReader(io.StringIO(csv_text(comparison))) if line["condition"] == "hot"]
    assert float(line["difference"]) == hot.test.mean and float(line["p_holm"]) == hot.p_holm
    assert (line["n"], line["pairs"], line["reference"], line["verdict"]) == ("4", "4", "all", "differs")
    assert float(line["ci90_low"]) == hot.test.interval90.low and float(line["tost_2"]) == hot.test.tost[2]
    parsed = json.loads(as_json(comparison))
    (row,) = [row for row in parsed["tables"][0]["rows"] if row["condition"] == "hot"]
    assert row["against"]["test"]["interval"] == list(hot.test.interval) and row["values"]["2"] == pytest.approx(64)
    assert row["against"]["tost_holm"]["3"] == hot.tost_holm[3]


def test_a_folder_that_all_conditions_share_is_printed_once(tmp_path: Path):
    for name, scores in (("nano/nano-math/all", (0.5, 0.6)), ("nano/nano-math/hot", (0.6, 0.65))):
        for seed, score in enumerate(scores):
            write_run(tmp_path, name, seed, score)
    comparison = compare_runs(tmp_path, reference="nano/nano-math/all")
    shown = show(comparison)
    assert shown.count("nano/nano-math") == 1 and "conditions nano/nano-math/…" in shown
    assert "nano/nano-math/hot" in csv_text(comparison), "files have whole names"


def test_numbers_that_are_missing_are_empty(runs: Path):
    comparison = compare_runs(runs)
    lines = {line["condition"]: line for line in csv.DictReader(io.StringIO(csv_text(comparison)))}
    assert lines["shifted"]["p"] == lines["shifted"]["ci95_low"] == lines["all"]["difference"] == ""
    assert "all 4 differences are equal" in lines["shifted"]["reason"] and lines["base"]["sd_ratio"] == ""
    (row,) = [line for line in markdown(comparison).splitlines() if line.startswith("| base")]
    assert [cell.strip() for cell in row.strip("|").split("|")][:6] == ["base", "–", "10.00", "–", "0.00", "–"]


def test_latex_is_booktabs_and_escaped(runs: Path):
    write_run(runs, "hot_25+x", 0, 0.61)
    text = latex(compare_runs(runs))
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(body) == 7 and {line.count(" & ") for line in body} == {12}
    assert re.search(r"^\\begin\{tabular\}\{lr{11}l\}$", text, re.M) and text.count(r"\toprule") == 1
    assert r"hot\_25+x" in text and r"trained, \%" in text and r"64.00 $\pm$ 2.45" in text and "$<$0.001" in text
    assert not re.search(r"(?<!\\)[_&#](?! )", "\n".join(body).replace(" & ", ""))
    assert all(ord(sign) < 128 for sign in "".join(body))
    if shutil.which("pdflatex"):
        document = rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{text}\end{{document}}"
        (runs / "t.tex").write_text(document)
        done = subprocess.run(["pdflatex", "-halt-on-error", "t.tex"], cwd=runs, capture_output=True)
        assert done.returncode == 0, done.stdout


def test_the_command_writes_what_it_is_asked_for(runs: Path, tmp_path: Path):
    def call(*words):
        done = CliRunner(env={"COLUMNS": "120"}).invoke(APP, [str(runs), *map(str, words)])
        return done.exit_code, done.output, done.exception

    files = [tmp_path / name for name in ("a/t.csv", "t.tex", "t.md")]
    code, output, _ = call("--csv", files[0], "--latex", files[1], "--markdown", files[2], "--holm")
    comparison = compare_runs(runs, holm=True)
    assert code == 0 and "equivalent within 1 point" in output and "(Holm)" in output
    assert [file.read_text() for file in files] == [csv_text(comparison), latex(comparison), markdown(comparison)]
    code, output, _ = call("--json", "--reference", "hot", "--margins", "0.5,4")
    parsed = json.loads(output)
    assert code == 0 and parsed["reference"] == "hot" and parsed["margins"] == [0.5, 4]
    assert parsed == json.loads(as_json(compare_runs(runs, "hot", margins=(0.5, 4))))
    code, _, error = call("--reference", "nobody", "--csv", tmp_path / "never.csv")
    assert code == 1 and isinstance(error, DataError) and not (tmp_path / "never.csv").exists()


def test_names_from_others_are_escaped_in_every_format(tmp_path: Path):
    names = {
        "a|b": "a\\|b", "two\nlines": "two lines", "<script>x</script>": r"\<script>x\</script>",
        "\x1b[31mred": "\ufffd[31mred", "![x](http://a/b)": r"![x]\(http://a/b)", "\\|": r"\\\|",
        "=1+1": "=1+1", "&lt;": r"\&lt;",
    }  # fmt: skip
    for number, name in enumerate(("all", *names)):
        for seed in (0, 1):
            folder = write_run(tmp_path / str(number), "x", seed, 0.5 + seed / 10)
            record = json.loads((folder / "run.json").read_text())
            record["sweep"]["condition"], record["model"]["name"] = name, "m\nn<i>"
            (folder / "run.json").write_text(json.dumps(record))
    comparison = compare_runs(tmp_path)
    told = markdown(comparison).splitlines()
    assert told[0] == r"### s, gsm8k, m n\<i>: exact match, %"
    assert all(any(line.startswith(f"| {shown} |") for line in told) for shown in names.values())
    assert all(len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 14 for line in told if line.startswith("|"))
    screen = show(comparison, 200)
    assert (
        "\x1b" not in screen and "\ufffd[31mred" in screen and "<script>x</script>" in screen and "two lines" in screen
    )
    tex = latex(comparison).splitlines()
    assert (
        tex[0] == "% s, gsm8k, m n<i>: exact match, %" and len(tex) == 1 + len(comparison.tables[0].notes) + 4 + 9 + 2
    )
    assert any(line.startswith("$<$script$>$x$<$/script$>$ & ") for line in tex) and "\x1b" not in "".join(tex)
    rows = list(csv.DictReader(io.StringIO(csv_text(comparison))))
    assert {row["condition"] for row in rows} == {"all", *names} - {"=1+1"} | {"'=1+1"}
    assert any(row["difference"].startswith("0") for row in rows), "numbers stay numbers"


@pytest.mark.parametrize("text", ["=1+1", "+x", "-x", "@SUM(1)", " =x", "\t=x"])
def test_a_formula_is_text(text: str):
    assert escape.csv(text) == f"'{text}"
    assert escape.csv(-1.5) == -1.5 and escape.csv("a-b") == "a-b" and escape.csv("") == "" and escape.csv(None) is None


def test_a_held_out_loss_is_the_score_where_no_run_has_a_task(tmp_path: Path):
    for seed in (0, 1, 2):
        write_run(tmp_path, "all", seed, None, loss=1.0 + seed / 100)
        write_run(tmp_path, "hot", seed, None, loss=1.1 + seed / 90)
    comparison = compare_runs(tmp_path)
    assert comparison.metric == "test_loss" and comparison.margins == () and rows_of(comparison)["hot"].against
    assert comparison == compare_runs(tmp_path, metric="test_loss")
    at = write_run(tmp_path, "hot", 3, 0.5)
    comparison = compare_runs(tmp_path, "hot")
    assert comparison.metric == "score" and str(at) not in str(comparison.left_out), "there is a task"
    assert f"all, seed 0 ({tmp_path / 'all' / 'seed0'}): done, without a score" in comparison.left_out


def test_a_broken_record_is_left_out_in_words(tmp_path: Path):
    write_run(tmp_path, "all", 0, 0.5)
    write_run(tmp_path, "hot", 0, 0.5)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "run.json").write_text('{"version": 7}')
    (left,) = compare_runs(tmp_path).left_out
    assert left.startswith(f"{tmp_path / 'theirs'}: ") and "has version 7" in left


def test_a_difference_that_rounds_to_zero_has_no_minus(tmp_path: Path):
    for seed, less in ((0, 0.00002), (1, 0.00003)):
        write_run(tmp_path, "all", seed, 0.6)
        write_run(tmp_path, "hot", seed, 0.6 - less)
    assert "| +0.00 | [−0.01, 0.00] |" in markdown(compare_runs(tmp_path))


def test_the_page_shows_what_compare_writes(runs: Path):
    page = DOCS.read_text()
    assert markdown(compare_runs(runs)).strip() in page
    widest = math.sqrt(scipy_stats.f.ppf(0.975, 7, 7))
    assert f"factor of {widest:.2f}" in page


def test_comparing_loads_no_model():
    code = (
        "import sys, hotlora.report.comparison_table; sys.exit('transformers' in sys.modules or 'peft' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


A_RIGHT = [1, 1, 1, 1, 1, 1, 1, 0, 0, 0]
B_RIGHT = [1, 1, 1, 0, 0, 0, 0, 1, 0, 0]


def write_results(folder: Path, scores: list[float], task="gsm8k", ids=None, n=None, **changes) -> Path:
    """A run's folder as `hotlora evaluate --output` leaves it; called again it adds a task."""
    rows = [{"index": i, "id": str(i if ids is None else ids[i]), "correct": s} for i, s in enumerate(scores)]
    result = {
        "metric": changes.pop("metric", "exact_match"), "accuracy": sum(scores) / len(scores), "n": n or len(scores),
        "correct": sum(scores), "results": f"results-{task}.jsonl",
    }  # fmt: skip
    there = json.loads((folder / "run.json").read_text())["evaluation"] if folder.exists() else {}
    record = new_record(
        name="adapter", condition="adapter", model={"name": "m", "fingerprint": "f"}, data={"name": task},
        evaluation=there | {task: result},
    )  # fmt: skip
    write_record(folder, {**record, "status": "done", **changes})
    (folder / result["results"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_two_runs_example_by_example(tmp_path: Path):
    a, b = write_results(tmp_path / "a", A_RIGHT), write_results(tmp_path / "b", B_RIGHT)
    (task,) = compare_examples(a, b).tasks
    assert (task.task, task.metric, task.n, task.notes) == ("gsm8k", "exact match", 10, ())
    assert (task.a, task.b, task.difference) == (70, 40, 30)
    assert task.mcnemar == McNemar(10, 4, 1, pytest.approx(2 * (5 + 1) / 2**5))  # 4 or more of 5, on both sides
    assert task.interval == pytest.approx([100 * end for end in paired_difference(A_RIGHT, B_RIGHT)[1:]])
    assert task.verdict == "cannot tell"
    (back,) = compare_examples(b, a).tasks
    assert (back.difference, back.mcnemar.only_a, back.mcnemar.p) == (-30, 1, task.mcnemar.p)


def test_a_split_that_chance_does_not_make_differs(tmp_path: Path):
    a, b = write_results(tmp_path / "a", [1] * 8 + [0] * 92), write_results(tmp_path / "b", [0] * 99 + [1])
    (task,) = compare_examples(a, b).tasks
    assert task.mcnemar.p == pytest.approx(2 * (9 + 1) / 2**9) and task.verdict == "differs"
    (same,) = compare_examples(a, a).tasks
    assert (same.difference, same.interval, same.mcnemar.p, same.verdict) == (0, (0, 0), 1, "cannot tell")


def test_examples_pair_by_what_they_ask(tmp_path: Path):
    """In any order, with other examples beside them, and with questions that are asked twice."""
    a = write_results(tmp_path / "a", [1, 0, 1, 1, 0], ids="xyzxw")
    b = write_results(tmp_path / "b", [0, 1, 1, 0], ids="zxyx")
    (task,) = compare_examples(a, b).tasks
    assert (task.n, task.a, task.b) == (4, 75, 50)  # x 1 1, y 0 1, z 1 0, the second x 1 0
    assert (task.mcnemar.only_a, task.mcnemar.only_b) == (2, 1)
    assert task.notes == (f"gsm8k: 1 of 5 examples of {a} are not among the other's: left out.",)
    with pytest.raises(DataError, match="have no example in common"):
        compare_examples(a, write_results(tmp_path / "c", [1], ids="q"))


def test_answers_that_others_judged_are_not_paired(tmp_path: Path):
    """The same prompts by other unit tests or distractors."""
    a = write_results(tmp_path / "a", A_RIGHT, config={"test_hash": "t" * 64, "scorer_hash": "a" * 64})
    b = write_results(tmp_path / "b", B_RIGHT, config={"test_hash": "t" * 64, "scorer_hash": "b" * 64})
    with pytest.raises(DataError, match=r"nothing of the two runs can be paired: gsm8k: .* were judged by others"):
        compare_examples(a, b)
    for config in ({"test_hash": "t" * 64}, {"test_hash": "u" * 64, "scorer_hash": "b" * 64}):
        write_results(tmp_path / str(len(config)), B_RIGHT, config=config)
        (task,) = compare_examples(a, tmp_path / str(len(config))).tasks
        assert task.n == 10 and task.notes == ()


def test_other_ways_of_answering_are_told(tmp_path: Path):
    a = write_results(tmp_path / "a", A_RIGHT)
    b = write_results(tmp_path / "b", B_RIGHT, config={"engine": "vllm", "sampling": {"samples": 1, "temperature": 1}})
    (task,) = compare_examples(a, b).tasks
    assert task.notes == ("gsm8k: measured otherwise (engine, sampling), so not the models alone differ.",)


def test_several_answers_an_example_have_no_mcnemar(tmp_path: Path):
    a = write_results(tmp_path / "a", [0.5, 1, 0.25, 0.75, 1.0, 0.5], metric="pass@1")
    b = write_results(tmp_path / "b", [0.0, 0.5, 0, 0.25, 0.5, 0], metric="pass@1")
    (task,) = compare_examples(a, b).tasks
    assert task.mcnemar is None and task.verdict == "differs"  # at least a quarter more in each
    assert task.difference == pytest.approx(100 * 2.75 / 6) and task.interval.low > 25
    assert "no McNemar test" in task.notes[0] and "cannot tell" not in show_paired(a, b)
    (one,) = compare_examples(write_results(tmp_path / "c", [1]), write_results(tmp_path / "d", [0])).tasks
    assert (one.interval, one.mcnemar.p, one.verdict) == (None, 1, "cannot tell")


def show_paired(a: Path, b: Path) -> str:
    console = Console(width=80, file=io.StringIO())
    console.print(paired_table(compare_examples(a, b)), highlight=False)
    return console.file.getvalue()


def sample(root: Path, metric="exact_match") -> tuple[Path, Path]:
    a, b = write_results(root / "a", A_RIGHT), write_results(root / "b", B_RIGHT, metric=metric)
    for folder, scores in ((a, [1] * 1200), (b, [1, 0] * 600)):
        write_results(folder, scores, task="hellaswag", metric="acc_norm")
    return a, b


def test_two_runs_on_several_tasks(tmp_path: Path):
    a, b = sample(tmp_path, "strict_match")
    write_results(b, [1, 0], task="spider")
    runs = compare_examples(a, b)
    assert [task.task for task in runs.tasks] == ["gsm8k", "hellaswag"]
    assert runs.tasks[0].metric == "exact match and strict match"
    assert runs.tasks[0].notes == ("gsm8k: measured in two ways, exact match and strict match.",)
    assert runs.left_out == (f"spider: only {b} was scored on it.",)
    text = show_paired(a, b)
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text and "! spider: only" in text
    (row,) = [line.split() for line in text.splitlines() if line.strip().startswith("hellaswag")]
    assert row[:5] == ["hellaswag", "1,200", "100.00", "50.00", "+50.00"]
    assert row[7:] == ["600", "0", "<0.001", "differs"]
    parsed = json.loads(json.dumps(paired_dict(runs), allow_nan=False))
    assert parsed["tasks"][0]["mcnemar"] == {"n": 10, "only_a": 4, "only_b": 1, "p": 0.375}
    assert parsed["tasks"][1]["verdict"] == "differs" and parsed["tasks"][1]["interval"] == list(runs.tasks[1].interval)


def test_the_page_shows_two_runs(tmp_path: Path):
    lines = show_paired(*sample(tmp_path)).split("acc norm, %")[1].strip("\n").splitlines()
    assert "".join(f"    {line.rstrip()}\n" for line in lines) in DOCS.read_text()


def test_two_runs_that_cannot_be_compared(tmp_path: Path, runs: Path):
    a, b = write_results(tmp_path / "a", A_RIGHT), write_results(tmp_path / "b", B_RIGHT, task="spider")
    told = r"no task in common \(.*a on gsm8k and .*b on spider\).*hotlora evaluate --data ROWS --adapter RUN --output"
    with pytest.raises(DataError, match=told):
        compare_examples(a, b)
    with pytest.raises(DataError, match=r"runs is no run's folder: it has no run\.json"):
        compare_examples(a, runs)
    with pytest.raises(DataError, match=r"is not done \(its status is failed\)"):
        compare_examples(a, write_results(tmp_path / "c", B_RIGHT, status="failed"))
    with pytest.raises(FileError, match="holds 10 of 11 examples"):
        compare_examples(a, write_results(tmp_path / "d", B_RIGHT, n=11))
    (a / "results-gsm8k.jsonl").unlink()
    with pytest.raises(FileError, match="cannot be read"):
        compare_examples(a, write_results(tmp_path / "e", B_RIGHT))
    kept_nothing = write_run(tmp_path / "f", "all", 0, 0.5)
    with pytest.raises(FileError, match="kept no example's result on gsm8k"):
        compare_examples(kept_nothing, tmp_path / "e")


def test_the_command_takes_two_runs(tmp_path: Path):
    def call(*words):
        done = CliRunner(env={"COLUMNS": "80"}).invoke(APP, [*map(str, words)])
        return done.exit_code, done.output, done.exception

    a, b = write_results(tmp_path / "a", A_RIGHT), write_results(tmp_path / "b", B_RIGHT)
    code, output, _ = call(a, b)
    assert code == 0 and f"A: {a}" in output.replace("\n", "") and "0.375" in output
    code, output, _ = call(a, b, "--json")
    assert code == 0 and json.loads(output) == json.loads(json.dumps(paired_dict(compare_examples(a, b))))
    code, _, error = call(a, b, "--holm")
    assert code == 1 and isinstance(error, HotLoraError) and "no option but --json" in str(error)
    code, _, error = call(a, b, a)
    assert code == 1 and "3 folders: give one" in str(error)
