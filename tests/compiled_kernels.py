"""Compiles each kernel to a GPU's machine code, which needs no GPU, and prints what came of it: run by test_kernels.py.

python tests/compiled_kernels.py 80        # the compute capability
"""

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hotlora.layer.kernels import gemm

POINTERS = {"ends": "*i32", "slots": "*i32", "rows": "*i64", "ids": "*i64"}
TENSORS = ("y", "z", "x", "left", "weight", "A", "B")
# What is contiguous: a stride of 1 is a constant.
ONES = ("y_o", "y_i", "x_i", "w_i", "a_i", "b_r", "l_o")
FLAGS = {"HAS_SLOTS": True, "HAS_ROWS": True, "HAS_IDS": True, "ADD": True, "WITH_Z": True, "GROUPS": 128}
LOW_RANK = {"R": 32, "R_BLOCK": 32}


def compiled(tuned: Any, config: Any, dtype: str, capability: int, parts: dict[str, int]) -> dict[str, Any]:
    values = {**FLAGS, **LOW_RANK, **parts, **config.kwargs, "PRECISION": "ieee" if dtype == "fp32" else "tf32"}
    signature, constants, aligned = {}, {}, {}
    for parameter in tuned.fn.params:
        name, at = parameter.name, (parameter.num,)
        if parameter.is_constexpr or name in ONES:
            signature[name], constants[at] = "constexpr", values.get(name, 1)
        elif name in TENSORS or name in POINTERS:
            signature[name], aligned[at] = POINTERS.get(name, f"*{dtype}"), [["tt.divisibility", 16]]
        elif name == "scaling":
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name not in ("num_rows", "num_groups"):
                aligned[at] = [["tt.divisibility", 16]]
    kernel = triton.compile(
        ASTSource(tuned.fn, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
    return {
        "kernel": tuned.fn.__name__, "dtype": dtype, **parts, **config.kwargs, "shared": kernel.metadata.shared,
        "machine_code": len(kernel.asm["cubin"]), "tensor_cores": "mma" in kernel.asm["ptx"],
    }  # fmt: skip


def main() -> None:
    capability, of_all = int(sys.argv[1]), sys.argv[2:] == ["all"]
    low_rank = [(gemm._low_rank_kernel, {"IN_PARTS": a, "OUT_PARTS": b}) for a, b in ((1, 2), (2, 1))]
    kernels = [(gemm._linear_kernel, {}), (gemm._outer_kernel, {}), *low_rank]
    for tuned, parts in kernels:
        configs = tuned.configs if of_all else tuned.configs[:1]
        for dtype in ("bf16", "fp32") if of_all else ("bf16",):
            for config in configs:
                print(json.dumps(compiled(tuned, config, dtype, capability, parts)), flush=True)


if __name__ == "__main__":
    main()
