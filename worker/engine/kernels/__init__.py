"""Triton kernels of the CUDA path. Import them only where CUDA is used: a CPU needs no Triton.

`TRITON_INTERPRET=1`, set before Triton is first imported, runs them on CPU tensors instead: slow, for tests.
"""
