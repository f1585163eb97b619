"""Leaderboards: ranks against scipy, protocols read off records, and what is refused."""

import csv
import hashlib
import io
import json
import random
import re
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from scipy import stats as scipy_stats
from typer.testing import CliRunner

import hotlora
from hotlora.base.errors import DataError, FileError, HotLoraError
from hotlora.base.files import sha256_file, write_json
from hotlora.base.records import find_records, new_record, read_record, write_record
from hotlora.cli.main import app
from hotlora.evaluation.stats import proportion_interval
from hotlora.report.leaderboard import leaderboard
from hotlora.report.leaderboard_folder import INDEX, add_runs, read_board
from hotlora.report.leaderboard_page import terminal_tables, write_leaderboard
from hotlora.report.leaderboard_protocol import NAMES, SEEDS, faults, protocol_of
from hotlora.routing.plan import ExpertPlan
from hotlora.runs.options import RunOptions
from hotlora.tasks.data import data_hash, load_examples

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "nano"
PLAN = ExpertPlan({0: (0, 1)}, 4, "hot", {"experts_per_layer": 2}, fingerprint="olmoe-0")


def write_run(
    root: Path, method: str, seed: int | None, score: float | None, *, task="gsm8k", trained=100, loss=None, n=1000,
    options: dict[str, Any] | None = None, **changes: Any,
) -> Path:  # fmt: skip
    """A run as a sweep leaves it, whole and consistent. seed None: the model as it is."""
    folder = root / method / ("" if seed is None else f"seed{seed}")
    result = {}
    if score is not None:
        correct = round(score * n)
        low, high = proportion_interval(correct, n)
        result = {"metric": "exact_match", "accuracy": correct / n, "n": n, "correct": correct}
        result |= {"ci_low": low, "ci_high": high}
    config = {
        "model": "m",
        "data": task,
        "test_data": task,
        "test_hash": "b" * 64,
        "scorer_hash": "9" * 64,
        "on_top_of": [],
    }
    sections: dict[str, Any] = {"evaluation": {task: result}} if result else {}
    data: dict[str, Any] = {"name": task, "hash": "b" * 64, "train": 0, "test": n}
    if seed is not None:
        given = {"model": "m", "data": task, "max_steps": 10, "seed": seed} | (options or {})
        config = RunOptions(**given).recorded() | config | {"data_hash": "a" * 64, "train_on": None}
        data |= {"hash": "a" * 64, "train": 50}
        sections["plan"] = {"path": "plan.json", "rule": "hot", "hash": PLAN.hash}
        sections["training"] = {
            "steps": config["max_steps"], "tokens": 1000, "seconds": 10.0 + seed, "peak_memory_bytes": 1000 + seed,
            "tokens_per_second": 1000 / (10.0 + seed), "test_loss_before": 2.0, "test_loss": loss,
        }  # fmt: skip
    parameters = {"trainable": trained if seed is not None else 0, "total": 10_000, "percent": 0.0}
    parameters["percent"] = 100 * parameters["trainable"] / parameters["total"]
    record = new_record(
        name=method, condition=method, seed=seed or 0, data=data, config=config, parameters=parameters,
        model={"name": "m", "fingerprint": "olmoe-0", "num_parameters": 9000},
        sweep={"name": "s", "condition": method}, **sections,
    )  # fmt: skip
    write_record(folder, {**record, "status": "done", "environment": {"device": "a card"}, **changes})
    if seed is not None:
        PLAN.save(folder / "plan.json")
    return folder


def edit(folder: Path, change) -> None:
    record = json.loads((folder / "run.json").read_text())
    change(record)
    write_json(folder / "run.json", record)


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


SCORES = {  # of six seeds, in thousandths
    "all": [600, 612, 605, 640, 631, 622],
    "hot": [655, 660, 652, 689, 684, 673],
    "near": [601, 610, 607, 641, 630, 623],
    "low": [520, 541, 518, 566, 551, 540],
    "far": [610, 590, 660, 580, 700, 640],
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    for method, scores in SCORES.items():
        for seed, score in enumerate(scores):
            write_run(folder, method, seed, score / 1000)
    return folder


@pytest.fixture
def runs(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "runs"))


def rows_of(board, place=0):
    return {row.method: row for row in board.tables[place].rows}


def holm(p_values: list[float]) -> list[float]:
    """By its definition, not as the package has it: the largest of (m - j) p_j over all p_j up to the own one."""
    ordered = sorted(p_values)
    m = len(ordered)
    return [min(1.0, max((m - j) * q for j, q in enumerate(ordered) if q <= p)) for p in p_values]


def test_ranks_by_scipy(runs: Path):
    board = leaderboard(runs)
    (table,) = board.tables
    pairs = list(combinations(SCORES, 2))
    tests = {pair: scipy_stats.ttest_rel(SCORES[pair[0]], SCORES[pair[1]]) for pair in pairs}
    corrected = dict(zip(pairs, holm([tests[pair].pvalue for pair in pairs]), strict=True))
    assert len(table.pairs) == len(pairs) == 10
    net = dict.fromkeys(SCORES, 0)
    for pair in table.pairs:
        names = (pair.a, pair.b) if (pair.a, pair.b) in tests else (pair.b, pair.a)
        sign = 1 if names == (pair.a, pair.b) else -1
        assert pair.test.p == pytest.approx(tests[names].pvalue, rel=1e-9)
        assert pair.p_holm == pytest.approx(corrected[names], rel=1e-9)
        assert pair.test.mean * sign == pytest.approx(
            sum(x - y for x, y in zip(*(SCORES[name] for name in names), strict=True)) / 60
        )
        if corrected[names] < 0.05:
            winner, loser = names if tests[names].statistic > 0 else names[::-1]
            assert pair.winner == winner
            net[winner] += 1
            net[loser] -= 1
        else:
            assert pair.winner is None
    assert 0 < sum(pair.winner is not None for pair in table.pairs) < 10, "some are told apart, and some are not"
    rows = rows_of(board)
    for method, scores in SCORES.items():
        row = rows[method]
        assert row.overall.wins - row.overall.losses == net[method]
        assert row.overall.rank == 1 + sum(other > net[method] for other in net.values())
        low, high = scipy_stats.t.interval(0.95, 5, sum(scores) / 60, scipy_stats.sem(scores) / 10)
        assert row.interval == pytest.approx((low, high)) and row.mean == pytest.approx(sum(scores) / 60)
    assert rows["hot"].overall.rank == 1 and rows["near"].overall == rows["all"].overall, "ties share a rank"
    beaten = {frozenset((pair.a, pair.b)) for pair in table.pairs if pair.winner}
    assert frozenset(("far", "all")) not in beaten and rows["far"].mean > rows["all"].mean, "a mean alone wins nothing"
    assert list(rows) == ["hot", *list(rows)[1:]] and table.notes == () and board.left_out == {}


