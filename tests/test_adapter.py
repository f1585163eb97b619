"""The adapter on whole models: exactness, what trains, files, merging, several adapters, errors, counts."""

import copy
import json
import shutil
import weakref

import pytest
import torch
import torch.nn.functional as F
from apart import apart
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, tiny_batch, tiny_config, tiny_model, tiny_plan
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from zoo import zoo_model

from hotlora.adapter.config import HotLoraConfig
from hotlora.adapter.count import count_parameters
from hotlora.adapter.experts import HotExperts, HotLoraExperts
from hotlora.adapter.formats.export import export_adapter
from hotlora.adapter.load import load_adapter
from hotlora.adapter.mergeable import MergeableLayer
from hotlora.adapter.parallel import ParallelAdapters
from hotlora.adapter.raw_weights import HotLoraRouter
from hotlora.base.errors import FileError, HotLoraError, ModelError, PlanError
from hotlora.hf.moe_layers import moe_layers
from hotlora.routing.plan import ExpertPlan
from hotlora.runs.load import load

PLANNED = (1, 3, 6)


def adapted(family="olmoe", model=None, experts=None, seed=0, randomise=True, **config):
    """A tiny model with an adapter whose weights are random, so that it does something."""
    model = tiny_model(family) if model is None else model
    peft_model = get_peft_model(model, HotLoraConfig(plan=tiny_plan(model, experts), **{"r": 4, **config}))
    if randomise:
        fill(peft_model, seed)
    return peft_model.eval()


