import json
import math
import pickle
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from runs import run_training
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_plan
from tiny_tokenizer import byte_tokenizer
from trl import SFTConfig, SFTTrainer
from zoo import families, zoo_model

from hotlora.adapter.config import HotLoraConfig
from hotlora.base.errors import FileError, HotLoraError
from hotlora.base.precision import say_once
from hotlora.evaluation.score import response_loss
from hotlora.hf import forward
from hotlora.tasks import Example
from hotlora.tasks.tokens import IGNORE, batches, tokenize
from hotlora.training import checkpoints, labelled_loss, sft_trainer
from hotlora.training.config import TrainConfig
from hotlora.training.sft_trainer import Trainer, make_trainer
from hotlora.training.trainer import train

OMNI = "qwen3_omni_moe_thinker"
TOKENIZER = byte_tokenizer()
EXAMPLES = [Example(f"{i} and {i % 7}", f" make {i + i % 7}") for i in range(24)]
CONFIG = TrainConfig(max_steps=6, batch_size=4, save_steps=4, r=4, lora_alpha=8, max_length=64, learning_rate=3e-3)


def adapted(seed: int = 0, dropout: float = 0.0):
    base = tiny_model("olmoe", vocab_size=259)
    torch.manual_seed(seed)
    return get_peft_model(base, HotLoraConfig(plan=tiny_plan(base), r=4, lora_alpha=8, lora_dropout=dropout))


def adapter_tensors(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def dataset():
    return tokenize(EXAMPLES, TOKENIZER, 64)


def test_only_the_response_carries_loss(tmp_path: Path):
    trainer = make_trainer(adapted(), TOKENIZER, dataset(), CONFIG, tmp_path)
    for batch in trainer.get_train_dataloader():
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            text = TOKENIZER.decode(ids, skip_special_tokens=False).replace("<pad>", "")
            kept = TOKENIZER.decode(ids[labels != IGNORE])
            prompt = text[: -len(kept)]
            assert kept.startswith(" make ") and kept.endswith("<eos>") and "make" not in prompt
    # The trainer's loss is the plain mean over those tokens.
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    model = trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(model, dict(batch))
        plain = model(**batch).loss
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)


@pytest.mark.parametrize("options", [{}, {"aux_loss_coef": 0.1}, {"packing": True}, {"gradient_accumulation_steps": 2}])
def test_the_loss_at_the_labels_alone_is_the_trl_trainers_own(tmp_path: Path, options: dict[str, object]):
    trainer = make_trainer(adapted(), TOKENIZER, dataset(), replace(CONFIG, **options), tmp_path)
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    found = {}
    for cls in (SFTTrainer, type(trainer)):
        trainer.model.zero_grad()
        loss = cls.compute_loss(trainer, trainer.model, dict(batch), num_items_in_batch=torch.tensor(77))
        loss.backward()
        found[cls] = loss.detach(), [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]
    trl, ours = found[SFTTrainer], found[type(trainer)]
    assert SFTTrainer.compute_loss is not type(trainer).compute_loss
    torch.testing.assert_close(ours, trl, rtol=1e-4, atol=1e-6)


def test_training_lowers_the_loss_and_moves_only_the_adapter(tmp_path: Path):
    model = adapted()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = response_loss(model, TOKENIZER, dataset())
    result = train(model, TOKENIZER, dataset(), replace(CONFIG, max_steps=30, learning_rate=1e-2), tmp_path)
    assert response_loss(model, TOKENIZER, dataset()) < before - 1
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if not p.requires_grad)
    moved = {name: float(p.abs().sum()) for name, p in adapter_tensors(model).items() if "lora_B" in name}
    assert moved and all(moved.values()), "every B has a gradient, the experts' among them"
    rows = checkpoints.read_metrics(result.metrics)
    assert [row["step"] for row in rows] == list(range(1, 31)) and result.steps == 30
    assert (result.loss_first, result.loss_last) == (rows[0]["loss"], rows[-1]["loss"])
    # 24 examples, 4 a step: five passes.
    assert result.tokens == 5 * sum(map(len, dataset()["input_ids"]))
    assert {"learning_rate", "grad_norm", "tokens", "epoch", "seconds"} <= rows[0].keys()


