#!/bin/sh
# peft 0.21.2 (torch 2.13.0, transformers 5.23.0)
#
# Behaviour: adapters that were trained with transformers 4 have a LoRA pair for each expert's gate and up. transformers 5
# holds both in one tensor, and PEFT puts the two pairs together on loading, at twice the rank and twice lora_alpha. With
# use_rslora the scaling is lora_alpha over the root of the rank, so gate and up are applied at 2 / sqrt(2) = 1.41 times
# the scale that they were trained at. Down, attention and everything without use_rslora are right.
#
# A good engineer would guess: an adapter with alpha / r = 2 and the same one with use_rslora and alpha / sqrt(r) = 2 are
# the same adapter.
#
# Output seen:
#   gate and up by alpha / r: scaling 2.0; by alpha / sqrt(r): scaling 2.828
#   down by alpha / r: scaling 2.0; by alpha / sqrt(r): scaling 2.0
#   both give the same logits: False
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 \
    peft==0.21.2
cd "$dir"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error
cat > observe.py <<'PY'
import json
import os

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import OlmoeConfig, OlmoeForCausalLM

R, D, F = 4, 16, 8


def new_model():
    torch.manual_seed(0)
    return OlmoeForCausalLM(
        OlmoeConfig(
            hidden_size=D, intermediate_size=F, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
            num_experts=4, num_experts_per_tok=2, vocab_size=32, pad_token_id=0,
        )
    ).eval()


def load(folder, **scaling):
    """The adapter as it was saved beside transformers 4, loaded by PEFT."""
    os.makedirs(folder, exist_ok=True)
    torch.manual_seed(1)
    tensors = {}
    for expert in range(4):
        for name, (out, width) in {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}.items():
            path = f"base_model.model.model.layers.0.mlp.experts.{expert}.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(R, width)
            tensors[f"{path}.lora_B.weight"] = torch.randn(out, R)
    save_file(tensors, f"{folder}/adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": R, "target_modules": ["gate_proj", "up_proj", "down_proj"], **scaling}
    with open(f"{folder}/adapter_config.json", "w") as file:
        json.dump({"task_type": "CAUSAL_LM", "base_model_name_or_path": None, **config}, file)
    return PeftModel.from_pretrained(new_model(), folder)


def scalings(model):
    return {
        module.parameter_name: round(module.scaling["default"], 3)
        for module in model.modules() if hasattr(module, "parameter_name") and getattr(module, "scaling", None)
    }


with torch.no_grad():
    ids = torch.arange(12)[None]
    plain, by_root = load("plain", lora_alpha=8), load("root", lora_alpha=4, use_rslora=True)
    same = torch.allclose(plain(ids).logits, by_root(ids).logits, atol=1e-4)
    applied = not torch.allclose(plain(ids).logits, new_model()(ids).logits, atol=1e-2)
a, b = scalings(plain), scalings(by_root)
for words, name in (("gate and up", "gate_up_proj"), ("down", "down_proj")):
    print(f"{words} by alpha / r: scaling {a[name]}; by alpha / sqrt(r): scaling {b[name]}")
print(f"both give the same logits: {same}")
raise SystemExit(not (applied and not same and b["gate_up_proj"] == 2.828 and b["down_proj"] == a["down_proj"] == 2.0))
PY
"$dir/venv/bin/python" observe.py
