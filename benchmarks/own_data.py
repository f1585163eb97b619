"""Times reading and tokenizing rows of messages beside TRL's SFTTrainer, which prepares the same file for itself.

    python benchmarks/own_data.py --output benchmarks/own_data/cpu.json

Rows of 4 to 7 messages of made-up words, a BPE of 8,000 tokens, TRL's Qwen3 template with marks around what is trained,
1,024 tokens a row at most. Each run is a process of its own, which first prepares ten rows: hotlora reads the file and
tokenizes it to a mapped data set; TRL reads it by `datasets`, into an empty cache, and prepares it with
assistant_only_loss. They take turns, and each run's times and peak memory (beyond what the process had) are kept.
"""

import argparse
import json
import os
import random
import resource
import string
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

WAYS = ("hotlora", "trl")
LENGTH = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measured(options.way, options.folder)))
    else:
        compare(options.rows, options.runs, options.output)


def compare(rows: int, runs: int, output: Path) -> None:
    from hotlora.base.files import write_json
    from hotlora.base.records import environment

    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    started = datetime.now(UTC).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_rows(folder / "rows.jsonl", rows)
        write_rows(folder / "few.jsonl", 10)
        save_tokenizer(folder)
        for number in range(runs):
            for way in WAYS if number % 2 == 0 else WAYS[::-1]:
                command = [sys.executable, __file__, "--way", way, "--folder", str(folder)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found[way].append(json.loads(done.stdout.splitlines()[-1]))
                print(way, found[way][-1], file=sys.stderr, flush=True)
    medians = {way: {key: median(run[key] for run in each) for key in each[0]} for way, each in found.items()}
    ratios = {key: medians["hotlora"][key] / medians["trl"][key] for key in ("seconds", "cpu_seconds", "peak_bytes")}
    record = {
        "started": started, "rows": rows, "max_length": LENGTH, "cores": os.cpu_count(), "environment": environment(),
        "runs": found, "medians": medians, "hotlora against trl": ratios,
    }  # fmt: skip
    write_json(output, record)
    print(json.dumps(ratios))


def write_rows(path: Path, number: int) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 9))) for _ in range(20_000)]

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(least, most)))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(number):
            messages = [{"role": "system", "content": text(5, 15)}] if draw.random() < 0.5 else []
            for _ in range(draw.randint(2, 3)):
                messages.append({"role": "user", "content": text(5, 40)})
                messages.append({"role": "assistant", "content": text(10, 50)})
            file.write(json.dumps({"messages": messages}) + "\n")


def save_tokenizer(folder: Path) -> None:
    import trl
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=special, initial_alphabet=letters, show_progress=False
    )  # fmt: skip
    with (folder / "rows.jsonl").open(encoding="utf-8") as file:
        some = [message["content"] for line in islice(file, 2000) for message in json.loads(line)["messages"]]
    tokenizer.train_from_iterator(some, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3_training.jinja"
    fast.chat_template = template.read_text(encoding="utf-8")
    fast.save_pretrained(folder / "tokenizer")


def measured(way: str, folder: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    prepare = {"hotlora": by_hotlora, "trl": by_trl}[way]
    prepare(folder / "few.jsonl", tokenizer)  # imports
    before, cpu, wall = peak(), time.process_time(), time.perf_counter()
    dataset = prepare(folder / "rows.jsonl", tokenizer)
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    found = {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak() - before, "load": os.getloadavg()[0]}
    return found | {"rows": len(dataset), "tokens": sum(map(len, dataset["input_ids"]))}


def by_hotlora(path: Path, tokenizer: Any) -> Any:
    from hotlora.data import load_examples, tokenize

    return tokenize(load_examples(str(path), tokenizer=tokenizer), tokenizer, LENGTH)


def by_trl(path: Path, tokenizer: Any) -> Any:
    import datasets
    from trl import SFTConfig, SFTTrainer, get_training_chat_template

    datasets.disable_progress_bars()
    cache = tempfile.mkdtemp(dir=path.parent)
    config = SFTConfig(
        output_dir=cache, max_length=LENGTH, assistant_only_loss=True, report_to="none", use_cpu=True
    )  # fmt: skip
    trainer: Any = SimpleNamespace(
        _tokenizer=tokenizer, chat_template=get_training_chat_template(tokenizer), completion_only_loss=False
    )
    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
    return SFTTrainer._prepare_dataset(trainer, rows, tokenizer, config, False, None, "train")


def peak() -> int:
    """The most memory that the process has had, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
