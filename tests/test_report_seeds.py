"""What a report says of runs that differ in their seed alone, by scipy."""

import io
import json
import re
import shutil

import numpy as np
import pytest
from rich.console import Console
from scipy import stats
from test_report import Page, change, write_runs

from hotlora.base.records import find_records
from hotlora.report.over_seeds import repeated, seeds_rows, seeds_summary
from hotlora.report.page import conditions_table, write_report
from hotlora.report.sections import read_sections

SEEDS = (0, 1, 2, 3)


@pytest.fixture
def runs(tmp_path):
    for seed in SEEDS:
        write_runs(tmp_path / "runs", conditions=("all", "hot", "random"), seed=seed)
    write_runs(tmp_path / "runs", conditions=("base",))
    return tmp_path / "runs"


def scores(runs, condition):
    records = [json.loads((runs / "nano-math" / f"{condition}-{seed}" / "run.json").read_text()) for seed in SEEDS]
    return np.array([100 * record["evaluation"]["nano-math"]["accuracy"] for record in records])


def t_interval(values):
    return stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))


def numbers(text):
    return [float(word) for word in re.findall(r"[+-]?\d+\.\d+", text.replace("−", "-"))]


def section_of(runs):
    (section,) = read_sections(find_records(runs))
    return section


def test_means_and_intervals_are_scipys(runs):
    section = section_of(runs)
    rows = {row.name: row for row in seeds_rows(section, "nano-math", list(section.records))}
    assert list(rows) == ["base", "all", "hot 25%", "random 25%"]
    assert [row.cells["seeds"] for row in rows.values()] == ["1", "4", "4", "4"]
    for name in ("all", "hot 25%", "random 25%"):
        own = scores(runs, name.split()[0])
        assert numbers(rows[name].cells["accuracy"]) == pytest.approx([own.mean(), *t_interval(own)], abs=0.05)
    for name in ("hot 25%", "random 25%"):
        apart = scores(runs, name.split()[0]) - scores(runs, "all")
        assert numbers(rows[name].cells["difference"]) == pytest.approx([apart.mean(), *t_interval(apart)], abs=0.05)
    assert rows["all"].cells["difference"] == "–" and numbers(rows["base"].cells["accuracy"]) == pytest.approx(
        [100 * json.loads((runs / "nano-math/base-0/run.json").read_text())["evaluation"]["nano-math"]["accuracy"]]
    )


def test_the_page_shows_means_first_and_each_run_below(runs, tmp_path):
    page = write_report(runs, tmp_path / "out").read_text()
    tables = page.split("<tbody>")
    assert page.count("<summary>Each run</summary>") == 1 and page.index("seeds</th>") < page.index("Each run")
    rows = Page(page).rows
    names = [row[0] for row in rows]
    assert names[:5] == ["run", "base", "all", "hot 25%", "random 25%"] and names.count("hot 25%, seed 3") == 1
    assert len(tables) == 3 and "the mean over seeds, and the band of all of them" in page


def test_the_summary_tells_what_seeds_can(runs):
    section = section_of(runs)
    text = seeds_summary(section, "nano-math", list(section.records))
    low, high = t_interval(scores(runs, "hot") - scores(runs, "all"))
    assert f"over 4 seeds, LoRA on the hot experts is right in {scores(runs, 'hot').mean():.1f}%" in text
    assert "with 31.5% of the trained parameters" in text
    assert ("do not tell the two apart" in text) == (low <= 0 <= high)
    for seed in SEEDS:  # now every seed is 20 points worse, and a little more for each
        run = runs / "nano-math" / f"hot-{seed}"
        worse = scores(runs, "all")[seed] / 100 - 0.2 - seed / 100
        change(
            run, evaluation__nano_math={"metric": "exact_match", "accuracy": worse, "n": 200, "correct": 200 * worse}
        )
        record = json.loads((run / "run.json").read_text())
        record["evaluation"]["nano-math"] = record["evaluation"].pop("nano_math")
        (run / "run.json").write_text(json.dumps(record))
    text = seeds_summary(section_of(runs), "nano-math", list(section.records))
    assert "That is worse, beyond what chance over seeds explains (difference −23.6 to −19.4 points" in text


