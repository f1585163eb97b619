"""Watches a model's router on data: which experts each token is sent to (MoE-Sieve s4, step 1).

Shape suffixes: L MoE layers, E experts, K router's top-k, T tokens, X examples.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import zip_longest
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from ..base import processes
from ..base.errors import DataError, ModelError
from ..hf import forward
from ..hf.moe_layers import fingerprint, moe_layers, num_experts_per_tok, skips_tokens
from .counter import UNITS, Counter, in_units, sums_of
from .profile import RoutingProfile


def profile_routing(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    saliency: bool = False,
    progress: bool = False,
    source: Mapping[str, Any] | None = None,
    share_out: bool = False,
    total: int | None = None,
) -> RoutingProfile:
    """Counts, without gradients, where a model's router sends the tokens of `batches` (MoE-Sieve s4, step 1).

    The counts are taken at the call of each experts module, after whatever the router did to its scores;
    nothing is recomputed from logits. The model may be adapted by PEFT. It runs in eval mode, and is left as
    it was.

    batches: dicts with input_ids [B, S], attention_mask [B, S] (1 token, 0 padding; absent = all ones) and
    position_ids [B, S] (absent = transformers' own). Where a row's positions begin again, packed texts are kept apart.
    saliency: also gather REAP's (arXiv 2510.13999): each expert's output is handed out by itself, in the same pass, and
    added up for its token here. That takes about twice the memory of the experts' forward; in half precision outputs
    are rounded once more than without, so that near-ties of later routers may fall otherwise.
    progress: show a bar on stderr. total: the number of batches, for its time left, where they have no length.
    source: what to remember of data and model, in plain JSON values.
    share_out: for several processes (torchrun), all of which call this with the same batches: each runs its share of
    them, and gets the profile of all, which is the profile that one process makes, bit for bit.

    DataError: no batch, no token, or a batch of another form. ModelError: no MoE layer, a model on the meta
    device, packed texts that the family does not keep apart, gate weights that are not finite, or saliency under
    expert parallelism.
    """
    with Watch(model, saliency=saliency, share_out=share_out) as watch:
        watch.run(batches, progress=progress, total=total)
        return watch.profile(source)


def profile_examples(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    progress: bool = False,
    source: Mapping[str, Any] | None = None,
) -> tuple[RoutingProfile, Tensor]:
    """`profile_routing`, and beside the profile each example's own counts, from the same pass (MoE-Sieve s3.3).

    Returns the profile, and int32 [X, L, E]: one row for each row of the batches, in their order. Summed over
    the X examples they are the profile's counts.
    """
    with Watch(model, by_example=("count",)) as watch:
        watch.run(batches, progress=progress)
        profile = watch.profile(source)
        rows_XLE = watch.examples()["count"].int()
    assert torch.equal(rows_XLE.sum(dim=0), profile.counts), "the examples' counts must sum to the profile's"
    return profile, rows_XLE


class Watch:
    """Inside, hooks on a model's experts add up what the router does in `run`.

    saliency, share_out: as `profile_routing` takes them. by_example: names of what is kept for each example by itself,
    "count", "mass", "saliency".
    """

    def __init__(
        self, model: nn.Module, *, saliency: bool = False, share_out: bool = False, by_example: Sequence[str] = ()
    ) -> None:
        self.model, self.share_out = model, share_out
        self.layers = moe_layers(model)
        sizes = sorted({layer.num_experts for layer in self.layers})
        if len(sizes) > 1:
            raise ModelError(f"the model's layers have {sizes} experts: hotlora needs one number for all layers")
        self.device = _input_device(model)
        self.decoder, self.options = _decoder(model)
        held = tuple(UNITS)[: 3 if saliency else 2]
        kept = [held.index(name) for name in by_example]
        self.by_example = tuple(by_example)
        skips = skips_tokens(model)
        self.counters = [Counter(layer.num_experts, held, kept, skips) for layer in self.layers]
        self.num_tokens, self._packs, self._told = 0, False, False
        self._mine: list[bool] = []
        """of each batch since the last `examples`, whether it is this process's"""
        self._hooks = ExitStack()

    def __enter__(self) -> "Watch":
        self._hooks.enter_context(forward.inference(self.model))
        for layer, counter in zip(self.layers, self.counters, strict=True):
            experts = self.model.get_submodule(layer.experts)
            handles = [experts.register_forward_pre_hook(counter.hook, with_kwargs=True)]
            if counter.with_saliency:
                handles.append(experts.register_forward_hook(counter.add_up))
            for handle in handles:
                self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.close()

    def run(
        self, batches: Iterable[Mapping[str, Tensor]], *, progress: bool = False, total: int | None = None,
        told: str = "profiling",
    ) -> None:  # fmt: skip
        """Runs the model on batches. told: the words of its bar."""
        if progress and (console := Console(stderr=True)).is_terminal:
            batches = track(batches, description=told, total=total, transient=True, console=console)
        elif progress and not self._told:
            console.print("profiling the router" + (f" on {total:,} batches" if total else ""), highlight=False)
        self._told = True
        turns = processes.shared_out(batches) if self.share_out else ((batch, True) for batch in batches)
        for index, (batch, is_mine) in enumerate(turns):
            input_ids, mask, position_ids = _checked(batch, index)
            begins = _begin_again(position_ids, mask)
            if begins.any() and not self._packs:
                _check_packing(self.model, self.decoder, input_ids, mask, begins)
                self._packs = True
            counted = mask & is_mine
            self.num_tokens += int(counted.sum())
            self._mine.append(is_mine)
            masks = {mask.device: counted.flatten()}
            for counter in self.counters:
                counter.masks, counter.runs = masks, 0
                counter.num_rows = len(mask)
            inputs = {"input_ids": input_ids, "position_ids": position_ids}
            if not begins.any():  # transformers keeps packed texts apart only where it gets no mask
                inputs["attention_mask"] = mask
            given = {name: tensor.to(self.device) for name, tensor in inputs.items() if tensor is not None}
            self.decoder(**given, use_cache=False, **self.options)
            for counter in self.counters:
                counter.masks = {}

    def examples(self) -> dict[str, Tensor]:
        """[X, L, E] of each of `by_example`: int64 counts, float64 mass and saliency of the rows of all batches since
        the last call, of all processes, in the batches' order."""
        rows = [counter.rows_to_host() for counter in self.counters]  # of each layer those of each batch [B, C, E]
        by_batch = [
            torch.stack(layers, dim=2) for layers, is_mine in zip(zip(*rows, strict=True), self._mine, strict=True)
            if is_mine
        ]  # fmt: skip
        self._mine = []
        if self.share_out:
            found = zip_longest(*processes.all_objects(by_batch))
            by_batch = [batch for turn in found for batch in turn if batch is not None]
        shape = (0, len(self.by_example), len(self.layers), self.layers[0].num_experts)
        tables = torch.cat([torch.zeros(shape, dtype=torch.int64), *by_batch]).unbind(dim=1)
        return {name: in_units(table, name) for name, table in zip(self.by_example, tables, strict=True)}

    def profile(self, source: Mapping[str, Any] | None = None) -> RoutingProfile:
        """Of all batches so far, of all processes."""
        num_tokens = self.num_tokens
        if self.share_out:
            num_tokens = sum(processes.all_objects(num_tokens))
        if num_tokens == 0:
            raise DataError("no token to profile on: give at least one batch with a token that is not padding")
        top_k = num_experts_per_tok(self.model)
        sums, skipped, bad = sums_of(self.counters, share_out=self.share_out)
        if bad:
            raise ModelError(
                f"{bad} gate weights{' or outputs' * self.counters[0].with_saliency} are not finite, so the model "
                "overflows in its dtype: load it in bfloat16 or float32"
            )
        # A router of expert parallelism may hand on other ranks' experts as an index out of range.
        partial = any(counter.is_expert_parallel for counter in self.counters)
        runs = torch.tensor([counter.runs for counter in self.counters])
        whole = sums["count"].sum(dim=1) + skipped == num_tokens * top_k * runs
        assert partial or whole.all(), "a row must sum to tokens x K, each time that the layer runs"
        name = getattr(getattr(self.model, "config", None), "name_or_path", None)
        origin = {"fingerprint": fingerprint(self.model)} | ({"model": name} if name else {})
        return RoutingProfile(
            tuple(layer.layer for layer in self.layers), sums["count"], sums["mass"], num_tokens, top_k,
            origin | dict(source or {}), sums.get("saliency"),
        )  # fmt: skip


def _decoder(model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """(the model without its language-model head, whose logits over the vocabulary nobody reads here; options).

    A model that is spread over processes gathers its weights from its top: it is run in whole, with few logits.
    """
    if processes.is_sharded(model):
        return model, {"logits_to_keep": 1}
    get_decoder = getattr(model, "get_decoder", None)
    return (get_decoder() if callable(get_decoder) else model), {}


def _input_device(model: nn.Module) -> torch.device:
    weight = next(model.parameters())
    if (embeddings := getattr(model, "get_input_embeddings", None)) is not None:
        weight = embeddings().weight
    if weight.device.type == "meta":
        raise ModelError("the model is on the meta device, without weights to run: load it with `load_model`")
    return weight.device


def _checked(batch: Mapping[str, Tensor], index: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """input_ids [B, S], a boolean mask [B, S], position_ids [B, S] if given; DataError where a batch is not that."""
    input_ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
        raise DataError(f"batch {index} has no input_ids tensor [B, S]: give dicts as a collator makes them")
    for name in ("attention_mask", "position_ids"):
        if (given := batch.get(name)) is None:
            continue
        shape = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        if shape != (wanted := list(input_ids.shape)):
            raise DataError(f"batch {index}: {name} must be a tensor of input_ids' shape {wanted}, and is {shape}")
    mask, position_ids = batch.get("attention_mask"), batch.get("position_ids")
    mask = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    if _begin_again(position_ids, mask).any() and (mask[:, 1:] & ~mask[:, :-1]).any():
        raise DataError(f"batch {index} has packed texts (position_ids that begin again) after padding: pad at the end")
    return input_ids, mask, position_ids


def _begin_again(position_ids: Tensor | None, mask: Tensor) -> Tensor:
    """bool [B, S]: the first tokens of packed texts, but for a row's first text."""
    begins = torch.zeros_like(mask)
    if position_ids is not None:
        begins[:, 1:] = (position_ids[:, 1:] <= position_ids[:, :-1]) & mask[:, 1:] & mask[:, :-1]
    return begins


def _check_packing(model: nn.Module, run: nn.Module, ids: Tensor, mask: Tensor, begins: Tensor) -> None:
    """ModelError where the family does not keep two texts of a packed row apart by their positions alone."""
    row = int(begins.any(1).nonzero()[0])
    start, *more = begins[row].nonzero()[:, 0].tolist()
    end = more[0] if more else int(mask[row].sum())
    texts = [text[: forward.PROBED] for text in (ids[row, :start], ids[row, start:end])]
    packed = {
        "input_ids": torch.cat(texts)[None].to(_input_device(model)),
        "position_ids": torch.cat([torch.arange(len(text)) for text in texts])[None].to(_input_device(model)),
    }
    advice = "profile one text a row, without position_ids"
    forward.check_apart(lambda **inputs: run(**inputs, use_cache=False)[0], packed, model, advice)
