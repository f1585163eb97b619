#!/bin/sh
# torch 2.10.0
#
# Behaviour: under autocast a weight is cast once and the cast is kept until the outermost autocast ends, even one that was
# made under no_grad, which has no gradient. A forward that follows in the same autocast takes it, and its output needs no
# gradient at all. So a probe under no_grad, before the forward of a step, takes the step's gradients. 2.13.0 makes it anew.
#
# A good engineer would guess: what ran under no_grad says nothing of what runs after it.
#
# Output seen:
#   alone: the output needs a gradient: True
#   after a forward under no_grad: the output needs a gradient: False
#   with the cache cleared between: the output needs a gradient: True
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.10.0 numpy
cd "$dir"
cat > observe.py <<'PY'
import torch

rows = torch.ones(2, 4)


def needs_gradient(*before):
    layer = torch.nn.Linear(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for do in before:
            do(layer)
        return layer(rows).requires_grad


@torch.no_grad()
def probe(layer):
    layer(rows)


def clear(layer):
    torch.clear_autocast_cache()


seen = {
    "alone": needs_gradient(),
    "after a forward under no_grad": needs_gradient(probe),
    "with the cache cleared between": needs_gradient(probe, clear),
}
for when, found in seen.items():
    print(f"{when}: the output needs a gradient: {found}")
raise SystemExit(0 if list(seen.values()) == [True, False, True] else 1)
PY
"$dir/venv/bin/python" observe.py
