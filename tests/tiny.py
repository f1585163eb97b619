"""Tiny models of every supported family: seeded, float32, built in milliseconds. Shared by all tests."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import AutoConfig

FAMILIES = ("olmoe", "mixtral", "qwen2_moe", "qwen3_moe")

# initializer_range is far above the usual 0.02, so that a random router has opinions and no near-ties.
_COMMON = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_FAMILY: dict[str, dict] = {
    "olmoe": {"num_experts": 8, "intermediate_size": 16},
    "mixtral": {"num_local_experts": 8, "intermediate_size": 16},
    "qwen2_moe": {
        "num_experts": 8,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
    },
    "qwen3_moe": {"num_experts": 8, "intermediate_size": 48, "moe_intermediate_size": 16, "head_dim": 8},
}


def tiny_config(family: str, **overrides) -> PreTrainedConfig:
    """A config of `family`: E=8, K=2, D=32, F=16, two layers. `num_experts` is taken in every family."""
    values = {**_COMMON, **_FAMILY[family], **overrides}
    if family == "mixtral" and "num_experts" in overrides:
        values["num_local_experts"] = values.pop("num_experts")
    return AutoConfig.for_model(family, **values)


def tiny_model(family: str = "olmoe", *, seed: int = 0, **overrides) -> PreTrainedModel:
    """A causal LM of `family` in eval mode, float32 on the CPU; the same weights for the same arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides), dtype=torch.float32)
    return model.eval()


def tiny_batch(batch: int = 2, length: int = 9, *, seed: int = 0, vocab_size: int = 128) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` `[B, S]`, without special ids; half of the rows are right-padded."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, vocab_size, (batch, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for row in range(batch // 2, batch):
        input_ids[row, length - 2 :] = 0
        attention_mask[row, length - 2 :] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def tiny_plan(model: PreTrainedModel, experts: dict[int, list[int]] | None = None) -> dict:
    """A plan for `model` as plain data: experts 1, 3, 6 of every MoE layer, or those given."""
    from hotlora.hf.moe_layers import fingerprint, moe_layers

    layers = moe_layers(model)
    chosen = {layer.layer: [1, 3, 6] for layer in layers} if experts is None else experts
    return {
        "version": 1,
        "experts": {str(layer): list(ids) for layer, ids in chosen.items()},
        "num_experts": layers[0].num_experts,
        "rule": "hot",
        "params": {"experts_per_layer": 3, "signal": "count"},
        "profile_hash": None,
        "fingerprint": fingerprint(model),
    }


def fill(model, seed: int, adapter: str = "default", scale: float = 0.1) -> None:
    """Random values in an adapter's factors, so that it does something."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and f".{adapter}" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
