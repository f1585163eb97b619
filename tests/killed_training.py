"""Run as a script by test_train: trains a tiny adapter once undisturbed and once killed again and again.

    python killed_training.py FOLDER SEED

The training runs in forked children, so that torch is imported once. Prints one JSON object.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import load_file
from tiny import tiny_model, tiny_plan
from tiny_tokenizer import byte_tokenizer
from transformers import Trainer

from hotlora.adapter import HotLoraConfig
from hotlora.checkpoints import is_complete, last_complete
from hotlora.config import TrainConfig
from hotlora.data import tokenize
from hotlora.tasks import Example
from hotlora.train import train

CONFIG = TrainConfig(
    max_steps=30, batch_size=4, save_steps=3, learning_rate=3e-3, lora_dropout=0.1, lr_scheduler="cosine"
)


def train_once(output: Path) -> None:
    base = tiny_model("olmoe", vocab_size=259, max_position_embeddings=128)
    torch.manual_seed(0)
    config = HotLoraConfig(plan=tiny_plan(base), r=4, lora_alpha=8, lora_dropout=CONFIG.lora_dropout)
    model = get_peft_model(base, config)
    examples = [Example(f"{i} plus {i % 7}", f" is {i + i % 7}") for i in range(40)]  # 10 steps an epoch
    train(model, byte_tokenizer(), tokenize(examples, byte_tokenizer(), 64), CONFIG, output)
    model.save_pretrained(output / "adapter")


def start(output: Path, die_in_save: bool = False) -> int:
    child = os.fork()
    if child == 0:
        if die_in_save:  # the weights are written, the optimizer is not

            def die(self: Trainer, folder: str) -> None:
                os.kill(os.getpid(), signal.SIGKILL)

            Trainer._save_optimizer_and_scheduler = die
        try:
            train_once(output)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_for_step(output: Path, step: int) -> None:
    while not (path := output / "metrics.jsonl").exists() or path.read_bytes().count(b"\n") < step:
        time.sleep(0.002)


def main(folder: Path, seed: int) -> None:
    calm, killed = folder / "calm", folder / "killed"
    began = time.monotonic()
    assert wait(start(calm)) == 0
    whole = time.monotonic() - began

    chance, kills, steps = random.Random(seed), [], []
    for kill in range(6):
        child = start(killed, die_in_save=kill == 2)
        if kill != 2:
            # Somewhere in the next few steps, or in a save between them.
            wait_for_step(killed, 4 * kill + chance.randint(1, 4))
            time.sleep(chance.uniform(0, 0.03))
            os.kill(child, signal.SIGKILL)
        kills.append(wait(child))
        if kill == 2:
            newest = max((killed / "checkpoints").glob("checkpoint-*"), key=lambda p: p.stat().st_mtime)
            assert not is_complete(newest), "the kill came in mid-save"
        last = last_complete(killed / "checkpoints")
        steps.append(last.name if last else None)
    assert wait(start(killed)) == 0

    losses = [
        [
            (row["step"], row["loss"], row["tokens"])
            for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        ]
        for run in (calm, killed)
    ]
    ours, theirs = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (calm, killed))
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    report = {
        "kills": kills,
        "checkpoints": steps,
        "same_losses": losses[0] == losses[1],
        "same_adapter": same,
    }
    print(json.dumps({**report, "num_tensors": len(ours), "steps": len(losses[0]), "seconds": whole}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
