import csv
import io
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from test_cli import run

from hotlora.base.errors import DataError
from hotlora.base.records import new_record, read_record, write_record
from hotlora.papers import RECIPES, Setting
from hotlora.papers.claims import CLAIMS, claims_result, decide
from hotlora.papers.page import table_results, write_tables
from hotlora.papers.recipe import Column, Row
from hotlora.papers.scores import Cell, read_cells, result
from hotlora.report.page import STORE
from hotlora.routing.plan import ExpertPlan

NANO = Setting("nano")
ALL = [0.90, 0.88, 0.91, 0.86, 0.89, 0.93, 0.90, 0.87]
HOT = [0.89, 0.89, 0.90, 0.86, 0.90, 0.91, 0.91, 0.88]


def write_run(
    folder: Path, accuracy: float, seed: int | None, *, experts: int = 8, config: dict | None = None,
    model: str = "nano", **evaluation: float,
) -> None:  # fmt: skip
    record = new_record(
        name="run", condition="hot", seed=seed or 0, model={"name": model, "fingerprint": "x"},
        data={"name": "nano-math"}, parameters={"trainable": 100, "total": 10000, "percent": 1.0},
        training={"seconds": 12.0}, config=config or {},
        evaluation={
            "nano-math": {"metric": "acc", "accuracy": accuracy, "n": 200, "correct": 200 * accuracy, **evaluation}
        },
        sweep={"name": STORE, "condition": "/".join(folder.parts[-3:])},
    )  # fmt: skip
    at = folder if seed is None else folder / f"seed{seed}"
    write_record(at, record | {"status": "done"})
    some = tuple(range(experts))
    ExpertPlan({0: some, 1: some}, num_experts=32, rule="hot", params={}).save(at / "plan.json")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    for seed, (everything, hot) in enumerate(zip(ALL, HOT, strict=True)):
        write_run(tmp_path / "nano/nano-math/sieve-all", everything, seed)
        write_run(tmp_path / "nano/nano-math/sieve", hot, seed)
    return tmp_path


def numbers(found) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(found.csv())))


def test_the_tables_numbers_are_scipys(store: Path):
    table = result(RECIPES["moe-sieve-table-3"](NANO), store)
    everything, hot = numbers(table)
    differences = 100 * (np.array(HOT) - np.array(ALL))
    assert float(everything["mean"]) == pytest.approx(100 * np.mean(ALL))
    assert float(hot["sd"]) == pytest.approx(100 * np.std(HOT, ddof=1))
    assert float(hot["difference"]) == pytest.approx(differences.mean())
    interval = stats.t.interval(0.95, 7, differences.mean(), stats.sem(differences))
    assert (float(hot["difference_low"]), float(hot["difference_high"])) == pytest.approx(interval)
    assert float(hot["p"]) == pytest.approx(stats.ttest_rel(HOT, ALL).pvalue)
    upper = stats.ttest_1samp(differences, 2, alternative="less").pvalue
    lower = stats.ttest_1samp(differences, -2, alternative="greater").pvalue
    assert float(hot["tost_2"]) == pytest.approx(max(upper, lower))
    row = next(row for row in table.rows if "nano-math" in row[0])
    scores = [f"{100 * np.mean(some):.1f} ± {100 * np.std(some, ddof=1):.1f}" for some in (ALL, HOT)]
    low, high = interval
    assert row[1:6] == [*scores, f"{differences.mean():+.2f}", f"[{low:.1f}, {high:.1f}]", "yes"]
    assert row[6:] == ["30.4 ± 1.1", "30.4 ± 0.6", "-0.08", "[-1.45, 1.30]", "yes"], "as table 3 prints them"
    assert "No run is done of all experts on Spider (nano-sql)" in table.notes[1]


