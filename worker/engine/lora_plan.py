"""Which way of LoRA a step takes: decided once a step from what the ways cost. No tensors here."""

import enum
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

Run = tuple[int, int, int]
"""`(slot, start, stop)`: consecutive tokens `start <= t < stop` that all use the adapter in `slot`."""


class Way(enum.Enum):
    """How the decoding tokens of a step get their adapters; chunks of prompts always go by segments."""

    SEGMENTS = "segments"
    PACKED = "packed"
    LANES = "lanes"


class Costs(NamedTuple):
    """What the device charges; `lora_layers.measure_costs` finds it out.

    `python -m tests.benchmarks.lora_ways` prints what each way took beside what these numbers predict.
    The defaults are of two cores with AVX2, float32.
    """

    call_seconds: float = 6e-6
    """An operator on next to nothing."""
    multiply_seconds: float = 2.5e-11
    """A multiplication and addition in a dense product of few rows."""
    read_seconds: float = 2.5e-10
    """A weight that is read to be used for hardly more than one token."""


_STEPS_BETWEEN_CHANGES = 5
"""Of the adapters in a batch, as it was with 16 rows of some 70 tokens each."""


class Demand(NamedTuple):
    """The decoding tokens of a step that have adapters."""

    counts: tuple[int, ...]
    """Tokens of each adapter."""
    ranks: tuple[int, ...]
    """Rank of each adapter."""
    lane_ranks: int
    """Ranks of all lanes that a pass over the banks would read, idle ones among them."""
    banks: int
    """Banks that hold lanes of these adapters; 0 if some adapter has a rank that no bank is made for."""


def seconds(way: Way, demand: Demand, features: int, costs: Costs) -> float:
    """Expected time of `way` on one module, `features` being its in and out together."""
    counts, ranks = demand.counts, demand.ranks
    calls: float
    multiplied: float
    read: float
    match way:
        case Way.SEGMENTS:
            calls, multiplied, read = 2 * len(counts), 0, sum(ranks)
        case Way.PACKED:
            # Adapters are laid side by side anew whenever a row with another adapter starts or the last ends.
            anew = 1 / _STEPS_BETWEEN_CHANGES
            calls = 3 + 2 * len(counts) * anew
            multiplied, read = sum(counts) * sum(ranks), 2 * sum(ranks) * anew
        case Way.LANES:
            # A lane has as many places as the adapter with most tokens needs.
            depth = max(1.0, max(counts) / 4)
            calls, multiplied, read = 5 * demand.banks, 0, demand.lane_ranks * depth
    return (
        calls * costs.call_seconds
        + multiplied * features * costs.multiply_seconds
        + read * features * costs.read_seconds
    )


def cheapest(demand: Demand, features: int, costs: Costs) -> Way:
    ways = [way for way in Way if demand.banks or way is not Way.LANES]
    return min(ways, key=lambda way: seconds(way, demand, features, costs))


MOST_LANES = 256
"""In one bank; a step with more adapters goes another way."""


class LaneBook:
    """Which adapter holds which lane of the banks for one rank: the active ones, close together."""

    def __init__(self) -> None:
        self.lanes: dict[int, int] = {}
        """By slot. A slot that is no longer active keeps its lane until another needs it."""

    def reach(self, active: Iterable[int]) -> int:
        """At most so many lanes are there from the first to the last that `active` slots will hold."""
        active = list(active)
        held = [self.lanes[slot] + 1 for slot in active if slot in self.lanes]
        return max([len(active), *held])

    def assign(self, active: Iterable[int]) -> list[int]:
        """See that every active slot has a lane; returns those whose lane must be filled first.

        One slot at a time moves down into a gap: what a step reads of the banks ends with the last lane.
        """
        active = list(active)
        held = {self.lanes[slot] for slot in active if slot in self.lanes}
        lowest = (lane for lane in itertools.count() if lane not in held)
        fresh = [slot for slot in active if slot not in self.lanes]
        if not fresh and len(held) <= max(held, default=0):
            fresh = [max(active, key=lambda slot: self.lanes[slot])]
        for slot in fresh:
            self._move(slot, next(lowest))
        return fresh

    def _move(self, slot: int, lane: int) -> None:
        owner = next((other for other, own in self.lanes.items() if own == lane), None)
        if owner is not None:
            del self.lanes[owner]
        self.lanes[slot] = lane

    def forget(self, slot: int) -> None:
        """`slot` has other weights now, or none."""
        self.lanes.pop(slot, None)


def merge_runs(spans: Iterable[tuple[int | None, int]], start: int = 0) -> list[Run]:
    """Runs of `(slot, tokens)` spans that follow each other from `start`; those without a slot have none."""
    runs: list[Run] = []
    for slot, tokens in spans:
        stop = start + tokens
        if slot is not None:
            if runs and runs[-1][0] == slot and runs[-1][2] == start:
                runs[-1] = (slot, runs[-1][1], stop)
            else:
                runs.append((slot, start, stop))
        start = stop
    return runs


def lane_places(runs: Sequence[Run], lanes: Mapping[int, int], depth: int) -> list[int]:
    """For each token of `runs`, in order, its place among the `depth` places of its adapter's lane."""
    return [lanes[slot] * depth + number for slot, start, stop in runs for number in range(stop - start)]
