#!/bin/sh
# torch 2.13.0 (CPU build)
#
# Behaviour: on a CPU where oneDNN does without bfloat16 instructions (here it is told to keep to AVX2), the product
# of a Linear's forward, x @ W.T, is many times faster in bfloat16 than that of its backward, g @ W, of the same size.
# In float32 the two take about the same time. So a timing of forward passes tells nothing of what training will take.
# Times vary; the script asks for a ratio above 3 in bfloat16 and below 2.5 in float32.
#
# A good engineer would guess: bfloat16 may be slow on such a CPU, but two products with the same number of operations
# take about the same time.
#
# Output seen:
#   torch.float32: x @ W.T 1.5 ms, g @ W 1.7 ms, ratio 1.1
#   torch.bfloat16: x @ W.T 11.3 ms, g @ W 103.9 ms, ratio 9.2
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$dir"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error ONEDNN_MAX_CPU_ISA=AVX2
cat > observe.py <<'PY'
import time

import torch

torch.set_num_threads(1)


def seconds(function, times=3):
    function()
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        function()
        found.append(time.perf_counter() - begin)
    return min(found)


ratios = {}
for dtype in (torch.float32, torch.bfloat16):
    torch.manual_seed(0)
    x, w = torch.randn(256, 512).to(dtype), torch.randn(512, 512).to(dtype)
    forward, backward = seconds(lambda: x @ w.T), seconds(lambda: x @ w)
    ratios[dtype] = backward / forward
    print(f"{dtype}: x @ W.T {1e3 * forward:.1f} ms, g @ W {1e3 * backward:.1f} ms, ratio {ratios[dtype]:.1f}")
assert ratios[torch.bfloat16] > 3
assert ratios[torch.float32] < 2.5
PY
"$dir/venv/bin/python" observe.py
