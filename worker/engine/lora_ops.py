"""The arithmetic of LoRA on a batch whose tokens have different adapters. Pure functions of tensors.

Shapes: x is [T, in], y is [T, out], a of one adapter is [r, in], b is [out, r] with its scaling.
A run is `(slot, start, stop)`: consecutive tokens `start <= t < stop` that all use the adapter in `slot`.
"""

from collections.abc import Mapping, Sequence

import torch

from worker.engine.adapter import LoRAPair

Run = tuple[int, int, int]


def add_lora_reference(
    x: torch.Tensor, y: torch.Tensor, token_slots: Sequence[int | None], pairs: Mapping[int, LoRAPair]
) -> torch.Tensor:
    """What the others must equal: token by token, in float32. Returns a new [T, out] tensor."""
    result = y.float().clone()
    for token, slot in enumerate(token_slots):
        pair = None if slot is None else pairs.get(slot)
        if pair is not None:
            result[token] += pair.b.float() @ (pair.a.float() @ x[token].float())
    return result


def add_lora_segments(
    x: torch.Tensor, y: torch.Tensor, runs: Sequence[Run], pairs: Mapping[int, LoRAPair]
) -> None:
    """Add each run's adapter to y in place: two products a run. Best for few runs, or long ones."""
    for slot, start, stop in runs:
        pair = pairs.get(slot)
        if pair is not None:
            y[start:stop].addmm_(x[start:stop] @ pair.a.T, pair.b.T)


def pack_pairs(pairs: Sequence[LoRAPair]) -> LoRAPair:
    """Several adapters side by side as one of rank R, the sum of their ranks."""
    return LoRAPair(torch.cat([pair.a for pair in pairs]), torch.cat([pair.b for pair in pairs], dim=1))


def foreign_ranks(
    runs: Sequence[Run], layout: Sequence[tuple[int, int]], num_tokens: int, device: torch.device
) -> torch.Tensor:
    """[T, R] bool: where a column of a packed pair belongs to another slot than the token's.

    `layout` lists `(slot, rank)` in the order of packing.
    """
    columns = [slot for slot, rank in layout for _ in range(rank)]
    tokens = [-1] * num_tokens
    for slot, start, stop in runs:
        tokens[start:stop] = [slot] * (stop - start)
    return (torch.tensor(tokens).unsqueeze(1) != torch.tensor(columns).unsqueeze(0)).to(device)


def add_lora_packed(x: torch.Tensor, y: torch.Tensor, packed: LoRAPair, foreign: torch.Tensor) -> None:
    """Add all adapters to y in place: two dense products whatever their number.

    Every token goes through every adapter's `a`, then all columns but its own are zeroed; by filling, as
    an overflow in another's column times zero would be NaN. Best while tokens are few, as in decoding.
    """
    y.addmm_((x @ packed.a.T).masked_fill_(foreign, 0), packed.b.T)
