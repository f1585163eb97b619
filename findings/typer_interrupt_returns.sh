#!/bin/sh
# typer 0.29.2
#
# Behaviour: where a program calls its Typer app with standalone_mode=False, so as to handle the outcome itself, and
# the user presses Ctrl-C in a command, app() returns the number 130 like any command's result. No exception comes
# out: neither `except KeyboardInterrupt` nor `except click.Abort` runs, and the code after app() goes on.
#
# A good engineer would guess: standalone_mode=False leaves KeyboardInterrupt alone, or raises Abort as click does.
#
# Output seen:
#   typer: returned 130
#   click: raised Abort
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check typer==0.29.2 click==8.5.1
cd "$dir"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error
cat > observe.py <<'PY'
import contextlib
import io

import click
import typer

app = typer.Typer()


@app.command()
def main():
    raise KeyboardInterrupt  # what Ctrl-C raises here


@click.command()
def plain():
    raise KeyboardInterrupt


def outcome(command):
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return f"returned {command([], standalone_mode=False)!r}"
    except BaseException as error:
        return f"raised {type(error).__name__}"


print("typer:", outcome(app))
print("click:", outcome(plain))
assert outcome(app) == "returned 130"
assert outcome(plain) == "raised Abort"
PY
"$dir/venv/bin/python" observe.py
