#!/bin/sh
# datasets 5.2.0, pyarrow 26.0.1
#
# Behaviour: Dataset(table), of a pyarrow table in memory, copies the table several times over for a moment: without a
# fingerprint it makes one by hashing the pickled data set. With fingerprint=… given, nothing is copied. Seen on tables of
# token ids, in chunks as they come from a tokenizer, where the copies decide how much memory the preparation needs.
#
# A good engineer would guess: Dataset wraps the table without a copy, as Arrow's promise is, whether or not one names it.
#
# Output seen:
#   table: 200 MB
#   Dataset(table): peak grows by more than twice the table
#   Dataset(table, fingerprint=...): peak grows by less than a tenth of the table
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1
cd "$dir"
cat > observe.py <<'PY'
import os
import resource
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pyarrow as pa
from datasets import Dataset

given = {"fingerprint": "0" * 16} if sys.argv[1] == "named" else {}
ids = pa.array(np.arange(500_000, dtype=np.int32))
rows = pa.ListArray.from_arrays(pa.array(np.arange(0, 500_001, 500, dtype=np.int32)), ids)
chunks = [pa.table({"input_ids": pa.concat_arrays([rows])}) for _ in range(100)]
table = pa.concat_tables(chunks)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


before = peak()
dataset = Dataset(table, **given)
assert len(dataset) == 100_000
print(table.nbytes, peak() - before)
PY
measure() {
    HF_HOME="$dir/home" "$dir/venv/bin/python" observe.py "$1"
}
set -- $(measure plain) $(measure named)
echo "table: $(($1 / 1000000)) MB; the peak grows by $(($2 / 1000000)) MB, and with a fingerprint by $(($4 / 1000000)) MB"
test "$2" -gt $((2 * $1))
test "$4" -lt $(($1 / 10))
