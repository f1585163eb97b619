"""One forward: logits at the positions that are wanted, and short probes of what a family does with packed rows and
with padding, before anything long begins.

The probes run the model at hand. A list of names would not know a new family, nor that the kernels which keep packed
sequences apart are installed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..base.errors import HotLoraError, ModelError
from ..base.precision import say_if_slow
from ..base.processes import device_of, is_sharded

# Mean relative changes of the logits. In bfloat16 the order of sums changes them by less than 0.01, as a rule. A text
# that sees another changes by 0.2 and more, windows that are shifted change it by 0.1. Packing is refused for it, so
# there is more room; padding is only avoided.
_MIXED, _SHIFTED = 0.05, 0.02
_NOISE = 5  # times what the first text of a packed row, which sees no other, changes by
TEXTS = ("Ann has 3 apples and buys 4 more of them.", "List the names of all singers, the oldest one first.")
"""What a model may be probed with where there are no texts of its own."""
PROBED = 32  # tokens of a text
_PADDED = 512


def logits_at(model: Any, inputs: Mapping[str, Any], positions: Tensor) -> Any:
    """The model's outputs with logits `[B, P, V]` at `positions` `[P]`; no cache is made.

    The LM head runs there alone, but for families that take no `logits_to_keep` and drop it without a word.
    """
    outputs = model(**inputs, use_cache=False, logits_to_keep=positions)
    if outputs.logits.shape[1] != len(positions):
        outputs.logits = outputs.logits[:, positions.to(outputs.logits.device)]
    return outputs


def hidden_at(model: Any, inputs: Mapping[str, Any], positions: Tensor, head: nn.Module) -> tuple[Any, Tensor]:
    """The model's outputs, and what its LM head is given at `positions` `[P]`: `[B, P, D]`. The head itself runs at one
    position of a row, and those are the logits of the outputs.

    model: one of which `logits_are_the_heads` is true, or a wrapper of it.
    """
    given: list[Tensor] = []

    def one_position(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        given.append(args[0])
        return (args[0][:, :1], *args[1:])

    handle = head.register_forward_pre_hook(one_position)
    try:
        outputs = model(**inputs, use_cache=False, logits_to_keep=positions)
    finally:
        handle.remove()
    (hidden,) = given
    return outputs, hidden if hidden.shape[1] == len(positions) else hidden[:, positions]


LOGITS = 2**24
"""Logits that are there at a time: 64 MB in float32. One label's are made at once, however many."""
_plain_heads: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def head_for_chunks(model: Any, labels_BP: Tensor, ids: Sequence[int]) -> nn.Module | None:
    """The LM head, where the logits of `labels_BP` are too many to hold and can be had in chunks.

    ids: a text, to try once whether the family's logits are its head's.
    """
    if labels_BP.numel() * model.config.get_text_config().vocab_size <= LOGITS or is_sharded(model):
        return None
    if model not in _plain_heads:
        _plain_heads[model] = logits_are_the_heads(model, ids)
        # torch 2.10 (2.13 does not) hands on what autocast has cast without gradients: the step would train none of it.
        torch.clear_autocast_cache()
    return model.get_output_embeddings() if _plain_heads[model] else None


def logits_are_the_heads(model: Any, ids: Sequence[int]) -> bool:
    """Whether a family's logits are what its LM head puts out, as it is called once on hidden states `[B, P, D]`.

    Some families scale or cap them afterwards (granite, cohere, gemma). ids: a text, of which the first tokens are run.
    """
    head = model.get_output_embeddings()
    if head is None:
        return False
    calls: list[tuple[tuple[Any, ...], Tensor]] = []
    handle = head.register_forward_hook(lambda _, args, output: calls.append((args, output)))
    row = torch.tensor([list(ids[:PROBED])], device=device_of(model))
    try:
        with inference(model):
            logits = model(input_ids=row, use_cache=False, logits_to_keep=torch.arange(1, device=row.device)).logits
    finally:
        handle.remove()
    if len(calls) != 1 or not calls[0][0] or not isinstance(calls[0][0][0], Tensor) or calls[0][0][0].dim() != 3:
        return False
    return torch.equal(logits.float(), calls[0][1].float())


def check_aux_loss(config: PreTrainedConfig, coefficient: float) -> None:
    """HotLoraError where the router's load-balancing loss is asked for and the family has none."""
    if coefficient and not hasattr(config.get_text_config(), "router_aux_loss_coef"):
        raise HotLoraError(
            f"aux_loss_coef = {coefficient}, and transformers computes no load-balancing loss for this "
            f"{config.model_type} model: leave out --aux-loss-coef."
        )


