"""The profiling study: numbers by hand and against scipy, the page and pictures, the command, the paper's claims."""

import copy
import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from published import ABSENT, DATA
from scipy import stats as scipy_stats
from tiny import tiny_model
from tiny_tokenizer import byte_tokenizer
from typer.testing import CliRunner
from zoo import zoo_model

from hotlora.base.errors import DataError, FileError, HotLoraError, PlanError
from hotlora.cli.profile import profile as profile_command
from hotlora.report import study_models
from hotlora.report.published import DATASETS, MODELS, OLMOE_SPIDER
from hotlora.report.study_claims import claims, claims_across
from hotlora.report.study_figures import by_layer, coverage_curves, layer_overlap
from hotlora.report.study_report import page, write_page, write_study
from hotlora.routing.plan import select_experts
from hotlora.routing.profile import RoutingProfile, jaccard
from hotlora.routing.study import (
    clusters,
    experts_for,
    hot_mask,
    load_study,
    overlap,
    shuffled_cv,
    stability,
    study,
    thirds,
)
from hotlora.runs.study import names_of, run_study, shared_experts
from hotlora.tasks import TASKS

E, L = 8, 4


def a_profile(seed=0, counts=None, layers=L, experts=E, **source):
    """A profile of `layers` x `experts`; mass ranks experts nearly as counts do."""
    random = np.random.default_rng(seed)
    if counts is None:
        counts = torch.from_numpy(random.integers(1, 1000, (layers, experts)))
    mass = counts.double() * torch.from_numpy(random.uniform(0.2, 0.4, tuple(counts.shape)))
    origin = {"model": "m", "fingerprint": "f", **source}
    return RoutingProfile(tuple(range(len(counts))), counts, mass, 100, 2, origin)


# --- numbers ---


def test_hot_sets_are_the_plans_with_ties_too():
    counts = torch.tensor([[3, 5, 5, 5, 0, 0, 5, 1], [0, 0, 0, 0, 0, 0, 0, 0]])
    profile = a_profile(counts=counts)
    for kept in (1, 2, 3, 5, 8):
        mask = hot_mask(profile.counts, kept)
        plan = select_experts(profile, experts_per_layer=kept)
        assert [row.nonzero()[:, 0].tolist() for row in mask] == [list(plan.experts[i]) for i in range(2)]
    several = torch.stack([counts, counts.flip(1)])
    assert torch.equal(hot_mask(several, 2)[1], hot_mask(counts.flip(1), 2))


def test_experts_for_a_share():
    counts = torch.tensor([[60, 40, 0, 0], [30, 30, 30, 10], [25, 25, 25, 25], [0, 0, 0, 0]])
    assert experts_for(a_profile(counts=counts)).tolist()[:3] == [1, 2, 3]
    assert experts_for(a_profile(counts=counts))[3].isnan()
    assert experts_for(a_profile(counts=torch.tensor([[7, 93]])), 0.93).tolist() == [1]
    assert experts_for(a_profile(counts=torch.tensor([[93, 7]])), 1.0).tolist() == [2]


def test_thirds_name_every_layer_once():
    assert thirds(6) == {"early": [0, 1], "middle": [2, 3], "late": [4, 5]}
    assert {name: len(rows) for name, rows in thirds(16).items()} == {"early": 6, "middle": 5, "late": 5}
    assert thirds(2) == {"early": [0], "middle": [1]}


def test_metrics_of_a_data_set_are_the_profiles():
    profile = a_profile(layers=6)
    found = study({"a": profile}, shared=3)["datasets"]["a"]
    assert found["layer_cv"] == pytest.approx(profile.mean_layer_cv())
    assert found["ratio"] == pytest.approx(profile.mean_layer_cv() / profile.global_cv())
    coverage = profile.coverage(fraction=0.25)
    assert found["by_layer"]["coverage"] == coverage.tolist()
    assert found["coverage_with_shared"] == pytest.approx((3 + 2 * coverage.mean().item()) / 5)
    assert found["by_depth"]["late"]["entropy"] == pytest.approx(profile.entropy()[4:].mean().item())
    assert study({"a": profile})["datasets"]["a"]["coverage_with_shared"] == pytest.approx(coverage.mean().item())


