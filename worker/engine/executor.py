"""Puts packed rows through the base model: rows -> tensors and plans -> logits."""

import abc
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from transformers import PreTrainedModel

from worker.engine.adapters.adapter import LoRAWeights
from worker.engine.attention import AttentionPlan, PackedAttention
from worker.engine.attention_host import HostAttentionPlan
from worker.engine.changes.slots import ChangeStep, ModuleChanges
from worker.engine.kv_cache import BlockCopy, Leftover
from worker.engine.projections import Projection
from worker.engine.rope import scaled_positions
from worker.engine.transfer import to_device


class PackedRow(NamedTuple):
    """A row's part of a step."""

    blocks: list[int]
    offset: int
    """Tokens of the row that are in the cache."""
    tokens: list[int]
    """Those that go through now; they are written to the cache, which has room for them in `blocks`."""
    keep: int
    """How many of them, from the last backwards, give logits."""
    slot: int | None = None
    """LoRA slot; None for the base model."""
    source: int | None = None
    """Where in the tokens that the last step chose its only token is; None if `tokens` says it."""

    @property
    def held(self) -> tuple[list[int], int, int]:
        return self.blocks, self.offset, len(self.tokens)


class LoRA(Protocol):
    """The adapters in the slots, and the step's part in each projection; see LoRALayers."""

    step: Any

    def put(self, slot: int, weights: LoRAWeights) -> None: ...
    def place(self, slot: int | None) -> Any: ...
    def plan(self, spans: Sequence[tuple[int | None, int]]) -> Any: ...


