#!/bin/sh
# torch 2.13.0
#
# Behaviour: once TF32 is allowed by `torch.backends.fp32_precision = "tf32"`, the newer way, merely asking for it in the
# older one raises: torch.get_float32_matmul_precision() and torch.backends.cuda.matmul.allow_tf32 say that both ways
# were mixed, though nothing was set by the older. torch.backends.cudnn.allow_tf32, as old, answers then; set back to
# "ieee", where the two answer again, it is the one that raises. transformers' TrainingArguments(tf32=True) sets it in the newer way, so that it is other people's code
# that stops.
#
# A good engineer would guess: the older getters tell "high" and True, as they do after the older setters, and once it is
# set back what they told at first.
#
# Output seen:
#   at first: highest, False, True
#   tf32: RuntimeError, RuntimeError, True
#   ieee: highest, False, RuntimeError
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy
cd "$dir"
cat > observe.py <<'PY'
import torch


def asked():
    found = []
    for ask in (
        torch.get_float32_matmul_precision,
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: torch.backends.cudnn.allow_tf32,
    ):
        try:
            found.append(ask())
        except RuntimeError as error:
            found.append(type(error).__name__)
            assert "mix of the legacy and new APIs" in str(error)
    return found


seen = {"at first": asked()}
for precision in ("tf32", "ieee"):
    torch.backends.fp32_precision = precision
    seen[precision] = asked()
for when, found in seen.items():
    print(f"{when}: {', '.join(map(str, found))}")
expected = {
    "at first": ["highest", False, True],
    "tf32": ["RuntimeError", "RuntimeError", True],
    "ieee": ["highest", False, "RuntimeError"],
}
raise SystemExit(0 if seen == expected else 1)
PY
"$dir/venv/bin/python" observe.py
