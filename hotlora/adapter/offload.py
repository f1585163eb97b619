"""Frozen experts outside the device's memory: in RAM where a GPU computes, or in a file that is mapped.

On a CPU a mapped weight is an ordinary tensor: its pages are read as they are multiplied, stay while there is room, and
are dropped without writing. On a GPU `OffloadedExperts` brings what is asked for onto the card, and starts on what was
asked for next the last time, so that the transfer is over when it is needed.

Shape suffixes: E experts.
"""

import copy
import errno
import functools
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from ..base.errors import FileError
from ..base.precision import say_once
from ..base.sizes import size_words
from ..hf.internals import internal
from ..hf.moe_layers import moe_layers, unwrap
from .offload_embedding import offload_embedding

_ALIGNED = 256  # bytes, as torch's allocators place tensors for kernels
_TRIES = 1000  # of a folder that other processes remove


class MappedFolder:
    """Where tensors go that are to be read from disk. Its files have no name: nothing is left behind, however the
    process ends. A folder that is not there is made for as long as a file is written.

    FileError: no folder, or none in which it could be made; Windows.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        if os.name == "nt":
            raise FileError(
                f"offload_folder {self.folder} cannot be used: Windows deletes no file that is mapped, so the experts' "
                "would stay. Store them in fewer bits (--quantize 4), or run this in WSL; for a GPU, --offload without "
                "--offload-folder keeps them in RAM."
            )
        there = self.folder if self.folder.exists() else self.folder.parent
        if not there.is_dir():  # where no disk is mounted, another one would fill up
            why = "is a file" if there.is_file() else "does not exist"
            raise FileError(f"offload_folder {folder} cannot be used: {there} {why}. Make it, or give another folder.")
        self._is_ours = not self.folder.exists()
        self.num_bytes, self.seconds = 0, 0.0

    def mapped(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` on the CPU, with its layout, whose values lie in a file.

        FileError: the disk is full, or does not take it.
        """
        started = time.monotonic()
        if tensor.numel() == 0:
            return tensor.detach().cpu()
        # As it lies in memory: a product's last bits go by how its weights lie.
        order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
        tensor = tensor.detach().cpu().permute(order).contiguous()
        try:
            with self._file() as (file, name):
                file.write(tensor.view(-1).view(torch.uint8).numpy().data)
                file.flush()
                # Shared: a private mapping counts as memory of the process.
                there = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise FileError(
                    f"offload_folder {self.folder} cannot be written ({error.strerror}): give a folder on a disk of "
                    "this machine (--offload-folder)."
                ) from error
            fewer = ", or fewer bits (--quantize 4)" if tensor.is_floating_point() else ""
            there_are = size_words(self.num_bytes)
            is_there = self.folder if self.folder.exists() else self.folder.parent
            raise FileError(
                f"offload_folder {self.folder} is full ({error.strerror}): {there_are} are there, the next "
                f"{size_words(tensor.nbytes)} did not fit, {size_words(shutil.disk_usage(is_there).free)} are free. "
                f"Give a folder on another disk (--offload-folder){fewer}."
            ) from error
        self.num_bytes, self.seconds = self.num_bytes + tensor.nbytes, self.seconds + time.monotonic() - started
        return there.view(tensor.shape).permute([order.index(dim) for dim in range(tensor.ndim)])

    @contextmanager
    def _file(self) -> Iterator[tuple[IO[bytes], str]]:
        """A file, and a name to map it by."""
        for _ in range(_TRIES):  # another run may have made the folder, and remove it now
            with suppress(FileExistsError):  # `exist_ok` looks again, when it may be gone
                self.folder.mkdir()
            with suppress(FileNotFoundError):
                descriptor, path = tempfile.mkstemp(dir=self.folder, prefix="hotlora-experts-")
                break
        else:
            raise FileNotFoundError(errno.ENOENT, "it is removed again and again", str(self.folder))
        try:
            by_number = Path(f"/proc/self/fd/{descriptor}")
            if by_number.exists():
                os.unlink(path)
                self._remove()
            with open(descriptor, "wb") as file:
                yield file, str(by_number if by_number.exists() else path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)
            self._remove()

    def _remove(self) -> None:
        if self._is_ours:
            with suppress(OSError):  # it holds another run's file, or is gone
                self.folder.rmdir()

    def say(self) -> None:
        """What was written, and how fast: a slow disk slows every step."""
        if self.num_bytes:
            size, speed = size_words(self.num_bytes), size_words(self.num_bytes / max(self.seconds, 1e-9))
            say_once(f"{size} of weights are read from a file in {self.folder}, written at {speed}/s")


class DenseExperts(nn.Module):
    """One 3-D parameter of frozen experts as it is, with the small interface of `quantized.QuantizedExperts`."""

    weight: Tensor
    """`[E, ., .]`"""
    stored = ("weight",)
    is_dense = True

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shape = weight.shape
        self.stored_ids = tuple(range(len(weight)))
        self.register_buffer("weight", weight.detach())

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def dequantize(self) -> Tensor:
        return self.weight

    def expert(self, number: int) -> Tensor:
        return self.weight[number]


