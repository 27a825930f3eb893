"""The adapters of one projection, by slot, in the forms that the ways of LoRA need. For CPUs."""

from collections.abc import Sequence

import torch

from worker.engine.adapter import LoRAPair
from worker.engine.lora_ops import (
    Packed,
    Part,
    Stack,
    add_lora_lanes,
    add_lora_packed,
    add_lora_segments,
    pack_stacks,
    stack_pairs,
)
from worker.engine.lora_plan import MOST_LANES
from worker.engine.lora_step import LoRAStep
from worker.engine.pages import zero_pages


class LoRABank:
    """Adapters as they are by slot; side by side for the slots of the last steps; in lanes by rank."""

    def __init__(self, in_features: int, sizes: Sequence[int]) -> None:
        """`sizes` are the outs of the projection's modules."""
        self._in = in_features
        self._sizes = tuple(sizes)
        self._stacks: dict[int, Stack] = {}
        self._packed: Packed | None = None
        self._packed_slots: tuple[int, ...] | None = None
        self._lanes: dict[int, _LaneBank] = {}

    def put(self, slot: int, pairs: Sequence[LoRAPair | None]) -> None:
        """Replace what `slot` holds: a pair for each of the projection's modules, None for nothing."""
        self.clear(slot)
        if any(pair is not None for pair in pairs):
            self._stacks[slot] = stack_pairs(pairs, self._sizes)
            self._packed_slots = None

    def clear(self, slot: int) -> None:
        if self._stacks.pop(slot, None) is not None:
            self._packed_slots = None

    def fill_lane(self, rank: int, lane: int, slot: int) -> None:
        """Copy the adapter in `slot`, of at most `rank` on each module, to a lane of the bank for `rank`."""
        bank = self._lanes.get(rank)
        stack = self._stacks.get(slot)
        if bank is None:
            if stack is None:
                return
            bank = self._lanes[rank] = _LaneBank(rank, self._in, self._sizes, stack.a.dtype)
        bank.fill(lane, stack)

    def add(self, x: torch.Tensor, y: torch.Tensor, step: LoRAStep) -> None:
        """Add to y [T, out] in place what the step's tokens are due for x [T, in]."""
        if not self._stacks:
            return
        dtype = next(iter(self._stacks.values())).a.dtype
        if dtype == y.dtype:
            self._add(x, y, step)
        else:  # `lora_dtype` differs from the base model's: the product is made in it, the sum in ours
            delta = torch.zeros_like(y, dtype=dtype)
            self._add(x.to(dtype), delta, step)
            y.add_(delta)

    def _add(self, x: torch.Tensor, y: torch.Tensor, step: LoRAStep) -> None:
        add_lora_segments(x, y, step.segments, self._stacks)
        if step.packed is None:
            self._packed, self._packed_slots = None, None
        else:
            packed = self._pack(step.packed.slots)
            if packed is not None:
                tokens = step.packed.tokens
                foreign = step.packed.foreign(packed.slots)
                add_lora_packed(x[tokens], y[tokens], packed.stack, foreign)
        for rank, lanes in step.lanes.items():
            bank = self._lanes.get(rank)
            if bank is not None:
                add_lora_lanes(x, y, bank.first(lanes.lanes), lanes)

    def _pack(self, slots: tuple[int, ...]) -> Packed | None:
        """Those of `slots` that hold something, side by side; kept until they change."""
        if slots != self._packed_slots:
            own = {slot: self._stacks[slot] for slot in slots if slot in self._stacks}
            self._packed = pack_stacks(own) if own else None
            self._packed_slots = slots
        return self._packed


class _LaneBank:
    """Adapters of at most `rank` on each module, padded to it with zeros; a lane for each.

    A lane takes memory from when it is first filled.
    """

    def __init__(self, rank: int, in_features: int, sizes: Sequence[int], dtype: torch.dtype) -> None:
        self._rank = rank
        self._sizes = sizes
        self._columns = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
        self._a = zero_pages((MOST_LANES, len(sizes) * rank, in_features), dtype)
        self._b = [zero_pages((MOST_LANES, rank, size), dtype) for size in sizes]
        self._used: set[int] = set()
        """Modules that some adapter uses."""
        self._first: dict[int, Stack] = {}

    def first(self, lanes: int) -> Stack:
        """The first `lanes` lanes, for `add_lora_lanes`; views, made once."""
        stack = self._first.get(lanes)
        if stack is None:
            rank = self._rank
            parts = [
                Part(
                    slice(module * rank, (module + 1) * rank),
                    slice(self._columns[module], self._columns[module + 1]),
                    self._b[module][:lanes],
                )
                for module in sorted(self._used)
            ]
            stack = self._first[lanes] = Stack(self._a[:lanes].mT, tuple(parts))
        return stack

    def fill(self, lane: int, stack: Stack | None) -> None:
        """Put `stack` there, or nothing."""
        parts = () if stack is None else stack.parts
        if len(parts) < len(self._sizes) or any(len(part.b.T) < self._rank for part in parts):
            self._a[lane].zero_()
            for b in self._b:
                b[lane].zero_()
        for part in parts:
            assert stack is not None
            module, rank = self._columns.index(part.columns.start), len(part.b.T)
            first = module * self._rank
            self._a[lane, first : first + rank] = stack.a[part.ranks]
            self._b[module][lane, :rank] = part.b.T
            if module not in self._used:
                self._used.add(module)
                self._first.clear()
