#!/bin/sh
# transformers 5.23.0 with peft 0.21.2 (torch 2.13.0)
#
# Behaviour: model.load_adapter(path, hotswap=True) takes the new adapter's matrices and keeps the old adapter's
# scaling where the two differ in lora_alpha. The logits are those of no adapter on disk, and there is no warning.
# (PEFT's own hotswap_adapter, given the same two folders, takes the new scaling.)
#
# A good engineer would guess: after the swap the model computes what it computes with the new adapter loaded afresh,
# or the swap is refused.
#
# Output seen:
#   load_adapter(hotswap=True): scaling 1.0 of 8.0, logits off by 3.8701
#   peft's hotswap_adapter:     logits off by 0.0000
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
cd "$dir"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error
cat > observe.py <<'PY'
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, initializer_range=0.2,
)  # fmt: skip


def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


for name, alpha in (("first", 4), ("second", 32)):
    torch.manual_seed(alpha)
    lora = LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(base(), lora).save_pretrained(name)
ids = torch.arange(8)[None]


@torch.no_grad()
def logits(model):
    return model(ids).logits


fresh = base()
fresh.load_adapter("second")
swapped = base()
swapped.load_adapter("first", adapter_name="one")
swapped.load_adapter("second", adapter_name="one", hotswap=True)
by_peft = PeftModel.from_pretrained(base(), "first", adapter_name="one")
hotswap_adapter(by_peft, "second", adapter_name="one")
gap = (logits(swapped) - logits(fresh)).abs().max().item()
gap_by_peft = (logits(by_peft) - logits(fresh)).abs().max().item()
scale = swapped.model.layers[0].self_attn.q_proj.scaling["one"]
print(f"load_adapter(hotswap=True): scaling {scale} of 8.0, logits off by {gap:.4f}")
print(f"peft's hotswap_adapter:     logits off by {gap_by_peft:.4f}")
assert scale == 1.0
assert gap > 0.01
assert gap_by_peft < 1e-4
PY
"$dir/venv/bin/python" observe.py
