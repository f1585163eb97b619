"""Watches a model's router on data: which experts each token is sent to (MoE-Sieve s4, step 1).

Shape suffixes: L MoE layers, E experts, K router's top-k, T tokens, S assignments, X examples, D model width.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from ..base import processes
from ..base.errors import DataError, ModelError
from ..hf import forward, models
from ..hf.experts_view import ExpertsView
from .profile import RoutingProfile

# Gate weights are summed as integers of this unit: then a sum does not depend on the order in which a GPU's
# atomics add, and devices without float64 (mps) keep full precision. A float32 weight above 2**-13 is exact.
_MASS_UNIT = 2.0**-36


def profile_routing(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
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
    progress: show a bar on stderr. total: the number of batches, for its time left, where they have no length.
    source: what to remember of data and model, in plain JSON values.
    share_out: for several processes (torchrun), all of which call this with the same batches: each runs its share of
    them, and gets the profile of all, which is the profile that one process makes, bit for bit.

    DataError: no batch, no token, or a batch of another form. ModelError: no MoE layer, a model on the meta
    device, packed texts that the family does not keep apart, or gate weights that are not finite.
    """
    return _profile(model, batches, progress, source, per_example=False, share_out=share_out, total=total)[0]


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
    return _profile(model, batches, progress, source, per_example=True)


def _profile(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], progress: bool, source: Mapping[str, Any] | None,
    *, per_example: bool, share_out: bool = False, total: int | None = None,
) -> tuple[RoutingProfile, Tensor]:  # fmt: skip
    """The profile, and int32 [X, L, E], of which X is 0 unless `per_example`."""
    layers = models.moe_layers(model)
    sizes = sorted({layer.num_experts for layer in layers})
    if len(sizes) > 1:
        raise ModelError(f"the model's layers have {sizes} experts: hotlora needs one number for all layers")
    device = _input_device(model)
    run, options = _decoder(model)
    counters = [_Counter(layer.num_experts, per_example, models.skips_tokens(model)) for layer in layers]
    num_tokens, packs = 0, False
    with ExitStack() as stack:
        stack.enter_context(forward.inference(model))
        for layer, counter in zip(layers, counters, strict=True):
            experts = model.get_submodule(layer.experts)
            handle = experts.register_forward_pre_hook(counter.hook, with_kwargs=True)
            stack.callback(handle.remove)
        if progress and (console := Console(stderr=True)).is_terminal:
            batches = track(batches, description="profiling", total=total, transient=True, console=console)
        elif progress:
            console.print("profiling the router" + (f" on {total:,} batches" if total else ""), highlight=False)
        turns = processes.shared_out(batches) if share_out else ((batch, True) for batch in batches)
        for index, (batch, is_mine) in enumerate(turns):
            input_ids, mask, position_ids = _checked(batch, index)
            begins = _begin_again(position_ids, mask)
            if begins.any() and not packs:
                _check_packing(model, run, input_ids, mask, begins)
                packs = True
            counted = mask & is_mine
            num_tokens += int(counted.sum())
            masks = {mask.device: counted.flatten()}
            for counter in counters:
                counter.masks, counter.runs = masks, 0
                counter.num_rows = len(mask)
            inputs = {"input_ids": input_ids, "position_ids": position_ids}
            if not begins.any():  # transformers keeps packed texts apart only where it gets no mask
                inputs["attention_mask"] = mask
            given = {name: tensor.to(device) for name, tensor in inputs.items() if tensor is not None}
            run(**given, use_cache=False, **options)
            for counter in counters:
                counter.masks = {}
    if share_out:
        _sum_over_processes(counters)
        num_tokens = sum(processes.all_objects(num_tokens))
    if num_tokens == 0:
        raise DataError("no token to profile on: give at least one batch with a token that is not padding")
    top_k = models.num_experts_per_tok(model)
    sums = [counter.to_host() for counter in counters]
    counts = torch.stack([counts for counts, _, _ in sums])
    skipped = torch.tensor([int(counter.skipped) for counter in counters])
    if bad := sum(bad for _, _, bad in sums):
        raise ModelError(
            f"{bad} gate weights are not finite, so the model overflows in its dtype: load it in bfloat16 or float32"
        )
    # A router of expert parallelism may hand on other ranks' experts as an index out of range.
    partial = any(counter.is_expert_parallel for counter in counters)
    runs = torch.tensor([counter.runs for counter in counters])
    whole = counts.sum(dim=1) + skipped == num_tokens * top_k * runs
    assert partial or whole.all(), "a row must sum to tokens x K, each time that the layer runs"
    name = getattr(getattr(model, "config", None), "name_or_path", None)
    origin = {"fingerprint": models.fingerprint(model)} | ({"model": name} if name else {})
    indices, mass = tuple(layer.layer for layer in layers), torch.stack([mass for _, mass, _ in sums])
    profile = RoutingProfile(indices, counts, mass, num_tokens, top_k, origin | dict(source or {}))
    rows_XLE = torch.stack([counter.rows_to_host() for counter in counters], dim=1)
    assert not per_example or torch.equal(rows_XLE.sum(dim=0), counts), "the examples' counts must sum to the profile's"
    return profile, rows_XLE


