#!/bin/sh
# bitsandbytes 0.50.2 (torch 2.13.0), on a CPU with AVX512-BF16
#
# Behaviour: a Linear4bit that was once called in eval mode stores its weights in another order for a faster product, and
# keeps them so when it is trained afterwards. That product has no backward: the gradient of everything below the layer is
# zero. torch alone says so, by a UserWarning about gemv_4bit. A layer that was never evaluated passes the gradient on.
#
# A good engineer would guess: evaluating a model before training it (a loss to compare with, a profile) changes nothing
# of the training.
#
# Output seen:
#   gradient below the layer: never evaluated 61.66, evaluated once 0.00
#   On another CPU: this CPU has no AVX512-BF16, where nothing is stored anew
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 bitsandbytes==0.50.2 numpy
cd "$dir"
export OMP_NUM_THREADS=1
cat > observe.py <<'PY'
import warnings

import bitsandbytes as bnb
import torch

warnings.filterwarnings("ignore")


def gradient_below(is_evaluated):
    torch.manual_seed(0)
    below = torch.nn.Linear(64, 64, bias=False)
    layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    x = torch.randn(4, 64)
    if is_evaluated:
        with torch.no_grad():
            layer.eval()(x)
    layer.train()(below(x)).square().sum().backward()
    return 0.0 if below.weight.grad is None else below.weight.grad.norm().item()


if not bnb.functional.has_avx512bf16():
    print("this CPU has no AVX512-BF16, where nothing is stored anew")
    raise SystemExit(0)
fresh, evaluated = gradient_below(False), gradient_below(True)
print(f"gradient below the layer: never evaluated {fresh:.2f}, evaluated once {evaluated:.2f}")
raise SystemExit(0 if fresh > 0 and evaluated == 0 else 1)
PY
"$dir/venv/bin/python" observe.py
