"""PERFT's adapters beside the experts: against plain loops, the authors' formulas, and end to end."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from runs import run_evaluation, run_method
from safetensors.torch import load_file
from test_stages import SHORT, data, logits, model_folder  # noqa: F401
from tiny import FAMILIES, fill, tiny_batch, tiny_model, tiny_plan
from zoo import zoo_model

import hotlora
from hotlora.adapter.config import HotLoraConfig
from hotlora.adapter.count import count_parameters, parameters_from_config
from hotlora.adapter.load import load_adapter
from hotlora.adapter.parallel import ParallelAdapters
from hotlora.base.errors import HotLoraError, PlanError
from hotlora.hf.models import load_model
from hotlora.hf.moe_layers import moe_layers
from hotlora.routing.plan import ExpertPlan
from hotlora.runs.export import export_saved

KINDS = {
    "E": {"perft": "E"}, "R": {"perft": "R", "perft_adapters": 4, "perft_top_k": 2},
    "D": {"perft": "D", "perft_adapters": 3}, "S": {"perft": "D"},
}  # fmt: skip
ALONE = {"train_attention": False, "train_router": False, "train_shared": False}
ALL = {0: list(range(8)), 1: list(range(8))}
OLMOE = Path(__file__).parents[1] / "benchmarks" / "configs" / "olmoe-1b-7b"


def adapted(model, kind, experts=ALL, **options):
    config = HotLoraConfig(plan=tiny_plan(model, experts), r=4, lora_alpha=8, **KINDS[kind], **ALONE, **options)
    return get_peft_model(model, config)


def by_loop(layer, name, hidden, index, weight, options):
    """One token and one adapter after another."""
    A, B = layer.lora_A_parallel[name], layer.lora_B_parallel[name]
    out = []
    for t in range(len(hidden)):
        x, total = hidden[t], torch.zeros_like(hidden[t])
        if options.perft == "E":
            ids = layer.expert_ids[name]
            chosen = [(ids.index(int(e)), w) for e, w in zip(index[t], weight[t], strict=True) if int(e) in ids]
        elif options.perft == "R":
            share = (layer.lora_router_parallel[name] @ x).softmax(0)
            best = sorted(range(len(share)), key=lambda m: -share[m].item())[: options.perft_top_k]
            norm = sum(share[m] for m in best) if options._norm_topk else 1
            chosen = [(m, share[m] / norm) for m in best]
        else:
            chosen = [(m, 1.0) for m in range(len(A))]
        for m, w in chosen:
            total = total + w * layer.scaling[name] * (B[m] @ (A[m] @ x))
        out.append(total)
    return torch.stack(out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_output_and_gradients_equal_the_loop(family, kind):
    model = adapted(tiny_model(family), kind, {0: [1, 2, 5], 1: list(range(8))}).double()
    fill(model, 0)
    layer = next(m for m in model.modules() if isinstance(m, ParallelAdapters))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(12, 32, dtype=torch.float64, generator=generator, requires_grad=True)
    index = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(12)])
    weight = torch.rand(12, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    probe = torch.randn(12, 32, dtype=torch.float64, generator=generator)
    trained = [p for n, p in layer.named_parameters() if p.requires_grad]
    expected = layer.base_layer(hidden, index, weight) + by_loop(
        layer, "default", hidden, index, weight, model.peft_config["default"]
    )
    found = layer(hidden, index, weight)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    wanted = torch.autograd.grad((expected * probe).sum(), [hidden, weight, *trained], allow_unused=True)
    got = torch.autograd.grad((found * probe).sum(), [hidden, weight, *trained], allow_unused=True)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert len(trained) == (3 if kind == "R" else 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss", "deepseek_v3", "nemotron_h"])
def test_it_starts_as_the_base_bit_for_bit(family, kind):
    base = (tiny_model if family in FAMILIES else zoo_model)(family)
    batch = tiny_batch(vocab_size=60)
    expected = base(**batch).logits
    layers = moe_layers(base)
    plan = ExpertPlan({layer.layer: (0, 3) for layer in layers}, layers[0].num_experts, "manual", {})
    model = get_peft_model(base, HotLoraConfig(plan=plan, r=4, **KINDS[kind], **ALONE)).eval()
    assert torch.equal(model(**batch).logits, expected)
    fill(model, 0, scale=0.5)
    assert not torch.allclose(model(**batch).logits, expected, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_those_of_the_authors_code(kind):
    """OLMoE: 16 layers, 64 experts, 2,048 wide; 4,096 r an adapter, 2,048 a choice of R's router."""
    counts = parameters_from_config(OLMOE, r=16, **KINDS[kind], **ALONE)
    number = {"E": 64, "R": 4, "D": 3, "S": 1}[kind]
    assert counts["experts"] == 16 * number * (4096 * 16 + (2048 if kind == "R" else 0)) == counts["trainable"]
    model = adapted(tiny_model(), kind)
    number = {"E": 8, "R": 4, "D": 3, "S": 1}[kind]
    assert count_parameters(model)["trainable"] == 2 * number * (2 * 32 * 4 + (32 if kind == "R" else 0))


@pytest.mark.parametrize("method", ["perft-e", "perft-r", "perft-d", "perft-s"])
def test_each_trains_saves_loads_and_is_not_merged(method, model_folder, data, tmp_path, monkeypatch):  # noqa: F811
    record = run_method(model_folder, data, tmp_path / "run", method=method, **SHORT)
    assert record["status"] == "done" and record["condition"] == method
    assert record["training"]["loss_last"] < record["training"]["loss_first"]
    loaded = load_adapter(load_model(model_folder), tmp_path / "run" / "adapter")
    assert not torch.allclose(logits(loaded), logits(load_model(model_folder)), atol=1e-4)
    held = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert sum(t.numel() for t in held.values()) == record["parameters"]["trainable"]
    again = PeftModel.from_pretrained(load_model(model_folder), tmp_path / "run" / "adapter")
    assert torch.equal(logits(again), logits(loaded))
    with pytest.raises(HotLoraError, match="cannot be merged or exported"):
        loaded.merge_and_unload()
    with monkeypatch.context() as patched:  # before anything is loaded
        patched.setattr("hotlora.runs.folder.load_model", lambda *args, **options: pytest.fail("a model was loaded"))
        for refused in (
            lambda: hotlora.load(tmp_path / "run", merge=True),
            lambda: run_evaluation(model_folder, data, adapter=tmp_path / "run" / "adapter", merge=True),
            lambda: run_method(model_folder, data, tmp_path / "on", on_top_of=(str(tmp_path / "run"),), **SHORT),
        ):
            with pytest.raises(HotLoraError, match="cannot be merged or exported"):
                refused()
        assert not (tmp_path / "on").exists()
    for format in ("merged", "vllm", "peft"):
        with pytest.raises(HotLoraError, match="cannot be merged or exported"):
            export_saved(model_folder, tmp_path / "run" / "adapter", tmp_path / format, format=format)
        assert not (tmp_path / format).exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"perft": "X"}, "choose one of E, R, D"), ({"perft": "E", "use_dora": True}, "leave out DoRA"),
        ({"perft": "E", "perft_adapters": 2}, "leave out perft_adapters"),
        ({"perft": "D", "perft_adapters": 2, "perft_top_k": 2}, "has no router"),
        ({"perft": "R", "perft_adapters": 2, "perft_top_k": 3}, "cannot choose more"),
        ({"perft": "R", "train_a": False}, "frozen or shared A"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(options, told):
    with pytest.raises(PlanError, match=told):
        HotLoraConfig(plan=tiny_plan(tiny_model()), **options)
