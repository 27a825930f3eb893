"""Attention over a packed batch and a block-wise cache, plugged in by transformers' attention interface.

The batch is one row `[1, T]` of tokens: first the prefill rows, each a run of several tokens, then one
token for each decoding row. Every layer writes its new keys and values to the cache, then attends as the
step's plan says.
"""

import abc
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface

from worker.engine.pages import zero_pages
from worker.errors import ModelError

Held = tuple[list[int], int, int]
"""A row of a step: its blocks, the tokens of it that are in the cache, the tokens that go through now."""

_HARMLESS = frozenset(
    {
        "position_ids",
        "use_cache",
        "output_attentions",
        "output_router_logits",
        "cache_position",
        "position_embeddings",
    }
)
"""Keyword arguments of an attention function that say nothing about its result here."""


def places(blocks: Sequence[int], start: int, stop: int, block_size: int) -> list[int]:
    """Where the cache holds tokens `start` to `stop` of a row with these blocks."""
    return [
        blocks[number] * block_size + place - number * block_size
        for number in range(start // block_size, -(-stop // block_size))
        for place in range(max(start, number * block_size), min(stop, (number + 1) * block_size))
    ]


class Form(NamedTuple):
    """What a model's attention is like, apart from softmax(q k scale) v."""

    scale: float
    softcap: float | None
    window: int | None
    """How many of the latest tokens a token looks at, itself included; None for all."""


Cache = tuple[torch.Tensor, torch.Tensor]
"""A layer's keys and values, `[blocks * block_size, heads, dim]`."""


class AttentionPlan(abc.ABC):
    """Where a step's tokens are written, and what each may look at; the same for every layer."""

    write: torch.Tensor | None = None
    """[T], the places of the step's tokens; None if the step neither reads nor writes the cache."""

    @abc.abstractmethod
    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: Cache | None, form: Form
    ) -> torch.Tensor:
        """Query `[T, H, D]`, key and value of the same tokens, and a cache that has them -> `[T, H, Dv]`.

        The cache is None if `write` is.
        """


class LayerShape(NamedTuple):
    num_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    dtype: torch.dtype


class PackedAttention:
    """The attention function of one engine's model, and the cache it works on.

    Registered under a name of its own, so that several engines can live in one process. Before
    `allocate` it attends without a cache and notes each layer's shape: that is how shapes are found.
    """

    _numbers = itertools.count()

    def __init__(self) -> None:
        self.name = f"loramill_{next(self._numbers)}"
        self.plan: AttentionPlan | None = None
        self.shapes: dict[int, LayerShape] = {}
        self._cache: dict[int, Cache] = {}
        self._block_size = 0
        AttentionInterface.register(self.name, self)

    @property
    def bytes_per_token(self) -> int:
        return sum(
            shape.num_heads * (shape.key_dim + shape.value_dim) * shape.dtype.itemsize
            for shape in self.shapes.values()
        )

    def allocate(self, num_blocks: int, block_size: int, device: torch.device) -> None:
        """Make the cache, `[num_blocks * block_size, heads, dim]` for keys and values of each layer.

        It starts as zeros: masked places get weight zero, and zero times whatever an allocator leaves
        behind may be NaN. On the CPU the pages are the kernel's zero pages until they are written.
        """
        self._block_size = block_size
        for layer, shape in self.shapes.items():
            self._cache[layer] = tuple(  # type: ignore[assignment]
                zero_pages((num_blocks * block_size, shape.num_heads, dim), shape.dtype, device)
                for dim in (shape.key_dim, shape.value_dim)
            )

    def scrub(self, block: int, start: int, stop: int) -> None:
        """Zero the places `start <= place < stop` of a block: the next row reads them, though masked."""
        first = block * self._block_size
        for tensors in self._cache.values():
            for tensor in tensors:
                tensor[first + start : first + stop] = 0

    def copy(self, source_block: int, target_block: int, num_tokens: int) -> None:
        """Copy the first `num_tokens` places of one block to another, in all layers."""
        source, target = source_block * self._block_size, target_block * self._block_size
        for tensor in itertools.chain.from_iterable(self._cache.values()):
            tensor[target : target + num_tokens] = tensor[source : source + num_tokens]

    def __call__(  # noqa: PLR0917 (transformers passes them by position)
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        """Transformers' attention signature: query `[1, H, T, D]`, key and value `[1, Hkv, T, D]`.

        Returns `[1, T, H, D]`. Raises ModelError, on the first pass, for attention of another kind.
        """
        plan = self.plan
        assert plan is not None, "the model was called outside of a step"
        layer: int = module.layer_idx  # type: ignore[assignment]
        if layer not in self.shapes:
            self._note(layer, key, value, sliding_window, others)
        queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        cache = None
        if plan.write is not None:
            cache = self._cache[layer]
            for store, new in zip(cache, (keys, values), strict=True):
                store.index_copy_(0, plan.write, new)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = plan.attend(queries, keys, values, cache, Form(scale, softcap, sliding_window))
        return output.unsqueeze(0), None

    def _note(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, window: int | None, others: dict[str, Any]
    ) -> None:
        strange = sorted(
            name
            for name, given in others.items()
            if given is not None
            and name not in _HARMLESS
            and not (name == "is_causal" and given is True)
            and not (name == "dropout" and given == 0.0)
        )
        if strange:
            raise ModelError(f"the model's attention needs {', '.join(strange)}, which is not supported")
        self.shapes[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3], window, key.dtype)
