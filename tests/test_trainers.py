"""The trainers that users have: TRL's three and transformers' own take a HotLoraConfig as any other adapter."""

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from tiny import tiny_model, tiny_plan
from tiny_tokenizer import byte_tokenizer
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.logging import disable_progress_bar
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import hotlora
from hotlora.adapter.mask import draw_mask
from hotlora.hf.moe_layers import moe_layers

disable_progress_bar()
PLAN = {0: [1, 3, 6], 1: [0, 2]}
DENSE = {"train_a": False, "init_lora_weights": False}  # of which a mask is drawn
TOKENIZER = byte_tokenizer()
PAIRS = [{"prompt": f"{i} and", "chosen": f" make {i + 1}", "rejected": f" break {i}"} for i in range(12)]
ROWS = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]
BATCH = {"input_ids": torch.tensor([TOKENIZER(" 5 and make 6")["input_ids"]])}


def base_model(**overrides: Any) -> Any:
    return tiny_model("olmoe", vocab_size=259, **overrides)


def config_for(base: Any, **options: Any) -> hotlora.HotLoraConfig:
    return hotlora.HotLoraConfig(plan=tiny_plan(base, PLAN), **{"r": 4, "lora_alpha": 8, **options})


def options(folder: Path, **more: Any) -> dict[str, Any]:
    common = {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no",
        "dataloader_pin_memory": False, "logging_steps": 1,
    }  # fmt: skip
    return {**common, **more}


def sft(model: Any, folder: Path, peft_config: Any = None, **more: Any) -> Any:
    return SFTTrainer(
        model, args=SFTConfig(**options(folder, **more)), train_dataset=Dataset.from_list(ROWS),
        processing_class=TOKENIZER, peft_config=peft_config,
    )  # fmt: skip


def dpo(model: Any, folder: Path, peft_config: Any = None, **more: Any) -> Any:
    return DPOTrainer(
        model, args=DPOConfig(**options(folder, **more)), train_dataset=Dataset.from_list(PAIRS),
        processing_class=TOKENIZER, peft_config=peft_config,
    )  # fmt: skip


def letters(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs among the samples of a random model."""
    return [sum(map(ord, text)) % 97 / 97 for text in completions]


def grpo(model: Any, folder: Path, peft_config: Any = None, **more: Any) -> Any:
    sizes = {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 6, "beta": 0.1}
    return GRPOTrainer(
        model, reward_funcs=letters, args=GRPOConfig(**options(folder, **{**sizes, **more})),
        train_dataset=Dataset.from_list(PAIRS).select_columns(["prompt"]), processing_class=TOKENIZER,
        peft_config=peft_config,
    )  # fmt: skip


def plain(model: Any, folder: Path, peft_config: Any = None, **more: Any) -> Any:
    """transformers' own trainer, which takes no peft_config."""
    model = model if peft_config is None else peft.get_peft_model(model, peft_config)
    ids = [TOKENIZER(row["prompt"] + row["completion"])["input_ids"][:12] for row in ROWS]
    data = [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in ids]
    return Trainer(
        model, args=TrainingArguments(**options(folder, per_device_train_batch_size=1, **more)), train_dataset=data
    )


TRAINERS = {"SFTTrainer": sft, "DPOTrainer": dpo, "GRPOTrainer": grpo, "Trainer": plain}


def base_tensors(model: Any) -> dict[str, torch.Tensor]:
    tensors = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): t for name, t in model.state_dict().items()
    }
    return {name: t.detach().clone() for name, t in tensors.items() if "lora_" not in name}


def adapter_tensors(model: Any, adapter: str = "default") -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in peft.get_peft_model_state_dict(model, adapter_name=adapter).items()}


def logits(model: Any) -> torch.Tensor:
    model = model.eval()
    with torch.no_grad():
        return model(**BATCH).logits


class Gradients(TrainerCallback):
    """Which of the base's parameters ever had a gradient."""

    def __init__(self) -> None:
        self.of_the_base: set[str] = set()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.of_the_base |= {n for n, p in model.named_parameters() if "lora_" not in n and p.grad is not None}


