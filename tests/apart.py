"""Runs a function in a process of its own: what it imports patches other libraries."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

# Where it can be, forked from one process that has imported these and nothing of hotlora: each import takes seconds.
START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
PRELOADED = ["torch", "transformers", "peft"]


def apart(function, *args):
    """Its result. function: importable, and its arguments and result can be pickled."""
    context = multiprocessing.get_context(START)
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()
