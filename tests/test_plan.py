"""Rules on counts worked by hand, and the plan's file."""

import itertools
import json
import random
import sys
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hotlora.base.errors import FileError, HotLoraError, PlanError
from hotlora.cli import main as cli
from hotlora.routing.plan import RULES, ExpertPlan, check_rule, select_experts
from hotlora.routing.profile import SIGNALS, RoutingProfile


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
        ("global", 2, {0: (3, 7), 1: (3, 7)}),  # sums 6 9 8 12 0 9 9 11
        ("global", 3, {0: (1, 3, 7), 1: (1, 3, 7)}),
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
    with pytest.raises(PlanError, match=r"'all' keeps all experts, but fraction 0\.25 asks for some: leave it out"):
        check_rule("all", "count", {"fraction": 0.25})
    with pytest.raises(PlanError, match="'all' keeps all 8 experts, but the budget asks for 2"):
        select_experts(make_profile(COUNTS), rule="all", experts_per_layer=2)


def test_mass_may_rank_otherwise_than_count():
    profile = make_profile([[4, 3, 2, 1]], mass=[[0.1, 0.2, 0.3, 0.4]])
    assert select_experts(profile, experts_per_layer=1).experts == {0: (0,)}
    assert select_experts(profile, experts_per_layer=1, signal="mass").experts == {0: (3,)}


def test_saliency_and_mass_per_token_rank_where_the_profile_holds_them():
    """Saliency is the mean over an expert's tokens: the third's 0.9 of one token is above the first's 0.4 of four."""
    profile = make_profile([[4, 3, 1, 0]], mass=[[0.1, 0.2, 0.3, 0.0]])
    held = replace(profile, saliency=torch.tensor([[1.6, 2.4, 0.9, 0.0]]))
    assert held.signal("saliency")[0].tolist() == pytest.approx([0.4, 0.8, 0.9, 0.0])
    assert select_experts(held, experts_per_layer=2, signal="saliency").experts == {0: (1, 2)}
    assert held.signal("mass_per_token").tolist() == [[0.025, 0.05, 0.075, 0.0]]
    for rule, signal in itertools.product(("hot", "coverage", "auto", "greedy", "cumulative"), SIGNALS[:3]):
        plan = select_experts(held, rule=rule, signal=signal)
        assert plan.params["signal"] == signal
        if signal == "mass_per_token":  # the same order, another unit
            assert plan.experts == select_experts(held, rule=rule, signal="mass").experts
    with pytest.raises(PlanError, match=r"holds no saliency: make it again with `hotlora profile --saliency`"):
        select_experts(profile, signal="saliency")
    assert select_experts(profile, rule="random", signal="saliency").rule == "random"  # which reads no signal
    with pytest.raises(PlanError, match=r"'cumulative' adds up ESFT's scores.*choose coverage"):
        select_experts(held, rule="cumulative", signal="saliency")


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
        ({"rule": None}, "rule None does not exist: choose one of hot"),
        ({"signal": "norm"}, "'norm' does not exist: choose one of count, mass"),
    ],
)
def test_select_experts_refuses(arguments, says):
    with pytest.raises(PlanError, match=says):
        select_experts(make_profile(COUNTS), **arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"rule": "greedy", "budget": 1}, {0: (1,), 1: ()}),
        ({"rule": "greedy", "budget": 2}, {0: (1, 3), 1: ()}),  # 7 and 7: the lower layer
        ({"rule": "greedy", "budget": 5}, {0: (1, 3, 7), 1: (0, 5)}),  # five times 5: the lower id
        ({"rule": "greedy", "budget": 14}, {0: (0, 1, 2, 3, 4, 5, 6, 7), 1: (0, 2, 3, 5, 6, 7)}),
        ({"rule": "coverage", "p": 0.5}, {0: (1, 3), 1: (0, 2, 5)}),  # 16 of 32 is half
        ({"rule": "coverage"}, {0: (1, 3, 7), 1: (0, 2, 3, 5)}),
        ({"rule": "coverage", "p": 1}, {0: (0, 1, 2, 3, 5, 6, 7), 1: (0, 2, 3, 5, 6, 7)}),  # none without a count
        ({"rule": "cumulative"}, {0: (1,), 1: (5,)}),
        ({"rule": "cumulative", "p": 0.6}, {0: (1, 3, 7), 1: (0, 2, 3, 5)}),
        ({"rule": "auto"}, {0: (1, 3, 7), 1: (0, 2, 3, 5, 6, 7)}),  # more than 4 of 32; 4 itself is not
    ],
)
def test_rules_whose_number_differs_by_layer_by_hand(arguments, expected):
    assert select_experts(make_profile(COUNTS), **arguments).experts == expected


