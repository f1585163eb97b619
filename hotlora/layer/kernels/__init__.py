"""Kernels for a GPU, in Triton. `gemm` has grouped products, `benchmarks/time_kernels.py` times them beside torch's own;
`layer.fused` has the others, each beside its plain oracle: `sort`, `product`, `activation`, `activation_backward`,
`gram`, `combine`, with what they share in `launch`.

Nothing here is imported unless it is used, because Triton is optional: `layer.gpu` decides.
"""
