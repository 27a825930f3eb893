"""LoRA by the kernels of `kernels.lora`: for GPUs, and for CPUs through Triton's interpreter."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from worker.engine.adapters.adapter import LoRAPair, LoRAWeights
from worker.engine.kernels.lora import (
    LoRATable,
    TokenTiles,
    add_lora,
    add_lora_parts,
    scratch_size,
    tile_tokens,
)
from worker.engine.kernels.tilings import Fit, Situation, Tuner
from worker.engine.limits import EngineLimits
from worker.engine.lora_ops import add_stack, collected, expand_stack
from worker.engine.lora_plan import Run, merge_runs
from worker.engine.projections import LoRAShare, Projection
from worker.engine.transfer import to_device


class KernelLoRAStep(NamedTuple):
    """How one step applies LoRA."""

    tiles: TokenTiles | None
    """Tokens that go by the kernels; None when none does."""
    dense: Sequence[Run] = ()
    """Runs that go by products of torch's own: long ones, never in a captured step."""


class KernelLoRALayers:
    """As LoRALayers: the adapters in the slots of one engine, at their own ranks, used from one thread.

    A projection gets its table when the first adapter needs it. While `step` is None every projection
    computes what it computes without LoRA.
    """

    def __init__(
        self,
        projections: Mapping[tuple[str, ...], Projection],
        device: torch.device,
        limits: EngineLimits,
        dtype: torch.dtype,
        tuner: Tuner | None = None,
    ) -> None:
        """`projections` by the names of their modules; `dtype` is that of what they are given.

        With a `tuner` the construction takes as long as that may take.
        """
        self.step: KernelLoRAStep | None = None
        self.generation = 0
        """Goes up when a captured graph would no longer find what it was captured with."""
        self._projections = projections
        self._device = device
        self._limits = limits
        self._dtype = dtype
        self._fit = Fit({}, None) if tuner is None else tuner.tune(self._situation())
        self._tables: dict[tuple[str, ...], LoRATable] = {}
        self._scratch = torch.empty(0, device=device)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def put(self, slot: int, weights: LoRAWeights) -> None:
        """Replace whatever `slot` holds by `weights`."""
        on_device = self._to_device(weights.pairs)
        for names in self._projections:
            pairs = [on_device.get(name) for name in names]
            if any(pair is not None for pair in pairs):
                self._table(names).put(slot, pairs)
            elif names in self._tables:
                self._tables[names].clear(slot)

    def place(self, slot: int | None) -> int:
        """A key to sort decoding rows by: tokens of one adapter read together are read once."""
        return -1 if slot is None else slot

    def plan(self, spans: Sequence[tuple[int | None, int]]) -> KernelLoRAStep | None:
        """The step for rows of `(slot, tokens)`; None when none has an adapter."""
        least = self._fit.dense_from
        # By the row's own tokens, so that no neighbour changes its sums. Rows that decode have one.
        dense = [least is not None and tokens >= least for _, tokens in spans]
        dense_runs, kernel_runs = (
            merge_runs(
                (slot if own == wanted else None, tokens)
                for (slot, tokens), own in zip(spans, dense, strict=True)
            )
            for wanted in (True, False)
        )
        if not dense_runs and not kernel_runs:
            return None
        if not kernel_runs:
            return KernelLoRAStep(None, dense_runs)
        tiles = self.empty_step(sum(tokens for _, tokens in spans))
        host = tile_tokens(kernel_runs, tiles.max_tokens, tiles.max_slots)
        tiles.buffer.copy_(to_device(host.buffer, self._device))
        return KernelLoRAStep(tiles, dense_runs)

    def empty_step(self, num_tokens: int) -> TokenTiles:
        """Tiles without tokens, with room for a decode step if that is enough, else for any."""
        decode, chunks = self._capacities
        room = decode if num_tokens <= decode else chunks
        return TokenTiles(room, self._limits.max_loras, self._device)

    def _to_device(self, pairs: Mapping[str, LoRAPair]) -> dict[str, LoRAPair]:
        """On a GPU by a stream of their own, beside the step that is under way; the next one waits for it."""
        if self._copies is None:
            return {
                name: LoRAPair(*(tensor.to(self._device) for tensor in pair)) for name, pair in pairs.items()
            }
        with torch.cuda.stream(self._copies):
            copied = {
                name: LoRAPair(*(tensor.to(self._device, non_blocking=True) for tensor in pair))
                for name, pair in pairs.items()
            }
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._copies)
        for pair in copied.values():
            for tensor in pair:
                tensor.record_stream(current)
        return copied

    def _table(self, names: tuple[str, ...]) -> LoRATable:
        table = self._tables.get(names)
        if table is None:
            projection, limits = self._projections[names], self._limits
            share = projection.lora
            table = self._tables[names] = LoRATable(
                limits.max_loras,
                projection.in_features,
                projection.lora_sizes,
                parts=1 if share is None else share.parts,
                max_rank=limits.max_lora_rank,
                dtype=limits.lora_dtype,
                device=self._device,
            )
            for work, tiling in self._fit.tilings.items():
                table.set_tiling(work, tiling)
            needed = max(scratch_size(table, tokens, self._dtype) for tokens in self._capacities)
            if needed > len(self._scratch):
                self._scratch = torch.empty(needed, dtype=torch.float32, device=self._device)
            self.generation += 1
            projection.addition = (
                partial(self._add, table) if share is None else partial(self._add_shared, table, share)
            )
        return table

    def _add_shared(self, table: LoRATable, share: LoRAShare, x: torch.Tensor, y: torch.Tensor) -> None:
        """As `_add`, with an exchange for what goes by the kernels and one for the rest."""
        if self.step is None:
            return
        if share.columns is not None:
            y = y[:, share.columns]
        if self.step.tiles is not None:
            add_lora_parts(x, y, table, self.step.tiles, self._scratch, share.collect)
        runs = [
            (slice(start, stop), stack)
            for slot, start, stop in self.step.dense
            if (stack := table.stack(slot)) is not None
        ]
        if runs:
            hs = collected([x[own] @ stack.a for own, stack in runs], share.collect)
            for h, (own, stack) in zip(hs, runs, strict=True):
                expand_stack(h, y[own], stack)

    def _add(self, table: LoRATable, x: torch.Tensor, y: torch.Tensor) -> None:
        if self.step is None:
            return
        if self.step.tiles is not None:
            add_lora(x, y, table, self.step.tiles, self._scratch)
        for slot, start, stop in self.step.dense:
            stack = table.stack(slot)
            if stack is not None:
                add_stack(x[start:stop], y[start:stop], stack)

    def _situation(self) -> Situation:
        decode, chunks = self._capacities
        return Situation(
            [(projection.in_features, projection.lora_sizes) for projection in self._projections.values()],
            decode_tokens=decode,
            chunk_tokens=chunks,
            max_loras=self._limits.max_loras,
            max_rank=self._limits.max_lora_rank,
            lora_dtype=self._limits.lora_dtype,
            dtype=self._dtype,
            device=self._device,
        )

    @property
    def _capacities(self) -> tuple[int, int]:
        return self._limits.max_num_seqs, self._limits.max_num_batched_tokens
