"""TRL's activation offloading around our layers; what the estimate says of it; where it is refused."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from runs import run_training
from tiny import fill, tiny_batch, tiny_plan
from transformers import AutoModelForCausalLM, OlmoeConfig
from trl.models.activation_offloading import get_act_offloading_ctx_manager
from zoo import families, zoo_model

from hotlora.adapter.config import HotLoraConfig
from hotlora.base.errors import HotLoraError
from hotlora.cost.cards import CARDS, step_time
from hotlora.cost.estimate import estimate, step_of
from hotlora.cost.memory import Storage, memory
from hotlora.hf.moe_layers import moe_layers
from hotlora.layer import cpu, gpu
from hotlora.training.gradient_checkpointing import checkpoint_kwargs

LAYOUTS = sorted({"olmoe", "qwen2_moe", "deepseek_v2", "gpt_oss", "nemotron_h"} & families().keys())


@pytest.fixture
def as_accelerator(monkeypatch):
    """TRL's hooks offload an accelerator's tensors: here those of a CPU, copied in the stream that computes."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("products", [cpu, gpu])
@pytest.mark.parametrize("family", LAYOUTS)
def test_gradients_are_the_same(as_accelerator, monkeypatch, family, products, recompute):
    monkeypatch.setattr("hotlora.layer.function.cpu", products)
    model = zoo_model(family).double()
    adapted = peft.get_peft_model(model, HotLoraConfig(plan=tiny_plan(model, None), r=2)).train()
    fill(adapted, 1)
    if recompute:
        model.gradient_checkpointing_enable(checkpoint_kwargs())
    batch = tiny_batch(vocab_size=100)

    offloading = get_act_offloading_ctx_manager(adapted, use_pin_memory=False, use_streams=False, min_offload_size=1)
    num_moved = []

    def gradients(context) -> list[torch.Tensor]:
        adapted.zero_grad()
        with context:
            loss = adapted(**batch, labels=batch["input_ids"]).loss
            num_moved.append(sum(is_moved for _, is_moved, *_ in offloading.tracker.values()))
            loss.backward()
        return [p.grad.clone() for p in adapted.parameters() if p.requires_grad and p.grad is not None]

    expected = gradients(nullcontext())
    for _ in range(2):
        for ours, theirs in zip(gradients(offloading), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert num_moved[0] == 0 and num_moved[1] == num_moved[2] >= model.config.num_hidden_layers


def test_refused_on_a_cpu(tmp_path):
    with pytest.raises(HotLoraError, match="this runs on the CPU: leave it out"):
        run_training("nano", "nano-math", tmp_path / "run", activation_offloading=True, device="cpu")
    assert not (tmp_path / "run").exists()
    with pytest.raises(HotLoraError, match="activation_offloading"):
        estimate("nano", batch_size=2, max_length=64, device="cpu", activation_offloading=True)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_estimate_moves_activations_into_ram(recompute):
    step, card = step_of("nano", batch_size=32, max_length=256, device="cuda"), CARDS[0]
    plain = Storage(gradient_checkpointing=recompute)
    moved = replace(plain, activation_offloading=True)
    there, here = memory(step, plain), memory(step, moved)
    assert here["host"] > 0 == there["host"]
    assert here["activations"] + here["host"] == pytest.approx(there["activations"], abs=2)
    assert here["total"] < there["total"]
    assert step_time(step, moved, card).transfer > 0 == step_time(step, plain, card).transfer


class _Stream:
    """A CPU computes in one."""

    def record_event(self) -> "_Stream":
        return self

    def wait_event(self, event: object) -> None: ...
    def wait_stream(self, other: object) -> None: ...
    def synchronize(self) -> None: ...


def test_what_it_leaves_on_the_card_is_what_the_estimate_says(as_accelerator, monkeypatch, tmp_path):
    """Of what several operations keep, TRL moves the first one's and leaves the others'."""
    for name in ("Stream", "current_stream", "default_stream"):
        monkeypatch.setattr(torch.cpu, name, lambda *_: _Stream(), raising=False)
    monkeypatch.setattr(torch.cpu, "stream", lambda _: nullcontext())
    config = OlmoeConfig(
        vocab_size=500, hidden_size=256, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4,
        num_experts=16, num_experts_per_tok=4, dtype="float32", eos_token_id=0,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    step = step_of(tmp_path, batch_size=4, max_length=256, device="cuda", fraction=0.25, coverage=0.25, r=8)
    model = AutoModelForCausalLM.from_config(config)
    plan = tiny_plan(model, {layer.layer: [0, 1, 2, 3] for layer in moe_layers(model)})
    adapted = peft.get_peft_model(model, HotLoraConfig(plan=plan, r=8)).train()
    ids = torch.randint(0, 500, (4, 256), generator=torch.Generator().manual_seed(0))
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable(checkpoint_kwargs())
        offloading = get_act_offloading_ctx_manager(adapted, use_pin_memory=False)
        with offloading:
            model.get_decoder()(input_ids=ids, use_cache=False)
        found = {True: {}, False: {}}
        for tensor, is_moved, *_ in offloading.tracker.values():
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in offloading.param_storages:
                found[is_moved][storage.data_ptr()] = storage.nbytes()
        # What is moved and left is in both.
        saved = sum(found[True].values()) - sum(found[False].values())
        storage = Storage(gradient_checkpointing=recompute, activation_offloading=True)
        layers = len(step.blocks)  # of which the estimate counts those on their way, too
        away = memory(step, storage)["host"] * layers / (layers - (5 if recompute else 1))
        assert away == pytest.approx(saved, rel=0.15)


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
def test_on_a_gpu(tmp_path: Path, recompute):
    found = []
    for offloading in (False, True):
        record = run_training(
            "nano", "nano-math", tmp_path / str(offloading), device="cuda", max_steps=4, batch_size=16,
            gradient_checkpointing=recompute, activation_offloading=offloading,
        )  # fmt: skip
        found.append(record["training"])
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=1e-3)
    assert found[1]["peak_memory_bytes"] < found[0]["peak_memory_bytes"]
