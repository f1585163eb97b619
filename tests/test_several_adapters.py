"""Several adapters on one base, of plans and places that differ: deleting, merging, combining, loading anew."""

import pytest
import torch
from peft import get_peft_model
from peft.helpers import DoraCaching
from tiny import fill, tiny_batch, tiny_model, tiny_plan

from hotlora.adapter.config import HotLoraConfig
from hotlora.adapter.load import load_adapter
from hotlora.base.errors import HotLoraError

FAMILY = "qwen2_moe"
NOTHING_ELSE = {"train_attention": False, "train_router": False, "train_shared": False}
CONFIGS = {
    "all": {},
    "few": {"experts": {0: [0, 2], 1: [5]}, **NOTHING_ELSE},
    "first": {"experts": {0: [3, 4], 1: []}, **NOTHING_ELSE},
    "no_router": {"experts": {0: [1], 1: [0, 7]}, "train_router": False},
}


def config_for(experts=None, **options):
    return HotLoraConfig(plan=tiny_plan(tiny_model(FAMILY), experts), **{"r": 4, "lora_alpha": 8, **options})


def several(*names, **more):
    """The adapters of these names in one model, the first active."""
    model = get_peft_model(tiny_model(FAMILY), config_for(**CONFIGS[names[0]]), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config_for(**CONFIGS[name]))
    for seed, name in enumerate(CONFIGS):
        if name in names:
            fill(model, seed, name)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(**tiny_batch()).logits


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("names", [("all", "few", "no_router"), ("no_router", "first", "few")])
def test_one_adapter_is_active_when_the_active_one_is_deleted(names):
    model = several(*names)
    model.requires_grad_(False)
    with pytest.warns(UserWarning, match="was active which is now deleted"):
        model.delete_adapter(names[0])
    (left,) = model.active_adapters
    assert left in names[1:] and model.active_adapter == left and not trained(model)
    assert torch.equal(logits(model), logits(several(left)))
    assert model.get_model_status().active_adapters == [left]


def test_deleting_leaves_what_is_active_and_what_trains():
    model = several("few", "all", "first")
    before, training = logits(model), trained(model)
    model.delete_adapter("all")
    assert model.active_adapters == ["few"] and torch.equal(logits(model), before) and trained(model) == training
    model.base_model.set_adapter(["few", "first"])
    model.delete_adapter("few")
    assert model.active_adapters == ["first"] and torch.equal(logits(model), logits(several("first")))
    model.delete_adapter("first")
    assert model.active_adapters == []


def test_merging_one_while_another_is_active_is_refused_where_that_would_go_on():
    model = several("all", "few")
    before = logits(model)
    with pytest.raises(HotLoraError, match=r"\['all'\] are active, and .* has no part of \['few'\].*set_adapter"):
        model.merge_adapter(["few"])
    assert torch.equal(logits(model), before)
    model.set_adapter("few")
    model.merge_adapter(["few"])
    torch.testing.assert_close(logits(model), logits(several("few")), rtol=1e-4, atol=1e-4)
    model.merge_adapter(["all"])
    model.unmerge_adapter()
    model.merge_adapter(["all"])  # it has a part in every layer, so that nothing of the other goes on
    torch.testing.assert_close(logits(model), logits(several("all")), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_a_name_that_no_adapter_has_is_told_before_anything_is_merged(call):
    model = several("all", "few")
    before = logits(model)
    with pytest.raises(HotLoraError, match=r"adapters, \['all', 'few'\], and 'typo' is none of them"):
        getattr(model, call)(adapter_names=["all", "typo"])
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("option", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 4]}])
def test_adapters_with_whole_weights_are_not_combined(option):
    model = get_peft_model(tiny_model(FAMILY), config_for(**option), adapter_name="a")
    model.add_adapter("b", config_for())
    with pytest.raises(HotLoraError, match=f"an adapter with {next(iter(option))} cannot be combined"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both")
    assert list(model.peft_config) == ["a", "b"]


def test_a_combined_adapter_has_their_task():
    model = get_peft_model(tiny_model(FAMILY), config_for(task_type="FEATURE_EXTRACTION"), adapter_name="a")
    model.base_model.add_weighted_adapter(["a"], [1.0], "b")
    assert model.peft_config["b"].task_type == "FEATURE_EXTRACTION"


@pytest.mark.parametrize("how", ["delete", "over"])
def test_doras_norms_are_those_of_the_adapter_that_has_the_name_now(how, tmp_path):
    for seed in (1, 2):
        model = get_peft_model(tiny_model(FAMILY), config_for(use_dora=True, train_attention=False, train_shared=False))
        fill(model, seed, scale=0.5)
        model.save_pretrained(tmp_path / str(seed))
    expected = logits(model.eval())
    model = load_adapter(several("first"), tmp_path / "1", "t")
    model.set_adapter("t")
    with DoraCaching():
        logits(model)
        if how == "delete":
            model.delete_adapter("t")
            load_adapter(model, tmp_path / "2", "t").set_adapter("t")
        else:
            model.load_adapter(tmp_path / "2", "t")
        torch.testing.assert_close(logits(model), expected)
