"""LoRA on a batch whose tokens have different adapters, by two Triton kernels and without moving weights.

`y[t] += B @ (A @ x[t])` with the adapter of token t's slot. Shrink makes `h = A x`, expand adds `B h` to y.
A kernel program serves one tile: at most `tile_size` tokens, all of one slot, and so reads one adapter.

Everything that changes between steps or adapters is read from device memory at fixed addresses, and the
grid depends on sizes fixed at construction: a CUDA graph captured once goes on being right.
"""
# ruff: noqa: ANN001, ANN202, N803, PLR0917 (kernels are written in Triton's dialect)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
import triton
import triton.language as tl
from torch.nn import functional

from worker.engine.adapters.adapter import LoRAPair
from worker.engine.kernels.tiles import power_of_two
from worker.engine.kernels.tilings import RANK_ALIGNMENT, Tiling, Work, default_tiling, tile_size
from worker.engine.lora_ops import Part, Stack
from worker.engine.lora_plan import Run

GENERATION = 1
"""To be counted up with a change to the kernels below: what was found out about others does not hold."""
_TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class TokenTiles:
    """A step's tokens grouped by slot and cut into tiles. The same for every module of the model.

    One int32 buffer of fixed size on `device`, so that a step brings it up to date with one copy. It starts
    without any tile, which leaves every token alone.
    """

    def __init__(self, max_tokens: int, max_slots: int, device: torch.device | str = "cpu") -> None:
        self.max_tokens = max_tokens
        self.max_slots = max_slots
        self.tile_size = tile_size(max_tokens)
        active = min(max_slots, max_tokens)
        self.max_tiles = active + (max_tokens - active) // self.tile_size
        self.buffer = torch.zeros(max_tokens + 3 * self.max_tiles, dtype=torch.int32, device=device)
        self.order = self.buffer[:max_tokens]
        """[max_tokens], token numbers slot by slot."""
        self.slots, self.starts, self.stops = self.buffer[max_tokens:].view(3, self.max_tiles)
        """[max_tiles] each: tile i is `order[starts[i]:stops[i]]`, all of slots[i]; empty if not in use."""

    def copy_(self, other: "TokenTiles") -> None:
        """Take over the contents of `other`, of the same capacities on whatever device, without waiting."""
        assert (self.max_tokens, self.max_slots) == (other.max_tokens, other.max_slots)
        self.buffer.copy_(other.buffer, non_blocking=True)


def tile_tokens(runs: Iterable[Run], max_tokens: int, max_slots: int) -> TokenTiles:
    """Tiles on the CPU for the tokens of `runs`, each `(slot, start, stop)`; tokens in no run use no adapter.

    A slot may have several runs, in any order. No token is in two runs, none is `max_tokens` or more.
    """
    tokens: dict[int, list[int]] = {}
    for slot, start, stop in runs:
        assert 0 <= slot < max_slots
        assert 0 <= start <= stop <= max_tokens
        tokens.setdefault(slot, []).extend(range(start, stop))
    tiles = TokenTiles(max_tokens, max_slots)
    order: list[int] = []
    slots, starts, stops = [], [], []
    for slot, own in tokens.items():
        for first in range(0, len(own), tiles.tile_size):
            slots.append(slot)
            starts.append(len(order))
            order += own[first : first + tiles.tile_size]
            stops.append(len(order))
    columns = ((tiles.order, order), (tiles.slots, slots), (tiles.starts, starts), (tiles.stops, stops))
    for column, numbers in columns:
        column[: len(numbers)] = torch.tensor(numbers, dtype=torch.int32)
    return tiles