@pytest.mark.parametrize(
    ("arguments", "params"),
    [
        ({"rule": "greedy"}, {"fraction": 0.25, "experts_per_layer": 2, "budget": 4, "signal": "count"}),
        ({"rule": "greedy", "budget": 3, "signal": "mass"}, {"budget": 3, "signal": "mass"}),
        ({"rule": "greedy", "experts_per_layer": 3}, {"experts_per_layer": 3, "budget": 6, "signal": "count"}),
        ({"rule": "coverage"}, {"p": 0.6, "signal": "count"}),
        ({"rule": "coverage", "signal": "mass"}, {"p": 0.6, "signal": "mass"}),
        ({"rule": "cumulative"}, {"p": 0.2, "signal": "count"}),
        ({"rule": "cumulative", "signal": "mass"}, {"p": 0.1, "signal": "mass"}),
        ({"rule": "cumulative", "p": 1}, {"p": 1.0, "signal": "count"}),
        ({"rule": "auto", "signal": "mass"}, {"signal": "mass"}),
        ({"rule": "global", "experts_per_layer": 3}, {"experts_per_layer": 3, "signal": "count"}),
        (
            {"rule": "hot+random", "experts_per_layer": 5, "seed": 7},
            {"experts_per_layer": 5, "fillers": 2, "signal": "count", "seed": 7},
        ),
    ],
)
def test_params_are_what_the_rule_read(arguments, params):
    plan = select_experts(make_profile(COUNTS), **arguments)
    assert plan.params == params and plan.rule == arguments["rule"]
    assert ExpertPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_cumulative_by_mass_adds_gate_weights_a_token_as_esft_does(caplog):
    """Not shares of the layer: 20 tokens of this layer give 0.2, 0.15, 0.1 and 0.05, which is half of a weight of 1."""
    profile = make_profile([[10] * 4, [10] * 4], mass=[[4.0, 3.0, 2.0, 1.0], [10.0, 6.0, 3.0, 1.0]])
    assert profile.num_tokens == 20
    chosen = [{0: 1, 1: 1}, {0: 2, 1: 1}, {0: 3, 1: 1}, {0: 4, 1: 1}, {0: 4, 1: 2}]
    for p, kept in zip((0.2, 0.3, 0.4, 0.5, 0.6), chosen, strict=True):
        caplog.clear()
        plan = select_experts(profile, rule="cumulative", signal="mass", p=p)
        assert {layer: len(ids) for layer, ids in plan.experts.items()} == kept
        assert ("layer 0: 0.5" in caplog.text) == (p > 0.5)
        if p > 0.5:
            assert "p = 0.6 is more than" in caplog.text and "all experts" in caplog.text


def test_cumulative_by_mass_needs_the_number_of_tokens():
    profile = RoutingProfile((0,), torch.tensor([[1, 2]]), torch.tensor([[0.5, 1.0]]), 0, 1, source={})
    with pytest.raises(PlanError, match=r"num_tokens = 0, .*rule 'cumulative' by mass.* needs weights a token"):
        select_experts(profile, rule="cumulative", signal="mass")
    assert select_experts(profile, rule="cumulative").experts == {0: (1,)}


def test_cumulative_by_mass_is_coverage_where_a_tokens_weights_sum_to_one():
    counts = [[2 * n for n in row] for row in COUNTS]
    profile = make_profile(counts, mass=[[n / 2 for n in row] for row in counts])
    for p in (0.1, 0.25, 0.5, 0.7):
        plans = [select_experts(profile, rule=rule, signal="mass", p=p) for rule in ("cumulative", "coverage")]
        assert plans[0].experts == plans[1].experts


@pytest.mark.parametrize("rule", ["coverage", "cumulative"])
@pytest.mark.parametrize("num_experts", [10, 100])
def test_a_share_that_is_reached_exactly_is_reached(rule, num_experts):
    weight = 0.1 if rule == "coverage" else 0.5  # a token's sum to 1, which "cumulative" needs to get to p = 1
    for mass in (None, [[weight] * num_experts]):
        profile = make_profile([[1] * num_experts], mass=mass)
        for kept in range(1, num_experts + 1):
            signal = "count" if mass is None else "mass"
            plan = select_experts(profile, rule=rule, p=kept / num_experts, signal=signal)
            assert plan.experts[0] == tuple(range(kept))


