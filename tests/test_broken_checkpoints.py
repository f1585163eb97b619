"""Checkpoints that lack weights, whose scales do not fit them, or in a format that is not read: one error, and no
weights that nobody trained."""

import json
import logging
import shutil

import pytest
import torch
from packed_checkpoints import made, write_fp8, write_mxfp4
from safetensors.torch import load_file, save_file
from tiny_tokenizer import byte_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hotlora.adapter.quantize import ExpertsQuantization
from hotlora.base.errors import ModelError
from hotlora.hf.models import load_model
from hotlora.runs.checks import check_run
from hotlora.runs.methods import resolve

UP = "model.layers.1.mlp.experts.3.up_proj.weight"
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    made("qwen3_moe").save_pretrained(folder / "dense")
    return {
        "mxfp4": write_mxfp4(folder / "mxfp4"), "fp8": write_fp8(folder / "fp8"), "dense": folder / "dense",
    }  # fmt: skip


def changed(folder, to, tensors=None, **config):
    """A copy, whose file of tensors or config.json is another."""
    shutil.copytree(folder, to)
    if tensors is not None:
        file = to / "model.safetensors"
        found = load_file(file)
        tensors(found)
        save_file({name: value.contiguous() for name, value in found.items()}, file, metadata={"format": "pt"})
    file = to / "config.json"
    values = json.loads(file.read_text()) | config
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    return to


def replaced(name, change):
    return lambda tensors: tensors.update({name: change(tensors[name])})