def test_means_are_over_data_sets_and_the_ratio_is_of_means():
    one, other = a_profile(1), a_profile(2)
    mean = study({"a": one, "b": other})["mean"]
    layer, over_all = ([f(p) for p in (one, other)] for f in (RoutingProfile.mean_layer_cv, RoutingProfile.global_cv))
    assert mean["layer_cv"] == pytest.approx(sum(layer) / 2)
    assert mean["ratio"] == pytest.approx(sum(layer) / sum(over_all))
    assert "stability" not in mean


def test_count_against_mass():
    profile = a_profile(3)
    found = study({"a": profile})["datasets"]["a"]["signals"]
    plans = [select_experts(profile, fraction=0.25, signal=signal) for signal in ("count", "mass")]
    assert found["jaccard"] == pytest.approx(jaccard(*plans))
    expected = [scipy_stats.spearmanr(c, m).statistic for c, m in zip(profile.counts, profile.mass, strict=True)]
    np.testing.assert_allclose(found["by_layer"]["spearman"], expected)
    assert found["spearman"] == pytest.approx(np.mean(expected))


def test_a_layer_without_counts_is_left_out_of_means(tmp_path):
    counts = torch.tensor([[0] * E, [9, 5, 1, 1, 1, 1, 1, 1], [4, 4, 4, 4, 1, 1, 1, 1]])
    profile = a_profile(counts=counts)
    result = study({"a": profile})
    found = result["datasets"]["a"]
    assert found["layer_cv"] == pytest.approx(profile.layer_cv()[1:].mean().item())
    assert math.isnan(found["by_layer"]["cv"][0]) and math.isnan(found["signals"]["by_layer"]["spearman"][0])
    write_study(result, {"a": profile}, tmp_path, "hotlora")
    assert load_study(tmp_path / "study.json")["datasets"]["a"]["by_layer"]["cv"][0] is None


def test_stability_against_a_plain_loop():
    random = np.random.default_rng(0)
    examples = torch.from_numpy(random.poisson(random.gamma(1.0, 4.0, (1, L, E)), (40, L, E))).int()
    found = stability(examples, 2, seed=5)
    assert (found["examples"], found["subsample"], found["draws"]) == (40, 4, 50)
    again, scores = np.random.default_rng(5), []
    hot = {layer: set(np.argsort(-examples.numpy().sum(0)[layer], kind="stable")[:2].tolist()) for layer in range(L)}
    for _ in range(50):
        some = examples.numpy()[np.sort(again.choice(40, 4, replace=False))].sum(0)
        ours = {layer: set(np.argsort(-some[layer], kind="stable")[:2].tolist()) for layer in range(L)}
        scores.append(jaccard(hot, ours))
    assert found["mean"] == pytest.approx(np.mean(scores)) and 0.2 < found["mean"] < 1
    assert (found["min"], found["max"]) == pytest.approx((min(scores), max(scores)))
    assert np.mean(found["by_layer"]) == pytest.approx(found["mean"])
    assert stability(examples, 2, seed=6)["mean"] != found["mean"]


def test_stability_of_examples_that_are_alike_is_one():
    examples = torch.arange(L * E, dtype=torch.int32).view(1, L, E).repeat(30, 1, 1)
    found = stability(examples, 3)
    assert (found["mean"], found["min"], found["max"], found["subsample"]) == (1, 1, 1, 3)
    assert stability(examples[:4], 3)["subsample"] == 1
    with pytest.raises(DataError, match="1 examples have no subsample"):
        stability(examples[:1], 3)


def test_stability_of_a_few_parts_takes_each_once():
    random = np.random.default_rng(0)
    parts = torch.from_numpy(random.poisson(random.gamma(1.0, 40.0, (8, L, E)))).int()
    found, whole = stability(parts, 2), hot_mask(parts.sum(0), 2)
    each = [((hot_mask(part, 2) & whole).sum(1) / (hot_mask(part, 2) | whole).sum(1)).mean().item() for part in parts]
    assert (found["subsample"], found["draws"]) == (1, 8)
    assert (found["mean"], found["min"], found["max"]) == pytest.approx((np.mean(each), min(each), max(each)))