def fill(model, seed, adapter="default"):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and name.replace(".weight", "").endswith(f".{adapter}"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def logits(model, batch=None, **kwargs):
    with torch.no_grad():
        return model(**(batch or tiny_batch()), **kwargs).logits


# Exactness


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_B_zero_the_logits_are_the_bases_bit_for_bit(family, dtype):
    model = tiny_model(family).to(dtype)
    expected = logits(model)
    model = adapted(model=model, randomise=False)
    assert model.get_base_model().model.layers[0].mlp.experts.lora_A_down["default"].dtype == torch.float32
    assert torch.equal(logits(model), expected)


def reference_block(block, hidden):
    """A routed block written out: the router with its update, top-k by hand, one expert after another."""
    (E, D), router, layer = block.gate.weight.shape, block.gate, block.experts
    x = hidden.reshape(-1, D)
    scaling = router.scaling["default"]
    router_A, router_B = router.lora_A["default"].weight, router.lora_B["default"].weight
    router_logits = x @ router.base_layer.weight.T + scaling * (x @ router_A.T) @ router_B.T
    # In float32 whatever the model's dtype: so is every family's.
    weights, index = router_logits.softmax(-1, dtype=torch.float32).topk(router.base_layer.top_k)
    if getattr(router.base_layer, "norm_topk_prob", True):  # mixtral always does, and has no such attribute
        weights = weights / weights.sum(-1, keepdim=True)
    slots = {expert: n for n, expert in enumerate(PLANNED)}
    output = torch.zeros_like(x)
    for expert in range(E):
        W_gate, W_up = layer.base_layer.gate_up_proj[expert].chunk(2)
        W_down = layer.base_layer.down_proj[expert]
        if expert in slots:
            names = ("lora_A_gate_up", "lora_B_gate_up", "lora_A_down", "lora_B_down")
            held = [getattr(layer, name)["default"] for name in names]
            # With share_a some are of all experts, and have one row.
            A_gate_up, B_gate_up, A_down, B_down = (its[slots[expert] if len(its) > 1 else 0] for its in held)
            (A_gate, A_up), (B_gate, B_up) = A_gate_up.chunk(2), B_gate_up.chunk(2)
            W_gate, W_up = W_gate + scaling * B_gate @ A_gate, W_up + scaling * B_up @ A_up
            W_down = W_down + scaling * B_down @ A_down
        y = (F.silu(x @ W_gate.T) * (x @ W_up.T)) @ W_down.T
        output = output + y * (weights * (index == expert)).sum(-1, keepdim=True).to(y.dtype)
    if hasattr(block, "shared_expert"):
        output = output + torch.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)
    return output.reshape(hidden.shape)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_whole_model_output_and_gradients_equal_the_loop(family, dtype, tolerance):
    """Attention, router, shared experts and experts at once, in every family."""
    model = adapted(family, model=tiny_model(family).to(dtype))
    batch = {"input_ids": tiny_batch()["input_ids"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def run():
        output = model(**batch).logits
        probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return [output, *torch.autograd.grad((output * probe.to(dtype)).sum(), list(trained.values()))]

    ours = run()
    for layer in model.get_base_model().model.layers:
        layer.mlp.forward = lambda hidden, block=layer.mlp: reference_block(block, hidden)
    for name, mine, reference in zip(["logits", *trained], ours, run(), strict=True):
        assert (mine - reference).norm() <= tolerance * reference.norm(), name
        assert reference.norm() > 0, name


# What trains


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_where_the_plan_says_and_nowhere_else(family):
    model = adapted(family, experts={0: [1, 3, 6], 1: []})
    model(**tiny_batch(), labels=tiny_batch()["input_ids"]).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in with_gradient)
    assert not any("shared_expert_gate" in name for name in with_gradient)
    layers = model.get_base_model().model.layers
    assert isinstance(layers[0].mlp.experts, HotLoraExperts) and not isinstance(layers[1].mlp.experts, HotLoraExperts)
    assert layers[0].mlp.experts.expert_ids == {"default": PLANNED}
    assert layers[0].mlp.experts.lora_A_gate_up["default"].shape == (3, 8, 32)
    for layer in layers:
        assert isinstance(layer.mlp.gate, HotLoraRouter)
        assert isinstance(layer.self_attn.o_proj, LoraLinear)
        if family == "qwen2_moe":
            assert isinstance(layer.mlp.shared_expert.down_proj, LoraLinear)


@pytest.mark.parametrize("num_hidden_layers", [2, 12])
def test_targets_are_exactly_the_names_that_were_meant(num_hidden_layers):
    """From 20 targets on PEFT shortens the names to suffixes; layers 1 and 11 must not be confused by it."""
    layers = {i: [0] for i in range(num_hidden_layers) if i != 1}
    model = tiny_model("qwen2_moe", num_hidden_layers=num_hidden_layers, mlp_only_layers=[0])
    found = moe_layers(model)
    meant = {layer.experts for layer in found if layer.layer != 1} | {layer.router for layer in found}
    meant |= {path for layer in found for path in layer.shared}
    meant |= {f"model.layers.{i}.self_attn.{n}_proj" for i in range(num_hidden_layers) for n in "qkvo"}
    model = adapted(model=model, experts={i: ids for i, ids in layers.items() if i} or {1: [0]})
    if num_hidden_layers == 2:
        meant.add("model.layers.1.mlp.experts")
    assert set(model.base_model.targeted_module_names) == meant


def test_switches():
    parts = {"attention", "router", "shared", "experts"}
    for off in ({"attention"}, {"router"}, {"shared"}, {"attention", "router", "shared"}):
        counts = count_parameters(adapted("qwen2_moe", **{f"train_{part}": False for part in off}))
        assert {part for part in parts if counts[part]} == parts - off
        assert sum(counts[part] for part in parts) == counts["trainable"]
    counts = count_parameters(adapted("qwen2_moe", experts={0: [], 1: []}))
    assert counts["experts"] == 0 and counts["router"] > 0


def test_a_initial_draw_is_peft_linears_and_follows_the_seed():
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        layer = adapted(randomise=False).get_base_model().model.layers[0].mlp.experts
        draws.append(layer.lora_A_gate_up["default"].detach())
        for name, fan_in in (("lora_A_gate_up", 32), ("lora_A_down", 16)):
            bound = getattr(layer, name)["default"].abs().max() * fan_in**0.5
            assert 0.95 < bound <= 1.0
        assert not layer.lora_B_gate_up["default"].any() and not layer.lora_B_down["default"].any()
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_dropout_acts_in_training_only():
    model = adapted(lora_dropout=0.5, train_attention=False, train_router=False)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    torch.manual_seed(0)
    first = logits(model)
    torch.manual_seed(0)
    assert torch.equal(logits(model), first)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_nothing(dropout):
    gradients = []
    for checkpointing in (False, True):
        model = adapted("qwen2_moe", lora_dropout=dropout).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        model(**tiny_batch(), labels=tiny_batch()["input_ids"]).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family):
    model, ids = adapted(family), tiny_batch(2, 5)["input_ids"][:1]
    expected = ids
    for _ in range(8):
        expected = torch.cat([expected, logits(model, {"input_ids": expected})[:, -1:].argmax(-1)], dim=1)
    made = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(made, expected)
    model.train()  # tensors kept from generate's inference mode must not be in the way
    model(input_ids=ids, labels=ids).loss.backward()


