#!/bin/sh
# safetensors 0.8.0
#
# Behaviour: the same tensors with the same metadata, of several keys, are written with the metadata's keys in another
# order each time, within one process too. The content is equal, the files are not: their SHA-256 differ. With one key,
# or none, the bytes are the same each time, and the tensors themselves always stand in one order.
#
# A good engineer would guess: a format made to be simple and safe writes the same bytes for the same input, so that a
# file's SHA-256 tells whether its content has changed. (hotlora took it so, for the mask that a run is continued with.)
#
# Output seen:
#   four keys of metadata: several hashes of 40 files
#   one key: 1
#   no metadata, 20 tensors: 1
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
cd "$dir"
cat > observe.py <<'PY'
import hashlib

import numpy as np
from safetensors.numpy import load, save


def hashes(tensors, metadata):
    files = [save(tensors, metadata) for _ in range(40)]
    assert all(np.array_equal(load(file)[name], tensors[name]) for file in files for name in tensors)
    return len({hashlib.sha256(file).hexdigest() for file in files})


one = {"weight": np.zeros(2, np.float32)}
many = {f"weight.{i}": np.full(2, i, np.float32) for i in range(20)}
four = hashes(one, {"format": "pt", "version": "1", "step": "3", "note": "x"})
print("four keys of metadata:", "several hashes of 40 files" if four > 1 else four)
print("one key:", hashes(one, {"format": "pt"}))
print("no metadata, 20 tensors:", hashes(many, None))
assert four > 1
assert hashes(one, {"format": "pt"}) == hashes(many, None) == 1
PY
"$dir/venv/bin/python" observe.py
