"""Triton's interpreter, a third quicker."""

from importlib.util import find_spec
from typing import Any


def patch_once() -> None:
    """It puts its own functions into triton.language for a kernel, and looks through all of that again for each device
    function that the kernel calls, though the same functions are in the same place still."""
    if find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def once(function: Any) -> Any:
        found = function.__globals__.values()
        langs = {id(value) for value in found if value is interpreter.tl or value is interpreter.tl.core}
        if langs and langs <= patched:
            return None  # of no use to a device function's caller
        patched.update(langs)
        return patch(function)

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = once, launched
