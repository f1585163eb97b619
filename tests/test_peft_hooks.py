"""What hotlora changes in PEFT: plain PEFT goes on as without it, and its ways take our adapters or say why not."""

import peft
import pytest
import torch
from apart import apart
from peft import LoraConfig, LoraModel, PeftConfig, PeftModel, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from peft.utils.hotswap import hotswap_adapter
from plain_peft import facts, facts_and_changes
from tiny import fill, tiny_batch, tiny_model, tiny_plan

import hotlora
from hotlora.adapter.config import HotLoraConfig
from hotlora.adapter.load import load_adapter
from hotlora.adapter.model import _DECIDE, HotLoraModel
from hotlora.base.errors import HotLoraError
from hotlora.hf.peft_hooks import key_of_today


def config_for(model, experts=None, **options):
    return HotLoraConfig(plan=tiny_plan(model, experts), **{"r": 4, "lora_alpha": 8, **options})


def adapted(seed=0, **options):
    model = get_peft_model(tiny_model(), config_for(tiny_model(), **options))
    fill(model, seed)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(**tiny_batch()).logits


CHANGED = {
    "peft.config.PeftConfigMixin.from_peft_type",
    "peft.optimizers.lorafa.LoraFAOptimizer.__init__",
    "peft.peft_model.PeftModel.load_adapter",
    "peft.peft_model.PeftModel.save_pretrained",
    "peft.tuners.lora.model.LoraModel._remap_adapter_state_dict_for_load",
    "peft.tuners.lora.model.LoraModel._remove_adapter_name_from_key",
    "peft.tuners.lora.model.LoraModel.inject_adapter",
    "peft.utils.hotswap.check_hotswap_configs_compatible",
    "peft.utils.transformers_weight_conversion.build_peft_weight_mapping",
    "peft.utils.transformers_weight_conversion.convert_peft_adapter_state_dict_for_transformers",
    "transformers.modeling_utils.PreTrainedModel.load_adapter",
}
"""All of hotlora/hf/peft_hooks.py."""


def test_plain_peft_does_what_it_does_without_hotlora(tmp_path):
    with_it = facts(str(tmp_path / "with"))
    without, changed = apart(facts_and_changes, str(tmp_path / "without"))
    assert with_it.keys() == without.keys() and len(with_it) > 30
    for name, value in without.items():
        assert with_it[name] == value, name
    assert without["tables: config"] and without["tables: isinstance"] and without["tables: tuner"]
    assert "of_a_newer_peft" in without["files: warnings"][0]
    assert set(changed) == CHANGED and set(changed.values()) == {"hotlora.hf.peft_hooks"}


# Ours


def test_a_hot_adapter_on_a_plain_one():
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"), "plain")
    fill(model, 3, "plain")
    assert type(model.base_model) is LoraModel
    expected = logits(model.eval())
    model.add_adapter("hot", config_for(tiny_model()))
    fill(model, 0, "hot")
    assert type(model.base_model) is HotLoraModel and torch.equal(logits(model), expected)
    model.set_adapter("hot")
    assert torch.equal(logits(model), logits(adapted()))
    model.delete_adapter("hot")
    model.set_adapter("plain")
    assert torch.equal(logits(model), expected)


def test_saved_configs_are_read_as_what_they_are(tmp_path):
    adapted().save_pretrained(tmp_path)
    for kind in (PeftConfig, LoraConfig, HotLoraConfig):
        assert type(kind.from_pretrained(tmp_path)) is HotLoraConfig


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.0.mlp.gate.lora_B{}.weight.values",
        "model.layers.0.mlp.experts.lora_B_down{}.rank_8.kept",
        "model.layers.0.mlp.experts.lora_B_down{}.values",
        "model.layers.0.self_attn.q_proj.lora_B{}.kept",
        "model.layers.0.mlp.gate.lora_A{}.weight",
        "model.layers.0.mlp.experts.lora_A_gate_up{}",
    ],
)
@pytest.mark.parametrize("name", ["default", "weight", "values", "lora_B", "a-b"])
def test_no_key_holds_the_adapters_name(key, name):
    plain = key.format("")
    assert LoraModel._remove_adapter_name_from_key(key.format(f".{name}"), name) == plain
    assert key_of_today(plain) == plain
    deep = "rank_8" in key or "weight.values" in key
    assert key_of_today(key.format(f".{name}")) == (plain if deep else key.format(f".{name}"))