def test_the_global_cv_of_shuffled_experts():
    counts = torch.from_numpy(np.random.default_rng(0).integers(1, 1000, (16, 64)))
    found = shuffled_cv(counts)
    # By hand: the mean square over all ways to renumber two experts in each of two layers.
    two = shuffled_cv(torch.tensor([[6, 2], [5, 3]]))
    sums = [np.array([6, 2]) + row for row in ([5, 3], [3, 5])]
    assert two["global_cv"] == pytest.approx(np.sqrt(np.mean([s.var() for s in sums])) / 8)
    # Independent layers: near the root of their number, and the real one is like any other.
    assert found["ratio"] == pytest.approx(4, rel=0.02) and 0.05 < found["below"] < 0.95
    even = torch.cat([counts, 1001 - counts])  # each expert's sum over layers is the same
    assert shuffled_cv(even)["below"] == 0.0
    same = counts[:1].repeat(16, 1)
    assert shuffled_cv(same)["below"] == 1.0
    assert math.isnan(shuffled_cv(torch.zeros(2, 4, dtype=torch.int64))["ratio"])


def test_every_data_set_is_in_the_legends(tmp_path):
    """One whose name begins with an underscore, too."""
    profiles = {name: a_profile(seed=seed) for seed, name in enumerate(("_mine", "yours"))}
    by_name = {name: {"layer_cv": 1.0, "by_layer": {"cv": [1.0] * L, "coverage": [0.5] * L}} for name in profiles}
    found = {"model": {"layers": list(range(L))}, "datasets": by_name}
    for figure in (coverage_curves(profiles, 2), by_layer(found)):
        legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
        texts = [text.get_text() for legend in legends for text in legend.get_texts()]
        assert any("_mine" in text for text in texts) and any("yours" in text for text in texts)


def test_overlap_of_two_profiles_by_hand():
    a = a_profile(counts=torch.tensor([[9, 8, 1, 1], [5, 4, 3, 2]]))
    b = a_profile(counts=torch.tensor([[1, 8, 9, 1], [50, 40, 3, 2]]))
    assert overlap(a, b, experts_per_layer=2).tolist() == [pytest.approx(1 / 3), 1.0]
    assert overlap(a, b).tolist() == [0.0, 1.0]  # 25%: one expert
    with pytest.raises(PlanError, match=r"2 layers of 4 experts and 4 of 8"):
        overlap(a, a_profile())
    figure = layer_overlap({"a ~ b": overlap(a, b), "a ~ a": overlap(a, a)}, a.layers)
    assert [len(axes.patches) for axes in figure.axes] == [2, 2]
    assert figure.axes[1].get_title(loc="left") == "a ~ a: mean 1.00"


def test_overlap_matrix_and_clusters():
    base = torch.arange(L * E).view(L, E) * 10
    profiles = {
        "text": a_profile(counts=base.flip(1) + 1),
        "code": a_profile(counts=base + 1),
        "math": a_profile(7),
        "sql": a_profile(counts=base + 2),
    }
    found = study(profiles)["overlap"]
    plans = {name: select_experts(profile, fraction=0.25) for name, profile in profiles.items()}
    for i, a in enumerate(profiles):
        for j, b in enumerate(profiles):
            assert found["jaccard"][i][j] == pytest.approx(jaccard(plans[a], plans[b]))
            assert found["by_layer"][i][j] == overlap(profiles[a], profiles[b]).tolist()
    assert clusters(found)[0] == {"code", "sql"} and clusters(found)[-1] == set(profiles)
    assert sorted(found["order"]) == [0, 1, 2, 3]
    places = [found["order"].index(i) for i in (1, 3)]
    assert abs(places[0] - places[1]) == 1
    assert study({"a": a_profile()})["overlap"]["order"] == [0] and clusters(study({"a": a_profile()})["overlap"]) == []


