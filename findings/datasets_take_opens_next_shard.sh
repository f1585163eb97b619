#!/bin/sh
# datasets 5.2.0
#
# Behaviour: take(n) of a streamed dataset reads a row more than it gives. Where n rows end with a shard, the next shard is
# opened, a remote file with it, for a row that nobody sees. Iterating over the same n rows without take opens nothing
# more.
#
# A good engineer would guess: take(10) of shards with 10 rows each reads the first shard alone, as ten calls of next do.
#
# Output seen:
#   take(9): opened [0]
#   take(10): opened [0, 1]
#   ten rows without take: opened [0]
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check datasets==5.2.0
cd "$dir"
export HF_HUB_OFFLINE=1
cat > observe.py <<'PY'
from itertools import islice

from datasets import IterableDataset

opened = []


def rows(shards):
    for shard in shards:
        opened.append(shard)
        yield from ({"shard": shard, "row": row} for row in range(10))


def opened_by(what, read):
    opened.clear()
    assert all(row["shard"] == 0 for row in read)
    print(f"{what}: opened {opened}")
    return list(opened)


streamed = IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 1, 2]})
seen = [
    opened_by("take(9)", streamed.take(9)) == [0],
    opened_by("take(10)", streamed.take(10)) == [0, 1],
    opened_by("ten rows without take", islice(streamed, 10)) == [0],
]
raise SystemExit(0 if all(seen) else 1)
PY
"$dir/venv/bin/python" observe.py
