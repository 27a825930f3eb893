"""LoRA on the projections of a base model: adapters by slot, and the way of each step. For CPUs."""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from worker.engine.adapters.adapter import LoRAWeights
from worker.engine.lora_ops import add_stack, collected, expand_stack, weighted_sums
from worker.engine.lora_plan import Costs, Demand, Run, Shape, Way, cheapest, merge_runs
from worker.engine.lora_table import Dimensions, Form, LoRATable, TokenEntries, every_row
from worker.engine.projections import LoRAShare, Projection

_LEAST_RANK = 8
"""Ranks are padded to a power of two from here on: few tables, at most half of each padding."""


class _Entry(NamedTuple):
    """Where the adapter of a slot lies."""

    order: int
    """Of its table, by age."""
    number: int
    """Among the entries of the table."""
    table: LoRATable


class LoRAStep(NamedTuple):
    """How one step applies LoRA: the same for every projection, built once, dropped after it."""

    segments: Sequence[tuple[LoRATable, Run]]
    """Tokens that go by segments; the runs say entries of the table instead of slots."""
    rows: Sequence[tuple[LoRATable, TokenEntries]]
    dtype: torch.dtype
    """That of all tables of an engine."""


class LoRALayers:
    """The adapters in the slots of one engine, used from its thread only.

    While `step` is None every projection computes what it computes without LoRA.
    """

    def __init__(
        self,
        projections: Mapping[tuple[str, ...], Projection],
        max_loras: int,
        costs: Costs = Costs(),  # noqa: B008 (it never changes)
    ) -> None:
        """`projections` by the names of their modules."""
        self.step: LoRAStep | None = None
        self._costs = costs
        self._max_loras = max_loras
        self._names = [*projections]
        self._shares = [projection.lora for projection in projections.values()]
        self._parts = max((share.parts for share in self._shares if share is not None), default=1)
        self._dimensions = [
            Dimensions(own.in_features, own.lora_sizes, 1 if share is None else share.parts)
            for own, share in zip(projections.values(), self._shares, strict=True)
        ]
        for number, projection in enumerate(projections.values()):
            projection.addition = partial(self._add, number)
        self._shape = _shape([*projections.values()])
        self._tables: dict[Form, tuple[int, LoRATable]] = {}
        """Those that hold an adapter, with their order."""
        self._num_tables = itertools.count()
        self._entries: dict[int, _Entry] = {}
        """By slot."""
        self._empty: set[int] = set()
        """Slots of adapters that have no pairs."""

    def put(self, slot: int, weights: LoRAWeights) -> None:
        """Replace whatever `slot` holds by `weights`."""
        self._entries.pop(slot, None)
        self._empty.discard(slot)
        try:
            if not weights.pairs:
                self._empty.add(slot)
                return
            order, table = self._table(self._form(weights), next(iter(weights.pairs.values())).a.dtype)
            taken = {entry.number for entry in self._entries.values() if entry.table is table}
            number = next(number for number in itertools.count() if number not in taken)
            table.write(number, [[weights.pairs.get(name) for name in names] for names in self._names])
            self._entries[slot] = _Entry(order, number, table)
        finally:
            self._drop_unused()

    def clear(self, slot: int) -> None:
        self._empty.discard(slot)
        self._entries.pop(slot, None)
        self._drop_unused()

    def place(self, slot: int | None) -> tuple[int, int]:
        """A key to sort decoding rows by: `plan` wants rows that are served together side by side."""
        return (-1, -1) if slot is None or slot in self._empty else self._entries[slot][:2]

    def plan(self, spans: Sequence[tuple[int | None, int]]) -> LoRAStep | None:
        """The step for rows of `(slot, tokens)`; None when none has an adapter.

        Rows of one token, which decode, come last, in the order of `place`.
        """
        spans = [(None if slot in self._empty else slot, tokens) for slot, tokens in spans]
        num_chunks = next((index for index, (_, tokens) in enumerate(spans) if tokens == 1), len(spans))
        chunks = merge_runs(spans[:num_chunks])
        decode = merge_runs(spans[num_chunks:], sum(tokens for _, tokens in spans[:num_chunks]))
        if not chunks and not decode:
            return None
        tables = [
            (table, list(runs))
            for table, runs in itertools.groupby(decode, lambda run: self._entries[run[0]].table)
        ]
        if not decode or self._choose(decode, len(tables)) is Way.SEGMENTS:
            chunks, tables = chunks + decode, []
        rows = [(table, TokenEntries([self._segment(run)[1] for run in runs])) for table, runs in tables]
        dtype = next(iter(self._entries.values())).table.dtype
        return LoRAStep([*map(self._segment, chunks)], rows, dtype)

    def _form(self, weights: LoRAWeights) -> Form:
        # Of B: a process may have a part of A's alone.
        rank = max(_LEAST_RANK, *(pair.b.shape[1] for pair in weights.pairs.values()))
        own = -(-rank // self._parts)
        return Form(
            self._parts * (1 << (own - 1).bit_length()),
            tuple(
                tuple(number for number, name in enumerate(names) if name in weights.pairs)
                for names in self._names
            ),
        )

    def _table(self, form: Form, dtype: torch.dtype) -> tuple[int, LoRATable]:
        if form not in self._tables:
            table = LoRATable(form, self._dimensions, self._max_loras, dtype)
            self._tables[form] = next(self._num_tables), table
        return self._tables[form]

    def _drop_unused(self) -> None:
        used = {entry.order for entry in self._entries.values()}
        self._tables = {form: own for form, own in self._tables.items() if own[0] in used}

    def _choose(self, decode: Sequence[Run], num_tables: int) -> Way:
        demand = Demand(
            counts=tuple(stop - start for _, start, stop in decode),
            ranks=tuple(self._entries[slot].table.form.rank for slot, _, _ in decode),
            tables=num_tables,
        )
        return cheapest(demand, self._shape, self._costs)

    def _segment(self, run: Run) -> tuple[LoRATable, Run]:
        entry = self._entries[run[0]]
        return entry.table, (entry.number, *run[1:])

    def _add(self, number: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add to y [T, out] of a projection what the step's tokens are due for x [T, in], in place."""
        step, share = self.step, self._shares[number]
        if step is None:
            return
        if share is not None and share.columns is not None:
            y = y[:, share.columns]
        if step.dtype == y.dtype:
            _apply(step, number, x, y, share)
        elif any(table.fields[number] for table, _ in (*step.segments, *step.rows)):
            # `lora_dtype` differs from the base model's: the sum alone is in ours.
            delta = torch.zeros_like(y, dtype=step.dtype)
            _apply(step, number, x.to(step.dtype), delta, share)
            y.add_(delta)


def _apply(step: LoRAStep, number: int, x: torch.Tensor, y: torch.Tensor, share: LoRAShare | None) -> None:
    if share is not None:
        _apply_shared(step, number, x, y, share)
        return
    for table, (entry, start, stop) in step.segments:
        field = table.fields[number]
        if field is not None:
            add_stack(x[start:stop], y[start:stop], field.stack(entry))
    for table, tokens in step.rows:
        field = table.fields[number]
        if field is not None:
            field.add(x, y, tokens)


def _apply_shared(step: LoRAStep, number: int, x: torch.Tensor, y: torch.Tensor, share: LoRAShare) -> None:
    """As `_apply`, with one exchange for all that a projection has to do."""
    segments = [(field, run) for table, run in step.segments if (field := table.fields[number]) is not None]
    rows = [(field, tokens) for table, tokens in step.rows if (field := table.fields[number]) is not None]
    hs = [x[start:stop] @ field.stack(entry).a for field, (entry, start, stop) in segments]
    hs += [field.shrink(x, tokens) for field, tokens in rows]
    if not hs:
        return
    whole = iter(collected(hs, share.collect))
    for field, (entry, start, stop) in segments:
        expand_stack(next(whole), y[start:stop], field.stack(entry))
    for field, tokens in rows:
        field.expand(field.side_by_side(next(whole)), y, tokens)


def _shape(projections: Sequence[Projection]) -> Shape:
    count = max(1, len(projections))
    modules = sum(len(projection.sizes) for projection in projections)
    features = sum(p.in_features * len(p.sizes) + sum(p.sizes) for p in projections)
    return Shape(modules / count, features / count)


def measure_costs(dtype: torch.dtype) -> Costs:
    """What the processor charges for the operators that LoRA is made of. Takes some hundred milliseconds."""
    tokens, features, rank, layers = 16, 1024, 16, 16
    x, y = torch.randn(tokens, features).to(dtype), torch.zeros(tokens, features, dtype=dtype)
    # One adapter for each token, in each of so many layers that no cache holds them.
    tables = torch.randn(layers, tokens * features, rank).to(dtype)
    adapters = tables.view(-1, features, rank)
    each = TokenEntries([(n, n, n + 1) for n in range(tokens)])
    weights = len(adapters) * features * rank
    call = _seconds(lambda: y[:1, :1].addmm_(x[:1, :1], x[1:2, 1:2]))
    read = _seconds(lambda: [x[:1] @ a for a in adapters]) - len(adapters) * call
    dense = _seconds(lambda: x @ adapters[0]) - call
    chosen = each.chosen(every_row(features, features))
    sums = _seconds(lambda: [weighted_sums(table, chosen, x.view(-1)) for table in tables])
    return Costs(
        call_seconds=call,
        read_seconds=max(0.0, read) / weights,
        multiply_seconds=max(0.0, dense) / (tokens * features * rank),
        sum_seconds=max(0.0, sums - layers * call) / weights,
    )


def _seconds(work: Callable[[], object]) -> float:
    """The best of several tries: whatever else the machine does only adds."""
    best = math.inf
    for _ in range(8):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best
