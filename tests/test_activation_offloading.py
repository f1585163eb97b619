"""TRL's activation offloading around our layers; what the estimate says of it; where it is refused."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from runs import run_training
from tiny import fill, tiny_batch, tiny_plan
from trl.models.activation_offloading import get_act_offloading_ctx_manager
from zoo import families, zoo_model

from hotlora.adapter.config import HotLoraConfig
from hotlora.base.errors import HotLoraError
from hotlora.cost.cards import CARDS, step_time
from hotlora.cost.estimate import estimate, step_of
from hotlora.cost.memory import Storage, memory
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
