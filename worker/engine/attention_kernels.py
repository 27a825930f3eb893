"""Attention by the kernels of `kernels.attention`: for GPUs, and for CPUs through Triton's interpreter."""

import itertools
from collections.abc import Sequence

import torch

from worker.engine.attention import AttentionPlan, Cache, Form, Held, places
from worker.engine.kernels.attention import paged_decode, paged_prefill
from worker.engine.transfer import to_device


class KernelAttentionPlan(AttentionPlan):
    """A step's rows as tables on the device. Its tensors can be given new contents in place: `copy_`.

    Rows of one token come last. Padding rows, of which a captured graph may have some, look at nothing and
    write to the block behind the last, which is nobody's.
    """

    def __init__(
        self, rows: Sequence[Held], *, block_size: int, max_blocks: int, device: torch.device
    ) -> None:
        """`max_blocks` is what the longest possible row holds: results must not depend on the step's."""
        self._block_size = block_size
        chunks = [row for row in rows if row[2] > 1]
        decode = rows[len(chunks) :]
        self.num_chunk_tokens = sum(num_tokens for _, _, num_tokens in chunks)
        self._chunk_tables = to_device(_tables(chunks, max_blocks), device)
        cumulative = itertools.accumulate((num_tokens for _, _, num_tokens in chunks), initial=0)
        self._cumulative = _int32(list(cumulative), device)
        self._offsets = _int32([offset for _, offset, _ in chunks], device)
        self.decode_tables = to_device(_tables(decode, max_blocks), device)
        self.lengths = _int32([offset + 1 for _, offset, _ in decode], device)
        write = [
            place
            for blocks, offset, num_tokens in rows
            for place in places(blocks, offset, offset + num_tokens, block_size)
        ]
        self.write = to_device(torch.tensor(write, dtype=torch.int64), device)

    @classmethod
    def padding(
        cls, num_rows: int, *, block_size: int, max_blocks: int, trash: int, device: torch.device
    ) -> "KernelAttentionPlan":
        """A plan for `num_rows` decoding rows, all of them padding; `trash` is a place that is nobody's."""
        plan = cls([], block_size=block_size, max_blocks=max_blocks, device=device)
        plan.decode_tables = torch.zeros(num_rows, max_blocks, dtype=torch.int32, device=device)
        plan.lengths = torch.zeros(num_rows, dtype=torch.int32, device=device)
        plan.write = torch.full((num_rows,), trash, dtype=torch.int64, device=device)
        return plan

    def copy_(self, other: "KernelAttentionPlan", trash: int) -> None:
        """Take over the decoding rows of `other`, which are no more than this plan's; the rest is padding."""
        assert not other.num_chunk_tokens
        num_rows = len(other.lengths)
        assert self.write is not None
        assert other.write is not None
        self.decode_tables[:num_rows].copy_(other.decode_tables, non_blocking=True)
        self.lengths[:num_rows].copy_(other.lengths, non_blocking=True)
        self.lengths[num_rows:].zero_()
        self.write[:num_rows].copy_(other.write, non_blocking=True)
        self.write[num_rows:].fill_(trash)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: Cache | None, form: Form
    ) -> torch.Tensor:
        """See AttentionPlan. Reads keys and values, the newest too, from the cache alone."""
        assert cache is not None
        keys, values = (store.view(-1, self._block_size, *store.shape[1:]) for store in cache)
        output = query.new_empty(len(query), query.shape[1], value.shape[2])
        query = query.contiguous()
        first = self.num_chunk_tokens
        if first:
            paged_prefill(
                query[:first],
                keys,
                values,
                self._chunk_tables,
                self._cumulative,
                self._offsets,
                scale=form.scale,
                softcap=form.softcap,
                window=form.window,
                out=output[:first],
            )
        if len(self.lengths):
            paged_decode(
                query[first:],
                keys,
                values,
                self.decode_tables,
                self.lengths,
                scale=form.scale,
                softcap=form.softcap,
                window=form.window,
                out=output[first:],
            )
        return output


def _tables(rows: Sequence[Held], max_blocks: int) -> torch.Tensor:
    tables = torch.zeros(len(rows), max_blocks, dtype=torch.int32)
    for table, (blocks, _, _) in zip(tables, rows, strict=True):
        table[: len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    return tables


def _int32(numbers: list[int], device: torch.device) -> torch.Tensor:
    return to_device(torch.tensor(numbers, dtype=torch.int32), device)
