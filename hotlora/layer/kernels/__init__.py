"""Grouped products for a GPU, in Triton: `gemm` has them; `benchmarks/time_kernels.py` times them beside torch's own.

Nothing here is imported unless it is used, because Triton is optional: `layer.gpu` decides.
"""
