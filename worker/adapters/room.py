"""Rows wait for room among the adapters in memory, and nobody for ever."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable

from worker.engine.lora_store import LoRAStore
from worker.errors import EngineFailed
from worker.jobs import AdapterKey


class _Waiting:
    """The rows that wait for one adapter's room."""

    __slots__ = ("expected_bytes", "passed_over", "rows")

    def __init__(self, expected_bytes: int) -> None:
        self.expected_bytes = expected_bytes
        self.passed_over = 0
        self.rows: deque[asyncio.Future[None]] = deque()


_Line = OrderedDict[AdapterKey, _Waiting]


def _first(line: _Line) -> _Waiting | None:
    return next(iter(line.values()), None)


class AdapterRoom:
    """Reserves adapters of a store for rows, in two lines. Used from one event loop.

    An adapter that is in memory already is had at once, past those who wait; but at most `max_passed_over`
    rows may pass the first of a line. From then on nobody else gets anything until that one has its room,
    which comes when the rows at work have ended.

    Interactive rows have a line of their own, which is served before the other one, and counts as passing
    it. While one of them waits, `make_room` is called now and then: it may have rows of the queue give back
    what they have reserved.
    """

    def __init__(
        self, store: LoRAStore, max_passed_over: int, make_room: Callable[[], None] = lambda: None
    ) -> None:
        self._store = store
        self._max_passed_over = max_passed_over
        self._make_room = make_room
        self._line: _Line = OrderedDict()
        self._urgent: _Line = OrderedDict()
        self._closed = False

    @property
    def num_waiting(self) -> int:
        lines = (*self._urgent.values(), *self._line.values())
        return sum(len(waiting.rows) for waiting in lines)

    async def reserve(self, key: AdapterKey, expected_bytes: int = 0, *, interactive: bool = False) -> None:
        """Wait until `key` is reserved once more. Raises EngineFailed when it is closed."""
        if self._closed:
            raise EngineFailed("the engine has stopped")
        if self._take(key, expected_bytes, interactive=interactive):
            return
        line = self._urgent if interactive else self._line
        waiting = line.setdefault(key, _Waiting(expected_bytes))
        row: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting.rows.append(row)
        self.ask_for_room()
        try:
            await row
        except asyncio.CancelledError:
            self._leave(line, key, row)
            raise

    def try_reserve(self, key: AdapterKey, expected_bytes: int = 0) -> bool:
        """Reserve `key` once more if that needs no waiting; nobody is passed for it."""
        nobody_waits = not self._line and not self._urgent
        return not self._closed and nobody_waits and self._store.reserve(key, expected_bytes)

    def release(self, key: AdapterKey) -> None:
        """Take one reservation back, and let in whoever that makes room for."""
        self._store.release(key)
        self.let_in()

    def let_in(self) -> None:
        """Serve the lines as far as there is room. To be called when something was unpinned, too."""
        first = next(iter(self._line), None)
        if first is not None and self._is_due(self._line[first]):
            self._admit(self._line, first)
        self._serve(self._urgent)
        self.ask_for_room()
        if not self._urgent:
            self._serve(self._line)

    def ask_for_room(self) -> None:
        """If an interactive row waits, and no row of the queue is due before it, have room made."""
        first = _first(self._line)
        if self._urgent and not (first is not None and self._is_due(first)):
            self._make_room()

    def close(self) -> None:
        """Whoever waits, or comes later, is told that the engine has stopped."""
        self._closed = True
        waiting = [*self._urgent.values(), *self._line.values()]
        self._urgent, self._line = OrderedDict(), OrderedDict()
        for row in [row for one in waiting for row in one.rows]:
            if not row.done():
                row.set_exception(EngineFailed("the engine has stopped"))

    @property
    def _heads(self) -> list[_Waiting]:
        """The first of each line."""
        return [head for line in (self._line, self._urgent) if (head := _first(line)) is not None]

    def _is_due(self, waiting: _Waiting) -> bool:
        return waiting.passed_over >= self._max_passed_over

    def _take(self, key: AdapterKey, expected_bytes: int, *, interactive: bool) -> bool:
        """Reserve past the lines, if that is allowed."""
        if not interactive and self._urgent:
            return False
        ahead = self._urgent if interactive else self._line
        if ahead and (key not in self._store or key in ahead):
            return False
        if any(map(self._is_due, self._heads)) or not self._store.reserve(key, expected_bytes):
            return False
        for head in self._heads:
            head.passed_over += 1
        return True

    def _serve(self, line: _Line) -> None:
        for key in [*line]:
            is_first = key == next(iter(line))
            if is_first or key in self._store:
                self._admit(line, key)

    def _admit(self, line: _Line, key: AdapterKey) -> None:
        """Let in as many rows of an adapter as can be."""
        waiting = line[key]
        while waiting.rows and self._may_go(waiting):
            if waiting.rows[0].done():  # cancelled, and about to say so itself
                waiting.rows.popleft()
                continue
            if not self._store.reserve(key, waiting.expected_bytes):
                return
            waiting.rows.popleft().set_result(None)
            for head in self._heads:
                head.passed_over += head is not waiting
        if not waiting.rows:
            del line[key]

    def _may_go(self, waiting: _Waiting) -> bool:
        """The first of the queue's line may when it is asked; others while they pass nobody who is due."""
        is_first = waiting is _first(self._line)
        return is_first or not any(self._is_due(head) for head in self._heads if head is not waiting)

    def _leave(self, line: _Line, key: AdapterKey, row: asyncio.Future[None]) -> None:
        """A row that waited was cancelled, perhaps just after it was let in."""
        waiting = line.get(key)
        if row.done() and not row.cancelled() and row.exception() is None:
            self.release(key)
        elif waiting is not None and row in waiting.rows:
            waiting.rows.remove(row)
            if not waiting.rows:
                del line[key]
            self.let_in()
