#!/bin/sh
# datasets 5.2.0
#
# Behaviour: of rows whose inner objects have different keys, such as the schemas of two tools, `load_dataset("json")` keeps
# each object as it was written, and `Dataset.from_list` gives each the keys of all, None where it had none. Written to
# Parquet and read by anything else than datasets, what the first one kept are strings of JSON, while the second one's
# are objects.
#
# A good engineer would guess: the same rows are the same data set, whichever of the two makes it; both fill with None, as
# Arrow's structs do.
#
# Output seen:
#   load_dataset: {'n': {'type': 'integer'}}
#   from_list: {'city': None, 'n': {'type': 'integer'}}
#   load_dataset, its Parquet by pyarrow: '{"n":{"type":"integer"}}'
#   from_list, its Parquet by pyarrow: {'city': None, 'n': {'type': 'integer'}}
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1
cd "$dir"
export HF_HUB_OFFLINE=1 HF_HOME="$dir/cache" HF_DATASETS_DISABLE_PROGRESS_BARS=1
cat > observe.py <<'PY'
import json

import pyarrow.parquet
from datasets import Dataset, load_dataset

with open("rows.jsonl", "w") as file:
    for properties in ({"city": {"type": "string"}}, {"n": {"type": "integer"}}):
        file.write(json.dumps({"tool": {"name": "f", "properties": properties}}) + "\n")
rows = [json.loads(line) for line in open("rows.jsonl")]
made = {
    "load_dataset": load_dataset("json", data_files="rows.jsonl", split="train"),
    "from_list": Dataset.from_list(rows),
}
seen = []
for name, data in made.items():
    seen.append(data[1]["tool"]["properties"])
    print(f"{name}: {seen[-1]!r}")
for name, data in made.items():
    data.to_parquet(f"{name}.parquet")
    read = pyarrow.parquet.ParquetFile(f"{name}.parquet").read().to_pylist()
    seen.append(read[1]["tool"]["properties"])
    print(f"{name}, its Parquet by pyarrow: {seen[-1]!r}")
asis, filled, text, again = seen
expected = {"n": {"type": "integer"}}
is_same = asis == expected and filled == again == {"city": None, **expected} and isinstance(text, str)
raise SystemExit(0 if is_same and json.loads(text) == expected else 1)
PY
"$dir/venv/bin/python" observe.py
