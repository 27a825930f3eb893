"""The adapters of one projection, by slot, in tables that both ways of LoRA read. For CPUs."""

import itertools
import math
from collections.abc import Iterable, Sequence
from functools import cache

import torch

from worker.engine.adapter import LoRAPair
from worker.engine.lora_ops import Part, Stack, add_lora_segments, weighted_sums
from worker.engine.lora_step import LoRAStep, Pattern, TokenEntries
from worker.engine.pages import zero_pages


class LoRABank:
    """A table for each rank, made when the first adapter of that rank comes."""

    def __init__(self, in_features: int, sizes: Sequence[int], max_loras: int) -> None:
        """`sizes` are the outs of the projection's modules."""
        self._in = in_features
        self._sizes = tuple(sizes)
        self._max_loras = max_loras
        self._tables: dict[int, _RankTable] = {}
        self._entries: dict[int, tuple[int, int]] = {}
        """By slot, the rank of its table and its entry there."""
        self._stacks: dict[int, Stack] = {}
        """By slot, as views of the tables."""

    def put(self, slot: int, rank: int, entry: int, pairs: Sequence[LoRAPair | None]) -> None:
        """Let a slot that was cleared hold `pairs`, one for each module, None for nothing.

        They go to `entry` of the table for `rank`, replacing what was there.
        """
        modules = {module for module, pair in enumerate(pairs) if pair is not None}
        table = self._tables.get(rank)
        if modules and (table is None or not modules <= table.modules):
            dtype = next(pair.a.dtype for pair in pairs if pair is not None)
            table = self._tables[rank] = self._widen(rank, modules, table, dtype)
        if table is not None:
            table.write(entry, pairs)
        if table is not None and modules:
            self._entries[slot] = rank, entry
            self._stacks[slot] = table.stack(entry)

    def clear(self, slot: int) -> None:
        self._entries.pop(slot, None)
        self._stacks.pop(slot, None)

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
        for rank, entries in step.rows.items():
            table = self._tables.get(rank)
            if table is not None:
                table.add(x, y, entries)

    def _widen(
        self, rank: int, modules: Iterable[int], table: "_RankTable | None", dtype: torch.dtype
    ) -> "_RankTable":
        """A table for `modules` beside those of `table`, with what it holds."""
        known = table.modules if table is not None else frozenset()
        wide = _RankTable(rank, self._in, self._sizes, known.union(modules), self._max_loras, dtype)
        for slot, (own, entry) in self._entries.items():
            if table is not None and own == rank:
                wide.write(entry, table.read(entry))
                self._stacks[slot] = wide.stack(entry)
        return wide


class _RankTable:
    """Adapters of at most `rank` on each of some modules of a projection, padded with zeros to it.

    An entry takes memory from when it is first written. A weighted sum reads whole rows: those of a's
    transpose, weighted by x, and those of b's, weighted by what came of it. Modules have different outs, so
    b's rows are cut into pieces that are equally wide in all of them.
    """

    def __init__(  # noqa: PLR0917
        self,
        rank: int,
        in_features: int,
        sizes: Sequence[int],
        modules: Iterable[int],
        max_entries: int,
        dtype: torch.dtype,
    ) -> None:
        """`modules` are numbers of those of `sizes` for which there is room."""
        columns = _side_by_side(sizes)
        self.modules = frozenset(modules)
        self._order = sorted(self.modules)
        own = tuple(sizes[module] for module in self._order)
        self._sizes = sizes
        self._rank = rank
        self._columns = [columns[module] for module in self._order]
        self._own_columns = _side_by_side(own)
        self._takes_all = own == tuple(sizes)
        width = math.gcd(*own)
        self._a = zero_pages((max_entries, in_features, len(own) * rank), dtype)
        self._b = zero_pages((max_entries, sum(own) * rank), dtype)
        self._a_rows = self._a.view(-1, len(own) * rank)
        self._b_rows = self._b.view(-1, width)
        self._written: set[int] = set()
        self._shrink = every_row(in_features)
        self._expand, self._weights = _pieces(rank, own, width)

    def write(self, entry: int, pairs: Sequence[LoRAPair | None]) -> None:
        """Replace the entry by `pairs`, one for each of the projection's modules."""
        if entry in self._written:
            self._a[entry].zero_()
            self._b[entry].zero_()
        if not any(pair is not None for pair in pairs):
            return
        self._written.add(entry)
        stack = self.stack(entry)
        for module, part in zip(self._order, stack.parts, strict=True):
            pair = pairs[module]
            if pair is not None:
                stack.a[:, part.ranks][:, : pair.rank] = pair.a.T
                part.b[: pair.rank] = pair.b.T

    def read(self, entry: int) -> list[LoRAPair | None]:
        """What `write` was given, padded; views."""
        pairs: list[LoRAPair | None] = [None] * len(self._sizes)
        stack = self.stack(entry)
        for module, part in zip(self._order, stack.parts, strict=True):
            pairs[module] = LoRAPair(stack.a[:, part.ranks].T, part.b.T)
        return pairs

    def stack(self, entry: int) -> Stack:
        """The entry as matrices; views."""
        rank, parts = self._rank, []
        for number, (columns, own) in enumerate(zip(self._columns, self._own_columns, strict=True)):
            b = self._b[entry, own.start * rank : own.stop * rank].view(rank, -1)
            parts.append(Part(slice(number * rank, (number + 1) * rank), columns, b))
        return Stack(self._a[entry], tuple(parts))

    def add(self, x: torch.Tensor, y: torch.Tensor, entries: TokenEntries) -> None:
        """Add to y in place what the tokens of `entries` are due."""
        x, y = x[entries.tokens], y[entries.tokens]
        h = weighted_sums(self._a_rows, entries.chosen(self._shrink), x.reshape(-1))
        weights = h if self._weights is None else h.index_select(1, self._weights)
        sums = weighted_sums(self._b_rows, entries.chosen(self._expand), weights.view(-1))
        delta = sums.view(len(x), -1)
        if self._takes_all:
            y.add_(delta)
        else:
            for columns, own in zip(self._columns, self._own_columns, strict=True):
                y[:, columns].add_(delta[:, own])


def _side_by_side(sizes: Sequence[int]) -> list[slice]:
    return [slice(*ends) for ends in itertools.pairwise(itertools.accumulate(sizes, initial=0))]


@cache
def every_row(rows: int) -> Pattern:
    """One sum over all rows of a's transpose."""
    return Pattern(torch.arange(rows, dtype=torch.int32)[None], rows)


@cache
def _pieces(rank: int, sizes: tuple[int, ...], width: int) -> tuple[Pattern, torch.Tensor | None]:
    """A sum over the ranks for each piece of each module, and which columns of h weight them; None for all.

    A module's b lies as [rank, pieces, width].
    """
    chosen, weights = list[list[int]](), list[int]()
    first = 0
    for number, size in enumerate(sizes):
        pieces = size // width
        for piece in range(pieces):
            chosen.append([first + row * pieces + piece for row in range(rank)])
            weights += range(number * rank, (number + 1) * rank)
        first += rank * pieces
    every = weights == list(range(len(sizes) * rank))
    return Pattern(torch.tensor(chosen, dtype=torch.int32), first), None if every else torch.tensor(weights)
