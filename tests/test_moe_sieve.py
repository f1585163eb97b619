"""docs/moe-sieve.md and README's first table: MoE-Sieve's numbers, computed again from its author's data."""

import importlib
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from published import ABSENT, DATA

from hotlora.adapter.count import parameters_from_config

ROOT = Path(__file__).parents[1]
PUBLISHED = DATA / "routing" / "moe_sieve"
DEEPSEEK = "DeepSeek-MoE-16B"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        yield importlib.import_module("moe_sieve")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def parts(script):
    """The script's modules, by the end of their names."""
    return {name: sys.modules[f"moe_sieve_{name}"] for name in ("data", "cell", "cells", "claims", "page")}


@pytest.fixture(scope="module")
def data(parts):
    if not PUBLISHED.is_dir():
        pytest.skip(f"routing/moe_sieve is {ABSENT}")
    return parts["data"].read(PUBLISHED)


def write_plain(folder, model, task, counts, top_k):
    """A data set's profile in the plain form."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = list(range(1, 1 + len(counts)))
    made = {"model": model, "dataset": task, "num_experts_per_tok": top_k, "layers": layers}
    made |= {"counts": counts.tolist(), "mass": (counts.double() / 7).tolist()}
    (folder / f"{task}.json").write_text(json.dumps(made))


def drawn(layers, experts, top_k, seed):
    """int64 [layers, experts]: skewed counts of 6,000 tokens."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(layers, experts, generator=generator).softmax(dim=1)
    counts = (shares * 6000 * top_k).long()
    counts[:, 0] += 6000 * top_k - counts.sum(dim=1)
    return counts


# --- the data ---


def test_runs_are_read_as_the_author_published_them(parts, tmp_path):
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
    scores = parts["data"].read_runs(tmp_path)
    assert scores["qwen"]["spider"]["hotk15"][42] == pytest.approx(39.8), "the official score, not the proxy"
    assert scores["olmoe"]["gsm8k"]["budgetp25_bcount"] == {99: 25.0}


def test_a_clone_and_the_plain_form_are_the_same_profiles(parts, tmp_path):
    counts = drawn(3, 8, 2, 0)
    write_plain(tmp_path / "plain" / "any", "deepseek-ai/deepseek-moe-16b-base", "alpaca", counts, 2)
    clone = tmp_path / "clone"
    telemetry = clone / "outputs" / "telemetry" / "deepseek" / "alpaca"
    telemetry.mkdir(parents=True)
    layers = {1 + row: {"counts": counts[row], "mass": counts[row].double() / 7} for row in range(3)}
    torch.save({"meta": {"k": 2}, **layers}, telemetry / "telemetry_alpaca.pt")
    ours, theirs = (parts["data"].read(folder).profiles[DEEPSEEK] for folder in (tmp_path / "plain", clone))
    assert list(ours) == list(theirs) == ["codealpaca"]
    assert ours["codealpaca"].hash == theirs["codealpaca"].hash and ours["codealpaca"].num_tokens == 6000


