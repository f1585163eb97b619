#!/bin/sh
# datasets 5.2.0
#
# Behaviour: of a stream of a JSON file, `remove_columns("id")` changes another column. Read as Arrow (`with_format("arrow")`),
# objects of different keys, which datasets keeps as JSON, get a null for each key that they do not have. Without it, and
# with `select_columns` of the very columns that are left, each object has its own keys. `features` are the same in all
# three, and so are the rows that are iterated without a format.
#
# A good engineer would guess: to remove one column and to select all others is the same, and leaves the others as they are.
#
# Output seen:
#   as it is: ["{\"role\":\"user\"}", "{\"tool\":1}"]
#   select_columns: ["{\"role\":\"user\"}", "{\"tool\":1}"]
#   remove_columns: ["{\"role\":\"user\",\"tool\":null}", "{\"role\":null,\"tool\":1}"]
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check datasets==5.2.0
cd "$dir"
export HF_HUB_OFFLINE=1 HF_HOME="$dir/cache"
cat > observe.py <<'PY'
import json
from pathlib import Path

from datasets import load_dataset

Path("rows.jsonl").write_text(json.dumps({"id": 1, "messages": [{"role": "user"}, {"tool": 1}]}) + "\n")
stream = load_dataset("json", data_files="rows.jsonl", split="train", streaming=True)
seen = {}
for name, rows in (
    ("as it is", stream),
    ("select_columns", stream.select_columns("messages")),
    ("remove_columns", stream.remove_columns("id")),
):
    assert next(iter(rows))["messages"] == [{"role": "user"}, {"tool": 1}]
    seen[name] = next(iter(rows.with_format("arrow")))["messages"].to_pylist()[0]
    print(f"{name}: {json.dumps(seen[name])}")
own, filled = ['{"role":"user"}', '{"tool":1}'], ['{"role":"user","tool":null}', '{"role":null,"tool":1}']
raise SystemExit(0 if list(seen.values()) == [own, own, filled] else 1)
PY
"$dir/venv/bin/python" observe.py
