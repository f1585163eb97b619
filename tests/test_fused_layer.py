"""The routed layer in few kernels, against the plain loop: by Triton's interpreter, or on a GPU where there is one."""

import json
from dataclasses import replace

import pytest
import torch
from test_experts import (
    FACTORS,
    WIDTH,
    D,
    E,
    K,
    T,
    assert_same,
    loop,
    make_experts,
    make_experts_of,
    make_factors,
    make_inputs,
    one_for_all,
    output_and_gradients,
    relative,
)

pytest.importorskip("triton", reason="Triton is not installed (pip install triton): its kernels are not tested")

from test_kernels import ON_GPU, on_device, run_script

from hotlora.cost.activations import LiveBytes
from hotlora.hf.experts_view import ExpertsView
from hotlora.layer import cpu, gpu
from hotlora.layer.function import routed_experts_by
from hotlora.layer.kernels import fused


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setenv("HOTLORA_KERNELS", "fused")


def fused_layer(experts, hidden, index, weights, updates):
    """As a GPU runs it; fails where `fused` does not cover it."""
    view = ExpertsView(experts)
    assert gpu.use_fused(hidden) and fused.covers(view, hidden, weights, updates)
    return routed_experts_by(gpu, view, hidden, index, weights, updates)


def ours_and_reference(experts, inputs, factors, reference=loop):
    expected = output_and_gradients(reference, experts, *inputs, factors)
    ours = output_and_gradients(
        fused_layer, experts.to("cuda" if ON_GPU else "cpu"), *map(on_device, inputs), on_device(factors)
    )
    return {name: value.cpu() for name, value in ours.items()}, expected


LAYOUTS = [
    {"has_bias": True, "is_transposed": True, "is_concatenated": False},
    {"has_gate": False},
    {"has_gate": False, "is_transposed": True, "has_bias": True},
    {"is_concatenated": False},
    {},
]


# With ranks of 5 the two parts of gate and up leave a part of a block empty, with 8 they fill it; one part never does.
@pytest.mark.parametrize(
    ("layout", "r"),
    [(layout, 5) for layout in LAYOUTS] + [(LAYOUTS[0], 8), ({}, 8)],
    ids=lambda value: value if isinstance(value, int) else " ".join(f"{k}={v}" for k, v in value.items()) or "olmoe",
)
def test_output_and_every_gradient_equal_the_loop(layout, r):
    experts, inputs = make_experts_of(layout, torch.float32), make_inputs(torch.float32)
    factors = make_factors([1, 3, 6], r, torch.float32, parts=2 if experts.has_gate else 1)
    assert_same(*ours_and_reference(experts, inputs, factors), 1e-5)


def test_factors_that_experts_share():
    experts, inputs = make_experts(torch.float32), make_inputs(torch.float32)
    factors = one_for_all(make_factors([1, 3, 6], 8, torch.float32))
    assert_same(*ours_and_reference(experts, inputs, factors), 1e-5)


def away_loop(experts, hidden, index, weights, factors):
    """The loop, where rows of experts elsewhere have a weight of 0 and an index of E."""
    return loop(experts, hidden, index.clamp(max=E - 1), weights * (index < E), *factors)


def test_rows_of_experts_elsewhere():
    experts, (hidden, index, weights) = make_experts(torch.float32), make_inputs(torch.float32)
    index = index.masked_fill(torch.rand(index.shape, generator=torch.Generator().manual_seed(3)) < 0.4, E)
    experts._is_expert_parallel = True
    factors = make_factors([1, 3, 7], 8, torch.float32)
    assert_same(*ours_and_reference(experts, (hidden, index, weights), factors, away_loop), 1e-5)


