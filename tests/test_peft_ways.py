"""PEFT's own ways with a HotLoRA adapter: loading, several adapters, combining, rank patterns, modules to save."""

import math

import numpy as np
import peft
import pytest
import torch
from apart import apart
from packaging.version import Version
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import ParamWrapper
from tiny import fill, tiny_batch, tiny_model, tiny_plan
from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION
from zoo import families, zoo_model

from hotlora.adapter.config import HotLoraConfig
from hotlora.adapter.experts import HotLoraExperts
from hotlora.adapter.load import load_adapter
from hotlora.base.errors import HotLoraError, PlanError
from hotlora.hf.moe_layers import moe_layers

FAMILY = "qwen2_moe"  # attention, router, shared experts and experts


def adapted(experts=None, seed=0, family=FAMILY, adapter_name="default", **config):
    model = tiny_model(family)
    model = get_peft_model(
        model, HotLoraConfig(plan=tiny_plan(model, experts), **{"r": 4, **config}), adapter_name=adapter_name
    )
    fill(model, seed, adapter_name)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(**tiny_batch()).logits


# Loading


def test_peft_loads_what_was_saved(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    for options in ({}, {"config": HotLoraConfig(plan=tiny_plan(tiny_model(FAMILY)), r=4)}):
        loaded = PeftModel.from_pretrained(tiny_model(FAMILY), tmp_path / "adapter", **options)
        assert isinstance(loaded.peft_config["default"], HotLoraConfig)
        assert torch.equal(logits(loaded), expected)
        assert not any(p.requires_grad for p in loaded.parameters())
    trainable = PeftModel.from_pretrained(tiny_model(FAMILY), tmp_path / "adapter", is_trainable=True)
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    second = adapted(seed=3)
    second.load_adapter(tmp_path / "adapter", "y")
    second.set_adapter("y")
    assert torch.equal(logits(second), expected)


@pytest.mark.parametrize("load", [load_adapter, PeftModel.from_pretrained])
def test_what_is_loaded_on_a_bf16_base_is_frozen(load, tmp_path):
    """PEFT casts it to float32 by putting new parameters in place of the experts'."""
    adapted().save_pretrained(tmp_path)
    model = load(tiny_model(FAMILY).to(torch.bfloat16), tmp_path)
    model.load_adapter(tmp_path, "y")
    factors = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert {p.dtype for p in factors.values()} == {torch.float32}
    assert not [name for name, p in factors.items() if p.requires_grad]


def test_peft_finds_the_base_by_itself(tmp_path):
    base = tiny_model(FAMILY)
    base.save_pretrained(tmp_path / "base")
    model = adapted()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(model))


def test_a_config_from_a_newer_version_is_not_half_read(tmp_path):
    adapted().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"train_router"', '"train_everything": true, "train_router"'))
    with pytest.raises(PlanError, match="train_everything"):
        PeftModel.from_pretrained(tiny_model(FAMILY), tmp_path)


def test_transformers_own_add_adapter():
    model = tiny_model(FAMILY)
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):  # 5.24 wants 0.22, which is not released
        with pytest.raises(ValueError, match="version of PEFT you are using is not compatible"):
            model.add_adapter(HotLoraConfig(plan=tiny_plan(model), r=4))
        return
    base = logits(model)
    model.add_adapter(HotLoraConfig(plan=tiny_plan(model), r=4))
    assert torch.equal(logits(model), base)
    fill(model, 0)
    assert torch.equal(logits(model), logits(adapted()))
    model.disable_adapters()
    assert torch.equal(logits(model), base)


