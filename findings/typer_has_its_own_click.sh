#!/bin/sh
# typer 0.29.2, with click installed beside it
#
# Behaviour: Typer no longer stands on the installed click but carries a copy. An unknown option raises the copy's
# NoSuchOption, which is no subclass of click's: `except click.exceptions.NoSuchOption` around an app in standalone_mode=False
# catches nothing.
#
# A good engineer would guess: a Typer app is a click command, so click's exceptions are what it raises.
#
# Output seen:
#   raised: typer._click.exceptions.NoSuchOption; click's own: False
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check typer==0.29.2 click==8.1.8
cd "$dir"
cat > observe.py <<'PY'
import click
import typer

app = typer.Typer()


@app.command()
def greet(name: str = "you"):
    print(name)


try:
    app(["--nome", "x"], standalone_mode=False)
    kind = None
except Exception as error:
    kind = type(error)
is_clicks = kind is not None and issubclass(kind, click.exceptions.NoSuchOption)
print(f"raised: {kind and kind.__module__}.{kind and kind.__qualname__}; click's own: {is_clicks}")
raise SystemExit(0 if kind is not None and kind.__name__ == "NoSuchOption" and not is_clicks else 1)
PY
"$dir/venv/bin/python" observe.py