@pytest.mark.parametrize(
    ("name", "wrapped", "train_a"),
    [
        ("SFTTrainer", True, True), ("SFTTrainer", False, True), ("Trainer", True, True), ("DPOTrainer", False, True),
        ("GRPOTrainer", False, True),
        # TRL adds a second adapter, its reference, with the config of the first.
        ("DPOTrainer", True, True), ("GRPOTrainer", True, True),
        ("SFTTrainer", False, False), ("DPOTrainer", False, False), ("DPOTrainer", True, False),
        ("GRPOTrainer", False, False), ("GRPOTrainer", True, False),
    ],
)  # fmt: skip
def test_a_trainer_takes_the_adapter_as_it_is(name: str, wrapped: bool, train_a: bool, tmp_path: Path):
    base = base_model()
    before = base_tensors(base)
    config = config_for(base, train_a=train_a)
    model = peft.get_peft_model(base, config) if wrapped else base
    trainer = TRAINERS[name](model, tmp_path / "run", None if wrapped else config)
    gradients = Gradients()
    trainer.add_callback(gradients)
    model = trainer.model
    start = adapter_tensors(model)
    trainer.train()

    losses = torch.tensor([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert len(losses) == 3 and losses.isfinite().all()
    # Every tensor of the adapter has moved, the experts', the attention's and the router's; the base's none.
    end = adapter_tensors(model)
    assert all(any(f".{part}." in n for n in end) for part in ("experts", "self_attn", "gate"))
    assert not [n for n, tensor in end.items() if torch.equal(tensor, start[n])]
    assert not gradients.of_the_base
    after = base_tensors(model)
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)
    # What the trainer saves is a hotlora adapter.
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = hotlora.load_adapter(base_model(), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model)) and not torch.equal(logits(loaded), logits(base_model()))
    # Of the experts, exactly the planned ones are others than the base's.
    merged = loaded.merge_and_unload().state_dict()
    for layer in moe_layers(base_model()):
        for part in ("gate_up_proj", "down_proj"):
            changed = (merged[f"{layer.experts}.{part}"] != before[f"{layer.experts}.{part}"]).flatten(1).any(1)
            assert changed.nonzero().flatten().tolist() == PLAN[layer.layer]


def reference_log_probs(trainer: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A batch of the trainer, and its reference's log-probability of each response."""
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    return batch, torch.cat(trainer.compute_ref_log_probs(trainer.model, dict(batch)))


def log_probs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        scores = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    chosen = scores[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return (chosen * batch["completion_mask"][:, 1:]).sum(-1)


@pytest.mark.parametrize("wrapped", [True, False], ids=["PeftModel", "peft_config"])
def test_dpo_compares_with_the_base_model(wrapped: bool, tmp_path: Path):
    base = base_model()
    model = peft.get_peft_model(base, config_for(base)) if wrapped else base
    trainer = dpo(model, tmp_path, None if wrapped else config_for(base), learning_rate=5e-2)
    trainer.train()
    batch, reference = reference_log_probs(trainer)
    torch.testing.assert_close(reference, log_probs(base_model(), batch), rtol=1e-5, atol=1e-4)
    # The comparison is not with itself: the policy has moved away.
    assert not torch.allclose(log_probs(trainer.model, batch), reference, atol=0.1)


@pytest.mark.parametrize("way", ["plain", "frozen A", "sparse B"])
def test_dpo_on_a_trained_adapter_compares_with_what_it_was(way: str, tmp_path: Path):
    base = base_model()
    torch.manual_seed(0)
    options: dict[str, Any] = {} if way == "plain" else {"train_a": False}
    if way == "sparse B":
        options["mask"] = draw_mask(peft.get_peft_model(base_model(), config_for(base, **DENSE)), keep=0.5)
    model = peft.get_peft_model(base, config_for(base, init_lora_weights=False, **options))
    if way == "sparse B":  # which starts at zero
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1) if parameter.requires_grad else None
    model.save_pretrained(tmp_path / "sft")
    trainer = dpo(hotlora.load_adapter(base_model(), tmp_path / "sft", is_trainable=True), tmp_path / "dpo")
    trainer.train()
    batch, reference = reference_log_probs(trainer)
    before = hotlora.load_adapter(base_model(), tmp_path / "sft")
    torch.testing.assert_close(reference, log_probs(before, batch), rtol=1e-5, atol=1e-4)
    assert not torch.allclose(reference, log_probs(base_model(), batch), atol=1e-2)
    assert not torch.allclose(reference, log_probs(trainer.model, batch), atol=1e-2)


@pytest.mark.parametrize("way", ["plain", "sparse B", "tokens"])
def test_on_a_bf16_base_the_reference_is_the_adapter_bit_for_bit(way: str, tmp_path: Path):
    """PEFT casts "ref" to float32 only after it has been filled."""
    options: dict[str, Any] = {}
    if way == "sparse B":
        mask = draw_mask(peft.get_peft_model(base_model(), config_for(base_model(), **DENSE)), keep=0.5)
        options = {"train_a": False, "mask": mask}
    if way == "tokens":  # as TRL itself sets for a chat template's new tokens
        options = {"trainable_token_indices": {"embed_tokens": [3, 5]}, "modules_to_save": ["lm_head"]}
    base = base_model().to(torch.bfloat16)
    model = peft.get_peft_model(base, config_for(base, **options))
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1) if parameter.requires_grad else None
    trainer = dpo(model, tmp_path, learning_rate=0.0, max_steps=1, router_aux_loss_coef=0.0)
    default, reference = (adapter_tensors(trainer.model, name) for name in ("default", "ref"))
    assert default.keys() == reference.keys() and any("token" in key for key in default) == (way == "tokens")
    for key, tensor in default.items():
        assert tensor.dtype == reference[key].dtype and torch.equal(tensor, reference[key]), key
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses == pytest.approx([math.log(2)], abs=1e-6)


