"""The loss a chunk of labels at a time: that of all logits at once, and no more of them than asked for."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from test_train import CONFIG, TOKENIZER, adapted, dataset
from tiny import tiny_model
from torch import nn
from zoo import zoo_model

from hotlora.evaluation import score
from hotlora.evaluation.score import response_loss
from hotlora.hf import forward
from hotlora.hf.forward import TEXTS, logits_are_the_heads
from hotlora.training import labelled_loss
from hotlora.training.labelled_loss import chunked_loss
from hotlora.training.sft_trainer import CpuTrainer, make_trainer


def small(monkeypatch: pytest.MonkeyPatch, logits: int) -> None:
    for module in (forward, labelled_loss, score):
        monkeypatch.setattr(module, "LOGITS", logits)


@pytest.mark.parametrize("rows", [1, 3, 16, 100])
def test_loss_and_gradient_are_those_of_all_logits(monkeypatch: pytest.MonkeyPatch, rows: int):
    small(monkeypatch, rows * 50)
    head = nn.Linear(8, 50, dtype=torch.float64).requires_grad_(False)
    hidden, labels = torch.randn(16, 8, dtype=torch.float64, requires_grad=True), torch.randint(50, (16,))
    seen = []
    head.register_forward_hook(lambda _, args, output: seen.append(len(output)))
    (3 * chunked_loss(head, hidden, labels)).backward()
    assert max(seen) <= rows and sum(seen) == 16 + 1, "the head runs once for each label"
    found, hidden.grad = hidden.grad, None
    expected = torch.nn.functional.cross_entropy(head(hidden).float(), labels, reduction="sum")
    (3 * expected).backward()
    torch.testing.assert_close(chunked_loss(head, hidden, labels), expected)
    torch.testing.assert_close(found, hidden.grad, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(chunked_loss(head, hidden, labels), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"aux_loss_coef": 0.1}, {"packing": True}, {"gradient_accumulation_steps": 2}])
def test_a_step_in_chunks_is_a_step_with_all_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], dtype: torch.dtype
):
    model = adapted()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    trainer = make_trainer(model, TOKENIZER, dataset(), replace(CONFIG, **options), tmp_path)
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    found = []
    for logits in (1 << 24, 259 * 5):
        small(monkeypatch, logits)
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(77))
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]))
    assert forward._plain_heads[trainer.model] is True
    (loss, gradients), (in_chunks, chunked) = found
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(in_chunks, loss, rtol=bound / 10, atol=0)
    for one, other in zip(chunked, gradients, strict=True):
        assert float((one - other).norm()) <= bound * float(other.norm()) + 1e-7


def test_a_head_that_trains_has_its_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small(monkeypatch, 259)
    model = tiny_model("olmoe", vocab_size=259).requires_grad_(True)
    trainer = make_trainer(model, TOKENIZER, dataset(), CONFIG, tmp_path)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    assert model.get_output_embeddings().weight.grad.norm() > 0


@pytest.mark.parametrize(
    ("family", "plain"), [("olmoe", True), ("qwen3_moe", True), ("granitemoe", False), ("gpt_oss", True)]
)
def test_logits_that_a_family_scales_are_not_taken_in_chunks(family: str, plain: bool):
    model = zoo_model(family, vocab_size=259)
    if family == "granitemoe":
        model.config.logits_scaling = model.logits_scaling = 8.0
    assert logits_are_the_heads(model, TOKENIZER(TEXTS[0])["input_ids"]) is plain


@pytest.mark.parametrize("scaling", [None, 8.0])
def test_a_held_out_loss_holds_no_more_logits_than_a_step(monkeypatch: pytest.MonkeyPatch, scaling: float | None):
    """64 rows of 2,048 tokens and 150,000 words would be 40 GB, and their copy as much again."""
    model = zoo_model("olmoe" if scaling is None else "granitemoe", vocab_size=259)
    if scaling is not None:
        model.config.logits_scaling = model.logits_scaling = scaling
    rows = Dataset.from_dict(dataset()[:6])
    whole, seen = [], []
    expected = response_loss(model, TOKENIZER, rows, rows=whole)
    small(monkeypatch, 259 * 5)
    handle = model.get_output_embeddings().register_forward_hook(lambda _, args, out: seen.append(out[..., 0].numel()))
    chunked = []
    assert response_loss(model, TOKENIZER, rows, rows=chunked) == pytest.approx(expected, rel=1e-5)
    handle.remove()
    assert [(row.tokens, row.right) for row in chunked] == [(row.tokens, row.right) for row in whole]
    assert scaling is not None or max(seen) <= 6, "the probe and one position of each row, then five labels at a time"


def test_the_auxiliary_loss_is_each_processs_own():
    """DDP averages it; what is of all tokens is multiplied by the number of processes before."""
    trainer = SimpleNamespace(
        aux_loss_enabled=True, router_aux_loss_coef=0.5, current_gradient_accumulation_steps=2,
        args=SimpleNamespace(average_tokens_across_devices=True),
        accelerator=SimpleNamespace(num_processes=4, autocast=nullcontext),
        labelled_loss=lambda *given: (SimpleNamespace(aux_loss=torch.tensor(3.0)), torch.tensor(10.0), 5),
    )  # fmt: skip
    loss = CpuTrainer.compute_loss(trainer, None, {"labels": None}, num_items_in_batch=20)
    assert loss.item() == 4 * 10 / 20 + 0.5 * 3 / 2
