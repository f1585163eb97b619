#!/bin/sh
# trl 1.16.0 (transformers 5.23.0)
#
# Behaviour: for a tokenizer with DeepSeek-V3's chat template, TRL's training template (the one that SFTTrainer puts
# in its place for assistant_only_loss=True) writes the arguments of a tool call that are a JSON string, as in
# OpenAI's format, a second time as JSON: in quotes and with each inner quote escaped. DeepSeek's own template writes
# the string as it is, and takes nothing but strings. So the model is trained on a form that it will not be asked for
# at inference.
#
# A good engineer would guess: the training template differs by its generation marks alone and gives the same text.
#
# Output seen:
#   the model's own template: {"city": "Oslo"}
#   the training template:    "{\"city\": \"Oslo\"}"
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 trl==1.16.0 tokenizers==0.23.3
cd "$dir"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error
cat > observe.py <<'PY'
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import chat_template_utils

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
tokenizer.bos_token = "a"
tokenizer.chat_template = chat_template_utils.deepseekv3_chat_template
training = chat_template_utils.get_training_chat_template(tokenizer)
call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]


def arguments(template):
    text = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
    return text.split("```json\n")[1].split("\n```")[0]


inference, train = arguments(None), arguments(training)
print("the model's own template:", inference)
print("the training template:   ", train)
assert inference == '{"city": "Oslo"}'
assert train == '"{\\"city\\": \\"Oslo\\"}"'
PY
"$dir/venv/bin/python" observe.py
