"""What PEFT layers of ours share: an update that goes into the base layer's weights and comes out again."""

import math
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Self, TypeVar, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, dora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..base.errors import HotLoraError
from .factors import Slot

T = TypeVar("T")
REPLICA = (
    "the model is copied to several GPUs in one process (nn.DataParallel, as transformers' Trainer does where it sees "
    "more than one), and adapters on experts cannot be: start the script with `torchrun --nproc-per-node N` or "
    "`accelerate launch`, or show it one GPU (CUDA_VISIBLE_DEVICES=0)."
)
UNMIXED = "adapter_names: several adapters in a batch are not supported. Use set_adapter."


class MergeableLayer(nn.Module, LoraLayer):
    """What all share: an update that can go into the base layer's weights and come out again."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        r, lora_alpha = kwargs.pop("r"), kwargs.pop("lora_alpha")
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.replaced: dict[str, list[Tensor]] = {}
        """adapter -> what a merge has overwritten, where subtracting would not give it back"""
        self._cached: dict[Hashable, object] = {}
        self._prepare()
        self.update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def _prepare(self) -> None:
        """Makes the containers of what `update_layer` adds."""

    def _add_adapter(self, adapter: str, r: int, lora_alpha: int, config: LoraConfig) -> None:
        """What PEFT keeps of every adapter, once its factors are in place."""
        self._cached.clear()  # of another adapter that had the name
        self.r[adapter] = r
        self.lora_alpha[adapter] = lora_alpha
        self.use_dora[adapter] = config.use_dora
        self.use_rslora[adapter] = config.use_rslora
        self.scaling[adapter] = lora_alpha / math.sqrt(r) if config.use_rslora else lora_alpha / r
        self.lora_dropout[adapter] = nn.Dropout(config.lora_dropout)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def factor_pairs(self, adapter: str) -> dict[Any, tuple[Tensor, Tensor]]:
        """The adapter's low-rank pairs, as views: A `[..., R, in]`, B `[..., out, R]`, under what each updates."""
        raise NotImplementedError

    def slots(self, path: str, adapter: str) -> Iterator[Slot]:
        """Where the adapter's low-rank factors are held; `path` is the layer's own."""
        raise NotImplementedError

    def _deltas(self, adapter: str) -> Iterator[tuple[Tensor, list[int] | slice, Tensor]]:
        """(parameter, rows, what the adapter adds to them), in float32 at least and in the parameter's layout."""
        raise NotImplementedError

    def _active_here(self, adapter_names: list[str] | None) -> list[str]:
        """Active adapters that have weights in this layer; none while the adapters are disabled or merged."""
        if getattr(self, "_is_replica", False):  # torch's word for a copy of DataParallel's, which has no parameters
            raise HotLoraError(REPLICA)
        if adapter_names is not None:
            raise HotLoraError(UNMIXED)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return []
        return [] if self.merged else [name for name in self.active_adapters if name in self.scaling]

    def train(self, mode: bool = True) -> Self:
        if mode:
            self._cached.clear()
        return super().train(mode)

    def delete_adapter(self, adapter_name: str) -> None:
        self._cached.clear()
        super().delete_adapter(adapter_name)

    def _once(self, key: Hashable, make: Callable[[], T]) -> T:
        """`make()`, once for each key while PEFT's `DoraCaching` is on, outside training; as PEFT's own DoRA layers."""
        if self.training or not dora.ENABLE_DORA_CACHING:
            self._cached.clear()
            return make()
        if key not in self._cached:
            self._cached[key] = make()
        return cast(T, self._cached[key])

    def _replaces(self, adapter: str) -> bool:
        """Whether what the adapter adds depends on the base weights themselves, and not on its factors alone."""
        return self.use_dora.get(adapter, False)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the updates to the base weights. `safe_merge` refuses weights that would not be finite."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.scaling]
        if self.merged_adapters and any(map(self._replaces, names)):
            raise HotLoraError(
                f"adapters {self.merged_adapters} are merged already, and {names} must be worked out from the base's "
                "own weights: unmerge, then merge them all at once."
            )
        deltas = {name: list(self._deltas(name)) for name in names}  # all of them of the base as it is
        for name in names:
            its, before = deltas.pop(name), None
            # In 16 bits each merge and unmerge would round the base anew, and TRL merges at every step for vLLM. Who
            # merges an adapter that does not train serves it, and has no need of a copy.
            trains = any(parameter.requires_grad for parameter in self.parameters())
            if self._replaces(name) or (trains and any(weight.itemsize <= 2 for weight, _, _ in its)):
                before = [weight.data[rows].clone() for weight, rows, _ in its]
            # By itself it is the very weights that were trained, and not the base's plus a rounded difference.
            updated = (self._merged_values(name) if len(names) == 1 else None) or self._sums(its)
            self._write(name, updated, safe_merge)
            if before is not None:
                self.replaced[name] = before
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes merged updates out again: bit for bit of weights in 16 bits whose adapter trains, and up to the
        rounding of others."""
        while self.merged_adapters:
            name = self.merged_adapters[-1]
            before = self.replaced.get(name)
            if before is None:
                self._write(name, self._sums([(weight, rows, -d) for weight, rows, d in self._deltas(name)]), False)
            else:
                for (weight, rows), old in zip(self.merge_targets(name), before, strict=True):
                    weight.data[rows] = old.to(weight)  # `model.float()` and `.cuda()` do not take it along
            self.merged_adapters.pop()  # only now: after an error the layer is still merged
            self.replaced.pop(name, None)

    def merge_targets(self, adapter: str) -> Iterator[tuple[Tensor, list[int] | slice]]:
        """(parameter, rows) of `_deltas`, without working out the deltas."""
        raise NotImplementedError

    def _merged_values(self, adapter: str) -> list[tuple[Tensor, list[int] | slice, Tensor]] | None:
        """(parameter, rows, what is there with the adapter merged), where the adapter has these weights themselves."""
        return None

    @staticmethod
    def _sums(deltas: list[tuple[Tensor, list[int] | slice, Tensor]]) -> list[tuple[Tensor, list[int] | slice, Tensor]]:
        """The deltas are used up: a layer's are large."""
        return [(weight, rows, delta.add_(weight.data[rows]).to(weight.dtype)) for weight, rows, delta in deltas]

    @torch.no_grad()
    def _write(self, adapter: str, updated: list[tuple[Tensor, list[int] | slice, Tensor]], safe: bool) -> None:
        if safe and not all(new.isfinite().all() for _, _, new in updated):
            raise HotLoraError(
                f"merging adapter {adapter!r} gives weights that are not finite: it is broken. Train it anew."
            )
        for weight, rows, new in updated:
            weight.data[rows] = new


_CONTAINERS = (nn.ModuleDict(), nn.ParameterDict())


def check_adapter_name(name: object) -> None:
    """HotLoraError where torch's containers, which hold an adapter's parts under its name, cannot have such a key."""
    if not isinstance(name, str) or not name or "." in name or any(hasattr(held, name) for held in _CONTAINERS):
        raise HotLoraError(
            f"adapter_name={name!r} cannot be used: give a name without dots, such as 'task_1', that is no "
            "attribute of torch's ModuleDict (values, keys, train, …)."
        )


def factor_slots(model: nn.Module, adapter: str) -> Iterator[Slot]:
    """The low-rank factors of `adapter` in all layers of an adapted base model, ours and PEFT's Linears."""
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or adapter not in layer.scaling:
            continue
        if isinstance(layer, MergeableLayer):
            yield from layer.slots(path, adapter)
        else:
            for name in ("lora_A", "lora_B"):
                yield Slot(f"{path}.{name}.weight", name == "lora_A", getattr(layer, name), adapter)