def test_the_other_views_of_the_same_runs(store: Path):
    spread = result(RECIPES["moe-sieve-table-6"](NANO), store)
    row = next(row for row in spread.rows if "nano-math" in row[0])
    assert row[3] == f"{np.std(HOT, ddof=1) / np.std(ALL, ddof=1):.2f}" and row[-1] == "0.58"
    tests = result(RECIPES["moe-sieve-table-8"](NANO), store)
    row = next(row for row in tests.rows if "nano-math" in row[0])
    p = stats.ttest_rel(HOT, ALL).pvalue
    assert row[-1] == "-0.08; 0.003, <0.001, <0.001; 0.753" and row[5] == f"{p:.3f}"


def test_the_curve_is_over_the_plans_experts(store: Path):
    recipe = RECIPES["moe-sieve-figure-4"](NANO)
    write_run(store / "nano/nano-math/sieve-4of64", 0.5, 0, experts=2)
    cells = read_cells(recipe, store)
    assert cells["sieve-4of64", "GSM8K"].experts == 2 and cells["sieve", "GSM8K"].experts == 8
    (axes,) = result(recipe, store).figures[""].axes
    line = axes.lines[-1]
    assert list(line.get_xdata()) == [2, 8, 8] and line.get_ydata()[0] == 50


def test_missing_seeds_and_runs_that_failed_are_told(store: Path):
    (store / "nano/nano-math/sieve/seed3/run.json").unlink()
    table = result(RECIPES["moe-sieve-table-3"](NANO), store)
    assert "hot 25% on GSM8K (nano-math) lacks 3" in table.notes[-1]
    assert numbers(table)[1]["n"] == "7"
    assert result(RECIPES["hellora-table-3"](NANO), store) is None, "none of its runs is there"


CONFIG = {"max_steps": 60, "learning_rate": 8e-3, "batch_size": 16, "gradient_accumulation_steps": 1, "test_hash": "a"}


def test_seeds_by_other_options_are_told_and_not_compared(store: Path):
    recipe = RECIPES["moe-sieve-table-3"](NANO)
    for seed in range(8):
        write_run(store / "nano/nano-math/sieve-all", ALL[seed], seed, config=CONFIG | {"seed": seed})
        more = {"seed": seed, "plan_hash": str(seed), "save_steps": seed, "adapter_hash": f"a{seed}"}
        more |= {"adapter_config_hash": f"c{seed}", "model_hash": f"m{seed}"}  # as a scored model's of its own training
        write_run(store / "nano/nano-math/sieve", HOT[seed], seed, config=CONFIG | more)
    alike = result(recipe, store)
    assert not [note for note in alike.notes if "alike" in note or "otherwise" in note]
    for seed in range(6, 8):
        write_run(store / "nano/nano-math/sieve", HOT[seed], seed, config=CONFIG | {"seed": seed, "max_steps": 150})
    told = "hot 25% on GSM8K (nano-math) in max_steps (60 and 150)"
    for name in ("moe-sieve-table-3", "moe-sieve-table-6", "moe-sieve-table-8"):
        table = result(RECIPES[name](NANO), store)
        assert f"Seeds are not alike, and nothing is compared with them: {told}." in table.notes, table.notes
        assert not {"yes", "-0.08"} & set(next(row for row in table.rows if "nano-math" in row[0])[1:6])
        assert {row["difference"] for row in numbers(table)} == {""}
    found = claims_result({claim.recipe: RECIPES[claim.recipe](NANO) for claim in CLAIMS}, store)
    assert {row[-1] for row in found.rows} == {"cannot tell"}
    assert {row[-2] for row in found.rows} == {"not alike: seeds differ in max_steps (60 and 150)"}


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("learning_rate", 4e-3, "learning_rate (0.004 and 0.008)"), ("batch_size", 8, "examples a step (8 and 16)"),
        ("max_steps", 150, "max_steps (150 and 60)"), ("test_hash", "b", "test examples"),
        ("epochs", 9, "epochs (9 and 3)"),
    ],
)  # fmt: skip
def test_rows_by_options_that_the_recipe_holds_equal_are_not_compared(store: Path, option, value, words: str):
    for seed in range(8):
        write_run(store / "nano/nano-math/sieve", HOT[seed], seed, config=CONFIG)
        write_run(store / "nano/nano-math/sieve-random", HOT[seed] - 0.2, seed, config=CONFIG | {option: value})
    table = result(RECIPES["moe-sieve-section-6.1"](NANO), store)
    note = f"Made otherwise than hot 25%, and not compared with it: random 25% on GSM8K (nano-math) in {words}."
    assert note in table.notes
    assert next(row for row in table.rows if row[0] == "random 25%")[4] == "–"
    found = claims_result({claim.recipe: RECIPES[claim.recipe](NANO) for claim in CLAIMS}, store)
    random = next(row for row in found.rows if row[1] == "Random is worse at 25%.")
    assert random[-2:] == [f"not alike: runs differ in {words}", "cannot tell"]


