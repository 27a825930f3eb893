"""How the LoRA kernels cut their work: the sizes they take by default, and others worth a try.

Any tiling gives the same result but for rounding; how fast one is depends on the device.
"""

from collections.abc import Sequence
from typing import Annotated, NamedTuple, Protocol

import torch
from msgspec import Meta

from worker.engine.kernels.tiles import power_of_two

_FEW_TOKENS = 256
"""Up to this capacity a step is taken for decoding: small tiles, and the shrink's sum is split."""
_MAX_SPLITS = 8


RANK_ALIGNMENT = 8
"""Ranks are rounded up to this with zeros: each row of B then starts at a multiple of 16 bytes."""
_Count = Annotated[int, Meta(ge=1, le=1024)]


class Tiling(NamedTuple):
    """One launch of shrink and one of expand."""

    splits: _Count
    """Parts that shrink's sum over features is cut into."""
    ranks: _Count
    """Numbers of h that a program of shrink makes for each token."""
    features: _Count
    """Features that it reads at a time."""
    shrink_warps: _Count
    shrink_stages: _Count
    columns: _Count
    """Columns of y that a program of expand adds to."""
    expand_warps: _Count
    expand_stages: _Count


class Work(NamedTuple):
    """What a tiling is for."""

    in_features: int
    out_features: tuple[int, ...]
    """Of each module of the projection."""
    max_rank: int
    """Of a module's pair, rounded up as in the table."""
    max_tokens: int
    """The step's capacity."""
    itemsize: int
    """Bytes of a factor of the products."""


Dimensions = tuple[int, tuple[int, ...]]
"""Features in, and out of each module, of a projection."""


class Situation(NamedTuple):
    """What an engine does LoRA for."""

    projections: Sequence[Dimensions]
    decode_tokens: int
    """Capacity of a step in which every row decodes."""
    chunk_tokens: int
    """Capacity of any other."""
    max_loras: int
    max_rank: int
    lora_dtype: torch.dtype
    dtype: torch.dtype
    """Of the base model."""
    device: torch.device


def work_of(dimensions: Dimensions, capacity: int, situation: Situation) -> Work:
    """What a step of `capacity` is to the kernels on a projection."""
    in_features, sizes = dimensions
    rank = -(-situation.max_rank // RANK_ALIGNMENT) * RANK_ALIGNMENT
    itemsize = torch.promote_types(situation.dtype, situation.lora_dtype).itemsize
    return Work(in_features, sizes, rank, capacity, itemsize)


def is_sound(tiling: Tiling) -> bool:
    """Whether the kernels can be cut so: all but stages are powers of two, and products have sides of 16."""
    powers = tiling._replace(shrink_stages=1, expand_stages=1)
    sides = tiling.ranks, tiling.features, tiling.columns
    return all(number & (number - 1) == 0 for number in powers) and min(sides) >= 16


class Fit(NamedTuple):
    """What suits a device."""

    tilings: dict[Work, Tiling]
    """By work; what is not in it takes the default."""
    dense_from: int | None
    """Tokens of one adapter in a row from which dense products are cheaper; None for never."""


class Tuner(Protocol):
    """Finds a fit."""

    def tune(self, situation: Situation) -> Fit:
        """What suits the device of `situation`; may take a minute."""


def tile_size(max_tokens: int) -> int:
    """Tokens that a tile has at most, in a step of that capacity."""
    return 16 if _are_few(max_tokens) else 64


def default_tiling(work: Work) -> Tiling:
    few, wide = _are_few(work.max_tokens), work.itemsize > 2
    stacked = work.max_rank * len(work.out_features)
    return Tiling(
        # Few tokens alone would not fill a GPU.
        splits=min(_MAX_SPLITS, power_of_two(work.in_features // 512 or 1, smallest=1)) if few else 1,
        ranks=min(power_of_two(stacked), 32 if few or wide else 64),
        features=(512 if few else 256) // work.itemsize,
        shrink_warps=4,
        shrink_stages=3,
        columns=64 if wide else 128,
        expand_warps=4,
        expand_stages=2,
    )


def shrinks_to_try(work: Work) -> list[Tiling]:
    """The default, then others that differ from it in shrink."""
    tiling = default_tiling(work)
    others = [
        tiling._replace(features=tiling.features * 2),
        tiling._replace(features=max(16, tiling.features // 2)),
        tiling._replace(shrink_warps=8),
        tiling._replace(shrink_warps=2),
        tiling._replace(shrink_stages=4),
    ]
    if _are_few(work.max_tokens):
        others.append(tiling._replace(splits=min(_MAX_SPLITS, tiling.splits * 2)))
        others.append(tiling._replace(splits=max(1, tiling.splits // 2)))
    return _different(tiling, others)


def expands_to_try(tiling: Tiling) -> list[Tiling]:
    """`tiling`, then others that differ from it in expand."""
    return _different(
        tiling,
        [
            tiling._replace(columns=tiling.columns // 2),
            tiling._replace(columns=tiling.columns * 2),
            tiling._replace(expand_warps=8),
            tiling._replace(expand_warps=2),
            tiling._replace(expand_stages=3),
        ],
    )


def _different(tiling: Tiling, others: list[Tiling]) -> list[Tiling]:
    return [tiling, *(other for other in others if other != tiling)]


def _are_few(max_tokens: int) -> bool:
    return max_tokens <= _FEW_TOKENS
