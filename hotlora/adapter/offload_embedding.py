"""The embedding beside offloaded experts: a step reads a row of it for each token, and the table may be a gigabyte."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

_ROWS = 8192  # that are compared at a time


class HostEmbedding(nn.Module):
    """A frozen embedding whose table is on the host: the rows of a batch come to the device.

    `weight` is empty and on that device, where others look for a model's; `.to(device)` leaves the table alone.
    """

    weight: Tensor
    """`[0, D]`"""

    def __init__(self, embedding: nn.Embedding, place: Callable[[Tensor], Tensor]) -> None:
        """place: makes a tensor's copy on the host."""
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx
        self._table = (place(embedding.weight),)  # in a tuple, so that no `.to` of the model's finds it
        self.register_buffer("weight", embedding.weight.detach()[:0].clone())

    @property
    def nbytes(self) -> int:
        """Bytes on the host."""
        return self._table[0].nbytes

    def numel(self) -> int:
        return self._table[0].numel()

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids `[B, S]` on any device -> `[B, S, D]` on that of `weight`."""
        rows = nn.functional.embedding(ids.cpu(), self._table[0])
        return rows.to(self.weight.device, self.weight.dtype, non_blocking=True)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.nbytes / 1e6:.1f} MB on the host"


def is_apart(model: Any) -> bool:
    """Whether a model's embedding is torch's own and no weight of its LM head, which a step multiplies as a whole."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return type(embedding) is nn.Embedding and (head is None or head.weight is not embedding.weight)


@torch.no_grad()
def offload_embedding(model: Any, place: Callable[[Tensor], Tensor], files: Sequence[str] = ()) -> None:
    """Leaves the embedding on the host, where it `is_apart`: in the checkpoint's `files` if they have it as it is, from
    which the system reads the rows that are asked for, else as what `place` makes of it."""
    if not is_apart(model):
        return
    embedding = model.get_input_embeddings()
    there = _in_files(embedding.weight, files)
    if embedding.weight.device.type == "cpu":
        embedding.weight.data = place(embedding.weight) if there is None else there
    else:
        model.set_input_embeddings(HostEmbedding(embedding, place if there is None else lambda _: there))


def _in_files(table: Tensor, files: Sequence[str]) -> Tensor | None:
    """The tensor of a safetensors file that equals `table` `[V, D]`, mapped; None if none does."""
    for file in files:
        if not file.endswith(".safetensors"):
            continue
        with safe_open(file, framework="pt") as opened:
            shapes = {key: opened.get_slice(key).get_shape() for key in opened.keys()}
            for tensor in (opened.get_tensor(key) for key, shape in shapes.items() if shape == list(table.shape)):
                if tensor.dtype == table.dtype and _equal(tensor, table):
                    return tensor
    return None


def _equal(a: Tensor, b: Tensor) -> bool:
    rows = zip(a.split(_ROWS), b.split(_ROWS), strict=True)
    return all(torch.equal(x.to(y.device), y) for x, y in rows)