def test_data_that_do_not_fit_are_named(parts, tmp_path):
    counts = drawn(2, 8, 2, 0)
    counts[1, 3] += 1
    write_plain(tmp_path / "uneven" / "olmoe", "allenai/OLMoE-1B-7B-0924", "gsm8k", counts, 2)
    with pytest.raises(SystemExit, match=r"gsm8k.json: its layers have \[12000, 12001\] assignments"):
        parts["data"].read(tmp_path / "uneven")
    (tmp_path / "other" / "x").mkdir(parents=True)
    (tmp_path / "other" / "x" / "y.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"y\.json has no 'model'"):
        parts["data"].read(tmp_path / "other")
    with pytest.raises(SystemExit, match="neither outputs/"):
        parts["data"].read(tmp_path)


# --- the cells ---


def test_every_cell_is_equal_or_explained(script, parts, data):
    _, recorded = script.recorded()
    found = parts["cells"].cells(data)
    assert script.faults(found, recorded) == []
    assert [(cell.key, cell.status) for cell in found] == [(cell.key, cell.status) for cell in recorded]
    for cell, kept in zip(found, recorded, strict=True):
        is_number = isinstance(kept.here, float)
        assert cell.here == (pytest.approx(kept.here, rel=1e-5) if is_number else kept.here)
        assert cell.others == pytest.approx(kept.others, rel=1e-5)


def test_what_the_record_has(script, parts):
    """The known facts: the tables that come out whole, and those that do not."""
    _, cells = script.recorded()
    assert len({cell.key for cell in cells}) == len(cells)
    assert {cell.status for cell in cells} == {"equal", "explained", "absent"}
    assert parts["page"].count(cells) == "376 of 403 cells equal"
    tables = {f"Table {n}" for n in range(1, 11)} | {f"Figure {n}" for n in (1, 2, 3, 5, 6)}
    assert tables <= {cell.table for cell in cells}
    explained = Counter(cell.table for cell in cells if cell.status == "explained")
    whole = {"Table 2", "Table 9", "Table 6", "Figure 3", "Figure 5", "Section 6.1", "Section 6.2", "Section 3.3"}
    assert not whole & explained.keys()
    assert explained["Table 7"] == 1 and explained["Table 3"] == 1
    of_8 = [cell for cell in cells if cell.table == "Table 8" and cell.column != "difference"]
    assert all(cell.status == "equal" for cell in of_8 if "spider" in cell.row)
    is_sorted = parts["cell"].SORTED
    assert all(cell._is(cell.others[is_sorted]) for cell in of_8 if "spider" not in cell.row), "all four rows, sorted"
    gsm8k = next(cell for cell in of_8 if cell.row == "OLMoE-1B-7B, gsm8k" and cell.column == "within 1")
    assert (gsm8k.here, gsm8k.others[is_sorted]) == pytest.approx((0.0778, 0.00264), abs=1e-4)
    ranges = [cell for cell in cells if cell.table == "Table 5" and cell.column in ("fewest", "most", "covered, %")]
    assert len(ranges) == 18 and all(cell.status == "equal" for cell in ranges), "greedy has no minimum"


def test_a_number_is_equal_to_its_printed_digits(parts):
    cell = parts["cell"].Cell("T", "r", "c", ".1f", 28.5, 28.45)
    assert cell.status == "equal", "in the middle of two prints it is either"
    assert replace(cell, here=28.4499).status == replace(cell, here=28.551).status == "differs"
    assert replace(cell, here=None).status == "absent"
    assert replace(cell, here=28.0, others={"ddof 1": 28.52}).status == "explained"
    assert replace(cell, here=28.0, others={"ddof 1": 28.6}).status == "differs", "the other reading must give it"
    less = parts["cell"].Cell("T", "r", "c", "p", 0.001, 0.00099)
    assert less.status == "equal" and replace(less, here=0.001).status == "differs"
    assert replace(less, printed=0.003, here=0.0034).status == "equal"
    for key in parts["cell"].EXPLAINED:
        assert parts["cell"].Cell(*key, ".0f", 1, 9).status == "explained"


def test_a_cell_that_is_equal_no_longer_is_a_fault(script, parts):
    cell = parts["cell"].Cell("Table 7", "layer 13", "covered by 16", ".0f", 73.0, 73.0)
    worse = replace(cell, here=72.0)  # EXPLAINED has a reason for it
    assert worse.status == "explained" and script.faults([worse], []) == []
    assert script.faults([worse], [cell]) == ["Table 7, layer 13, covered by 16: was equal, and is 72.0 now"]
    gone = replace(cell, here=None)
    assert len(script.faults([gone], [cell])) == 1 and script.faults([gone], [cell], is_whole=False) == []
    other = replace(cell, row="layer 1", here=70.0)
    assert "printed 73, here 70" in script.faults([other], [])[0]


def test_the_script_fails_on_other_scores(script, tmp_path, capsys, monkeypatch):
    runs = {str(seed): {"accuracy": 0.5 + seed / 1000} for seed in range(3)}
    (tmp_path / "seeds.json").write_text(json.dumps({"olmoe": {"gsm8k": {"full_lora": runs, "hotk16": runs}}}))
    before = script.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["moe_sieve.py", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        script.main()
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 1 and lines[-1].endswith("cells equal")
    assert any(line.startswith("FAULT: Table 3, OLMoE-1B-7B, gsm8k, all: printed 30.4, here 50.1") for line in lines)
    assert "nothing is written" in lines[0] and script.PAGE.read_text(encoding="utf-8") == before


def test_another_models_counts_fill_its_rows(script, parts, tmp_path, capsys, monkeypatch):
    """A folder with the paper's third model alone: its cells are computed, and the record stays as it is."""
    for seed, task in enumerate(("spider", "gsm8k", "mbpp")):
        counts = drawn(27, 64, 6, seed)
        write_plain(tmp_path / "in" / "deepseek", "deepseek-ai/deepseek-moe-16b-base", task, counts, 6)
    data = parts["data"].read(tmp_path / "in")
    found = {cell.key: cell for cell in parts["cells"].cells(data)}
    profiles = data.profiles[DEEPSEEK].values()
    mean = sum(profile.coverage(fraction=0.25).mean().item() for profile in profiles) / 3
    assert found["Table 2", DEEPSEEK, "covered by 25%, %"].here == pytest.approx(100 * mean)
    assert found["Table 1", DEEPSEEK, "layers"].status == "equal"
    assert found["Section 3.3", DEEPSEEK, "count and mass, Jaccard"].here == 1.0
    cv = data.profiles[DEEPSEEK]["spider"].layer_cv()
    assert found["Section 3.2", f"{DEEPSEEK}, spider: CV, first layer", "number"].here == pytest.approx(cv[0].item())
    arguments = ["moe_sieve.py", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        script.main()
    page = (tmp_path / "out" / "docs" / "moe-sieve.md").read_text(encoding="utf-8")
    assert f"0.646 / **{1:.3f}**" in page and "What the paper does not print" not in page
    assert (tmp_path / "out" / "docs" / "moe-sieve" / "figure-2.png").is_file()


def test_the_page_is_what_the_record_says(script, capsys, monkeypatch):
    assert script.PAGE.read_text(encoding="utf-8") == script.recorded_page()
    for n in range(1, 6):
        assert (script.PAGE.parent / "moe-sieve" / f"figure-{n}.png").is_file()
    monkeypatch.setattr(sys, "argv", ["moe_sieve.py", "--check"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 0 and capsys.readouterr().out.splitlines()[-1] == "376 of 403 cells equal"


# --- what the trainings say ---


def test_a_condition_is_paired_with_all_experts_by_seed(script):
    runs = {"full_lora": {1: 30.0, 2: 32.0, 3: 31.0}, "hotk16": {3: 30.0, 2: 31.5, 1: 29.0}, "randk16": {1: 20.0}}
    every, hot = script.results({"olmoe": {"gsm8k": runs}})
    assert every["mean"] == 31.0 and "against_all" not in every
    assert hot["against_all"]["mean"] == pytest.approx(-2.5 / 3, abs=1e-4) and hot["seeds"] == [1, 2, 3]


def test_the_record_is_what_the_authors_scores_give(script, parts, data):
    recorded, _ = script.recorded()
    for found, kept in zip(script.results(data.scores), recorded["results"], strict=True):
        assert found.pop("against_all", {}) == pytest.approx(kept.pop("against_all", {}), rel=1e-6)
        assert found == kept
    for found, kept in zip(parts["claims"].tests(data.scores), recorded["tests"], strict=True):
        assert found.keys() == kept.keys()
        for name, value in kept.items():
            assert found[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4)), name


def test_holms_correction_is_over_all_tests(script, parts):
    recorded, _ = script.recorded()
    tests = recorded["tests"]
    assert len({(row["model"], row["task"], row["a"], row["b"]) for row in tests}) == len(tests) == 41
    least = min(tests, key=lambda row: row["p"])
    assert least["p_holm"] == pytest.approx(41 * least["p"], rel=1e-4)
    by_pair = {(row["model"], row["task"], row["a"], row["b"]): row for row in tests}
    verdicts = {
        (claim.rule, pair): parts["claims"].verdict(claim, by_pair[pair])
        for claim in parts["claims"].CLAIMS
        for pair in claim.pairs
    }
    assert verdicts["above", ("olmoe", "gsm8k", "hotk16", "randk16")] == "agrees"
    assert verdicts["no difference", ("qwen", "hellaswag", "budgetp25_bcount", "hotk15")] == "differs"
    assert verdicts["equivalent", ("olmoe", "spider", "hotk16", "full_lora")] == "cannot tell"


@pytest.mark.parametrize(
    ("rule", "change", "expected"),
    [
        ("above", {"mean": 1.0, "p_holm": 0.04}, "agrees"),
        ("above", {"mean": -1.0, "p_holm": 0.04}, "differs"),
        ("below", {"mean": -1.0, "p_holm": 0.04}, "agrees"),
        ("above", {"mean": 1.0, "p_holm": 0.06}, "cannot tell"),
        ("equivalent", {"p_equivalent_holm": 0.04, "p_holm": 0.01}, "agrees"),
        ("equivalent", {"mean": 3.0, "p_holm": 0.01}, "differs"),
        ("no difference", {"p_equivalent_holm": 0.01, "p_holm": 0.01}, "differs"),
        ("no difference", {"p_equivalent_holm": 0.01}, "agrees"),
        ("spread", {"sd_low": 0.2, "sd_high": 0.9}, "agrees"),
        ("spread", {"sd_low": 1.1, "sd_high": 3.0}, "differs"),
        ("spread", {"sd_low": 0.9, "sd_high": 3.0}, "cannot tell"),
    ],
)
def test_a_sentences_verdict(parts, rule, change, expected):
    test = {"mean": 0.1, "p_holm": 1.0, "p_equivalent_holm": 1.0, "sd_low": 0.5, "sd_high": 2.0} | change
    assert parts["claims"].verdict(parts["claims"].Claim("1", "", rule, ()), test) == expected


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