@pytest.mark.parametrize("ids", [[0, 1, 2], [1, 5], [5, 7], list(range(E))])
def test_where_two_experts_have_all_rows(ids):
    """Empty experts; both with rows adapted, one, none; all."""
    inputs = make_inputs(torch.float32, index=torch.tensor([[0, 1]]).expand(T, K).contiguous())
    factors = make_factors(ids, 8, torch.float32)
    ours, expected = ours_and_reference(make_experts(torch.float32), inputs, factors)
    assert_same(ours, expected, 1e-5)
    for slot, expert in enumerate(ids):
        assert bool(ours["A_down"][slot].any()) == (expert in (0, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_within_the_loops_own_error(dtype):
    experts, inputs, factors = make_experts(dtype), make_inputs(dtype), make_factors([1, 3, 6], 16, dtype)
    exact = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in inputs]
    exact_factors = replace(factors, **{n: getattr(factors, n).detach().double().requires_grad_() for n in FACTORS})
    truth = output_and_gradients(loop, make_experts(dtype).double(), *exact, exact_factors)
    of_loop = output_and_gradients(loop, experts, *inputs, factors)
    ours, _ = ours_and_reference(experts, inputs, factors)
    allowed = 1.1 if ON_GPU or dtype == torch.float16 else 3  # the interpreter cuts bits off
    for name, value in truth.items():
        assert relative(ours[name], value) <= allowed * relative(of_loop[name], value), name


def test_float32_factors_under_autocast_get_float32_gradients():
    experts, inputs = make_experts(torch.bfloat16), make_inputs(torch.bfloat16)
    factors = make_factors([1, 3, 6], 8, torch.float32)
    with torch.autocast("cuda" if ON_GPU else "cpu", torch.bfloat16):
        ours, _ = ours_and_reference(experts, inputs, factors, lambda *args: fused_layer(*args[:4], args[4]))
    exact = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in inputs]
    exact_factors = replace(factors, **{n: getattr(factors, n).detach().double().requires_grad_() for n in FACTORS})
    truth = output_and_gradients(loop, make_experts(torch.bfloat16).double(), *exact, exact_factors)
    for name, value in truth.items():
        assert ours[name].dtype == (torch.float32 if name in FACTORS else torch.bfloat16)
        assert relative(ours[name], value) < 0.05, name


def test_no_array_of_rows_waits_for_the_next():
    """Backward: four of an expert's width in the activation's, then dx beside the gradient of gate and up alone."""
    hidden, index, weights = map(on_device, make_inputs(torch.float32))
    factors, experts = on_device(make_factors([1, 3, 6], 4, torch.float32)), make_experts(torch.float32)
    output = fused_layer(experts.to(hidden.device), hidden, index, weights, [factors])
    grad, inputs = torch.ones_like(output), [hidden, weights, *factors.tensors]
    with LiveBytes() as live:
        torch.autograd.grad(output, inputs, grad)
    row = 4 * T * K
    # Gradients of the factors, the input and the routing weights; and what has rank 4, or 8 of gate and up.
    beside = sum(t.nbytes for t in factors.tensors) + hidden.nbytes + (2 + 4 + 8) * row
    assert live.most <= row * max(4 * WIDTH, D + 2 * WIDTH) + beside


def test_zero_B_adds_nothing_bit_for_bit():
    device = "cuda" if ON_GPU else "cpu"
    experts, inputs = make_experts(torch.bfloat16).to(device), list(map(on_device, make_inputs(torch.bfloat16)))
    factors = on_device(make_factors([1, 3, 6], 16, torch.bfloat16))
    zero = replace(factors, B_gate_up=factors.B_gate_up * 0, B_down=factors.B_down * 0)
    assert torch.equal(fused_layer(experts, *inputs, [zero]), fused_layer(experts, *inputs, []))


def test_what_does_not_train_gets_no_gradient():
    experts, inputs, factors = (
        make_experts(torch.float32),
        make_inputs(torch.float32),
        make_factors([1, 3], 8, torch.float32),
    )
    frozen = replace(factors, A_gate_up=factors.A_gate_up.detach(), A_down=factors.A_down.detach())
    leaves = [inputs[0], inputs[2], factors.B_gate_up, factors.B_down]
    results = []
    for function in (fused_layer, lambda e, h, i, w, u: loop(e, h, i, w, u[0])):
        results.append(torch.autograd.grad(function(experts, *inputs, [frozen]).square().sum(), leaves))
    for ours, expected in zip(*results, strict=True):
        assert relative(ours, expected) < 1e-5


def test_gradients_with_dropout_are_those_of_the_function_that_was_computed():
    """Against differences of the output; the same seed draws the same masks, another seed others."""
    device = "cuda" if ON_GPU else "cpu"
    experts, (hidden, index, weights) = (
        make_experts(torch.float32).to(device),
        map(on_device, make_inputs(torch.float32)),
    )
    hidden, index, weights = (t[:8].detach() for t in (hidden, index, weights))
    hidden.requires_grad_(), weights.requires_grad_()
    factors = replace(on_device(make_factors([1, 3, 6], 8, torch.float32)), dropout=0.3)
    leaves = [hidden, weights, *(getattr(factors, name) for name in FACTORS)]
    probe = torch.randn(8, D, generator=torch.Generator().manual_seed(7)).to(device)

    def loss(seed=0):
        torch.manual_seed(seed)
        return (fused_layer(experts, hidden, index, weights, [factors]) * probe).sum(dtype=torch.float64)

    gradients = torch.autograd.grad(loss(), leaves)
    with torch.no_grad():
        assert loss() == loss() != loss(1)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            direction, step = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(5)).to(device), 1e-3
            kept = leaf.clone()
            leaf += step * direction
            above = loss()
            leaf.copy_(kept - step * direction)
            below = loss()
            leaf.copy_(kept)
            by_differences = float((above - below) / (2 * step))
            scale = float(gradient.norm() * direction.norm())
            assert abs(by_differences - float((gradient * direction).sum())) < 2e-4 * scale


