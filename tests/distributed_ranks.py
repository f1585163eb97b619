"""Run as a script by test_distributed: one training, over and over, by groups of processes that talk over gloo.

    python distributed_ranks.py FOLDER SCENARIO:PROCESSES ...

Each scenario is a function below. It runs in forked children, so that torch is imported once, and leaves its files in
FOLDER/SCENARIO-PROCESSES; what a child prints to stderr goes there, too. Prints one JSON object of exit codes.
"""

import gc
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import get_peft_model
from runs import run_training
from tiny import fill, tiny_batch, tiny_model, tiny_plan
from tiny_tokenizer import byte_tokenizer

import hotlora.cli.main
from hotlora.adapter.config import HotLoraConfig
from hotlora.base import processes as distributed
from hotlora.hf.models import load_model
from hotlora.routing.profiler import profile_routing
from hotlora.routing.selection import Selection
from hotlora.routing.until import profile_until
from hotlora.training.config import TrainConfig

STEPS, PER_STEP = 4, 4
PATIENCE = 300  # seconds for a scenario: a group that hangs is killed


def prepare(folder: Path) -> None:
    """A model with a router that has opinions, its tokenizer, and data."""
    tiny_model("olmoe", vocab_size=259, max_position_embeddings=128).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"{i} plus {i % 7}" + " and" * (i % 5), "completion": f" is {i + i % 7}"} for i in range(45)]
    for name, some in (("train", rows[:36]), ("test", rows[36:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))


def whole_run(output: Path, **options) -> dict:
    folder = output.parent
    many = int(os.environ.get("WORLD_SIZE", "1"))
    given = {"max_steps": STEPS, "batch_size": PER_STEP // many, "lora_dropout": 0.0, **options.pop("config", {})}
    config = TrainConfig(learning_rate=3e-3, r=4, lora_alpha=8, save_steps=2, max_length=64, **given)
    return run_training(
        str(folder / "model"), str(folder / options.pop("data", "train.jsonl")), output, config=config,
        test_data=str(folder / "test.jsonl"), device="cpu", fraction=0.375, **options,
    )  # fmt: skip


def ddp(output: Path, **options) -> None:
    whole_run(output, **options)


one = ddp


def fsdp(output: Path, **options) -> None:
    """As `accelerate launch` with configs/fsdp2.yaml says it to the processes."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "false"}
    whole_run(output, **options)


def fsdp_checkpointing(output: Path) -> None:
    """As with configs/fsdp2-offload.yaml; on a CPU nothing is to be offloaded."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    os.environ |= {"FSDP_ACTIVATION_CHECKPOINTING": "true", "FSDP_OFFLOAD_PARAMS": "true"}
    whole_run(output)


def experts(output: Path, **options) -> None:
    """Each process has experts of its own; one of four has none that are hot."""
    whole_run(output, expert_parallel=distributed_size(), **options)


def experts_twice(output: Path) -> None:
    """Two processes share out the experts, and two others do it again; activations are recomputed."""
    whole_run(output, expert_parallel=distributed_size() // 2, config={"gradient_checkpointing": True})


def profile(output: Path) -> None:
    """The same batches in every process, one more than can be dealt out evenly, padding among them."""
    distributed.start("cpu")
    model = load_model(output.parent / "model", device="cpu")
    batches = [tiny_batch(2, 5 + i, seed=i, vocab_size=259) for i in range(5)]
    profile = profile_routing(model, batches, share_out=True)

    def batches_of(places):
        return (tiny_batch(2, 5 + i % 5, seed=i, vocab_size=259) for i in places)

    until = profile_until(
        model, batches_of, 90, until=0.9, share_out=True, selection=Selection(signal="saliency", fraction=0.5)
    )
    if distributed.is_main():
        profile.save(output)
        until.save(output / "until.safetensors")


def resume(output: Path) -> None:
    """First by four, then by two, then by one, who finish it: each goes on for two steps."""
    steps = {4: 2, 2: 4, 1: 6}[distributed_size()]

    from hotlora.training import trainer as train

    def stop_there(self, args, state, control, **kwargs):
        if state.global_step == steps < 6:
            control.should_save = control.should_training_stop = True

    train.Recorder.on_step_end = stop_there
    try:
        whole_run(output, config={"max_steps": 6})
    finally:
        if distributed.is_main() and steps < 6:  # as a kill would have left it
            record = json.loads((output / "run.json").read_text())
            (output / "run.json").write_text(json.dumps(record | {"status": "running"}))


def calm(output: Path) -> None:
    """What `resume` is compared with."""
    whole_run(output, config={"max_steps": 6})


def failing(output: Path) -> None:
    """One process cannot read its data, and the other waits for it."""
    data = output.parent / ("broken.jsonl" if os.environ["RANK"] == "1" else "train.jsonl")
    (output.parent / "broken.jsonl").write_text('{"prompt": "no answer"}\n')
    sys.argv = ["hotlora", "train", "--model", str(output.parent / "model"), "--data", str(data), "-o", str(output)]
    hotlora.cli.main.main()


def uneven(output: Path) -> None:
    """Nine examples, four a step: the last step of an epoch has one, and some processes have none of their own."""
    rows = (output.parent / "train.jsonl").read_text().splitlines(keepends=True)
    (output.parent / "nine.jsonl").write_text("".join(rows[:9]))
    whole_run(output, data="nine.jsonl", config={"max_steps": None, "epochs": 2})


def other_data(output: Path) -> None:
    """One process reads another file."""
    name = f"train-{os.environ['RANK']}.jsonl"
    rows = (output.parent / "train.jsonl").read_text()
    (output.parent / name).write_text(rows.replace("3 plus", "4 plus") if os.environ["RANK"] == "1" else rows)
    sys.argv = [
        "hotlora", "train", "--model", str(output.parent / "model"), "--data", str(output.parent / name), "-o",
        str(output), "--device", "cpu", "--no-preflight",
    ]  # fmt: skip
    hotlora.cli.main.main()


def gone(output: Path) -> None:
    """One process is killed in mid-training, as systems do when memory runs out."""
    from hotlora.training import trainer as train

    def die(self, args, state, control, **kwargs):
        if os.environ["RANK"] == "1" and state.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    train.Recorder.on_step_end = die
    whole_run(output)


def others_trainer(output: Path) -> None:
    """A loop of the user's own: accelerate's FSDP2 around the adapted model, so that the adapter is sharded, too."""
    distributed.start("cpu")
    model = tiny_model("olmoe")
    model = get_peft_model(model, HotLoraConfig(plan=tiny_plan(model), r=4, lora_alpha=8))
    fill(model, 1)
    many = distributed.num_processes()
    optimizer = None
    if many > 1:
        model = _sharded_by_accelerate(model)
        kinds = {type(p.data).__name__ for n, p in model.named_parameters() if "lora_" in n}
        assert kinds == {"DTensor"}, kinds
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    model.train()
    for step in range(STEPS):
        batch = tiny_batch(4, 9, seed=step)
        rows = slice(distributed.rank() * 4 // many, (distributed.rank() + 1) * 4 // many)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[rows]
        loss = model(**{k: v[rows] for k, v in batch.items()}, labels=labels).loss
        # The mean over all tokens: FSDP averages over the processes.
        counts = distributed.all_objects(int((labels[:, 1:] != -100).sum()))
        loss = loss * counts[distributed.rank()] / sum(counts) * many
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(distributed.all_objects(loss.item())) / many)
    state = _gathered(model) if many > 1 else None
    if distributed.is_main():
        output.mkdir(exist_ok=True)
        (output / "metrics.jsonl").write_text("".join(json.dumps({"loss": loss}) + "\n" for loss in losses))
        model.save_pretrained(output / "adapter", state_dict=state, save_embedding_layers=False)
    distributed.wait_for_all()


FAMILIES = ("mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", "ernie4_5_moe", "nemotron_h")
SHARED = "gpt_oss"
"""Also with factors that experts share, which are spread over processes."""


def families(output: Path) -> None:
    """Logits and gradients of spread models beside a whole one's, all on the same batch: of biases, transposed weights,
    experts without a gate, shared experts, and routers that stay in float32."""
    from zoo import zoo_model

    distributed.start("cpu")
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    found = {}
    for family, options in [*((family, {}) for family in FAMILIES), (SHARED, {"share_a": True})]:
        folder = output.parent / family
        if distributed.is_main():
            zoo_model(family).save_pretrained(folder)
        distributed.wait_for_all()
        exact = _logits_and_gradients(folder, torch.float32, **options)
        for dtype in (torch.float32, torch.bfloat16):
            whole = _logits_and_gradients(folder, dtype, **options)
            for expert_parallel in (1, 2):
                spread = _logits_and_gradients(folder, dtype, distributed.sharding(expert_parallel), **options)
                found[f"{family} {' '.join(options)} {dtype} {expert_parallel}"] = {
                    "whole": [_relative(whole[0], exact[0]), _relative(whole[1], exact[1])],
                    "spread": [_relative(spread[0], exact[0]), _relative(spread[1], exact[1])],
                }
    if distributed.is_main():
        output.write_text(json.dumps(found))
    distributed.wait_for_all()


def _logits_and_gradients(folder: Path, dtype: torch.dtype, spread=None, **options):
    model = load_model(folder, device="cpu", dtype=dtype, distributed_config=spread)
    assert distributed.is_sharded(model) == (spread is not None)
    model = get_peft_model(model, HotLoraConfig(plan=tiny_plan(model), r=4, lora_alpha=8, **options))
    fill(model, 1)
    batch = tiny_batch(2, 9, seed=3)
    output = model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100))
    output.loss.backward()
    # An expert's gradient is where the expert is.
    gradients = {n: distributed.summed(p.grad.float()) for n, p in model.named_parameters() if p.requires_grad}
    many = distributed.num_processes()
    return {"logits": output.logits.detach().float()}, {n: g / many for n, g in gradients.items()}


def _relative(found: dict, expected: dict) -> float:
    """The worst tensor's error, by norms."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).norm() / (expected[n].norm() + 1e-8)) for n in expected)


def _sharded_by_accelerate(model):
    """What `Accelerator.prepare` does of it; on a CPU it does not begin, for accelerate has no FSDP there."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["OlmoeDecoderLayer"]
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", device=torch.device("cpu"),
        is_main_process=distributed.is_main(), torch_device_mesh=None,
    )  # fmt: skip
    return fsdp2_prepare_model(accelerator, model)