@pytest.mark.parametrize("coefficient", [0.0, 0.5])
def test_the_auxiliary_loss_is_off_unless_asked_for(tmp_path: Path, coefficient: float):
    model = adapted()
    model.config.router_aux_loss_coef, model.config.output_router_logits = 0.7, True
    trainer = make_trainer(model, TOKENIZER, dataset(), replace(CONFIG, aux_loss_coef=coefficient), tmp_path)
    assert trainer.aux_loss_enabled is bool(coefficient) and trainer.router_aux_loss_coef == coefficient
    assert model.config.output_router_logits is bool(coefficient)


def test_packed_examples_do_not_see_each_other(tmp_path: Path):
    trainer = make_trainer(adapted(), TOKENIZER, dataset(), replace(CONFIG, packing=True, batch_size=64), tmp_path)
    (batch,) = list(trainer.get_train_dataloader())
    assert batch["input_ids"].shape[0] == 1 and int((batch["position_ids"] == 0).sum()) == len(EXAMPLES)
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model.eval(), dict(batch))
    assert float(loss) == pytest.approx(response_loss(adapted(), TOKENIZER, dataset()), rel=1e-5)


@pytest.mark.parametrize(
    "family", [name if name == OMNI else pytest.param(name, marks=pytest.mark.slow) for name in families()]
)
def test_training_and_held_out_loss_in_every_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str):
    """What the head gives at the labels alone is the plain loss; qwen3_omni_moe_thinker takes no logits_to_keep."""
    model = zoo_model(family, vocab_size=259)
    model.get_output_embeddings().requires_grad_(True)
    trainer = make_trainer(model, TOKENIZER, dataset(), CONFIG, tmp_path)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = model.eval()(**inputs, use_cache=False).logits[:, :-1]
        loss = trainer.compute_loss(model, dict(batch))
    labels = batch["labels"][:, 1:]
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
    torch.testing.assert_close(loss, plain, rtol=1e-4, atol=0)
    model.get_output_embeddings().requires_grad_(False)
    with torch.no_grad(), monkeypatch.context() as patch:
        for module in (forward, labelled_loss):
            patch.setattr(module, "LOGITS", 1)
        torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), plain, rtol=1e-4, atol=0)
    rows = Dataset.from_dict(dataset()[:4])
    (held_out,) = batches(rows, TOKENIZER, 4)
    with torch.no_grad():
        logits = model(**{k: v for k, v in held_out.items() if k != "labels"}, use_cache=False).logits[:, :-1]
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), held_out["labels"][:, 1:].flatten())
    assert response_loss(model, TOKENIZER, rows) == pytest.approx(float(plain), rel=1e-4)


# transformers 5.17 runs packed rows of linear attention, and mixes them; later ones say that they need a kernel.
@pytest.mark.parametrize(
    ("family", "says"), [("gpt_oss", "see each other"), ("qwen3_next", "(causal_conv1d|see each other)")]
)
def test_packing_that_mixes_examples_is_refused_before_anything_is_written(tmp_path: Path, family: str, says: str):
    model = zoo_model(family, vocab_size=259).requires_grad_(True)
    with pytest.raises(HotLoraError, match=f"this {family} model .*{says}.*leave out --packing"):
        train(model, TOKENIZER, dataset(), replace(CONFIG, packing=True), tmp_path)
    assert not (tmp_path / "train.json").exists()


@pytest.mark.parametrize("options", [{"packing": True}, {"aux_loss_coef": 0.01}])
def test_a_run_refuses_what_the_family_cannot_before_it_profiles(tmp_path: Path, options: dict[str, Any]):
    zoo_model("afmoe", vocab_size=259).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    rows = [{"prompt": example.prompt, "completion": example.completion} for example in EXAMPLES]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(HotLoraError, match=r"this afmoe model.*leave out --(packing|aux-loss-coef)"):
        run_training(
            str(tmp_path / "base"), str(tmp_path / "data.jsonl"), tmp_path / "run",
            config=replace(CONFIG, **options), fraction=0.25, device="cpu",
        )  # fmt: skip
    assert not list(tmp_path.glob("run/profile*"))


