#!/bin/sh
# trl 1.16.0 (transformers 5.23.0, datasets 5.2.0, torch 2.13.0, CPU)
#
# Behaviour: SFTTrainer given tokenized rows with `input_ids` and `completion_mask` trains on every token. It uses the mask only
# where `completion_only_loss` is set to True, and otherwise decides by the names of the columns: rows with `prompt` and
# `completion` have loss on the completion, rows that are tokenized have it everywhere, mask or not, and nothing is logged.
#
# A good engineer would guess: a column of that name is what has loss. TRL makes it itself of rows with `prompt` and `completion`.
#
# Output seen:
#   prompt and completion: labels [-100, -100, 7, 8, 1]
#   input_ids and completion_mask: labels [5, 6, 7, 8, 1]
#   the same with completion_only_loss: labels [-100, -100, 7, 8, 1]
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 trl==1.16.0 datasets==5.2.0
cd "$dir"
export HF_HUB_OFFLINE=1 HF_HOME="$dir/cache"
cat > observe.py <<'PY'
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

words = ["<pad>", "<eos>", "<unk>", "a", "b", "what", "now", "go", "home"]
backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
backend.pre_tokenizer = WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
config = LlamaConfig(
    vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2,
)
plain = Dataset.from_list([{"prompt": "what now", "completion": " go home"}])
tokenized = Dataset.from_list([{"input_ids": [5, 6, 7, 8, 1], "completion_mask": [0, 0, 1, 1, 1]}])
seen = []
for name, rows, options in (
    ("prompt and completion", plain, {}),
    ("input_ids and completion_mask", tokenized, {}),
    ("the same with completion_only_loss", tokenized, {"completion_only_loss": True}),
):
    arguments = SFTConfig("out", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, **options)
    trainer = SFTTrainer(LlamaForCausalLM(config), arguments, train_dataset=rows, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    seen.append(batch["labels"][0].tolist())
    print(f"{name}: labels {seen[-1]}")
masked, whole = [-100, -100, 7, 8, 1], [5, 6, 7, 8, 1]
raise SystemExit(0 if seen == [masked, whole, masked] else 1)
PY
"$dir/venv/bin/python" observe.py
