"""Times attention with sinks by torch's fused kernels beside transformers' eager one, at gpt-oss-20b's sizes.

    python benchmarks/attention_sinks.py --output benchmarks/sinks/DEVICE.json

One row of tokens, random numbers, forward and backward, of a layer that sees all tokens before and of one that sees a
window. In each round both are run, each round begins with the other one, and ratios are taken within rounds. kept:
bytes that autograd keeps for the backward pass, beside q, k and v.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from hotlora.base.files import write_json
from hotlora.base.precision import cpu_dtype
from hotlora.base.records import environment
from hotlora.cost.activations import SavedBytes
from hotlora.hf.models import model_from_config
from hotlora.hf.sinks import attention_with_sinks

CONFIG = Path(__file__).parent / "configs" / "gpt-oss-20b"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048], help="tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else cpu_dtype(torch.bfloat16)
    config: Any = model_from_config(CONFIG).config
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    module: Any = nn.Module()
    module.num_key_value_groups, module.sinks = heads // kv_heads, torch.randn(heads, device=device, dtype=dtype)

    def step(attention: Callable[..., Any], length: int, mask: Tensor | None) -> tuple[float, int]:
        q, k, v = (
            torch.randn(1, n, length, width, device=device, dtype=dtype, requires_grad=True)
            for n in (heads, kv_heads, kv_heads)
        )
        start = now(device)
        with SavedBytes(module, q, k, v) as saved:
            out = attention(module, q, k, v, mask, scaling=width**-0.5, s_aux=module.sinks)[0]
        kept = saved.total
        del saved
        out.sum().backward()
        return now(device) - start, kept

    started, rows = datetime.now(UTC).isoformat(timespec="seconds"), []
    for length in options.lengths:
        ahead = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
        for name, window in (("all", length), ("window", config.sliding_window)):
            seen = ((ahead >= 0) & (ahead < window))[None, None]
            added = torch.zeros(seen.shape, device=device, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
            ways = {
                "eager": lambda n=length, mask=added: step(eager_attention_forward, n, mask),
                "fused": lambda n=length, mask=None if name == "all" else seen: step(attention_with_sinks, n, mask),
            }
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            kept = {way: run()[1] for way, run in ways.items()}  # the first is a warm-up
            for i in range(options.rounds):
                for way in list(ways)[:: 1 if i % 2 else -1]:
                    seconds[way].append(ways[way]()[0])
            ratios = [fused / eager for eager, fused in zip(*seconds.values(), strict=True)]
            rows.append({
                "tokens": length, "sees": name, "all": seconds,
                "seconds": {way: statistics.median(its) for way, its in seconds.items()},
                "fused_over_eager": statistics.median(ratios), "kept": kept,
            })  # fmt: skip
            print(rows[-1], file=sys.stderr)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, {
        "version": 1, "kind": "sinks", "started": started, "command": " ".join(["python", *sys.argv]),
        "rounds": options.rounds, "dtype": str(dtype), "rows": rows, "environment": environment(),
    })  # fmt: skip


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
