"""Times a routing profile beside the forward that it rides on: what does counting cost?

    python benchmarks/time_profiling.py --model nano --output benchmarks/profiling/DEVICE-nano.json

Random weights, random tokens, no gradients. In each round, in turn: the decoder alone, which is what a profile runs;
the same under `profile_routing`; and a forward with logits, as an evaluation runs it. Ratios are taken within rounds,
each round begins with another one, and medians and quartiles are kept with every time.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from hotlora.base.files import write_json
from hotlora.base.precision import cpu_dtype
from hotlora.base.records import environment
from hotlora.bench.contenders import RandomModel
from hotlora.cost.estimate import sized_config, torch_dtype
from hotlora.routing.profiler import profile_routing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="nano", help="nano, a config.json or its folder")
    parser.add_argument("--layers", type=int, help="cut the model to its first layers")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = sized_config(options.model, options.layers)
    dtype = torch_dtype("auto", config)
    dtype = cpu_dtype(dtype) if device.type == "cpu" else dtype
    model = RandomModel(config, dtype, device, seed=0).model.eval()
    shape = (options.batches, options.batch_size, options.length)
    batches = [{"input_ids": ids} for ids in torch.randint(config.get_text_config().vocab_size, shape).to(device)]

    def forward(run: Any) -> None:
        with torch.no_grad():
            for batch in batches:
                run(input_ids=batch["input_ids"], use_cache=False)

    ways: dict[str, Callable[[], Any]] = {
        "decoder": lambda: forward(model.get_decoder()),
        "profile": lambda: profile_routing(model, batches),
        "forward with logits": lambda: forward(model),
    }
    started, names = datetime.now(UTC).isoformat(timespec="seconds"), list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(-1, options.rounds):
        for name in names[i % 3 :] + names[: i % 3]:
            taken = _seconds(ways[name], device)
            if i >= 0:  # the first round warms up
                seconds[name].append(taken)
    result = {
        "version": 1,
        "kind": "profiling",
        "started": started,
        "command": " ".join(["python", *sys.argv]),
        "settings": {name: str(value) for name, value in vars(options).items() if name != "output"},
        "model": {"type": config.model_type, "layers": config.get_text_config().num_hidden_layers, "dtype": str(dtype)},
        "tokens": batches[0]["input_ids"].numel() * len(batches),
        "seconds": {name: {"median": statistics.median(times), "all": times} for name, times in seconds.items()},
        "profile_over": {name: _ratio(seconds["profile"], seconds[name]) for name in names if name != "profile"},
        "environment": environment(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, result)
    print(json.dumps({name: result[name] for name in ("tokens", "profile_over")}, indent=2))


def _seconds(way: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    way()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _ratio(above: list[float], below: list[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    q1, median, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


if __name__ == "__main__":
    main()
