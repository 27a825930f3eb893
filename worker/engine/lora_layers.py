"""LoRA on the projections of a base model: adapters by slot, and the way of each step. For CPUs."""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from worker.engine.adapter import LoRAWeights
from worker.engine.lora_bank import LoRABank, every_row
from worker.engine.lora_ops import weighted_sums
from worker.engine.lora_plan import Costs, Demand, Run, Shape, Way, cheapest, merge_runs
from worker.engine.lora_step import LoRAStep, TokenEntries
from worker.engine.projections import Projection

_LEAST_RANK = 8
"""Ranks are padded to a power of two from here on: few tables, at most half of each padding."""


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
        self._banks = {
            names: LoRABank(projection.in_features, projection.sizes, max_loras)
            for names, projection in projections.items()
        }
        for names, projection in projections.items():
            projection.addition = partial(self._add, self._banks[names])
        self._shape = _shape([*projections.values()])
        self._entries: dict[int, tuple[int, int]] = {}
        """By slot, the padded rank of its adapter and its entry in the tables for that rank."""

    def put(self, slot: int, weights: LoRAWeights) -> None:
        """Replace whatever `slot` holds by `weights`."""
        self.clear(slot)
        rank = max(_LEAST_RANK, 1 << (weights.rank - 1).bit_length())
        entry = next(entry for entry in itertools.count() if (rank, entry) not in self._entries.values())
        self._entries[slot] = rank, entry
        for names, bank in self._banks.items():
            bank.put(slot, rank, entry, [weights.pairs.get(name) for name in names])

    def clear(self, slot: int) -> None:
        self._entries.pop(slot, None)
        for bank in self._banks.values():
            bank.clear(slot)

    def place(self, slot: int | None) -> tuple[int, int]:
        """A key to sort decoding rows by: `plan` wants rows that are served together side by side."""
        return (-1, -1) if slot is None else self._entries[slot]

    def plan(self, spans: Sequence[tuple[int | None, int]]) -> LoRAStep | None:
        """The step for rows of `(slot, tokens)`; None when none has an adapter.

        Rows of one token, which decode, come last, in the order of `place`.
        """
        num_chunks = next((index for index, (_, tokens) in enumerate(spans) if tokens == 1), len(spans))
        chunks = merge_runs(spans[:num_chunks])
        decode = merge_runs(spans[num_chunks:], sum(tokens for _, tokens in spans[:num_chunks]))
        if not chunks and not decode:
            return None
        if not decode or self._choose(decode) is Way.SEGMENTS:
            return LoRAStep(chunks + decode)
        entries = {slot: entry for slot, (_, entry) in self._entries.items()}
        return LoRAStep(
            chunks, {rank: TokenEntries(runs, entries) for rank, runs in self._by_rank(decode).items()}
        )

    def _choose(self, decode: Sequence[Run]) -> Way:
        demand = Demand(
            counts=tuple(stop - start for _, start, stop in decode),
            ranks=tuple(self._entries[slot][0] for slot, _, _ in decode),
            tables=len(self._by_rank(decode)),
        )
        return cheapest(demand, self._shape, self._costs)

    def _by_rank(self, decode: Sequence[Run]) -> dict[int, list[Run]]:
        return {
            rank: list(runs) for rank, runs in itertools.groupby(decode, lambda run: self._entries[run[0]][0])
        }

    def _add(self, bank: LoRABank, x: torch.Tensor, y: torch.Tensor) -> None:
        if self.step is not None:
            bank.add(x, y, self.step)


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
    each = TokenEntries([(n, n, n + 1) for n in range(tokens)], {n: n for n in range(tokens)})
    weights = len(adapters) * features * rank
    call = _seconds(lambda: y[:1, :1].addmm_(x[:1, :1], x[1:2, 1:2]))
    read = _seconds(lambda: [x[:1] @ a for a in adapters]) - len(adapters) * call
    dense = _seconds(lambda: x @ adapters[0]) - call
    chosen = each.chosen(every_row(features))
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
