import json
import shutil

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny import FAMILIES, tiny_batch, tiny_config, tiny_model, tiny_plan
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig
from transformers.models.auto.configuration_auto import AutoConfig
from zoo import zoo_model

from hotlora.adapter.config import HotLoraConfig
from hotlora.base.errors import FileError, ModelError
from hotlora.hf import models
from hotlora.hf.models import (
    context_length,
    load_config,
    load_model,
    load_tokenizer,
    model_from_config,
    own_dtype,
)
from hotlora.hf.moe_layers import attention_modules, fingerprint, moe_layers, num_experts_per_tok
from hotlora.routing.profiler import profile_routing


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_of_every_layer_is_found(family):
    model = tiny_model(family)
    layers = moe_layers(model)
    assert [layer.layer for layer in layers] == [0, 1]
    for i, layer in enumerate(layers):
        assert layer.experts == f"model.layers.{i}.mlp.experts"
        assert layer.router == f"model.layers.{i}.mlp.gate"
        assert layer.attention == tuple(f"model.layers.{i}.self_attn.{n}_proj" for n in "qkvo")
        shared = tuple(f"model.layers.{i}.mlp.shared_expert.{n}_proj" for n in ("gate", "up", "down"))
        assert layer.shared == (shared if family == "qwen2_moe" else ())
        assert layer.num_experts == 8
    assert attention_modules(model) == [path for layer in layers for path in layer.attention]
    assert num_experts_per_tok(model) == 2


@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_a_base_whose_weights_are_offloaded_is_refused_before_an_adapter_is_put_on(where, tmp_path):
    """It can be profiled. Under an adapter the first forward would raise a TypeError in Accelerate."""
    model = tiny_model()
    expected, plan = profile_routing(model, [tiny_batch()]), tiny_plan(model)
    if where == "disk":
        model.save_pretrained(tmp_path)
        parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
        places = {part: "cpu" for part in parts} | {"model.layers.1": "disk"}
        model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "off")
    else:
        cpu_offload(model.model.layers[1], execution_device=torch.device("cpu"))
    assert profile_routing(model, [tiny_batch()]).hash == expected.hash
    with pytest.raises(ModelError, match=r"11 of the model's weights, model\.layers\.1\..* are offloaded to disk or"):
        get_peft_model(model, HotLoraConfig(plan=plan, r=4))
    assert not any("lora" in name for name, _ in model.named_modules())


def test_dense_layers_have_attention_only():
    model = tiny_model("qwen3_moe", num_hidden_layers=3, mlp_only_layers=[0, 2])
    assert [layer.layer for layer in moe_layers(model)] == [1]
    assert len(attention_modules(model)) == 12


@pytest.mark.parametrize("config", ["plain", "hotlora"])
def test_an_adapted_model_has_the_same_parts_under_its_own_paths(config):
    model = tiny_model("qwen2_moe")
    before, mark = moe_layers(model), fingerprint(model)
    plan = tiny_plan(model)
    made = LoraConfig(target_modules=["q_proj"]) if config == "plain" else HotLoraConfig(plan=plan, r=4)
    adapted = get_peft_model(model, made)
    for old, new in zip(before, moe_layers(adapted), strict=True):
        assert new.experts == f"base_model.model.{old.experts}"
        assert new.shared == tuple(f"base_model.model.{path}" for path in old.shared)
        assert new.attention == tuple(f"base_model.model.{path}" for path in old.attention)
        adapted.get_submodule(new.router)
    assert [layer.experts for layer in moe_layers(adapted.get_base_model())] == [b.experts for b in before]
    assert fingerprint(adapted) == mark


def test_fingerprint_is_of_the_structure():
    model = tiny_model("olmoe")
    mark = fingerprint(model)
    assert mark == fingerprint(tiny_model("olmoe", seed=1)) == fingerprint(model.to(torch.bfloat16))
    with torch.device("meta"):
        assert fingerprint(AutoModelForCausalLM.from_config(tiny_config("olmoe"))) == mark
    family, _, digest = mark.partition("-")
    assert family == "olmoe" and len(digest) == 12 and int(digest, 16) >= 0
    others = [
        tiny_model("olmoe", **change)
        for change in (
            {"num_hidden_layers": 3},
            {"num_experts": 4},
            {"num_experts_per_tok": 3},
            {"hidden_size": 48},
            {"intermediate_size": 24},
        )
    ]
    marks = {mark, *map(fingerprint, others), fingerprint(tiny_model("mixtral"))}
    assert len(marks) == 7