def test_router_logits_and_auxiliary_loss_are_the_adapted_routers():
    model, batch = adapted(), tiny_batch()
    out, base = model(**batch, output_router_logits=True), None
    with model.disable_adapter():
        base = model(**batch, output_router_logits=True)
    assert out.aux_loss != base.aux_loss
    assert not torch.equal(out.router_logits[0], base.router_logits[0])


# Save and load


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter_name", ["default", "b"])
def test_saved_and_loaded_is_the_same(family, adapter_name, tmp_path):
    model = adapted(family, lora_dropout=0.1, use_rslora=True, train_shared=False)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["plan"] == ExpertPlan.from_dict(tiny_plan(tiny_model(family))).to_dict()
    assert config["train_shared"] is False and config["peft_type"] == "LORA"
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert "base_model.model.model.layers.0.mlp.gate.lora_A.weight" in keys
    assert "base_model.model.model.layers.0.mlp.experts.lora_B_gate_up" in keys

    loaded = load_adapter(tiny_model(family), tmp_path, adapter_name)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training
    assert loaded.peft_config[adapter_name].use_rslora

    again = tmp_path / "again"
    load_adapter(tiny_model(family), str(tmp_path), is_trainable=True).save_pretrained(again)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def test_bf16_base_with_float32_adapter_is_saved_without_loss(tmp_path):
    model = adapted(model=tiny_model().to(torch.bfloat16))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapter(tiny_model().to(torch.bfloat16), tmp_path)), logits(model))


def test_a_loaded_adapter_can_be_trained_further(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = load_adapter(tiny_model(), tmp_path, is_trainable=True)
    trained = [name for name, p in loaded.named_parameters() if p.requires_grad]
    assert trained == [name for name, p in model.named_parameters() if p.requires_grad]


def test_pefts_own_load_adapter_resumes_from_a_checkpoint(tmp_path):
    """As transformers' Trainer does: the weights go into the adapter that is there."""
    trained = adapted(seed=1)
    trained.save_pretrained(tmp_path)
    model = adapted(seed=2)
    result = model.load_adapter(tmp_path, "default", is_trainable=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(logits(model), logits(trained))
    again = PeftModel.from_pretrained(tiny_model(), tmp_path, config=HotLoraConfig.from_pretrained(tmp_path))
    assert torch.equal(logits(again), logits(trained))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"perft": "R", "perft_adapters": 4}])
def test_autocast_rounds_no_router_and_no_norm(options):
    """A family whose routers stay float32 in a bfloat16 model: training chooses the experts that evaluation chooses."""
    model = zoo_model("ernie4_5_moe").to(torch.bfloat16)
    kept = [layer.router for layer in moe_layers(model)]
    for path in kept:
        model.get_submodule(path).float()
    beside = {"train_router": False, "train_attention": False, "train_shared": False} if "perft" in options else {}
    config = HotLoraConfig(plan=tiny_plan(model), r=4, lora_alpha=8, **options, **beside)
    adapted = get_peft_model(model, config)
    fill(adapted, 0)
    found = []
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            values = []
            for module in adapted.modules():
                if isinstance(module, HotLoraRouter):
                    values += [module._delta("default", name) for name in module._weights]
                if isinstance(module, HotExperts) and "use_dora" in options:
                    values += module._norms("default", module._groups["default"][0])
                if isinstance(module, ParallelAdapters):
                    hidden_TD = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
                    values += module._routed("default", hidden_TD)
            found.append(values)
    assert len(found[0]) > 1
    for plain, autocast in zip(*found, strict=True):
        assert plain.dtype == autocast.dtype and torch.equal(plain, autocast)


def test_experts_alone_train_without_a_gradient_from_below():
    model = adapted(experts={0: [0, 5]}, train_attention=False, train_router=False)
    model(**tiny_batch(), labels=tiny_batch()["input_ids"]).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(gradients) == 4 and all(grad.any() for grad in gradients.values())


