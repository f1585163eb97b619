"""The study of real routers: others' files are read as they are, and the committed numbers are what the counts give."""

import gzip
import importlib
import json
from pathlib import Path

import pytest
import torch
from published import ABSENT, DATA

from hotlora.base.files import read_json
from hotlora.routing.drift import drift
from hotlora.routing.profile import hot_mask, hot_overlap
from hotlora.routing.study import study

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "routers"
ROUTING = DATA / "routing"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("routers"), importlib.import_module("routing_json")


def written(folder: Path, name: str) -> dict:
    with gzip.open(folder / f"{name}.json.gz", "rt") as file:
        return json.load(file)


def run(module, monkeypatch, *words) -> None:
    monkeypatch.setattr("sys.argv", ["script", *map(str, words)])
    module.main()


def test_glms_shards_become_one_file_a_text(scripts, tmp_path, monkeypatch):
    routers, routing_json = scripts
    shards = tmp_path / "clone" / "saliency"
    shards.mkdir(parents=True)
    for part in (0, 1):
        layers = {
            "11": {"cnt": [3, 1, 0, 4], "gate": [0.5, 0.25, 0.0, 1.0], "sal": [1.0, 2.0, 0.0, 3.0]},
            "3": {"cnt": [2 + part, 2 - part, 3, 1], "gate": [1.0] * 4, "sal": [part, 0.5, 0.0, 0.0]},
        }
        (shards / f"sal_code_raw_calib_0{part}.json").write_text(json.dumps({"tokens": 4, "layers": layers}))
    run(routing_json, monkeypatch, tmp_path / "clone", tmp_path / "out")
    found = written(tmp_path / "out", "code_raw")
    assert found["layers"] == [3, 11] and found["num_tokens"] == 8
    assert found["counts"] == [[5, 3, 6, 2], [6, 2, 0, 8]] and found["reap"][0] == [1, 1.0, 0, 0]
    profile, examples = routers.profile_of(found), routers.examples_of(found, 4)
    assert (profile.num_experts_per_tok, profile.num_tokens, profile.layers) == (2, 8, (3, 11))
    assert torch.equal(examples.sum(0).long(), profile.counts) and len(examples) == 2


def test_olmoes_examples_are_kept_by_row(scripts, tmp_path, monkeypatch):
    routers, routing_json = scripts
    jobs = tmp_path / "clone" / routing_json.JOBS
    rows = [{"routed": {"1": [[63, 2]], "0": [[0, 1], [5, 1]]}}, {"routed": {"0": [[5, 2]], "1": [[1, 2]]}}]
    for name in ("null1024_olmoe_fp8_resident", "sb1024_adapted_olmoe_nf4_resident", "null1024_olmoe_fp8_offload"):
        (jobs / name).mkdir(parents=True)
        with gzip.open(jobs / name / "routed_sets.jsonl.gz", "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    run(routing_json, monkeypatch, tmp_path / "clone", tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"fp8.json.gz", "nf4_after_lora.json.gz"}
    examples = routers.examples_of(written(tmp_path / "out", "fp8"), 64)
    assert examples.shape == (2, 2, 64) and examples.sum() == 8
    assert examples[0, 1, 63] == 2 and examples[1, 0, 5] == 2


def test_what_is_no_clone_is_told(scripts, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="has neither runs/results"):
        run(scripts[1], monkeypatch, tmp_path, tmp_path / "out")


def data_of(folder: str) -> Path:
    if not (ROUTING / folder).is_dir():
        pytest.skip(f"routing/{folder} is {ABSENT}")
    return ROUTING / folder


@pytest.mark.parametrize(
    ("folder", "model"), [("moe_sieve/olmoe", "olmoe"), ("moe_sieve/qwen", "qwen"), ("glm_5_2", "glm_5_2")]
)
def test_the_committed_study_is_what_the_counts_give(scripts, folder, model):
    routers, _ = scripts
    profiles, files = {}, routers.files_of(data_of(folder))
    for name, file in files.items():
        profiles[routers.NAMES.get(name, name)] = routers.profile_of(read_json(file))
    committed = read_json(RESULTS / model / "study.json")
    result = routers.rounded(study(profiles, shared=routers.SHARED[model]))
    names = committed["overlap"]["names"]
    for name, row in result["datasets"].items():
        ours = committed["datasets"][name]
        for key in ("global_cv", "layer_cv", "ratio", "shuffled", "coverage", "entropy", "by_layer", "by_depth"):
            assert ours[key] == row[key], (name, key)
        assert ours["signals"]["jaccard"] == pytest.approx(row["signals"]["jaccard"], abs=2e-3)  # mass is rounded there
        assert ours["auto"] == routers.rounded(routers.sizes(profiles[name]))
        for other, value in zip(
            result["overlap"]["names"], result["overlap"]["jaccard"][list(profiles).index(name)], strict=True
        ):
            assert committed["overlap"]["jaccard"][names.index(name)][names.index(other)] == value


def test_the_committed_drift_is_what_the_examples_give(scripts):
    routers, _ = scripts
    counts = {
        name: routers.examples_of(routers.read(file), 64)
        for name, file in routers.files_of(data_of("olmoe_alpaca_per_example")).items()
    }
    committed = read_json(RESULTS / "precision.json")["changes"]
    for name, (before, after) in {"nf4": ("bf16", "nf4"), "nf4 after LoRA": ("nf4", "nf4_after_lora")}.items():
        found = routers.rounded(drift(counts[before], counts[after], 16, draws=2))
        for key in ("jaccard", "by_layer", "moved", "covered", "still_covered"):
            assert committed[name]["16"][key] == found[key], (name, key)
    assert 0.75 < committed["nf4 after LoRA"]["16"]["jaccard"] < 0.8 and committed["nf4"]["16"]["jaccard"] > 0.97


def test_reap_of_glm_is_a_sum_that_ranks_other_experts_than_count(scripts):
    routers, _ = scripts
    data = routers.read(data_of("glm_5_2") / "math.json")
    profile, reap = routers.profile_of(data), torch.tensor(data["reap"])
    hot = hot_overlap(hot_mask(profile.counts, 64), hot_mask(reap, 64)).mean().item()
    committed = read_json(RESULTS / "glm_5_2" / "study.json")["datasets"]["math"]["saliency"]["count"]
    assert hot == pytest.approx(committed, abs=2e-3)


def test_experts_in_fp8_are_rounded_in_blocks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    as_fp8 = importlib.import_module("precision").as_fp8
    weight = torch.randn(2, 130, 200, generator=torch.Generator().manual_seed(0))
    weight[0, 129, 199] = 1e6  # a large weight spoils its own block alone
    rounded = as_fp8(weight)
    part = weight[:, :128, :128]
    largest = part.abs().amax(dim=(1, 2), keepdim=True)
    # Three bits of mantissa; below the smallest normal number, 2^-6 of 448 at the largest, steps of 2^-9.
    bound = torch.maximum(part.abs() / 16, largest / 448 * 2**-10)
    assert ((rounded[:, :128, :128] - part).abs() <= bound * 1.001).all()
    assert rounded[0, 129, 199] == pytest.approx(1e6) and rounded[0, 128, 150] == 0
    assert not torch.equal(rounded, weight) and torch.equal(as_fp8(rounded), rounded)