def _gathered(model):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    )


def distributed_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def fork_ranks(work: Callable[[], None], many: int, log: Path) -> list[int]:
    """So many processes that do `work`, in the environment of a launcher's; LOG.RANK.log gets their stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(many):
        child = os.fork()
        if child == 0:
            os.environ.pop("ACCELERATE_USE_FSDP", None)
            if many > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
                os.environ |= {"WORLD_SIZE": str(many), "LOCAL_WORLD_SIZE": str(many), "MASTER_PORT": str(port)}
            os.dup2(os.open(f"{log}.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            try:
                work()
            except SystemExit as ended:
                os._exit(ended.code or 0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    return children


def exit_codes(children: list[int], patience: float = PATIENCE) -> list[int]:
    """In their order; who has not ended after so many seconds is killed."""
    codes = []
    deadline = time.monotonic() + patience
    for child in children:
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.02)
        codes.append(os.waitstatus_to_exitcode(ended[1]))
    return codes


def start(scenario: str, many: int, folder: Path) -> list[int]:
    """Exit codes of the processes, in their order."""
    output = folder / f"{scenario}-{many}" if scenario != "resume" else folder / "resume"
    return exit_codes(fork_ranks(lambda: globals()[scenario](output), many, output))


def main() -> None:
    folder = Path(sys.argv[1])
    if not (folder / "model").exists():
        prepare(folder)
    gc.freeze()  # else each child collects, and so copies, what was imported
    codes = {}
    for job in sys.argv[2:]:
        scenario, _, many = job.partition(":")
        began = time.monotonic()
        codes[job] = start(scenario, int(many), folder)
        print(f"{job}: {time.monotonic() - began:.1f} s", file=sys.stderr)
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
