"""Attention over a paged cache by Triton kernels: one token of each of many rows, or chunks of tokens.

Everything that is looked at, the newest tokens included, is in the cache. The query heads that share a key
head are rows of one matrix product. Softmax is computed in base 2, while the keys stream by: Milakov and
Gimelshein, "Online normalizer calculation for softmax" (2018); Dao et al., "FlashAttention" (2022).

What a token gets does not depend on the rows beside it: its keys are summed in tiles and splits that start
at fixed positions, however many rows and programs there are.
"""
# ruff: noqa: ANN001, ANN202, N803, PLR0917 (kernels are written in Triton's dialect)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from worker.engine.kernels.tiles import power_of_two

_SPLIT = 512
"""Keys in one split of a decoding row's sum, at least."""
_MAX_SPLITS = 32
_ENOUGH_PROGRAMS = 2048
"""The splits of a decoding row get programs of their own until there are this many programs."""


def paged_decode(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    out: torch.Tensor,
) -> None:
    """Attend with one token a row, the last of its `lengths[row]` tokens. Overwrites `out`.

    query [n, H, D] and out [n, H, Dv]; key_cache [blocks, block_size, Hkv, D] and value_cache
    [blocks, block_size, Hkv, Dv]; all of one dtype, float16, bfloat16 or float32, and contiguous in the last
    dimension at least. H is a multiple of Hkv. block_table int32 [n, max_blocks]: where a row's blocks are;
    lengths int32 [n]; n is at least 1. A token looks at the last `window` tokens, itself included.

    A row of length 0 is padding: it gets zeros, and nothing is read for it. What lies outside a row's length
    or window, in the block table or in the cache, is never read.

    `max_blocks` decides how a row's sum is split: keep the table as wide as the longest possible row needs,
    rather than trimming it to the longest row of the step. Fit for CUDA graphs; never waits for the device.
    """
    heads = _Heads.of(query, key_cache, value_cache, block_table, out)
    num_rows, num_heads, _ = query.shape
    capacity = block_table.shape[1] * heads.page
    split = max(_SPLIT, triton.next_power_of_2(triton.cdiv(capacity, _MAX_SPLITS)))
    max_splits = triton.cdiv(capacity, split)
    if window is not None:
        max_splits = min(max_splits, triton.cdiv(window, split) + 1)
    programs = min(max_splits, max(4, triton.cdiv(_ENOUGH_PROGRAMS, num_rows * heads.num_kv_heads)))
    parts = out.new_empty((num_rows, num_heads, max_splits, heads.value_dim), dtype=torch.float32)
    logs = out.new_empty((num_rows, num_heads, max_splits), dtype=torch.float32)
    splits = {"HAS_WINDOW": window is not None, "SPLIT": split, "MAX_SPLITS": max_splits}

    _decode[num_rows, heads.num_kv_heads, programs](
        query, key_cache, value_cache, block_table, lengths, parts, logs,
        scale, softcap or 1.0, window or 0,
        *query.stride()[:2], *key_cache.stride()[:3], *value_cache.stride()[:3], block_table.stride(0),
        HAS_SOFTCAP=softcap is not None, **splits,
        GROUP=heads.group, PAGE=heads.page, D=heads.key_dim, DV=heads.value_dim,
        BLOCK_G=power_of_two(heads.group), BLOCK_T=_decode_tile(heads.vector_bytes),
        BLOCK_D=power_of_two(heads.key_dim), BLOCK_DV=power_of_two(heads.value_dim),
        num_warps=4, num_stages=3,
    )  # fmt: skip
    _merge[num_rows, num_heads](
        parts, logs, lengths, out,
        window or 0,
        *out.stride()[:2],
        **splits, BLOCK_S=triton.next_power_of_2(max_splits),
        HEADS=num_heads, DV=heads.value_dim, BLOCK_DV=power_of_two(heads.value_dim), num_warps=4,
    )  # fmt: skip


