#!/bin/sh
# datasets 5.2.0 (pandas 2.3.3)
#
# Behaviour: where one column of a JSON Lines file has values of several types, the numbers of all its columns are read with
# fewer digits, in columns of floats too; and those within the column of several types, which is kept as JSON in strings, once more
# differently: 0.7 is 0.7000000000000001 there. Without that column the same numbers are read as they were written.
#
# A good engineer would guess: a number of JSON is the nearest float, as `json.loads` gives it, whatever stands in other columns.
#
# Output seen:
#   written: [0.7, 0.0058338203945503125]
#   alone: [0.7, 0.0058338203945503125]
#   beside a column of several types: [0.7, 0.0058338204]
#   within it: [0.7000000000000001, 0.0058338204]
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1 pandas==2.3.3
cd "$dir"
export HF_HUB_OFFLINE=1 HF_HOME="$dir/cache" HF_DATASETS_DISABLE_PROGRESS_BARS=1
cat > observe.py <<'PY'
import json

from datasets import load_dataset

written = [0.7, 0.0058338203945503125]
for name in ("alone", "beside"):
    with open(f"{name}.jsonl", "w") as file:
        for number, other in (*zip(written, written), (1.0, "a text")):
            row = {"number": number} | ({"mixed": {"value": other}} if name == "beside" else {})
            file.write(json.dumps(row) + "\n")
alone, beside = (load_dataset("json", data_files=f"{name}.jsonl", split="train") for name in ("alone", "beside"))
seen = [alone["number"][:2], beside["number"][:2], [row["value"] for row in beside["mixed"][:2]]]
print(f"written: {written}")
for words, numbers in zip(("alone", "beside a column of several types", "within it"), seen):
    print(f"{words}: {numbers}")
raise SystemExit(0 if seen == [written, [0.7, 0.0058338204], [0.7000000000000001, 0.0058338204]] else 1)
PY
"$dir/venv/bin/python" observe.py
