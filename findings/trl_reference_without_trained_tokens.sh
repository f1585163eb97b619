#!/bin/sh
# trl 1.16.0, peft 0.21.2 (transformers 5.23.0, datasets 5.2.0, torch 2.13.0, CPU)
#
# Behaviour: DPOTrainer on a PeftModel compares with a second adapter "ref", which it fills with the values of "default" before
# the first step. Rows of the embedding that the adapter trains (`trainable_token_indices`) are not copied: their parameter's
# name ends in ".default", and TRL copies what has ".default." within its name. So "ref" has the base's embedding for
# these tokens, and its log-probabilities are those of no model that was ever there. Nothing is logged.
#
# A good engineer would guess: before the first step reference and policy are equal, whatever the adapter trains.
#
# Output seen:
#   a LoRA: reference and policy differ by 0.00
#   a LoRA and two trained tokens: reference and policy differ by more than 0.1
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 peft==0.21.2 trl==1.16.0 datasets==5.2.0
cd "$dir"
export HF_HUB_OFFLINE=1 HF_HOME="$dir/cache"
cat > observe.py <<'PY'
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

words = ["<pad>", "<eos>", "<unk>", "what", "now", "go", "stay"]
backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
backend.pre_tokenizer = WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
config = LlamaConfig(
    vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2,
)
rows = Dataset.from_list([{"prompt": "what now", "chosen": " go", "rejected": " stay"}])
ids = torch.tensor([[3, 4, 5]])
apart = []
for name, options in (("a LoRA", {}), ("a LoRA and two trained tokens", {"trainable_token_indices": {"embed_tokens": [3, 5]}})):
    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(target_modules=["q_proj"], **options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    arguments = DPOConfig("out", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True)
    trainer = DPOTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    model = trainer.model.eval()
    with torch.no_grad():
        policy = model(ids).logits
        model.set_adapter("ref")
        reference = model(ids).logits
    apart.append(float((policy - reference).abs().max()))
    print(f"{name}: reference and policy differ by {apart[-1]:.2f}")
raise SystemExit(0 if apart[0] == 0 and apart[1] > 0.1 else 1)
PY
"$dir/venv/bin/python" observe.py
