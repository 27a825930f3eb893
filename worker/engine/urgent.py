"""The interactive rows that wait: somebody waits for them. No torch here."""

from collections.abc import Iterator

from worker.engine.sequence import Sequence


class Urgent:
    """Rows from `add` to `start`, and again from `preempt` to `start`, the oldest first.

    One that finds no slot lets younger ones pass, `max_passed_over` of them, and then nobody.
    """

    def __init__(self, max_passed_over: int) -> None:
        self.max_passed_over = max_passed_over
        self._rows: list[Sequence] = []
        self._num_arrived = 0

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._rows)

    @property
    def offered(self) -> list[Sequence]:
        """Those that may start, the oldest first."""
        for number, row in enumerate(self._rows):
            if row.passed_over >= self.max_passed_over:
                return self._rows[: number + 1]
        return [*self._rows]

    def add(self, sequence: Sequence) -> None:
        sequence.arrival = self._num_arrived
        self._num_arrived += 1
        self._rows.append(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """A row that ran waits again."""
        assert sequence.started
        self._rows.append(sequence)
        self._rows.sort(key=lambda row: row.arrival)

    def start(self, sequence: Sequence) -> None:
        """A row leaves to run."""
        self.remove(sequence)
        sequence.started = True
        for other in self._rows:
            other.passed_over += other.arrival < sequence.arrival

    def remove(self, sequence: Sequence) -> None:
        """A row leaves."""
        self._rows.remove(sequence)