def test_gradient_accumulation_is_one_larger_batch(tmp_path: Path):
    whole, parts = adapted(), adapted()
    config = replace(CONFIG, max_steps=3, batch_size=8)
    train(whole, TOKENIZER, dataset(), config, tmp_path / "a")
    train(
        parts,
        TOKENIZER,
        dataset(),
        replace(config, batch_size=4, gradient_accumulation_steps=2),
        tmp_path / "b",
    )
    for name, tensor in adapter_tensors(whole).items():
        torch.testing.assert_close(adapter_tensors(parts)[name], tensor, rtol=1e-3, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_steps(tmp_path: Path):
    plain, less_memory = adapted(), adapted()
    train(plain, TOKENIZER, dataset(), CONFIG, tmp_path / "a")
    train(less_memory, TOKENIZER, dataset(), replace(CONFIG, gradient_checkpointing=True), tmp_path / "b")
    for name, tensor in adapter_tensors(plain).items():
        torch.testing.assert_close(adapter_tensors(less_memory)[name], tensor, rtol=1e-4, atol=1e-6)


def test_the_seed_decides(tmp_path: Path):
    losses = {}
    for run, seed in enumerate((0, 0, 1)):
        result = train(adapted(dropout=0.1), TOKENIZER, dataset(), replace(CONFIG, seed=seed), tmp_path / str(run))
        losses[run] = [row["loss"] for row in checkpoints.read_metrics(result.metrics)]
    assert losses[0] == losses[1] != losses[2]


def test_called_again_after_the_end_it_trains_no_further(tmp_path: Path):
    model = adapted()
    first = train(model, TOKENIZER, dataset(), CONFIG, tmp_path)
    again = adapted()
    second = train(again, TOKENIZER, dataset(), replace(CONFIG, save_steps=3), tmp_path)
    assert second == replace(first, resumed_from=6, peak_memory_bytes=second.peak_memory_bytes)
    for name, tensor in adapter_tensors(model).items():
        assert torch.equal(adapter_tensors(again)[name], tensor)


def test_another_configuration_does_not_go_on_silently(tmp_path: Path):
    train(adapted(), TOKENIZER, dataset(), CONFIG, tmp_path)
    with pytest.raises(HotLoraError, match=r"another run: --learning-rate 0\.1 against 0\.003, --r 8 against 4 \(now"):
        train(adapted(), TOKENIZER, dataset(), replace(CONFIG, learning_rate=0.1, r=8), tmp_path)


def test_a_model_without_an_adapter_is_refused(tmp_path: Path):
    model = tiny_model("olmoe", vocab_size=259).requires_grad_(False)
    with pytest.raises(HotLoraError, match="no trainable parameter"):
        train(model, TOKENIZER, dataset(), CONFIG, tmp_path)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("epochs", 0), ("max_steps", 0), ("batch_size", 0), ("learning_rate", -1.0), ("warmup_ratio", 1.0),
        ("save_steps", 0), ("lr_scheduler", "cosin"), ("max_length", 1), ("r", 0), ("lora_dropout", 1.0),
        ("aux_loss_coef", -0.1),
    ],
)  # fmt: skip
def test_options_out_of_range(option: str, value: object):
    with pytest.raises(HotLoraError, match=f"{option} = {value!r} is out of range: it must be"):
        TrainConfig(**{option: value})  # type: ignore[arg-type]