class Executor(abc.ABC):
    """What puts rows through a model, be it by this process alone or with others. One thread only."""

    @abc.abstractmethod
    def put(self, slot: int, weights: LoRAWeights) -> None:
        """Replace whatever `slot` holds by `weights`."""

    @abc.abstractmethod
    def width(self, slot: int | None) -> int | None:
        """How many logits the tokens of a slot have; None for as many as the base model's."""

    @abc.abstractmethod
    def order(self, rows: Sequence[PackedRow]) -> list[int]:
        """How `run` wants rows: chunks before decoding rows, and those of one adapter side by side."""

    @abc.abstractmethod
    def run(self, rows: Sequence[PackedRow], latest: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [kept tokens, vocabulary] of rows in `order`, valid until the next run.

        With adapters that bring tokens of their own there are as many columns as the largest of them has;
        what a row's own adapter does not have means nothing.

        `latest` int64 has the tokens that rows with a `source` go on with. Nothing waits for the device. A
        run that raised leaves nothing behind but what it wrote to the rows' own places in the cache.
        """

    @abc.abstractmethod
    def run_uncached(self, prompts: Sequence[list[int]]) -> torch.Tensor:
        """Logits of the last token of each prompt, of two tokens or more; the cache is left alone."""

    @abc.abstractmethod
    def scrub(self, leftovers: Sequence[Leftover]) -> None:
        """Zero what earlier rows have left in blocks."""

    @abc.abstractmethod
    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Make blocks begin with what others begin with, one after the other."""

    def check(self) -> None:  # noqa: B027 (nothing by default)
        """Raise EngineFailed if what runs gave since the last time may be wrong."""

    def close(self) -> None:  # noqa: B027
        """End what runs beside this process."""


class LocalExecutor(Executor):
    """Runs rows by what this process has of the model."""

    def __init__(
        self,
        model: PreTrainedModel,
        attention: PackedAttention,
        projections: Sequence[Projection],
        lora: LoRA,
        device: torch.device,
        *,
        changes: ModuleChanges,
    ) -> None:
        self.lora = lora
        self.changes = changes
        self._model = model
        self._attention = attention
        self._projections = projections
        self._device = device
        self.rope_factors: dict[int | None, float] | None = None
        """By slot, for those whose positions are scaled; None where none may be."""
        self.merged_slot: int | None = None
        """The slot whose adapter the projections' merged products have."""
        self.merges = 0
        """How often the merged products have changed."""

    def put(self, slot: int, weights: LoRAWeights) -> None:
        """See Executor."""
        if slot == self.merged_slot:
            self.merged_slot = None
        weights = self.changes.put(slot, weights)
        self.lora.put(slot, weights)
        if self.rope_factors is not None:
            self.rope_factors[slot] = weights.rope_factor

    def width(self, slot: int | None) -> int | None:
        """See Executor."""
        return self.changes.width(slot)

    def order(self, rows: Sequence[PackedRow]) -> list[int]:
        """See Executor."""
        return sorted(
            range(len(rows)),
            key=lambda number: (
                len(rows[number].tokens) == 1,
                self.lora.place(rows[number].slot),
                -1 if rows[number].slot is None else rows[number].slot,
                rows[number].blocks[0],
            ),
        )

    def _plan_lora(self, rows: Sequence[PackedRow]) -> Any:
        return self.lora.plan([(row.slot, len(row.tokens)) for row in rows])

    def _plan_changes(self, rows: Sequence[PackedRow]) -> ChangeStep | None:
        return self.changes.plan([(row.slot, len(row.tokens), row.keep) for row in rows])

    def scrub(self, leftovers: Sequence[Leftover]) -> None:
        """See Executor."""
        for leftover in leftovers:
            self._attention.scrub(*leftover)

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """See Executor."""
        for copy in copies:
            self._attention.copy(*copy)

    def run_uncached(self, prompts: Sequence[list[int]]) -> torch.Tensor:
        """See Executor."""
        rows = [([number], 0, len(prompt)) for number, prompt in enumerate(prompts)]
        size = max(map(len, prompts))
        plan = HostAttentionPlan(rows, block_size=size, device=self._device, cached=False)
        packed = [PackedRow(row[0], 0, prompt, 1) for row, prompt in zip(rows, prompts, strict=True)]
        with self._step(plan, None, None):
            return self._forward(self._inputs(packed))

    def _is_merged(self, rows: Sequence[PackedRow]) -> bool:
        """Whether all rows have the adapter that is merged."""
        return self.merged_slot is not None and all(row.slot == self.merged_slot for row in rows)

    @contextmanager
    def _step(
        self, plan: AttentionPlan, lora: Any, changes: ChangeStep | None, *, merged: bool = False
    ) -> Iterator[None]:
        """Give attention, LoRA and changes their plans, and take them back whatever happens."""
        self._attention.plan, self.lora.step, self.changes.step = plan, lora, changes
        if merged:
            self._use_merged(True)
        try:
            yield
        except BaseException:
            for projection in self._projections:
                projection.forget()
            raise
        finally:
            self._attention.plan = self.lora.step = self.changes.step = None
            if merged:
                self._use_merged(False)

    def _use_merged(self, merged: bool) -> None:
        for projection in self._projections:
            projection.uses_merged = merged

    def _inputs(self, rows: Sequence[PackedRow], latest: torch.Tensor | None = None) -> "Inputs":
        tokens = [token for row in rows for token in row.tokens]
        positions = [row.offset + number for row in rows for number in range(len(row.tokens))]
        kept, targets, sources = list[int](), list[int](), list[int]()
        end = 0
        for row in rows:
            end += len(row.tokens)
            kept += range(end - row.keep, end)
            if row.source is not None:
                targets.append(end - 1)
                sources.append(row.source)
        parts = tokens, positions, kept, targets, sources
        packed = to_device(torch.tensor(list(itertools.chain.from_iterable(parts))), self._device)
        split = torch.split(packed, [len(part) for part in parts])
        if targets:
            assert latest is not None
            split[0].index_copy_(0, split[3], latest.index_select(0, split[4]))
        ids, places, kept_tokens = split[:3]
        if self.rope_factors is not None:
            factors = [self.rope_factors.get(row.slot, 1.0) for row in rows]
            places = scaled_positions(places, factors, [len(row.tokens) for row in rows])
        return Inputs(ids, places, kept_tokens)

    def _forward(self, inputs: "Inputs") -> torch.Tensor:
        output = self._model(
            input_ids=inputs.tokens.unsqueeze(0),
            position_ids=inputs.positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=inputs.kept,
        )
        logits: torch.Tensor = output.logits[0]
        return logits


class Inputs(NamedTuple):
    """What the model is given, int64 on its device."""

    tokens: torch.Tensor
    """[T]"""
    positions: torch.Tensor
    """[T], float32 in an engine whose rows may differ in the scaling of their positions."""
    kept: torch.Tensor
    """[kept], the tokens that give logits."""


class HostExecutor(LocalExecutor):
    """By torch's own operators, at once; for CPUs."""

    def __init__(self, *given: Any, changes: ModuleChanges, block_size: int) -> None:
        super().__init__(*given, changes=changes)
        self._block_size = block_size

    def run(self, rows: Sequence[PackedRow], latest: torch.Tensor | None = None) -> torch.Tensor:
        """See Executor."""
        merged = self._is_merged(rows)
        lora, changes = None if merged else self._plan_lora(rows), self._plan_changes(rows)
        plan = HostAttentionPlan([row.held for row in rows], block_size=self._block_size, device=self._device)
        with self._step(plan, lora, changes, merged=merged):
            return self._forward(self._inputs(rows, latest))