def paged_prefill(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_query: torch.Tensor,
    offsets: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    out: torch.Tensor,
) -> None:
    """Attend with a chunk of tokens a row, each to the tokens before it and to itself. Overwrites `out`.

    query [T, H, D] and out [T, H, Dv]: the tokens of row i are `cu_query[i]` to `cu_query[i + 1]`, and
    `offsets[i]` tokens of the row came before them. cu_query int32 [n + 1] and offsets int32 [n]; a row may
    be empty. The rest is as in `paged_decode`. Tokens from `cu_query[n]` on are left as they are.
    A token's result may be NaN where keys or values later in its own chunk are not finite.
    """
    heads = _Heads.of(query, key_cache, value_cache, block_table, out)
    num_rows = len(offsets)
    lines, block_t = _prefill_tile(heads.vector_bytes, query.dtype)
    block_m = max(lines, triton.next_power_of_2(heads.group))
    block_q = block_m // heads.group
    _prefill[len(query) // block_q + num_rows, heads.num_kv_heads](
        query, key_cache, value_cache, block_table, cu_query, offsets, out,
        scale, softcap or 1.0, window or 0, num_rows,
        *query.stride()[:2], *key_cache.stride()[:3], *value_cache.stride()[:3], block_table.stride(0),
        *out.stride()[:2],
        HAS_SOFTCAP=softcap is not None, HAS_WINDOW=window is not None,
        GROUP=heads.group, PAGE=heads.page, D=heads.key_dim, DV=heads.value_dim,
        BLOCK_M=block_m, BLOCK_Q=block_q, BLOCK_T=block_t,
        BLOCK_D=power_of_two(heads.key_dim), BLOCK_DV=power_of_two(heads.value_dim),
        num_warps=8, num_stages=2,
    )  # fmt: skip


@triton.jit(do_not_specialize=["table_row"])
def _decode(
    query, keys, values, block_table, lengths, parts, logs,
    scale, softcap, window,
    q_row, q_head, k_block, k_place, k_head, v_block, v_place, v_head, table_row,
    HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr,
    GROUP: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """For (row, key head, every so many splits): parts[row, head, split] and logs[row, head, split].

    A part is the attention over the split's keys alone, a log the base-2 logarithm of its sum of exponents.
    Splits are counted from the first that has keys in the window.
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths + row)
    start = _window_start(length, window, HAS_WINDOW)
    members, dims, value_dims = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    heads, real = head * GROUP + members, members < GROUP
    q_from = query + row * q_row + heads[:, None] * q_head + dims[None, :]
    q = tl.load(q_from, mask=real[:, None] & (dims < D)[None, :], other=0.0)
    positions = length - 1 + members * 0

    first_split, end_split = start // SPLIT, (length + SPLIT - 1) // SPLIT
    for split in range(first_split + tl.program_id(2), end_split, tl.num_programs(2)):
        top, total, mixed = _attend(
            q, positions, tl.maximum(start, split * SPLIT), tl.minimum(length, split * SPLIT + SPLIT),
            block_table + row * table_row, keys + head * k_head, values + head * v_head,
            k_block, k_place, v_block, v_place, scale, softcap, window,
            HAS_SOFTCAP, HAS_WINDOW, PAGE, D, DV, BLOCK_G, BLOCK_T, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        lines = (row * tl.num_programs(1) * GROUP + heads) * MAX_SPLITS + split - first_split
        tl.store(logs + lines, top + tl.log2(total), mask=real)
        to = parts + lines[:, None] * DV + value_dims[None, :]
        tl.store(to, mixed / total[:, None], mask=real[:, None] & (value_dims < DV)[None, :])


@triton.jit
def _merge(
    parts, logs, lengths, out,
    window,
    out_row, out_head,
    HAS_WINDOW: tl.constexpr, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
    HEADS: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """For (row, head): out = the parts, weighted by their shares of the sum of exponents."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths + row)
    first_split = _window_start(length, window, HAS_WINDOW) // SPLIT
    num_splits = (length + SPLIT - 1) // SPLIT - first_split
    splits, dims = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_DV)
    lines = (row * HEADS + head) * MAX_SPLITS + splits
    log = tl.load(logs + lines, mask=splits < num_splits, other=float("-inf"))
    top = tl.where(num_splits > 0, tl.max(log, 0), 0.0)
    weights = tl.exp2(log - top)
    mask = (splits < num_splits)[:, None] & (dims < DV)[None, :]
    part = tl.load(parts + lines[:, None] * DV + dims[None, :], mask=mask, other=0.0)
    total = tl.where(num_splits > 0, tl.sum(weights, 0), 1.0)
    result = tl.sum(part * weights[:, None], 0) / total
    to = out + row * out_row + head * out_head + dims
    tl.store(to, result.to(out.dtype.element_ty), mask=dims < DV)