def random_counts(seed, same_totals=False):
    """Counts of a few layers, many of them equal."""
    chance = random.Random(seed)
    num_layers, num_experts = chance.randint(1, 4), chance.randint(1, 9)
    counts = [[chance.randint(0, 6) for _ in range(num_experts)] for _ in range(num_layers)]
    for row in counts:
        row[chance.randrange(num_experts)] += 7 * num_experts - sum(row) if same_totals else 1
    return counts


@pytest.mark.parametrize("seed", range(40))
def test_auto_is_where_coverage_is_furthest_above_the_uniform(seed):
    counts = random_counts(seed)
    plan = select_experts(make_profile(counts), rule="auto")
    for row, ids in zip(counts, plan.experts.values(), strict=True):
        ranked, num_experts = sorted(row, reverse=True), len(row)
        height = [Fraction(sum(ranked[:k]), sum(row)) - Fraction(k, num_experts) for k in range(num_experts + 1)]
        assert len(ids) == max(1, height.index(max(height)))
        assert sorted((row[expert] for expert in ids), reverse=True) == ranked[: len(ids)]


def test_auto_keeps_one_expert_of_a_uniform_layer():
    profile = make_profile([[3, 3, 3, 3], [3, 3, 3, 4]])
    assert select_experts(profile, rule="auto").experts == {0: (0,), 1: (3,)}


def one_step_at_a_time(counts, budget):
    """The algorithm of MoE-Sieve's appendix C, with no expert to begin with."""
    ranked = [sorted(range(len(row)), key=lambda expert: (-row[expert], expert)) for row in counts]
    kept = [0] * len(counts)
    for _ in range(budget):
        gains = {
            layer: Fraction(row[ranked[layer][kept[layer]]], sum(row))
            for layer, row in enumerate(counts)
            if kept[layer] < len(row)
        }
        kept[max(gains, key=lambda layer: (gains[layer], -layer))] += 1
    return {layer: tuple(sorted(ranked[layer][: kept[layer]])) for layer in range(len(counts))}


