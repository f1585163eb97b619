"""`python -m hotlora` is the command line, for launchers that take a module."""

from .cli.main import main

main()