def test_runs_of_one_name_are_told_apart_by_the_sweeps_word_or_by_options(runs):
    for seed in SEEDS:
        change(runs / "nano-math" / f"random-{seed}", name="hot 25%", condition="hot", config__learning_rate=1e-3)
    names = [group.name for group in repeated(section_of(runs).records)]
    assert names == ["base", "all", "hot 25% (learning rate 0.0004)", "hot 25% (learning rate 0.001)"]
    for seed in SEEDS:
        for condition, word in (("random", "fast"), ("hot", "slow")):
            sweep = {"name": "rates", "condition": f"nano-math/{word}"}
            change(runs / "nano-math" / f"{condition}-{seed}", sweep=sweep)
    names = [group.name for group in repeated(section_of(runs).records)]
    assert names == ["base", "all", "hot 25% (slow)", "hot 25% (fast)"]
    for seed in SEEDS:
        for condition, word in (("random", "a/on"), ("hot", "b/on")):
            change(runs / "nano-math" / f"{condition}-{seed}", sweep={"name": "rates", "condition": word})
    names = [group.name for group in repeated(section_of(runs).records)]
    assert names == ["base", "all", "hot 25% (b/on)", "hot 25% (a/on)"]


def test_one_seed_has_no_means(tmp_path):
    write_runs(tmp_path, conditions=("all", "hot"))
    section = section_of(tmp_path)
    assert repeated(section.records) == [] and seeds_rows(section, "nano-math", list(section.records)) == []
    assert "Each run" not in write_report(tmp_path, tmp_path / "out").read_text()


def test_runs_without_a_score_are_told(runs):
    change(runs / "nano-math" / "hot-3", status="failed", evaluation={}, error="out of memory")
    section = section_of(runs)
    row = next(r for r in seeds_rows(section, "nano-math", list(section.records)) if r.condition == "hot")
    assert row.note == "1 failed: out of memory" and row.cells["seeds"] == "3"
    assert numbers(row.cells["accuracy"])[0] == pytest.approx(scores_of_three(runs), abs=0.05)


def scores_of_three(runs):
    records = [json.loads((runs / "nano-math" / f"hot-{seed}" / "run.json").read_text()) for seed in SEEDS[:3]]
    return np.mean([100 * record["evaluation"]["nano-math"]["accuracy"] for record in records])


def test_the_terminal_has_a_line_a_condition(runs):
    console = Console(width=84, file=io.StringIO())
    console.print(conditions_table(find_records(runs)))
    text = console.file.getvalue()
    assert "over 4 seeds" in text and "seed 3" not in text and text.count("hot 25%") == 1
    mean = scores(runs, "hot").mean()
    assert f"{mean:.1f} [" in text and max(map(len, text.splitlines())) <= 84


def test_held_out_losses_are_compared_seed_by_seed(runs):
    for seed in SEEDS:
        for condition, loss in (("all", 0.5), ("hot", 0.4), ("random", 0.6)):
            training = {"test_loss": loss + seed / 100 + (0.001 * seed if condition == "hot" else 0)}
            change(runs / "nano-math" / f"{condition}-{seed}", training=training, evaluation={})
    change(runs / "nano-math" / "base-0", evaluation={})
    section = section_of(runs)
    row = next(r for r in seeds_rows(section, "nano-math", list(section.records)) if r.condition == "hot")
    apart = [-0.1 + 0.001 * seed for seed in SEEDS]
    assert numbers(row.cells["difference"]) == pytest.approx([np.mean(apart), *t_interval(apart)], abs=5e-5)
    text = seeds_summary(section, "nano-math", list(section.records))
    assert "has a held-out loss of 0.4165, and LoRA on all experts of 0.5150" in text and "That is better" in text


