"""Other ways to adapt experts than plain LoRA: own ranks, DoRA, a frozen A, a sparse B, own weights."""

import copy
import json
import re

import peft
import pytest
import torch
from packaging.version import Version
from peft import PeftModel, get_peft_model
from peft.helpers import DoraCaching
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.dora import DoraLinearLayer
from safetensors.torch import load_file, save_file
from tiny import fill, tiny_batch, tiny_model, tiny_plan
from tiny_tokenizer import byte_tokenizer
from transformers.integrations.peft import MIN_PEFT_VERSION
from zoo import zoo_model

from hotlora.adapter import factors
from hotlora.adapter.config import HotLoraConfig
from hotlora.adapter.count import count_parameters
from hotlora.adapter.experts import HotExperts, HotFullExperts, HotLoraExperts
from hotlora.adapter.factors import SeededFactor, SparseFactor, pack, unpack
from hotlora.adapter.formats.export import export_adapter
from hotlora.adapter.load import load_adapter
from hotlora.adapter.mask import SparseMask, draw_mask
from hotlora.adapter.raw_weights import HotLoraWeights
from hotlora.base.errors import FileError, HotLoraError, PlanError
from hotlora.evaluation.generate import generation
from hotlora.evaluation.talk import answer
from hotlora.hf.experts_view import ExpertsView
from hotlora.hf.moe_layers import moe_layers

# Gated; biased, transposed and interleaved; without a gate; with raw shared experts.
LAYOUTS = ("olmoe", "gpt_oss", "nemotron_h", "inkling_text")
BATCH = tiny_batch(2, 24)
RANKS = {"0": [2, 4, 8], "1": [4, 4, 2]}


def adapted(model=None, randomise=True, ranks=None, **config):
    model = tiny_model() if model is None else model
    plan = tiny_plan(model) | ({"ranks": ranks} if ranks else {})
    peft_model = get_peft_model(model, HotLoraConfig(plan=plan, **{"r": 4, "lora_alpha": 8, **config}))
    if randomise:
        fill(peft_model, 0, scale=0.05)
    return peft_model.eval()


def logits(model):
    with torch.no_grad():
        return model(**BATCH).logits


def experts_of(model):
    return [m for m in model.modules() if isinstance(m, HotExperts)]


def same_after_saving(model, folder, make_base):
    """Loaded by us and by PEFT itself, the adapter is what was saved."""
    model.save_pretrained(folder)
    expected = logits(model)
    assert torch.equal(logits(load_adapter(make_base(), folder)), expected)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(make_base(), folder, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded.eval()), expected)


def merges_and_comes_out_again(model):
    expected, before = logits(model), copy.deepcopy(model.get_base_model().state_dict())
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    for name, tensor in model.get_base_model().state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


# Ranks


def by_hand(model, adapter="default"):
    """Weights of all adapted modules, from the factors that each expert has by name."""
    weights = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, HotLoraExperts):
            up, down = module._base_weights(range(module.base_layer.num_experts))
            up, down = list(up.unbind()), list(down.unbind())
            for (expert, part), (A, B) in module.factor_pairs(adapter).items():
                delta = module.scaling[adapter] * B @ A
                if part == "down":
                    down[expert] = down[expert] + delta
                else:
                    half = len(delta) if module.base_layer.has_gate else 0
                    rows = slice(0, half) if part == "gate" else slice(half, None)
                    up[expert] = up[expert].clone()
                    up[expert][rows] += delta
            up, down = module.view.own_layout(torch.stack(up), torch.stack(down))
            up_name = "gate_up_proj" if module.base_layer.has_gate else "up_proj"
            weights |= {f"{name}.{up_name}": up, f"{name}.down_proj": down}
        elif isinstance(module, HotLoraWeights):
            for key, path in module._weights.items():
                A, B = module.factor_pairs(adapter)[key]
                weights[f"{name}.{path}"] = module.base_layer.get_parameter(path) + module.scaling[adapter] * B @ A
        elif isinstance(module, LoraLinear):
            A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            weights[f"{name}.weight"] = module.base_layer.weight + module.scaling[adapter] * B @ A
    return weights