def test_rows_whose_recipe_has_other_options_are_compared(tmp_path: Path):
    """HELLoRA's methods have learning rates of their own, and LoRI's sparse run has a plan in its rule's place."""
    for seed in range(3):
        for name, rate in (("lora", 8e-3), ("fft", 1e-3), ("lori-s", 6.4e-2)):
            more = {"learning_rate": rate, "profile_fraction": 0.1 if name == "lori-s" else 1.0, "rule": name}
            more["dtype"] = "float32" if name == "fft" else "auto"
            write_run(tmp_path / f"nano/nano-math/{name}", 0.5 + seed / 9, seed, config=CONFIG | more)
    write_run(tmp_path / "nano/nano-math/base", 0.1, None, config={"test_hash": "b"})
    table = result(RECIPES["hellora-table-2"](NANO), tmp_path)
    assert [row[3] != "–" for row in table.rows if row[0] in ("FFT", "LoRI-S")] == [True, True]
    (note,) = [note for note in table.notes if "otherwise" in note]
    assert note.endswith("than LoRA, and not compared with it: as it is on GSM8K (nano-math) in test examples.")


def test_seeds_that_any_cell_of_a_table_has_are_wanted_of_all(store: Path):
    for seed in (8, 9):
        write_run(store / "nano/nano-math/sieve-all", 0.9, seed)
    begun = store / "nano/nano-math/sieve-all/seed10"
    begun.mkdir()
    told = result(RECIPES["moe-sieve-table-3"](NANO), store).notes
    assert told[0].startswith("11 seeds a cell;")
    note = next(note for note in told if note.startswith("Seeds are missing"))
    assert (
        "all experts on GSM8K (nano-math) lacks 10 (n = 10); hot 25% on GSM8K (nano-math) lacks 8, 9, 10 (n = 8)"
        in note
    )


def test_scores_at_several_k_and_across_tasks(tmp_path: Path):
    recipe = RECIPES["hellora-table-2"](Setting("some/moe"))
    human = next(column for column in recipe.columns if column.name == "HUMAN")
    for seed in (0, 1):
        passes = {"pass@1": 0.2 + seed / 10, "pass@5": 0.3, "pass@10": 0.4}
        write_run(tmp_path / human.folder / "hellora", 0.5, seed)
        write_run(tmp_path / human.folder / "hellora-scored", 0.2 + seed / 10, seed, **passes)
    cell = read_cells(recipe, tmp_path)["hellora", "HUMAN"]
    assert cell.values == {0: 20.0, 1: pytest.approx(30.0)} and list(cell.several.values()) == pytest.approx(
        [25, 30, 40]
    )
    line = next(row for row in result(recipe, tmp_path).rows if row[0] == "HELLoRA")
    assert "25.00/30.00/40.00" in line and "17.87/22.04/23.82" in line

    across = RECIPES["hellora-table-8"](NANO)
    write_run(tmp_path / "nano/nano-sql/base", 0.10, None)
    for seed in (0, 1, 2):
        write_run(tmp_path / "nano/nano-math/hellora-on-nano-sql", 0.12 + seed / 100, seed)
    (line,) = result(across, tmp_path).rows
    assert (
        line[2:5] == ["10.00", "13.0 ± 1.0", "+3.00 [0.5, 5.5]"] and line[5] == "13.41/16.81/18.17, 13.78/18.94/20.63"
    )


