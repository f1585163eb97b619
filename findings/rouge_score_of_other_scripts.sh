#!/bin/sh
# rouge-score 0.1.2
#
# Behaviour: with the default tokenizer a text in Greek, Cyrillic or Chinese script has no tokens at all, so that it scores 0
# against itself; of a text in a Latin script the letters with accents are gaps, so that a word with other accents, and another
# meaning, counts in part. Nothing is said.
#
# A good engineer would guess: 1.0 for two equal texts in any script; words are split at blanks and punctuation.
#
# Output seen:
#   Greek 0, Russian 0, Chinese 0, English 1.0
#   "péché" against "pêche": 0.5
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check rouge-score==0.1.2
cat > "$dir/observe.py" <<'PY'
from rouge_score.rouge_scorer import RougeScorer

scorer = RougeScorer(["rougeL"])


def f(one, other):
    return round(scorer.score(one, other)["rougeL"].fmeasure, 2)


TEXTS = {"Greek": "το τρένο φεύγει", "Russian": "поезд уходит", "Chinese": "火车 开走 了", "English": "the train leaves"}
found = {name: f(text, text) for name, text in TEXTS.items()}
print(", ".join(f"{name} {value}" for name, value in found.items()))
french = f("péché", "pêche")
print(f'"péché" against "pêche": {french}')
assert found == {"Greek": 0.0, "Russian": 0.0, "Chinese": 0.0, "English": 1.0}, "other scripts have tokens now"
assert 0 < french < 1, "letters with accents are no gaps now"
PY
"$dir/venv/bin/python" "$dir/observe.py"
