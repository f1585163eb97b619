"""`python -m hotlora` is the command line, for launchers that take a module."""

from .cli import main

main()