class LoRATable:
    """Where a projection group's adapters are, by slot.

    A group is one or several linear modules with the same input, whose outputs stand side by side in one
    `y`: q, k and v, or gate and up. The table keeps the tensors that its addresses point at alive.
    Owned by one engine and used on its stream: tensors made on another stream must be recorded on it.
    """

    def __init__(
        self,
        max_slots: int,
        in_features: int,
        out_features: Sequence[int],
        *,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device | str,
        parts: int = 1,
    ) -> None:
        """`out_features` of each member; `max_rank` and `dtype` of one member's pairs.

        With `parts` this holds the rows of A of one part in so many, and B for all of them.
        """
        self.in_features = in_features
        self.out_features = tuple(out_features)
        self.dtype = dtype
        self.parts = parts
        self.max_rank = _round_up(-(-max_rank // parts), RANK_ALIGNMENT)
        """Of one part."""
        self.max_stacked_rank = self.max_rank * len(self.out_features)
        edges = list(itertools.accumulate(self.out_features, initial=0))
        self.sum_out = edges[-1]
        self.aligned = all(edge % 16 == 0 for edge in edges)
        """Whether every member's columns of y can be read and written in wide pieces."""
        self.edges = torch.tensor(edges, dtype=torch.int32, device=device)
        """[members + 1], where the members' columns of y start and end."""
        self.rows = torch.zeros(max_slots, 2 + 3 * len(edges[1:]), dtype=torch.int64, device=device)
        """[max_slots, 2 + 3 * members]: the address of the stacked A and its rank, then for each member
        the address of B, its rank, and the first of its rows in the stack. Rank 0: nothing here. That of B
        is of all parts."""
        self._held: dict[int, tuple[torch.Tensor, list[LoRAPair | None]]] = {}
        self._tilings: dict[Work, Tiling] = {}

    def work(self, max_tokens: int, dtype: torch.dtype) -> Work:
        """What a step with room for `max_tokens` is to the kernels, for x of `dtype`."""
        itemsize = torch.promote_types(dtype, self.dtype).itemsize
        return Work(self.in_features, self.out_features, self.max_rank, max_tokens, itemsize)

    def tiling(self, work: Work) -> Tiling:
        """How that work is cut: as it was set, or by default."""
        tiling = self._tilings.get(work)
        if tiling is None:
            tiling = self._tilings[work] = default_tiling(work)
        return tiling

    def set_tiling(self, work: Work, tiling: Tiling) -> None:
        self._tilings[work] = tiling

    def put(self, slot: int, pairs: Sequence[LoRAPair | None]) -> None:
        """Replace what `slot` holds by one adapter: a pair for each member, None where it has nothing.

        Pairs are of the table's dtype and on its device, `a` [r, in_features] and `b`
        [out_features, parts * r] of the member. B is used where it lies, unless its rank is no multiple of 8
        or it is not contiguous; the A of several members are stacked, which copies them.
        """
        assert len(pairs) == len(self.out_features)
        padded = [None if pair is None else self._padded(pair) for pair in pairs]
        present = [pair for pair in padded if pair is not None]
        if not present:
            self.clear(slot)
            return
        a = present[0].a if len(present) == 1 else torch.cat([pair.a for pair in present])
        row, first = [a.data_ptr(), len(a)], 0
        for pair, out_features in zip(padded, self.out_features, strict=True):
            rank = 0 if pair is None else pair.rank
            assert pair is None or pair.b.shape == (out_features, rank * self.parts)
            row += [0 if pair is None else pair.b.data_ptr(), rank * self.parts, first]
            first += rank
        self.rows[slot].copy_(torch.tensor(row))
        self._held[slot] = a, padded

    def clear(self, slot: int) -> None:
        """Leave `slot` empty: its tokens get nothing from this table."""
        if self._held.pop(slot, None) is not None:
            self.rows[slot].zero_()

    def stack(self, slot: int) -> Stack | None:
        """What `slot` holds, as matrices for products of torch's own; views. None if it holds nothing."""
        held = self._held.get(slot)
        if held is None:
            return None
        a, pairs = held
        parts, rank, column = list[Part](), 0, 0
        for pair, out_features in zip(pairs, self.out_features, strict=True):
            if pair is not None:
                ranks, columns = slice(rank, rank + pair.rank), slice(column, column + out_features)
                parts.append(Part(ranks, columns, pair.b.T))
                rank += pair.rank
            column += out_features
        return Stack(a.T, tuple(parts))

    def _padded(self, pair: LoRAPair) -> LoRAPair:
        missing = -pair.rank % RANK_ALIGNMENT
        assert pair.rank + missing <= self.max_rank
        assert pair.a.shape[1] == self.in_features
        a, b = pair
        if missing:
            a = functional.pad(a, (0, 0, 0, missing))
            b = functional.pad(b.reshape(len(b), self.parts, -1), (0, missing)).flatten(1)
        assert a.dtype == b.dtype == self.dtype
        assert a.device == b.device == self.rows.device
        return LoRAPair(_aligned(a), _aligned(b))


def scratch_size(table: LoRATable, max_tokens: int, dtype: torch.dtype) -> int:
    """How many float32 numbers `add_lora` needs as scratch for x of `dtype`."""
    return table.tiling(table.work(max_tokens, dtype)).splits * _split_size(table, max_tokens)


def add_lora(
    x: torch.Tensor, y: torch.Tensor, table: LoRATable, tokens: TokenTiles, scratch: torch.Tensor
) -> None:
    """Add to each token of y, in place, what its adapter makes of x; equals `lora_ops.add_lora_reference`.

    x [T, in_features] and y [T, sum of out_features], rows may be strided; T is at most `tokens.max_tokens`
    and every token in `tokens` is below T. Any of float16, bfloat16 and float32: h and the factors of both
    products are of the dtype that x's and the adapters' promote to, sums are float32, and y is rounded once.
    `scratch` is float32 and flat, of `scratch_size` elements or more, and is overwritten.

    A token without an adapter is not touched. What a token gets does not depend on the tokens beside it,
    only on its own x and adapter, `tokens.tile_size` and the table's tiling. Never waits for the device.
    """
    assert table.parts == 1
    h = _launch_shrink(x, table, tokens, scratch)
    _launch_expand(h, len(h), 1, y, table, tokens, x.dtype)


def add_lora_parts(
    x: torch.Tensor,
    y: torch.Tensor,
    table: LoRATable,
    tokens: TokenTiles,
    scratch: torch.Tensor,
    collect: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """As `add_lora`, where this process has one part of x, or one of A's rows, and others have the rest.

    `collect` takes what A makes here, [n] float32, and returns what it makes everywhere, [table.parts, n]:
    the parts one after the other, or the sum. It is called once, whatever is in `tokens`.
    """
    h = _launch_shrink(x, table, tokens, scratch)
    whole = collect(h.sum(0).flatten() if len(h) > 1 else h.flatten())
    assert len(whole) == table.parts
    _launch_expand(whole, 1, table.parts, y, table, tokens, x.dtype)


def _launch_shrink(
    x: torch.Tensor, table: LoRATable, tokens: TokenTiles, scratch: torch.Tensor
) -> torch.Tensor:
    """What A makes of x, [splits, max_tokens, max_stacked_rank], in `scratch`; splits are to be summed."""
    assert len(x) <= tokens.max_tokens
    assert x.shape[1] == table.in_features
    assert x.stride(1) == 1
    assert scratch.dtype == torch.float32
    tiling = table.tiling(table.work(tokens.max_tokens, x.dtype))
    split_stride = _split_size(table, tokens.max_tokens)
    assert scratch.numel() >= tiling.splits * split_stride
    _shrink[tokens.max_tiles, triton.cdiv(table.max_stacked_rank, tiling.ranks), tiling.splits](
        x, table.rows, tokens.order, tokens.slots, tokens.starts, tokens.stops, scratch,
        x.stride(0), split_stride,
        ROW=table.rows.shape[1], IN_FEATURES=table.in_features, H_STRIDE=table.max_stacked_rank,
        SPLITS=tiling.splits, BLOCK_M=tokens.tile_size, BLOCK_R=tiling.ranks, BLOCK_K=tiling.features,
        **_dtypes(table, x.dtype), num_warps=tiling.shrink_warps, num_stages=tiling.shrink_stages,
    )  # fmt: skip
    return scratch[: tiling.splits * split_stride].view(tiling.splits, tokens.max_tokens, -1)


def _launch_expand(
    h: torch.Tensor,
    splits: int,
    parts: int,
    y: torch.Tensor,
    table: LoRATable,
    tokens: TokenTiles,
    dtype: torch.dtype,
) -> None:
    """Add to y what B makes of h [splits or parts, max_tokens, max_stacked_rank], of x of `dtype`."""
    assert y.shape[1] == table.sum_out
    assert y.stride(1) == 1
    tiling = table.tiling(table.work(tokens.max_tokens, dtype))
    widest = triton.cdiv(max(table.out_features), tiling.columns)
    _expand[tokens.max_tiles, widest, len(table.out_features)](
        h, table.rows, table.edges, tokens.order, tokens.slots, tokens.starts, tokens.stops, y,
        y.stride(0), _split_size(table, tokens.max_tokens),
        ROW=table.rows.shape[1], H_STRIDE=table.max_stacked_rank, ALIGNED=table.aligned,
        SPLITS=splits, PARTS=parts, BLOCK_M=tokens.tile_size, BLOCK_N=tiling.columns,
        BLOCK_R=min(power_of_two(table.max_rank * parts), 32), **_dtypes(table, dtype),
        num_warps=tiling.expand_warps, num_stages=tiling.expand_stages,
    )  # fmt: skip


def _dtypes(table: LoRATable, dtype: torch.dtype) -> dict[str, tl.dtype]:
    product = torch.promote_types(dtype, table.dtype)
    return {"LORA": _TRITON_DTYPES[table.dtype], "PRODUCT": _TRITON_DTYPES[product]}


@triton.jit
def _shrink(
    x, rows, order, slots, starts, stops, h,
    x_stride, split_stride,
    ROW: tl.constexpr, IN_FEATURES: tl.constexpr, H_STRIDE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    LORA: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """h[split, place in order, rank] = the split's part of x @ A.T, for (tile, block of ranks, split)."""
    tile, split = tl.program_id(0), tl.program_id(2)
    start, stop = tl.load(starts + tile), tl.load(stops + tile)
    if start == stop:
        return
    row = rows + tl.load(slots + tile) * ROW
    rank = tl.load(row + 1).to(tl.int32)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    if tl.program_id(1) * BLOCK_R >= rank:
        return

    a = tl.multiple_of(tl.load(row).to(tl.pointer_type(LORA)), 16)
    places = start + tl.arange(0, BLOCK_M)
    tokens = tl.load(order + places, mask=places < stop, other=0).to(tl.int64)
    x_rows = x + tokens[:, None] * x_stride
    a_rows = a + ranks[:, None] * IN_FEATURES
    total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for first in range(split * BLOCK_K, IN_FEATURES, SPLITS * BLOCK_K):
        columns = (first + tl.arange(0, BLOCK_K))[None, :]
        x_mask = (places < stop)[:, None] & (columns < IN_FEATURES)
        a_mask = (ranks < rank)[:, None] & (columns < IN_FEATURES)
        x_part = tl.load(x_rows + columns, mask=x_mask, other=0.0).to(PRODUCT)
        a_part = tl.load(a_rows + columns, mask=a_mask, other=0.0).to(PRODUCT)
        total = tl.dot(x_part, tl.trans(a_part), total, input_precision="ieee")
    to = h + split * split_stride + places[:, None] * H_STRIDE + ranks[None, :]
    tl.store(to, total, mask=(places < stop)[:, None] & (ranks < rank)[None, :])


@triton.jit
def _expand(
    h, rows, edges, order, slots, starts, stops, y,
    y_stride, split_stride,
    ROW: tl.constexpr, H_STRIDE: tl.constexpr, ALIGNED: tl.constexpr,
    SPLITS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    LORA: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """y[token, member's columns] += (sum of h over splits) @ B.T, for (tile, block of columns, member).

    With PARTS h has the member's ranks in so many equal pieces, one where a split would be.
    """
    tile, member = tl.program_id(0), tl.program_id(2)
    start, stop = tl.load(starts + tile), tl.load(stops + tile)
    if start == stop:
        return
    row = rows + tl.load(slots + tile) * ROW + 2 + 3 * member
    rank = tl.multiple_of(tl.load(row + 1), 8).to(tl.int32)
    left, right = tl.load(edges + member), tl.load(edges + member + 1)
    if ALIGNED:
        left, right = tl.multiple_of(left, 16), tl.multiple_of(right, 16)
    first_column = tl.program_id(1) * BLOCK_N
    if (rank == 0) | (left + first_column >= right):
        return

    b = tl.multiple_of(tl.load(row).to(tl.pointer_type(LORA)), 16)
    first_rank = tl.multiple_of(tl.load(row + 2), 8).to(tl.int32)
    columns = first_column + tl.arange(0, BLOCK_N)
    own = columns < right - left
    places = start + tl.arange(0, BLOCK_M)
    held = places < stop
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, rank, BLOCK_R):
        ranks = first + tl.arange(0, BLOCK_R)
        if PARTS == 1:
            of_rank = first_rank + ranks
        else:
            of_rank = first_rank + ranks % (rank // PARTS) + ranks // (rank // PARTS) * split_stride
        h_from = h + places[:, None] * H_STRIDE + of_rank[None, :]
        h_mask = held[:, None] & (ranks < rank)[None, :]
        h_part = tl.load(h_from, mask=h_mask, other=0.0)
        for split in tl.static_range(1, SPLITS):
            h_part += tl.load(h_from + split * split_stride, mask=h_mask, other=0.0)
        b_mask = own[:, None] & (ranks < rank)[None, :]
        b_part = tl.load(b + columns[:, None] * rank + ranks[None, :], mask=b_mask, other=0.0)
        total = tl.dot(h_part.to(PRODUCT), tl.trans(b_part.to(PRODUCT)), total, input_precision="ieee")
    tokens = tl.load(order + places, mask=held, other=0).to(tl.int64)
    to = y + tokens[:, None] * y_stride + (left + columns)[None, :]
    mask = held[:, None] & own[None, :]
    tl.store(to, (tl.load(to, mask=mask, other=0.0) + total).to(y.dtype.element_ty), mask=mask)


def _split_size(table: LoRATable, max_tokens: int) -> int:
    """Numbers of h that one split of a step makes room for."""
    return max_tokens * table.max_stacked_rank


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
