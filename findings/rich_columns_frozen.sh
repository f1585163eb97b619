#!/bin/sh
# rich 15.0.0
#
# Behaviour: COLUMNS decides how wide a Console prints. A Console that was made while COLUMNS was unset looks at the
# variable each time; one that was made while it was set keeps that width for ever, also after the variable was changed
# or unset. So what a module-level Console does depends on what the environment was when its module was imported first.
#
# A good engineer would guess: either the width is read once, when the Console is made, or each time; not one or the
# other by what the variable was at the start.
#
# Output seen:
#   made while unset: 40 at COLUMNS=40, 120 at COLUMNS=120
#   made at COLUMNS=60: 60 at COLUMNS=40, 60 at COLUMNS=120
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check rich==15.0.0
cd "$dir"
cat > observe.py <<'PY'
import io
import os

from rich.console import Console


def widths(at_start):
    os.environ.pop("COLUMNS", None)
    if at_start is not None:
        os.environ["COLUMNS"] = at_start
    console = Console(file=io.StringIO())
    found = []
    for columns in ("40", "120"):
        os.environ["COLUMNS"] = columns
        console.print("x" * 300)
        found.append(len(console.file.getvalue().splitlines()[0]))
        console.file.seek(0)
        console.file.truncate()
    return found


free, kept = widths(None), widths("60")
print(f"made while unset: {free[0]} at COLUMNS=40, {free[1]} at COLUMNS=120")
print(f"made at COLUMNS=60: {kept[0]} at COLUMNS=40, {kept[1]} at COLUMNS=120")
raise SystemExit((free, kept) != ([40, 120], [60, 60]))
PY
"$dir/venv/bin/python" observe.py