def test_profiles_of_two_models_are_refused():
    with pytest.raises(DataError, match=r"a was profiled on 4 layers of 8 .* \(f\), b on 3 layers of 8"):
        study({"a": a_profile(), "b": a_profile(layers=3)})
    with pytest.raises(DataError, match=r"\(f\), b on .* \(g\)"):
        study({"a": a_profile(), "b": a_profile(fingerprint="g")})
    with pytest.raises(DataError, match="no profile to study"):
        study({})
    with pytest.raises(DataError, match="examples of b, but profiles of a"):
        study({"a": a_profile()}, {"b": torch.zeros(3, L, E)})


# --- the paper ---


def test_published_numbers_agree_with_each_other():
    for model in MODELS.values():
        assert model["layer_cv"] / model["global_cv"] == pytest.approx(model["ratio"], abs=0.06)
        shared, top_k = model["shared"], model["num_experts_per_tok"]
        assert shared + top_k == 8  # section 3.1: all activate eight
        with_shared = (shared + top_k * model["coverage"]) / (shared + top_k)
        assert with_shared == pytest.approx(model["coverage_with_shared"], abs=0.006)
        assert 1.9 < model["peak_cv"] / model["first_cv"] < 2.3
    olmoe = MODELS["OLMoE-1B-7B"]
    by_layer = [OLMOE_SPIDER["cv"][olmoe[f"{which}_layer"]] for which in ("first", "peak")]
    assert [olmoe["first_cv"], olmoe["peak_cv"]] == by_layer
    assert {len(column) for column in OLMOE_SPIDER.values()} == {MODELS["OLMoE-1B-7B"]["layers"]}
    assert set(DATASETS) <= set(TASKS)


@pytest.mark.parametrize(("folder", "model"), [("olmoe", "OLMoE-1B-7B"), ("qwen", "Qwen1.5-MoE-A2.7B")])
def test_the_published_cv_is_as_ours_by_ddof_0(folder, model):
    """From the counts that the paper's author released."""
    file = DATA / "routing" / "moe_sieve" / folder / "spider.json"
    if not file.is_file():
        pytest.skip(f"{file.name} is {ABSENT}")
    counts = np.array(json.loads(file.read_text(encoding="utf-8"))["counts"], dtype=float)
    cv, told = counts.std(1) / counts.mean(1), MODELS[model]
    for which in ("first", "peak"):
        assert cv[told[f"{which}_layer"]] == pytest.approx(told[f"{which}_cv"], abs=0.005)
    assert cv.argmax() == told["peak_layer"]