def check_aux_loss_of(model: Any, text: Sequence[int], coefficient: float) -> None:
    """HotLoraError where it is asked for and the model gives none, though its config says otherwise: with transformers
    5.17 granitemoe's is 0, and minimax_m3_vl has none. text: token ids, of which the first few are run."""
    check_aux_loss(model.config, coefficient)
    if not coefficient:
        return
    ids = torch.tensor([list(text[:PROBED])], device=device_of(model))
    with inference(model):
        outputs = model(input_ids=ids, use_cache=False, output_router_logits=True)
    if not getattr(outputs, "aux_loss", None):
        raise HotLoraError(
            f"aux_loss_coef = {coefficient}, and the installed transformers computes no load-balancing loss for this "
            f"{model.config.model_type} model: leave out --aux-loss-coef, or install a newer transformers."
        )


def check_packing(model: Any, texts: Sequence[Sequence[int]]) -> None:
    """ModelError where two texts in one packed row, as TRL makes it, do not come out as each of them alone.

    texts: token ids of at least two texts, which should differ; of each the first few are run.
    """
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    first, second = (list(text[:PROBED]) for text in texts[:2])
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    packed = collate([{"input_ids": first + second, "seq_lengths": [len(first), len(second)]}])
    del packed["labels"]

    with inference(model):
        check_apart(
            lambda **inputs: model(**inputs, use_cache=False).logits, _on(device_of(model), packed), model,
            "leave out --packing (packing=False)",
        )  # fmt: skip


def check_apart(run: Callable[..., Tensor], packed: Mapping[str, Any], model: Any, advice: str) -> None:
    """ModelError where `run` gives other outputs `[1, S, D]` for a packed row than for each of its two texts alone.

    packed: input_ids `[1, S]`, position_ids `[1, S]`, and what else tells the texts apart. advice: what to do then.
    """
    model_type, ids = model.config.model_type, packed["input_ids"]
    length = int((packed["position_ids"][0] == 0).nonzero()[1])  # of the first text
    parts = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in (ids[:, :length], ids[:, length:])]
    try:
        together = run(**packed)
        noise = _change(together[:, :length], run(**parts[0]))
        mixed = _change(together[:, length:], run(**parts[1]))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of every kind: families refuse packed rows in ways of their own
        told = str(error).strip().split("\n")[0].rstrip(". ")
        raise ModelError(f"this {model_type} model does not run packed examples ({told}): {advice}.") from error
    if mixed > max(_MIXED, _NOISE * noise):
        raise ModelError(
            f"this {model_type} model does not keep packed examples apart: those in one row see each other, and the "
            f"logits of a text change by {mixed:.0%} after another one; {advice}."
        )


def padding_matters(model: Any, ids: Sequence[int]) -> bool:
    """Whether one pad on the left changes the logits after a text, though it is masked.

    So it is where a family looks at windows of the row that are counted from its first column, as deepseek_v4's
    compressed attention does.

    ids: a text as long as the model is to meet, of which the first 512 tokens are run; one token again and again
    would show little.
    """
    row = torch.tensor([list(ids[:_PADDED])])
    last = torch.arange(max(0, row.shape[1] - PROBED), row.shape[1])
    padded, mask = (torch.nn.functional.pad(tensor, (1, 0)) for tensor in (row, torch.ones_like(row)))
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # as `generate` gives them

    def run(positions_wanted: Tensor, **inputs: Tensor) -> Tensor:
        device = device_of(model)
        return logits_at(model, _on(device, inputs), positions_wanted.to(device)).logits

    with inference(model):
        alone = run(last, input_ids=row, attention_mask=torch.ones_like(row))
        shifted = run(last + 1, input_ids=padded, attention_mask=mask, position_ids=positions)
    return _change(shifted, alone) > _SHIFTED


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; then each module's own flag again, for frozen parts may differ from the whole."""
    training = [module for module in model.modules() if module.training]
    weights = next(model.parameters())
    say_if_slow(weights.device, weights.dtype)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _change(found: Tensor, expected: Tensor) -> float:
    """Mean over positions of the distance of two outputs `[1, S, D]`, relative to the expected one's spread."""
    found, expected = (x.float() - x.float().mean(-1, keepdim=True) for x in (found, expected))
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-9)).mean())


def _on(device: torch.device, inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