@pytest.mark.parametrize(
    ("rule", "ours", "theirs", "holds"),
    [
        ("above", [12, 13, 14], [1, 2, 4], True),
        ("above", [1, 2, 4], [12, 13, 14], False),
        ("above", [1, 5, 3], [3, 1, 5], None),
        ("below", [1, 2, 4], [12, 13, 14], True),
        ("as good", [5.1, 6.0, 7.1], [5.0, 6.1, 7.0], True),
        ("as good", [1, 2, 4], [12, 13, 14], False),
        ("as good", [1, 9, 3], [3, 1, 9], None),
        ("equivalent", [5.1, 6.0, 7.1], [5.0, 6.1, 7.0], True),
        ("equivalent", [1, 2, 4], [12, 13, 14], False),
        ("spread", [5.0, 5.1, 5.0, 5.1, 5.0, 5.1], [1, 9, 2, 8, 3, 7], True),
        ("spread", [1, 9, 2, 8, 3, 7], [5.0, 5.1, 5.0, 5.1, 5.0, 5.1], False),
        ("spread", [1, 2, 3], [3, 2, 1], None),
        ("above", [2], [1], None),
    ],
)
def test_each_rule_of_a_claim(rule: str, ours: list[float], theirs: list[float], holds: bool | None):
    row, column = Row("a", "a"), Column("GSM8K", "nano", "nano-math")
    a, b = (Cell(row, column, dict(enumerate(values)), {}) for values in (ours, theirs))
    assert decide(rule, a, b)[1] is holds


def test_equal_differences_are_told():
    a, b = (Cell(Row("a", "a"), Column("GSM8K", "nano", "nano-math"), dict.fromkeys(range(3), v), {}) for v in (3.5, 1))
    assert decide("above", a, b) == ("+2.5, all 3 differences are equal (sd 0): no interval and no test", None)


def test_every_claim_has_its_rows_in_its_recipe(store: Path):
    for claim in CLAIMS:
        rows = {row.name for row in RECIPES[claim.recipe](NANO).rows}
        assert {claim.row, claim.reference} <= rows, claim.says
    found = claims_result({claim.recipe: RECIPES[claim.recipe](NANO) for claim in CLAIMS}, store)
    assert [(row[1], row[-1]) for row in found.rows] == [
        ("A quarter of the experts is equivalent to all.", "agrees"),
        ("A quarter of the experts makes seeds differ less.", "cannot tell"),
    ]


def test_the_pages_and_files(store: Path, tmp_path: Path):
    (page,) = write_tables(store, tmp_path / "out")
    assert page == tmp_path / "out/tables-nano/tables.html"
    names = {path.name for path in page.parent.iterdir()}
    for result_ in table_results(NANO, store):
        assert {f"{result_.name}.csv", f"{result_.name}.tex"} <= names
        assert {result_.picture(end) for end in result_.figures} <= names
        assert f'id="{result_.name}"' in page.read_text() and result_.title in (page.parent / "tables.md").read_text()
    before = {path: path.read_bytes() for path in page.parent.iterdir()}
    write_tables(store, tmp_path / "out")
    assert before == {path: path.read_bytes() for path in page.parent.iterdir()}, "the same bytes again"
    assert "tables.html" in run("report", store, "-o", tmp_path / "again")
    with pytest.raises(DataError, match="no recipe has a run"):
        write_tables(tmp_path / "out", tmp_path / "none")


def test_runs_of_a_papers_model_in_the_other_papers_recipe_have_a_page(tmp_path: Path):
    for method in ("lora", "hellora"):
        for seed in (0, 1):
            at = tmp_path / f"Qwen1.5-MoE-A2.7B/gsm8k-lori/{method}"
            write_run(at, 0.5 + seed / 10, seed, model="Qwen/Qwen1.5-MoE-A2.7B")
    (page,) = write_tables(tmp_path, tmp_path / "out")
    assert page.parent.name == "tables-Qwen1.5-MoE-A2.7B"
    assert {"hellora-table-2.csv", "claims.csv"} <= {path.name for path in page.parent.iterdir()}
    for seed in (42, 99):
        write_run(tmp_path / "Qwen1.5-MoE-A2.7B/gsm8k/sieve", 0.5 + seed / 999, seed, model="Qwen/Qwen1.5-MoE-A2.7B")
    names = {page.parent.name: page for page in write_tables(tmp_path, tmp_path / "out")}
    assert set(names) == {"tables-papers", "tables-Qwen1.5-MoE-A2.7B"}
    assert (names["tables-papers"].parent / "moe-sieve-table-3.csv").is_file()


