"""--quantize-linear: attention, shared experts and dense MLPs in bitsandbytes' own layers, beside quantized experts."""

import json

import peft
import pytest
import torch
from packed_checkpoints import made, write_fp8, write_mxfp4
from safetensors.torch import load_file
from tiny import tiny_batch, tiny_plan
from tiny_tokenizer import byte_tokenizer
from transformers.quantizers import HfQuantizer
from typer.testing import CliRunner

import hotlora
from hotlora.adapter.config import HotLoraConfig
from hotlora.adapter.count import count_parameters
from hotlora.adapter.linears import linear_bits
from hotlora.adapter.load import load_adapter, load_model
from hotlora.adapter.quantize import ExpertsQuantization
from hotlora.adapter.stored import quantized_bits
from hotlora.base.errors import HotLoraError
from hotlora.base.records import read_record
from hotlora.cli.main import app
from hotlora.hf.linears import plain_linears, quantized_bits_of
from hotlora.hf.moe_layers import attention_modules, moe_layers

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install hotlora[quantize]")
bits_4_8 = pytest.mark.parametrize("bits", [4, 8])
# Rows of 64 weights and more everywhere, which bitsandbytes needs.
WIDE = {
    "deepseek_v3": {"moe_intermediate_size": 64, "kv_lora_rank": 64, "q_lora_rank": 64, "intermediate_size": 128},
    "qwen2_moe": {"hidden_size": 64, "shared_expert_intermediate_size": 64, "intermediate_size": 64},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    at = tmp_path_factory.mktemp("wide")
    for family, sizes in WIDE.items():
        made(family, **sizes).save_pretrained(at / family)
    return at


def quantized(model) -> dict[str, int]:
    return {name: bits for name, module in model.named_modules() if (bits := quantized_bits_of(module))}


@bits_4_8
@pytest.mark.parametrize("family", WIDE)
def test_which_layers(written, family, bits):
    """All of attention, shared experts and dense MLPs; no router, no gate of one output, no head, no expert."""
    model = load_model(written / family, device="cpu", quantization_config=ExpertsQuantization(4, linear=bits))
    plain = load_model(written / family, device="cpu")
    found = quantized(model)
    assert found.keys() == plain_linears(plain).keys() and set(found.values()) == {bits} == {linear_bits(model)}
    names = {name.rpartition(".")[2] for name in found}
    assert {"o_proj", "gate_proj", "down_proj"} <= names and not names & {"gate", "shared_expert_gate", "lm_head"}
    assert any("shared" in name for name in found)
    assert quantized_bits(model) == 4 and attention_modules(model) == attention_modules(plain)
    assert [layer.shared for layer in moe_layers(model)] == [layer.shared for layer in moe_layers(plain)]
    alone = load_model(written / family, device="cpu", quantization_config=ExpertsQuantization(None, linear=bits))
    assert quantized(alone) == found and quantized_bits(alone) is None
    assert model.num_parameters() < plain.num_parameters() == alone.num_parameters()


@bits_4_8
def test_it_computes_as_with_dequantized_layers(written, bits):
    model = load_model(
        written / "deepseek_v3", device="cpu", quantization_config=ExpertsQuantization(None, linear=bits)
    )
    dense = load_model(written / "deepseek_v3", device="cpu")
    for name in quantized(model):
        weight = model.get_submodule(name).weight
        if bits == 4:
            value = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        else:
            value = weight.data.float() * weight.SCB[:, None] / 127
        own = dense.get_submodule(name).weight
        assert 0 < (own - value).norm() / own.norm() < (0.12 if bits == 4 else 0.02)
        own.data = value.to(own.dtype)
        x = torch.randn(2, 1, 3, own.shape[1])
        got, expected = model.get_submodule(name)(x), dense.get_submodule(name)(x)
        # In 8 bits bitsandbytes rounds the inputs, too.
        assert (got - expected).norm() / expected.norm() < (1e-5 if bits == 4 else 0.03)
    if bits == 4:
        got, expected = (it(**tiny_batch(vocab_size=259)).logits for it in (model, dense))
        assert (got - expected).norm() / expected.norm() < 1e-4


def test_layers_with_short_rows_stay(tmp_path, caplog):
    made("deepseek_v3").save_pretrained(tmp_path)  # rows of 32 and of 64
    model = load_model(tmp_path, device="cpu", quantization_config=ExpertsQuantization(None, linear=4))
    assert quantized(model) and all(model.get_submodule(name).in_features % 64 == 0 for name in quantized(model))
    assert "linear layers are not quantized: their rows are no whole number of 64 weights" in caplog.text


def adapted(base, **options):
    return peft.get_peft_model(base, HotLoraConfig(plan=tiny_plan(base), r=4, lora_alpha=8, **options))


@bits_4_8
def test_an_adapter_on_it(written, bits, tmp_path):
    """On attention and shared experts, too; trained, saved, read back; noted; merging refused with words."""
    stored = ExpertsQuantization(8, linear=bits)
    base = load_model(written / "deepseek_v3", device="cpu", quantization_config=stored)
    plain = adapted(load_model(written / "deepseek_v3", device="cpu"))
    torch.manual_seed(0)
    model, batch = adapted(base, init_lora_weights=False).train(), tiny_batch(vocab_size=259)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {name for name, p in plain.named_parameters() if p.requires_grad}
    assert count_parameters(model) == count_parameters(plain)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in names), name
    model.eval()
    expected = model(**batch).logits
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(HotLoraError, match="cannot be merged"):
            merge()
    model.save_pretrained(tmp_path)
    noted = json.loads((tmp_path / "adapter_config.json").read_text())["base_quantization"]
    assert noted == {"bits": 8, "keep": {}, "linear": bits}
    found = hotlora.base_quantization(tmp_path)
    assert (found.bits, found.linear) == (8, bits)
    again = load_adapter(load_model(written / "deepseek_v3", device="cpu", quantization_config=found), tmp_path)
    assert torch.equal(again(**batch).logits, expected)