def test_grpo_generates_with_the_adapter(tmp_path: Path):
    base = base_model()
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config_for(base, init_lora_weights=False))
    seen: list[tuple[str, list[int]]] = []

    def record(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.extend(zip(prompts, completion_ids, strict=True))
        return [0.0] * len(prompts)

    # At this temperature sampling is greedy; without rewards, and without the auxiliary loss, nothing is learned.
    one_step = {"max_steps": 1, "router_aux_loss_coef": 0.0}
    trainer = GRPOTrainer(
        model, reward_funcs=record, processing_class=TOKENIZER,
        args=GRPOConfig(**options(tmp_path, **one_step, num_generations=4, max_completion_length=6, temperature=1e-4)),
        train_dataset=Dataset.from_list(PAIRS).select_columns(["prompt"]),
    )  # fmt: skip
    trainer.train()

    def greedy(model: Any, prompt: str) -> list[int]:
        ids = torch.tensor([TOKENIZER(prompt)["input_ids"]])
        out = model.eval().generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )
        return out[0, ids.shape[1] :].tolist()

    assert len(seen) == 4
    for prompt, ids in seen:
        assert ids == greedy(model, prompt) != greedy(base_model(), prompt)


@pytest.mark.parametrize("name", ["SFTTrainer", "DPOTrainer", "GRPOTrainer"])
def test_gradient_checkpointing_gives_the_same_adapter(name: str, tmp_path: Path):
    ends = []
    for checkpointing in (False, True):
        base = base_model()
        torch.manual_seed(0)
        trainer = TRAINERS[name](base, tmp_path, config_for(base), gradient_checkpointing=checkpointing)
        trainer.train()
        ends.append(adapter_tensors(trainer.model))
    for key, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][key], tensor, rtol=1e-3, atol=1e-5)


def test_on_a_bf16_base_the_adapter_stays_in_float32(tmp_path: Path):
    base = base_model().to(torch.bfloat16)
    trainer = sft(base, tmp_path, config_for(base), bf16=True)
    trainer.train()
    tensors = adapter_tensors(trainer.model)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert all(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


def test_transformers_own_add_adapter(tmp_path: Path):
    """`PreTrainedModel.add_adapter` needs no PeftModel; what it saves is the same file."""
    model = base_model()
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):  # 5.24 wants 0.22, which is not released
        with pytest.raises(ValueError, match="version of PEFT you are using is not compatible"):
            model.add_adapter(config_for(model))
        return
    before = logits(model)
    torch.manual_seed(0)
    model.add_adapter(config_for(model, init_lora_weights=False))
    tuned = logits(model)
    assert not torch.allclose(tuned, before, atol=0.1)
    model.disable_adapters()
    assert torch.equal(logits(model), before)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(hotlora.load_adapter(base_model(), tmp_path)), tuned)
    again = base_model()
    again.load_adapter(str(tmp_path))
    assert torch.equal(logits(again), tuned)
    for parameter in model.parameters():  # transformers writes the config first, while the old weights lie there
        torch.nn.init.normal_(parameter, std=0.1) if parameter.requires_grad else None
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(hotlora.load_adapter(base_model(), tmp_path)), logits(model))


def test_a_model_prepared_for_quantized_training_takes_the_adapter(tmp_path: Path):
    base = peft.prepare_model_for_kbit_training(base_model())
    trainer = sft(peft.get_peft_model(base, config_for(base)), tmp_path)
    trainer.train()
    assert all(tensor.any() for name, tensor in adapter_tensors(trainer.model).items() if "lora_B" in name)


def test_a_config_serves_two_models():
    config = config_for(base_model())
    for _ in range(2):
        model = peft.get_peft_model(base_model(), config)
        assert logits(model).isfinite().all()


def test_peft_loads_what_it_saved(tmp_path: Path):
    base = base_model()
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config_for(base, init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base_model(), tmp_path)), logits(model))