@pytest.mark.parametrize("seed", range(40))
def test_greedy_is_the_papers_steps_and_by_count_the_global_top(seed):
    for same_totals in (False, True):
        counts = random_counts(seed, same_totals)
        size = len(counts) * len(counts[0])
        for budget in range(1, size + 1):
            plan = select_experts(make_profile(counts), rule="greedy", budget=budget)
            assert plan.experts == one_step_at_a_time(counts, budget)
            if same_totals:  # as routers without a choice to skip have them
                flat = sorted((-count, layer, e) for layer, row in enumerate(counts) for e, count in enumerate(row))
                assert plan.experts == {
                    layer: tuple(sorted(e for _, at, e in flat[:budget] if at == layer)) for layer in range(len(counts))
                }
                kept = [[row[e] for e in plan.experts[layer]] for layer, row in enumerate(counts)]
                hot = select_experts(make_profile(counts), experts_per_layer=max(1, budget // len(counts)))
                uniform = sum(counts[layer][e] for layer, ids in hot.experts.items() for e in ids)
                assert budget < len(counts) or sum(map(sum, kept)) >= uniform


def test_hot_and_random_lies_between_hot_and_random():
    profile = make_profile([[random.Random(layer).randrange(99) for _ in range(64)] for layer in range(4)])
    plans = {
        fillers: select_experts(profile, rule="hot+random", experts_per_layer=16, fillers=fillers, seed=3).experts
        for fillers in (0, 6, 16)
    }
    assert plans[0] == select_experts(profile, rule="hot", experts_per_layer=16).experts
    assert plans[16] == select_experts(profile, rule="random", experts_per_layer=16, seed=3).experts
    ten = select_experts(profile, rule="hot", experts_per_layer=10).experts
    for layer in range(4):
        assert set(ten[layer]) < set(plans[6][layer]) and len(plans[6][layer]) == 16
    assert len({tuple(sorted(set(plans[6][layer]) - set(ten[layer]))) for layer in range(4)}) == 4
    half = {"rule": "hot+random", "experts_per_layer": 16}
    seeds = [select_experts(profile, **half, seed=seed) for seed in (0, 0, 1)]
    assert seeds[0] == seeds[1] and seeds[0].experts != seeds[2].experts
    everything = select_experts(profile, rule="hot+random", experts_per_layer=64, fillers=9)
    assert everything.experts == dict.fromkeys(range(4), tuple(range(64)))


SCORES = {1: [0.5, -2, 7, 0.5], 4: [0, 0, 0, 1e-9]}


def test_scores_from_a_file_a_dict_or_a_tensor(tmp_path):
    profile = make_profile([[9, 0, 0, 0], [9, 0, 0, 0]], layers=(1, 4), fingerprint="olmoe-1")
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"version": 1, "fingerprint": "olmoe-1", "scores": SCORES}))
    by_hand = tmp_path / "hand.json"
    by_hand.write_text('{"version": 1, "scores": {"4": [0, 0, 0, 1e-9], "1": [0.5, -2, 7, 0.5]}}')
    tensor = torch.tensor(list(SCORES.values()), dtype=torch.float64)
    plans = [
        select_experts(profile, rule="scores", scores=scores, experts_per_layer=2)
        for scores in (path, str(path), by_hand, SCORES, {layer: tensor[i] for i, layer in enumerate((1, 4))}, tensor)
    ]
    assert plans[0].experts == {1: (0, 2), 4: (0, 3)}  # 0.5 twice, 0 three times: the lower id
    assert all(plan == plans[0] for plan in plans)
    assert set(plans[0].params) == {"experts_per_layer", "scores_hash"}
    other = select_experts(profile, rule="scores", scores=tensor + 1, experts_per_layer=2)
    assert other.experts == plans[0].experts and other.params["scores_hash"] != plans[0].params["scores_hash"]
    assert select_experts(profile, rule="scores", scores=SCORES).experts == {1: (2,), 4: (3,)}  # a quarter


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        ({0: [1, 2], 1: [1, float("nan")]}, "layer 1: the score of expert 1 is nan; it must be a finite number"),
        ({0: [1, 2], 1: [-float("inf"), 1]}, "layer 1: the score of expert 0 is -inf"),
        ({0: [1, 2], 1: [10**400, 1]}, "layer 1: the score of expert 0 is 1000"),
        ({0: [1, 2], 1: [True, 1]}, "the score of expert 0 is True"),
        ({0: [1, 2], 1: ["1", 1]}, "the score of expert 0 is '1'"),
        ({0: [1, 2], 1: [None, 1]}, "the score of expert 0 is None"),
        ({0: [1, 2]}, r"scores lack layers \[1\]"),
        ({0: [1, 2], 1: [1, 2], 7: [1, 2]}, r"scores have layers \[7\]: the profile has \[0, 1\]"),
        ({0: [1, 2], 1: [1, 2, 3]}, "layer 1: 3 scores; give a list of 2"),
        ({0: [1, 2], 1: 3}, "layer 1: 3 scores; give a list of 2"),
        (torch.ones(2, 3), r"tensor \[2, 3\]: give \[2 layers, 2 experts\]"),
        (torch.ones(2), r"tensor \[2\]: give"),
        (None, "rule 'scores' needs scores"),
    ],
)
def test_scores_are_checked(scores, says):
    with pytest.raises(PlanError, match=says):
        select_experts(make_profile([[1, 2], [3, 4]]), rule="scores", scores=scores)


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ('{"version": 1, "scores": {"0": [1, NaN]}}', PlanError, "the score of expert 1 is nan"),
        ('{"version": 1, "scores": {"0": [1, Infinity]}}', PlanError, "the score of expert 1 is inf"),
        ('{"version": 1, "scores": {"first": [1, 2]}}', PlanError, "layer 'first'"),
        ('{"version": 1, "scores": [[1, 2]]}', PlanError, "must map each decoder layer"),
        ('{"version": 1}', PlanError, "scores is None"),
        ('{"version": 1, "fingerprint": "b", "scores": {"0": [1, 2]}}', PlanError, "for b, the profile is of a"),
        ('{"version": 1, "score": {}, "scores": {"0": [1, 2]}}', PlanError, r"unknown keys \['score'\]"),
        ('{"version": 2, "scores": {"0": [1, 2]}}', FileError, "version 2; this hotlora reads version 1"),
        ('{"version": true, "scores": {"0": [1, 2]}}', FileError, "version True; this hotlora reads version 1"),
        ('{"version": 1, "scores": {"0": [1,', FileError, "cut short"),
        (None, FileError, "does not exist"),
    ],
)
def test_a_file_of_scores_is_checked_and_named(tmp_path, text, kind, says):
    path = tmp_path / "scores.json"
    if text is not None:
        path.write_text(text)
    profile = make_profile([[1, 2]], fingerprint="a")
    with pytest.raises(kind, match=says) as caught:
        select_experts(profile, rule="scores", scores=path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"rule": "hot", "p": 0.5}, "rule 'hot' does not read p: leave it out; it reads fraction, experts_per_layer"),
        ({"rule": "hot", "budget": 3}, "'hot' does not read budget"),
        ({"rule": "hot", "fillers": 1}, "'hot' does not read fillers"),
        ({"rule": "random", "scores": {0: [1]}}, "'random' does not read scores"),
        ({"rule": "coverage", "fraction": 0.5}, "'coverage' does not read fraction: leave it out; it reads p$"),
        ({"rule": "cumulative", "experts_per_layer": 2, "budget": 4}, "does not read experts_per_layer, budget"),
        ({"rule": "cumulative", "fraction": 0.5}, "'cumulative' does not read fraction"),
        ({"rule": "auto", "fraction": 0.5}, "'auto' does not read fraction: leave it out; it reads no budget"),
        ({"rule": "auto", "p": 0.5}, "'auto' does not read p"),
        ({"rule": "greedy", "p": 0.5}, "'greedy' does not read p: .* fraction, experts_per_layer, budget"),
        ({"rule": "global", "budget": 4}, "'global' does not read budget"),
        ({"rule": "greedy", "budget": 4, "fraction": 0.5}, "exactly one of budget and fraction"),
        ({"rule": "greedy", "budget": 0}, "budget is 0: it must be an integer from 1 to 16"),
        ({"rule": "greedy", "budget": 17}, "budget is 17: .* all 8 experts of 2 layers"),
        ({"rule": "greedy", "budget": 2.5}, r"budget is 2\.5"),
        ({"rule": "coverage", "p": 0}, "p is 0: it must be above 0 and at most 1"),
        ({"rule": "coverage", "p": 1.01}, r"p is 1\.01"),
        ({"rule": "cumulative", "p": -0.1}, r"p is -0\.1"),
        ({"rule": "cumulative", "p": float("nan")}, "p is nan"),
        ({"rule": "hot+random", "experts_per_layer": 4, "fillers": 5}, "fillers is 5: .* from 0 to the 4 experts"),
        ({"rule": "hot+random", "fillers": -1}, "fillers is -1"),
        ({"rule": "global", "experts_per_layer": 9}, "experts_per_layer is 9"),
        ({"rule": "scores", "scores": {}, "experts_per_layer": 9}, "experts_per_layer is 9"),
    ],
)
def test_a_budget_that_is_not_read_or_out_of_range_is_named(arguments, says):
    with pytest.raises(PlanError, match=says):
        select_experts(make_profile(COUNTS), **arguments)


