"""Gradient checkpointing: the second run of a layer sends every token to the experts of the first."""

import json
from dataclasses import replace

import peft
import pytest
import torch
from test_train import CONFIG, TOKENIZER, dataset
from test_train import adapted as adapted_for_training
from tiny import FAMILIES, fill, tiny_batch, tiny_model, tiny_plan
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import families, runs_of, zoo_model

import hotlora
from hotlora.hf.moe_layers import moe_layers
from hotlora.training.gradient_checkpointing import checkpoint_kwargs
from hotlora.training.sft_trainer import make_trainer

PLAIN = {"use_reentrant": False}


@pytest.mark.parametrize("family", families())
def test_a_second_run_that_scores_otherwise_chooses_the_same_experts(family):
    """Every router's scores are turned round between the two runs: that flips every routing that is chosen again."""
    model = zoo_model(family).train()
    runs = runs_of(family, moe_layers(model))
    flipped, kept = (routings(model, kwargs, runs) for kwargs in (PLAIN, checkpoint_kwargs()))
    for layer, pairs in kept.items():
        assert all(torch.equal(first, second) for first, second in pairs), layer
    assert any(not torch.equal(first, second) for pairs in flipped.values() for first, second in pairs)


def routings(model, kwargs, runs) -> dict[int, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The ids that each experts module was given, in the first run and in the second; several pairs of a layer that
    runs several times for a token. Second runs come in the order of the backward pass."""
    layers, seen = moe_layers(model), {}
    enable(model, kwargs)
    hooks = [
        model.get_submodule(layer.experts).register_forward_pre_hook(
            lambda _, args, layer=layer: seen.setdefault(layer.layer, []).append(args[1].clone())
        )
        for layer in layers
    ]
    weights = [model.get_submodule(layer.router).get_parameter(layer.router_weight).data for layer in layers]
    torch.manual_seed(0)
    loss = model(**tiny_batch()).logits.float().square().sum()
    for weight in weights:
        weight.neg_()
    loss.backward()
    for weight in weights:
        weight.neg_()
    for hook in hooks:
        hook.remove()
    assert [len(seen[layer.layer]) for layer in layers] == [2 * n for n in runs]
    # Of each layer the first half, and the second half from its end.
    return {layer: list(zip(ids, reversed(ids), strict=True))[: len(ids) // 2] for layer, ids in seen.items()}


def enable(model, kwargs) -> None:
    model.gradient_checkpointing_enable(kwargs)
    model.enable_input_require_grads()


def adapted(family: str):
    model = tiny_model(family)
    model = peft.get_peft_model(
        model, hotlora.HotLoraConfig(plan=tiny_plan(model), r=8, lora_alpha=16, lora_dropout=0.1)
    )
    fill(model, 1)
    return model.train()


def loss_and_gradients(model):
    batch = tiny_batch()
    torch.manual_seed(0)
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_without(family):
    """The adapted layer is an autograd function with tensors of its own; dropout draws the same masks again."""
    expected = loss_and_gradients(adapted(family))
    model = adapted(family)
    enable(model, checkpoint_kwargs())
    ours = loss_and_gradients(model)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name


class CountTopK(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.topk.default
        return func(*args, **(kwargs or {}))


def test_what_is_kept_and_what_is_not_done_again():
    model, batch = adapted("olmoe"), tiny_batch()
    topks, kept = {}, {}
    for name, kwargs in {"plain": PLAIN, "ours": checkpoint_kwargs()}.items():
        enable(model, kwargs)
        tensors = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: tensors.append(x) or x, lambda x: x):  # noqa: B023
            logits = model(**batch).logits
        kept[name] = sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())
        with CountTopK() as counter:
            logits.sum().backward(retain_graph=True)
            logits.sum().backward()  # and again, from the same graph
        topks[name] = counter.count
    assert topks == {"plain": 4, "ours": 0}
    assert kept["plain"] == kept["ours"]  # of autograd's; besides, 4 bytes an assignment


def test_our_trainer_uses_it_and_can_still_write_its_arguments(tmp_path):
    model = adapted_for_training()
    trainer = make_trainer(
        model, TOKENIZER, dataset(), replace(CONFIG, gradient_checkpointing=True, max_steps=1), tmp_path
    )
    trainer.train()
    layer = model.get_base_model().model.layers[0]
    assert layer._gradient_checkpointing_func.keywords == checkpoint_kwargs()
    json.loads(trainer.args.to_json_string())
