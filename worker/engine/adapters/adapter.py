"""What a LoRA adapter is inside: checked weights on the host, by the modules of the base model."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

from worker.engine.tokenizer import Tokenizer
from worker.jobs import AdapterKey


class Target(NamedTuple):
    """A module of the base model, and what an adapter may do to it."""

    in_features: int
    out_features: int
    refused: str = ""
    """Why an adapter may not add LoRA to it after all."""
    is_head: bool = False
    is_embedding: bool = False
    """It is given ids: `in_features` are its rows."""
    is_input: bool = False
    """It is the embedding of the input's tokens."""
    is_tied: bool = False
    """Input and head, where they share their weights."""
    shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    """Its parameters as the model keeps them, by name."""
    fixed: str = ""
    """Why an adapter may not replace its parameters."""

    @property
    def has_tokens(self) -> bool:
        """Whether its weight has a row for each token."""
        return self.is_head or self.is_input

    @property
    def num_tokens(self) -> int:
        return self.out_features if self.is_head else self.in_features


class LoRAPair(NamedTuple):
    """One module's part of an adapter: `y += (x @ a.T) @ b.T`."""

    a: torch.Tensor
    """[r, in_features]"""
    b: torch.Tensor
    """[out_features, r], the scaling folded in."""

    @property
    def rank(self) -> int:
        return self.a.shape[0]


class Rows(NamedTuple):
    """Some rows of a weight, which stand for the module's own or come after them."""

    indices: torch.Tensor
    """int64 [n], ascending."""
    values: torch.Tensor
    """[n, features]"""


class Change(NamedTuple):
    """What an adapter does to a module beside the pair it adds, or with a pair that is not the usual kind."""

    parameters: Mapping[str, torch.Tensor] = MappingProxyType({})
    """What stands for the module's own parameters, by name and in the module's own layout."""
    rows: Rows | None = None
    """What stands for rows of an embedding's or the head's weight."""
    magnitude: torch.Tensor | None = None
    """DoRA's: what the rows of the weight with the pair added are scaled to. [out_features] float32"""
    bias: torch.Tensor | None = None
    """What is added to the output with the pair, the scaling folded in. [out_features]"""
    pair: LoRAPair | None = None
    """That of an embedding or the head. An embedding's a is [r, rows]: its columns go by id."""

    @property
    def tensors(self) -> Iterator[torch.Tensor]:
        yield from self.parameters.values()
        yield from self.rows or ()
        yield from (own for own in (self.magnitude, self.bias) if own is not None)
        yield from self.pair or ()


class Vocabulary(NamedTuple):
    """Ids from these on an adapter does not know."""

    reads: int
    writes: int


class LoRAWeights(NamedTuple):
    """A whole adapter on the host, checked against the base model."""

    key: AdapterKey
    pairs: dict[str, LoRAPair]
    """By the module's name in the base model: linear ones that see all tokens of a batch."""
    changes: Mapping[str, Change] = MappingProxyType({})
    """Likewise, of modules of any kind."""
    vocabulary: Vocabulary | None = None
    """None where it is the base model's."""
    tokenizer: Tokenizer | None = None
    """Its own; None where it is the base model's."""
    rope_factor: float = 1.0
    """Its tokens' positions are divided by this."""

    @property
    def rank(self) -> int:
        others = [change.pair for change in self.changes.values() if change.pair is not None]
        return max((pair.rank for pair in (*self.pairs.values(), *others)), default=0)

    @property
    def num_bytes(self) -> int:
        pairs = sum(tensor.nbytes for pair in self.pairs.values() for tensor in pair)
        return pairs + sum(one.nbytes for change in self.changes.values() for one in change.tensors)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """What ends its rows beside the base model's own."""
        own = None if self.tokenizer is None else self.tokenizer.eos_token_id
        return frozenset() if own is None else frozenset([own])
