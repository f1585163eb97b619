"""An adapter that is refused leaves the model as it was: modules, parameters, hooks, what trains, other adapters."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import fill, tiny_batch, tiny_model, tiny_plan

from hotlora.adapter.config import HotLoraConfig
from hotlora.adapter.experts import HotFullExperts
from hotlora.adapter.formats.import_peft import import_adapter
from hotlora.adapter.load import load_adapter
from hotlora.adapter.mask import draw_mask
from hotlora.adapter.quantize import quantize_experts
from hotlora.base.errors import FileError, HotLoraError, ModelError, PlanError

BATCH = tiny_batch()


def config_for(model, experts=None, **options):
    return HotLoraConfig(plan=tiny_plan(model, experts), **{"r": 4, "lora_alpha": 8, **options})


def logits(model):
    with torch.no_grad():
        return model(**BATCH).logits


def state(model):
    """All of a model but its tensors' values."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "modules": [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()],
        "parameters": [(name, p.requires_grad, id(p)) for name, p in model.named_parameters()],
        "hooks": [(name, hook, len(getattr(m, hook))) for name, m in model.named_modules() for hook in hooks],
        "adapters": sorted(getattr(model, "peft_config", {})),
        "tables": [
            (name, key, sorted(value))
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, dict) and all(isinstance(k, str) for k in value)
        ],
        "active": [getattr(module, "active_adapter", None) for module in model.modules()],
    }


def mask_for(**options):
    model = get_peft_model(tiny_model(), config_for(tiny_model(), train_a=False, **options))
    fill(model, 0)
    return draw_mask(model)


# Options, the error and its message.
REFUSED = {
    "a mask of another rank": (
        lambda: {"train_a": False, "r": 8, "mask": mask_for(), "modules_to_save": ["lm_head"]},
        HotLoraError,
        "same plan and rank",
    ),
    "a mask of another adapter": (
        lambda: {"train_a": False, "train_router": False, "mask": mask_for()},
        PlanError,
        "for another adapter",
    ),
    "modules that are not there": (
        lambda: {"trainable_token_indices": {"no_such_module": [1]}},
        ValueError,
        "no_such_module|not found",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("is_second", [False, True])
def test_a_refused_config_leaves_the_model_as_it_was(name, is_second):
    options, error, message = REFUSED[name]
    model = tiny_model()
    if is_second:
        model = get_peft_model(model, config_for(model, {0: [1], 1: []}), "first")
        fill(model, 1, "first")
    base = model.get_base_model() if is_second else model
    expected, before = logits(model), state(model)
    config = config_for(base, **options())
    with pytest.raises(error, match=message):
        if is_second:
            model.add_adapter("second", config)
        else:
            get_peft_model(model, config)
    assert state(model) == before and torch.equal(logits(model), expected)
    # A good one put on next trains what it trains on a fresh model.
    good = config_for(base, train_a=False)
    if is_second:
        model.add_adapter("second", good)
        model.set_adapter("second")
    else:
        model = get_peft_model(model, good, "second")
    fresh = get_peft_model(tiny_model(), config_for(tiny_model(), train_a=False), "second")
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, fresh)]
    assert trained[0] == trained[1] and len(trained[0]) == 14


@pytest.mark.parametrize("options", [{"use_dora": True}, {"train_full_experts": True}])
def test_what_quantized_experts_cannot_have_leaves_them_alone(options):
    pytest.importorskip("bitsandbytes")
    model = tiny_model()
    quantize_experts(model, 8)
    before = state(model)
    with pytest.raises(HotLoraError, match="not quantized"):
        get_peft_model(model, config_for(model, **options))
    assert state(model) == before


@pytest.mark.parametrize("is_second", [False, True])
def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(is_second, tmp_path):
    saved = get_peft_model(tiny_model(), config_for(tiny_model()))
    saved.save_pretrained(tmp_path)
    weights, file = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors = load_file(weights)
    save_file(dict(list(tensors.items())[1:]), weights)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"weights_sha256": None}))
    model = tiny_model()
    model.gradient_checkpointing_enable()  # for which PEFT hooks the embeddings
    if is_second:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"), "first")
    before = state(model)
    with pytest.raises(FileError, match="1 tensors are missing"):
        load_adapter(model, tmp_path, "second")
    assert state(model) == before


def test_a_refused_import_leaves_the_model_as_it_was(tmp_path):
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    wider = {key: torch.cat([t, t]) if "lora_B" in key else t for key, t in tensors.items()}
    save_file(wider, tmp_path / "adapter_model.safetensors")
    base = tiny_model()
    base.gradient_checkpointing_enable()
    before = state(base)
    with pytest.raises(FileError, match="does not fit this model"):
        import_adapter(base, tmp_path)
    assert state(base) == before


def test_a_plain_adapter_that_our_layers_refuse_leaves_the_model_as_it_was():
    model = get_peft_model(tiny_model(), config_for(tiny_model()))
    before = state(model)
    with pytest.raises(PlanError, match="takes adapters from a HotLoraConfig only"):
        model.add_adapter("plain", LoraConfig(r=4, target_modules=["q_proj", "experts"], task_type="CAUSAL_LM"))
    assert state(model) == before


# Full experts beside low-rank updates of them


@pytest.mark.parametrize("full_first", [False, True])
def test_full_experts_and_low_rank_ones_share_no_layer(full_first, tmp_path):
    base = tiny_model()
    switches = {"train_attention": False, "train_router": False}
    model = get_peft_model(base, config_for(base, {0: [1, 3], 1: []}, train_full_experts=full_first, **switches), "a")
    before = state(model)
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.experts already has an adapter of another kind"):
        model.add_adapter("b", config_for(base, {0: [2], 1: [2]}, train_full_experts=not full_first, **switches))
    assert state(model) == before
    # In other layers both train what they are for, and both come back.
    model.add_adapter("b", config_for(base, {0: [], 1: [2]}, train_full_experts=not full_first, **switches))
    full = [m for m in model.modules() if isinstance(m, HotFullExperts)]
    assert len(full) == 1 and full[0].expert_ids == ({"a": (1, 3)} if full_first else {"b": (2,)})
    for seed, name in enumerate("ab"):
        fill(model, seed, name)
    model.save_pretrained(tmp_path)
    for name in "ab":
        model.set_adapter(name)
        assert torch.equal(logits(load_adapter(tiny_model(), tmp_path / name)), logits(model))
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path / name).eval()), logits(model))