def test_config_round_trips():
    plan = ExpertPlan.from_dict(tiny_plan(tiny_model()))
    config = HotLoraConfig(plan=plan, r=4, lora_dropout=0.05, train_router=False)
    assert config.plan == HotLoraConfig(plan=plan.to_dict()).plan
    for made in (config, get_peft_model(tiny_model(), config).peft_config["default"]):
        data = json.loads(json.dumps(made.to_dict()))
        again = HotLoraConfig.from_peft_type(**data)
        assert (again.plan, again.r, again.train_router) == (config.plan, 4, False)
        assert copy.deepcopy(made).to_dict() == made.to_dict()
    assert (HotLoraConfig(plan=plan).r, HotLoraConfig(plan=plan).lora_alpha) == (32, 64)


def test_a_copied_model_is_independent():
    model = adapted()
    twin = copy.deepcopy(model)
    expected = logits(model)
    fill(model, 5)
    assert torch.equal(logits(twin), expected) and not torch.equal(logits(model), expected)


def logits_of_pickled(file):
    """With the adapter, and without it."""
    model = torch.load(file, weights_only=False)
    with model.disable_adapter():
        base = logits(model)
    return logits(model).numpy(), base.numpy()


def test_a_pickled_model_is_read_by_another_process(tmp_path):
    model = adapted()
    torch.save(model, tmp_path / "model.pt")
    tuned, base = map(torch.from_numpy, apart(logits_of_pickled, tmp_path / "model.pt"))
    torch.testing.assert_close(tuned, logits(model))
    torch.testing.assert_close(base, logits(tiny_model()))


def test_load_errors(tmp_path):
    adapted().save_pretrained(tmp_path / "good")
    weights = "adapter_model.safetensors"
    base = tiny_model()
    expected = logits(base)

    def broken(name, change):
        folder = tmp_path / name
        shutil.copytree(tmp_path / "good", folder)
        change(folder)
        return folder

    def edit_config(folder, **changes):
        data = json.loads((folder / "adapter_config.json").read_text()) | changes
        (folder / "adapter_config.json").write_text(json.dumps(data))

    def edit_weights(folder, change):
        tensors = load_file(folder / weights)
        change(tensors)
        save_file(tensors, folder / weights)
        edit_config(folder, weights_sha256=None)  # as the message of a file that was changed has it

    def cut(path):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def flip(path):  # one bit of a value
        data = bytearray(path.read_bytes())
        data[-7] ^= 4
        path.write_bytes(data)

    key = "base_model.model.model.layers.1.mlp.experts.lora_A_down"
    cases = [
        (tmp_path / "none", FileError, "is not a folder"),
        (broken("1", lambda f: (f / "adapter_config.json").unlink()), FileError, "adapter_config"),
        (broken("2", lambda f: cut(f / "adapter_config.json")), FileError, "adapter_config"),
        (broken("3", lambda f: edit_config(f, plan=None)), FileError, "not a hotlora adapter"),
        (broken("4", lambda f: edit_config(f, unknown_option=1)), FileError, "unknown_option"),
        (broken("5", lambda f: edit_config(f, plan={"version": 1})), PlanError, r"adapter_config.*lacks"),
        (broken("6", lambda f: (f / weights).unlink()), FileError, "does not exist"),
        (broken("7", lambda f: cut(f / weights)), FileError, "truncated"),
        (
            broken("8", lambda f: edit_weights(f, lambda t: t.pop(key))),
            FileError,
            r"1 tensors are missing.*A_down",
        ),
        (
            broken("9", lambda f: edit_weights(f, lambda t: t.update(x=t[key] + 0))),
            FileError,
            "unknown, such as x",
        ),
        (broken("11", lambda f: flip(f / weights)), FileError, r"safetensors is damaged.*another SHA-256"),
        (broken("10", lambda f: edit_config(f, r=8)), FileError, r"is \[3, 4, 16\] where \[3, 8, 16\]|where"),
    ]
    for folder, error, message in cases:
        with pytest.raises(error, match=message):
            load_adapter(base, folder)
        assert torch.equal(logits(base), expected) and not any("lora" in n for n, _ in base.named_modules())
    with pytest.raises(PlanError, match="made for olmoe-"):
        load_adapter(tiny_model(num_experts=16), tmp_path / "good")
    with pytest.raises(PlanError, match=r"made for olmoe-.* this model is mixtral-"):
        load_adapter(tiny_model("mixtral"), tmp_path / "good")
    load_adapter(base, tmp_path / "good")

    model = adapted(seed=3)
    expected = logits(model)
    with pytest.raises(HotLoraError, match="already has an adapter 'default'"):
        load_adapter(model, tmp_path / "good")
    with pytest.raises(FileError, match="missing"):
        load_adapter(model, tmp_path / "8", "second")
    assert list(model.peft_config) == ["default"] and torch.equal(logits(model), expected)


