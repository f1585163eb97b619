#!/bin/sh
# trl 1.16.0 (transformers 5.23.0, torch 2.13.0)
#
# Behaviour: SFTTrainer writes its own auxiliary-loss setting into a mixture-of-experts model's config, and the
# checkpoint keeps it. By default output_router_logits goes from false to true, so the saved model's own `loss` (in an
# evaluation later, by whatever code) is no longer the cross entropy; with router_aux_loss_coef=0.0 the checkpoint's
# coefficient is lost: who trains further from it, with the auxiliary loss switched on, trains with weight zero.
#
# A good engineer would guess: a training option stays with the trainer; the config that is saved is the one loaded.
#
# Output seen:
#   base: output_router_logits=False router_aux_loss_coef=0.01 loss - cross entropy=0.0000
#   default: output_router_logits=True router_aux_loss_coef=0.01 loss - cross entropy=0.0201
#   zero: output_router_logits=False router_aux_loss_coef=0.0 loss - cross entropy=0.0000
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 trl==1.16.0 accelerate==1.15.0 tokenizers==0.23.3
cd "$dir"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error
cat > observe.py <<'PY'
import logging
import warnings

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM, PrinterCallback
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
torch.manual_seed(0)
config = OlmoeConfig(
    vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.01, pad_token_id=0,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
OlmoeForCausalLM(config).save_pretrained("base")
words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3}, unk_token="a"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
rows = Dataset.from_dict({"input_ids": [[1, 3, 3, 2]] * 4})
ids = torch.tensor([[1, 3, 3, 2]])


def settings(path):
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        out = model(ids, labels=ids)
    entropy = torch.nn.functional.cross_entropy(out.logits[0, :-1], ids[0, 1:])
    extra = (out.loss - entropy).item()
    found = model.config.output_router_logits, model.config.router_aux_loss_coef
    print(f"{path}: output_router_logits={found[0]} router_aux_loss_coef={found[1]} loss - cross entropy={extra:.4f}")
    return *found, extra


def train(name, **options):
    arguments = SFTConfig(name, max_steps=1, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, **options)
    model = AutoModelForCausalLM.from_pretrained("base")
    trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(name)
    return settings(name)


base, default, zero = settings("base"), train("default"), train("zero", router_aux_loss_coef=0.0)
assert base[:2] == (False, 0.01) and abs(base[2]) < 1e-5
assert default[:2] == (True, 0.01) and default[2] > 0.01
assert zero[:2] == (False, 0.0)
PY
"$dir/venv/bin/python" observe.py
