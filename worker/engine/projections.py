"""The linear modules of a base model, grouped where they share an input, with LoRA added to each.

The model keeps its modules and their names: only their `forward` is replaced. The first of a group that
is called computes all of it, as one product, and the others hand out their part.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from worker.engine.adapters.adapter import LoRAPair
from worker.engine.products import Product, make_product


class Addition(Protocol):
    """What is added to a projection's output."""

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Read x [T, in], change y [T, out] in place."""


class Widening(Protocol):
    """What makes a projection's output wider, and changes it."""

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Read x [T, in] and return y [T, out] changed, perhaps with more columns."""


class LoRAShare(NamedTuple):
    """How the ranks that share a projection divide LoRA on it, where none does it as if it were alone."""

    parts: int
    """Ranks among which the rank of A is divided: each has so much less of it than of B's."""
    columns: slice | None
    """Of y that this rank's B is for; None for all."""
    collect: Callable[[torch.Tensor], torch.Tensor]
    """What this rank made by its A's, [n] -> what all of them made, [parts, n]: one part after the other, or
    the sum."""


class Exchange(Protocol):
    """What the ranks that share a projection tell each other; see `parallel.share`."""

    lora: LoRAShare | None

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in], as the model gives it -> what this rank has weights for."""

    def leave(self, y: torch.Tensor) -> torch.Tensor:
        """[..., out], made by this rank's weights, and perhaps changed in place -> what the model gets."""


def is_linear(module: nn.Module) -> bool:
    return type(module) in {nn.Linear, Conv1D}


def features(module: nn.Module) -> tuple[int, int]:
    """The in and out of a linear module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    assert isinstance(module, Conv1D)
    return module.nx, module.nf


class Projection:
    """One or more linear modules that are given the same tensor, as one product.

    Their outputs lie side by side in `[T, sum of out]`; each module returns its columns as a view.
    """

    def __init__(
        self, modules: Sequence[nn.Module], keep: frozenset[int], exchange: Exchange | None = None
    ) -> None:
        """Take over the weights of `modules`, but those whose data pointer is in `keep`."""
        self.in_features = features(modules[0])[0]
        self.sizes = [features(module)[1] for module in modules]
        self.device = _weight(modules[0]).device
        self.addition: Addition | None = None
        self.change: Addition | None = None
        """As `addition`, before it; None unless an adapter does more than add."""
        self.widening: Widening | None = None
        """After both; None unless an adapter changes the head."""
        self._exchange = exchange
        weight, self.bias = _fused(modules)
        """[sum of out]; None where no module has one."""
        self.dtype = weight.dtype
        """Of what it is given."""
        self._product, needed = make_product(weight, self.bias)
        self._merged: Product | None = None
        self.uses_merged = False
        """Whether the product is the one that `merge` made, and nothing is added to it."""
        if not needed or len(modules) > 1:  # the product has a copy of its own
            for tensor in _weights(modules):
                if tensor.data_ptr() not in keep:
                    tensor.data = tensor.new_empty(0)
        self._x: torch.Tensor | None = None
        self._parts: list[torch.Tensor | None] = []
        for index, module in enumerate(modules):
            module.forward = partial(self._forward, index)

    def merge(self, pairs: Sequence[LoRAPair | None]) -> None:
        """Make the product that has an adapter in it, `pairs` for each module, beside the base's own.

        It takes the place of an earlier one, which is lost even if this raises.
        """
        spare, self._merged = self._merged, None
        if not any(pairs):
            return
        delta = torch.zeros(sum(self.sizes), self.in_features, device=self.device)
        for part, pair in zip(torch.split(delta, self.sizes), pairs, strict=True):
            if pair is not None:
                torch.mm(pair.b.to(part), pair.a.to(part), out=part)
        self._merged = self._product.plus(delta, spare)

    @property
    def columns(self) -> list[slice]:
        """Where in the output each module's part is."""
        return [slice(*ends) for ends in itertools.pairwise(itertools.accumulate(self.sizes, initial=0))]

    @cached_property
    def row_norms(self) -> torch.Tensor:
        """Of the rows of the weights: float32 [sum of out]."""
        norms: torch.Tensor = torch.linalg.vector_norm(self._product.weight, dim=1, dtype=torch.float32)
        return norms

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x [n, in] by the weights alone: [n, sum of out]."""
        y = self._product(x)
        return y if self.bias is None else y - self.bias

    @property
    def lora(self) -> LoRAShare | None:
        """How LoRA on it is divided among ranks; None if it is done as if there were one."""
        return None if self._exchange is None else self._exchange.lora

    @property
    def lora_sizes(self) -> tuple[int, ...]:
        """The outs that this rank's LoRA adds to, for each module."""
        columns = None if self.lora is None else self.lora.columns
        return tuple(self.sizes) if columns is None else (columns.stop - columns.start,)

    def forget(self) -> None:
        """Drop what a pass that was broken off has left."""
        self._x, self._parts = None, []

    def _forward(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if x is not self._x or self._parts[index] is None:
            self._x, self._parts = x, [*self._compute(x)]
        part = self._parts[index]
        self._parts[index] = None
        if not any(other is not None for other in self._parts):
            self.forget()
        assert part is not None
        return part

    def _compute(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.uses_merged:
            product = self._product if self._merged is None else self._merged
            return torch.split(product(x), self.sizes, dim=-1)
        exchange = self._exchange
        if exchange is not None:
            x = exchange.enter(x)
        y = self._product(x)
        if self.change is not None:
            self.change(x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]))
        if self.addition is not None:
            self.addition(x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]))
        if exchange is not None:
            y = exchange.leave(y)
        if self.widening is not None:
            y = self.widening(x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])).view(*y.shape[:-1], -1)
            return (y,)
        return torch.split(y, self.sizes, dim=-1) if len(self.sizes) > 1 else (y,)


def tied_weights(model: nn.Module) -> frozenset[int]:
    """Data pointers of the parameters that more than one module holds."""
    seen: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        seen[parameter.data_ptr()] = seen.get(parameter.data_ptr(), 0) + 1
    return frozenset(pointer for pointer, count in seen.items() if count > 1)


def _fused(modules: Sequence[nn.Module]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weights below each other, [sum of out, in], and the biases; zeros where one has none."""
    weights = [_weight(module) for module in modules]
    biases: list[Any] = [module.bias for module in modules]
    bias = None
    if any(own is not None for own in biases):
        pairs = zip(biases, weights, strict=True)
        bias = torch.cat([weight.new_zeros(len(weight)) if own is None else own for own, weight in pairs])
    return weights[0] if len(weights) == 1 else torch.cat(weights), bias


def _weight(module: nn.Module) -> torch.Tensor:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.data.T if isinstance(module, Conv1D) else weight.data


def _weights(modules: Sequence[nn.Module]) -> list[torch.Tensor]:
    return [module.weight for module in modules if isinstance(module.weight, torch.Tensor)]
