"""Grouped products for a GPU, in Triton: `gemm` has them, `bench` times them against torch's own.

Nothing here is imported unless it is used, because Triton is optional: `grouped` decides.
"""
