"""Kernels for a GPU, in Triton. `gemm` has grouped products, timed beside torch's own by benchmarks/time_kernels.py.
`fused` has the whole layer and calls the others, each beside its plain oracle: `sort`, `product`, `activation`,
`activation_backward`, `gram`, `combine`, with what they share in `launch`.

Nothing here is imported unless it is used, because Triton is optional: `layer.gpu` decides.
"""