def test_what_is_not_covered_runs_as_before():
    """Two adapters, DoRA, scalings of each expert, weights that train, a float64 base: equal to the loop or the CPU."""
    experts, inputs = make_experts(torch.float32), make_inputs(torch.float32)
    view, one, other = ExpertsView(experts), *(make_factors(ids, 8, torch.float32) for ids in ([1, 3], [3, 5]))
    hidden, _, weights = inputs
    assert fused.covers(view, hidden, weights, [one]) and fused.covers(view, hidden, weights, [])
    dora = replace(one, scale_up_NPF=torch.ones(2, 32), scale_down_ND=torch.ones(2, 32))
    each = replace(one, scaling=torch.ones(2, dtype=torch.float64))
    for updates in ([one, other], [dora], [each], [make_factors([1], 65, torch.float32)]):
        assert not fused.covers(view, hidden, weights, updates)
    assert not fused.covers(view, hidden, weights, [make_factors([1], 8, torch.bfloat16)])
    sum_of_both = routed_experts_by(gpu, view, *inputs, [one, other])
    expected = routed_experts_by(cpu, view, *inputs, [one, other])
    assert relative(sum_of_both, expected) < 1e-5
    assert not fused.covers(ExpertsView(make_experts()), hidden.double(), weights, [])
    experts.down_proj.requires_grad_(True)
    assert not fused.covers(view, hidden, weights, [one])


def test_it_is_chosen_by_the_environment(monkeypatch):
    hidden, _, _ = make_inputs(torch.float32)
    for value, expected in {"fused": True, "triton": False, "torch": False, "": False}.items():
        monkeypatch.setenv("HOTLORA_KERNELS", value)
        assert gpu.use_fused(hidden) == expected, value


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # in numpy's sigmoid
def test_activations_are_found_by_what_they_do():
    """gpt_oss has its own; what none of the kernels' is like is left alone."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    experts = make_experts_of({"is_concatenated": False, "has_bias": True}, torch.float32)
    experts.alpha, experts.limit = 1.702, 7.0
    experts._apply_gate = GptOssExperts._apply_gate.__get__(experts)
    fused._GATES.clear()
    gate = fused.gate_of(ExpertsView(experts))
    assert (gate.kind, gate.is_interleaved, gate.limit) == ("gpt_oss", True, 7.0)
    hidden, index, weights = make_inputs(torch.float32)
    hidden = (hidden * 5).detach().requires_grad_()  # so that values are clamped
    factors = make_factors([1, 3, 6], 8, torch.float32)
    results = []
    for products in (gpu, cpu):
        output = routed_experts_by(products, ExpertsView(experts), hidden, index, weights, [factors])
        leaves = [hidden, weights, *(getattr(factors, name) for name in FACTORS)]
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for ours, expected in zip(*results, strict=True):
        assert relative(ours, expected) < 1e-5
    fused._GATES.clear()
    odd = make_experts(torch.float32)
    odd._apply_gate = lambda x: x.chunk(2, -1)[0].cos()
    assert fused.gate_of(ExpertsView(odd)) is None
    fused._GATES.clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu_nothing_waits(dtype):
    """After a first run, in which the kernels are compiled."""
    experts, inputs = make_experts(dtype).to("cuda"), list(map(on_device, make_inputs(dtype)))
    factors = replace(on_device(make_factors([1, 3, 6], 16, dtype)), dropout=0.1)
    leaves = [inputs[0], inputs[2], *(getattr(factors, name) for name in FACTORS)]
    probe = torch.randn(T, D).to("cuda", dtype)
    torch.autograd.grad(fused_layer(experts, *inputs, [factors]), leaves, probe)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(fused_layer(experts, *inputs, [factors]), leaves, probe)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90, 100, 120])
@pytest.mark.parametrize(
    "options",
    [[], ["--r", "64", "--p", "0.1", "--gate", "gpt_oss", "--bias"], ["--dtype", "float32"]],
    ids=["olmoe", "most", "float32"],
)
def test_the_kernels_compile_without_a_spill(capability, options):
    lines = run_script("tests/compiled_fused.py", str(capability), *options, TRITON_INTERPRET="0").splitlines()
    kernels = [json.loads(line) for line in lines]
    assert len(kernels) == 12
    for kernel in kernels:
        assert kernel["spilled"] == 0 and kernel["machine_code"], kernel
        assert kernel["shared"] <= {80: 163, 86: 99, 120: 99}.get(capability, 227) * 1024, kernel