def test_a_held_out_loss_is_better_when_lower(tmp_path: Path):
    for seed in range(5):
        write_run(tmp_path, "all", seed, None, task="rows.jsonl", loss=1.5 + 0.01 * seed)
        write_run(tmp_path, "hot", seed, None, task="rows.jsonl", loss=1.3 + 0.011 * seed)
    board = leaderboard(tmp_path)
    rows = rows_of(board)
    assert [(row.method, row.overall.rank) for row in board.tables[0].rows] == [("hot", 1), ("all", 2)]
    assert rows["hot"].overall.wins == 1 and rows["hot"].mean == pytest.approx(1.322)
    page = write_leaderboard(board, tmp_path).read_text()
    assert "| held-out loss [95%] |" in page and "| 1.3220 [" in page


def test_budgets_stand_apart(tmp_path: Path):
    sizes = {"a": 1000, "b": 1050, "c": 1051, "d": 1103, "e": 4000}
    shift = {"a": 0, "b": 100, "c": 200, "d": 300, "e": 400}
    for method, trained in sizes.items():
        for seed in range(6):
            score = (500 + shift[method] + random.Random(f"{method}{seed}").randint(0, 5)) / 1000
            write_run(tmp_path, method, seed, score, trained=trained)
    rows = rows_of(leaderboard(tmp_path))
    assert {method: row.budget for method, row in rows.items()} == {"a": 1, "b": 1, "c": 2, "d": 2, "e": 3}
    assert [rows[method].overall.rank for method in "edcba"] == [1, 2, 3, 4, 5]
    assert [rows[method].in_budget.rank for method in "abcde"] == [2, 1, 2, 1, 1]
    assert (rows["b"].in_budget.wins, rows["b"].in_budget.losses, rows["b"].overall.losses) == (1, 0, 3)


def test_methods_that_lack_seeds_are_shown_and_not_ranked(runs: Path):
    shutil.rmtree(runs / "far" / "seed2")
    write_run(runs, "far", 5, None, status="failed")
    board = leaderboard(runs)
    row = rows_of(board)["far"]
    assert (row.overall.rank, row.in_budget.rank, len(row.values)) == (None, None, 4)
    assert row.note == "not ranked: it lacks the seeds 2, 5" and board.tables[0].notes == (f"far: {row.note}.",)
    assert len(board.tables[0].pairs) == 6 and not any("far" in (pair.a, pair.b) for pair in board.tables[0].pairs)
    assert board.left_out == {runs / "far" / "seed5": "it is failed, and not done: run it again"}


def test_pairs_take_all_seeds_that_both_have(runs: Path):
    """Most methods have five; one that has six is compared over six with another that has six."""
    for method in ("all", "near", "low"):
        shutil.rmtree(runs / method / "seed5")
    table = leaderboard(runs).tables[0]
    assert (table.protocol["seeds"], table.protocol["ranked_with"]) == ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4])
    assert all(row.overall.rank for row in table.rows)
    for pair in table.pairs:
        assert len(pair.seeds) == (6 if {pair.a, pair.b} == {"hot", "far"} else 5)
        assert pair.test.p == pytest.approx(
            scipy_stats.ttest_rel(*(SCORES[name][: len(pair.seeds)] for name in (pair.a, pair.b))).pvalue
        )


def test_a_base_by_its_path_from_the_root_is_the_same_model(runs: Path, monkeypatch: pytest.MonkeyPatch):
    """As an adapter notes it, and as its score's record does, then."""
    monkeypatch.chdir(runs.parent)
    for number, path in enumerate(sorted(runs.rglob("run.json"))):
        record = read_record(path.parent)
        name = "models/olmoe" if number else str(runs.parent.resolve() / "models" / "olmoe")
        write_record(path.parent, {**record, "model": {**record["model"], "name": name}})
    assert leaderboard(runs).tables[0].model == "models/olmoe"


def test_a_model_as_it_is_is_shown_first_and_not_ranked(runs: Path):
    write_run(runs, "base", None, 0.1)
    board = leaderboard(runs)
    row = board.tables[0].rows[0]
    assert (row.method, row.budget, row.trained, row.overall.rank) == ("base", None, 0, None)
    assert row.values == {None: 10.0} and row.interval is None and row.note == "not trained, and not ranked"
    record = read_record(runs / "base")
    write_record(runs / "base", record | {"config": record["config"] | {"quantize": 4}})
    (row,) = (row for row in leaderboard(runs).tables[0].rows if row.method == "base")
    assert row.note == "not trained, and not ranked; experts in 4 bits"
    shutil.rmtree(runs / "base")
    write_run(runs, "base", None, 0.1, n=200)
    assert "test examples 200, and 1,000 is asked (--test-limit)" in leaderboard(runs).left_out[runs / "base"]


def test_equal_differences_are_no_win_and_are_told(runs: Path):
    for seed, score in enumerate(SCORES["all"]):
        write_run(runs, "shifted", seed, (score + 5) / 1000)
    table = leaderboard(runs).tables[0]
    (pair,) = [pair for pair in table.pairs if {pair.a, pair.b} == {"all", "shifted"}]
    assert (pair.winner, pair.p_holm) == (None, None)
    assert table.notes == (f"{pair.a} and {pair.b}: all 6 differences are equal (sd 0): no interval and no test.",)


