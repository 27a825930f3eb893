"""Memory of the host that is taken late, and given back early."""

import ctypes
import math
import mmap

import torch


def zero_pages(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> torch.Tensor:
    """Zeros. On the CPU they take no memory until they are written, page by page."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    # With huge pages the first token of a row would make 2 MiB of it resident, in every layer.
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # Linux
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def give_back_freed() -> None:
    """Let the system have what this process has freed; glibc would keep it for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
