"""Which sequence holds which blocks of the KV cache. Bookkeeping only: the tensors are in `attention`."""

import heapq
from collections.abc import Iterable


class KVCache:
    """Hands out blocks of `block_size` token places each.

    The lowest free block goes first, so that the blocks in use stay close together: with one block
    for each sequence, the decode step then reads the cache as a view.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def missing(self, blocks: list[int], num_tokens: int) -> int:
        """How many more blocks `num_tokens` tokens need than `blocks` holds."""
        return max(0, -(-num_tokens // self.block_size) - len(blocks))

    def grow(self, blocks: list[int], num_tokens: int) -> bool:
        """Extend `blocks` in place until `num_tokens` tokens fit; False, and no change, if they cannot."""
        missing = self.missing(blocks, num_tokens)
        if missing > len(self._free):
            return False
        blocks.extend(heapq.heappop(self._free) for _ in range(missing))
        return True

    def free(self, blocks: list[int]) -> None:
        """Take all of `blocks` back and empty the list."""
        for block in blocks:
            heapq.heappush(self._free, block)
        blocks.clear()

    def check_integrity(self, held: Iterable[list[int]]) -> None:
        """Raise AssertionError unless every block is free or held exactly once."""
        every = sorted([*self._free, *(block for blocks in held for block in blocks)])
        assert every == list(range(self.num_blocks)), f"blocks lost or held twice: {every}"