@pytest.mark.parametrize("use_rslora", [False, True])
def test_experts_have_the_ranks_of_the_plan(use_rslora, tmp_path):
    model = adapted(ranks=RANKS, use_rslora=use_rslora)
    first, second = experts_of(model)
    assert {n: p["default"]["rank_8"].shape for n, p in first.named_children() if n == "lora_B_down"} == {
        "lora_B_down": (1, 32, 8)
    }
    for module, ranks in ((first, RANKS["0"]), (second, RANKS["1"])):
        update = module.update("default")
        assert update.expert_ids_N.tolist() == list(module.expert_ids["default"])
        assert update.scaling.tolist() == pytest.approx([8 / (r**0.5 if use_rslora else r) for r in ranks])
        for n, (expert, r) in enumerate(zip(module.expert_ids["default"], ranks, strict=True)):
            pairs = {
                name: module.factor_pairs("default", folded=False)[expert, name] for name in ("gate", "up", "down")
            }
            for name, (A, B) in pairs.items():
                part = {"gate": 0, "up": 1}.get(name)
                A_n = update.A_down[n] if part is None else update.A_gate_up[n].chunk(2)[part]
                B_n = update.B_down[n] if part is None else update.B_gate_up[n].chunk(2)[part]
                assert torch.equal(A_n[:r], A) and torch.equal(B_n[:, :r], B) and A.shape[0] == r
                assert not A_n[r:].any() and not B_n[:, r:].any()
    trained = sum(p.numel() for p in first.parameters() if p.requires_grad)
    assert trained == sum(RANKS["0"]) * (2 * (32 + 16) + (16 + 32))
    expected = torch.func.functional_call(tiny_model(), by_hand(model), (), dict(BATCH)).logits
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    same_after_saving(model, tmp_path / "adapter", tiny_model)
    export_adapter(model, tmp_path / "peft", format="peft")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "peft").eval()), logits(model), rtol=1e-4, atol=1e-4
    )
    merges_and_comes_out_again(model)


def test_equal_ranks_need_no_names_of_their_own():
    """A plan that gives every expert the config's r is the plan without ranks."""
    with_ranks = adapted(ranks={"0": [4, 4, 4], "1": [4, 4, 4]}, randomise=False)
    assert {n for n, _ in with_ranks.named_parameters()} == {n for n, _ in adapted(randomise=False).named_parameters()}


def test_ranks_are_combined_and_named_where_they_are_not():
    model = adapted(ranks=RANKS)
    plan = tiny_plan(model.get_base_model(), {0: [1, 2], 1: [6]})
    model.add_adapter("other", HotLoraConfig(plan=plan, r=4, lora_alpha=8))
    fill(model, 1, "other", scale=0.05)
    model.add_weighted_adapter(["default", "other"], [1.0, 0.5], "both")
    expected = [
        weight + 0.5 * (other - base)
        for weight, other, base in zip(
            by_hand(model).values(),
            by_hand(model, "other").values(),
            [tiny_model().state_dict()[name] for name in by_hand(model)],
            strict=True,
        )
    ]
    model.set_adapter("both")
    reference = torch.func.functional_call(
        tiny_model(), dict(zip(by_hand(model, "default"), expected, strict=True)), (), dict(BATCH)
    ).logits
    torch.testing.assert_close(logits(model), reference, rtol=1e-4, atol=1e-4)
    with pytest.raises(
        HotLoraError, match=r"needs adapters of one rank.* train both with one --r for all experts, or use"
    ):
        model.add_weighted_adapter(["default", "other"], [1.0, 0.5], "linear", combination_type="linear")


# DoRA


def dora_by_hand(model):
    """m / ||W + s B A|| (W + s B A), the norm without a gradient, as functions of the adapter's parameters."""
    weights = {}
    plain = by_hand(model)

    def normed(weight, magnitude):
        return magnitude.unsqueeze(-1) * weight / weight.detach().norm(dim=-1, keepdim=True)

    for name, module in model.get_base_model().named_modules():
        if isinstance(module, HotLoraExperts):
            base, ids = module.base_layer, list(module.expert_ids["default"])
            up_name = "gate_up_proj" if base.has_gate else "up_proj"
            magnitudes = module.lora_magnitude_vector_gate_up["default"], module.lora_magnitude_vector_down["default"]
            ups, downs = plain[f"{name}.{up_name}"], plain[f"{name}.down_proj"]
            if base.is_transposed:
                ups, downs = ups.transpose(1, 2), downs.transpose(1, 2)
            if base.has_gate and not base.is_concatenated:
                ups = torch.cat([ups[:, 0::2], ups[:, 1::2]], dim=1)
            ups = ups.index_copy(0, torch.tensor(ids), normed(ups[ids], magnitudes[0]))
            downs = downs.index_copy(0, torch.tensor(ids), normed(downs[ids], magnitudes[1]))
            ups, downs = module.view.own_layout(ups, downs)
            weights |= {f"{name}.{up_name}": ups, f"{name}.down_proj": downs}
        elif isinstance(module, HotLoraWeights):
            for key, path in module._weights.items():
                weights[f"{name}.{path}"] = normed(
                    plain[f"{name}.{path}"], module.lora_magnitude_vectors["default"][key]
                )
        elif isinstance(module, LoraLinear):
            weights[f"{name}.weight"] = normed(plain[f"{name}.weight"], module.lora_magnitude_vector["default"].weight)
    return weights


