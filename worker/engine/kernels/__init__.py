"""Triton kernels of the CUDA path. A CPU needs no Triton: only `tilings` is imported where there is no CUDA.

`TRITON_INTERPRET=1`, set before Triton is first imported, runs them on CPU tensors instead: slow, for tests.
"""
