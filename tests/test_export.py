"""Export: what a folder holds, what servers and plain PEFT make of it, errors; import of plain PEFT adapters."""

import copy
import json
import shutil

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from readers import (
    logits,
    plain_peft_logits,
    read_sglang,
    read_vllm,
    save_plain_peft,
    write_adapter,
)
from safetensors.torch import load_file
from zoo import families, zoo_model

from hotlora.adapter.config import HotLoraConfig
from hotlora.adapter.formats.export import export_adapter
from hotlora.adapter.formats.import_peft import import_adapter
from hotlora.adapter.formats.room import place_bytes, room_of
from hotlora.adapter.formats.vllm import room_for
from hotlora.base.errors import FileError, HotLoraError, ModelError
from hotlora.hf.moe_layers import attention_modules, fingerprint, moe_layers

# The usual layout; shared experts; MLA and a dense first layer; transposed, interleaved, biased; no gate; experts on
# the decoder layer itself; a router's Linear inside; a fused checkpoint.
FAMILIES = (
    "olmoe",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v3",
    "gpt_oss",
    "nemotron_h",
    "gemma4_text",
    "aria_text",
    "granitemoehybrid",
    "hunyuan_v1_moe",
)
FAMILIES = tuple(family for family in FAMILIES if family in families())  # older transformers lack some
PLANNED = (1, 3, 6)


# Those whose checkpoints call modules that are adapted by other names than transformers. The readers do not know them.
RENAMED = {
    "axk2", "bailing_hybrid", "deepseek_ocr2", "deepseek_v4", "dots3_note", "ernie4_5_vl_moe", "hy_v3", "hy_v4",
    "hy_v4_vl", "inkling2", "inkling2_loop", "inkling2_loop_text", "inkling2_text", "inkling_mm_model",
    "kimi_linear", "laguna", "lara_mini",
    "minimax_m2", "minimax_m3_vl", "mistral_large4", "qwen3_omni_moe_thinker", "sarvam_moe", "unlimited_ocr",
}  # fmt: skip
# Shared experts in raw 3-D weights, which only a merged checkpoint holds.
RAW_SHARED = {"inkling_mm_model", "inkling_text"}
# Does not generate left to right.
NOT_ADAPTED = {"diffusion_gemma"}


def adapted(family="olmoe", model=None, experts=PLANNED, layers=None, **config):
    """A tiny model with a random adapter. `layers`: the decoder indices whose experts are planned; None: all."""
    model = zoo_model(family) if model is None else model
    found = moe_layers(model)
    plan = {
        "version": 1,
        "experts": {str(i.layer): list(experts) if layers is None or i.layer in layers else [] for i in found},
        "num_experts": found[0].num_experts,
        "rule": "hot",
        "params": {},
        "fingerprint": fingerprint(model),
    }
    model = get_peft_model(model, HotLoraConfig(plan=plan, **{"r": 4, "lora_alpha": 6, **config}))
    fill(model)
    return model.eval()


def fill(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def assert_same(found, expected, other=None):
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    if other is not None:  # the comparison could fail
        assert (found - other).norm() > 1e-2 * expected.norm()


def base_of(folder, family):
    cls = getattr(transformers, families()[family])
    return cls.from_pretrained(folder, dtype=torch.float32).eval()


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def merged_attention(family, format):
    """The option that an export of this family needs."""
    names = [path.rpartition(".")[2] for path in attention_modules(zoo_model(family))]
    return {"merge_attention": True} if format == "vllm" and "kv_b_proj" in names else {}


# The room that servers keep


def test_a_servers_place_is_for_all_experts_at_its_own_ranks():
    """OLMoE-1B-7B: experts' 3 E R (D + F) a layer, or 3 R (D + E F), and attention's 4 R (D + D)."""
    with torch.device("meta"):
        base = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(num_experts=64, intermediate_size=1024))
    D, F, E, attention = 2048, 1024, 64, 4 * 2 * 2048
    assert place_bytes(base, "sglang", 32) == 2 * 16 * 32 * (3 * E * (D + F) + attention) == 620_756_992
    assert place_bytes(base, "sglang-shared", 32) == 2 * 16 * 32 * (3 * (D + E * F) + attention)
    assert place_bytes(base, "vllm", 32, itemsize=4) == 2 * 620_756_992


