#!/bin/sh
# transformers 5.23.0 (torch 2.13.0)
#
# Behaviour: a checkpoint whose config.json names a quantization that this version does not know is loaded all the same. A
# warning says that the quantization is skipped; weights that are stored under the method's own names count as missing and are
# drawn at random. from_pretrained returns, with exit code 0, and with no field by which a program could tell.
#
# A good engineer would guess: an error. The file says that it cannot be read without that method, and an error is what a known
# method gives whose package is not installed.
#
# Output seen:
#   from_pretrained: returned a LlamaForCausalLM
#   up_proj equals what the file stores: False, correlation 0.0
#   with a known method that is not installed: ImportError
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$dir"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error
cat > observe.py <<'PY'
import json

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


def named(method):
    with open("model/config.json") as file:
        config = json.load(file)
    config["quantization_config"] = {"quant_method": method, "bits": 8}
    with open("model/config.json", "w") as file:
        json.dump(config, file)


torch.manual_seed(0)
shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained("model")
tensors = load_file("model/model.safetensors")
weight = tensors.pop("model.layers.0.mlp.up_proj.weight")
scales = weight.abs().amax(1, keepdim=True) / 127
tensors["model.layers.0.mlp.up_proj.qweight"] = (weight / scales).round().to(torch.int8)
tensors["model.layers.0.mlp.up_proj.scales"] = scales
save_file(tensors, "model/model.safetensors", {"format": "pt"})

named("a-method-of-next-year")
model = AutoModelForCausalLM.from_pretrained("model")
found = model.model.layers[0].mlp.up_proj.weight.detach()
correlation = torch.corrcoef(torch.stack([found.flatten(), weight.flatten()]))[0, 1].item()
print(f"from_pretrained: returned a {type(model).__name__}")
same = torch.allclose(found, weight, atol=scales.max().item())
print(f"up_proj equals what the file stores: {same}, correlation {abs(round(correlation, 1))}")
named("eetq")
try:
    AutoModelForCausalLM.from_pretrained("model")
    known = "returned"
except Exception as error:
    known = type(error).__name__
print(f"with a known method that is not installed: {known}")
assert not same and abs(correlation) < 0.1, "an unknown quantization is no longer skipped"
assert known != "returned", "neither is a known one"
PY
"$dir/venv/bin/python" observe.py
