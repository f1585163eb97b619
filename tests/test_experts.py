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
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.moe import grouped_mm_experts_forward, use_experts_implementation

from hotlora.hf.experts_view import ExpertsView, FrozenWeight
from hotlora.layer import cpu, gpu
from hotlora.layer.function import Layer, RoutedExperts, routed_experts, use_routed_layer
from hotlora.layer.updates import Full, LowRank

E, K, T, D, WIDTH = 8, 2, 40, 32, 16


def as_on_a_gpu(experts, hidden, index, weights, updates=()):
    """The layer with a GPU's products, here on the CPU, which torch makes."""
    view, updates = ExpertsView(experts), [update for update in updates if len(update.expert_ids_N)]
    tensors = [*view.tensors(), *(tensor for update in updates for tensor in update.tensors)]
    return RoutedExperts.apply(Layer(view, updates, gpu), hidden, index, weights, *tensors)


def an_expert_a_block(*args):
    """As a CPU runs it when rows are many, here on few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "BLOCK_BYTES", 1)
        return routed_experts(*args)


IMPLEMENTATIONS = {
    "all in a block": routed_experts,
    "an expert a block": an_expert_a_block,
    "as on a GPU": as_on_a_gpu,
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
) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(len(ids), parts * r, D), (len(ids), parts * WIDTH, r), (len(ids), r, WIDTH), (len(ids), D, r)]
    made = [(torch.randn(s, generator=generator, dtype=torch.float64) * 0.3).to(dtype) for s in shapes]
    A_gate_up, B_gate_up, A_down, B_down = (factor.requires_grad_() for factor in made)
    ids_N = torch.tensor(list(ids), dtype=torch.int64)
    return LowRank(ids_N, A_gate_up, B_gate_up, A_down, B_down, scaling=2.0)


def make_inputs(dtype: torch.dtype = torch.float64, seed: int = 0, index: Tensor | None = None):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    scores = torch.rand(T, E, generator=generator, dtype=torch.float64)
    top_k_index = scores.topk(K).indices if index is None else index
    weights = torch.rand(top_k_index.shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, top_k_index, weights


def loop(experts, hidden: Tensor, index: Tensor, weights: Tensor, factors: LowRank) -> Tensor:
    """One token, one choice at a time: y = sum_k w_k * expert_k(x), with every update written out."""
    slots = {expert: n for n, expert in enumerate(factors.expert_ids_N.tolist())}

    def bias_of(name: str, expert: int) -> Tensor:
        return getattr(experts, f"{name}_bias")[expert] if experts.has_bias else torch.zeros((), dtype=hidden.dtype)

    def linear(name: str, expert: int, x: Tensor) -> Tensor:
        """One projection with its update, of gate and up the gate's outputs first."""
        weight, bias = getattr(experts, name)[expert], bias_of(name, expert)
        weight, is_up, n = weight.T if experts.is_transposed else weight, name != "down_proj", slots.get(expert)
        if is_up and experts.has_gate and not experts.is_concatenated:
            weight = torch.cat([weight[0::2], weight[1::2]])
            bias = torch.cat([bias[0::2], bias[1::2]]) if experts.has_bias else bias
        if n is None:
            return weight @ x + bias
        if isinstance(factors, Full):
            return (factors.up[n] if is_up else factors.down[n]) @ x + bias
        A, B = (factors.A_gate_up[n], factors.B_gate_up[n]) if is_up else (factors.A_down[n], factors.B_down[n])
        pairs = zip(A.split(B.shape[1]), B.chunk(A.shape[0] // B.shape[1]), strict=True)
        scaling = factors.scaling[n] if isinstance(factors.scaling, Tensor) else factors.scaling
        update = torch.cat([scaling * (b @ (a @ x)) for a, b in pairs])
        scale = factors.scale_up_NPF if is_up else factors.scale_down_ND
        return weight @ x + bias + update if scale is None else scale[n] * (weight @ x + update) + bias

    rows = []
    for t in range(hidden.shape[0]):
        total = torch.zeros(D, dtype=hidden.dtype)
        for k in range(index.shape[1]):
            expert, x = int(index[t, k]), hidden[t]
            if experts.has_gate:
                gate, up = linear("gate_up_proj", expert, x).chunk(2)
                h = F.silu(gate) * up
            else:
                h = F.silu(linear("up_proj", expert, x))
            y = linear("down_proj", expert, h)
            if HAS_POST_EXPERT_NORM and experts.has_post_expert_norm:
                y = y / (y.square().mean() + 1e-6).sqrt() * experts.post_expert_norm.weight
            total = total + weights[t, k] * y
        rows.append(total)
    return torch.stack(rows)


def trained(experts, update: LowRank | Full) -> dict[str, Tensor]:
    """What has a gradient, by name: the update's, and the experts' own where they train."""
    names = ("up", "down") if isinstance(update, Full) else (*FACTORS, "scale_up_NPF", "scale_down_ND")
    of_update = {name: getattr(update, name) for name in names if getattr(update, name) is not None}
    return of_update | {name: p for name, p in experts.named_parameters() if p.requires_grad}


def output_and_gradients(function, experts, hidden, index, weights, factors) -> dict[str, Tensor]:
    leaves = {"hidden": hidden, "weights": weights} | trained(experts, factors)
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


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@both
def test_a_scaling_of_each_expert(routed_experts, dtype, tolerance):
    factors = replace(make_factors([1, 3, 6], 8, dtype), scaling=torch.tensor([2.0, 1 / 3, 5.0], dtype=torch.float64))
    experts, inputs = make_experts(dtype), make_inputs(dtype)
    ours = output_and_gradients(routed_experts, experts, *inputs, factors)
    assert_same(ours, output_and_gradients(loop, experts, *inputs, factors), tolerance)


def one_for_all(factors: LowRank) -> LowRank:
    """The same with one A of gate and up, and one B of down, of all experts: they take no room N times."""
    A_gate_up, B_down = (t[:1].detach().requires_grad_().expand_as(t) for t in (factors.A_gate_up, factors.B_down))
    assert A_gate_up.stride(0) == B_down.stride(0) == 0
    return replace(factors, A_gate_up=A_gate_up, B_down=B_down)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@both
def test_factors_that_experts_share(routed_experts, dtype, tolerance):
    experts, inputs, factors = make_experts(dtype), make_inputs(dtype), one_for_all(make_factors([1, 3, 6], 4, dtype))
    ours = output_and_gradients(routed_experts, experts, *inputs, factors)
    assert_same(ours, output_and_gradients(loop, experts, *inputs, factors), tolerance)


layouts = pytest.mark.parametrize(
    "layout", LAYOUTS, ids=lambda layout: "-".join(k for k, v in layout.items() if v) or "bare"
)


@layouts
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_every_layout_equals_the_loop_and_without_update_transformers(layout, dtype, tolerance):
    experts, inputs = make_experts_of(layout, dtype), make_inputs(dtype)
    factors = make_factors([1, 3, 6], 4, dtype, parts=2 if experts.has_gate else 1)
    zero = replace(factors, B_gate_up=factors.B_gate_up * 0, B_down=factors.B_down * 0)
    expected = output_and_gradients(loop, experts, *inputs, factors)
    for function in IMPLEMENTATIONS.values():
        assert_same(output_and_gradients(function, experts, *inputs, factors), expected, tolerance)
        if dtype != torch.float64:  # which transformers' grouped_mm refuses
            found, base = function(experts, *inputs, [zero]), grouped_mm_experts_forward(experts, *inputs)
            # A vector unit rounds leftovers otherwise, and with these 16 wide experts they depend on the block.
            assert torch.equal(found, base) or (function is an_expert_a_block and relative(found, base) < 1e-6)


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
        use_routed_layer(model)
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


def hot_rows(products, update, index, dtype=torch.float64):
    """All rows, and those of the update's experts, as a pass has them."""
    seeds = [products.seeded(3)] * 3
    run = update.in_pass([tensor.detach() for tensor in update.tensors], dtype, seeds)
    (rows,) = products.Rows.blocks(E, index, 1, True)
    return run, rows, products.Hot(rows, run)


@pytest.mark.parametrize("products", [cpu, gpu])
def test_what_is_not_hot_is_zero_and_never_read(products):
    """Rows of cold experts, and of experts elsewhere; on a CPU they hold NaN, and none of it comes through."""
    index = make_inputs()[1].clone()
    index[::5, 0] = E  # elsewhere
    run, rows, hot = hot_rows(products, make_factors([1, 3, 6]), index)
    experts = index.reshape(-1)[rows.order_S]
    is_hot = torch.isin(experts, run.expert_ids_N)
    x = torch.randn(len(experts), D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if products is cpu:
        x[~is_hot] = torch.nan
    (A_up,) = hot.weights(run.A_up)
    z = hot.product(hot.rows(x), A_up, 2.0)
    y = torch.zeros(len(experts), 8, dtype=torch.float64)
    hot.add(y, z)
    for s, expert in enumerate(experts.tolist()):
        expected = 2 * run.A_up[[1, 3, 6].index(expert)] @ x[s] if is_hot[s] else torch.zeros(8).double()
        torch.testing.assert_close(y[s], expected)
    sums = torch.zeros(3, 8, D, dtype=torch.float64)
    hot.outer(sums, z, hot.rows(x))
    for n, expert in enumerate([1, 3, 6]):
        torch.testing.assert_close(sums[n], y[experts == expert].T @ x[experts == expert])
    before = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    after = before.clone()
    hot.add_product(after, z, A_up.transpose(1, 2))
    assert torch.equal(after[~is_hot], before[~is_hot]) and not torch.equal(after[is_hot], before[is_hot])


@pytest.mark.parametrize("products", [cpu, gpu])
def test_gate_and_up_share_one_mask(products):
    """Equal gate and up factors give equal halves under one mask only."""
    factors = make_factors([0, 1, 2, 3], 4)
    A, B = factors.A_gate_up[:, :4].repeat(1, 2, 1), factors.B_gate_up[:, :WIDTH].repeat(1, 2, 1)
    hidden, index, _ = make_inputs()
    halves = []
    for p in (0.5, 0.0):
        run, rows, hot = hot_rows(products, replace(factors, A_gate_up=A, B_gate_up=B, dropout=p), index)
        gate, up = parts = torch.zeros(2, T * K, WIDTH, dtype=torch.float64)
        run.up(hot, parts, hidden.detach()[rows.token_S])
        assert torch.equal(gate, up)
        halves.append(gate)
    assert not torch.allclose(*halves)


@both
def test_dropout_keeps_the_mean_and_leaves_cold_experts_alone(routed_experts):
    """In linear experts, where the output's mean over masks is the output without dropout."""
    experts, inputs = make_experts_of({"has_gate": False}), make_inputs()
    experts.act_fn = nn.Identity()
    factors = make_factors([0, 1, 2, 3], 4, parts=1)
    dropping = replace(factors, dropout=0.5)
    torch.manual_seed(0)
    with torch.no_grad():
        base = routed_experts(experts, *inputs)
        plain = routed_experts(experts, *inputs, [factors])
        draws = torch.stack([routed_experts(experts, *inputs, [dropping]) for _ in range(200)])
    cold = ~torch.isin(inputs[1], factors.expert_ids_N).any(1)
    assert torch.equal(draws[0][cold], base[cold]) and not torch.equal(draws[0], draws[1])
    assert (draws.mean(0) - plain).norm() < 0.25 * (plain - base).norm()


def make_dora(ids: Sequence[int], parts: int) -> LowRank:
    factors, generator = make_factors(ids, parts=parts), torch.Generator().manual_seed(4)
    up, down = (torch.rand(len(ids), n, generator=generator, dtype=torch.float64) + 0.5 for n in (parts * WIDTH, D))
    return replace(factors, scale_up_NPF=up.requires_grad_(), scale_down_ND=down.requires_grad_())


def make_full(ids: Sequence[int], parts: int) -> Full:
    generator = torch.Generator().manual_seed(6)
    shapes = [(len(ids), parts * WIDTH, D), (len(ids), D, WIDTH)]
    up, down = (torch.randn(s, generator=generator, dtype=torch.float64) * 0.3 for s in shapes)
    return Full(torch.tensor(list(ids)), up.requires_grad_(), down.requires_grad_())


@layouts
@pytest.mark.parametrize("make", [make_dora, make_full])
def test_dora_and_full_experts_equal_the_loop(make, layout):
    experts, inputs = make_experts_of(layout), make_inputs()
    update = make([1, 3, 6], 2 if experts.has_gate else 1)
    expected = output_and_gradients(loop, experts, *inputs, update)
    for function in IMPLEMENTATIONS.values():
        assert_same(output_and_gradients(function, experts, *inputs, update), expected, 1e-10)


@pytest.mark.parametrize(
    "layout",
    [{}, {"is_transposed": True, "is_concatenated": False, "has_bias": True}]
    + [{"has_post_expert_norm": True}] * HAS_POST_EXPERT_NORM,
    ids=str,
)
@pytest.mark.parametrize("make", [make_factors, make_dora])
def test_weights_of_the_base_that_train_get_the_loops_gradients(make, layout):
    """All of them: biases and the norm's weight, too, and beside an update."""
    experts, (hidden, index, weights) = make_experts_of(layout).requires_grad_(True), make_inputs()
    inputs = hidden[:12].detach().requires_grad_(), index[:12], weights[:12].detach().requires_grad_()
    update = make([1, 3, 6], parts=2 if experts.has_gate else 1)
    expected = output_and_gradients(loop, experts, *inputs, update)
    assert {"down_proj", "gate_up_proj"} <= expected.keys()
    for function in IMPLEMENTATIONS.values():
        assert_same(output_and_gradients(function, experts, *inputs, update), expected, 1e-10)


@both
def test_what_two_adapters_do_to_the_base_adds_up(routed_experts):
    """DoRA and weights of their own, as PEFT has it: each adds what it changes of the base, into linear experts."""
    experts, inputs = make_experts_of({"has_gate": False}), make_inputs()
    experts.act_fn = nn.Identity()
    one = replace(make_dora([1, 3], 1), scale_up_NPF=torch.ones(2, WIDTH, dtype=torch.float64))
    one = replace(one, B_gate_up=one.B_gate_up * 0)
    other = make_full([3, 6], 1)
    other = replace(other, up=ExpertsView(experts).weights_of([3, 6])[0])
    base, first, second = (routed_experts(experts, *inputs, updates) for updates in ([], [one], [other]))
    both = routed_experts(experts, *inputs, [one, other])
    assert relative(both - base, (first - base) + (second - base)) < 1e-10
    assert relative(both, first) > 0.01 and relative(both, second) > 0.01


@both
def test_weights_changed_between_forward_and_backward_are_noticed(routed_experts):
    """As autograd does for all that it keeps: an optimizer step or a merge in between would give wrong gradients."""
    for change in (lambda e, f: e.down_proj.mul_(2), lambda e, f: f.B_down.mul_(2)):
        experts, inputs, factors = make_experts(torch.float32), make_inputs(torch.float32), make_factors([1], 4)
        output = routed_experts(experts, *inputs, [factors])
        with torch.no_grad():
            change(experts, factors)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_cpu_compiles_few_shapes_in_half_precision(dtype):
    """oneDNN keeps what it compiled of each number of rows; float32's library compiles nothing."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(E, D, D, generator=generator).to(dtype)
    shapes, exact = set(), set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket is torch.ops.aten.mm:
                shapes.add(args[0].shape[0])
            return func(*args, **(kwargs or {}))

    for _ in range(8):
        index_TK = torch.randint(E, (400, K), generator=generator)
        x_SD = torch.randn(400 * K, D, generator=generator).to(dtype)
        for rows in cpu.Rows.blocks(E, index_TK, 2**22 // 300, is_partial=False):
            x = x_SD.index_select(0, rows.order_S)
            with Watch():
                y = rows.product(x, FrozenWeight(weight, is_transposed=False))
            for expert, a, b in rows.by_expert:
                exact.add(b - a)
                torch.testing.assert_close(y[a:b], x[a:b] @ weight[expert].T)
    assert len(exact) > 30
    assert len(shapes) <= 8 if dtype == torch.bfloat16 else shapes == exact