def papers_world(profiles=False, **changes):
    """A study of the ten data sets in which every claim holds."""
    random = np.random.default_rng(0)
    depth = 24  # enough layers of their own to even out the sum over them
    skew = torch.cat([torch.linspace(0.8, 1.6, depth // 3), torch.full((depth - depth // 3,), 1.7)])
    domains = {
        "spider": 0, "codealpaca": 0, "mbpp": 0, "gsm8k": 1, "arc_challenge": 2, "mmlu": 2, "boolq": 3,
        "piqa": 4, "hellaswag": 4, "wikitext2": 3,
    }  # fmt: skip
    made, examples = {}, {}
    for name, domain in (domains | changes).items():
        ranks = torch.stack(
            [torch.from_numpy(np.random.default_rng([domain, layer // 8]).permutation(32)) for layer in range(depth)]
        )
        ranks = (ranks + 4 * torch.arange(depth)[:, None]) % 32  # in eight layers each expert leads once, or nearly
        power = skew[:, None] * (1.3 if domain == 0 else 1.0)
        weights = (ranks + 1.0) ** -power
        counts = (weights / weights.sum(dim=1, keepdim=True) * 1e6).long() + torch.from_numpy(
            random.integers(0, 3, (depth, 32))
        )
        made[name] = RoutingProfile(tuple(range(depth)), counts, counts.double() / 4, 1000, 4, {"model": "m"})
        examples[name] = (counts[None] // 40).int().repeat(40, 1, 1)
    return made if profiles else study(made, examples)


def test_claims_hold_where_they_should_and_fail_where_they_should():
    held = {claim.says: claim for claim in claims(papers_world())}
    assert all(claim.holds is not False for claim in held.values()), [c for c in held.values() if c.holds is False]
    assert sum(claim.holds is True for claim in held.values()) >= 10 and all(c.here for c in held.values() if c.holds)
    # Code spread over domains: the claims on code fail, those on skew stay.
    other = {claim.says: claim.holds for claim in claims(papers_world(mbpp=3, spider=4, wikitext2=0))}
    fallen = {says for says, holds in other.items() if holds is False}
    assert fallen >= {
        "Code has the lowest entropy over experts, broad text a higher one.",
        "Hot experts overlap within a domain, and little across domains.",
        "Code data sets cluster together.",
    }
    assert other["A quarter of the experts takes far more than a quarter of the routing."]


def test_claims_on_other_texts_name_theirs():
    """GLM-5.2's ten kinds of text, in the places of the paper's."""
    places = {
        "code_raw": "mbpp", "code_instruct": "codealpaca", "math": "arc_challenge", "reasoning": "mmlu",
        "news": "piqa", "web": "hellaswag", "wiki": "wikitext2",
    }  # fmt: skip
    paper = papers_world(profiles=True)
    by_says = {claim.says: claim for claim in claims(study({name: paper[place] for name, place in places.items()}))}
    assert by_says["Code has the lowest entropy over experts, broad text a higher one."].holds
    assert by_says["Code data sets cluster together."].holds
    assert "news ~ web" in by_says["Hot experts overlap within a domain, and little across domains."].here
    assert by_says["Spider is among the most concentrated data sets."].holds is None
    assert "code_" in by_says["From the first layer to the peak, the CV on Spider doubles."].here


def test_claims_that_compare_models():
    one, other = papers_world(), papers_world()
    shared = {**other, "model": {**other["model"], "shared": 4}, "mean": {**other["mean"], "cold_share": 0.01}}
    by_says = {claim.says: claim for claim in claims_across({"one": one, "other": shared})}
    absorbed = by_says["Shared experts absorb what would leave routed ones cold."]
    assert absorbed.holds and absorbed.here.startswith("0% shared: ") and "50% shared: 1.0% cold" in absorbed.here
    diffuse = "Diffuse tasks need nearly the same number of routed experts on all architectures."
    assert by_says[diffuse].holds
    apart = copy.deepcopy(shared)
    for row in apart["datasets"].values():
        row["experts_for_60"] *= 1.2
    found = {claim.says: claim for claim in claims_across({"one": one, "other": apart})}
    assert not found[diffuse].holds
    for result in (one, apart):
        for row in result["datasets"].values():
            row["experts_for_60_with_shared"] = 7.0
    assert {claim.says: claim for claim in claims_across({"one": one, "other": apart})}[diffuse].holds
    assert all(claim.holds is None for claim in claims_across({"one": one}))
    twice = {claim.says: claim.holds for claim in claims_across({"one": one, "two": other})}
    assert twice["Shared experts absorb what would leave routed ones cold."] is None


def test_tables_of_several_models():
    studies = {"A": papers_world(), "B": study({"a": a_profile(1), "b": a_profile(2)})}
    assert "| **B** | 4 × 8, 2 + 0 |" in study_models.skew(studies)
    assert study_models.datasets(studies).count("\n") == 1 + 10 + 2
    robust = study_models.robust(studies)
    assert "| A | spider | 4 of 40 | 1.000 | 1.00–1.00 |" in robust and "| B | a | – | – | – |" in robust
    assert "| B | layer CV |" in study_models.depth(studies)
    nearest = next(line for line in study_models.overlaps(studies).splitlines() if line.startswith("| A |"))
    assert "codealpaca" in nearest.split("|")[4] and study_models.chance(studies["B"]) == pytest.approx(2 / 14)
    decided = study_models.decided(studies, studies)
    assert "| A | B |" in decided and "agrees: " in decided and "| – |" in decided


def test_claims_on_uniform_routing_fail_or_are_not_tested():
    profile = a_profile(counts=torch.full((6, E), 100))
    by_says = {claim.says: claim.holds for claim in claims(study({"a": profile, "b": profile}))}
    assert True not in by_says.values() or by_says == {}
    assert None in by_says.values() and False in by_says.values()


# --- files, page, command ---


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("qwen2_moe", vocab_size=259, max_position_embeddings=512).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def files(tmp_path):
    found = []
    for name, text in (("sums", "{i} + {i} ="), ("names", "Ada number {i} is"), ("letters", "abc" * 7)):
        file = tmp_path / f"{name}.jsonl"
        rows = [{"prompt": text.format(i=i), "completion": f" {2 * i}"} for i in range(20)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found.append(str(file))
    return found


def test_a_run_of_the_study_from_data_and_from_profiles(model_folder, files, tmp_path):
    told = []
    result, profiles = run_study(files, str(model_folder), limit=15, tell=told.append)
    assert list(profiles) == ["sums", "names", "letters"] and len(told) == 3
    assert [row["examples"] for row in result["datasets"].values()] == [15] * 3
    assert all(row["stability"]["examples"] == 15 for row in result["datasets"].values())
    # tiny qwen2_moe: a shared expert of width 24, experts of width 16
    assert result["model"]["shared"] == 1.5 == shared_experts(tiny_model("qwen2_moe"))
    assert shared_experts(tiny_model("olmoe")) == 0
    write_study(result, profiles, tmp_path / "out", "hotlora profile")
    saved = [str(tmp_path / "out" / "profiles" / f"{name}.safetensors") for name in profiles]
    again, _ = run_study(saved)
    assert again["overlap"] == result["overlap"] and again["model"] == result["model"]
    assert "stability" not in again["datasets"]["sums"] and again["datasets"]["sums"]["layer_cv"] > 0
    with pytest.raises(DataError, match=r"sums\.jsonl is no profile made before, so a model is needed"):
        run_study([*saved[1:], files[0]])


def test_the_page_is_made_again_from_files_alone(tmp_path):
    profiles = {name: a_profile(seed, examples=30) for seed, name in enumerate(("spider", "gsm8k", "text"))}
    examples = {name: torch.stack([p.counts.int() for _ in range(30)]) for name, p in profiles.items()}
    write_study(study(profiles, examples), profiles, tmp_path / "s", "hotlora profile a b c --compare")
    names = {"study.json", "study.md", "profiles", "heat-maps.png", "coverage.png", "by-layer.png"}
    assert {path.name for path in (tmp_path / "s").iterdir()} == names | {
        "overlap.png",
        "overlap-by-layer.png",
        "robustness.png",
    }
    before = {path: path.read_bytes() for path in (tmp_path / "s").rglob("*.*") if path.is_file()}
    assert write_page(tmp_path / "s") == tmp_path / "s" / "study.md"
    assert before == {path: path.read_bytes() for path in before}
    text = (tmp_path / "s" / "study.md").read_text()
    for said in ("    hotlora profile a b c --compare", "| OLMoE-1B-7B | 0.216 | 0.869 |", "| 3 of 30 |", "not tested"):
        assert said in text
    for link in ("heat-maps", "coverage", "by-layer", "overlap", "robustness"):
        assert f"({link}.png)" in text and f"(../x/{link}.png)" in page(
            load_study(tmp_path / "s/study.json"), pictures_in="../x"
        )


def test_two_data_sets_get_the_overlap_by_layer_and_one_gets_none(tmp_path):
    profiles = {"base": a_profile(1), "warm": a_profile(2)}
    write_study(study(profiles), profiles, tmp_path / "two", "hotlora")
    text = (tmp_path / "two" / "study.md").read_text()
    assert "(overlap-by-layer.png)" in text and (tmp_path / "two" / "overlap-by-layer.png").is_file()
    assert not (tmp_path / "two" / "overlap.png").exists() and "(overlap.png)" not in text
    write_study(study({"a": a_profile()}), {"a": a_profile()}, tmp_path / "one", "hotlora")
    assert "## Overlap" not in (tmp_path / "one" / "study.md").read_text()
    assert not (tmp_path / "one" / "overlap.png").exists()


def test_a_foreign_file_is_no_study(tmp_path):
    (tmp_path / "study.json").write_text('{"format": "other"}')
    with pytest.raises(FileError, match=r"is no study of version 1 .* `hotlora profile --compare`"):
        load_study(tmp_path / "study.json")
    with pytest.raises(FileError, match="does not exist"):
        write_page(tmp_path / "none")


def test_names_of_sources(tmp_path):
    a_profile().save(tmp_path / "warm")
    a_profile().save(tmp_path / "base.safetensors")
    sources = [
        "gsm8k:/data/gsm8k",
        "my/rows.jsonl",
        "openai/math:main",
        f"{tmp_path}/warm",
        f"{tmp_path}/base.safetensors",
    ]
    assert names_of(sources) == ["gsm8k", "rows", "math", "warm", "base"]
    assert names_of([f"{tmp_path}/warm/profile.safetensors"]) == ["warm"]
    with pytest.raises(DataError, match=r"a/x\.jsonl and b/x\.jsonl have the same name, x"):
        names_of(["a/x.jsonl", "b/x.jsonl"])


def test_the_command(model_folder, files, tmp_path, monkeypatch):
    app, runner = typer.Typer(), CliRunner()
    app.command()(profile_command)
    one = ["--model", str(model_folder), "--data", files[0], "-o", str(tmp_path / "p.safetensors")]
    result = runner.invoke(app, one)
    assert result.exit_code == 0, result.output
    assert "coverage of the top 25%" in result.output
    assert RoutingProfile.load(tmp_path / "p.safetensors").source["examples"] == 20
    out = tmp_path / "study"
    words = [*files[:2], "--data", files[2], "--compare", "-m", str(model_folder), "--limit", "10", "-o", str(out)]
    monkeypatch.setattr("sys.argv", ["hotlora", "profile", *words])
    result = runner.invoke(app, words)
    assert result.exit_code == 0, result.output
    found = load_study(out / "study.json")
    assert list(found["datasets"]) == ["sums", "names", "letters"] and "page:" in result.output
    assert found["command"].startswith("hotlora profile") and "--compare" in found["command"]
    for more in (["--profile-until", "0.9"], ["--saliency"]):
        result = runner.invoke(app, [*words, *more])
        assert isinstance(result.exception, HotLoraError) and "--compare reads all of the data" in str(result.exception)
    assert runner.invoke(app, [*one, "--saliency", "--profile-until", "1"]).exit_code == 0
    made = RoutingProfile.load(tmp_path / "p.safetensors")
    assert made.saliency is not None and "until" not in made.source
    for wrong, says in (([], "give a data set"), ([files[0]], "give the model")):
        result = runner.invoke(app, wrong)
        assert result.exit_code == 2 and says in result.output
    result = runner.invoke(app, [*files, "-m", str(model_folder)])
    assert isinstance(result.exception, DataError) and "add --compare" in str(result.exception)


def test_the_committed_page_is_what_its_numbers_say(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")
    script = importlib.import_module("study")
    assert script.PAGE.read_text(encoding="utf-8") == script.page()
    result = load_study(script.RESULTS / "study.json")
    profiles = {
        name: RoutingProfile.load(script.RESULTS / "profiles" / f"{name}.safetensors") for name in result["datasets"]
    }
    assert set(profiles) == set(DATASETS)
    for name, profile in profiles.items():
        assert profile.hash == result["datasets"][name]["profile_hash"]
        assert profile.mean_layer_cv() == pytest.approx(result["datasets"][name]["layer_cv"])


@pytest.mark.parametrize(("family", "expected"), [("nemotron_h", 1.0), ("deepseek_v3", 1.0), ("qwen3_moe", 0.0)])
def test_shared_experts_are_counted_in_experts_of_their_own_form(family, expected):
    """nemotron_h's experts have no gate, and neither has its shared one."""
    assert shared_experts(zoo_model(family)) == expected
