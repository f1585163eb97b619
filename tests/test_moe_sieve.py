"""The README's first table: MoE-Sieve's results, computed again from its author's runs."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from published import ABSENT, DATA

from hotlora.adapter.count import parameters_from_config

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        yield importlib.import_module("moe_sieve")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def test_runs_are_read_as_the_author_published_them(script, tmp_path):
    spider = tmp_path / "outputs" / "qwen" / "spider"
    inputs = spider / "qwen_spider_s42_hotk15_ts_inputs"
    inputs.mkdir(parents=True)
    (spider / "qwen_spider_s42_hotk15_summary.json").write_text('{"acc": 0.26, "n": 1034}')
    (inputs / "official_eval_output.txt").write_text(
        "count                248                  446                  174                  166              1034\n"
        "=====================   EXECUTION ACCURACY     =====================\n"
        "execution            0.601                0.370                0.368                0.205         0.398    \n"
    )
    gsm8k = tmp_path / "outputs" / "olmoe" / "gsm8k"
    gsm8k.mkdir(parents=True)
    (gsm8k / "olmoe_gsm8k_s99_budgetp25_bcount_summary.json").write_text('{"acc": 0.25, "n": 1319}')
    scores = script.read_runs(tmp_path)
    assert scores["qwen"]["spider"]["hotk15"][42] == pytest.approx(39.8), "the official score, not the proxy"
    assert scores["olmoe"]["gsm8k"]["budgetp25_bcount"] == {99: 25.0}


def test_a_condition_is_paired_with_all_experts_by_seed(script):
    runs = {"full_lora": {1: 30.0, 2: 32.0, 3: 31.0}, "hotk16": {3: 30.0, 2: 31.5, 1: 29.0}, "randk16": {1: 20.0}}
    every, hot = script.results({"olmoe": {"gsm8k": runs}})
    assert every["mean"] == 31.0 and "against_all" not in every
    assert hot["against_all"]["mean"] == pytest.approx(-2.5 / 3, abs=1e-4) and hot["seeds"] == [1, 2, 3]


def test_the_record_is_what_the_authors_scores_give(script):
    file = DATA / "routing" / "moe_sieve" / "seeds.json"
    if not file.is_file():
        pytest.skip(f"{file.name} is {ABSENT}")
    scores = {
        model: {
            task: {
                condition: {int(seed): 100 * run.get("execution", run.get("accuracy")) for seed, run in runs.items()}
                for condition, runs in conditions.items()
            }
            for task, conditions in tasks.items()
        }
        for model, tasks in json.loads(file.read_text(encoding="utf-8")).items()
    }
    recorded = json.loads(script.RESULT.read_text(encoding="utf-8"))["results"]
    for found, kept in zip(script.results(scores), recorded, strict=True):
        assert found.pop("against_all", {}) == pytest.approx(kept.pop("against_all", {}), rel=1e-6)
        assert found == kept


def test_the_readme_leads_with_them(script):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = script.readme_table()
    assert table in readme
    for row in ("| all 64 experts | 30.4 ", "| **hot quarter** (16) | 30.4 ", "| random quarter | 27.9 "):
        assert row in table
    assert readme.index("OLMoE-1B-7B on GSM8K") < readme.index("| nano on nano-math")


def test_its_trained_parameters_are_counted_from_the_config(script):
    config = ROOT / "benchmarks" / "configs" / "olmoe-1b-7b"
    for condition, kept in (("full_lora", None), ("hotk16", 16), ("hotk8", 8)):
        counted = parameters_from_config(config, experts_per_layer=kept, r=32)
        assert counted["trainable"] == script.ROWS[condition][1]
