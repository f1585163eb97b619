"""Runs a function in a process of its own: what it imports patches other libraries."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor


def apart(function, *args):
    """Its result. function: importable, and its arguments and result can be pickled."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()
