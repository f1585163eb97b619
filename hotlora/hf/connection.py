"""Whether the Hub can be asked at all: without a network huggingface_hub tries each file for half a minute and more."""

import functools

import huggingface_hub
from huggingface_hub.utils import get_session

_SECONDS = 5.0


def unreachable() -> str | None:
    """Why the Hub cannot be reached; None where it answers, whatever it says. Asked once."""
    settings = huggingface_hub.constants
    return None if settings.HF_HUB_OFFLINE else _why(settings.ENDPOINT)  # the offline mode says so itself


@functools.cache
def _why(endpoint: str) -> str | None:
    try:
        get_session().head(endpoint, timeout=_SECONDS)
    except Exception as error:  # of the connection: the client's own kinds differ by its version
        return " ".join(str(error).split()) or type(error).__name__
    return None
