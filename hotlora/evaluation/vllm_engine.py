"""Answers by vLLM, where it is installed: the same prompts, token by token, and the adapter as `export` writes it.

Written for vLLM 0.32 and 0.33, and run with 0.32's build for CPUs (docs/evaluation.md). vLLM's own kernels and batches
round differently, so answers may differ from transformers' in places. Its samples are seeded by prompt and number, too,
and are others than transformers' for the same seed.
"""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..adapter.formats.vllm import room_for
from ..adapter.load import CONFIG_FILE
from ..base.errors import HotLoraError
from ..base.files import read_json
from ..hf.models import context_length
from ..tasks import Example
from ..tasks.ends import turn_ends
from ..tasks.tokens import encode_prompt
from .generate import GREEDY, Answer, Sampling, check_batches, cut, track

_AT_ONCE = 512  # answers given to the engine together: so many are lost at most where it is stopped


def check_vllm() -> None:
    """Raises HotLoraError where vLLM is not installed."""
    try:
        from vllm import LLM  # noqa: F401  (what vLLM needs itself is missed only here)
    except ImportError as error:
        raise HotLoraError(
            f"the engine vllm cannot be used ({error}): pip install vllm, which needs a GPU that it supports, or leave "
            "--engine out."
        ) from error


def length_needed(config: Any, tokenizer: Any, examples: Sequence[Example], max_new_tokens: int) -> int | None:
    """Tokens of the longest prompt and its answer; None where the model's window is shorter, or is not known."""
    window = context_length(config, tokenizer)
    needed = max((len(encode_prompt(example, tokenizer)) for example in examples), default=0) + max_new_tokens
    return needed if window is not None and needed <= window else None


def load_engine(
    model: str, adapter: str | Path | None = None, *, dtype: str = "auto", max_model_len: int | None = None
) -> tuple[Any, Any]:
    """A vLLM engine and the request for its adapter, which is None without one.

    Args:
        model: a folder or a hub id.
        adapter: the folder of an adapter that was exported in the format "vllm".
        max_model_len: tokens of the longest request, for which vLLM must have room to start at all; None: the model's
            window, of which a small card has no room.
    """
    check_vllm()
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    given: dict[str, Any] = {"model": model, "dtype": dtype}
    given |= {"max_model_len": max_model_len} if max_model_len is not None else {}
    if adapter is None:
        return LLM(**given), None
    rank = read_json(Path(adapter) / CONFIG_FILE)["r"]
    room = room_for(rank)
    # The last option: a pair of matrices for each expert is read as such where the family's experts are fused, too.
    engine = LLM(**given, enable_lora=True, max_loras=1, max_lora_rank=room, enable_mixed_moe_lora_format=True)
    return engine, LoRARequest("hotlora", 1, str(adapter))


def vllm_answers(
    engine: Any,
    request: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    sampling: Sampling = GREEDY,
    ends: Collection[int] = (),
    done: Collection[int] = (),
    progress: bool = False,
) -> Iterator[list[Answer]]:
    """Answers as they come, as of `generate.answer_batches`; the engine makes its own batches.

    ends: tokens that end an answer, besides those that the engine takes from the base's files.
    """
    from vllm import SamplingParams

    check_batches(examples, 1)
    if any(example.text is not None for example in examples):
        ends = {*ends, *turn_ends(tokenizer)}
    rows = [(i, sample) for i in range(len(examples)) if i not in done for sample in range(sampling.samples)]
    for start in track(range(0, len(rows), _AT_ONCE), "generating", progress):
        some = rows[start : start + _AT_ONCE]
        params = [
            SamplingParams(
                temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=max_new_tokens,
                stop=list(stop) or None, stop_token_ids=sorted(ends) or None,
                seed=sampling.seed_of(examples[i], sample) if sampling.temperature else None,
            )
            for i, sample in some
        ]  # fmt: skip
        prompts = [{"prompt_token_ids": encode_prompt(examples[i], tokenizer)} for i, _ in some]
        outputs = engine.generate(prompts, params, lora_request=request, use_tqdm=False)
        yield [
            Answer(i, s, cut(out.outputs[0].text, stop), out.outputs[0].finish_reason == "length")
            for (i, s), out in zip(some, outputs, strict=True)
        ]