def _aligned(tensor: Tensor) -> int:
    """Its bytes in a slot."""
    return -(-tensor.nbytes // _ALIGNED) * _ALIGNED


class _Slot:
    """Memory of the device that holds one holder's tensors after the other's."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.bytes = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.holder: OffloadedExperts | None = None
        self.tensors: list[Tensor] = []
        self.arrived: Any = None
        self.used: Any = None
        """Events of a GPU: what is in it has come, and has been used."""

    def fill(self, holder: "OffloadedExperts") -> None:
        self.holder, self.tensors, start = holder, [], 0
        for tensor in holder.on_host:
            there = self.bytes[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            self.tensors.append(there.copy_(tensor, non_blocking=True))
            start += _aligned(tensor)


class Fetcher:
    """Brings tensors from the host to one device, one request ahead, into two slots by turns: what is computed with,
    and what is on its way. The host never waits, and the device has no more than the slots.

    What comes next is what came next the last time after the same four requests: forward, backward and recomputation
    each go through the layers in an order of their own.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.num_bytes = device, 0
        """num_bytes: of the largest holder"""
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._slots: list[_Slot] = []
        self._last: deque[Any] = deque(maxlen=4)
        self._next: dict[tuple[Any, ...], Any] = {}
        self.num_waits = 0
        """Requests that no earlier one had foreseen."""

    def add(self, holder: "OffloadedExperts") -> None:
        self.num_bytes = max(self.num_bytes, sum(map(_aligned, holder.on_host)))

    def fit(self, holders: "Sequence[OffloadedExperts]") -> None:
        """Makes the slots anew, for what these have on the host by now."""
        if self.stream is not None:
            self.stream.synchronize()  # the memory of those that there were is given back
        self._slots, self.num_bytes = [], 0
        for holder in holders:
            self.add(holder)

    def get(self, holder: "OffloadedExperts") -> list[Tensor]:
        """The holder's tensors on the device, until the next holder's are asked for; those are on their way."""
        compute = torch.cuda.current_stream(self.device) if self.stream else None
        if not self._slots:
            self._slots = [_Slot(self.num_bytes, self.device) for _ in range(2)]
            if compute is not None:
                for slot in self._slots:
                    slot.used = compute.record_event()  # what had this memory before may still be computing
        used, other = self._slots
        if used.holder is holder:  # again, of a CPU for each expert
            return used.tensors
        if compute is not None:
            used.used = compute.record_event()
        if other.holder is not holder:
            self.num_waits += 1
            self._fill(other, holder)
        if compute is not None:
            compute.wait_event(other.arrived)
        self._slots = [other, used]
        if len(self._last) == 4:
            self._next[tuple(self._last)] = holder
        self._last.append(holder)
        following = self._next.get(tuple(self._last))
        if following is not None and following is not used.holder:
            self._fill(used, following)
        return other.tensors

    def _fill(self, slot: _Slot, holder: "OffloadedExperts") -> None:
        if self.stream is None:
            return slot.fill(holder)
        with torch.cuda.stream(self.stream):
            if slot.used is not None:
                self.stream.wait_event(slot.used)
            slot.fill(holder)
            slot.arrived = self.stream.record_event()


class OffloadedExperts(nn.Module):
    """A holder of frozen experts whose weights are on the host, and on the device while they are multiplied.

    It has the holder's interface: shape, dtype, `expert(e)`, `dequantize()`; `device` is where they are multiplied.
    `.to(device)` leaves what is on the host alone.
    """

    def __init__(self, holder: Any, fetcher: Fetcher, place: Callable[[Tensor], Tensor]) -> None:
        """holder: dense or quantized experts; `stored` names what of it is large, with a row for each of `stored_ids`.

        place: makes a tensor's copy on the host.
        """
        super().__init__()
        # In a tuple, so that no `.to` of the model's finds it.
        self._holder, self._fetcher, self._place = (holder,), fetcher, place
        self.on_host = [place(getattr(holder, name)) for name in holder.stored]
        self._rows: list[Tensor] = []
        """of what is stored: those on the host, and those on the device"""
        self._on_device: list[Tensor] = []
        fetcher.add(self)
        for name in holder.stored:
            setattr(holder, name, getattr(holder, name)[:0].clone())

    @property
    def holder(self) -> Any:
        """What it stands for, without its large tensors."""
        return self._holder[0]

    @property
    def shape(self) -> torch.Size:
        shape: torch.Size = self.holder.shape
        return shape

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.holder.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        return self._fetcher.device

    @property
    def nbytes(self) -> int:
        """Bytes on the host."""
        return sum(tensor.nbytes for tensor in self.on_host)

    def numel(self) -> int:
        return self.shape.numel()

    @property
    def is_dense(self) -> bool:
        return bool(self.holder.is_dense)

    @property
    def is_transposed(self) -> bool:
        return bool(getattr(self.holder, "is_transposed", False))

    def dequantize(self) -> Tensor:
        """Dense weights of all experts on the device, `shape` in `dtype`."""
        dense: Tensor = self._here().dequantize()
        return dense

    def some(self, start: int, stop: int) -> Tensor:
        """Of the experts from `start` to `stop`."""
        dense: Tensor = self._here().some(start, stop)
        return dense

    def chosen(self, ids: Tensor) -> Tensor:
        """Of the experts in `ids`."""
        dense: Tensor = self._here().chosen(ids)
        return dense

    def expert(self, number: int) -> Tensor:
        """Of one expert."""
        dense: Tensor = self._here().expert(number)
        return dense

    def coded(self) -> Any:
        """As a kernel decodes it."""
        return self._here().coded()

    @torch.no_grad()
    def keep_on_device(self, experts: Collection[int]) -> None:
        """These experts' weights leave the host, and are not transferred from now on. Once only."""
        kept = torch.tensor([expert in experts for expert in self.holder.stored_ids])
        self._on_device = [tensor[kept].to(self.device) for tensor in self.on_host]
        self.on_host = [self._place(tensor[~kept]) for tensor in self.on_host]
        self._rows = [torch.nonzero(rows).flatten().to(self.device) for rows in (~kept, kept)]

    def _here(self) -> Any:
        """The holder, with its tensors on the device."""
        tensors = self._fetcher.get(self)
        if self._rows:
            tensors = [self._joined(*both) for both in zip(tensors, self._on_device, strict=True)]
        there = copy.copy(self.holder)
        there._buffers = there._buffers | dict(zip(there.stored, tensors, strict=True))
        return there

    def _joined(self, fetched: Tensor, kept: Tensor) -> Tensor:
        rows, rows_kept = self._rows
        both = fetched.new_empty(len(rows) + len(rows_kept), *fetched.shape[1:])
        return both.index_copy_(0, rows, fetched).index_copy_(0, rows_kept, kept)

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, dtype={self.dtype}, {self.nbytes / 1e6:.1f} MB on the host"


class Offload:
    """Puts experts where they wait, as a model loads."""

    def __init__(self, folder: str | Path | None) -> None:
        """folder: of a mapped file; None: RAM, for a GPU. FileError: as `MappedFolder`."""
        self.folder = None if folder is None else MappedFolder(folder)
        self.fetchers: dict[torch.device, Fetcher] = {}

    def __deepcopy__(self, memo: Any) -> "Offload":
        """transformers copies the configs of what it loads."""
        return self

    def __call__(self, held: Any) -> Any:
        """`held`, a tensor or a holder of experts, as it waits."""
        if held.device.type != "cpu":
            fetcher = self.fetchers.setdefault(held.device, Fetcher(held.device))
            return OffloadedExperts(DenseExperts(held) if isinstance(held, Tensor) else held, fetcher, self._place)
        if isinstance(held, Tensor):
            return self._place(held)
        for name in held.stored:
            setattr(held, name, self._place(getattr(held, name)))
        return held

    def _place(self, tensor: Tensor) -> Tensor:
        return pinned(tensor) if self.folder is None else self.folder.mapped(tensor)

    def finish(self, model: nn.Module, checkpoint_files: Sequence[str] | None) -> None:
        """What is left to do of a model that has been loaded: its embedding; and says what was written."""
        offload_embedding(model, self._place, checkpoint_files or ())
        if self.folder is not None:
            self.folder.say()


_ROUNDS_UP_TO = "pinned_max_round_threshold_mb"


def pinned(tensor: Tensor) -> Tensor:
    """A copy in RAM that a GPU can read while it computes."""
    tensor = tensor.detach().cpu()
    if not torch.cuda.is_available():
        return tensor.clone()
    _pin_exact_sizes()
    return tensor.pin_memory()


@functools.cache
def _pin_exact_sizes() -> None:
    """torch rounds pinned memory up to powers of two, of whatever size: up to twice the RAM. What the user has set of
    its allocator stays."""
    own = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    if _ROUNDS_UP_TO in own:
        return
    with suppress(Exception):  # a torch that has no such setting
        internal("torch:_C._accelerator_setAllocatorSettings")(",".join(filter(None, (own, f"{_ROUNDS_UP_TO}:1"))))


def keep_on_device(model: nn.Module, experts: Mapping[int, Sequence[int]]) -> None:
    """The weights of these experts, by decoder layer, stay on the device; the others stay offloaded. Nothing where no
    experts wait on the host for a device."""
    by_fetcher: dict[Fetcher, list[OffloadedExperts]] = {}
    for layer in moe_layers(model):
        for child in unwrap(model.get_submodule(layer.experts)).children():
            if isinstance(child, OffloadedExperts):
                child.keep_on_device(experts.get(layer.layer, ()))
                by_fetcher.setdefault(child._fetcher, []).append(child)
    for fetcher, holders in by_fetcher.items():
        fetcher.fit(holders)
