"""A model's answer to one prompt or conversation, as it is written: for people, not for scores."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from ..base.errors import DataError, HotLoraError
from ..base.processes import device_of
from ..tasks import Example
from ..tasks.tokens import encode_prompt
from .generate import GREEDY, Sampling, end_ids, generation, written


def prompt_ids(
    tokenizer: Any,
    prompt: str | Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a plain prompt, as in training on prompts and completions; or of a conversation, by the tokenizer's
    chat template, with what opens the assistant's answer.

    tools, chat_template_kwargs: what the template is given besides, as `apply_chat_template` takes it.

    DataError: a conversation, and the tokenizer has no chat template, or the template refuses it.
    """
    if isinstance(prompt, str):
        return encode_prompt(Example(prompt, ""), tokenizer)
    if tokenizer.chat_template is None:
        raise DataError(
            "This model's tokenizer has no chat template: prompt it with plain text (hotlora generate --raw), as "
            "'User: …', a blank line and 'Assistant:' where it was trained on conversations without one."
        )
    try:
        text = tokenizer.apply_chat_template(
            list(prompt), tools=tools, tokenize=False, add_generation_prompt=True, **(chat_template_kwargs or {})
        )
    except Exception as error:  # whatever a template raises
        raise DataError(f"the chat template refuses the conversation: {error}") from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def check_answering(max_new_tokens: int, sampling: Sampling) -> None:
    """HotLoraError: what `answer` refuses, whatever the model."""
    if max_new_tokens < 1:
        raise HotLoraError(f"max_new_tokens = {max_new_tokens} is out of range: it must be 1 or more.")
    if not 0 <= sampling.seed < 2**63:
        raise HotLoraError(f"seed = {sampling.seed} is out of range: it must be 0 or more and below 2^63.")


def answer(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_new_tokens: int = 512,
    sampling: Sampling = GREEDY,
    stream: bool = False,
    ends: Sequence[int] | None = None,
) -> str:
    """What the model writes after `prompt`, up to its end.

    Args:
        prompt, tools, chat_template_kwargs: as `prompt_ids` takes them.
        sampling: how tokens are drawn.
        stream: also print it, as it comes.
        ends: `generate.end_ids` of the model, where several answers are asked for; to find them takes some renderings.
    """
    check_answering(max_new_tokens, sampling)
    ids = prompt_ids(tokenizer, prompt, tools, chat_template_kwargs)
    drawing: dict[str, Any] = {}
    if sampling.temperature > 0:
        drawing = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    ends = end_ids(model, tokenizer, chat=not isinstance(prompt, str)) if ends is None else ends
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=list(ends), pad_token_id=tokenizer.pad_token_id or 0, **drawing
    )
    torch.manual_seed(sampling.seed)
    given = torch.tensor([ids], device=device_of(model))
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    with generation(model):
        output = model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), generation_config=config, streamer=streamer
        )
    return written(tokenizer, [ids], [output[0, len(ids) :].tolist()])[0]