def test_a_place_has_shared_experts_and_is_as_large_as_vllms_ranks(tmp_path):
    model = adapted("qwen2_moe", train_router=False)
    for format in ("vllm", "sglang", "peft"):
        export_adapter(model, tmp_path / format, format=format)
    rooms = {f: room_of(model.get_base_model(), f, tmp_path / f, torch.float32) for f in ("vllm", "sglang", "peft")}
    assert rooms["peft"] is None
    assert (rooms["vllm"].r, rooms["sglang"].r) == (8, 4), "vLLM has no room of rank 4"
    assert rooms["vllm"].place_bytes == 2 * rooms["sglang"].place_bytes
    base = zoo_model("qwen2_moe")
    shared = {path for layer in moe_layers(base) for path in layer.shared}
    linears = [base.get_submodule(path).weight for path in (*attention_modules(base), *shared)]
    assert len(shared) == 3 * len(moe_layers(base))
    experts = sum(3 * layer.num_experts * (32 + 16) for layer in moe_layers(base))
    assert rooms["sglang"].place_bytes == 4 * 4 * (experts + sum(sum(weight.shape) for weight in linears))


# What servers make of it


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("format", "read"), [("vllm", read_vllm), ("sglang", read_sglang)])
def test_a_server_reads_the_adapted_model(family, format, read, tmp_path):
    model, base, out = adapted(family, train_router=False), zoo_model(family), tmp_path / "out"
    merged = merged_attention(family, format)
    assert export_adapter(model, out, format=format, **merged) == out
    found = read(out / "adapter", base_of(out / "base", family)) if merged else read(out, base)
    assert_same(logits(found), logits(model), other=logits(base))


@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_router_merged_base_and_adapter_give_the_adapted_model(family, tmp_path):
    model = adapted(family)
    expected, weights = logits(model), copy.deepcopy(model.state_dict())
    export_adapter(model, tmp_path / "out", format="vllm", merge_router=True, **merged_attention(family, "vllm"))
    assert_same(logits(read_vllm(tmp_path / "out/adapter", base_of(tmp_path / "out/base", family))), expected)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("format", ["vllm", "sglang"])
def test_with_the_router_dropped_it_is_the_adapted_model_without(format, tmp_path):
    model = adapted("qwen2_moe")
    with_router = logits(model)
    export_adapter(model, tmp_path / "out", format=format, drop_router=True)
    read = {"vllm": read_vllm, "sglang": read_sglang}[format](tmp_path / "out", zoo_model("qwen2_moe"))
    for layer in moe_layers(model.get_base_model()):
        model.get_base_model().get_submodule(layer.router).scaling["default"] = 0.0
    assert_same(logits(read), logits(model), other=with_router)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_is_a_checkpoint_and_leaves_the_model_as_it_was(family, tmp_path):
    model = adapted(family)
    expected, weights = logits(model), copy.deepcopy(model.state_dict())
    export_adapter(model, tmp_path / "out", format="merged")
    assert_same(logits(base_of(tmp_path / "out", family)), expected)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), expected) and not model.get_base_model().model.training


# The files


def test_layers_that_transformers_does_not_load_are_not_promised(tmp_path, caplog):
    """glm4_moe's checkpoints have a layer that predicts a second token, with which engines draft."""
    model = adapted("glm4_moe", train_router=False)
    assert model.get_base_model().config.num_nextn_predict_layers == 1
    export_adapter(model, tmp_path / "merged", format="merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert "(num_nextn_predict_layers) are not in" in caplog.text
    assert_same(logits(base_of(tmp_path / "merged", "glm4_moe")), logits(model))


@pytest.mark.parametrize("format", ["vllm", "sglang"])
def test_keys_and_cold_experts(format, tmp_path):
    model = adapted("olmoe", layers=[0], train_router=False)
    export_adapter(model, tmp_path / "out", format=format)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    tensors, experts = tensors_of(tmp_path / "out"), range(8) if format == "vllm" else PLANNED
    expected = {
        f"base_model.model.model.layers.0.mlp.experts.{e}.{p}_proj.lora_{side}.weight"
        for e in experts
        for p in ("gate", "up", "down")
        for side in "AB"
    } | {
        f"base_model.model.model.layers.{i}.self_attn.{p}_proj.lora_{side}.weight"
        for i in range(len(moe_layers(model.get_base_model())))
        for p in "qkvo"
        for side in "AB"
    }
    assert set(tensors) == expected
    for key, tensor in tensors.items():
        assert tensor.dtype == torch.float32 and tensor.is_contiguous()
        cold = ".experts." in key and int(key.split(".experts.")[1].split(".")[0]) not in PLANNED
        assert tensor.any().item() is not cold, key
    config = config_of(tmp_path / "out")
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 6)
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["target_parameters"]
    assert not {"plan", "train_attention", "train_router", "train_shared"} & config.keys()


