"""Holds back what other libraries say about choices that are hotlora's."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging


@contextmanager
def quiet() -> Iterator[None]:
    """Holds back what other libraries say about choices that are hotlora's, and their progress bars."""
    import datasets

    level, bars_off = transformers_logging.get_verbosity(), datasets.are_progress_bars_disabled()
    theirs = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            # A checkpoint under PEFT asks the hub for the base model's vocabulary size; without a network it need not.
            warnings.filterwarnings("ignore", message="Could not find a config file")
            warnings.filterwarnings("ignore", message="Unable to fetch remote file")
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if theirs:
            transformers_logging.enable_progress_bar()
        if not bars_off:
            datasets.enable_progress_bars()
