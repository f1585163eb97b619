"""torch.compile: the adapted layer is one graph without a break, and computes what it computes without."""

from dataclasses import replace

import peft
import pytest
import torch
from test_experts import (
    assert_same,
    make_experts,
    make_experts_of,
    make_factors,
    make_inputs,
    output_and_gradients,
    relative,
)
from tiny import fill, tiny_batch, tiny_model, tiny_plan

import hotlora
from hotlora.layer.function import routed_experts

# aot_eager traces forward and backward as inductor does, and leaves out its code generation, which takes a minute.
BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ({}, torch.float32),
        ({}, torch.float64),
        ({"has_gate": False, "is_transposed": True}, torch.float32),
        ({"has_bias": True, "is_transposed": True, "is_concatenated": False}, torch.float32),
    ],
    ids=["olmoe", "float64", "no gate", "gpt_oss"],
)
def test_the_layer_is_one_graph(layout, dtype):
    experts, inputs = make_experts_of(layout, dtype), make_inputs(dtype)
    factors = make_factors([1, 3, 6], 8, dtype, parts=2 if experts.has_gate else 1)
    compiled = torch.compile(routed_experts, fullgraph=True, backend=BACKEND)
    ours = output_and_gradients(compiled, experts, *inputs, factors)
    assert_same(ours, output_and_gradients(routed_experts, experts, *inputs, factors), 1e-6)


def test_so_it_is_with_a_scaling_of_each_expert():
    experts, inputs = make_experts(torch.float32), make_inputs(torch.float32)
    scaling = torch.tensor([2.0, 1 / 3, 5.0], dtype=torch.float64)
    factors = replace(make_factors([1, 3, 6], 8, torch.float32), scaling=scaling)
    compiled = torch.compile(routed_experts, fullgraph=True, backend=BACKEND)
    ours = output_and_gradients(compiled, experts, *inputs, factors)
    assert_same(ours, output_and_gradients(routed_experts, experts, *inputs, factors), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_so_it_is_with_weights_that_train(dtype):
    experts, inputs = make_experts(dtype), make_inputs(dtype)
    experts.down_proj.requires_grad_(True)
    factors = make_factors([1, 3, 6], 8, dtype)
    compiled = torch.compile(routed_experts, fullgraph=True, backend=BACKEND)
    gradients = []
    for function in (routed_experts, compiled):
        output = function(experts, *inputs, [factors])
        leaves = [experts.down_proj, inputs[0], inputs[2], factors.A_down, factors.B_gate_up]
        gradients.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for expected, ours in zip(*gradients, strict=True):
        assert relative(ours, expected) < (1e-6 if dtype == torch.float32 else 0.01)


def test_two_adapters_and_dropout_draw_the_masks_that_they_draw_without():
    experts, inputs = make_experts(torch.float32), make_inputs(torch.float32)
    one, other = make_factors([1, 3, 6], 8, torch.float32), make_factors([3, 5], 4, torch.float32, seed=2)
    both = [replace(one, dropout=0.3), other]
    leaves = [inputs[0], inputs[2], one.A_gate_up, one.B_down, other.B_gate_up]
    compiled = torch.compile(routed_experts, fullgraph=True, backend=BACKEND)
    results = {}
    for function in (routed_experts, compiled):
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            output = function(experts, *inputs, both)
            gradients = torch.autograd.grad(output.square().sum(), leaves)
            results.setdefault(seed, []).append([output, *gradients])
    for expected, *others in results.values():
        for values in others:
            for value, reference in zip(values, expected, strict=True):
                assert relative(value, reference) < 1e-6
    assert relative(results[0][0][0], results[1][0][0]) > 0.01


def adapted(family: str):
    model = tiny_model(family, num_hidden_layers=1)
    config = hotlora.HotLoraConfig(plan=tiny_plan(model), r=8, lora_alpha=16, lora_dropout=0.1)
    model = peft.get_peft_model(model, config).train()
    fill(model, 1)
    return model


def loss_and_gradients(model, function, length: int):
    batch = tiny_batch(length=length)
    torch.manual_seed(0)
    model.zero_grad()
    loss = function(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("family", "lengths"), [("olmoe", [9]), pytest.param("qwen2_moe", [9, 12, 15], marks=pytest.mark.slow)]
)
def test_a_models_steps_are_one_graph(family, lengths):
    """Or two, where steps differ in length: the second graph has the length as a symbol."""
    model = adapted(family)
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    for length in lengths:
        loss, gradients = loss_and_gradients(model, compiled, length)
        expected_loss, expected = loss_and_gradients(model, model, length)
        torch.testing.assert_close(loss, expected_loss)
        assert gradients.keys() == expected.keys() and any("experts" in name for name in gradients)
        for name, gradient in expected.items():
            assert relative(gradients[name], gradient) < 1e-5, name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == min(2, len(lengths))


@pytest.mark.slow
def test_inductor():
    experts, inputs = make_experts(torch.float32), make_inputs(torch.float32)
    factors = make_factors([1, 3, 6], 8, torch.float32)
    compiled = torch.compile(routed_experts, fullgraph=True)
    ours = output_and_gradients(compiled, experts, *inputs, factors)
    assert_same(ours, output_and_gradients(routed_experts, experts, *inputs, factors), 1e-5)