@pytest.mark.parametrize("load", [load_adapter, PeftModel.from_pretrained, None], ids=["ours", "PEFT", "transformers"])
@pytest.mark.parametrize("ranks", [None, RANKS])
def test_dora_of_older_adapters_is_loaded(ranks, load, tmp_path):
    """Whose magnitudes had other names; by every name TRL knows one by, they stay float32 in its trainers."""
    model = adapted(use_dora=True, ranks=ranks)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and "magnitude" in name}
    assert all("lora_magnitude_vector" in name for name in trained)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained} >= {"experts", "gate", "q_proj"}
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    names = {"lora_magnitude_vector_": "lora_magnitude_", "lora_magnitude_vectors.": "lora_magnitude."}
    old = {re.sub("lora_magnitude_vector(_|s.)", lambda new: names[new[0]], key): t for key, t in tensors.items()}
    assert len(old.keys() - tensors.keys()) == (2 * (3 + 2) + 2 if ranks else 2 * 2 + 2)
    save_file(old, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["weights_sha256"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    loaded = tiny_model()
    if load is not None:
        loaded = load(loaded, tmp_path)
    elif Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip("transformers refuses this PEFT")
    else:
        loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))


@pytest.mark.parametrize("family", LAYOUTS)
def test_dora_equals_plain_code_with_every_gradient(family):
    model = adapted(zoo_model(family), use_dora=True, randomise=False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.mul_(1 + 0.1 * noise) if "magnitude" in name else parameter.data.copy_(0.05 * noise)
    reference = zoo_model(family)
    reference.set_experts_implementation("eager")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum("magnitude" in name for name in trained) >= 3

    def gradients(output):
        probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        return torch.autograd.grad((output * probe).sum(), list(trained.values()))

    ours = model(**BATCH).logits
    theirs = torch.func.functional_call(reference, dora_by_hand(model), (), dict(BATCH)).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())
    for name, mine, plain in zip(trained, gradients(ours), gradients(theirs), strict=True):
        assert (mine - plain).norm() <= 1e-3 * plain.norm() + 1e-5, name
    merges_and_comes_out_again(model)


@pytest.mark.parametrize("family", LAYOUTS)
def test_dora_starts_as_the_base_bit_for_bit(family):
    expected = logits(zoo_model(family))
    model = adapted(zoo_model(family), use_dora=True, randomise=False, train_attention=False, train_shared=False)
    assert torch.equal(logits(model), expected)


def test_dora_saves_and_counts(tmp_path):
    model = adapted(use_dora=True, ranks=RANKS)
    same_after_saving(model, tmp_path, tiny_model)
    plain, dora = count_parameters(adapted(ranks=RANKS)), count_parameters(model)
    assert dora["experts"] - plain["experts"] == 2 * 3 * (32 + 32)
    assert dora["router"] - plain["router"] == 2 * 8
    with pytest.raises(HotLoraError, match="cannot hold an adapter with use_dora"):
        export_adapter(model, tmp_path / "vllm", format="vllm")


def norms_of(monkeypatch):
    """A list that grows by a layer with every norm that is worked out."""
    made = []

    def counted(its):
        plain = its._norms
        monkeypatch.setattr(its, "_norms", lambda self, *names: (made.append(self), plain(self, *names))[1])

    counted(HotLoraExperts)
    counted(HotLoraWeights)
    return made


def test_dora_norms_are_kept_as_pefts_own_are(monkeypatch):
    model = adapted(use_dora=True, ranks=RANKS)
    expected, made = logits(model), norms_of(monkeypatch)
    with DoraCaching():
        assert torch.equal(logits(model), expected) and (once := len(made)) >= 4
        assert torch.equal(logits(model), expected) and len(made) == once
        fill(model.train(), 1, scale=0.05)
        changed = logits(model.eval())
        assert not torch.equal(changed, expected) and len(made) == 2 * once
    assert torch.equal(logits(model), changed) and len(made) == 3 * once


