"""Markdown of what was measured on GPUs, from the records in benchmarks/gpu, for scripts/docs.py and scripts/scale.py.

No command of this repository writes those records, so they say how they were made. What follows from them is made here.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from marks import table

from hotlora.cost.cluster import H100, H200, Machine

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu"
MACHINES = {"h200": H200, "h100": H100}

Record = Mapping[str, Any]


def records() -> Iterator[tuple[Machine, Record]]:
    """(the machine, what was measured on it), by the files' names."""
    for file in sorted(FOLDER.glob("*.json")):
        yield MACHINES[file.stem], json.loads(file.read_text(encoding="utf-8"))


def gpu_tables() -> str:
    """For docs/speed.md."""
    return "\n\n".join(part for _, record in records() for part in _parts(record))


def readme_table() -> str:
    """For README.md: a step's time and memory, and where they were measured."""
    record = json.loads((FOLDER / "h200.json").read_text(encoding="utf-8"))
    settings, model, rows = record["settings"], record["model"], []
    for row in record["contenders"]:
        step = row["milliseconds"]["step"]
        rows.append([
            row["name"].replace("HOTLORA_KERNELS=triton", "`HOTLORA_KERNELS=triton`"), f"{step:,}",
            f"{1000 * settings['tokens'] / step:,.0f}", f"{row['peak_memory_gb']:.1f}",
        ])  # fmt: skip
    title = (
        f"{record['environment']['device'].split(' (')[0]}, OLMoE-1B-7B's full size, {model['weights']} weights, "
        f"{settings['tokens']:,} tokens a step, {settings['dtype']}"
    )
    return table([title, "step, ms", "tokens/s", "peak memory, GB"], rows)


def time_checks() -> str:
    """For docs/scale.md: the time model against every measured step of which it knows the kernels."""
    rows = []
    for machine, record in records():
        for row in record["contenders"]:
            if row["kernels"] is not None:
                share = machine.compute_shares[row["kernels"]]
                foreseen = 1000 * row["flops"] / (machine.flops * share)
                measured = row["milliseconds"]["step"]
                rows.append([
                    machine.name, row["name"], f"{share:.1%}", f"{foreseen:,.0f}", f"{measured:,.0f}",
                    f"{foreseen / measured - 1:+.1%}",
                ])  # fmt: skip
    return table(
        ["GPU", "step", "share of the peak", "formula, ms", "measured, ms", "formula against measured"], rows, 2
    )


def _parts(record: Record) -> list[str]:
    model, settings, environment = record["model"], record["settings"], record["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment.items() if name != "device")
    floor = record["contenders"][0]["milliseconds"]["step"]
    return [
        f"**{environment['device']}, {model['type']}, {model['layers']} layers of {model['num_experts']} experts, "
        f"hidden {model['hidden_size']}, {model['weights']} weights; {settings['tokens']:,} tokens in sequences of "
        f"{settings['length']:,}, rank {settings['r']}, {settings['dtype']}, no gradient checkpointing**",
        f"{record['started']}, hotlora at {record['hotlora']}; {versions}. {record['method']} A product of "
        f"8,192 × 8,192 matrices got {record['matrix_rate'] / 1e12:,.0f} TFLOP/s, a copy "
        f"{record['copy_bytes_per_second'] / 1e12:.1f} TB/s, read and written.",
        _contenders(record, floor),
        f"Not measured: {'; '.join(record['not_measured'])}.",
        "Where a step's time goes, in ms of GPU time; – where there is no such kernel, or it was not told apart:",
        _kernels(record["step_milliseconds_by_kernel"]),
        _products_title(record["layer_products"]),
        _products(record["layer_products"]),
    ]


def _contenders(record: Record, floor: float) -> str:
    rows = []
    for row in record["contenders"]:
        times = row["milliseconds"]
        rate = row["flops"] / times["step"] * 1000 / record["matrix_rate"]
        rows.append([
            row["name"], f"{times['step']:,}", f"{times['step'] / floor:.2f}",
            f"{times['forward']} + {times['backward']}", f"{1000 * record['settings']['tokens'] / times['step']:,.0f}",
            f"{row['peak_memory_gb']:.1f}", f"{row['saved_kb_per_token_layer']:.1f}", f"{row['kernel_launches']:,}",
            f"{rate:.0%}",
        ])  # fmt: skip
    heads = ["contender", "step, ms", "× floor", "forward + backward, ms", "tokens/s", "peak memory, GB"]
    return table([*heads, "kept, kB a token and layer", "kernels", "share of rate"], rows)


def _kernels(parts: Record) -> str:
    rows = [[name, *("–" if value is None else str(value) for value in values)] for name, values in parts["rows"]]
    return table(["ms of a step", *parts["columns"]], rows)


def _products_title(products: Record) -> str:
    return (
        f"One layer's products alone, {products['tokens']:,} tokens, CV {products['cv']}, {products['hot_experts']} "
        f"hot experts (coverage {products['coverage']:.0%}), torch's with the masks that the library puts around it:"
    )


def _products(products: Record) -> str:
    rows = [[name, f"{torch:g}", f"{triton:g}", f"{rate:g}"] for name, torch, triton, rate in products["rows"]]
    return table(["product", "torch, ms", "Triton, ms", "Triton, TFLOP/s"], rows)