@pytest.mark.parametrize(
    "kind, change, said",
    [
        ("fp8", lambda t: t.pop(UP), "gate_up_proj: there are 7 of .*up_proj.weight, and 8 of its scales"),
        ("fp8", lambda t: t.pop(f"{UP}_scale_inv"), "there are 8 of .*up_proj.weight, and 7 of its scales"),
        ("fp8", lambda t: [t.pop(UP), t.pop(f"{UP}_scale_inv")], "gate_up_proj: "),
        ("fp8", replaced(UP, lambda w: w[:16]), "gate_up_proj: "),
        ("fp8", replaced(f"{UP}_scale_inv", lambda s: s[:1]), r"\(1, 4\) scales for weights of \(32, 64\)"),
        ("fp8", replaced(f"{UP}_scale_inv", lambda s: torch.cat([s, s])), r"\(4, 4\) scales for weights of \(32, 64\)"),
        ("fp8", replaced(f"{UP}_scale_inv", lambda s: s.flatten()[0]), r"\(\) scales for weights of \(32, 64\)"),
        ("fp8", replaced(f"{UP}_scale_inv", lambda s: s.int()), "scales are torch.int32"),
        ("fp8", replaced(UP, lambda w: w.view(torch.uint8)), "weights with scales are .*uint8"),
        ("mxfp4", lambda t: t.pop(f"{GATE_UP}_blocks"), "gate_up_proj: .*_scales.*, and no weights"),
        ("mxfp4", lambda t: t.pop(f"{GATE_UP}_scales"), "gate_up_proj_blocks has no scales"),
        ("fp8", lambda t: [t.pop(name) for name in list(t) if name.endswith("up_proj.weight_scale_inv")], "no scales"),
        ("fp8", lambda t: t.pop("model.layers.0.self_attn.q_proj.weight_scale_inv"), "q_proj.* no scales"),
        ("mxfp4", replaced(f"{GATE_UP}_blocks", lambda b: b[:4]), "gate_up_proj: "),
        ("mxfp4", replaced(f"{GATE_UP}_blocks", lambda b: b[..., :8]), "gate_up_proj: "),
        ("mxfp4", replaced(f"{GATE_UP}_scales", lambda s: s[..., :1]), "gate_up_proj: .*scales"),
        ("mxfp4", replaced(f"{GATE_UP}_scales", lambda s: s.float()), "gate_up_proj: .*float32"),
        ("dense", lambda t: t.pop(UP), "gate_up_proj: |CONVERSION"),
        ("dense", replaced(UP, lambda w: w[:16]), "gate_up_proj: .*expert 3|CONVERSION"),
        ("dense", lambda t: t.pop("model.norm.weight"), "has no model.norm.weight"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("how", ["as it is", "another way"])
def test_what_does_not_fit_is_named(written, tmp_path, kind, change, said, how):
    if how == "another way" and kind == "dense":
        how = "quantize"
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install hotlora[quantize]")
    folder = changed(written[kind], tmp_path / "broken", change)
    options = {"another way": {"dequantize": True}, "quantize": {"quantization_config": ExpertsQuantization(4)}}
    with pytest.raises(ModelError, match=f"broken.*({said})"):
        load_model(folder, device="cpu", **options.get(how, {}))


def test_one_error_and_no_table_of_all(written, tmp_path, caplog):
    """transformers logs them with their traces."""
    caplog.set_level("WARNING", logger="transformers.modeling_utils")
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        with pytest.raises(ModelError, match=r"gate_up_proj"):
            load_model(changed(written["fp8"], tmp_path / "broken", lambda t: t.pop(UP)), device="cpu")
        assert "REPORT" not in caplog.text
        with pytest.raises(ModelError, match=r"norm"):  # which names no more than the first
            load_model(changed(written["fp8"], tmp_path / "other", lambda t: t.pop("model.norm.weight")), device="cpu")
        assert "REPORT" in caplog.text
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_a_config_that_does_not_tell_of_its_quantization(written, tmp_path, kind):
    folder = changed(written[kind], tmp_path / "broken", quantization_config=None)
    with pytest.raises(ModelError, match="quantization_config"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize(
    "method", ["awq", "gptq", "compressed-tensors", "hqq", "aqlm", "fbgemm_fp8", "auto-round", "modelopt", "new", None]
)
def test_formats_that_are_not_read_are_told_before_loading(written, tmp_path, method):
    """transformers ignores those that it does not know, and reads codes as weights."""
    stored = {"bits": 4, "group_size": 128} | ({} if method is None else {"quant_method": method})
    folder = changed(written["dense"], tmp_path / "other", quantization_config=stored)
    said = f"other.*{method or 'quant_method'}.*MXFP4"
    with pytest.raises(ModelError, match=said):
        check_run(resolve(model=str(folder), data="rows.jsonl"))
    with pytest.raises(ModelError, match=said):
        load_model(folder, device="cpu")


@pytest.mark.parametrize(
    "options, said",
    [
        ({"weight_block_size": 16}, "weight_block_size"),
        ({"weight_block_size": [0, 16]}, "weight_block_size"),
        ({"fmt": "e5m2"}, "e5m2"),
    ],
)
def test_block_fp8_of_another_kind(written, tmp_path, options, said):
    stored = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16], **options}
    folder = changed(written["fp8"], tmp_path / "other", quantization_config=stored)
    with pytest.raises(ModelError, match=f"other: .*{said}"):
        check_run(resolve(model=str(folder), data="rows.jsonl"))


def test_a_checkpoint_in_bitsandbytes_bits_takes_no_others(written, tmp_path):
    """Its linear layers are in 4 bits; its experts are not, and cannot be quantized beside it."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install hotlora[quantize]")
    theirs = BitsAndBytesConfig(load_in_4bit=True)
    AutoModelForCausalLM.from_pretrained(written["dense"], quantization_config=theirs).save_pretrained(tmp_path / "bnb")
    byte_tokenizer().save_pretrained(tmp_path / "bnb")
    check_run(resolve(model=str(tmp_path / "bnb"), data="rows.jsonl"))
    for options in ({"quantize": 4}, {"quantize_linear": 8}, {"offload": "all"}):
        with pytest.raises(ModelError, match=r"bnb: .*bitsandbytes.*--quantize 4 --quantize-linear 4"):
            check_run(resolve(model=str(tmp_path / "bnb"), data="rows.jsonl", **options))
    with pytest.raises(ModelError, match=r"bnb: .*bitsandbytes"):
        load_model(tmp_path / "bnb", device="cpu", quantization_config=ExpertsQuantization(4))