@pytest.mark.parametrize("signal", ["count", "mass"])
def test_a_layer_without_assignments(signal):
    profile = make_profile([[1, 2, 3, 4], [0, 0, 0, 0]], layers=(2, 5))
    for rule in ("greedy", "coverage", "cumulative", "auto"):
        with pytest.raises(PlanError, match=f"layer 5 has no assignments in the profile, and rule {rule!r}"):
            select_experts(profile, rule=rule, signal=signal)
    for rule, experts in (("hot", (0, 1)), ("cold", (0, 1)), ("global", (2, 3)), ("all", (0, 1, 2, 3))):  # it ties
        budget = None if rule == "all" else 2
        assert select_experts(profile, rule=rule, signal=signal, experts_per_layer=budget).experts[5] == experts
    assert len(select_experts(profile, rule="hot+random", experts_per_layer=2).experts[5]) == 2


OPTIONS = {
    **{rule: {"experts_per_layer": 1} for rule in RULES},
    "greedy": {"budget": 2},
    "coverage": {"p": 1},
    "cumulative": {"p": 1},
    "scores": {"experts_per_layer": 1, "scores": {0: [1.5], 1: [-1]}},
    "auto": {},
}


@pytest.mark.parametrize("rule", RULES)
def test_one_expert_is_kept_by_every_rule(rule):
    plan = select_experts(make_profile([[6], [6]]), rule=rule, **OPTIONS[rule])
    assert plan.experts == {0: (0,), 1: (0,)}


