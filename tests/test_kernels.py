"""Our Triton kernels against plain products: on a GPU where there is one, else on the CPU by Triton's interpreter."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_experts import (
    FACTORS,
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
    output_and_gradients,
    relative,
)
from torch import Tensor

from hotlora import HotLoraError
from hotlora.hf.experts_view import ExpertsView
from hotlora.layer import gpu
from hotlora.layer.function import Layer, RoutedExperts

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        pytest.skip("Triton was imported to compile, not to interpret: set TRITON_INTERPRET=1", allow_module_level=True)
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="Triton is not installed (pip install triton): its kernels are not tested")

from hotlora.layer.kernels import gemm  # noqa: E402

# float16 and bfloat16: one rounding of the result, and of z in between. The interpreter cuts bfloat16 off.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setenv("HOTLORA_KERNELS", "triton")


# The rows of each group, and rows of no group after them. A block has 16 rows under the interpreter.
SIZES = {
    "some are empty": ([0, 5, 0, 0, 17, 16, 0], 0),
    "one has all": ([0, 0, 61, 0], 0),
    "rows of no group": ([3, 0, 20], 9),
    "no group has a row": ([0, 0], 7),
    "one group": ([33], 2),
}
CASES = [(name, torch.float32) for name in SIZES] + [
    ("some are empty", dtype) for dtype in (torch.float16, torch.bfloat16)
]
cases = pytest.mark.parametrize(("case", "dtype"), CASES, ids=lambda v: str(v).removeprefix("torch."))


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def ends_of(sizes: list[int]) -> Tensor:
    return torch.tensor(sizes, device=DEVICE).cumsum(0, dtype=torch.int32)


def spans(ends: Tensor) -> list[tuple[int, int]]:
    return list(zip([0, *ends.tolist()], ends.tolist(), strict=False))


def plain_gemm(x, weight, ends, slot=None, *, row_S=None, add_to_SO=None, scaling=1.0):
    x = x if row_S is None else x[row_S]
    y = torch.zeros(len(x), weight.shape[1], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for group, (a, b) in enumerate(spans(ends)):
        n = group if slot is None else int(slot[group])
        if n >= 0:
            y[a:b] = scaling * x[a:b].to(y.dtype) @ weight[n].to(y.dtype).T
    return y.to(x.dtype) if add_to_SO is None else add_to_SO.copy_(add_to_SO + y)


def plain_outer(y, x, ends, groups=None, *, row_S=None):
    x = x if row_S is None else x[row_S]
    of = spans(ends)
    ids = range(len(of)) if groups is None else groups.tolist()
    return torch.stack([y[of[g][0] : of[g][1]].T @ x[of[g][0] : of[g][1]] for g in ids])


@cases
def test_grouped_gemm(case, dtype):
    """Widths that are no multiples of a block; weights in either order; a tail of NaN, which must not leak."""
    sizes, tail = SIZES[case]
    x = randn(sum(sizes) + tail, 40, dtype=dtype)
    x[sum(sizes) :] = float("nan")
    weight = randn(len(sizes), 40, 72, dtype=dtype, seed=1).transpose(1, 2)
    expected = plain_gemm(x.float(), weight.float(), ends_of(sizes))
    for laid_out in (weight, weight.contiguous()):
        y = gemm.grouped_gemm(x, laid_out, ends_of(sizes))
        assert y.dtype == dtype and not y[sum(sizes) :].any()
        assert relative(y, expected) <= TOLERANCE[dtype]


def test_groups_with_slots_rows_by_index_and_a_sum_in_place():
    ends, slots = ends_of([5, 0, 20, 7, 9]), torch.tensor([-1, 0, 2, -1, 1], dtype=torch.int32, device=DEVICE)
    x, weight = randn(11, 40), randn(3, 24, 40, seed=1)
    rows = torch.randint(11, (44,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    y = gemm.grouped_gemm(x, weight, ends, slots, row_S=rows, scaling=0.5)
    assert relative(y, plain_gemm(x, weight, ends, slots, row_S=rows, scaling=0.5)) < 1e-6
    assert not y[:5].any() and not y[25:32].any() and not y[41:].any()
    # Into every second column of what is there, as gpt_oss has its gate.
    there = randn(44, 48, seed=3)
    expected = there.clone()
    plain_gemm(x, weight, ends, slots, row_S=rows, scaling=0.5, add_to_SO=expected[:, 1::2])
    gemm.grouped_gemm(x, weight, ends, slots, row_S=rows, scaling=0.5, add_to_SO=there[:, 1::2])
    torch.testing.assert_close(there, expected)
    assert torch.equal(there[:, 0::2], randn(44, 48, seed=3)[:, 0::2]) and torch.equal(there[:5], expected[:5])


@cases
def test_grouped_outer(case, dtype):
    sizes, tail = SIZES[case]
    y, x, ends = randn(sum(sizes) + tail, 24, dtype=dtype), randn(50, 40, dtype=dtype, seed=1), ends_of(sizes)
    rows = torch.randint(50, (len(y),), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    ids = torch.arange(len(sizes), device=DEVICE)[::2].contiguous()
    ours = gemm.grouped_outer(y, x, ends, ids, row_S=rows)
    assert ours.dtype == dtype
    assert relative(ours, plain_outer(y.float(), x.float(), ends, ids, row_S=rows)) <= TOLERANCE[dtype]
    everyone = gemm.grouped_outer(y, x[rows], ends)
    assert relative(everyone, plain_outer(y.float(), x[rows].float(), ends)) <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("case", "parts", "r", "dtype"),
    [
        ("some are empty", 2, 8, torch.float32),
        ("some are empty", 2, 32, torch.float16),
        ("some are empty", 1, 32, torch.bfloat16),
        ("one has all", 2, 16, torch.float32),
        ("rows of no group", 1, 32, torch.float32),
        ("no group has a row", 2, 16, torch.float32),
        ("one group", 2, 32, torch.float32),
    ],
)
def test_low_rank_beside_the_weights(case, parts, r, dtype):
    """Forward with gate and up apart, and the gradient of x, for which A and B change places."""
    (sizes, tail), tolerance = SIZES[case], TOLERANCE[dtype]
    slots = torch.arange(len(sizes), dtype=torch.int32, device=DEVICE)
    slots = torch.where(slots % 2 == (len(sizes) > 1), slots // 2, -1).to(torch.int32)
    groups, of = len(sizes), max(1, len(sizes) // 2 + 1)
    width, expert_width = 40, 24
    x, ends = randn(sum(sizes) + tail, width, dtype=dtype), ends_of(sizes)
    weight = randn(groups, parts * expert_width, width, dtype=dtype, seed=1)
    A, B = randn(of, parts * r, width, dtype=dtype, seed=2), randn(of, parts * expert_width, r, dtype=dtype, seed=3)

    y, z = gemm.grouped_gemm_low_rank(x, weight, ends, gemm.LowRank(A, B, slots, 0.5), with_z=True)
    z_expected = plain_gemm(x.float(), A.float(), ends, slots)
    updates = [
        plain_gemm(z_part, B_part, ends, slots, scaling=0.5)
        for z_part, B_part in zip(z_expected.chunk(parts, 1), B.float().chunk(parts, 1), strict=True)
    ]
    expected = plain_gemm(x.float(), weight.float(), ends) + torch.cat(updates, 1)
    assert relative(y, expected) <= tolerance and relative(z, z_expected) <= tolerance

    back = gemm.LowRank(B.transpose(1, 2), A.transpose(1, 2), slots, 0.5)
    dx, z = gemm.grouped_gemm_low_rank(y, weight.transpose(1, 2), ends, back, with_z=True)
    pairs = list(zip(y.float().chunk(parts, 1), B.float().chunk(parts, 1), A.float().chunk(parts, 1), strict=True))
    z_parts = [plain_gemm(y_part, B_part.transpose(1, 2), ends, slots) for y_part, B_part, _ in pairs]
    expected = plain_gemm(y.float(), weight.float().transpose(1, 2), ends)
    for z_part, (_, _, A_part) in zip(z_parts, pairs, strict=True):
        expected += plain_gemm(z_part, A_part.transpose(1, 2), ends, slots, scaling=0.5)
    assert relative(dx, expected) <= tolerance and relative(z, torch.cat(z_parts, 1)) <= tolerance
    without = gemm.grouped_gemm_low_rank(y, weight.transpose(1, 2), ends, back)
    assert torch.equal(without[0], dx) and without[1] is None


def on_device(x):
    if isinstance(x, Tensor):
        return x.detach().to(DEVICE).requires_grad_(x.requires_grad)
    return replace(x, expert_ids_N=x.expert_ids_N.to(DEVICE), **{n: on_device(getattr(x, n)) for n in FACTORS})


def layer(experts, hidden, index, weights, factors):
    """The whole layer as a GPU runs it, with our kernels."""
    view = ExpertsView(experts)
    tensors = [*view.tensors(), *(tensor for f in factors for tensor in f.tensors)]
    return RoutedExperts.apply(Layer(view, factors, gpu), hidden, index, weights, *tensors)


def layer_and_reference(experts, inputs, factors):
    """On the device, and on the CPU by the plain reference."""
    expected = output_and_gradients(loop, experts, *inputs, factors)
    ours = output_and_gradients(layer, experts.to(DEVICE), *map(on_device, inputs), on_device(factors))
    return {name: value.cpu() for name, value in ours.items()}, expected


@pytest.mark.parametrize(
    "layout",
    [
        {"has_bias": True, "is_transposed": True, "is_concatenated": False},
        {"has_gate": False},
        {"has_gate": False, "is_transposed": True, "has_bias": True},
        {},
    ],
    ids=lambda layout: " ".join(f"{k}={v}" for k, v in layout.items()) or "olmoe",
)
def test_the_layer_with_our_kernels_equals_the_plain_one(layout):
    experts, inputs = make_experts_of(layout, torch.float32), make_inputs(torch.float32)
    factors = make_factors([1, 3, 6], 8, torch.float32, parts=2 if experts.has_gate else 1)
    assert_same(*layer_and_reference(experts, inputs, factors), 1e-5)


@pytest.mark.parametrize(("ids", "r"), [([0, 1, 2], 32), ([1, 5], 16), ([5, 7], 8)])
def test_the_layer_where_two_experts_have_all_rows(ids, r):
    """Both adapted, one of them, and none."""
    inputs = make_inputs(torch.float32, index=torch.tensor([[0, 1]]).expand(T, K).contiguous())
    ours, expected = layer_and_reference(make_experts(torch.float32), inputs, make_factors(ids, r, torch.float32))
    assert_same(ours, expected, 1e-5)
    for slot, expert in enumerate(ids):
        assert bool(ours["A_down"][slot].any()) == (expert in (0, 1))


def test_the_layer_with_rows_of_experts_on_other_devices():
    experts, (hidden, index, weights) = make_experts(torch.float32), make_inputs(torch.float32)
    away = torch.rand(index.shape, generator=torch.Generator().manual_seed(3)) < 0.4
    weights, factors = weights.detach().masked_fill(away, 0).requires_grad_(), make_factors([1, 3], 8, torch.float32)
    expected = output_and_gradients(loop, experts, hidden, index, weights, factors)
    expected["weights"].masked_fill_(away, 0)
    experts._is_expert_parallel = True
    inputs = map(on_device, (hidden, index.masked_fill(away, E), weights))
    ours = output_and_gradients(layer, experts.to(DEVICE), *inputs, on_device(factors))
    assert_same({name: value.cpu() for name, value in ours.items()}, expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_within_the_loops_own_error(dtype):
    experts, inputs, factors = make_experts(dtype), make_inputs(dtype), make_factors([1, 3, 6], 16, dtype)
    exact = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in inputs]
    exact_factors = replace(factors, **{n: getattr(factors, n).detach().double().requires_grad_() for n in FACTORS})
    truth = output_and_gradients(loop, make_experts(dtype).double(), *exact, exact_factors)
    of_loop = output_and_gradients(loop, experts, *inputs, factors)
    ours, _ = layer_and_reference(experts, inputs, factors)
    # The interpreter rounds to bfloat16 by cutting bits off.
    allowed = 1.1 if ON_GPU or dtype == torch.float16 else 3
    for name, value in truth.items():
        assert relative(ours[name], value) <= allowed * relative(of_loop[name], value), name


def test_zero_B_adds_nothing_bit_for_bit():
    experts, inputs = make_experts(torch.bfloat16).to(DEVICE), list(map(on_device, make_inputs(torch.bfloat16)))
    factors = on_device(make_factors([1, 3, 6], 16, torch.bfloat16))
    zero = replace(factors, B_gate_up=factors.B_gate_up * 0, B_down=factors.B_down * 0)
    assert torch.equal(layer(experts, *inputs, [zero]), layer(experts, *inputs, []))


def dropping_gradients(seed: int, dtype: torch.dtype):
    experts, (hidden, index, weights) = make_experts(dtype).to(DEVICE), map(on_device, make_inputs(dtype))
    factors = replace(on_device(make_factors([1, 3, 6], 8, dtype)), dropout=0.3)
    leaves = [hidden, weights, *(getattr(factors, name) for name in FACTORS)]
    probe = randn(T, D, seed=7).to(dtype)

    def loss():
        torch.manual_seed(seed)
        return (layer(experts, hidden, index, weights, [factors]) * probe).sum()

    return leaves, loss, torch.autograd.grad(loss(), leaves)


def test_dropout_by_our_kernels_is_that_of_plain_products(monkeypatch):
    _, loss, ours = dropping_gradients(0, torch.float32)
    value = loss()
    monkeypatch.setattr(gpu, "_gemm", lambda: SimpleNamespace(grouped_gemm=plain_gemm, grouped_outer=plain_outer))
    _, loss, expected = dropping_gradients(0, torch.float32)
    torch.testing.assert_close(value, loss())
    for a, b in zip(ours, expected, strict=True):
        assert relative(a, b) < 1e-5
    assert not torch.equal(dropping_gradients(1, torch.float32)[2][0], expected[0])


def test_gradients_with_dropout_are_those_of_the_function_that_was_computed(monkeypatch):
    """Of what calls the kernels, in float64, which they do not take: plain products stand in."""
    monkeypatch.setattr(gpu, "_gemm", lambda: SimpleNamespace(grouped_gemm=plain_gemm, grouped_outer=plain_outer))
    monkeypatch.setattr(gpu, "use_kernels", lambda x, is_thin=False: True)
    leaves, loss, gradients = dropping_gradients(0, torch.float64)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        direction, step = randn(*leaf.shape, seed=5).double(), 1e-6
        with torch.no_grad():
            leaf += step * direction
            above = loss()
            leaf -= 2 * step * direction
            below = loss()
            leaf += step * direction
        torch.testing.assert_close((above - below) / (2 * step), (gradient * direction).sum(), rtol=1e-5, atol=1e-5)


def test_a_compiled_layer_calls_our_kernels(monkeypatch):
    experts, inputs, factors = (
        make_experts(torch.float32),
        make_inputs(torch.float32),
        make_factors([1, 3], 8, torch.float32),
    )
    expected = output_and_gradients(loop, experts, *inputs, factors)
    calls, grouped_gemm = [], gemm.grouped_gemm
    monkeypatch.setattr(
        gemm, "grouped_gemm", lambda *args, **options: calls.append(args) or grouped_gemm(*args, **options)
    )
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    ours = output_and_gradients(compiled, experts.to(DEVICE), *map(on_device, inputs), on_device(factors))
    assert_same({name: value.cpu() for name, value in ours.items()}, expected, 1e-5)
    assert calls


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu_nothing_waits(dtype):
    """After a first run, in which block sizes are timed."""
    experts, inputs = make_experts(dtype).to(DEVICE), list(map(on_device, make_inputs(dtype)))
    factors = on_device(make_factors([1, 3, 6], 16, dtype))
    leaves = [inputs[0], inputs[2], *(getattr(factors, name) for name in FACTORS)]
    probe = randn(T, D, dtype=dtype)
    torch.autograd.grad(layer(experts, *inputs, [factors]), leaves, probe)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(layer(experts, *inputs, [factors]), leaves, probe)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_tokens():
    experts, factors, empty = make_experts(torch.float32), make_factors([1], 8, torch.float32), torch.zeros(0, K)
    arguments = (torch.zeros(0, D, requires_grad=True), empty.long(), empty)
    output = layer(experts.to(DEVICE), *map(on_device, arguments), [on_device(factors)])
    assert output.shape == (0, D)
    output.sum().backward()


def test_which_products_are_ours(monkeypatch):
    """torch's where it has one kernel; ours where it would loop over groups and ask the device for each length."""
    capability = (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")

    def ours(device=cuda, is_thin=False):
        dtypes = (torch.bfloat16, torch.float16, torch.float32)
        return [gpu.use_kernels(SimpleNamespace(device=device, dtype=dtype), is_thin) for dtype in dtypes]

    assert ours() == [True, True, True]
    assert not gpu.use_kernels(SimpleNamespace(device=cuda, dtype=torch.float64))
    monkeypatch.delenv("HOTLORA_KERNELS")
    assert ours() == [True, True, True] and ours(cpu) == [False, False, False]
    for capability, expected in {
        (7, 5): [False, False, False],
        (8, 9): [True, True, True],
        (9, 0): [False, True, True],
        (10, 0): [False, True, True],
        (12, 0): [True, True, True],
    }.items():
        assert ours() == expected, capability
        assert ours(is_thin=True) == [capability >= (8, 0)] * 3
    monkeypatch.setattr(gpu, "_has_triton", lambda: False)
    assert ours() == [False, False, False]
    monkeypatch.setenv("HOTLORA_KERNELS", "triton")
    with pytest.raises(HotLoraError, match="pip install triton"):
        ours()
    monkeypatch.setenv("HOTLORA_KERNELS", "torch")
    assert ours() == [False, False, False]
    monkeypatch.setenv("HOTLORA_KERNELS", "cuda")
    with pytest.raises(HotLoraError, match="'cuda': it must be torch, triton or fused"):
        ours()


def run_script(*command: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *command], cwd=Path(__file__).parent.parent, env=os.environ | environment, capture_output=True
    )
    assert result.returncode == 0, result.stderr.decode()[-2000:]
    return result.stdout.decode()


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_a_gpu(capability):
    lines = run_script("tests/compiled_kernels.py", str(capability), TRITON_INTERPRET="0").splitlines()
    kernels = [json.loads(line) for line in lines]
    assert [k["kernel"] for k in kernels] == ["_linear_kernel", "_outer_kernel", "_low_rank_kernel", "_low_rank_kernel"]
    for kernel in kernels:
        assert kernel["tensor_cores"] and kernel["machine_code"], kernel
        assert kernel["shared"] <= {80: 163, 90: 227}[capability] * 1024, kernel  # what a block may have


@pytest.mark.slow
def test_the_script_that_times_them_runs(tmp_path):
    sizes = {"tokens": 24, "hidden": 64, "expert-width": 32, "experts": 4, "top-k": 2, "hot": 2, "r": 8}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    run_script("benchmarks/time_kernels.py", *options, "--dtype", "float32", "--output", str(tmp_path / "out.json"))
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert len(results) == 8
    for name, result in results.items():
        assert result["difference"] < 1e-5 and result["ours_ms"] > 0, name


@pytest.mark.parametrize(("precision", "expected"), [("tf32", "tf32"), ("ieee", "ieee"), ("none", "ieee")])
def test_precision_that_was_told_in_torchs_newer_way(monkeypatch, precision, expected):
    """As transformers' tf32=True tells it; then torch refuses to be asked in the older way."""

    def refuses():
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(gemm, "INTERPRETED", False)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuses)
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=precision))
    assert gemm._precision(torch.zeros(1)) == expected and gemm._precision(torch.zeros(1).bfloat16()) == "tf32"