def test_other_ways_of_scoring_are_no_seeds_of_one_condition(runs):
    for seed in SEEDS:
        shutil.copytree(runs / "nano-math" / f"hot-{seed}", runs / "nano-math" / f"drawn-{seed}")
        sampling = {"samples": 20, "temperature": 0.2, "top_p": 1.0, "seed": 0}
        change(runs / "nano-math" / f"drawn-{seed}", config={"adapter": "a", "sampling": sampling})
    section = section_of(runs)
    rows = {row.name: row for row in seeds_rows(section, "nano-math", list(section.records))}
    assert rows["hot 25%"].cells["seeds"] == rows["hot 25% (20 samples, temperature 0.2)"].cells["seeds"] == "4"
    assert rows["hot 25%"].cells["difference"] != "–"
    assert rows["hot 25% (20 samples, temperature 0.2)"].cells["difference"] == "–"


def test_seeds_on_other_test_examples_are_not_paired(runs, tmp_path):
    """All experts on 100 examples, hot ones on 1,000 others: no difference, and no word of better."""
    for seed in SEEDS:
        for condition, n, right, test in (("all", 100, 40 + seed, "t"), ("hot", 1000, 700 + 3 * seed, "u")):
            run = runs / "nano-math" / f"{condition}-{seed}"
            result = {"metric": "exact_match", "accuracy": right / n, "n": n, "correct": right}
            change(run, evaluation={"nano-math": result}, config__test_hash=test * 64)
    section = section_of(runs)
    row = next(r for r in seeds_rows(section, "nano-math", list(section.records)) if r.name == "hot 25%")
    assert row.cells["difference"] == "–" and seeds_summary(section, "nano-math", list(section.records)) == ""
    text = write_report(runs, tmp_path / "out").read_text()
    assert text.count("hot 25%: no difference on nano-math") == 1 and "beyond what chance" not in text


def test_a_reference_of_other_weights_is_none(runs):
    for seed in SEEDS:
        change(runs / "nano-math" / f"all-{seed}", model__fingerprint="olmoe-0")
    row = row_of(runs)
    assert row.cells["difference"] == "–"


def test_seeds_of_other_weights_of_the_same_shapes_are_told_apart(runs):
    """As they are where a folder's weights were replaced amid a sweep."""
    change(runs / "nano-math" / "hot-0", config__model_hash="a" * 64)
    assert row_of(runs).cells["seeds"] == "4", "the others are from before that was noted"
    for seed in SEEDS:
        change(runs / "nano-math" / f"hot-{seed}", config__model_hash="ab"[seed > 1] * 64)
    groups = [group for group in repeated(section_of(runs).records) if group.condition == "hot"]
    assert sorted(map(sorted, (group.runs for group in groups))) == [[0, 1], [2, 3]]
    for seed in SEEDS:
        change(runs / "nano-math" / f"hot-{seed}", config__model_hash="a" * 64)
        change(runs / "nano-math" / f"all-{seed}", config__model_hash="b" * 64)
    assert row_of(runs).cells["difference"] == "–"
    for seed in SEEDS:  # of the Hub two commits, which may differ in a README
        change(runs / "nano-math" / f"hot-{seed}", config__model_hash="a" * 40)
    assert row_of(runs).cells["difference"] != "–"


def test_a_condition_is_one_whatever_digits_its_share_was_named_with(runs):
    for seed in SEEDS:
        name = "hot 12.5%" if seed > 1 else "hot 12%"
        plan = json.loads((runs / "nano-math" / f"hot-{seed}" / "run.json").read_text())["plan"]
        change(runs / "nano-math" / f"hot-{seed}", name=name, plan=plan | {"params": {"experts_per_layer": 2}})
    groups = [group for group in repeated(section_of(runs).records) if group.condition == "hot"]
    assert [len(group.runs) for group in groups] == [4]
    change(runs / "nano-math" / "hot-3", plan=plan | {"params": {"experts_per_layer": 3}})
    groups = [group for group in repeated(section_of(runs).records) if group.condition == "hot"]
    assert sorted(len(group.runs) for group in groups) == [1, 3]


