"""The routed layer against a plain loop over experts, written here without any of the package's helpers."""

import inspect
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, tiny_batch, tiny_model
from torch import Tensor, nn
from transformers.integrations.moe import grouped_mm_experts_forward, use_experts_implementation

from hotlora import grouped, spans
from hotlora.experts import Groups, HotFactors, _HotRows, _up_update, grouped_linear, hot_rows, plain_routed_experts
from hotlora.fused import RoutedExperts
from hotlora.fused import routed_experts as fused_routed_experts

E, K, T, D, WIDTH = 8, 2, 40, 32, 16


def grouped_routed_experts(experts, hidden, index, weights, factors=()):
    """The fused function as a GPU runs it, here on the CPU."""
    factors = [f for f in factors if len(f.expert_ids_N)]
    if experts.num_experts and not getattr(experts, "has_post_expert_norm", False):
        tensors = [getattr(f, name) for f in factors for name in FACTORS]
        return RoutedExperts.apply(grouped, experts, factors, hidden, index, weights, *tensors)
    return plain_routed_experts(experts, hidden, index, weights, factors)


def an_expert_a_block(*args):
    """The fused function as a CPU runs it when rows are many, here on few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans, "BLOCK_BYTES", 1)
        return fused_routed_experts(*args)


IMPLEMENTATIONS = {
    "plain": plain_routed_experts,
    "fused": fused_routed_experts,
    "an expert a block": an_expert_a_block,
    "as on a GPU": grouped_routed_experts,
}
both = pytest.mark.parametrize("routed_experts", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())
FACTORS = ("A_gate_up", "B_gate_up", "A_down", "B_down")


def make_experts(dtype: torch.dtype = torch.float64):
    model = tiny_model("olmoe", num_experts=E, hidden_size=D, intermediate_size=WIDTH, num_hidden_layers=1)
    return model.model.layers[0].mlp.experts.to(dtype).requires_grad_(False)


# transformers has it since 5.20.
HAS_POST_EXPERT_NORM = "has_post_expert_norm" in inspect.signature(use_experts_implementation).parameters
# Every layout that a family of transformers has, and the combinations that none has yet.
LAYOUTS = [
    {"is_transposed": transposed, "is_concatenated": concatenated, "has_bias": bias, "has_gate": gate}
    for transposed in (False, True)
    for bias in (False, True)
    for gate, concatenated in ((True, True), (True, False), (False, True))
] + [{"has_post_expert_norm": True}] * HAS_POST_EXPERT_NORM


def make_experts_of(layout: dict[str, bool], dtype: torch.dtype = torch.float64):
    """Experts of a layout, decorated as a family's are, with weights from a seed."""

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, self.act_fn, self.post_expert_norm = E, nn.SiLU(), nn.RMSNorm(D, eps=1e-6)

        if not layout.get("is_concatenated", True):

            def _apply_gate(self, gate_up):
                return self.act_fn(gate_up[..., ::2]) * gate_up[..., 1::2]

    experts = use_experts_implementation(**layout)(Experts)(config=None)
    generator = torch.Generator().manual_seed(0)
    width = 2 * WIDTH if experts.has_gate else WIDTH
    for name, rows, columns in (("gate_up_proj" if experts.has_gate else "up_proj", width, D), ("down_proj", D, WIDTH)):
        shape = (E, columns, rows) if experts.is_transposed else (E, rows, columns)
        setattr(experts, name, nn.Parameter(torch.randn(shape, generator=generator) * 0.3))
        if experts.has_bias:
            setattr(experts, f"{name}_bias", nn.Parameter(torch.randn(E, rows, generator=generator)))
    return experts.to(dtype).requires_grad_(False)


def make_factors(
    ids: Sequence[int], r: int = 4, dtype: torch.dtype = torch.float64, seed: int = 1, parts: int = 2
) -> HotFactors:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(len(ids), parts * r, D), (len(ids), parts * WIDTH, r), (len(ids), r, WIDTH), (len(ids), D, r)]
    made = [(torch.randn(s, generator=generator, dtype=torch.float64) * 0.3).to(dtype) for s in shapes]
    A_gate_up, B_gate_up, A_down, B_down = (factor.requires_grad_() for factor in made)
    ids_N = torch.tensor(list(ids), dtype=torch.int64)
    return HotFactors(ids_N, A_gate_up, B_gate_up, A_down, B_down, scaling=2.0)