# Merge


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("safe", [False, True])
def test_merged_equals_unmerged_and_is_a_plain_model(family, safe, tmp_path):
    model, base = adapted(family), tiny_model(family)
    expected, original = logits(model), {n: w.clone() for n, w in base.state_dict().items()}
    merged = model.merge_and_unload(safe_merge=safe)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert type(merged) is type(base) and merged.state_dict().keys() == original.keys()
    for name, weight in merged.state_dict().items():
        if name.endswith("experts.down_proj"):
            changed = (weight != original[name]).flatten(1).any(1).nonzero().flatten().tolist()
            assert changed == list(PLANNED)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(merged))


def test_merge_and_unmerge_in_place():
    model = adapted("qwen2_moe")
    before, expected = {n: p.clone() for n, p in model.named_parameters()}, logits(model)
    model.merge_adapter()
    assert not torch.equal(
        before["base_model.model.model.layers.0.mlp.gate.base_layer.weight"],
        model.get_base_model().model.layers[0].mlp.gate.weight,
    )
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(dict(model.named_parameters()), before)
    model.merge_adapter()
    with model.disable_adapter():  # takes the update out first, as PEFT's Linear does
        torch.testing.assert_close(logits(model), logits(tiny_model("qwen2_moe")), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_16_bits_gets_its_very_weights_back(dtype):
    """TRL merges and unmerges for vLLM at every step."""
    model = adapted(model=tiny_model("qwen2_moe").to(dtype))
    model.add_adapter("second", HotLoraConfig(plan=tiny_plan(model.get_base_model()), r=4))
    fill(model, 2, "second")
    ours = [(path, m) for path, m in model.named_modules() if isinstance(m, MergeableLayer)]
    before = {f"{path}.{name}": p.clone() for path, m in ours for name, p in m.base_layer.named_parameters()}
    for names in (["default"], ["default", "second"], ["second"]):
        model.merge_adapter(names)
        assert not any(torch.equal(before[f"{path}.{n}"], p) for path, m in ours for n, p in own_parameters(m))
        model.unmerge_adapter()
        assert all(torch.equal(before[f"{path}.{n}"], p) for path, m in ours for n, p in own_parameters(m))
        assert not any(m.replaced for _, m in ours)


def test_a_model_that_was_merged_in_another_dtype_gets_its_weights_back():
    """As where it is merged, cast for an engine or an evaluation, and trained further."""
    model = adapted(model=tiny_model("qwen2_moe").to(torch.bfloat16))
    ours = [m for m in model.modules() if isinstance(m, MergeableLayer)]
    before = [p.float() for m in ours for _, p in own_parameters(m)]
    model.merge_adapter()
    model.float()
    model.unmerge_adapter()
    after = [p for m in ours for _, p in own_parameters(m)]
    assert all(p.dtype == torch.float32 and torch.equal(p, old) for p, old in zip(after, before, strict=True))
    assert not any(m.merged or m.replaced for m in ours)


def test_a_layer_that_could_not_be_unmerged_is_merged_still(monkeypatch):
    model = adapted(model=tiny_model().to(torch.bfloat16))
    layer = model.get_base_model().model.layers[0].mlp.experts
    before = [p.clone() for _, p in own_parameters(layer)]
    layer.merge()
    with monkeypatch.context() as context:
        context.setattr(layer, "merge_targets", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            layer.unmerge()
    assert layer.merged
    layer.unmerge()
    assert all(torch.equal(p, old) for (_, p), old in zip(own_parameters(layer), before, strict=True))


def own_parameters(layer):
    return list(layer.base_layer.named_parameters())


def test_merging_for_good_holds_no_second_copy(monkeypatch, tmp_path):
    layers, kept, merge = weakref.WeakSet(), [], MergeableLayer.merge

    def counted(self, *args, **kwargs):
        layers.add(self)
        merge(self, *args, **kwargs)
        kept.append(sum(bool(layer.replaced) for layer in layers))

    monkeypatch.setattr(MergeableLayer, "merge", counted)
    for restores in (True, False):
        model = adapted(model=tiny_model().to(torch.bfloat16))
        export_adapter(model, tmp_path / str(restores), format="merged", restores=restores)
    adapted(model=tiny_model().to(torch.bfloat16)).merge_and_unload()
    assert len(kept) == 3 * 4 and max(kept) == 1


def test_merging_a_bf16_model_rounds_once():
    model = adapted(model=tiny_model().to(torch.bfloat16))
    layer = model.get_base_model().model.layers[0].mlp.experts
    (gate_up, down), base = layer.get_delta_weight("default"), copy.deepcopy(layer.base_layer)
    assert gate_up.dtype == torch.float32 and gate_up.shape == (3, 32, 32) and down.shape == (3, 32, 16)
    layer.merge()
    ids = list(PLANNED)
    assert torch.equal(layer.base_layer.gate_up_proj[ids], (base.gate_up_proj[ids].float() + gate_up).bfloat16())
    assert torch.equal(layer.base_layer.down_proj[ids], (base.down_proj[ids].float() + down).bfloat16())


def test_safe_merge_refuses_weights_that_are_not_finite():
    model = adapted(train_attention=False)
    layer = model.get_base_model().model.layers[1].mlp.experts
    layer.lora_B_down["default"].data[0, 0, 0] = float("nan")
    before = layer.base_layer.gate_up_proj.clone()
    with pytest.raises(HotLoraError, match="not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.gate_up_proj, before) and not layer.merged


def test_unload_gives_the_base_back():
    assert torch.equal(logits(adapted().unload()), logits(tiny_model()))


# Several adapters


def test_two_plans_on_one_base(tmp_path):
    alone = {
        "a": adapted(experts={0: [1, 2], 1: [3]}, seed=1),
        "b": adapted(experts={1: [0, 7]}, seed=2, r=8, train_router=False),
    }
    expected = {name: logits(model) for name, model in alone.items()}
    for name, model in alone.items():
        model.save_pretrained(tmp_path / name)
    both = load_adapter(tiny_model(), tmp_path / "a", "a")
    load_adapter(both, tmp_path / "b", "b")
    for name in ("a", "b", "a"):
        both.set_adapter(name)
        assert torch.equal(logits(both), expected[name])
    with both.disable_adapter():
        assert torch.equal(logits(both), logits(tiny_model()))
    assert torch.equal(logits(both), expected["a"])
    both.save_pretrained(tmp_path / "both")
    reloaded = load_adapter(tiny_model(), tmp_path / "both" / "b")
    assert torch.equal(logits(reloaded), expected["b"])
    both.set_adapter("a")
    both.delete_adapter("b")
    assert torch.equal(logits(both), expected["a"])
    assert both.get_base_model().model.layers[1].mlp.experts.expert_ids == {"a": (3,)}
    with pytest.raises(HotLoraError, match="adapter_names"):
        both(**tiny_batch(), adapter_names=["a", "a"])
    with pytest.raises(HotLoraError, match="adapter_names"):
        both.generate(input_ids=tiny_batch()["input_ids"], adapter_names=["a", "a"], max_new_tokens=2)
    assert torch.equal(logits(both), expected["a"])  # PEFT's hooks have not stayed


def test_add_adapter_and_train_the_second():
    model = adapted(experts={0: [1]})
    first = logits(model)
    model.add_adapter("b", HotLoraConfig(plan=tiny_plan(model.get_base_model(), {0: [1, 2], 1: [4]}), r=4))
    assert torch.equal(logits(model), first)
    model.set_adapter("b")
    assert torch.equal(logits(model), logits(tiny_model()))
    fill(model, 9, "b")
    model(**tiny_batch(), labels=tiny_batch()["input_ids"]).loss.backward()
    with_gradient = [name for name, p in model.named_parameters() if p.grad is not None]
    assert with_gradient and all(name.replace(".weight", "").endswith(".b") for name in with_gradient)


def test_scale_layer_reaches_the_experts():
    model = adapted(train_attention=False, train_router=False)
    layer = model.get_base_model().model.layers[0].mlp.experts
    layer.scale_layer(0.5)
    assert layer.scaling["default"] == 8.0
    layer.unscale_layer()
    assert layer.scaling["default"] == 16.0


def test_a_plain_lora_config_goes_through_unchanged(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 4 and all("q_proj.lora_" in name for name in names)
    fill(model, 0)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), logits(model))
    with pytest.raises(FileError, match="no expert plan"):
        load_adapter(tiny_model(), tmp_path)
    everything = LoraConfig(r=4, target_parameters=["mlp.experts.gate_up_proj"], target_modules=[])
    wrapped = get_peft_model(tiny_model(), everything)
    logits(wrapped)
    with pytest.raises(ModelError, match="adapter of another kind"):
        wrapped.add_adapter("hot", HotLoraConfig(plan=tiny_plan(wrapped.get_base_model())))


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan": None}, "needs a plan"),
        ({"plan": "plan.json"}, "is not a plan"),
        ({"plan": {"version": 2}}, "version 2"),
        ({"r": 0}, "r=0 must be"),
        ({"r": 2.5}, r"r=2\.5 must be"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1\.0"),
        ({"lora_dropout": -0.1}, r"lora_dropout=-0\.1"),
        ({"target_modules": ["q_proj"]}, "target_modules="),
        ({"train_full_experts": True, "use_dora": True}, "no low-rank update"),
        ({"mask": {}}, "needs train_a=False"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"target_parameters": ["gate.weight"]}, "target_parameters="),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(PlanError, match=message):
        HotLoraConfig(**{"plan": tiny_plan(tiny_model()), **changes})


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"fingerprint": "olmoe-000000000000"}, {}, "made for olmoe-000000000000, but this model is olmoe-"),
        ({"fingerprint": None, "experts": {"0": [1], "5": [2]}}, {}, r"names layers \[5\].*\[0, 1\]"),
        ({"fingerprint": None, "num_experts": 16, "experts": {"0": [12]}}, {}, "16 experts.*there are 8"),
        (
            {"experts": {"0": []}},
            {"train_attention": False, "train_router": False, "train_shared": False},
            "nothing would be trained",
        ),
    ],
)
def test_a_plan_that_does_not_fit_leaves_the_model_alone(changes, options, message):
    model = tiny_model()
    before = [(name, type(module)) for name, module in model.named_modules()]
    grads = [p.requires_grad for p in model.parameters()]
    with pytest.raises(PlanError, match=message):
        get_peft_model(model, HotLoraConfig(plan=tiny_plan(model) | changes, **options))
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert [p.requires_grad for p in model.parameters()] == grads


