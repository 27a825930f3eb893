"""LoRA on the projections of a base model: adapters by slot, and the way of each step."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from worker.engine.adapter import LoRAWeights
from worker.engine.lora_bank import LoRABank
from worker.engine.lora_ops import Lanes
from worker.engine.lora_plan import MOST_LANES, Costs, Demand, LaneBook, Run, Way, cheapest, merge_runs
from worker.engine.lora_step import LoRAStep, PackedTokens, stand_in_lanes
from worker.engine.projections import Projection

_LANE_RANKS = (8, 16, 32, 64, 128, 256)
"""Ranks for which there are banks of lanes; an adapter goes to the first that holds it."""


class LoRALayers:
    """The adapters in the slots of one engine, used from its thread only.

    While `step` is None every projection computes what it computes without LoRA.
    """

    def __init__(
        self,
        projections: Mapping[tuple[str, ...], Projection],
        costs: Costs = Costs(),  # noqa: B008 (it never changes)
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> None:
        """`projections` by the names of their modules."""
        self.step: LoRAStep | None = None
        self.costs = costs
        self._device = device
        self._banks = {
            names: LoRABank(projection.in_features, projection.sizes)
            for names, projection in projections.items()
        }
        for names, projection in projections.items():
            projection.addition = partial(self._add, self._banks[names])
        modules = sum(len(projection.sizes) for projection in projections.values())
        features = sum(p.in_features * len(p.sizes) + sum(p.sizes) for p in projections.values())
        self._features = features // max(1, modules)
        self._ranks: dict[int, int] = {}
        self._books = {rank: LaneBook() for rank in _LANE_RANKS}

    def put(self, slot: int, weights: LoRAWeights) -> None:
        """Replace whatever `slot` holds by `weights`."""
        self.clear(slot)
        self._ranks[slot] = weights.rank
        for names, bank in self._banks.items():
            bank.put(slot, [weights.pairs.get(name) for name in names])

    def clear(self, slot: int) -> None:
        self._ranks.pop(slot, None)
        for book in self._books.values():
            book.forget(slot)
        for bank in self._banks.values():
            bank.clear(slot)

    def place(self, slot: int | None) -> tuple[int, int]:
        """A key to sort decoding rows by: `plan` wants rows that are served together side by side."""
        return (-1, -1) if slot is None else (self._lane_rank(slot), slot)

    def plan(self, spans: Sequence[tuple[int | None, int]]) -> LoRAStep | None:
        """The step for rows of `(slot, tokens)`; None when none has an adapter.

        Rows of one token, which decode, come last, in the order of `place`. Fills the lanes that the step
        needs.
        """
        num_chunks = next((index for index, (_, tokens) in enumerate(spans) if tokens == 1), len(spans))
        chunks = merge_runs(spans[:num_chunks])
        decode = merge_runs(spans[num_chunks:], sum(tokens for _, tokens in spans[:num_chunks]))
        if not chunks and not decode:
            return None
        match self._choose(decode):
            case Way.SEGMENTS:
                return LoRAStep(chunks + decode)
            case Way.PACKED:
                return LoRAStep(chunks, PackedTokens(decode, self._device))
            case Way.LANES:
                return LoRAStep(chunks, lanes=dict(self._stand_in_lanes(decode)))

    def _lane_rank(self, slot: int) -> int:
        """The rank of the bank whose lanes hold the adapter in `slot`; 0 if there is none so large."""
        return next((rank for rank in _LANE_RANKS if rank >= self._ranks[slot]), 0)

    def _choose(self, decode: Sequence[Run]) -> Way:
        if len(decode) < 2:
            return Way.SEGMENTS
        banks = self._by_bank(decode)
        reach = {
            rank: self._books[rank].reach(slot for slot, _, _ in runs) for rank, runs in banks.items() if rank
        }
        demand = Demand(
            counts=tuple(stop - start for _, start, stop in decode),
            ranks=tuple(self._ranks[slot] for slot, _, _ in decode),
            lane_ranks=sum(rank * lanes for rank, lanes in reach.items()),
            banks=0 if 0 in banks or max(reach.values()) > MOST_LANES else len(banks),
        )
        return cheapest(demand, self._features, self.costs)

    def _by_bank(self, decode: Sequence[Run]) -> dict[int, list[Run]]:
        return {
            rank: list(runs) for rank, runs in itertools.groupby(decode, lambda run: self._lane_rank(run[0]))
        }

    def _stand_in_lanes(self, decode: Sequence[Run]) -> Iterator[tuple[int, Lanes]]:
        for rank, runs in self._by_bank(decode).items():
            book = self._books[rank]
            fresh = book.assign(slot for slot, _, _ in runs)
            try:
                for slot, bank in itertools.product(fresh, self._banks.values()):
                    bank.fill_lane(rank, book.lanes[slot], slot)
            except BaseException:
                for slot in fresh:  # what is in their lanes is not theirs, or half of it
                    book.forget(slot)
                raise
            yield rank, stand_in_lanes(runs, book.lanes, self._device)

    def _add(self, bank: LoRABank, x: torch.Tensor, y: torch.Tensor) -> None:
        if self.step is not None:
            bank.add(x, y, self.step)


def measure_costs(device: torch.device, dtype: torch.dtype) -> Costs:
    """What `device` charges for the operators that LoRA is made of. Takes some hundred milliseconds."""
    rows, features, rank, count = 16, 1024, 8, 16
    x = torch.randn(rows, features, device=device).to(dtype)
    few = torch.randn(1, 1, device=device).to(dtype)
    many = torch.randn(16, count * rank, features, device=device).to(dtype)  # more than a cache holds
    lanes = many.view(16, count, rank, features)
    standing = x.view(count, 1, features)
    call = _seconds(device, lambda: few @ few)
    dense = _seconds(device, lambda: [x @ a.T for a in many]) / len(many) - call
    thin = _seconds(device, lambda: [torch.bmm(standing, a.mT) for a in lanes]) / len(lanes) - call
    return Costs(
        call_seconds=call,
        multiply_seconds=max(0.0, dense) / (rows * count * rank * features),
        read_seconds=max(0.0, thin) / (count * rank * features),
    )


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """The best of several tries: whatever else the machine does only adds."""
    best = math.inf
    for _ in range(8):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best
