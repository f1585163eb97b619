"""Compiles what one fused layer launches, at OLMoE's sizes, to a GPU's machine code, which needs no GPU, and prints
what came of it: run by test_fused_layer.py.

python tests/compiled_fused.py 80 90        # compute capabilities
python tests/compiled_fused.py 90 --r 64 -v --kernel product
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hotlora.layer.kernels import launch as launching
from hotlora.layer.kernels.activation import Factors, Gate, activation
from hotlora.layer.kernels.activation_backward import activation_backward
from hotlora.layer.kernels.combine import combine
from hotlora.layer.kernels.gram import Side, gram
from hotlora.layer.kernels.product import Low, Order, Thin, product
from hotlora.layer.kernels.sort import counting_sort

TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}


def launches(capability: int, dtype: torch.dtype, r: int, p: float, gate: Gate, bias: bool) -> list[tuple[Any, ...]]:
    """(kernel, blocks, arguments) of a layer forward and backward."""
    found: list[tuple[Any, ...]] = []
    T, K, E, D, F, N, P = 1024, 8, 64, 2048, 1024, 16, 2 if gate.is_gated else 1
    with (
        FakeTensorMode(),
        mock.patch.object(
            launching, "launch", lambda kernel, grid, x, blocks, /, **its: found.append((kernel, blocks, its))
        ),
        mock.patch.object(
            launching, "blocks_of", lambda kernel, x, rank=0: launching.blocks_for(kernel, capability, rank, x.dtype)
        ),
    ):
        order = Order(*counting_sort(torch.empty(T, K, dtype=torch.int64), E), K)
        x, weights = torch.empty(T, D, dtype=dtype), torch.empty(T * K, dtype=dtype)
        up, down = torch.empty(E, P * F, D, dtype=dtype), torch.empty(E, D, F, dtype=dtype)
        shapes = (N, P * r, D), (N, P * F, r), (N, r, F), (N, D, r)
        its = Factors(torch.empty(N, dtype=torch.int64), *map(torch.empty, shapes), 2.0, p, 2**40, 2**50)
        up_bias, down_bias = (torch.empty(E, n, dtype=dtype) if bias else None for n in (P * F, D))
        thin = Thin(its.ids_N, its.A_up, 2.0, p, 2**40)
        y, z_up, _ = product(x, up, order, gather=True, thin=thin, bias_EO=up_bias)
        act, z_down = activation(y, gate, order, z_up, its)
        low = Low(its.ids_N, z_down, its.B_down)
        out, _, _ = product(act, down, order, low=low, bias_EO=down_bias, weights_S=weights)
        combine(out, order.place_S, K)
        thin = Thin(its.ids_N, its.B_down.transpose(1, 2), 2.0)
        dact, g, dots = product(x, down.transpose(1, 2), order, gather=True, thin=thin, dot_EI=down_bias)
        got = activation_backward(
            dact, y, weights, gate, order, dots_S=dots, z_up_SPR=z_up, g_down_SR=g, factors=its
        )  # fmt: skip
        one = torch.float32
        gram(Side(got.g_SPR), Side(x, True), order, its.ids_N, one, p=p, seed=2**40)
        gram(Side(got.dup_SPF), Side(z_up), order, its.ids_N, one, parts=P, interleaved=gate.is_interleaved)
        gram(Side(g), Side(got.act_SF), order, its.ids_N, one, weights_S=weights, p=p, seed=2**50)
        gram(Side(x, True), Side(z_down), order, its.ids_N, one, weights_S=weights)
        low = Low(its.ids_N, got.g_SPR, its.A_up.transpose(1, 2), p, 2**40)
        product(got.dup_SPF, up.transpose(1, 2), order, low=low)
    return found


def compiled(kernel: Any, blocks: Any, given: dict[str, Any], capability: int, show: bool) -> dict[str, Any]:
    signature, constants, aligned = {}, {}, {}
    for parameter in kernel.params:
        name, at, value = parameter.name, (parameter.num,), given[parameter.name]
        fixed = parameter.do_not_specialize
        if name == "PRECISION":
            first = next(value for value in given.values() if isinstance(value, torch.Tensor))
            value = "ieee" if first.dtype == torch.float32 else "tf32"
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not fixed):
            signature[name], constants[at] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], aligned[at] = "*" + TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i64" if abs(value) >= 2**31 else "i32"
            if value % 16 == 0 and not fixed:
                aligned[at] = [["tt.divisibility", 16]]
    made = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": blocks.warps, "num_stages": blocks.stages},
    )
    text = resources(made.asm["ptx"], capability)
    if show:
        print(text, file=sys.stderr)
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", text))
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", text))
    return {
        "kernel": kernel.__name__, "capability": capability, "shared": made.metadata.shared, "registers": registers,
        "spilled": spilled, "machine_code": len(made.asm["cubin"]), "tensor_cores": "mma" in made.asm["ptx"],
    }  # fmt: skip


def resources(ptx: str, capability: int) -> str:
    """What ptxas -v says of registers and spills."""
    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        ptxas = triton.knobs.nvidia.ptxas_blackwell.path  # of all targets, whatever its name
        command = [ptxas, "-v", f"-arch={target[1]}", source, "-o", source.with_suffix(".cubin")]
        done = subprocess.run(command, capture_output=True)
        return done.stdout.decode() + done.stderr.decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capability", type=int, nargs="+")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--p", type=float, default=0.0)
    parser.add_argument("--gate", default="silu")
    parser.add_argument("--bias", action="store_true")
    parser.add_argument("--kernel", default="", help="those whose name has this")
    parser.add_argument("-v", action="store_true", help="what ptxas says")
    given = parser.parse_args()
    gate = Gate(given.gate, is_interleaved=given.gate == "gpt_oss", alpha=1.702, limit=7.0)
    for capability in given.capability:
        for kernel, blocks, its in launches(
            capability, getattr(torch, given.dtype), given.r, given.p, gate, given.bias
        ):
            if given.kernel in kernel.__name__:
                print(json.dumps(compiled(kernel, blocks, its, capability, given.v)), flush=True)


if __name__ == "__main__":
    main()