def test_scaling_is_lora_alpha_over_r_and_B_is_untouched_where_it_was(tmp_path):
    model = adapted("olmoe", train_router=False)
    export_adapter(model, tmp_path / "out", format="vllm")
    key = "base_model.model.model.layers.0.mlp.experts.3.{}_proj.lora_{}.weight"
    experts, tensors = model.get_base_model().model.layers[0].mlp.experts, tensors_of(tmp_path / "out")
    A, B = experts.lora_A_gate_up["default"][1], experts.lora_B_gate_up["default"][1]
    assert torch.equal(tensors[key.format("gate", "A")], A[:4]) and torch.equal(tensors[key.format("up", "A")], A[4:])
    assert torch.equal(tensors[key.format("gate", "B")], B[:16]) and torch.equal(tensors[key.format("up", "B")], B[16:])


@pytest.mark.parametrize("format", ["vllm", "sglang"])
@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 9}}]
)
def test_other_scalings_and_ranks_become_one(options, format, tmp_path):
    model = adapted("qwen2_moe", train_router=False, **options)
    export_adapter(model, tmp_path / "out", format=format)
    config = config_of(tmp_path / "out")
    assert not config["use_rslora"] and not config["rank_pattern"] and not config["alpha_pattern"]
    read = {"vllm": read_vllm, "sglang": read_sglang}[format]
    assert_same(logits(read(tmp_path / "out", zoo_model("qwen2_moe"))), logits(model))


def test_of_several_adapters_one_is_exported(tmp_path):
    model = adapted("olmoe", train_router=False)
    model.add_adapter("second", adapted("olmoe", train_router=False).peft_config["default"])
    export_adapter(model, tmp_path / "out", format="vllm", adapter_name="second")
    assert_same(logits(read_vllm(tmp_path / "out", zoo_model("olmoe"))), logits(zoo_model("olmoe")))  # B = 0
    model.set_adapter("second")
    export_adapter(model, tmp_path / "first", format="vllm", adapter_name="default")
    assert_same(logits(read_vllm(tmp_path / "first", zoo_model("olmoe"))), logits(adapted("olmoe", train_router=False)))


def test_a_bf16_model_merges_and_comes_back_bit_for_bit(tmp_path):
    model = adapted(model=zoo_model("qwen2_moe", dtype=torch.bfloat16))
    weights = copy.deepcopy(model.state_dict())
    export_adapter(model, tmp_path / "out", format="merged")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert not any("lora" in name or "base_layer" in name for name in saved)


# Plain PEFT


VARIANTS = {
    "all": {},
    "one-layer": {"layers": [0]},
    "experts-only": {"train_attention": False, "train_router": False, "train_shared": False},
    "no-experts": {"layers": []},
    "rslora": {"use_rslora": True},
}


@pytest.fixture(scope="module")
def plain_peft(tmp_path_factory):
    """name -> (plain PEFT's logits, ours), for every family and for variants of one."""
    folder, cases, ours = tmp_path_factory.mktemp("peft"), {}, {}
    for name, family, options in [
        *((family, family, {}) for family in FAMILIES),
        *((name, "qwen2_moe", options) for name, options in VARIANTS.items()),
    ]:
        model = adapted(family, **options)
        cases[name], ours[name] = (family, export_adapter(model, folder / name, format="peft")), logits(model)
    found, said = plain_peft_logits(cases, folder)
    return {name: (found.get(name), ours[name], said, cases[name][1]) for name in cases}


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_peft_loads_every_family(plain_peft, family):
    found, ours, said, _ = plain_peft[family]
    assert found is not None, said
    assert_same(found, ours, other=logits(zoo_model(family)))


