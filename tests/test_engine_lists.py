"""What we hold of an engine (its names of modules, ranks that it takes, parts that it applies no adapter to) against
its own code, where the engine is installed. Nothing is run: that is `scripts/engines.py`."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from test_engine_formats import FAMILIES, choices
from test_export import adapted, zoo_model

from hotlora.adapter.formats import gguf as ours_gguf
from hotlora.adapter.formats import mlx as ours_mlx
from hotlora.adapter.formats import sglang as ours_sglang
from hotlora.adapter.formats import vllm as ours_vllm
from hotlora.adapter.formats.export import export_adapter
from hotlora.hf.moe_layers import moe_layers

PAGE = Path(__file__).parent.parent / "docs" / "export.md"


# MLX


@pytest.fixture(scope="module")
def mlx_model():
    """A family's model in mlx-lm, of the config in a folder."""
    pytest.importorskip("mlx_lm", reason="needs mlx-lm (pip install mlx-lm 'mlx[cpu]')")
    from mlx_lm.utils import _get_classes

    def made(folder):
        config = json.loads((folder / "config.json").read_text())
        config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])  # as published ones have
        model, args = _get_classes(config)
        return model(args.from_dict(config))

    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_for_mlx_has_its_place(mlx_model, family, tmp_path):
    """mlx-lm leaves out tensors that have none, without a word."""
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from safetensors.torch import load_file

    export_adapter(adapted(family), tmp_path / "merged", format="merged")
    out = export_adapter(adapted(family), tmp_path / "out", format="mlx", **choices(family, "mlx"))
    out = out / "adapter" if choices(family, "mlx") else out
    config = json.loads((out / "adapter_config.json").read_text())
    model = mlx_model(tmp_path / "merged")
    linear_to_lora_layers(model, config["num_layers"], config["lora_parameters"])
    there = {name: tuple(value.shape) for name, value in tree_flatten(model.parameters()) if ".lora_" in name}
    assert {name: tuple(tensor.shape) for name, tensor in load_file(out / "adapters.safetensors").items()} == there


@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_adapts_those_routers_that_are_linears_there(mlx_model, family, tmp_path):
    import mlx.nn

    export_adapter(adapted(family), tmp_path / "merged", format="merged")
    modules = dict(mlx_model(tmp_path / "merged").named_modules())
    routers = [m for name, m in modules.items() if re.search(r"\.(gate|router|router\.layer)$", name)]
    assert len(routers) >= len(moe_layers(zoo_model(family)))
    assert any(isinstance(module, mlx.nn.Linear) for module in routers) == ours_mlx.holds_router(family)
    for name in ours_mlx.NOT_APPLIED:  # taken apart when a model is loaded
        assert not any(path.endswith(name) for path in modules)


# GGUF


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_knows_each_familys_architecture_and_experts(family):
    gguf = pytest.importorskip("gguf", reason="needs the package gguf (pip install hotlora[gguf])")
    archs = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    tensors = gguf.MODEL_TENSORS[archs[ours_gguf._ARCHITECTURES[family]]]
    kinds = gguf.MODEL_TENSOR
    assert {kinds.FFN_GATE_EXP, kinds.FFN_UP_EXP, kinds.FFN_DOWN_EXP, kinds.FFN_GATE_INP} <= set(tensors)
    has_mla = "kv_lora_rank" in zoo_model(family).config.to_dict()
    assert (kinds.ATTN_KV_A_MQA in tensors) == has_mla
    assert bool(ours_gguf.not_applied(["model.layers.0.self_attn.kv_b_proj"])) or not has_mla


# vLLM


@pytest.fixture(scope="module")
def vllm_models() -> Path:
    """The folder of vLLM's models' code. Nothing of it is imported, which takes half a minute."""
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs vLLM (pip install vllm)")
    return Path(found.submodule_search_locations[0])


