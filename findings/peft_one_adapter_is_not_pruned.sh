#!/bin/sh
# peft 0.21.2 (torch 2.13.0, transformers 5.23.0)
#
# Behaviour: add_weighted_adapter of one adapter does not do what its combination_type says: the type is replaced by
# "linear", without a warning, so "magnitude_prune", "ties" and "dare_linear" with density=0.2 keep every value. Of two
# adapters the same call prunes each to a fifth.
#
# A good engineer would guess: density=0.2 keeps a fifth of the values, of one adapter as of each of several; so that
# pruning one adapter by itself, to see what pruning alone costs, shows that cost. (It shows none.)
#
# Output seen:
#   magnitude_prune: share of A's values that are not 0: of one adapter 1.00, of two 0.35
#   ties: share of A's values that are not 0: of one adapter 1.00, of two 0.35
#   dare_linear: share of A's values that are not 0: of one adapter 1.00, of two 0.33
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$dir"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error
cat > observe.py <<'PY'
import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

warnings.filterwarnings("ignore")


def kept(adapters, how):
    """Share of the combined A's values that are not 0."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(64, 64, bias=False)), config, "a")
    model.add_adapter("b", config)
    model.add_weighted_adapter(adapters, [1.0] * len(adapters), "made", how, density=0.2)
    weight = model.base_model.model[0].lora_A["made"].weight
    return (weight != 0).float().mean().item()


seen = []
for how in ("magnitude_prune", "ties", "dare_linear"):
    one, two = kept(["a"], how), kept(["a", "b"], how)
    print(f"{how}: share of A's values that are not 0: of one adapter {one:.2f}, of two {two:.2f}")
    seen.append(one == 1.0 and 0.2 < two < 0.45)
raise SystemExit(0 if all(seen) else 1)
PY
"$dir/venv/bin/python" observe.py
