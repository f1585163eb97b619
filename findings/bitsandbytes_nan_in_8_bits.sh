#!/bin/sh
# bitsandbytes 0.50.2, torch 2.13.0 (a CPU)
#
# Behaviour: a weight that is no number comes back from 8 bits as a finite number near the largest of its block, and all of its block
# is finite; from 4 bits (NF4) it comes back as what it was. A checkpoint that is broken this way computes without a sign of it.
#
# A good engineer would guess: NaN stays NaN, or spoils its block, in both.
#
# Output seen:
#   8 bits: -0.993, all finite: True
#   4 bits: nan, all finite: False
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 bitsandbytes==0.50.2
cat > "$dir/observe.py" <<'PY'
import math

import bitsandbytes.functional as bnb
import torch

weights = torch.linspace(-1, 1, 64)
weights[9] = float("nan")
eight = bnb.dequantize_blockwise(*bnb.quantize_blockwise(weights, blocksize=64))
four = bnb.dequantize_4bit(*bnb.quantize_4bit(weights, blocksize=64, quant_type="nf4")).flatten()
for bits, found in ((8, eight), (4, four)):
    print(f"{bits} bits: {found[9]:.3f}, all finite: {bool(found.isfinite().all())}")
assert eight.isfinite().all(), "8 bits keep it now"
assert math.isnan(four[9]), "4 bits hide it, too, now"
PY
"$dir/venv/bin/python" "$dir/observe.py"
