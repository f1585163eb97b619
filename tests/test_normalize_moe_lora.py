"""`normalize_moe_lora`: the planned experts' rank is r / K, and lora_alpha stays."""

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from readers import read_sglang, read_sglang_shared, read_vllm
from test_factors import adapted, by_hand, experts_of, logits, merges_and_comes_out_again, same_after_saving
from tiny import FAMILIES, fill, tiny_batch, tiny_model, tiny_plan

import hotlora
from hotlora.adapter.config import HotLoraConfig
from hotlora.adapter.count import count_parameters, parameters_from_config
from hotlora.adapter.formats.export import export_adapter
from hotlora.adapter.load import load_adapter
from hotlora.adapter.mask import draw_mask
from hotlora.base.errors import HotLoraError, PlanError
from hotlora.cost.preflight import step_by
from hotlora.hf.models import NANOS
from hotlora.runs.options import RunOptions
from hotlora.runs.sweep import Condition, Sweep

OLMOE = Path(__file__).parents[1] / "benchmarks" / "configs" / "olmoe-1b-7b"
BATCH = tiny_batch(2, 24)


def normalized(model=None, **options):
    """r 4 and K 2: the experts have rank 2."""
    return adapted(model, normalize_moe_lora=True, **options)


# What it is


@pytest.mark.parametrize("options", [{}, {"share_a": True}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_have_r_over_k_and_all_else_has_r(family, options):
    model = normalized(tiny_model(family), **options)
    for layer in experts_of(model):
        assert {A.shape[0] for A, _ in layer.factor_pairs("default").values()} == {2}
        assert layer.update("default").scaling == layer.scaling_of("default", 3) == 8 / 2
    others = [m for m in model.modules() if "default" in getattr(m, "r", {}) and m not in experts_of(model)]
    assert len(others) > 4 and {m.r["default"] for m in others} == {4}
    assert {m.scaling["default"] for m in others} == {8 / 4}
    assert model.peft_config["default"].plan["ranks"] == {"0": [2, 2, 2], "1": [2, 2, 2]}


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_plan_with_these_ranks_bit_for_bit(family, use_rslora):
    ours = normalized(tiny_model(family), use_rslora=use_rslora)
    ranks = {"0": [2, 2, 2], "1": [2, 2, 2]}
    assert torch.equal(logits(ours), logits(adapted(tiny_model(family), ranks=ranks, use_rslora=use_rslora)))
    plain = torch.func.functional_call(tiny_model(family), by_hand(ours), (), dict(BATCH)).logits
    torch.testing.assert_close(logits(ours), plain, rtol=1e-3, atol=1e-4 * plain.abs().max().item())


@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_as_the_base_bit_for_bit(family):
    assert torch.equal(logits(normalized(tiny_model(family), randomise=False)), logits(tiny_model(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_of_a_model(family):
    """Layers x experts x 3 (D + F) r / K."""
    counts = count_parameters(normalized(tiny_model(family)))
    plain = count_parameters(adapted(tiny_model(family)))
    assert counts["experts"] == 2 * 3 * 3 * (32 + 16) * 4 // 2 == plain["experts"] // 2
    assert all(counts[part] == plain[part] for part in ("attention", "router", "shared"))


def test_counts_of_olmoe_from_its_config():
    """All 64 experts at rank 32 / 8 have as many as 8 of them at rank 32: LoRA's active parameters stay."""
    counts = parameters_from_config(OLMOE, r=32, normalize_moe_lora=True)
    assert counts["experts"] == 16 * 64 * 3 * (2048 + 1024) * 32 // 8
    assert counts["experts"] == parameters_from_config(OLMOE, r=32, experts_per_layer=8)["experts"]
    assert counts["attention"] == 16 * 4 * 2 * 2048 * 32 and counts["router"] == 16 * (2048 + 64) * 32
    shared = parameters_from_config(OLMOE, r=32, normalize_moe_lora=True, share_a=True)
    assert shared["experts"] == 16 * 4 * (3 * 2048 + 3 * 64 * 1024)


# What it goes with


def test_merged_and_unmerged():
    merges_and_comes_out_again(normalized())


@pytest.mark.parametrize(
    "options", [{}, {"share_a": True}, {"train_a": False, "a_seed": 3}, {"use_dora": True}], ids=str
)
def test_saved_and_loaded(options, tmp_path):
    same_after_saving(normalized(**options), tmp_path, tiny_model)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["normalize_moe_lora"] is True and saved["r"] == 4 and saved["lora_alpha"] == 8
    again = load_adapter(tiny_model(), tmp_path).peft_config["default"]
    assert again.normalize_moe_lora and again.plan == saved["plan"]


def test_an_adapter_of_before_has_none(tmp_path):
    adapted().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    del saved["normalize_moe_lora"]
    file.write_text(json.dumps(saved))
    assert load_adapter(tiny_model(), tmp_path).peft_config["default"].normalize_moe_lora is False


READERS = {"vllm": read_vllm, "sglang": read_sglang, "sglang-shared": read_sglang_shared}


@pytest.mark.parametrize("format", READERS)
def test_exported(format, tmp_path):
    model = normalized(tiny_model("qwen3_moe"), train_router=False, share_a=format == "sglang-shared")
    export_adapter(model, tmp_path / "out", format=format)
    found = logits(READERS[format](tmp_path / "out", tiny_model("qwen3_moe")))
    assert (found - logits(model)).norm() <= 1e-5 * logits(model).norm()
    assert (found - logits(tiny_model("qwen3_moe"))).norm() > 1e-3 * found.norm()


def test_combined_exactly():
    """With an adapter of another rank and plan: an expert that one leaves out gets the other's part."""
    model = normalized()
    plan = tiny_plan(tiny_model(), {0: [0, 1], 1: [6, 7]})
    model.add_adapter("other", HotLoraConfig(plan=plan, r=2, lora_alpha=6, normalize_moe_lora=True))
    fill(model, 1, "other", scale=0.05)
    with pytest.raises(HotLoraError, match=r"'linear' needs adapters of one rank, and these have \[4, 2, 1\]"):
        model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "both", combination_type="linear")
    model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "both", combination_type="cat")
    for layer in experts_of(model):
        expected = {}
        for name, weight in (("default", 0.5), ("other", 2.0)):
            up, _ = layer.get_delta_weight(name)
            for n, expert in enumerate(layer.expert_ids[name]):
                expected[expert] = expected.get(expert, 0) + weight * up[n]
        up, _ = layer.get_delta_weight("both")
        assert layer.expert_ids["both"] == tuple(sorted(expected))
        for n, expert in enumerate(layer.expert_ids["both"]):
            torch.testing.assert_close(up[n], expected[expert])
    assert model.peft_config["both"].normalize_moe_lora is False


def test_on_quantized_experts_and_with_a_mask():
    model = tiny_model(hidden_size=64, intermediate_size=64)
    hotlora.quantize_experts(model, 8)
    found = normalized(model)
    assert logits(found).isfinite().all() and {
        A.shape[0] for A, _ in experts_of(found)[0].factor_pairs("default").values()
    } == {2}
    dense = normalized(train_a=False, randomise=False)
    fill(dense, 0, scale=0.05)
    sparse = normalized(train_a=False, mask=draw_mask(dense, keep=0.25), randomise=False)
    assert sum(p.numel() for p in sparse.parameters() if p.requires_grad) < 0.3 * count_parameters(dense)["trainable"]


# What is refused


def test_a_rank_that_k_does_not_divide_is_refused():
    with pytest.raises(PlanError, match=r"r=5 .* 2 experts .* multiple of 2, such as 4 or 6"):
        get_peft_model(tiny_model(), HotLoraConfig(plan=tiny_plan(tiny_model()), r=5, normalize_moe_lora=True))
    with pytest.raises(PlanError, match=r"r=4 .* 8 experts .* multiple of 8, such as 8"):
        parameters_from_config(OLMOE, r=4, normalize_moe_lora=True)


def test_what_it_does_not_go_with_is_refused():
    model = tiny_model()
    plan = tiny_plan(model) | {"ranks": {"0": [4] * 3, "1": [2] * 3}}
    with pytest.raises(PlanError, match=r"ranks of its own .* normalize_moe_lora"):
        get_peft_model(model, HotLoraConfig(plan=plan, r=4, normalize_moe_lora=True))
    with pytest.raises(PlanError, match="train_full_experts leaves no rank"):
        HotLoraConfig(plan=tiny_plan(model), normalize_moe_lora=True, train_full_experts=True)
    for more in ({"full": True}, {"reprofile_every": 2}):
        with pytest.raises(HotLoraError, match="normalize_moe_lora"):
            RunOptions(model="nano", data="nano-math", normalize_moe_lora=True, **more)


# Where it is given


def test_params_counts_it(call, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    found = {}
    for words in ((), ("--normalize-moe-lora",)):
        code, out, _ = call("params", tmp_path, "--experts-per-layer", 3, "--r", 4, *words, "--estimate", "--json")
        assert code == 0
        found[words] = json.loads(out)
    plain, ours = found.values()
    assert ours["experts"] == plain["experts"] // 2 and ours["attention"] == plain["attention"]
    assert ours["adapter_flops"]["experts"] == plain["adapter_flops"]["experts"] / 2
    assert ours["estimate"]["trainable"] == ours["trainable"]
    tokens = plain["estimate"]["flops"]["adapter_per_token"], ours["estimate"]["flops"]["adapter_per_token"]
    assert tokens[1] < tokens[0]
    code, out, _ = call("params", tmp_path, "--r", 4, "--normalize-moe-lora")
    assert code == 0 and "rank 4 (r / K in experts)" in " ".join(out.split())
    code, _, err = call("params", tmp_path, "--r", 5, "--normalize-moe-lora")
    assert code == 1 and "r=5" in err


WORDS = ("--limit", 16, "--test-limit", 4, "--no-evaluate", "--device", "cpu", "--max-length", 64, "--rule", "all")


def test_a_run_is_begun_with_it_and_goes_on_with_it_alone(call, tmp_path):
    words = ["train", "--model", "nano", "--data", "nano-math", "-o", tmp_path / "run", *WORDS, "--max-steps", 1]
    (tmp_path / "run.yaml").write_text("normalize_moe_lora: true\nr: 8\n")
    assert call(*words, "--config", tmp_path / "run.yaml")[0] == 0
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    k = json.loads((NANOS["nano"] / "config.json").read_text())["num_experts_per_tok"]
    assert {rank for ranks in saved["plan"]["ranks"].values() for rank in ranks} == {8 // k}
    assert record["config"]["normalize_moe_lora"] is True
    assert record["parameters"]["experts"] == parameters_from_config("nano", r=8, normalize_moe_lora=True)["experts"]
    code, _, err = call(*words, "--r", 8)
    assert code == 1 and "--normalize-moe-lora off against on (now against then)" in err
    assert call(*words, "--r", 8, "--normalize-moe-lora")[0] == 0
    code, _, err = call(
        *words[:5], "-o", tmp_path / "other", *WORDS, "--max-steps", 1, "--r", 9, "--normalize-moe-lora"
    )
    assert code == 1 and "r=9" in err and not (tmp_path / "other").exists()


def test_a_longer_run_goes_on_from_its_checkpoint_as_if_it_had_not_ended(tmp_path):
    common = {"model": "nano", "data": "nano-math", "limit": 16, "test_limit": 4, "evaluate": False, "r": 8,
              "device": "cpu", "max_length": 64, "experts_per_layer": 2, "normalize_moe_lora": True, "batch_size": 4,
              "lr_scheduler": "constant", "share_a": True, "quantize": 8}  # fmt: skip
    hotlora.train(**common, output=tmp_path / "once", max_steps=3)
    hotlora.train(**common, output=tmp_path / "twice", max_steps=2)
    hotlora.train(**common, output=tmp_path / "twice", max_steps=3, extend=True)
    once, twice = (
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("once", "twice")
    )
    assert once == twice


def test_a_sweeps_condition_has_it():
    sweep = Sweep("s", "nano", "nano-math", [Condition("normalized", {"normalize_moe_lora": True, "r": 8})])
    assert sweep.resolved(sweep.conditions[0]).normalize_moe_lora is True


@pytest.mark.parametrize("option", ["normalize_moe_lora", "share_a"])
def test_what_is_foreseen_before_a_run_knows_it(option):
    steps = [
        step_by(RunOptions(model="nano", data="nano-math", r=8, **more), str(NANOS["nano"]), torch.device("cpu"), {})(
            {}
        )
        for more in ({}, {option: True})
    ]
    assert steps[1].trainable < steps[0].trainable
