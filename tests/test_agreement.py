"""Count against mass and saliency: by hand, and said by the commands where they disagree."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from published import ABSENT, DATA

from hotlora.cli import main as cli
from hotlora.routing.agreement import AGREE, agreements, disagreements
from hotlora.routing.profile import RoutingProfile

COUNTS = torch.tensor([[8, 7, 3, 2, 2, 1, 1, 0], [9, 8, 2, 1, 1, 1, 1, 1]])


def make(mass, saliency=None):
    return RoutingProfile((0, 1), COUNTS, torch.tensor(mass).double(), 12, 2, saliency=saliency)


def test_by_hand():
    """The hot two of eight: in layer 0 one of them is another by mass, in layer 1 both are the same."""
    profile = make([[4, 1, 3, 0, 0, 0, 0, 0], [5, 3, 0, 0, 0, 0, 0, 0]])
    (found,) = agreements(profile)
    assert (found.signal, found.jaccard) == ("mass", pytest.approx((1 / 3 + 1) / 2))
    assert found.by_count == pytest.approx((5 / 8 + 1) / 2) and found.by_signal == pytest.approx((7 / 8 + 1) / 2)
    assert disagreements(profile) == [found]
    told = str(found)
    assert "overlap 0.67" in told and "Those by count have 81.2%" in told and "those by mass 93.8%" in told
    assert "a plan by --signal mass adapts experts that weigh more there" in told
    assert "near the edge of the budget, so that either will do" in str(replace(found, by_count=0.9))
    assert found.matters and not replace(found, by_count=0.9).matters, "a training tells of the first alone"
    assert "ranks experts high that few tokens are sent to" in str(replace(found, signal="saliency", by_count=0.95))
    assert not disagreements(make(COUNTS.tolist()))


def test_saliency_ranks_by_the_mean_and_is_weighed_by_the_sum():
    sums = torch.tensor([[8.0, 7, 3, 2, 2, 1, 1, 0], [9, 0, 0, 0, 0, 0, 0, 6]])
    mass, saliency = agreements(make(COUNTS.tolist(), sums))
    # layer 0: means are all 1, the first two of them as by count; layer 1: 1 and 6 are the highest means
    assert mass.jaccard == 1 and saliency.signal == "saliency"
    assert saliency.jaccard == pytest.approx((1 + 1 / 3) / 2)
    assert saliency.by_count == pytest.approx((15 / 24 + 9 / 15) / 2)
    assert saliency.by_signal == pytest.approx((15 / 24 + 15 / 15) / 2)


def test_a_profile_of_counts_alone_disagrees_with_nothing():
    assert not agreements(make([[0] * 8] * 2))


def test_a_layer_without_mass_is_left_out():
    (found,) = agreements(make([[0] * 8, [5, 3, 0, 0, 0, 0, 0, 0]]))
    assert found.by_count == found.by_signal == 1


def test_the_published_models_are_on_both_sides_of_the_threshold():
    """Where the data are: docs/method.md's numbers."""
    folder = DATA / "routing"
    if not folder.is_dir():
        pytest.skip(f"{folder} is {ABSENT}")
    for model, agree in (("moe_sieve/olmoe", True), ("moe_sieve/qwen", True), ("glm_5_2", False)):
        for file in sorted((folder / model).glob("*.json")):
            data = json.loads(file.read_text("utf-8"))
            counts, mass = torch.tensor(data["counts"]), torch.tensor(data["mass"])
            profile = RoutingProfile(tuple(range(len(counts))), counts, mass, 1, 8)
            assert (agreements(profile)[0].jaccard >= AGREE) is agree, file


def test_the_table_in_the_docs():
    folder = DATA / "routing"
    if not folder.is_dir():
        pytest.skip(f"{folder} is {ABSENT}")
    page = (Path(__file__).parents[1] / "docs" / "method.md").read_text("utf-8")
    shown = re.findall(
        r"^\| (OLMoE|Qwen1.5-MoE|GLM-5.2), .* \| (mass|saliency) \| (.*) \| (.*)% \| (.*)% \|$", page, re.M
    )
    assert len(shown) == 4
    where = {"OLMoE": "moe_sieve/olmoe", "Qwen1.5-MoE": "moe_sieve/qwen", "GLM-5.2": "glm_5_2"}
    for model, signal, *cells in shown:
        rows = []
        for file in (folder / where[model]).glob("*.json"):
            data = json.loads(file.read_text("utf-8"))
            counts = torch.tensor(data["counts"])
            sums = torch.tensor(data["reap"]).double() if signal == "saliency" else None
            mass = torch.tensor(data["mass"])
            profile = RoutingProfile(tuple(range(len(counts))), counts, mass, 1, 8, saliency=sums)
            found = agreements(profile)[-1]
            rows.append((found.jaccard, 100 * found.by_count, 100 * found.by_signal))
        ends = [(min(column), max(column)) for column in zip(*rows, strict=True)]
        forms = (".2f", ".1f", ".1f")
        assert cells == [f"{low:{form}}–{high:{form}}" for (low, high), form in zip(ends, forms, strict=True)]


@pytest.mark.parametrize("given", [(), ("--signal", "mass"), ("--rule", "random")])
def test_a_plan_by_the_default_says_so(tmp_path, given, monkeypatch, capsys):
    profile = make([[4, 1, 3, 0, 0, 0, 0, 0], [5, 3, 0, 0, 0, 0, 0, 0]])
    profile.save(tmp_path / "p.safetensors")
    monkeypatch.setattr(sys, "argv", ["hotlora", "plan", str(tmp_path / "p.safetensors"), *given])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main()
    said = capsys.readouterr().err
    assert ("count and mass choose other experts" in said) is (not given), said