def test_all_experts_are_kept_where_the_budget_is_all():
    profile = make_profile([[1, 2, 3], [2, 2, 2]])
    for rule, options in OPTIONS.items():
        if rule == "auto":
            continue
        wide = {**options, **({"experts_per_layer": 3} if "experts_per_layer" in options else {})}
        wide |= {"greedy": {"budget": 6}, "scores": {"scores": torch.zeros(2, 3)}}.get(rule, {})
        assert select_experts(profile, rule=rule, **wide).experts == {0: (0, 1, 2), 1: (0, 1, 2)}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_rule_keeps_its_budget_and_hot_covers_most(data):
    num_experts = data.draw(st.integers(1, 12))
    rows = st.lists(st.integers(0, 5), min_size=num_experts, max_size=num_experts)
    counts = data.draw(st.lists(rows, min_size=1, max_size=4))
    kept = data.draw(st.integers(1, num_experts))
    profile = make_profile(counts)
    seen = {}
    for rule in ("hot", "all", "random", "cold", "global", "hot+random"):
        plan = select_experts(profile, rule=rule, experts_per_layer=num_experts if rule == "all" else kept)
        for layer, ids in plan.experts.items():
            assert list(ids) == sorted(set(ids))
            assert len(ids) == (num_experts if rule == "all" else kept)
            seen[rule, layer] = sum(counts[layer][expert] for expert in ids)
    for layer in range(len(counts)):
        assert seen["cold", layer] <= seen["random", layer] <= seen["hot", layer] <= seen["all", layer]
        assert seen["global", layer] <= seen["hot", layer] >= seen["hot+random", layer]


@pytest.mark.parametrize(
    ("words", "says", "experts"),
    [
        (["--rule", "auto"], "auto: 9 of 16 experts in 2 layers, 3 to 6 in each", [3, 6]),
        (["--rule", "coverage", "--p", "0.5"], "coverage: 5 of 16 experts in 2 layers, 2 to 3 in each", [2, 3]),
        (["--rule", "greedy", "--budget", "2"], "greedy: 2 of 16 experts in 2 layers, 0 to 2 in each", [2, 0]),
        (
            ["--rule", "hot+random", "--experts-per-layer", "4", "--fillers", "1"],
            "8 of 16 experts in 2 layers;",
            [4, 4],
        ),
    ],
)
def test_the_command_takes_every_rules_budget(words, says, experts, tmp_path, monkeypatch, capsys):
    make_profile(COUNTS).save(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hotlora", "plan", str(tmp_path), *words, "-o", str(tmp_path / "plan.json")])
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code and says in " ".join(capsys.readouterr().out.split())
    assert [len(ids) for ids in ExpertPlan.load(tmp_path).experts.values()] == experts


def test_the_command_takes_scores(tmp_path, monkeypatch, capsys):
    make_profile([[1, 2, 3, 4]]).save(tmp_path)
    (tmp_path / "scores.json").write_text('{"version": 1, "scores": {"0": [4, 3, 2, 1]}}')
    words = ["plan", str(tmp_path), "--rule", "scores", "--scores", str(tmp_path / "scores.json")]
    monkeypatch.setattr(sys, "argv", ["hotlora", *words, "-o", str(tmp_path / "plan.json")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code and ExpertPlan.load(tmp_path).experts == {0: (0,)}


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
        ({"experts": {"1" * 5000: [1]}}, PlanError, "layer '1111"),
        ({"rule": "\ud800"}, FileError, "half a character"),
        ({"ranks": {"0": [8, 10**400]}}, PlanError, "up to 65536"),
        ({"experts": {}}, PlanError, "names no layer"),
        ({"experts": [[1, 2]]}, PlanError, "must map each decoder layer"),
        ({"num_experts": 0}, PlanError, "num_experts is 0"),
        ({"ranks": {"0": [8]}}, PlanError, "1 ranks for 2 experts"),
        ({"ranks": {"0": [8, 0]}}, PlanError, "positive integers"),
        ({"ranks": {"1": [8, 8]}}, PlanError, "must name the same layers"),
        ({"rank": {"0": [8, 8]}}, PlanError, r"unknown keys \['rank'\]"),
        ({"params": [1]}, PlanError, "params"),
        ({"params": []}, PlanError, r"params is \[\]: it must be an object"),
        ({"params": None}, PlanError, "params is None"),
        ({"rule": None}, PlanError, "rule is None: it must be a string"),
        ({"rule": 3}, PlanError, "rule is 3"),
        ({"fingerprint": 5}, PlanError, "fingerprint is 5: it must be a string, or null"),
        ({"profile_hash": []}, PlanError, r"profile_hash is \[\]"),
        ({"version": True}, FileError, "plan version True"),
        ({"version": 1.0}, FileError, r"plan version 1\.0"),
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
