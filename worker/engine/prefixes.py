"""Which texts somebody has: a tree of prefixes, exact to the token. No torch here."""

from collections.abc import Hashable, Iterator, Sequence
from typing import Generic, TypeVar

from worker.jobs import AdapterKey

H = TypeVar("H", bound=Hashable)


class Node(Generic[H]):
    """A text under one adapter version: its parent's, and one granule of tokens more."""

    __slots__ = ("children", "holders", "key", "num_tokens", "parent")

    def __init__(self, parent: "Node[H] | None", key: Hashable, num_tokens: int) -> None:
        self.parent = parent
        self.key = key
        """The granule's tokens; right below the top the adapter."""
        self.num_tokens = num_tokens
        """Length of the whole text."""
        self.children: dict[Hashable, Node[H]] = {}
        self.holders: dict[H, None] = {}
        """Who has it, in the order in which they came to it."""

    @property
    def path(self) -> "list[Node[H]]":
        """The texts that this one begins with, the shortest first, itself last."""
        path = []
        node: Node[H] | None = self
        while node is not None and node.num_tokens:
            path.append(node)
            node = node.parent
        return path[::-1]


class PrefixTree(Generic[H]):
    """Texts in granules of a fixed number of tokens, and for each of them its holders.

    Two texts meet in one node only if adapter version and every token are equal: keys are the tokens
    themselves, compared whole, never a hash alone. A node lives while it has holders or children.
    """

    def __init__(self, granule: int) -> None:
        assert granule > 0
        self.granule = granule
        self._top: Node[H] = Node(None, None, 0)

    def find(self, adapter: AdapterKey | None, tokens: Sequence[int], limit: int) -> Node[H] | None:
        """The longest known text that `tokens` begins with, of at most `limit` tokens."""
        node = self._top.children.get(adapter)
        if node is None:
            return None
        for start in range(0, limit - self.granule + 1, self.granule):
            child = node.children.get(tuple(tokens[start : start + self.granule]))
            if child is None:
                break
            node = child
        return node if node.num_tokens else None

    def extend(
        self, adapter: AdapterKey | None, node: Node[H] | None, tokens: Sequence[int], limit: int
    ) -> list[Node[H]]:
        """The nodes of `tokens` behind `node`, up to `limit` tokens, made where there is none.

        Each must get a holder before any other method is called.
        """
        starts = range(node.num_tokens if node else 0, limit - self.granule + 1, self.granule)
        nodes: list[Node[H]] = []
        for start in starts:
            node = node or self._child(self._top, adapter, 0)
            node = self._child(node, tuple(tokens[start : start + self.granule]), start + self.granule)
            nodes.append(node)
        return nodes

    def drop(self, node: Node[H], holder: H) -> None:
        """`holder` no longer has `node`. What it has of the text before it stays."""
        del node.holders[holder]
        parent = node.parent
        while parent is not None and not node.holders and not node.children:
            del parent.children[node.key]
            node, parent = parent, parent.parent

    def nodes(self) -> Iterator[Node[H]]:
        """All texts, parents before children."""
        queue = [child for top in self._top.children.values() for child in top.children.values()]
        while queue:
            node = queue.pop()
            yield node
            queue.extend(node.children.values())

    def check_integrity(self) -> None:
        """Raise AssertionError unless the tree is whole and nobody is in it for nothing."""
        assert all(top.children for top in self._top.children.values()), "an adapter without texts"
        for node in self.nodes():
            parent = node.parent
            assert parent is not None
            assert parent.children[node.key] is node
            assert isinstance(node.key, tuple)
            assert len(node.key) == self.granule
            assert node.num_tokens == parent.num_tokens + self.granule
            assert node.holders or node.children, "a text that nobody has"

    @staticmethod
    def _child(node: Node[H], key: Hashable, num_tokens: int) -> Node[H]:
        child = node.children.get(key)
        if child is None:
            child = node.children[key] = Node(node, key, num_tokens)
        return child
