"""The routed layer as one function: what it keeps, its masks and its blocks. test_experts.py has its numbers."""

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
    make_experts,
    make_factors,
    make_inputs,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hotlora.layer import cpu
from hotlora.layer.function import routed_experts


def saved_bytes(function, *args):
    """Bytes that autograd keeps for backward, each storage once, without the weights."""
    kept = {}
    weights = {p.untyped_storage().data_ptr() for p in args[0].parameters()}
    weights |= {getattr(f, name).untyped_storage().data_ptr() for f in args[-1] for name in FACTORS}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function(*args)
    return sum(kept.values()), output


def test_only_what_the_arithmetic_needs_is_kept():
    experts, inputs, factors = make_experts(torch.bfloat16), make_inputs(torch.bfloat16), [make_factors(range(E), 8)]
    kept, output = saved_bytes(routed_experts, experts, *inputs, factors)
    gate_up, hidden, weights = T * K * 2 * WIDTH * 2, T * D * 2, T * K * 2
    assert kept == gate_up + hidden + weights
    # Besides: the order of the rows, which autograd does not count.
    assert sum(rows.order_S.numel() for rows in output.grad_fn.blocks) == T * K


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_with_dropout_are_those_of_the_function_that_was_computed(p):
    """Against differences of the output, the same seed drawing the same masks."""
    experts, (hidden, index, weights) = make_experts(), make_inputs()
    factors = make_factors([1, 3, 6], 4)
    factors = replace(factors, dropout=p)
    leaves = [hidden, weights, *(getattr(factors, name) for name in FACTORS)]
    probe = torch.randn(T, D, generator=torch.Generator().manual_seed(7), dtype=torch.float64)

    def loss():
        torch.manual_seed(0)
        return (routed_experts(experts, hidden, index, weights, [factors]) * probe).sum()

    generator = torch.Generator().manual_seed(5)
    for leaf, gradient in zip(leaves, torch.autograd.grad(loss(), leaves), strict=True):
        direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        step = 1e-6
        with torch.no_grad():
            leaf += step * direction
            above = loss()
            leaf -= 2 * step * direction
            below = loss()
            leaf += step * direction
        torch.testing.assert_close((above - below) / (2 * step), (gradient * direction).sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_blocks_of_experts_change_no_bit(monkeypatch, dropout):
    """Nor the masks, which are drawn one block after the other."""
    experts, index = make_experts(torch.float32), make_inputs()[1]
    width = max(experts.gate_up_proj.shape[1:]) * 4
    found = []
    for size, least, most in ((1, 5, E), (30 * width, 2, 4), (2**22, 1, 1)):
        monkeypatch.setattr(cpu, "BLOCK_BYTES", size)
        hidden, _, weights = make_inputs(torch.float32)
        adapters = [replace(make_factors(ids, 4, torch.float32), dropout=dropout) for ids in ([1, 3, 6], [0, 1])]
        torch.manual_seed(0)
        output = routed_experts(experts, hidden, index, weights, adapters)
        blocks = output.grad_fn.blocks
        assert least <= len(blocks) <= most and sum(len(rows.order_S) for rows in blocks) == T * K
        leaves = [hidden, weights, *(getattr(adapter, name) for adapter in adapters for name in FACTORS)]
        found.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for tensors in zip(*found, strict=True):
        assert all(torch.equal(tensor, tensors[0]) for tensor in tensors)


def test_operations_of_a_hot_expert_are_its_products():
    """On a CPU an operation of torch's costs as much as a small product: 17 products of an expert forward and backward,
    5 transposed views for the gradients of its factors, and one sum."""

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counts[-1] += 1
            return func(*args, **(kwargs or {}))

    experts, (hidden, index, weights) = make_experts(torch.float32), make_inputs(torch.float32)
    counts = []
    for ids in ([0, 1, 2, 3], range(E)):
        factors = make_factors(ids, 4, torch.float32)
        counts.append(0)
        with Counted():
            routed_experts(experts, hidden, index, weights, [factors]).square().sum().backward()
    assert counts[1] - counts[0] == 23 * 4


@pytest.mark.parametrize("num_rows", [1, 15, 16, 100, 2048])
def test_rounded_rows_hold_an_experts_own_and_are_of_few_sizes(num_rows):
    sizes = set()
    for a in range(0, num_rows, 1 + num_rows // 20):
        for b in range(a + 1, num_rows + 1):
            span = cpu.expert_rows(0, a, b, num_rows, True)
            assert 0 <= span.start <= a < b <= span.stop <= num_rows
            size, wide = b - a, span.stop - span.start
            assert sorted([*span.neighbours, *range(a - span.start, b - span.start)]) == list(range(wide))
            assert wide - size < max(16, size / 8)
            if wide % 16:  # no room in the block
                assert wide == size and size + max(16, size / 8) > num_rows
            else:
                sizes.add(wide)
    assert len(sizes) <= 44


@pytest.mark.parametrize("block_bytes", [1, 700, 2**22])
def test_neighbours_of_a_hot_expert_get_nothing(monkeypatch, block_bytes):
    """In bfloat16, where products are made for more rows than the expert's own."""
    monkeypatch.setattr(cpu, "BLOCK_BYTES", block_bytes)
    experts, (hidden, index, weights) = make_experts(torch.bfloat16), make_inputs(torch.bfloat16)
    factors = make_factors([2, 5], 4, torch.float32)
    cold = ~torch.isin(index, factors.expert_ids_N).any(1)
    assert 0 < cold.sum() < T
    output, base = (routed_experts(experts, hidden, index, weights, f) for f in ([factors], []))
    assert torch.equal(output[cold], base[cold]) and not torch.equal(output, base)
    ours, theirs = (torch.autograd.grad(o.float().square().sum(), [hidden, weights]) for o in (output, base))
    for adapted, frozen in zip(ours, theirs, strict=True):
        assert torch.equal(adapted[cold], frozen[cold]) and not torch.equal(adapted, frozen)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_recompute_gives_the_same_gradients(dropout):
    experts, inputs = make_experts(torch.float32), make_inputs(torch.float32)
    factors = make_factors([1, 3, 6], 4, torch.float32)
    factors = replace(factors, dropout=dropout)
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        arguments = (experts, *inputs, [factors])
        output = checkpoint(routed_experts, *arguments, use_reentrant=False) if again else routed_experts(*arguments)
        gradients.append(torch.autograd.grad(output.square().sum(), [getattr(factors, name) for name in FACTORS]))
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)
