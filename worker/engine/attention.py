"""Attention over a packed batch and a block-wise cache, plugged in by transformers' attention interface.

The batch is one row `[1, T]` of tokens: first the prefill rows, each a run of several tokens, then one
token for each decoding row. Every layer writes its new keys and values to the cache, then attends.
"""

import itertools
import math
import mmap
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface

from worker.errors import ModelError

_ROUND_LENGTH = 16
"""Decode lengths are rounded up to a multiple of this, so that a row's sums are blocked alike
whatever the longest row beside it: bf16 output then depends less on the neighbours."""

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


class Chunk(NamedTuple):
    """A prefill row of the packed batch: tokens `start <= t < stop`, `offset` tokens of it cached before."""

    start: int
    stop: int
    offset: int
    places: torch.Tensor | None
    """[offset + stop - start], where the cache holds its tokens; None when offset is 0."""


class AttentionPlan:
    """Where one step's tokens are written, and what each may look at. The same for every layer.

    Built once a step from `rows`, each `(blocks, offset, num_tokens)`, prefill rows first. Masks are
    made when the first layer asks for them.
    """

    def __init__(
        self,
        rows: Sequence[tuple[list[int], int, int]],
        *,
        block_size: int,
        device: torch.device,
        cached: bool = True,
    ) -> None:
        self.cached = cached
        """False neither reads nor writes the cache: whole prompts of two tokens or more only."""
        self._device = device
        self._block_size = block_size
        self._masks: dict[tuple[int, int | None], torch.Tensor | None] = {}
        self.chunks: list[Chunk] = []
        decode: list[tuple[list[int], int]] = []
        places: list[int] = []
        start = 0
        for blocks, offset, num_tokens in rows:
            own = self._places(blocks, offset + num_tokens)
            places += own[offset:]
            if num_tokens == 1:
                decode.append((blocks, offset + 1))
            else:
                assert not decode, "prefill rows come first"
                known = torch.tensor(own, device=device) if offset else None
                self.chunks.append(Chunk(start, start + num_tokens, offset, known))
            start += num_tokens
        self.num_tokens = start
        self.decode_start = start - len(decode)
        self.write = torch.tensor(places, dtype=torch.long, device=device)
        self.decode = self._plan_decode(decode) if decode else None

    def chunk_mask(self, index: int, window: int | None) -> torch.Tensor | None:
        """[tokens, offset + tokens] bool for chunk `index`; None where plain causality says it all."""
        key = (index, window)
        if key not in self._masks:
            self._masks[key] = self._make_chunk_mask(self.chunks[index], window)
        return self._masks[key]

    def decode_mask(self, window: int | None) -> torch.Tensor:
        """[rows, 1, 1, length] bool, rows in the order of the decode plan's cache rows."""
        key = (-1, window)
        mask = self._masks.get(key)
        if mask is None:
            assert self.decode is not None
            lengths = self.decode.lengths.unsqueeze(1)
            position = torch.arange(self.decode.length, device=self._device)
            mask = position < lengths
            if window is not None:
                mask &= position >= lengths - window
            mask = self._masks[key] = mask[:, None, None, :]
        return mask

    def _places(self, blocks: list[int], num_tokens: int) -> list[int]:
        size = self._block_size
        ranges = (range(block * size, block * size + size) for block in blocks)
        return list(itertools.islice(itertools.chain.from_iterable(ranges), num_tokens))

    def _make_chunk_mask(self, chunk: Chunk, window: int | None) -> torch.Tensor | None:
        end = chunk.offset + chunk.stop - chunk.start
        if not chunk.offset and (window is None or end <= window):
            return None
        query = torch.arange(chunk.offset, end, device=self._device).unsqueeze(1)
        key = torch.arange(end, device=self._device)
        mask = key <= query
        if window is not None:
            mask &= key > query - window
        return mask

    def _plan_decode(self, rows: list[tuple[list[int], int]]) -> "DecodePlan":
        lengths = [length for _, length in rows]
        longest = -(-max(lengths) // _ROUND_LENGTH) * _ROUND_LENGTH
        blocks = [held[0] for held, _ in rows]
        low, span = min(blocks), max(blocks) - min(blocks) + 1
        one_block_each = all(len(held) == 1 for held, _ in rows) and max(lengths) <= self._block_size
        if not one_block_each or span > 2 * len(rows):
            padded = [self._places(held, length) for held, length in rows]
            padded = [own + own[-1:] * (longest - len(own)) for own in padded]
            places = torch.tensor(padded, device=self._device)
            return DecodePlan(torch.tensor(lengths, device=self._device), longest, places, 0, len(rows), None)
        # Rows with one block each, close together: the cache is read in place, holes and all.
        order = [block - low for block in blocks]
        by_block = [0] * span
        for position, length in zip(order, lengths, strict=True):
            by_block[position] = length
        return DecodePlan(
            torch.tensor(by_block, device=self._device),
            min(longest, self._block_size),
            None,
            low,
            span,
            None if order == list(range(span)) else torch.tensor(order, device=self._device),
        )


class DecodePlan(NamedTuple):
    """How the decoding rows, one token each, find their keys: by `places`, or in place by block."""

    lengths: torch.Tensor
    """[rows], the tokens each cache row may look at; 0 for a block that no decoding row holds."""
    length: int
    """The longest of them, rounded up."""
    places: torch.Tensor | None
    """[rows, length], or None: then cache row i is block `low + i`."""
    low: int
    rows: int
    order: torch.Tensor | None
    """[decoding rows], the cache row of each; None when they are the same, in the same order."""


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
        self._cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
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
                _zeros((num_blocks * block_size, shape.num_heads, dim), shape.dtype, device)
                for dim in (shape.key_dim, shape.value_dim)
            )

    def scrub(self, blocks: Sequence[int], num_tokens: int) -> None:
        """Zero the first `num_tokens` places of `blocks`, before somebody else gets them.

        For a sequence whose keys and values may not be finite.
        """
        size = self._block_size
        for tensors in self._cache.values():
            for tensor, (number, block) in itertools.product(tensors, enumerate(blocks)):
                used = max(0, min(size, num_tokens - number * size))
                tensor[block * size : block * size + used] = 0

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
        output = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
        cache = self._cache.get(layer) if plan.cached else None
        if cache is not None:
            for store, new in zip(cache, (key, value), strict=True):
                store.index_copy_(0, plan.write, new[0].transpose(0, 1))
        attend = _Attend(scaling, softcap, query.shape[1] // key.shape[1])
        for index, chunk in enumerate(plan.chunks):
            keys, values = key[:, :, chunk.start : chunk.stop], value[:, :, chunk.start : chunk.stop]
            if chunk.places is not None:
                assert cache is not None
                keys, values = (store[chunk.places].transpose(0, 1).unsqueeze(0) for store in cache)
            mask = plan.chunk_mask(index, sliding_window)
            result = attend.prefill(query[:, :, chunk.start : chunk.stop], keys, values, mask)
            output[chunk.start : chunk.stop] = result[0].transpose(0, 1)
        if plan.decode is not None:
            assert cache is not None
            queries = query[0, :, plan.decode_start :].transpose(0, 1).contiguous()
            output[plan.decode_start :] = self._decode(queries, cache, plan, sliding_window, attend)
        return output.unsqueeze(0), None

    def _decode(
        self,
        query: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        plan: AttentionPlan,
        window: int | None,
        attend: "_Attend",
    ) -> torch.Tensor:
        decode = plan.decode
        assert decode is not None
        if decode.places is not None:
            keys, values = (store[decode.places].transpose(1, 2) for store in cache)
        else:
            keys, values = (
                store.view(-1, self._block_size, *store.shape[1:])[
                    decode.low : decode.low + decode.rows, : decode.length
                ].transpose(1, 2)
                for store in cache
            )
        if decode.order is None:
            return attend.decode(query, keys, values, plan.decode_mask(window))
        spread = query.new_zeros(decode.rows, *query.shape[1:])
        spread[decode.order] = query
        return attend.decode(spread, keys, values, plan.decode_mask(window))[decode.order]

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


class _Attend(NamedTuple):
    """softmax(q k / scale) v, with the model's own scale, soft cap and head grouping."""

    scaling: float | None
    softcap: float | None
    group: int
    """Query heads for each key head."""

    def prefill(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Query [1, H, Tq, D], key [1, Hkv, Tk, D], mask [Tq, Tk] or None for causal -> [1, H, Tq, D]."""
        if self.group > 1:
            key, value = (tensor.repeat_interleave(self.group, dim=1) for tensor in (key, value))
        if self.softcap is None:
            return functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.scaling
            )
        if mask is None:
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        return self._soft_capped(query, key, value, mask)

    def decode(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Query [n, H, D], key [n, Hkv, L, D], mask [n, 1, 1, L] -> [n, H, D].

        The query heads of a group stand where query tokens would: nothing is repeated.
        """
        grouped = query.view(len(query), -1, self.group, query.shape[-1])
        if self.softcap is None:
            result = functional.scaled_dot_product_attention(
                grouped, key, value, attn_mask=mask, scale=self.scaling
            )
        else:
            result = self._soft_capped(grouped, key, value, mask)
        return result.flatten(1, 2)

    def _soft_capped(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        assert self.softcap is not None
        scale = query.shape[-1] ** -0.5 if self.scaling is None else self.scaling
        scores = torch.tanh(query @ key.transpose(-1, -2) * scale / self.softcap) * self.softcap
        # The lowest number rather than -inf: a row that may look at nothing stays finite.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    # With huge pages the first token of a row would make 2 MiB of it resident, in every layer.
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # Linux
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
