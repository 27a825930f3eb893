"""The arithmetic of LoRA on a batch whose tokens have different adapters. Pure functions of tensors.

Shapes: x is [T, in], y is [T, out]. Several modules that share x are served at once: their a's stand side
by side, R is the sum of their ranks, and their y's lie side by side too.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from worker.engine.adapters.adapter import LoRAPair


class Part(NamedTuple):
    """One module's b among those of a stack: it takes columns of h, and adds to columns of y."""

    ranks: slice
    """Of those that a has: others may have the rest of them."""
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


def add_stack(x: torch.Tensor, y: torch.Tensor, stack: Stack) -> None:
    """Add one adapter to y in place: one product, and one for each module."""
    h = x @ stack.a
    for part in stack.parts:
        y[:, part.columns].addmm_(h[:, part.ranks], part.b)


def expand_stack(h: torch.Tensor, y: torch.Tensor, stack: Stack) -> None:
    """Add to y in place what the b's make of h [parts, T, R / parts]: x @ a, by whoever has a part of a."""
    for part in stack.parts:
        own = h[..., part.ranks].movedim(0, 1).flatten(1)
        y[:, part.columns].addmm_(own, part.b)


def collected(
    hs: Sequence[torch.Tensor], collect: Callable[[torch.Tensor], torch.Tensor]
) -> list[torch.Tensor]:
    """Put each of `hs` through `collect`, [n] -> [parts, n], all of them at once: [parts, *shape] each."""
    whole = collect(torch.cat([h.flatten() for h in hs]))
    parts = torch.split(whole, [h.numel() for h in hs], dim=1)
    return [part.reshape(len(whole), *h.shape) for part, h in zip(parts, hs, strict=True)]


class Chosen(NamedTuple):
    """Rows of a tensor for sums that take equally many: `I` for each of `S`."""

    rows: torch.Tensor
    """[S * I] int32, or int64 where that is needed"""
    starts: torch.Tensor
    """[S] of the same, where each sum's rows begin: multiples of I."""


def choose_rows(rows: torch.Tensor) -> Chosen:
    """`rows` is [S, I] int64."""
    dtype = torch.int32 if int(rows.max()) < 2**31 else torch.int64
    return Chosen(rows.flatten().to(dtype), torch.arange(0, rows.numel(), rows.shape[1], dtype=dtype))


def weighted_sums(table: torch.Tensor, chosen: Chosen, weights: torch.Tensor) -> torch.Tensor:
    """`sum over i of weights[s * I + i] * table[rows[s * I + i]]` for each s: [S, width].

    `table` is [N, width], `weights` [S * I] of its type. With an adapter's matrix in `table` this is a
    product of a vector by it, and every s may have a matrix of its own: all of them in one call, each weight
    read where it lies. A sum depends on nothing but its own rows.
    """
    # What torch.nn.functional.embedding_bag calls, without what that looks at anew every time.
    sums: torch.Tensor = torch.embedding_bag(
        table, chosen.rows, chosen.starts, False, _SUM, False, weights, False
    )[0]
    return sums


_SUM = 0
"""The mode of an embedding bag."""