def test_dora_norms_are_worked_out_once_for_a_batch_of_answers(monkeypatch):
    model = adapted(tiny_model(vocab_size=259), use_dora=True)
    tokenizer, made = byte_tokenizer(), norms_of(monkeypatch)
    said = answer(model, tokenizer, "1 + 1 =", max_new_tokens=4)
    assert len(made) == len({id(layer) for layer in made}) >= 4
    fill(model, 1, scale=0.5)
    assert answer(model, tokenizer, "1 + 1 =", max_new_tokens=4) != said, "of the new weights"


def test_answers_keep_dora_norms_and_nothing_as_large_as_a_weight():
    model = adapted(use_dora=True)
    layers = [module for module in model.modules() if isinstance(module, DoraLinearLayer)]
    expected = logits(model)
    with generation(model):
        assert torch.equal(logits(model), expected) and torch.equal(logits(model), expected)
        kept = {key.rpartition("-")[0]: 0 for layer in layers for key in layer._dora_cache}
        for layer in layers:
            for key, value in layer._dora_cache.items():
                kept[key.rpartition("-")[0]] += value.untyped_storage().nbytes()
    assert kept["weight-norm"] == sum(4 * layer.weight.numel() for layer in layers) > 0
    assert kept["lora-weight"] == 0
    assert not any(layer._dora_cache for layer in layers)
    with DoraCaching():  # PEFT's own is as it was
        logits(model)
        assert all(value.numel() for layer in layers for value in layer._dora_cache.values())


def test_dora_twice_is_merged_at_once_or_not_at_all():
    model = adapted(use_dora=True)
    model.add_adapter("other", HotLoraConfig(plan=tiny_plan(tiny_model()), r=4, use_dora=True))
    fill(model, 1, "other", scale=0.05)
    for layer in experts_of(model):
        before = layer.base_layer.down_proj.data.clone()
        layer.merge(adapter_names=["default"])
        with pytest.raises(HotLoraError, match="unmerge, then merge them all at once"):
            layer.merge(adapter_names=["other"])
        layer.unmerge()
        assert torch.equal(layer.base_layer.down_proj, before)
    with pytest.raises(HotLoraError, match="cannot be combined"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both")


# A frozen, from its seed


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_frozen_A_neither_trains_nor_is_saved_and_comes_back(family, tmp_path):
    model = adapted(zoo_model(family), train_a=False, a_seed=3)
    model.train()
    model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient and not any("lora_A" in name for name in with_gradient)
    model.eval()
    same_after_saving(model, tmp_path, lambda: zoo_model(family))
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("lora_A" in name for name in held)
    assert sum(t.numel() for t in held.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    merges_and_comes_out_again(model)


def test_A_depends_on_its_seed_and_name_alone():
    def seeded(**options):
        return {
            n: m.weight for n, m in adapted(train_a=False, **options).named_modules() if isinstance(m, SeededFactor)
        }

    torch.manual_seed(1)
    one = seeded(a_seed=0)
    torch.manual_seed(2)
    same, other = seeded(), seeded(a_seed=1)
    assert all(torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name]) for name in one)
    values = list(one.values())
    assert not torch.equal(values[0], values[1])
    assert all(weight.abs().max() <= weight.shape[-1] ** -0.5 for weight in values)
    model = adapted(train_a=False)
    router_only_seed = json.loads(json.dumps(model.peft_config["default"].to_dict()))["a_seed"]
    assert router_only_seed == 0


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_frozen_A_is_the_same_whatever_torchs_defaults_are(family):
    def made():
        model = adapted(zoo_model(family), randomise=False, train_a=False)
        drawn = {n: m.values for n, m in model.named_modules() if isinstance(m, SeededFactor)}
        return drawn, {p.dtype for p in model.parameters() if p.requires_grad}

    expected = made()
    torch.set_default_dtype(torch.float64)
    try:
        found = made()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found[1] == expected[1] == {torch.float32}
    assert all(torch.equal(values, expected[0][name]) for name, values in found[0].items())
    with torch.device("meta"):  # as it stands while some loaders make a model
        factor = SeededFactor((2, 3), 0, "x", torch.device("cpu"))
    assert torch.equal(factor.values, SeededFactor((2, 3), 0, "x", torch.device("cpu")).values)