def test_the_ranks_are_vllms(vllm_models):
    source = (vllm_models / "config" / "lora.py").read_text()
    (ranks,) = re.findall(r"^MaxLoRARanks = Literal\[([\d, ]+)\]", source, re.M)
    assert {int(rank) for rank in ranks.split(",")} - {1} == set(ours_vllm._RANKS)


# Files of vLLM's models -> the families of docs/export.md whose experts call the router, past an adapter on it.
PAST_THE_ADAPTER = {
    "qwen3_moe": "Qwen3-MoE", "qwen3_next": "Qwen3-Next", "deepseek_v2": "DeepSeek V2 to V3.2",
    "exaone_moe": "EXAONE-MoE",
}  # fmt: skip
BY_THE_BLOCK = {"mixtral": "Mixtral", "olmoe": "OLMoE", "qwen2_moe": "Qwen2-MoE", "glm4_moe": "GLM-4-MoE"}


@pytest.mark.parametrize(("file", "named"), [*PAST_THE_ADAPTER.items(), *BY_THE_BLOCK.items()])
def test_whose_routers_vllm_adapts_is_as_the_page_says(vllm_models, file, named):
    source = (vllm_models / "model_executor" / "models" / f"{file}.py").read_text()
    assert ("gate=self.gate" in source) == (file in PAST_THE_ADAPTER)
    told = " ".join(PAGE.read_text(encoding="utf-8").split())
    applied, past = re.findall(r"applies it where (.*?), and leaves it unused where (.*?\))", told)[0]
    assert named in (past if file in PAST_THE_ADAPTER else applied)


def test_vllm_takes_kv_b_proj_apart_and_adapts_it_nowhere(vllm_models):
    """Its weight is read when the model is loaded, by the attention that its LoRA layers do not reach (vllm#48974)."""
    source = (vllm_models / "model_executor" / "layers" / "attention" / "mla_attention.py").read_text()
    assert ours_vllm.NOT_APPLIED == ("kv_b_proj",)
    after_loading = source.partition("def process_weights_after_loading")[2].partition("\n    def ")[0]
    assert "kv_b_proj" in after_loading
    assert not any("kv_b_proj" in file.read_text() for file in (vllm_models / "lora").rglob("*.py"))


# SGLang


@pytest.fixture(scope="module")
def sglang_lora() -> Path:
    """The folder of SGLang's LoRA, whose import wants a GPU's packages."""
    found = importlib.util.find_spec("sglang")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs SGLang (pip install sglang)")
    return Path(found.submodule_search_locations[0]) / "srt" / "lora"


def test_sglang_has_no_place_for_a_router(sglang_lora):
    sizes = (sglang_lora / "utils.py").read_text().partition("def get_default_hidden_dim")[2].partition("\ndef ")[0]
    assert '"down_proj' in sizes and '"gate"' not in sizes
    assert "raise NotImplementedError" in sizes


def test_sglang_knows_the_shared_form_by_gates_and_ups_A(sglang_lora):
    source = (sglang_lora / "lora_manager.py").read_text().partition("def _detect_shared_outer_loras")[2]
    source = source.partition("\n    def ")[0]
    assert (
        "is_shared = weight.shape[0] == 1" in source and '"gate_up_proj" not in name or "lora_A" not in name' in source
    )
    pool = (sglang_lora / "mem_pool.py").read_text()
    for side, module in (("A", "gate_up_proj_moe"), ("B", "down_proj_moe")):
        shape = pool.partition(f"def get_lora_{side}_shape")[2].partition("\n    def ")[0]
        assert re.search(rf'self\.experts_shared_outer_loras and module_name in \(\s*"{module}",', shape)


def test_sglang_multiplies_gpt_oss_by_interleaved_halves(sglang_lora):
    """Why its gate and up have one A: B's rows are put in turn, and A's are not."""
    source = (sglang_lora / "layers.py").read_text().partition("def _slice_moe_b_2d")[2].partition("\n\n\n")[0]
    assert ours_sglang._ONE_A == ("gpt_oss",)
    assert "torch.stack([gate_b, up_b], dim=1).reshape(-1, B.shape[-1])" in source
