"""`hotlora.verify_export`: an export in an engine, beside the adapter in our own model."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter.formats.export import holds_router
from ..adapter.load import load_adapter, planned_experts
from ..base.errors import HotLoraError
from ..base.quiet import quiet
from ..hf.models import checked_device, load_model, load_tokenizer, model_source, structure
from ..runs.checks import check_adapters
from ..runs.folder import underneath
from ..runs.load import find
from ..tasks.data import load_examples
from ..tasks.tokens import tokenize
from .call import ask, check_engine, engine_named
from .expected import Effects, effects, kinds_of, log_probs, tokens_asked
from .exported import Exported, check_belongs, check_source, read_export
from .runner import Request
from .texts import DRAWN, LENGTH, Part, chosen, given_texts, random_texts, routes_of, uses_of
from .verdict import Verdict, judge

_POOLS = 2
"""pools of random texts that are looked through for experts that are rarely used"""


@dataclass(frozen=True)
class Verification:
    """What came out of `verify_export`."""

    engine: str
    versions: dict[str, str]
    """Of the engine and what it stands on."""
    dtype: str
    """What the engine computed in."""
    device: str
    note: str
    """What of the engine was not its own; mostly nothing."""
    num_texts: int
    verdict: Verdict
    own_seconds: float
    """In our own model, loading left out."""
    engine_seconds: float
    """In the engine, loading included."""

    @property
    def is_applied(self) -> bool:
        """Whether the engine gives the adapted model's answers. Experts that cannot be told are not passed by it."""
        return self.verdict.applied == "yes"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; an expert is [layer, id]."""
        verdict = {**vars(self.verdict), "parts": [vars(part) for part in self.verdict.parts]}
        return {**vars(self), "is_applied": self.is_applied, "verdict": verdict}


def verify_export(
    export: str | Path,
    adapter: str | Path,
    *,
    engine: str,
    python: str | Path | None = None,
    model: str | None = None,
    engine_base: str | Path | None = None,
    data: str | None = None,
    num_texts: int = 2,
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
) -> Verification:
    """Whether an engine that has loaded an exported adapter applies it, expert by expert.

    Some texts that reach every adapted expert are scored by the engine, with the base and with the export, and by our
    own model: with the adapter, without, and with each expert's update left out. What the engine shows is held against
    these (`docs/verify.md`).

    Args:
        export: what `hotlora export` wrote.
        adapter: what it was exported from: a run's folder, or a saved adapter.
        engine: a name of `engines.call.ENGINES`.
        python: the interpreter of the environment that has the engine; None: this one.
        model: the base, where it is not at the place that the adapter notes.
        engine_base: the base in the engine's own format, where that is another (llama.cpp: a .gguf file).
        data: a task or rows, as `--data` takes them, whose texts are used; None: random tokens.
        num_texts: that are scored at least; more tell more experts apart where the engine rounds, and take longer.
        dtype: what the engine is to compute in, where it lets one choose: float32, bfloat16 or float16; auto: float32
            on the CPU, else the checkpoint's own. Our own model computes in the same on a GPU, in float32 on the CPU.
        device: of both, as `load_model` takes it.
        seed: of random tokens.

    Raises:
        HotLoraError: an engine that does not exist, is not installed, does not take this kind of export, or failed.
        FileError: half an export, or one for another base.
        PlanError: an adapter for another base.
    """
    interpreter = None if python is None else str(Path(python).expanduser())
    found = find(adapter, model)
    if found.adapter is None:
        raise HotLoraError(f"{adapter} is no adapter: give the run or adapter that {export} was exported from.")
    exported = read_export(export)
    takes = engine_named(engine).takes
    if exported.kind not in takes:
        raise HotLoraError(
            f"the engine {engine} loads what is exported with --format {_formats(takes)}, and {export} was with "
            f"{_formats([exported.kind])}: export in another format, or choose another engine."
        )
    if type(num_texts) is not int or not 1 <= num_texts <= DRAWN:
        raise HotLoraError(f"num_texts is {num_texts}: give 1 to {DRAWN}.")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise HotLoraError(f"dtype is {dtype!r}: give auto, float32, bfloat16 or float16.")
    check_adapters(found.model, [found.adapter], dtype=dtype, device=device)
    check_belongs(exported, structure(found.model), found.model)
    check_source(export, found.adapter)
    if below := underneath(found.model, (), found.adapter):
        raise HotLoraError(
            f"{found.adapter} was trained on top of {' and '.join(map(str, below))}: merge that first (hotlora merge), "
            "and give the merged model as --model."
        )
    if engine == "llama.cpp" and (engine_base is None or not Path(engine_base).is_file()):
        raise HotLoraError(
            f"llama.cpp takes a base of its own (--engine-base), and that is {engine_base}: give the .gguf file that "
            f"its convert_hf_to_gguf.py makes of {exported.base or found.model}."
        )
    versions = check_engine(engine, interpreter)

    ours = _in_our_model(found.model, found.adapter, exported, data, num_texts, dtype, device, seed)
    request = Request(
        base=str(engine_base or exported.base or model_source(found.model)),
        export=str(exported.path),
        is_merged=exported.kind == "merged",
        dtype=ours.dtype if dtype == "auto" else dtype,
        device=checked_device(device).type,
        texts=ours.texts.tolist(),
        tokens=ours.tokens.tolist(),
    )
    started = time.perf_counter()
    of_base, of_export, answer = ask(engine, request, interpreter)
    seconds = time.perf_counter() - started
    verdict = judge(ours.base, ours.whole, of_base, of_export, ours.effects, dtype=answer.dtype)
    return Verification(
        engine, versions, answer.dtype, answer.device, answer.note, len(ours.texts), verdict, ours.seconds, seconds
    )


def _formats(kinds: Sequence[str]) -> str:
    """What `hotlora export` calls them."""
    names = {"per-expert": "vllm or sglang", "shared-outer": "sglang-shared"}
    return " or ".join(names.get(kind, kind) for kind in kinds)


@dataclass(frozen=True)
class _Ours:
    """What our own model says: log-probabilities `[P, S - 1, C]` without and with the adapter."""

    texts: Tensor
    tokens: Tensor
    base: Tensor
    whole: Tensor
    effects: Effects
    dtype: str
    seconds: float


def _in_our_model(
    model: str, adapter: Path, exported: Exported, data: str | None, num_texts: int, dtype: str, device: str, seed: int
) -> _Ours:
    # In half precision near-ties of a router fall otherwise by rounding, here and there: that is no part's doing.
    is_exact = dtype in ("float32", "auto") if checked_device(device).type == "cpu" else dtype == "float32"
    if checked_device(device).type == "cpu":
        dtype = "float32"
    with quiet():
        net: Any = load_adapter(load_model(model, dtype=dtype, device=device), adapter)
    started = time.perf_counter()
    parts = [(layer, expert) for layer, ids in planned_experts(adapter).items() for expert in ids]
    kinds = kinds_of(net)
    format = "vllm" if exported.kind in ("per-expert", "shared-outer") else exported.kind
    if not holds_router(format, net.config.get_text_config().model_type):
        # It is in the export's own base, and so on both sides; or else it was left out.
        for router in kinds.pop("router", ()) if exported.base is None else ():
            router.scaling.update(dict.fromkeys(router.scaling, 0.0))
        kinds.pop("router", None)
    texts, uses = _texts(net, model, parts, data, num_texts, seed)
    tokens = tokens_asked(net, texts)
    whole = log_probs(net, texts, tokens)
    routes = None if is_exact else torch.stack(list(routes_of(net, texts).values()))
    changes = effects(net, texts, tokens, whole, uses, parts, kinds, routes)
    seconds, own_dtype = time.perf_counter() - started, str(net.dtype).removeprefix("torch.")
    if exported.base is not None:
        del net
        base_net: Any = load_model(exported.base, dtype=dtype, device=device)
        started = time.perf_counter()
        base = log_probs(base_net, texts, tokens)
        del base_net
    else:
        started = time.perf_counter()
        with net.disable_adapter():
            base = log_probs(net, texts, tokens)
        del net
    seconds += time.perf_counter() - started
    if torch.cuda.is_available():  # the engine is about to need it
        torch.cuda.empty_cache()
    return _Ours(texts, tokens, base, whole, changes, own_dtype, seconds)


def _texts(
    net: Any, model: str, parts: Sequence[Part], data: str | None, num_texts: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Some texts `[P, S]`, and how often each sends a token to each part `[P, len(parts)]`."""
    texts, uses = [], []
    for pool in range(1 if data else _POOLS):
        drawn = _data_texts(data, model, seed) if data else random_texts(net, model, seed + pool)
        texts.append(drawn)
        uses.append(uses_of(routes_of(net, drawn), parts))
        if (torch.cat(uses).sum(0) > 0).all():
            break
    picked = chosen(torch.cat(uses), num_texts)
    return torch.cat(texts)[picked], torch.cat(uses)[picked]


def _data_texts(data: str, model: str, seed: int) -> Tensor:
    tokenizer = load_tokenizer(model)
    examples = load_examples(data, "train", DRAWN, seed, tokenizer)
    return given_texts(tokenize(examples, tokenizer, DRAWN * LENGTH)["input_ids"])
