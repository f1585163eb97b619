#!/bin/sh
# transformers 5.23.0
#
# Behaviour: apply_chat_template takes the keys whose value is None out of a message before the template sees it. A
# template's own branch for `content is none` is therefore never reached: the name is undefined there, and undefined
# is not none. In the common pattern below an assistant's turn that is a tool call alone takes the branch for text.
#
# A good engineer would guess: the template is given the messages as they are, so that content=None is none in it.
#
# Output seen:
#   transformers: text '' then call
#   jinja2 alone: call alone
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6
cd "$dir"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error
cat > observe.py <<'PY'
from jinja2 import Environment
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
template = (
    "{% for m in messages %}{% if m['content'] is none %}call alone{% else %}text '{{ m['content'] }}' then call"
    "{% endif %}{% endfor %}"
)
call = {"type": "function", "function": {"name": "clock", "arguments": {}}}
chat = [{"role": "assistant", "content": None, "tool_calls": [call]}]

found = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
plain = Environment().from_string(template).render(messages=chat)
print("transformers:", found)
print("jinja2 alone:", plain)
assert plain == "call alone"
assert found == "text '' then call"
PY
"$dir/venv/bin/python" observe.py