class _Counter:
    """Sums one layer's assignments on the device that its experts live on. Never waits for that device."""

    def __init__(self, num_experts: int, per_example: bool, skips_tokens: bool) -> None:
        self.num_experts = num_experts
        self.per_example = per_example
        self.skips_tokens = skips_tokens
        self.num_rows = 0
        """B, the current batch's rows; its tokens come row after row"""
        self.runs = 0
        """how often the layer has run for the current batch: more than once in a model that loops over layers"""
        self.rows: list[Tensor] = []
        """int32 [B, E] of every batch so far, if `per_example`"""
        self.masks: dict[torch.device, Tensor] = {}
        """the current batch's token mask [T], on each device that asked"""
        self.sums: Tensor | None = None
        """int64 [2, E + 1]: counts and mass; the last column takes what does not count"""
        self.bad: Tensor | None = None
        """int64 []: gate weights that are not finite"""
        self.skipped: Tensor | int = 0
        """int64 []: choices of no expert, if `skips_tokens`: expert 0 with weight 0"""
        self.is_expert_parallel = False

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Reads hidden [T, D], top_k_index [T, K], top_k_weights [T, K] by position: their names differ."""
        if not self.masks:  # a probe
            return
        _, index_TK, weight_TK = (*args, *kwargs.values())[:3]
        device = index_TK.device
        if self.sums is None:
            self.sums = torch.zeros(2, self.num_experts + 1, dtype=torch.int64, device=device)
            self.bad = torch.zeros((), dtype=torch.int64, device=device)
            self.is_expert_parallel = ExpertsView(models.unwrap(module)).is_expert_parallel
        if device not in self.masks:
            self.masks[device] = next(iter(self.masks.values())).to(device, non_blocking=True)
        mask_T = self.masks[device]
        assert mask_T.numel() == len(index_TK), "the experts must see every token of the batch once"
        weight_TK = weight_TK.reshape(index_TK.shape)
        here_TK = mask_T[:, None] & (index_TK >= 0) & (index_TK < self.num_experts)
        skipped_TK = (index_TK == 0) & (weight_TK == 0) if self.skips_tokens else torch.zeros_like(here_TK)
        counted_TK = here_TK & ~skipped_TK
        self.skipped = self.skipped + (here_TK & ~counted_TK).sum()
        finite_TK = weight_TK.isfinite()
        weight_TK = weight_TK.to(torch.promote_types(weight_TK.dtype, torch.float32))
        units_TK = (torch.where(finite_TK, weight_TK, 0) / _MASS_UNIT).round().to(torch.int64)
        column_S = torch.where(counted_TK, index_TK, self.num_experts).flatten()
        self.sums.index_add_(1, column_S, torch.stack([torch.ones_like(units_TK), units_TK]).flatten(1))
        self.bad += (counted_TK & ~finite_TK).sum()
        self.runs += 1
        if self.per_example and self.runs > 1:
            self.rows[-1] += self._by_row(column_S)
        elif self.per_example:
            self.rows.append(self._by_row(column_S))

    def _by_row(self, column_S: Tensor) -> Tensor:
        """int32 [B, E]: the batch's assignments, by row; `column_S` is E for those that do not count."""
        width = self.num_experts + 1
        slots = max(1, len(column_S) // max(1, self.num_rows))  # of one row
        row_S = torch.arange(len(column_S), device=column_S.device) // slots
        counts = torch.zeros(self.num_rows * width, dtype=torch.int32, device=column_S.device)
        counts.index_add_(0, row_S * width + column_S, torch.ones_like(column_S, dtype=torch.int32))
        return counts.view(self.num_rows, width)[:, :-1]

    def rows_to_host(self) -> Tensor:
        """int32 [X, E]: the counts of every row of every batch, in their order."""
        return torch.cat([rows.cpu() for rows in self.rows] or [torch.zeros(0, self.num_experts, dtype=torch.int32)])

    def to_host(self) -> tuple[Tensor, Tensor, int]:
        """counts int64 [E], mass float64 [E], number of weights that are not finite."""
        if self.sums is None or self.bad is None:
            raise ModelError("an MoE layer's experts were not called: this model's forward is not supported")
        counts, units = self.sums[:, :-1].cpu()
        return counts.clone(), units.double() * _MASS_UNIT, int(self.bad)


def _sum_over_processes(counters: Sequence[_Counter]) -> None:
    """Gives every process the sums of all, in integers: exact, whatever the order."""
    held = [(counter.sums, counter.bad, counter.skipped) for counter in counters]
    if processes.num_processes() == 1 or any(sums is None for sums, _, _ in held):
        return  # no batch at all, in any of them
    sums = processes.summed(torch.stack([sums.cpu() for sums, _, _ in held if sums is not None]))
    rest = processes.summed(torch.tensor([[int(bad or 0), int(skipped)] for _, bad, skipped in held]))
    for counter, total, (bad, skipped) in zip(counters, sums, rest, strict=True):
        counter.sums, counter.bad, counter.skipped = total, bad, skipped


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
