"""Adapters in memory as both ways of LoRA read them, each in one piece. For CPUs."""

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch

from worker.engine.adapters.adapter import LoRAPair
from worker.engine.lora_ops import Chosen, Part, Stack, choose_rows, weighted_sums
from worker.engine.lora_plan import Run
from worker.engine.pages import zero_pages


class Dimensions(NamedTuple):
    """What a projection takes and gives."""

    in_features: int
    sizes: tuple[int, ...]
    """The outs of its modules."""
    parts: int = 1
    """Ranks of processes among whom A's rank is divided."""


class Form(NamedTuple):
    """What adapters have in common that lie in one table."""

    rank: int
    """Of all their modules: smaller ones are padded with zeros. Where A's is divided, that of B."""
    modules: tuple[tuple[int, ...], ...]
    """For each projection, the numbers of its modules that have an adapter."""


class LoRATable:
    """Adapters of one form, one after the other; an entry takes memory from when it is first written.

    What belongs to an adapter lies together: it takes its own size, and no more.
    """

    def __init__(
        self, form: Form, projections: Sequence[Dimensions], max_entries: int, dtype: torch.dtype
    ) -> None:
        self.form = form
        self.dtype = dtype
        layouts = [*_lay_out(form, projections)]
        widths = [width for layout in layouts if layout for width in (layout.a_width, layout.b_width)]
        end = max(layout.end for layout in layouts if layout)
        self._memory = zero_pages((max_entries, _up(end, math.lcm(*widths))), dtype)
        self.fields = [None if layout is None else Field(layout, self._memory) for layout in layouts]
        """What of an entry each projection reads; None where none of its modules has an adapter."""

    def write(self, entry: int, pairs: Sequence[Sequence[LoRAPair | None]]) -> None:
        """Replace an entry by `pairs`, for each projection one for each of its modules, as the form says."""
        if any(pair is not None and pair.b.shape[1] < self.form.rank for own in pairs for pair in own):
            self._memory[entry].zero_()
        for field, own in zip(self.fields, pairs, strict=True):
            if field is not None:
                field.write(entry, own)


class _Layout(NamedTuple):
    """Where in an entry a projection's matrices are. A starts at a multiple of its width, and so does b."""

    rank: int
    projection: Dimensions
    modules: tuple[int, ...]
    a_start: int
    b_start: int

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.projection.sizes[module] for module in self.modules)

    @property
    def a_rank(self) -> int:
        return self.rank // self.projection.parts

    @property
    def a_width(self) -> int:
        return self.a_rank * len(self.modules)

    @property
    def b_width(self) -> int:
        """Modules have different outs: b's rows are cut into pieces that are equally wide in all of them."""
        return math.gcd(*self.sizes)

    @property
    def end(self) -> int:
        return self.b_start + self.rank * sum(self.sizes)


def _lay_out(form: Form, projections: Sequence[Dimensions]) -> Iterator[_Layout | None]:
    end = 0
    for projection, modules in zip(projections, form.modules, strict=True):
        if not modules:
            yield None
            continue
        layout = _Layout(form.rank, projection, modules, 0, 0)
        a_start = _up(end, layout.a_width)
        b_start = _up(a_start + projection.in_features * layout.a_width, layout.b_width)
        layout = layout._replace(a_start=a_start, b_start=b_start)
        end = layout.end
        yield layout


