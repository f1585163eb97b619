"""Holds back what other libraries say about choices that are hotlora's."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging


@contextmanager
def quiet() -> Iterator[None]:
    """Holds back what other libraries say about choices that are hotlora's, and their progress bars."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with without_bars(), warnings.catch_warnings():
            # A checkpoint under PEFT asks the hub for the base model's vocabulary size; without a network it need not.
            warnings.filterwarnings("ignore", message="Could not find a config file")
            warnings.filterwarnings("ignore", message="Unable to fetch remote file")
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            yield
    finally:
        transformers_logging.set_verbosity(level)


@contextmanager
def without_bars() -> Iterator[None]:
    """Holds back other libraries' progress bars."""
    import datasets

    theirs, bars_off = transformers_logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if theirs:
            transformers_logging.enable_progress_bar()
        if not bars_off:
            datasets.enable_progress_bars()