def test_plain_peft_loads_families_whose_own_names_it_renames(tmp_path):
    families = ("laguna", "deepseek_ocr2")
    models = {family: adapted(family) for family in families}
    cases = {f: (f, export_adapter(model, tmp_path / f, format="peft")) for f, model in models.items()}
    found, said = plain_peft_logits(cases, tmp_path)
    for family, model in models.items():
        assert family in found, said
        assert_same(found[family], logits(model), other=logits(zoo_model(family)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_plain_peft_loads_variants(plain_peft, variant):
    found, ours, said, _ = plain_peft[variant]
    if variant == "experts-only":  # PEFT says that a pattern matched no target module, and uses it for parameters
        assert found is None and "rank_pattern" in said
        return
    assert found is not None, said
    assert_same(found, ours)


def test_plain_pefts_config(plain_peft):
    folder = plain_peft["qwen2_moe"][3]
    config = config_of(folder)
    assert not {"plan", "train_router"} & config.keys() and not config["use_rslora"]
    assert (config["r"], config["lora_alpha"]) == (8, 12)  # the fused gate_up_proj's; the pattern has the others'
    assert set(config["rank_pattern"].values()) == {4} and set(config["alpha_pattern"].values()) == {6}
    assert "model.layers.0.mlp.shared_expert.gate_proj.weight" in config["target_parameters"]
    assert all("self_attn" in name for name in config["target_modules"])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_exported_to_peft_is_imported_again(plain_peft, family):
    _, ours, _, folder = plain_peft[family]
    model = import_adapter(zoo_model(family), folder)
    assert_same(logits(model), ours)
    config = model.peft_config["default"]
    assert config.plan["rule"] == "imported" and config.r == 4
    assert all(ids == list(PLANNED) for ids in config.plan["experts"].values())


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(families()) - NOT_ADAPTED))
def test_every_family(family, tmp_path):
    model = adapted(family, train_shared=family not in RAW_SHARED)
    expected = logits(model)
    export_adapter(model, tmp_path / "merged", format="merged")
    assert_same(logits(base_of(tmp_path / "merged", family)), expected)
    export_adapter(model, tmp_path / "peft", format="peft")
    imported = import_adapter(zoo_model(family), tmp_path / "peft")
    assert_same(logits(imported), expected, other=logits(zoo_model(family)))
    for format, read in (("vllm", read_vllm), ("sglang", read_sglang)):
        export_adapter(model, tmp_path / format, format=format, merge_router=True, **merged_attention(family, format))
        if family not in RENAMED:
            base = base_of(tmp_path / format / "base", family)
            assert_same(logits(read(tmp_path / format / "adapter", base)), expected)


@pytest.mark.slow
def test_plain_peft_loads_all_families(tmp_path):
    cases, ours = {}, {}
    for family in sorted(set(families()) - NOT_ADAPTED):
        model = adapted(family, train_shared=family not in RAW_SHARED)
        cases[family] = (family, export_adapter(model, tmp_path / family, format="peft"))
        ours[family] = logits(model)
    found, said = plain_peft_logits(cases, tmp_path)
    assert found.keys() == ours.keys(), said
    for family, expected in ours.items():
        assert_same(found[family], expected)


# Errors


@pytest.mark.parametrize("format", ["vllm", "sglang"])
def test_a_router_needs_a_decision(format, tmp_path):
    with pytest.raises(HotLoraError, match=r"router.*merge_router=True.*drop_router=True.*differ"):
        export_adapter(adapted(), tmp_path / "out", format=format)
    assert not list(tmp_path.iterdir())