def test_a_model_with_a_classifiers_head_needs_its_task():
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_config(tiny_config("qwen2_moe", num_labels=1, pad_token_id=0))
    plan, before = tiny_plan(base), [name for name, _ in base.named_parameters()]
    with pytest.raises(ModelError, match=r"is a Qwen2MoeForSequenceClassification: give task_type='SEQ_CLS'"):
        get_peft_model(base, HotLoraConfig(plan=plan, r=4))
    assert [name for name, _ in base.named_parameters()] == before
    model = get_peft_model(base, HotLoraConfig(plan=plan, r=4, task_type="SEQ_CLS"))
    model(**tiny_batch()).logits.sum().backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    assert any("score" in name for name in trained) and any("experts.lora_B_down" in name for name in trained)


def test_an_adapter_with_a_classifiers_head_is_loaded_by_pefts_own_calls(tmp_path):
    """PEFT adds the head's names to modules_to_save once more at each."""
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_config(tiny_config("qwen2_moe", num_labels=1, pad_token_id=0))
    model = get_peft_model(copy.deepcopy(base), HotLoraConfig(plan=tiny_plan(base), r=4, task_type="SEQ_CLS")).eval()
    fill(model, seed=1)
    model.save_pretrained(tmp_path)
    expected = model(**tiny_batch()).logits
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(again(**tiny_batch()).logits, expected)
    again.load_adapter(tmp_path, "b")
    again.load_adapter(tmp_path, "b")
    again.set_adapter("b")
    assert torch.equal(again(**tiny_batch()).logits, expected)
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(HotLoraError, match=r"task_type SEQ_CLS\).*transformers.AutoModelForSequenceClassification"):
        load(tmp_path, model=str(tmp_path / "base"))


