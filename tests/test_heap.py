"""Memory that arrays leave goes back to the system."""

import platform
import subprocess
import sys

import pytest

LEFT = """
import sys
from pathlib import Path

import torch
from hotlora.base.heap import apart_from

if sys.argv[1] == "apart":
    apart_from(2**23)

def own():
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon")]
    return int(line.split()[1]) / 1024

torch.ones(3 * 2**21)  # 24 MB: freed, and glibc puts all that is smaller on its heap
before, stays = own(), []
arrays = []
for _ in range(20):
    arrays.append(torch.ones(2**22))  # 16 MB
    stays.append(torch.ones(2**15))  # 0.1 MB, between them
arrays.clear()
print(own() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_large_arrays_leave_nothing_behind():
    left = {}
    for how in ("as it is", "apart"):
        done = subprocess.run([sys.executable, "-c", LEFT, how], capture_output=True, text=True, check=True)
        left[how] = float(done.stdout)
    assert left["as it is"] > 250
    assert left["apart"] < 10