@triton.jit(do_not_specialize=["num_rows", "table_row"])
def _prefill(
    query, keys, values, block_table, cu_query, offsets, out,
    scale, softcap, window, num_rows,
    q_token, q_head, k_block, k_place, k_head, v_block, v_place, v_head, table_row, out_token, out_head,
    HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
    GROUP: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """For (tile of BLOCK_Q tokens of one row, key head): out. A line is one head of one of the tokens."""
    tile, head = tl.program_id(0), tl.program_id(1)
    row = _row_of(tile, cu_query, num_rows, BLOCK_Q)
    row_start = tl.load(cu_query + row)
    num_tokens = tl.load(cu_query + row + 1) - row_start
    tile_start = (tile - row_start // BLOCK_Q - row) * BLOCK_Q
    if tile_start >= num_tokens:
        return

    offset = tl.load(offsets + row)
    lines, dims, value_dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    tokens, heads = tile_start + lines // GROUP, head * GROUP + lines % GROUP
    real = (lines < BLOCK_Q * GROUP) & (tokens < num_tokens)
    packed = (row_start + tokens).to(tl.int64)
    q_from = query + packed[:, None] * q_token + heads[:, None] * q_head + dims[None, :]
    q = tl.load(q_from, mask=real[:, None] & (dims < D)[None, :], other=0.0)
    low = _window_start(offset + tile_start + 1, window, HAS_WINDOW)
    high = offset + tl.minimum(tile_start + BLOCK_Q, num_tokens)
    _, total, mixed = _attend(
        q, offset + tokens, low, high,
        block_table + row.to(tl.int64) * table_row, keys + head * k_head, values + head * v_head,
        k_block, k_place, v_block, v_place, scale, softcap, window,
        HAS_SOFTCAP, HAS_WINDOW, PAGE, D, DV, BLOCK_M, BLOCK_T, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    result = mixed / tl.where(real, total, 1.0)[:, None]
    to = out + packed[:, None] * out_token + heads[:, None] * out_head + value_dims[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=real[:, None] & (value_dims < DV)[None, :])


@triton.jit
def _attend(
    q, positions, low, high, table, keys, values,
    k_block, k_place, v_block, v_place, scale, softcap, window,
    HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
    PAGE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Let lines q [BLOCK_M, BLOCK_D], standing at `positions` of one row, look at its places low <= p < high.

    Returns each line's highest score, its sum of exponents relative to that, and the sum of values weighted
    by them: [BLOCK_M], [BLOCK_M], [BLOCK_M, BLOCK_DV]. Nothing outside of low and high is read.
    """
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.full((BLOCK_M,), 0.0, tl.float32)
    mixed = tl.full((BLOCK_M, BLOCK_DV), 0.0, tl.float32)
    dims, value_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    for first in range(low // BLOCK_T * BLOCK_T, high, BLOCK_T):
        places = first + tl.arange(0, BLOCK_T)
        held = (places >= low) & (places < high)
        blocks = tl.load(table + places // PAGE, mask=held, other=0).to(tl.int64)
        k_rows = keys + blocks * k_block + places % PAGE * k_place
        v_rows = values + blocks * v_block + places % PAGE * v_place
        k_mask, v_mask = held[:, None] & (dims < D)[None, :], held[:, None] & (value_dims < DV)[None, :]
        k = tl.load(k_rows[:, None] + dims[None, :], mask=k_mask, other=0.0)
        v = tl.load(v_rows[:, None] + value_dims[None, :], mask=v_mask, other=0.0)

        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if HAS_SOFTCAP:  # softcap * tanh(scores / softcap), by an exponent that may be infinite
            scores = softcap - 2 * softcap / (1 + tl.exp(scores * (2 / softcap)))
        distance = positions[:, None] - places[None, :]
        seen = held[None, :] & (distance >= 0)
        if HAS_WINDOW:
            seen &= distance < window
        scores = tl.where(seen, scores * 1.4426950408889634, float("-inf"))  # times log2(e), for exp2

        new_top = tl.maximum(top, tl.max(scores, 1))
        # A line that has seen nothing yet has no highest score: -inf minus -inf would be NaN.
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - pivot[:, None])
        shrink = tl.exp2(top - pivot)
        total = total * shrink + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(v.dtype), v, mixed * shrink[:, None], input_precision="ieee")
        top = new_top
    return top, total, mixed


@triton.jit
def _window_start(length, window, HAS_WINDOW: tl.constexpr):
    """The first position that the last of `length` tokens looks at."""
    start = length * 0
    if HAS_WINDOW:
        start = tl.maximum(length - window, 0)
    return start


@triton.jit
def _row_of(tile, cu_query, num_rows, BLOCK_Q: tl.constexpr):
    """The row that a prefill tile belongs to: the last whose first tile is `tile` or an earlier one.

    Row r is given tiles from `cu_query[r] // BLOCK_Q + r` on, which leaves room for the tile that it fills
    only in part. So the number of tiles follows from the shapes, without knowing the rows.
    """
    row = tile * 0
    end = num_rows
    while end - row > 1:
        middle = (row + end) // 2
        earlier = tl.load(cu_query + middle) // BLOCK_Q + middle <= tile
        row = tl.where(earlier, middle, row)
        end = tl.where(earlier, end, middle)
    return row


class _Heads(NamedTuple):
    """The sizes that the tensors of one call agree on."""

    num_kv_heads: int
    group: int
    """Query heads for each key head."""
    page: int
    key_dim: int
    value_dim: int
    vector_bytes: int
    """Of one key or value, whichever is longer, as the kernels hold it."""

    @classmethod
    def of(
        cls,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        block_table: torch.Tensor,
        out: torch.Tensor,
    ) -> "_Heads":
        tokens, num_heads, key_dim = query.shape
        _, page, num_kv_heads, value_dim = value_cache.shape
        assert key_cache.shape == (len(value_cache), page, num_kv_heads, key_dim)
        assert out.shape == (tokens, num_heads, value_dim)
        assert num_heads % num_kv_heads == 0
        assert query.dtype == key_cache.dtype == value_cache.dtype
        assert all(tensor.stride(-1) == 1 for tensor in (query, key_cache, value_cache, block_table, out))
        longer = power_of_two(max(key_dim, value_dim)) * query.dtype.itemsize
        return cls(num_kv_heads, num_heads // num_kv_heads, page, key_dim, value_dim, longer)


def _decode_tile(vector_bytes: int) -> int:
    """Keys in a tile."""
    return 64 if vector_bytes <= 256 else 32 if vector_bytes <= 512 else 16


def _prefill_tile(vector_bytes: int, dtype: torch.dtype) -> tuple[int, int]:
    """Lines and keys of a tile: what the registers and 99 KiB of shared memory hold."""
    if dtype == torch.float32:
        return (64, 16) if vector_bytes <= 512 else (32, 16)
    if vector_bytes <= 256:
        return 128, 64
    return (64, 32) if vector_bytes <= 512 else (32, 16)