def test_merging_into_linear_layers_alone_is_refused(written):
    base = load_model(written / "qwen2_moe", device="cpu", quantization_config=ExpertsQuantization(None, linear=4))
    with pytest.raises(HotLoraError, match=r"linear layers of 4 bits.*--quantize-linear 0"):
        adapted(base).merge_and_unload()
    with pytest.raises(HotLoraError, match="cannot be saved"):
        base.save_pretrained("nowhere")


def test_a_layer_that_was_evaluated_passes_gradients_on(written):
    """On CPUs with bfloat16 bitsandbytes 0.50.2 stores weights anew when first evaluated, and then passes none."""
    base = load_model(written / "qwen2_moe", device="cpu", quantization_config=ExpertsQuantization(None, linear=4))
    model, batch, found = adapted(base, init_lora_weights=False), tiny_batch(vocab_size=259), []
    for evaluated in (False, True):
        if evaluated:
            with torch.no_grad():
                model.eval()(**batch)
        model.train().zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    for name, grad in found[0].items():
        assert torch.equal(found[1][name], grad), name


@pytest.mark.skipif(not hasattr(HfQuantizer, "get_new_dtype"), reason="needs a newer transformers, which it says")
@pytest.mark.parametrize("write", [write_mxfp4, write_fp8])
def test_beside_packed_experts(write, tmp_path):
    write(tmp_path, **({} if write is write_mxfp4 else {"head_dim": 16}))
    model = load_model(tmp_path, device="cpu", quantization_config=ExpertsQuantization(None, linear=4))
    plain = load_model(tmp_path, device="cpu")
    assert quantized(model).keys() == plain_linears(plain).keys() and quantized(model)
    batch = tiny_batch(vocab_size=259)
    got, expected = model(**batch).logits, plain(**batch).logits
    assert 0 < (got - expected).norm() / expected.norm() < 0.5
    for name in quantized(model):
        weight = model.get_submodule(name).weight
        value = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        own = plain.get_submodule(name).weight
        assert (own - value).norm() / own.norm() < 0.12
    adapted(model).save_pretrained(tmp_path / "adapter")
    found = hotlora.base_quantization(tmp_path / "adapter")
    assert (found.bits, found.linear) == (None, 4)


@pytest.mark.parametrize("bits", [2, "4", True])
def test_bits_out_of_range(bits):
    with pytest.raises(HotLoraError, match=r"quantize_linear=.* must be 4 or 8"):
        ExpertsQuantization(4, linear=bits)


def test_the_commands(written, tmp_path):
    """Trained, and extended from a checkpoint as without a stop; evaluated as in training, or as is asked for."""
    model = written / "qwen2_moe"
    byte_tokenizer().save_pretrained(model)
    rows = [{"prompt": f"{i} and {i % 7}", "completion": f" make {i + i % 7}"} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--data", str(tmp_path / "rows.jsonl"), "--device", "cpu"]

    def run(*command: str) -> str:
        result = CliRunner().invoke(app, [*command, *data])
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output

    train = ["train", "--model", str(model), "--quantize", "4", "--quantize-linear", "4", "--experts-per-layer", "3"]
    train += [
        "--batch-size",
        "4",
        "--r",
        "4",
        "--max-length",
        "64",
        "--learning-rate",
        "0.01",
        "--lr-scheduler-type",
        "constant",
    ]
    told = run(*train, "--max-steps", "4", "--output", str(tmp_path / "run"))
    assert "kernels" not in told and "bitsandbytes" not in told
    record = read_record(tmp_path / "run")
    assert record["config"]["quantize_linear"] == 4
    run(*train, "--max-steps", "2", "--output", str(tmp_path / "more"))
    run(*train, "--max-steps", "4", "--output", str(tmp_path / "more"), "--extend")
    assert read_record(tmp_path / "more")["training"]["loss_last"] == record["training"]["loss_last"]

    losses = {}
    for name, options in {"own": [], "said": ["--quantize", "4", "--quantize-linear", "4"],
                          "dense": ["--quantize", "0", "--quantize-linear", "0"]}.items():  # fmt: skip
        adapter = ["--adapter", str(tmp_path / "run" / "adapter"), "--output", str(tmp_path / name)]
        told = run("evaluate", "--model", str(model), *adapter, *options)
        assert ("other linear layers were stored in 4 bits (--quantize-linear)" in told) == (name != "dense")
        losses[name] = read_record(tmp_path / name)["evaluation"]["rows"]["loss"]
    assert losses["own"] == losses["said"] != losses["dense"]
    factors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors").values()
    assert {factor.dtype for factor in factors} == {torch.float32}  # TRL would have made them bfloat16
    net, _ = hotlora.load(tmp_path / "run", device="cpu")
    assert linear_bits(net) == 4 and quantized_bits(net) == 4