def test_a_model_without_experts():
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    dense = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes))
    for function in (moe_layers, fingerprint):
        with pytest.raises(ModelError, match=r"llama model has no MoE layer"):
            function(dense)
    with pytest.raises(ModelError, match=r"llama.*has none of num_experts_per_tok"):
        num_experts_per_tok(dense)
    with pytest.raises(ModelError, match="no MoE layer"):
        moe_layers(tiny_model("qwen3_moe", mlp_only_layers=[0, 1]))
    with pytest.raises(ModelError, match="no transformers config"):
        moe_layers(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("family", ["llama4_text", "dbrx", "jetmoe", "longcat_flash", "step3p7", "switch_transformers"])
def test_experts_that_are_not_behind_the_interface_are_named(family, tmp_path):
    """Families that compute their experts in a way of their own say so before any weight is read."""
    # transformers cannot build dbrx from its default config.
    options = {"attn_config": {"rope_theta": 1e4}} if family == "dbrx" else {"num_hidden_layers": 2}
    AutoConfig.for_model(family, **options).save_pretrained(tmp_path)
    for function in (load_model, model_from_config):
        with pytest.raises(ModelError, match=r"not behind transformers' experts interface|no causal language model"):
            function(tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("olmoe").to(torch.bfloat16).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", padding_side="left").save_pretrained(folder)
    return folder


def test_load_model(saved):
    model = load_model(saved, device="cpu")
    assert model.dtype == torch.float32 and not model.training
    assert load_model(str(saved), dtype=torch.bfloat16, device="cpu").dtype == torch.bfloat16
    double = load_model(str(saved), dtype=torch.float64, device="cpu")  # which grouped_mm does not take
    torch.testing.assert_close(double(**tiny_batch()).logits.float(), model(**tiny_batch()).logits)
    expected = tiny_model("olmoe").to(torch.bfloat16).state_dict()
    assert all(torch.equal(weight, expected[name].float()) for name, weight in model.state_dict().items())


def test_load_tokenizer(saved):
    tokenizer = load_tokenizer(saved)
    assert tokenizer.pad_token == "</s>" and tokenizer.padding_side == "right"


def test_load_errors(saved, tmp_path):
    for missing in (tmp_path / "none", "./none", "/none/at/all"):
        with pytest.raises(ModelError, match="is not a folder"):
            load_model(missing)
        with pytest.raises(ModelError, match="is not a folder"):
            load_tokenizer(missing)
    with pytest.raises(ModelError, match="no causal language model"):
        load_model(tmp_path)
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"llama.*no MoE layer"):
        load_model(tmp_path)
    cut = tmp_path / "cut"
    shutil.copytree(saved, cut)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:2000])
    with pytest.raises(ModelError, match="no causal language model"):
        load_model(cut, device="cpu")


def test_the_embedded_model():
    model = load_model("nano", device="cpu")
    assert model.config.model_type == "olmoe" and len(moe_layers(model)) > 1
    assert load_tokenizer("nano").padding_side == "right"
    assert fingerprint(model_from_config("nano")) == fingerprint(model)


def test_an_installation_without_the_embedded_model(monkeypatch, tmp_path):
    monkeypatch.setitem(models.NANOS, "nano", tmp_path)
    with pytest.raises(ModelError, match="embedded model"):
        load_model("nano")


def test_model_from_config(saved, tmp_path):
    for path in (saved, saved / "config.json", str(saved)):
        model = model_from_config(path)
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert fingerprint(model) == fingerprint(tiny_model("olmoe"))
    with pytest.raises(FileError, match="does not exist"):
        model_from_config(tmp_path / "config.json")
    for content in ("{", "[]", json.dumps({"model_type": "no-such-type"}), "{}"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(FileError, match=r"not a config\.json"):
            model_from_config(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(FileError, match=r"not a config\.json"):
        model_from_config(tmp_path / "x.safetensors")
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no MoE layer"):
        model_from_config(tmp_path)


def test_the_own_dtype_is_what_auto_loads(tmp_path):
    """Of a config that states it for the whole and not for its text, as qwen3_vl_moe's may."""
    model = zoo_model("qwen3_vl_moe").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"].pop("dtype", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = type(model).from_pretrained(tmp_path, dtype="auto")
    assert (
        {parameter.dtype for parameter in loaded.parameters()} == {own_dtype(load_config(tmp_path))} == {torch.bfloat16}
    )


@pytest.mark.parametrize(
    ("given", "length"),
    [
        ({"max_position_embeddings": 512}, 512),
        (  # Qwen's recipe for YaRN
            {
                "max_position_embeddings": 40960,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 4096,
                "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            },
            4096,
        ),
    ],
)
def test_context_length(given, length):
    assert context_length(Qwen3MoeConfig(**given), None) == length
