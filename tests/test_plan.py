"""Rules on counts worked by hand, and the plan's file."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hotlora.errors import FileError, HotLoraError, PlanError
from hotlora.plan import RULES, ExpertPlan, select_experts
from hotlora.routing import RoutingProfile


def make_profile(counts, mass=None, layers=None, **source):
    counts = torch.tensor(counts)
    mass = counts.double() / 2 if mass is None else torch.tensor(mass, dtype=torch.float64)
    layers = tuple(range(len(counts))) if layers is None else layers
    tokens = int(counts[0].sum()) // 2
    return RoutingProfile(layers, counts, mass, num_tokens=tokens, num_experts_per_tok=2, source=source)


# Layer 1 has ties at 5 and at 0.
COUNTS = [[1, 9, 3, 7, 0, 2, 4, 6], [5, 0, 5, 5, 0, 7, 5, 5]]


@pytest.mark.parametrize(
    ("rule", "kept", "expected"),
    [
        ("hot", 2, {0: (1, 3), 1: (0, 5)}),
        ("hot", 3, {0: (1, 3, 7), 1: (0, 2, 5)}),
        ("cold", 2, {0: (0, 4), 1: (1, 4)}),
        ("cold", 3, {0: (0, 4, 5), 1: (0, 1, 4)}),
        ("hot", 8, {0: tuple(range(8)), 1: tuple(range(8))}),
    ],
)
def test_rules_by_hand_ties_go_to_the_lower_index(rule, kept, expected):
    plan = select_experts(make_profile(COUNTS), rule=rule, experts_per_layer=kept)
    assert plan.experts == expected
    assert plan.params == {"experts_per_layer": kept, "signal": "count"}


def test_all_keeps_every_expert_and_needs_no_budget():
    plan = select_experts(make_profile(COUNTS), rule="all")
    assert plan.experts == {0: tuple(range(8)), 1: tuple(range(8))}
    assert plan.params == {}
    assert select_experts(make_profile(COUNTS), rule="all", fraction=1.0) == plan
    with pytest.raises(PlanError, match="'all' keeps all 8 experts, but the budget asks for 2"):
        select_experts(make_profile(COUNTS), rule="all", fraction=0.25)


def test_mass_may_rank_otherwise_than_count():
    profile = make_profile([[4, 3, 2, 1]], mass=[[0.1, 0.2, 0.3, 0.4]])
    assert select_experts(profile, experts_per_layer=1).experts == {0: (0,)}
    assert select_experts(profile, experts_per_layer=1, signal="mass").experts == {0: (3,)}


@pytest.mark.parametrize(
    ("num_experts", "fraction", "kept"),
    [(64, 0.25, 16), (60, 0.25, 15), (8, None, 2), (8, 0.01, 1), (8, 1.0, 8), (10, 0.33, 3), (7, 0.5, 4)],
)
def test_fraction_is_rounded_and_at_least_one(num_experts, fraction, kept):
    profile = make_profile([list(range(num_experts))])
    plan = select_experts(profile, fraction=fraction)
    assert len(plan.experts[0]) == kept == plan.params["experts_per_layer"]
    assert plan.params["fraction"] == (fraction or 0.25)


def test_random_is_seeded_nested_and_leaves_the_global_generator_alone():
    profile = make_profile([list(range(64))] * 4)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    plans = [select_experts(profile, rule="random", experts_per_layer=8, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(before, torch.get_rng_state())
    assert plans[0] == plans[1] != plans[2]
    assert plans[0].params == {"experts_per_layer": 8, "seed": 0}
    assert len(set(plans[0].experts.values())) == 4  # layers draw apart
    larger = select_experts(profile, rule="random", experts_per_layer=16, seed=0)
    assert all(set(plans[0].experts[layer]) < set(larger.experts[layer]) for layer in range(4))


def test_plan_remembers_where_it_came_from():
    profile = make_profile(COUNTS, layers=(1, 4), fingerprint="olmoe-3f2a91c0b4d7")
    plan = select_experts(profile)
    assert list(plan.experts) == [1, 4]
    assert plan.profile_hash == profile.hash and plan.fingerprint == "olmoe-3f2a91c0b4d7"
    assert plan.num_experts == 8 and plan.rule == "hot"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"fraction": 0}, r"fraction is 0: it must be above 0 and at most 1"),
        ({"fraction": 1.5}, r"fraction is 1\.5"),
        ({"fraction": float("nan")}, "fraction is nan"),
        ({"experts_per_layer": 0}, "experts_per_layer is 0: it must be an integer from 1 to 8"),
        ({"experts_per_layer": 9}, "experts_per_layer is 9"),
        ({"experts_per_layer": 2.5}, r"experts_per_layer is 2\.5"),
        ({"experts_per_layer": 2, "fraction": 0.5}, "give exactly one"),
        ({"rule": "warm"}, "'warm' does not exist: choose one of hot, all, random, cold"),
        ({"signal": "norm"}, "'norm' does not exist: choose one of count, mass"),
    ],
)
def test_select_experts_refuses(arguments, says):
    with pytest.raises(PlanError, match=says):
        select_experts(make_profile(COUNTS), **arguments)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_rule_keeps_its_budget_and_hot_covers_most(data):
    num_experts = data.draw(st.integers(1, 12))
    rows = st.lists(st.integers(0, 5), min_size=num_experts, max_size=num_experts)
    counts = data.draw(st.lists(rows, min_size=1, max_size=4))
    kept = data.draw(st.integers(1, num_experts))
    profile = make_profile(counts)
    seen = {}
    for rule in RULES:
        plan = select_experts(profile, rule=rule, experts_per_layer=num_experts if rule == "all" else kept)
        for layer, ids in plan.experts.items():
            assert list(ids) == sorted(set(ids))
            assert len(ids) == (num_experts if rule == "all" else kept)
            seen[rule, layer] = sum(counts[layer][expert] for expert in ids)
    for layer in range(len(counts)):
        assert seen["cold", layer] <= seen["random", layer] <= seen["hot", layer] <= seen["all", layer]


def test_save_and_load(tmp_path):
    plan = ExpertPlan(
        experts={3: (0, 2), 1: ()},
        num_experts=4,
        rule="hot",
        params={"fraction": 0.5},
        fingerprint="f",
        ranks={1: (), 3: (8, 16)},
    )
    plan.save(tmp_path / "run")
    assert (tmp_path / "run" / "plan.json").is_file()
    for path in (tmp_path / "run", tmp_path / "run" / "plan.json", str(tmp_path / "run")):
        loaded = ExpertPlan.load(path)
        assert loaded == plan and loaded.hash == plan.hash and hash(loaded) == hash(plan)
    assert list(loaded.experts) == [1, 3]
    assert '"3": [0, 2]' in (tmp_path / "run" / "plan.json").read_text()  # readable: one line a layer


def test_hash_follows_the_content():
    plan = select_experts(make_profile(COUNTS))
    other = ExpertPlan(plan.experts | {0: (0, 1)}, 8, "hot", plan.params, plan.profile_hash)
    assert plan.hash != other.hash and len(plan.hash) == 64


def test_an_edit_by_hand_is_put_in_order_with_its_ranks(tmp_path):
    data = {"version": 1, "num_experts": 8, "experts": {"2": [7, 0, 3]}, "ranks": {"2": [70, 10, 30]}}
    (tmp_path / "plan.json").write_text(json.dumps(data))
    plan = ExpertPlan.load(tmp_path)
    assert plan.experts == {2: (0, 3, 7)} and plan.ranks == {2: (10, 30, 70)}
    assert plan.rule == "manual" and plan.params == {}


GOOD = {"version": 1, "num_experts": 8, "experts": {"0": [1, 2]}, "rule": "hot", "params": {}}


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"experts": {"0": [1, 1]}}, PlanError, r"layer 0: experts \[1\] are given twice"),
        ({"experts": {"0": [8]}}, PlanError, "layer 0: expert 8 does not exist; ids are 0 to 7"),
        ({"experts": {"0": [-1]}}, PlanError, "expert -1 does not exist"),
        ({"experts": {"0": [1.0]}}, PlanError, "list of integers"),
        ({"experts": {"0": [True]}}, PlanError, "list of integers"),
        ({"experts": {"0": 3}}, PlanError, "list of integers"),
        ({"experts": {"first": [1]}}, PlanError, "layer 'first'"),
        ({"experts": {"00": [1]}}, PlanError, "layer '00'"),
        ({"experts": {}}, PlanError, "names no layer"),
        ({"experts": [[1, 2]]}, PlanError, "must map each decoder layer"),
        ({"num_experts": 0}, PlanError, "num_experts is 0"),
        ({"ranks": {"0": [8]}}, PlanError, "1 ranks for 2 experts"),
        ({"ranks": {"0": [8, 0]}}, PlanError, "positive integers"),
        ({"ranks": {"1": [8, 8]}}, PlanError, "must name the same layers"),
        ({"rank": {"0": [8, 8]}}, PlanError, r"unknown keys \['rank'\]"),
        ({"params": [1]}, PlanError, "params"),
        ({"version": 2}, FileError, "plan version 2: this hotlora reads version 1"),
        ({"version": None}, FileError, "plan version None"),
    ],
)
def test_load_refuses_a_wrong_plan_and_names_the_file(tmp_path, change, kind, says):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(GOOD))
    ExpertPlan.load(path)
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(kind, match=says) as caught:
        ExpertPlan.load(path)
    assert str(path) in str(caught.value) and isinstance(caught.value, HotLoraError)


def test_load_refuses_a_missing_or_truncated_file(tmp_path):
    with pytest.raises(FileError, match="does not exist"):
        ExpertPlan.load(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps(GOOD)[:30])
    with pytest.raises(FileError, match="cut short"):
        ExpertPlan.load(tmp_path)
    with pytest.raises(PlanError, match=r"lacks \['experts'\]"):
        ExpertPlan.from_dict({"version": 1, "num_experts": 8})