def test_an_adapter_with_a_frozen_A_loads_under_another_default_dtype(tmp_path):
    dense = trained_dense()
    sparse = adapted(randomise=False, train_a=False, mask=draw_mask(dense))
    train(sparse, 3)
    for name, model in (("dense", dense), ("sparse", sparse)):
        model.save_pretrained(tmp_path / name)
        base = tiny_model()
        torch.set_default_dtype(torch.float64)
        try:
            loaded = load_adapter(base, tmp_path / name)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("load", "options"),
    [
        (load_adapter, {}),
        (PeftModel.from_pretrained, {}),
        (PeftModel.from_pretrained, {"low_cpu_mem_usage": True}),  # which draws A last
    ],
)
def test_another_frozen_A_than_the_saved_one_is_refused(load, options, tmp_path, monkeypatch):
    model = trained_dense()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    assert len(saved["a_sha256"]) == 64
    base = tiny_model()
    for change in ({"a_seed": 1}, {"a_sha256": "0" * 64}):
        file.write_text(json.dumps(saved | change))
        with pytest.raises(FileError, match=r"frozen A .* is not the one that the adapter was trained with"):
            load(base, tmp_path, **options)
        assert options or not any("lora" in name for name, _ in base.named_modules())
        base = tiny_model()
    file.write_text(json.dumps(saved))
    draw = factors.kaiming_uniform  # another generator, such as another torch might have
    monkeypatch.setattr(factors, "kaiming_uniform", lambda *args: draw(*args) * 1.0001)
    with pytest.raises(FileError, match="is not the one"):
        load(base, tmp_path, **options)
    monkeypatch.undo()
    file.write_text(json.dumps({key: value for key, value in saved.items() if key != "a_sha256"}))  # an older one
    assert torch.equal(logits(load(tiny_model(), tmp_path, **options)), logits(model))
    file.write_text(json.dumps(saved | {"a_sha256": 5}))
    with pytest.raises(FileError, match=r"a_sha256 (is|.*saved) 5"):
        load(tiny_model(), tmp_path, **options)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_frozen_A_goes_with_B_in_every_dtype(sparse, tmp_path):
    """float64; float32 on a 16-bit base; 16 bits, as TRL has them for ZeRO-3 and on quantized bases."""
    options = {"mask": draw_mask(trained_dense())} if sparse else {}
    for dtype, autocast in ((torch.float64, True), (torch.bfloat16, True), (torch.bfloat16, False)):
        config = HotLoraConfig(plan=tiny_plan(tiny_model()), r=4, lora_alpha=8, train_a=False, **options)
        base = tiny_model().to(dtype)
        base.set_experts_implementation("eager")  # the others take no float64
        before = logits(base)
        model = get_peft_model(base, config, autocast_adapter_dtype=autocast)
        fill(model, 0)
        held = torch.float32 if dtype == torch.bfloat16 and autocast else dtype
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {held}
        model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
        expected = logits(model.eval())
        assert expected.dtype == dtype and not torch.equal(expected, before)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
        assert logits(model.to(torch.bfloat16)).dtype == torch.bfloat16
        again = [m for m in model.to(torch.float32).modules() if isinstance(m, SeededFactor)]
        assert all(torch.equal(m.values, SeededFactor(m.shape, 0, m.name, m.values.device).values) for m in again)


def test_a_frozen_A_made_on_meta_is_drawn_where_it_gets_a_device():
    with torch.device("meta"):
        base = type(tiny_model())(tiny_model().config)
    model = get_peft_model(base, HotLoraConfig(plan=tiny_plan(tiny_model()), r=4, train_a=False))
    found = {n: m for n, m in model.to_empty(device="cpu").named_modules() if isinstance(m, SeededFactor)}
    expected = {n: m for n, m in adapted(train_a=False).named_modules() if isinstance(m, SeededFactor)}
    assert found.keys() == expected.keys()
    assert all(torch.equal(m.values, expected[n].values) for n, m in found.items())


def test_counts_with_a_frozen_A_are_those_of_B():
    plain, frozen = count_parameters(adapted()), count_parameters(adapted(train_a=False))
    assert frozen["total"] == plain["total"]
    model = adapted()
    B = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name)
    assert frozen["trainable"] == B


# A sparse B


def trained_dense(steps=3, **config):
    model = adapted(randomise=False, train_a=False, **config)
    train(model, steps)
    return model


def train(model, steps, mask=None):
    """AdamW; with a mask, the plain way: gradients of all entries, zeroed."""
    model.train()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.01, weight_decay=0.0)
    for step in range(steps):
        batch = tiny_batch(2, 24, seed=step)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        if mask is not None:
            for name, parameter in parameters.items():
                parameter.grad *= mask.entries(plain_name(name), parameter.shape)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return optimizer


def plain_name(name):
    return name.removeprefix("base_model.model.").replace(".default", "")