def test_what_vllm_does_not_apply_is_not_given_to_it(tmp_path):
    """MLA's kv_b_proj: vLLM reads its weight when it loads the model, and runs no adapter on it (vllm#48974)."""
    model = adapted("deepseek_v3", train_router=False)
    with pytest.raises(HotLoraError, match=r"kv_b_proj.*merge_attention=True.*--no-attention"):
        export_adapter(model, tmp_path / "out", format="vllm")
    with pytest.raises(HotLoraError, match="kv_b_proj"):
        export_adapter(adapted("deepseek_v3"), tmp_path / "out", format="vllm", merge_router=True)
    assert not list(tmp_path.iterdir())
    export_adapter(model, tmp_path / "out", format="vllm", merge_attention=True)
    held = tensors_of(tmp_path / "out/adapter")
    assert any("kv_a_proj_with_mqa" in name for name in held) and not any("kv_b_proj" in name for name in held)
    assert "kv_b_proj" not in config_of(tmp_path / "out/adapter")["target_modules"]
    export_adapter(model, tmp_path / "sglang", format="sglang")
    assert any("kv_b_proj" in name for name in tensors_of(tmp_path / "sglang"))
    # Without attention there is nothing to decide.
    export_adapter(
        adapted("deepseek_v3", train_router=False, train_attention=False), tmp_path / "experts", format="vllm"
    )
    for other, format in ((adapted("olmoe", train_router=False), "vllm"), (model, "sglang"), (model, "merged")):
        with pytest.raises(HotLoraError, match="leave merge_attention out"):
            export_adapter(other, tmp_path / "other", format=format, merge_attention=True)


def test_choices_that_make_no_sense(tmp_path):
    model = adapted()
    for options, message in [
        ({"format": "onnx"}, "'onnx' does not exist: choose one of vllm"),
        ({"format": None}, "None does not exist: choose one of vllm"),
        ({"format": "vllm", "merge_router": True, "drop_router": True}, "exclude each other"),
        ({"format": "peft", "merge_router": True}, "holds the router"),
        ({"format": "merged", "drop_router": True}, "holds the router"),
        ({"format": "vllm", "adapter_name": "other"}, "no adapter 'other': its adapters are default"),
    ]:
        with pytest.raises(HotLoraError, match=message):
            export_adapter(model, tmp_path / "out", **options)
    with pytest.raises(HotLoraError, match="does not train the router"):
        export_adapter(adapted(train_router=False), tmp_path / "out", format="vllm", drop_router=True)
    only_router = adapted(layers=[], train_attention=False)
    with pytest.raises(HotLoraError, match="nothing is left"):
        export_adapter(only_router, tmp_path / "out", format="vllm", drop_router=True)
    assert not list(tmp_path.iterdir())