@pytest.mark.parametrize("options", [{}, {"train_a": False}])
def test_hotswap_is_refused_with_the_reason(options, tmp_path):
    model = adapted(1, **options)
    model.save_pretrained(tmp_path)
    loaded = load_adapter(tiny_model(), tmp_path)
    before = logits(loaded)
    with pytest.raises(HotLoraError, match=r"hotswap_adapter is not supported with a HotLoraConfig.*set_adapter"):
        hotswap_adapter(loaded, str(tmp_path), "default")
    assert torch.equal(logits(loaded), before)


@pytest.mark.parametrize("how", [{"hotswap": True}, {}])
@pytest.mark.parametrize("there", ["hot", "plain"])
def test_transformers_hotswap_is_refused_with_the_reason(there, how, tmp_path):
    adapted(1).save_pretrained(tmp_path / "hot")
    plain = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny_model(), plain).save_pretrained(tmp_path / "plain")
    model = tiny_model()
    if not how:
        model.enable_peft_hotswap(check_compiled="ignore")
    model.load_adapter(str(tmp_path / there), adapter_name="one")
    before = logits(model)
    with pytest.raises(
        HotLoraError, match=r"load_adapter's hotswap is not supported with a HotLoraConfig.*set_adapter"
    ):
        model.load_adapter(str(tmp_path / "hot"), adapter_name="one", **how)
    with pytest.raises(ValueError, match="already exists"):
        model.load_adapter(str(tmp_path / "hot"), adapter_name="one", hotswap=False)
    assert torch.equal(logits(model), before)


OTHERS = [
    ({"experts": {0: [0, 2, 7], 1: [1, 3, 6]}}, "other experts"),
    ({"lora_alpha": 16}, "lora_alpha=16 and not 8"),
    ({"r": 8}, "r=8 and not 4"),
    ({"train_a": False, "a_seed": 3}, "train_a=False and not True, a_seed=3 and not None"),
    ({"use_rslora": True}, "use_rslora=True and not False"),
]


@pytest.mark.parametrize(("options", "reason"), OTHERS)
def test_another_adapter_is_not_loaded_into_one_that_has_the_name(options, reason, tmp_path):
    adapted(1, **options).save_pretrained(tmp_path)
    model = adapted(2)
    before = logits(model)
    with pytest.raises(HotLoraError, match=rf"already has an adapter 'default'.*{reason}.*another adapter_name"):
        model.load_adapter(tmp_path, "default")
    with pytest.raises(HotLoraError, match="leave out config"):
        PeftModel.from_pretrained(tiny_model(), tmp_path, config=config_for(tiny_model()))
    assert torch.equal(logits(model), before)
    model.load_adapter(tmp_path, "other")
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(adapted(1, **options)))


def test_a_plain_adapter_is_not_loaded_into_a_hot_one(tmp_path):
    plain = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny_model(), plain).save_pretrained(tmp_path)
    with pytest.raises(HotLoraError, match=r"has no HotLoraConfig.*delete_adapter\('default'\)"):
        adapted(2).load_adapter(tmp_path, "default")


def test_a_hot_adapter_is_not_loaded_into_a_plain_one(tmp_path):
    """PEFT would give the plain one those of its tensors that it has names for, and drop the experts'."""
    adapted(1).save_pretrained(tmp_path / "hot")
    plain = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(tiny_model(), plain).eval()
    before = logits(model)
    with pytest.raises(HotLoraError, match=r"has a HotLoraConfig.*delete_adapter\('default'\)"):
        model.load_adapter(tmp_path / "hot", "default")
    with pytest.raises(HotLoraError, match="leave out config"):
        PeftModel.from_pretrained(tiny_model(), tmp_path / "hot", config=plain)
    assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "adapter_config.json").unlink()  # which PEFT does not read where the name is taken
    other = get_peft_model(tiny_model(), plain).eval()
    other.load_adapter(tmp_path / "plain", "default")
    assert torch.equal(logits(other), before)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"train_a": False, "a_seed": 3}, {"use_dora": True}, {"modules_to_save": ["lm_head"]},
        {"lora_dropout": 0.1}, {"rank_pattern": {"q_proj": 2}}, {"trainable_token_indices": [3, 4]},
    ],
)  # fmt: skip
def test_other_weights_of_the_same_adapter_are_loaded_again(options, tmp_path):
    """As a training loop does; dropout, and where the plan came from, decide nothing of what the weights mean."""
    saved = adapted(1, **options)
    saved.save_pretrained(tmp_path)
    model = adapted(2, **options | ({"lora_dropout": 0.3} if "lora_dropout" in options else {}))
    model.peft_config["default"].plan["rule"] = "edited"
    assert not model.load_adapter(tmp_path, "default").unexpected_keys
    assert torch.equal(logits(model.eval()), logits(saved))


