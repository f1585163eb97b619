#!/bin/sh
# transformers 5.23.0 (tokenizers 0.23.3)
#
# Behaviour: apply_chat_template(..., return_assistant_tokens_mask=True) depends on blanks at the ends of a {%
# generation %} span where the tokenizer's post-processor is ByteLevel(trim_offsets=True), which is what
# processors.ByteLevel() makes by default. A span that begins with a blank marks nothing, and neither does any later
# span of that conversation. A span that ends with a blank marks everything up to the end of the conversation, the
# user's next turn included.
#
# A good engineer would guess: the mask is 1 on the tokens of the generation spans and 0 elsewhere, wherever the
# blanks are.
#
# Output seen:
#   no blank:           ['day', 'you']
#   begins with a blank: []
#   ends with a blank:   ['day', '_', '<end>', '<user>', 'to', '<end>', '<bot>', 'you', '<end>']
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6
cd "$dir"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error
cat > observe.py <<'PY'
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

backend = Tokenizer(models.BPE())
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
backend.post_processor = processors.ByteLevel(trim_offsets=True)
backend.train_from_iterator(
    ["good day to you"] * 20,
    trainers.BpeTrainer(
        special_tokens=["<user>", "<bot>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    ),
)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
tokenizer.chat_template = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<bot>{% generation %}{{ m.content }}<end>{% endgeneration %}"
    "{% else %}<user>{{ m.content }}<end>{% endif %}{% endfor %}"
)
# The same, but the span holds the content alone.
content_alone = tokenizer.chat_template.replace("<end>{% endgeneration %}", "{% endgeneration %}<end>")


def marked(answer, template):
    chat = [
        {"role": "user", "content": "good"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "to"},
        {"role": "assistant", "content": "you"},
    ]
    out = tokenizer.apply_chat_template(
        chat, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    tokens = tokenizer.convert_ids_to_tokens(out["input_ids"])
    return [token.replace("Ġ", "_") for token, mark in zip(tokens, out["assistant_masks"]) if mark]


plain, first, last = marked("day", content_alone), marked(" day", content_alone), marked("day ", content_alone)
print("no blank:          ", plain)
print("begins with a blank:", first)
print("ends with a blank:  ", last)
assert plain == ["day", "you"]
assert first == []
assert "<user>" in last and "to" in last
PY
"$dir/venv/bin/python" observe.py