# What makes a run another protocol's: a change of its record, and a word of the error.
OTHERS: dict[str, tuple[Any, str]] = {
    "task": (
        lambda r: r.update(evaluation={"spider": r["evaluation"]["gsm8k"]}),
        "scored on spider by the model olmoe-0, and the board has gsm8k by olmoe-0: begin another board",
    ),
    "fingerprint": (
        lambda r: r["model"].update(fingerprint="qwen2_moe-1"),
        "scored on gsm8k by the model qwen2_moe-1, and the board has gsm8k by olmoe-0: begin another board",
    ),
    "num_parameters": (lambda r: r["model"].update(num_parameters=9001), "9,001, and 9,000"),
    "test_hash": (lambda r: r["config"].update(test_hash="c" * 64), "test data cccccccc, and bbbbbbbb"),
    "test_examples": (None, "test examples 200, and 1,000 is asked (--test-limit)"),
    "metric": (lambda r: r["evaluation"]["gsm8k"].update(metric="acc"), "metric acc, and exact_match"),
    "sampling": (lambda r: r["config"].update(sampling={"samples": 20}), 'sampling {"samples": 20}, and none'),
    "max_new_tokens": (lambda r: r["config"].update(max_new_tokens=9), "9, and none is asked (--max-new-tokens)"),
    "scorer_hash": (
        lambda r: r["config"].update(scorer_hash="c" * 64),
        "what judges the answers cccccccc, and 99999999 is asked",
    ),
    "engine": (lambda r: r["config"].update(engine="vllm"), "engine vllm, and none is asked (--engine transformers)"),
    "harness": (lambda r: r["config"].update(harness="lm-eval 1"), "harness lm-eval 1, and none is asked"),
    "on_top_of": (lambda r: r["config"].update(on_top_of=["d" * 64]), "adapters underneath dddddddd, and none"),
    "data_hash": (
        lambda r: (r["data"].update(hash="e" * 64), r["config"].update(data_hash="e" * 64)),
        "training data eeeeeeee, and aaaaaaaa is asked (--data, --limit)",
    ),
    "train_examples": (lambda r: r["data"].update(train=60), "training examples 60, and 50"),
    "steps": (
        lambda r: (r["training"].update(steps=20), r["config"].update(max_steps=20)),
        "optimizer steps 20, and 10 is asked (--max-steps, --epochs)",
    ),
    "examples_per_step": (lambda r: r["config"].update(batch_size=32), "examples a step 32, and 16"),
    "max_length": (lambda r: r["config"].update(max_length=64), "64, and 512 is asked (--max-length)"),
    "packing": (lambda r: r["config"].update(packing=True), "packing on, and off is asked (--packing)"),
    "train_on": (lambda r: r["config"].update(train_on="all"), "what carries loss all, and last"),
    "chat_template": (lambda r: r["config"].update(chat_template="f" * 64), "chat template ffffffff, and none"),
    "load_best": (lambda r: r["config"].update(load_best=True, eval_steps=1), "on, and off is asked (--load-best)"),
    "early_stopping_patience": (lambda r: r["config"].update(early_stopping_patience=2), "2, and none is asked"),
    "loss_before": (lambda r: r["training"].update(test_loss_before=2.1), "test loss before training 2.1, and 2"),
}


@pytest.mark.parametrize("name", NAMES)
def test_another_protocol_is_refused_and_each_difference_named(name: str, runs: Path, tmp_path: Path):
    board = tmp_path / "board"
    add_runs(board, [runs])
    change, told = OTHERS[name]
    for seed in range(6):
        folder = write_run(tmp_path / "new", "new", seed, 0.6, n=200 if change is None else 1000)
        if change:
            edit(folder, change)
        if name == "fingerprint":  # a plan of that model
            plan = ExpertPlan({0: (0, 1)}, 4, "hot", {}, fingerprint="qwen2_moe-1")
            plan.save(folder / "plan.json")
            edit(folder, lambda r, plan=plan: r["plan"].update(hash=plan.hash))
    before = files(board)
    with pytest.raises(DataError) as raised:
        add_runs(board, [tmp_path / "new"])
    (head, line) = str(raised.value).splitlines()
    assert head == f"6 of 6 runs cannot stand on the leaderboard {board}, and none was added:"
    assert line.startswith(f"- new, seeds 0, 1, 2, 3, 4, 5 ({tmp_path / 'new' / 'new' / 'seed0'} and 5 more): ")
    assert told in line and len(line.split("; ")) == 1
    assert files(board) == before


def test_all_differences_are_named_at_once(runs: Path, tmp_path: Path):
    add_runs(tmp_path / "board", [runs])
    folder = write_run(tmp_path / "new", "new", 9, 0.6, options={"max_steps": 20, "max_length": 64, "batch_size": 4})
    with pytest.raises(DataError, match=r"optimizer steps 20.*examples a step 4.*64, and 512.*seed 9, and one of 0, 1"):
        add_runs(tmp_path / "board", [folder])