def test_runs_that_other_tests_judged_are_no_seeds_of_one_condition(runs):
    for seed in (1, 2, 3):  # seed 0 is from before that was noted
        change(runs / "nano-math" / f"hot-{seed}", config__scorer_hash="a" * 64)
    assert row_of(runs).cells["seeds"] == "4"
    change(runs / "nano-math" / "hot-3", config__scorer_hash="b" * 64)
    groups = [group for group in repeated(section_of(runs).records) if group.condition == "hot"]
    assert sorted(map(sorted, (group.runs for group in groups))) == [[0], [1, 2], [3]]


def row_of(runs, name="hot 25%"):
    section = section_of(runs)
    return next(row for row in seeds_rows(section, "nano-math", list(section.records)) if row.name == name)


def set_score(run, correct):
    result = {"metric": "exact_match", "accuracy": correct / 200, "n": 200, "correct": correct}
    change(run, evaluation={"nano-math": result})


def test_a_seed_counts_once(runs):
    before = row_of(runs)
    again = runs / "nano-math" / "again"
    shutil.copytree(runs / "nano-math" / "hot-0", again)
    set_score(again, 10)
    change(again, started="2020-01-01T00:00:00+00:00")
    assert row_of(runs).cells == before.cells, "the last run of a seed"
    section = section_of(runs)
    seeds_rows(section, "nano-math", list(section.records))
    assert section.notes == ["hot 25%: of each seed the last run counts in the means; left out of them: again."]


@pytest.mark.parametrize(
    "other",
    [
        {"config__data_hash": "e" * 64}, {"config__test_hash": "e" * 64}, {"config__fraction": 0.26},
        {"model__fingerprint": "olmoe-0"}, {"data__hash": "e" * 64}, {"data__test": 40},
    ],
    ids=str,
)  # fmt: skip
def test_runs_of_other_data_models_or_budgets_are_no_seeds_of_one_condition(runs, other):
    for seed in (2, 3):
        change(runs / "nano-math" / f"hot-{seed}", **other)
    groups = repeated(section_of(runs).records)
    assert [len(group.runs) for group in groups if group.condition == "hot"] == [2, 2]
    assert len({group.name for group in groups}) == len(groups), "nothing has another's name"


def test_a_difference_is_to_one_condition_and_says_of_how_many_seeds(runs):
    for seed in (2, 3):  # of all experts at another rate there are two seeds, and of the same two
        change(runs / "nano-math" / f"all-{seed}", config__learning_rate=0.5)
        set_score(runs / "nano-math" / f"all-{seed}", 20)
    set_score(runs / "nano-math" / "hot-1", 90)
    row = row_of(runs)
    apart = (scores(runs, "hot") - scores(runs, "all"))[:2]
    assert numbers(row.cells["difference"]) == pytest.approx([apart.mean(), *t_interval(apart)], abs=0.05)
    assert row.note == "difference over 2 of 4 seeds"


def test_what_is_equal_in_all_seeds_has_no_interval_and_no_test(runs):
    for seed in SEEDS:
        set_score(runs / "nano-math" / f"all-{seed}", 100)
        set_score(runs / "nano-math" / f"hot-{seed}", 104)
    row = row_of(runs)
    assert (row.cells["accuracy"], row.cells["difference"]) == ("52.0", "+2.0")
    section = section_of(runs)
    text = seeds_summary(section, "nano-math", list(section.records))
    assert "The difference is +2.0 points in each of them: there is no test of that." in text


def test_steps_that_not_all_runs_logged_are_told(runs, tmp_path):
    file = runs / "nano-math" / "hot-1" / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:7]))
    page = write_report(runs, tmp_path / "out").read_text()
    assert "hot 25%: its runs logged different steps; the loss picture shows the 7 steps that all have." in page
    file.write_text('{"step": 99, "loss": 0.5}\n')
    page = write_report(runs, tmp_path / "out").read_text()
    assert "the loss picture shows no step, for they have none in common" in page
