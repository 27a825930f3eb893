"""Which way of LoRA a step takes: decided once a step from what the ways cost. No tensors here."""

import enum
from collections.abc import Iterable
from typing import NamedTuple

Run = tuple[int, int, int]
"""`(slot, start, stop)`: consecutive tokens `start <= t < stop` that all use the adapter in `slot`."""


class Way(enum.Enum):
    """How the decoding tokens of a step get their adapters; chunks of prompts always go by segments."""

    SEGMENTS = "segments"
    """Dense products of each adapter's tokens: calls for every adapter, few for many tokens of one."""
    ROWS = "rows"
    """Every token by itself through its adapter, all tokens and modules in two calls."""


class Costs(NamedTuple):
    """What the processor charges; `lora_layers.measure_costs` finds it out.

    `python -m tests.benchmarks.lora_ways` prints what each way took beside what these numbers choose.
    The defaults are of two cores with AVX2, float32.
    """

    call_seconds: float = 6e-6
    """A product of next to nothing, added to a part of a larger tensor."""
    read_seconds: float = 2e-10
    """A weight that comes from memory for a dense product."""
    multiply_seconds: float = 5e-11
    """A multiplication and addition in it for one token."""
    sum_seconds: float = 3e-10
    """The same in a weighted sum of rows, whose weights come from memory too."""


class Demand(NamedTuple):
    """The decoding tokens of a step that have adapters."""

    counts: tuple[int, ...]
    """Tokens of each adapter."""
    ranks: tuple[int, ...]
    """Rank of each adapter, as padded in its table."""
    tables: int
    """Tables that hold these adapters: one for each rank among them."""


class Shape(NamedTuple):
    """What LoRA is applied to, on the average over the base model's projections."""

    modules: float
    """Modules that share an input."""
    features: float
    """Features in, for each of them, and out."""


def seconds(way: Way, demand: Demand, shape: Shape, costs: Costs) -> float:
    """Expected time of `way` on one projection."""
    multiplied = sum(count * rank for count, rank in zip(demand.counts, demand.ranks, strict=True))
    match way:
        case Way.SEGMENTS:
            calls = len(demand.counts) * (1 + shape.modules)
            each = sum(demand.ranks) * costs.read_seconds + multiplied * costs.multiply_seconds
        case Way.ROWS:
            calls = 4 * demand.tables
            each = multiplied * costs.sum_seconds
    return calls * costs.call_seconds + shape.features * each


def cheapest(demand: Demand, shape: Shape, costs: Costs) -> Way:
    return min(Way, key=lambda way: seconds(way, demand, shape, costs))


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
