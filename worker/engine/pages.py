"""Large tensors of which perhaps only a part is ever used."""

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
