"""Each kernel of the fused layer against its plain oracle: by Triton's interpreter, or on a GPU where there is one."""

import pytest
import torch
from test_experts import relative
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed (pip install triton): its kernels are not tested")

from test_kernels import DEVICE

from hotlora.layer.kernels import launch as launching
from hotlora.layer.kernels.activation import Factors, Gate, activation, plain_activation
from hotlora.layer.kernels.activation_backward import activation_backward, plain_activation_backward
from hotlora.layer.kernels.combine import combine, plain_combine
from hotlora.layer.kernels.gram import Side, gram, plain_gram
from hotlora.layer.kernels.product import Low, Order, Thin, plain_product, product
from hotlora.layer.kernels.sort import counting_sort, plain_sort

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
GATES = {
    "silu": Gate("silu"),
    "gelu interleaved": Gate("gelu", is_interleaved=True),
    "gelu_tanh": Gate("gelu_tanh"),
    "relu2 ungated": Gate("relu2", is_gated=False),
    "gpt_oss": Gate("gpt_oss", is_interleaved=True, alpha=1.702, limit=1.5),
}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""of one rounding of what is read and of the result; the interpreter cuts bfloat16 off"""
T, K, D, F, R = 13, 3, 40, 24, 5


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def make_order(num_experts: int = 7, used: tuple[int, ...] = (1, 2, 4), away: int = 0) -> Order:
    """Rows of the experts `used` alone, the first of which has most; `away` have no expert."""
    chosen = torch.randint(len(used) + 2, (T, K), generator=torch.Generator().manual_seed(1)).clamp(max=len(used) - 1)
    index_TK = torch.tensor(used[::-1])[chosen]
    index_TK.view(-1)[:away] = num_experts
    return Order(*counting_sort(index_TK.to(DEVICE), num_experts), K)


def make_factors(parts: int, dtype: torch.dtype = torch.float32, p: float = 0.0, r: int = R) -> Factors:
    """Of two experts with rows, and one without."""
    ids = torch.tensor([2, 3, 4], device=DEVICE)
    shapes = (3, parts * r, D), (3, parts * F, r), (3, r, F), (3, D, r)
    A_up, B_up, A_down, B_down = (randn(*shape, dtype=dtype, seed=10 + i) for i, shape in enumerate(shapes))
    return Factors(ids, A_up, B_up, A_down, B_down, 0.5, p, up_seed=2**40 + 7, down_seed=3)


def hot_rows(order: Order, factors: Factors) -> Tensor:
    return (launching.plain_slots(factors.ids_N, order.ends_E, len(order.order_S)) >= 0)[:, None]


def assert_close(ours: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert ours.shape == expected.shape and not ours.isnan().any()
    assert relative(ours, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize(("num_experts", "used"), [(7, (1, 2, 4)), (1, (0,)), (256, (0, 77, 200, 255)), (3, (0, 1, 2))])
@pytest.mark.parametrize("away", [0, 5])
def test_sort(num_experts, used, away):
    index_TK = torch.tensor(used)[torch.randint(len(used), (T, K), generator=torch.Generator().manual_seed(2))]
    index_TK.view(-1)[3 : 3 + away] = num_experts
    index_TK = index_TK.to(DEVICE)
    for ours, expected in zip(counting_sort(index_TK, num_experts), plain_sort(index_TK, num_experts), strict=True):
        assert ours.dtype == torch.int32 and torch.equal(ours, expected)


@dtypes
def test_combine(dtype):
    order, y = make_order(), randn(T * K, 70, dtype=dtype)
    assert_close(combine(y, order.place_S, K), plain_combine(y, order.place_S, K), dtype)


@dtypes
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("transposed", [False, True])
def test_product_that_gathers_and_has_a_thin_one_beside_it(dtype, p, transposed):
    """float32 factors beside whatever the base has; biases; dots; rows of no expert."""
    order, factors = make_order(away=4), make_factors(2)
    weight = randn(7, D, 2 * F, dtype=dtype, seed=3).transpose(1, 2) if transposed else randn(7, 2 * F, D, dtype=dtype)
    thin = Thin(factors.ids_N, factors.A_up.to(dtype).float(), 0.5, p, factors.up_seed)
    bias, dot = randn(7, 2 * F, dtype=dtype, seed=4), randn(7, D, dtype=dtype, seed=5)
    arguments = (randn(T, D, dtype=dtype, seed=6), weight, order)
    options = {"gather": True, "thin": thin, "bias_EO": bias, "dot_EI": dot}
    (y, z, dots), (plain_y, plain_z, plain_dots) = product(*arguments, **options), plain_product(*arguments, **options)
    is_hot = hot_rows(order, factors)
    assert_close(y, plain_y, dtype)
    assert_close(torch.where(is_hot, z, 0), plain_z, dtype)
    assert_close(dots, plain_dots, dtype)
    assert not y[-4:].any() and not dots[-4:].any()


@dtypes
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_product_that_adds_an_update_and_applies_routing_weights(dtype, p):
    """z of cold rows is NaN: it is not read."""
    order, factors = make_order(), make_factors(2)
    z = torch.where(hot_rows(order, factors), randn(T * K, R, dtype=dtype, seed=1), float("nan"))
    low = Low(factors.ids_N, z, factors.B_down.to(dtype).float(), p, factors.down_seed)
    arguments = (randn(T * K, F, dtype=dtype, seed=6), randn(7, D, F, dtype=dtype), order)
    options = {"low": low, "bias_EO": randn(7, D, dtype=dtype, seed=4), "weights_S": randn(T * K, dtype=dtype, seed=8)}
    (y, _, _), (expected, _, _) = product(*arguments, **options), plain_product(*arguments, **options)
    assert_close(y, expected, dtype)


@pytest.mark.parametrize(("num_experts", "used"), [(1, (0,)), (256, (0, 77, 200, 255))])
def test_product_of_one_expert_and_of_256(num_experts, used):
    order = make_order(num_experts, used)
    ids = torch.tensor(used, device=DEVICE)
    thin = Thin(ids, randn(len(used), R, D, seed=1), 2.0)
    arguments = (randn(T, D, seed=2), randn(num_experts, F, D, seed=3), order)
    for ours, expected in zip(
        product(*arguments, gather=True, thin=thin)[:2],
        plain_product(*arguments, gather=True, thin=thin)[:2],
        strict=True,
    ):
        assert_close(ours, expected, torch.float32)


def up_and_z(order: Order, gate: Gate, factors: Factors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    parts = 2 if gate.is_gated else 1
    z = torch.where(hot_rows(order, factors), randn(T * K, parts * R, dtype=dtype, seed=2), float("nan"))
    return randn(T * K, parts * F, dtype=dtype, seed=1), z


CASES = [(name, torch.float32, 0.0) for name in GATES] + [("silu", dtype, 0.4) for dtype in DTYPES]
cases = pytest.mark.parametrize(("name", "dtype", "p"), CASES, ids=lambda v: str(v).removeprefix("torch."))


@cases
def test_activation(name, dtype, p):
    order, gate = make_order(), GATES[name]
    factors = make_factors(2 if gate.is_gated else 1, p=p)
    up, z = up_and_z(order, gate, factors, dtype)
    act, z_down = activation(up, gate, order, z, factors)
    expected, expected_z = plain_activation(up, gate, order, z, factors)
    assert_close(act, expected, dtype)
    assert_close(torch.where(hot_rows(order, factors), z_down, 0), expected_z, dtype)
    alone, nothing = activation(up, gate, order)
    assert nothing is None
    assert_close(alone, gate.of(up.float()), dtype)


@cases
def test_activation_backward(name, dtype, p):
    order, gate = make_order(), GATES[name]
    factors = make_factors(2 if gate.is_gated else 1, p=p)
    up, z = up_and_z(order, gate, factors, dtype)
    is_hot = hot_rows(order, factors)
    g = torch.where(is_hot, randn(T * K, R, dtype=dtype, seed=3), float("nan"))
    arguments = (randn(T * K, F, dtype=dtype, seed=4), up, randn(T * K, dtype=dtype, seed=5), gate, order)
    options = {"dots_S": randn(T * K, seed=6), "z_up_SPR": z, "g_down_SR": g, "factors": factors}
    ours, expected = activation_backward(*arguments, **options), plain_activation_backward(*arguments, **options)
    assert_close(ours.dup_SPF, expected.dup_SPF, dtype)
    assert_close(ours.dweight_S, expected.dweight_S, dtype)
    assert_close(torch.where(is_hot, ours.act_SF, 0), expected.act_SF, dtype)
    assert_close(torch.where(is_hot, ours.g_SPR, 0), expected.g_SPR, dtype)
    ours, expected = activation_backward(*arguments), plain_activation_backward(*arguments)
    assert_close(ours.dup_SPF, expected.dup_SPF, dtype)
    assert_close(ours.dweight_S, expected.dweight_S, dtype)


@dtypes
@pytest.mark.parametrize("case", ["thin left", "thin right", "gate and up", "interleaved"])
def test_gram(dtype, case):
    """Cold experts' rows are NaN: they are not read. The expert without a row gets zeros."""
    order, factors = make_order(), make_factors(2)
    is_hot = hot_rows(order, factors)
    thin = torch.where(is_hot, randn(T * K, R, dtype=dtype, seed=1), float("nan"))
    wide = torch.where(is_hot, randn(T * K, 2 * F, dtype=dtype, seed=2), float("nan"))
    x, weights = randn(T, D, dtype=dtype, seed=3), randn(T * K, dtype=dtype, seed=4)
    thin_twice = torch.cat([thin, thin.flip(0).nan_to_num(1.0)], 1)
    arguments, options = {
        "thin left": ((Side(thin), Side(x, True)), {"p": 0.4, "seed": 2**50}),
        "thin right": ((Side(x, True), Side(thin)), {"weights_S": weights}),
        "gate and up": ((Side(wide), Side(thin_twice)), {"parts": 2}),
        "interleaved": ((Side(wide), Side(thin_twice)), {"parts": 2, "interleaved": True}),
    }[case]
    ours = gram(*arguments, order, factors.ids_N, torch.float32, **options)
    expected = plain_gram(*arguments, order, factors.ids_N, torch.float32, **options)
    assert ours.dtype == torch.float32 and not ours[1].any()
    assert_close(ours, expected, dtype)


def test_about_p_of_the_values_are_dropped():
    x = torch.ones(500, 400)
    kept = launching.plain_drop(x, torch.arange(500), 0.3, 2**61 + 5)
    assert abs(float((kept == 0).float().mean()) - 0.3) < 0.005 and abs(float(kept.mean()) - 1) < 0.01
    other = launching.plain_drop(x, torch.arange(500), 0.3, 2**61 + 6)
    assert abs(float(((kept == 0) & (other == 0)).float().mean()) - 0.09) < 0.005