class Field:
    """What of the entries of a table one projection reads.

    A weighted sum reads whole rows: those of a's transpose, weighted by x, and those of b's, weighted by
    what came of it.
    """

    def __init__(self, layout: _Layout, memory: torch.Tensor) -> None:
        """`memory` is [entries, stride]."""
        self._layout = layout
        self._memory = memory
        columns = _side_by_side(layout.projection.sizes)
        self._columns = [columns[module] for module in layout.modules]
        self._own_columns = _side_by_side(layout.sizes)
        self._takes_all = layout.sizes == layout.projection.sizes
        self._a_rows = _rows(memory, layout.a_start, layout.a_width)
        self._b_rows = _rows(memory, layout.b_start, layout.b_width)
        stride = memory.shape[1]
        self._shrink = every_row(layout.projection.in_features, stride // layout.a_width)
        self._expand, self._weights = _pieces(
            layout.rank, layout.sizes, layout.b_width, stride // layout.b_width
        )
        self._stacks: dict[int, Stack] = {}

    def write(self, entry: int, pairs: Sequence[LoRAPair | None]) -> None:
        """`pairs` are those of the projection's modules; what they leave of the entry's rank stays."""
        stack, parts, a_rank = self.stack(entry), self._layout.projection.parts, self._layout.a_rank
        for module, part in zip(self._layout.modules, stack.parts, strict=True):
            pair = pairs[module]
            assert pair is not None, "an adapter of another form"
            stack.a[:, part.ranks][:, : pair.rank] = pair.a.T
            b = part.b.view(parts, a_rank, -1)
            b[:, : pair.rank] = pair.b.T.reshape(parts, pair.rank, -1)

    def side_by_side(self, h: torch.Tensor) -> torch.Tensor:
        """What came of `shrink` in all parts, [parts, T, R / parts] -> [T, R], module by module."""
        modules = len(self._layout.modules)
        return h.reshape(*h.shape[:2], modules, -1).permute(1, 2, 0, 3).flatten(1)

    def stack(self, entry: int) -> Stack:
        """The entry as matrices; views."""
        stack = self._stacks.get(entry)
        if stack is None:
            stack = self._stacks[entry] = self._view(entry)
        return stack

    def add(self, x: torch.Tensor, y: torch.Tensor, entries: "TokenEntries") -> None:
        """Add to y in place what the tokens of `entries` are due."""
        self.expand(self.shrink(x, entries), y, entries)

    def shrink(self, x: torch.Tensor, entries: "TokenEntries") -> torch.Tensor:
        """What the tokens of `entries` make by A, [their number, R / parts]."""
        return weighted_sums(self._a_rows, entries.chosen(self._shrink), x[entries.tokens].reshape(-1))

    def expand(self, h: torch.Tensor, y: torch.Tensor, entries: "TokenEntries") -> None:
        """Add to y in place what B makes of h [tokens of `entries`, R]."""
        y = y[entries.tokens]
        weights = h if self._weights is None else h.index_select(1, self._weights)
        sums = weighted_sums(self._b_rows, entries.chosen(self._expand), weights.view(-1))
        delta = sums.view(len(y), -1)
        if self._takes_all:
            y.add_(delta)
        else:
            for columns, own in zip(self._columns, self._own_columns, strict=True):
                y[:, columns].add_(delta[:, own])

    def _view(self, entry: int) -> Stack:
        layout, memory, parts = self._layout, self._memory[entry], []
        for number, (columns, own) in enumerate(zip(self._columns, self._own_columns, strict=True)):
            start, stop = (layout.b_start + layout.rank * end for end in (own.start, own.stop))
            ranks = slice(number * layout.a_rank, (number + 1) * layout.a_rank)
            parts.append(Part(ranks, columns, memory[start:stop].view(layout.rank, -1)))
        a = memory[layout.a_start :][: layout.projection.in_features * layout.a_width]
        return Stack(a.view(-1, layout.a_width), tuple(parts))


class Pattern:
    """Which rows of an adapter the sums of one token read: [sums, rows of each], from 0."""

    def __init__(self, chosen: torch.Tensor, stride: int) -> None:
        """`stride` rows lie between an entry and the next."""
        self.chosen = chosen
        self.stride = stride


class TokenEntries:
    """Tokens that follow each other, with the entry of a table that each one's adapter has."""

    def __init__(self, runs: Sequence[Run]) -> None:
        """`runs` say entries instead of slots, and follow each other without a gap."""
        self.tokens = slice(runs[0][1], runs[-1][2])
        self._entries = torch.tensor([entry for entry, start, stop in runs for _ in range(start, stop)])
        self._chosen: dict[Pattern, Chosen] = {}

    def chosen(self, pattern: Pattern) -> Chosen:
        """Rows of the whole table, for each token's sums."""
        chosen = self._chosen.get(pattern)
        if chosen is None:
            first = (self._entries * pattern.stride)[:, None, None]
            chosen = self._chosen[pattern] = choose_rows((first + pattern.chosen).flatten(0, 1))
        return chosen


@cache
def every_row(rows: int, stride: int) -> Pattern:
    """One sum over all rows of a's transpose."""
    return Pattern(torch.arange(rows)[None], stride)


@cache
def _pieces(
    rank: int, sizes: tuple[int, ...], width: int, stride: int
) -> tuple[Pattern, torch.Tensor | None]:
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
    return Pattern(torch.tensor(chosen), stride), None if every else torch.tensor(weights)


def _rows(memory: torch.Tensor, start: int, width: int) -> torch.Tensor:
    """What lies in `memory` from `start` on, as rows: of any entry, as often as an entry has rows more."""
    rest = memory.view(-1)[start:]
    return rest[: len(rest) // width * width].view(-1, width)


def _side_by_side(sizes: Sequence[int]) -> list[slice]:
    return [slice(*ends) for ends in itertools.pairwise(itertools.accumulate(sizes, initial=0))]


def _up(number: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-number // step) * step
