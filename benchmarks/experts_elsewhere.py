"""Times a training step with experts in 8 or 4 bits, or read from a mapped file, beside the same step in bfloat16.

    python benchmarks/experts_elsewhere.py --output benchmarks/experts/cpu.json

Two of OLMoE-1B-7B's layers with random weights (configs/olmoe-layers), a checkpoint in bfloat16, LoRA on the hot
quarter of the experts, on attention and the router. Each way is a process of its own that loads the checkpoint and
takes a few steps; they take turns. Memory is what the process has and no file has (RssAnon), sampled, beyond what it
had after its imports: the most while it loads, and the most from then on.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

WAYS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "8 bits": {"quantize": 8},
    "4 bits": {"quantize": 4},
    "offloaded": {"offload": "all"},
    "4 bits, offloaded": {"quantize": 4, "offload": "all"},
}
CONFIG = Path(__file__).parent / "configs" / "olmoe-layers" / "config.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="timed, after one that is not")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measured(options.folder, WAYS[options.way], options.tokens, options.steps)))
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    from hotlora.base.files import write_json
    from hotlora.base.records import environment

    started = datetime.now(UTC).isoformat(timespec="seconds")
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        save_model(Path(folder), options.layers)
        for _ in range(options.runs):
            for way in WAYS:
                command = [sys.executable, __file__, "--way", way, "--folder", folder]
                command += ["--tokens", str(options.tokens), "--steps", str(options.steps)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found[way].append(json.loads(done.stdout.splitlines()[-1]))
                print(way, found[way][-1], file=sys.stderr, flush=True)
    names = ("seconds", "cpu_seconds", "before_bytes", "loading_bytes", "step_bytes", "loss")
    medians = {way: {name: median(run[name] for run in runs) for name in names} for way, runs in found.items()}
    ratios = {way: {name: its[name] / medians["bfloat16"][name] for name in names[:-1]} for way, its in medians.items()}
    settings = {"tokens": options.tokens, "layers": options.layers, "steps": options.steps, "cores": os.cpu_count()}
    record = {
        "started": started, **settings, "environment": environment(), "runs": found, "medians": medians,
        "against bfloat16": ratios,
    }  # fmt: skip
    options.output.parent.mkdir(exist_ok=True)
    write_json(options.output, record)
    print(json.dumps(ratios, indent=1))


def save_model(folder: Path, layers: int, **changed: int) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(CONFIG)
    config.update({"num_hidden_layers": layers, **changed})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def measured(folder: Path, how: dict[str, Any], tokens: int, steps: int) -> dict[str, Any]:
    import torch
    from peft import get_peft_model

    import hotlora
    from hotlora.hf.moe_layers import moe_layers
    from hotlora.runs.folder import load_base

    load_base("nano", **{**how, **({"offload_folder": folder} if "offload" in how else {})})  # imports
    before, memory = own_bytes(), Watch()
    if "offload" in how:
        how = how | {"offload_folder": folder}
    base = load_base(str(folder), dtype="bfloat16", device="cpu", **how)
    loading = memory.most() - before
    layers = moe_layers(base)
    quarter = {layer.layer: tuple(range(layer.num_experts // 4)) for layer in layers}
    plan = hotlora.ExpertPlan(quarter, layers[0].num_experts, rule="hot", params={})
    torch.manual_seed(0)
    model = get_peft_model(base, hotlora.HotLoraConfig(plan=plan, r=32, lora_alpha=64)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(1, base.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(1))
    seconds, cpu_seconds = [], []
    for _ in range(steps + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - wall)
        cpu_seconds.append(time.process_time() - cpu)
    most = memory.most() - before
    memory.stop()
    return {
        "seconds": median(seconds[1:]), "cpu_seconds": median(cpu_seconds[1:]), "before_bytes": before,
        "loading_bytes": loading,
        "step_bytes": most, "file_bytes": own_bytes("RssFile"), "loss": loss.item(), "load": os.getloadavg()[0],
    }  # fmt: skip


def own_bytes(kind: str = "RssAnon") -> int:
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(kind)]
    return int(line.split()[1]) * 1024


class Watch:
    """The most that this process has had since it was last asked, sampled."""

    def __init__(self) -> None:
        self.found, self.over = own_bytes(), threading.Event()
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        while not self.over.wait(0.003):
            self.found = max(self.found, own_bytes())

    def most(self) -> int:
        found, self.found = max(self.found, own_bytes()), own_bytes()
        return found

    def stop(self) -> None:
        self.over.set()


if __name__ == "__main__":
    main()
