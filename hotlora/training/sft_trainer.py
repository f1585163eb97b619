"""TRL's `SFTTrainer`, wired: loss on the response only, and what it must not do is left out."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PrinterCallback, SchedulerType, TrainerCallback
from trl import SFTConfig, SFTTrainer

from ..adapter.linears import own_dtype_kept
from ..base.errors import FileError, HotLoraError
from ..base.precision import say_if_slow, say_once
from ..base.processes import device_of, is_sharded, num_processes, wants_checkpointing
from ..base.quiet import quiet
from ..base.signals import say
from ..hf.forward import TEXTS
from ..hf.peft_hooks import resuming
from ..tasks.tokens import IGNORE
from . import checkpoints, extend, guard
from .activation_offloading import check_activation_offloading
from .as_loaded import LoadedConfigs
from .config import TrainConfig
from .gradient_checkpointing import checkpoint_kwargs
from .labelled_loss import LabelledLoss
from .named import schedule_options
from .trackers import trackers
from .validation import Validation

# TRL's own default is on, under either name; setting the older one warns in a transformers that has the
# newer.
_OPTIONS = {field.name for field in fields(SFTConfig)}
_MOST_SKIPPED = 20
"""steps that loss scaling may skip in a row: by then it has made the loss a million times smaller, and no gradient that
is a number overflows"""
_CHECKPOINTING = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in _OPTIONS)


def make_trainer(
    model: Any,
    tokenizer: Any,
    dataset: Dataset,
    config: TrainConfig,
    folder: Path,
    callbacks: list[TrainerCallback] | None = None,
) -> "Trainer":
    """TRL's trainer, wired: pre-tokenized data, response-only loss, no auxiliary loss unless asked for."""
    on_cpu = device_of(model).type == "cpu"
    # Of the embedding, which is never quantized; offloaded it is no parameter.
    dtype = model.get_input_embeddings().weight.dtype
    bf16 = dtype == torch.bfloat16
    check_activation_offloading(config.activation_offloading, device_of(model))
    say_if_slow(device_of(model), dtype)
    recomputes, sharded = config.gradient_checkpointing or wants_checkpointing(), is_sharded(model)
    checkpointing: dict[str, Any] = {_CHECKPOINTING: recomputes}
    arguments = SFTConfig(
        **checkpointing,
        activation_offloading=config.activation_offloading,
        output_dir=str(folder),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler,
        lr_scheduler_kwargs=schedule_options(config),
        warmup_steps=config.warmup_length if config.lr_scheduler != "constant" else 0,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm,
        optim=config.optim,
        neftune_noise_alpha=config.neftune_noise_alpha,
        seed=config.seed,
        data_seed=config.seed,
        bf16=bf16,  # autocast follows the base model: adapters are float32 on it
        fp16=dtype == torch.float16 and not on_cpu,  # with loss scaling, which Accelerate has for GPUs alone
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        # TRL's None would mean the model's own coefficient: on.
        router_aux_loss_coef=config.aux_loss_coef,
        max_length=config.max_length if config.packing else None,  # the data is cut already
        packing=config.packing,
        # Every step is written, so that a resumed run averages over the same steps as one that was not
        # killed.
        logging_steps=1,
        # It would write a mean of the losses before in place of a NaN, and wait for the device to find one.
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all" if config.packing else "non_padding",
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=config.save_total_limit,
        report_to=trackers(config.report_to) or "none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # a frozen A is one, and the same everywhere
        save_only_model=sharded,
    )
    _train_on_one_gpu(arguments)
    with quiet(), own_dtype_kept(model):
        trainer = (CpuTrainer if on_cpu else Trainer)(
            model=model,
            args=arguments,
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
    # transformers refuses to save the optimizer of a model that is spread over processes. Ours has the adapter's
    # parameters alone, and those are whole in each.
    trainer.args.save_only_model = False
    trainer.examples = dataset
    if isinstance(trainer, CpuTrainer):
        trainer.labelled_loss = LabelledLoss(model, tokenizer(TEXTS[0])["input_ids"])
    trainer.remove_callback(PrinterCallback)
    if recomputes:
        trainer.add_callback(_KeepRouting())
    return trainer


def _train_on_one_gpu(arguments: SFTConfig) -> None:
    """A process by itself trains on the GPU that its model is on, as a training over several asks for a launcher:
    transformers would copy the model to all GPUs that it sees (nn.DataParallel), which TRL refuses."""
    if num_processes() == 1 and (gpus := arguments.n_gpu) > 1:
        arguments._n_gpu = 1
        say_once(
            f"{gpus} GPUs are here, and one of them trains. For all: torchrun --nproc-per-node {gpus} -m hotlora train "
            "…, or in a notebook accelerate's notebook_launcher."
        )


class Trainer(SFTTrainer):
    """TRL's, which writes a card into every checkpoint and reports usage to its makers; this one does not. It ends at a
    step whose loss or gradients are no finite numbers, before that step is saved."""

    examples: Dataset
    batches: list[Any]
    configs: LoadedConfigs | None = None
    validation: Validation | None = None
    extended: Sequence[dict[str, int]] = ()
    skipped = 0
    """steps until now, in a row, that loss scaling skipped"""

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        own = map(self._own_rows, epoch_iterator)
        self.batches, count = super().get_batch_samples(own, num_batches, device)
        return self.batches, count

    def _own_rows(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Without the rows that Accelerate has read a second time, to give each process as many at an epoch's end. A
        process that has no others takes part with two tokens that have no label."""
        state, size = self.accelerator.gradient_state, self.args.per_device_train_batch_size
        rows = len(batch["input_ids"])
        whole = not state.end_of_dataloader or state.remainder < 1
        if self.accelerator.num_processes == 1 or whole or getattr(self.args, "packing", False) or rows != size:
            return batch
        own = min(max(state.remainder - self.accelerator.process_index * size, 0), size)
        if own:
            return {name: value[:own] for name, value in batch.items()}
        nothing = {name: value[:1, :2] for name, value in batch.items()}
        return nothing | {"labels": torch.full_like(nothing["labels"], IGNORE)}

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if self.accelerator.num_processes > 1 and (inputs["labels"] == IGNORE).all():
            inputs = {name: torch.zeros_like(value) for name, value in inputs.items()}
        super()._track_num_input_tokens(inputs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        # Every process has the same numbers here, since they are logged.
        if "loss" in logs:
            self._check(logs)
        if self.validation is not None and "loss" in logs and self.state.global_step in self.validation.found:
            step = self.state.global_step
            logs = {**logs, "eval_loss": self.validation.found[step], **self.validation.scores.get(step, {})}
        super().log(logs, *args, **kwargs)

    def _check(self, logs: dict[str, float]) -> None:
        # A step that loss scaling skips, since its scaled gradients overflow, is none; a loss is never scaled here.
        is_skipped = self.accelerator.optimizer_step_was_skipped
        counted = {"loss"} if is_skipped else {"loss", "grad_norm"}
        if wrong := guard.not_finite({name: logs[name] for name in counted & logs.keys()}):
            self._end(f"{wrong}, in the batch of")
        self.skipped = self.skipped + 1 if is_skipped else 0
        step = self.state.global_step
        is_last = step == self.state.max_steps or (self.validation is not None and self.validation.is_over)
        # Loss scaling skips a NaN just as an overflow: such a training would end well, and have learned nothing.
        if self.skipped >= _MOST_SKIPPED or (is_last and self.skipped == step > 0):
            steps = f"of {self.skipped} steps in a row"
            self._end(f"the gradients {steps} are not finite, so that loss scaling skipped all of them; the last had")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if broken := guard.broken_weights(model):
            self._end(f"{broken} trained tensors hold numbers that are not finite, after the batch of")
        super()._save_checkpoint(model, trial)

    def _end(self, what: str) -> None:
        named = guard.name_examples(guard.examples_of(self.batches, self.examples))
        last = checkpoints.last_complete(Path(str(self.args.output_dir)))
        raise HotLoraError(
            f"step {self.state.global_step}: {what} the training examples {named} (counted from 0). This step is not "
            f"saved; {f'the last good adapter is in {last}' if last else 'there was no checkpoint before it'}. Look at "
            "these examples, or begin anew in another folder: a smaller learning rate, more warm-up, another dtype."
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model: Any = self.model
        if state_dict is None and is_sharded(model):  # or PEFT would gather the whole base model, to leave it out
            state_dict = {name: value for name, value in model.state_dict().items() if "lora_" in name}
        with self.configs.restored() if self.configs else nullcontext(), _names_as_in_memory(model):
            super()._save(output_dir, state_dict)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _send_telemetry(self) -> None:
        pass

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.args.device.type == "cpu":
            _know_numbered_cpus()
        with self._read_from(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        if self.extended and hasattr(self.lr_scheduler, "lr_lambdas"):  # DeepSpeed has a schedule of its own
            before, now = extend.follow_schedule(self.optimizer, self.lr_scheduler)
            if self.extended[-1]["step"] == self.state.global_step and before != now:
                kind = SchedulerType(self.args.lr_scheduler_type).value
                say(
                    f"from step {self.state.global_step} on the learning rate is that of a {kind} schedule of "
                    f"{self.state.max_steps} steps: {now:.3g}, where it was {before:.3g}"
                )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with self._read_from(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with self._read_from(resume_from_checkpoint), resuming():
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """ValueError: a weight is not in the checkpoint. transformers warns, and trains on with the base's."""
        model: Any = self.model
        state: dict[str, Any] = model.state_dict(keep_vars=True)
        found = {id(tensor) for name, tensor in state.items() if name not in load_result.missing_keys}
        if lost := [name for name in load_result.missing_keys if id(state[name]) not in found]:  # or they are tied
            raise ValueError(
                f"{len(lost)} of the model's weights are not in it, such as {lost[0]}; an earlier hotlora wrote full "
                "checkpoints so"
            )

    @contextmanager
    def _read_from(self, checkpoint: str | None) -> Iterator[None]:
        """A checkpoint with a file that is no such file, or another training's, is one FileError."""
        try:
            yield
        except (HotLoraError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever torch, pickle's reader and safetensors have to say of it
            reason = (
                f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason'}"
            )
            raise FileError(
                f"training cannot resume from {checkpoint}: one of its files was replaced, or is of another training "
                f"({reason}). Restore it, or delete this checkpoint to resume from the one before."
            ) from error


@contextmanager
def _names_as_in_memory(model: Any) -> Iterator[None]:
    """A fully trained model is saved with the names that it has here. By default transformers writes those of the
    family's own files, as experts one by one, which its trainer does not know when it goes on from a checkpoint."""
    if isinstance(model, PeftModel):
        yield
        return
    model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    try:
        yield
    finally:
        del model.save_pretrained


@functools.cache
def _know_numbered_cpus() -> None:
    """In several processes on a CPU transformers 5.17 has torch.load put the optimizer's state on "cpu:0", and torch
    knows no such place."""
    torch.serialization.register_package(
        100, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None
    )


class CpuTrainer(Trainer):
    """With the loss at the labels alone: see labelled_loss."""

    labelled_loss: LabelledLoss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if return_outputs:  # evaluation inside the trainer, which is not ours
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        with self.accelerator.autocast():
            outputs, loss, count = self.labelled_loss(model, inputs, labels)
        loss = loss / torch.as_tensor(count if num_items_in_batch is None else num_items_in_batch).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the count is of every process, and DDP averages
        if self.aux_loss_enabled:  # each process's own, of which DDP's average is the loss
            steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
        return loss


class _KeepRouting(TrainerCallback):
    """Gradient checkpointing that keeps each layer's choice of experts. The trainer has switched it on when training
    begins; its arguments, which are written to files, could not hold a function."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        chosen = getattr(args, f"{_CHECKPOINTING}_kwargs") or {}
        if not chosen.get("use_reentrant"):  # as DeepSpeed's stage 3 wants it
            getattr(model, f"{_CHECKPOINTING}_enable")({**chosen, **checkpoint_kwargs()})