def test_an_adapter_that_trains_tokens_says_how_it_is_loaded(tmp_path):
    model = get_peft_model(
        base := tiny_model("olmoe"),
        HotLoraConfig(plan=tiny_plan(base), r=4, trainable_token_indices={"embed_tokens": [3, 5]}),
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(HotLoraError, match=r"trains tokens .*resize_token_embeddings.*PeftModel.from_pretrained"):
        load_adapter(tiny_model("olmoe"), tmp_path)


def test_a_copy_of_data_parallel_says_how_to_start():
    """Which is what transformers' Trainer makes where it sees several GPUs."""
    layer, hidden = adapted().get_base_model().model.layers[0].mlp, torch.zeros(3, 32)
    for module, inputs in ((layer.gate, [hidden]), (layer.experts, [hidden, *layer.gate(hidden)[:0:-1]])):
        module(*inputs)
        with pytest.raises(HotLoraError, match=r"nn.DataParallel.* start the script with `torchrun"):
            module._replicate_for_data_parallel()(*inputs)


def test_counting_needs_an_adapter():
    with pytest.raises(ModelError, match="has no adapter"):
        count_parameters(tiny_model())


# Parameter counts: those of the papers, from the configs alone


def published(family, **sizes):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(family, **sizes))


OLMOE = {
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 50304,
}
QWEN = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 151936,
}


