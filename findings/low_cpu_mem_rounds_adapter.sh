#!/bin/sh
# peft 0.21.2 (transformers 5.23.0, torch 2.13.0)
#
# Behaviour: PeftModel.from_pretrained(..., low_cpu_mem_usage=True) on a bfloat16 base rounds a float32 adapter to
# bfloat16 and then returns the rounded values as float32, the dtype that they have without the option. Nothing in the
# model's dtypes shows that precision was lost.
#
# A good engineer would guess: the option changes how memory is used while loading, not the values; a tensor that was
# float32 in the file and is float32 in the model is the same.
#
# Output seen:
#   low_cpu_mem_usage=False: {'torch.float32'} largest difference 0.0e+00 rounded to bfloat16: False
#   low_cpu_mem_usage=True: {'torch.float32'} largest difference 7.6e-03 rounded to bfloat16: True
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
from peft.utils import get_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2,
)  # fmt: skip
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained("base")


def base():
    return LlamaForCausalLM.from_pretrained("base", dtype=torch.bfloat16)


trained = get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj"]))
with torch.no_grad():
    for name, value in trained.named_parameters():
        if "lora_" in name:
            value.normal_()  # as training leaves them: values that bfloat16 cannot hold
trained.save_pretrained("adapter")
saved = get_peft_model_state_dict(trained)
found = {}
for low in (False, True):
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(base(), "adapter", low_cpu_mem_usage=low))
    error = max((loaded[name] - saved[name]).abs().max().item() for name in saved)
    rounded = all(torch.equal(loaded[name], saved[name].bfloat16().float()) for name in saved)
    found[low] = error, rounded, {str(value.dtype) for value in loaded.values()}
    print(f"low_cpu_mem_usage={low}: {found[low][2]} largest difference {error:.1e} rounded to bfloat16: {rounded}")
assert {str(value.dtype) for value in saved.values()} == {"torch.float32"}
assert found[False] == (0.0, False, {"torch.float32"})
assert found[True][0] > 0 and found[True][1:] == (True, {"torch.float32"})
PY
"$dir/venv/bin/python" observe.py