def test_half_written_checkpoints_are_passed_over(tmp_path: Path):
    for step in (3, 12, 9):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_bytes(b"12345")
        checkpoints.mark_complete(folder)
    assert checkpoints.last_complete(tmp_path) == tmp_path / "checkpoint-12"
    (tmp_path / "checkpoint-12" / "weights").write_bytes(b"123")
    (tmp_path / "checkpoint-20").mkdir()
    last = checkpoints.last_complete(tmp_path)
    assert last is not None and checkpoints.step_of(last) == 9
    checkpoints.remove_incomplete(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-9"]


class _Runs:
    """What a pickle can do when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


def test_a_checkpoint_with_a_file_from_elsewhere_is_one_message(tmp_path: Path):
    """The mark is made anew, as by one who replaces files on purpose, or copies them together from two runs."""
    config = replace(CONFIG, max_steps=2, save_steps=1)
    train(adapted(), TOKENIZER, dataset(), config, tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "checkpoint-1"  # of the last nothing but the weights is read
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-2")
    other = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])

    def text(file: Path) -> None:
        file.write_text("not what its name says")

    def other_rank(file: Path) -> None:
        tensors = {name: torch.zeros(3, 3) for name in load_file(file)}
        save_file(tensors, file, metadata={"format": "pt"})

    for name, replaced in (
        ("optimizer.pt", text),
        ("optimizer.pt", lambda file: file.write_bytes(pickle.dumps(_Runs(tmp_path / "was run")))),
        ("optimizer.pt", lambda file: torch.save(other.state_dict(), file)),
        ("scheduler.pt", text),
        ("rng_state.pth", text),
        ("adapter_model.safetensors", text),
        ("adapter_model.safetensors", other_rank),
    ):
        folder = tmp_path / "copy"
        shutil.copytree(tmp_path / "run", folder)
        checkpoint = folder / "checkpoints" / last.name
        replaced(checkpoint / name)
        checkpoints.mark_complete(checkpoint)
        with pytest.raises(FileError, match=r"cannot resume from .*checkpoint-1: .*delete this checkpoint"):
            train(adapted(), TOKENIZER, dataset(), config, folder)
        assert not (tmp_path / "was run").exists() and (checkpoint / name).exists()
        shutil.rmtree(folder)


def test_metrics_after_a_kill(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    assert checkpoints.read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3}]
    checkpoints.write_metrics(path, checkpoints.read_metrics(path, 2))
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_process_that_sees_two_gpus_trains_on_one(tmp_path: Path, monkeypatch, caplog):
    """transformers would spread the model over both (nn.DataParallel), and TRL ends there."""
    monkeypatch.setattr(SFTConfig, "n_gpu", property(lambda self: self._n_gpu or 2))  # 0 is a CPU's
    say_once.cache_clear()
    trainer = make_trainer(adapted(), TOKENIZER, dataset(), replace(CONFIG, max_steps=1), tmp_path)
    assert trainer.args.n_gpu == 1 and trainer.args.train_batch_size == CONFIG.batch_size
    assert "2 GPUs are here, and one of them trains. For all: torchrun --nproc-per-node 2" in caplog.text
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize(
    ("on", "dtype"), [("cuda", "float16"), ("cuda", "bfloat16"), ("cuda", "float32"), ("cpu", "float16")]
)
def test_half_precision_on_a_gpu_has_autocast_and_float16_loss_scaling(on, dtype, tmp_path: Path, monkeypatch):
    class Asked(Exception):
        pass

    def config(**options: Any) -> None:
        raise Asked(options)

    monkeypatch.setattr(sft_trainer, "SFTConfig", config)
    monkeypatch.setattr(sft_trainer, "device_of", lambda model: torch.device(on))
    monkeypatch.setattr(sft_trainer, "say_if_slow", lambda device, dtype: None)
    with pytest.raises(Asked) as asked:
        make_trainer(adapted().to(getattr(torch, dtype)), TOKENIZER, dataset(), CONFIG, tmp_path)
    told = asked.value.args[0]
    assert told["fp16"] == (dtype == "float16" and on == "cuda") and told["bf16"] == (dtype == "bfloat16")


@pytest.mark.parametrize("skipped", [False, True])
def test_of_a_step_that_loss_scaling_skips_only_the_gradients_may_be_infinite(skipped, tmp_path: Path, monkeypatch):
    trainer = make_trainer(adapted(), TOKENIZER, dataset(), CONFIG, tmp_path)
    trainer.batches = []
    monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", property(lambda self: skipped))
    with pytest.raises(HotLoraError, match="the loss is nan"):
        trainer.log({"loss": math.nan, "grad_norm": math.nan})
    with nullcontext() if skipped else pytest.raises(HotLoraError, match="the norm of the gradients is inf"):
        trainer.log({"loss": 1.0, "grad_norm": math.inf})


@pytest.mark.parametrize(("steps", "skipped", "ends"), [(4, 4, True), (24, 24, True), (5, 4, False)])
def test_a_training_whose_steps_loss_scaling_skips_is_an_error(steps, skipped, ends, tmp_path: Path, monkeypatch):
    """As on a GPU in float16 where all gradients are NaN: nothing was learned, and all would look well."""
    norm, asked = Trainer._get_grad_norm, []

    def nan_at_first(self, *args: Any, **kwargs: Any) -> float:
        asked.append(is_nan := self.state.global_step < skipped)
        monkeypatch.setattr(type(self.accelerator), "optimizer_step_was_skipped", property(lambda _: is_nan))
        return math.nan if is_nan else norm(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_get_grad_norm", nan_at_first)
    count = min(skipped, 20)
    message = rf"step {count}: the gradients of {count} steps in a row are not finite.*the training examples \d"
    with pytest.raises(HotLoraError, match=message) if ends else nullcontext():
        train(adapted(), TOKENIZER, dataset(), replace(CONFIG, max_steps=steps), tmp_path)
    assert len(asked) == (count if ends else steps)
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert "NaN" not in "".join(rows) and json.loads(rows[0])["grad_norm"] is None
