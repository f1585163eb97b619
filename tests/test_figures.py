"""The pictures draw for small and large models, and mark the experts that the plan keeps."""

import io

import numpy as np
import pytest
import torch
from matplotlib.collections import PolyCollection

from hotlora.report import figures
from hotlora.routing.plan import select_experts
from hotlora.routing.profile import RoutingProfile


def make_profile(num_layers, num_experts, first=0, top_k=2):
    counts = torch.randint(0, 100, (num_layers, num_experts), generator=torch.Generator().manual_seed(0)) + 1
    return RoutingProfile(range(first, first + num_layers), counts, counts * 0.5, 1000, top_k)


@pytest.mark.parametrize(
    ("num_layers", "num_experts", "rule"),
    [(1, 2, "hot"), (2, 8, "cold"), (6, 32, "random"), (6, 32, None), (48, 128, "hot")],
)
def test_every_size_draws(num_layers, num_experts, rule):
    profile = make_profile(num_layers, num_experts, first=1)
    plan = None if rule is None else select_experts(profile, rule=rule)
    kept = plan and plan.params["experts_per_layer"]
    for figure in (
        figures.heat_map(profile, plan),
        figures.sorted_load(profile, plan),
        figures.coverage_curve(profile, kept),
    ):
        size = io.BytesIO()
        figure.savefig(size, format="png", dpi=30)
        assert size.tell() > 500


def test_heat_map_shows_multiples_of_the_uniform_share_under_decoder_indices():
    counts = torch.tensor([[6, 2, 0, 0], [2, 2, 2, 2]])
    profile = RoutingProfile((3, 7), counts, counts, num_tokens=4, num_experts_per_tok=2)
    axes = figures.heat_map(profile, select_experts(profile, experts_per_layer=2)).axes[0]
    assert axes.images[0].get_array().tolist() == [[3, 1, 0, 0], [1, 1, 1, 1]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["3", "7"]
    (boxes,) = [found for found in axes.collections if isinstance(found, PolyCollection)]
    spans = [(path.get_extents().x0, path.get_extents().x1) for path in boxes.get_paths()]
    np.testing.assert_allclose(spans, [(-0.45, 1.45)] * 2)  # experts 0 and 1, in both layers


def test_boxes_go_around_each_run():
    kept = np.array([[True, True, False, True], [False] * 4])
    assert figures._boxes(kept, 0.0) == [
        [(-0.5, -0.5), (1.5, -0.5), (1.5, 0.5), (-0.5, 0.5)],
        [(2.5, -0.5), (3.5, -0.5), (3.5, 0.5), (2.5, 0.5)],
    ]


def test_coverage_curve_goes_from_nothing_to_all_above_the_diagonal():
    profile = make_profile(3, 8)
    line = figures.coverage_curve(profile, 2).axes[0].lines[0]
    values = line.get_ydata()
    assert values[0] == 0 and values[-1] == pytest.approx(100)
    assert values[2] == pytest.approx(100 * profile.coverage(experts_per_layer=2).mean().item())
    assert (values >= np.arange(9) / 8 * 100 - 1e-9).all()


def test_a_layer_without_counts_draws():
    counts = torch.tensor([[0, 0], [1, 3]])
    profile = RoutingProfile((0, 1), counts, counts, num_tokens=2, num_experts_per_tok=2)
    for figure in (figures.heat_map(profile), figures.sorted_load(profile), figures.coverage_curve(profile)):
        figure.savefig(io.BytesIO(), format="png", dpi=30)


def test_loss_curves_keep_a_condition_its_colour_and_smooth_by_the_past():
    steps = list(range(1, 101))
    losses = [100 / step for step in steps]
    training = dict(zip(steps, losses, strict=True))
    curves = [("hot", "hot", training), ("hot, seed 1", "hot", training), ("mine", "mine", {1: 2.0})]
    figure = figures.loss_curves([figures.Curve(*curve) for curve in curves])
    axes = figure.axes[0]
    thick = axes.lines[1::2]
    assert thick[0].get_color() == figures.HOT
    assert len({line.get_color() for line in thick}) == 3
    assert thick[0].get_ydata()[0] == 100 and thick[0].get_ydata()[-1] == pytest.approx(np.mean(losses[-4:]))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["hot", "hot, seed 1", "mine"]


@pytest.mark.parametrize("last", [1, 2, 3, 7, 150, 12_345])
def test_steps_are_whole_numbers_inside_the_axis(last):
    training = {step: 2.0 for step in range(1, last + 1)}
    axes = figures.loss_curves([figures.Curve("a", "all", training)]).axes[0]
    left, right = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if left <= tick <= right]
    assert ticks and all(tick == int(tick) for tick in ticks)
    assert left <= 1 and right >= last and right - left <= max(2, last - 1), "no room that no step takes"


def test_a_wide_range_of_losses_is_in_powers_of_ten_with_the_held_out_ones():
    narrow = figures.loss_curves([figures.Curve("a", "all", {1: 3.0, 2: 1.0})]).axes[0]
    assert narrow.get_yscale() == "linear" and narrow.get_ylim()[0] == 0
    falling = {step: 5.0 / step for step in range(1, 101)}
    wide = figures.loss_curves([figures.Curve("a", "all", falling, {50: 0.2, 100: 0.04})]).axes[0]
    assert wide.get_yscale() == "log"
    low, high = wide.get_ylim()
    assert low < 0.04 and high > 5.0
    assert wide.lines[2].get_xdata().tolist() == [50, 100]
    below = figures.loss_curves([figures.Curve("a", "all", {1: 3.0, 2: -1.0})]).axes[0]
    assert below.get_ylim()[0] <= -1, "a reward's loss may be below 0"