@pytest.mark.skipif(Version(peft.__version__) < Version(MIN_PEFT_VERSION), reason="transformers refuses this PEFT")
@pytest.mark.parametrize("adapter_name", ["default", "of_a_task"])
@pytest.mark.parametrize(
    ("family", "options"),
    # Whose checkpoints' names are renamed to others that are renamed again; and DoRA's, of every kind of layer.
    [("laguna", {}), ("mistral_large4", {}), ("deepseek_ocr2", {}), (FAMILY, {"use_dora": True}),
     ("inkling_text", {"use_dora": True})],
)  # fmt: skip
def test_transformers_own_load_adapter_loses_nothing(family, options, adapter_name, tmp_path):
    if family not in families():
        pytest.skip("this transformers does not have the family")
    base = zoo_model(family)
    model = get_peft_model(base, HotLoraConfig(plan=tiny_plan(base), r=4, **options))
    fill(model, 0)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = zoo_model(family)
    again.load_adapter(str(tmp_path), adapter_name)
    found = get_peft_model_state_dict(again, adapter_name=adapter_name, save_embedding_layers=False)
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    saved = {key.removeprefix("base_model.model."): tensor for key, tensor in saved.items()}
    assert found.keys() == saved.keys()
    assert not [key for key, tensor in saved.items() if not torch.equal(found[key], tensor)]


# Several adapters

PLANS = {"x": {0: [1, 3], 1: [2]}, "y": {0: [3, 6]}}


def two_adapters(**of_y):
    model = adapted(PLANS["x"], adapter_name="x", seed=1)
    base = model.get_base_model()
    config = HotLoraConfig(plan=tiny_plan(base, PLANS["y"]), **{"r": 4, "lora_alpha": 8, **of_y})
    model.add_adapter("y", config)
    fill(model, 2, "y")
    return model.eval()


def merged_weights(model, *adapters):
    merged = model.merge_and_unload(adapter_names=list(adapters))
    return {name: weight.clone() for name, weight in merged.state_dict().items()}


def test_combined_by_cat_is_the_weighted_sum_of_the_updates_on_the_union_of_the_plans():
    weights, base = {"x": 0.7, "y": -0.4}, tiny_model(FAMILY).state_dict()
    model = two_adapters(r=2)
    model.add_weighted_adapter(["x", "y"], list(weights.values()), "both", "cat")
    experts = [layer.mlp.experts for layer in model.get_base_model().model.layers]
    assert [layer.expert_ids["both"] for layer in experts] == [(1, 3, 6), (2,)]
    assert model.peft_config["both"].r == 6 and experts[0].scaling["both"] == 1
    assert model.peft_config["both"].plan["experts"] == {"0": [1, 3, 6], "1": [2]}
    both = merged_weights(model, "both")
    each = {name: merged_weights(two_adapters(r=2), name) for name in weights}
    changed = 0
    for name, weight in both.items():
        update = sum(factor * (each[adapter][name] - base[name]) for adapter, factor in weights.items())
        torch.testing.assert_close(weight, base[name] + update, rtol=1e-4, atol=1e-5)
        changed += bool(update.any())
    assert changed == 2 * (4 + 1 + 3 + 2)  # attention, router, shared and both expert weights, in two layers


@pytest.mark.parametrize("how", ["cat", "linear"])
def test_combined_on_a_bf16_base_is_as_on_a_float32_one(how):
    made = []
    for dtype in (torch.float32, torch.bfloat16):
        base = tiny_model(FAMILY).to(dtype)
        model = get_peft_model(base, HotLoraConfig(plan=tiny_plan(base, PLANS["x"]), r=4), adapter_name="x")
        model.add_adapter("y", HotLoraConfig(plan=tiny_plan(base, PLANS["y"]), r=4))
        fill(model, 1, "x")
        fill(model, 2, "y")
        model.add_weighted_adapter(["x", "y"], [0.7, -0.4], "both", how)
        made.append(get_peft_model_state_dict(model, adapter_name="both"))
    assert made[0].keys() == made[1].keys()
    for key, tensor in made[0].items():
        assert made[1][key].dtype == torch.float32 and torch.equal(made[1][key], tensor), key


