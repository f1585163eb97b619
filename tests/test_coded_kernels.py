"""Weights in codes, decoded inside of the product, against dequantize-then-multiply; as tests/test_kernels.py runs."""

import os
import sys

import pytest
import torch
from test_kernels import DEVICE, SIZES, TOLERANCE, ends_of, plain_gemm, randn
from test_quantize import random_weight

from hotlora.adapter.packed import PackedExperts, held_scales
from hotlora.adapter.quantized import QuantizedExperts
from hotlora.hf.experts_view import FrozenWeight
from hotlora.layer import gpu
from hotlora.layer.kernels.coded_gemm import coded_gemm

assert "triton" in sys.modules and (torch.cuda.is_available() or os.environ["TRITON_INTERPRET"] == "1")


def mxfp4(shape: tuple[int, int, int], dtype: torch.dtype) -> PackedExperts:
    """gpt_oss's: held as `[E, O, I]`, for a parameter `[E, I, O]`."""
    generator = torch.Generator().manual_seed(0)
    experts, columns, rows = shape
    packed = torch.randint(256, (experts, rows, columns // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(118, 125, (experts, rows, columns // 32), dtype=torch.uint8, generator=generator)
    scales[0, 0, 0] = 0  # 2^-127
    return PackedExperts(packed, scales, 4, dtype, True)


def fp8(shape: tuple[int, int, int], dtype: torch.dtype) -> PackedExperts:
    experts, rows, columns = shape
    codes = random_weight(*shape).mul(400).to(torch.float8_e4m3fn).view(torch.uint8)
    scales = random_weight(experts, rows // 8, columns // 16, seed=1).abs()
    return PackedExperts(codes, held_scales(scales), 8, dtype, False)


def quantized(bits: int, keep: tuple[int, ...] = ()):
    return lambda shape, dtype: QuantizedExperts.from_weight(random_weight(*shape, dtype=dtype), bits, keep)


HOLDERS = {
    "nf4": (quantized(4), (40, 56)), "nf4, odd rows": (quantized(4), (33, 47)), "8 bits": (quantized(8), (40, 56)),
    "nf4, some kept": (quantized(4, (1, 2)), (40, 56)), "mxfp4": (mxfp4, (64, 40)), "fp8": (fp8, (40, 64)),
}  # fmt: skip


# Every kind in every case, and once in half precision; experts 1 and 2 are kept of four at least.
CASES = [
    (name, case, torch.float32) for name in HOLDERS for case in SIZES if "kept" not in name or len(SIZES[case][0]) > 3
]
CASES += [(name, "some are empty", torch.bfloat16) for name in HOLDERS]


@pytest.mark.parametrize(("name", "case", "dtype"), CASES, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("is_gradient", [False, True])
def test_coded_gemm(name, dtype, case, is_gradient, monkeypatch):
    """Forward, and with the weights transposed, for the input's gradient; a tail of NaN, which must not leak."""
    monkeypatch.setenv("HOTLORA_KERNELS", "fused")
    sizes, tail = SIZES[case]
    make, matrix = HOLDERS[name]
    holder = make((len(sizes), *matrix), dtype).to(DEVICE)
    weight = FrozenWeight(holder, is_transposed=name == "mxfp4")
    weight = weight.T if is_gradient else weight
    dense_EOI = weight.all().transpose(1, 2)
    x = randn(sum(sizes) + tail, dense_EOI.shape[2], dtype=dtype)
    x[sum(sizes) :] = float("nan")
    expected = plain_gemm(x.float(), dense_EOI.float(), ends_of(sizes))
    y = coded_gemm(x, holder.coded(), ends_of(sizes), weight.is_transposed != holder.is_transposed)
    assert y.dtype == dtype and y.shape == (len(x), weight.num_outputs) and not y[sum(sizes) :].any()
    scale = expected.abs().max().clamp(min=1e-9)
    assert (y.float() - expected).abs().max() / scale <= TOLERANCE[dtype]
    index = torch.arange(len(sizes), device=DEVICE).repeat_interleave(torch.tensor(sizes, device=DEVICE))
    index = torch.cat([index, index.new_full((tail,), len(sizes))])
    (rows,) = gpu.Rows.blocks(len(sizes), index.unsqueeze(1), 1, True)
    assert torch.equal(rows.product(x, weight), y)  # it is what the layer takes


def test_it_is_asked_for(monkeypatch):
    """Not by itself: it is not timed on a GPU yet."""
    holder, (rows,) = (
        fp8((2, 40, 64), torch.float32),
        gpu.Rows.blocks(2, torch.zeros(3, 1, dtype=torch.int64), 1, False),
    )
    for chosen, is_called in (("fused", True), ("triton", False), ("torch", False)):
        monkeypatch.setenv("HOTLORA_KERNELS", chosen)
        made = []
        monkeypatch.setattr(holder, "coded", lambda made=made: made.append(1) or PackedExperts.coded(holder))
        got = rows.product(random_weight(3, 64), FrozenWeight(holder, False))
        assert bool(made) == is_called
        torch.testing.assert_close(got, random_weight(3, 64) @ holder.expert(0).T, rtol=1e-5, atol=1e-5)
