"""Formats gguf and mlx: read back by the engines' rules they give the adapted model; families and packages that are not
there. That the engines themselves do so: `hotlora verify`, by scripts/engines.py."""

import importlib.util
import json
import sys

import pytest
import torch
from readers import logits, read_gguf, read_mlx
from safetensors.torch import load_file
from test_export import adapted, assert_same, base_of, zoo_model

from hotlora.adapter.formats.export import export_adapter
from hotlora.base.errors import FileError, HotLoraError
from hotlora.engines.exported import read_export

FAMILIES = ("olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "granitemoe", "deepseek_v3")
needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the package gguf")
EXPORTS = [("mlx", read_mlx), pytest.param("gguf", read_gguf, marks=needs_gguf)]


def choices(family, format):
    """What an export of deepseek_v3 needs."""
    if family != "deepseek_v3":
        return {}
    return {"merge_attention": True, **({"merge_router": True} if format == "mlx" else {})}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("format", "read"), EXPORTS)
def test_read_by_the_engines_rules_it_is_the_adapted_model(family, format, read, tmp_path):
    model, base, out = adapted(family), zoo_model(family), tmp_path / "out"
    merged = choices(family, format)
    assert export_adapter(model, out, format=format, **merged) == out
    found = read(out / "adapter", base_of(out / "base", family)) if merged else read(out, base)
    assert_same(logits(found), logits(model), other=logits(base))
    assert read_export(out).kind == format


@pytest.mark.parametrize(("format", "read"), EXPORTS)
def test_other_scalings_and_ranks_become_one(format, read, tmp_path):
    model = adapted("qwen2_moe", use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 9})
    export_adapter(model, tmp_path / "out", format=format)
    assert_same(logits(read(tmp_path / "out", zoo_model("qwen2_moe"))), logits(model))


def test_mlxs_files(tmp_path):
    export_adapter(adapted("olmoe", layers=[0]), tmp_path / "out", format="mlx")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json", "adapters.safetensors",
    ]  # fmt: skip
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapters.safetensors")
    assert config["fine_tune_type"] == "lora" and config["num_layers"] == 3
    parameters = config["lora_parameters"]
    assert (parameters["rank"], parameters["scale"], parameters["dropout"]) == (4, 1.5, 0.0)
    assert set(parameters["keys"]) == {name.rpartition(".")[0] for name in tensors}
    experts = [key for key in parameters["keys"] if ".switch_mlp." in key]
    assert experts == [f"model.layers.0.mlp.switch_mlp.{name}_proj" for name in ("down", "gate", "up")]
    A, B = (tensors[f"model.layers.0.mlp.switch_mlp.up_proj.lora_{side}"] for side in "ab")
    assert A.shape == (8, 4, 32) and B.shape == (8, 16, 4)
    assert [bool(A[e].any()) for e in range(8)] == [e in (1, 3, 6) for e in range(8)]
    assert tensors["model.layers.1.mlp.gate.lora_a"].shape == (32, 4)


def test_a_merged_checkpoint_has_the_names_that_mlx_lm_reads(tmp_path):
    export_adapter(adapted("qwen3_moe"), tmp_path / "out", format="merged")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] and config["num_experts"] == 8
    assert_same(logits(base_of(tmp_path / "out", "qwen3_moe")), logits(adapted("qwen3_moe")))


@needs_gguf
def test_ggufs_file(tmp_path):
    import gguf

    export_adapter(adapted("mixtral", layers=[0]), tmp_path / "out", format="gguf")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["adapter.gguf"]
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields == {
        "general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 6.0,
    }  # fmt: skip
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    A, B = (tensors[f"blk.0.ffn_up_exps.weight.lora_{side}"].data for side in "ab")
    assert A.shape == (8, 4, 32) and B.shape == (8, 16, 4)
    assert [bool(A[e].any()) for e in range(8)] == [e in (1, 3, 6) for e in range(8)]
    assert "blk.1.ffn_up_exps.weight.lora_a" not in tensors and "blk.1.ffn_gate_inp.weight.lora_a" in tensors


@pytest.mark.parametrize("format", ["mlx", pytest.param("gguf", marks=needs_gguf)])
def test_a_family_that_is_not_known_is_refused(format, tmp_path):
    with pytest.raises(HotLoraError, match=rf"format '{format}' is not known of nemotron_h models, but of deepseek_v3"):
        export_adapter(adapted("nemotron_h"), tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


@needs_gguf
def test_what_llama_cpp_would_leave_out_of_mla_is_named(tmp_path):
    told = r"attention's kv_a_proj_with_mqa and kv_b_proj and q_a_proj and q_b_proj: the engine would read them"
    with pytest.raises(HotLoraError, match=told):
        export_adapter(adapted("deepseek_v3"), tmp_path / "out", format="gguf")
    with pytest.raises(HotLoraError, match="holds all of this adapter's attention"):
        export_adapter(adapted("olmoe"), tmp_path / "out", format="gguf", merge_attention=True)


def test_mlx_needs_a_base_for_routers_that_are_no_linears(tmp_path):
    with pytest.raises(HotLoraError, match="format 'mlx' cannot hold the adapter's router updates"):
        export_adapter(adapted("deepseek_v3"), tmp_path / "out", format="mlx", merge_attention=True)
    with pytest.raises(HotLoraError, match="format 'mlx' holds the router: leave merge_router out"):
        export_adapter(adapted("olmoe"), tmp_path / "out", format="mlx", merge_router=True)


def test_without_the_package_gguf_it_is_told_before_a_model_is_loaded(monkeypatch, tmp_path):
    from hotlora.adapter.formats.export import check_export

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(HotLoraError, match=r"needs the package gguf .*: pip install hotlora\[gguf\]"):
        check_export("gguf", tmp_path / "out")


@pytest.mark.parametrize("format", ["mlx", pytest.param("gguf", marks=needs_gguf)])
def test_half_an_export_is_told(format, tmp_path):
    out = export_adapter(adapted("olmoe"), tmp_path / "out", format=format)
    weights = out / ("adapters.safetensors" if format == "mlx" else "adapter.gguf")
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileError, match="is cut short or no"):
        read_export(out)
    weights.write_bytes(b"none" + whole[4:])
    with pytest.raises(FileError, match="export again"):
        read_export(out)


@needs_gguf
def test_a_bf16_adapter_is_written_as_float32(tmp_path):
    import gguf

    model = adapted("olmoe").to(torch.bfloat16)
    export_adapter(model, tmp_path / "out", format="gguf")
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32"}