def test_combined_by_linear_is_pefts_linear_for_every_matrix():
    model, weights = two_adapters(), (0.7, -0.4)
    model.add_weighted_adapter(["x", "y"], list(weights), "both", "linear")
    signed = [w * s for w, s in zip(weights, (16.0, 2.0), strict=True)]  # alpha / r: 64 / 4 and 8 / 4
    for module in model.modules():
        if isinstance(module, LoraLinear):
            pairs = {name: (module.lora_A[name].weight, module.lora_B[name].weight) for name in ("x", "y", "both")}
            A = sum(math.copysign(math.sqrt(abs(s)), s) * pairs[n][0] for n, s in zip("xy", signed, strict=True))
            B = sum(math.sqrt(abs(s)) * pairs[n][1] for n, s in zip("xy", signed, strict=True))
            torch.testing.assert_close(pairs["both"], (A, B))
    layer = model.get_base_model().model.layers[0].mlp.experts
    ids = layer.expert_ids
    assert ids["both"] == (1, 3, 6)
    for n, expert in enumerate(ids["both"]):
        B = sum(
            math.sqrt(abs(s)) * layer.lora_B_down[name][ids[name].index(expert)]
            for name, s in zip("xy", signed, strict=True)
            if expert in ids[name]
        )
        torch.testing.assert_close(layer.lora_B_down["both"][n], B)
    # PEFT itself agrees, for what both can hold.
    plain = get_peft_model(tiny_model(FAMILY), LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj"]), "x")
    plain.add_adapter("y", LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    path = "model.layers.0.self_attn.q_proj"
    ours, theirs = (m.get_base_model().get_submodule(path) for m in (model, plain))
    for name in ("x", "y"):
        theirs.lora_A[name].load_state_dict(ours.lora_A[name].state_dict())
        theirs.lora_B[name].load_state_dict(ours.lora_B[name].state_dict())
    plain.add_weighted_adapter(["x", "y"], list(weights), "both", "linear")
    torch.testing.assert_close(ours.get_delta_weight("both"), theirs.get_delta_weight("both"))


def combined_by_peft(sources, weights, how, **options):
    """A, B of one Linear that PEFT alone has combined. sources: adapter -> its A and B."""
    A, B = next(iter(sources.values()))
    plain = nn.Sequential(nn.Linear(A.shape[1], B.shape[0], bias=False))
    for name, (A, B) in sources.items():
        config = LoraConfig(r=4, lora_alpha={"x": 64, "y": 8}[name], target_modules=["0"])
        if isinstance(plain, PeftModel):
            plain.add_adapter(name, config)
        else:
            plain = get_peft_model(plain, config, name)
        linear = plain.base_model.model[0]
        linear.lora_A[name].weight.data, linear.lora_B[name].weight.data = A.detach().clone(), B.detach().clone()
    plain.add_weighted_adapter(list(sources), [weights[name] for name in sources], "both", how, density=0.3, **options)
    return linear.lora_A["both"].weight, linear.lora_B["both"].weight


@pytest.mark.parametrize(
    ("how", "options"),
    [("ties", {}), ("ties", {"majority_sign_method": "frequency"}), ("magnitude_prune", {})],
)
def test_combined_by_pruned_sums_is_pefts_own_for_every_matrix_of_an_expert(how, options):
    model, weights = two_adapters(), {"x": 0.7, "y": -0.4}
    model.add_weighted_adapter(["x", "y"], list(weights.values()), "both", how, density=0.3, **options)
    layer = model.get_base_model().model.layers[0].mlp.experts
    each = {name: layer.factor_pairs(name) for name in weights}
    for key, ours in layer.factor_pairs("both").items():
        zeros = [torch.zeros_like(factor) for factor in ours]  # of one adapter alone PEFT makes "linear"
        sources = {name: pairs.get(key, zeros) for name, pairs in each.items()}
        torch.testing.assert_close(ours, combined_by_peft(sources, weights, how, **options))
    assert len(layer.factor_pairs("both")) == 3 * 3


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties"])
def test_dare_keeps_a_share_and_scales_it(how):
    model = two_adapters()
    model.add_weighted_adapter(["x", "y"], [0.25, 1.0], "both", how, density=0.3)
    layer = model.get_base_model().model.layers[0].mlp.experts
    (A, _), (source, _) = (layer.factor_pairs(name)[1, "down"] for name in ("both", "x"))  # expert 1 is of x alone
    kept = A != 0
    assert 0.1 < kept.float().mean() < 0.5
    torch.testing.assert_close(A[kept], 2 * source[kept] / 0.3)  # the root of 0.25 * 64 / 4


def test_a_density_that_keeps_nothing_is_refused():
    model = two_adapters()
    before = logits(model)
    with pytest.raises(HotLoraError, match=r"density=0.0001 keeps none of the 128 values of a factor"):
        model.add_weighted_adapter(["x", "y"], [1.0, 1.0], "both", "magnitude_prune", density=1e-4)
    assert list(model.peft_config) == ["x", "y"] and torch.equal(logits(model), before)


def test_weights_may_be_numpys():
    model = two_adapters()
    model.add_weighted_adapter(["x", "y"], [*np.float32([1.0, 0.5])], "both", "ties", density=np.float32(0.5))
    assert "both" in model.peft_config


def test_dare_draws_by_torchs_seed():
    made = []
    for seed in (3, 3, 4):
        model = two_adapters()
        torch.manual_seed(seed)
        model.add_weighted_adapter(["x", "y"], [1.0, 1.0], "both", "dare_linear")
        made.append(model.get_base_model().model.layers[0].mlp.experts.lora_B_down["both"].clone())
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_two_active_adapters_add_up_and_the_combined_one_can_be_saved(tmp_path):
    model = two_adapters()
    model.base_model.set_adapter(["x", "y"])
    expected = logits(model)
    model.add_weighted_adapter(["x", "y"], [1.0, 1.0], "both")
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".both" in n)
    model.set_adapter("both")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    torch.testing.assert_close(logits(load_adapter(tiny_model(FAMILY), tmp_path / "both")), logits(model))


@pytest.mark.parametrize(
    ("adapters", "options", "message"),
    [
        (["x", "none"], {}, r"made by a HotLoraConfig: \['x', 'y'\]"),
        (["x", "y"], {"adapter_name": "x"}, "already has an adapter 'x'"),
        (["x", "y"], {"combination_type": "svd"}, "'svd' is not supported"),
        (["x", "y"], {"combination_type": "ties"}, r"'ties' needs adapters of one rank"),
        (["x", "y"], {"combination_type": "ties", "density": 1.0}, "density=1.0 must be above 0 and below 1"),
        (["x", "y"], {"density": 0.2}, "density=0.2 is of ties, dare_linear"),
        (["x", "y"], {"combination_type": "ties", "density": "x"}, "density=x must be above 0"),
        (["x", "y"], {"svd_rank": 4}, "no use of svd_rank .* leave it out"),
        (["x", "y"], {"majority_sign_method": "total"}, "'total' is of ties, dare_ties, and combination_type is 'cat'"),
        (
            ["x", "y"],
            {"combination_type": "ties", "majority_sign_method": "sum"},
            "'sum' does not exist: give total or frequency",
        ),
        (["x", "y"], {"weights": [float("nan"), 1.0]}, "must be finite numbers, and nan is none"),
        (["x", "y"], {"combination_type": "linear"}, r"one rank, and these have \[4, 2\]"),
    ],
)
def test_adapters_that_cannot_be_combined(adapters, options, message):
    model = two_adapters(r=2)
    before = logits(model)
    with pytest.raises(HotLoraError, match=message):
        model.add_weighted_adapter(adapters, **{"weights": [0.5, 0.5], "adapter_name": "both", **options})
    assert list(model.peft_config) == ["x", "y"] and torch.equal(logits(model), before)


# Ranks and whole modules


def test_rank_and_alpha_patterns_reach_the_experts(tmp_path):
    model = adapted(rank_pattern={"layers.1.mlp.experts": 2, "q_proj": 6}, alpha_pattern={"layers.1.mlp.experts": 3})
    first, second = (layer.mlp.experts for layer in model.get_base_model().model.layers)
    assert first.lora_B_down["default"].shape[-1] == 4 and first.scaling["default"] == 16
    assert second.lora_B_down["default"].shape[-1] == 2 and second.scaling["default"] == 1.5
    assert second.lora_A_gate_up["default"].shape[1] == 4
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapter(tiny_model(FAMILY), tmp_path)), logits(model))
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