def test_what_is_loaded_for_an_export_is_not_held_twice(tmp_path):
    """The same checkpoint, without a copy of what is adapted."""
    model, other = adapted("olmoe"), adapted("olmoe")
    export_adapter(model, tmp_path / "kept", format="merged")
    export_adapter(other, tmp_path / "once", format="merged", restores=False)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("kept", "once"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    before, path = adapted("olmoe").get_base_model(), moe_layers(model.get_base_model())[0].experts
    weights = [
        m.get_submodule(path).base_layer.down_proj for m in (before, model.get_base_model(), other.get_base_model())
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_link_is_no_place_for_an_export(tmp_path):
    """What is made takes the folder's place at once, which it can take of no link and no mount point."""
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with pytest.raises(FileError, match="link is a link or a mount point: give a new folder inside it"):
        export_adapter(adapted(train_router=False), tmp_path / "link", format="peft")


def test_room_is_by_a_linears_widths_however_it_is_stored():
    base = zoo_model("olmoe")
    expected = place_bytes(base, "vllm", 8, 2)
    for path in attention_modules(base):
        weight = base.get_submodule(path).weight
        weight.data = weight.data.reshape(-1, 1)[: weight.numel() // 2]  # as bitsandbytes has 4 bits
    assert place_bytes(base, "vllm", 8, 2) == expected


def test_a_model_without_a_hotlora_adapter(tmp_path):
    with pytest.raises(ModelError, match="has no adapter"):
        export_adapter(zoo_model("olmoe"), tmp_path / "out", format="vllm")
    plain = get_peft_model(zoo_model("olmoe"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(HotLoraError, match="not a hotlora adapter"):
        export_adapter(plain, tmp_path / "out", format="vllm")
    merged = adapted(train_router=False)
    merged.merge_adapter()
    with pytest.raises(HotLoraError, match="unmerge_adapter"):
        export_adapter(merged, tmp_path / "out", format="vllm")
    assert not list(tmp_path.iterdir())


def test_a_rank_that_vllm_has_no_room_for(tmp_path):
    model = adapted(r=513, train_router=False)
    with pytest.raises(HotLoraError, match="512 at most, and this one has 513"):
        export_adapter(model, tmp_path / "out", format="vllm")
    export_adapter(model, tmp_path / "out", format="sglang")
    assert [room_for(rank) for rank in (1, 8, 12, 32, 257)] == [8, 8, 16, 32, 320]


@pytest.mark.parametrize("format", ["vllm", "sglang", "peft"])
def test_dora_has_no_place(format, tmp_path):
    model = adapted(train_router=False)
    model.peft_config["default"].use_dora = True
    with pytest.raises(HotLoraError, match="use_dora"):
        export_adapter(model, tmp_path / "out", format=format)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_not_replaced(tmp_path):
    model = adapted(train_router=False)
    (tmp_path / "empty").mkdir()
    export_adapter(model, tmp_path / "empty", format="vllm")
    before = tensors_of(tmp_path / "empty")
    with pytest.raises(FileError, match="there already"):
        export_adapter(model, tmp_path / "empty", format="sglang")
    assert tensors_of(tmp_path / "empty").keys() == before.keys()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileError, match="there already"):
        export_adapter(model, tmp_path / "file", format="vllm")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_failure_while_writing_leaves_nothing_and_the_model_as_it_was(tmp_path):
    class Broken:
        def save_pretrained(self, folder):
            raise OSError("no space left")

    model = adapted()
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(FileError, match=r"out cannot be written \(no space left\)"):
        export_adapter(model, tmp_path / "out", format="vllm", merge_router=True, tokenizer=Broken())
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


# Import


PEFT_TARGETS = {
    "olmoe": (["q_proj", "v_proj"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    "mixtral": (["o_proj"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]),
    "qwen2_moe": ([], ["experts.gate_up_proj", "shared_expert.gate_proj.weight", "shared_expert.up_proj.weight"]),
    "qwen3_moe": (["q_proj"], ["experts.down_proj"]),
    "gpt_oss": (["q_proj"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "router.weight"]),
    "nemotron_h": ([], ["experts.up_proj", "experts.down_proj"]),
}


def plain_adapter(family, folder, **options):
    """A plain PEFT adapter with random weights on all experts but 0 and 5; gives its model's logits."""
    modules, parameters = PEFT_TARGETS[family]
    config = LoraConfig(
        **{"target_modules": modules, "target_parameters": parameters, "r": 3, "lora_alpha": 5, **options}
    )
    model = get_peft_model(zoo_model(family), config)
    fill(model)
    for name, parameter in model.named_parameters():
        if ".experts." in name and "lora_B" in name:
            out, columns = parameter.shape
            parameter.data.reshape(out, columns // 8, 8)[:, :, [0, 5]] = 0
    save_plain_peft(model, folder)
    return logits(model.eval())


@pytest.mark.parametrize("family", PEFT_TARGETS)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_plain_peft_adapter_is_imported(family, use_rslora, tmp_path):
    expected = plain_adapter(family, tmp_path, use_rslora=use_rslora)
    model = import_adapter(zoo_model(family), tmp_path)
    assert_same(logits(model), expected, other=logits(zoo_model(family)))
    config = model.peft_config["default"]
    assert config.plan["rule"] == "imported" and not model.training
    assert all(ids == [1, 2, 3, 4, 6, 7] for ids in config.plan["experts"].values())
    assert config.train_attention is bool(PEFT_TARGETS[family][0])
    assert config.train_router is any("gate.weight" in t or "router" in t for t in PEFT_TARGETS[family][1])
    assert config.train_shared is any("shared" in t for t in PEFT_TARGETS[family][1])


def test_an_imported_adapter_is_one_of_ours(tmp_path):
    expected = plain_adapter("olmoe", tmp_path / "plain", rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 1})
    model = import_adapter(zoo_model("olmoe"), tmp_path / "plain", is_trainable=True)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    export_adapter(model, tmp_path / "out", format="vllm")
    assert_same(logits(read_vllm(tmp_path / "out", zoo_model("olmoe"))), expected)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(("dropout", "experts"), [(0.1, []), (0.0, ["mlp.experts.down_proj"])])
def test_an_imported_adapter_trains_on_as_in_peft(use_rslora, dropout, experts, tmp_path):
    """With its scaling in B, AdamW would move the weights by as much less."""
    config = LoraConfig(
        r=3, lora_alpha=24, lora_dropout=dropout, use_rslora=use_rslora, target_modules=["q_proj"],
        target_parameters=experts,
    )  # fmt: skip
    plain = get_peft_model(zoo_model("olmoe"), config)
    fill(plain)
    plain.save_pretrained(tmp_path)
    model = import_adapter(zoo_model("olmoe"), tmp_path, is_trainable=True)
    ours = model.peft_config["default"]
    assert (ours.r, ours.lora_alpha, ours.lora_dropout, ours.use_rslora) == (3, 24, dropout, use_rslora)
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.default.weight"
    mine, theirs = (dict(its.named_parameters())[key] for its in (model, plain))
    assert mine.requires_grad and torch.equal(mine, theirs)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen2_moe"])
def test_one_pair_for_each_expert_is_imported(family, tmp_path):
    """What vLLM reads, and what PEFT wrote with transformers 4."""
    model = adapted(family, train_router=False, train_attention=family == "mixtral")
    export_adapter(model, tmp_path / "vllm", format="vllm")
    imported = import_adapter(zoo_model(family), tmp_path / "vllm")
    assert_same(logits(imported), logits(model), other=logits(zoo_model(family)))
    assert imported.peft_config["default"].r == 4
    # The same scaling by the root of the rank, which is the pair's own and not that of what PEFT makes of two.
    config = config_of(tmp_path / "vllm")
    config |= {"use_rslora": True, "lora_alpha": config["lora_alpha"] / config["r"] ** 0.5}
    shutil.copytree(tmp_path / "vllm", tmp_path / "rslora")
    (tmp_path / "rslora" / "adapter_config.json").write_text(json.dumps(config))
    assert_same(logits(import_adapter(zoo_model(family), tmp_path / "rslora")), logits(model))
    export_adapter(model, tmp_path / "sglang", format="sglang")
    with pytest.raises(FileError, match=r"cannot be brought to this model's layout|have no place|do not fit"):
        import_adapter(zoo_model(family), tmp_path / "sglang")


@pytest.mark.parametrize("family", sorted(RAW_SHARED))
def test_raw_shared_experts_go_into_a_merged_checkpoint_only(family, tmp_path):
    for format in ("peft", "vllm", "sglang"):
        with pytest.raises(HotLoraError, match=r"cannot hold .*shared_experts.*'merged'.*train_shared=False"):
            export_adapter(adapted(family, train_router=False), tmp_path / "out", format=format)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_imported_is_named(tmp_path):
    plain_adapter("olmoe", tmp_path / "good")
    config, tensors = config_of(tmp_path / "good"), tensors_of(tmp_path / "good")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    head = {f"base_model.model.lm_head.lora_{side}.weight": torch.ones(3, 3) for side in "AB"}
    down = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
    for name, changes, content, message in [
        ("dora", {"use_dora": True}, tensors, "use_dora"),
        ("bias", {"bias": "all"}, tensors, "bias 'all'"),
        ("pissa", {"init_lora_weights": "pissa_niter_4"}, tensors, "'pissa_niter_4', by which PEFT changes the base"),
        ("alora", {"alora_invocation_tokens": [1, 2]}, tensors, "has alora_invocation_tokens"),
        ("type", {"peft_type": "IA3"}, tensors, "only LORA"),
        ("ours", {"plan": {"version": 1}}, tensors, "use load_adapter"),
        ("head", {}, tensors | head, "lm_head"),
        ("half", {}, {k: v for k, v in tensors.items() if k != key}, "only one of lora_A and lora_B.*q_proj"),
        ("shape", {}, tensors | {down: tensors[down][:8]}, "made for another model"),
        ("magnitude", {}, tensors | {key.replace("lora_A", "lora_magnitude_vector"): torch.ones(1, 3)}, "magnitude"),
        ("absent", {}, {k: v for k, v in tensors.items() if "layers.0.mlp.experts.base" not in k}, "has no lora_A"),
    ]:
        write_adapter(tmp_path / name, config | changes, content)
        base = zoo_model("olmoe")
        with pytest.raises(FileError, match=message):
            import_adapter(base, tmp_path / name)
        assert not isinstance(base, PeftModel) and not any("lora" in n for n, _ in base.named_parameters())
    with pytest.raises(FileError, match="is not a folder"):
        import_adapter(zoo_model("olmoe"), tmp_path / "nowhere")
    with pytest.raises(HotLoraError, match="has an adapter already"):
        import_adapter(adapted(), tmp_path / "good")
