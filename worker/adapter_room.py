"""Rows wait for room among the adapters in memory, and nobody for ever."""

import asyncio
from collections import OrderedDict, deque

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


class AdapterRoom:
    """Reserves adapters of a store for rows, in a line. Used from one event loop.

    An adapter that is in memory already is had at once, past those who wait; but at most `max_passed_over`
    rows may pass the first of the line. From then on nobody else gets anything until that one has its room,
    which comes when the rows at work have ended.
    """

    def __init__(self, store: LoRAStore, max_passed_over: int) -> None:
        self._store = store
        self._max_passed_over = max_passed_over
        self._line: OrderedDict[AdapterKey, _Waiting] = OrderedDict()
        self._closed = False

    @property
    def num_waiting(self) -> int:
        return sum(len(waiting.rows) for waiting in self._line.values())

    async def reserve(self, key: AdapterKey, expected_bytes: int = 0) -> None:
        """Wait until `key` is reserved once more. Raises EngineFailed when it is closed."""
        if self._closed:
            raise EngineFailed("the engine has stopped")
        if self._take(key, expected_bytes):
            return
        waiting = self._line.setdefault(key, _Waiting(expected_bytes))
        row: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting.rows.append(row)
        try:
            await row
        except asyncio.CancelledError:
            self._leave(key, row)
            raise

    def try_reserve(self, key: AdapterKey, expected_bytes: int = 0) -> bool:
        """Reserve `key` once more if that needs no waiting; nobody is passed for it."""
        return not self._closed and not self._line and self._store.reserve(key, expected_bytes)

    def release(self, key: AdapterKey) -> None:
        """Take one reservation back, and let in whoever that makes room for."""
        self._store.release(key)
        self.let_in()

    def let_in(self) -> None:
        """Serve the line as far as there is room. To be called when something was unpinned, too."""
        for key in [*self._line]:
            is_first = key == next(iter(self._line))
            if is_first or key in self._store:
                self._admit(key)

    def close(self) -> None:
        """Whoever waits, or comes later, is told that the engine has stopped."""
        self._closed = True
        line, self._line = self._line, OrderedDict()
        for row in [row for waiting in line.values() for row in waiting.rows]:
            if not row.done():
                row.set_exception(EngineFailed("the engine has stopped"))

    @property
    def _may_pass(self) -> bool:
        first = next(iter(self._line.values()), None)
        return first is None or first.passed_over < self._max_passed_over

    def _take(self, key: AdapterKey, expected_bytes: int) -> bool:
        """Reserve past the line, if that is allowed."""
        first = next(iter(self._line.values()), None)
        if first is not None and (key not in self._store or key in self._line or not self._may_pass):
            return False
        if not self._store.reserve(key, expected_bytes):
            return False
        if first is not None:
            first.passed_over += 1
        return True

    def _admit(self, key: AdapterKey) -> None:
        """Let in as many rows of an adapter as can be."""
        waiting = self._line[key]
        first = next(iter(self._line.values()))
        while waiting.rows and (waiting is first or self._may_pass):
            if waiting.rows[0].done():  # cancelled, and about to say so itself
                waiting.rows.popleft()
                continue
            if not self._store.reserve(key, waiting.expected_bytes):
                return
            waiting.rows.popleft().set_result(None)
            if waiting is not first:
                first.passed_over += 1
        if not waiting.rows:
            del self._line[key]

    def _leave(self, key: AdapterKey, row: asyncio.Future[None]) -> None:
        """A row that waited was cancelled, perhaps just after it was let in."""
        waiting = self._line.get(key)
        if row.done() and not row.cancelled() and row.exception() is None:
            self.release(key)
        elif waiting is not None and row in waiting.rows:
            waiting.rows.remove(row)
            if not waiting.rows:
                del self._line[key]
            self.let_in()
