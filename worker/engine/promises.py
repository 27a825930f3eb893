"""What running rows are about to know, and who waits for it. No torch here."""

from worker.engine.prefixes import Node, PrefixTree
from worker.engine.sequence import Sequence


class Promises:
    """A leader is a running row that computes a text which is not in the cache yet.

    Followers are waiting rows that begin with that text. A promise ends when the leader has computed its
    prompt, or when it leaves before that: either way its followers wait no longer.
    """

    def __init__(self, granule: int, min_gain: int = 32) -> None:
        """`min_gain` is how many tokens a row must save by waiting."""
        self.min_gain = min_gain
        self._tree = PrefixTree[Sequence](granule)
        self._tips: dict[Sequence, Node[Sequence]] = {}
        self._followers: dict[Sequence, dict[Sequence, None]] = {}
        self._leaders: dict[Sequence, Sequence] = {}

    @property
    def num_followers(self) -> int:
        return len(self._leaders)

    def make(self, leader: Sequence) -> None:
        """`leader` begins to compute its tokens."""
        adapter, tokens = leader.request.adapter, leader.tokens
        if len(tokens) - leader.computed < self.min_gain:
            return
        nodes = self._tree.extend(adapter, None, tokens, len(tokens))
        for node in nodes:
            node.holders[leader] = None
        if nodes:
            self._tips[leader] = nodes[-1]
            self._followers[leader] = {}

    def leader(self, sequence: Sequence, num_known: int) -> Sequence | None:
        """Whom `sequence`, which could reuse `num_known` tokens now, had better wait for."""
        node = self._tree.find(sequence.request.adapter, sequence.tokens, sequence.num_reusable)
        if node is None or node.num_tokens - num_known < self.min_gain:
            return None
        return next(iter(node.holders))

    def follow(self, sequence: Sequence, leader: Sequence) -> None:
        self._followers[leader][sequence] = None
        self._leaders[sequence] = leader

    def leave(self, follower: Sequence) -> None:
        """`follower` waits no longer. Others may be given: nothing happens."""
        leader = self._leaders.pop(follower, None)
        if leader is not None:
            del self._followers[leader][follower]

    def end(self, leader: Sequence) -> list[Sequence]:
        """The promise is kept, or broken. Returns those who waited for it; others may be given."""
        tip = self._tips.pop(leader, None)
        if tip is None:
            return []
        for node in reversed(tip.path):
            self._tree.drop(node, leader)
        followers = list(self._followers.pop(leader))
        for follower in followers:
            del self._leaders[follower]
        return followers

    def check_integrity(self, running: list[Sequence], aside: set[Sequence]) -> None:
        """Raise AssertionError unless leaders run and those set aside follow them."""
        self._tree.check_integrity()
        assert self._tips.keys() == self._followers.keys()
        assert self._tips.keys() <= set(running), "waiting for a row that does not run"
        assert self._leaders.keys() == aside
        assert sum(map(len, self._followers.values())) == len(self._leaders)
        assert all(sequence in self._followers[leader] for sequence, leader in self._leaders.items())
