"""The rows that wait, findable by age, by length and by adapter. No torch here."""

import heapq
from collections import deque
from collections.abc import Callable, Iterator

from worker.engine.lengths import work
from worker.engine.sequence import Sequence
from worker.jobs import AdapterKey


class _Ranked:
    """Rows, least rank first; of equal ones the one that came first.

    What was removed stays in the heap until it comes up, or until it is the larger part of it.
    """

    def __init__(self, rank: Callable[[Sequence], float]) -> None:
        self._rank = rank
        self._rows: set[Sequence] = set()
        self._heap: list[tuple[float, int, Sequence]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, sequence: Sequence) -> None:
        self._rows.add(sequence)
        heapq.heappush(self._heap, self._entry(sequence))

    def remove(self, sequence: Sequence) -> None:
        self._rows.remove(sequence)
        if len(self._heap) > 2 * len(self._rows) + 16:
            self._heap = [self._entry(row) for row in self._rows]
            heapq.heapify(self._heap)

    def first(self) -> Sequence | None:
        while self._heap and self._heap[0][2] not in self._rows:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def _entry(self, sequence: Sequence) -> tuple[float, int, Sequence]:
        return self._rank(sequence), sequence.arrival, sequence


class _Group:
    """Rows by length and by age."""

    def __init__(self) -> None:
        self.by_length = _Ranked(lambda sequence: -work(sequence))
        self.by_age = _Ranked(lambda _: 0.0)

    def __len__(self) -> int:
        return len(self.by_age)

    def add(self, sequence: Sequence) -> None:
        self.by_length.add(sequence)
        self.by_age.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        self.by_length.remove(sequence)
        self.by_age.remove(sequence)

    @property
    def longest(self) -> Sequence | None:
        return self.by_length.first()

    @property
    def oldest(self) -> Sequence | None:
        return self.by_age.first()


class Waiting:
    """Rows from `add` to `start`, and again from `preempt` to `start`.

    At most `max_passed_over` rows that came later start before one that came earlier does: a new row is
    offered only when it is among so many behind the oldest new one. (A row that starts once more, after a
    preemption, does not count again.) A preempted row that as many younger ones have passed is `due`.
    """

    def __init__(self, max_passed_over: int) -> None:
        self.max_passed_over = max_passed_over
        self.preempted: list[Sequence] = []
        """Rows that have run before, the oldest first."""
        self.aside: set[Sequence] = set()
        """New rows that could be offered, and are not."""
        self.adapted = _Group()
        """What is offered, but for rows of the base model."""
        self.work = 0.0
        self._groups: dict[AdapterKey | None, _Group] = {}
        self._new: dict[Sequence, None] = {}
        self._opened: deque[Sequence] = deque()
        """New rows that may start, by age, and among them some that are gone."""
        self._later: deque[Sequence] = deque()
        """New rows too far behind the oldest, by age, and among them some that are gone."""
        self._open_end = 0
        """Where `_later` begins: rows of this number and above are not offered yet."""
        self._num_arrived = 0

    def __len__(self) -> int:
        return len(self._new) + len(self.preempted)

    def __iter__(self) -> Iterator[Sequence]:
        """Preempted rows, then new ones, each by age."""
        yield from self.preempted
        yield from self._new

    def add(self, sequence: Sequence) -> None:
        sequence.arrival = self._num_arrived
        self._num_arrived += 1
        self._new[sequence] = None
        self._later.append(sequence)
        self.work += work(sequence)
        self._open()

    def preempt(self, sequence: Sequence) -> None:
        """A row that ran waits again."""
        assert sequence.started
        self.preempted.append(sequence)
        self.preempted.sort(key=lambda row: row.arrival)
        self.work += work(sequence)

    def start(self, sequence: Sequence) -> None:
        """A row leaves to run."""
        self.remove(sequence)
        sequence.started = True
        for other in self.preempted:
            other.passed_over += other.arrival < sequence.arrival

    def remove(self, sequence: Sequence) -> None:
        """A row leaves."""
        self.work -= work(sequence)
        if sequence.started:
            self.preempted.remove(sequence)
            return
        del self._new[sequence]
        if sequence in self.aside:
            self.aside.remove(sequence)
        elif sequence.arrival < self._open_end:
            self._withdraw(sequence)
        self._open()

    def set_aside(self, sequence: Sequence) -> None:
        """Offer a row no longer, until `bring_back`."""
        self.aside.add(sequence)
        self._withdraw(sequence)

    def bring_back(self, sequence: Sequence) -> None:
        self.aside.remove(sequence)
        self._offer(sequence)

    @property
    def due(self) -> Sequence | None:
        """The oldest preempted row that nothing else may pass: it alone may start."""
        return next((row for row in self.preempted if row.passed_over >= self.max_passed_over), None)

    def of(self, adapter: AdapterKey | None) -> _Group:
        """What is offered of one adapter."""
        return self._groups.get(adapter) or _Group()

    def check_integrity(self) -> None:
        """Raise AssertionError unless every way to find a row finds the same rows."""
        opened = {row for row in self._new if row.arrival < self._open_end}
        assert self.aside <= opened
        assert sum(map(len, self._groups.values())) == len(opened - self.aside)
        assert len(self.adapted) == sum(row.request.adapter is not None for row in opened - self.aside)
        assert all(len(group) for group in self._groups.values())
        assert self.work == sum(work(row) for row in self)
        assert [row for row in (*self._opened, *self._later) if row in self._new] == list(self._new)
        assert opened or not self._new, "rows that nobody will ever offer"
        assert all(row.arrival <= next(iter(self._new)).arrival + self.max_passed_over for row in opened)
        assert not any(row.started for row in self._new)
        assert all(row.started for row in self.preempted)

    def _open(self) -> None:
        """Offer what is near enough behind the oldest."""
        while self._opened and self._opened[0] not in self._new:
            self._opened.popleft()
        while self._later:
            row = self._later[0]
            oldest = self._opened[0] if self._opened else row
            if row.arrival > oldest.arrival + self.max_passed_over:
                return
            self._later.popleft()
            self._open_end = row.arrival + 1
            if row in self._new:
                self._opened.append(row)
                self._offer(row)

    def _offer(self, sequence: Sequence) -> None:
        adapter = sequence.request.adapter
        self._groups.setdefault(adapter, _Group()).add(sequence)
        if adapter is not None:
            self.adapted.add(sequence)

    def _withdraw(self, sequence: Sequence) -> None:
        adapter = sequence.request.adapter
        self._groups[adapter].remove(sequence)
        if not self._groups[adapter]:
            del self._groups[adapter]
        if adapter is not None:
            self.adapted.remove(sequence)
