"""Decode steps as captured graphs: one launch for all kernels of the model. For CUDA."""

import bisect
import gc
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

Forward = Callable[[], torch.Tensor]
"""Reads inputs at fixed addresses; returns logits [rows, vocabulary]."""


class Capture(Protocol):
    """Records what `forward` launches."""

    def __call__(self, forward: Forward) -> tuple[Callable[[], None], torch.Tensor]:
        """Return what launches it again, and the tensor that then has its result."""


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Rows for which graphs are captured: 1, 2, 4, then every 8 up to 64, then every 32, and the limit.

    Steps between two sizes are padded to the larger: with these by a quarter at most from 8 rows on.
    """
    sizes = [1, 2, 4, *range(8, 65, 8), *range(96, max_num_seqs, 32)]
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs]


def fitting_size(sizes: Sequence[int], num_rows: int) -> int:
    """The smallest of `sizes`, in order, that holds `num_rows`."""
    return sizes[bisect.bisect_left(sizes, num_rows)]


class Reads(NamedTuple):
    """What a graph reads beside the base model: its generation, or None if it does not read that."""

    lora: int | None = None
    """Tables of adapters."""
    merged: int | None = None
    """Weights with an adapter in them."""

    def outdates(self, other: "Reads") -> bool:
        """Whether the other's are an earlier generation of the same."""
        return any(
            own is not None and before not in {None, own} for own, before in zip(self, other, strict=True)
        )


class Key(NamedTuple):
    size: int
    reads: Reads


class DecodeGraphs:
    """Graphs by size and kind, captured when they are first needed."""

    def __init__(self, capture: Capture, max_num_seqs: int) -> None:
        self.sizes = graph_sizes(max_num_seqs)
        self._capture = capture
        self._graphs: dict[Key, tuple[Callable[[], None], torch.Tensor]] = {}

    def run(self, num_rows: int, reads: Reads, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Replay the graph for `num_rows` rows; `forward` is what to capture if there is none yet.

        The inputs must be in place, at the addresses that `forward` reads for that size. Returns logits
        [num_rows, vocabulary], valid until the next run.
        """
        key = Key(fitting_size(self.sizes, num_rows), reads)
        if key not in self._graphs:
            self._drop_stale(reads)
            self._graphs[key] = self._capture(forward)
        replay, logits = self._graphs[key]
        replay()
        return logits[:num_rows]

    def _drop_stale(self, reads: Reads) -> None:
        """Graphs of earlier generations read what is no longer all there is."""
        for key in [key for key in self._graphs if reads.outdates(key.reads)]:
            del self._graphs[key]


class CudaCapture:
    """Captures CUDA graphs that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, forward: Forward) -> tuple[Callable[[], None], torch.Tensor]:
        """See Capture."""
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            forward()  # what is compiled, tuned or allocated on first use must not be in the graph
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        gc.disable()  # what it frees on the device meanwhile would break the capture off
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                logits = forward()
        finally:
            gc.enable()
        return graph.replay, logits
