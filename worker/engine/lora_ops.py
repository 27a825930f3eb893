"""The arithmetic of LoRA on a batch whose tokens have different adapters. Pure functions of tensors.

Shapes: x is [T, in], y is [T, out], a of one adapter is [r, in], b is [out, r] with its scaling.
Several modules that share x are served at once: their a's are stacked, their y's lie side by side.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from worker.engine.adapter import LoRAPair
from worker.engine.lora_plan import Run


class Part(NamedTuple):
    """One module's b among those of a stack: it takes columns of h, and adds to columns of y."""

    ranks: slice
    columns: slice
    b: torch.Tensor
    """[out, r]"""


class Stack(NamedTuple):
    """An adapter on all the modules that share an input."""

    a: torch.Tensor
    """[R, in], R the sum of the modules' ranks."""
    parts: tuple[Part, ...]


def stack_pairs(pairs: Sequence[LoRAPair | None], sizes: Sequence[int]) -> Stack:
    """`pairs` in the order of the modules, None where the adapter has nothing; `sizes` their outs."""
    parts = []
    rank = column = 0
    for pair, size in zip(pairs, sizes, strict=True):
        if pair is not None:
            parts.append(Part(slice(rank, rank + pair.rank), slice(column, column + size), pair.b))
            rank += pair.rank
        column += size
    own = [pair.a for pair in pairs if pair is not None]
    return Stack(own[0] if len(own) == 1 else torch.cat(own), tuple(parts))


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
    """Add each run's adapter to y in place: two products a run. Best for few runs, or long ones."""
    for slot, start, stop in runs:
        stack = stacks.get(slot)
        if stack is not None:
            h = x[start:stop] @ stack.a.T
            for part in stack.parts:
                y[start:stop, part.columns].addmm_(h[:, part.ranks], part.b.T)


class Packed(NamedTuple):
    """Several adapters side by side as one of rank R, the sum of their ranks."""

    stack: Stack
    slots: tuple[int, ...]
    """[R], whose column is whose."""


def pack_stacks(stacks: Mapping[int, Stack]) -> Packed:
    """Columns are grouped by module, and within it by slot."""
    by_module: dict[tuple[int, int], list[tuple[int, torch.Tensor, torch.Tensor]]] = {}
    for slot, stack in stacks.items():
        for part in stack.parts:
            key = (part.columns.start, part.columns.stop)
            by_module.setdefault(key, []).append((slot, stack.a[part.ranks], part.b))
    parts: list[Part] = []
    every_a: list[torch.Tensor] = []
    slots: list[int] = []
    for columns, own in sorted(by_module.items(), key=lambda item: item[0]):
        start = len(slots)
        slots += [slot for slot, a, _ in own for _ in range(len(a))]
        every_a += [a for _, a, _ in own]
        b = torch.cat([b for _, _, b in own], dim=1)
        parts.append(Part(slice(start, len(slots)), slice(*columns), b))
    return Packed(Stack(torch.cat(every_a), tuple(parts)), tuple(slots))


def foreign_ranks(token_slots: torch.Tensor, slots: tuple[int, ...]) -> torch.Tensor:
    """[T, R] bool: where a column of a packed pair belongs to another slot than the token's, [T] int64."""
    return token_slots.unsqueeze(1) != torch.tensor(slots, device=token_slots.device)


def add_lora_packed(x: torch.Tensor, y: torch.Tensor, stack: Stack, foreign: torch.Tensor) -> None:
    """Add all adapters to y in place: two dense products a module whatever their number.

    Every token goes through every adapter's `a`, then all columns but its own are zeroed; by filling, as
    an overflow in another's column times zero would be NaN. Best while tokens and ranks are few.
    """
    h = (x @ stack.a.T).masked_fill_(foreign, 0)
    for part in stack.parts:
        y[:, part.columns].addmm_(h[:, part.ranks], part.b.T)


class Lanes(NamedTuple):
    """Where tokens stand in batched products over the lanes of a bank, each `depth` places deep.

    A lane holds one adapter; its tokens stand in it. Places that no token holds are computed from some
    token's x and thrown away.
    """

    lanes: int
    depth: int
    tokens: slice
    """Those of the batch that stand here, side by side."""
    source: torch.Tensor
    """[lanes * depth], the token that each place reads."""
    place: torch.Tensor
    """[tokens], the place where each token finds its result."""


def add_lora_lanes(x: torch.Tensor, y: torch.Tensor, stack: Stack, lanes: Lanes) -> None:
    """Add to y in place: batched products over the adapters, each times its own tokens only.

    The stack has a lane's adapter at each index of its first dimension: a [lanes, in, R], a part's b
    [lanes, r, out]. Best for many adapters with few tokens each: every weight is read once.
    """
    standing = x.index_select(0, lanes.source).view(lanes.lanes, lanes.depth, -1)
    h = torch.bmm(standing, stack.a)
    own = y[lanes.tokens]
    for part in stack.parts:
        delta = torch.bmm(h[:, :, part.ranks], part.b).flatten(0, 1)
        own[:, part.columns].add_(delta.index_select(0, lanes.place))