def test_a_fully_fine_tuned_model_that_is_scored_has_no_page_of_its_own(store: Path, tmp_path: Path):
    record = new_record(
        name="a", condition="a", model={"name": "runs/a/seed0/model", "fingerprint": "x"}, data={"name": "nano-sql"},
        sweep={"name": STORE, "condition": "a-on-b", "scores": "a"},
    )  # fmt: skip
    write_record(store / "nano/nano-math/fft-on-nano-sql/seed0", record | {"status": "done"})
    assert [page.parent.name for page in write_tables(store, tmp_path / "out")] == ["tables-nano"]


def test_no_page_without_a_run_that_is_done(tmp_path: Path):
    record = new_record(
        name="a", condition="a", model={"name": "nano", "fingerprint": "x"}, data={"name": "nano-math"},
        sweep={"name": STORE, "condition": "nano/nano-math/lora"},
    )  # fmt: skip
    write_record(tmp_path / "nano/nano-math/lora/seed0", record | {"status": "failed"})
    with pytest.raises(DataError, match="no recipe has a run that is done"):
        write_tables(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "tables" not in run("report", tmp_path, "-o", tmp_path / "out")


def test_a_broken_record_is_named_and_left_out(store: Path, tmp_path: Path):
    broken = store / "nano/nano-math/sieve/seed3/run.json"
    broken.write_text('{"version": 1}')
    (page,) = write_tables(store, tmp_path / "out")
    notes = result(RECIPES["moe-sieve-table-3"](NANO), store).notes
    assert any(note.startswith(f"Left out: {broken} lacks") for note in notes), notes
    assert any("hot 25% on GSM8K (nano-math) lacks 3 (n = 7)" in note for note in notes) and page.is_file()


def test_a_broken_plan_is_named_and_the_tables_are_written(store: Path, tmp_path: Path):
    broken = store / "nano/nano-math/sieve/seed0/plan.json"
    broken.write_text('{"version": 1')
    assert [page.is_file() for page in write_tables(store, tmp_path / "out")] == [True]
    notes = result(RECIPES["moe-sieve-table-3"](NANO), store).notes
    assert any(note.startswith(f"Left out: {broken}") for note in notes), notes


def test_other_tasks_before_and_after_have_the_notes_of_tables(tmp_path: Path):
    across = RECIPES["hellora-table-8"](NANO)
    write_run(tmp_path / "nano/nano-sql/base", 0.10, None)
    write_run(tmp_path / "nano/nano-math/hellora-on-nano-sql", 0.12, 0)
    table = result(across, tmp_path)
    assert table.notes[0].startswith("3 seeds a cell;") and table.notes[0].endswith("own models and tasks.")
    absent = next(note for note in table.notes if note.startswith("No run is done of"))
    assert absent.count("; ") == 6 and "HELLoRA of GSM8K (nano-math) on SAFE (nano-choice)" in absent
    assert "Seeds are missing: HELLoRA of GSM8K (nano-math) on HUMAN (nano-sql) lacks 1, 2 (n = 1)." in table.notes
    write_run(tmp_path / "nano/nano-sql/base", 0.10, None, config={"test_hash": "a"})
    for seed in range(3):
        at = tmp_path / "nano/nano-math/hellora-on-nano-sql"
        write_run(at, 0.12 + seed / 9, seed, config={"test_hash": "b", "adapter": str(seed), "adapter_hash": str(seed)})
    table = result(across, tmp_path)
    told = "HELLoRA of GSM8K (nano-math) on HUMAN (nano-sql) in test examples"
    assert f"Made otherwise than the model as it is, and not compared with it: {told}." in table.notes
    assert table.rows[0][4] == "–" and numbers(table)[0]["change"] == ""


def test_published_numbers_are_of_the_papers_models(tmp_path: Path):
    def told(name: str, setting: Setting) -> str:
        recipe = RECIPES[name](setting)
        column, row = recipe.columns[-1], recipe.rows[-1]
        for seed in (0, 1):
            write_run(tmp_path / column.folder / row.name, 0.5, seed)
            write_run(tmp_path / column.folder / f"{row.name}-scored", 0.5, seed)
        return result(recipe, tmp_path).notes[0]

    qwen, other = "Qwen/Qwen1.5-MoE-A2.7B", "Qwen/Qwen3-30B-A3B"
    olmoe = "Published numbers are of allenai/OLMoE-1B-7B-0924."
    assert told("hellora-table-2", Setting(other)).endswith(olmoe)
    assert told("moe-sieve-table-3", Setting(qwen)).endswith(olmoe)
    assert told("hellora-table-3", Setting("a/b")).endswith("Published numbers are of mistralai/Mixtral-8x7B-v0.1.")
    for name in ("hellora-table-2", "moe-sieve-table-3", "hellora-table-3"):
        assert "Published" not in told(name, Setting())
    assert "Published" not in told("hellora-table-2", Setting("allenai/OLMoE-1B-7B-0924"))
    assert told("hellora-table-2", NANO).endswith("Published numbers are of the papers' own models and tasks.")


def test_multiples_of_k_are_claimed_where_they_are_that(tmp_path: Path):
    def told(recipe_of: Setting, experts: dict[str, int]) -> tuple[list[str], list[str]]:
        for name, number in experts.items():
            for seed in range(3):
                at = tmp_path / RECIPES["hellora-table-7"](recipe_of).columns[0].folder / name
                write_run(at, 0.2 + seed / 9 + number / 99, seed, experts=number)
        found = claims_result({claim.recipe: RECIPES[claim.recipe](recipe_of) for claim in CLAIMS}, tmp_path)
        return [row[1] for row in found.rows if row[0] == "HELLoRA 4.5.3"], found.notes

    both = ["A quarter of K experts is noticeably worse.", "2 K experts bring little over K."]
    claims, notes = told(NANO, {"hellora-2of64": 1, "hellora": 4, "hellora-16of64": 8})
    assert claims == both and not any("Left out" in note for note in notes)
    setting = Setting("Qwen/Qwen3-30B-A3B")  # 8 of 128
    write_run(tmp_path / "Qwen3-30B-A3B/gsm8k/sieve-all", 0.5, 42)
    write_run(tmp_path / "Qwen3-30B-A3B/gsm8k/sieve", 0.5, 42)
    claims, notes = told(setting, {"hellora-2of64": 4, "hellora": 8, "hellora-16of64": 32})
    assert not claims
    for claim, numbers in zip(both, ("4 and 8", "8 and 32"), strict=True):
        assert f'Left out: "{claim}" Its rows adapt {numbers} experts of a layer here.' in notes


def test_a_dense_run_before_the_sparse_one_takes_time_too(tmp_path: Path):
    def seconds() -> str:
        (row,) = [row for row in numbers(result(RECIPES["hellora-table-2"](NANO), tmp_path)) if row["row"] == "lori-s"]
        return row["training_seconds"]

    at = tmp_path / "nano/nano-math/lori-s"
    for seed in (0, 1):
        write_run(at, 0.5, seed, config=CONFIG | {"mask_hash": str(seed)})
    note = "Without the dense run's: training_seconds of LoRI-S on GSM8K (nano-math)."
    assert seconds() == "12.0" and note in result(RECIPES["hellora-table-2"](NANO), tmp_path).notes
    for seed in (0, 1):
        record = read_record(at / f"seed{seed}")
        record["training"]["dense_seconds"] = 30.0 + seed
        write_record(at / f"seed{seed}", record)
    assert seconds() == "42.5" and note not in result(RECIPES["hellora-table-2"](NANO), tmp_path).notes
