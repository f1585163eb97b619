"""Run alone: loads a checkpoint, and prints the bytes that it takes and the most that it took on the way, as JSON.

Memory of the process itself (RssAnon), every millisecond: pages that are mapped from the checkpoint's file count as the
file's, which the kernel takes back when it needs them.
"""

import json
import re
import sys
import threading
import time
from pathlib import Path

import torch

from hotlora.adapter.load import load_model
from hotlora.adapter.quantize import ExpertsQuantization


def own_bytes() -> int:
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def watched(stop: threading.Event, most: list[int]) -> None:
    while not stop.is_set():
        most[0] = max(most[0], own_bytes())
        time.sleep(0.001)


if __name__ == "__main__":
    folder, warm, bits, linear = sys.argv[1:]
    quantization = None
    if int(bits) or int(linear):
        quantization = ExpertsQuantization(int(bits) or None, linear=int(linear) or None)
    torch.set_num_threads(1)
    load_model(warm, device="cpu", quantization_config=quantization)  # imports, and what libraries keep
    stop, before = threading.Event(), own_bytes()
    most = [before]
    thread = threading.Thread(target=watched, args=(stop, most))
    thread.start()
    model = load_model(folder, device="cpu", dtype="bfloat16", quantization_config=quantization)
    after = own_bytes()
    stop.set()
    thread.join()
    tensors = [*model.parameters(), *model.buffers()]
    held = sum(t.untyped_storage().nbytes() for t in {t.data_ptr(): t for t in tensors}.values())
    print(json.dumps({"model": held, "most": most[0] - before, "after": after - before}))