def make_inputs(dtype: torch.dtype = torch.float64, seed: int = 0, index: Tensor | None = None):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    scores = torch.rand(T, E, generator=generator, dtype=torch.float64)
    top_k_index = scores.topk(K).indices if index is None else index
    weights = torch.rand(top_k_index.shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, top_k_index, weights


def loop(experts, hidden: Tensor, index: Tensor, weights: Tensor, factors: HotFactors) -> Tensor:
    """One token, one choice at a time: y = sum_k w_k * expert_k(x), with LoRA written out everywhere."""
    slots = {expert: n for n, expert in enumerate(factors.expert_ids_N.tolist())}

    def weight_of(name: str, expert: int) -> Tensor:
        weight = getattr(experts, name)[expert]
        return weight.T if experts.is_transposed else weight

    def bias_of(name: str, expert: int) -> Tensor:
        return getattr(experts, f"{name}_bias")[expert] if experts.has_bias else torch.zeros((), dtype=hidden.dtype)

    def update(A: Tensor, B: Tensor, x: Tensor) -> Tensor:
        return factors.scaling * (B @ (A @ x))

    rows = []
    for t in range(hidden.shape[0]):
        total = torch.zeros(D, dtype=hidden.dtype)
        for k in range(index.shape[1]):
            expert, x = int(index[t, k]), hidden[t]
            hot = slots.get(expert)
            if experts.has_gate:
                both = weight_of("gate_up_proj", expert) @ x + bias_of("gate_up_proj", expert)
                gate, up = (both[:WIDTH], both[WIDTH:]) if experts.is_concatenated else (both[0::2], both[1::2])
                if hot is not None:
                    A, B = factors.A_gate_up[hot], factors.B_gate_up[hot]
                    r = B.shape[1]
                    gate, up = gate + update(A[:r], B[:WIDTH], x), up + update(A[r:], B[WIDTH:], x)
                h = F.silu(gate) * up
            else:
                up = weight_of("up_proj", expert) @ x + bias_of("up_proj", expert)
                if hot is not None:
                    up = up + update(factors.A_gate_up[hot], factors.B_gate_up[hot], x)
                h = F.silu(up)
            y = weight_of("down_proj", expert) @ h + bias_of("down_proj", expert)
            if hot is not None:
                y = y + update(factors.A_down[hot], factors.B_down[hot], h)
            if HAS_POST_EXPERT_NORM and experts.has_post_expert_norm:
                y = y / (y.square().mean() + 1e-6).sqrt() * experts.post_expert_norm.weight
            total = total + weights[t, k] * y
        rows.append(total)
    return torch.stack(rows)


def output_and_gradients(function, experts, hidden, index, weights, factors) -> dict[str, Tensor]:
    leaves = {"hidden": hidden, "weights": weights} | {name: getattr(factors, name) for name in FACTORS}
    output = function(experts, hidden, index, weights, factors if function is loop else [factors])
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    used = {name: leaf for name, leaf in leaves.items() if leaf.numel()}
    gradients = torch.autograd.grad(output, list(used.values()), probe.to(output.dtype), allow_unused=True)
    named = dict(zip(used, gradients, strict=True))
    return {"output": output.detach()} | {
        name: torch.zeros_like(used[name]) if grad is None else grad for name, grad in named.items()
    }


def relative(a: Tensor, b: Tensor) -> float:
    scale = b.double().norm()
    return ((a.double() - b.double()).norm() / scale if scale else a.double().norm()).item()


def assert_same(ours: dict[str, Tensor], reference: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == reference.keys()
    for name, value in reference.items():
        assert ours[name].dtype == value.dtype
        assert relative(ours[name], value) <= tolerance, name


@pytest.mark.parametrize("r", [1, 3, 4, 8])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@both
def test_output_and_every_gradient_equal_the_loop(routed_experts, dtype, tolerance, r):
    experts, inputs, factors = make_experts(dtype), make_inputs(dtype), make_factors([1, 3, 6], r, dtype)
    ours = output_and_gradients(routed_experts, experts, *inputs, factors)
    assert_same(ours, output_and_gradients(loop, experts, *inputs, factors), tolerance)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(k for k, v in layout.items() if v) or "bare")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@both
def test_every_layout_equals_the_loop_and_without_update_transformers(routed_experts, layout, dtype, tolerance):
    experts, inputs = make_experts_of(layout, dtype), make_inputs(dtype)
    factors = make_factors([1, 3, 6], 4, dtype, parts=2 if experts.has_gate else 1)
    ours = output_and_gradients(routed_experts, experts, *inputs, factors)
    assert_same(ours, output_and_gradients(loop, experts, *inputs, factors), tolerance)
    if dtype != torch.float64:  # which transformers' grouped_mm refuses
        zero = replace(factors, B_gate_up=factors.B_gate_up * 0, B_down=factors.B_down * 0)
        found, base = routed_experts(experts, *inputs, [zero]), grouped_mm_experts_forward(experts, *inputs)
        # A vector unit rounds leftovers otherwise, and with these 16 wide experts they depend on the block.
        assert torch.equal(found, base) or (routed_experts is an_expert_a_block and relative(found, base) < 1e-6)


@both
def test_the_updates_of_two_adapters_add_up(routed_experts):
    """Into linear experts, where a sum of adapters is the sum of what each of them adds."""
    experts, inputs = make_experts_of({"has_gate": False}), make_inputs()
    experts.act_fn = nn.Identity()
    one, other = make_factors([1, 3], 4, parts=1), make_factors([3, 6], 2, seed=5, parts=1)
    one, other = (replace(f, B_down=f.B_down * 0) for f in (one, other))
    base, first, second = (routed_experts(experts, *inputs, f) for f in ([], [one], [other]))
    both = routed_experts(experts, *inputs, [one, other])
    assert relative(both - base, (first - base) + (second - base)) < 1e-10
    assert relative(both, first) > 0.01 and relative(both, second) > 0.01


@both
def test_bf16_is_within_the_loops_own_error(routed_experts):
    exact_factors = make_factors([1, 3, 6], 8, torch.bfloat16)
    low = (make_experts(torch.bfloat16), *make_inputs(torch.bfloat16), exact_factors)
    double = tuple(
        x.double().detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in low[1:4]
    )
    factors = replace(
        exact_factors, **{n: getattr(exact_factors, n).detach().double().requires_grad_() for n in FACTORS}
    )
    truth = output_and_gradients(loop, make_experts(torch.bfloat16).double(), *double, factors)
    of_loop = output_and_gradients(loop, *low)
    ours = output_and_gradients(routed_experts, *low)
    for name, value in truth.items():
        assert relative(ours[name], value) <= 1.1 * relative(of_loop[name], value), name


@given(ids=st.sets(st.integers(0, E - 1)), seed=st.integers(0, 99), r=st.sampled_from([2, 4]))
@settings(max_examples=12, deadline=None)
@both
def test_any_set_of_hot_experts(routed_experts, ids, seed, r):
    experts, inputs = make_experts(), make_inputs(seed=seed)
    factors = make_factors(sorted(ids), r, seed=seed)
    ours = output_and_gradients(routed_experts, experts, *inputs, factors)
    assert_same(ours, output_and_gradients(loop, experts, *inputs, factors), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ids", [[0], [5], [0, 5, 7], list(range(E))])
@both
def test_experts_without_tokens(routed_experts, ids, dtype):
    """Every token goes to experts 0 and 1: others get none, and a plan without these has no hot row."""
    index = torch.tensor([[0, 1]]).expand(T, K).contiguous()
    experts, inputs, factors = (
        make_experts(dtype),
        make_inputs(dtype, index=index),
        make_factors(ids, 4, dtype),
    )
    ours = output_and_gradients(routed_experts, experts, *inputs, factors)
    assert_same(ours, output_and_gradients(loop, experts, *inputs, factors), 1e-5)
    for slot, expert in enumerate(ids):
        assert bool(ours["A_down"][slot].any()) == (expert in (0, 1))


@both
def test_all_tokens_to_one_expert(routed_experts):
    index = torch.full((T, 1), 3)
    experts, inputs, factors = make_experts(), make_inputs(index=index), make_factors([3])
    ours = output_and_gradients(routed_experts, experts, *inputs, factors)
    assert_same(ours, output_and_gradients(loop, experts, *inputs, factors), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@both
def test_without_factors_and_with_zero_B_it_is_transformers_bit_for_bit(routed_experts, dtype):
    experts, inputs = make_experts(dtype), make_inputs(dtype)
    base = grouped_mm_experts_forward(experts, *inputs)
    assert torch.equal(routed_experts(experts, *inputs), base)
    factors = make_factors([0, 2, 5], 8, dtype)
    zero = replace(factors, B_gate_up=factors.B_gate_up * 0, B_down=factors.B_down * 0)
    assert torch.equal(routed_experts(experts, *inputs, [zero]), base)
    assert torch.equal(routed_experts(experts, *inputs, [make_factors([], 8, dtype)]), base)


@pytest.mark.parametrize("family", FAMILIES)
def test_registered_implementation_is_the_base(family):
    model, batch = tiny_model(family), tiny_batch()
    with torch.no_grad():
        expected = model(**batch).logits
        model.set_experts_implementation("hotlora")
        assert torch.equal(model(**batch).logits, expected)


@both
def test_float32_factors_on_a_bfloat16_base(routed_experts):
    experts, inputs = make_experts(torch.bfloat16), make_inputs(torch.bfloat16)
    factors = make_factors([1, 3], 8, torch.float32)
    output = routed_experts(experts, *inputs, [factors])
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert factors.A_gate_up.grad.dtype == torch.float32
    exact = loop(
        experts.double(),
        *(x.double() if x.is_floating_point() else x for x in inputs),
        make_factors([1, 3], 8),
    )
    assert relative(output, exact) < 0.01


@both
def test_autocast_is_followed(routed_experts):
    experts, inputs, factors = (
        make_experts(torch.float32),
        make_inputs(torch.float32),
        make_factors([1], 8, torch.float32),
    )
    plain = routed_experts(experts, *inputs, [factors])
    with torch.autocast("cpu", torch.bfloat16):
        mixed = routed_experts(experts, *inputs, [factors])
    assert 0 < relative(mixed, plain) < 0.02


@both
def test_rows_that_are_elsewhere_contribute_nothing(routed_experts):
    """Under expert parallelism an index of E means an expert on another device, with routing weight 0."""
    experts, factors = make_experts(torch.float32), make_factors([1, 3], 4, torch.float32)
    hidden, index, weights = make_inputs(torch.float32)
    elsewhere = torch.rand(index.shape, generator=torch.Generator().manual_seed(3)) < 0.4
    weights = weights.detach().masked_fill(elsewhere, 0).requires_grad_()
    expected = output_and_gradients(routed_experts, experts, hidden, index, weights, factors)
    experts._is_expert_parallel = True
    ours = output_and_gradients(routed_experts, experts, hidden, index.masked_fill(elsewhere, E), weights, factors)
    for name in ("output", "hidden", *FACTORS):
        assert relative(ours[name], expected[name]) < 1e-5, name
    assert not ours["weights"][elsewhere].any()


def test_hot_prefix_without_reading_its_length_equals_the_exact_rows():
    """What a GPU runs: all rows, hot ones first, the rest an uninitialised tail that must not leak."""
    factors = make_factors([1, 3, 6], 4, torch.float32)
    experts, (hidden, index, _) = make_experts(torch.float32), make_inputs(torch.float32)
    expert_S, order_S = torch.sort(index.reshape(-1))
    ends_E = torch.searchsorted(expert_S, torch.arange(E), right=True, out_int32=True)
    results = []
    for count_is_free in (True, False):
        hot = _HotRows(*hot_rows(expert_S, ends_E, factors.expert_ids_N, count_is_free), factors)
        x_HD = hidden.index_select(0, (order_S // K).index_select(0, hot.rows_H))
        update = torch.zeros(T * K, 2 * WIDTH).index_add(0, hot.rows_H, _up_update(x_HD, hot.groups, experts, factors))
        probe = torch.randn(update.shape, generator=torch.Generator().manual_seed(7))
        results.append([update, *torch.autograd.grad(update, [hidden, factors.A_gate_up, factors.B_gate_up], probe)])
    for exact, padded in zip(*results, strict=True):
        torch.testing.assert_close(padded, exact)


def test_grouped_linear_tail_is_zero_in_output_and_gradient():
    x = torch.full((6, 8), float("nan"))
    x[:4] = 1.0
    x.requires_grad_()
    weight = torch.ones(2, 4, 8, requires_grad=True)
    tail = (torch.arange(6) >= 4).unsqueeze(1)
    y = grouped_linear(x, weight, Groups(torch.tensor([1, 4], dtype=torch.int32), tail))
    assert torch.equal(y[:4], torch.full((4, 4), 8.0)) and not y[4:].any()
    (y * 2).sum().backward()
    assert torch.equal(x.grad[:4], torch.full((4, 8), 8.0)) and not x.grad[4:].any()
    assert torch.equal(weight.grad[:, 0, 0], torch.tensor([2.0, 6.0]))


@both
def test_dropout_keeps_the_mean_and_shares_one_mask(routed_experts):
    experts, inputs = make_experts(torch.float32), make_inputs(torch.float32)
    factors = make_factors([0, 1, 2, 3], 4, torch.float32)
    factors = replace(factors, B_down=factors.B_down * 0)  # what is left is linear in the dropped input, before act
    hidden, index, _ = inputs
    expert_S, order_S = torch.sort(index.reshape(-1))
    ends_E = torch.searchsorted(expert_S, torch.arange(E), right=True, out_int32=True)
    torch.manual_seed(0)
    with torch.no_grad():
        hot = _HotRows(*hot_rows(expert_S, ends_E, factors.expert_ids_N, True), factors)
        x_HD = hidden.index_select(0, (order_S // K).index_select(0, hot.rows_H))
        plain = _up_update(x_HD, hot.groups, experts, factors)
        dropping = replace(factors, dropout=0.5)
        draws = torch.stack([_up_update(x_HD, hot.groups, experts, dropping) for _ in range(2000)])
        assert not torch.equal(draws[0], draws[1])
        assert relative(draws.mean(0), plain) < 0.05
        # Equal gate and up factors give equal halves under one mask only.
        twin = replace(
            factors,
            A_gate_up=factors.A_gate_up[:, :4].repeat(1, 2, 1),
            B_gate_up=factors.B_gate_up[:, :WIDTH].repeat(1, 2, 1),
            dropout=0.5,
        )
        gate, up = _up_update(x_HD, hot.groups, experts, twin).chunk(2, dim=1)
        assert torch.equal(gate, up)
        cold = ~torch.isin(index, factors.expert_ids_N).any(1)
        seeded = [routed_experts(experts, *inputs, [replace(factors, dropout=p)]) for p in (0.0, 0.5)]
        assert torch.equal(seeded[0][cold], seeded[1][cold])


@both
def test_no_tokens(routed_experts):
    experts, factors = make_experts(torch.float32), make_factors([1], 4, torch.float32)
    empty = torch.zeros(0, K)
    assert routed_experts(experts, torch.zeros(0, D), empty.long(), empty, [factors]).shape == (0, D)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@both
def test_on_a_gpu_without_a_host_sync(routed_experts):
    experts, inputs, factors = make_experts(), make_inputs(), make_factors([1, 3, 6], 8)
    truth = output_and_gradients(loop, experts, *inputs, factors)
    experts = experts.to("cuda", torch.bfloat16)
    hidden, index, weights = (x.detach().cuda() for x in inputs)
    hidden, weights = hidden.bfloat16().requires_grad_(), weights.bfloat16().requires_grad_()
    moved = {name: getattr(factors, name).detach().cuda().bfloat16().requires_grad_() for name in FACTORS}
    factors = replace(factors, expert_ids_N=factors.expert_ids_N.cuda(), **moved)
    probe = torch.randn(T, D, generator=torch.Generator().manual_seed(7), dtype=torch.float64).bfloat16().cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = routed_experts(experts, hidden, index, weights, [factors])
        gradients = torch.autograd.grad(output, [hidden, weights, *moved.values()], probe)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, value in zip(["output", "hidden", "weights", *FACTORS], [output, *gradients], strict=True):
        assert relative(value.cpu(), truth[name]) < 0.03, name


@both
def test_a_frozen_A_gets_no_gradient_and_changes_no_other(routed_experts):
    experts, results = make_experts(), []
    for trains_A in (True, False):
        (hidden, index, weights), factors = make_inputs(), make_factors([1, 3, 6], 4)
        frozen = {} if trains_A else {name: getattr(factors, name).detach() for name in ("A_gate_up", "A_down")}
        factors = replace(factors, **frozen)
        leaves = [hidden, weights, factors.B_gate_up, factors.B_down]
        output = routed_experts(experts, hidden, index, weights, [factors])
        probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=output.dtype)
        results.append([output, *torch.autograd.grad(output, leaves, probe)])
        assert factors.A_down.requires_grad is trains_A
    for free, fixed in zip(*results, strict=True):
        assert torch.equal(free, fixed)