def test_what_decides_is_known_of_every_option():
    in_training = {"lora_dropout", "task_type", "normalize_moe_lora", "base_quantization", "on_top_of", "plan"}
    assert set(HotLoraConfig.__annotations__) - set(_DECIDE) == in_training


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "lora_A_gate_up.default holds those of several experts"),
        ({"train_a": False}, "lora_B_gate_up.default holds those"),
        ({"train_full_experts": True}, "lora_full_gate_up.default holds those"),
        ({"train_a": False, "experts": {0: [], 1: []}}, "these A are frozen"),
    ],
)
def test_lorafa_is_refused_with_the_reason(options, reason):
    with pytest.raises(HotLoraError, match=rf"takes the A and B of Linears.*{reason}.*train_a=False"):
        create_lorafa_optimizer(adapted(**options), r=4, lora_alpha=8, lr=0.1)


def test_a_conversion_at_save_is_refused_before_anything_is_written(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "initial")
    config = (tmp_path / "initial" / "adapter_config.json").read_bytes()
    for options in ({}, {"selected_adapters": ["default"]}):
        with pytest.raises(HotLoraError, match=r"path_initial_model_for_weight_conversion=.* leave it out"):
            model.save_pretrained(
                tmp_path / "saved", path_initial_model_for_weight_conversion=str(tmp_path / "initial"), **options
            )
    assert not (tmp_path / "saved").exists()
    assert (tmp_path / "initial" / "adapter_config.json").read_bytes() == config


def test_lorafa_takes_routers_and_attention():
    model = adapted(experts={0: [], 1: []})
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=0.1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model(**tiny_batch(), labels=tiny_batch()["input_ids"]).loss.backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_B" in name}


@pytest.mark.parametrize(
    "options",
    [
        {}, {"train_a": False}, {"use_dora": True}, {"train_full_experts": True}, {"train_a": False, "is_sparse": True},
        {"ranks": {"0": [2, 4, 8], "1": [4, 4, 2]}},
    ],
)  # fmt: skip
def test_status_and_disabling_know_every_way_to_hold_a_factor(options):
    options = dict(options)
    model = tiny_model()
    plan = tiny_plan(model) | ({"ranks": options.pop("ranks")} if "ranks" in options else {})
    if options.pop("is_sparse", False):
        options["mask"] = hotlora.adapter.mask.draw_mask(adapted(train_a=False))
    base = logits(model)
    model = get_peft_model(model, HotLoraConfig(plan=plan, r=4, **options))
    fill(model, 0)
    layers = model.get_layer_status()
    assert {layer.name.rpartition(".")[2] for layer in layers} >= {"q_proj", "gate", "experts"}
    for layer in layers:
        assert layer.requires_grad == {"default": True} and layer.devices == {"default": ["cpu"]}, layer
    status = model.get_model_status()
    assert (status.requires_grad, status.enabled, status.active_adapters) == ({"default": True}, True, ["default"])
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    tuned = logits(model.eval())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    with model.disable_adapter():
        assert torch.equal(logits(model), base) and not model.get_model_status().enabled
    assert torch.equal(logits(model), tuned) and not torch.equal(tuned, base)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    model.set_requires_grad("default", False)
    assert model.get_model_status().requires_grad == {"default": False}


def test_peft_is_the_one_that_was_read():
    """The functions that are changed are PEFT's internal ones: another minor version must be looked at again."""
    assert peft.__version__.startswith("0.21.")
