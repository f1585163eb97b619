#!/bin/sh
# transformers 5.23.0, torch 2.13.0, mlx-lm 0.32.2, mlx 0.32.4 (its build for CPUs)
#
# Behaviour: transformers 5 saves a Llama's RoPE base inside `rope_parameters` and not as `rope_theta`. mlx-lm reads the latter alone,
# and where it is missing takes a default of its own (10000 for llama), without a word: a model with another base, such as Llama 3's
# 500000, computes other numbers after transformers has saved it once.
#
# A good engineer would guess: mlx-lm reads what transformers writes, or fails; fields that it does not know are at least told.
#
# Output seen:
#   base 10000: mlx-lm has 10000, logits differ by 0.00 of at most 6.61
#   base 500000: mlx-lm has 10000, logits differ by 6.15 of at most 5.34
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 \
    "mlx[cpu]==0.32.4" mlx-lm==0.32.2
cat > "$dir/observe.py" <<'PY'
import sys
from pathlib import Path

import mlx.core as mx
import torch
from mlx_lm.utils import load_model
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
apart = {}
for base in (10000.0, 500000.0):
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": base}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4, rope_parameters=rope)).eval()
    for parameter in model.parameters():  # larger, so that attention is not all alike
        parameter.data *= 4
    folder = Path(sys.argv[1]) / str(int(base))
    model.save_pretrained(folder)
    expected = model(torch.arange(48)[None]).logits[0, -1].tolist()
    loaded, config = load_model(folder)
    got = loaded(mx.arange(48)[None])[0, -1].tolist()
    apart[base] = max(abs(a - b) for a, b in zip(got, expected))
    most = max(map(abs, expected))
    print(f"base {base:.0f}: mlx-lm has {loaded.args.rope_theta}, logits differ by {apart[base]:.2f} of at most {most:.2f}")
    assert "rope_theta" not in config and config["rope_parameters"]["rope_theta"] == base, "saved otherwise now"
    assert loaded.args.rope_theta == 10000, "mlx-lm reads it now"
assert apart[10000.0] < 1e-3 and apart[500000.0] > 1, "the numbers agree now"
PY
"$dir/venv/bin/python" "$dir/observe.py" "$dir"
