#!/bin/sh
# peft 0.21.2, transformers 5.23.0, torch 2.13.0
#
# Behaviour: an adapter that is loaded without is_trainable is frozen, but on a bfloat16 base its factors on embeddings
# train: PEFT makes float32 parameters of them after it has frozen the adapter, in new nn.Parameters that need a
# gradient. Its factors on Linears, and all of them on a float32 base, stay frozen. An optimizer of
# all parameters that need a gradient, such as that of a second adapter, moves them too.
#
# A good engineer would guess: nothing of it trains, whatever the base's dtype.
#
# Output seen:
#   float32: trains nothing
#   bfloat16: trains lora_embedding_A, lora_embedding_B
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    peft==0.21.2 transformers==5.23.0 torch==2.13.0 numpy
cd "$dir"
export HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=
cat > observe.py <<'PY'
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

warnings.simplefilter("ignore")


def base(dtype):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)).to(dtype)


config = LoraConfig(target_modules=["embed_tokens", "q_proj"])
get_peft_model(base(torch.bfloat16), config).save_pretrained("adapter", save_embedding_layers=False)
seen = {}
for dtype in (torch.float32, torch.bfloat16):
    model = PeftModel.from_pretrained(base(dtype), "adapter")
    adapter = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert len(adapter) == 4 and all(p.dtype == torch.float32 for p in adapter.values())
    seen[dtype] = [name.split(".")[-2] for name, p in adapter.items() if p.requires_grad]
    print(f"{str(dtype).removeprefix('torch.')}: trains {', '.join(seen[dtype]) or 'nothing'}")
expected = {torch.float32: [], torch.bfloat16: ["lora_embedding_A", "lora_embedding_B"]}
raise SystemExit(0 if seen == expected else 1)
PY
"$dir/venv/bin/python" observe.py