# A record in which one number was changed.
CHANGED: dict[str, tuple[Any, str]] = {
    "accuracy": (lambda r: r["evaluation"]["gsm8k"].update(accuracy=0.9), "accuracy 0.9, and 600 of 1000 are correct"),
    "correct": (lambda r: r["evaluation"]["gsm8k"].update(correct=900), "accuracy 0.6, and 900 of 1000"),
    "both": (lambda r: r["evaluation"]["gsm8k"].update(correct=900, accuracy=0.9), "interval is not that of 900"),
    "seed": (lambda r: r.update(seed=5), "seed 5, and 0 in its config"),
    "data": (lambda r: r["config"].update(data_hash="e" * 64), "data_hash aaaaaaaa, and eeeeeeee in its config"),
    "steps": (lambda r: r["training"].update(steps=9), "9 steps, and max_steps 10"),
    "seconds": (lambda r: r["training"].update(seconds=5.0), "1,000 tokens in 5 s, and 100 tokens a second"),
    "trained": (lambda r: r["parameters"].update(trainable=50), "50 of 10,000 parameters, and 1%"),
    "kinds": (lambda r: r["parameters"].update(experts=60, router=30), "100 trained parameters, and 90 by their kinds"),
    "plan": (lambda r: r["plan"].update(hash="0"), "plan.json is not the plan that the run was made with"),
    "running": (lambda r: r.update(status="running"), "it is running, and not done"),
    "failed": (lambda r: r.update(status="failed"), "it is failed, and not done"),
    "unscored": (lambda r: r.pop("evaluation"), "it has no score of one task, and no held-out loss"),
    "training gone": (
        lambda r: r.pop("training"),
        "it is a training (config.data_hash, parameters.trainable, plan), and has no training.steps",
    ),
    "steps gone": (lambda r: r["training"].update(steps=None), "plan), and has no training.steps"),
    "parameters gone": (lambda r: r.pop("parameters"), "plan), and has no parameters.trainable"),
    "trained nothing": (
        lambda r: r["parameters"].update(trainable=0, percent=0.0),
        "it is a training (config.data_hash, training.steps, plan), and has no parameters.trainable",
    ),
    "plan gone": (lambda r: r.pop("plan"), "parameters.trainable), and has no plan"),
    "data_hash gone": (lambda r: r["config"].pop("data_hash"), "plan), and has no config.data_hash"),
    "rank": (lambda r: r["config"].update(r="eight"), "its config: r = 'eight' has the wrong type"),
    "batch": (lambda r: r["config"].update(batch_size=[4]), "its config: batch_size = [4] has the wrong type"),
    "most gone": (
        lambda r: [r.pop("training"), r.pop("parameters"), r["config"].pop("data_hash")],
        "it is a training (plan), and has no config.data_hash, training.steps, parameters.trainable",
    ),
    "adapter": (
        lambda r: (r["parameters"].update(trainable=0, percent=0.0), r["config"].update(adapter="x")),
        "it scores a saved adapter",
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_contradicts_itself_is_refused(name: str, runs: Path, tmp_path: Path):
    board = tmp_path / "board"
    add_runs(board, [runs])
    folder = write_run(tmp_path / "new", "new", 0, 0.6)
    good = write_run(tmp_path / "new", "new", 1, 0.6)
    change, told = CHANGED[name]
    edit(folder, change)
    before = files(board)
    with pytest.raises(DataError, match=re.escape(told)):
        add_runs(board, [tmp_path / "new"])
    assert files(board) == before, "all or none"
    assert len(add_runs(board, [good]).new) == 1
    shutil.copytree(folder, runs / "new" / "seed0")
    assert told in leaderboard(runs).left_out[runs / "new" / "seed0"], "in a folder without a board.json, too"


def test_files_that_are_gone_exchanged_or_broken_are_refused(runs: Path, tmp_path: Path):
    board = tmp_path / "board"
    add_runs(board, [runs])
    folder = write_run(tmp_path / "new", "new", 0, 0.6, n=1000)
    rows = [{"index": i, "id": str(i), "prediction": "", "correct": i < 599} for i in range(1000)]
    results = folder / "results-gsm8k.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    edit(folder, lambda r: r["evaluation"]["gsm8k"].update(results=results.name))
    with pytest.raises(DataError, match=r"results-gsm8k\.jsonl holds 1000 examples and not the score of run\.json"):
        add_runs(board, [folder])
    whole = results.read_text()
    results.write_text(whole[:-20] + "\n")
    with pytest.raises(DataError, match=r"(?s)1 of 1 runs .*results-gsm8k\.jsonl, line 1000"):
        add_runs(board, [folder])
    shutil.copytree(folder, runs / "new" / "seed0")
    assert "results-gsm8k.jsonl, line 1000" in leaderboard(runs).left_out[runs / "new" / "seed0"]
    rows[599]["correct"] = True
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ExpertPlan({0: (2, 3)}, 4, "hot", {}, fingerprint="olmoe-0").save(folder / "plan.json")
    with pytest.raises(DataError, match="is not the plan"):
        add_runs(board, [folder])
    (folder / "plan.json").unlink()
    with pytest.raises(DataError, match=r"plan\.json does not exist"):
        add_runs(board, [folder])
    PLAN.save(folder / "plan.json")
    text = (folder / "run.json").read_text()
    (folder / "run.json").write_text(text[: len(text) // 2])
    with pytest.raises(FileError, match="not whole JSON"):
        add_runs(board, [folder])
    (folder / "run.json").write_text(text)
    assert len(add_runs(board, [folder]).new) == 1
    with pytest.raises(FileError, match="is not a folder"):
        add_runs(board, [tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no run\.json there or below"):
        add_runs(board, [tmp_path / "empty"])


def test_a_method_has_one_set_of_options_and_a_seed_one_run(runs: Path, tmp_path: Path):
    board = tmp_path / "board"
    add_runs(board, [runs])
    other = write_run(tmp_path / "new", "hot", 0, 0.7, options={"r": 8, "learning_rate": 1e-3})
    with pytest.raises(
        DataError, match=r"hot is there with other options: --learning-rate 0.001 against 0.0004, --r 8"
    ):
        add_runs(board, [other])
    (entry,) = add_runs(board, [other], name="hot-r8").new
    assert (entry.method, entry.folder) == ("hot-r8", board / "olmoe-0" / "gsm8k" / "hot-r8" / "seed0")
    assert rows_of(leaderboard(board))["hot-r8"].note == "not ranked: it lacks the seeds 1, 2, 3, 4, 5"
    again = write_run(tmp_path / "again", "hot", 0, 0.7)
    with pytest.raises(
        DataError, match=r"seed 0 of hot is there already, from another run .70 here, 65.5 there.: leave"
    ):
        add_runs(board, [again])
    for name in ("../out", "a//b", ".hidden", "é", ""):
        with pytest.raises(DataError, match="is no folder's: give another by --name"):
            add_runs(board, [write_run(tmp_path / "third", "third", 0, 0.7)], name=name or " ")
    named = write_run(tmp_path / "fourth", "fourth", 0, 0.7, sweep={"name": "s", "condition": "../../fourth"})
    with pytest.raises(DataError, match=r"the name '../../fourth' is no folder's"):
        add_runs(board, [named])
    assert not (tmp_path / "fourth" / "gsm8k").exists()


def test_added_twice_is_there_once_and_the_same_bytes(runs: Path, tmp_path: Path):
    board = tmp_path / "board"
    (runs / "hot" / "seed0" / "adapter").mkdir()
    (runs / "hot" / "seed0" / "adapter" / "weights").write_text("large")
    first = add_runs(board, [runs / "hot", runs / "all"])
    assert (len(first.new), first.known) == (12, ())
    before = files(board)
    assert set(before) == {
        INDEX,
        *(f"olmoe-0/gsm8k/{m}/seed{s}/{n}.json" for m in ("hot", "all") for s in range(6) for n in ("run", "plan")),
    }  # fmt: skip
    assert (board / "olmoe-0/gsm8k/hot/seed0/run.json").read_bytes() == (runs / "hot/seed0/run.json").read_bytes()
    for again in ([runs / "hot"], [board], [runs / "all" / "seed3", runs / "all"]):
        added = add_runs(board, again, name="another" if again == [board] else None)
        assert added.new == () and len(added.known) in (6, 12)
        assert files(board) == before
    assert len(add_runs(board, [runs]).new) == 18
    assert [row.overall for row in leaderboard(board).tables[0].rows] == [
        row.overall for row in leaderboard(runs).tables[0].rows
    ]


def test_a_model_as_it_is_lacks_no_sign_of_a_training(runs: Path, tmp_path: Path):
    """Full fine-tuning has no plan, and a model as it is has nothing that says how it was trained."""
    full = write_run(tmp_path, "fft", 0, 0.6, options={"full": True})
    edit(full, lambda r: r.pop("plan"))
    base = write_run(tmp_path, "base", None, 0.1)
    edit(base, lambda r: r.pop("parameters"))  # as vLLM scores it
    assert [faults(run, read_record(run)) for run in (full, base)] == [[], []]


@pytest.mark.parametrize("take", [lambda t: t.update(test_loss_before=None), lambda t: t.pop("test_loss_before", None)])
def test_a_run_that_does_not_say_its_loss_before_training_is_refused(take, runs: Path, tmp_path: Path):
    """That loss alone tells other weights of the same shape."""
    board = tmp_path / "board"
    add_runs(board, [runs / "hot"])
    folder = write_run(tmp_path / "new", "new", 0, 0.6)
    edit(folder, lambda r: take(r["training"]))
    told = "test loss before training none, and 2 is asked"
    with pytest.raises(DataError, match=told):
        add_runs(board, [folder])
    with pytest.raises(DataError, match=told):
        add_runs(tmp_path / "another", [runs / "hot", folder])
    shutil.copytree(folder, runs / "new" / "seed0")
    assert told in leaderboard(runs).left_out[runs / "new" / "seed0"]
    for run in find_records(runs):  # where none has it, none is asked for it
        edit(run, lambda r: take(r["training"]))
    assert "new" in rows_of(leaderboard(runs))


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"max_length": 64}, "tokens of an example 64, and 1,024 is asked"),
        ({"train_on": "all"}, "what carries loss all, and last is asked"),
        ({"chat_template": "f" * 64}, "chat template ffffffff, and none is asked"),
        ({}, ""),
    ],
    ids=str,
)
def test_a_models_held_out_loss_is_of_the_tokens_of_the_trainings(own: dict, says: str, tmp_path: Path):
    for seed in range(3):
        write_run(tmp_path / "runs", "all", seed, None, loss=1 + seed / 100, options={"max_length": 1024})
    base = write_run(tmp_path / "base", "base", None, None)
    read = {"max_length": 1024, "train_on": None, "chat_template": None}
    edit(base, lambda r: (r.update(training={"test_loss": 2.0}), r["config"].update(read | own)))
    add_runs(tmp_path / "board", [tmp_path / "runs"])
    if says:
        with pytest.raises(DataError, match=re.escape(says)):
            add_runs(tmp_path / "board", [base])
    else:
        assert len(add_runs(tmp_path / "board", [base]).new) == 1


@pytest.mark.parametrize(("parts", "is_alike"), [(None, True), ("assistant", True), ("all", False)])
def test_where_trainings_learn_every_answer_a_row_of_one_answer_is_alike(parts, is_alike: bool, tmp_path: Path):
    """The held-out rows may have one answer each: then the model's loss says nothing of more."""
    for seed in range(3):
        edit(
            write_run(tmp_path / "runs", "all", seed, None, loss=1.0),
            lambda r: r["config"].update(train_on="assistant"),
        )
    base = write_run(tmp_path / "base", "base", None, None)
    edit(base, lambda r: (r.update(training={"test_loss": 2.0}), r["config"].update(max_length=512, train_on=parts)))
    add_runs(tmp_path / "board", [tmp_path / "runs"])
    if is_alike:
        add_runs(tmp_path / "board", [base])
    else:
        with pytest.raises(DataError, match="what carries loss all, and assistant is asked"):
            add_runs(tmp_path / "board", [base])


def test_a_models_answers_by_another_engine_are_refused(runs: Path, tmp_path: Path):
    add_runs(tmp_path / "board", [runs])
    base = write_run(tmp_path / "base", "base", None, 0.1)
    edit(base, lambda r: r["config"].update(engine="vllm"))
    with pytest.raises(DataError, match="engine vllm, and none is asked"):
        add_runs(tmp_path / "board", [base])


def test_records_and_boards_from_before_a_scorers_hash_stay(runs: Path, tmp_path: Path):
    for seed in range(3):
        edit(runs / "hot" / f"seed{seed}", lambda r: r["config"].pop("scorer_hash"))
    add_runs(tmp_path / "board", [runs])
    file = tmp_path / "board" / INDEX
    index = json.loads(file.read_text())
    (protocol,) = index["protocols"].values()
    assert protocol["scorer_hash"] == "9" * 64
    for name in ("scorer_hash", "engine", "harness"):
        del protocol[name]
    write_json(file, index)
    assert leaderboard(tmp_path / "board").left_out == {}
    write_leaderboard(leaderboard(tmp_path / "board"), tmp_path / "page")
    for seed in range(6):
        edit(write_run(tmp_path / "more", "more", seed, 0.6), lambda r: r["config"].update(scorer_hash="c" * 64))
    assert len(add_runs(tmp_path / "board", [tmp_path / "more"]).new) == 6, "a board that does not say"


def test_as_many_runs_by_one_scorer_as_by_another_have_no_protocol(runs: Path, tmp_path: Path):
    for method in ("all", "hot", "near"):
        for seed in range(6):
            edit(runs / method / f"seed{seed}", lambda r: r["config"].update(scorer_hash="c" * 64))
    shutil.rmtree(runs / "near")
    shutil.rmtree(runs / "far")
    shutil.rmtree(runs / "low")
    for seed in range(6):
        write_run(runs, "one", seed, 0.5)
        write_run(runs, "two", seed, 0.5)
    with pytest.raises(DataError, match=r"as many runs follow one protocol as another .what judges the answers"):
        leaderboard(runs)
    edit(runs / "two" / "seed0", lambda r: r["config"].update(scorer_hash="c" * 64))
    board = leaderboard(runs)
    assert {row.method for row in board.tables[0].rows} == {"all", "hot", "two"} and len(board.left_out) == 11


def test_tasks_are_told_apart_by_their_names_and_not_by_their_folders(tmp_path: Path):
    """codealpaca and codealpaca:/d/alpaca are one; two tasks in folders of one name are two."""
    for seed, data in enumerate(("codealpaca", "codealpaca:/d/alpaca", "codealpaca:/e/other")):
        edit(write_run(tmp_path / "runs", "all", seed, None, loss=1.0, task=data), lambda r: None)
    (table,) = leaderboard(tmp_path / "runs").tables
    assert table.task == "codealpaca" and len(table.rows[0].values) == 3
    for seed in range(3):
        write_run(tmp_path / "runs", "mbpp", seed, None, loss=1.0, task="mbpp:/x/alpaca")
    assert [table.task for table in leaderboard(tmp_path / "runs").tables] == ["codealpaca", "mbpp"]


def test_what_an_add_left_that_was_killed_is_not_on_the_board(runs: Path, tmp_path: Path):
    board = tmp_path / "board"
    add_runs(board, [runs / "hot"])
    shutil.copytree(runs / "all" / "seed0", board / "olmoe-0" / "gsm8k" / "all" / "seed0")
    left = {board / "olmoe-0" / "gsm8k" / "all" / "seed0": "it was not added: give it to --add"}
    assert read_board(board).left_out == left and list(rows_of(leaderboard(board))) == ["hot"]
    assert len(add_runs(board, [runs / "all"]).new) == 6 and read_board(board).left_out == {}
    (board / "olmoe-0" / "gsm8k" / "near" / "seed1").mkdir(parents=True)
    (board / "olmoe-0" / "gsm8k" / "near" / "seed1" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"olmoe-0/gsm8k/near/seed1 holds something else: move that, or delete it"):
        add_runs(board, [runs / "near"])
    assert (board / "olmoe-0" / "gsm8k" / "near" / "seed1" / "notes.txt").read_text() == "mine"


def test_a_failed_write_leaves_the_board_as_it_was(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    board = tmp_path / "board"
    add_runs(board, [runs / "hot"])
    before = files(board)

    def full(*_: Any) -> None:
        raise FileError("the disk is full")

    monkeypatch.setattr("hotlora.report.leaderboard_folder.write_json", full)
    with pytest.raises(FileError, match="full"):
        add_runs(board, [runs / "all"])
    assert files(board) == before


def test_a_record_that_was_changed_on_the_board_does_not_count(runs: Path, tmp_path: Path):
    board = tmp_path / "board"
    add_runs(board, [runs])
    place = board / "olmoe-0" / "gsm8k" / "far" / "seed0"
    good = (place / "run.json").read_bytes()

    def improve(record: dict[str, Any]) -> None:  # everywhere at once
        low, high = proportion_interval(990, 1000)
        record["evaluation"]["gsm8k"].update(correct=990, accuracy=0.99, ci_low=low, ci_high=high)

    edit(place, improve)
    found = leaderboard(board)
    assert "run.json was changed since it was added" in found.left_out[place]
    assert rows_of(found)["far"].note == "not ranked: it lacks the seed 0"
    (place / "run.json").write_text("{")
    assert "not whole JSON" in leaderboard(board).left_out[place]
    add_runs(board, [write_run(tmp_path / "new", "new", 0, 0.5)])
    assert "not whole JSON" in leaderboard(board).left_out[place], "it is still told of after others were added"
    with pytest.raises(DataError, match=r"far/seed0: .* is not whole JSON"):
        add_runs(board, [runs / "far"])
    (place / "run.json").write_bytes(good + b"\n")
    told = "far/seed0: run.json was changed since it was added: restore a copy, or delete it and add it again"
    for source in (runs / "far", place):  # what is changed is not added as it is, either
        with pytest.raises(DataError, match=told):
            add_runs(board, [source])
    shutil.rmtree(place)
    assert leaderboard(board).left_out == {place: "it is gone: restore a copy, or add it again"}
    assert len(add_runs(board, [runs / "far"]).new) == 1 and (place / "run.json").read_bytes() == good
    assert leaderboard(board).left_out == {}


def test_a_plan_that_was_changed_on_the_board_does_not_count(runs: Path, tmp_path: Path):
    board = tmp_path / "board"
    add_runs(board, [runs])
    place = board / "olmoe-0" / "gsm8k" / "far" / "seed0"
    good = (place / "plan.json").read_bytes()
    ExpertPlan({0: (2, 3)}, 4, "hot", {}, fingerprint="olmoe-0").save(place / "plan.json")
    found = leaderboard(board)
    assert "plan.json is not the plan that the run was made with" in found.left_out[place]
    assert found.left_out[place].endswith("; restore a copy, or add it again")
    assert rows_of(found)["far"].note == "not ranked: it lacks the seed 0"
    for text in ("{}", "{"):
        (place / "plan.json").write_text(text)
        assert "plan.json" in leaderboard(board).left_out[place]
    (place / "plan.json").unlink()
    assert "plan.json does not exist" in leaderboard(board).left_out[place]
    assert len(add_runs(board, [runs / "far"]).new) == 1 and (place / "plan.json").read_bytes() == good
    assert leaderboard(board).left_out == {}


def test_a_board_that_took_a_contradiction_once_names_it(runs: Path, tmp_path: Path):
    """An earlier version may have added what is refused now."""
    board = tmp_path / "board"
    add_runs(board, [runs])
    place = board / "olmoe-0" / "gsm8k" / "far" / "seed0"
    edit(place, lambda r: r.pop("training"))
    index = json.loads((board / INDEX).read_text())
    index["runs"]["olmoe-0/gsm8k/far/seed0"]["sha256"] = sha256_file(place / "run.json")
    write_json(board / INDEX, index)
    assert "and has no training.steps" in leaderboard(board).left_out[place]


def test_the_protocol_stays_what_it_was_founded_with(runs: Path, tmp_path: Path):
    board = tmp_path / "board"
    add_runs(board, [runs / "hot"])
    protocol = json.loads((board / INDEX).read_text())["protocols"]["gsm8k olmoe-0"]
    assert set(protocol) == {*NAMES, *SEEDS} and protocol["seeds"] == list(range(6))
    for method in ("a", "b", "c", "d"):  # most now have one seed, and other steps are most in a plain folder
        add_runs(board, [write_run(tmp_path / "few", method, 0, 0.5)])
    assert json.loads((board / INDEX).read_text())["protocols"]["gsm8k olmoe-0"] == protocol
    assert [row.method for row in leaderboard(board).tables[0].rows if row.overall.rank] == ["hot"]


def test_a_board_of_two_protocols(runs: Path, tmp_path: Path):
    for seed in range(6):
        write_run(runs, "longer", seed, 0.9, options={"max_steps": 20})
    board = leaderboard(runs)
    assert "longer" not in rows_of(board) and len(board.left_out) == 6
    assert board.left_out[runs / "longer" / "seed0"] == ("optimizer steps 20, and 10 is asked (--max-steps, --epochs)")
    with pytest.raises(DataError, match="6 of 36 runs cannot stand"):
        add_runs(tmp_path / "board", [runs])
    assert not (tmp_path / "board").exists()
    for method in SCORES:
        if method != "hot":
            shutil.rmtree(runs / method)
    with pytest.raises(DataError, match=r"as many runs follow one protocol as another \(optimizer steps (10|20)"):
        leaderboard(runs)
    shutil.rmtree(runs)
    write_run(runs, "base", None, 0.1)
    with pytest.raises(DataError, match="no training here is done and has a score"):
        leaderboard(runs)


def test_a_folder_of_runs_becomes_a_board_where_it_is(runs: Path, tmp_path: Path):
    write_run(runs, "base", None, 0.1, n=200)
    added = add_runs(runs, [write_run(tmp_path / "new", "new", 0, 0.6)])
    assert added.new[0].folder == runs / "olmoe-0" / "gsm8k" / "new" / "seed0"
    board = leaderboard(runs)
    assert set(rows_of(board)) == {*SCORES, "new"}
    assert board.left_out == {runs / "base": "it was not added: give it to --add"}


def test_models_are_ranked_apart(runs: Path, tmp_path: Path):
    plan = ExpertPlan({0: (0, 1)}, 4, "hot", {}, fingerprint="qwen2_moe-1")
    for method, scores in SCORES.items():
        for seed, score in enumerate(scores):
            folder = write_run(tmp_path / "other", f"other/{method}", seed, 1 - score / 1000)

            def move(record: dict[str, Any]) -> None:
                record["model"].update(name="path/other", fingerprint="qwen2_moe-1")
                record["plan"].update(hash=plan.hash)

            edit(folder, move)
            plan.save(folder / "plan.json")
    board = tmp_path / "board"
    add_runs(board, [runs, tmp_path / "other"])
    first, second = leaderboard(board).tables
    assert (first.model, second.model, first.task, second.task) == ("m", "path/other", "gsm8k", "gsm8k")
    assert (first.rows[0].method, second.rows[0].method) == ("hot", "low")
    page = write_leaderboard(leaderboard(board), tmp_path / "page").read_text()
    assert "## gsm8k, m\n" in page and "## gsm8k, path/other\n" in page
    assert (board / "qwen2_moe-1" / "gsm8k" / "low" / "seed0" / "run.json").is_file()


def test_no_run_lies_inside_another(runs: Path, tmp_path: Path):
    """It would be taken for a stage of that one, and be counted no more."""
    board = tmp_path / "board"
    add_runs(board, [runs / "hot"])
    inside = write_run(tmp_path / "new", "x", 1, 0.5)
    with pytest.raises(DataError, match="hot/seed0/seed1 holds something else"):
        add_runs(board, [inside], name="hot/seed0")
    add_runs(board, [inside], name="hot/variant")
    assert len(leaderboard(board).tables[0].rows) == 2 and leaderboard(board).left_out == {}


def test_broken_indices_are_one_error(runs: Path, tmp_path: Path):
    board = tmp_path / "board"
    add_runs(board, [runs / "hot"])
    whole = json.loads((board / INDEX).read_text())
    run = {"method": "../x", "sha256": "0"}
    for change in (
        {"version": 2}, {"protocols": []}, {"runs": None}, {"protocols": {"gsm8k": {}}},
        {"runs": {"gsm8k/hot/seed0": run}},
        {"protocols": {"gsm8k olmoe-0": whole["protocols"]["gsm8k olmoe-0"] | {"seeds": ["a"]}}},
        {"protocols": {"gsm8k olmoe-0": whole["protocols"]["gsm8k olmoe-0"] | {"ranked_with": [9]}}},
    ):  # fmt: skip
        (board / INDEX).write_text(json.dumps(whole | change))
        with pytest.raises(FileError, match="restore a copy"):
            leaderboard(board)


def test_times_of_other_hardware_are_not_mixed(runs: Path, tmp_path: Path):
    for seed in (0, 1, 2):
        edit(runs / "hot" / f"seed{seed}", lambda r: r.update(environment={"device": "another card"}))
    for method in SCORES:
        edit(runs / method / "seed5", lambda r: r["training"].update(seconds=90.0, tokens_per_second=1000 / 90.0))
    board = leaderboard(runs)
    rows = rows_of(board)
    assert rows["all"].seconds == {"a card": 12.5} and rows["all"].memory == {"a card": 1005}
    assert rows["hot"].seconds == {"another card": 11.0, "a card": 14.0}
    page = write_leaderboard(board, tmp_path).read_text()
    assert (
        "Seconds and memory: (a) a card; (b) another card." in page
        or "(b) a card; (a) another" in page
        or ("Seconds and memory: (a) another card; (b) a card." in page)
    )
    (line,) = [line for line in page.splitlines() if line.startswith("| 1 | hot |")]
    assert "| 11 (a), 14 (b) |" in line


def test_the_page_links_every_record_and_escapes_names(runs: Path, tmp_path: Path):
    write_run(runs, "base", None, 0.1)
    write_run(runs, "[bad](http://x) <b>|", 0, 0.5)
    output = tmp_path / "out"
    page = write_leaderboard(leaderboard(runs), output).read_text()
    links = re.findall(r"\]\(([^)]*run\.json)\)", page)
    assert len(links) == 31 and {(output / link).resolve() for link in links} == {
        folder / "run.json" for folder in find_records(runs) if "bad" not in str(folder)
    }
    assert "](http://x)" not in page and "<b>" not in page.replace("\\<b>", "")
    assert {path.name for path in output.iterdir()} == {"leaderboard.md", "leaderboard.csv", "leaderboard.png"}
    lines = list(csv.DictReader(io.StringIO((output / "leaderboard.csv").read_text())))
    (hot,) = [line for line in lines if line["method"] == "hot"]
    assert (hot["rank"], hot["n"], hot["seeds"], hot["budget"]) == ("1", "6", "0 1 2 3 4 5", "1")
    assert float(hot["mean"]) == pytest.approx(sum(SCORES["hot"]) / 60) and hot["hardware"] == "a card"
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(terminal_tables(leaderboard(runs)))
    assert max(map(len, console.export_text().splitlines())) <= 80


def test_the_command(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    board, call = str(tmp_path / "board"), CliRunner().invoke
    first = call(app, ["leaderboard", board, "--add", str(runs / "hot"), "--add", str(runs / "low")])
    assert first.exit_code == 0 and f"added: 12 runs to {board}" in first.output, first.output
    assert "1 of 1 pairs told apart" in first.output and (Path(board) / "leaderboard.md").is_file()
    second = call(app, ["leaderboard", board, "--add", str(runs / "hot"), "--json"])
    (table,) = json.loads(second.stdout)["tables"]
    assert [row["overall"]["rank"] for row in table["rows"]] == [1, 2] and table["pairs"][0]["winner"] == "hot"
    other = write_run(tmp_path / "new", "new", 0, 0.5, options={"max_steps": 3})
    refused = call(app, ["leaderboard", board, "--add", str(other)])
    assert isinstance(refused.exception, HotLoraError) and "optimizer steps 3" in str(refused.exception)
    assert isinstance(call(app, ["leaderboard", board, "--name", "x"]).exception, HotLoraError)
    good = write_run(tmp_path / "good", "new", 0, 0.5)
    unnamed = call(app, ["leaderboard", board, "--add", str(good), "--name", ""])
    assert "the name '' is no folder's" in str(unnamed.exception)
    assert isinstance(call(app, ["leaderboard", str(tmp_path / "none")]).exception, FileError)


def test_from_python(runs: Path, tmp_path: Path):
    hotlora.add_runs(tmp_path / "board", [runs])
    assert repr(hotlora.leaderboard(tmp_path / "board")) == "Leaderboard(gsm8k (5 methods))"


def test_every_record_of_ours_is_whole_and_few_are_no_training():
    """No false alarm: of hundreds of real runs those alone have a fault that score another run's adapter."""
    found = {run: faults(run, record) for run, record in find_records(RESULTS).items()}
    assert len(found) > 600
    told = {fault for some in found.values() for fault in some}
    assert told <= {"it scores a saved adapter, and does not hold how that was trained: give the training's record",
                    "it has no score of one task, and no held-out loss: train with a task or --test-data"}  # fmt: skip


def test_our_first_board_by_scipy():
    """results/nano/papers-longer, each pair computed again from the records' files."""
    board = leaderboard(RESULTS / "papers-longer")
    assert [table.task for table in board.tables] == ["nano-choice", "nano-math", "nano-sql"]
    for table in board.tables:
        scores = {
            row.method: {
                seed: 100 * json.loads((folder / "run.json").read_text())["evaluation"][table.task]["accuracy"]
                for seed, folder in row.folders.items()
            }
            for row in table.rows
        }
        assert len(scores) >= 10 and len(table.pairs) >= 45
        tested = [pair for pair in table.pairs if pair.test.p is not None]
        ps = []
        for pair in tested:
            seeds = sorted(scores[pair.a].keys() & scores[pair.b].keys())
            ps.append(scipy_stats.ttest_rel(*([scores[m][s] for s in seeds] for m in (pair.a, pair.b))).pvalue)
        assert [pair.test.p for pair in tested] == pytest.approx(ps)
        assert [pair.p_holm for pair in tested] == pytest.approx(holm(ps))


def test_the_pages_command_makes_runs_of_the_boards_protocol():
    """docs/leaderboard.md tells how to enter a method on nano-math."""
    page = (ROOT / "docs" / "leaderboard.md").read_text()
    (command,) = re.findall(r"^    hotlora train (.*?)--output", page, re.M | re.S)
    words = command.replace("\\", "").split()
    given = dict(zip(words[::2], words[1::2], strict=True))
    protocol = next(
        found for found in read_board(RESULTS / "papers-longer").protocols.values() if found["task"] == given["--data"]
    )
    tokenizer = hotlora.load_tokenizer(given["--model"])
    for split, limit, name in (("train", "--limit", "data_hash"), ("test", "--test-limit", "test_hash")):
        some = load_examples(given["--data"], split, limit=int(given[limit]), tokenizer=tokenizer)
        assert data_hash(some) == protocol[name], split
    told = {"steps": "--max-steps", "examples_per_step": "--batch-size", "max_length": "--max-length"}
    assert {name: int(given[flag]) for name, flag in told.items()} == {name: protocol[name] for name in told}
    assert int(given["--seed"]) in protocol["ranked_with"]


def test_protocols_of_runs_that_hotlora_makes_now(tmp_path: Path):
    """A real training on nano follows the protocol that its record says, and seeds and methods share it."""
    short = {"max_steps": 1, "batch_size": 2, "limit": 8, "test_limit": 2, "r": 2, "max_length": 96}
    made = []
    for method, seed in (("lora", 0), ("hellora", 1)):
        run = hotlora.train("nano", "nano-choice", tmp_path / method / f"seed{seed}", progress=False, method=method,
                            seed=seed, profile_fraction=1.0, **short)  # fmt: skip
        made.append(run)
        assert faults(run.folder, run.record) == []
    protocols = [protocol_of(run.record) for run in made]
    assert protocols[0] | {"loss_before": None} == protocols[1] | {"loss_before": None}
    added = add_runs(tmp_path / "board", [tmp_path / "lora", tmp_path / "hellora"])
    assert sorted((entry.method, entry.seed) for entry in added.new) == [("hellora", 1), ("lora", 0)]
