"""What a LoRA adapter is inside: checked weights on the host, by the modules of the base model."""

from typing import NamedTuple

import torch

from worker.jobs import AdapterKey


class Target(NamedTuple):
    """A module of the base model that LoRA can be applied to."""

    in_features: int
    out_features: int
    refused: str = ""
    """Why an adapter may not use it after all."""
    is_head: bool = False


class LoRAPair(NamedTuple):
    """One module's part of an adapter: `y += (x @ a.T) @ b.T`."""

    a: torch.Tensor
    """[r, in_features]"""
    b: torch.Tensor
    """[out_features, r], the scaling folded in."""

    @property
    def rank(self) -> int:
        return self.a.shape[0]


class LoRAWeights(NamedTuple):
    """A whole adapter on the host, checked against the base model."""

    key: AdapterKey
    pairs: dict[str, LoRAPair]
    """By the module's name in the base model."""
    rope_factor: float = 1.0
    """Its tokens' positions are divided by this."""

    @property
    def rank(self) -> int:
        return max(pair.rank for pair in self.pairs.values())

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for pair in self.pairs.values() for tensor in pair)
