"""Names that people know from TRL, transformers, PEFT, LLaMA-Factory, Axolotl and Unsloth, and what they are here; for
errors about options that do not exist. (Names that are taken as they are: `options.ALIASES`.)"""

MEANT = {
    "lr": "learning_rate", "steps": "max_steps", "num_epochs": "epochs", "epoch": "epochs", "scheduler": "lr_scheduler",
    "optimizer": "optim", "micro_batch_size": "batch_size", "eval_strategy": "eval_steps",
    "evaluation_strategy": "eval_steps", "save_strategy": "save_steps", "early_stopping": "early_stopping_patience",
    "model_name": "model", "model_name_or_path": "model", "base_model": "model", "dataset": "data",
    "dataset_name": "data", "task": "data", "dataset_path": "data", "train_dataset": "data", "train_file": "data",
    "eval_dataset": "test_data", "validation_file": "test_data", "val_size": "test_split", "val_set_size": "test_split",
    "test_size": "test_split", "max_samples": "limit", "hub_model_id": "push_to_hub",
    "adapter_name_or_path": "on_top_of", "random_state": "seed", "data_seed": "seed",
    "rank": "r", "lora_r": "r", "lora_rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout",
    "moe_rank_scaling": "normalize_moe_lora",
    "finetuning_type": "method",
    "cutoff_len": "max_length", "max_len": "max_length", "max_seq_len": "max_length", "sequence_len": "max_length",
    "bf16": "dtype bfloat16", "fp16": "dtype float16", "torch_dtype": "dtype", "load_in_4bit": "quantize 4",
    "load_in_8bit": "quantize 8", "quantization_bit": "quantize",
    "use_gradient_checkpointing": "gradient_checkpointing",
    "flash_attn": "attn_implementation flash_attention_2", "flash_attention": "attn_implementation flash_attention_2",
    "use_flash_attention_2": "attn_implementation flash_attention_2",
    "assistant_only_loss": "train_on assistant", "completion_only_loss": "train_on assistant",
    "train_on_inputs": "train_on all", "train_on_prompt": "train_on all", "mask_history": "train_on last",
    "dataset_text_field": "columns text=NAME",
}  # fmt: skip
"""Their name -> ours, with a value where it has one."""

_TARGETS = (
    "attention, the router, shared experts and the planned experts are adapted; train_attention, train_router and "
    "train_shared say whether the first three are (--no-attention, --no-router, --no-shared)"
)
NEEDLESS = {
    "target_modules": _TARGETS, "lora_target": _TARGETS, "target_parameters": _TARGETS,
    "logging_steps": "metrics.jsonl and the trackers get each step",
    "resume_from_checkpoint": "the same command again goes on from the last checkpoint",
    "overwrite_output_dir": "a run's folder is never overwritten; give another one",
    "do_train": "train trains", "do_eval": "train evaluates where there is test data",
    "template": "the model's own chat template is used",
    "eos_token": "generation also stops at the token with which the chat template ends a turn",
    "trust_remote_code": "the code of a model's folder is never run",
    "deepspeed": "accelerate launch takes its config", "fsdp": "accelerate launch takes its config",
}  # fmt: skip
"""Their name -> why there is none here."""
