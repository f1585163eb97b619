"""The contender `unsloth`: Unsloth's code computes what PEFT's does. In processes of their own, since importing Unsloth
patches all that it finds."""

import importlib.util
import os
import sys

import pytest
import torch
from apart import apart
from tiny import tiny_batch, tiny_config, tiny_model
from zoo import zoo_model

from hotlora.base.errors import ModelError
from hotlora.bench.bench import BenchConfig, run_bench
from hotlora.bench.contenders import Contender, adapted
from hotlora.bench.unsloth import _count_calls

R = 4
FAMILIES = ["olmoe", "qwen2_moe", "qwen3_moe", "mixtral"]
_INSTALLED = all(importlib.util.find_spec(name) for name in ("unsloth", "unsloth_zoo"))
needs_unsloth = pytest.mark.skipif(not _INSTALLED, reason="pip install unsloth unsloth_zoo compares with it")


def test_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "unsloth_zoo", None)  # as if it were not there
    assert Contender("unsloth").missing == "not installed"


@needs_unsloth
def test_missing_without_a_gpu(monkeypatch):
    monkeypatch.delenv("UNSLOTH_ALLOW_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Contender("unsloth").missing == "installed, but it needs a GPU"
    monkeypatch.setenv("UNSLOTH_ALLOW_CPU", "1")
    assert Contender("unsloth").missing is None
    assert "unsloth" not in sys.modules


@needs_unsloth
def test_it_computes_what_peft_does():
    """Logits, and the gradient of every adapter, with Unsloth's loop and with its grouped products."""
    found = apart(by_loop_and_grouped, FAMILIES)
    for family in FAMILIES:
        logits, gradients, _ = update("peft", family)
        assert len(gradients) == 2 * (2 * 4 + 2 * 2) and all(g.any() for g in gradients.values())
        for (theirs, their_gradients, forward), expected in zip(
            found[family], ("forward_native_moe_loop", "forward_native_grouped_mm"), strict=True
        ):
            assert forward == {expected: 2}
            torch.testing.assert_close(torch.from_numpy(theirs), logits, rtol=1e-4, atol=1e-5)
            for name, gradient in gradients.items():
                torch.testing.assert_close(torch.from_numpy(their_gradients[name]), gradient, rtol=1e-3, atol=1e-6)


@needs_unsloth
@pytest.mark.parametrize("family", ["nemotron_h", "muse_spark"])
def test_families_that_unsloth_does_not_compute(family):
    """nemotron_h has no gate: PEFT would do it. muse_spark has a norm after each expert: Unsloth leaves it out."""
    with pytest.raises(ModelError, match=f"does not compute LoRA on the experts of {family}"):
        apart(adapt, family)


@needs_unsloth
def test_it_takes_part(tmp_path, monkeypatch):
    """In bfloat16 under autocast, its weights given back between turns."""
    monkeypatch.setenv("UNSLOTH_ALLOW_CPU", "1")
    tiny_config("olmoe", num_experts=16, intermediate_size=512, hidden_size=128).save_pretrained(tmp_path)
    config = BenchConfig(
        str(tmp_path), tokens=32, r=8, dtype="bfloat16", device="cpu", contenders=("floor", "peft", "unsloth"), rounds=2
    )
    rows = {row["name"]: row for row in run_bench(config)["contenders"]}
    assert rows["unsloth"]["status"] == "done", rows["unsloth"]
    assert rows["unsloth"]["trainable"] == rows["peft"]["trainable"]
    assert rows["unsloth"]["saved_bytes_per_token_layer"] < rows["peft"]["saved_bytes_per_token_layer"]  # no W + BA
    assert rows["floor"]["flops"] < rows["unsloth"]["flops"] < rows["peft"]["flops"]


def by_loop_and_grouped(families):
    """family -> the two updates. Only on a GPU would it choose the grouped products by itself."""
    os.environ |= {"UNSLOTH_ALLOW_CPU": "1", "UNSLOTH_MOE_BACKEND": "native_torch"}
    found = {family: [plain(update("unsloth", family))] for family in families}
    os.environ["UNSLOTH_MOE_BACKEND"] = "grouped_mm"
    for name in ("unsloth_zoo.temporary_patches.moe_utils", "unsloth_cached_moe_utils"):  # it runs a copy of itself
        sys.modules[name]._TORCH_GROUPED_MM_SUPPORTED = True
        sys.modules[name].select_moe_backend.cache_clear()
    for family in families:
        found[family].append(plain(update("unsloth", family)))
    return found


def plain(value):
    """Tensors as arrays, to be sent: a process that has ended can share none."""
    logits, gradients, forward = value
    return logits.numpy(), {name: g.numpy() for name, g in gradients.items()}, forward


def update(kind, family):
    """Logits, gradients and what ran, of adapters with the same values for every kind."""
    model, batch = adapted(tiny_model(family), Contender(kind), None, R), tiny_batch()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    with _count_calls() as calls:
        output = model(**batch, labels=batch["input_ids"])
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    forwards = {name: n for name, n in calls.items() if name.startswith(("forward_native_", "forward_triton"))}
    return output.logits.detach(), gradients, forwards


def adapt(family):
    os.environ["UNSLOTH_ALLOW_CPU"] = "1"
    adapted(zoo_model(family), Contender("unsloth"), None, R)
