"""Which sequence holds which blocks of the KV cache, and which texts the blocks still have in them.

Bookkeeping only: the tensors are in `attention`.
"""

import heapq
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from worker.engine.prefixes import Node, PrefixTree
from worker.jobs import AdapterKey


class BlockCopy(NamedTuple):
    """The first `num_tokens` places of one block are to be copied to another, in all layers."""

    source_block: int
    target_block: int
    num_tokens: int


class Leftover(NamedTuple):
    """Places of a block, `start <= place < stop`, with keys and values that are not its new holder's."""

    block: int
    start: int
    stop: int


class Growth(NamedTuple):
    """What a sequence holds, and what it will come to hold."""

    remaining: int
    """Tokens that it is expected to generate yet."""
    num_tokens: int
    """Tokens that it has, computed or not."""
    num_blocks: int
    num_alone: int
    """Blocks that nobody else holds."""


class KVCache(ABC):
    """Hands out blocks of `block_size` token places each, and knows texts that are in them.

    Free blocks keep their content, and stay findable, until the place is needed: blocks without content
    go first, the lowest of them before others, then the least recently used text, its end before its
    beginning. A text is known in whole granules only, and only from `remember` on: its keys and values
    must be there and finite by then. With `reuse` off nothing is ever known.

    Whoever gets a block finds in it the text that it was begun with, and zeros behind that, once the places
    that `take_leftovers` names are zeroed.
    """

    def __init__(self, num_blocks: int, block_size: int, granule: int, *, reuse: bool) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.granule = granule
        self.reuse = reuse
        self._tree = PrefixTree[int](granule)
        self._nodes: dict[int, Node[int]] = {}
        """The longest text that each block is known for."""
        self._holds = [0] * num_blocks
        self._empty = list(range(num_blocks))
        self._remembered: OrderedDict[int, None] = OrderedDict()
        """Free blocks with content, the next to go first."""
        self._filled = [0] * num_blocks
        """How many of its places, the first ones, may hold anything but zeros. Kept for free blocks."""
        self._handed_out: dict[int, int] = {}
        """Blocks taken since the last `take_leftovers`, and how many of their places their holders know."""

    @property
    def num_free(self) -> int:
        return len(self._empty) + len(self._remembered)

    def missing(self, blocks: list[int], num_tokens: int) -> int:
        """How many more blocks `num_tokens` tokens need than `blocks` holds."""
        return max(0, -(-num_tokens // self.block_size) - len(blocks))

    def match(self, adapter: AdapterKey | None, tokens: Sequence[int], limit: int) -> Node[int] | None:
        """The longest text in the cache that `tokens` begins with, of at most `limit` tokens."""
        return self._tree.find(adapter, tokens, limit) if self.reuse else None

    @abstractmethod
    def fits(
        self,
        node: Node[int] | None,
        growth: Growth,
        others: Iterable[Growth],
        *,
        held: Collection[int] | None = None,
    ) -> bool:
        """Whether a sequence that reuses `node` can be expected to run beside `others` to its end.

        As if no blocks were held but `held`, if that is given.
        """

    @abstractmethod
    def begin(self, blocks: list[int], node: Node[int] | None, num_tokens: int) -> list[BlockCopy] | None:
        """Make the empty `blocks` hold the text of `node`, and room for `num_tokens` tokens in all.

        Returns what has to be copied before the places are read or written; None, and no change, if
        there is no room.
        """

    def grow(self, blocks: list[int], num_tokens: int) -> bool:
        """Extend `blocks` in place until `num_tokens` tokens fit; False, and no change, if they cannot."""
        missing = self.missing(blocks, num_tokens)
        if missing > self.num_free:
            return False
        blocks.extend(self._take() for _ in range(missing))
        return True

    @abstractmethod
    def remember(
        self, adapter: AdapterKey | None, tokens: Sequence[int], blocks: list[int], num_proven: int
    ) -> None:
        """From now on the first `num_proven` of `tokens`, in whole granules, are known to be in `blocks`.

        May exchange blocks for others with the same content.
        """

    def free(self, blocks: list[int], num_written: int) -> None:
        """Take one hold of each of `blocks` back and empty the list.

        The model may have written to the first `num_written` of their places, counted through `blocks`.
        """
        for number, block in reversed(list(enumerate(blocks))):
            filled = min(self.block_size, num_written - number * self.block_size)
            self._filled[block] = max(self._filled[block], filled)
            self._holds[block] -= 1
            if self._holds[block] == 0:
                self._handed_out.pop(block, None)
                if block in self._nodes:
                    self._remembered[block] = None
                else:
                    heapq.heappush(self._empty, block)
        blocks.clear()

    def take_leftovers(self) -> tuple[Leftover, ...]:
        """What is to be zeroed in the blocks taken since the last call: after copying, before they are read.

        Attention may read, masked, what lies behind a row's tokens. Not only NaN does harm there: with a
        large key the score overflows, and infinity minus the mask's infinity is not a number.
        """
        handed_out, self._handed_out = self._handed_out, {}
        leftovers = []
        for block, known in handed_out.items():
            if self._filled[block] > known:
                leftovers.append(Leftover(block, known, self._filled[block]))
                self._filled[block] = known
        return tuple(leftovers)

    def num_shared(self, blocks: list[int]) -> int:
        """How many of `blocks` others hold too. They are the first ones."""
        low, high = 0, len(blocks)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self._holds[blocks[middle]] > 1 else (low, middle)
        return low

    def check_integrity(self, held: Iterable[list[int]]) -> None:
        """Raise AssertionError unless every block is free or held as often as `held` says."""
        counts = Counter(block for blocks in held for block in blocks)
        assert self._holds == [counts[block] for block in range(self.num_blocks)], "holds miscounted"
        free = sorted([*self._empty, *self._remembered])
        assert free == [block for block in range(self.num_blocks) if not counts[block]], "blocks lost"
        assert not self._nodes.keys() & set(self._empty), "an empty block passes for content"
        assert self._nodes.keys() >= self._remembered.keys(), "a block without content is remembered"
        self._tree.check_integrity()
        self._check_nodes()

    @abstractmethod
    def check_known(
        self, adapter: AdapterKey | None, tokens: Sequence[int], blocks: list[int], num_proven: int
    ) -> None:
        """Raise AssertionError unless `blocks` pass for no more than proven beginnings of `tokens`."""

    @abstractmethod
    def _check_nodes(self) -> None:
        """Raise AssertionError unless blocks and nodes point at each other."""

    @abstractmethod
    def _forget(self, block: int) -> None:
        """The content of `block` will be overwritten."""

    def _take(self, num_known: int = 0) -> int:
        """A hold of the free block whose content is missed least; `num_known` places will be copied to it."""
        if self._empty:
            block = heapq.heappop(self._empty)
        else:
            block, _ = self._remembered.popitem(last=False)
            self._forget(block)
        self._holds[block] = 1
        self._handed_out[block] = num_known
        return block


class SharedBlocks(KVCache):
    """Small blocks that sequences share: a full block of known text is held by all who begin with it.

    A sequence writes only to blocks that it alone holds, since a text in use is full blocks and never
    covers the token that is to be computed next. Whoever holds a block holds those of the text before.
    """

    def __init__(self, num_blocks: int, block_size: int, *, reuse: bool = True) -> None:
        super().__init__(num_blocks, block_size, block_size, reuse=reuse)

    def fits(
        self,
        node: Node[int] | None,
        growth: Growth,
        others: Iterable[Growth],
        *,
        held: Collection[int] | None = None,
    ) -> bool:
        """As rows grow and end, the blocks in use must stay within the cache at every moment.

        The moments to look at are those just before a row ends. Each row is taken to fill its last block
        but for one place, so the sum may be a little too high, never too low.
        The idea is that of arXiv:2507.10150 (past-future scheduling).
        """
        found = [] if node is None else [block for each in node.path for block in each.holders]
        if held is None:
            taken, free = sum(not self._holds[block] for block in found), self.num_free
        else:
            taken, free = sum(block not in held for block in found), self.num_blocks - len(held)
        free -= taken
        rows = sorted([growth._replace(num_blocks=len(found), num_alone=taken), *others])
        size = self.block_size
        spare = [row.num_tokens - 1 + size - 1 - row.num_blocks * size for row in rows]
        total, alive = sum(spare), len(rows)
        for row, own in zip(rows, spare, strict=True):
            if (total + alive * row.remaining) // size > free:
                return False
            total, alive, free = total - own, alive - 1, free + row.num_alone
        return True

    def begin(self, blocks: list[int], node: Node[int] | None, num_tokens: int) -> list[BlockCopy] | None:
        assert not blocks
        found = [] if node is None else [block for each in node.path for block in each.holders]
        missing = self.missing(found, num_tokens)
        if missing > self.num_free - sum(not self._holds[block] for block in found):
            return None
        for block in found:
            self._hold(block)
        blocks.extend(found)
        blocks.extend(self._take() for _ in range(missing))
        return []

    def remember(
        self, adapter: AdapterKey | None, tokens: Sequence[int], blocks: list[int], num_proven: int
    ) -> None:
        if not self.reuse:
            return
        start = num_proven // self.block_size
        while start and blocks[start - 1] not in self._nodes:
            start -= 1
        known = self._nodes[blocks[start - 1]] if start else None
        for index, node in enumerate(self._tree.extend(adapter, known, tokens, num_proven), start):
            own = blocks[index]
            if node.holders:  # another sequence was first: one place for one text
                (blocks[index],) = node.holders
                self._hold(blocks[index])
                self.free([own], self.block_size)
            else:
                node.holders[own] = None
                self._nodes[own] = node

    def check_known(
        self, adapter: AdapterKey | None, tokens: Sequence[int], blocks: list[int], num_proven: int
    ) -> None:
        known = [self._nodes[block] for block in blocks if block in self._nodes]
        assert [next(iter(node.holders)) for node in known] == blocks[: len(known)], "a hole in the text"
        assert len(known) == (num_proven // self.block_size if self.reuse else 0)
        if known:
            assert known == known[-1].path
            assert self._tree.find(adapter, tokens, num_proven) is known[-1]

    def _check_nodes(self) -> None:
        nodes = list(self._tree.nodes())
        assert len(nodes) == len(self._nodes)
        assert all(list(node.holders) == [block] for block, node in self._nodes.items())
        places = {block: place for place, block in enumerate(self._remembered)}
        for block, node in self._nodes.items():
            for before in node.path[:-1]:
                (parent,) = before.holders
                if self._holds[block]:
                    assert self._holds[parent] >= self._holds[block], "a text is held without its beginning"
                elif not self._holds[parent]:
                    assert places[block] < places[parent], "a text would lose its beginning first"

    def _hold(self, block: int) -> None:
        if not self._holds[block]:
            del self._remembered[block]
        self._holds[block] += 1

    def _forget(self, block: int) -> None:
        node = self._nodes.pop(block)
        assert not node.children, "a text loses its beginning"
        self._tree.drop(node, block)


class OwnBlocks(KVCache):
    """One block for each sequence, long enough for all its tokens; decoding can read them in place.

    Nothing is shared. A known text is copied from the block that has it; a free block that has it, and
    would lose nothing else or nothing better, is taken over as it is.
    """

    def __init__(self, num_blocks: int, block_size: int, *, granule: int = 16, reuse: bool = True) -> None:
        super().__init__(num_blocks, block_size, min(block_size, granule), reuse=reuse)

    def fits(
        self,
        node: Node[int] | None,
        growth: Growth,
        others: Iterable[Growth],
        *,
        held: Collection[int] | None = None,
    ) -> bool:
        return (self.num_free if held is None else self.num_blocks - len(held)) > 0

    def begin(self, blocks: list[int], node: Node[int] | None, num_tokens: int) -> list[BlockCopy] | None:
        assert not blocks
        assert num_tokens <= self.block_size
        if not self.num_free:
            return None
        if node is None:
            blocks.append(self._take())
            return []
        free = [block for block in node.holders if not self._holds[block]]
        cheapest = min(free, key=lambda block: (self._nodes[block].num_tokens, block), default=None)
        if cheapest is not None and (self._nodes[cheapest] is node or not self._empty):
            blocks.append(self._take_over(cheapest, node))
            return []
        source = min(node.holders)
        blocks.append(self._take(node.num_tokens))
        self._add_text(blocks[0], node.path)
        return [BlockCopy(source, blocks[0], node.num_tokens)]

    def remember(
        self, adapter: AdapterKey | None, tokens: Sequence[int], blocks: list[int], num_proven: int
    ) -> None:
        if self.reuse:
            block = blocks[0]
            self._add_text(block, self._tree.extend(adapter, self._nodes.get(block), tokens, num_proven))

    def check_known(
        self, adapter: AdapterKey | None, tokens: Sequence[int], blocks: list[int], num_proven: int
    ) -> None:
        node = self._nodes.get(blocks[0])
        known = num_proven // self.granule * self.granule if self.reuse else 0
        assert (node.num_tokens if node else 0) == known
        assert self._tree.find(adapter, tokens, known) is node

    def _check_nodes(self) -> None:
        assert max(self._holds) <= 1, "a block held twice"
        holders = Counter((id(node), block) for block, tip in self._nodes.items() for node in tip.path)
        assert holders == Counter((id(node), block) for node in self._tree.nodes() for block in node.holders)

    def _add_text(self, block: int, nodes: list[Node[int]]) -> None:
        for node in nodes:
            node.holders[block] = None
            self._nodes[block] = node

    def _take_over(self, block: int, node: Node[int]) -> int:
        """A hold of a free block with the text of `node`; what it has behind that is forgotten."""
        del self._remembered[block]
        self._holds[block] = 1
        self._handed_out[block] = node.num_tokens
        self._forget(block, len(node.path))
        self._nodes[block] = node
        return block

    def _forget(self, block: int, keep: int = 0) -> None:
        for node in reversed(self._nodes.pop(block).path[keep:]):
            self._tree.drop(node, block)
