"""Tiny checkpoints in the formats that people download: MXFP4 as gpt-oss has it, block FP8 as DeepSeek-V3 has it."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

GPT_OSS: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 2,
    "max_position_embeddings": 512, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 3,
    "first_k_dense_replace": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 2, "kv_lora_rank": 32,
    "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "initializer_range": 0.2,
    "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip


def made(family: str, **overrides: Any) -> Any:
    """A tiny model in bfloat16."""
    sizes = {"gpt_oss": GPT_OSS, "deepseek_v3": DEEPSEEK}.get(family)
    if sizes is None:
        width = {"intermediate_size" if family == "mixtral" else "moe_intermediate_size": 32}
        sizes = {"vocab_size": 259, "max_position_embeddings": 512, "hidden_size": 64, **width}
        return tiny_model(family, **{**sizes, **overrides}).to(torch.bfloat16)
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**sizes, **overrides})
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def write_mxfp4(folder: Path, **overrides: Any) -> Path:
    """gpt_oss, whose experts are random bytes: `[E, rows, columns / 32, 16]` blocks, and exponents."""
    made("gpt_oss", **overrides).save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if not re.search(r"experts\.(gate_up|down)_proj$", name):
            tensors[name] = value
            continue
        experts, columns, rows = value.shape
        blocks = torch.randint(256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(118, 125, blocks.shape[:3], dtype=torch.uint8, generator=generator)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    _write(folder, tensors, {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"],
    })  # fmt: skip
    return folder


def write_fp8(folder: Path, family: str = "qwen3_moe", block: tuple[int, int] = (16, 16), **overrides: Any) -> Path:
    """All linear layers but the router and the head in FP8, expert by expert, with a float a block."""
    made(family, **overrides).save_pretrained(folder)
    tensors: dict[str, Tensor] = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if not re.search(r"layers\..*(_proj(_with_mqa)?|experts\.\d+\.w\d)\.weight$", name):
            tensors[name] = value
            continue
        quantized, scales = in_blocks(value, block)
        tensors |= {name: quantized, f"{name}_scale_inv": scales}
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": list(block)}
    _write(folder, tensors, config)
    return folder


def write_large(folder: Path, kind: str) -> Path:
    """Some 200 MB of a model in MXFP4, FP8 or bfloat16, all of zeros: what it takes to load, and no more."""
    family = "gpt_oss" if kind == "mxfp4" else "qwen3_moe"
    sizes = {"num_hidden_layers": 8, "hidden_size": 512, "head_dim": 64}
    if family == "gpt_oss":
        config = AutoConfig.for_model(family, **{**GPT_OSS, **sizes, "num_local_experts": 64, "intermediate_size": 512})
    else:
        config = tiny_config(family, **sizes, num_experts=64, moe_intermediate_size=256)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if value.ndim < 3:
            tensors[name] = torch.zeros(value.shape, dtype=torch.bfloat16)
        elif kind == "mxfp4":
            experts, columns, rows = value.shape
            tensors[f"{name}_blocks"] = torch.zeros(experts, rows, columns // 32, 16, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.zeros(experts, rows, columns // 32, dtype=torch.uint8)
        else:
            at, _, attribute = name.rpartition(".")
            rows = value.shape[1] // (2 if attribute == "gate_up_proj" else 1)
            for own in ("gate_proj", "up_proj") if attribute == "gate_up_proj" else ("down_proj",):
                for expert in range(len(value)):
                    full = f"{at}.{expert}.{own}.weight"
                    zeros = torch.zeros(rows, value.shape[2], dtype=torch.uint8)
                    tensors[full] = zeros.view(torch.float8_e4m3fn) if kind == "fp8" else zeros.bfloat16()
                    if kind == "fp8":
                        tensors[f"{full}_scale_inv"] = torch.zeros(rows // 128, value.shape[2] // 128)
    folder.mkdir(exist_ok=True)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    quantization = {"quant_method": kind, **({"weight_block_size": [128, 128]} if kind == "fp8" else {})}
    _write(folder, tensors, None if kind == "bf16" else quantization)
    return folder


def in_blocks(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn and `weight_scale_inv`: the last blocks end with the weight."""
    rows, columns = (-(-size // step) for size, step in zip(weight.shape, block, strict=True))
    scales, quantized = torch.empty(rows, columns), torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            at = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = weight[at].float().abs().max() / 448
            quantized[at] = (weight[at].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return quantized, scales


def by_hand(quantized: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """float32, block by block."""
    dense = quantized.float()
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            dense[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]] *= scales[i, j]
    return dense


def _write(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any] | None) -> None:
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    file = folder / "config.json"
    if quantization is not None:
        file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantization}))
