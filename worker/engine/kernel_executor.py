"""Steps by the project's own kernels, decoding ones as captured graphs; for GPUs."""

from collections.abc import Sequence
from typing import Any

import torch

from worker.engine.attention_kernels import KernelAttentionPlan
from worker.engine.changes.slots import ModuleChanges
from worker.engine.executor import Inputs, LocalExecutor, PackedRow
from worker.engine.graphs import Capture, DecodeGraphs, Reads, fitting_size
from worker.engine.kernels.lora import TokenTiles
from worker.engine.lora_kernels import KernelLoRALayers, KernelLoRAStep


class KernelExecutor(LocalExecutor):
    """Nothing in a step waits for the device: the host writes tables, and everything follows from them."""

    lora: KernelLoRALayers

    def __init__(
        self,
        *given: Any,
        changes: ModuleChanges,
        num_blocks: int,
        block_size: int,
        max_blocks: int,
        max_num_seqs: int,
        capture: Capture | None,
    ) -> None:
        """The cache has a block more than `num_blocks`, for padding. No `capture`, no graphs."""
        super().__init__(*given, changes=changes)
        self._block_size = block_size
        self._max_blocks = max_blocks
        self._trash = num_blocks * block_size
        self._graphs = None if capture is None else DecodeGraphs(capture, max_num_seqs)
        self._buffers: dict[int, _Buffers] = {}

    def run(self, rows: Sequence[PackedRow], latest: torch.Tensor | None = None) -> torch.Tensor:
        """See Executor."""
        merged = self._is_merged(rows)
        lora, changes = None if merged else self._plan_lora(rows), self._plan_changes(rows)
        plan = KernelAttentionPlan(
            [row.held for row in rows],
            block_size=self._block_size,
            max_blocks=self._max_blocks,
            device=self._device,
        )
        inputs = self._inputs(rows, latest)
        # What adapters change is different code in every step, so such a step is never captured.
        is_decoding = changes is None and all(len(row.tokens) == row.keep == 1 for row in rows)
        if self._graphs is not None and is_decoding:
            tiles = None if lora is None else lora.tiles
            return self._replay(self._graphs, inputs, plan, tiles, merged=merged)
        with self._step(plan, lora, changes, merged=merged):
            return self._forward(inputs)

    def _replay(
        self,
        graphs: DecodeGraphs,
        inputs: Inputs,
        plan: KernelAttentionPlan,
        lora: TokenTiles | None,
        *,
        merged: bool,
    ) -> torch.Tensor:
        num_rows = len(inputs.tokens)
        size = fitting_size(graphs.sizes, num_rows)
        buffers = self._buffers.get(size)
        if buffers is None:
            buffers = self._buffers[size] = self._make_buffers(size)
        buffers.fill(inputs, plan, lora, self._trash)

        def forward() -> torch.Tensor:
            step = None if lora is None else KernelLoRAStep(buffers.lora)
            with self._step(buffers.plan, step, None, merged=merged):
                return self._forward(buffers.inputs)

        reads = Reads(None if lora is None else self.lora.generation, self.merges if merged else None)
        return graphs.run(num_rows, reads, forward)

    def _make_buffers(self, size: int) -> "_Buffers":
        plan = KernelAttentionPlan.padding(
            size,
            block_size=self._block_size,
            max_blocks=self._max_blocks,
            trash=self._trash,
            device=self._device,
        )
        zeros = torch.zeros(size, dtype=torch.int64, device=self._device)
        positions = zeros.clone() if self.rope_factors is None else zeros.float()
        inputs = Inputs(zeros, positions, torch.arange(size, device=self._device))
        return _Buffers(inputs, plan, self.lora.empty_step(size))


class _Buffers:
    """The inputs of the graphs for one size, at addresses that never change."""

    def __init__(self, inputs: Inputs, plan: KernelAttentionPlan, lora: TokenTiles) -> None:
        self.inputs = inputs
        self.plan = plan
        self.lora = lora

    def fill(self, inputs: Inputs, plan: KernelAttentionPlan, lora: TokenTiles | None, trash: int) -> None:
        """Copy a step of no more rows in; the rest becomes padding."""
        num_rows = len(inputs.tokens)
        for own, other in zip(self.inputs[:2], inputs[:2], strict=True):
            own[:num_rows].copy_(other, non_blocking=True)
            own[num_rows:].zero_()
        self.plan.copy_(plan, trash)
        if lora is not None:
            self.lora.copy_(lora)