@pytest.mark.parametrize("shape", [(3,), (2, 8), (3, 5, 7)])
def test_masks_are_packed_and_unpacked(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.3
    packed = pack(mask)
    assert packed.dtype == torch.uint8 and packed.shape == (1, -(-mask.numel() // 8))
    assert torch.equal(unpack(packed, shape), mask)


@pytest.mark.parametrize("ranks", [None, RANKS])
def test_sparse_training_is_masked_dense_training_bit_for_bit(ranks, tmp_path):
    dense = trained_dense(ranks=ranks)
    mask = draw_mask(dense, keep=0.1)
    mask.save(tmp_path / "mask.safetensors")
    sparse = adapted(randomise=False, train_a=False, ranks=ranks, mask=tmp_path / "mask.safetensors")
    masked = adapted(randomise=False, train_a=False, ranks=ranks)
    train(sparse, 5)
    train(masked, 5, mask)
    assert torch.equal(logits(sparse), logits(masked))
    assert not torch.equal(logits(sparse), logits(tiny_model()))
    same_after_saving(sparse, tmp_path / "adapter", tiny_model)
    merges_and_comes_out_again(sparse)
    by_transformers = tiny_model()
    by_transformers.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(by_transformers), logits(masked))


def state_bytes(model, optimizer):
    trained = [p for p in model.parameters() if p.requires_grad]
    tensors = [*trained, *(t for state in optimizer.state.values() for t in state.values() if t.ndim)]
    tensors += [b for m in model.modules() if isinstance(m, SparseFactor) for b in m.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


def test_sparse_training_holds_an_eighth_of_the_dense_state_at_most(tmp_path):
    """Parameters, AdamW's two moments, and where the entries stand."""
    dense = adapted(randomise=False, train_a=False)
    optimizer = train(dense, 2)
    held = state_bytes(dense, optimizer)
    sparse = adapted(randomise=False, train_a=False, mask=draw_mask(dense))
    assert state_bytes(sparse, train(sparse, 2)) <= 0.12 * held
    dense.save_pretrained(tmp_path / "dense")
    sparse.save_pretrained(tmp_path / "sparse")
    sizes = [
        sum(t.nbytes for t in load_file(tmp_path / n / "adapter_model.safetensors").values())
        for n in ("dense", "sparse")
    ]
    assert sizes[1] <= 0.14 * sizes[0]  # four bytes a kept value, one bit an entry


def test_a_sparse_adapter_counts_its_kept_entries():
    dense = trained_dense()
    counts = count_parameters(adapted(randomise=False, train_a=False, mask=draw_mask(dense)))
    plain = count_parameters(dense)
    assert counts["total"] == plain["total"]
    assert counts["trainable"] == pytest.approx(0.1 * plain["trainable"], rel=0.02)


def test_the_mask_keeps_the_largest(tmp_path):
    model = trained_dense()
    B = {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    B["model.layers.1.mlp.gate.lora_B.weight"].data.mul_(1e-3)  # nothing of it is among the largest
    sizes = torch.cat([p.detach().abs().flatten() for p in B.values()])
    lowest = sizes.topk(round(0.1 * len(sizes))).values[-1]
    mask = draw_mask(model, source={"run": "x"})
    for name, p in B.items():
        expected = (p.detach().abs() >= lowest) & (p != 0)
        if name == "model.layers.1.mlp.gate.lora_B.weight":
            assert not expected.any()
            expected[0, 0] = True  # an empty tensor could not be saved
        assert expected.any() and torch.equal(mask.entries(name, p.shape), expected), name
    mask.save(tmp_path)
    again = SparseMask.load(tmp_path / "mask.safetensors")
    assert again.num_kept() == mask.num_kept() and again.source == {"run": "x"} and again.a_seed == 0


def group(granularity, name, expert, part):
    """What competes with what, of an olmoe's B."""
    _, _, layer, _, module, *_ = name.split(".")
    kind = "experts" if module == "experts" else "router" if module == "gate" else "attention"
    projection = (module, name.rpartition("lora_B_")[2] if kind == "experts" else "", part)
    return {"matrix": (name, expert, part), "projection": projection, "layer": layer, "module": kind}[granularity]


@pytest.mark.parametrize(("granularity", "groups"), [("matrix", 28), ("projection", 8), ("layer", 2), ("module", 3)])
def test_of_each_group_the_largest_are_kept(granularity, groups):
    model = trained_dense()
    members = {}
    for name, p in [(plain_name(name), p) for name, p in model.named_parameters() if p.requires_grad]:
        for n, B in [(None, p)] if p.ndim == 2 else enumerate(p):
            for i, sizes in enumerate(B.detach().abs().chunk(2 if "gate_up" in name else 1)):
                members.setdefault(group(granularity, name, n, i), []).append((name, n, i, sizes))
    assert len(members) == groups
    mask = draw_mask(model, keep=0.25, granularity=granularity)
    for rest in members.values():
        everything = torch.cat([sizes.flatten() for *_, sizes in rest])
        lowest = everything.topk(round(0.25 * len(everything))).values[-1]
        for name, n, i, sizes in rest:
            kept = mask.entries(name, mask.shapes[name])
            kept = kept if n is None else kept[n].chunk(2 if "gate_up" in name else 1)[i]
            assert torch.equal(kept, (sizes >= lowest) & (sizes > 0)), name


def test_what_training_has_not_moved_is_not_kept():
    """Though there is room for it: fewer entries than the mask may keep are not zero."""
    model = trained_dense()
    moved = "model.layers.0.self_attn.q_proj.lora_B.weight"
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data[:] = 0.0
            if plain_name(name) == moved:
                p.data[0, :3] = 1.0
    mask = draw_mask(model, keep=0.5)
    assert mask.num_kept() == {name: 3 if name == moved else 1 for name in mask.shapes}  # none: could not be saved


def test_masks_say_what_is_wrong(tmp_path):
    with pytest.raises(HotLoraError, match="every B is zero"):
        draw_mask(adapted(randomise=False, train_a=False))
    with pytest.raises(HotLoraError, match="is no LoRI-D"):
        draw_mask(adapted())
    model = trained_dense()
    with pytest.raises(HotLoraError, match=r"keep is 1\.5"):
        draw_mask(model, keep=1.5)
    with pytest.raises(HotLoraError, match="granularity 'head'"):
        draw_mask(model, granularity="head")
    mask = draw_mask(model)
    with pytest.raises(HotLoraError, match="same plan and rank"):
        adapted(train_a=False, r=8, mask=mask)
    with pytest.raises(PlanError, match="for another adapter"):
        adapted(train_a=False, train_router=False, mask=mask)
    with pytest.raises(FileError, match="does not exist"):
        SparseMask.load(tmp_path / "none.safetensors")
    mask.save(tmp_path / "mask.safetensors")
    whole = (tmp_path / "mask.safetensors").read_bytes()
    (tmp_path / "mask.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileError, match="not a whole mask"):
        SparseMask.load(tmp_path / "mask.safetensors")


def sparse_adapter(seed=0, **config):
    model = adapted(randomise=False, train_a=False, mask=draw_mask(trained_dense(**config)), **config)
    train(model, 3)
    fill_sparse(model, seed)
    return model


def fill_sparse(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def as_saved_before(folder, name="default"):
    """The keys of sparse factors that lie two deep held the adapter's name; the config held no hash of A."""
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(weights)
    deep = re.compile(r"(\.lora_\w+)(\.(?:weight|rank_\d+)\.(?:values|kept))$")
    old = {deep.sub(rf"\1.{name}\2", key): tensor for key, tensor in tensors.items()}
    assert old.keys() != tensors.keys()
    save_file(old, weights)
    changed = json.loads(config.read_text()) | {"weights_sha256": None}
    config.write_text(json.dumps({key: value for key, value in changed.items() if key != "a_sha256"}))


@pytest.mark.parametrize("ranks", [None, RANKS])
@pytest.mark.parametrize("is_old", [False, True])
def test_a_sparse_adapter_loads_under_any_name_and_beside_another(ranks, is_old, tmp_path):
    models = [sparse_adapter(seed, ranks=ranks) for seed in (1, 2)]
    expected = [logits(model) for model in models]
    for model, name in zip(models, "xy", strict=True):
        model.save_pretrained(tmp_path / name)
        assert not any("default" in key for key in load_file(tmp_path / name / "adapter_model.safetensors"))
        if is_old:
            as_saved_before(tmp_path / name)
    both = load_adapter(tiny_model(), tmp_path / "x", "first")
    load_adapter(both, tmp_path / "y", "second")
    theirs = PeftModel.from_pretrained(tiny_model(), tmp_path / "x", "first").eval()
    theirs.load_adapter(tmp_path / "y", "second")
    for model in (both, theirs):
        for name, values in zip(("first", "second"), expected, strict=True):
            model.set_adapter(name)
            assert torch.equal(logits(model), values)
    both.save_pretrained(tmp_path / "both")
    assert torch.equal(logits(load_adapter(tiny_model(), tmp_path / "both" / "second", "z")), expected[1])


def test_an_older_sparse_adapter_without_its_mask_is_not_used(tmp_path):
    """transformers' own loader drops the keys that it does not know."""
    sparse_adapter().save_pretrained(tmp_path)
    as_saved_before(tmp_path)
    model = tiny_model()
    model.load_adapter(str(tmp_path))
    with pytest.raises(HotLoraError, match="loaded without its mask"):
        logits(model)


def test_sparse_adapters_are_combined(tmp_path):
    models = [sparse_adapter(seed) for seed in (1, 2)]
    updates = []
    for model, name in zip(models, "xy", strict=True):
        model.save_pretrained(tmp_path / name)
        base = tiny_model().state_dict()
        updates.append({key: w - base[key] for key, w in model.merge_and_unload().state_dict().items()})
    both = load_adapter(tiny_model(), tmp_path / "x", "x")
    load_adapter(both, tmp_path / "y", "y")
    both.add_weighted_adapter(["x", "y"], [0.7, 0.4], "both")
    both.set_adapter("both")
    merged = both.merge_and_unload(adapter_names=["both"]).state_dict()
    changed = 0
    for key, weight in tiny_model().state_dict().items():
        expected = weight + 0.7 * updates[0][key] + 0.4 * updates[1][key]
        torch.testing.assert_close(merged[key], expected, rtol=1e-4, atol=1e-5)
        changed += bool((expected != weight).any())
    assert changed == 2 * (4 + 1 + 2)


# Weights of their own (ESFT)


@pytest.mark.parametrize("family", LAYOUTS)
def test_full_experts_start_as_the_base_and_train_alone(family, tmp_path):
    switches = {"train_attention": False, "train_router": False, "train_shared": False}
    expected = logits(zoo_model(family))
    model = adapted(zoo_model(family), randomise=False, train_full_experts=True, **switches)
    # Transposed weights are copied in the other order, so their products round elsewhere.
    assert torch.equal(logits(model), expected) or family == "gpt_oss"
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    layers = experts_of(model)
    assert all(isinstance(layer, HotFullExperts) for layer in layers)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(layers) and all("lora_full" in name for name in trained)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.05 * torch.randn(p.shape, generator=generator))
    reference = zoo_model(family)
    reference.set_experts_implementation("eager")
    weights = {}
    for layer in moe_layers(model):
        module, path = model.get_submodule(layer.experts), layer.experts.removeprefix("base_model.model.")
        base, ids = module.base_layer, torch.tensor(module.expert_ids["default"])
        own = module.view.own_layout(module.lora_full_gate_up["default"], module.lora_full_down["default"])
        for name, values in zip(("gate_up_proj" if base.has_gate else "up_proj", "down_proj"), own, strict=True):
            weights[f"{path}.{name}"] = getattr(base, name).index_copy(0, ids, values)
    output = model(**BATCH).logits
    theirs = torch.func.functional_call(reference, weights, (), dict(BATCH)).logits
    torch.testing.assert_close(output, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())
    parameters = [p for p in model.parameters() if p.requires_grad]
    probe = torch.randn(output.shape, generator=generator)
    pairs = (torch.autograd.grad((x * probe).sum(), parameters) for x in (output, theirs))
    for mine, plain in zip(*pairs, strict=True):
        assert (mine - plain).norm() <= 1e-3 * plain.norm()
    same_after_saving(model, tmp_path, lambda: zoo_model(family))
    merges_and_comes_out_again(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_merged_full_experts_are_the_trained_weights_bit_for_bit(family, dtype):
    """Not the base plus a rounded difference."""
    base = zoo_model(family).to(dtype)
    model = adapted(base, train_full_experts=True, train_attention=False, train_router=False, train_shared=False)
    layer = base.get_submodule(moe_layers(base)[0].experts)
    experts, ids = layer.get_base_layer(), list(layer.expert_ids["default"])
    with torch.no_grad():
        for held in (layer.lora_full_gate_up, layer.lora_full_down):
            held["default"].mul_(1 + 1e-3 * torch.randn(held["default"].shape))
    trained = layer.view.own_layout(layer.lora_full_gate_up["default"], layer.lora_full_down["default"])
    before = experts.down_proj.clone()
    model.merge_adapter()
    merged = (getattr(experts, ExpertsView(experts).up_name)[ids], experts.down_proj[ids])
    for weight, expected in zip(merged, trained, strict=True):
        assert torch.equal(weight, expected.to(dtype))
    model.unmerge_adapter()
    assert torch.equal(experts.down_proj, before)


def test_full_experts_cannot_leave_as_low_rank(tmp_path):
    model = adapted(train_full_experts=True)
    with pytest.raises(HotLoraError, match="cannot hold an adapter with train_full_experts"):
        export_adapter(model, tmp_path / "peft", format="peft", drop_router=False)
    export_adapter(model, tmp_path / "merged", format="merged")
    merged = type(tiny_model()).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
