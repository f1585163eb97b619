"""A GPU's products where neither our kernels run nor torch's grouped product is one (compute capability 7.5, such as a
T4; without Triton all but bfloat16 on 9 and 10): what they compute, how often the device is asked, and which experts
are made dense; by torch's operations on the CPU."""

import logging
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_experts import (
    E,
    K,
    T,
    as_on_a_gpu,
    assert_same,
    loop,
    make_dora,
    make_experts,
    make_experts_of,
    make_factors,
    make_full,
    make_inputs,
    output_and_gradients,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hotlora.adapter import packed, quantized
from hotlora.adapter.packed import PackedExperts
from hotlora.adapter.quantized import QuantizedExperts
from hotlora.base import precision
from hotlora.hf.experts_view import FrozenWeight
from hotlora.layer import gpu

EMPTY = 3
"""An expert, hot below, that no token is sent to."""
HOT = [1, EMPTY, 6]


@pytest.fixture(autouse=True)
def old_gpu(monkeypatch):
    monkeypatch.setattr(gpu, "capability", lambda device: (7, 5))


class Operations(TorchDispatchMode):
    """Counts what torch does."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **kwargs or {})


@pytest.fixture
def reads(monkeypatch):
    """The tensors that were read as a list."""
    found, tolist = [], Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: found.append(self) or tolist(self))
    return found


def inputs_without(expert: int, dtype: torch.dtype):
    scores = torch.rand(T, E, generator=torch.Generator().manual_seed(0))
    scores[:, expert] = -1
    return make_inputs(dtype, index=scores.topk(K).indices)


@pytest.mark.parametrize("capability", [(7, 5), (8, 6), (9, 0)])
def test_the_device_is_asked_once_for_both_passes_and_only_experts_with_rows_are_multiplied(
    capability, reads, monkeypatch
):
    monkeypatch.setattr(gpu, "capability", lambda device: capability)
    monkeypatch.setenv("HOTLORA_KERNELS", "torch")
    experts, factors = make_experts(torch.float32), make_factors(HOT, 8, torch.float32)
    hidden, index, weights = inputs_without(EMPTY, torch.float32)
    assert EMPTY not in index and len(index.unique()) == E - 1
    with Operations() as operations:
        output = as_on_a_gpu(experts, hidden, index, weights, [factors])
        torch.autograd.grad(output.sum(), [hidden, weights, *factors.tensors])
    assert len(reads) == 2  # where experts' rows end, and which experts are hot
    waits = {"_local_scalar_dense", "nonzero", "_unique2", "masked_select", "_grouped_mm"}
    assert not waits & operations.names.keys()
    # Of the base up and down, forward and back; of a hot expert as on a CPU (tests/test_fused.py).
    assert operations.names["mm"] == 4 * (E - 1) + 17 * (len(HOT) - 1)


@pytest.mark.parametrize("make", [make_factors, make_dora, make_full])
@pytest.mark.parametrize("layout", [{}, {"is_transposed": True, "is_concatenated": False, "has_bias": True}], ids=str)
def test_output_and_every_gradient_equal_the_loop(make, layout):
    """With float64 for a witness, in which all GPUs go this way."""
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        experts, inputs = make_experts_of(layout, dtype), inputs_without(EMPTY, dtype)
        update = make(HOT, parts=2)
        floats = {name: value for name, value in vars(update).items() if getattr(value, "requires_grad", False)}
        floats = {name: value.detach().to(dtype).requires_grad_() for name, value in floats.items()}
        update = replace(update, **floats)
        expected = output_and_gradients(loop, experts, *inputs, update)
        assert_same(output_and_gradients(as_on_a_gpu, experts, *inputs, update), expected, tolerance)


def test_rows_of_experts_elsewhere():
    experts, (hidden, index, weights) = make_experts(torch.float32), inputs_without(EMPTY, torch.float32)
    factors = make_factors(HOT, 8, torch.float32)
    away = torch.rand(index.shape, generator=torch.Generator().manual_seed(3)) < 0.4
    weights = weights.detach().masked_fill(away, 0).requires_grad_()
    expected = output_and_gradients(loop, experts, hidden, index, weights, factors)
    expected["weights"].masked_fill_(away, 0)
    experts._is_expert_parallel = True
    ours = output_and_gradients(as_on_a_gpu, experts, hidden, index.masked_fill(away, E), weights, factors)
    assert_same(ours, expected, 1e-5)


def test_compiled():
    experts, inputs = make_experts(torch.float32), inputs_without(EMPTY, torch.float32)
    factors = make_factors(HOT, 8, torch.float32)
    compiled = torch.compile(as_on_a_gpu, fullgraph=True, backend="aot_eager")
    ours = output_and_gradients(compiled, experts, *inputs, factors)
    assert_same(ours, output_and_gradients(as_on_a_gpu, experts, *inputs, factors), 1e-6)


def random_weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1).to(dtype)


def in_4_bits(keep=()):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install hotlora[quantize]")
    return QuantizedExperts.from_weight(random_weight(E, 24, 64), 4, keep)


def mxfp4(is_transposed):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (E, 24, 32), dtype=torch.uint8, generator=generator)
    scales = torch.randint(118, 125, (E, 24, 2), dtype=torch.uint8, generator=generator)
    return PackedExperts(codes, scales, 4, torch.float32, is_transposed)


HOLDERS = {
    "nf4": in_4_bits, "nf4, some kept": lambda: in_4_bits((0, 2, 5)), "mxfp4": lambda: mxfp4(False),
    "mxfp4, transposed": lambda: mxfp4(True),
}  # fmt: skip
holders = pytest.mark.parametrize("make", HOLDERS.values(), ids=HOLDERS.keys())


@pytest.fixture
def made(monkeypatch):
    """How many experts were made dense by each call."""
    numbers = []
    for module, name in ((quantized, "_dequantize"), (packed, "decoded")):
        function = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda codes, *rest, of=function: numbers.append(len(codes)) or of(codes, *rest)
        )
    return numbers


def products_of(holder, index_TK: Tensor, is_partial: bool = False):
    """(what the layer makes, what a loop makes) of rows of these experts, forward and for the input's gradient."""
    dense_EOI = FrozenWeight(holder, holder.is_transposed).all().transpose(1, 2)
    for weight, its_EOI in (
        (FrozenWeight(holder, holder.is_transposed), dense_EOI),
        (FrozenWeight(holder, holder.is_transposed).T, dense_EOI.transpose(1, 2)),
    ):
        (rows,) = gpu.Rows.blocks(E, index_TK, 1, is_partial)
        x_SI = random_weight(index_TK.numel(), its_EOI.shape[2], seed=1)
        experts = index_TK.flatten()[rows.order_S].tolist()
        nothing = x_SI.new_zeros(its_EOI.shape[1])
        expected = [nothing if e == E else its_EOI[e] @ x for e, x in zip(experts, x_SI, strict=True)]
        x_SI[[e == E for e in experts]] = torch.nan  # which may hold anything
        yield lambda x=x_SI, w=weight, r=rows: r.product(x, w), torch.stack(expected)


@holders
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
@pytest.mark.parametrize("bound", [2**28, 2 * 24 * 64 * 4])
def test_a_generated_token_makes_its_own_experts_dense_and_asks_for_nothing(
    make, capability, bound, made, reads, monkeypatch
):
    """On any GPU, and in blocks of `BLOCK_BYTES`."""
    monkeypatch.setattr(gpu, "capability", lambda device: capability)
    monkeypatch.setattr(gpu, "BLOCK_BYTES", bound)
    for product, expected in products_of(make(), torch.tensor([[6, 0, 2]])):
        made.clear()
        reads.clear()
        with Operations() as operations:
            got = product()
        torch.testing.assert_close(got, expected)
        assert sum(made) == 3 and max(made) <= (3 if bound == 2**28 else 2)
        assert not reads and not {"_local_scalar_dense", "nonzero", "_unique2"} & operations.names.keys()


@holders
def test_so_do_tokens_that_are_fewer_than_experts(make, made):
    """Some of one expert, and some of experts on other devices."""
    index_TK = torch.tensor([[6, 0], [6, E], [1, 6]])
    for product, expected in products_of(make(), index_TK, is_partial=True):
        made.clear()
        torch.testing.assert_close(product(), expected)
        assert sum(made) <= index_TK.numel()


@holders
@pytest.mark.parametrize("bound", [2**28, 3 * 24 * 64 * 4])
def test_of_many_rows_experts_without_one_stay_as_they_are(make, bound, made, reads, monkeypatch):
    """In as few blocks as hold the others; the device is asked once for a layer's products."""
    monkeypatch.setattr(gpu, "BLOCK_BYTES", bound)
    index_TK = torch.tensor([1, 4, 6, 7]).repeat(5).view(-1, K)
    for product, expected in products_of(make(), index_TK):
        made.clear()
        reads.clear()
        for _ in range(2):
            torch.testing.assert_close(product(), expected)
        assert len(reads) == 1 and sum(made) == 2 * 4 and len(made) == (2 if bound == 2**28 else 4)


def test_kernels_that_such_a_card_cannot_have_are_missed_once(monkeypatch, caplog):
    precision.say_once.cache_clear()
    hidden = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16)
    for chosen in ("triton", "triton", "fused"):
        monkeypatch.setenv("HOTLORA_KERNELS", chosen)
        with caplog.at_level(logging.WARNING, "hotlora"):
            assert not gpu.use_kernels(hidden) and not gpu.use_fused(hidden)
    said = [
        f"HOTLORA_KERNELS is {chosen}, but this GPU's compute capability is 7.5 and hotlora's kernels need 8.0: "
        "torch's products are used."
        for chosen in ("triton", "fused")
    ]
    assert [record.getMessage() for record in caplog.records] == said
