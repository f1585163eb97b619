#!/bin/sh
# transformers 5.23.0, torch 2.13.0
#
# Behaviour: under gradient_checkpointing_enable() each decoder layer is computed a second time in the backward pass, but the
# hooks that were registered on the decoder layer run in the first computation alone; those of its attention and MLP run in
# both. A hook on a layer that changes something for the time of the layer (a context, a patched function) is therefore in
# force forward and not in the recomputation.
#
# A good engineer would guess: module hooks run whenever the module is computed, so twice, as those of the inner modules do.
#
# Output seen:
#   forwards of a layer's MLP: 2, calls of the MLP's hook: 2, calls of the layer's hook: 1
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check transformers==5.23.0 torch==2.13.0
cd "$dir"
cat > observe.py <<'PY'
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=1, **sizes)).train()
model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
layer = model.model.layers[0]
calls = {"layer": 0, "mlp": 0, "computed": 0}


def count(name):
    def hook(module, inputs):
        calls[name] += 1

    return hook


layer.register_forward_pre_hook(count("layer"))
layer.mlp.register_forward_pre_hook(count("mlp"))
plain = layer.mlp.forward


def forward(hidden):
    calls["computed"] += 1
    return plain(hidden)


layer.mlp.forward = forward
ids = torch.arange(1, 9)[None]
model(input_ids=ids, labels=ids).loss.backward()
print(calls["computed"], calls["mlp"], calls["layer"])
PY
set -- $(HF_HOME="$dir/home" "$dir/venv/bin/python" observe.py)
echo "forwards of a layer's MLP: $1, calls of the MLP's hook: $2, calls of the layer's hook: $3"
test "$1 $2 $3" = "2 2 1"