def test_modules_to_save_are_trained_whole_and_come_back(tmp_path):
    model = adapted(modules_to_save=["lm_head"])
    head = model.get_base_model().lm_head.modules_to_save["default"]
    head.weight.data.add_(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    model(**tiny_batch(), labels=tiny_batch()["input_ids"]).loss.backward()
    assert head.weight.grad.any()
    model.save_pretrained(tmp_path)
    expected = logits(model)
    for load in (load_adapter, PeftModel.from_pretrained):
        assert torch.equal(logits(load(tiny_model(FAMILY), tmp_path)), expected)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


def test_merged_in_place_and_taken_out_again():
    model, both = two_adapters(), two_adapters()
    both.base_model.set_adapter(["x", "y"])
    expected, alone = logits(both), logits(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.merge_adapter(["x", "y"])
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(dict(model.named_parameters()), before)
    torch.testing.assert_close(logits(model), alone)


def merged_while_spread() -> list[str]:
    """In a process of its own, for torch's process group is the process's."""
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.fsdp import fully_shard

    model = two_adapters()
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    said = []
    for merge in (model.merge_adapter, model.merge_and_unload):
        try:
            merge()
        except HotLoraError as error:
            said.append(str(error))
    said += [f"{path} is merged" for path, module in model.named_modules() if getattr(module, "merged_adapters", ())]
    destroy_process_group()
    return said


def test_nothing_is_merged_into_experts_that_are_spread_over_processes():
    said = apart(merged_while_spread)
    assert len(said) == 2 and all("spread over processes (FSDP2" in message for message in said)


# Where PEFT's conversion for transformers 5 sends an adapter (peft#3711)


def routed_and_shared(model):
    """Which kind of PEFT layer is on each MoE layer's experts, and on its shared experts' gate_proj."""
    found = []
    for layer in moe_layers(model):
        experts = model.get_submodule(layer.experts)
        (path,) = (path for path in layer.shared if path.endswith("gate_proj"))
        found.append((type(experts), type(model.get_submodule(path))))
    return found


def test_plain_peft_sends_shared_experts_adapters_to_the_routed_ones():
    """What ours must not do. If PEFT mends it, this fails, and the words about it can go."""
    names = [f"shared_experts.{name}_proj" for name in ("gate", "up", "down")]
    config = LoraConfig(r=4, target_modules=names)
    model = get_peft_model(zoo_model("deepseek_v2"), config)
    assert routed_and_shared(model) == [(ParamWrapper, nn.Linear)] * 3


def test_ours_stay_where_they_were_meant():
    model = zoo_model("deepseek_v2")
    plan = {"version": 1, "experts": {"1": [0, 5]}, "num_experts": 8}
    model = get_peft_model(model, HotLoraConfig(plan=plan, r=4))
    experts = type(zoo_model("deepseek_v2").model.layers[0].mlp.experts)
    assert routed_and_shared(model) == [(experts, LoraLinear), (HotLoraExperts, LoraLinear), (experts, LoraLinear)]
    shared = model.get_base_model().model.layers[0].mlp.shared_experts.gate_proj
    assert shared.lora_A["default"].weight.shape == (4, 32)
