#!/bin/sh
# transformers 5.23.0 (torch 2.13.0)
#
# Behaviour: FineGrainedFP8Config(dequantize=True), which is also what a machine without an FP8 GPU gets, takes a block's
# size from the number of scales and not from weight_block_size. Of 192 rows in blocks of 128 (two scales: 128 rows and
# 64) it makes two blocks of 96: rows 96 to 127 get the other block's scale, without a warning. 576 rows in blocks of 128
# (five scales), which DeepSeek-V3's kv_a_proj_with_mqa has, are refused.
#
# A good engineer would guess: weight_block_size is in config.json, the last block is what is left of the rows, and so
# the dequantized weights are each code times its block's scale; DeepSeek-V3's own checkpoint can be dequantized.
#
# Output seen:
#   192 rows: rows 96 to 127 are wrong, relative error 1.00
#   576 rows: ValueError: Weight shape (576, 128) not divisible by scale grid (5, 1).
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$dir"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error
cat > observe.py <<'PY'
import torch
from transformers import FineGrainedFP8Config
from transformers.quantizers import AutoHfQuantizer

config = FineGrainedFP8Config(weight_block_size=(128, 128), dequantize=True)
operation = AutoHfQuantizer.from_config(config, pre_quantized=True).get_load_operations()["dequantize"](None)


def made(rows):
    """(what transformers makes of `rows` x 128 ones whose blocks have scales 1, 2, ..., what they stand for)"""
    codes = torch.ones(rows, 128).to(torch.float8_e4m3fn)
    scales = torch.arange(1.0, -(-rows // 128) + 1).unsqueeze(1)
    expected = scales.repeat_interleave(128, 0)[:rows].expand(rows, 128)
    found = operation.convert({"weight": [codes], "weight_scale_inv": [scales]})
    return found["weight"], expected


found, expected = made(192)
wrong = (found != expected).any(1).nonzero().flatten().tolist()
error = ((found - expected)[wrong].norm() / expected[wrong].norm()).item()
print(f"192 rows: rows {wrong[0]} to {wrong[-1]} are wrong, relative error {error:.2f}")
seen = [wrong == list(range(96, 128))]
try:
    made(576)
    seen.append(False)
except ValueError as refused:
    print(f"576 rows: ValueError: {refused}")
    seen.append(True)
raise SystemExit(0 if all(seen) else 1)
PY
"$dir/venv/bin/python" observe.py
