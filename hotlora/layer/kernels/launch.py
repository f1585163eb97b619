"""How the fused layer's kernels are launched, and what they share: where a block of rows is, dropout's masks.

Block sizes come from a table by compute capability, so that no first step has to time them. Shape suffixes: S rows,
G groups (experts), N groups with factors of their own.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemm import INTERPRETED


@dataclass(frozen=True)
class Blocks:
    """Of one kernel: rows, columns and inner depth of a tile, and how Triton runs it."""

    m: int
    n: int
    k: int = 32
    warps: int = 4
    stages: int = 3


# Of product: (on 9.0 and 10.x, on 8.0, elsewhere, where a block has 100 KB of shared memory), with a thin product of up
# to 64 ranks beside it, and with more or with masks.
_PRODUCT = {
    False: (Blocks(128, 128, 64, 8, 3), Blocks(128, 128, 32, 8, 4), Blocks(64, 128, 32, 8, 3)),
    True: (Blocks(128, 64, 64, 8, 3), Blocks(64, 64, 32, 4, 3), Blocks(64, 64, 32, 4, 3)),
}
_GRAM = Blocks(128, 128, 64, 8, 3), Blocks(128, 128, 32, 8, 3), Blocks(128, 128, 32, 8, 2)
# For up to 32 ranks, and for more: what fits into registers.
_ACTIVATION = Blocks(32, 32, warps=8, stages=1), Blocks(16, 32, warps=4, stages=1)
_OTHERS = {
    "activation_backward": Blocks(16, 32, warps=4, stages=1),
    "combine": Blocks(4, 512, warps=4),
    "sort": Blocks(1, 4096, warps=8),
}


# Of product and gram in float32, which takes twice the room and is made without tensor cores where it is exact.
_WIDE = Blocks(64, 32, 16, 8, 2)


def blocks_for(kernel: str, capability: int, rank: int = 0, dtype: torch.dtype = torch.bfloat16) -> Blocks:
    """capability: 80 for 8.0. Under the interpreter blocks are small, so that small tensors have many."""
    if INTERPRETED:
        return Blocks(16, 64 if kernel == "sort" else 32)
    if dtype == torch.float32 and kernel in ("product", "gram"):
        return _WIDE
    if dtype == torch.float32 and kernel in ("activation", "activation_backward"):
        return Blocks(16, 16, warps=4, stages=1)
    card = 0 if capability in (90, 100, 103) else 1 if capability == 80 else 2
    if kernel == "product":
        return _PRODUCT[rank > 64][card]
    if kernel == "activation":
        return _ACTIVATION[rank > 32 or card == 2]
    return _GRAM[card] if kernel == "gram" else _OTHERS[kernel]


def blocks_of(kernel: str, x: Tensor, rank: int = 0) -> Blocks:
    """For the device of x. rank: of a thin product beside what is made."""
    if x.device.type != "cuda":
        return blocks_for(kernel, 90, rank, x.dtype)
    major, minor = torch.cuda.get_device_capability(x.device)
    return blocks_for(kernel, 10 * major + minor, rank, x.dtype)


def launch(kernel: Any, grid: tuple[int, ...], x: Tensor, blocks: Blocks, /, **arguments: Any) -> None:
    """On x's device."""
    if INTERPRETED:
        kernel[grid](**arguments)
        return
    with torch.cuda.device(x.device):
        kernel[grid](**arguments, num_warps=blocks.warps, num_stages=blocks.stages)


def rank_block(r: int) -> int:
    """The least that a product on tensor cores takes is 16."""
    return max(16, triton.next_power_of_2(r))


def seed_of(p: float, seed: int) -> dict[str, Any]:
    """Arguments of a kernel that drops: nothing, where p is 0."""
    return {"seed": seed, "threshold": round(p * 2**24), "keep_scale": 1 / (1 - p), "DROP": p > 0}


def plain_experts(ends_E: Tensor, num_rows: int) -> Tensor:
    """`[S]`: each row's expert; E where it has none."""
    rows = torch.arange(num_rows, device=ends_E.device)
    return torch.bucketize(rows, ends_E.long(), right=True)


def plain_slots(ids_N: Tensor, ends_E: Tensor, num_rows: int) -> Tensor:
    """`[S]`: the place of each row's expert among the hot ones, or -1."""
    found = plain_experts(ends_E, num_rows)[:, None] == ids_N
    return torch.where(found.any(1), found.int().argmax(1), -1)


def plain_drop(x_SI: Tensor, order_S: Tensor, p: float, seed: int) -> Tensor:
    """`drop` of all rows by numpy."""
    if p == 0:
        return x_SI
    rows, columns = order_S.cpu().numpy().astype(np.uint64)[:, None], np.arange(x_SI.shape[1], dtype=np.uint64)
    word, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    c0, c1 = np.broadcast_arrays(columns[None, :], rows)
    c2 = c3 = np.zeros_like(c0)
    key0, key1 = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)
    for _ in range(7):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (b >> word) ^ c1 ^ key0, b & low, (a >> word) ^ c3 ^ key1, a & low
        key0, key1 = (key0 + np.uint64(0x9E3779B9)) & low, (key1 + np.uint64(0xBB67AE85)) & low
    kept = torch.from_numpy((c0 >> np.uint64(8)) >= round(p * 2**24)).to(x_SI.device)
    return x_SI * kept / (1 - p)


@triton.jit
def slot_of(ids, group, num_ids, IDS: tl.constexpr):
    """The place of a group among those with factors (`ids` int64, N of them), or -1."""
    n = tl.arange(0, IDS)
    found = tl.load(ids + n, mask=n < num_ids, other=-1) == group
    return tl.sum(tl.where(found, n + 1, 0), 0) - 1


@triton.jit
def drop(x, seed, row, column, threshold, keep_scale):
    """Each value of a tile kept with 1 - p, by a counter: its row (an assignment's own number) and its column. Philox
    with 7 rounds (Salmon et al. 2011)."""
    c1 = row.to(tl.int32)[:, None] + 0 * column[None, :]
    c0 = column[None, :] + 0 * c1
    bits, _, _, _ = tl.philox(seed, c0, c1, 0 * c0, 0 * c0, n_rounds=7)
    bits = (bits.to(tl.uint32, bitcast=True) >> 8).to(tl.int32)
    return tl.where(bits >= threshold, x.to(tl.float32) * keep_scale, 0.0).to(x.dtype)
