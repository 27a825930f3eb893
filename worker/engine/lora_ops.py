"""The arithmetic of LoRA on a batch whose tokens have different adapters. Pure functions of tensors.

Shapes: x is [T, in], y is [T, out]. Several modules that share x are served at once: their a's stand side
by side, R is the sum of their ranks, and their y's lie side by side too.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import embedding_bag

from worker.engine.adapter import LoRAPair
from worker.engine.lora_plan import Run


class Part(NamedTuple):
    """One module's b among those of a stack: it takes columns of h, and adds to columns of y."""

    ranks: slice
    columns: slice
    b: torch.Tensor
    """[r, out], the scaling folded in."""


class Stack(NamedTuple):
    """An adapter on all the modules that share an input."""

    a: torch.Tensor
    """[in, R]"""
    parts: tuple[Part, ...]


def add_lora_reference(
    x: torch.Tensor, y: torch.Tensor, token_slots: Sequence[int | None], pairs: Mapping[int, LoRAPair]
) -> torch.Tensor:
    """What the others must equal, for one module: token by token, in float32. Returns a new [T, out]."""
    result = y.float().clone()
    for token, slot in enumerate(token_slots):
        pair = None if slot is None else pairs.get(slot)
        if pair is not None:
            result[token] += pair.b.float() @ (pair.a.float() @ x[token].float())
    return result


def add_lora_segments(
    x: torch.Tensor, y: torch.Tensor, runs: Sequence[Run], stacks: Mapping[int, Stack]
) -> None:
    """Add each run's adapter to y in place: one product a run, and one for each module."""
    for slot, start, stop in runs:
        stack = stacks.get(slot)
        if stack is not None:
            h = x[start:stop] @ stack.a
            for part in stack.parts:
                y[start:stop, part.columns].addmm_(h[:, part.ranks], part.b)


def weighted_sums(rows: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`sum over i of weights[s, i] * rows[chosen[s, i]]` for each s: [S, width].

    `rows` is [N, width], `chosen` int32 and `weights` are [S, I]. With an adapter's matrix in `rows` this is
    a product of a vector by it, and every s may have a matrix of its own: all of them in one call, each
    weight read where it lies. A sum depends on nothing but its own rows.
    """
    return embedding_bag(chosen, rows, mode="sum", per_sample_weights=weights)