@pytest.mark.parametrize(
    ("experts_per_layer", "switches", "trainable", "percent"),
    [
        (64, {}, 311_459_840, 4.3075),
        (16, {}, 84_967_424, 1.2131),
        (8, {}, 47_218_688, 0.6778),
        (4, {}, 28_344_320, 0.4080),
        (2, {}, 18_907_136, 0.2725),
        (8, {"train_attention": False, "train_router": False}, 37_748_736, 0.5426),
        (8, {"train_attention": False}, 38_830_080, 0.5581),
    ],
)
def test_olmoe_1b_7b_counts(experts_per_layer, switches, trainable, percent):
    model = published("olmoe", **OLMOE)
    assert sum(p.numel() for p in model.parameters()) == 6_919_161_856
    plan = tiny_plan(model, {i: list(range(experts_per_layer)) for i in range(16)})
    counts = count_parameters(get_peft_model(model, HotLoraConfig(plan=plan, **switches)))
    assert counts["trainable"] == trainable
    assert counts["total"] == 6_919_161_856 + trainable
    assert round(counts["percent"], 4) == percent
    assert counts["experts"] == 16 * experts_per_layer * 294_912
    assert counts["attention"] == (16 * 524_288 if switches.get("train_attention", True) else 0)
    assert counts["router"] == (16 * 67_584 if switches.get("train_router", True) else 0)


@pytest.mark.parametrize(("experts_per_layer", "trainable"), [(60, 509_654_016), (15, 151_335_936)])
def test_qwen_moe_a2_7b_counts(experts_per_layer, trainable):
    model = published("qwen2_moe", **QWEN)
    plan = tiny_plan(model, {i: list(range(experts_per_layer)) for i in range(24)})
    counts = count_parameters(get_peft_model(model, HotLoraConfig(plan=plan)))
    assert counts["trainable"] == trainable
    assert counts["experts"] + counts["attention"] + counts["router"] + counts["shared"] == trainable


@pytest.mark.parametrize("name", ["values", "keys", "train", "_modules", "default.x", ""])
def test_a_name_that_torch_cannot_hold_is_refused_before_anything_changes(name, tmp_path):
    model = get_peft_model(tiny_model(), HotLoraConfig(plan=tiny_plan(tiny_model()), r=2))
    model.save_pretrained(tmp_path)
    before = [key for key, _ in model.named_modules()]
    config = HotLoraConfig(plan=tiny_plan(tiny_model()), r=2, train_a=False)
    base = tiny_model()
    base_before = [key for key, _ in base.named_modules()]
    for use in (
        lambda: model.add_adapter(name, config),
        lambda: load_adapter(model, tmp_path, name),
        lambda: model.load_adapter(tmp_path, name),
        lambda: model.add_weighted_adapter(["default"], [1.0], name),
        lambda: get_peft_model(base, config, name),
        lambda: load_adapter(base, tmp_path, name),
    ):
        with pytest.raises(HotLoraError, match=rf"adapter_name={name!r} cannot be used: give a name without dots"):
            use()
    assert list(model.peft_config) == ["default"] and [key for key, _ in model.named_modules()] == before
    assert [key for key, _ in base.named_modules()] == base_before and not hasattr(base, "peft_config")


def test_every_other_name_is_taken(tmp_path):
    for name in ("kept", "weight", "lora_A", "rank_4", "base_layer", "a b", "1"):
        model = get_peft_model(tiny_model(), HotLoraConfig(plan=tiny_plan(tiny_model()), r=2, train_a=False), name)
        fill(model, 0, name)
        model.save_pretrained(tmp_path)
        with torch.no_grad():
            expected, found = (
                m.eval()(**tiny_batch()).logits for m in (model, load_adapter(tiny_model(), tmp_path / name))
            )
        assert torch.equal(found, expected)
