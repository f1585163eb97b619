"""Run alone with TINY:LARGE:BITS…: loads each, and prints the bytes that it takes and the most that it took on the way.

Memory of the process itself (RssAnon), every millisecond: pages that are mapped from the checkpoint's file count as the
file's, which the kernel takes back when it needs them.
"""

import json
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from hotlora.adapter.load import load_model
from hotlora.adapter.quantize import ExpertsQuantization


def own_bytes() -> int:
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def watched(stop: threading.Event, most: list[int]) -> None:
    while not stop.is_set():
        most[0] = max(most[0], own_bytes())
        time.sleep(0.001)


def load(folder: str, bits: str) -> Any:
    quantization = ExpertsQuantization(int(bits)) if int(bits) else None
    return load_model(folder, device="cpu", dtype="bfloat16", quantization_config=quantization)


if __name__ == "__main__":
    torch.set_num_threads(1)
    asked = [argument.split(":") for argument in sys.argv[1:]]
    loaded = [load(folder, bits) for folder, _, bits in asked[::-1]]  # tiny ones: imports, and what libraries keep
    for _, folder, bits in asked:  # earlier ones stay, so that none gets an earlier one's memory
        stop, before = threading.Event(), own_bytes()
        most = [before]
        thread = threading.Thread(target=watched, args=(stop, most))
        thread.start()
        loaded.append(load(folder, bits))
        stop.set()
        thread.join()
        tensors = [*loaded[-1].parameters(), *loaded[-1].buffers()]
        held = sum(t.untyped_storage().nbytes() for t in {t.data_ptr(): t for t in tensors}.values())
        print(json.dumps({"model": held, "most": most[0] - before}))
