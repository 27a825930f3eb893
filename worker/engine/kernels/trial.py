"""A projection with adapters and tokens made up, for timing what LoRA takes on it."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch

from worker.engine.adapters.adapter import LoRAPair
from worker.engine.kernels.lora import LoRATable, TokenTiles, add_lora, scratch_size, tile_tokens
from worker.engine.kernels.tilings import Dimensions, Situation, Tiling, Work, work_of
from worker.engine.lora_ops import add_stack
from worker.engine.lora_plan import Run

Launch = Callable[[], object]
"""Something to be timed."""

_CACHES = 2
"""The adapters fill the device's cache so often: as in a step, none is found in it."""
_MAX_TABLES = 16
_TOKENS, _ADAPTERS, _RANK = 2048, 32, 16
"""No more than these: enough to fill a device, and what people have."""


class Trial:
    """LoRA on one projection in a step of the given capacity."""

    def __init__(self, dimensions: Dimensions, capacity: int, situation: Situation) -> None:
        self._situation = situation
        in_features, sizes = dimensions
        device, dtype = situation.device, situation.dtype
        self.tokens = min(capacity, _TOKENS)
        """That there are."""
        self._x = torch.randn(self.tokens, in_features, device=device, dtype=dtype)
        self.y = torch.zeros(self.tokens, sum(sizes), device=device, dtype=dtype)
        """What every launch adds to."""
        self._adapters = min(situation.max_loras, self.tokens, _ADAPTERS)
        self._rank = min(situation.max_rank, _RANK)
        self._tables = [self._table(dimensions) for _ in range(self._num_tables(dimensions))]
        self.work: Work = work_of(dimensions, capacity, situation)

    def kernels(self, tiling: Tiling, runs: Sequence[Run] | None = None) -> Launch:
        """The kernels on `runs`; by default tokens of all adapters, as many of each."""
        capacity, slots, device = self.work.max_tokens, self._situation.max_loras, self._situation.device
        tiles = TokenTiles(capacity, slots, device)
        tiles.copy_(tile_tokens(self._even_runs() if runs is None else runs, capacity, slots))
        for table in self._tables:
            table.set_tiling(self.work, tiling)
        size = scratch_size(self._tables[0], capacity, self._situation.dtype)
        scratch = torch.empty(size, dtype=torch.float32, device=device)
        return partial(self._run_kernels, tiles, scratch)

    def products(self, tokens: int) -> Launch:
        """Dense products on so many tokens of one adapter."""
        return partial(self._run_products, tokens)

    def _run_kernels(self, tiles: TokenTiles, scratch: torch.Tensor) -> None:
        for table in self._tables:
            add_lora(self._x, self.y, table, tiles, scratch)

    def _run_products(self, tokens: int) -> None:
        for table in self._tables:
            stack = table.stack(0)
            assert stack is not None
            add_stack(self._x[:tokens], self.y[:tokens], stack)

    def _table(self, dimensions: Dimensions) -> LoRATable:
        in_features, sizes = dimensions
        made_for = self._situation
        table = LoRATable(
            made_for.max_loras,
            in_features,
            sizes,
            max_rank=made_for.max_rank,
            dtype=made_for.lora_dtype,
            device=made_for.device,
        )
        for slot in range(self._adapters):
            table.put(slot, [self._pair(in_features, size) for size in sizes])
        return table

    def _pair(self, in_features: int, out_features: int) -> LoRAPair:
        made_for, rank = self._situation, self._rank

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=made_for.device, dtype=made_for.lora_dtype)

        return LoRAPair(normal(rank, in_features) / in_features, normal(out_features, rank) / rank)

    def _num_tables(self, dimensions: Dimensions) -> int:
        made_for = self._situation
        if made_for.device.type != "cuda":
            return 1
        cache = torch.cuda.get_device_properties(made_for.device).L2_cache_size
        in_features, sizes = dimensions
        numbers = self._adapters * self._rank * (in_features * len(sizes) + sum(sizes))
        num_bytes = numbers * made_for.lora_dtype.itemsize
        return min(_MAX_TABLES, 1 + _CACHES * cache // num_bytes)

    def _even_runs(self) -> list[Run]:
        used = self._adapters
        edges = itertools.pairwise(self.tokens * number // used for number in range(used + 1))
        return [(slot, start, stop) for slot, (start, stop) in enumerate(edges)]
