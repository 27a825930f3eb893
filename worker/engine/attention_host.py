"""Attention by torch's own operators: chunks one by one, all decoding rows at once."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from worker.engine.attention import AttentionPlan, Cache, Form, Held, places

_ROUND_LENGTH = 16
"""Decode lengths are rounded up to a multiple of this, so that a row's sums are blocked alike
whatever the longest row beside it: bf16 output then depends less on the neighbours."""


class Chunk(NamedTuple):
    """A prefill row of the packed batch: tokens `start <= t < stop`, `offset` tokens of it cached before."""

    start: int
    stop: int
    offset: int
    places: torch.Tensor | None
    """[offset + stop - start], where the cache holds its tokens; None when offset is 0."""


class HostAttentionPlan(AttentionPlan):
    """Attention by torch's own operators; meant for CPUs, right on any device.

    Built once a step from its rows, prefill rows first. Masks are made when the first layer asks for them.
    """

    def __init__(
        self,
        rows: Sequence[Held],
        *,
        block_size: int,
        device: torch.device,
        cached: bool = True,
    ) -> None:
        """Without `cached` the cache is left alone: whole prompts of two tokens or more only."""
        self._device = device
        self._block_size = block_size
        self._masks: dict[tuple[int, int | None], torch.Tensor | None] = {}
        self.chunks: list[Chunk] = []
        decode: list[tuple[list[int], int]] = []
        write: list[int] = []
        start = 0
        for blocks, offset, num_tokens in rows:
            end = offset + num_tokens
            write += places(blocks, offset, end, block_size)
            if num_tokens == 1:
                decode.append((blocks, end))
            else:
                assert not decode, "prefill rows come first"
                known = torch.tensor(places(blocks, 0, end, block_size), device=device) if offset else None
                self.chunks.append(Chunk(start, start + num_tokens, offset, known))
            start += num_tokens
        self.num_tokens = start
        self.decode_start = start - len(decode)
        self.write = torch.tensor(write, dtype=torch.long, device=device) if cached else None
        self.decode = self._plan_decode(decode) if decode else None

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: Cache | None, form: Form
    ) -> torch.Tensor:
        """See AttentionPlan."""
        attend = _Attend(form.scale, form.softcap, query.shape[1] // key.shape[1])
        output = query.new_empty(len(query), query.shape[1], value.shape[2])
        for index, chunk in enumerate(self.chunks):
            own = slice(chunk.start, chunk.stop)
            keys, values = key[own], value[own]
            if chunk.places is not None:
                assert cache is not None
                keys, values = (store[chunk.places] for store in cache)
            mask = self.chunk_mask(index, form.window)
            output[own] = attend.prefill(query[own], keys, values, mask)
        if self.decode is not None:
            assert cache is not None
            output[self.decode_start :] = self._decode(query[self.decode_start :], cache, form.window, attend)
        return output

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
            padded = [places(held, 0, length, self._block_size) for held, length in rows]
            padded = [own + own[-1:] * (longest - len(own)) for own in padded]
            gathered = torch.tensor(padded, device=self._device)
            return DecodePlan(
                torch.tensor(lengths, device=self._device), longest, gathered, 0, len(rows), None
            )
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

    def _decode(
        self,
        query: torch.Tensor,
        cache: Cache,
        window: int | None,
        attend: "_Attend",
    ) -> torch.Tensor:
        decode = self.decode
        assert decode is not None
        query = query.contiguous()
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
            return attend.decode(query, keys, values, self.decode_mask(window))
        spread = query.new_zeros(decode.rows, *query.shape[1:])
        spread[decode.order] = query
        return attend.decode(spread, keys, values, self.decode_mask(window))[decode.order]


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


class _Attend(NamedTuple):
    """softmax(q k / scale) v, with the model's own scale, soft cap and head grouping."""

    scale: float
    softcap: float | None
    group: int
    """Query heads for each key head."""

    def prefill(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Query [Tq, H, D], key [Tk, Hkv, D], mask [Tq, Tk] or None for causal -> [Tq, H, Dv]."""
        query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
        if self.group > 1:
            key, value = (tensor.repeat_interleave(self.group, dim=1) for tensor in (key, value))
        if self.softcap is None:
            result = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.scale
            )
        else:
            if mask is None:
                mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
            result = self._soft_capped(query, key, value, mask)
        return result[0].transpose(0, 1)

    def decode(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Query [n, H, D], key [n, Hkv, L, D], mask [n, 1, 1, L] -> [n, H, D].

        The query heads of a group stand where query tokens would: nothing is repeated.
        """
        grouped = query.view(len(query), -1, self.group, query.shape[-1])
        if self.softcap is None:
            result = functional.scaled_dot_product_attention(
                grouped, key, value, attn_mask=mask, scale=self.scale
            )
        else:
            result = self._soft_capped(grouped, key, value, mask)
        return result.flatten(1, 2)

    def _soft_capped(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        assert self.softcap is not None
        scores = torch.tanh(query @ key.transpose(-1, -2) * self.scale / self.softcap) * self.softcap
        # The lowest number rather than -inf: a row that may look at nothing stays finite.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value
